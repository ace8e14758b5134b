"""What Megatron-Core's distributed optimizer lacks where Adam is torch's, as on a CPU.

With Apex's or Transformer Engine's Adam it can be loaded before its first step. With torch's it
cannot: it asks its empty state for the number of steps. Once it has a state, it hands all
parameters one and the same tensor to count in, and overwrites it with the count before the load.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Let a fresh distributed optimizer, of Megatron-Core as imported, load a checkpoint."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    describe, load = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict

    def sharded_state_dict(
        self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return describe(self, model_state, is_loading, *args, **kwargs)

    def load_state_dict(self: Any, state: Any) -> None:
        (steps,) = {float(group["step"]) for group in state["optimizer"]["param_groups"]}
        load(self, state)
        for entry in self.optimizer.state.values():
            entry["step"] = torch.tensor(steps)

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
