"""Context parallelism: the forecast is what real ranks count, and ranks compute what one process computes (over gloo)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import sartor
from ranks import on_ranks
from sartor.data.pack import IGNORE, Batch
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.job.schema import MachineJob, StrategyJob
from sartor.machine import Device, probe
from sartor.model import skeleton
from sartor.parallel import Layout, parallelise
from sartor.parallel.context import places, ring_attention, share
from sartor.plan.layouts import possible_layouts
from sartor.predict import Ledger, StorageTracker, whole
from sartor.predict.target import Target
from sartor.predict.tracker import OUTSIDE
from sartor.predict.whole import trace_job
from sartor.predict.world import make_mesh, wrappers_watched
from sartor.step import Precision, TensorBatch, make_step

from .plain import adamw, fill, least_peak, refusal
from .plain_tensor import plain_plan
from .test_repeat import COMMON, SMALL, batches, source
from .test_sharded import CPU, lora

STEPS = 3
SHORT: dict[str, dict[str, Any]] = {"llama": {"num_hidden_layers": 2}, "gpt2": {"n_layer": 2, "attn_pdrop": 0.0}}
"""Few layers, and no dropout of attention, which the CPU's kernel has not."""


def measured_peak(case: dict[str, Any]) -> int:
    """Steps of AdamW on this rank in plain PyTorch, as accelerate sets it up; the lowest peak of those that find the optimizer's
    state (a thread of gloo may hold what a collective used for longer)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layout, mixed = Layout(**case["layout"]), case["mode"] == "bf16-mixed"
    frozen = torch.bfloat16 if mixed and case["method"] == "lora" else torch.float32
    model = skeleton(source(case["kind"], **SHORT[case["kind"]]), dtype=frozen).train()
    layers = model.get_submodule("transformer.h" if case["kind"] == "gpt2" else "model.layers")
    if case["method"] == "lora":
        with torch.device("meta"):
            model = lora(model)
    if case["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (layout.shard, layout.context, layout.tensor), mesh_dim_names=("shard", "context", "tensor"))
    drop_masks(model)
    if layout.tensor > 1:
        plain_plan(model, mesh["tensor"], sequence=layout.sequence)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    reshard, everyone = layout.zero == 3, mesh["shard", "context"]._flatten("everyone")
    for layer in layers:
        fully_shard(layer, mesh=everyone, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=everyone, reshard_after_forward=None if reshard else False, mp_policy=policy)
    length = {2: 60, 4: 64}[layout.context]  # the test's rows of 60 tokens, padded until they divide
    own = places(length, mesh["context"].get_local_rank(), layout.context)
    tracker = StorageTracker()
    with ring_attention(mesh, layout), wrappers_watched(tracker), tracker:
        model.to_empty(device="cpu")
        fill(model, tracker)
        trained, optimizer = adamw(model)
        for number in range(STEPS):
            tracker.begin(f"step {number}")
            for ids_RT, targets_RT in [dealt(batch, own, length) for batch in batches(case["micro_batches"])]:
                positions = torch.from_numpy(own).expand(ids_RT.shape)
                kept_K = (targets_RT != IGNORE).any(dim=0).nonzero().flatten()
                mask = torch.ones_like(ids_RT)
                logits = model(
                    input_ids=ids_RT, position_ids=positions, attention_mask=mask, use_cache=False, logits_to_keep=kept_K
                ).logits.float()
                loss = F.cross_entropy(
                    logits.flatten(0, 1), targets_RT[:, kept_K].flatten(), ignore_index=IGNORE, reduction="sum"
                )
                del logits
                (loss / 100).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tracker.close()
    return least_peak(tracker, STEPS)


def drop_masks(model: nn.Module) -> None:
    def drop(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        return args, named | {"attention_mask": None}

    for path, module in model.named_modules():
        if path.endswith(("self_attn", ".attn")):
            module.register_forward_pre_hook(drop, with_kwargs=True)


def dealt(batch: Batch, own: np.ndarray, length: int) -> list[torch.Tensor]:
    missing = length - batch.input_ids_RT.shape[1]
    wide = [np.pad(batch.input_ids_RT, ((0, 0), (0, missing)))]
    wide.append(np.pad(batch.targets_RT, ((0, 0), (0, missing)), constant_values=IGNORE))
    return [torch.from_numpy(array[:, own]) for array in wide]


def case(mode: str, method: str = "full", kind: str = "llama", micro_batches: int = 1, **changes: Any) -> dict[str, Any]:
    recompute = changes.pop("recompute", False)
    return {
        "mode": mode, "method": method, "kind": kind, "recompute": recompute, "micro_batches": micro_batches,
        "layout": {"context": 2, "zero": 3, **changes},
    }  # fmt: skip


CASES = {
    2: [
        case("float32"),
        case("bf16-mixed", recompute=True, micro_batches=2),
        case("bf16-mixed", "lora", zero=2),
        case("float32", kind="gpt2"),
    ],
    4: [
        case("bf16-mixed", shard=2, micro_batches=2, zero=2),
        case("float32", context=4),
        case("bf16-mixed", recompute=True, tensor=2, sequence=True),
    ],
}

COMPARED = {
    2: [("llama", Layout(context=2)), ("gpt2", Layout(context=2))],
    4: [
        ("llama", Layout(context=2, shard=2)),
        ("qwen3", Layout(context=4)),
        ("llama", Layout(context=2, tensor=2)),
        ("qwen3", Layout(context=2, tensor=2, sequence=True)),
    ],
}

TINY = {**COMMON, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 16, "pad_token_id": 0}
GPT2 = {"n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}


def gradient(kind: str, layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss of all tokens, and its gradient, by the ranks of this world together or by one process."""
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({**SMALL[kind], **SHORT[kind], **GPT2} if kind == "gpt2" else TINY))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()
    (batch,) = batches(1)
    if layout.context == 1:
        step = make_step(model, job, Precision.of("float32"), device_kind="cpu")
        losses = step.accumulate([TensorBatch.of(batch, "cpu")], 1)
        return float(losses[0]), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mesh = make_mesh(layout, "cpu")
    parallelise(model, mesh, layout)
    part = share(batch, mesh["context"].get_local_rank(), layout.context)
    with ring_attention(mesh, layout):
        step = make_step(model, job, Precision.of("float32"), device_kind="cpu")
        loss = step.accumulate([TensorBatch.of(part, "cpu")], 1)[0]
    dist.all_reduce(loss, group=mesh["context"].get_group())
    # FSDP2 averages over the ranks; those of a shard see the same rows here, those of a context parts of them.
    return float(loss), {
        name: p.grad.full_tensor() * layout.context for name, p in model.named_parameters() if p.grad is not None
    }  # type: ignore[attr-defined]


