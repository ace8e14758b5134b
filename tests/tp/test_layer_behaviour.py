"""What a layer with an adapter does besides one forward and backward."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker

from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.errors import ConfigError, ShapeError, UnsupportedError
from bdlora_megatron.layers import (
    LoadOptions,
    LoRAColumnParallelLinear,
    LoRARowParallelLinear,
    adapters_disabled,
    apply_lora,
    load_adapter,
    lora_layers,
    merge_adapters,
    remove_lora,
    unmerge_adapters,
)
from bdlora_megatron.layers.factors import Factor
from bdlora_megatron.serve import ModelSlots, SlotCapacity
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.layer_cases import (
    FFN,
    HIDDEN,
    Case,
    Reference,
    build_base,
    build_layer,
    local_dx,
    local_input,
    local_output,
    lora_config,
    transformer_config,
)
from tests.tp.models import randomize_adapters, tokens
from tests.tp.serving_cases import make_adapter, serving_model
from tests.tp.session import model_parallel

LAYERS = ("linear_qkv", "linear_fc1", "linear_proj", "linear_fc2")


def _every_layout(world_size, **more):
    for layer in LAYERS:
        for layout in Layout:
            blocks = 2 * world_size if layout is Layout.BDLORA else 1
            yield Case(layer=layer, layout=layout, num_blocks=blocks, **more)


# --- merging ---------------------------------------------------------------------------------


def _merge(rank, world_size):
    with model_parallel(world_size):
        for case in _every_layout(world_size):
            reference = Reference.make(case, world_size)
            layer = build_layer(reference, rank)
            x = local_input(reference, rank)
            expected = local_output(reference, reference.run(), rank)
            original = layer.weight.detach().clone()
            layer.merge()
            assert layer.is_merged
            assert not torch.equal(layer.weight, original)
            assert_close(layer(x)[0], expected, f"merged [{case.label}]")
            with pytest.raises(ConfigError, match="merged layer"):
                layer.sharded_state_dict()
            with pytest.raises(ConfigError, match="already merged"):
                layer.merge()
            layer.unmerge()
            assert torch.equal(layer.weight, original)
            assert_close(layer(x)[0], expected, f"unmerged [{case.label}]")
            with pytest.raises(ConfigError, match="nothing is merged"):
                layer.unmerge()


def test_merging_gives_the_same_output_and_unmerging_every_bit():
    run_ranks(2, _merge)


def _merge_bf16(rank, world_size):
    with model_parallel(world_size):
        case = Case(layer="linear_fc1", layout=Layout.BDLORA, num_blocks=2, dtype=torch.bfloat16)
        reference = Reference.make(case, world_size)
        layer = build_layer(reference, rank)
        original = layer.weight.detach().clone()
        wanted = original.double() + layer.adapter.delta_weight(torch.float64)
        layer.merge()
        # Rounded once: no further from the sum than half a step of bfloat16, which has 8 bits.
        step = torch.exp2(torch.floor(torch.log2(wanted.abs())) - 7)
        assert ((layer.weight.double() - wanted).abs() <= 0.501 * step).all()
        layer.unmerge()
        assert torch.equal(layer.weight, original)


def test_merging_in_bfloat16_can_be_undone_exactly():
    run_ranks(2, _merge_bf16)


# --- replicas, switches ----------------------------------------------------------------------


def _replicas(rank, world_size):
    """Ranks whose random streams differ still start from one copy of a factor they all hold."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        torch.manual_seed(rank)
        apply_lora(model, LoRAConfig(rank=4, layout=Layout.HALF_SHARDED))
        factors = [module for module in model.modules() if isinstance(module, Factor)]
        replicas = [factor for factor in factors if factor.shape.shard_dim is None]
        assert len(replicas) * 2 == len(factors)
        for factor in factors:
            # Megatron's norm of all gradients counts what is not split on one rank alone.
            assert factor.weight.tensor_model_parallel is (factor.shape.shard_dim is not None)
        for factor in replicas:
            first = factor.weight.detach().clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(factor.weight, first)


def test_a_replicated_factor_is_the_same_on_every_rank():
    run_ranks(2, _replicas)


def _disabled(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)
        apply_lora(model, LoRAConfig(rank=4, num_blocks=2))
        layers = [layer for _, layer in lora_layers(model)]
        layers[0].adapter_enabled = False
        with adapters_disabled(model):
            assert not any(layer.adapter_enabled for layer in layers)
        assert [layer.adapter_enabled for layer in layers] == [False] + [True] * (len(layers) - 1)


