"""Find where a model repeats itself, and leave out the middle: what holds for block 3 holds for block 30.

Layers of a stack become units of one period (one layer, or six where every sixth attends to everything); a region is a row of
equal units. Of a region with more than `KEPT` units the first three and the last two stay (of a sketch, two and one). Which are
alike is read from the modules themselves: classes, shapes, and every plain number, flag and name they carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sartor.model.blocks import dissect

KEPT = 5
EDGE = 2
"""Kept units on either side of the one that stands for those left out: neither it nor its neighbours touch an end."""

LONGEST_PERIOD = 12
_OWN_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "training")
_NOT_ITS = {*_OWN_NAMES, *vars(nn.Module())}
"""Of a layer's attributes, those that tell its place, and those that every module has."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A row of `count` equal units, of which some are there; their tags are `first_tag` and the next ones."""

    first_tag: int
    count: int
    edge: int = EDGE

    @property
    def kept(self) -> int:
        return 2 * self.edge + 1

    @property
    def template(self) -> int:
        """The tag of the unit that stands for those left out."""
        return self.first_tag + self.edge

    @property
    def copies(self) -> int:
        """How many units the template stands for, itself included."""
        return self.count - self.kept + 1

    def holds(self, tag: int) -> bool:
        return self.first_tag <= tag < self.first_tag + self.kept

    def number(self, tag: int) -> int:
        """Place in the whole region of a kept unit; for the template, of the first unit it stands for."""
        place = tag - self.first_tag
        return place if place <= self.edge else self.count - self.kept + place


@dataclass(kw_only=True)
class Reduction:
    """What was kept. Modules are the model's own objects, so wrapping them in adapters or shards does not matter."""

    regions: list[Region] = field(default_factory=list)
    units: dict[int, list[nn.Module]] = field(default_factory=dict)
    """Tag → layers of the unit, in order."""
    singles: list[nn.Module] = field(default_factory=list)
    """Layers that belong to no region."""
    pattern: tuple[Any, ...] = ()
    """What is kept, in order: reductions of one model with the same pattern differ in how often units are repeated only."""

    def numbers(self) -> dict[int, int]:
        """Tag → place of the unit among those of the whole model; of a repeated one, of the first that it stands for."""
        found, place = {}, 0
        for tag in sorted(self.units):
            found[tag] = place
            place += self.times(tag)
        return found

    def blocks(self) -> list[int]:
        """How many layers each unit of the whole model has."""
        return [len(self.units[tag]) for tag in sorted(self.units) for _ in range(self.times(tag))]

    def times(self, tag: int) -> int:
        """How many units of the whole model a kept one stands for."""
        region = next((region for region in self.regions if region.holds(tag)), None)
        return region.copies if region is not None and tag == region.template else 1

    def continues(self, tag: int) -> bool:
        """Whether another unit of the same region follows."""
        return any(region.holds(tag) and region.holds(tag + 1) for region in self.regions)

    def tags(self) -> dict[int, int]:
        """id(module) → tag, for every module inside a unit."""
        return {id(module): tag for tag, layers in self.units.items() for layer in layers for module in layer.modules()}

    def count_parameters(self, model: nn.Module, *, trained: bool) -> int:
        """Parameters of the whole model that the reduced `model` stands for."""
        tags, seen, total = self.tags(), set[int](), 0
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in seen and (parameter.requires_grad or not trained):
                    seen.add(id(parameter))
                    total += parameter.numel() * self.times(tags.get(id(module), -1))
        return total


def reduce_depth(model: nn.Module, *, edge: int = EDGE, singles: bool = False) -> Reduction:
    """Remove repeated layers from `model` (on the meta device), in place; its configuration follows. Without neighbours on both
    sides of the unit that stands for the others (`edge` 1) a trace cannot tell whether it may. `singles`: layers that belong to
    no region are units as well, of one layer each."""
    reduction = Reduction()
    for stack in dissect(model).stacks:
        layers = model.get_submodule(stack.path)
        assert isinstance(layers, nn.ModuleList | nn.Sequential)
        owner = model.get_submodule(stack.path.rpartition(".")[0])
        _reduce_stack(reduction, layers, getattr(owner, "config", None), edge, singles)
    return reduction


