"""The C++ attention kernels of every instruction set of this CPU against float64."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, expected, make_case

from moe_lightning.errors import ConfigError
from moe_lightning.kernels import reference
from moe_lightning.kernels.cpu_kernels import EMULATED_ISA, ISA_VARIABLE, CpuKernels, available_isas

# One rounding of the output, relative; before it, float32: a score of up to 8 errs by up to 2^-20 when summed, its
# weight by as much relatively, and values reach 4.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FLOAT32 = 2.0**-18
DTYPES = list(ROUNDING)
ISAS = [*available_isas(), EMULATED_ISA]
# Query heads, KV heads and head dimension of published models.
GEOMETRIES = {
    "mixtral-8x7b": (32, 8, 128),
    "mixtral-8x22b": (48, 8, 128),
    "dbrx": (48, 8, 128),
    "glm-4.5-air": (96, 8, 128),
    "gpt-oss": (64, 8, 64),
    "olmoe-1b-7b": (16, 16, 128),
    "qwen1.5-moe-a2.7b": (16, 16, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "qwen3-235b-a22b": (64, 4, 128),
}

Make = Callable[..., CpuKernels]
MakeAll = Callable[..., list[CpuKernels]]


@pytest.fixture(params=ISAS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes kernels of one instruction set, the parameter."""
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return CpuKernels


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> MakeAll:
    """Makes kernels of every instruction set."""

    def make(*args: Any) -> list[CpuKernels]:
        made = []
        for isa in ISAS:
            monkeypatch.setenv(ISA_VARIABLE, isa)
            made.append(CpuKernels(*args))
        return made

    return make


def assert_close(
    found: torch.Tensor, wanted: torch.Tensor, rounding: float = 2.0**-24, isa: str = ""
) -> None:
    torch.testing.assert_close(
        found.double(), wanted, rtol=rounding, atol=FLOAT32, msg=lambda message: f"{isa} {message}"
    )


