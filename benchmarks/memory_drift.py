"""Reserved memory by the order of lengths: the same micro-batches, longest first, mixed and rising, through PyTorch's allocator.

    python benchmarks/memory_drift.py [--data FOLDER]

FOLDER holds configs/ (default: ../shared). LoRA of Llama-3.2-3B with transformers' loss on a card without limit, for compute
capability 8.0; nothing is run, every number is a forecast.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from common import SHARED, save
from sartor.job import from_mapping
from sartor.model import resolve
from sartor.predict.allocator import AllocatorConfig
from sartor.predict.drift import replay_steps
from sartor.predict.shapes import Family, Shape, blank_batch
from sartor.predict.target import Target
from sartor.predict.whole import trace_job
from sartor.step import Precision

CONFIG = "configs/derived/llama/Llama-3.2-3B.json"
TARGET = Target(kind="cuda", sm=80)
ROWS, LONGEST, COUNT = 4, 768, 12
TRACED = (Shape(ROWS, LONGEST, LONGEST - 1), Shape(ROWS, 581, 411), Shape(ROWS - 1, 383, 300))


def family(folder: Path) -> Family:
    """The step of the job, at any size."""
    job = from_mapping(
        {
            "model": str(folder / CONFIG),
            "data": {"synthetic": {"length": LONGEST}},
            "lora": {"rank": 32, "targets": ["q_proj", "v_proj"]},
            "training": {"loss": "hf"},
        }
    )
    traces = []
    for shape in TRACED:
        ledger = trace_job(
            job,
            resolve(job.model),
            [blank_batch(shape, packing=False)],
            TARGET,
            precision=Precision.of("bf16-mixed"),
            recompute=False,
            attention=None,
        )
        traces.append((shape, TARGET.with_workspace(ledger)))
    return Family(traces, ledger.kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    known = family(parser.parse_args().data)
    chance = random.Random(0)
    rising = [*sorted(chance.randint(100, LONGEST) for _ in range(COUNT - 1)), LONGEST]
    orders = {
        "every one the longest": [LONGEST] * COUNT,
        "the longest first": rising[::-1],
        "mixed": chance.sample(rising, COUNT),
        "rising": rising,
    }
    results = []
    print(f"{'order':24}{'default':>12}{'expandable':>12}")
    for name, widths in orders.items():
        steps = [[Shape(ROWS, width, width - 1)] for width in widths]
        reserved = [
            replay_steps(known, steps, AllocatorConfig(expandable_segments=expand)).peak_bytes for expand in (False, True)
        ]
        print(f"{name:24}" + "".join(f"{size / 2**30:8.1f} GiB" for size in reserved))
        results.append({"order": name, "widths": widths, "default_bytes": reserved[0], "expandable_bytes": reserved[1]})
    print("written:", save("memory-drift", {"model": Path(CONFIG).stem, "rows": ROWS, "orders": results}))


if __name__ == "__main__":
    main()
