"""Run every recipe on real data through the command line: held-out loss before and after, time, memory forecast beside measured.

    python benchmarks/recipes.py [--data FOLDER] [--only NAME …]

The recipes name a small model and data files that are not part of the project; FOLDER holds them (default: ../shared).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import REPOSITORY, SHARED, save

MODEL = "models/stories260K-hf"
RUNS: dict[str, tuple[str, str, list[str]]] = {
    "shakespeare-full": ("shakespeare", "data/text/tinyshakespeare.txt", []),
    "shakespeare-lora": ("shakespeare", "data/text/tinyshakespeare.txt", ["method=lora", "training.learning_rate=5e-3"]),
    "shakespeare-prefix": ("shakespeare", "data/text/tinyshakespeare.txt", ["method=prefix", "training.learning_rate=3e-2"]),
    "gsm8k": ("gsm8k", "data/gsm8k/train.jsonl", []),
    "alpaca": ("alpaca", "data/alpaca/alpaca_random_9k.json", []),
    "sharegpt": ("sharegpt", "data/llamafactory/glaive_toolcall_en_demo.json", []),
    "messages": ("messages", "data/llamafactory/v1_sft_demo.jsonl", []),
    "advertisegen": ("advertisegen", "data/advertisegen/dev.json", []),
}


def run(name: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """One recipe in a process of its own; figures from its run.json."""
    recipe, data, overrides = RUNS[name]
    output = scratch / name
    command = [sys.executable, "-m", "sartor", "train", str(REPOSITORY / f"recipes/{recipe}.yaml"), *overrides]
    command += [f"model={folder / MODEL}", f"data.path={folder / data}", f"output={output}"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        return {"run": name, "failed": done.stderr.strip()}
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    memory = record["memory"]
    return {
        "run": name,
        "eval_loss_before": record["first_eval_loss"],
        "eval_loss_after": record["last_eval_loss"],
        "wall_seconds": seconds,
        "train_seconds": record["seconds"],
        "tokens_per_second": record["tokens_per_second"],
        "forecast_bytes": memory["forecast_bytes"],
        "measured_bytes": memory["measured_bytes"],
        "memory_error_percent": memory["error_percent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only:
            result = run(name, options.data, Path(scratch))
            results.append(result)
            if "failed" in result:
                print(f"{name:20} FAILED: {result['failed']}")
                continue
            print(
                f"{name:20} held-out loss {result['eval_loss_before']:.3f} -> {result['eval_loss_after']:.3f}   "
                f"{result['wall_seconds']:5.0f} s   memory forecast {result['forecast_bytes'] / 2**20:.0f} MiB, "
                f"measured {result['measured_bytes'] / 2**20:.0f} MiB ({result['memory_error_percent']:+.1f} %)",
                flush=True,
            )
    print("written:", save("recipes", results))


if __name__ == "__main__":
    main()
