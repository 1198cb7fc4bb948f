"""Every source of a model loads into the right tensors, and whatever does not fit is named."""

import json
import pickle

import pytest
import torch
from omegaconf import OmegaConf

from common.checkpoint import export_weights, read_weights
from common.data.tokenizer import ByteTokenizer
from common.diffusion.schedules import Geometric, LogLinear
from common.errors import CheckpointError, ConfigError
from common.testing.golden import fill
from radd.export import ExportConfig, export
from radd.loading import (
    load_denoiser,
    load_model,
    read_reference_checkpoint,
    save_reference_checkpoint,
    save_reference_folder,
)
from radd.model import RADD, ModelConfig

PROPORTIONS = {"hidden_size": 16, "n_blocks": 2, "n_heads": 2, "length": 8}
CONFIG = {
    "ngpus": 4,
    "tokens": 128,
    "unknown_to_us": {"a": 1},
    "training": {"ema": 0.999, "loss_type": "t_DCE", "n_iters": 10},
    "data": {"train": "embedded", "tokenizer": "byte"},
    "noise": {"type": "geometric", "sigma_min": 1e-3, "sigma_max": 10.0},
    "model": {**PROPORTIONS, "name": "tiny", "type": "ddit_wot", "dtype": "float16", "scale_by_sigma": False},
}


@pytest.fixture
def model() -> RADD:
    return fill(RADD(ModelConfig(**PROPORTIONS), 128), 3, skip=("rotary_emb.inv_freq",))


