"""Fine-tuning on this CPU: Sartor and its peers in alternation, on the same examples and from the same weights.

    python benchmarks/cpu.py [--shapes 163m 500m] [--methods full lora] [--only NAME …] [--examples 96] [--rounds 3]
                             [--peer-python trl=PYTHON litgpt=PYTHON …]
    python benchmarks/cpu.py --check          losses of the first steps on one batch: do all train on the same tokens?
    python benchmarks/cpu.py --curve          200 steps against plain float32: every step, and the held-out loss
    python benchmarks/cpu.py --processes      two bound processes against one with all threads: speed and losses
    python benchmarks/cpu.py --option int8    with and without products in int8 (or: prefixes, shared ones): speed, held-out loss
    python benchmarks/cpu.py --first-step     from `sartor train` to the end of the first step, caches cold and warm

Data are instructions and answers of Alpaca, the loss is on the answers; models are Llamas with random weights and GPT-2's
vocabulary (the folder of --data holds data and tokenizer). Every run is a process of its own and one pass over the examples. Its
speed is useful tokens (padding is not useful) per second from the end of the second step to the end of the last, by the parent's
clock; a CPU second is one that any core spent on the process, what to look at where others use the machine too. Memory is the
largest resident memory of the process. Sartor runs through its command line, told of 50 passes (what pays in a long run is not
left out), and is stopped after the first, like all others. "limit" is the share of the arithmetic limit: useful operations
(`cpu_peers/arithmetic.py`) over time and the best product, PyTorch's or Sartor's, in bf16 or in float32 (where the processor
multiplies that faster), just before the run or just after; in brackets, over the best that products sustain (medians), which is
less where others use the machine.

Peers get a Python of their own, in which `pip install torch trl peft` (litgpt; llamafactory) was run: --peer-python names it.
A peer whose package it (default: the Python that runs this) cannot import is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import SHARED, save
from cpu_peers import sartor_only
from cpu_peers.arithmetic import SUSTAINED, UPDATE, best_product, trained_weights, useful_flops
from cpu_peers.entrants import ENTRANTS, Entrant, standard, versions
from cpu_peers.watch import Watched, watch

SCRIPTS = Path(__file__).parent / "cpu_peers"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "intermediate": 344, "layers": 2, "heads": 2},
    "163m": {"width": 768, "intermediate": 2048, "layers": 12, "heads": 12},
    "500m": {"width": 1280, "intermediate": 3456, "layers": 20, "heads": 20},
}
GPT2 = {"vocabulary": 50257, "end_id": 50256}
RATES = {"full": 5e-5, "lora": 2e-4}
MAX_LENGTH, RANK, ALPHA, EPOCHS = 512, 16, 32, 50
WARM_UP_STEPS = 2
RUN_LIMIT_SECONDS = 3600.0
CHECK_STEPS = 4
ROUNDING = {"float32": 1e-5, "bf16": 2e-4}
"""Relative difference of the first step's loss that rounding explains."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The fixed part of all runs: where things lie, and what is trained on."""

    scratch: Path
    data: Path
    pythons: dict[str, str]
    batch: int

    def shape(self, name: str) -> dict[str, Any]:
        return {**SHAPES[name], **GPT2, "tokenizer": str(self.data / "tokenizers/gpt2")}

    def model(self, name: str) -> Path:
        """The folder with the weights that all start from; made once."""
        folder = self.scratch / f"model-{name}"
        if not folder.exists():
            description = self.scratch / f"{name}.json"
            description.write_text(json.dumps(self.shape(name)), encoding="utf-8")
            self.tool("prepare.py", description, folder)
        return folder

    def job(self, name: str, shape: str, method: str, examples: int, **changes: Any) -> Path:
        """Sartor's job file; `changes` replace whole sections."""
        training = {
            "epochs": EPOCHS,
            "global_batch": self.batch,
            "learning_rate": RATES[method],
            "schedule": "constant",
            "warmup": 0,
            "tensorboard": False,
        }
        alpaca = self.data / "data/alpaca/alpaca_random_9k.json"
        tree = {
            "model": str(self.model(shape)),
            "data": {"path": str(alpaca), "template": "alpaca", "max_length": MAX_LENGTH, "limit": examples},
            "method": method,
            "lora": {"rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
            "training": training,
            **changes,
        }
        path = self.scratch / f"{name}.yaml"
        path.write_text(json.dumps(tree), encoding="utf-8")
        return path

    def examples(self, job: Path) -> Path:
        """The job's tokens for the peers; made once."""
        target = job.with_suffix(".jsonl")
        if not target.exists():
            self.tool("prepare.py", "--examples", job, target)
        return target

    def tool(self, script: str, *arguments: Any) -> str:
        """Run one of the helpers in Sartor's Python."""
        command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self.environment()).stdout

    def environment(self, *, peer: bool = False) -> dict[str, str]:
        """Of a child: nothing is fetched, caches lie in the scratch folder, and modules are compiled once, as where packages are
        installed."""
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.scratch / "datasets")}
        environment |= {"SARTOR_CACHE": str(self.scratch / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if peer:
            environment.pop("PYTHONPATH", None)
        return environment

    def run(self, entrant: Entrant, job: Path, *, steps: int, in_order: bool = False) -> Watched:
        """One run of an entrant on a job, ended after `steps` steps."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            if entrant.script is None:
                command = [sys.executable, "-m", "sartor", "train", str(job), *entrant.overrides, f"output={folder}/run"]
                metrics, environment = Path(folder) / "run/metrics.jsonl", self.environment()
            else:
                metrics, environment = Path(folder) / "metrics.jsonl", self.environment(peer=True)
                task = self._task(entrant, job, Path(folder), steps, in_order)
                command = [self.pythons[entrant.package], str(SCRIPTS / entrant.script), str(task)]
            return watch(
                command, metrics, steps=steps, environment=environment | entrant.variables, limit_seconds=RUN_LIMIT_SECONDS
            )

    def _task(self, entrant: Entrant, job: Path, folder: Path, steps: int, in_order: bool) -> Path:
        tree = json.loads(job.read_text(encoding="utf-8"))
        values = {
            "model": tree["model"],
            "examples": str(self.examples(job)),
            "metrics": str(folder / "metrics.jsonl"),
            "scratch": str(folder / "scratch"),
            "method": tree["method"],
            "batch": self.batch,
            "steps": steps,
            "epochs": EPOCHS,
            "learning_rate": tree["training"]["learning_rate"],
            "max_length": MAX_LENGTH,
            "rank": RANK,
            "alpha": ALPHA,
            "in_order": in_order,
            "options": entrant.options_of(tree["method"]),
        }
        path = folder / "task.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path


def without_paths(failure: str) -> str:
    """How a run ended, with the last line of its output: those before it name this machine's folders."""
    how, _, output = failure.partition(": ")
    return f"{how}: {output.strip().splitlines()[-1]}" if output.strip() else how


def figures(run: Watched, flops_per_token: float, trained: int, around: list[dict[str, float]]) -> dict[str, Any]:
    """The figures of one run, which has `trained` weights. `around`: rates of products and of updates before it and after.

    `reachable_share` is the part of the limit that a step would reach which did nothing but its products, all of them at the
    limit, and the update.
    """
    tokens = [line["tokens"] for line in run.lines]
    steady = sum(tokens[WARM_UP_STEPS:])
    rate = steady / (run.times[-1] - run.times[WARM_UP_STEPS - 1])
    limit, updates = max(map(best_product, around)), max(rates[UPDATE] for rates in around)
    products = flops_per_token * steady / (len(tokens) - WARM_UP_STEPS) / limit
    return {
        "tokens_per_second": rate,
        "tokens_per_cpu_second": steady / (run.cpu_seconds[-1] - run.cpu_seconds[WARM_UP_STEPS - 1]),
        "limit_share": rate * flops_per_token / limit,
        "reachable_share": products / (products + trained / updates),
        "sustained_share": rate * flops_per_token / statistics.mean(best_product(rates, SUSTAINED) for rates in around),
        "peak_bytes": run.peak_bytes,
        "first_step_seconds": run.times[0],
        "tokens": sum(tokens),
        "losses": [line["loss"] for line in run.lines],
    }


def compare(bench: Bench, shape: str, method: str, names: list[str], examples: int, rounds: int) -> dict[str, Any]:
    """Rounds of all entrants, the order turned by one each round; prints as it goes."""
    job = bench.job(f"{shape}-{method}", shape, method, examples)
    data = [json.loads(line) for line in bench.examples(job).read_text(encoding="utf-8").splitlines()]
    steps = -(-len(data) // bench.batch)
    if steps <= WARM_UP_STEPS:
        raise SystemExit(f"{len(data)} examples are {steps} steps, of which {WARM_UP_STEPS} are warm-up: raise --examples")
    lengths = [(len(example["input_ids"]), sum(label != -100 for label in example["labels"][1:])) for example in data]
    flops = sum(useful_flops(bench.shape(shape), method, RANK, length=length, counted=counted) for length, counted in lengths)
    tokens, trained = sum(length for length, _ in lengths), trained_weights(bench.shape(shape), method, RANK)
    print(f"\n{shape} {method}: {len(data)} examples, {tokens:,} tokens, {sum(k for _, k in lengths):,} of them in the loss")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rates: list[list[dict[str, float]]] = []
    for number in range(rounds):
        rates.append([json.loads(bench.tool("arithmetic.py"))])
        print(f"round {number + 1}: {_products(rates[-1][-1])}")
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            done = bench.run(ENTRANTS[name], job, steps=steps)
            rates[-1].append(json.loads(bench.tool("arithmetic.py")))
            if done.failure:
                made = {"failed": without_paths(done.failure)}
            else:
                made = figures(done, flops / tokens, trained, rates[-1][-2:])
            runs[name].append(made)
            print(f"  {name:18} {_line(made)}; then {_products(rates[-1][-1])}", flush=True)
    flops_per_token = flops / tokens
    result = {"shape": shape, "method": method, "batch": bench.batch, "examples": len(data), "tokens": tokens, "gemm": rates}
    return {**result, "useful_flops_per_token": flops_per_token, "runs": runs, "ratios": _ratios(runs)}


def _products(rates: dict[str, float]) -> str:
    best, sustained = best_product(rates) / 1e9, best_product(rates, SUSTAINED) / 1e9
    return f"best product {best:.0f} GFLOP/s, sustained {sustained:.0f}"


def _line(made: dict[str, Any]) -> str:
    if "failed" in made:
        return f"FAILED {made['failed'][-300:]}"
    return (
        f"{made['tokens_per_second']:7.0f} tokens/s ({made['tokens_per_cpu_second']:5.0f} a CPU second)  "
        f"limit {made['limit_share']:4.0%} ({made['sustained_share']:4.0%}; at most {made['reachable_share']:.0%})  "
        f"{made['peak_bytes'] / 2**30:5.2f} GiB  "
        f"first step {made['first_step_seconds']:5.1f} s  last loss {made['losses'][-1]:.3f}"
    )


def _ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Sartor's speed over every other entrant's, round by round, and the median; memory likewise."""
    found: dict[str, Any] = {}
    for name, others in runs.items():
        pairs = [(a, b) for a, b in zip(runs.get("sartor", []), others, strict=False) if "failed" not in a and "failed" not in b]
        if name == "sartor" or not pairs:
            continue
        speeds = [ours["tokens_per_second"] / other["tokens_per_second"] for ours, other in pairs]
        memory = [ours["peak_bytes"] / other["peak_bytes"] for ours, other in pairs]
        median = statistics.median(speeds)
        found[name] = {"speed": speeds, "median_speed": median, "median_memory": statistics.median(memory)}
        shown = ", ".join(f"{speed:.2f}" for speed in speeds)
        print(f"  sartor / {name:18} speed {median:.2f} ({shown})  memory {found[name]['median_memory']:.2f}")
    return found


def check(bench: Bench, shape: str, method: str, names: list[str]) -> dict[str, Any]:
    """The first losses on one batch, over and over: no order of examples can tell the entrants apart."""
    job = bench.job(f"check-{shape}-{method}", shape, method, bench.batch)
    print(f"\n{shape} {method}: losses of steps 1 to {CHECK_STEPS} on the same {bench.batch} examples")
    losses: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for name in dict.fromkeys(["sartor-float32", *names]):
        done = bench.run(ENTRANTS[name], job, steps=CHECK_STEPS, in_order=True)
        if done.failure:
            failed[name] = without_paths(done.failure)
            print(f"  {name:18} FAILED {done.failure[-600:]}", flush=True)
            continue
        losses[name] = [line["loss"] for line in done.lines]
        tokens[name] = done.lines[0]["tokens"]
        reference = losses.get("sartor-float32", losses[name])
        apart = abs(losses[name][0] / reference[0] - 1)
        allowed = ROUNDING["float32" if ENTRANTS[name].float32 else "bf16"]
        verdict = "same" if apart <= allowed and tokens[name] == next(iter(tokens.values())) else "DIFFERENT"
        shown = "  ".join(f"{loss:.5f}" for loss in losses[name])
        print(f"  {name:18} {shown}   {tokens[name]} tokens, step 1 apart {apart:.1e}: {verdict}", flush=True)
    return {"shape": shape, "method": method, "losses": losses, "tokens": tokens, "failed": failed}


def available(names: list[str], given: list[str]) -> tuple[list[str], dict[str, str]]:
    """The entrants that can run here, and the Python of each peer's package; says who is left out."""
    pythons = dict(pair.split("=", 1) for pair in given)
    if unknown := set(pythons) - {entrant.package for entrant in ENTRANTS.values()}:
        raise SystemExit(f"--peer-python: no peer is called {', '.join(sorted(unknown))}")
    present: dict[str, bool] = {}
    for package in {ENTRANTS[name].package for name in names if ENTRANTS[name].script}:
        pythons.setdefault(package, sys.executable)
        tried = subprocess.run([pythons[package], "-c", f"import {package}"], capture_output=True)
        present[package] = tried.returncode == 0
        if not present[package]:
            print(f"left out: {package}, since {pythons[package]} cannot import it (--peer-python {package}=PYTHON)")
    return [name for name in names if ENTRANTS[name].script is None or present[ENTRANTS[name].package]], pythons


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["163m", "500m"])
    parser.add_argument("--methods", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--only", nargs="*", choices=list(ENTRANTS), help="entrants; default: those of this machine")
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peer-python", nargs="*", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--curve", nargs="*", metavar="PRECISION", help="modes to compare with plain float32; default: auto")
    parser.add_argument("--steps", type=int, default=200, help="of --curve and --option")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--option", choices=list(sartor_only.OPTIONS))
    return parser.parse_args()


def main() -> None:
    options = parse()
    alone = options.curve is not None or options.first_step or options.processes or options.option
    names, pythons = ([], {}) if alone else available(options.only or list(standard()), options.peer_python)
    jobs = [(shape, method) for shape in options.shapes for method in options.methods]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = Bench(scratch=Path(scratch), data=options.data.resolve(), pythons=pythons, batch=options.batch)
        if options.check:
            kind, results = "cpu-check", [check(bench, *job, names) for job in jobs]
        elif options.curve is not None:
            modes = options.curve or ["auto"]
            kind, results = "cpu-curve", [sartor_only.curve(bench, *job, modes, options.steps) for job in jobs]
        elif options.processes:
            pair = list(sartor_only.PROCESSES)
            done = [compare(bench, *job, pair, options.examples, options.rounds) for job in jobs]
            kind, results = "cpu-processes", [sartor_only.processes(result) for result in done]
        elif options.option:
            pair = ["sartor", sartor_only.OPTIONS[options.option]]
            done = [compare(bench, *job, pair, options.examples, options.rounds) for job in jobs]
            kind = f"cpu-{options.option}"
            results = [sartor_only.option(bench, options.option, result, options.steps) for result in done]
        elif options.first_step:
            kind, results = "cpu-first-step", [sartor_only.first_step(bench, *job) for job in jobs]
        else:
            kind, results = "cpu", [compare(bench, *job, names, options.examples, options.rounds) for job in jobs]
    record = {"versions": {package: versions(python) for package, python in sorted(pythons.items())}, "results": results}
    print("written:", save(kind, record))


if __name__ == "__main__":
    main()
