"""Data sets of the Hugging Face hub, by the `datasets` package, which is optional."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sartor.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(path: str) -> bool:
    """Whether `path` could name a hub data set: `name` or `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class HubData:
    """One split of a hub data set, in the cache of `datasets`."""

    rows_of: Any

    @classmethod
    def open(cls, name: str, *, subset: str | None, split: str) -> HubData:
        """Download or find it; honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Raises DataError."""
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"there is no file or folder `{name}`, and the hub cannot be asked",
                why="the package `datasets` is not installed",
                remedy="check `data.path`; for a hub data set: pip install sartor[hub]",
            ) from None
        try:
            return cls(rows_of=datasets.load_dataset(name, subset, split=split))
        # The hub answers with errors of four packages (datasets, huggingface_hub, httpx, fsspec) that share no parent.
        except Exception as error:
            raise DataError(
                f"there is no file or folder `{name}`, and the hub did not give it as a data set",
                why=(str(error).strip() or type(error).__name__).splitlines()[0],
                remedy="check the name, `data.subset`, `data.split`, the network, HF_TOKEN for private data, and HF_HUB_OFFLINE",
            ) from None

    def rows(self) -> Iterator[Any]:
        """The rows as dictionaries."""
        return iter(self.rows_of)

    def fingerprint(self) -> str:
        """Changes whenever the rows do."""
        return str(self.rows_of._fingerprint)
