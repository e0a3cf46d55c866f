"""The policy that should be fastest on a machine: searched against the simulated schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import DTYPE_BYTES
from moe_lightning.perf.default_policy import Memory, pages_per_expert
from moe_lightning.perf.memory import HEAD_ROWS, activation_bytes, host_buffer_bytes
from moe_lightning.perf.outlook import Prediction, outlook
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload
from moe_lightning.policy import Policy
from moe_lightning.units import format_bytes

_BLOCK_SIZE = 16
_CHUNK_TOKENS = 2048
_MOST_PREFILL = 2**16  # more chunks make schedules that take seconds to build
_FULL = 0.98  # of the blocks are in use on average: some wait for the next tokens of those that run
# What is tried, the middle first: streamed layers that the ring holds, sweeps over a layer's experts, decode
# micro-batches, how many times the prompt tokens of a steady pass a pass has room for.
_RINGS = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
_PARTS = (4, 1, 2, 8)
_MICRO_BATCHES = (8, 4, 12, 16)
_PREFILLS = (2.0, 1.25, 1.5, 3.0, 4.0)


@dataclass(frozen=True)
class Choice:
    """What is searched for; memory and workload decide the rest of a policy.

    Attributes:
        ring: streamed layers that the ring of frames holds.
        micro_batches: of decode sequences in a pass.
        prefill: how many times the prompt tokens of a steady pass a pass has room for.
        parts: sweeps over a layer's experts.
    """

    ring: float
    micro_batches: int
    prefill: float
    parts: int


@dataclass(frozen=True)
class Planned:
    """A policy, what it should reach, and the choices that it came from."""

    policy: Policy
    prediction: Prediction
    choice: Choice


def search(
    spec: ModelSpec,
    dtype: str,
    memory: Memory,
    rates: Rates,
    workload: Workload,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    near: Choice | None = None,
) -> Planned:
    """The policy that finishes the workload first, of all that fit.

    One choice is varied at a time, twice each.

    Args:
        spec: the model.
        dtype: of weights, activations and KV.
        memory: what may be used; there is a GPU.
        rates: of the machine.
        workload: what is to be computed.
        max_model_len: tokens of the longest sequence; default: the workload's.
        max_num_seqs: sequences that may decode at once; default: as many as fit.
        near: vary the ring of this choice only: for a machine that hardly differs from one that was searched for.

    Raises:
        NoFeasiblePolicyError: nothing fits.
    """
    problem = _Problem(spec, dtype, memory, rates, workload, max_model_len, max_num_seqs)
    parts = [count for count in _PARTS if count <= spec.experts.num_experts]
    best = near or Choice(_RINGS[0], _MICRO_BATCHES[0], _PREFILLS[0], parts[0])
    for _ in range(1 if near else 2):
        best = max((replace(best, ring=ring) for ring in _RINGS), key=problem.value)
        if not near:
            best = max((replace(best, parts=count) for count in parts), key=problem.value)
            best = max((replace(best, prefill=prefill) for prefill in _PREFILLS), key=problem.value)
            best = max((replace(best, micro_batches=count) for count in _MICRO_BATCHES), key=problem.value)
    found = problem.solve(best)
    if found is None:
        raise problem.explain()
    return found


class _Problem:
    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        memory: Memory,
        rates: Rates,
        workload: Workload,
        max_model_len: int | None,
        max_num_seqs: int | None,
    ) -> None:
        assert memory.gpu is not None
        if max_model_len and max_model_len > spec.max_position:
            raise ConfigError(
                f"max_model_len={max_model_len} is more than the model's {spec.max_position} positions; lower it"
            )
        self._spec, self._dtype, self._dtype_bytes = spec, dtype, DTYPE_BYTES[dtype]
        dtype_bytes = self._dtype_bytes
        self._gpu, self._host = memory.gpu, memory.host
        self._rates, self._workload = rates, workload
        self._length = max_model_len or min(workload.longest, spec.max_position)
        most = min(x for x in (max_num_seqs, workload.num_requests, 2**20) if x)
        self._most_seqs = most
        self._pages = pages_per_expert(spec, dtype_bytes)
        self._per_layer = spec.experts.num_experts * self._pages
        expert_bytes = 3 * spec.hidden_size * spec.experts.intermediate_size * dtype_bytes
        self._page_bytes = expert_bytes // self._pages
        self._others = (
            spec.num_parameters * dtype_bytes - expert_bytes * spec.experts.num_experts * spec.num_layers
        )
        self._block_bytes = spec.kv_bytes_per_token(dtype_bytes) * _BLOCK_SIZE
        self._found: dict[Choice, Planned | None] = {}

    def value(self, candidate: Choice) -> float:
        found = self.solve(candidate)
        return found.prediction.job_tokens_per_s if found else 0.0

    def solve(self, candidate: Choice) -> Planned | None:
        if candidate not in self._found:
            policy = self._policy(candidate)
            self._found[candidate] = None if policy is None else self._predicted(policy, candidate)
        return self._found[candidate]

    def explain(self) -> NoFeasiblePolicyError:
        spec, rows = self._spec, 1 + self._length
        smallest = self._largest_part(max(count for count in _PARTS if count <= spec.experts.num_experts))
        gpu = self._others + activation_bytes(spec, self._dtype_bytes, rows) + smallest * self._page_bytes
        streamed = self._per_layer * spec.num_layers * self._page_bytes
        streamed = max(0, streamed - max(0, self._gpu - gpu))
        host = streamed + self._blocks_of_longest() * self._block_bytes
        return NoFeasiblePolicyError(
            f"{spec.architecture} needs {format_bytes(gpu)} of GPU memory to stream its experts, of which "
            f"{format_bytes(max(0, self._gpu))} are allowed, and {format_bytes(host)} of host memory for weights "
            f"and one sequence of {self._length} tokens, of which there are {format_bytes(self._host)}",
            "Lower max_model_len, or allow more memory",
        )

    def _blocks_of_longest(self) -> int:
        return -(-self._length // _BLOCK_SIZE)

    def _policy(self, candidate: Choice) -> Policy | None:
        """The largest batch that the candidate's way of using memory has room for."""
        least, most = 0, self._most_seqs
        while least < most:  # more sequences need more activations, and those push pages out to the host
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self._sized(candidate, middle) else (least, middle - 1)
        return self._sized(candidate, least) if least else None

    def _sized(self, candidate: Choice, num_seqs: int) -> Policy | None:
        """The policy with a batch of that size, if memory holds it."""
        spec, work = self._spec, self._workload
        size = min(HEAD_ROWS, ceil(num_seqs / candidate.micro_batches))
        steady = num_seqs * work.mean_prompt / work.gen_len
        prefill = max(self._length, min(ceil(candidate.prefill * steady), _MOST_PREFILL))
        resident = self._resident(num_seqs + prefill, candidate)
        if resident is None:
            return None
        streamed = [self._per_layer - r for r in resident]
        free = self._host - sum(streamed) * self._page_bytes
        blocks = (free - host_buffer_bytes(spec, self._dtype_bytes, num_seqs)) // self._block_bytes
        if blocks < max(self._blocks_of_longest(), num_seqs * work.mean_blocks(_BLOCK_SIZE) / _FULL):
            return None
        return Policy(
            max_num_seqs=num_seqs, micro_batch_size=size, group_size=2**16, look_ahead=2 * ceil(num_seqs / size),
            prefill_tokens=prefill, chunk_tokens=min(_CHUNK_TOKENS, prefill), pages_per_expert=self._pages,
            resident_pages=resident, num_frames=self._num_frames(candidate, max(streamed)),
            num_blocks=min(blocks, self._most_seqs * self._blocks_of_longest()), block_size=_BLOCK_SIZE,
            expert_parts=candidate.parts,
        )  # fmt: skip

    def _num_frames(self, candidate: Choice, streamed: int) -> int:
        """Of a ring for so many streamed pages a layer; the largest part must fit."""
        return max(ceil(candidate.ring * streamed), min(self._largest_part(candidate.parts), streamed))

    def _largest_part(self, parts: int) -> int:
        """Pages of the largest of so many parts."""
        return -(-self._spec.experts.num_experts // parts) * self._pages

    def _resident(self, rows: int, candidate: Choice) -> tuple[int, ...] | None:
        """Pages of each layer that stay on the GPU beside the candidate's ring."""
        layers, per_layer = self._spec.num_layers, self._per_layer
        room = self._gpu - self._others - activation_bytes(self._spec, self._dtype_bytes, rows)
        frames = room // self._page_bytes

        def fits(total: int) -> bool:
            streamed = per_layer - total // layers if total < per_layer * layers else 0
            return total + self._num_frames(candidate, streamed) <= frames

        if not fits(0):
            return None
        least, most = 0, per_layer * layers
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if fits(middle) else (least, middle - 1)
        return tuple(least // layers + (layer < least % layers) for layer in range(layers))

    def _predicted(self, policy: Policy, choice: Choice) -> Planned:
        return Planned(policy, outlook(self._spec, self._dtype, policy, self._rates, self._workload), choice)
