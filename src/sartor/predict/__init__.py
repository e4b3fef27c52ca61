"""The forecast: trace the real step on fake tensors, and say what it will need."""

from sartor.predict.largest import LargestSteps
from sartor.predict.ledger import KINDS, Ledger, Peak
from sartor.predict.memory import MemoryForecast, forecast_memory
from sartor.predict.module import forecast_module
from sartor.predict.trace import trace_steps
from sartor.predict.tracker import StorageTracker
from sartor.predict.whole import count_trained

__all__ = [
    "KINDS",
    "LargestSteps",
    "Ledger",
    "MemoryForecast",
    "Peak",
    "StorageTracker",
    "count_trained",
    "forecast_memory",
    "forecast_module",
    "trace_steps",
]
