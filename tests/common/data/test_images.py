"""Images: augmentations depend on their seed alone and leave the global generators as they were."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.images import (
    AUGMENTATIONS,
    STATISTICS,
    Images,
    build_transform,
    embedded_digits,
    open_cifar,
    open_image_folder,
    seeded_globals,
)
from common.errors import DataError


def picture(width=48, height=36):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_an_augmentation_depends_on_its_seed_alone(augmentation):
    transform = build_transform(
        32, STATISTICS["imagenet"], augmentation, keep_aspect=True, colour_jitter=(0.4, 0.4, 0.4, 0.2)
    )
    images = Images([(picture(),)], torch.tensor([0]), ["a"], transform)
    torch.manual_seed(1)
    first = images.image(0, seed=7)
    torch.manual_seed(2)
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, images.image(0, seed=7))
    others = [images.image(0, seed=seed) for seed in range(8, 14)]
    assert any(not torch.equal(first, other) for other in others) == (augmentation != "none")


def test_the_global_generators_are_put_back():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(2), np.random.rand(2), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    with seeded_globals(5):
        inside = torch.rand(2), np.random.rand(2), random.random()
    with seeded_globals(5):
        assert torch.equal(torch.rand(2), inside[0]) and random.random() == inside[2]
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[2]
    assert (np.random.rand(2) == expected[1]).all()


def test_tests_resize_the_shorter_side_and_crop_the_centre():
    transform = build_transform(28, STATISTICS["half"], keep_aspect=True, resize=32)
    resized = picture(96, 64).resize((48, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(resized, dtype=np.float32)[2:30, 10:38].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(transform(picture(96, 64)).numpy() - expected).max() < 1e-6


def test_the_digits_are_whole():
    pixels_NHW, label_N = embedded_digits()
    assert pixels_NHW.shape == (1797, 8, 8) and pixels_NHW.min() == 0 and pixels_NHW.max() == 1
    assert label_N.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_missing_images_are_named(tmp_path):
    with pytest.raises(DataError, match="data.root=DIR"):
        open_image_folder(None, train=True)
    with pytest.raises(DataError, match="test or val or validation"):
        open_image_folder(tmp_path, train=False)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train"):
        open_image_folder(tmp_path, train=True)
    with pytest.raises(DataError, match=r"cifar-100-python.*finetune\.data\.download=true"):
        open_cifar("cifar100", tmp_path, train=True, option="finetune.data")
