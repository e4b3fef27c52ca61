"""Small real models and data that tests make."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from sartor.machine.calibration import AttentionRate, DeviceRates, LossRate, MatmulRate, MemoryRate

REPOSITORY = Path(__file__).parents[1]
BASE = REPOSITORY / "src/sartor/demo/model"
"""The demo's base model: its tokenizer and chat template serve the tiny models below."""


def make_model(folder: Path, **changes: Any) -> Path:
    """A Llama of about 60,000 random weights with the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        **{**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "tie_word_embeddings": True, **changes},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(count: int) -> list[dict[str, Any]]:
    """Ragged question-and-answer pairs."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {'the size of ' * (index % 4)}number {index}?"},
                {"role": "assistant", "content": f"It is {index}" + " and more" * (index % 7) + "."},
            ]
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


_VOID = {"meta"}


class PageChecker(HTMLParser):
    """Balanced tags, no scripts, nothing fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def device_rates() -> DeviceRates:
    """A machine of round numbers."""
    kinds = ("add", "copy", "cast", "exp", "silu", "softmax", "layer_norm", "sum", "gather")
    return DeviceRates(
        matmul=tuple(
            MatmulRate(dtype="float32", form=form, batch=1, m=m, n=n, k=256, flops_per_second=rate)
            for form, m, n, rate in (
                ("nt", 64, 256, 4e10), ("nt", 1024, 256, 1e11), ("nn", 1024, 256, 8e10), ("tn", 1024, 256, 6e10)
            )
        ),
        memory=tuple(
            MemoryRate(kind=kind, dtype="float32", total_bytes=size, bytes_per_second=rate)
            for kind in kinds
            for size, rate in ((2**20, 4e10), (2**27, 1e10))
        ),
        attention=(
            AttentionRate(
                dtype="float32", form="causal", batch=4, heads=12, length=256, head_size=64, forward_flops_per_second=5e10,
                backward_flops_per_second=3e10,
            ),
        ),
        loss=(
            LossRate(
                dtype="float32", rows=512, vocabulary=2048, forward_elements_per_second=1e9, backward_elements_per_second=2e9
            ),
        ),
        operator_seconds=1e-6,
        recorded_operator_seconds=2e-6,
        backward_operator_seconds=3e-6,
        view_seconds=1e-6,
        view_backward_seconds=2e-6,
        block_operator_seconds=4e-6,
        compiled_block_operator_seconds=None,
        compiled_block_backward_operator_seconds=None,
        block_backward_operator_seconds=5e-6,
        adamw_parameters_per_second=1e9,
        adamw_tensor_seconds=1e-6,
        first_touch_bytes_per_second=1e9,
    )  # fmt: skip
