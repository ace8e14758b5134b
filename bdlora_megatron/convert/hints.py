"""What a file or folder is that cannot be read as an adapter, and what to do with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["file_hint", "folder_hint", "unreadable"]

_LFS = b"version https://git-lfs.github.com/spec/"


def unreadable(path: Path, error: Exception, advice: str) -> str:
    """The end of a message about a file that cannot be read.

    Args:
        path: The file.
        error: What reading it gave.
        advice: What to do where nothing is known of the file.

    Returns:
        What the file is, or the error, and what to do.
    """
    hint = file_hint(path)
    return f", {hint}" if hint else f": {error}; {advice}"


def file_hint(path: Path) -> str | None:
    """What a broken file is.

    Returns:
        What it is and what to do; None where nothing is known.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError:
        return None
    if start.startswith(_LFS):
        return "it is a Git LFS pointer and not the file; run `git lfs pull` in its folder"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, as a failed download leaves it; download the file again"
    return None


def folder_hint(folder: Path) -> str | None:
    """What a folder that holds no adapter is.

    Returns:
        What it is and what to do; None where nothing is known.
    """
    snapshots = [str(path) for path in _snapshots(folder)]
    if snapshots:
        return f"it is a cache of the Hugging Face hub; pass {' or '.join(snapshots[:4])}"
    if (folder / "collection.json").is_file():
        return f"it is a collection; pass {folder / 'adapters'}, or one of the folders in it"
    if any((folder / name).is_file() for name in ("adapters.safetensors", "adapters.npz")):
        return (
            "it is an adapter of MLX; in PEFT's format lora_a and lora_b are transposed, named "
            "base_model.model.<module>.lora_A.weight and .lora_B.weight in "
            "adapter_model.safetensors, with r and lora_alpha = scale * r in adapter_config.json"
        )
    index = next(folder.glob("adapter_model.*.index.json"), None)
    if index is not None:
        return (
            f"its tensors are in the shards that {index.name} lists, which PEFT itself does not "
            "read; join them into one file: save_file of safetensors.torch, with what load_file "
            "gives of each shard"
        )
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return "it is a whole model, perhaps with the adapter merged in; pass an adapter's folder"
    return None


def _snapshots(folder: Path) -> Iterator[Path]:
    """The revisions in a cached repository, or in all of a cache; the one of `main` first."""
    for repository in [folder, *sorted(folder.glob("models--*"))]:
        found = sorted(path for path in repository.glob("snapshots/*") if path.is_dir())
        main = repository / "refs" / "main"
        current = main.read_text("utf-8", "replace").strip() if main.is_file() else ""
        yield from sorted(found, key=lambda path: path.name != current)
