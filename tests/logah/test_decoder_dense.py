"""GHN-3's decoder: crops, class head, vectors, initial values."""

import pytest
import torch
from torch.nn import functional as F

from common.testing.golden import fill
from logah.decoder_dense import DenseDecoder, VectorDecoder, shrink_last_layers


def filled(*, centred: bool = True, max_shape=(8, 6, 5, 5)) -> DenseDecoder:
    with torch.random.fork_rng():
        return fill(DenseDecoder(12, max_shape, 10, centred=centred), 8).eval()


X = torch.randn(2, 12, generator=torch.Generator().manual_seed(5))


def whole_kernel(decoder: DenseDecoder) -> torch.Tensor:
    """Every channel and pixel, by the definition: one map to pixels, then the same two layers at each."""
    size = decoder.max_shape[2]
    pixels = decoder.fc(X).view(len(X), -1, size * size).transpose(1, 2)
    return decoder.conv(pixels).transpose(1, 2).reshape(len(X), *decoder.max_shape[:2], size, size)


@torch.no_grad()
@pytest.mark.parametrize("size, first", [(1, 2), (2, 1), (3, 1), (4, 0), (5, 0)])
def test_kernels_are_cropped_round_the_centre(size: int, first: int):
    decoder = filled()
    crop = slice(first, first + size)
    found = decoder(X, (8, 6, size, size))
    assert torch.allclose(found, whole_kernel(decoder)[..., crop, crop], atol=1e-6)


@torch.no_grad()
def test_ghn_2_crops_at_the_first_corner():
    decoder = filled(centred=False)
    assert torch.allclose(decoder(X, (8, 6, 3, 2)), whole_kernel(decoder)[..., :3, :2], atol=1e-6)


@torch.no_grad()
def test_channels_are_cut_and_never_exceed_those_there_are():
    decoder = filled()
    whole = whole_kernel(decoder)
    assert torch.allclose(decoder(X, (5, 4, 5, 5)), whole[:, :5, :4], atol=1e-6)
    assert decoder(X, (20, 20, 1, 1)).shape == (2, 8, 6, 1, 1)


@torch.no_grad()
def test_kernels_larger_than_decoded_are_resized():
    decoder = filled()
    found = decoder(X, (8, 6, 7, 7))
    assert found.shape == (2, 8, 6, 7, 7)
    alone = torch.cat([decoder(x[None], (8, 6, 7, 7)) for x in X])  # the released code handles one node at a time
    assert torch.allclose(found, alone, atol=1e-6)


@torch.no_grad()
def test_the_class_head_maps_output_channels_to_classes():
    decoder = filled()
    found = decoder(X, (10, 4, 1, 1), "class")
    centre = whole_kernel(decoder)[:, :, :4, 2, 2]
    layer = decoder.class_layer_predictor[1]
    expected = torch.einsum("koi,co->kci", F.relu(centre), layer.weight) + layer.bias[:, None]
    assert found.shape == (2, 10, 4) and torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_vectors_come_as_weight_and_bias():
    with torch.random.fork_rng():
        decoder = fill(VectorDecoder(12, 7), 3)
    assert torch.equal(decoder(X), decoder.fc(X).view(2, 2, 7))


def test_last_layers_start_small():
    layer = torch.nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    shrink_last_layers(layer)
    assert torch.allclose(layer.weight * 5, before) and not layer.bias.any()
