"""What differs in the dynamic inference engine; one set of seams on every release known here.

``serve.engine`` builds on this, and ``runtime.cpu_inference`` asks it what to stand in for. A
release is told apart by ``InferenceConfig``, and by the attributes that come and go with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from megatron.core.inference import inference_request
from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.engines import dynamic_engine
from megatron.core.inference.text_generation_controllers import text_generation_controller
from torch import Tensor

from bdlora_megatron.runtime.versions.prefix import PrefixContext

try:
    # Since 0.17, it holds what the constructors of context, wrapper and engine took before.
    from megatron.core.inference.config import InferenceConfig
except ImportError:
    InferenceConfig = None

__all__ = [
    "SeamedContext",
    "context_arguments",
    "engine_arguments",
    "engine_modules",
    "keep_samples",
    "logits_of_all_tokens",
    "step_logits",
    "steps_run",
    "wrapper_arguments",
]

#: Where a controller keeps its tensor for captured steps while a step goes without.
_CAPTURED_LOGITS = "_bdlora_captured_logits"


class SeamedContext(PrefixContext):
    """A dynamic context with the same seams on every release."""

    chunked_prefill_request_id: int
    total_request_count: int

    def add_columns(self) -> None:
        """Called once Megatron's tensors are allocated; a subclass adds its own."""

    def add_column(self, name: str, fill: int) -> None:
        """Keep one more number for each request, which moves with the request's row.

        It stays out of ``request_metadata_types``: those are read from sampling parameters, which
        do not survive the eviction of a request.

        Args:
            name: Its key in ``request_metadata``.
            fill: What stands in rows without a request.
        """
        if name in self.request_metadata:
            return
        self.request_metadata[name] = torch.full_like(self.request_ids, fill)
        # Since 0.18, with a copy of the active rows, which is made of all columns.
        if hasattr(self, "active_request_metadata"):
            self.active_request_metadata[name] = torch.full_like(self.request_ids, fill)

    def allocate_all_tensors(self, *, is_init: bool) -> None:
        """Megatron-Core's own until 0.16, where it allocates all tensors."""
        super().allocate_all_tensors(is_init=is_init)
        self.add_columns()

    def initialize_all_tensors(self) -> None:
        """Megatron-Core's own since 0.17, where it allocates all tensors."""
        super().initialize_all_tensors()
        self.add_columns()

    @property
    def blocks(self) -> Any:
        """What allocates the cache's blocks."""
        since_0_17 = getattr(self, "kv_block_allocator", None)
        return self.block_allocator if since_0_17 is None else since_0_17

    @property
    def last_logits_only(self) -> bool:
        """Whether the model gives the logits of each request's last token, or those of all."""
        return bool(self._settings.materialize_only_last_token_logits)

    @last_logits_only.setter
    def last_logits_only(self, wanted: bool) -> None:
        self._settings.materialize_only_last_token_logits = wanted

    @property
    def _settings(self) -> Any:
        # Since 0.17 they are in a configuration.
        return self if InferenceConfig is None else self.config

    @property
    def unfinished_is_set_aside(self) -> bool:
        """Whether a prompt that is read in chunks has a row after all others, and no token.

        So it is between two steps since 0.17. Until 0.16 such a prompt stays the last active row,
        with a token that the next chunk overwrites.
        """
        unfinished, count = self.chunked_prefill_request_id, self.total_request_count
        return (
            unfinished != -1
            and count < len(self.request_ids)
            and int(self.request_ids[count]) == unfinished
            # Rows that are no longer in use keep their ids.
            and unfinished not in self.request_ids[:count].tolist()
        )

    def forget_unfinished(self) -> None:
        """Note that no prompt is being read in chunks."""
        self.chunked_prefill_request_id = -1
        # Until 0.16: that the coming step has a chunk.
        if hasattr(self, "has_explicit_chunked_prefill_req"):
            self.has_explicit_chunked_prefill_req = False

    def request_columns(self) -> list[Tensor]:
        """What is kept for each request."""
        columns = [
            self.request_ids,
            self.request_query_lengths,
            self.request_output_lengths,
            self.request_kv_length_offsets,
            self.request_kv_block_counts,
            self.request_last_kv_block_id,
            self.request_last_kv_block_offset,
            self.request_to_kv_block_ids,
            *self.request_metadata.values(),
        ]
        # Since 0.17.
        if hasattr(self, "request_in_prefill_status_tensor"):
            columns.append(self.request_in_prefill_status_tensor)
        return columns

    def token_columns(self) -> list[Tensor]:
        """What is kept for each token of the coming step, except for its request's row."""
        return [
            self.token_to_input_ids,
            self.token_to_pos_ids,
            self.token_to_block_idx,
            self.token_to_position_in_request,
            self.token_to_local_position_within_kv_block,
        ]


