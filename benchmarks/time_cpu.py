"""Forecast and measured seconds of a training step on this machine: small models with random weights, through the command line.

    python benchmarks/time_cpu.py [--quick] [--only NAME …] [--ranking] [--after FILE] [--save]

Before every job the machine is calibrated (`sartor machine --calibrate`), then the job is forecast and run (`python -m sartor
train`, a process of its own); with `--ranking` the machine is calibrated once, before the first. Measured is the median step of
metrics.jsonl after warm-up; where lengths differ, forecast and measurement are both means over the run. A machine that others
share changes while a job runs: where the calibration after it would have forecast another time by more than a tenth ("drift"),
the job is run again, up to three times; all tries are in the file, and the one with the least drift counts, whatever its error.

`--after FILE` goes on where an earlier run was interrupted: FILE has what it printed, and its jobs are not run again.

`--ranking` runs candidates of small jobs (micro-batches, packing, recomputation) and tells how much slower than the fastest of
them the planner's own choice is, and the one with the shortest forecast. Candidates that are forecast to take more than 1.6 times
as long as the shortest are listed and not run; those that took at most 1.1 times as long as the fastest run once more, and the
shorter of both runs counts.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import REPOSITORY, save
from sartor import api
from sartor.machine import probe
from sartor.machine.calibration import Calibration, find_calibration

TOKENIZER = REPOSITORY / "src/sartor/demo/model"
WARM_UP = 2
LEAST_SECONDS, MOST_STEPS = 6.0, 100
"""Of a run, where steps are short: those of a process's first second are not yet what the others are."""
STEADY, TRIES = 0.1, 3
"""By how much forecasts with the calibrations before and after a job may differ, and how often a job is run until they do not."""
CALIBRATIONS = 3
"""How often to begin again where other processes spoil one."""
NOT_RUN_BEYOND = 1.6
"""Times the shortest forecast."""
NEAR = 1.1
"""Times the fastest run: close enough for what else the machine does to decide."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model (kind, width, layers, heads, vocabulary) and how it is trained. `ragged`: texts of a quarter of the length up."""

    kind: str = "llama"
    width: int
    layers: int
    vocabulary: int = 4096
    method: str = "full"
    precision: str = "float32"
    recompute: str = "none"
    length: int = 256
    batch: int = 8
    micro_batch: int | str = 8
    packing: bool | str = False
    ragged: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "1m": Case(width=128, layers=4, length=128, batch=16, micro_batch=16),
    "1m-short": Case(width=128, layers=4, length=64, batch=4, micro_batch=1),
    "3m-gpt2": Case(kind="gpt2", width=192, layers=6, length=256),
    "3m-recompute": Case(width=192, layers=6, length=512, recompute="full", batch=4, micro_batch=4),
    "10m": Case(width=320, layers=6, length=512, batch=4, micro_batch=4),
    "10m-lora": Case(width=320, layers=6, method="lora"),
    "10m-prefix": Case(width=320, layers=6, method="prefix", length=128),
    "10m-ragged": Case(width=320, layers=6, ragged=True, length=256, batch=16, micro_batch=4),
    "10m-packed": Case(width=320, layers=6, ragged=True, packing=True, length=256, batch=16, micro_batch=4),
    "25m-bf16": Case(width=448, layers=8, vocabulary=8192, precision="bf16", batch=4, micro_batch=4),
    "25m-master": Case(width=448, layers=8, vocabulary=8192, precision="bf16-master", batch=8, micro_batch=4),
    "25m-qwen3": Case(kind="qwen3", width=512, layers=8, vocabulary=8192, batch=4, micro_batch=2),
    "60m": Case(width=640, layers=10, vocabulary=8192, batch=4, micro_batch=4),
    "60m-long": Case(width=640, layers=10, vocabulary=8192, length=1024, batch=2, micro_batch=1, recompute="full"),
    "120m-lora-recompute": Case(
        width=768, layers=12, vocabulary=16384, method="lora", recompute="full", length=512, batch=2, micro_batch=2
    ),
    "120m-lora-bf16": Case(
        width=768, layers=12, vocabulary=16384, method="lora", precision="bf16-mixed", length=256, batch=4, micro_batch=4
    ),
    "200m": Case(width=896, layers=16, vocabulary=16384, batch=2, micro_batch=1, length=128),
}
QUICK = ("1m", "3m-gpt2", "10m-lora", "10m-ragged")

RANKED = {
    "1m": RUNS["1m"],
    "1m-ragged": Case(width=128, layers=4, ragged=True, length=128, batch=16, micro_batch=16),
    "1m-lora": Case(width=128, layers=4, method="lora", ragged=True, length=128, batch=16, micro_batch=16),
    "3m-gpt2": Case(kind="gpt2", width=192, layers=6, ragged=True, length=256),
    "3m-long": Case(width=192, layers=6, length=512, batch=4, micro_batch=4),
    "5m-vocabulary": Case(width=192, layers=4, vocabulary=16384, ragged=True, length=128),
    "10m-short": Case(width=320, layers=6, ragged=True, length=64, batch=16, micro_batch=16),
    "10m-lora": Case(width=320, layers=6, method="lora", ragged=True),
    "10m-master": Case(width=320, layers=6, precision="bf16-master", ragged=True, length=128),
    "10m-qwen3": Case(kind="qwen3", width=256, layers=6, ragged=True, length=128),
}


