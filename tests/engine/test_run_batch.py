from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_llm import FakeLLM

from moe_lightning.cli import measure_first, run_batch
from moe_lightning.cli.main import main
from moe_lightning.config import EngineConfig
from moe_lightning.engine.plan import make_plan
from moe_lightning.engine.request import RequestOutput
from moe_lightning.errors import ConfigError, GPUMemoryError
from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.outlook import Prediction
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.refit import kind_seconds
from moe_lightning.pipeline.draw import from_chrome
from moe_lightning.pipeline.task import Lane, PassShape, TaskKind
from moe_lightning.pipeline.timeline import Record, Timeline
from moe_lightning.units import GIB

TIMELINE = Timeline("pass", (Record("embed mb0", TaskKind.EMBED, Lane.GPU, -1, (0,), 1.0, 2.0),))

SHAPE = PassShape(32, 0, 1, 1, 0, (4,) * 32, 8)
FACTS = PassFacts("cgopipe", SHAPE, PassWork(resolve("mixtral-8x7b"), "bfloat16", 1, (10,), (200,), (10,)))


class CommandLLM(FakeLLM):
    """What the command loads; `during_run` is called before each output."""

    during_run: Callable[[int], None] = staticmethod(lambda _: None)
    loaded: list[dict[str, Any]] = []
    name = "fake-model"
    fullest_pass = TIMELINE
    fullest_facts = FACTS
    kept_to: list[Any] = []
    in_order: list[bool] = []

    def __init__(self, model: str, **settings: Any) -> None:
        self.loaded.append({"model": model} | settings)
        super().__init__(model, seed=settings["seed"])
        self.model_name = self.name

    def answer_in_order(self) -> None:
        self.in_order.append(True)

    def keep_to(self, plan: Any) -> None:
        self.kept_to.append(plan)

    def run(self, *args: Any) -> Iterator[RequestOutput]:
        for i, output in enumerate(super().run(*args)):
            self.during_run(i)
            yield output


@pytest.fixture(autouse=True)
def llm(monkeypatch: pytest.MonkeyPatch) -> type[CommandLLM]:
    module = ModuleType("moe_lightning.llm")
    module.LLM = type("LLM", (CommandLLM,), {"loaded": [], "kept_to": [], "in_order": []})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_lightning.llm", module)
    return module.LLM  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    lines = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": "Hi"},
        }
        for i in range(10)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    return ["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", "m"]


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_summary_says_the_counts_and_where_the_files_are(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(job) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "10 answered, 1 failed; 30 prompt and 30 generated tokens in 3.0 s (10.0 tokens/s); "
    )
    assert f"answers in {tmp_path}/out.jsonl, errors in {tmp_path}/out.errors.jsonl\n" in out
    assert sorted(ids(tmp_path / "out.jsonl")) == [f"r{i}" for i in range(10)]
    assert main(job) == 0
    assert capsys.readouterr().out.startswith("0 answered, 0 failed, 10 answered earlier, 1 failed earlier; ")


def test_flags_reach_the_job_and_the_engine(job: list[str], tmp_path: Path, llm: type[CommandLLM]) -> None:
    errors = tmp_path / "e.jsonl"
    flags = ["--ordered", "--limit", "4", "--error-file", str(errors), "--seed", "3", "--max-model-len", "1k"]
    assert main([*job, *flags]) == 0
    assert ids(tmp_path / "out.jsonl") == ["r0", "r1", "r2", "r3"] and not errors.exists()
    (settings,) = llm.loaded
    assert (settings["model"], settings["seed"], settings["max_model_len"]) == ("m", 3, 1024)
    assert llm.in_order == [True], "answers that are written in order are worked on in order"
    assert main([*job, "--no-resume", "--error-file", str(errors)]) == 0
    assert len(ids(tmp_path / "out.jsonl")) == 10 and errors.exists()
    assert llm.in_order == [True]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell that runs the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_with_whole_lines_and_says_how_to_resume(
    job: list[str], tmp_path: Path, llm: type[CommandLLM], capsys: pytest.CaptureFixture[str],
    signum: signal.Signals, status: int,
) -> None:  # fmt: skip
    def strike(i: int) -> None:
        if i == 4:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signal.SIGTERM)
    llm.during_run = staticmethod(strike)
    assert main(job) == status
    assert capsys.readouterr().err == "4 of 11 done; run the same command again to resume\n"
    assert len(ids(tmp_path / "out.jsonl")) == 4
    assert signal.getsignal(signal.SIGTERM) == before
    llm.during_run = staticmethod(lambda _: None)
    assert main(job) == 0
    assert len(set(ids(tmp_path / "out.jsonl"))) == 10


