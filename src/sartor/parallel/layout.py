"""How a model is laid out over devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh, outermost first: pipeline stages, replicas, shards, context and tensor parallel ranks. One device by
    default."""

    pipeline: int = 1
    replicate: int = 1
    """Copies of everything, gradients averaged among them (HSDP where there are shards as well)."""
    shard: int = 1
    """Devices that share one copy of what `zero` says."""
    context: int = 1
    """Devices that share the tokens of a row, and what the shards share."""
    tensor: int = 1
    zero: int = 3
    """Of the shards: 1 optimizer state, 2 gradients as well, 3 weights as well (FSDP2 with resharding after forward)."""
    sequence: bool = False
    """Sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198): between tensor parallel regions, tokens are sharded."""
    schedule: str = "1f1b"
    """Of the pipeline: gpipe or 1f1b."""
    gather: str = "as-stored"
    """Format in which FSDP2 gathers weights; gradients are reduced in float32 where it is a smaller one."""

    @property
    def devices(self) -> int:
        return self.pipeline * self.replicate * self.shared * self.tensor

    @property
    def shared(self) -> int:
        """Ranks that share one copy of what `zero` says: shards, and the context parallel ranks of each."""
        return self.shard * self.context

    @property
    def wrapped(self) -> bool:
        """Whether FSDP2 wraps the model."""
        return self.replicate * self.shared > 1

    @property
    def data(self) -> int:
        """Ranks that see different examples."""
        return self.replicate * self.shard

    @property
    def communicators(self) -> int:
        """Groups of ranks to which one rank belongs."""
        return sum(size > 1 for size in (self.pipeline, self.replicate, self.shared, self.context, self.tensor))

    def describe(self) -> str:
        """In a few words; nothing for a single device."""
        parts = [
            f"ZeRO-{self.zero} over {self.shared}" if self.shared > 1 else "",
            f"{self.replicate} replicas" if self.replicate > 1 else "",
            f"context parallel {self.context}" if self.context > 1 else "",
            f"tensor parallel {self.tensor}{' with sequence parallelism' if self.sequence else ''}" if self.tensor > 1 else "",
            f"{self.pipeline} pipeline stages ({self.schedule})" if self.pipeline > 1 else "",
        ]
        return ", ".join(part for part in parts if part)
