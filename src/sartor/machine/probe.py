"""This machine as it is, and the part of it that the job may use."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sartor.errors import JobError
from sartor.job.schema import MachineJob
from sartor.machine.cgroup import processor_limit
from sartor.machine.memory import HostMemory, host_memory
from sartor.machine.surroundings import DeviceLink, Disk, Network, device_link, disks, networks, pci_address
from sartor.machine.topology import ROOT, Topology, read_text, read_topology

if TYPE_CHECKING:
    from sartor.machine.catalogue import DeviceModel, MachineModel


@dataclass(frozen=True, kw_only=True)
class Device:
    """One compute device. On a CPU its memory is the host's."""

    kind: str
    """torch's device type: cpu, cuda, xpu …"""
    index: int
    name: str
    total_bytes: int
    available_bytes: int
    sm: int | None = None
    """CUDA compute capability, 90 for 9.0."""

    @property
    def torch_name(self) -> str:
        """As `torch.device` takes it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a job runs on. `device` is the one that computes; limits of the job are taken into account."""

    device: Device
    accelerators: tuple[Device, ...]
    host: HostMemory
    cpu_name: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    """Those that matter to matrix products: avx2, avx512f, avx512_bf16, amx_bf16 …"""
    nodes: int = 1
    devices_per_node: int = 1
    """Equal devices that a job may use, `device` being one of them. More than one only where a catalogue's machine has them."""
    elsewhere: str = ""
    """The catalogue's name of a machine that is not this one: plans are made for it, nothing runs on it."""
    topology: Topology | None = None
    """How it is built; None where that is not known."""
    disks: tuple[Disk, ...] = ()
    networks: tuple[Network, ...] = ()
    links: tuple[DeviceLink, ...] = ()
    """Of the accelerators."""
    rates: DeviceModel | None = None
    """Published figures of `device`, of this machine's too where the catalogue has it. Where they come from: docs/machines.md."""
    network_bytes_per_second: int | None = None
    """Of one node, one direction."""
    price_usd_per_hour: float | None = None
    """Of all nodes, on demand, on the day `price_date`."""
    price_date: str | None = None

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return self.nodes * self.devices_per_node


def probe(wanted: MachineJob | None = None, *, folders: Iterable[Path] = ()) -> Machine:
    """This machine, within the limits that the job sets. Raises JobError for a device that is not there.

    Disks are those of `folders`, of the working folder and of temporary files.
    """
    wanted = wanted or MachineJob()
    if wanted.name != "auto":
        return _from_catalogue(wanted)
    host = _limited_host(host_memory(), wanted.host_memory)
    cores = usable_cores()
    accelerators = _accelerators(wanted.device_memory)
    cpu_name, flags = read_cpu()
    cpu = Device(kind="cpu", index=0, name=cpu_name, total_bytes=host.total_bytes, available_bytes=host.available_bytes)
    device = _choose(wanted.device, cpu, accelerators)
    rates = None if device is cpu else _published(device.name)
    interfaces = networks()
    here = [network.bytes_per_second for network in interfaces if network.up and network.bytes_per_second]
    return Machine(
        device=device,
        accelerators=accelerators,
        host=host,
        cpu_name=cpu_name,
        cores=cores,
        threads=min(wanted.threads or cores, cores),
        instruction_sets=flags,
        topology=read_topology(cpu_name),
        disks=disks(folders),
        networks=interfaces,
        links=_links(accelerators),
        rates=rates,
        network_bytes_per_second=max(here, default=None),
    )


