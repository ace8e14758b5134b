"""`bdlora serve`: a server from the command line."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from bdlora_megatron.errors import ConfigError, MissingDependencyError
from bdlora_megatron.runtime.launch import INTERFACE_HELP, cuda_is_present
from bdlora_megatron.runtime.versions.known import prefix_caching, require_engine
from bdlora_megatron.serve import torchrun
from bdlora_megatron.serve.logs import configure_logging
from bdlora_megatron.serve.ranks import prepare_ranks
from bdlora_megatron.serve.settings import ServeSettings, check_adapter_name

__all__ = ["add_parser", "check_device", "run", "settings_of"]

_EXTRA = ("einops", "fastapi", "llguidance", "prometheus_client", "transformers", "uvicorn", "yaml")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a base model and its adapters over HTTP",
        description="Serve a base model and many adapters behind OpenAI's API. Every setting can "
        "stand in a YAML file (--config) or be set with --set; what stands later wins. Keys come "
        "from the file, or from BDLORA_API_KEYS (comma-separated) and BDLORA_ADMIN_KEY. Exit "
        "status: 0 after SIGTERM and a drain, 1 when a rank has died or, with --strict-adapters, "
        "refused an adapter, 2 wrong settings.",
    )
    add_model_arguments(parser)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `bdlora serve` and `bdlora generate` have in common."""
    parser.add_argument("--model", metavar="DIR", help="the base model, in Hugging Face's form")
    parser.add_argument(
        "--adapters",
        nargs="*",
        default=[],
        metavar="DIR|NAME=DIR",
        help="adapters: one by its name, or a folder whose folders are all adapters",
    )
    parser.add_argument(
        "--strict-adapters",
        action="store_true",
        default=None,
        help="end where an adapter is refused at the start, instead of serving the others",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        "--tp",
        type=int,
        metavar="P",
        help="tensor-parallel ranks (default: 1)",
    )
    parser.add_argument("--cpu", action="store_true", default=None, help="run on the CPU")
    parser.add_argument("--interface", metavar="NAME", help=INTERFACE_HELP)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        dest="more",
        metavar="NAME=VALUE",
        help="any other setting, such as max_loras=64",
    )


def settings_of(arguments: argparse.Namespace) -> ServeSettings:
    """Put together file, environment and arguments.

    Raises:
        ConfigError: A setting is unknown or wrong, or model or adapters are not there.
        MissingDependencyError: The extra `serve` is not installed.
    """
    absent = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingDependencyError(
            f"{', '.join(absent)} not installed; pip install 'bdlora-megatron[serve]'"
        )
    values = {**_file(arguments.config), **_environment()}
    for pair in arguments.more:
        name, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--set {pair!r}; wanted NAME=VALUE")
        values[name] = _yaml(value)
    for field in fields(ServeSettings):
        given = getattr(arguments, field.name, None)
        if field.name != "adapters" and given is not None:
            values[field.name] = given
    values["adapters"] = {**(values.get("adapters") or {}), **_adapters(arguments.adapters)}
    settings = ServeSettings.from_dict(values)
    _check_folders(settings)
    return settings


def check_device(settings: ServeSettings) -> None:
    """See that there is what the settings want to run on, before anything is loaded.

    Raises:
        ConfigError: There is no GPU, and the CPU was not asked for.
        UnsupportedError: Megatron-Core has no prefix cache, and one was asked for.
    """
    prefix_caching(settings.enable_prefix_caching)
    if not (settings.cpu or cuda_is_present()):
        raise ConfigError("no CUDA device is present; add --cpu to run on this machine's CPU")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    require_engine()
    settings = settings_of(arguments)
    check_device(settings)
    rank = torchrun.rank_of(os.environ)
    configure_logging(rank=rank or None)
    if rank is not None:
        settings = torchrun.settings_for(settings, os.environ)
        if settings.cpu:
            # Before torch is imported: a rank of torchrun's is this very process.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if rank:
        ours, theirs = multiprocessing.Pipe()
        status = torchrun.serve_rank(settings, rank, theirs)
        # An end that was dropped earlier would tell the rank that the API server has gone.
        ours.close()
        return status
    if rank == 0:
        # The tokenizer's library asks once whether torch is there, and this process will need it.
        importlib.import_module("torch")
    if rank is None:
        # It imports while this process does, and reads its tokenizer.
        prepare_ranks(settings)
    from bdlora_megatron.serve.server import Server

    server = Server(settings) if rank is None else Server(settings, torchrun.OwnRank)
    # A log that can't be written, on a full disk, is no reason not to serve.
    with suppress(OSError):
        print(f"bdlora: listening on http://{settings.host}:{server.port}", file=sys.stderr)  # noqa: T201
    return server.run()


def _file(path: Path | None) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: It can't be read, or holds no mapping.
    """
    if path is None:
        return {}
    try:
        values = _yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold settings; wanted lines such as `max_loras: 64`")
    return values


def _yaml(text: str) -> Any:
    """A YAML value.

    Raises:
        ConfigError: It is none.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}") from error


def _environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    if os.environ.get("BDLORA_API_KEYS"):
        values["api_keys"] = os.environ["BDLORA_API_KEYS"].split(",")
    if os.environ.get("BDLORA_ADMIN_KEY"):
        values["admin_key"] = os.environ["BDLORA_ADMIN_KEY"]
    return values


def _adapters(arguments: list[str]) -> dict[str, str]:
    """Adapters by name.

    Raises:
        ConfigError: An argument means none, or two have the same name.
    """
    found: list[tuple[str, str]] = []
    for argument in arguments:
        name, named, path = argument.partition("=")
        if named:
            found.append((check_adapter_name(name), path))
            continue
        folder = Path(argument)
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        folders = [item for item in inside if item.is_dir() and not item.name.startswith(".")]
        if not folders:
            raise ConfigError(
                f"{argument} holds no folders of adapters; give such a folder, or NAME=DIR for one"
            )
        found += [(check_adapter_name(item.name), str(item)) for item in folders]
    adapters = dict(found)
    if len(adapters) < len(found):
        names = sorted({name for name, _ in found if sum(n == name for n, _ in found) > 1})
        raise ConfigError(f"several adapters are called {names}; name them with NAME=DIR")
    return adapters


def _check_folders(settings: ServeSettings) -> None:
    """See that everything is where it should be, before ranks are started.

    Raises:
        ConfigError: It is not.
    """
    if not Path(settings.model, "config.json").is_file():
        raise ConfigError(
            f"{settings.model} has no config.json; give a Hugging Face model's folder"
        )
    missing = [f"{n}={p}" for n, p in settings.adapters.items() if not Path(p).is_dir()]
    missing += [folder for folder in settings.adapter_dirs if not Path(folder).is_dir()]
    if missing:
        raise ConfigError(f"no such folders: {', '.join(missing[:8])}")
