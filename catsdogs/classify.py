"""The stage that holds the model: one per actor, on a GPU where there is one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, ExecutionResources

from catsdogs import data
from catsdogs.config import EvaluateConfig, ScoreConfig
from catsdogs.saved import CheckpointFiles

CPU_BATCH_SIZE = 32
GPU_BATCH_SIZE, GPU_BATCH_SIDE = 256, 224  # as many pixels at other sizes, and not more images
ACTORS_PER_GPU = 2  # share a GPU, which waits for the Python of one
GPU_MAX_CONCURRENCY = 2  # that each has in hand: it takes a batch from Ray while the model computes another
MAX_READY_BATCHES = 32  # of decoded images for each model on a CPU: memory does not grow with the number of files


@dataclass(frozen=True)
class ClassifyOptions:
    """How many models run where, and on what."""

    checkpoint: CheckpointFiles
    precision: str
    num_actors: int
    use_gpu: bool
    cpus: data.CpuAllocation
    batch_size: int
    gpu_decodes: bool

    @classmethod
    def from_config(
        cls, config: EvaluateConfig | ScoreConfig, model: CheckpointFiles, allow_gpu_jpegs: bool
    ) -> "ClassifyOptions":
        """Choose from a command's settings and what the cluster has; other than `fastest`, pixels are training's."""
        use_gpu = data.resolve_use_gpu(config.use_gpu, config.num_actors or 1)
        num_actors = config.num_actors or data.default_num_actors(use_gpu)
        return cls(
            checkpoint=model,
            precision=config.precision,
            num_actors=num_actors,
            use_gpu=use_gpu,
            cpus=data.allocate_cpus(num_actors),
            batch_size=config.batch_size or default_batch_size(use_gpu, model.preprocessing.img_size),
            gpu_decodes=allow_gpu_jpegs and use_gpu and data.gpus_decode_jpegs(),
        )

    @property
    def device_name(self) -> str:
        """Where the models run."""
        return "gpu" if self.use_gpu else "cpu"

    @property
    def actors_per_gpu(self) -> int:
        """How many share a device."""
        return ACTORS_PER_GPU if self.use_gpu else 1

    @property
    def max_concurrency(self) -> int:
        """How many batches a process has in hand."""
        return GPU_MAX_CONCURRENCY if self.use_gpu else 1

    @property
    def parallelism(self) -> dict[str, int]:
        """How many read, decode and label at once."""
        decoders = data.count_decoders(self.cpus)
        return {"read": decoders, "decode": decoders, "model": self.num_actors * self.actors_per_gpu}

    def stage(self, max_pixels: int) -> data.DecodeForInference:
        """Make the stage before the model's."""
        return data.DecodeForInference(self.checkpoint.preprocessing, max_pixels, self.batch_size, self.gpu_decodes)


def default_batch_size(use_gpu: bool, img_size: int) -> int:
    """Choose how many images go through a model at once."""
    return max(1, min(GPU_BATCH_SIZE, GPU_BATCH_SIZE * GPU_BATCH_SIDE**2 // img_size**2)) if use_gpu else CPU_BATCH_SIZE


class Classifier:
    """A Ray Data actor: decoded rows -> the columns of the output."""

    def __init__(
        self,
        checkpoint_ref: Any,
        stage: data.DecodeForInference,
        precision: str,
        actors_here: int,
        passthrough: Sequence[str],
        save_embeddings: bool,
    ) -> None:
        from catsdogs import checkpoint, predict  # none of these is above: the driver can do without torch
        from catsdogs.data.gpu_jpegs import JpegDecoder

        found = checkpoint.unpack(ray.get(checkpoint_ref))
        predict.configure_threads_and_malloc(actors_here)
        device = predict.select_device(ray.get_gpu_ids())
        self._carried = passthrough
        self._save_embeddings = save_embeddings
        self._class_names = found.class_names
        self._img_size = found.preprocessing.img_size
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._decoder = JpegDecoder(stage, device, restarted) if stage.gpu_jpegs else None
        self._predictions = predict.build_predictions
        self._predictor, self._device_precision = predict.build_checked_predictor(
            found.model, found.preprocessing, precision, device
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Label one batch; beside the output's columns come what is carried, `engine`, and `model_s`, its time."""
        began = time.monotonic()
        images_NHWC: Any = None  # an array, or a tensor on a GPU
        if self._decoder is None:
            images_NHWC = data.view_images(rows, self._img_size)
        else:
            rows, images_NHWC = self._decoder(rows)
        features_ND = self._predictor.embed(images_NHWC)
        probs_NK = self._predictor.label(features_ND)
        labelled = self._predictions(rows, probs_NK, self._class_names, features_ND if self._save_embeddings else None)
        seconds = (time.monotonic() - began) / max(1, rows.num_rows)
        for name in self._carried:
            labelled = labelled.append_column(name, rows[name])
        labelled = labelled.append_column(
            "device_precision", pa.array([self._device_precision] * rows.num_rows, pa.string())
        )
        return labelled.append_column("model_s", pa.array(np.full(rows.num_rows, seconds, dtype=np.float32)))


def add_classifier(
    decoded: Dataset,
    stage: data.DecodeForInference,
    options: ClassifyOptions,
    passthrough: Sequence[str] = (),
    save_embeddings: bool = False,
) -> Dataset:
    """Add the model's stage to a dataset of rows that `stage` decodes; a block in, a block out."""
    actors_here = 1 if options.use_gpu else -(-options.num_actors // data.count_nodes())
    constructor_args = (
        ray.put(options.checkpoint),
        stage,
        options.precision,
        actors_here,
        passthrough,
        save_embeddings,
    )
    # Ray Data's own stages reserve a whole one.
    num_cpus = options.cpus.model / options.actors_per_gpu if options.cpus.free >= 1 else 0
    if not options.use_gpu:  # decoding is many times faster, and would fill the object store
        ready_bytes = options.num_actors * MAX_READY_BATCHES * stage.batch_bytes
        limits = ExecutionResources.for_limits(object_store_memory=ready_bytes)
        decoded.context.execution_options.resource_limits = limits
    return decoded.map_batches_internal(  # without a check of Ray's: on GPUs, it allows no blocks as they come
        Classifier,
        fn_constructor_args=constructor_args,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            size=options.num_actors * options.actors_per_gpu,
            max_concurrent_calls_per_actor=options.max_concurrency,  # of which one is in the model's stage
        ),
        num_cpus=num_cpus,
        num_gpus=1 / options.actors_per_gpu if options.use_gpu else None,
    )
