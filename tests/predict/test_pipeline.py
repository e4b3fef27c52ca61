"""Per stage, the forecast of a pipeline is what real ranks count: plain torch.distributed.pipelining over gloo, written here."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ranks import on_ranks
from sartor.data.pack import IGNORE, collate, fill_rows
from sartor.data.tokens import Sample, TokenSet
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.model import ModelSource, skeleton
from sartor.model.build import _from_config
from sartor.model.regions import Reduction
from sartor.parallel import Layout, parallelise_stage
from sartor.parallel.pipeline import Stage, cut, layers_of_stages, of_one_shape
from sartor.predict import Ledger, StorageTracker, stages
from sartor.predict.repeat import expand
from sartor.predict.stages import trace_stages
from sartor.predict.world import make_mesh, wrappers_watched
from sartor.step import Precision, SumLoss, TensorBatch
from sartor.step.step import enable_recompute

from .plain import adamw
from .plain_tensor import plain_plan
from .test_repeat import batches, source
from .test_sharded import CPU, lora

TOKENS = 100
UNFUSED: dict[str, Any] = {"model": "unused", "data": "unused", "strategy": {"fused": False}}
"""The pipeline written here computes as transformers does."""
FULL = from_mapping({**UNFUSED, "method": "full"})


class PlainStage(nn.Module):
    """A Llama cut by hand."""

    def __init__(self, model: nn.Module, index: int, stages: int, kept: torch.Tensor, *, mixed: bool) -> None:
        super().__init__()
        self.llama: Any = model
        self.first, self.last, self.kept, self.mixed = index == 0, index == stages - 1, kept, mixed
        self.tokens: Any = None
        """The mesh whose ranks have a part of the tokens each."""
        base = self.llama.model
        self.numbers = [int(at) for at in np.array_split(np.arange(len(base.layers)), stages)[index]]
        base.layers = nn.ModuleList([base.layers[at] for at in self.numbers])
        base.config.num_hidden_layers = len(self.numbers)
        if not self.first:
            base.embed_tokens = None
        if not self.last:
            base.norm, self.llama.lm_head = nn.Identity(), None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self.tokens is not None and not self.first:
            given = DTensor.from_local(given, self.tokens, [Shard(1)], run_check=False)
        inputs = {"input_ids" if self.first else "inputs_embeds": given, "use_cache": False}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed):
            if self.last:
                return self.llama(**inputs, logits_to_keep=self.kept).logits  # type: ignore[no-any-return]
            hidden = self.llama.model(**inputs).last_hidden_state
            return hidden.to_local() if isinstance(hidden, DTensor) else hidden  # type: ignore[no-any-return]


def fill(model: Any, numbers: list[int] | range) -> None:
    """The same values wherever a layer is: each from its name and its layer's number in the whole model."""
    model.model.rotary_emb.inv_freq.copy_(type(model.model.rotary_emb)(model.config).inv_freq)
    for name, parameter in model.named_parameters():
        name = re.sub(r"layers\.(\d+)", lambda found: f"layers.{numbers[int(found[1])]}", name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.copy_(values)


def loss_of(logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets[:, kept].flatten(), ignore_index=IGNORE, reduction="sum")
    return loss / TOKENS


def shallow(case: dict[str, Any]) -> ModelSource:
    return source("llama", num_hidden_layers=case["layers"])


def build(case: dict[str, Any], rank: int, kept: torch.Tensor) -> PlainStage:
    """On the meta device."""
    adapter, mixed = case["method"] == "lora", case["mode"] == "bf16-mixed"
    model = skeleton(shallow(case), dtype=torch.bfloat16 if adapter and mixed else torch.float32).train()
    width = case["shard"] * case["tensor"]
    stage = PlainStage(model, rank // width, case["stages"], kept, mixed=mixed and case["shard"] == 1)
    if adapter:
        with torch.device("meta"):
            lora(stage.llama)
    if case["recompute"]:
        enable_recompute(stage.llama)
    return stage


def shard(stage: PlainStage, mesh: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in stage.llama.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(stage, mesh=mesh, mp_policy=policy)


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """One rank: two steps of AdamW with clipping; the storage tracker's peak, and the losses of the first step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    sizes, count = (case["stages"], case["shard"], case["tensor"]), case["micro_batches"]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("stages", "shard", "tensor"))
    given = [TensorBatch.of(batch, "cpu") for batch in batches(count)]
    module = build(case, rank, given[0].kept_K)
    if case["tensor"] > 1:
        plain_plan(module.llama, mesh["tensor"], sequence=True, adapter=case["method"] == "lora")
        module.tokens = mesh["tensor"]
    if case["shard"] > 1:
        shard(module, mesh["shard"])
    tracker, losses, told = StorageTracker(), list[torch.Tensor](), list[float]()
    with wrappers_watched(tracker), tracker:
        module.to_empty(device="cpu")
        with tracker.unseen():
            fill(module.llama, module.numbers)
        for tensor in (*module.parameters(), *module.buffers()):
            tracker.see(tensor)
        trained, optimizer = adamw(module)
        stage = PipelineStage(
            module, mesh["stages"].get_local_rank(), case["stages"], torch.device("cpu"), group=mesh["stages"].get_group()
        )
        kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[case["schedule"]]
        schedule = kind(stage, count, loss_fn=functools.partial(loss_of, kept=module.kept), scale_grads=False)
        ids, targets = (torch.cat([getattr(batch, name) for batch in given]) for name in ("input_ids_RT", "targets_RT"))
        for _ in range(2):
            arguments: Any = (ids,) if module.first else ()
            options: Any = {"target": targets, "losses": losses} if module.last else {}
            schedule.step(*arguments, return_outputs=False, **options)
            told += [float(loss.detach()) for loss in losses]
            losses.clear()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tracker.close()
    return {"bytes": tracker.ledger.peak().total_bytes, "losses": told[:count]}


def forecast(case: dict[str, Any]) -> dict[int, Ledger]:
    tensor = case["tensor"]
    layout = Layout(pipeline=case["stages"], shard=case["shard"], tensor=tensor, sequence=tensor > 1, schedule=case["schedule"])
    return dict(
        trace_stages(
            from_mapping({**UNFUSED, "method": case["method"]}),
            shallow(case),
            batches(case["micro_batches"]),
            CPU,
            precision=Precision.of(case["mode"]),
            recompute=case["recompute"],
            attention=None,
            layout=layout,
            every=True,
        )
    )


def plain_loss(case: dict[str, Any]) -> float:
    """Of one micro-batch, in one process."""
    model = skeleton(shallow(case), dtype=torch.float32).train().to_empty(device="cpu")
    fill(model, range(len(model.model.layers)))
    with torch.no_grad():
        return float(SumLoss(model)(model, TensorBatch.of(batches(1)[0], "cpu")))


COMMON: dict[str, Any] = {
    "stages": 2,
    "shard": 1,
    "tensor": 1,
    "schedule": "1f1b",
    "method": "full",
    "mode": "float32",
    "recompute": False,
    "layers": 5,
    "micro_batches": 3,
}
"""The last stage has a layer less than the first; of two stages and three micro-batches one neither fills nor drains them."""
CASES = [
    COMMON,
    {**COMMON, "schedule": "gpipe", "mode": "bf16-mixed", "recompute": True, "layers": 7},
    {**COMMON, "stages": 4, "layers": 7, "micro_batches": 4},
    {**COMMON, "method": "lora", "mode": "bf16-mixed", "layers": 3},
    {**COMMON, "shard": 2, "mode": "bf16-mixed"},
    {**COMMON, "tensor": 2, "method": "lora", "mode": "bf16-mixed", "layers": 3},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_each_stage_counts_what_was_forecast(case: dict[str, Any]) -> None:
    """Gloo holds one sent hidden state longer than the forecast does: that is the difference on some stages."""
    ledgers = forecast(case)
    records = on_ranks(case["stages"] * case["shard"] * case["tensor"], worker, case)
    for rank, ledger in ledgers.items():
        assert ledger.peak().total_bytes == pytest.approx(records[rank]["bytes"], rel=0.01)
    if case["mode"] == "float32":
        wanted = [plain_loss(case) / TOKENS] * case["micro_batches"]
        assert records[-1]["losses"] == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_in_flight() -> None:
    """1F1B: as many as stages from here to the last one, here included. GPipe: all."""
    peaks = {
        (schedule, micro_batches): [
            ledger.peak().by_kind["activations"]
            for _, ledger in trace_stages(
                FULL, source("llama", num_hidden_layers=8), batches(micro_batches), CPU,
                precision=Precision.of("bf16"), recompute=False, attention=None,
                layout=Layout(pipeline=4, schedule=schedule), every=(schedule, micro_batches) == ("1f1b", 8),
            )
        ]
        for schedule, micro_batches in (("1f1b", 4), ("1f1b", 8), ("gpipe", 8))
    }  # fmt: skip
    first, second, third, _ = peaks["1f1b", 8]
    assert first > 1.2 * second > 1.4 * third
    assert peaks["gpipe", 8][0] > 1.6 * first
    hidden_bytes = 3 * 60 * 64 * 2
    given = TensorBatch.of(batches(1)[0], "cpu")
    ids_bytes = sum(
        part.nbytes for part in (given.input_ids_RT, given.targets_RT, given.kept_K, given.targets_RT[:, given.kept_K])
    )
    # Four more micro-batches: the ids, a gradient to receive here, a hidden state as well in the middle; nothing else.
    assert first - peaks["1f1b", 4][0] == pytest.approx(4 * (hidden_bytes + ids_bytes), rel=0.01)
    assert second - peaks["1f1b", 4][1] == pytest.approx(4 * (2 * hidden_bytes + ids_bytes), rel=0.01)


@pytest.mark.parametrize(
    ("method", "recompute", "layout"),
    [
        ("full", False, Layout(pipeline=2)),
        ("full", False, Layout(pipeline=2, tensor=2, sequence=True)),
        ("lora", True, Layout(pipeline=2, schedule="gpipe")),
    ],
)
def test_a_stage_of_many_layers_is_repeated(
    monkeypatch: pytest.MonkeyPatch, method: str, recompute: bool, layout: Layout
) -> None:
    job = from_mapping({**UNFUSED, "method": method})

    def peaks() -> list[int]:
        traced = trace_stages(
            job, source("llama", num_hidden_layers=13), batches(2), CPU,
            precision=Precision.of("bf16-mixed"), recompute=recompute, attention=None, layout=layout,
        )  # fmt: skip
        return [ledger.peak().total_bytes for _, ledger in traced]

    kept: list[int] = []
    monkeypatch.setattr(
        stages, "expand", lambda ledger, reduction: kept.append(len(reduction.regions)) or expand(ledger, reduction)
    )
    short = peaks()
    assert kept == [1, 1], "no stage had to be traced whole"
    monkeypatch.setattr(stages, "reduce_depth", lambda model: Reduction())
    assert short == pytest.approx(peaks(), rel=1e-4)


def test_one_middle_stage_stands_for_those_like_it() -> None:
    options: dict[str, Any] = {"precision": Precision.of("bf16"), "recompute": True, "attention": None}
    layout = Layout(pipeline=5, shard=2)
    traced = trace_stages(FULL, source("llama", num_hidden_layers=8), batches(5), CPU, **options, layout=layout)
    assert [rank for rank, _ in traced] == [0, 2, 8]


def chained_loss(
    kind: str, count: int, batch: TensorBatch, mesh: DeviceMesh | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Stages of one model after each other: the loss, and gradients by the names of the whole model. In one process, or each of
    them on the tensor parallel ranks of a mesh, which share the tokens."""
    hidden: Any = batch.input_ids_RT
    gradients: dict[str, torch.Tensor] = {}
    made = []
    for index, share in enumerate(layers_of_stages(source(kind).config.num_hidden_layers, count)):
        model = real(kind)
        stage = Stage(model, cut(model, index, count), index, count, precision=Precision.of("float32"), device_kind="cpu")
        if mesh is not None:
            parallelise_stage(stage, mesh, Layout(tensor=mesh["tensor"].size(), sequence=True))
        hidden = stage(hidden, position_ids_RT=batch.position_ids_RT, **({"kept_K": batch.kept_K} if stage.is_last else {}))
        made.append((model, share))
    loss = F.cross_entropy(
        hidden.flatten(0, 1), batch.targets_RT[:, batch.kept_K].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    loss.backward()
    for model, share in made:
        for name, parameter in model.named_parameters():
            whole = re.sub(r"layers\.(\d+)", lambda found, share=share: f"layers.{share[int(found[1])]}", name)
            assert parameter.grad is not None
            assert whole not in gradients
            gradients[whole] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return float(loss.detach()), gradients


def real(kind: str) -> Any:
    torch.manual_seed(3)
    given = source(kind)
    return _from_config(given, torch.float32, None).train()


@pytest.mark.parametrize(("kind", "count"), [("llama", 3), ("gemma3_text", 4), ("qwen3_moe", 2)])
def test_stages_after_each_other_are_the_model(kind: str, count: int) -> None:
    compare_stages(kind, count, None)


def test_tensor_parallel_stages_after_each_other_are_the_model() -> None:
    on_ranks(2, compare_split_stages)


def compare_split_stages(rank: int) -> None:
    compare_stages("qwen3_moe", 2, make_mesh(Layout(tensor=2), "cpu"))


def compare_stages(kind: str, count: int, mesh: DeviceMesh | None) -> None:
    packed = dataclasses.replace(batches(1)[0], position_ids_RT=np.tile(np.arange(60) % 23, (3, 1)))
    batch = TensorBatch.of(packed, "cpu")
    model = real(kind)
    loss = SumLoss(model)(model, batch)
    loss.backward()
    chained, gradients = chained_loss(kind, count, batch, mesh)
    assert chained == pytest.approx(float(loss.detach()), rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    if getattr(model.config, "tie_word_embeddings", False):  # on both ends: the sum of both is the gradient
        wanted.pop("model.embed_tokens.weight")
        gradients.pop("model.embed_tokens.weight", None)
        gradients.pop("lm_head.weight", None)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_of_one_shape_have_the_same_loss(packing: bool) -> None:
    lengths = [31, 20, 12, 9, 5]
    samples = TokenSet.from_samples(
        [
            Sample(input_ids=np.arange(length) % 300 + 3, trained=np.arange(length) % 3 > 0, source=f"test:{length}")
            for length in lengths
        ]
    )
    rows = fill_rows(range(len(lengths)), samples.lengths, capacity=32, packing=packing)
    given = [collate(samples, part, pad_id=0, packing=packing) for part in (rows[:2], rows[2:])]
    padded = of_one_shape(given)
    assert len({batch.input_ids_RT.shape for batch in padded}) == 1 < len({batch.input_ids_RT.shape for batch in given})
    model = real("llama")
    with torch.no_grad():
        before, after = (
            [float(SumLoss(model)(model, TensorBatch.of(batch, "cpu"))) for batch in kind] for kind in (given, padded)
        )
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "message"),
    [
        ("llama", {}, {"pipeline": 12}, "12 pipeline stages for 11 layers"),
        ("llama", {}, {"pipeline": 5}, "4 micro-batches a step for 5 pipeline stages"),
        ("llama", {}, {"pipeline": 2, "context": 2}, "context parallelism in pipeline"),
        ("llama", {"method": "prefix"}, {"pipeline": 2}, "prefix cannot be cut"),
        ("llama", {"training": {"loss": "hf"}}, {"pipeline": 2}, "Sartor's loss only"),
        ("gpt2", {}, {"pipeline": 2}, "GPT2LMHeadModel cannot be cut"),
    ],
)
def test_what_cannot_be_a_pipeline_is_said(kind: str, changes: dict[str, Any], layout: dict[str, Any], message: str) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full", **changes})
    schedule = "gpipe" if layout["pipeline"] == 12 else "1f1b"
    options: dict[str, Any] = {"precision": Precision.of("float32"), "recompute": False, "attention": None}
    with pytest.raises(JobError, match=message):
        trace_stages(job, source(kind), batches(4), CPU, **options, layout=Layout(schedule=schedule, **layout))


def test_shares_of_layers() -> None:
    assert [len(share) for share in layers_of_stages(126, 16)] == [8] * 14 + [7] * 2
    assert [at for share in layers_of_stages(11, 4) for at in share] == list(range(11))
