"""A run's examples: tokenized once by Hugging Face's ``datasets``, kept on disk, read in place.

What is kept is named by a fingerprint of the files, the tokenizer with its template, the options
and this package's code, so that ranks and later runs share it and nothing stale is read. Memory
holds a few numbers for each example, whatever the files' size. On disk, a row's length plays no
part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from bdlora_megatron.errors import ConfigError, MissingDependencyError
from bdlora_megatron.train import chats as chats_module
from bdlora_megatron.train import examples as examples_module
from bdlora_megatron.train import lines as lines_module
from bdlora_megatron.train import rag as rag_module
from bdlora_megatron.train.examples import Documents, Example
from bdlora_megatron.train.records import records

__all__ = ["Corpus", "Storage", "TooLong", "read_examples"]

TooLong = Literal["error", "truncate", "drop"]

logger = logging.getLogger(__name__)

_SHOWN = 8
_RECORDS = "records"
_NOTHING = "{} hold no example with a token to learn"
#: Records that are worth a process of their own.
_WORTH_A_PROCESS = 20_000
#: Records that are read and written at once: so many bytes of them, and at most so many.
_BATCH_BYTES, _BATCH_RECORDS = 2**24, 1000
_FEATURES = {
    "file": "int32",
    "line": "int64",
    "made": "bool",
    "first": "int32",
    "problem": "string",
}


class Corpus(Sequence[Example]):
    """Examples, each a stretch of a document's tokens on disk.

    Attributes:
        lengths: ``[examples]`` int64, positions of each.
    """

    def __init__(
        self,
        tokens: Sequence[Any],
        learnt: Sequence[Any],
        pieces: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        """Take columns, and which stretches of them are examples.

        Args:
            tokens: Arrow's arrays of lists, one after another.
            learnt: Likewise.
            pieces: Row, first token and positions of each example.
        """
        self._tokens, self._learnt = _Lists(tokens), _Lists(learnt)
        self._rows, self._starts, self.lengths = pieces

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row, start = int(self._rows[index]), int(self._starts[index])
        stop = start + int(self.lengths[index]) + 1
        learnt = self._learnt.row(row)[start:stop].astype(np.bool_)
        return Example(self._tokens.row(row)[start:stop], learnt)


class _Lists:
    """Rows of a column of lists, without copying."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = chunks
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def row(self, index: int) -> NDArray[Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        chunk = self._chunks[number]
        place = index - (int(self._ends[number - 1]) if number else 0)
        start, stop = chunk.offsets[place].as_py(), chunk.offsets[place + 1].as_py()
        found: NDArray[Any] = chunk.values.slice(start, stop - start).to_numpy()
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Where and how tokens are kept.

    Attributes:
        cache_dir: The folder; ``datasets``' own cache when None.
        num_proc: Processes that tokenize; when None one for each 20,000 records, up to one a core.
        progress: Show ``datasets``' progress bars.
    """

    cache_dir: str | Path | None = None
    num_proc: int | None = None
    progress: bool = False


def read_examples(
    paths: Sequence[str | Path],
    documents: Documents,
    *,
    seq_length: int,
    too_long: TooLong = "error",
    storage: Storage | None = None,
) -> Corpus:
    """Tokenize every record of some files, or find what an earlier call has kept.

    Args:
        paths: JSONL, JSON, CSV, Parquet or Arrow, in order.
        documents: The tokenizer, and how records are read.
        seq_length: Positions in a row.
        too_long: What becomes of a longer example. Plain text is cut into rows instead.
        storage: Where tokens are kept.

    Returns:
        The examples, in the order of the records.

    Raises:
        ConfigError: A file or record is not what the format says, is too long, or has nothing to
            learn; the first bad ones are listed.
        MissingDependencyError: ``datasets`` is not installed.
    """
    names, storage = [str(path) for path in paths], storage or Storage()
    if next(records(names), None) is None:
        if names:
            raise ConfigError(_NOTHING.format(", ".join(names)))
        nothing = np.zeros(0, dtype=np.int64)
        return Corpus((), (), (nothing, nothing, nothing))
    folder = _cache(storage) / _fingerprint(names, documents)
    table = _tokenized(folder, names, documents, storage)
    return _fitted(table, names, documents, _Fit(seq_length, too_long))


@dataclass(frozen=True, slots=True)
class _Fit:
    seq_length: int
    too_long: TooLong


def _cache(storage: Storage) -> Path:
    """The folder of everything that is kept.

    Raises:
        MissingDependencyError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"reading training data needs datasets ({error}); pip install 'bdlora-megatron[train]'"
        ) from error
    return Path(storage.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "bdlora")


