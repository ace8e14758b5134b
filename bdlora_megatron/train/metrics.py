"""What a run tells: progress and losses on the terminal, a file, loggers, a loss curve."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bdlora_megatron.errors import MissingDependencyError
from bdlora_megatron.train.loggers import Outcome, open_loggers
from bdlora_megatron.train.schema import LoggerSection, TrainConfig
from bdlora_megatron.train.step import StepResult
from bdlora_megatron.train.stop import PreemptedError

__all__ = ["Report", "read_metrics"]

METRICS = "metrics.jsonl"
LOSS_CURVE = "loss.png"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Every line of a run's ``metrics.jsonl``: what each step and each evaluation gave."""
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    # A process that was killed may have left half a line at the end.
    complete = path.read_text("utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.split("\n") if line]


class Report:
    """The record of one run; on one rank only."""

    def __init__(self, folder: Path, config: TrainConfig, *, steps_done: int) -> None:
        """Go on with the record of the steps done.

        Args:
            folder: The run's folder.
            config: The run's settings.
            steps_done: Steps of the checkpoint that the run goes on from.

        Raises:
            ConfigError: A logger refuses.
            MissingDependencyError: The package of a logger or of the loss curve is not installed.
        """
        settings, steps = config.logger, config.steps
        self._folder, self._settings, self._steps = folder, settings, steps
        folder.mkdir(parents=True, exist_ok=True)
        if settings.loss_curve:
            _import_pyplot()
        # What was done after the checkpoint is done again.
        kept = [line for line in read_metrics(folder) if line["step"] <= steps_done]
        unfinished = folder / f"{METRICS}.unfinished"
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        os.replace(unfinished, folder / METRICS)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._bar = _progress_bar(settings, steps_done, steps)
        self._loggers = open_loggers(folder, config, steps_done)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del error, trace
        self._file.close()
        self._bar.close()
        for logger in self._loggers:
            logger.close(_outcome(kind))

    def step(self, step: int, result: StepResult, tokens_per_second: float) -> None:
        """Note a step.

        Args:
            step: Steps done, this one included.
            result: What it gave.
            tokens_per_second: Of all ranks together, prompts and padding included.
        """
        metrics = {
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens_per_second,
        }
        self._write({"step": step, "tokens": result.tokens, **metrics})
        self._bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
        self._bar.update()
        if step % self._settings.log_interval and step != self._steps:
            return
        self.say(
            f"step {step}/{self._steps}  loss {result.loss:.4f}  lr {result.lr:.2e}  "
            + ("" if result.grad_norm is None else f"gradient {result.grad_norm:.3f}  ")
            + f"{tokens_per_second:,.0f} tokens/s"
        )
        self._log(step, {f"train/{name}": value for name, value in metrics.items()})

    def evaluation(self, step: int, loss: float, best_step: int | None = None) -> None:
        """Note an evaluation.

        Args:
            step: Steps done.
            loss: The mean loss on the validation data.
            best_step: Steps done at the lowest one so far; None where nobody compares them.
        """
        compared = {} if best_step is None else {"best_step": best_step}
        self._write({"step": step, "validation_loss": loss, **compared})
        mark = "  lowest so far" if best_step == step else ""
        self.say(f"step {step}/{self._steps}  validation loss {loss:.4f}{mark}")
        self._log(step, {"validation/loss": loss})

    def say(self, line: str) -> None:
        """Print a line without tearing the progress bar."""
        self._bar.write(line)

    def draw(self) -> None:
        """Draw the loss curve of the whole run, earlier parts included."""
        if not self._settings.loss_curve:
            return
        lines = read_metrics(self._folder)
        pyplot = _import_pyplot()
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name, style in (("loss", "-"), ("validation_loss", "o--")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
        axes.set(xlabel="step", ylabel="loss per token")
        if lines:
            axes.legend()
        unfinished = self._folder / f".{LOSS_CURVE}"
        figure.savefig(unfinished, dpi=150, format="png")
        pyplot.close(figure)
        os.replace(unfinished, self._folder / LOSS_CURVE)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _log(self, step: int, values: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        for logger in self._loggers:
            logger.log(step, known)


def _outcome(error: type[BaseException] | None) -> Outcome:
    if error is None:
        return "finished"
    return "killed" if issubclass(error, PreemptedError | KeyboardInterrupt) else "failed"


def _progress_bar(settings: LoggerSection, done: int, steps: int) -> Any:
    from tqdm import tqdm

    hidden = not settings.progress_bar
    return tqdm(initial=done, total=steps, desc="train", unit="step", disable=hidden)


def _import_pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError(
            f"logger.loss_curve needs matplotlib ({error}); pip install "
            "'bdlora-megatron[train]', or set logger.loss_curve=false"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
