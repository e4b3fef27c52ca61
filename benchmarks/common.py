"""What every benchmark shares: a description of the machine, and dated result files."""

from __future__ import annotations

import json
import platform
import re
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from sartor.machine import probe

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """A short name for file names, e.g. `amd-epyc-2c`."""
    machine = probe()
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(r\)|\(tm\)|processor|\d+-core|cpu", "", machine.device.name.lower()))
    return "-".join([*words[:3], f"{machine.cores}c"])


def description() -> dict[str, Any]:
    """Machine and versions, for the record."""
    machine = probe()
    packages = ("torch", "transformers", "peft", "tokenizers", "pyarrow", "numpy")
    return {
        "cpu": machine.cpu_name,
        "cores": machine.cores,
        "instruction_sets": machine.instruction_sets,
        "memory_bytes": machine.host.total_bytes,
        "accelerators": [device.name for device in machine.accelerators],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def save(name: str, results: Any, *, note: str = "") -> Path:
    """Write `results/DATE-MACHINE-NAME.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today().isoformat()}-{machine_name()}-{name}.json"
    record = {"benchmark": name, "date": date.today().isoformat(), "machine": description(), "note": note, "results": results}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
