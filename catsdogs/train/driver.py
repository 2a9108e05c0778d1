"""Start a run in the driver, the process that runs the command: settings, listing, Ray, workers, report."""

import dataclasses
import os
import signal
import tempfile
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from catsdogs import data, local_ray, start, storage
from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing
from catsdogs.labels import LabelledFiles, check_same_classes, list_training, reindex_labels
from catsdogs.lease import LeaseClaim
from catsdogs.progress import Message, Progress, StallReporter, silent
from catsdogs.ray_errors import to_run_error
from catsdogs.resnet import build_resnet50
from catsdogs.temporaries import temporary_folder
from catsdogs.train import settings
from catsdogs.train.events import ProgressReporter, forward_events, make_retry_policy
from catsdogs.train.loop import train_loop_per_worker
from catsdogs.train.process_group import LocalTorchConfig
from catsdogs.train.report_page import write_report
from catsdogs.train.resume import SavedRun, load_saved_run
from catsdogs.train.run_folder import History, RunFolder
from catsdogs.train.worker import RunSpec
from catsdogs.weights import load_pretrained

# Long, because a worker waits in a collective while another computes features. Ray detects dead workers.
COLLECTIVE_TIMEOUT_S = 24 * 3600

RAY_TRAIN_SETTINGS = {  # environment variables
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # saves an actor that only warns
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # the longest wait of ray.train.report
}


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    uri: str
    val_accuracy: float
    best_epoch: int


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Fine-tune ResNet50 on the workers of a Ray cluster.

    Raises:
        InputError: the settings or the data cannot be used.
        RunError: the run failed; saved epochs are kept.
    """
    config = settings.resolve(config)
    uri = storage.join(config.storage_path, config.name or "")
    with settings.lease_folder(config, uri, progress) as lease:
        return _train(config, uri, lease, progress)


def _train(config: TrainConfig, uri: str, lease: LeaseClaim, progress: Progress) -> TrainResult:
    config = settings.restore_settings(config, uri)
    saved = load_saved_run(uri, config.freeze == "none") if config.resume else SavedRun(History())
    train_files, validation_files = _list_files(config, saved, progress)
    folder = RunFolder(uri, train_files.class_names, Preprocessing(img_size=config.img_size), lease)
    progress(Message(f"{uri}: {_describe_steps(config)}"))
    model = build_resnet50(len(folder.class_names), config.seed)  # workers replace its weights by saved ones
    if not saved.history.epoch:
        progress(Message(load_pretrained(model, config.weights, folder.class_names)))
    start.start_ray()
    use_gpu = data.resolve_use_gpu(config.use_gpu, config.num_workers)
    config = dataclasses.replace(config, use_gpu="true" if use_gpu else "false")
    _write_first_files(config, folder, saved)
    describe_wait = partial(data.describe_wait, "the training workers", config.num_workers if use_gpu else 0)
    stalls = StallReporter(progress, describe_wait)
    reporter = ProgressReporter(config, stalls)
    with data.quiet_ray_loggers(), stalls:
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        spec = RunSpec(
            config=config,
            folder=folder,
            train_files=train_files.files,
            validation_files=validation_files.files,
            initial_state={name: tensor.numpy() for name, tensor in model.state_dict().items()},
            event_queue=Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node}),
            decode_cpus=data.allocate_cpus(config.num_workers).decode,
            decoded_cache=_cache_train_images(config, train_files.files, stalls),
            ray_is_local=not start.on_existing_cluster(),
        )
        _run_workers(spec, reporter)
    _write_report(config, folder, reporter, train_files)
    best = reporter.history.rows[reporter.history.best_epoch - 1]
    return TrainResult(uri, best["val_accuracy"], reporter.history.best_epoch)


def _list_files(config: TrainConfig, saved: SavedRun, progress: Progress) -> tuple[LabelledFiles, LabelledFiles]:
    """List the training and validation files, with the class indices of the run to resume."""
    train_files, validation_files = list_training(config.data_dir, config.val_split, progress)
    if not saved.class_names:
        return train_files, validation_files
    check_same_classes(saved.class_names, train_files.class_names, f"the run {config.name}", "--data-dir")
    return reindex_labels(train_files, saved.class_names), reindex_labels(validation_files, saved.class_names)


def _describe_steps(config: TrainConfig) -> str:
    return (
        f"{config.num_workers} x {config.batch_size} = {config.global_batch_size} images a step, "
        f"learning rate {config.peak_lr:g}"
    )


def _write_first_files(config: TrainConfig, folder: RunFolder, saved: SavedRun) -> None:
    """Take the folder of a new run. Write the settings, and the training state of a run without an epoch."""
    folder.remove_temporaries()
    settings.write_args(config, folder)
    if not saved.history.epoch:
        folder.write_first_state()


def _cache_train_images(config: TrainConfig, files: pa.Table, progress: Progress) -> data.DecodedCache | None:
    """Decode the training images once for all epochs: on GPUs, if all fit in half of the smallest object store."""
    if config.freeze == "backbone" or config.epochs == 1 or not waits_for_images(config):
        return None
    try:
        return data.cache_decoded(files, data.allocate_cpus(config.num_workers).decode, progress)
    except Exception as error:
        raise to_run_error(error, "decoding the training images", "no epoch was started") from error


def waits_for_images(config: TrainConfig) -> bool:
    """Return whether steps wait for images: on GPUs. On a CPU the model takes many times as long as decoding."""
    return config.use_gpu == "true"


def _run_workers(spec: RunSpec, reporter: ProgressReporter) -> None:
    try:
        # Ray Train requires a storage path; it stays empty, since RunFolder writes the checkpoints.
        with (
            temporary_folder("catsdogs-train-", Path(tempfile.gettempdir())) as unused,
            forward_events(spec.event_queue, reporter.on_event),
        ):
            _fit(_build_trainer(spec, str(unused)))
    except TrainingFailedError as error:
        failure = reporter.error or next(iter(getattr(error, "worker_failures", {}).values()), error)
        raise to_run_error(failure, "training", reporter.describe_saved()) from error
    if reporter.error is not None:
        raise reporter.error


def _write_report(config: TrainConfig, folder: RunFolder, reporter: ProgressReporter, files: LabelledFiles) -> None:
    assert reporter.precision is not None, "no worker reported its precision"
    try:
        write_report(dataclasses.replace(config, precision=reporter.precision), folder, reporter.history, files)
    except Exception as error:
        raise to_run_error(error, "the report", reporter.describe_saved()) from error


def _build_trainer(spec: RunSpec, storage_path: str) -> TorchTrainer:
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    config, use_gpu = spec.config, spec.config.use_gpu == "true"
    cpus = data.allocate_cpus(config.num_workers).model
    # Ray refuses a worker without reservations: one byte of memory is the least.
    resources = ({"CPU": cpus} if cpus else {"memory": 1.0}) | ({"GPU": 1.0} if use_gpu else {})
    trainer_class, torch_config = TorchTrainer, TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S)
    if spec.ray_is_local:
        trainer_class = local_ray.make_local_trainer_class()
        torch_config = LocalTorchConfig("nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S)
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"spec": ray.put(spec)},  # a reference: the controller need not import this package
        torch_config=torch_config,
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=config.name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[make_retry_policy()],  # type: ignore[list-item]  # mypy sees the class of Ray Train v1
        ),
    )


def _fit(trainer: TorchTrainer) -> None:
    """Run the trainer. On Ctrl-C, Ray ends the workers and raises SystemExit; raise KeyboardInterrupt instead."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:
        if type(error) is SystemExit:  # the command line raises a subclass on SIGTERM
            raise KeyboardInterrupt from error
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
