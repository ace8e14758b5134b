"""BD-LoRA in Megatron-Bridge: a ``PEFT`` for ``ConfigContainer.peft``, and ``peft.scheme`` in YAML.

Importing this needs megatron-bridge, which itself needs Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from bdlora_megatron.errors import ConfigError, MissingDependencyError, UnsupportedError
from bdlora_megatron.export import export_asked_for
from bdlora_megatron.integrations import BlockDiagonalSettings, export_adapter, make_peft
from bdlora_megatron.layers import lora_layers

try:
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.utils import instantiate_utils
except ImportError as error:
    raise MissingDependencyError(
        f"bdlora_megatron.bridge needs Megatron-Bridge and what it imports ({error}); "
        "pip install 'bdlora-megatron[bridge,te]'"
    ) from error

__all__ = ["AdapterExport", "BDLoRA", "apply_settings", "build_peft", "export_adapter"]


@dataclass
class BDLoRA(BlockDiagonalSettings, PEFT):
    """Block-diagonal LoRA for Megatron-Bridge, used where its own ``LoRA`` would be.

    Fields are those of ``BlockDiagonalSettings``. Bridge applies it to the loaded base model before
    it wraps the model for data parallelism and saves what has ``.adapter.`` in its name.
    """

    def transform(
        self, module: nn.Module, name: str | None = None, prefix: str | None = None
    ) -> Any:
        """Refused: layers are chosen over the whole model, so that misspelt targets are noticed.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"BDLoRA cannot transform {name!r} by itself; call the object on the whole model"
        )

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Freeze the model and put fresh adapters in.

        Args:
            model: One model, or the list of model chunks of this pipeline stage.
            training: Leave the adapters trainable.

        Returns:
            ``model``.

        Raises:
            ConfigError: Settings are wrong, or the model is wrapped or has adapters already.
            TargetError: A target pattern matches no layer on any pipeline stage.
            UnsupportedError: A matched layer cannot carry an adapter.
        """
        chunks = model if isinstance(model, list) else [model]
        self.freeze_model(model, training=training)
        self.put_into(chunks)
        if not training:
            self.freeze_model(model, training=False)
        for chunk in chunks:
            chunk.train(mode=training)
        return model

    def to_cfg_dict(self) -> dict[str, Any]:
        """What Bridge writes into ``run_config.yaml``: the settings alone.

        Without this it adds the names of the trained weights, as a set, and then cannot read the
        file again.
        """
        settings = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        return {"_target_": _target(type(self)), **settings}

    def enable_adapter_layers(self, model: Any) -> None:
        """Let the adapters add to the base model's output again."""
        _set_enabled(model, True)

    def disable_adapter_layers(self, model: Any) -> None:
        """Run the base model alone."""
        _set_enabled(model, False)


def _allow_as_target(name: str) -> None:
    """Let configurations name our class by ``_target_``: this one, and nothing else of ours.

    Bridge 0.4 and newer call nothing from YAML that is not on their list.
    """
    allowed = getattr(instantiate_utils, "target_allowlist", None)
    if allowed is not None:
        allowed.add_exact(name)
    elif hasattr(instantiate_utils, "register_allowed_target_prefix"):
        # 0.4 compares the start of a name alone.
        instantiate_utils.register_allowed_target_prefix(name)


