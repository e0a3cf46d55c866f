from __future__ import annotations

import pytest
from live import serving

from checkpoints import load


@pytest.fixture(scope="session")
def live(mixtral):
    """A live server of the tiny Mixtral."""
    with serving(load(mixtral)) as server:
        yield server


@pytest.fixture(scope="session")
def alone(mixtral):
    """The same model, asked directly."""
    return load(mixtral)
