"""Random tokens of a given length: to plan without data, and to measure."""

from __future__ import annotations

import numpy as np

from sartor.data.summary import DataSets, DataSummary, Lengths
from sartor.data.tokens import Sample, TokenSet
from sartor.errors import JobError
from sartor.job.schema import SyntheticJob


def synthetic(job: SyntheticJob, *, max_length: int, vocab_size: int, seed: int) -> DataSets:
    """`job.examples` examples of `job.length` tokens, the same for the same seed. Raises JobError where they are too long."""
    if job.length > max_length:
        raise JobError(
            f"`data.synthetic.length` is {job.length}, sequences have at most {max_length} tokens", remedy="a shorter length"
        )
    random = np.random.default_rng(seed)
    first_trained = job.length - max(1, round(job.trained * job.length))
    trained = np.arange(job.length) >= first_trained
    samples = (
        Sample(
            input_ids=random.integers(0, vocab_size, job.length, dtype=np.int32), trained=trained, source=f"synthetic:{number}"
        )
        for number in range(job.examples)
    )
    tokens = TokenSet.from_samples(samples)
    summary = DataSummary(
        format="synthetic",
        recognised="random tokens, as `data.synthetic` says",
        template="none (random tokens)",
        samples=len(tokens),
        held_out_samples=0,
        tokens=int(tokens.lengths.sum()),
        trained_tokens=int(tokens.trained_counts.sum()),
        truncated=0,
        dropped=0,
        untrained=0,
        max_length=max_length,
        lengths=Lengths.of(tokens.lengths),
        notes=(),
        cached=False,
        seconds=0.0,
    )
    return DataSets(train=tokens, held_out=None, summary=summary)
