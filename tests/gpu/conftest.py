"""What tests on a GPU share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test():
    """A hook set on a worker refers back to it, and the next test needs the memory."""
    yield
    gc.collect()
