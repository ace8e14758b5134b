"""Loading and unloading adapters while the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import open_adapter
from bdlora_megatron.convert.adapter import BaseShape
from bdlora_megatron.errors import BDLoRAError, explain
from bdlora_megatron.serve.adapter_files import AdapterFiles
from bdlora_megatron.serve.engine.engine import ServingEngine
from bdlora_megatron.serve.messages import AdapterResult, LoadAdapter, UnloadAdapter
from bdlora_megatron.serve.store import AdapterStore
from bdlora_megatron.serve.store_types import AdapterKey

__all__ = ["AdapterManager", "Checked"]


@dataclass(frozen=True, slots=True)
class _Held:
    files: AdapterFiles
    layout: Layout


@dataclass(frozen=True, slots=True)
class Checked:
    """What a look at adapters told.

    Attributes:
        refused: By name, why an adapter can't be served; in the order of the settings.
        invocation_tokens: By name, from which tokens on those act that do not act everywhere.
    """

    refused: dict[str, str]
    invocation_tokens: dict[str, tuple[int, ...]]


class AdapterManager:
    """Carries out ``LoadAdapter`` and ``UnloadAdapter``; the same on every rank.

    Collectives: none of its own; what is loading is agreed on by ``AdapterStore.advance``.
    """

    def __init__(
        self, engine: ServingEngine, store: AdapterStore, base: BaseShape | None = None
    ) -> None:
        """Start with what the store has.

        Args:
            engine: The engine.
            store: Its adapters.
            base: The base model, for adapters on fused projections that do not tell its heads.
        """
        self._engine = engine
        self._base = base
        self._store = store
        self._held: dict[str, _Held] = {}
        # Whose load is awaited: ticket, version, and what the name stood for before.
        self._loading: dict[str, tuple[int, AdapterKey, _Held | None]] = {}
        self._leaving: dict[str, int] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is still owed."""
        return bool(self._loading or self._leaving)

    def check(self, folders: Mapping[str, str], layout: str, group: Any) -> Checked:
        """Look at adapters before they are served, as far as configs and headers tell.

        Args:
            folders: By name; the same on every rank.
            layout: How ranks will hold them.
            group: The ranks, over gloo, which share the work.

        Collectives: one exchange of the reasons (``all_gather_object``: two all-gathers).
        """
        mine = Checked({}, {})
        for name in list(folders)[group.rank() :: group.size()]:
            try:
                with open_adapter(folders[name], base=self._base) as adapter:
                    self._store.slots.check(adapter, Layout(layout))
                    if adapter.invocation_tokens is not None:
                        mine.invocation_tokens[name] = adapter.invocation_tokens
            except Exception as error:
                # Whatever it is, a first request would meet it too.
                told = explain(error, Path(folders[name]))
                foreseen = isinstance(error, (BDLoRAError, OSError))
                mine.refused[name] = told if foreseen else f"{type(error).__name__}: {told}"
        every: list[Any] = [mine]
        if group.size() > 1:
            every = [None] * group.size()
            torch.distributed.all_gather_object(every, mine, group=group)
        refused = {name: reason for part in every for name, reason in part.refused.items()}
        return Checked(
            refused={name: refused[name] for name in folders if name in refused},
            invocation_tokens={n: t for part in every for n, t in part.invocation_tokens.items()},
        )

    def load(self, command: LoadAdapter) -> AdapterResult | None:
        """Register an adapter, and begin to load it where the command waits for that.

        Returns:
            The answer, if it is known at once; else ``settle`` gives it.
        """
        name = command.name
        if name in self._loading or name in self._leaving:
            return AdapterResult(
                command.ticket, f"adapter {name!r} is being loaded or unloaded; try later"
            )
        try:
            held = _Held(AdapterFiles(Path(command.path), name, self._base), Layout(command.layout))
            key = self._register(name, held)
        except (BDLoRAError, ValueError) as error:
            return AdapterResult(command.ticket, str(error))
        before = self._held.get(name)
        self._held[name] = held
        if not command.wait:
            return AdapterResult(command.ticket)
        self._store.prefetch(key)
        self._loading[name] = (command.ticket, key, before)
        return None

    def unload(self, command: UnloadAdapter) -> AdapterResult | None:
        """Let an adapter go as soon as no request of it waits or runs.

        Returns:
            As for ``load``.
        """
        name = command.name
        if name not in self._held:
            return AdapterResult(command.ticket, f"no adapter is called {name!r}")
        if name in self._loading or name in self._leaving:
            return AdapterResult(
                command.ticket, f"adapter {name!r} is being loaded or unloaded; try later"
            )
        self._leaving[name] = command.ticket
        return None

    def settle(self) -> list[AdapterResult]:
        """What has become of loads and unloads since the last step."""
        return [*self._settle_loads(), *self._settle_leaving()]

    def _settle_loads(self) -> list[AdapterResult]:
        answers = []
        for name, (ticket, key, before) in list(self._loading.items()):
            if self._store.is_loading(key):
                continue
            error = self._store.error(key)
            del self._loading[name]
            invocation = None
            if error is not None:
                self._put_back(name, before)
            else:
                invocation = self._store.invocation_tokens(key)
            answers.append(AdapterResult(ticket, error, invocation))
        return answers

    def _put_back(self, name: str, before: _Held | None) -> None:
        """After a load that failed, let the name stand for what it stood for."""
        if before is None:
            del self._held[name]
            self._store.unregister(name)
        else:
            self._held[name] = before
            self._register(name, before)

    def _register(self, name: str, held: _Held) -> AdapterKey:
        files = held.files
        return self._store.register(name, files.read, layout=held.layout, check=files.check)

    def _settle_leaving(self) -> list[AdapterResult]:
        answers = []
        for name, ticket in list(self._leaving.items()):
            if not self._engine.uses(name):
                del self._leaving[name]
                del self._held[name]
                self._store.unregister(name)
                answers.append(AdapterResult(ticket))
        return answers
