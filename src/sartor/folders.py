"""Where Sartor keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(purpose: str) -> Path | None:
    """A folder of $SARTOR_CACHE, else of sartor in $XDG_CACHE_HOME or ~/.cache; None where there is no home."""
    try:
        if own := os.environ.get("SARTOR_CACHE"):
            return Path(own).expanduser() / purpose
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sartor" / purpose
    except RuntimeError:
        return None
