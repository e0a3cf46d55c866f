"""Packed weights come back bit by bit: from the reference, and from the kernel over pages in any frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import NotPackableError
from moe_lightning.kernels import ops, packing
from moe_lightning.perf.page_size import TILE, page_bytes, segment_bytes, segment_parts

pytest.importorskip("triton")
from moe_lightning.kernels import pack as packing_kernel
from moe_lightning.kernels import unpack as kernel

SIZES = (1, 2, TILE // 2, TILE - 1, TILE, TILE + 1, 3 * TILE + 77)


def _bits(values):
    return values.view(torch.int16)


def _packed(values):
    out = torch.full((segment_bytes(values.numel()),), 0xAA, dtype=torch.uint8)
    packing.pack(values, out)
    return out


def _returns(values):
    return torch.equal(_bits(packing.unpack(_packed(values), values.numel())), _bits(values.flatten()))


def _normal(*shape, std=0.02):
    return (torch.randn(*shape) * std).bfloat16()


def _num_escapes(packed, num_values):
    parts = segment_parts(num_values)
    return int(packed[parts.starts : parts.escapes].view(torch.int32)[parts.num_tiles])


def _plainly_packed(values):
    """The format as it is described, one tile after the other; of tiles that the first windows fit."""
    parts = segment_parts(len(values))
    out = np.zeros(parts.end, np.uint8)
    bits = np.zeros((parts.num_tiles, TILE), np.uint16)
    bits.reshape(-1)[: len(values)] = _bits(values).numpy().view(np.uint16)
    exponents = (bits >> 7 & 0xFF).astype(int)
    starts, escapes = [0], []
    for tile, exps in enumerate(exponents):
        bases = [max(exps.max() - k - 15, 0) for k in range(8)]
        covered = [((exps == 0) | (base < exps) & (exps <= base + 15)).sum() for base in bases]
        base = bases[int(np.argmax(covered))]
        inside = (base < exps) & (exps <= base + 15)
        codes = np.where(inside, exps - base, 0)
        half = slice(parts.codes + tile * TILE // 2, parts.codes + (tile + 1) * TILE // 2)
        out[half] = codes[: TILE // 2] | codes[TILE // 2 :] << 4
        out[parts.bases + tile] = base
        escapes += [int(at) | int(exps[at]) << 12 for at in np.flatnonzero(~inside & (exps != 0))]
        starts.append(len(escapes))
    out[: parts.codes] = (bits >> 8 & 0x80 | bits & 0x7F).reshape(-1)
    out[parts.starts :].view(np.int32)[: len(starts)] = starts
    out[parts.escapes :].view(np.int32)[: len(escapes)] = escapes
    return torch.from_numpy(out)


@pytest.mark.parametrize("num_values", [*SIZES, 1792 * 4096])
def test_parts_follow_each_other_at_multiples_of_16_bytes(num_values):
    parts = segment_parts(num_values)
    padded = parts.num_tiles * TILE
    assert padded - TILE < num_values <= padded
    sizes = (padded, padded // 2, parts.num_tiles, 4 * (parts.num_tiles + 1), 4 * parts.capacity)
    begins = (parts.low, parts.codes, parts.bases, parts.starts, parts.escapes, parts.end)
    assert begins[0] == 0
    for size, begin, following in zip(sizes, begins[:-1], begins[1:], strict=True):
        assert following % 16 == 0
        assert 0 <= following - (begin + size) < 16
    assert parts.capacity == max(16, padded // 512)
    assert segment_bytes(num_values) == parts.end


def test_pages_have_the_bytes_of_their_segments():
    assert page_bytes(4096, 1792, 2, packed=False) == 3 * 4096 * 1792 * 2
    assert page_bytes(4096, 1792, 4, packed=False) == 3 * 4096 * 1792 * 4
    for hidden_size, rows in ((4096, 1792), (64, 48), (10, 3)):
        packed = page_bytes(hidden_size, rows, 2, packed=True)
        assert packed % 4096 == 0
        assert 0 <= packed - 3 * segment_bytes(hidden_size * rows) < 4096
    assert page_bytes(4096, 1792, 2, packed=True) / page_bytes(4096, 1792, 2, packed=False) < 0.755


@pytest.mark.parametrize("num_values", SIZES)
def test_a_segment_is_what_the_format_says(num_values):
    values = _normal(num_values)
    values[values.abs() < 1e-4] = 0
    values[::3001] = 1e-7  # escapes, some of them at the ends of tiles
    values[TILE - 1 :: TILE] = -1e-30
    packed = _packed(values)
    assert torch.equal(packed, _plainly_packed(values))
    assert torch.equal(packed, _packed(values))


@settings(max_examples=60)
@given(
    size=st.sampled_from(SIZES[:-1]),
    center=st.integers(0, 255),
    odd=st.lists(st.tuples(st.integers(0, TILE), st.integers(-(2**15), 2**15 - 1)), max_size=16),
    seed=st.integers(0, 2**31),
)
def test_any_pattern_of_bits_comes_back(size, center, odd, seed):
    draw = np.random.default_rng(seed)
    low, high = max(center - 7, 0), min(center + 7, 255)
    exponents = draw.integers(low, high + 1, size)
    bits = exponents << 7 | draw.integers(0, 128, size) | draw.integers(0, 2, size) << 15
    values = torch.from_numpy(bits.astype(np.uint16).view(np.int16))
    for at, pattern in odd:
        values[at % size] = pattern
    assert _returns(values.view(torch.bfloat16))


def test_all_65536_patterns_come_back_sixteen_exponents_at_a_time():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short()
    exponents = every >> 7 & 0xFF
    for first in range(0, 256, 15):
        some = every[(exponents > first) & (exponents <= first + 15) | (exponents == 0)]
        assert _returns(some.view(torch.bfloat16))


@pytest.mark.parametrize("pattern", [0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x7F7F, 0x8000, 0x0001, 0x807F, 0x0080])
@pytest.mark.parametrize("at", [0, TILE // 2 - 1, TILE // 2, TILE - 1, TILE])
def test_one_odd_value_among_weights_costs_one_escape_at_most(pattern, at):
    values = torch.full((2 * TILE,), 0.02).bfloat16()
    _bits(values)[at] = pattern - 2**16 if pattern >= 2**15 else pattern
    packed = _packed(values)
    assert _num_escapes(packed, len(values)) <= 1
    assert torch.equal(_bits(packing.unpack(packed, len(values))), _bits(values))


def test_values_of_any_shape_are_packed_in_their_order():
    matrix = _normal(90, 70)
    assert _returns(matrix)
    assert _returns(matrix.t())
    assert _returns(matrix[:, 3:40])


@pytest.mark.parametrize("num_tiles", [2, 130])
def test_a_list_of_escapes_that_is_full_comes_back_and_one_more_is_refused(num_tiles):
    values = torch.full((num_tiles * TILE,), 0.02).bfloat16()
    capacity = segment_parts(len(values)).capacity
    values[-capacity:] = 1e-20
    assert _num_escapes(_packed(values), len(values)) == capacity
    assert _returns(values)
    values[0] = 1e-20
    with pytest.raises(
        NotPackableError, match=rf"^{capacity + 1} of {len(values)} .* {capacity}; .* packing=off"
    ):
        _packed(values)


def test_what_has_exponents_everywhere_is_refused():
    with pytest.raises(NotPackableError):
        _packed(torch.randint(-(2**15), 2**15, (5 * TILE,)).short().view(torch.bfloat16))
    far = torch.randn(512, 1024) * 2.0 ** -torch.arange(512).remainder(11)[:, None]
    with pytest.raises(NotPackableError):  # rows of far scales that share tiles
        _packed(far.bfloat16())


def _student(degrees, *shape):
    return 0.01 * torch.distributions.StudentT(torch.tensor(float(degrees))).sample(shape)


@pytest.mark.parametrize(
    ("draw", "share_of_list"),
    [
        (lambda: 0.02 * torch.randn(512, 1024), 1 / 8),
        (lambda: 0.02 * torch.rand(512, 1024) - 0.01, 1 / 8),
        (lambda: _student(3, 512, 1024), 1 / 2),
        # Scales that differ from row to row, up to 1024 times: a tile or more to a row, then four rows to a tile.
        (lambda: torch.randn(128, TILE) * 2.0 ** -torch.arange(128).remainder(11)[:, None], 1 / 8),
        (lambda: torch.randn(512, 1024) * 2.0 ** -torch.arange(512).remainder(4)[:, None], 1 / 2),
    ],
    ids=["normal", "uniform", "student", "scales", "near scales"],
)
def test_weights_take_three_quarters_and_few_escapes(draw, share_of_list):
    values = draw().bfloat16()
    packed = _packed(values)
    used = _num_escapes(packed, values.numel()) / segment_parts(values.numel()).capacity
    assert used < share_of_list
    assert packed.numel() / values.nbytes < 0.756
    assert torch.equal(_bits(packing.unpack(packed, values.numel())), _bits(values.flatten()))


def _pool(num_frames, num_values):
    """Packed pages in frames, and the pages."""
    pages = _normal(num_frames, 3, num_values)
    pages[:, :, 0] = 1e-9
    pages[1::2, 1:, TILE - 1 : TILE + 1] = -1e-30
    pages[:, 2, TILE // 2 - 1 : TILE // 2 + 1] = float("-inf")
    pages[:, :, -1] = -0.0
    size = segment_bytes(num_values)
    frames = torch.full((num_frames, page_bytes(num_values, 1, 2, packed=True)), 0xAA, dtype=torch.uint8)
    for frame in range(num_frames):
        for segment in range(3):
            packing.pack(pages[frame, segment], frames[frame, segment * size : (segment + 1) * size])
    return frames, pages.flatten(1)


@pytest.mark.parametrize("num_values", [TILE // 2 + 16, TILE, 2 * TILE + 77])
@pytest.mark.parametrize(("first", "count"), [(0, 4), (2, 2), (3, 1), (1, 0)])
@pytest.mark.parametrize("where", ["kernel", "reference"])
def test_pages_are_unpacked_from_any_frames_and_nothing_else_is_written(
    device, where, num_values, first, count
):
    frames, pages = _pool(6, num_values)
    table = torch.tensor([4, 0, 5, 2], dtype=torch.int32)
    out = torch.full((count + 1, 3 * num_values), 7.0, dtype=torch.bfloat16, device=device)
    unpack = kernel.unpack_pages if where == "kernel" else packing.unpack_pages
    unpack(frames.to(device), table.to(device), first, count, out, num_values)
    chosen = table[first : first + count].long()
    rows = torch.arange(first, first + count) % len(out)  # page p is in row p modulo the rows there are
    assert torch.equal(_bits(out[rows].cpu()), _bits(pages[chosen]))
    assert out[(first + count) % len(out)].eq(7).all()


def test_the_dispatch_unpacks_where_the_pages_are(device):
    frames, pages = _pool(2, TILE + 16)
    out = torch.zeros(2, pages.shape[1], dtype=torch.bfloat16, device=device)
    table = torch.tensor([1, 0], dtype=torch.int32, device=device)
    ops.unpack_pages(frames.to(device), table, 0, 2, out, TILE + 16)
    assert torch.equal(_bits(out.cpu()), _bits(pages[[1, 0]]))


def test_packing_gives_the_same_bytes_wherever_the_values_are(device):
    values = _normal(3 * TILE + 5)
    values[::500] = 1e-20
    values[TILE] = float("nan")
    out = torch.empty(segment_bytes(len(values)), dtype=torch.uint8)
    for pack in (packing.pack, ops.pack):
        pack(values.to(device), out.fill_(0xAA))
        assert torch.equal(out, _packed(values))
    assert torch.equal(_bits(packing.unpack(out.to(device), len(values)).cpu()), _bits(values))


def _with_exponents(first, last, size):
    """Any signs and mantissas, exponents from first to last."""
    exponents = torch.randint(first, last + 1, (size,))
    return (exponents << 7 | torch.randint(0, 128, (size,)) | torch.randint(0, 2, (size,)) << 15).short()


@pytest.mark.parametrize(
    "draw",
    [
        *(lambda size=size: _normal(size) for size in SIZES),
        lambda: _normal(90, 70).t(),
        lambda: torch.zeros(TILE + 9).bfloat16(),
        *(lambda first=first: _with_exponents(first, min(first + 15, 255), 2 * TILE) for first in (0, 3, 130, 240)),
        *(lambda first=first: _with_exponents(first, min(first + 16, 255), 16) for first in (0, 100, 235)),
        # Tiles that no window near the largest exponent fits: one value far above all others, two scales.
        lambda: torch.cat((torch.tensor([1e30]), torch.randn(TILE) * 1e-3, torch.randn(TILE) * 1e-9)).bfloat16(),
        lambda: torch.cat((torch.randn(20) * 1e12, torch.randn(2 * TILE) * 1e-3)).bfloat16(),
        lambda: _with_exponents(0, 255, 2 * TILE),  # refused
    ],
)  # fmt: skip
def test_the_kernel_packs_the_bytes_of_the_reference_or_refuses_in_its_words(device, draw):
    values = draw()
    values = values if values.dtype is torch.bfloat16 else values.view(torch.bfloat16)
    found = list[torch.Tensor | str]()
    for pack, where in ((packing.pack, "cpu"), (packing_kernel.pack, device)):
        out = torch.full((segment_bytes(values.numel()),), 0xAA, dtype=torch.uint8)
        try:
            pack(values.to(where), out)
            found.append(out)
        except NotPackableError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        assert torch.equal(*found)
