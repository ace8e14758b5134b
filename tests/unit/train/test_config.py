"""Settings: every problem is told at once, with the nearest name."""

from __future__ import annotations

import copy

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train import from_mapping, load_config, to_mapping
from bdlora_megatron.train.config import in_steps

GOOD = {
    "model": {"hf_path": "base"},
    "dataset": {"train": "a.jsonl"},
    "train": {"train_iters": 10},
    "checkpoint": {"save": "run"},
    "peft": {"bdlora": {"num_blocks": 4}},
}

YAML = """
model: {hf_path: base, tensor_model_parallel_size: 2}
dataset: {train: [a.jsonl, b.jsonl]}
train: {train_iters: 10}
optimizer: {lr: 1e-3}
checkpoint: {save: "runs/${model.hf_path}"}
peft: {bdlora: {num_blocks: 4}}
"""


def changed(**changes):
    values = copy.deepcopy(GOOD)
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return values


def problems(values):
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(lines)} problem(s) in the training settings:"
    return [line.removeprefix("- ") for line in lines]


def test_yaml_with_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    config = load_config(path, ["peft.bdlora.rank=8", "dataset.train=c.jsonl", "optimizer.lr=2"])
    assert config.peft.scheme == "bdlora"
    assert config.peft.bdlora.rank == 8
    assert config.dataset.train == ("c.jsonl",)
    assert config.optimizer.lr == 2.0
    assert config.checkpoint.save == "runs/base"
    assert load_config(path).dataset.train == ("a.jsonl", "b.jsonl")
    assert load_config(path).optimizer.lr == 1e-3
    assert from_mapping(to_mapping(config)) == config


def test_everything_wrong_is_told_at_once():
    values = changed(
        peft__sheme="bdlora",
        peft__bdlora__rnk=8,
        optimiser={"lr": 1},
        model__seq_length="long",
        model__sequence_parallel=1,
        train__train_iters=2.5,
        dataset__format="jsonl",
        dataset__train=3,
        lora_rank=8,
    )
    del values["checkpoint"]
    assert sorted(problems(values)) == [
        "checkpoint.save is missing",
        "dataset.format is 'jsonl'; wanted one of chat, prompt_completion, rag, text",
        "dataset.train is 3; wanted a list of names",
        "lora_rank is unknown; known: model, dataset, train, checkpoint, peft, optimizer, "
        "scheduler, logger, export, rng",
        "model.seq_length is 'long'; wanted a whole number",
        "model.sequence_parallel is 1; wanted true or false",
        "optimiser is unknown; did you mean optimizer?",
        "peft.bdlora.rnk is unknown; did you mean peft.bdlora.rank?",
        "peft.sheme is unknown; did you mean peft.scheme?",
        "train.train_iters is 2.5; wanted a whole number",
    ]


