"""From a folder of checkpoints over a short run to networks that load: state dicts, and a language model's adapters."""

import shutil
from pathlib import Path

import pytest
import torch

from rpg.checkpoint_files import read_checkpoint
from rpg.config import TrainConfig, TrainingConfig
from rpg.data import DataSection
from rpg.generation_config import GenerateConfig, SamplingOverrides
from rpg.generation_run import generate_networks
from rpg.loading import load_generator
from rpg.sampling import SamplerConfig
from rpg.training import run_training
from tests.rpg.tiny_generator import DIM, TinyNet, networks

MODEL = {
    "d_model": 32, "d_state": 8, "headdim": 16, "chunk_size": 8, "channels": [1, 4, 8, 4, 1], "kernel_size": 3,
    "diffusion_steps": 50,
}  # fmt: skip


def train(run: Path, checkpoints: Path, **data) -> None:
    config = TrainConfig(
        run_dir=str(run),
        model=MODEL,
        data=DataSection(name="tiny", checkpoints=str(checkpoints), dim_per_token=DIM, **data),
        training=TrainingConfig(batch_size=2, n_iters=4, save_freq=2, diffusion_batch=16, log_freq=4),
        sampling=SamplerConfig(steps=3),
    )
    run_training(config)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    (root / "checkpoints").mkdir()
    for number, state in enumerate(networks()):
        torch.save(state, root / "checkpoints" / f"{number:04d}_acc0.9000_seed{number % 2:04d}_tiny.pth")
    train(root / "run", root / "checkpoints", normalisation="residual")
    return root / "run"


def test_a_finished_run_makes_networks_without_its_checkpoints(run_dir, tmp_path):
    shutil.move(run_dir.parent / "checkpoints", tmp_path / "away")
    try:
        generation = generate_networks(
            GenerateConfig(generator=str(run_dir), num_generated=2, output=str(tmp_path / "made"), progress=False)
        )
    finally:
        shutil.move(tmp_path / "away", run_dir.parent / "checkpoints")
    assert generation.evaluations == 3  # the run's sampler
    for record in generation.records:
        assert record["group"] in ("seed0000", "seed0001")
        TinyNet().load_state_dict(read_checkpoint(tmp_path / "made" / record["file"]), strict=True)
    loaded = load_generator(run_dir)
    assert loaded.normalisation == "residual"
    assert loaded.metadata["step"] == 4
    assert loaded.facts.num_checkpoints == 4


def test_a_run_that_has_not_ended_gives_its_newest_average(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "export")
    finished, running = load_generator(run_dir), load_generator(copy)
    for name, value in finished.model.state_dict().items():
        assert torch.equal(running.model.state_dict()[name], value), name
    assert running.config == finished.config
    plain = load_generator(copy, use_ema=False).model.state_dict()
    assert any(not torch.equal(plain[name], value) for name, value in finished.model.state_dict().items())


def test_generated_adapters_run_in_their_language_model(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def language_model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes)).eval()

    options = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        for number in range(3):
            adapted = get_peft_model(language_model(), options)
            torch.manual_seed(number)
            for value in adapted.parameters():
                if value.requires_grad:
                    value.data.add_(0.1 * torch.randn_like(value))
            adapted.save_pretrained(tmp_path / "adapters" / f"step{number}")
        train(tmp_path / "run", tmp_path / "adapters")
        config = GenerateConfig(
            generator=str(tmp_path / "run"), num_generated=1, format="peft", output=str(tmp_path / "made"),
            sampling=SamplingOverrides(steps=2), progress=False,
        )  # fmt: skip
        (record,) = generate_networks(config).records
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            before = language_model()(tokens).logits
            adapted = PeftModel.from_pretrained(language_model(), tmp_path / "made" / record["file"]).eval()
            after = adapted(tokens).logits
    stored = read_checkpoint(tmp_path / "made" / record["file"])
    loaded = {name.replace(".default", ""): value for name, value in adapted.state_dict().items() if "lora_" in name}
    assert len(stored) == len(loaded) == 6
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after)
