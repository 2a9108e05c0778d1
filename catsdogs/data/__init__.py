"""The only reader: URIs -> Ray datasets of decoded rows.

uint8 pixels travel between stages as one fixed-size binary column, `image`, of S*S*3 bytes a row; a row that could not
be decoded carries zeros there and its reason in `status` and `error`. Where a GPU decodes, JPEGs travel as they are, in
a column of their own, and `image` is null for what has no pixels.
"""

from catsdogs.data.alone import without_cluster_actors
from catsdogs.data.decode import DecodeForInference, DecodeForTraining, view_images
from catsdogs.data.decoded_cache import DecodedCache, cache_decoded
from catsdogs.data.inference import iter_decoded_batches, read_and_decode, read_and_decode_manifests
from catsdogs.data.runtime import (
    CpuAllocation,
    allocate_cpus,
    configure_ray_data,
    count_decoders,
    count_nodes,
    default_num_actors,
    gpus_decode_jpegs,
    resolve_use_gpu,
    to_run_error,
    unwrap_ray_error,
    warm_up_decoder,
)
from catsdogs.data.training import EpochPlan, iter_epoch_batches

__all__ = [
    "CpuAllocation",
    "DecodeForInference",
    "DecodeForTraining",
    "DecodedCache",
    "EpochPlan",
    "allocate_cpus",
    "cache_decoded",
    "configure_ray_data",
    "count_decoders",
    "count_nodes",
    "default_num_actors",
    "gpus_decode_jpegs",
    "iter_decoded_batches",
    "iter_epoch_batches",
    "read_and_decode",
    "read_and_decode_manifests",
    "resolve_use_gpu",
    "to_run_error",
    "unwrap_ray_error",
    "view_images",
    "warm_up_decoder",
    "without_cluster_actors",
]
