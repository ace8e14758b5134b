"""Long rows: the loss in chunks against torch's in fp64, and memory that grows with the row."""

from __future__ import annotations

from itertools import chain

import numpy as np
import psutil
import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.train import loss as chunked
from bdlora_megatron.train.attention import PackedAttention
from bdlora_megatron.train.data import RowDataset
from bdlora_megatron.train.examples import Example
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.step import Stepper
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.session import model_parallel
from tests.train.runs import make_base, make_files, settings

FEATURES, TOKENS, REAL, PADDED = 12, 40, 61, 66


class _Model:
    """What the loss looks at: the output layer's weight and how ranks share it."""

    class config:  # noqa: N801
        sequence_parallel = False

    share_embeddings_and_output_weights = False
    unpadded_vocab_size = REAL

    def __init__(self, weight):
        self.output_layer = torch.nn.Module()
        self.output_layer.weight = weight


def _data():
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, 1, FEATURES, dtype=torch.float64, generator=draw)
    weight = torch.randn(PADDED, FEATURES, dtype=torch.float64, generator=draw)
    labels = torch.randint(REAL, (TOKENS,), generator=draw)
    return hidden, weight, labels, torch.arange(1, TOKENS, 3)


def _losses(rank, world_size, learnt):
    """Losses, gradient of the hidden states and collectives, for chunks of several sizes."""
    found = []
    with model_parallel(world_size):
        # One token in a chunk, some, all.
        for chunk_elements in (1, 100, 10**6):
            hidden, weight, labels, _ = _data()
            hidden.requires_grad_(True)
            chunked._CHUNK_ELEMENTS = chunk_elements
            model = _Model(weight.chunk(world_size)[rank])
            with record_collectives() as log:
                losses = chunked.token_losses(model, hidden, labels, learnt)
                (losses * torch.arange(1.0, len(learnt) + 1.0)).sum().backward()
            found.append((losses.detach(), hidden.grad, [call.kind for call in log.calls]))
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_chunks_give_torchs_loss_and_gradient(world_size):
    hidden, weight, labels, learnt = _data()
    hidden.requires_grad_(True)
    wanted = cross_entropy(
        linear(hidden[learnt, 0], weight[:REAL]), labels[learnt], reduction="none"
    )
    (wanted * torch.arange(1.0, len(learnt) + 1.0)).sum().backward()
    for losses, gradient, calls in chain(*run_ranks(world_size, _losses, learnt)):
        assert_close(losses, wanted.detach(), "losses")
        assert_close(gradient, hidden.grad, "gradient")
        # Three forward, and backward the partial sums of the hidden states' gradient.
        assert calls == ["all_reduce"] * (4 if world_size > 1 else 0)


def test_a_micro_batch_that_teaches_nothing():
    for losses, gradient, _ in run_ranks(1, _losses, torch.arange(0))[0]:
        assert losses.shape == (0,)
        assert gradient.abs().max() == 0


def test_dropout_of_attention_is_refused():
    class config:  # noqa: N801
        attention_dropout, kv_channels = 0.1, 4

    with pytest.raises(
        UnsupportedError, match=r"attention_dropout=0\.1; packed attention has none"
    ):
        PackedAttention(config, 1, None, "self")


def _grown(rank, world_size, config):
    """Bytes that a step over one example as long as the row takes at its peak."""
    length = config.model.seq_length
    tokens = (np.arange(length + 1) % 300).astype(np.int32)
    example = Example(tokens, np.ones(length + 1, dtype=bool))
    batch = RowDataset([example], length, packing=True, seed=0).batch([0])
    with model_parallel(1):
        stepper = Stepper(build_model(config)[0], config)
        before = psutil.Process().memory_info().rss
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        result = stepper.train_step(0, [batch])
        assert result.tokens == length
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 - before


def test_memory_grows_with_the_row_and_not_with_its_square(tmp_path):
    root = make_files(tmp_path)
    make_base(root / "long", num_attention_heads=6, max_position_embeddings=2**14)
    peaks = []
    for length in (2**12, 2**13):
        config = settings(
            root,
            root / f"run{length}",
            model={"hf_path": str(root / "long"), "seq_length": length, "dtype": "float32"},
            peft={"scheme": "bdlora", "bdlora": {"num_blocks": 1, "rank": 2}},
            train={"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
            scheduler={},
        )
        peaks += run_ranks(1, _grown, config)
    # A mask alone would be 64 MB in the longer row, its scores 1.6 GB.
    assert peaks[1] < 2.2 * peaks[0], peaks
    assert peaks[1] < 400e6, peaks
