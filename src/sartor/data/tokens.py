"""Tokenised examples: an Arrow file on disk, a `TokenSet` in hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.large_list(pa.int32())),
        pa.field("trained", pa.large_list(pa.bool_())),
        pa.field("source", pa.string()),
        pa.field("truncated", pa.bool_()),
    ]
)

# Samples a record batch: Python objects are few at any time, Arrow holds the rest.
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example. `trained[i]` says that token i counts in the loss (as a target). `source` is `file:record`."""

    input_ids: np.ndarray
    trained: np.ndarray
    source: str
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class TokenSet:
    """A sequence of samples with their lengths at hand."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        ids = self._table["input_ids"].combine_chunks()
        trained = self._table["trained"].combine_chunks()
        offsets = _numbers(ids.offsets)
        self._first = offsets[:-1]
        self._ids = ids.values
        self._trained = trained.values
        self.lengths: np.ndarray = np.diff(offsets)
        """Tokens of each sample, int, (samples,)."""
        # The first token of a sample is never a target: nothing predicts it.
        flags = _numbers(self._trained).astype(np.int64)
        flags[self._first[self.lengths > 0]] = 0
        sums = np.concatenate([[0], np.cumsum(flags)])
        self.trained_counts: np.ndarray = sums[offsets[1:]] - sums[offsets[:-1]]
        """Tokens of each sample that count in the loss, int, (samples,)."""
        self.truncated: np.ndarray = _numbers(self._table["truncated"].combine_chunks())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        first, length = int(self._first[index]), int(self.lengths[index])
        return Sample(
            input_ids=_numbers(self._ids.slice(first, length)),
            trained=_numbers(self._trained.slice(first, length)),
            source=self.source(index),
            truncated=bool(self.truncated[index]),
        )

    @property
    def largest_id(self) -> int:
        """The largest token id in the set; -1 in an empty one."""
        return -1 if not len(self._ids) else int(pc.max(self._ids).as_py())

    def source(self, index: int) -> str:
        """Where the sample comes from: `file:record`."""
        return str(self._table["source"][index])

    def take(self, indices: Iterable[int]) -> TokenSet:
        """The samples with these indices, in this order."""
        places = np.fromiter(indices, dtype=np.int64)
        # `pa.array` would import pandas, where it is installed, to ask whether this is an array of its own: half a second.
        return TokenSet(self._table.take(pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)])))

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> TokenSet:
        """A set in memory."""
        samples = iter(samples)
        chunks = iter(lambda: list(islice(samples, _CHUNK)), [])
        return cls(pa.Table.from_batches([_record_batch(chunk) for chunk in chunks], schema=SCHEMA))

    @classmethod
    def open(cls, path: Path) -> TokenSet:
        """Map a file that `save` made. Raises OSError or pyarrow.ArrowException where it is damaged."""
        with pa.memory_map(str(path)) as source:
            return cls(pa.ipc.open_file(source).read_all())

    def save(self, path: Path) -> None:
        """Write atomically: the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
                writer.write_table(self._table)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# To and from buffers: `pa.array` and `to_numpy` import pandas where it is installed, to ask whether an array is one of its own.


def _numbers(array: pa.Array) -> np.ndarray:
    """Of whole numbers or flags without gaps; not to be written to."""
    if not len(array):
        return np.empty(0, dtype=array.type.to_pandas_dtype())
    content = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        first, last = array.offset // 8, -(-(array.offset + len(array)) // 8)
        bits = np.unpackbits(np.frombuffer(content, np.uint8, count=last - first, offset=first), bitorder="little")
        return bits[array.offset % 8 : array.offset % 8 + len(array)].astype(bool)
    kind = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(content, kind, count=len(array), offset=array.offset * kind.itemsize)


def _record_batch(samples: Sequence[Sample]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])]).astype(np.int64)
    ids = np.concatenate([sample.input_ids for sample in samples] or [np.empty(0)]).astype(np.int32)
    trained = np.concatenate([sample.trained for sample in samples] or [np.empty(0)]).astype(bool)
    sources = [sample.source.encode() for sample in samples]
    ends = np.concatenate([[0], np.cumsum([len(source) for source in sources])]).astype(np.int32)
    numbers = pa.Array.from_buffers(pa.int32(), len(ids), [None, pa.py_buffer(ids)])
    columns = [
        pa.Array.from_buffers(SCHEMA.field(0).type, len(samples), [None, pa.py_buffer(offsets)], children=[numbers]),
        pa.Array.from_buffers(SCHEMA.field(1).type, len(samples), [None, pa.py_buffer(offsets)], children=[_flags(trained)]),
        pa.StringArray.from_buffers(len(samples), pa.py_buffer(ends), pa.py_buffer(b"".join(sources))),
        _flags(np.array([sample.truncated for sample in samples], dtype=bool)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _flags(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))])
