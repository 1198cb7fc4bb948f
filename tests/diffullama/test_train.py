"""The training command as a user runs it: a parent, its adaptation, finetuning, what each leaves behind; resuming."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from common import cli
from common.checkpoint import find_checkpoint, load_weights, step_of
from common.errors import ConfigError
from common.tracking import read_records
from diffullama.loading import load_model
from diffullama.lora import has_adapter
from diffullama.task import AdaptationTask
from diffullama.train import train
from tests.diffullama.test_config import build

SMALL = [
    "precision=fp32",
    "parallel=none",
    "data=local",
    "data.num_workers=0",
    "training.batch_size=4",
    "training.log_freq=1",
    "training.eval_freq=0",
    "sampling.texts=1",
    "sampling.steps=4",
    "optim.lr=1e-2",
    "optim.warmup=0",
    "tracking.progress=false",
]
NETWORK = "model.architecture={model_type: gpt2, n_positions: 32, n_embd: 16, n_layer: 1, n_head: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text to train on, and an autoregressive parent of byte tokens."""
    path = tmp_path_factory.mktemp("runs")
    lines = [{"text": f"the {n} sheep sleep in the {n * 7 % 13} sheds " * 3} for n in range(40)]
    (path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(path, "parent", "model=gpt2_tiny", NETWORK, "objective=pt", "data.tokenizer=byte") == 0
    return path


def run(folder: Path, name: str, *options: str, steps: int = 3) -> int:
    """``python -m diffullama.train`` in this process."""
    places = [f"run_dir={folder / name}", f"data.train={folder / 'text.jsonl'}", f"data.cache_dir={folder / 'data'}"]
    return train(build(*SMALL, *places, "model.length=16", f"training.n_iters={steps}", *options))


def saved(run_dir: Path) -> tuple[dict, dict]:
    """config.json and quintet.json of the exported model."""
    return tuple(json.loads((run_dir / "export" / name).read_text()) for name in ("config.json", "quintet.json"))


def test_a_parent_is_saved_as_what_it_is_and_adapted_without_naming_its_mask(folder):
    config, metadata = saved(folder / "parent")
    assert "mask_token_id" not in config and config.get("is_causal", True)
    assert metadata["is_causal"] and metadata["mask_token_id"] is None
    parent = f"model.path={folder / 'parent'}"
    assert run(folder, "child", "model=hf", parent, "objective.anneal_steps=2", "model.dropout=0") == 0
    config, metadata = saved(folder / "child")
    assert (config["is_causal"], config["mask_token_id"], config["diffusion_shift"]) == (False, 128, True)
    assert metadata["special_tokens"]["mask_id"] == metadata["mask_token_id"] == 128
    assert load_model(folder / "child").model.mask_id == 128

    adapter = ["peft=lora", "peft.r=2", "objective=ddm-sft", "data=arithmetic", "data.tokenizer=null"]
    pairs = ["data.train=arithmetic:8", "data.valid=null", "model.length=32"]
    child = f"model.path={folder / 'child'}"
    assert run(folder, "tuned", "model=hf", child, *adapter, *pairs) == 0
    tuned, alone = load_model(folder / "tuned"), load_model(folder / "tuned" / "adapter")
    assert has_adapter(tuned.model) and has_adapter(alone.model)
    x_BL = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_model(folder / "tuned" / "export").model(x_BL)
        assert torch.allclose(tuned.model(x_BL), expected, atol=1e-5)
        assert torch.allclose(alone.model(x_BL), expected, atol=1e-5)


def test_an_adapted_model_trained_autoregressively_is_saved_as_causal(folder):
    assert run(folder, "adapted", "model=hf", f"model.path={folder / 'parent'}", "objective.anneal_steps=1") == 0
    assert run(folder, "back", "model=hf", f"model.path={folder / 'adapted'}", "objective=pt") == 0
    config, metadata = saved(folder / "back")
    assert not {"is_causal", "mask_token_id", "diffusion_shift"} & set(config)
    assert metadata["is_causal"] and metadata["mask_token_id"] is None


def test_a_run_stopped_by_a_signal_continues_bit_for_bit(folder, monkeypatch):
    steps, stop_at = 6, 2
    options = ["model=hf", f"model.path={folder / 'parent'}", "objective.anneal_steps=5", "model.dropout=0.2"]
    options += ["training.ema=0.5", "training.accum=2"]
    assert run(folder, "whole", *options, steps=steps) == 0
    step = AdaptationTask.training_step

    def stopping(self, model, batch, draws):
        if int(draws["step"][0]) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, model, batch, draws)

    monkeypatch.setattr(AdaptationTask, "training_step", stopping)
    assert run(folder, "cut", *options, steps=steps) == cli.EXIT_REQUEUE
    assert (folder / "cut" / "REQUEUE").is_file() and not (folder / "cut" / "export").exists()
    assert stop_at < step_of(find_checkpoint(folder / "cut")) < steps  # all processes agree on it one step later
    monkeypatch.undo()
    assert run(folder, "cut", *options, steps=steps) == 0
    for ema in (False, True):
        found, expected = (load_weights(folder / name, ema=ema)[0] for name in ("cut", "whole"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"ema={ema} {name}"
    names = ("step", "train/loss", "train/grad_norm", "train/lr", "train/anneal_ratio")
    records = [
        [[record.get(name) for name in names] for record in read_records(folder / run_dir)]
        for run_dir in ("cut", "whole")
    ]
    assert records[0] == records[1] and len(records[0]) == steps
    ratios = [record[-1] for record in records[0]]
    assert ratios == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_finished_run_says_so_and_keeps_its_weights(folder, caplog):
    before = load_weights(folder / "parent", ema=False)[0]
    assert run(folder, "parent", "model=gpt2_tiny", NETWORK, "objective=pt", "data.tokenizer=byte") == 0
    assert "is finished" in caplog.text
    after = load_weights(folder / "parent", ema=False)[0]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_backend_for_later_is_missed_before_the_first_step(folder):
    with pytest.raises(ConfigError, match="attn_implementation=flash_attention_2 cannot be used"):
        run(
            folder,
            "flash",
            "model=hf",
            f"model.path={folder / 'parent'}",
            "precision=bf16",
            "model.opened_attention=flash_attention_2",
        )
    assert find_checkpoint(folder / "flash") is None


def test_a_model_that_is_nowhere_is_named_by_its_option(folder):
    with pytest.raises(ValueError, match=r"^model.path=.*/nowhere does not exist"):
        run(folder, "lost", "model=hf", f"model.path={folder / 'nowhere'}")


def test_nothing_is_printed_per_step_and_no_tracker_is_imported(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    lines = []
    for name, steps in (("short", 1), ("longer", 5)):
        assert run(folder, name, "model=gpt2_tiny", NETWORK, "data.tokenizer=byte", steps=steps) == 0
        shown = capfd.readouterr()
        assert shown.out == ""
        lines.append(len(shown.err.splitlines()))
    assert lines[0] == lines[1]
