"""Extraction from the command line to the batches of a training run: what is stored, resumed, skipped, refused."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch

from common.parallel import Parallel
from mup_dit.buckets import build_bucket_loader
from mup_dit.datasets import build_dataset
from mup_dit.encoders import load_text_encoder, load_vae
from mup_dit.extract import main
from mup_dit.extract_config import ExtractConfig, extract_features
from mup_dit.feature_dataset import FeatureDataset
from tests.mup_dit.hub_folders import write_image_folder, write_sa1b, write_t5, write_vae

DIGITS = ("dataset=digits", "size=8", "channels=1", "vae=identity", "output=digits")


@pytest.fixture
def extract(monkeypatch, tmp_path, capfd):
    """Runs the command line in ``tmp_path``; returns the exit code and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["extract", *options])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        written = capfd.readouterr()
        return code, written.out + written.err

    return run


def test_cached_digits_are_the_digits(extract):
    assert extract(*DIGITS, "text=small", "flips=true", "shard_rows=600")[1] == (
        "digits: 3 made, 0 kept, 0 missing, 0 skipped, 1536 rows\n"
    )
    cached = build_dataset("features:digits", size=8, flips=True)
    plain = build_dataset("digits", size=8, flips=True, text="small")
    rows = np.array([1535, 3, 3000, 600, 1536, 3])
    first, second = pickle.loads(pickle.dumps(cached)).fetch(rows), plain.fetch(rows)
    assert torch.equal(first["mean"].float(), second["image"]) and not first["std"].any()
    assert torch.equal(first["mask"], second["mask"]) and len(cached) == len(plain) == 3072
    torch.testing.assert_close(first["caption"].float(), second["caption"], rtol=1e-3, atol=1e-3)
    assert cached.labels(rows).tolist() == plain.labels(rows).tolist() and cached.classes == plain.classes
    assert cached.source_rows(rows[:2]).tolist() == [1535, 3] and cached.scale == 1.0
    assert torch.equal(load_text_encoder("digits")(["digit one"])["mask"], torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]))


