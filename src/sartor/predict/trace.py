"""Trace the user's real step on fake tensors: no weights, no device, no memory; every allocation seen.

The model is built on the meta device (PEFT cannot swap parameters of fake tensors), its parameters are made anew as fake
ones, and two optimizer steps run: the second is the peak, because by then the optimizer's state exists.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.data.pack import Batch
from sartor.predict.ledger import Event, Ledger
from sartor.predict.target import Target
from sartor.step import TensorBatch, TrainStep


class StorageTracker(TorchDispatchMode):
    """Follows every storage from the first operator that returns it until it dies. Works on fake and on real tensors."""

    def __init__(self, *, packed: bool = False, target: Target | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self.phase = "build"
        self._modules: list[str] = []
        self._packed = packed
        self._target = target or Target(kind="cpu")
        self._sizes: dict[int, int] = {}
        self._serials: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            # The one question that models ask of values while they build the mask: is there a single segment a row?
            return not self._packed
        if func is torch.ops.aten._grouped_mm.default and _is_fake(args[0]) and args[0].dtype != torch.bfloat16:
            result = _grouped_mm(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        scratch = self._target.transient_bytes(func, args)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        if scratch:
            self._note_scratch(scratch)
        return result

    def see(self, tensor: torch.Tensor) -> int:
        """Note the tensor's storage, if it is new; return its serial number in the ledger."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._serials[key] = self._count
            self._count += 1
            self._note(key, storage.nbytes())
            weakref.finalize(storage, self._free, key)
        return self._serials[key]

    def begin(self, phase: str) -> None:
        """A new phase; no module of the last one runs on."""
        self.phase = phase
        self._modules.clear()

    def mark(self, tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor], kind: str) -> None:
        """Say what these tensors' storages are."""
        for tensor in tensors:
            self.ledger.kinds[self.see(tensor)] = kind

    def follow(self, model: nn.Module) -> None:
        """Note which module runs, from now on, for as long as the model lives."""
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(lambda *_, path=path: self._modules.append(path))
                module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        # Recomputation stops a block early, by an exception that hooks of its inner modules may not see.
        if self._modules:
            self._modules.pop()

    def _free(self, key: int) -> None:
        self._note(key, -self._sizes.pop(key))
        del self._serials[key]

    def _note_scratch(self, size_bytes: int) -> None:
        """Memory that came and went inside an operator, beside its results."""
        for size in (size_bytes, -size_bytes):
            self._append(self._count, size)
        self._count += 1

    def _note(self, key: int, size_bytes: int) -> None:
        self._append(self._serials[key], size_bytes)

    def _append(self, serial: int, size_bytes: int) -> None:
        module = self._modules[-1] if self._modules else ""
        self.ledger.events.append(Event(storage=serial, size_bytes=size_bytes, phase=self.phase, module=module))


def trace_steps(
    model: nn.Module,
    make_step: Callable[[nn.Module], TrainStep],
    batches: Sequence[Batch],
    *,
    steps: int = 2,
    target: Target | None = None,
) -> Ledger:
    """Two training steps of a model that lives on the meta device, each over these micro-batches.

    `make_step` builds the same `TrainStep` that the run will use.
    """
    packed = any(_has_borders(batch) for batch in batches)
    tracker = StorageTracker(packed=packed, target=target)
    trained_tokens = max(sum(batch.trained_tokens for batch in batches), 1)
    with _quiet_logs(), FakeTensorMode(allow_non_fake_inputs=True), _values_allowed(), tracker:
        _materialise(model)
        tracker.mark([*model.parameters(), *model.buffers()], "weights")
        tracker.follow(model)
        step = make_step(model)
        for number in range(steps):
            run_traced_step(tracker, step, batches, trained_tokens, number=number)
        tracker.begin("end")
    return tracker.ledger


def run_traced_step(
    tracker: StorageTracker, step: TrainStep, batches: Sequence[Batch], trained_tokens: int, *, number: int, device: str = "cpu"
) -> None:
    """One step under the tracker, its phases and kinds named."""
    tracker.begin(f"step {number + 1}: forward and backward")
    on_device = [TensorBatch.of(batch, device) for batch in batches]
    step.backward(on_device, trained_tokens)
    tracker.mark([p.grad for p in step.parameters.values() if p.grad is not None], "gradients")
    tracker.begin(f"step {number + 1}: update")
    step.update(1e-4)
    states = [value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    tracker.mark(states, "optimizer")


def _materialise(model: nn.Module) -> None:
    """Replace meta parameters and buffers by fake CPU ones, keeping ties and what trains."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """What cannot be traced is said once, in the forecast, not in a log as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _values_allowed() -> Iterator[None]:
    """Let transformers take the branch of a real run, not the one it keeps for tracers, when it builds attention masks."""
    from transformers import masking_utils

    original = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = original


def _grouped_mm(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The experts' product in float32: the CPU computes it, but PyTorch's shape rule (2.13) knows bfloat16 only."""
    first, second, *rest = args
    result: torch.Tensor = func(first.to(torch.bfloat16), second.to(torch.bfloat16), *rest, **kwargs)
    return result.to(first.dtype)


def _has_borders(batch: Batch) -> bool:
    """Whether some row holds several segments: positions that do not simply go on (padding is a segment too)."""
    return batch.position_ids_RT is not None and bool((np.diff(batch.position_ids_RT, axis=1) != 1).any())


def _is_fake(value: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)
