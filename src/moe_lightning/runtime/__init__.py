"""Running a schedule: what each task does, and the lanes that do it."""
