"""Reading safetensors checkpoints into the places where weights live."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from moe_lightning.errors import CheckpointError
from moe_lightning.memory.arena import HostArena
from moe_lightning.memory.weights import Weights
from moe_lightning.models.spec import EXPERT_ROLES, ModelSpec, Role, TensorSpec
from moe_lightning.models.stored import StoredTensor, open_checkpoint, open_file
from moe_lightning.units import GIB, format_bytes

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNMENT = 64  # bytes
_MOST_BUFFERS = GIB  # in all: about what an engine's first passes take later
_PIECE = 16 * 2**20  # bytes of two tensors that are compared at a time
Progress = Callable[[int, int], None]  # bytes read, bytes in all


Tensors = list[tuple[TensorSpec, StoredTensor]]  # each tensor of a model with its place in the files


def open_model(directory: Path, spec: ModelSpec) -> Tensors:
    """Each tensor of the model with its place in a checkpoint's files; their headers are read, no weights.

    Raises:
        CheckpointError: the files are damaged, or not the model's.
    """
    return check_tensors(open_checkpoint(directory), spec)


def check_tensors(stored: dict[str, StoredTensor], spec: ModelSpec) -> Tensors:
    """Each tensor of the model with its place in the files.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape or an unusable dtype, or a tied one has
            other values than the one that it is tied to.
    """
    wanted = {tensor.name: tensor for tensor in spec.tensors()}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(
            f"{_some(missing)} missing from the checkpoint; is it a complete {spec.architecture}?"
        )
    extra = [name for name in stored if name not in wanted and not _is_ignored(name, spec)]
    if extra:
        raise CheckpointError(
            f"{_some(extra)} in the checkpoint, but {spec.architecture} has no such tensor; "
            "its text would be wrong without them"
        )
    for name, tensor in wanted.items():
        _check_tensor(stored[name], tensor)
    if spec.tie_word_embeddings:
        _check_tied_head(stored, spec)
    return [(tensor, stored[name]) for name, tensor in wanted.items()]


def _check_tensor(stored: StoredTensor, wanted: TensorSpec) -> None:
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            f"{stored.name} is {stored.dtype}; checkpoints in {', '.join(_DTYPES)} can be read"
        )
    if stored.shape != wanted.shape:
        raise CheckpointError(
            f"{stored.name} has shape {list(stored.shape)}, config.json says {list(wanted.shape)}"
        )
    if math.prod(stored.shape) * _DTYPES[stored.dtype].itemsize != stored.num_bytes:
        raise CheckpointError(
            f"{stored.path}: {stored.name} has {stored.num_bytes} bytes, "
            f"not those of its shape {list(stored.shape)}"
        )


def _check_tied_head(stored: dict[str, StoredTensor], spec: ModelSpec) -> None:
    """A head that is stored although it is tied must be the embedding: fine-tuned ones sometimes are not."""
    head, embedding = (stored.get(spec.weight_names[role]) for role in (Role.LM_HEAD, Role.EMBED))
    if head is None or embedding is None or _is_equal(head, embedding):
        return
    raise CheckpointError(
        f"{head.name} in {head.path} is not {embedding.name}, but config.json has tie_word_embeddings: true, which "
        "says that they are one; set tie_word_embeddings to false in config.json if the head is the trained one, "
        "or remove it from the checkpoint"
    )


def _is_equal(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.dtype, a.shape, a.num_bytes) != (b.dtype, b.shape, b.num_bytes):
        return False
    with open_file(a.path) as of_a, open_file(b.path) as of_b:
        of_a.seek(a.offset)
        of_b.seek(b.offset)
        for start in range(0, a.num_bytes, _PIECE):
            size = min(_PIECE, a.num_bytes - start)
            if of_a.read(size) != of_b.read(size):
                return False
    return True


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in spec.ignored_weights)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return (
        f"{shown} and {len(names) - 3} more are"
        if len(names) > 3
        else f"{shown} {'is' if len(names) == 1 else 'are'}"
    )


def read_tensor(stored: StoredTensor, buffer: Tensor | None = None) -> Tensor:
    """A tensor's values, in the file's dtype.

    Args:
        stored: where they are.
        buffer: bytes that it is read into, as many or more; None for new memory.

    Raises:
        CheckpointError: the file cannot be read to the tensor's end.
    """
    held = torch.empty(stored.num_bytes, dtype=torch.uint8) if buffer is None else buffer[: stored.num_bytes]
    values = held.view(_DTYPES[stored.dtype]).view(stored.shape)
    view = memoryview(held.numpy().data)
    done = 0
    with open_file(stored.path) as file:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], stored.offset + done)
            if count == 0:
                raise CheckpointError(f"{stored.path} ended inside {stored.name}; download it again")
            done += count
    return values


def load(tensors: Tensors, weights: Weights, num_readers: int = 8, progress: Progress | None = None) -> None:
    """Fill the weights from a checkpoint; each reader holds one tensor beside them at a time.

    Args:
        tensors: of the model, with their places in its files.
        weights: where they go.
        num_readers: at most; fewer where tensors are large.
        progress: told of bytes read and bytes in all.

    Raises:
        CheckpointError: a file cannot be read, or has changed since it was opened.
    """
    sizes = [stored.num_bytes for _, stored in tensors]
    total, done = sum(sizes), 0
    buffers = _buffers(tensors, weights, num_readers)
    num_readers = len(buffers.tensor)
    left, of_reader = iter(buffers.tensor), threading.local()

    def begin() -> None:
        of_reader.buffer = next(left)

    def fill(tensor: TensorSpec, stored: StoredTensor) -> int:
        return _fill(weights, tensor, stored, of_reader.buffer)

    with ThreadPoolExecutor(num_readers, thread_name_prefix="load", initializer=begin) as readers:
        futures = [readers.submit(fill, tensor, stored) for tensor, stored in tensors]
        try:
            for future in as_completed(futures):
                done += future.result()
                if progress:
                    progress(done, total)
        except BaseException:
            readers.shutdown(wait=True, cancel_futures=True)
            raise


def _buffers(tensors: Tensors, weights: Weights, num_readers: int) -> HostArena:
    """[readers, bytes]: room for an expert's largest tensor for each.

    It is used again and again: new memory would be brought in for each tensor, which takes as long as reading a
    fifth of it. Of what a GPU packs, it is page-locked, as the GPU takes it from there.
    """
    largest = max(stored.num_bytes for tensor, stored in tensors if tensor.role in EXPERT_ROLES)
    row = -(-largest // _ALIGNMENT) * _ALIGNMENT
    arena = HostArena((max(1, min(num_readers, _MOST_BUFFERS // row)), row), torch.uint8)
    if weights.content.packs_on_gpu:
        arena.prepare(pin=True)
    return arena


def _fill(weights: Weights, tensor: TensorSpec, stored: StoredTensor, buffer: Tensor) -> int:
    fits = stored.num_bytes <= len(buffer)  # embeddings may be larger, but there are two at most
    filled = weights.put(tensor, read_tensor(stored, buffer if fits else None))
    if filled != tensor.num_elements:
        raise CheckpointError(
            f"{tensor.name}: {format_bytes(stored.num_bytes)} read, "
            f"{filled} of {tensor.num_elements} weights placed"
        )
    return stored.num_bytes
