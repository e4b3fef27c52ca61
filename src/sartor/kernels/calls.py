"""Compiled loops that wait for each other and then run one after the other in one call.

A loop over more than the caches hold leaves nothing there of the interpreter, and what Python does before the next one takes ten
times as long as it would: 0.2 to 0.3 ms instead of 0.02 on two cores of a Xeon. So a function that calls several gets all of them
ready first.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from sartor.kernels.native import library, listened_to


class _Call(ctypes.Structure):
    """`struct call` of native.cpp."""

    _fields_ = (("run", ctypes.c_void_p), ("of", ctypes.c_void_p))


class _Waiting(threading.local):
    """What waits in this thread; no list where nothing does."""

    calls: list[tuple[Any, Any, tuple[Any, ...]]] | None = None
    room_bytes: int | None = None


_waiting = _Waiting()


class in_one_call:  # noqa: N801 - reads as a statement
    """Within it, loops that are called by `call` wait, and run at its end: until then their results are not there. Memory that
    they work in is allocated then, as `like` is, once for all. Nothing runs where an exception leaves it. Within
    another one it is a part of that."""

    def __init__(self, like: Tensor | None = None, *, when: bool = True) -> None:
        self._like, self._when = like, when

    def __enter__(self) -> None:
        self._when = self._when and _waiting.room_bytes is None
        if self._when:
            _waiting.calls = None if listened_to() else []
            _waiting.room_bytes = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._when:
            return
        calls, size = _waiting.calls, _waiting.room_bytes
        _waiting.calls, _waiting.room_bytes = None, None
        if kind is not None:
            return
        room = self._like.new_empty(size, dtype=torch.uint8) if size and self._like is not None else None
        if calls:
            _run(calls, room)


def room_of(like: Tensor, size_bytes: int) -> Tensor | None:
    """Memory for a loop to work in; None within `in_one_call`, which allocates it."""
    if _waiting.room_bytes is None:
        return like.new_empty(size_bytes, dtype=torch.uint8)
    _waiting.room_bytes = max(_waiting.room_bytes, size_bytes)
    return None


def call(function: Any, of: ctypes.Structure, room: Tensor | None, size_bytes: int, *used: Any) -> None:
    """`function(&of, room)`, now or with others, for which `used` is kept; `size_bytes` of room where none is given."""
    if _waiting.calls is not None:
        _waiting.room_bytes = max(_waiting.room_bytes or 0, size_bytes)
        _waiting.calls.append((function, of, used))
        return
    if room is None:
        room = torch.empty(size_bytes, dtype=torch.uint8)
    function(ctypes.byref(of), ctypes.c_void_p(room.data_ptr()))


def _run(calls: list[tuple[Any, Any, tuple[Any, ...]]], room: Tensor | None) -> None:
    loaded = library()
    assert loaded is not None  # what waits is compiled
    each = (_Call * len(calls))(*(_Call(*map(ctypes.addressof, one[:2])) for one in calls))
    loaded.run_calls(each, len(calls), None if room is None else room.data_ptr())
