"""Attention over a cache in blocks: the Triton kernels against one query at a time in fp64."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bdlora_megatron.errors import ConfigError, ShapeError, UnsupportedError
from tests.fakes import cuda_graphs
from tests.tolerances import ATTENTION, assert_close
from tests.unit.ops.cases import HAS_TRITON, implementations

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

#: The kernels alone: in Triton's interpreter, and on a GPU where there is one.
on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(param.values[0][1], id=param.id, marks=param.marks)
        for param in implementations()
        if param.values[0][0] == "triton"
    ],
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Queries and positions of each sequence.
BATCHES = {
    "whole prompts": ([19, 3], [19, 3]),
    "one step": ([1], [41]),
    "steps of one block and of many": ([1, 1, 1], [1, 33, 70]),
    "a prompt's next chunk between steps": ([1, 13, 1, 4], [34, 41, 1, 4]),
    "sequences without queries": ([0, 1, 0, 2, 0], [5, 6, 0, 17, 33]),
    "rows that stand for no request": ([2, 7, 0, 0, 0], [40, 7, 0, 0, 0]),
    "only such rows": ([0, 0], [0, 0]),
    "no sequence": ([], []),
    "fewer positions than queries": ([6, 2], [2, 0]),
}


@dataclass(kw_only=True)
class Case:
    """A batch with its cache; ``tail`` tokens behind it belong to no sequence."""

    counts: list[int]
    lengths: list[int]
    size: int = 16
    groups: int = 1
    each: int = 3
    width: int = 16
    tail: int = 3
    left: int = -1
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    columns: int = 0
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)
    table: torch.Tensor = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype)

        needed = [-(-length // self.size) for length in self.lengths]
        self.columns = self.columns or max(needed, default=0) + 1
        blocks = sum(needed) + 3
        free = iter(torch.randperm(blocks, generator=generator).tolist())
        self.table = torch.full((len(needed), self.columns + 2), -1, dtype=torch.int32)
        # What no sequence may read is no number: behind its end, in blocks of none, and between
        # heads, as nothing lies as densely as it could.
        cache = torch.full((blocks, 2, self.size, self.groups, self.width + 8), math.nan)
        self.k, self.v = cache.to(self.dtype).to(self.device)[..., : self.width].unbind(1)
        for row, length in enumerate(self.lengths):
            for column in range(needed[row]):
                block = self.table[row, column] = next(free)
                used = min(self.size, length - column * self.size)
                for part in (self.k, self.v):
                    part[block, :used] = numbers(used, self.groups, self.width)
        self.table = self.table.to(self.device)[:, : self.columns]
        heads = self.groups * self.each
        self.q = numbers(sum(self.counts) + self.tail, heads + 1, self.width).to(self.device)
        self.q = self.q[:, :heads]

    @property
    def options(self):
        """What both functions are given."""
        return {
            "softmax_scale": self.scale,
            "causal": True,
            "window_size": (self.left, 0 if self.left >= 0 else -1),
            "block_table": self.table,
        }

    def sums(self, numbers):
        """As the engine hands over where sequences begin."""
        sums = [0, *itertools.accumulate(numbers)]
        return torch.tensor(sums, dtype=torch.int32, device=self.device)

    def varlen(self, **options):
        """The output and the logarithms of the function for sequences of any length."""
        from bdlora_megatron.ops import paged_attention

        with poisoned():
            out, lse, nothing = paged_attention.flash_attn_varlen_func(
                *(self.q, self.k, self.v, self.sums(self.counts), self.sums(self.lengths)),
                *(max(self.counts, default=1), max(self.lengths, default=1)),
                **{**self.options, "return_attn_probs": True, **options},
            )
        assert nothing is None
        return out.cpu(), lse.cpu()

    def decode(self, **options):
        """The same of the function for as many queries of each sequence, in the other's shapes."""
        from bdlora_megatron.ops import paged_attention

        (queries,) = set(self.counts)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        options = {"cache_seqlens": lengths, **options}
        q = self.q[: sum(self.counts)].unflatten(0, (-1, queries))
        with poisoned():
            out, lse = paged_attention.flash_attn_with_kvcache(
                q=q,
                k_cache=self.k,
                v_cache=self.v,
                **{**self.options, "return_softmax_lse": True, **options},
            )
        assert out.shape == q.shape
        assert lse.shape == (len(q), q.shape[2], queries)
        return out.cpu().flatten(0, 1), lse.cpu().transpose(0, 1).flatten(1)

    def reference(self):
        """One query and one head at a time, in fp64."""
        q, k, v = (tensor.cpu().double() for tensor in (self.q, self.k, self.v))
        out, lse = torch.zeros_like(q), torch.full(q.shape[1::-1], math.inf, dtype=torch.float64)
        scale = self.width**-0.5 if self.scale is None else self.scale
        token = 0
        for row, (count, length) in enumerate(zip(self.counts, self.lengths, strict=True)):
            places = [(self.table[row, p // self.size], p % self.size) for p in range(length)]
            keys, values = ([part[place] for place in places] for part in (k, v))
            for position in range(length - count, length):
                first = max(position - self.left, 0) if self.left >= 0 else 0
                for head in range(len(lse)) if position >= 0 else ():
                    own_keys, own_values = (
                        torch.stack(part[first : position + 1])[:, head // self.each]
                        for part in (keys, values)
                    )
                    logits = own_keys @ q[token, head] * scale
                    out[token, head] = logits.softmax(0) @ own_values
                    lse[head, token] = logits.logsumexp(0)
                token += 1
        return out, lse

    def check(self, found, what):
        """Hold an output and its logarithms to the reference."""
        out, lse = found
        wanted, wanted_lse = self.reference()
        wanted, wanted_lse = wanted[: len(out)], wanted_lse[:, : len(out)]
        assert out.dtype == self.dtype
        assert lse.dtype == torch.float32
        unseen = wanted_lse.isinf()
        assert (lse[unseen] == math.inf).all(), what
        assert (out[unseen.t()] == 0).all(), f"{what}: zeros where nothing is seen"
        if not unseen.all():
            assert_close(out, wanted, what, ATTENTION[self.dtype])
            # Products of 16-bit numbers are exact, and their sums are float32 for all types.
            seen = ~unseen
            assert_close(lse[seen], wanted_lse[seen], f"{what}: lse", ATTENTION[torch.float32])


@contextmanager
def poisoned():
    """New tensors hold NaN, so that what is never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@on_each_device
@pytest.mark.parametrize("name", BATCHES)
def test_each_query_sees_its_own_past_alone(device, name):
    counts, lengths = BATCHES[name]
    case = Case(counts=counts, lengths=lengths, device=device)
    case.check(case.varlen(), name)


@on_each_device
@pytest.mark.parametrize(("queries", "size"), [(1, 32), (1, 5), (3, 16), (7, 5)])
def test_decoding(device, queries, size):
    counts, lengths = [queries] * 4, [1, 50, 0, 33]
    case = Case(counts=counts, lengths=lengths, size=size, device=device)
    case.check(case.decode(), "decoded")


@on_each_device
@pytest.mark.parametrize(
    ("dtype", "width"),
    [("bf16", 64), ("fp16", 64), ("bf16", 80), ("bf16", 256), ("fp16", 24), ("fp32", 96)],
)
def test_types_and_widths(device, dtype, width):
    more = {"width": width, "dtype": DTYPES[dtype], "size": 64, "device": device}
    case = Case(counts=[1, 25, 0], lengths=[70, 45, 0], **more)
    case.check(case.varlen(), "prompts")
    case = Case(counts=[1, 1], lengths=[70, 1], **more)
    case.check(case.decode(), "steps")


@on_each_device
@pytest.mark.parametrize(
    ("dtype", "groups", "each"),
    [("fp32", 1, 1), ("fp32", 2, 2), ("fp32", 1, 21), ("bf16", 3, 1), ("bf16", 2, 7)],
)
def test_query_heads_find_their_keys(device, dtype, groups, each):
    more = {"groups": groups, "each": each, "dtype": DTYPES[dtype], "device": device}
    case = Case(counts=[2, 4], lengths=[19, 6], **more)
    case.check(case.varlen(), "prompts")
    case = Case(counts=[2, 2], lengths=[19, 3], **more)
    case.check(case.decode(), "steps")


@on_each_device
@pytest.mark.parametrize("left", [0, 1, 17, 1000])
def test_sliding_window(device, left):
    case = Case(counts=[20, 1], lengths=[50, 40], left=left, each=1, device=device)
    case.check(case.varlen(), "prompts")
    case = Case(counts=[2, 2], lengths=[50, 9], left=left, device=device)
    case.check(case.decode(), "steps")


@on_each_device
def test_what_no_window_reaches_is_not_read(device):
    """A step of 16 positions in which nobody sees one may lie in no block at all."""
    case = Case(counts=[1, 5], lengths=[50, 60], left=9, device=device)
    wanted = case.reference()
    for row, columns in ((0, [0, 1]), (1, [0, 1])):
        blocks = case.table[row, columns].long()
        case.k[blocks] = case.v[blocks] = math.nan
        case.table[row, columns] = -1
    with mock.patch.object(case, "reference", return_value=wanted):
        case.check(case.varlen(), "outside the window")


@on_each_device
def test_a_table_that_says_less_than_its_lengths(device):
    """What warm-up steps hold: nothing outside of the cache or of the table may be read."""
    case = Case(counts=[1, 4], lengths=[40, 30], device=device)
    plain = case.table.clone()
    case.k.nan_to_num_(0.5), case.v.nan_to_num_(0.25)
    plain[:, 1], case.table[:, 1] = 0, -1
    found = case.varlen()
    case.table = plain
    assert all(map(torch.equal, found, case.varlen()))
    narrow = Case(counts=[1], lengths=[40], device=device)
    narrow.table = narrow.table[:, :2]
    found = narrow.decode()
    narrow.lengths = [32]
    assert all(map(torch.equal, found, narrow.decode()))


@on_each_device
@pytest.mark.parametrize(("splits", "queries"), [(1, 1), (2, 2), (5, 1), (12, 1), (0, 2)])
def test_shares_add_up(device, splits, queries):
    counts, lengths = [queries] * 3, [0, 70, 18]
    case = Case(counts=counts, lengths=lengths, size=8, columns=12, device=device)
    case.check(case.decode(num_splits=splits), "shares")


@on_each_device
def test_prompts_are_shared_too(device):
    case = Case(counts=[1, 8], lengths=[90, 40], each=2, columns=8, device=device)
    case.check(case.varlen(), "shares")


def test_shares_depend_on_shapes_alone():
    from bdlora_megatron.ops import paged_attention as ops

    def splits(batch, groups, columns):
        meta = {"device": "meta", "dtype": torch.bfloat16}
        cache = torch.empty(9, 256, groups, 128, **meta)
        call = ops._Call(
            q=torch.empty(batch, groups * 4, 128, **meta),
            keys=cache,
            values=cache,
            table=torch.empty(batch, columns, device="meta", dtype=torch.int32),
            query_starts=None,
            kv_lengths=torch.empty(batch, device="meta", dtype=torch.int32),
            queries=1,
            scale=1.0,
            left=-1,
            splits=0,
            want_lse=False,
        )
        tile = ops._tile(call)
        return ops._splits(call, tile, math.prod(ops._grid(call, tile)))

    assert splits(1, 1, 64) == ops.MAX_SPLITS
    assert splits(1, 8, 64) == 32
    assert splits(1, 1, 1) == 2, "each share has two steps at least"
    assert splits(33, 1, 64) == 4, "a power of two"
    assert splits(256, 8, 64) == 1


@on_each_device
def test_more_sequences_than_are_searched_at_once(device):
    counts = [int(number % 9 == 0) for number in range(140)]
    case = Case(counts=counts, lengths=[2 * count for count in counts], device=device)
    case.check(case.varlen(), "many")


@on_each_device
@pytest.mark.parametrize("seed", range(24))
def test_random_batches(device, seed):
    pick = random.Random(seed)
    dtype = pick.choice(list(DTYPES.values()))
    queries = pick.choice([0, 1, 1, 2, 5])
    counts, lengths = [], []
    for _ in range(pick.randint(1, 3)):
        counts.append(queries or pick.choice([0, 1, 1, pick.randint(2, 9)]))
        lengths.append(pick.choice([0, counts[-1], counts[-1] + pick.randint(0, 40)]))
    case = Case(
        counts=counts,
        lengths=lengths,
        size=pick.choice([1, 3, 8, 16, 24, 64]),
        groups=pick.choice([1, 1, 2]),
        each=pick.choice([1, 2, 3]),
        width=pick.choice([8, 16, 20, 40]),
        tail=pick.choice([0, 1, 20]),
        left=pick.choice([-1, -1, pick.randint(0, 30)]),
        scale=pick.choice([None, 0.5]),
        dtype=dtype,
        device=device,
        seed=seed,
    )
    if queries and pick.random() < 0.7:
        splits = pick.choice([0, 1, 2, 5])
        case.check(case.decode(num_splits=splits), f"{case}, {splits} splits")
    else:
        case.check(case.varlen(), str(case))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_same_bits(device, dtype):
    case = Case(counts=[3, 3], lengths=[20, 60], columns=6, dtype=DTYPES[dtype], device=device)
    for run in (case.varlen, case.decode):
        assert all(map(torch.equal, run(), run()))


@on_each_device
@pytest.mark.engine
@pytest.mark.parametrize("name", ["whole prompts", "a prompt's next chunk between steps"])
def test_equals_attention_on_a_cpu(device, name):
    from bdlora_megatron.runtime.cpu_inference import paged_attention

    counts, lengths = BATCHES[name]
    case = Case(counts=counts, lengths=lengths, device=device, scale=0.4)
    wanted = paged_attention(
        *(part.cpu() for part in (case.q, case.k, case.v)),
        query_starts=case.sums(counts).tolist(),
        kv_lengths=lengths,
        block_table=case.table.cpu(),
        scale=case.scale,
    )
    assert_close(case.varlen()[0], wanted, name, ATTENTION[torch.float32])


def _recorded(ops, run, device):
    """What a CUDA graph holds of a call, to run it again, and where it leaves its output.

    Without a GPU a tape stands for the graph, and refuses what waits for the device.
    """
    if device == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        return graph.replay, out
    tape = cuda_graphs._Tape()
    with ExitStack() as stack:
        for name in ("attend", "combine"):
            proxy = cuda_graphs._Launches(getattr(ops.kernels, name), tape)
            stack.enter_context(mock.patch.object(ops.kernels, name, proxy))
        stack.enter_context(tape)
        out = run()
    return lambda: [call() for call in tape.calls], out


@on_each_device
@pytest.mark.parametrize("decoding", [True, False], ids=["decoding", "prompts"])
def test_a_recorded_step_serves_other_batches(device, decoding):
    """Nothing but what tensors hold may differ from step to step of a size."""
    from bdlora_megatron.ops import paged_attention as ops

    more = {"columns": 6, "each": 2, "device": device}
    first = Case(counts=[1, 1, 1], lengths=[50, 1, 20], **more)
    second = Case(counts=[1, 1, 1], lengths=[9, 0, 60], seed=1, **more)
    if not decoding:
        second = Case(counts=[0, 3, 2], lengths=[9, 7, 60], tail=1, seed=1, **more)
    blocks = max(len(first.k), len(second.k))
    k, v = (torch.zeros(blocks, *first.k.shape[1:], device=device) for _ in range(2))
    q, table = torch.zeros_like(first.q), torch.zeros_like(first.table)
    starts, ends = first.sums(first.counts), first.sums(first.lengths)
    lengths = torch.zeros(3, dtype=torch.int32, device=device)

    def run():
        options = {**first.options, "block_table": table}
        if decoding:
            own = q[:3].unsqueeze(1)
            return ops.flash_attn_with_kvcache(own, k, v, cache_seqlens=lengths, **options)
        return ops.flash_attn_varlen_func(q, k, v, starts, ends, 6, 60, **options)

    replay, out = _recorded(ops, run, device)
    for case in (first, second):
        k[: len(case.k)], v[: len(case.v)] = case.k, case.v
        q.copy_(case.q), table.copy_(case.table)
        starts.copy_(case.sums(case.counts)), ends.copy_(case.sums(case.lengths))
        lengths.copy_(torch.tensor(case.lengths))
        replay()
        lse = (case.decode if decoding else case.varlen)()[1]
        case.check((out.view(-1, *q.shape[1:]).cpu(), lse), "replayed")


class _Engine:
    """What Megatron-Core's attention is to the method that calls flash-attention."""

    training = False
    batch_invariant_mode = False
    layer_number = 1
    softmax_scale = 0.3

    def __init__(self, window):
        from megatron.core.transformer.attention import Attention

        self.config = SimpleNamespace(window_size=window, window_attn_skip_freq=None)
        for name in dir(Attention):
            if name.startswith("_apply_sink"):
                setattr(self, name, getattr(Attention, name))

    def _resolve_flash_version(self):
        return False, False


@on_each_device
@pytest.mark.engine
@pytest.mark.parametrize("decoding", [True, False], ids=["decoding", "prompts"])
def test_takes_the_engines_calls(device, decoding, monkeypatch):
    """Megatron-Core's own method, with these functions in the place of flash-attention's."""
    from megatron.core.transformer import attention

    from bdlora_megatron.ops import paged_attention

    for name in paged_attention.__all__:
        monkeypatch.setattr(attention, name, getattr(paged_attention, name))
    monkeypatch.setattr(attention, "HAVE_FA3", False)
    method = attention.Attention.flash_decode_and_prefill
    windows = hasattr(attention, "is_layer_window_attention")
    counts, lengths = ([1, 1, 1], [9, 50, 0]) if decoding else ([1, 6, 0], [40, 6, 0])
    left = 20 if windows else -1
    case = Case(counts=counts, lengths=lengths, left=left, tail=0, device=device)
    # Releases without the scale's keyword decode with the default.
    scaled = "softmax_scale" in inspect.getsource(method).split("flash_attn_args = ")[1]
    case.scale = _Engine.softmax_scale if scaled or not decoding else None
    arguments = (
        *(case.q.unsqueeze(1), case.k, case.v, max(counts), max(lengths)),
        *(case.sums(counts), case.sums(lengths)),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        *(case.table, decoding),
    )
    engine = _Engine((left, 0) if windows else None)
    found = method(engine, *arguments).squeeze(1).cpu()
    lse = (case.decode if decoding else case.varlen)()[1]
    case.check((found, lse), "by the engine")
    if "softmax_offset" in inspect.signature(method).parameters:
        sink = torch.linspace(-1, 1, len(lse), device=device)
        found = method(engine, *arguments, softmax_offset=sink).squeeze(1).cpu()
        wanted, wanted_lse = case.reference()
        wanted *= torch.sigmoid(wanted_lse - sink.cpu()[:, None]).t()[..., None]
        assert_close(found, wanted, "with a sink", ATTENTION[torch.float32])


REFUSED = {
    "causal": ({"causal": False}, UnsupportedError, "causal=False, wanted True"),
    "no blocks": ({"block_table": None}, UnsupportedError, "block_table=None"),
    "alibi": ({"alibi_slopes": torch.ones(3)}, UnsupportedError, "alibi_slopes=Tensor"),
    "softcap": ({"softcap": 30.0}, UnsupportedError, "softcap=30.0 is not supported"),
    "unknown": ({"page_table": None}, UnsupportedError, "page_table=None is not supported"),
    "table's memory": (
        {"block_table": torch.zeros(6, 2, dtype=torch.int32).t()},
        UnsupportedError,
        "side by side",
    ),
    "table's rows": (
        {"block_table": torch.zeros(3, 6, dtype=torch.int32)},
        ShapeError,
        "block_table",
    ),
}


@on_each_device
@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments(device, name):
    options, error, message = REFUSED[name]
    case = Case(counts=[1, 1], lengths=[5, 9], device=device)
    for run in (case.varlen, case.decode):
        with pytest.raises(error, match=message):
            run(**options)


@on_each_device
def test_refused_tensors(device):
    def refused(error, message, **changes):
        case = Case(counts=[1, 1], lengths=[5, 9], groups=2, each=1, device=device)
        for name, change in changes.items():
            setattr(case, name, change(getattr(case, name)))
        with pytest.raises(error, match=message):
            case.varlen()

    refused(ShapeError, r"wanted \[tokens, h, d\]", q=lambda q: q[..., :8])
    refused(ShapeError, r"wanted \[tokens, h, d\]", v=lambda v: v[1:])
    refused(ShapeError, "wanted a multiple of 2", q=lambda q: q[:, :1])
    refused(UnsupportedError, "strides of k", v=lambda v: v.contiguous())
    refused(UnsupportedError, "wanted float16", q=lambda q: q.bfloat16())
    refused(UnsupportedError, "wanted float16", **dict.fromkeys("qkv", torch.Tensor.double))
    refused(UnsupportedError, "no_grad", q=lambda q: q.requires_grad_())
    case = Case(counts=[1], lengths=[1], width=264, device=device)
    with pytest.raises(UnsupportedError, match="heads of 264"):
        case.varlen()
    with pytest.raises(UnsupportedError, match="num_splits=129"):
        case.decode(num_splits=129)
    with pytest.raises(UnsupportedError, match="cache_seqlens=7"):
        case.decode(cache_seqlens=7)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    from bdlora_megatron.ops import paged_attention

    monkeypatch.setattr(paged_attention, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.cpu_inference"):
        Case(counts=[1], lengths=[1]).varlen()
