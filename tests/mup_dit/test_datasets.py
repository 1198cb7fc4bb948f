"""Data sets by name: the digits, folders in the published layouts, the hub's formats; bad files are named."""

import logging
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from common.data.loader import build_train_loader
from common.errors import ConfigError, DataError
from mup_dit.datasets import build_dataset
from mup_dit.images import crop_image, to_tensor
from tests.mup_dit.hub_folders import (
    add_member,
    encoded,
    picture,
    write_coco,
    write_image_folder,
    write_mjhq,
    write_sa1b,
)

ALL = slice(None)


def expected(number: int, size: int = 16) -> torch.Tensor:
    return to_tensor(crop_image(picture(number), size, "adm")[None])[0]


def fetch_all(dataset) -> dict:
    return dataset.fetch(np.arange(len(dataset)))


def test_digits_are_split_in_two_and_lie_between_minus_one_and_one():
    train, valid = (build_dataset("digits", split, size=8) for split in ("train", "validation"))
    assert (len(train), len(valid)) == (1536, 261)
    batch = fetch_all(train)
    assert batch["image"].shape == (1536, 1, 8, 8) and batch["label"].dtype == torch.int64
    assert (batch["image"].min(), batch["image"].max()) == (-1.0, 1.0)
    assert train.captions(np.array([3])) == ["a handwritten digit three"] and train.classes[3] == "three"
    assert train.fingerprint() != valid.fingerprint() == build_dataset("digits", "validation", size=8).fingerprint()


def test_digits_can_be_enlarged_coloured_and_mirrored():
    small, large = build_dataset("digits", size=8), build_dataset("digits", size=16, channels=3, flips=True)
    assert len(large) == 2 * len(small)
    rows = np.array([5, 5 + 1536])
    image = large.fetch(rows)["image"]
    assert image.shape == (2, 3, 16, 16) and torch.equal(image[1], image[0].flip(-1))
    assert torch.equal(image[:1, :1, ::2, ::2], small.fetch(rows[:1])["image"])
    with pytest.raises(ConfigError, match="multiple"):
        build_dataset("digits", size=12)


def test_captions_take_the_place_of_labels():
    batch = build_dataset("digits", size=8, text="small").fetch(np.array([0, 10, 1]))
    assert sorted(batch) == ["caption", "image", "mask", "pooled"]
    assert batch["caption"].shape == (3, 1, 8, 32) and batch["mask"].sum(1).tolist() == [5, 5, 5]
    assert torch.equal(batch["caption"][0], batch["caption"][1])  # both are zeros
    assert not torch.equal(batch["pooled"][0], batch["pooled"][2])


def test_image_folders_have_sorted_classes(tmp_path):
    dataset = build_dataset(f"imagefolder:{write_image_folder(tmp_path)}", size=16, flips=True)
    batch = fetch_all(dataset)
    assert dataset.classes == ("bird", "cat") and batch["label"].tolist() == [0, 0, 1, 1] * 2
    assert torch.equal(batch["image"][2], expected(10)) and torch.equal(batch["image"][6], expected(10).flip(-1))
    assert batch["img_hw"][0].tolist() == [20, 30]
    with pytest.raises(DataError, match="no folder validation"):
        build_dataset(f"imagefolder:{tmp_path}", "validation", size=16)
    with pytest.raises(ConfigError, match="no captions"):
        build_dataset(f"imagefolder:{tmp_path}", size=16, text="small")


def test_sa1b_reads_captions_or_their_features(tmp_path):
    root = write_sa1b(tmp_path)
    dataset = build_dataset(f"sa1b:{root}", size=16, text="small")
    assert len(dataset) == 4 and dataset.captions(np.arange(2)) == ["a zero", "a one"]
    assert fetch_all(dataset)["caption"].shape == (4, 1, 8, 32)
    assert len(build_dataset(f"sa1b:{root}", "part1", size=16)) == 2
    folder = root / "caption_feature_wmask"
    folder.mkdir()
    for number in range(3):
        features = np.full((1, 5, 6), number, np.float32)
        np.savez(folder / f"sa_{number}.npz", caption_feature=features, attention_mask=np.array([[1, 1, 0, 0, 0]]))
    dataset = build_dataset(f"sa1b:{root}", size=16)
    batch = dataset.fetch(np.array([2, 1]))
    assert batch["caption"].shape == (2, 1, 5, 6) and batch["caption"][0].unique() == 2.0
    assert batch["mask"].tolist() == [[1, 1, 0, 0, 0]] * 2
    with pytest.raises(DataError, match=r"sa_3\.npz is missing: the caption of images/sa_3\.jpg"):
        fetch_all(dataset)


def test_coco_takes_the_first_caption_of_every_image(tmp_path):
    dataset = build_dataset(f"coco:{write_coco(tmp_path)}", "validation", size=16)
    assert dataset.captions(np.arange(2)) == ["a cat", "a dog"]
    assert torch.equal(fetch_all(dataset)["image"][1], expected(7))


