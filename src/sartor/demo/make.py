"""Make again what the demo's base model is made of: its text, its tokenizer and the job that trains it from random weights.

    python -m sartor.demo.make FOLDER       # FOLDER/text.jsonl, FOLDER/base/ (config, tokenizer), FOLDER/pretrain.yaml
    sartor train FOLDER/pretrain.yaml       # FOLDER/run/

Everything follows from the seeds here and in pretrain.yaml. To ship the result, copy the trained weights and what describes them
into the package:

    cp FOLDER/base/* src/sartor/demo/model/
    cp FOLDER/run/checkpoint-N/model.safetensors src/sartor/demo/model/      # N: the last step
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sartor.demo import tokenizer
from sartor.demo.files import MODEL, begin, write_job, write_lines
from sartor.demo.world import documents
from sartor.errors import UsageError

DOCUMENTS, DOCUMENTS_SEED = 100_000, 0
TOKENIZER_DOCUMENTS = 20_000
LONGEST = 512
"""`max_position_embeddings` in model/config.json."""


def make(folder: Path) -> Path:
    """Fill `folder`; the path of the pretraining job. Raises UsageError where the folder is not empty."""
    begin(folder)
    base = folder / "base"
    base.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(MODEL / name, base)
    tokenizer.save(tokenizer.learn(documents(TOKENIZER_DOCUMENTS, DOCUMENTS_SEED)), base, longest=LONGEST)
    write_lines(folder / "text.jsonl", ({"text": text} for text in documents(DOCUMENTS, DOCUMENTS_SEED)))
    return write_job(folder, "pretrain.yaml")


def main(arguments: list[str]) -> int:
    """`python -m sartor.demo.make FOLDER`; the exit code."""
    if len(arguments) != 1:
        print("usage: python -m sartor.demo.make FOLDER", file=sys.stderr)
        return UsageError.exit_code
    try:
        job = make(Path(arguments[0]))
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"now: sartor train {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
