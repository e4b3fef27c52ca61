"""Weights read from safetensors one tensor at a time, into memory that is there already: a model need never be whole in memory.

The format is a length (8 bytes, little-endian), so many bytes of JSON, and the tensors' bytes one after the other
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sartor.errors import ModelError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"


class _Entry(NamedTuple):
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFiles:
    """The tensors of a safetensors file, or of a folder of them, by name."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers only. Raises ModelError where a file is damaged."""
        index = folder / _INDEX
        if folder.is_file():
            paths = [folder]
        elif index.is_file():
            paths = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        else:
            paths = sorted(folder.glob("*.safetensors"))
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for path in paths:
            self._entries.update(_header(path))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def resident_bytes(self, dtype: torch.dtype) -> int:
        """What transformers has in memory when it has loaded all of them in this format: files are mapped, and tensors that are
        stored in another floating-point format are copied while they are."""
        total = 0
        for entry in self._entries.values():
            stored = _DTYPES.get(entry.dtype)
            total += entry.end - entry.start
            if stored is not None and stored.is_floating_point and stored != dtype:
                total += math.prod(entry.shape) * dtype.itemsize
        return total

    def empty(self, name: str) -> Tensor:
        """A tensor of this one's shape and format, to read it into."""
        entry = self._entries[name]
        return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])

    def read(self, name: str, into: Tensor) -> None:
        """Fill a tensor, converting where its format is another one. Raises ModelError."""
        entry = self._entries[name]
        if tuple(into.shape) != entry.shape:
            raise ModelError(
                f"{name} of {self.folder} has shape {list(entry.shape)}, the model wants {list(into.shape)}",
                remedy="weights and config.json that belong together",
            )
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise ModelError(f"{name} of {self.folder} is stored as {entry.dtype}", why="this is not a format that trains")
        target = into if into.is_cpu and dtype == into.dtype and into.is_contiguous() else torch.empty(entry.shape, dtype=dtype)
        count = entry.end - entry.start
        buffer = memoryview((ctypes.c_ubyte * count).from_address(target.data_ptr()) if count else b"").cast("B")
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < count:
                got = file.readinto(buffer[done:])
                if not got:
                    raise ModelError(f"{entry.path} ends too early", remedy="get the complete file")
                done += got
        if target is not into:
            into.copy_(target)


def _header(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"cannot read {path}", why=str(error), remedy="get the file again") from error
    start = 8 + length
    return {
        name: _Entry(
            path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0], start + entry["data_offsets"][1]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_weights(
    path: Path, tensors: Sequence[tuple[str, Tensor]], values: Callable[[int], Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, as `safetensors.torch.save_file` writes it, of tensors that are not all in memory.

    `tensors`: names, shapes and formats; `values(n)` gives the n-th when its turn comes.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    order = sorted(range(len(tensors)), key=lambda n: (-tensors[n][1].element_size(), tensors[n][0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for number in order:
        name, like = tensors[number]
        start, end = end, end + like.numel() * like.element_size()
        header[name] = {"dtype": names[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number in order:
            tensor = values(number).detach().cpu().contiguous()
            if tensor.numel():
                file.write(
                    memoryview((ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr()))
                )
