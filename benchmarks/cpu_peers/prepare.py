"""What all entrants start from: a model folder with random weights, and the examples as tokens in the order of Sartor's steps.

Run as a process of its own, so that the benchmark's parent stays small: `python prepare.py SHAPE.json FOLDER` for a model,
`python prepare.py --examples JOB.yaml FILE` for the tokens of a job.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any


def make_model(shape: dict[str, Any], folder: Path) -> None:
    """A Llama of this shape with seeded random weights in float32, beside the tokenizer at `shape["tokenizer"]`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Path(shape["tokenizer"])
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=shape["end_id"],
        eos_token_id=shape["end_id"],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100GB")
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)


def write_examples(job_path: Path, target: Path) -> None:
    """Ids and labels of the examples of the job's first epoch, one a line, as Sartor tokenises, masks and orders them."""
    from sartor.data import prepare
    from sartor.job import load
    from sartor.model import load_tokenizer
    from sartor.plan import batch_order

    job = load(str(job_path), ())
    assert job.data.max_length is not None
    sets = prepare(job, load_tokenizer(job.model), max_length=job.data.max_length)
    order = batch_order(job, sets)
    with target.open("w", encoding="utf-8") as file:
        for step in range(order.steps_per_epoch):
            for index in order.indices(step):
                sample = sets.train[int(index)]
                pairs = zip(sample.input_ids.tolist(), sample.trained.tolist(), strict=True)
                labels = [token if trained else -100 for token, trained in pairs]
                file.write(json.dumps({"input_ids": sample.input_ids.tolist(), "labels": labels}) + "\n")


def main() -> None:
    if sys.argv[1] == "--examples":
        write_examples(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    make_model(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
