"""The graph transformer: attention between all nodes of a graph, biased by the distances between them.

Dimensions: B graphs, N nodes, d width, h heads, e width of a head, U distinct pairs of distances.

Source: GHN-3 (Knyazev et al., 2023), after Graphormer (Ying et al., 2021); LoGAH uses it unchanged.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_DEGREE = 100
MAX_INPUT_DISTANCE = 1000
EDGE_ROWS = 257
EDGE_OFFSET = 2  # row of distance 0
MAX_DISTANCE = EDGE_ROWS - 1 - EDGE_OFFSET
INVALID = -float(2**15)  # logit of a pair with a padded node; large enough for an exact zero after the softmax


class EdgeEmbedding(nn.Module):
    """Holds the table of distances under its published name, ``edge_embed.embed``."""

    def __init__(self, hid: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(EDGE_ROWS, hid)


class GraphAttention(nn.Module):
    """Self-attention over nodes; the first layer's instance also turns distances into the bias of all layers."""

    def __init__(self, hid: int, heads: int, *, with_edges: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(hid, 3 * hid, bias=False)
        self.to_out = nn.Sequential(nn.Linear(hid, hid))
        if with_edges:
            self.edge_embed = EdgeEmbedding(hid)
            self.proj_e = nn.Sequential(nn.Linear(2 * hid, hid), nn.ReLU(), nn.Linear(hid, heads))

    def edge_bias(self, distance_BNN: Tensor, mask_BN: Tensor) -> Tensor:
        """``(B, h, N, N)`` added to the logits: of (distance i -> j, distance j -> i), or ``INVALID``.

        A graph of hundreds of nodes has few distinct pairs of distances, so the network runs once per distinct pair.
        """
        code_BNN = distance_BNN * EDGE_ROWS + distance_BNN.transpose(1, 2)
        code_U, place = torch.unique(code_BNN, return_inverse=True)
        there_Ud = self.edge_embed.embed(code_U // EDGE_ROWS + EDGE_OFFSET)
        back_Ud = self.edge_embed.embed(code_U % EDGE_ROWS + EDGE_OFFSET)
        bias_Uh = self.proj_e(torch.cat([there_Ud, back_Ud], dim=-1))
        bias_BhNN = F.embedding(place, bias_Uh).permute(0, 3, 1, 2)
        return bias_BhNN.masked_fill(~(mask_BN[:, None, :, None] & mask_BN[:, None, None, :]), INVALID)

    def forward(self, x_BNd: Tensor, bias_BhNN: Tensor) -> Tensor:
        shape = (*x_BNd.shape[:2], 3, self.heads, -1)
        q, k, v = self.to_qkv(x_BNd).view(shape).permute(2, 0, 3, 1, 4)
        y_BhNe = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BhNN.to(q.dtype))
        return self.to_out(y_BhNe.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """d -> 4d -> d with the exact GELU; positions 1 and 2 of ``net`` hold what the published keys leave room for."""

    def __init__(self, hid: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hid, 4 * hid), nn.GELU(), nn.Identity(), nn.Linear(4 * hid, hid))

    def forward(self, x_BNd: Tensor) -> Tensor:
        return self.net(x_BNd)


class EncoderLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, hid: int, heads: int, *, first: bool, with_edges: bool = True) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(hid), nn.LayerNorm(hid)
        self.attn = GraphAttention(hid, heads, with_edges=first and with_edges)
        self.ff = FeedForward(hid)
        if first:
            self.centrality_embed_in = nn.Embedding(MAX_DEGREE + 1, hid)
            self.centrality_embed_out = nn.Embedding(MAX_DEGREE + 1, hid)
            self.input_dist_embed = nn.Embedding(MAX_INPUT_DISTANCE + 1, hid)

    def add_structure(self, x_BNd: Tensor, distance_BNN: Tensor, mask_BN: Tensor) -> Tensor:
        """Degrees and the distance from the first node, added to the features; padding becomes zero."""
        edge_BNN = distance_BNN == 1
        x_BNd = x_BNd + self.centrality_embed_in(edge_BNN.sum(1).clamp(max=MAX_DEGREE))
        x_BNd = x_BNd + self.centrality_embed_out(edge_BNN.sum(2).clamp(max=MAX_DEGREE))
        x_BNd = x_BNd + self.input_dist_embed(distance_BNN[:, 0].clamp(max=MAX_INPUT_DISTANCE))
        return x_BNd * mask_BN[..., None]

    def forward(self, x_BNd: Tensor, bias_BhNN: Tensor) -> Tensor:
        x_BNd = x_BNd + self.attn(self.ln1(x_BNd), bias_BhNN)
        return x_BNd + self.ff(self.ln2(x_BNd))


class Encoder(nn.ModuleList):
    """All layers; the keys of its state dict are ``{layer}.ln1.weight`` and so on."""

    def __init__(self, hid: int, heads: int, layers: int, *, with_edges: bool = True) -> None:
        super().__init__(EncoderLayer(hid, heads, first=number == 0, with_edges=with_edges) for number in range(layers))
        self.with_edges = with_edges

    def forward(self, x_BNd: Tensor, distance_BNN: Tensor, mask_BN: Tensor) -> Tensor:
        """Features of nodes after all layers.

        Args:
            distance_BNN: int64, at most ``MAX_DISTANCE``; see ``NetGraph.distance_NN``.
            mask_BN: True at nodes; what padding holds does not reach them.
        """
        x_BNd = self[0].add_structure(x_BNd, distance_BNN, mask_BN)
        if self.with_edges:
            bias_BhNN = self[0].attn.edge_bias(distance_BNN, mask_BN)
        else:
            valid = mask_BN[:, None, :, None] & mask_BN[:, None, None, :]
            bias_BhNN = torch.zeros(valid.shape, device=x_BNd.device).masked_fill(~valid, INVALID)
        for layer in self:
            x_BNd = layer(x_BNd, bias_BhNN)
        return x_BNd
