from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.presets import PRESETS, preset
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.models.registry import resolve
from moe_lightning.perf.cost import PassWork, task_cost, task_seconds
from moe_lightning.perf.predict import pass_work, predict, predict_pass
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.task import Lane, PassShape, TaskKind
from moe_lightning.pipeline.timeline import Timeline

FOUR_LAYERS = replace(resolve("mixtral-8x7b"), num_layers=4)
PAGES = 4
SHAPE = PassShape(4, 1, 3, 2, 2, (20,) * 4, 30, preloaded=True)
TOKENS = (100, 32, 32, 31)
L4 = preset("l4")


def _predict(
    shape: PassShape = SHAPE,
    tokens: tuple[int, ...] = TOKENS,
    mean_context: float = 300,
    hardware: HardwareSpec = L4,
    **values: Any,
) -> Timeline:
    spec, pages = values.pop("spec", FOUR_LAYERS), values.pop("pages_per_expert", PAGES)
    return predict(spec, shape, tokens, mean_context, hardware, pages_per_expert=pages, **values)


def _seconds(timeline: Timeline, kind: TaskKind, *micro_batches: int) -> float:
    return next(r.seconds for r in timeline.records if r.kind is kind and r.micro_batches == micro_batches)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_prediction_runs_each_task_of_its_schedule_for_what_it_costs(name: str) -> None:
    schedule = SCHEDULES[name](SHAPE)
    work = PassWork(
        FOUR_LAYERS, "bfloat16", PAGES, TOKENS, (5050, 32 * 300, 32 * 300, 31 * 300), (1, 32, 32, 31)
    )
    timeline = _predict(schedule=name)
    assert timeline.name == name
    assert [r.task_name for r in timeline.records] == [str(task) for task in schedule.tasks]
    costs = [task_seconds(task_cost(task, work), task, L4, "bfloat16") for task in schedule.tasks]
    assert [r.seconds for r in timeline.records] == pytest.approx(costs, rel=1e-6)


def test_a_pass_without_overlap_takes_as_long_as_its_tasks_together() -> None:
    timeline = _predict(schedule="no_overlap")
    assert timeline.span == pytest.approx(sum(r.seconds for r in timeline.records))


def test_cgopipe_hides_attention_and_page_copies_that_no_overlap_waits_for() -> None:
    spans = {name: _predict(schedule=name).span for name in ("cgopipe", "flexgen_cpu", "no_overlap")}
    assert spans["cgopipe"] < spans["flexgen_cpu"] < spans["no_overlap"]


