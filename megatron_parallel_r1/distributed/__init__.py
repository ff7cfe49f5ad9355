"""Processes and process groups: start-up, collectives, heartbeats and the watchdog."""
