"""transformers' Trainer, and all that is built on it, watched from inside: loss and useful tokens of every step."""

from __future__ import annotations

from typing import Any

import torch
from peer import Metrics, Task
from transformers import Trainer, TrainerCallback


class StepLines(TrainerCallback):
    """Writes a line when an optimizer step is done. `Trainer.training_step` is wrapped to see batch and loss.

    The benchmark lets no trainer accumulate, so a step has one batch.
    """

    def __init__(self, task: Task) -> None:
        self._metrics = Metrics(task.metrics)
        self._loss, self._tokens = float("nan"), 0
        plain = Trainer.training_step

        def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            # Without a mask the batch is one row of whole examples side by side: there is no padding.
            self._tokens = inputs["input_ids"].numel() if mask is None else int((mask != 0).sum())
            loss: torch.Tensor = plain(trainer, model, inputs, *args, **kwargs)
            self._loss = float(loss)
            return loss

        Trainer.training_step = training_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._metrics.write(state.global_step, self._loss, self._tokens)


def arguments(task: Task) -> dict[str, Any]:
    """TrainingArguments that every Trainer-based entrant has: the task, and nothing that would cost time beside it."""
    return {
        "output_dir": task.scratch,
        "per_device_train_batch_size": task.batch,
        "num_train_epochs": task.epochs,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
        "seed": 0,
    }


def tuned(task: Task) -> dict[str, Any]:
    """Arguments of the entrant's options: bf16 autocast, batches of like length, compiled, a worker that prepares batches."""
    options = task.options
    chosen: dict[str, Any] = {}
    if options.get("bf16"):
        chosen["bf16"] = True
    if options.get("fused"):
        chosen["optim"] = "adamw_torch_fused"
    if options.get("compile"):
        chosen["torch_compile"] = True
    if options.get("workers"):
        chosen["dataloader_num_workers"] = options["workers"]
    if options.get("group"):
        chosen["train_sampling_strategy"] = "group_by_length"
    if task.in_order:
        chosen["train_sampling_strategy"] = "sequential"
    return chosen
