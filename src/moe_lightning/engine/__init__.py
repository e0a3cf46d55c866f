"""Requests in, outputs out: which sequences ride on which pass."""
