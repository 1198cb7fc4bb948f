"""The generator: masks, losses, conditions, gates, sampling that does not depend on how it is cut."""

import re

import pytest
import torch

from common.errors import ConfigError
from rpg.denoiser import ConvDenoiser
from rpg.model import Generator, build_generator, name_gate
from rpg.model_config import GeneratorConfig
from rpg.normalisation import BatchNorm
from rpg.sampling import NOISE_BLOCK, SamplerConfig, sample_tokens, token_shares
from rpg.sources import find_sources

OPTIONS = {
    "num_tokens": 37, "dim_per_token": 12, "d_model": 16, "d_state": 4, "headdim": 8, "channels": (1, 4, 8, 4, 1),
    "kernel_size": 3, "diffusion_steps": 30,
}  # fmt: skip


class Places:
    num_tokens = 37
    token_tensor_L = torch.arange(37) // 5
    token_index_L = torch.arange(37) % 5


def generator(**changes) -> Generator:
    torch.manual_seed(0)
    return build_generator(GeneratorConfig(**OPTIONS | changes), Places(), [f"layer{i}.weight" for i in range(8)])


def rows(model: Generator, count: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, 12, generator=rng)
    x0[:, 9:] = float("nan")
    return {
        "x0_RD": x0,
        "source_R": torch.zeros(count, dtype=torch.int64),
        "token_R": torch.randint(37, (count,), generator=rng),
        "t_R": torch.randint(30, (count,), generator=rng),
        "eps_RD": torch.randn(count, 12, generator=rng),
    }


@pytest.mark.parametrize("head", ["diffusion", "mse"])
def test_padding_counts_neither_in_the_loss_nor_in_gradients(head: str):
    model = generator(head=head, **({"d_model": 12, "headdim": 8} if head == "mse" else {})).eval()
    inputs = rows(model)
    loss = model(**inputs)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    inputs["x0_RD"] = torch.cat([inputs["x0_RD"], torch.full((1, 12), float("nan"))])
    for name in ("source_R", "token_R", "t_R"):
        inputs[name] = torch.cat([inputs[name], inputs[name][:1]])
    inputs["eps_RD"] = torch.cat([inputs["eps_RD"], torch.ones(1, 12)])
    model.zero_grad()
    again = model(**inputs)  # one more row, of padding only
    again.backward()
    torch.testing.assert_close(again, loss)
    for old, p in zip(gradients, [p for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(p.grad, old, rtol=1e-4, atol=1e-5)


def test_noise_under_padding_does_not_reach_the_target():
    model = generator(kernel_size=1).eval()
    inputs = rows(model)
    before = model(**inputs)
    inputs["eps_RD"][:, 9:] += 100  # with a kernel of one value, padding can only act through the loss itself
    torch.testing.assert_close(model(**inputs), before)


def test_passes_of_fewer_rows_give_the_same_loss():
    model = generator().eval()
    inputs = rows(model)
    torch.testing.assert_close(model(**inputs, rows_per_pass=2), model(**inputs))


def test_min_snr_weights_rows_by_their_time():
    plain, weighted = generator().eval(), generator(min_snr_gamma=0.5).eval()
    inputs = rows(plain)
    assert weighted(**inputs) < plain(**inputs)
    high = inputs | {"t_R": torch.full((9,), 29)}  # there the SNR is below gamma
    snr = plain.diffusion.abar_T[29] / (1 - plain.diffusion.abar_T[29])
    if snr < 0.5:
        torch.testing.assert_close(weighted(**high), plain(**high))


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", ["trailing", "ddpm", "ddim", "dpm_solver_sde", "heun"])
def test_networks_do_not_depend_on_how_they_are_cut(kind: str):
    model = generator(num_states=3).eval()
    sampler = SamplerConfig(kind=kind, steps=5)
    prototypes = model.prototypes(torch.tensor([0, 1, 2]))
    seeds = [11, 12, 13]
    whole = sample_tokens(model, prototypes, seeds, sampler)
    alone = torch.cat(
        [sample_tokens(model, prototypes[i : i + 1], seeds[i : i + 1], sampler, rows_per_pass=16) for i in range(3)]
    )
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)
    shares = [sample_tokens(model, prototypes, seeds, sampler, tokens=part) for part in token_shares(37, 2)]
    torch.testing.assert_close(torch.cat(shares, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1])
    assert torch.equal(sample_tokens(model, prototypes, seeds, sampler), whole)


def test_hoisted_projections_change_nothing():
    model = generator(num_states=1).eval()
    prototypes, sampler = model.prototypes(torch.tensor([0])), SamplerConfig(steps=4)
    with_hoist = sample_tokens(model, prototypes, [1], sampler)
    torch.testing.assert_close(sample_tokens(model, prototypes, [1], sampler, hoist=False), with_hoist)


def test_padding_is_held_at_zero_and_values_are_free():
    model, valid_L = generator(kernel_size=1).eval(), torch.full((37,), 12)
    valid_L[5] = 7
    sampler = SamplerConfig(steps=6)
    held = sample_tokens(model, model.prototypes(), [1], sampler, valid_L=valid_L)[0]
    assert held[5, 7:].abs().max() < 1e-5
    free = sample_tokens(model, model.prototypes(), [1], SamplerConfig(steps=6, padding="free"), valid_L=valid_L)[0]
    assert free[5, 7:].abs().max() > 1e-3
    torch.testing.assert_close(held[5, :7], free[5, :7])  # with a kernel of one value nothing is seen of the padding
    torch.testing.assert_close(held[6:], free[6:])


def test_shares_of_tokens_are_whole_blocks_that_cover_everything():
    for count, processes in ((37, 2), (16, 4), (200, 3)):
        shares = token_shares(count, processes)
        assert [i for share in shares for i in share] == list(range(count))
        assert all(share.start % NOISE_BLOCK == 0 for share in shares if len(share))


def test_guidance_is_a_line_through_both_predictions():
    model = generator(condition="full", condition_size=10, d_condition=8).eval()
    bits = torch.eye(10)[:1]
    conditional, null = model.prototypes(None, bits), model.prototypes(None, None)
    plain = sample_tokens(model, conditional, [5], SamplerConfig(steps=3))
    one = sample_tokens(model, conditional, [5], SamplerConfig(steps=3, guidance=1.0 + 1e-6), null_prototypes_nLP=null)
    torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-3)
    none = sample_tokens(model, conditional, [5], SamplerConfig(steps=3, guidance=0.0), null_prototypes_nLP=null)
    torch.testing.assert_close(none, sample_tokens(model, null, [5], SamplerConfig(steps=3)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="guidance"):
        sample_tokens(model, conditional, [5], SamplerConfig(steps=3, guidance=2.0))


def test_more_steps_than_trained_times_are_refused_before_sampling():
    model = generator().eval()
    with pytest.raises(ConfigError, match=r"sampling\.steps=31"):
        sample_tokens(model, model.prototypes(), [0], SamplerConfig(steps=31))


# ------------------------------------------------------------------------------------------------------ conditions


def test_a_gated_condition_reaches_only_the_open_tokens_and_those_after_them():
    model = generator(condition="gated", condition_size=10, d_condition=8, gate=("layer6.*",)).eval()
    first, second = model.prototypes(None, torch.eye(10)[:2])
    changed = ~torch.isclose(first, second).all(dim=1)
    assert not changed[:30].any() and changed[30:].all()


def test_the_released_gate_opens_the_last_eight_tokens():
    gate = generator(condition="gated", condition_size=10, d_condition=8).to_condition_gate
    assert gate.flatten().tolist() == [0.0] * 29 + [1.0] * 8


def test_a_gate_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"head\.\*.*matches none"):
        name_gate(["head.*"], ["conv.weight"], torch.zeros(3))


