"""Machines that are not here: devices and nodes by name, from `catalogue.yaml` and from files of the user's own.

Published totals and peaks, each with its source; nothing in here is measured on the machine named. The page docs/machines.md
is printed from the catalogue: `python -m sartor.machine.catalogue > docs/machines.md`.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sartor.errors import JobError
from sartor.job.units import parse_bytes

USER_FILE_VARIABLE = "SARTOR_MACHINES"
KINDS = ("cuda", "hip", "hpu", "neuron", "cpu", "mps")
DTYPES = ("float32", "tf32", "bfloat16", "float16", "fp8", "int8")
_T = TypeVar("_T")
_BUILT_IN = Path(__file__).with_name("catalogue.yaml")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a figure comes from. Not `verified`: well known, but no page with it was read when the entry was written."""

    title: str
    verified: bool = True


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """A kind of device as one process drives it. Figures that nobody published are None, rates are left out."""

    name: str
    kind: str
    """One of KINDS; `hip` is torch's `cuda` on ROCm."""
    vendor_name: str
    """As torch or the driver names it."""
    memory_bytes: int
    """The total that a process sees; the size as sold where `memory_is_nominal`."""
    memory_is_nominal: bool = False
    unified_memory: bool = False
    """The device's memory is the host's."""
    memory_bandwidth_bytes_per_second: int | None = None
    host_memory_bandwidth_bytes_per_second: int | None = None
    """Of the slower memory beside it, where that belongs to the device (a CPU with HBM)."""
    peak_flops_per_second: Mapping[str, float] = field(default_factory=dict)
    """By DTYPES: dense, matrix units, float32 accumulation."""
    host_link_bytes_per_second: int | None = None
    """One direction."""
    peer_link_bytes_per_second: int | None = None
    """One direction, all links to other devices of the node together."""
    matmul_efficiency: float | None = None
    """Share of the bfloat16 peak that the best large matrix product reached."""
    training_efficiency: float | None = None
    """Share of the peak that published training runs reached, recomputation counted as work: the median of the source's runs."""
    sm: int | None = None
    """CUDA compute capability, 90 for 9.0."""
    tdp_watts: float | None = None
    price_usd_per_hour: float | None = None
    price_date: str | None = None
    devices_per_package: int = 1
    """Devices on one card or chip as sold."""
    note: str = ""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """By field."""


@dataclass(frozen=True, kw_only=True)
class MachineModel:
    """`nodes` equal nodes of `devices_per_node` equal devices. Host memory, network and price are those of one node."""

    name: str
    nodes: int
    devices_per_node: int
    device: DeviceModel
    host_memory_bytes: int | None = None
    network_bytes_per_second: int | None = None
    """One direction."""
    node_price_usd_per_hour: float | None = None
    """Of the node as it is rented; where devices were asked for (`8xA100-80GB`), of the devices one by one."""
    price_date: str | None = None
    note: str = ""
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return self.nodes * self.devices_per_node

    @property
    def price_usd_per_hour(self) -> float | None:
        """Of all nodes."""
        return None if self.node_price_usd_per_hour is None else self.nodes * self.node_price_usd_per_hour


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What is known, by name as written; `index` finds a name however it is written."""

    devices: Mapping[str, DeviceModel]
    machines: Mapping[str, MachineModel]
    aliases: Mapping[str, str]
    index: Mapping[str, str]

    def find(self, name: str) -> DeviceModel | MachineModel | str | None:
        """A device, a machine, or what an alias stands for."""
        known = self.index.get(_key(name), "")
        return self.aliases.get(known) or self.machines.get(known) or self.devices.get(known)


def lookup(name: str, *, user_file: Path | None = None) -> MachineModel:
    """The machine of that name: a device (`L40S-48GB`), several (`8xA100-80GB`), nodes x devices (`4x8xH100-80GB`), a machine
    of the catalogue (`trn1.32xlarge`), several of them (`4xp5.48xlarge`), or an alias. Case and separators do not matter.

    `user_file`, else the file named by $SARTOR_MACHINES, adds to the catalogue and wins over it.
    Raises JobError for a name that is not known and for a file that is not right.
    """
    catalogue = load(user_file)
    counts, found = _resolve(name, catalogue)
    if 0 in counts:
        raise JobError(f"machine {name!r} has none of something", remedy="counts from 1, such as `8xA100-80GB`")
    if isinstance(found, DeviceModel):
        return _of_devices(found, nodes=counts[0] if len(counts) == 2 else 1, per_node=counts[-1] if counts else 1)
    if len(counts) == 2:
        raise JobError(
            f"machine {name!r} gives two counts", why=f"{found.name} is a whole node", remedy=f"`{counts[0]}x{found.name}`"
        )
    nodes = counts[0] if counts else 1
    return dataclasses.replace(found, nodes=nodes, name=found.name if nodes == 1 else f"{nodes}x{found.name}")


def load(user_file: Path | None = None) -> Catalogue:
    """The built-in catalogue, with the user's file on top where there is one. Raises JobError for a file that is not right."""
    if user_file is None and os.environ.get(USER_FILE_VARIABLE):
        user_file = Path(os.environ[USER_FILE_VARIABLE])
    return _built_in() if user_file is None else _read(user_file.expanduser(), _built_in())


