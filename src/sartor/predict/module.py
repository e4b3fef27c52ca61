"""The forecast of any PyTorch module's training step: no job, no transformers, nothing but the module and a loss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.errors import ModelError
from sartor.predict.ledger import Ledger, Peak
from sartor.predict.results import fake_mode
from sartor.predict.target import Target
from sartor.predict.trace import PASSES, _materialise, _quiet_logs, _values_allowed
from sartor.predict.tracker import StorageTracker

Loss = Callable[[Any, Any], Tensor]
"""(module, batch) → a scalar to call `backward` on."""
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def forecast_module(
    make_module: Callable[[], nn.Module], sample: Any, loss: Loss, optimizer: MakeOptimizer, *, target: Target | None = None
) -> Peak:
    """The peak of training what `make_module` returns, in bytes, on batches like `sample`; nothing is computed.

    `make_module` is called on the meta device and its module is used up. `sample`: tensors in lists, tuples and dictionaries,
    of which only shapes and formats count. `loss(module, batch)` gives the scalar, `optimizer(parameters)` the optimizer of those
    that train. Mixed precision is `torch.autocast("cpu", …)` inside of `loss`. `target`: the device meant, a CPU by default.

    Raises ModelError where the step cannot be traced.
    """
    return trace_module(make_module, sample, loss, optimizer, target=target).peak()


def trace_module(
    make_module: Callable[[], nn.Module], sample: Any, loss: Loss, optimizer: MakeOptimizer, *, target: Target | None = None
) -> Ledger:
    """The ledger behind `forecast_module`: two steps, since the optimizer's state exists from the first update on."""
    tracker = StorageTracker(target=target)
    try:
        with torch.device("meta"):
            module = make_module()
        with _quiet_logs(), fake_mode(), _values_allowed(), tracker, _NoValues(tracker):
            _materialise(module)
            run_module_steps(tracker, module, lambda: pytree.tree_map_only(Tensor, _blank, sample), loss, optimizer)
            tracker.close()
    except ModelError:
        raise
    except Exception as error:  # whatever foreign code raises on tensors without values
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        remedy = "keep tensors in parameters or buffers, and decisions on their values out of the step"
        raise ModelError("this module's training step cannot be traced", why=why, remedy=remedy) from error
    return tracker.ledger


def run_module_steps(
    tracker: StorageTracker, module: nn.Module, make_batch: Callable[[], Any], loss: Loss, optimizer: MakeOptimizer
) -> None:
    """Two steps under the tracker, on fake tensors or on real ones."""
    tracker.mark([*module.parameters(), *module.buffers()], "weights")
    tracker.follow(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    chosen = optimizer(trained)
    for number in (1, 2):
        tracker.begin(f"step {number}: {PASSES}")
        loss(module, make_batch()).backward()
        tracker.mark([parameter.grad for parameter in trained if parameter.grad is not None], "gradients")
        tracker.begin(f"step {number}: update")
        chosen.step()
        for state in chosen.state.values():
            tracker.mark([value for value in state.values() if isinstance(value, Tensor)], "optimizer")
        chosen.zero_grad()


def _blank(tensor: Tensor) -> Tensor:
    """A tensor like this one, of the trace."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


class _NoValues(TorchDispatchMode):
    """Refuses a module's questions about values, which a forecast cannot answer, but for one: transformers asks, while it builds
    attention masks, whether nothing is padded. The tracker says yes. (Optimizers ask for the number of the step.)"""

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker = tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor)
        if asks and PASSES in self._tracker.phase and not _builds_mask():
            raise ModelError(
                "this module's training step cannot be traced",
                why="it decides by the values of its tensors, and a forecast has none",
                remedy="keep decisions on values out of the step",
            )
        return func(*args, **(kwargs or {}))


def _builds_mask() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "transformers.masking_utils":
            return True
    return False
