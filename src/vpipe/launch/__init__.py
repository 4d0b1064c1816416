"""Starts ranks on machines."""
