"""Runs of the hypernetwork: resumed ones, kinds of decoders and networks, the released scheme, bad options."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_weights
from common.errors import ConfigError
from common.tracking import read_records
from logah.architectures import vit
from logah.checkpoints import load_hypernetwork
from logah.prediction import fill
from logah.training import prepare, run_training
from tests.logah.tiny_training import run_config


def losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in read_records(run) if "train/loss" in record]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_a_whole_one_bit_for_bit(tmp_path: Path, workers: int):
    """Weights, their average and the rate of an epoch schedule; two epochs and two more against four."""
    options = {
        "data": {"num_workers": workers, "limit_train": 32},
        "optim": {"schedule": "cosine_epochs", "warmup": 2},
    }
    averaged = {"ema": True, "ema_rate": 0.5, "steps": None, "save_freq": 2}
    run_training(run_config(tmp_path / "whole", training=averaged | {"epochs": 4}, **options))
    # the schedule spans four epochs in both parts: the first is stopped by its number of steps
    first = run_config(tmp_path / "cut", training=averaged | {"epochs": 4}, **options)
    stopped = StopAt(4)
    run_training(first, hooks=[stopped])
    assert stopped.reached and len(losses(tmp_path / "cut")) < len(losses(tmp_path / "whole"))
    run_training(first)
    for ema in (False, True):
        expected, found = (load_weights(tmp_path / run, ema=ema)[0] for run in ("whole", "cut"))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


class StopAt:
    """Hook that stops a run after so many steps, as a signal would."""

    def __init__(self, step: int) -> None:
        self.every_steps, self.reached = step, False

    def __call__(self, state) -> None:
        self.reached = True
        state._run.stop.requested = True


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vision", {"model": {"decoder": "dense", "max_shape": 16}}),
        ("vision", {"model": {"decoder": "lowrank_v2"}}),
        ("vision", {"model": {"use_1d_decoder": True, "class_token_noise": 0.02}}),
        ("vision", {"model": {"graph_version": "v2", "attention": "as_is"}}),
        ("lm", {}),
        ("lm", {"nets": {"family": "llama"}, "model": {"normalisation": "fan_in"}}),
        ("lm", {"model": {"decoder": "lowrank_v2"}}),
    ],
)
def test_every_kind_trains_and_is_exported(tmp_path: Path, kind: str, changes: dict):
    done = run_training(run_config(tmp_path / "run", kind=kind, **changes))
    assert done.step == 4 and all(0 < loss < 50 for loss in losses(tmp_path / "run"))
    loaded = load_hypernetwork(tmp_path / "run")
    assert loaded.metadata["step"] == 4 and loaded.metadata["seed"] == 0
    assert loaded.config.variant == ("vision" if kind == "vision" else "llm")


def test_reference_scheme_trains_to_the_same_weights(tmp_path: Path):
    """Networks built with values, traced again and decoded in full: other time, same numbers."""
    run_training(run_config(tmp_path / "fast"))
    run_training(run_config(tmp_path / "slow", training={"scheme": "reference"}))
    assert losses(tmp_path / "slow") == pytest.approx(losses(tmp_path / "fast"), rel=1e-5)
    expected, found = (load_weights(tmp_path / run)[0] for run in ("fast", "slow"))
    for name, tensor in expected.items():
        if name.endswith("proj_e.2.bias"):  # without a gradient but for rounding
            continue
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_halves_of_a_meta_batch_equal_the_whole(tmp_path: Path):
    for name, accum in (("whole", 1), ("halves", 2)):
        run_training(run_config(tmp_path / name, training={"accum": accum}))
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_learning_on_digits_beats_chance_for_networks_never_seen(tmp_path: Path):
    """Chance is 0.10."""
    run_training(
        run_config(
            tmp_path / "run",
            model={"hid": 32, "layers": 2, "heads": 4, "lora_r": 16, "max_ck_lora": 1024, "max_shape": 512},
            data={"batch_size": 64, "limit_train": None, "limit_test": None},
            nets={"depths": (1,), "widths": (16, 24), "meta_batch": 1},
            optim={"lr": 3e-3, "schedule": "cosine", "warmup": 20},
            training={"steps": 150, "log_freq": 50, "save_freq": 1000, "valid_epoch": 20},
        )
    )
    assert read_records(tmp_path / "run")[-1]["valid/top1"] > 0.2


def test_tests_and_exports_between_epochs(tmp_path: Path):
    run_training(
        run_config(tmp_path / "run", training={"steps": None, "epochs": 2, "valid_epoch": 1, "interm_epoch": 2})
    )
    tested = [record["step"] for record in read_records(tmp_path / "run") if "valid/top1" in record]
    assert tested == [4, 8]
    assert sorted(path.name for path in (tmp_path / "run" / "epochs").iterdir()) == ["epoch_1", "epoch_2"]
    network = vit(2, 1, 2, 8, num_classes=10, image_size=8).build()
    report = fill(load_hypernetwork(tmp_path / "run" / "epochs" / "epoch_1").model, network)
    assert report.kept == ("class_token",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hid": 30}}, "model.hid=30 must be a multiple"),
        ({"model": {"max_shape": [1, 2, 3]}}, "must be 1, 2 or 4 sizes"),
        ({"model": {"lora_rank": 3}}, "model.lora_r"),
        ({"model": {"num_classes": 3}}, "follows from the data"),
        ({"nets": {"law": "gpts1k"}}, "draws networks of family gpt2"),
        ({"plan": "zero3"}, "parallel=zero3"),
        ({"training": {"label_smoothing": 0.1}, "kind": "lm"}, "data.kind=vision"),
        ({"nets": {"meta_batch": 3}, "training": {"accum": 2}}, "nets.meta_batch=3"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, **changes).trainer_config(1, 10)


def test_a_decoder_too_small_for_a_network_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model.max_ck_lora=20 is too small for .*reads \d+ rows"):
        run_training(run_config(tmp_path / "run", model={"max_ck_lora": 20}))


def test_equal_steps_read_equal_networks_and_data(tmp_path: Path):
    config = run_config(tmp_path)
    first, second = prepare(config), prepare(replace(config, run_dir=str(tmp_path / "other")))
    for step in range(3):
        assert [a.key for a in first.task.source.draw(step)] == [b.key for b in second.task.source.draw(step)]
        batches = [one.data.training_batch(step) for one in (first, second)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_loss_of_random_predictions_is_near_that_of_guessing(tmp_path: Path):
    run_training(run_config(tmp_path / "run", training={"steps": 1, "norm_penalty": 0.0}))
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(10), abs=1.5)
