"""The only reader: URIs -> Ray datasets of decoded rows.

uint8 pixels travel between stages as one fixed-size binary column, `image`, of S*S*3 bytes a row; a row that could not
be decoded carries zeros there and its reason in `status` and `error`.
"""

from catsdogs.data.decode import DecodeForInference, DecodeForTraining, images_of
from catsdogs.data.inference import decoded_batches, decoded_files, decoded_manifests
from catsdogs.data.runtime import (
    CpuShare,
    default_num_actors,
    explain,
    joins_cluster,
    num_decoders,
    num_nodes,
    own_error,
    resolve_use_gpu,
    share_cpus,
    start_ray,
)
from catsdogs.data.training import EpochPlan, epoch_batches

__all__ = [
    "CpuShare",
    "DecodeForInference",
    "DecodeForTraining",
    "EpochPlan",
    "decoded_batches",
    "decoded_files",
    "decoded_manifests",
    "default_num_actors",
    "epoch_batches",
    "explain",
    "images_of",
    "joins_cluster",
    "num_decoders",
    "num_nodes",
    "own_error",
    "resolve_use_gpu",
    "share_cpus",
    "start_ray",
]
