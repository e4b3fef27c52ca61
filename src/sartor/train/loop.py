"""The training loop: the only one. Read it from top to bottom.

fit            prepare → (evaluate) → steps → (evaluate) → publish → record
assist         the same steps in a further process, which writes nothing
_train         the steps themselves
_evaluate      held-out loss
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sartor.errors import Interrupted, RunError, StorageError
from sartor.job import to_yaml
from sartor.kernels.fuse import unfuse
from sartor.placement import PlacedStep
from sartor.placement.timeline import TIMELINE
from sartor.plan import Plan
from sartor.step import TensorBatch, World, learning_rate
from sartor.train import checkpoint as saved
from sartor.train import folder as files
from sartor.train.checkpoint import Progress, TrainState
from sartor.train.metrics import MetricsWriter, Observer, Observers
from sartor.train.outcome import memory_outcome, not_finite, record, reset_peaks
from sartor.train.record import EvalRecord, Run, StepRecord
from sartor.train.recovery import clear_up, recover, shortage_of, update
from sartor.train.setup import Workbench, adopt, check_identity, check_runnable, identity, set_up
from sartor.train.signals import StopRequest, stop_requests

RESUME_LATEST = "latest"


def fit(plan: Plan, *, resume: str | None = None, observers: Sequence[Observer] = (), world: World | None = None) -> Run:
    """Run `plan` to its end and record what happened.

    `resume`: "latest", or the name of a checkpoint; the run then goes on exactly as if it had never stopped. `world`: the
    processes that share the steps, of which this is the first.
    Raises Interrupted after a stop signal (everything saved), RunError or UsageError with the remedy.
    """
    world = world or World()
    check_runnable(plan, world)
    with files.owned(Path(plan.job.output), resume=resume is not None) as folder:
        watchers = Observers(*observers)
        # -- 1. where the run stands, and its live objects
        wanted = None if resume == RESUME_LATEST else resume
        checkpoint = saved.find(folder, wanted, watchers.said) if resume is not None else None
        reset_peaks(plan)
        world.lead((plan, checkpoint))
        bench = set_up(plan, checkpoint, watchers.said, world)
        state = TrainState(step=bench.step, tokenizer=bench.tokenizer, adapter=plan.traits.adapter)
        if checkpoint is None:
            progress = Progress(step=0, seconds=0.0, tokens=0, trained_tokens=0, identity=identity(plan, bench.sets))
            if resume is not None:
                watchers.said("nothing was saved yet: starting from the beginning")
        else:
            progress = saved.read_progress(checkpoint)
            check_identity(plan, bench.sets, progress.identity)
            saved.restore(checkpoint, state)
            watchers.said(f"going on after step {progress.step} from {checkpoint.name}")
        files.write_text(folder / "job.yaml", to_yaml(plan.job))
        files.write_text(folder / "plan.yaml", plan.to_yaml())
        # -- 2. the steps
        metrics = MetricsWriter(folder, step=progress.step, tensorboard=plan.job.training.tensorboard)
        watchers = Observers(metrics, *observers)
        try:
            watchers.loaded(bench.step.model, bench.tokenizer, bench.sets, progress.step)
            with stop_requests() as stop:
                plan, progress = _train(plan, bench, state, progress, folder, watchers, stop)
        finally:
            metrics.close()
        # -- 3. the result
        finished = progress.step == plan.total_steps
        final = _final_checkpoint(plan, bench, state, progress, folder, finished=finished)
        saved.publish(final, folder)
        if isinstance(bench.step, PlacedStep) and (timeline := bench.step.timeline) is not None:
            files.write_text(folder / TIMELINE, json.dumps(timeline.to_mapping()))
            watchers.said(timeline.describe())
        memory = memory_outcome(plan, bench.step)
        if finished:
            unfuse(bench.step.model)
            watchers.trained(bench.step.model, bench.tokenizer, bench.sets)
        epochs = bench.order.epoch_of(progress.step)
        run = record(plan, folder, progress, final, memory, epochs=epochs, finished=finished)
        run.save()
        watchers.finished(run)
        if not finished:
            raise Interrupted(
                f"stopped by signal {stop.signal_number} after step {progress.step} of {plan.total_steps}; saved in {final}",
                signal_number=stop.signal_number or 0,
                remedy="go on with --resume",
            )
        return run


def assist(world: World) -> None:
    """Take part in the run of the world's first process, to its end or to a stop signal."""
    plan, checkpoint = world.lead()
    bench = set_up(plan, checkpoint, lambda _: None, world)
    state = TrainState(step=bench.step, tokenizer=bench.tokenizer, adapter=plan.traits.adapter)
    progress = Progress(step=0, seconds=0.0, tokens=0, trained_tokens=0, identity="")
    if checkpoint is not None:
        progress = saved.read_progress(checkpoint)
        saved.restore(checkpoint, state)
    with stop_requests() as stop:
        _train(plan, bench, state, progress, Path(plan.job.output), Observer(), stop)