def test_a_key_in_the_wrong_section_is_found_where_it_belongs():
    (problem,) = problems(changed(model__micro_batch_size=2))
    assert problem == "model.micro_batch_size is unknown; did you mean train.micro_batch_size?"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"peft__bdlora__num_blocks": None}, "num_blocks is missing; set it to the tensor-para"),
        ({"model__tensor_model_parallel_size": 3}, "num_blocks is 4; it must be a multiple of"),
        (
            {"peft__bdlora__rank": 8, "peft__bdlora__match_params_of_lora_rank": 8},
            "rank and match_params_of_lora_rank are both set",
        ),
        ({"peft__bdlora__dropout": 1.0}, "peft.bdlora.dropout is 1.0; wanted less than 1"),
        ({"peft__lora__dropout": -0.1}, "peft.lora.dropout is -0.1"),
        ({"peft__bdlora__target_modules": []}, "target_modules is empty; name layers"),
        (
            {"peft__scheme": "dora"},
            "peft.scheme is 'dora'; wanted one of bdlora, lora, slora, none",
        ),
        ({"peft__bdlora__rank": 0}, "peft.bdlora.rank is 0; wanted at least 1"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr is nan; wanted at least 0"),
        ({"optimizer__lr": 0.1, "optimizer__min_lr": 0.2}, "min_lr is 0.2; lr=0.1 is smaller"),
        (
            {"train__global_batch_size": 3, "train__micro_batch_size": 2},
            "a multiple of micro_batch",
        ),
        (
            {
                "model__seq_length": 33,
                "model__sequence_parallel": True,
                "model__tensor_model_parallel_size": 2,
            },
            "seq_length is 33; with sequence_parallel it must be a multiple",
        ),
        (
            {"model__context_parallel_size": 2, "model__seq_length": 34},
            "seq_length is 34; with context_parallel_size=2 it must be a multiple of twice as many",
        ),
        (
            {"model__virtual_pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size is 2, and there is one pipeline stage; leave",
        ),
        ({"scheduler__lr_warmup_iters": 10}, "it must be less than the 10 steps of the schedule"),
        ({"peft__scheme": "none"}, "dataset.validation is empty; scheme none only evaluates"),
        ({"dataset__train": []}, "dataset.train is empty"),
        ({"checkpoint__keep": 0}, "checkpoint.keep is 0; wanted at least 1"),
        ({"model": "base"}, "model is 'base'; wanted a section with keys"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused(changes, wanted):
    found = problems(changed(**changes))
    assert len(found) == 1
    assert wanted in found[0]


def test_what_others_write_for_no_such_parallelism_is_taken():
    sizes = {
        "model__context_parallel_size": 1,
        "model__virtual_pipeline_model_parallel_size": None,
    }
    assert from_mapping(changed(**sizes)) == from_mapping(changed())


def test_yaml_null_means_the_scheme_none():
    config = from_mapping(changed(peft__scheme=None, dataset__validation="v.jsonl"))
    assert config.peft.scheme == "none"
    assert config.peft.bdlora.num_blocks == 4, "a scheme that is not chosen keeps its settings"


def test_files_and_arguments_that_are_no_settings(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        load_config(path)
    path.write_text("model: [")
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be read as settings"):
        load_config(path)
    path.write_text("- a\n- b")
    with pytest.raises(ConfigError, match="holds no sections with keys"):
        load_config(path)
    path.write_text(YAML)
    with pytest.raises(ConfigError, match=r"\['rank', '=2'\] are not key=value"):
        load_config(path, ["rank", "=2"])
    path.write_text(YAML.replace("base,", "'???',"))
    with pytest.raises(ConfigError, match=r"(?s)cannot be read as settings.*hf_path"):
        load_config(path)


def test_epochs_are_steps_once_the_rows_are_known():
    values = changed(train={"epochs": 3, "global_batch_size": 4}, scheduler__lr_warmup_iters=7)
    config = from_mapping(values)
    found = in_steps(config, 10)
    # 30 rows in steps of four, the last of which begins a fourth walk.
    assert (found.steps, found.train.epochs) == (8, 3)
    assert from_mapping(to_mapping(found) | {"train": values["train"]}) == config
    with pytest.raises(ConfigError, match="lr_warmup_iters is 7; it must be less than the 2 steps"):
        in_steps(config, 2)
    assert in_steps(from_mapping(GOOD), 10).steps == 10
    for train in ({}, {"epochs": 1, "train_iters": 1}):
        (problem,) = problems(changed(train=train))
        assert problem == "one of train.train_iters and train.epochs says how long; set it alone"


def test_how_chats_are_read():
    section = {"train": "a.jsonl", "chat_template_kwargs": {"enable_thinking": False}}
    config = from_mapping(changed(dataset=section, dataset__train_on="last"))
    assert config.dataset.chat_template_kwargs == {"enable_thinking": False}
    assert from_mapping(to_mapping(config)) == config
    assert (
        from_mapping(changed(dataset__chat_template_kwargs=None)).dataset
        == from_mapping(GOOD).dataset
    )
    with pytest.raises(ConfigError, match=r"dataset.chat_template_kwargs is 3; wanted a section"):
        from_mapping(changed(dataset__chat_template_kwargs=3))
    with pytest.raises(ConfigError, match="are for conversations"):
        from_mapping(changed(dataset__train_on="last", dataset__format="text"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"peft__init_structure": "truncate"}, "there is no adapter to start from"),
        ({"peft__init_from": "run/adapter"}, "which lies in checkpoint.save="),
        (
            {"peft__init_from": "a", "peft__scheme": "none", "dataset__validation": "v.jsonl"},
            "scheme none has no adapter",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_an_adapter_to_start_from_goes_with_the_rest(changes, wanted):
    (problem,) = problems(changed(**changes))
    assert wanted in problem
    assert from_mapping(changed(peft__init_from="runs/adapter")).peft.init_from == "runs/adapter"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"checkpoint__keep_best": True}, "checkpoint.keep_best goes by the validation loss; name"),
        (
            {"train__early_stopping_patience": 2, "dataset__validation": "v.jsonl"},
            "early_stopping_patience compares evaluations and train.eval_interval is 0",
        ),
        (
            {"train__early_stopping_min_delta": 0.1, "train__eval_interval": 2},
            "early_stopping_min_delta is 0.1 and nothing stops early",
        ),
        ({"train__early_stopping_patience": 0}, "early_stopping_patience is 0; wanted at least 1"),
        (
            {"checkpoint__keep_best": True, "peft__scheme": "none", "dataset__validation": "v"},
            "checkpoint.keep_best is set and scheme none trains nothing",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_the_best_step_needs_evaluations(changes, wanted):
    (problem,) = problems(changed(**changes))
    assert wanted in problem


def test_sections_that_may_be_left_out_are_checked_like_others():
    logger = {"wandb": {"projct": "p"}, "mlflow": {"experiment": "e", "tracking_uri": 3}}
    assert sorted(problems(changed(logger=logger, peft__run_name="x"))) == [
        "logger.mlflow.tracking_uri is 3; wanted text",
        "logger.wandb.projct is unknown; did you mean logger.wandb.project?",
        "logger.wandb.project is missing",
        "peft.run_name is unknown; did you mean logger.mlflow.run_name?",
    ]
    config = from_mapping(changed(logger={"wandb": {"project": "p"}, "mlflow": None}))
    assert (config.logger.wandb.mode, config.logger.mlflow) == ("online", None)
    assert from_mapping(to_mapping(config)) == config
