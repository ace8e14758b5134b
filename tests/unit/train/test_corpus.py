"""Examples on disk: one file's records in every format, found again, and never stale."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet
import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train import corpus
from bdlora_megatron.train.corpus import Storage
from bdlora_megatron.train.data import RowDataset
from bdlora_megatron.train.examples import Documents
from tests.train.runs import TEXT, WORDS, make_tokenizer, read_examples

PAIRS = [{"prompt": f"the {word} ", "completion": TEXT[: 5 + n]} for n, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def told(examples):
    return [(example.tokens.tolist(), example.learnt.tolist()) for example in examples]


def _write_csv(path):
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, PAIRS[0])
        rows.writeheader()
        rows.writerows(PAIRS)


def _write_arrow(path, make):
    table = pa.Table.from_pylist(PAIRS)
    with make(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path: path.write_text(json.dumps(PAIRS))),
        ("lines.json", lambda path: write_lines(path, PAIRS)),
        ("a.csv", _write_csv),
        ("a.parquet", lambda path: pa.parquet.write_table(pa.Table.from_pylist(PAIRS), path)),
        ("stream.arrow", lambda path: _write_arrow(path, pa.ipc.new_stream)),
        ("file.arrow", lambda path: _write_arrow(path, pa.ipc.new_file)),
    ],
)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, tokenizer, name, write):
    options = {"format": "prompt_completion", "seq_length": 64}
    wanted = read_examples([write_lines(tmp_path / "a.jsonl", PAIRS)], tokenizer, **options)
    write(tmp_path / name)
    found = read_examples([tmp_path / name], tokenizer, **options)
    assert len(found) == len(PAIRS)
    assert told(found) == told(wanted)
    assert found.lengths.tolist() == [len(example) for example in wanted]


def test_rows_of_a_table_lack_the_keys_of_others(tmp_path, tokenizer):
    """Arrow gives every message the keys of all, as null; a key that is refused would be one."""
    said = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    other = [dict(said[0], weight=None), dict(said[1], weight=1)]
    table = pa.Table.from_pylist([{"messages": said}, {"messages": other}])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_examples([tmp_path / "a.parquet"], tokenizer, format="chat", seq_length=64)
    assert told([first]) == told([second])


def test_a_second_reading_tokenizes_nothing(tmp_path, tokenizer, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    options = {"format": "prompt_completion", "seq_length": 64}
    wanted = told(read_examples([path], tokenizer, **options))

    def refuse(*args, **kwargs):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(Documents, "batch", refuse)
    assert told(read_examples([path], tokenizer, **options)) == wanted
    # A shorter row is another reading of the same tokens.
    short = read_examples([path], tokenizer, **options | {"seq_length": 8, "too_long": "truncate"})
    assert short.lengths.max() == 8
    for change in (
        {"format": "text"},
        {"vocab_size": 331},
        {"tokenizer": make_tokenizer()},
        {"file": True},
    ):
        other = change.pop("tokenizer", tokenizer)
        if other is not tokenizer:
            other.chat_template = other.chat_template + " "
        if change.pop("file", False):
            os.utime(path, ns=(1, 1))
        with pytest.raises(AssertionError, match="tokenized again"):
            read_examples([path], other, **options | change)


def test_processes_tokenize_as_one_does(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", PAIRS * 3)
    documents = Documents(tokenizer, "prompt_completion")
    found = [
        corpus.read_examples(
            [path],
            documents,
            seq_length=64,
            storage=Storage(cache_dir=tmp_path / str(number), num_proc=number),
        )
        for number in (1, 2)
    ]
    assert told(found[0]) == told(found[1])


def test_a_bad_record_is_named_by_its_row(tmp_path, tokenizer):
    records = [*PAIRS, {"prompt": "a", "completion": 3}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(ConfigError, match=rf"1 line.*\n- .*a.json line {len(records)}: "):
        read_examples([tmp_path / "a.json"], tokenizer, format="prompt_completion", seq_length=64)
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match=r"a\.json is not JSON"):
        read_examples([tmp_path / "a.json"], tokenizer, format="text", seq_length=64)


KILLED = """
import sys
from tests.train.runs import make_tokenizer, read_examples
read_examples([sys.argv[1]], make_tokenizer(), format="text", seq_length=64)
"""


def test_killed_while_tokenizing_and_started_again(tmp_path, tokenizer):
    records = [{"text": f"{number} {TEXT}"} for number in range(2500)]
    path = write_lines(tmp_path / "a.jsonl", records)
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, str(path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("kept/*/tmp*")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("kept/*/done.json"))
    again = read_examples([path], tokenizer, format="text", seq_length=64)
    path = path.rename(tmp_path / "b.jsonl")
    fresh = read_examples([path], tokenizer, format="text", seq_length=64)
    batches = [
        RowDataset(examples, 64, packing=True, seed=3).batch([0, 99]) for examples in (again, fresh)
    ]
    assert batches[0].tokens.equal(batches[1].tokens)
    assert batches[0].learnt.equal(batches[1].learnt)