def context_arguments(
    config: Any,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_tokens: int,
    block_size: int,
    kv_cache_memory_bytes: int,
    cuda_graphs: int | None = None,
) -> dict[str, Any]:
    """What the constructor of a context takes.

    Args:
        config: The model's, its layers those that have attention.
        max_model_len: Positions of one request, at most.
        max_num_seqs: Rows.
        max_tokens: Tokens of one step, at most.
        block_size: Positions of a block of the cache.
        kv_cache_memory_bytes: Memory of the cache.
        cuda_graphs: For how many numbers of requests a decoding step is captured; None for none.
    """
    sizes = {
        "max_sequence_length": max_model_len,
        "buffer_size_gb": kv_cache_memory_bytes / 2**30,
        "max_requests": max_num_seqs,
        "max_tokens": max_tokens,
        "block_size_tokens": block_size,
        "num_cuda_graphs": cuda_graphs,
        # Steps that read prompts are long, and of too many sizes.
        "use_cuda_graphs_for_non_decode_steps": False,
    }
    if InferenceConfig is None:
        return {
            **sizes,
            "params_dtype": config.params_dtype,
            "num_layers": config.num_layers,
            "kv_channels": config.kv_channels,
            "num_attention_heads": config.num_query_groups,
            "tensor_model_parallel_size": config.tensor_model_parallel_size,
        }
    ranks = config.tensor_model_parallel_size
    # A number of rows that the ranks do not divide is refused.
    sizes["max_requests"] = -(-max_num_seqs // ranks) * ranks
    settings = InferenceConfig(**sizes, enable_chunked_prefill=True)
    return {"model_config": config, "inference_config": settings}


def wrapper_arguments(model: Any, context: SeamedContext) -> tuple[Any, ...]:
    """What the constructor of ``GPTInferenceWrapper`` takes."""
    if InferenceConfig is not None:
        return model, context
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )

    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
    )
    return model, config, context


def engine_arguments() -> dict[str, Any]:
    """What the constructor of ``DynamicInferenceEngine`` takes beside controller and context."""
    return {"random_seed": 0} if InferenceConfig is None else {}


def steps_run(engine: Any) -> int:
    """How many steps a ``DynamicInferenceEngine`` has run; since 0.17 its context counts them."""
    return int((engine if InferenceConfig is None else engine.context).step_count)


def step_logits(controller: Any, given: tuple[Tensor, ...]) -> Tensor:
    """The logits of a step: of each request's last token, or of all, as ``last_logits_only`` says.

    Args:
        controller: A ``TextGenerationController``.
        given: What ``_dynamic_step_sample_logits`` was called with: the logits until 0.17, which
            later releases keep.

    Returns:
        ``[1, requests or tokens, vocabulary]``.
    """
    if given:
        return given[0]
    logits: Tensor = controller._all_logits_cuda
    # A captured step after this one copies its logits there again.
    if (captured := controller.__dict__.pop(_CAPTURED_LOGITS, None)) is not None:
        controller._all_logits_cuda = captured
    return logits


@contextmanager
def logits_of_all_tokens(controller: Any) -> Iterator[None]:
    """Run a step inside this block whose logits are those of all its tokens.

    Since 0.18 the controller of captured steps copies all logits into one tensor, which has a row
    for each request: too few here. A step that reads prompts is not captured, so its logits may
    stay where the model leaves them until ``step_logits`` has taken them.

    Args:
        controller: A ``TextGenerationController``.
    """
    if getattr(controller, "_all_logits_cuda", None) is None or not controller._enable_cuda_graph:
        yield
        return
    controller.__dict__[_CAPTURED_LOGITS] = controller._all_logits_cuda
    controller._enable_cuda_graph = False
    try:
        yield
    finally:
        controller._enable_cuda_graph = True


def keep_samples(controller: Any, tokens: Tensor) -> None:
    """Leave the tokens of a step where the controller's bookkeeping finds them.

    Args:
        controller: A ``TextGenerationController``.
        tokens: One for each active request.
    """
    if hasattr(controller, "_all_logits_cuda"):
        # Since 0.18, each step has a tensor of its own.
        controller._sampled_tokens_cuda = tokens
    else:
        controller._sampled_tokens_cuda[: len(tokens)] = tokens


def engine_modules() -> list[ModuleType]:
    """The modules that ask CUDA for something in passing, as they see ``torch``."""
    modules = [dynamic_context, dynamic_engine, text_generation_controller, inference_request]
    if InferenceConfig is not None:
        from megatron.core.inference.contexts import kv_block_allocator

        modules.append(kv_block_allocator)
    return modules
