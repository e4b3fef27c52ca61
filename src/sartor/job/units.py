"""Numbers as people write them: `6GiB`, `2e-5`, `10_000`."""

from __future__ import annotations

import re

_BYTE_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_BYTE_UNITS |= {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1)}
_BYTE_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: str | int | float) -> int:
    """Bytes of `6GiB` (2^30), `6GB` (10^9), `6G` (2^30, as memory is sold) or a bare number. Raises ValueError."""
    match = _SIZE.fullmatch(str(value))
    if not match or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"{value!r} is not a size in bytes")
    return int(float(match[1].replace("_", "")) * _BYTE_UNITS[match[2].lower()])


def format_bytes(size: float) -> str:
    """A size with three significant figures and a binary unit: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            digits = 0 if unit == "B" else 2 if abs(size) < 10 else 1 if abs(size) < 100 else 0
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(number: float) -> str:
    """`512`, `260K`, `7.24B`: three significant figures, as parameter and token counts are written."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
