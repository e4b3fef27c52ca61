"""Records from files: .json .jsonl .csv .tsv .parquet .txt, folders of them, and hub data sets.

Every record knows where it came from, as `file:line` (JSON lines, CSV, text lines) or `file:record` (JSON, Parquet, hub).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sartor.data.hub import HubData, is_hub_id
from sartor.errors import DataError
from sartor.job.schema import DataJob

_HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
# What `datasets` and LLaMA-Factory keep beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}
# The default, 128 KiB a field, is less than one long document.
_CSV_FIELD_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One entry of a file, not yet understood. `source` is `file:line`."""

    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where records come from: files in order, or a hub data set. `notes` say what was chosen."""

    path: str
    files: tuple[Path, ...] = ()
    hub: HubData | None = None
    documents: str = "file"
    notes: tuple[str, ...] = ()

    def records(self) -> Iterator[Record]:
        """All records, streamed where the file type allows it. Raises DataError with the place of what is malformed."""
        if self.hub:
            return (Record(value=row, source=f"{self.path}:{number}") for number, row in enumerate(self.hub.rows(), 1))
        return chain.from_iterable(_read(file, self.documents) for file in self.files)

    def fingerprint(self) -> str:
        """A SHA-256 over names and contents (a hub data set: its own fingerprint)."""
        digest = hashlib.sha256(self.path.encode())
        if self.hub:
            digest.update(self.hub.fingerprint().encode())
        for file in self.files:
            with _reading(file), file.open("rb") as stream:
                digest.update(f"\0{file}\0".encode(errors="surrogateescape"))
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def find(job: DataJob) -> Corpus:
    """The files or the hub data set that `job.path` names. Raises DataError where there is none, or of no known type."""
    path = Path(job.path).expanduser()
    if path.is_dir():
        files, notes = _in_folder(path, job.split)
        return Corpus(path=job.path, files=files, documents=job.documents, notes=notes)
    if path.exists():
        if path.suffix.lower() not in _READERS:
            raise DataError(
                f"{path}: files of type `{path.suffix or '(no suffix)'}` are not read",
                remedy=f"convert it, or rename it if it is one of {' '.join(_READERS)}",
            )
        return Corpus(path=job.path, files=(path,), documents=job.documents)
    if is_hub_id(job.path) and path.suffix.lower() not in _READERS:
        return Corpus(path=job.path, hub=HubData.open(job.path, subset=job.subset, split=job.split))
    raise DataError(f"there is no data at {path}", remedy="check `data.path`; relative paths start from the folder you run in")


def _in_folder(folder: Path, split: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    visible = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
    known = [name for name in visible if name.suffix.lower() in _READERS and name.name not in _NOT_DATA]
    if not known:
        raise DataError(f"the folder {folder} holds no data files", remedy=f"files of these types are read: {' '.join(_READERS)}")
    chosen = [name for name in known if _of_split(name, split)]
    if not chosen and split != "train":
        raise DataError(
            f"the folder {folder} has no split `{split}`", why=f"it holds {_listing(known)}", remedy="name one in `data.split`"
        )
    # Without files that say `train`, all are training data but those that say otherwise.
    chosen = chosen or [name for name in known if not any(_of_split(name, other) for other in _HELD_OUT_SPLITS)]
    if not chosen:
        raise DataError(
            f"the folder {folder} has held-out splits only",
            why=f"it holds {_listing(known)}",
            remedy="set `data.split` to train on one of them all the same",
        )
    notes: tuple[str, ...] = ()
    if len(chosen) < len(known):
        left = [name for name in known if name not in chosen]
        notes = (f"split `{split}` of {folder}: read {_listing(chosen)}; left {_listing(left)}",)
    return tuple(folder / name for name in chosen), notes


def _of_split(name: Path, split: str) -> bool:
    """train.jsonl, train-00000-of-00002.parquet, train/anything.jsonl"""
    return split in name.parts[:-1] or re.match(rf"{re.escape(split)}([-_.].*)?$", name.stem) is not None


def _listing(names: list[Path]) -> str:
    shown = ", ".join(map(str, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


class _reading:  # noqa: N801 — reads as the verb it is
    """Turns what the operating system says into a DataError."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise DataError(f"cannot read {self.file}", why=error.strerror or str(error)) from None


