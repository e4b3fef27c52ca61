"""Forecast and measured memory of training on a CUDA device: models with random weights, each in a process of its own.

    PYTHONPATH=src python benchmarks/gpu/memory.py [--only NAME …] [--limit-minutes 9] [--history NAME …]
    PYTHONPATH=src python -m pytest -m gpu tests/gpu tests/predict/test_gpu_file.py
    PYTHONPATH=src python benchmarks/gpu/memory.py --device cpu        (no accelerator: tensors counted, three tiny cases)

Needs torch, transformers and peft; with nvidia-ml-py the driver's figures are read as well, and with bitsandbytes the qlora case
runs. Every case (memory_cases.py) is forecast before its process starts CUDA, as `sartor plan` does it, for the strategy that the
case pins; then it trains two steps. While one case has the device, the next ones import and forecast. The file is written after
every case, and it holds all that a forecast needs to be made again (memory_score.py, tests/predict/test_gpu_file.py): into the
folder that the environment variable OUT names where it is set, else into benchmarks/results. Of the cases that --history names
the allocations of the last step go, with the lines of Python they come from, into a second file beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from memory_cases import CASES, CPU_CASES

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
WORKER = HERE / "memory_worker.py"
AHEAD = 4
"""Cases that import and forecast while one has the device."""
CASE_SECONDS = 100
HISTORY = ("small-bf16", "small-mixed", "small-float32", "small-gqa-float32", "small-gqa-mixed-packed", "gpt2-dropout-mixed")


@dataclasses.dataclass(kw_only=True)
class Worker:
    """A case and the process that runs it."""

    case: dict[str, Any]
    process: subprocess.Popen[str]
    history: Path

    @classmethod
    def start(cls, case: dict[str, Any], scratch: Path, *, history: bool) -> Worker:
        path = scratch / f"{case['name']}.json"
        path.write_text(json.dumps(case), encoding="utf-8")
        told = scratch / f"{case['name']}-history.json"
        segments = case["job"]["strategy"]["expandable_segments"]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTORCH_ALLOC_CONF": f"expandable_segments:{segments}",
            "OMP_NUM_THREADS": "2",
        }
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(path), *([str(told)] if history else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(scratch / f"{case['name']}.err").open("w"),
            text=True,
            env=environment,
        )
        return cls(case=case, process=process, history=told)

    def finish(self, scratch: Path, seconds: float) -> dict[str, Any]:
        """Let the case have the device, and wait for it; the case with what came of it."""
        outcome: dict[str, Any] = {"status": "error", "forecast": None, "measured": None}
        try:
            text, _ = self.process.communicate("go\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            text, _ = self.process.communicate()
            outcome |= {"status": "time limit", "error": f"stopped after {seconds:.0f} s"}
        for line in text.splitlines():
            if line.startswith("{"):
                outcome |= json.loads(line)
        if self.process.returncode > 0:
            said = (scratch / f"{self.case['name']}.err").read_text(encoding="utf-8", errors="replace").strip()
            outcome |= {"error": said.splitlines()[-1][:400] if said else f"exit code {self.process.returncode}"}
        return self.case | outcome


def run_all(
    cases: list[dict[str, Any]], *, until: float, history: tuple[str, ...], found: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every case with its outcome, one after the other; what the time does not allow is `not run`. Histories go into `found`."""
    waiting, ready = deque(cases), deque[Worker]()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        while waiting or ready:
            while waiting and len(ready) <= AHEAD and time.monotonic() < until:
                case = waiting.popleft()
                ready.append(Worker.start(case, scratch, history=case["name"] in history))
            if not ready:
                yield from (case | {"status": "not run", "error": "no time was left", "measured": None} for case in waiting)
                return
            worker = ready.popleft()
            left = until - time.monotonic()
            if left < 1:
                worker.process.kill()
                worker.process.communicate()
                yield worker.case | {"status": "not run", "error": "no time was left", "measured": None}
                continue
            yield worker.finish(scratch, min(left, CASE_SECONDS))
            if worker.history.is_file():
                found[worker.case["name"]] = json.loads(worker.history.read_text(encoding="utf-8"))


def describe(kind: str) -> dict[str, Any]:
    """What the worker says of the machine; a process of its own, so that this one never holds a part of the device."""
    done = subprocess.run([sys.executable, str(WORKER), "--describe", kind], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if described["device"] is None:
        raise SystemExit(f"no {kind} device here; --device cpu runs three tiny cases without one")
    return described


def line_of(result: dict[str, Any]) -> str:
    """A case in a line: status, then measured and error of each figure."""
    text = f"{result['name']:32} {result['status']:14} {result.get('seconds', 0):5.1f} s "
    forecast, measured = result.get("forecast"), result.get("measured")
    if not forecast or not measured:
        return text + result.get("error", "")
    parts = [forecast["verdict"]]
    for figure in ("allocated_bytes", "active_bytes", "reserved_bytes", "process_bytes"):
        if measured.get(figure) and forecast.get(figure):
            error = (forecast[figure] / measured[figure] - 1) * 100
            parts.append(f"{figure.removesuffix('_bytes')} {measured[figure] / 2**20:.0f} MiB {error:+.2f} %")
    return text + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {', '.join([*CASES, *CPU_CASES])}")
    parser.add_argument("--limit-minutes", type=float, default=9.0)
    parser.add_argument("--history", nargs="*", metavar="NAME", default=list(HISTORY))
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.limit_minutes
    known = CPU_CASES if options.device == "cpu" else CASES
    names = options.only or list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    described = describe(options.device)
    cases = [
        {
            "name": name,
            "config": known[name].config(),
            "job": known[name].job("config.json"),
            "device": described["device"],
            "capacity_bytes": known[name].capacity_bytes,
        }
        for name in names
    ]
    folder = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    today = date.today().isoformat()
    stem = f"{today}-{described['machine_name']}-gpu-memory" + ("-on-cpu" if options.device == "cpu" else "")
    path = folder / f"{stem}.json"
    for entry in described["description"].get("attention_kernels", []):
        mark = "" if entry["chosen"] == entry["forecast"] else "   FORECAST: " + entry["forecast"]
        print(f"attention {entry['attention']:50} {entry['chosen']}{mark}", flush=True)
    record = {"benchmark": "gpu-memory", "date": today, "machine": described["description"], "results": []}
    found: dict[str, Any] = {}
    for result in run_all(cases, until=until, history=tuple(options.history), found=found):
        record["results"].append(result)
        print(line_of(result), flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("written:", path.name)
    if found:
        told = folder / f"{stem}-history.json.gz"
        with gzip.open(told, "wt", encoding="utf-8") as file:
            json.dump(found, file)
        print("written:", told.name)


if __name__ == "__main__":
    main()
