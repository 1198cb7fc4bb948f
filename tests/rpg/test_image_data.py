"""Images: what a training sees does not depend on workers or restarts, test images are never augmented."""

import pickle

import numpy as np
import pytest
import torch

from common.errors import DataError
from rpg.tasks import CLASS_NAMES
from rpg.zoo.image_data import ImageDataSection, epoch_batches, load_split, ordered_batches, steps_per_epoch
from tests.rpg.tiny_images import write_images


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("images"))
    return ImageDataSection(name="folder", root=str(root), size=32, augmentation="randaugment")


def epoch(section, **options):
    images = load_split(section, "train")
    return list(epoch_batches(images, 8, **{"seed": 0, "epoch": 0, **options}))


def test_an_epoch_depends_on_seed_and_number_alone(section):
    torch.manual_seed(1)
    first = epoch(section)
    torch.manual_seed(2)
    for (images, labels), (again, labels_again) in zip(first, epoch(section, num_workers=1)):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(first[0][0], epoch(section, epoch=1)[0][0])


def test_the_rest_of_an_epoch_is_that_of_the_whole(section):
    whole, rest = epoch(section), epoch(section, first=2)
    assert len(whole) == 3 and len(rest) == 1
    assert torch.equal(whole[2][0], rest[0][0])


def test_training_images_are_augmented_and_test_images_are_not(section):
    train, test = load_split(section, "train"), load_split(section, "test")
    assert not torch.equal(train.image(0, 1), train.image(0, 2))
    assert torch.equal(test.image(0, 1), test.image(0, 2))
    assert test.image(0).shape == (3, 32, 32) and test.class_names == ("class0", "class1", "class2")
    batches = list(ordered_batches(test, 5))
    assert torch.equal(torch.cat([labels for _, labels in batches]), test.label_N)


def test_limits_take_the_first_images(section):
    small = load_split(ImageDataSection(name="digits", limit_test=7), "test")
    assert len(small) == 7 and small.image(0).shape == (1, 8, 8)


def test_files_that_are_missing_are_named(section, tmp_path):
    with pytest.raises(DataError, match=r"recipe.data.download=true"):
        load_split(ImageDataSection(name="cifar10", root=str(tmp_path)), "train")
    with pytest.raises(DataError, match="CLASS/FILE.jpg"):
        load_split(ImageDataSection(name="folder", root=str(tmp_path)), "train")
    with pytest.raises(DataError, match="batch_size=100"):
        steps_per_epoch(load_split(section, "train"), 100)


def test_cifar_files_are_read_with_their_classes(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {"data": draws.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 7]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the files' published hashes
    section = ImageDataSection(name="cifar10", root=str(tmp_path), size=64, augmentation="autoaugment_cifar10")
    train, test = load_split(section, "train"), load_split(section, "test")
    assert len(train) == 10 and test.label_N.tolist() == [3, 7] and test.class_names == CLASS_NAMES
    assert train.image(0, 1).shape == test.image(0).shape == (3, 64, 64)
