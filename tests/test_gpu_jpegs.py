"""JPEGs decoded on the device of the model: the rows and nearly the pixels of the sandbox. Here the device is a CPU."""

import io
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from conftest import encode, solid
from PIL import Image

from catsdogs import data, storage
from catsdogs.classify import default_batch_size
from catsdogs.data import decode as decode_module
from catsdogs.data import gpu_jpegs
from catsdogs.data.gpu_jpegs import JpegDecoder
from catsdogs.images import Preprocessing, decode_image, read_gpu_decodable_size
from catsdogs.images.tensors import DeviceStreams, crop_centre, resize_tensors
from catsdogs.images.torch_decoders import decode_jpegs
from catsdogs.schema import FILES

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(img_size=32)


def smooth(width, height):
    """Draw smooth gradients, on which decoders differ little."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(smooth(60, 40), exif=exif)


def with_damaged_exif():
    return (
        with_orientation(1).replace(b"Exif\0\0II*\0", b"Exif\0\0II*\xff").replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\xff*")
    )


def segment(content, marker):
    """Return the file without a segment, and the segment."""
    at = content.index(marker)
    end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
    return content[:at] + content[end:], content[at:end]


def late(content, marker):
    """Move a segment after the frame header, where libjpeg still reads it."""
    rest, moved = segment(content, marker)
    return rest.replace(b"\xff\xda", moved + b"\xff\xda", 1)


def twice(content, marker):
    _, found = segment(content, marker)
    return content.replace(found, found + found, 1)


def broken_inside():
    """Damage a file where only a decoder notices: an impossible Huffman table."""
    content = bytearray(jpeg(smooth(60, 40)))
    at = content.index(b"\xff\xc4") + 5
    content[at : at + 16] = b"\xff" * 16
    return bytes(content)


PLAIN = {
    "small.jpg": jpeg(smooth(60, 40)),
    "full-colour.jpg": jpeg(smooth(100, 333), subsampling=0),
    "upright.jpg": with_orientation(1),
    "broken-inside.jpg": broken_inside(),
    "half-with-end.jpg": jpeg(smooth(60, 40))[:-60] + b"\xff\xd9",
}
OTHERS = {
    "marker-inside.jpg": jpeg(smooth(60, 40))[:-20] + b"\xff\xc0" + jpeg(smooth(60, 40))[-18:],
    "progressive.jpg": jpeg(smooth(60, 40), progressive=True),
    "turned-late.jpg": late(with_orientation(6), b"\xff\xe1"),
    "two-exifs.jpg": twice(with_orientation(1), b"\xff\xe1"),
    "gray.jpg": jpeg(smooth(60, 40).convert("L")),
    "rgb.jpg": jpeg(smooth(60, 40), keep_rgb=True),
    "cmyk.jpg": jpeg(smooth(60, 40).convert("CMYK")),
    "turned.jpg": with_orientation(6),
    "damaged-exif.jpg": with_damaged_exif(),
    "cut.jpg": jpeg(smooth(60, 40))[:-9],
    "strip.jpg": jpeg(smooth(990, 30)),
    "large.jpg": jpeg(smooth(1200, 900)),
    "picture.png": encode(smooth(60, 40), "PNG"),
    "empty.jpg": b"",
    "junk.jpg": b"junk",
}
MAX = 10**6  # pixels; large.jpg has more


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_jpeg_is_gpu_decodable(name):
    assert read_gpu_decodable_size(PLAIN[name], MAX) == Image.open(io.BytesIO(PLAIN[name])).size


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_file_is_not_gpu_decodable(name):
    assert read_gpu_decodable_size(OTHERS[name], MAX) is None


def test_cut_and_damaged_files_do_not_break_the_header_reader():
    content = with_orientation(1)
    assert all(read_gpu_decodable_size(content[:length], MAX) is None for length in range(len(content)))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(content)
        for at in rng.integers(2, 700, 3):
            damaged[at] = rng.integers(256)
        size = read_gpu_decodable_size(bytes(damaged), MAX)
        decoded = decode_image(bytes(damaged), MAX)
        assert size is None or decoded.status != "ok" or (decoded.width, decoded.height) == size


@pytest.mark.parametrize("size", [(60, 40), (41, 67), (500, 374), (32, 32), (33, 900)])
def test_the_device_computes_the_preprocessing(size):
    content = jpeg(smooth(*size), quality=95)
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    images = decode_jpegs([encoded], CPU)
    resizes = [crop_centre(image, PREPROCESSING.resize_size, PREPROCESSING.img_size) for image in images]
    (view,) = resize_tensors(resizes, PREPROCESSING.img_size).numpy()
    expected = PREPROCESSING(np.asarray(Image.open(io.BytesIO(content))))
    assert np.abs(view.astype(int) - expected).max() <= 1


@pytest.fixture
def files(tmp_path):
    for name, content in (PLAIN | OTHERS).items():
        (tmp_path / name).write_bytes(content)
    entries = [*storage.Listing(str(tmp_path)), storage.Entry(str(tmp_path / "gone.jpg"), 5, None)]
    return pa.table([[getattr(entry, name) for entry in entries] for name in FILES.names], schema=FILES)


def stage(gpu_jpegs):
    return data.DecodeForInference(PREPROCESSING, MAX, batch_size=8, gpu_jpegs=gpu_jpegs)


def decode(decoder, rows):
    batch = decoder.decode(rows)
    return decoder.complete(batch) or batch


def decode_all(files):
    decoder = JpegDecoder(stage(True), CPU, restarted=False)
    return [decode(decoder, rows) for rows in stage(True)(files)]


@pytest.mark.parametrize("restarted", [False, True])
def test_rows_and_pixels_equal_those_of_the_sandbox(files, restarted, monkeypatch):
    decoded_on_device = []

    def decode_and_record(encoded, *given):
        decoded_on_device.extend(content.numpy().tobytes() for content in encoded)
        return decode_jpegs(encoded, *given)

    monkeypatch.setattr(gpu_jpegs, "decode_jpegs", decode_and_record)
    decoder = JpegDecoder(stage(True), CPU, restarted)
    num_rows = 0
    for encoded, expected_rows in zip(stage(True)(files), stage(False)(files), strict=True):
        batch = decode(decoder, encoded)
        names = [name for name in expected_rows.column_names if name not in ("image", "read_s", "decode_s")]
        assert batch.rows.select(names).equals(expected_rows.select(names))
        expected = data.view_images(expected_rows, PREPROCESSING.img_size)
        assert np.abs(batch.images_NHWC.numpy().astype(int) - expected).max() <= (0 if restarted else 1)
        num_rows += batch.rows.num_rows
    assert num_rows == len(PLAIN) + len(OTHERS) + 1
    assert set(decoded_on_device) == (set() if restarted else set(PLAIN.values()))


def test_a_batch_takes_the_bytes_of_its_files_and_no_empty_pixels(files):
    tables = list(stage(True)(files))
    pixels = PREPROCESSING.img_size**2 * 3
    decoded = sum(column is not None for table in tables for column in table["image"].to_pylist())
    jpegs_bytes = sum(len(content) for content in PLAIN.values())
    assert decoded == sum(status == "ok" for table in tables for status in table["status"].to_pylist()) - len(PLAIN)

    num_bytes = sum(table.select(["image", "jpeg"]).nbytes for table in tables)
    assert num_bytes == pytest.approx(decoded * pixels + jpegs_bytes, rel=0.05)


def test_the_device_decodes_from_the_memory_of_the_rows(files, monkeypatch):
    found = []
    monkeypatch.setattr(gpu_jpegs, "decode_jpegs", lambda *given: found.extend(given[0]) or decode_jpegs(*given))
    for batch in stage(True)(files):
        (packed,) = data.unpack_blocks(data.pack_block(batch))
        content = packed["jpeg"].chunk(0).buffers()[2]
        JpegDecoder(stage(True), CPU, restarted=False).decode(packed)
        while found:
            assert content.address <= found.pop().data_ptr() < content.address + content.size


def test_files_that_may_lack_data_are_decoded_after_the_model(files, monkeypatch):
    """Until then no thread waits for the device."""
    requests = []
    sandbox = gpu_jpegs.decode_in_subprocess
    monkeypatch.setattr(gpu_jpegs, "decode_in_subprocess", lambda *given: requests.extend(given[1]) or sandbox(*given))
    decoder = JpegDecoder(stage(True), CPU, restarted=False)
    batches = [decoder.decode(rows) for rows in stage(True)(files)]
    assert [request.image_bytes for request in requests] == [PLAIN["broken-inside.jpg"]]
    completed = [decoder.complete(batch) for batch in batches]
    assert [request.image_bytes for request in requests[1:]] == [PLAIN["half-with-end.jpg"]]
    assert sum(batch is not None for batch in completed) == 1


def test_threads_wait_for_a_free_stream():
    streams, inside, most = DeviceStreams(CPU, num_threads=2), threading.Semaphore(2), []

    def use_stream(_):
        with streams.reserve():
            most.append(inside.acquire(blocking=False))
            time.sleep(0.01)
            inside.release()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use_stream, range(16)))
    assert most == [True] * 16  # never a third at once


def test_many_pixels_are_decoded_in_groups(files, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_jpegs, "MAX_GPU_PIXELS", 60 * 40)
    monkeypatch.setattr(gpu_jpegs, "decode_jpegs", lambda *given: calls.append(len(given[0])) or decode_jpegs(*given))
    for rows in stage(True)(files):
        JpegDecoder(stage(True), CPU, restarted=False).decode(rows)
    assert calls == [1] * len(PLAIN)


@pytest.mark.parametrize("name", ["decode_jpegs", "resize_tensors"])
def test_an_exception_that_is_no_refusal_is_raised(name, files, monkeypatch):
    def fail(*_):
        raise NameError("name 'widht' is not defined")

    monkeypatch.setattr(gpu_jpegs, name, fail)
    with pytest.raises(NameError, match="widht"):
        decode_all(files)


def test_an_error_after_decoding_is_no_refusal(files, monkeypatch):
    def fail(*_):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(gpu_jpegs, "resize_tensors", fail)
    with pytest.raises(RuntimeError, match="size of tensor"):
        decode_all(files)


def test_after_a_restart_the_device_is_used_again(files, monkeypatch):
    monkeypatch.setattr(gpu_jpegs, "SANDBOXED_BATCHES", 2)
    calls = []
    monkeypatch.setattr(gpu_jpegs, "decode_jpegs", lambda *given: calls.append(len(given[0])) or decode_jpegs(*given))
    decoder = JpegDecoder(stage(True), CPU, restarted=True)
    (rows,) = (rows for rows in stage(True)(files) if "small.jpg" in "".join(rows["path"].to_pylist()))
    for _ in range(3):
        decoder.decode(rows)
        calls.append(None)
    assert calls[:2] == [None, None]
    assert calls[2] is not None


def test_jpegs_stay_encoded_until_a_batch_has_many_bytes_of_them(files, monkeypatch):
    monkeypatch.setattr(decode_module, "READ_BYTES", max(map(len, PLAIN.values())))
    monkeypatch.setattr(decode_module, "MAX_GPU_JPEG_BYTES", 1)
    counts = [rows.num_rows - rows["jpeg"].null_count for rows in stage(True)(files)]
    assert max(counts) < max(rows.num_rows for rows in stage(True)(files))
    assert 0 < sum(counts) < len(PLAIN)


def test_a_photograph_of_many_megabytes_stays_encoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    content = jpeg(Image.fromarray(noise), quality=95)
    assert len(content) > 2 << 20
    (tmp_path / "large.jpg").write_bytes(content)
    listed = pa.table([[str(tmp_path / "large.jpg")], [None], [None]], schema=FILES)
    large = data.DecodeForInference(PREPROCESSING, 10**7, 4, gpu_jpegs=True)
    assert [rows["jpeg"].to_pylist() for rows in large(listed)] == [[content]]


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"CPU": 2.0}, False),
        ({"CPU": 2.0, "accelerator_type:H100": 1.0}, True),
        ({"accelerator_type:A100-80G": 1.0, "accelerator_type:A100": 1.0}, True),
        ({"accelerator_type:T4": 1.0, "accelerator_type:H100": 1.0}, False),
    ],
)
def test_gpus_decode_where_all_have_the_hardware(monkeypatch, resources, expected):
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert data.gpus_decode_jpegs() is expected


SCORING = """
import itertools
import sys
import threading
import ray
from catsdogs.config import ScoreConfig
from catsdogs import classify, data, local_ray, start
from catsdogs.score import score

