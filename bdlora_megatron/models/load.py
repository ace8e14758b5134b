"""Filling a Megatron-Core model from a Hugging Face checkpoint, one slice at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import ModuleSpec
from torch import Tensor, nn

from bdlora_megatron.decoder import ModelClass
from bdlora_megatron.errors import ShapeError
from bdlora_megatron.layers.anatomy import named_modules_global
from bdlora_megatron.models.build import build_model, transformer_config
from bdlora_megatron.models.config import HFConfig, read_hf_config
from bdlora_megatron.models.files import TensorFiles
from bdlora_megatron.models.fp8_files import FP8Files, open_weights
from bdlora_megatron.models.layout import (
    WeightSource,
    hf_shapes,
    layer_sources,
    model_sources,
)

__all__ = ["load_hf_model", "load_hf_weights"]

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Buffers that early transformers wrote; the frequencies follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_ADAPTER = ".adapter."
_CHUNK_ROWS = 1024
_SHOWN = 20


def load_hf_model(  # noqa: PLR0913 - what serving and training choose of a model
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_sequence_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    layer_spec: ModuleSpec | None = None,
    model_class: ModelClass = "auto",
    vp_stage: int | None = None,
    for_serving: bool = False,
) -> Any:
    """Load a Llama-family model at the current tensor- and pipeline-parallel size.

    Every rank calls this inside ``bdlora_megatron.runtime.model_parallel`` and reads its own rows
    and columns from the files; beyond the model itself it holds one slice of one tensor at a time.

    Args:
        folder: A folder with ``config.json`` and safetensors. Nothing is downloaded.
        dtype: Type of the parameters; that of the stored embedding by default.
        max_sequence_length: Longest sequence that will be used; by default the model's own limit.
        settings: Further fields of ``TransformerConfig``, such as ``sequence_parallel``.
        layer_spec: The layers' specification, for example from ``layers.lora_spec``. By default
            Transformer Engine's if it and CUDA are present, otherwise Megatron-Core's own.
        model_class: ``hybrid`` for a ``HybridModel`` (Megatron-Core 0.19 and newer), ``gpt`` for a
            ``GPTModel``; by default the first if the release has it.
        vp_stage: Which chunk of this pipeline stage, where stages hold several.
        for_serving: Repeat key-value heads where they are fewer than the tensor-parallel ranks, so
            that each rank holds whole heads. Adapters then load on them and do not train.

    Returns:
        This rank's part of the model, in training mode. If the vocabulary is rounded up to a
        multiple of the ranks, logits of the padding are minus infinity; ``without_padding`` cuts
        them off.

    Raises:
        ConfigError: The folder is incomplete or malformed, or ``settings`` contradict the model.
        ShapeError: The weights do not fit ``config.json``, or the model the parallel size.
        UnsupportedError: The model is of a kind that Megatron-Core cannot compute the same way.

    Collectives:
        None, except one all-reduce of an embedding that is tied across pipeline stages.
    """
    hf = read_hf_config(folder)
    if for_serving:
        hf = hf.for_serving(parallel_state.get_tensor_model_parallel_world_size())
    # Before the model takes memory: what is wrong with the files is known from their headers.
    with open_weights(folder, hf) as files:
        if isinstance(files, FP8Files) and torch.distributed.get_rank() == 0:
            logger.warning("%s", files.summary)
        _check_tensors(hf, files, str(folder))
        stored = files.rows("model.embed_tokens.weight", 0, 1).dtype
        config = transformer_config(
            hf, dtype=dtype or stored, settings=settings, model_class=model_class
        )
        model = build_model(
            hf,
            config,
            max_sequence_length=max_sequence_length,
            layer_spec=layer_spec,
            vp_stage=vp_stage,
        )
        load_hf_weights(model, hf, files)
    return model


@torch.no_grad()
def load_hf_weights(model: nn.Module, hf: HFConfig, files: TensorFiles) -> None:
    """Copy this rank's share of every tensor into a model from ``build_model``.

    Args:
        model: The model; adapters in it are left alone.
        hf: Its facts.
        files: Its weights.

    Raises:
        ShapeError: The model has parameters that the checkpoint says nothing of, or of another
            size.

    Collectives:
        None.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter, source in _parameters(model, hf, size):
        if source is None:
            raise ShapeError(
                f"{name} {list(parameter.shape)} has no counterpart in a {hf.model_type} "
                "checkpoint; build the model with build_model"
            )
        if not source.parts:
            parameter.zero_()
            continue
        share = _share(source, files, size)
        if tuple(parameter.shape) != share:
            raise ShapeError(
                f"{name} is {list(parameter.shape)}; a share of {list(share)} was expected at "
                f"{size} tensor-parallel ranks: build the model with build_model"
            )
        if source.split == "columns":
            _fill_columns(parameter, source, files, rank)
        else:
            _fill_rows(parameter, source, files, rank if source.split == "rows" else 0)


