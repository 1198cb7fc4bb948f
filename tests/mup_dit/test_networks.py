"""DiT, PixArt-alpha and MMDiT: sizes, conditions, guidance, bad input, and the networks of diffusers as cross-check."""

import pytest
import torch

from common.errors import ConfigError
from mup_dit.building import build_skeleton, flat_options, read_model_config
from mup_dit.dit import DiTConfig
from mup_dit.layers import guided_pair, position_table, unpatchify
from mup_dit.mmdit import MMDiTConfig
from mup_dit.pixart import PixArtConfig, first_tokens
from tests.mup_dit.tiny import inputs, model, model_config

FAMILIES = ("dit", "pixart", "mmdit")


@pytest.mark.parametrize(
    ("family", "width", "heads", "count"),
    [
        ("dit", 144, 2, 10_799_168),
        ("dit", 288, 4, 42_624_608),
        ("dit", 576, 8, 169_354_400),
        ("dit", 1152, 16, 675_129_632),
        ("pixart", 288, 4, 39_246_656),
        ("pixart", 1152, 16, 610_856_096),
    ],
)
def test_published_sizes(family, width, heads, count):
    built = build_skeleton(read_model_config({"family": family, "hidden_size": width, "num_heads": heads}))
    assert sum(p.numel() for p in built.parameters()) == count
    if (family, width) == ("dit", 1152):
        assert sum(p.numel() for p in built.parameters() if p.requires_grad) == 674_834_720


