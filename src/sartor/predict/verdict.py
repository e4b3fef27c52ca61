"""Does it fit: what is needed beside what there is."""

from __future__ import annotations

from typing import Literal

from sartor.job.units import format_bytes
from sartor.predict.allocator import Reserved

Verdict = Literal["fits", "tight", "does not fit", "cannot say"]

TIGHT_SHARE = 0.9
"""Above this share of what is available a forecast is called tight. On a CPU, where part of the heap's gaps is chance, the
forecast was at most 7.9 % low (benchmarks/memory_cpu.py), and 7 % on the models it was developed with."""


def judge(needed: int, available: int, share: float, reserved: Reserved | None) -> tuple[Verdict, str]:
    """On an accelerator what counts is whether the allocator gets through; emptying its cache on the way is called tight."""
    text = f"needs {format_bytes(needed)} of {format_bytes(available)}"
    if reserved is not None and reserved.out_of_memory is not None:
        moment = reserved.out_of_memory
        text = text if needed > available else f"needs more than {format_bytes(available)}"
        return "does not fit", f"{text}: memory runs out in {moment.phase}"
    if needed > available:
        return "does not fit", text
    if needed > share * available or (reserved is not None and reserved.retries):
        return "tight", text
    return "fits", text
