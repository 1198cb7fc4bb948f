"""Mamba-2: chunks, steps, causality, extremes, and transformers' implementation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from rpg import mamba_kernels
from rpg.mamba2 import Mamba2Mixer
from rpg.ssd import ssd_scan, ssd_step


def scan_inputs(length: int, heads: int = 4, groups: int = 2, width: int = 3, states: int = 5, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, heads, width, generator=rng)
    a = torch.rand(2, length, heads, generator=rng) * 0.2
    A = -torch.rand(heads, generator=rng) * 16
    B = torch.randn(2, length, groups, states, generator=rng)
    C = torch.randn(2, length, groups, states, generator=rng)
    return x, a, A, B, C, torch.randn(heads, generator=rng)


def steps(x, a, A, B, C, D):
    state, outputs = torch.zeros(2, x.shape[2], x.shape[3], B.shape[3]), []
    for t in range(x.shape[1]):
        y, state = ssd_step(state, x[:, t], a[:, t], A, B[:, t], C[:, t], D)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def test_every_chunk_size_gives_the_steps_of_the_recurrence():
    inputs = scan_inputs(300)
    expected, last = steps(*inputs)
    for chunk in (1, 8, 64, 256, 300):
        y, state = ssd_scan(*inputs, chunk_size=chunk)
        assert (y - expected).abs().max() < 1e-4
        assert (state - last).abs().max() < 1e-4


@given(length=st.integers(1, 40), chunk=st.integers(1, 17), groups=st.sampled_from([1, 2, 4]))
def test_lengths_that_are_no_multiple_of_the_chunk(length: int, chunk: int, groups: int):
    inputs = scan_inputs(length, groups=groups, seed=length)
    torch.testing.assert_close(ssd_scan(*inputs, chunk_size=chunk)[0], steps(*inputs)[0], rtol=1e-4, atol=1e-4)


def test_a_sequence_may_be_cut_and_continued_from_its_state():
    x, a, A, B, C, D = scan_inputs(37)
    whole, last = ssd_scan(x, a, A, B, C, D, chunk_size=8)
    first, state = ssd_scan(x[:, :13], a[:, :13], A, B[:, :13], C[:, :13], D, chunk_size=8)
    second, end = ssd_scan(x[:, 13:], a[:, 13:], A, B[:, 13:], C[:, 13:], D, chunk_size=8, initial_BHPN=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-4)


def test_outputs_do_not_see_later_tokens():
    block = Mamba2Mixer(32, d_state=8, headdim=16, chunk_size=4)
    u = torch.randn(1, 21, 32)
    changed = u.clone()
    changed[:, 11] += 1
    before, after = block(u), block(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


def test_fast_decay_and_long_steps_stay_finite_with_finite_gradients():
    block = Mamba2Mixer(32, d_state=8, headdim=16, chunk_size=64)
    with torch.no_grad():
        block.A_log.fill_(math.log(16))
        block.dt_bias.fill_(50.0)
    u = (torch.randn(1, 200, 32) * 10).requires_grad_()
    y = block(u)
    y.square().sum().backward()
    assert y.isfinite().all() and u.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_steps_equal_the_whole_sequence():
    block = Mamba2Mixer(32, d_state=8, headdim=16, ngroups=2, chunk_size=4)
    u = torch.randn(2, 9, 32)
    state, outputs = block.initial_state(2), []
    for position in u.unbind(1):
        y, state = block.step(position, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), block(u), rtol=1e-4, atol=1e-5)


def test_transformers_block_with_the_same_weights_agrees():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

    ours = Mamba2Mixer(64, d_state=16, headdim=32, chunk_size=16, ngroups=1)
    config = Mamba2Config(
        hidden_size=64, state_size=16, num_heads=4, head_dim=32, n_groups=1, expand=2, conv_kernel=4,
        use_bias=False, use_conv_bias=True, chunk_size=8, num_hidden_layers=1, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    theirs = TheirMixer(config, layer_idx=0)
    with torch.no_grad():
        ours.norm.weight.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    u = torch.randn(2, 37, 64)
    inputs = [u.clone().requires_grad_() for _ in range(2)]
    outputs = [block(one) for block, one in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-3, msg=name)


def test_gated_norm_has_the_gradients_of_its_formula():
    from torch.nn import functional as F

    from rpg.mamba2 import EPSILON, GatedRMSNorm

    norm = GatedRMSNorm(12, groups=3).double()
    y, z = (torch.randn(2, 5, 12, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    gated = (y * F.silu(z)).unflatten(-1, (3, 4))
    plain = (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPSILON)).flatten(-2) * norm.weight.float()
    cotangent = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * cotangent).sum(), (y, z, norm.weight))
    found = torch.autograd.grad((norm(y, z) * cotangent).sum(), (y, z, norm.weight))
    torch.testing.assert_close(norm(y, z), plain)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32():
    block, u = Mamba2Mixer(64, d_state=16, headdim=32), torch.randn(1, 50, 64)
    expected = block(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(u)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"d_model=50 x model\.expand=2 = 100.*headdim=64"):
        Mamba2Mixer(50)
    with pytest.raises(ConfigError, match="ngroups=3"):
        Mamba2Mixer(64, headdim=32, ngroups=3)


def test_kernels_are_used_only_where_they_are_installed_and_wanted(monkeypatch: pytest.MonkeyPatch):
    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(mamba_kernels, "_load", lambda: None)
    assert not mamba_kernels.usable(OnGPU())
    monkeypatch.setattr(mamba_kernels, "_load", lambda: (object(), None))
    assert mamba_kernels.usable(OnGPU())
    assert not mamba_kernels.usable(torch.zeros(1))
    monkeypatch.setenv(mamba_kernels.SWITCH, "0")
    assert not mamba_kernels.usable(OnGPU())


def test_the_kernels_get_what_the_recurrence_is(monkeypatch: pytest.MonkeyPatch):
    """A stand-in with the signature of mamba-ssm's scan, computed by ours, must give the block's own output."""

    def scan(x, dt, A, B, C, *, chunk_size, D, dt_bias, dt_softplus):
        assert dt_softplus and chunk_size == mamba_kernels.KERNEL_CHUNK
        a = torch.nn.functional.softplus(dt.float() + dt_bias)
        return ssd_scan(x, a, A, B, C, D, chunk_size=7)[0]

    block, u = Mamba2Mixer(32, d_state=8, headdim=16), torch.randn(2, 11, 32)
    expected = block(u)
    monkeypatch.setattr(mamba_kernels, "_load", lambda: (scan, None))
    monkeypatch.setattr(mamba_kernels, "usable", lambda tensor: True)
    torch.testing.assert_close(block(u), expected, rtol=1e-4, atol=1e-5)
