"""Training from several starts: continued where it stopped, compared fairly, refused with a reason."""

import json
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from common.testing.distributed import run_torchrun
from logah import finetune as command
from logah.architectures import resolve_target
from logah.finetune_config import FinetuneConfig
from logah.finetuning import finetune
from logah.prediction_folder import load_prediction
from tests.logah.finetune_worker import train
from tests.logah.tiny_finetune import TARGET, finetune_config, write_hypernetwork

PLANS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def hypernetwork(tmp_path_factory) -> str:
    return write_hypernetwork(tmp_path_factory.mktemp("hypernetwork") / "vision")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, hypernetwork):
    """Two starts, two seeds, two rates."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    inits = ["random", f"logah@hypernetwork:{hypernetwork}"]
    config = finetune_config(folder, inits=inits, seeds=[0, 1], lrs=[1e-2, 3e-2])
    return folder, config, finetune(config)


def test_every_start_is_trained_with_every_seed_and_rate(compared):
    folder, _, found = compared
    assert len(found.runs) == 8 and not found.stopped_early
    for run in found.runs:
        assert [step for step, _ in run.points] == [0, 3, 6]
        assert run.test["top1"] == pytest.approx(run.points[-1][1]["top1"])
        assert run.test["top1_se"] > 0
    before = {(run.key.start.label, run.key.seed): run.points[0][1]["loss"] for run in found.runs}
    # a prediction does not depend on the seed, random weights do
    assert before["logah", 0] == before["logah", 1] and before["random", 0] != before["logah", 0]
    results = json.loads((folder / "results.json").read_text())["values"]
    assert len(results["runs"]) == 8 and results["seed"] == 0
    table = (folder / "comparison.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["start", "random", "logah"]
    assert len((folder / "runs.csv").read_text().splitlines()) == 1 + 8 * 3
    assert {"curves.png", "section.html", "rates.csv"} <= {path.name for path in folder.iterdir()}


def test_trained_networks_are_exported_and_can_be_started_from(compared, tmp_path):
    folder, _, found = compared
    run = found.runs[0]
    trained = load_prediction(folder / "runs" / run.key.folder / "export")
    inits = [f"prediction:{folder / 'runs' / run.key.folder}"]
    again = finetune(finetune_config(tmp_path, inits=inits, training={"steps": 1, "evaluate_steps": 1}))
    assert again.runs[0].points[0][1]["loss"] == pytest.approx(run.points[-1][1]["loss"], rel=1e-5)
    assert trained.heads.head.weight.abs().sum() > 0


def test_the_same_command_only_adds_what_is_missing(compared):
    folder, config, found = compared
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoints/*/manifest.json")}
    more = finetune(FinetuneConfig(**vars(config) | {"seeds": [0, 1, 2], "lrs": [1e-2]}))
    assert len(more.runs) == 6 and times
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    before = {run.key: run.points for run in found.runs}
    assert all(run.points == before[run.key] for run in more.runs if run.key in before)


def test_a_run_that_was_cut_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    whole = finetune(finetune_config(tmp_path / "whole", training={"mixup": 0.5, "cutmix": 1.0}))
    from common import trainer

    steps = []
    take_step = trainer.Run._optimizer_step

    def stop_after_four(self, batches):
        steps.append(self.step)
        values, _ = take_step(self, batches)
        return values, self.step == 4

    cut = finetune_config(tmp_path / "cut", training={"mixup": 0.5, "cutmix": 1.0})
    monkeypatch.setattr(trainer.Run, "_optimizer_step", stop_after_four)
    assert finetune(cut).stopped_early and (tmp_path / "cut" / "REQUEUE").is_file()
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.undo()
    found = finetune(cut)
    assert found.runs[0].points == whole.runs[0].points and steps == [0, 1, 2, 3]
    assert not (tmp_path / "cut" / "REQUEUE").exists()
    exports = [
        load_prediction(tmp_path / run / "runs/random-seed0-lr0.01/export").state_dict() for run in ("whole", "cut")
    ]
    assert all(torch.equal(exports[1][name], value) for name, value in exports[0].items())


def test_a_run_of_another_network_in_the_same_folder_is_refused(compared):
    _, config, _ = compared
    other = FinetuneConfig(**vars(config) | {"target": TARGET | {"hidden_dim": 12}})
    with pytest.raises(CheckpointError, match="hidden_dim"):
        finetune(other)


def test_a_diverged_rate_is_reported_and_not_chosen(tmp_path):
    with torch.random.fork_rng():
        found = finetune(finetune_config(tmp_path, lrs=[1e-2, 1e30], training={"final_test": False, "export": False}))
    assert [run.diverged for run in found.runs] == [False, True]
    row = (tmp_path / "comparison.csv").read_text().splitlines()[1].split(",")
    assert row[:3] == ["random", "0.01", "1"]
    assert "Diverged" in (tmp_path / "section.html").read_text()


def test_starts_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path, hypernetwork):
    inits = ["random", "prediction:nowhere"]
    with pytest.raises(CheckpointError, match="nowhere"):
        finetune(finetune_config(tmp_path, inits=inits))
    assert not (tmp_path / "runs").exists()
    language = {"family": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(ConfigError, match="language model, data.kind=vision"):
        finetune(finetune_config(tmp_path, target=language))
    with pytest.raises(ConfigError, match="data.batch_size=16 cannot be shared out evenly"):
        finetune(finetune_config(tmp_path, training={"accum": 3}))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="of something else"):
        finetune(finetune_config(tmp_path))


def test_options_that_contradict_the_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="training.mixup=0.2 is for images"):
        finetune_config(tmp_path, data={"kind": "lm", "name": "embedded:topics"}, training={"mixup": 0.2})
    with pytest.raises(ConfigError, match=r"seeds=\[1, 1\]"):
        finetune_config(tmp_path, seeds=[1, 1])


def test_text_is_trained_with_tied_weights_and_perplexity(tmp_path):
    target = {"family": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 16,
              "tie_word_embeddings": True}  # fmt: skip
    data = {"kind": "lm", "name": "embedded:topics", "tokenizer": "bpe:300", "block_size": 16, "batch_size": 4,
            "cache_dir": None, "limit_train": 64, "limit_test": 16}  # fmt: skip
    source = write_hypernetwork(tmp_path / "llm", "llm")
    inits = ["random", f"logah@hypernetwork:{source}"]
    found = finetune(finetune_config(tmp_path / "run", target=target, data=data, inits=inits))
    for run in found.runs:
        assert run.points[-1][1]["loss"] < run.points[0][1]["loss"] < 7
        assert run.points[-1][1]["perplexity"] == pytest.approx(run.test["perplexity"], rel=1e-4)
        trained = load_prediction(tmp_path / "run" / "runs" / run.key.folder / "export")
        assert trained.lm_head.weight is trained.transformer.wte.weight


def test_the_command_line_trains_and_shows_costs(tmp_path, monkeypatch, capsys):
    arguments = [
        "finetune", f"run_dir={tmp_path / 'run'}", "target.num_layers=1", "target.hidden_dim=8", "target.num_heads=2",
        "data.limit_train=32", "data.limit_test=20", "data.batch_size=16", "training.epochs=1", "parallel=none",
        "tracking.progress=false",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*arguments, "dry_run=true"])
    assert command.main() == 0
    shown = capsys.readouterr()
    assert "1 trainings of 2 steps" in shown.err and not (tmp_path / "run").exists()
    monkeypatch.setattr("sys.argv", arguments)
    assert command.main() == 0
    assert "best lr" in capsys.readouterr().out and (tmp_path / "run" / "results.json").is_file()


def test_recipes_name_networks_that_exist(repo_root: Path):
    from omegaconf import OmegaConf

    recipes = sorted((repo_root / "configs/logah/recipe").glob("*.yaml"))
    assert len(recipes) >= 6
    for path in recipes:
        target = OmegaConf.to_container(OmegaConf.load(path))["target"]
        assert resolve_target(target).kind == ("lm" if path.stem.startswith(("gpt2", "llama")) else "vision")


def assert_same_trainings(tmp_path: Path, plans: tuple[str, ...]) -> None:
    """Against the run ``none``: scores before, during and after training."""
    expected = json.loads((tmp_path / "none" / "results.json").read_text())["values"]["runs"]
    for plan in plans:
        found = json.loads((tmp_path / plan / "results.json").read_text())["values"]["runs"]
        for wanted, run in zip(expected, found, strict=True):
            for point, other in zip(wanted["points"], run["points"], strict=True):
                assert other["loss"] == pytest.approx(point["loss"], rel=1e-4), f"{plan} {run['start']}"
            assert run["test"]["loss"] == pytest.approx(wanted["test"]["loss"], rel=1e-4), plan


def test_two_processes_train_and_score_as_one(tmp_path, repo_root, hypernetwork):
    """One test, so that the runs of two processes are started once."""
    train(tmp_path, "none", hypernetwork)
    run_torchrun(repo_root / "tests/logah/finetune_worker.py", 2, [tmp_path, hypernetwork, *PLANS])
    assert_same_trainings(tmp_path, PLANS)


@pytest.mark.slow  # DeepSpeed takes most of its seconds to be imported
def test_two_processes_of_deepspeed_train_and_score_as_one(tmp_path, repo_root, hypernetwork):
    train(tmp_path, "none", hypernetwork)
    run_torchrun(repo_root / "tests/logah/finetune_worker.py", 2, [tmp_path, hypernetwork, "zero2"])
    assert_same_trainings(tmp_path, ("zero2",))
