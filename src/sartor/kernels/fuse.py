"""Put the compiled loops of `fused.py` into a model: modules whose code is known, line by line, compute the same in fewer passes.

A module takes part if the source of its `forward` is one of those below, names of classes and what it says in annotations and
docstrings apart. transformers repeats them in most decoders; a model that computes anything else is left as it is.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sartor.kernels import linear, lora
from sartor.kernels.fused import rms_norm, rotary, silu_mul, suited
from sartor.kernels.linear import linear_of
from sartor.kernels.lora import lora_of
from sartor.kernels.mlp import Norm, mlp
from sartor.kernels.native import library

_NORM = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""
_OFFSET_NORM = """
def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
"""
_OFFSET_NORM_PART = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
"""
_MLP = """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
"""
_BLOCK = """
def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
            position_embeddings=None, **kwargs):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states
"""
_ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_ROTARY = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
_ROTARY_NAME = "apply_rotary_pos_emb"


def fuse(model: nn.Module) -> dict[str, int]:
    """Let the modules of `model` that are known use the compiled loops; how many of which part do. None without a
    compiler, and where devices share the weights."""
    if library() is None or _distributed(model):
        return {}
    found: Counter[str] = Counter()
    for module in model.modules():
        for part, forward_of in _PARTS.items():
            forward = forward_of(module)
            if forward is not None:
                module.forward = forward
                found[part] += 1
    for module in model.modules():
        if _takes_one_input(module):
            _Siblings(module)
        if _is_block(module):
            module.forward = types.MethodType(_block_forward(type(module).forward), module)
    return dict(found)


def unfuse(model: nn.Module) -> None:
    """The modules' own code again, as others will run it: equal to a bit with what they load."""
    for module in model.modules():
        if any(of(module) is not None for of in _PARTS.values()) or _takes_one_input(module) or _is_block(module):
            vars(module).pop("forward", None)


@contextlib.contextmanager
def as_jobs_run(model: Any, tokens: int) -> Iterator[bool]:
    """Within it `model` computes single rows of so many tokens as a job on this CPU does; whether that is other than its own
    code."""
    from sartor.kernels.attention import NAME, register, segments_are
    from sartor.kernels.segments import Segments

    register()
    model.set_attn_implementation(NAME)
    compiled = bool(fuse(model))
    with segments_are(Segments([[tokens]], tokens)):
        yield compiled
    unfuse(model)


def _distributed(model: nn.Module) -> bool:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and any(isinstance(parameter, loaded.DTensor) for parameter in model.parameters())


def _norm_of(module: Any) -> Callable[..., Tensor] | None:
    kind = type(module)
    if _is(kind.forward, _NORM):
        return functools.partial(_run_norm, module, module.variance_epsilon, 0.0)
    if _is(kind.forward, _OFFSET_NORM) and _is(getattr(kind, "_norm", None), _OFFSET_NORM_PART):
        return functools.partial(_run_norm, module, module.eps, 1.0)
    return None


