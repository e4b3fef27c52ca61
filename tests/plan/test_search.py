"""The search chooses what trying every candidate would choose; its estimates are near the forecasts that decide."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sartor.job import from_mapping
from sartor.machine.catalogue import DeviceModel
from sartor.machine.probe import Machine
from sartor.model import resolve
from sartor.plan.estimate import Estimator
from sartor.plan.forecast import forecast_of
from sartor.plan.make import make
from sartor.plan.search import search
from sartor.plan.setting import Setting
from sartor.plan.space import candidates
from sartor.plan.timing import Timing, rates_of, traced_positions

from ..support import card, setting_of  # noqa: F401
