"""train(): builds the trainer, tells what its workers do, writes the report.

step.py      one optimizer step over all workers
compiled.py  the model in the form that torch's compiler gives it
pixels.py    images -> the inputs of steps
features.py  the same for a head alone: features of a frozen backbone
state.py     what a run writes and goes on from
loop.py      what every worker runs
trainer.py   Ray's trainer with few processes of its own
show.py      events and results -> lines and pages
"""

import contextlib
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.train import TrainingFailedError
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from catsdogs import checkpoint, data, storage
from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError
from catsdogs.images import Preprocessing
from catsdogs.labels import LabelledFiles, list_training
from catsdogs.model import build
from catsdogs.progress import Message, Progress, silent
from catsdogs.start import on_existing_cluster, start_ray
from catsdogs.train import settings
from catsdogs.train.loop import train_loop_per_worker
from catsdogs.train.reporting import ProgressReporter, write_report
from catsdogs.train.run_folder import ARGS, RunFolder
from catsdogs.train.trainer import Trainer
from catsdogs.train.worker import RunSpec
from catsdogs.vision import ResNet

# A worker that died is seen by Ray; this is for one that waits while another still computes its share of features.
COLLECTIVE_S = 24 * 3600


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
    config = settings.resolve(config)
    uri = storage.join(config.storage_path, config.name or "")
    config = settings.restore_settings(config, uri)
    train_files, validation_files = list_training(config.data_dir, config.val_split, progress)
    folder = RunFolder(uri, train_files.class_names, Preprocessing(img_size=config.img_size))
    settings.check_restored_classes(folder.class_names, uri)
    progress(Message(_describe(config, train_files, validation_files)))
    model = build(len(folder.class_names), config.seed)
    if not folder.has_state():
        progress(Message(checkpoint.load_pretrained(model, config.weights, folder.class_names)))
    start_ray()
    data.configure_ray_data()
    config = settings.resolve_gpu(config)
    storage.write_bytes(folder.path(ARGS), settings.format_args_yaml(config))
    reporter = ProgressReporter(config, folder, progress)
    _fit(config, folder, (train_files.files, validation_files.files), model, reporter)
    write_report(reporter.config, folder, reporter.history, train_files)
    best = reporter.history.rows[reporter.history.best_epoch - 1]
    return TrainResult(uri, best["val_accuracy"], reporter.history.best_epoch)


def _describe(config: TrainConfig, train_files: LabelledFiles, validation_files: LabelledFiles) -> str:
    rows = train_files.files.num_rows
    return (
        f"{rows:,} training and {validation_files.files.num_rows:,} validation images of "
        f"{len(train_files.class_names)} classes; {config.num_workers} x {config.batch_size} = "
        f"{config.global_batch_size} images a step, learning rate {config.peak_lr:g}"
    )


def _fit(
    config: TrainConfig, folder: RunFolder, files: tuple[pa.Table, pa.Table], model: ResNet, reporter: ProgressReporter
) -> None:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # lives as long as the driver
    decode_cpus = data.allocate_cpus(config.num_workers).decode
    spec = RunSpec(
        config=config,
        folder=folder,
        train_files=ray.put(files[0]),
        validation_files=ray.put(files[1]),
        initial_state=ray.put({name: tensor.numpy() for name, tensor in model.state_dict().items()}),
        events=events,
        decode_cpus=decode_cpus,
        decoded_cache=_hold(config, files[0], decode_cpus, reporter),
        on_local_ray=config.num_workers == 1 and not on_existing_cluster(),
    )
    try:
        with tempfile.TemporaryDirectory() as unused, _forward_events(events, reporter):
            _run(_make_trainer(spec, unused))
    except TrainingFailedError as error:
        raise _explain(error, reporter) from error
    if reporter.fatal_error:
        raise reporter.fatal_error


def _hold(
    config: TrainConfig, files: pa.Table, decode_cpus: float, reporter: ProgressReporter
) -> data.DecodedCache | None:
    """Decode the training images now where several epochs will see them."""
    if config.freeze == "backbone" or config.epochs == 1 or not _waits_for_images(config):
        return None
    try:
        with data.without_cluster_actors():
            return data.cache_decoded(files, decode_cpus, reporter.progress)
    except Exception as error:
        raise _explain(error, reporter) from error


def _waits_for_images(config: TrainConfig) -> bool:
    """Whether a step may wait for its images: on a CPU the model takes many times as long as they do."""
    return config.use_gpu == "true"


def _make_trainer(spec: RunSpec, unused: str) -> Trainer:
    """Build the trainer; our checkpoints are our own files, so Ray Train's folder stays empty and goes."""
    config = spec.config
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that would tell nobody
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")  # so long each report of an epoch may wait
    resources = {"CPU": data.allocate_cpus(config.num_workers).model}
    if config.use_gpu == "true":
        resources["GPU"] = 1.0
    return Trainer(
        train_loop_per_worker,
        train_loop_config={"spec": ray.put(spec)},  # by reference: Ray Train's own processes need not import us
        torch_config=TorchConfig(timeout_s=COLLECTIVE_S),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu == "true", resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=config.name, storage_path=unused, failure_config=FailureConfig(max_failures=config.max_failures)
        ),
    )


@contextlib.contextmanager
def _forward_events(events: Queue, reporter: ProgressReporter) -> Iterator[None]:
    """Tell what the workers send while the trainer keeps this thread."""
    done = threading.Event()
    failures: list[Exception] = []

    def follow() -> None:
        while not (done.is_set() and events.empty()):
            with contextlib.suppress(Empty):
                event = events.get(timeout=0.5)
                try:
                    reporter.on_event(pickle.loads(event))
                except Exception as error:  # noqa: BLE001 - raised below, in the thread that can
                    failures.append(error)

    thread = threading.Thread(target=follow, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        events.shutdown(force=True)
    if failures:
        raise failures[0]


def _run(trainer: Trainer) -> None:
    """Fit; Ctrl-C, at which Ray ends the workers and then exits, stays Ctrl-C."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:
        if type(error) is SystemExit:  # not the subclass that SIGTERM raises
            raise KeyboardInterrupt from error
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def _explain(error: Exception, reporter: ProgressReporter) -> CatsdogsError:
    """Find the cause that a worker gave; say what is kept and how to go on."""
    failure = next(iter(getattr(error, "worker_failures", {}).values()), error)
    kept = f"{reporter.num_saved} finished epochs are kept" if reporter.num_saved else "no epoch was finished"
    return data.to_run_error(
        failure, "training", f"{kept}; the same command with --name {reporter.name} --resume goes on"
    )


__all__ = ["TrainResult", "train"]
