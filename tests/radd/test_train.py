"""``python -m radd.train`` trains, resumes, exports and refuses what cannot work; called in this process."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import cli
from common.checkpoint import find_checkpoint
from common.tracking import read_records
from radd.loading import load_model
from radd.train import main

SMALL = [
    "model=tiny_radd",
    "model.hidden_size=16",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.length=16",
    "data=embedded",
    "data.train=embedded:topics",
    "data.valid=embedded:topics",
    "training.batch_size=4",
    "training.n_iters=6",
    "training.log_freq=2",
    "training.eval_freq=3",
    "training.snapshot_freq=0",
    "training.snapshot_freq_for_preemption=3",
    "training.loss_type=k_DCE",
    "eval.batch_size=8",
    "eval.micro_batch_size=4",
    "eval.perplexity=false",
    "optim.warmup=2",
    "precision=fp32",
    "tracking.progress=false",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(tmp_path: Path, cache: Path, monkeypatch, capsys):
    """Runs the command in an empty folder: ``train(*overrides) -> (exit code, stdout, stderr)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "OTHER_RANKS_WAIT_SECONDS", 0.0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "QUINTET_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["radd.train", *SMALL, f"data.cache_dir={cache}", "run_dir=run", *overrides])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_run_leaves_metrics_checkpoints_and_a_model(train):
    code, _, err = train()
    assert code == 0, err
    run = Path("run")
    records = read_records(run)
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(records[0])
    assert "validation/loss" in records[1]
    assert find_checkpoint(run).name == "step_00000006"
    exported = json.loads((run / "export" / "config.json").read_text())
    # the nested layout of released configurations, so that the reference can load the folder
    assert (exported["tokens"], exported["model"]["hidden_size"], exported["noise"]["type"]) == (128, 16, "loglinear")
    assert exported["training"]["loss_type"] == "k_DCE"
    ema = load_file(find_checkpoint(run) / "ema.safetensors")
    for name, tensor in load_file(run / "export" / "model.safetensors").items():
        assert tensor.equal(ema[name]), name
    card = (run / "export" / "README.md").read_text()
    assert "radd.generate model_path=" in card
    assert "hidden_size" in card
    assert json.loads((run / "config.json").read_text())["training"]["batch_size"] == 4


