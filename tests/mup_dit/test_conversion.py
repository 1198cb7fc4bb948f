"""Our networks against those of diffusers, with the same weights."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from common.errors import CheckpointError, ConfigError
from mup_dit.conversion import from_diffusers, match_frequencies, to_diffusers
from tests.mup_dit import tiny


def call(theirs, family: str, inputs: tuple, mask=None, sizes=None) -> torch.Tensor:
    """Diffusers' network on our arguments."""
    if family == "dit":
        return theirs(inputs[0], inputs[1], inputs[2]).sample
    if family == "mmdit":
        return theirs(inputs[0], inputs[2], inputs[3], 1000 * inputs[1]).sample
    conditions = {"resolution": sizes and sizes[0], "aspect_ratio": sizes and sizes[1]}
    return theirs(inputs[0], inputs[2][:, 0], inputs[1], conditions, encoder_attention_mask=mask).sample


CASES = {
    "dit": ("dit", "mup", {"output_mult": 3.0}),
    "dit without null class": ("dit", "sp", {"class_dropout_prob": 0.0, "learn_sigma": False}),
    "dit with muP attention": ("dit", "mup", {"attention_scale": "mup", "base_head_size": 4}),
    "pixart": ("pixart", "mup", {"lewei_scale": 2.0}),
    "pixart of any size": ("pixart", "sp", {"micro_conditions": True}),
    "pixart with muP attention": ("pixart", "mup", {"attention_scale": "mup", "base_head_size": 4}),
    "mmdit": ("mmdit", "mup", {"output_mult": 3.0}),
    "mmdit with REPA": ("mmdit", "mup", {"repa_depth": 1}),
    "mmdit with muP attention": ("mmdit", "mup", {"attention_scale": "mup", "base_head_size": 4}),
    "mmdit without norms": ("mmdit", "mup", {"qk_norm": False, "attention_scale": "mup", "base_head_size": 4}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_diffusers_computes_the_same_and_back_again(name):
    family, parametrization, options = CASES[name]
    model = tiny.model(family, 6, parametrization, **options).eval()
    inputs = tiny.inputs(family)
    mask, sizes = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6]), None
    ours = {} if family != "pixart" else {"mask": mask}
    if options.get("micro_conditions"):
        sizes = (torch.tensor([[8.0, 8.0], [16.0, 8.0]]), torch.tensor([[1.0], [2.0]]))
        ours |= {"img_hw_B2": sizes[0], "aspect_ratio_B1": sizes[1]}
    expected = model(*inputs, **ours)
    theirs = to_diffusers(model)
    if family == "dit":
        theirs = match_frequencies(theirs)
    torch.testing.assert_close(call(theirs, family, inputs, mask, sizes), expected, rtol=1e-4, atol=1e-5)
    back, config = from_diffusers(theirs)
    torch.testing.assert_close(back(*inputs, **ours), expected, rtol=1e-4, atol=1e-5)
    assert config.parametrization == "sp" and back.config.num_heads == 6
    assert {name.split(".")[0] for name in model.state_dict()} - {"repa"} == {
        name.split(".")[0] for name in back.state_dict()
    }


@torch.no_grad()
def test_the_time_embedding_of_diffusers_dit_is_another_one():
    model = tiny.model("dit", 4).eval()
    inputs = tiny.inputs("dit")
    theirs = to_diffusers(model)
    assert not torch.allclose(call(theirs, "dit", inputs), model(*inputs), atol=1e-2)
    torch.testing.assert_close(call(match_frequencies(theirs), "dit", inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_position_table_of_larger_images_is_cut_in_the_middle():
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=20,
        caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=7,
    ).eval()  # fmt: skip
    model, config = from_diffusers(theirs)
    inputs = tiny.inputs("mmdit")
    torch.testing.assert_close(model(*inputs), call(theirs, "mmdit", inputs), rtol=1e-4, atol=1e-5)
    assert not config.network.qk_norm


@pytest.mark.parametrize(
    ("family", "options"),
    [("dit", {"qk_norm": True}), ("pixart", {"mlp_ratio": 2.0}), ("mmdit", {"drop_last_text": False})],
)
def test_what_diffusers_lacks_is_refused(family, options):
    with pytest.raises(ConfigError, match=f"model.{next(iter(options))}=.*no counterpart"):
        to_diffusers(tiny.model(family, **options))


def test_other_models_are_refused():
    with pytest.raises(CheckpointError, match="Linear is none of"):
        from_diffusers(torch.nn.Linear(1, 1))
