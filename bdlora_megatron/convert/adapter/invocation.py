"""The invocation tokens of Activated LoRA in files; ``bdlora_megatron.invocation`` finds them."""

from __future__ import annotations

from bdlora_megatron.convert.adapter.problems import Problems

__all__ = ["UNSAYABLE", "parse_invocation"]

#: What a writer says whose format knows plain adapters alone.
UNSAYABLE = (
    "it acts from its invocation tokens on (Activated LoRA), which the format cannot say, and its "
    "readers would let it act on every token; write it --to peft or --to megatron"
)


def parse_invocation(option: str, value: object, problems: Problems) -> tuple[int, ...] | None:
    """Read invocation tokens from a file.

    Args:
        option: What the file calls them.
        value: What it has there.
        problems: Gets an entry where these are no token ids.

    Returns:
        The tokens; None where there are none, as in PEFT, and the adapter acts everywhere.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value
    ):
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        problems.add(
            f"{option} is {shown}, wanted a list of token ids; write there what the base model's "
            "tokenizer makes of the invocation text"
        )
        return None
    return tuple(value)
