"""The useful arithmetic of fine-tuning, and how much of it this machine can do in a second.

Counted is what the result needs, and nothing that a way of computing adds (padding, recomputation, a head over positions whose
loss is not wanted). A product of a (rows × inputs) and a (inputs × outputs) matrix is 2 · rows · inputs · outputs operations. For
an example of L tokens, K of which are predicted by a position that counts in the loss:

    layers     forward 2·N·L with N weights in the layers' matrices; backward 2·N·L for the gradient of the inputs, and 2·N·L for
               the gradient of the weights where they train (method full); where they do not (method lora), nobody needs the
               gradient of what the first layer's query, key and value read, and it is not counted (nor their adapters')
    adapters   6·A·L with A weights in LoRA's matrices (method lora): forward, and backward for inputs and weights
    head       2·V·W·K forward, as much for the gradient of its input, and with method full as much for its own
    attention  a position sees itself and what is before it: L·(L+1)/2 pairs; two products of width W forward, four backward, in
               every layer: 6 · 2·W · L·(L+1)/2

`torch.utils.flop_counter` counts as much over a Llama of transformers, forward and backward (but for attention's causal half).
Element-wise work, the embedding's lookup and the optimizer are left out: they are bound by memory, not arithmetic.

`python arithmetic.py` prints the machine's best rates of a matrix product, and of an update, as JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from typing import Any


def matrices(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix of a layer."""
    width, inner = shape["width"], shape["intermediate"]
    return [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]


def useful_flops(shape: dict[str, Any], method: str, rank: int, *, length: int, counted: int) -> int:
    """Operations of one step's share for one example: `length` tokens, `counted` of them predicted."""
    layer = matrices(shape)
    weights = shape["layers"] * sum(inputs * outputs for inputs, outputs in layer)
    adapters = shape["layers"] * rank * sum(inputs + outputs for inputs, outputs in layer)
    head = 2 * shape["vocabulary"] * shape["width"] * counted
    attention = shape["layers"] * 6 * shape["width"] * length * (length + 1)
    if method == "full":
        return 6 * weights * length + 3 * head + attention
    first = 2 * 3 * shape["width"] * (shape["width"] + rank)
    return (4 * weights - first + 6 * adapters) * length + 2 * head + attention


def trained_weights(shape: dict[str, Any], method: str, rank: int) -> int:
    """Numbers that an optimizer step changes, but for the norms' few."""
    layer = matrices(shape)
    if method == "lora":
        return int(shape["layers"] * rank * sum(inputs + outputs for inputs, outputs in layer))
    return int(shape["layers"] * sum(inputs * outputs for inputs, outputs in layer) + 2 * shape["vocabulary"] * shape["width"])


SUSTAINED, UPDATE = "_sustained", "update"
FORMATS = "bfloat16", "float32"


def best_product(rates: dict[str, float], kind: str = "") -> float:
    """In whichever of the two formats this machine multiplies faster; `kind`: the best one, or `SUSTAINED`."""
    return max(rates[name + kind] for name in FORMATS)


def gemm_rates(seconds: float = 0.2) -> dict[str, float]:
    """The best rate of several products in operations per second, PyTorch's and Sartor's, by format; and with `SUSTAINED` after
    its name, that of the product whose median is best: where others use the machine's cores, a single one may find them idle."""
    import torch

    from sartor.kernels.matmul import product

    sizes = [(1024, 768, 768), (1024, 768, 2048), (1024, 2048, 768), (2048, 1280, 3456), (2048, 2048, 2048), (4096, 4096, 4096)]
    rates: dict[str, float] = {}
    for name, (rows, inputs, outputs) in itertools.product(FORMATS, sizes):
        dtype = getattr(torch, name)
        a, b = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        result = torch.empty(rows, outputs, dtype=dtype)
        for multiply in (lambda a, b, out: torch.mm(a, b, out=out), product):
            multiply(a, b.t(), result)
            end, found = time.perf_counter() + seconds, []
            while (start := time.perf_counter()) < end:
                multiply(a, b.t(), result)
                found.append(2 * rows * inputs * outputs / (time.perf_counter() - start))
            for key, rate in ((name, max(found)), (name + SUSTAINED, statistics.median(found))):
                rates[key] = max(rates.get(key, 0.0), rate)
    return rates


def update_rate(seconds: float = 0.5, count: int = 2**25) -> float:
    """The most parameters that an exact AdamW updates in a second: PyTorch's fused one in float32, or Sartor's in two halves.
    What it reads and writes of each is in no cache."""
    import torch

    from sartor.kernels.adam import MasterAdamW

    best = 0.0
    for dtype, make in (
        (torch.float32, lambda weights: torch.optim.AdamW(weights, fused=True)),
        (torch.bfloat16, MasterAdamW),
    ):
        weight = torch.zeros(count, dtype=dtype, requires_grad=True)
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer = make([weight])
        optimizer.step()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            optimizer.step()
            best = max(best, count / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    print(json.dumps(gemm_rates() | {UPDATE: update_rate()}))
