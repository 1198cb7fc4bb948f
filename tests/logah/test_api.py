"""The hypernetwork from Python."""

import torch
from torchvision.models import VisionTransformer

from logah.api import load, predict
from logah.checkpoints import save_hypernetwork
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig


def small() -> HyperNetwork:
    torch.manual_seed(0)
    config = HyperNetworkConfig(hid=16, layers=1, heads=2, lora_r=4, max_ck_lora=512, max_shape=64)
    return HyperNetwork(config)


def network() -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10)


def test_a_saved_hypernetwork_fills_a_network_the_same_every_time(tmp_path):
    save_hypernetwork(tmp_path / "h", small())
    first, second = network(), network()
    report = predict(first, tmp_path / "h")
    assert report.kept == ("class_token",)
    predict(second, load(tmp_path / "h"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.heads.head.weight, network().heads.head.weight)


def test_the_class_layer_is_left_alone_on_request(tmp_path):
    filled = network()
    report = predict(filled, small(), predict_class_layers=False)
    assert torch.equal(filled.heads.head.weight, network().heads.head.weight)
    assert {"heads.head.weight", "heads.head.bias"} <= set(report.kept)
