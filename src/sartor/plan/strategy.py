"""How a job is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sartor.job.units import format_bytes
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.parallel import Layout
from sartor.plan.table import Sizes, Table
from sartor.step import Precision

_NAMES = {"weights": "weights", "gradients": "gradients", "state": "optimizer state", "activations": "activations"}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which rows of the model live in main memory below an accelerator, or on disk, while nothing computes with them
    (`sartor.placement`)."""

    table: Table
    limit_bytes: int
    """Of what moves, at most so much is in memory at once in forward and backward passes."""
    update_limit_bytes: int
    """The same in an update."""
    disk_bytes: int
    host_bytes: int = 0
    """In main memory, below an accelerator."""

    def memory_bytes(self, sizes: Sequence[Sizes]) -> int:
        """At most so much of weights, gradients and state is in memory."""
        return self.table.kept_bytes(sizes) + max(self.limit_bytes, self.update_limit_bytes)

    def describe(self) -> str:
        """In words."""
        total = len(self.table.rows)
        return "; ".join(
            f"{self._parts(tier, total)} {where} ({format_bytes(size)})"
            for tier, where, size in (("host", "in main memory", self.host_bytes), ("disk", "on disk", self.disk_bytes))
            if size
        )

    def _parts(self, tier: str, total: int) -> str:
        """What lives on a tier: `optimizer state of 34 rows, weights of 20`, largest groups first."""
        counts: dict[int, list[str]] = {}
        for kind, name in _NAMES.items():
            count = sum(getattr(row, kind) == tier for row in self.table.rows)
            if count:
                counts.setdefault(count, []).append(name)
        parts = [
            f"{' and '.join(', '.join(names).rsplit(', ', 1))} of {'all' if count == total else count} blocks"
            for count, names in sorted(counts.items(), reverse=True)
        ]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Everything that changes speed and memory, and nothing that changes the result."""

    device: str
    """As `torch.device` takes it."""
    threads: int
    precision: Precision
    packing: bool
    row_capacity: int
    """Tokens that fit in a row; the method's virtual tokens come on top."""
    micro_batch: int
    """Rows computed at once; the other rows of a step are accumulated."""
    recompute: bool
    """Whether activations are dropped in forward and computed again in backward."""
    attention: str | None
    """transformers' name of the attention kernel; None leaves it to transformers."""
    share_prefixes: bool = False
    """Whether what the examples of a row begin with lies there once."""
    prepack: bool = False
    """Whether frozen weights are laid out once for products by tiles."""
    recomputed: int | None = None
    """Where activations are recomputed, in how many blocks: the first ones, since backward frees what the last ones keep before
    it gets there. None: in all."""
    layout: Layout = field(default_factory=Layout)
    """Over how many devices, and how."""
    processes: int = 1
    """On a CPU: processes of `threads` threads each that share the examples of a step."""
    placement: Placement | None = None
    """None where everything stays in memory."""
    expandable_segments: bool = False
    """Whether the segments of PyTorch's CUDA allocator grow in place; there are none on other devices."""

    @property
    def joined(self) -> bool:
        """Whether the packed rows of a micro-batch are laid end to end, so that nothing is padding: attention by segments looks
        at every example by itself, however long the row is."""
        return self.packing and self.attention == SEGMENTS

    def describe(self) -> str:
        """The strategy in a sentence."""
        rows = f"packed rows of up to {self.row_capacity} tokens" if self.packing else "one example a row"
        rows += ", joined" if self.joined and self.micro_batch > 1 else ""
        rows += ", shared beginnings computed once" if self.share_prefixes else ""
        rows += ", frozen weights laid out once" if self.prepack else ""
        attention = f", attention {self.attention}" if self.attention else ""
        fixed = ", segments of fixed size" if self.device.startswith("cuda") and not self.expandable_segments else ""
        devices = f"{self.layout.devices} x {self.device.partition(':')[0]}, {self.layout.describe()}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        several = f"{self.processes} processes of {threads} on " if self.processes > 1 else ""
        where = devices if self.layout.devices > 1 else several + self.device
        start = f"{where}, {self.precision.describe()}, {rows}, micro-batch {self.micro_batch}"
        placed = f", {self.placement.describe()}" if self.placement else ""
        return f"{start}, {self.describe_activations()}{attention}{fixed}{placed}"

    def describe_activations(self) -> str:
        """What becomes of them."""
        if not self.recompute:
            return "activations kept"
        if self.recomputed is None:
            return "activations recomputed"
        return f"activations of {self.recomputed} block{'s' * (self.recomputed != 1)} recomputed"
