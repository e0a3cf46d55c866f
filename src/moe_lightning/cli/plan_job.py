"""What a plan is for: lengths from flags or from a batch file."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

from moe_lightning.errors import ConfigError, JobError
from moe_lightning.jobs import open_input, survey_input
from moe_lightning.jobs.lengths import EXPECTED
from moe_lightning.perf.workload import Workload
from moe_lightning.units import counted


@dataclass(frozen=True)
class Job:
    """What is to be computed; `longest` is that of its sequences where the workload does not say it."""

    workload: Workload
    longest: int | None
    notes: tuple[str, ...] = ()


def job_of(args: Namespace, limit: int) -> Job:
    """The job that flags or a file describe, without prompts that leave no room for an answer in `limit` tokens.

    Lines that are no requests are not counted.

    Raises:
        ConfigError: all prompts are too long.
        JobError: the file cannot be read, or has no request.
    """
    if not args.input:
        workload = Workload((args.avg_prompt_len,), args.gen_len, args.num_requests)
        return _fitting(workload, args.max_model_len, limit)
    with open_input(args.input) as file:
        survey = survey_input(file)
    bad, lengths = len(survey.bad_ids), survey.lengths
    if not survey.valid_ids:
        raise JobError(
            f"none of the {bad:,} lines of {args.input} is a request: each must be a JSON object with custom_id, "
            "method, url and body, as docs/batch.md has them"
        )
    job, notes = _fitting(lengths.workload(None), min(lengths.longest, limit), limit), list[str]()
    if bad:
        notes.append(
            f"{bad:,} of {survey.num_lines:,} lines of {args.input} are no requests and are not counted"
        )
    if longer := lengths.num_longer:
        notes.append(
            f"{counted(longer, 'answer')} may have more than {EXPECTED:,} tokens; that many are expected, so a job "
            "whose answers go to such limits takes longer"
        )
    return replace(job, notes=(*notes, *job.notes))


def _fitting(workload: Workload, longest: int | None, limit: int) -> Job:
    pairs = zip(workload.prompt_lens, workload.answers, strict=True)
    fitting = [(prompt, answer) for prompt, answer in pairs if prompt < limit]
    if not fitting:
        raise ConfigError(
            f"prompts have {max(workload.prompt_lens):,} tokens, and sequences with their answers no more than "
            f"{limit:,}; give shorter prompts, or a greater --max-model-len where the model allows it"
        )
    count, notes = workload.num_requests, list[str]()
    if left_out := 1 - len(fitting) / len(workload.prompt_lens):
        notes.append(
            f"{left_out:.1%} of the prompts leave no room for an answer in {limit:,} tokens and are not counted"
        )
        count = count and max(1, round(count * (1 - left_out)))
    ended = [(prompt, min(answer, limit - prompt)) for prompt, answer in fitting]
    most = workload.most and min(workload.most, limit - min(prompt for prompt, _ in fitting))
    found = Workload.of(ended, count, most)
    wanted = sum(answer for _, answer in fitting) / len(fitting)
    if found.mean_answer < wanted:
        notes.append(
            f"answers end at {limit:,} tokens with their prompts: after {found.mean_answer:,.0f} of "
            f"{wanted:,.0f} on average"
        )
    return Job(found, longest, tuple(notes))
