"""Hugging Face models in Megatron-Core give transformers' logits, at any parallel size."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from bdlora_megatron.convert.hf_base import load_hf_model
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.hf_models import CASES, SEQUENCE, VOCAB, make_model
from tests.tp.session import model_parallel


def _inputs(ids):
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().expand(len(ids), 1, -1, -1)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(SEQUENCE).expand(len(ids), -1),
        "attention_mask": mask,
    }


def _all_logits(rank, world_size, models):
    with model_parallel(world_size), torch.no_grad():
        found = {}
        for kind, (folder, ids, _) in models.items():
            model = load_hf_model(folder, dtype=torch.float32, max_sequence_length=SEQUENCE).eval()
            found[kind] = gather_from_tensor_model_parallel_region(model(**_inputs(ids)))
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder, token ids and transformers' logits of every kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CASES}
    return {kind: (folder, *make_model(kind, folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def logits_by_rank(request, models):
    return run_ranks(request.param, _all_logits, models)


@pytest.mark.parametrize("kind", CASES)
def test_logits_equal_transformers(kind, models, logits_by_rank):
    _, _, wanted = models[kind]
    for logits in logits_by_rank:
        assert_close(logits[kind][..., :VOCAB], wanted, "logits")
        assert (logits[kind][..., VOCAB:] == float("-inf")).all(), "padding of the vocabulary"
