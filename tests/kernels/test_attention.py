"""Attention by segments: what eager attention makes of every example alone, whatever else is in the row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from sartor.kernels import attend, attention, native
from sartor.kernels.attention import NAME, segment_attention, segments_are, unsuited
from sartor.kernels.matmul import has_tiles
from sartor.kernels.native import products_library
from sartor.kernels.segments import Segments
from sartor.model import ModelSource, build, skeleton

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
GEMMA3 = {**LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], scale: float, window: int) -> Tensor:
    """R T H E, example by example, by the definition."""
    sharing = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(sharing, 1) for tensor in (key, value))
    rows = []
    for row, inside in enumerate(lengths):
        parts, first = [], 0
        for length in inside:
            q, k, v = (tensor[row, :, first : first + length] for tensor in (query, key, value))
            distance = torch.arange(length)[:, None] - torch.arange(length)
            hidden = (distance < 0) | (distance >= (window or length))
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
            parts.append((scores.softmax(-1) @ v).transpose(0, 1))
            first += length
        parts.append(torch.zeros(query.shape[2] - first, query.shape[1], value.shape[-1]))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.fixture(params=["compiled", "without tiles", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Short examples in compiled loops, of this processor or of one that can do less; or as the products that a machine without a
    compiler computes."""
    if request.param == "products":
        monkeypatch.setattr(attention, "suits", lambda query: False)
    elif products_library() is None:
        pytest.skip("there is no C++ compiler")
    elif request.param == "without tiles":
        if not has_tiles():
            pytest.skip("this processor has no tiles")
        flags = "-fno-exceptions", "-ffp-contract=fast", "-mno-amx-tile"
        loaded = native.compiled("pairs", native._PRODUCTS, native._TILES, flags=flags)
        monkeypatch.setattr(attend, "products_library", lambda: loaded)
    return str(request.param)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To a few units in the last place of what the numbers are kept in, of the largest."""
    assert found.isfinite().all()
    exact = found.dtype == torch.float32
    difference = (found.float() - expected).abs().max()
    assert difference <= (3e-6 if exact else 2**-6) * expected.abs().max()
    assert exact or (found.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("lengths", "width", "heads", "groups", "window"),
    [
        ([[5, 9, 3], [17]], 20, 4, 2, 0),  # padding, shared keys
        ([[300, 7]], 310, 4, 4, 0),  # blocks of queries
        ([[290]], 290, 2, 1, 100),  # blocks within a window
        ([[530, 40]], 570, 2, 2, 0),  # longer than the compiled loops take
        ([[30, 31, 29, 60, 2, 1, 30]], 185, 4, 4, 5),  # several examples at once
        ([[100, 33], [64, 2]], 140, 6, 2, 40),  # windows that begin within a block
    ],
)
@pytest.mark.parametrize("sizes", [(8, 6), (64, 64), (40, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_softmax_attention_of_every_example(
    way: str,
    lengths: list[list[int]],
    width: int,
    heads: int,
    groups: int,
    window: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(lengths), width, count, size) for count, size in ((heads, sizes[0]), (groups, sizes[0]), (groups, sizes[1]))]
    inputs = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    segments = Segments(lengths, width)
    found = segment_attention(*inputs, segments.windowed(window) if window else segments, scale=0.3)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = plain(*exact, lengths, 0.3, window)
    gradient = torch.randn(found.shape, generator=generator).to(dtype)
    assert_close(found, expected)
    assert not found[:, max(map(sum, lengths)) :].any()
    given = torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, exact, gradient.float())
    for one, other in zip(*given, strict=True):
        assert_close(one, other)


def test_short_examples_are_computed_together_and_blocks_stay_in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments([[30, 31, 29, 60, 30, 200, 200]], 600)
    assert [len(group.where) for group in segments.groups(compiled=False)] == [1, 1, 1, 4]
    sizes = []
    product = attention._product
    monkeypatch.setattr(attention, "_product", lambda *args: sizes.append((made := product(*args)).numel()) or made)
    long = torch.randn(1, 1500, 4, 8).transpose(1, 2)
    segment_attention(long, long, long, Segments([[1500]], 1500), scale=1.0)
    assert max(sizes) <= attention.BLOCK_ELEMENTS


def source(kind: str, sizes: dict[str, Any]) -> ModelSource:
    return ModelSource(path=kind, config=AutoConfig.for_model(kind, **sizes), has_weights=False)


def gradients(model: nn.Module, examples: list[list[Tensor]], *, together: bool) -> dict[str, Tensor]:
    """Of the sum of all logits' squares of the real positions; `together`: the examples of a row in one row."""
    model.zero_grad()
    rows = examples if together else [[example] for row in examples for example in row]
    lengths = [[len(example) for example in row] for row in rows]
    width = max(map(sum, lengths))
    ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, 1)
    for r, row in enumerate(rows):
        filled = sum(lengths[r])
        ids[r, :filled], positions[r, :filled] = torch.cat(row), torch.cat([torch.arange(len(example)) for example in row])
        positions[r, filled:], real[r, :filled] = torch.arange(width - filled), 1
    segments = Segments(lengths, width) if model.config._attn_implementation == NAME else None
    with segments_are(segments):
        logits = model(input_ids=ids, position_ids=positions if together else None, use_cache=False).logits
    ((logits * real) ** 2).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("kind", "sizes"), [("llama", LLAMA), ("gemma3_text", GEMMA3)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_learns_the_same_from_packed_padded_and_eager_rows(kind: str, sizes: dict[str, Any], recompute: bool) -> None:
    torch.manual_seed(1)
    examples = [[torch.randint(0, 97, (length,)) for length in row] for row in ([11, 4], [9, 2, 2])]
    found = []
    for name, together in ((NAME, True), (NAME, False), ("eager", False)):
        model = build(source(kind, sizes), dtype=torch.float32, device="cpu", attention=name, seed=3).train()
        if recompute and name == NAME:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, examples, together=together))
    for one in found[:2]:
        for name, gradient in one.items():
            scale = float(found[2][name].abs().max())
            torch.testing.assert_close(gradient / scale, found[2][name] / scale, atol=2e-5, rtol=0)


