"""What a linear layer with an adapter can do, whichever way it is split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, nn

from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.layers.adapters import Adapter, AdapterOptions, ProjectionPlan
from bdlora_megatron.layers.geometry import LayerGeometry, check_own_heads, layer_geometry
from bdlora_megatron.layers.sharing import share_and_shrink, share_input
from bdlora_megatron.layers.slots import LayerSlots
from bdlora_megatron.runtime.versions.layers import weight_is_rebuilt

__all__ = ["LoRALinear"]

_NOT_MERGED = (
    "cannot save a merged layer: its adapter would count twice when it is loaded; call "
    "unmerge_adapters() first, or remove_lora(model, keep_merged=True) for a plain model whose "
    "weights hold the update"
)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LayerT = TypeVar("LayerT", bound="LoRALinear")


def _check_implementation(layer: Any) -> None:
    """Refuse layers that exchange inside the product, before an adapter's part could be added.

    Raises:
        UnsupportedError: The layer's model has ``transformer_impl="inference_optimized"``.
    """
    if getattr(layer.config, "transformer_impl", None) == "inference_optimized":
        raise UnsupportedError(
            "transformer_impl='inference_optimized': its layers fuse the product with its "
            "collectives, so that nothing is left to which an adapter's partial sum could be "
            "added; build the model with transformer_impl='transformer_engine' or 'local'"
        )


class LoRALinear(nn.Module):
    """What the column and the row layer share: holding, merging and saving an adapter.

    Attributes:
        adapter: The trainable part, or None once it was removed.
        adapter_enabled: Whether ``forward`` adds it.
        slots: The adapters that are served together, in place of ``adapter``.
    """

    base_class: ClassVar[type[nn.Module]]
    #: Whether ranks split the input (row-parallel) or the output (column-parallel).
    splits_input: ClassVar[bool]
    #: Attributes that ``base_class`` does not have.
    own_attributes: ClassVar[tuple[str, ...]] = (
        "adapter",
        "adapter_enabled",
        "slots",
        "regather_input",
        "_unmerged",
    )

    # From Megatron-Core's layers; declared because they come without types.
    weight: nn.Parameter
    config: Any
    tp_group: Any
    is_expert: bool
    explicit_expert_comm: bool
    input_size: int
    output_size: int

    adapter: Adapter | None
    adapter_enabled: bool
    slots: LayerSlots | None
    regather_input: bool
    _unmerged: Tensor | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        lora: LoRAConfig | None = None,
        lora_name: str = "",
        **kwargs: Any,
    ) -> None:
        """Build the layer as Megatron-Core builds its own, with a fresh adapter inside.

        Args:
            input_size: I, over all ranks.
            output_size: O, over all ranks.
            lora: The adapter; none when unset.
            lora_name: The layer's attribute name in its parent, such as ``linear_qkv``, or path.
            **kwargs: For ``base_class``, which comes next in every subclass.
        """
        super().__init__(input_size, output_size, **kwargs)
        _check_implementation(self)
        self._start_empty()
        self._check_base()
        if lora is not None:
            self.attach_config(lora, lora_name)

    @classmethod
    def from_base(cls: type[LayerT], base: nn.Module) -> LayerT:
        """Turn a built Megatron-Core layer into one that can hold an adapter.

        Parameters, buffers and hooks are shared with ``base``: nothing is copied or allocated.

        Args:
            base: A layer of exactly ``base_class``.

        Returns:
            The layer, without an adapter yet.

        Raises:
            UnsupportedError: ``base`` is of another class, an MoE expert, quantised, or of a model
                with ``transformer_impl="inference_optimized"``.
        """
        _check_implementation(base)
        if type(base) is not cls.base_class:
            raise UnsupportedError(
                f"cannot turn a {type(base).__name__} into a {cls.__name__}; wanted exactly "
                f"{cls.base_class.__name__}, since a subclass may compute something else"
            )
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        # The containers are copied so that adding an adapter here leaves ``base`` as it was.
        for name in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[name] = base.__dict__[name].copy()
        layer._start_empty()
        layer._check_base()
        return layer

    def to_base(self, *, keep_merged: bool = False) -> nn.Module:
        """Give back the plain Megatron-Core layer, sharing parameters; the adapter is dropped.

        Args:
            keep_merged: Leave the update of a merged adapter in the weight.
        """
        if self.is_merged and not keep_merged:
            self.unmerge()
        base = self.base_class.__new__(self.base_class)
        kept = {k: v for k, v in self.__dict__.items() if k not in self.own_attributes}
        base.__dict__.update(kept)
        for name in ("_parameters", "_buffers", "_modules"):
            base.__dict__[name] = self.__dict__[name].copy()
        base.__dict__["_modules"].pop("adapter", None)
        return base

    def _start_empty(self) -> None:
        self.adapter = None
        self.adapter_enabled = True
        self.slots = None
        self.regather_input = False
        self._unmerged = None

    def _check_base(self) -> None:
        if self.is_expert:
            raise UnsupportedError(
                "this layer belongs to a mixture-of-experts expert, whose tokens move between "
                "ranks; adapters cover dense layers only: exclude it from target_modules"
            )
        if weight_is_rebuilt(self):
            raise UnsupportedError(
                "this layer gathers its weight from other ranks for each use "
                "(gtp_weight_remat_size > 1); adapters need the whole local weight: set it to 1"
            )
        weight = self.weight
        if weight is not None and (
            weight.dtype not in _FLOATS or hasattr(weight, "quant_state") or is_float8tensor(weight)
        ):
            raise UnsupportedError(
                f"the base weight is quantised (dtype {weight.dtype}); dequantise the base model "
                f"to one of {[str(kind) for kind in _FLOATS]} first"
            )

    def geometry(self, name: str, *, fused: bool) -> LayerGeometry:
        """The projections this layer holds under the name or path that its parents give it."""
        return layer_geometry(
            name, self.config, self.output_size, fused=fused, tp_size=self.tp_group.size()
        )

    def attach(
        self,
        plans: Sequence[ProjectionPlan],
        geometry: LayerGeometry,
        *,
        layout: Layout,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        invocation_tokens: tuple[int, ...] | None = None,
    ) -> Adapter:
        """Put a fresh adapter in, replacing any other.

        Args:
            plans: The projections that get a pair of factors.
            geometry: All projections of this layer.
            layout: How ranks split the factors.
            dropout: Probability of zeroing an input element on the adapter's path, in training.
            dtype: The factors' type; the base weight's when unset.
            invocation_tokens: From which tokens on it acts; every token when None.

        Returns:
            The adapter, which changes nothing until B is trained or loaded.

        Raises:
            ConfigError: The layer is merged, or the plans do not divide as the layout needs.
        """
        if self.is_merged:
            raise ConfigError("the layer's adapter is merged into the base weight; unmerge() first")
        if self.slots is not None:
            raise ConfigError(
                "the layer serves several adapters from slots; detach them before it gets one of "
                "its own"
            )
        layout = Layout(layout)
        options = AdapterOptions(
            dropout=dropout,
            dtype=dtype or self.weight.dtype,
            like=self.weight,
            tp_group=self.tp_group,
        )
        adapter = self._make_adapter(layout, plans, options, geometry)
        adapter.build(options)
        adapter.invocation_tokens = invocation_tokens
        adapter.train(self.training)
        self.adapter = adapter
        return adapter

    def attach_config(self, lora: LoRAConfig, name: str) -> Adapter:
        """Put in the fresh adapter that ``lora`` describes.

        Args:
            lora: Rank, blocks, scale, layout, dropout.
            name: The layer's attribute name in its parent, such as ``linear_qkv``, or its path.

        Returns:
            The adapter.

        Raises:
            UnsupportedError: The layer repeats key-value heads.
        """
        geometry = self.geometry(name, fused=lora.fused)
        check_own_heads(name, self.config)
        plans = [
            ProjectionPlan(
                projection=projection, rank=lora.rank, num_blocks=lora.blocks, scale=lora.scale
            )
            for projection in geometry.projections
        ]
        self.regather_input = lora.regather_input
        return self.attach(
            plans,
            geometry,
            layout=lora.layout,
            dropout=lora.dropout,
            dtype=lora.dtype,
            invocation_tokens=lora.invocation_tokens,
        )

    def _make_adapter(
        self,
        layout: Layout,
        plans: Sequence[ProjectionPlan],
        options: AdapterOptions,
        geometry: LayerGeometry,
    ) -> Adapter:
        raise NotImplementedError

    def _active(self) -> Adapter | None:
        """The adapter that this call has to add, if any."""
        if self.adapter is None or not self.adapter_enabled or self.is_merged:
            return None
        self._check_reduces()
        return self.adapter

    def _serving(self) -> LayerSlots | None:
        """The slots that this call has to run, if a step is set."""
        if self.slots is None or self.slots.step.batch is None:
            return None
        self._check_reduces()
        return self.slots

    def _runs_adapters(self) -> bool:
        """Whether this call has to add anything to the base product."""
        return self._active() is not None or self._serving() is not None

    def _share_input(
        self, x: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A column layer's input for the base product, and what adds the adapters' to that.

        Args:
            x: The layer's own input.
            allreduce_dgrad: The base layer would all-reduce dX by itself.
            sequence_parallel: The base layer would gather X by itself.

        Returns:
            ``[S, b, I]``, and a function from the base product to the sum.
        """
        own = {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
        slots, adapter = self._serving(), self._active()
        if slots is not None:
            shared = share_input(x, **own, group=self.tp_group)
            return shared, lambda base: slots.add(base, shared)
        assert adapter is not None
        shared, z = share_and_shrink(adapter, x, **own, regather=self.regather_input)
        return shared, lambda base: adapter.expand(z, base)

    def _add_to(self, base: Tensor, x: Tensor) -> Tensor:
        """A row layer's partial sum with the adapters' products, if any, added to it."""
        slots, adapter = self._serving(), self._active()
        if slots is not None:
            return slots.add(base, x)
        return base if adapter is None else adapter.expand(adapter.shrink(x), base)

    def _check_reduces(self) -> None:
        """Refuse a layer whose partial sums would stay partial.

        Raises:
            UnsupportedError: The layer no longer reduces its own output.
        """
        if self.explicit_expert_comm:
            raise UnsupportedError(
                "this layer leaves its communication to a mixture-of-experts dispatcher "
                "(explicit_expert_comm=True, as moe_shared_expert_overlap sets it), so an "
                "adapter's partial sums would not be reduced; turn the overlap off or exclude it"
            )

    @property
    def is_merged(self) -> bool:
        """Whether the base weight holds the adapter's update."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight; ``forward`` then runs the base product alone.

        The original weight is kept, so that ``unmerge`` restores every bit; merging therefore holds
        a second copy of the weight.

        Raises:
            ConfigError: There is no adapter, or it is merged already.
            UnsupportedError: It acts on a part of the tokens only.

        Collectives: none for BD-LoRA (see ``Adapter.delta_weight``).
        """
        if self.adapter is None or self.is_merged:
            state = "already merged" if self.is_merged else "absent"
            raise ConfigError(f"cannot merge: the adapter is {state}")
        if self.adapter.invocation_tokens:
            raise UnsupportedError(
                "cannot merge: the adapter acts from its invocation tokens "
                f"{list(self.adapter.invocation_tokens)} on, and a merged weight on every token"
            )
        original = self.weight.data
        # In fp32 at least, so that the sum is rounded once.
        wide = torch.promote_types(original.dtype, torch.float32)
        merged = original.to(wide) + self.adapter.delta_weight(wide)
        self.weight.data = merged.to(original.dtype)
        self._unmerged = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original base weight back, bit for bit.

        Raises:
            ConfigError: Nothing is merged.
        """
        if self._unmerged is None:
            raise ConfigError("cannot unmerge: nothing is merged")
        self.weight.data = self._unmerged
        self._unmerged = None

    @contextmanager
    def base_weight(self) -> Iterator[None]:
        """Compute with the original weight of a merged layer inside the ``with`` block."""
        merged = self.weight.data
        if self._unmerged is not None:
            self.weight.data = self._unmerged
        try:
            yield
        finally:
            self.weight.data = merged

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_merged:
            raise ConfigError(_NOT_MERGED)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The weight that comes is no merged one; one that was kept would come back with unmerge().
        if self.is_merged:
            self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe base and adapter shards to ``megatron.core.dist_checkpointing``.

        Raises:
            ConfigError: The adapter is merged: the checkpoint would hold it twice.
        """
        if self.is_merged:
            raise ConfigError(_NOT_MERGED)
        below = f"{prefix}adapter."
        sharded: dict[str, Any] = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        # Megatron's own method takes every parameter below the layer for a replica.
        sharded = {key: value for key, value in sharded.items() if not key.startswith(below)}
        if self.adapter is not None:
            sharded.update(self.adapter.sharded_state_dict(below, sharded_offsets, metadata))
        return sharded
