"""Networks made of the originals: noise, mean, interpolation, regression."""

import pytest
import torch

from common.errors import ConfigError, DataError
from rpg.baselines import RidgeRegression, interpolate, is_varying, mean_state, perturb, random_pairs


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 8, generator=draw)
    return {
        "weight": weight,
        "tied": weight,
        "half": torch.randn(40, generator=draw).to(torch.bfloat16),
        "running_var": torch.rand(32, generator=draw) + 0.1,
        "constant": torch.ones(7),
        "scalar": torch.tensor([3.0]),
        "num_batches_tracked": torch.tensor(5),
        "index": torch.arange(4),
        "empty": torch.zeros(0),
    }


def test_noise_has_the_intensity_asked_for_and_leaves_constants():
    before, after = state(), perturb(state(), 0.1, torch.Generator().manual_seed(1))
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        if name in ("weight", "running_var", "half"):
            assert not torch.equal(after[name], tensor)
        elif name != "tied":
            assert torch.equal(after[name], tensor)
    ratio = (after["weight"] - before["weight"]).std() / before["weight"].std()
    assert 0.08 < float(ratio) < 0.12
    assert (after["running_var"] > 0).all()
    assert after["tied"] is after["weight"]
    assert torch.equal(before["weight"], state()["weight"])  # the input is not changed


def test_noise_of_a_variance_of_zeros_is_defined():
    after = perturb({"bn.running_var": torch.zeros(3)}, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(after["bn.running_var"], torch.zeros(3))


def test_the_mean_is_taken_of_floats_and_keeps_the_rest():
    states = [state(seed) for seed in range(3)]
    mean = mean_state(iter(states))
    torch.testing.assert_close(mean["weight"], torch.stack([each["weight"] for each in states]).mean(0))
    assert mean["half"].dtype == torch.bfloat16 and torch.equal(mean["index"], torch.arange(4))
    assert torch.equal(states[0]["weight"], state(0)["weight"])
    with pytest.raises(DataError, match="no checkpoint"):
        mean_state([])


def test_interpolation_reaches_both_ends():
    one, other = state(0), state(1)
    torch.testing.assert_close(interpolate(one, other, 0.0), one)
    torch.testing.assert_close(interpolate(one, other, 1.0)["weight"], other["weight"])
    middle = interpolate(one, other, 0.5)
    torch.testing.assert_close(middle["weight"], (one["weight"] + other["weight"]) / 2)


def test_random_pairs_are_of_different_checkpoints():
    pairs = random_pairs(5, 200, torch.Generator().manual_seed(0))
    assert all(i != j for i, j in pairs) and {i for pair in pairs for i in pair} == set(range(5))
    with pytest.raises(DataError, match="needs two checkpoints"):
        random_pairs(1, 3, torch.Generator())


def test_what_varies_is_what_a_generator_models():
    assert [name for name, tensor in state().items() if is_varying(name, tensor)] == [
        "weight",
        "tied",
        "half",
        "running_var",
        "constant",
    ]


@pytest.mark.parametrize("products", [False, True])
def test_regression_finds_a_law_it_can_express(products):
    draw = torch.Generator().manual_seed(0)
    bits_KC = (torch.rand(60, 4, generator=draw) < 0.5).double()
    law_CV, pair_V = torch.randn(4, 6, generator=draw).double(), torch.randn(6, generator=draw).double()

    def network(bits_C):
        product = bits_C[0] * bits_C[2] * pair_V if products else 0
        return {"w": (1 + bits_C @ law_CV + product).float().reshape(2, 3), "steps": torch.tensor(7)}

    fitted = RidgeRegression(bits_KC, map(network, bits_KC), products=products, penalty=1e-6)
    for bits in ([1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        found = fitted.predict(torch.tensor(bits))
        torch.testing.assert_close(found["w"], network(torch.tensor(bits).double())["w"], atol=1e-4, rtol=1e-4)
        assert found["steps"] == 7
    if products:
        linear = RidgeRegression(bits_KC, map(network, bits_KC), penalty=1e-6)
        bits = torch.tensor([1.0, 0, 1, 0]).double()
        assert not torch.allclose(linear.predict(bits)["w"], network(bits)["w"], atol=1e-2)


def test_a_large_penalty_gives_the_mean_network():
    states = [state(seed) for seed in range(4)]
    fitted = RidgeRegression(torch.eye(4), states, penalty=1e9)
    torch.testing.assert_close(fitted.predict([1, 0, 0, 0])["weight"], mean_state(states)["weight"], atol=1e-5, rtol=0)


def test_regression_wants_a_condition_per_checkpoint():
    with pytest.raises(DataError, match="2 conditions, but 1 checkpoints"):
        RidgeRegression(torch.eye(2), [state()])
    with pytest.raises(DataError, match="more checkpoints"):
        RidgeRegression(torch.eye(2), [state(), state(), state()])
    with pytest.raises(ConfigError, match="penalty=-1"):
        RidgeRegression(torch.eye(1), [state()], penalty=-1)
