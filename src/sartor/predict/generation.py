"""Trace transformers' own `generate` on fake tensors: prefill of the prompt, then decoding with a cache that grows.

`generate` runs as it is; the few questions that it asks of values are answered for it: whether everything is finished (not before
the tokens that are wanted are made), and whether the attention mask is all ones (as the request says).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sartor.model.build import quiet
from sartor.model.regions import Reduction
from sartor.predict.ledger import OUTSIDE, Event, Ledger
from sartor.predict.repeat import expand
from sartor.predict.results import fake_mode
from sartor.predict.target import Target
from sartor.predict.trace import _materialise, _quiet_logs, _tag_weights, _values_allowed
from sartor.predict.tracker import StorageTracker

PREFILL, DECODE = "generate: prefill", "generate: decode"
CACHE = "cache"
"""The kind of the storages that hold keys and values, or the state of recurrent layers."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is generated: `answer` tokens after each of `batch` prompts of `prompt` tokens."""

    batch: int = 1
    prompt: int = 1024
    answer: int = 256
    cache: Literal["dynamic", "static"] = "dynamic"
    padded: bool = False
    """Whether the prompts differ in length, so that an attention mask goes along."""
    sampling: bool = False
    """Whether tokens are drawn (temperature, top-p) instead of the likeliest taken."""

    @property
    def length(self) -> int:
        """Tokens that the cache holds at the end: the last one that is chosen is not fed back."""
        return self.prompt + self.answer - 1


class GenerationTracker(StorageTracker):
    """Follows storages, and answers what `generate` asks of fake values."""

    def __init__(self, *, target: Target | None = None) -> None:
        super().__init__(target=target)
        self.padded = False
        self.finished: bool | None = None
        """The answer to the next question, where that is whether every answer is complete."""
        self._last = OUTSIDE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            answer, self.finished = self.finished, None
            return not self.padded if answer is None else answer
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, key: Any) -> None:
        """What is computed is not asked for: a forecast of generation is of memory alone."""

    def _enter(self, tag: int) -> None:
        super()._enter(tag)
        if tag != OUTSIDE:
            self._last = tag

    def _free(self, key: int) -> None:
        """Without a backward pass a layer's input goes when the layer has returned: that is part of the layer's work."""
        unit = self._unit
        if unit == OUTSIDE and self._units[key] == self._last - 1:
            self._unit = self._last
        super()._free(key)
        self._unit = unit


class _Pace:
    """A streamer: told of every token right before `generate` asks whether to stop."""

    def __init__(self, tracker: GenerationTracker, tokens: int) -> None:
        self._tracker, self._tokens = tracker, tokens
        self._made = -1  # the first call brings the prompt

    def put(self, value: torch.Tensor) -> None:
        self._made += 1
        if self._made:
            self._tracker.finished = self._made >= self._tokens
            self._tracker.begin(f"{DECODE} {self._made}")

    def end(self) -> None:
        pass


class GenerationTracer:
    """A model that lives on the meta device, made fake once; `trace` then follows any number of calls of `generate`."""

    def __init__(self, model: nn.Module, *, target: Target | None = None, reduction: Reduction | None = None) -> None:
        """`reduction`: what was left out of `model`; ledgers are of the whole one all the same."""
        self._model: Any = model.eval()
        self._reduction = reduction or Reduction()
        self._mode = fake_mode()
        self._tracker = GenerationTracker(target=target)
        with self._tracing():
            _materialise(model)
            self._tracker.mark([*model.parameters(), *model.buffers()], "weights")
            _tag_weights(self._tracker, model, self._reduction)
        self._tracker.follow(model, self._reduction)
        model.register_forward_hook(lambda module, inputs, output: self._tracker.mark(cache_tensors(output), CACHE))
        if target is not None and target.kind != "cpu":
            _decode_as_on_accelerators(model)
        self._build = list(self._tracker.ledger.events)

    @property
    def windows(self) -> list[int]:
        """Lengths at which the cache of some layers is full."""
        config = self._model.config.get_text_config()
        wanted = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return [window for window in wanted if isinstance(window, int)]

    def trace(self, request: Request, *, tokens: int) -> Ledger:
        """`generate` with this request, until so many tokens are made: the weights ('build'), PREFILL, and 'DECODE n' for every
        token after the first. Raises NotRepeatable where what was left out cannot be filled in."""
        tracker, events = self._tracker, self._tracker.ledger.events
        events.clear()
        tracker.padded = request.padded
        with self._tracing():
            tracker.begin(PREFILL)
            run_generate(self._model, request, streamer=_Pace(tracker, tokens))
        ours = [*self._build, *events]
        born = {event.storage for event in ours if event.size_bytes > 0}
        ours = [event for event in ours if event.size_bytes and event.storage in born]
        kinds = {storage: kind for storage, kind in tracker.ledger.kinds.items() if storage in born}
        self._settle(ours)
        done = f"{DECODE} {tokens}"
        return expand(Ledger(events=[event for event in ours if event.phase != done], kinds=kinds), self._reduction)

    def _settle(self, events: Sequence[Event]) -> None:
        """The next call finds what this one left: a quantised layer, say, keeps its bias in the format it first computed with."""
        freed = {event.storage for event in events if event.size_bytes < 0}
        left = [event for event in events if event.size_bytes > 0 and event.storage not in freed]
        self._build = [event._replace(phase="build") for event in left]
        self._tracker.ledger.kinds = {event.storage: self._tracker.ledger.kinds.get(event.storage, "weights") for event in left}

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        with _quiet_logs(), self._mode, _values_allowed(), self._tracker:
            yield


def run_generate(model: Any, request: Request, *, streamer: Any = None) -> None:
    """`model.generate` as the request says, on token ids that mean nothing."""
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if request.sampling:
        choice = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None}
    ids = torch.ones((request.batch, request.prompt), dtype=torch.long)
    mask = torch.ones_like(ids)
    if request.padded:
        mask[:-1, 0] = 0
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=request.answer,
            pad_token_id=0,
            cache_implementation="static" if request.cache == "static" else None,
            streamer=streamer,
            **choice,
        )


def cache_tensors(output: Any) -> list[torch.Tensor]:
    """What a model's output carries on to the next token: keys and values, or the state of recurrent layers."""
    found: dict[int, torch.Tensor] = {}
    for name in ("past_key_values", "cache_params", "state"):
        _collect(getattr(output, name, None), found, set())
    return list(found.values())


def _collect(value: Any, found: dict[int, torch.Tensor], seen: set[int]) -> None:
    """The tensors in `value`. No closure that calls itself: such a cycle would keep them alive until garbage is collected."""
    from transformers import PreTrainedConfig

    if id(value) in seen or isinstance(value, nn.Module | PreTrainedConfig | type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, found, seen)
    elif hasattr(value, "__dict__"):
        _collect(vars(value), found, seen)


def _decode_as_on_accelerators(model: Any) -> None:
    """Where the model is not on a CPU, `generate` decodes with another kernel for mixtures of experts: one that gathers the
    chosen experts' weights (transformers, `GenerationMixin._optimize_model_for_decode`). The trace runs on fake CPU tensors."""
    chosen: dict[str, str | None] = getattr(model, "get_experts_implementation", dict)()
    if "grouped_mm" not in chosen.values():
        return

    @contextlib.contextmanager
    def gathering() -> Iterator[None]:
        model.set_experts_implementation({name: "batched_mm" if way == "grouped_mm" else way for name, way in chosen.items()})
        try:
            yield
        finally:
            model.set_experts_implementation(chosen)

    model._optimize_model_for_decode = gathering
