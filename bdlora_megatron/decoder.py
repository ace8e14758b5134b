"""A decoder's anatomy: its adapted linear layers, the projections in them, and what each is called.

One table for everything that has to know: the layers, the files' readers and writers, the base
models and the cost model. It needs neither torch nor Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

__all__ = [
    "ALL_LINEARS",
    "ALL_MODULE_NAMES",
    "DEFAULT_TARGETS",
    "FUSED_PARTS",
    "LINEARS",
    "MODULE_NAMES",
    "NUMBERINGS",
    "PARTS",
    "LinearFacts",
    "ModelClass",
    "ModuleName",
    "Numbering",
    "ProjectionFacts",
    "facts_of",
    "heads_fit",
    "hybrid_layers",
    "hybrid_numbering",
    "numbering_of",
    "parts_of",
    "target_of",
]

#: A projection's name. The seven of a Llama-shaped decoder are Hugging Face's own; where those
#: would name two things, the family's word stands before them. The last two are several of the
#: seven in one, and only files of models that fuse them have such modules.
ModuleName: TypeAlias = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "latent.q_proj",
    "q_b_proj",
    "kv_b_proj",
    "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_ba",
    "linear_attn.out_proj",
    "mixer.in_proj",
    "mixer.out_proj",
    "mixer.q_proj",
    "mixer.k_proj",
    "mixer.v_proj",
    "mixer.o_proj",
    "mixer.up_proj",
    "mixer.down_proj",
    "qkv_proj",
    "gate_up_proj",
]
ALL_MODULE_NAMES: tuple[ModuleName, ...] = get_args(ModuleName)
#: How Hugging Face numbers a model's layers: ``pairs`` of what mixes tokens and what mixes
#: channels, as in Llama, or each of the ``positions`` by itself, as in Nemotron-H.
Numbering: TypeAlias = Literal["pairs", "positions"]
NUMBERINGS: tuple[Numbering, ...] = get_args(Numbering)
#: Megatron-Core's class of models; ``auto`` is ``HybridModel`` where the release has it in
#: ``GPTModel``'s place (0.19 and newer).
ModelClass: TypeAlias = Literal["auto", "gpt", "hybrid"]


@dataclass(frozen=True, slots=True)
class ProjectionFacts:
    """One projection of a linear layer.

    Attributes:
        name: Its name here.
        part: Its name within a fused Megatron-Core layer; empty where it is the only one.
        bridge: The target's name in Megatron-Bridge's canonical LoRA; empty where it has none.
        out_size: The field of ``BaseShape`` that its output features are.
        stretches: What its rows are, one after the other, where ranks split each by itself.
    """

    name: ModuleName
    part: str
    bridge: str
    out_size: str
    stretches: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """One tensor-parallel linear layer of Megatron-Core.

    Attributes:
        path: Its place in a decoder layer.
        parent: What Hugging Face calls the module around its projections.
        in_size: The field of ``BaseShape`` that its input features are.
        splits_input: Ranks split the input (row-parallel), so that A is the blocked factor; else
            they split the output (column-parallel), and B is.
        projections: In the order of their rows.
        numbering: How the models that call it so number their layers.
    """

    path: str
    parent: str
    in_size: str
    splits_input: bool
    projections: tuple[ProjectionFacts, ...]
    numbering: Numbering = "pairs"

    @property
    def name(self) -> str:
        """Its own name, the last part of ``path``."""
        return self.path.rpartition(".")[2]

    @property
    def blocked(self) -> Literal["A", "B"]:
        """The factor whose blocks line up with tensor parallelism."""
        return "A" if self.splits_input else "B"

    @property
    def parts(self) -> Mapping[str, ModuleName]:
        """The name of each projection by its ``part``."""
        return {projection.part: projection.name for projection in self.projections}


LINEARS = (
    LinearFacts(
        "self_attention.linear_qkv",
        "self_attn",
        "hidden_size",
        False,
        (
            ProjectionFacts("q_proj", "q", "linear_q", "q_size"),
            ProjectionFacts("k_proj", "k", "linear_k", "kv_size"),
            ProjectionFacts("v_proj", "v", "linear_v", "kv_size"),
        ),
    ),
    LinearFacts(
        "self_attention.linear_proj",
        "self_attn",
        "q_size",
        True,
        (ProjectionFacts("o_proj", "", "linear_proj", "hidden_size"),),
    ),
    LinearFacts(
        "mlp.linear_fc1",
        "mlp",
        "hidden_size",
        False,
        (
            ProjectionFacts("gate_proj", "gate", "linear_fc1_gate", "ffn_size"),
            ProjectionFacts("up_proj", "up", "linear_fc1_up", "ffn_size"),
        ),
    ),
    LinearFacts(
        "mlp.linear_fc2",
        "mlp",
        "ffn_size",
        True,
        (ProjectionFacts("down_proj", "", "linear_fc2", "hidden_size"),),
    ),
)
#: The linear layers that get an adapter by default, by NeMo's names for them.
DEFAULT_TARGETS = tuple(linear.name for linear in LINEARS)
#: The seven projections of a Llama-shaped decoder.
MODULE_NAMES: tuple[ModuleName, ...] = tuple(
    projection.name for linear in LINEARS for projection in linear.projections
)
#: Those and the layers of the families that only a ``HybridModel`` mixes: latent attention
#: (DeepSeek), the gated delta net (Qwen3-Next), and Nemotron-H, whose layers are all a ``mixer``.
ALL_LINEARS = (
    *LINEARS,
    LinearFacts(
        "self_attention.linear_q_proj",
        "self_attn",
        "hidden_size",
        False,
        (ProjectionFacts("latent.q_proj", "", "", "latent_q_size"),),
    ),
    LinearFacts(
        "self_attention.linear_q_up_proj",
        "self_attn",
        "q_lora_rank",
        False,
        (ProjectionFacts("q_b_proj", "", "", "latent_q_size"),),
    ),
    LinearFacts(
        "self_attention.linear_kv_up_proj",
        "self_attn",
        "kv_lora_rank",
        False,
        (ProjectionFacts("kv_b_proj", "", "", "latent_kv_size"),),
    ),
    LinearFacts(
        "self_attention.in_proj",
        "linear_attn",
        "hidden_size",
        False,
        (
            ProjectionFacts(
                "linear_attn.in_proj_qkvz",
                "qkvz",
                "",
                "delta_qkvz_size",
                ("query", "key", "value", "z"),
            ),
            ProjectionFacts("linear_attn.in_proj_ba", "ba", "", "delta_ba_size", ("beta", "alpha")),
        ),
    ),
    LinearFacts(
        "self_attention.out_proj",
        "linear_attn",
        "delta_size",
        True,
        (ProjectionFacts("linear_attn.out_proj", "", "", "hidden_size"),),
    ),
    LinearFacts(
        "mixer.in_proj",
        "mixer",
        "hidden_size",
        False,
        (ProjectionFacts("mixer.in_proj", "", "", "ssm_in_size", ("z", "x", "B", "C", "dt")),),
        "positions",
    ),
    LinearFacts(
        "mixer.out_proj",
        "mixer",
        "ssm_size",
        True,
        (ProjectionFacts("mixer.out_proj", "", "", "hidden_size"),),
        "positions",
    ),
    LinearFacts(
        "self_attention.linear_qkv",
        "mixer",
        "hidden_size",
        False,
        (
            ProjectionFacts("mixer.q_proj", "q", "", "q_size"),
            ProjectionFacts("mixer.k_proj", "k", "", "kv_size"),
            ProjectionFacts("mixer.v_proj", "v", "", "kv_size"),
        ),
        "positions",
    ),
    LinearFacts(
        "self_attention.linear_proj",
        "mixer",
        "q_size",
        True,
        (ProjectionFacts("mixer.o_proj", "", "", "hidden_size"),),
        "positions",
    ),
    LinearFacts(
        "mlp.linear_fc1",
        "mixer",
        "hidden_size",
        False,
        (ProjectionFacts("mixer.up_proj", "", "", "ffn_size"),),
        "positions",
    ),
    LinearFacts(
        "mlp.linear_fc2",
        "mixer",
        "ffn_size",
        True,
        (ProjectionFacts("mixer.down_proj", "", "", "hidden_size"),),
        "positions",
    ),
)
#: The name of each projection by its ``part``, by the path of its linear layer.
PARTS: Mapping[str, Mapping[str, ModuleName]] = {linear.path: linear.parts for linear in LINEARS}

#: Modules that are one in some models (Phi) and several here, in the order of their rows.
FUSED_PARTS: Mapping[ModuleName, tuple[ModuleName, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FACTS: dict[ModuleName, tuple[LinearFacts, ProjectionFacts]] = {
    projection.name: (linear, projection)
    for linear in ALL_LINEARS
    for projection in linear.projections
}
_FACTS |= {
    name: (_FACTS[parts[0]][0], ProjectionFacts(name, "", "", ""))
    for name, parts in FUSED_PARTS.items()
}
_BY_PLACE = {(linear.numbering, linear.path): linear.parts for linear in ALL_LINEARS}

# A HybridModel's symbols that mix tokens (attention, delta net, sparse and latent attention) open a
# layer in Hugging Face's sense; those that mix channels (MLP, experts) close it. Mamba mixes tokens
# too; whether it opens a pair or is a layer by itself depends on the family.
_MIXERS, _MAMBA, _CHANNELS = "*GD+", "M", "-E"


def facts_of(name: ModuleName) -> tuple[LinearFacts, ProjectionFacts]:
    """The linear layer that holds a projection, and the projection."""
    return _FACTS[name]


def parts_of(path: str, numbering: Numbering) -> Mapping[str, ModuleName] | None:
    """The name of each projection of a linear layer by its ``part``.

    Args:
        path: The layer's place in a decoder layer.
        numbering: How the model numbers its layers.

    Returns:
        The names; None where no family has such a layer.
    """
    return _BY_PLACE.get((numbering, path))


def numbering_of(names: Iterable[ModuleName]) -> Numbering:
    """How a model with projections of these names numbers its layers."""
    return (
        "positions" if any(_FACTS[name][0].numbering == "positions" for name in names) else "pairs"
    )


def target_of(name: ModuleName) -> str:
    """The end of a projection's path in Hugging Face's model, enough to tell it from others."""
    if "." not in name:
        return name
    return f"{_FACTS[name][0].parent}.{name.rpartition('.')[2]}"


def hybrid_numbering(pattern: str) -> Numbering | None:
    """How Hugging Face numbers the layers of a ``HybridModel``, where its pattern tells.

    Args:
        pattern: ``hybrid_layer_pattern``, such as ``M-M*-`` or ``*-*-|*-*-``.

    Returns:
        ``pairs`` where positions that mix tokens and positions that mix channels alternate,
        without Mamba. ``positions`` where there is Mamba and they do not alternate, so that no
        pairs are there to be numbered. None elsewhere: of alternating positions with Mamba, models
        of both kinds exist, and a number would be a guess.
    """
    positions = _positions(pattern)
    if _MAMBA not in "".join(positions):
        return "pairs" if _in_pairs(positions, _MIXERS) else None
    if _in_pairs(positions, _MIXERS + _MAMBA) or max(map(len, positions)) > 1:
        return None
    return "positions"


def hybrid_layers(pattern: str, numbering: Numbering | None = None) -> list[int | None]:
    """Which of Hugging Face's decoder layers each position of a ``HybridModel`` belongs to.

    Layers are counted by occurrence over the whole pattern: a position that mixes tokens opens a
    pair, the MLP or the experts after it close it. Pipeline boundaries (``|``) do not count, what
    predicts further tokens (after ``/``) has no layer, and a group in square brackets is one
    position.

    Args:
        pattern: ``hybrid_layer_pattern``, such as ``*-*-|*-*-``.
        numbering: How the model's family numbers them; what ``hybrid_numbering`` tells if unset.

    Returns:
        The layer of each position. None for all of them where the numbering is unknown, or the
        pattern cannot be numbered so.
    """
    numbering = numbering or hybrid_numbering(pattern)
    positions = _positions(pattern)
    if numbering == "positions" and all(len(position) == 1 for position in positions):
        return list(range(len(positions)))
    if numbering == "pairs" and _in_pairs(positions, _MIXERS + _MAMBA):
        starts = [sum(map(len, positions[:index])) for index in range(len(positions))]
        return [start // 2 for start in starts]
    return [None] * len(positions)


def _in_pairs(positions: list[str], mixers: str) -> bool:
    """Whether what mixes tokens and what mixes channels alternate, and no group splits a pair."""
    symbols = "".join(positions)
    pairs = [symbols[start : start + 2] for start in range(0, len(symbols), 2)]
    if not all(len(p) == 2 and p[0] in mixers and p[1] in _CHANNELS for p in pairs):
        return False
    start = 0
    for position in positions:
        # A group that reaches into the next layer belongs to neither.
        if start // 2 != (start + len(position) - 1) // 2:
            return False
        start += len(position)
    return True


def _positions(pattern: str) -> list[str]:
    """The symbols of each position."""
    positions: list[str] = []
    rest = pattern.partition("/")[0].replace("|", "")
    while rest:
        if rest[0] == "[":
            group, _, rest = rest[1:].partition("]")
            positions.append(group)
        else:
            positions.append(rest[0])
            rest = rest[1:]
    return positions


def heads_fit(tp_size: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether ranks can hold whole heads, repeating key-value heads where they are too few.

    Args:
        tp_size: Tensor-parallel ranks.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.
    """
    shared = num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0
    return num_heads % tp_size == 0 and shared
