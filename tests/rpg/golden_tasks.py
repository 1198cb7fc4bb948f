"""Golden cases of class-conditioned tasks; see ``golden_adapter``."""

import torch

from rpg.tasks import class_vectors, focal_loss


def _task_codes(case, config, inputs) -> dict[str, object]:
    return {"out_bits": class_vectors(inputs["in_task"].tolist())}


def _focal_loss(case, config, inputs) -> dict[str, object]:
    logits = inputs["in_logits"].clone().requires_grad_()
    loss = focal_loss(logits, inputs["in_targets"], config["gamma"])
    (grad,) = torch.autograd.grad(loss, logits)
    return {"out_loss": loss, "out_grad": grad}


KINDS: list = [
    (lambda case, config, inputs: "in_task" in inputs, _task_codes),
    (lambda case, config, inputs: "gamma" in config and {"in_logits", "in_targets"} <= inputs.keys(), _focal_loss),
]
