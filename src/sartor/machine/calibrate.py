"""Measures this machine for forecasts of time: seconds of work, kept until the processor, its threads or PyTorch change."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from sartor.errors import UsageError, writing
from sartor.machine.calibration import CALIBRATION_VERSION, Calibration, cache_folder, calibration_key, save_calibration
from sartor.machine.clock import Clock
from sartor.machine.measure import device_rates
from sartor.machine.measure_links import disk_rate, link_rate
from sartor.machine.probe import Machine, probe

LIMIT_SECONDS = 24.0
"""For the rates of one device; what is not measured by then is left out, with a note."""
_BUSY_SHARE = 0.1
"""Of the processors' time spent on other processes while measuring: from here on it is worth a note."""


def calibrate(
    machine: Machine | None = None, *, folder: Path | None = None, keep: bool = True, say: Callable[[str], None] = lambda _: None
) -> Calibration:
    """Measure `machine` (this one) with the threads a job would have, and the disk of `folder` (the working folder).

    `keep` writes it where `load_calibration` finds it. `say` hears what is being measured. Raises UsageError for a machine
    that is not this one, and where the result cannot be kept.
    """
    machine = machine or probe()
    if machine.elsewhere:
        remedy = "calibrate where it is; here its rates are published ones"
        raise UsageError(f"{machine.elsewhere} is not this machine", remedy=remedy)
    if keep and (place := cache_folder("machines")) is not None:
        with writing(place):  # said before the measuring, not after it
            place.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    start, busy_before = time.perf_counter(), _others_seconds()
    device, processor = torch.device(machine.device.torch_name), torch.device("cpu")
    host = link = None
    with _set_up(machine, device):
        say(f"rates of {device} ({machine.device.name})")
        rates = device_rates(Clock(device, limit_seconds=LIMIT_SECONDS), largest_bytes=_largest_bytes(machine), notes=notes)
        if device != processor:
            say("link between main memory and the device")
            link = link_rate(Clock(device), notes)
            say("rates of the processor")
            host = device_rates(Clock(processor, limit_seconds=LIMIT_SECONDS), largest_bytes=_largest_bytes(machine), notes=notes)
    say(f"disk of {folder or Path.cwd()}")
    disk = disk_rate(folder or Path.cwd(), notes)
    seconds = time.perf_counter() - start
    busy = (_others_seconds() - busy_before) / (seconds * (os.cpu_count() or 1))
    if busy > _BUSY_SHARE:
        notes.append(
            f"other processes used {busy:.0%} of the processors meanwhile: rates may be too low; measure again when idle"
        )
    calibration = Calibration(
        version=CALIBRATION_VERSION,
        key=calibration_key(machine),
        measured=datetime.date.today().isoformat(),
        disk=disk,
        seconds=seconds,
        device=rates,
        host=host,
        link=link,
        notes=tuple(notes),
    )
    if keep:
        save_calibration(calibration)
    return calibration


@contextlib.contextmanager
def _set_up(machine: Machine, device: torch.device) -> Iterator[None]:
    """The threads of a job; the caller's threads and random numbers are the same afterwards."""
    before = torch.get_num_threads()
    forked = [] if device.type == "cpu" else [device.index or 0]
    torch.set_num_threads(machine.threads)
    try:
        with torch.random.fork_rng(forked, device_type="cuda" if device.type == "cpu" else device.type), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _largest_bytes(machine: Machine) -> int:
    """Beyond the last cache of any processor here, and little of the memory there is."""
    cached = max((cache.size_bytes * cache.instances for cache in machine.topology.caches), default=0) if machine.topology else 0
    return min(max(2**27, 4 * cached), 2**30, machine.host.available_bytes // 16)


def _others_seconds() -> float:
    """Processor time that this machine spent on other processes, and that other machines took from it, since it started."""
    spent, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = spent.idle + getattr(spent, "iowait", 0.0) + getattr(spent, "guest", 0.0) + getattr(spent, "guest_nice", 0.0)
    return sum(spent) - idle - own.user - own.system
