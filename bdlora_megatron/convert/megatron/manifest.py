"""Small JSON files of ours, checked key by key when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bdlora_megatron.convert.adapter.invocation import parse_invocation
from bdlora_megatron.convert.adapter.neutral import (
    ALL_MODULE_NAMES,
    Adapter,
    BaseShape,
    ModuleKey,
)
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.hints import unreadable
from bdlora_megatron.decoder import FUSED_PARTS
from bdlora_megatron.errors import AdapterFormatError, nearest

__all__ = ["Manifest", "ModuleEntry", "manifest_of", "read_manifest", "write_manifest"]

VERSION = 1
_LARGEST = 16 << 20
_KEYS = frozenset({"format", "version", "name", "tp", "base", "metadata", "modules"})
#: Only where it is set: readers that do not know it refuse it.
_INVOCATION = "invocation_tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleEntry:
    """What of one module its tensors don't tell.

    Attributes:
        num_blocks: N.
        scale: s.
    """

    num_blocks: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What of an adapter its tensors don't tell.

    Attributes:
        format: The format's name.
        name: The adapter's name.
        tp: Ranks that the files are cut for; 1 where they are not.
        base: What is known of the base model.
        metadata: The adapter's.
        modules: Every module.
        invocation_tokens: The adapter's.
    """

    format: str
    name: str
    tp: int = 1
    base: BaseShape = field(default_factory=BaseShape)
    metadata: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[ModuleKey, ModuleEntry]
    invocation_tokens: tuple[int, ...] | None = None


def manifest_of(adapter: Adapter, facts: Mapping[ModuleKey, Any], format: str, tp: int) -> Manifest:
    """The manifest of an adapter."""
    modules = {k: ModuleEntry(num_blocks=f.num_blocks, scale=f.scale) for k, f in facts.items()}
    return Manifest(
        format=format,
        name=adapter.name,
        tp=tp,
        base=adapter.base,
        metadata=adapter.metadata,
        modules=modules,
        invocation_tokens=adapter.invocation_tokens,
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest."""
    raw = {
        "format": manifest.format,
        "version": VERSION,
        "name": manifest.name,
        "tp": manifest.tp,
        "base": {k: v for k, v in asdict(manifest.base).items() if v is not None},
        "metadata": dict(manifest.metadata),
        "modules": {_text(key): asdict(entry) for key, entry in manifest.modules.items()},
    }
    if manifest.invocation_tokens:
        raw[_INVOCATION] = list(manifest.invocation_tokens)
    path.write_text(json.dumps(raw, indent=1) + "\n", "utf-8")


def read_manifest(path: Path, format: str) -> Manifest:
    """Read a manifest.

    Raises:
        AdapterFormatError: If it is broken, or has unknown or missing keys. All are listed.
    """
    raw = _read_json(path)
    if (raw.get("format"), raw.get("version")) != (format, VERSION):
        raise AdapterFormatError(
            f"{path} says format {raw.get('format')!r}, version {raw.get('version')!r}; wanted "
            f"{format!r}, version {VERSION}; update bdlora-megatron if the version is newer"
        )
    problems = Problems()
    _check_keys(raw, _KEYS, problems)
    name = _typed(raw, "name", str, "", problems)
    tp = _typed(raw, "tp", int, 1, problems)
    if tp < 1:
        problems.add(f"tp is {tp}, wanted 1 or more")
    base = _base(_typed(raw, "base", dict, {}, problems), problems)
    metadata = _typed(raw, "metadata", dict, {}, problems)
    if not all(isinstance(value, str) for value in metadata.values()):
        problems.add("metadata holds more than strings")
    modules = _modules(_typed(raw, "modules", dict, {}, problems), problems)
    invocation = parse_invocation(_INVOCATION, raw.get(_INVOCATION), problems)
    problems.raise_if_any(f"{path} is malformed")
    return Manifest(
        format=format,
        name=name,
        tp=tp,
        base=base,
        metadata=metadata,
        modules=modules,
        invocation_tokens=invocation,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise AdapterFormatError(f"{path} is larger than {_LARGEST} bytes, as no manifest is")
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterFormatError):
            raise
        why = unreadable(path, error, "write it again")
        raise AdapterFormatError(f"{path} cannot be read{why}") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path} holds a JSON {type(raw).__name__}, wanted an object")
    return raw


def _check_keys(raw: Mapping[str, Any], known: frozenset[str], problems: Problems) -> None:
    for key in sorted(raw.keys() - known - {_INVOCATION}):
        problems.add(f"unknown key {key!r}; {nearest(key, known)}")
    for key in sorted(known - raw.keys()):
        problems.add(f"key {key!r} is missing; write the adapter again")


def _typed(raw: Mapping[str, Any], key: str, kind: type, default: Any, problems: Problems) -> Any:
    value = raw.get(key, default)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    problems.add(f"{key} is a {type(value).__name__}, wanted {kind.__name__}")
    return default


def _base(raw: Mapping[str, Any], problems: Problems) -> BaseShape:
    known = {item.name for item in fields(BaseShape)}
    sizes: dict[str, int] = {}
    for key, value in raw.items():
        if key not in known:
            problems.add(f"base has the unknown key {key!r}; {nearest(key, known)}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.add(f"base.{key} is {value!r}, wanted a positive integer")
        else:
            sizes[key] = value
    return BaseShape(**sizes)


def _modules(raw: Mapping[str, Any], problems: Problems) -> dict[ModuleKey, ModuleEntry]:
    modules = {}
    for text, entry in raw.items():
        key = _module_key(text)
        if key is None:
            problems.add("modules has keys that are no module's", text)
        elif not isinstance(entry, dict) or entry.keys() != {"num_blocks", "scale"}:
            problems.add("wanted an object with num_blocks and scale, no more and no less", text)
        elif not _is_entry(**entry):
            problems.add("wanted a positive integer num_blocks and a finite scale", text)
        else:
            modules[key] = ModuleEntry(**entry)
    return dict(sorted(modules.items()))


def _is_entry(num_blocks: object, scale: object) -> bool:
    if isinstance(num_blocks, bool) or isinstance(scale, bool):
        return False
    finite = isinstance(scale, int | float) and abs(scale) < 1e30 and math.isfinite(scale)
    return finite and isinstance(num_blocks, int) and num_blocks >= 1


def _module_key(text: str) -> ModuleKey | None:
    number, _, rest = text.removeprefix("layers.").partition(".")
    name = _KEY_BY_TEXT.get(f"layers.0.{rest}")
    if name is None or not (number.isascii() and number.isdigit()) or len(number) > 5:
        return None
    key = ModuleKey(layer=int(number), name=name)
    return key if _text(key) == text else None


def _text(key: ModuleKey) -> str:
    """A module's key in the file; a name of a family's own tells what a path does not."""
    return f"layers.{key.layer}.{key.name}" if "." in key.name else str(key)


_KEY_BY_TEXT = {
    _text(ModuleKey(layer=0, name=name)): name
    for name in ALL_MODULE_NAMES
    if name not in FUSED_PARTS
}
