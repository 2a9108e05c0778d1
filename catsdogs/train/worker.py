"""A training worker: its model and rows, and what it tells the driver."""

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Queue

from catsdogs import data, storage
from catsdogs.checkpoint import load_state
from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError, InputError
from catsdogs.model import Precision, build, disable_tf32, freeze_backbone, resolve_precision
from catsdogs.predict import VALIDATION_BATCH_SIZE, configure_threads_and_malloc
from catsdogs.progress import Message, StageProgress
from catsdogs.schema import OK
from catsdogs.train import settings
from catsdogs.train.compiled import MIN_STEPS, CompiledModel
from catsdogs.train.run_folder import ARGS, EpochRow, History, RunFolder
from catsdogs.train.step import FullModel, HeadOnly, TrainModel, TrainStep, make_optimizer
from catsdogs.vision import ResNet

PROGRESS_INTERVAL_S = 1.0
T = TypeVar("T")
RowIndices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and classes of a step
MAX_NAMED_IMAGES = 10  # bad images in the log; all stand in a file


def decoded_ok(rows: pa.Table) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Tell of each decoded row whether there is an image."""
    return np.array([status == OK for status in rows["status"].to_pylist()], dtype=bool)


@dataclass(frozen=True)
class Started:
    """A worker group begins; `history` holds the finished epochs."""

    history: list[EpochRow]
    precision: Precision
    device: str


@dataclass(frozen=True)
class EpochFinished:
    """An epoch is over; `history` holds it and those before, of which the first `num_kept` are written."""

    history: list[EpochRow]
    num_saved: int


@dataclass(frozen=True)
class LeftOut:
    """Training images that could not be decoded: path, status, error."""

    rows: list[tuple[str, str, str]]


@dataclass(frozen=True)
class FatalError:
    """No worker can go on, and none could after a restart."""

    error: CatsdogsError


@dataclass(frozen=True)
class RunSpec:
    """What the driver hands to every worker; large things by reference into the object store."""

    config: TrainConfig
    folder: RunFolder
    train_files: ray.ObjectRef[pa.Table]
    validation_files: ray.ObjectRef[pa.Table]
    initial_state: ray.ObjectRef[dict[str, np.ndarray[Any, Any]]]
    events: Queue
    decode_cpus: float
    decoded_cache: data.DecodedCache | None
    on_local_ray: bool  # one worker on a Ray of the command's own: its datasets share with nobody


class Inputs(Protocol):
    """What a worker trains on and validates."""

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give inputs and classes of the worker's rows for each step of an epoch; there may be none of a step."""

    def predict_validation(self) -> Iterator[pa.Table]:
        """Label the worker's validation rows as the model stands, a table a batch."""


@dataclass
class TrainWorker:
    """One worker's part of the run."""

    spec: RunSpec
    rank: int
    world_size: int
    device: torch.device
    precision: Precision
    model: ResNet
    train_files: pa.Table
    validation_files: pa.Table
    train_step: TrainStep
    history: History = field(default_factory=History)
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)
    reported_left_out: dict[str, tuple[str, str]] = field(default_factory=dict)
    reported_failed: bool = False
    reported_at: float = 0.0

    @property
    def plan(self) -> data.EpochPlan:
        """The rows of this worker."""
        config = self.spec.config
        return data.EpochPlan(
            num_rows=self.train_files.num_rows,
            seed=config.seed,
            batch_size=config.batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )

    def own_validation_batches(self) -> list[RowIndices]:
        """Deal the batches of validation among the workers, whole: they are the same whatever the number of workers."""
        rows = np.arange(self.validation_files.num_rows)
        starts = range(self.rank * VALIDATION_BATCH_SIZE, len(rows), self.world_size * VALIDATION_BATCH_SIZE)
        return [rows[start : start + VALIDATION_BATCH_SIZE] for start in starts]

    def leave_out(self, rows: pa.Table) -> None:
        """Remember training rows without an image."""
        bad = rows.select(["path", "status", "error"]).to_pylist()
        self.left_out |= {row["path"]: (row["status"], row["error"]) for row in bad}

    def send_event(self, event: object) -> None:
        """Send an event to the driver, from the first worker alone."""
        if self.rank == 0:
            self.spec.events.put(pickle.dumps(event))  # as bytes, or the queue's process would import torch to hold it

    def send_progress(self, stage: str, done: int, total: int, note: str) -> None:
        """Tell how far a stage is, about once a second."""
        now = time.monotonic()
        if now - self.reported_at >= PROGRESS_INTERVAL_S:
            self.reported_at = now
            self.send_event(StageProgress(stage, min(done, total), total, note))


def build_worker(spec: RunSpec) -> TrainWorker:
    """Build the model, its optimizer and the state to go on from."""
    context = ray.train.get_context()
    if not storage.exists(spec.folder.path(ARGS)):
        raise InputError(
            f"--storage-path: the run's folder {spec.folder.uri} is not visible from node "
            f"{ray.util.get_node_ip_address()}; expected storage that all nodes share, such as s3://bucket/prefix"
        )
    configure_threads_and_malloc(context.get_local_world_size())
    device = ray.train.torch.get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    chosen = settings.read_precision(spec.folder.path(ARGS))  # a restart keeps the precision of the first start
    precision = broadcast(resolve_precision(chosen, device), rank, world_size)
    disable_tf32(precision, device)
    model = _make_model(spec, device)
    state = spec.folder.load_state() if spec.folder.has_state() else None
    history = History(state["history"]) if state is not None else History()
    worker = TrainWorker(
        spec=spec,
        rank=rank,
        world_size=world_size,
        device=device,
        precision=precision,
        model=model,
        train_files=ray.get(spec.train_files),
        validation_files=ray.get(spec.validation_files),
        train_step=TrainStep(
            trained=_what_trains(spec, model, device, precision, history),
            optimizer=make_optimizer(model, spec.config),
            config=spec.config,
            device=device,
            world_size=world_size,
        ),
        history=history,
    )
    if state is not None:
        load_state(model, state["model"], spec.folder.uri)
        worker.train_step.optimizer.load_state_dict(state["optimizer"])
    return worker


def broadcast(value: T, rank: int, world_size: int) -> T:
    """Take the first worker's value on all of them."""
    values = [value if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(values, 0)
    return cast(T, values[0])


def _make_model(spec: RunSpec, device: torch.device) -> ResNet:
    model = build(len(spec.folder.class_names), spec.config.seed)
    initial = ray.get(spec.initial_state)
    load_state(model, {name: torch.tensor(array) for name, array in initial.items()}, "the initial weights")
    if spec.config.freeze == "backbone":
        freeze_backbone(model)
    return model.to(device=device, memory_format=torch.channels_last)


def _what_trains(
    spec: RunSpec, model: ResNet, device: torch.device, precision: Precision, history: History
) -> TrainModel:
    config, frozen = spec.config, spec.config.freeze == "backbone"
    wrapped = ray.train.torch.prepare_model(
        model.fc if frozen else model,
        move_to_device=False,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},
    )
    if frozen:
        return HeadOnly(wrapped, device)
    num_steps = (config.epochs - history.epoch) * (ray.get(spec.train_files).num_rows // config.batch_size)
    if device.type == "cuda" and config.num_workers == 1 and num_steps >= MIN_STEPS:
        compiled = CompiledModel(wrapped, config.batch_size, lambda text: spec.events.put(pickle.dumps(Message(text))))
        return FullModel(model, compiled, spec.folder.preprocessing, device, precision)
    return FullModel(model, wrapped, spec.folder.preprocessing, device, precision)
