"""Rates measured on this machine, and the file that keeps them: one per processor, cores, threads, device and PyTorch version.

A calibration is never required: without one a forecast of time has the published figures of the catalogue, or says that it
has none. `sartor machine --calibrate` measures (`calibrate.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch

from sartor.errors import writing
from sartor.folders import cache_folder

if TYPE_CHECKING:
    from sartor.machine.probe import Machine

CALIBRATION_VERSION = 10
"""Of the file; raised when what a measurement means changes, or its speed. Files of other versions are not read."""


@dataclass(frozen=True, kw_only=True)
class MatmulRate:
    """A product of m x k by k x n, `batch` times, into memory that was there before."""

    dtype: str
    """As torch names it: float32, bfloat16, float16, int8."""
    form: str
    """Of a linear layer: `nt` its forward (weights n x k), `nn` the gradient of its input, `tn` the gradient of its weights;
    `compiled nt` … by Sartor's own loops."""
    batch: int
    m: int
    n: int
    k: int
    flops_per_second: float
    """2 x batch x m x n x k in a second."""


@dataclass(frozen=True, kw_only=True)
class MemoryRate:
    """An operator that is limited by memory, or by what it computes for each element; operands stay the same in all repeats."""

    kind: str
    """add, copy, cast (to the other format), exp, silu, tanh, bernoulli, masked_fill, softmax (rows of 1024), layer_norm (rows
    of 1024), sum, gather (rows)."""
    dtype: str
    """Of the input."""
    total_bytes: int
    """Read and written by one call."""
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class AttentionRate:
    """`scaled_dot_product_attention` over batch x heads x length x head_size, or Sartor's attention of short examples."""

    dtype: str
    form: str
    """`causal` (no mask given), `masked` (a dense mask), or `examples` (Sartor's)."""
    batch: int
    heads: int
    length: int
    head_size: int
    forward_flops_per_second: float
    """4 x batch x heads x length^2 x head_size in a second, as `torch.utils.flop_counter` counts: with what a mask spares."""
    backward_flops_per_second: float
    """10 x batch x heads x length^2 x head_size."""


@dataclass(frozen=True, kw_only=True)
class LossRate:
    """Cross-entropy over rows x vocabulary logits."""

    dtype: str
    rows: int
    vocabulary: int
    forward_elements_per_second: float
    backward_elements_per_second: float


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What one device computes in a second."""

    matmul: tuple[MatmulRate, ...]
    memory: tuple[MemoryRate, ...]
    attention: tuple[AttentionRate, ...]
    loss: tuple[LossRate, ...]
    operator_seconds: float
    """A tiny operator from Python, gradients off."""
    recorded_operator_seconds: float
    """The same, recorded for backward."""
    backward_operator_seconds: float
    """Its backward."""
    view_seconds: float
    """A view from Python, recorded for backward."""
    view_backward_seconds: float
    """Its backward."""
    block_operator_seconds: float
    """An operator among those of a small decoder's blocks: what the Python and the modules around it take, and that it finds
    caches and cores less ready than when it runs again and again."""
    block_backward_operator_seconds: float
    """The same in backward, with what it takes to add up gradients and to forget the graph."""
    compiled_block_operator_seconds: float | None
    """An operator of such blocks as Sartor's compiled kernels leave them: fewer of them, with as much Python and as many modules
    around. None where they were not measured."""
    compiled_block_backward_operator_seconds: float | None
    """The same in backward."""
    adamw_parameters_per_second: float
    """Fused AdamW, float32, one large tensor."""
    adamw_tensor_seconds: float
    """Of each of many small tensors."""
    first_touch_bytes_per_second: float | None
    """Bytes of new memory that the system hands out in a second, beyond the time of writing to them. None on accelerators,
    whose memory is kept by PyTorch's allocator."""


@dataclass(frozen=True, kw_only=True)
class DiskRate:
    """A file written and read from its start to its end."""

    folder: str
    direct: bool
    """Past the system's page cache; otherwise written through to the disk, and read after the cache was asked to forget it."""
    total_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class LinkRate:
    """Between page-locked main memory and an accelerator."""

    to_device_bytes_per_second: float
    to_host_bytes_per_second: float
    both_ways_bytes_per_second: float
    """Both directions together, at once."""


