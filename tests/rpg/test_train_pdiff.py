"""The commands of the baselines: both stages, resuming, generation, refusals, estimates."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.checkpoint import load_weights
from common.conversion import from_config
from common.errors import CheckpointError, ConfigError, DataError
from common.tracking import read_records as read_metrics
from rpg import generate_pdiff, train_pdiff
from rpg.checkpoint_files import read_checkpoint, read_metadata, write_checkpoint
from rpg.generated_files import read_records
from rpg.pdiff_config import PdiffGenerateConfig, PdiffTrainConfig
from rpg.pdiff_saving import load_pdiff
from rpg.pdiff_task import VectorDiffusionTask
from rpg.testing import PythonTester
from tests.rpg.tiny_generator import TinyNet, networks

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "rpg"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("compare_pdiff_*.yaml"))
TINY = (
    "parallel=none", "precision=fp32", "tracking.progress=false", "data.dim_per_token=32", "data.tester.kind=python",
    "data.tester.target=tests.rpg.test_train_pdiff:SumTester", "model.channels=[1,4,8,4,1]", "model.kernel_size=3",
    "model.diffusion_steps=20", "model.vae.channels=[4,8]", "model.vae.divide=8", "model.vae.d_latent=8",
    "sampling.steps=3", "sampling.num_generated=3", "training.log_freq=1", "training.save_freq=2",
    "vae_training.n_iters=3", "vae_training.log_freq=1",
)  # fmt: skip


class SumTester(PythonTester):
    """Loads the network with ``strict=True`` and answers by the signs of a few weights."""

    def logits(self, state: dict, *, task: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        TinyNet().load_state_dict(state, strict=True)
        return state["head.weight"][:, :2], torch.zeros(16, dtype=torch.int64)


def build(*overrides: str, name: str = "train_pdiff", kind: type = PdiffTrainConfig):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = compose(name, overrides=list(overrides))
    return from_config(kind, OmegaConf.to_container(composed, resolve=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "networks"
    for number, state in enumerate(networks(5)):
        write_checkpoint(folder / f"{number:04d}_tiny.pth", state)
    return folder


def train(checkpoints: Path, run_dir: Path, steps: int, *overrides: str) -> int:
    config = build(
        *TINY, f"data.checkpoints={checkpoints}", f"run_dir={run_dir}", f"training.n_iters={steps}", *overrides
    )
    return train_pdiff.train(config)


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("train") / "run"
    assert train(checkpoints, run_dir, 4, "model.kind=pdiff_vae", "training.sample_freq=2") == 0
    return run_dir


def test_a_run_leaves_both_stages_and_tested_networks_that_load_strictly(finished):
    assert [record["step"] for record in read_metrics(finished / "vae")] == [1, 2, 3]
    assert [record["step"] for record in read_metrics(finished)] == [1, 2, 3, 4]
    records = read_records(finished / "generated")
    assert [record["file"] for record in records] == [f"generated_pdiff_{number:03d}.pth" for number in (1, 2, 3)]
    assert all(0 <= record["accuracy"] <= 1 for record in records)
    state = read_checkpoint(finished / "generated" / "generated_pdiff_001.pth")
    TinyNet().load_state_dict(state, strict=True)
    assert state["head.weight"].data_ptr() == state["tied.weight"].data_ptr()
    facts = read_metadata(finished / "generated" / "generated_pdiff_001.pth")
    assert facts["seed"] == 0
    assert len(facts["generator_sha256"]) == 64
    tests = [json.loads(line) for line in (finished / "tests.jsonl").read_text().splitlines()]
    assert [test["step"] for test in tests] == [2, 4]


def test_the_export_holds_the_averaged_weights_of_both_stages(finished):
    loaded = load_pdiff(finished)
    for name, folder in (("vae", finished / "vae"), ("diffusion", finished)):
        expected = load_weights(folder)[0]
        found = getattr(loaded.model, name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert float(loaded.model.latent.std[0]) != 1.0, "latents are standardised"


def test_the_same_command_after_the_end_repeats_nothing(finished, checkpoints):
    before = {path: path.stat().st_mtime_ns for path in (finished / "generated").iterdir()}
    assert train(checkpoints, finished, 4, "model.kind=pdiff_vae", "training.sample_freq=2") == 0
    assert {path: path.stat().st_mtime_ns for path in (finished / "generated").iterdir()} == before


@pytest.mark.parametrize("kind", ["pdiff", "pdiff_vae"])
def test_a_run_that_was_killed_continues_bit_for_bit(checkpoints, tmp_path, monkeypatch, kind: str):
    overrides = (f"model.kind={kind}", "sampling.num_generated=0", "data.fill_value=nan")
    assert train(checkpoints, tmp_path / "whole", 4, *overrides) == 0
    step = VectorDiffusionTask.training_step

    def killed(self, model, batch, draws):
        killed.calls += 1
        if killed.calls == 4:
            raise KeyboardInterrupt
        return step(self, model, batch, draws)

    killed.calls = 0
    monkeypatch.setattr(VectorDiffusionTask, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(checkpoints, tmp_path / "cut", 4, *overrides)
    monkeypatch.setattr(VectorDiffusionTask, "training_step", step)
    assert train(checkpoints, tmp_path / "cut", 4, *overrides) == 0
    expected, found = (load_weights(tmp_path / run, ema=False)[0] for run in ("whole", "cut"))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_autoencoder_alone_generates_from_standard_normal_latents(checkpoints, tmp_path):
    assert train(checkpoints, tmp_path / "run", 2, "model.kind=vae", "model.vae.use_variance=true") == 0
    assert not (tmp_path / "run" / "vae").exists()
    assert len(read_records(tmp_path / "run" / "generated")) == 3


def test_more_networks_are_drawn_from_a_run_and_none_is_replaced(finished, tmp_path):
    def generate(*overrides: str) -> int:
        options = (f"generator={finished}", f"output={tmp_path / 'more'}", "sampling.steps=3", "precision=fp32")
        return generate_pdiff.generate(build(*options, *overrides, name="generate_pdiff", kind=PdiffGenerateConfig))

    assert generate("num_generated=3", "batch_size=2") == 0
    for number in (1, 2, 3):
        file = f"generated_pdiff_{number:03d}.pth"
        expected, found = (read_checkpoint(folder / file) for folder in (finished / "generated", tmp_path / "more"))
        assert all(torch.allclose(value, found[name], rtol=1e-4, atol=1e-5) for name, value in expected.items())
    with pytest.raises(CheckpointError, match="append=true"):
        generate("num_generated=1")
    assert generate("num_generated=1", "append=true", "sampling.kind=ddpm") == 0
    assert len(read_records(tmp_path / "more")) == 4


def test_bad_input_is_named_before_training(checkpoints, tmp_path):
    for overrides, message in (
        (("data.granularity=1",), "data.granularity=1 cuts tensors"),
        (("sampling.steps=30",), "sampling.steps=30 must lie in 1..20"),
        (("optim=adamw8bit", "parallel=fsdp2"), "AdamW8bit"),
        (("training.batch_size=0",), "training.batch_size=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(checkpoints, tmp_path / "run", 2, *overrides)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        train(tmp_path / "empty", tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match="holds no baseline"):
        load_pdiff(tmp_path / "empty")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_comparisons_of_the_paper_compose(experiment: str):
    config = build(f"experiment={experiment}")
    assert (config.optim.schedule, config.optim.grad_clip, config.training.ema) == ("cosine_lagged", -1, None)
    assert config.sampling.kind == "ddpm"
    assert config.model.channels == (1, 64, 128, 256, 512, 256, 128, 64, 1)
    assert config.model.has_vae == experiment.endswith("_vae")


def test_a_comparison_is_estimated_without_checkpoints(capsys):
    config = build("experiment=compare_pdiff_cnnmedium_vae", "dry_run=true", "ngpus=1", "parallel=none")
    assert train_pdiff.train(config) == 0
    printed = capsys.readouterr()
    assert "networks of 10,853 values, as one vector of 10,880" in printed.err
    assert printed.out.count("estimated memory per process") == 2, "one table per stage"


def test_an_8bit_optimizer_trains_and_resumes_bit_for_bit(checkpoints, tmp_path):
    overrides = ("model.kind=pdiff", "optim=adamw8bit", "optim.schedule=constant", "sampling.num_generated=0")
    assert train(checkpoints, tmp_path / "whole", 4, *overrides) == 0
    assert train(checkpoints, tmp_path / "cut", 2, *overrides) == 0
    assert train(checkpoints, tmp_path / "cut", 4, *overrides, "allow_config_change=true") == 0
    expected, found = (load_weights(tmp_path / run, ema=False)[0] for run in ("whole", "cut"))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
