"""The baselines' networks: padding, keys, latents, released files, noise that belongs to a network."""

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from rpg.codec import TokenCodec
from rpg.pdiff import LatentScale, PdiffConfig, PdiffModel, VectorDiffusion, read_pdiff_config
from rpg.pdiff_generation import draw_vectors, generate_networks
from rpg.pdiff_saving import read_released
from rpg.pdiff_task import NetworkVectors, VAETask, VectorDiffusionTask
from rpg.requests import Request
from rpg.sampling import SamplerConfig
from rpg.store import TokenStore
from rpg.structure import structure_of_shapes
from rpg.vae import VAEConfig

VAE = VAEConfig(channels=(4, 8), d_latent=12, divide=8, kernel_size=3)
LENGTH = 24


def options(kind: str = "pdiff", **more: object) -> PdiffConfig:
    return PdiffConfig(kind=kind, channels=(1, 4, 8, 4, 1), kernel_size=3, diffusion_steps=20, vae=VAE, **more)


def build(kind: str = "pdiff", **more: object) -> PdiffModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PdiffModel(LENGTH, options(kind, **more)).eval()


def test_values_under_padding_change_neither_loss_nor_gradient():
    network = VectorDiffusion(LENGTH, options()).eval()
    x_BN, eps_BN, t_B = torch.randn(3, LENGTH), torch.randn(3, LENGTH), torch.tensor([0, 7, 19])
    x_BN[:, 20:] = float("nan")
    x_BN[2] = float("nan")
    loss = network(x_BN, t_B, eps_BN)
    loss.backward()
    gradient = network.net.encoder_list[0][0].weight.grad.clone()
    assert torch.isfinite(gradient).all()
    other = network(x_BN, t_B, torch.where(torch.isnan(x_BN) & (t_B[:, None] == 19), 5.0, eps_BN))
    assert torch.allclose(loss, other), "the noise of a row that is all padding does not count"
    counted = VectorDiffusionTask(LENGTH, options(), seed=0).count({"x": x_BN}, {})
    assert counted == 40


def test_weights_of_the_loss_over_times_follow_min_snr():
    plain, weighted = VectorDiffusion(LENGTH, options()), VectorDiffusion(LENGTH, options(min_snr_gamma=5.0))
    weighted.load_state_dict(plain.state_dict())
    x_BN, eps_BN = torch.randn(2, LENGTH), torch.randn(2, LENGTH)
    for t_B in (torch.zeros(2, dtype=torch.int64), torch.full((2,), 19)):
        ratio = weighted.eval()(x_BN, t_B, eps_BN) / plain.eval()(x_BN, t_B, eps_BN)
        assert torch.allclose(ratio, weighted.diffusion.weight(t_B)[0], rtol=1e-4)


def test_state_dicts_have_the_released_names():
    assert {name.split(".")[0] for name in VectorDiffusion(LENGTH, options()).state_dict()} == {"net"}
    assert {name.split(".")[0] for name in build("pdiff_vae").state_dict()} == {"vae", "latent", "diffusion"}


@pytest.mark.parametrize("kind", ["pdiff", "pdiff_vae", "vae"])
def test_a_network_does_not_depend_on_those_drawn_with_it(kind: str):
    model, sampler = build(kind), SamplerConfig(steps=5)
    together = draw_vectors(model, [3, 4, 5], sampler)
    assert together.shape == (3, LENGTH)
    assert torch.allclose(draw_vectors(model, [4], sampler)[0], together[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_values_that_are_not_finite_are_an_error_of_the_generator():
    model = build()
    model.diffusion.net.time_embedder.mlp[2].bias.data[0] = float("inf")
    codec = TokenCodec(structure_of_shapes({"w": torch.zeros(LENGTH)}), LENGTH)
    networks = generate_networks(model, codec, [Request(0)], SamplerConfig(steps=2), seed=0)
    with pytest.raises(CheckpointError, match="pdiff baseline cannot generate.*not finite"):
        next(networks)


def test_latents_are_standardised_and_restored():
    latent_KZ = 3.0 + 0.01 * torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    scale = LatentScale(12).fit(latent_KZ)
    encoded = scale.encode(latent_KZ)
    assert encoded.square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(scale.decode(encoded), latent_KZ)
    constant = LatentScale(2).fit(torch.ones(5, 2))
    assert torch.equal(constant.encode(torch.ones(1, 2)), torch.zeros(1, 2))


def test_vectors_for_the_autoencoder_are_padded_with_zeros_and_others_keep_their_padding():
    tokens_KLD = torch.full((2, 3, 4), float("nan"))
    tokens_KLD[:, :2] = 1.0
    store = TokenStore(tokens_KLD)
    assert torch.isnan(NetworkVectors(store).fetch(torch.tensor([1]).numpy())["x"][0, 8:]).all()
    padded = NetworkVectors(store, 16).fetch(torch.tensor([0, 1]).numpy())["x"]
    assert padded.shape == (2, 16)
    assert padded.sum() == 16


def test_draws_of_the_autoencoder_are_only_those_it_needs():
    def names(**more: object) -> set[str]:
        config = PdiffConfig(kind="vae", vae=VAEConfig(channels=(4, 8), d_latent=12, divide=8, **more))
        return set(VAETask(LENGTH, config, seed=0).draw(0, 2))

    assert names() == set()
    assert names(use_variance=True, input_noise=0.1) == {"eps_BZ", "input_noise_BN"}
    assert names(latent_noise=0.1) == {"latent_noise_BZ"}


def test_saved_options_are_read_back():
    config = options("pdiff_vae", standardise=False, prediction="v")
    assert read_pdiff_config(config.options()) == config


@pytest.mark.parametrize("kind", ["pdiff", "pdiff_vae", "vae"])
def test_released_files_load_with_their_copies(tmp_path, kind: str):
    model = build(kind)
    parts = {}
    if model.config.has_diffusion:
        own = model.diffusion.state_dict()
        copies = {f"diffusion_trainer.model.{name[4:]}": value for name, value in own.items()}
        parts["diffusion"] = own | copies | {"diffusion_trainer.beta_t": torch.zeros(20)}
    if model.config.has_vae:
        parts["vae"] = model.vae.state_dict()
    torch.save(parts if kind == "pdiff_vae" else next(iter(parts.values())), tmp_path / "released.pth")
    loaded = read_released(tmp_path / "released.pth", LENGTH, model.config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_released_copies_that_differ_are_named(tmp_path):
    model = build()
    own = model.diffusion.state_dict()
    name = "net.time_embedder.mlp.0.bias"
    torch.save(own | {f"diffusion_sampler.model.{name[4:]}": own[name] + 1}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=r"diffusion_sampler.model.time_embedder.mlp.0.bias and net"):
        read_released(tmp_path / "released.pth", LENGTH, model.config)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "pdif"}, "model.kind='pdif'.*Did you mean 'pdiff'"),
        ({"channels": (1, 4, 8, 1)}, "model.channels"),
        ({"kernel_size": 4}, "model.kernel_size=4"),
        ({"diffusion_steps": 1}, "model.diffusion_steps=1"),
        ({"beta": (0.1,)}, "model.beta"),
    ],
)
def test_options_that_cannot_work_are_named(more: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PdiffConfig(**more)
