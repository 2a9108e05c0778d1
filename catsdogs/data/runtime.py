"""Settings of Ray Data; allocation of CPUs and GPUs to models and decoding tasks."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.data import Dataset
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from catsdogs import local_ray, start
from catsdogs.errors import InputError
from catsdogs.images.decode import import_decoders

# They print a dataset's plan and a trainer's state, which are in Ray's log files, too.
QUIET_LOGGERS = ("ray.data", "ray.train", "ray.tune")

# Ray Data retries a task whose process dies without limit, because machines come and go. If a block kills every
# process, the command ends after this time without a finished block. It is longer than the retries of a download that
# always breaks off (30 attempts of 25 s), and twice as long as a batch of images that all hang (`decode_budget`).
NO_PROGRESS_TIMEOUT_S = 1800.0

UNITS_PER_CPU = 10_000  # Ray counts CPUs in ten-thousandths
GPU_POLL_S = 1

# GPUs with hardware that decodes JPEGs (developer.nvidia.com/nvjpeg). An H100 decodes 25,900 photographs/s, 16 cores
# beside it 8,400 (measured 2026-11). On other GPUs little is gained (pytorch/vision#2786).
JPEG_GPUS = {"A100", "H100", "H200", "B200"}


def configure_ray_data(dataset: Dataset, preserve_order: bool = False) -> Dataset:
    """Configure the `DataContext` of a new dataset, which the stages added to it share."""
    context = dataset.context
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray's wrapper would lose a CatsdogsError between processes
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.execution_options.preserve_order = preserve_order
    return dataset


@contextlib.contextmanager
def quiet_ray_loggers() -> Iterator[None]:
    """Silence the loggers of Ray's libraries while a dataset or a trainer runs. Errors still reach the caller."""
    loggers = [logging.getLogger(name) for name in QUIET_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def without_cluster_actors(on_local_ray: bool | None = None) -> contextlib.AbstractContextManager[None]:
    """Run datasets without the actors that serve a cluster, if Ray is local. Only a driver can omit `on_local_ray`."""
    is_local = not start.on_existing_cluster() if on_local_ray is None else on_local_ray
    return local_ray.without_cluster_actors() if is_local else contextlib.nullcontext()


@dataclass(frozen=True)
class CpuAllocation:
    """CPUs that each model and each decoding task reserves, and the decoding tasks that run on a machine at once."""

    model: float
    decode: float
    num_decoders: int


def allocate_cpus(num_models: int) -> CpuAllocation:
    """Choose reservations with which several commands can share a machine.

    A model keeps its reservation until its command ends, and waits for decoding tasks: if it reserved a CPU, the models
    of two commands could leave none for the decoding of either (ray#44687). So it reserves next to nothing. Nothing at
    all would also allow machines without CPUs; only where a machine has one CPU, Ray Data's own tasks need all of it.

    Decoding tasks leave 0.9 CPUs free for each model, up to all CPUs of a machine but one. They never fill a machine,
    since they wait for models that may not have started. Their reservation differs from that of a model: Ray Data would
    fuse the two stages.
    """
    nodes = _list_nodes()
    smallest = min((node["CPU"] for node in nodes), default=1.0)
    models_per_node = math.ceil(num_models / max(1, len(nodes)))
    for_models = 0.9 * min(float(models_per_node), max(smallest - 1, smallest / 2))
    num_decoders = max(1, int((smallest - for_models) / min(1.0, smallest / 2)))
    decode = (int(smallest * UNITS_PER_CPU) // (num_decoders + 1) + 1) / UNITS_PER_CPU  # one more does not fit
    model = 0.0 if nodes and smallest <= 1 else 1 / UNITS_PER_CPU
    return CpuAllocation(model, decode, num_decoders)


def describe_wait(what: str, num_gpus: int) -> str:
    """Describe what a command waits for: `what`, with the free CPUs and GPUs, or GPUs that Ray does not have."""
    try:
        total, free = ray.cluster_resources(), ray.available_resources()
    except ray.exceptions.RayError:
        return f"waiting for {what}"
    if num_gpus > total.get("GPU", 0):
        found = f"{num_gpus} needed, {total.get('GPU', 0):g} in this Ray"
        return f"waiting for GPUs ({found}); add machines with GPUs, or use --use-gpu false"
    names = [name for name in ("CPU", "GPU") if total.get(name)]
    shares = [f"{round(free.get(name, 0), 1):g} of {total[name]:g} {name}s" for name in names]
    return f"waiting for {what}; free: {' and '.join(shares) or 'no CPUs'}"


def resolve_use_gpu(use_gpu: str, num_models: int) -> bool:
    """Resolve `auto`; raises InputError if there are too few GPUs, unless an existing cluster may add some."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    wanted = use_gpu == "true" or (use_gpu == "auto" and num_gpus > 0)
    if wanted and num_gpus < num_models and not start.on_existing_cluster():
        raise InputError(
            f"--use-gpu {use_gpu}: expected {num_models} GPUs on this machine, one for each model, found {num_gpus}; "
            "lower --num-workers or --num-actors, or use --use-gpu false"
        )
    return wanted


def wait_for_gpu(share: float) -> None:
    """Wait until a share of a GPU is free; an autoscaler sees the request.

    Decoding tasks whose images no model takes keep their CPUs, which commands that have the GPUs need to finish.
    """
    group = placement_group([{"GPU": share}])
    try:
        while not group.wait(GPU_POLL_S):
            pass
    finally:
        remove_placement_group(group)


def gpus_decode_jpegs() -> bool:
    """Return whether every GPU of the cluster has hardware that decodes JPEGs."""
    prefix = "accelerator_type:"
    types = {name.removeprefix(prefix).split("-")[0] for name in ray.cluster_resources() if name.startswith(prefix)}
    return bool(types) and types <= JPEG_GPUS


def count_nodes() -> int:
    """Count the machines that have CPUs."""
    return max(1, len(_list_nodes()))


def min_memory_bytes() -> float:
    """Return the memory, without the object store, of the machine with CPUs that has the least."""
    return min((node.get("memory", 0.0) for node in _list_nodes()), default=0.0)


def _list_nodes() -> list[dict[str, float]]:
    """List the resources of each machine that has CPUs."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def default_num_actors(use_gpu: bool) -> int:
    """Return one model per GPU, else one per machine, which uses all its cores."""
    return max(1, int(ray.cluster_resources().get("GPU", 0))) if use_gpu else count_nodes()


def count_decoders(cpus: CpuAllocation) -> int:
    """Estimate how many decoding tasks run concurrently beside the models."""
    return cpus.num_decoders * count_nodes()


def warm_up_decoder(num_cpus: float) -> None:
    """Import what decoding needs in a Ray process of this machine before its first task: 7 CPU seconds."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    task = ray.remote(_import_stages).options(num_cpus=num_cpus, scheduling_strategy=here, name="import decoders")
    task.remote()


def _import_stages() -> None:
    """Import the decoders; that of this module has imported the stages and Ray Data."""
    import_decoders()
