"""python -m mup_dit.sample: every family on local folders, any number of processes, errors before the first call."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run
from common.errors import ConfigError
from common.testing.distributed import run_torchrun
from mup_dit.generation import generate
from mup_dit.generation_config import GenerateConfig
from mup_dit.objective import ObjectiveConfig
from mup_dit.sample import main as sample
from mup_dit.sampling import SamplerConfig
from mup_dit.saving import save_model
from mup_dit.small_text import SmallTextEncoder
from tests.mup_dit.tiny import model, model_config

SMALL = {"in_channels": 1}
PROMPTS = ["a handwritten digit seven", "a handwritten digit two"]


def save(folder: Path, family: str, heads: int = 4, parametrization: str = "mup", **options) -> Path:
    """A run's export: the network, its objective and its text encoder."""
    metadata = {"objective": asdict(ObjectiveConfig(kind="flow" if family == "mmdit" else "ddpm")), "vae": "identity"}
    if family != "dit":
        channels = 12 if family == "mmdit" else 20
        encoder = SmallTextEncoder.train(PROMPTS, length=6, channels=channels)
        metadata["text"] = encoder.to_dict()
        options |= {"caption_channels": channels} | ({"pooled_channels": channels} if family == "mmdit" else {})
    network = model(family, heads, parametrization, **SMALL, **options)
    save_model(folder, network, model_config(family, heads, parametrization, **SMALL, **options), metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save(root / family, family) for family in ("dit", "pixart", "mmdit")}


def config(folders, family: str, output: Path, **options) -> GenerateConfig:
    sampling = SamplerConfig(**{"steps": 3, "cfg_scale": 1.5, **options.pop("sampling", {})})
    prompts = None if family == "dit" else PROMPTS
    return GenerateConfig(
        **{"model_path": str(folders[family]), "output": str(output), "batch_size": 2, "num_samples": 5,
           "progress": False, "prompts": prompts, "samples_per_prompt": 3, "sampling": sampling,
           "precision": "fp32", **options}
    )  # fmt: skip


def images(generation) -> np.ndarray:
    return np.load(generation.folder / "samples.npz")["arr_0"]


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_every_family_is_sampled_from_its_folder(folders, tmp_path, family):
    generation = generate(config(folders, family, tmp_path / "a"))
    pixels = images(generation)
    assert (pixels.shape, pixels.dtype) == ((5, 8, 8, 1), np.uint8)
    assert generation.evaluations == 6
    assert len({image.tobytes() for image in pixels}) == 5
    records = [json.loads(line) for line in (generation.folder / "manifest.jsonl").read_text().splitlines()]
    assert ("label" if family == "dit" else "prompt") in records[0]
    other = images(generate(config(folders, family, tmp_path / "b", batch_size=5)))
    assert np.abs(pixels.astype(int) - other.astype(int)).max() <= 1  # products round differently in other batches


def test_formats_hold_the_same_images(folders, tmp_path):
    expected = images(generate(config(folders, "dit", tmp_path / "npz")))
    for kind in ("png", "webdataset"):
        generate(config(folders, "dit", tmp_path / kind, format=kind, shard_size=4))
    found = [np.asarray(Image.open(tmp_path / "png" / f"{index:06d}.png")) for index in range(5)]
    assert np.array_equal(np.stack(found), expected[..., 0])
    assert len(list((tmp_path / "webdataset").glob("*.tar"))) == 2


def test_prompts_name_files(folders, tmp_path):
    options = {"format": "jpg", "names": "prompt", "name_length": 15, "num_samples": None, "samples_per_prompt": 1}
    folder = generate(config(folders, "pixart", tmp_path / "a", **options)).folder
    assert sorted(path.name for path in folder.glob("a *.jpg")) == ["a handwritten d.jpg", "a handwritten d_000001.jpg"]


def test_two_processes_write_the_files_of_one(folders, tmp_path):
    arguments = [f"model_path={folders['dit']}", "num_samples=5", "batch_size=2", "sampling.steps=3", "precision=fp32"]
    alone = images(generate(config(folders, "dit", tmp_path / "one", sampling={"cfg_scale": 1.0})))
    run_torchrun("mup_dit.sample", 2, [*arguments, f"output={tmp_path / 'two'}", "progress=false"])
    assert np.array_equal(np.load(tmp_path / "two" / "samples.npz")["arr_0"], alone)


