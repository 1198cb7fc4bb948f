"""Draws of training steps: expectation kept, large losses more often, resumable."""

import pytest
import torch

from common.diffusion.timestep_sampling import LossSecondMoment, build_timestep_sampler
from common.errors import CheckpointError, ConfigError


def warmed(num_steps: int = 8) -> LossSecondMoment:
    sampler = LossSecondMoment(num_steps, history=3)
    for _ in range(3):
        sampler.update(torch.arange(num_steps), torch.arange(1.0, num_steps + 1))
    return sampler


def test_uniform_until_every_step_has_a_history():
    sampler = LossSecondMoment(4, history=2)
    sampler.update(torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.ones(7))
    assert bool((sampler.probabilities() == 0.25).all())
    sampler.update(torch.tensor([3]), torch.tensor([9.0]))
    assert sampler.probabilities()[3] > 0.5


def test_steps_are_drawn_by_the_root_of_the_second_moment():
    p = warmed().probabilities()
    assert torch.allclose(p.sum(), torch.tensor(1.0, dtype=torch.float64))
    expected = torch.arange(1.0, 9.0, dtype=torch.float64)
    assert torch.allclose(p, expected / expected.sum() * 0.999 + 0.001 / 8)


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_weights_keep_the_expectation(name):
    sampler = build_timestep_sampler(name, 8) if name == "uniform" else warmed()
    times, weights = sampler.draw(20_000, torch.Generator().manual_seed(0))
    values = torch.arange(8.0) ** 2
    assert abs(float((values[times] * weights).mean()) / float(values.mean()) - 1) < 0.03


def test_the_history_holds_the_newest_losses():
    sampler = warmed()
    sampler.update(torch.tensor([0]), torch.tensor([50.0]))
    assert sampler.losses_TH[0].tolist() == [1.0, 1.0, 50.0]


def test_the_state_survives_a_checkpoint():
    sampler, resumed = warmed(), LossSecondMoment(8, history=3)
    resumed.load_state_dict(sampler.state_dict())
    draws = [s.draw(16, torch.Generator().manual_seed(1))[0] for s in (sampler, resumed)]
    assert torch.equal(*draws)
    with pytest.raises(CheckpointError, match="history"):
        LossSecondMoment(9, history=3).load_state_dict(sampler.state_dict())
    with pytest.raises(ConfigError, match="time_sampler"):
        build_timestep_sampler("importance", 8)
