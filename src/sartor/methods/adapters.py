"""PEFT configurations for the methods that train a few parameters beside a frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sartor.errors import JobError
from sartor.job.schema import Job
from sartor.model.build import quiet

NO_PACKING = ("prefix", "prompt")
"""Methods whose virtual tokens stand before a row, so that a row can hold one example only."""


def peft_config(job: Job, *, meta: bool = False) -> Any:
    """The PEFT configuration of the job's method. On `meta` nothing may read weights or text. Raises JobError."""
    import peft

    if job.method in ("lora", "qlora"):
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=job.lora.rank,
            lora_alpha=job.lora.alpha,
            lora_dropout=job.lora.dropout,
            target_modules=job.lora.targets,
            init_lora_weights=not meta,  # on meta there is nothing to initialise, and it takes long
        )
    if job.method == "prefix":
        return peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=job.prefix.length,
            prefix_projection=job.prefix.projection,
            encoder_hidden_size=job.prefix.projection_size,
        )
    if job.method == "prompt":
        text = {} if meta or job.prompt.text is None else _text_initialisation(job)
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=job.prompt.length, **text)
    return _any_config(job.peft)


def _text_initialisation(job: Job) -> dict[str, Any]:
    where = job.model.tokenizer or job.model.path
    return {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": job.prompt.text, "tokenizer_name_or_path": where}


def _any_config(given: dict[str, Any] | str | None) -> Any:
    """`peft: {peft_type: …}` or the path of an adapter_config.json (or of its folder)."""
    import peft

    if isinstance(given, str):
        path = Path(given) / "adapter_config.json" if Path(given).is_dir() else Path(given)
        try:
            given = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise JobError(
                f"`peft` names {path}, which cannot be read", why=str(error), remedy="give an adapter_config.json"
            ) from None
    options: dict[str, Any] = dict(given or {})
    kinds = sorted(str(kind.value) for kind in peft.PeftType)
    kind = str(options.pop("peft_type", "")).upper()
    if kind not in kinds:
        raise JobError(f"`peft.peft_type` is {kind or 'missing'}", remedy=f"one of: {', '.join(kinds)}")
    options.setdefault("task_type", "CAUSAL_LM")
    for bookkeeping in ("peft_version", "auto_mapping", "inference_mode", "base_model_name_or_path"):
        options.pop(bookkeeping, None)
    try:
        return peft.get_peft_config({"peft_type": kind, **options})
    except (TypeError, ValueError, KeyError) as error:
        raise JobError(
            f"PEFT does not take this {kind} configuration", why=str(error), remedy="see PEFT's documentation of it"
        ) from None


def check_quantised(config: Any) -> None:
    """Raises JobError for a configuration whose layers beside quantised weights are not known here."""
    if config.is_prompt_learning:
        return
    kind = str(config.peft_type.value)
    if kind != "LORA":
        why, what = "its layers beside quantised weights are not forecast", f"PEFT's {kind}"
    elif config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        why, what = "they read the full-size weights", "DoRA and initialisation from the weights"
    else:
        return
    raise JobError(f"`quantise` does not go with {what} yet", why=why, remedy="method=qlora, or without `quantise`")


_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
PAST_MAMBA = "out_proj"
"""Mamba's fused kernels read this layer's weight and never call the layer, so an adapter would be passed by."""


def unlike_linear(model: nn.Module) -> list[str]:
    """Names of linear layers that `all-linear` leaves out, because PEFT takes them in and they then fail.

    A model's own code may compute something else in a layer that is linear by class: Llama 4's router returns a pair, DeepSeek
    V4's output projection works in groups. What such a layer gives is asked on the meta device. In Mamba PEFT refuses one.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    odd = {name for name, module in layers.items() if not _acts_linear(module) or _refused(name, model)}
    short = {name.rpartition(".")[2] for name in odd} - {name.rpartition(".")[2] for name in layers.keys() - odd}
    return sorted({last if (last := name.rpartition(".")[2]) in short else name for name in odd})


def _refused(name: str, model: nn.Module) -> bool:
    """Whether PEFT refuses an adapter in this layer (peft 0.21, tuners_utils.py, _check_lora_target_modules_mamba)."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in _MAMBA and name.rpartition(".")[2] == PAST_MAMBA


def _acts_linear(layer: nn.Linear) -> bool:
    """Whether (…, inputs) becomes (…, outputs). PyTorch's own layers and quantised ones do; a model's own class is asked."""
    room, *parts = type(layer).__module__.split(".")
    if room not in ("transformers", "transformers_modules") or parts[:1] == ["integrations"]:
        return True
    weights = {name: parameter.to("meta") for name, parameter in layer.named_parameters()}
    given = torch.empty((3, 5, layer.in_features), dtype=layer.weight.dtype, device="meta")
    try:
        with torch.no_grad():
            result = torch.func.functional_call(layer, weights, (given,))
    except Exception:  # whatever the model's code makes of a shape it does not expect
        return False
    return isinstance(result, torch.Tensor) and result.shape == (3, 5, layer.out_features)


def wrap(model: nn.Module, config: Any, *, meta: bool = False) -> nn.Module:
    """`model` with the adapters in it, on `meta` without memory. Raises JobError where PEFT cannot place them in this model."""
    import peft

    if getattr(config, "target_modules", None) == "all-linear" and not config.exclude_modules:
        config.exclude_modules = unlike_linear(model) or None
    try:
        with quiet():
            return peft.get_peft_model(model, config, low_cpu_mem_usage=meta)  # type: ignore[no-any-return]
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:300]
        remedy = "name modules of this model in `lora.targets`, or choose another method"
        raise JobError(f"PEFT cannot apply {config.peft_type.value} to {type(model).__name__}", why=why, remedy=remedy) from error
