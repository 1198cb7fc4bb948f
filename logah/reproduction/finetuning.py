"""Unseen nets trained from a start: random weights, or the prediction of a hypernetwork.

Every start sees the same batches in the same order, with the same optimiser and every learning rate.

Letters: B batch, C classes, L tokens of a block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.seeding import derive_seed
from logah.data import TrainingData
from logah.reproduction.data import data_of
from logah.reproduction.settings import VISION, Settings
from logah.reproduction.starts import build_start
from logah.scoring import score


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW at a constant rate."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2, fused=True)


def token_loss(model: nn.Module, tokens_BL: Tensor) -> Tensor:
    """Mean cross entropy of every token but the first, given those before it; nats."""
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten())


def train_steps(model: nn.Module, data: TrainingData, lr: float, steps: int) -> Iterator[int]:
    """Trains ``model``; yields the number of finished steps, beginning with 0."""
    optimizer = optimizer_of(model, lr)
    yield 0
    for step in range(steps):
        model.train()
        batch = data.training_batch(step)
        optimizer.zero_grad(set_to_none=True)
        if "images" in batch:
            loss = functional.cross_entropy(model(batch["images"]), batch["labels"])
        else:
            loss = token_loss(model, batch["tokens"])
        loss.backward()
        optimizer.step()
        yield step + 1


def train_from(settings: dict, kind: str, start: str, net: str, seed: int, order: int, run_dir: str | None) -> dict:
    """One net trained from one start with every learning rate.

    Args:
        run_dir: of the hypernetwork's training; None for random weights.

    Returns: ``curves``, one per learning rate: ``lr``, ``points`` (epochs or steps, from 0) and ``scores``: accuracy on
        held-out images, or nats per token of held-out text; infinite where the loss is not finite.
    """
    chosen = Settings.from_dict(settings)
    chosen_net = next(each for each in chosen.nets_of(kind) if each.label == net)
    data = data_of(chosen, kind, derive_seed(seed, "data order", order))
    unit = data.steps_per_epoch if kind == VISION else 1  # steps per point
    curves = []
    for lr in chosen.lrs_of(kind):
        model = build_start(chosen, kind, chosen_net, derive_seed(seed, "random weights", order), run_dir)
        points = chosen.points_of(kind, chosen_net, lr)
        steps = {point * unit for point in points}
        scores = [score_of(model, data) for step in train_steps(model, data, lr, max(steps)) if step in steps]
        curves.append({"lr": lr, "points": points, "scores": scores})
    return {"curves": curves}


def score_of(model: nn.Module, data: TrainingData) -> float:
    """Accuracy on held-out images, or nats per token of held-out text (infinite where they are not finite)."""
    metrics = {metric.name: metric.value for metric in score(model, data.test_batches(), kind=data.kind)}
    if data.kind == "vision":
        return metrics["top1"]
    return metrics["nats_per_token"] if math.isfinite(metrics["nats_per_token"]) else math.inf


def predicted_accuracies(settings: dict, arm: str, seed: int, run_dir: str) -> dict:
    """Accuracy of predictions for nets of many sizes, without any training, with its error over images."""
    chosen = Settings.from_dict(settings)
    data = data_of(chosen, VISION, seed)
    rows = []
    for net in chosen.zero_shot_nets:
        network = build_start(chosen, VISION, net, seed, run_dir)
        found = next(each for each in score(network, data.test_batches(), kind=VISION) if each.name == "top1")
        rows.append({"net": net.label, "accuracy": found.value, "standard_error": found.standard_error})
    return {"rows": rows}
