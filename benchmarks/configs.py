"""Forecast training memory of every model configuration at hand: method full, lora and qlora, without weights or a GPU.

    python benchmarks/configs.py [--data FOLDER] [--only NAME …]

FOLDER holds configs/**.json (default: ../shared). One row of 1024 tokens, all of them trained (fewer where the model has fewer
positions, 64 where that takes longer than a minute), micro-batch 1, nothing recomputed, on a card of the catalogue. Whether that
fits is not asked here: what counts is that there is a number, and where there is none, why. Encoders, and encoders with a
decoder, which `sartor train` does not train, are forecast as modules, with transformers' own loss and without clipping.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import SHARED, save

MACHINE = "H200-141GB"
LENGTH = 1024
SHORT = 64
"""For models that take too long: without compiled kernels, transformers scans a state space model token by token."""
KINDS = {
    "AutoModelForCausalLM": "decoder",
    "AutoModelForImageTextToText": "decoder that sees",
    "AutoModelForMaskedLM": "encoder",
    "AutoModelForSeq2SeqLM": "encoder and decoder",
}
METHODS = ("full", "lora", "qlora")
MOST_SECONDS = 60
"""For all three methods of one model; then the worker is replaced."""


def forecasts(path: Path, longest: int) -> Iterator[dict[str, Any]]:
    """What is known about a model as it becomes known: parameters, then a forecast for every method."""
    import sartor.job as jobs
    from sartor.machine import probe
    from sartor.model import dissect, resolve, skeleton
    from sartor.model.build import auto_class
    from sartor.step import Precision

    def job_of(method: str, **more: Any) -> jobs.Job:
        given = {"model": str(path), "method": method, "machine": MACHINE, "data": {"synthetic": {"length": longest}}}
        return jobs.from_mapping({**given, **more})

    job = job_of("full")
    source = resolve(job.model)
    kind = auto_class(source.config).__name__
    yield {"architecture": type(source.config).__name__, "kind": KINDS.get(kind, kind)}
    trained = _is_trained(source)
    machine = probe(job.machine)
    precision = Precision.resolve(job.precision, machine.device.kind)
    model = skeleton(source, dtype=precision.load_dtype(adapter=True))
    if model.main_input_name != "input_ids":
        raise ValueError(f"no text model: it reads {model.main_input_name}")
    length = min(longest, source.max_positions or longest)
    yield {"parameters": dissect(model).parameters, "length": length}
    for method in METHODS:
        start = time.perf_counter()
        if trained:
            found = _of_job(job_of(method), source, machine, precision, length)
        else:  # no causal model: PEFT's LoRA without a task, which is the same adapters
            peft = {"peft": {"peft_type": "LORA", "task_type": None, "r": 16, "target_modules": "all-linear"}}
            quantise = {"quantise": "nf4"} if method == "qlora" else {}
            job = job_of("full") if method == "full" else job_of("peft", **peft, **quantise)
            found = _of_module(job, source, machine, precision, length)
        yield {method: {"seconds": time.perf_counter() - start, **found}}


def _is_trained(source: Any) -> bool:
    """Whether `sartor train` takes it. Of others that read text the forecast is of the module's step (no job, no clipping)."""
    from sartor.errors import ModelError
    from sartor.model import check_trainable
    from sartor.model.build import auto_class

    try:
        check_trainable(source)
    except ModelError:
        if auto_class(source.config).__name__ not in ("AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"):
            raise
        return False
    return True


def _of_job(job: Any, source: Any, machine: Any, precision: Any, length: int) -> dict[str, Any]:
    from sartor.predict import LargestSteps, forecast_memory
    from sartor.predict.shapes import Shape, blank_batch

    work = LargestSteps.alike([blank_batch(Shape(1, length, length - 1), packing=False)])
    forecast = forecast_memory(job, source, machine, work, precision=precision, recompute=False, attention=None)
    if forecast.process_bytes is None:
        return {"bytes": None, "reason": forecast.reason}
    return {"bytes": forecast.process_bytes, "allocated_bytes": forecast.allocated_bytes, "verdict": forecast.verdict}