def test_mjhq_has_prompts_and_categories(tmp_path):
    dataset = build_dataset(f"mjhq:{write_mjhq(tmp_path)}", size=16)
    assert dataset.captions(np.arange(2)) == ["a dog", "a cat"] and dataset.classes == ("animals", "people")
    assert dataset.labels(np.arange(2)).tolist() == [1, 0] and fetch_all(dataset)["image"].shape == (2, 3, 16, 16)


def test_npz_files_are_read_as_samplers_write_them(tmp_path):
    pixels = np.stack([np.asarray(picture(number, 8, 8)) for number in range(3)])
    np.savez(tmp_path / "images.npz", arr_0=pixels, labels=np.array([4, 0, 9]))
    batch = fetch_all(build_dataset(f"npz:{tmp_path / 'images.npz'}", size=8))
    assert batch["label"].tolist() == [4, 0, 9]
    torch.testing.assert_close(batch["image"], to_tensor(pixels))
    with pytest.raises(DataError, match="8 x 8 pixels, but size=16"):
        build_dataset(f"npz:{tmp_path / 'images.npz'}", size=16)
    np.savez(tmp_path / "other.npz", x=pixels)
    with pytest.raises(DataError, match="no arr_0"):
        build_dataset(f"npz:{tmp_path / 'other.npz'}", size=8)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_data_sets_of_the_library(tmp_path, kind):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["bird", "cat"])})
    dataset = Dataset.from_dict({"image": [picture(3), picture(4)], "label": [1, 0]}, features=features)
    if kind == "saved":
        dataset.save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        dataset.to_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    found = build_dataset(f"hf:{tmp_path / 'data'}", size=16)
    batch = fetch_all(pickle.loads(pickle.dumps(found)))
    assert found.classes == ("bird", "cat") and batch["label"].tolist() == [1, 0]
    assert torch.equal(batch["image"][1], expected(4))


def test_webdataset_shards_have_random_access(tmp_path):
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard}.tar")) as writer:
            for number in range(2):
                index = 2 * shard + number
                sample = {"__key__": f"{index:04d}", "png": encoded(picture(index)), "txt": f"a {index}", "cls": index}
                writer.write(sample)
    for where in (tmp_path, f"{tmp_path}/train-{{0..1}}.tar", f"{tmp_path}/*.tar"):
        dataset = build_dataset(f"webdataset:{where}", size=16)
        batch = dataset.fetch(np.array([3, 0]))
        assert batch["label"].tolist() == [3, 0] and dataset.captions(np.array([3])) == ["a 3"]
        assert torch.equal(batch["image"][0], expected(3))
    with tarfile.open(tmp_path / "json.tar", "w") as archive:
        add_member(archive, "a.png", encoded(picture(1)))
        add_member(archive, "a.json", b'{"label": 5, "caption": "a dog"}')
    dataset = build_dataset(f"webdataset:{tmp_path}/json.tar", size=16)
    assert dataset.captions(np.arange(1)) == ["a dog"] and fetch_all(dataset)["label"].tolist() == [5]
    (tmp_path / "cut.tar").write_bytes(b"not a tar file")
    with pytest.raises(DataError, match=r"cut\.tar is no readable"):
        build_dataset(f"webdataset:{tmp_path}/cut.tar", size=16)


def test_broken_images_stop_the_run_or_are_replaced_with_a_warning(tmp_path, caplog):
    root = write_image_folder(tmp_path)
    broken = root / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cat/0\.png cannot be read.*on_error=skip"):
        fetch_all(build_dataset(f"imagefolder:{root}", size=16))
    with caplog.at_level(logging.WARNING):
        batch = fetch_all(build_dataset(f"imagefolder:{root}", size=16, on_error="skip", flips=True))
    assert torch.equal(batch["image"][2], expected(11)) and batch["label"].tolist() == [0, 0, 1, 1] * 2
    assert caplog.text.count("cat/0.png") == 1
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match="no images in class folders"):
        build_dataset(f"imagefolder:{root}", size=16)


def test_missing_images_are_named(tmp_path):
    root = write_sa1b(tmp_path)
    (root / "images" / "sa_1.jpg").unlink()
    with pytest.raises(DataError, match=r"sa_1\.jpg cannot be read: the file is missing"):
        fetch_all(build_dataset(f"sa1b:{root}", size=16, text="small"))


@pytest.mark.parametrize(
    ("name", "message"), [("pictures:x", "choose one of"), ("coco:", "lacks a place"), ("digits:", "size=0")]
)
def test_unknown_names_are_answered(name, message):
    with pytest.raises(ConfigError, match=message):
        build_dataset(name, size=0 if name == "digits:" else 8)


def test_loader_workers_give_the_same_batches(tmp_path):
    dataset = build_dataset(f"imagefolder:{write_image_folder(tmp_path)}", size=8, flips=True)
    layout = {"global_size": 4, "micro_size": 2, "seed": 0, "pin_memory": False}
    here, there = (iter(build_train_loader(dataset, num_workers=n, **layout)) for n in (0, 1))
    for _ in range(5):
        first, second = next(here), next(there)
        assert all(torch.equal(first[name], second[name]) for name in first)
