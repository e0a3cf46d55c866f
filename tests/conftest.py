"""Checkpoints that many tests read, each written once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Directory of a kind's float32 checkpoint; imported here, so that tests of planning stay free of torch."""
    import torch

    from checkpoints import write_checkpoint

    # Tiny matrices gain nothing from more threads, and the lanes of the threaded executor would compete.
    torch.set_num_threads(1)
    written = {}

    def get(kind):
        if kind not in written:
            written[kind] = write_checkpoint(tmp_path_factory.mktemp(kind), kind)
        return written[kind]

    return get


@pytest.fixture(scope="session")
def mixtral(checkpoint_of):
    """Directory of the tiny Mixtral."""
    return checkpoint_of("mixtral")


@pytest.fixture(scope="session")
def mixtral_reference(mixtral):
    """The tiny Mixtral under transformers."""
    from checkpoints import reference

    return reference(mixtral)
