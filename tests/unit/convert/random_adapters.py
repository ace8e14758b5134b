"""Random neutral adapters for round trips, with sizes that tell every side apart."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES, blocked_factor
from bdlora_megatron.convert.adapter.neutral import infer_base_shape as infer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Grouped queries: 8 heads over 4 or 2 key-value heads; all widths differ and divide by 8.
HEADS, HEAD_DIM, HIDDEN, FFN = 8, 8, 48, 80


def widths(name, kv_heads):
    q, kv = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    return {
        "q_proj": (HIDDEN, q),
        "k_proj": (HIDDEN, kv),
        "v_proj": (HIDDEN, kv),
        "o_proj": (q, HIDDEN),
        "gate_proj": (HIDDEN, FFN),
        "up_proj": (HIDDEN, FFN),
        "down_proj": (FFN, HIDDEN),
    }[name]


def build(name, width, *, rank, num_blocks=1, scale=1.5, dtype=torch.float32, seed=0):
    """One module's random update; every number is finite and no two seeds are alike."""
    generator = torch.Generator().manual_seed(seed)
    blocked = blocked_factor(name)
    wide, high = width
    A_width = wide // (num_blocks if blocked == "A" else 1)
    B_width = rank // (num_blocks if blocked == "B" else 1)
    return BlockFactors(
        A=torch.randn(rank, A_width, generator=generator).to(dtype),
        B=torch.randn(high, B_width, generator=generator).to(dtype),
        num_blocks=num_blocks,
        blocked=blocked,
        scale=scale,
    )


def factors(name, *, kv_heads=4, **settings):
    return build(name, widths(name, kv_heads), **settings)


def adapter(modules, *, kv_heads=4, layers=None, name="random", **metadata):
    shape = infer((key, f.in_features, f.out_features) for key, f in modules.items())
    known = {
        side: value
        for side in ("hidden_size", "ffn_size", "q_size", "kv_size")
        if (value := getattr(shape, side)) is not None
    }
    base = BaseShape(
        **{"q_size": HEADS * HEAD_DIM, "kv_size": kv_heads * HEAD_DIM, **known},
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        num_layers=layers,
    )
    return Adapter(name=name, modules=dict(sorted(modules.items())), base=base, metadata=metadata)


def seven(*, layers=1, rank=8, scale=2.0, shared=False, **changes):
    """All modules of every layer; `shared` gives q, k, v and gate, up one A each."""
    modules = {
        ModuleKey(layer=layer, name=name): factors(
            name, rank=rank, scale=scale, seed=10 * layer + n, **changes
        )
        for layer in range(layers)
        for n, name in enumerate(MODULE_NAMES)
    }
    if shared:
        for key in list(modules):
            first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(key.name)
            if first:
                A = modules[ModuleKey(layer=key.layer, name=first)].A
                modules[key] = replace(modules[key], A=A)
    return adapter(modules, layers=layers)


@st.composite
def adapters(draw, *, max_layers=3, blocks=(1, 2, 4, 8), mixed_blocks=False, uniform=False):
    """Ranks, alphas and presence differ by module, unless `uniform`; one type for all."""
    dtype = draw(st.sampled_from(DTYPES))
    kv_heads = draw(st.sampled_from([8, 4, 2]))
    layers = draw(st.integers(1, max_layers))
    num_blocks = draw(st.sampled_from(blocks))
    use_rslora = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(MODULE_NAMES), min_size=1, unique=True))
    modules = {}
    for layer in range(layers):
        for name in names:
            if not uniform and draw(st.integers(0, 5)) == 0 and modules:
                continue
            count = draw(st.sampled_from(blocks)) if mixed_blocks else num_blocks
            if not uniform and draw(st.integers(0, 3)) == 0:
                count = 1
            rank = count * draw(st.integers(1, 3))
            alpha = draw(st.integers(1, 64))
            scale = alpha / (rank**0.5 if use_rslora else rank)
            modules[ModuleKey(layer=layer, name=name)] = factors(
                name,
                rank=rank,
                num_blocks=count,
                scale=scale,
                dtype=dtype,
                kv_heads=kv_heads,
                seed=len(modules),
            )
    return adapter(modules, kv_heads=kv_heads, layers=layers)


def assert_same(got, wanted, *, scale=True):
    """Bit-equal modules in every respect."""
    assert list(got.modules) == list(wanted.modules)
    for key, factor in wanted.modules.items():
        other = got.modules[key]
        assert other.num_blocks == factor.num_blocks, key
        assert other.blocked == factor.blocked, key
        assert not scale or other.scale == factor.scale, key
        for one, two in ((other.A, factor.A), (other.B, factor.B)):
            assert one.dtype == two.dtype, key
            assert torch.equal(one, two), key
