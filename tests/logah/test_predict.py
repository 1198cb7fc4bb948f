"""python -m logah.predict: from a checkpoint and the name of a network to a folder that its library loads."""

import json
from pathlib import Path

import pytest
import torch

from common.cli import run
from common.errors import CheckpointError, ConfigError
from logah.checkpoints import load_hypernetwork, save_hypernetwork
from logah.predict import main
from logah.predict_config import PredictConfig
from logah.prediction import fill
from logah.prediction_folder import load_prediction, read_architecture, read_report, read_state
from logah.prediction_run import run_prediction
from tests.logah.tiny_hypernetwork import tiny_hypernetwork, write_published

VIT = "{family: vit, options: {patch_size: 8, num_layers: 1, num_heads: 2, hidden_dim: 16}}"
GPT2 = {
    "family": "gpt2",
    "options": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16,
                "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A hypernetwork of ours for images, one for language, and a file as GHN-3's."""
    root = tmp_path_factory.mktemp("hypernetworks")
    published = write_published(root / "ghn3tm8.pt", tiny_hypernetwork(decoder="dense", num_classes=10))
    return {
        "vision": str(save_hypernetwork(root / "vision", tiny_hypernetwork(), {"seed": 7, "step": 11})),
        "llm": str(save_hypernetwork(root / "llm", tiny_hypernetwork(variant="llm"))),
        "published": str(published),
    }


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["predict", *arguments])
    try:
        return run(main, "predict", PredictConfig, "configs/logah")
    except SystemExit as stopped:
        return stopped.code


def test_the_command_predicts_a_vision_network(checkpoints, tmp_path, monkeypatch, capsys):
    out = tmp_path / "vit"
    arguments = [f"target={VIT}", f"checkpoint={checkpoints['vision']}", f"out={out}", "progress=false"]
    assert command(monkeypatch, *arguments) == 0
    assert "not predicted: class_token" in capsys.readouterr().out
    architecture = read_architecture(out)
    module = architecture.build()
    module.load_state_dict(read_state(out), strict=True)
    expected = architecture.build()
    fill(load_hypernetwork(checkpoints["vision"]).model, expected)
    found = module.state_dict()
    assert all(torch.equal(found[n], v) for n, v in expected.state_dict().items() if n != "class_token")
    report = read_report(out)
    assert report["hypernetwork"]["digest"] == load_hypernetwork(checkpoints["vision"]).digest
    assert report["hypernetwork"]["step"] == 11 and report["hypernetwork"]["model"]["hid"] == 16
    assert command(monkeypatch, *arguments) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "overwrite=true", "dtype=bf16") == 0
    assert read_state(out)["conv_proj.weight"].dtype == torch.bfloat16


def test_a_configuration_of_transformers_in_a_folder_is_a_target(checkpoints, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
    )
    config.save_pretrained(tmp_path / "config")
    run_prediction(
        PredictConfig(
            target=str(tmp_path / "config"), checkpoint=checkpoints["llm"], out=str(tmp_path / "out"), shard_gb=5e-6
        )
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = model(ids).logits
        # eager attention here, fused there
        torch.testing.assert_close(load_prediction(tmp_path / "out")(ids).logits, logits)
    assert logits.shape == (1, 5, 60) and logits.isfinite().all()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()


def test_a_published_file_predicts_and_may_be_told_how_its_graphs_were_traced(checkpoints, tmp_path):
    config = {"checkpoint": checkpoints["published"], "target": "torchvision:squeezenet1_1?num_classes:10"}
    report = run_prediction(PredictConfig(**config, out=str(tmp_path / "a"), attention="as_is"))
    assert report.kept == () and read_report(tmp_path / "a")["hypernetwork"]["model"]["attention"] == "as_is"


def test_a_hypernetwork_of_ours_refuses_graphs_traced_otherwise(checkpoints, tmp_path):
    config = PredictConfig(target=GPT2, checkpoint=checkpoints["llm"], out=str(tmp_path / "out"), attention="as_is")
    with pytest.raises(CheckpointError, match="attention=explicit and cannot be used with attention=as_is"):
        run_prediction(config)
    assert list(tmp_path.iterdir()) == []


def test_the_residual_scale_and_the_rule_may_be_chosen(checkpoints, tmp_path):
    config = {"target": GPT2, "checkpoint": checkpoints["llm"], "overwrite": True}
    run_prediction(PredictConfig(**config, out=str(tmp_path / "plain")))
    run_prediction(PredictConfig(**config, out=str(tmp_path / "scaled"), residual_scale=True))
    name = "transformer.h.0.mlp.c_proj.weight"
    plain, scaled = read_state(tmp_path / "plain")[name], read_state(tmp_path / "scaled")[name]
    assert plain.std().item() == pytest.approx(0.02, rel=1e-4)
    torch.testing.assert_close(scaled * 2**0.5, plain)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["target=vit_z"], "vit_z"),
        (["checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
        (["dtype=fp8"], "dtype='fp8'"),
        (["shard_gb=0"], "shard_gb=0"),
        (["noise=-1"], "noise=-1"),
        (["device=tpu"], "device=tpu"),
        (["targets=gpt2"], "target"),
        (["out=''"], "out is empty"),
        (["strict=true"], "class_token"),
        (["reinit_residual=true", "target=alexnet"], "no weight that ends a residual branch"),
    ],
)
def test_mistakes_name_the_option_and_leave_nothing_behind(
    checkpoints, tmp_path, monkeypatch, capsys, arguments, message
):
    given = [f"target={VIT}", f"checkpoint={checkpoints['vision']}", f"out={tmp_path / 'out'}"]
    names = [argument.split("=")[0] for argument in arguments]
    kept = [argument for argument in given if argument.split("=")[0] not in names]
    assert command(monkeypatch, *kept, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(Path(tmp_path).iterdir()) == []


def test_a_vision_hypernetwork_does_not_predict_an_llama(checkpoints, tmp_path):
    config = PredictConfig(target="llama-small", checkpoint=checkpoints["vision"], out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="rmsnorm"):
        run_prediction(config)
    assert list(tmp_path.iterdir()) == []
