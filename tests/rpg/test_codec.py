"""Tokens: round trips of every kind of tensor, layouts, padding, sizes of published networks, folders."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common.errors import ConfigError, DataError
from rpg.codec import TokenCodec, layer_to_token, token_layout
from rpg.structure import Structure, compute_structure, structure_of_shapes

D = 16


def every_kind_of_tensor(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with all that a checkpoint can hold."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    tied = normal(6, 5)
    return {
        "scalar": torch.tensor(2.5 + seed),
        "one": normal(1),
        "one_by_one": normal(1, 1),
        "conv.weight": normal(4, 3, 3, 3),
        "bn.weight": normal(4),
        "bn.running_mean": normal(4) * 3,
        "bn.running_var": normal(4).square() + 0.1,
        "bn.num_batches_tracked": torch.tensor(7 + seed),
        "position_ids": torch.arange(10).view(2, 5),
        "mask": torch.tensor([[True, False], [False, True]]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "complex": torch.complex(normal(3), normal(3)),
        "half": normal(3, 7).half(),
        "bf16": normal(D, 2).bfloat16(),
        "double": normal(9).double(),
        "float8": normal(12).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3),
        "embedding": tied,
        "head": tied,
        "transposed": normal(5, 8).t(),
        "channels_last": normal(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "slice": normal(40)[3:20:2],
        "d_minus_1": normal(D - 1),
        "d": normal(D),
        "d_plus_1": normal(D + 1),
        "one_dimensional": normal(50),
        "three": normal(2, 3, 40),
        "five": normal(2, 1, 3, 2, 5),
        "zeros": torch.zeros(11),
        "ones": torch.ones(4, 4),
    }


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


def assert_restored(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.dtype.itemsize > 2:
            scale = tensor.double().abs().max()
            assert (found[name].double() - tensor.double()).abs().max() <= 1e-6 * scale, name
        else:
            assert torch.equal(_comparable(found[name]), _comparable(tensor)), name


@pytest.mark.parametrize("granularity", [0, 1, 2])
@pytest.mark.parametrize("normalisation", ["layer", "residual"])
def test_every_kind_of_tensor_survives(granularity, normalisation):
    checkpoints = [every_kind_of_tensor(seed) for seed in range(3)]
    codec = TokenCodec(compute_structure(checkpoints, normalisation), D, granularity)
    expected = dict(checkpoints[1], scalar=checkpoints[0]["scalar"], one=checkpoints[0]["one"])
    for name in ("one_by_one", "bn.num_batches_tracked", "complex"):
        expected[name] = checkpoints[0][name]  # constants come from the first checkpoint
    tokens_LD = codec.encode(checkpoints[1])
    assert tokens_LD.shape == (codec.num_tokens, D) and tokens_LD.dtype == torch.float32
    found = codec.decode(tokens_LD)
    assert_restored(found, expected)
    assert found["head"] is found["embedding"]
    assert torch.equal(found["bn.num_batches_tracked"], torch.tensor(7))


def test_a_decoded_network_can_be_changed_without_touching_the_codec():
    state = every_kind_of_tensor()
    codec = TokenCodec(compute_structure([state]), D)
    tokens_LD = codec.encode(state)
    codec.decode(tokens_LD)["position_ids"].zero_()
    assert torch.equal(codec.decode(tokens_LD)["position_ids"], state["position_ids"])


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    dim=st.integers(1, 40),
    granularity=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 1000),
)
def test_any_shape_survives_any_cut(shape, dim, granularity, seed):
    draw = torch.Generator().manual_seed(seed)
    state = {"a": torch.randn(3, generator=draw), "w": torch.randn(shape, generator=draw),
             "z": torch.randn(5, generator=draw)}  # fmt: skip
    codec = TokenCodec(compute_structure([state]), dim, granularity)
    tokens_LD = codec.encode(state)
    assert torch.equal(~torch.isnan(tokens_LD), codec.mask())
    assert int(codec.valid_L.sum()) == codec.num_values == sum(e.num_values for e in codec.varying)
    assert_restored(codec.decode(tokens_LD), state)
    if granularity:
        place = [(int(t), int(i)) for t, i in zip(codec.token_tensor_L, codec.token_index_L)]
        assert place == [(t, i) for t, span in enumerate(codec.spans) for i in range(span.count)]


def test_what_padding_holds_does_not_matter():
    state = every_kind_of_tensor()
    codec = TokenCodec(compute_structure([state]), D)
    tokens_LD = codec.encode(state)
    filled_LD = torch.where(codec.mask(), tokens_LD, 1e9)
    for name, tensor in codec.decode(tokens_LD).items():
        assert torch.equal(codec.decode(filled_LD[None])[name], tensor)


def test_fill_value_replaces_nan():
    state = {"w": torch.randn(5)}
    tokens_LD = TokenCodec(compute_structure([state]), 4, fill_value=0.0).encode(state)
    assert torch.equal(tokens_LD[1, 1:], torch.zeros(3))


def test_encoding_into_given_memory_leaves_nothing_of_before():
    state = every_kind_of_tensor()
    codec = TokenCodec(compute_structure([state]), D)
    out = torch.full((codec.num_tokens, D), 77.0)
    assert codec.encode(state, out=out) is out
    assert torch.equal(out.nan_to_num(5.0), codec.encode(state).nan_to_num(5.0))


def test_constant_tensors_come_back_exactly_whatever_is_generated():
    state = {"zeros": torch.zeros(7), "ones": torch.ones(3), "tenth": torch.full((9,), 0.1), "w": torch.randn(8)}
    codec = TokenCodec(compute_structure([state, state]), 4)
    tokens_LD = codec.encode(state)
    assert torch.isfinite(tokens_LD[codec.mask()]).all()
    found = codec.decode(torch.randn_like(tokens_LD))
    for name in ("zeros", "ones", "tenth"):
        assert torch.equal(found[name], state[name])


def test_a_tensor_of_equal_values_that_move_between_checkpoints_is_learned():
    checkpoints = [{"w": torch.full((4,), value)} for value in (1.0, 2.0, 3.0)]
    codec = TokenCodec(compute_structure(checkpoints), 4)
    assert torch.allclose(codec.decode(codec.encode(checkpoints[2]))["w"], checkpoints[2]["w"])


def test_running_variances_are_raised_to_a_thousandth_of_their_scale():
    variance = torch.tensor([0.0, 1e-6, 1.0, 4.0])
    structure = compute_structure([{"bn.running_var": variance}])
    codec = TokenCodec(structure, 4)
    found = codec.decode(codec.encode({"bn.running_var": variance}))["bn.running_var"]
    least = 0.001 * structure.entries[0].scale
    assert torch.allclose(found, variance.clamp(min=least), rtol=1e-6)


@pytest.mark.parametrize("variance", [[0.0, 0.0, 0.0], [-1.0, 2.0, 3.0]])
def test_running_variances_without_a_logarithm_are_normalised_like_weights(variance):
    state = {"bn.running_var": torch.tensor(variance)}
    codec = TokenCodec(compute_structure([state]), 4)
    assert codec.varying[0].scale is None
    assert torch.allclose(codec.decode(codec.encode(state))["bn.running_var"], state["bn.running_var"])


def test_residual_tokens_have_mean_zero_and_deviation_one_over_checkpoints():
    base = {"a": torch.randn(40) * 5 + 3, "bn.running_var": torch.rand(20) + 0.5}
    checkpoints = [{name: (w + 0.01 * torch.randn(w.shape)).abs() for name, w in base.items()} for _ in range(12)]
    codec = TokenCodec(compute_structure(checkpoints, "residual"), 8)
    tokens_KLD = torch.stack([codec.encode(state) for state in checkpoints])
    assert tokens_KLD[:, codec.mask()].mean(0).abs().max() < 1e-3
    for token in range(codec.num_tokens):
        values = tokens_KLD[:, token, : codec.valid_L[token]]
        assert math.isclose(values.var(0).mean().sqrt().item(), 1.0, rel_tol=1e-3)


def test_layouts_of_single_tensors():
    assert token_layout((17,), 16, 1) == (2, 16)
    assert token_layout((17,), 16, 2) == (17, 1)
    assert token_layout((2, 3, 40), 16, 2) == (24, 10)
    assert token_layout((12, 4), 16, 2) == (3, 16)
    tokens_nD = layer_to_token(torch.arange(36.0).view(4, 3, 3), 16, 2)
    assert torch.equal(tokens_nD[2, :9], torch.arange(18.0, 27.0)) and tokens_nD[:, 9:].isnan().all()


def test_tokens_of_a_tensor_by_name():
    state = {"a": torch.randn(20), "b": torch.randn(33), "c": torch.randn(4)}
    codec = TokenCodec(structure_of_shapes(state), 16)
    assert codec.tokens_of("b") == slice(2, 5)
    assert codec.token_tensor_L.tolist() == [0, 0, 1, 1, 1, 2]
    assert codec.token_index_L.tolist() == [0, 1, 0, 1, 2, 0]
    assert codec.valid_L.tolist() == [16, 4, 16, 16, 1, 4]


def task_vit_tiny() -> nn.Module:
    network = timm.create_model("vit_tiny_patch16_224")
    network.head = nn.Sequential(nn.Linear(192, 192), nn.SiLU(), nn.Linear(192, 2, bias=False))
    return network


NETWORKS = [
    # network, classes, dim_per_token, tokens, values, share that is not padding
    ("resnet18", 1000, 8192, 1510, 11_699_112, 0.946),
    ("resnet50_gn", 1000, 8192, 3223, 25_557_032, 0.968),
    ("vit_tiny_patch16_224", 1000, 8192, 808, 5_717_416, 0.864),
    ("vit_small_patch16_224", 1000, 8192, 2786, 22_050_664, 0.966),
    ("vit_base_patch16_224", 1000, 16384, 5378, 86_567_656, 0.982),
    ("convnext_large", 1000, 16384, 12311, 197_767_336, 0.980),
    ("convnext_atto", 1000, 8192, 552, 3_695_520, 0.817),
    ("mobilenetv3_large_100", 10, 4096, 1259, 4_239_242, 0.822),
    ("resnet18", 10, 8192, 1448, 11_191_242, 0.943),
    ("vit_base_patch16_224", 10, 16384, 5332, 85_806_346, 0.982),
    (task_vit_tiny, 2, 8192, 790, 5_561_856, 0.859),
    ("vit_tiny_patch16_224", 1000, 768, 7506, 5_717_416, None),
    ("vit_tiny_patch16_224", 1000, 1024, 5654, 5_717_416, None),
    ("vit_tiny_patch16_224", 1000, 2048, 2878, 5_717_416, None),
    ("vit_tiny_patch16_224", 1000, 4096, 1490, 5_717_416, None),
]


@pytest.mark.parametrize("network, classes, dim, tokens, values, fill", NETWORKS)
def test_published_networks_have_their_published_token_counts(network, classes, dim, tokens, values, fill):
    with torch.device("meta"):
        built = network() if callable(network) else timm.create_model(network, num_classes=classes)
    codec = TokenCodec(structure_of_shapes(built.state_dict()), dim)
    assert (codec.num_tokens, codec.num_values) == (tokens, values)
    assert fill is None or round(codec.fill, 3) == fill


def test_a_codec_comes_back_from_its_folder(tmp_path):
    checkpoints = [every_kind_of_tensor(seed) for seed in range(2)]
    for normalisation in ("layer", "residual"):
        codec = TokenCodec(compute_structure(checkpoints, normalisation), D, 2, fill_value=0.0)
        codec.to_folder(tmp_path / normalisation)
        again = TokenCodec.from_folder(tmp_path / normalisation)
        tokens_LD = codec.encode(checkpoints[1])
        assert torch.equal(again.encode(checkpoints[1]), tokens_LD)
        found, expected = again.decode(tokens_LD), codec.decode(tokens_LD)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_codecs_in_one_process_do_not_touch_each_other():
    state = every_kind_of_tensor()
    structure = compute_structure([state])
    first = TokenCodec(structure, 16, 1)
    tokens_LD = first.encode(state)
    TokenCodec(structure, 24, 2, fill_value=0.0).encode(state)
    assert torch.equal(first.encode(state).nan_to_num(9.0), tokens_LD.nan_to_num(9.0))


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"codec\.json cannot be read"):
        TokenCodec.from_folder(tmp_path)
    TokenCodec(compute_structure([{"w": torch.randn(4)}]), 4).to_folder(tmp_path)
    (tmp_path / "structure.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="does not hold a readable structure"):
        Structure.from_folder(tmp_path)


def test_wrong_options_and_tokens_are_named():
    structure = compute_structure([{"w": torch.randn(4)}])
    with pytest.raises(ConfigError, match="data.granularity=3"):
        TokenCodec(structure, 4, 3)
    with pytest.raises(ConfigError, match="data.dim_per_token=0"):
        TokenCodec(structure, 0)
    with pytest.raises(DataError, match="nothing to generate"):
        TokenCodec(compute_structure([{"n": torch.tensor(3)}]), 4)
    codec = TokenCodec(structure, 4)
    with pytest.raises(DataError, match=r"\(2, 4\).*\(1, 4\)"):
        codec.decode(torch.zeros(2, 4))
    with pytest.raises(DataError, match=r"'w' has shape \(5,\), but \(4,\)"):
        codec.encode({"w": torch.randn(5)})
