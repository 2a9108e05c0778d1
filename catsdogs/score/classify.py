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
from catsdogs.saved import Saved

BATCH_SIZE, GPU_BATCH_SIZE = 32, 256
GPU_PROCESSES = 2  # share a GPU, which waits for the Python of one
GPU_CALLS = 2  # at once in each: a batch is decoded while the model computes another
READY_BATCHES = 32  # of decoded images for each model on a CPU: memory does not grow with the number of files


@dataclass(frozen=True)
class ClassifyOptions:
    """How many models run where, and on what."""

    checkpoint: Saved
    precision: str
    num_actors: int
    use_gpu: bool
    share: data.CpuShare
    batch_size: int
    gpu_decodes: bool

    @classmethod
    def of(cls, config: EvaluateConfig | ScoreConfig, model: Saved) -> "ClassifyOptions":
        """Choose from a command's settings and what the cluster has."""
        use_gpu = data.resolve_use_gpu(config.use_gpu, config.num_actors or 1)
        num_actors = config.num_actors or data.default_num_actors(use_gpu)
        return cls(
            checkpoint=model,
            precision=config.precision,
            num_actors=num_actors,
            use_gpu=use_gpu,
            share=data.share_cpus(num_actors * (GPU_PROCESSES if use_gpu else 1)),
            batch_size=config.batch_size or (GPU_BATCH_SIZE if use_gpu else BATCH_SIZE),
            gpu_decodes=use_gpu and data.gpus_decode_jpegs(),
        )

    @property
    def device_name(self) -> str:
        """Where the models run."""
        return "gpu" if self.use_gpu else "cpu"

    @property
    def processes(self) -> int:
        """How many share a device."""
        return GPU_PROCESSES if self.use_gpu else 1

    @property
    def calls(self) -> int:
        """How many batches a process has in hand."""
        return GPU_CALLS if self.use_gpu else 1

    @property
    def slots(self) -> dict[str, int]:
        """How many read, decode and label at once."""
        decoders, calls = data.num_decoders(self.share), self.num_actors * self.processes * self.calls
        return {"read": decoders, "decode": calls if self.gpu_decodes else decoders, "model": calls}

    def stage(self, max_pixels: int) -> data.DecodeForInference:
        """Make the stage before the model's."""
        return data.DecodeForInference(self.checkpoint.preprocessing, max_pixels, self.batch_size, self.gpu_decodes)


class Classifier:
    """A Ray Data actor: decoded rows -> the columns of the output."""

    def __init__(
        self,
        checkpoint_ref: Any,
        stage: data.DecodeForInference,
        precision: str,
        actors_here: int,
        carried: Sequence[str],
        save_embeddings: bool,
    ) -> None:
        import torch  # none of these is above: the driver can do without torch

        from catsdogs import checkpoint, predict
        from catsdogs.data.jpegs import JpegDecoder

        found = checkpoint.unpack(ray.get(checkpoint_ref))
        predict.settle(actors_here)
        device = torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        self._carried = carried
        self._save_embeddings = save_embeddings
        self._class_names = found.class_names
        self._img_size = found.preprocessing.img_size
        died = ray.get_runtime_context().was_current_actor_reconstructed  # perhaps of a file
        self._decoder = JpegDecoder(stage, device, on_device=not died) if stage.passes_jpegs else None
        self._predictions = predict.predictions
        self._predictor, self._engine = predict.checked_predictor(found.model, found.preprocessing, precision, device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Label one batch; beside the output's columns come what is carried, `engine`, and `model_s`, its time."""
        images_NHWC: Any
        if self._decoder is None:
            images_NHWC = data.images_of(rows, self._img_size)
        else:
            rows, images_NHWC = self._decoder(rows)
        began = time.monotonic()
        features_ND = self._predictor.embed(images_NHWC)
        probs_NK = self._predictor.label(features_ND)
        labelled = self._predictions(rows, probs_NK, self._class_names, features_ND if self._save_embeddings else None)
        seconds = (time.monotonic() - began) / max(1, rows.num_rows)
        for name in self._carried:
            labelled = labelled.append_column(name, rows[name])
        labelled = labelled.append_column("engine", pa.array([self._engine] * rows.num_rows, pa.string()))
        return labelled.append_column("model_s", pa.array(np.full(rows.num_rows, seconds, dtype=np.float32)))


def classified(
    decoded: Dataset,
    stage: data.DecodeForInference,
    options: ClassifyOptions,
    carried: Sequence[str] = (),
    save_embeddings: bool = False,
) -> Dataset:
    """Add the model's stage to a dataset of rows that `stage` decodes; a block in, a block out."""
    actors_here = 1 if options.use_gpu else -(-options.num_actors // data.num_nodes())
    constructor_args = (ray.put(options.checkpoint), stage, options.precision, actors_here, carried, save_embeddings)
    if not options.use_gpu:  # decoding is many times faster, and would fill the object store
        ready_bytes = options.num_actors * READY_BATCHES * stage.batch_bytes
        limits = ExecutionResources.for_limits(object_store_memory=ready_bytes)
        decoded.context.execution_options.resource_limits = limits
    return decoded.map_batches_internal(  # without a check of Ray's: on GPUs, it allows no blocks as they come
        Classifier,
        fn_constructor_args=constructor_args,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            size=options.num_actors * options.processes,
            max_concurrent_calls_per_actor=options.calls,
            enable_true_multi_threading=options.calls > 1,
        ),
        num_cpus=options.share.model if options.share.free >= 1 else 0,  # Ray Data's own stages reserve a whole one
        num_gpus=1 / options.processes if options.use_gpu else None,
    )
