"""The ledger of every distinct stage of a pipeline: PyTorch's own stages and schedules, run for one rank at a time.

Nobody answers over the traced world's process group. What neighbours would say before the first step (the shape of the hidden
states, and that of their gradients) is handed over here instead; buffers, micro-batches in flight, stored outputs and losses are
then PyTorch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from sartor.data.pack import Batch
from sartor.errors import JobError
from sartor.job.schema import Job
from sartor.methods import traits
from sartor.methods.adapters import peft_config
from sartor.model import ModelSource, choose_recomputed, dissect, outline, skeleton
from sartor.model.regions import Reduction, reduce_depth, signature
from sartor.parallel import Layout, parallelise_stage
from sartor.parallel.pipeline import WHOLE, PipelineStep, Stage, check_schedule, cut, layers_of_stages, of_one_shape
from sartor.predict.ledger import Ledger
from sartor.predict.repeat import NotRepeatable, expand
from sartor.predict.target import Target
from sartor.predict.trace import trace_steps
from sartor.predict.whole import treats_layers_alike
from sartor.predict.world import fake_world
from sartor.step import Precision, TensorBatch, make_step, make_trainable


def trace_stages(
    job: Job,
    source: ModelSource,
    batches: Sequence[Batch],
    target: Target,
    *,
    precision: Precision,
    recompute: bool,
    attention: str | None,
    layout: Layout,
    every: bool = False,
    recomputed: int | None = None,
) -> list[tuple[int, Ledger]]:
    """Two steps of the job on each stage that differs from the others, over these micro-batches (padded to one shape): the rank
    of the stage's first device, and its ledger. Of stages in the middle with equal layers the first is traced: under 1F1B it has
    most micro-batches in flight. `every`: all stages. `recomputed`: of the model's blocks, the first so many.
    Raises JobError for what cannot be a pipeline."""
    check(job, layout, len(batches))
    if layout.data > 1:
        layout, precision = dataclasses.replace(layout, gather=precision.compute), precision.gathered()
    padded = of_one_shape(batches, layout)
    tracing = _Tracing(job, source, padded, target, precision=precision, recompute=recompute, attention=attention, layout=layout)
    tracing.recomputed = recomputed
    stages = range(layout.pipeline) if every else tracing.distinct_stages()
    return [(index * (layout.devices // layout.pipeline), tracing.ledger(index)) for index in stages]


def check(job: Job, layout: Layout, micro_batches: int) -> None:
    """Raises JobError for what is not supported with a pipeline."""
    check_schedule(layout, micro_batches)
    if layout.context > 1:
        raise JobError("context parallelism in pipeline stages is not forecast yet", remedy=f"strategy.context=1, or {WHOLE}")
    if traits(job).adapter and peft_config(job, meta=True).is_prompt_learning:
        raise JobError(
            f"method {job.method} cannot be cut into pipeline stages",
            why="its tokens would be put before the row on every stage",
            remedy=WHOLE,
        )
    if not treats_layers_alike(job):
        raise JobError("adapters that name layers by their number cannot be cut into pipeline stages", remedy=WHOLE)
    if job.training.loss != "sartor":
        raise JobError("a pipeline's last stage has Sartor's loss only", remedy=f"training.loss=sartor, or {WHOLE}")


class _Tracing:
    """What the stages' traces have in common."""

    def __init__(
        self,
        job: Job,
        source: ModelSource,
        batches: Sequence[Batch],
        target: Target,
        *,
        precision: Precision,
        recompute: bool,
        attention: str | None,
        layout: Layout,
    ) -> None:
        self.job, self.source, self.batches, self.target = job, source, batches, target
        self.precision, self.recompute, self.attention, self.layout = precision, recompute, attention, layout
        self.recomputed: int | None = None
        self.dtype = precision.load_dtype(adapter=traits(job).adapter)
        self.said = _Said()

    def skeleton(self) -> Any:
        model = skeleton(self.source, dtype=self.dtype, attention=self.attention)
        choose_recomputed(model, self.recomputed)
        return model

    def distinct_stages(self) -> list[int]:
        """The first, the last, and of those between each that an earlier one does not stand for: with the same layers and maybe
        more of them, and no fewer micro-batches in flight."""
        if self.recomputed is None:
            model = outline(self.source, dtype=self.dtype, attention=self.attention)
        else:
            model = self.skeleton()
        stack = dissect(model).main_stack
        layers = [] if stack is None else [signature(layer) for layer in model.get_submodule(stack.path).children()]
        seen: dict[int, list[Any]] = {}
        last = self.layout.pipeline - 1
        for index, share in enumerate(layers_of_stages(len(layers), self.layout.pipeline)):
            its = [layers[at] for at in share]
            if 0 < index < last and not any(earlier[: len(its)] == its for earlier in seen.values()):
                seen[index] = its
        return [0, *seen, last]

    def ledger(self, index: int) -> Ledger:
        rank = index * (self.layout.devices // self.layout.pipeline)
        with fake_world(self.layout, rank=rank) as mesh:
            assert mesh is not None
            try:
                return self._traced(index, mesh, shortened=True)
            except NotRepeatable:
                return self._traced(index, mesh, shortened=False)

    def _traced(self, index: int, mesh: DeviceMesh, *, shortened: bool) -> Ledger:
        model = self.skeleton()
        owner = cut(model, index, self.layout.pipeline)
        reduction = reduce_depth(model) if shortened else Reduction()
        model = make_trainable(model, self.job, self.precision, recompute=self.recompute, meta=True, kind=self.target.kind)
        stage = Stage(model, owner, index, self.layout.pipeline, precision=self.precision, device_kind="cpu")
        parallelise_stage(stage, mesh, self.layout)

        def step_of(fake: Any) -> PipelineStep:
            made = PipelineStep(
                fake,
                make_step(fake, self.job, self.precision, device_kind="cpu", kind=self.target.kind),
                layout=self.layout,
                micro_batches=len(self.batches),
                group=mesh["pipeline"].get_group(),
            )
            self.said.answer(made)
            made.prepare(TensorBatch.of(self.batches[0], "cpu"))
            return made

        ledger = trace_steps(stage, step_of, self.batches, target=self.target, reduction=reduction)
        return expand(ledger, reduction).set_paged_apart()


class _Said:
    """What neighbours tell each other before the first step. Hidden states are the same between all stages; the first one is
    traced first, and tells."""

    def __init__(self) -> None:
        self._forward: Any = None

    def answer(self, step: PipelineStep) -> None:
        """Take the neighbours' place in the agreement (PyTorch 2.13, torch/distributed/pipelining: `_warmup_p2p` in schedules.py,
        `_send_meta` and `_recv_meta` in stage.py)."""
        from torch.distributed.pipelining._utils import InferenceMode, _derive_grad_metas, _StageBackwardMeta

        stage = step.pipeline_stage

        def vote(*_: Any) -> None:
            stage._inference_mode = InferenceMode.DYNAMIC

        def tell(said: Any, to_stage: int) -> None:
            if to_stage > stage.stage_index:
                self._forward = said

        def ask(of_stage: int) -> Any:
            if of_stage < stage.stage_index:
                return self._forward
            outputs = stage._stage_meta.outputs
            assert outputs is not None
            return _StageBackwardMeta(backward_metas=_derive_grad_metas(outputs))

        for place, name, answer in (
            (step.schedule, "_warmup_p2p", vote),
            (stage, "_send_meta", tell),
            (stage, "_recv_meta", ask),
        ):
            setattr(place, name, answer)
