"""A run of ``examples.nemo.finetune`` that writes down what it did; started by torchrun.

torchrun --nproc-per-node 2 -m tests.hosts.nemo_run FOLDER NAME SETTINGS [key=value ...]

SETTINGS are those of ``examples.nemo.finetune.pieces``, in JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOKENS = (7, 21, 300, 9, 44, 130, 5, 77)


def main() -> None:
    folder, name, settings, *overrides = sys.argv[1:]
    settings = json.loads(settings)
    from tests.fakes.nemo_on_cpu import prepare

    prepare()
    import torch
    from lightning.pytorch import Callback
    from nemo.collections import llm
    from omegaconf import OmegaConf

    from bdlora_megatron.layers import collect_adapter
    from bdlora_megatron.nemo import build_peft
    from examples.nemo.finetune import YAML, pieces
    from tests.hosts.logits import pipeline_logits

    class Watch(Callback):
        def __init__(self):
            self.seen = {"losses": [], "norms": []}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            # NeMo puts the adapter in, and loads it, only after on_train_start.
            if "step" in self.seen:
                return
            self.seen["step"] = trainer.global_step
            self.seen["start"] = _parameters(trainer)
            self.seen["adapter"] = collect_adapter(_model(trainer), "seen").modules
            self.seen["moments"] = _moments(trainer)
            self.seen["copies"] = _copies(trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen["losses"].append(float(trainer.callback_metrics["reduced_train_loss"]))
            self.seen["norms"].append(float(trainer.callback_metrics["grad_norm"]))

        def on_train_end(self, trainer, pl_module):
            self.seen |= {"end": _parameters(trainer), "end_moments": _moments(trainer)}
            self.seen["end_copies"] = _copies(trainer)
            self.seen["end_adapter"] = collect_adapter(_model(trainer), "seen").modules
            self.seen["logits"] = pipeline_logits([_model(trainer)], TOKENS)
            rank = torch.distributed.get_rank()
            torch.save(self.seen, Path(folder) / f"{name}-{settings['steps']}-{rank}.pt")

    parts = pieces(Path(folder), name, cpu=True, **settings)
    parts["trainer"].callbacks.append(Watch())
    peft = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist(overrides))
    llm.finetune(**parts, peft=build_peft(peft))


def _model(trainer):
    """Megatron-Core's model, without what NeMo wraps round it."""
    from megatron.core.models.gpt import GPTModel

    chunk = trainer.strategy.megatron_parallel[0]
    return next(module for module in chunk.modules() if isinstance(module, GPTModel))


def _parameters(trainer):
    """Everything on this rank, frozen or not, by name and whether it trains."""
    return {
        (name, value.requires_grad): value.detach().clone()
        for name, value in _model(trainer).named_parameters()
    }


def _copies(trainer):
    """The float32 copies that the optimizer keeps of this rank's parameters."""
    return {
        name: value.main_param.detach().clone()
        for name, value in _model(trainer).named_parameters()
        if getattr(value, "main_param", None) is not None
    }


def _moments(trainer):
    """Adam's running means on this rank, in the order of the parameters."""
    state = trainer.strategy.optimizers[0].mcore_optimizer.optimizer.state
    return [entry["exp_avg"].detach().clone() for entry in state.values() if "exp_avg" in entry]


if __name__ == "__main__":
    main()
