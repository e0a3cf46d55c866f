"""What a model lacks that does not fit, and the cheapest ways to make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.sizing import Choice, Problem, sized
from moe_lightning.units import GIB, format_bytes

_STEP = GIB // 10  # to which advice is rounded
_MOST = 2**41  # bytes: nobody has more


def no_feasible_policy(problem: Problem, choices: Sequence[Choice]) -> NoFeasiblePolicyError:
    """What is short, by how much, and what would help.

    Args:
        problem: for which nothing was found.
        choices: of which one takes as little memory as any.
    """
    gpu, host = needed = _needed(problem, choices)
    memory, spec = problem.memory, problem.spec
    gpu_there = memory.gpu or 0  # less than none where the driver takes more
    missing = (("GPU", gpu - gpu_there), ("host", host - memory.host))
    short = (f"{format_bytes(size)} of {kind} memory ({size:,} bytes)" for kind, size in missing if size > 0)
    return NoFeasiblePolicyError(
        f"{spec.architecture} needs {format_bytes(gpu)} of GPU memory to stream its experts, of which "
        f"{format_bytes(max(0, gpu_there))} are left beside the driver's own, and {format_bytes(host)} of host "
        f"memory for weights and one sequence of {problem.length} tokens, of which there are "
        f"{format_bytes(max(0, memory.host))}: {' and '.join(short)} are missing",
        _remedy(problem, choices, needed),
    )


def _needed(problem: Problem, choices: Sequence[Choice]) -> tuple[int, int]:
    """Least GPU memory with all the host memory one wants, and host memory beside the GPU memory there is."""
    plenty = 2**50
    gpu = _least(lambda size: _fits(problem, choices, gpu=size, host=plenty))
    enough = max(gpu, problem.memory.gpu or 0)
    return gpu, _least(lambda size: _fits(problem, choices, gpu=enough, host=size))


def _remedy(problem: Problem, choices: Sequence[Choice], needed: tuple[int, int]) -> str:
    """The ways that each would do, a shorter length first, then the one of least memory."""
    gpu, host = problem.memory.gpu or 0, problem.memory.host
    more_gpu = _least(lambda size: _fits(problem, choices, gpu=gpu + size, host=host))
    more_host = _least(lambda size: _fits(problem, choices, gpu=gpu, host=host + size))
    both = max(0, needed[0] - gpu), max(0, needed[1] - host)
    ways = [(more_gpu, f"{_gib(more_gpu)} more GPU memory (gpu_memory)")]
    if more_host <= _MOST:
        ways.append((more_host, f"{_gib(more_host)} more host memory (host_memory)"))
    elif all(both):
        ways.append(
            (sum(both), f"{_gib(both[0])} more GPU memory and {_gib(both[1])} more host memory together")
        )
    texts = [text for size, text in sorted(ways) if size <= _MOST]
    length = _longest_that_fits(problem, choices)
    if length:
        texts.insert(0, f"max_model_len={length} instead of {problem.length}")
    return f"It would fit with {', or '.join(texts)}"


def _gib(size: int) -> str:
    """Rounded up, as less would not do."""
    return f"{-(-size // _STEP) * _STEP / GIB:.1f} GiB"


def _fits(problem: Problem, choices: Sequence[Choice], *, gpu: int, host: int) -> bool:
    there = replace(problem, memory=Memory(host, gpu))
    return any(sized(there, choice, 1) is not None for choice in choices)


def _longest_that_fits(problem: Problem, choices: Sequence[Choice]) -> int:
    """Tokens of the longest sequence that fits; 0 for none."""
    shortest = max(problem.workload.prompt_lens) + 1
    least, most = 0, problem.length
    while least < most:
        middle = (least + most + 1) // 2
        shorter = replace(problem, length=middle)
        fits = any(sized(shorter, choice, 1) is not None for choice in choices)
        least, most = (middle, most) if fits else (least, middle - 1)
    return least if least >= shortest else 0


def _least(fits: Callable[[int], bool]) -> int:
    """The least size that suffices; more than `_MOST` if none does."""
    least, most = 0, _MOST + 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle + 1, most)
    return least
