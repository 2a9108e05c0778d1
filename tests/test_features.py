"""Training a head on features computed once, compared with a plain torch loop that computes them in every epoch."""

import dataclasses
import os
import pickle
import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import count_cluster_calls, lines_of, read_summary, red_or_blue
from workers import build_train_worker

from catsdogs.auditing.features import load_or_compute_features
from catsdogs.checkpoint import NUM_FEATURES, read_checkpoint
from catsdogs.data import DecodeForTraining, EpochPlan
from catsdogs.errors import RunError
from catsdogs.images import MAX_PIXELS, Preprocessing, decode_image
from catsdogs.labels import LabelSource, list_training
from catsdogs.predict import Predictor
from catsdogs.resnet import build_resnet50
from catsdogs.schema import FILES
from catsdogs.start import start_ray
from catsdogs.train import train
from catsdogs.train.feature_files import find_location, load_features
from catsdogs.train.features import FeatureInputs, find_or_compute_features
from catsdogs.train.loop import build_step, validate
from catsdogs.train.model import compute_learning_rate, set_learning_rate

EPOCHS = 3


@pytest.fixture(scope="module")
def frozen(finished_run, tmp_path_factory):
    """A run of two workers that trains the head without augmentation, on data with a broken file in each split."""
    folder = tmp_path_factory.mktemp("frozen")
    shutil.copytree(finished_run.config.data_dir, folder / "data")
    for part in ("train", "validation"):
        (folder / "data" / part / "red" / "broken.jpg").write_bytes(red_or_blue("red", 0)[:300])
    config = dataclasses.replace(
        finished_run.config,
        data_dir=str(folder / "data"),
        storage_path=str(folder / "runs"),
        freeze="backbone",
        augment="none",
        lr=0.001,
        epochs=EPOCHS,
        num_workers=2,
        batch_size=4,
    )
    events = []
    train(config, events.append)
    best = read_checkpoint(str(folder / "runs" / "run" / "best"))
    assert (best.calibration["n"], best.calibration["model_sha256"]) == (14, best.sha256)
    return SimpleNamespace(config=config, folder=folder / "runs" / "run", lines=lines_of(events))


@pytest.mark.skipif(os.environ.get("CATSDOGS_STOCK_RAY", "0") != "0", reason="stock Ray calls them")
def test_only_a_run_on_a_local_ray_calls_no_actors_that_serve_a_cluster(finished_run, frozen):
    before, after = finished_run.cluster_calls
    assert before == after
    assert all(now > then for now, then in zip(count_cluster_calls(), after, strict=True))  # `frozen` joined a cluster


def find_features(run):
    """Return the only folder of features of a run."""
    (folder,) = (run / "features").iterdir()
    return folder


