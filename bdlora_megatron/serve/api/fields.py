"""What becomes of fields that OpenAI's or vLLM's API has and this server does not carry out.

Clients send null, empty and default values of all sorts of fields. A value that asks for nothing is
passed; one that would change the answer is refused; one that would not is named as ignored, and so
is a field that is in neither API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

__all__ = ["advice", "ignored_fields", "ignored_header", "refused_field"]

#: Fields whose other values would change the answer, with the values that ask for nothing, in
#: addition to null and to empty texts, lists and objects.
_CHANGE: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "detokenize": (True,),
    "documents": (),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "logprob_token_ids": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs.disable_additional_properties": (False,),
    "structured_outputs.structural_tag": (),
    "structured_outputs.whitespace_pattern": (),
    "suffix": (),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": (),
    "web_search_options": (),
}
#: Former names of what the server carries out, with how it is asked for now.
_FORMER: Mapping[str, str] = {
    "functions": "tools",
    "function_call": "tool_choice",
    **{
        f"guided_{name}": f"structured_outputs={{{name!r}: ...}}"
        for name in ("json", "regex", "choice", "grammar")
    },
}
#: Fields that ask for something beside the answer, with the values that ask for nothing. Texts call
#: no tools, in parallel or not.
_BESIDE: Mapping[str, tuple[Any, ...]] = {
    "metadata": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "request_id": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    # There is one library, and no other to fall back on.
    "structured_outputs.disable_fallback": (True, False),
    "user": (),
}


def advice(name: str) -> str:
    """What to do about a field that was refused."""
    return f"send {_FORMER[name]} instead" if name in _FORMER else "leave it out"


def refused_field(extra: Mapping[str, Any]) -> str | None:
    """The first field that would change the answer.

    Args:
        extra: Fields that the server does not carry out.
    """
    return next(
        (
            name
            for name, value in extra.items()
            if name in _CHANGE and not _asks_nothing(name, value, _CHANGE[name])
        ),
        None,
    )


def ignored_fields(extra: Mapping[str, Any]) -> list[str]:
    """The fields that were sent and have no effect.

    Args:
        extra: As for ``refused_field``, none of which is refused.

    Returns:
        Their names; without those whose values ask for nothing.
    """
    return [
        name
        for name, value in extra.items()
        if name not in _CHANGE and not _asks_nothing(name, value, _BESIDE.get(name, ()))
    ]


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names fields without effect; empty without any."""
    # Names are what a client sent: as many as fit a header, in characters that one may have.
    quoted = (quote(name[:50], safe=".-_", errors="backslashreplace") for name in names)
    listed = [name or '""' for name in quoted][:32]
    return {"X-Ignored-Fields": ", ".join(listed)} if listed else {}


def _asks_nothing(name: str, value: Any, neutral: tuple[Any, ...]) -> bool:
    # An empty schema is one: it asks for any JSON.
    empty = value in ("", [], {}) and name != "guided_json"
    return value is None or empty or value in neutral
