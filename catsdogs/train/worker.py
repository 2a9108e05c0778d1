"""A worker of a run: collective operations, and its model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from catsdogs import data, storage
from catsdogs.errors import InputError
from catsdogs.process_setup import Precision, configure_threads_and_malloc, disable_tf32
from catsdogs.resnet import ResNet50, build_resnet50, freeze_backbone
from catsdogs.train import settings
from catsdogs.train.events import EventSender
from catsdogs.train.model import CompiledModel, Forward, FullModel, build_optimizer, should_compile
from catsdogs.train.run_folder import ARGS, Digests, History
from catsdogs.train.spec import RunSpec
from catsdogs.train.step_state import EpochProgress, find_step_state
from catsdogs.weights import load_state_dict_strictly

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This worker's rank, and collective operations, which do nothing for a single worker."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """The first worker writes the run's files and reports to the driver."""
        return self.rank == 0

    def broadcast(self, compute: Callable[[], T]) -> T:
        """Call `compute` on the first worker and return its result on all."""
        values = [compute() if self.is_first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Copy the first worker's buffers to all workers."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: T) -> list[T] | None:
        """Return every worker's value on the first worker, None on the others."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return cast(list[T] | None, values)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()


@dataclass(kw_only=True)
class TrainWorker:
    """One worker of a run.

    Attributes:
        model: all layers.
        train_model: the trained layers, as a step calls them.
        saved_files: the files of the run that are in the training state; empty if this is not the first worker.
        progress: what is done of the epoch after `history`.
    """

    spec: RunSpec
    ranks: Ranks
    device: torch.device
    precision: Precision
    model: ResNet50
    train_model: Forward
    optimizer: torch.optim.Optimizer
    events: EventSender
    history: History
    saved_files: Digests
    progress: EpochProgress = field(default_factory=EpochProgress)

    @property
    def plan(self) -> data.EpochPlan:
        """The training rows of this worker's steps."""
        return data.EpochPlan(
            num_rows=self.spec.train_files.num_rows,
            seed=self.spec.config.seed,
            batch_size=self.spec.config.local_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )


def build_worker(spec: RunSpec, events: EventSender) -> TrainWorker:
    """Build a worker with the last saved state; raises InputError if the run's folder is not visible."""
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    if not storage.exists(spec.folder.path(ARGS)):
        raise InputError(
            f"--storage-path: the run's folder {spec.folder.uri} is not visible from node "
            f"{ray.util.get_node_ip_address()}; expected storage that all nodes share, such as s3://bucket/prefix"
        )
    configure_threads_and_malloc(context.get_local_world_size())
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # as Ray Train's own TorchConfig does
    precision = ranks.broadcast(lambda: _start_run(spec, device, events))
    disable_tf32(precision, device)
    state = spec.folder.load_state()
    saved_files = spec.folder.restore_files(state) if ranks.is_first else {}
    history = History(state["history"])
    step_state = find_step_state(spec.folder.uri, state, spec.train_files)
    latest = vars(step_state) if step_state else state if history.epoch else {}
    model = _build_model(spec, device, latest.get("model"))
    optimizer = build_optimizer(model, spec.config)
    if latest:
        optimizer.load_state_dict(latest["optimizer"])
    return TrainWorker(
        spec=spec,
        ranks=ranks,
        device=device,
        precision=precision,
        model=model,
        train_model=_wrap_model(model, spec, device, precision, history, events),
        optimizer=optimizer,
        events=events,
        history=history,
        saved_files=saved_files,
        progress=step_state.progress if step_state else EpochProgress(),
    )


def _start_run(spec: RunSpec, device: torch.device, events: EventSender) -> Precision:
    """Write the first files of the run, on the first worker; return the precision."""
    spec.folder.write_first_state()
    return settings.choose_precision(spec.folder, device, events.send_text)


def _build_model(spec: RunSpec, device: torch.device, saved_state: dict[str, torch.Tensor] | None) -> ResNet50:
    """Build the model of the last saved state, or before the first one with the initial weights."""
    model = build_resnet50(len(spec.folder.class_names), spec.config.seed)
    if saved_state is not None:
        load_state_dict_strictly(model, saved_state, spec.folder.uri)
    elif spec.weights is not None:
        spec.weights.load(model, spec.folder.class_names)
    if spec.config.freeze == "backbone":
        freeze_backbone(model)
    return model.to(memory_format=torch.channels_last).to(device)


def _wrap_model(
    model: ResNet50, spec: RunSpec, device: torch.device, precision: Precision, history: History, events: EventSender
) -> Forward:
    """Wrap the trained layers in DDP, or compile them."""
    head_only = spec.config.freeze == "backbone"
    forward: Forward = ray.train.torch.prepare_model(
        model.fc if head_only else model,
        move_to_device=False,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},
    )
    if head_only:
        return forward
    if should_compile(spec.config, device, spec.train_files.num_rows, history.epoch):
        forward = CompiledModel(forward, spec.config.local_batch_size, events.send_text)
    return FullModel(model, forward, spec.folder.preprocessing, precision)
