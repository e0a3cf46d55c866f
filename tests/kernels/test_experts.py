"""The experts' kernels against the reference: shapes that are awkward, frames that must not be read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_lightning.kernels import reference
from moe_lightning.kernels.expert_config import ExpertsConfig, ExpertsShape, Tile, default_config, fit, select
from moe_lightning.pipeline.shape import experts_in

pytest.importorskip("triton")
from moe_lightning.kernels import expert_sort as sorting
from moe_lightning.kernels import experts

_SMALL = ExpertsConfig(16, 2, Tile(16, 16, 4, 2), Tile(32, 16, 4, 2))
_LOADS = {
    "plain": {},
    "tma": {"tma": True},
    "tma-sorted": {"tma": True, "gather": False},
    "split": {"split_k": 3},
}


@dataclasses.dataclass
class Case:
    """Shapes of one call; H, rows, pages per expert, experts, experts per token, tokens."""

    tokens: int
    hidden: int = 48
    rows: int = 24
    pages: int = 2
    num_experts: int = 4
    top_k: int = 2


def _ids(case, generator, spread):
    if spread == "one":
        return torch.full((case.tokens, case.top_k), case.num_experts - 1)
    scores = torch.rand(case.tokens, case.num_experts, generator=generator)
    if spread == "gap":  # expert 1 has no token
        scores[:, 1] = -1
    return scores.topk(case.top_k, dim=-1).indices


def _check(case, device, dtype, assert_close, config=_SMALL, spread="random", max_tokens=None, parts=1):
    g = torch.Generator().manual_seed(case.tokens)
    num_pages = case.num_experts * case.pages
    table = torch.randperm(num_pages + 3, generator=g)[:num_pages]
    frames = torch.full((num_pages + 3, 3 * case.rows * case.hidden), float("nan"), dtype=dtype)
    frames[table] = (torch.randn(num_pages, frames.shape[1], generator=g) / case.hidden**0.5).to(dtype)
    x = torch.randn(case.tokens, case.hidden, generator=g).to(dtype)
    hidden = torch.randn(case.tokens, case.hidden, generator=g).to(dtype)
    ids, weights = _ids(case, g, spread), torch.rand(case.tokens, case.top_k, generator=g)
    if spread == "gap":  # nor are its pages there
        frames[table[case.pages : 2 * case.pages]] = float("nan")
    pages = [frames[frame].double() for frame in table]
    expected = hidden.double() + reference.experts(x.double(), ids, weights.double(), pages, case.pages)
    workspace = experts.Workspace.allocate(
        max_tokens or max(case.tokens, 1), case.top_k, case.num_experts, case.hidden, case.rows * case.pages,
        dtype, device,
    )  # fmt: skip
    workspace.rows.fill_(float("nan"))
    workspace.inter.fill_(float("nan"))
    hidden = hidden.to(device)
    for part in range(parts):
        only = experts_in(case.num_experts, parts, part) if parts > 1 else None
        there = _only(frames, table, case.pages, only)
        experts.experts_(
            hidden, x.to(device), ids.to(device), weights.to(device), there.to(device),
            table.to(device, torch.int32), case.pages, workspace, config, only,
        )  # fmt: skip
    assert_close(hidden, expected, dtype)
    return hidden


def _only(frames, table, pages_per_expert, only):
    """The frames as they are while the pages of other experts have not come yet, or have gone."""
    if only is None:
        return frames
    there = torch.full_like(frames, float("nan"))
    mine = table[only.start * pages_per_expert : only.stop * pages_per_expert]
    there[mine] = frames[mine]
    return there


@pytest.mark.parametrize("load", _LOADS)
def test_every_way_of_loading_gives_the_reference(device, dot_dtype, load, assert_close):
    config = dataclasses.replace(_SMALL, **_LOADS[load])
    if device.type == "cuda" and config.tma and dot_dtype is torch.float32:
        pytest.skip("the dispatch loads float32 by pointers")
    if device.type == "cuda" and config.tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper or later")
    _check(Case(33), device, dot_dtype, assert_close, config)


@pytest.mark.parametrize(
    "case",
    [
        Case(0),
        Case(1),
        Case(1, num_experts=1, top_k=1, pages=1),
        Case(17, num_experts=1, top_k=1),
        Case(16, num_experts=2, top_k=2),
        Case(5, hidden=16, rows=8, pages=3, num_experts=9, top_k=8),
        Case(7, hidden=80, rows=40, pages=1, num_experts=20, top_k=3),
    ],
    ids=str,
)
def test_awkward_shapes(device, case, assert_close):
    _check(case, device, torch.float32, assert_close)


@pytest.mark.parametrize("spread", ["one", "gap"])
def test_uneven_routing_reads_only_the_pages_of_experts_with_tokens(device, spread, assert_close):
    _check(Case(19), device, torch.float32, assert_close, spread=spread)


def test_more_tokens_than_the_workspace_holds_are_done_in_turns(device, assert_close):
    _check(Case(21), device, torch.float32, assert_close, max_tokens=8)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("load", _LOADS)
def test_parts_of_the_experts_add_up_and_read_no_other_pages(device, load, parts, assert_close):
    config = dataclasses.replace(_SMALL, **_LOADS[load])
    dtype = torch.bfloat16 if device.type == "cuda" and config.tma else torch.float32
    if device.type == "cuda" and config.tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper or later")
    _check(
        Case(600 if load == "plain" and parts == 3 else 33, num_experts=5),
        device,
        dtype,
        assert_close,
        config,
        parts=parts,
    )


def test_results_are_the_same_bits_every_time(device, dot_dtype, assert_close):
    first, second = (_check(Case(20), device, dot_dtype, assert_close) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 700, 1100])
@pytest.mark.parametrize("num_experts", [1, 5, 130])
def test_slots_are_sorted_by_expert_and_every_row_is_in_one_block(device, num_tokens, num_experts):
    g = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(num_experts, (num_tokens, 2), generator=g)
    ids[ids == 3] = 0
    slots, block_m = ids.numel(), 16
    workspace = experts.Workspace.allocate(num_tokens, 2, num_experts, 16, 16, torch.float32, device)
    workspace.sorted_slots.fill_(-1)
    num_blocks = sorting.sort_slots(
        ids.to(device),
        range(num_experts),
        block_m,
        workspace.counts,
        workspace.sorted_slots,
        workspace.blocks,
    )
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(workspace.sorted_slots[:slots].cpu().long(), order)
    covered = []
    for expert, row, end, total in workspace.blocks[:num_blocks].tolist():
        assert total == slots
        if expert >= 0:
            rows = range(row, min(row + block_m, end))
            covered.extend(rows)
            assert set(ids.flatten()[order[list(rows)]].tolist()) == {expert}
    assert covered == list(range(slots))


@pytest.mark.parametrize("tokens", [1, 8, 64, 300, 2048, 20000])
@pytest.mark.parametrize("capability", [(0, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_configuration_fits_any_shape_and_card(tokens, capability, itemsize):
    for experts_, k, hidden, rows, pages in [
        (8, 2, 4096, 1792, 8),
        (128, 8, 2048, 768, 1),
        (1, 1, 48, 24, 2),
    ]:
        shape = ExpertsShape(tokens, k, experts_, hidden, rows, pages, itemsize, capability)
        for config in (default_config(shape), select(shape)):
            fitted = fit(config, shape)
            assert fitted == fit(fitted, shape)
            assert fitted.gather or fitted.tma
            assert not fitted.tma or (capability >= (9, 0) and itemsize == 2)
            assert ExpertsConfig.from_json(fitted.to_json()) == fitted


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 600, 3000])
@pytest.mark.parametrize("case", [Case(0, 1024, 448, 2, 8, 2), Case(0, 512, 384, 1, 32, 8)], ids=str)
def test_the_chosen_configuration_gives_the_reference_on_this_gpu(tokens, case, dtype, assert_close):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = dataclasses.replace(case, tokens=tokens)
    _check(case, torch.device("cuda"), dtype, assert_close, config=None)
