"""One model with every contender's adapters at hand, and the steps that it can take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from bdlora_megatron.bench.plan import BenchPlan, Setting, Variant
from bdlora_megatron.bench.slot_adapters import SlotAdapters
from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.errors import MissingDependencyError
from bdlora_megatron.layers import apply_lora, lora_layers
from bdlora_megatron.models import HFConfig, build_model, transformer_config
from bdlora_megatron.models.rope import RopeSettings
from bdlora_megatron.models.shape import ModelShape
from bdlora_megatron.runtime import device
from bdlora_megatron.runtime.versions.inference import inference

__all__ = ["Contenders"]


class Contenders:
    """A model whose adapters are exchanged in no time.

    Weights are random: what a step costs does not depend on them.

    Args:
        plan: Sizes and contenders.
    """

    def __init__(self, plan: BenchPlan) -> None:
        self.plan = plan
        self.device = device()
        self.model = _random_model(plan, self.device)
        self._adapters: dict[Variant, dict[str, nn.Module]] = {}
        self._optimizers: dict[Variant, torch.optim.Optimizer] = {}
        self._hosts: dict[Variant, Any] = {}
        self._slots = SlotAdapters(self.model, plan)
        for variant in plan.variants():
            if variant.bridge:
                self._attach_bridge(variant)
            elif variant.layout is not None:
                self._attach(variant)
        self._caches: dict[tuple[bool, int, int], StaticInferenceContext] = {}

    def _attach(self, variant: Variant) -> None:
        assert variant.layout is not None
        blocks = self.plan.tp if variant.layout is Layout.BDLORA else None
        lora = LoRAConfig(
            rank=variant.rank,
            alpha=float(variant.rank),
            layout=variant.layout,
            num_blocks=blocks,
            target_modules=self.plan.target_modules,
        )
        layers = list(lora_layers(self.model))
        if not layers:
            apply_lora(self.model, lora)
            layers = list(lora_layers(self.model))
        else:
            for name, layer in layers:
                layer.attach_config(lora, name.rpartition(".")[2])
        adapters: dict[str, nn.Module] = {}
        for name, layer in layers:
            assert layer.adapter is not None
            adapters[name] = layer.adapter
        parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
        for parameter in parameters:
            nn.init.normal_(parameter, std=0.02)
        self._adapters[variant] = adapters
        self._optimizers[variant] = torch.optim.AdamW(parameters, lr=1e-4)
        self._slots.take_over(variant)

    def _attach_bridge(self, variant: Variant) -> None:
        """A model of its own, whose weights are the other's, with Bridge's adapters in it."""
        lora = _bridge_lora()
        model = _random_model(self.plan, self.device)
        # By name: an adapter's own parameters have names that the base model's do not.
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.data = own[name].data
        targets = list(self.plan.target_modules)
        self._hosts[variant] = lora(dim=variant.rank, alpha=variant.rank, target_modules=targets)(
            model
        )
        adapters = [p for n, p in model.named_parameters() if ".adapter." in n]
        for parameter in adapters:
            nn.init.normal_(parameter, std=0.02)
        self._optimizers[variant] = torch.optim.AdamW(adapters, lr=1e-4)

    def model_of(self, variant: Variant) -> Any:
        """The model that a contender's steps run."""
        return self._hosts.get(variant, self.model)

    def choose(self, variant: Variant, setting: Setting) -> None:
        """Put one contender's adapters in."""
        mixed = setting.adapters is not None
        chosen = {} if mixed else self._adapters.get(variant, {})
        for name, layer in lora_layers(self.model):
            layer.adapter = chosen.get(name)  # type: ignore[assignment]
        self._slots.choose(variant if mixed else None)

    def step(self, variant: Variant, setting: Setting) -> Callable[[], None]:
        """What to run for one step; ``choose(variant, setting)`` comes first.

        Returns:
            A function that takes the step and waits for it.
        """
        batch, length = setting.batch, setting.length
        model = self.model_of(variant)
        if setting.phase == "train":
            inputs = self._inputs(batch, length, 0)
            return lambda: self._train(model, inputs, self._optimizers.get(variant))
        cache = self._cache(setting)
        inputs = self._inputs(batch, setting.new, setting.cached)
        serving = self._slots.serving(variant, setting)

        def infer() -> None:
            with serving():
                self._infer(model, inputs, cache)

        return infer

    def _inputs(self, batch: int, tokens: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
        where = self.device
        ids = torch.arange(batch * tokens, device=where).view(batch, tokens)
        ids %= self.plan.shape.vocab_size
        positions = torch.arange(before, before + tokens, device=where).expand(batch, -1)
        mask = torch.ones(1, 1, tokens, before + tokens, device=where).triu(before + 1).bool()
        return ids, positions, mask

    def _cache(self, setting: Setting) -> StaticInferenceContext:
        """The cache of a step, which is left as full as it was: every step is the same."""
        key = setting.decodes, setting.batch, setting.length
        cache = self._caches.get(key)
        if cache is None:
            cache = StaticInferenceContext(setting.batch, setting.length + 1)
            self._infer(self.model, self._inputs(setting.batch, setting.length, 0), cache)
            if setting.decodes:
                cache.increment_sequence_len_offset(setting.length)
            self._caches[key] = cache
        return cache

    @torch.inference_mode()
    def _infer(self, model: Any, inputs: Sequence[Tensor], cache: StaticInferenceContext) -> None:
        model.eval()
        with inference():
            model(*inputs, inference_context=cache, runtime_gather_output=True)
        self._finish()

    def _train(
        self, model: Any, inputs: Sequence[Tensor], optimizer: torch.optim.Optimizer | None
    ) -> None:
        model.train()
        losses: Tensor = model(*inputs, labels=inputs[0])
        losses.mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._finish()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _bridge_lora() -> Any:
    try:
        from megatron.bridge.peft.lora import LoRA
    except ImportError as error:
        raise MissingDependencyError(
            f"timing Megatron-Bridge's LoRA needs Megatron-Bridge and what it imports ({error}); "
            "pip install 'bdlora-megatron[bridge,te]', or leave --bridge away"
        ) from error
    return LoRA


def _random_model(plan: BenchPlan, where: torch.device) -> Any:
    hf = _hf_config(plan.shape, plan)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = build_model(hf, transformer_config(hf, dtype=dtype))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    # A frozen model's input wants no gradient by itself, and the base model alone would have no
    # backward pass to compare with; as in every layer but the first, it wants one here.
    model.requires_grad_(False)
    model.embedding.register_forward_hook(_decoder_input)
    return model


def _decoder_input(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The embedding's output, which wants a gradient, with the strides of a fresh tensor.

    The embedding transposes. Of a single sequence that gives strides over which torch's product
    takes the tokens one by one in the base model's first layer, and in no contender's with an
    adapter: the base model would look slower than it is.
    """
    tidy: Tensor = output.flatten(0, 1).unflatten(0, output.shape[:2])
    return tidy.requires_grad_(True) if torch.is_grad_enabled() else tidy


def _hf_config(shape: ModelShape, plan: BenchPlan) -> HFConfig:
    longest = max(length for _, length in plan.sizes())
    return HFConfig(
        model_type="llama",
        **asdict(shape),
        max_positions=longest + 1,
        norm_eps=1e-5,
        rope=RopeSettings(kind="default", theta=10000.0, factor=1.0),
        qkv_bias=False,
        proj_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        eos_token_ids=(),
    )
