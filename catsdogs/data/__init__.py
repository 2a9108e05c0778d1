"""The only reader: URIs -> Ray datasets of decoded rows.

uint8 pixels travel between stages as one fixed-size binary column, `image`, of S*S*3 bytes a row; a row that could not
be decoded carries zeros there and its reason in `status` and `error`.
"""

from catsdogs.data.decode import DecodeForInference, images_of
from catsdogs.data.inference import decode_blocks, decoded_batches, inference_blocks, manifest_dataset
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
    "EpochPlan",
    "decode_blocks",
    "decoded_batches",
    "default_num_actors",
    "epoch_batches",
    "explain",
    "images_of",
    "inference_blocks",
    "joins_cluster",
    "manifest_dataset",
    "num_decoders",
    "num_nodes",
    "own_error",
    "resolve_use_gpu",
    "share_cpus",
    "start_ray",
]
