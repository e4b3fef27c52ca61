"""A plan's model in its places, never whole in memory: made from random numbers or streamed from its files row by row. Where
files have other names than the model, it is read as a whole."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sartor.errors import ModelError
from sartor.model import ModelSource, build, build_empty, build_lazily, weights_folder
from sartor.model.rows import find_rows
from sartor.placement import DiskTier, Engine
from sartor.placement.fill import Fill, from_folder, from_random
from sartor.placement.tiers import in_memory
from sartor.plan import Plan, load_dtype


def build_placed(plan: Plan, source: ModelSource, say: Callable[[str], None]) -> Engine:
    """The model of `plan` with its rows where the strategy's table puts them. Raises ModelError, or RunError of the disk."""
    placement = plan.strategy.placement
    assert placement is not None, "asked for by the strategy"
    model, fill = _empty(plan, source)
    if model is None:
        say("the model is read as a whole before it is placed: its files do not hold its weights by their own names")
        model = build(
            source,
            dtype=load_dtype(plan),
            device="cpu",  # to an accelerator it goes row by row
            attention=plan.strategy.attention,
            seed=plan.job.training.seed,
        )
        if _split_when_read(plan):
            plan.strategy.precision.cast_trained(dict(model.named_parameters()))
    folder = Path(tempfile.gettempdir())
    if in_memory(folder):
        folder = Path(plan.job.output)
    tier = DiskTier(folder)
    tier.require(placement.disk_bytes)
    if not tier.direct:
        say(f"{folder} has no direct input and output: what lives there passes through the page cache")
    engine = Engine(
        model,
        find_rows(model),
        placement.table,
        {"disk": tier},
        fill=fill,
        limit=placement.limit_bytes,
        update_limit=placement.update_limit_bytes,
        device=torch.device(plan.strategy.device),
    )
    if cost := getattr(engine.tiers.get("host"), "cost", ""):
        say(cost)
    return engine


@contextlib.contextmanager
def head_present(engine: Engine) -> Iterator[None]:
    """The weights of the model's head are on the device in this context, whoever calls it."""
    model: Any = engine.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    live = next((live for live in engine.rows if head in live.row.modules), None)
    if live is None:
        yield
        return
    live.pinned, before = True, live.pinned
    with engine.gathered(live):
        yield
        live.pinned = before


def _empty(plan: Plan, source: ModelSource) -> tuple[nn.Module | None, Fill | None]:
    """A model without its weights and what fills it row by row; None for both where that cannot be."""
    dtype, attention, masters = load_dtype(plan), plan.strategy.attention, _split_when_read(plan)
    if not source.has_weights:
        made, weights = build_lazily(source, dtype=dtype, attention=attention, seed=plan.job.training.seed)
        return made, from_random(weights, masters=masters)
    folder = weights_folder(source)
    if folder is None:
        return None, None
    model = build_empty(source, dtype=dtype, attention=attention)
    try:
        return model, from_folder(folder, model, masters=masters)
    except ModelError:
        return None, None


def _split_when_read(plan: Plan) -> bool:
    """Whether the weights that are read are float32 masters (`sartor.kernels.adam`)."""
    return plan.strategy.precision.masters and not plan.traits.adapter
