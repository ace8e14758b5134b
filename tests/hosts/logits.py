"""What a host's model and PEFT compute for the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import assert_close

#: Between adapters that went through some steps of Adam, which divides the rounding of a sum in
#: another order by the gradient's own size.
TRAINED = (1e-4, 1e-3)


def assert_same_adapter(
    found: Mapping[Any, Any],
    wanted: Mapping[Any, Any],
    tolerance: tuple[float, float] | None = None,
) -> None:
    """Compare every factor of two adapters' modules, bit for bit or within a tolerance."""
    assert found.keys() == wanted.keys()
    for key, factors in wanted.items():
        assert (found[key].scale, found[key].num_blocks) == (factors.scale, factors.num_blocks)
        for name in ("A", "B"):
            ours, theirs = getattr(found[key], name), getattr(factors, name)
            if tolerance is None:
                assert torch.equal(ours, theirs), (key, name)
            else:
                assert_close(ours, theirs, f"{key} {name}", tolerance)


@torch.no_grad()
def pipeline_logits(chunks: list[Any], tokens: Sequence[int]) -> Tensor | None:
    """Through the chunks of all pipeline stages; None on all stages but the last."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(_: Any, model: Any) -> Any:
        places = torch.arange(len(tokens))[None]
        logits = model(torch.tensor([tokens]), places, None, runtime_gather_output=True)
        return logits, lambda output, non_loss_data: output.float()

    for chunk in chunks:
        chunk.eval()
    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * len(chunks),
        model=chunks,
        # Interleaved stages take whole rounds of micro-batches alone.
        num_microbatches=chunks[0].config.pipeline_model_parallel_size,
        seq_length=len(tokens),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[0] if found else None


@torch.no_grad()
def peft_logits(base: Any, adapter: Any, tokens: Sequence[int]) -> Tensor:
    """What transformers computes for the base model, with an adapter in PEFT if there is one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(torch.tensor([tokens])).logits
