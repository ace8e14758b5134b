"""Measuring what layouts cost on this machine, and how well the cost model predicts it."""

from bdlora_megatron.bench.plan import MODELS, Arm, BenchPlan, Setting
from bdlora_megatron.bench.run import Cell, measure

__all__ = ["MODELS", "Arm", "BenchPlan", "Cell", "Setting", "measure"]