def distance(kind: str, layout: Layout) -> float:
    """How far the ranks are from one process, relative to the loss, or to the largest element of the gradient."""
    (loss, alone), (other, together) = gradient(kind, Layout()), gradient(kind, layout)
    assert alone.keys() == together.keys()
    largest = max(float(value.abs().max()) for value in alone.values())
    gaps = [float((alone[name] - together[name]).abs().max()) / largest for name in alone]
    return max([abs(loss - other) / loss, *gaps])


def work(rank: int, world: int) -> tuple[list[int], list[float]]:
    """One rank: the peak of every case, and how far every comparison is off."""
    return [measured_peak(case) for case in CASES[world]], [distance(kind, layout) for kind, layout in COMPARED[world]]


@functools.cache
def measured(world: int) -> list[tuple[list[int], list[float]]]:
    """Of every rank, peaks and distances."""
    return on_ranks(world, work, world)


def forecast(case: dict[str, Any], context_rank: int | None = None, layers: int = 2) -> Ledger:
    return trace_job(
        from_mapping({"model": "unused", "data": "unused", "method": case["method"]}),
        source(case["kind"], **(SHORT[case["kind"]] if layers == 2 else {"num_hidden_layers": layers})),
        batches(case["micro_batches"]),
        CPU,
        precision=Precision.of(case["mode"]),
        recompute=case["recompute"],
        attention=None,
        layout=Layout(**case["layout"]),
        context_rank=context_rank,
    )


