"""Memory estimators side by side on runs that were measured on an accelerator and published (see memory_published.py).

    python benchmarks/estimators.py [--data FOLDER] [--deepspeed SDIST]     run, print, write the result file
    python benchmarks/estimators.py --page                                  docs/comparison.md from the newest result file

Every estimator gets the same configuration and answers as its own documentation says it is asked; nothing is fitted. DeepSpeed
cannot be imported without being built, so its two functions are taken out of its source package (`pip download`, or --deepspeed).
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from accelerate.commands import estimate
from transformers import AutoConfig, AutoModel

from common import REPOSITORY, RESULTS, SHARED, save
from memory_published import CONFIGS, left_out, score

MIB = 2**20
PAGE = REPOSITORY / "docs/comparison.md"
DEEPSPEED = "deepspeed==0.19.8"
_STAGES = {
    "DeepSpeed ZeRO-2": ("stage_1_and_2.py", "estimate_zero2_model_states_mem_needs"),
    "DeepSpeed ZeRO-3": ("stage3.py", "estimate_zero3_model_states_mem_needs"),
}
ABOUT = {
    "Sartor": "`sartor.plan`: the step traced on fake tensors, with the formats and kernels of the measured run. No answer where "
    "the installed transformers refuses the run's attention kernel (Gemma 2 with SDPA)",
    "fitcheck": "the forecast that its authors published beside their measurement. Its formulas were changed after the QLoRA "
    "runs, says its README",
    "accelerate, training": "`accelerate estimate-memory`, column *Training using Adam*, for float16. Knows neither LoRA nor "
    "activations; for int4 it says N/A",
    "accelerate, loading": "the same command, column *Total Size*, for the format of the weights (float16, int4). For loading, "
    "not for training",
    "DeepSpeed ZeRO-2": "`estimate_zero2_model_states_mem_needs`, one GPU, no offload. Parameters, gradients and optimizer of a "
    "full fine-tuning; knows neither LoRA, nor quantisation, nor activations",
    "DeepSpeed ZeRO-3": "`estimate_zero3_model_states_mem_needs`, likewise",
}

Row = dict[str, str]
Estimator = Callable[[Row], float | None]
"""MiB, or nothing where the estimator has no answer for this job."""


def empty_model(row: Row, folder: Path) -> Any:
    """The model without weights, as `accelerate.commands.estimate.create_empty_model` makes it: in float32, without a head."""
    config = AutoConfig.from_pretrained(folder / "configs" / CONFIGS[row["model"]])
    with init_empty_weights():
        return AutoModel.from_config(config, dtype="float32")


def accelerate(column: int, folder: Path) -> Estimator:
    """A column of the command's table: 2 is the total size, 3 the training with Adam."""

    def answer(row: Row) -> float | None:
        original = estimate.create_empty_model
        estimate.create_empty_model = lambda *_, **__: empty_model(row, folder)  # instead of asking the hub
        try:
            kind = "int4" if row["quant"] == "nf4" else "float16"
            found = estimate.gather_data(Namespace(model_name="", library_name="", trust_remote_code=False, dtypes=[kind]))[0][
                column
            ]
        finally:
            estimate.create_empty_model = original
        size = max(found.values()) if isinstance(found, dict) else found
        return None if size == -1 else size / MIB

    return answer


def deepspeed(archive: Path, name: str, folder: Path) -> Estimator:
    """One of DeepSpeed's functions, taken out of its source package."""
    file_name, function_name = _STAGES[name]
    with tarfile.open(archive) as package:
        member = next(one for one in package if one.name.endswith(f"deepspeed/runtime/zero/{file_name}"))
        file = package.extractfile(member)
        assert file is not None
        tree = ast.parse(file.read())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function_name)
    room: dict[str, Any] = {}
    exec(compile(ast.Module(body=[function], type_ignores=[]), file_name, "exec"), room)  # plain arithmetic

    def answer(row: Row) -> float:
        model = empty_model(row, folder)
        total = sum(parameter.numel() for parameter in model.parameters())
        # As its `model_to_params` counts, which tells parameters apart by addresses that a model without weights has not.
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        sizes = {"total_params": total} | ({"largest_layer_params": largest} if "zero3" in function_name else {})
        return float(room[function_name](**sizes, num_gpus_per_node=1, num_nodes=1, cpu_offload=False)[1]) / MIB

    return answer


def fitcheck(row: Row) -> float | None:
    found = re.match(r"fitcheck predicted ([0-9.]+)", row["known"])
    return float(found[1]) if found else None


def estimators(folder: Path, archive: Path) -> dict[str, Estimator]:
    return {
        "Sartor": lambda row: score(row, folder)["forecast_mib"],
        "fitcheck": fitcheck,
        "accelerate, training": accelerate(3, folder),
        "accelerate, loading": accelerate(2, folder),
        **{name: deepspeed(archive, name, folder) for name in _STAGES},
    }


