"""The C++ sources beside this file, compiled on the machine that runs it: with this machine's instructions, once, in about a
second.

Without a C++ compiler the callers take their way through PyTorch's operators; `missing` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sartor.folders import cache_folder

HEADER, *SOURCES = (Path(__file__).with_name(name) for name in ("native.h", "native.cpp", "fused.cpp"))
_PARTS = "native.h", "tile.h", "problem.h", "pairs.h", "amx.h", "attention.h", "attention_tiles.h"
_TILES = tuple(Path(__file__).with_name(name) for name in _PARTS)
_PRODUCTS = tuple(Path(__file__).with_name(f"{name}.cpp") for name in ("attention", "floats", "lora", "matmul", "thin"))

_COMMON = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
)
# Not every compiler knows the machine it runs on, or has OpenMP (Apple's has not); a plain loop is right as well, only slower.
# GCC takes half of a Xeon's vectors by itself.
_CHOICES = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    ("-march=native",),
    (),
)
_SECONDS = 300
_OPERATORS = torch.library.Library("sartor", "FRAGMENT")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be compiled."""
    loaded = compiled("native", SOURCES, (HEADER,), flags=("-fno-exceptions",))
    if loaded is not None:
        _declare(loaded)
    return loaded


@functools.cache
def products_library() -> ctypes.CDLL | None:
    """The compiled loops with small products in them, or None where they cannot be compiled. Products may be fused with sums."""
    return compiled("products", _PRODUCTS, _TILES, flags=("-fno-exceptions", "-ffp-contract=fast"))


def compiled(
    name: str, sources: Sequence[Path], headers: Sequence[Path] = (), *, flags: Sequence[str] = (), links: Sequence[str] = ()
) -> ctypes.CDLL | None:
    """A shared library of these sources, from the cache if it is there; None where it cannot be compiled or loaded."""
    compiler = _compiler()
    place = _folder()
    if compiler is None or place is None:
        return None
    said = (compiler, *_COMMON, *flags, *links, str(_CHOICES))
    parts = (*(file.read_bytes() for file in (*headers, *sources)), *map(str.encode, said), _processor())
    file = place / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    try:
        if not file.exists() and not _compile([compiler, *_COMMON, *flags], sources, links, file):
            return None
        return ctypes.CDLL(str(file))
    except OSError:
        return None


def missing() -> str:
    """Why the loops run on PyTorch's operators, or nothing."""
    if library() is not None:
        return ""
    if _compiler() is None:
        return "there is no C++ compiler (c++, g++, clang++, or $CXX)"
    return f"{_compiler()} could not compile them"


def _compiler() -> str | None:
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def _folder() -> Path | None:
    """None where nothing can be written."""
    place = cache_folder("kernels")
    if place is None:
        return None
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place


def _processor() -> bytes:
    """What tells processors apart: a folder may be shared by several machines."""
    lines: list[bytes] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    flags = next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")
    return platform.machine().encode() + platform.processor().encode() + flags


def _compile(command: Sequence[str], sources: Sequence[Path], links: Sequence[str], file: Path) -> bool:
    """Compile to `file`, whole or not at all. Where another process was first, its file stays: all have the same loops."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / "made.so"
        for more in _CHOICES:
            if _built([*command, *more], sources, links, made):
                _put(made, file)
                return True
    return False


def _built(command: Sequence[str], sources: Sequence[Path], links: Sequence[str], made: Path) -> bool:
    """All sources at once, since each takes seconds, then the library of them."""

    def succeeds(*arguments: str) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return subprocess.run([*command, *arguments], capture_output=True, timeout=_SECONDS, check=False).returncode == 0
        return False

    objects = [str(made.with_name(f"{source.stem}.o")) for source in sources]
    with ThreadPoolExecutor(max_workers=len(sources)) as pool:
        each = [pool.submit(succeeds, "-c", str(source), "-o", one) for source, one in zip(sources, objects, strict=True)]
    return all(one.result() for one in each) and succeeds("-o", str(made), *objects, *links)


def _put(made: Path, file: Path) -> None:
    try:
        os.link(made, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        made.replace(file)


class Operator:
    """A PyTorch operator `sartor::…`, which fake tensors go through by `shapes` and real ones by `implementation`: these without
    PyTorch's dispatcher, which takes longer than a small product, where nothing listens to it.

    `torch.library.custom_op` does the same and loads PyTorch's compiler on the first call, which takes seconds.
    """

    def __init__(self, schema: str, implementation: Callable[..., Any], shapes: Callable[..., Any]) -> None:
        name = schema.partition("(")[0]
        _OPERATORS.define(schema)
        _OPERATORS.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sartor::{name}", shapes, lib=_OPERATORS)
        self.overload = getattr(torch.ops.sartor, name).default
        """As PyTorch's dispatch modes see it."""
        self._implementation = implementation

    def __call__(self, first: Any, *others: Any) -> Any:
        if type(first) in PLAIN and not first.is_meta and not listened_to():
            return self._implementation(first, *others)
        return self.overload(first, *others)


def listened_to() -> bool:
    """Whether something is to see every operator: a dispatch mode, or PyTorch's profiler."""
    return bool(torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


PLAIN = (torch.Tensor, torch.nn.Parameter)
"""What tensors are where nothing wraps them."""


class _Unkept:
    """Where nothing is kept for backward."""

    def save_for_backward(self, *_: Any) -> None: ...


class _Forward(threading.local):
    """Whether this thread is in the forward pass of a function that autograd records as one."""

    recorded = False


_forward = _Forward()


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or its forward alone where no gradients are wanted: most of what a small call would take is PyTorch's."""
    if not torch.is_grad_enabled():
        return function.forward(_Unkept(), *arguments)
    _forward.recorded = True
    try:
        return function.apply(*arguments)
    finally:
        _forward.recorded = False


def is_recorded() -> bool:
    """Whether what is computed now is a forward pass that autograd records, operator by operator or as part of a function."""
    return torch.is_grad_enabled() or _forward.recorded


def is_computed_again() -> bool:
    """Whether it is recorded within a backward pass, which wants what it keeps and not what it makes."""
    return torch._C._current_graph_task_id() >= 0 and is_recorded()


class _Kept(torch.autograd.Function):
    """Nothing, but for what it keeps."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()


def keep(*tensors: torch.Tensor | None) -> Any:
    """What has `tensors` as `saved_tensors`, within a forward pass. Recomputation ends here, by an exception, if it wants nothing
    else: autograd itself asks what a function keeps when it has made its result."""
    with torch.enable_grad():
        return _Kept.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn  # type: ignore[no-untyped-call]


def _declare(loaded: ctypes.CDLL) -> None:
    at, many, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for kind in ("bf16", "f32"):
        _set(loaded, f"cross_entropy_{kind}", (at, many, many, many, at, at, real, real, real, flag), flag)
        _set(loaded, f"causal_softmax_{kind}", (at, many, many, many, many, many, flag), flag)
        _set(loaded, f"softmax_backward_{kind}", (at, at, many, many, flag))
    _set(loaded, "add_bf16", (at, at, many, flag))
    _set(loaded, "block", (), many)
    _set(loaded, "run_calls", (at, many, at))


def _set(loaded: ctypes.CDLL, name: str, arguments: tuple[type, ...], result: type | None = None) -> None:
    function = getattr(loaded, name)
    function.argtypes, function.restype = arguments, result
