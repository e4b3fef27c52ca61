"""Quantised weights: the stand-ins of the forecast against bitsandbytes itself, where it is installed."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from sartor.data.pack import Batch, collate, fill_rows
from sartor.data.tokens import Sample, TokenSet
from sartor.job import Job, from_mapping
from sartor.job.schema import QuantiseJob
from sartor.methods import traits
from sartor.model import build, quantise_skeleton, resolve, skeleton
from sartor.model.quantised import Linear4bit, Linear8bitLt
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
    """Sees what happens inside bitsandbytes' operators as well; `inside`: their Python, by name."""

    def __init__(self, inside: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.inside = inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bitsandbytes" and func._schema.name in self.inside:
            with self:
                return self.inside[func._schema.name](*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def kernels_of(monkeypatch: pytest.MonkeyPatch, device: str) -> tuple[Any, dict[str, Callable[..., Any]]]:
    """A fresh copy of bitsandbytes' backend for this device, and its operators, by name."""
    from bitsandbytes import _ops

    found: dict[str, Callable[..., Any]] = {}

    def register(name: str, kind: str, function: Any = None) -> Any:
        return functools.partial(register, name, kind) if function is None else found.setdefault(name, function)

    spec = importlib.util.find_spec(f"bitsandbytes.backends.{device}.ops")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(_ops, "register_kernel", register)
        spec.loader.exec_module(module)
    return module, found


class Silence:
    """A native library whose functions do nothing, and report no error."""

    def __getattr__(self, name: str) -> Any:
        self.__dict__[name] = lambda *arguments: 0
        return self.__dict__[name]


class Zeroed:
    """`torch`, with memory that is always zero: the kernels that would write it are silent."""

    empty, empty_like = staticmethod(torch.zeros), staticmethod(torch.zeros_like)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """bitsandbytes as on CUDA, on CPU tensors: its Python as it is, without the native kernels, which allocate nothing."""
    import bitsandbytes
    from bitsandbytes import cextension
    from bitsandbytes.autograd._functions import MatMul8bitLt

    monkeypatch.setattr(cextension, "lib", Silence())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    module, kernels = kernels_of(monkeypatch, "cuda")
    module.torch, module._cuda_device_of, module.CUBLAS_Context = Zeroed(), contextlib.nullcontext, mock.MagicMock()
    module._gemm_4bit_use_custom_fn = lambda *arguments: False
    monkeypatch.setattr(
        bitsandbytes,
        "matmul",
        lambda A, B, out=None, state=None, threshold=0.0, bias=None: MatMul8bitLt.apply(A, B, out, bias, state),
    )
    # PEFT asks without a device, which means CUDA; autocast is on for the CPU here.
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))
    return kernels_of(monkeypatch, "default")[1] | kernels


def forecast(job: Job, mode: str, recompute: bool, kind: str = "cpu") -> Any:
    precision = Precision.of(mode)
    model = skeleton(resolve(job.model), dtype=precision.load_dtype(adapter=traits(job).adapter))
    model = make_trainable(model, job, precision, recompute=recompute, meta=True, kind=kind)
    return trace_steps(model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), [batch(), batch()])


def measured(job: Job, mode: str, recompute: bool, inside: dict[str, Callable[..., Any]]) -> Any:
    precision = Precision.of(mode)
    dtype = precision.load_dtype(adapter=True)
    model = build(resolve(job.model), dtype=dtype, device="cpu", quantise=job.quantise)
    model = make_trainable(model, job, precision, recompute=recompute, seed=0)
    gc.collect()
    tracker = RealTracker(inside)
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