def test_what_was_switched_off_before_stays_off():
    run_ranks(1, _disabled)


def _merged(rank, world_size):
    """A merged model switched off, saved, loaded and taken apart: nothing counts twice or stays."""
    with model_parallel(world_size), torch.no_grad():
        model, lora = serving_model(world_size), LoRAConfig(rank=4, num_blocks=2)
        batch = tokens()
        base = model(**batch)
        apply_lora(model, lora)
        randomize_adapters(model)
        adapted = model(**batch)
        held = model.state_dict().items()
        state = {name: v.clone() if torch.is_tensor(v) else v for name, v in held}
        originals = [layer.weight.clone() for _, layer in lora_layers(model)]
        merge_adapters(model)
        merged = [layer.weight.clone() for _, layer in lora_layers(model)]
        assert (adapted - base).abs().max() > 0.01
        with adapters_disabled(model):
            assert torch.equal(model(**batch), base)
        for (_, layer), weight in zip(lora_layers(model), merged, strict=True):
            assert torch.equal(layer.weight, weight)
        assert_close(model(**batch), adapted.double(), "merged")
        with pytest.raises(ConfigError, match=r"merged layer.*unmerge_adapters.*keep_merged"):
            model.state_dict()
        # What is loaded is what is there afterwards, and the old weights do not come back.
        for name, value in state.items():
            if name.endswith("linear_qkv.weight"):
                value.mul_(2)
        model.load_state_dict(state)
        unmerge_adapters(model)
        for (name, layer), weight in zip(lora_layers(model), originals, strict=True):
            wanted = 2 * weight if name.endswith("linear_qkv") else weight
            assert torch.equal(layer.weight, wanted), name
        doubled = model(**batch)
        merge_adapters(model)
        remove_lora(model, keep_merged=True)
        assert not list(lora_layers(model))
        plain = serving_model(world_size)
        plain.load_state_dict(model.state_dict())
        assert_close(plain(**batch), doubled.double(), "kept in the weights")


def test_a_merged_model_is_switched_off_saved_and_loaded_rightly():
    run_ranks(1, _merged)


