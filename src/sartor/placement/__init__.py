"""Placement: rows of a model live on lower tiers and come to the device when they are used."""

from sartor.model.rows import Row, find_rows
from sartor.placement.engine import Engine
from sartor.placement.prepare import PlacedOptimizer, prepare
from sartor.placement.step import PlacedStep
from sartor.placement.tiers import DiskTier, HostTier

__all__ = ["DiskTier", "Engine", "HostTier", "PlacedOptimizer", "PlacedStep", "Row", "find_rows", "prepare"]
