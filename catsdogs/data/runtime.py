"""Set Ray Data's ways; share a cluster's CPUs between models and the tasks that feed them."""

import importlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.start import on_existing_cluster

# Ray's own lines about a dataset's plan and a trainer's state would drown ours; its logs keep them.
QUIET_LOGGERS = ("ray.data", "ray.train", "ray.tune")

# Ray Data retries a task whose process dies for ever, which is right when machines come and go. What ends a block that
# never gets through is this time without any finished one: longer than a store's patience, a key that always breaks
# off (30 tries of 25 s), and a block of images that all hang (33 times 30 s).
NO_PROGRESS_TIMEOUT_S = 1800.0

# NVIDIA's for data centres since the A100 (developer.nvidia.com/nvjpeg). An H100 decodes 25,900 photographs/s, 16 cores
# beside it decode and resize 8,400 (2026-11); without such hardware little is gained (pytorch/vision#2786).
JPEG_GPUS = {"A100", "H100", "H200", "B200"}


def configure_ray_data() -> None:
    """Show no progress of Ray Data's own in this process; ours is told by who runs the dataset."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray's own would lose ours on the way between processes
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class CpuAllocation:
    """CPUs that each model process and each decoding task reserves, and what models leave free on their machine."""

    model: float
    decode: float
    free: float


def allocate_cpus(num_models: int) -> CpuAllocation:
    """Reserve less than all CPUs of a machine for models, or what feeds them would never be scheduled (ray#44687).

    A model reserves less than one CPU whatever its threads: the reservation is for scheduling, threads are set apart.
    Never as much as a decoding task: Ray Data fuses neighbours that reserve the same, and decoding would then wait
    for the model in one process.
    """
    smallest = min((cpus for node in ray.nodes() if (cpus := _cpus(node))), default=1.0)
    here = math.ceil(num_models / count_nodes())
    models = 0.9 * min(float(here), max(smallest - 1, smallest / 2))
    model = max(1e-4, math.floor(models / here * 1e4) / 1e4)  # Ray counts in ten-thousandths
    return CpuAllocation(model=model, decode=min(1.0, smallest / 2), free=smallest - model * here)


def resolve_use_gpu(use_gpu: str, num_models: int) -> bool:
    """Choose GPUs where the cluster has them; a cluster that was joined may still grow some.

    Raises:
        InputError: asked for GPUs that will never come.
    """
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    wanted = use_gpu == "true" or (use_gpu == "auto" and num_gpus > 0)
    if wanted and num_gpus < num_models and not on_existing_cluster():
        raise InputError(
            f"--use-gpu {use_gpu}: expected {num_models} GPUs on this machine, one for each model, found {num_gpus}; "
            "lower --num-workers or --num-actors, or use --use-gpu false"
        )
    return wanted


def gpus_decode_jpegs() -> bool:
    """Whether all GPUs of the cluster are of kinds with a decoder for JPEGs in hardware."""
    prefix = "accelerator_type:"
    kinds = {name.removeprefix(prefix).split("-")[0] for name in ray.cluster_resources() if name.startswith(prefix)}
    return bool(kinds) and kinds <= JPEG_GPUS


def count_nodes() -> int:
    """Count the machines of the cluster that have CPUs for our tasks."""
    return max(1, len([node for node in ray.nodes() if _cpus(node)]))


def min_object_store_bytes() -> float:
    """Find the least object store of a machine that has CPUs for our tasks, in bytes."""
    return min((node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if _cpus(node)), default=0.0)


def _cpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("CPU", 0)) if node["Alive"] else 0.0


def default_num_actors(use_gpu: bool) -> int:
    """Run one model per GPU, or one per machine, which takes all its cores."""
    return max(1, int(ray.cluster_resources().get("GPU", 0))) if use_gpu else count_nodes()


def warm_up_decoder(num_cpus: float) -> None:
    """Let a process of Ray's on this machine import what decoding takes, which is then at hand: 7 s of a core.

    Args:
        num_cpus: that each decoding task reserves.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ray.remote(_import_decoder).options(num_cpus=num_cpus, scheduling_strategy=here).remote()


def _import_decoder() -> None:
    importlib.import_module("catsdogs.images.augment")


def count_decoders(share: CpuAllocation) -> int:
    """Estimate how many decoding tasks run at once beside the models."""
    return max(1, int(share.free / share.decode)) * count_nodes()


def unwrap_ray_error(error: BaseException) -> CatsdogsError | None:
    """Find the error that one of our stages raised in what Ray makes of it."""
    cause: BaseException | None = error
    while cause is not None:
        inner: BaseException | None = getattr(cause, "cause", None) or getattr(cause, "base_exc", None)
        if isinstance(cause, CatsdogsError) and inner is None:
            return type(cause)(str(cause).splitlines()[0])  # Ray Data adds lines on retries
        cause = inner or cause.__cause__
    return None


def to_run_error(error: BaseException, what: str, kept: str) -> CatsdogsError:
    """Find the error that one of our stages raised in what Ray makes of it; else say what Ray says."""
    own = unwrap_ray_error(error)
    if own is not None:
        return type(own)(f"{own}; {kept}")
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return RunError(f"{what} failed: {reason[-1]}; {kept}")
