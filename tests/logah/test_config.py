"""Options of training: every experiment of the papers, published sizes on the meta device."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.config import OptimConfig
from common.conversion import from_config
from common.optim import learning_rate
from logah.architecture_config import NetsSection
from logah.config import DATA_DECIDES, TrainConfig, TrainingConfig
from logah.meta_learner import MetaLearner
from logah.model_config import HyperNetworkConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "logah"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
CLASSES = {"cifar100": 100, "imagenet": 1000}
SIZES = {  # parameters, with the classes of the data
    "cifar100_tiny": 2_540_380,
    "cifar100_small": 21_412_794,
    "cifar100_base": 78_231_892,
    "cifar100_large": 289_423_316,
    "imagenet_ghn3_t": 6_906_632,
    "imagenet_ghn3_s": 35_810_368,
    "imagenet_ghn3_l": 214_668_960,
    "imagenet_ghn3_xl": 654_365_184,
    "wikitext2_gpt2_tiny": 2_540_620,
    "wikitext103_llama_tiny": 5_784_652,
    "digits_minutes": 264_432,
    "text_minutes": 264_552,
}


def build(*overrides: str) -> TrainConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = compose("train", overrides=list(overrides))
    return from_config(TrainConfig, OmegaConf.to_container(composed, resolve=True))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_hypernetwork_builds_on_meta(experiment: str):
    config = build(f"experiment={experiment}")
    trainer = config.trainer_config(1, 100)
    assert trainer.batch.global_size == config.nets.meta_batch
    classes = CLASSES.get(experiment.split("_")[0], 10)
    with torch.device("meta"):
        model = MetaLearner(config.model_config(num_classes=classes))
    assert SIZES.get(experiment) in (None, sum(p.numel() for p in model.parameters()))
    if trainer.optim.schedule == "cosine_epochs":
        first, peak = (learning_rate(step, trainer.optim, trainer.total_steps) for step in (1, 401))
        assert first == pytest.approx(1e-5, rel=1e-3) and peak == pytest.approx(config.optim.lr, rel=1e-3)


def test_files_list_every_option():
    for section, kind, left_out in (
        ("model", HyperNetworkConfig, DATA_DECIDES),
        ("nets", NetsSection, ()),
    ):
        listed = OmegaConf.load(CONFIGS / section / "base.yaml").keys()
        assert set(listed) == {one.name for one in fields(kind)} - set(left_out)
    listed = OmegaConf.load(CONFIGS / "train.yaml").training.keys()
    assert set(listed) == {one.name for one in fields(TrainingConfig)}


def test_rates_that_change_between_epochs():
    options = {"lr": 1.0, "epoch_steps": 2, "warmup": 2, "warmup_factor": 0.5}
    steps = OptimConfig(schedule="multistep_epochs", milestones=(3, 4), gamma=0.1, **options)
    found = [learning_rate(step, steps, 12) for step in range(1, 13)]
    assert found == pytest.approx([0.5, 0.5, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])
    falling = OptimConfig(schedule="exponential_epochs", gamma=0.97, lr=1.0, epoch_steps=3, warmup=0)
    assert [learning_rate(step, falling, 9) for step in (1, 3, 4, 9)] == pytest.approx([1, 1, 0.97, 0.97**2])
