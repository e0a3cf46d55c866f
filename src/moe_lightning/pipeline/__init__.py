"""A pass as data: tasks on lanes, their dependencies, and what can be done with them."""