@cache
def _built_in() -> Catalogue:
    return _read(_BUILT_IN, Catalogue(devices={}, machines={}, aliases={}, index={}))


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COUNT = re.compile(r"\s*(\d+)\s*[x×*]\s*(.+)", re.IGNORECASE | re.DOTALL)


def _key(name: str) -> str:
    """A name without what does not tell names apart."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _split(name: str, catalogue: Catalogue) -> tuple[list[int], DeviceModel | MachineModel | str]:
    """Leading counts (two at most) and what they count. Raises JobError where that is not known."""
    counts: list[int] = []
    rest = name
    while (found := catalogue.find(rest)) is None:
        match = _COUNT.fullmatch(rest)
        if not match or len(counts) == 2:
            raise _unknown(name, rest, catalogue)
        counts.append(int(match[1]))
        rest = match[2]
    return counts, found


def _resolve(name: str, catalogue: Catalogue, depth: int = 0) -> tuple[list[int], DeviceModel | MachineModel]:
    """As `_split`, with what an alias stands for in its place; the alias's count multiplies the last one."""
    counts, found = _split(name, catalogue)
    if not isinstance(found, str):
        return counts, found
    if depth > len(catalogue.aliases):
        raise JobError(f"alias {name!r} stands for itself", remedy="the name of a device or a machine")
    inner, model = _resolve(found, catalogue, depth + 1)
    return ([*counts[:-1], (counts or [1])[-1] * inner[0]] if len(inner) == 1 else counts or inner), model


def _unknown(name: str, rest: str, catalogue: Catalogue) -> JobError:
    near = difflib.get_close_matches(_key(rest), catalogue.index, n=8, cutoff=0.6)
    names = list(dict.fromkeys(catalogue.index[key] for key in near))[:3] or ["8xA100-80GB", "RTX4090-24GB", "p5.48xlarge"]
    return JobError(
        f"machine {name!r} is not known",
        why=f"no device, machine or alias is called {rest!r}" if rest != name else "",
        remedy=f"{' or '.join(names)}; docs/machines.md lists all names and says how to add your own",
    )


def _of_devices(device: DeviceModel, *, nodes: int, per_node: int) -> MachineModel:
    counts = [nodes, per_node] if nodes > 1 else [per_node] if per_node > 1 else []
    return MachineModel(
        name="x".join([*map(str, counts), device.name]),
        nodes=nodes,
        devices_per_node=per_node,
        device=device,
        node_price_usd_per_hour=None if device.price_usd_per_hour is None else per_node * device.price_usd_per_hour,
        price_date=device.price_date,
        note=device.note,
    )


