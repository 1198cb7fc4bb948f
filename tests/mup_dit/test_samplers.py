"""Samplers on Gaussian data, whose exact network and exact answers are known."""

import itertools
import math

import pytest
import torch

from common.diffusion.gaussian import build_diffusion
from common.errors import ConfigError
from mup_dit.samplers.ddim import invert_ddim, sample_ddim
from mup_dit.samplers.ddpm import sample_ddpm
from mup_dit.samplers.dpm_solver import sample_dpm_solver
from mup_dit.samplers.flow import sample_euler, sample_heun
from mup_dit.samplers.sa_solver import lagrange_weights, middle_noise, sample_sa_solver
from mup_dit.samplers.vp_schedule import VPSchedule

MEAN, STD = 0.3, 0.4
LEVELS = VPSchedule(build_diffusion())


def alpha_of(time: float) -> float:
    """Of the network's time 0..999, between the steps too."""
    return math.exp(LEVELS.log_alpha((time + 1) / 1000))


def exact_eps(x, time, channels: int = 1):
    """E[eps | x_t] for data N(MEAN, STD^2)."""
    alpha = alpha_of(time)
    variance = alpha**2 * STD**2 + 1 - alpha**2
    eps = math.sqrt(1 - alpha**2) * (x - alpha * MEAN) / variance
    return torch.cat([eps, torch.zeros_like(eps)], 1) if channels == 2 else eps


def exact_sample(z):
    """Where the probability flow takes ``z`` from the last level to the first."""
    stds = [math.sqrt(a**2 * STD**2 + 1 - a**2) for a in (alpha_of(999), alpha_of(0))]
    return alpha_of(0) * MEAN + stds[1] / stds[0] * (z - alpha_of(999) * MEAN)


def noise(count: int = 4000, seed: int = 0):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(count: int = 4000, seed: int = 1):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 1, 1, 1, generator=rng, dtype=torch.float64)


def assert_like_the_data(x, slack: float = 0.03):
    assert abs(float(x.mean()) - MEAN) < slack
    assert abs(float(x.std()) - STD) < slack


def test_ancestral_sampling_reaches_the_data():
    diffusion = build_diffusion(respacing="250", variance="fixed_large")
    assert_like_the_data(sample_ddpm(exact_eps, noise(), diffusion, draws()))
    learned = build_diffusion(respacing="250")
    assert_like_the_data(sample_ddpm(lambda x, t: exact_eps(x, t, 2), noise(), learned, draws()))


