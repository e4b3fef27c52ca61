"""What benchmarks/gpu/memory.py runs: models of the common architectures with random weights, and how they are trained.

Small and telling ones first, so that a run that is cut off has measured something of everything.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GIB = 2**30


def _llama(
    width: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }


def _qwen2(width: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int, *, tied: bool) -> dict[str, Any]:
    config = _llama(width, inner, layers, heads, shared, vocabulary, tied=tied)
    return config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def _gpt2(width: int, layers: int, heads: int, vocabulary: int, *, dropout: float) -> dict[str, Any]:
    chances = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        **chances,
    }


def _mixtral(width: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int) -> dict[str, Any]:
    config = _llama(width, inner, layers, heads, shared, vocabulary)
    moe = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    return config | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | moe


MODELS = {
    "tiny": _llama(64, 176, 2, 4, 4, 512),
    "tiny-gqa": _llama(64, 176, 6, 4, 2, 512, tied=True),
    "llama-0.1b": _llama(768, 2048, 12, 12, 12, 32000),
    "llama-0.1b-gqa": _llama(768, 2048, 12, 12, 4, 32000),
    "gpt2-0.1b": _gpt2(768, 12, 12, 50257, dropout=0.0),
    "gpt2-0.1b-dropout": _gpt2(768, 12, 12, 50257, dropout=0.1),
    "mixtral-0.2b": _mixtral(512, 1024, 12, 8, 4, 32000),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "llama-1b": _llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3b": _llama(3072, 8192, 28, 24, 8, 128256, tied=True),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of `MODELS` and how it is trained; every row has `length` tokens, all of them trained."""

    model: str
    method: str = "full"
    precision: str = "bf16"
    attention: str = "sdpa"
    recompute: bool = False
    loss: str = "sartor"
    optimizer: str = "adamw"
    length: int = 512
    micro_batch: int = 4
    accumulate: int = 1
    packed: int = 1
    """Examples a row; more than one makes transformers build a mask."""
    expandable: bool = True
    lora_dropout: float = 0.0
    capacity_bytes: int | None = None
    """What the allocator may take from the device, where that is less than there is."""

    def config(self) -> dict[str, Any]:
        return dict(MODELS[self.model])

    def job(self, model: str) -> dict[str, Any]:
        """The job; `model`: where its configuration lies."""
        examples = self.micro_batch * self.accumulate * self.packed
        job: dict[str, Any] = {
            "model": model,
            "data": {
                "synthetic": {"length": self.length, "examples": examples},
                "packing": self.packed > 1,
                "max_length": self.length * self.packed,
            },
            "method": self.method,
            "precision": self.precision,
            "training": {"max_steps": 2, "global_batch": examples, "loss": self.loss, "optimizer": self.optimizer},
            "strategy": {
                "micro_batch": self.micro_batch,
                "recompute": "full" if self.recompute else "none",
                "attention": self.attention,
                "expandable_segments": self.expandable,
            },
        }
        if self.method in ("lora", "qlora"):
            job["lora"] = {"rank": 16, "dropout": self.lora_dropout}
        return job


_small = Case(model="llama-0.1b")
_1b = Case(model="llama-1b", length=1024, micro_batch=2)
_7b = Case(model="llama-7b", precision="bf16-mixed", method="lora", length=1024, micro_batch=1)


