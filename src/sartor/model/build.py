"""Build a model: as a skeleton on the meta device (no memory), with random weights, or with its own from safetensors."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sartor.errors import ModelError
from sartor.job.schema import QuantiseJob
from sartor.kernels import attention as segments
from sartor.model.lazy import LazyWeights
from sartor.model.quantise import check_loadable, keep_trainable, loading_options
from sartor.model.source import ModelSource, explain


def auto_class(config: Any) -> Any:
    """The transformers Auto class that gives `config` a language-model head. Raises ModelError."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    # BERT and its kin are in the causal mapping too, but attend to both sides unless `is_decoder` says otherwise.
    encoder = kind in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    for mapping, cls in (
        *(((auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),) if encoder_decoder else ()),
        *(((auto.MODEL_FOR_MASKED_LM_MAPPING, transformers.AutoModelForMaskedLM),) if encoder else ()),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
        (auto.MODEL_FOR_MASKED_LM_MAPPING, transformers.AutoModelForMaskedLM),
        (auto.MODEL_MAPPING, transformers.AutoModel),
    ):
        if kind in mapping:
            return cls
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForCausalLM
    raise ModelError(f"transformers has no model for {kind.__name__}", remedy="pip install -U transformers")


def check_trainable(source: ModelSource) -> None:
    """Refuse what the training loop does not train (yet). Raises ModelError."""
    name = auto_class(source.config).__name__
    decoder = name in ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    if not decoder or getattr(source.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.path} is no decoder ({type(source.config).__name__})",
            why="so far Sartor trains decoders: models that predict the next token",
            remedy="choose a causal language model",
        )


def skeleton(source: ModelSource, *, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model on the meta device: every shape, no memory. Raises ModelError."""
    from transformers.initialization import no_init_weights

    _know(attention)
    with torch.device("meta"), no_init_weights():
        model = _from_config(source, dtype, attention)
    model.tie_weights()  # type: ignore[operator]
    return model


def build_empty(source: ModelSource, *, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model without its weights: parameters on the meta device, buffers in memory. Raises ModelError."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    _know(attention)
    with init_empty_weights(include_buffers=False):
        model = _from_config(source, dtype, attention)
    model.tie_weights()  # type: ignore[operator]
    return model


def build_lazily(
    source: ModelSource, *, dtype: torch.dtype, attention: str | None = None, seed: int = 0
) -> tuple[nn.Module, LazyWeights]:
    """The model that `build` makes from random weights, without the memory of its weights, and what fills them.

    Raises ModelError.
    """
    _know(attention)
    torch.manual_seed(seed)
    with LazyWeights() as weights:
        return _from_config(source, dtype, attention), weights


def build(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: str,
    attention: str | None = None,
    seed: int = 0,
    quantise: QuantiseJob | None = None,
) -> nn.Module:
    """The model in memory on `device`: its weights, quantised if so wished, or random ones (seeded) where it has none.

    Raises ModelError, and JobError where it cannot be quantised.
    """
    if quantise is not None:
        check_loadable(source, quantise)
    _know(attention)
    if not source.has_weights:
        torch.manual_seed(seed)
        return _from_config(source, dtype, attention).to(device)
    try:
        with quiet():
            model, info = auto_class(source.config).from_pretrained(
                source.path,
                config=source.config,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
                **({} if quantise is None else loading_options(quantise, device, source.config.model_type)),
            )
    except Exception as error:
        raise explain(source.path, error) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the weights of {source.path} lack {len(missing)} tensors",
            why=f"the first is {missing[0]}; they would have been random",
            remedy="get the complete files, or start over from random weights: model.random_weights=true",
        )
    if quantise is not None:
        keep_trainable(model)
        return model  # type: ignore[no-any-return]
    return model.to(device)  # type: ignore[no-any-return]


def _know(attention: str | None) -> None:
    """Tell transformers of an attention function that is ours."""
    if attention == segments.NAME:
        segments.register()


def _from_config(source: ModelSource, dtype: torch.dtype, attention: str | None) -> nn.Module:
    try:
        with quiet():
            return auto_class(source.config).from_config(  # type: ignore[no-any-return]
                copy.deepcopy(source.config),
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=source.trust_remote_code,
            )
    except ModelError:
        raise
    except Exception as error:
        raise explain(source.path, error) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading bars and advice of transformers stay off: what matters is checked and said by Sartor."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