@pytest.mark.parametrize(("width", "billions"), [(512, 0.18), (5120, 18)])
def test_mmdit_sizes_of_the_paper(width, billions):
    built = build_skeleton(read_model_config({"family": "mmdit", "hidden_size": width, "num_heads": width // 64}))
    assert sum(p.numel() for p in built.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_has_the_shape_of_the_input_and_variance_channels_if_learnt(family):
    arguments = inputs(family, rows=3)
    out = model(family)(*arguments)
    assert out.shape == (3, 4 if family == "mmdit" else 8, 8, 8)
    assert torch.isfinite(out).all()


def test_rows_do_not_see_each_other():
    for family in FAMILIES:
        network, arguments = model(family), inputs(family, rows=3)
        alone = network(*(argument[1:2] for argument in arguments))
        torch.testing.assert_close(network(*arguments)[1:2], alone, rtol=1e-5, atol=1e-6)


def test_dropped_labels_are_the_null_class():
    network, (x, t, y) = model("dit"), inputs("dit")
    null = network(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(network(x, t, y, torch.ones(2, dtype=torch.bool)), null)
    assert not torch.allclose(network(x, t, y), null)


def test_labels_outside_the_table_are_named():
    network, (x, t, _) = model("dit"), inputs("dit")
    with pytest.raises(ValueError, match=r"label 11 is outside 0..10 \(10 classes and the null class\)"):
        network(x, t, torch.tensor([3, 11]))
    no_null = model("dit", class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"label 10 is outside 0..9 \(10 classes, no null class\)"):
        no_null(x, t, torch.tensor([3, 10]))


@pytest.mark.parametrize("channels", ["three", "all"])
def test_guidance_of_one_is_the_condition_and_channel_four_stays(channels):
    network, (x, t, y) = model("dit").eval(), inputs("dit", rows=2)
    both = torch.cat([y, torch.full_like(y, 10)])
    plain = network(torch.cat([x, x]), torch.cat([t, t]), both)
    guided = network.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, 1.0, channels)
    torch.testing.assert_close(guided[:2, :4], plain[:2, :4], rtol=1e-5, atol=1e-6)
    strong = network.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, 4.0, channels)
    assert torch.equal(strong[:, 3:4], plain[:, 3:4]) == (channels == "three")
    torch.testing.assert_close(strong[:, 4:], plain[:, 4:])
    torch.testing.assert_close(strong[:2, :3], strong[2:, :3])


def test_guided_pair_is_the_formula():
    out = torch.randn(4, 3, 2, 2)
    expected = out[2:] + 2.5 * (out[:2] - out[2:])
    torch.testing.assert_close(guided_pair(out, 2.5, 3), torch.cat([expected, expected]))


def test_caption_masks_count_tokens_and_repeat_over_the_guided_batch():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    allowed = first_tokens(mask, 4, 4)[:, 0, 0]
    assert allowed.sum(dim=1).tolist() == [2, 3, 2, 3]
    with pytest.raises(ValueError, match="caption 1 has a mask without any token"):
        first_tokens(torch.tensor([[1, 0], [0, 0]]), 2, 2)
    with pytest.raises(ValueError, match="does not fit 2 captions of 5 tokens"):
        first_tokens(mask, 2, 5)


def test_masked_caption_tokens_have_no_effect():
    network, (x, t, y) = model("pixart"), inputs("pixart")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    changed = y.clone()
    changed[0, 0, 3:] = 7.0
    torch.testing.assert_close(network(x, t, y, mask), network(x, t, changed, mask))
    assert not torch.allclose(network(x, t, y), network(x, t, changed))


def test_captions_of_another_size_are_refused():
    network, (x, t, y) = model("pixart"), inputs("pixart")
    with pytest.raises(ValueError, match="captions have 19 channels, the model takes 20"):
        network.eval()(x, t, y[..., :19])
    with pytest.raises(ValueError, match=r"captions of shape \(2, 1, 5, 20\)"):
        network.train()(x, t, y[:, :, :5])


def test_micro_conditions_take_any_grid_and_matter():
    network = model("pixart", hidden_size=48, micro_conditions=True)
    x, t, y = inputs("pixart")
    sizes, ratio = torch.tensor([[64.0, 64.0], [32.0, 64.0]]), torch.tensor([[1.0], [0.5]])
    wide = torch.nn.functional.pad(x, (0, 4))
    assert network(wide, t, y, img_hw_B2=sizes, aspect_ratio_B1=ratio).shape == (2, 8, 8, 12)
    first = network(x, t, y, img_hw_B2=sizes, aspect_ratio_B1=ratio)
    assert not torch.allclose(first, network(x, t, y, img_hw_B2=2 * sizes, aspect_ratio_B1=ratio))
    with pytest.raises(ValueError, match="needs img_hw and aspect_ratio"):
        network(x, t, y)
    with pytest.raises(ConfigError, match=r"hidden_size=32 is not divisible by 3"):
        model_config("pixart", heads=4, micro_conditions=True)


def test_stochastic_depth_acts_in_training_only():
    network, arguments = model("pixart", drop_path=0.9), inputs("pixart")
    assert torch.equal(network.eval()(*arguments), network.eval()(*arguments))
    torch.manual_seed(0)
    network.train()
    assert not torch.equal(network(*arguments), network(*arguments))


def test_repa_head_predicts_features_of_every_image_token():
    network, arguments = model("mmdit", repa_depth=1, repa_channels=5), inputs("mmdit")
    out, features = network(*arguments, features=True)
    assert features.shape == (2, 16, 5)
    assert torch.equal(out, network(*arguments))
    with pytest.raises(ValueError, match="set model.repa_depth"):
        model("mmdit")(*arguments, features=True)
    with pytest.raises(ConfigError, match=r"model.repa_depth=3 must lie in 1..2"):
        model_config("mmdit", repa_depth=3)


def test_dropped_text_is_zero_and_masked_tokens_have_no_effect():
    network, (x, t, text, pooled) = model("mmdit"), inputs("mmdit")
    gone = network(x, t, torch.zeros_like(text), torch.zeros_like(pooled))
    torch.testing.assert_close(network(x, t, text, pooled, None, torch.ones(2, dtype=torch.bool)), gone)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    changed = text.clone()
    changed[0, 2:] = 5.0
    torch.testing.assert_close(network(x, t, text, pooled, mask), network(x, t, changed, pooled, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size=30 is not divisible by 4"),
        ({"hidden_size": 32, "num_heads": 3}, "hidden_size=32 is not divisible by 3, which num_heads needs"),
        ({"input_size": 9}, "input_size=9 is not divisible by patch_size=2"),
        ({"depth": 0}, "model.depth=0 is too small"),
        ({"hiden_size": 32}, "model.hidden_size"),
        ({"family": "dot"}, "model.family='dot' is not known; choose one of dit, pixart, mmdit"),
        ({"parametrization": "mu"}, "model.parametrization='mu'"),
        ({"attention_scale": "linear"}, "model.attention_scale='linear'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        read_model_config(options)


def test_options_round_trip():
    for family in FAMILIES:
        config = model_config(family)
        assert read_model_config(flat_options(config)) == config


def test_images_of_another_size_are_refused():
    for family in FAMILIES:
        network, arguments = model(family), inputs(family, side=12)
        with pytest.raises(ValueError, match="8"):
            network(*arguments)


def test_tokens_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="15 tokens are not a square image"):
        unpatchify(torch.zeros(1, 15, 4), 2, 1)
    with pytest.raises(ConfigError, match="hidden_size=6 is not divisible by 4"):
        position_table(6, (2, 2))


def test_head_size_scale_of_mup_equals_the_usual_one_at_the_base():
    usual = DiTConfig(hidden_size=32, num_heads=4).scale
    assert DiTConfig(hidden_size=32, num_heads=4, attention_scale="mup", base_head_size=8).scale == pytest.approx(usual)
    assert DiTConfig(hidden_size=64, num_heads=4, attention_scale="mup", base_head_size=8).scale == pytest.approx(
        8**0.5 / 16
    )


def test_mmdit_is_the_transformer_of_diffusers():
    from diffusers import SD3Transformer2DModel

    network = model("mmdit", parametrization="sp").eval()
    config: MMDiTConfig = network.config
    theirs = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=4, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    theirs.load_state_dict(network.state_dict(), strict=True)
    x, t, text, pooled = inputs("mmdit")
    expected = theirs(
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * t, return_dict=False
    )[0]
    torch.testing.assert_close(network(x, t, text, pooled), expected, rtol=1e-4, atol=1e-5)
    assert config.head_size == 8


def test_pixart_config_counts_tokens():
    assert PixArtConfig(input_size=64).grid == 32
