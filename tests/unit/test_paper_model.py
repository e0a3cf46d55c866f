from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.presets import PRESETS, preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.paper_model import PaperMachine, PaperPlan, PaperWorkload, evaluate, plan_paper
from moe_lightning.perf.paper_report import format_plan
from moe_lightning.units import GIB

MIXTRAL, DENSE = resolve("mixtral-8x7b"), resolve("llama-2-7b")
# The artifact's printed run: Mixtral-8x7B on an L4, prompts of 77 tokens, 32 generated.
PRINTED = PaperMachine(
    gpu_memory=24 * GIB, host_memory=197_880_360_960, link=16 * GIB, gpu_bandwidth=285 * GIB, gpu_flops=104e12,
    cpu_bandwidth=76 * GIB, cpu_flops=1.6e12,
)  # fmt: skip
MTBENCH = PaperWorkload(77, 32)


@pytest.fixture(scope="module")
def printed() -> PaperPlan:
    return plan_paper(MIXTRAL, PRINTED, MTBENCH)


def test_the_search_finds_the_artifacts_policy_to_its_last_printed_digit(printed: PaperPlan) -> None:
    assert (printed.ubs, printed.n_ub, printed.eg) == (324, 14, 8)
    assert (f"{printed.wg:.8g}", f"{printed.wc:.8g}") == ("0.055884688", "0.94411531")
    assert (printed.cg, printed.cc) == (0, 1)


def test_sizes_times_and_rate_are_the_artifacts_to_their_last_printed_digit(printed: PaperPlan) -> None:
    gib = [
        f"{value / GIB:.4f}" for value in (printed.expert_bytes + printed.other_bytes, printed.other_bytes)
    ]
    assert gib == ["86.5000", "2.5000"]
    assert (f"{printed.ctog_s:.4f}", f"{printed.pass_s:.3f}") == ("0.1549", "4.957")
    # The artifact prints ctog for both of these, which its solver leaves slack; by its formulas they are less.
    assert (f"{printed.gpu_s:.4f}", f"{printed.cpu_s:.4f}") == ("0.1295", "0.0257")
    assert f"{printed.decode_throughput:.2f}" == "944.66"


def test_peaks_and_their_parts_are_the_artifacts_to_their_last_printed_digit(printed: PaperPlan) -> None:
    gpu, host = printed.gpu, printed.host
    assert f"{gpu.total / GIB:.3f}" == "20.640"
    assert [f"{part / GIB:.2f}" for part in (gpu.home, gpu.w, gpu.inter)] == ["10.43", "10.21", "5.25"]
    assert f"{host.total / GIB:.3f}" == "147.282"
    assert [f"{part / GIB:.2f}" for part in (host.home, host.w)] == ["142.32", "4.96"]


def test_the_text_has_every_printed_figure(printed: PaperPlan) -> None:
    text = format_plan(printed)
    for figure in (
        "324, 14", "0.055884688, 0.94411531", "86.5000 GiB", "2.5000 GiB", "0.1549 s", "4.957 s",
        "20.640 of 21.600 GiB", "home 10.43, w 10.21, of it inter 5.25", "147.282 of 147.432 GiB",
        "home 142.32, w 4.96", "944.66 token/s", "ctog is the bound",
    ):  # fmt: skip
        assert figure in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_has_the_artifacts_names(printed: PaperPlan) -> None:
    values = printed.to_json()
    assert list(values) == [
        "ubs", "n_ub", "wg", "wc", "cg", "cc", "eg", "ctog_s", "gpu_T_s", "cpu_T_s", "T_s", "decode_throughput",
        "gpu_peak_gib", "cpu_peak_gib",
    ]  # fmt: skip
    assert values["wg"] + values["wc"] == values["cg"] + values["cc"] == 1
    assert values["T_s"] == 32 * max(values["ctog_s"], values["gpu_T_s"], values["cpu_T_s"])
    assert values["gpu_peak_gib"] == pytest.approx(20.64, abs=5e-4)
    assert values["cpu_peak_gib"] == pytest.approx(147.282, abs=5e-4)


def test_the_preset_of_setting_2_is_the_printed_machine() -> None:
    assert PaperMachine.of(preset("paper-s2")) == PRINTED


