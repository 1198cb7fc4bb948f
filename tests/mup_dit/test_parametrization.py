"""The table against the mup package, and what must keep its numbers."""

import copy
import math

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from mup_dit.base_shapes import read_base_shapes, write_base_shapes
from mup_dit.building import build_model, build_skeleton, compute_base_shapes
from mup_dit.optimizer_groups import mup_groups
from mup_dit.parametrization import (
    Init,
    Readout,
    apply_table,
    find_base_shapes,
    fold,
    initialize,
    plain_table,
    scaling_table,
    width_of,
)
from tests.mup_dit.tiny import inputs, model, model_config

FAMILIES = ("dit", "pixart", "mmdit")


def mup_infshapes(family: str, heads: int) -> dict:
    """Of the package, for the same three models; its readout class replaces ours."""
    import mup

    def build(count: int) -> nn.Module:
        built = build_model(model_config(family, count, "sp"), torch.Generator().manual_seed(0))
        for parent in list(built.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Readout):
                    setattr(parent, name, mup.MuReadout(child.in_features, child.out_features))
        return built

    wrapped = build(heads)
    mup.set_base_shapes(wrapped, build(4), delta=build(5))
    return {name: parameter.infshape for name, parameter in wrapped.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [2, 4, 12])
def test_width_axes_and_multipliers_are_those_of_the_mup_package(family, heads):
    expected = mup_infshapes(family, heads)
    rows = build_skeleton(model_config(family, heads)).scalings
    assert rows.keys() == expected.keys()
    for name, shape in expected.items():
        assert rows[name].ninf == shape.ninf(), name
        assert rows[name].width_mult == shape.width_mult(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_of_the_mup_package(family):
    import mup

    heads = 8
    expected = mup_infshapes(family, heads)
    built = build_model(model_config(family, heads))
    for name, parameter in built.named_parameters():
        parameter.infshape = expected[name]
    theirs = mup.MuAdamW(built.parameters(), lr=0.5, weight_decay=0.25).param_groups
    ours = mup_groups(built.named_parameters(), built.scalings, 0.25)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in other["params"]]
        assert 0.5 * mine["lr_scale"] == other["lr"]
        assert mine["weight_decay"] == other["weight_decay"]


