"""Measures this machine for forecasts of time: seconds of work, kept until the processor, its threads or PyTorch change."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sartor.errors import UsageError, writing
from sartor.folders import cache_folder
from sartor.machine.calibration import CALIBRATION_VERSION, Calibration, calibration_key, save_calibration
from sartor.machine.clock import Clock
from sartor.machine.measure import device_rates
from sartor.machine.measure_blocks import AsRun
from sartor.machine.measure_links import disk_rate, link_rate
from sartor.machine.probe import Machine, probe
from sartor.machine.topology import ROOT, read_text

LIMIT_SECONDS = 30.0
"""For the rates of one device; what is not measured by then is left out, with a note."""
_DISTURBED, _SPOILT = 0.1, 0.3
"""Shares of its time that measuring waited for a processor: from the first on that is worth a note, from the second on the
rates say more of the other processes than of the machine, and are not kept."""


def calibrate(
    machine: Machine | None = None,
    *,
    folder: Path | None = None,
    keep: bool = True,
    say: Callable[[str], None] = lambda _: None,
    as_run: AsRun | None = None,
) -> Calibration:
    """Measure `machine` (this one) with the threads a job would have, and the disk of `folder` (the working folder).

    `as_run` lets a model compute with the kernels of jobs (`sartor.kernels.fuse.as_jobs_run`).

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
    start, before = time.perf_counter(), _ran_and_waited()
    device, processor = torch.device(machine.device.torch_name), torch.device("cpu")
    host = link = None
    with _set_up(machine, device):
        say(f"rates of {device} ({machine.device.name})")
        clock, largest = Clock(device, limit_seconds=LIMIT_SECONDS), _largest_bytes(machine)
        rates = device_rates(clock, largest_bytes=largest, notes=notes, as_run=as_run)
        if device != processor:
            say("link between main memory and the device")
            link = link_rate(Clock(device), notes)
            say("rates of the processor")
            host = device_rates(Clock(processor, limit_seconds=LIMIT_SECONDS), largest_bytes=largest, notes=notes)
    say(f"disk of {folder or Path.cwd()}")
    disk = disk_rate(folder or Path.cwd(), notes)
    seconds = time.perf_counter() - start
    share = _waited(before, _ran_and_waited())
    if share > _DISTURBED:
        kept = "" if share < _SPOILT or not keep else "not kept: "
        notes.append(f"{kept}other processes kept it waiting {share:.0%} of the time; measure again when the machine is idle")
    whole = bool(rates.memory)
    if not whole:  # it stood still, or had to wait, for all of the time
        notes.append("not kept: no time was left for operators on memory; measure again when the machine is idle")
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
    if keep and whole and share < _SPOILT:
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


def _ran_and_waited(root: Path = ROOT) -> tuple[int, int]:
    """Nanoseconds that this process's threads ran, and that they were ready to run but others did; zeros where not counted."""
    counts = [read_text(path).split() for path in (root / "proc/self/task").glob("*/schedstat")]
    known = [(int(words[0]), int(words[1])) for words in counts if len(words) == 3]
    return sum(ran for ran, _ in known), sum(waited for _, waited in known)


def _waited(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Share of the time between that was waiting."""
    ran, waited = (max(end - start, 0) for start, end in zip(before, after, strict=True))
    return waited / max(ran + waited, 1)
