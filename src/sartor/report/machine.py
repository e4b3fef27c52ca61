"""A machine on the terminal and as JSON: what it is, what of it is published, what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sartor.job.units import format_bytes, format_seconds
from sartor.machine import Machine
from sartor.machine.calibration import AttentionRate, Calibration, DeviceRates, Kept, MatmulRate, MemoryRate
from sartor.machine.topology import Cache, Topology
from sartor.report import facts
from sartor.report.terminal import _print, _table

MACHINE_SCHEMA_VERSION = 1
"""Of `sartor machine --json`; raised when a key changes its meaning or goes."""
_DTYPES = ("float32", "bfloat16", "float16", "int8")


def machine_mapping(machine: Machine, kept: Kept | None = None) -> dict[str, Any]:
    """What `sartor machine --json` prints: plain nested mappings."""
    calibration = kept.calibration.to_mapping() if kept and kept.calibration else None
    reason = kept.reason if kept else ""
    tree = dataclasses.asdict(machine)
    return {"schema_version": MACHINE_SCHEMA_VERSION, "machine": tree, "calibration": calibration, "calibration_missing": reason}


def show_machine(machine: Machine, console: Console, kept: Kept | None = None) -> None:
    """What this machine is, which part of it a job would use, and the rates that forecasts of time are made with."""
    rows: list[tuple[str, RenderableType]] = [(name, Text(value)) for name, value in _facts(machine)]
    rows += [(name, Text(facts.visible(words))) for name, words in _published(machine)]
    if kept is not None and kept.calibration is None:
        hint = "" if machine.elsewhere else "; `sartor machine --calibrate` takes about half a minute"
        rows.append(("rates", Text(facts.visible(kept.reason + hint), style="yellow")))
    _print(console, Text("Machine" if not machine.elsewhere else f"Machine {machine.elsewhere}", style="bold"), _table(rows))
    if kept is not None and kept.calibration is not None:
        show_calibration(kept.calibration, console)


def show_calibration(calibration: Calibration, console: Console) -> None:
    """Measured rates at a glance; the whole list is in the file and in the JSON."""
    took = f"measured {calibration.measured} in {format_seconds(calibration.seconds)}"
    _print(console, Text.assemble(("Rates", "bold"), f" {took}: {facts.visible(calibration.key)}"), _around(calibration))
    for name, rates in (("", calibration.device), ("processor: ", calibration.host)):
        if rates is not None:
            _print(console, Text(f"{name}matrix products, GFLOP/s", style="bold"), _matmul(rates.matmul))
            _print(console, Text(f"{name}operators on memory, GB/s read and written", style="bold"), _memory(rates.memory))
            _print(console, Text(f"{name}attention, GFLOP/s forward / backward", style="bold"), _attention(rates.attention))


def _facts(machine: Machine) -> list[tuple[str, str]]:
    """`facts.machine_facts`, with what only this page has room for in its place among them."""
    named = facts.machine_facts(machine) if not machine.elsewhere else _elsewhere(machine)
    more: list[tuple[str, str]] = []
    if machine.topology is not None:
        more += _topology_facts(machine.topology)
    for disk in machine.disks:
        kind = ", ".join(word for word in (disk.filesystem, disk.kind) if word)
        sizes = f"{format_bytes(disk.free_bytes)} free of {format_bytes(disk.total_bytes)}"
        more.append(("disk", f"{disk.folder}: {sizes} ({kind})"))
    for network in machine.networks:
        speed = f"{network.bytes_per_second * 8 / 1e9:g} Gbit/s" if network.bytes_per_second else "speed not said"
        more.append(("network", f"{network.name}: {network.kind}, {speed if network.up else 'down'}"))
    for link in machine.links:
        bus = f"PCIe {link.pcie_generation} x{link.pcie_lanes}" if link.pcie_generation else ""
        node = f"at NUMA node {link.numa_node}" if link.numa_node is not None else ""
        peers = f"{link.nvlinks} NVLinks" if link.nvlinks else ""
        words = [word for word in (bus, _giga(link.host_bytes_per_second), peers, node) if word]
        more.append((f"link of device {link.index}", ", ".join(words) or "not known"))
    place = min(2, len(named)) if not machine.elsewhere else len(named)
    return [(name, facts.visible(value)) for name, value in (*named[:place], *more, *named[place:])]


def _elsewhere(machine: Machine) -> list[tuple[str, str]]:
    """Of a machine of the catalogue."""
    memory, device = format_bytes(machine.device.total_bytes), machine.device
    nodes = f"{machine.nodes} nodes of " if machine.nodes > 1 else ""
    named = [("devices", f"{nodes}{machine.devices_per_node} x {device.name}, {memory} each")]
    if machine.network_bytes_per_second:
        named.append(("network", f"{_giga(machine.network_bytes_per_second)} a node, one direction"))
    if machine.rates and machine.rates.tdp_watts:
        named.append(("power", f"{machine.rates.tdp_watts:g} W a device at most"))
    if machine.price_usd_per_hour:
        named.append(("price", f"{machine.price_usd_per_hour:.2f} USD/h on demand ({machine.price_date})"))
    return named


def _topology_facts(topology: Topology) -> list[tuple[str, str]]:
    sockets = f"{topology.sockets} socket{'s' if topology.sockets != 1 else ''}"
    cores = f"{topology.physical_cores} core{'s' if topology.physical_cores != 1 else ''}"
    named = [("the whole machine", f"{sockets}, {cores}, {topology.logical_cores} logical processors")]
    if topology.caches:
        named.append(("caches", ", ".join(map(_cache, topology.caches))))
    if len(topology.nodes) > 1 or topology.hbm_mode:
        for node in topology.nodes:
            cpus = f"{len(node.cpus)} logical processors" if node.cpus else "no processors"
            kind = " of high-bandwidth memory" if node.hbm else ""
            named.append((f"NUMA node {node.node}", f"{cpus}, {format_bytes(node.memory_bytes)}{kind}"))
    if topology.hbm_mode:
        words = {"flat": "as nodes of its own", "cache": "as a cache of main memory", "only": "and no other"}[topology.hbm_mode]
        named.append(("HBM", f"high-bandwidth memory {words} ({topology.hbm_mode} mode)"))
    return named


def _cache(cache: Cache) -> str:
    kind = "" if cache.kind == "unified" else f" {cache.kind}"
    count = f"{cache.instances} x " if cache.instances > 1 else ""
    return f"L{cache.level}{kind} {count}{_short_bytes(cache.size_bytes)}"


def _published(machine: Machine) -> list[tuple[str, str]]:
    """The catalogue's figures of the device; nothing where it is not there."""
    rates = machine.rates
    if rates is None:
        return []
    flops = ", ".join(f"{dtype} {rate / 1e12:g}" for dtype, rate in rates.peak_flops_per_second.items())
    named = {
        "memory": rates.memory_bandwidth_bytes_per_second,
        "host link": rates.host_link_bytes_per_second,
        "links to others": rates.peer_link_bytes_per_second,
    }
    words = [f"{name} {_giga(value)}" for name, value in named.items() if value]
    shares = {"large products": rates.matmul_efficiency, "published training runs": rates.training_efficiency}
    reached = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
    lines = (("peak TFLOP/s", flops), ("bandwidth", ", ".join(words)), ("of peak", reached))
    return [(f"{name} (published)", line) for name, line in lines if line]


