"""PEFT's mixed batch, by `adapter_names`: `python -m benchmarks.peers.run_peft JOB OUTCOME`."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from benchmarks.peers.job import Job, Load, Outcome, Request, timed

#: PEFT's name for rows without an adapter.
_BASE = "__base__"


def main() -> None:
    """Run a job.

    Raises:
        SystemExit: The job wants several ranks; PEFT's mixed batch runs in one process.
    """
    job = Job.read(sys.argv[1])
    if job.tp != 1:
        raise SystemExit(f"tp={job.tp}; PEFT's mixed batch runs in one process")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    started = time.perf_counter()
    model, names = _model(job)
    packages = ("peft", "transformers", "torch")
    outcome = Outcome(
        versions={name: version(name) for name in packages},
        start_s=time.perf_counter() - started,
    )

    def answer(load: Load, requests: Sequence[Request]) -> list[list[int]]:
        used = [
            _BASE if request.adapter < 0 else names[load.adapters[request.adapter]]
            for request in requests
        ]
        return _answer(model, requests, used if load.adapters else None)

    timed(job, outcome, answer, time.perf_counter)
    outcome.write(sys.argv[2])


def _model(job: Job) -> tuple[Any, dict[str, str]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.dtype))
    folders = dict.fromkeys(folder for load in job.loads for folder in load.adapters)
    names = {folder: f"adapter{number}" for number, folder in enumerate(folders)}
    for folder, name in names.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    # No token ends an answer; `min_new_tokens` would forbid that token instead of ignoring it.
    model.generation_config.eos_token_id = None
    return model.eval(), names


def _answer(
    model: Any, requests: Sequence[Request], names: Sequence[str] | None
) -> list[list[int]]:
    """One call of ``generate``, prompts padded on the left as transformers wants them."""
    import torch

    longest = max(len(request.prompt) for request in requests)
    tokens = max(request.max_tokens for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, longest - len(request.prompt) :] = 1
    more = {} if names is None else {"adapter_names": list(names)}
    # A PeftModel without names answers with the adapter that is active, not with the base model.
    base = (
        model.disable_adapter()
        if hasattr(model, "disable_adapter") and not names
        else nullcontext()
    )
    with base, torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            **more,
        )
    return [
        found[row, longest : longest + request.max_tokens].tolist()
        for row, request in enumerate(requests)
    ]


if __name__ == "__main__":
    main()
