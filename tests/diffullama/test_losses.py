"""The objective from dense logits: its normalisations, its weights, and that it is a bound."""

import math

import pytest
import torch

from common.errors import ConfigError
from common.seeding import generator
from diffullama.losses import diffusion_loss, label_count, loss_positions
from diffullama.noise import add_noise, sample_time, stratified_time

VOCAB, MASK = 11, 10


def case(rows: int = 4, length: int = 9, seed: int = 0):
    rng = generator(seed, "loss")
    x_BL = torch.randint(0, VOCAB, (rows, length), generator=rng)  # the mask's id among the clean tokens
    t_B = sample_time(torch.rand(rows, generator=rng))
    z_BL, drawn_BL = add_noise(x_BL, t_B, torch.rand(rows, length, generator=rng), MASK)
    logits_BLV = torch.randn(rows, length, VOCAB, generator=rng)
    return logits_BLV, x_BL, z_BL, t_B, drawn_BL


@pytest.mark.parametrize("shift", [True, False])
def test_uniform_logits_give_a_bound_of_ln_v_per_token(shift):
    """Monte Carlo over stratified times, within 1 %."""
    rows, length = 512, 256
    x_BL = torch.randint(0, VOCAB - 1, (rows, length), generator=generator(0, "x"))
    t_B = sample_time(stratified_time(rows, 0.5))
    z_BL, drawn_BL = add_noise(x_BL, t_B, torch.rand(rows, length, generator=generator(0, "u")), MASK)
    found = diffusion_loss(torch.zeros(rows, length, VOCAB), x_BL, z_BL, t_B, MASK, shift, "tokens", drawn_BL)
    assert found.loss.item() == pytest.approx(math.log(VOCAB), rel=0.01)
    assert found.unweighted.item() == pytest.approx(math.log(VOCAB), rel=1e-5)
    masked = diffusion_loss(torch.zeros(rows, length, VOCAB), x_BL, z_BL, t_B, MASK, shift, "masked", drawn_BL)
    assert masked.loss.item() == pytest.approx(2 * math.log(VOCAB), rel=0.02)  # the reference's value is about twice it


def test_membership_is_by_id_in_parity_and_by_draw_otherwise():
    logits_BLV, x_BL, z_BL, t_B, drawn_BL = case()
    assert ((z_BL == MASK) != drawn_BL).any()  # clean occurrences of the id
    by_id = diffusion_loss(logits_BLV, x_BL, z_BL, t_B, MASK, False)
    by_draw = diffusion_loss(logits_BLV, x_BL, z_BL, t_B, MASK, False, drawn_mask=drawn_BL)
    assert torch.equal(by_id.loss_mask, z_BL == MASK) and torch.equal(by_draw.loss_mask, drawn_BL)
    assert torch.equal(by_id.ce, by_draw.ce)


def test_shift_predicts_a_token_from_the_position_before_it():
    logits_BLV, x_BL, z_BL, t_B, drawn_BL = case()
    shifted = diffusion_loss(logits_BLV, x_BL, z_BL, t_B, MASK, True, drawn_mask=drawn_BL)
    plain = diffusion_loss(logits_BLV.roll(1, dims=1), x_BL, z_BL, t_B, MASK, False, drawn_mask=drawn_BL)
    assert torch.allclose(shifted.ce, plain.ce[:, 1:])
    where_BL = loss_positions(drawn_BL, True)
    assert torch.equal(where_BL[:, 1:], shifted.loss_mask) and not where_BL[:, 0].any()
    assert loss_positions(drawn_BL, False) is drawn_BL
    assert (label_count(4, 9, True), label_count(4, 9, False)) == (shifted.ce.numel(), plain.ce.numel())


@pytest.mark.parametrize("loss_norm", ["tokens", "masked"])
def test_an_all_clean_batch_gives_zero_and_not_nan(loss_norm):
    logits_BLV, x_BL, _, t_B, drawn_BL = case()
    clean = torch.zeros_like(drawn_BL)
    loss, unweighted, _, loss_mask = diffusion_loss(logits_BLV, x_BL, x_BL, t_B, MASK, True, loss_norm, clean)
    assert loss.item() == unweighted.item() == 0 and not loss_mask.any()


def test_given_positions_never_have_a_loss():
    _, x_BL, _, t_B, _ = case()
    given_BL = torch.zeros_like(x_BL)
    given_BL[:, :5] = 1
    _, drawn_BL = add_noise(x_BL, t_B, torch.zeros(x_BL.shape), MASK, given_BL)
    assert torch.equal(loss_positions(drawn_BL, True), ~given_BL.bool())


def test_an_unknown_normalisation_is_named():
    with pytest.raises(ConfigError, match="loss_norm='token'.*tokens"):
        diffusion_loss(*case()[:4], MASK, True, "token")