def assert_same(kv: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(kv, wanted, rtol=0, atol=0, equal_nan=True)


def check(attentions: list[CpuKernels], case: Case, **options: Any) -> None:
    """Attend with each, and compare the output and the whole cache."""
    wanted_kv = case.kv.clone()
    block_size = case.kv.shape[3]
    for i, new in enumerate(case.query_lens.tolist()):
        length = len(case.keys[i])
        for position in range(length - new, length):
            block = int(case.block_tables[i, position // block_size])
            wanted_kv[block, 0, :, position % block_size] = case.keys[i][position]
            wanted_kv[block, 1, :, position % block_size] = case.values[i][position]
    before, wanted, rounding = case.kv.clone(), expected(case, **options), ROUNDING[case.q.dtype]
    for attention in attentions:
        case.kv.copy_(before)
        case.out.fill_(math.nan)
        attention.attend(*case.tensors, query_lens=case.query_lens, **options)
        assert_same(case.kv, wanted_kv)
        assert_close(case.out, wanted, rounding, attention.isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_head_geometries_of_published_models(every: MakeAll, name: str, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = GEOMETRIES[name]
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(every(2), make_case([1, 16, 17, 150], dtype=dtype, **heads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 16, 48, 64, 80, 96, 112, 192, 256])
def test_any_head_dimension(every: MakeAll, head_dim: int, dtype: torch.dtype) -> None:
    check(every(2), make_case([1, 5, 40], num_heads=6, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 3, 8, 13, 16, 32, 128])
def test_any_block_size(every: MakeAll, block_size: int) -> None:
    lengths = [1, block_size, block_size + 1, 2 * block_size + 1, 90]
    check(every(2), make_case(lengths, block_size=block_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("group", range(1, 10))
def test_any_number_of_queries_per_kv_head(every: MakeAll, group: int) -> None:
    check(every(1), make_case([33, 2], num_heads=3 * group, num_kv_heads=3, dtype=torch.bfloat16))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_huge_sequence_among_many_tiny(every: MakeAll, threads: int) -> None:
    check(every(threads), make_case([1, 2, 3] * 20 + [3000] + [17] * 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("lengths", [[], [1], [513], [1024], [1025]])
def test_no_sequence_one_token_and_the_ends_of_tiles(every: MakeAll, lengths: list[int]) -> None:
    check(every(2), make_case(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_new_tokens_see_each_other_causally(every: MakeAll, dtype: torch.dtype) -> None:
    lengths, queries = [5, 40, 0, 700, 3, 9], [5, 3, 0, 20, 1, 0]
    check(every(3), make_case(lengths, queries, dtype=dtype))


@pytest.mark.parametrize("window", [1, 2, 16, 17, 100, 1000])
def test_sliding_window(every: MakeAll, window: int) -> None:
    case = make_case([1, 16, 60, 300, 800], [1, 3, 20, 1, 7], dtype=torch.float16)
    check(every(3), case, sliding_window=window)


def test_blocks_before_the_window_are_not_looked_at(make: Make) -> None:
    case = make_case([100])
    case.block_tables[0, :5] = -7  # given back
    attention = make(2)
    attention.attend(*case.tensors, sliding_window=17)
    assert_close(case.out, expected(case, sliding_window=17))


def test_sinks_join_the_denominator(every: MakeAll) -> None:
    sinks = torch.tensor([-50.0, -1.0, 0.0, 1.0, 3.0, 10.0, 80.0, -math.inf])
    check(every(3), make_case([1, 30, 700], [1, 2, 3]), sinks=sinks)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap(every: MakeAll, cap: float) -> None:
    check(every(2), make_case([1, 40, 300], [1, 3, 2]), soft_cap=cap)


def test_all_options_at_once(every: MakeAll) -> None:
    case = make_case([1, 40, 900], [1, 3, 9], num_heads=12, num_kv_heads=4, head_dim=80, block_size=24)
    sinks = torch.linspace(-2, 2, 12)
    check(every(3), case, scale=0.3, sliding_window=333, sinks=sinks, soft_cap=5.0)


def test_scores_far_apart_neither_overflow_nor_vanish(every: MakeAll) -> None:
    check(every(2), make_case([600, 600], [1, 4]), scale=60.0)


def test_nan_in_the_cache_shows_in_that_head_alone(make: Make) -> None:
    case = make_case([50])
    case.kv[case.block_tables[0, 1], 0, 1, 3] = math.nan
    make(2).attend(*case.tensors)
    heads = case.out.view(1, 2, -1)
    assert not heads[:, 0].isnan().any()
    assert heads[:, 1].isnan().all()


def test_random_shapes(every: MakeAll) -> None:
    rng, pools = random.Random(1), [every(threads) for threads in (1, 2, 4)]
    for seed in range(50):
        kv_heads = rng.randint(1, 5)
        lengths = [int(2 ** rng.uniform(0, 9)) for _ in range(rng.randint(1, 8))]
        case = make_case(
            lengths,
            [rng.randint(0, min(n, 6)) for n in lengths] if rng.random() < 0.5 else None,
            num_heads=kv_heads * rng.randint(1, 9),
            num_kv_heads=kv_heads,
            head_dim=rng.choice([16, 32, 64, 72, 96, 128, rng.randint(1, 160)]),
            block_size=rng.choice([8, 16, 32, rng.randint(1, 70)]),
            dtype=rng.choice(DTYPES),
            seed=seed,
        )
        check(
            rng.choice(pools), case,
            sliding_window=rng.choice([None, rng.randint(1, 300)]),
            soft_cap=rng.choice([None, 20.0]),
            sinks=rng.choice([None, torch.randn(case.q.shape[1])]),
        )  # fmt: skip


def test_the_number_of_threads_changes_roundings_only(make: Make) -> None:
    case = make_case([2000, 3, 5, 700])
    results = []
    for threads in (1, 2, 3, 7):
        make(threads).attend(*case.tensors)
        results.append(case.out.clone())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def test_a_call_gives_the_same_bits_every_time(make: Make) -> None:
    case, attention = make_case([2000, 3, 5, 700]), make(3)
    attention.attend(*case.tensors)
    first = case.out.clone()
    for _ in range(20):
        attention.attend(*case.tensors)
        assert torch.equal(case.out, first)


def test_agrees_with_the_reference(make: Make) -> None:
    case = make_case([1, 17, 200, 64], head_dim=128)
    make(2).attend(*case.tensors, sliding_window=70)
    cached = case.kv.nan_to_num()  # the reference masks with weights of 0, which NaN survives
    tables = case.block_tables.clamp_min(0)
    wanted = reference.decode_attention(case.q, cached, tables, case.context_lens, 70)
    torch.testing.assert_close(case.out, wanted.flatten(1), rtol=1e-5, atol=1e-5)


def test_calls_from_several_threads_take_turns() -> None:
    attention = CpuKernels(2)
    cases = [make_case([100 + i, 30], seed=i) for i in range(4)]
    threads = [
        threading.Thread(target=lambda c=case: [attention.attend(*c.tensors) for _ in range(50)])
        for case in cases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case in cases:
        assert_close(case.out, expected(case))


def test_works_in_the_child_of_a_fork() -> None:
    attention, case = CpuKernels(3), make_case([100, 30])
    attention.attend(*case.tensors)
    before = case.out.clone()
    child = os.fork()
    if child == 0:
        same = False
        try:
            case.out.zero_()
            attention.attend(*case.tensors)
            same = torch.equal(case.out, before)
            del attention
        finally:  # whatever happens, the child runs no further test
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_cpus_hold_the_threads_and_the_caller_gets_its_own_back() -> None:
    mine = os.sched_getaffinity(0)
    cpu = min(mine)
    for threads in (1, 3):
        attention, case = CpuKernels(threads, cpus=[cpu]), make_case([700, 30])
        attention.attend(*case.tensors)
        assert os.sched_getaffinity(0) == mine
        assert_close(case.out, expected(case))
    assert CpuKernels(cpus=[cpu]).num_threads == 1
    assert CpuKernels().num_threads == len(mine)


def test_reading_sums_all_words() -> None:
    memory = torch.randint(-(2**62), 2**62, (3 << 17,))
    assert CpuKernels(2).read(memory) == int(memory.sum()) % 2**64


def test_an_instruction_set_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "altivec")
    with pytest.raises(ConfigError, match=r"MOE_LIGHTNING_CPU_ISA is 'altivec'.*scalar"):
        CpuKernels(1)


def test_the_last_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert CpuKernels(1).isa == available_isas()[-1]


@pytest.mark.parametrize(
    "arguments", [{"num_threads": 0}, {"cpus": []}, {"cpus": [100000]}, {"num_threads": 100000}]
)
def test_impossible_threads_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cpus|CPU|num_threads"):
        CpuKernels(**arguments)


def _replaced(name: str, value: Callable[[Case], torch.Tensor]) -> Callable[[Case], object]:
    return lambda case: setattr(case, name, value(case))


BROKEN = {
    "out has another dtype": ("out is", _replaced("out", lambda c: c.out.half())),
    "out is too narrow": ("out is", _replaced("out", lambda c: c.out[:, :-1])),
    "q has gaps between elements": ("q has strides", _replaced("q", lambda c: c.q[..., ::2])),
    "q has two dimensions": ("q is", _replaced("q", lambda c: c.q.flatten(1))),
    "k has more heads than the cache": ("k is", _replaced("k", lambda c: c.q)),
    "v has another dtype": ("v is", _replaced("v", lambda c: c.v.half())),
    "kv has another dtype": ("kv torch.float16", _replaced("kv", lambda c: c.kv.half())),
    "kv has no pairs": ("kv must be", _replaced("kv", lambda c: c.kv[:, :1].contiguous())),
    "kv is transposed": ("kv has strides", _replaced("kv", lambda c: c.kv.transpose(2, 3))),
    "tables are int32": ("block_tables is", _replaced("block_tables", lambda c: c.block_tables.int())),
    "lengths are int32": ("context_lens is", _replaced("context_lens", lambda c: c.context_lens.int())),
    "lengths of fewer sequences": ("context_lens is", _replaced("context_lens", lambda c: c.context_lens[1:])),
    "a length of zero": (
        "sequence 1: context_lens is 0", _replaced("context_lens", lambda c: c.context_lens * torch.tensor([1, 0])),
    ),
    "a length beyond the table": (
        "sequence 0: context_lens is 1020, but block_tables has room for",
        _replaced("context_lens", lambda c: c.context_lens + 1000),
    ),
    "a block outside of the cache": (
        "sequence 0: block 1", _replaced("block_tables", lambda c: c.block_tables + 100),
    ),
    "a negative block": ("block -", _replaced("block_tables", lambda c: c.block_tables - 100)),
    "more rows than sequences": (
        "2 new tokens, q has 4 rows",
        lambda c: [setattr(c, name, torch.cat([getattr(c, name)] * 2)) for name in ("out", "q", "k", "v")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(name: str) -> None:
    message, damage = BROKEN[name]
    case = make_case([20, 40])
    damage(case)
    before = case.kv.clone()
    with pytest.raises(ValueError, match=message):
        CpuKernels(2).attend(*case.tensors)
    assert_same(case.kv, before)


@pytest.mark.parametrize(
    "options", [{"scale": 0.0}, {"scale": math.nan}, {"soft_cap": 0.0}, {"sliding_window": 0},
                {"sinks": torch.zeros(3)}, {"sinks": torch.zeros(16)[::2]}, {"query_lens": torch.tensor([1, -1])}],
)  # fmt: skip
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).replace("query_lens", "query tokens")):
        CpuKernels(1).attend(*make_case([20, 40]).tensors, **options)


def test_a_missing_extension_says_how_to_get_it() -> None:
    program = (
        "import sys; sys.modules['moe_lightning.kernels._cpu_kernels'] = None\n"
        "import moe_lightning.kernels.cpu_kernels"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install ." in done.stderr.splitlines()[-1]
