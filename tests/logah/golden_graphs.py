"""Golden cases of traced graphs: the network of a case is built and traced on real or on meta tensors."""

from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from logah.meta_building import build_on_meta
from logah.net_graph import NetGraph
from logah.tracing import trace


class SmallConvNet(nn.Module):
    """The convolutional network of the golden cases: ``c`` channels, ``k`` classes."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(c, 2 * c, 1)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * c, k)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.conv2(x))
        x = torch.relu(self.conv3(self.pool(x)))
        return self.fc(self.gap(x).flatten(1))


def build_network(config: Mapping) -> nn.Module:
    """The network a case describes, by the keys its description has."""
    if "arch" in config:
        quiet = {"init_weights": False} if config["arch"] in ("googlenet", "inception_v3") else {}
        return getattr(torchvision.models, config["arch"])(**quiet)
    if "patch_size" in config:
        keys = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "num_classes")
        return VisionTransformer(**{key: config[key] for key in keys if key in config})
    if "c" in config:
        return SmallConvNet(config["c"], config["k"])
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    options = {key: value for key, value in config.items() if key not in ("input_ids", "ve_cutoff")}
    if "n_embd" in options:
        return GPT2LMHeadModel(GPT2Config(**options))
    return LlamaForCausalLM(LlamaConfig(**options))


def trace_case(config: Mapping, device: str) -> NetGraph:
    """The graph of the case's network, built on ``device`` (``cpu`` or ``meta``)."""
    with torch.random.fork_rng():
        model = build_on_meta(lambda: build_network(config)) if device == "meta" else build_network(config)
    ids = torch.tensor(config["input_ids"], device=device) if "input_ids" in config else None
    return trace(
        model,
        variant="llm",  # the table all cases were made with
        attention="explicit" if config.get("attention") == "explicit" else "as_is",
        ve_cutoff=config["ve_cutoff"],
        inputs=None if ids is None else {"input_ids": ids},
        image_size=config["input"][1:] if "input" in config else None,
    )


def described(graph: NetGraph) -> dict[str, list]:
    """A graph in the words of ``facts``: its nodes and its ``node_info``."""
    nodes, info = [], []
    for index, node in enumerate(graph.nodes):
        shape = None if node.shape is None else list(node.shape)
        before = graph.predecessors(index)
        nodes.append({"i": index, "name": node.name, "type": node.type_name, "shape": shape, "in": before})
        if node.listed:
            name = node.type_name if node.name.endswith("Backward0") else node.name
            info.append([index, name, node.type_name, shape, node.is_last_weight, node.is_last_bias])
    return {"nodes": nodes, "node_info": info}


def _graph(case: Mapping, config: Mapping, inputs: Mapping) -> dict[str, object]:
    """Traced on both devices, which must agree; the arrays are those of the meta trace."""
    graph, on_meta = trace_case(config, "cpu"), trace_case(config, "meta")
    assert on_meta.nodes == graph.nodes
    assert (on_meta.distance_NN == graph.distance_NN).all()
    if facts := case.get("facts"):
        got = described(on_meta)
        for key, expected in facts.items():
            assert got[key] == expected, key
    return {"out_adj": on_meta.distance_NN, "out_node_type": on_meta.type_N}


def _is_graph(case: Mapping, config: Mapping, inputs: Mapping) -> bool:
    return "out_adj" in case.get("arrays", ()) or ("ve_cutoff" in config and "ghn" not in config)


KINDS = [(_is_graph, _graph)]
