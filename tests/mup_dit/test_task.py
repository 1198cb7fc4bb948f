"""What training tells the engine: draws, losses, conditions, groups; that the loss is the mean over images."""

import pytest
import torch
from torch.nn import functional as F

from common.diffusion.gaussian import build_diffusion
from common.errors import ConfigError, DataError
from mup_dit.objective import ObjectiveConfig
from mup_dit.task import DiffusionTask
from tests.mup_dit.tiny import model, model_config

ROWS = 6


def build_task(family: str = "dit", heads: int = 8, *, network: dict | None = None, **options) -> DiffusionTask:
    objective = options.pop("objective", ObjectiveConfig(kind="flow" if family == "mmdit" else "ddpm"))
    network = network or {}
    return DiffusionTask(
        model_config(family, heads, **network), objective, seed=options.pop("seed", 0),
        build=lambda: model(family, heads, **network), **options,
    )  # fmt: skip


def batch(rows: int = ROWS) -> dict:
    rng = torch.Generator().manual_seed(5)
    return {
        "image": torch.randn(rows, 4, 8, 8, generator=rng),
        "label": torch.randint(10, (rows,), generator=rng),
        "caption": torch.randn(rows, 1, 6, 20, generator=rng),
        "pooled": torch.randn(rows, 12, generator=rng),
    }


def part(mapping: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in mapping.items()}


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_sums_of_parts_are_the_sum_of_the_whole(family):
    task = build_task(family)
    network = task.build_model().train()
    data, draws = batch(), task.draw(3, ROWS)
    whole = task.training_step(network, data, draws)
    parts = [task.training_step(network, part(data, rows), part(draws, rows)) for rows in (slice(2), slice(2, ROWS))]
    assert sum(out.loss_sum.item() for out in parts) == pytest.approx(whole.loss_sum.item(), rel=1e-5)
    assert sum(out.metrics["mse"][0].item() for out in parts) == pytest.approx(whole.metrics["mse"][0].item(), rel=1e-5)
    assert task.count(data, draws) == ROWS


def test_loss_is_that_of_the_diffusion():
    task = build_task()
    network, data, draws = task.build_model().eval(), batch(), task.draw(0, ROWS)
    diffusion = build_diffusion()
    x_t = diffusion.q_sample(data["image"], draws["t"], draws["noise"])
    out = network(x_t, draws["t"], data["label"])
    expected = diffusion.training_losses(out, data["image"], x_t, draws["t"], draws["noise"])["loss"].sum()
    assert task.training_step(network, data, draws).loss_sum.item() == pytest.approx(expected.item())


def test_flow_is_the_straight_line_between_image_and_noise():
    task = build_task("mmdit")
    network, data, draws = task.build_model().eval(), batch(), task.draw(0, ROWS)
    t = draws["t"].reshape(-1, 1, 1, 1)
    x_t = (1 - t) * data["image"] + t * draws["noise"]
    velocity = network(x_t, draws["t"], data["caption"].squeeze(1), data["pooled"])
    expected = F.mse_loss(velocity, draws["noise"] - data["image"], reduction="none").mean(dim=(1, 2, 3)).sum()
    assert task.training_step(network, data, draws).loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_repa_adds_the_cosine_to_the_encoders_features():
    class Features:
        channels = 5

        def __call__(self, image):
            return image.flatten(2).transpose(1, 2)[:, :16, :1].repeat(1, 1, 5)

    sizes = {"repa_depth": 1, "repa_channels": 5}
    weightless, weighted = (
        build_task("mmdit", network=sizes, features=Features(), objective=ObjectiveConfig(kind="flow", repa_weight=w))
        for w in (0.0, 2.0)
    )
    network, data, draws = weighted.build_model().eval(), batch(), weighted.draw(0, ROWS)
    plain, full = weightless.training_step(network, data, draws), weighted.training_step(network, data, draws)
    repa_sum = full.metrics["repa"][0].item()
    assert full.loss_sum.item() == pytest.approx(plain.loss_sum.item() + 2.0 * repa_sum, rel=1e-5)
    assert 0 <= repa_sum <= 2 * ROWS


def test_posterior_is_sampled_with_the_steps_own_draws_and_scaled():
    task = build_task(latent_scale=0.5)
    draws = task.draw(0, ROWS)
    mean, std = torch.randn(ROWS, 4, 8, 8), torch.rand(ROWS, 4, 8, 8)
    x0 = task.latents({"mean": mean, "std": std}, draws)
    torch.testing.assert_close(x0, (mean + std * draws["posterior"]) * 0.5)
    again = task.latents({"mean": mean, "std": std}, task.draw(1, ROWS))
    assert not torch.equal(x0, again)


