"""GHN-2: its walk, its published layout, and a prediction with it."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from common.errors import ConfigError
from logah.checkpoints import load_hypernetwork
from logah.ghn2 import GHN2, GatedGraphNetwork
from logah.graph_batch import collate
from logah.model_config import HyperNetworkConfig
from logah.prediction import fill
from logah.tracing import trace


def tiny(**options) -> GHN2:
    torch.manual_seed(0)
    sizes = {"decoder": "ghn2", "hid": 16, "heads": 2, "layers": 1, "max_shape": (8, 8, 11, 11), "num_classes": 10}
    return GHN2(HyperNetworkConfig(**sizes | options)).eval()


def plainly(network: GatedGraphNetwork, x_Nd: torch.Tensor, distance_NN: torch.Tensor) -> torch.Tensor:
    """Equations 3 and 4 as they are written: one sum over neighbours per node."""
    x = list(x_Nd)
    for backwards in (False, True):
        nodes = range(len(x))
        for node in reversed(nodes) if backwards else nodes:
            heard = torch.zeros_like(x[0])
            for other in nodes:
                length = distance_NN[node, other] if backwards else distance_NN[other, node]
                if length == 1:
                    heard = heard + network.mlp(x[other])
                if length > 0 and network.mlp_ve is not None:
                    heard = heard + network.mlp_ve(x[other]) / length
            x[node] = network.gru(heard[None], x[node][None])[0]
    return torch.stack(x)


@pytest.mark.parametrize("virtual_edges", [True, False])
@torch.no_grad()
def test_the_walk_follows_the_equations(virtual_edges):
    torch.manual_seed(0)
    network = GatedGraphNetwork(8, virtual_edges=virtual_edges)
    distance_NN = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 0, 1, 2], [0, 0, 0, 1, 2], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    x_Nd = torch.randn(5, 8)
    expected = plainly(network, x_Nd, distance_NN)
    torch.testing.assert_close(network.walk(x_Nd.clone(), distance_NN), expected)
    batch, mask = torch.zeros(2, 7, 8), torch.zeros(2, 7, dtype=torch.bool)
    distances = torch.zeros(2, 7, 7, dtype=torch.int64)
    batch[1], mask[0, :5], mask[1] = torch.randn(7, 8), True, True
    batch[0, :5], distances[0, :5, :5] = x_Nd, distance_NN
    distances[1, :-1, 1:] = torch.eye(6, dtype=torch.int64)
    torch.testing.assert_close(network(batch, distances, mask)[0, :5], expected)


def test_a_file_of_its_layout_loads_and_predicts_all_of_a_resnet(tmp_path):
    model = tiny()
    state = {}
    for name, value in model.state_dict().items():
        is_convolution = name.startswith(("decoder.conv.", "decoder.class_layer")) and value.dim() == 2
        state[name] = value[:, :, None, None] if is_convolution else value
    assert "gnn.gru.weight_ih" in state and "gnn.mlp_ve.fc.2.weight" in state
    path = tmp_path / "ghn2.pt"
    torch.save(state, path)
    loaded = load_hypernetwork(path, max_shape=(8, 8, 11, 11), heads=2)
    assert loaded.config.decoder == "ghn2" and isinstance(loaded.model, GHN2)
    network = resnet18(num_classes=10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = fill(loaded.model, network)
    assert report.kept == () and set(report.predicted) == {name for name, _ in network.named_parameters()}
    assert not torch.equal(before["fc.weight"], network.fc.weight)
    own = resnet18(num_classes=10)
    fill(model, own)
    for name, value in own.named_parameters():
        assert torch.equal(value, network.get_parameter(name)), name


def test_embeddings_of_a_batch_are_those_of_each_graph_alone():
    model = tiny()
    graphs = [trace(nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(depth)]), image_size=16) for depth in (1, 3)]
    with torch.no_grad():
        both = model.embed_batch(collate(graphs))
        alone = model.embed_batch(collate(graphs[:1]))
    torch.testing.assert_close(both[0, : len(graphs[0])], alone[0])


def test_it_is_not_built_from_another_config():
    with pytest.raises(ConfigError, match="model.decoder=dense"):
        GHN2(HyperNetworkConfig(decoder="dense"))
