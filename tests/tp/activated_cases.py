"""Activated LoRA for the serving engine: what PEFT's own ``generate`` makes of each request."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LogitsProcessor

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import load_hf_model, read_peft, write_adapter
from bdlora_megatron.convert.structure import Structure, restructure
from bdlora_megatron.serve import AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.engine import EngineOptions, ServingEngine
from bdlora_megatron.serve.messages import Choice, Sampling, Submit
from tests.golden.peft_cases import make_adapter, make_base

#: Two Activated LoRAs, and a plain one beside them.
INVOCATION = {"first": [7, 8], "other": [9], "plain": None}
BLOCK, LENGTH = 4, 36
#: Served as it was converted; PEFT computes the one that it was made of.
CONVERTED = {"blocked": "first"}
NAMES = (None, *INVOCATION, *CONVERTED)


def make_folder(root: Path) -> Path:
    """A base model and the adapters."""
    base = make_base(root / "base")
    for number, (name, tokens) in enumerate(INVOCATION.items()):
        make_adapter(base, root / name, r=4 + 2 * number, alora_invocation_tokens=tokens)
    blocks = Structure(mode="exact", num_blocks=2)
    for name, source in CONVERTED.items():
        adapter = restructure(read_peft(root / source), blocks).adapter
        write_adapter(adapter, root / name, "peft")
    return root


class Peft:
    """PEFT's model in fp64."""

    def __init__(self, root: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float64)
        first, *more = INVOCATION
        model = PeftModel.from_pretrained(model, root / first, adapter_name=first)
        for name in more:
            model.load_adapter(root / name, adapter_name=name)
        self.model = model.double().eval()
        # Nothing ends an answer before its length.
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def answer(self, request: Submit) -> list[Choice]:
        """What ``generate`` gives, greedily; where asked for, the prompt's tokens come first."""
        name = CONVERTED.get(request.adapter or "", request.adapter)
        given: dict[str, Any] = {"adapter_names": [name or "__base__"]}
        if name is not None:
            self.model.set_adapter(name)
            given = {}
        ids, wanted = torch.tensor([request.prompt]), request.sampling
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=wanted.max_tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[_Biased(dict(wanted.logit_bias))],
            **given,
        )
        rows, tokens = list(map(torch.squeeze, made.logits)), made.sequences[0, ids.shape[1] :]
        if wanted.prompt_logprobs:
            rows = [*self.model(input_ids=ids, **given).logits[0, :-1], *rows]
            tokens = made.sequences[0, 1:]
        return [_choice(row, token) for row, token in zip(rows, tokens.tolist(), strict=True)]


class _Biased(LogitsProcessor):
    def __init__(self, biases: dict[int, float]) -> None:
        self.biases = biases

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        biased = scores.clone()
        for token, bias in self.biases.items():
            biased[:, token] += bias
        return biased


def _choice(logits: torch.Tensor, token: int) -> Choice:
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(2)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Choice(token, float(logprobs[token]), tuple(pairs))


def ask(number: int, prompt: Any, adapter: str | None, *, salt: Any = None, **more: Any) -> Submit:
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 4, "logprobs": 2, **more})
    return Submit(
        request_id=number, prompt=tuple(prompt), sampling=sampling, adapter=adapter, cache_salt=salt
    )


def engine_for(root: Path, world: int, *, blocks: int, num_slots: int = 4, **options: Any) -> Any:
    model = load_hf_model(root / "base", dtype=torch.float64).eval()
    layouts = (Layout.BDLORA, Layout.HALF_SHARDED)
    capacity = SlotCapacity(max_loras=num_slots, max_lora_rank=16, layouts=layouts)
    slots = ModelSlots(model, capacity)
    store = AdapterStore(slots, StoreOptions(host_cache_bytes=5 * slots.largest_bytes))
    for name in (*INVOCATION, *CONVERTED):
        store.register(name, partial(read_peft, root / name))
    # Per position: keys and values, 2 layers, 24 / P numbers of 8 bytes; one block is Megatron's.
    sizes = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 10,
        "max_model_len": LENGTH,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": (blocks + 1) * BLOCK * 2 * 2 * (24 // world) * 8,
        "patience_steps": 4,
    }
    return ServingEngine(model, store, EngineOptions(**{**sizes, **options}))
