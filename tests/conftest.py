"""Small real models and data for every test; files of others through `shared`, skipped where they are absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process that a test starts compiles the package anew

import pytest
import torch

from ranks import collect_rarely
from sartor.kernels import arena
from sartor.kernels.native import library, products_library
from support import conversations, make_model, write_jsonl

with contextlib.suppress(ImportError):  # not on every machine with an accelerator
    from hypothesis import settings

    settings.register_profile("shared-machine", deadline=None)
    settings.load_profile("shared-machine")

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
KERNELS = REPOSITORY / "build/tests/kernels"
collect_rarely()


def pytest_configure() -> None:
    """Compiled loops, of all tests and of the processes that they start: compiling takes longer than most of them. They are kept
    between runs, under names that tell what they are made of; workers start when they are there."""
    KERNELS.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_CACHE", str(KERNELS.parent))
        for load in (products_library, library, arena.usable):
            load()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    (cache / "kernels").symlink_to(KERNELS)
    monkeypatch.setenv("SARTOR_CACHE", str(cache))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """The path of a file that is not part of the project; skips the test where it is absent."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"needs {relative}, which is not part of the project")
        return path

    return find


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder; read only."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def job_tree(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """A quick job as nested mappings: 24 conversations, 6 steps of 8."""
    return {
        "model": str(tiny),
        "data": {"path": str(write_jsonl(tmp_path / "train.jsonl", conversations(24)))},
        "method": "full",
        "training": {"epochs": 2, "global_batch": 8, "learning_rate": 1e-3, "tensorboard": False},
        "evaluation": {"generate": 0},
        "machine": {"device": "cpu", "threads": 1},
        "output": str(tmp_path / "run"),
    }
