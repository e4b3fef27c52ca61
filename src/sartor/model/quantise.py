"""Frozen weights in 4 or 8 bits: loaded by transformers and bitsandbytes, or as stand-ins on the meta device."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from sartor.errors import JobError
from sartor.job.schema import QuantiseJob
from sartor.model.quantised import Linear4bit, Linear8bitLt
from sartor.model.source import ModelSource

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# It warns of every cast in every forward pass, and, when PEFT imports it, of an inference kernel that is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_loadable(source: ModelSource, quantise: QuantiseJob) -> None:
    """Raises JobError where the weights of `source` cannot be quantised here; a forecast needs none of this."""
    if not source.has_weights:
        raise JobError(
            f"`quantise` is {quantise.mode}, but this model starts from random weights",
            why="weights are quantised while they are read from files",
            remedy="give a model with weights; `sartor plan` works without",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise JobError(
            f"`quantise` is {quantise.mode}, and bitsandbytes is not installed",
            why="it holds the weights and does the arithmetic; only the forecast does without",
            remedy="pip install 'sartor[quant]'",
        )


_READ_DIRECTLY = {
    "dt_proj": ("falcon_mamba", "jamba", "mamba"),
    "out_proj": ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"),
}
"""Layers of state space models whose weights the model multiplies by itself, and the kinds of models that do."""


def kept_layers(model_type: str) -> list[str] | None:
    """Names of layers that are not quantised, since the model does not call them; None: as transformers decides."""
    kept = [name for name, kinds in _READ_DIRECTLY.items() if model_type in kinds]
    return ["lm_head", *kept] if kept else None


def loading_options(quantise: QuantiseJob, device: str, model_type: str) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise while it loads, straight to `device`."""
    from transformers import BitsAndBytesConfig

    kept = kept_layers(model_type)
    if quantise.mode == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=kept,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantise.double,
            bnb_4bit_compute_dtype=_DTYPES[quantise.compute],
        )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(model: nn.Module) -> None:
    """Stay with the layout that has a backward pass.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer for good when it first infers (an evaluation, say); the
    repacked layer passes no gradient on to its input.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantise_skeleton(model: nn.Module, quantise: QuantiseJob, *, kind: str = "cpu") -> nn.Module:
    """`model`, on the meta device, with stand-ins where transformers would put bitsandbytes' layers; changed in place.

    `kind`: the device whose memory is forecast, `cpu` or `cuda`.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model_type = getattr(model.config, "model_type", "")
    kept = HfQuantizer.get_modules_to_not_convert(model, kept_layers(model_type), model._keep_in_fp32_modules)
    for name, module in list(model.named_modules()):
        # As transformers.integrations.bitsandbytes.replace_with_bnb_linear chooses.
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            model.set_submodule(name, _stand_in(module, quantise, kind).train(module.training))
    # PEFT and transformers ask for these.
    model.is_quantized = True  # type: ignore[assignment]
    setattr(model, "is_loaded_in_8bit" if quantise.mode == "int8" else "is_loaded_in_4bit", True)
    return model


def _stand_in(module: Any, quantise: QuantiseJob, kind: str) -> nn.Module:
    weight = module.weight
    # Conv1D (GPT-2) keeps its weights the other way round.
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    bias = None if module.bias is None else module.bias.requires_grad_(False)
    if quantise.mode == "int8":
        return Linear8bitLt(inputs, outputs, bias, kind=kind)
    compute = _DTYPES[quantise.compute]
    return Linear4bit(inputs, outputs, bias, stored=weight.dtype, compute=compute, double=quantise.double, kind=kind)


def upcast(model: nn.Module) -> None:
    """What is not quantised in float32, as PEFT's `prepare_model_for_kbit_training` does it."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once; of a skeleton as well."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
