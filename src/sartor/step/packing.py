"""Can examples share a row of this model? Known by structure where a plan is made, checked on the real model before it trains."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from sartor.kernels.attention import Segments, attends_by_segments, segments_are

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
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(0, vocab_size, (length,), generator=generator) for length in _LENGTHS]
    packed = _logits(model, examples, device)
    alone = torch.cat([_logits(model, [example], device) for example in examples])
    model.train(training)
    difference = float((packed - alone).abs().max() / alone.abs().max().clamp_min(1e-6))
    if difference <= _TOLERANCE.get(dtype, 5e-2):
        return ""
    return (
        f"in a packed row of {type(model).__name__} the logits of an example differ by {difference:.1%} from those it has alone"
    )


def _logits(model: nn.Module, examples: list[Tensor], device: torch.device) -> Tensor:
    """Of these examples in a row, as a training step computes them."""
    ids = torch.cat(examples)[None].to(device)
    positions = torch.cat([torch.arange(len(example)) for example in examples])[None].to(device)
    segments = Segments([[len(example) for example in examples]], ids.shape[1]) if attends_by_segments(model) else None
    with segments_are(segments):
        output = model(input_ids=ids, position_ids=positions, use_cache=False)
    return output.logits[0].float()  # type: ignore[no-any-return]
