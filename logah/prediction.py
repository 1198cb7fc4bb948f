"""All parameters of networks from their graphs: with gradients for training, or written into a module.

Dimensions: B networks, N nodes of the largest, d width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.seeding import generator as seeded
from logah.assignment import Target, TargetPlan, plan_targets
from logah.decoder_v2 import parts_of, role_of
from logah.decoding import Group, decode_groups, prepare
from logah.full_decoding import decode_groups_fully
from logah.hypernetwork import HyperNetwork
from logah.net_graph import NetGraph
from logah.row_chunks import FactoredMatrix
from logah.sequential_decoding import decode_each
from logah.tracing import trace

NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Prediction:
    """Decoded parameters of B networks.

    Attributes:
        parameters: per network, by every name of a parameter (tied names hold the same tensor).
        norm_sum: sum of the Frobenius norms of all decoded parameters of all networks.
        x_BNd: embeddings of the nodes.
    """

    parameters: list[dict[str, Tensor]]
    norm_sum: Tensor
    x_BNd: Tensor


@dataclass(frozen=True)
class PredictionReport:
    """What became of a network's parameters.

    Attributes:
        predicted: names of decoded ones.
        kept: names of those that no node covers; they hold their initial values.
        values: number of values that were decoded.
    """

    predicted: tuple[str, ...]
    kept: tuple[str, ...]
    values: int
    graph: NetGraph | None = field(default=None, repr=False)


def predict(
    hypernetwork: HyperNetwork,
    graphs: Sequence[NetGraph],
    plans: Sequence[TargetPlan],
    *,
    x_BNd: Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
    scheme: Literal["exact", "full"] = "exact",
) -> Prediction:
    """Parameters of several networks at once, through which gradients reach the hypernetwork.

    Networks of different sizes share the pass over their padded graphs, and parameters of equal shape are decoded
    together; the result of each network is that of predicting it alone. Decoders run in float32 whatever the autocast.

    Args:
        plans: ``plan_targets`` of each network; made once, they serve every step.
        x_BNd: embeddings of these very graphs, if they are known already.
        generators: of class-token rows, one per network, if ``class_token_noise`` is not zero.
        scheme: ``full`` decodes whole factors at rounded sizes and cuts them, as released: the same numbers, slower.
    """
    if x_BNd is None:
        x_BNd = hypernetwork.embed_graphs(list(graphs))
    nodes = x_BNd.shape[1]
    with torch.autocast(x_BNd.device.type, enabled=False):
        start = prepare(hypernetwork, x_BNd.flatten(0, 1))
        groups = list(_alike(plans))
        decoded = (decode_groups_fully if scheme == "full" else decode_groups)(
            hypernetwork,
            [
                Group(
                    members[0][1],
                    plans[members[0][0]],
                    start.rows([network * nodes + target.node for network, target in members]),
                    None if generators is None else [generators[network] for network, _ in members],
                )
                for members in groups
            ],
        )
        norms = [torch.linalg.vector_norm(values.flatten(1), dim=1).sum() for values in decoded]
    found: list[dict[str, Tensor]] = [{} for _ in graphs]
    for members, values in zip(groups, decoded, strict=True):
        for (network, target), value in zip(members, values.unbind(), strict=True):
            found[network].update(dict.fromkeys(target.names, value))
    return Prediction(found, torch.stack(norms).sum() if norms else x_BNd.sum() * 0, x_BNd)


def _alike(plans: Sequence[TargetPlan]) -> Iterator[list[tuple[int, Target]]]:
    """Targets that one call decodes, as (network, target)."""
    groups: dict[tuple, list[tuple[int, Target]]] = {}
    for network, plan in enumerate(plans):
        for target in plan.targets:
            # whatever changes the numbers besides the node: the scale of unit_std depends on the network and the name
            key = (target.shape, target.role, target.row, target.embedding, plan.initializer_range, plan.num_blocks,
                   target.residual, role_of(target), parts_of(target))  # fmt: skip
            groups.setdefault(key, []).append((network, target))
    yield from groups.values()


@torch.no_grad()
def fill(
    hypernetwork: HyperNetwork,
    model: nn.Module,
    *,
    graph: NetGraph | None = None,
    x_Nd: Tensor | None = None,
    predict_class_layers: bool = True,
    strict: bool = False,
    class_token_seed: int = 0,
    image_size: int | None = None,
) -> PredictionReport:
    """Writes predicted parameters into ``model``, one at a time; tied parameters stay tied, all others keep theirs.

    Args:
        model: real tensors, on any device.
        graph: of this network; None: it is traced as the hypernetwork was trained.
        x_Nd: embeddings of its nodes, if they are known already.
        predict_class_layers: False: the class layer keeps its values.
        strict: refuse networks with parameters that no node covers.
        class_token_seed: of the class token's row, where ``class_token_noise`` is not zero.

    Raises: ConfigError for graphs traced otherwise, decoders too small for a parameter, or, if strict, uncovered ones.
    """
    config = hypernetwork.config
    if graph is None:
        graph = trace(
            model,
            variant=config.variant,
            attention=config.attention,
            version=config.graph_version,
            ve_cutoff=config.ve_cutoff,
            image_size=image_size,
        )
    plan = plan_targets(graph, model, predict_class_layers=predict_class_layers)
    require_covered(plan, strict=strict)
    if x_Nd is None:
        x_Nd = hypernetwork.embed_graphs([graph])[0]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target in plan.targets:
        if parameters[target.name].device.type == "meta":
            raise ConfigError(f"{target.name} is on the meta device; build the network with values, then fill it.")
    noise = seeded(class_token_seed, "class token")
    start = prepare(hypernetwork, x_Nd)
    for target, value in decode_each(hypernetwork, start, plan, generator=noise):
        parameter = parameters[target.name]
        if isinstance(value, FactoredMatrix):
            value.materialise(out=parameter.data)
        else:
            parameter.copy_(value)
    return PredictionReport(
        predicted=tuple(target.name for target in plan.targets),
        kept=plan.uncovered,
        values=sum(target.numel for target in plan.targets),
        graph=graph,
    )


def require_covered(plan: TargetPlan, *, strict: bool) -> None:
    """Raises ConfigError if ``strict`` and a parameter has no node."""
    if strict and plan.uncovered:
        shown = ", ".join(plan.uncovered[:5]) + (", ..." if len(plan.uncovered) > 5 else "")
        raise ConfigError(
            f"strict=true, but no node of the graph covers {len(plan.uncovered)} parameters: {shown}. With "
            "strict=false they keep their initial values."
        )


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Makes batch normalisations use the statistics of each batch: predicted networks have no running ones."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.train()
            module.track_running_stats = False
    return model
