"""Costs of tasks and of passes, without running them."""
