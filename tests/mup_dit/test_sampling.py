"""Latents: every sampler with every family, one stream of random numbers per sample."""

import pytest
import torch

from common.errors import ConfigError
from mup_dit.objective import ObjectiveConfig
from mup_dit.sampling import LatentSampler, RowNoise, SamplerConfig, caption_condition, label_condition
from tests.mup_dit.tiny import inputs, model

CPU = torch.device("cpu")
DDPM, FLOW = ObjectiveConfig(), ObjectiveConfig(kind="flow")


def conditions(family, network, rows: int):
    if family == "dit":
        return label_condition(network, list(range(rows)), CPU)
    _, _, caption, *pooled = inputs(family, rows=rows)
    caption = caption if family == "pixart" else caption[:, None]
    return caption_condition(network, family, caption, None, *pooled)


def run(family, config, rows=(0, 1, 2), network=None, seed=5):
    network = (network or model(family)).eval()
    sampler = LatentSampler(network, family, FLOW if family == "mmdit" else DDPM, config)
    condition, null = conditions(family, network, 8)
    pick = torch.tensor(rows)
    condition, null = ({name: values[pick] for name, values in part.items()} for part in (condition, null))
    return sampler, sampler(condition, null, RowNoise(seed, rows, sampler.shape, CPU))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver", "sa_solver"])
@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_a_sample_does_not_depend_on_its_batch(family, sampler):
    config = SamplerConfig(sampler=sampler, steps=4, cfg_scale=2.0, eta=1.0)
    used, together = run(family, config)
    assert together.shape == (3, 4, 8, 8)
    assert bool(together.isfinite().all())
    assert used.evaluations == 8
    _, alone = run(family, config, rows=(2,))
    torch.testing.assert_close(alone[0], together[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampler", "evaluations"), [("flow_euler", 8), ("flow_heun", 16), ("auto", 8)])
def test_flow_samplers(sampler, evaluations):
    used, latents = run("mmdit", SamplerConfig(sampler=sampler, steps=4, cfg_scale=2.0, shift=2.0))
    assert bool(latents.isfinite().all())
    assert used.evaluations == evaluations


def test_defaults_are_those_of_the_papers():
    for family, sampler, steps in (("dit", "ddpm", 250), ("pixart", "dpm_solver", 20), ("mmdit", "flow_euler", 28)):
        objective = FLOW if family == "mmdit" else DDPM
        built = LatentSampler(model(family), family, objective, SamplerConfig(cfg_scale=4.0))
        assert (built.sampler, built.steps) == (sampler, steps)
        assert built.guidance.channels == ("three" if sampler == "ddpm" else "all")


def test_noise_belongs_to_the_sample():
    first, second = (RowNoise(1, rows, (2, 3, 3), CPU) for rows in ((4, 7), (7, 9, 11)))
    for _ in range(3):
        assert torch.equal(first()[1], second()[0])
    assert not torch.equal(RowNoise(1, [0], (2, 3, 3), CPU)(), RowNoise(2, [0], (2, 3, 3), CPU)())


def test_respacing_is_used_as_given():
    built = LatentSampler(model("dit"), "dit", DDPM, SamplerConfig(respacing="10,15,20"))
    assert built.steps == 45
    assert LatentSampler(model("dit"), "dit", DDPM, SamplerConfig(sampler="ddim", steps=25)).steps == 25


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("dit", {"sampler": "flow_euler"}, "use ddpm, ddim"),
        ("mmdit", {"sampler": "ddpm"}, "use flow_euler, flow_heun"),
        ("dit", {"steps": 2000}, "sampling.steps=2000 exceeds the 1000 steps"),
        ("dit", {"sampler": "ddim", "steps": 300}, "respacing=300"),
        ("pixart", {"steps": 1000}, "steps=1000"),
        ("pixart", {"respacing": "50"}, "takes sampling.steps"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(family, options, message):
    with pytest.raises(ConfigError, match=message):
        LatentSampler(model(family), family, FLOW if family == "mmdit" else DDPM, SamplerConfig(**options))


@pytest.mark.parametrize(
    "options",
    [{"sampler": "euler"}, {"steps": 0}, {"eta": -1}, {"cfg_scale": 0.9}, {"cfg_interval": [0.1]}, {"order": 5}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SamplerConfig(**options)


def test_guidance_without_a_null_class_is_refused():
    with pytest.raises(ConfigError, match="class_dropout_prob=0"):
        run("dit", SamplerConfig(steps=2, cfg_scale=2.0), network=model("dit", class_dropout_prob=0.0))
