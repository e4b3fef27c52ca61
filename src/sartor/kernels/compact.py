"""AdamW with less state: moments in 8 bits, and bfloat16 weights that are rounded by chance, without a residual.

Neither is exact. The arithmetic is that of `sartor.kernels.adam`, in float32, on parts of a parameter that stay in cache; what is
kept between steps is rounded.

- **Moments.** 256 elements share a float32 scale, the largest of them; each is one of 256 values between -1 and 1 (first moment)
  or 0 and 1 (second), of which there are more near zero (Dettmers et al. 2022, arXiv 2110.02861). A second moment that is not
  zero does not become zero: an update would be divided by epsilon alone.
- **Weights.** Rounded up as often as the bits that are lost say, an update too small for bfloat16 counts on average. Which way is
  decided by numbers that follow from seed, parameter, step and piece, so a run goes on exactly, wherever its state lives.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sartor.kernels.adam import MOMENTS, RESIDUAL, MasterAdamW, merge, split, update
from sartor.kernels.native import Operator

BLOCK = 256
"""Elements that share a scale."""
SMALLEST = 4096
"""Elements from which on a parameter's moments have 8 bits; bitsandbytes has the same bound."""
PART = 2**16
"""Elements that are updated at once: whole blocks, and few enough for the temporaries to stay in cache."""
_SCALE = "_scale"
_DECADES = 7


def moments_bytes(count: int, *, eight_bit: bool) -> int:
    """Of the moments of a parameter of so many elements."""
    if eight_bit and count >= SMALLEST:
        return 2 * (count + 4 * -(-count // BLOCK))
    return 8 * count


@functools.cache
def codes(signed: bool) -> tuple[Tensor, Tensor]:
    """The values of the 256 codes, and the code of every number, by the upper 16 bits of its float32."""
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        made = 10.0 ** (decade + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2
        values += [*made.tolist(), *(-made).tolist()] if signed else made.tolist()
    levels = torch.tensor(sorted(values))
    upper = torch.arange(2**16, dtype=torch.int32)
    numbers = ((upper << 16) + 2**15).view(torch.float32).nan_to_num()
    nearest = torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2)
    if not signed:
        nearest = nearest.clamp(min=1)
        nearest[0] = 0
    return levels, nearest.to(torch.uint8)


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a vector of float32."""
    count = values.numel()
    blocks = F.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    bits = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(torch.int32)
    upper = (bits >> 16).bitwise_and_(0xFFFF).view(-1)[:count]
    return codes(signed)[1].index_select(0, upper), scales


def decode(coded: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The float32 numbers that codes and scales stand for."""
    count = coded.numel()
    values = codes(signed)[0].index_select(0, coded.int())
    return (F.pad(values, (0, -count % BLOCK)).view(-1, BLOCK) * scales[:, None]).view(-1)[:count]


def round_by_chance(weight: Tensor, residual: Tensor, generator: torch.Generator) -> Tensor:
    """A float32 in two halves as one of the two bfloat16 around it, the nearer one more often: right on average."""
    bits = merge(weight, residual).view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) >> 16).to(torch.int16).view(torch.bfloat16)


