"""`did you mean`: the nearest known key, also where the word comes from another tool."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from functools import cache

from sartor.job.schema import Job

# What other tools (HF Trainer, LLaMA-Factory, Axolotl, LitGPT) call our keys.
_ELSEWHERE = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "dataset": "data.path",
    "datasets": "data.path",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sample_packing": "data.packing",
    "chat_template": "data.template",
    "finetuning_type": "method",
    "adapter": "method",
    "lora_r": "lora.rank",
    "r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "target_modules": "lora.targets",
    "load_in_4bit": "method: qlora",
    "load_in_8bit": "quantise: int8",
    "quantization_bit": "quantise.mode",
    "bnb_4bit_compute_dtype": "quantise.compute",
    "bnb_4bit_use_double_quant": "quantise.double",
    "double_quantization": "quantise.double",
    "pre_seq_len": "prefix.length",
    "num_virtual_tokens": "prefix.length",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "max_grad_norm": "training.clip_norm",
    "batch_size": "training.global_batch",
    "gradient_accumulation_steps": "training.global_batch (accumulation follows from it and strategy.micro_batch)",
    "per_device_train_batch_size": "strategy.micro_batch",
    "micro_batch_size": "strategy.micro_batch",
    "gradient_checkpointing": "strategy.recompute",
    "attn_implementation": "strategy.attention",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_last",
    "eval_steps": "evaluation.every",
    "val_size": "evaluation.fraction",
    "val_set_size": "evaluation.fraction",
    "bf16": "precision: bf16-mixed",
    "dtype": "precision",
    "output_dir": "output",
}


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of a job."""

    def walk(cls: type, prefix: str) -> list[str]:
        keys = []
        for name, hint in typing.get_type_hints(cls).items():
            if typing.get_origin(hint) is typing.ClassVar:
                continue
            keys.append(f"{prefix}{name}")
            for option in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(option):
                    keys += walk(typing.cast(type, option), f"{prefix}{name}.")
        return keys

    return tuple(walk(Job, ""))


def suggest(key: str, prefix: str) -> str:
    """A sentence that names the nearest known key, or the keys there are."""
    if key in _ELSEWHERE:
        return f"did you mean `{_ELSEWHERE[key]}`?"
    here = [known.removeprefix(prefix) for known in known_keys() if known.startswith(prefix)]
    here = [known for known in here if "." not in known]
    if near := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        return f"did you mean `{prefix}{near[0]}`?"
    leaves = {known.rpartition(".")[2]: known for known in known_keys()}
    if near := difflib.get_close_matches(key, leaves, n=1, cutoff=0.7):
        return f"did you mean `{leaves[near[0]]}`?"
    return f"known keys{' of ' + prefix.rstrip('.') if prefix else ''}: {', '.join(here)}"
