"""The loss of a network's training: equal to the library's, whole or in parts."""

import pytest
import torch
from torch.nn import functional as F

from logah.architectures import Architecture, gpt2, vit
from logah.finetune_task import FinetuneTask, TrainedNetwork, auxiliary_outputs

VIT = vit(2, num_layers=2, num_heads=2, hidden_dim=8, image_size=8)
GPT2 = gpt2(16, 3, 2, vocab_size=40, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def build(architecture: Architecture):
    torch.manual_seed(0)
    return architecture.build()


def test_text_loss_is_the_models_own_in_training_and_in_tests():
    task = FinetuneTask(lambda: build(GPT2), "lm", block_size=8)
    model, tokens = task.build_model(), torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(1))
    expected = float(model.network(input_ids=tokens, labels=tokens).loss.detach())
    batch = {"tokens": tokens}
    assert task.count(batch, {}) == 21
    for mode in (True, False):
        output = task.training_step(model.train(mode), batch, {})
        assert float(output.loss_sum.detach()) / 21 == pytest.approx(expected, rel=1e-5)
    assert 0 <= float(output.metrics["accuracy"][0]) <= 21 and output.metrics["accuracy"][1] == 21


def test_image_losses_are_sums_over_the_samples_and_smooth_in_training_only():
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    batch = {"images": images, "labels": labels}
    model = TrainedNetwork(build(VIT), "vision", smoothing=0.1)
    torch.nn.init.normal_(model.network.heads.head.weight)
    logits = model.network(images)
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(model.train()(batch)[0], smooth)
    loss, sums = model.eval()(batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="sum"))
    assert float(sums["top1"]) == float((logits.argmax(1) == labels).sum())
    bce = TrainedNetwork(model.network, "vision", loss="bce").train()(batch)[0]
    one_hot = F.one_hot(labels, 10).float()
    torch.testing.assert_close(bce, F.binary_cross_entropy_with_logits(logits, one_hot) * 5)


def test_images_of_another_size_are_resized_to_the_networks():
    model = TrainedNetwork(build(VIT), "vision", image_size=8)
    loss, _ = model({"images": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])})
    assert torch.isfinite(loss)


def test_auxiliary_heads_count_in_training():
    torch.manual_seed(0)
    network = Architecture("torchvision", {"name": "googlenet", "num_classes": 5, "init_weights": False}).build()
    output = network.train()(torch.randn(2, 3, 96, 96))
    assert [weight for _, weight in auxiliary_outputs(output)] == [0.3, 0.3]
    assert auxiliary_outputs(network.eval()(torch.randn(1, 3, 96, 96))) == []


def test_repeated_blocks_and_decay_groups_are_those_of_the_transformer():
    task = FinetuneTask(lambda: build(GPT2), "lm", decay="matrices")
    model = task.build_model()
    assert [type(block).__name__ for block in task.repeated_blocks(model)] == ["GPT2Block"] * 3
    decayed, rest = task.param_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and all(p.ndim == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0 and any(p is model.network.transformer.wte.weight for p in rest["params"])
    assert len(FinetuneTask(lambda: build(VIT), "vision").repeated_blocks(build(VIT))) == 2
