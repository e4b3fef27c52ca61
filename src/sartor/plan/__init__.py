"""The plan: the fastest strategy that fits, with its forecast."""

from sartor.plan.make import load_dtype, make, max_length
from sartor.plan.plan import Plan, Rejected
from sartor.plan.prepack import with_prepack
from sartor.plan.setting import batch_order
from sartor.plan.strategy import Strategy

__all__ = ["Plan", "Rejected", "Strategy", "batch_order", "load_dtype", "make", "max_length", "with_prepack"]
