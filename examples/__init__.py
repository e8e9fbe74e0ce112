"""Configurations to run, and the embedded model of the demo."""
