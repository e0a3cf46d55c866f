"""Runs the demo prompts through `moe-lightning run-batch`; shows the answers and how a pass was filled."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent, shorten
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("question-01", "extraction-03", "rewrite-02", "story-03", "code-02", "summary-03")


class DemoError(Exception):
    """The demo cannot go on; the message says the remedy."""


@dataclass(frozen=True)
class Outputs:
    """Where the demo writes."""

    directory: Path

    @property
    def answers(self) -> Path:
        """One line for each request that was answered."""
        return self.directory / "answers.jsonl"

    @property
    def errors(self) -> Path:
        """One line for each request that was not."""
        return self.directory / "errors.jsonl"

    @property
    def trace(self) -> Path:
        """What each lane did when; opens in Perfetto."""
        return self.directory / "trace.json"

    @property
    def gantt(self) -> Path:
        """The trace as a picture."""
        return self.directory / "gantt.svg"

    def clear(self) -> None:
        """Removes what an earlier demo wrote, and nothing else."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in (self.answers, self.errors, self.trace, self.gantt):
            path.unlink(missing_ok=True)


def run_command(*arguments: str | Path) -> None:
    """Runs `moe-lightning` with these arguments, as a user would type them; it draws its own progress bar.

    Raises:
        DemoError: it is not installed, or fails.
    """
    # Beside this interpreter, not on PATH: that may hold another version.
    program = Path(sys.executable).with_name("moe-lightning")
    command = [str(program), *map(str, arguments)]
    if not program.exists():
        raise DemoError(
            f"{program} is not there; run `make demo`, or `pip install -e .` and this script with its python"
        )
    print("$", shlex.join(["moe-lightning", *(_shown(a) for a in arguments)]), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise DemoError(f"moe-lightning {arguments[0]} ended with status {status}; its message is above")


def _shown(argument: str | Path) -> str:
    """A path as seen from the directory that the user is in."""
    if isinstance(argument, Path) and argument.is_relative_to(Path.cwd()):
        return str(argument.relative_to(Path.cwd()))
    return str(argument)


def read_jsonl(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a batch file by `custom_id`; none if there is no file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["custom_id"]: row for row in rows}


def question_of(request: dict[str, Any]) -> str:
    """What a request asks."""
    body = request["body"]
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def answer_of(result: dict[str, Any]) -> str:
    """The text of a result."""
    choice = result["response"]["body"]["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def print_answers(requests: dict[str, dict[str, Any]], results: dict[str, dict[str, Any]]) -> None:
    """Prints some questions with their answers."""
    for name in SHOWN:
        if name in results:
            print(f"\n{name}: {shorten(question_of(requests[name]), 160, placeholder=' ...')}")
            print(indent(answer_of(results[name]).strip(), "  | ", lambda line: True))


def print_rate(results: dict[str, dict[str, Any]], seconds: float) -> None:
    """Prints how much was written, how fast."""
    usages = [r["response"]["body"]["usage"] for r in results.values()]
    prompt, completion = (sum(u[f"{k}_tokens"] for u in usages) for k in ("prompt", "completion"))
    print(
        f"\n{len(results)} answers, {prompt} prompt tokens in, {completion} tokens out, {seconds:.1f} s"
        f" with start and loading: {completion / seconds:.1f} tokens/s"
    )


def run_demo(model: Path, prompts: Path, outputs: Outputs) -> None:
    """Runs the batch and prints answers, rate, timeline and where the files are.

    Raises:
        DemoError: the model is missing, a command fails, or a request has no answer.
    """
    if not (model / "config.json").exists():
        raise DemoError(f"{model} holds no checkpoint; run `make demo-model`")
    outputs.clear()
    began = time.monotonic()
    files = ("-i", prompts, "-o", outputs.answers, "--error-file", outputs.errors, "--trace", outputs.trace)
    run_command("run-batch", "--model", model, *files, "--no-resume")
    seconds = time.monotonic() - began
    requests, results = read_jsonl(prompts), read_jsonl(outputs.answers)
    print_answers(requests, results)
    print_rate(results, seconds)
    print("\nOne pass, lane by lane:", flush=True)
    run_command("trace", outputs.trace, "--svg", outputs.gantt, "--text")
    print(f"\nanswers  {_shown(outputs.answers)}")
    print(f"trace    {_shown(outputs.trace)}  (open it in ui.perfetto.dev)")
    print(f"gantt    {_shown(outputs.gantt)}")
    missing = sorted(requests.keys() - results.keys())
    if missing:
        raise DemoError(
            f"{len(missing)} requests have no answer ({', '.join(missing[:5])}); see {outputs.errors}"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the demo batch and show its answers and its timeline.")
    parser.add_argument(
        "--model", type=Path, default=ROOT / ".cache" / "demo-model", help="checkpoint directory"
    )
    parser.add_argument("--prompts", type=Path, default=ROOT / "examples" / "prompts.jsonl")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "demo-output")
    args = parser.parse_args(argv)
    try:
        run_demo(args.model.resolve(), args.prompts.resolve(), Outputs(args.output_dir.resolve()))
    except DemoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the job has said how to go on
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