def _around(calibration: Calibration) -> Table:
    """What is one number each."""
    rows: list[tuple[str, RenderableType]] = []
    for name, rates in (("", calibration.device), ("processor: ", calibration.host)):
        rows += [(f"{name}{what}", Text(words)) for what, words in _single_rates(rates)] if rates else []
    if disk := calibration.disk:
        how = "direct" if disk.direct else "through the page cache"
        sizes = f"write {_giga(disk.write_bytes_per_second)}, read {_giga(disk.read_bytes_per_second)}"
        rows.append(("disk", Text(facts.visible(f"{sizes} ({disk.folder}, {how})"))))
    if link := calibration.link:
        ways = f"to it {_giga(link.to_device_bytes_per_second)}, from it {_giga(link.to_host_bytes_per_second)}"
        rows.append(("link to the device", Text(f"{ways}, both at once {_giga(link.both_ways_bytes_per_second)}")))
    for rate in calibration.collectives:
        words = f"{rate.alpha_seconds * 1e6:.0f} µs + {_giga(rate.beta_bytes_per_second)}, {rate.ranks} ranks ({rate.backend})"
        rows.append((rate.name, Text(words)))
    rows += [("note", Text(facts.visible(note), style="yellow")) for note in calibration.notes]
    return _table(rows)


