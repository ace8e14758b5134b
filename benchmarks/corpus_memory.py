"""What reading training data takes as the file gets longer: memory, seconds and disk.

    python -m benchmarks.corpus_memory --out benchmarks/results/corpus_memory

The first file is tokenized once more, killed on the way and taken up again; the batches must be
the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bdlora_megatron.bench.report import machine

SIZES_GB = (0.25, 2.0)
RECORD_BYTES = 4000
SEQ_LENGTH = 1024
PROCESSES = 2
_WORDS = 5000


def main() -> None:
    """Measure every size, write the report, or be the process that reads one file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus_memory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES_GB, help="of files, in GB")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(_read(arguments.read, arguments.out))
        return
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = _make_file(Path(folder) / "lines.jsonl", int(size * 1e9))
            rows.append(_measure(path))
            if len(rows) == 1:
                rows[0]["seconds_killed"] = _interrupt(path, rows[0]["digest"])
        print(rows[-1], file=sys.stderr)
    _write({"machine": machine(), "seq_length": SEQ_LENGTH, "rows": rows}, arguments.out)


def _measure(path: Path) -> dict[str, Any]:
    cache = path.with_name("whole")
    followed = _follow(path, cache)
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {"bytes": path.stat().st_size, "disk_bytes": disk, **followed}


def _interrupt(path: Path, wanted: str) -> float:
    """Kill a call, and hold what the next one gives against ``wanted``; after how long it died."""
    cache = path.with_name("interrupted")
    killed, taken_up = _follow(path, cache, kill=True), _follow(path, cache)
    if killed["digest"] or taken_up["digest"] != wanted:
        raise SystemExit("killed too late, or other batches after an interruption")
    seconds: float = killed["seconds"]
    return seconds


def _make_file(path: Path, size: int) -> Path:
    draw, written = random.Random(0), 0
    words = [_word(draw) for _ in range(_WORDS)]
    with path.open("w") as file:
        while written < size:
            text = " ".join(draw.choices(words, k=draw.randint(1, RECORD_BYTES // 3)))
            written += file.write(json.dumps({"text": text}) + "\n")
    return path


def _word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8)))


def _follow(path: Path, cache: Path, *, kill: bool = False) -> dict[str, Any]:
    """Read in a process of its own, and add up what it and its children hold for themselves."""
    started, peak = time.monotonic(), 0
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.corpus_memory"]
    process = subprocess.Popen(
        [*command, "--out", str(cache), "--read", str(path)], stdout=subprocess.PIPE, text=True
    )
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, _own_bytes(tree))
        if kill and list(cache.glob("*/tmp*")):
            time.sleep(2)
            for child in (*tree.children(recursive=True), tree):
                child.kill()
        time.sleep(0.1)
    assert process.stdout is not None
    digest = process.stdout.read().strip()
    return {"peak_bytes": peak, "seconds": time.monotonic() - started, "digest": digest}


def _own_bytes(tree: psutil.Process) -> int:
    """Memory that no file backs: what is mapped from disk can be given back at any time."""
    total = 0
    try:
        for process in (tree, *tree.children(recursive=True)):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(status.partition("RssAnon:")[2].split()[0]) * 1024
    except (OSError, IndexError, psutil.NoSuchProcess):
        return 0
    return total


def _read(path: Path, cache: Path) -> str:
    """Tokenize a file, and make a name for the batches of a walk over its rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from bdlora_megatron.train.corpus import Storage, read_examples
    from bdlora_megatron.train.data import RowDataset
    from bdlora_megatron.train.examples import Documents

    draw = random.Random(0)
    words = {word: number for number, word in enumerate({_word(draw): 0 for _ in range(_WORDS)})}
    tokenizer = Tokenizer(models.WordLevel({**words, "?": len(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    documents = Documents(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?", unk_token="?"), "text"
    )
    storage = Storage(cache_dir=cache, num_proc=PROCESSES)
    corpus = read_examples([path], documents, seq_length=SEQ_LENGTH, storage=storage)
    rows = RowDataset(corpus, SEQ_LENGTH, packing=True, seed=0)
    digest = hashlib.sha256(repr(len(rows)).encode())
    for number in range(200):
        batch = rows.batch([rows.in_training_order(number)])
        digest.update(batch.tokens.numpy().tobytes() + batch.learnt.numpy().tobytes())
    return digest.hexdigest()


def _write(report: dict[str, Any], stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    about, killed = report["machine"], report["rows"][0]["seconds_killed"]
    lines = [
        "# Reading long files of training data",
        "",
        "Made by `python -m benchmarks.corpus_memory`: JSONL of plain text, records of up to 8 kB,",
        f"rows of {report['seq_length']} tokens, {PROCESSES} processes that tokenize, on",
        f"{about['processor']}, {about['date']}. Memory is the peak of what all processes hold for",
        "themselves (RssAnon), their libraries among it: each imports torch. A second call on the",
        f"first file was killed (SIGKILL) after {killed:.0f} s, while it tokenized; a third took",
        "it up and gave the same batches.",
        "",
        "| file GB | peak MB | seconds | kept on disk GB |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [f"{row['bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e6:,.0f}"]
        cells += [f"{row['seconds']:.0f}", f"{row['disk_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
