"""The export command: every source to every format, with equal outputs."""

import json
import sys

import pytest
import torch
from diffusers import DiTTransformer2DModel

from mup_dit.conversion import match_frequencies
from mup_dit.export import main
from mup_dit.loading import load_model
from mup_dit.saving import save_model, save_reference
from tests.mup_dit import tiny


@pytest.fixture
def export(monkeypatch, tmp_path, capfd):
    """Runs the command line in ``tmp_path``; returns the exit code and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export", *options])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        written = capfd.readouterr()
        return code, written.out + written.err

    return run


@torch.no_grad()
def outputs(path: str, family: str = "dit", **options) -> torch.Tensor:
    return load_model(path, **options).model(*tiny.inputs(family))


@pytest.fixture
def source(tmp_path):
    return save_model(tmp_path / "source", tiny.model("dit", 8), tiny.model_config("dit", 8), metadata={"seed": 5})


def test_every_format_gives_the_same_images(export, source):
    assert export("model_path=source", "output=diffusers", "to=diffusers") == (0, "diffusers\n")
    assert export("model_path=source", "output=plain", "to=reference", "fold=true")[0] == 0
    assert export("model_path=source", "output=mup", "to=reference")[0] == 0
    assert export("model_path=source", "output=folded", "fold=true")[0] == 0
    expected = outputs("source")
    for found in (
        outputs("diffusers"),
        outputs("plain", heads=8),
        outputs("mup", heads=8, base_shapes="mup/base_shapes.bsh"),
        outputs("folded"),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    theirs = match_frequencies(DiTTransformer2DModel.from_pretrained("diffusers")).eval()
    with torch.no_grad():
        found = theirs(*tiny.inputs("dit")).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_folding_makes_an_ordinary_network(export, source):
    export("model_path=source", "output=folded", "fold=true")
    described = json.loads((source.parent / "folded" / "config.json").read_text())
    assert described["model"]["parametrization"] == "sp" and described["readouts"] == {"final_layer.linear": 1.0}
    assert described["table"] == [] and described["seed"] == 5


def test_a_checkpoint_of_the_reference_becomes_a_folder_of_ours(export, tmp_path):
    model = tiny.model("pixart", 8)
    save_reference(tmp_path / "reference", model, tiny.model_config("pixart", 8), folded=False)
    options = ("model_path=reference/model.pth", "heads=8", "base_shapes=reference/base_shapes.bsh")
    assert export(*options, "output=imported", "dtype=bf16")[0] == 0
    loaded = load_model("imported")
    assert loaded.model.final_layer.linear.mult == 0.5 and loaded.config.family == "pixart"
    with torch.no_grad():
        found, expected = loaded.model(*tiny.inputs("pixart")), model.eval()(*tiny.inputs("pixart"))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)  # eight bits of a bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("model_path=nowhere",), "nowhere does not exist"),
        (("output=source",), "holds a model already"),
        (("heads=3",), "heads=3, but source has 8"),
        (("to=onnx",), "to='onnx' is not known"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(export, source, options, message):
    code, text = export("model_path=source", "output=out", *options)
    assert code == 2 and message in text and text.count("\n") == 1
