"""``PUT /api``, as Megatron-LM's text generation server answers it, with an optional adapter."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from bdlora_megatron.serve.api.errors import BadRequestError
from bdlora_megatron.serve.api.generation import Prompt, answer, plan
from bdlora_megatron.serve.api.openai import until_gone
from bdlora_megatron.serve.api.schema import GenerationFields, MegatronRequest
from bdlora_megatron.serve.api.state import APIServer

__all__ = ["router"]

router = APIRouter()


@router.put("/api")
async def generate(request: Request, body: MegatronRequest) -> dict[str, Any]:
    """Go on with texts; each text of the answer begins with its prompt.

    Raises:
        BadRequestError: ``top_k`` and ``top_p`` are both set, which Megatron-LM refuses too.
    """
    api: APIServer = request.app.state.api
    model = body.adapter or api.base_name
    adapter = api.resolve(model, api.authorize(request))
    if body.top_k and body.top_p:
        raise BadRequestError("cannot set both top-k and top-p samplings.", param="top_p")
    tokenizer = api.tokenizer_of(adapter)
    prompts = [Prompt(text, tuple(tokenizer.encode(text))) for text in body.prompts]
    fields = GenerationFields(model=model, top_k=body.top_k, seed=body.random_seed)
    # A temperature beyond OpenAI's bound is allowed here; the sampler has a bound of its own.
    fields.temperature, fields.top_p = body.temperature, body.top_p or 1.0
    job = plan(api, fields, adapter, prompts, max_tokens=body.tokens_to_generate, logprobs=None)
    made = await until_gone(request, answer(api, job))
    ids = [
        [*prompt.ids, *(choice.token for delta in one.deltas for choice in delta.choices)]
        for prompt, one in zip(prompts, made, strict=True)
    ]
    return {
        "text": [prompt.text + one.text for prompt, one in zip(prompts, made, strict=True)],
        "tokens": ids,
        "segments": [[tokenizer.spell(token) for token in t] for t in ids],
    }
