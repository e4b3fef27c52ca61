"""From the operators of one micro-batch to those of another that holds something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sartor.data.pack import collate
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.kernels.native import products_library
from sartor.predict.contents import Contents, in_proportion
from sartor.predict.operations import Operations
from sartor.predict.whole import trace_job
from sartor.step import Precision

from .test_repeat import source
from .test_sharded import CPU

LENGTHS = (60, 36, 24, 24)


@pytest.mark.skipif(products_library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("packing", "traced", "meant"), [(True, [[0, 1]], [[0, 2, 3]]), (False, [[0], [1]], [[0], [2]])], ids=["packed", "padded"]
)
def test_another_micro_batch_computes_as_much(packing: bool, traced: list[list[int]], meant: list[list[int]]) -> None:
    """Packed it has more positions, and shorter examples; padded it has as many positions, of which fewer are trained."""
    samples = TokenSet.from_samples(
        [Sample(input_ids=np.arange(length) + 3, trained=np.arange(length) % 3 > 0, source="test") for length in LENGTHS]
    )
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})

    def computed(rows: list[list[int]]) -> tuple[Operations, Contents]:
        batch = collate(samples, rows, pad_id=0, packing=packing)
        options: dict[str, Any] = {"precision": Precision.of("float32"), "recompute": False, "attention": SEGMENTS}
        ledger = trace_job(job, source("llama"), [batch], CPU, **options)
        return ledger.operations.step(), Contents.of(batch, samples.lengths)

    (operations, given), (wanted, average) = computed(traced), computed(meant)
    found, scale = in_proportion(operations, given, average), average.positions / given.positions
    for kind in ("forward", "backward"):
        for family, of in (("attention", "flops"), ("matmul", "flops"), ("softmax", "bytes")):
            same = wanted.total(of, kind=kind, family=family)
            assert scale * found.total(of, kind=kind, family=family) == pytest.approx(same, rel=0.01)
            if kind == "forward" and family == ("attention" if packing else "softmax"):
                assert scale * operations.total(of, kind=kind, family=family) != pytest.approx(same, rel=0.01), "unchanged"
