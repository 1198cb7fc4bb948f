"""What adaptation tells the engine: draws, sums, counts and gradients; and that it is the reference's loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from common.testing.golden import load_cases
from diffullama.attention import anneal_ratio, annealed_allowed
from diffullama.config import ObjectiveConfig
from diffullama.losses import diffusion_loss
from diffullama.noise import sample_time
from diffullama.task import AdaptationTask
from tests.diffullama import golden_adapter
from tests.diffullama.tiny_models import MASK, VOCAB, rows, tiny_lm

LENGTH = 12


def build_task(family: str = "gpt2", *, seed: int = 0, opened: str | None = None, **objective) -> AdaptationTask:
    config = ObjectiveConfig(**{"anneal_steps": 1, **objective})
    task = AdaptationTask(
        lambda: tiny_lm(family, shift=config.shift).train(), config, seed=seed, length=LENGTH, opened_attention=opened
    )
    task.model = task.build_model()
    return task


def part(draws: dict, chosen: list[int]) -> dict:
    return {name: draw[chosen] for name, draw in draws.items()} | {"rows": torch.tensor(chosen)}


def pairs_batch(count: int = 4, given_tokens: int = 5) -> dict:
    src_mask = torch.zeros(count, LENGTH, dtype=torch.int64)
    src_mask[:, :given_tokens] = 1
    return {"tokens": rows(count, LENGTH), "src_mask": src_mask}


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("loss_norm", ["tokens", "masked"])
def test_value_and_gradient_are_those_of_the_loss_over_all_logits(family, shift, loss_norm):
    task = build_task(family, shift=shift, loss_norm=loss_norm, keep_first=False)
    batch, draws = {"tokens": rows(6, LENGTH)}, task.draw(0, 6) | {"rows": torch.arange(6)}
    gathered = task.training_step(task.model, batch, draws).loss_sum / task.count(batch, draws)
    gathered.backward()
    found = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    z_BL, drawn_BL, t_B = noised(batch["tokens"], draws)
    dense = diffusion_loss(task.model(z_BL), batch["tokens"], z_BL, t_B, MASK, shift, loss_norm, drawn_BL).loss
    dense.backward()
    assert gathered.item() == pytest.approx(dense.item(), rel=1e-6)
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=name)


def noised(x_BL: torch.Tensor, draws: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t_B = sample_time(draws["r"])
    drawn_BL = draws["u"] < t_B[:, None]
    return torch.where(drawn_BL, MASK, x_BL), drawn_BL, t_B


@pytest.mark.parametrize("name", ["loss_gpt2_shift", "loss_gpt2_sft", "loss_llama_shift", "loss_llama_sft_noshift"])
def test_the_step_computes_the_frozen_losses_of_the_reference(name, golden_dir, monkeypatch):
    """With its switches for parity, on the reference's own random numbers."""
    case = load_cases("diffullama", golden_dir)[name]
    x = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    raw = case.raw
    task = AdaptationTask(
        lambda: golden_adapter.build_model(raw, "sdpa").train(),
        ObjectiveConfig(
            stage="ddm-sft", shift=raw["shift"], loss_norm="masked", anneal_steps=raw["anneal_steps"], by_id=True,
            keep_first=False,
        ),
        seed=0,
        length=x["in_x"].shape[1],
    )  # fmt: skip
    allowed = annealed_allowed(x["in_ua"], anneal_ratio(raw["global_step"], raw["anneal_steps"]))
    monkeypatch.setattr(task, "_allowed", lambda draws, device: allowed)
    model, count = task.build_model(), len(x["in_x"])
    batch = {"tokens": x["in_x"], "src_mask": x["in_src_mask"]}
    draws = {
        "step": torch.full((count,), raw["global_step"]),
        "r": x["in_r"],
        "u": x["in_u"],
        "rows": torch.arange(count),
    }
    output = task.training_step(model, batch, draws)
    case.check("out_loss", output.loss_sum / task.count(batch, draws))
    total, masked = output.metrics["masked_nll"]
    case.check("out_unweighted_loss", total / masked)


