"""Checkpoints that many tests read, each written once."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from hypothesis import HealthCheck, settings

# Triton decides when it is first imported, by whomever, whether kernels are interpreted. With a GPU there the
# compiled kernels are the ones to test; without one the interpreter is.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

# Texts are as wide and as plain as they are in a file, whatever terminal the tests run in.
os.environ["COLUMNS"] = "100"
for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# The same examples in every run, so that a change is judged by itself: look for new ones with
# `pytest --hypothesis-profile=default`, and keep what is found as an `@example`. How long an example takes, or
# drawing it, says how busy the machine is.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Begin with the tests that take longest, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("demo") is None)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers in every run; which tests its process ran before is chance."""
    if "torch" in sys.modules:  # planning does without it
        sys.modules["torch"].manual_seed(0)


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


@pytest.fixture(scope="session")
def sharded_mixtral(tmp_path_factory):
    """The tiny Mixtral in many files."""
    from checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("sharded"), "mixtral", max_shard_size="200KB")


@pytest.fixture
def single(mixtral, tmp_path):
    """A copy of the tiny Mixtral that a test may damage."""
    return shutil.copytree(mixtral, tmp_path / "single")
