"""One rank's process: the model, the engine, and the loop that carries out commands and steps."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout
from bdlora_megatron.convert import load_hf_model, read_hf_config
from bdlora_megatron.errors import AdapterLoadError, BDLoRAError, MissingDependencyError
from bdlora_megatron.models.check import base_shape
from bdlora_megatron.runtime.attention import find_attention, use_attention
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.launch import join_ranks
from bdlora_megatron.serve.capacity import SlotCapacity
from bdlora_megatron.serve.engine.adapter_manager import AdapterManager
from bdlora_megatron.serve.engine.engine import ServingEngine
from bdlora_megatron.serve.engine.options import EngineOptions
from bdlora_megatron.serve.logs import configure_logging
from bdlora_megatron.serve.messages import (
    AdapterResult,
    Cancel,
    Command,
    Failed,
    LoadAdapter,
    Places,
    Ready,
    Snapshot,
    StepReport,
    Stop,
    Submit,
    Token,
    UnloadAdapter,
    Vocabulary,
)
from bdlora_megatron.serve.settings import ServeSettings
from bdlora_megatron.serve.slots import ModelSlots
from bdlora_megatron.serve.store import AdapterStore
from bdlora_megatron.serve.store_types import StoreOptions

__all__ = ["ORPHANED", "build_engine", "listen", "rank_main", "run_rank"]

logger = logging.getLogger(__name__)

Inbox: TypeAlias = "queue.SimpleQueue[Command]"

#: Exit status of a rank whose API server has gone.
ORPHANED = 3
#: How long rank 0 waits for commands before it tells its peers that there are none.
_IDLE_S = 1.0
#: How long an engine without requests waits for adapters that are being loaded.
_LOAD_WAIT_S = 0.02
#: How often rank 0 looks where adapters are.
_LOOK_S = 0.5


def rank_main(rank: int, settings: ServeSettings, store: str, link: Connection) -> None:
    """Run one rank in a process of its own, and end the process.

    Args:
        rank: Which.
        settings: The server's.
        store: A file through which the ranks find each other.
        link: To the API server; its end is the end of the rank.
    """
    # The API server decides when ranks end; a Ctrl-C reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(rank=rank)
    status = 1
    # Before anything that waits for the other ranks: the API server may die before they are there.
    inbox = listen(link, store)
    try:
        join_ranks(
            rank,
            settings.tensor_parallel_size,
            store,
            cpu=settings.cpu,
            interface=settings.interface,
            timeout=timedelta(seconds=settings.rank_timeout_s),
        )
        run_rank(settings, link, inbox)
        status = 0
    except BDLoRAError as error:
        logger.critical("rank %d: %s", rank, error)
    except Exception:
        logger.critical("rank %d failed:\n%s", rank, traceback.format_exc())
    # Skips the interpreter's tear-down: gloo's threads can hang there once a peer has failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def listen(link: Connection, store: str | None = None) -> Inbox:
    """Take commands as they come, in a thread; the end of the link is the end of the process.

    Args:
        link: To the API server.
        store: What the API server would have removed in the end, with the folder made for it.
    """
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(link, inbox, store), daemon=True, name="link").start()
    return inbox


def run_rank(settings: ServeSettings, link: Connection, inbox: Inbox) -> None:
    """Serve until a ``Stop`` comes; the default process group exists already.

    Args:
        settings: The server's.
        link: To the API server. Rank 0 takes commands from it and reports to it; the others only
            watch it.
        inbox: What ``listen`` made of it.

    Raises:
        AdapterLoadError: ``strict_adapters``, and some of ``adapters`` would be refused.
        BDLoRAError: Model, adapters or sizes are wrong.

    Collectives: each round, one broadcast of the commands from rank 0 (two, where there are any);
    and those of ``ServingEngine.step``.
    """
    if settings.cpu:
        enable_cpu_inference()
    groups = runtime.model_parallel(settings.tensor_parallel_size, cuda_graphs=settings.cuda_graphs)
    with groups, torch.inference_mode():
        control = torch.distributed.new_group(
            backend="gloo", timeout=timedelta(seconds=settings.rank_timeout_s)
        )
        engine, manager = build_engine(settings, control)
        checked = manager.check(settings.adapters, settings.layout, control)
        refused = checked.refused
        if refused and settings.strict_adapters:
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
            raise AdapterLoadError(f"strict_adapters, and {len(refused)} are refused: {reasons}")
        served = {n: path for n, path in settings.adapters.items() if n not in refused}
        for ticket, (name, path) in enumerate(served.items(), start=1):
            answer = manager.load(
                LoadAdapter(
                    ticket=-ticket, name=name, path=path, layout=settings.layout, wait=False
                )
            )
            if answer is not None and answer.error is not None:
                raise BDLoRAError(f"adapter {name!r}: {answer.error}")
        chief = torch.distributed.get_rank() == 0
        torch.distributed.barrier(group=control)
        if chief:
            link.send(
                Ready(
                    max_model_len=settings.max_model_len,
                    vocab_size=engine.vocab_size,
                    refused=refused,
                    invocation_tokens=checked.invocation_tokens,
                )
            )
        _Loop(engine, manager, control, inbox, link if chief else None).run()


def build_engine(settings: ServeSettings, control: Any) -> tuple[ServingEngine, AdapterManager]:
    """The model in its slots, the store around it, the engine around both.

    Args:
        settings: The server's.
        control: A gloo group of all ranks, for the store's agreements.
    """
    # Before the model, which takes minutes to load: it may be refused.
    attention = None if settings.cpu else find_attention(block_size=settings.block_size)
    model = _load_model(settings, {} if attention is None else attention.settings)
    if attention is not None:
        use_attention(attention, model.config.params_dtype)
    slots = ModelSlots(
        model.eval(),
        SlotCapacity(
            max_loras=settings.max_loras,
            max_lora_rank=settings.max_lora_rank,
            lora_memory_bytes=settings.lora_memory_bytes,
            # All adapters are held in the one; pools for others would stay empty.
            layouts=(Layout(settings.layout),),
        ),
    )
    host = StoreOptions(host_cache_bytes=settings.host_cache_bytes)
    store = AdapterStore(slots, host, group=control)
    # Its fields are called as the settings are.
    options = EngineOptions(**{f.name: getattr(settings, f.name) for f in fields(EngineOptions)})
    engine = ServingEngine(model, store, options)
    return engine, AdapterManager(engine, store, base_shape(read_hf_config(settings.model)))


def _load_model(settings: ServeSettings, more: Mapping[str, Any]) -> Any:
    """The base model, its configuration as the settings and ``more`` say."""
    captured = {"cuda_graph_impl": "local"} if settings.cuda_graphs else {}
    return load_hf_model(
        settings.model,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        max_sequence_length=settings.max_model_len,
        settings={**captured, **more},
        layer_spec=_layer_spec(settings),
        model_class=settings.model_class,
        for_serving=True,
    )


def _layer_spec(settings: ServeSettings) -> ModuleSpec:
    """Megatron-Core's own layers, or Transformer Engine's where the settings ask for them.

    Raises:
        MissingDependencyError: They ask for Transformer Engine, and it is not installed.
    """
    qk_norm = read_hf_config(settings.model).qk_norm
    if settings.layers == "megatron":
        return get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    if importlib.util.find_spec("transformer_engine") is None:
        raise MissingDependencyError(
            "layers='transformer_engine' needs Transformer Engine, which is not installed; "
            "pip install 'bdlora-megatron[te]', or leave layers out"
        )
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)


def _receive(link: Connection, inbox: Inbox, store: str | None) -> None:
    """Take commands as they come; without an API server there is nothing to live for."""
    while True:
        try:
            inbox.put(link.recv())
        except (EOFError, OSError):
            if store is not None:
                _remove(Path(store))
            # Wherever the main thread is, perhaps in a collective that will never end.
            os._exit(ORPHANED)


def _remove(store: Path) -> None:
    """The file and its folder, unless there is more in it; other ranks may do the same."""
    with suppress(OSError):
        store.unlink(missing_ok=True)
        store.parent.rmdir()


class _Loop:
    """Commands, then a step, for ever."""

    def __init__(
        self,
        engine: ServingEngine,
        manager: AdapterManager,
        control: Any,
        inbox: Inbox,
        link: Connection | None,
    ) -> None:
        self._engine = engine
        self._manager = manager
        self._control = control
        self._inbox = inbox
        self._link = link
        self._told = Snapshot()
        self._places, self._looked_s = Places(), 0.0

    def run(self) -> None:
        while True:
            commands = self._commands()
            if any(isinstance(command, Stop) for command in commands):
                return
            events: list[Token | Failed | AdapterResult] = []
            for command in commands:
                events += self._carry_out(command)
            events += self._engine.step(wait_s=_LOAD_WAIT_S)
            events += self._manager.settle()
            self._report(events)

    def _commands(self) -> list[Command]:
        """The commands of this round, the same on every rank."""
        commands = list(self._drain()) if self._link is not None else []
        if self._control.size() > 1:
            # An empty round sends one number; commands follow only where there are any.
            count = torch.tensor([len(commands)])
            torch.distributed.broadcast(count, 0, group=self._control)
            if int(count):
                shared: list[Any] = [commands]
                torch.distributed.broadcast_object_list(shared, 0, group=self._control)
                commands = shared[0]
        return commands

    def _drain(self) -> Iterable[Command]:
        busy = self._engine.has_work or self._manager.is_waiting
        try:
            yield self._inbox.get(block=not busy, timeout=None if busy else _IDLE_S)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _carry_out(self, command: Command) -> list[Failed | AdapterResult]:
        answer: Failed | AdapterResult | None = None
        if isinstance(command, Submit):
            try:
                self._engine.submit(command)
            except BDLoRAError as error:
                answer = Failed(command.request_id, str(error), type(error).__name__)
        elif isinstance(command, Cancel):
            self._engine.cancel(command.request_id)
        elif isinstance(command, LoadAdapter):
            answer = self._manager.load(command)
        elif isinstance(command, UnloadAdapter):
            answer = self._manager.unload(command)
        elif isinstance(command, Vocabulary):
            self._engine.learn(command)
        return [] if answer is None else [answer]

    def _report(self, events: list[Token | Failed | AdapterResult]) -> None:
        if self._link is None:
            return
        snapshot = self._engine.snapshot()
        places = self._changed_places(any(isinstance(event, AdapterResult) for event in events))
        if events or snapshot != self._told or places is not None:
            self._told = snapshot
            self._link.send(StepReport(events=tuple(events), snapshot=snapshot, places=places))

    def _changed_places(self, at_once: bool) -> Places | None:
        """Where adapters are, if they moved; there may be many, so not every step looks."""
        now_s = time.monotonic()
        if not at_once and now_s - self._looked_s < _LOOK_S:
            return None
        self._looked_s, before = now_s, self._places
        self._places = self._engine.places()
        return None if self._places == before else self._places
