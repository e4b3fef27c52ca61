"""Reading: every type, every way a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sartor.data import files
from sartor.errors import DataError
from sartor.job.schema import DataJob

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä", "completion": "d"}]


def read(path: Any, **options: Any) -> list[files.Record]:
    return list(files.find(DataJob(path=str(path), **options)).records())


def refused(path: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.json", json.dumps(ROWS), [1, 2]),
        ("a.json", json.dumps(ROWS, indent=2), [1, 2]),
        ("a.json", "".join(json.dumps(row) + "\n" for row in ROWS), [1, 2]),
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), [1, 2]),
        ("a.ndjson", "\ufeff\n" + "\r\n\r\n".join(json.dumps(row) for row in ROWS), [2, 4]),
        ("a.csv", "prompt,completion\na,b\nä,d\n", [2, 3]),
        ("a.csv", '\ufeffprompt,completion\r\n"a","b"\r\n\r\nä,d', [2, 4]),
        ("a.tsv", "prompt\tcompletion\na\tb\nä\td\n", [2, 3]),
    ],
)
def test_types(write: Callable[..., Path], name: str, text: str, lines: list[int]) -> None:
    path = write(text, name)
    assert [(record.value, record.source) for record in read(path)] == [
        (row, f"{path}:{line}") for row, line in zip(ROWS, lines, strict=True)
    ]


def test_one_object_over_many_lines(write: Callable[..., Path]) -> None:
    assert [record.value for record in read(write(json.dumps(ROWS[0], indent=1), "a.json"))] == ROWS[:1]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert [(record.value, record.source[-2:]) for record in read(tmp_path / "a.parquet")] == [(ROWS[0], ":1"), (ROWS[1], ":2")]
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert "not a readable Parquet file" in refused(tmp_path / "b.parquet")


def test_text_whole_or_by_line(write: Callable[..., Path]) -> None:
    path = write("one\n\n two \r\n", "a.txt")
    assert [record.value["text"] for record in read(path)] == ["one\n\n two \r\n"]
    assert [(record.value["text"], record.source) for record in read(path, documents="lines")] == [
        ("one", f"{path}:1"),
        (" two ", f"{path}:3"),
    ]


def test_csv_cell_over_lines_counts_from_its_first(write: Callable[..., Path]) -> None:
    path = write('text,n\n"a\nb",1\nc,2\n', "a.csv")
    assert [(record.value["text"], record.source[-2:]) for record in read(path)] == [("a\nb", ":2"), ("c", ":4")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", ["is empty"]),
        ("a.json", b" \n", ["is empty"]),
        ("a.json", b"[]", ["is empty"]),
        ("a.csv", b"prompt,completion\n", ["is empty"]),
        ("a.txt", b"\n\n", ["is empty"]),
        ("a.jsonl", b'{"a": 1}\n{"a": oops}\n', [":2 is not valid JSON", "oops"]),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', [":3 is not valid JSON", '"a" 2']),
        ("a.jsonl", b"[" * 200_000, ["nested too deeply"]),
        ("a.jsonl", b'{"a": 1}\n{"a": "ol\xe9"}\n', [":2 is not UTF-8", "0xe9", "offset 18", "iconv"]),
        ("a.txt", b"ok\nok\nol\xe9", [":3 is not UTF-8", "offset 8"]),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", [":3 has 3 fields, the header has 2"]),
        ("a.csv", b'a,b\n"1"x,2\n', [":2 is not valid CSV"]),
        ("a.xlsx", b"PK", ["`.xlsx` are not read", ".jsonl"]),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: bytes, says: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert all(part in message for part in says), message


def test_missing(tmp_path: Path) -> None:
    assert "there is no data at" in refused(tmp_path / "nothing.jsonl")
    assert "there is no data at" in refused("owner/name.jsonl")


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused("owner/name")
    assert "no file or folder `owner/name`" in message
    assert "pip install sartor[hub]" in message


def test_folder_reads_its_split_and_says_so(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("train-00001.jsonl", "train-00000.jsonl", "test.jsonl", "training_notes.jsonl", "dataset_info.json", ".x.jsonl"):
        write([{"text": name}], f"d/{name}")
    corpus = files.find(DataJob(path=str(tmp_path / "d")))
    assert [record.value["text"] for record in corpus.records()] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert "read train-00000.jsonl, train-00001.jsonl; left test.jsonl" in corpus.notes[0]
    assert [record.value["text"] for record in read(tmp_path / "d", split="test")] == ["test.jsonl"]
    assert "no split `dev`" in refused(tmp_path / "d", split="dev")


def test_folder_with_subfolders_for_splits(write: Callable[..., Path], tmp_path: Path) -> None:
    write([{"text": "1"}], "d/train/a.jsonl")
    write([{"text": "2"}], "d/validation/a.jsonl")
    assert [record.value["text"] for record in read(tmp_path / "d")] == ["1"]


def test_folder_without_a_train_split_leaves_held_out_files(write: Callable[..., Path], tmp_path: Path) -> None:
    write([{"text": "1"}], "d/part1.jsonl")
    write([{"text": "2"}], "d/part2.jsonl")
    assert len(read(tmp_path / "d")) == 2
    write([{"text": "3"}], "d/test.jsonl")
    assert len(read(tmp_path / "d")) == 2
    (tmp_path / "e").mkdir()
    assert "holds no data files" in refused(tmp_path / "e")
    write([{"text": "3"}], "e/test.jsonl")
    assert "held-out splits only" in refused(tmp_path / "e")


def test_fingerprint_follows_the_contents(write: Callable[..., Path]) -> None:
    path = write("one", "a.txt")
    before = files.find(DataJob(path=str(path))).fingerprint()
    assert before == files.find(DataJob(path=str(path))).fingerprint()
    write("two", "a.txt")
    assert before != files.find(DataJob(path=str(path))).fingerprint()


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[Any]):
        _fingerprint = "abc"

    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> Rows:
        asked.append((name, subset, split))
        if name == "owner/none":
            raise ConnectionError("Couldn't reach 'owner/none' on the Hub (offline mode)")
        return Rows(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    records = read("owner/name", subset="main", split="validation")
    assert [(record.value, record.source) for record in records] == [(ROWS[0], "owner/name:1"), (ROWS[1], "owner/name:2")]
    assert asked == [("owner/name", "main", "validation")]
    message = refused("owner/none")
    assert "Couldn't reach" in message
    assert "HF_HUB_OFFLINE" in message


def test_the_room_imports_no_torch() -> None:
    code = "import sys, sartor.data; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
