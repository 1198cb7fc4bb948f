"""The training loop: exact accumulation, clipping, validation, hooks, losses that are not finite."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import load_weights
from common.config import BatchConfig, CheckpointConfig, OptimConfig
from common.nonfinite import LONGEST_STREAK, NonFiniteError
from common.optim import learning_rate
from common.task import StepOutput
from common.testing.tiny_task import TinyTask, TinyValidation, tiny_config, tiny_loader
from common.tracking import read_records
from common.trainer import FitResult, TrainState, fit

RARELY = CheckpointConfig(interval_steps=1000)


def train(run_dir: Path, *, task: TinyTask | None = None, hooks: tuple = (), **changes) -> FitResult:
    config = tiny_config(run_dir, **changes)
    return fit(
        task or TinyTask(), config, train_loader=tiny_loader(config), validation_loader=TinyValidation(), hooks=hooks
    )


def weights(run_dir: Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    return load_weights(run_dir, ema=ema)[0]


def assert_close(left: Path, right: Path, **tolerance: float) -> None:
    a, b = weights(left), weights(right)
    for name in b:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


@pytest.mark.parametrize("micro_size", [1, 4, 8])
def test_accumulation_equals_one_large_batch_with_uneven_counts(tmp_path: Path, micro_size: int):
    train(tmp_path / "two", batch=BatchConfig(global_size=8, micro_size=2))
    train(tmp_path / "other", batch=BatchConfig(global_size=8, micro_size=micro_size))
    assert_close(tmp_path / "other", tmp_path / "two")


def bare_loop(steps: int) -> tuple[list[float], list[float], dict, dict]:
    """The first steps of the tiny run as a researcher would write them: losses, norms, weights, averaged weights."""
    from common.seeding import derive_seed

    config, task = tiny_config("unused", batch=BatchConfig(global_size=8, micro_size=8)), TinyTask()
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = task.build_model()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches, losses, norms = iter(tiny_loader(config)), [], []
    for step in range(steps):
        batch, draws = next(batches), task.draw(step, 8)
        loss = task.training_step(model, batch, draws).loss_sum / task.count(batch, draws)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, optim, config.total_steps)
        optimizer.step()
        decay = min(config.ema_decay, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            average[name] -= (1 - decay) * (average[name] - p.detach())
        losses.append(loss.item())
    return losses, norms, model.state_dict(), average


def test_run_equals_the_loop_a_researcher_would_write(tmp_path: Path):
    losses, norms, expected, average = bare_loop(6)
    train(tmp_path, log_interval_steps=1)
    records = read_records(tmp_path)
    assert [r["train/loss"] for r in records] == pytest.approx(losses, rel=1e-5)
    assert [r["train/grad_norm"] for r in records] == pytest.approx(norms, rel=1e-5)
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    for name, value in average.items():
        torch.testing.assert_close(weights(tmp_path, ema=True)[name], value, rtol=1e-5, atol=1e-6)


def test_logged_loss_is_the_mean_over_everything_since_the_last_log(tmp_path: Path):
    train(tmp_path / "each", log_interval_steps=1)
    train(tmp_path / "third", log_interval_steps=3)
    counts = [float(TinyTask().draw(step, 8)["where"].sum()) for step in range(6)]
    losses = [r["train/loss"] for r in read_records(tmp_path / "each")]
    expected = [
        sum(loss * n for loss, n in zip(losses[i : i + 3], counts[i : i + 3])) / sum(counts[i : i + 3]) for i in (0, 3)
    ]
    assert [r["train/loss"] for r in read_records(tmp_path / "third")] == pytest.approx(expected)


def test_log_holds_what_a_reader_of_the_run_needs(tmp_path: Path):
    train(tmp_path, validate_interval_steps=3)
    records = read_records(tmp_path)
    assert [r["step"] for r in records] == [3, 6]
    assert records[0].keys() >= {
        "train/loss", "train/masked", "train/lr", "train/grad_norm", "throughput/samples_per_second",
        "throughput/tokens_per_second", "throughput/mfu", "memory/peak_gb", "validation/loss", "validation/masked",
    }  # fmt: skip


def test_negative_clip_disables_clipping(tmp_path: Path):
    def with_clip(clip: float) -> OptimConfig:
        return OptimConfig(lr=1e-2, warmup=3, grad_clip=clip)

    train(tmp_path / "off", optim=with_clip(-1.0))
    train(tmp_path / "loose", optim=with_clip(1e9))
    train(tmp_path / "tight", optim=with_clip(1e-4))
    assert_close(tmp_path / "off", tmp_path / "loose", rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "off", tmp_path / "tight")


def test_same_command_gives_the_same_bits(tmp_path: Path):
    for name in ("a", "b"):
        train(tmp_path / name, task=TinyTask(dropout=0.3))
    assert_close(tmp_path / "a", tmp_path / "b", rtol=0, atol=0)


class Sampling:
    """A hook that uses random numbers and the averaged model."""

    at_end = True

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self.steps: list[int] = []

    def __call__(self, state: TrainState) -> dict[str, float]:
        self.steps.append(state.step)
        with state.eval_model() as model:
            assert not model.training
            self.seen = {name: p.detach().clone() for name, p in model.named_parameters()}
            return {"sample/mean": model(torch.randn(4, 8)).mean().item()}


def test_hooks_run_on_time_and_validation_and_hooks_leave_training_alone(tmp_path: Path):
    hook = Sampling(4)
    train(tmp_path / "plain", task=TinyTask(dropout=0.3))
    train(tmp_path / "watched", task=TinyTask(dropout=0.3), hooks=(hook,), validate_interval_steps=1)
    assert hook.steps == [4, 6]
    assert_close(tmp_path / "watched", tmp_path / "plain", rtol=0, atol=0)
    logged = {r["step"]: r for r in read_records(tmp_path / "watched")}
    assert [step for step in logged if "sample/mean" in logged[step]] == [4, 6]


def test_hooks_see_the_averaged_weights(tmp_path: Path):
    hook = Sampling(6)
    train(tmp_path, hooks=(hook,))
    average = weights(tmp_path, ema=True)
    assert all(torch.equal(value, average[name]) for name, value in hook.seen.items())
    assert not torch.equal(hook.seen["head.weight"], weights(tmp_path)["head.weight"])


def test_validation_scores_the_averaged_weights_with_fixed_draws(tmp_path: Path):
    result = train(tmp_path, validate_interval_steps=6)
    task, total, count = TinyTask(), 0.0, 0.0
    model = task.build_model()
    model.load_state_dict(weights(tmp_path, ema=True))
    for index, batch in TinyValidation().batches(0, 1):
        draws = task.validation_draw(index, 4)
        total += task.training_step(model, batch, draws).loss_sum.item()
        count += task.count(batch, draws)
    assert result.metrics["validation/loss"] == pytest.approx(total / count, rel=1e-6)


def test_run_without_average_validates_the_weights_themselves(tmp_path: Path):
    result = train(tmp_path, validate_interval_steps=6, ema_decay=None)
    assert result.metrics["validation/loss"] > 0
    assert not list(tmp_path.rglob("ema.safetensors"))


def test_step_with_nothing_to_predict_is_harmless(tmp_path: Path):
    class Nothing(TinyTask):
        def draw(self, step: int, size: int):
            draws = super().draw(step, size)
            return draws | {"where": torch.zeros_like(draws["where"])} if step == 2 else draws

    train(tmp_path, task=Nothing(), log_interval_steps=1, optim=OptimConfig(lr=1e-2))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    assert "train/loss" not in read_records(tmp_path)[2]


def test_loss_that_is_not_finite_stops_naming_step_and_rows(tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"step 4: the loss of rows 0-1 of the global batch.*nonfinite=skip"):
        train(tmp_path, task=TinyTask(poison_step=3))
    name = tmp_path / "nonfinite" / "step_00000004_rank_00000"
    assert json.loads(name.with_suffix(".json").read_text())["step"] == 4
    kept = load_file(name.with_suffix(".safetensors"))
    assert kept["0.draws.rows"].tolist() == [0, 1]
    assert kept["0.batch.x"].shape == (2, 8)


def test_skipped_step_changes_nothing_but_the_count(tmp_path: Path, caplog):
    class Idle(Sampling):
        def __call__(self, state: TrainState) -> dict[str, float]:
            super().__call__(state)
            self.history = [*getattr(self, "history", []), self.seen]
            return {}

    hook = Idle(1)
    with caplog.at_level(logging.WARNING):
        result = train(tmp_path, task=TinyTask(poison_step=3), hooks=(hook,), nonfinite="skip")
    assert "step 4" in caplog.text
    assert result.metrics["train/skipped_steps"] == 1
    before, after, later = hook.history[2], hook.history[3], hook.history[4]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["head.weight"], later["head.weight"])
    assert all(r["train/loss"] is not None for r in read_records(tmp_path))


def test_gradient_that_is_not_finite_under_a_finite_loss_is_caught(tmp_path: Path):
    class Steep(TinyTask):
        def training_step(self, model, batch, draws) -> StepOutput:
            output = super().training_step(model, batch, draws)
            zero = next(model.parameters()).sum() * 0
            return StepOutput(output.loss_sum + zero.sqrt())  # derivative of the root at 0 is infinite

    with pytest.raises(NonFiniteError, match="step 1: the gradient norm"):
        train(tmp_path, task=Steep())


def test_endless_skipping_ends(tmp_path: Path):
    class Broken(TinyTask):
        def draw(self, step: int, size: int):
            return super().draw(step, size) | {"poison": torch.full((size,), float("nan"))}

    with pytest.raises(NonFiniteError, match=f"{LONGEST_STREAK} steps in a row"):
        train(tmp_path, task=Broken(), nonfinite="skip", total_steps=LONGEST_STREAK + 10, checkpoint=RARELY)


def test_float16_overflow_shrinks_the_scale_without_alarm(tmp_path: Path):
    class Large(TinyTask):
        def training_step(self, model, batch, draws) -> StepOutput:
            output = super().training_step(model, batch, draws)
            return StepOutput(output.loss_sum * 1000)

    result = train(tmp_path, task=Large(), precision="fp16", total_steps=12)
    assert result.metrics["train/loss_scale"] < 2.0**16
    assert "train/skipped_steps" not in result.metrics
    assert not (tmp_path / "nonfinite").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_close_to_float32(tmp_path: Path, precision: str):
    for name in ("fp32", precision):
        train(tmp_path / name, total_steps=40, log_interval_steps=10, precision=name, checkpoint=RARELY)
    expected, got = (read_records(tmp_path / name)[-1]["train/loss"] for name in ("fp32", precision))
    assert got == pytest.approx(expected, rel=0.1)  # float16 loses its first steps while the scale comes down


def test_task_learns(tmp_path: Path):
    result = train(
        tmp_path, total_steps=200, log_interval_steps=20, checkpoint=RARELY,
        optim=OptimConfig(lr=1e-2, warmup=10, schedule="wsd"), batch=BatchConfig(global_size=32, micro_size=32),
    )  # fmt: skip
    first = read_records(tmp_path)[0]["train/loss"]
    assert result.metrics["train/loss"] < 0.5 * first
