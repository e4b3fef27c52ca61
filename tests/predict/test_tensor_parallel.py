"""Tensor parallelism: the forecast is what real ranks count, and the wrappers compute what one process computes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from ranks import on_ranks
from sartor.data.pack import IGNORE
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.model import skeleton
from sartor.parallel import Layout, parallelise
from sartor.predict import StorageTracker, whole
from sartor.predict.tracker import OUTSIDE
from sartor.predict.whole import trace_job
from sartor.predict.world import fake_world, make_mesh, wrappers_watched
from sartor.step import Precision, TensorBatch, make_step

from .plain import adamw, fill, least_peak, refusal
from .test_repeat import COMMON, batches, source
from .test_sharded import CPU

STEPS = 3
LLAMA = {"num_key_value_heads": 4, "num_hidden_layers": 6}


def plain_plan(model: nn.Module, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Llama under tensor parallelism in plain PyTorch, after torchtitan."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module
    from torch.distributed.tensor import parallel as tp

    whole, tokens = Replicate(), Shard(1)
    stream: dict[str, Any] = {"output_layouts": tokens, "use_local_output": False} if sequence else {}
    plan: dict[str, Any] = {
        "model.embed_tokens": tp.RowwiseParallel(input_layouts=whole, **stream),
        "lm_head": tp.ColwiseParallel(output_layouts=whole),
        **{f"model.layers.*.self_attn.{name}_proj": tp.ColwiseParallel() for name in "qkv"},
        **{f"model.layers.*.mlp.{name}_proj": tp.ColwiseParallel() for name in ("gate", "up")},
        "model.layers.*.self_attn.o_proj": tp.RowwiseParallel(**stream),
        "model.layers.*.mlp.down_proj": tp.RowwiseParallel(**stream),
    }
    norms = ["model.norm", "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm"]
    if sequence:
        plan |= dict.fromkeys(norms, tp.SequenceParallel())
        plan["model.layers.*.self_attn"] = tp.PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": tokens}, desired_input_kwarg_layouts={"hidden_states": whole}
        )
        plan["model.layers.*.mlp"] = tp.PrepareModuleInput(input_layouts=tokens, desired_input_layouts=whole)
    else:
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                distribute_module(module, mesh)
        plan |= dict.fromkeys(
            norms,
            tp.PrepareModuleInputOutput(
                input_layouts=whole, desired_input_layouts=whole, output_layouts=whole, desired_output_layouts=whole
            ),
        )
    tp.parallelize_module(model, mesh, plan)
    if sequence:
        gathered = tp.PrepareModuleOutput(output_layouts=tokens, desired_output_layouts=whole)
        tp.parallelize_module(model, mesh, {"model.norm": gathered})


def measured_peak(case: dict[str, Any]) -> int:
    """Steps of AdamW with clipping on this rank, and the storage tracker's peak in a step that finds the optimizer's state.

    Of several steps, the lowest: a thread of gloo may hold what a collective used for longer than the one who waits for it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed, shard = case["mode"] == "bf16-mixed", case.get("shard", 1)
    model = skeleton(source("llama", **LLAMA), dtype=torch.float32).train()
    if case["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (shard, case["tensor"]), mesh_dim_names=("data", "model"))
    plain_plan(model, mesh["model"], sequence=case["sequence"])
    if shard > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
        for layer in model.get_submodule("model.layers"):
            fully_shard(layer, mesh=mesh["data"], mp_policy=policy)
        fully_shard(model, mesh=mesh["data"], mp_policy=policy)
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed and shard == 1 else contextlib.nullcontext()
    tracker = StorageTracker()
    with wrappers_watched(tracker), tracker:
        model.to_empty(device="cpu")
        fill(model, tracker)
        trained, optimizer = adamw(model)
        for number in range(STEPS):
            tracker.begin(f"step {number}")
            for batch in [TensorBatch.of(batch, "cpu") for batch in batches(case["micro_batches"])]:
                positions = {} if batch.position_ids_RT is None else {"position_ids": batch.position_ids_RT}
                with autocast:
                    logits = model(
                        input_ids=batch.input_ids_RT, **positions, use_cache=False, logits_to_keep=batch.kept_K
                    ).logits.float()
                    targets = batch.targets_RT[:, batch.kept_K].flatten()
                    loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
                del logits
                (loss / 100).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tracker.close()
    return least_peak(tracker, STEPS)


def case(mode: str, **changes: Any) -> dict[str, Any]:
    return {"mode": mode, "tensor": 2, "sequence": False, "recompute": False, "micro_batches": 1, **changes}


CASES = {
    2: [
        case("float32"),
        case("bf16-mixed", recompute=True, micro_batches=2),
        case("float32", sequence=True),
        case("bf16-mixed", sequence=True, recompute=True, micro_batches=2),
    ],
    4: [
        case("float32", tensor=4, micro_batches=2),
        case("bf16-mixed", shard=2),
        case("float32", shard=2, sequence=True, recompute=True),
    ],
}


SMALL = {**COMMON, "intermediate_size": 160, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
KINDS = {
    "llama": {"vocab_size": 321},  # parts of different size
    "qwen3": {},  # norms of the split heads
    "gemma3_text": {"sliding_window": 16, "tie_word_embeddings": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},  # gathers inside
    "olmo2": {},  # norms behind attention and MLP, and of all heads at once
    "gpt_neox": {},  # attention and MLP side by side; queries, keys and values in one layer
}


def rows() -> list[TensorBatch]:
    """A row of three packed examples, of odd length, and a padded pair of rows."""
    torch.manual_seed(1)
    lengths = [9, 20, 8]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.randint(3, 300, (1, 37))
    packed = tensor_batch(ids, [37], places)
    return [packed, tensor_batch(torch.randint(3, 300, (2, 12)), [12, 6], None)]


def tensor_batch(ids: Tensor, ends: list[int], places: Tensor | None) -> TensorBatch:
    """Every position but the last of its row trains."""
    targets = ids.roll(-1, 1)
    for row, end in enumerate(ends):
        targets[row, end - 1 :] = IGNORE
    rows_N, columns_N = np.nonzero(targets.numpy() != IGNORE)
    kept_K = torch.arange(ids.shape[1] - 1)
    return TensorBatch(
        input_ids_RT=ids, targets_RT=targets, position_ids_RT=places, kept_K=kept_K, rows_N=rows_N, columns_N=columns_N
    )


def figures(kind: str, layout: Layout, mesh: DeviceMesh | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of two steps: losses and norms of the gradient; and the first step's gradient."""
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    if mesh is not None:
        parallelise(model, mesh, layout)
    step = make_step(model, job, Precision.of("float32"), device_kind="cpu")
    told: list[float] = []
    gradient: dict[str, torch.Tensor] = {}
    for _ in range(2):
        losses = step.accumulate(rows(), 50)
        gradient = gradient or {name: _whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        told += [float(_whole(value)) for value in (*losses, step.clip())]
        step.update(1e-2)
    return told, gradient


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


COMPARED = {
    2: [(kind, Layout(tensor=2, sequence=sequence)) for kind in KINDS for sequence in (False, True)],
    4: [("llama", Layout(tensor=2, shard=2, sequence=True)), ("gemma3_text", Layout(tensor=2, shard=2))],
}


def distance(kind: str, layout: Layout) -> float:
    """How far the ranks are from one process, relative to what that one computes; of gradients, to their largest element."""
    alone, gradient = figures(kind, Layout(), None)
    together, parts = figures(kind, layout, make_mesh(layout, "cpu"))
    assert gradient.keys() == parts.keys()
    largest = max(float(value.abs().max()) for value in gradient.values())
    gaps = [float((gradient[name] - parts[name]).abs().max()) / largest for name in gradient]
    return max(gaps + [abs(one - other) / abs(one) for one, other in zip(alone, together, strict=True)])


def work(rank: int, world: int) -> tuple[list[int], list[float]]:
    """One rank: the peak of every case, and how far every comparison is off."""
    return [measured_peak(case) for case in CASES[world]], [distance(kind, layout) for kind, layout in COMPARED[world]]


@functools.cache
def measured(world: int) -> list[tuple[list[int], list[float]]]:
    """Of every rank, peaks and distances."""
    return on_ranks(world, work, world)


@pytest.mark.parametrize(
    ("world", "number"),
    [(world, number) for world, cases in CASES.items() for number in range(len(cases))],
    ids=str,
)
def test_each_rank_counts_what_was_forecast(world: int, number: int) -> None:
    case = CASES[world][number]
    ledger = trace_job(
        from_mapping({"model": "unused", "data": "unused", "method": "full"}),
        source("llama", **LLAMA),
        batches(case["micro_batches"]),
        CPU,
        precision=Precision.of(case["mode"]),
        recompute=case["recompute"],
        attention=None,
        layout=Layout(tensor=case["tensor"], shard=case.get("shard", 1), sequence=case["sequence"]),
    )
    forecast = ledger.peak().total_bytes
    for peaks, _ in measured(world):
        assert forecast == pytest.approx(peaks[number], rel=0.01)


@pytest.mark.parametrize(
    ("world", "number"),
    [(world, number) for world, cases in COMPARED.items() for number in range(len(cases))],
    ids=str,
)
def test_ranks_compute_what_one_process_computes(world: int, number: int) -> None:
    """Losses and norms of two steps, and every parameter's gradient: packed rows of odd length, padded rows, clipping, AdamW."""
    for _, distances in measured(world):
        assert distances[number] < 1e-4


def refused(kind: str, layout: Layout, *, method: str = "full", **sizes: Any) -> JobError:
    return refusal(source(kind, **sizes), layout, CPU, method=method)


def test_what_cannot_be_split_says_why() -> None:
    heads = refused("llama", Layout(tensor=4))
    assert "num_key_value_heads (2) does not divide by 4" in heads.why
    assert heads.remedy == "strategy.tensor=2"
    assert "has no tensor parallel plan" in refused("gpt2", Layout(tensor=2)).why
    assert "packed_colwise" in refused("qwen3_moe", Layout(tensor=2)).why
    assert "adapters are not split" in refused("llama", Layout(tensor=2), method="lora").what


def test_a_block_that_is_split_in_part() -> None:
    layout = Layout(tensor=2, sequence=True)
    with fake_world(layout) as mesh:
        assert mesh is not None
        model: Any = skeleton(source("llama"), dtype=torch.float32)
        model._tp_plan = {rule: style for rule, style in model._tp_plan.items() if "self_attn" not in rule}
        with pytest.raises(JobError, match=r"tokens of LlamaForCausalLM.*\n.*self_attn does not end") as caught:
            parallelise(model, mesh, layout)
        assert caught.value.remedy == "strategy.sequence=false"
        model._tp_plan["model.layers.*.self_attn.q_proj"] = "colwise"
        with pytest.raises(JobError, match="no rule for k_proj"):
            parallelise(model, mesh, layout)


def test_sequence_parallelism_holds_less() -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    options: dict[str, Any] = {"precision": Precision.of("float32"), "recompute": False, "attention": None}
    kept = [
        trace_job(job, source("llama"), batches(1), CPU, **options, layout=Layout(tensor=2, sequence=sequence)).peak().total_bytes
        for sequence in (False, True)
    ]
    assert kept[1] < kept[0]


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence=True), Layout(tensor=2, shard=2)], ids=Layout.describe)
def test_repeated_layers_give_what_all_of_them_give(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    options: dict[str, Any] = {"precision": Precision.of("bf16-mixed"), "recompute": True, "attention": None, "layout": layout}
    short = trace_job(job, source("llama"), batches(1), CPU, **options)
    monkeypatch.setattr(whole, "treats_layers_alike", lambda job: False)
    entire = trace_job(job, source("llama"), batches(1), CPU, **options)
    assert short.peak().total_bytes == pytest.approx(entire.peak().total_bytes, rel=1e-4)
    assert {event.unit for event in short.events} != {OUTSIDE}, "the layers were not repeated"
