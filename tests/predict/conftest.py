"""What tests of forecasts share."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from sartor.predict import results


@pytest.fixture
def fake_mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A trace's mode; nothing is remembered yet of what operators return."""
    monkeypatch.setattr(results, "_RECIPES", {})
    return results.fake_mode()