def test_an_interrupted_fresh_start_is_resumed_without_no_resume(
    job: list[str], llm: type[CommandLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    def strike(_: int) -> None:
        raise KeyboardInterrupt

    llm.during_run = staticmethod(strike)
    assert main([*job, "--no-resume"]) == 130
    assert "run the command again without --no-resume to resume" in capsys.readouterr().err


def test_plan_only_prints_the_policy_and_neither_loads_nor_writes(
    job: list[str], tmp_path: Path, llm: type[CommandLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    memory = ["--device", "cpu", "--host-memory", "200GiB", "--gpu-memory", "16GiB", "--max-model-len", "2k"]
    assert main([*job[:-1], "mixtral-8x7b", *memory, "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "10 requests, 1 bad lines; MixtralForCausalLM in torch.bfloat16 on cpu, up to 2048 "
    )
    assert "max_num_seqs       2048\n" in out and "cgopipe" in out
    assert not llm.loaded and [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_trace_records_a_pass(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert main([*job, "--trace", str(trace)]) == 0
    assert from_chrome(json.loads(trace.read_text())) == TIMELINE
    trace.unlink()
    assert main([*job, "--trace", str(trace)]) == 0  # nothing is left to run
    assert "no pass was run" in capsys.readouterr().err and not trace.exists()


def test_lines_that_name_another_model_are_noted(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*job[:-1], "other"]) == 0
    assert "fake-model answers also the lines that name m" in capsys.readouterr().err


def test_answers_of_another_model_are_noted(
    job: list[str], llm: type[CommandLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job, "--limit", "4"]) == 0
    assert "has answers of" not in capsys.readouterr().err
    llm.name = "other-model"
    assert main(job) == 0
    err = capsys.readouterr().err
    assert "out.jsonl has answers of fake-model, and other-model answers the rest; give --no-resume" in err
    assert main([*job, "--no-resume"]) == 0
    assert "has answers of" not in capsys.readouterr().err


def test_answers_out_of_order_are_noted_once_where_order_is_asked_for(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job, "--ordered", "--limit", "4"]) == 0
    assert main([*job, "--ordered", "--limit", "5"]) == 0
    assert "order" not in capsys.readouterr().err
    output = tmp_path / "out.jsonl"
    output.write_text(
        "".join(reversed(output.read_text(encoding="utf-8").splitlines(keepends=True))), "utf-8"
    )
    assert main(job) == 0
    assert "order" not in capsys.readouterr().err
    assert main([*job, "--ordered"]) == 0
    assert capsys.readouterr().err.count("only this run's answers are in order; give --no-resume") == 1


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("-i", "missing.jsonl", "cannot read"),
        ("-i", "empty.jsonl", "no requests"),
        ("-o", "in.jsonl", "input and output are both"),
        ("-o", "no/out.jsonl", "there is no directory"),
        ("--error-file", "no/e.jsonl", "there is no directory"),
        ("--trace", "no/trace.json", "there is no directory"),
        ("--trace", "", "is a directory"),
        ("--trace", "in.jsonl", "input and trace are both"),
        ("--trace", "out.jsonl", "output and trace are both"),
        ("--trace", "out.errors.jsonl", "errors and trace are both"),
        ("--error-file", "out.jsonl", "output and errors are both"),
    ],
)
def test_a_bad_path_is_an_error_before_the_model_loads(
    job: list[str], tmp_path: Path, llm: type[CommandLLM], capsys: pytest.CaptureFixture[str],
    flag: str, value: str, message: str,
) -> None:  # fmt: skip
    (tmp_path / "empty.jsonl").touch()
    assert main([*job, flag, str(tmp_path / value)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert not llm.loaded and not captured.out


@pytest.mark.parametrize("limit", ["0", "-1", "x"])
def test_a_limit_that_is_no_count_is_refused(job: list[str], limit: str, llm: type[CommandLLM]) -> None:
    with pytest.raises(SystemExit):
        main([*job, f"--limit={limit}"])
    assert not llm.loaded


def test_an_error_of_the_engine_is_one_line(
    job: list[str], llm: type[CommandLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: int) -> None:
        raise ConfigError("the plan does not fit; lower it")

    llm.during_run = staticmethod(fail)
    assert main(job) == 2
    assert capsys.readouterr().err == "error: the plan does not fit; lower it\n"


def test_a_plan_for_the_files_lengths_is_run_and_its_promise_is_printed_beside_what_came_of_it(
    job: list[str], llm: type[CommandLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction = Prediction(1.5, {"h2d": 1.4}, 900, 800, 600.0, 512.3, 75.0)
    plan = SimpleNamespace(
        policy="a policy", max_model_len=777, prediction=prediction, rates=DatasheetRates(preset("l4"))
    )
    monkeypatch.setattr("moe_lightning.cli.run_batch._plan", lambda config, survey: plan)
    assert main(job) == 0
    assert (llm.loaded[0]["policy"], llm.loaded[0]["max_model_len"]) == ("a policy", 777)
    assert llm.kept_to == [plan]
    captured = capsys.readouterr()
    assert "note: the plan: 512 tokens/s, " in captured.err
    said, title, header, gpu, whole = captured.out.splitlines()[-5:]
    assert said.startswith("the plan said 512 tokens/s, ") and said.endswith(" in all, 1.50 s a pass")
    assert title == "the fullest pass: 10 sequences decode, 0 tokens of prompts"
    assert header.split() == ["tasks", "predicted", "s", "measured", "s", "measured", "/", "predicted"]
    predicted = FACTS.predict(plan.rates)
    for line, name, seconds in (
        (gpu, "gpu", predicted.busy_seconds()[Lane.GPU]),
        (whole, "pass", predicted.until_tokens),
    ):
        assert line.split() == [name, "1", f"{seconds:.4f}", "1.0000", f"{1 / seconds:.2f}"]


def test_before_a_long_job_by_a_datasheet_the_machine_is_measured(
    job: list[str], llm: type[CommandLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = list[str]()

    def plan(config: EngineConfig, survey: object) -> SimpleNamespace:
        prediction = Prediction(1.5, {"h2d": 1.4}, 900, 800, 600.0, 512.3, 4e3)
        rates = None if measured else DatasheetRates(preset("l4"))
        return SimpleNamespace(
            policy=f"policy {len(measured)}", max_model_len=7, prediction=prediction, rates=rates
        )

    monkeypatch.setattr(run_batch, "_plan", plan)
    monkeypatch.setattr(measure_first, "_measure", lambda config: measured.append(config.model))
    assert main(job) == 0
    assert measured == [job[-1]] and llm.loaded[0]["policy"] == "policy 1"
    assert "measuring first" in capsys.readouterr().err


def test_of_a_plan_alone_it_is_said_that_it_goes_by_a_datasheet(
    job: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction = Prediction(1.5, {"h2d": 1.4}, 900, 800, 600.0, 512.3, 4e3)
    plan = replace(
        make_plan(EngineConfig("mixtral-8x7b", load_format="dummy", device="cpu", host_memory=200 * GIB)),
        prediction=prediction, rates=DatasheetRates(preset("l4")),
    )  # fmt: skip
    monkeypatch.setattr(run_batch, "_plan", lambda config, survey: plan)
    monkeypatch.setattr(measure_first, "_measure", lambda config: pytest.fail("nothing is to be run"))
    assert main([*job, "--plan-only"]) == 0
    assert "note: the plan goes by the GPU's datasheet" in capsys.readouterr().err


def test_a_job_whose_plan_the_gpu_cannot_hold_takes_the_next_smaller_one(
    job: list[str], llm: type[CommandLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = list[SimpleNamespace]()

    def plan(config: EngineConfig, survey: object) -> SimpleNamespace:
        policy = f"policy {config.gpu_memory}"
        plans.append(
            SimpleNamespace(policy=policy, max_model_len=7, prediction=None, device=torch.device("cpu"))
        )
        return plans[-1]

    def load(config: EngineConfig, survey: object, plan: SimpleNamespace) -> object:
        if len(plans) < 3:
            raise GPUMemoryError("too large")
        return true_load(config, survey, plan)

    true_load = run_batch._load
    monkeypatch.setattr(run_batch, "_plan", plan)
    monkeypatch.setattr(run_batch, "_load", load)
    assert main([*job, "--gpu-memory", "1000B"]) == 0
    assert [plan.policy for plan in plans] == ["policy 1000", "policy 950", "policy 902"]
    assert llm.kept_to == plans[-1:]


def test_a_trace_holds_what_the_pass_was_and_what_the_plan_predicted_of_it(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = DatasheetRates(preset("l4"))
    plan = SimpleNamespace(policy=None, max_model_len=777, prediction=None, rates=rates)
    monkeypatch.setattr("moe_lightning.cli.run_batch._plan", lambda config, survey: plan)
    trace = tmp_path / "trace.json"
    assert main([*job, "--trace", str(trace)]) == 0
    capsys.readouterr()
    seconds = kind_seconds(FACTS.predict(rates))[TaskKind.EMBED]
    for flags in ([], ["--model", "mixtral-8x7b", "--hardware", "l4"]):
        assert main(["trace", str(trace), *flags]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.split() == ["embed", "1", f"{seconds:.4f}", "1.0000", f"{1 / seconds:.2f}"]
    assert main(["trace", str(trace), "--model", "mixtral-8x7b", "--hardware", "t4"]) == 2
    assert "bfloat16" in capsys.readouterr().err
    assert main(["trace", str(trace), "--model", "mixtral-8x22b"]) == 2
    assert "num_layers=32, but MixtralForCausalLM has 56" in capsys.readouterr().err


def test_a_trace_of_a_pass_without_a_plan_shows_what_was_measured(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    assert main([*job, "--trace", str(trace)]) == 0
    capsys.readouterr()
    assert main(["trace", str(trace)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["embed", "1", "1.0000"]
    broken = json.loads(trace.read_text())
    broken["otherData"]["predicted"] = {"dance": 1}
    trace.write_text(json.dumps(broken))
    assert main(["trace", str(trace)]) == 2
    assert "record it anew" in capsys.readouterr().err