def test_prompts_ask_for_their_shape(tmp_path, monkeypatch):
    monkeypatch.setattr("mup_dit.generation.TEST_TABLES", {8: {}})
    table = {"0.5": (6, 12), "1.0": (8, 8), "2.0": (12, 6)}
    monkeypatch.setattr("mup_dit.generation.aspect_ratio_table", lambda side, test: table)
    folders = {"pixart": save(tmp_path / "model", "pixart", 6, "sp", micro_conditions=True)}
    prompts = ["digit seven --ar 2:1", "digit two", "digit seven --ar 1:2"]
    options = {"prompts": prompts, "samples_per_prompt": 1, "num_samples": None, "batch_size": 3}
    folder = generate(config(folders, "pixart", tmp_path / "a", format="png", **options)).folder
    sizes = [Image.open(folder / f"{index:06d}.png").size for index in range(3)]
    assert sizes == [(6, 12), (8, 8), (12, 6)]  # width, height
    records = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert records[0] == {"index": 0, "file": "000000.png", "prompt": "digit seven", "height": 12, "width": 6}
    with pytest.raises(ConfigError, match="format=png"):
        generate(config(folders, "pixart", tmp_path / "b", **options))


def test_a_weak_model_guides(folders, tmp_path):
    weak = save(tmp_path / "weak", "dit", heads=2)
    strong = config(folders, "dit", tmp_path / "a", sampling={"cfg_scale": 2.0, "cfg_channels": "all"})
    assert not np.array_equal(
        images(generate(strong)),
        images(generate(replace(strong, output=str(tmp_path / "b"), weak_model_path=str(weak)))),
    )
    with pytest.raises(ConfigError, match="is no dit but a pixart"):
        generate(replace(strong, output=str(tmp_path / "c"), weak_model_path=str(folders["pixart"])))


def test_other_sizes_of_a_model_that_takes_them(tmp_path):
    folders = {"pixart": save(tmp_path / "model", "pixart", 6, "sp", micro_conditions=True)}
    generation = generate(config(folders, "pixart", tmp_path / "a", size=[12, 6]))
    assert images(generation).shape == (5, 12, 6, 1)
    with pytest.raises(ConfigError, match="divisible by 2"):
        generate(config(folders, "pixart", tmp_path / "b", size=[12, 7]))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("dit", {"prompts": "a cat"}, "use labels="),
        ("pixart", {"prompts": None}, "give prompts="),
        ("dit", {"sampling": {"sampler": "flow_euler"}}, "does not fit"),
        ("dit", {"labels": [11]}, "label 11"),
        ("dit", {"size": [16, 16]}, "micro_conditions"),
        ("pixart", {"num_samples": 7}, "raise samples_per_prompt"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(folders, tmp_path, family, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(config(folders, family, tmp_path / "a", **options))


def test_latents_need_an_autoencoder(tmp_path):
    save_model(tmp_path / "model", model("dit"), model_config("dit"), metadata={})
    with pytest.raises(ConfigError, match="vae="):
        generate(config({"dit": tmp_path / "model"}, "dit", tmp_path / "a"))


def test_latents_are_decoded_by_a_local_autoencoder(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    save_model(tmp_path / "model", model("dit"), model_config("dit"), metadata={})
    options = config({"dit": tmp_path / "model"}, "dit", tmp_path / "a", vae=str(tmp_path / "vae"))
    assert images(generate(options)).shape == (5, 16, 16, 3)


def test_the_command_line(folders, tmp_path, monkeypatch, capsys):
    arguments = [f"model_path={folders['dit']}", "num_samples=3", "sampling.steps=2", f"output={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["sample", *arguments])
    assert run(sample, "sample", GenerateConfig, "configs/mup_dit") == 0
    assert "3 images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run(sample, "sample", GenerateConfig, "configs/mup_dit")
    assert stopped.value.code == 2
    assert "overwrite=true" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["sample", *arguments, "sampling.sampler=eulerr"])
    with pytest.raises(SystemExit) as stopped:
        run(sample, "sample", GenerateConfig, "configs/mup_dit")
    assert stopped.value.code == 2
    assert "sampling.sampler" in capsys.readouterr().err
