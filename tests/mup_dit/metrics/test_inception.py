"""The Inception network against torch-fidelity's own extractor, with random weights in its file format."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from common.errors import CheckpointError, DataError
from mup_dit.metrics.clean_resize import clean_resize, square
from mup_dit.metrics.inception import Inception, InceptionFeatures, load_inception, require_rgb

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(Inception().state_dict(), path)
    return path


def images(*sizes: tuple[int, int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def test_features_equal_torch_fidelity_s(weights):
    network = InceptionFeatures(str(weights), CPU)
    mixed = images((32, 32, 3), (40, 24, 3))
    found = network(mixed)
    oracle = FeatureExtractorInceptionV3("oracle", ["2048", "logits_unbiased"], str(weights))
    spatial = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :7]))
    for row, image in enumerate(mixed):
        pool, logits = oracle(torch.from_numpy(image).permute(2, 0, 1)[None])
        torch.testing.assert_close(found.pool_BD[row], pool[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.logits_BK[row], logits[0], rtol=1e-4, atol=1e-4)
        expected = spatial[row][0].permute(1, 2, 0).flatten()
        torch.testing.assert_close(found.spatial_BE[row], expected, rtol=1e-4, atol=1e-5)
    assert found.pool_BD.shape == (2, 2048) and found.spatial_BE.shape == (2, 2023)
    # the path of clean features takes images of the network's size
    x_BCHW = torch.from_numpy(images((299, 299, 3))[0]).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(network.ready(x_BCHW).pool_BD, oracle(x_BCHW.byte())[0], rtol=1e-4, atol=1e-5)


def test_weights_load_from_safetensors_too(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_inception(str(tmp_path / "weights.safetensors")).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_inception(str(tmp_path / "missing.pth"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"broken\.pth"):
        load_inception(str(broken))
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_inception(str(other))


def test_images_of_two_channels_are_refused():
    with pytest.raises(DataError, match=r"\(4, 4, 2\)"):
        require_rgb([np.zeros((4, 4, 2), np.uint8)])


def test_squares_are_the_middle_and_clean_resizing_keeps_constants():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (square(wide, 8) == 200).all() and square(wide, None).shape == (10, 30, 3)
    resized = clean_resize(square(wide, 8))
    assert resized.shape == (299, 299, 3) and np.allclose(resized, 200)
