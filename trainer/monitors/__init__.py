"""Alarms for a run that is left alone."""
