"""A run from its settings to its adapter, on every rank of a process group."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.export import main_weights, write_peft_folders
from bdlora_megatron.layers import collect_adapter
from bdlora_megatron.models import read_hf_config
from bdlora_megatron.models.check import base_shape
from bdlora_megatron.runtime import from_first_rank, model_parallel, refuse_together
from bdlora_megatron.train.best import BEST_ADAPTER, Best, write_best
from bdlora_megatron.train.chats import ChatOptions
from bdlora_megatron.train.checkpoint import (
    Saver,
    checkpoints,
    load_checkpoint,
    read_facts,
)
from bdlora_megatron.train.config import in_steps
from bdlora_megatron.train.corpus import Corpus, Storage, read_examples
from bdlora_megatron.train.data import Batch, RowDataset, ShareOfBatch, check_invocation
from bdlora_megatron.train.examples import Documents, load_tokenizer
from bdlora_megatron.train.loggers import missing_loggers
from bdlora_megatron.train.metrics import Report
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.rag import RagOptions
from bdlora_megatron.train.resume import check_resumable, run_facts, weights_digest
from bdlora_megatron.train.schema import TrainConfig
from bdlora_megatron.train.start import load_start, start_digest
from bdlora_megatron.train.step import Stepper, mean_loss
from bdlora_megatron.train.stop import PreemptedError, StopRequest

__all__ = ["ADAPTER", "DENSE_ADAPTER", "RunResult", "train"]

ADAPTER, DENSE_ADAPTER = "adapter", "adapter-dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended; the same on every rank.

    Attributes:
        steps: Steps done in all.
        validation_loss: The last evaluation's; None without validation data.
        exported: PEFT folders that were written.
        best_validation_loss: The lowest of all evaluations between steps; None without any.
        best_step: Steps done at that one.
        stopped_early: Whether it ended before its last step (``train.early_stopping_patience``).
    """

    steps: int
    validation_loss: float | None
    exported: tuple[Path, ...]
    best_validation_loss: float | None = None
    best_step: int | None = None
    stopped_early: bool = False


def train(config: TrainConfig) -> RunResult:
    """Train, evaluate, save and export as the settings say.

    Every rank calls this, in one process group that it has joined or that torchrun's environment
    describes. Without CUDA, call ``runtime.enable_cpu`` first.

    Args:
        config: The settings.

    Returns:
        How it ended.

    Raises:
        ConfigError: The settings don't fit the number of ranks, the data or the checkpoint; nothing
            was changed.
        DivergedError: The loss is no longer finite; the last checkpoint is still good.
        PreemptedError: A rank was sent SIGTERM between the first step and the last; all ranks have
            saved the step they had reached.
    """
    model = config.model
    with model_parallel(
        model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vp=model.chunks_per_stage,
        cp=model.context_parallel_size,
    ) as where:
        del where
        with _folder_lock(Path(config.checkpoint.save)):
            return _Run(config).run()


