"""A run's settings: what is left open filled in, compared with those of the run to go on with."""

import dataclasses
import datetime
from typing import Any

import yaml

from catsdogs import data, saved, storage
from catsdogs.config import TrainConfig
from catsdogs.errors import InputError
from catsdogs.labels import check_same_classes
from catsdogs.train.run_folder import ARGS, LAST, STATE

# What may differ when a run goes on.
FREE_SETTINGS = {"resume", "name", "storage_path", "max_failures", "epochs", "use_gpu"}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what the settings leave open, as far as no cluster is needed for it."""
    fresh = f"resnet50-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return dataclasses.replace(
        config,
        data_dir=storage.absolute(config.data_dir),
        storage_path=storage.absolute(config.storage_path),
        name=config.name or fresh,
        lr=config.peak_lr,
        views=config.num_views if config.freeze == "backbone" else None,
        weights=config.weights if config.weights in ("imagenet", "none") else storage.absolute(config.weights),
    )


def resolve_gpu(config: TrainConfig) -> TrainConfig:
    """Choose GPUs where the cluster has them; Ray runs by now.

    Raises:
        InputError: asked for GPUs that will never come.
    """
    use_gpu = data.resolve_use_gpu(config.use_gpu, config.num_workers)
    return dataclasses.replace(config, use_gpu="true" if use_gpu else "false")


def format_args_yaml(config: TrainConfig) -> bytes:
    """Lay the settings out as `args.yaml`."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    return yaml.safe_dump(settings, sort_keys=False).encode()


def restore_settings(config: TrainConfig, uri: str) -> TrainConfig:
    """Compare with the run to go on with; what was chosen for it then is chosen now.

    Raises:
        InputError: a new run's folder is taken, or there is nothing to go on with, or the settings differ.
    """
    if not config.resume:
        if storage.list_names(uri):
            raise InputError(f"{uri} exists: expected a new --name; to go on with that run, add --resume")
        return config
    args = storage.join(uri, ARGS)
    if not storage.exists(args):
        raise InputError(
            f"nothing to resume: {args} is not there; check --storage-path and --name, or leave out --resume"
        )
    before = _read_args(args)
    _check_settings(config, before, uri)
    return dataclasses.replace(config, precision=before["precision"])


def check_restored_classes(class_names: tuple[str, ...], uri: str) -> None:
    """Compare the data's classes with those of the run to go on with, where it has finished an epoch.

    Raises:
        InputError: they differ.
    """
    if storage.exists(storage.join(uri, LAST, STATE)):
        before, _ = saved.read_config(storage.join(uri, LAST))
        check_same_classes(before, class_names, uri, "--data-dir")


def read_precision(args: str) -> str:
    """Read the precision of a run, `auto` until a worker has chosen one."""
    return str(_read_args(args)["precision"])


def _read_args(args: str) -> dict[str, Any]:
    try:
        before = yaml.safe_load(storage.read_bytes(args))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{args} is damaged: {error}; start a new run with another --name") from error
    if not isinstance(before, dict) or not {"epochs", "precision"} <= before.keys():
        raise InputError(f"{args}: expected the settings of a run, as catsdogs train writes them; start a new run")
    return before


def _check_settings(config: TrainConfig, before: dict[str, Any], uri: str) -> None:
    differences = [
        f"--{name.replace('_', '-')} was {before[name]}, is {value}"
        for name, value in dataclasses.asdict(config).items()
        if name in before and name not in FREE_SETTINGS and value != "auto" and before[name] != value
    ]
    if config.epochs < before["epochs"]:
        differences.append(f"--epochs was {before['epochs']}, is {config.epochs} and may only grow")
    if differences:
        raise InputError(f"--resume of {uri} with other settings: {'; '.join(differences)}; repeat the first command's")
