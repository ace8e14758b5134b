"""Runs of Megatron-Bridge's own ``pretrain`` on this rank, and what was seen in them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tests.hosts.logits import pipeline_logits

TOKENS = (7, 21, 30, 9, 44, 13, 5, 77)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the adapter is trained; the base model is made in float32 at the same parallel sizes.

    ``chunks`` is how many parts of the model a pipeline stage has, ``micro_batch`` the rows of a
    product: by default those that make a step of two rows one micro-batch on two ranks.
    """

    tensor_parallel: int = 2
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    chunks: int = 1
    layers: int = 2
    rows: int = 2
    micro_batch: int | None = None
    precision: str | None = None
    distributed: bool = False
    hybrid: bool = False
    tied: bool = False
    targets: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        return (
            f"model.tensor_model_parallel_size={self.tensor_parallel}",
            f"model.sequence_parallel={self.sequence_parallel}",
            f"model.pipeline_model_parallel_size={self.pipeline_parallel}",
            f"train.global_batch_size={self.rows}",
            f"train.micro_batch_size={self.micro_batch or self.tensor_parallel}",
        )

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"ddp.use_distributed_optimizer={self.distributed}",
            f"optimizer.use_distributed_optimizer={self.distributed}",
            *([f"mixed_precision={self.precision}"] if self.precision else []),
            *([f"peft.bdlora.target_modules={json.dumps(self.targets)}"] if self.targets else []),
        )


def on_cpu():
    """Bridge, imported for real over stand-ins for Transformer Engine."""
    from tests.fakes.transformer_engine import forget_megatron

    forget_megatron()
    from tests.fakes.bridge_on_cpu import prepare

    prepare()


def make_hf_base(folder, layers=2, tied=False):
    """A random Llama of the example's sizes, in Hugging Face's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
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


def _as_hybrid(model, stages):
    """A provider of the same model as attention and MLP in turn, in pipeline stages of a size."""
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    known = {field.name for field in fields(HybridModelProvider) if field.init}
    values = {
        field.name: getattr(model, field.name)
        for field in fields(model)
        if field.init and field.name in known
    }
    changes = {
        "num_layers": None,
        "hybrid_layer_pattern": "|".join(["*-" * (model.num_layers // stages)] * stages),
        "hybrid_stack_spec": hybrid_layers_on_cpu,
        "apply_rope_fusion": False,
        "is_hybrid_model": True,
    }
    return HybridModelProvider(**{**values, **changes})


def _config(folder, case, overrides):
    from bdlora_megatron.bridge import apply_settings
    from examples.bridge.finetune import YAML, tiny_config

    config = tiny_config(Path(folder), cpu=True)
    config.model.num_layers = case.layers
    config.model.share_embeddings_and_output_weights = case.tied
    if case.pipeline_parallel > 1:
        config.model.pipeline_dtype = torch.float32
    if case.chunks > 1:
        config.model.virtual_pipeline_model_parallel_size = case.chunks
        # Bridge trains on without this, but two stages then take each other's tensors for others.
        config.model.overlap_p2p_comm, config.model.batch_p2p_comm = True, False
    if case.hybrid:
        config.model = _as_hybrid(config.model, case.pipeline_parallel)
    return apply_settings(config, YAML, [*case.sizes, *overrides])


def _pretrain(config, callbacks):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils import checkpoint_utils
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    # Bridge makes them once for each process; several runs share this one.
    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    # Bridge keeps the state that it read from a file, and a run changes it.
    checkpoint_utils.read_train_state.cache_clear()
    pretrain(config, forward_step, callbacks=callbacks)


def _watch(keep_after) -> Any:
    from megatron.bridge.training.callbacks import Callback

    class Watch(Callback):
        def __init__(self):
            self.seen = {"losses": [], "norms": []}

        def on_train_start(self, context):
            self.seen["start"] = _state(context)

        def on_train_step_end(self, context):
            self.seen["norms"].append(context.grad_norm)
            if context.loss_dict:  # known to the last pipeline stage
                self.seen["losses"].append(float(context.loss_dict["lm loss"]))
            if len(self.seen["norms"]) == keep_after:
                self.seen["kept"] = _state(context)

        def on_train_end(self, context):
            logits = pipeline_logits(list(_chunks(context)), TOKENS)
            self.seen |= {"end": _state(context), "logits": logits}

    return Watch()


def _chunks(context):
    """Megatron-Core's models of this pipeline stage, without what Bridge wraps round them."""
    from megatron.core.utils import unwrap_model

    return torch.nn.ModuleList(unwrap_model(context.model))


def _state(context):
    """Everything on this rank: parameters, trained or frozen, and what the optimizer keeps.

    And the adapter of all ranks together.
    """
    from bdlora_megatron.layers import collect_adapter, lora_layers

    chunks = _chunks(context)
    parameters = dict(chunks.named_parameters())
    optimizers = getattr(context.optimizer, "chained_optimizers", [context.optimizer])
    kept = [entry for each in optimizers for entry in each.optimizer.state.values()]
    return {
        "layers": len(list(lora_layers(chunks))),
        "adapter": collect_adapter(chunks, "seen").modules,
        "trained": {n: p.detach().clone() for n, p in parameters.items() if p.requires_grad},
        "frozen": {n: p.detach().clone() for n, p in parameters.items() if not p.requires_grad},
        "copies": {
            name: value.main_param.detach().clone()
            for name, value in parameters.items()
            if getattr(value, "main_param", None) is not None
        },
        "moments": [entry[kind].clone() for entry in kept for kind in sorted(entry)],
    }
