"""Attention under a layout: one interface (dispatch.py) and a file for each kernel."""
