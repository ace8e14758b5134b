"""The settings of a BD-LoRA under the hosts' names, and the ``LoRAConfig`` they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bdlora_megatron.blocks import ModuleShape, matching_rank
from bdlora_megatron.config import DEFAULT_TARGETS, LoRAConfig, resolve
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers.anatomy import (
    decoder_layer,
    from_all_stages,
    named_modules_global,
    num_decoder_layers,
)
from bdlora_megatron.layers.apply import apply_lora, lora_layers
from bdlora_megatron.layers.classes import LINEAR_CLASSES, lora_layer
from bdlora_megatron.layers.targets import TargetMatcher
from bdlora_megatron.runtime.versions.layers import decoder_classes

__all__ = ["BlockDiagonalSettings"]


@dataclass
class BlockDiagonalSettings:
    """The fields of both integrations' ``BDLoRA``; names and meaning as in the hosts' own LoRA.

    They are checked when the object is made and again when it is applied, since a host may change
    fields in between.

    Attributes:
        target_modules: Layer names, or wildcards over full names. Layers are numbered over the
            whole pipeline.
        exclude_modules: Names or wildcards left out of what ``target_modules`` selects.
        dim: Total rank; 16, rounded up to a multiple of ``num_blocks``, when unset.
        alpha: Numerator of the scale; twice the rank when unset.
        num_blocks: The tensor-parallel size the adapter will be served at, or a multiple of it.
        dropout: Probability of zeroing an input element on the adapter's path, in training.
        use_rslora: Scale by ``alpha / sqrt(dim)``.
        match_params_of_lora_rank: Instead of ``dim``: the largest rank with no more parameters than
            a LoRA of this rank.
        fused: One A for a whole fused layer, as the hosts' ``LoRA`` has; else one per projection,
            as their ``CanonicalLoRA`` and PEFT have.
        regather_input: Under sequence parallelism, gather the input again in backward.
        lora_dtype: The factors' type; the base layer's when unset.
        export_peft: Write PEFT's folder ``hf_adapter`` with a checkpoint; yes when unset, unless
            the layers are ``fused``, for which PEFT has no place.
        export_dense: Also write ``hf_adapter-dense``, the same function as a vanilla LoRA.
        base_model: Name or path of the base model in Hugging Face's format, for those folders.
    """

    target_modules: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    exclude_modules: list[str] = field(default_factory=list)
    dim: int | None = None
    alpha: float | None = None
    num_blocks: int | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    match_params_of_lora_rank: int | None = None
    fused: bool = False
    regather_input: bool = False
    lora_dtype: torch.dtype | None = None
    export_peft: bool | None = None
    export_dense: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.num_blocks is None or self.num_blocks < 1:
            raise ConfigError(
                f"num_blocks is {self.num_blocks}; set it to the tensor-parallel size at which the "
                "adapter will be served, or to a multiple of it"
            )
        if self.dim is not None and self.match_params_of_lora_rank is not None:
            raise ConfigError(
                "dim and match_params_of_lora_rank are both set; the second decides the rank: "
                "leave one out"
            )
        if self.fused and (self.export_peft or self.export_dense):
            raise ConfigError(
                "fused=True trains one A for several projections, for which PEFT's format has no "
                "place; set fused=False, or export_peft=False and export_dense=False"
            )
        self._config(self.dim)

    @property
    def exports_peft(self) -> bool:
        """Whether PEFT's folder is to be written."""
        return not self.fused if self.export_peft is None else self.export_peft

    def lora_config(self, chunks: Sequence[nn.Module]) -> LoRAConfig:
        """What to put into a model.

        Args:
            chunks: The model chunks of this pipeline stage.

        Returns:
            The checked config.

        Raises:
            ConfigError: A value is out of range, values disagree, or no rank matches.

        Collectives: with ``match_params_of_lora_rank``, one small all-gather over pipeline stages,
        if there are several.
        """
        self.__post_init__()
        assert self.num_blocks is not None
        if self.match_params_of_lora_rank is None:
            return self._config(self.dim)
        rank = matching_rank(
            self._shapes(chunks),
            lora_rank=self.match_params_of_lora_rank,
            num_blocks=self.num_blocks,
        )
        return self._config(rank)

    def put_into(self, chunks: Sequence[nn.Module]) -> None:
        """Put fresh adapters into a model, as `apply_lora` does, for the host to train and save.

        Args:
            chunks: The model chunks of this pipeline stage, their base weights loaded.

        Raises:
            ConfigError: Settings are wrong, or the model is wrapped or has adapters already.
            TargetError: A target pattern matches no layer on any pipeline stage.
            UnsupportedError: A matched layer cannot carry an adapter.

        Collectives: those of `apply_lora` and `lora_config`, and one small all-gather over pipeline
        stages, if there are several.
        """
        apply_lora(chunks, self.lora_config(chunks))
        _save_layers_apart(chunks)

    def _config(self, dim: int | None) -> LoRAConfig:
        rank, alpha = resolve(rank=dim, alpha=self.alpha, num_blocks=self.num_blocks)
        return LoRAConfig(
            rank=rank,
            alpha=alpha,
            use_rslora=self.use_rslora,
            num_blocks=self.num_blocks,
            dropout=self.dropout,
            target_modules=tuple(self.target_modules),
            exclude_modules=tuple(self.exclude_modules),
            fused=self.fused,
            regather_input=self.regather_input,
            dtype=self.lora_dtype,
        )

    def _shapes(self, chunks: Sequence[nn.Module]) -> list[ModuleShape]:
        """Every adapted projection of the whole pipeline, so that all stages find one rank."""
        matcher = TargetMatcher(tuple(self.target_modules), tuple(self.exclude_modules))
        shapes = []
        for chunk in chunks:
            for name, module in named_modules_global(chunk):
                if isinstance(module, LINEAR_CLASSES) and matcher.matches(name):
                    shapes += self._layer_shapes(name, module)
        return [shape for stage in from_all_stages(shapes) for shape in stage]

    def _layer_shapes(self, name: str, module: Any) -> list[ModuleShape]:
        layer = lora_layer(module)
        geometry = layer.geometry(name, fused=self.fused)
        return [
            ModuleShape(
                in_features=layer.input_size,
                out_features=projection.out_features,
                blocked="A" if layer.splits_input else "B",
            )
            for projection in geometry.projections
        ]


def _save_layers_apart(chunks: Sequence[nn.Module]) -> None:
    """Give each layer tensors of its own in checkpoints if not all layers have the same adapters.

    Megatron-Core otherwise stacks all layers' factors in one tensor, and can neither save nor load
    one in which layers are missing.
    """
    own = [
        decoder_layer(name)
        for chunk in chunks
        for name, layer in lora_layers(chunk)
        if layer.adapter is not None
    ]
    adapted: dict[int, set[str]] = {layer: set() for layer in range(num_decoder_layers(chunks[0]))}
    for number, place in filter(None, itertools.chain.from_iterable(from_all_stages(own))):
        adapted.setdefault(number, set()).add(place)
    if len(set(map(frozenset, adapted.values()))) > 1:
        for module in itertools.chain.from_iterable(chunk.modules() for chunk in chunks):
            if isinstance(module, decoder_classes()):
                config: Any = module.config
                config.hetereogenous_dist_checkpoint = True
