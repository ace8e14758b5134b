"""Tensors of a PEFT adapter that are no factors of the seven projections: what they are."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch

from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.peft.names import PEFT_PREFIX, clean_name
from bdlora_megatron.convert.tensor_files import TensorSource
from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.models.files import TensorFiles

__all__ = ["equal_to_base", "kind_of"]

_WITHOUT = "which an adapter here cannot have; train or save it without them"

#: What a tensor that is no factor of ours is, by its name; the first that matches counts.
_LEFTOVERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"lora_magnitude_vector", f"DoRA magnitudes, which are no low-rank update, {_WITHOUT}"),
        (r"lora_[AB]\.([^.]+\.)?bias$", f"biases of LoRA factors (lora_bias), {_WITHOUT}"),
        (
            r"trainable_tokens|token_adapter",
            f"replaced embedding rows (trainable_token_indices), {_WITHOUT}",
        ),
        (
            r"lm_head\.(.+\.)?(lora_|base_layer)",
            "LoRA on lm_head, the output layer, which is not served yet; train without lm_head in "
            "target_modules",
        ),
        (
            r"lora_embedding_[AB]|embed_tokens\.(.+\.)?(lora_|base_layer)",
            "LoRA on embed_tokens, which is not served yet; train without embed_tokens in "
            "target_modules",
        ),
        (r"lora_diag", f"KaSA diagonals, {_WITHOUT}"),
        (
            r"(encoder|vision|visual|audio|speech).*lora_[AB]\.",
            "factors of a module that is none of the seven projections, of a vision or audio "
            "tower; only the language model is served: train without the tower",
        ),
        (
            r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.lora_",
            "factors of latent attention's down-projections, whose output every tensor-parallel "
            "rank holds whole: an adapter there would be a replica on each; train with q_b_proj "
            "(or q_proj), kv_b_proj and o_proj in target_modules",
        ),
        (
            r"\.experts?\.|shared_expert|_experts?\b",
            "factors of experts, and none of the seven projections; serving them would need a "
            "base model with experts, which is not read yet: adapt its attention alone",
        ),
        (
            r"\.(gate|router)\.lora_[AB]\.",
            "factors of a router of experts, which is none of the seven projections; serving them "
            "would need a base model with experts, which is not read yet: train without the router",
        ),
        (
            r"(qkv_proj|gate_up_proj|query_key_value|c_attn|c_proj|W_pack|Wqkv|qkv|wqkv)\.lora_",
            "factors of a fused layer, which is none of the seven projections; serving them would "
            "need B's rows split by projection, as that base model's heads say, which is not done "
            "yet: train on a base model with separate projections",
        ),
        (
            r"lora_[AB]\.",
            f"factors of a module that is none of the seven projections, {_WITHOUT}",
        ),
        (r"\.bias$", f"biases of the base model (bias), {_WITHOUT}"),
        (
            r"(embed_tokens|lm_head)\.weight$",
            "whole embeddings, which PEFT saves by itself after a change of the vocabulary and "
            "with LoRA on them: whole weights of the base model; save again with "
            "save_pretrained(..., save_embedding_layers=False), or pass --base HF_DIR "
            "(base_folder=) with the base model's weights, which drops what equals them",
        ),
        (
            r"\.weight$",
            "whole weights of the base model (modules_to_save), which an adapter here cannot "
            "have; put them into the base model, or pass --base HF_DIR (base_folder=) with its "
            "weights, which drops what equals them",
        ),
        (r"", f"tensors of an unknown kind, {_WITHOUT}"),
    )
)


def kind_of(name: str) -> str:
    """What a tensor is, and what to do about it.

    Returns:
        The end of a sentence that begins with "the file holds".
    """
    clean = clean_name(name)
    return next(what for pattern, what in _LEFTOVERS if pattern.search(clean))


def equal_to_base(
    source: TensorSource, names: Collection[str], folder: Path | None, problems: Problems
) -> set[str]:
    """The tensors that are copies of the base model's own.

    Args:
        source: The adapter's tensors.
        names: Those that are no factors.
        folder: The base model's folder, if it is known.
        problems: Gets a note if the base model's weights cannot be read.
    """
    whole = [name for name in names if "lora_" not in name and source.facts[name] is not None]
    if folder is None or not whole:
        return set()
    try:
        with TensorFiles(folder) as files:
            return {name for name in whole if _is_copy(name, source, files)}
    except (ConfigError, UnsupportedError) as error:
        problems.add(f"whole weights cannot be compared with the base model's: {error}")
        return set()


def _is_copy(name: str, source: TensorSource, files: TensorFiles) -> bool:
    path = clean_name(name).removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    places = [path, f"model.{path}"]
    if path == "lm_head.weight":
        # A model with tied embeddings has one tensor for both.
        places.append("model.embed_tokens.weight")
    fact = source.facts[name]
    assert fact is not None, "the caller has looked"
    for place in places:
        if files.shapes.get(place) == tuple(fact.shape):
            tensor = source.load(name)
            # As the model held it, which may be in another type than its file.
            return all(
                torch.equal(files.rows(place, start, start + len(rows)).to(rows.dtype), rows)
                for start, rows in zip(range(0, len(tensor), 4096), tensor.split(4096), strict=True)
            )
    return False