def test_without_segments_it_is_the_usual_attention() -> None:
    models = [build(source("llama", LLAMA), dtype=torch.float32, device="cpu", attention=name, seed=3) for name in (NAME, "sdpa")]
    ids = torch.arange(12)[None]
    one, other = (model.eval().generate(ids, max_new_tokens=5, do_sample=False) for model in models)
    assert one.tolist() == other.tolist()


def test_under_autocast_it_computes_in_bfloat16() -> None:
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = segment_attention(query, query, query, Segments([[6]], 6), scale=1.0)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("llama", LLAMA, ""),
        ("gemma3_text", GEMMA3, ""),
        ("llama", {**LLAMA, "attention_dropout": 0.1}, "drops attention probabilities out"),
        ("gemma2", {**LLAMA, "head_dim": 8}, "softcap"),
        ("gpt_oss", {**LLAMA, "head_dim": 8, "num_local_experts": 2}, "s_aux"),
        ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 1}, "cannot run with it"),
    ],
)
def test_models_it_cannot_serve_are_told_with_the_reason(kind: str, sizes: dict[str, Any], why: str) -> None:
    said = unsuited(skeleton(source(kind, sizes), dtype=torch.bfloat16, attention=NAME))
    assert why in said
    assert bool(why) == bool(said)


def test_the_saved_configuration_does_not_name_it(tmp_path: Any) -> None:
    build(source("llama", LLAMA), dtype=torch.float32, device="cpu", attention=NAME, seed=0).save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_padding_gets_no_gradient() -> None:
    query = torch.from_numpy(np.ones((1, 2, 5, 4), dtype=np.float32)).requires_grad_()
    result = segment_attention(query, query, query, Segments([[3]], 5), scale=1.0)
    result.sum().backward()
    assert query.grad is not None
    assert result[0, 3:].abs().sum() == query.grad[0, :, 3:].abs().sum() == 0


@pytest.mark.parametrize(("window", "heads"), [(0, 2), (9, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_that_continue_another_one_attend_to_both(way: str, window: int, heads: int, dtype: torch.dtype) -> None:
    """Two beginnings, one of them shared by segments of several lengths, one of them long; and a segment of its own."""
    lengths, parents = [[11, 5, 7, 140, 5, 3, 20, 4, 4]], [[-1, 0, 0, 0, 0, -1, -1, 6, 6]]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn((1, 200, count, 8), generator=generator).to(dtype).transpose(1, 2) for count in (heads, 2, 2)]
    inputs, exact = [tensor.requires_grad_() for tensor in tensors], [tensor.float().requires_grad_() for tensor in tensors]
    segments = Segments(lengths, 200, continues=parents)
    found = segment_attention(*inputs, segments.windowed(window) if window else segments, scale=0.3)
    starts = np.cumsum([0, *lengths[0]])
    expected = torch.zeros_like(found, dtype=torch.float32)
    for number, parent in enumerate(parents[0]):
        own = torch.arange(starts[number], starts[number + 1])
        whole = own if parent < 0 else torch.cat([torch.arange(starts[parent], starts[parent + 1]), own])
        alone = plain(*(tensor[:, :, whole] for tensor in exact), [[len(whole)]], 0.3, window)
        expected = expected.index_copy(1, own, alone[:, -len(own) :])
    gradient = torch.randn(found.shape, generator=generator).to(dtype)
    assert_close(found, expected)
    given = torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, exact, gradient.float())
    for one, other in zip(*given, strict=True):
        assert_close(one, other)
