"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.adamw8bit import AdamW8bit
from common.config import EPOCH_SCHEDULES, OptimConfig
from common.errors import ConfigError


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate used by optimizer step ``step``, counted from 1.

    ``lr * min(step / warmup, 1)`` times the schedule's factor: 1 for ``constant``; a half cosine from 1 at step 0 to
    ``min_ratio`` at ``total_steps`` for ``cosine``; for ``wsd`` 1, then over the last ``decay_fraction`` of the run a
    straight line to ``min_ratio``; for ``cosine_constant`` a half cosine from 1 after warm-up to ``min_ratio`` at
    ``decay_fraction`` of the run, then flat. ``cosine_lagged``: see ``lagged_cosine``.

    Source: warm-up as in RADD's released trainer (golden case ``train_steps``); WSD: Hu et al., 2024 (MiniCPM);
    ``cosine_constant``: PixArt-alpha's released trainer (golden case ``lr_cosine_decay_to_constant``);
    ``cosine_lagged``: RPG's released trainer (golden case ``learning_rates``); ``*_epochs``: see ``rate_of_epoch``.
    """
    if config.schedule in EPOCH_SCHEDULES:
        epochs = math.ceil(total_steps / config.epoch_steps)
        return config.lr * rate_of_epoch((step - 1) // config.epoch_steps, config, epochs)
    if config.schedule == "cosine_lagged":
        return config.lr * lagged_cosine(max(step - 2, 0), config, total_steps)
    warm = min(step / config.warmup, 1.0) if config.warmup > 0 else 1.0
    if config.schedule == "cosine":
        share = min(step / total_steps, 1.0)
        factor = config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * share))
    elif config.schedule == "wsd":
        decay_steps = config.decay_fraction * total_steps
        left = min((total_steps - step) / decay_steps, 1.0) if decay_steps > 0 else 1.0
        factor = config.min_ratio + (1 - config.min_ratio) * max(left, 0.0)
    elif config.schedule == "cosine_constant":
        end = int(config.decay_fraction * total_steps)
        share = min(max(step - config.warmup, 0) / max(end - config.warmup, 1), 1.0)
        factor = config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * share))
    else:
        factor = 1.0
    return config.lr * warm * factor


def lagged_cosine(index: int, config: OptimConfig, total_steps: int) -> float:
    """Share of the peak rate at position ``index`` (from 0) of a half cosine that a trainer reads one step late.

    A line from ``warmup_factor`` at 0 to 1 at ``warmup``, then a half cosine to ``min_ratio`` at ``total_steps``. A
    trainer that moves its schedule after each update to the number, from 0, of that update runs its first two steps at
    position 0; step s (from 1) after that at position s - 2. So the rate does not quite reach its end.
    """
    if index < config.warmup:
        return config.warmup_factor + (1 - config.warmup_factor) * index / config.warmup
    share = (index - config.warmup) / max(total_steps - config.warmup, 1)
    return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def rate_of_epoch(epoch: int, config: OptimConfig, epochs: int) -> float:
    """Share of the peak rate in epoch ``epoch`` (from 0) of schedules that change between epochs.

    Over the first ``warmup`` epochs a line from ``warmup_factor``, which reaches 1 in the last of them; from then on
    ``cosine_epochs``: a half cosine that would be 0 after the last epoch; ``multistep_epochs``: ``gamma`` at each
    milestone; ``exponential_epochs``: ``gamma`` after every epoch.

    Source: ``cosine-warmup`` of GHN-3's and LoGAH's released trainers (golden case ``lr_schedule``).
    """
    warmup = int(config.warmup)
    if epoch < warmup - 1:
        return config.warmup_factor + (1 - config.warmup_factor) * epoch / (warmup - 1)
    if config.schedule == "cosine_epochs":
        share = (epoch - warmup) / max(epochs - warmup, 1)
        factor = max(0.0, (1 + math.cos(math.pi * share)) / 2)
        return config.min_ratio + (1 - config.min_ratio) * factor
    if config.schedule == "multistep_epochs":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return config.gamma**epoch


def build_optimizer(groups: list[dict], config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW over ``groups``, fused where parameters are plain tensors, else foreach; or AdamW8bit, LAMB.

    A group may carry its own ``weight_decay`` and ``lr_scale`` (a factor on the scheduled rate, 1 by default).

    Raises: ConfigError if no group holds a trainable parameter, or AdamW8bit meets sharded ones.
    """
    groups = [{**group, "params": list(group["params"])} for group in groups]
    groups = [group for group in groups if group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    if not parameters:
        raise ConfigError("the model has no trainable parameter; unfreeze at least one.")
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "AdamW8bit":
        return AdamW8bit(groups, **options)
    if config.optimizer == "LAMB":
        from common.lamb import ResumableLamb  # timm takes a second to import

        return ResumableLamb(groups, **options, max_grad_norm=None)  # the engine clips
    # fused kernels exist on CUDA and CPU; on the CPU they do not take DTensors
    fused = device.type == "cuda" or not any(isinstance(p, DTensor) for p in parameters)
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
    return kinds[config.optimizer](groups, **options, fused=fused, **({} if fused else {"foreach": True}))


def set_learning_rate(optimizer: object, rate: float) -> None:
    """Sets every group's rate to ``rate * group["lr_scale"]``; works on torch optimizers and DeepSpeed's wrappers."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; vectors (norm scales, biases) and embedding tables do not."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trainable if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer_tensors(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``{"<parameter name>.<state name>": tensor}``, so that it outlives group order."""
    return {
        f"{name}.{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def empty_optimizer_tensors(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, keys: Iterable[str]
) -> dict[str, Tensor]:
    """Creates zero state for the given ``"<parameter name>.<state name>"`` keys and returns it, ready to be filled."""
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    created = {}
    for key in keys:
        name, _, state_name = key.rpartition(".")
        parameter = named.get(name)
        if parameter is None or id(parameter) not in owner:
            continue
        if isinstance(optimizer, AdamW8bit):
            value = optimizer.empty_state(parameter, state_name)
        elif state_name == "step":
            on_device = owner[id(parameter)].get("fused") or owner[id(parameter)].get("capturable")
            value = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        else:
            value = torch.zeros_like(parameter.detach())
        optimizer.state[parameter][state_name] = created[key] = value
    return created
