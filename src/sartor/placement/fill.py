"""Weights for a model on the meta device, row by row as its rows are put in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from sartor.errors import ModelError
from sartor.kernels.adam import RESIDUAL, split
from sartor.model.lazy import LazyWeights
from sartor.model.weights import WeightFiles

Fill = Callable[[Mapping[str, nn.Parameter]], None]
"""Gives these parameters, which are on the meta device, memory and their values. Called once for every row."""


def from_folder(folder: Path, model: nn.Module, *, masters: bool = False) -> Fill:
    """Values from safetensors, by the names of `model`. Raises ModelError where some are missing.

    `masters`: what is read as float32 becomes bfloat16 and its residual, which waits at the parameter (`sartor.kernels.adam`).
    """
    files = WeightFiles(folder)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    missing = [aliases[0] for aliases in names.values() if not any(alias in files for alias in aliases)]
    if missing:
        raise ModelError(
            f"the weights of {folder} lack {len(missing)} tensors",
            why=f"the first is {missing[0]}; the files may hold it under another name, which loading the whole model would know",
            remedy="load the model first and place it then, or save it once with save_pretrained",
        )

    def fill(parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            if parameter.is_meta:
                name = next(alias for alias in names[id(parameter)] if alias in files)
                values, residual = torch.empty(parameter.shape, dtype=parameter.dtype), None
                files.read(name, values)
                if masters:
                    values, residual = split(values)
                put(parameter, values)
                if residual is not None:
                    setattr(parameter, RESIDUAL, residual)

    return fill


def from_random(weights: LazyWeights, *, masters: bool = False) -> Fill:
    """Values that were noted when the model was made. `masters`: as above, for all parameters."""
    done: set[int] = set()

    def fill(parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            weights.fill(parameter)
            if masters and id(parameter) not in done:
                values, residual = split(parameter.data)
                put(parameter, values)
                setattr(parameter, RESIDUAL, residual)
            done.add(id(parameter))

    return fill


def put(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """`parameter`, which may be on another device, becomes `values`, and stays the same object."""
    torch.utils.swap_tensors(parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))
