"""Checkpoints: the files everybody loads, and beside them in `state/` what an exact resumption needs. No pickles.

    checkpoint-N/   model.safetensors or adapter_model.safetensors, their configuration, tokenizer, chat template
      state/        optimizer.safetensors, trained.safetensors (adapters), random.safetensors, progress.json
      manifest.json size and SHA-256 of every file, written last

A checkpoint is written under another name, brought to the disk and then renamed: it is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sartor.errors import RunError, UsageError
from sartor.model.build import quiet
from sartor.placement import PlacedStep
from sartor.placement.save import adapter_state, restore_optimizer, save_model, save_optimizer
from sartor.step import TrainStep
from sartor.train import folder as files

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after `step` steps."""

    step: int
    seconds: float
    tokens: int
    trained_tokens: int
    identity: str
    """Fingerprint of all that must not change between stopping and resuming."""
    best_loss: float | None = None
    best_step: int | None = None
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The live objects that a checkpoint stores and restores."""

    step: TrainStep
    tokenizer: Any
    adapter: bool


def save(folder: Path, state: TrainState, progress: Progress) -> Path:
    """Write `checkpoint-N` and point LATEST at it. Raises RunError; then nothing of it is left, and older ones are intact."""
    target = folder / f"checkpoint-{progress.step}"
    partial = folder / f".checkpoint-{progress.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with files.explained(target):
            _write(partial, state, progress)
            files.sync(partial)
            if target.exists():
                files.remove(target)
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files.write_text(folder / "LATEST", target.name + "\n")
    return target


def _write(partial: Path, state: TrainState, progress: Progress) -> None:
    (partial / "state").mkdir(parents=True)
    with quiet():
        _write_model(partial, state)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    state.tokenizer.save_pretrained(partial)
    if state.adapter:
        save_file(
            {name: _plain(parameter) for name, parameter in state.step.parameters.items()}, partial / "state/trained.safetensors"
        )
    if isinstance(state.step, PlacedStep):
        save_optimizer(state.step, partial / "state/optimizer.safetensors")
    else:
        save_file(_optimizer_tensors(state), partial / "state/optimizer.safetensors")
    save_file(_random_state(), partial / "state/random.safetensors")
    (partial / "state/progress.json").write_text(json.dumps(dataclasses.asdict(progress), indent=1), encoding="utf-8")
    manifest = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write_model(partial: Path, state: TrainState) -> None:
    """Of a placed model row by row, else as `save_pretrained` does it."""
    step: Any = state.step
    if not isinstance(step, PlacedStep):
        step.model.save_pretrained(partial)
    elif state.adapter:
        step.model.save_pretrained(partial, state_dict=adapter_state(step))  # type: ignore[operator]
    else:
        save_model(step, partial)


def find(folder: Path, wanted: str | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the one named, else the latest that is intact; damaged ones are named through `say`.

    None where the run stopped before its first checkpoint. Raises UsageError or RunError.
    """
    if wanted is not None:
        path = Path(wanted) if Path(wanted).is_dir() else folder / wanted
        if not path.is_dir():
            there = ", ".join(path.name for path in files.checkpoints(folder)) or "none"
            raise UsageError(f"no checkpoint {wanted} in {folder}", remedy=f"there are: {there}")
        if damage := check(path):
            raise RunError(f"{path} is damaged", why=damage, remedy="--resume without a name takes the latest that is intact")
        return path
    damaged = []
    for path in reversed(files.checkpoints(folder)):
        damage = check(path)
        if not damage:
            return path
        damaged.append(f"{path.name}: {damage}")
        say(f"{path.name} is damaged ({damage}); looking for an older one")
    if damaged:
        raise RunError(f"no checkpoint in {folder} is intact", why="; ".join(damaged), remedy="start again with another `output`")
    return None


def check(path: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} of {entry['bytes']} bytes"
        if _digest(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def read_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "state/progress.json").read_text(encoding="utf-8")))


def restore(path: Path, state: TrainState) -> None:
    """Bring adapters, optimizer and random generators back; full models are loaded from `path` as any model is."""
    if state.adapter:
        restore_adapter(path, state.step.parameters)
    if isinstance(state.step, PlacedStep):
        restore_optimizer(state.step, path / "state/optimizer.safetensors")
    else:
        _restore_optimizer(load_file(path / "state/optimizer.safetensors"), state)
    _restore_random(load_file(path / "state/random.safetensors"))


def restore_adapter(path: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Bring the trained parameters of an adapter back, bit for bit (PEFT's own file may hold what it computes from them)."""
    trained = load_file(path / "state/trained.safetensors")
    if trained.keys() != parameters.keys():
        raise RunError(f"{path} holds another adapter than this job makes", remedy="resume with the job it was made with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])


def publish(checkpoint: Path, folder: Path) -> None:
    """Make the run's folder itself loadable: the checkpoint's model files, linked."""
    with files.explained(folder):
        for path in checkpoint.iterdir():
            if path.is_file() and path.name != MANIFEST:
                files.link_or_copy(path, folder / path.name)


def prune(folder: Path, *, keep_last: int, keep: set[int]) -> None:
    """Remove all but the last `keep_last` checkpoints and the steps in `keep`."""
    for path in files.checkpoints(folder)[:-keep_last]:
        if int(path.name.removeprefix("checkpoint-")) not in keep:
            files.remove(path)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().cpu()


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in state.step.parameters.items():
        for key, value in state.step.state_of(parameter).items():
            tensors[f"{name}|{key}"] = _plain(value)
    return tensors


def _restore_optimizer(tensors: dict[str, Tensor], state: TrainState) -> None:
    for key, value in tensors.items():
        name, _, entry = key.rpartition("|")
        state.step.put_state(state.step.parameters[name], entry, value)


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        states |= {f"device-{index}": value for index, value in enumerate(module.get_rng_state_all())}
    return states


def _restore_random(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    if torch.accelerator.is_available() and len(states) == torch.accelerator.device_count():
        torch.get_device_module().set_rng_state_all([states[f"device-{index}"] for index in range(len(states))])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
