"""Per rank, the forecast of sharded training is what real ranks count: plain PyTorch FSDP2 over gloo, written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from ranks import on_ranks
from sartor.data.pack import IGNORE
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.machine import Device
from sartor.model import ModelSource, skeleton
from sartor.parallel import Layout
from sartor.predict import StorageTracker
from sartor.predict.target import Target
from sartor.predict.whole import trace_job
from sartor.predict.world import fake_world, wrappers_watched
from sartor.step import Precision, TensorBatch

from .plain import adamw, fill
from .test_repeat import batches, short, source

CPU = Target.of(Device(kind="cpu", index=0, name="cpu", total_bytes=1, available_bytes=1))
STEPS = 2


def lora(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def model_of(case: dict[str, Any]) -> ModelSource:
    """With a layer more than a trace keeps, or few."""
    return source(case["kind"], num_hidden_layers=3) if case["few"] else short(case["kind"])


def worker(rank: int, world: int, case: dict[str, Any]) -> int:
    """One rank: shard, two steps of AdamW with clipping, and the storage tracker's peak."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = case["mode"] == "bf16-mixed"
    frozen = torch.bfloat16 if mixed and case["method"] == "lora" else torch.float32
    model = skeleton(model_of(case), dtype=frozen).train()
    layers = model.get_submodule("transformer.h" if case["kind"] == "gpt2" else "model.layers")
    if case["method"] == "lora":
        with torch.device("meta"):
            model = lora(model)
    if case["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (world,))
    reshard = case["zero"] == 3
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if reshard else False, mp_policy=policy)
    tracker = StorageTracker()
    with wrappers_watched(tracker), tracker:
        model.to_empty(device="cpu")
        fill(model, tracker)
        trained, optimizer = adamw(model)
        for _ in range(STEPS):
            on_device = [TensorBatch.of(batch, "cpu") for batch in batches(case["micro_batches"])]
            for number, batch in enumerate(on_device):
                if case["zero"] == 1:
                    model.set_requires_gradient_sync(number == len(on_device) - 1)
                logits = model(
                    input_ids=batch.input_ids_RT,
                    **({} if batch.position_ids_RT is None else {"position_ids": batch.position_ids_RT}),
                    use_cache=False,
                    logits_to_keep=batch.kept_K,
                ).logits.float()
                targets = batch.targets_RT[:, batch.kept_K].flatten()
                loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
                del logits
                (loss / 100).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tracker.close()
    return tracker.ledger.peak().total_bytes


COMMON = {"world": 2, "zero": 3, "kind": "llama", "method": "full", "mode": "float32", "recompute": False, "micro_batches": 1}
CASES: list[dict[str, Any]] = [
    {**COMMON, "few": False},
    {**COMMON, "world": 4, "mode": "bf16-mixed", "recompute": True, "micro_batches": 2, "few": True},
    {**COMMON, "method": "lora", "mode": "bf16-mixed", "few": False},
    {**COMMON, "world": 4, "zero": 2, "micro_batches": 2, "few": True},
    {**COMMON, "zero": 2, "kind": "gpt2", "mode": "bf16-mixed", "recompute": True, "few": False},
    {**COMMON, "zero": 1, "mode": "bf16-mixed", "micro_batches": 2, "few": False},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_each_rank_counts_what_was_forecast(case: dict[str, Any]) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": case["method"]})
    ledger = trace_job(
        job,
        model_of(case),
        batches(case["micro_batches"]),
        CPU,
        precision=Precision.of(case["mode"]),
        recompute=case["recompute"],
        attention=None,
        layout=Layout(shard=case["world"], zero=case["zero"]),
    )
    forecast = ledger.peak().total_bytes
    for peak in on_ranks(case["world"], worker, case["world"], case):
        assert forecast == pytest.approx(peak, rel=0.01)


def test_a_shard_of_everything_is_smaller_than_everything() -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    options: dict[str, Any] = {"precision": Precision.of("float32"), "recompute": False, "attention": None}
    peaks = [
        trace_job(job, source("llama"), batches(1), CPU, **options, layout=Layout(shard=devices, zero=3))
        .peak()
        .by_kind["optimizer"]
        for devices in (1, 2, 8)
    ]
    assert peaks[1] == pytest.approx(peaks[0] / 2, rel=0.01)
    assert peaks[2] == pytest.approx(peaks[0] / 8, rel=0.01)


def test_ranks_without_a_part_of_a_parameter() -> None:
    """The first rank's parts are those that PyTorch cuts where ranks outnumber a parameter's rows, empty parts and all."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_param

    weight = torch.empty(6, 2, device="meta")
    with fake_world(Layout(shard=64)):
        for ranks in (4, 64):
            parts = _fsdp_param._chunk_with_empty(weight, ranks, dim=0)
            assert [part.shape for part in parts] == [part.shape for part in _fsdp_common._chunk_with_empty(weight, ranks, dim=0)]
    assert _fsdp_param._chunk_with_empty is _fsdp_common._chunk_with_empty


def test_no_second_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(JobError, match="inside a distributed run"), fake_world(Layout(shard=2)):
        pass
