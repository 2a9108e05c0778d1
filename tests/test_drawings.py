"""The drawings of the demo: reproducible, balanced, not separable by colour or by a coarse thumbnail."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from catsdogs.demo.drawings import ANIMALS, KINDS, draw, draw_dataset
from catsdogs.progress import Message, StageProgress

Array = NDArray[np.float64]


class Features(NamedTuple):
    colour: Array  # (N, 3)
    thumbnail: Array  # (N, 256)
    sign: Array  # (N,): -1 cat, 1 dog


def features(num: int, seed: int) -> Features:
    images = [draw(KINDS[i % 2], np.random.default_rng([seed, i])) for i in range(num)]
    colour = [np.asarray(image, dtype=float).mean(axis=(0, 1)) for image in images]
    small = [image.convert("L").resize((16, 16), Image.Resampling.BOX) for image in images]
    thumbnail = [np.asarray(image, dtype=float).ravel() for image in small]
    return Features(np.array(colour), np.array(thumbnail), np.resize([-1.0, 1.0], num))


def ridge_accuracy(train: Array, train_sign: Array, test: Array, test_sign: Array) -> float:
    """Fit a ridge regression on standardised features for a few penalties; return the best accuracy."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, test = ((np.c_[(rows - mean) / std, np.ones(len(rows))]) for rows in (train, test))
    gram = train.T @ train
    accuracies = []
    for penalty in (1.0, 100.0, 1000.0):
        weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), train.T @ train_sign)
        accuracies.append(float(np.mean((test @ weights > 0) == (test_sign > 0))))
    return max(accuracies)


@pytest.fixture(scope="module")
def train_and_test() -> tuple[Features, Features]:
    return features(600, seed=1), features(300, seed=2)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_mean_colour_does_not_separate_cats_from_dogs(train_and_test: tuple[Features, Features]) -> None:
    train, test = train_and_test
    assert ridge_accuracy(train.colour, train.sign, test.colour, test.sign) < 0.65


def test_grey_thumbnail_hardly_separates_cats_from_dogs(train_and_test: tuple[Features, Features]) -> None:
    train, test = train_and_test
    assert ridge_accuracy(train.thumbnail, train.sign, test.thumbnail, test.sign) < 0.80


@pytest.mark.parametrize("kind", ANIMALS)
@pytest.mark.parametrize("size", [32, 96])
def test_image_is_rgb_of_the_given_size(kind: str, size: int) -> None:
    image = draw(kind, np.random.default_rng(0), size)
    assert (image.mode, image.size) == ("RGB", (size, size))


@pytest.mark.parametrize("kind", ANIMALS)
def test_pixels_depend_only_on_the_state(kind: str) -> None:
    first, same, other = (np.asarray(draw(kind, np.random.default_rng(seed))) for seed in (3, 3, 4))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        draw("bird", np.random.default_rng(0))


def test_dataset_is_balanced_named_by_kind_and_readable(tmp_path: Path) -> None:
    draw_dataset(tmp_path, num_train=6, num_validation=4, seed=0)
    train = [f"train/{kind}s/{kind}.{i:04d}.jpg" for kind in KINDS for i in (1, 2, 3)]
    validation = [f"validation/{kind}s/{kind}.{i:04d}.jpg" for kind in KINDS for i in (1, 2)]
    assert list(files(tmp_path)) == train + validation
    for name in train + validation:
        with Image.open(tmp_path / name) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))


def test_files_depend_only_on_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        draw_dataset(tmp_path / name, num_train=4, num_validation=2, seed=seed)
    first, same, other = (files(tmp_path / name) for name in "abc")
    assert first == same
    assert not set(first.values()) & set(other.values())


def test_no_image_is_drawn_twice(tmp_path: Path) -> None:
    draw_dataset(tmp_path, num_train=40, num_validation=40, seed=0)
    assert len(set(files(tmp_path).values())) == 80


def test_progress_counts_every_image(tmp_path: Path) -> None:
    events: list[StageProgress | Message] = []
    draw_dataset(tmp_path, num_train=2, num_validation=2, seed=0, progress=events.append)
    assert events == [StageProgress("draw", done, 4) for done in (1, 2, 3, 4)]


def test_each_kind_of_animal_is_a_class(tmp_path: Path) -> None:
    draw_dataset(tmp_path, kinds=ANIMALS, num_train=8, num_validation=0, seed=0)
    assert list(files(tmp_path)) == [f"train/{kind}s/{kind}.{i:04d}.jpg" for kind in ANIMALS for i in (1, 2)]
