"""One case of benchmarks/gpu/memory.py in a process of its own: forecast first, then, when told to, train and measure.

    python memory_worker.py CASE.json HISTORY.json     prints a line of JSON for the forecast, and one for the measurement
    python memory_worker.py --describe KIND            prints a line of JSON about the machine

The forecast is made before CUDA has started. Between the two the process waits for a line on its standard input, so that the next
forecasts are ready while one case has the device for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memory_score import figures, make_plan
from torch.nn.attention import SDPBackend

from sartor.data import prepare
from sartor.data.pack import Batch
from sartor.job.schema import MachineJob
from sartor.machine import Device, probe
from sartor.model import build, resolve
from sartor.plan import Plan, batch_order, load_dtype
from sartor.plan.setting import largest_steps
from sartor.predict.cuda import attention_kernel
from sartor.predict.target import Target
from sartor.predict.trace import run_traced_step
from sartor.predict.tracker import StorageTracker
from sartor.step import TensorBatch, TrainStep, make_step, make_trainable

STEPS = 2
ATTENTIONS = [
    (8, 8, 64, False, 0.0),
    (8, 2, 64, False, 0.0),
    (8, 8, 64, True, 0.0),
    (8, 8, 64, False, 0.1),
    (8, 8, 256, False, 0.0),
    (8, 8, 256, True, 0.0),
    (8, 8, 512, False, 0.0),
]
"""Heads, heads of keys, their width, mask, dropout."""
PEAKS = {"allocated_bytes": "allocated_bytes", "active_bytes": "active_bytes", "reserved_bytes": "reserved_bytes"}


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def describe(kind: str) -> None:
    """The machine, and its device of this kind."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from common import description, machine_name

    machine = probe()
    device = next((one for one in (machine.device, *machine.accelerators) if one.kind == kind), None)
    if kind == "cpu":
        device = probe(MachineJob(device="cpu")).device
    known = {} if kind == "cpu" or device is None else _cuda_facts(device)
    say(description=description() | known, machine_name=machine_name(), device=device and dataclasses.asdict(device))


def _cuda_facts(device: Device) -> dict[str, Any]:
    """What decides memory and cannot be told from the package's version."""
    sizes = {
        name: getattr(torch.backends.cuda, name)()
        for name in ("cublas_workspace_size", "cublaslt_workspace_size")
        if hasattr(torch.backends.cuda, name)
    }
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        **sizes,
        "attention_kernels": attention_kernels(device),
    }


def attention_kernels(device: Device) -> list[dict[str, str]]:
    """The kernel that PyTorch chooses for attention of some kinds, beside the one that the forecast takes for granted."""
    names = {
        SDPBackend.CUDNN_ATTENTION: "cudnn",
        SDPBackend.FLASH_ATTENTION: "flash",
        SDPBackend.EFFICIENT_ATTENTION: "efficient",
        SDPBackend.MATH: "math",
    }
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, shared, width, masked, dropout in ATTENTIONS:
            query = torch.empty(2, heads, 256, width, dtype=dtype, device=device.torch_name, requires_grad=True)
            key = torch.empty(2, shared, 256, width, dtype=dtype, device=device.torch_name, requires_grad=True)
            mask = torch.ones(2, 1, 256, 256, dtype=torch.bool, device=device.torch_name) if masked else None
            grouped, causal = shared < heads, not masked
            choice = torch._fused_sdp_choice(query, key, key, mask, dropout, causal, enable_gqa=grouped)
            forecast = attention_kernel(
                Target.of(device).capability, query, key, key, masked=masked, dropout=dropout, causal=causal, grouped=grouped
            )
            what = f"{dtype}, {heads}:{shared} heads of {width}{', masked' * masked}{f', dropout {dropout}' * bool(dropout)}"
            found.append({"attention": what, "chosen": names[SDPBackend(choice)], "forecast": forecast})
    return found