def test_dropped_conditions_are_the_null_condition():
    model = generator(condition="full", condition_size=10, d_condition=8).eval()
    bits = torch.eye(10)[:2]
    kept = model.prototypes(None, bits, torch.tensor([True, False]))
    torch.testing.assert_close(kept[0], model.prototypes(None, bits)[0])
    torch.testing.assert_close(kept[1], model.prototypes(None, None)[0])


def test_conditions_and_states_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="length 9.*10 numbers"):
        generator(condition="full", condition_size=10, d_condition=8).prototypes(None, torch.zeros(1, 9))
    with pytest.raises(ConfigError, match="no permutation states"):
        generator().prototypes(torch.tensor([0]))


def test_all_states_are_equal_at_the_start():
    weight = generator(num_states=3).to_permutation_state.weight
    assert torch.equal(weight, torch.full_like(weight, 1 / 16))


# -------------------------------------------------------------------------------------------------------- sources


def test_sources_are_distinct_pairs_and_list_their_networks():
    condition = torch.tensor([[0.0], [1.0], [0.0], [0.0], [1.0]])
    sources = find_sources(torch.tensor([0, 0, 1, 0, 0]), condition, use_states=True)
    assert sources.source_K.tolist() == [0, 1, 2, 0, 1]
    assert sources.state_S.tolist() == [0, 0, 1]
    chosen = sources.members(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0.0, 0.99, 0.2, 0.6, 0.999999]))
    assert chosen.tolist() == [0, 3, 1, 4, 2]
    alone = find_sources(torch.tensor([0, 0, 1]), None, use_states=False)
    assert len(alone) == 1 and alone.state_S is None and alone.members_K.tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- denoiser


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norms_give_the_same_keys_but_for_their_own(norm: str):
    net = ConvDenoiser([1, 4, 8, 4, 1], 12, 6, kernel_size=3, norm=norm)
    keys = {key.rsplit(".", 1)[1] for key in net.state_dict() if re.search(r"list\.\d+\.1\.0\.", key)}
    batch = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert keys == {"batch": batch, "group": {"weight", "bias"}, "none": set()}[norm]


def test_batch_norm_equals_torch_and_updates_once_under_recomputation():
    from torch.utils.checkpoint import checkpoint

    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(5, 4, 6, requires_grad=True)
    checkpoint(ours, x, use_reentrant=False).square().sum().backward()
    theirs(x)
    assert ours.num_batches_tracked == 1
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
