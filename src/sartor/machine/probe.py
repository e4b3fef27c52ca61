"""This machine as it is, and the part of it that the job may use."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sartor.errors import JobError
from sartor.job.schema import MachineJob
from sartor.machine.memory import HostMemory, host_memory


@dataclass(frozen=True, kw_only=True)
class Device:
    """One compute device. On a CPU its memory is the host's."""

    kind: str
    """torch's device type: cpu, cuda, xpu …"""
    index: int
    name: str
    total_bytes: int
    available_bytes: int

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


def probe(wanted: MachineJob | None = None) -> Machine:
    """This machine, within the limits that the job sets. Raises JobError for a device that is not there."""
    wanted = wanted or MachineJob()
    if wanted.name not in ("auto", "this"):
        raise JobError(
            f"machine {wanted.name!r} is not known",
            why="so far Sartor plans for the machine it runs on",
            remedy="`machine: auto`, or limits such as `machine: {host_memory: 16GiB}`",
        )
    host = _limited_host(host_memory(), wanted.host_memory)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    accelerators = _accelerators(wanted.device_memory)
    cpu_name, flags = _cpu()
    cpu = Device(kind="cpu", index=0, name=cpu_name, total_bytes=host.total_bytes, available_bytes=host.available_bytes)
    return Machine(
        device=_choose(wanted.device, cpu, accelerators),
        accelerators=accelerators,
        host=host,
        cpu_name=cpu_name,
        cores=cores,
        threads=min(wanted.threads or cores, cores),
        instruction_sets=flags,
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
        devices.append(Device(kind=kind.type, index=index, name=name, total_bytes=cap, available_bytes=min(free, cap)))
    return tuple(devices)


def _choose(wanted: str, cpu: Device, accelerators: tuple[Device, ...]) -> Device:
    if wanted == "cpu" or (wanted == "auto" and not accelerators):
        return cpu
    for device in accelerators:
        if wanted in ("auto", device.kind, device.torch_name):
            return device
    there = ", ".join(["cpu", *(device.torch_name for device in accelerators)])
    raise JobError(f"`machine.device` is {wanted!r}, which this machine does not have", remedy=f"one of: auto, {there}")


_INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets, from /proc/cpuinfo where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), ()
    lines = [line.partition(":") for line in text.splitlines()]
    values: dict[str, str] = {}
    for key, _, value in lines:
        values.setdefault(key.strip().lower(), value.strip())
    flags = set((values.get("flags") or values.get("features") or "").split())
    return values.get("model name", platform.machine()), tuple(flag for flag in _INTERESTING_FLAGS if flag in flags)
