"""The neutral adapter: what every reader makes, and every writer, layer and store takes.

Modules carry Hugging Face's names and row order whatever file they came from, so two formats need
a reader and a writer each and never a converter between them. Letters in shapes: I in features,
O out features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bdlora_megatron.blocks import Blocked, BlockFactors
from bdlora_megatron.decoder import ALL_MODULE_NAMES, MODULE_NAMES, ModuleName, facts_of
from bdlora_megatron.errors import ShapeError

__all__ = [
    "ALL_MODULE_NAMES",
    "FUSED",
    "MODULE_NAMES",
    "PROJECTIONS",
    "Adapter",
    "BaseShape",
    "ModuleKey",
    "ModuleName",
    "blocked_factor",
    "infer_base_shape",
]


#: In an adapter's metadata, where Hugging Face's model has `qkv_proj` and `gate_up_proj`.
PROJECTIONS, FUSED = "projections", "fused"


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ModuleKey:
    """One linear module of the base model.

    Attributes:
        layer: The decoder layer, counted from 0 over the whole model.
        name: The projection.
    """

    layer: int
    name: ModuleName

    def __str__(self) -> str:
        own = self.name.rpartition(".")[2]
        return f"layers.{self.layer}.{facts_of(self.name)[0].parent}.{own}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseShape:
    """Sizes of the base model, as far as they are known.

    Factors tell widths; only a model's own config tells heads and the number of layers.

    Attributes:
        hidden_size: Width of the residual stream.
        ffn_size: Width inside the MLP.
        q_size: Query heads times their width; in latent attention, times that of their values.
        kv_size: Key-value heads times their width.
        num_heads: Query heads.
        num_kv_heads: Key-value heads, Megatron's query groups.
        head_dim: Width of a head.
        num_layers: Decoder layers.
        q_lora_rank: Width of latent attention's compressed queries.
        kv_lora_rank: Width of its compressed keys and values.
        latent_q_size: Query heads times their width, in latent attention.
        latent_kv_size: Heads times the width of a key's part without position and of a value.
        delta_heads: Key heads of the gated delta net, by which its rows stand.
        delta_qkvz_size: Rows of the delta net's queries, keys, values and gates.
        delta_ba_size: Rows of the delta net's beta and alpha.
        delta_size: Value heads of the delta net times their width.
        ssm_in_size: Rows of all that Mamba's input projection makes.
        ssm_size: Mamba's heads times their width.
    """

    hidden_size: int | None = None
    ffn_size: int | None = None
    q_size: int | None = None
    kv_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_layers: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    latent_q_size: int | None = None
    latent_kv_size: int | None = None
    delta_heads: int | None = None
    delta_qkvz_size: int | None = None
    delta_ba_size: int | None = None
    delta_size: int | None = None
    ssm_in_size: int | None = None
    ssm_size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """One adapter, free of any file format and any tensor-parallel size.

    Attributes:
        name: What to call it; readers take the folder's name.
        modules: The update of every adapted module. Column-parallel ones block B, row-parallel
            ones A, also with one block. Readers may give a mapping that loads on access.
        base: What is known of the base model.
        invocation_tokens: Token ids from whose last occurrence on it acts (Activated LoRA); None
            for one that acts on every token.
        metadata: Where it came from, for people and for writers; nothing here changes the numbers.
    """

    name: str
    modules: Mapping[ModuleKey, BlockFactors]
    base: BaseShape = field(default_factory=BaseShape)
    invocation_tokens: tuple[int, ...] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def blocked_factor(name: ModuleName) -> Blocked:
    """The factor whose blocks line up with tensor parallelism.

    Returns:
        `"A"` for row-parallel ones such as `o_proj` and `down_proj`, `"B"` for column-parallel
        ones.
    """
    return facts_of(name)[0].blocked


def infer_base_shape(features: Iterable[tuple[ModuleKey, int, int]]) -> BaseShape:
    """The base model's widths from those of the adapted modules.

    Returns:
        The widths that some module tells; the rest is None.

    Raises:
        ShapeError: If two modules disagree. All widths in question are listed.
    """
    seen: dict[str, dict[int, ModuleKey]] = {}
    for key, in_features, out_features in features:
        linear, projection = facts_of(key.name)
        for side, width in ((linear.in_size, in_features), (projection.out_size, out_features)):
            seen.setdefault(side, {}).setdefault(width, key)
    torn = [
        f"{side} is " + " but ".join(f"{width} by {key}" for width, key in widths.items())
        for side, widths in seen.items()
        if len(widths) > 1
    ]
    if torn:
        raise ShapeError(
            f"the modules are not those of one base model: {'; '.join(torn)}; wanted one width "
            "each; check num_blocks against the factors' shapes"
        )
    return BaseShape(**{side: next(iter(widths)) for side, widths in seen.items()})
