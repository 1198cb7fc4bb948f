"""The diffusion model: what each output is, the head computed where it is needed, and what cannot be run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from common.errors import CheckpointError, ConfigError
from common.seeding import generator
from diffullama.attention import require_bidirectional
from diffullama.losses import diffusion_loss, loss_positions
from diffullama.model import DiffusionLM
from diffullama.noise import add_noise
from diffullama.saving import quiet_transformers
from tests.diffullama.hub_folders import FAMILIES, SIZES, assert_same_state, tiny_hf

MASK, VOCAB = 5, 280
X = torch.randint(6, VOCAB, (3, 10), generator=generator(0, "tokens"))


def tiny(family: str = "gpt2", shift: bool = True, **options) -> DiffusionLM:
    return DiffusionLM(tiny_hf(family, **options), MASK, shift).eval()


def noised(seed: int = 0, shift: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = generator(seed, "noise")
    t_B = torch.tensor([0.3, 0.6, 0.9])
    z_BL, drawn_BL = add_noise(X, t_B, torch.rand(X.shape, generator=rng), MASK)
    return z_BL, loss_positions(drawn_BL, shift), t_B


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [True, False])
def test_outputs_at_positions_are_those_of_the_dense_logits(family, shift):
    model = tiny(family, shift)
    z_BL, where_BL, t_B = noised(shift=shift)
    with torch.no_grad():
        logits_BLV = model(z_BL)
        predicted_BLV = logits_BLV.roll(1, dims=1) if shift else logits_BLV  # the prediction of each position's token
        found_PV = model.denoise(z_BL, where_BL)
        expected_PV = predicted_BLV[where_BL].index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
        assert torch.allclose(found_PV, expected_PV, atol=1e-5)
        assert (found_PV[:, MASK] == -torch.inf).all() and found_PV.dtype == torch.float32
        assert torch.allclose(found_PV.exp().sum(-1), torch.ones(len(found_PV)), atol=1e-5)
        nll_P = model(z_BL, X, where_BL)
        assert torch.allclose(
            nll_P, -predicted_BLV[where_BL].log_softmax(-1).gather(1, X[where_BL][:, None])[:, 0], atol=1e-5
        )
        total, same_P = model(z_BL, X, where_BL, 1 / t_B)
        assert torch.allclose(same_P, nll_P, atol=1e-5)
        assert torch.allclose(total, (nll_P / t_B[:, None].expand(X.shape)[where_BL]).sum(), rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_the_gathered_head_are_those_of_dense_logits(family, shift, fused):
    z_BL, where_BL, t_B = noised(shift=shift)
    dense, gathered = tiny(family, shift), tiny(family, shift)
    diffusion_loss(dense(z_BL), X, z_BL, t_B, MASK, shift, "masked").loss.backward()
    if fused:
        total, _ = gathered(z_BL, X, where_BL, 1 / t_B)
    else:
        total = (gathered(z_BL, X, where_BL) / t_B[:, None].expand(X.shape)[where_BL]).sum()
    (total / where_BL.sum()).backward()
    for (name, expected), found in zip(dense.named_parameters(), gathered.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=1e-6), name


def test_a_batch_without_labels_is_a_zero_that_reaches_every_parameter():
    model = tiny("gpt2")
    where_BL = torch.zeros_like(X, dtype=torch.bool)
    total, nll_P = model(X, X, where_BL, torch.ones(len(X)))
    assert total.item() == 0 and nll_P.shape == (0,)
    total.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert model(X, X, where_BL).sum().item() == 0 and model.denoise(X, where_BL).shape == (0, VOCAB)


@given(rows=st.sets(st.integers(0, 2), min_size=1), seed=st.integers(0, 1000))
def test_any_subset_of_rows_gives_the_same_predictions(rows, seed):
    model = tiny("llama")
    z_BL, where_BL, _ = noised(seed)
    chosen = sorted(rows)
    with torch.no_grad():
        whole = model.denoise(z_BL, where_BL).split(where_BL.sum(1).tolist())
        part = model.denoise(z_BL[chosen], where_BL[chosen])
    assert torch.allclose(part, torch.cat([whole[row] for row in chosen]), atol=1e-5)


def test_position_zero_has_no_prediction_with_shift():
    where_BL = torch.zeros_like(X, dtype=torch.bool)
    where_BL[1, 0] = True
    with pytest.raises(ValueError, match="position 0 has no prediction"):
        tiny().denoise(X, where_BL)
    assert tiny(shift=False).denoise(X, where_BL).shape == (1, VOCAB)
    with pytest.raises(ValueError, match="targets need `where`"):
        tiny()(X, X)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bfloat16_by_autocast_runs_under_every_mask(family, implementation):
    model = tiny(family, implementation=implementation)
    z_BL, where_BL, t_B = noised()
    allowed = torch.ones(10, 10, dtype=torch.bool).tril()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for masks in ({}, {"allowed": allowed}, {"visible": torch.ones_like(X, dtype=torch.bool)}, {"causal": True}):
            total, nll_P = model(z_BL, X, where_BL, 1 / t_B, **masks)
            assert nll_P.dtype == torch.float32 and torch.isfinite(total)
            assert torch.allclose(nll_P, tiny(family)(z_BL, X, where_BL, **masks).detach(), atol=0.1)
        assert model.denoise(z_BL, where_BL).dtype == torch.float32
    total.backward()


def test_a_model_stored_in_half_precision_runs():
    model = tiny("llama").to(torch.bfloat16)
    z_BL, where_BL, _ = noised()
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            model.set_attention(implementation)
            assert model.denoise(z_BL, where_BL).dtype == torch.float32
            assert model(z_BL, allowed=torch.ones(10, 10, dtype=torch.bool).tril()).dtype == torch.bfloat16


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_s_model_is_kept_as_it_is(family):
    hf = tiny_hf(family)
    forwards = {name: type(module).forward for name, module in hf.named_modules()}
    model = DiffusionLM.from_causal_lm(hf, MASK)
    assert model.hf is hf and {id(p) for p in model.parameters()} == {id(p) for p in hf.parameters()}
    assert all(
        type(module).forward is forwards[name] and "forward" not in vars(module) for name, module in hf.named_modules()
    )
    assert len(model.blocks) == 2 and model.vocab_size == VOCAB and model.max_length == 64
    require_bidirectional(model)


@pytest.mark.parametrize("mask_id", [-1, VOCAB, VOCAB + 3])
def test_a_mask_outside_the_embedding_is_refused(mask_id):
    with pytest.raises(ConfigError, match=f"mask_token_id={mask_id} is outside the model's 280 embedding rows"):
        DiffusionLM(tiny_hf("gpt2"), mask_id)


def test_only_learnt_positions_limit_the_length():
    long_1L = torch.ones(1, 65, dtype=torch.int64)
    with pytest.raises(ConfigError, match="length=65 exceeds the model's 64 positions"):
        tiny("gpt2")(long_1L)
    assert tiny("llama")(long_1L).shape == (1, 65, VOCAB)


def test_families_that_change_their_logits_after_the_head_are_refused():
    gemma = Gemma2Config(**SIZES, vocab_size=64, head_dim=4, final_logit_softcapping=30.0)
    cohere = CohereConfig(**SIZES, vocab_size=64, bos_token_id=0, eos_token_id=0, logit_scale=0.06, pad_token_id=0)
    with quiet_transformers():
        models = [Gemma2ForCausalLM(gemma), CohereForCausalLM(cohere)]
    for hf, option in zip(models, ["final_logit_softcapping=30.0", "logit_scale=0.06"], strict=True):
        with pytest.raises(ConfigError, match=option):
            DiffusionLM(hf, MASK)


def test_reference_weights_are_loaded_whole_or_not_at_all():
    model, other = tiny("gpt2", seed=1), tiny("gpt2", seed=2)
    state = {key: value.clone() for key, value in other.reference_state_dict().items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="missing transformer.ln_f.bias"):
        model.load_reference_state_dict(
            {key: value for key, value in state.items() if key != "denoise_model.ln_f.bias"}
        )
    assert_same_state(dict(model.state_dict()), before)
    model.load_reference_state_dict(state)
    assert_same_state(dict(model.state_dict()), dict(other.state_dict()))