def every_layer(model: nn.Module) -> Reduction:
    """Nothing is left out, and each layer is a unit."""
    layers = [layer for stack in dissect(model).stacks for layer in model.get_submodule(stack.path).children()]
    return Reduction(units={tag: [layer] for tag, layer in enumerate(layers)})


def _reduce_stack(reduction: Reduction, layers: nn.ModuleList | nn.Sequential, config: Any, edge: int, singles: bool) -> None:
    members, lists = list(layers), _per_layer(config, len(layers))
    signatures = [(signature(layer), *(str(values[at]) for values in lists.values())) for at, layer in enumerate(members)]
    kept: list[int] = []
    for start, period, count in find_regions(signatures if not _share_parameters(members) else list(range(len(members)))):
        if count <= KEPT:
            span = range(start, start + period * count)
            if singles:
                reduction.units |= {len(reduction.units) + place: [members[at]] for place, at in enumerate(span)}
            else:
                reduction.singles += [members[at] for at in span]
            reduction.pattern += tuple(signatures[at] for at in span)
            kept += span
            continue
        reduction.pattern += (("repeated", edge, *signatures[start : start + period]),)
        first_tag = len(reduction.units)
        reduction.regions.append(Region(first_tag=first_tag, count=count, edge=edge))
        for place, unit in enumerate([*range(edge + 1), *range(count - edge, count)]):
            span = range(start + unit * period, start + (unit + 1) * period)
            reduction.units[first_tag + place] = [members[at] for at in span]
            kept += span
    if len(kept) < len(members):
        keep_layers(layers, config, kept)


def keep_layers(layers: nn.ModuleList | nn.Sequential, config: Any, kept: Sequence[int]) -> None:
    """Remove all other layers, in place. Those kept are numbered anew; the configuration's lists and count follow."""
    count, lists = len(layers), _per_layer(config, len(layers))
    for at in reversed(range(count)):
        if at not in set(kept):
            del layers[at]
    for at, layer in enumerate(layers):
        _renumber(layer, kept[at], at)
    for name, values in lists.items():
        setattr(config, name, type(values)(values[at] for at in kept))
    if config is not None and getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = len(kept)


def find_regions(signatures: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Cut a row of signatures into (start, period, count); what repeats too seldom comes as single layers (period 1, count 1).

    At each place the period that covers most is taken, the shorter one on ties.
    """
    found: list[tuple[int, int, int]] = []
    start, total = 0, len(signatures)
    while start < total:
        best = (1, 1)
        for period in range(1, min(LONGEST_PERIOD, total - start) + 1):
            unit, count = signatures[start : start + period], 1
            while signatures[start + count * period : start + (count + 1) * period] == unit:
                count += 1
            if count > KEPT and period * count > best[0] * best[1]:
                best = (period, count)
        found.append((start, *best))
        start += best[0] * best[1]
    return found


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """Everything about a layer but its place."""
    parts: list[Any] = []
    for path, module in layer.named_modules():
        plain = (
            (name, value)
            for name, value in vars(module).items()
            if name not in _NOT_ITS and isinstance(value, int | float | bool | str | None)
        )
        held = ((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in module.named_parameters(recurse=False))
        parts.append((path, type(module).__qualname__, tuple(plain), tuple(held)))
    return tuple(parts)


def _per_layer(config: Any, count: int) -> dict[str, Any]:
    """Lists of a configuration that have one entry a layer."""
    if config is None:
        return {}
    return {name: value for name, value in vars(config).items() if isinstance(value, list | tuple) and len(value) == count}


def _share_parameters(members: list[nn.Module]) -> bool:
    counted = sum(1 for layer in members for _ in layer.parameters())
    return counted != len({id(parameter) for layer in members for parameter in layer.parameters()})


def _renumber(layer: nn.Module, before: int, now: int) -> None:
    for module in layer.modules():
        for name in _OWN_NAMES[:-1]:
            if vars(module).get(name) == before:
                setattr(module, name, now)