def _parameters(
    model: nn.Module, hf: HFConfig, tp_size: int
) -> Iterator[tuple[str, Tensor, WeightSource | None]]:
    outside = model_sources(hf)
    layers = [layer_sources(hf, layer, tp_size) for layer in range(hf.num_layers)]
    for module_name, module in named_modules_global(model):
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own}"
            if _ADAPTER in name:
                continue
            inside = _LAYER.fullmatch(name)
            source = layers[int(inside[1])].get(inside[2]) if inside else outside.get(name)
            yield name, parameter, source


def _share(source: WeightSource, files: TensorFiles, tp_size: int) -> tuple[int, ...]:
    rows = sum(part.stop - part.start for part in source.parts)
    rest = files.shapes[source.parts[0].name][1:]
    if source.split == "rows":
        # Rounded up where it pads the vocabulary; everything else was checked to divide.
        return (-(-rows // tp_size), *rest)
    return (rows, rest[0] // tp_size) if source.split == "columns" else (rows, *rest)


def _fill_rows(parameter: Tensor, source: WeightSource, files: TensorFiles, rank: int) -> None:
    first = rank * len(parameter)
    top = 0
    filled = 0
    for part in source.parts:
        # The part's rows top .. bottom of the whole, cut to this rank's.
        bottom = top + part.stop - part.start
        start, stop = max(top, first), min(bottom, first + len(parameter))
        if start < stop:
            rows = files.rows(part.name, part.start + start - top, part.start + stop - top)
            parameter[start - first : stop - first].copy_(rows)
            filled = stop - first
        top = bottom
    # Padding of the vocabulary. Its gradients are zero, but zero times NaN would not be.
    parameter[filled:].zero_()


def _fill_columns(parameter: Tensor, source: WeightSource, files: TensorFiles, rank: int) -> None:
    (part,) = source.parts
    width = parameter.shape[1]
    parameter.copy_(files.columns(part.name, rank * width, (rank + 1) * width))


def _check_tensors(hf: HFConfig, files: TensorFiles, where: str) -> None:
    # All layers on every rank, also those of other pipeline stages, so that all ranks raise alike.
    wanted = hf_shapes(hf)
    found = {name: shape for name, shape in files.shapes.items() if not _DERIVED.fullmatch(name)}
    problems = [f"{name} {list(wanted[name])} is missing" for name in wanted if name not in found]
    for name, shape in found.items():
        if name in wanted:
            if shape != wanted[name]:
                problems.append(f"{name} is {list(shape)}; {list(wanted[name])} was expected")
        elif not (name == "lm_head.weight" and hf.tied and _same_as_embedding(hf, files)):
            problems.append(f"{name} {list(shape)} has no place in this model")
    if problems:
        more = len(problems) - _SHOWN
        raise ShapeError(
            f"the weights in {where} do not fit its config.json (model_type={hf.model_type}, "
            f"tie_word_embeddings={hf.tied}); download the model again, or correct config.json:"
            + "".join(f"\n- {line}" for line in problems[:_SHOWN])
            + (f"\n- and {more} more" if more > 0 else "")
        )


def _same_as_embedding(hf: HFConfig, files: TensorFiles) -> bool:
    """Whether an output layer that a tied model need not store is the embedding once more."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    wanted = (hf.vocab_size, hf.hidden_size)
    if any(files.shapes.get(name) != wanted for name in names):
        return False
    for start in range(0, hf.vocab_size, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, hf.vocab_size)
        head, embedding = (files.rows(name, start, stop) for name in names)
        if not torch.equal(head, embedding):
            return False
    return True
