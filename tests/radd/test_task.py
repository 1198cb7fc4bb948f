"""What RADD tells the engine: draws, sums, counts, groups; and that it learns English text."""

import pydoc_data.topics

import pytest
import torch

from common.checkpoint import load_weights
from common.config import OptimConfig
from common.optim import build_optimizer
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from radd.config import NoiseConfig, TrainConfig, TrainingConfig
from radd.losses import LOSS_TYPES, compute_loss
from radd.model import ModelConfig
from radd.task import RADDTask
from tests.radd.uneven_worker import train

MODEL = ModelConfig(hidden_size=32, n_blocks=2, n_heads=4, length=12, dropout=0.0)


def build_task(seed: int = 0, tokens: int = 19, model: ModelConfig = MODEL, noise: str = "loglinear", **training):
    training = TrainingConfig(**{"loss_type": "lambda_DCE", **training})
    return RADDTask(
        TrainConfig(seed=seed, tokens=tokens, model=model, training=training, noise=NoiseConfig(type=noise))
    )


def tokens_batch(rows: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 19, (rows, 12), generator=torch.Generator().manual_seed(seed))


def rows_of(draws: dict, rows: list[int]) -> dict:
    return {name: draw[rows] for name, draw in draws.items()} | {"rows": torch.tensor(rows)}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("loss_norm", ["tokens", "sequences"])
@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sum_over_micro_batches_over_counts_is_the_mean_loss(loss_type, loss_norm, noise):
    task = build_task(loss_type=loss_type, loss_norm=loss_norm, noise=noise)
    torch.manual_seed(0)
    model, x_BL = task.build_model(), tokens_batch()
    draws = task.draw(3, 6)
    total, count = 0.0, 0.0
    for rows in ([0, 1, 2], [3, 4, 5]):
        batch, part = {"tokens": x_BL[rows]}, rows_of(draws, rows)
        total += task.training_step(model, batch, part).loss_sum.item()
        count += task.count(batch, part)
    expected = compute_loss(loss_type, model, x_BL, draws, task.schedule).mean().item()
    assert total / count == pytest.approx(expected / (12 if loss_norm == "tokens" else 1), rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_draws_change_with_step_and_seed_and_validation_draws_are_fixed(loss_type):
    task, other = build_task(loss_type=loss_type), build_task(1, loss_type=loss_type)

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    assert same(task.draw(0, 8), task.draw(0, 8))
    assert not same(task.draw(0, 8), task.draw(1, 8))
    assert not same(task.draw(0, 8), other.draw(0, 8))
    assert same(task.validation_draw(2, 8), task.validation_draw(2, 8))
    assert not same(task.validation_draw(0, 8), task.draw(0, 8))
    assert all(len(draw) == 8 for draw in task.draw(0, 8).values())


def test_draws_leave_the_global_generator_alone():
    task = build_task()
    before = torch.get_rng_state()
    task.draw(0, 8)
    task.validation_draw(0, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_metrics_are_nats_per_token_and_shares():
    task = build_task(loss_norm="sequences")
    torch.manual_seed(0)
    output = task.training_step(task.build_model(), {"tokens": tokens_batch()}, task.draw(0, 6))
    means = {name: float(total) / weight for name, (total, weight) in output.metrics.items()}
    assert means["nats_per_token"] == pytest.approx(output.loss_sum.item() / 72)
    assert 0 < means["masked_share"] < 1
    assert means["masked_nll"] == pytest.approx(torch.tensor(19.0).log().item(), rel=1e-5)  # a fresh model is uniform
    assert all(not torch.as_tensor(total).requires_grad for total, _ in output.metrics.values())


def test_plain_decay_by_default_and_exempt_norms_on_request():
    model = build_task().build_model()
    groups = build_task().param_groups(model, 0.03)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(len(list(model.parameters())), 0.03)]
    decayed, plain = build_task(decay_exclude_norms=True).param_groups(model, 0.03)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".", 2)[-1] for p in decayed["params"]} == {
        *("attn_qkv.weight", "attn_out.weight", "mlp.0.weight", "mlp.2.weight", "weight"),
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.03, 0.0)


def test_operations_per_token_match_the_published_sizes():
    """Forward at length 1024: blocks 208 M and head 77 M per token for small, the head at half of the positions."""
    small = ModelConfig(hidden_size=768, n_blocks=12, n_heads=12, length=1024)
    task = build_task(tokens=50257, model=small)
    per_token = task.flops_per_sample(None) / 3 / 1024
    assert task.samples_to_tokens() == 1024
    assert per_token == pytest.approx(208e6 + 77e6 / 2 - 18 * 768**2 / 2, rel=5e-3)


def test_a_process_without_any_masked_token_does_not_stall_or_change_the_others(tmp_path, repo_root):
    """Two processes, one of which sees no mask in a step, against one process on the same global batches."""
    plans = ["ddp", "fsdp2"]
    train(tmp_path / "none", "none")
    run_torchrun(repo_root / "tests/radd/uneven_worker.py", 2, [tmp_path, *plans])
    expected, _ = load_weights(tmp_path / "none", ema=False)
    losses = [record["train/loss"] for record in read_records(tmp_path / "none")]
    for plan in plans:
        weights, _ = load_weights(tmp_path / plan, ema=False)
        assert [r["train/loss"] for r in read_records(tmp_path / plan)] == pytest.approx(losses, rel=1e-5), plan
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4, msg=f"{plan} {name}")


def test_a_tiny_model_learns_more_than_byte_frequencies():
    """A few seconds of training beat the entropy of single bytes (3.2 nats) on unseen pages of the language reference.

    The bound that k_DCE estimates counts nats per byte, so anything below the unigram entropy is use of context.
    """
    pages = [pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)]
    split = [[p for i, p in enumerate(pages) if (i % 10 == 5) is test] for test in (False, True)]
    train, test = (torch.tensor([min(byte, 127) for page in part for byte in [*page.encode(), 0]]) for part in split)
    length = 32
    train, test = (part[: len(part) // length * length].view(-1, length) for part in (train, test))
    frequency = (train.flatten().bincount(minlength=128) + 1).double()
    unigram = -(frequency / frequency.sum()).log()[test.flatten()].mean().item()

    model_config = ModelConfig(hidden_size=48, n_blocks=1, n_heads=2, length=length, dropout=0.0)
    task = build_task(tokens=128, model=model_config, loss_type="k_DCE", time_sampler="stratified")
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = build_optimizer(task.param_groups(model, 0.0), OptimConfig(lr=6e-3, beta2=0.98), torch.device("cpu"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    for step in range(450):
        batch = {"tokens": train[order[torch.arange(step * 32, (step + 1) * 32) % len(order)]]}
        draws = task.draw(step, 32)
        loss = task.training_step(model, batch, draws).loss_sum / task.count(batch, draws)
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min((step + 1) / 20, 1 - step / 470)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    held_out = {"tokens": test[:256]}
    with torch.no_grad():
        draws = task.validation_draw(0, 256)
        bound = task.validation_step(model, held_out, draws).loss_sum.item() / task.count(held_out, draws)
    assert bound < unigram - 0.1, f"bound {bound:.3f}, unigram {unigram:.3f} nats per byte; 2.99 and 3.25 were seen"
