"""Where metrics go besides the run's folder: TensorBoard, Weights & Biases, MLflow.

Each is spoken to through its own library, on one rank. A run that goes on from a checkpoint goes on
in the same run of its trackers, whose names are kept in the run's folder.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.config import flat, to_mapping
from bdlora_megatron.train.schema import LoggerSection, MlflowSection, TrainConfig, WandbSection

__all__ = ["Logger", "Outcome", "missing_loggers", "open_loggers"]

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["finished", "killed", "failed"]

_IDS = "loggers.json"
#: MLflow's largest number of parameters in a request.
_BATCH = 100


class Logger(Protocol):
    """One place that metrics go to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers by name, after ``step`` steps."""

    def close(self, outcome: Outcome) -> None:
        """Note how the run ended, and send what is left."""


def missing_loggers(settings: LoggerSection) -> str | None:
    """Which extras the loggers lack; imports nothing.

    Args:
        settings: Which loggers are wanted.

    Returns:
        A sentence, or None where all is there.
    """
    wanted = {
        "tensorboard": (settings.tensorboard, "train", "tensorboard=false"),
        "wandb": (settings.wandb is not None, "wandb", "wandb=null"),
        "mlflow": (settings.mlflow is not None, "mlflow", "mlflow=null"),
    }
    missing = [
        f"logger.{name} needs the package {name}; pip install 'bdlora-megatron[{extra}]', or set "
        f"logger.{off}"
        for name, (asked, extra, off) in wanted.items()
        if asked and not _is_installed(name)
    ]
    return "\n".join(missing) or None


def open_loggers(folder: Path, config: TrainConfig, steps_done: int) -> list[Logger]:
    """Begin, or go on in, every logger that the settings name.

    Args:
        folder: The run's folder.
        config: The run's settings, which the trackers get too.
        steps_done: Steps of the checkpoint that the run goes on from.

    Returns:
        The loggers.

    Raises:
        ConfigError: A tracker refuses, or cannot be reached.
    """
    settings = config.logger
    known = {key: value for key, value in to_mapping(config).items() if key != "logger"}
    ids = _Ids(folder / _IDS)
    loggers: list[Logger] = []
    try:
        if settings.tensorboard:
            loggers.append(_TensorBoard(folder, steps_done))
        if settings.wandb is not None:
            loggers.append(_Wandb(folder, settings.wandb, known, ids))
        if settings.mlflow is not None:
            loggers.append(_Mlflow(settings.mlflow, known, ids))
    except ConfigError:
        for begun in loggers:
            begun.close("failed")
        raise
    return loggers


def _is_installed(name: str) -> bool:
    # A folder of this name, as trackers leave behind, passes for a package without a file.
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


class _Ids:
    """The trackers' runs that belong to a folder, by where they are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, str] = dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            self._known = {}
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; remove it") from error

    def get(self, *place: str) -> str | None:
        return self._known.get(" ".join(place))

    def keep(self, run: str, *place: str) -> None:
        self._known[" ".join(place)] = run
        unfinished = self._path.with_name(f"{self._path.name}.unfinished")
        unfinished.write_text(json.dumps(self._known, indent=1), "utf-8")
        os.replace(unfinished, self._path)


class _TensorBoard:
    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, outcome: Outcome) -> None:
        del outcome
        self._writer.close()


class _Wandb:
    def __init__(
        self, folder: Path, settings: WandbSection, known: Mapping[str, Any], ids: _Ids
    ) -> None:
        import wandb

        run = ids.get("wandb", settings.project)
        try:
            self._run = wandb.init(
                project=settings.project,
                name=settings.name,
                mode=settings.mode,
                dir=str(folder),
                id=run,
                resume=None if run is None else "allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ConfigError(f"logger.wandb: {error}") from error
        # A run that goes on may have other steps to do, or more ranks.
        self._run.config.update(dict(known), allow_val_change=True)
        if settings.mode != "disabled":
            ids.keep(self._run.id, "wandb", settings.project)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class _Mlflow:
    def __init__(self, settings: MlflowSection, known: Mapping[str, Any], ids: _Ids) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._lost = 0
        place = ("mlflow", settings.tracking_uri, settings.experiment)
        run = ids.get(*place)
        try:
            self._client = MlflowClient(tracking_uri=settings.tracking_uri)
            if run is None:
                run = self._client.create_run(
                    self._experiment(settings.experiment), run_name=settings.run_name
                ).info.run_id
                ids.keep(run, *place)
            else:
                self._client.update_run(run, status="RUNNING")
            self._run = run
            self._describe({key: str(value) for key, value in flat(known).items()})
        except MlflowException as error:
            raise ConfigError(f"logger.mlflow: {error}") from error

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        made: str = self._client.create_experiment(name) if found is None else found.experiment_id
        return made

    def _describe(self, settings: Mapping[str, str]) -> None:
        """Log the settings; those that differ from an earlier part's become tags."""
        from mlflow.entities import Param, RunTag

        before = self._client.get_run(self._run).data.params
        new = [Param(key, value) for key, value in settings.items() if key not in before]
        changed = [
            RunTag(f"resumed.{key}", value)
            for key, value in settings.items()
            if key in before and before[key] != value
        ]
        for start in range(0, max(len(new), len(changed)), _BATCH):
            some = slice(start, start + _BATCH)
            self._client.log_batch(self._run, params=new[some], tags=changed[some])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        try:
            self._client.log_batch(self._run, metrics=metrics)
        except Exception as error:
            # Stores raise what they like. The run's own folder has the metrics, and hours of
            # training are worth more than a copy of them.
            if not self._lost:
                logger.warning("logger.mlflow: the metrics of step %d are lost: %s", step, error)
            self._lost += 1

    def close(self, outcome: Outcome) -> None:
        if self._lost:
            logger.warning("logger.mlflow: %d records were lost in all", self._lost)
        try:
            self._client.set_terminated(self._run, status=outcome.upper())
        except Exception as error:
            logger.warning("logger.mlflow: the run's end could not be noted: %s", error)
