"""Measurements of this machine: how near each part comes to what the hardware can do."""