@pytest.mark.parametrize("objective", [{"stage": "ddm"}, {"stage": "ddm", "loss_norm": "masked"}, {"stage": "pt"}])
def test_splitting_a_batch_changes_neither_sum_nor_count(objective):
    task = build_task(**objective)
    batch, draws = {"tokens": rows(6, LENGTH)}, task.draw(3, 6)
    sums, counts = [], []
    for chosen in ([0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5]):
        micro, mine = {"tokens": batch["tokens"][chosen]}, part(draws, chosen)
        sums.append(task.training_step(task.model, micro, mine).loss_sum.item())
        counts.append(task.count(micro, mine))
    assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-6)
    assert counts[0] == counts[1] + counts[2]


def test_edges_are_drawn_for_each_micro_batch_by_its_first_row_and_for_each_step():
    task = build_task(anneal_steps=10)
    device = torch.device("cpu")

    def edges(step: int, first: int) -> torch.Tensor:
        return task._allowed({"step": torch.full((2,), step), "rows": torch.tensor([first, first + 1])}, device)

    assert torch.equal(edges(3, 0), edges(3, 0))
    assert not torch.equal(edges(3, 0), edges(3, 2))
    assert not torch.equal(edges(3, 0), edges(4, 0))
    assert edges(3, 0).tril().sum() == LENGTH * (LENGTH + 1) // 2
    assert edges(9, 0) is None  # open from step anneal_steps - 1 on


def test_validation_attends_fully_at_every_step():
    task = build_task(anneal_steps=10**6)
    batch, draws = {"tokens": rows(4, LENGTH)}, task.validation_draw(0, 4) | {"rows": torch.arange(4)}
    z_BL, drawn_BL, t_B = noised(batch["tokens"], draws)
    drawn_BL[:, 0] = False  # stays clean
    z_BL[:, 0] = batch["tokens"][:, 0]
    dense = diffusion_loss(task.model(z_BL), batch["tokens"], z_BL, t_B, MASK, True, "tokens", drawn_BL).loss
    output = task.validation_step(task.model, batch, draws)
    assert output.loss_sum.item() / task.count(batch, draws) == pytest.approx(dense.item(), rel=1e-6)


def test_the_autoregressive_stage_is_next_token_prediction():
    task = build_task(stage="pt")
    x_BL = rows(4, LENGTH)
    draws = task.draw(0, 4) | {"rows": torch.arange(4)}
    found = task.training_step(task.model, {"tokens": x_BL}, draws).loss_sum / task.count({"tokens": x_BL}, draws)
    expected = task.model.hf(input_ids=x_BL, labels=x_BL, is_causal=True).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------- what is masked


@given(seed=st.integers(0, 1000), loss_norm=st.sampled_from(["tokens", "masked"]), by_id=st.booleans())
def test_given_tokens_are_never_masked_and_never_counted(seed, loss_norm, by_id):
    task = build_task(seed=seed, stage="ddm-sft", loss_norm=loss_norm, by_id=by_id)
    batch = pairs_batch()
    draws = task.draw(seed, 4) | {"rows": torch.arange(4)}
    z_BL, where_BL, _ = task._corrupt(batch, draws)
    given_BL = batch["src_mask"].bool()
    assert torch.equal(z_BL[given_BL], batch["tokens"][given_BL])
    assert not (where_BL & given_BL).any()
    assert task.count(batch, draws) <= 4 * (LENGTH - 5)


def test_a_batch_without_anything_to_predict_is_zero_with_zero_gradients():
    for objective in ({"stage": "ddm-sft"}, {"stage": "ddm-sft", "loss_norm": "masked"}, {"stage": "sft"}):
        task = build_task(**objective)
        batch, draws = pairs_batch(given_tokens=LENGTH), task.draw(0, 4) | {"rows": torch.arange(4)}
        output = task.training_step(task.model, batch, draws)
        output.loss_sum.backward()
        assert output.loss_sum.item() == 0
        assert task.count(batch, draws) == 0
        assert all(p.grad is not None and not p.grad.any() for p in task.model.parameters())


@pytest.mark.parametrize("shift", [True, False])
def test_the_first_position_stays_clean_only_where_it_has_no_prediction(shift):
    task = build_task(shift=shift)
    x_BL = rows(64, LENGTH)
    z_BL, where_BL, _ = task._corrupt({"tokens": x_BL}, task.draw(0, 64))
    assert torch.equal(z_BL[:, 0], x_BL[:, 0]) == shift
    assert bool(where_BL[:, 0].any()) == (not shift)
    released = build_task(shift=shift, keep_first=False)
    assert (released._corrupt({"tokens": x_BL}, released.draw(0, 64))[0][:, 0] == MASK).any()


