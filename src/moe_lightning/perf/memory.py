"""GPU and host memory of a policy: what is held from before the first pass on, to the byte, and what passes add."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.page_size import page_bytes
from moe_lightning.pipeline.baselines import STAGING_SLOTS
from moe_lightning.pipeline.shape import layers_keeping_kv, layers_on_cpu, pages_of_largest_part
from moe_lightning.policy import Policy
from moe_lightning.units import MIB

EXPERTS_AT_ONCE = 8192  # tokens: enough that reading the weights costs nothing beside the arithmetic
CPU_EXPERTS_AT_ONCE = 1024  # tokens, of a sweep by the CPU beside a GPU
HEAD_ROWS = 512  # rows of logits that exist at once: of a vocabulary of 128 k, 256 MiB in float32
# Logits that are sorted at once: a micro-batch of 324 rows has up to 50 million of them.
SORTED_AT_ONCE = 2**22
UPLOAD_BYTES = MIB  # for a pass's small arrays at first; more where a pass has more
COUNTER_BYTES = 4096  # of the count that streams wait for
_SORTED_BYTES = 64  # a logit while it is sorted and cut: values, order, likelihoods, sums
_ROW_ARRAY_BYTES = 128  # of a row: ids, places, lengths, how it is sampled
# Python's objects for requests, bits of tokens that forms allow, readers of a checkpoint.
ENGINE_BYTES = 512 * MIB
# Host memory of libraries that compile kernels and of code that is loaded as a GPU's first passes run.
GPU_CODE_BYTES = 640 * MIB
_LIBRARIES = 64 * MIB  # cuBLAS' workspaces, what the allocator rounds up
_UNEVEN = 1.5  # KV of a micro-batch, as a multiple of an even share: few sequences may be long ones
_INT32, _INT64, _FLOAT32 = 4, 8, 4
_TABLE_INTS = 3  # of a sequence beside its table: where that begins, tokens, the new one's place


class _Parts:
    """Bytes by name."""

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class DeviceUse(_Parts):
    """Where the dense work is done.

    Attributes:
        weights: all but the experts'.
        resident: experts that stay.
        ring: frames that the other experts pass through.
        unpacked: experts of one sweep as kernels read them; none where pages are not packed.
        activations: rows of a pass.
        workspace: of the experts' kernels; none on a CPU.
        tables: of pages, and rotary frequencies.
        uploads: where a pass's small arrays arrive; none on a CPU.
        staging: KV on its way to attention, in schedules that attend on the GPU.
        kv: the cache of layers that keep it there.
    """

    weights: int
    resident: int
    ring: int
    unpacked: int
    activations: int
    workspace: int
    tables: int
    uploads: int
    staging: int
    kv: int


@dataclass(frozen=True)
class HostUse(_Parts):
    """Host memory beside the device's.

    Attributes:
        experts: that are streamed.
        cpu_experts: that the CPU computes.
        kv: the cache of the other layers.
        rows: of decoding sequences, on their way to attention and back, and of all that go to the CPU's experts.
        uploads: where a pass's small arrays are put together, and the count that streams wait for; none on a CPU.
    """

    experts: int
    cpu_experts: int
    kv: int
    rows: int
    uploads: int


@dataclass(frozen=True)
class PassUse(_Parts):
    """What a pass takes of the device for a while: no more than this.

    Attributes:
        rotary: cosines and sines.
        arrays: that `uploads` have no room for, of steps without penalties and bans.
        attention: outputs of a prefill chunk, from Ampere on.
        logits: of the rows that are sampled at once, and what sampling makes of them.
        libraries: an allowance for what libraries and the allocator take beside tensors.
    """

    rotary: int
    arrays: int
    attention: int
    logits: int
    libraries: int


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a policy.

    Attributes:
        device: held where the dense work is done.
        host: held beside that.
        during_pass: what passes take of the device for a while.
        cpu_sweep: bytes of the host that the CPU's kernels keep from the first largest pass on, where they compute
            experts.
        has_gpu: the dense work is done on one.
    """

    device: DeviceUse
    host: HostUse
    during_pass: PassUse
    cpu_sweep: int
    has_gpu: bool = True

    @property
    def gpu_bytes(self) -> int:
        """What the GPU needs for tensors: driver and kernels come on top."""
        return self.device.total + self.during_pass.total

    @property
    def host_bytes(self) -> int:
        """What the host needs, with an allowance for the engine's own objects."""
        code = GPU_CODE_BYTES if self.has_gpu else 0
        return self.host.total + self.during_pass.arrays + self.cpu_sweep + ENGINE_BYTES + code


