"""Which options of PEFT's `adapter_config.json` can be represented.

Options fall in four groups: those that set rank, scale and blocks (`convert.peft.config` reads
them); those that only steered training, which pass; those that other tools add and that change
nothing, which are noted; those that change the forward pass or the base weights, which are refused
by name. An option in no group is refused when it is set, since it may do either, unless the caller
ignores it by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.errors import ConfigError

__all__ = ["READ_WITHOUT", "check_ignorable", "find_refused"]

#: What a reader says of options that `find_refused` gives back.
READ_WITHOUT = "it is read without options that change no update"
_READ = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "base_model_name_or_path",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "use_bdlora",
        "use_rslora",
    }
)

# Which modules were adapted (the tensors' names tell), how they were trained or started, and
# `bias`, whose tensors are refused where there are any.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)

# What tools write beside PEFT's own options, and any version; none of them changes an update.
_NOTED = frozenset(
    {
        "_from_model_config",
        "base_model_class",
        "base_model_revision",
        "library_name",
        "lora_dtype",
        "lora_plus_lr_ratio",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "merge_weights",
        "model_type",
        "parent_library",
        "swift_type",
        "torch_dtype",
        "unsloth_fixed",
    }
)

_REFUSED = {
    "use_dora": "it rescales whole adapted weights; merge it into its base model, or train without",
    "lora_bias": "it adds a bias, which is no low-rank update; train without it",
    "modules_to_save": "whole weights are no low-rank update; put them into the base model",
    "trainable_token_indices": "it replaces embedding rows; put them into the base model",
    "target_parameters": "it adapts fused expert weights; adapt linear modules instead",
    "arrow_config": "it routes between adapters; read each of them by itself",
    "kasa_config": "it changes the base weights and adds a diagonal; train a plain LoRA",
    "monteclora_config": "it samples the factors; train a plain LoRA",
    "use_qalora": "it pools the input; train a plain LoRA",
    "layer_replication": "it repeats layers of the base model; build that base model first",
    **dict.fromkeys(
        ("invocation_string", "alora_invocation_string"),
        "it is of an Activated LoRA from before PEFT had them, which may begin to act a token "
        "later; set alora_invocation_tokens to the tokens from which it acts, and take it out",
    ),
    "enable_lora": "it adapts parts of a fused layer; train a plain LoRA",
}

# After training these are a plain LoRA on an unchanged base.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
# These changed the base weights, unless PEFT converted the adapter back when saving it.
_CONVERTIBLE_INITS = ("pissa", "olora", "corda")


def check_ignorable(options: Collection[str]) -> None:
    """See that options that a caller wants ignored are unknown ones.

    Raises:
        ConfigError: One is known, so what it does is known too.
    """
    known = sorted(set(options) & (_READ | _HARMLESS | _REFUSED.keys()))
    if known:
        raise ConfigError(
            f"{', '.join(known)} cannot be ignored: what it does is known, and it is read, refused "
            "or harmless; leave it out of --ignore-unknown (ignore_unknown=)"
        )


def find_refused(
    raw: Mapping[str, Any],
    problems: Problems,
    *,
    ignore_unknown: Collection[str] = (),
    allowed: Collection[str] = (),
) -> list[str]:
    """Note every option that cannot be represented.

    Args:
        raw: The JSON object.
        problems: Gets one entry per option.
        ignore_unknown: Unknown options that the caller knows to be harmless.
        allowed: Refused options that turned out to change nothing.

    Returns:
        The options that are set and were ignored, for a note.
    """
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        problems.add(f'peft_type is {peft_type!r}, wanted "LORA"; only LoRA and BD-LoRA are read')
    for option, why in _REFUSED.items():
        if raw.get(option) and option not in allowed:
            problems.add(f"{option} is set: {why}")
    _find_refused_init(raw.get("init_lora_weights"), problems)
    unknown = {o for o in raw.keys() - _READ - _HARMLESS - _REFUSED.keys() if raw[o]}
    ignored = {o for o in unknown if o in _NOTED or o.endswith("_version") or o in ignore_unknown}
    for option in sorted(unknown - ignored):
        problems.add(
            f"{option!r} is an unknown option and may change the update; if you know that it does "
            f"not, pass --ignore-unknown {option} (ignore_unknown=)"
        )
    return sorted(ignored)


def _find_refused_init(init: object, problems: Problems) -> None:
    if isinstance(init, str) and init.startswith(_CONVERTIBLE_INITS):
        problems.add(
            f"init_lora_weights is {init!r}, which changed the base weights; save the adapter "
            "again with PEFT's path_initial_model_for_weight_conversion"
        )
    elif init == "loftq":
        problems.add(
            "init_lora_weights is 'loftq', which changed the base weights; train from another "
            "initialisation"
        )
    elif init not in _PLAIN_INITS:
        problems.add(
            f"init_lora_weights is {init!r}, which is unknown and may have changed the base "
            "weights; if it did not, set it to true"
        )
