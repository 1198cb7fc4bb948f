"""Runs of the generator: resumed ones, tests at intervals, bad data, datasets that do not influence each other."""

import json
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_weights
from common.errors import ConfigError, DataError
from common.tracking import read_records
from rpg.loading import load_generator
from rpg.testing import TesterSection
from rpg.training import prepare, run_training
from tests.rpg.tiny_run import plain_folder, run_config, task_folder, write_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_a_whole_one_bit_for_bit(tmp_path: Path, workers: int):
    folder = plain_folder(tmp_path / "checkpoints")
    data = {"num_workers": workers}
    run_training(run_config(tmp_path / "whole", folder, data=data))
    run_training(run_config(tmp_path / "cut", folder, data=data, training={"n_iters": 2}))
    run_training(run_config(tmp_path / "cut", folder, data=data))
    for ema in (False, True):
        expected, found = (load_weights(tmp_path / run, ema=ema)[0] for run in ("whole", "cut"))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_generation_beside_training_does_not_change_it(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    run_training(run_config(tmp_path / "alone", folder))
    run_training(run_config(tmp_path / "with", folder, training={"sample_freq": 1, "snapshot_freq": 2}))
    losses = [[r["train/loss"] for r in read_records(tmp_path / run)] for run in ("alone", "with")]
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "with" / "generated").glob("*.safetensors"))) == 4
    assert load_generator(tmp_path / "with" / "snapshots" / "step_2").model.config.num_states == 2


def test_accumulated_batches_equal_whole_ones_without_batch_statistics(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    for name, accum in (("whole", 1), ("halves", 2)):
        changes = {"model": {"norm": "group"}, "training": {"accum": accum}}
        run_training(run_config(tmp_path / name, folder, **changes))
    losses = [[r["train/loss"] for r in read_records(tmp_path / run)] for run in ("whole", "halves")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_recomputation_changes_neither_losses_nor_running_statistics(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    config = run_config(tmp_path / "plain", folder)
    run_training(config)
    from dataclasses import replace

    parallel = replace(config.parallel, activation_checkpointing=True)
    run_training(replace(config, run_dir=str(tmp_path / "recomputed"), parallel=parallel))
    expected, found = (load_weights(tmp_path / run)[0] for run in ("plain", "recomputed"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"head": "mse"}},
        {"model": {"stack": "lstm"}},
        {"model": {"stack": "gmlp", "prediction": "v", "min_snr_gamma": 5.0}},
        {"model": {"stack": "transformer", "num_heads": 2, "head_size": 4, "feedforward": 16}},
        {"model": {"post_d_model": 32, "trainable_positions": True, "prediction": "x0"}},
        {"training": {"states": "none", "stacking": "per_network"}},
        {"data": {"granularity": 0}, "model": {"positions": "1d"}},
        {"data": {"granularity": 2, "groups": "file", "normalisation": "residual"}},
    ],
)
def test_every_kind_of_generator_trains_and_is_exported(tmp_path: Path, changes: dict):
    folder = plain_folder(tmp_path / "checkpoints")
    changes.setdefault("training", {})["diffusion_batch"] = None
    done = run_training(run_config(tmp_path / "run", folder, **changes))
    losses = [r["train/loss"] for r in read_records(tmp_path / "run")]
    assert done.step == 4 and all(0 < loss < 1e3 for loss in losses)
    loaded = load_generator(tmp_path / "run")
    assert loaded.model.prototypes(torch.tensor([0]) if loaded.model.config.num_states else None).isfinite().all()


@pytest.mark.parametrize("condition", ["linear", "gated", "full"])
def test_conditional_generators_train_with_dropped_conditions(tmp_path: Path, condition: str):
    folder = task_folder(tmp_path / "checkpoints")
    model = {"condition": condition, "d_condition": 8} | ({"gate": ["last.*"]} if condition == "gated" else {})
    config = run_config(
        tmp_path / "run", folder, data={"condition": "class"}, model=model, sampling={"guidance": 1.5},
        training={"drop_condition": 0.5, "sample_freq": 2},
    )  # fmt: skip
    run_training(config)
    loaded = load_generator(tmp_path / "run")
    bits = torch.eye(10)[:2]
    prototypes = loaded.model.prototypes(None, bits)
    assert not torch.allclose(prototypes[0], prototypes[1])
    if condition == "gated":
        seen = loaded.model.to_condition_gate[0, :, 0].bool()
        names = [loaded.codec.tensor_names[int(index)] for index in loaded.codec.token_tensor_L]
        assert [name.startswith("last.") for name in names] == seen.tolist()
    drawn = sorted(path.name for path in (tmp_path / "run" / "generated").iterdir())
    assert len(drawn) == 2 and all("_class" in name for name in drawn)


def test_failing_tests_are_reported_and_do_not_end_the_run(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    program = "import sys, time; print('Loss: 0.5 | Acc: 0.75') if '2' in sys.argv[1].split('step_')[1] else 1 / 0"
    tester = TesterSection(kind="command", command=[sys.executable, "-c", program, "{path}"])
    config = run_config(tmp_path / "run", folder, data={"tester": tester}, training={"sample_freq": 2})
    assert run_training(config).step == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "tests.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    assert by_step[2]["accuracy"] == 0.75
    assert by_step[4]["accuracy"] is None and "exit code 1" in by_step[4]["error"]
    assert "ZeroDivisionError" in by_step[4]["output"]


def test_a_hanging_test_is_ended_and_reported(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    command = [sys.executable, "-c", "import time; time.sleep(60)", "{path}"]
    tester = TesterSection(kind="command", command=command, timeout_seconds=0.5)
    run_training(run_config(tmp_path / "run", folder, data={"tester": tester}, training={"sample_freq": 4}))
    line = json.loads((tmp_path / "run" / "tests.jsonl").read_text())
    assert line["accuracy"] is None and "0.5" in line["error"]


def test_checkpoints_that_differ_are_named_before_training(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    from rpg.checkpoint_files import write_checkpoint

    write_checkpoint(folder / "0009_acc0.9_seed0000_tiny.safetensors", {"first.weight": torch.ones(2, 2)})
    with pytest.raises(DataError, match=r"0009_acc0\.9_seed0000_tiny"):
        run_training(run_config(tmp_path / "run", folder))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_empty_folder_cannot_be_trained_on(tmp_path: Path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing"):
        run_training(run_config(tmp_path / "run", tmp_path / "nothing"))


def test_class_conditions_need_names_with_classes(tmp_path: Path):
    folder = plain_folder(tmp_path / "checkpoints")
    with pytest.raises(DataError, match="class"):
        prepare(run_config(tmp_path / "run", folder, data={"condition": "class"}, model={"condition": "full"}))
    with pytest.raises(ConfigError, match=r"data\.condition"):
        prepare(run_config(tmp_path / "run", folder, model={"condition": "full"}))


def test_runs_with_other_options_in_one_process_do_not_influence_each_other(tmp_path: Path):
    first, second = plain_folder(tmp_path / "a"), write_folder(tmp_path / "b", ["x.safetensors", "y.safetensors"], 5)
    alone = prepare(run_config(tmp_path / "run", first)).data.codec
    other = prepare(run_config(tmp_path / "run", second, data={"granularity": 2, "dim_per_token": 8})).data.codec
    again = prepare(run_config(tmp_path / "run", first)).data.codec
    assert (alone.num_tokens, alone.dim, alone.granularity) == (again.num_tokens, again.dim, again.granularity)
    assert (other.dim, other.granularity) == (8, 2)
