"""Read and decode images with Ray Data.

A decoded row has its pixels in `image`, fixed-size binary of S*S*3 bytes (S pixels a side). A row without pixels has
zeros there, and the reason in `status` and `error`. If a GPU decodes JPEGs, the column `jpeg` has the encoded files,
and `image` is null in rows without pixels.
For models on GPUs, a row of a dataset is a block of such rows (`blocks.py`).
"""

from catsdogs.data.audit_stage import DecodeForAudit
from catsdogs.data.blocks import pack_block, unpack_blocks
from catsdogs.data.datasets import (
    FEW_IMAGES,
    THUMBNAIL,
    EpochPlan,
    decode_images,
    decode_in_task,
    iter_decoded_batches,
    iter_epoch_batches,
    read_and_decode,
    read_and_decode_manifests,
)
from catsdogs.data.decode import DecodeForInference, DecodeForTraining, view_images
from catsdogs.data.full_size import iter_checked_jpegs, iter_full_size
from catsdogs.data.runtime import (
    CpuAllocation,
    allocate_cpus,
    configure_ray_data,
    count_decoders,
    count_nodes,
    default_num_actors,
    describe_wait,
    gpus_decode_jpegs,
    min_memory_bytes,
    quiet_ray_loggers,
    resolve_use_gpu,
    wait_for_gpu,
    warm_up_decoder,
    without_cluster_actors,
)
from catsdogs.data.tasks import map_in_tasks

__all__ = [
    "FEW_IMAGES",
    "THUMBNAIL",
    "CpuAllocation",
    "DecodeForAudit",
    "DecodeForInference",
    "DecodeForTraining",
    "EpochPlan",
    "allocate_cpus",
    "configure_ray_data",
    "count_decoders",
    "count_nodes",
    "decode_images",
    "decode_in_task",
    "default_num_actors",
    "describe_wait",
    "gpus_decode_jpegs",
    "iter_checked_jpegs",
    "iter_decoded_batches",
    "iter_epoch_batches",
    "iter_full_size",
    "map_in_tasks",
    "min_memory_bytes",
    "pack_block",
    "quiet_ray_loggers",
    "read_and_decode",
    "read_and_decode_manifests",
    "resolve_use_gpu",
    "unpack_blocks",
    "view_images",
    "wait_for_gpu",
    "warm_up_decoder",
    "without_cluster_actors",
]
