"""Hugging Face's Trainer, with PEFT for LoRA.

Options: those of `trainer.tuned`, and weights: bfloat16 (loaded in bfloat16: with method lora the frozen ones, since PEFT keeps
adapters in float32; with method full all, and so AdamW's moments too).
"""

from __future__ import annotations

import torch
from peer import Task, read_examples, read_task
from trainer import StepLines, arguments, tuned
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def load_model(task: Task) -> torch.nn.Module:
    """The model in the entrant's format, with adapters for method lora."""
    dtype = getattr(torch, task.options.get("weights", "float32"))
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    if task.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=task.rank, lora_alpha=task.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def main() -> None:
    task = read_task()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    data = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in read_examples(task)]
    trainer = Trainer(
        model=load_model(task),
        args=TrainingArguments(**arguments(task), **tuned(task)),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=[StepLines(task)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