def _driver() -> str | None:
    with _nvml() as nvml:
        return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """nvidia-ml-py, or nothing where it or the driver's library is not there."""
    if importlib.util.find_spec("pynvml") is None:
        yield None
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _driver_says(index: int) -> dict[str, int | None]:
    """What the driver shows for the device, and for this process where it tells."""
    with _nvml() as nvml:
        if nvml is None:
            return {"device_used_bytes": None, "process_bytes": None}
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        try:
            own = [entry for entry in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if entry.pid == os.getpid()]
        except nvml.NVMLError:
            own = []
        return {"device_used_bytes": used, "process_bytes": own[0].usedGpuMemory if own else None}


def _model(plan: Plan, folder: Path, device: str) -> torch.nn.Module:
    """Random weights, made on the device itself: on the host the large ones would take minutes."""
    job, strategy, source = plan.job, plan.strategy, resolve(plan.job.model)
    options: dict[str, Any] = {"dtype": load_dtype(plan), "device": device, "attention": strategy.attention}
    if job.quantise is None:
        with torch.device(device):
            return build(source, **options)
    with torch.device(device):  # weights are quantised while they are read, so they must be in a file
        build(source, **options).save_pretrained(folder / "weights")
    gc.collect()
    torch.cuda.empty_cache()
    stored = dataclasses.replace(source, path=str(folder / "weights"), has_weights=True)
    return build(stored, **options, quantise=job.quantise)


def _batches(plan: Plan) -> list[Batch]:
    job = plan.job
    assert job.data.max_length is not None
    sets = prepare(job, None, max_length=job.data.max_length, vocab_size=resolve(job.model).vocab_size)
    return list(largest_steps(sets.train, batch_order(job, sets), plan.strategy).largest)


def _step(plan: Plan, folder: Path, device: str) -> TrainStep:
    model = _model(plan, folder, device)
    job, precision = plan.job, plan.strategy.precision
    model = make_trainable(model, job, precision, recompute=plan.strategy.recompute, seed=job.training.seed)
    return make_step(model, job, precision, device_kind=torch.device(device).type)


def measure_cuda(plan: Plan, folder: Path, index: int, capacity_bytes: int | None, history: Path | None) -> dict[str, Any]:
    """Two steps on the device; peaks of PyTorch's allocator, stage by stage, and what the driver shows."""
    device = f"cuda:{index}"
    before = _driver_says(index)
    torch.cuda.set_device(index)
    free, total = torch.cuda.mem_get_info(index)
    measured: dict[str, Any] = {"device_used_before_bytes": before["device_used_bytes"], "free_at_start_bytes": free}
    measured |= {"context_bytes": None if before["device_used_bytes"] is None else total - free - before["device_used_bytes"]}
    if capacity_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(capacity_bytes / total, index)
    stages: dict[str, dict[str, int]] = {}
    status = "measured"
    try:
        step = _step(plan, folder, device)
        gc.collect()
        torch.cuda.empty_cache()  # what only making random weights took
        measured["built_bytes"] = torch.cuda.memory_allocated(index)
        for number in range(STEPS):
            if history is not None and number == STEPS - 1:
                torch.cuda.memory._record_memory_history(max_entries=200_000, context="alloc", stacks="python")
            stages |= _measured_step(step, _batches(plan), number + 1, device)
        torch.cuda.synchronize(index)
        if history is not None:
            history.write_text(json.dumps(_history(index)), encoding="utf-8")
    except torch.OutOfMemoryError as error:
        status, measured["error"] = "out of memory", str(error)[:600]
        stages["where memory ran out"] = _peaks(device)
    statistics = torch.cuda.memory_stats(index)
    for name in PEAKS:
        measured[name] = max((stage[name] for stage in stages.values()), default=0)
    free, total = torch.cuda.mem_get_info(index)
    after = _driver_says(index)
    measured |= {
        "process_bytes": after["process_bytes"],
        "device_used_bytes": after["device_used_bytes"],
        "device_used_by_cuda_bytes": total - free,
        "retries": statistics.get("num_alloc_retries", 0),
        "reserved_at_end_bytes": torch.cuda.memory_reserved(index),
        "stages": stages,
    }
    if measured["process_bytes"] is None and before["device_used_bytes"] is not None:
        measured["process_bytes"] = after["device_used_bytes"] - before["device_used_bytes"]
        measured["process_bytes_from"] = "difference of what the device shows before and after"
    return {"status": status, "measured": measured}


