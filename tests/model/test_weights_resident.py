"""What loading takes, from the headers of weight files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sartor.model.weights import WeightFiles


def test_files_are_mapped_and_other_formats_copied(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10, 3), "b": torch.zeros(8, dtype=torch.bfloat16), "c": torch.zeros(5, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = 10 * 3 * 4 + 8 * 2 + 5 * 8
    assert WeightFiles(tmp_path).resident_bytes(torch.float32) == stored + 8 * 4
    assert WeightFiles(tmp_path).resident_bytes(torch.bfloat16) == stored + 10 * 3 * 2