PRECISIONS = ["float32", "bf16-mixed", "bf16"]
CASES = [
    (name, options, precision, bool(number % 4))
    for number, (name, options, precision) in enumerate(itertools.product(["tiny", "biased", "gpt2"], MODES, PRECISIONS))
    if number % 2 == 0
]
"""Every second combination, every second of them with recomputation; single layers are tried in all."""


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "options", "precision", "recompute"), CASES, ids=str)
def test_the_traced_peak_is_the_measured_one(
    request: pytest.FixtureRequest, name: str, options: dict[str, Any], precision: str, recompute: bool
) -> None:
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    job = job_for(request.getfixturevalue(name), quantise=options)
    inside = {"bitsandbytes::gemm_4bit": _gemm_4bit_default_impl}
    traced, real = forecast(job, precision, recompute).peak(), measured(job, precision, recompute, inside).peak()
    assert (traced.total_bytes, traced.by_kind, traced.phase) == (real.total_bytes, real.by_kind, real.phase)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "options", "precision", "recompute"), CASES, ids=str)
def test_on_cuda_bitsandbytes_allocates_the_same(
    request: pytest.FixtureRequest,
    cuda_kernels: dict[str, Callable[..., Any]],
    name: str,
    options: dict[str, Any],
    precision: str,
    recompute: bool,
) -> None:
    job = job_for(request.getfixturevalue(name), quantise=options)
    real = measured(job, precision, recompute, cuda_kernels).peak()
    traced = forecast(job, precision, recompute, kind="cuda").peak()
    assert (traced.total_bytes, traced.by_kind, traced.phase) == (real.total_bytes, real.by_kind, real.phase)


def passes(layer: nn.Module, tracker: StorageTracker, dtype: torch.dtype) -> list[int]:
    """Bytes beyond the layer's own: most in forward, then after it, most in backward, after it, and without the graph."""
    states = [tensor for module in layer.modules() for tensor in bitsandbytes_state(module)]
    seen = []
    with tracker:
        tracker.mark([*layer.parameters(), *layer.buffers(), *states], "weights")
        start = sum(event.size_bytes for event in tracker.ledger.events)
        x = torch.zeros((2, 40, layer.in_features), dtype=dtype, requires_grad=True)
        tracker.begin("forward")
        output = layer(x)
        tracker.begin("backward")
        output.backward(torch.ones_like(output))
        tracker.begin("end")
        del output
        x.grad = None
        gc.collect()
    live = 0
    for phase, events in itertools.groupby(tracker.ledger.events, key=lambda event: event.phase):
        levels = list(itertools.accumulate((event.size_bytes for event in events), initial=live))
        live = levels[-1]
        if phase != "build":
            seen += [max(levels) - start, live - start]
    return seen


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", MODES[:4], ids=str)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_layer_allocates_what_bitsandbytes_does(
    request: pytest.FixtureRequest, kind: str, options: dict[str, Any], bias: bool, dtype: torch.dtype
) -> None:
    import bitsandbytes
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    quantise = QuantiseJob(**options)
    compute = getattr(torch, quantise.compute)
    inside = {"bitsandbytes::gemm_4bit": _gemm_4bit_default_impl}
    if kind == "cuda":
        inside = request.getfixturevalue("cuda_kernels")
    source = nn.Linear(128, 192, bias=bias)
    if quantise.mode == "int8":
        real: nn.Module = bitsandbytes.nn.Linear8bitLt(128, 192, bias, has_fp16_weights=False, threshold=6.0)
    else:
        real = bitsandbytes.nn.Linear4bit(128, 192, bias, compute, quantise.double, "nf4")
    real.load_state_dict(source.state_dict())
    real = real.to("cpu").train().requires_grad_(False)
    frozen = None if source.bias is None else nn.Parameter(source.bias.data, requires_grad=False)
    if quantise.mode == "int8":
        stand_in: nn.Module = Linear8bitLt(128, 192, frozen, kind=kind)
    else:
        stand_in = Linear4bit(128, 192, frozen, stored=torch.float32, compute=compute, double=quantise.double, kind=kind)
    assert passes(stand_in.to_empty(device="cpu").train(), StorageTracker(), dtype) == passes(real, RealTracker(inside), dtype)
