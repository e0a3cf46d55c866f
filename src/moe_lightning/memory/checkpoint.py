"""Reading safetensors checkpoints into the places where weights live."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moe_lightning.errors import CheckpointError
from moe_lightning.memory.weights import Weights
from moe_lightning.models.spec import ModelSpec, Role, TensorSpec
from moe_lightning.units import format_bytes

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100 * 2**20  # the format's own bound
_PIECE = 16 * 2**20  # bytes of two tensors that are compared at a time
Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `offset` is its first byte there."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


Tensors = list[tuple[TensorSpec, StoredTensor]]  # each tensor of a model with its place in the files


def open_model(directory: Path, spec: ModelSpec) -> Tensors:
    """Each tensor of the model with its place in a checkpoint's files; their headers are read, no weights.

    Raises:
        CheckpointError: the files are damaged, or not the model's.
    """
    return check_tensors(open_checkpoint(directory), spec)


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the files' headers alone.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file; the message names it.
    """
    index = directory / _INDEX
    if not index.exists():
        if not (directory / _SINGLE).exists():
            raise CheckpointError(
                f"{directory} has neither {_SINGLE} nor {_INDEX}; convert other formats to safetensors first"
            )
        return _read_header(directory / _SINGLE)
    return _read_shards(directory, _read_weight_map(index))


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise _unreadable(index, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no checkpoint index ({error!r}); download it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names; download it again")
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = directory / file
        if not path.is_file():
            raise CheckpointError(f"{_INDEX} names {file}, which is not in {directory}; download it again")
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].path.name} and in {file}; keep one"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != Path(file).name:
            raise CheckpointError(f"{_INDEX} says that {name} is in {file}, but it is not; download it again")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
            entries = [(n, e) for n, e in header.items() if n != "__metadata__"]
            tensors = {name: _entry(name, path, entry, 8 + length) for name, entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error!r}); download it again") from error
    _check_data(path, tensors.values(), 8 + length, size)
    return tensors


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error.strerror}); check that it is a file and its mode, or download it again"
    )


def _entry(name: str, path: Path, entry: dict[str, Any], base: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(x) is int and x >= 0 for x in (start, end, *shape)) or start > end:
        raise ValueError(f"{name} has shape {list(shape)} and offsets {start}, {end}")
    return StoredTensor(name, path, str(entry["dtype"]), shape, base + start, end - start)


def _check_data(path: Path, tensors: Iterable[StoredTensor], start: int, size: int) -> None:
    """Tensors fill a file without gaps or overlaps: otherwise wrong offsets would be read as weights."""
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{path} has a damaged header: {tensor.name} begins at byte {tensor.offset}, what is before it "
                f"ends at {position}; download it again"
            )
        position += tensor.num_bytes
    if position != size:
        state = "is truncated" if position > size else "has too many bytes"
        raise CheckpointError(
            f"{path} {state}: its tensors end at byte {position}, the file at {size}; download it again"
        )


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
    with _open(a.path) as of_a, _open(b.path) as of_b:
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


def read_tensor(stored: StoredTensor) -> Tensor:
    """A tensor's values, in the file's dtype.

    Raises:
        CheckpointError: the file cannot be read to the tensor's end.
    """
    values = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    view = memoryview(values.view(-1).view(torch.uint8).numpy().data)
    done = 0
    with _open(stored.path) as file:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], stored.offset + done)
            if count == 0:
                raise CheckpointError(f"{stored.path} ended inside {stored.name}; download it again")
            done += count
    return values


def load(tensors: Tensors, weights: Weights, num_readers: int = 4, progress: Progress | None = None) -> None:
    """Fill the weights from a checkpoint; each reader holds one tensor beside them at a time.

    Raises:
        CheckpointError: a file cannot be read, or has changed since it was opened.
    """
    total, done = sum(stored.num_bytes for _, stored in tensors), 0
    with ThreadPoolExecutor(num_readers, thread_name_prefix="load") as readers:
        futures = [readers.submit(_fill, weights, tensor, stored) for tensor, stored in tensors]
        try:
            for future in as_completed(futures):
                done += future.result()
                if progress:
                    progress(done, total)
        except BaseException:
            readers.shutdown(wait=True, cancel_futures=True)
            raise


def _fill(weights: Weights, tensor: TensorSpec, stored: StoredTensor) -> int:
    values = read_tensor(stored)
    filled = 0
    for destination, part in weights.destinations(tensor):
        destination.copy_(values[part])
        filled += destination.numel()
    if filled != tensor.num_elements:
        raise CheckpointError(
            f"{tensor.name}: {format_bytes(stored.num_bytes)} read, "
            f"{filled} of {tensor.num_elements} weights placed"
        )
    return stored.num_bytes
