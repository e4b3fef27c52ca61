"""Several processes of one machine: gradients in memory that all of them see, and each makes its part of the update.

Every process puts its gradients where the others can read them. When all are there, each adds its part of every parameter up over
the processes, in float32 and in the order of ranks; updates that part with optimizer state that it alone has (ZeRO stage 1,
Rajbhandari et al. 2020, arXiv 1910.02054); and puts the new weights where its gradients were, from where the others copy them.
Weights are each process's own: on a machine of several NUMA nodes they lie beside the cores that read them.

The memory is a file without a name (`memfd_create`): the system takes it back when the last process ends, however it ends.
Where there is none, or where processes are on several machines, `sartor.step.processes` sends.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.adam import MasterAdamW
from sartor.step.processes import World, when_ready

PAGE = 4096
"""Bytes at whose multiples a parameter's memory begins: pages are where they were touched first."""
LINE = 64
"""Elements at whose multiples a parameter is divided: whole vector registers, whole cache lines."""
PIECE = 2**18
"""Elements added up at once where more than two are added, so that their float32 sum stays in cache."""
_WIDEST = 4
"""Bytes of an element of a gradient at most."""


@dataclass(kw_only=True)
class _Part:
    """A parameter, and what this process updates of it."""

    parameter: nn.Parameter
    bounds: list[int]
    """Where the ranks' parts begin, and the end."""
    offset: int
    """In bytes, within the gradients of a process."""
    shard: nn.Parameter | None
    """The same memory as this process's part of the parameter; None where that is empty."""
    first: set[str]
    """Keys of the state that the optimizer begins with."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Optimizer state of the whole parameter."""
    place: Tensor | None = None
    """Where this process's gradient lies."""
    taken: bool = False
    """Whether some process has a gradient of it in this step."""