def _single_rates(rates: DeviceRates) -> list[tuple[str, str]]:
    tiny = (rates.operator_seconds, rates.recorded_operator_seconds, rates.backward_operator_seconds)
    plain, recorded, backward = (f"{seconds * 1e6:.1f}" for seconds in tiny)
    adamw = f"{_number(rates.adamw_parameters_per_second, 1e9)} G parameters/s"
    adamw += f", {rates.adamw_tensor_seconds * 1e6:.1f} µs a small tensor"
    named = [("tiny operator", f"{plain} µs; {recorded} µs recorded and {backward} µs backward"), ("AdamW", adamw)]
    if rates.loss:
        largest = max(rates.loss, key=lambda rate: (rate.vocabulary, rate.dtype == "float32"))
        ways = (largest.forward_elements_per_second, largest.backward_elements_per_second)
        forward, back = (_number(rate, 1e9) for rate in ways)
        logits = f"{largest.dtype}, vocabulary {largest.vocabulary:,}"
        named.append(("cross-entropy", f"{forward} / {back} G logits/s forward / backward ({logits})"))
    if rates.first_touch_bytes_per_second:
        named.append(("new memory", f"{_giga(rates.first_touch_bytes_per_second)} handed out by the system"))
    return named


def _matmul(rates: Sequence[MatmulRate]) -> Table:
    """Forward products of one layer by rows (tokens of a batch), with the best of all products beside them."""
    plain = [rate for rate in rates if rate.form == "nt" and rate.batch == 1]
    layers = Counter((rate.n, rate.k) for rate in plain if min(rate.n, rate.k) >= 64)
    layer = max(layers, key=lambda shape: (layers[shape], shape == (768, 768), shape), default=(0, 0))
    rows = sorted({rate.m for rate in plain if (rate.n, rate.k) == layer})
    table = _grid([f"{layer[1]} to {layer[0]}, rows" if rows else "", *map(str, rows), "best of all"])
    found = {(rate.dtype, rate.m): rate.flops_per_second for rate in plain if (rate.n, rate.k) == layer}
    for dtype in _of(rates):
        best = max(rate.flops_per_second for rate in rates if rate.dtype == dtype)
        table.add_row(dtype, *(_number(found.get((dtype, m)), 1e9) for m in rows), _number(best, 1e9))
    return table


def _memory(rates: Sequence[MemoryRate]) -> Table:
    """One row an operator and format; columns are what one call moves, about (operators differ in operands)."""
    sizes = sorted({rate.total_bytes for rate in rates})
    starts = [size for place, size in enumerate(sizes) if not place or size > 2 * sizes[place - 1]]
    ends = [max(size for size in sizes if size < after) for after in (*starts[1:], math.inf) if sizes]
    table = _grid(["up to", *(format_bytes(end) for end in ends)])
    for kind in dict.fromkeys(rate.kind for rate in rates):
        for dtype in _of(rates):
            own = [rate for rate in rates if (rate.kind, rate.dtype) == (kind, dtype)]
            cells = [
                next((rate.bytes_per_second for rate in own if start <= rate.total_bytes <= end), None)
                for start, end in zip(starts, ends, strict=True)
            ]
            table.add_row(f"{kind} {dtype}", *(_number(cell, 1e9) for cell in cells))
    return table


def _attention(rates: Sequence[AttentionRate]) -> Table:
    lengths = sorted({rate.length for rate in rates})
    table = _grid(["length", *map(str, lengths)])
    for dtype in _of(rates):
        for form in dict.fromkeys(rate.form for rate in rates):
            own = {rate.length: rate for rate in rates if (rate.dtype, rate.form) == (dtype, form)}
            cells = [own.get(length) for length in lengths]
            table.add_row(f"{dtype} {form}", *(_both(cell) for cell in cells))
    return table


def _both(rate: AttentionRate | None) -> str:
    if rate is None:
        return ""
    return f"{_number(rate.forward_flops_per_second, 1e9)} / {_number(rate.backward_flops_per_second, 1e9)}"


def _grid(titles: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=not number)
    return table


def _of(rates: Iterable[MatmulRate | MemoryRate | AttentionRate]) -> list[str]:
    there = {rate.dtype for rate in rates}
    return [dtype for dtype in _DTYPES if dtype in there]


def _number(value: float | None, scale: float) -> str:
    """Three figures."""
    if value is None:
        return ""
    scaled = value / scale
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"


def _giga(value: float | None) -> str:
    return "" if value is None else f"{_number(value, 1e9)} GB/s"


def _short_bytes(size: int) -> str:
    """Sizes of caches: whole units."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:g} {unit}"
    return f"{size} B"
