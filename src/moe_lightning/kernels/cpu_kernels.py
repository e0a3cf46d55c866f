"""Attention and experts on the CPU, where KV cache and weights lie: C++ kernels behind checks of their tensors.

Shapes: N tokens, B sequences, D head dimension. `kernels.reference` defines what they compute.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.errors import ConfigError

try:
    from moe_lightning.kernels import _cpu_kernels as core
except ImportError as error:
    raise ImportError(
        f"the C++ kernels cannot be loaded ({error}); they are compiled when the package is installed: "
        "install it again with this Python, `pip install .` in its directory, which needs a C++ compiler"
    ) from error

ISA_VARIABLE = "MOE_LIGHTNING_CPU_ISA"
EMULATED_ISA = "amx_emulated"  # what amx does, in plain C++: for tests, as few machines have it
MAX_HEAD_DIM = 1024
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_MAX_FITTING = 256
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, bool] | None
_NO_WINDOW = 1 << 40  # more positions than any cache has, and far from overflowing


def available_isas() -> list[str]:
    """Those of scalar, avx2, avx512, avx512_bf16 and amx that this CPU runs, slowest first."""
    return core.available_isas()


class CpuKernels:
    """Kernels for this CPU and the threads that run them; calls from several threads take turns.

    The calling thread is one of `num_threads`. The others are started here and, between calls, sleep.

    Args:
        num_threads: None: one for each of `cpus`, or for each CPU that this process may use.
        cpus: where the threads run, the caller's included while it is in a call; None for wherever the system
            puts them. With fewer CPUs than threads all share the set.

    Raises:
        ConfigError: the environment variable MOE_LIGHTNING_CPU_ISA names an instruction set that this CPU lacks.
        ValueError: there is no such CPU, or fewer than one thread.
    """

    def __init__(self, num_threads: int | None = None, cpus: Sequence[int] | None = None) -> None:
        if num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if cpus is None else len(cpus)
        if cpus is not None and not cpus:
            raise ValueError("cpus is empty; name at least one, or None for any")
        self._core = core.Cpu(num_threads, list(cpus or ()), _isa())
        self._fitting: set[tuple[_Layout, ...]] = set()  # what need not be checked again, which takes 20 us

    @property
    def num_threads(self) -> int:
        """Threads that work on a call, the caller's included."""
        return self._core.num_threads

    @property
    def isa(self) -> str:
        """Instruction set of the kernels in use."""
        return self._core.isa

    @property
    def experts_bytes(self) -> int:
        """Memory that `experts` keeps: that of its largest call."""
        return self._core.experts_bytes

    def attend(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        *,
        query_lens: Tensor | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
        soft_cap: float | None = None,
    ) -> None:
        """Append k and v to the cache, then attend over it from each new token, causally.

        `out`, `q`, `k`, `v` and `kv` are of one dtype (bfloat16, float16, float32); sums are float32. Rows may be
        apart (slices of a wider buffer), heads and their elements may not.

        Args:
            out: [N, num_heads * D], is overwritten.
            q: [N, num_heads, D]; tokens sequence by sequence.
            k: [N, num_kv_heads, D], of the new tokens.
            v: as k.
            kv: [num_blocks, 2, num_kv_heads, block_size, D], a layer's blocks, each contiguous; is appended to.
            block_tables: [B, max_blocks] int64, of the blocks that hold each sequence's tokens in order.
            context_lens: [B] int64, tokens of each sequence with the new ones.
            query_lens: [B] int64, new tokens of each sequence; None for one each.
            scale: of q.k; None for D ** -0.5.
            sliding_window: tokens that a query sees, itself included; None for all.
            sinks: [num_heads] float32, a logit of each head that takes part in the softmax and has no value.
            soft_cap: limits scores to cap * tanh(score / cap); None for no limit.

        Raises:
            ValueError: a tensor is not as said above, or lengths and blocks contradict each other or the cache.
        """
        layouts = tuple(map(_layout, (out, q, k, v, kv, block_tables, context_lens, query_lens, sinks)))
        if layouts not in self._fitting:
            _check(out, q, k, v, kv, block_tables, context_lens, query_lens, sinks)
            if len(self._fitting) >= _MAX_FITTING:
                self._fitting.clear()
            self._fitting.add(layouts)
        num_tokens, num_heads, head_dim = q.shape
        num_blocks, _, num_kv_heads, block_size, _ = kv.shape
        num_seqs, max_blocks = block_tables.shape
        self._core.run(
            _DTYPES[q.dtype],
            (out.data_ptr(), out.stride(0)),
            (q.data_ptr(), q.stride(0)),
            (k.data_ptr(), k.stride(0)),
            (v.data_ptr(), v.stride(0)),
            (kv.data_ptr(), kv.stride(0), num_blocks),
            (block_tables.data_ptr(), block_tables.stride(0), max_blocks),
            (context_lens.data_ptr(), 0 if query_lens is None else query_lens.data_ptr(), num_seqs),
            (num_tokens, num_heads, num_kv_heads, head_dim, block_size),
            _options(head_dim, scale, soft_cap, sliding_window, sinks),
        )

    def experts(
        self,
        out: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        pages: Sequence[Tensor],
        pages_per_expert: int,
    ) -> None:
        """Sum over each token's experts of weight * down(silu(gate x) * up x), in float32 but for what down reads.

        Weights are read once, whatever the number of tokens; what these take is proportional to it.

        Args:
            out: [T, H] of x's dtype, is overwritten; may be x. Rows may be apart.
            x: [T, H] of bfloat16, float16 or float32; rows may be apart.
            topk_ids: [T, K] int64, contiguous.
            topk_weights: [T, K] float32, contiguous.
            pages: as `reference.experts` has them, of x's dtype.
            pages_per_expert: slices of each expert.

        Raises:
            ValueError: a tensor is not as said above, or a token goes to an expert that is not there.
        """
        if not len(x):
            return
        hidden_size, rows = _check_experts(out, x, topk_ids, topk_weights, pages, pages_per_expert)
        self._core.experts(
            _DTYPES[x.dtype],
            (out.data_ptr(), out.stride(0)),
            (x.data_ptr(), x.stride(0)),
            (topk_ids.data_ptr(), topk_weights.data_ptr(), len(x), topk_ids.shape[1]),
            ([page.data_ptr() for page in pages], pages_per_expert),
            (hidden_size, rows),
        )

    def read(self, memory: Tensor) -> int:
        """Sum of the memory's 8-byte words, as far as they fill cache lines: how fast these threads can read.

        Args:
            memory: contiguous, of any dtype.
        """
        if memory.device.type != "cpu" or not memory.is_contiguous():
            raise ValueError("memory must be a contiguous tensor on the CPU")
        return self._core.read(memory.data_ptr(), memory.nbytes)


