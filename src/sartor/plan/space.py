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
    again_possible = setting.method.recompute
    if wanted.recompute == "full" and not again_possible:
        raise JobError(
            f"`strategy.recompute` is full, but method {job.method} cannot recompute", remedy="strategy.recompute=none"
        )
    longest = row_capacity if setting.packing else int(setting.sets.train.lengths.max())
    layouts = possible_layouts(wanted, setting.machine, global_batch=job.training.global_batch)
    choices = {"none": (False,), "full": (True,), "auto": (False, True) if again_possible else (False,)}
    for recompute, layout in itertools.product(choices[wanted.recompute], layouts):
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
                attention=setting.attention,
                share_prefixes=wanted.share_prefixes,
                layout=layout,
                processes=processes,
                expandable_segments=setting.expandable_segments,
            )


def _halvings(size: int) -> list[int]:
    sizes = []
    while size >= 1:
        sizes.append(size)
        size //= 2
    return sizes
