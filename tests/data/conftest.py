"""Small real tokenizers, trained on the spot, and jobs over small files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import sartor.job as job
from sartor.job import Job

SHARED = Path(__file__).parents[3] / "shared"
TEXTS = [
    "How are you today? I am fine, thank you.\n",
    "user assistant system\n",
    "Write one line about the sea.\n",
    "äöü 你好 🙂\n",
] * 3


@pytest.fixture
def byte_level(tmp_path: Path) -> Callable[..., Any]:
    """A byte-level BPE tokenizer like GPT-2's; `adds_bos` lets it begin sequences with <s>."""

    def make(*, adds_bos: bool = False, trim: bool = False, template: str | None = None, **special: str | None) -> Any:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        names = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        backend.train_from_iterator(
            TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
        )
        backend.post_processor = processors.ByteLevel(trim_offsets=trim)
        if adds_bos:
            bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
            backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), bos])
        return _saved(backend, tmp_path, template, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special})

    return make


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Any:
    """A BPE tokenizer with byte fallback and a word mark, like Llama 2's; begins sequences with <s>."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(TEXTS[:2], trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _saved(backend, tmp_path, None, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _saved(backend: Tokenizer, folder: Path, template: str | None, special: dict[str, str | None]) -> Any:
    """By way of the disk, as users' tokenizers come."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **{name: token for name, token in special.items() if token})
    wrapped.chat_template = template
    place = tempfile.mkdtemp(prefix="tokenizer-", dir=folder)
    wrapped.save_pretrained(place)
    return PreTrainedTokenizerFast.from_pretrained(place)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSON lines, or text as it is."""

    def make(content: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def job_for() -> Callable[..., Job]:
    """A job over one file; keyword arguments are keys of `data`, dictionaries other sections."""

    def make(path: Path | str, **options: Any) -> Job:
        sections = {name: options.pop(name) for name in ("evaluation", "training") if name in options}
        return job.from_mapping({"model": "m", "data": {"path": str(path), **options}, **sections})

    return make


@pytest.fixture
def shared() -> Path:
    """Public data and tokenizers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture
def byte_level_once(byte_level: Callable[..., Any]) -> Any:
    """One such tokenizer for all examples of a property."""
    return byte_level()
