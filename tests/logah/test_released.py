"""Files of the reference implementations: options from tensors, names, copies, tables of language models."""

from pathlib import Path

import joblib
import pytest
import torch

from common.errors import CheckpointError
from common.testing.golden import load_cases
from logah.checkpoints import build_empty, load_state
from logah.model_config import HyperNetworkConfig
from logah.released import (
    Released,
    add_aliases,
    drop_aliases,
    extend_tables,
    infer_config,
    own_layout,
    read_released,
    reference_options,
)
from tests.logah.tiny_hypernetwork import (
    reference_state,
    tiny_config,
    tiny_hypernetwork,
    write_published,
    write_trainer_checkpoint,
)

KINDS = {
    "lowrank": {},
    "lowrank_1d": {"use_1d_decoder": True},
    "dense": {"decoder": "dense"},
    "llm": {"variant": "llm"},
    "without_last_norm": {"layernorm": False},
}


def golden_models(golden_dir: Path) -> list[tuple[str, dict, dict[str, torch.Tensor]]]:
    cases = load_cases("logah", golden_dir).values()
    return [
        (case.name, case.config["ghn"], {key: torch.zeros(shape) for key, shape in case.raw["state_dict"]})
        for case in cases
        if "ghn" in case.config and "state_dict" in case.raw
    ]


def test_every_golden_state_dict_is_recognised_with_all_its_keys_and_shapes(golden_dir: Path):
    found = golden_models(golden_dir)
    assert found
    for name, options, state in found:
        config = infer_config(Released(own_layout(state, name), options), name)
        for ours, theirs in (("hid", "hid"), ("layers", "layers"), ("heads", "heads"), ("num_classes", "num_classes")):
            assert getattr(config, ours) == options[theirs], name
        assert config.max_shape == tuple(options["max_shape"]), name
        assert (config.decoder == "lowrank") == options["lora"], name
        empty = build_empty(config).state_dict()
        assert {key: tuple(value.shape) for key, value in empty.items()} == {
            key: tuple(value.shape) for key, value in state.items()
        }, name


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_come_from_the_tensors_alone(kind: str):
    config = tiny_config(**KINDS[kind])
    state = own_layout(reference_state(tiny_hypernetwork(**KINDS[kind])), "file")
    found = infer_config(Released(state), "file", heads=config.heads)
    expected = {
        name: getattr(config, name)
        for name in ("variant", "decoder", "hid", "layers", "heads", "layernorm", "max_shape", "use_1d_decoder")
    }
    assert {name: getattr(found, name) for name in expected} == expected
    if config.decoder == "lowrank":
        assert (found.lora_r, found.max_ck_lora) == (config.lora_r, config.max_ck_lora)


def test_heads_follow_the_width_as_in_the_published_models():
    for width, heads in ((64, 8), (128, 16)):
        config = tiny_config(hid=width, layers=1, lora_r=2, heads=4)
        state = {name: value for name, value in build_empty(config).state_dict().items()}
        assert infer_config(Released(drop_aliases_of_shapes(state)), "file").heads == heads


def drop_aliases_of_shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("decoder.seq.1.")}


def test_small_image_models_are_told_by_their_kernel_sizes():
    config = tiny_config(decoder="dense", max_shape=(16, 16, 11, 11))
    state = drop_aliases_of_shapes(dict(build_empty(config).state_dict()))
    assert len(state["shape_enc.embed_spatial.weight"]) == 9
    assert infer_config(Released(state), "file").max_shape == (16, 16, 11, 11)


def test_outputs_and_inputs_of_a_dense_decoder_may_differ():
    config = tiny_config(decoder="dense", max_shape=(8, 16, 16, 16))
    assert infer_config(Released(dict(build_empty(config).state_dict())), "file").max_shape == (8, 16, 16, 16)


def test_tables_at_the_top_belong_to_the_first_layer(tmp_path: Path):
    model = tiny_hypernetwork(decoder="dense")
    released = read_released(write_published(tmp_path / "ghn3tm8.pt", model))
    own = model.state_dict()
    assert released.state.keys() == own.keys()
    assert all(torch.equal(released.state[name], value) for name, value in own.items())


def test_convolutions_of_size_one_become_matrices():
    state = {"decoder.conv.0.weight": torch.ones(3, 2, 1, 1), "decoder.l1.bias": torch.ones(2)}
    assert own_layout(state, "file")["decoder.conv.0.weight"].shape == (3, 2)


def test_the_options_of_the_trainer_are_taken_over(tmp_path: Path):
    model = tiny_hypernetwork(max_shape=(48, 48, 16, 16), num_classes=100, heads=4)
    released = read_released(write_trainer_checkpoint(tmp_path / "checkpoint.pt", model))
    assert released.facts == {"epoch": 7, "step": 41, "weights": "raw"}
    config = infer_config(released, "checkpoint.pt")
    assert (config.max_shape, config.num_classes, config.heads) == ((48, 48, 16, 16), 100, 4)
    assert config.ve_cutoff == 50 and config.rule == "fan_in"


