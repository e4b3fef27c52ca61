"""The reference of the job file, printed from the schema: `python -m sartor.job.reference > docs/job.md`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from sartor.job.load import describe
from sartor.job.schema import Job

_HEAD = """# The job file

One YAML file says what to train. Every key below can also be given on the command line as `section.key=value`, which
wins over the file. Sizes are written `6GiB`, numbers `2e-5`. Unknown keys are refused with the nearest known one.

A run saves its resolved job (what model and method decide filled in) as `job.yaml` in its folder.

This page is printed from the schema (`python -m sartor.job.reference > docs/job.md`).
"""


def reference() -> str:
    """The whole page, Markdown."""
    hints = typing.get_type_hints(Job)
    plain = [field for field in dataclasses.fields(Job) if not dataclasses.is_dataclass(hints[field.name])]
    parts = [_HEAD, "## Keys of the job itself\n", _table(plain, hints)]
    for field in dataclasses.fields(Job):
        section: Any = hints[field.name]
        if dataclasses.is_dataclass(section):
            parts += [
                f"## {field.name}\n",
                f"{section.__doc__}\n",
                _table(dataclasses.fields(section), typing.get_type_hints(section)),
            ]
    return "\n".join(parts)


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
