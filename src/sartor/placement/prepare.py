"""Placement for other people's training loops: `model, optimizer = prepare(model, optimizer, budget=...)`.

The model stays the object it is; hooks bring its rows. The optimizer that comes back streams the rows through the one that was
given. `parameter.grad` of a row that is away is a stand-in that brings the values when it is used (`sartor.placement.gradients`).
"""

from __future__ import annotations

import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sartor.errors import UsageError
from sartor.job.units import format_bytes
from sartor.model.rows import find_rows
from sartor.placement.engine import Engine
from sartor.placement.fill import from_folder
from sartor.placement.live import LiveRow
from sartor.placement.optimizer import StreamedOptimizer
from sartor.placement.slices import can_slice, kept_bytes
from sartor.placement.streams import numbered, where
from sartor.placement.tiers import DiskTier, HostTier, Tier
from sartor.plan.table import Policy, Sizes, Table, uniform, within


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    sample: Any = None,
    policy: Policy = "auto",
    budget: int | None = None,
    lower: str | None = None,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    weights: str | Path | None = None,
    activations: str = "device",
    debug: bool = False,
) -> tuple[nn.Module, PlacedOptimizer]:
    """Place `model` and the state of `optimizer`, and return both for use in any training loop.

    `policy`: `device` (everything stays), `host` or `disk` (everything lives there), `auto`: weights, gradients and optimizer
    state take at most `budget` bytes on the device; what is beyond lives on the tier `lower` (`disk` by default, and `host`
    below an accelerator).
    `device`: what computes, by default where the model is. To an accelerator, a model in main memory goes row by row.
    `sample`: a batch (keyword arguments, positional ones, or a tensor) for one forward pass, which shows the order of use.
    `folder`: where the file of the disk tier is (without a name, gone with the process); default: the folder for temporary files.
    `weights`: a folder of safetensors for a model on the meta device: it is read row by row and never whole in memory.
    `activations`: where those of all rows live, `device`, `host` or `disk`.
    `debug`: print every coming and going.

    Raises UsageError where not even moving everything keeps the budget, ModelError for weights that do not fit the model.
    """
    target = _device(model, optimizer, device)
    lower = lower or ("disk" if target.type == "cpu" else "host")
    rows = find_rows(model)
    state_bytes = kept_bytes(optimizer)
    sizes = [Sizes.of(row, state_bytes=state_bytes, sliced=can_slice(optimizer)) for row in rows]
    rest = _rest(model, sizes, state_bytes)
    table = _table(sizes, policy, budget, lower, activations, rest)
    limit = None if budget is None else max(budget - rest - table.kept_bytes(sizes), 0)
    fill = None if weights is None else from_folder(Path(weights), model)
    tiers = _tiers(table, sizes, folder)
    engine = Engine(model, rows, table, tiers, fill=fill, limit=limit, debug=print if debug else None, device=target)
    if cost := getattr(engine.tiers.get("host"), "cost", ""):
        warnings.warn(cost, stacklevel=2)
    _guard_state(engine)
    placed = PlacedOptimizer(engine, optimizer)
    if sample is not None:
        with torch.no_grad():
            _call(model, sample)
    return model, placed


def _device(model: nn.Module, optimizer: torch.optim.Optimizer, wanted: str | torch.device | None) -> torch.device:
    """What the model will compute on."""
    found = {numbered(parameter.device) for parameter in model.parameters() if not parameter.is_meta}
    target = where(model) if wanted is None else torch.device(wanted)
    if target.type != "cpu" and not torch.accelerator.is_available():
        raise UsageError(f"there is no {target.type} device here", remedy='device="cpu"')
    target = numbered(target)
    if len(found) > 1 or (found and target.type == "cpu" and found != {target}):
        names = ", ".join(sorted(map(str, found)))
        raise UsageError(f"the model is on {names}; it is placed below one device", remedy='model.to("cpu") first')
    if found and found != {target} and optimizer.state:
        raise UsageError(
            f"the optimizer has taken steps on {next(iter(found))}, and the model is to compute on {target}",
            remedy="`prepare` before the first step",
        )
    return target


def _rest(model: nn.Module, sizes: list[Sizes], state_bytes: float) -> int:
    """Bytes of what is in no row, which stays."""
    whole = sum(p.numel() * p.element_size() * (2 if p.requires_grad else 1) for p in model.parameters())
    state = sum(int(p.numel() * state_bytes) for p in model.parameters() if p.requires_grad)
    return max(whole + state - sum(size.total for size in sizes), 0)