def download(folder: Path) -> Path:
    """DeepSpeed's source package from PyPI."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        str(folder),
        DEEPSPEED,
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("deepspeed-*.tar.gz"))


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Rows answered, and the median and the worst error of those, in percent of what was measured."""
    errors = [row["error_percent"][name] for row in rows if row["error_percent"][name] is not None]
    return {
        "answered": len(errors),
        "median_percent": statistics.median(abs(error) for error in errors) if errors else None,
        "worst_percent": max(errors, key=abs, default=None),
    }


def run(folder: Path, archive: Path) -> dict[str, Any]:
    with (folder / "measured/published.csv").open(encoding="utf-8", newline="") as file:
        used = [row for row in csv.DictReader(file) if not left_out(row)]
    known, rows = estimators(folder, archive), []
    for row in used:
        measured = float(row["measured"])
        name = f"{row['model']} {row['method']} {row['attention'].removesuffix('-mem-efficient')}"
        name += f", {row['micro_batch']} x {row['seq_len']}"
        estimates = {estimator: ask(row) for estimator, ask in known.items()}
        errors = {who: None if value is None else (value / measured - 1) * 100 for who, value in estimates.items()}
        rows.append({"run": name, "measured_mib": measured, "estimate_mib": estimates, "error_percent": errors})
        print(f"{name:44}" + "".join(f"{_percent(error):>12}" for error in errors.values()), flush=True)
    return {"rows": rows, "summary": {name: summary(rows, name) for name in known}, "deepspeed": DEEPSPEED}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f} %" if abs(value) < 99.95 else f"{value:+.0f} %"


def page(record: dict[str, Any]) -> str:
    """docs/comparison.md from a result file."""
    results, versions = record["results"], record["machine"]["versions"]
    rows, names = results["rows"], list(results["summary"])
    figures = [results["summary"][name] for name in names]

    def line(head: str, cells: Iterable[str]) -> str:
        return f"| {head} |" + "".join(f" {cell} |" for cell in cells)

    lines = [
        "# Memory estimators on the same runs",
        "",
        f"{len(rows)} runs of fitcheck's authors on a Tesla T4: LoRA in float16 and QLoRA, `max_memory_allocated` in MiB. Below",
        "every estimator is the error of its answer, in percent of what was measured.",
        "",
        line("run | measured", names),
        "|---|---:|" + "---:|" * len(names),
        *(
            line(f"{row['run']} | {row['measured_mib']:.0f}", (_percent(row["error_percent"][name]) for name in names))
            for row in rows
        ),
        line("**runs answered** | ", (f"{one['answered']} of {len(rows)}" for one in figures)),
        line("**median, without sign** | ", (_percent(one["median_percent"]).lstrip("+") for one in figures)),
        line("**worst** | ", (_percent(one["worst_percent"]) for one in figures)),
        "",
        *_sentences(results["summary"]),
        "",
        "| estimator | asked how |",
        "|---|---|",
        *(f"| {name} | {ABOUT[name]} |" for name in names),
        "",
        f"Results of {record['date']}, with accelerate {results['accelerate']}, {results['deepspeed'].replace('==', ' ')},",
        f"transformers {versions['transformers']} and torch {versions['torch']}; the runs were made with transformers 5.0.0.",
        "This page is written by `python benchmarks/estimators.py --page`.",
    ]
    return "\n".join(lines) + "\n"


def _sentences(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What the table shows, and what it does not."""
    middle = {name: one["median_percent"] for name, one in figures.items()}
    worst = {name: _size(one["worst_percent"]) for name, one in figures.items()}
    others = [size for name, size in middle.items() if name not in ("Sartor", "fitcheck")]
    return [
        f"Sartor is off by {_size(middle['Sartor'])} in the middle and by {worst['Sartor']} at worst. No constant of it is",
        "fitted to these runs, but it was checked against them while it was written, and it is told more than others ask for:",
        "the attention kernel, the loss, the formats and what the measured harness keeps alive.",
        f"fitcheck ({_size(middle['fitcheck'])} in the middle, {worst['fitcheck']} at worst) has formulas for such dense models,",
        "adjusted by those who took these measurements and published together with them.",
        f"The others ({min(others):.0f} to {max(others):.0f} % in the middle) answer another question, what loading or full",
        "fine-tuning takes without activations, and have no option for LoRA: these errors say that they do not fit the job, not",
        "that they are wrong about their own.",
    ]


def _size(percent: float) -> str:
    digits = 2 if abs(percent) < 1 else 1
    return f"{abs(percent):.{digits}f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed's source package; default: fetched with pip")
    parser.add_argument("--page", action="store_true", help="write docs/comparison.md from the newest result file")
    options = parser.parse_args()
    if options.page:
        newest = max(RESULTS.glob("*-estimators.json"))
        PAGE.write_text(page(json.loads(newest.read_text(encoding="utf-8"))), encoding="utf-8")
        print("written:", PAGE)
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = run(options.data, options.deepspeed or download(Path(scratch)))
    for name, figures in results["summary"].items():
        median, worst = (_percent(figures[key]) for key in ("median_percent", "worst_percent"))
        print(f"{name:24}{figures['answered']:3} answered, median {median}, worst {worst}")
    print("written:", save("estimators", {**results, "accelerate": metadata.version("accelerate")}))


if __name__ == "__main__":
    main()
