"""Forecast and measured peak resident memory of training on the CPU: small Llamas with random weights, through the command line.

    python benchmarks/memory_cpu.py [--only NAME …]

Each run is a process (`python -m sartor train`); its measurement is the one in run.json, the peak of the whole process. PyTorch
and transformers alone are about 440 MB of it, so no run is smaller than half a gigabyte. The forecasts are made in a process that
never trains: the plan's ("heap"), and for comparison the tensors' peak on its baseline ("tensors"). Constants of the forecast
were counted on other models (`sartor.predict.heap`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY, save

TOKENIZER = REPOSITORY / "src/sartor/demo/model"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model (width, layers, heads, vocabulary) and how it is trained."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    method: str = "full"
    recompute: str = "none"
    precision: str = "float32"
    length: int = 256
    batch: int = 8
    micro_batch: int = 8
    steps: int = 3


RUNS = {
    "1m": Case(width=128, layers=4, heads=4, vocabulary=1024, batch=16, micro_batch=16),
    "1m-accumulate": Case(width=128, layers=4, heads=4, vocabulary=1024, batch=16, micro_batch=2, length=128),
    "3m-recompute": Case(width=192, layers=6, heads=6, vocabulary=2048, recompute="full", length=512),
    "10m": Case(width=320, layers=6, heads=5, vocabulary=4096, length=512, batch=4, micro_batch=4),
    "10m-lora": Case(width=320, layers=6, heads=5, vocabulary=4096, method="lora", length=256),
    "25m-bf16": Case(width=448, layers=8, heads=7, vocabulary=8192, precision="bf16", batch=4, micro_batch=4),
    "60m": Case(width=640, layers=10, heads=10, vocabulary=8192, batch=4, micro_batch=4),
    "60m-long": Case(width=640, layers=10, heads=10, vocabulary=8192, length=1024, batch=2, micro_batch=1, recompute="full"),
    # In three steps the longest row never meets gradients and optimizer state at once, as it does in step 16.
    "60m-long-16": Case(
        width=640, layers=10, heads=10, vocabulary=8192, length=1024, batch=2, micro_batch=1, recompute="full", steps=16
    ),
    "10m-lora-12": Case(width=320, layers=6, heads=5, vocabulary=4096, method="lora", length=256, steps=12),
    "120m-lora-recompute": Case(
        width=768, layers=12, heads=12, vocabulary=16384, method="lora", recompute="full", length=512, batch=2, micro_batch=2
    ),
    "120m-lora": Case(width=768, layers=12, heads=12, vocabulary=16384, method="lora", length=256, batch=4, micro_batch=4),
    "250m": Case(width=1024, layers=16, heads=16, vocabulary=16384, batch=2, micro_batch=2, length=256),
    "500m": Case(width=1280, layers=20, heads=20, vocabulary=32000, batch=2, micro_batch=1, length=128, recompute="full"),
    "700m": Case(width=1536, layers=20, heads=16, vocabulary=32000, batch=1, micro_batch=1, length=128),
    "1500m-lora": Case(width=2048, layers=24, heads=16, vocabulary=32000, method="lora", batch=1, micro_batch=1, length=128),
}


def write_job(case: Case, folder: Path) -> Path:
    """Model, data and job of a case; the texts differ in length, as data does."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "intermediate_size": case.width * 43 // 16,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = random.Random(0)
    words = ["the", "tailor", "cuts", "a", "blue", "coat", "and", "sews", "it", "with", "small", "stitches", "by", "river"]
    lines = [" ".join(source.choices(words, k=source.randint(case.length // 4, case.length))) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    job = {
        "model": {"path": str(folder / "config.json"), "tokenizer": str(TOKENIZER), "random_weights": True},
        "data": {"path": str(folder / "text.txt"), "documents": "lines", "max_length": case.length, "packing": False},
        "method": case.method,
        "precision": case.precision,
        "training": {"max_steps": case.steps, "global_batch": case.batch},
        "strategy": {"micro_batch": case.micro_batch, "recompute": case.recompute},
        "output": str(folder / "run"),
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def forecast(path: Path) -> dict[str, Any]:
    """In this process: plan the job."""
    from sartor import api

    made = api.plan(str(path), ()).forecast
    if made.peak is None or made.process_bytes is None:
        raise SystemExit(made.reason)
    return {
        "baseline_bytes": made.baseline_bytes,
        "tensors_forecast_bytes": made.baseline_bytes + made.peak.total_bytes,
        "heap_forecast_bytes": made.process_bytes,
        "plan_seconds": round(made.trace_seconds, 2),
    }


def run(name: str) -> dict[str, Any]:
    """Forecast, then train, each in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        path = write_job(RUNS[name], Path(scratch))
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        said = subprocess.run(
            [sys.executable, __file__, "--forecast", str(path)], capture_output=True, text=True, env=environment
        )
        if said.returncode != 0:
            return {"run": name, "failed": said.stderr.strip()[-500:]}
        result: dict[str, Any] = {"run": name, **json.loads(said.stdout.splitlines()[-1])}
        done = subprocess.run(
            [sys.executable, "-m", "sartor", "train", str(path)], capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            return {"run": name, "failed": done.stderr.strip()[-500:]}
        record = json.loads((Path(scratch) / "run/run.json").read_text(encoding="utf-8"))
    measured = record["memory"]["measured_bytes"]
    result["measured_bytes"] = measured
    for kind in ("tensors", "heap"):
        result[f"{kind}_error_percent"] = (result[f"{kind}_forecast_bytes"] / measured - 1) * 100
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--forecast", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forecast:
        print(json.dumps(forecast(options.forecast)))
        return
    results = []
    for name in options.only:
        result = run(name)
        results.append(result)
        if "failed" in result:
            print(f"{name:20} FAILED: {result['failed']}", flush=True)
            continue
        print(
            f"{name:20} measured {result['measured_bytes'] / 2**20:7.0f} MiB   tensors {result['tensors_error_percent']:+6.1f} %"
            f"   heap {result['heap_error_percent']:+6.1f} %",
            flush=True,
        )
    done = [result for result in results if "failed" not in result]
    for kind in ("tensors", "heap"):
        errors = [abs(result[f"{kind}_error_percent"]) for result in done]
        print(f"{kind:8} median {statistics.median(errors):.1f} %, worst {max(errors):.1f} %")
    print("written:", save("memory-cpu", results))


if __name__ == "__main__":
    main()