def test_a_steady_link_bound_pass_takes_what_its_streamed_bytes_take() -> None:
    # One group: the GPU reads the experts once a layer, ten times as fast as the link brings them.
    shape = PassShape(32, 0, 4, 4, 2, (28,) * 32, 56, preloaded=True)
    timeline = _predict(shape, (32,) * 4, spec=resolve("mixtral-8x7b"))
    streamed = 32 * 28 * (3 * 4096 * 14336 // PAGES) * 2
    assert timeline.utilization()[Lane.H2D] > 0.95
    assert timeline.span == pytest.approx(streamed / L4.h2d, rel=0.05)


def test_prompts_attend_causally_and_decode_tokens_to_their_context() -> None:
    long, short = _predict(mean_context=6000), _predict(mean_context=3000)
    cache = 2 * FOUR_LAYERS.attention.kv_size * 2 / L4.cpu.bandwidth  # seconds per token
    difference = _seconds(long, TaskKind.ATTENTION, 1) - _seconds(short, TaskKind.ATTENTION, 1)
    assert difference == pytest.approx(32 * 3000 * cache, rel=1e-6)
    assert _seconds(long, TaskKind.PREFILL_ATTENTION, 0) == _seconds(short, TaskKind.PREFILL_ATTENTION, 0)


@pytest.mark.parametrize("kind", [TaskKind.ATTENTION, TaskKind.PREFILL_ATTENTION])
def test_no_token_attends_to_more_than_the_window(kind: TaskKind) -> None:
    def seconds(window: int | None) -> float:
        spec = replace(FOUR_LAYERS, attention=replace(FOUR_LAYERS.attention, sliding_window=window))
        # Prompts so long that their products outweigh their bytes.
        timeline = _predict(tokens=(20_000, 32, 32, 31), mean_context=8000, spec=spec)
        return _seconds(timeline, kind, 0 if kind is TaskKind.PREFILL_ATTENTION else 1)

    assert seconds(None) == seconds(20_000) > seconds(1000) > seconds(500)


def test_the_pairs_under_a_window_are_those_counted_one_by_one() -> None:
    spec = replace(FOUR_LAYERS, attention=replace(FOUR_LAYERS.attention, sliding_window=3000))
    pairs = sum(min(i, 3000) for i in range(1, 20_001))
    seconds = _seconds(_predict(tokens=(20_000, 1, 1, 1), spec=spec), TaskKind.PREFILL_ATTENTION, 0)
    assert seconds == pytest.approx(4 * pairs * 4096 / 121e12 + L4.launch_s, rel=1e-9)


def test_the_dtype_is_the_checkpoints_unless_another_is_given() -> None:
    half, single = _predict(), _predict(dtype="float32")
    load = (TaskKind.LOAD_PAGE,)
    assert _predict(dtype="bfloat16") == half
    assert _seconds(single, *load) - L4.launch_s == pytest.approx(2 * (_seconds(half, *load) - L4.launch_s))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    part=st.sampled_from(["h2d", "d2h", "gpu", "cpu"]),
    factor=st.floats(1.0, 20.0),
    group_size=st.integers(1, 4),
    look_ahead=st.integers(0, 5),
)
def test_a_pass_never_takes_longer_on_a_faster_machine(
    name: str, part: str, factor: float, group_size: int, look_ahead: int
) -> None:
    shape = replace(SHAPE, group_size=group_size, look_ahead=look_ahead)
    slow = _predict(shape, schedule=name)
    if part in ("h2d", "d2h"):
        faster = replace(L4, **{part: getattr(L4, part) * factor})
    else:
        device = getattr(L4, part)
        faster = replace(L4, **{part: replace(device, bandwidth=device.bandwidth * factor)})
    assert _predict(shape, hardware=faster, schedule=name).span <= slow.span * (1 + 1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_predicts_a_pass_in_half_precision(name: str) -> None:
    kinds = Counter(r.kind for r in _predict(hardware=PRESETS[name], dtype="float16").records)
    assert kinds[TaskKind.LOAD_PAGE] == sum(SHAPE.streamed_pages)
    assert kinds[TaskKind.ATTENTION] == 3 * 4


def test_unequal_prompts_have_the_pairs_that_each_has_and_as_many_sampled_rows_as_there_are() -> None:
    shape = PassShape(4, 1, 1, 2, 2, (20,) * 4, 30)
    lengths = (10, 20, 30, 100, 240)
    total, squares = sum(lengths), sum(n * n for n in lengths)
    work = pass_work(
        FOUR_LAYERS,
        shape,
        (total, 7),
        50,
        pages_per_expert=PAGES,
        prompt_len=total / 5,
        token_prompt=squares / total,
    )
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    assert work.context_tokens[0] == pytest.approx(pairs, rel=0.01)
    assert work.sampled_rows == (5, 7)
    assert (work.num_prefill, work.streamed_pages) == (1, 80)
    equal = pass_work(FOUR_LAYERS, shape, (total, 7), 50, pages_per_expert=PAGES, prompt_len=total / 5)
    assert equal.context_tokens[0] < 0.6 * pairs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "cgopip"}, r"'cgopip'; choose one of .*cgopipe"),
        ({"tokens": (100, 32, 32)}, r"tokens=\(100, 32, 32\) for 1 prefill and 3 decode"),
        ({"tokens": (100, 32, 0, 31)}, r"tokens=\(100, 32, 0, 31\) .* 1 or more"),
        ({"mean_context": 0.5}, r"mean_context=0\.5.* 1 or more"),
        ({"mean_context": float("nan")}, r"mean_context=nan"),
        ({"spec": resolve("mixtral-8x7b")}, r"num_layers=4, but MixtralForCausalLM has 32"),
        ({"pages_per_expert": 2}, r"streamed_pages=20, but a layer has 16 pages"),
        ({"pages_per_expert": 3}, r"pages_per_expert=3 .* 14336"),
        ({"hardware": preset("t4")}, r"T4.*'bfloat16'.*float16"),
    ],
)
def test_values_that_are_no_pass_of_the_model_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _predict(**values)


def test_work_of_another_number_of_micro_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="work of 2 micro-batches for a pass of 4"):
        predict_pass(PassWork(FOUR_LAYERS, "bfloat16", PAGES, (1, 1), (1, 1), (1, 1)), SHAPE, L4)