def _strings(rank, world_size):
    """A layout's name does what the layout does, or is refused with the choices."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        adapter = make_adapter(0, num_blocks=2)
        outputs = []
        for layout in (Layout.SLORA, "slora"):
            load_adapter(model, adapter, LoadOptions(layout=layout))
            outputs.append(model(**tokens()))
            kinds = {type(layer.adapter) for _, layer in lora_layers(model)}
            assert all("SLoRA" in kind.__name__ for kind in kinds), kinds
        assert torch.equal(*outputs)
        assert SlotCapacity(layouts=["slora", "bdlora"]).layouts == (Layout.SLORA, Layout.BDLORA)
        for refused in (
            lambda: LoadOptions(layout="sl0ra"),
            lambda: SlotCapacity(layouts=("bdlora", "full")),
            lambda: LoRAConfig(rank=4, layout="dora"),
        ):
            with pytest.raises(ConfigError, match=r"layout='.*'; wanted one of \['bdlora'"):
                refused()


def test_layouts_are_given_by_name_everywhere():
    run_ranks(2, _strings)


# --- training --------------------------------------------------------------------------------


def _accumulate(rank, world_size):
    with model_parallel(world_size):
        for case in _every_layout(world_size):
            reference = Reference.make(case, world_size)
            layer = build_layer(reference, rank)
            grad_y = local_output(reference, reference.grad_y, rank)
            grads = []
            for _ in range(2):
                layer(local_input(reference, rank))[0].backward(grad_y)
                grads.append([p.grad.clone() for p in layer.adapter.parameters()])
            for once, twice in zip(*grads, strict=True):
                assert_close(twice, 2 * once, f"accumulated [{case.label}]")


def test_gradients_accumulate_over_micro_batches():
    run_ranks(2, _accumulate)


def _dropout(rank, world_size, sequence_parallel, regather):
    with model_parallel(world_size):
        for layer_name in LAYERS[:2]:
            case = Case(
                layer=layer_name,
                layout=Layout.BDLORA,
                num_blocks=world_size,
                sequence_parallel=sequence_parallel,
                regather=regather,
            )
            reference = Reference.make(case, world_size)
            layer = build_layer(reference, rank)
            layer.adapter.dropout = 0.25
            torch.manual_seed(5)
            mask = torch.rand(reference.x.shape) >= 0.25
            leaf = reference.x.requires_grad_(True)
            expected = reference.run(leaf, leaf * mask / 0.75)
            torch.manual_seed(5)
            x = local_input(reference, rank)
            y, _ = layer(x)
            y.backward(local_output(reference, reference.grad_y, rank))
            assert_close(y, local_output(reference, expected, rank), f"y [{case.label}]")
            assert_close(x.grad, local_dx(reference, rank), f"dX [{case.label}]")
            for plan in layer.adapter.plans:
                name = plan.projection.name
                for factor, which in zip(layer.adapter.factors(plan), "AB", strict=True):
                    share = reference.share(name, which, rank, grad=True)
                    assert_close(factor.weight.grad, share, f"d{which} [{case.label}]")
            layer.eval()
            plain = local_output(reference, reference.run(), rank)
            assert_close(layer(x)[0], plain, f"no dropout in eval [{case.label}]")


@pytest.mark.parametrize(
    ("sequence_parallel", "regather"), [(False, False), (True, False), (True, True)]
)
def test_dropout_beside_a_column_layer_is_one_mask_on_all_ranks(sequence_parallel, regather):
    run_ranks(2, _dropout, sequence_parallel, regather)


def _row_dropout(rank, world_size):
    with model_parallel(world_size):
        case = Case(layer="linear_fc2", layout=Layout.BDLORA, num_blocks=world_size)
        reference = Reference.make(case, world_size)
        layer = build_layer(reference, rank)
        layer.adapter.dropout = 0.25
        x = local_input(reference, rank)
        before = get_cuda_rng_tracker().get_states()
        mask = layer.adapter.dropout_mask(x.shape, x.device)
        get_cuda_rng_tracker().set_states(before)
        masks = [torch.empty_like(mask) for _ in range(world_size)]
        torch.distributed.all_gather(masks, mask)
        whole = torch.cat(masks, dim=-1)
        assert not torch.equal(masks[0], masks[1]), "ranks hold other features, so other masks"
        leaf = reference.x.requires_grad_(True)
        expected = reference.run(leaf, leaf * whole / 0.75)
        y, _ = layer(x)
        y.backward(local_output(reference, reference.grad_y, rank))
        assert_close(y, local_output(reference, expected, rank), "y")
        assert_close(x.grad, local_dx(reference, rank), "dX")


def test_dropout_beside_a_row_layer_draws_from_the_model_parallel_stream():
    run_ranks(2, _row_dropout)


# --- starting --------------------------------------------------------------------------------


def _fresh(rank, world_size):
    with model_parallel(world_size):
        whole = []
        for case in _every_layout(2):
            reference = Reference.make(case, world_size)
            layer = build_base(reference, rank)
            kind = LoRAColumnParallelLinear if case.column else LoRARowParallelLinear
            lora = kind.from_base(layer)
            torch.manual_seed(11)
            lora.attach_config(lora_config(case), case.layer)
            x = local_input(reference, rank)
            assert torch.equal(lora(x)[0], layer(x)[0]), f"fresh is neutral [{case.label}]"
            for plan in lora.adapter.plans:
                A, B = lora.adapter.factors(plan)
                assert A.weight.abs().sum() > 0
                assert not B.weight.any()
                whole.append(_gathered(A, world_size))
        return whole


def _gathered(factor, world_size):
    if factor.shape.shard_dim is None:
        return factor.weight.detach()
    parts = [torch.empty_like(factor.weight) for _ in range(world_size)]
    torch.distributed.all_gather(parts, factor.weight.detach().contiguous())
    return torch.cat(parts, dim=factor.shape.shard_dim)


def test_a_fresh_adapter_is_neutral_and_the_same_at_any_parallel_size():
    alone = run_ranks(1, _fresh)[0]
    for world_size in (2, 4):
        for ranks_view in run_ranks(world_size, _fresh):
            for one, several in zip(alone, ranks_view, strict=True):
                torch.testing.assert_close(several, one, rtol=0, atol=0)


def _share(rank, world_size):
    with model_parallel(world_size):
        case = Case(layer="linear_qkv", layout=Layout.BDLORA, num_blocks=2)
        reference = Reference.make(case, world_size)
        base = build_base(reference, rank)
        names = set(base.state_dict())
        lora = LoRAColumnParallelLinear.from_base(base)
        lora.attach_config(lora_config(case), "linear_qkv")
        assert lora.weight is base.weight
        assert set(base.state_dict()) == names, "the old layer is as it was"
        x = local_input(reference, rank)
        with torch.no_grad():
            lora.adapter.factors(lora.adapter.plans[0])[1].weight.fill_(1.0)
        assert not torch.equal(lora(x)[0], base(x)[0])
        lora.adapter_enabled = False
        assert torch.equal(lora(x)[0], base(x)[0])
        back = lora.to_base()
        assert type(back) is ColumnParallelLinear
        assert back.weight is base.weight
        assert set(back.state_dict()) == names
        assert torch.equal(back(x)[0], base(x)[0])


def test_a_built_layer_shares_its_parameters():
    run_ranks(2, _share)


# --- refusing --------------------------------------------------------------------------------


class _OtherColumn(ColumnParallelLinear):
    """Somebody's own subclass, which may compute anything."""


