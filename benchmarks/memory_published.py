"""Score the memory forecast against figures that other projects measured on real accelerators and published.

    python benchmarks/memory_published.py [--data FOLDER]

FOLDER holds measured/published.csv and configs/ (default: ../shared). Nothing is fitted to these rows. A row is used where its
source says all that decides the figure; the others are counted with the reason for leaving them out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sartor
from common import SHARED, save
from sartor.step import assemble, loss

CONFIGS = {
    "SmolLM2-135M": "derived/llama/SmolLM2-135M.json",
    "SmolLM2-360M": "derived/llama/SmolLM2-360M.json",
    "SmolLM2-1.7B": "derived/llama/SmolLM2-1.7B.json",
    "TinyLlama-1.1B": "derived/llama/TinyLlama-1.1B.json",
    "Qwen2.5-0.5B": "derived/qwen/Qwen2.5-0.5B.json",
    "Qwen2.5-1.5B": "derived/qwen/Qwen2.5-1.5B.json",
    "gemma-2-2b": "derived/gemma/gemma-2-2b.json",
}
NOT_YET = {
    "LitGPT resource-tables": "LitGPT's own model code, and whether the longest example was reached is not said",
    "LitGPT config_hub": "LitGPT's own model code; figures may be copied between rows",
    "ms-swift v2 Benchmark": "per-model default targets, lengths or micro-batch are not said, or several devices",
    "Unsloth max-context": "a longest length, not a number of bytes",
}
FOUND_IN_SOURCE = {"exact torch/transformers minor version; double quant flag"}
"""What the table calls unknown and fitcheck's repository says (data/measurements/t4-qlora-2026-09-01.json): torch 2.10.0+cu128,
transformers 5.0.0, peft 0.19.1, double_quant false."""


def left_out(row: dict[str, str]) -> str:
    """Why a row is not used, or nothing."""
    if row["source"] in NOT_YET:
        return NOT_YET[row["source"]]
    if row["source"] != "fitcheck":
        return f"{row['source']}: {row['unknown'] or 'the tool that read the figure is not said'}"
    if row["unknown"] and row["unknown"] not in FOUND_IN_SOURCE:
        return f"fitcheck: {row['unknown']}"
    return "" if row["model"] in CONFIGS else f"no configuration of {row['model']} at hand"


def job_of(row: dict[str, str], folder: Path) -> dict[str, Any]:
    """The run of fitcheck's scripts/measure.py as a job.

    Weights in float16, adapters in float32, no autocast, transformers' loss, PyTorch's default AdamW, no clipping, one batch of
    random tokens, all of them trained. Its QLoRA: NF4 without double quantisation, computed in float16, and PEFT's
    `prepare_model_for_kbit_training`, which makes float32 of all that is not quantised.
    """
    quantise = (
        {"quantise": {"mode": "nf4", "double": False, "compute": "float16", "upcast": True}} if row["quant"] == "nf4" else {}
    )
    batch, length = int(row["micro_batch"]), int(row["seq_len"])
    return {
        "model": str(folder / "configs" / CONFIGS[row["model"]]),
        "data": {"synthetic": {"length": length, "examples": batch}, "packing": False},
        "method": row["method"],
        **quantise,
        "lora": {"rank": int(row["lora_r"]), "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "training": {"epochs": 2, "global_batch": batch, "clip_norm": 0, "optimizer": "adamw-foreach", "loss": "hf"},
        "precision": {"weights": "float16", "trained": "float32", "compute": "as-stored"},
        "machine": "T4-16GB",
        "strategy": {
            "micro_batch": batch,
            "expandable_segments": False,
            "attention": row["attention"].removesuffix("-mem-efficient"),
            "recompute": "full" if row["grad_ckpt"].startswith("on") else "none",
        },
    }


@contextlib.contextmanager
def outputs_held() -> Iterator[None]:
    """Their harness runs `out = model(…); out.loss.backward()`: the logits in `out` live until the next step's are there."""
    original = loss._transformers_loss
    held: list[Any] = []

    def patched(model: Any, inputs: dict[str, Any], batch: Any) -> Any:
        hook = model.register_forward_hook(lambda module, arguments, output: held.append(output))
        summed = original(model, inputs, batch)
        hook.remove()
        del held[:-1]
        return summed

    loss._transformers_loss = patched
    try:
        yield
    finally:
        loss._transformers_loss = original


@contextlib.contextmanager
def embedded_inputs_require_gradients() -> Iterator[None]:
    """With recomputation, their harness has the embeddings' output require a gradient (`enable_input_require_grads`)."""
    original = assemble.enable_recompute

    def patched(model: Any) -> None:
        original(model)
        model.enable_input_require_grads()

    assemble.enable_recompute = patched
    try:
        yield
    finally:
        assemble.enable_recompute = original


@contextlib.contextmanager
def expanded_groups() -> Iterator[None]:
    """Their harness expands grouped keys and values before SDPA: the memory-efficient kernel of a T4 wants it so."""
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def patched(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        groups = query.size(-3) // key.size(-3)
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
            options.pop("enable_gqa", None)
        return original(query, key, value, *args, **options)

    functional.scaled_dot_product_attention = patched  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def score(row: dict[str, str], folder: Path) -> dict[str, Any]:
    """Forecast and measurement of one row, in MiB."""
    measured = float(row["measured"])
    with outputs_held(), expanded_groups(), embedded_inputs_require_gradients(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forecast = sartor.plan(job_of(row, folder)).forecast
    assert row["metric"] == "max_memory_allocated", row["metric"]
    assert row["unit"] == "MiB", row["unit"]
    if forecast.allocated_bytes is None:
        return {"row": row, "measured_mib": measured, "forecast_mib": None, "reason": forecast.reason.replace(str(folder), "…")}
    mib = forecast.allocated_bytes / 2**20
    return {"row": row, "measured_mib": measured, "forecast_mib": mib, "error_percent": (mib / measured - 1) * 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    folder = parser.parse_args().data
    with (folder / "measured/published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    reasons = Counter(left_out(row) for row in rows)
    results = []
    for row in rows:
        if left_out(row):
            continue
        result = score(row, folder)
        results.append(result)
        name = f"{row['model']} {row['method']} {row['attention']} {row['micro_batch']} x {row['seq_len']}"
        if result["forecast_mib"] is None:
            print(f"{name:40} cannot say: {result['reason']}")
        else:
            figures = f"{result['forecast_mib']:8.0f} MiB, measured {result['measured_mib']:.0f}"
            print(f"{name:40} {figures}: {result['error_percent']:+.1f} %")
    errors = sorted(abs(result["error_percent"]) for result in results if result["forecast_mib"] is not None)
    tenth = errors[min(int(0.9 * len(errors)), len(errors) - 1)]
    middle = statistics.median(errors)
    print(f"{len(results)} rows used, {len(errors)} forecast: median {middle:.1f} %, 90th percentile {tenth:.1f} %")
    skipped = {reason: count for reason, count in reasons.most_common() if reason}
    print(f"{sum(skipped.values())} rows left out:")
    for reason, count in skipped.items():
        print(f"  {count:3} {reason}")
    print("written:", save("memory-published", {"rows": results, "left_out": skipped}))


if __name__ == "__main__":
    main()