def usable_cpus() -> frozenset[int]:
    """The logical processors that this process may run on, by number."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def usable_cores(root: Path = ROOT) -> int:
    """Logical processors that this process may use: its affinity, and the quota of its control groups rounded up."""
    cores = len(usable_cpus())
    quota = processor_limit(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _from_catalogue(wanted: MachineJob) -> Machine:
    """A machine by name, as `sartor plan` sees it. Raises JobError for unknown names and kinds of devices."""
    from sartor.machine.catalogue import lookup

    model = lookup(wanted.name)
    kind = {"hip": "cuda"}.get(model.device.kind, model.device.kind)
    if kind != "cuda":
        raise JobError(
            f"machine {wanted.name!r} is of kind {model.device.kind}",
            why="the forecast knows how PyTorch allocates on CUDA and ROCm devices, and on this machine's CPU",
            remedy="a CUDA or ROCm device of docs/machines.md",
        )
    return machine_of(model, wanted)


def machine_of(model: MachineModel, wanted: MachineJob | None = None) -> Machine:
    """A machine of the catalogue, of whatever kind, within the limits that a job sets. Its processor is not known."""
    wanted = wanted or MachineJob()
    kind = {"hip": "cuda"}.get(model.device.kind, model.device.kind)
    total = min(model.device.memory_bytes, wanted.device_memory or model.device.memory_bytes)
    device = Device(
        kind=kind, index=0, name=model.device.vendor_name, total_bytes=total, available_bytes=total, sm=model.device.sm
    )
    host_bytes = wanted.host_memory or model.host_memory_bytes or host_memory().total_bytes
    return Machine(
        device=device,
        accelerators=(device,),
        host=HostMemory(total_bytes=host_bytes, available_bytes=host_bytes),
        cpu_name="not known",
        cores=1,
        threads=1,
        instruction_sets=(),
        nodes=model.nodes,
        devices_per_node=model.devices_per_node,
        elsewhere=model.name,
        rates=dataclasses.replace(model.device, sources={}),
        network_bytes_per_second=model.network_bytes_per_second,
        price_usd_per_hour=model.price_usd_per_hour,
        price_date=model.price_date,
    )


def _limited_host(host: HostMemory, limit: int | None) -> HostMemory:
    if limit is None:
        return host
    return HostMemory(total_bytes=min(host.total_bytes, limit), available_bytes=min(host.available_bytes, limit))


def _accelerators(limit: int | None) -> tuple[Device, ...]:
    if not torch.accelerator.is_available():
        return ()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "an accelerator is available"
    module = torch.get_device_module(kind)
    devices = []
    for index in range(torch.accelerator.device_count()):
        free, total = module.mem_get_info(index)
        name = str(module.get_device_name(index))
        cap = total if limit is None else min(total, limit)
        major, minor = module.get_device_capability(index) if kind.type == "cuda" else (0, 0)
        sm = 10 * major + minor or None
        devices.append(Device(kind=kind.type, index=index, name=name, total_bytes=cap, available_bytes=min(free, cap), sm=sm))
    return tuple(devices)


def _published(name: str) -> DeviceModel | None:
    """The catalogue's figures of a device, by the name that torch gives it."""
    from sartor.machine.catalogue import DeviceModel, load

    found = load().find(name)
    return dataclasses.replace(found, sources={}) if isinstance(found, DeviceModel) else None


def _links(accelerators: tuple[Device, ...]) -> tuple[DeviceLink, ...]:
    links = []
    for device in accelerators:
        module = torch.get_device_module(device.kind)
        address = pci_address(module.get_device_properties(device.index)) if hasattr(module, "get_device_properties") else None
        if address is not None:
            links.append(device_link(device.index, address))
    return tuple(links)


def _choose(wanted: str, cpu: Device, accelerators: tuple[Device, ...]) -> Device:
    if wanted == "cpu" or (wanted == "auto" and not accelerators):
        return cpu
    for device in accelerators:
        if wanted in ("auto", device.kind, device.torch_name):
            return device
    there = ", ".join(["cpu", *(device.torch_name for device in accelerators)])
    raise JobError(f"`machine.device` is {wanted!r}, which this machine does not have", remedy=f"one of: auto, {there}")


_INTERESTING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


def read_cpu(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets, from /proc/cpuinfo where there is one."""
    values: dict[str, str] = {}
    # All processors are listed, with the same names but on few machines: the first one's are taken.
    for line in read_text(root / "proc/cpuinfo").split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip().lower(), value.strip())
    if not values:
        return platform.processor() or platform.machine(), ()
    flags = set((values.get("flags") or values.get("features") or "").split())
    return values.get("model name", platform.machine()), tuple(flag for flag in _INTERESTING_FLAGS if flag in flags)
