"""Files that both `write` and `make` write: JSON lines, filled-in job templates, an empty folder to begin with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sartor.errors import UsageError

HERE = Path(__file__).parent
MODEL = HERE / "model"


def begin(folder: Path) -> None:
    """Make `folder`, or take an empty one. Raises UsageError where it holds anything, so that nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder", remedy="name another folder, or remove this one")
    folder.mkdir(parents=True, exist_ok=True)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON record a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_job(folder: Path, name: str) -> Path:
    """The job template `name` with its paths under `folder`, as the user named it, so it runs from the current directory."""
    text = (HERE / name).read_text(encoding="utf-8")
    path = folder / name
    path.write_text(_filled(text, folder), encoding="utf-8")
    return path


def _filled(template: str, folder: Path) -> str:
    """Every value that starts with {folder}, quoted as JSON (which YAML reads), so that any folder name is safe."""
    lines = []
    for line in template.splitlines():
        head, found, tail = line.partition("{folder}")
        lines.append(head + json.dumps(folder.as_posix() + tail, ensure_ascii=False) if found else line)
    return "\n".join(lines) + "\n"
