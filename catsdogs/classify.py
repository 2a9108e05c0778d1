"""Stage 3, classify: the model in Ray actors, on GPUs if there are any; `score` and `evaluate` share it.

Shapes: N rows, H, W, C channels, K classes, D features.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, ExecutionResources

from catsdogs import data
from catsdogs.checkpoint import CheckpointFiles
from catsdogs.config import EvaluateConfig, ScoreConfig
from catsdogs.decisions import Decisions
from catsdogs.predictions import FloatArray, build_predictions

logger = logging.getLogger(__name__)
CPU_BATCH_SIZE = 32
GPU_BATCH_SIZE, GPU_BATCH_SIDE = 256, 224  # larger images reduce it to the same number of pixels
# Blocks that the process of a GPU classifies at once, each in a thread with a CUDA stream: one is decoded while another
# is classified. Several processes would only take turns on the GPU.
GPU_THREADS = 3
MAX_READY_BATCHES = 32  # decoded batches that wait for each model on a CPU


@dataclass(frozen=True)
class ClassifyOptions:
    """How many models run, on which devices and with which batch size. Each has an actor, on GPUs also a GPU."""

    checkpoint: CheckpointFiles
    precision: str
    num_models: int
    use_gpu: bool
    cpus: data.CpuAllocation
    batch_size: int
    gpu_decodes: bool

    @classmethod
    def from_config(
        cls, config: EvaluateConfig | ScoreConfig, checkpoint: CheckpointFiles, allow_gpu_jpegs: bool
    ) -> "ClassifyOptions":
        """Choose the options by the settings of a command and the resources of the cluster.

        Args:
            allow_gpu_jpegs: decode JPEGs on GPUs that have the hardware; its pixels differ slightly from training's.
        """
        use_gpu = data.resolve_use_gpu(config.use_gpu, config.num_actors or 1)
        num_models = config.num_actors or data.default_num_actors(use_gpu)
        return cls(
            checkpoint=checkpoint,
            precision=config.precision,
            num_models=num_models,
            use_gpu=use_gpu,
            cpus=data.allocate_cpus(num_models),
            batch_size=config.batch_size or default_batch_size(use_gpu, checkpoint.preprocessing.img_size),
            gpu_decodes=allow_gpu_jpegs and use_gpu and data.gpus_decode_jpegs(),
        )

    @property
    def threads_per_model(self) -> int:
        """Number of blocks that a model classifies at the same time."""
        return GPU_THREADS if self.use_gpu else 1

    @property
    def parallelism(self) -> dict[str, int]:
        """Number of processes that read and decode, and of threads that classify."""
        decoders = data.count_decoders(self.cpus)
        return {"read": decoders, "decode": decoders, "model": self.num_models * self.threads_per_model}

    def build_decode_stage(self, max_pixels: int) -> data.DecodeForInference:
        """Build the stage that reads and decodes the batches of `Classifier`."""
        return data.DecodeForInference(
            self.checkpoint.preprocessing,
            max_pixels,
            self.batch_size,
            gpu_jpegs=self.gpu_decodes,
            large_blocks=self.use_gpu,
        )

    def describe_start(self) -> str:
        """Describe the models that a command starts."""
        device = "gpu" if self.use_gpu else "cpu"
        return f"starting {self.num_models} model replica{'s' * (self.num_models != 1)} on {device}"

    def describe_wait(self) -> str:
        """Describe what a command waits for that gets no batch."""
        return data.describe_wait("images to be read, decoded and classified", self.num_models if self.use_gpu else 0)

    def wait_for_device(self) -> None:
        """Wait until a model can start, if other commands use all GPUs."""
        if self.use_gpu:
            data.wait_for_gpu(1)


def default_batch_size(use_gpu: bool, img_size: int) -> int:
    """Choose the batch size for a device."""
    if not use_gpu:
        return CPU_BATCH_SIZE
    return max(1, min(GPU_BATCH_SIZE, GPU_BATCH_SIZE * GPU_BATCH_SIDE**2 // img_size**2))


class ExtraColumns(NamedTuple):
    """Columns beside those of PREDICTIONS: decoded ones that are copied unchanged, features, decisions."""

    passthrough: Sequence[str] = ()
    save_embeddings: bool = False
    decisions: Decisions | None = None


class Classifier:
    """Callable class for `map_batches`: converts decoded rows to the columns of the output.

    `__init__` stores an exception, and `__call__` raises it: Ray 2.60 delivers an exception of `__init__` as text only,
    after 8 to 30 s.
    """

    def __init__(
        self,
        checkpoint_ref: Any,
        decode_stage: data.DecodeForInference,
        precision: str,
        cpu_models_per_node: int,
        columns: ExtraColumns,
    ) -> None:
        self._decode_stage = decode_stage
        self._columns = columns
        self._failure: Exception | None = None
        try:
            from catsdogs import predict, process_setup  # not at the top: the driver does not import torch
            from catsdogs.data.gpu_jpegs import JpegDecoder
            from catsdogs.images.tensors import DeviceStreams

            files: CheckpointFiles = ray.get(checkpoint_ref)
            process_setup.configure_threads_and_malloc(cpu_models_per_node)
            device = process_setup.select_device(ray.get_gpu_ids())
            self._class_names = files.class_names
            self._streams = DeviceStreams(device, GPU_THREADS)
            is_restarted = ray.get_runtime_context().was_current_actor_reconstructed
            self._decoder = JpegDecoder(decode_stage, device, is_restarted) if decode_stage.gpu_jpegs else None
            self._predictor, self._device_precision = predict.build_checked_predictor(
                files.load_state_dict(), files.preprocessing, precision, device
            )
        except Exception as error:
            logger.debug("the classifier did not start", exc_info=True)
            self._failure = error

    def __call__(self, blocks: pa.Table) -> pa.Table:
        """Classify a block; threads may call it at the same time.

        Args:
            blocks: decoded rows; `image` is read-only, a view into Ray's object store. With `large_blocks`, a packed
                block of such rows, which is classified in batches.

        Returns:
            The columns of the output, the `passthrough` columns, `device_precision`, and `model_s`: the seconds of the
            batch divided by its rows. With `large_blocks`, packed.
        """
        if self._failure is not None:
            raise self._failure
        if not self._decode_stage.large_blocks:
            return self._classify_batch(blocks)
        (rows,) = data.unpack_blocks(blocks)
        starts = range(0, rows.num_rows, self._decode_stage.batch_size)
        with self._streams.reserve():
            batches = [self._classify_batch(rows.slice(start, self._decode_stage.batch_size)) for start in starts]
        return data.pack_block(pa.concat_tables(batches).combine_chunks())

    def _classify_batch(self, rows: pa.Table) -> pa.Table:
        start_s = time.monotonic()
        rows, probs_NK, features_ND = self._predict(rows)
        predictions = build_predictions(rows, probs_NK, self._class_names, features_ND, self._columns.decisions)
        for name in self._columns.passthrough:
            predictions = predictions.append_column(name, rows[name])
        device_precisions = pa.array([self._device_precision] * rows.num_rows, pa.string())
        seconds = (time.monotonic() - start_s) / max(1, rows.num_rows)
        model_s = pa.array(np.full(rows.num_rows, seconds, dtype=np.float32))
        return predictions.append_column("device_precision", device_precisions).append_column("model_s", model_s)

    def _predict(self, rows: pa.Table) -> tuple[pa.Table, FloatArray, FloatArray | None]:
        """Decode what is encoded, and compute probabilities; on request features, too."""
        if self._decoder is None:
            images_NHWC = data.view_images(rows, self._decode_stage.preprocessing.img_size)
            return rows, *self._predictor.predict(images_NHWC, self._columns.save_embeddings)
        batch = self._decoder.decode(rows)
        outputs = self._predictor.predict(batch.images_NHWC, self._columns.save_embeddings)
        completed = self._decoder.complete(batch)
        if completed is None:
            return batch.rows, *outputs
        return completed.rows, *self._predictor.predict(completed.images_NHWC, self._columns.save_embeddings)


def add_classifier(
    decoded: Dataset,
    decode_stage: data.DecodeForInference,
    options: ClassifyOptions,
    passthrough: Sequence[str] = (),
    save_embeddings: bool = False,
    decisions: Decisions | None = None,
) -> Dataset:
    """Add the classifier to a dataset that `decode_stage` decodes; each block becomes one block."""
    cpu_models_per_node = 1 if options.use_gpu else -(-options.num_models // data.count_nodes())
    checkpoint_ref = ray.put(options.checkpoint)
    if not options.use_gpu:  # decoding is many times faster than the model: without a limit it fills the object store
        ready_bytes = options.num_models * MAX_READY_BATCHES * decode_stage.batch_bytes
        limits = ExecutionResources.for_limits(object_store_memory=ready_bytes)
        decoded.context.execution_options.resource_limits = limits
    return decoded.map_batches(
        Classifier,
        fn_constructor_args=(
            checkpoint_ref,
            decode_stage,
            options.precision,
            cpu_models_per_node,
            ExtraColumns(passthrough, save_embeddings, decisions),
        ),
        batch_size=1 if decode_stage.large_blocks else None,  # a packed block is one row; others are batches already
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            size=options.num_models,
            max_concurrent_calls_per_actor=options.threads_per_model,
            enable_true_multi_threading=options.use_gpu,
        ),
        num_cpus=options.cpus.model,
        num_gpus=1 if options.use_gpu else None,
    )


def iter_predictions(classified: Dataset, name: str) -> Iterator[pa.Table]:
    """Run a dataset of `add_classifier` under a name, which Ray's dashboard shows; yield the rows of each block."""
    classified.set_name(name)
    # A block of predictions is small: to fetch it ahead would only take more of the driver.
    for blocks in classified.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from data.unpack_blocks(blocks)
