"""Settings of Ray Data, and how CPUs and GPUs are shared."""

import logging
import os

import numpy as np
import pyarrow as pa
import pytest
import ray.data
from conftest import encode, solid
from ray.data import DataContext
from ray.data._internal import stats

from catsdogs import data, start, storage
from catsdogs.data import runtime
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.schema import FILES, LABELLED_FILES, parquet_bytes
from catsdogs.start import start_ray
from catsdogs.storage import fetching, limits


def test_reading_the_files_of_a_block_leaves_half_of_the_time_without_progress():
    assert limits.DEADLINE_S <= runtime.NO_PROGRESS_TIMEOUT_S / 2


def test_a_file_over_the_limit_is_too_large_and_not_read(tmp_path, monkeypatch):
    image = encode(solid((1, 2, 3)))
    for name in "abcde":
        (tmp_path / f"{name}.jpg").write_bytes(image)
    os.truncate(tmp_path / "b.jpg", storage.MAX_IMAGE_BYTES + 1)  # a sparse file
    monkeypatch.setattr(fetching, "MAX_UNLISTED_BYTES", 100)  # every file that was not listed is read alone
    listed = list(storage.Listing(str(tmp_path)))
    stage = data.DecodeForInference(Preprocessing(img_size=32), 10**6, batch_size=2)
    reason = f"{storage.MAX_IMAGE_BYTES + 1} bytes, more than the 512 MiB that are read of such a file"
    for entries in (listed, [storage.Entry(entry.path) for entry in listed]):
        batches = list(stage(storage.build_files_table(entries)))
        rows = pa.concat_tables(batches)
        assert [batch.num_rows for batch in batches] == [2, 2, 1]
        assert rows["path"].to_pylist() == [entry.path for entry in listed]
        assert rows["status"].to_pylist() == ["ok", "too_large", "ok", "ok", "ok"]
        assert rows["error"][1].as_py() == reason


def test_the_callers_settings_stay_as_they_are(ray_cluster, tmp_path):
    start_ray()
    context, loggers = DataContext.get_current(), [logging.getLogger(name) for name in runtime.QUIET_LOGGERS]
    context.execution_options.preserve_order = False
    before, levels = str(context.copy()), [logger.level for logger in loggers]
    (tmp_path / "a.jpg").write_bytes(encode(solid((1, 2, 3))))
    files = pa.table([[str(tmp_path / "a.jpg")], [None], [None], [0]], schema=LABELLED_FILES)
    stage = data.DecodeForInference(Preprocessing(img_size=32), 10**6, batch_size=4)

    with data.quiet_ray_loggers():
        data.read_and_decode(files.select(FILES.names), stage, 1.0).take_all()
        list(data.iter_decoded_batches(files, stage, 1.0))
        augmented = data.DecodeForTraining(stage.preprocessing, 10**6, 4, "none", 0, (1,))
        list(data.iter_epoch_batches(files, [np.arange(1)], augmented, 1.0))
        list(data.iter_full_size(files.append_column("row", pa.array([0]))))

    assert DataContext.get_current() is context
    assert str(context) == before
    assert [logger.level for logger in loggers] == levels


def test_large_blocks_have_every_file_of_the_manifests_once(ray_cluster, tmp_path):
    start_ray()
    (tmp_path / "in").mkdir()
    for i in range(7):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encode(solid((i, 2, 3))))
    entries = list(storage.Listing(str(tmp_path / "in")))
    manifests = {}
    for name, listed in {"first": entries[:5], "second": entries[5:]}.items():
        (tmp_path / name).write_bytes(parquet_bytes(storage.build_files_table(listed)))
        manifests[str(tmp_path / name)] = len(listed)
    stage = data.DecodeForInference(Preprocessing(img_size=32), 10**6, batch_size=2, large_blocks=True)
    with data.quiet_ray_loggers():
        packed = data.read_and_decode_manifests(manifests, stage, 1.0).iter_batches(
            batch_size=None, batch_format="pyarrow"
        )
        blocks = [block["path"].to_pylist() for one in packed for block in data.unpack_blocks(one)]
    paths = [entry.path for entry in entries]
    assert sorted(blocks) == [paths[0:2], paths[2:4], paths[4:5], paths[5:7]]


