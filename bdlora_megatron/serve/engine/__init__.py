"""One rank's engine: Megatron-Core's dynamic engine with an adapter for every request."""

from bdlora_megatron.serve.engine.admission import Admission
from bdlora_megatron.serve.engine.engine import ServingEngine
from bdlora_megatron.serve.engine.options import EngineOptions

__all__ = ["Admission", "EngineOptions", "ServingEngine"]
