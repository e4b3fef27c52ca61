"""PyTorch's parallelism, applied to a model from a layout: FSDP2, DTensor tensor parallelism, pipelining."""

from sartor.parallel.apply import parallelise, parallelise_stage
from sartor.parallel.layout import Layout

__all__ = ["Layout", "parallelise", "parallelise_stage"]
