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
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from ranks import on_ranks
from sartor.data.pack import IGNORE
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.model import ModelSource, skeleton
from sartor.parallel import Layout, parallelise
from sartor.predict import StorageTracker, whole
from sartor.predict.tracker import OUTSIDE
from sartor.predict.whole import trace_job
from sartor.predict.world import fake_world, make_mesh, wrappers_watched
from sartor.step import Precision, TensorBatch, make_step, make_trainable

from .plain import adamw, fill, least_peak, refusal
from .plain_tensor import plain_plan
from .test_repeat import COMMON, SMALL, batches, source
from .test_sharded import CPU, lora

STEPS = 3
SHORT: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "mixtral": {**COMMON, "intermediate_size": 160, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4},
}


def measured_peak(case: dict[str, Any]) -> int:
    """Steps of AdamW with clipping on this rank, and the storage tracker's peak in a step that finds the optimizer's state.

    Of several steps, the lowest: a thread of gloo may hold what a collective used for longer than the one who waits for it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed, shard, adapter = case["mode"] == "bf16-mixed", case["shard"], case["method"] == "lora"
    model = skeleton(short(case["kind"]), dtype=torch.bfloat16 if mixed and adapter else torch.float32).train()
    layers = model.get_submodule("model.layers")
    if adapter:
        with torch.device("meta"):
            lora(model)
    if case["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (shard, case["tensor"]), mesh_dim_names=("data", "model"))
    plain_plan(model, mesh["model"], sequence=case["sequence"], adapter=adapter)
    if shard > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
        for layer in layers:
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


def short(kind: str) -> ModelSource:
    return ModelSource(path=kind, config=AutoConfig.for_model(kind, **{**SMALL.get(kind, {}), **SHORT[kind]}), has_weights=False)


def case(mode: str, kind: str = "llama", method: str = "full", **changes: Any) -> dict[str, Any]:
    options = {"tensor": 2, "shard": 1, "sequence": False, "recompute": False, "micro_batches": 1, **changes}
    return {"mode": mode, "kind": kind, "method": method, **options}


CASES = {
    2: [
        case("float32"),
        case("bf16-mixed", recompute=True, micro_batches=2),
        case("float32", sequence=True),
        case("bf16-mixed", sequence=True, recompute=True, micro_batches=2),
        case("bf16-mixed", method="lora", sequence=True, micro_batches=2),
        case("float32", "mixtral"),
        case("float32", method="lora", recompute=True, micro_batches=2),
    ],
    4: [
        case("float32", shard=2, sequence=True, recompute=True),
        case("bf16-mixed", method="lora", shard=2, sequence=True),
        case("bf16-mixed", "mixtral", shard=2),
    ],
}


TINY = {**COMMON, "intermediate_size": 160, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "llama": {"vocab_size": 321},  # parts of different size
    "qwen3": {"num_hidden_layers": 1},  # norms of the split heads
    "gemma3_text": {"sliding_window": 16, "tie_word_embeddings": True},
    "phi3": {
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },  # gathers inside
    "olmo2": {"num_hidden_layers": 1},  # norms behind attention and MLP, and of all heads at once
    "gpt_neox": {"num_hidden_layers": 1},  # attention and MLP side by side; queries, keys and values in one layer
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},  # dense layers, shared experts
    "mixtral": {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
}
WITHOUT_SEQUENCE = {  # attention is whole on every rank, and its tokens are
    "deepseek_v3": {**SMALL["deepseek_v3"], "num_hidden_layers": 2, "first_k_dense_replace": 1, "head_dim": 8},
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


def figures(kind: str, method: str, layout: Layout, mesh: DeviceMesh | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms of the gradient, of two steps with padding where these can tell something: each kind's update is the same,
    and so is its mask. And the first step's gradient."""
    job = from_mapping({"model": "unused", "data": "unused", "method": method})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TINY, **(KINDS | WITHOUT_SEQUENCE)[kind]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model = make_trainable(model, job, Precision.of("float32"), recompute=False, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    if mesh is not None:
        parallelise(model, mesh, layout)
    step = make_step(model, job, Precision.of("float32"), device_kind="cpu")
    told: list[float] = []
    gradient: dict[str, torch.Tensor] = {}
    thorough = kind == "llama" or method == "lora"
    for _ in range(2 if thorough else 1):
        losses = step.accumulate(rows()[: 2 if thorough else 1], 50)
        gradient = gradient or {name: _whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        told += [float(_whole(value)) for value in (*losses, step.clip())]
        step.update(1e-2)
    return told, gradient


@functools.cache
def figures_alone(kind: str, method: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of one process."""
    return figures(kind, method, Layout(), None)


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


COMPARED = {
    2: [
        *((kind, "full", Layout(tensor=2, sequence=True)) for kind in KINDS),
        *((kind, "full", Layout(tensor=2)) for kind in ("llama", "phi3", "qwen2_moe")),
        *((kind, "full", Layout(tensor=2)) for kind in WITHOUT_SEQUENCE),
        *((kind, "lora", Layout(tensor=2, sequence=sequence)) for kind in ("phi3", "qwen2_moe") for sequence in (False, True)),
    ],
    4: [
        ("llama", "full", Layout(tensor=2, shard=2, sequence=True)),
        ("llama", "lora", Layout(tensor=2, shard=2, sequence=True)),
    ],
}


def distance(kind: str, method: str, layout: Layout) -> float:
    """How far the ranks are from one process, relative to what that one computes; of gradients, to their largest element."""
    alone, gradient = figures_alone(kind, method)
    together, parts = figures(kind, method, layout, make_mesh(layout, "cpu"))
    assert gradient.keys() == parts.keys()
    largest = max(float(value.abs().max()) for value in gradient.values())
    gaps = [float((gradient[name] - parts[name]).abs().max()) / largest for name in gradient]
    return max(gaps + [abs(one - other) / abs(one) for one, other in zip(alone, together, strict=True)])


def work(rank: int, world: int) -> tuple[list[int], list[float]]:
    """One rank: the peak of every case, and how far every comparison is off."""
    return [measured_peak(case) for case in CASES[world]], [distance(*compared) for compared in COMPARED[world]]


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
        from_mapping({"model": "unused", "data": "unused", "method": case["method"]}),
        short(case["kind"]),
        batches(case["micro_batches"]),
        CPU,
        precision=Precision.of(case["mode"]),
        recompute=case["recompute"],
        attention=None,
        layout=Layout(tensor=case["tensor"], shard=case["shard"], sequence=case["sequence"]),
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


def tiny(kind: str) -> ModelSource:
    return ModelSource(path=kind, config=AutoConfig.for_model(kind, **TINY), has_weights=False)


def refused(kind: str, layout: Layout, *, method: str = "full", **sizes: Any) -> JobError:
    return refusal(source(kind, **sizes), layout, CPU, method=method)


def test_what_cannot_be_split_says_why() -> None:
    heads = refused("llama", Layout(tensor=4))
    assert "num_key_value_heads (2) does not divide by 4" in heads.why
    assert heads.remedy == "strategy.tensor=2"
    assert "has no tensor parallel plan" in refused("gpt2", Layout(tensor=2)).why
    experts = refused("qwen3_moe", Layout(tensor=4), num_key_value_heads=4, moe_intermediate_size=34)
    assert "inner width of model.layers.0.mlp.experts (34) does not divide by 4" in experts.why
    assert "mla_kv_a_proj" in refusal(tiny("deepseek_v2"), Layout(tensor=2), CPU).why
    assert "model.layers.0.self_attn does not end" in refused("deepseek_v3", Layout(tensor=2, sequence=True)).why
    assert "tokens of its own" in refused("llama", Layout(tensor=2), method="prompt").why
    assert "mlp.gate is not plain LoRA" in refusal(short("mixtral"), Layout(tensor=2), CPU, method="lora").why
    peft = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    assert "k_proj is not plain LoRA" in refusal(source("llama"), Layout(tensor=2), CPU, method="peft", peft=peft).why
    dora = {"peft_type": "LORA", "use_dora": True, "target_modules": ["o_proj"]}
    assert "o_proj is not plain LoRA" in refusal(source("llama"), Layout(tensor=2), CPU, method="peft", peft=dora).why


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
        trace_job(job, short("llama"), batches(1), CPU, **options, layout=Layout(tensor=2, sequence=sequence)).peak().total_bytes
        for sequence in (False, True)
    ]
    assert kept[1] < kept[0]


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence=True), Layout(tensor=2, shard=2)], ids=Layout.describe)
def test_repeated_layers_give_what_all_of_them_give(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    options: dict[str, Any] = {"precision": Precision.of("bf16-mixed"), "recompute": True, "attention": None, "layout": layout}
    short = trace_job(job, source("llama", num_hidden_layers=7), batches(1), CPU, **options)
    monkeypatch.setattr(whole, "treats_layers_alike", lambda job: False)
    entire = trace_job(job, source("llama", num_hidden_layers=7), batches(1), CPU, **options)
    assert short.peak().total_bytes == pytest.approx(entire.peak().total_bytes, rel=1e-4)
    assert {event.unit for event in short.events} != {OUTSIDE}, "the layers were not repeated"
