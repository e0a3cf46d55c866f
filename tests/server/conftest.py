from __future__ import annotations

import pytest
from live import serving

from checkpoints import load
from moe_lightning.server.app import Settings


@pytest.fixture(scope="session")
def live(mixtral):
    """A live server of the tiny Mixtral."""
    with serving(load(mixtral)) as server:
        yield server


@pytest.fixture(scope="session")
def batching(mixtral, tmp_path_factory):
    """A live server with a batch service; two answers at a time, so that requests have to wait."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("batches"))
    with serving(load(mixtral, max_num_seqs=2), settings) as server:
        yield server


@pytest.fixture(scope="session")
def alone(mixtral):
    """The same model, asked directly."""
    return load(mixtral)
