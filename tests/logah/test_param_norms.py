"""Norms of predicted networks beside published ones."""

import json
import sys

import pytest
import torch

from common.errors import ConfigError, DataError
from logah import check_norms as command
from logah.architectures import gpt2, resolve_target, vit
from logah.checkpoints import load_hypernetwork, save_hypernetwork
from logah.param_norms import CheckNormsConfig, check_norms, predicted_norm, read_published, total_norm
from logah.prediction_folder import write_module_folder
from tests.logah.tiny_hypernetwork import tiny_hypernetwork

LINES = (
    '{"resnet18": {"ghn3": "2.210", "ghn3-paramnorm": "73.9089", "randinit-paramnorm": "113.2284"}}\n'
    '{"arch": "alexnet", "ghn3": "0.102", "ghn3-paramnorm": 72.4766}\n'
    '{"squeezenet1_1": {"randinit-paramnorm": "77.1589"}}\n'
)


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(LINES)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "ghn"
    save_hypernetwork(folder, tiny_hypernetwork(), {})
    return str(folder)


def test_tied_parameters_count_once():
    network = gpt2(16, 1, 2, vocab_size=30, n_positions=8, tie_word_embeddings=True).build()
    expected = torch.cat([each.detach().reshape(-1) for each in network.parameters()]).norm()
    assert total_norm(network) == pytest.approx(float(expected), rel=1e-5)


def test_the_norm_is_the_one_that_is_published():
    torch.manual_seed(0)  # of a random ResNet-18: published as 113.2284, which varies little with the seed
    assert total_norm(resolve_target("resnet18").build()) == pytest.approx(113.2284, abs=0.05)


def test_published_numbers_are_read_in_both_layouts(published):
    found = read_published(published)
    assert found["resnet18"]["ghn3-paramnorm"] == 73.9089
    assert found["alexnet"] == {"ghn3": 0.102, "ghn3-paramnorm": 72.4766}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 1"),
        (LINES + "[1, 2]\n", "line 4"),
        ('{"resnet18": {"ghn3": "high"}}', "line 1"),
        ("", "no network"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_published(path)


def test_predicted_networks_are_compared_with_the_column_asked_for(tmp_path, checkpoint):
    loaded, target = load_hypernetwork(checkpoint), "squeezenet1_1"
    norm = predicted_norm(loaded, resolve_target(target))
    results = tmp_path / "results.json"
    results.write_text(json.dumps({target: {"a-paramnorm": str(norm), "b-paramnorm": str(norm + 1), "a": "3.5"}}))
    (agreeing,) = check_norms(CheckNormsConfig(results=str(results), column="a", checkpoint=checkpoint))
    (differing,) = check_norms(CheckNormsConfig(results=str(results), column="b", checkpoint=checkpoint))
    assert (agreeing.agrees, agreeing.accuracy, differing.agrees) == (True, 3.5, False)
    with pytest.raises(ConfigError, match=r"column=c: .* has norms of a, b"):
        check_norms(CheckNormsConfig(results=str(results), column="c", checkpoint=checkpoint))


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_norms", *arguments])
    try:
        return command.main()
    except SystemExit as left:
        return left.code


def test_the_command_looks_at_stored_predictions(tmp_path, published, monkeypatch, capsys):
    network = vit(4, 1, 2, 16)
    write_module_folder(tmp_path / "stored", network, network.build())
    assert run(monkeypatch, f"predictions=[{tmp_path}/stored]") == 0
    assert "0 of 0 norms" in capsys.readouterr().out
    torch.manual_seed(0)
    named = resolve_target("squeezenet1_1")
    write_module_folder(tmp_path / "named", named, named.build())
    arguments = [f"predictions=[{tmp_path}/named]", f"results={published}", "column=randinit"]
    assert run(monkeypatch, *arguments, "tolerance=0.5") == 0
    assert run(monkeypatch, *arguments, "tolerance=0.0001") == 1
    assert run(monkeypatch, "targets=[resnet18]") == 2
    assert "checkpoint=HYPERNETWORK" in capsys.readouterr().err
