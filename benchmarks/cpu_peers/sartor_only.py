"""What concerns Sartor alone: bf16 against its float32 reference, two processes against one, options that have to be asked for,
and the time to the first step."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import yaml

from cpu_peers.entrants import ENTRANTS, Entrant

HELD_OUT = 0.05
PROCESSES = ("sartor", "sartor-2-processes")
PROCESSES_BAR = 0.9
OPTIONS = {"int8": "sartor-int8", "prefixes": "sartor-shared-prefixes"}
"""What has to be asked for → the entrant that does."""
PLAIN = "plain-float32"
REFERENCE = ("precision=float32", "strategy.fused=false", "strategy.attention=sdpa")
"""Of curves: float32 as PyTorch and transformers compute it, layer by layer, without loops of Sartor's own."""
STEP_BAR, HELD_OUT_BAR = 0.005, 0.003


def _held_out_job(bench: Any, name: str, shape: str, method: str, steps: int) -> Path:
    """A job of so many steps with examples held out."""
    examples = round(steps * bench.batch / (1 - HELD_OUT)) + bench.batch
    job: Path = bench.job(name, shape, method, examples, evaluation={"fraction": HELD_OUT, "generate": 0})
    tree = yaml.safe_load(job.read_text(encoding="utf-8"))
    tree["training"]["max_steps"] = steps
    job.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return job


def curve(bench: Any, shape: str, method: str, modes: list[str], steps: int) -> dict[str, Any]:
    """`steps` steps in plain float32 and in every mode, the same examples in the same order; how far apart the losses are."""
    job = _held_out_job(bench, f"curve-{shape}-{method}", shape, method, steps)
    print(f"\n{shape} {method}: {steps} steps of {bench.batch} examples")
    reference = _whole(bench, job, PLAIN, *REFERENCE)
    runs = {mode: _whole(bench, job, mode, f"precision={mode}") for mode in modes}
    for mode in modes:
        run = runs[mode]
        apart = [abs(ours / other - 1) for ours, other in zip(run["losses"], reference["losses"], strict=True)]
        run["largest_step_difference"] = max(apart)
        run["held_out_difference"] = abs(run["held_out_loss"] / reference["held_out_loss"] - 1)
        good = run["largest_step_difference"] <= STEP_BAR and run["held_out_difference"] <= HELD_OUT_BAR
        print(
            f"  {mode} ({run['precision']}): largest difference of a step {max(apart):.3%} (step {apart.index(max(apart)) + 1}, "
            f"bar {STEP_BAR:.1%}), held-out loss {run['held_out_loss']:.4f} against {reference['held_out_loss']:.4f}: "
            f"{run['held_out_difference']:.3%} (bar {HELD_OUT_BAR:.1%}): {'within' if good else 'NOT within'} the bars"
        )
    return {"shape": shape, "method": method, "steps": steps, "runs": {PLAIN: reference, **runs}}


def _whole(bench: Any, job: Path, name: str, *overrides: str) -> dict[str, Any]:
    """A run to its end, the last held-out loss included: losses of all steps, and the precision that was planned."""
    import json
    import subprocess
    import sys

    folder = bench.scratch / f"run-{job.stem}-{name}"
    command = [sys.executable, "-m", "sartor", "train", str(job), *overrides, f"output={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=bench.environment())
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr.strip()[-1500:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plan = yaml.safe_load((folder / "plan.yaml").read_text(encoding="utf-8"))
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "loss" in line]
    shutil.rmtree(folder)
    return {
        "precision": plan["strategy"]["precision"]["mode"],
        "losses": [line["loss"] for line in steps],
        "held_out_before": held_out[0],
        "held_out_loss": held_out[-1],
        "tokens_per_second": sum(line["tokens"] for line in steps) / steps[-1]["seconds"],
    }


def processes(result: dict[str, Any]) -> dict[str, Any]:
    """What two processes make of the speed of one with as many threads, from a comparison of both; and of the losses."""
    one, two = (result["runs"][name] for name in PROCESSES)
    if failed := [run["failed"] for run in (*one, *two) if "failed" in run]:
        raise SystemExit(failed[0])
    ratios = [ours["tokens_per_second"] / other["tokens_per_second"] for ours, other in zip(two, one, strict=True)]
    ratio = statistics.median(ratios)
    apart = max(abs(ours / other - 1) for ours, other in zip(two[0]["losses"], one[0]["losses"], strict=True))
    verdict = "within" if ratio >= PROCESSES_BAR else "NOT within"
    shown = ", ".join(f"{each:.2f}" for each in ratios)
    print(
        f"  two processes / one: speed {ratio:.2f} ({shown}; bar {PROCESSES_BAR}: {verdict} it), losses at most {apart:.3%} apart"
    )
    return {**result, "two_to_one": ratios, "median_two_to_one": ratio, "largest_loss_difference": apart}


def option(bench: Any, name: str, result: dict[str, Any], steps: int) -> dict[str, Any]:
    """What an option makes of Sartor's speed, from a comparison of both, and of the held-out loss after `steps` steps."""
    plain, with_it = (result["runs"][entrant] for entrant in ("sartor", OPTIONS[name]))
    if failed := [run["failed"] for run in (*plain, *with_it) if "failed" in run]:
        raise SystemExit(failed[0])
    ratios = [one["tokens_per_second"] / other["tokens_per_second"] for one, other in zip(with_it, plain, strict=True)]
    shape, method = result["shape"], result["method"]
    job = _held_out_job(bench, f"{name}-{shape}-{method}", shape, method, steps)
    runs = {
        entrant: _whole(bench, job, entrant, *overrides)
        for entrant, overrides in (("sartor", ()), (OPTIONS[name], ENTRANTS[OPTIONS[name]].overrides))
    }
    held_out = [run["held_out_loss"] for run in runs.values()]
    apart = held_out[1] / held_out[0] - 1
    shown = ", ".join(f"{each:.2f}" for each in ratios)
    print(
        f"  {OPTIONS[name]} / sartor: speed {statistics.median(ratios):.2f} ({shown}); held-out loss after {steps} steps "
        f"{held_out[1]:.4f} and {held_out[0]:.4f} ({apart:+.3%}; {runs['sartor']['held_out_before']:.4f} before)"
    )
    found = {"option_to_plain": ratios, "median_option_to_plain": statistics.median(ratios), "held_out_difference": apart}
    return {**result, **found, "steps": steps, "whole_runs": runs}


def first_step(bench: Any, shape: str, method: str, runs: int = 3) -> dict[str, Any]:
    """Seconds from `sartor train` to the end of the first step: once with empty caches, then with what that left behind."""
    job = bench.job(f"first-{shape}-{method}", shape, method, 96)
    sartor = Entrant(package="sartor")
    for name in ("cache", "inductor"):
        shutil.rmtree(bench.scratch / name, ignore_errors=True)
    seconds = []
    for _ in range(1 + runs):
        # Two steps: what is compiled for the second only must not look free.
        done = bench.run(sartor, job, steps=2)
        if done.failure:
            raise SystemExit(done.failure)
        seconds.append(done.times)
    cold, warm = seconds[0], min(seconds[1:])
    print(f"\n{shape} {method}: the first step ends after {cold[0]:.1f} s cold, {warm[0]:.1f} s warm")
    print(f"  the second after {cold[1]:.1f} s and {warm[1]:.1f} s")
    return {"shape": shape, "method": method, "cold": seconds[0], "warm": seconds[1:]}
