from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moe_lightning
from moe_lightning.cli.main import main
from moe_lightning.cli.plan_job import Job, job_of
from moe_lightning.cli.plan_table import to_text
from moe_lightning.errors import CheckpointError, ConfigError, UnsupportedModelError
from moe_lightning.hardware.presets import preset
from moe_lightning.hardware.profile_cache import cache_path
from moe_lightning.models.from_headers import resolve_to_plan
from moe_lightning.models.known import KNOWN_MODELS
from moe_lightning.models.registry import resolve
from moe_lightning.models.stored import open_checkpoint
from moe_lightning.perf import report
from moe_lightning.perf.alternatives import Alternative
from moe_lightning.perf.page_size import page_bytes
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB

MEMORY = ("--gpu-memory", "24GiB", "--host-memory", "120GiB")
SMALL = ("--num-requests", "400")  # few chunks and micro-batches: quick to search for
PAPER = ["plan", "mixtral-8x7b", "--cost-model", "paper"]


def planned(capsys: pytest.CaptureFixture[str], *flags: str, base: list[str] = PAPER) -> dict[str, float]:
    assert main([*base, *flags, "--json"]) == 0
    values: dict[str, float] = json.loads(capsys.readouterr().out)
    return values


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that ends with status 2 and prints nothing else."""
    try:
        status = main(argv)
    except SystemExit as e:  # argparse
        status = e.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    return captured.err


# -- answers -----------------------------------------------------------------------------------------------


def test_the_papers_machine_gets_the_policy_that_its_artifact_prints(capsys) -> None:
    assert main([*PAPER, "--hardware", "paper-s2"]) == 0
    text = capsys.readouterr().out
    for figure in (
        "324, 14",
        "0.055884688",
        "20.640 of 21.600 GiB",
        "147.282 of 147.432 GiB",
        "944.66 token/s",
    ):
        assert figure in text


def test_json_is_an_object_of_the_artifacts_keys(capsys) -> None:
    values = planned(capsys, "--hardware", "paper-s2")
    assert (values["ubs"], values["n_ub"], values["eg"]) == (324, 14, 8)
    assert set(values) == {
        "ubs", "n_ub", "wg", "wc", "cg", "cc", "eg", "ctog_s", "gpu_T_s", "cpu_T_s", "T_s", "decode_throughput",
        "gpu_peak_gib", "cpu_peak_gib",
    }  # fmt: skip


def test_prompts_of_77_tokens_and_answers_of_32_on_an_l4_are_the_default(capsys) -> None:
    said = ["--hardware", "l4", "--avg-prompt-len", "77", "--gen-len", "32"]
    assert planned(capsys, *said) == planned(capsys)
    assert planned(capsys, "--gen-len", "64") != planned(capsys)
    assert planned(capsys, "--avg-prompt-len", "78") != planned(capsys)


def test_memory_flags_replace_the_machines_memory(capsys) -> None:
    values = planned(capsys, "--gpu-memory", "16GiB", "--host-memory", "150GiB")
    assert values["gpu_peak_gib"] <= 0.86 * 16 + 1e-6
    assert values["cpu_peak_gib"] <= 0.80 * 150 + 1e-6
    assert planned(capsys, "--gpu-memory", "24GiB", "--host-memory", "192GiB") == planned(capsys)


def test_the_bandwidth_of_host_memory_is_given_in_gib_as_to_the_artifact(capsys) -> None:
    assert planned(capsys, "--cpu-mem-bdw", "76") == planned(capsys)
    slow = planned(capsys, "--cpu-mem-bdw", "1")
    # 2 bytes x (2 x 4096 + 2 x 109 x 1024) a sequence, at 1 GiB/s.
    assert slow["cpu_T_s"] == pytest.approx(slow["ubs"] * slow["n_ub"] * 2 * (8192 + 2 * 109 * 1024) / GIB)
    assert slow["T_s"] == pytest.approx(32 * slow["cpu_T_s"])


def test_a_name_a_config_file_and_a_checkpoint_directory_give_one_plan(tmp_path: Path, capsys) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(KNOWN_MODELS["mixtral-8x7b"]))
    by_name = planned(capsys)
    for model in (config, tmp_path):
        assert planned(capsys, base=["plan", str(model), "--cost-model", "paper"]) == by_name


@pytest.mark.parametrize("name", ["roof.svg", "roof.png"])
def test_the_rooflines_are_drawn_beside_the_answer(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    assert main([*PAPER, "--hardware", "t4", "--plot", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert captured.err == f"wrote {path}\n"
    if path.suffix == ".svg":
        text = path.read_text()
        assert "mixtral-8x7b on NVIDIA T4, float16" in text and f"n={values['ubs']}" in text


@pytest.mark.parametrize("command", [PAPER, ["plan", "mixtral-8x7b", *SMALL]], ids=["paper", "ours"])
def test_planning_starts_without_torch_and_without_matplotlib_unless_it_draws(
    command: list[str], tmp_path: Path
) -> None:
    for name in (
        "torch",
        "transformers",
        "matplotlib",
    ):  # one that cannot be imported stands in for a slow one
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from moe_lightning.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(moe_lightning.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens/s" in done.stdout or "token/s" in done.stdout


def test_our_plan_says_what_it_reaches_what_holds_it_back_and_what_would_help(capsys) -> None:
    assert main(["plan", "mixtral-8x7b", "--hardware", "h100-sxm", *MEMORY, "--num-requests", "9000"]) == 0
    text = capsys.readouterr().out
    for part in (
        "fits NVIDIA H100 SXM: 24.0 GiB", "of the hardware limit", "prompt tokens/s", "seconds of a pass",
        "the bottleneck", "experts resident", "KV cache", "24.0 GiB of 24.0 GiB", "micro-batches of", "next best",
        "32 GiB more host memory", "16 GiB of GPU memory", "FP8 experts", "why not", "A_g", "r_c", "F_g",
    ):  # fmt: skip
        assert part in text
    assert "24 GiB of GPU memory  " not in text.split("what if")[1], "it has as much"
    assert max(map(len, text.splitlines())) <= 100


def test_the_page_of_a_single_request_speaks_of_one_and_of_no_prompts_beside_it(capsys) -> None:
    flags = (*MEMORY, "--num-requests", "1", "--gen-len", "32")
    assert main(["plan", "mixtral-8x7b", "--hardware", "h100-sxm", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "for 1 request " in text
        and "1 sequence decodes" in text
        and "1 sequence in 1 micro-batch of 1" in text
    )
    job, at_once = (
        float(re.search(rf"{name} ([\d.]+) tokens/s", text)[1]) for name in ("job", "all at once")
    )
    assert 0 < job <= at_once, "a prompt comes before its answer"
    assert "ride along" not in text


def test_the_page_comes_before_what_ifs_are_searched_for(monkeypatch) -> None:
    spec, searches, search = resolve("mixtral-8x7b"), list[object](), report.search

    def counting(*args, **kwargs):
        searches.append(kwargs.get("near"))
        return search(*args, **kwargs)

    monkeypatch.setattr(report, "search", counting)
    machine = report.Machine("an H100", DatasheetRates(preset("h100-sxm")), 24 * GIB, 120 * GIB)
    plan = report.plan(spec, "bfloat16", machine, Workload((77,), 32, 400))
    sections = to_text(plan)
    titles = [next(sections).strip().splitlines()[0] for _ in range(6)]
    assert titles[1:] == ["what it reaches", "seconds of a pass", "memory", "policy", "next best"]
    assert "why not" in next(sections) and searches == [None]
    assert "what if" in next(sections) and next(sections, None) is None
    assert searches == [None, *[plan.planned] * 4]
    no_room = Alternative("a share of KV on the GPU", "r_c>0", None, "no room")
    assert "(r_c>0)  does not fit  no room" in "".join(to_text(replace(plan, left_out=(no_room,))))


def test_our_plan_as_json_is_the_searchs(capsys) -> None:
    values = planned(
        capsys, "--hardware", "h100-sxm", *MEMORY, "--num-requests", "5000", base=["plan", "mixtral-8x7b"]
    )
    policy, prediction = values["policy"], values["prediction"]
    assert policy["max_num_seqs"] >= prediction["num_seqs"]
    assert prediction["job_s"] == pytest.approx(5000 * 32 / prediction["job_tokens_per_s"])
    assert values["bottleneck"] == max(prediction["lane_s"], key=prediction["lane_s"].get)
    assert 0 < prediction["tokens_per_s"] < values["limit"]["tokens_per_s"]
    memory = values["memory"]
    assert sum(memory["device"].values()) + sum(memory["during_pass"].values()) <= 23 * GIB
    assert all(r["tokens_per_s"] < prediction["job_tokens_per_s"] for r in values["runners_up"])
    assert [each["symbol"].split("=")[0] for each in values["left_out"]] == ["A_g", "r_c", "F_g"]
    assert values["what_ifs"]["FP8 experts, same FLOP/s"] > prediction["job_tokens_per_s"]
    more, less = (values["what_ifs"][f"32 GiB {word} host memory"] for word in ("more", "less"))
    assert less < prediction["job_tokens_per_s"] <= 1.02 * more, "a bigger batch has a longer tail"


def test_our_plan_takes_measured_rates(capsys) -> None:
    profile = str(Path(__file__).parents[2] / "benchmarks" / "results" / "profile_h100.json")
    values = planned(capsys, "--profile", profile, *MEMORY, *SMALL, base=["plan", "mixtral-8x7b"])
    assert values["machine"]["name"] == "NVIDIA H100 80GB HBM3"
    pages = values["prediction"]["lane_s"]["h2d"]
    per_expert = values["policy"]["pages_per_expert"]
    page = page_bytes(4096, 14336 // per_expert, 2, packed=values["policy"]["packed"])
    streamed = sum(8 * per_expert - r for r in values["policy"]["resident_pages"]) * page
    assert 45e9 < streamed / pages < 55e9, "the rate of the profile's copies beside attention"


def test_this_machine_is_what_its_profile_says(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "Run `moe-lightning profile` here first" in refused(
        capsys, "plan", "mixtral-8x7b", "--hardware", "this"
    )
    path = cache_path()
    path.parent.mkdir(parents=True)
    path.write_text((Path(__file__).parents[2] / "benchmarks" / "results" / "profile_h100.json").read_text())
    message = refused(capsys, "plan", "mixtral-8x7b", "--hardware", "this")
    assert re.search(r"is of another machine or set-up: .* was .* and is .*profile` here again", message)
    monkeypatch.setattr("moe_lightning.cli.plan.changes_here", lambda profile: [])
    values = planned(capsys, "--hardware", "this", *MEMORY, *SMALL, base=["plan", "mixtral-8x7b"])
    assert values["machine"]["name"] == "NVIDIA H100 80GB HBM3"


def test_our_plan_for_a_card_without_bfloat16_is_in_float16(capsys) -> None:
    values = planned(capsys, "--hardware", "t4", *SMALL, base=["plan", "mixtral-8x7b"])
    assert values["dtype"] == "float16"
    assert any("no rate for bfloat16" in note for note in values["notes"])
    values = planned(capsys, "--hardware", "l4", *SMALL, base=["plan", "mixtral-8x7b"])
    assert values["dtype"] == "bfloat16" and not values["notes"]


def test_our_plan_for_a_file_takes_its_lengths_and_says_how_long_it_takes(capsys, tmp_path) -> None:
    body = {"prompt": "x" * 400, "max_tokens": 64}
    lines = (
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(300)
    )
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--hardware", "h100-sxm", *MEMORY, "--input", str(file))
    values = planned(capsys, *flags, base=["plan", "mixtral-8x7b"])
    assert values["workload"]["num_requests"] == 300
    assert values["workload"]["gen_len"] == 64
    assert set(values["workload"]["prompt_lens"]) == {100}
    assert values["policy"]["prefill_tokens"] >= 400, "each byte might be a token"
    assert main(["plan", "mixtral-8x7b", *flags]) == 0
    assert re.search(r"the job +[\d.minsh ]+ +for 300 requests", capsys.readouterr().out)
    missing = str(tmp_path / "none.jsonl")
    assert "cannot read" in refused(capsys, "plan", "mixtral-8x7b", "--input", missing)


def test_lines_that_are_no_requests_are_not_counted_and_a_file_of_nothing_else_is_refused(
    capsys, tmp_path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"nope": 1}\nnot json\n')
    message = refused(capsys, "plan", "mixtral-8x7b", "--input", str(file))
    assert "none of the 2 lines" in message and "custom_id" in message
    good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * 400}}
    file.write_text(json.dumps(good) + "\nnot json\n")
    job = job_of(Namespace(input=file, max_model_len=None), 4096)
    assert job.workload.num_requests == 1
    assert job.notes[0].startswith("1 of 2 lines")


@pytest.mark.parametrize(
    ("flags", "without_effect"),
    [
        (("--input", "in.jsonl", "--gen-len", "7"), "--gen-len"),
        (("--input", "in.jsonl", "--avg-prompt-len", "7"), "--avg-prompt-len"),
        (("--input", "in.jsonl", "--num-requests", "7"), "--num-requests"),
        (("--profile", "p.json", "--hardware", "t4"), "--hardware"),
        (("--profile", "p.json", "--cpu-mem-bdw", "7"), "--cpu-mem-bdw"),
        (("--hardware", "this", "--cpu-mem-bdw", "7"), "--cpu-mem-bdw"),
        (("--cost-model", "paper", "--input", "in.jsonl"), "--input"),
        (("--cost-model", "paper", "--num-requests", "7"), "--num-requests"),
        (("--cost-model", "paper", "--max-model-len", "700"), "--max-model-len"),
    ],
)
def test_flags_of_which_one_would_be_without_effect_are_refused(capsys, flags, without_effect) -> None:
    message = refused(capsys, "plan", "mixtral-8x7b", *flags)
    assert without_effect in message and "leave one of them out" in message


def test_answers_end_where_sequences_do(capsys) -> None:
    flags = ("--gen-len", "100", "--avg-prompt-len", "77", "--max-model-len", "128")
    values = planned(capsys, *MEMORY, *flags, base=["plan", "mixtral-8x7b", "--hardware", "h100-sxm"])
    assert values["workload"]["gen_len"] == 51
    assert any("after 51 of 100" in note for note in values["notes"])


def test_long_answers_count_as_long_beside_short_ones(tmp_path, capsys) -> None:
    """Memory is full of the long ones, and a job waits for the last of them."""
    file, line = tmp_path / "in.jsonl", {"method": "POST", "url": "/v1/completions"}
    flags = (*MEMORY, "--input", str(file), "--hardware", "h100-sxm")

    def of(*answers: int) -> dict[str, Any]:
        bodies = ({"prompt": "x" * 300, "max_tokens": count} for count in answers * 2000)
        lines = ({"custom_id": str(i), "body": body, **line} for i, body in enumerate(bodies))
        file.write_text("\n".join(map(json.dumps, lines)))
        return planned(capsys, *flags, base=["plan", "mixtral-8x7b"])

    apart, alike = of(16, 1000), of(508, 508)
    assert (apart["workload"]["gen_len"], alike["workload"]["gen_lens"]) == (508, None)
    assert apart["prediction"]["job_s"] > 1.2 * alike["prediction"]["job_s"]
    assert apart["prediction"]["num_seqs"] < alike["prediction"]["num_seqs"]


def test_the_page_says_how_long_answers_are(tmp_path, capsys) -> None:
    file = tmp_path / "in.jsonl"
    line = {"method": "POST", "url": "/v1/completions"}
    bodies = ({"prompt": "x" * 300, "max_tokens": count} for count in (16, 1000))
    lines = ({"custom_id": str(i), "body": body, **line} for i, body in enumerate(bodies))
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["plan", "mixtral-8x7b", *MEMORY, "--input", str(file), "--hardware", "h100-sxm"]) == 0
    assert "answers of 16 to 1,000, 508 on average" in " ".join(capsys.readouterr().out.split())


def test_only_answers_that_are_ended_are_said_to_be(tmp_path) -> None:
    def job(*lengths: tuple[int, int]) -> Job:
        line = {"method": "POST", "url": "/v1/completions"}
        bodies = ({"prompt": [1] * prompt, "max_tokens": answer} for prompt, answer in lengths)
        lines = ({"custom_id": str(i), "body": body, **line} for i, body in enumerate(bodies))
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return job_of(Namespace(input=tmp_path / "in.jsonl", max_model_len=512), 512)

    left_out = job((1000, 1000), (300, 212))
    assert len(left_out.notes) == 1 and "50.0% of the prompts" in left_out.notes[0]
    ended = job((1000, 1), (300, 250))
    assert "after 212 of 250 on average" in ended.notes[1]
    assert (ended.workload.num_requests, ended.workload.longest_answer) == (1, 212)


def test_answers_that_may_be_longer_than_is_expected_of_any_are_said_to_be(tmp_path) -> None:
    file = tmp_path / "in.jsonl"
    line = {"method": "POST", "url": "/v1/completions"}
    bodies = ({"prompt": "x", "max_tokens": answer} for answer in (1024, 5000, 9000))
    lines = ({"custom_id": str(i), "body": body, **line} for i, body in enumerate(bodies))
    file.write_text("\n".join(map(json.dumps, lines)))
    (note,) = job_of(Namespace(input=file, max_model_len=None), 2**15).notes
    assert note.startswith("2 answers may have more than 1,024 tokens")


def test_the_page_says_what_the_cpu_computes(capsys) -> None:
    def lanes(*flags: str) -> str:
        assert main(["plan", "mixtral-8x7b", "--hardware", "l4", *flags]) == 0
        return capsys.readouterr().out.split("seconds of a pass")[1].split("memory")[0]

    assert "CPU attention  " in lanes("--gen-len", "128")
    assert "CPU experts  " in lanes("--num-requests", "1")


def test_the_page_says_that_kv_crosses_the_link_and_what_would_be_without(capsys) -> None:
    flags = ["--hardware", "l4", "--gpu-memory", "16GiB", "--host-memory", "16GiB", "--num-requests", "10"]
    flags += ["--avg-prompt-len", "512", "--gen-len", "128"]
    assert main(["plan", "llama-3.1-8b", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "KV blocks of 16 tokens, which cross the link to the GPU for attention" in text
    assert "CGOPipe's schedule, not FlexGen's" in text
    assert "attention on the CPU (A_g=0)" in text and "A_g=1" not in text
    assert main(["plan", "llama-3.1-8b", *flags, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["policy"]["schedule"] == "flexgen"
    assert values["memory"]["device"]["staging"] > 0
    second = values["runners_up"][0]
    assert second["schedule"] == "cgopipe"
    gain = second["tokens_per_s"] / values["prediction"]["job_tokens_per_s"] - 1
    assert values["left_out"][0]["gain"] == gain < -0.05


def test_the_page_says_of_short_passes_that_launching_is_not_counted(capsys) -> None:
    def page(*flags: str) -> str:
        assert main(["plan", *flags]) == 0
        return capsys.readouterr().out

    assert "launching tasks may take longer" in page(
        "llama-3.1-8b", "--hardware", "rtx-4090", "--num-requests", "9"
    )
    assert "launching" not in page("mixtral-8x7b", "--hardware", "rtx-4090", "--gen-len", "128")


def test_a_model_that_does_not_fit_says_what_it_needs(capsys) -> None:
    message = refused(capsys, "plan", "mixtral-8x7b", "--gpu-memory", "4GiB")
    assert re.search(
        r"4\.\d GiB of GPU memory to stream its experts, .* fit with [\d.]+ GiB more GPU", message
    )
    message = refused(capsys, "plan", "mixtral-8x7b", "--host-memory", "40GiB", "--gpu-memory", "24GiB")
    assert re.search(
        r"GiB of host memory .* fit with [\d.]+ GiB more GPU memory .*GiB more host memory", message
    )
    assert "0 B are left beside the driver" in refused(capsys, "plan", "mixtral-8x7b", "--gpu-memory", "1MiB")


def test_prompts_beyond_the_models_length_are_refused_or_left_out(capsys, tmp_path) -> None:
    message = refused(capsys, "plan", "mixtral-8x7b", "--avg-prompt-len", "40k")
    assert "prompts have 40,960 tokens" in message and "no more than 32,768" in message
    message = refused(capsys, "plan", "mixtral-8x7b", "--avg-prompt-len", "200", "--max-model-len", "128")
    assert "prompts have 200 tokens" in message and "--max-model-len" in message
    message = refused(capsys, "plan", "mixtral-8x7b", "--max-model-len", "64k")
    assert "max_model_len=65536 is more than the model's 32768" in message
    file = tmp_path / "in.jsonl"
    bodies = [{"prompt": "x" * size, "max_tokens": 8} for size in (400,) * 3 + (40_000,)]
    line = {"method": "POST", "url": "/v1/completions"}
    lines = ({"custom_id": str(i), "body": body, **line} for i, body in enumerate(bodies))
    file.write_text("\n".join(map(json.dumps, lines)))
    args = Namespace(input=file, max_model_len=None)
    job = job_of(args, 4096)
    assert job.workload.num_requests == 3 and max(job.workload.prompt_lens) < 4096
    assert "25.0% of the prompts" in job.notes[0]
    assert job_of(args, 32768).notes == ()


@pytest.mark.parametrize("kind", ["mixtral", "llama-tied-llama3"])
def test_weights_without_a_config_are_planned_for_and_what_is_assumed_is_said(
    kind, checkpoint_of, tmp_path, capsys
) -> None:
    directory = shutil.copytree(checkpoint_of(kind), tmp_path / "weights")
    (directory / "config.json").unlink()
    found, notes = resolve_to_plan(str(directory))
    spec, none = resolve_to_plan(str(checkpoint_of(kind)))
    assert none == () and "no config.json" in notes[0]
    assert (found.num_parameters, found.num_expert_parameters, found.num_layers, found.dtype) == (
        spec.num_parameters, spec.num_expert_parameters, spec.num_layers, spec.dtype,
    )  # fmt: skip
    assert found.kv_bytes_per_token(2) == spec.kv_bytes_per_token(2)
    assert [(t.name, t.shape) for t in found.tensors()] == [(t.name, t.shape) for t in spec.tensors()]
    if kind == "mixtral":
        assert main(["plan", str(directory), "--cost-model", "paper"]) == 0
        assert (
            "note: no config.json beside the weights; assumed are 2 experts a token"
            in capsys.readouterr().out
        )
    with pytest.raises(ConfigError):
        resolve(str(directory))  # only a plan may assume anything


def test_the_beginning_of_a_file_up_to_its_weights_is_enough_for_a_plan_and_for_nothing_else(
    mixtral, tmp_path
) -> None:
    whole = (mixtral / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "model.safetensors"
    expected = [(t.name, t.shape) for t in resolve(str(mixtral)).tensors()]
    for end in (header, header + 100, len(whole)):
        file.write_bytes(whole[:end])
        found, _ = resolve_to_plan(str(tmp_path))
        assert [(t.name, t.shape) for t in found.tensors()] == expected
    file.write_bytes(whole[:header])
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(tmp_path)
    for damaged in (whole[: header - 1], whole + b"more"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            resolve_to_plan(str(tmp_path))


def test_weights_of_an_unknown_kind_without_a_config_ask_for_it(mixtral, tmp_path) -> None:
    directory = shutil.copytree(mixtral, tmp_path / "weights")
    (directory / "config.json").unlink()
    file = directory / "model.safetensors"
    file.write_bytes(
        file.read_bytes().replace(b"layers.0.block_sparse_moe.gate", b"layers.0.block_sparse_moe.gata")
    )
    with pytest.raises(
        UnsupportedModelError, match=r"no config.json.*put the model's config.json beside them"
    ):
        resolve_to_plan(str(directory))


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hardware", "l5"), "no hardware is named 'l5'; known are t4, l4"),
        (("--hardware", "rtx4900"), "did you mean rtx-4090"),
        (("--gpu-memory=-5GiB",), "--gpu-memory: '-5GiB' is not a size; write 16GiB"),
        (("--gpu-memory", "0"), "--gpu-memory: '0' leaves nothing to run in; give a size such as 16GiB"),
        (("--host-memory", "lots"), "--host-memory: 'lots' is not a size"),
        (("--cpu-mem-bdw", "0"), "--cpu-mem-bdw: '0' is no bandwidth; give GiB/s above 0"),
        (("--cpu-mem-bdw=-76",), "--cpu-mem-bdw: '-76' is no bandwidth"),
        (("--cpu-mem-bdw", "nan"), "--cpu-mem-bdw: 'nan' is no bandwidth"),
        (("--cpu-mem-bdw", "inf"), "--cpu-mem-bdw: 'inf' is no bandwidth"),
        (("--cpu-mem-bdw", "fast"), "--cpu-mem-bdw: 'fast' is no bandwidth"),
        (("--gen-len", "0"), "--gen-len: '0' is too small; give at least 1"),
        (
            ("--gen-len", "1"),
            "gen_len=1: the paper's model rates what comes after the first token; give 2 or more",
        ),
        (("--avg-prompt-len", "0"), "--avg-prompt-len: '0' is too small"),
        (("--avg-prompt-len", "12.5"), "--avg-prompt-len: '12.5' is not a whole count"),
        (("--cost-model", "guess"), "invalid choice: 'guess'"),
        (("--plot", "roof.pdf"), "cannot draw roof.pdf: its name ends in '.pdf'; use .svg or .png"),
        (("--plot", "/no/such/roof.svg"), "cannot write /no/such/roof.svg: No such file or directory"),
    ],
)
def test_a_bad_value_is_refused_with_the_value_and_a_remedy(
    flags: tuple[str, ...], message: str, capsys
) -> None:
    assert message in refused(capsys, *PAPER, *flags)


def test_an_unknown_model_is_refused_with_near_names(capsys) -> None:
    message = refused(capsys, "plan", "mixtral-8x7", "--cost-model", "paper")
    assert "did you mean mixtral-8x7b" in message


def test_a_model_that_does_not_fit_is_refused_with_flags_that_plan_has(capsys) -> None:
    message = refused(capsys, *PAPER, "--gpu-memory", "8GiB")
    assert "needs 7.8 GiB of GPU memory" in message and "Raise --gpu-memory" in message
    message = refused(capsys, *PAPER, "--host-memory", "64GiB")
    assert "of host memory" in message and "--host-memory" in message


def test_what_cannot_be_drawn_is_said_before_the_search(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused(capsys, "plan", "no-such-model", "--plot", "roof.svg")
    assert "pip install 'moe-lightning[plot]'" in message and "no-such-model" not in message
