"""LLaMA-Factory's supervised fine-tuning (`run_exp`), on examples tokenised beforehand (`tokenized_path`).

Options: those of `trainer.tuned`. LLaMA-Factory imports torchaudio even where there is text only; where it is not installed
(PyPI has no build of it that loads beside every torch), an empty module stands in.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from datasets import Dataset, DatasetDict
from peer import read_examples, read_task
from trainer import StepLines, arguments, tuned


def stand_in(name: str) -> None:
    """An empty module of this name."""
    spec = ModuleSpec(name, loader=None)
    sys.modules[name] = importlib.util.module_from_spec(spec)


def main() -> None:
    if importlib.util.find_spec("torchaudio") is None:
        stand_in("torchaudio")
    from llamafactory.train.tuner import run_exp

    task = read_task()
    examples = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in read_examples(task)]
    for example in examples:
        example |= {"images": None, "videos": None, "audios": None}
    tokens = Path(task.scratch) / "tokens"
    DatasetDict({"train": Dataset.from_list(examples)}).save_to_disk(str(tokens))
    common = arguments(task)
    del common["disable_tqdm"]
    chosen = {
        "model_name_or_path": task.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": task.method,
        "template": "alpaca",
        "dataset": "tokens",  # a name must be given; read is what follows
        "tokenized_path": str(tokens),
        "cutoff_len": task.max_length,
        "disable_gradient_checkpointing": True,
        **common,
        **tuned(task),
    }
    if task.method == "lora":
        chosen |= {"lora_rank": task.rank, "lora_alpha": task.alpha, "lora_dropout": 0.0, "lora_target": "all"}
    run_exp(chosen, callbacks=[StepLines(task)])


if __name__ == "__main__":
    main()