def _with(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


CASES = {
    "small-bf16": _small,
    "small-mixed": _with(_small, precision="bf16-mixed"),
    "small-float32": _with(_small, precision="float32", expandable=False),
    "small-mixed-eager": _with(_small, precision="bf16-mixed", attention="eager"),
    "small-gqa-bf16": _with(_small, model="llama-0.1b-gqa", expandable=False),
    "small-gqa-float32": _with(_small, model="llama-0.1b-gqa", precision="float32"),
    "small-gqa-mixed-packed": _with(_small, model="llama-0.1b-gqa", precision="bf16-mixed", packed=4, length=256, micro_batch=2),
    "small-bf16-eager-hf-foreach": _with(_small, attention="eager", loss="hf", optimizer="adamw-foreach", expandable=False),
    "gpt2-bf16": _with(_small, model="gpt2-0.1b"),
    "gpt2-mixed-hf": _with(_small, model="gpt2-0.1b", precision="bf16-mixed", loss="hf", expandable=False),
    "gpt2-dropout-mixed": _with(_small, model="gpt2-0.1b-dropout", precision="bf16-mixed"),
    "gpt2-dropout-bf16-eager": _with(_small, model="gpt2-0.1b-dropout", attention="eager"),
    "qwen2-lora-mixed": Case(model="qwen2-0.5b", method="lora", precision="bf16-mixed", length=1024),
    "qwen2-lora-recompute-hf": Case(
        model="qwen2-0.5b", method="lora", precision="bf16-mixed", recompute=True, loss="hf", length=2048, micro_batch=2
    ),
    "qwen2-full-mixed-foreach": Case(model="qwen2-0.5b", precision="bf16-mixed", optimizer="adamw-foreach", expandable=False),
    "qwen2-prefix-mixed": Case(model="qwen2-0.5b", method="prefix", precision="bf16-mixed", micro_batch=2),
    "small-prefix-bf16": _with(_small, method="prefix", expandable=False),
    "mixtral-bf16": Case(model="mixtral-0.2b"),
    "mixtral-lora-mixed-recompute": Case(model="mixtral-0.2b", method="lora", precision="bf16-mixed", recompute=True),
    "small-sgd-float32-short": _with(_small, precision="float32", optimizer="sgd", length=128, micro_batch=8, accumulate=2),
    "small-lora-dropout": _with(_small, method="lora", precision="bf16-mixed", lora_dropout=0.05),
    "1b-bf16-recompute": _with(_1b, recompute=True, expandable=False),
    "1b-mixed": _with(_1b, precision="bf16-mixed"),
    "1b-float32-recompute": _with(_1b, precision="float32", recompute=True),
    "1b-lora-mixed-accumulate": _with(_1b, method="lora", precision="bf16-mixed", accumulate=4),
    "1b-lora-mixed-eager": _with(_1b, method="lora", precision="bf16-mixed", attention="eager", expandable=False),
    "1b-lora-mixed-long": _with(_1b, method="lora", precision="bf16-mixed", recompute=True, length=8192, micro_batch=1),
    "1b-bf16-too-little": _with(_1b, expandable=False, capacity_bytes=11 * GIB),
    "1b-bf16-just-enough": _with(_1b, capacity_bytes=14 * GIB),
    "3b-lora-mixed": Case(model="llama-3b", method="lora", precision="bf16-mixed", length=1024, micro_batch=2),
    "3b-bf16-recompute-foreach": Case(
        model="llama-3b", recompute=True, optimizer="adamw-foreach", length=1024, micro_batch=2, expandable=False
    ),
    "7b-lora-mixed-recompute": _with(_7b, recompute=True, length=2048),
    "7b-lora-mixed": _with(_7b, expandable=False),
    "7b-lora-bf16-hf": _with(_7b, precision="bf16", loss="hf", micro_batch=2),
    "7b-bf16-sgd-recompute": _with(_7b, method="full", precision="bf16", optimizer="sgd", recompute=True),
    "qwen2-7b-lora-hf": Case(
        model="qwen2-7b", method="lora", precision="bf16-mixed", loss="hf", recompute=True, length=2048, expandable=False
    ),
    "7b-bf16-adamw-recompute": _with(_7b, method="full", precision="bf16", recompute=True, length=512),
    "13b-lora-mixed-recompute": _with(_7b, model="llama-13b", recompute=True, length=512, micro_batch=2),
    "1b-eager-out-of-memory": _with(_1b, attention="eager", length=8192, micro_batch=4),
    "13b-bf16-adamw": _with(_7b, model="llama-13b", method="full", precision="bf16", length=128),
    "13b-float32-out-of-memory": _with(_7b, model="llama-13b", method="full", precision="float32", length=128),
    "qwen2-qlora": Case(model="qwen2-0.5b", method="qlora", precision="bf16-mixed", length=1024, micro_batch=2),
}

CPU_CASES = {
    "tiny-float32": Case(model="tiny", precision="float32", length=64, micro_batch=2, expandable=False),
    "tiny-lora-recompute": Case(
        model="tiny-gqa", method="lora", precision="bf16-mixed", recompute=True, length=48, micro_batch=2, accumulate=2
    ),
    "tiny-eager-hf": Case(model="tiny", precision="bf16", attention="eager", loss="hf", length=32, micro_batch=3),
}
"""Where there is no accelerator: to see that the script works."""