def _column(kind=ColumnParallelLinear, world_size=2, rows=2 * FFN, **more):
    case = Case(layer="linear_fc1", layout=Layout.BDLORA, num_blocks=2)
    config = more.pop("config", None) or transformer_config(case, world_size)
    return kind(
        HIDDEN,
        rows,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        **more,
    )


def _attach(layer, name="linear_fc1", **lora):
    config = LoRAConfig(**{"rank": 8, "num_blocks": 2, **lora})
    return LoRAColumnParallelLinear.from_base(layer).attach_config(config, name)


def _refuse(rank, world_size):
    with model_parallel(world_size):
        with pytest.raises(UnsupportedError, match="_OtherColumn"):
            _attach(_column(_OtherColumn))
        with pytest.raises(ConfigError, match="num_blocks=3 is not a multiple of the tensor-par"):
            _attach(_column(), rank=9, num_blocks=3)
        with pytest.raises(ConfigError, match="out_features=36 is not a multiple of num_blocks=8"):
            _attach(_column(), num_blocks=8)
        with pytest.raises(ConfigError, match="rank=7 is not a multiple of the tensor-parallel"):
            _attach(_column(), rank=7, layout="slora", num_blocks=None)
        with pytest.raises(ShapeError, match="linear_qkv has 72 output features"):
            _attach(_column(), name="linear_qkv")
        few_groups = transformer_config(Case(layer="", layout=Layout.BDLORA), world_size)
        few_groups.num_query_groups = 1
        with pytest.raises(UnsupportedError, match="num_query_groups=1 over 2"):
            _attach(_column(config=few_groups), name="linear_qkv")
        gated = transformer_config(Case(layer="", layout=Layout.BDLORA), world_size)
        gated.attention_output_gate = True
        with pytest.raises(UnsupportedError, match="output gate"):
            _attach(_column(config=gated), name="linear_qkv")
        expert = _column()
        expert.is_expert = True
        with pytest.raises(UnsupportedError, match="mixture-of-experts"):
            _attach(expert)
        rebuilt = _column()
        rebuilt.gtp_remat_size = 2
        with pytest.raises(UnsupportedError, match="gtp_weight_remat_size > 1"):
            _attach(rebuilt)
        quantised = _column()
        quantised.weight = torch.nn.Parameter(
            quantised.weight.data.to(torch.int8), requires_grad=False
        )
        with pytest.raises(UnsupportedError, match=r"quantised \(dtype torch.int8\)"):
            _attach(quantised)
        overlapped = LoRAColumnParallelLinear.from_base(_column())
        adapter = overlapped.attach_config(LoRAConfig(rank=8, num_blocks=2), "linear_fc1")
        overlapped.explicit_expert_comm = True
        with pytest.raises(UnsupportedError, match="moe_shared_expert_overlap"):
            overlapped(torch.zeros(2, 1, HIDDEN, dtype=torch.float64))
        with pytest.raises(ShapeError, match="another tensor-parallel size"):
            adapter.load("gate", torch.zeros(8, HIDDEN), torch.zeros(FFN, 4))
        with pytest.raises(KeyError, match="q"):
            adapter.plan("q")


def test_what_cannot_be_right_is_refused():
    run_ranks(2, _refuse)


def _inference_optimized(rank, world_size):
    """On a CPU no such layer can be built; a model that says so is refused for its layers' sake."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        for layer in model.modules():
            if hasattr(layer, "config"):
                layer.config.transformer_impl = "inference_optimized"
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(
            UnsupportedError, match=r"transformer_impl='inference_optimized'.*local"
        ):
            apply_lora(model, LoRAConfig(rank=4, num_blocks=1))
        assert {name: type(module) for name, module in model.named_modules()} == before
        with pytest.raises(UnsupportedError, match="transformer_impl='inference_optimized'"):
            ModelSlots(model, SlotCapacity(max_loras=1))


def test_layers_that_exchange_inside_the_product_are_refused():
    run_ranks(1, _inference_optimized)