def _fingerprint(paths: Sequence[str], documents: Documents) -> str:
    """A name for what tokenizing these files would give."""
    tokenizer = documents.tokenizer
    digest = hashlib.sha256()
    for path in paths:
        found = os.stat(path)
        said = (os.path.realpath(path), found.st_size, found.st_mtime_ns)
        digest.update(repr(said).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    said_of_tokenizer = (
        type(tokenizer).__qualname__,
        vocabulary,
        tokenizer.chat_template,
        sorted(map(str, tokenizer.special_tokens_map.items())),
    )
    digest.update(repr(said_of_tokenizer).encode("utf-8", "surrogatepass"))
    digest.update(repr(documents.settings()).encode())
    for module in (chats_module, examples_module, lines_module, rag_module):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:32]


def _tokenized(folder: Path, paths: Sequence[str], documents: Documents, storage: Storage) -> Any:
    """The table of documents; the first process of a machine makes it, the others wait for it."""
    import datasets
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.json"
    with FileLock(folder / ".lock"):
        if not done.is_file():
            quiet = not storage.progress and not datasets.are_progress_bars_disabled()
            if quiet:
                datasets.disable_progress_bars()
            try:
                files = _tokenize(folder, paths, documents, storage.num_proc)
            finally:
                if quiet:
                    datasets.enable_progress_bars()
            unfinished = done.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(files))
            unfinished.replace(done)
            # The tokens are all that is read from now on; an interrupted call needs the records.
            shutil.rmtree(folder / _RECORDS, ignore_errors=True)
    parts = [
        datasets.Dataset.from_file(str(folder / name)) for name in json.loads(done.read_text())
    ]
    return datasets.concatenate_datasets(parts).data


