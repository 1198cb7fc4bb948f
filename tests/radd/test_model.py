"""The network: published names and sizes, initial values, invariances, precision, and the four outputs of forward."""

import itertools

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.seeding import generator
from common.testing.golden import fill, load_cases
from radd.model import RADD, LayerNorm, ModelConfig, apply_rotary, attention, count_parameters, rotary_tables

TINY = ModelConfig(hidden_size=32, n_blocks=2, n_heads=4, length=12, dropout=0.0)
TOKENS = 19


def build(config: ModelConfig = TINY, tokens: int = TOKENS, seed: int = 3) -> RADD:
    return fill(RADD(config, tokens), seed, skip=("rotary_emb.inv_freq",)).eval()


def inputs(batch: int = 3, length: int = 12, seed: int = 0):
    """Clean tokens, masked positions and the corrupted tokens."""
    rng = generator(seed, "model test")
    x_BL = torch.randint(0, TOKENS, (batch, length), generator=rng)
    where_BL = torch.rand(batch, length, generator=rng) < 0.5
    return x_BL, where_BL, x_BL.masked_fill(where_BL, TOKENS)


# ---------------------------------------------------------------- names, sizes, initial values


@pytest.mark.parametrize(
    "width,blocks,heads,parameters,non_embedding",
    [(768, 12, 12, 162_265_682, 85_019_136), (1024, 24, 16, 405_191_762, 302_213_120)],
)
def test_published_sizes_have_the_published_parameter_counts_and_keys(width, blocks, heads, parameters, non_embedding):
    config = ModelConfig(hidden_size=width, n_blocks=blocks, n_heads=heads)
    with torch.device("meta"):
        model = RADD(config, 50257)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config, 50257) == parameters
    assert sum(p.numel() for p in model.blocks.parameters()) + 2 * width == non_embedding
    block = [
        ("norm1.weight", [width]),
        ("norm1.bias", [width]),
        ("attn_qkv.weight", [3 * width, width]),
        ("attn_out.weight", [width, width]),
        ("norm2.weight", [width]),
        ("norm2.bias", [width]),
        ("mlp.0.weight", [4 * width, width]),
        ("mlp.0.bias", [4 * width]),
        ("mlp.2.weight", [width, 4 * width]),
        ("mlp.2.bias", [width]),
    ]
    expected = [("vocab_embed.embedding", [50258, width]), ("rotary_emb.inv_freq", [width // heads // 2])]
    expected += [(f"blocks.{i}.{key}", shape) for i, (key, shape) in itertools.product(range(blocks), block)]
    expected += [
        ("output_layer.norm_final.weight", [width]),
        ("output_layer.norm_final.bias", [width]),
        ("output_layer.linear.weight", [50258, width]),
        ("output_layer.linear.bias", [50258]),
    ]
    assert [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()] == expected


def test_golden_models_have_the_reference_keys_in_order(golden_dir):
    cases = [case for case in load_cases("radd", golden_dir).values() if "state_keys" in case.raw]
    assert cases
    for case in cases:
        proportions = dict(case.config["model"])
        model = RADD(ModelConfig.from_mapping(proportions), proportions["tokens"])
        got = [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()]
        assert got == case.raw["state_keys"], case.name


def test_fresh_model_is_uniform_and_norms_start_at_one():
    model = RADD(TINY, TOKENS)
    log_probs = model(inputs()[2])[..., :TOKENS]
    torch.testing.assert_close(log_probs, torch.full_like(log_probs, -torch.tensor(19.0).log()), rtol=0, atol=1e-6)
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 5
    assert all((norm.weight == 1).all() and (norm.bias == 1).all() for norm in norms)
    bound = 32**-0.5
    assert model.vocab_embed.embedding.abs().max() <= bound
    assert model.vocab_embed.embedding.abs().max() > 0.95 * bound
    assert model.blocks[0].mlp[0].bias.abs().max() <= bound


def test_weights_without_the_rotary_buffer_load_and_unknown_ones_are_refused():
    model, other = build(), build(seed=4)
    weights = {key: value for key, value in model.state_dict().items() if key != "rotary_emb.inv_freq"}
    other.load_state_dict(weights)
    z_BL = inputs()[2]
    assert torch.equal(other(z_BL), model(z_BL))
    assert "rotary_emb.inv_freq" not in weights
    with pytest.raises(RuntimeError, match="blocks.9"):
        other.load_state_dict({**weights, "blocks.9.norm1.weight": torch.ones(32)})


# ---------------------------------------------------------------- configuration


def test_config_of_a_released_file_is_read_leniently_and_a_missing_key_is_named():
    released = {"name": "small", "type": "ddit_wot", "hidden_size": 768, "cond_dim": 128, "length": 1024}
    released |= {"n_blocks": 12, "n_heads": 12, "scale_by_sigma": False}
    config = ModelConfig.from_mapping(released)
    assert (config.dropout, config.use_checkpoint, config.dtype) == (0.02, False, None)
    del released["n_blocks"]
    with pytest.raises(ConfigError, match=r"model\.n_blocks is missing"):
        ModelConfig.from_mapping(released)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"n_heads": 5}, r"model\.hidden_size=32 is not a multiple of model\.n_heads=5"),
        ({"hidden_size": 12, "n_heads": 4}, "odd width 3"),
        ({"dtype": "bfloat"}, r"model\.dtype='bfloat'.*Did you mean 'bfloat16'"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0"),
        ({"n_blocks": 0}, r"model\.n_blocks=0"),
    ],
)
def test_proportions_that_cannot_work_name_the_option(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"hidden_size": 32, "n_blocks": 2, "n_heads": 4, **change})


