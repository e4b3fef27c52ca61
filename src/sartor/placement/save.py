"""A placed model's files: the same as everybody's, written and read row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sartor.model.weights import WeightFiles, write_weights
from sartor.placement.chunk import Chunk
from sartor.placement.live import LiveRow
from sartor.placement.step import PlacedStep


def save_model(step: PlacedStep, folder: Path) -> None:
    """What `save_pretrained` writes of a whole model: its configuration and `model.safetensors`."""
    step.engine.finish_updates()
    model: Any = step.model
    model.config.dtype = str(model.dtype).partition(".")[2]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tensors = [*model.named_parameters(), *_persistent_buffers(model)]
    with _Rows(step).visited() as rows:
        target = folder / "model.safetensors"
        write_weights(target, tensors, lambda n: rows.weight(tensors[n][1]), metadata={"format": "pt"})


def load_model(step: PlacedStep, folder: Path) -> None:
    """Give the live model the weights of a folder that `save_model` wrote."""
    files, engine = WeightFiles(folder), step.engine
    engine.finish_updates()
    engine.end_forward()
    engine.mover.settle()
    names = {id(tensor): name for name, tensor in [*step.model.named_parameters(), *_persistent_buffers(step.model)]}
    moving = {id(p) for live in engine.moving if live.weights is not None for p in live.row.parameters.values()}
    for tensor in [*step.model.parameters(), *step.model.buffers()]:
        if id(tensor) in names and id(tensor) not in moving:
            files.read(names[id(tensor)], tensor.data)
    for live in engine.moving:
        if live.weights is not None:
            live.weights.hold()
            for parameter in live.row.parameters.values():
                files.read(names[id(parameter)], parameter.data)
            live.weights.store()
            engine.mover.settle()
    step.streamed.rearranged()


def adapter_state(step: PlacedStep) -> dict[str, Tensor]:
    """What trains, by its names in the model: enough for PEFT to save an adapter, without the weights beside it."""
    step.engine.finish_updates()
    return {name: parameter for name, parameter in step.model.named_parameters() if parameter.requires_grad}


def save_optimizer(step: PlacedStep, path: Path) -> None:
    """The optimizer's state by the parameters' names, `name|key`; one tensor after the other."""
    step.engine.finish_updates()
    step.engine.visits.leave()
    step.engine.mover.settle()
    tensors = [
        (f"{name}|{key}", torch.as_tensor(value), parameter)
        for name, parameter in step.parameters.items()
        for key, value in step.optimizer.state[parameter].items()
    ]
    homes = {id(p): live.state for live in step.engine.moving for p in live.trained if live.state is not None}

    def copy_of(value: Tensor, parameter: Tensor) -> Tensor:
        chunk = homes.get(id(parameter))
        away = chunk is not None and value.numel() > 1 and not value.untyped_storage().nbytes()
        return chunk.read_part(value, 0, value.numel()).as_strided(value.shape, value.stride()) if chunk and away else value

    write_weights(path, [(name, like) for name, like, _ in tensors], lambda n: copy_of(*tensors[n][1:]))


def restore_optimizer(step: PlacedStep, path: Path) -> None:
    """Bring the optimizer's state back, one tensor after the other."""
    step.engine.finish_updates()
    files = WeightFiles(path)
    keys: dict[str, list[str]] = {}
    for full in files.names():
        name, _, key = full.rpartition("|")
        keys.setdefault(name, []).append(key)
    names = {id(parameter): name for name, parameter in step.parameters.items()}

    def read(parameter: nn.Parameter, device: torch.device, home: Chunk | None = None) -> None:
        name = names[id(parameter)]
        for key in keys.get(name, ()):
            value = files.empty(f"{name}|{key}")
            files.read(f"{name}|{key}", value)
            if home is not None and value.numel() > 1:
                (place,) = home.reserve([value])
                home.write_part(place, 0, value)
                value = place
            else:
                value = value.to(device)
            step.optimizer.state[parameter][key] = value

    placed = {id(parameter) for live in step.engine.moving for parameter in live.trained}
    for parameter in step.parameters.values():
        if id(parameter) not in placed:
            read(parameter, parameter.device)
    for live in step.engine.moving:
        if live.state is not None:
            live.state.forget()
        for parameter in live.trained:
            read(parameter, torch.device("cpu") if live.on_host else parameter.device, live.state)
        step.streamed.keep_state(live)


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = []
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((f"{path}.{name}" if path else name, buffer))
    return found


class _Rows:
    """One row after the other is brought, as its tensors are asked for."""

    def __init__(self, step: PlacedStep) -> None:
        self._step = step
        self._owner = {id(parameter): live for live in step.engine.moving for parameter in live.row.parameters.values()}
        self._there: LiveRow | None = None
        self._open = contextlib.ExitStack()

    @contextlib.contextmanager
    def visited(self) -> Iterator[_Rows]:
        with self._open:
            yield self

    def weight(self, tensor: Tensor) -> Tensor:
        self._visit(self._owner.get(id(tensor)))
        return tensor

    def _visit(self, live: LiveRow | None) -> None:
        if live is None or live is self._there:
            return
        self._open.close()
        self._there = live
        self._open.enter_context(self._step.engine.gathered(live))
