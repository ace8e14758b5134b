"""Logits of the tiny base model, as PEFT and as Megatron compute them."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bdlora_megatron.train.checkpoint import checkpoints, load_checkpoint
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.step import Stepper
from tests.tp.session import model_parallel
from tests.train.runs import VOCAB


def tokens():
    return torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def peft_logits(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(tokens()).logits


def checkpoint_logits(rank, world_size, config, step=None):
    """Logits of a checkpoint, the last by default, at any number of ranks."""
    with model_parallel(config.model.tensor_model_parallel_size):
        stepper = Stepper(build_model(config)[0], config)
        found = dict(checkpoints(config.checkpoint.save))
        step = max(found) if step is None else step
        assert load_checkpoint(found[step], stepper) == step
        return megatron_logits(stepper.model.module)


@torch.no_grad()
def megatron_logits(model):
    ids = tokens()
    length = ids.size(1)
    hidden = torch.ones(length, length).triu(1).bool().expand(len(ids), 1, -1, -1)
    positions = torch.arange(length).expand(len(ids), -1)
    model.eval()
    return model(ids, positions, hidden, runtime_gather_output=True)[..., :VOCAB]
