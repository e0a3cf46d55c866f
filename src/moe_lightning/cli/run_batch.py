"""The verb `run-batch`: answers a file of requests."""

from __future__ import annotations

import json
import signal
import sys
import threading
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lightning.cli.flags import add_engine_flags, engine_config, positive_count
from moe_lightning.cli.measure_first import measured_first, note_unmeasured
from moe_lightning.cli.notes import note
from moe_lightning.cli.progress import show_progress, summarize
from moe_lightning.cli.trace import write_text
from moe_lightning.config import EngineConfig
from moe_lightning.jobs import BatchJob, JobFiles, JobStatus, Survey, open_input, survey_input
from moe_lightning.units import format_duration

if TYPE_CHECKING:
    from moe_lightning.engine.plan import Plan
    from moe_lightning.llm import LLM
    from moe_lightning.perf.outlook import Prediction

SUMMARY = "answer a JSONL file of requests (OpenAI batch format)"
DESCRIPTION = (
    "Answers each line of a JSONL file in OpenAI's batch format. Answers are appended as they finish; a line "
    "that cannot be served becomes one line of the error file, and the rest goes on. Run the command again "
    "after an interruption: lines already answered are skipped. The exit status is 0 also if lines failed. On "
    "a GPU the machine is measured first, for a minute, if a job takes more than twenty and nobody has done so for "
    "this model."
)


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the process to end."""


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add(
        "-i",
        "--input-file",
        required=True,
        type=Path,
        metavar="FILE",
        help="requests, one JSON object a line",
    )
    add(
        "-o",
        "--output-file",
        required=True,
        type=Path,
        metavar="FILE",
        help="answers, appended as they finish",
    )
    add("--error-file", type=Path, metavar="FILE", help="lines that failed (default: OUT.errors.jsonl)")
    resume = (
        "skip lines that are answered or wrong in themselves, and try again those that failed for another reason; "
        "--no-resume discards all answers (default: resume)"
    )
    add("--resume", action=BooleanOptionalAction, default=True, help=resume)
    ordered = (
        "write this run's answers in the order of the input: each waits for those before it, and what waits when "
        "the job is interrupted is computed again"
    )
    add("--ordered", action="store_true", help=ordered)
    add("--limit", type=positive_count, metavar="N", help="only the first N valid lines")
    add(
        "--plan-only", action="store_true", help="print how the model would run and stop; no weights are read"
    )
    add("--trace", type=Path, metavar="FILE", help="record the fullest pass as Chrome and Perfetto JSON")
    add_engine_flags(parser)


def run(args: Namespace) -> int:
    """Run the job, or print its plan; the exit status.

    Raises:
        MoELightningError: something the user can act on; what is written stays valid.
    """
    config = engine_config(args)
    files = JobFiles.at(args.input_file, args.output_file, args.error_file, args.trace)
    if args.plan_only:
        return _print_plan(config, args)
    with _raise_on_sigterm():
        return _run_job(config, files, args)


def _print_plan(config: EngineConfig, args: Namespace) -> int:
    with open_input(args.input_file) as file:
        survey = survey_input(file, args.limit)
    from moe_lightning.engine.plan import make_plan  # imports torch

    plan = _plan(config, survey) or make_plan(config)
    print(
        f"{len(survey.valid_ids)} requests, {len(survey.bad_ids)} bad lines; {plan.spec.architecture} in ",
        end="",
    )
    print(f"{plan.dtype} on {plan.device}, up to {plan.max_model_len} tokens a sequence; policy:")
    for name, value in asdict(plan.policy).items():
        print(f"  {name:<18} {value}")
    if plan.prediction:
        print(f"the plan: {_describe(plan.prediction)}")
    note_unmeasured(plan)
    return 0


def _plan(config: EngineConfig, survey: Survey) -> Plan | None:
    """The plan that should be fastest for the lengths of a job; None without a GPU or with a policy given."""
    # torch comes with these: not before the input is known to be good
    import torch

    from moe_lightning.engine.plan import checkpoint_directory, make_plan
    from moe_lightning.engine.tokenizer import load_tokenizer

    if config.policy or config.device == "cpu" or not torch.cuda.is_available():
        return None
    directory = config.tokenizer or checkpoint_directory(config)
    if directory is None:  # random weights: no tokenizer to count with
        return None
    workload = survey.lengths.workload(load_tokenizer(str(directory)))
    return make_plan(config, workload=workload, longest=survey.lengths.longest)


def _describe(prediction: Prediction) -> str:
    job_s = "" if prediction.job_s is None else f", {format_duration(prediction.job_s)} in all"
    return f"{prediction.job_tokens_per_s:.0f} tokens/s{job_s}, {prediction.pass_s:.2f} s a pass"


def _run_job(config: EngineConfig, files: JobFiles, args: Namespace) -> int:
    llm: LLM | None = None
    plan: Plan | None = None

    def load() -> LLM:
        nonlocal llm, plan
        from moe_lightning.engine.smaller_plan import built  # imports torch

        def planned(config: EngineConfig) -> Plan | None:
            return _plan(config, job.survey)

        first = measured_first(config, planned)
        loaded, plan = built(config, first, planned, lambda plan: _load(config, job.survey, plan))
        llm = loaded
        if args.ordered:  # else an answer may wait for one that is long put back
            loaded.answer_in_order()
        if others := sorted(job.earlier_models - {loaded.model_name}):
            note(
                f"{files.output} has answers of {', '.join(others)}, and {loaded.model_name} answers the rest; "
                "give --no-resume to answer all with one"
            )
        return loaded

    job = BatchJob(files, resume=args.resume, ordered=args.ordered, limit=args.limit)
    if args.ordered and not job.is_in_order:
        note(
            f"{files.output} holds answers that are not in the order of the input, or ahead of lines that are not "
            "answered yet: only this run's answers are in order; give --no-resume for all of them"
        )
    try:
        with job, show_progress() as update:
            status = job.run(load, update)
    except KeyboardInterrupt as e:
        return _report_interrupt(e, job.status, resume=args.resume)
    if files.trace:
        _write_trace(files.trace, llm, plan)
    errors = f", errors in {files.errors}" if files.errors.exists() else ""
    print(f"{summarize(status)}; answers in {files.output}{errors}")
    if plan and plan.prediction:
        print(f"the plan said {_describe(plan.prediction)}")
        if llm and plan.rates:
            from moe_lightning.cli.beside_table import print_fullest

            print_fullest(llm, plan.rates)
    return 0


def _load(config: EngineConfig, survey: Survey, plan: Plan | None) -> LLM:
    from moe_lightning.engine.garbage import collect_rarely
    from moe_lightning.llm import LLM  # imports torch: not before the input is known to be good

    settings = asdict(config)
    if plan and plan.prediction:
        note(f"the plan: {_describe(plan.prediction)}")
        settings |= {"policy": plan.policy, "max_model_len": plan.max_model_len}
    llm = LLM(**settings)
    if plan:
        llm.keep_to(plan)
    collect_rarely()
    if others := [m for m in survey.models if m not in (llm.model_name, config.model)]:
        note(f"{llm.model_name} answers also the lines that name {', '.join(others)}")
    return llm


def _write_trace(path: Path, llm: LLM | None, plan: Plan | None) -> None:
    from moe_lightning.perf.refit import kind_seconds
    from moe_lightning.pipeline.draw import to_chrome

    timeline, facts = (llm.fullest_pass, llm.fullest_facts) if llm else (None, None)
    if timeline is None or facts is None:
        note(f"{path} is not written, because no pass was run")
        return
    extra: dict[str, object] = {"pass": facts.to_json()}
    if plan and plan.rates:
        extra["predicted"] = kind_seconds(facts.predict(plan.rates))
    write_text(path, json.dumps(to_chrome(timeline, extra)))


def _report_interrupt(interrupt: KeyboardInterrupt, status: JobStatus, *, resume: bool) -> int:
    command = "the same command again" if resume else "the command again without --no-resume"
    print(f"{status.num_done} of {status.num_total} done; run {command} to resume", file=sys.stderr)
    return interrupt_status(interrupt)


def interrupt_status(interrupt: KeyboardInterrupt) -> int:
    """Exit status of a process that SIGINT or SIGTERM ended: 130 or 143."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextmanager
def _raise_on_sigterm() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
