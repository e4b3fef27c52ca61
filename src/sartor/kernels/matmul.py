"""Matrix products on a CPU by loops of our own: of bfloat16 numbers (`matmul.cpp`), or of float32 ones (`floats.cpp`).

In bfloat16 for processors that multiply pairs of numbers (AVX-512 BF16) or tiles of them (AMX). PyTorch's library compiles code
for every shape, and reaches nine tenths or less of what these do; they take any shape as it comes, and add a product of low rank
on the way, which is what an adapter needs (`lora.py`). In float32 for AMD's processors with AVX2 (and without AVX-512), on which
they are an eighth faster than PyTorch's library. Sums are in float32, rounded once, whatever the number of threads.

Shapes: M x K times K x N; a linear layer has M rows, K input and N output channels.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sartor.kernels.calls import call, room_of
from sartor.kernels.native import Operator, products_library

_STEP = 32
_MEETING = 1024
"""Numbers: rows so far apart have two places in the first cache for all."""
_MOST_DEPTH = 2048
"""Numbers summed over with a panel of b in the second cache: 256 to 768 KiB."""
_TASK_ROWS = 1008
_PACKED_BYTES = 4 * 2**20
"""Of rows that do not lie in memory one behind the other, laid out at a time."""
_FLOATS_GROUP, _FLOATS_STRIP, _FLOATS_DEPTH, _FLOATS_ROWS, _FLOATS_BYTES = 6, 16, 768, 48, 4 * 2**20
"""Of float32 numbers: rows and columns of a tile, the most that are summed up at a time, rows of a task, and the memory of
columns that are laid out together."""
_FLOATS_LEAST_ROWS = 16
"""For which a weight is laid out; fewer meet it as it lies."""
_FLOATS_FEW, _FLOATS_SUMS = 64, 512
"""Rows up to which sums over rows of b take these as they lie, and columns that a thread sums up at a time."""
_PIECES = 4
"""Of work for each thread, at least: what one leaves, another takes. Two are enough if panels are twice as wide for that."""


class _Problem(ctypes.Structure):
    """`struct problem` of matmul.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "more_a", "more_b", "bias", "c", "laid")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "more_k", "a_row", "b_row", "more_a_row", "more_b_row", "c_row")),
        *((name, ctypes.c_int64) for name in ("a_turned", "b_turned", "c_turned", "adds")),
        *((name, ctypes.c_int64) for name in ("threads", "thread_bytes", "panel", "depth", "task_rows", "packed_rows", "strip")),
        ("scale", ctypes.c_float),
    )


@functools.cache
def _worth() -> int:
    loaded = products_library()
    return 0 if loaded is None else int(loaded.matmul_worth())


@functools.cache
def _worth_in_floats() -> int:
    loaded = products_library()
    return 0 if loaded is None else int(loaded.floats_worth())


