"""Measuring what layouts cost on this machine, and how well the cost model predicts it."""

from bdlora_megatron.bench.plan import MODELS, BenchPlan, Setting, Variant
from bdlora_megatron.bench.run import Cell, measure

__all__ = ["MODELS", "BenchPlan", "Cell", "Setting", "Variant", "measure"]
