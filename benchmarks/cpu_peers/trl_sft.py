"""TRL's SFTTrainer. Options: those of `trainer.tuned`, weights as in hf_trainer, and

packing: rows of up to `max_length` tokens, examples kept apart ("bfd"). A step then has as many rows as hold `batch` examples on
average, since TRL counts rows.
padding_free: the step's examples side by side in one row, without padding.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from hf_trainer import load_model
from peer import IGNORE, Task, read_examples, read_task
from trainer import StepLines, arguments, tuned
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def configuration(task: Task, lengths: list[int]) -> SFTConfig:
    """SFTConfig of the task; recomputation, which it has on by default, costs time and is off."""
    chosen: dict[str, Any] = {**arguments(task), **tuned(task), "gradient_checkpointing": False}
    chosen["max_length"] = task.max_length
    chosen.setdefault("bf16", False)
    if task.options.get("packing"):
        chosen["packing"] = True
        mean = sum(lengths) / len(lengths)
        # At least as many rows as the whole set fills where it is one step (the check of losses).
        rows = task.batch if len(lengths) <= task.batch else round(task.batch * mean / task.max_length)
        chosen["per_device_train_batch_size"] = max(1, rows)
    if task.options.get("padding_free"):
        chosen |= {"padding_free": True, "max_length": None}
    return SFTConfig(**chosen)


def main() -> None:
    task = read_task()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    examples = read_examples(task)
    for example in examples:
        example["labels"][0] = IGNORE  # nothing predicts the first token
    trainer = SFTTrainer(
        model=load_model(task),
        args=configuration(task, [len(example["input_ids"]) for example in examples]),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[StepLines(task)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
