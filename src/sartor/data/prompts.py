"""What the model is asked: from a conversation, or from a sample taken apart into prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sartor.data.mask import begins_with_bos
from sartor.data.tokens import Sample
from sartor.errors import DataError

_LONGEST_TEXT_PROMPT = 32
_SENTINEL = "XqZ7sartorZqX"


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


def readable_prompt(ids: Sequence[int], tokenizer: Any) -> str:
    """What the user said in a prompt of one turn; other prompts as they are, special tokens left out."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    if tokenizer.chat_template:
        before, _, after = _invitation(tokenizer, [{"role": "user", "content": _SENTINEL}]).partition(_SENTINEL)
        inner = text.removeprefix(before).removesuffix(after)
        if len(inner) == len(text) - len(before) - len(after) and not (after and after in inner):
            return inner.strip()
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def encode_prompt(tokenizer: Any, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a text, or of a conversation whose next turn is the assistant's, as training saw them: one BOS at most.

    Raises DataError where the chat template does not render the conversation.
    """
    text = prompt if isinstance(prompt, str) else _invitation(tokenizer, prompt)
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
    if begins_with_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    return ids


def _invitation(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template does not render this conversation ({roles})", why=str(error)) from None
