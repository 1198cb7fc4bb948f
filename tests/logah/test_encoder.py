"""The graph transformer: padding, distances, gradients, against a direct reading of its definition."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.errors import ConfigError
from common.testing.golden import fill
from logah.encoder import EDGE_OFFSET, INVALID, MAX_DISTANCE, Encoder
from logah.graph_batch import GraphBatch
from tests.logah.tiny_hypernetwork import tiny_hypernetwork

HID, HEADS, LAYERS = 16, 4, 2


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return fill(Encoder(HID, HEADS, LAYERS), 4).eval()


def chain(nodes: int, cutoff: int = 50) -> torch.Tensor:
    distance = torch.arange(nodes)[None] - torch.arange(nodes)[:, None]
    return distance.clamp(min=0) * (distance <= cutoff)


def batch_of(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    largest = max(sizes)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(len(sizes), largest, HID, generator=rng)
    distance = torch.zeros(len(sizes), largest, largest, dtype=torch.long)
    mask = torch.zeros(len(sizes), largest, dtype=torch.bool)
    for row, size in enumerate(sizes):
        distance[row, :size, :size] = chain(size)
        mask[row, :size] = True
    return x, distance, mask


@torch.no_grad()
def test_a_padded_graph_gives_what_it_gives_alone(encoder: Encoder):
    sizes = [9, 4, 6]
    x, distance, mask = batch_of(sizes)
    together = encoder(x, distance, mask)
    for row, size in enumerate(sizes):
        alone = encoder(x[row : row + 1, :size], distance[row : row + 1, :size, :size], mask[row : row + 1, :size])
        assert torch.allclose(together[row, :size], alone[0], atol=1e-6)


@torch.no_grad()
def test_what_padding_holds_never_reaches_a_node(encoder: Encoder):
    x, distance, mask = batch_of([8, 5])
    clean = encoder(x, distance, mask)[1, :5]
    x[1, 5:] = 1e3
    distance[1, 5:, :5] = 7  # no edge: degrees count edges before the mask is applied
    distance[1, :5, 5:] = 9
    assert torch.equal(encoder(x, distance, mask)[1, :5], clean)


@torch.no_grad()
def test_bias_of_distinct_pairs_equals_that_of_every_pair(encoder: Encoder):
    _, distance, mask = batch_of([7, 5])
    attention = encoder[0].attn
    table = attention.edge_embed.embed
    features = torch.cat([table(distance + EDGE_OFFSET), table(distance.transpose(1, 2) + EDGE_OFFSET)], -1)
    expected = attention.proj_e(features).permute(0, 3, 1, 2)
    bias = attention.edge_bias(distance, mask)
    valid = (mask[:, :, None] & mask[:, None, :])[:, None].expand_as(bias)
    assert torch.allclose(bias[valid], expected[valid], atol=1e-6)
    assert (bias[~valid] == INVALID).all()


@torch.no_grad()
def test_a_layer_is_pre_norm_attention_and_feed_forward(encoder: Encoder):
    x, distance, mask = batch_of([6])
    layer = encoder[0]
    bias = layer.attn.edge_bias(distance, mask)
    q, k, v = layer.attn.to_qkv(layer.ln1(x)).view(1, 6, 3, HEADS, HID // HEADS).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(HID // HEADS) + bias).softmax(-1)
    h = x + layer.attn.to_out((weights @ v).transpose(1, 2).reshape(1, 6, HID))
    hidden = F.gelu(layer.ff.net[0](layer.ln2(h)))
    assert torch.allclose(layer(x, bias), h + layer.ff.net[3](hidden), atol=1e-5)


@torch.no_grad()
def test_degrees_and_the_first_nodes_distances_are_added_once(encoder: Encoder):
    x, distance, mask = batch_of([4])
    layer = encoder[0]
    incoming, outgoing = [0, 1, 1, 1], [1, 1, 1, 0]
    expected = x[0].clone()
    for node in range(4):
        expected[node] += layer.centrality_embed_in.weight[incoming[node]]
        expected[node] += layer.centrality_embed_out.weight[outgoing[node]]
        expected[node] += layer.input_dist_embed.weight[node]
    assert torch.allclose(layer.add_structure(x, distance, mask)[0], expected, atol=1e-6)


def test_gradients_reach_every_tensor():
    encoder = fill(Encoder(HID, HEADS, LAYERS), 4)
    x, distance, mask = batch_of([6, 4])
    encoder(x, distance, mask)[mask].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_distances_beyond_the_table_are_an_error():
    model = tiny_hypernetwork()
    distance = chain(4)
    distance[0, 3] = MAX_DISTANCE + 1
    batch = GraphBatch(torch.zeros(1, 4, dtype=torch.long), distance[None], torch.ones(1, 4, dtype=torch.bool), ((),))
    with pytest.raises(ConfigError, match=rf"distance of {MAX_DISTANCE + 1}.*ve_cutoff"):
        model(batch)
