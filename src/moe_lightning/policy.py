"""The choices that decide how a model runs on a machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """One way to run a model: the paper's (N, mu, A_g, F_g, r_w, r_c) in the units the runtime works with.

    Attributes:
        max_num_seqs: sequences that run at once (N), at most. KV memory may hold as many only while they are short:
            how many decode while it is full follows from the workload (`perf.workload.num_decoding`).
        micro_batch_size: sequences in a decode micro-batch (mu).
        group_size: micro-batches that share one sweep over a layer's experts.
        look_ahead: decode micro-batches whose attention is launched ahead of the one in post-attention.
        prefill_tokens: prompt tokens that a pass has room for beside `max_num_seqs` decoding sequences; at least
            the longest prompt. While fewer decode, as they do while KV memory is full, more prompts are admitted.
        chunk_tokens: prompt tokens in one prefill micro-batch.
        pages_per_expert: slices of an expert's intermediate dimension; divides it.
        resident_pages: pages of each layer that stay on the GPU (r_w, in pages).
        num_frames: frames of the ring that streamed pages go through.
        expert_parts: sweeps over a layer's experts, each over some of them (`cgopipe` only; the others take whole
            layers). The ring must hold the streamed pages of one.
        first_part_at_once: micro-batches have the first of several parts as soon as their attention is in, prompts
            first, and not once all of the layer's are there: less is left between one attention and the next.
        kv_every: the last of every so many layers keeps its KV on the GPU, which attends there (r_c, by layers);
            0: none does (`cgopipe` only).
        cpu_every: the last of every so many layers has its experts computed on the CPU (F_g, by layers); 0: none
            (`cgopipe` only). Such layers have no resident pages, and theirs are not packed.
        num_blocks: KV blocks; each has a place in every layer.
        block_size: tokens in a KV block.
        schedule: name of the builder, `cgopipe` or a baseline.
        packed: bfloat16 experts are stored with exponents of four bits, 25 % smaller and exact, and unpacked on the
            GPU for each sweep (`perf.page_size`).
    """

    max_num_seqs: int
    micro_batch_size: int
    group_size: int
    look_ahead: int
    prefill_tokens: int
    chunk_tokens: int
    pages_per_expert: int
    resident_pages: tuple[int, ...]
    num_frames: int
    num_blocks: int
    block_size: int = 16
    schedule: str = "cgopipe"
    expert_parts: int = 1
    first_part_at_once: bool = False
    kv_every: int = 0
    cpu_every: int = 0
    packed: bool = False
