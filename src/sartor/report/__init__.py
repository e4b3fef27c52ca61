"""What users see: the plan, the run while it goes and afterwards, on the terminal and as a page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sartor.report.terminal import show_plan, show_run

if TYPE_CHECKING:
    from sartor.report.html import write_report
    from sartor.report.inference import show_inference
    from sartor.report.machine import machine_mapping, show_machine
    from sartor.report.machines import show_comparison
    from sartor.report.plan_page import write_plan
    from sartor.report.progress import Progress

__all__ = [
    "Progress",
    "machine_mapping",
    "show_comparison",
    "show_inference",
    "show_machine",
    "show_plan",
    "show_run",
    "write_plan",
    "write_report",
]

_LATE = {
    "Progress": "sartor.report.progress",
    "machine_mapping": "sartor.report.machine",
    "show_comparison": "sartor.report.machines",
    "show_inference": "sartor.report.inference",
    "show_machine": "sartor.report.machine",
    "write_plan": "sartor.report.plan_page",
    "write_report": "sartor.report.html",
}


def __getattr__(name: str) -> Any:
    """These need the training room, the template engine or the plan of inference, which showing a plan must not import."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
