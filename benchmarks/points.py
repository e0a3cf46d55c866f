"""Which policies `plan_accuracy.py` measures: plans of cells, and what is beside the first of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cells import CellSpec
from neighbours import neighbours

from moe_lightning.bench.models import spec_of
from moe_lightning.bench.session import Session
from moe_lightning.config import EngineConfig
from moe_lightning.engine.gpu_budget import cap_gpu_memory
from moe_lightning.engine.plan import Plan, make_plan, measured_rates
from moe_lightning.hardware.profile_cache import load_profile
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.planner import problem_of, search
from moe_lightning.perf.rates import MeasuredRates, Rates
from moe_lightning.perf.sizing import Problem
from moe_lightning.perf.trials import Planned
from moe_lightning.policy import Policy

# Neighbours between two times that the plan is measured: machines are a few percent faster or slower every minute.
_BETWEEN = 3


@dataclass(frozen=True)
class Point:
    """A policy to be measured in a cell; `name` says how it differs from the plan."""

    cell: CellSpec
    name: str
    policy: Policy

    def path(self, args: argparse.Namespace) -> Path:
        """Where its result is."""
        slug = self.name.replace(" ", "_")
        return Path(args.out / f"point_{slug}_{self.cell.file_name(Path(args.model).name, 0)}")


class Asked:
    """What the script's arguments ask for: cells, rates, and the policies to be measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cells = [CellSpec.parse(text) for text in args.cell]
        config = EngineConfig(
            args.model, load_format="dummy", device=args.device, dtype=args.dtype, executor=args.executor,
            host_memory=args.host_memory, gpu_memory=self.cells[0].gpu,
        )  # fmt: skip
        self.spec = spec_of(args.model, args.num_layers)
        self.session = Session(config, self.spec, shares_memory=True)
        self.config = config
        has_gpu = torch.cuda.is_available() and args.device != "cpu"
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
        self.dtype = self.spec.dtype if args.dtype == "auto" else args.dtype
        self.rates: Rates = (
            MeasuredRates(load_profile(args.profile))
            if args.profile
            else measured_rates(self.device, getattr(torch, self.dtype))
        )

    def setting(self, cell: CellSpec) -> EngineConfig:
        """The cell's configuration."""
        host = cell.host or self.session.host_memory
        return replace(self.config, gpu_memory=cell.gpu, host_memory=host, max_num_seqs=cell.seqs)

    def planned(self, cell: CellSpec) -> tuple[Problem, Planned]:
        """What is asked for in a cell, and the plan."""
        setting, work = self.setting(cell), cell.work
        gpu = cap_gpu_memory(self.device, cell.gpu) if self.device.type == "cuda" else cell.gpu
        assert setting.host_memory is not None
        memory = Memory(setting.host_memory, gpu)
        problem = problem_of(self.spec, self.dtype, memory, work, max_num_seqs=cell.seqs)
        planned = search(self.spec, self.dtype, memory, self.rates, work, max_num_seqs=cell.seqs)
        return replace(problem, packed=planned.policy.packed), planned

    def plan_of(self, cell: CellSpec, policy: Policy) -> Plan:
        """The engine's plan, with what it is predicted to reach."""
        work = cell.work
        found = Outlook(self.spec, self.dtype, policy, self.rates, work).prediction
        plan = make_plan(self.setting(cell), policy, spec=self.spec)
        return replace(plan, prediction=found, rates=self.rates, workload=work)

    def points(self) -> Iterator[Point]:
        """The plans of all cells, then what is beside the first one, with that plan again after every few."""
        first, plans = self.cells[0], {}
        for cell in self.cells if "plans" in self.args.part else self.cells[:1]:
            plans[cell] = self.planned(cell)
            yield Point(cell, "plan", plans[cell][1].policy)
        if "neighbours" in self.args.part:
            problem, planned = plans[first]
            some = list(neighbours(problem, planned).items())
            for begin in range(0, len(some), _BETWEEN):
                for name, policy in some[begin : begin + _BETWEEN]:
                    yield Point(first, name, policy)
                yield Point(first, f"plan again {begin // _BETWEEN + 1}", planned.policy)
