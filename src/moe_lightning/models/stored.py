"""Tensors of a checkpoint as the headers of its safetensors files name them; no weights are read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_lightning.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100 * 2**20  # the format's own bound


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `offset` is its first byte there."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def open_checkpoint(directory: Path, *, has_weights: bool = True) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the files' headers alone.

    Args:
        directory: of the checkpoint.
        has_weights: false where files may end after their headers: good for a plan.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file; the message names it.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise CheckpointError(
                f"{directory} has neither {SINGLE} nor {INDEX}; convert other formats to safetensors first"
            )
        return _read_header(directory / SINGLE, has_weights)
    return _read_shards(directory, _read_weight_map(index), has_weights)


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


def _read_shards(directory: Path, weight_map: dict[str, str], has_weights: bool) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = directory / file
        if not path.is_file():
            raise CheckpointError(f"{INDEX} names {file}, which is not in {directory}; download it again")
        for name, tensor in _read_header(path, has_weights).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].path.name} and in {file}; keep one"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != Path(file).name:
            raise CheckpointError(f"{INDEX} says that {name} is in {file}, but it is not; download it again")
    return tensors


def _read_header(path: Path, has_weights: bool) -> dict[str, StoredTensor]:
    with open_file(path) as file:
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
    end = _check_data(path, tensors.values(), 8 + length)
    if end != size and (has_weights or size > end):
        state = "is truncated" if end > size else "has too many bytes"
        raise CheckpointError(
            f"{path} {state}: its tensors end at byte {end}, the file at {size}; download it again"
        )
    return tensors


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file of weights, open for reading.

    Raises:
        CheckpointError: it cannot be read, now or inside.
    """
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


def _check_data(path: Path, tensors: Iterable[StoredTensor], start: int) -> int:
    """Tensors lie without gaps or overlaps: otherwise wrong offsets would be read as weights. Where they end."""
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{path} has a damaged header: {tensor.name} begins at byte {tensor.offset}, what is before it "
                f"ends at {position}; download it again"
            )
        position += tensor.num_bytes
    return position