class WithoutCuda(classify.Classifier):
    def __init__(self, *given):
        import torch
        from catsdogs import process_setup
        from catsdogs.data import gpu_jpegs
        process_setup.select_device = lambda gpus: torch.device("cpu")
        decode = gpu_jpegs.decode_jpegs
        two_at_once = threading.Barrier(2)
        calls = itertools.count()

        def decode_and_record(*given):
            if next(calls) < 2:
                two_at_once.wait(30)
            with open(CALLS_FILE, "a") as file:
                file.write(f"{len(given[0])} ")
            return decode(*given)

        gpu_jpegs.decode_jpegs = decode_and_record
        super().__init__(*given)

CALLS_FILE = sys.argv[4]
classify.Classifier = WithoutCuda
with local_ray.without_cluster_processes():
    ray.init("local", num_cpus=2, num_gpus=1, resources={"accelerator_type:H100": 1}, include_dashboard=False)
start.on_existing_cluster = lambda: False

def free_the_gpu():
    print("free")
    ray.util.remove_placement_group(other)

other = ray.util.placement_group([{"GPU": 0.6}])
other.wait()
threading.Timer(1.5, free_the_gpu).start()
data.wait_for_gpu(1)
print("waited")
summary = score(ScoreConfig(input=sys.argv[1], checkpoint=sys.argv[2], output=sys.argv[3], batch_size=4), print)
print(summary["by_status"], summary["by_label"], list(summary["device_precisions"]))
"""


def test_a_gpu_that_ray_counts_is_used_and_decodes(red_blue_checkpoint, tmp_path):
    """The machine has no GPU: all is as with a GPU, but the model runs on the CPU."""
    source = tmp_path / "in"
    source.mkdir()
    broken = {"0.jpg": broken_inside(), "1.png": encode(solid((250, 9, 9)), "PNG"), "2.jpg": b""}
    for name, content in broken.items():
        (source / name).write_bytes(content)
    for i in range(12):
        (source / f"blue{i:02}.jpg").write_bytes(jpeg(solid((9, 9, 200 + i))))
    words = [sys.executable, "-c", SCORING, source, red_blue_checkpoint, tmp_path / "out", tmp_path / "calls"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "starting 1 model replica on gpu" in done.stdout, done.stderr
    assert done.stdout.startswith("free\nwaited\n")  # a command without a GPU waits for those that have it
    found = done.stdout.splitlines()[-1]
    assert found.startswith("{'decode_error': 1, 'empty': 1, 'ok': 13} {'blue': 12, 'red': 1} ['cpu, "), found
    sizes = list(map(int, (tmp_path / "calls").read_text().split()))
    assert max(sizes) == 4  # JPEGs travelled, a batch together
    assert sum(sizes) >= 13  # none was refused because no second thread came to the barrier


@pytest.mark.parametrize(("img_size", "expected"), [(224, 256), (112, 256), (448, 64), (4096, 1)])
def test_on_a_gpu_a_batch_has_about_as_many_pixels_at_any_size(img_size, expected):
    assert default_batch_size(use_gpu=True, img_size=img_size) == expected
    assert default_batch_size(use_gpu=False, img_size=img_size) == 32
