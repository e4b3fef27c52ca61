"""The reference of the job file, printed from the schema: `python -m sartor.job.reference > docs/job.md`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from sartor.job.load import describe, section_of
from sartor.job.schema import Job

_HEAD = """# The job file

One YAML file says what to train. Every key below can also be given on the command line as `section.key=value`, which
wins over the file. Sizes are written `6GiB`, numbers `2e-5`. Unknown keys are refused with the nearest known one.

A run saves its resolved job (what model and method decide filled in) as `job.yaml` in its folder.

This page is printed from the schema (`python -m sartor.job.reference > docs/job.md`).
"""


def reference() -> str:
    """The whole page, Markdown."""
    return "\n".join([_HEAD, *_sections("", Job)])


def _sections(name: str, section: Any) -> list[str]:
    """The page of a section: its own keys, then the sections in it."""
    hints = typing.get_type_hints(section)
    fields = dataclasses.fields(section)
    inner = {field.name: section_of(hints[field.name]) for field in fields}
    plain = [field for field in fields if inner[field.name] is None]
    title, meaning = (f"## {name}\n", f"{section.__doc__}\n") if name else ("## Keys of the job itself\n", "")
    parts = [title, *([meaning] if meaning else []), _table(plain, hints)]
    for field in fields:
        if inner[field.name] is not None:
            parts += _sections(f"{name}.{field.name}" if name else field.name, inner[field.name])
    return parts


def _table(fields: Any, hints: dict[str, Any]) -> str:
    rows = ["| key | meaning | takes | default |", "|---|---|---|---|"]
    for field in fields:
        takes = describe(hints[field.name]) + "".join(
            f", {name.replace('_', ' ')} {limit}" for name, limit in field.metadata["limits"].items()
        )
        rows.append(f"| `{field.name}` | {field.metadata['meaning']} | {takes} | {_default(field)} |")
    return "\n".join(rows) + "\n"


def _default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "" if value == {} else f"`{value}`"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


if __name__ == "__main__":
    print(reference(), end="")
