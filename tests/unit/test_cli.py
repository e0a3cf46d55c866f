from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import moe_lightning
from moe_lightning.cli.flags import add_engine_flags, engine_config, environment_name
from moe_lightning.cli.main import build_parser, main
from moe_lightning.cli.progress import describe, log_lines, show_progress, summarize
from moe_lightning.config import EngineConfig
from moe_lightning.errors import ConfigError
from moe_lightning.jobs import JobStatus
from moe_lightning.pipeline.draw import from_chrome, to_chrome
from moe_lightning.pipeline.task import Lane, TaskKind
from moe_lightning.pipeline.timeline import Record, Timeline

VALUES = {
    "model": ("dir", "dir"),
    "tokenizer": ("tok", "tok"),
    "dtype": ("float32", "float32"),
    "tensor_parallel_size": ("1", 1),
    "quantization": ("none", None),
    "kv_cache_dtype": ("auto", "auto"),
    "max_model_len": ("16k", 16384),
    "max_num_seqs": ("32", 32),
    "gpu_memory": ("16GiB", 16 * 2**30),
    "host_memory": ("1.5GB", 1_500_000_000),
    "device": ("cpu", "cpu"),
    "executor": ("serial", "serial"),
    "load_format": ("dummy", "dummy"),
    "packing": ("off", "off"),
    "policy": ("plan.json", "plan.json"),
    "seed": ("7", 7),
}
TIMELINE = Timeline("pass", (Record("embed mb0", TaskKind.EMBED, Lane.GPU, -1, (0,), 1.0, 2.0),))


def parse(*argv: str, **environment: str) -> EngineConfig:
    parser = ArgumentParser()
    add_engine_flags(parser)
    return engine_config(parser.parse_args(argv), environment)


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(moe_lightning.__file__).parents[1])}
    call = [sys.executable, "-m", "moe_lightning", *argv]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120, check=False)


# -- flags -------------------------------------------------------------------------------------------------


def test_the_table_above_covers_every_setting() -> None:
    assert VALUES.keys() == {f.name for f in fields(EngineConfig)}


@pytest.mark.parametrize("name", VALUES)
def test_every_setting_has_a_flag_and_an_environment_twin(name: str) -> None:
    text, value = VALUES[name]
    model = () if name == "model" else ("--model", "m")
    expected = EngineConfig(**{"model": "m", name: value})
    assert parse(*model, "--" + name.replace("_", "-"), text) == expected
    assert parse(*model, **{"MOE_LIGHTNING_" + name.upper(): text}) == expected


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_default() -> None:
    assert parse("--model", "m", "--seed", "0", MOE_LIGHTNING_SEED="5").seed == 0
    assert parse("--model", "m", MOE_LIGHTNING_SEED="5").seed == 5
    assert parse("--model", "m", MOE_LIGHTNING_SEED="").seed == 0


def test_model_path_is_another_name_of_model() -> None:
    assert parse("--model-path", "m").model == "m"


@pytest.mark.parametrize(
    ("flags", "setting", "value", "neutral"),
    [
        (("--tensor-parallel-size", "-tp", "--tp-size"), "tensor_parallel_size", "2", "1"),
        (("--quantization", "-q"), "quantization", "fp8", "none"),
        (("--kv-cache-dtype",), "kv_cache_dtype", "fp8", "auto"),
    ],
)
def test_what_is_not_there_yet_takes_its_neutral_value_and_says_so_of_others(
    flags: tuple[str, ...], setting: str, value: str, neutral: str
) -> None:
    variable = environment_name(setting)
    for flag in flags:
        assert parse("--model", "m", flag, neutral) == EngineConfig("m")
        with pytest.raises(ConfigError, match=rf"{setting}='?{value}'? is not supported yet; leave it out"):
            parse("--model", "m", flag, value)
    assert parse("--model", "m", **{variable: neutral}) == EngineConfig("m")
    with pytest.raises(ConfigError, match="not supported yet"):
        parse("--model", "m", **{variable: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 12.5),
        ("max_num_seqs", True),
        ("gpu_memory", [1]),
        ("host_memory", 1e9),
        ("seed", None),
        ("tensor_parallel_size", None),
    ],
)
def test_a_setting_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.*: give an integer, or a text such as '16"):
        EngineConfig("m", **{name: value})  # type: ignore[arg-type]