def _table(sizes: list[Sizes], policy: Policy, budget: int | None, lower: str, activations: str, rest: int) -> Table:
    choices: dict[str, tuple[str, ...]] = {"lower": ("host", "disk"), "activations": ("device", "host", "disk")}
    for name, value in (("lower", lower), ("activations", activations)):
        if value not in choices[name]:
            raise UsageError(f"`{name}` is {value!r}", remedy=f"one of {', '.join(choices[name])}")
    if policy != "auto":
        return uniform(sizes, policy, activations=activations)  # type: ignore[arg-type]
    if budget is None:
        raise UsageError(
            "policy `auto` needs a budget",
            why="how much memory is left for weights, gradients and optimizer state depends on the rest of your program",
            remedy='budget=8 * 2**30, or policy="host" or "disk"',
        )
    table = within(sizes, budget - rest, lower, activations=activations)  # type: ignore[arg-type]
    if table is None:
        largest = max(sizes, key=lambda size: size.least)
        least = largest.least + rest
        raise UsageError(
            f"weights, gradients and optimizer state do not fit in {format_bytes(budget)}",
            why=f"with everything on the {lower} tier, those of {largest.name} are still together in memory for its update: "
            f"{format_bytes(largest.least)}" + (f", and {format_bytes(rest)} that never go" if rest else ""),
            remedy=f"budget={least} ({format_bytes(least)}) or more",
        )
    return table


def _tiers(table: Table, sizes: list[Sizes], folder: str | Path | None) -> dict[str, Tier]:
    used = {place for row in table.rows for place in (row.weights, row.gradients, row.state, row.activations)}
    tiers: dict[str, Tier] = {}
    if "host" in used:
        tiers["host"] = HostTier()
    if "disk" in used:
        tiers["disk"] = disk = DiskTier(Path(folder or tempfile.gettempdir()))
        disk.require(table.tier_bytes(sizes, "disk"))
    return tiers


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple | list) else model(sample)


def _guard_state(engine: Engine) -> None:
    """State dictionaries hold copies of weights that are away. They are whole in main memory."""
    copies: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def save(live: LiveRow, state: dict[str, Any], prefix: str, module: nn.Module) -> None:
        with engine.gathered(live):
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if prefix + name in state and state[prefix + name].untyped_storage()._cdata == parameter.untyped_storage()._cdata:
                    copy = copies.get(id(parameter))
                    if copy is None:
                        copies[id(parameter)] = copy = parameter.detach().to("cpu", copy=True)
                    state[prefix + name] = copy

    def refuse(*_: Any) -> None:
        raise UsageError("weights cannot be loaded into a model that is placed", remedy="load them before `prepare`")

    for live in engine.moving:
        for module in live.row.modules if live.weights is not None else ():
            engine.on_detach(
                module._register_state_dict_hook(lambda module, state, prefix, _, live=live: save(live, state, prefix, module)),
                module.register_load_state_dict_pre_hook(refuse),
            )


class PlacedOptimizer(torch.optim.Optimizer):
    """The optimizer of a placed model: steps of the one that was given, row by row."""

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        # as accelerate's wrapper: an Optimizer by its type, so that schedulers take it, which has nothing of its own
        self.engine, self.inner = engine, optimizer
        self._streamed = StreamedOptimizer(engine, optimizer)

    if not TYPE_CHECKING:  # attributes of every Optimizer, which are those of the inner one

        @property
        def state(self) -> Any:
            """Tensors of rows that are away are empty; `state_dict` has their values."""
            return self.inner.state

        @property
        def param_groups(self) -> list[dict[str, Any]]:
            return self.inner.param_groups

        @property
        def defaults(self) -> dict[str, Any]:
            return self.inner.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._streamed.step(keep_gradients=True)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise UsageError("parameters cannot be added to a model that is placed", remedy="add them before `prepare`")

    def state_dict(self) -> dict[str, Any]:
        """Whole in memory."""
        return self._streamed.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._streamed.load_state_dict(state_dict)

    def release(self) -> torch.optim.Optimizer:
        """Everything back on the device, and the optimizer that was given. Gradients are let go."""
        self.engine.detach()
        self._streamed.release()
        return self.inner

    def __repr__(self) -> str:
        return f"PlacedOptimizer({self.inner!r})"