@pytest.mark.parametrize("name", ["s1", "s2", "paper-s2"])
@pytest.mark.parametrize("gen_len", [32, 64, 128, 256])
def test_the_papers_settings_have_plans_that_stream_for_all_its_lengths(name: str, gen_len: int) -> None:
    hardware = preset(name)
    machine = PaperMachine.of(hardware)
    plan = plan_paper(MIXTRAL, machine, PaperWorkload(77, gen_len))
    assert 0 < plan.wg < 0.2
    assert plan.gpu.total <= 0.86 * hardware.gpu.memory_bytes * (1 + 1e-9)
    assert plan.host.total <= 0.80 * hardware.cpu.memory_bytes * (1 + 1e-9)
    # Every sequence's KV in host memory at 131,072 bytes a token.
    assert plan.ubs * plan.n_ub * (77 + gen_len) * 131072 < plan.host.home
    assert plan.ubs * plan.n_ub >= 1000


@pytest.mark.parametrize("name", PRESETS)
def test_every_machine_with_the_memory_has_a_plan_for_mixtral(name: str) -> None:
    plan = plan_paper(MIXTRAL, PaperMachine.of(PRESETS[name]), MTBENCH)
    assert plan.decode_throughput > 0


# -- against other ways to compute it ----------------------------------------------------------------------

GEOMETRIES = st.sampled_from([MIXTRAL, DENSE, resolve("mixtral-8x22b"), resolve("smollm2-135m")])
MACHINES = st.builds(
    PaperMachine,
    gpu_memory=st.floats(4 * GIB, 100 * GIB),
    host_memory=st.floats(20 * GIB, 400 * GIB),
    link=st.floats(1e9, 1e11),
    gpu_bandwidth=st.floats(1e11, 4e12),
    gpu_flops=st.floats(1e12, 1e15),
    cpu_bandwidth=st.floats(1e10, 5e11),
    cpu_flops=st.floats(1e11, 1e13),
)
WORKLOADS = st.builds(PaperWorkload, st.integers(1, 2000), st.integers(2, 500))


