"""Products with one side as small as the rank of an adapter, by tiles (AMX, `thin.cpp`): all that is wanted of the other side is
taken in one pass over it, since reading it is most of what they cost.

Shapes: M rows, C columns, R rank.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sartor.kernels.calls import call, room_of
from sartor.kernels.matmul import has_tiles, multiply
from sartor.kernels.native import Operator, products_library

_LEAST_ROWS = 16
_ROWS, _MOST_PARTS = 256, 16
"""Of parts whose sums are kept apart, so that results are the same for any number of threads."""
_ROWS_ALONE = 64
"""Of a part where nothing is summed over rows."""


class _Pass(ctypes.Structure):
    """`struct thin_pass` of thin.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("z", "w", "given", "low", "gradient")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_int64) for name in ("z_row", "w_row", "given_row", "low_row", "gradient_row")),
        *((name, ctypes.c_int64) for name in ("w_turned", "gradient_turned", "parts", "threads")),
        ("scale", ctypes.c_float),
    )


def narrow(z_MC: Tensor, w_CR: Tensor, low_MR: Tensor, *, scale: float = 1.0) -> None:
    """low = scale z w. Matrices as `matmul.multiply` takes them; rows of z and low lie in memory without gaps."""
    if _by_tiles(z_MC):
        thin_(z_MC, w_CR, low_MR, None, None, _room(z_MC, low_MR, sums=False), scale)
    else:
        multiply(z_MC, w_CR, low_MR, scale=scale)


def gradient(given_MR: Tensor, z_MC: Tensor, to_RC: Tensor) -> None:
    """given^T z."""
    if _by_tiles(z_MC):
        thin_(z_MC, None, None, given_MR, to_RC, _room(z_MC, given_MR), 1.0)
    else:
        multiply(given_MR.t(), z_MC, to_RC)


def narrow_and_gradient(
    z_MC: Tensor, w_CR: Tensor, low_MR: Tensor, given_MR: Tensor, to_RC: Tensor, *, scale: float = 1.0
) -> None:
    """Both."""
    if _by_tiles(z_MC):
        thin_(z_MC, w_CR, low_MR, given_MR, to_RC, _room(z_MC, low_MR), scale)
    else:
        multiply(z_MC, w_CR, low_MR, scale=scale)
        multiply(given_MR.t(), z_MC, to_RC)


def _by_tiles(z_MC: Tensor) -> bool:
    return has_tiles() and z_MC.shape[0] >= _LEAST_ROWS


def _parts(rows: int, *, sums: bool) -> int:
    return min(-(-rows // _ROWS), _MOST_PARTS) if sums else -(-rows // _ROWS_ALONE)


def _room(z_MC: Tensor, low_MR: Tensor, *, sums: bool = True) -> Tensor | None:
    return room_of(z_MC, _room_bytes(*z_MC.shape, low_MR.shape[1], sums, torch.get_num_threads()))


@functools.lru_cache(maxsize=4096)
def _room_bytes(rows: int, columns: int, rank: int, sums: bool, threads: int) -> int:
    loaded = products_library()
    assert loaded is not None  # `has_tiles` asked it
    loaded.thin_room.restype = ctypes.c_int64
    sizes = _Pass(
        given=1 if sums else None, rows=rows, columns=columns, rank=rank, parts=_parts(rows, sums=sums), threads=threads
    )
    return int(loaded.thin_room(ctypes.byref(sizes)))


def _thin(
    z: Tensor, w: Tensor | None, low: Tensor | None, given: Tensor | None, to: Tensor | None, room: Tensor | None, scale: float
) -> None:
    loaded = products_library()
    if loaded is None or not has_tiles():
        raise RuntimeError("sartor::thin_ has to be compiled for a processor with AMX")
    matrices = z, w, given, low, to
    places = (None if matrix is None else matrix.data_ptr() for matrix in matrices)
    rows = (0 if matrix is None else max(matrix.stride()) for matrix in matrices)
    turned = (matrix is not None and matrix.stride(1) != 1 for matrix in (w, to))
    rank = low.shape[1] if given is None else given.shape[1]  # type: ignore[union-attr]
    one = _Pass(
        *places, *z.shape, rank, *rows, *turned, _parts(z.shape[0], sums=given is not None), torch.get_num_threads(), scale
    )
    size = _room_bytes(*z.shape, rank, given is not None, torch.get_num_threads())
    call(loaded.thin, one, room, size, *matrices)


thin_ = Operator(
    "thin_(Tensor z, Tensor? w, Tensor(a!)? low, Tensor? given, Tensor(b!)? to, Tensor(c!)? room, float scale) -> ()",
    _thin,
    lambda *_: None,
)
