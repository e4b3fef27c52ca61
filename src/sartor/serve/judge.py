"""Answers to held-out prompts before and after training, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sartor.data import DataSets, prompt_and_reference, readable_prompt
from sartor.job.schema import EvaluationJob
from sartor.serve.session import Sampling, generate
from sartor.train import Answer, Observer
from sartor.train.folder import write_text

_ROWS = 32
"""Prompts answered at once."""


class Judge(Observer):
    """Lets the model answer held-out prompts before its first step and when it is trained.

    The answers from before are kept in the run's folder, for a run that is resumed in another process.
    """

    def __init__(self, job: EvaluationJob, folder: Path) -> None:
        self._job = job
        self._file = folder / "answers-before.json"
        self._before: list[str] = []
        self._prompts: list[tuple[list[int], str]] = []
        self.answers: tuple[Answer, ...] = ()

    def loaded(self, model: Any, tokenizer: Any, sets: DataSets, step: int) -> None:
        source = sets.held_out if sets.held_out is not None else sets.train
        count = min(self._job.generate, len(source))
        self._prompts = [prompt_and_reference(source[index], tokenizer) for index in range(count)]
        if step == 0:
            self._before = self._answer(model, tokenizer)
            write_text(self._file, json.dumps(self._before, ensure_ascii=False) + "\n")
        elif self._file.exists():
            self._before = json.loads(self._file.read_text(encoding="utf-8"))
        if len(self._before) != count:  # asked for another number of answers, or never before
            self._prompts = []

    def trained(self, model: Any, tokenizer: Any, sets: DataSets) -> None:
        after = self._answer(model, tokenizer)
        self.answers = tuple(
            Answer(
                prompt=readable_prompt(ids, tokenizer),
                reference=reference,
                before=before,
                after=now,
            )
            for (ids, reference), before, now in zip(self._prompts, self._before, after, strict=True)
        )

    def exact_match(self) -> tuple[float | None, float | None]:
        """Share of answers equal to the reference, before and after; None where nothing was asked."""
        if not self.answers:
            return None, None
        count = len(self.answers)
        before = sum(answer.before == answer.reference for answer in self.answers) / count
        return before, sum(answer.after == answer.reference for answer in self.answers) / count

    def _answer(self, model: Any, tokenizer: Any) -> list[str]:
        sampling = Sampling(max_new_tokens=self._job.max_new_tokens)
        texts = []
        for first in range(0, len(self._prompts), _ROWS):
            prompts = [ids for ids, _ in self._prompts[first : first + _ROWS]]
            texts += [
                tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in generate(model, tokenizer, prompts, sampling)
            ]
        return texts
