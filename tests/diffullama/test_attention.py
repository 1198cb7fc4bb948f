"""Who sees whom: annealed masks, both backends, every family; a model that is still causal is refused."""

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.seeding import generator
from diffullama.attention import (
    anneal_ratio,
    annealed_allowed,
    attention_arguments,
    open_sliding_window,
    require_bidirectional,
    same_document,
    sees_the_future,
    to_additive,
)
from diffullama.model import DiffusionLM
from tests.diffullama.hub_folders import FAMILIES, tiny_hf

MASK = 5
LENGTH = 12  # beyond the tiny models' sliding window of 3


def tiny(family: str, **options) -> DiffusionLM:
    return DiffusionLM(tiny_hf(family, **options), MASK).eval()


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 200, (rows, length), generator=generator(seed, "tokens"))


# ---------------------------------------------------------------- annealing


@given(steps=st.integers(1, 1000), step=st.integers(0, 2000))
def test_the_ratio_grows_from_one_step_s_share_to_one(steps, step):
    assert anneal_ratio(0, steps) == pytest.approx(1 / steps)
    assert anneal_ratio(steps - 1, steps) == anneal_ratio(steps + step, steps) == 1
    assert anneal_ratio(step, steps) <= anneal_ratio(step + 1, steps) <= 1


def test_annealing_over_no_steps_is_refused():
    with pytest.raises(ConfigError, match="anneal_steps=0"):
        anneal_ratio(0, 0)


@given(length=st.integers(1, 24), ratio=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_the_past_is_always_open_and_the_future_by_the_ratio(length, ratio, seed):
    u_LL = torch.rand(length, length, generator=torch.Generator().manual_seed(seed))
    allowed_LL = annealed_allowed(u_LL, ratio)
    assert allowed_LL.tril().equal(torch.ones_like(allowed_LL).tril())
    assert torch.equal(annealed_allowed(u_LL, 0.0), torch.ones_like(allowed_LL).tril())
    assert annealed_allowed(u_LL, 1.0).all()
    assert (annealed_allowed(u_LL, ratio / 2) <= allowed_LL).all()  # opens, never closes


def test_the_density_of_the_future_is_the_ratio_within_three_sigma():
    length, ratio = 400, 0.3
    future_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
    allowed_LL = annealed_allowed(torch.rand(length, length, generator=generator(0, "anneal")), ratio)
    count = int(future_LL.sum())
    found = allowed_LL[future_LL].float().mean().item()
    assert abs(found - ratio) < 3 * (ratio * (1 - ratio) / count) ** 0.5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 64])
def test_one_mask_serves_the_batch(implementation, batch):
    allowed_LL = annealed_allowed(torch.rand(LENGTH, LENGTH), 0.5)
    mask = attention_arguments(implementation, torch.float32, allowed_LL, None, False)["attention_mask"]
    assert mask.shape == (1, 1, LENGTH, LENGTH)


# ---------------------------------------------------------------- backends


