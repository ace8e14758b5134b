"""Fine-tuning on Megatron-Core, from YAML to an adapter that PEFT loads.

``schema`` and ``config`` are the settings, ``examples`` and ``data`` what is learnt, ``model`` and
``step`` the computation, ``checkpoint`` and ``resume`` what a run keeps, ``loop`` the run itself,
``launch`` and ``cli`` how it is started.
"""

from bdlora_megatron.train.config import from_mapping, load_config, to_mapping
from bdlora_megatron.train.schema import TrainConfig

__all__ = ["TrainConfig", "from_mapping", "load_config", "to_mapping"]
