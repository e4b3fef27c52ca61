"""Results that are remembered are those that PyTorch's fake tensors give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fake_results import told
from sartor.predict import results
from sartor.predict.results import Results

aten = torch.ops.aten


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


META = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
CALLS: dict[str, tuple[Any, Callable[[], list[Any]], dict[str, Any]]] = {
    "product": (aten.mm.default, lambda: [empty(3, 4), empty(6, 4).t()], {}),
    "in place": (aten.add_.Tensor, lambda: [empty(3, 4), empty(4)], {"alpha": 2}),
    "view": (aten.view.default, lambda: [empty(2, 6)[1:], [3, 2]], {}),
    "reshaped": (aten._unsafe_view.default, lambda: [empty(2, 6), [12]], {}),
    "transposed": (aten.transpose.int, lambda: [empty(2, 3, 4)[:, 1:], 0, 1], {}),
    "several views": (aten.split.Tensor, lambda: [empty(5, 4), 2], {}),
    "another format": (aten._to_copy.default, lambda: [empty(3, 4).t()], {"dtype": torch.bfloat16}),
    "several results": (aten.native_layer_norm.default, lambda: [empty(3, 4), [4], empty(4), None, 1e-5], {}),
    "without a result": (aten._foreach_mul_.Scalar, lambda: [[empty(3), empty(4)], 0.5], {}),
    "a factory": (aten.empty.memory_format, lambda: [[3, 4]], {"device": torch.device("cpu"), "pin_memory": False}),
    "looked up": (aten.index.Tensor, lambda: [empty(5, 4), [empty(3, dtype=torch.int64)]], {}),
    "a model that is made": (aten.empty_like.default, lambda: [META], {"device": torch.device("cpu")}),
    "a list": (aten.cat.default, lambda: [[empty(1, 4), empty(2, 4)]], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_remembered_result_is_the_one_that_was_computed(
    name: str, fake_mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    func, make, kwargs = CALLS[name]
    monkeypatch.setattr(results, "PLAIN", frozenset())  # test_plain_results.py has those
    memory, ran = Results(fake_mode), []

    def run(*args: Any, **options: Any) -> Any:
        ran.append(func)
        return func(*args, **options)

    with fake_mode:
        for _ in range(3):
            args = make()
            made = memory.of(memory.key(func, args, kwargs), run, args, kwargs)
            fresh = make()
            assert told(made, args) == told(func(*fresh, **kwargs), fresh)
    assert len(ran) == 1


def test_calls_that_differ_have_different_keys(fake_mode: FakeTensorMode) -> None:
    memory = Results(fake_mode)
    with fake_mode:
        square, wide = empty(4, 4), empty(4, 8)
        calls = [
            (aten.mul.Tensor, [square, square]),
            (aten.mul.Tensor, [square.t(), square]),
            (aten.mul.Tensor, [wide[:, :4], square]),
            (aten.mul.Tensor, [square.bfloat16(), square]),
            (aten.mul.Scalar, [square, 1]),
            (aten.mul.Scalar, [square, 1.0]),
            (aten.mul.Scalar, [square, True]),
            (aten.add.Scalar, [square, 1]),
            (aten.view.default, [square, [16]]),
        ]
        keys = {memory.key(func, args, {}) for func, args in calls}
        square.untyped_storage().resize_(4)  # FSDP2 gives weights back and gets them again
        keys.add(memory.key(aten.view.default, [square, [16]], {}))
    assert None not in keys
    assert len(keys) == len(calls) + 1


def test_what_follows_from_more_than_shapes_has_no_key(fake_mode: FakeTensorMode) -> None:
    memory, real, others = Results(fake_mode), empty(4), FakeTensorMode()
    with others:
        foreign = empty(4)
    with fake_mode:
        own, mask, complex_ = empty(4), empty(4, dtype=torch.bool), empty(4, dtype=torch.complex64)
        constant = torch.tensor(1.0)
        calls = [
            (aten.neg.default, [real]),
            (aten.neg.default, [foreign]),
            (aten.neg.default, [constant]),
            (aten.neg.default, [complex_]),
            (aten.index.Tensor, [own, [mask]]),
            (aten.nonzero.default, [own]),
            (aten.t_.default, [empty(2, 3)]),
            (aten._local_scalar_dense.default, [own]),
        ]
        assert [memory.key(func, args, {}) for func, args in calls] == [None] * len(calls)


def test_results_of_another_kind_are_computed_each_time(fake_mode: FakeTensorMode) -> None:
    memory = Results(fake_mode)
    with fake_mode:
        args = [empty(3), empty(3)]
        key = memory.key(aten.is_same_size.default, args, {})
        assert [memory.of(key, lambda *_, answer=answer: answer, args, {}) for answer in (True, False)] == [True, False]
