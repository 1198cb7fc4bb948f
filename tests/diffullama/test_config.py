"""Training options: every preset composes, the yaml lists every option, and what cannot work is refused."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.conversion import from_config, option_names
from common.errors import ConfigError
from diffullama.config import DataSection, ModelSection, ObjectiveConfig, TrainConfig, TrainingConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "diffullama"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
TINY = ["model=gpt2_tiny", "data=embedded"]
GROUPS = ("model.", "data.", "objective.", "peft.", "training.", "optim.", "eval.", "checkpoint.")


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


def build(*overrides: str) -> TrainConfig:
    return from_config(TrainConfig, composed(*overrides))


def leaves(values: dict, path: str = "") -> set[str]:
    names = set()
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        names |= leaves(value, name) if isinstance(value, dict) and name != "model.architecture" else {name}
    return names


def test_the_yaml_lists_every_option_so_that_help_shows_it():
    groups = {name.rpartition(".")[0] for name in option_names(TrainConfig)} - {""}
    assert leaves(composed()) == set(option_names(TrainConfig)) - groups


def test_yaml_and_dataclass_have_the_same_defaults():
    config = build()
    expected = TrainConfig(model=config.model, optim=config.optim)
    assert replace(config, data=expected.data) == expected
    assert replace(build(*TINY).data, tokenizer=None, num_workers=2) == DataSection()
    assert config.model == ModelSection(path="gpt2")


@pytest.mark.parametrize("group", ["model", "data", "objective", "peft"])
def test_every_choice_of_a_group_lists_the_same_options(group):
    found = {}
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        found[path.stem] = set(OmegaConf.load(path))
    assert len(set(map(frozenset, found.values()))) == 1, found


@pytest.mark.parametrize("stage", ["ddm", "ddm-sft", "pt", "sft"])
def test_every_stage_is_a_choice_of_objective(stage):
    objective = build(f"objective={stage}", *TINY).objective
    assert objective.stage == stage
    assert (objective.is_causal, objective.is_finetuning) == (stage in ("pt", "sft"), "sft" in stage)


def test_every_column_of_the_specification_is_an_experiment():
    wanted = {"gpt2_full_ddm", "gpt2_full_ddm_small", "gpt2_full_ddm_sft", "llama2_lora_ddm_sft"}
    wanted |= {"llama2_lora_ar_sft_gsm", "llama2_7b_ddm", "parent_minutes", "adapt_minutes", "finetune_minutes"}
    assert set(EXPERIMENTS) == wanted


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_for_its_processes_and_says_how_to_run_it(name):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name}" in text
    needed = {"gpt2_full_ddm_sft", "llama2_lora_ddm_sft", "llama2_lora_ar_sft_gsm"}
    config = build(f"experiment={name}", *(["data.train=pairs.jsonl"] if name in needed else []))
    config.trainer_config(8 if "minutes" not in name else 1)
    assert config.name == name
    if name != "parent_minutes":
        assert config.model.path


def test_the_numbers_of_the_reference_are_kept():
    medium = build("experiment=gpt2_full_ddm")
    assert (medium.optim.lr, medium.optim.warmup, medium.optim.schedule) == (3e-4, 2000, "cosine")
    assert (medium.optim.min_ratio, medium.optim.beta2, medium.optim.weight_decay) == (0.0, 0.999, 0.0)
    assert (medium.training.n_iters, medium.objective.anneal_steps, medium.seed) == (160_000, 10_000, 42)
    assert (medium.objective.loss_norm, medium.objective.keep_first, medium.data.bos) == ("masked", False, False)
    assert (medium.data.group_size, medium.data.valid_size, medium.training.ema) == (1000, 160, None)
    small = build("experiment=gpt2_full_ddm_small")
    assert (small.optim.lr, small.optim.warmup, small.training.n_iters) == (5e-6, 100, 10_000)
    pairs = build("experiment=llama2_lora_ddm_sft", "data.train=pairs.jsonl")
    assert (pairs.peft.kind, pairs.peft.r, pairs.peft.alpha) == ("lora", 16, 32)
    assert (pairs.model.length, pairs.training.epochs, pairs.objective.anneal_steps) == (256, 200, 1)
    large = build("experiment=llama2_7b_ddm")
    assert (large.optim.lr, large.optim.schedule, large.optim.warmup, large.seed) == (2e-5, "constant", 0, 2829)
    assert large.training.batch_size * large.model.length == 1_967_040


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: ObjectiveConfig(stage="dm"), r"objective.stage='dm' is not known; choose one of ddm, ddm-sft, pt"),
        (lambda: ObjectiveConfig(anneal_steps=0), r"objective.anneal_steps=0 is too small"),
        (lambda: ObjectiveConfig(time_eps=0), r"objective.time_eps=0 must lie in \(0, 1\)"),
        (lambda: ModelSection(), "model.path is empty; give a hub name or folder"),
        (lambda: ModelSection(architecture={"model_type": "gpt2"}), "add model.from_scratch=true"),
        (lambda: ModelSection(path="gpt2", mask_token_id=3, add_mask_token=True), "contradict each other"),
        (lambda: ModelSection(path="gpt2", attn_implementation="flash"), "model.attn_implementation='flash'"),
        (lambda: ModelSection(path="gpt2", dropout=1.0), r"model.dropout=1.0 must lie in \[0, 1\)"),
        (lambda: DataSection(valid_size=4), "holds out a part of data.train, but data.valid=embedded"),
        (lambda: DataSection(valid=None, valid_size=4.5), "data.valid_size=4.5 must be a whole number"),
        (lambda: DataSection(group_size=10, streaming=True), "data.group_size=10 does not work with data.streaming"),
        (lambda: TrainingConfig(epochs=0.0), "training.epochs=0.0 must be positive"),
        (lambda: TrainingConfig(ema=1.0), r"training.ema=1.0 must lie in \[0, 1\)"),
        (lambda: build(*TINY, "model.attn_implementation=flash_attention_2"), "takes no annealed mask"),
        (lambda: build(*TINY, "model.dtype=bf16", "parallel=fsdp2"), "model.dtype=bf16 does not work with parallel"),
        (lambda: build(*TINY, "training.epochs=1", "data.streaming=true"), "training.epochs needs a data set"),
        (lambda: build(*TINY, "objective=sft", "data.streaming=true"), "pairs of objective.stage"),
        (lambda: build(*TINY, "objective=sft", "data.train='packed:a'"), "data.train=packed:a holds running text"),
        (lambda: build(*TINY, "objective=sft", "peft=lora", "peft.train_mask_row=true"), "stage=sft has no mask"),
        (lambda: build(*TINY, "precision=fp32", "model.opened_attention=flash_attention_2"), "precision=fp32 does not"),
        (lambda: build(*TINY, "sampling.top_p=0"), r"sampling.top_p=0.0 must lie in \(0, 1\]"),
        (lambda: build(*TINY, "run_dir=''"), "run_dir is empty"),
        (lambda: build(*TINY, "ngpus=4").trainer_config(2), "ngpus=4 does not fit the 2 processes started"),
        (lambda: build(*TINY, "training.batch_size=10").trainer_config(4), "nearest batch sizes that work: 8 and 12"),
    ],
)
def test_bad_options_name_option_value_and_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def table_of_the_reference() -> list[tuple[str, list[str]]]:
    """(config, options) of every command and option that the README's last table names on our side."""
    text = (CONFIGS.parents[1] / "diffullama" / "README.md").read_text().split("## Coming from the reference's code")[1]
    found = []
    for line in text.split("\n## ")[0].splitlines():
        if not line.startswith("| ") or line.startswith(("| reference", "| ---")):
            continue
        for span in re.findall(r"`([^`]+)`", line.split(" | ")[-1]):
            words = shlex.split(span)
            options = [word.replace("[...]", "[]") for word in words if "=" in word and not word.endswith("=...")]
            module = next((word.partition(".")[2] for word in words if word.startswith("diffullama.")), "train")
            module = words[0] if words[0] == "prepare" else module
            if not words[0].startswith("--") and (options or "." in words[0].strip(".")):
                found.append((module, options or words))
    return found


def test_what_the_reference_s_commands_became_composes():
    known = {}
    for name in ("train", "generate", "evaluate", "prepare"):
        with initialize_config_dir(str(CONFIGS), version_base=None):
            known[name] = leaves(OmegaConf.to_container(compose(name), resolve=False))
    table = table_of_the_reference()
    assert len(table) > 30
    for module, options in table:
        if "=" not in options[0]:
            assert options[0] in known["train"] or not options[0].startswith(GROUPS), options
            continue
        names = {option.partition("=")[0] for option in options}
        if module == "train" and names <= known["generate"] | known["evaluate"] and not names <= known["train"]:
            module = "generate" if names <= known["generate"] else "evaluate"
        with initialize_config_dir(str(CONFIGS), version_base=None):
            compose(module, overrides=options)


def test_flash_attention_is_fine_once_nothing_is_annealed():
    config = build(*TINY, "model.attn_implementation=flash_attention_2", "objective.anneal_steps=1")
    assert config.model.attn_implementation == "flash_attention_2"
