"""Measures what a planner has to know of this machine, with its lanes at work at once."""
