"""Can examples share a row of this model? Known by structure where a plan is made, checked on the real model before it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sartor.kernels.attention import attends_by_segments, segments_are
from sartor.kernels.segments import Segments

_LENGTHS = (5, 9, 3)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def cannot_pack(model: nn.Module) -> str:
    """Why rows of this model hold one example only, or nothing. `model` may live on the meta device."""
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position ids, so examples in a row could not be told apart"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return f"{name} carries a state from token to token (it has convolutions over time), which knows no borders in a row"
    return ""


@torch.no_grad()
def mixes_examples(model: nn.Module, vocab_size: int) -> str:
    """How much the examples of a packed row differ from the same examples alone, in words; nothing where they agree."""

    def compare(examples: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        alone = [_logits(model, [example], device) for example in examples]
        return _logits(model, examples, device), torch.cat(alone)

    difference = _difference(model, vocab_size, _LENGTHS, compare)
    if not difference:
        return ""
    name = type(model).__name__
    return f"in a packed row of {name} the logits of an example differ by {difference:.1%} from those it has alone"


def cannot_share_prefixes(model: nn.Module) -> str:
    """Why examples cannot share the computation of what they begin with, or nothing. `model` may live on the meta device."""
    drops = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    drops += [name for name, value in config.items() if "drop" in name and isinstance(value, float) and value > 0]
    return f"dropout ({drops[0]}) would be the same for all that share a beginning" if drops else ""


@torch.no_grad()
def splits_prefixes(model: nn.Module, vocab_size: int) -> str:
    """How much examples that share their beginning differ from the same examples alone, in words; nothing where they agree."""

    def compare(examples: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        head, *tails = examples
        alone = [_logits(model, [torch.cat([head, tail])], device)[len(head) :] for tail in tails]
        shared = _logits(model, examples, device, continues=[-1] + [0] * len(tails))[len(head) :]
        return shared, torch.cat(alone)

    difference = _difference(model, vocab_size, (7, *_LENGTHS), compare)
    if not difference:
        return ""
    name = type(model).__name__
    return f"the logits of examples of {name} that share their beginning differ by {difference:.1%} from those they have alone"


def _difference(
    model: nn.Module,
    vocab_size: int,
    lengths: Sequence[int],
    compare: Callable[[list[Tensor], torch.device], tuple[Tensor, Tensor]],
) -> float:
    """The largest difference, relative to the largest logit, of two ways to compute examples; 0 where rounding explains it."""
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    one, other = compare([torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths], device)
    model.train(training)
    difference = float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))
    return 0.0 if difference <= _TOLERANCE.get(dtype, 5e-2) else difference


def _logits(model: nn.Module, examples: list[Tensor], device: torch.device, continues: Sequence[int] = ()) -> Tensor:
    """Of these examples in a row, as a training step computes them."""
    ids = torch.cat(examples)[None].to(device)
    starts = [len(examples[parent]) if parent >= 0 else 0 for parent in continues or [-1] * len(examples)]
    positions = torch.cat([torch.arange(len(e)) + start for e, start in zip(examples, starts, strict=True)])[None].to(device)
    segments = None
    if attends_by_segments(model):
        lengths = [[len(example) for example in examples]]
        segments = Segments(lengths, ids.shape[1], continues=[continues] if continues else ())
    with segments_are(segments):
        output = model(input_ids=ids, position_ids=positions, use_cache=False)
    return output.logits[0].float()  # type: ignore[no-any-return]
