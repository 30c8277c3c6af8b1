"""Drives a run: recipe, loop, schedules, queue, checkpoints, metrics, report, the command line."""
