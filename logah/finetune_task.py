"""What training a network on images or text is, whatever its weights started from.

Dimensions: B samples of a micro-batch, C classes, L tokens of a block, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from common.optim import decay_groups
from common.task import Batch, Draws, StepOutput, Task
from logah.mixing import soft_targets
from logah.scoring import main_output, resized, text_scores, vision_scores

NETWORK_PREFIX = "network."


class TrainedNetwork(nn.Module):
    """A network together with its loss, so that wrappers (DDP, FSDP2, DeepSpeed) see one forward pass.

    Args:
        kind: ``vision`` or ``lm``.
        loss: ``ce`` or ``bce`` (every class a yes or no; summed over classes divided by their number).
        smoothing: share of the target spread evenly over all classes, in training.
        image_size: images of another size are resized to it; None: never.
    """

    def __init__(
        self, network: nn.Module, kind: str, *, loss: str = "ce", smoothing: float = 0.0, image_size: int | None = None
    ) -> None:
        super().__init__()
        self.network, self.kind, self.loss, self.smoothing = network, kind, loss, smoothing
        self.image_size = image_size

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of the micro-batch and the sums of what is reported."""
        if self.kind == "lm":
            return self._text(batch["tokens"])
        return self._images(batch)

    def _text(self, tokens_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits_BLV = main_output(self.network(input_ids=tokens_BL, use_cache=False)).float()
        if self.training:
            target_P = tokens_BL[:, 1:].flatten()
            return cross_entropy(logits_BLV[:, :-1].flatten(0, 1), target_P, reduction="sum"), {}
        scores = text_scores(logits_BLV, tokens_BL)
        predicted = tokens_BL.shape[1] - 1
        return scores.nats_B.sum() * predicted, {"accuracy": scores.correct_B.sum() * predicted}

    def _images(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.network(resized(batch["images"], self.image_size))
        logits_BC = main_output(output).float()
        if not self.training:
            scores = vision_scores(logits_BC, batch["labels"])
            return scores.nats_B.sum(), {"top1": scores.correct_B.sum(), "top5": scores.in_top_B.float().sum()}
        target_BC = soft_targets(
            batch["labels"], batch.get("other_labels"), batch.get("share"), logits_BC.shape[1], self.smoothing
        )
        total = self._classification_loss(logits_BC, target_BC)
        for extra_BC, weight in auxiliary_outputs(output):
            total = total + weight * self._classification_loss(extra_BC.float(), target_BC)
        with torch.no_grad():
            correct = (logits_BC.argmax(1) == batch["labels"]).sum()
        return total, {"top1": correct}

    def _classification_loss(self, logits_BC: Tensor, target_BC: Tensor) -> Tensor:
        if self.loss == "bce":
            return binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="sum") / logits_BC.shape[1]
        return cross_entropy(logits_BC, target_BC, reduction="sum")


def auxiliary_outputs(output: object) -> list[tuple[Tensor, float]]:
    """Outputs beside the main one that Inception and GoogLeNet return in training, with their usual weights."""
    if not isinstance(output, tuple) or not hasattr(output, "_fields"):
        return []
    weight = 0.4 if len(output) == 2 else 0.3
    return [(extra, weight) for extra in output[1:] if extra is not None]


class FinetuneTask(Task):
    """Trains whatever ``build`` returns.

    Args:
        build: a network with the weights that training starts from, the same on every process.
        kind: ``vision`` or ``lm``.
        block_size: tokens of a block; None for images.
        image_size: that the network reads; None for text.
        decay: ``all`` parameters or only ``matrices`` (no vectors, no embeddings).
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        kind: str,
        *,
        loss: str = "ce",
        smoothing: float = 0.0,
        block_size: int | None = None,
        image_size: int | None = None,
        decay: str = "all",
    ) -> None:
        self.build, self.kind, self.loss, self.smoothing = build, kind, loss, smoothing
        self.block_size, self.image_size, self.decay = block_size, image_size, decay

    def build_model(self) -> nn.Module:
        network = self.build().train()
        return TrainedNetwork(
            network, self.kind, loss=self.loss, smoothing=self.smoothing, image_size=self.image_size
        ).train()

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        return {}  # what is random in training images (augmentation, mixing) is drawn where they are made

    def count(self, batch: Batch, draws: Draws) -> float:
        """Images, or predicted tokens."""
        first = next(iter(batch.values()))
        return float(len(first) * (batch["tokens"].shape[1] - 1)) if self.kind == "lm" else float(len(first))

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        loss_sum, sums = model(dict(batch))
        count = self.count(batch, draws)
        return StepOutput(loss_sum, {name: (value, count) for name, value in sums.items()})

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        if self.decay == "matrices":
            return decay_groups(model, weight_decay)
        return super().param_groups(model, weight_decay)

    def repeated_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the longest list of equal modules: transformer blocks, or the blocks of a stage."""
        best: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module}) == 1:
                children = [child for child in module if any(True for _ in child.parameters())]
                best = children if len(children) > len(best) else best
        return best

    def samples_to_tokens(self) -> int | None:
        return self.block_size
