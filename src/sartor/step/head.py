"""The head of a causal model, and what the model does to its logits: found by looking, not by the architecture's name.

`find_head` lets the model's own code run from the last hidden state to the logits, without its layers, and reads the operators
that touch the logits. `hidden_states` runs a forward pass up to the head.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.kernels.loss import Finish
from sartor.model import dissect

_SAME = ("_to_copy", "alias", "clone", "detach", "slice", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")
"""Operators that hand values on as they are."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Head:
    """The linear layer that makes logits, and what becomes of them."""

    module: nn.Linear
    finish: Finish


class Unreadable(Exception):
    """This model's head cannot be computed apart from it. Says why."""


def find_head(model: nn.Module) -> Head:
    """The head of `model`, which may be wrapped by PEFT, and live on the meta device. Raises Unreadable."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    anatomy = dissect(base)
    owner = None if anatomy.main_stack is None else anatomy.main_stack.path.rpartition(".")[0]
    if anatomy.head is None or not owner:
        raise Unreadable(f"{type(base).__name__} has no layers within a module of their own, and a head beside it")
    head, decoder = base.get_submodule(anatomy.head), base.get_submodule(owner)
    if type(head) is not nn.Linear:
        raise Unreadable(f"its head is no plain linear layer, but {type(head).__module__}.{type(head).__name__}")
    if isinstance(head.weight, DTensor):
        raise Unreadable("its head is spread over devices")
    try:
        return Head(module=head, finish=_read_finish(base, decoder, head))
    except Unreadable:
        raise
    except Exception as error:  # whatever a foreign model's code raises without its layers
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Unreadable(f"its code cannot be run from the last layer on ({why})") from error


def last_block(model: nn.Module) -> nn.Module | None:
    """The last block of a model in which nothing comes between it and the head but a norm, as of the blocks, of each position by
    itself. None where that is not known."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    stack = dissect(base).main_stack
    owner, _, name = ("", "", "") if stack is None else stack.path.rpartition(".")
    decoder: Any = base.get_submodule(owner)
    blocks = list(getattr(decoder, name, ()))
    norm, known = getattr(decoder, "norm", None), getattr(blocks[-1] if blocks else None, "post_attention_layernorm", None)
    if norm is None or type(norm) is not type(known) or not _ends_with_norm(type(decoder).forward, name):
        return None
    last: nn.Module = blocks[-1]
    return last


@functools.cache
def _ends_with_norm(forward: Any, blocks: str) -> bool:
    """Whether the code ends with a loop over its blocks, `hidden = self.norm(hidden)`, and an answer with that at one place."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.body) < 3:
        return False
    loop, norm, answer = function.body[-3:]
    if not (isinstance(loop, ast.For) and f"self.{blocks}" in ast.unparse(loop.iter) and isinstance(answer, ast.Return)):
        return False
    returned = [node for node in ast.walk(answer) if isinstance(node, ast.Name) and node.id == "hidden_states"]
    called = isinstance(answer.value, ast.Call) and any(
        keyword.arg == "last_hidden_state" and ast.unparse(keyword.value) == "hidden_states" for keyword in answer.value.keywords
    )
    return ast.unparse(norm) == "hidden_states = self.norm(hidden_states)" and called and len(returned) == 1


class _Answer(tuple[Tensor]):
    """What a decoder returns: hidden states first, by name as well; everything else is None."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


@torch.no_grad()
def _read_finish(base: nn.Module, decoder: nn.Module, head: nn.Linear) -> Finish:
    """Runs the model with a decoder that answers at once, and reads what is done to the logits. Raises Unreadable."""
    weight_VH = head.weight
    hidden_1TH = torch.linspace(-1, 1, 2 * head.in_features, dtype=weight_VH.dtype, device=weight_VH.device)
    hidden_1TH = hidden_1TH.view(1, 2, head.in_features)
    watch = _Watch(head.out_features)
    hook = head.register_forward_hook(lambda _, inputs, output: watch.begin(inputs[0], output))
    ids_RT = torch.zeros(1, 2, dtype=torch.int64, device=weight_VH.device)
    try:
        with _instead(decoder, lambda *_, **__: _Answer((hidden_1TH,))), watch:
            logits_1TV = base(input_ids=ids_RT).logits
    finally:
        hook.remove()
    finish = watch.finish(logits_1TV)
    if watch.given is not None and not (weight_VH.is_meta or isinstance(weight_VH, FakeTensor)):
        _verify(finish, F.linear(watch.given, weight_VH, head.bias), logits_1TV)
    return finish


@contextlib.contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes something else."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Watch(TorchDispatchMode):
    """Follows the logits from the head to the end."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        self.given: Tensor | None = None
        self._current: Tensor | None = None
        self._steps: list[tuple[str, float]] = []

    def begin(self, hidden: Tensor, logits: Tensor) -> None:
        self.given, self._current = hidden, logits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._current is None or not any(_shares(arg, self._current) for arg in (*args, *(kwargs or {}).values())):
            return result
        name = func.overloadpacket.__name__.removesuffix("_")
        number = args[1] if name in ("mul", "div") and len(args) > 1 else 1.0
        whole = isinstance(result, Tensor) and result.shape[-1:] == (self._vocabulary,)
        if not whole or not isinstance(number, int | float) or name not in (*_SAME, "mul", "div", "tanh"):
            raise Unreadable(f"{name} is done to its logits")
        if name not in _SAME:
            self._steps.append((name, float(number)))
        self._current = result
        return result

    def finish(self, logits: Tensor) -> Finish:
        """What was seen, in two numbers. Raises Unreadable."""
        if self._current is None or not _shares(logits, self._current):
            raise Unreadable("its logits are not what its head gives")
        scale, cap = 1.0, None
        for name, number in self._steps:
            if name == "tanh" and cap is None:
                cap = 1.0
            elif name == "tanh":
                raise Unreadable("its logits are capped twice")
            else:
                change = number if name == "mul" else 1 / number
                scale, cap = (scale * change, None) if cap is None else (scale, cap * change)
        return Finish(scale=scale) if cap is None else Finish(scale=scale * cap, cap=cap)


def _shares(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _verify(finish: Finish, logits: Tensor, wanted: Tensor) -> None:
    """Raises Unreadable where the head's logits do not become the model's."""
    made = logits.float() * finish.scale
    if finish.cap:
        made = finish.cap * torch.tanh(made / finish.cap)
    difference = float((made - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-6))
    if difference > _TOLERANCE.get(logits.dtype, 3e-2):
        raise Unreadable(f"its logits differ by {difference:.1%} from what was read in its code")


class _AtHead(Exception):
    """The head was called."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def hidden_states(model: nn.Module, head: nn.Linear, inputs: dict[str, Any]) -> Tensor:
    """What `model` gives its head for these inputs."""

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        raise _AtHead(given[0])

    hook = head.register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _AtHead as arrived:
        return arrived.hidden
    finally:
        hook.remove()
    raise RuntimeError("the model did not call its head")
