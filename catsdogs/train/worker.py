"""A training worker: its model and rows, and what it tells the driver."""

import pickle
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from catsdogs import data, storage
from catsdogs.checkpoint import load_state
from catsdogs.config import TrainConfig
from catsdogs.errors import CatsdogsError, InputError
from catsdogs.model import build, compute_exactly, freeze_backbone, resolve_precision
from catsdogs.predict import set_threads
from catsdogs.progress import Step
from catsdogs.train.state import ARGS, EpochRow, History, RunFolder
from catsdogs.train.step import Stepper, make_optimizer
from catsdogs.vision import ResNet

TELL_EVERY_S = 1.0
NUM_NAMED = 10  # bad images in the log; all stand in a file


@dataclass(frozen=True)
class Started:
    """A worker group begins; `history` holds the finished epochs."""

    history: list[EpochRow]
    precision: Literal["fp32", "bf16"]
    device: str


@dataclass(frozen=True)
class EpochFinished:
    """An epoch is kept; `history` holds it and those before."""

    history: list[EpochRow]


@dataclass(frozen=True)
class LeftOut:
    """Training images that could not be decoded: path, status, error."""

    rows: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Refused:
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


@dataclass
class Worker:
    """One worker's part of the run."""

    spec: RunSpec
    rank: int
    world_size: int
    device: torch.device
    train_files: pa.Table
    validation_files: pa.Table
    stepper: Stepper
    history: History = field(default_factory=History)
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)
    told_left_out: dict[str, tuple[str, str]] = field(default_factory=dict)
    told_unlabelled: bool = False
    told_at: float = 0.0

    @property
    def model(self) -> ResNet:
        """The model without DDP around it."""
        return self.stepper.model

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

    def tell(self, event: object) -> None:
        """Send an event to the driver, from the first worker alone."""
        if self.rank == 0:
            self.spec.events.put(pickle.dumps(event))  # as bytes, or the queue's process would import torch to hold it

    def tell_step(self, stage: str, done: int, total: int, note: str) -> None:
        """Tell how far a stage is, about once a second."""
        now = time.monotonic()
        if now - self.told_at >= TELL_EVERY_S:
            self.told_at = now
            self.tell(Step(stage, min(done, total), total, note))


def make_worker(spec: RunSpec) -> Worker:
    """Build the model, its optimizer and the state to go on from."""
    context = ray.train.get_context()
    if not storage.exists(spec.folder.path(ARGS)):
        raise InputError(
            f"--storage-path: the run's folder {spec.folder.uri} is not visible from node "
            f"{ray.util.get_node_ip_address()}; expected storage that all nodes share, such as s3://bucket/prefix"
        )
    set_threads(context.get_local_world_size())
    device = ray.train.torch.get_device()
    stepper = _make_stepper(spec, device, context.get_world_size())
    worker = Worker(
        spec=spec,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        train_files=ray.get(spec.train_files),
        validation_files=ray.get(spec.validation_files),
        stepper=stepper,
    )
    if spec.folder.has_state():
        state = spec.folder.load_state()
        load_state(worker.model, state["model"], spec.folder.uri)
        stepper.optimizer.load_state_dict(state["optimizer"])
        worker.history = History(state["history"])
    return worker


def _make_stepper(spec: RunSpec, device: torch.device, world_size: int) -> Stepper:
    model = build(len(spec.folder.class_names), spec.config.seed)
    initial = ray.get(spec.initial_state)
    load_state(model, {name: torch.tensor(array) for name, array in initial.items()}, "the initial weights")
    precision = resolve_precision(spec.config.precision, device)
    compute_exactly(precision, device)
    if spec.config.freeze == "backbone":
        freeze_backbone(model)
    model = model.to(device=device, memory_format=torch.channels_last)
    wrapped = ray.train.torch.prepare_model(
        model, move_to_device=False, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
    )
    return Stepper(
        model=model,
        wrapped=wrapped,
        optimizer=make_optimizer(model, spec.config),
        config=spec.config,
        preprocessing=spec.folder.preprocessing,
        device=device,
        precision=precision,
        world_size=world_size,
    )
