"""CGOPipe: CPU attention, GPU work and paged weight copies, interleaved (the paper's Algorithm 1)."""

from __future__ import annotations

from moe_lightning.pipeline.builder import PassBuilder
from moe_lightning.pipeline.task import Lane, PassShape, Schedule


def build(shape: PassShape) -> Schedule:
    """The pass in CGOPipe's launch order, with what waits for what."""
    return launched(shape).finish("cgopipe")


def launched(shape: PassShape) -> PassBuilder:
    """The pass in CGOPipe's launch order.

    With groups of one micro-batch, a look-ahead of two and as many pages as micro-batches it is Algorithm 1.
    Larger groups sweep a layer's experts once for several micro-batches. Prompts fill the GPU's time while the CPU
    attends: their attention comes before that of the decode micro-batches is awaited, and their experts after the
    decode sequences have left for the next layer's attention. Where experts are swept in parts, the groups come
    part by part, so that the frames of each are soon free; the first part may be swept at once, as attention comes
    in, prompts first. Where a layer has its KV on the GPU, the GPU attends.
    Where its experts are on the CPU, pages of the next layers come while that computes.
    """
    builder = PassBuilder(shape)
    ahead = LookAhead(builder)
    ahead.launch(shape.look_ahead)
    if shape.num_decode <= shape.group_size:
        # The experts sweep once, so nothing else is due on the link until the first attention is done.
        builder.load_pages(builder.pages_before(1))
    chunks, decode = range(shape.num_prefill), range(shape.num_prefill, shape.num_micro_batches)
    for layer in range(shape.num_layers):
        for j in chunks:
            prefill(builder, layer, j)
            builder.load_pages(pages_due(builder, layer, j))
            builder.post_attention(layer, j)
        for j in chunks:
            sweep_at_once(builder, layer, j)
        for j in decode:
            ahead.launch(ahead.position(layer, j) + 1)
            if not shape.keeps_kv(layer):
                builder.load_hidden(layer, j, Lane.BACK)
            builder.load_pages(pages_due(builder, layer, j))
            builder.post_attention(layer, j)
            if shape.part_pages:
                sweep_at_once(builder, layer, j)
            else:
                close_group(builder, layer, j)
            ahead.launch(ahead.position(layer, j) + 1 + shape.look_ahead)
        if shape.part_pages:
            sweep_parts(builder, ahead, layer)
        else:
            for j in chunks:
                close_group(builder, layer, j)
    return builder


def sweep_at_once(builder: PassBuilder, layer: int, j: int) -> None:
    """What the group that ends with j need not wait for: nothing, or the first part of the layer's experts."""
    group = builder.group_ending_at(j)
    if group is not None:
        for part in builder.shape.parts_at_once(layer):
            experts(builder, layer, group, part)


def sweep_parts(builder: PassBuilder, ahead: LookAhead, layer: int) -> None:
    """The other parts of the layer, one by one; after the last decode sequences leave before the prompts' turn."""
    shape = builder.shape
    chunks = [g for g, members in enumerate(shape.groups) if members[0] < shape.num_prefill]
    decode = range(len(chunks), len(shape.groups))
    parts = shape.parts_of(layer)
    for part in parts[len(shape.parts_at_once(layer)) :]:
        for group in (*decode, *chunks):
            experts(builder, layer, group, part)
            if part == parts[-1]:
                sample_after_last(builder, layer, group)
                ahead.launch((layer + 1) * shape.num_decode + shape.look_ahead)
        builder.load_pages(builder.pages_before(shape.num_layers) + shape.pages_ahead)


def prefill(builder: PassBuilder, layer: int, j: int) -> None:
    """A prefill chunk up to its attention; its k and v leave for the cache meanwhile."""
    builder.pre_attention(layer, j)
    if builder.shape.keeps_kv(layer):
        builder.keep_kv(layer, j)
    else:
        builder.store_kv(layer, j)
    builder.prefill_attention(layer, j)


def pages_due(builder: PassBuilder, layer: int, j: int) -> int:
    """Pages launched once micro-batch j of the layer is: an even share each, as early as the ring allows."""
    shape = builder.shape
    share = shape.streamed_pages[layer] * (j + 1) // shape.num_micro_batches
    return builder.pages_before(layer) + share + shape.pages_ahead


def close_group(builder: PassBuilder, layer: int, j: int) -> None:
    """The experts of the group that ends with j, and after the last layer its tokens."""
    group = builder.group_ending_at(j)
    if group is None:
        return
    experts(builder, layer, group)
    sample_after_last(builder, layer, group)


def experts(builder: PassBuilder, layer: int, group: int, part: int = 0) -> None:
    """A sweep, where the layer's experts are computed."""
    if builder.shape.is_on_cpu(layer):
        builder.cpu_experts(layer, group)
    else:
        builder.experts(layer, group, part)


def sample_after_last(builder: PassBuilder, layer: int, group: int) -> None:
    """The tokens of a group whose experts of this layer are done, if no layer follows."""
    if layer == builder.shape.num_layers - 1:
        for member in builder.shape.groups[group]:
            builder.sample(member)


class LookAhead:
    """Launches decode micro-batches up to their attention, in order, ahead of their post-attention.

    Decode micro-batches of all layers are one sequence; the look-ahead runs over the end of a layer into the
    next as far as the hidden states are there.
    """

    def __init__(self, builder: PassBuilder) -> None:
        self._builder = builder
        self._launched = 0

    def position(self, layer: int, j: int) -> int:
        """Place of decode micro-batch j of a layer in the sequence."""
        shape = self._builder.shape
        return layer * shape.num_decode + j - shape.num_prefill

    def launch(self, target: int) -> None:
        """Launch until `target` micro-batches of the sequence are launched or hidden states are missing."""
        shape = self._builder.shape
        while self._launched < min(target, shape.num_layers * shape.num_decode):
            layer, decode = divmod(self._launched, shape.num_decode)
            j = shape.num_prefill + decode
            if layer > 0 and not self._builder.is_group_done(layer - 1, j):
                return
            self._builder.pre_attention(layer, j)
            if shape.keeps_kv(layer):
                self._builder.resident_attention(layer, j)
            else:
                self._builder.offload_qkv(layer, j)
                self._builder.attention(layer, j)
            self._launched += 1
