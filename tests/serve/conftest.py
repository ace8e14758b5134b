"""The model and the server that most tests share."""

from __future__ import annotations

import pytest
import torch

from tests.serve import models, servers

#: Small on purpose: prompts come in chunks, the cache is short, adapters change places.
SIZES = (
    "max_model_len=256", "block_size=8", "kv_cache_memory_bytes=600000",
    "max_num_batched_tokens=48", "max_num_seqs=8", "max_lora_rank=8", "max_loras=2",
    "host_cache_bytes=2000000", "patience_steps=8", "max_queue=40", "rank_timeout_s=60",
    "dtype=float32",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return models.make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    with servers.RunningServer(
        folder, log, "--tp", "2", "--adapters", *names, "--set", *SIZES,
        f"adapter_dirs=[{folder / 'adapters'}]",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def tuned(folder):
    """PEFT's model with all adapters."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tuned = None
    for name in models.ADAPTERS:
        path = folder / "adapters" / name
        if tuned is None:
            tuned = peft.PeftModel.from_pretrained(base, path, adapter_name=name)
        else:
            tuned.load_adapter(path, adapter_name=name)
    return tuned


@pytest.fixture(scope="module")
def alone(tuned):
    """What PEFT answers, token by token, to a prompt's token ids."""

    def answer(model: str, ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        settings |= {"attention_mask": torch.ones_like(given)}
        if model == "model":
            with tuned.disable_adapter():
                out = tuned.generate(given, **settings)
        else:
            tuned.set_adapter(model)
            out = tuned.generate(given, **settings)
        return out[0, len(ids) :].tolist()

    return answer


@pytest.fixture(scope="module")
def tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder / "model")