def _run_norm(module: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    if suited(x, module.weight):
        return rms_norm(x, module.weight, epsilon=epsilon, offset=offset)
    usual: Tensor = type(module).forward(module, x)
    return usual


def _mlp_of(module: Any) -> Callable[..., Tensor] | None:
    if not _is(type(module).forward, _MLP) or not isinstance(module.act_fn, nn.SiLU | _silu()):
        return None
    return functools.partial(_run_mlp, module)


def _run_mlp(module: Any, x: Tensor, before: Any = None) -> Tensor:
    """`before`: the norm of the block's half, which is added to its input."""
    layers = module.gate_proj, module.up_proj, module.down_proj
    forwards = [vars(layer).get("forward") for layer in layers]
    of, ready = _ready(layers, forwards, x)
    if before is not None:
        known = vars(before).get("forward")
        ours = getattr(known, "func", None) is _run_norm and not _hooks(before) and suited(x, before.weight)
        if of is not None and ours and of.may_wait(ready, math.prod(x.shape[:-1])):
            return mlp(x, of, ready, Norm(before.weight, *known.args[1:]))
        return x + _run_mlp(module, before(x))
    if of is not None:
        return mlp(x, of, ready)
    gate, up = _together(layers[:2], forwards[:2], x) or (layer(x) for layer in layers[:2])
    inner = silu_mul(gate, up) if suited(gate, up) else module.act_fn(gate) * up
    result: Tensor = module.down_proj(inner)
    return result


def _is_block(module: Any) -> bool:
    """Whether it is a decoder's block with a norm and an MLP that are known."""
    if not _is(type(module).forward, _BLOCK) or _block_forward(type(module).forward) is None:
        return False
    return _norm_of(module.post_attention_layernorm) is not None and _mlp_of(module.mlp) is not None


@functools.cache
def _block_forward(usual: Any) -> Any:
    """`_run_block`, within what transformers puts around a block's forward to recompute it; None where that is not known."""
    if not hasattr(usual, "__wrapped__"):
        return _run_block
    names = usual.__code__.co_freevars
    if "forward" not in names:
        return None
    cells = zip(names, usual.__closure__, strict=True)
    closure = tuple(types.CellType(_run_block) if name == "forward" else cell for name, cell in cells)
    return types.FunctionType(usual.__code__, usual.__globals__, usual.__name__, usual.__defaults__, closure)


def _run_block(module: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
    """As `_BLOCK` does it, the second half as one function, of the positions that are wanted."""
    ours = getattr(vars(module.mlp).get("forward"), "func", None) is _run_mlp
    if args or not ours or _hooks(module.mlp):
        usual: Tensor = inspect.unwrap(type(module).forward)(module, hidden_states, *args, **named)
        return usual
    named = {"past_key_values": None, "use_cache": False, "position_embeddings": None, **named}
    named = {"attention_mask": None, "position_ids": None, **named}
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **named)
    hidden_states = hidden_states + attended
    wanted = getattr(named["attention_mask"], "wanted", None)
    if wanted is not None and wanted.block is module:
        hidden_states = wanted.of(hidden_states)
    result: Tensor = module.mlp(hidden_states, module.post_attention_layernorm)
    return result


def _silu() -> type[nn.Module]:
    from transformers.activations import SiLUActivation

    kind: type[nn.Module] = SiLUActivation
    return kind


def _attention_of(module: nn.Module) -> Callable[..., Any] | None:
    forward = _with_rotary(type(module).forward)
    return None if forward is None else types.MethodType(forward, module)


@functools.cache
def _with_rotary(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """`forward` with the name `apply_rotary_pos_emb` bound to ours; None where it means something else."""
    if not isinstance(forward, types.FunctionType) or _ROTARY_NAME not in forward.__code__.co_names:
        return None
    names = forward.__globals__
    usual: Any = names.get(_ROTARY_NAME)
    if not _is(usual, _ROTARY) or not _is(usual.__globals__.get("rotate_half"), _ROTATE_HALF):
        return None

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        alike = cos.ndim == 3 and cos.shape[-1] == q.shape[-1] and cos.shape[-1] % 2 == 0 and cos.shape == sin.shape
        if unsqueeze_dim == 1 and alike and len(cos) in (1, len(q)) and suited(q, k, cos, sin):
            return rotary(q, k, cos, sin)
        turned: tuple[Tensor, Tensor] = usual(q, k, cos, sin, unsqueeze_dim)
        return turned

    bound = types.FunctionType(
        forward.__code__, {**names, _ROTARY_NAME: ours}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    bound.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(bound, forward)


_SIBLINGS = "q_proj", "k_proj", "v_proj"


def _takes_one_input(module: nn.Module) -> bool:
    """Whether the layers of an attention's queries, keys and values are ours and are called with the same, one by one."""
    layers = [getattr(module, name, None) for name in _SIBLINGS]
    ours = any(all(layer is not None and of(layer) is not None for layer in layers) for of in (lora_of, linear_of))
    return ours and _calls_alike(type(module).forward)


@functools.cache
def _calls_alike(forward: Callable[..., Any]) -> bool:
    try:
        tree = ast.parse(_source(forward))
    except (SyntaxError, ValueError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _sibling(node.func)]
    names, written = (
        {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
        for kind in (ast.Load, ast.Store)
    )
    given = {ast.unparse(call).partition("(")[2].removesuffix(")") for call in calls}
    alike = len(given) == 1 and given <= names - written
    return alike and sorted(_sibling(call.func) for call in calls) == sorted(_SIBLINGS)


def _sibling(function: ast.expr) -> str:
    """The name of a layer that is called as `self.name`."""
    own = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self"
    return function.attr if own and function.attr in _SIBLINGS else ""  # type: ignore[attr-defined]


def _together(modules: Sequence[Any], forwards: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
    """What layers with adapters, or without, make of `x`, in one function; None where it cannot be. `forwards`: theirs."""
    of, layers = _ready(modules, forwards, x)
    result: tuple[Tensor, ...] | None = None if of is None else of.linears(x, layers)
    return result


def _ready(modules: Sequence[Any], forwards: Sequence[Any], x: Tensor) -> tuple[Any, list[Any]]:
    """Where the functions of these layers are, if they may be computed as one, and the layers."""
    first = getattr(forwards[0], "func", None)
    of = None if any(map(_hooks, modules)) else _LINEARS.get(first)
    if of is None or any(getattr(forward, "func", None) is not first for forward in forwards):
        return None, []
    layers = [layer for forward in forwards if (layer := of.ready(*forward.args, x)) is not None]
    return (of, layers) if len(layers) == len(forwards) else (None, [])


_LINEARS: dict[Any, Any] = {lora.run: lora, linear.run: linear}
"""Forwards of layers, and where they are: what makes a layer ready for an input, and the function of several."""


def _hooks(module: nn.Module) -> bool:
    """Whether somebody wants this module to be called."""
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(not getattr(hook, _WATCHES, False) for kind in kinds for hook in kind.values())


_WATCHES = "only_watches"


def watching(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that only notes when its module is called, and may miss calls that several modules are computed in."""
    setattr(hook, _WATCHES, True)
    return hook


class _Siblings:
    """Layers that an attention calls one after the other with the same input: the first call computes all."""

    def __init__(self, attention: Any) -> None:
        self.layers = [getattr(attention, name) for name in _SIBLINGS]
        self.forwards = [layer.forward for layer in self.layers]
        self.given: Tensor | None = None
        self.made: dict[int, Tensor] = {}
        attention.forward = functools.partial(self._attend, attention.forward)
        for number, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._layer, number)

    def _attend(self, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return forward(*args, **named)
        finally:  # nothing is kept of a pass that failed
            self.given, self.made = None, {}

    def _layer(self, number: int, x: Tensor, *args: Any, **named: Any) -> Tensor:
        if self.given is not x and not args and not named:
            self.given, self.made = x, dict(enumerate(_together(self.layers, self.forwards, x) or ()))
        if self.given is x and number in self.made and not args and not named:
            return self.made.pop(number)
        usual: Tensor = self.forwards[number](x, *args, **named)
        return usual


_PARTS: dict[str, Callable[[Any], Callable[..., Any] | None]] = {
    "norms": _norm_of,
    "gates": _mlp_of,
    "rotary positions": _attention_of,
    "adapters": lora_of,
    "linear layers": linear_of,
}


def _is(function: Any, known: str) -> bool:
    return isinstance(function, types.FunctionType) and _computes(_source(function)) == _computes(known)


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # there is none
        return ""


@functools.cache
def _computes(source: str) -> str:
    """What a function computes: its syntax tree without name, decorators, annotations and docstring."""
    try:
        tree = ast.parse(source).body[0]
    except (SyntaxError, ValueError, IndexError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    names = [argument.arg for argument in tree.args.args]
    return "\n".join([*names, *map(ast.dump, tree.args.defaults), *map(ast.dump, body)])
