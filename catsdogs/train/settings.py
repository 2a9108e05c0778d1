"""The settings of a run: resolve defaults, compare them with those of the run to resume."""

import dataclasses
import datetime
import secrets
from typing import Any, get_args

import torch
import yaml

from catsdogs import storage
from catsdogs.config import PrecisionChoice, TrainConfig
from catsdogs.errors import InputError
from catsdogs.process_setup import Precision, resolve_precision
from catsdogs.text import format_reason
from catsdogs.train.run_folder import ARGS

PRECISIONS = get_args(PrecisionChoice)
CHANGEABLE_SETTINGS = {"resume", "name", "storage_path", "max_failures", "epochs", "use_gpu"}  # on --resume


def resolve(config: TrainConfig) -> TrainConfig:
    """Resolve the settings that depend on neither the cluster nor the device."""
    new_name = f"resnet50-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    return dataclasses.replace(
        config,
        data_dir=storage.absolute(config.data_dir),
        storage_path=storage.absolute(config.storage_path),
        name=config.name or new_name,
        lr=config.peak_lr,
        views=config.num_views if config.freeze == "backbone" else None,
        weights=config.weights if config.weights in ("imagenet", "none") else storage.absolute(config.weights),
    )


def create_run(uri: str, settings: dict[str, Any]) -> None:
    """Take the folder of a new run by creating its `args.yaml`; InputError if another run took it since it was checked.

    The comment makes the content unique: a store reports an equal file as created, since the response to the first
    request may have been lost.
    """
    content = f"# run {secrets.token_hex(8)}\n".encode() + _format_args(settings)
    if not storage.create_bytes(storage.join(uri, ARGS), content):
        raise InputError(f"{uri} was taken by another run that started at the same time: choose another --name")


def write_args(uri: str, settings: dict[str, Any]) -> None:
    """Write the settings to the `args.yaml` of the run at `uri`."""
    storage.write_bytes(storage.join(uri, ARGS), _format_args(settings))


def _format_args(settings: dict[str, Any]) -> bytes:
    kept = {name: value for name, value in settings.items() if name != "resume"}
    return yaml.safe_dump(kept, sort_keys=False).encode()


def choose_precision(uri: str, device: torch.device) -> Precision:
    """Resolve the precision in the `args.yaml` of the run at `uri`, and write it there.

    Restarted workers and --resume read it there, because before the first saved epoch there is no training state.
    """
    settings = _read_args(storage.join(uri, ARGS))
    precision = resolve_precision(settings["precision"], device)
    if precision != settings["precision"]:
        write_args(uri, settings | {"precision": precision})
    return precision


def restore_settings(config: TrainConfig, uri: str) -> TrainConfig:
    """Check the settings against those of the run at `uri`, and use its precision.

    Raises:
        InputError: a new run's folder is not empty, there is no run to resume, or the settings differ.
    """
    if not config.resume:
        if storage.list_names(uri):
            raise InputError(f"{uri} exists: expected a new --name; to resume that run, add --resume")
        return config
    args = storage.join(uri, ARGS)
    if not storage.exists(args):
        raise InputError(f"nothing to resume: {args} does not exist; check --storage-path and --name, or omit --resume")
    previous = _read_args(args)
    _check_settings(config, previous, uri)
    return dataclasses.replace(config, precision=previous["precision"])


def _read_args(args: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(storage.read_bytes(args))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        raise InputError(f"{args} is damaged: {format_reason(error)}; start a new run with another --name") from error
    previous: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    if type(previous.get("epochs")) is not int or previous.get("precision") not in PRECISIONS:
        raise InputError(f"{args}: expected the settings of a run, as catsdogs train writes them; start a new run")
    return previous


def _check_settings(config: TrainConfig, previous: dict[str, Any], uri: str) -> None:
    differences = [
        f"--{name.replace('_', '-')} was {previous[name]}, is {value}"
        for name, value in dataclasses.asdict(config).items()
        if name in previous and name not in CHANGEABLE_SETTINGS and value != "auto" and previous[name] != value
    ]
    if config.epochs < previous["epochs"]:
        differences.append(f"--epochs was {previous['epochs']}, is {config.epochs} and may only grow")
    if differences:
        text = "; ".join(differences)
        raise InputError(f"--resume of {uri} with other settings: {text}; repeat those of the first command")
