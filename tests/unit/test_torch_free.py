from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_CONTRACTS = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
    "contracts"
]
_CONTRACT = next(c for c in _CONTRACTS if c["type"] == "forbidden")
# Each package with all modules in it.
_IMPORT_ALL = """
import importlib, pkgutil, sys
count = 0
for root in {roots}:
    module = importlib.import_module(root)
    inner = pkgutil.walk_packages(getattr(module, "__path__", ()), root + ".")
    for name in (root, *(m.name for m in inner)):
        importlib.import_module(name)
        count += 1
{then}
print(count, *sorted(set({forbidden}) & set(sys.modules)))
"""
_PREDICT = """
from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.predict import predict
from moe_lightning.pipeline.draw import to_svg, to_text
from moe_lightning.pipeline.task import PassShape
from moe_lightning.pipeline.validate import validate
from moe_lightning.pipeline.baselines import SCHEDULES
shape = PassShape(32, 1, 2, 1, 2, (8,) * 32, 16)
timeline = predict(resolve("mixtral-8x7b"), shape, (9, 4, 4), 50, preset("l4"), pages_per_expert=1)
validate(SCHEDULES["cgopipe"](shape))
assert to_svg(timeline) and to_text(timeline, 80)
"""


def _loaded(roots: list[str], then: str = "") -> tuple[int, list[str]]:
    """How many modules a fresh interpreter imported, and which of the forbidden ones came along."""
    code = _IMPORT_ALL.format(roots=roots, then=then, forbidden=_CONTRACT["forbidden_modules"])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    count, *forbidden = result.stdout.split()
    return int(count), forbidden


def test_everything_that_plans_is_under_the_contract() -> None:
    planning = ("config", "policy", "hardware", "models", "pipeline", "perf")
    assert {f"moe_lightning.{name}" for name in planning} <= set(_CONTRACT["source_modules"])
    assert "torch" in _CONTRACT["forbidden_modules"]


@pytest.mark.parametrize("root", _CONTRACT["source_modules"])
def test_importing_any_planning_module_loads_no_torch(root: str) -> None:
    count, forbidden = _loaded([root])
    assert forbidden == []
    files = list((_ROOT / "src" / root.replace(".", "/")).rglob("*.py"))
    assert count == max(1, len(files))  # a package without its modules would prove nothing


def test_predicting_validating_and_drawing_a_pass_load_no_torch() -> None:
    assert _loaded(_CONTRACT["source_modules"], _PREDICT)[1] == []


def test_the_check_sees_torch_where_it_is_loaded() -> None:
    assert "torch" in _loaded(["moe_lightning.kernels.reference"])[1]
