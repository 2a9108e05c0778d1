"""train(): builds the TorchTrainer, tells what its workers do, writes the report.

step.py    one optimizer step over all workers
state.py   what a run writes and goes on from
loop.py    what every worker runs
show.py    events and results -> lines and pages
"""

import contextlib
import dataclasses
import datetime
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import yaml
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from catsdogs import checkpoint, data, storage
from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.images import Preprocessing
from catsdogs.labels import LabelledFiles, list_training
from catsdogs.model import build
from catsdogs.progress import Message, Progress, silent
from catsdogs.train.loop import RunSpec, train_loop_per_worker
from catsdogs.train.show import EventTeller, write_report
from catsdogs.train.state import ARGS, RunFolder

# What may differ when a run goes on.
FREE_SETTINGS = {"resume", "name", "storage_path", "max_failures", "epochs"}


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    uri: str
    val_accuracy: float
    best_epoch: int


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Fine-tune on the workers of a Ray cluster.

    Raises:
        InputError: the settings or the data cannot be used.
        RunError: the run failed; finished epochs are kept.
    """
    config = _resolve(config)
    uri = storage.join(config.storage_path, config.name or "")
    before = _read_before(config, uri)
    data.start_ray()
    train_files, validation_files = list_training(config.data_dir, config.val_split, progress)
    progress(Message(_describe(config, train_files, validation_files)))
    config = dataclasses.replace(config, use_gpu=_use_gpu(config))
    folder = RunFolder(uri, train_files.class_names, Preprocessing(img_size=config.img_size))
    if before is None:
        storage.write_bytes(folder.path(ARGS), _args_yaml(config))
    teller = EventTeller(config, folder, progress)
    _fit(config, folder, train_files, validation_files, teller)
    write_report(config, folder, teller.history, train_files)
    best = teller.history.rows[teller.history.best_epoch - 1]
    return TrainResult(uri, best["val_accuracy"], teller.history.best_epoch)


def _resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what the settings leave open, as far as no cluster is needed for it."""
    fresh = f"resnet50-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return dataclasses.replace(
        config,
        data_dir=storage.absolute(config.data_dir),
        storage_path=storage.absolute(config.storage_path),
        name=config.name or fresh,
        lr=config.peak_lr,
        weights=config.weights if config.weights in ("imagenet", "none") else storage.absolute(config.weights),
    )


def _use_gpu(config: TrainConfig) -> Any:
    return "true" if data.resolve_use_gpu(config.use_gpu, config.num_workers) else "false"


def _args_yaml(config: TrainConfig) -> bytes:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    return yaml.safe_dump(settings, sort_keys=False).encode()


def _read_before(config: TrainConfig, uri: str) -> dict[str, Any] | None:
    """Read the settings of the run to go on with; None for a new run.

    Raises:
        InputError: a new run's folder is taken, or there is nothing to go on with, or the settings differ.
    """
    if not config.resume:
        if storage.list_names(uri):
            raise InputError(f"{uri} exists: expected a new --name; to go on with that run, add --resume")
        return None
    args = storage.join(uri, ARGS)
    if not storage.exists(args):
        raise InputError(
            f"nothing to resume: {args} is not there; check --storage-path and --name, or leave out --resume"
        )
    before: dict[str, Any] = yaml.safe_load(storage.read_bytes(args))
    _check_settings(config, before, uri)
    return before


def _check_settings(config: TrainConfig, before: dict[str, Any], uri: str) -> None:
    now = dataclasses.asdict(config)
    differences = [
        f"--{name.replace('_', '-')} was {before.get(name)}, is {value}"
        for name, value in now.items()
        if name not in FREE_SETTINGS and value != "auto" and before.get(name) != value
    ]
    if config.epochs < before["epochs"]:
        differences.append(f"--epochs was {before['epochs']}, is {config.epochs} and may only grow")
    if differences:
        raise InputError(f"--resume of {uri} with other settings: {'; '.join(differences)}; repeat the first command's")


def _describe(config: TrainConfig, train_files: LabelledFiles, validation_files: LabelledFiles) -> str:
    rows = train_files.files.num_rows
    return (
        f"{rows:,} training and {validation_files.files.num_rows:,} validation images of "
        f"{len(train_files.class_names)} classes; {config.num_workers} x {config.batch_size} = "
        f"{config.global_batch_size} images a step, learning rate {config.peak_lr:g}"
    )


def _fit(
    config: TrainConfig,
    folder: RunFolder,
    train_files: LabelledFiles,
    validation_files: LabelledFiles,
    teller: EventTeller,
) -> None:
    model = build(len(folder.class_names), config.seed)
    if not folder.has_state():
        teller.progress(Message(checkpoint.load_pretrained(model, config.weights, folder.class_names)))
    share = data.share_cpus(config.num_workers)
    events = Queue(actor_options={"num_cpus": 0})
    spec = RunSpec(
        config=config,
        folder=folder,
        train_files=_put(train_files.files),
        validation_files=_put(validation_files.files),
        initial_state=_put({name: tensor.numpy() for name, tensor in model.state_dict().items()}),
        events=events,
        decode_cpus=share.decode,
    )
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that would tell nobody
    resources = {"CPU": share.model} | ({"GPU": 1.0} if config.use_gpu == "true" else {})
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"spec": _put(spec)},  # by reference: Ray Train's own processes need not import torch
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu == "true", resources_per_worker=resources
        ),
        run_config=RunConfig(name=config.name, failure_config=FailureConfig(max_failures=config.max_failures)),
    )
    with _told(events, teller):
        _run(trainer, teller)


def _put(value: Any) -> Any:
    return ray.put(value)


@contextlib.contextmanager
def _told(events: Queue, teller: EventTeller) -> Iterator[None]:
    """Tell what the workers send while the trainer keeps this thread."""
    done = threading.Event()

    def follow() -> None:
        while not (done.is_set() and events.empty()):
            with contextlib.suppress(Empty):
                teller.tell(pickle.loads(events.get(timeout=0.5)))

    thread = threading.Thread(target=follow, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        events.shutdown(force=True)


def _run(trainer: TorchTrainer, teller: EventTeller) -> None:
    """Fit; Ctrl-C, which Ray takes to end the workers and then exits 0, stays Ctrl-C."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:
        if error.code == 0:
            raise KeyboardInterrupt from error
        raise
    except TrainingFailedError as error:
        raise _explain(error, teller) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def _explain(error: BaseException, teller: EventTeller) -> CatsdogsError:
    """Find the cause that a worker gave, or say what is kept and how to go on."""
    worker_failures: dict[int, Any] = getattr(error, "worker_failures", {})
    for failure in worker_failures.values():
        cause = getattr(failure, "base_exc", failure)
        if isinstance(cause, CatsdogsError):
            return cause
    reason = str(next(iter(worker_failures.values()), error)).strip().splitlines()[-1]
    kept = f"{teller.history.epoch} finished epochs are kept" if teller.history.epoch else "no epoch was finished"
    return RunError(f"training failed: {reason}; {kept}; the same command with --name {teller.name} --resume goes on")


__all__ = ["TrainResult", "train"]
