"""What the dynamic engine calls to run the model and to choose tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from torch import Tensor

from bdlora_megatron.runtime.versions.engine import keep_samples, logits_of_all_tokens, step_logits
from bdlora_megatron.serve.engine.prompts import PromptScores
from bdlora_megatron.serve.engine.sampling import Sampler
from bdlora_megatron.serve.messages import Choice
from bdlora_megatron.serve.slots import ModelSlots

__all__ = ["AdapterController", "AdapterGPT"]


class AdapterGPT(GPTInferenceWrapper):
    """Tells all layers, once per step, which slot each token uses."""

    def __init__(
        self,
        *args: Any,
        slots: ModelSlots | None,
        slots_in_use: Callable[[], Collection[int]],
        scores: PromptScores,
        **kwargs: Any,
    ) -> None:
        """Wrap a model.

        Args:
            *args: As for ``GPTInferenceWrapper``.
            slots: The model's slots; None serves the base model alone.
            slots_in_use: Those of the running requests, the same on every rank.
            scores: The prompts whose log-probabilities are asked for.
            **kwargs: As for ``GPTInferenceWrapper``.
        """
        super().__init__(*args, **kwargs)
        self.slots = slots
        self.slots_in_use = slots_in_use
        self.scores = scores

    def _forward(self, inference_input: dict[str, Any]) -> Tensor:
        if self.slots is not None:
            self._set_batch(self.slots)
        logits: Tensor = super()._forward(inference_input)
        return logits

    def _set_batch(self, slots: ModelSlots) -> None:
        context = self.inference_context
        if context.using_cuda_graph_this_step():
            slots.set_captured_batch(context.token_slots())
        elif used := self.slots_in_use():
            slots.set_batch(slots.batch(context.token_slots()), used)
        else:
            slots.set_batch(None)


class _NoText:
    """Text is the API server's matter; here there are tokens only."""

    bos = None
    eod = -1

    def detokenize(self, tokens: Any) -> str:
        del tokens
        return ""


class AdapterController(TextGenerationController):
    """Chooses each request's token from a random stream of its own.

    Attributes:
        choices: What the last step chose, by request; without a prompt not yet read to its end.
    """

    choices: dict[int, Choice]

    def __init__(self, wrapped_model: AdapterGPT, sampler: Sampler) -> None:
        """Take over a wrapped model."""
        super().__init__(wrapped_model, _NoText())
        self.sampler = sampler
        self.choices = {}

    def _dynamic_step_forward_logits(self, *tokens: Any) -> Any:
        # Those of the last token of each request do, where nobody asks about prompts. Whose they
        # are is only looked up where somebody does: on a GPU, it waits for the device.
        wrapped = self.inference_wrapped_model
        context, scores = wrapped.inference_context, wrapped.scores
        scored = bool(scores.pending and scores.wanted(context.active_ids))
        context.last_logits_only = not scored
        with logits_of_all_tokens(self) if scored else nullcontext():
            return super()._dynamic_step_forward_logits(*tokens)

    def _dynamic_step_sample_logits(self, *given: Tensor) -> None:
        context = self.inference_wrapped_model.inference_context
        logits = step_logits(self, given)
        ids, unfinished = context.active_ids, context.chunked_prefill_request_id
        if context.last_logits_only:
            # Since 0.19, a captured step leaves them in a longer tensor.
            rows = logits.squeeze(0)[: len(ids)]
        else:
            self.inference_wrapped_model.scores.read(logits.squeeze(0), context.spans)
            rows = context.last_token_logits(logits)
        chosen = self.sampler.choose(rows, ids, idle=unfinished)
        keep_samples(self, torch.tensor([choice.token for choice in chosen], device=rows.device))
        self.choices = {
            request_id: choice
            for request_id, choice in zip(ids, chosen, strict=True)
            if request_id != unfinished
        }