@settings(max_examples=60, deadline=None)
@given(GEOMETRIES, MACHINES, WORKLOADS, st.integers(1, 64), st.integers(1, 20))
def test_no_share_of_weights_on_a_fine_grid_is_feasible_and_faster(
    spec, machine: PaperMachine, workload: PaperWorkload, ubs: int, n_ub: int
) -> None:
    """The formulas once more, written from the definitions, with wg tried in steps of 1/1000."""
    h1, h2, a, s = spec.hidden_size, spec.experts.intermediate_size, spec.attention, workload.prompt_len
    k, layers, batch, total = (
        spec.experts.top_k,
        spec.num_layers,
        ubs * n_ub,
        workload.prompt_len + workload.gen_len,
    )
    w = spec.num_expert_parameters // layers * 2
    other = layers * 2 * (2 * h1 * a.q_size + 2 * h1 * a.kv_size)
    gpu_s = n_ub * max(
        (2 * ubs * (h1 + h2) + w) / machine.gpu_bandwidth, 6 * k * ubs * h1 * h2 / machine.gpu_flops
    )
    cpu_s = n_ub * max(
        2 * ubs * (2 * h1 + 2 * total * a.kv_size) / machine.cpu_bandwidth,
        ubs * total * a.num_heads * (2 * a.head_dim + 2) / machine.cpu_flops,
    )
    best = math.inf
    for step in range(1001):
        wg = step / 1000
        inter = 2.4 * ubs * s * k * (h1 + 3 * h2)
        states = max(4 * h1 * batch, 4 * h1 * ubs * s + 2 * h1 * batch * s + 8 * s * a.kv_size * ubs)
        gpu = other + layers * w * wg + states + 2 * w * (1 - wg) + inter
        host = (layers + 2) * w * (1 - wg) + 4 * total * a.kv_size * batch * layers + 2 * h1 * batch * s
        if gpu <= 0.86 * machine.gpu_memory and host <= 0.8 * machine.host_memory:
            best = min(best, layers * max(w * (1 - wg) / machine.link, gpu_s, cpu_s))
    plan = evaluate(spec, machine, workload, ubs, n_ub)
    if plan is None:
        assert best == math.inf
        return
    assert plan.pass_s <= best * (1 + 1e-9)
    # No more than one step of the grid away from it.
    assert best == math.inf or best - plan.pass_s <= layers * w / machine.link / 1000 * (1 + 1e-6)
    assert plan.decode_throughput == pytest.approx(
        batch * workload.gen_len / (plan.pass_s * (workload.gen_len - 1))
    )
    assert plan.gpu.total <= 0.86 * machine.gpu_memory * (1 + 1e-9)
    assert plan.host.total <= 0.80 * machine.host_memory * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    MACHINES.map(lambda m: replace(m, host_memory=m.host_memory / 2)),
    st.builds(PaperWorkload, st.integers(200, 2000), st.integers(100, 500)),
)
def test_the_search_misses_no_better_number_of_micro_batches(
    machine: PaperMachine, workload: PaperWorkload
) -> None:
    def all_plans():
        for ubs in chain((1, 2, 3), range(4, 3000, 32)):
            for n_ub in range(1, 2000):
                plan = evaluate(MIXTRAL, machine, workload, ubs, n_ub)
                if plan is None:
                    break
                yield plan

    best = max((plan.decode_throughput for plan in all_plans()), default=0.0)
    try:
        found = plan_paper(MIXTRAL, machine, workload).decode_throughput
    except NoFeasiblePolicyError:
        found = 0.0
    assert found == pytest.approx(best, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(MACHINES, WORKLOADS, st.floats(1, 10))
def test_a_better_machine_never_has_a_slower_plan(
    machine: PaperMachine, workload: PaperWorkload, factor: float
) -> None:
    try:
        before = plan_paper(MIXTRAL, machine, workload).decode_throughput
    except NoFeasiblePolicyError:
        return
    for name in machine.__dataclass_fields__:
        better = replace(machine, **{name: getattr(machine, name) * factor})
        assert plan_paper(MIXTRAL, better, workload).decode_throughput >= before * (1 - 1e-6), name


# -- what cannot be planned --------------------------------------------------------------------------------


def test_too_little_gpu_memory_is_refused_with_what_is_needed() -> None:
    # 2.5 GiB of attention weights, two layers of 2.625 GiB and a little for one sequence.
    with pytest.raises(
        NoFeasiblePolicyError, match=r"needs 7\.8 GiB of GPU memory .* 86% of 8\.0 GiB\. Give 9\.0 GiB"
    ):
        plan_paper(MIXTRAL, replace(PRINTED, gpu_memory=8 * GIB), MTBENCH)


def test_too_little_host_memory_is_refused_with_what_is_needed() -> None:
    with pytest.raises(NoFeasiblePolicyError, match=r"of host memory .* 80% of 64\.0 GiB") as caught:
        plan_paper(MIXTRAL, replace(PRINTED, host_memory=64 * GIB), MTBENCH)
    assert "one sequence of 109 tokens" in caught.value.problem


def test_what_the_error_asks_for_suffices() -> None:
    def needed(machine: PaperMachine) -> float:
        with pytest.raises(NoFeasiblePolicyError) as caught:
            plan_paper(MIXTRAL, machine, MTBENCH)
        return (float(str(caught.value).split("Give ")[1].split(" GiB")[0]) + 0.1) * GIB

    low = replace(PRINTED, gpu_memory=8 * GIB)
    assert plan_paper(MIXTRAL, replace(low, gpu_memory=needed(low)), MTBENCH).ubs >= 1
    low = replace(PRINTED, host_memory=64 * GIB)
    assert plan_paper(MIXTRAL, replace(low, host_memory=needed(low)), MTBENCH).ubs >= 1


def test_with_memory_to_spare_copies_take_as_long_as_the_slower_of_gpu_and_cpu() -> None:
    # Of 2.625 GiB a layer, 0.1295 s bring 2.072 GiB over the link.
    plan = evaluate(MIXTRAL, replace(PRINTED, gpu_memory=200 * GIB), MTBENCH, 324, 14)
    assert plan is not None
    assert plan.ctog_s == pytest.approx(plan.gpu_s, rel=1e-9)
    assert plan.wg == pytest.approx(1 - 2.0719 / 2.625, abs=1e-4)
    assert "gpu_T is the bound" in format_plan(replace(plan, ctog_s=plan.ctog_s * 0.999))


def test_weights_that_host_memory_cannot_hold_are_on_the_gpu_although_copies_would_be_hidden() -> None:
    machine = replace(PRINTED, gpu_memory=80 * GIB, host_memory=80 * GIB)
    plan = evaluate(MIXTRAL, machine, MTBENCH, 36, 14)
    assert plan is not None
    assert plan.host.total == pytest.approx(0.8 * 80 * GIB)
    assert plan.ctog_s < plan.gpu_s


@pytest.mark.parametrize("name", PaperMachine.__dataclass_fields__)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_size_or_rate_that_is_none_is_refused_with_its_name_and_value(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={value}: give a positive number"):
        replace(PRINTED, **{name: value})


@pytest.mark.parametrize(
    ("prompt_len", "gen_len", "message"),
    [
        (0, 32, "prompt_len=0: give 1 or more"),
        (-5, 32, "prompt_len=-5"),
        (77, 0, r"gen_len=0: .* give 2 or more"),
        (77, 1, r"gen_len=1: .* give 2 or more"),
    ],
)
def test_lengths_that_leave_nothing_to_rate_are_refused(prompt_len: int, gen_len: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PaperWorkload(prompt_len, gen_len)
