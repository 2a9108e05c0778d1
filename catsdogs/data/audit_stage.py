"""Read files and measure their images, in a Ray Data task: for `audit`, which needs no pixels afterwards.

The child process decodes a file and measures its pixels. Instead of pixels, it returns a record of numbers of a fixed
layout. A malicious image may control the child, so the parent checks the range of every number. The parent computes
what needs no decoder: the SHA-256 of the content, and the format by its first bytes.

Shapes: N rows, R bytes of a record.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catsdogs import storage
from catsdogs.data.decode import DecodeForInference, FileResult, build_decoded_table
from catsdogs.data.decode_budget import DecodeBudget
from catsdogs.images import Decoded, ImageArray, decode_image
from catsdogs.images.formats import sniff
from catsdogs.images.header import read_header
from catsdogs.schema import OK

# The greatest value of each number; the least is 0. An unknown mode, orientation or number of frames is 0.
MAX_ENTROPY = 10.0  # more than log2(768)
MAX_SHARPNESS = 4 * 255.0
LIMITS = {
    "brightness": 1.0,
    "brightness_p5": 1.0,
    "brightness_p99": 1.0,
    "contrast": 1.0,
    "sharpness": MAX_SHARPNESS,
    "entropy": MAX_ENTROPY,
}
MODES = (
    *(None, "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "I;16", "I;16L", "I;16B", "I;16N", "F"),
)
RECORD = np.dtype(
    [("phash", "<u8"), ("has_phash", "u1"), ("mode", "u1"), ("orientation", "u1"), ("frames", "<u4")]
    + [(name, "<f4") for name in LIMITS]
)
MAX_FRAMES = 2**31 - 1
BLOCK_BYTES = 1 << 20  # of rows without pixels: more than all of a task, so that they are one block

Records = npt.NDArray[np.void]  # (N,), RECORD


@dataclass(frozen=True)
class DecodeForAudit(DecodeForInference):
    """Callable for map_batches that reads, decodes and measures a block of files; every file stays a row.

    Instead of `image`, rows have the columns of `RECORD`, null where there is no image, and `format` and `sha256`, null
    where the file could not be read.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 1, RECORD.itemsize)

    @property
    def batch_bytes(self) -> int:
        return BLOCK_BYTES

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        # Before the child is forked, because it opens no files; not at the top, because only this stage needs SciPy.
        import catsdogs.images.measurements  # noqa: F401

        return super().__call__(files)

    def decode(self, image_bytes: bytes, _: int) -> Decoded:
        """Decode a file to its record; runs in the child process."""
        decoded = decode_image(image_bytes, self.max_pixels)
        if decoded.image is None:
            return decoded
        return replace(decoded, image=_build_record(decoded.image, image_bytes))

    def _decode_group(
        self,
        group: Sequence[storage.Fetched],
        outputs: Iterator[tuple[int, ImageArray]],
        budget: DecodeBudget,
        keep_jpegs: bool,
    ) -> list[FileResult]:
        files = super()._decode_group(group, outputs, budget, keep_jpegs)
        return [
            file
            if fetched.content is None
            else file._replace(sha256=hashlib.sha256(fetched.content).digest(), file_format=sniff(fetched.content))
            for file, fetched in zip(files, group, strict=True)
        ]

    def build_rows(
        self, files: pa.Table, results: Sequence[FileResult], images_NHWC: ImageArray, read_s: float
    ) -> pa.Table:
        """Build rows with the measurements as columns; a record that is not valid fails its file."""
        records_N = images_NHWC.reshape(len(results), -1).view(RECORD)[:, 0]
        is_ok_N = np.array([file.result.status == OK for file in results])
        is_measured_N = is_ok_N & _is_valid(records_N)
        checked = [
            file if is_valid else file._replace(result=replace(file.result, status="decoder_crash", error=INVALID))
            for file, is_valid in zip(results, is_measured_N | ~is_ok_N, strict=True)
        ]
        rows = build_decoded_table(files, checked, images_NHWC, read_s).drop_columns(["image", "version", "retries"])
        columns = _build_columns(records_N, is_measured_N) | {
            "format": pa.array([file.file_format for file in results], pa.string()),
            "sha256": pa.array([file.sha256 for file in results], pa.binary()),
        }
        return pa.table({name: rows[name] for name in rows.column_names} | columns)


INVALID = "the decoder sent an invalid result"


def _build_record(image: ImageArray, image_bytes: bytes) -> ImageArray:
    from catsdogs.images.measurements import measure_image  # imported already, see __call__

    measured, header = measure_image(image), read_header(image_bytes)
    record = np.zeros(1, RECORD)
    for name in LIMITS:
        record[name] = getattr(measured, name)
    record["phash"], record["has_phash"] = measured.phash or 0, measured.phash is not None
    record["mode"] = MODES.index(header.mode) if header.mode in MODES else 0
    record["orientation"] = header.orientation or 0
    record["frames"] = min(header.frames or 0, MAX_FRAMES)
    return record.view(np.uint8)


def _is_valid(records_N: Records) -> npt.NDArray[np.bool_]:
    """Whether each number of a record is in its range; NaN is in none."""
    is_valid_N = (records_N["has_phash"] <= 1) & (records_N["mode"] < len(MODES)) & (records_N["orientation"] <= 8)
    is_valid_N &= records_N["frames"] <= MAX_FRAMES
    for name, limit in LIMITS.items():
        is_valid_N &= (records_N[name] >= 0) & (records_N[name] <= limit)
    return is_valid_N


def _build_columns(records_N: Records, is_measured_N: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    def column(name: str, kind: pa.DataType, is_known_N: npt.NDArray[np.bool_]) -> pa.Array:
        return pa.array(records_N[name], kind, mask=~(is_measured_N & is_known_N))

    is_known = {name: records_N[name] > 0 for name in ("has_phash", "orientation", "frames")}
    modes = [MODES[i] if is_measured else None for i, is_measured in zip(records_N["mode"], is_measured_N, strict=True)]
    return {name: column(name, pa.float32(), is_measured_N) for name in LIMITS} | {
        "phash": column("phash", pa.uint64(), is_known["has_phash"]),
        "orientation": column("orientation", pa.int32(), is_known["orientation"]),
        "frames": column("frames", pa.int32(), is_known["frames"]),
        "mode": pa.array(modes, pa.string()),
    }
