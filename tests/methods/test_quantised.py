"""Methods beside quantised weights: what a job may say, what it needs, and that runs train, stop and go on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sartor
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.job.load import to_mapping
from sartor.job.schema import QuantiseJob
from sartor.methods import traits
from sartor.model import build, quantise_skeleton, resolve, skeleton, weight_bytes
from sartor.train import read_metrics
from support import make_model

HERE = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HERE, reason="needs bitsandbytes: pip install 'sartor[quant]'")


def job(**keys: Any) -> Any:
    return from_mapping({"model": "unused", "data": "unused", **keys})


def test_qlora_is_lora_beside_nf4() -> None:
    plain = job(method="qlora")
    assert plain.quantise == QuantiseJob(mode="nf4", double=True, compute="bfloat16", upcast=False)
    assert job(method="qlora", quantise={"double": False}).quantise.double is False
    assert job(method="lora", quantise="int8").quantise.mode == "int8"
    assert job(method="lora").quantise is None
    assert from_mapping(to_mapping(plain)) == plain
    assert "quantise" not in to_mapping(job(method="lora"))
    assert traits(plain) == traits(job(method="lora"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "full", "quantise": "nf4"}, "method full trains the weights themselves"),
        ({"method": "qlora", "quantise": "int8"}, "`quantise.mode` is int8"),
        ({"method": "lora", "quantise": "fp8"}, "`quantise.mode` is 'fp8'"),
        ({"method": "lora", "load_in_4bit": True}, "did you mean `method: qlora`"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        job(**keys)


@pytest.mark.parametrize("peft", [{"peft_type": "IA3"}, {"peft_type": "LORA", "use_dora": True}])
def test_layers_that_are_not_known_beside_quantised_weights_are_refused(peft: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="`quantise` does not go with"):
        traits(job(peft=peft, quantise="nf4"))


def test_a_plan_needs_neither_bitsandbytes_nor_weights(
    job_tree: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest))
    tree = {**job_tree, "model": {"path": str(tiny)}, "method": "qlora"}
    assert sartor.plan(tree).forecast.peak is not None
    with pytest.raises(JobError, match="bitsandbytes is not installed") as missing:
        sartor.train(tree)
    assert "sartor[quant]" in str(missing.value)
    assert not Path(job_tree["output"]).exists()
    tree["model"]["random_weights"] = True
    assert sartor.plan(tree).forecast.peak is not None
    with pytest.raises(JobError, match="starts from random weights"):
        sartor.train(tree)


def test_quantised_weights_take_a_quarter() -> None:
    """Llama-2-7B: 6.48e9 quantised weights, 0.26e9 that are not; sizes by hand."""
    from transformers import LlamaConfig

    from sartor.model import ModelSource

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    source = ModelSource(path="llama-7b", config=config, has_weights=False)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = weight_bytes(skeleton(source, dtype=torch.bfloat16)) - 2 * linear
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)
    tables = 32 * 7 * 4
    expected = {
        QuantiseJob(mode="int8"): linear + 4 * rows,
        QuantiseJob(double=False): linear // 2 + 4 * linear // 64 + 16 * tables,
        QuantiseJob(): linear // 2 + linear // 64 + 4 * linear // 64 // 256 + (16 + 256 + 1) * tables,
    }
    for quantise, size in expected.items():
        assert weight_bytes(quantise_skeleton(skeleton(source, dtype=torch.bfloat16), quantise)) == rest + size


@needs_bitsandbytes
@pytest.mark.parametrize("keys", [{"method": "qlora"}, {"method": "lora", "quantise": "int8"}], ids=str)
def test_a_run_learns_and_goes_on_exactly(job_tree: dict[str, Any], tmp_path: Path, keys: dict[str, Any]) -> None:
    job_tree |= {**keys, "evaluation": {"fraction": 0.2, "every": 1, "generate": 0}}
    job_tree["training"] |= {"learning_rate": 1e-2, "save_every": 2, "keep_last": 9}
    run = sartor.train(job_tree)
    metrics = read_metrics(Path(run.folder))
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    assert held_out[-1] < held_out[0]
    whole = load_file(Path(run.folder) / "adapter_model.safetensors")
    resumed = sartor.train(job_tree, resume="checkpoint-2")
    again = load_file(Path(resumed.folder) / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(tensor.equal(again[name]) for name, tensor in whole.items())
    assert isinstance(sartor.Session.open(run.folder).answer("What is number 3?"), str)


@needs_bitsandbytes
def test_gradients_pass_after_an_evaluation(tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    model = build(resolve(job(model=str(wide)).model), dtype=torch.float32, device="cpu", quantise=QuantiseJob())
    ids = torch.arange(8)[None]

    def gradient() -> torch.Tensor:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=inputs).logits.square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(ids)
    model.train()
    assert gradient().equal(before)
