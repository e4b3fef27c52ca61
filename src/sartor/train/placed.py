"""A plan's model in its places: streamed from its files, where they have the model's own names, and never whole in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from sartor.errors import ModelError
from sartor.model import ModelSource, build, build_empty
from sartor.model.rows import find_rows
from sartor.placement import DiskTier, Engine
from sartor.placement.fill import Fill, from_folder
from sartor.placement.tiers import in_memory
from sartor.plan import Plan, load_dtype


def build_placed(plan: Plan, source: ModelSource, say: Callable[[str], None]) -> Engine:
    """The model of `plan` with its rows where the strategy's table puts them. Raises ModelError, or RunError of the disk."""
    placement = plan.strategy.placement
    assert placement is not None, "asked for by the strategy"
    model, fill = _streamed(plan, source)
    if model is None:
        say("the model is read as a whole before it is placed: its files do not hold its weights by their own names")
        model = build(
            source,
            dtype=load_dtype(plan),
            device=plan.strategy.device,
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
    return Engine(
        model,
        find_rows(model),
        placement.table,
        {"disk": tier},
        fill=fill,
        limit=placement.limit_bytes,
        update_limit=placement.update_limit_bytes,
    )


def _streamed(plan: Plan, source: ModelSource) -> tuple[nn.Module | None, Fill | None]:
    """An empty model and what fills it; None for both where that cannot be."""
    folder = Path(source.path)
    if not source.has_weights or not folder.is_dir():
        return None, None
    model = build_empty(source, dtype=load_dtype(plan), attention=plan.strategy.attention)
    try:
        return model, from_folder(folder, model, masters=_split_when_read(plan))
    except ModelError:
        return None, None


def _split_when_read(plan: Plan) -> bool:
    """Whether the weights that are read are float32 masters (`sartor.kernels.adam`)."""
    return plan.strategy.precision.masters and not plan.traits.adapter
