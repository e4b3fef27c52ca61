"""A plan of inference on the terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.text import Text

from sartor.job.units import format_bytes, format_count
from sartor.plan.inference import LARGEST_BATCH, InferencePlan
from sartor.report import facts
from sartor.report.terminal import _colours, _memory, _print, _table, _width


def show_inference(plan: InferencePlan, console: Console) -> None:
    """What answers need, whether that fits, and how long or how many they may be."""
    named = inference_facts(plan)
    rows: list[tuple[str, RenderableType]] = [(name, Text(value)) for name, value in named]
    room = _width(console) - max(len(name) for name, _ in named) - 4
    rows.append(("memory", _memory(plan.forecast.memory, room, colours=_colours(console))))
    rows += [("room", Text(words)) for words in room_words(plan)]
    rows += [("note", Text(facts.visible(note), style="yellow")) for note in plan.notes]
    _print(console, Text("Plan of inference", style="bold"), _table(rows))


def inference_facts(plan: InferencePlan) -> list[tuple[str, str]]:
    """Name and value of what the plan is about."""
    request, quantise = plan.request, plan.job.quantise
    prompts = f"{request.batch} prompt{'s' if request.batch > 1 else ''} of {request.prompt:,} tokens"
    mask = ", of different length" if request.padded else ""
    stored = f"{plan.dtype}, linear layers in {quantise.mode}" if quantise else plan.dtype
    per_token = plan.forecast.cache_bytes / (request.batch * request.length)
    answers = f"{prompts}{mask}, answers of {request.answer:,}"
    found = [
        ("model", f"{plan.job.model.path} ({format_count(plan.parameters)} parameters, {stored})"),
        ("machine", plan.machine.elsewhere or plan.machine.device.torch_name),
        ("generates", answers + (", drawn" if request.sampling else "")),
    ]
    if plan.forecast.cache_bytes:
        size = f"{format_bytes(plan.forecast.cache_bytes)} at the end, {format_bytes(per_token)} a token"
        found.append(("cache", f"{request.cache}, {size}"))
    return [(name, facts.visible(value)) for name, value in found]


def room_words(plan: InferencePlan) -> list[str]:
    """The longest prompt and the largest batch that run, each in a sentence."""
    request, words = plan.request, []
    if plan.longest_prompt is not None:
        whole = plan.position_limit is not None and plan.longest_prompt + request.answer >= plan.position_limit
        reason = f" (the model's {plan.position_limit:,} positions)" if whole else ""
        words.append(_up_to("prompts", plan.longest_prompt, "tokens") + f"{reason} at batch {request.batch}")
    if plan.largest_batch is not None:
        more = " and more" if plan.largest_batch >= LARGEST_BATCH else ""
        words.append(_up_to("batches", plan.largest_batch, "prompts") + f"{more} of {request.prompt:,} tokens")
    return words


def _up_to(what: str, size: int, unit: str) -> str:
    return f"{what} of up to {size:,} {unit if size != 1 else unit.rstrip('s')}" if size else f"no {what} with a margin"