def memory_use(
    spec: ModelSpec,
    dtype_bytes: int,
    policy: Policy,
    *,
    has_gpu: bool = True,
    expert_bytes: int | None = None,
) -> MemoryUse:
    """What a worker takes that runs a policy.

    Args:
        spec: the model.
        dtype_bytes: of weights, activations and KV.
        policy: how it runs.
        has_gpu: the dense work is done on a GPU; else in host memory.
        expert_bytes: of a weight of an expert, where it is stored in another format.
    """
    rows_of_page = spec.experts.intermediate_size // policy.pages_per_expert
    page = page_bytes(spec.hidden_size, rows_of_page, expert_bytes or dtype_bytes, packed=policy.packed)
    plain = page_bytes(spec.hidden_size, rows_of_page, dtype_bytes, packed=False)
    unpacked = plain * pages_of_largest_part(policy, spec.experts.num_experts)
    per_layer = spec.experts.num_experts * policy.pages_per_expert
    resident = sum(policy.resident_pages)
    # Where pages lie when the ring begins at its first frame, where they are now, and where unpacked.
    tables = (2 * spec.num_layers + policy.packed) * per_layer
    a, rows = spec.attention, policy.max_num_seqs + policy.prefill_tokens
    kept, on_cpu = len(layers_keeping_kv(policy)), len(layers_on_cpu(policy))
    row_bytes = spec.hidden_size * dtype_bytes + spec.experts.top_k * (_INT64 + _FLOAT32)
    layer_kv = policy.num_blocks * _block_bytes(spec, dtype_bytes, policy)
    return MemoryUse(
        DeviceUse(
            weights=_other_parameters(spec) * dtype_bytes,
            resident=resident * page,
            ring=policy.num_frames * page,
            unpacked=unpacked if policy.packed else 0,
            activations=rows * _row_bytes(spec, dtype_bytes),
            workspace=_workspace_bytes(spec, dtype_bytes, rows) if has_gpu else 0,
            tables=tables * _INT32 + a.head_dim // 2 * _FLOAT32,
            uploads=UPLOAD_BYTES if has_gpu else 0,
            staging=staging_slots(policy) * staging_blocks(policy) * _block_bytes(spec, dtype_bytes, policy),
            kv=kept * layer_kv,
        ),
        HostUse(
            experts=(per_layer * (spec.num_layers - on_cpu) - resident) * page,
            cpu_experts=per_layer * on_cpu * plain,
            kv=(spec.num_layers - kept) * layer_kv,
            rows=policy.max_num_seqs * (a.qkv_size + a.q_size) * dtype_bytes
            + (rows * row_bytes if on_cpu else 0),
            uploads=UPLOAD_BYTES + COUNTER_BYTES if has_gpu else 0,
        ),
        _pass_use(spec, dtype_bytes, policy, rows),
        _cpu_sweep_bytes(spec, dtype_bytes, min(rows, CPU_EXPERTS_AT_ONCE), rows_of_page) if on_cpu else 0,
        has_gpu,
    )


@lru_cache(maxsize=64)
def _other_parameters(spec: ModelSpec) -> int:
    return spec.num_parameters - spec.num_expert_parameters


def _row_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Hidden states twice, q k v, attention's output, router logits; ids and weights of the chosen experts."""
    a, e = spec.attention, spec.experts
    elements = 2 * spec.hidden_size + a.qkv_size + a.q_size + e.num_experts
    return elements * dtype_bytes + e.top_k * (_INT64 + _FLOAT32)


def _workspace_bytes(spec: ModelSpec, dtype_bytes: int, rows: int) -> int:
    """As `kernels.experts.Workspace`: sorted rows, intermediate results, and the integers of the sort."""
    e = spec.experts
    slots = min(rows, EXPERTS_AT_ONCE) * e.top_k
    chunks, counted = -(-slots // 1024), max(16, 1 << (e.num_experts - 1).bit_length())
    partial = min(e.num_experts, slots)
    blocks = partial + (slots - partial) // 16
    integers = slots + chunks * counted + 4 * blocks
    return slots * (spec.hidden_size + e.intermediate_size) * dtype_bytes + integers * _INT32


def _pass_use(spec: ModelSpec, dtype_bytes: int, policy: Policy, rows: int) -> PassUse:
    a, largest = spec.attention, max(policy.chunk_tokens, policy.micro_batch_size)
    sampled = min(HEAD_ROWS, rows)
    logits = sampled * spec.vocab_size
    at_once = min(logits, max(SORTED_AT_ONCE, spec.vocab_size))
    attention = policy.chunk_tokens * (a.q_size * dtype_bytes + a.num_heads * _FLOAT32)
    return PassUse(
        rotary=a.head_dim * (rows * 2 * dtype_bytes + largest * 3 * _FLOAT32),
        # The buffer that is too small, those before it, and the one of twice its size.
        arrays=3 * (_ROW_ARRAY_BYTES * rows + _table_bytes(policy)),
        attention=attention,
        logits=logits * (dtype_bytes + _FLOAT32)
        + at_once * _SORTED_BYTES
        + 2 * sampled * spec.hidden_size * dtype_bytes,
        libraries=_LIBRARIES,
    )


def _cpu_sweep_bytes(spec: ModelSpec, dtype_bytes: int, rows: int, rows_of_page: int) -> int:
    """As the CPU's kernel keeps a row for each of its experts: input, all pages' rows twice, output."""
    e, h = spec.experts, _padded(spec.hidden_size)
    inner = e.intermediate_size // rows_of_page * _padded(rows_of_page)
    return rows * e.top_k * (2 * h * _FLOAT32 + inner * (dtype_bytes + _FLOAT32))


def _padded(dims: int) -> int:
    """As the CPU's kernels pad rows: to 32 elements."""
    return -(-dims // 32) * 32


def staging_slots(policy: Policy) -> int:
    """Places on the GPU for the KV of a decode micro-batch in one layer; none where the CPU attends."""
    return STAGING_SLOTS.get(policy.schedule, 0)


def staging_blocks(policy: Policy) -> int:
    """KV blocks that one such place holds: more than an even share, and any one sequence; more come in turns."""
    longest = -(-policy.prefill_tokens // policy.block_size)
    share = _UNEVEN * policy.num_blocks * policy.micro_batch_size / policy.max_num_seqs
    return min(policy.num_blocks, policy.micro_batch_size * longest, max(longest, round(share)))


def _block_bytes(spec: ModelSpec, dtype_bytes: int, policy: Policy) -> int:
    """Of a KV block in one layer."""
    return spec.kv_bytes_per_token(dtype_bytes) // spec.num_layers * policy.block_size


def _table_bytes(policy: Policy) -> int:
    """Of block tables for attention on the GPU: every block is in one of them."""
    if not layers_keeping_kv(policy):
        return 0
    return _INT64 * (policy.num_blocks + _TABLE_INTS * policy.max_num_seqs)
