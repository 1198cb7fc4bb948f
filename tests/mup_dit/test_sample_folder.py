"""Folders of samples: any format, any number of processes, resumed or replaced, never silently overwritten."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError, DataError
from common.parallel import Parallel
from mup_dit.generation_config import GenerateConfig
from mup_dit.requests import plan_requests
from mup_dit.sample_folder import prepare, write_images

ALONE = Parallel(0, 1, 0, torch.device("cpu"))


class Maker:
    """Images that hold their index; counts its calls and can break off."""

    evaluations = 7

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches, self.stop_after = [], stop_after

    def __call__(self, requests):
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append([request.index for request in requests])
        return np.stack([np.full((4, 4, 3), request.index, np.uint8) for request in requests])


class Share(Parallel):
    """One of several processes, run one after the other: sums and waits are its own."""

    def _reduce(self, values, operation):
        return [float(value) for value in values]


def config(tmp_path, **options) -> GenerateConfig:
    return GenerateConfig(
        **{"model_path": "m", "output": str(tmp_path / "out"), "batch_size": 3, "progress": False, **options}
    )


def requests(count: int = 8, **options):
    return plan_requests(labels=list(range(count)), **options)


def pixels_of(folder, kind: str) -> list[int]:
    if kind == "npz":
        return np.load(folder / "samples.npz")["arr_0"][:, 0, 0, 0].tolist()
    return [int(np.asarray(Image.open(path))[0, 0, 0]) for path in sorted(folder.glob("0*.png"))]


@pytest.mark.parametrize("kind", ["npz", "png", "webdataset"])
def test_a_folder_describes_itself(tmp_path, kind):
    generation = write_images(config(tmp_path, format=kind, shard_size=5, grid=4), Maker(), requests(), ALONE)
    folder = generation.folder
    assert (generation.images, generation.made, generation.evaluations) == (8, 8, 7)
    assert "8 images" in generation.summary()
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert lines[5] == {"index": 5, "file": "000005.png", "label": 5}
    described = json.loads((folder / "samples.json").read_text())
    assert described["complete"]
    assert described["seed"] == 0
    assert {"git_revision", "versions", "options", "network_evaluations_per_image"} <= described.keys()
    assert np.asarray(Image.open(folder / "grid.png")).shape == (10, 10, 3)
    assert not (folder / ".parts").exists()
    if kind == "webdataset":
        assert sorted(path.name for path in folder.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    else:
        assert pixels_of(folder, kind) == list(range(8))


@pytest.mark.parametrize("kind", ["npz", "png", "webdataset"])
def test_a_stopped_run_is_completed_without_repeating_blocks(tmp_path, kind):
    options = config(tmp_path, format=kind, shard_size=3)
    with pytest.raises(KeyboardInterrupt):
        write_images(options, Maker(stop_after=2), requests(), ALONE)
    with pytest.raises(DataError, match="resume=true"):
        write_images(options, Maker(), requests(), ALONE)
    with pytest.raises(DataError, match="other options"):
        write_images(replace(options, resume=True, seed=3), Maker(), requests(), ALONE)
    maker = Maker()
    generation = write_images(replace(options, resume=True), maker, requests(), ALONE)
    assert maker.batches == [[6, 7]]
    assert generation.made == 2
    if kind != "webdataset":
        assert pixels_of(generation.folder, kind) == list(range(8))
    assert np.asarray(Image.open(generation.folder / "grid.png")).shape[0] == 3 * 6 - 2
    again = write_images(replace(options, resume=True), Maker(stop_after=0), requests(), ALONE)
    assert again.made == 0
    assert "none of them new" in again.summary()


def test_processes_make_the_batches_of_one(tmp_path):
    options = config(tmp_path)
    whole = Maker()
    write_images(options, whole, requests(), ALONE)
    shared = []
    folder = replace(options, output=str(tmp_path / "two"), resume=True)
    prepare(tmp_path / "two", folder)  # the main process begins first and finishes last
    for rank in (1, 0):
        maker = Maker()
        write_images(folder, maker, requests(), Share(rank, 2, rank, torch.device("cpu")))
        shared += maker.batches
    assert sorted(shared) == whole.batches
    one, two = (tmp_path / name / "samples.npz" for name in ("out", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_replacing_removes_only_what_a_run_wrote(tmp_path):
    options = config(tmp_path, format="png")
    write_images(options, Maker(), requests(), ALONE)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write_images(replace(options, overwrite=True), Maker(), requests(3), ALONE)
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.png")) == ["000000.png", "000001.png", "000002.png"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("text")
    with pytest.raises(DataError, match="no samples"):
        write_images(config(tmp_path, overwrite=True), Maker(), requests(), ALONE)


def test_geneval_folders_hold_their_metadata(tmp_path):
    options = config(tmp_path, format="png", layout="geneval", prompts=["a", "b"], samples_per_prompt=2, grid=0)
    plan = plan_requests(prompts=["a", "b"], samples_per_prompt=2, layout="geneval")
    folder = write_images(options, Maker(), plan, ALONE, details=[{"prompt": "a", "tag": "t"}, {"prompt": "b"}]).folder
    assert json.loads((folder / "00000" / "metadata.jsonl").read_text()) == {"prompt": "a", "tag": "t"}
    assert (folder / "00001" / "samples" / "00001.png").exists()
    assert not (folder / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ""}, "output is empty"),
        ({"overwrite": True, "resume": True}, "contradict"),
        ({"format": "bmp"}, "format"),
        ({"layout": "geneval"}, "format=png"),
        ({"names": "prompt"}, "format=jpg"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **options)