class SharedGradients:
    """The gradients of a step, added up over the processes of a machine, and the optimizer's state, shared out among them.

    The optimizer is changed: it updates this process's part of every parameter.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, world: World, memory: Tensor | None
    ) -> None:
        """`memory`: of `memory_bytes`, the same in all processes; None where the step is only traced, as the first of them."""
        self._world, self._memory = world, memory
        self._parts: list[_Part] = []
        self._read: Any = None
        keys = _made_by(optimizer)
        end = 0
        for parameter in parameters.values():
            bounds = _bounds(parameter.numel(), world.size)
            first, last = bounds[world.rank : world.rank + 2]
            shard = nn.Parameter(parameter.detach().view(-1)[first:last]) if last > first else None
            start = set(optimizer.state.get(parameter, {}))
            self._parts.append(_Part(parameter=parameter, bounds=bounds, offset=end, shard=shard, first=start))
            end += _pages(parameter.numel() * _WIDEST)
            when_ready(parameter, self._keep)
        self._gradient_bytes, states = end, end * world.size
        self._of = {part.parameter: part for part in self._parts}
        for part in self._parts:
            states = self._move_state(part, optimizer, keys, states)
        for group in optimizer.param_groups:
            shards = [self._of[parameter].shard for parameter in group["params"]]
            group["params"] = [shard for shard in shards if shard is not None]

    def expect(self, tokens: Tensor) -> None:
        """The step that comes has these tokens; it makes no difference here."""

    def begin(self) -> None:
        """The backward pass that comes is this process's last of the step; it makes no difference here."""

    @torch.no_grad()
    def finish(self) -> None:
        """When all processes have their gradients: add this process's parts up. A parameter that no process has a
        gradient for has none."""
        absent = [float(part.parameter.grad is None) for part in self._parts]
        for part in self._parts:
            if part.parameter.grad is None and self._memory is not None:
                part.parameter.grad = self._place(part).zero_()
        missing = absent if self._memory is None else self._world.sum(*absent)
        for part, count in zip(self._parts, missing, strict=True):
            part.taken = count < (1 if self._memory is None else self._world.size)
            if not part.taken:
                part.parameter.grad = None
            elif part.shard is not None:
                own = self._sum(part)
                part.shard.grad_dtype = own.dtype
                part.shard.grad = own

    def updated(self) -> list[nn.Parameter]:
        """What this process updates in this step."""
        return [part.shard for part in self._parts if part.shard is not None and part.shard.grad is not None]

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from that of this process's parts."""
        if self._memory is None:
            return norm
        (squares,) = self._world.sum(float(norm) ** 2)
        return torch.tensor(math.sqrt(squares), dtype=torch.float32)

    @torch.no_grad()
    def publish(self) -> None:
        """Hand this process's new weights out, and take the others'."""
        if self._memory is None:
            return
        taken, own = [part for part in self._parts if part.taken], self._world.rank
        for part in taken:
            if part.shard is not None:
                self._new_weights(part, own).copy_(part.shard)
        self._world.sum(0.0)
        for part in taken:
            flat = part.parameter.detach().view(-1)
            for rank in range(self._world.size):
                if rank != own:
                    flat[slice(*part.bounds[rank : rank + 2])].copy_(self._new_weights(part, rank))
        self._read = self._world.reached()

    def discard(self) -> None:
        """Free the gradients."""
        for part in self._parts:
            part.parameter.grad = None
            if part.shard is not None:
                part.shard.grad = None

    def state(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimizer's state of a whole parameter, as one process would have it. For the first process, between steps."""
        part = self._of[parameter]
        assert part.shard is not None, "the first process has a part of every parameter"
        own = optimizer.state[part.shard]
        step = {"step": own["step"]} if "step" in own and float(own["step"]) else {}
        return step | {key: value for key, value in part.whole.items() if step or key in part.first}

    def put_state(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, key: str, value: Tensor) -> None:
        """Take over what `state` gave."""
        part = self._of[parameter]
        if part.shard is None:
            return
        own = optimizer.state[part.shard][key]
        first, last = part.bounds[self._world.rank : self._world.rank + 2]
        own.copy_(value if key == "step" else value.reshape(-1)[first:last])

    @property
    def own_bytes(self) -> int:
        """Of the memory that all see, what this process has written."""
        gradients = [part.place for part in self._parts if part.place is not None]
        states = [
            (part.bounds[self._world.rank + 1] - part.bounds[self._world.rank]) * value.element_size()
            for part in self._parts
            for value in part.whole.values()
        ]
        return sum(gradient.numel() * gradient.element_size() for gradient in gradients) + sum(states)

    def _keep(self, parameter: Tensor) -> None:
        """A gradient is there, or was added to: it lies where all can see it."""
        assert parameter.grad is not None, "its hook was called"
        if self._read is not None:  # until all have read what lies there
            self._read.wait()
            self._read = None
        part = self._of[parameter]  # type: ignore[index]
        place = self._place(part, parameter.grad.dtype)
        if parameter.grad is not place:
            with torch.no_grad():
                place.copy_(parameter.grad)
            parameter.grad = place

    def _place(self, part: _Part, dtype: torch.dtype | None = None) -> Tensor:
        parameter = part.parameter
        dtype = dtype or parameter.grad_dtype or parameter.dtype
        if part.place is None or part.place.dtype != dtype:
            if self._memory is None:
                part.place = torch.empty_like(parameter, dtype=dtype)
            else:
                part.place = self._gradient(part, self._world.rank, dtype).view(parameter.shape)
        return part.place

    def _gradient(self, part: _Part, rank: int, dtype: torch.dtype) -> Tensor:
        """A process's gradient of a parameter, flat."""
        assert self._memory is not None, "a step that is traced has no others"
        start = rank * self._gradient_bytes + part.offset
        return self._memory[start : start + part.parameter.numel() * dtype.itemsize].view(dtype)

    def _new_weights(self, part: _Part, rank: int) -> Tensor:
        """Where the process that updates a part puts its new weights: over that part of its own gradient, which it alone
        reads."""
        assert part.place is not None, "its gradient was there"
        first, last = part.bounds[rank : rank + 2]
        place = self._gradient(part, rank, part.place.dtype)[first:last]
        return place.view(torch.uint8)[: (last - first) * part.parameter.element_size()].view(part.parameter.dtype)

    def _sum(self, part: _Part) -> Tensor:
        """This process's part of a gradient, added up where its own lies. Rounded once, in the gradient's format."""
        assert part.place is not None, "its gradient is there"
        own, dtype = slice(*part.bounds[self._world.rank : self._world.rank + 2]), part.place.dtype
        total = part.place.view(-1)[own]
        if self._memory is None:
            return total
        all_of_them = [self._gradient(part, rank, dtype)[own] for rank in range(self._world.size)]
        if len(all_of_them) == 2:
            return torch.add(*all_of_them, out=total)
        for pieces in zip(total.split(PIECE), *(one.split(PIECE) for one in all_of_them), strict=True):
            piece = pieces[1].to(torch.float32, copy=True)
            for more in pieces[2:]:
                piece = piece.add_(more)
            pieces[0].copy_(piece)
        return total

    def _move_state(self, part: _Part, optimizer: torch.optim.Optimizer, keys: Mapping[str, torch.dtype | None], at: int) -> int:
        """Give a part the state that the optimizer makes in its first step, and what it has already, in memory that all see from
        `at` on; returns where that ends."""
        before = optimizer.state.pop(part.parameter, {})
        formats = {key: dtype or part.parameter.dtype for key, dtype in keys.items()} | {k: v.dtype for k, v in before.items()}
        first, last = part.bounds[self._world.rank : self._world.rank + 2]
        own: dict[str, Tensor] = {"step": torch.zeros(())} if keys else {}
        for key, dtype in formats.items():
            size = part.parameter.numel() * dtype.itemsize
            if self._memory is None:
                part.whole[key] = own[key] = torch.zeros(last - first, dtype=dtype)
            else:
                part.whole[key] = self._memory[at : at + size].view(dtype).view(part.parameter.shape)
                own[key] = part.whole[key].view(-1)[first:last]
            if key in before:
                own[key].copy_(before[key].reshape(-1)[first:last])
            at += _pages(size)
        if part.shard is not None:
            optimizer.state[part.shard].update(own)
        return at


def memory_bytes(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, processes: int) -> int:
    """What `SharedGradients` needs at most. What is not touched takes no memory."""
    made = _made_by(optimizer)
    total = 0
    for parameter in parameters.values():
        total += processes * _pages(parameter.numel() * _WIDEST)
        widths = [(dtype or parameter.dtype).itemsize for dtype in made.values()]
        widths += [value.dtype.itemsize for value in optimizer.state.get(parameter, {}).values()]
        total += sum(_pages(parameter.numel() * width) for width in widths)
    return total


def can_share(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether this system and these parameters allow it."""
    plain = all(p.is_cpu and p.is_contiguous() and p.element_size() <= _WIDEST for p in parameters.values())
    return plain and hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


def shared_memory(world: World, size_bytes: int) -> Tensor | None:
    """Bytes, all zero, that all processes of the world see; None where they cannot, the same in all of them."""
    made: tuple[int, int, str] | None = None
    with contextlib.ExitStack() as stack:
        if world.leads:
            made = stack.enter_context(_made(size_bytes))
        told = world.lead(made)
        found = None if told is None else _mapped(told, size_bytes)
        (missing,) = world.sum(float(found is None))
    return None if missing else found


@contextlib.contextmanager
def _made(size_bytes: int) -> Iterator[tuple[int, int, str] | None]:
    """Process, number and name of a file in memory, until the others have it."""
    name = f"sartor-{secrets.token_hex(16)}"
    try:
        file = os.memfd_create(name)
    except (AttributeError, OSError):
        yield None
        return
    try:
        os.ftruncate(file, size_bytes)
        yield os.getpid(), file, name
    finally:
        os.close(file)


def _mapped(told: tuple[int, int, str], size_bytes: int) -> Tensor | None:
    """The file that `_made` tells of; None where it is not here: its process may be on another machine, or in a container."""
    process, number, name = told
    path = Path(f"/proc/{process}/fd/{number}")
    try:
        if name not in str(path.readlink()):
            return None
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return torch.frombuffer(mmap.mmap(file, size_bytes), dtype=torch.uint8)
    except OSError:
        return None
    finally:
        os.close(file)


def _made_by(optimizer: torch.optim.Optimizer) -> dict[str, torch.dtype | None]:
    """State that an optimizer makes for a parameter in its first step, with its format (None: the parameter's); `step` besides,
    where there is any."""
    if isinstance(optimizer, MasterAdamW):
        return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    return {"exp_avg": None, "exp_avg_sq": None} if isinstance(optimizer, torch.optim.AdamW) else {}


def _bounds(count: int, ranks: int) -> list[int]:
    """Where the parts of so many elements begin, and the end. The first part is never empty."""
    return [min(-(-count * rank // (ranks * LINE)) * LINE, count) for rank in range(ranks)] + [count]


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE) * PAGE
