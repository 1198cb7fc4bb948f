"""Networks ready to be given predicted parameters: graph, targets and skeleton, each made once per architecture."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from logah.architecture_graphs import trace_architecture
from logah.architectures import Architecture
from logah.assignment import TargetPlan, plan_targets
from logah.model_config import HyperNetworkConfig
from logah.net_graph import NetGraph
from logah.skeleton import build_skeleton, own_values
from logah.tracing import trace

KEPT_NETWORKS = 512
SHORT = 128  # tokens up to which plain attention is faster: a step of 16 x 64 tokens on a CPU takes 0.8 of the time
RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # written by every forward pass in training mode


@dataclass(frozen=True)
class Network:
    """One network without the values that a prediction supplies.

    Attributes:
        module: a skeleton, or a whole module; nothing is ever written into it.
        own: values of what the prediction does not cover, parameters and buffers, by name.
    """

    module: nn.Module
    graph: NetGraph
    plan: TargetPlan
    own: Mapping[str, Tensor] = field(repr=False)

    @staticmethod
    def of(module: nn.Module, graph: NetGraph) -> "Network":
        """A whole module, whose covered parameters are not used."""
        plan = plan_targets(graph, module)
        covered = set(plan.covered)
        return Network(module, graph, plan, {n: v for n, v in own_values(module).items() if n not in covered})

    def values(self, predicted: Mapping[str, Tensor], device: object) -> dict[str, Tensor]:
        """Everything that the module reads: predicted values and its own, running statistics as copies."""
        mine = {
            name: value.to(device, copy=name.endswith(RUNNING))
            for name, value in self.own.items()
            if name not in predicted
        }
        return mine | dict(predicted)


def build_network(architecture: Architecture, config: HyperNetworkConfig, *, seed: int = 0) -> Network:
    """The network of an architecture, in training mode, with its graph as ``config`` wants it.

    Language models of more than a few tokens run with fused attention, whatever their graph shows.

    Raises: ConfigError for networks that cannot be built or traced.
    """
    graph = trace_architecture(architecture, **graph_options(config))
    attention = "eager" if architecture.kind == "lm" and (architecture.block_size or SHORT + 1) <= SHORT else "sdpa"
    plan = plan_targets(graph, architecture.build_meta(attention=attention))
    skeleton = build_skeleton(lambda: architecture.build(attention=attention), plan.covered, seed=seed).train()
    return Network(skeleton, graph, plan, own_values(skeleton))


def graph_options(config: HyperNetworkConfig) -> dict[str, object]:
    """How the graphs of a hypernetwork are traced."""
    return {
        "variant": config.variant,
        "attention": config.attention,
        "version": config.graph_version,
        "ve_cutoff": config.ve_cutoff,
    }


class NetworkCache:
    """``build_network`` of every architecture that comes up, the latest kept."""

    def __init__(self, config: HyperNetworkConfig, *, seed: int = 0, kept: int = KEPT_NETWORKS) -> None:
        self.config, self.seed, self.kept = config, seed, kept
        self._networks: OrderedDict[str, Network] = OrderedDict()

    def __call__(self, architecture: Architecture) -> Network:
        key = architecture.key
        if key not in self._networks:
            self._networks[key] = build_network(architecture, self.config, seed=self.seed)
            if len(self._networks) > self.kept:
                self._networks.popitem(last=False)
        self._networks.move_to_end(key)
        return self._networks[key]


def build_afresh(architecture: Architecture, config: HyperNetworkConfig) -> Network:
    """As the released trainer does it: the network with random values of its own, traced on real tensors.

    Slow; kept to measure against.
    """
    module = architecture.build(attention="eager" if config.attention == "explicit" else "sdpa").train()
    options = graph_options(config)
    graph = trace(module, **options, image_size=architecture.image_size if architecture.kind == "vision" else None)
    return Network.of(module, graph)