def _of_module(job: Any, source: Any, machine: Any, precision: Any, length: int) -> dict[str, Any]:
    """An encoder or an encoder with a decoder: transformers' own loss, labels for every token."""
    import torch

    from sartor.errors import ModelError
    from sartor.methods import traits
    from sartor.model import skeleton
    from sartor.predict.allocator import replay
    from sartor.predict.module import trace_module
    from sartor.predict.target import Target
    from sartor.step import make_trainable
    from sartor.step.optim import make_optimizer

    def make() -> torch.nn.Module:
        model = skeleton(source, dtype=precision.load_dtype(adapter=traits(job).adapter))
        return make_trainable(model, job, precision, recompute=False, meta=True, kind=machine.device.kind)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        with precision.autocast("cpu"):
            return model(**batch).loss

    tokens = torch.zeros((1, length), dtype=torch.long)
    names = ("input_ids", "decoder_input_ids", "labels") if source.config.is_encoder_decoder else ("input_ids", "labels")
    target = Target.of(machine.device)
    try:
        ledger = trace_module(
            make,
            dict.fromkeys(names, tokens),
            loss,
            lambda trained: make_optimizer({str(number): one for number, one in enumerate(trained)}, job.training),
            target=target,
        )
    except ModelError as error:
        return {"bytes": None, "reason": f"{error.what}: {error.why}"}
    reserved = replay(target.with_workspace(ledger))
    return {"bytes": reserved.reserved.total_bytes + target.context_bytes, "allocated_bytes": reserved.allocated.total_bytes}


def work(connection: Connection) -> None:
    """The worker: a path and a length come in, what is known about it goes out, piece by piece; None is the end."""
    import warnings

    warnings.simplefilter("ignore")
    while True:
        path, longest = connection.recv()
        try:
            for piece in forecasts(path, longest):
                connection.send(piece)
        except Exception as error:  # one bad model must not end the others
            reason = getattr(error, "what", "") or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            connection.send({"reason": "; ".join(part for part in (reason, getattr(error, "why", "")) if part)})
        connection.send(None)


class Worker:
    """One process that is replaced when a model takes too long or takes it down."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.start()

    def start(self) -> None:
        self.connection, other = self.context.Pipe()
        self.process = self.context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def ask(self, path: Path) -> dict[str, Any]:
        """What there is to know about a model, on shorter rows where the usual ones take too long."""
        known = self.try_once(path, LENGTH)
        if not known.get("reason", "").startswith("not done"):
            return known
        shorter = self.try_once(path, SHORT)
        return {**shorter, "seconds": known["seconds"] + shorter["seconds"]}

    def try_once(self, path: Path, longest: int) -> dict[str, Any]:
        """Everything that the worker finds out about a model in `MOST_SECONDS`."""
        known: dict[str, Any] = {}
        start = time.perf_counter()
        self.connection.send((path, longest))
        try:
            while (left := start + MOST_SECONDS - time.perf_counter()) > 0 and self.connection.poll(left):
                piece = self.connection.recv()
                if piece is None:
                    return {**known, "seconds": time.perf_counter() - start}
                known |= piece
            known["reason"] = f"not done after {MOST_SECONDS} s"
        except EOFError:
            known["reason"] = f"the process died (exit code {self.process.exitcode})"
        self.stop()
        self.start()
        return {**known, "seconds": time.perf_counter() - start}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def gib(row: dict[str, Any], method: str) -> str:
    size = row.get(method, {}).get("bytes")
    return "-" if size is None else f"{size / 2**30:.1f}"


def reason_of(row: dict[str, Any]) -> str:
    """Why a number is missing, or nothing."""
    if "reason" in row:
        return str(row["reason"])
    return "; ".join(f"{method}: {row[method]['reason']}" for method in METHODS if "reason" in row.get(method, {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of those wanted; nothing is saved then")
    options = parser.parse_args()
    folder = options.data / "configs"
    paths = sorted(folder.rglob("*.json"))
    if options.only:
        paths = [path for path in paths if any(part in str(path) for part in options.only)]
    worker, rows = Worker(), []
    print(f"{'model':52}{'parameters':>12}{'full':>10}{'lora':>10}{'qlora':>10}{'seconds':>9}")
    for path in paths:
        name = str(path.relative_to(folder).with_suffix(""))
        row = {"model": name, **worker.ask(path)}
        row |= {"reason": reason.replace(str(path), "it")} if (reason := reason_of(row)) else {}
        rows.append(row)
        parameters = f"{row['parameters'] / 1e6:10.0f} M" if "parameters" in row else f"{'-':>12}"
        numbers = "".join(f"{gib(row, method):>10}" for method in METHODS)
        said = row.get("reason") or (f"{row['length']} tokens" if row["length"] != LENGTH else "")
        print(f"{name:52}{parameters}{numbers}{row['seconds']:9.1f}  {said}", flush=True)
    worker.stop()
    whole = [row for row in rows if "reason" not in row]
    print(f"{len(rows)} configurations: {len(whole)} forecast with all three methods, the others not, because:")
    for reason, count in Counter(row["reason"] for row in rows if "reason" in row).most_common():
        print(f"  {count:3} {reason}")
    if not options.only:
        print("written:", save("configs", {"machine": MACHINE, "length": LENGTH, "models": rows}))


if __name__ == "__main__":
    main()
