"""Resident images give the batches of their files within one level, without reading the files. The device is a CPU."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import encode, solid
from PIL import Image
from workers import build_train_worker

from catsdogs import storage
from catsdogs.config import TrainConfig
from catsdogs.data import full_size
from catsdogs.images.torch_decoders import decode_jpegs
from catsdogs.labels import LabelledFiles
from catsdogs.progress import silent
from catsdogs.schema import LABELLED_FILES
from catsdogs.start import start_ray
from catsdogs.train import resident
from catsdogs.train.inputs import ImageInputs
from catsdogs.train.resident import Room, measure_room

RESTORED = encode(solid((1, 2, 3)))  # a file that is missing at first


def noisy_jpeg(width: int, height: int, **options: object) -> bytes:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return noisy_jpeg(60, 40, exif=exif)


@pytest.fixture
def files(ray_cluster, tmp_path):
    """List 50 small images, one rotated by EXIF, one damaged, one too large to be kept decoded, and one missing."""
    start_ray()
    contents = {f"{i:02}.jpg": encode(solid((i * 5, 200 - i, 90))) for i in range(50)}
    contents |= {
        "rotated.jpg": rotated_jpeg(),
        "damaged.jpg": noisy_jpeg(50, 50)[:200],
        "large.jpg": noisy_jpeg(1100, 1000),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    entries = [*storage.Listing(str(tmp_path)), storage.Entry(str(tmp_path / "gone.jpg"), len(RESTORED), None)]
    columns = [[getattr(entry, name) for entry in entries] for name in ("path", "size_bytes", "version")]
    return pa.table([*columns, [i % 2 for i in range(len(entries))]], schema=LABELLED_FILES)


def build_inputs(files, augment, room):
    labelled = LabelledFiles(("a", "b"), files)
    config = TrainConfig(data_dir="d", img_size=32, batch_size=16, augment=augment, seed=3, precision="fp32")
    return ImageInputs(build_train_worker(config, labelled, labelled, silent), room)


def compare_images(images_NHWC, others_NHWC):
    """Return the largest difference to the most similar of the others, since resident images come first."""
    assert images_NHWC.shape == others_NHWC.shape
    differences = (images_NHWC[:, None].int() - others_NHWC[None].int()).abs().amax(dim=(2, 3, 4))
    return differences.amin(dim=1).max()


@pytest.fixture(scope="module")
def expected():
    """The batches of two epochs without resident images, by augmentation."""
    return {}


@pytest.mark.parametrize("room", [Room(1e9, 0), Room(0, 1e9), Room(40_000, 1e9), Room(40_000, 0)])
@pytest.mark.parametrize("augment", ["none", "light"])
def test_resident_images_give_the_batches_of_the_files(files, expected, room, augment, monkeypatch):
    monkeypatch.setattr(full_size, "TASK_ROWS", 8)  # so that some of the tasks fill the room
    if augment not in expected:
        inputs = build_inputs(files, augment, Room(0, 0))
        expected[augment] = {epoch: list(inputs.iter_batches(epoch)) for epoch in (1, 2)}
    found = build_inputs(files, augment, room)
    for epoch in (1, 2):
        for one, other in zip(expected[augment][epoch], found.iter_batches(epoch), strict=True):
            assert compare_images(one[0], other[0]) <= 1
            assert one[1].sort().values.equal(other[1].sort().values)


def test_later_epochs_read_only_files_that_are_not_resident(files, tmp_path):
    inputs = build_inputs(files, "light", Room(1e9, 1e9))
    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    sizes = [len(targets_N) for _, targets_N in inputs.iter_batches(1)]
    assert sum(sizes) == files.num_rows - 2  # the damaged and the missing one


def test_a_missing_file_is_read_once_it_is_there(files, tmp_path):
    inputs = build_inputs(files, "none", Room(1e9, 1e9))
    (tmp_path / "gone.jpg").write_bytes(RESTORED)
    assert sum(len(targets_N) for _, targets_N in inputs.iter_batches(1)) == files.num_rows - 1


def test_a_jpeg_that_the_device_refuses_is_decoded_on_the_cpu(files, monkeypatch):
    expected = [images_NHWC for images_NHWC, _ in build_inputs(files, "none", Room(0, 1e9)).iter_batches(1)]
    inputs, calls = build_inputs(files, "none", Room(0, 1e9)), []

    def refuse_every_other_time(sources, device):
        calls.append(len(sources))
        if len(calls) % 2:
            raise RuntimeError("refused")
        return decode_jpegs(sources, device)

    monkeypatch.setattr(resident, "decode_jpegs", refuse_every_other_time)
    for one, (other, _) in zip(expected, inputs.iter_batches(1), strict=True):
        assert torch.equal(one, other)
    assert calls


def test_a_cpu_keeps_no_images(files):
    worker = build_train_worker(TrainConfig(data_dir="d"), *[LabelledFiles(("a", "b"), files)] * 2, silent)
    assert measure_room(worker) == Room(0, 0)