def assert_same_weights(left: dict, right: dict) -> None:
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def reference_pth(path, model: RADD, *, shift: float = 0.0, config: dict | None = None) -> None:
    """As the reference's training writes it; every averaged tensor is its own constant (plus ``shift``)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shadows = [torch.full_like(p, index + shift) for index, p in enumerate(model.parameters())]
    content = {
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model": model.state_dict(),
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadows},
        "step": 7,
    }
    torch.save(content, path)
    if config is not None:
        (path.parents[1] / ".hydra").mkdir()
        OmegaConf.save(OmegaConf.create(config), path.parents[1] / ".hydra" / "config.yaml")


# ---------------------------------------------------------------- exported folders


def test_folder_round_trip_keeps_weights_config_and_the_reference_s_keys(tmp_path, model):
    save_reference_folder(tmp_path / "out", model, CONFIG, tokenizer=ByteTokenizer())
    loaded = load_model(tmp_path / "out")
    assert_same_weights(loaded.model.state_dict(), model.state_dict())
    assert loaded.schedule == Geometric(1e-3, 10.0)
    assert loaded.config["unknown_to_us"] == {"a": 1} and loaded.config["model"]["dtype"] == "float16"
    assert loaded.model.config.dtype is None and not loaded.model.training
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    network, noise = loaded
    assert network is loaded.model and noise is loaded.schedule
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"name", "type", "cond_dim", "dropout", "use_checkpoint", "dtype"} <= set(stored["model"])
    assert list(read_weights(tmp_path / "out" / "model.safetensors")) == sorted(model.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_released_config_without_optional_keys_loads_and_a_missing_one_is_named(tmp_path, model):
    config = {"tokens": 128, "model": PROPORTIONS}
    export_weights(tmp_path, model.state_dict(), config, "")
    loaded = load_model(tmp_path)
    assert loaded.schedule == LogLinear() and loaded.model.config.dropout == 0.02
    for missing in ("tokens", "model"):
        export_weights(tmp_path, model.state_dict(), {k: v for k, v in config.items() if k != missing}, "")
        with pytest.raises(ConfigError, match=f"^{missing} is missing"):
            load_model(tmp_path)
    export_weights(tmp_path, model.state_dict(), {"tokens": 128, "model": {"hidden_size": 16, "n_heads": 2}}, "")
    with pytest.raises(ConfigError, match="model.n_blocks is missing"):
        load_model(tmp_path)


def test_existing_model_is_not_overwritten_unless_asked(tmp_path, model):
    save_reference_folder(tmp_path / "out", model, CONFIG)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds a model already"):
        save_reference_folder(tmp_path / "out", fill(model, 4), CONFIG)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    save_reference_folder(tmp_path / "out", fill(model, 4), CONFIG, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_checkpoint_of_another_size_names_every_tensor(tmp_path, model):
    state = model.state_dict()
    del state["blocks.1.norm1.weight"]
    state["vocab_embed.embedding"] = state["vocab_embed.embedding"][:100].clone()
    state["blocks.2.norm1.weight"] = torch.ones(16)
    export_weights(tmp_path, state, CONFIG, "")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    for part in (
        "blocks.1.norm1.weight is missing",
        "blocks.2.norm1.weight is unexpected",
        "vocab_embed.embedding is (100, 16) instead of (129, 16)",
    ):
        assert part in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_weights_without_the_rotary_buffer_are_complete(tmp_path, model):
    state = {name: value for name, value in model.state_dict().items() if name != "rotary_emb.inv_freq"}
    export_weights(tmp_path, state, CONFIG, "")
    assert_same_weights(load_model(tmp_path).model.state_dict(), model.state_dict())


# ---------------------------------------------------------------- the reference's files


def test_averages_of_a_pth_land_in_the_right_tensors(tmp_path, model):
    """Every tensor of the list is a different constant, so a wrong order would show."""
    reference_pth(tmp_path / "run" / "checkpoints-meta" / "checkpoint.pth", model, config=CONFIG)
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints-meta" / "checkpoint.pth"):
        loaded = load_model(source)
        names = [name for name, _ in model.named_parameters()]
        assert names == [name for name in model.state_dict() if name != "rotary_emb.inv_freq"]
        for index, name in enumerate(names):
            assert (loaded.model.state_dict()[name] == index).all(), name
        assert loaded.schedule == Geometric(1e-3, 10.0)
    assert_same_weights(load_model(tmp_path / "run", ema=False).model.state_dict(), model.state_dict())


def test_pth_alone_tells_its_proportions(tmp_path, model, caplog):
    reference_pth(tmp_path / "alone.pth", model)
    loaded = load_model(tmp_path / "alone.pth", ema=False)
    config = loaded.model.config
    assert (config.hidden_size, config.n_blocks, config.n_heads, loaded.model.tokens) == (16, 2, 2, 128)
    assert "read off its tensors" in caplog.text
    assert_same_weights(loaded.model.state_dict(), model.state_dict())


def test_reference_run_config_with_a_dangling_reference_loads(tmp_path, model):
    config = CONFIG | {"load_dir": "${work_dir}"}
    reference_pth(tmp_path / "run" / "checkpoints-meta" / "checkpoint.pth", model, config=config)
    assert load_model(tmp_path / "run").config["tokens"] == 128


def test_pth_with_arbitrary_objects_is_refused_and_executes_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    torch.save({"model": {}, "ema": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="without executing code"):
        load_model(tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="without executing code"):
        load_model(tmp_path / "plain.pth")
    assert not (tmp_path / "executed").exists()


def test_damaged_and_misfitting_pth_are_named(tmp_path, model):
    reference_pth(tmp_path / "good.pth", model)
    whole = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut.pth", "empty.pth"):
        with pytest.raises(CheckpointError, match=f"{name} (is damaged|cannot be read)"):
            load_model(tmp_path / name)
    shadows = [p.detach() for p in model.parameters()]
    for wrong, message in (
        (shadows[:-1], "averaged tensors"),
        (shadows[::-1], "does not fit"),
    ):
        torch.save({"model": model.state_dict(), "ema": {"shadow_params": wrong}}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "bad.pth")
    torch.save({"step": 1}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="no entry 'model'"):
        load_model(tmp_path / "bad.pth")


def test_pth_round_trip_and_ddp_prefixes(tmp_path, model):
    averages = {name: value + 1 for name, value in model.state_dict().items()}
    save_reference_checkpoint(tmp_path / "a.pth", model.state_dict(), averages, step=5)
    state = read_reference_checkpoint(tmp_path / "a.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value if name == "rotary_emb.inv_freq" else value + 1)
    assert_same_weights(read_reference_checkpoint(tmp_path / "a.pth", ema=False), model.state_dict())
    with pytest.raises(CheckpointError, match="exists already"):
        save_reference_checkpoint(tmp_path / "a.pth", model.state_dict())
    prefixed = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": prefixed}, tmp_path / "b.pth")
    assert_same_weights(load_model(tmp_path / "b.pth", ema=True).model.state_dict(), model.state_dict())


@pytest.mark.parametrize("to, output", [("folder", "exported"), ("run", "exported"), ("pth", "exported.pth")])
def test_export_of_a_pth_loads_again(tmp_path, model, to, output, capsys):
    reference_pth(tmp_path / "run" / "checkpoints-meta" / "checkpoint.pth", model, config=CONFIG)
    assert export(ExportConfig(model_path=str(tmp_path / "run"), output=str(tmp_path / output), to=to)) == 0
    expected = load_model(tmp_path / "run").model.state_dict()
    assert_same_weights(load_model(tmp_path / output).model.state_dict(), expected)
    if to != "folder":  # both kinds of weights survive
        assert_same_weights(load_model(tmp_path / output, ema=False).model.state_dict(), model.state_dict())
    assert output in capsys.readouterr().out


# ---------------------------------------------------------------- what is not there


def test_nothing_loadable_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model.*it has nothing"):
        load_model(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model("runs/typo.pth")
    with pytest.raises(CheckpointError, match="hub.*copy the repository's config.json and model.safetensors"):
        load_model("nobody/no-such-model")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="safetensors file|no readable JSON"):
        load_model(tmp_path / "empty")
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"\.txt file"):
        load_model(tmp_path / "note.txt")


def test_denoiser_of_a_folder_gives_log_probabilities_with_an_impossible_mask(tmp_path, model):
    save_reference_folder(tmp_path / "out", model, CONFIG)
    masked = load_denoiser(tmp_path / "out")
    tokens = torch.full((2, 6), masked.mask_id)
    log_probs = masked.denoise(tokens, torch.ones(2, 6, dtype=torch.bool))
    assert log_probs.shape == (12, 129) and (log_probs[:, 128] == -torch.inf).all()
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(12), atol=1e-5)
    assert masked.length == 8 and masked.tokenizer.vocab_size == 128
