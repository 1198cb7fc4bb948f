"""Zero-shot perplexity: the reference's numbers, the losses' expectations, processes, resuming, mistakes."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import radd.perplexity
from common.data.tokenizer import ByteTokenizer
from common.diffusion.schedules import Geometric, LogLinear, build_schedule
from common.diffusion.time_sampling import decoupled_times, vdm_times
from common.errors import ConfigError, DataError
from common.evaluation.perplexity import estimate_group, evaluate_rows, order_rows
from common.parallel import Parallel
from common.testing.distributed import run_torchrun
from common.testing.golden import fill, load_cases
from radd.bound import enumerate_bound
from radd.evaluate import main
from radd.evaluation import EvaluateConfig, evaluate
from radd.loading import save_reference_folder
from radd.losses import SMALLEST_MASK_PROBABILITY
from radd.model import RADD, ModelConfig
from radd.perplexity import LossEstimator, count_weights, loss_rows, token_nll

ALONE = Parallel(0, 1, 0, torch.device("cpu"))
PROPORTIONS = {"hidden_size": 16, "n_blocks": 1, "n_heads": 2, "length": 32}


def golden_model(config: dict) -> RADD:
    proportions = dict(config["model"])
    tokens = proportions.pop("tokens")
    model = RADD(ModelConfig.from_mapping({"dropout": 0.0, **proportions}), tokens)
    return fill(model, config["weights_seed"], skip=("rotary_emb.inv_freq",)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A byte model that is not uniform, as an exported folder."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    model = fill(RADD(ModelConfig(**PROPORTIONS), 128), 5, skip=("rotary_emb.inv_freq",))
    config = {"tokens": 128, "noise": {"type": "loglinear"}, "model": PROPORTIONS, "data": {"tokenizer": "byte"}}
    return str(save_reference_folder(path, model, config, tokenizer=ByteTokenizer()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def options(folder: str, cache: str, work_dir: Path, **changes) -> EvaluateConfig:
    """36 blocks (two whole groups and a partial one) of embedded text, few draws."""
    settings = {
        "model_path": folder,
        "cache_dir": cache,
        "work_dir": str(work_dir),
        "valid_dataset": "embedded:topics",
        "max_samples": 36,
        "monte_carlo_timesteps": 4,
        "batch_size": 64,
        "device": "cpu",
        "progress": False,
    }
    return EvaluateConfig(**settings | changes)


# ---------------------------------------------------------------- golden cases


@pytest.mark.parametrize("loss_type", ["lambda_DCE", "t_DCE", "t_DSE"])
def test_ppl_estimator_golden(golden_dir, loss_type):
    case = load_cases("radd", golden_dir)["ppl_estimator"]
    model, x = golden_model(case.config), torch.from_numpy(case.arrays["in_x0"])
    batch_means = []
    for batch, x_BL in enumerate(x):
        rows = []
        for draw in range(case.config["monte_carlo_timesteps"]):
            inputs = {"u_mask": torch.from_numpy(case.arrays["in_u_mask"][batch, draw])}
            if loss_type == "lambda_DCE":
                level = decoupled_times(torch.from_numpy(case.arrays["in_u_lambda"][batch, draw]))
                inputs["lambda"] = level.clamp(min=SMALLEST_MASK_PROBABILITY)
            else:
                inputs["time"] = vdm_times(torch.from_numpy(case.arrays["in_u0"][batch, draw]), len(x_BL))
            rows.append(loss_rows(loss_type, x_BL, inputs, LogLinear()))
        value_MB, _ = estimate_group(token_nll(model), x_BL, rows, mask_id=model.mask_id, batch_size=5)
        batch_means.append(float(value_MB.mean()))
    nats = np.mean(batch_means)
    case.check(f"out_nll_{loss_type}", np.float64(nats))
    case.check(f"out_ppl_{loss_type}", np.float64(math.exp(nats / x.shape[-1])))


def test_loss_ordered_golden(golden_dir):
    case = load_cases("radd", golden_dir)["loss_ordered"]
    model, x_BL = golden_model(case.config), torch.from_numpy(case.arrays["in_x0"])
    length = x_BL.shape[1]
    orders = {
        "out_forward": torch.arange(length),
        "out_backward": torch.arange(length).flip(0),
        "out_order": torch.from_numpy(case.arrays["in_order"]),
    }
    for name, order_L in orders.items():
        rows = order_rows(order_L.expand(len(x_BL), length))
        assert len(rows) == length * len(x_BL)
        value_R = evaluate_rows(token_nll(model), x_BL, rows, mask_id=model.mask_id, batch_size=7)
        case.check(name, value_R.view(len(x_BL), length).sum(dim=1))


# ---------------------------------------------------------------- expectations


@pytest.mark.parametrize("loss_type", ["t_DSE", "t_DCE", "lambda_DCE", "k_DCE", "ar_random"])
@pytest.mark.parametrize("estimator", ["reference", "low_variance"])
def test_every_estimator_has_the_expectation_of_its_loss(golden_dir, loss_type, estimator):
    """Against enumeration of all masks, within 4 standard errors; the t losses with a much shorter range."""
    case = load_cases("radd", golden_dir)["exact_bound"]
    model, x_BL = golden_model(case.config), torch.from_numpy(case.arrays["in_x0"])
    delta = 0.7
    bound = enumerate_bound(lambda z, w: model(z, where=w), x_BL[0], mask_id=model.mask_id)
    expected = {"t_DSE": bound.t_dse(delta), "t_DCE": bound.t_dce(delta)}.get(loss_type, bound.ao)
    draws = {"ar_random": 60, "low_variance": 3000}.get(loss_type if loss_type == "ar_random" else estimator, 400)
    found = LossEstimator(
        loss_type=loss_type, estimator=estimator, draws=draws, schedule=LogLinear(), sampling_eps=delta, seed=1
    )
    value_MB, _ = estimate_group(
        token_nll(model), x_BL, found.replicates(0, x_BL), mask_id=model.mask_id, batch_size=512
    )
    error = float(value_MB.std()) / math.sqrt(len(value_MB))
    assert abs(float(value_MB.mean()) - expected) < 4 * error
    if loss_type in ("t_DSE", "t_DCE"):
        assert "exact_range=true" in found.range_note()
        if estimator == "low_variance":  # precise enough to tell the range from the whole
            assert abs(float(value_MB.mean()) - bound.ao) > 5 * error


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_exact_range_makes_the_t_losses_estimate_the_bound(golden_dir, noise):
    case = load_cases("radd", golden_dir)["exact_bound"]
    model, x_BL = golden_model(case.config), torch.from_numpy(case.arrays["in_x0"])
    ao = float(case.arrays["out_ao"])
    for estimator in ("reference", "low_variance"):
        found = LossEstimator(
            loss_type="t_DSE",
            estimator=estimator,
            draws=500,
            schedule=build_schedule(noise),
            sampling_eps=0.2,
            exact_range=True,
        )
        value_MB, _ = estimate_group(
            token_nll(model), x_BL, found.replicates(0, x_BL), mask_id=model.mask_id, batch_size=512
        )
        assert abs(float(value_MB.mean()) - ao) < 4 * float(value_MB.std()) / math.sqrt(len(value_MB))


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()])
def test_count_weights_are_the_integral_over_the_levels_of_any_schedule(schedule):
    """A network whose masked tokens all cost 1 nat has S = k: t_DSE is then sigma/e times the masked count."""
    length, eps = 6, 0.05
    t = torch.linspace(eps, 1, 200_001, dtype=torch.float64)
    rate = schedule.dsigma(t) / torch.expm1(schedule.sigma(t)) * schedule.mask_probability(t) * length
    expected = float(torch.trapezoid(rate, t)) / (1 - eps)
    low, high = schedule.mask_probability(torch.tensor([eps, 1.0], dtype=torch.float64)).tolist()
    assert float(count_weights(length, low, high).sum()) / (1 - eps) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- a whole test set


@pytest.mark.parametrize("estimator", ["reference", "low_variance"])
def test_batch_size_does_not_matter_and_the_report_is_complete(folder, cache, tmp_path, capsys, estimator):
    found = evaluate(options(folder, cache, tmp_path / "a", estimator=estimator), ALONE)
    again = evaluate(options(folder, cache, tmp_path / "b", estimator=estimator, batch_size=5), ALONE)
    assert again["perplexity"] == pytest.approx(found["perplexity"], rel=1e-4)
    assert again["nats_error_draws"] == pytest.approx(found["nats_error_draws"], rel=1e-3)
    assert found["blocks"] == 36 and found["tokens"] == 36 * 32 and found["network_rows"] == 36 * 4
    assert found["dropped_tokens"] > 0 and found["draws"] == 4 and found["git_revision"] is not None
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert 0 < found["perplexity_error_draws"] < found["perplexity"]
    assert found["config"]["monte_carlo_timesteps"] == 4 and found["seed"] == 0
    log = (tmp_path / "a" / "zero_shot_on_embedded_topics_lambda_DCE_logs").read_text()
    printed = capsys.readouterr().out
    for text in (
        "Evaluation PPL: ",
        "Standard error",
        "Blocks: 36",
        "dropped tokens",
        "Loss type: lambda_DCE",
        "draws: 4",
    ):
        assert text in log and text in printed
    (stored,) = (tmp_path / "a").glob("*.json")
    assert json.loads(stored.read_text())["perplexity"] == found["perplexity"]


def test_a_t_loss_says_what_its_range_does(folder, cache, tmp_path, capsys):
    found = evaluate(options(folder, cache, tmp_path, loss_type="t_DCE", monte_carlo_timesteps=1), ALONE)
    assert "time drawn in [0.001, 1]" in found["note"] and "Note: time drawn" in capsys.readouterr().out
    assert found["nats_error_draws"] is None and found["nats_error_sequences"] > 0


def test_fixed_orders_are_exact_and_need_a_single_draw(folder, cache, tmp_path):
    arguments = {"max_samples": 3, "loss_type": "ar_forward", "monte_carlo_timesteps": None}
    found = evaluate(options(folder, cache, tmp_path, **arguments), ALONE)
    assert found["nats_error_draws"] == 0 and found["network_rows"] == 3 * 32 and found["draws"] == 1
    with pytest.raises(ConfigError, match="monte_carlo_timesteps=8 makes no sense"):
        evaluate(options(folder, cache, tmp_path, **arguments | {"monte_carlo_timesteps": 8}), ALONE)


def test_an_interrupted_evaluation_continues_with_the_same_result(folder, cache, tmp_path, monkeypatch):
    whole = evaluate(options(folder, cache, tmp_path / "whole"), ALONE)
    original, calls = radd.perplexity.estimate_group, []

    def dies_in_the_second_group(*args, **kwargs) -> tuple[Tensor, int]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(radd.perplexity, "estimate_group", dies_in_the_second_group)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(folder, cache, tmp_path / "cut"), ALONE)
    resumed = evaluate(options(folder, cache, tmp_path / "cut"), ALONE)
    assert len(calls) == 4  # one group was kept, two were evaluated after the interruption
    assert resumed["perplexity"] == whole["perplexity"]
    assert resumed["nats_error_draws"] == whole["nats_error_draws"]
    evaluate(options(folder, cache, tmp_path / "cut", seed=1), ALONE)
    assert len(calls) == 7  # another seed shares nothing


def test_two_processes_give_the_result_of_one(folder, cache, tmp_path):
    config = options(folder, cache, tmp_path / "two", estimator="low_variance")
    single = evaluate(options(folder, cache, tmp_path / "one", estimator="low_variance"), ALONE)
    arguments = [f"{key}={value}" for key, value in asdict(config).items() if value not in (None, "")]
    run_torchrun("radd.evaluate", 2, [*arguments, "ngpus=2"])
    (stored,) = (tmp_path / "two").glob("*.json")
    double = json.loads(stored.read_text())
    assert double["processes"] == 2 and double["perplexity"] == single["perplexity"]
    assert len(list((tmp_path / "two").glob("*.rank*.jsonl"))) == 2


# ---------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scorer")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    fill(model.transformer, 1)
    model.save_pretrained(path)
    ByteTokenizer().save(path)
    return str(path)


def test_generative_perplexity_of_a_samples_file(scorer, tmp_path, capsys):
    texts = ["hello there", "some other text", "x" * 12]
    lines = [json.dumps({"tokens": ByteTokenizer().encode(text), "text": text}) for text in texts]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    config = {"task": "generative_perplexity", "samples": str(tmp_path / "samples.jsonl"), "scorer": scorer}
    found = evaluate(EvaluateConfig(**config, work_dir=str(tmp_path), batch_size=2), ALONE)
    assert found["samples"] == 3 and found["scored_tokens"] == sum(map(len, texts)) - 3
    assert {"perplexity", "perplexity_error", "perplexity_pooled", "unigram_entropy", "distinct_2"} <= set(found)
    assert "Generative PPL (pooled over tokens)" in capsys.readouterr().out
    same = evaluate(EvaluateConfig(**config, work_dir=str(tmp_path), retokenise=True), ALONE)
    assert same["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"tokens": [1, 2, 128]}))
    with pytest.raises(DataError, match="holds id 128"):
        evaluate(EvaluateConfig(**config, work_dir=str(tmp_path)), ALONE)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_type": "t_DCEE"}, "Did you mean 't_DCE'"),
        ({"estimator": "best"}, "reference, low_variance"),
        ({"monte_carlo_timesteps": 0}, "monte_carlo_timesteps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"model_path": None}, "model_path has no value"),
        ({"task": "generative_perplexity"}, "samples has no value"),
        ({"work_dir": ""}, "work_dir is empty"),
    ],
)
def test_unusable_options_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**{"model_path": "somewhere"} | changes)


def test_processes_and_tokenizers_that_do_not_fit_are_named(folder, cache, tmp_path):
    with pytest.raises(ConfigError, match="ngpus=4 does not fit the 1 process"):
        evaluate(options(folder, cache, tmp_path, ngpus=4), ALONE)
    config = {"tokens": 60, "model": PROPORTIONS}
    small = save_reference_folder(tmp_path / "small", RADD(ModelConfig(**PROPORTIONS), 60), config)
    with pytest.raises(DataError, match="byte has 128 tokens, but the model 60"):
        evaluate(options(str(small), cache, tmp_path, tokenizer="byte"), ALONE)
    with pytest.raises(DataError, match="names no tokenizer"):
        evaluate(options(str(small), cache, tmp_path), ALONE)


def test_command_line_reports_an_error_in_one_line_and_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate", "model_path=/absent/model", f"work_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: model_path=/absent/model does not exist")