def _measured_step(step: TrainStep, batches: list[Batch], number: int, device: str) -> dict[str, dict[str, int]]:
    """As `sartor.train.loop._step` runs it; peaks of each stage."""
    stages = {}
    trained = sum(batch.trained_tokens for batch in batches)
    torch.cuda.reset_peak_memory_stats(device)
    losses = step.accumulate([TensorBatch.of(batch, device) for batch in batches], trained)
    stages[f"step {number}: forward and backward"] = _peaks(device)
    norm = step.clip()
    stages[f"step {number}: clip"] = _peaks(device)
    torch.stack(losses).tolist(), float(norm)
    step.update(1e-4)
    stages[f"step {number}: update"] = _peaks(device)
    return stages


def _peaks(device: str) -> dict[str, int]:
    """Peaks since the last time, and a new beginning."""
    statistics = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {name: statistics[f"{key}.all.peak"] for name, key in PEAKS.items()}


def _history(index: int) -> list[list[Any]]:
    """[bytes, where] of every allocation (> 0) and release (< 0) of the last step, in order."""
    entries = []
    for entry in torch.cuda.memory._snapshot(index)["device_traces"][index]:
        sign = {"alloc": 1, "free_requested": -1}.get(entry["action"])
        if sign is None:
            continue
        frames = [f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in entry.get("frames", [])[:3]]
        entries.append([sign * entry["size"], " < ".join(frames)] if sign > 0 else [-entry["size"]])
    return entries


def measure_cpu(plan: Plan, folder: Path) -> dict[str, Any]:
    """Two steps on real tensors, their storages counted."""
    step = _step(plan, folder, "cpu")
    with StorageTracker() as tracker:
        tracker.mark([*step.model.parameters(), *step.model.buffers()], "weights")
        batches = _batches(plan)
        trained = sum(batch.trained_tokens for batch in batches)
        for number in range(STEPS):
            run_traced_step(tracker, step, batches, trained, number=number)
        tracker.close()
    return {"status": "measured", "measured": {"allocated_bytes": tracker.ledger.peak().total_bytes}}


def run(case: dict[str, Any], folder: Path, history: Path | None) -> None:
    start = time.perf_counter()
    try:
        plan, verdict = make_plan(case, folder)
    except Exception as error:  # whatever it is, it belongs in the file
        say(status="error", error=f"no forecast: {type(error).__name__}: {str(error)[:400]}", measured=None)
        return
    forecast = figures(plan, verdict) | {"cuda_had_started": torch.cuda.is_initialized()}
    say(forecast=forecast, forecast_seconds=round(time.perf_counter() - start, 2))
    sys.stdin.readline()
    start = time.perf_counter()
    if plan.job.quantise is not None and importlib.util.find_spec("bitsandbytes") is None:
        say(status="not run", error="bitsandbytes is not installed", measured=None)
        return
    device = case["device"]
    try:
        if device["kind"] == "cpu":
            result = measure_cpu(plan, folder)
        else:
            result = measure_cuda(plan, folder, device["index"], case["capacity_bytes"], history)
    except Exception as error:
        lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]
        text = f"{type(error).__name__}: {str(error)[:400]} ({', '.join(lines)})"
        result = {"status": "error", "error": text, "measured": None}
    say(**result, seconds=round(time.perf_counter() - start, 2))


def main() -> None:
    if sys.argv[1] == "--describe":
        describe(sys.argv[2])
        return
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    history = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory() as folder:
        run(case, Path(folder), history)


if __name__ == "__main__":
    main()