def test_clipping_keeps_predictions_inside():
    diffusion = build_diffusion(respacing="20", variance="fixed_small")
    wild = lambda x, t: 3 * exact_eps(x, t)  # noqa: E731
    assert float(sample_ddpm(wild, noise(), diffusion, draws(), clip_denoised=True).abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_reaches_the_data(eta):
    diffusion = build_diffusion(respacing="ddim100", variance="fixed_large")
    assert_like_the_data(sample_ddim(exact_eps, noise(), diffusion, draws(), eta=eta), slack=0.04)


def test_ddim_draws_nothing_without_noise():
    diffusion = build_diffusion(respacing="ddim10", variance="fixed_large")
    sample_ddim(exact_eps, noise(4), diffusion, iter(()).__next__)


@pytest.mark.parametrize(("refinements", "error"), [(0, 0.3), (4, 1e-2), (16, 1e-6)])
def test_inversion_finds_the_noise_of_a_sample(refinements, error):
    diffusion = build_diffusion(respacing="ddim50", variance="fixed_large")
    z = noise(8)
    found = invert_ddim(exact_eps, sample_ddim(exact_eps, z, diffusion, draws(8)), diffusion, refinements=refinements)
    assert float((found - z).abs().max()) < error


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_all_predictions_give_the_same_sample(predict):
    """The same knowledge, said in three ways."""

    def network(x, time):
        alpha, sigma = alpha_of(time), math.sqrt(1 - alpha_of(time) ** 2)
        eps = exact_eps(x, time)
        x0 = (x - sigma * eps) / alpha
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[predict]

    z = noise(8)
    diffusion = build_diffusion(respacing="ddim20", variance="fixed_large", predict=predict)
    plain = build_diffusion(respacing="ddim20", variance="fixed_large")
    expected = sample_ddim(exact_eps, z, plain, draws(8))
    torch.testing.assert_close(sample_ddim(network, z, diffusion, draws(8)), expected, rtol=1e-5, atol=1e-6)
    schedule = VPSchedule(build_diffusion(predict=predict))
    expected = sample_dpm_solver(exact_eps, z, LEVELS, 10)
    torch.testing.assert_close(sample_dpm_solver(network, z, schedule, 10), expected, rtol=1e-5, atol=1e-6)


def solver_error(steps: int, order: int, grid: str = "logsnr") -> float:
    z = noise(16)
    return float((sample_dpm_solver(exact_eps, z, LEVELS, steps, order=order, grid=grid) - exact_sample(z)).abs().max())


def test_higher_orders_of_dpm_solver_are_more_exact():
    errors = {order: solver_error(60, order) for order in (1, 2, 3)}
    assert errors[3] < errors[2] / 2 < errors[1] / 4, errors


@pytest.mark.parametrize(("order", "least"), [(1, 0.85), (2, 1.7), (3, 1.7)])
def test_dpm_solver_converges_with_its_order(order, least):
    """The first steps, which have no past, limit the third order's rate to two."""
    rate = math.log2(solver_error(60, order) / solver_error(120, order))
    assert rate > least, rate


@pytest.mark.parametrize("grid", ["time_uniform", "time_quadratic", "logsnr"])
def test_every_grid_ends_at_the_first_level(grid):
    levels = LEVELS.grid(20, grid)
    assert (levels[0].t, levels[-1].t) == (1.0, 0.001)
    assert levels[-1].model_time == 0.0
    assert levels[0].model_time == pytest.approx(999)
    assert all(late.lam > early.lam for early, late in itertools.pairwise(levels))
    assert solver_error(80, 2, grid) < 0.05


def test_time_is_the_inverse_of_the_log_snr():
    for t in (0.0015, 0.01, 0.3, 0.77, 0.9999):
        assert LEVELS.time_of(LEVELS.level(t).lam) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sa_solver_reaches_the_data(eta):
    x = sample_sa_solver(exact_eps, noise(), LEVELS, 40, draws(), tau=middle_noise(eta))
    assert_like_the_data(x, slack=0.04)


def test_sa_solver_without_noise_follows_the_probability_flow():
    z = noise(16)
    errors = []
    for steps in (40, 80):
        x = sample_sa_solver(exact_eps, z, LEVELS, steps, draws(16), tau=middle_noise(0.0), grid="logsnr")
        errors.append(float((x - exact_sample(z)).abs().max()))
    assert errors[1] < errors[0] / 3 < 0.01, errors


def test_lagrange_weights_integrate_polynomials_exactly():
    h, kap, nodes = 0.7, 1.8, [-0.7, -1.1, -2.0]
    v = torch.linspace(-h, 0, 20_001, dtype=torch.float64)
    for degree in range(3):
        found = sum(w * node**degree for w, node in zip(lagrange_weights(nodes, h, kap), nodes, strict=True))
        assert found == pytest.approx(float(torch.trapezoid(torch.exp(kap * v) * v**degree, v)), rel=1e-6)


def exact_velocity(x, t):
    """E[noise - x0 | x_t] along straight paths."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    return (t - (1 - t) * STD**2) * centred / variance - MEAN


@pytest.mark.parametrize(("sampler", "least"), [(sample_euler, 0.9), (sample_heun, 1.8)])
def test_flow_samplers_converge_with_their_order(sampler, least):
    z = noise(16)
    errors = [float((sampler(exact_velocity, z, steps) - (MEAN + STD * z)).abs().max()) for steps in (32, 64)]
    assert math.log2(errors[0] / errors[1]) > least, errors


def test_solvers_refuse_what_they_cannot_do():
    with pytest.raises(ConfigError, match="respacing"):
        VPSchedule(build_diffusion(respacing="50"))
    with pytest.raises(ConfigError, match="previous_x"):
        VPSchedule(build_diffusion(predict="previous_x"))
    with pytest.raises(ConfigError, match=r"steps=1000"):
        sample_dpm_solver(exact_eps, noise(1), LEVELS, 1000)
    with pytest.raises(ConfigError, match="order"):
        sample_dpm_solver(exact_eps, noise(1), LEVELS, 10, order=4)


@pytest.mark.parametrize("sampler", [sample_ddpm, sample_ddim])
def test_a_classifier_draws_samples_towards_its_class(sampler):
    """A classifier that is linear in x0 moves Gaussian data by its slope times their variance."""
    respacing = "250" if sampler is sample_ddpm else "ddim250"
    diffusion = build_diffusion(respacing=respacing, variance="fixed_large")
    strength = 2.0  # log p(class | x0) = strength * x0, whose gradient at x_t is strength * dE[x0 | x_t]/dx_t

    def gradient(x, time):
        alpha = alpha_of(time)
        return torch.full_like(x, strength * alpha * STD**2 / (alpha**2 * STD**2 + 1 - alpha**2))

    x = sampler(exact_eps, noise(), diffusion, draws(), gradient=gradient)
    assert abs(float(x.mean()) - (MEAN + strength * STD**2)) < 0.04
    assert abs(float(x.std()) - STD) < 0.04
