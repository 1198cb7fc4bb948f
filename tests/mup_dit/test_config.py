"""Options of training: files of configuration, experiments of the paper, rates, refusals."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.conversion import from_config
from common.errors import ConfigError
from mup_dit.building import build_skeleton
from mup_dit.config import TrainConfig
from mup_dit.coordinate_check import CoordCheckConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mup_dit"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))

# specification 4.3, 4.4 and 3.6: parameters (trainable for PixArt), batch, steps or epochs, base rate
PUBLISHED = {
    "dit_w144": (10_799_168, 256, 200_000, 2**-10),
    "dit_w288": (42_624_608, 256, 200_000, 2**-10),
    "dit_w576": (169_354_400, 256, 200_000, 2**-10),
    "dit_w288_b128": (42_624_608, 128, 200_000, 2**-10),
    "dit_w288_b512": (42_624_608, 512, 200_000, 2**-10),
    "dit_w288_100k": (42_624_608, 256, 100_000, 2**-10),
    "dit_w288_150k": (42_624_608, 256, 150_000, 2**-10),
    "dit_w288_output_mult": (42_624_608, 128, 200_000, 2**-10),
    "dit_xl_2_mup": (675_129_632, 256, 2_400_000, 2**-10),
    "dit_xl_2_sp": (675_129_632, 256, 7_000_000, 1e-4),
    "pixart_base": (610_856_096, 256, None, 1e-4),
    "pixart_mup_proxy": (39_246_656, 1408, None, 2**-10),
    "pixart_mup_target": (610_856_096, 5632, None, 2**-10),
    "pixart_original": (610_856_096, 5632, None, 2e-5 * 22**0.5),
}
EPOCHS = {"pixart_base": 80, "pixart_mup_proxy": 5, "pixart_mup_target": 30, "pixart_original": 30}


def build(*overrides: str, name: str = "train", kind: type = TrainConfig):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = compose(name, overrides=list(overrides))
    return from_config(kind, OmegaConf.to_container(composed, resolve=True))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_network_builds_on_meta(experiment):
    config = build(f"experiment={experiment}")
    network = build_skeleton(config.network)
    count = sum(p.numel() for p in network.parameters())
    if experiment in PUBLISHED:
        size, batch, steps, rate = PUBLISHED[experiment]
        assert (count, config.training.batch_size) == (size, batch)
        assert config.learning_rate == pytest.approx(rate)
        assert steps is None or config.training.n_iters == steps
        assert config.training.epochs == EPOCHS.get(experiment)
        assert config.network.parametrization == ("mup" if "mup" in experiment or "_w" in experiment else "sp")
        assert not config.training.ema_warmup
    else:
        assert experiment.endswith("_minutes") or experiment.startswith("mmdit_mup")


def test_every_published_experiment_has_a_file():
    assert PUBLISHED.keys() <= set(EXPERIMENTS)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_file_names_only_options_that_exist(model):
    objective = "flow" if model.startswith("mmdit") else "ddpm"
    config = build(f"model={model}", f"objective={objective}")
    if config.network.parametrization == "mup" and "xl" not in model and "18b" not in model:
        assert build_skeleton(config.network).scalings


def test_files_list_every_option_of_the_dataclasses():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = OmegaConf.to_container(compose("train"))
        checked = OmegaConf.to_container(compose("coord_check"))
    for kind, found in ((TrainConfig, composed), (CoordCheckConfig, checked)):
        assert {name for name in kind.__dataclass_fields__} <= found.keys() | {"launcher"}
    for part in ("objective", "data", "training", "mup", "eval", "sampling", "checkpoint"):
        fields = TrainConfig.__dataclass_fields__[part].default_factory().__dataclass_fields__
        assert fields.keys() == composed[part].keys(), part


def test_rate_is_a_power_of_two_or_the_given_number():
    assert build("mup.loglr=-10.5").trainer_config(1).optim.lr == pytest.approx(2**-10.5)
    assert build("optim.lr=0.125").trainer_config(1).optim.lr == 0.125
    scaled = build("model.parametrization=sp", "mup.auto_lr=true", "optim.lr=1e-4", "training.batch_size=1024")
    assert scaled.trainer_config(1).optim.lr == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mup.auto_lr=true"], "by muP tune the rate"),
        (["model.hidden_size=66"], "hidden_size=66 is not divisible by 4"),
        (["+model.hidden_sice=64"], "model.hidden_sice"),
        (["training.ema=1.0"], r"training.ema=1.0 must lie in \[0, 1\)"),
        (["training.epochs=0"], "training.epochs=0.0 must be positive"),
        (["mup.decay_rule=none"], "mup.decay_rule='none'"),
        (["sampling.cfg_scale=0.5"], "sampling.cfg_scale=0.5 is too small"),
        (["data.train=''"], "data.train is empty"),
        (["data=features", "data.vae=ema"], "holds latents; set data.vae=null"),
        (["data.on_error=ignore"], "data.on_error='ignore'"),
        (["run_dir=''"], "run_dir is empty"),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(*overrides).network  # noqa: B018 - the network's checks


def test_batch_and_processes_must_fit():
    with pytest.raises(ConfigError, match="nearest batch sizes that work: 252 and 255"):
        build("training.batch_size=254").trainer_config(3)
    with pytest.raises(ConfigError, match="NPROC=4 bash scripts/mup_dit/train_torchrun.sh"):
        build("ngpus=4").trainer_config(2)


def test_coordinate_check_refuses_bad_widths():
    for heads in ("[4]", "[0,2]", "[]"):
        with pytest.raises(ConfigError, match="at least two different positive numbers"):
            build(f"heads={heads}", name="coord_check", kind=CoordCheckConfig)
    with pytest.raises(ConfigError, match="optimizer='sgd'"):
        build("optimizer=sgd", name="coord_check", kind=CoordCheckConfig)
