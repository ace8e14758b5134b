"""What the API server and the ranks send each other: plain values, without the code of either side.

The API server sends commands to rank 0, which passes them to the other ranks in the order in which
it takes them; every rank carries out the same ones before the same step. Rank 0 answers with what a
step gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from bdlora_megatron.errors import ConfigError

__all__ = [
    "AdapterResult",
    "Cancel",
    "Choice",
    "Command",
    "Failed",
    "Grammar",
    "LoadAdapter",
    "Places",
    "Ready",
    "Sampling",
    "Snapshot",
    "StepReport",
    "Stop",
    "Submit",
    "Token",
    "UnloadAdapter",
    "Vocabulary",
]

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must follow.

    Attributes:
        text: In llguidance's words.
        vocabulary: The key of its ``Vocabulary``, which was sent before.
    """

    text: str
    vocabulary: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a request's tokens are chosen."""

    temperature: float = 1.0
    """0 takes the most probable token."""

    top_k: int = 0
    """Draw from so many most probable tokens; 0 from all."""

    min_p: float = 0.0
    """Draw from tokens that are at least this share as probable as the most probable one."""

    top_p: float = 1.0
    """Draw from the fewest most probable ones of these that together have this share of their
    probability."""

    seed: int = 0
    """Where the request's stream of random numbers starts."""

    logprobs: int | None = None
    """Report the log-probability of each token, and of so many most probable ones."""

    prompt_logprobs: bool = False
    """Report those of the prompt's tokens, too, from the second on."""

    max_tokens: int = 16
    """End after so many tokens, with reason ``length``."""

    stop_ids: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end a request, with reason ``stop``; they are reported too."""

    min_tokens: int = 0
    """Choose none of ``stop_ids`` before so many tokens."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens with what is added to their logits."""

    presence_penalty: float = 0.0
    """Taken off the logit of every token that was chosen before."""

    frequency_penalty: float = 0.0
    """Taken off the logit of every token, as often as it was chosen before."""

    repetition_penalty: float = 1.0
    """Divides the logit of every token in the prompt or chosen before; multiplies a negative
    one."""

    grammar: Grammar | None = None
    """Choose what it allows alone, and at its end one of its vocabulary's ends."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature={self.temperature}; wanted 0 to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}; wanted more than 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min_p={self.min_p}; wanted 0 to 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}; wanted 0 (no limit) or more")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}; wanted at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ConfigError(f"logprobs={self.logprobs}; wanted 0 to 20")
        if self.prompt_logprobs and self.logprobs is None:
            raise ConfigError("prompt_logprobs without logprobs; set logprobs to 0 or more")
        self._check_logits()

    def _check_logits(self) -> None:
        """Refuse what can't be done to logits.

        Raises:
            ConfigError: There is such a thing.
        """
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens}; wanted 0 to max_tokens={self.max_tokens}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ConfigError(f"{name}={getattr(self, name)}; wanted -2 to 2")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty}; wanted more than 0, at most 100"
            )
        for token, bias in self.logit_bias:
            if not -100.0 <= bias <= 100.0:
                raise ConfigError(f"logit_bias of token {token} is {bias}; wanted -100 to 100")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without a draw."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def limits(self) -> bool:
        """Whether improbable tokens are left out of the draw."""
        return self.top_k > 0 or self.min_p > 0.0 or self.top_p < 1.0

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen from other logits than the model's."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.logit_bias or self.min_tokens or penalties != (0.0, 0.0, 1.0))


# --- from the API server ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """Answer a prompt.

    Attributes:
        request_id: A number never used before.
        prompt: Token ids, at least one.
        sampling: How to go on.
        adapter: Its name; None for the base model.
        cache_salt: Blocks of its prompt are shared with requests of the same salt alone.
    """

    request_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request and free what it holds; nothing more is said of it."""

    request_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadAdapter:
    """Register an adapter and load it; of a known name, make a new version.

    Attributes:
        ticket: The answer carries it.
        name: What requests will call it.
        path: Its folder, on every rank's machine.
        layout: How ranks hold it: ``bdlora``, ``half_sharded`` or ``slora``.
        wait: Answer when it is loaded or could not be; else at once, and load it when it is asked
            for.
    """

    ticket: int
    name: str
    path: str
    layout: str = "bdlora"
    wait: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class UnloadAdapter:
    """Forget an adapter, once the requests that were sent before this have ended."""

    ticket: int
    name: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Know the tokens of grammars.

    Attributes:
        key: What grammars call it.
        text: Its tokenizer, as ``tokenizer.json`` has it.
        ends: The tokens that come at a grammar's end.
    """

    key: str
    text: str
    ends: frozenset[int]


@dataclass(frozen=True, slots=True)
class Stop:
    """End the ranks; what is running is dropped."""


Command: TypeAlias = Submit | Cancel | LoadAdapter | UnloadAdapter | Vocabulary | Stop


# --- from rank 0 -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    Attributes:
        token: Its id.
        logprob: Its log-probability under the model, before temperature and truncation.
        top: The most probable tokens with theirs, most probable first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """A request got a token.

    Attributes:
        request_id: Which.
        choice: The token.
        finish: Why it was the last, if it was.
        prompt: With the first token, if it was asked for: the prompt's tokens from the second on.
        cached: With the first token: how many tokens of the prompt were in the prefix cache.
    """

    request_id: int
    choice: Choice
    finish: FinishReason | None = None
    prompt: tuple[Choice, ...] = ()
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """A request could not be answered.

    Attributes:
        request_id: Which.
        reason: Why, for the client.
        kind: The error's class.
    """

    request_id: int
    reason: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """What became of a ``LoadAdapter`` or ``UnloadAdapter``.

    Attributes:
        ticket: Whose.
        error: Why it failed; None if it did not.
        invocation_tokens: From which tokens on the loaded adapter acts; None for every token.
    """

    ticket: int
    error: str | None = None
    invocation_tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The engine in numbers, after a step."""

    running: int = 0
    queued: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    """Blocks of prompts that no request uses, kept until others need the room."""

    num_blocks: int = 0
    slots_in_use: int = 0
    num_slots: int = 0
    running_adapters: Mapping[str, int] = field(default_factory=dict)
    """Requests that run, of each adapter that has any."""

    waiting_adapters: Mapping[str, int] = field(default_factory=dict)
    """Likewise, of those that wait."""

    preemptions: int = 0
    """Requests whose cache was given to others, to be computed again; since the start."""

    prefix_cache_queries: int = 0
    """Tokens of prompts that were looked up in the prefix cache; since the start."""

    prefix_cache_hits: int = 0
    """Those that were found, and not computed."""

    steps: int = 0
    host_bytes: int = 0
    """Host memory that adapters take on one rank, loads under way included."""

    slot_hits: int = 0
    slot_loads: int = 0
    slot_evictions: int = 0
    host_loads: int = 0
    host_evictions: int = 0
    load_failures: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where adapters are, in the versions that new requests get. The others are on disk alone.

    Attributes:
        slot: Those in slots.
        host: Those in host memory, and in no slot.
        loading: Those that are being read from disk, or wait for room to be.
    """

    slot: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """All that a step gave.

    Attributes:
        events: In order; a request's tokens one after another.
        snapshot: The engine afterwards.
        places: Where adapters are; None where that is not known to have changed.
    """

    events: tuple[Token | Failed | AdapterResult, ...] = ()
    snapshot: Snapshot = Snapshot()
    places: Places | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The ranks have loaded the model.

    Attributes:
        max_model_len: The longest prompt and answer together, in tokens.
        vocab_size: Token ids end below this.
        refused: By name, why adapters of the settings are not served.
        invocation_tokens: By name, from which tokens on those act that do not act everywhere.
    """

    max_model_len: int
    vocab_size: int
    refused: Mapping[str, str] = field(default_factory=dict)
    invocation_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
