"""What the system says of memory and CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lightning.hardware.host import available_memory, cpu_name, total_memory


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n")
    return path


@pytest.mark.parametrize(
    ("limit", "total", "free"), [("max", 1000, 600), ("512000", 500, 300), ("9999999", 1000, 600)]
)
def test_a_container_has_what_its_limit_leaves(
    limit: str, total: int, free: int, meminfo: Path, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("307200")
    # Of it a third are files that were read or written, as a checkpoint: nothing is lost with them.
    (tmp_path / "memory.stat").write_text(
        "anon 204800\nfile 102400\ninactive_file 92160\nactive_file 10240\n"
    )
    assert total_memory(meminfo, tmp_path) == total * 1024
    assert available_memory(meminfo, tmp_path) == free * 1024


def test_without_a_container_all_memory_counts(meminfo: Path, tmp_path: Path) -> None:
    assert total_memory(meminfo, tmp_path / "none") == 1000 * 1024


def test_the_cpu_has_a_name_even_where_the_system_tells_none(tmp_path: Path) -> None:
    assert cpu_name(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A CPU\n")
    assert cpu_name(tmp_path) == "A CPU"