def test_options_round_trip_through_the_references_names():
    config = tiny_config(num_classes=100, max_shape=(48, 32, 16, 16), use_1d_decoder=True, heads=4)
    state = drop_aliases_of_shapes(dict(build_empty(config).state_dict()))
    assert infer_config(Released(state, reference_options(config)), "file") == config


def test_averages_are_preferred_and_reach_both_names_of_a_shared_tensor(tmp_path: Path):
    model = tiny_hypernetwork()
    averages = {name: torch.full_like(value, 0.5) for name, value in model.named_parameters()}
    assert "decoder.l2.weight" in averages and "decoder.seq.1.weight" not in averages
    path = write_trainer_checkpoint(tmp_path / "checkpoint.pt", model, ema_state_dict=averages)
    assert all((value == 0.5).all() for value in read_released(path).state.values())
    raw = read_released(path, ema=False)
    assert torch.equal(raw.state["decoder.l2.weight"], model.decoder.l2.weight)
    assert raw.facts["weights"] == "raw" and read_released(path).facts["weights"] == "ema"


def test_copies_that_differ_are_an_error():
    state = reference_state(tiny_hypernetwork())
    state["decoder.seq.1.bias"] = state["decoder.seq.1.bias"] + 1
    with pytest.raises(CheckpointError, match=r"decoder\.seq\.1\.bias differs from decoder\.l2\.bias"):
        own_layout(state, "file")


def test_aliases_round_trip():
    state = dict(tiny_hypernetwork().state_dict())
    once = drop_aliases(state)
    assert set(state) - set(once) == {"decoder.seq.1.weight", "decoder.seq.1.bias"}
    assert add_aliases(once).keys() == state.keys()
    only_alias = {name: value for name, value in state.items() if not name.startswith("decoder.l2.")}
    assert drop_aliases(only_alias).keys() == once.keys()


def test_an_option_that_contradicts_the_tensors_is_an_error(tmp_path: Path):
    model = tiny_hypernetwork()
    path = write_trainer_checkpoint(tmp_path / "checkpoint.pt", model)
    with pytest.raises(CheckpointError, match="tensors have layers=2, but its option says layers=3"):
        infer_config(read_released(path), str(path), layers=3)
    wrong = {**reference_options(model.config), "lora_r": 9}
    path = write_trainer_checkpoint(tmp_path / "wrong.pt", model, config=wrong)
    with pytest.raises(CheckpointError, match="lora_r=4, but its config says lora_r=9"):
        infer_config(read_released(path), str(path))


def test_other_files_are_refused_by_what_they_hold(tmp_path: Path):
    joblib.dump({"layer.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"lacks embed\.weight and holds layer\.weight"):
        infer_config(read_released(tmp_path / "other.pt"), "other.pt")
    joblib.dump([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_released(tmp_path / "list.pt")


def test_a_vision_model_gets_the_rows_of_language_models():
    vision = tiny_hypernetwork()
    wide = build_empty(tiny_config(variant="llm"))
    load_state(wide, vision.state_dict(), "vision")
    assert torch.equal(wide.embed.weight[:15], vision.embed.weight) and wide.embed.weight.shape[0] == 18
    assert 0 < wide.embed.weight[15:].std() < 0.05
    old, new = vision.shape_enc.embed_channel.weight, wide.shape_enc.embed_channel.weight
    assert torch.equal(new[: len(old) - 1], old[:-1]) and torch.equal(new[-1], old[-1])  # the last row: no shape
    assert torch.equal(new[len(old) - 1 : -1], old[-2].expand(3, -1))
    again = build_empty(tiny_config(variant="llm"))
    load_state(again, vision.state_dict(), "vision")
    assert torch.equal(again.embed.weight, wide.embed.weight)  # the new rows are no accident of a global generator


def test_tables_that_fit_are_left_alone():
    state = dict(tiny_hypernetwork().state_dict())
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    extended = extend_tables(state, shapes, "file")
    assert all(extended[name] is value for name, value in state.items())


def test_the_reference_has_none_of_our_decoders():
    with pytest.raises(CheckpointError, match="decoder=lowrank_v2"):
        reference_options(HyperNetworkConfig(decoder="lowrank_v2"))


def test_what_a_file_does_not_say_is_told(tmp_path: Path, caplog):
    path = write_published(tmp_path / "ghn3tm8.pt", tiny_hypernetwork(decoder="dense"))
    with caplog.at_level("INFO"):
        infer_config(read_released(path), str(path), ve_cutoff=50)
    assert "heads=8, attention=explicit" in caplog.text and "ve_cutoff" not in caplog.text


def test_weights_do_not_change_with_a_checkpoint_that_is_written_again(tmp_path: Path):
    path = write_trainer_checkpoint(tmp_path / "checkpoint.pt", tiny_hypernetwork())
    state = read_released(path).state
    before = {name: value.clone() for name, value in state.items()}
    path.write_bytes(b"")
    assert all(torch.equal(state[name], value) for name, value in before.items())