def _target(kind: type) -> str:
    """What ``_target_`` calls a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


_allow_as_target(_target(BDLoRA))


def _set_enabled(model: Any, enabled: bool) -> None:
    for chunk in model if isinstance(model, list) else [model]:
        for name, layer in lora_layers(chunk):
            if layer.is_merged:
                raise ConfigError(f"{name} is merged; call unmerge_adapters() first")
            layer.adapter_enabled = enabled


def build_peft(config: Any) -> Any:
    """Make the object for ``ConfigContainer.peft`` that a ``peft`` section asks for.

    Args:
        config: The section, or a mapping that holds it as ``peft`` or ``model.peft``.

    Returns:
        A ``BDLoRA``, Bridge's own ``LoRA``, or None for scheme ``none``.

    Raises:
        ConfigError: The scheme, a key or a value is wrong.
    """
    return make_peft(config, BDLoRA, _bridges_lora)


def _bridges_lora(**arguments: Any) -> Any:
    from megatron.bridge.peft.lora import LoRA

    return LoRA(**arguments)


class AdapterExport(Callback):
    """Writes the trained adapter as PEFT's folder, when training ends.

    ``pretrain(config, forward_step, callbacks=[AdapterExport()])``. What is written is told by
    ``export_peft`` and ``export_dense`` of ``config.peft``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Say where.

        Args:
            folder: Where ``hf_adapter`` goes; ``config.checkpoint.save`` when unset.
        """
        self.folder = folder
        self.exported: list[Path] = []

    def on_train_start(self, context: Any) -> None:
        """Refuse Bridge's own export before anything is trained.

        Raises:
            UnsupportedError: ``checkpoint.also_save_hf_checkpoint`` is on.
        """
        _refuse_bridges_export(context.state.cfg)

    def on_train_end(self, context: Any) -> None:
        """Write from all ranks.

        Raises:
            ConfigError: There is no folder, or it cannot be written.
        """
        config = context.state.cfg
        if not isinstance(config.peft, BDLoRA):
            return
        folder = self.folder or config.checkpoint.save
        if folder is None:
            raise ConfigError("checkpoint.save is unset; give AdapterExport a folder")
        self.exported = export_asked_for(config.peft, context.model, folder)


def _refuse_bridges_export(config: Any) -> None:
    """Bridge 0.6 exports at every save, and stops at the first where the LoRA is not its own.

    Raises:
        UnsupportedError: It is asked to, for a BD-LoRA.
    """
    asked = getattr(config.checkpoint, "also_save_hf_checkpoint", False)
    if asked and isinstance(config.peft, BDLoRA):
        raise UnsupportedError(
            "checkpoint.also_save_hf_checkpoint is on, but Bridge can export its own LoRA alone; "
            "leave it off: the callback AdapterExport writes PEFT's folder of a BD-LoRA"
        )


def apply_settings(
    config: Any, yaml_path: str | Path | None = None, overrides: Sequence[str] = ()
) -> Any:
    """Apply a YAML file and ``key=value`` arguments to Bridge's configuration, ``peft`` included.

    Bridge's own ``process_config_with_overrides`` cannot: it takes a PEFT object for a function and
    leaves it out, so that ``peft.scheme=bdlora`` is refused, or ignored where a recipe chose LoRA.

    Args:
        config: A ``ConfigContainer``, such as a recipe returns.
        yaml_path: A file with Bridge's sections and ours for ``peft``.
        overrides: Hydra-style arguments; ``peft.…`` ones in the plain ``key=value`` form.

    Returns:
        ``config``, changed in place.

    Raises:
        ConfigError: The file cannot be read, or the ``peft`` settings are wrong.
        UnsupportedError: Bridge's own export is asked for beside a BD-LoRA.
    """
    from megatron.bridge.training.utils import omegaconf_utils as bridge_conf
    from omegaconf import OmegaConf

    try:
        settings = OmegaConf.load(yaml_path) if yaml_path is not None else OmegaConf.create({})
    except OSError as error:
        raise ConfigError(f"cannot read {yaml_path}: {error.strerror}; name a YAML file") from error
    ours = [text.lstrip("+") for text in overrides if text.lstrip("+").startswith("peft.")]
    rest = [text for text in overrides if text.lstrip("+") not in ours]
    section = OmegaConf.merge(
        {"peft": settings.pop("peft", None) or {}}, OmegaConf.from_dotlist(ours)
    )
    # A section with _target_ is Bridge's own way, and Bridge makes the object.
    foreign = "_target_" in section.peft
    peft = build_peft(section.peft) if section.peft and not foreign else None
    merged, kept = bridge_conf.create_omegaconf_dict_config(config)
    merged = OmegaConf.merge(merged, settings, section if foreign else {})
    if rest:
        merged = bridge_conf.parse_hydra_overrides(merged, rest)
    if section.peft:
        # Otherwise the recipe's own PEFT object would be put back over ours.
        kept = {name: value for name, value in kept.items() if name != "root.peft"}
    bridge_conf.apply_overrides(config, OmegaConf.to_container(merged, resolve=True), kept)
    if section.peft and not foreign:
        config.peft = peft
    if isinstance(config.peft, Mapping):
        # Bridge only warns where it cannot make an object.
        raise ConfigError(
            f"Bridge could not make peft._target_={config.peft.get('_target_')}; its warning above "
            "says why; mend the section, or choose by peft.scheme"
        )
    _refuse_bridges_export(config)
    return config