def test_settings_are_read_from_texts_and_numpy_integers_too() -> None:
    config = EngineConfig("m", max_model_len="16k", max_num_seqs=np.int64(8))  # type: ignore[arg-type]
    assert (config.max_model_len, type(config.max_num_seqs)) == (16384, int)


@pytest.mark.parametrize(
    ("name", "text"),
    [("dtype", "float8"), ("gpu_memory", "16 bananas"), ("max_num_seqs", "-1"), ("seed", "x")],
)
def test_a_bad_value_is_refused_with_the_name_it_came_under(
    name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, variable = "--" + name.replace("_", "-"), environment_name(name)
    with pytest.raises(SystemExit) as caught:
        parse("--model", "m", f"{flag}={text}")
    message = capsys.readouterr().err
    assert caught.value.code == 2 and flag in message and repr(text) in message
    with pytest.raises(ConfigError, match=f"{variable}.*{text}"):
        parse("--model", "m", **{variable: text})


def test_a_command_without_a_model_is_refused_with_both_ways_to_give_one() -> None:
    with pytest.raises(ConfigError, match=r"--model DIR or set MOE_LIGHTNING_MODEL"):
        parse()


def test_code_of_checkpoints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--model", "m", "--trust-remote-code")
    assert "never run" in capsys.readouterr().err


# -- help and errors ---------------------------------------------------------------------------------------


def test_help_names_each_verb_with_a_line_and_shows_examples() -> None:
    text = build_parser().format_help()
    for needle in (
        "Mixture-of-Experts",
        "run-batch",
        "serve",
        "plan",
        "trace",
        "verify",
        "profile",
        "bench",
        "doctor",
        "examples:",
        "--version",
    ):
        assert needle in text
    assert text.count("  moe-lightning ") >= 3


def test_every_setting_is_in_the_help_of_run_batch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run-batch", "--help"])
    text = capsys.readouterr().out
    for name in VALUES:
        assert "--" + name.replace("_", "-") in text
    text = " ".join(text.split())
    assert "97 % of what is free" in text
    assert "planner" not in text, "there is none"


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"moe-lightning {moe_lightning.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["dance"], ["run-batch"], ["trace", "--lim", "5"]])
def test_a_wrong_command_line_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: moe-lightning" in capsys.readouterr().err


def test_help_and_bad_input_do_not_wait_for_torch(tmp_path: Path) -> None:
    # A torch that cannot be imported stands in for one that takes seconds.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "in.jsonl").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from moe_lightning.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(moe_lightning.__file__).parents[1])}
    job = ["run-batch", "-i", f"{tmp_path}/in.jsonl", "-o", f"{tmp_path}/out.jsonl", "--model", "m"]
    for argv, status, text in ((["--help"], 0, "examples:"), (job, 2, "error: ")):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (status, status // 2), done.stderr
        assert text in done.stdout + done.stderr


def test_without_torch_verbs_that_need_it_say_so(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def missing(args: object) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("moe_lightning.cli.profile.run", missing)
    assert main(["profile"]) == 2
    assert "PyTorch is missing" in capsys.readouterr().err


def test_an_error_is_one_line_on_stderr() -> None:
    done = command("trace", "/does/not/exist.json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: cannot read /does/not/exist.json: No such file or directory; ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps(to_chrome(TIMELINE)))
    environment = os.environ | {"PYTHONPATH": str(Path(moe_lightning.__file__).parents[1])}
    environment.pop("PYTHONUNBUFFERED", None)  # what is buffered is lost only at the end
    read_end, write_end = os.pipe()
    os.close(read_end)
    call = [sys.executable, "-m", "moe_lightning", "trace", str(trace)]
    done = subprocess.run(call, env=environment, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert done.stderr == b"" and done.returncode == 141


# -- trace -------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(to_chrome(TIMELINE)))
    return path


def test_a_trace_is_drawn_as_text_unless_told(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(recorded), "--width", "60"]) == 0
    text = capsys.readouterr().out
    assert main(["trace", str(recorded), "--text"]) == 0
    assert "gpu" in text.lower() and text != capsys.readouterr().out  # another width, another chart


def test_a_trace_is_drawn_in_every_format_asked_for(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg, chrome = tmp_path / "a.svg", tmp_path / "b.json"
    assert main(["trace", str(recorded), "--svg", str(svg), "--chrome", str(chrome)]) == 0
    assert "<svg" in svg.read_text()
    assert from_chrome(json.loads(chrome.read_text())) == TIMELINE
    captured = capsys.readouterr()
    assert captured.out == "" and str(svg) in captured.err and str(chrome) in captured.err


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"traceEvents": 5}'])
def test_a_file_that_is_no_trace_is_refused(
    recorded: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.write_bytes(content)
    assert main(["trace", str(recorded)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "run-batch --trace" in captured.err and not captured.out


def test_a_drawing_that_cannot_be_written_is_refused(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(recorded), "--svg", str(tmp_path)]) == 2
    assert f"error: cannot write {tmp_path}: Is a directory" in capsys.readouterr().err


# -- progress ----------------------------------------------------------------------------------------------

HALF = JobStatus(
    num_total=100, num_done=60, num_resumed=20, num_failed=10, num_failed_earlier=3, num_running=8, num_waiting=4,
    prompt_tokens=500, generated_tokens=300, seconds=60.0, num_ended=30, ended_tokens=240,
)  # fmt: skip


def test_progress_says_rate_remaining_time_and_load() -> None:
    # Answers have 8 tokens: those of 70 lines have 560, of which 260 are missing.
    assert describe(HALF) == "5.0 tokens/s, ETA 52.0 s, 8 running, 4 waiting"
    assert describe(JobStatus(5, 0, 0)) == "0.0 tokens/s, 0 running, 0 waiting"


def test_the_summary_tells_this_runs_lines_from_earlier_ones() -> None:
    assert summarize(HALF) == (
        "30 answered, 10 failed, 17 answered earlier, 3 failed earlier; "
        "500 prompt and 300 generated tokens in 1 min 00 s (5.0 tokens/s)"
    )


def test_a_log_gets_a_line_only_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    seldom, always = log_lines(3600.0), log_lines(0.0)
    seldom(HALF)
    assert capsys.readouterr().err == ""
    always(HALF)
    assert capsys.readouterr().err == f"60/100 done, {describe(HALF)}\n"


def test_a_terminal_gets_a_bar_from_the_first_status_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress() as update:
        assert terminal.getvalue() == ""
        update(HALF)
    assert "60/100" in terminal.getvalue() and "5.0 tokens/s" in terminal.getvalue()


def test_a_predicted_pass_is_drawn_for_a_known_model(capsys):
    flags = ["--model", "mixtral-8x7b", "--hardware", "l4", "--layers", "2", "--num-seqs", "128"]
    assert main(["trace", *flags]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cgopipe")
    assert "W load_page" in text, "pages must stream: the model does not fit"


def test_a_model_that_does_not_fit_is_refused_with_flags_that_trace_has(capsys):
    assert main(["trace", "--model", "mixtral-8x22b", "--hardware", "t4", "--num-seqs", "200k"]) == 2
    message = capsys.readouterr().err
    assert "is allowed. Lower --num-seqs or name a larger machine as --hardware" in message
    assert "gpu_memory" not in message and "max_num_seqs" not in message


def test_trace_wants_a_file_or_a_model(capsys):
    assert main(["trace"]) == 2
    assert "FILE, or --model" in capsys.readouterr().err


def test_a_trace_that_does_not_say_what_its_pass_was_cannot_be_predicted(recorded, capsys):
    assert main(["trace", str(recorded), "--model", "mixtral-8x7b"]) == 2
    assert "does not say what its pass was" in capsys.readouterr().err


# -- bench ------------------------


def test_bench_says_that_kernels_need_a_gpu(monkeypatch, capsys) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
