"""The forecast: trace the real step on fake tensors, and say what it will need."""

from sartor.predict.ledger import KINDS, Ledger, Peak
from sartor.predict.memory import MemoryForecast, forecast_memory
from sartor.predict.trace import StorageTracker, trace_steps

__all__ = ["KINDS", "Ledger", "MemoryForecast", "Peak", "StorageTracker", "forecast_memory", "trace_steps"]
