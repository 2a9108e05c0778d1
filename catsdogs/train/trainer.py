"""Run the workers of a run with Ray Train. Imports Ray Train and Ray Data, not torch.

What the controller of Ray Train unpickles is of Ray, or imports nothing of this package: only workers need torch.
"""

import os
import signal
import tempfile
import threading
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray
import ray.train
from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from catsdogs import data, local_ray, start
from catsdogs.config import TrainConfig
from catsdogs.labels import LabelledFiles
from catsdogs.progress import Progress, StallReporter
from catsdogs.ray_errors import to_run_error
from catsdogs.temporaries import temporary_folder
from catsdogs.train.events import EventSender, ProgressReporter, forward_events, make_retry_policy, report_failures
from catsdogs.train.process_group import LocalConfig
from catsdogs.train.run_folder import RunFolder
from catsdogs.train.spec import RunSpec
from catsdogs.train.tracking import Tracker
from catsdogs.weights import PretrainedWeights

# Long, because a worker waits in a collective while another computes features. Ray detects dead workers.
COLLECTIVE_TIMEOUT_S = 24 * 3600

RAY_TRAIN_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}  # the longest wait of ray.train.report


def resolve_use_gpu(config: TrainConfig) -> bool:
    """Resolve `--use-gpu auto`; raises InputError if there are too few GPUs."""
    return data.resolve_use_gpu(config.use_gpu, config.num_workers)


def run_workers(
    config: TrainConfig,
    folder: RunFolder,
    files: tuple[pa.Table, pa.Table],
    weights: PretrainedWeights | None,
    progress: Progress,
    tracker: Tracker,
) -> ProgressReporter:
    """Train until all epochs are finished; return the reporter, which has their history.

    Args:
        files: training and validation files, `LABELLED_FILES`.
        weights: of a run without a finished epoch; None for random ones.
    """
    num_gpus = config.num_workers if config.use_gpu == "true" else 0
    stalls = StallReporter(progress, partial(data.describe_wait, "the training workers", num_gpus))
    reporter = ProgressReporter(config, stalls, tracker)
    with data.quiet_ray_loggers(), stalls:
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        spec = RunSpec(
            config=config,
            folder=folder,
            train_files=files[0],
            validation_files=files[1],
            weights=weights,
            event_queue=Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node}),
            decode_cpus=data.allocate_cpus(config.num_workers).decode,
            ray_is_local=not start.on_existing_cluster(),
        )
        _fit_and_forward(spec, reporter)
    return reporter


def _fit_and_forward(spec: RunSpec, reporter: ProgressReporter) -> None:
    """Run the trainer while the workers' events are forwarded; raise the error that a worker reported."""
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


def write_report_page(
    config: TrainConfig, folder: RunFolder, reporter: ProgressReporter, train_files: LabelledFiles
) -> None:
    """Write the report of a finished run."""
    from catsdogs.train.report_page import write_report  # not at the top: matplotlib is not needed before

    try:
        write_report(config, folder, reporter.history, train_files)
    except Exception as error:
        raise to_run_error(error, "the report", reporter.describe_saved()) from error


def train_loop_per_worker(loop_config: "dict[str, ray.ObjectRef[RunSpec]]") -> None:
    """Train from the epoch after the last saved one to `config.epochs`."""
    spec = ray.get(loop_config["spec"])
    rank = ray.train.get_context().get_world_rank()
    events = EventSender(spec.event_queue.put, rank)
    with report_failures(events, rank):
        data.warm_up_decoder(spec.decode_cpus)  # a decoding process imports while this one does
        from catsdogs.train import loop, worker  # not at the top: import torch, which takes seconds

        needs_no_actors = spec.ray_is_local and spec.config.num_workers == 1
        with data.quiet_ray_loggers(), data.without_cluster_actors(needs_no_actors):
            loop.train_epochs(worker.build_worker(spec, events))


def _build_trainer(spec: RunSpec, storage_path: str) -> DataParallelTrainer:
    # On a local Ray, nothing announces a preemption: it saves an actor.
    watcher = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0" if spec.ray_is_local else "1"}
    for name, value in (RAY_TRAIN_SETTINGS | watcher).items():
        os.environ.setdefault(name, value)
    config, use_gpu = spec.config, spec.config.use_gpu == "true"
    cpus = data.allocate_cpus(config.num_workers).model
    # Ray refuses a worker without reservations: one byte of memory is the least.
    resources = ({"CPU": cpus} if cpus else {"memory": 1.0}) | ({"GPU": 1.0} if use_gpu else {})
    trainer_class = local_ray.make_local_trainer_class() if spec.ray_is_local else DataParallelTrainer
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"spec": ray.put(spec)},  # a reference: the controller need not import this package
        backend_config=_choose_backend(spec),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=config.name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[make_retry_policy()],  # type: ignore[list-item]  # mypy sees the class of Ray Train v1
        ),
    )


def _choose_backend(spec: RunSpec) -> BackendConfig:
    """Choose what sets up torch's process group. A single worker needs none, so its controller imports no torch."""
    if spec.config.num_workers == 1:
        return BackendConfig()
    if spec.ray_is_local:
        return LocalConfig("nccl" if spec.config.use_gpu == "true" else "gloo", COLLECTIVE_TIMEOUT_S)
    from ray.train.torch import TorchConfig  # not at the top: imports torch

    return TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S)


def _fit(trainer: DataParallelTrainer) -> None:
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
