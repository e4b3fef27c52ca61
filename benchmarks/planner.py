"""How long planning takes, and how much memory the planner needs.

    python benchmarks/planner.py [--data FOLDER]

Each job is planned in a process of its own, after the libraries are imported: the whole plan once, then single forecasts of
further strategies (another micro-batch, recomputation, another number of shards). FOLDER holds configs/ (default: ../shared).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import SHARED, save

JOBS = {
    "llama-2-7b lora, H200": ("llama/llama-2-7b-hf.json", "lora", "H200-141GB", 8),
    "llama-2-7b full, 8 x A100": ("llama/llama-2-7b-hf.json", "full", "8xA100-80GB", 8),
    "llama-3.1-405b lora, 64 x H100": ("llama/Meta-Llama-3.1-405B.json", "lora", "8x8xH100-80GB", 64),
    "llama-3.1-405b full, 512 x H100": ("llama/Meta-Llama-3.1-405B.json", "full", "64x8xH100-80GB", 512),
    "deepseek-v3 full, 512 x H200": ("deepseek/DeepSeek-V3.json", "full", "64x8xH200-141GB", 512),
}


def job_of(name: str, data: Path) -> dict[str, Any]:
    """The job, its strategy pinned to what a large run would use: one trace a plan, as for a strategy that fits at once."""
    config, method, machine, batch = JOBS[name]
    return {
        "model": str(data / "configs" / config),
        "data": {"synthetic": {"length": 2048, "examples": batch}, "packing": False},
        "method": method,
        "training": {"epochs": 1, "global_batch": batch},
        "machine": machine,
        "strategy": {"micro_batch": 1, "recompute": "none" if "7b" in name else "full"},
    }


def measure(name: str, data: Path) -> dict[str, Any]:
    """In this process: seconds of a plan, of each further strategy, and peak resident memory."""
    import importlib

    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    import sartor
    from sartor.errors import DoesNotFit

    for module in ("plan.make", "predict.memory", "predict.stages"):
        importlib.import_module(f"sartor.{module}")
    importlib.import_module("torch.distributed.fsdp")
    job = job_of(name, data)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for strategy in (
        job["strategy"],
        {**job["strategy"], "recompute": "full"},
        {**job["strategy"], "recompute": "none"},
    ):
        start, cpu = time.perf_counter(), time.process_time()
        try:
            sartor.plan({**job, "strategy": strategy})
        except DoesNotFit:
            print(f"{name} {strategy}: does not fit, the time includes what was tried instead", file=sys.stderr)
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": times, "imported_gib": imported / 2**20, "peak_gib": peak / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.data)))
        return
    results: dict[str, Any] = {}
    for name in JOBS:
        command = [sys.executable, __file__, "--one", name, "--data", str(options.data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            results[name] = {"failed": done.stderr.strip().splitlines()[-1].replace(str(options.data), "…")}
            print(f"{name}: failed: {results[name]['failed']}")
            continue
        found = results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        first, *further = found["seconds"]
        again = statistics.mean(wall for wall, _ in further)
        figures = f"{first[0]:.2f} s ({first[1]:.2f} s of processor time), a further plan {again:.2f} s"
        print(f"{name}: {figures}, planner's memory {found['peak_gib']:.2f} GiB ({found['imported_gib']:.2f} after imports)")
    print("written:", save("planner", results))


if __name__ == "__main__":
    main()
