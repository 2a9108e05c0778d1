"""The functions `read_images` and `augment_image`, for notebooks. Ray is imported when they are called.

Images are read and decoded in a Ray task, in the child process where every command decodes: files may be hostile.
N images, V views, S side.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from catsdogs.config import TrainConfig
from catsdogs.errors import InputError

if TYPE_CHECKING:  # `import catsdogs` takes less than 0.1 s
    from catsdogs.data import DecodeForInference
    from catsdogs.images import ImageArray


def read_images(paths: Iterable[str], img_size: int = 160) -> "ImageArray":
    """Read a few images; the short side is resized to S, then the centre is cropped.

    Args:
        paths: paths or URIs.
        img_size: S.

    Returns:
        uint8 (N, S, S, 3), RGB.

    Raises:
        InputError: an image cannot be read or decoded.
    """
    from catsdogs.images import MAX_PIXELS, Preprocessing
    from catsdogs.start import import_while_ray_starts

    data = import_while_ray_starts("catsdogs.data")
    preprocessing = Preprocessing(img_size=img_size, crop_pct=1.0)
    return _decode(paths, data.DecodeForInference(preprocessing, MAX_PIXELS, data.FEW_IMAGES))


def augment_image(path: str, config: TrainConfig, num_views: int = 8) -> "ImageArray":
    """Make the views of an image that `train` would make in its first epochs, if it were the first training image.

    Args:
        path: path or URI.
        config: `augment`, `img_size` and `seed` are used.
        num_views: V.

    Returns:
        uint8 (V, S, S, 3), RGB.

    Raises:
        InputError: the image cannot be read or decoded.
    """
    from catsdogs.images import MAX_PIXELS, Preprocessing
    from catsdogs.start import import_while_ray_starts

    data = import_while_ray_starts("catsdogs.data")
    epochs = tuple(range(1, num_views + 1))
    preprocessing = Preprocessing(img_size=config.img_size)
    return _decode([path], data.DecodeForTraining(preprocessing, MAX_PIXELS, 1, config.augment, config.seed, epochs))


def _decode(paths: Iterable[str], stage: "DecodeForInference") -> "ImageArray":
    """Decode all images with a stage: uint8 (N*V, S, S, 3)."""
    import numpy as np

    from catsdogs import data, storage
    from catsdogs.schema import OK

    size = stage.preprocessing.img_size
    images: list[ImageArray] = [np.empty((0, size, size, 3), dtype=np.uint8)]
    for rows in data.decode_in_task(map(storage.absolute, paths), stage):
        for row in rows.select(["path", "status", "error"]).to_pylist():
            if row["status"] != OK:
                raise InputError(f"{row['path']}: {row['status']}, {row['error']}")
        images.append(data.view_images(rows, size))
    return np.concatenate(images)
