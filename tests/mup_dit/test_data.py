"""From options to data: names, sizes, noise for any network, encoders, what fits together."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.parallel import Parallel
from mup_dit.data import DataSection, build_data, describe_sources
from mup_dit.objective import ObjectiveConfig
from mup_dit.task import DiffusionTask
from tests.mup_dit.tiny import model, model_config

DIGITS = {"input_size": 8, "in_channels": 1, "learn_sigma": False}


def test_digits_by_name_with_their_held_out_part():
    data = build_data(DataSection(valid="digits"), model_config("dit", **DIGITS), seed=0)
    assert (len(data.train), len(data.valid)) == (1536, 261)
    batch = data.train.fetch(np.arange(5))
    assert batch["image"].shape == (5, 1, 8, 8)
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1
    assert data.encoder is None


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_noise_fits_any_network(family):
    config = model_config(family)
    data = build_data(DataSection(train="noise", valid="noise"), config, seed=3)
    rows = np.array([7, 2])
    batch = data.train.fetch(rows)
    assert all(torch.equal(value, data.train.fetch(rows[::-1])[name].flip(0)) for name, value in batch.items())
    assert not torch.equal(batch["image"], data.valid.fetch(rows)["image"])
    task = DiffusionTask(config, ObjectiveConfig(kind="flow" if family == "mmdit" else "ddpm"), seed=0)
    out = task.training_step(model(family), batch, task.draw(0, 2))
    assert torch.isfinite(out.loss_sum)


@pytest.fixture(scope="module")
def features(tmp_path_factory, vae):
    """Cached latents and caption features of some digits."""
    from common.conversion import from_config
    from mup_dit.extract_config import ExtractConfig, extract_features

    folder = tmp_path_factory.mktemp("features")
    options = {"dataset": "digits", "output": str(folder / "cache"), "size": 16, "vae": str(vae), "text": "small",
               "split": "validation", "shard_rows": 100}  # fmt: skip
    extract_features(from_config(ExtractConfig, options), Parallel(0, 1, 0, torch.device("cpu")))
    return folder / "cache"


def test_cached_latents_know_their_scale_their_vae_and_their_text_encoder(features, vae):
    config = model_config("pixart", caption_channels=32, model_max_length=8)
    section = DataSection(train=f"features:{features}")
    data = build_data(section, config, seed=0)
    assert data.latent_scale == pytest.approx(0.18215)
    assert build_data(DataSection(train=f"features:{features}", latent_scale=0.5), config, seed=0).latent_scale == 0.5
    sources = describe_sources(section, config)
    assert sources["vae"] == str(vae)
    assert sources["text"]["kind"] == "small"
    task = DiffusionTask(config, ObjectiveConfig(), seed=0, latent_scale=data.latent_scale)
    batch = data.train.fetch(np.arange(3))
    draws = task.draw(0, 3)
    expected = (batch["mean"].float() + batch["std"].float() * draws["posterior"]) * 0.18215
    torch.testing.assert_close(task.latents(batch, draws), expected)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_images_are_encoded_while_training(vae):
    config = model_config("dit")  # latents of 4 x 8 x 8
    data = build_data(DataSection(train="digits", vae=str(vae)), config, seed=0)
    batch = data.train.fetch(np.arange(3))
    assert batch["image"].shape == (3, 3, 16, 16)  # the latent's side times the VAE's factor
    task = DiffusionTask(config, ObjectiveConfig(), seed=0, encoder=data.encoder)
    draws = task.draw(0, 3)
    mean, std = data.encoder.encode(batch["image"])
    torch.testing.assert_close(task.latents(batch, draws), (mean + std * draws["posterior"]) * data.encoder.scale)
    assert data.decode(task.latents(batch, draws)).shape == (3, 3, 16, 16)


def test_unknown_names_and_sizes_are_refused():
    config = model_config("dit", **DIGITS)
    with pytest.raises(ConfigError, match="dgits"):
        build_data(DataSection(train="dgits"), config, seed=0)
    with pytest.raises(ConfigError, match="lacks a place"):
        build_data(DataSection(train="imagefolder"), config, seed=0)
    with pytest.raises(ConfigError, match="digits of size 12"):
        build_data(DataSection(size=12), config, seed=0)