def test_draws_depend_on_step_and_seed_and_not_on_the_batch_they_are_split_into():
    task = build_task()
    first = task.draw(0, ROWS)
    assert torch.equal(first["noise"], task.draw(0, ROWS)["noise"])
    for other in (task.draw(1, ROWS), build_task(seed=1).draw(0, ROWS)):
        assert not torch.equal(first["noise"], other["noise"])
        assert not torch.equal(first["t"], other["t"])


def test_share_of_dropped_conditions_and_their_effect():
    task = build_task()
    assert task.draw(0, 20_000)["drop"].float().mean().item() == pytest.approx(0.1, abs=0.01)
    network, data, draws = task.build_model(), batch(), task.draw(0, ROWS)
    draws["drop"] = torch.ones(ROWS, dtype=torch.bool)
    trained = task.training_step(network.train(), data, draws).loss_sum
    assert trained != task.training_step(network.eval(), data, draws).loss_sum
    nothing = build_task(network={"class_dropout_prob": 0.0})
    assert nothing.condition(data, draws["drop"])["drop_B"] is None


def test_validation_times_are_stratified_and_fixed():
    for family in ("dit", "mmdit"):
        task = build_task(family)
        draws = task.validation_draw(0, 100)
        assert torch.equal(draws["t"], task.validation_draw(0, 100)["t"])
        assert not draws["drop"].any()
        if family == "dit":
            assert sorted((draws["t"] // 10).tolist()) == list(range(100))


def test_flow_times_are_logit_normal_or_uniform():
    logit = build_task("mmdit", objective=ObjectiveConfig(kind="flow", time_sampler="logit_normal", time_mean=0.5))
    normal = torch.logit(logit.draw(0, 50_000)["t"].double())
    assert normal.mean().item() == pytest.approx(0.5, abs=0.02)
    assert normal.std().item() == pytest.approx(1.0, abs=0.02)
    uniform = build_task("mmdit").draw(0, 50_000)["t"]
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.max() > 0.99


def test_groups_carry_the_multipliers_and_skip_what_is_frozen():
    task = build_task(heads=8, decay_rule="scaled", scale_eps=1e-8)
    network = task.build_model()
    groups = task.param_groups(network, 0.1)
    assert [(g["lr_scale"], g["weight_decay"], g["eps"]) for g in groups] == [(0.5, 0.2, 5e-9), (1.0, 0.1, 1e-8)]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in network.parameters())
    independent = build_task(heads=8, decay_rule="independent").param_groups(network, 0.1)
    assert [g["weight_decay"] for g in independent] == [0.1, 0.1]


def test_operations_of_dit_xl_are_those_of_its_paper():
    task = build_task("dit", 16, network={"depth": 28, "hidden_size": 1152, "input_size": 32, "num_classes": 1000})
    from mup_dit.building import build_skeleton

    forward = task.flops_per_sample(build_skeleton(task.model)) / 3 / 2
    assert forward == pytest.approx(118.6e9, rel=0.02)  # multiply-adds, Table 1 of the DiT paper


@pytest.mark.parametrize(
    ("family", "lost", "message"),
    [
        ("dit", "label", "conditioned on label, which the data lack"),
        ("pixart", "caption", "conditioned on caption"),
        ("mmdit", "pooled", "conditioned on pooled"),
        ("dit", "image", "neither image nor mean and std"),
    ],
)
def test_missing_parts_of_a_batch_are_named(family, lost, message):
    task = build_task(family)
    data = {name: value for name, value in batch().items() if name != lost}
    with pytest.raises(DataError, match=message):
        task.training_step(task.build_model(), data, task.draw(0, ROWS))


def test_latents_of_another_size_are_refused():
    task = build_task()
    data = batch() | {"image": torch.zeros(ROWS, 4, 16, 16)}
    with pytest.raises(DataError, match=r"latents have shape \(4, 16, 16\), but the network takes \(4, 8, 8\)"):
        task.training_step(task.build_model(), data, task.draw(0, ROWS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_task("dit", objective=ObjectiveConfig(kind="flow")), "objective.kind=flow does not fit"),
        (lambda: build_task("mmdit", objective=ObjectiveConfig()), "objective.kind=ddpm does not fit"),
        (lambda: build_task("mmdit", network={"repa_depth": 1}), "belong together"),
        (lambda: build_task(objective=ObjectiveConfig(variance="fixed_small")), "does not fit model.learn_sigma=true"),
        (lambda: ObjectiveConfig(schedule="lineal"), "objective.schedule='lineal' is not known"),
        (lambda: ObjectiveConfig(predict="noise"), "objective.predict='noise'"),
        (lambda: ObjectiveConfig(time_std=0.0), "objective.time_std=0.0 must be positive"),
        (lambda: ObjectiveConfig(steps=0), "objective.steps=0 is too small"),
    ],
)
def test_options_that_do_not_fit_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