class CompactAdamW(MasterAdamW):
    """AdamW whose moments have 8 bits, or whose bfloat16 weights are rounded by chance, or both.

    Parameters are float32 or bfloat16. `masters`: those in bfloat16 are halves of float32, as in MasterAdamW. `eight_bit`:
    moments of parameters of 4096 elements and more; smaller ones stay float32. `rounding_seed`: of the numbers that round
    bfloat16 weights without residual; None: to the nearest.
    """

    _in_one_call = False  # codes are made of each update's results

    def __init__(
        self,
        params: Iterable[Any],
        *,
        eight_bit: bool = False,
        masters: bool = False,
        rounding_seed: int | None = None,
        start: Mapping[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.eight_bit, self.masters, self.rounding_seed = eight_bit, masters, rounding_seed
        super().__init__(params, start=start, **options)
        everything = [parameter for group in self.param_groups for parameter in group["params"]]
        self._numbers: dict[Tensor, tuple[int, int]] = {parameter: (number, 0) for number, parameter in enumerate(everything)}

    def stand_in(self, piece: Tensor, parameter: Tensor, first: int, of: Any) -> None:
        """The only parameter from here on: part of one of another CompactAdamW's, after its `first` elements, whole parts.
        Chance is drawn for it as for the whole."""
        assert first % PART == 0 or self.rounding_seed is None
        self._numbers = {piece: (of._numbers[parameter][0], first // PART)}

    def _begin(self, parameter: Tensor, residual: Tensor | None) -> None:
        if self.masters:
            super()._begin(parameter, residual)
        elif parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"CompactAdamW is for float32 and bfloat16 parameters, this one is {parameter.dtype}")

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        scales = [state[moment + _SCALE] for moment in MOMENTS if moment + _SCALE in state]
        tensors = (parameter, state.get(RESIDUAL), parameter.grad, [state[moment] for moment in MOMENTS], scales, state["step"])
        rates = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
        adamw_compact_(*tensors, self.scale, *rates, self.rounding_seed, *self._numbers[parameter])

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        count, shape = parameter.numel(), parameter.shape
        if not self.eight_bit or count < SMALLEST:
            return super()._moments(parameter)
        made: dict[str, Tensor] = {}
        for moment, signed in zip(MOMENTS, (True, False), strict=True):
            zero = 127 if signed else 0
            made[moment] = torch.full(shape, zero, dtype=torch.uint8, device=parameter.device)
            made[moment + _SCALE] = torch.zeros(-(-count // BLOCK), device=parameter.device)
        return made


def _adamw_compact(
    weight: Tensor,
    residual: Tensor | None,
    gradient: Tensor,
    moments: Sequence[Tensor],
    scales: Sequence[Tensor],
    step: Tensor,
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    seed: int | None,
    number: int,
    first_part: int,
) -> None:
    flat, gradient = weight.reshape(-1), gradient.reshape(-1)
    for part, first in enumerate(range(0, flat.numel(), PART), first_part):
        at, blocks = slice(first, first + PART), slice(first // BLOCK, (first + PART) // BLOCK)
        kept = [moment.view(-1)[at] for moment in moments]
        kept_scales = [of_blocks[blocks] for of_blocks in scales]
        exact = [decode(*pair, signed=not n) for n, pair in enumerate(zip(kept, kept_scales, strict=True))] if scales else kept
        upper, lower = _halves(flat[at], None if residual is None else residual.view(-1)[at])
        first_moment, second_moment = exact
        update(upper, lower, gradient[at], first_moment, second_moment, step, scale, lr, beta1, beta2, eps, decay)
        if weight.dtype == torch.float32:
            flat[at] = merge(upper, lower)
        elif residual is None and seed is not None:
            flat[at] = round_by_chance(upper, lower, _generator(seed, number, int(step), part))
        for n, (codes_, scales_) in enumerate(zip(kept, kept_scales, strict=False)):
            made, of_blocks = encode(exact[n], signed=not n)
            codes_.copy_(made)
            scales_.copy_(of_blocks)
    if not weight.is_contiguous():
        weight.copy_(flat.view(weight.shape))


def _halves(weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """A master in two halves: of the weight itself, or of a copy where that is float32."""
    if weight.dtype == torch.float32:
        return split(weight)
    return weight, torch.zeros_like(weight, dtype=torch.int16) if residual is None else residual


def _generator(*numbers: int) -> torch.Generator:
    """Random numbers that follow from these numbers alone."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


adamw_compact_ = Operator(
    "adamw_compact_(Tensor(a!) weight, Tensor(b!)? residual, Tensor gradient, Tensor(c!)[] moments, Tensor(d!)[] scales, "
    "Tensor step, Tensor? scale, float lr, float beta1, float beta2, float eps, float decay, int? seed, int number, "
    "int first_part) -> ()",
    _adamw_compact,
    lambda *_: None,
)