def test_each_dataset_has_its_own_settings(ray_cluster):
    start_ray()
    ordered = data.configure_ray_data(ray.data.range(1), preserve_order=True)
    other = data.configure_ray_data(ray.data.range(1))
    assert [each.context.execution_options.preserve_order for each in (ordered, other)] == [True, False]
    assert not other.map_batches(lambda batch: batch).context.enable_progress_bars


@pytest.mark.parametrize("on_local_ray", [False, True])
def test_actors_are_left_out_only_on_a_ray_of_the_commands_own(monkeypatch, on_local_ray):
    monkeypatch.delenv("CATSDOGS_STOCK_RAY", raising=False)
    monkeypatch.setattr(start, "on_existing_cluster", lambda: not on_local_ray)
    before = vars(stats)["get_or_create_stats_actor"]
    for found in (None, on_local_ray):  # in the driver; in a worker
        with data.without_cluster_actors(found):
            assert (vars(stats)["get_or_create_stats_actor"] is before) is not on_local_ray


@pytest.mark.parametrize("nodes", [[1], [2], [2, 2], [1, 1], [0, 8], [16]])
@pytest.mark.parametrize("num_models", [1, 2, 4, 8, 64])
def test_decoding_tasks_fit_beside_the_models_of_any_number_of_commands(monkeypatch, nodes, num_models):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": n} if n else {}} for n in nodes])
    share = runtime.allocate_cpus(num_models)
    with_cpus = [n for n in nodes if n]
    here = -(-num_models // len(with_cpus))
    smallest, models_of_100_commands = min(with_cpus), 100 * here * share.model
    assert (
        models_of_100_commands + share.num_decoders * share.decode < smallest < (share.num_decoders + 1) * share.decode
    )
    assert share.model != share.decode
    assert (share.model == 0) is (smallest == 1)  # Ray Data reserves a whole CPU for its own tasks


@pytest.mark.parametrize(
    ("nodes", "num_models", "num_decoders"),
    [([1], 1, 1), ([2], 1, 1), ([2], 8, 1), ([16], 1, 15), ([16], 4, 12), ([16], 64, 2), ([2, 16], 2, 1)],
)
def test_decoding_leaves_most_of_a_cpu_for_each_model(monkeypatch, nodes, num_models, num_decoders):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": n}} for n in nodes])
    assert runtime.allocate_cpus(num_models).num_decoders == num_decoders


@pytest.mark.parametrize(
    ("num_gpus", "text"),
    [
        (0, "waiting for images; free: 0.2 of 2 CPUs and 0 of 1 GPUs"),
        (1, "waiting for images; free: 0.2 of 2 CPUs and 0 of 1 GPUs"),
        (2, "waiting for GPUs (2 needed, 1 in this Ray); add machines with GPUs, or use --use-gpu false"),
    ],
)
def test_a_wait_is_described_by_what_is_free(monkeypatch, num_gpus, text):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.1998})
    assert runtime.describe_wait("images", num_gpus) == text


@pytest.mark.parametrize("use_gpu", ["auto", "false"])
def test_without_gpus_the_cpu_is_used(monkeypatch, use_gpu):
    monkeypatch.setattr(ray, "cluster_resources", dict)
    assert runtime.resolve_use_gpu(use_gpu, 1) is False


def test_missing_gpus_are_an_error_unless_a_cluster_may_add_them(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(start, "on_existing_cluster", lambda: False)
    with pytest.raises(InputError, match="expected 2 GPUs on this machine, one for each model, found 1"):
        runtime.resolve_use_gpu("true", 2)
    monkeypatch.setattr(start, "on_existing_cluster", lambda: True)
    assert runtime.resolve_use_gpu("true", 2)


def test_the_warm_up_imports_torch_in_a_decoding_process(own_ray):
    """own_ray.py waits for the process; without a warm-up there is none."""
    assert own_ray["with_torch_before_the_warm_up"] == []
