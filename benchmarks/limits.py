"""Limits honoured: random jobs under `machine.host_memory`, each run in a process that cannot have more.

    python benchmarks/limits.py [--fits 20] [--refused 10] [--seed 0] [--host-memory 3GiB] [--seconds 300]

Each job is planned with the limit. Where the plan says that it fits (or is tight), `sartor train` runs it to the end in a memory
control group of that size, whose processes are killed when they take more (where none can be made: under RLIMIT_DATA, which
counts every private writable mapping); where it does not, the refusal has to name something that would help, or say that nothing
does. Jobs are drawn until there are enough of both; three in ten are of 0.1 to 20 billion parameters, two thirds of these with
everything to stay on the device. Counts as broken: a run that does not end with exit code 0, and a refusal without a remedy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common import save
from sartor.job.units import parse_bytes

BASE = Path(__file__).parents[1] / "src/sartor/demo/model"
STEPS = 3
CGROUPS = Path("/sys/fs/cgroup")
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "n_embd", "n_layer", "vocab_size")


def draw(rng: random.Random, folder: Path, *, large: bool) -> dict[str, Any]:
    """A model's configuration, written to `folder`, and a job for it."""
    from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    heads = rng.choice([12, 24, 48] if large else [4, 8, 12])
    hidden = heads * rng.choice([64, 96, 128] if large else [32, 64])
    layers = rng.choice([16, 24, 32]) if large else rng.choice([2, 4, 8, 12])
    vocab = max(len(tokenizer), rng.choice([4096, 16384, 32000, *([128256] if large else [])]))
    kind = rng.choice(["llama", "gpt2", "qwen3"])
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=vocab, n_positions=2048)
    else:
        made = LlamaConfig if kind == "llama" else Qwen3Config
        config = made(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads // 2, head_dim=hidden // heads, vocab_size=vocab, max_position_embeddings=2048,
        )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    batch = rng.choice([4, 8, 16])
    return {
        "model": {"path": str(folder / "config.json"), "tokenizer": str(folder)},
        "data": {"synthetic": {"length": rng.choice([64, 128, 256, 512]), "examples": 4 * batch}},
        "method": rng.choice(["full", "lora"]),
        "training": {"global_batch": batch, "max_steps": STEPS, "epochs": 4, "tensorboard": False},
        "precision": rng.choice(["float32", "auto"]),
        "strategy": {
            "recompute": rng.choice(["auto", "auto", "none"]),
            "placement": rng.choice(["auto", "device", "device"] if large else ["auto"]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=20)
    parser.add_argument("--refused", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host-memory", default="3GiB")
    parser.add_argument("--seconds", type=float, default=300, help="a job whose forecast is longer is drawn again")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    count = {"ran": 0, "refused": 0, "broken": 0}
    with tempfile.TemporaryDirectory() as scratch:
        number = 0
        while count["ran"] < options.fits or count["refused"] < options.refused:
            number += 1
            job = draw(rng, Path(scratch) / f"model-{number}", large=count["ran"] >= options.fits or rng.random() < 0.3)
            job["machine"] = {"host_memory": options.host_memory}
            job["output"] = str(Path(scratch) / f"run-{number}")
            row = judged(job, Path(scratch) / f"job-{number}.yaml", options, count)
            if row is not None:
                rows.append({"job": described(job), **row})
                print(f"{number}: {rows[-1]}", flush=True)
    print(count)
    print("written:", save("limits", {"host_memory": options.host_memory, "seed": options.seed, **count, "jobs": rows}))


def judged(job: dict[str, Any], path: Path, options: argparse.Namespace, count: dict[str, int]) -> dict[str, Any] | None:
    """Plan the job under the limit, and run it under the limit where it is said to fit; None where there are enough such jobs."""
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    limit = parse_bytes(options.host_memory)
    planned = sartor(["plan", str(path), "--json"], limit)
    if planned.returncode == 2 and "does not fit" in planned.stderr:
        if count["refused"] >= options.refused:
            return None
        helped = "try: " in planned.stderr
        count["refused" if helped else "broken"] += 1
        return {"outcome": "refused", "remedy": planned.stderr.partition("try: ")[2].strip()[:300]}
    if planned.returncode:
        count["broken"] += 1
        return {"outcome": "plan failed", "said": planned.stderr[-300:]}
    plan = json.loads(planned.stdout)
    if count["ran"] >= options.fits:
        return None
    time = plan["time"]["step_seconds"] * STEPS if plan["time"] else 0.0
    if time > options.seconds:
        return None
    done = sartor(["train", str(path)], limit)
    count["ran" if done.returncode == 0 else "broken"] += 1
    row: dict[str, Any] = {"outcome": "ran" if done.returncode == 0 else "failed", "verdict": plan["verdict"]}
    if done.returncode:
        return {**row, "said": (done.stderr or done.stdout)[-400:]}
    record = json.loads((Path(job["output"]) / "run.json").read_text(encoding="utf-8"))
    forecast, measured = record["memory"]["forecast_bytes"], record["memory"]["measured_bytes"]
    return {**row, "forecast_mib": forecast >> 20, "measured_mib": measured >> 20, "again": "Going on with" in done.stdout}


def sartor(arguments: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    """The command line in a process that cannot have more than `limit` bytes."""
    with group(limit) as tasks:

        def enter() -> None:
            if tasks is None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            else:
                tasks.write_text(str(os.getpid()), encoding="ascii")

        command = [sys.executable, "-m", "sartor.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter)


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path | None]:
    """A memory control group of that size, as the file that takes processes in; None where one cannot be made."""
    for root, most, tasks in ((CGROUPS / "memory", "memory.limit_in_bytes", "tasks"), (CGROUPS, "memory.max", "cgroup.procs")):
        folder = root / f"limits-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / most).write_text(str(limit), encoding="ascii")
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield folder / tasks
        finally:
            folder.rmdir()
        return
    yield None


def described(job: dict[str, Any]) -> dict[str, Any]:
    """The job without paths."""
    config = json.loads(Path(job["model"]["path"]).read_text(encoding="utf-8"))
    parts = {name: job[name] for name in ("data", "method", "precision", "strategy")}
    return {"model": {name: config[name] for name in SIZES if name in config}, "batch": job["training"]["global_batch"], **parts}


if __name__ == "__main__":
    main()
