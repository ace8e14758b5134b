"""The models that the cost model knows by name, and the layers that it can count."""

from __future__ import annotations

from collections.abc import Sequence

from bdlora_megatron.config import DEFAULT_TARGETS
from bdlora_megatron.decoder import MODULE_NAMES, facts_of
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.shape import ModelShape

__all__ = ["PRESETS", "check_targets"]


def check_targets(names: Sequence[str]) -> None:
    """Refuse layers that the cost model does not know.

    Raises:
        ConfigError: There are none, or one of them is not in ``DEFAULT_TARGETS`` or comes twice.
    """
    unknown = [name for name in names if name not in DEFAULT_TARGETS]
    parts = [f"{name} is in {facts_of(name)[0].name}" for name in MODULE_NAMES if name in unknown]
    if unknown or not names or len(set(names)) < len(names):
        hint = f" ({', '.join(parts)})" if parts else ""
        raise ConfigError(
            f"target_modules={','.join(names)}{hint}; wanted one or more of "
            f"{', '.join(DEFAULT_TARGETS)}, each once"
        )


#: Sizes from the models' own config.json.
PRESETS = {
    "llama-3.1-8b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
    "llama-3.1-70b": ModelShape(
        num_layers=80,
        hidden_size=8192,
        ffn_size=28672,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}