def _isa() -> str:
    available = core.available_isas()
    forced = os.environ.get(ISA_VARIABLE)
    if forced and forced not in (*available, EMULATED_ISA):
        raise ConfigError(
            f"{ISA_VARIABLE} is {forced!r}; this CPU has kernels for {', '.join(available)}. Set one of them, "
            "or unset it to use the last"
        )
    return forced or available[-1]


def _options(
    head_dim: int, scale: float | None, soft_cap: float | None, window: int | None, sinks: Tensor | None
) -> tuple[float, float, int, int]:
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive, or None for no limit")
    if window is not None and window < 1:
        raise ValueError(f"sliding_window is {window}; it must be at least 1, or None for all tokens")
    window = _NO_WINDOW if window is None else min(window, _NO_WINDOW)
    return scale, soft_cap or 0.0, window, 0 if sinks is None else sinks.data_ptr()


def _layout(tensor: Tensor | None) -> _Layout:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cpu)


def _check(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Raise if they do not fit each other. Looks at nothing but layouts."""
    num_tokens, num_heads, head_dim = _rows(q, "q", 3)
    _, pair, num_kv_heads, _, kv_dim = _rows(kv, "kv", 5)
    num_seqs, _ = _rows(block_tables, "block_tables", 2)
    heads = (num_tokens, num_kv_heads, head_dim)
    _expect(out, "out", (num_tokens, num_heads * head_dim), q.dtype)
    _expect(k, "k", heads, q.dtype)
    _expect(v, "v", heads, q.dtype)
    _expect_row(context_lens, "context_lens", num_seqs, torch.int64)
    if query_lens is not None:
        _expect_row(query_lens, "query_lens", num_seqs, torch.int64)
    if sinks is not None:
        _expect_row(sinks, "sinks", num_heads, torch.float32)
    if q.dtype not in _DTYPES or kv.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and kv {kv.dtype}; both must be bfloat16, float16 or float32")
    if pair != 2 or kv_dim != head_dim or head_dim > MAX_HEAD_DIM or num_heads % num_kv_heads:
        raise ValueError(
            f"q {list(q.shape)} and kv {list(kv.shape)} do not fit: kv must be [num_blocks, 2, num_kv_heads, "
            f"block_size, {head_dim}], num_kv_heads divide {num_heads}, head_dim be {MAX_HEAD_DIM} at most"
        )
    if block_tables.dtype != torch.int64:
        raise ValueError(f"block_tables is {block_tables.dtype}; it must be int64")


def _check_experts(
    out: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    pages: Sequence[Tensor],
    pages_per_expert: int,
) -> tuple[int, int]:
    """Elements of x's rows and rows of a page's gate; raises if they do not fit each other."""
    num_tokens, hidden_size = _rows(x, "x", 2)
    _, top_k = _rows(topk_ids, "topk_ids", 2)
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be bfloat16, float16 or float32")
    _expect(out, "out", (num_tokens, hidden_size), x.dtype)
    _expect(topk_ids, "topk_ids", (num_tokens, top_k), torch.int64)
    _expect(topk_weights, "topk_weights", (num_tokens, top_k), torch.float32)
    for tensor, name in ((topk_ids, "topk_ids"), (topk_weights, "topk_weights")):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if num_tokens > 1 and out.stride(0) < hidden_size:
        raise ValueError(f"out has strides {out.stride()}; its rows may not overlap")
    if pages_per_expert < 1 or not pages or len(pages) % pages_per_expert:
        raise ValueError(
            f"pages are {len(pages)}, {pages_per_expert} of each expert; they must be whole experts"
        )
    size = pages[0].numel()
    if size % (3 * hidden_size) or not size:
        raise ValueError(f"pages have {size} elements; they must be whole rows of 3 x {hidden_size}")
    if any(p.dtype != x.dtype or p.numel() != size or not p.is_contiguous() or not p.is_cpu for p in pages):
        raise ValueError(f"pages must each be {size} contiguous elements of {x.dtype} on the CPU")
    return hidden_size, size // (3 * hidden_size)


def _rows(tensor: Tensor, name: str, num_dims: int) -> tuple[int, ...]:
    """Shape of a tensor whose first dimension alone may have gaps."""
    shape, stride = tensor.shape, tensor.stride()
    expected = 1
    for size, step in zip(reversed(shape[1:]), reversed(stride[1:]), strict=True):
        if size != 1 and step != expected:
            raise ValueError(f"{name} has strides {stride} for {list(shape)}; each row must be contiguous")
        expected *= size
    if len(shape) != num_dims or expected == 0 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {list(shape)} on {tensor.device}; it must have {num_dims} dimensions, all but the first "
            "of at least 1, on the CPU"
        )
    return tuple(shape)


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; beside the others it must be {dtype} {list(shape)}"
        )
    _rows(tensor, name, len(shape))


def _expect_row(tensor: Tensor, name: str, size: int, dtype: torch.dtype) -> None:
    _expect(tensor, name, (size,), dtype)
    if size > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(0)}; it must be contiguous")
