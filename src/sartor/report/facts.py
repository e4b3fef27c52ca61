"""What a plan and a run say, in words and numbers: the one source of the terminal's and the page's tables."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sartor.job import Job
from sartor.job.units import format_bytes, format_count, format_seconds
from sartor.machine import Machine
from sartor.plan import Plan, Strategy
from sartor.predict import KINDS, MemoryForecast
from sartor.predict.time import TimeForecast
from sartor.predict.timeline import Timeline

if TYPE_CHECKING:
    from sartor.train.record import MemoryOutcome, Run, TimeOutcome

BASELINE = "process"
ALLOCATOR = "allocator"
LIMIT_SHOWN = 1.6
"""A limit so many times above the peak is still drawn."""

# Control characters of data and file names must not reach a terminal or a page: ␛ for ESC and so on.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys([*range(128, 160), *range(55296, 57344)], 65533)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the forecast's memory. `key` is one of KINDS, BASELINE, or ALLOCATOR."""

    key: str
    name: str
    size_bytes: int


def visible(text: str) -> str:
    """`text` with control characters and lone surrogates shown as symbols."""
    return text.translate(_VISIBLE)


def memory_parts(forecast: MemoryForecast) -> tuple[Part, ...]:
    """The parts that add up to the forecast, the process's own first; none where nothing could be forecast."""
    if forecast.peak is None:
        return ()
    on_cpu = forecast.reserved_bytes is None
    # Tensors may fit into what the heap held free already: then the process itself is that much smaller.
    baseline = forecast.baseline_bytes + min(forecast.allocator_bytes, 0)
    parts = [Part(key=BASELINE, name="process itself" if on_cpu else "driver", size_bytes=baseline)]
    names = [*KINDS, *(kind for kind in forecast.peak.by_kind if kind not in KINDS)]
    parts += [Part(key=kind, name=kind, size_bytes=forecast.peak.by_kind.get(kind, 0)) for kind in names]
    parts.append(Part(key=ALLOCATOR, name="allocator", size_bytes=forecast.allocator_bytes))
    return tuple(part for part in parts if part.size_bytes > 0)


def peak_moment(forecast: MemoryForecast) -> str:
    """When the peak happens, as part of a sentence."""
    phase = forecast.peak.phase if forecast.peak else ""
    name = phase.partition(": ")[2] or phase
    return f"peak in {name}" if name else ""


def owners(forecast: MemoryForecast) -> str:
    """Who holds most at the peak, the weights aside, as part of a sentence."""
    makers = {} if forecast.peak is None else {name: size for name, size in forecast.peak.by_module.items() if name != "weights"}
    largest = sorted(makers, key=lambda name: -makers[name])[:3]
    return ", ".join(f"{visible(name)} {format_bytes(makers[name])}" for name in largest)


_TIERS = {"device": "device", "host": "main memory", "disk": "disk"}


def tiers(forecast: MemoryForecast) -> list[tuple[str, str]]:
    """Where a run keeps something below its accelerator: each tier and its peak."""
    shown = []
    for tier in forecast.tiers:
        there = "" if tier.capacity_bytes is None else f" of {format_bytes(tier.capacity_bytes)}"
        shown.append((_TIERS[tier.name], f"{format_bytes(tier.peak_bytes)}{there}"))
    return shown


def tensor_room(forecast: MemoryForecast) -> int:
    """What there is for tensors: the memory less the process itself, or the driver's context."""
    return max(forecast.available_bytes - forecast.baseline_bytes, 0)


def limit_in_range(timeline: Timeline, room_bytes: int) -> int | None:
    """The limit, where a picture that shows it still shows the rest."""
    return room_bytes if room_bytes <= LIMIT_SHOWN * timeline.peak_bytes else None


