"""Sartor fine-tunes any Hugging Face model on the machine you have: it predicts, plans, runs and reports.

The names below load their rooms when they are first used, so that `import sartor` and `sartor --help` are quick.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sartor.api import compare, load_job, plan, plan_inference, train
    from sartor.job import Job
    from sartor.machine import Machine, probe
    from sartor.placement import prepare
    from sartor.plan import Plan, Strategy
    from sartor.serve import Sampling, Session
    from sartor.train import Observer, Run

__version__ = "0.1.0"

_HOMES = {
    "compare": "sartor.api",
    "load_job": "sartor.api",
    "plan": "sartor.api",
    "plan_inference": "sartor.api",
    "train": "sartor.api",
    "Job": "sartor.job",
    "Machine": "sartor.machine",
    "prepare": "sartor.placement",
    "probe": "sartor.machine",
    "Plan": "sartor.plan",
    "Strategy": "sartor.plan",
    "Sampling": "sartor.serve",
    "Session": "sartor.serve",
    "Observer": "sartor.train",
    "Run": "sartor.train",
}

__all__ = [
    "Job",
    "Machine",
    "Observer",
    "Plan",
    "Run",
    "Sampling",
    "Session",
    "Strategy",
    "compare",
    "load_job",
    "plan",
    "plan_inference",
    "prepare",
    "probe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(_load(_HOMES[name]), name)
    if name == "api":
        return _load("sartor.api")
    raise AttributeError(f"module 'sartor' has no attribute {name!r}")


def _load(module: str) -> ModuleType:
    """Import it without looking for garbage meanwhile: libraries make a million objects that stay, and looking through them again
    and again takes as long as half of the rest."""
    running = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        if running:
            gc.enable()


class _Face(ModuleType):
    """`sartor.plan` and `sartor.train` are functions, though rooms have these names too: importing a room must not hide them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
