"""Names of a PEFT adapter's tensors: every usual spelling is read, PEFT's own alone is written.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

PEFT ignores a tensor under any other name without an error. What trainers leave in names (wrappers
anywhere in the path, the adapter's name, or no `base_model.model.`) says nothing of the update.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bdlora_megatron.convert.adapter.neutral import ModuleKey
from bdlora_megatron.decoder import ALL_MODULE_NAMES

__all__ = [
    "PEFT_PREFIX",
    "FactorName",
    "clean_name",
    "parse_factor",
    "peft_prefix",
    "with_latent_attention",
]

PEFT_PREFIX = "base_model.model."
#: Where models with a vision or audio tower keep their language model, which is the base's own.
_LANGUAGE_MODELS = frozenset({"language_model", "language", "llm", "text_model", "thinker"})
#: What Nemotron-H's own code calls what transformers calls `model`.
_BACKBONE = "backbone."
#: The names by the end of their paths; latent attention's `q_proj` is told by what is beside it.
_BY_PATH = {
    str(ModuleKey(layer=0, name=name)).removeprefix("layers.0."): name
    for name in ALL_MODULE_NAMES
    if name != "latent.q_proj"
}
_FACTOR = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)layers\.(?P<layer>0|[1-9][0-9]{0,4})\."
    rf"(?P<module>{'|'.join(map(re.escape, _BY_PATH))})"
    r"\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
# No real name is this long; the cap bounds what PEFT's patterns are matched against.
_LONGEST = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorName:
    """What the name of a factor says.

    Attributes:
        key: The module.
        prefix: What stands before `layers.` in the base model, such as `model.`.
        factor: A or B.
        adapter: The adapter's name where the tensor's name holds one, else None.
        name: The name in the file.
    """

    key: ModuleKey
    prefix: str
    factor: str
    adapter: str | None
    name: str

    @property
    def path(self) -> str:
        """The module's path in the base model, which PEFT's patterns are matched against."""
        return f"{self.prefix}{self.key}"

    def is_applied(self, targets: object) -> bool:
        """Whether PEFT applies a tensor of this name; it ignores others without an error.

        Args:
            targets: The config's `target_modules`; only a list of names can be judged here.

        Returns:
            False for other spellings, and for modules that the config does not adapt.
        """
        stem = f"{PEFT_PREFIX}{self.path}.lora_{self.factor}"
        if isinstance(targets, list) and targets:
            adapted = any(f".{self.path}".endswith(f".{target}") for target in targets)
        else:
            adapted = True
        return adapted and self.name in (f"{stem}.weight", f"{stem}.default.weight")


def parse_factor(name: str, *, task_type: object = None) -> FactorName | None:
    """Take a tensor's name apart.

    Args:
        name: The name in the file.
        task_type: The config's, which tells whether layers stand below a model with a head.

    Returns:
        What it says; None if it is no factor of a projection that adapters here change.
    """
    clean = clean_name(name)
    found = _FACTOR.fullmatch(clean.removeprefix(PEFT_PREFIX))
    if found is None or len(clean) > _LONGEST:
        return None
    return FactorName(
        key=ModuleKey(layer=int(found["layer"]), name=_BY_PATH[found["module"]]),
        prefix=_base_prefix(found["prefix"], clean.startswith(PEFT_PREFIX), task_type),
        factor=found["factor"],
        adapter=found["adapter"],
        name=name,
    )


def with_latent_attention(factors: Sequence[FactorName]) -> list[FactorName]:
    """The same factors, a `q_proj` beside latent attention's `kv_b_proj` under its own name."""
    if not any(factor.key.name == "kv_b_proj" for factor in factors):
        return list(factors)
    return [
        replace(factor, key=replace(factor.key, name="latent.q_proj"))
        if factor.key.name == "q_proj"
        else factor
        for factor in factors
    ]


def clean_name(name: str) -> str:
    """A tensor's name without wrappers, and without what stands before PEFT's own prefix."""
    # DDP's and DeepSpeed's is `module`; torch.compile, FSDP, activation checkpointing, Lightning
    # and Opacus name theirs like `_orig_mod`, as no part of a base model is named.
    plain = ".".join(p for p in name.split(".") if p != "module" and not p.startswith("_"))
    # PEFT over PEFT repeats the prefix; what a trainer calls the whole model stands before it.
    _, prefix, path = f".{plain}".rpartition(f".{PEFT_PREFIX}")
    return f"{PEFT_PREFIX}{path}" if prefix else plain


def peft_prefix(prefix: str) -> str:
    """The prefix to write for one that was read, whoever noted it."""
    clean = clean_name(f"{prefix}layers").removesuffix("layers")
    is_peft = clean.startswith(PEFT_PREFIX)
    return f"{PEFT_PREFIX}{_base_prefix(clean.removeprefix(PEFT_PREFIX), is_peft, None)}"


def _base_prefix(prefix: str, is_peft: bool, task_type: object) -> str:
    """Where the base model has its layers, from a name that may lack a part."""
    if prefix == "model.model.":
        return "model."
    if prefix == _BACKBONE:
        return prefix
    if is_peft:
        # A model with a language head has them below `model`; without a head they are its own.
        return "model." if not prefix and task_type == "CAUSAL_LM" else prefix
    if not prefix and task_type == "FEATURE_EXTRACTION":
        return prefix
    # The model's own name in a trainer is no part of the base model; a language model's is.
    return prefix if _LANGUAGE_MODELS & set(prefix.split(".")) else "model."
