"""What PyTorch's rules for the meta device say of plain operators is what its fake tensors say."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fake_results import told
from sartor.predict.plain_results import PLAIN
from sartor.predict.results import Results

aten = torch.ops.aten
INT, CPU = torch.int64, torch.device("cpu")


def whole(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=INT)


Calls = list[tuple[list[Any], dict[str, Any]]]


def for_all(names: tuple[str, ...], calls: Calls) -> dict[str, Calls]:
    return {name: list(calls) for name in names}


def operands(x: Callable[..., Tensor]) -> dict[str, Calls]:
    """Calls of every plain operator; `x` makes a tensor of a shape."""

    def call(*args: Any, **kwargs: Any) -> Calls:
        return [(list(args), kwargs)]

    heads = x(2, 3, 8, 16)
    attended = aten._scaled_dot_product_flash_attention_for_cpu.default(heads, heads, heads, 0.0, True)
    unary = for_all(
        ("clone", "cos", "detach", "gelu", "neg", "reciprocal", "rsqrt", "silu", "sin", "tanh"),
        [*call(x(3, 4)), *call(x(4, 3).t()), *call(x(6, 8)[1:, ::2]), *call(x(1))],
    )
    pair = [*call(x(3, 4), x(3, 4)), *call(x(4, 3).t(), x(3, 4)), *call(x(3, 1), x(4)), *call(x(3, 4), torch.empty(()))]
    mixed = call(x(3, 4), whole(3, 4))
    return {
        **unary,
        **for_all(("add.Tensor", "mul.Tensor", "sub.Tensor"), [*pair, *mixed]),
        **for_all(("add_.Tensor", "mul_.Tensor"), pair[:2]),
        "div.Tensor": [*pair, *mixed, *call(whole(3), whole(3))],
        "div.Scalar": [*call(x(3, 4), 2), *call(whole(3), 2)],
        "mul.Scalar": [*call(x(3, 4), 2.0), *call(whole(3), 0.5), *call(whole(3), 2)],
        **for_all(("eq.Scalar", "ne.Scalar"), [*call(x(3, 4), 1), *call(whole(4, 3).t(), -100)]),
        "pow.Tensor_Scalar": [*call(x(3, 4), 2), *call(x(3, 4), 3.0), *call(whole(3), 2)],
        **for_all(("gelu_backward", "silu_backward", "tanh_backward"), pair[:2]),
        "clamp": [*call(x(3, 4), 1.0), *call(whole(3), 0, 5)],
        "all": call(x(3, 4)),
        "cumsum": [*call(whole(3, 4), -1), *call(torch.empty(3, 4, dtype=torch.bool), 1), *call(x(3, 4), 0)],
        "mean.dim": [*call(x(3, 4), [-1], True), *call(x(3, 4), [0], False, dtype=torch.float32)],
        "sum.dim_IntList": [*call(x(3, 4), [0]), *call(x(2, 3, 4), [0, 1], True), *call(torch.empty(3, dtype=torch.bool), [0])],
        "linalg_vector_norm": [*call(x(3, 4), 2), *call(x(3, 4), 2, [1], True, dtype=torch.float32)],
        "_softmax": [*call(x(3, 4), -1, False), *call(x(4, 3).t(), -1, False)],
        "_softmax_backward_data": call(x(3, 4), x(3, 4), -1, x(1).dtype),
        "_log_softmax": call(x(3, 4), 1, False),
        "_log_softmax_backward_data": call(x(3, 4), x(3, 4), 1, x(1).dtype),
        "nll_loss_forward": [*call(x(3, 4), whole(3), None, 1, -100), *call(x(3, 4), whole(3), None, 0, -100)],
        "nll_loss_backward": call(x(()), x(3, 4), whole(3), None, 2, -100, x(())),
        "embedding": call(x(9, 4), whole(2, 3)),
        "embedding_dense_backward": call(x(2, 3, 4), whole(2, 3), 9, -1, False),
        "mm": [*call(x(3, 4), x(4, 5)), *call(x(4, 3).t(), x(5, 4).t())],
        "addmm": [*call(x(5), x(3, 4), x(4, 5)), *call(x(3, 5), x(3, 4), x(4, 5))],
        "bmm": call(x(2, 3, 4), x(2, 5, 4).transpose(1, 2)),
        "_scaled_dot_product_flash_attention_for_cpu": [
            *call(heads, heads, heads, 0.0, True),
            *call(x(2, 8, 3, 16).transpose(1, 2), heads, heads, 0.0, False, attn_mask=x(2, 1, 8, 8)),
        ],
        "_scaled_dot_product_flash_attention_for_cpu_backward": call(heads, heads, heads, heads, *attended, 0.0, True),
        "view": [*call(x(2, 6)[1:], [3, 2]), *call(x(3, 4), [-1])],
        "_unsafe_view": call(x(2, 6), [12]),
        "expand": call(x(3, 1), [2, 3, 4]),
        "permute": call(x(2, 3, 4), [2, 0, 1]),
        "transpose.int": call(x(2, 3, 4)[:, 1:], 0, -1),
        "t": call(x(3, 4)),
        "unsqueeze": call(x(3, 4), 1),
        "select.int": call(x(3, 4), 0, 1),
        "slice.Tensor": [*call(x(6, 4), 0, 1, 9223372036854775807, 2), *call(x(3, 4), 1, -2)],
        "slice_backward": call(x(2, 4), [6, 4], 0, 1, 3, 1),
        "split.Tensor": call(x(5, 4), 2),
        "split_with_sizes": call(x(5, 4), [2, 3]),
        "as_strided": call(x(3, 4), [2, 2], [4, 1], 1),
        "cat": [*call([x(1, 4), x(2, 4)]), *call([x(3, 4), x(4, 3).t()], 1), *call([x(2, 4), whole(1, 4)])],
        "stack": call([x(3), x(3)]),
        "index.Tensor": [*call(x(5, 4), [whole(3)]), *call(x(5, 4), [None, whole(2)])],
        "index_put": call(x(5, 4), [whole(3)], x(3, 4), True),
        "_to_copy": [
            *call(x(4, 3).t(), dtype=torch.bfloat16),
            *call(whole(3), dtype=torch.float32, device=CPU),
            *call(x(6, 4)[::2], dtype=torch.float32, memory_format=torch.contiguous_format),
        ],
        **for_all(
            ("empty_like", "ones_like", "zeros_like"),
            [*call(x(4, 3).t()), *call(x(6, 4)[::2], pin_memory=False), *call(x(3), dtype=torch.float32, device=CPU)],
        ),
        "new_zeros": call(x(3, 4), [2, 2], pin_memory=False),
        "empty.memory_format": call([3, 4], device=CPU, pin_memory=False),
        "empty_strided": call([3, 4], [1, 3], dtype=torch.bfloat16, device=CPU),
        "zeros": [*call([]), *call([3], dtype=torch.float32, device=CPU)],
        "arange": [*call(5, device=CPU), *call(5.0)],
        "_foreach_norm.Scalar": call([x(3), x(4, 2)]),
        "_foreach_add_.Scalar": call([x(()), x(())], 1),
        "_foreach_mul_.Tensor": call([x(3), x(4)], x(())),
        "_foreach_copy_": call([x(3), x(4)], [x(3), x(4)]),
        "_fused_adamw_": [
            (
                [[x(3)], [x(3)], [x(3)], [x(3)], [], [torch.empty(())]],
                {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False},
            )
        ],
    }


def named(func: Any) -> str:
    return str(func).removeprefix("aten.").removesuffix(".default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("func", sorted(PLAIN, key=str), ids=named)
def test_a_plain_operator_gives_what_fake_tensors_give(func: Any, dtype: torch.dtype, fake_mode: FakeTensorMode) -> None:
    def x(*shape: Any) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{func} was left to the fake tensors")

    memory = Results(fake_mode)
    ours, theirs = (tree_map_only(Tensor, fake_mode.from_tensor, operands(x)[named(func)]) for _ in range(2))
    with fake_mode, torch.no_grad():
        for (args, kwargs), (fresh, _) in zip(ours, theirs, strict=True):
            made = memory.of(memory.key(func, args, kwargs), never, args, kwargs)
            assert told(made, args) == told(func(*fresh, **kwargs), fresh)


def test_a_plain_operator_that_cannot_be_is_left_to_the_fake_tensors(fake_mode: FakeTensorMode) -> None:
    memory = Results(fake_mode)
    with fake_mode:
        args = [torch.empty(3, 4), torch.empty(3, 4)]
        with pytest.raises(RuntimeError, match="reduction dim"):
            memory.of(memory.key(aten.mm.default, args, {}), aten.mm.default, args, {})
        kwargs = {"device": torch.device("meta")}
        made = memory.of(memory.key(aten.empty_like.default, args[:1], kwargs), aten.empty_like.default, args[:1], kwargs)
    assert made.device.type == "meta"


def test_nothing_is_kept_alive(fake_mode: FakeTensorMode) -> None:
    memory = Results(fake_mode)
    gc.collect()
    gc.disable()
    try:
        with fake_mode:
            args = [torch.empty(3, 4), [12]]
            storage = weakref.ref(args[0].untyped_storage())
            made = memory.of(memory.key(aten.view.default, args, {}), aten.view.default, args, {})
            del args, made
        assert storage() is None
    finally:
        gc.enable()
