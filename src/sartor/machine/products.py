"""Products in bfloat16 on a CPU: PyTorch's library (oneDNN) compiles code for each one's sizes, and keeps it.

That takes milliseconds, and 0.6 to 0.9 MiB each for sizes from 100 x 512 to 1000 x 512 (AVX-512 BF16). By default up to 1024 are
kept, twice: a run whose batches differ in size fills that with products that never come again.
"""

from __future__ import annotations

import os

KEPT_PRODUCTS = 256
"""What a model with adapters takes for one size of batch, several times."""
PRODUCT_BYTES = 768 * 2**10
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN and of PyTorch's own table of the same; read when the first product runs."""


def keep_few_products() -> None:
    """In this process, before its first product; what the environment says stays."""
    for name in _VARIABLES:
        os.environ.setdefault(name, str(KEPT_PRODUCTS))


def products_bytes(different: int) -> int:
    """What so many different products take that a run computes in bfloat16, in the course of it."""
    said = [os.environ.get(name, str(KEPT_PRODUCTS)) for name in _VARIABLES]
    most = max((int(value) for value in said if value.isdigit()), default=KEPT_PRODUCTS)
    return min(different, most) * PRODUCT_BYTES
