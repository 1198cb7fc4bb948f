"""The autoencoder of whole networks: lengths, losses, what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from rpg.vae import ParameterVAE, VAEConfig

SMALL = VAEConfig(channels=(4, 8), d_latent=6, divide=8, kernel_size=5)


def build(length: int, config: VAEConfig = SMALL) -> ParameterVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ParameterVAE(length, config)


@given(length=st.integers(1, 100), levels=st.integers(1, 4), kernel=st.sampled_from([3, 5, 7]))
def test_every_length_is_restored_to_the_multiple_it_was_padded_to(length: int, levels: int, kernel: int):
    config = VAEConfig(channels=(3,) * levels, d_latent=2, divide=2**levels, kernel_size=kernel)
    network = build(length, config).eval()
    x_BN = network.pad(torch.randn(2, length))
    assert x_BN.shape[1] == network.padded_length == -(-length // 2**levels) * 2**levels
    mean_BZ, _ = network.encode(x_BN)
    assert network.decode(mean_BZ).shape == x_BN.shape


def test_a_list_of_channels_stays_as_the_caller_wrote_it():
    channels = [4, 8, 16]
    ParameterVAE(64, VAEConfig(channels=tuple(channels), d_latent=4, divide=8))
    assert channels == [4, 8, 16]
    config = VAEConfig(channels=channels, d_latent=4, divide=8)
    first, second = ParameterVAE(64, config), ParameterVAE(64, config)
    assert channels == [4, 8, 16]
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in second.state_dict().items()}


def test_a_wrong_length_is_refused_with_the_right_one():
    network = build(30)
    with pytest.raises(ConfigError, match=r"vector of 30 values .* reads 32 .*model.vae.divide=8"):
        network.encode(torch.zeros(2, 30))
    with pytest.raises(ConfigError, match=r"vector of 40 values is longer than the 32"):
        network.pad(torch.zeros(2, 40))


def test_padding_becomes_zero():
    padded = build(30).pad(torch.tensor([[1.0, float("nan")]]))
    assert padded.shape == (1, 32)
    assert padded.tolist()[0] == [1.0] + [0.0] * 31


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divide": 48}, r"model.vae.divide=48 cannot be halved 5 times.*use 64, a multiple of 32"),
        ({"channels": ()}, r"model.vae.channels=\[\] must hold at least one level"),
        ({"kernel_size": 4}, "model.vae.kernel_size=4"),
        ({"d_latent": 0}, "model.vae.d_latent=0"),
        ({"kl_weight": -1.0}, "model.vae.kl_weight=-1.0"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        VAEConfig(**options)


def test_every_parameter_gets_a_gradient_with_and_without_variance():
    for use_variance in (False, True):
        network = build(30, VAEConfig(channels=(4, 8), d_latent=6, divide=8, use_variance=use_variance))
        loss = network(network.pad(torch.randn(3, 30)), eps_BZ=torch.randn(3, 6))
        loss.total.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert (float(loss.kl) > 0) is use_variance


def test_added_noise_is_scaled_and_the_target_stays_clean():
    config = VAEConfig(channels=(4, 8), d_latent=6, divide=8, input_noise=0.0, latent_noise=0.5)
    network = build(32, config).eval()
    x_BN, noise_BZ = torch.randn(3, 32), torch.randn(3, 6)
    clean = network(x_BN).total
    assert torch.equal(network(x_BN, input_noise_BN=torch.randn(3, 32)).total, clean)
    mean_BZ, _ = network.encode(x_BN)
    expected = (network.decode(mean_BZ + 0.5 * noise_BZ) - x_BN).square().mean()
    assert torch.allclose(network(x_BN, latent_noise_BZ=noise_BZ).total, expected)


def test_it_learns_to_tell_two_networks_apart():
    torch.manual_seed(0)
    network, x_BN = build(32), torch.randn(2, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-2)
    for _ in range(60):
        loss = network(x_BN).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * x_BN.var().item()