def test_the_same_command_continues_and_then_says_that_it_is_finished(train):
    assert train("training.n_iters=6", "run_dir=whole")[0] == 0
    assert train("training.n_iters=6", "run_dir=cut")[0] == 0
    # back to the middle: as if the run had been killed after its first checkpoint
    Path("cut/checkpoints/step_00000006/manifest.json").unlink()
    code, _, err = train("training.n_iters=6", "run_dir=cut")
    assert code == 0, err
    whole, cut = (load_file(find_checkpoint(Path(run)) / "model.safetensors") for run in ("whole", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())
    losses = [[(r["step"], r.get("train/loss")) for r in read_records(run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert train("training.n_iters=6", "run_dir=cut")[0] == 0


def test_a_changed_option_is_refused_with_its_name_and_allowed_on_request(train):
    assert train("training.n_iters=3")[0] == 0
    code, _, err = train("training.n_iters=3", "optim.lr=1e-3")
    assert code == 2
    assert "optim.lr: 0.0003 -> 0.001" in err
    assert "allow_config_change=true" in err
    assert train("training.n_iters=3", "optim.lr=1e-3", "allow_config_change=true")[0] == 0


def test_a_signal_ends_the_run_with_a_checkpoint_and_a_mark(train, monkeypatch):
    from radd import train as module

    class Interrupting(module.RADDTask):
        def draw(self, step: int, size: int) -> dict:
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().draw(step, size)

    monkeypatch.setattr(module, "RADDTask", Interrupting)
    code, _, err = train("training.snapshot_freq_for_preemption=100")
    assert code == cli.EXIT_REQUEUE, err
    assert Path("run/REQUEUE").is_file()
    assert find_checkpoint(Path("run")).name == "step_00000004"
    assert not Path("run/export").exists()


class ByteScorer(torch.nn.Module):
    """A causal language model that finds all 128 tokens equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **options):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 128)})


def test_texts_of_a_snapshot_are_scored_whatever_the_batch_of_the_scorer(train, monkeypatch):
    from common.evaluation import generative_perplexity

    scorer = generative_perplexity.Scorer(ByteScorer().eval(), "bytes", 128, 64)
    monkeypatch.setattr(generative_perplexity, "load_scorer", lambda name, device: scorer)
    # 3 texts, 16 at a time: the reference divides by zero here
    overrides = ["training.n_iters=1", "training.snapshot_freq=1", "sampling.batch_size=3", "sampling.steps=2"]
    assert train(*overrides, "eval.perplexity=true", "training.eval_freq=0")[0] == 0
    assert read_records(Path("run"))[-1]["snapshot/generative_perplexity"] == pytest.approx(128, rel=1e-4)


def test_a_missing_scorer_is_a_warning_and_not_the_end_of_the_run(train, caplog):
    overrides = ["training.n_iters=1", "training.snapshot_freq=1", "sampling.batch_size=1", "sampling.steps=2"]
    code, _, _ = train(*overrides, "eval.perplexity=true", "gpt_dir=./nowhere", "training.eval_freq=0")
    assert code == 0
    assert "texts are not scored: the scorer's folder './nowhere' does not exist" in caplog.text
    assert "snapshot/generative_perplexity" not in read_records(Path("run"))[-1]
    assert Path("run/samples/iter_1/sample_0.txt").is_file()


@pytest.mark.parametrize("predictor", ["euler", "tweedie", "ordered", "first_hitting"])
def test_snapshots_hold_weights_and_texts(train, predictor: str):
    code, _, err = train(
        "training.n_iters=2", "training.snapshot_freq=1", f"sampling.predictor={predictor}", "sampling.steps=4",
        "sampling.batch_size=3", "training.save_reference_pth=true", "training.eval_freq=0",
    )  # fmt: skip
    assert code == 0, err
    for step in (1, 2):
        texts = Path(f"run/samples/iter_{step}/sample_0.txt").read_text().split("\n" + "=" * 92 + "\n")
        assert len(texts) == 4
        assert texts[-1] == ""
        weights = load_file(f"run/snapshots/iter_{step}/model.safetensors")
        # the reference's file: averaged weights in parameter order
        saved = torch.load(f"run/checkpoints/checkpoint_{step}.pth", weights_only=True)
        names = [name for name in saved["model"] if name != "rotary_emb.inv_freq"]
        assert saved["step"] == step
        for name, shadow in zip(names, saved["ema"]["shadow_params"], strict=True):
            assert shadow.equal(weights[name]), name
    assert Path("run/checkpoints/step_00000002").is_dir()


@pytest.mark.parametrize("path", ["run/snapshots/iter_2", "run/checkpoints/checkpoint_2.pth", "run/export", "run"])
def test_what_a_run_leaves_loads_as_a_model(train, path: str):
    overrides = ["training.n_iters=2", "training.snapshot_freq=2", "training.snapshot_sampling=false"]
    assert train(*overrides, "training.save_reference_pth=true", "training.eval_freq=0")[0] == 0
    loaded = load_model(path)
    for name, tensor in load_file("run/export/model.safetensors").items():
        assert loaded.model.state_dict()[name].equal(tensor), name
    assert loaded.tokenizer.vocab_size == 128


def test_dry_run_prints_the_cost_and_writes_nothing(train):
    code, out, _ = train(
        "experiment=medium_k_dce_400k",
        "model=medium_radd",
        "model.hidden_size=1024",
        "model.n_blocks=24",
        "model.n_heads=16",
        "model.length=1024",
        "tokens=50257",
        "training.batch_size=512",
        "dry_run=true",
    )
    assert code == 0
    assert "405,191,762" in out
    for plan in ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3"):
        assert f"\n{plan} " in out.replace("\n ", "\n")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "override,message",
    [
        ("training.loss_type=t_DC", "training.loss_type='t_DC' is not known; choose one of t_DSE, t_DCE, lambda_DCE"),
        ("noise.type=linear", "noise.type='linear' is not known; choose one of loglinear, geometric."),
        ("sampling.strategy=top-p", "sampling.strategy='top-p' is not known"),
        ("sampling.steps=0", "sampling.steps=0 is too small; it must be at least 1."),
        ("training.n_iters=0", "training.n_iters=0 is too small"),
        ("training.accum=3", "training.batch_size=4 cannot be shared out evenly"),
        ("optim.optimizer=SGD", "optim.optimizer='SGD' is not known; choose one of AdamW, Adam, AdamW8bit, LAMB."),
        ("model.dtype=float64", "model.dtype='float64' is not known"),
        ("model.n_heads=3", "model.hidden_size=16 is not a multiple of model.n_heads=3"),
        ("model.n_heads=16", "gives heads of odd width 1"),
        ("model.dropout=1", "model.dropout=1.0 must lie in [0, 1)."),
        ("model=smal_radd", "model=smal_radd is not known; choose one of medium_radd, small_radd, tiny_radd."),
        ("trainig.ema=0.9", "trainig.ema is not an option; did you mean training.ema?"),
        ("ngpus=2", "ngpus=2 does not fit the 1 process started"),
        ("tokens=100", "tokens=100, but the tokenizer byte has 128; set tokens=128"),
        ("data.train=missing.txt", "missing.txt"),
        ("data.train=wikitext13", "did you mean 'wikitext103'?"),
        ("data.tokenizer=./nowhere", "Tokenizer folder './nowhere' does not exist"),
        ("model.length=10000000", "fewer than one block of length=10000000"),
        ("run_dir=/proc/nowhere", "run_dir=/proc/nowhere cannot be used"),
    ],
)
def test_bad_input_is_one_error_with_exit_code_2_and_writes_no_run(train, override: str, message: str):
    code, _, err = train(override)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Traceback" not in err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("binary.txt", b"text\x00\xff\xfe" * 50, "binary.txt"),
        ("cut.jsonl", b'{"text": "whole"}\n{"text": "cu', "cut.jsonl, line 2: not valid JSON"),
        ("broken.parquet", b"PAR1 not really", "broken.parquet is not a complete parquet file"),
    ],
)
def test_unusable_data_files_are_named(train, name: str, content: bytes, message: str):
    Path(name).write_bytes(content)
    code, _, err = train(f"data.train={name}")
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_checkpoint_of_another_size_is_named(train):
    assert train("training.n_iters=1")[0] == 0
    code, _, err = train("training.n_iters=2", "model.hidden_size=32", "allow_config_change=true")
    assert code == 2
    assert "shape" in err.splitlines()[-1]
    assert find_checkpoint(Path("run")).name == "step_00000001"  # nothing written is lost


def test_a_run_on_local_files_learns_its_own_tokenizer(train):
    words = ["masked", "diffusion", "models", "reveal", "tokens", "in", "any", "order"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(1, 200)]
    Path("train.txt").write_text("\n".join(lines))
    Path("valid.txt").write_text("\n".join(lines[:50]))
    overrides = ["data.train=train.txt", "data.valid=valid.txt", "data.tokenizer=bpe:300", "data.text_unit=line"]
    code, _, err = train(*overrides, "tokens=1024")
    assert code == 2
    size = err.rpartition("set tokens=")[2].split()[0]
    assert train(*overrides, f"tokens={size}")[0] == 0
    assert (Path("run/export") / "tokenizer.json").is_file()
