"""What a traced step computes: textbook FLOPs, bytes of operands, and the same for a shortened model as for the whole one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from sartor.data.pack import Batch
from sartor.job import from_mapping
from sartor.methods import traits
from sartor.model import skeleton
from sartor.parallel import Layout
from sartor.predict.operations import Group, Operation, Operations
from sartor.predict.operators import describe
from sartor.predict.shapes import Shape, blank_batch
from sartor.predict.target import Target
from sartor.predict.trace import trace_steps
from sartor.predict.whole import trace_job
from sartor.step import Precision, make_step, make_trainable

from .test_repeat import SMALL, ledger, source

ROWS, WIDTH, KEPT = 3, 48, 47


def batch() -> Batch:
    return blank_batch(Shape(ROWS, WIDTH, KEPT), packing=False)


def traced(
    method: str = "full", *, kind: str = "llama", recompute: bool = False, mode: str = "float32", **changes: Any
) -> Operations:
    job = from_mapping({"model": "unused", "data": "unused", "method": method})
    precision = Precision.of("float32")
    model = skeleton(source("llama"), dtype=precision.load_dtype(adapter=traits(job).adapter))
    model = make_trainable(model, job, precision, recompute=recompute, meta=True)
    made = trace_steps(model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), [batch()])
    return made.operations.step()


def llama_forward_flops() -> tuple[int, int, int]:
    """Linear layers of all blocks, the head, and attention, by the textbook: 2 m n k a product."""
    config = SMALL["llama"]
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    tokens, head_width = ROWS * WIDTH, width // heads
    projections = 2 * tokens * width * (width + 2 * groups * head_width + width)
    linear = layers * (projections + 3 * 2 * tokens * width * inner)
    head = 2 * ROWS * KEPT * width * config["vocab_size"]
    attention = layers * 2 * 2 * ROWS * heads * WIDTH * WIDTH * head_width
    return linear, head, attention


def test_a_full_fine_tune_has_the_textbooks_flops() -> None:
    linear, head, attention = llama_forward_flops()
    step = traced()
    # On a CPU the head's gradients are made with the loss. Elsewhere two products in backward for one in forward; attention
    # computes its scores again.
    assert step.total("flops", kind="forward") == linear + 3 * head + attention
    assert step.total("flops", kind="backward") == 2 * linear + attention * 5 // 2
    assert step.total("flops", kind="update") == step.total("flops", kind="recompute") == 0


def test_recomputation_adds_a_forward_of_the_blocks() -> None:
    linear, _, attention = llama_forward_flops()
    config = SMALL["llama"]
    plain, again = traced(), traced(recompute=True)
    for kind in ("forward", "backward"):
        assert again.total("flops", kind=kind) == plain.total("flops", kind=kind)
    down = config["num_hidden_layers"] * 2 * ROWS * WIDTH * config["intermediate_size"] * config["hidden_size"]
    # It stops early: nobody needs the result of a block's last product.
    assert again.total("flops", kind="recompute") == linear + attention - down


def test_adapters_save_the_gradients_of_frozen_weights() -> None:
    linear, head, attention = llama_forward_flops()
    config = SMALL["llama"]
    step = traced("lora")
    # Frozen layers: the input's gradient only, but for those of the first block, whose input needs none.
    width, inner, heads, groups = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    sizes = [(width, width), (width, groups * width // heads), (width, groups * width // heads), (width, width)]
    sizes += [(width, inner), (width, inner), (inner, width)]
    rank, tokens = 16, ROWS * WIDTH
    adapters = config["num_hidden_layers"] * sum(2 * tokens * rank * (a + b) for a, b in sizes)
    assert step.total("flops", kind="forward") == linear + 2 * head + attention + adapters
    first = sum(2 * tokens * width * (b + rank) for _, b in sizes[:3])
    assert step.total("flops", kind="backward") == linear + attention * 5 // 2 + 2 * adapters - first


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "method", "mode", "recompute", "micro_batches"),
    [("llama", "full", "bf16-mixed", True, 2), ("llama", "lora", "bf16", False, 1), ("deepseek_v3", "lora", "float32", False, 1)],
)
def test_a_shortened_model_computes_what_the_whole_one_does(
    kind: str, method: str, mode: str, recompute: bool, micro_batches: int
) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": method})
    short, whole = (
        ledger(
            job, source(kind), mode=mode, recompute=recompute, shortened=shortened, micro_batches=micro_batches
        ).operations.step()
        for shortened in (True, False)
    )
    assert everything(short) == everything(whole)


def everything(operations: Operations) -> Counter[tuple[str, str, Operation]]:
    """But for the norm of the parameters' norms, whose operand grows with the number of parameters."""
    done: Counter[tuple[str, str, Operation]] = Counter()
    for segment, operation, count in operations:
        if "clip" not in segment.phase:
            done[segment.phase, segment.kind, operation] += count
    return done


