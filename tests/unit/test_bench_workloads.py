"""Workloads from files, and models to measure with."""

from __future__ import annotations

import json
import mmap

import pytest

from moe_lightning.bench.file_workload import workload_of_file
from moe_lightning.bench.lanes import peaks_of, summarize
from moe_lightning.bench.models import spec_of
from moe_lightning.bench.peaks import PeakWatch
from moe_lightning.engine.worker import RecordedPass
from moe_lightning.errors import ConfigError, JobError
from moe_lightning.hardware.presets import preset
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.pipeline.task import Lane, PassShape, TaskKind
from moe_lightning.pipeline.timeline import Record, Timeline


def questions(path, *turns):
    lines = [json.dumps({"question_id": i, "category": "c", "turns": list(t)}) for i, t in enumerate(turns)]
    path.write_text("\n".join(lines))
    return path


def test_of_mt_bench_the_first_turns_count(tmp_path):
    path = questions(tmp_path / "question.jsonl", ("x" * 40, "y" * 400), ("é" * 10,), ("",))
    work = workload_of_file(path, None)
    assert (work.prompt_lens, work.gen_len, work.num_requests) == ((10, 5, 1), 128, None)
    assert workload_of_file(path, None, 32, 7).gen_len == 32


def test_a_tokenizer_counts_tokens(tmp_path, mixtral):
    path = questions(tmp_path / "question.jsonl", ("the quick brown fox",), ("the",))
    work = workload_of_file(path, str(mixtral))
    assert max(work.prompt_lens) > min(work.prompt_lens) >= 1
    assert work.prompt_lens[0] < len("the quick brown fox"), "merges count as one"


def test_a_batch_file_says_how_long_answers_are(tmp_path):
    path = tmp_path / "in.jsonl"
    bodies = [{"prompt": "x" * size, "max_tokens": 48} for size in (40, 80)]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    work = workload_of_file(path, None)
    assert (work.prompt_lens, work.gen_len, work.num_requests) == ((10, 20), 48, None)


def test_files_that_are_neither_are_errors_with_a_remedy(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"turns": ["a"]}\n{"turn": "b"}\n')
    with pytest.raises(ConfigError, match=r"question\.jsonl, line 2: no question with turns"):
        workload_of_file(path, None)
    with pytest.raises(JobError, match="cannot read"):
        workload_of_file(tmp_path / "none", None)


def test_models_can_have_fewer_layers_and_the_same_ones():
    whole, cut = spec_of("mixtral-8x22b"), spec_of("Mixtral-8x22B", 16)
    assert (whole.num_layers, cut.num_layers) == (56, 16)
    assert cut.layer_shapes == whole.layer_shapes
    qwen = spec_of("qwen3-30b-a3b", 24)
    assert (qwen.num_layers, qwen.experts.num_experts, qwen.experts.top_k) == (24, 128, 8)
    assert spec_of("llama-3.1-70b", 20).experts.num_experts == 1


def test_layers_that_are_not_there_or_hold_real_weights_are_errors_with_a_remedy():
    with pytest.raises(ConfigError, match=r"mixtral-8x22b has 56; give 1 to as many"):
        spec_of("mixtral-8x22b", 57)
    with pytest.raises(ConfigError, match="add --load-format dummy"):
        spec_of("mixtral-8x22b", 16, is_dummy=False)
    with pytest.raises(ConfigError, match="neither a path nor a known model"):
        spec_of("qwen3-30b-a3b-thinking", 16)


def test_the_peak_is_the_most_that_was_held_since():
    watch = PeakWatch()
    # New pages, as an allocator may hand out old ones; many, as the system counts a few of each CPU late.
    with mmap.mmap(-1, 160 * 2**20) as held:
        held[:: mmap.PAGESIZE] = b"x" * (len(held) // mmap.PAGESIZE)
    peaks = watch.peaks(None, 0)
    assert peaks.host - peaks.host_before > 100 * 2**20
    assert PeakWatch().peaks(None, 0).host < peaks.host, "each watch begins anew"


def recorded(*records, contexts=(), num_prefill=0):
    spec = spec_of("mixtral-8x7b")
    n = len(contexts)
    shape = PassShape(32, num_prefill, n - num_prefill, 1, 0, (1,) * 32, 2)
    work = PassWork(spec, "bfloat16", 1, (1,) * n, tuple(contexts), (1,) * n)
    timeline = Timeline("a", tuple(Record(k.value, k, lane, 0, (), a, b) for k, lane, a, b in records))
    return RecordedPass(PassFacts("cgopipe", shape, work), lambda: timeline)


def test_lanes_are_the_average_of_the_recorded_passes():
    page, attend = (TaskKind.LOAD_PAGE, Lane.H2D), (TaskKind.ATTENTION, Lane.CPU)
    first = recorded((*page, 0, 1), (*attend, 0, 2), contexts=(1000, 7, 3), num_prefill=1)
    second = recorded((*page, 0, 3), (*attend, 2, 4), contexts=(30,))
    found = summarize([first, second], 100, {"h2d": 1.5})
    assert (found.num_passes, found.span_s) == (2, 3.0)
    assert (found.use["h2d"].seconds, found.use["h2d"].share, found.use["h2d"].predicted_s) == (
        2.0,
        4 / 6,
        1.5,
    )
    assert found.page_bytes_per_s == found.link_bytes_per_s == 50.0
    assert found.attention_bytes_per_s == (7 + 3 + 30) * 2**17 / 4, "prompts attend on the GPU"
    assert found.use["cpu"].predicted_s is None
    assert summarize([], 100) is None


def test_a_lanes_roof_is_what_its_tasks_take_at_the_machines_peaks_without_launches():
    hardware, page, attend = (
        preset("h100-sxm"),
        (TaskKind.LOAD_PAGE, Lane.H2D),
        (TaskKind.ATTENTION, Lane.CPU),
    )
    one = recorded((*page, 0, 3), (*attend, 0, 2), contexts=(2000,))
    use = summarize([one, one], 100, None, hardware).use
    # A page of each layer, and one for the pass after it.
    assert use["h2d"].roof_s == pytest.approx(33 * 3 * 4096 * 14336 * 2 / hardware.h2d)
    read = (
        2000 * 2**17 + 32 * (2 * 4096 + 3 * 2 * 1024 - 2 * 1024) * 2
    )  # keys and values; q, k, v, output, appended
    assert use["cpu"].roof_s == pytest.approx(read / hardware.cpu.bandwidth, rel=1e-3)
    assert use["gpu"].roof_s > 0 == use["gpu"].seconds
    assert summarize([one], 100).use["h2d"].roof_s is None
    assert peaks_of(DatasheetRates(hardware)) == hardware
    assert peaks_of(None) is None


def test_what_comes_to_the_gpu_is_pages_and_what_was_attended_to_in_the_time_of_either():
    page, back = (TaskKind.LOAD_PAGE, Lane.H2D), (TaskKind.LOAD_HIDDEN, Lane.BACK)
    one = recorded(
        (*page, 0, 2), (*page, 3, 4), (*back, 1, 2.5), (*back, 5, 6), contexts=(9, 7, 3), num_prefill=1
    )
    attended = 2 * 32 * 4096 * 2
    assert summarize([one], 10**6).link_bytes_per_s == (2 * 10**6 + attended) / (2.5 + 1 + 1)
    kv = recorded((*page, 0, 2), (TaskKind.LOAD_KV, Lane.H2D, 2, 3), contexts=(9,))
    assert summarize([kv], 100).link_bytes_per_s is None
    assert summarize([recorded((*back, 0, 1), contexts=(9,))], 100).link_bytes_per_s is None
