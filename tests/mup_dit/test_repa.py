"""Frozen features for REPA: one per image token, from a vision transformer in the hub's format."""

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from mup_dit.repa import FrozenFeatures


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("grid", "channels"), [(4, 3), (2, 1)])
def test_every_image_token_has_a_feature(dinov2, grid, channels):
    features = FrozenFeatures(str(dinov2), grid)
    image = torch.rand(2, channels, 32, 32) * 2 - 1
    found = features(image)
    assert found.shape == (2, grid**2, 16)
    assert not found.requires_grad
    torch.testing.assert_close(features(image[1:])[0], found[1], rtol=1e-4, atol=1e-5)


def test_patches_are_in_the_order_of_the_image(dinov2):
    features = FrozenFeatures(str(dinov2), 2)
    image = torch.zeros(1, 3, 14, 14)
    changed = image.clone()
    changed[:, :, :7, 7:] = 1.0  # top right: token 1
    difference = (features(changed) - features(image)).abs().sum(dim=-1)[0]
    assert difference.argmax().item() == 1


def test_missing_and_unfit_encoders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"data.repa_encoder=.*nowhere cannot be loaded"):
        FrozenFeatures(str(tmp_path / "nowhere"), 2)
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="is no vision transformer"):
        FrozenFeatures(str(tmp_path / "bert"), 2)
