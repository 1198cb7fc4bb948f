"""Streamed predictions: the same bits as in memory, loadable by transformers, in little memory, whole or not at all."""

import json
import math

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from logah import row_chunks
from logah.architectures import Architecture, gpt2, llama, resolve_target, vit
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.postprocess import break_symmetry, count_layers, reinitialise_residual
from logah.prediction import fill
from logah.prediction_folder import load_prediction, read_report, read_state
from logah.shard_writer import INDEX_FILE, NullSink
from logah.streaming import StreamOptions, plan_prediction, predict_to_folder, stream_prediction

IDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = gpt2(n_embd=24, n_layer=2, n_head=2, vocab_size=100, n_positions=16, **IDS)
TIED = gpt2(n_embd=24, n_layer=2, n_head=2, vocab_size=100, n_positions=16, tie_word_embeddings=True, **IDS)
LLAMA = llama(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=100)
VIT = vit(patch_size=4, num_layers=2, num_heads=2, hidden_dim=24)
CONVOLUTIONS = resolve_target({"family": "torchvision", "options": {"name": "shufflenet_v2_x0_5", "num_classes": 10}})
SMALL = {"hid": 16, "heads": 2, "layers": 2, "lora_r": 4, "max_ck_lora": 2048, "max_shape": (32, 32, 16, 16)}


def build_hypernetwork(variant: str, **options) -> HyperNetwork:
    torch.manual_seed(0)
    return HyperNetwork(HyperNetworkConfig(variant=variant, **SMALL | options)).eval()


@pytest.fixture(scope="module")
def language() -> HyperNetwork:
    return build_hypernetwork("llm")