def test_steps_are_those_of_the_mup_package():
    import mup

    ours = model("dit", 8)
    theirs = copy.deepcopy(ours)
    expected = mup_infshapes("dit", 8)
    for name, parameter in theirs.named_parameters():
        parameter.infshape = expected[name]
    groups = mup_groups(ours.named_parameters(), ours.scalings, 0.1)
    for group in groups:
        group["lr"] = 1e-2 * group["lr_scale"]
        del group["names"]
    optimizers = [torch.optim.AdamW(groups), mup.MuAdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)]
    for step in range(3):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            network(*inputs("dit", seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7, msg=name)


def test_at_base_width_muadamw_is_adamw_bit_for_bit():
    first = model("dit", 4)
    second = copy.deepcopy(first)
    assert {row.width_mult for row in first.scalings.values()} == {1.0}
    groups = [{k: v for k, v in g.items() if k != "names"} for g in mup_groups(
        first.named_parameters(), first.scalings, 0.1)]  # fmt: skip
    optimizers = [
        torch.optim.AdamW([{"params": g["params"], "lr": 1e-2 * g["lr_scale"], "weight_decay": g["weight_decay"]}
                           for g in groups]),
        torch.optim.AdamW(second.parameters(), lr=1e-2, weight_decay=0.1),
    ]  # fmt: skip
    for step in range(3):
        for network, optimizer in zip((first, second), optimizers, strict=True):
            network(*inputs(seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parametrization", ["mup", "mup_init", "sp"])
def test_weights_have_the_deviation_of_the_table(family, parametrization):
    built = build_model(model_config(family, 16, parametrization), torch.Generator().manual_seed(1))
    checked = 0
    for name, parameter in built.named_parameters():
        row = built.scalings[name]
        if row.init.law == "zeros":
            assert not parameter.any(), name
        elif row.init.law == "ones":
            assert (parameter == 1).all(), name
        elif row.init.law in ("normal", "uniform") and parameter.numel() >= 10_000:
            assert parameter.std().item() == pytest.approx(row.init.std, rel=0.05), name
            assert parameter.abs().max() <= row.init.bound or row.init.law == "normal"
            checked += 1
    assert checked > 5


def test_control_has_mups_init_and_no_other_multiplier():
    control = build_skeleton(model_config("dit", 16, "mup_init"))
    scaled = build_skeleton(model_config("dit", 16, "mup")).scalings
    for name, row in control.scalings.items():
        assert row.init == scaled[name].init
        assert (row.lr_mult, row.weight_decay_mult, row.forward_mult) == (1.0, 1.0, 1.0)
    assert control.final_layer.linear.mult == 1.0


def test_readout_divides_its_input_and_not_its_bias():
    layer = Readout(4, 2, output_mult=3.0)
    layer.mult = 3.0 / 4.0
    h = torch.randn(5, 4)
    torch.testing.assert_close(layer(h), h * 0.75 @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_saved_weights_keep_the_multipliers(family, tmp_path):
    from safetensors.torch import load_file, save_file

    source = model(family, 8)
    arguments = inputs(family)
    expected = source(*arguments)
    assert torch.equal(copy.deepcopy(source)(*arguments), expected)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    again = build_model(model_config(family, 8))
    again.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    assert torch.equal(again(*arguments), expected)
    assert not any("mult" in key for key in source.state_dict())


def test_compiled_and_averaged_models_keep_the_multipliers():
    from common.ema import EMA

    source = model("dit", 8)
    source.eval()
    average = EMA(dict(source.named_parameters()), 0.0, warmup=False)
    average.update()
    expected = source(*inputs())
    with average.swapped(source):
        torch.testing.assert_close(source(*inputs()), expected)
    explained = torch.compile(source, backend="eager")
    torch.testing.assert_close(explained(*inputs()), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_no_output(family):
    source = model(family, 12, output_mult=2.0)
    arguments = inputs(family)
    expected = source(*arguments)
    folded = fold(copy.deepcopy(source))
    torch.testing.assert_close(folded(*arguments), expected, rtol=1e-6, atol=1e-6)
    plain = build_model(model_config(family, 12, "sp"))
    plain.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(plain(*arguments), expected, rtol=1e-6, atol=1e-6)
    assert folded.scalings is None


def test_folding_changes_the_weights_of_a_wide_model():
    source = model("dit", 12)
    before = source.final_layer.linear.weight.clone()
    torch.testing.assert_close(fold(source).final_layer.linear.weight, before / 3)


def test_a_second_table_is_refused():
    built = build_skeleton(model_config())
    with pytest.raises(ConfigError, match="parametrised already"):
        apply_table(built, tuple(built.scalings.values()))


def test_base_shapes_of_another_depth_are_refused():
    shallow = compute_base_shapes(model_config(depth=1))
    built = build_skeleton(model_config(depth=2, parametrization="sp"))
    with pytest.raises(ConfigError, match=r"the base shapes lacks .*blocks\.1.*one depth"):
        scaling_table(built, shallow, built.init_law("mup"))


def test_an_ordinary_linear_readout_is_refused():
    built, narrow, wide = (build_skeleton(model_config(heads=heads, parametrization="sp")) for heads in (8, 4, 5))
    for network in (built, narrow, wide):
        old = network.final_layer.linear
        network.final_layer.linear = nn.Linear(old.in_features, old.out_features, device="meta")
    with pytest.raises(ConfigError, match=r"final_layer\.linear\.weight.*needs a Readout"):
        scaling_table(built, find_base_shapes(narrow, wide), built.init_law("mup"))


def test_three_width_axes_and_other_ranks_are_refused():
    layer = nn.Linear(4, 4)
    law = lambda *_: Init("zeros")  # noqa: E731
    with pytest.raises(ConfigError, match="1 axes, but the model's tensor has shape"):
        scaling_table(layer, {"weight": (4,), "bias": (4,)}, law)
    conv = nn.Conv2d(2, 2, 3, bias=False)
    with pytest.raises(ConfigError, match="more than two width axes"):
        scaling_table(conv, {"weight": (2, 2, 3, None)}, law)


def test_width_is_that_of_the_last_axis():
    assert width_of((6, 8), (3, 2)) == (2, 4.0)
    assert width_of((5, 8), (None, 2)) == (1, 4.0)
    assert width_of((5,), (None,)) == (0, 1.0)


def test_initialize_draws_from_its_generator_only():
    torch.manual_seed(0)
    first = build_model(model_config(), torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    second = build_model(model_config(), torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    initialize(second, tuple(second.scalings.values()), torch.Generator().manual_seed(4))
    assert not torch.equal(first.x_embedder.proj.weight, second.x_embedder.proj.weight)


def test_table_as_json():
    rows = plain_table(build_skeleton(model_config(heads=8)).scalings)
    qkv = next(row for row in rows if row["name"] == "blocks.0.attn.qkv.weight")
    assert (qkv["kind"], qkv["width_mult"], qkv["lr_mult"], qkv["weight_decay_mult"]) == ("hidden", 2.0, 0.5, 2.0)
    assert qkv["init_std"] == pytest.approx(1 / math.sqrt(64))


def test_base_shape_files_round_trip_and_equal_the_packages(tmp_path):
    import mup

    shapes = compute_base_shapes(model_config(depth=1))
    path = write_base_shapes(tmp_path / "a.bsh", shapes)
    assert read_base_shapes(path) == shapes
    ours = path.read_text()
    narrow, wide = (build_model(model_config(heads=heads, depth=1, parametrization="sp")) for heads in (4, 5))
    mup.make_base_shapes(narrow, wide, savefile=str(tmp_path / "b.bsh"))
    assert (tmp_path / "b.bsh").read_text() == ours
    assert write_base_shapes(path, shapes) == path  # the same content again is no loss


def test_base_shape_files_with_a_prefix(tmp_path):
    (tmp_path / "c.bsh").write_text("module.a.weight: [4, null]\n")
    assert read_base_shapes(tmp_path / "c.bsh") == {"a.weight": (4, None)}
