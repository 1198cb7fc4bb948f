"""Golden cases of the coordinate check and of muP's optimizer; see ``golden_adapter``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.config import OptimConfig
from common.ema import EMA
from common.optim import build_optimizer, learning_rate, set_learning_rate
from mup_dit.coordinates import STATISTICS, recording
from mup_dit.optimizer_groups import mup_groups

Arrays = Mapping[str, Tensor]


def _records(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    """Sub-modules that only the reference has are left out by an empty record."""
    from tests.mup_dit.golden_adapter import build

    model = build(case, config)
    with recording(model, ("l1", "l2", "mean")) as records:
        model(x["in_x"], torch.tensor(config["t"]), torch.tensor(config["y"]))
    ours = {record["module"]: record for record in records}
    return {"records": [ours.get(record["module"], {}) for record in case["records"]]}


def _statistics(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    return {f"out_{name}": compute(x["in_x"]) for name, compute in STATISTICS.items()}


def _steps(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    from common.diffusion.gaussian import build_diffusion
    from tests.mup_dit.golden_adapter import build

    model = build(case, config)
    optim = OptimConfig(lr=config["lr"], weight_decay=config["weight_decay"], warmup=0)
    groups = mup_groups(model.named_parameters(), model.scalings, optim.weight_decay)
    optimizer = build_optimizer(groups, optim, torch.device("cpu"))
    average = EMA({name: p for name, p in model.named_parameters() if p.requires_grad}, 0.9999, warmup=False)
    diffusion = build_diffusion()
    losses: dict[str, list[Tensor]] = {"loss": [], "mse": [], "vb": []}
    for step in range(config["steps"]):
        x0, t, noise = x["in_x"][step], x["in_t"][step], x["in_noise"][step]
        x_t = diffusion.q_sample(x0, t, noise)
        terms = diffusion.training_losses(model(x_t, t, x["in_y"][step]), x0, x_t, t, noise)
        terms["loss"].mean().backward()
        set_learning_rate(optimizer, learning_rate(step + 1, optim, config["steps"]))
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        for name, values in losses.items():
            values.append(terms[name].detach().mean())
    outputs: dict[str, object] = {f"out_{name}": torch.stack(values) for name, values in losses.items()}
    outputs |= {f"out_p:{name}": p.detach() for name, p in model.named_parameters()}
    outputs |= {f"out_ema:{name}": value for name, value in average.shadow.items()}
    outputs["param_groups"] = [
        {"lr": optim.lr * group["lr_scale"], "weight_decay": group["weight_decay"], "params": group["names"]}
        for group in groups
    ]
    return outputs


def _schedule(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    """The reference counts steps from 0."""
    optim = OptimConfig(
        lr=1.0, warmup=config["warmup"], schedule="cosine_constant", min_ratio=config["final_lr"],
        decay_fraction=config["num_decay"],
    )  # fmt: skip
    rates = [learning_rate(step, optim, config["total"]) for step in range(config["total"])]
    return {"out": torch.tensor(rates, dtype=torch.float32)}


KINDS: list = [
    (lambda case, config, x: "records" in case, _records),
    (lambda case, config, x: "out_covl1" in case.get("arrays", ()), _statistics),
    (lambda case, config, x: {"lr", "weight_decay", "steps"} <= config.keys() and "in_noise" in x, _steps),
    (lambda case, config, x: {"warmup", "final_lr", "num_decay"} <= config.keys(), _schedule),
]
