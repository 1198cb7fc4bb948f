"""Networks by name: sizes and names of the published ones, heads, initial weights, what is trained."""

import pytest
import torch

from common.errors import ConfigError
from rpg.checkpoint_files import write_checkpoint
from rpg.zoo.digit_tasks import KEYS, ensemble_logits, initial_weights
from rpg.zoo.networks import CNNMedium, CNNSmall, DigitTaskMLP, NetworkSection, build_network, head_name, skeleton


@pytest.mark.parametrize("kind, parameters", [(CNNSmall, 2864), (CNNMedium, 10853)])
def test_small_networks_have_the_published_sizes_and_names(kind, parameters):
    network = kind()
    assert sum(value.numel() for value in network.parameters()) == parameters
    names = {name.rpartition(".")[0] for name in network.state_dict()}
    assert names == {"module.0", "module.3", "module.6", "head.0", "head.2"}
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_network_of_digit_tasks_computes_what_the_ensemble_does():
    network, weights = DigitTaskMLP(), initial_weights(2, 0, "test")
    network.load_state_dict(weights, strict=True)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stacked = {key: weights[key][None] for key in KEYS}
    assert torch.allclose(network(images), ensemble_logits(stacked, images.flatten(1))[0], atol=1e-6)


def test_task_networks_have_the_published_head():
    section = NetworkSection(name="timm:vit_tiny_patch16_224", num_classes=2, head="mlp")
    state = skeleton(section).state_dict()
    head = {name: tuple(value.shape) for name, value in state.items() if name.startswith("head.")}
    assert head == {"head.0.weight": (192, 192), "head.0.bias": (192,), "head.2.weight": (2, 192)}


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    states = [build_network(NetworkSection(), seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.0.weight"], states[2]["head.0.weight"])


def test_weights_from_a_file_fit_all_but_the_head(tmp_path):
    path = write_checkpoint(tmp_path / "published.safetensors", CNNSmall(num_classes=7).state_dict())
    network = build_network(NetworkSection(num_classes=3, weights=str(path)))
    assert torch.equal(
        network.module[0].weight, build_network(NetworkSection(num_classes=7, weights=str(path))).module[0].weight
    )
    assert network.head[2].weight.shape == (3, 20)
    with pytest.raises(ConfigError, match=r"module.0.weight is \(16, 3, 3, 3\)"):
        build_network(NetworkSection(name="cnn_medium", weights=str(path)))


def test_patterns_choose_what_is_trained():
    section = NetworkSection(name="torchvision:resnet18", trainable=["layer4.1.bn[12].*"])
    trained = [name for name, value in build_network(section).named_parameters() if value.requires_grad]
    assert trained == [f"layer4.1.bn{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")]
    frozen = build_network(NetworkSection(name="digit_cnn", freeze_norms=True))
    assert [name for name, value in frozen.named_parameters() if not value.requires_grad] == [
        f"features.{n}.{leaf}" for n in (1, 5) for leaf in ("weight", "bias")
    ]
    with pytest.raises(ConfigError, match="Did you mean head.2.weight"):
        build_network(NetworkSection(trainable=["head.1.weight"]))


def test_heads_are_found_by_name_or_as_the_last_linear_layer():
    assert head_name(CNNSmall()) == "head"
    assert head_name(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))) == "2"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("cnn_smal", "Did you mean cnn_small"),
        ("timm:vit_tiny_patch16_22", "Did you mean .*vit_tiny_patch16_224"),
        ("torchvision:resnet19", "Did you mean"),
        ("no_such_module_here:Net", "MODULE:CLASS"),
        ("rpg.zoo.networks:Nothing", "MODULE:CLASS"),
    ],
)
def test_unknown_networks_are_answered_with_what_there_is(name, reason):
    with pytest.raises(ConfigError, match=reason):
        build_network(NetworkSection(name=name))