def test_latents_are_those_of_the_vae_and_mirrored_images_have_their_own(extract, tmp_path):
    write_image_folder(tmp_path / "images", per_class=3)
    write_vae(tmp_path / "vae")
    options = ("dataset=imagefolder:images", "size=8", "vae=vae", "output=out", "dtype=fp32", "flips=true")
    assert extract(*options, "batch_size=4", "shard_rows=4")[0] == 0
    image = build_dataset("imagefolder:images", size=8, flips=True).fetch(np.arange(12))
    mean, std = load_vae("vae").encode(image["image"])
    cached = build_dataset("features:out", size=8, flips=True).fetch(np.arange(12))
    torch.testing.assert_close(cached["mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached["std"], std, rtol=1e-4, atol=1e-5)
    assert torch.equal(cached["label"], image["label"]) and torch.equal(cached["img_hw"], image["img_hw"])
    assert FeatureDataset("out").scale == 0.5


def test_a_killed_extraction_goes_on_and_damage_is_repaired(extract, tmp_path, caplog):
    extract(*DIGITS, "shard_rows=400")
    shards = tmp_path / "digits" / "shards"
    contents = {path.name: path.read_bytes() for path in shards.iterdir()}
    (shards / "000001.safetensors").unlink()
    (shards / "000002.safetensors").write_bytes(contents["000002.safetensors"][:1000])
    (tmp_path / "digits" / "features.json").unlink()
    code, text = extract(*DIGITS, "shard_rows=400", "start=0", "end=2")
    assert code == 0 and "1 made, 1 kept, 1 missing" in text
    with pytest.raises(ValueError, match="not complete"):
        build_dataset("features:digits", size=8).fetch(np.arange(1536))
    code, text = extract(*DIGITS, "shard_rows=400")
    assert "000002.safetensors is no complete shard" in caplog.text and "1 made, 3 kept, 0 missing" in text
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == contents


def test_work_is_shared_between_machines_by_shards(extract):
    assert "2 missing" in extract(*DIGITS, "shard_rows=400", "end=2")[1]
    with pytest.raises(ValueError, match="not complete; run the same extraction again"):
        build_dataset("features:digits", size=8)
    assert "0 missing" in extract(*DIGITS, "shard_rows=400", "start=2")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("size=16",), "holds features of something else (size differ)"),
        (("flips=true",), "(flips differ)"),
        (("split=validation",), "(images differ)"),
        (("dataset=imagefolder:nowhere",), "nowhere"),
        (("vae=null",), "nothing to extract"),
        (("vae=nowhere",), "vae=nowhere cannot be loaded"),
        (("multi_scale=true",), "needs image files"),
        (("layout=files",), "is not of image files"),
        (("start=2", "end=2"), "must lie beyond"),
        (("dataset=features:digits",), "latents already"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(extract, options, message):
    extract(*DIGITS)
    code, text = extract(*DIGITS, *options)
    assert code == 2 and message in text and text.count("\n") == 1


def test_broken_images_are_named_and_left_out_if_asked(extract, tmp_path, caplog):
    root = write_image_folder(tmp_path / "images", per_class=3)
    for name in ("bird/1.png", "cat/0.png"):
        (root / "train" / name).write_bytes(b"no image")
    options = ("dataset=imagefolder:images", "size=8", "vae=identity", "channels=3", "output=out", "shard_rows=3")
    code, text = extract(*options)
    assert code == 2 and "bird/1.png cannot be read" in text
    code, text = extract(*options, "on_error=skip")
    assert code == 0 and "2 skipped, 4 rows" in text and "left out" in caplog.text
    cached = FeatureDataset("out")
    assert cached.source_rows(np.arange(4)).tolist() == [0, 2, 4, 5]
    assert cached.labels(np.arange(4)).tolist() == [0, 0, 1, 1]
    assert [name.split(" ")[0][-10:] for name in cached.manifest["skipped"]] == ["bird/1.png", "/cat/0.png"]


def test_flips_must_have_been_extracted(extract):
    extract(*DIGITS)
    with pytest.raises(ValueError, match="extract with flips=true"):
        build_dataset("features:digits", size=8, flips=True)


def test_text_alone_needs_no_image(extract, tmp_path):
    root = write_sa1b(tmp_path / "sa1b")
    for path in (root / "images").iterdir():
        path.unlink()
    write_t5(tmp_path / "t5")
    code, _ = extract("dataset=sa1b:sa1b", "vae=null", "text=t5", "text_length=5", "output=out")
    batch = FeatureDataset("out").fetch(np.arange(4))
    assert code == 0 and batch["caption"].shape == (4, 1, 5, 16) and batch["mask"].sum(1).tolist() == [3] * 4


def test_files_are_those_that_sa1b_data_read(extract, tmp_path):
    root = write_sa1b(tmp_path / "sa1b")
    write_vae(tmp_path / "vae")
    write_t5(tmp_path / "t5")
    options = ("dataset=sa1b:sa1b", "size=8", "crop=pixart", "vae=vae", "text=t5", "text_length=5", "layout=files")
    assert "3 made, 0 kept" in extract(*options, "output=sa1b", "end=3")[1]
    assert "1 made, 3 kept" in extract(*options, "output=sa1b", "batch_size=3")[1]
    with np.load(root / "caption_feature_wmask" / "sa_0.npz") as stored:
        assert stored["caption_feature"].shape == (1, 5, 16) and stored["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert np.load(root / "vae_features_8" / "sa_0.npy").shape == (8, 4, 4)
    batch = build_dataset("sa1b_latents:sa1b", size=8).fetch(np.arange(4))
    images = build_dataset("sa1b:sa1b", size=8, crop="pixart").fetch(np.arange(4))
    mean, std = load_vae("vae").encode(images["image"])
    torch.testing.assert_close((batch["mean"], batch["std"]), (mean, std), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch["caption"], images["caption"]) and batch["caption"].shape == (4, 1, 5, 16)
    (root / "vae_features_8" / "sa_2.npy").unlink()
    with pytest.raises(ValueError, match=r"sa_2\.npy is missing"):
        build_dataset("sa1b_latents:sa1b", size=8).fetch(np.arange(4))


def test_several_aspect_ratios_are_trained_on_in_batches_of_one(extract, tmp_path):
    write_sa1b(tmp_path / "sa1b", count=14, sizes=((20, 20), (10, 30)))
    options = ("dataset=sa1b:sa1b", "size=256", "vae=identity", "text=small", "output=out", "multi_scale=true")
    assert extract(*options, "batch_size=3")[0] == 0
    dataset = FeatureDataset("out")
    assert {size: len(rows) for size, rows in dataset.buckets.items()} == {(144, 432): 7, (256, 256): 7}
    with pytest.raises(ValueError, match="train in buckets"):
        dataset.fetch(np.array([0, 13]))
    loader = build_bucket_loader(dataset, global_size=3, micro_size=3, seed=0)
    batches = [batch for batch, _ in zip(loader, range(8), strict=False)]
    assert {tuple(batch["mean"].shape[2:]) for batch in batches} == {(144, 432), (256, 256)}
    assert batches[0]["img_hw"].unique(dim=0).shape == (1, 2)
    state = loader.state_dict()
    assert state["num_rows"] == 12


class OneOfTwo(Parallel):
    """A process of two that run one after the other."""

    def sum(self, values):
        return list(values)

    def barrier(self) -> None:
        """The other one is not there."""


def test_two_processes_write_the_same_files(extract, tmp_path):
    extract(*DIGITS, "shard_rows=400")
    options = {"size": 8, "channels": 1, "vae": "identity", "shard_rows": 400}
    config = ExtractConfig(dataset="digits", output=str(tmp_path / "shared"), **options)
    made = [extract_features(config, OneOfTwo(rank, 2, rank, torch.device("cpu"))) for rank in (0, 1, 0)]
    assert made[0]["missing"] == 2 and made[1] == {} and made[2]["missing"] == 0
    for path in (tmp_path / "digits" / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "shared" / "shards" / path.name).read_bytes()
    manifests = [json.loads((tmp_path / name / "features.json").read_text()) for name in ("digits", "shared")]
    assert manifests[0] == manifests[1]
