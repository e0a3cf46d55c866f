"""Kernels compile for every GPU that the package serves, and fit its shared memory; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KIB = 1024
# Of one program. Source: CUDA C++ Programming Guide, technical specifications by compute capability.
SHARED_BYTES = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
KERNELS = {
    "_attention_kernel", "_count_kernel", "_escapes_kernel", "_gather_kernel", "_load_kernel", "_place_kernel",
    "_rms_norm_kernel", "_rotate_kernel", "_route_kernel", "_store_kernel", "_tiles_kernel", "_unpack_kernel",
    "combine_kernel", "down_kernel", "gate_up_kernel",
}  # fmt: skip
ROWS_ANYWHERE = "rows anywhere"  # a case of `launches`
ALL = os.environ.get("MOE_LIGHTNING_FULL_TESTS") == "1"


def compiled(which, arch, directory):
    """What the script tells of each launch, compiled anew."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(directory)}
    script = Path(__file__).with_name("compiling.py")
    command = [sys.executable, str(script), which, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("which", "arch"),
    [*(("few", arch) for arch in (75, 90)), *(("every", arch) for arch in SHARED_BYTES if ALL)],
)
@pytest.mark.timeout(7200 if ALL else 600)
def test_kernels_compile_and_fit(which, arch, tmp_path):
    found = compiled(which, arch, tmp_path)
    assert [launch for launch in found if "error" in launch] == []
    assert {launch["kernel"] for launch in found} >= KERNELS
    for launch in found:
        assert launch["shared"] <= SHARED_BYTES[arch], launch
        assert all(size <= most for size, most in zip(launch["grid"], LARGEST_GRID, strict=False)), launch
    variants = {(at["kernel"], at["variant"]) for at in found if at.get("case") == ROWS_ANYWHERE}
    kernels = [kernel for kernel, _ in variants]
    assert len(kernels) == len(set(kernels)), (
        "where rows begin, or how many they are, makes a job stop to compile"
    )
