"""A sample taken apart: what the model is asked, and the answer the data gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from sartor.data.tokens import Sample

_LONGEST_TEXT_PROMPT = 32


def prompt_and_reference(sample: Sample, tokenizer: Any) -> tuple[list[int], str]:
    """The token ids before the last trained span, and that span as text without special tokens.

    Plain text, trained throughout, is cut after its first quarter (at most 32 tokens); the rest is the reference.
    """
    trained = np.flatnonzero(sample.trained)
    if not len(trained):
        return [int(token) for token in sample.input_ids], ""
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(~sample.trained[:end])
    first = int(gaps[-1]) + 1 if len(gaps) else 0
    if first <= 1:  # nothing before it but, perhaps, a BOS token
        first = max(1, min(len(sample) // 4, _LONGEST_TEXT_PROMPT))
    reference = tokenizer.decode(sample.input_ids[first:end].tolist(), skip_special_tokens=True)
    return sample.input_ids[:first].tolist(), reference.strip()