class _Run:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        refuse_together(missing_loggers(config.logger))
        self.folder = Path(config.checkpoint.save)
        self.share = _share(config)
        tokenizer = load_tokenizer(config.model.hf_path)
        vocab_size = read_hf_config(config.model.hf_path).vocab_size
        self.examples = _examples(config, tokenizer, config.dataset.train, vocab_size)
        self.told = check_invocation(self.examples, config.peft.invocation_tokens)
        self.rows = _rows(config, self.examples, shuffled=True)
        self.config = in_steps(config, len(self.rows))
        validation = _examples(config, tokenizer, config.dataset.validation, vocab_size)
        self.validation = _rows(config, validation, shuffled=False)
        self.model, self.hf = build_model(config)
        self.steps_done = 0
        self.report: Report | None = None
        self.best = Best()

    def run(self) -> RunResult:
        if self.config.peft.scheme == "none":
            return self._evaluate_base()
        stepper = Stepper(self.model, self.config)
        weights = weights_digest(self.config.model.hf_path, self.hf)
        start = start_digest(self.config, self.hf)
        facts = run_facts(self.config, self.hf, self.examples, weights=weights, start=start)
        self._resume(stepper, facts)
        if not self.steps_done:
            self.told += load_start(self.model, self.config, self.hf)
        with self._reporting():
            with StopRequest() as stop, self._saver() as saver:
                loss = self._steps(stepper, facts, stop, saver)
            if self.report is not None:
                self.report.draw()
            wanted = {ADAPTER: self.config.export.peft, DENSE_ADAPTER: self.config.export.dense}
            exported = self._export(*(name for name, asked in wanted.items() if asked))
            if self.config.checkpoint.keep_best and self.best.loss is not None:
                exported += (self.folder / BEST_ADAPTER,)
        return RunResult(
            steps=self.steps_done,
            validation_loss=loss,
            exported=exported,
            best_validation_loss=self.best.loss,
            best_step=None if self.best.loss is None else self.best.step,
            stopped_early=self.steps_done < self.config.steps,
        )

    def _evaluate_base(self) -> RunResult:
        loss = mean_loss(self.model, self._validation_batches(), self.config)
        with self._reporting():
            if self.report is not None:
                self.report.evaluation(0, loss)
        return RunResult(steps=0, validation_loss=loss, exported=())

    def _resume(self, stepper: Stepper, facts: dict[str, Any]) -> None:
        found = checkpoints(self.folder)
        if not found:
            return
        step, path = found[-1]
        if not self.config.checkpoint.resume:
            raise ConfigError(
                f"{self.folder} holds checkpoints up to step {step}; set checkpoint.resume=true to "
                "go on, or name another folder in checkpoint.save"
            )
        saved = read_facts(path)
        check_resumable(saved, facts, str(path))
        self.steps_done = load_checkpoint(path, stepper)
        self._restore_best(Best.of_checkpoint(saved), dict(found))
        if self.steps_done > self.config.steps:
            raise ConfigError(
                f"{path} has {self.steps_done} steps behind it, more than train.train_iters="
                f"{self.config.steps}; raise it, or name another folder"
            )

    def _restore_best(self, best: Best, found: dict[int, Path]) -> None:
        if self.config.checkpoint.keep_best and best.loss is not None:
            kept = found.get(best.step)
            if kept is None:
                # It was not asked for before: the next evaluation is the first that is kept.
                best.loss, best.step = None, 0
            else:
                from_first_rank(lambda: write_best(kept, self.config.model.hf_path))
        self.best = best

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        def begin() -> None:
            self.report = Report(self.folder, self.config, steps_done=self.steps_done)

        from_first_rank(begin)
        if self.report is None:
            yield
            return
        with self.report:
            for line in (self._summary(), *self.told):
                self.report.say(line)
            yield

    def _summary(self) -> str:
        ranks = torch.distributed.get_world_size()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        resumed = f"; resumed after step {self.steps_done}" if self.steps_done else ""
        return (
            f"{self.config.peft.scheme}: {trained:,} parameters trained on this rank of {ranks}; "
            f"{len(self.examples)} examples{resumed}"
        )

    def _saver(self) -> Saver:
        settings = self.config.checkpoint
        return Saver(self.folder, keep=settings.keep, background=settings.async_save)

    def _steps(
        self, stepper: Stepper, facts: dict[str, Any], stop: StopRequest, saver: Saver
    ) -> float | None:
        settings, checkpoint = self.config.train, self.config.checkpoint
        rows, steps = self.rows, self.config.steps
        loss = None
        for step in range(self.steps_done, steps):
            if self.best.why_stop(settings):
                break
            started = time.perf_counter()
            batches = [
                rows.batch([rows.in_training_order(number) for number in numbers])
                for numbers in self.share.numbers(step)
            ]
            result = stepper.train_step(step, batches)
            self.steps_done, last = step + 1, step + 1 == steps
            if self.report is not None:
                tokens = settings.global_batch_size * self.config.model.seq_length
                seconds = time.perf_counter() - started
                self.report.step(self.steps_done, result, tokens / seconds)
            stopping, improved = stop.agreed(), False
            if not stopping and _due(self.steps_done, settings.eval_interval, last=last):
                loss = self._evaluate()
                improved = self._keep_best()
                last = last or self.best.why_stop(settings) is not None
                stopping = stop.agreed()
            if stopping or improved or _due(self.steps_done, checkpoint.save_interval, last=last):
                best = self.best.step if checkpoint.keep_best else None
                saver.save(self.steps_done, stepper, {**facts, **self.best.facts()}, spare=best)
            else:
                saver.poll()
            if stopping:
                saver.wait()
                raise PreemptedError(
                    f"stopped by SIGTERM and saved after step {self.steps_done} of "
                    f"{steps}; the same command goes on from there"
                )
        if self.report is not None and self.steps_done < steps:
            self.report.say(f"stopped after step {self.steps_done}: {self.best.why_stop(settings)}")
        # A finished run that is started again tells its result again.
        return self._evaluate() if loss is None else loss

    def _evaluate(self) -> float | None:
        if not len(self.validation):
            return None
        own = mean_loss(self.model, self._validation_batches(), self.config)
        # Ranks end a run together by what they see: the last bit must not differ.
        loss = from_first_rank(lambda: own)
        self.best.note(self.steps_done, loss, self.config.train)
        if self.report is not None:
            self.report.evaluation(self.steps_done, loss, self.best.step)
        return loss

    def _keep_best(self) -> bool:
        """Write the adapter if this step's evaluation is the lowest so far; whether it is."""
        improved = self.config.checkpoint.keep_best and self.best.step == self.steps_done
        if improved:
            self._export(BEST_ADAPTER)
        return improved

    def _validation_batches(self) -> list[Batch]:
        """This rank's share; empty rows where the data doesn't fill a batch."""
        size, rows = self.config.train.global_batch_size, len(self.validation)
        batches = -(-rows // size)
        if self.config.train.eval_iters:
            batches = min(batches, self.config.train.eval_iters)
        return [
            self.validation.batch([row if row < rows else None for row in numbers])
            for step in range(batches)
            for numbers in self.share.numbers(step)
        ]

    def _export(self, *names: str) -> tuple[Path, ...]:
        folders = {self.folder / name: name == DENSE_ADAPTER for name in names}
        if folders:
            with main_weights(self.model):
                adapter = collect_adapter(self.model, self.folder.name, base_shape(self.hf))
            write_peft_folders(adapter, folders, base_model=self.config.model.hf_path)
        return tuple(folders)


def _due(step: int, interval: int, *, last: bool) -> bool:
    return last or bool(interval and step % interval == 0)


def _share(config: TrainConfig) -> ShareOfBatch:
    return ShareOfBatch(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        multiple=config.model.microbatch_multiple,
    )


def _examples(
    config: TrainConfig, tokenizer: Any, paths: tuple[str, ...], vocab_size: int
) -> Corpus:
    dataset = config.dataset
    documents = Documents(
        tokenizer,
        dataset.format,
        vocab_size=vocab_size,
        chats=ChatOptions(
            train_on=dataset.train_on,
            template_kwargs=dataset.chat_template_kwargs,
            ignore_keys=dataset.ignore_keys,
        ),
        rag=RagOptions(
            document=dataset.rag.document,
            prompt=dataset.rag.prompt,
            seq_length=config.model.seq_length if dataset.too_long == "truncate" else None,
        ),
    )
    return read_examples(
        paths,
        documents,
        seq_length=config.model.seq_length,
        too_long=dataset.too_long,
        storage=Storage(
            cache_dir=dataset.cache_dir,
            num_proc=dataset.num_proc,
            progress=config.logger.progress_bar and torch.distributed.get_rank() == 0,
        ),
    )


def _rows(config: TrainConfig, examples: Corpus, *, shuffled: bool) -> RowDataset:
    return RowDataset(
        examples,
        config.model.seq_length,
        packing=config.dataset.packing,
        seed=config.rng.seed if shuffled else 0,
        cp_size=config.model.context_parallel_size,
        invocation_tokens=config.peft.invocation_tokens,
    )


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process that holds it.

    Raises:
        ConfigError: Another run holds the folder, or it can't be written.
    """
    problem = None
    handle = -1
    if torch.distributed.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another run writes into {folder}; wait for it, or name another folder"
        except OSError as error:
            problem = f"cannot write into {folder}: {error.strerror}; name another folder"
    try:
        refuse_together(problem)
        yield
    finally:
        if handle >= 0:
            os.close(handle)