def timeline_words(timeline: Timeline, limit: int | None) -> str:
    """The picture in a sentence: the peak, its owner, and the limit where it is drawn."""
    words = f"tensors over a step: peak in {timeline.peak_section or 'it'}"
    if timeline.peak_module:
        words += f", near {visible(timeline.peak_module)}"
    words += f"; most of it {timeline.peak_kind}"
    return words + (f"; there is {format_bytes(limit)} for them" if limit is not None else "")


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of what the plan is about; the memory forecast has its own place."""
    data, job = plan.data, plan.job
    whole = plan.anatomy.parameters + (plan.trained_parameters if plan.traits.adapter else 0)
    share = percent(plan.trained_parameters, whole)
    samples = f"{data.samples:,} samples" + (f" and {data.held_out_samples:,} held out" if data.held_out_samples else "")
    tokens = f"{format_count(data.tokens)} tokens, {percent(data.trained_tokens, data.tokens)} of them in the loss"
    rate = (
        "" if job.training.learning_rate is None else f"; learning rate {job.training.learning_rate:g}, {job.training.schedule}"
    )
    facts = [
        ("model", f"{job.model.path} ({format_count(plan.anatomy.parameters)} parameters)"),
        ("method", f"{method_words(job)}: {format_count(plan.trained_parameters)} parameters train ({share})"),
        ("data", f"{samples}; {tokens}"),
        ("format", f"{data.format} ({data.recognised}), template {data.template}"),
        ("lengths", lengths_words(plan)),
        ("steps", f"{plan.total_steps:,}, each of {job.training.global_batch} examples; {epochs_words(plan)}{rate}"),
        ("strategy", plan.strategy.describe()),
    ]
    if plan.time is not None:
        facts.append(("time", time_words(plan.time)))
    return [(name, visible(value)) for name, value in facts]


def time_words(time: TimeForecast) -> str:
    """Seconds of a step, and what the job takes."""
    low, high = time.interval_seconds
    words = f"{format_seconds(time.step_seconds)} a step ({format_seconds(low)} to {format_seconds(high)})"
    words += f", {time.tokens_per_second:,.0f} tokens/s, {time.mfu:.0%} of the arithmetic (MFU)"
    words += f"; the job {format_seconds(3600 * time.job_hours)}"
    if time.cost_usd is not None:
        words += f", {time.cost_usd:,.2f} USD"
    if time.energy_kwh is not None:
        words += f", at most {time.energy_kwh:,.3g} kWh"
    hidden = time.breakdown.get("communication", 0.0) + time.breakdown.get("bubble", 0.0)
    if hidden > 0.005 * time.step_seconds:
        words += f"; {hidden / time.step_seconds:.0%} of it waits for messages or other stages"
    if (offload := time.breakdown.get("offload", 0.0)) > 0.005 * time.step_seconds:
        words += f"; {offload / time.step_seconds:.0%} of it waits for what is below the device"
    if (disk := time.breakdown.get("disk", 0.0)) > 0.005 * time.step_seconds:
        words += f"; {disk / time.step_seconds:.0%} of it waits for the disk"
    return words


def epochs_words(plan: Plan) -> str:
    """Passes over the data that the steps amount to."""
    epochs = plan.total_steps * plan.job.training.global_batch / plan.data.samples if plan.data.samples else 0.0
    if plan.job.training.max_steps is None:
        epochs = plan.job.training.epochs
    return "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"


def lengths_words(plan: Plan) -> str:
    """How long the samples are, and what was cut or left out."""
    data = plan.data
    words = []
    if "50%" in data.lengths.quantiles and "longest" in data.lengths.quantiles:
        words.append(f"median {data.lengths.quantiles['50%']:,} tokens, longest {data.lengths.quantiles['longest']:,}")
    if data.truncated:
        words.append(f"{data.truncated:,} truncated at {data.max_length:,} ({percent(data.truncated, data.samples)})")
    else:
        words.append("none truncated")
    if data.dropped:
        words.append(f"{data.dropped:,} left out as too long")
    if data.untrained:
        words.append(f"{data.untrained:,} left out without a token in the loss")
    return "; ".join(words)


def method_words(job: Job) -> str:
    """The method with the options that matter."""
    if job.quantise is not None:
        double = ", double" if job.quantise.mode == "nf4" and job.quantise.double else ""
        return f"{_method_alone(job)}, frozen weights in {job.quantise.mode}{double}"
    return _method_alone(job)


def _method_alone(job: Job) -> str:
    if job.method in ("lora", "qlora"):
        targets = job.lora.targets if isinstance(job.lora.targets, str) else ", ".join(job.lora.targets)
        return f"{job.method} (rank {job.lora.rank}, alpha {job.lora.alpha:g}, on {targets})"
    if job.method == "prefix":
        return f"prefix, P-tuning v2 (length {job.prefix.length})"
    if job.method == "prompt":
        return f"prompt (length {job.prompt.length})"
    if job.method == "peft" and isinstance(job.peft, dict):
        return f"peft ({job.peft.get('peft_type', 'own configuration')})"
    return job.method


def strategy_words(strategy: Strategy) -> str:
    """What is chosen for a machine, as short as a table needs it."""
    words = [strategy.layout.describe(), f"micro-batch {strategy.micro_batch}", _recompute(strategy)]
    return ", ".join(word for word in words if word)


def _recompute(strategy: Strategy) -> str:
    if not strategy.recompute:
        return ""
    return "recompute" if strategy.recomputed is None else f"recompute {strategy.recomputed} blocks"


def differences(chosen: Strategy, other: Strategy) -> str:
    """`other` in the words in which it differs from `chosen`."""
    words = []
    if other.device != chosen.device:
        words.append(other.device)
    if other.precision != chosen.precision:
        words.append(other.precision.describe())
    if (other.packing, other.row_capacity) != (chosen.packing, chosen.row_capacity):
        words.append(f"packed rows of {other.row_capacity}" if other.packing else "one example a row")
    if other.micro_batch != chosen.micro_batch:
        words.append(f"micro-batch {other.micro_batch}")
    if (other.recompute, other.recomputed) != (chosen.recompute, chosen.recomputed):
        words.append(other.describe_activations())
    if other.layout != chosen.layout:
        words.append(other.layout.describe() or "one device")
    if other.attention != chosen.attention:
        words.append(f"attention {other.attention or 'of the model'}")
    return ", ".join(words) or "the same"


def machine_facts(machine: Machine) -> list[tuple[str, str]]:
    """Name and value of what a machine is."""
    sets = f", {' '.join(machine.instruction_sets)}" if machine.instruction_sets else ""
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    facts = [
        ("processor", f"{machine.cpu_name}, {cores}{sets}"),
        ("main memory", f"{format_bytes(machine.host.available_bytes)} available of {format_bytes(machine.host.total_bytes)}"),
    ]
    for device in machine.accelerators:
        memory = f"{format_bytes(device.available_bytes)} available of {format_bytes(device.total_bytes)}"
        facts.append((device.torch_name, f"{device.name}, {memory}"))
    if not machine.accelerators:
        facts.append(("accelerators", "none"))
    threads = f", {machine.threads} thread{'s' if machine.threads != 1 else ''}" if machine.device.kind == "cpu" else ""
    facts.append(("computes on", f"{machine.device.torch_name}{threads}"))
    return [(name, visible(value)) for name, value in facts]


def memory_words(memory: MemoryOutcome) -> str:
    """The forecast beside the measurement, in a sentence."""
    measured = f"{format_bytes(memory.measured_bytes)} measured ({memory.measured_name})"
    if memory.forecast_bytes is None:
        return f"no forecast; {measured}"
    return f"{format_bytes(memory.forecast_bytes)} forecast, {measured}" + error_words(memory, before=": ")


def run_time_words(time: TimeOutcome) -> str:
    """The forecast beside the measurement, in a sentence."""
    measured = f"{format_seconds(time.measured_step_seconds)} a step measured"
    if time.forecast_step_seconds is None:
        return f"no forecast; {measured}"
    return f"{format_seconds(time.forecast_step_seconds)} a step forecast, {measured}" + error_words(time, before=": ")


def error_words(memory: MemoryOutcome | TimeOutcome, *, before: str = "") -> str:
    """How far the forecast was off, e.g. `2.1% too low`."""
    if memory.error_percent is None:
        return ""
    error = memory.error_percent
    return before + (f"{abs(error):.1f}% too {'high' if error > 0 else 'low'}" if abs(error) >= 0.05 else "exact")


def change(before: float | None, after: float | None, form: str = ".3f") -> str:
    """`4.512 → 0.213`, the half of it that is known, or nothing."""
    if before is None or after is None:
        known = before if after is None else after
        return "" if known is None else format(known, form)
    return f"{before:{form}} → {after:{form}}"


def percent(part: float, whole: float) -> str:
    """A share with as many digits as it needs."""
    share = 100 * part / whole if whole else 0.0
    digits = 0 if share >= 99.95 or share == 0 else 1 if share >= 1 else 2 if share >= 0.01 else 4
    return f"{share:.{digits}f}%"


def is_exact(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, letter for letter, as `Run.exact_match_after` counts it."""
    return answer == reference


def commands(run: Run) -> tuple[str, str]:
    """How to try the result from a shell."""
    folder = shlex.quote(run.folder)
    return f"sartor chat {folder}", f'sartor generate {folder} --prompt "…"'


def snippet(plan: Plan, run: Run) -> str:
    """How to load the result in Python."""
    library, name = ("peft", "AutoPeftModelForCausalLM") if plan.traits.adapter else ("transformers", "AutoModelForCausalLM")
    imports = f"from {library} import {name}\nfrom transformers import AutoTokenizer"
    if library == "transformers":
        imports = f"from transformers import {name}, AutoTokenizer"
    return (
        f"{imports}\n\nfolder = {run.folder!r}\n"
        f"model = {name}.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)\n"
    )
