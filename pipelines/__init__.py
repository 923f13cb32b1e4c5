"""Prefect flows and tasks, the `diffem` command line, and the way from a config to its objects."""