# ---------------------------------------------------------------- invariances


def test_probabilities_sum_to_one_and_ignore_the_mask_logit():
    model, z_BL = build(), inputs()[2]
    before = model(z_BL)
    torch.testing.assert_close(before[..., :TOKENS].exp().sum(-1), torch.ones(z_BL.shape), rtol=0, atol=1e-6)
    with torch.no_grad():
        model.output_layer.linear.bias[TOKENS] = 50.0
    after = model(z_BL)
    assert torch.equal(after[..., :TOKENS], before[..., :TOKENS])
    assert not torch.equal(after[..., TOKENS], before[..., TOKENS])


def test_every_position_sees_every_other():
    """A changed token changes the output elsewhere, before and after it: attention is bidirectional."""
    model, z_BL = build(), inputs(batch=1)[2]
    for position in (0, 5, 11):
        changed = z_BL.clone()
        changed[0, position] = (changed[0, position] + 1) % TOKENS
        difference = (model(changed) - model(z_BL)).abs().amax(dim=-1)[0]
        assert (difference > 1e-6).all()


def test_forward_takes_tokens_only_and_any_length():
    model = build()
    for length in (1, 7, 40):
        z_BL = torch.full((2, length), TOKENS)
        assert model(z_BL).shape == (2, length, TOKENS + 1)


def test_rotary_scores_depend_on_relative_distance_only():
    rng = generator(0, "rotary")
    q, k = torch.randn(2, 1, 1, 4, 8, generator=rng).double()
    inv_freq = RADD(TINY, TOKENS).rotary_emb.inv_freq
    cos, sin = (table.double() for table in rotary_tables(60, inv_freq))

    def score(i: int, j: int) -> torch.Tensor:
        turned_q = apply_rotary(q, cos[i : i + 1], sin[i : i + 1])
        return (turned_q * apply_rotary(k, cos[j : j + 1], sin[j : j + 1])).sum(-1)

    for shift in (1, 13, 40):
        torch.testing.assert_close(score(3 + shift, 11 + shift), score(3, 11), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(score(3, 11), score(3, 12))


def test_rotary_tables_follow_dtype_and_survive_inference_mode():
    model, z_BL = build(), inputs()[2]
    with torch.inference_mode():
        model(z_BL)
    model(z_BL).sum().backward()  # a table made in inference mode could not be saved for this
    expected = model(z_BL)
    double = model.double()(z_BL)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=0, atol=1e-5)


def test_plain_attention_of_short_bfloat16_equals_the_fused_kernel():
    rng = generator(0, "attention")
    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=rng)
    plain = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(plain.float(), attention(q, k, v), rtol=0, atol=3e-2)


# ---------------------------------------------------------------- outputs


def test_outputs_at_positions_equal_those_of_the_whole_sequence():
    model = build()
    x_BL, where_BL, z_BL = inputs()
    full = model(z_BL)
    at = model(z_BL, where=where_BL)
    torch.testing.assert_close(at[:, :TOKENS], full[where_BL][:, :TOKENS], rtol=0, atol=2e-6)
    assert (at[:, TOKENS] == -torch.inf).all()
    nll_P = model(z_BL, x_BL, where_BL)
    expected = -full.gather(-1, x_BL[..., None]).squeeze(-1)[where_BL]
    torch.testing.assert_close(nll_P, expected, rtol=1e-5, atol=1e-5)
    weights_B = torch.tensor([0.5, 2.0, 30.0])
    total, detached = model(z_BL, x_BL, where_BL, weights_B)
    torch.testing.assert_close(detached, nll_P.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, (weights_B[:, None].expand_as(x_BL)[where_BL] * nll_P).sum())


