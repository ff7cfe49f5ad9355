"""Metrics files, live progress, evaluation tables and `report.html` of a run; knows run folders, but no model
and no engine."""
