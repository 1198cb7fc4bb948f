"""Samplers against an oracle that knows the clean token, and their grids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from rpg import samplers
from rpg.noise_schedule import TokenDiffusion, linear_tables

TABLES = linear_tables()
X0 = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def oracle(x_RD, t):
    abar = TABLES.abar_T[t]
    return (x_RD - abar.sqrt() * X0) / (1 - abar).sqrt()


def noise(index):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(index + 10))


def last(states):
    for state in states:
        found = state
    return found


@pytest.mark.parametrize(
    "run",
    [
        lambda x: samplers.ddpm(oracle, x, TABLES, noise),
        lambda x: samplers.trailing(oracle, x, TABLES, noise, steps=50, eta=1.0),
        lambda x: samplers.trailing(oracle, x, TABLES, noise, steps=7, eta=0.0),
        lambda x: samplers.trailing(oracle, x, TABLES, noise, steps=1000, eta=0.5),
        lambda x: samplers.dpm_solver_sde(oracle, x, TABLES, noise, steps=20),
        lambda x: samplers.heun(oracle, x, TABLES, noise, steps=20, churn=0.0),
        lambda x: samplers.heun(oracle, x, TABLES, noise, steps=20, churn=0.5),
    ],
)
def test_an_oracle_is_led_to_the_clean_token(run):
    torch.testing.assert_close(last(run(noise(-1))), X0, rtol=1e-3, atol=1e-3)


def test_the_released_ddim_stops_at_the_first_level_of_noise():
    found = last(samplers.ddim(oracle, noise(-1), TABLES, noise, steps=60, eta=0.0, grid="linear"))
    level = (1 - TABLES.abar_T[0]).sqrt()
    assert 0.2 * level < (found - X0).std() < 20 * level


def test_ddpm_without_noise_and_prediction_scales_by_the_coefficients():
    start = noise(-1)
    found = last(samplers.ddpm(lambda x, t: torch.zeros_like(x), start, TABLES, lambda i: torch.zeros(3, 8)))
    torch.testing.assert_close(found, start * TABLES.coeff_1_T.double().prod().float(), rtol=1e-4, atol=1e-4)


@given(steps=st.integers(1, 97))
def test_trailing_times_fall_from_the_noisiest_to_the_cleanest(steps: int):
    times = samplers.trailing_times(steps, 97)
    assert len(times) == steps and times[0] == 96 and (steps == 1 or times[-1] == 0)
    assert all(a > b for a, b in zip(times, times[1:], strict=False))


@given(steps=st.integers(1, 97), grid=st.sampled_from(samplers.GRIDS))
def test_released_times_rise_and_stay_inside_the_table(steps: int, grid: str):
    times = samplers.released_times(steps, 97, grid)
    assert len(times) == steps and times[0] > 0 and times[-1] <= 96
    assert all(a <= b for a, b in zip(times, times[1:], strict=False))


def test_released_linear_grid_leaves_out_the_noisiest_times():
    assert samplers.released_times(60, 1000)[-1] == 945
    assert samplers.released_times(12, 200)[:3] == [1, 17, 33]


@pytest.mark.parametrize("steps", [0, 98])
def test_steps_beyond_the_trained_times_are_refused(steps: int):
    with pytest.raises(ConfigError, match=rf"sampling\.steps={steps} must lie in 1\.\.97"):
        samplers.trailing_times(steps, 97)


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_every_prediction_can_be_turned_into_noise(prediction: str):
    diffusion = TokenDiffusion(TABLES, prediction=prediction)
    eps, t = noise(1), torch.tensor([5, 400, 999])
    x_t = diffusion.noise(X0, t, eps)
    target = diffusion.target(X0, t, eps)
    for row in range(3):
        found = diffusion.to_noise(target[row], x_t[row], float(TABLES.abar_T[t[row]]))
        torch.testing.assert_close(found, eps[row], rtol=1e-3, atol=5e-3)


def test_trajectories_keep_the_start_every_interval_and_the_last():
    end, kept = samplers.trajectory(iter([torch.full((1, 2), float(i)) for i in range(1, 8)]), torch.zeros(1, 2), 3)
    assert kept[0, :, 0].tolist() == [0, 3, 6, 7] and end[0, 0] == 7


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="diffusion_steps=1"):
        linear_tables(steps=1)
    with pytest.raises(ConfigError, match="beta"):
        linear_tables(0.5, 0.1)


def test_the_tables_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(TABLES.abar_T, theirs.alphas_cumprod)
    variance = torch.stack([theirs._get_variance(t) for t in range(1, 1000)])
    torch.testing.assert_close(TABLES.posterior_variance_T[1:], variance, rtol=1e-3, atol=1e-7)


def test_a_stochastic_step_equals_that_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    theirs.set_timesteps(10)  # steps of 100
    found = theirs.step(oracle(X0 * 0.5, 501), 501, X0 * 0.5, eta=1.0, variance_noise=noise(0)).prev_sample
    abar = TABLES.abar_T
    ours = samplers._ddim_step(
        oracle(X0 * 0.5, 501), X0 * 0.5, float(abar[501]), float(abar[401]), 1.0, lambda: noise(0)
    )
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-4)
