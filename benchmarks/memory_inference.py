"""Score the forecast of generation against figures that others measured and published. Nothing is fitted to these rows.

    python benchmarks/memory_inference.py [--data FOLDER]

FOLDER holds configs/ (default: ../shared); rows whose configuration is not there are left out. OctoCoder's is below.

Peaks: Hugging Face, "Optimizing LLMs for Speed and Memory" (transformers, docs/source/en/llm_tutorial_optimization.md, 2023):
`torch.cuda.max_memory_allocated` of a text-generation pipeline on one A100, 60 new tokens after a prompt of one line, batch 1.
In 8 and 4 bits the page loads with `load_in_8bit=True` and `load_in_4bit=True` and nothing else: weights stored as float16
before, 4-bit blocks without double quantisation, computing in float32. bitsandbytes of that time took more on the way than the
version that the forecast follows (0.50): a second layout of each int8 matrix while it was made
(`F.transform(state.CB, …)`), and 4-bit matrices dequantised to float16 before they were cast to float32
(`F.dequantize_4bit(B, state).to(A.dtype)`).

Caches: what llama.cpp says that it allocates for keys and values of 2048 tokens in float16, collected in a discussion of
dranger003/c4ai-command-r-v01-iMat.GGUF on the hub (number 6, 2024).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import SHARED, save
from sartor.job import from_mapping
from sartor.plan.inference import forecast_inference

GIB, MIB = 2**30, 2**20


def octocoder() -> Any:
    """bigcode/octocoder: StarCoder, 15.5 billion parameters."""
    from transformers import GPTBigCodeConfig

    return GPTBigCodeConfig(
        vocab_size=49152,
        n_positions=8192,
        n_embd=6144,
        n_layer=40,
        n_head=48,
        n_inner=24576,
        multi_query=True,
        bos_token_id=0,
        eos_token_id=0,
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published figure: the peak of allocated memory, or the size of the cache."""

    name: str
    config: str = ""
    """In FOLDER/configs; empty: OctoCoder."""
    measured_bytes: float
    what: str = "allocated"
    keys: dict[str, Any] = field(default_factory=dict)


_PROMPT = {"prompt": 25, "answer": 60}  # the prompt is 84 characters; ten tokens more or less are 0.4 MiB
_FOUR_BITS = {"mode": "nf4", "double": False, "compute": "float32"}
_CACHE = {"prompt": 2000, "answer": 49, "dtype": "float16"}  # the last token of an answer is not fed back: 2048 are in the cache
ROWS = [
    Row(
        name="OctoCoder bfloat16",
        measured_bytes=29.0260648727417 * GIB,
        keys={"inference": {**_PROMPT, "dtype": "bfloat16"}},
    ),
    Row(
        name="OctoCoder int8",
        measured_bytes=15.219234466552734 * GIB,
        keys={"inference": {**_PROMPT, "dtype": "float16"}, "quantise": "int8"},
    ),
    Row(
        name="OctoCoder 4 bits",
        measured_bytes=9.543574333190918 * GIB,
        keys={"inference": {**_PROMPT, "dtype": "float16"}, "quantise": _FOUR_BITS},
    ),
    Row(name="Llama-3-8B", config="llama/llama-3-8b.json", measured_bytes=256 * MIB, what="cache", keys={"inference": _CACHE}),
    Row(name="Llama-3-70B", config="llama/llama-3-70b.json", measured_bytes=640 * MIB, what="cache", keys={"inference": _CACHE}),
    Row(
        name="Mixtral-8x7B",
        config="mistral/Mixtral-8x7B-v0.1.json",
        measured_bytes=256 * MIB,
        what="cache",
        keys={"inference": _CACHE},
    ),
]


def score(row: Row, configs: Path) -> dict[str, Any]:
    """Forecast and published figure of one row."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = configs / row.config
        if not row.config:
            octocoder().save_pretrained(folder)
            path = Path(folder) / "config.json"
        job = from_mapping({"model": str(path), "machine": "A100-80GB", **row.keys})
        forecast = forecast_inference(job)
    found = forecast.cache_bytes if row.what == "cache" else forecast.memory.allocated_bytes
    if found is None:
        return {"name": row.name, "what": row.what, "published_bytes": row.measured_bytes, "reason": forecast.memory.reason}
    error = (found / row.measured_bytes - 1) * 100
    return {
        "name": row.name,
        "what": row.what,
        "published_bytes": row.measured_bytes,
        "forecast_bytes": found,
        "error_percent": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    configs = parser.parse_args().data / "configs"
    results = []
    for row in ROWS:
        if row.config and not (configs / row.config).is_file():
            print(f"{row.name:20} left out: no {row.config}")
            continue
        result = score(row, configs)
        results.append(result)
        if "reason" in result:
            print(f"{row.name:20} cannot say: {result['reason']}")
            continue
        figures = f"{result['forecast_bytes'] / GIB:7.3f} GiB, published {row.measured_bytes / GIB:.3f}"
        print(f"{row.name:20} {row.what:9} {figures}: {result['error_percent']:+.2f} %")
    print("written:", save("memory-inference", results))


if __name__ == "__main__":
    main()
