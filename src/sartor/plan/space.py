"""The strategies that a job may have on a machine: everything that it leaves open, within what can be run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sartor.errors import JobError
from sartor.plan.layouts import possible_layouts
from sartor.plan.setting import Setting
from sartor.plan.strategy import Strategy

FULL_MICRO_BATCH_TOKENS = 8192
"""A micro-batch of so many tokens keeps any device busy; a larger one costs memory and gains nothing."""


def candidates(setting: Setting, row_capacity: int, processes: int = 1) -> Iterator[Strategy]:
    """Strategies of so many processes that honour what the job pins: large micro-batches first, those that recompute last."""
    job, wanted = setting.job, setting.job.strategy
    longest = row_capacity if setting.packing else int(setting.sets.train.lengths.max())
    layouts = possible_layouts(wanted, setting.machine, global_batch=job.training.global_batch)
    for (recompute, recomputed), layout in itertools.product(_recomputations(setting), layouts):
        busy = min(-(-job.training.global_batch // (layout.data * processes)), max(FULL_MICRO_BATCH_TOKENS // longest, 1))
        sizes = [wanted.micro_batch] if wanted.micro_batch != "auto" else _halvings(busy)
        for micro_batch in sizes:
            yield Strategy(
                device=setting.machine.device.torch_name,
                threads=setting.machine.threads // processes,
                precision=setting.precision,
                packing=setting.packing,
                row_capacity=row_capacity,
                micro_batch=micro_batch,
                recompute=recompute,
                recomputed=recomputed,
                attention=setting.attention,
                share_prefixes=wanted.share_prefixes,
                prepack=wanted.prepack is True,
                layout=layout,
                processes=processes,
                expandable_segments=setting.expandable_segments,
            )


def _recomputations(setting: Setting) -> list[tuple[bool, int | None]]:
    """Whether blocks recompute, and if not all, how many. The search looks between none and all by itself. Raises JobError."""
    wanted, possible = setting.job.strategy.recompute, setting.method.recompute
    if wanted == "auto":
        return [(False, None), (True, None)] if possible else [(False, None)]
    if wanted == "none":
        return [(False, None)]
    if not possible:
        raise JobError(
            f"`strategy.recompute` is {wanted}, but method {setting.job.method} cannot recompute",
            remedy="strategy.recompute=none",
        )
    if wanted == "full":
        return [(True, None)]
    if not setting.blocks:
        raise JobError(
            f"`strategy.recompute` is {wanted} blocks, and this model's cannot recompute one by one",
            why="transformers switches it for the whole model there",
            remedy="strategy.recompute=full, or none",
        )
    return [(True, wanted if wanted < setting.blocks else None)]


def _halvings(size: int) -> list[int]:
    sizes = []
    while size >= 1:
        sizes.append(size)
        size //= 2
    return sizes
