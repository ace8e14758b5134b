"""A decoder's anatomy: its adapted linear layers, the projections in them, and what each is called.

One table for everything that has to know: the layers, the files' readers and writers, the base
models and the cost model. It needs neither torch nor Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

__all__ = [
    "DEFAULT_TARGETS",
    "FUSED",
    "LINEARS",
    "MODULE_NAMES",
    "PARTS",
    "LinearFacts",
    "ModelClass",
    "ModuleName",
    "ProjectionFacts",
    "facts_of",
    "hybrid_layers",
]

ModuleName: TypeAlias = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]
MODULE_NAMES: tuple[ModuleName, ...] = get_args(ModuleName)
#: Megatron-Core's class of models; ``auto`` is ``HybridModel`` where the release has it in
#: ``GPTModel``'s place (0.19 and newer).
ModelClass: TypeAlias = Literal["auto", "gpt", "hybrid"]


@dataclass(frozen=True, slots=True)
class ProjectionFacts:
    """One projection of a linear layer.

    Attributes:
        name: Hugging Face's name.
        part: Its name within a fused Megatron-Core layer; empty where it is the only one.
        bridge: The target's name in Megatron-Bridge's canonical LoRA.
        out_size: The field of ``BaseShape`` that its output features are.
    """

    name: ModuleName
    part: str
    bridge: str
    out_size: str


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
    """

    path: str
    parent: str
    in_size: str
    splits_input: bool
    projections: tuple[ProjectionFacts, ...]

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
        """Hugging Face's name of each projection by its ``part``."""
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
#: Hugging Face's name of each projection by its ``part``, by the path of its linear layer.
PARTS: Mapping[str, Mapping[str, ModuleName]] = {linear.path: linear.parts for linear in LINEARS}
#: The paths of the layers that hold several projections.
FUSED = frozenset(linear.path for linear in LINEARS if len(linear.projections) > 1)

_FACTS = {
    projection.name: (linear, projection) for linear in LINEARS for projection in linear.projections
}

# A HybridModel's symbols that mix tokens (attention, delta net, sparse and latent attention) open a
# layer in Hugging Face's sense; those that mix channels (MLP, experts) close it.
_MIXERS, _CHANNELS = "*GD+", "-E"


def facts_of(name: ModuleName) -> tuple[LinearFacts, ProjectionFacts]:
    """The linear layer that holds a projection, and the projection."""
    return _FACTS[name]


def hybrid_layers(pattern: str) -> list[int | None]:
    """Which of Hugging Face's decoder layers each position of a ``HybridModel`` belongs to.

    Layers are counted by occurrence over the whole pattern: a position that mixes tokens opens a
    layer, the MLP or the experts after it close it. Pipeline boundaries (``|``) do not count, what
    predicts further tokens (after ``/``) has no layer, and a group in square brackets is one
    position.

    Args:
        pattern: ``hybrid_layer_pattern``, such as ``*-*-|*-*-``.

    Returns:
        The layer of each position. None for all of them where the pattern does not alternate so:
        with Mamba (``M``), models exist that number each position and models that number pairs, so
        a number would be a guess.
    """
    positions = _positions(pattern.partition("/")[0].replace("|", ""))
    symbols = "".join(positions)
    pairs = [symbols[start : start + 2] for start in range(0, len(symbols), 2)]
    regular = all(len(p) == 2 and p[0] in _MIXERS and p[1] in _CHANNELS for p in pairs)
    layers: list[int | None] = []
    done = 0
    for position in positions:
        # A group that reaches into the next layer belongs to neither.
        regular = regular and done // 2 == (done + len(position) - 1) // 2
        layers.append(done // 2)
        done += len(position)
    return layers if regular else [None] * len(positions)


def _positions(pattern: str) -> list[str]:
    """The symbols of each position."""
    positions: list[str] = []
    rest = pattern
    while rest:
        if rest[0] == "[":
            group, _, rest = rest[1:].partition("]")
            positions.append(group)
        else:
            positions.append(rest[0])
            rest = rest[1:]
    return positions
