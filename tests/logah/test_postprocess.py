"""What may follow a prediction: noise, orthogonal weights, fresh residual weights."""

import pytest
import torch

from logah.architectures import gpt2, llama, vit
from logah.postprocess import (
    as_matrix,
    break_symmetry,
    changed_weights,
    correlation_spread,
    count_layers,
    fresh_residual,
    is_residual_weight,
    noisy,
    orthogonal,
    reinitialise_residual,
    standard_noise,
)
from tests.logah.golden_graphs import SmallConvNet


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 3, 3, 3), (16, 8, 1, 1), (7, 7), (4200, 3)])
def test_the_spread_of_correlations_is_that_of_the_whole_matrix(shape):
    weight = draw(*shape)
    correlations = torch.corrcoef(as_matrix(weight)[0].double())
    assert correlation_spread(weight) == pytest.approx(float(correlations.std()), rel=1e-9)


def test_rows_that_do_not_vary_give_no_nan():
    assert correlation_spread(torch.ones(6, 1)) == 0.0
    mixed = torch.cat([torch.zeros(2, 4), draw(4, 4)])
    assert 0 < correlation_spread(mixed) < 1


def test_noise_scales_with_how_alike_rows_are():
    noise = draw(10, 6, seed=1)
    independent = draw(10, 6)
    paired = draw(1, 6) * torch.tensor([1.0, -1.0]).repeat(5)[:, None] + 0.01 * independent
    moved = [(noisy(weight, noise, 0.1) - weight).norm() for weight in (independent, paired)]
    assert moved[1] > 1.5 * moved[0]
    assert torch.equal(noisy(independent, noise, 0.0), independent)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 2, 3, 3)])
def test_orthogonal_weights_are_orthonormal_and_keep_their_span(shape):
    weight = draw(*shape)
    columns, wide = as_matrix(orthogonal(weight))
    original, _ = as_matrix(weight)
    assert orthogonal(weight).shape == weight.shape and wide == (shape[0] < weight[0].numel())
    assert torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5)
    assert torch.allclose(columns @ (columns.T @ original), original, atol=1e-4)
    assert ((columns.T @ original).diagonal() > 0).all()


def test_noise_changes_every_weight_but_the_head_s():
    network = SmallConvNet(8, 10)
    before = state_of(network)
    changed = break_symmetry(network, 0.1, seed=2)
    after = network.state_dict()
    assert changed == ["conv1.weight", "conv2.weight", "conv3.weight"]
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(changed)
    weight = before["conv2.weight"]
    expected = noisy(weight, standard_noise("conv2.weight", weight, seed=2), 0.1)
    assert torch.equal(after["conv2.weight"], expected)  # the same tensor by tensor


def test_without_noise_nothing_changes():
    network = SmallConvNet(8, 10)
    before = state_of(network)
    assert break_symmetry(network, 0.0) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_orthogonalisation_leaves_the_head_alone():
    network = SmallConvNet(8, 10)
    head = network.fc.weight.detach().clone()
    break_symmetry(network, 0.0, orthogonalise=True)
    columns, _ = as_matrix(network.conv2.weight.detach())
    assert torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5)
    assert torch.equal(network.fc.weight, head)


def test_a_tied_embedding_is_changed_once():
    names = list(changed_weights(gpt2(16, 2, 2, vocab_size=40, n_positions=8, tie_word_embeddings=True).build()))
    assert names.count("transformer.wte.weight") == 1 and "lm_head.weight" not in names
    assert "lm_head.weight" not in changed_weights(gpt2(16, 2, 2, vocab_size=40, n_positions=8).build())


@pytest.mark.parametrize(
    ("architecture", "per_layer", "layers"),
    [
        (gpt2(32, 3, 2, vocab_size=40, n_positions=8), 2, 3),
        (llama(32, 2, 2, vocab_size=40), 2, 2),
        (vit(4, 4, 2, 32), 2, 4),
    ],
    ids=["gpt2", "llama", "vit"],
)
def test_fresh_residual_weights_are_scaled_by_depth(architecture, per_layer, layers):
    network = architecture.build()
    names = [name for name, _ in network.named_parameters()]
    assert count_layers(names) == layers
    before = state_of(network)
    changed = reinitialise_residual(network, layers, seed=3)
    after = network.state_dict()
    assert len(changed) == per_layer * layers and all(map(is_residual_weight, changed))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(changed)
    values = torch.cat([after[name].reshape(-1) for name in changed])
    assert float(values.std()) == pytest.approx(0.02 / (2 * layers) ** 0.5, rel=0.05)
    name = changed[-1]
    assert torch.equal(after[name], fresh_residual(name, before[name], layers, seed=3))
    assert not torch.equal(after[name], fresh_residual(name, before[name], layers, seed=4))
