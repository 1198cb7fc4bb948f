"""What the hypernetwork is trained for: the task loss of networks that hold predicted parameters.

Dimensions: B networks, n samples of their mini-batch, L tokens of a sequence, V vocabulary or classes.

Source: GHN-3 and LoGAH, section "Training": the sum over networks of the task loss, plus 3e-5 times the sum of the
Frobenius norms (not squared) of all their parameters (golden cases ``train_step_*``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from logah.hypernetwork import HyperNetwork
from logah.networks import Network
from logah.prediction import predict

NORM_PENALTY = 3e-5


@dataclass(frozen=True)
class MetaLoss:
    """Sums over the networks of a meta-batch.

    Attributes:
        total: what is minimised, times the number of networks; differentiable.
        task_sum: of the task losses (nats per sample or token).
        norm_sum: of the Frobenius norms of all parameters.
        correct: right classes or next tokens, and ``counted`` how many there were.
        logits: per network, if they were asked for.
    """

    total: Tensor
    task_sum: Tensor
    norm_sum: Tensor
    correct: Tensor
    correct_top5: Tensor
    counted: int
    logits: list[Tensor] = field(default_factory=list)


def meta_loss(
    hypernetwork: HyperNetwork,
    networks: Sequence[Network],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    norm_penalty: float = NORM_PENALTY,
    label_smoothing: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    scheme: str = "exact",
    keep_logits: bool = False,
) -> MetaLoss:
    """Predicts the networks' parameters and runs each on its mini-batch.

    Args:
        networks: their own values stand where none is predicted. Nothing is written into them, so tied weights stay
            tied.
        batches: ``{"images": (n, 3, h, w), "labels": (n,)}`` or ``{"tokens": (n, L)}`` of each network.
        generators: of class-token rows, one per network, if the hypernetwork draws them.
        scheme: ``exact`` decodes what the targets need, ``full`` whole factors, as released.
    """
    graphs, plans = [network.graph for network in networks], [network.plan for network in networks]
    prediction = predict(hypernetwork, graphs, plans, generators=generators, scheme=scheme)
    device = prediction.x_BNd.device
    zero = torch.zeros((), device=device)
    task_sum, norm_sum, correct, top5 = zero, prediction.norm_sum, zero, zero
    logits_of_all, counted = [], 0
    for network, parameters, batch in zip(networks, prediction.parameters, batches, strict=True):
        values = network.values(parameters, device)
        once = {name for name, _ in network.module.named_parameters()} & set(network.plan.uncovered)
        norm_sum = norm_sum + sum((values[name].norm() for name in sorted(once)), zero)
        output = run_network(network.module, values, batch)
        logits, labels = scored(output, batch)
        task_sum = task_sum + F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        rank = ranks(logits, labels)
        correct, top5 = correct + (rank == 0).sum(), top5 + (rank < 5).sum()
        counted += len(labels)
        if keep_logits:
            logits_of_all.append(output)
    total = task_sum + norm_penalty * norm_sum
    return MetaLoss(total, task_sum.detach(), norm_sum.detach(), correct, top5, counted, logits_of_all)


def run_network(network: nn.Module, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a network with these values: ``(n, V)`` of images, ``(n, L, V)`` of tokens."""
    if "tokens" in batch:
        return functional_call(network, dict(values), (), {"input_ids": batch["tokens"], "use_cache": False}).logits
    output = functional_call(network, dict(values), (batch["images"],))
    return output if isinstance(output, Tensor) else output[0]  # networks with auxiliary heads


def scored(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, V)`` and labels ``(N,)``: of every image, or of every token that has a next one."""
    if "tokens" in batch:
        return logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten()
    return logits, batch["labels"]


@torch.no_grad()
def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes are likelier than the label, ``(N,)``: 0 where it is the likeliest."""
    own = logits.gather(1, labels[:, None])
    return (logits > own).sum(1)
