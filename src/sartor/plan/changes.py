"""What would make a job fit, or leave it more room: single changes, each forecast, the cheapest first."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator

from sartor.errors import DoesNotFit
from sartor.job.schema import QuantiseJob
from sartor.job.units import format_bytes
from sartor.methods import traits
from sartor.plan.forecast import forecast_of
from sartor.plan.offload import Offload
from sartor.plan.offload_ground import Missing, asks_for_offload, cannot_offload
from sartor.plan.placed import Shortfall, place
from sartor.plan.setting import Setting, batch_order
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast
from sartor.step import Precision

QLORA = "method=qlora"
PATIENCE_SECONDS = 3.0
"""After so long no further change is forecast where one is known that helps: of the largest models each takes seconds."""
Change = tuple[str, Setting, Strategy]
"""What to write, and what is then run."""


def does_not_fit(
    setting: Setting,
    smallest: Strategy,
    forecast: MemoryForecast,
    shortfall: Shortfall | None = None,
    missing: Missing | None = None,
) -> DoesNotFit:
    """The error, with what would make the job fit: each change forecast with the smallest strategy that was tried. `shortfall`:
    what is missing with everything on disk; `missing`: with everything below an accelerator that can be there."""
    pinned = asks_for_offload(setting)
    tried: Iterable[tuple[str, MemoryForecast]] = () if pinned else _forecasts(setting, smallest)
    helps = [
        f"{words}: {_room(changed, forecast.process_bytes)}" for words, changed in tried if changed.verdict in ("fits", "tight")
    ]
    helps += ["strategy.placement=auto"] if pinned else []
    why = f"the smallest strategy tried is: {smallest.describe()}"
    if shortfall is not None:
        alone = f"{shortfall.row} alone takes {format_bytes(shortfall.row_bytes)} while it is updated"
        why += f"; with everything on disk, {alone}"
        helps.append(f"machine.host_memory={math.ceil(shortfall.memory_bytes / 2**20)}MiB, where this machine has that much")
    words, help_ = _below(setting, smallest, forecast, missing)
    why += words
    helps += [help_] if help_ else []
    return DoesNotFit(
        f"this job does not fit on {setting.machine.device.torch_name}: it {forecast.reason}",
        why=why,
        remedy="; or ".join(helps) or "a smaller model, or a device with more memory: nothing that was tried alone is enough",
    )


def _below(setting: Setting, smallest: Strategy, forecast: MemoryForecast, missing: Missing | None) -> tuple[str, str]:
    """What there is to say of what is below the device, disk or main memory: why it is not enough, and what would be."""
    if setting.machine.device.kind == "cpu":
        return "", _with_disk(setting, smallest, forecast)
    if reason := cannot_offload(setting):
        return f"; nothing goes to main memory: {reason}", ""
    if missing is None:
        return "", _with_placement(setting, smallest)
    if missing == Missing():
        return "", ""
    if missing.untraced:
        return f"; what it would need with parts of it below the device cannot be said ({missing.untraced})", ""
    if missing.host_bytes:
        there = format_bytes(setting.machine.host.available_bytes)
        memory = f"machine.host_memory={math.ceil(missing.host_bytes / 2**20)}MiB, where the machine has that much"
        return f"; main memory below it has {there}, and {format_bytes(missing.host_bytes)} would be enough", memory
    needed = format_bytes(missing.device_bytes)
    return f"; with all below it that can be there, the device would still have to have {needed}", ""


def _with_placement(setting: Setting, smallest: Strategy) -> str:
    """What an accelerator would need that keeps all by order, if it did not."""
    job = dataclasses.replace(setting.job, strategy=dataclasses.replace(setting.job.strategy, placement="auto"))
    found = Offload(dataclasses.replace(setting, job=job)).find([smallest])
    if found is None or found.forecast.process_bytes is None:
        return ""
    device, host = (format_bytes(size or 0) for size in (found.forecast.process_bytes, found.forecast.host_bytes))
    return f"strategy.placement=auto: {device}, and {host} of main memory"


def _with_disk(setting: Setting, smallest: Strategy, forecast: MemoryForecast) -> str:
    """What a CPU would need that keeps all in memory by order, if it did not."""
    if setting.job.strategy.placement != "device" or forecast.process_bytes is None:
        return ""
    job = dataclasses.replace(setting.job, strategy=dataclasses.replace(setting.job.strategy, placement="auto"))
    found = place(dataclasses.replace(setting, job=job), dataclasses.replace(smallest, recomputed=None), forecast)
    if not isinstance(found, tuple):
        return ""
    strategy, placed = found
    if strategy.placement is None or placed.verdict == "does not fit":
        return ""
    disk = format_bytes(strategy.placement.disk_bytes)
    return f"strategy.placement=auto: {_room(placed, forecast.process_bytes)}, and {disk} on disk"


def more_room(setting: Setting, strategy: Strategy, forecast: MemoryForecast) -> str:
    """Where the verdict is tight: what would make it fit with room to spare; else nothing."""
    if forecast.verdict != "tight" or strategy.placement is not None:
        return ""
    helps = [
        f"{words}: {_room(changed, forecast.process_bytes)}"
        for words, changed in _forecasts(setting, strategy)
        if changed.verdict == "fits"
    ]
    return f"to leave more room: {'; or '.join(helps)}" if helps else ""


def _forecasts(setting: Setting, strategy: Strategy) -> Iterator[tuple[str, MemoryForecast]]:
    enough, start = False, time.monotonic()
    for words, changed, other in _changes(setting, strategy):
        if enough and time.monotonic() - start > PATIENCE_SECONDS:
            return
        if words == QLORA and enough and strategy.layout.shared > 1:
            continue  # devices share the frozen weights already: 4 bits of them save little, and a trace takes seconds
        forecast = forecast_of(changed, other, brief=True)
        enough = enough or forecast.verdict in ("fits", "tight")
        yield words, forecast


def _room(forecast: MemoryForecast, before: int | None) -> str:
    """What is needed then, and how much less that is."""
    assert forecast.process_bytes is not None, "a verdict comes with a number"
    less = 0 if before is None else before - forecast.process_bytes
    return format_bytes(forecast.process_bytes) + (f", saves {format_bytes(less)}" if less > 0 else "")


def _changes(setting: Setting, strategy: Strategy) -> Iterator[Change]:
    """Single changes that need less memory: first what costs nothing, then time, then precision, then what is trained or seen."""
    job, precision = setting.job, setting.precision
    if setting.machine.device.kind == "cuda" and not setting.expandable_segments:
        expandable = dataclasses.replace(strategy, expandable_segments=True)
        yield "strategy.expandable_segments=true", dataclasses.replace(setting, expandable_segments=True), expandable
    if strategy.attention == "eager":
        yield "strategy.attention=sdpa", setting, dataclasses.replace(strategy, attention="sdpa")
    if strategy.micro_batch > 1 and job.strategy.micro_batch != "auto":  # else smaller ones were tried
        yield "strategy.micro_batch=1", setting, dataclasses.replace(strategy, micro_batch=1)
    if not strategy.recompute and job.strategy.recompute == "none" and setting.method.recompute:
        yield "strategy.recompute=full", setting, dataclasses.replace(strategy, recompute=True)
    for mode in {"float32": ("bf16-mixed", "bf16"), "bf16-master": ("bf16",), "bf16": ()}.get(precision.mode, ("bf16",)):
        lower = Precision.of(mode)
        changed = dataclasses.replace(setting, precision=lower)
        yield f"precision={mode}", changed, dataclasses.replace(strategy, precision=lower)
    if job.method == "full":
        lora = dataclasses.replace(job, method="lora")
        yield "method=lora", dataclasses.replace(setting, job=lora, method=traits(lora)), strategy
    if job.method in ("full", "lora") and job.quantise is None:
        qlora = dataclasses.replace(job, method="qlora", quantise=QuantiseJob())
        yield QLORA, dataclasses.replace(setting, job=qlora, method=traits(qlora)), strategy
    yield from _shorter(setting, strategy)


def _shorter(setting: Setting, strategy: Strategy) -> Iterator[Change]:
    """Half the length, the longer examples left out, where enough examples stay."""
    lengths = setting.sets.train.lengths
    longest = int(lengths.max())
    half = [index for index, length in enumerate(lengths) if length <= longest // 2]
    if len(half) < setting.job.training.global_batch:
        return
    sets = dataclasses.replace(setting.sets, train=setting.sets.train.take(half))
    changed = dataclasses.replace(setting, sets=sets, order=batch_order(setting.job, sets))
    yield f"data.max_length={longest // 2} with data.overlong=drop", changed, strategy
