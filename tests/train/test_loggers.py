"""Trackers get every metric at its step and the settings, and a resumed run goes on in its run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from importlib.util import find_spec

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.launch import check_launch
from bdlora_megatron.train.loggers import missing_loggers, open_loggers
from bdlora_megatron.train.metrics import read_metrics
from bdlora_megatron.train.schema import LoggerSection
from bdlora_megatron.train.step import DivergedError
from tests.harness import run_ranks
from tests.train.runs import make_files, settings, train_each, train_rank

QUIET = {"progress_bar": False, "tensorboard": False, "loss_curve": False}


def _needs(name):
    return pytest.mark.skipif(
        find_spec(name) is None, reason=f"{name} is not installed; it is in the extra [{name}]"
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("loggers"))


def _config(root, folder, logger, iters=3, **changes):
    tp = {"model__tensor_model_parallel_size": 2, "train__eval_interval": 2}
    logger = {**QUIET, **logger}
    return settings(root, folder, logger=logger, **{**tp, "train__train_iters": iters, **changes})


def _logged(folder):
    """What the run's own record has, by the names that loggers give it."""
    found = {}
    for line in read_metrics(folder):
        for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
            if name in line:
                found[f"train/{name}", line["step"]] = line[name]
        if "validation_loss" in line:
            found["validation/loss", line["step"]] = line["validation_loss"]
    return found


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("wandb", {"project": "p", "mode": "offline"}),
        ("mlflow", {"tracking_uri": "file:/tmp/none", "experiment": "e"}),
    ],
)
def test_a_missing_library_is_refused_before_anything_begins(root, tmp_path, name, section):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    config = _config(root, tmp_path / "run", {name: section})
    wanted = rf"logger.{name} needs the package {name}; pip install 'bdlora-megatron\[{name}\]'"
    with pytest.raises(ConfigError, match=wanted):
        check_launch(config)
    (((refused, _),), _) = run_ranks(2, train_each, [config])
    assert f"bdlora-megatron[{name}]" in str(refused)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_a_tracker_left_is_no_library(tmp_path, monkeypatch):
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "logger.wandb needs" in missing_loggers(LoggerSection(wandb={"project": "p"}))


def _records(path):
    """The records in a file of Weights & Biases: LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2 as proto

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = proto.Record.FromString(whole), b""
            yield record


@_needs("wandb")
def test_wandb_offline(root, tmp_path):
    section = {"wandb": {"project": "blocks", "name": "poet", "mode": "offline"}}
    run_ranks(2, train_rank, _config(root, tmp_path, section))
    run_ranks(2, train_rank, _config(root, tmp_path, section, 5))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2, "one for each start, of rank 0 alone"
    logged, runs, configs, exits = {}, [], {}, []
    for path in files:
        for record in _records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
            updates = record.run.config.update if kind == "run" else record.config.update
            configs.update({u.key or u.nested_key[0]: json.loads(u.value_json) for u in updates})
            exits += [record.exit.exit_code] if kind == "exit" else []
            for item in record.history.item:
                name = item.key or item.nested_key[0]
                if "/" in name:
                    logged[name, record.history.step.num] = json.loads(item.value_json)
    assert logged == _logged(tmp_path)
    assert {step for _, step in logged} == {1, 2, 3, 4, 5}
    assert len(set(runs)) == 1
    assert runs[0][1:] == ("blocks", "poet")
    assert exits == [0, 0]
    assert configs["peft"]["bdlora"]["rank"] == 12
    assert configs["train"]["train_iters"] == 5
    assert "logger" not in configs


def _train_with_store(rank, world_size, config):
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    try:
        return train_rank(rank, world_size, config)
    except DivergedError as error:
        return error


def _store(rank, world_size, uri):
    """Metrics, parameters, tags and status of every run in a store."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client, found = MlflowClient(tracking_uri=uri), []
    experiment = client.get_experiment_by_name("blocks")
    for run in client.search_runs([experiment.experiment_id]):
        logged = {
            (name, metric.step): metric.value
            for name in run.data.metrics
            for metric in client.get_metric_history(run.info.run_id, name)
        }
        found.append((logged, run.data.params, run.data.tags, run.info.status))
    return found


@_needs("mlflow")
def test_mlflow_in_a_file_store(root, tmp_path):
    uri = f"file://{tmp_path / 'store'}"
    section = {"mlflow": {"tracking_uri": uri, "experiment": "blocks", "run_name": "poet"}}
    run_ranks(2, _train_with_store, _config(root, tmp_path / "run", section))
    run_ranks(2, _train_with_store, _config(root, tmp_path / "run", section, 5))
    wild = {"optimizer": {"lr": 1e30, "clip_grad": 0.0}}
    (error, _) = run_ranks(2, _train_with_store, _config(root, tmp_path / "wild", section, **wild))
    assert isinstance(error, DivergedError)
    (runs,) = run_ranks(1, _store, uri)
    (run,) = [run for run in runs if run[3] == "FINISHED"]
    assert sorted(run[3] for run in runs) == ["FAILED", "FINISHED"]
    logged, params, tags, _ = run
    assert logged == pytest.approx(_logged(tmp_path / "run"))
    assert {step for _, step in logged} == {1, 2, 3, 4, 5}
    assert params["peft.bdlora.rank"] == "12"
    assert params["train.train_iters"] == "3"
    assert tags["resumed.train.train_iters"] == "5"
    assert tags["mlflow.runName"] == "poet"
    assert not [name for name in params if name.startswith("logger.")]


def _lose(rank, world_size, config, folder, store):
    """What is said where a store goes away while metrics come."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    folder.mkdir()
    (tracker,) = open_loggers(folder, config, 0)
    tracker.log(1, {"train/loss": 1.0})
    shutil.rmtree(store)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("bdlora_megatron.train.loggers").addHandler(handler)
    for step in (2, 3):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close("finished")
    return said


@_needs("mlflow")
def test_a_store_that_goes_away_ends_no_run(root, tmp_path):
    store = tmp_path / "store"
    section = {"mlflow": {"tracking_uri": f"file://{store}", "experiment": "blocks"}}
    config = _config(root, tmp_path / "run", section)
    ((first, second, *_),) = run_ranks(1, _lose, config, tmp_path / "run", store)
    assert "the metrics of step 2 are lost" in first
    assert "2 records were lost in all" in second


@_needs("mlflow")
def test_a_tracker_that_refuses_is_told_on_every_rank(root, tmp_path):
    section = {"mlflow": {"tracking_uri": "nothing://here", "experiment": "blocks"}}
    each = run_ranks(2, train_each, [_config(root, tmp_path, section)])
    for ((refused, _),) in each:
        assert isinstance(refused, ConfigError)
        assert "logger.mlflow: " in str(refused)