def config(case: Case) -> dict[str, Any]:
    """The model's config.json."""
    heads = max(case.width // 64, 2)
    if case.kind == "gpt2":
        sizes = {
            "n_embd": case.width,
            "n_layer": case.layers,
            "n_head": heads,
            "n_positions": 2048,
            "vocab_size": case.vocabulary,
        }
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes}
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[case.kind]],
        "model_type": case.kind,
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "intermediate_size": case.width * 43 // 16,
        "num_hidden_layers": case.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if case.kind == "llama" else max(heads // 2, 1),
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def write_job(case: Case, folder: Path, steps: int) -> Path:
    """Model, data and job of a case."""
    (folder / "config.json").write_text(json.dumps(config(case)), encoding="utf-8")
    source = random.Random(0)
    words = ["the", "tailor", "cuts", "a", "blue", "coat", "and", "sews", "it", "with", "small", "stitches", "by", "river"]
    lines = [" ".join(source.choices(words, k=source.randint(case.length // 4, case.length))) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    data: dict[str, Any] = {"path": str(folder / "text.txt"), "documents": "lines", "max_length": case.length}
    if not case.ragged:
        data = {"synthetic": {"length": case.length, "examples": 400}, "max_length": case.length}
    job = {
        "model": {"path": str(folder / "config.json"), "tokenizer": str(TOKENIZER), "random_weights": True},
        "data": {**data, "packing": case.packing},
        "method": case.method,
        "precision": case.precision,
        "training": {"max_steps": steps, "global_batch": case.batch, "tensorboard": False},
        "strategy": {"micro_batch": case.micro_batch, "recompute": case.recompute},
        "evaluation": {"generate": 0},
        "machine": {"device": "cpu"},
        "output": str(folder / f"run-{case.micro_batch}-{case.recompute}-{case.packing}"),
        **case.changes,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def forecast(path: Path) -> dict[str, Any]:
    """What `sartor plan` says of the job."""
    plan = api.plan(str(path), ())
    assert plan.time is not None, f"no time without rates: {find_calibration(plan.machine).reason}"
    made = plan.time
    return {
        "forecast_seconds": made.step_seconds,
        "mfu": round(made.mfu, 3),
        "breakdown": made.breakdown,
        "strategy": [plan.strategy.micro_batch, "full" if plan.strategy.recompute else "none", plan.strategy.packing],
    }


def measure(path: Path, *, ragged: bool) -> float:
    """Seconds of a step: the median, or the mean without the slowest tenth where steps differ."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "sartor", "train", str(path)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip()[-800:])
    output = Path(json.loads(path.read_text(encoding="utf-8"))["output"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["tokens"] / line["tokens_per_second"] for line in lines if "tokens_per_second" in line][WARM_UP:]
    if not ragged:
        return statistics.median(steps)
    kept = sorted(steps)[: max(len(steps) * 9 // 10, 1)]
    return statistics.mean(kept)


def forecast_of(case: Case, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        return forecast(write_job(case, Path(scratch), steps))


def measured_of(case: Case, steps: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        return measure(write_job(case, Path(scratch), steps), ragged=case.ragged)


def run(name: str, case: Case, *, steps: int) -> dict[str, Any]:
    result: dict[str, Any] = {"run": name, **forecast_of(case, steps)}
    result["steps"] = max(steps, min(math.ceil(LEAST_SECONDS / result["forecast_seconds"]), MOST_STEPS))
    result["measured_seconds"] = measured_of(case, result["steps"])
    result["error"] = round(result["forecast_seconds"] / result["measured_seconds"] - 1, 4)
    return result


def candidates(case: Case, chosen: int) -> list[Case]:
    """Ways to run it: the whole batch at once, a quarter, single rows, the planner's own; packed or not, recomputed or not."""
    sizes = sorted({case.batch, max(case.batch // 4, 1), 1, chosen}, reverse=True)
    packing = (False, True) if case.ragged and case.kind == "llama" else (False,)
    return [
        dataclasses.replace(case, micro_batch=size, packing=packed, recompute=recompute)
        for size, packed, recompute in itertools.product(sizes, packing, ("none", "full"))
    ]


def rank(name: str, case: Case, *, steps: int) -> dict[str, Any]:
    """How much slower than the fastest candidate the planner's own choice is, and the one with the shortest forecast."""
    packing = "auto" if any(candidate.packing for candidate in candidates(case, 1)) else False
    chosen = forecast_of(dataclasses.replace(case, micro_batch="auto", recompute="auto", packing=packing), steps)["strategy"]
    ways = candidates(case, chosen[0])
    rows: list[dict[str, Any]] = [{"run": f"{name} {number}", **forecast_of(way, steps)} for number, way in enumerate(ways)]
    shortest = min(rows, key=lambda row: row["forecast_seconds"])
    worth = [
        (row, way)
        for row, way in zip(rows, ways, strict=True)
        if row["strategy"] == chosen or row["forecast_seconds"] <= NOT_RUN_BEYOND * shortest["forecast_seconds"]
    ]
    for row, way in worth:
        row["measured_seconds"] = measured_of(way, steps)
    near = NEAR * min(row["measured_seconds"] for row, _ in worth)
    for row, way in worth:
        if row["measured_seconds"] <= near:
            row["measured_seconds"] = min(row["measured_seconds"], measured_of(way, steps))
    ran = [row for row, _ in worth]
    best = min(ran, key=lambda row: row["measured_seconds"])
    choice = next(row for row in ran if row["strategy"] == chosen)
    return {
        "job": name,
        "candidates": len(rows),
        "not_run": [row["strategy"] for row in rows if row not in ran],
        "choice_slower_than_fastest": round(choice["measured_seconds"] / best["measured_seconds"] - 1, 4),
        "shortest_forecast_slower_than_fastest": round(shortest["measured_seconds"] / best["measured_seconds"] - 1, 4),
        "chosen": chosen,
        "fastest": best["strategy"],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few jobs and steps")
    parser.add_argument("--only", nargs="*", default=[], help="names of jobs")
    parser.add_argument("--ranking", action="store_true", help="the candidates of small jobs instead")
    parser.add_argument("--after", type=Path, help="what an interrupted run printed")
    parser.add_argument("--save", action="store_true", help="write a result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SARTOR_CACHE"] = cache  # of this benchmark alone
        results = measure_all(arguments)
    if not arguments.ranking:
        errors = sorted(abs(result["error"]) for result in results)
        print(f"{len(errors)} jobs: median error {statistics.median(errors):.1%}, worst {errors[-1]:.1%}")
    else:
        near = sum(result["choice_slower_than_fastest"] <= 0.05 for result in results)
        left, count = sum(len(result["not_run"]) for result in results), sum(result["candidates"] for result in results)
        print(f"{left} of {count} candidates were not run: their forecasts are more than {NOT_RUN_BEYOND} times the shortest")
        print(f"the planner's choice is within 5 % of the fastest candidate in {near} of {len(results)} jobs")
    if arguments.save:
        print(save("time-ranking" if arguments.ranking else "time-cpu", results))


def calibrated() -> Calibration:
    """What the machine does now: one that others share is a third slower a few minutes later. Measured as users do it, by a
    process of its own: in one that has computed much before, Python is faster than in a run."""
    for kept in Path(os.environ["SARTOR_CACHE"]).glob("machines/*.json"):
        kept.unlink()
    for _ in range(CALIBRATIONS):
        done = subprocess.run(
            [sys.executable, "-m", "sartor", "machine", "--calibrate"], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found = find_calibration(probe())
        if found.calibration is not None:
            return found.calibration
    raise SystemExit(f"{done.stdout}\nno calibration was kept, {CALIBRATIONS} times: {found.reason}")


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    steps = 5 if arguments.quick else 12
    cases = RANKED if arguments.ranking else RUNS
    names = arguments.only or [name for name in cases if not arguments.quick or name in QUICK]
    results = printed(arguments.after) if arguments.after else []
    calibration = calibrated()
    for name in names:
        if any(result["run"] == name for result in results):
            continue
        if arguments.ranking:
            result = {**rank(name, cases[name], steps=steps), "calibration": _said(calibration)}
        else:
            result, calibration = run_steadily(name, cases[name], calibration, steps=steps)
        results.append(result)
        print({key: value for key, value in result.items() if key != "rows"}, flush=True)
    return results


def printed(file: Path) -> list[dict[str, Any]]:
    """The results of a run, as it printed them, in its order."""
    return [ast.literal_eval(line) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("{")]


def run_steadily(name: str, case: Case, calibration: Calibration, *, steps: int) -> tuple[dict[str, Any], Calibration]:
    """The job, and the calibration after it; run again where that says that the machine has changed meanwhile."""
    tries: list[dict[str, Any]] = []
    while not tries or (len(tries) < TRIES and abs(tries[-1]["drift"]) > STEADY):
        tries.append({**run(name, case, steps=steps), "calibration": _said(calibration)})
        calibration = calibrated()
        tries[-1]["drift"] = round(forecast_of(case, steps)["forecast_seconds"] / tries[-1]["forecast_seconds"] - 1, 4)
    steadiest = min(tries, key=lambda one: abs(one["drift"]))
    return {**steadiest, "other_tries": [one for one in tries if one is not steadiest]}, calibration


def _said(calibration: Calibration) -> dict[str, Any]:
    return {"seconds": round(calibration.seconds, 1), "notes": calibration.notes}


if __name__ == "__main__":
    main()