def _read(file: Path, documents: str) -> Iterator[Record]:
    with _reading(file):
        count = 0
        for record in _READERS[file.suffix.lower()](file, documents):
            count += 1
            yield record
    if not count:
        raise DataError(f"{file} is empty", why="it holds no records", remedy="check how the file was made")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded one by one, so that a large file is never whole in memory."""
    start = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            yield number, _decode(line, file, number=number, start=start)
            start += len(line)


def _decode(data: bytes, file: Path, *, number: int = 1, start: int = 0) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff" if start == 0 else "")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}:{line} is not UTF-8 text",
            why=f"byte 0x{data[error.start]:02x} at offset {start + error.start:,} of the file",
            remedy="save it as UTF-8, e.g. `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` (put its real encoding)",
        ) from None


def _parse_json(text: str, file: Path, *, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{file}:{line}: the JSON is nested too deeply") from None
    except ValueError as error:
        where, column = (error.lineno, error.colno) if isinstance(error, json.JSONDecodeError) else (1, 1)
        beginning = (text.splitlines() or [""])[where - 1][:60] if where <= len(text.splitlines()) else ""
        raise DataError(
            f"{file}:{line + where - 1} is not valid JSON: {beginning!r}",
            why=f"{error.msg} at column {column}" if isinstance(error, json.JSONDecodeError) else str(error),
            remedy="repair the line or take it out",
        ) from None


def _read_json(file: Path, documents: str) -> Iterator[Record]:
    """A list of objects; or one object; or JSON lines under the wrong name."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"{" and _first_line_is_json(file):
        yield from _read_json_lines(file, documents)
        return
    text = _decode(file.read_bytes(), file)
    if not text.strip():
        return
    values = _parse_json(text, file)
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        yield Record(value=value, source=f"{file}:{number}")


def _first_line_is_json(file: Path) -> bool:
    for _, line in _lines(file):
        if line.strip():
            try:
                return isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                return False
    return False


def _read_json_lines(file: Path, documents: str) -> Iterator[Record]:
    for number, line in _lines(file):
        if line.strip():
            yield Record(value=_parse_json(line.rstrip(), file, line=number), source=f"{file}:{number}")


def _read_csv(file: Path, documents: str) -> Iterator[Record]:
    return _read_table(file, csv.reader((line for _, line in _lines(file)), strict=True))


def _read_tsv(file: Path, documents: str) -> Iterator[Record]:
    # The registered type text/tab-separated-values knows no quoting, and corpora such as GLUE rely on that.
    return _read_table(file, csv.reader((line for _, line in _lines(file)), delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_table(file: Path, rows: Any) -> Iterator[Record]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    header: list[str] | None = None
    first_line = 1
    try:
        for row in rows:
            line, first_line = first_line, rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
            elif len(row) != len(header):
                raise DataError(
                    f"{file}:{line} has {len(row)} fields, the header has {len(header)}",
                    remedy="quote fields that hold the separator or a line break",
                )
            else:
                yield Record(value=dict(zip(header, row, strict=True)), source=f"{file}:{line}")
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num} is not valid CSV", why=str(error)) from None


def _read_parquet(file: Path, documents: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(value=row, source=f"{file}:{number}")
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a readable Parquet file", why=str(error).splitlines()[0]) from None


def _read_text(file: Path, documents: str) -> Iterator[Record]:
    numbered: Iterable[tuple[int, str]]
    if documents == "lines":
        numbered = ((number, line.rstrip("\r\n")) for number, line in _lines(file))
    else:
        numbered = [(1, _decode(file.read_bytes(), file))]
    return (Record(value={"text": text}, source=f"{file}:{number}") for number, text in numbered if text.strip())


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
