"""Training a head on features that are computed once, beside a loop of plain torch that computes them every epoch."""

import dataclasses
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import lines_of, read_summary, red_or_blue
from ray.util.state import list_actors, list_tasks

from catsdogs import checkpoint
from catsdogs.data import DecodeForTraining, EpochPlan
from catsdogs.errors import RunError
from catsdogs.images import MAX_PIXELS, Preprocessing, decode
from catsdogs.labels import list_training
from catsdogs.model import NUM_FEATURES, build
from catsdogs.predict import Predictor
from catsdogs.start import start_ray
from catsdogs.train import train
from catsdogs.train.features import FeatureInputs, load_features
from catsdogs.train.run_folder import RunFolder
from catsdogs.train.step import learning_rate
from catsdogs.train.worker import TrainWorker

EPOCHS = 3


@pytest.fixture(scope="module")
def frozen(finished_run, tmp_path_factory):
    """A finished run of the head alone, without augmentation, over data with a bad file in each folder."""
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
    )
    events = []
    before, calls = {actor.actor_id for actor in list_actors(limit=10_000)}, calls_that_serve_a_cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")  # as on a Ray of the command's own
        train(config, events.append)
    started = {actor.class_name for actor in list_actors(limit=10_000) if actor.actor_id not in before}
    return SimpleNamespace(
        config=config,
        folder=folder / "runs" / "run",
        lines=lines_of(events),
        actors=started,
        calls=(calls, calls_that_serve_a_cluster()),
    )


def calls_that_serve_a_cluster():
    """Count what Ray Train and Ray Data have asked the session's autoscaler and statistics."""
    names = ("_AutoscalingCoordinatorActor.request_resources", "_StatsActor.register_dataset")
    return [len(list_tasks(filters=[("name", "=", name)], limit=10_000)) for name in names]


def test_a_run_does_without_the_actors_that_serve_a_cluster(frozen):
    assert frozen.actors == {"TrainController", "RayTrainWorker", "SynchronizationActor", "_QueueActor"}
    before, after = frozen.calls
    assert before == after
    assert all(before)  # by a run that joined a cluster
    assert not list_actors(filters=[("class_name", "=", "PlacementGroupCleaner")])  # which had none of these either


def features_of(run):
    """Name the one folder of features of a run."""
    (folder,) = (run / "features").iterdir()
    return folder