@dataclass(frozen=True, kw_only=True)
class CollectiveRate:
    """Time of a collective over `ranks`: alpha + bytes / beta, where bytes are those of the whole tensor."""

    name: str
    """all_reduce, all_gather, reduce_scatter, broadcast."""
    backend: str
    ranks: int
    alpha_seconds: float
    beta_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured rates of the device that computes and of what is around it."""

    version: int
    key: str
    """What they hold for: processor, cores, threads, device, PyTorch."""
    measured: str
    """The day, such as 2026-11-21."""
    seconds: float
    """What measuring took."""
    device: DeviceRates
    """Of the device that computes, with all threads of a job."""
    host: DeviceRates | None = None
    """Of the processor, where that is not the device."""
    disk: DiskRate | None = None
    link: LinkRate | None = None
    collectives: tuple[CollectiveRate, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain nested mappings, as the file and `sartor machine --json` hold them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What was found of an earlier calibration: the calibration, or the reason why there is none."""

    path: Path | None
    calibration: Calibration | None = None
    reason: str = ""


def calibration_key(machine: Machine) -> str:
    """What rates depend on, in words."""
    parts = [machine.cpu_name, f"{machine.cores} cores", f"{machine.threads} threads", f"torch {torch.__version__}"]
    if machine.device.kind != "cpu":
        parts.append(machine.device.name)
    return ", ".join(parts)


def find_calibration(machine: Machine) -> Kept:
    """The calibration kept for this machine, or why there is none; damaged files are told, never raised."""
    if machine.elsewhere:
        return Kept(path=None, reason=f"{machine.elsewhere} is not this machine: its rates are the published ones")
    key = calibration_key(machine)
    path = _path(key)
    if path is None:
        return Kept(path=None, reason="there is no folder to keep one in: set SARTOR_CACHE")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Kept(path=path, reason="not measured yet")
    except (OSError, ValueError) as error:
        return Kept(path=path, reason=f"the file {path} cannot be read ({error}); measure again")
    try:
        version = content["version"] if isinstance(content, dict) else None
        if version != CALIBRATION_VERSION:
            return Kept(path=path, reason=f"measured by another version of Sartor (file version {version}); measure again")
        calibration: Calibration = _read(Calibration, content)
    except (KeyError, TypeError, ValueError) as error:
        return Kept(path=path, reason=f"the file {path} is damaged ({error}); measure again")
    if calibration.key != key:
        return Kept(path=path, reason=f"the file {path} is of another machine ({calibration.key}); measure again")
    return Kept(path=path, calibration=calibration)


def load_calibration(machine: Machine) -> Calibration | None:
    """The calibration kept for this machine; None where there is none that can be used (`find_calibration` says why)."""
    return find_calibration(machine).calibration


def save_calibration(calibration: Calibration) -> Path | None:
    """Keep it for `load_calibration`, whole or not at all; None where there is no folder. Raises UsageError where it cannot."""
    path = _path(calibration.key)
    if path is None:
        return None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(calibration.to_mapping(), indent=1), encoding="utf-8")
        partial.replace(path)
    return path


def _path(key: str) -> Path | None:
    folder = cache_folder("machines")
    return None if folder is None else folder / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any) -> Any:
    """`value` as a value of `kind`, strictly. Raises ValueError, TypeError or KeyError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping) or set(value) != {field.name for field in dataclasses.fields(kind)}:
            raise ValueError(f"not the fields of {kind.__name__}")
        return kind(**{name: _read(_hints(kind)[name], item) for name, item in value.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"a list was expected, not {value!r}")
        return tuple(_read(get_args(kind)[0], item) for item in value)
    if isinstance(kind, UnionType):
        (inner,) = (arg for arg in get_args(kind) if arg is not NoneType)
        return None if value is None else _read(inner, value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{value!r} is neither a rate nor a time")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{value!r} is not a {kind.__name__}")
    return value