def _train(
    plan: Plan, bench: Workbench, state: TrainState, progress: Progress, folder: Path, watchers: Observer, stop: StopRequest
) -> tuple[Plan, Progress]:
    """Steps from `progress` to the end or to a stop signal; returns the plan as it was in the end, and the progress, which is
    saved."""
    training, evaluation = plan.job.training, plan.job.evaluation
    watchers.started(progress.step, plan.total_steps)
    if progress.step == 0 and bench.sets.held_out is not None:
        progress = _evaluate(plan, bench, progress, watchers)
    world = bench.world
    while progress.step < plan.total_steps and not any(world.sum(bool(stop))):
        try:
            changed, progress = _step(plan, bench, progress, watchers)
            shortage = None
            if changed is not plan:
                plan = changed
                files.write_text(folder / "plan.yaml", plan.to_yaml())
        except StorageError:  # nothing can be saved of what is not there
            raise
        except RunError:  # a loss that is not finite: the step was not taken, the weights are good
            if world.leads:
                saved.save(folder, state, progress)
            raise
        except (RuntimeError, MemoryError) as error:
            shortage = shortage_of(error, bench)
            if shortage is None:
                raise
        if shortage is not None:  # the error is gone by now, and what its frames held
            clear_up(bench)
            if world.leads and not shortage.updating and not (folder / f"checkpoint-{progress.step}").is_dir():
                saved.save(folder, state, progress)
            plan = recover(plan, bench, shortage, progress.step, watchers.said)
            files.write_text(folder / "plan.yaml", plan.to_yaml())
            continue
        last = progress.step == plan.total_steps
        if bench.sets.held_out is not None and (last or _due(evaluation.every, progress.step)):
            progress = _evaluate(plan, bench, progress, watchers)
        is_best = training.keep_best and progress.best_step == progress.step
        if world.leads and (last or stop or is_best or _due(training.save_every, progress.step)):
            watchers.saved(saved.save(folder, state, progress))
            best = {progress.best_step} if training.keep_best and progress.best_step else set()
            saved.prune(folder, keep_last=training.keep_last, keep=best)
    return plan, progress


def _step(plan: Plan, bench: Workbench, progress: Progress, watchers: Observer) -> tuple[Plan, Progress]:
    """One optimizer step; the plan as it is afterwards. Raises RunError, naming the examples, where loss or gradient is not
    finite."""
    start = time.perf_counter()
    if not bench.step.model.training:  # which takes milliseconds
        bench.step.model.train()
    bench.world.seed(plan.job.training.seed, progress.step)
    # Which examples, and how they are cut into micro-batches, is decided by the seed and the strategy alone.
    indices = bench.order.indices(progress.step)
    batches, several = bench.batches(plan, bench.sets.train, indices), bench.expect(plan, bench.sets.train, indices)
    trained_tokens = int(bench.sets.train.trained_counts[indices].sum())

    # The loss is normalised by the trained tokens of the whole step: averaging micro-batches would weigh a token by the
    # company it happens to be in (torchtune#1875).
    tensors = [TensorBatch.of(batch, plan.strategy.device) for batch in batches]
    gradients = bench.step.backward(tensors, trained_tokens, several=several)
    losses, norm = torch.stack(gradients.losses).tolist() if batches else [], float(gradients.norm)
    (loss,) = bench.world.sum(sum(losses))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bench.step.discard()
        raise not_finite(bench, batches, losses, norm, progress.step)

    training = plan.job.training
    assert training.learning_rate is not None, "a plan's job is resolved"
    rate = learning_rate(progress.step, plan.total_steps, training, peak=training.learning_rate)
    plan = update(plan, bench, rate, progress.step, watchers.said)

    tokens, seconds = int(bench.sets.train.lengths[indices].sum()), time.perf_counter() - start
    progress = dataclasses.replace(
        progress,
        step=progress.step + 1,
        seconds=progress.seconds + seconds,
        tokens=progress.tokens + tokens,
        trained_tokens=progress.trained_tokens + trained_tokens,
    )
    watchers.stepped(
        StepRecord(
            step=progress.step,
            epoch=bench.order.epoch_of(progress.step),
            loss=loss / trained_tokens,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            trained_tokens=trained_tokens,
            tokens_per_second=tokens / seconds,
            seconds=progress.seconds,
        )
    )
    return plan, progress


@torch.no_grad()
def _evaluate(plan: Plan, bench: Workbench, progress: Progress, watchers: Observer) -> Progress:
    """Mean held-out loss per trained token, and the best so far."""
    held_out = bench.sets.held_out
    assert held_out is not None, "called only where something is held out"
    bench.step.model.eval()
    count = min(len(held_out), plan.job.evaluation.examples or len(held_out))
    total, tokens, group = 0.0, 0.0, plan.job.training.global_batch
    for first in range(0, count, group):
        for batch in bench.batches(plan, held_out, range(first, min(first + group, count))):
            with bench.step.precision.autocast(bench.step.device_kind):
                total += float(bench.step.loss(bench.step.model, TensorBatch.of(batch, plan.strategy.device)))
            tokens += batch.trained_tokens
    total, tokens = bench.world.sum(total, tokens)
    loss = total / tokens
    watchers.evaluated(EvalRecord(step=progress.step, eval_loss=loss, eval_tokens=int(tokens)))
    first_loss = loss if progress.first_eval_loss is None else progress.first_eval_loss
    progress = dataclasses.replace(progress, first_eval_loss=first_loss, last_eval_loss=loss)
    if progress.step > 0 and math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress = dataclasses.replace(progress, best_loss=loss, best_step=progress.step)
    return progress


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _final_checkpoint(
    plan: Plan, bench: Workbench, state: TrainState, progress: Progress, folder: Path, *, finished: bool
) -> Path:
    """The checkpoint that is the result: the best where the job keeps it, else the last. The model becomes it."""
    last = folder / f"checkpoint-{progress.step}"
    if not last.is_dir():
        saved.save(folder, state, progress)
    if not (finished and plan.job.training.keep_best and progress.best_step):
        return last
    best = folder / f"checkpoint-{progress.best_step}"
    adopt(plan, bench, best)
    return best
