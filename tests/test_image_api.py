"""`catsdogs.read_images` and `catsdogs.augment_image`: the pixels that scoring and training see."""

import numpy as np
import pytest

import catsdogs
from catsdogs.images import Preprocessing, decode_image
from catsdogs.images.augment import augment


def test_images_are_read_in_the_given_order_as_score_reads_them(ray_cluster, red_blue_root, monkeypatch):
    monkeypatch.chdir(red_blue_root)
    paths = [str(path.relative_to(red_blue_root)) for path in sorted(red_blue_root.rglob("*.jpg"), reverse=True)]
    paths += paths[:1]  # more than one batch, and an image twice
    preprocessing = Preprocessing(img_size=32, crop_pct=1.0)
    expected = [preprocessing(decode_image((red_blue_root / path).read_bytes()).image) for path in paths]
    assert np.array_equal(catsdogs.read_images(paths, 32), np.stack(expected))
    assert catsdogs.read_images([]).shape == (0, 160, 160, 3)


@pytest.mark.parametrize("augmentation", ["light", "affine"])
def test_views_are_those_that_train_makes(ray_cluster, red_blue_root, augmentation):
    path = red_blue_root / "train" / "blue" / "00.jpg"
    config = catsdogs.TrainConfig(data_dir=str(red_blue_root), augment=augmentation, img_size=32, seed=7)
    image = decode_image(path.read_bytes()).image
    expected = [augment(image, augmentation, 32, np.random.default_rng([7, epoch, 0])) for epoch in (1, 2, 3)]
    assert np.array_equal(catsdogs.augment_image(str(path), config, num_views=3), np.stack(expected))


def test_an_image_that_cannot_be_read_is_named_with_the_reason(ray_cluster, tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(catsdogs.InputError, match=r"empty\.jpg: empty, 0 bytes"):
        catsdogs.read_images([str(tmp_path / "empty.jpg")])
    with pytest.raises(catsdogs.InputError, match=r"absent\.jpg: not_found"):
        catsdogs.augment_image(str(tmp_path / "absent.jpg"), catsdogs.TrainConfig(data_dir=str(tmp_path)))
