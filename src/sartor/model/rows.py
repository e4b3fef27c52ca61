"""The rows of a model: modules whose weights come and go together, found by its structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sartor.model.blocks import dissect

SMALL = 1 / 64
"""Outside of blocks, what is smaller than this share of the largest row is not worth moving (a final norm)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A block, the embeddings, the head, or what shares weights with another one."""

    name: str
    modules: tuple[nn.Module, ...]
    """Whose calls need the weights."""
    parameters: dict[str, nn.Parameter]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}


def find_rows(model: nn.Module) -> list[Row]:
    """In the order of the model's modules. Parameters that are in no row always stay on the device."""
    units = list(_units(model, _blocks(model)))
    owner: dict[int, int] = {}
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for number, unit in enumerate(units):
        ids = [id(parameter) for parameter in unit[1].parameters()]
        shared = {owner[key] for key in ids if key in owner}
        home = min(shared, default=number)
        groups[home] = [entry for other in sorted({*shared, home}) for entry in groups.pop(other, [])] + [unit]
        for _, module in groups[home]:
            owner.update({id(parameter): home for parameter in module.parameters()})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = [_row(members, names) for _, members in sorted(groups.items())]
    largest = max((_weight(row) for row in rows), default=0)
    blocks = set(_blocks(model))
    return [row for row in rows if row.name in blocks or _weight(row) >= SMALL * largest]


def _row(members: list[tuple[str, nn.Module]], names: dict[int, str]) -> Row:
    parameters = {names[id(parameter)]: parameter for _, module in members for parameter in module.parameters()}
    return Row(name=members[0][0], modules=tuple(module for _, module in members), parameters=parameters)


def _blocks(model: nn.Module) -> list[str]:
    return [path for stack in dissect(model).stacks for path in stack.block_paths()]


def _units(model: nn.Module, blocks: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Blocks, and outside of them the outermost modules that hold parameters themselves and no block."""

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        inside = any(block.startswith(f"{path}.") or not path for block in blocks)
        called = not isinstance(module, nn.ParameterDict | nn.ParameterList)
        own = any(True for _ in module.parameters(recurse=False))
        if path in blocks or (own and path and not inside and called):
            yield path, module
        elif called:
            for name, child in module.named_children():
                yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", model)


def _weight(row: Row) -> int:
    return sum(_bytes(parameter) for parameter in row.parameters.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