def plain_images(files, img_size):
    """Decode listed files to inputs of the model, float32 (N, 3, S, S); also return which of them are images."""
    preprocessing = Preprocessing(img_size=img_size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    images, ok = [], []
    for path in files["path"].to_pylist():
        with open(path, "rb") as file:
            image = decode_image(file.read()).image
        ok.append(image is not None)
        pixels = np.zeros((img_size, img_size, 3), np.uint8) if image is None else preprocessing(image)
        images.append((torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(images), np.array(ok)


class Split(NamedTuple):
    """Files of a split for the plain loop.

    Attributes:
        files: rows with `true_index`.
        ok_N: which files are images.
        logits: epoch, rows of images -> their logits.
    """

    files: pa.Table
    ok_N: np.ndarray
    logits: Callable[[int, np.ndarray], torch.Tensor]

    @property
    def targets(self):
        return torch.tensor(self.files["true_index"].to_numpy(), dtype=torch.int64)


def plain_loop(config, model, training, validation):
    """Train the head; return the training and the validation loss of each epoch."""
    groups = [
        {"params": [model.fc.weight], "weight_decay": config.weight_decay},
        {"params": [model.fc.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    num_rows, batch_size = training.files.num_rows, config.global_batch_size
    plan = EpochPlan(num_rows=num_rows, seed=config.seed, batch_size=batch_size, rank=0, world_size=1)
    val_rows = np.flatnonzero(validation.ok_N)
    losses = []
    for epoch in range(1, config.epochs + 1):
        train_loss = 0.0
        for step, rows in enumerate(plan.steps(epoch)):
            rows = rows[training.ok_N[rows]]
            for group in optimizer.param_groups:
                group["lr"] = compute_learning_rate(config, (epoch - 1) * plan.num_steps + step, plan.num_steps)
            optimizer.zero_grad()
            logits, targets = training.logits(epoch, rows), training.targets[rows]
            F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing).backward()
            torch.nn.utils.clip_grad_norm_(model.fc.parameters(), config.clip_grad_norm)
            optimizer.step()
            train_loss += float(F.cross_entropy(logits.detach(), targets, reduction="sum"))
        with torch.no_grad():
            val_loss = float(F.cross_entropy(validation.logits(epoch, val_rows), validation.targets[val_rows]))
        losses.append((train_loss / training.ok_N.sum(), val_loss))
    return losses


def read_losses(run):
    """Read the training and the validation loss of each epoch from a run's summary."""
    return [(float(row["train_loss"]), float(row["val_loss"])) for row in read_summary(run)]


def test_two_workers_train_on_saved_features_as_the_plain_loop_does(frozen):
    config = frozen.config
    files = [labelled.files for labelled in list_training(LabelSource(config.data_dir), config.val_split)[:2]]
    (train_NCHW, train_ok_N), (val_NCHW, val_ok_N) = (plain_images(table, config.img_size) for table in files)
    model = build_resnet50(2, config.seed).eval()  # BatchNorm in evaluation mode
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    training = Split(files[0], train_ok_N, lambda _, rows: model(train_NCHW[rows]))
    validation = Split(files[1], val_ok_N, lambda _, rows: model(val_NCHW[rows]))
    losses = plain_loop(config, model, training, validation)
    assert len(losses) == EPOCHS
    np.testing.assert_allclose(read_losses(frozen.folder), losses, atol=1e-4)
    start = build_resnet50(2, frozen.config.seed).state_dict()
    last = read_checkpoint(str(frozen.folder / "last")).load_state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(last[name], tensor, atol=1e-4, rtol=0)
    assert (last["fc.weight"] - start["fc.weight"]).abs().max() > 1e-3
    assert all(torch.equal(last[name], start[name]) for name in start if not name.startswith("fc."))


def test_broken_images_are_left_out_and_reported_once(frozen):
    line = f"1 training images are left out; all are listed in {frozen.folder}/left_out.parquet"
    assert frozen.lines.count(line) == 1
    assert any("broken.jpg: truncated" in line for line in frozen.lines)
    assert "1 validation images were not classified and count as incorrect" in frozen.lines
    (row,) = pq.read_table(frozen.folder / "left_out.parquet").to_pylist()
    assert row["path"].endswith("train/red/broken.jpg")
    assert row["status"] == "truncated"
    assert pq.read_table(frozen.folder / "val_predictions.parquet").num_rows == 15


def test_features_are_parquet_files_with_one_row_per_image(frozen):
    folder = find_features(frozen.folder)
    names = {"features.json", "train-00000.parquet", "validation-00000.parquet"}
    assert {path.name for path in folder.iterdir()} == names
    table = pq.read_table(folder / "train-00000.parquet")
    assert table.num_rows == 27
    features_ND = np.array(table["features"].to_pylist())
    assert features_ND.shape == (27, NUM_FEATURES)
    bad = np.array(table["status"].to_pylist()) != "ok"
    assert bad.sum() == 1
    assert (features_ND[bad] == 0).all()
    assert (features_ND[~bad].std(axis=1) > 0).all()


def build_worker(config):
    """Build the worker of a run in this process; return it, and a function that returns its messages so far."""
    start_ray()
    train_files, validation_files, _ = list_training(LabelSource.from_config(config), config.val_split)
    events = queue.SimpleQueue()
    worker = build_train_worker(config, train_files, validation_files, events.put)
    return worker, lambda: lines_of([pickle.loads(events.get()) for _ in range(events.qsize())])


def compute_features(config):
    """Find or compute the features of a run in this process; return their folder, the inputs and the messages."""
    worker, read_lines = build_worker(config)
    uri = find_or_compute_features(worker)
    return uri, FeatureInputs(worker, uri), read_lines()


def train_one_epoch(config):
    """Train the head in this process; return the predictions of the validation images and the messages."""
    worker, read_lines = build_worker(config)
    worker = dataclasses.replace(worker, train_model=worker.model.fc)
    inputs = FeatureInputs(worker, find_or_compute_features(worker))
    set_learning_rate(worker.optimizer, config.lr, worker.device)
    step = build_step(worker)
    for batch in inputs.iter_batches(1):
        step(batch)
    return validate(worker, inputs, 1)[1], read_lines()


def test_only_missing_parts_of_interrupted_features_are_computed(frozen, tmp_path):
    shutil.copytree(frozen.folder, tmp_path / "run")
    folder = find_features(tmp_path / "run")
    (folder / "validation-00000.parquet").unlink()
    (folder / "features.json").unlink()
    before = (folder / "train-00000.parquet").stat()
    *_, lines = compute_features(dataclasses.replace(frozen.config, storage_path=str(tmp_path)))
    assert any(line.startswith("features computed in ") for line in lines)
    after = (folder / "train-00000.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    runs = (tmp_path / "run", frozen.folder)
    actual, expected = (pq.read_table(find_features(run) / "validation-00000.parquet") for run in runs)
    assert actual["features"].equals(expected["features"])


def test_damaged_features_are_an_error_with_their_uri(frozen, tmp_path):
    shutil.copytree(find_features(frozen.folder), tmp_path / "features")
    part = tmp_path / "features" / "train-00000.parquet"
    assert load_features(str(part.parent), "train", 27, 1).features_NVD.shape == (27, 1, NUM_FEATURES)
    with pytest.raises(RunError, match="expected 28 rows of train, found 27"):
        load_features(str(part.parent), "train", 28, 1)
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(RunError, match=f"{part}: expected features.*; remove {part.parent}"):
        load_features(str(part.parent), "train", 27, 1)


def test_a_run_uses_the_features_of_a_run_beside_it(frozen):
    one_worker = dataclasses.replace(frozen.config, name="one", num_workers=1, batch_size=8)
    uri, _, lines = compute_features(one_worker)
    assert uri == str(find_features(frozen.folder))
    assert lines == [f"using the features in {uri}"]
    assert os.listdir(frozen.folder.parent / "one") == ["features.json"]
    assert find_location(str(frozen.folder.parent / "one")) == find_location(str(frozen.folder)) == uri


def test_a_run_on_other_labels_uses_the_same_features_and_trains_as_without_them(frozen, tmp_path):
    paths = sorted(Path(frozen.config.data_dir).rglob("*.jpg"))
    labels = {str(path): ("blue", "red")[i % 2] for i, path in enumerate(paths)}
    splits = [path.parent.parent.name for path in paths]
    columns = {"path": [*labels], "label": [*labels.values()], "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    relabelled = dataclasses.replace(
        frozen.config,
        data_dir=None,
        labels=str(tmp_path / "labels.parquet"),
        name="relabelled",
        num_workers=1,
        batch_size=8,
    )
    reused, lines = train_one_epoch(relabelled)
    assert lines == [f"using the features in {find_features(frozen.folder)}"]
    fresh, lines = train_one_epoch(dataclasses.replace(relabelled, storage_path=str(tmp_path / "fresh")))
    assert [line.split(" in ")[0] for line in lines] == ["features computed"]
    assert reused.equals(fresh)
    assert fresh["true_label"].to_pylist() == [labels[path] for path in fresh["path"].to_pylist()]


def test_views_are_augmented_as_in_their_epochs_and_validation_is_not_augmented(frozen, tmp_path):
    config = dataclasses.replace(frozen.config, storage_path=str(tmp_path), augment="light", views=2)
    uri, inputs, _ = compute_features(config)
    views = load_features(uri, "train", 27, 2)
    preprocessing = Preprocessing(img_size=config.img_size)
    predictor = Predictor(build_resnet50(2, config.seed).state_dict(), preprocessing, "fp32", torch.device("cpu"))
    stage = DecodeForTraining(preprocessing, MAX_PIXELS, 32, config.augment, config.seed, (1, 2))
    for row in (0, 20):
        image_bytes = Path(views.rows["path"][row].as_py()).read_bytes()
        images_VHWC = stage.decode(image_bytes, row).image.reshape(2, config.img_size, config.img_size, 3)
        assert (images_VHWC[0] != images_VHWC[1]).any()
        np.testing.assert_allclose(views.features_NVD[row], predictor.embed(images_VHWC), atol=1e-4)
    without_views = load_features(str(find_features(frozen.folder)), "validation", 15, 1)
    np.testing.assert_allclose(
        load_features(uri, "validation", 15, 1).features_NVD, without_views.features_NVD, atol=1e-4
    )
    for epoch, view in ((1, 0), (2, 1), (3, 0)):
        used = {tuple(features) for batch, _ in inputs.iter_batches(epoch) for features in batch.tolist()}
        ok = np.array(views.rows["status"].to_pylist()) == "ok"
        assert used == {tuple(features) for features in views.features_NVD[ok, view].tolist()}


def test_suspect_labels_are_found_by_the_mean_features_of_a_run_if_it_has_all_of_them(frozen, tmp_path):
    start_ray()
    config = dataclasses.replace(frozen.config, storage_path=str(tmp_path), augment="light", views=2)
    uri, *_ = compute_features(config)
    tables = [load_features(uri, "train", 27, 2), load_features(uri, "validation", 15, 1)]
    ok = [np.array(table.rows["status"].to_pylist()) == "ok" for table in tables]
    files = pa.concat_tables(
        table.rows.filter(pa.array(is_ok)).select(FILES.names) for table, is_ok in zip(tables, ok, strict=True)
    )
    expected = np.concatenate([t.features_NVD[is_ok].mean(axis=1) for t, is_ok in zip(tables, ok, strict=True)])
    checkpoint = read_checkpoint(str(frozen.folder / "best"))
    events = []
    saved = load_or_compute_features(f"{tmp_path}/run", checkpoint, files, events.append)
    np.testing.assert_array_equal(saved.features_ND, expected)
    assert (saved.rows_N.tolist(), saved.source) == ([*range(40)], uri)
    assert lines_of(events) == [f"using the features in {uri}"]

    missing = pa.array([f"{config.data_dir}/missing.jpg"])
    others = files.slice(1).set_column(0, FILES.field("path"), pa.concat_arrays([missing, *files["path"][2:].chunks]))
    computed = load_or_compute_features(f"{tmp_path}/run", checkpoint, others, events.append)
    assert f"{uri} does not have the features of all images in their present version" in lines_of(events)
    assert computed.rows_N.tolist() == [*range(1, 39)]
    validation = saved.features_ND[ok[0].sum() :]  # without augmentation
    np.testing.assert_allclose(computed.features_ND[-len(validation) :], validation, atol=0.05 * validation.max())
