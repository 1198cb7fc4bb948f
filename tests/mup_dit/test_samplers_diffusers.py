"""Our samplers against the schedulers of diffusers, on the same network, noise and steps."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from common.diffusion.gaussian import build_diffusion
from mup_dit.samplers.ddim import sample_ddim
from mup_dit.samplers.ddpm import sample_ddpm
from mup_dit.samplers.dpm_solver import sample_dpm_solver
from mup_dit.samplers.flow import sample_euler
from mup_dit.samplers.vp_schedule import VPSchedule

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def network(x, t):
    return torch.tanh(x * 0.7 + 0.1) * (0.5 + float(t) / 2000)


def start(seed: int = 0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def scheduled(scheduler, steps: int, **options):
    """diffusers' loop."""
    scheduler.set_timesteps(steps)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


def test_ddim_equals_diffusers():
    expected = scheduled(DDIMScheduler(**LINEAR, clip_sample=False), 20)
    found = sample_ddim(network, start(), build_diffusion(respacing="ddim20", variance="fixed_large"), start)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ddpm_equals_diffusers():
    expected = scheduled(
        DDPMScheduler(**LINEAR, clip_sample=False, variance_type="fixed_small"), 20,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    rng = torch.Generator().manual_seed(3)
    diffusion = build_diffusion(respacing="ddim20", variance="fixed_small")
    found = sample_ddpm(network, start(), diffusion, lambda: torch.randn(2, 3, 4, 4, generator=rng))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_takes_the_steps_of_diffusers(order):
    """Levels differ between the libraries (theirs are whole steps), so ours are made to visit theirs."""
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR, solver_order=order, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    expected = scheduled(scheduler, 12)
    schedule = VPSchedule(build_diffusion())
    # at the end diffusers steps to the first level once more, from its last whole step
    times = [*(float(t) / 1000 + 1e-3 for t in scheduler.timesteps), 1e-3]
    schedule.grid = lambda steps, kind: [schedule.level(t) for t in times]
    found = sample_dpm_solver(network, start(), schedule, 12, order=order)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_flow_euler_equals_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - k / 10 for k in range(10)])
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    found = sample_euler(lambda x, t: network(x, 1000 * t), start(), 10, shift=3.0)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
