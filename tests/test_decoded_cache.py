"""Cached images give the same batches as their files, without reading the files."""

import io

import numpy as np
import pyarrow as pa
import pytest
from conftest import encode, solid
from PIL import Image

from catsdogs import data, storage
from catsdogs.data import decoded_cache as cache_module
from catsdogs.data import runtime
from catsdogs.images import Preprocessing
from catsdogs.progress import StageProgress, silent
from catsdogs.schema import LABELLED_FILES
from catsdogs.start import start_ray

PREPROCESSING = Preprocessing(img_size=32)
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
    """List 50 small images, one rotated by EXIF, one damaged, one too large to be cached, and one missing."""
    start_ray()
    contents = {f"{i:02}.jpg": encode(solid((i * 5, 200 - i, 90))) for i in range(50)}
    contents |= {
        "rotated.jpg": rotated_jpeg(),
        "damaged.jpg": noisy_jpeg(50, 50)[:200],
        "large.jpg": noisy_jpeg(600, 30),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    entries = [*storage.Listing(str(tmp_path)), storage.Entry(str(tmp_path / "gone.jpg"), len(RESTORED), None)]
    columns = [[getattr(entry, name) for entry in entries] for name in ("path", "size_bytes", "version")]
    return pa.table([*columns, [i % 2 for i in range(len(entries))]], schema=LABELLED_FILES)


def epoch_batches(files, epoch, kind, decoded_cache=None):
    plan = data.EpochPlan(num_rows=files.num_rows, seed=3, batch_size=16, rank=0, world_size=1)
    batches = list(data.iter_epoch_batches(files, plan, epoch, PREPROCESSING, kind, 1.0, decoded_cache))
    return [batch.select(["path", "true_index", "row", "status", "error", "image"]) for batch in batches]


@pytest.mark.parametrize("kind", ["none", "light"])
def test_cached_images_give_the_same_batches_as_files(files, kind):
    events = []
    decoded_cache = data.cache_decoded(files, 1.0, events.append)
    assert events[-1] == StageProgress("decode", files.num_rows, files.num_rows)
    for epoch in (1, 2):
        expected, found = epoch_batches(files, epoch, kind), epoch_batches(files, epoch, kind, decoded_cache)
        assert [batch.num_rows for batch in found] == [16, 16, 16, 6]
        assert [batch.to_pylist() for batch in found] == [batch.to_pylist() for batch in expected]


def test_later_epochs_read_only_files_that_are_not_cached(files, tmp_path):
    decoded_cache = data.cache_decoded(files, 1.0, silent)
    expected = pa.concat_tables(epoch_batches(files, 1, "light"))
    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    found = pa.concat_tables(epoch_batches(files, 1, "light", decoded_cache))
    changed = [
        (row["path"].rpartition("/")[2], now["status"])
        for row, now in zip(expected.to_pylist(), found.to_pylist(), strict=True)
        if row != now
    ]
    assert changed == [("large.jpg", "not_found")]


def test_a_missing_file_is_read_once_it_is_there(files, tmp_path):
    decoded_cache = data.cache_decoded(files, 1.0, silent)
    (tmp_path / "gone.jpg").write_bytes(RESTORED)
    statuses = pa.concat_tables(epoch_batches(files, 1, "none", decoded_cache)).sort_by("row")["status"].to_pylist()
    assert statuses == ["ok" if "damaged" not in path else "truncated" for path in files["path"].to_pylist()]


def test_nothing_is_cached_if_it_may_not_fit(files, monkeypatch):
    room = files.num_rows * cache_module.MAX_SIDE**2 * 3 / cache_module.MAX_STORE_SHARE
    monkeypatch.setattr(cache_module, "min_object_store_bytes", lambda: room - 1)
    assert data.cache_decoded(files, 1.0, silent) is None
    monkeypatch.setattr(cache_module, "min_object_store_bytes", lambda: room + 1)
    assert data.cache_decoded(files, 1.0, silent) is not None


def test_the_smallest_object_store_decides(monkeypatch):
    nodes = [{"CPU": 8, "object_store_memory": 5e9}, {"CPU": 2, "object_store_memory": 2e9}, {"object_store_memory": 1}]
    monkeypatch.setattr(runtime.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert runtime.min_object_store_bytes() == 2e9
