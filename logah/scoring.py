"""How good a network is on held-out data: top-1 and top-5 accuracy, cross-entropy, perplexity, with standard errors.

Dimensions: B samples of a batch, C classes, L tokens of a block, V vocabulary.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from common.errors import ConfigError, DataError
from common.evaluation.metric import Metric, mean_metric, perplexity_metric
from common.parallel import Parallel

TOP_K = 5


@dataclass(frozen=True)
class SampleScores:
    """What a network makes of each sample: nats (of a block: the mean of its tokens), and whether it was right.

    Attributes:
        correct_B: 0 or 1; of a block the share of its tokens.
        in_top_B: whether the label is among the five likeliest classes; None for text.
    """

    nats_B: Tensor
    correct_B: Tensor
    in_top_B: Tensor | None = None

    def cpu(self) -> "SampleScores":
        in_top_B = None if self.in_top_B is None else self.in_top_B.cpu()
        return SampleScores(self.nats_B.cpu(), self.correct_B.cpu(), in_top_B)


def vision_scores(logits_BC: Tensor, label_B: Tensor) -> SampleScores:
    """Scores of classified images; with at most five classes ``in_top_B`` is true throughout."""
    logits_BC = logits_BC.float()
    order_BK = logits_BC.topk(min(TOP_K, logits_BC.shape[1]), dim=1).indices
    hit_BK = order_BK == label_B[:, None]
    return SampleScores(
        cross_entropy(logits_BC, label_B, reduction="none"), hit_BK[:, 0].float(), hit_BK.any(1).float()
    )


def text_scores(logits_BLV: Tensor, tokens_BL: Tensor) -> SampleScores:
    """Scores of predicting each block's tokens but the first from those before."""
    logits_BLV, target_BL = logits_BLV[:, :-1].float(), tokens_BL[:, 1:]
    nats_BL = cross_entropy(logits_BLV.transpose(1, 2), target_BL, reduction="none")
    return SampleScores(nats_BL.mean(1), (logits_BLV.argmax(-1) == target_BL).float().mean(1))


def main_output(output: object) -> Tensor:
    """Logits of a network that may also return auxiliary outputs (Inception, GoogLeNet, Hugging Face models)."""
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) else output


@contextlib.contextmanager
def batch_statistics(network: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside, batch norms of a network in eval mode use each batch's own statistics; running ones stay as they were.

    A predicted network has no running statistics of its own: nothing has ever run through it.
    """
    kept = []
    if enabled:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                kept.append((module, module.running_mean, module.running_var))
                module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def score(
    network: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    kind: str,
    device: torch.device | str = "cpu",
    batchnorm: str = "batch",
    image_size: int | None = None,
    max_batches: int | None = None,
    parallel: Parallel | None = None,
) -> list[Metric]:
    """Metrics over all samples; their errors are those of the mean over samples.

    Args:
        batches: of this process.
        kind: ``vision`` (batches of ``images`` and ``labels``) or ``lm`` (``tokens``).
        batchnorm: ``batch``: statistics of each batch; ``running``: those of the network; ``auto``: running ones, if
            anything has run through the network in training.
        image_size: images of another size are resized to it (bilinear, antialiased).
        max_batches: the first so many; None: all.
        parallel: the processes that share the samples; None: this one alone.

    Raises: DataError if there is no sample, or the network's output has not a column for every label.
    """
    parts: list[SampleScores] = []
    was_training = network.training
    network.eval()
    own = batchnorm == "batch" or batchnorm == "auto" and not has_running_statistics(network)
    try:
        with torch.no_grad(), batch_statistics(network, own):
            for number, batch in enumerate(batches):
                if number == max_batches:
                    break
                batch = {name: value.to(device) for name, value in batch.items()}
                scores = _score_images if kind == "vision" else _score_blocks
                parts.append(scores(network, batch, image_size).cpu())
    finally:
        network.train(was_training)
    if parallel is not None:
        parts = [part for parts_of_one in parallel.gather(parts) for part in parts_of_one]
    if not parts:
        raise DataError("there is no held-out sample to score; choose another split or other data.")
    return metrics_of(parts, kind)


def metrics_of(parts: Sequence[SampleScores], kind: str) -> list[Metric]:
    """Means over all samples: nats and accuracies of images; nats per token, perplexity and accuracy of text."""
    nats = mean_metric("nats" if kind == "vision" else "nats_per_token", torch.cat([part.nats_B for part in parts]))
    correct_B = torch.cat([part.correct_B for part in parts])
    if kind == "lm":
        return [nats, perplexity_metric("perplexity", nats), mean_metric("accuracy", correct_B)]
    in_top_B = torch.cat([part.in_top_B for part in parts])
    return [nats, mean_metric("top1", correct_B), mean_metric("top5", in_top_B)]


def has_running_statistics(network: nn.Module) -> bool:
    """Whether batch norms of the network have seen data in training (true without batch norms)."""
    counts = [m.num_batches_tracked for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return all(count is not None and int(count) > 0 for count in counts)


def _score_images(network: nn.Module, batch: Mapping[str, Tensor], image_size: int | None) -> SampleScores:
    images, label_B = resized(batch["images"], image_size), batch["labels"]
    logits_BC = main_output(network(images))
    if int(label_B.max()) >= logits_BC.shape[1]:
        raise DataError(
            f"the network tells {logits_BC.shape[1]} classes apart, the data have a label {int(label_B.max())}; choose "
            "data with as many classes, or let match_data=true give the network theirs."
        )
    return vision_scores(logits_BC, label_B)


def _score_blocks(network: nn.Module, batch: Mapping[str, Tensor], _: int | None) -> SampleScores:
    tokens_BL = batch["tokens"]
    require_tokens_fit(network, tokens_BL)
    return text_scores(main_output(network(input_ids=tokens_BL, use_cache=False)), tokens_BL)


def require_tokens_fit(network: nn.Module, tokens_BL: Tensor) -> None:
    """Raises DataError for token numbers beyond the network's vocabulary, or blocks longer than its context."""
    config = network.config
    largest = int(tokens_BL.max())
    if largest >= config.vocab_size:
        raise DataError(
            f"the network has {config.vocab_size} tokens, the data use number {largest}; prepare the data with the "
            "network's tokenizer, or let match_data=true give the network theirs."
        )
    if tokens_BL.shape[1] > config.max_position_embeddings:
        raise DataError(
            f"blocks of {tokens_BL.shape[1]} tokens exceed the network's context of {config.max_position_embeddings}; "
            "use shorter blocks (data.block_size)."
        )


def resized(images: Tensor, image_size: int | None) -> Tensor:
    """The images at ``image_size`` pixels a side; unchanged if they have it or it is None."""
    if image_size is None or images.shape[-1] == image_size == images.shape[-2]:
        return images
    return interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True, align_corners=False)


def metric_values(metrics: Iterable[Metric]) -> dict[str, float | None]:
    """name -> value and ``name_se`` -> its standard error, as records keep them."""
    found: dict[str, float | None] = {}
    for metric in metrics:
        found[metric.name], found[f"{metric.name}_se"] = metric.value, metric.standard_error
    return found


def require_batchnorm(option: str, value: str) -> None:
    """Raises ConfigError unless ``value`` says where batch norms take their statistics from."""
    if value not in ("batch", "running"):
        raise ConfigError(f"{option}={value!r} is not known; choose batch (each batch's own statistics) or running.")
