"""How much is measured, in how much memory and how long."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.units import GIB, KIB, MIB

_RUNS_OF_CONTEXT = 4  # alone, and three times as long beside copies
_MAKING_S = 0.5  # what calls of attention read is made before it is measured
_LEAST_SHARE = 0.5  # of the time that measurements should have: what they then say is rough, but is said


@dataclass(frozen=True)
class Effort:
    """Sizes, repetitions and bounds of a profile.

    Attributes:
        point_s: seconds of repeating one measurement of the host.
        gpu_point_s: the same of the GPU or the link, which vary less.
        attention_s: seconds after the beginning by which CPU attention should be measured; it is the longest part.
        host_bytes: memory that K and V, copies and reads take, page-locked where there is a GPU: much of what
            passes touch, as not all of it is equally fast. A 24th of it is enough where nothing is copied.
        gpu_bytes: GPU memory that tensors take at most.
        call_bytes: K and V that one call of attention reads, or less where there is little memory.
        pause_s: seconds before the calls of a layer, as between layers.
        pool_bytes: weights of experts; layers that are larger use frames again, which caches do not notice.
        copy_sizes: bytes of a copy.
        hop_sizes: bytes of hidden states on their way.
        contexts: tokens that a sequence holds.
        load_context: those of the attention beside which the GPU's kernels are measured.
        load_tokens: of the sweeps beside which, and beside that attention, pages are measured.
        pages_s: seconds of that.
        num_seqs: sequences of a call that reads next to nothing; what it takes rises evenly between and beyond.
        geometries: query heads, KV heads, head dimension.
        tokens: of a sweep over experts.
        part_tokens: of a sweep over a share of the experts; the cost of fewer follows.
        expert_parts: sweeps of a layer, whose share of the experts is measured.
        cpu_tokens: tokens of a sweep on a CPU.
        rows: of a dense product.
        prompts: tokens of a prompt.
        chunk_tokens: of prompts whose K and V are stored together.
        gpu_product: rows and columns of the matrices whose product gives a GPU's FLOP/s.
        cpu_products: the same for the CPU, until one takes too long.
        cpu_experts_s: seconds for the experts of one model and dtype on a CPU; beyond, larger batches are left out.
        cpu_experts_beside_s: the same beside a GPU, where it computes those of few tokens at most.
        chain: tasks of one lane in a schedule that measures lanes.
    """

    point_s: float = 0.2
    gpu_point_s: float = 0.08
    attention_s: float = 30.0
    host_bytes: int = 24 * GIB
    gpu_bytes: int = 4 * GIB
    call_bytes: int = 256 * MIB
    pause_s: float = 20e-3
    pool_bytes: int = GIB
    copy_sizes: tuple[int, ...] = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
    hop_sizes: tuple[int, ...] = (64 * KIB, 256 * KIB, MIB)
    contexts: tuple[int, ...] = (64, 128, 512, 2048)
    load_context: int = 128
    load_tokens: int = 2048
    pages_s: float = 1.0
    num_seqs: tuple[int, ...] = (1, 128, 1024)
    geometries: tuple[tuple[int, int, int], ...] = ((32, 32, 128), (32, 8, 128), (32, 4, 128))
    # Tiles of experts have up to 128 rows, so that a sweep's seconds rise in steps. Where steps begin half of the
    # experts have a tile more, and what lies below would be taken to be nearly as slow. So these are amid steps for
    # Mixtral-8x7B, where an expert has a quarter of the tokens, and below their ends where it has a sixteenth.
    tokens: tuple[int, ...] = (1, 16, 64, 128, 240, 448, 832, 1856, 3904, 8000)
    part_tokens: tuple[int, ...] = (240, 448, 832, 1856, 3904, 8000)
    expert_parts: tuple[int, ...] = (8, 4)
    cpu_tokens: tuple[int, ...] = (1, 4, 8, 16, 64, 256, 1024, 4096)
    rows: tuple[int, ...] = (1, 16, 64, 256, 512, 2048)
    prompts: tuple[int, ...] = (64, 256, 1024, 4096)
    chunk_tokens: tuple[int, ...] = (256, 1024, 2048)
    gpu_product: int = 8192
    cpu_products: tuple[int, ...] = (512, 1024, 2048, 4096)
    cpu_experts_s: float = 3.0
    cpu_experts_beside_s: float = 1.2
    chain: int = 40

    def paced(self, elapsed_s: float, done: int) -> Effort:
        """For the next geometry of attention, after so many: shorter where what came before took long.

        What follows attention takes as long as it takes.
        """
        planned_s = self.point_s * (len(self.num_seqs) + _RUNS_OF_CONTEXT * len(self.contexts))
        left_s = (self.attention_s - elapsed_s) / (len(self.geometries) - done) - _MAKING_S
        return replace(self, point_s=self.point_s * min(1.0, max(_LEAST_SHARE, left_s / planned_s)))


FULL = Effort()
