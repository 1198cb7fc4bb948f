"""Scores on held-out data: against hand counts, with standard errors, without touching running statistics."""

import math

import pytest
import torch
from torch import nn

from common.errors import DataError
from logah.architectures import gpt2
from logah.scoring import batch_statistics, has_running_statistics, metric_values, resized, score


class Fixed(nn.Module):
    """Logits that do not depend on the images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def test_accuracies_are_shares_of_the_samples_with_their_standard_errors():
    logits = torch.zeros(4, 10)
    logits[torch.arange(4), torch.tensor([1, 2, 3, 4])] = 2.0
    logits[3, :4] = 1.0  # the fourth label, 9, is not among the five likeliest
    batch = {"images": torch.zeros(4, 3, 8, 8), "labels": torch.tensor([1, 2, 5, 9])}
    logits[2, 5] = 1.0  # the third comes second
    found = {metric.name: metric for metric in score(Fixed(logits), [batch], kind="vision")}
    assert found["top1"].value == 0.5 and found["top5"].value == 0.75
    assert found["top1"].standard_error == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"])
    assert found["nats"].value == pytest.approx(float(expected), rel=1e-6)


def test_perplexity_is_that_of_the_models_own_loss_and_does_not_depend_on_the_batches():
    torch.manual_seed(0)
    network = gpt2(16, 1, 2, vocab_size=30, n_positions=12).build().eval()
    tokens = torch.randint(30, (6, 12))
    with torch.no_grad():
        loss = float(network(input_ids=tokens, labels=tokens).loss)
    whole = metric_values(score(network, [{"tokens": tokens}], kind="lm"))
    parts = metric_values(score(network, [{"tokens": tokens[:4]}, {"tokens": tokens[4:]}], kind="lm"))
    assert whole["nats_per_token"] == pytest.approx(loss, rel=1e-5)
    assert whole["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["perplexity_se"] == pytest.approx(whole["perplexity"] * whole["nats_per_token_se"])


def test_networks_without_running_statistics_use_those_of_the_batch_and_keep_none():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval()
    images = 5 + 3 * torch.randn(16, 3, 8, 8)
    assert not has_running_statistics(network)
    with batch_statistics(network), torch.no_grad():
        normalised = network[1](network[0](images))
    assert normalised.mean().abs() < 1e-5 and abs(float(normalised.std()) - 1) < 1e-2
    assert torch.equal(network[1].running_mean, torch.zeros(4)) and int(network[1].num_batches_tracked) == 0
    batch = {"images": images, "labels": torch.zeros(16, dtype=torch.int64)}
    values = {choice: metric_values(score(network, [batch], kind="vision", batchnorm=choice))["nats"]
              for choice in ("batch", "running", "auto")}  # fmt: skip
    assert values["auto"] == values["batch"] != values["running"]
    network.train()(images)
    assert has_running_statistics(network)


def test_what_does_not_fit_the_network_is_refused():
    batch = {"images": torch.zeros(2, 3, 8, 8), "labels": torch.tensor([0, 7])}
    with pytest.raises(DataError, match="5 classes apart, the data have a label 7"):
        score(Fixed(torch.zeros(2, 5)), [batch], kind="vision")
    network = gpt2(16, 1, 2, vocab_size=30, n_positions=12).build()
    with pytest.raises(DataError, match="30 tokens, the data use number 40"):
        score(network, [{"tokens": torch.full((1, 4), 40)}], kind="lm")
    with pytest.raises(DataError, match="blocks of 13 tokens exceed"):
        score(network, [{"tokens": torch.zeros(1, 13, dtype=torch.int64)}], kind="lm")
    with pytest.raises(DataError, match="no held-out sample"):
        score(network, [], kind="lm")


def test_images_are_resized_only_where_they_have_to_be():
    images = torch.rand(2, 3, 8, 8)
    assert resized(images, None) is images and resized(images, 8) is images
    assert resized(images, 16).shape == (2, 3, 16, 16)