def _read(path: Path, below: Catalogue) -> Catalogue:
    """The catalogue in the file on top of another one. Raises JobError naming file and entry."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"machine file {path} cannot be read", why=str(error)) from error
    top = _Entry(str(path), {} if content is None else content)
    top.only("sources", "devices", "machines", "aliases")
    top.mapping("sources")
    devices = {name: _device(f"{path}: devices: {name}", name, raw) for name, raw in top.mapping("devices").items()}
    known = {**below.devices, **devices}
    machines = {name: _machine(f"{path}: machines: {name}", name, raw, known) for name, raw in top.mapping("machines").items()}
    aliases = {name: str(target) for name, target in top.mapping("aliases").items()}
    index: dict[str, str] = {}
    for name in [*devices, *machines, *aliases]:
        if not _key(name) or index.setdefault(_key(name), name) != name:
            raise JobError(f"{path}: {name!r} cannot be told from {index.get(_key(name), 'nothing')!r}", remedy="another name")
    vendors = [device.vendor_name for device in known.values()]
    torch_names = {_key(device.vendor_name): name for name, device in known.items() if vendors.count(device.vendor_name) == 1}
    kept = {name: model for name, model in below.machines.items() if _key(name) not in index}
    catalogue = Catalogue(
        devices=known,
        machines={name: dataclasses.replace(kept[name], device=known[kept[name].device.name]) for name in kept} | machines,
        aliases={name: target for name, target in below.aliases.items() if _key(name) not in index} | aliases,
        index={**torch_names, **below.index, **index},
    )
    for name, target in catalogue.aliases.items():
        if len(_resolve(target, catalogue)[0]) > 1:
            raise JobError(f"{path}: alias {name!r} stands for {target!r}", remedy="one name, with one count at most")
    return catalogue


class _Entry:
    """A mapping of the file, read strictly. Collects the sources of its figures, by the field they go to."""

    def __init__(self, where: str, raw: object) -> None:
        self.where = where
        self.sources: dict[str, Source] = {}
        if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
            raise self.wrong(f"should be a mapping of names, not {raw!r}")
        self.raw: dict[str, Any] = raw

    def wrong(self, what: str, remedy: str = "docs/machines.md shows an entry") -> JobError:
        return JobError(f"{self.where}: {what}", remedy=remedy)

    def only(self, *known: str) -> None:
        for key in self.raw:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise self.wrong(
                    f"unknown field {key!r}", f"did you mean `{near[0]}`?" if near else f"fields: {', '.join(known)}"
                )

    def mapping(self, name: str) -> dict[str, Any]:
        return _Entry(f"{self.where}: {name}", self.raw.get(name) or {}).raw

    def value(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.raw.get(name, default)
        if value is None:
            raise self.wrong(f"`{name}` is missing")
        if not isinstance(value, kind) or isinstance(value, bool) > (kind is bool) or (value == "" and default is None):
            raise self.wrong(f"`{name}` should be a {kind.__name__}, not {value!r}")
        return value

    def figures(self, readers: Mapping[str, Callable[[Any], Any]], required: str) -> dict[str, Any]:
        """Fields and values of the figures there are, with what comes along: `nominal` of the memory, `date` of the price."""
        values: dict[str, Any] = {}
        for name, read in readers.items():
            if name not in self.raw:
                continue
            extra = "nominal" if name == "memory_bytes" else "date" if "price" in name else "value"
            figure = _Entry(f"{self.where}: {name}", self.raw[name])
            figure.only("value", "source", "verified", extra)
            if "value" not in figure.raw:
                raise figure.wrong("`value` is missing")
            self.sources[name] = Source(title=figure.value("source", str), verified=figure.value("verified", bool, True))
            try:
                values[name] = read(figure.raw["value"])
                values |= {"price_date": _date(figure.raw.get("date"))} if extra == "date" else {}
            except (ValueError, TypeError) as error:
                raise figure.wrong(f"{figure.raw['value']!r} is not right: {error}") from None
            values |= {"memory_is_nominal": figure.value("nominal", bool, False)} if extra == "nominal" else {}
        if required not in values:
            raise self.wrong(f"`{required}` is missing")
        return values


def _device(where: str, name: str, raw: object) -> DeviceModel:
    entry = _Entry(where, raw)
    entry.only("kind", "vendor_name", "note", "devices_per_package", "unified_memory", *_DEVICE_FIGURES)
    if entry.value("kind", str) not in KINDS:
        raise entry.wrong(f"kind {entry.raw['kind']!r} is not known", f"one of: {', '.join(KINDS)}")
    return DeviceModel(
        name=name,
        kind=entry.value("kind", str),
        vendor_name=entry.value("vendor_name", str),
        unified_memory=entry.value("unified_memory", bool, False),
        devices_per_package=max(entry.value("devices_per_package", int, 1), 1),
        note=entry.value("note", str, ""),
        sources=entry.sources,
        **entry.figures(_DEVICE_FIGURES, "memory_bytes"),
    )


def _machine(where: str, name: str, raw: object, devices: Mapping[str, DeviceModel]) -> MachineModel:
    entry = _Entry(where, raw)
    entry.only("device", "note", *_MACHINE_FIGURES)
    device = entry.value("device", str)
    if device not in devices:
        near = difflib.get_close_matches(device, devices, n=1)
        raise entry.wrong(
            f"device {device!r} is not known", f"did you mean `{near[0]}`?" if near else "its name as in docs/machines.md"
        )
    return MachineModel(
        name=name,
        nodes=1,
        device=devices[device],
        note=entry.value("note", str, ""),
        sources=entry.sources,
        **entry.figures(_MACHINE_FIGURES, "devices_per_node"),
    )


def _date(value: Any) -> str:
    text = value.isoformat() if isinstance(value, datetime.date) else str(value)
    if not re.fullmatch(r"\d{4}-\d\d(-\d\d)?", text):
        raise ValueError("a price needs the `date` it was read, such as 2026-09-25")
    return text


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("not a positive number")
    return float(value)


def _share(value: Any) -> float:
    if not _positive(value) <= 1:
        raise ValueError("not a share between 0 and 1")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("not a whole number from 1")
    return value


def _bytes(value: Any) -> int:
    return _count(parse_bytes(re.sub(r"/s$", "", value) if isinstance(value, str) else value))


def _rates(value: Any) -> Mapping[str, float]:
    """`{float32: 19.5T}`: T is 10^12 operations a second."""
    rates = {}
    for dtype, rate in dict(value).items():
        match = re.fullmatch(r"(\d+(?:\.\d+)?)T", str(rate))
        if dtype not in DTYPES or not match:
            raise ValueError(f"{dtype}: {rate}; should be like {{bfloat16: 312T}}, with any of {', '.join(DTYPES)}")
        rates[dtype] = float(match[1]) * 1e12
    return rates


_DEVICE_FIGURES: dict[str, Callable[[Any], Any]] = {
    "memory_bytes": _bytes,
    "memory_bandwidth_bytes_per_second": _bytes,
    "host_memory_bandwidth_bytes_per_second": _bytes,
    "peak_flops_per_second": _rates,
    "host_link_bytes_per_second": _bytes,
    "peer_link_bytes_per_second": _bytes,
    "matmul_efficiency": _share,
    "training_efficiency": _share,
    "sm": _count,
    "tdp_watts": _positive,
    "price_usd_per_hour": _positive,
}
_MACHINE_FIGURES: dict[str, Callable[[Any], Any]] = {
    "devices_per_node": _count,
    "host_memory_bytes": _bytes,
    "network_bytes_per_second": _bytes,
    "node_price_usd_per_hour": _positive,
}


if __name__ == "__main__":
    from sartor.machine.catalogue_page import page

    print(page(), end="")
