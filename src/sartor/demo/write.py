"""`sartor demo`: a folder with a base model, examples and a job, ready to train."""

from __future__ import annotations

import shutil
from pathlib import Path

from sartor.demo.files import MODEL, begin, write_job, write_lines
from sartor.demo.task import examples

TRAINING, UNSEEN = 1500, 100
TRAINING_SEED, UNSEEN_SEED = 1, 2026


def write(folder: Path) -> Path:
    """Fill `folder` with model/, train.jsonl, unseen.jsonl and job.yaml; the job file's path.

    The job's paths start with `folder` as given: run it from the same directory. Raises UsageError where the folder is not empty.
    """
    begin(folder)
    shutil.copytree(MODEL, folder / "model")
    write_lines(folder / "train.jsonl", examples(TRAINING, TRAINING_SEED))
    write_lines(folder / "unseen.jsonl", examples(UNSEEN, UNSEEN_SEED, unseen=True))
    return write_job(folder, "job.yaml")
