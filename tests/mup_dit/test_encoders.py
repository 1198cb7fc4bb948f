"""VAEs and text encoders from folders in the hub's format."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from common.errors import CheckpointError, ConfigError
from mup_dit.encoders import (
    encoder_fingerprint,
    load_small_text,
    load_text_encoder,
    load_vae,
    save_small_text,
)
from mup_dit.small_text import SmallTextEncoder
from tests.mup_dit.hub_folders import write_t5, write_vae


def test_a_vae_gives_mean_and_standard_deviation_and_decodes_scaled_latents(tmp_path):
    vae = load_vae(str(write_vae(tmp_path)))
    theirs = AutoencoderKL.from_pretrained(str(tmp_path)).eval()
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = vae.encode(image)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        torch.testing.assert_close((mean, std), (posterior.mean, posterior.std))
        torch.testing.assert_close(vae.decode(mean * vae.scale), theirs.decode(mean).sample)
    assert (vae.scale, vae.factor, vae.channels, mean.shape) == (0.5, 2, 4, (2, 4, 4, 4))
    assert not any(parameter.requires_grad for parameter in vae.vae.parameters())


def test_a_pipeline_folder_has_a_vae_inside(tmp_path):
    write_vae(tmp_path / "vae")
    assert load_vae(str(tmp_path), scale=0.3).scale == 0.3


def test_the_identity_is_an_encoder_too():
    vae, image = load_vae("identity"), torch.randn(2, 1, 8, 8)
    mean, std = vae.encode(image)
    assert torch.equal(mean, image) and not std.any() and vae.decode(mean) is mean and (vae.scale, vae.factor) == (1, 1)


def test_t5_gives_its_last_hidden_state_of_padded_captions(tmp_path):
    encoder = load_text_encoder(str(write_t5(tmp_path)), length=6)
    found = encoder(["a cat", "a red dog on a red digit one"])
    assert found["caption"].shape == (2, 1, 6, 16) and found["mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    theirs = T5EncoderModel.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():  # what pads hold does not matter: the mask hides them
        hidden = theirs(input_ids=torch.tensor([[3, 9, 1]])).last_hidden_state
    torch.testing.assert_close(found["caption"][0, 0, :3], hidden[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"][0], hidden[0].mean(0), rtol=1e-4, atol=1e-5)


def test_the_small_encoder_is_the_same_wherever_it_is_read(tmp_path):
    encoder = SmallTextEncoder.train(["a red cat", "a dog"], length=4, channels=6, seed=3)
    save_small_text(tmp_path, encoder)
    for other in (load_small_text(tmp_path), load_text_encoder(str(tmp_path))):
        first, second = encoder(["a RED cat on", "dog", ""]), other(["a RED cat on", "dog", ""])
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(first["caption"][0, 0, 3], first["caption"][2, 0, 0])  # the end token's row closes a cut caption
    assert encoder.tokens("zebra") == encoder.tokens("quagga") != encoder.tokens("dog")


def test_random_rows_have_unit_variance():
    encoder = SmallTextEncoder([str(number) for number in range(500)], channels=64)
    pooled = encoder([f"{number} {number + 1} {number + 2}" for number in range(490)])["pooled"]
    assert np.isclose(pooled.std(), 1.0, atol=0.03)


def test_fingerprints_tell_encoders_apart(tmp_path):
    first, second = load_vae(str(write_vae(tmp_path / "a"))), load_vae(str(write_vae(tmp_path / "b")))
    assert encoder_fingerprint(first) == encoder_fingerprint(second)
    with torch.no_grad():
        second.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1
    assert encoder_fingerprint(first) != encoder_fingerprint(second)
    small = [encoder_fingerprint(SmallTextEncoder(["a"], seed=seed)) for seed in (0, 1)]
    assert len({*small, encoder_fingerprint(None), encoder_fingerprint(load_vae("identity"))}) == 4


def test_missing_encoders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="vae=.*cannot be loaded"):
        load_vae(str(tmp_path))
    with pytest.raises(CheckpointError, match="text=.*cannot be loaded"):
        load_text_encoder(str(tmp_path))
    with pytest.raises(ConfigError, match="made from the captions"):
        load_text_encoder("small")
