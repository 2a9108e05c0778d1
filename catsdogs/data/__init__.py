"""The only reader: URIs -> Ray datasets of decoded rows.

uint8 pixels travel between stages as one fixed-size binary column, `image`, of S*S*3 bytes a row; a row that could not
be decoded carries zeros there and its reason in `status` and `error`. Where a GPU decodes, JPEGs travel as they are, in
a column of their own, and `image` is null for what has no pixels.
"""

from catsdogs.data.alone import few_actors
from catsdogs.data.decode import DecodeForInference, DecodeForTraining, images_of
from catsdogs.data.held import Held, hold
from catsdogs.data.inference import decoded_batches, decoded_files, decoded_manifests
from catsdogs.data.runtime import (
    CpuShare,
    default_num_actors,
    explain,
    gpus_decode_jpegs,
    num_decoders,
    num_nodes,
    own_error,
    prepare_decoder,
    quiet_datasets,
    resolve_use_gpu,
    share_cpus,
)
from catsdogs.data.training import EpochPlan, epoch_batches

__all__ = [
    "CpuShare",
    "DecodeForInference",
    "DecodeForTraining",
    "EpochPlan",
    "Held",
    "decoded_batches",
    "decoded_files",
    "decoded_manifests",
    "default_num_actors",
    "epoch_batches",
    "explain",
    "few_actors",
    "gpus_decode_jpegs",
    "hold",
    "images_of",
    "num_decoders",
    "num_nodes",
    "own_error",
    "prepare_decoder",
    "quiet_datasets",
    "resolve_use_gpu",
    "share_cpus",
]