def test_booleans_never_reach_eager_attention_which_would_add_them():
    allowed_LL = annealed_allowed(torch.rand(4, 4), 0.5)
    eager = attention_arguments("eager", torch.bfloat16, allowed_LL, None, False)["attention_mask"]
    assert eager.dtype == torch.bfloat16
    assert torch.equal(eager == 0, allowed_LL[None, None]) and eager.amin() == torch.finfo(torch.bfloat16).min
    sdpa = attention_arguments("sdpa", torch.float32, allowed_LL, None, False)["attention_mask"]
    assert sdpa.dtype == torch.bool
    assert to_additive(allowed_LL).dtype == torch.float32


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn2"])
def test_backends_without_4d_masks_refuse_annealing_but_not_full_attention(implementation):
    with pytest.raises(ConfigError, match=f"attn_implementation={implementation}.*objective.anneal_steps=1"):
        attention_arguments(implementation, torch.float32, torch.ones(4, 4, dtype=torch.bool), None, False)
    open_arguments = attention_arguments(implementation, torch.float32, None, None, False)
    assert open_arguments == {"attention_mask": None, "is_causal": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_agree_under_every_mask(family):
    eager, sdpa = tiny(family, implementation="eager"), tiny(family)
    x_BL = tokens()
    visible_BL = torch.ones(2, LENGTH, dtype=torch.bool)
    visible_BL[1, 7:] = False
    with torch.no_grad():
        for ratio in (0.0, 0.4, 1.0):
            allowed_LL = annealed_allowed(torch.rand(LENGTH, LENGTH, generator=generator(1, "anneal")), ratio)
            assert torch.allclose(eager(x_BL, allowed=allowed_LL), sdpa(x_BL, allowed=allowed_LL), atol=2e-5)
            padded = [model(x_BL, allowed=allowed_LL, visible=visible_BL) for model in (eager, sdpa)]
            assert torch.allclose(padded[0][0], padded[1][0], atol=2e-5)
            assert torch.allclose(padded[0][1, :7], padded[1][1, :7], atol=2e-5)
        assert torch.allclose(eager(x_BL), sdpa(x_BL), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_annealing_starts_at_the_parent_and_ends_at_full_attention(family):
    """At ratio 0 the logits are those of the causal model; at ratio 1 those without any mask."""
    hf = tiny_hf(family, **({"sliding_window": 64} if family in ("qwen2", "mistral") else {}))
    x_BL = tokens()
    with torch.no_grad():
        parent = hf(input_ids=x_BL, use_cache=False).logits
        model = DiffusionLM.from_causal_lm(hf, MASK)
        u_LL = torch.rand(LENGTH, LENGTH, generator=generator(1, "anneal"))
        assert torch.allclose(model(x_BL, allowed=annealed_allowed(u_LL, 0.0)), parent, atol=1e-5)
        assert torch.allclose(model(x_BL, causal=True), parent, atol=1e-5)
        assert torch.allclose(model(x_BL, allowed=annealed_allowed(u_LL, 1.0)), model(x_BL), atol=1e-5)
        assert not torch.allclose(model(x_BL), parent, atol=1e-2)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_are_opened_with_a_warning(family, caplog):
    with caplog.at_level(logging.WARNING):
        model = tiny(family)
    assert "looks back 3 tokens only" in caplog.text
    assert sees_the_future(model, length=LENGTH)
    assert open_sliding_window(model.hf) is None
    caplog.clear()
    assert open_sliding_window(tiny_hf("llama")) is None and not caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_other_rows_change_nothing(family, causal):
    model, x_BL = tiny(family), tokens(3)
    visible_BL = torch.ones(3, LENGTH, dtype=torch.bool)
    visible_BL[1, 7:] = False
    with torch.no_grad():
        found = model(x_BL, visible=visible_BL, causal=causal)
        for row, length in ((0, LENGTH), (1, 7)):
            assert torch.allclose(found[row, :length], model(x_BL[row : row + 1, :length], causal=causal)[0], atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation):
    model, x_BL = tiny("llama", implementation=implementation), tokens(2)
    document_BL = torch.zeros(2, LENGTH, dtype=torch.int64)
    document_BL[0, 5:] = 1
    allowed = same_document(document_BL)
    assert allowed.shape == (2, 1, LENGTH, LENGTH)
    with torch.no_grad():
        found = model(x_BL, allowed=allowed)
        assert torch.allclose(found[0, :5], model(x_BL[:1, :5])[0], atol=1e-5)
        assert torch.allclose(found[1], model(x_BL[1:])[0], atol=1e-5)
        other = x_BL.clone()
        other[0, :5] += 1
        assert torch.equal(model(other, allowed=allowed)[0, 5:], found[0, 5:])
        annealed = allowed & annealed_allowed(torch.rand(LENGTH, LENGTH), 0.5)
        assert torch.equal(model(other, allowed=annealed)[0, 5:], model(x_BL, allowed=annealed)[0, 5:])


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
def test_information_flows_both_ways_in_every_mode(family, implementation, mode):
    model = tiny(family, implementation=implementation).train(mode != "eval")
    if mode == "checkpointing":
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert sees_the_future(model, length=LENGTH) and not sees_the_future(model, length=LENGTH, causal=True)
    require_bidirectional(model)
    # gradients say the same: the first position's logits depend on the last token, causally they do not
    outputs = []
    model.hf.get_input_embeddings().register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for causal in (False, True):
        logits = model(tokens(1), causal=causal)
        (grad_BLD,) = torch.autograd.grad(logits[0, 0].square().sum(), outputs[-1])
        assert bool(grad_BLD[0, -1].any()) is not causal


def test_dropout_does_not_fool_the_probe():
    model = DiffusionLM(tiny_hf("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3), MASK).train()
    state = torch.get_rng_state()
    assert not sees_the_future(model, causal=True) and sees_the_future(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_seeds_no_other_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("generators of all GPUs were seeded"))
    assert sees_the_future(tiny("llama"))


def test_models_with_flash_kernels_are_probed_without_them_and_keep_them(monkeypatch):
    model = tiny("llama")
    switched = []

    def switch(implementation):
        switched.append(implementation)
        model.config._attn_implementation = implementation

    monkeypatch.setattr(model.hf, "set_attn_implementation", switch)
    model.config._attn_implementation = "flash_attention_2"
    require_bidirectional(model)
    assert switched == ["sdpa", "flash_attention_2"]


@pytest.mark.filterwarnings("ignore:.*compile")
def test_flex_attention_is_bidirectional_too():
    model = tiny("llama", implementation="flex_attention")
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # compiling its kernel takes minutes on a CPU
        assert sees_the_future(model) and not sees_the_future(model, causal=True)
        assert torch.allclose(model(tokens()), tiny("llama")(tokens()), atol=1e-4)


def test_a_model_that_is_still_causal_is_refused():
    model = tiny("llama")
    backbone = model.hf.base_model
    forward = backbone.forward
    backbone.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "is_causal": True})
    with pytest.raises(ConfigError, match="LlamaForCausalLM is still causal"):
        require_bidirectional(model)
    backbone.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "is_causal": False})
    with pytest.raises(ConfigError, match="sees the future in causal mode"):
        require_bidirectional(model)
    backbone.forward = lambda *args: SimpleNamespace()
    with pytest.raises(ConfigError, match="cannot be run with full attention"):
        require_bidirectional(model)


def test_a_model_with_more_than_a_linear_head_is_refused():
    model = tiny("llama")
    forward = model.hf.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.hf.forward = scaled
    with pytest.raises(ConfigError, match="more than a linear head"):
        require_bidirectional(model)


def test_the_backend_can_be_switched_when_annealing_has_ended():
    model, x_BL = tiny("llama", implementation="eager"), tokens()
    with torch.no_grad():
        before = model(x_BL)
        model.set_attention("sdpa")
        assert model.config._attn_implementation == "sdpa"
        assert torch.allclose(model(x_BL), before, atol=1e-5)
    with pytest.raises(ConfigError, match="attn_implementation=flash_attention_2 cannot be used"):
        model.set_attention("flash_attention_2")
    with pytest.raises(ConfigError, match="attn_implementation=unheard_of"):
        model.set_attention("unheard_of")
    assert model.config._attn_implementation == "sdpa"
    gpt2 = tiny("gpt2")
    with pytest.raises(ConfigError, match="flex_attention"):
        gpt2.set_attention("flex_attention")