def described(func: Any, *args: Any, **kwargs: Any) -> Operation:
    made = describe(func, args, kwargs, func(*args, **kwargs))
    assert made is not None
    return made


def test_bytes_of_operators() -> None:
    aten = torch.ops.aten
    a, b = torch.zeros(6, 4), torch.zeros(4)
    add = described(aten.add.Tensor, a, b.expand(6, 4))
    assert (add.read_bytes, add.written_bytes, add.made_bytes) == (4 * (24 + 4), 96, 96), "what is broadcast counts once"
    in_place = described(aten.mul_.Tensor, a, 2.0)
    assert (in_place.read_bytes, in_place.written_bytes, in_place.made_bytes) == (96, 96, 0)
    copied = described(aten.copy_.default, a, torch.ones(6, 4, dtype=torch.bfloat16))
    assert (copied.read_bytes, copied.written_bytes, copied.family) == (48, 96, "copy")
    table = described(aten.embedding.default, torch.zeros(1000, 8), torch.zeros(5, dtype=torch.int64))
    assert table.read_bytes == 5 * 8 + 5 * 8 * 4, "rows that are fetched, not the table"
    product = described(aten.addmm.default, b, torch.zeros(6, 5), torch.zeros(5, 4))
    assert (product.sizes, product.flops, product.family) == ((1, 6, 4, 5), 2 * 6 * 4 * 5, "matmul")
    linear = described(aten.mm.default, torch.zeros(6, 5), torch.zeros(4, 5).t())
    assert (product.form, linear.form) == ("nn", "nt")
    assert describe(aten.view.default, (a, [24]), {}, aten.view.default(a, [24])) is None
    assert described(aten.add.Tensor, a, a).dense
    assert not described(aten.add.Tensor, a, torch.zeros(4, 6).t()).dense
    image, filters, ones = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3), [1, 1]
    convolution = described(aten.convolution.default, image, filters, None, ones, ones, ones, False, [0, 0], 1)
    assert convolution.flops == 2 * (2 * 8 * 8) * 5 * (3 * 3 * 3)


def test_collectives_of_a_sharded_step() -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    operations = trace_job(
        job, source("llama"), [batch()], Target(kind="cpu"), precision=Precision.of("float32"), recompute=False, attention=None,
        layout=Layout(shard=4),
    ).operations.step()  # fmt: skip
    weights = 4 * sum(p.numel() for p in skeleton(source("llama"), dtype=torch.float32).parameters())
    sent = Counter[tuple[str, str]]()
    for segment, operation, count in operations:
        if operation.family == "collective":
            # The norm of the gradient is waited for.
            assert operation.group == Group(4, 1, overlaps="clip" not in segment.phase)
            sent[operation.name, segment.kind] += count * operation.read_bytes
    root = weights - 4 * 11 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 64)
    # All weights in forward; in backward those of the blocks again, whose gathered copies were given back.
    assert sent["all_gather", "forward"] == weights
    assert sent["all_gather", "backward"] == weights - root
    assert sent["reduce_scatter", "backward"] == weights