def _tokenize(
    folder: Path, paths: Sequence[str], documents: Documents, num_proc: int | None
) -> list[str]:
    """Write the documents; what an interrupted call has finished is taken up.

    Returns:
        The files, by name.

    Raises:
        ConfigError: A file cannot be read.
        DatasetGenerationError: ``datasets`` could not write.
    """
    import datasets
    import multiprocess

    columns = {name: datasets.Value(kind) for name, kind in _FEATURES.items()}
    lists = {"tokens": "int32", "learnt": "uint8", "notes": "string"}
    columns |= {name: datasets.List(datasets.Value(kind)) for name, kind in lists.items()}
    raw = {"file": "int32", "line": "int64", "record": "large_string"}
    try:
        found = datasets.Dataset.from_generator(
            records,
            features=datasets.Features({n: datasets.Value(kind) for n, kind in raw.items()}),
            cache_dir=str(folder / _RECORDS),
            gen_kwargs={"paths": list(paths)},
            fingerprint=folder.name,
            writer_batch_size=_at_once(len(r["record"]) for r in islice(records(paths), 100)),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise
    if num_proc is None:
        num_proc = min(len(os.sched_getaffinity(0)), len(found) // _WORTH_A_PROCESS)
    if num_proc > 1:
        # A process that has started threads, or CUDA, must not be forked.
        multiprocess.set_start_method("spawn", force=True)
    at_once = _at_once([found.data.nbytes // len(found)])
    made = found.map(
        documents.batch,
        batched=True,
        batch_size=at_once,
        writer_batch_size=at_once,
        remove_columns=list(raw),
        features=datasets.Features(columns),
        cache_file_name=str(folder / "tokens.arrow"),
        new_fingerprint=folder.name,
        num_proc=num_proc if num_proc > 1 else None,
        desc="Tokenizing",
    )
    return [Path(file["filename"]).name for file in made.cache_files]


def _at_once(sizes: Iterable[int]) -> int:
    """How many records of such sizes are read, tokenized and written in one batch."""
    size = statistics.fmean(sizes)
    return max(1, min(_BATCH_RECORDS, int(_BATCH_BYTES // max(size, 1))))


def _fitted(table: Any, paths: Sequence[str], documents: Documents, fit: _Fit) -> Corpus:
    """The documents as examples that fit into a row.

    Raises:
        ConfigError: There are none, or some are refused.
    """
    seq_length, cut = fit.seq_length, documents.format == "text"
    lengths = _lengths(table.column("tokens")) - 1
    first = table.column("first").to_numpy()
    made = table.column("made").to_numpy()
    refused = made & (lengths > seq_length) & (fit.too_long == "error") & (not cut)
    _refuse(table, paths, f"format {documents.format!r}", np.where(refused, lengths, 0), seq_length)
    notes = Counter(
        chain.from_iterable(
            noted for chunk in table.column("notes").chunks for noted in chunk.to_pylist() if noted
        )
    )
    for note, count in notes.items():
        logger.warning("%s: %s (%d times)", ", ".join(paths), note, count)
    dropped = made & (lengths <= 0)
    if cut:
        kept = np.flatnonzero(made & ~dropped)
        pieces = _cut(kept, lengths[kept], seq_length)
    else:
        dropped |= made & (lengths > seq_length) & (fit.too_long == "drop")
        kept = np.flatnonzero(made & ~dropped & (first > 0) & (first <= seq_length))
        fits = np.minimum(lengths[kept], seq_length)
        pieces = kept, np.zeros(len(kept), dtype=np.int64), fits
    if paths and not len(kept):
        raise ConfigError(_NOTHING.format(", ".join(paths)))
    silent = len(made) - len(kept) - int(dropped.sum())
    if dropped.any() or silent:
        logger.warning(
            "%d examples are empty or longer than model.seq_length=%d and dropped; %d have nothing "
            "to learn within it and are left out; %d are left",
            int(dropped.sum()),
            seq_length,
            silent,
            len(pieces[0]),
        )
    return Corpus(table.column("tokens").chunks, table.column("learnt").chunks, pieces)


def _lengths(column: Any) -> NDArray[np.int64]:
    import pyarrow.compute

    return np.asarray(pyarrow.compute.list_value_length(column)).astype(np.int64)


def _cut(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], seq_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pieces of texts; neighbours share the token that one predicts and the other starts from."""
    counts = -(-lengths // seq_length)
    whole = np.repeat(np.arange(len(rows)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(whole)) - before) * seq_length
    return rows[whole], starts, np.minimum(lengths[whole] - starts, seq_length)


def _refuse(
    table: Any, paths: Sequence[str], what: str, too_long: NDArray[np.int64], seq_length: int
) -> None:
    """Refuse what no example can be made of.

    Args:
        table: The documents.
        paths: The files.
        what: What the records were to be.
        too_long: Positions of each document that is refused for them; else 0.
        seq_length: Positions in a row.

    Raises:
        ConfigError: There is such a record; the first of them are listed.
    """
    problems = table.column("problem")
    bad = np.flatnonzero(~np.asarray(problems.is_null()) | (too_long > 0))
    if not len(bad):
        return
    lines = ""
    for row in bad[:_SHOWN].tolist():
        problem = problems[row].as_py() or (
            f"{too_long[row]} positions, over model.seq_length={seq_length}; raise it, or set "
            "dataset.too_long to truncate or drop"
        )
        path = paths[table.column("file")[row].as_py()]
        lines += f"\n- {path} line {table.column('line')[row].as_py()}: {problem}"
    more = f"\n- and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise ConfigError(f"{len(bad)} line(s) of {what} are refused:{lines}{more}")
