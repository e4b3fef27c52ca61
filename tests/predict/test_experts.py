"""Models whose code looks at values, or at weights: forecast as they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from sartor.job import from_mapping
from sartor.job.schema import ModelJob
from sartor.model import ModelSource, resolve, skeleton
from sartor.model.quantise import quantise_skeleton
from sartor.predict.whole import trace_job
from sartor.step import Precision

from .test_exact import counted
from .test_repeat import batches
from .test_sharded import CPU

EXPERTS = {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}
ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_that_ask_for_their_tokens(recompute: bool) -> None:
    """A fresh model spreads tokens about evenly, as the forecast takes it; gradients of these experts are whole tensors."""
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 4, "vocab_size": 320, "max_seq_len": 128}
    config = AutoConfig.for_model("dbrx", **sizes, ffn_config=EXPERTS, attn_config=ATTENTION)
    source = ModelSource(path="dbrx", config=config, has_weights=False)
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    precision = Precision.of("float32")
    forecast = trace_job(job, source, batches(2), CPU, precision=precision, recompute=recompute, attention=None).peak()

    measured = counted(job, source, batches(2), precision=precision, recompute=recompute)
    assert forecast.total_bytes == pytest.approx(measured.total_bytes, rel=0.05)  # they are not quite even
    assert forecast.by_kind["weights"] == measured.by_kind["weights"]


def test_weights_that_a_model_multiplies_itself_are_not_quantised() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 8}
    source = ModelSource(path="mamba", config=AutoConfig.for_model("mamba", **sizes), has_weights=False)
    job = from_mapping({"model": "unused", "data": "unused", "method": "qlora"})
    assert job.quantise is not None
    model = quantise_skeleton(skeleton(source, dtype=torch.bfloat16), job.quantise)
    plain = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {"dt_proj", "lm_head"}
    ledger = trace_job(job, source, batches(1), CPU, precision=Precision.of("bf16-mixed"), recompute=False, attention=None)
    assert "gradients" in ledger.kinds.values()


def test_sizes_at_the_top_of_a_file_are_the_decoders(tmp_path: Path) -> None:
    """As some files of models that see have them; transformers would take sizes of its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 16}
    experts = {"num_experts": 40, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32}
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    rest = {"num_key_value_heads": 2, "vocab_size": 320, "layer_types": kinds, "sliding_window": 16}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "step3p7", **sizes, **experts, **rest}), encoding="utf-8")
    source = resolve(ModelJob(path=str(file)))
    text = source.config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.sliding_window) == (64, 5, 16)
    job = from_mapping({"model": str(file), "data": "unused", "method": "lora"})
    ledger = trace_job(job, source, batches(1), CPU, precision=Precision.of("bf16-mixed"), recompute=False, attention=None)
    assert "gradients" in ledger.kinds.values()
