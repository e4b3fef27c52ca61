"""Where a model's weights are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from sartor.job.schema import ModelJob
from sartor.model import resolve, weights_folder


def test_weights_of_the_hub_are_found_in_its_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they can be streamed as those of a folder are."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--somebody--tiny/snapshots" / commit
    shutil.copytree(tiny, snapshot)
    refs = tmp_path / "models--somebody--tiny/refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    source = resolve(ModelJob(path="somebody/tiny"))
    assert source.has_weights
    assert weights_folder(source) == snapshot
    (snapshot / "model.safetensors").unlink()
    assert weights_folder(source) is None
    assert weights_folder(resolve(ModelJob(path=str(tiny)))) == tiny
