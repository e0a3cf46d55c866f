"""Jobs that many tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_desk import MIXED, Desk, by_id


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, MIXED)


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[tuple[Desk, dict[str, Any], list[Any]]]:
    (tmp_path / "whole").mkdir()
    desk = Desk(tmp_path / "whole", MIXED)
    desk.run()
    yield desk, desk.answers(), by_id(desk.failures())
