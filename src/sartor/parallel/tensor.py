"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): a transformers model's own plan, applied with PyTorch's DTensor.

Every parameter becomes a DTensor: split where the plan says so, else replicated, because optimizers and clipping cannot mix
DTensors with plain ones. Embedding and head are split over the vocabulary, the logits are whole on every rank. LoRA's matrices
beside a layer are split as it is, where they touch what is split of it. Of experts every rank has a part of each.

With sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198) the residual stream is a DTensor split over the tokens: it
knows its whole length, so positions and masks are those of the whole row, and rows of any length do. Blocks gather it on the way
into attention and MLP, and scatter what comes out.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import Placement, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from sartor.errors import JobError
from sartor.model import dissect
from sartor.parallel.layout import Layout
from sartor.parallel.styles import (
    COLWISE,
    EXPERTS,
    KNOWN,
    NORM_OF_HEADS,
    ROWWISE,
    TOKENS,
    Alike,
    GatherTokens,
    Whole,
    adapter_styles,
    settle,
    style_of,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_WITHOUT = "strategy.tensor=1, and strategy.shard for more devices"
_BASE = ".base_layer"
"""Where PEFT puts the layer that an adapter is beside."""
_INSIDE_ADAPTER = re.compile(r"\.lora_\w+\.")
_WEIGHTS_OF_EXPERTS = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"}


def check_split(model: nn.Module, layout: Layout) -> None:
    """Raises JobError where `split` would, before there is a mesh."""
    model = _without_adapters(model)
    plan = _read_plan(model)
    _check_sizes(model, plan, layout)
    _styles(model, plan, layout)


def split(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """`model` (on the meta device, or the same weights on every rank), split over the mesh's `tensor` dimension, in place.

    It may be a pipeline stage's part of a model. Raises JobError for what is not supported.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    given, model = model, _without_adapters(model)
    plan = _read_plan(model)
    _check_sizes(model, plan, layout)
    anatomy = dissect(model)
    for path, style in _styles(model, plan, layout).items():
        module = model.get_submodule(path)
        trains = {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)}
        parallelize_module(module, mesh["tensor"], style, src_data_rank=None)
        for name, trained in trains.items():
            module.get_parameter(name).requires_grad_(trained)
        if path.endswith(_BASE):
            module.register_forward_hook(settle)
    if layout.wrapped:  # FSDP2 says so of any local part of a DTensor; nobody writes into the logits in place
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    if anatomy.tied:
        model.get_submodule(anatomy.head).weight = model.get_submodule(anatomy.embeddings).weight  # type: ignore[arg-type]
    return given


def _without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model itself, its layers replaced by PEFT's where there is an adapter. Raises JobError for adapters other
    than LoRA in linear layers of full-size weights."""
    if not getattr(model, "peft_config", None):
        return model
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    (config,) = model.peft_config.values()  # type: ignore[operator]
    if config.is_prompt_learning:
        raise _unsplit_adapter(f"{config.peft_type.value} puts tokens of its own before every row")
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            known = type(module) is Linear and type(module.base_layer) is nn.Linear and not module.lora_variant
            if not known or not path.startswith(_block_paths(base)):
                raise _unsplit_adapter(f"{path} is not plain LoRA in a linear layer of a block")
    return base


def _unsplit_adapter(why: str) -> JobError:
    return JobError(
        "this adapter is not split over tensor parallel ranks",
        why=why,
        remedy=f"method=lora with linear layers of the blocks as lora.targets, or {_WITHOUT}",
    )


def _block_paths(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{stack.path}." for stack in dissect(model).stacks)


def _read_plan(model: nn.Module) -> dict[str, str]:
    """Path of a module in the blocks → its style, from the model's own plan."""
    rules: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    blocks = _block_paths(model)
    inside = {
        path: rules[rule] for path, _ in model.named_modules() if path.startswith(blocks) and (rule := _pattern(path)) in rules
    }
    strange = next((path for path, style in inside.items() if style not in KNOWN), None)
    if strange is not None:
        raise _unsuited(model, f"its plan has the style {inside[strange]} ({strange}), which is not split yet")
    if not inside:
        raise _unsuited(model, "its class in transformers has no tensor parallel plan for its blocks")
    for path, style in inside.items():
        if style == EXPERTS:
            weights = {name: rules.get(f"{_pattern(path)}.{name}") for name, _ in model.get_submodule(path).named_parameters()}
            if weights != _WEIGHTS_OF_EXPERTS:
                raise _unsuited(model, f"the experts in {path} do not have the weights {' and '.join(_WEIGHTS_OF_EXPERTS)} alone")
    _check_rest(model, inside)
    return inside


def _pattern(path: str) -> str:
    """As transformers' plans name a module of every block."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _check_rest(model: nn.Module, plan: dict[str, str]) -> None:
    """Whatever the plan does not name gets whole inputs, so it may not stand beside a layer whose output is split."""
    for path, module in model.named_modules():
        if _INSIDE_ADAPTER.search(path):
            continue
        path = path.removesuffix(_BASE)
        parent, _, name = path.rpartition(".")
        if path in plan:
            if not isinstance(_layer(model, path), nn.Linear) and plan[path] not in (NORM_OF_HEADS, EXPERTS):
                raise _unsuited(model, f"{path} is a {type(module).__name__}, not a linear layer")
        elif any(True for _ in module.parameters(recurse=False)):
            if any(True for _ in module.children()):
                raise _unsuited(model, f"{path or 'the model'} holds parameters of its own beside its layers")
            if any(plan.get(f"{parent}.{sibling}") == "colwise" for sibling, _ in model.get_submodule(parent).named_children()):
                raise _unsuited(model, f"its plan has no rule for {name} in {parent}, beside layers that are split")


def _layer(model: nn.Module, path: str) -> Any:
    """The layer at this path, without its adapter."""
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module)


def _unsuited(model: nn.Module, why: str) -> JobError:
    return JobError(f"{type(model).__name__} cannot be split over tensor parallel ranks", why=why, remedy=_WITHOUT)


def _check_sizes(model: nn.Module, plan: dict[str, str], layout: Layout) -> None:
    """Heads and widths must divide by the ranks."""
    ranks = layout.tensor
    counts: dict[str, int] = {}
    if any((style == "colwise" and "attn" in path) or "attention" in path for path, style in plan.items()):
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, key, None)
            counts |= {key: heads} if isinstance(heads, int) else {}
    for path, style in plan.items():
        layer, owner = _layer(model, path), model.get_submodule(path.rpartition(".")[0])
        if style == "colwise" and isinstance(getattr(owner, "head_dim", None), int):
            counts[f"the heads of {path}"] = layer.out_features // owner.head_dim
        if style in COLWISE:
            counts[f"the width of {path}"] = layer.out_features
        elif style in ROWWISE:
            counts[f"the width of {path}"] = layer.in_features
        elif style == EXPERTS:
            counts[f"the inner width of {path}"] = layer.down_proj.shape[-1]
    for what, count in counts.items():
        if count % ranks:
            most = max(size for size in range(1, ranks) if all(each % size == 0 for each in counts.values()))
            raise JobError(
                f"{type(model).__name__} cannot be split over {ranks} tensor parallel ranks",
                why=f"{what} ({count}) does not divide by {ranks}",
                remedy=f"strategy.tensor={most}",
            )


def _styles(model: nn.Module, plan: dict[str, str], layout: Layout) -> dict[str, ParallelStyle]:
    """Path of every module that is wrapped → its style."""
    anatomy, blocks = dissect(model), _block_paths(model)
    stream: Placement = TOKENS if layout.sequence else Replicate()
    routed = tuple(f"{path.rpartition('.')[0]}." for path, rule in plan.items() if rule == EXPERTS)
    styles: dict[str, ParallelStyle] = {}
    for path, rule in plan.items():
        styles |= _layer_styles(model, path, rule, Replicate() if path.startswith(routed) else stream)
    if _holds_parameters(model, anatomy.embeddings):
        styles[anatomy.embeddings] = RowwiseParallel(  # type: ignore[index]
            input_layouts=Replicate(), output_layouts=stream, use_local_output=not layout.sequence
        )
    if _holds_parameters(model, anatomy.head):
        styles[anatomy.head] = ColwiseParallel(output_layouts=Replicate())  # type: ignore[index]
    regions = _gathering(model, plan) if layout.sequence else []
    styles |= {path: GatherTokens(scatter=f"{path}." in routed) for path in regions}
    for path, module in model.named_modules():
        if path in styles or not any(True for _ in module.parameters(recurse=False)):
            continue
        if path.startswith(routed):
            styles[path] = Alike()
        elif not layout.sequence:
            styles[path] = Whole(Replicate())
        elif not path.startswith(blocks):  # the final norm: behind it, everybody sees all tokens
            styles[path] = Whole(TOKENS, output=Replicate())
        elif path.startswith(tuple(f"{region}." for region in regions)):
            styles[path] = Whole(Replicate())
        else:
            styles[path] = Whole(TOKENS, local=False)
    return styles


def _layer_styles(model: nn.Module, path: str, rule: str, stream: Placement) -> dict[str, ParallelStyle]:
    """Of a layer of the plan, and of its adapters."""
    module: Any = model.get_submodule(path)
    if not hasattr(module, "lora_A"):
        return {path: style_of(rule, stream)}
    styles = {f"{path}{_BASE}": style_of(rule, stream)}
    for name in module.lora_A:
        styles[f"{path}.lora_A.{name}"], styles[f"{path}.lora_B.{name}"] = adapter_styles(rule, stream)
    return styles


def _holds_parameters(model: nn.Module, path: str | None) -> bool:
    """Not where there is no such module, and where it is on another pipeline stage."""
    return path is not None and any(True for _ in model.get_submodule(path).parameters())


def _gathering(model: nn.Module, plan: dict[str, str]) -> list[str]:
    """The parts of every block that need all tokens: those that hold layers of the plan. Raises JobError for other blocks than
    norms around such parts."""
    anatomy = dissect(model)
    regions = []
    for stack in anatomy.stacks:
        for block in stack.block_paths():
            for name, part in model.get_submodule(block).named_children():
                path = f"{block}.{name}"
                rules = [rule for inner, rule in plan.items() if inner.startswith(f"{path}.")]
                if any(rule in (*ROWWISE, EXPERTS) for rule in rules):
                    regions.append(path)
                elif rules or (any(True for _ in part.parameters()) and any(True for _ in part.children())):
                    raise _no_sequence(model, f"{path} does not end in a layer that its plan splits by rows")
    known = (anatomy.embeddings, anatomy.head)
    blocks = _block_paths(model)
    rest = [
        path
        for path, module in model.named_modules()
        if path not in known and not path.startswith(blocks) and any(True for _ in module.parameters(recurse=False))
    ]
    if len(rest) != int(_holds_parameters(model, anatomy.head)):
        raise _no_sequence(model, f"beside its blocks it should have one norm, and has {', '.join(rest) or 'none'}")
    return regions


def _no_sequence(model: nn.Module, why: str) -> JobError:
    return JobError(
        f"the tokens of {type(model).__name__} cannot be split (sequence parallelism)", why=why, remedy="strategy.sequence=false"
    )