def named(cases: dict[int, list[Any]]) -> list[tuple[int, int]]:
    return [(world, number) for world, them in cases.items() for number in range(len(them))]


@pytest.mark.parametrize(("world", "number"), named(CASES), ids=str)
def test_each_rank_counts_what_was_forecast(world: int, number: int) -> None:
    case = CASES[world][number]
    ranks = case["layout"]["context"]
    needed = [forecast(case, context_rank=rank).peak().total_bytes for rank in range(ranks)]
    for rank, (peaks, _) in enumerate(measured(world)):
        assert needed[rank // case["layout"].get("tensor", 1) % ranks] == pytest.approx(peaks[number], rel=0.01)
    if number == 0:
        assert forecast(case).peak().total_bytes == max(needed), "the plan is for the fullest"


@pytest.mark.parametrize(("world", "number"), named(COMPARED), ids=str)
def test_ranks_compute_what_one_process_computes(world: int, number: int) -> None:
    """The loss, and every parameter's gradient, of padded rows."""
    for _, distances in measured(world):
        assert distances[number] < 1e-5


def refused(kind: str, layout: Layout, target: Target = CPU, **options: Any) -> JobError:
    return refusal(source(kind), layout, target, **options)


def test_what_cannot_be_shared_says_why() -> None:
    two = Layout(context=2)
    assert "sliding_attention" in refused("gemma3_text", two).why
    assert refused("llama", two, attention="eager").remedy == "strategy.attention=sdpa"
    assert "virtual tokens" in refused("llama", two, method="prompt").what
    assert "training.loss=sartor" in refused("llama", two, training={"loss": "hf"}).remedy
    cuda = Target.of(Device(kind="cuda", index=0, name="A100", total_bytes=1, available_bytes=1, sm=80))
    grouped = refused("llama", two, cuda)
    assert "fused attention kernel" in grouped.what, "float32 with grouped heads has none on CUDA"
    assert "precision=bf16" in grouped.remedy


def test_layouts_and_packing() -> None:
    machine = probe(MachineJob(name="8xA100-80GB"))
    (layout, *_) = possible_layouts(StrategyJob(context=4), machine, global_batch=2)
    assert (layout.shard, layout.context, layout.devices, layout.shared, layout.data) == (2, 4, 8, 8, 2)
    assert layout.describe() == "ZeRO-2 over 8, context parallel 4"
    with pytest.raises(JobError, match="context 3"):
        possible_layouts(StrategyJob(context=3), machine, global_batch=8)


def test_a_plan_shares_the_tokens(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{**TINY, "num_key_value_heads": 4, "max_position_embeddings": 8192})
    config.save_pretrained(tmp_path)
    job = {
        "model": str(tmp_path / "config.json"),
        "data": {"synthetic": {"length": 4096, "examples": 64}},
        "method": "full",
        "training": {"global_batch": 4},
        "strategy": {"micro_batch": 1, "recompute": "none", "zero": 3, "context": 4},
        "machine": "4xA100-80GB",
    }
    shared = sartor.plan(job)
    assert not shared.strategy.packing
    assert any("ring attention" in note for note in shared.notes)
    job["strategy"] |= {"context": 1}  # type: ignore[operator]
    alone = sartor.plan(job | {"data": {"synthetic": {"length": 4096, "examples": 64}, "packing": False}})
    assert shared.forecast.peak is not None
    assert alone.forecast.peak is not None
    shares = [plan.forecast.peak.by_kind["activations"] for plan in (alone, shared)]
    assert shares[1] == pytest.approx(shares[0] / 4, rel=0.15)


def test_repeated_layers_give_what_all_of_them_give(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[2][1]
    short = forecast(case, layers=8)
    monkeypatch.setattr(whole, "treats_layers_alike", lambda job: False)
    assert forecast(case, layers=8).peak().total_bytes == pytest.approx(short.peak().total_bytes, rel=1e-4)
    assert {event.unit for event in short.events} != {OUTSIDE}, "the layers were not repeated"
