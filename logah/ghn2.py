"""GHN-2, the hypernetwork before GHN-3: a gated network walks the graph node by node; for published weights only.

Dimensions: B graphs, N nodes, d width.

Source: GHN-2 (Knyazev et al., 2021), equations 3 and 4, after graph hypernetworks (Zhang et al., 2019).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from logah.decoder_dense import DenseDecoder, VectorDecoder
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig


class Message(nn.Module):
    """d -> hidden -> d with ReLU after both, under the published names ``fc.0`` and ``fc.2``."""

    def __init__(self, hid: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(hid, hidden), nn.ReLU(), nn.Linear(hidden, hid), nn.ReLU())

    def forward(self, x_Nd: Tensor) -> Tensor:
        return self.fc(x_Nd)


class GatedGraphNetwork(nn.Module):
    """One walk from the input to the output and one back; each node is updated once per walk, by one shared GRU cell.

    A node hears the sum of the messages of its predecessors (on the way back: successors) and, with virtual edges, of
    all nodes with a path to it, divided by its length.
    """

    def __init__(self, hid: int, *, virtual_edges: bool) -> None:
        super().__init__()
        self.mlp = Message(hid, hid // 2 if virtual_edges else hid)
        self.mlp_ve = Message(hid, hid // 2) if virtual_edges else None
        self.gru = nn.GRUCell(hid, hid)

    @torch.no_grad()
    def forward(self, x_BNd: Tensor, distance_BNN: Tensor, mask_BN: Tensor) -> Tensor:
        """Embeddings of all nodes; padding comes back as zeros."""
        y_BNd = torch.zeros_like(x_BNd)
        for graph, mask_N in enumerate(mask_BN):
            count = int(mask_N.sum())
            y_BNd[graph, :count] = self.walk(x_BNd[graph, :count].clone(), distance_BNN[graph, :count, :count])
        return y_BNd

    def walk(self, x_Nd: Tensor, distance_NN: Tensor) -> Tensor:
        """Both walks over one graph."""
        reached = torch.nonzero(distance_NN.any(dim=0))
        last = int(reached.max()) + 1 if len(reached) else 1  # nodes after it, which nothing reaches, are passed over
        x_Nd = self._one_way(x_Nd, distance_NN, range(last))
        return self._one_way(x_Nd, distance_NN.T, reversed(range(last)))

    def _one_way(self, x_Nd: Tensor, distance_NN: Tensor, order: Iterable[int]) -> Tensor:
        """``distance_NN[i, j]``: length of the path by which j hears i."""
        edge_NN = (distance_NN == 1).to(x_Nd.dtype)
        share_NN = torch.where(distance_NN > 0, 1 / distance_NN.clamp_min(1), 0).to(x_Nd.dtype)
        near_Nd = self.mlp(x_Nd)
        far_Nd = None if self.mlp_ve is None else self.mlp_ve(x_Nd)
        for node in order:
            heard_1d = edge_NN[:, node, None].T @ near_Nd
            if far_Nd is not None:
                heard_1d = heard_1d + share_NN[:, node, None].T @ far_Nd
            x_Nd[node] = self.gru(heard_1d, x_Nd[node : node + 1])[0]
            # later nodes hear the updated one
            near_Nd[node] = self.mlp(x_Nd[node : node + 1])[0]
            if far_Nd is not None:
                far_Nd[node] = self.mlp_ve(x_Nd[node : node + 1])[0]
        return x_Nd


class GHN2(HyperNetwork):
    """The published hypernetwork; its graphs, shape encoder and dense decoder are those of GHN-3.

    Kernels are cropped at their first corner, and no gradient reaches the walks over the graph.
    """

    def __init__(self, config: HyperNetworkConfig) -> None:
        if config.decoder != "ghn2":
            raise ConfigError(f"model.decoder={config.decoder} is not GHN-2's; build it with HyperNetwork.")
        super().__init__(config)
        self.gnn = GatedGraphNetwork(config.hid, virtual_edges=config.ve_cutoff > 1)

    def _build_decoders(self, config: HyperNetworkConfig) -> None:
        channels = max(config.max_shape[:2])
        self.decoder = DenseDecoder(config.hid, config.max_shape, config.num_classes, centred=False)
        self.decoder_1d = VectorDecoder(config.hid, channels)
        self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(channels, config.num_classes))

    @property
    def blocks(self) -> list[nn.Module]:
        return []
