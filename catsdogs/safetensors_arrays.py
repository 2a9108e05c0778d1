"""Parse a safetensors file to NumPy arrays, for a driver that has not imported torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from catsdogs.errors import InputError

NUMPY_DTYPES = {  # by safetensors' names
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}

Array = np.ndarray[Any, np.dtype[Any]]


def parse_safetensors_arrays(content: bytes, source: str) -> dict[str, Array]:
    """Parse a file to read-only arrays; bf16 becomes fp32, and a type that NumPy lacks becomes zeros.

    Raises:
        InputError: with `source`.
    """
    try:
        tensors = deserialize(content)
    except SafetensorError as error:
        raise InputError(f"{source} is not a safetensors file: {error}") from error
    return {name: _to_array(tensor) for name, tensor in tensors}


def _to_array(tensor: Mapping[str, Any]) -> Array:
    shape = tuple(tensor["shape"])
    if tensor["dtype"] == "BF16":  # the upper half of fp32
        return (np.frombuffer(tensor["data"], "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if tensor["dtype"] in NUMPY_DTYPES:
        return np.frombuffer(tensor["data"], NUMPY_DTYPES[tensor["dtype"]]).reshape(shape)
    return np.broadcast_to(np.uint8(0), shape)
