"""The Gaussian process: moments, losses and their gradients against direct computation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.betas import SCHEDULES, build_betas, space_timesteps
from common.diffusion.gaussian import LOSSES, PREDICTIONS, VARIANCES, build_diffusion
from common.diffusion.gaussian_likelihood import discretized_gaussian_log_likelihood, gaussian_kl
from common.errors import ConfigError


def batch(rows: int = 6, channels: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(rows, channels, 4, 4, generator=rng) for _ in range(2))
    return x0 * 0.5, noise, torch.randint(1000, (rows,), generator=rng)


def exact_output(diffusion, x0, x_t, t, noise, values=0.3):
    """What a perfect network would give, with some variance values."""
    prediction = diffusion.target(x0, x_t, t, noise)
    return torch.cat([prediction, torch.full_like(x0, values)], 1) if diffusion.learns_variance else prediction


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_destroy_the_data_step_by_step(schedule):
    diffusion = build_diffusion(schedule=schedule)
    abar = diffusion.alphas_cumprod
    assert diffusion.betas.dtype == torch.float64
    assert bool((abar[1:] < abar[:-1]).all())
    assert abar[0] > 0.97
    assert abar[-1] < 0.01


def test_an_unknown_schedule_is_named():
    with pytest.raises(ConfigError, match="linaer"):
        build_betas("linaer", 1000)


def test_the_linear_schedule_has_the_same_total_noise_for_every_number_of_steps():
    many, few = build_diffusion(1000), build_diffusion(250)
    assert math.isclose(many.alphas_cumprod[-1].log(), few.alphas_cumprod[-1].log(), rel_tol=0.03)
    with pytest.raises(ConfigError, match="too few"):
        build_diffusion(10)


def test_adm_name_of_the_cosine_schedule_is_known():
    assert torch.equal(build_betas("squaredcos_cap_v2", 100), build_betas("cosine", 100))
    assert build_betas("cosine", 100).max() == 0.999


@given(steps=st.integers(2, 400), count=st.integers(1, 400))
def test_respacing_keeps_ends_and_noise_levels(steps, count):
    if count > steps:
        with pytest.raises(ConfigError, match=f"respacing='{count}'"):
            space_timesteps(steps, str(count))
        return
    kept = space_timesteps(steps, str(count))
    assert len(set(kept)) == count
    assert kept[0] == 0
    assert kept[-1] == (steps - 1 if count > 1 else 0)
    whole = build_diffusion(steps, "cosine")
    part = build_diffusion(steps, "cosine", respacing=str(count))
    torch.testing.assert_close(part.alphas_cumprod, whole.alphas_cumprod[kept], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("respacing", ["ddim300", "0", "10,2000", "ten", "ddimx"])
def test_impossible_respacings_are_refused(respacing):
    with pytest.raises(ValueError, match="respacing"):
        build_diffusion(respacing=respacing)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_perfect_network_recovers_x0_and_the_posterior(predict, variance):
    diffusion = build_diffusion(predict=predict, variance=variance)
    x0, noise, t = batch()
    t = t % 900 + 1  # at the very end x0 is lost in rounding, at t = 0 previous_x has no x_t in it
    x_t = diffusion.q_sample(x0, t, noise)
    moments = diffusion.p_mean_variance(exact_output(diffusion, x0, x_t, t, noise), x_t, t)
    torch.testing.assert_close(moments.x0, x0, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(moments.mean, diffusion.q_posterior_mean(x0, x_t, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.variance, moments.log_variance.exp(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("variance", VARIANCES)
def test_a_whole_number_as_step_gives_what_a_tensor_gives(variance):
    diffusion = build_diffusion(variance=variance, respacing="100")
    x0, noise, _ = batch()
    for step in (0, 7, 99):
        t = torch.full((len(x0),), step)
        x_t = diffusion.q_sample(x0, t, noise)
        assert torch.allclose(diffusion.q_sample(x0, step, noise), x_t)
        output = exact_output(diffusion, x0, x_t, t, noise)
        one, many = (diffusion.p_mean_variance(output, x_t, s, clip_denoised=True) for s in (step, t))
        for name in ("mean", "variance", "log_variance", "x0"):
            torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-5, atol=1e-7)
        assert diffusion.model_time(step) == int(diffusion.model_time(t)[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_losses_are_finite_with_gradients_and_least_for_a_perfect_network(loss, predict):
    diffusion = build_diffusion(predict=predict, loss=loss)
    x0, noise, t = batch()
    x_t = diffusion.q_sample(x0, t, noise)
    perfect = exact_output(diffusion, x0, x_t, t, noise)
    output = (perfect + 0.3 * torch.randn(perfect.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    terms = diffusion.training_losses(output, x0, x_t, t, noise)
    assert all(term.shape == (len(x0),) for term in terms.values())
    terms["loss"].sum().backward()
    assert bool(output.grad.isfinite().all())
    if not loss.endswith("kl"):
        assert float(diffusion.training_losses(perfect, x0, x_t, t, noise)["mse"].max()) < 1e-5 < terms["mse"].min()


def test_the_bound_trains_the_variance_only():
    diffusion = build_diffusion()
    x0, noise, t = batch()
    output = torch.randn(6, 6, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    x_t = diffusion.q_sample(x0, t, noise)
    diffusion.training_losses(output, x0, x_t, t, noise)["vb"].sum().backward()
    assert not output.grad[:, :3].any()
    assert output.grad[:, 3:].abs().sum() > 0


def test_rescaling_follows_the_number_of_steps():
    x0, noise, t = batch()
    output = torch.randn(6, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    for respacing, factor in (("", 1.0), ("100", 0.1)):
        plain, scaled, kl, scaled_kl = (
            build_diffusion(respacing=respacing, loss=loss) for loss in ("mse", "rescaled_mse", "kl", "rescaled_kl")
        )
        t = t % plain.num_steps
        given_ = (output, x0, plain.q_sample(x0, t, noise), t, noise)
        expected = plain.training_losses(*given_)["vb"] * factor
        torch.testing.assert_close(scaled.training_losses(*given_)["vb"], expected)
        torch.testing.assert_close(kl.training_losses(*given_)["vb"], plain.training_losses(*given_)["vb"])
        expected = kl.training_losses(*given_)["loss"] * plain.num_steps
        torch.testing.assert_close(scaled_kl.training_losses(*given_)["loss"], expected)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_min_snr_weighs_all_predictions_alike(predict):
    """The error of x0, weighted by min(SNR, gamma), whatever the network predicts."""
    x0, noise, t = batch()
    t = t % 900 + 1
    diffusion = build_diffusion(predict=predict, variance="fixed_large", min_snr_gamma=5.0)
    x_t = diffusion.q_sample(x0, t, noise)
    output = diffusion.target(x0, x_t, t, noise) + 0.01
    snr = (diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))[t].float()
    error = (diffusion.x0_of(output, x_t, t) - x0).square().flatten(1).mean(1)
    found = diffusion.training_losses(output, x0, x_t, t, noise)["loss"]
    torch.testing.assert_close(found, error * snr.clamp(max=5.0), rtol=2e-2, atol=1e-6)
    with pytest.raises(ConfigError, match="min_snr_gamma"):
        build_diffusion(loss="kl", min_snr_gamma=5.0)


def test_the_bound_of_an_exact_network_is_the_information_in_the_first_level():
    """Standard normal data: the terms above t = 0 add up to I(x0; x_1) = -log(1 - abar_0)/2."""
    diffusion = build_diffusion(100, "cosine")
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randn(400, 1, 4, 4, generator=rng)
    bits = diffusion.prior_bits(x0).mean()
    for t in range(1, diffusion.num_steps):
        x_t = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=rng))
        eps = float(diffusion.sqrt_one_minus_alphas_cumprod[t]) * x_t  # E[eps | x_t]
        output = torch.cat([eps, torch.ones_like(eps)], 1)  # variance beta_t, the true one for such data
        bits = bits + diffusion.variational_bound(output, x0, x_t, torch.full((len(x0),), t)).mean()
    expected = -0.5 * math.log2(1 - float(diffusion.alphas_cumprod[0]))
    assert abs(float(bits) / expected - 1) < 0.02


def test_divergence_and_likelihood_agree_with_torch():
    rng = torch.Generator().manual_seed(0)
    mean1, log1, mean2, log2 = (torch.randn(50, generator=rng) for _ in range(4))
    normals = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mean1, log1), (mean2, log2))]
    torch.testing.assert_close(gaussian_kl(mean1, log1, mean2, log2), torch.distributions.kl_divergence(*normals))
    x = torch.linspace(-0.9, 0.9, 50)
    normal = torch.distributions.Normal(0.1, 0.3)
    expected = (normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)).log()
    found = discretized_gaussian_log_likelihood(x, torch.tensor(0.1), torch.tensor(math.log(0.3)))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    everything = torch.linspace(-1, 1, 256)
    total = discretized_gaussian_log_likelihood(everything, torch.tensor(0.1), torch.tensor(math.log(0.3))).exp().sum()
    assert abs(float(total) - 1) < 1e-4


def test_wrong_channels_are_named():
    diffusion = build_diffusion()
    with pytest.raises(ValueError, match="3 channels"):
        diffusion.split(torch.zeros(1, 3, 4, 4), 3)
    fixed = build_diffusion(variance="fixed_large")
    assert fixed.split(torch.zeros(1, 6, 4, 4), 3)[0].shape[1] == 3
