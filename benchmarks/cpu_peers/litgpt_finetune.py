"""LitGPT's `finetune_full` and `finetune_lora`, the weights converted by its own converter.

Option: precision (LitGPT's names: bf16-mixed is its default here, 32-true, bf16-true). Its fixed warm-up and cosine are replaced
by the constant rate that all have; it clips no gradients.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.loggers.logger import Logger
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.base import DataModule, get_sft_collate_fn
from litgpt.finetune import full, lora
from litgpt.prompts import Alpaca
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from peer import Metrics, Task, read_examples, read_task
from safetensors.torch import load_file
from torch.utils.data import DataLoader


class Examples(DataModule):
    """The benchmark's examples, in their order or shuffled."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.prompt_style, self._task = Alpaca(), task
        self._samples = [self._sample(example) for example in read_examples(task)]

    @staticmethod
    def _sample(example: dict[str, list[int]]) -> dict[str, Any]:
        count = len(example["input_ids"])
        tensors = {key: torch.tensor(example[key]) for key in ("input_ids", "labels")}
        return {**tensors, "token_counts": {"raw": count, "raw_plus_prompt_template": count}}

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        self._batch = batch_size

    def train_dataloader(self) -> DataLoader:
        shuffle, collate = not self._task.in_order, get_sft_collate_fn()
        return DataLoader(self._samples, batch_size=self._batch, shuffle=shuffle, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        """LitGPT insists on validating twice before it starts: one example."""
        return DataLoader(self._samples[:1], batch_size=1, collate_fn=get_sft_collate_fn())


class StepLines(Logger):
    """LitGPT's own log, which has loss and useful tokens of every step, as the benchmark's lines."""

    def __init__(self, task: Task) -> None:
        self._metrics, self._before = Metrics(task.metrics), 0

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "iter_time" not in metrics:  # its throughput and memory, in between
            return
        total = int(metrics["tokens"])
        self._metrics.write(int(metrics["step"]), float(metrics["loss"]), total - self._before)
        self._before = total


def convert(task: Task) -> Path:
    """The model folder in LitGPT's format."""
    source, target = Path(task.model), Path(task.scratch) / "litgpt"
    target.mkdir(parents=True)
    shape = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = Config(
        name="benchmark",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(shape.get("rope_parameters", {}).get("rope_theta", 10000)),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    (target / "model_config.yaml").write_text(yaml.safe_dump(asdict(config)), encoding="utf-8")
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(source / "model.safetensors"))
    torch.save(weights, target / "lit_model.pth")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target / name)
    return target


def main() -> None:
    task = read_task()
    lines = StepLines(task)
    module = full if task.method == "full" else lora
    module.choose_logger = lambda *_, **__: lines
    module.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    parts = ("query", "key", "value", "projection", "mlp")
    adapters = {f"lora_{part}": True for part in parts} | {"lora_r": task.rank, "lora_alpha": task.alpha, "lora_dropout": 0.0}
    module.setup(
        checkpoint_dir=convert(task),
        out_dir=Path(task.scratch) / "out",
        precision=task.options.get("precision"),
        data=Examples(task),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=task.batch,
            micro_batch_size=task.batch,
            lr_warmup_steps=1,
            epochs=task.epochs,
            max_seq_length=task.max_length,
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": task.learning_rate, "weight_decay": 0.0, "fused": True},
        },
        **({} if task.method == "full" else adapters),
    )


if __name__ == "__main__":
    main()
