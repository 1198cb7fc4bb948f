"""Hypernetworks to disk and back."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from common.checkpoint import save_weights, write_checkpoint
from common.errors import CheckpointError
from common.parallel import Parallel
from logah.checkpoints import build_empty, load_hypernetwork, load_state, save_hypernetwork
from logah.graph_batch import collate
from logah.net_graph import NetGraph, Node
from tests.logah.tiny_hypernetwork import (
    assert_same_weights,
    reference_state,
    tiny_config,
    tiny_hypernetwork,
    write_published,
    write_trainer_checkpoint,
)


def two_node_graph():
    import numpy as np

    nodes = (Node("input", 9), Node("conv.weight", 4, (8, 3, 3, 3), listed=True))
    return collate([NetGraph(nodes, np.array([[0, 1], [0, 0]], dtype=np.int16), 50)])


FOLDERS = [
    {},
    {"decoder": "dense"},
    {"variant": "llm"},
    {"use_1d_decoder": True},
    {"decoder": "lowrank_v2"},
    {"decoder": "ghn2"},
]


@pytest.mark.parametrize("options", FOLDERS)
def test_a_folder_gives_the_same_hypernetwork_back(tmp_path: Path, options: dict):
    model = tiny_hypernetwork(**options)
    save_hypernetwork(tmp_path / "saved", model, {"seed": 5, "step": 12})
    loaded = load_hypernetwork(tmp_path / "saved")
    assert loaded.config == model.config
    assert_same_weights(loaded.model, model)
    assert loaded.metadata["seed"] == 5 and loaded.metadata["step"] == 12 and "git_revision" in loaded.metadata
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model(two_node_graph()), model(two_node_graph()))


def test_the_file_itself_and_the_run_around_an_export_load_too(tmp_path: Path):
    model = tiny_hypernetwork()
    save_hypernetwork(tmp_path / "run" / "export", model)
    assert_same_weights(load_hypernetwork(tmp_path / "run").model, model)
    assert_same_weights(load_hypernetwork(tmp_path / "run" / "export" / "model.safetensors").model, model)


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint(tmp_path: Path):
    raw, averaged = tiny_hypernetwork(), tiny_hypernetwork(seed=9)

    def stage(folder: Path) -> None:
        save_weights(folder / "model.safetensors", {f"module.{k}": v for k, v in raw.state_dict().items()})
        save_weights(folder / "ema.safetensors", averaged.state_dict())

    config = {"seed": 4, "model": asdict(raw.config)}
    write_checkpoint(tmp_path, 3, [stage], config=config, parallel=Parallel(0, 1, 0, torch.device("cpu")))
    assert_same_weights(load_hypernetwork(tmp_path, ema=False).model, raw)
    loaded = load_hypernetwork(tmp_path)
    assert_same_weights(loaded.model, averaged)
    assert loaded.config == raw.config and loaded.metadata["seed"] == 4 and loaded.digest is None


@pytest.mark.parametrize("options", [{}, {"decoder": "dense"}])
@pytest.mark.parametrize("compress", [0, 3])
def test_a_published_file_loads_without_options(tmp_path: Path, options: dict, compress: int):
    model = tiny_hypernetwork(**options)
    loaded = load_hypernetwork(write_published(tmp_path / "ghn3tm8.pt", model, compress=compress))
    assert replace(loaded.config, lora_r=32, max_ck_lora=32768) == replace(model.config, lora_r=32, max_ck_lora=32768)
    assert_same_weights(loaded.model, model)
    assert loaded.metadata["released"] == "ghn3tm8.pt" and len(loaded.digest) == 64


def test_a_checkpoint_of_the_references_trainer_loads_and_a_folder_with_one_too(tmp_path: Path):
    model = tiny_hypernetwork(heads=4)
    path = write_trainer_checkpoint(tmp_path / "checkpoint.pt", model)
    for source in (path, tmp_path):
        loaded = load_hypernetwork(source)
        assert loaded.config == model.config and loaded.metadata["epoch"] == 7
        assert_same_weights(loaded.model, model)


def test_half_precision_weights_are_used_in_float32(tmp_path: Path):
    model = tiny_hypernetwork()
    path = write_trainer_checkpoint(
        tmp_path / "checkpoint.pt", model, state_dict={k: v.half() for k, v in reference_state(model).items()}
    )
    loaded = load_hypernetwork(path)
    assert loaded.model.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.model.embed.weight, model.embed.weight.half().float())


def test_only_placeholders_may_be_absent():
    model = tiny_hypernetwork()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder_1d.", "decoder.l1."))}
    empty = build_empty(model.config)
    load_state(empty, state, "file")
    assert not any(p.is_meta for p in empty.parameters())
    model = tiny_hypernetwork(use_1d_decoder=True)  # here they are read
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("bias_class.")}
    with pytest.raises(CheckpointError, match=r"bias_class\.1\.weight is missing"):
        load_state(build_empty(model.config), state, "file")


def test_wrong_shapes_name_the_tensor_and_both_shapes():
    state = dict(tiny_hypernetwork().state_dict())
    state["gnn.0.ln1.weight"] = torch.ones(9)
    del state["gnn.1.ln2.bias"]
    state["extra"] = torch.ones(1)
    with pytest.raises(CheckpointError) as error:
        load_state(build_empty(tiny_config()), state, "broken.pt")
    for part in ("broken.pt", "gnn.0.ln1.weight is (9,) instead of (16,)", "gnn.1.ln2.bias is missing", "extra"):
        assert part in str(error.value)


def test_options_that_weights_depend_on_cannot_be_changed_and_others_can(tmp_path: Path):
    save_hypernetwork(tmp_path / "saved", tiny_hypernetwork())
    with pytest.raises(CheckpointError, match="made with attention=explicit and cannot be used with attention=as_is"):
        load_hypernetwork(tmp_path / "saved", attention="as_is")
    loaded = load_hypernetwork(tmp_path / "saved", normalisation="none", heads=8, ve_cutoff=None)
    assert loaded.config.rule == "none"
    assert load_hypernetwork(tmp_path / "saved", variant="llm").model.embed.num_embeddings == 18


@pytest.mark.parametrize("name, words", [("ghn3xlm16.pt", "hf download"), ("absent", "does not exist")])
def test_what_is_not_there_is_named_with_the_remedy(tmp_path: Path, name: str, words: str):
    with pytest.raises(CheckpointError, match=words):
        load_hypernetwork(tmp_path / name)


def test_folders_without_a_hypernetwork_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"it has notes\.txt"):
        load_hypernetwork(tmp_path)
    with pytest.raises(CheckpointError, match="no weight file"):
        load_hypernetwork(tmp_path / "notes.txt")
    other = tmp_path / "other"
    other.mkdir()
    save_weights(other / "model.safetensors", {"a": torch.ones(1)})
    (other / "config.json").write_text(json.dumps({"hidden_size": 1}))
    with pytest.raises(CheckpointError, match="no part `model`"):
        load_hypernetwork(other)


def test_an_unknown_option_in_a_folder_is_named(tmp_path: Path):
    folder = save_hypernetwork(tmp_path / "saved", tiny_hypernetwork())
    described = json.loads((folder / "config.json").read_text())
    described["model"]["rank"] = 3
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"model\.rank is not an option"):
        load_hypernetwork(folder)
