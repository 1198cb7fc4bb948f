"""The evaluation of predicted networks: scores, statistics of parameters, suites that continue, errors."""

import csv
import json

import pytest
import torch

from common.errors import ConfigError
from logah import evaluate as command
from logah.architectures import resolve_target
from logah.data_config import DataSection
from logah.evaluation import Evaluator, evaluate, items_of
from logah.evaluation_config import EvaluateConfig
from logah.parameter_statistics import BINS, measure_parameters
from logah.prediction_folder import write_module_folder
from logah.starts import random_network
from tests.logah.tiny_finetune import TARGET, write_hypernetwork

DATA = DataSection(limit_test=40, eval_batch_size=20)


@pytest.fixture(scope="module")
def hypernetwork(tmp_path_factory) -> str:
    return write_hypernetwork(tmp_path_factory.mktemp("hypernetwork") / "vision")


def test_predictions_random_weights_and_folders_are_scored_alike(hypernetwork, tmp_path, capsys):
    architecture = resolve_target(TARGET)
    write_module_folder(tmp_path / "saved", architecture, random_network(architecture, 0))
    records = evaluate(
        EvaluateConfig(
            checkpoint=hypernetwork, targets=[TARGET], random=True, seeds=[0, 1], predictions=[str(tmp_path / "saved")],
            data=DATA, work_dir=str(tmp_path / "out"), figures=True,
        )
    )  # fmt: skip
    assert [record["weights"] for record in records] == ["hypernetwork"] * 2 + ["random"] * 2 + ["folder"]
    for record in records:
        assert 0 <= record["top1"] <= record["top5"] <= 1 and record["top1_se"] >= 0 and record["nats"] > 1
    # the seed-0 random weights are those in the folder
    assert records[4]["nats"] == records[2]["nats"] and records[4]["norm"] == records[2]["norm"]
    assert records[0]["nats"] == records[1]["nats"] and records[0]["uncovered"] == ["class_token"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["values"]["networks"]) == 5 and "tensors" not in results["values"]["networks"][0]
    rows = list(csv.DictReader((tmp_path / "out" / "tensors.csv").open()))
    assert len(rows) == 5 * len(list(architecture.build().parameters()))
    assert {"distributions.png", "suite.png", "seeds.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "Means over seeds" in capsys.readouterr().out


def test_statistics_are_those_of_the_tensors_and_tied_ones_count_once():
    network = resolve_target("gpt2?tie=true").build_meta()
    assert sum(p.numel() for p in network.parameters()) == 124_439_808
    target = {"family": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8,
              "tie_word_embeddings": True}  # fmt: skip
    network = random_network(resolve_target(target), 0)
    found = measure_parameters(network)
    values = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert found["parameters"] == len(values)
    assert found["norm"] == pytest.approx(float(values.norm()), rel=1e-5)
    assert len(found["tensors"]) == len({id(p) for p in network.parameters()})
    assert sum(found["histogram"]) == sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert len(found["histogram"]) == BINS


def test_a_suite_goes_on_without_what_cannot_run_and_continues_after_a_stop(hypernetwork, tmp_path, monkeypatch):
    config = EvaluateConfig(
        checkpoint=hypernetwork, targets=[TARGET, "timm:test_byobnet"], random=True, data=DATA,
        work_dir=str(tmp_path), figures=False, max_batches=1,
    )  # fmt: skip
    run, seen = Evaluator.run, []

    def interrupted(self, item, *, alone):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(item)
        return run(self, item, alone=alone)

    monkeypatch.setattr(Evaluator, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(
        Evaluator, "run", lambda self, item, *, alone: (seen.append(item), run(self, item, alone=alone))[1]
    )
    records = evaluate(config)
    assert [item.source for item in seen] == ["hypernetwork", "random"] * 2
    # the tiny hypernetwork decodes at most 64 channels of kernels
    failed = [record for record in records if "error" in record]
    assert all("max_ck_lora" in record["error"] or "ConfigError" in record["error"] for record in failed)
    assert [record["weights"] for record in records if "top1" in record].count("random") == 2
    with pytest.raises(ConfigError, match="holds results.json already; use overwrite=true"):
        evaluate(config)


def test_the_torchvision_suite_is_chosen_by_pattern_and_limit(hypernetwork):
    every = items_of(EvaluateConfig(checkpoint=hypernetwork, suite="torchvision"))
    assert len(every) >= 74
    some = items_of(EvaluateConfig(checkpoint=hypernetwork, suite="torchvision", pattern="resnet*", limit=2))
    assert [item.name for item in some] == ["resnet101", "resnet152"]
    with pytest.raises(ConfigError, match="pattern='nothing' fits no classifier"):
        items_of(EvaluateConfig(checkpoint=hypernetwork, suite="torchvision", pattern="nothing"))


def test_parameters_alone_need_no_data(hypernetwork, tmp_path):
    (record,) = evaluate(
        EvaluateConfig(checkpoint=hypernetwork, targets=[TARGET], score=False, work_dir=str(tmp_path), figures=False)
    )
    assert "top1" not in record and record["parameters"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "nothing to evaluate"),
        ({"targets": [TARGET]}, "add checkpoint=PATH"),
        ({"targets": [TARGET], "random": True, "limit": 3}, "add suite=torchvision"),
        ({"targets": [TARGET], "random": True, "batchnorm": "own"}, "batchnorm='own'"),
        ({"targets": [TARGET], "random": True, "seeds": []}, "seeds is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**options)


def test_the_command_line_scores_text(tmp_path, monkeypatch, capsys):
    source = write_hypernetwork(tmp_path / "llm", "llm")
    target = "{family: gpt2, n_embd: 16, n_layer: 1, n_head: 2, vocab_size: 300, n_positions: 16}"
    arguments = [
        f"checkpoint={source}", f"targets=[{target}]", "data=embedded", "data.tokenizer=bpe:300", "data.block_size=16",
        "data.limit_test=8", "data.cache_dir=null", f"work_dir={tmp_path / 'out'}", "figures=false",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    assert command.main() == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["values"]["networks"]
    assert 100 < record["perplexity"] < 1e4 and record["perplexity_se"] > 0
    assert "perplexity" in capsys.readouterr().out
