"""The settings of a run, and its folder: resolve defaults, take the folder, compare with the run to resume."""

import contextlib
import dataclasses
import datetime
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args

import yaml

from catsdogs import storage
from catsdogs.config import DEFAULT_BATCH_SIZE, PrecisionChoice, TrainConfig
from catsdogs.environment import update_environment
from catsdogs.errors import InputError
from catsdogs.labels import LabelSource
from catsdogs.lease import LEASE, Lease, LeaseClaim
from catsdogs.progress import Progress
from catsdogs.text import format_reason
from catsdogs.train.run_folder import ARGS, RunFolder
from catsdogs.weights import IMAGENET, NONE

if TYPE_CHECKING:  # imports torch, which the driver does not need
    import torch

    from catsdogs.process_setup import Precision

PRECISIONS = get_args(PrecisionChoice)
MIN_STEPS = 30  # per epoch: BatchNorm's statistics and the schedule need some
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 8, 256  # BatchNorm needs some images; larger batches are hardly faster
CHOSEN_SETTINGS = {"batch_size", "lr"}  # if they are not given; those of the run to resume are restored
CHANGEABLE_SETTINGS = {  # on --resume
    "resume",
    "name",
    "storage_path",
    "max_failures",
    "save_every",
    "epochs",
    "patience",
    "use_gpu",
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Resolve the settings that depend on neither the cluster nor the data."""
    source = LabelSource.from_config(config)
    new_name = f"resnet50-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    return dataclasses.replace(
        config,
        data_dir=source.data_dir,
        labels=source.labels,
        exclude=source.exclude,
        storage_path=storage.absolute(config.storage_path),
        name=config.name or new_name,
        views=config.num_views if config.freeze == "backbone" else None,
        weights=config.weights if config.weights in (IMAGENET, NONE) else storage.absolute(config.weights),
    )


def resolve_step(config: TrainConfig, use_gpu: bool, num_images: int) -> TrainConfig:
    """Resolve the device, the batch size and the learning rate that follows from it."""
    batch_size = config.batch_size or choose_batch_size(use_gpu, num_images, config.num_workers)
    config = dataclasses.replace(config, use_gpu="true" if use_gpu else "false", batch_size=batch_size)
    return dataclasses.replace(config, lr=config.peak_lr)


def choose_batch_size(use_gpu: bool, num_images: int, num_workers: int) -> int:
    """Choose the images per worker and step: on a GPU, as many as leave MIN_STEPS per epoch, in powers of two."""
    batch_size = MAX_BATCH_SIZE if use_gpu else DEFAULT_BATCH_SIZE
    while use_gpu and batch_size > MIN_BATCH_SIZE and num_images <= (MIN_STEPS - 1) * batch_size * num_workers:
        batch_size //= 2
    return batch_size


@contextlib.contextmanager
def lease_folder(config: TrainConfig, uri: str, progress: Progress) -> Iterator[LeaseClaim]:
    """Take the lease of a run's folder: of a new one, or that of the run to resume.

    Raises:
        InputError: a new run's folder is not empty, there is no run to resume, or another driver has the lease.
    """
    args = storage.join(uri, ARGS)
    if config.resume and not storage.exists(args):
        raise InputError(f"nothing to resume: {args} does not exist; check --storage-path and --name, or omit --resume")
    names = [name for name in storage.list_names(uri) if name != LEASE and not storage.is_temporary(name)]
    if names and not config.resume:
        raise InputError(f"{uri} exists: expected a new --name; to resume that run, add --resume")
    try:
        with Lease(uri, progress, "training run", "--name") as lease:
            yield lease
    finally:
        storage.remove_empty_folder(uri)  # of a new run that ended before its first file


def write_args(config: TrainConfig, folder: RunFolder, digests: dict[str, str]) -> None:
    """Write the settings of this command: to a new `args.yaml`, or if they changed to that of the run to resume.

    Args:
        digests: SHA-256 of the tables of labels, by setting.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    settings |= {f"{name}_sha256": digest for name, digest in digests.items()}
    if not config.resume:
        create_run(folder.uri, settings)
        return
    previous = _read_args(folder.path(ARGS))
    if previous | settings != previous:
        folder.write(_format_args(previous | settings), ARGS)


def create_run(uri: str, settings: dict[str, Any]) -> None:
    """Take the folder of a new run by creating its `args.yaml`; InputError if another run took it since it was checked.

    The comment makes the content unique: a store reports an equal file as created, since the response to the first
    request may have been lost.
    """
    content = f"# run {secrets.token_hex(8)}\n".encode() + _format_args(settings)
    if not storage.create_bytes(storage.join(uri, ARGS), content):
        raise InputError(f"{uri} was taken by another run that started at the same time: choose another --name")


def _format_args(settings: dict[str, Any]) -> bytes:
    return yaml.safe_dump(settings, sort_keys=False).encode()


def choose_precision(folder: RunFolder, device: "torch.device", report: Callable[[str], None]) -> "Precision":
    """Resolve the precision in the `args.yaml` of a run, and record it there with the versions and the device.

    Restarted workers and --resume read it there, because before the first saved epoch there is no training state.

    Args:
        report: receives a line if the versions or the device are others than before.
    """
    import torch

    from catsdogs.process_setup import resolve_precision

    settings = _read_args(folder.path(ARGS))
    precision = resolve_precision(settings["precision"], device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    updated, changes = update_environment(settings | {"precision": precision}, name, precision)
    if changes:
        report(f"results may differ slightly from those of the epochs in {folder.uri}: {changes}")
    if updated != settings:
        folder.write(_format_args(updated), ARGS)
    return precision


def restore_settings(config: TrainConfig, uri: str) -> TrainConfig:
    """Check the settings against those of the run to resume, and use what it chose; InputError if they differ."""
    if not config.resume:
        return config
    previous = _read_args(storage.join(uri, ARGS))
    _check_settings(config, previous, uri)
    return dataclasses.replace(
        config,
        precision=previous["precision"],
        batch_size=config.batch_size or previous.get("batch_size"),
        lr=config.lr or previous.get("lr"),
    )


def check_tables(config: TrainConfig, uri: str, digests: dict[str, str]) -> None:
    """Check that the tables of the run to resume are those that it began with; InputError if one has changed."""
    previous = _read_args(storage.join(uri, ARGS)) if config.resume else {}
    for name, digest in digests.items():
        if previous.get(f"{name}_sha256", digest) != digest:
            raise InputError(
                f"--resume of {uri}: {getattr(config, name)} has changed since the run began; "
                f"restore the table of --{name}, or start a new run"
            )


def _read_args(args: str) -> dict[str, Any]:
    content = storage.read_bytes(args)
    try:
        loaded = yaml.safe_load(content)
    except Exception as error:  # damaged values raise errors of any type
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
        if value is not None or name not in CHOSEN_SETTINGS
    ]
    if config.epochs < previous["epochs"]:
        differences.append(f"--epochs was {previous['epochs']}, is {config.epochs}; it may only grow")
    if differences:
        text = "; ".join(differences)
        raise InputError(f"--resume of {uri} with other settings: {text}; use those of the first command")
