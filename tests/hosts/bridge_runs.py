"""Runs of Megatron-Bridge's own ``pretrain`` on this rank, and what was seen in them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

TOKENS = (7, 21, 30, 9, 44, 13, 5, 77)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the adapter is trained on two ranks; the base model is float32 on the same."""

    tensor_parallel: int = 2
    precision: str | None = None
    distributed: bool = False
    hybrid: bool = False

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"ddp.use_distributed_optimizer={self.distributed}",
            f"optimizer.use_distributed_optimizer={self.distributed}",
            *([f"mixed_precision={self.precision}"] if self.precision else []),
        )


def on_cpu():
    """Bridge, imported for real over stand-ins for Transformer Engine."""
    from tests.fakes.transformer_engine import forget_megatron

    forget_megatron()
    from tests.fakes.bridge_on_cpu import prepare

    prepare()


def make_hf_base(folder):
    """A random Llama of the example's sizes, in Hugging Face's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_bridge_base(hf, folder, case):
    """The same weights as a checkpoint of Bridge's, saved after a step that changes nothing."""
    from bdlora_megatron.models import TensorFiles, load_hf_weights, read_hf_config

    def fill(chunks):
        load_hf_weights(chunks[0], read_hf_config(hf), TensorFiles(hf))
        return chunks

    config = _config(folder, case, ["peft.scheme=none", "train.train_iters=1", *_AT_REST])
    assert config.peft is None
    config.model.register_pre_wrap_hook(fill)
    _pretrain(config, [])


_AT_REST = ("optimizer.lr=0.0", "optimizer.min_lr=0.0")


def train(folder, base, case, steps, *overrides, resume=None, keep_after=None):
    """Train an adapter, from ``resume``'s checkpoint (folder, step) if there is one.

    Everything is looked at before the first step, after the last and after ``keep_after`` steps.
    """
    from bdlora_megatron.bridge import AdapterExport, BDLoRA

    config = _config(folder, case, [f"train.train_iters={steps}", *case.overrides, *overrides])
    assert isinstance(config.peft, BDLoRA)
    config.checkpoint.pretrained_checkpoint = str(base)
    if resume is not None:
        config.checkpoint.load, config.checkpoint.ckpt_step = str(resume[0]), resume[1]
    export = AdapterExport()
    watch = _watch(keep_after)
    _pretrain(config, [watch, export])
    return {**watch.seen, "exported": export.exported}


def refused_export(folder, base, case):
    """What training ends with where Bridge's own export is switched on behind `apply_settings`."""
    from bdlora_megatron.bridge import AdapterExport
    from bdlora_megatron.errors import UnsupportedError

    config = _config(folder, case, [])
    config.checkpoint.pretrained_checkpoint = str(base)
    config.checkpoint.also_save_hf_checkpoint = True
    config.checkpoint.hf_source_path = str(base)
    try:
        _pretrain(config, [AdapterExport()])
    except UnsupportedError as error:
        return str(error)
    return None


def reads_hf_bases():
    """Whether this Bridge takes Hugging Face's folder for the base model, as 0.6 does."""
    from megatron.bridge.training import checkpointing

    return hasattr(checkpointing, "is_hf_checkpoint_dir")


def has_hybrid_models():
    """Whether this Bridge provides Megatron-Core's ``HybridModel``, as 0.6 does."""
    return importlib.util.find_spec("megatron.bridge.models.hybrid") is not None


def hybrid_layers_on_cpu(config=None):
    """Megatron-Core's own attention and MLP as the layers of a hybrid stack."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from bdlora_megatron.models.build import hybrid_stack_spec

    return hybrid_stack_spec(get_gpt_layer_local_spec(normalization="RMSNorm"))


def _as_hybrid(model):
    """A provider of the same model as attention and MLP in turn."""
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    known = {field.name for field in fields(HybridModelProvider) if field.init}
    values = {
        field.name: getattr(model, field.name)
        for field in fields(model)
        if field.init and field.name in known
    }
    changes = {
        "num_layers": None,
        "hybrid_layer_pattern": "*-" * model.num_layers,
        "hybrid_stack_spec": hybrid_layers_on_cpu,
        "apply_rope_fusion": False,
        "is_hybrid_model": True,
    }
    return HybridModelProvider(**{**values, **changes})


def _config(folder, case, overrides):
    from bdlora_megatron.bridge import apply_settings
    from examples.bridge.finetune import YAML, tiny_config

    config = tiny_config(Path(folder), cpu=True)
    if case.hybrid:
        config.model = _as_hybrid(config.model)
    sizes = [
        f"model.tensor_model_parallel_size={case.tensor_parallel}",
        # Two sequences a step, on two data-parallel ranks or on one.
        f"train.micro_batch_size={case.tensor_parallel}",
    ]
    return apply_settings(config, YAML, [*sizes, *overrides])


def _pretrain(config, callbacks):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    # Bridge makes them once for each process; several runs share this one.
    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    pretrain(config, forward_step, callbacks=callbacks)


def _watch(keep_after) -> Any:
    from megatron.bridge.training.callbacks import Callback

    class Watch(Callback):
        def __init__(self):
            self.seen = {"losses": []}

        def on_train_start(self, context):
            self.seen["start"] = _state(context)

        def on_train_step_end(self, context):
            self.seen["losses"].append(float(context.loss_dict["lm loss"]))
            if len(self.seen["losses"]) == keep_after:
                self.seen["kept"] = _state(context)

        def on_train_end(self, context):
            self.seen |= {"end": _state(context), "logits": _logits(context)}

    return Watch()


def _model(context):
    """Megatron-Core's model, without what Bridge wraps round it."""
    from megatron.core.utils import unwrap_model

    (chunk,) = unwrap_model(context.model)
    return chunk


def _state(context):
    """Everything on this rank: parameters, trained or frozen, and what the optimizer keeps."""
    from bdlora_megatron.layers import lora_layers

    parameters = dict(_model(context).named_parameters())
    optimizers = getattr(context.optimizer, "chained_optimizers", [context.optimizer])
    kept = [entry for each in optimizers for entry in each.optimizer.state.values()]
    return {
        "layers": len(list(lora_layers(_model(context)))),
        "trained": {n: p.detach().clone() for n, p in parameters.items() if p.requires_grad},
        "frozen": {n: p.detach().clone() for n, p in parameters.items() if not p.requires_grad},
        "copies": {
            name: value.main_param.detach().clone()
            for name, value in parameters.items()
            if getattr(value, "main_param", None) is not None
        },
        "moments": [entry[kind].clone() for entry in kept for kind in sorted(entry)],
    }


@torch.no_grad()
def _logits(context):
    model = _model(context).eval()
    places = torch.arange(len(TOKENS))[None]
    return model(torch.tensor([TOKENS]), places, None, runtime_gather_output=True).float()


@torch.no_grad()
def peft_logits(base, adapter):
    """What transformers computes for the base model, with an adapter in PEFT if there is one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(torch.tensor([TOKENS])).logits
