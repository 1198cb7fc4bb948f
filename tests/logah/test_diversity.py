"""Distances of layers after matching their rows, and the command that compares stored networks."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from common.errors import DataError
from logah import similarity
from logah.diversity import layer_diversity, matched_distance, network_diversity


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_order_of_rows_means_nothing():
    layer = draw(20, 7)
    shuffled = layer[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    assert matched_distance(layer, shuffled) == pytest.approx(0, abs=1e-9)
    assert matched_distance(layer, 3 * shuffled) == pytest.approx(0, abs=1e-9)  # nor does the scale
    assert matched_distance(layer, draw(20, 7, seed=2)) > 0.2


def test_distances_are_symmetric_and_the_mean_includes_the_diagonal():
    layers = {name: draw(9, 5, seed=seed) for seed, name in enumerate("abc")}
    layers["d"] = layers["a"].flip(0)
    found = layer_diversity(layers)
    assert (found.distance_KK == found.distance_KK.T).all()
    assert found.distance_KK[0, 3] == pytest.approx(0, abs=1e-9)
    assert found.mean == pytest.approx(found.mean_of_pairs * 12 / 16, abs=1e-6)
    assert 0 < found.standard_error < found.mean_of_pairs
    assert math.isnan(layer_diversity({"a": layers["a"], "b": layers["b"]}).standard_error)


def test_networks_are_compared_shape_by_shape():
    state = {"a": draw(8, 4), "b": draw(8, 4, seed=1), "c": draw(4, 8), "k": draw(6, 2, 3, 3), "l": draw(6, 2, 3, 3),
             "bias": draw(8), "other": draw(8), "steps": torch.ones(3, 3, dtype=torch.int64)}  # fmt: skip
    assert [each.shape for each in network_diversity(state)] == [(6, 2, 3, 3), (8, 4)]
    assert [each.shape for each in network_diversity(state, [(8, 4), (99, 99)])] == [(8, 4)]
    assert [each.shape for each in network_diversity(state, most_rows=7)] == [(6, 2, 3, 3)]
    with pytest.raises(DataError, match=r"shapes in this network: .*\[8, 4\] \(2 layers\)"):
        network_diversity(state, [(4, 8)])


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["similarity", *arguments])
    try:
        return similarity.main()
    except SystemExit as left:
        return left.code


def test_the_command_compares_stored_networks(tmp_path, monkeypatch, capsys):
    folder, file = tmp_path / "folder", tmp_path / "other.safetensors"
    folder.mkdir()
    same = draw(6, 4)
    save_file({"x": same, "y": same.flip(0).contiguous()}, folder / "model.safetensors")
    save_file({"x": same, "y": draw(6, 4, seed=5)}, file)
    output, figure = tmp_path / "report.json", tmp_path / "map.png"
    paths = f"networks=[{folder},{file}]"
    assert run(monkeypatch, paths, f"output={output}", f"figure={figure}") == 0
    assert "6x4" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report[str(folder)][0]["mean"] < 1e-6 < report[str(file)][0]["mean"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, paths, f"output={output}") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert run(monkeypatch, f"networks=[{tmp_path}/nowhere]") == 2
    assert "nowhere" in capsys.readouterr().err