def multiplies(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this machine can, and is faster by it: instructions for numbers of this format, and a compiler."""
    return _worth() > 0 if dtype == torch.bfloat16 else dtype == torch.float32 and _worth_in_floats() > 0


def has_tiles() -> bool:
    """Whether it multiplies tiles of numbers, and the system lets this process."""
    return _worth() > 1


def takes(*tensors: Tensor) -> bool:
    """Whether these matrices are of one format and lie in memory as `multiply` takes them."""
    dtype = tensors[0].dtype
    return multiplies(dtype) and all(tensor.dtype == dtype and tensor.is_cpu and 1 in tensor.stride() for tensor in tensors)


def multiply(
    a_MK: Tensor,
    b_KN: Tensor,
    c_MN: Tensor | None = None,
    *,
    more: tuple[Tensor, Tensor] | None = None,
    bias_N: Tensor | None = None,
    scale: float = 1.0,
    adds: bool = False,
    laid: Tensor | None = None,
) -> Tensor:
    """scale (a b + a' b') + bias, `more` being a' (M x R) and b' (R x N); written to c where it is given, or added to it.

    Matrices are of one format, and rows of them or of their transposes lie in memory without gaps: those of a', and of b' as b's.
    `laid`: b as `lay_out` gives it, which is used if it is as rows of a want it; the result is the same to the bit.
    """
    (m, k), n = a_MK.shape, b_KN.shape[1]
    if c_MN is None:
        c_MN = a_MK.new_empty(m, n)
    if m and n:
        depth = 0 if more is None else more[0].shape[1]
        room = room_of(a_MK, _Blocks.of(m, n, k, depth, a_MK, b_KN).room_bytes)
        matmul_(a_MK, b_KN, c_MN, room, bias_N, *(more or (None, None)), scale, adds, laid)
    return c_MN


def product(
    a_MK: Tensor,
    b_KN: Tensor,
    c_MN: Tensor,
    bias_N: Tensor | None = None,
    *,
    adds: bool = False,
    laid: Tensor | None = None,
) -> None:
    """c = a b + bias by what is fastest here; or c += a b."""
    if takes(a_MK, b_KN, c_MN):
        multiply(a_MK, b_KN, c_MN, bias_N=bias_N, adds=adds, laid=laid)
    elif adds:
        c_MN.addmm_(a_MK, b_KN)
    elif bias_N is None:
        torch.mm(a_MK, b_KN, out=c_MN)
    else:
        torch.addmm(bias_N, a_MK, b_KN, out=c_MN)


def laid_shape(k: int, n: int) -> tuple[int, int, int, int]:
    """Of b (K x N) laid out for products with rows that lie one behind the other: strips of columns, pairs of rows, columns of a
    strip."""
    strip = _strip(k)
    return -(-n // strip), _up(k, _STEP) // 2, strip, 2


def lay_out(b_KN: Tensor) -> Tensor:
    """b, as products by tiles read it (`laid_shape`)."""
    loaded = products_library()
    if loaded is None or not has_tiles():
        raise RuntimeError("weights are laid out for a processor with AMX, and by a compiled library")
    (k, n), row = b_KN.shape, max(b_KN.stride())
    laid = b_KN.new_empty(laid_shape(k, n))
    threads, strip = torch.get_num_threads(), _strip(k)
    problem = _Problem(b=b_KN.data_ptr(), n=n, k=k, b_row=row, b_turned=_is_turned(b_KN), threads=threads, strip=strip)
    loaded.lay_out_all(ctypes.byref(problem), ctypes.c_void_p(laid.data_ptr()))
    return laid


def _strip(a_row: int) -> int:
    """Columns of b that are laid out beside each other. Two tiles, below two of a's, but where rows of a meet in the first cache:
    there the fewer of a's the better."""
    return 32 if a_row % _MEETING else 48


def _is_turned(matrix: Tensor) -> bool:
    return matrix.stride(1) != 1


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """How a product is cut: columns that are laid out together, what a task is, and the memory beside the result."""

    threads: int
    panel: int
    depth: int
    task_rows: int
    packed_rows: int
    strip: int
    """Columns of a task in float32."""
    thread_bytes: int
    packed_bytes: int

    @property
    def room_bytes(self) -> int:
        return self.threads * self.thread_bytes + self.packed_bytes

    @staticmethod
    def of(m: int, n: int, k: int, more_k: int, a_MK: Tensor, b_KN: Tensor) -> _Blocks:
        if a_MK.dtype == torch.float32:
            if m <= _FLOATS_FEW and not more_k and _is_turned(a_MK) and not _is_turned(b_KN):
                return _Blocks._of_few_sums(m, n, torch.get_num_threads())
            as_it_lies = m < _FLOATS_LEAST_ROWS and _is_turned(b_KN) and not _is_turned(a_MK)
            return _Blocks._of_floats(m, n, k, more_k, as_it_lies, torch.get_num_threads())
        return _Blocks._of(m, n, k, more_k, _is_turned(a_MK), torch.get_num_threads(), has_tiles())

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def _of_floats(m: int, n: int, k: int, more_k: int, as_it_lies: bool, threads: int) -> _Blocks:
        depth = min(_up(-(-k // -(-k // _FLOATS_DEPTH)), 8), k)
        deepest = depth + more_k
        panel = min(_up(n, _FLOATS_STRIP), max(_FLOATS_BYTES // (4 * deepest) // _FLOATS_STRIP, 1) * _FLOATS_STRIP)
        task_rows = min(_FLOATS_ROWS, _up(m, _FLOATS_GROUP))
        parts = -(-_PIECES * threads // -(-m // task_rows))
        return _Blocks(
            threads=threads,
            panel=panel,
            depth=depth,
            task_rows=task_rows,
            packed_rows=0,
            strip=_up(-(-panel // parts), _FLOATS_STRIP),
            thread_bytes=0 if as_it_lies else 4 * task_rows * deepest,
            packed_bytes=0 if as_it_lies else 4 * panel * deepest,
        )

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def _of_few_sums(m: int, n: int, threads: int) -> _Blocks:
        """Of few rows that are sums over rows of b, which is not laid out."""
        strip = min(_up(-(-n // (2 * threads)), _FLOATS_STRIP), _FLOATS_SUMS)
        return _Blocks(
            threads=threads, panel=0, depth=0, task_rows=0, packed_rows=0, strip=strip, thread_bytes=4 * m * strip, packed_bytes=0
        )

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def _of(m: int, n: int, k: int, more_k: int, turned: bool, threads: int, tiles: bool) -> _Blocks:
        panel, group, step = (96, 32, _STEP) if tiles else (64, 12, 2)
        pieces = _PIECES * threads
        if tiles and n >= panel * pieces:  # longer parts of rows are laid out together, which memory gives faster
            panel, pieces = 2 * panel, pieces // 2
        rows = m
        if turned:  # rows of a are laid out first, some thousand at a time
            rows = min(_up(m, group), max(_PACKED_BYTES // (2 * _up(k, step)) // group, 1) * group)
        pieces = max(-(-pieces // -(-n // panel)), -(-rows // _TASK_ROWS))
        task_rows = max(_up(-(-rows // pieces), group), group)
        depth = min(_up(k, _STEP), _MOST_DEPTH)
        return _Blocks(
            threads=threads,
            panel=panel,
            depth=depth,
            task_rows=task_rows,
            packed_rows=rows,
            strip=0,
            thread_bytes=2 * panel * (depth + _up(more_k, _STEP)) + (4 * panel * task_rows if depth < k else 0),
            packed_bytes=2 * rows * _up(k, step) if turned else 0,
        )


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    room: Tensor | None,
    bias: Tensor | None,
    more_a: Tensor | None,
    more_b: Tensor | None,
    scale: float,
    adds: bool = False,
    laid: Tensor | None = None,
) -> None:
    loaded = products_library()
    if loaded is None or not multiplies(a.dtype):
        raise RuntimeError("sartor::matmul_ has to be compiled for a processor with AVX-512 BF16, or in float32 with AVX2")
    (m, k), n = a.shape, b.shape[1]
    more_k = 0 if more_a is None else more_a.shape[1]
    blocks = _Blocks.of(m, n, k, more_k, a, b)
    strip = blocks.strip or (_strip(max(a.stride())) if a.stride(1) == 1 else 32)
    laid = laid if laid is not None and laid.shape[2] == strip and has_tiles() else None
    places = (None if tensor is None else tensor.data_ptr() for tensor in (a, b, more_a, more_b, bias, c, laid))
    rows = (0 if matrix is None else max(matrix.stride()) for matrix in (a, b, more_a, more_b, c))
    problem = _Problem(
        *places, m, n, k, more_k, *rows, *map(_is_turned, (a, b, c)), adds,
        blocks.threads, blocks.thread_bytes, blocks.panel, blocks.depth, blocks.task_rows, blocks.packed_rows, strip, scale,
    )  # fmt: skip
    loops = loaded.matmul_floats if a.dtype == torch.float32 else loaded.matmul
    call(loops, problem, room, blocks.room_bytes, a, b, c, bias, more_a, more_b, laid)


matmul_ = Operator(
    "matmul_(Tensor a, Tensor b, Tensor(a!) c, Tensor(b!)? room, Tensor? bias, Tensor? more_a, Tensor? more_b, float scale, "
    "bool adds=False, Tensor? laid=None) -> ()",
    _matmul,
    lambda *_: None,
)
"""`multiply`, with the memory that it works in, if that is at hand."""