def test_pairs_that_have_lost_their_prompt_mask_are_refused():
    task = build_task(stage="ddm-sft")
    with pytest.raises(DataError, match="needs src_mask in its batches"):
        task.training_step(task.model, {"tokens": rows(4, LENGTH)}, task.draw(0, 4) | {"rows": torch.arange(4)})


def test_clean_tokens_with_the_masks_id_have_a_loss_only_in_parity():
    x_BL = torch.full((4, LENGTH), MASK)
    counts = []
    for by_id in (False, True):
        task = build_task(by_id=by_id, loss_norm="masked")
        counts.append(task.count({"tokens": x_BL}, task.draw(0, 4)))
    assert counts[0] < counts[1] == 4 * (LENGTH - 1)


# ---------------------------------------------------------------- random numbers


def test_draws_depend_on_seed_and_step_and_times_are_stratified_over_the_global_batch():
    task = build_task()
    first, again, other = task.draw(5, 16), task.draw(5, 16), task.draw(6, 16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["u"], other["u"])
    assert not torch.equal(first["r"], build_task(seed=1).draw(5, 16)["r"])
    assert sorted((first["r"] * 16).long().tolist()) == list(range(16))
    assert torch.equal(task.validation_draw(0, 4)["u"], task.validation_draw(0, 4)["u"])
    assert not torch.equal(task.validation_draw(0, 4)["u"], task.draw(0, 4)["u"])
    independent = build_task(time_sampler="independent").draw(5, 16)["r"]
    assert sorted((independent * 16).long().tolist()) != list(range(16))


def test_nothing_uses_the_global_generator():
    task, before = build_task(anneal_steps=5), torch.get_rng_state()
    draws = task.draw(0, 4) | {"rows": torch.arange(4)}
    task.training_step(task.model, {"tokens": rows(4, LENGTH)}, draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_uniform_model_is_scored_log_v_per_token():
    """The weights 1/t make the expectation the bound itself: ln V for a model that knows nothing."""
    task = build_task(keep_first=False)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
    total, count = 0.0, 0.0
    for step in range(60):
        batch, draws = {"tokens": rows(64, LENGTH)}, task.draw(step, 64) | {"rows": torch.arange(64)}
        with torch.no_grad():
            total += task.training_step(task.model, batch, draws).loss_sum.item()
        count += task.count(batch, draws)
    assert total / count == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=0.01)


# ---------------------------------------------------------------- refusals, groups, costs


def test_a_model_that_does_not_fit_the_objective_is_refused():
    with pytest.raises(ConfigError, match=r"objective.shift=False, but the model has shift=True"):
        AdaptationTask(lambda: tiny_lm(), ObjectiveConfig(shift=False), seed=0, length=LENGTH).build_model()
    with pytest.raises(ConfigError, match=r"model.length=65 exceeds the model's 64 positions"):
        AdaptationTask(lambda: tiny_lm(), ObjectiveConfig(), seed=0, length=65).build_model()
    AdaptationTask(lambda: tiny_lm("llama"), ObjectiveConfig(), seed=0, length=65).build_model()  # rotary


def test_attention_changes_to_another_backend_once_it_is_open():
    task = build_task(anneal_steps=2, opened="eager")
    batch = {"tokens": rows(2, LENGTH)}
    seen = []
    for step in range(3):
        draws = task.draw(step, 2) | {"rows": torch.arange(2)}
        task.training_step(task.model, batch, draws)
        seen.append(task.model.config._attn_implementation)
    assert seen == ["sdpa", "eager", "eager"]


def test_norms_and_biases_are_not_decayed():
    task = build_task("llama")
    decayed, plain = task.param_groups(task.model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(task.model.parameters()))


def test_operations_of_gpt2_small_match_the_specification():
    """Forward per token: 77 MFLOP for the head of 248, half of the head saved."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from diffullama.model import DiffusionLM

    with torch.device("meta"):
        model = DiffusionLM(GPT2LMHeadModel(GPT2Config()), 10541)
    task = AdaptationTask(lambda: model, ObjectiveConfig(), seed=0, length=1024)
    attention = 4 * 1024 * 768 * 12
    assert task.flops_per_sample(model) / 3 / 1024 == pytest.approx(248e6 - 77e6 / 2 + attention, rel=0.01)
    assert task.samples_to_tokens() == 1024
