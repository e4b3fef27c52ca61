"""How long planning takes, and how much memory the planner needs.

    python benchmarks/planner.py [--data FOLDER]

Each job is planned in a process of its own, after the libraries are imported: the whole plan once, then with other strategies
pinned. Jobs of SEARCHES leave the strategy open: the whole search, in five processes by turns (the median counts; every one is in
the result), and what one more strategy takes in it (both estimates, memory and time, once the two traces behind them are there).
FOLDER holds configs/ (default: ../shared).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import SHARED, save

JOBS = {
    "llama-2-7b lora, H200": ("llama/llama-2-7b-hf.json", "lora", "H200-141GB", 8),
    "llama-2-7b full, 8 x A100": ("llama/llama-2-7b-hf.json", "full", "8xA100-80GB", 8),
    "llama-3.1-405b lora, 64 x H100": ("llama/Meta-Llama-3.1-405B.json", "lora", "8x8xH100-80GB", 64),
    "llama-3.1-405b full, 512 x H100": ("llama/Meta-Llama-3.1-405B.json", "full", "64x8xH100-80GB", 512),
    "deepseek-v3 lora, 64 x B200": ("deepseek/DeepSeek-V3.json", "lora", "8x8xB200-180GB", 64),
    "deepseek-v3 full, 512 x H200": ("deepseek/DeepSeek-V3.json", "full", "64x8xH200-141GB", 512),
}

SEARCHES = {
    "llama-2-7b full, 8 x A100, open": ("llama/llama-2-7b-hf.json", "full", "8xA100-80GB", 64),
    "llama-2-70b full, 64 x H100, open": ("llama/llama-2-70b.json", "full", "8x8xH100-80GB", 256),
}

SEARCHED = 5


def job_of(name: str, data: Path) -> dict[str, Any]:
    """The job, its strategy pinned to what a large run would use: one trace a plan, as for a strategy that fits at once."""
    config, method, machine, batch = (JOBS | SEARCHES)[name]
    return {
        "model": str(data / "configs" / config),
        "data": {"synthetic": {"length": 2048, "examples": batch}, "packing": False},
        "method": method,
        "training": {"epochs": 2, "global_batch": batch},
        "machine": machine,
        "strategy": {"micro_batch": 1, "recompute": "none" if "7b" in name else "full"} if name in JOBS else "auto",
    }


def measure(name: str, data: Path) -> dict[str, Any]:
    """In this process: seconds of a plan, of each further strategy, and peak resident memory."""
    import importlib

    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    for module in ("api", "plan.make", "predict.memory", "predict.stages"):
        importlib.import_module(f"sartor.{module}")
    importlib.import_module("torch.distributed.fsdp")
    job = job_of(name, data)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[tuple[float, float]] = []
    each = each_strategy() if name in SEARCHES else contextlib.nullcontext([])
    with each as estimates:
        plan_all(name, job, times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": times, "estimates": estimates, "imported_gib": imported / 2**20, "peak_gib": peak / 2**20}


@contextlib.contextmanager
def each_strategy() -> Iterator[list[float]]:
    """Seconds that the estimates of each strategy take in the searches of this context; traces are made for the first ones."""
    from sartor.plan.estimate import Estimator

    taken: list[float] = []
    time_of, bytes_of = Estimator.time, Estimator.bytes

    def timed(self: Any, strategy: Any) -> Any:
        start = time.perf_counter()
        found = time_of(self, strategy), bytes_of(self, strategy)
        taken.append(time.perf_counter() - start)
        return found[0]

    Estimator.time = timed  # type: ignore[method-assign]
    yield taken
    Estimator.time = time_of  # type: ignore[method-assign]


def plan_all(name: str, job: dict[str, Any], times: list[tuple[float, float]]) -> None:
    import sartor
    from sartor.errors import DoesNotFit

    pinned = job["strategy"]
    for strategy in [pinned] if name in SEARCHES else [pinned, {**pinned, "recompute": "full"}, {**pinned, "recompute": "none"}]:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            sartor.plan({**job, "strategy": strategy})
        except DoesNotFit:
            print(f"{name} {strategy}: does not fit, the time includes what was tried instead", file=sys.stderr)
        times.append((time.perf_counter() - start, time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.data)))
        return
    results: dict[str, Any] = {}
    for name in [*JOBS, *(name for _ in range(SEARCHED) for name in SEARCHES)]:
        command = [sys.executable, __file__, "--one", name, "--data", str(options.data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            results[name] = {"failed": done.stderr.strip().splitlines()[-1].replace(str(options.data), "…")}
            print(f"{name}: failed: {results[name]['failed']}")
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if name in SEARCHES:
            results[name] = [*(results[name] if isinstance(results.get(name), list) else []), found]
            continue
        results[name] = found
        first, *further = found["seconds"]
        figures = f"{first[0]:.2f} s ({first[1]:.2f} s of processor time)"
        figures += f", a further plan {statistics.mean(wall for wall, _ in further):.2f} s"
        print(f"{name}: {figures}, planner's memory {found['peak_gib']:.2f} GiB ({found['imported_gib']:.2f} after imports)")
    for name in SEARCHES:
        print(f"{name}: {searched(results[name])}")
    print("written:", save("planner", results))


def searched(runs: list[dict[str, Any]]) -> str:
    """What a search took, in words."""
    if not isinstance(runs, list):
        return "failed"
    walls = [run["seconds"][0][0] for run in runs]
    usual = statistics.median(taken for run in runs for taken in run["estimates"])
    seconds = f"{statistics.median(walls):.2f} s ({min(walls):.2f} to {max(walls):.2f} in {len(runs)} processes)"
    return f"{seconds} for {len(runs[0]['estimates'])} strategies, a further one {1000 * usual:.1f} ms"


if __name__ == "__main__":
    main()
