"""A shortened model, its middle repeated, gives the ledger of the whole one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from sartor.data.pack import Batch, collate, fill_rows
from sartor.data.tokens import Sample, TokenSet
from sartor.job import Job, from_mapping
from sartor.methods import trained_parameters, traits
from sartor.model import ModelSource, skeleton
from sartor.model.regions import KEPT, Reduction, find_regions, reduce_depth
from sartor.predict import Ledger, count_trained, trace_steps
from sartor.predict.repeat import NotRepeatable, expand
from sartor.predict.whole import treats_layers_alike
from sartor.step import Precision, make_step, make_trainable

COMMON = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "intermediate_size": 160, "num_hidden_layers": 11, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 320, "n_embd": 64, "n_head": 4, "n_layer": 7, "n_positions": 128},
    "gemma3_text": {  # every second layer attends to everything
        **COMMON, "intermediate_size": 160, "num_hidden_layers": 13, "num_key_value_heads": 2, "head_dim": 16,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 6 + ["sliding_attention"],
    },
    "qwen3_moe": {
        **COMMON, "intermediate_size": 160, "num_hidden_layers": 7, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "deepseek_v3": {  # three dense layers before those with experts
        **COMMON, "intermediate_size": 160, "num_hidden_layers": 10, "num_key_value_heads": 4, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 3,
    },
    "bloom": {"vocab_size": 320, "hidden_size": 64, "n_head": 4, "n_layer": 7},
}  # fmt: skip


def source(kind: str, **changes: Any) -> ModelSource:
    sizes = {**SMALL[kind], **changes}
    if "layer_types" in sizes:
        sizes["layer_types"] = sizes["layer_types"][: sizes["num_hidden_layers"]]
    return ModelSource(path=kind, config=AutoConfig.for_model(kind, **sizes), has_weights=False)


def short(kind: str) -> ModelSource:
    """With so few layers that real steps are quick; of one repeated layer, one more than a trace keeps."""
    return source(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": KEPT + 1})


def batches(micro_batches: int, *, packing: bool = False) -> list[Batch]:
    lengths = [60, 33, 9]
    samples = TokenSet.from_samples(
        [
            Sample(input_ids=np.arange(length) % 300 + 3, trained=np.arange(length) % 3 > 0, source=f"test:{length}")
            for length in lengths
        ]
    )
    rows = fill_rows(range(len(lengths)), samples.lengths, capacity=64, packing=packing)
    return [collate(samples, rows, pad_id=0, packing=packing)] * micro_batches


def ledger(job: Job, model_source: ModelSource, *, mode: str, recompute: bool, shortened: bool, micro_batches: int = 1) -> Ledger:
    precision = Precision.of(mode)
    model = skeleton(model_source, dtype=precision.load_dtype(adapter=traits(job).adapter))
    reduction = reduce_depth(model) if shortened else Reduction()
    assert bool(reduction.regions) == shortened
    model = make_trainable(model, job, precision, recompute=recompute, meta=True)
    traced = trace_steps(
        model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), batches(micro_batches), reduction=reduction
    )
    return expand(traced, reduction)


CASES = [
    (kind, method, mode, recompute, optimizer, micro_batches)
    for kind in SMALL
    for method, mode, recompute, optimizer, micro_batches in (
        ("full", "float32", False, "adamw", 1),
        ("full", "bf16-mixed", True, "adamw-foreach", 2),
        ("lora", "bf16", False, "adamw-foreach", 1),
        ("lora", "bf16-mixed", True, "sgd", 1),
        ("prompt", "bf16", False, "adamw", 1),
    )
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "method", "mode", "recompute", "optimizer", "micro_batches"), CASES)
def test_the_repeated_ledger_is_the_whole_one(
    kind: str, method: str, mode: str, recompute: bool, optimizer: str, micro_batches: int
) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "training": {"optimizer": optimizer}})
    if kind == "bloom" and method == "lora":
        job = from_mapping({"model": "unused", "data": "unused", "method": "lora", "lora": {"targets": ["query_key_value"]}})
    options = {"mode": mode, "recompute": recompute, "micro_batches": micro_batches}
    short = ledger(job, source(kind), shortened=True, **options)  # type: ignore[arg-type]
    whole = ledger(job, source(kind), shortened=False, **options)  # type: ignore[arg-type]
    # Norms of all parameters, stacked into one tensor, are the only memory that grows with the number of parameters.
    assert short.peak().total_bytes == pytest.approx(whole.peak().total_bytes, rel=1e-4)
    assert short.peak().phase == whole.peak().phase
    sizes = Counter((event.phase, event.size_bytes) for event in short.events if "clip" not in event.phase)
    assert sizes == Counter((event.phase, event.size_bytes) for event in whole.events if "clip" not in event.phase)
    live: Counter[int] = Counter()
    for event in short.events:
        live[event.storage] += event.size_bytes
        assert live[event.storage] >= 0, "freed before it was made"


@pytest.mark.parametrize("kind", SMALL)
def test_parameters_are_counted_for_the_whole_model(kind: str) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    model = skeleton(source(kind), dtype=Precision.of("bf16").load_dtype(adapter=False))
    whole = sum(parameter.numel() for parameter in trained_parameters(model.requires_grad_(True)).values())
    assert count_trained(job, source(kind), Precision.of("bf16")) == whole


def test_regions() -> None:
    assert find_regions("aaaaaaaa") == [(0, 1, 8)]
    assert find_regions("dddmmmmmm") == [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 6)]
    assert find_regions("sf" * 7 + "s") == [(0, 2, 7), (14, 1, 1)]
    assert find_regions("abc") == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert find_regions("aaaaaaabbbbbbb") == [(0, 1, 7), (7, 1, 7)]


def test_a_pattern_is_kept_in_the_configuration() -> None:
    model = skeleton(source("gemma3_text"), dtype=Precision.of("bf16").load_dtype(adapter=False))
    before = list(model.config.layer_types)
    reduction = reduce_depth(model)
    kept = list(model.config.layer_types)
    assert reduction.regions[0].count == 6, "six periods of two layers, and one more"
    assert len(kept) == KEPT * 2 + 1 == model.config.num_hidden_layers
    assert kept == before[: len(kept)]


def test_layers_that_differ_in_a_number_are_not_taken_for_alike() -> None:
    model = skeleton(source("llama"), dtype=Precision.of("bf16").load_dtype(adapter=False))
    for number, layer in enumerate(model.model.layers):
        layer.scale = float(number)
    assert not reduce_depth(model).regions


def test_blocks_that_allocate_otherwise_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that asks for a layer's number cannot be seen from outside; the trace shows it."""
    import torch
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward
    calls = {"count": 0}

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        calls["count"] += 1
        result: torch.Tensor = original(self, hidden)
        return result + torch.ones_like(hidden) if calls["count"] == 3 else result

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    with pytest.raises(NotRepeatable):
        ledger(job, source("llama"), mode="bf16", recompute=False, shortened=True)


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({"method": "lora"}, True),
        ({"method": "lora", "lora": {"targets": ["q_proj", "v_proj"]}}, True),
        ({"method": "lora", "lora": {"targets": r".*\.3\.self_attn\.q_proj"}}, False),
        ({"method": "prefix"}, False),
        ({"method": "prompt"}, True),
        ({"method": "peft", "peft": {"peft_type": "LORA", "target_modules": ["k_proj"], "layers_to_transform": [0]}}, False),
        (
            {
                "method": "peft",
                "peft": {"peft_type": "LORA", "target_modules": ["k_proj"], "rank_pattern": {"1.k_proj": 4}},
            },
            False,
        ),
    ],
)
def test_methods_that_name_layers_are_traced_whole(options: dict[str, Any], alike: bool) -> None:
    assert treats_layers_alike(from_mapping({"model": "unused", "data": "unused", **options})) == alike