@pytest.fixture(scope="module")
def vision() -> HyperNetwork:
    return build_hypernetwork("vision")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the matrices of tiny networks need several blocks."""
    monkeypatch.setattr(row_chunks, "BLOCK_VALUES", 150)


def filled(hypernetwork: HyperNetwork, architecture: Architecture) -> torch.nn.Module:
    torch.manual_seed(1)
    module = architecture.build()
    fill(hypernetwork, module, image_size=architecture.image_size)
    return module


@pytest.mark.parametrize("architecture", [GPT2, TIED, LLAMA], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_a_streamed_language_model_is_the_filled_one_bit_for_bit(tmp_path, language, architecture, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    options = StreamOptions(max_shard_bytes=max_shard_bytes)
    report = predict_to_folder(language, architecture, tmp_path / "out", options)
    assert (tmp_path / "out" / INDEX_FILE).exists() == (max_shard_bytes == 20_000)
    expected = filled(language, architecture).state_dict()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert report.kept == () and report.num_parameters == sum(p.numel() for p in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tied = architecture.options.get("tie_word_embeddings")
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


@pytest.mark.parametrize(
    "decoder", [{}, {"decoder": "dense"}, {"use_1d_decoder": True}, {"decoder": "lowrank_v2"}], ids=str
)
def test_a_streamed_vision_network_fills_its_class_strictly(tmp_path, decoder):
    hypernetwork = build_hypernetwork("vision", **decoder)
    report = predict_to_folder(hypernetwork, VIT, tmp_path / "out")
    assert report.kept in ((), ("class_token",))
    expected = filled(hypernetwork, VIT).state_dict()
    found = load_prediction(tmp_path / "out").state_dict()
    for name in report.predicted:
        assert torch.equal(found[name], expected[name]), name


def test_what_no_node_gives_is_seeded_stored_and_listed(tmp_path, vision):
    states, reports = [], []
    for number, seed in enumerate((3, 3, 4)):
        options = StreamOptions(seed=seed, predict_class_layers=False)
        reports.append(predict_to_folder(vision, CONVOLUTIONS, tmp_path / str(number), options))
        states.append(read_state(tmp_path / str(number)))
    first, same, other = states
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert reports[0].kept == ("fc.weight", "fc.bias")
    assert not torch.equal(first["fc.weight"], other["fc.weight"]) and first["fc.weight"].std() > 0
    assert all(torch.equal(first[name], other[name]) for name in reports[0].predicted)
    assert set(reports[0].buffers) == {name for name in first if "running_" in name or "num_batches" in name}
    assert torch.equal(first["conv1.1.running_var"], torch.ones(24))
    listed = read_report(tmp_path / "0")
    assert listed["seed"] == 3 and listed["kept"] == ["fc.weight", "fc.bias"] and listed["git_revision"] is not None
    assert set(listed["buffers"]) == set(reports[0].buffers) and listed["predicted"]["conv1.0.weight"] == "kernel"
    load_prediction(tmp_path / "0")


def test_strict_refuses_a_network_of_which_something_is_not_predicted(tmp_path, vision):
    with pytest.raises(ConfigError, match="no node of vit.*gives class_token; with strict=false"):
        predict_to_folder(vision, VIT, tmp_path / "out", StreamOptions(strict=True))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_the_rounded_prediction_in_half_the_bytes(tmp_path, language):
    plain = predict_to_folder(language, GPT2, tmp_path / "fp32")
    half = predict_to_folder(language, GPT2, tmp_path / "bf16", StreamOptions(dtype=torch.bfloat16))
    assert half.num_bytes * 2 == plain.num_bytes
    expected, found = read_state(tmp_path / "fp32"), read_state(tmp_path / "bf16")
    for name, value in expected.items():
        assert torch.equal(found[name], value.bfloat16()), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("options", [{"noise": 0.3}, {"orthogonalise": True}, {"reinit_residual": True, "noise": 0.1}])
def test_what_follows_the_prediction_is_the_same_streamed_and_in_memory(tmp_path, language, options):
    report = predict_to_folder(language, GPT2, tmp_path / "out", StreamOptions(seed=5, **options))
    module = filled(language, GPT2)
    if options.get("reinit_residual"):
        drawn = reinitialise_residual(module, count_layers(dict(module.named_parameters())), seed=5)
        assert set(report.drawn) == set(drawn) and len(drawn) == 4
    break_symmetry(module, options.get("noise", 0.0), seed=5, orthogonalise=options.get("orthogonalise", False))
    found = read_state(tmp_path / "out")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.allclose(found[name], filled(language, GPT2).state_dict()[name])


def test_every_block_is_small_and_every_value_comes_once(language):
    class Watching(NullSink):
        largest = 0

        def write(self, name, value, start=0):
            super().write(name, value, start)
            self.largest = max(self.largest, value.numel()) if value.ndim == 2 else self.largest

    plan, sink = plan_prediction(language.config, GPT2), Watching()
    report = stream_prediction(language, plan, sink)
    assert sink.num_bytes == plan.num_bytes == report.num_bytes
    assert sink.largest <= 150 < max(math.prod(tensor.shape) for tensor in plan.tensors)


def test_a_decoder_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    hypernetwork = build_hypernetwork("llm", max_ck_lora=48)
    with pytest.raises(ConfigError, match="model.max_ck_lora=48 is too small for transformer"):
        predict_to_folder(hypernetwork, GPT2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_kinds_of_nodes_that_it_does_not_know_is_refused(tmp_path, vision):
    with pytest.raises(ConfigError, match="rmsnorm"):
        predict_to_folder(vision, LLAMA, tmp_path / "out")


def test_a_full_disk_leaves_the_old_prediction_as_it_was(tmp_path, language, monkeypatch):
    import errno

    from logah import shard_writer

    predict_to_folder(language, GPT2, tmp_path / "out")
    before = read_state(tmp_path / "out")
    with pytest.raises(CheckpointError, match="overwrite=true"):
        predict_to_folder(language, TIED, tmp_path / "out")

    def full(file, data, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "_write_all", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        predict_to_folder(language, TIED, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    after = read_state(tmp_path / "out")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
