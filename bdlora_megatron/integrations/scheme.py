"""``peft.scheme`` in YAML: which method is asked for, and with which settings.

```yaml
peft:
  scheme: bdlora          # or lora, none; peft_scheme is read as well
  bdlora:
    rank: 16              # or dim
    num_blocks: 4
```

These are the keys of ``bdlora train``. No version of NeMo or Megatron-Bridge has such a key itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bdlora_megatron.errors import ConfigError, nearest
from bdlora_megatron.integrations.settings import BlockDiagonalSettings

__all__ = ["PeftChoice", "make_peft", "read_scheme"]

_SCHEMES = ("bdlora", "lora", "none")
# What the hosts' own LoRA classes have in common.
_LORA_KEYS = ("target_modules", "exclude_modules", "dim", "alpha", "dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftChoice:
    """A method and the arguments of the class that carries it out.

    Attributes:
        scheme: ``bdlora``, ``lora`` or ``none``.
        arguments: Keyword arguments for the host's class.
    """

    scheme: str
    arguments: Mapping[str, Any]


def read_scheme(config: Any) -> PeftChoice:
    """Read the ``peft`` section of a configuration.

    Args:
        config: The section, or a mapping that holds it as ``peft`` or ``model.peft``; plain or
            OmegaConf's.

    Returns:
        The method and its arguments.

    Raises:
        ConfigError: The scheme or a key is unknown (the nearest one is named), or is no mapping.
    """
    section = _section(_plain(config))
    names = [name for name in ("scheme", "peft_scheme") if name in section]
    if len(names) != 1:
        found = "both" if names else "neither"
        raise ConfigError(
            f"peft has {found} of scheme and peft_scheme; set peft.scheme to one of {_SCHEMES}"
        )
    scheme = section[names[0]]
    scheme = "none" if scheme is None else scheme
    if scheme not in _SCHEMES:
        raise ConfigError(f"peft.scheme={scheme!r}; {nearest(scheme, _SCHEMES)}")
    _refuse_unknown(section, (names[0], "bdlora", "lora"), "peft")
    if scheme == "none":
        return PeftChoice(scheme="none", arguments={})
    known = [entry.name for entry in fields(BlockDiagonalSettings)]
    return PeftChoice(
        scheme=scheme,
        arguments=_arguments(section, scheme, known if scheme == "bdlora" else _LORA_KEYS),
    )


def make_peft(config: Any, ours: Callable[..., Any], lora: Callable[..., Any]) -> Any:
    """Make the host's object for the method that a ``peft`` section asks for.

    Args:
        config: As ``read_scheme`` takes it.
        ours: The plug's ``BDLoRA``.
        lora: Makes the host's own ``LoRA``; only called when it is asked for.

    Returns:
        One of the two, or None for scheme ``none``.

    Raises:
        ConfigError: The scheme, a key or a value is wrong.
    """
    choice = read_scheme(config)
    if choice.scheme == "none":
        return None
    return (ours if choice.scheme == "bdlora" else lora)(**choice.arguments)


def _plain(config: Any) -> Any:
    if hasattr(config, "_metadata"):  # an OmegaConf node
        from omegaconf import OmegaConf

        return OmegaConf.to_container(config, resolve=True)
    return config


def _section(config: Any) -> Mapping[str, Any]:
    for outer in ("model", "peft"):
        if isinstance(config, Mapping) and isinstance(config.get(outer), Mapping):
            config = config[outer]
    if not isinstance(config, Mapping):
        raise ConfigError(f"peft is {config!r}; wanted a section with scheme and its settings")
    return config


def _arguments(section: Mapping[str, Any], scheme: str, known: Sequence[str]) -> dict[str, Any]:
    values = section.get(scheme)
    values = {} if values is None else values
    where = f"peft.{scheme}"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r}; wanted a section with keys")
    _refuse_unknown(values, (*known, "rank"), where)
    if "rank" in values and "dim" in values:
        raise ConfigError(
            f"{where}.rank and {where}.dim are two names of one setting; leave one out"
        )
    return {("dim" if key == "rank" else key): value for key, value in values.items()}


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {where}.{key}; {nearest(key, known)}")
