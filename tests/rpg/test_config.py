"""Options of training: every experiment of the paper, sizes on the meta device, refusals before work begins."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.config import share_batch
from common.conversion import from_config
from common.errors import ConfigError
from rpg.config import TrainConfig, TrainingConfig
from rpg.cost import plan_task
from rpg.model import Generator
from rpg.model_config import DATA_DECIDES, GeneratorConfig, flat_options, read_generator_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "rpg"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
EXPERIMENTS = sorted(
    path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if not path.stem.startswith("compare_pdiff")
)
TOKENS = {  # of the published sizes: tokens of one network
    "main_resnet18_8192": 1510,
    "main_resnet50_8192": 3223,
    "main_vittiny_8192": 808,
    "main_vitsmall_8192": 2786,
    "main_vitbase_16384": 5378,
    "main_convnextatto_8192": 552,
    "main_convnextlarge_16384": 12311,
    "compare_ours_mobilenetv3": 1259,
    "quick_start_cifar10_resnet18": 1448,
    "compare_ours_vitbase": 5332,
    "generalization": 790,
    "ablation_slice_channel": None,
    "ablation_token_dim_1024": 5654,
    "ablation_token_dim_2048": 2878,
    "ablation_token_dim_4096": 1490,
}


def build(*overrides: str, name: str = "train") -> TrainConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = compose(name, overrides=list(overrides))
    composed.data.checkpoints = "missing" if OmegaConf.is_missing(composed.data, "checkpoints") else "nowhere"
    return from_config(TrainConfig, OmegaConf.to_container(composed, resolve=True))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_generator_builds_on_meta(experiment: str):
    config = build(f"experiment={experiment}")
    assert share_batch(config.training.batch_size, 1, 1)
    if experiment.endswith("_minutes"):
        return
    _, network, codec = plan_task(config)
    assert TOKENS.get(experiment) in (None, codec.num_tokens)
    with torch.device("meta"):
        model = Generator(network, torch.empty(network.num_tokens, network.d_model))
    count = sum(p.numel() for p in model.parameters())
    if experiment == "main_vittiny_8192":
        assert count == pytest.approx(950.8e6, rel=1e-4)
    assert config.training.stacking == "per_network" and config.training.ema is None
    if config.data.dim_per_token == 16384:
        assert (config.model["d_model"], network.width) == (12288, 16384)


def test_all_rows_of_the_paper_have_an_experiment():
    rows = {f"permutation_{n}" for n in (1, 3, 10, 20)} | {f"no_permutation_{n}" for n in (1, 3, 10, 20)}
    rows |= {f"downtask_{name}" for name in ("dora_r4", "dora_r16", "dora_r64", "detection", "segmentation")}
    rows |= {f"ablation_{name}" for name in ("no_diffusion", "no_relation", "structure_lstm", "onedim_pe")}
    assert (rows | set(TOKENS)) <= set(EXPERIMENTS)
    assert len(EXPERIMENTS) >= 45


@pytest.mark.parametrize("model", MODELS)
def test_every_model_file_names_only_options_that_exist(model: str):
    dim = 8192 if model == "mse8192" else 1024
    config = build(f"model={model}", f"data.dim_per_token={dim}")
    names = {one.name for one in fields(GeneratorConfig)} - set(DATA_DECIDES)
    assert set(config.model) == names


def test_the_file_lists_every_option():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = compose("train")
    found = OmegaConf.to_container(composed)
    assert {one.name for one in fields(TrainConfig)} <= found.keys()
    assert {one.name for one in fields(TrainingConfig)} == found["training"].keys()


def test_options_of_a_generator_survive_json():
    config = GeneratorConfig(condition="full", condition_size=10, gate=("a*",), channels=(1, 4, 8, 4, 1))
    assert read_generator_config(flat_options(config)) == config
    with pytest.raises(ConfigError, match="no option"):
        read_generator_config({"unknown": 1})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.d_model=100"], r"model\.d_model=100.*multiple.*use model\.d_model=96"),
        (["model.kernel_size=6"], r"kernel_size=6.*7"),
        (["model.channels=[1,8,8,1]"], r"channels=\[1, 8, 8, 1\].*odd"),
        (["model.channels=[1,8,16,4,1]"], "symmetrically"),
        (["data.granularity=3"], r"granularity=3"),
        (["training.diffusion_batch=100"], r"diffusion_batch=100.*96 and 104"),
        (["model.post_d_model=2048", "model.stack=lstm"], "post_d_model"),
        (["model.head=mse"], r"dim_per_token"),
        (["training.drop_condition=0.1"], "needs a condition"),
        (["sampling.guidance=2"], "drop_condition"),
        (["+model.num_tokens=3"], "follows from the data"),
        (["+model.widht=3"], r"model\.widht"),
    ],
)
def test_wrong_options_are_refused_with_a_remedy(overrides: list[str], message: str):
    data = ["data.dim_per_token=512"] if "model.head=mse" in overrides else []
    with pytest.raises(ConfigError, match=message):
        build(*overrides, *data)


def test_positions_need_widths_that_fit():
    from rpg.positions import position_table_1d, position_table_2d

    with pytest.raises(ConfigError, match=r"model\.d_model=18 .*multiple of 4; use 16|use 20"):
        position_table_2d(2, 2, 18)
    with pytest.raises(ConfigError, match="multiple of 2"):
        position_table_1d(2, 7)
