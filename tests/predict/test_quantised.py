"""Quantised weights: the stand-ins of the forecast against bitsandbytes itself, where it is installed."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sartor.data.pack import Batch, collate, fill_rows
from sartor.data.tokens import Sample, TokenSet
from sartor.job import Job, from_mapping
from sartor.job.schema import QuantiseJob
from sartor.methods import traits
from sartor.model import ModelSource, build, quantise_skeleton, resolve, skeleton, weight_bytes
from sartor.predict import StorageTracker, trace_steps
from sartor.predict.trace import run_traced_step
from sartor.step import Precision, make_step, make_trainable
from support import make_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'sartor[quant]'"
)
MODES: list[dict[str, Any]] = [
    {"mode": "nf4"},
    {"mode": "nf4", "double": False},
    {"mode": "nf4", "compute": "float32", "upcast": True},
    {"mode": "int8"},
    {"mode": "int8", "upcast": True},
]


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases and a head of its own, in bfloat16 on disk as most models are."""
    return make_model(
        tmp_path_factory.mktemp("biased") / "model", attention_bias=True, tie_word_embeddings=False, torch_dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv1D instead of Linear, an odd hidden size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=36, n_layer=2, n_head=4)).save_pretrained(folder)
    return folder


def batch() -> Batch:
    lengths = [40, 33, 9]
    samples = TokenSet.from_samples(
        [Sample(input_ids=np.arange(n) % 200 + 3, trained=np.arange(n) % 3 > 0, source=f"test:{n}") for n in lengths]
    )
    return collate(samples, fill_rows(range(3), samples.lengths, capacity=64, packing=False), pad_id=0, packing=False)


def job_for(model: Path | str, **keys: Any) -> Job:
    return from_mapping({"model": str(model), "data": "unused", "method": "lora", "lora": {"rank": 4, "dropout": 0.1}, **keys})


def storages(model: nn.Module) -> dict[str, int]:
    """Bytes by the name of the layer, all that a quantised layer keeps included."""
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        own = [*module._parameters.values(), *module._buffers.values(), *bitsandbytes_state(module)]
        unique = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in own if tensor is not None}
        sizes[path] = sum(unique.values())
    return sizes


def bitsandbytes_state(module: nn.Module) -> Iterator[torch.Tensor]:
    """What bitsandbytes' layers keep beside parameters and buffers."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    if type(weight).__name__ == "Int8Params":
        kept = [weight.SCB, getattr(getattr(module, "state", None), "SCB", None)]
        yield from (tensor for tensor in kept if tensor is not None)


class RealTracker(StorageTracker):
    """Sees what happens inside bitsandbytes' operators as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def forecast(job: Job, mode: str, recompute: bool, kind: str = "cpu") -> Any:
    precision = Precision.of(mode)
    model = skeleton(resolve(job.model), dtype=precision.load_dtype(adapter=traits(job).adapter))
    model = make_trainable(model, job, precision, recompute=recompute, meta=True, kind=kind)
    return trace_steps(model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), [batch(), batch()])


def measured(job: Job, mode: str, recompute: bool) -> Any:
    precision = Precision.of(mode)
    dtype = precision.load_dtype(adapter=True)
    model = build(resolve(job.model), dtype=dtype, device="cpu", quantise=job.quantise)
    model = make_trainable(model, job, precision, recompute=recompute, seed=0)
    gc.collect()
    tracker = RealTracker()
    with tracker:
        states = [tensor for module in model.modules() for tensor in bitsandbytes_state(module)]
        tracker.mark([*model.parameters(), *model.buffers(), *states], "weights")
        step = make_step(model, job, precision, device_kind="cpu")
        for number in range(2):
            run_traced_step(tracker, step, [batch(), batch()], 100, number=number)
    return tracker.ledger


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["tiny", "biased", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", MODES[:2] + MODES[3:4], ids=str)
def test_every_layer_is_as_large_as_bitsandbytes_makes_it(
    request: pytest.FixtureRequest, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    source, quantise = resolve(job_for(request.getfixturevalue(name)).model), QuantiseJob(**options)
    real = storages(build(source, dtype=dtype, device="cpu", quantise=quantise))
    assert storages(quantise_skeleton(skeleton(source, dtype=dtype), quantise)) == real


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["tiny", "biased", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["float32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_traced_peak_is_the_measured_one(
    request: pytest.FixtureRequest, name: str, options: dict[str, Any], mode: str, recompute: bool
) -> None:
    job = job_for(request.getfixturevalue(name), quantise=options)
    traced, real = forecast(job, mode, recompute).peak(), measured(job, mode, recompute).peak()
    assert (traced.total_bytes, traced.by_kind, traced.phase) == (real.total_bytes, real.by_kind, real.phase)
