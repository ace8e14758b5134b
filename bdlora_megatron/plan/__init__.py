"""A cost model: what an adapter costs beside its base model, by layout, before it is run.

`work` counts what one rank computes and sends, exactly; `hardware` says how fast a machine does
that; `predict` multiplies. Nothing here imports Megatron-Core or touches a device.
"""

from bdlora_megatron.models.shape import Linear, ModelShape
from bdlora_megatron.plan.hardware import (
    HARDWARE,
    Device,
    Hardware,
    Link,
    Protocol,
    find_hardware,
)
from bdlora_megatron.plan.memory import MemoryPlan, adapter_bytes, memory_plan
from bdlora_megatron.plan.model import PRESETS
from bdlora_megatron.plan.predict import StepTime, predict_step
from bdlora_megatron.plan.training import TrainStep, predict_training
from bdlora_megatron.plan.work import (
    AdapterLoad,
    Message,
    Product,
    Step,
    Work,
    adapter_work,
    base_layer_work,
)

__all__ = [
    "HARDWARE",
    "PRESETS",
    "AdapterLoad",
    "Device",
    "Hardware",
    "Linear",
    "Link",
    "MemoryPlan",
    "Message",
    "ModelShape",
    "Product",
    "Protocol",
    "Step",
    "StepTime",
    "TrainStep",
    "Work",
    "adapter_bytes",
    "adapter_work",
    "base_layer_work",
    "find_hardware",
    "memory_plan",
    "predict_step",
    "predict_training",
]