def test_gradients_at_positions_equal_those_of_the_dense_loss():
    """Head, last block's MLP and loss at masked positions only: the same gradient in every parameter."""
    model = build()
    x_BL, where_BL, z_BL = inputs()
    weights_B = torch.tensor([0.5, 2.0, 30.0])
    parameters = list(model.parameters())
    dense_BL = nn.functional.cross_entropy(
        model.logits(z_BL)[..., :TOKENS].flatten(0, 1), x_BL.flatten(), reduction="none"
    ).view_as(x_BL)
    expected = torch.autograd.grad((dense_BL * where_BL * weights_B[:, None]).sum(), parameters)
    at_positions = torch.autograd.grad(model(z_BL, x_BL, where_BL, weights_B)[0], parameters)
    nll_P = model(z_BL, x_BL, where_BL)
    weight_P = weights_B[:, None].expand_as(x_BL)[where_BL]
    separately = torch.autograd.grad((nll_P * weight_P).sum(), parameters)
    for (name, _), a, b, c in zip(model.named_parameters(), at_positions, separately, expected):
        scale = c.abs().max().item()
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5 * scale, msg=name)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_nothing_masked_gives_a_zero_tied_to_every_parameter():
    model = build()
    x_BL, where_BL, _ = inputs()
    nothing = torch.zeros_like(where_BL)
    nll_P = model(x_BL, x_BL, nothing)
    assert nll_P.shape == (0,)
    for zero in (nll_P.sum(), model(x_BL, x_BL, nothing, torch.ones(3))[0]):
        assert zero.item() == 0
        for gradient in torch.autograd.grad(zero, list(model.parameters())):
            assert not gradient.any()


def test_targets_without_positions_are_refused():
    with pytest.raises(ValueError, match="where"):
        build()(inputs()[2], inputs()[0])


# ---------------------------------------------------------------- precision, dropout, recomputation


def test_bfloat16_autocast_stays_close_and_returns_float32():
    model = build()
    x_BL, where_BL, z_BL = inputs()
    expected = model(z_BL)[..., :TOKENS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, at, nll_P = model(z_BL), model(z_BL, where=where_BL), model(z_BL, x_BL, where_BL)
    assert got.dtype == at.dtype == nll_P.dtype == torch.float32
    torch.testing.assert_close(got[..., :TOKENS], expected, rtol=0, atol=5e-2)
    torch.testing.assert_close(got[..., :TOKENS].exp().sum(-1), torch.ones(z_BL.shape), rtol=0, atol=1e-6)
    torch.testing.assert_close(at[:, :TOKENS], expected[where_BL], rtol=0, atol=5e-2)


def test_dtype_of_the_config_overrides_the_ambient_precision():
    weights, z_BL = build().state_dict(), inputs()[2]
    single = build()(z_BL)
    for dtype, ambient, equal in (("float32", True, True), ("bfloat16", False, False), ("float16", False, True)):
        model = RADD(ModelConfig(**{**vars(TINY), "dtype": dtype}), TOKENS).eval()
        model.load_state_dict(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
            assert torch.equal(model(z_BL), single) is equal


def test_dropout_acts_in_training_only_and_follows_the_global_generator():
    model = build(ModelConfig(**{**vars(TINY), "dropout": 0.5}))
    z_BL = inputs()[2]
    assert torch.equal(model(z_BL), model(z_BL))
    model.train()
    torch.manual_seed(0)
    first = model(z_BL)
    assert not torch.equal(model(z_BL), first)
    torch.manual_seed(0)
    assert torch.equal(model(z_BL), first)


def test_recomputed_blocks_give_the_same_loss_and_gradients():
    x_BL, where_BL, z_BL = inputs()
    results = []
    for use_checkpoint in (False, True):
        model = build(ModelConfig(**{**vars(TINY), "use_checkpoint": use_checkpoint, "dropout": 0.1})).train()
        torch.manual_seed(0)
        total, _ = model(z_BL, x_BL, where_BL, torch.ones(3))
        results.append((total, *torch.autograd.grad(total, list(model.parameters()))))
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)
