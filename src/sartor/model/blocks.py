"""Find a model's repeated blocks, embeddings and head by its structure, whatever the architecture is called."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

KEEPS = "keeps_activations"
"""Attribute of a block whose activations are kept where other blocks recompute theirs."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of repeated blocks, e.g. `model.layers`."""

    path: str
    count: int
    kinds: tuple[str, ...]
    """Class names of its blocks, each once, in order of appearance."""
    parameters: int

    def block_paths(self) -> list[str]:
        return [f"{self.path}.{index}" for index in range(self.count)]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of a model that planning cares about, as module paths."""

    stacks: tuple[Stack, ...]
    embeddings: str | None
    head: str | None
    parameters: int
    tied: bool
    """Whether the head shares the embeddings' weight."""

    @property
    def main_stack(self) -> Stack | None:
        """The stack that holds most parameters."""
        return max(self.stacks, key=lambda stack: stack.parameters, default=None)


def dissect(model: nn.Module) -> Anatomy:
    """Blocks, embeddings and head of `model` (on any device, meta included)."""
    return Anatomy(
        stacks=tuple(_stacks(model)),
        embeddings=_path_of(model, _call(model, "get_input_embeddings")),
        head=_path_of(model, _call(model, "get_output_embeddings")),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied=_is_tied(model),
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the main stack, in the order of the forward pass."""
    stack = max(_stacks(model), key=lambda stack: stack.parameters, default=None)
    return [] if stack is None else list(model.get_submodule(stack.path).children())


def choosable_blocks(model: nn.Module) -> int:
    """How many blocks there are, where each can recompute by itself; else none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = blocks_of(model)
    return len(blocks) if all(isinstance(block, GradientCheckpointingLayer) for block in blocks) else 0


def choose_recomputed(model: nn.Module, recomputed: int | None) -> None:
    """Let only the first so many blocks recompute, where recomputation is switched on; None: all.

    The others are the last ones: backward passes free their activations before the first block is recomputed.
    """
    for place, block in enumerate(blocks_of(model)):
        vars(block).pop(KEEPS, None)
        if recomputed is not None and place >= recomputed:
            setattr(block, KEEPS, True)


def _stacks(model: nn.Module) -> list[Stack]:
    """The outermost module lists whose members look alike and hold parameters; lists inside a block (experts) are its own."""
    stacks: list[Stack] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
            continue
        if any(path.startswith(f"{stack.path}.") for stack in stacks):
            continue
        children = list(module.children())
        parameters = sum(parameter.numel() for parameter in module.parameters())
        if parameters == 0 or not _alike(children):
            continue
        kinds = tuple(dict.fromkeys(type(child).__name__ for child in children))
        stacks.append(Stack(path=path, count=len(children), kinds=kinds, parameters=parameters))
    return stacks


def _alike(children: list[nn.Module]) -> bool:
    """Blocks are composite, and of one class or of few that alternate (hybrid models)."""
    kinds = {type(child) for child in children}
    composite = all(any(True for _ in child.children()) for child in children)
    return composite and (len(kinds) == 1 or len(kinds) <= len(children) // 2)


def _call(model: nn.Module, name: str) -> nn.Module | None:
    try:
        result = getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return result if isinstance(result, nn.Module) else None


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None) if wanted is not None else None


def _is_tied(model: nn.Module) -> bool:
    embeddings, head = _call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")
    if embeddings is None or head is None:
        return False
    weight = getattr(embeddings, "weight", None)
    return weight is not None and weight is getattr(head, "weight", None)
