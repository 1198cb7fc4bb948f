"""RADD's options: every preset composes, names and defaults are the reference's, and what cannot work is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.config import KeepConfig
from common.conversion import from_config, option_names
from common.errors import ConfigError
from radd.config import (
    DataConfig,
    EvalConfig,
    NoiseConfig,
    SamplingConfig,
    TrainConfig,
    TrainingConfig,
)
from radd.model import ModelConfig, count_parameters

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "radd"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
LOSSES = ("t_dse", "t_dce", "lambda_dce", "k_dce")
TINY = ModelConfig(hidden_size=64, n_blocks=2, n_heads=4)


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


def build(*overrides: str) -> TrainConfig:
    return from_config(TrainConfig, composed(*overrides))


def leaves(values: dict, path: str = "") -> set[str]:
    names = set()
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        names |= leaves(value, name) if isinstance(value, dict) else {name}
    return names


def test_the_yaml_lists_every_option_so_that_help_shows_it():
    groups = {name.rpartition(".")[0] for name in option_names(TrainConfig)} - {""}
    assert leaves(composed()) == set(option_names(TrainConfig)) - groups


def test_yaml_and_dataclass_have_the_same_defaults():
    expected = TrainConfig(model=build().model)
    assert replace(build(), data=expected.data) == expected
    assert replace(build().data, tokenizer="gpt2") == expected.data


def test_names_and_defaults_are_those_of_the_reference():
    config = build()
    assert (config.tokens, config.model.hidden_size, config.model.n_blocks, config.model.n_heads) == (
        50257,
        768,
        12,
        12,
    )
    assert (config.training.batch_size, config.training.snapshot_freq, config.training.log_freq) == (512, 50000, 50)
    assert (config.training.eval_freq, config.training.snapshot_freq_for_preemption) == (100, 10000)
    assert (config.training.ema, config.training.loss_type) == (0.9999, "t_DCE")
    assert (config.noise.type, config.noise.sigma_min, config.noise.sigma_max) == ("loglinear", 1e-4, 20)
    assert (config.sampling.predictor, config.sampling.steps) == ("euler", 1024)
    assert (config.eval.batch_size, config.eval.perplexity, config.eval.perplexity_batch_size) == (512, True, 16)
    optim = config.optim
    assert (optim.optimizer, optim.lr, optim.beta1, optim.beta2, optim.eps) == ("AdamW", 3e-4, 0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.warmup, optim.grad_clip) == (0, 2500, 1.0)


def test_every_preset_of_the_specification_exists():
    wanted = {f"{size}_{loss}_400k" for size in ("small", "medium") for loss in LOSSES}
    wanted |= {f"small_{loss}_1000k" for loss in LOSSES[1:]}
    wanted |= {"small_t_dce_400k_geometric", "text_minutes"}
    assert set(EXPERIMENTS) == wanted


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_preset_says_what_to_expect_and_is_what_its_name_says(name: str):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    for word in (f"experiment={name}", "Hardware:", "Expect:"):
        assert word in text, f"{name}.yaml does not say {word}"
    config = build(f"experiment={name}")
    config.trainer_config(8)
    assert config.name == name
    if name == "text_minutes":
        assert count_parameters(config.model, config.tokens) == 116_225
        return
    size, loss, thousands = re.fullmatch(r"(small|medium)_(.*)_(400|1000)k(?:_geometric)?", name).groups()
    assert "estimate" in text
    assert config.training.loss_type.lower() == loss
    assert config.training.n_iters == 1000 * int(thousands)
    assert count_parameters(config.model, config.tokens) == {"small": 162_265_682, "medium": 405_191_762}[size]
    assert (config.optim.weight_decay, config.training.loss_norm) == (0.03, "sequences")
    assert config.noise.type == ("geometric" if name.endswith("geometric") else "loglinear")


@pytest.mark.parametrize("name", ["small_t_dce_400k", "text_minutes"])
def test_the_command_line_wins_over_a_preset(name: str):
    overrides = ["precision=bf16", "parallel=fsdp2", "model=medium_radd", "optim.weight_decay=0.5", "noise=geometric"]
    config = build(f"experiment={name}", *overrides)
    assert (config.precision, config.parallel.plan, config.model.n_blocks) == ("bf16", "fsdp2", 24)
    assert (config.optim.weight_decay, config.noise.type) == (0.5, "geometric")


@pytest.mark.parametrize("plan", ["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_every_plan_is_a_group_choice(plan: str):
    assert build(f"parallel={plan}").parallel.plan == plan


@pytest.mark.parametrize(
    "overrides,check",
    [
        (["optim=adam"], lambda c: c.optim.optimizer == "Adam"),
        (["optim=adamw_cosine"], lambda c: (c.optim.schedule, c.optim.min_ratio) == ("cosine", 0.1)),
        (["optim=adamw_wsd"], lambda c: c.optim.schedule == "wsd"),
        (["tracking=wandb"], lambda c: c.tracking.wandb == "offline"),
        (["tracking=tensorboard"], lambda c: c.tracking.tensorboard),
        (["data=embedded_bpe"], lambda c: (c.tokens, c.data.tokenizer) == (1024, "bpe:1024")),
        (["data=wikitext103"], lambda c: c.data.train == "wikitext103"),
        (["data=streamed"], lambda c: c.data.streaming),
        (["data=local", "data.train=a.txt", "data.valid=b.txt"], lambda c: c.data.train == "a.txt"),
        (["launcher=slurm"], lambda c: True),
        (["launcher=joblib"], lambda c: True),
    ],
)
def test_group_choices_mean_what_they_say(overrides: list[str], check):
    assert check(build(*overrides))


def test_local_runs_never_touch_the_slurm_plugin():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        whole = compose("train", return_hydra_config=True)
    assert "BasicLauncher" in whole.hydra.launcher._target_


def test_the_slurm_launcher_asks_to_be_requeued():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        launcher = compose("train", overrides=["launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher.additional_parameters.requeue is True
    assert (launcher.tasks_per_node, launcher.gpus_per_node) == (4, 4)


@given(micro=st.integers(1, 9), accum=st.integers(1, 5), world=st.integers(1, 9))
def test_a_batch_that_divides_is_shared_out_exactly(micro: int, accum: int, world: int):
    training = TrainingConfig(batch_size=micro * accum * world, accum=accum)
    trainer = TrainConfig(model=TINY, training=training).trainer_config(world)
    assert trainer.batch.micro_size == micro
    assert trainer.batch.accumulation_steps(world) == accum


@given(batch=st.integers(1, 200), accum=st.integers(1, 6), world=st.integers(1, 6))
def test_a_batch_that_does_not_divide_is_answered_with_sizes_that_do(batch: int, accum: int, world: int):
    config = TrainConfig(model=TINY, training=TrainingConfig(batch_size=batch, accum=accum))
    if batch % (accum * world) == 0:
        return
    with pytest.raises(
        ConfigError, match=rf"^training\.batch_size={batch} .*training\.accum={accum} x world_size={world}"
    ) as caught:
        config.trainer_config(world)
    sizes, _, passes = str(caught.value).rpartition("work: ")[2].partition(";")
    for size in map(int, re.findall(r"\d+", sizes)):
        replace(config, training=replace(config.training, batch_size=size)).trainer_config(world)
    for count in map(int, re.findall(r"\d+", passes)):
        replace(config, training=replace(config.training, accum=count)).trainer_config(world)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: TrainingConfig(loss_type="t_DC"), r"training\.loss_type='t_DC'.*Did you mean 't_DCE'"),
        (lambda: TrainingConfig(loss_norm="token"), r"training\.loss_norm='token'"),
        (lambda: TrainingConfig(time_sampler="vdn"), r"training\.time_sampler='vdn'.*'vdm'"),
        (lambda: TrainingConfig(n_iters=0), r"training\.n_iters=0"),
        (lambda: TrainingConfig(accum=0), r"training\.accum=0"),
        (lambda: TrainingConfig(eval_freq=-1), r"training\.eval_freq=-1"),
        (lambda: TrainingConfig(ema=1.0), r"training\.ema=1\.0 must lie in \[0, 1\)"),
        (lambda: TrainingConfig(sampling_eps=0.0), r"training\.sampling_eps=0\.0"),
        (lambda: NoiseConfig(type="log"), r"noise\.type='log'"),
        (lambda: NoiseConfig(type="geometric", sigma_min=2, sigma_max=1), r"noise\.sigma_min=2.*sigma_min < sigma_max"),
        (lambda: SamplingConfig(predictor="analytic"), r"sampling\.predictor='analytic'"),
        (lambda: SamplingConfig(steps=0), r"sampling\.steps=0"),
        (lambda: SamplingConfig(strategy="top_q"), r"^sampling\.strategy='top_q'"),
        (lambda: SamplingConfig(strategy="top_k"), r"^sampling\.strategy_para=None"),
        (lambda: SamplingConfig(strategy="top_p", strategy_para=1.5), r"^sampling\.strategy_para=1\.5"),
        (lambda: EvalConfig(perplexity_batch_size=0), r"eval\.perplexity_batch_size=0"),
        (lambda: DataConfig(train=""), r"data\.train is empty"),
        (lambda: DataConfig(num_workers=-1), r"data\.num_workers=-1"),
        (lambda: DataConfig(group_size=0), r"data\.group_size=0"),
        (lambda: DataConfig(group_size=10, streaming=True), r"data\.group_size=10 .*data\.streaming=true"),
        (lambda: KeepConfig(keep_last=0), r"checkpoint\.keep_last=0"),
        (lambda: TrainConfig(model=TINY, tokens=0), r"tokens=0"),
        (lambda: TrainConfig(model=TINY, run_dir=""), r"run_dir is empty"),
        (lambda: TrainConfig(model=TINY, precision="half"), r"precision='half'"),
        (lambda: TrainConfig(model=TINY, ngpus=0), r"ngpus=0"),
        (lambda: TrainConfig(model=TINY, ngpus=4).trainer_config(2), r"ngpus=4 does not fit the 2 processes .*NPROC=4"),
        (lambda: replace(TINY, n_heads=5), r"model\.hidden_size=64 .*model\.n_heads=5"),
        (lambda: replace(TINY, hidden_size=60), r"heads of odd width 15"),
        (lambda: replace(TINY, dropout=1.0), r"model\.dropout=1\.0"),
        (lambda: replace(TINY, dtype="half"), r"model\.dtype='half'"),
        (
            lambda: TrainConfig(model=TINY, tokens=9, sampling=SamplingConfig(strategy="top_k", strategy_para=10)),
            r"^sampling\.strategy_para=10",
        ),
        (
            lambda: TrainConfig(model=replace(TINY, dtype="float16"), precision="bf16"),
            r"model\.dtype=float16 and precision=bf16 contradict",
        ),
    ],
)
def test_what_cannot_work_is_named(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "dtype,precision", [(None, "auto"), ("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")]
)
def test_the_models_dtype_decides_the_precision(dtype: str | None, precision: str):
    assert TrainConfig(model=replace(TINY, dtype=dtype)).trainer_config(1).precision == precision


def test_blocks_are_recomputed_once_even_if_asked_for_twice():
    config = build("model.use_checkpoint=true", "parallel.activation_checkpointing=true")
    assert config.trainer_config(1).parallel.activation_checkpointing is False