def plain_images(files, img_size):
    """Decode listed files as the model sees them, float32 (N, 3, S, S), and which of them are images."""
    preprocessing = Preprocessing(img_size=img_size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    images, ok = [], []
    for path in files["path"].to_pylist():
        with open(path, "rb") as file:
            image = decode(file.read()).image
        ok.append(image is not None)
        pixels = np.zeros((img_size, img_size, 3), np.uint8) if image is None else preprocessing(image)
        images.append((torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(images), np.array(ok)


def plain_loop(config):
    """Train as anyone would: every epoch through the whole network, BatchNorm at rest, gradients for the head alone."""
    files = [labelled.files for labelled in list_training(config.data_dir, config.val_split, lambda _: None)]
    (train_NCHW, train_ok), (val_NCHW, val_ok) = (plain_images(table, config.img_size) for table in files)
    train_targets, val_targets = (torch.tensor(table["true_index"].to_numpy(), dtype=torch.int64) for table in files)
    model = build(2, config.seed).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    groups = [
        {"params": [model.fc.weight], "weight_decay": config.weight_decay},
        {"params": [model.fc.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    plan = EpochPlan(num_rows=len(train_targets), seed=config.seed, batch_size=config.batch_size, rank=0, world_size=1)
    losses = []
    for epoch in range(1, config.epochs + 1):
        train_loss = 0.0
        for step, rows in enumerate(plan.steps(epoch)):
            rows = rows[train_ok[rows]]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, (epoch - 1) * plan.num_steps + step, plan.num_steps)
            optimizer.zero_grad()
            logits = model(train_NCHW[rows])
            F.cross_entropy(logits, train_targets[rows], label_smoothing=config.label_smoothing).backward()
            torch.nn.utils.clip_grad_norm_(model.fc.parameters(), config.clip_grad_norm)
            optimizer.step()
            train_loss += float(F.cross_entropy(logits.detach(), train_targets[rows], reduction="sum"))
        with torch.no_grad():
            logits = model(val_NCHW[val_ok])
        val_loss = float(F.cross_entropy(logits, val_targets[val_ok]))
        losses.append((train_loss / train_ok.sum(), val_loss))
    return model, losses


def test_features_that_are_kept_train_the_head_that_the_plain_loop_trains(frozen):
    model, losses = plain_loop(frozen.config)
    rows = read_summary(frozen.folder)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    found = [(float(row["train_loss"]), float(row["val_loss"])) for row in rows]
    np.testing.assert_allclose(found, losses, atol=1e-4)
    start = build(2, frozen.config.seed).state_dict()
    last = checkpoint.load_features(str(frozen.folder / "last")).model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(last[name], tensor, atol=1e-4, rtol=0)
    assert (last["fc.weight"] - start["fc.weight"]).abs().max() > 1e-3
    assert all(torch.equal(last[name], start[name]) for name in start if not name.startswith("fc."))


def test_bad_images_are_left_out_named_and_counted(frozen):
    assert "left out 1 training images" in "\n".join(frozen.lines)
    assert "1 validation images have no label and count as wrong" in frozen.lines
    (row,) = pq.read_table(frozen.folder / "left_out.parquet").to_pylist()
    assert row["path"].endswith("train/red/broken.jpg")
    assert row["status"] == "truncated"
    assert pq.read_table(frozen.folder / "val_predictions.parquet").num_rows == 15


def test_the_features_are_parquet_one_row_an_image(frozen):
    folder = features_of(frozen.folder)
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


def features_alone(config):
    """Take or compute the features of a run of one worker, without the run; what was told."""
    start_ray()
    parts = list_training(config.data_dir, config.val_split, lambda _: None)
    told = []
    uri = f"{config.storage_path}/{config.name}"
    spec = SimpleNamespace(
        config=config,
        folder=RunFolder(uri, parts[0].class_names, Preprocessing(img_size=config.img_size)),
        decode_cpus=1.0,
        events=SimpleNamespace(put=lambda event: told.append(pickle.loads(event))),
    )
    worker = TrainWorker(
        spec=spec,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        precision="fp32",
        model=build(2, config.seed),
        train_files=parts[0].files,
        validation_files=parts[1].files,
        train_step=None,
    )
    FeatureInputs(worker)
    return lines_of(told)


def test_features_that_were_cut_off_are_computed_where_they_are_missing(frozen, tmp_path):
    shutil.copytree(frozen.folder, tmp_path / "run")
    folder = features_of(tmp_path / "run")
    (folder / "validation-00000.parquet").unlink()
    (folder / "features.json").unlink()
    before = (folder / "train-00000.parquet").stat()
    lines = features_alone(dataclasses.replace(frozen.config, storage_path=str(tmp_path)))
    assert any(line.startswith("features computed in ") for line in lines)
    after = (folder / "train-00000.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    runs = (tmp_path / "run", frozen.folder)
    found, expected = (pq.read_table(features_of(run) / "validation-00000.parquet") for run in runs)
    assert found["features"].equals(expected["features"])


def test_damaged_features_are_an_error_that_names_them(frozen, tmp_path):
    shutil.copytree(features_of(frozen.folder), tmp_path / "features")
    part = tmp_path / "features" / "train-00000.parquet"
    assert load_features(str(part.parent), "train", 27, 1).features_NVD.shape == (27, 1, NUM_FEATURES)
    with pytest.raises(RunError, match="expected 28 rows of train, found 27"):
        load_features(str(part.parent), "train", 28, 1)
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(RunError, match=f"{part}: expected features.*; remove {part.parent}"):
        load_features(str(part.parent), "train", 27, 1)


@pytest.fixture(scope="module")
def of_two(frozen):
    """A run of two workers on two augmented views of each image."""
    settings = {"augment": "light", "views": 2, "num_workers": 2, "batch_size": 4}
    config = dataclasses.replace(frozen.config, name="two", **settings)
    events: list[object] = []
    train(config, events.append)
    return SimpleNamespace(config=config, folder=frozen.folder.parent / "two", lines=lines_of(events))


def test_two_workers_tell_of_a_bad_image_once(of_two):
    assert sum("left out 1 training images" in line for line in of_two.lines) == 1
    assert any("broken.jpg: truncated" in line for line in of_two.lines)
    assert pq.read_table(of_two.folder / "left_out.parquet").num_rows == 1
    assert len(read_summary(of_two.folder)) == EPOCHS


def test_views_are_the_images_as_epochs_augment_them_and_validation_sees_none(frozen, of_two):
    config = of_two.config
    views = load_features(str(features_of(of_two.folder)), "train", 27, 2)
    preprocessing = Preprocessing(img_size=config.img_size)
    predictor = Predictor(build(2, config.seed), preprocessing, "fp32", torch.device("cpu"))
    stage = DecodeForTraining(preprocessing, MAX_PIXELS, 32, config.augment, config.seed, (1, 2))
    for row in (0, 20):
        image_bytes = Path(views.rows["path"][row].as_py()).read_bytes()
        images_VHWC = stage.decode(image_bytes, row).image.reshape(2, config.img_size, config.img_size, 3)
        assert (images_VHWC[0] != images_VHWC[1]).any()
        np.testing.assert_allclose(views.features_NVD[row], predictor.embed(images_VHWC), atol=1e-4)
    parts = [load_features(str(features_of(run.folder)), "validation", 15, 1) for run in (frozen, of_two)]
    np.testing.assert_allclose(parts[0].features_NVD, parts[1].features_NVD, atol=1e-4)


def test_a_run_that_needs_the_same_features_takes_them_from_the_one_beside_it(of_two):
    events: list[object] = []
    train(dataclasses.replace(of_two.config, name="one", num_workers=1, batch_size=8), events.append)
    run = of_two.folder.parent / "one"
    assert f"features taken from {features_of(of_two.folder)}" in lines_of(events)
    assert not (run / "features").exists()
    for row, other in zip(read_summary(run), read_summary(of_two.folder), strict=True):
        for name in ("train_loss", "val_loss", "train_accuracy"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=1e-4)
