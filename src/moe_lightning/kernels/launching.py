"""Triton's kernels, launched again with less to do: a pass launches ten thousand of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor


class Kernel:
    """A Triton kernel that remembers what a launch of the same kind was compiled to.

    Triton finds that out anew at each launch: where other cores attend that takes 80 microseconds, and a launcher
    that needs as long for its tasks as the GPU makes it wait. Here the kind of a call is a key that tells at least
    as much as Triton goes by, and a call of a new kind goes Triton's way.

    It is used as the kernel itself, ``kernel[grid](...)``, all constants by name; the GPU is that of the tensors.

    Attributes:
        jit: as Triton made it.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._known: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        key = (*map(_kind, args), *constants.items())
        known = self._known.get(key)
        if known is not None:
            compiled, named = known
            compiled[(*grid, 1, 1)](*args, *named)
            return
        compiled = self.jit[grid](*args, **constants)
        if isinstance(compiled, CompiledKernel):  # the interpreter gives nothing
            names = self.jit.arg_names[len(args) :]
            self._known[key] = compiled, tuple(constants[name] for name in names)


def _kind(arg: Any) -> Any:
    """What of an argument may make another kernel of it, or one for another GPU."""
    kind = type(arg)
    if kind is int:
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63
    if isinstance(arg, Tensor):
        return arg.dtype, arg.get_device(), arg.data_ptr() % 16 == 0
    if kind is TensorDescriptor:
        return arg.base.dtype, arg.base.get_device(), *arg.block_shape
    return kind, arg if kind is bool else None
