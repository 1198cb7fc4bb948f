"""The hypernetwork: a graph transformer over the nodes of a network, and decoders of their parameters.

Dimensions: B graphs, N nodes, d width.

Source: LoGAH (arXiv 2405.16287); GHN-3 (Knyazev et al., 2023) with the dense decoder. The keys of the state dict are
those of the released checkpoints.
"""

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from logah.decoder_dense import DenseDecoder, VectorDecoder, shrink_last_layers
from logah.decoder_lowrank import LowRankDecoder
from logah.decoder_v2 import LowRankV2Decoder
from logah.encoder import MAX_DISTANCE, Encoder
from logah.graph_batch import GraphBatch, collate
from logah.model_config import HyperNetworkConfig
from logah.net_graph import NetGraph
from logah.primitives import NUM_PRIMITIVES, NUMBER, PRIMITIVES
from logah.shape_encoder import ShapeEncoder

PLACEHOLDERS = ("decoder_1d.0.", "bias_class.1.", "decoder.l1.")
"""Published names of low-rank models without a decoder for vectors that no prediction reads; a file without them is
complete."""


class HyperNetwork(nn.Module):
    """Embeds graphs; ``logah/prediction.py`` decodes parameters from the embeddings."""

    def __init__(self, config: HyperNetworkConfig) -> None:
        super().__init__()
        self.config = config
        rows = NUM_PRIMITIVES[config.variant]
        self.ln = nn.LayerNorm(config.hid) if config.layernorm else nn.Identity()
        self.embed = nn.Embedding(rows, config.hid)
        self.shape_enc = ShapeEncoder(config.hid, config.num_classes, config.max_shape[3], config.variant)
        self.gnn = Encoder(config.hid, config.heads, config.layers, with_edges=config.virtual_edges)
        self._build_decoders(config)
        self._start()

    def _build_decoders(self, config: HyperNetworkConfig) -> None:
        channels = max(config.max_shape[:2])
        if config.decoder == "dense":
            self.decoder = DenseDecoder(config.hid, config.max_shape, config.num_classes)
        elif config.decoder == "lowrank":
            self.decoder = LowRankDecoder(config.hid, config.lora_r, config.max_ck_lora)
            channels = config.hid // 2
        elif config.decoder == "lowrank_v2":
            self.decoder = LowRankV2Decoder(config.hid, config.lora_r)
            return
        else:
            raise ConfigError(
                f"model.decoder={config.decoder!r} is only loaded, not trained; choose lowrank, dense or lowrank_v2."
            )
        if config.decoder == "dense" or config.use_1d_decoder:
            self.decoder_1d = VectorDecoder(config.hid, channels)
            self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(channels, config.num_classes))
        else:  # never used, but they stand in the released state dicts
            self.decoder_1d = nn.Sequential(nn.Linear(1, 1))
            self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))

    @torch.no_grad()
    def _start(self) -> None:
        """GHN-3's initial values: embeddings of deviation columns^-1/2, small last maps of the dense decoders."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=module.embedding_dim**-0.5)
        if isinstance(self.decoder, DenseDecoder):
            shrink_last_layers(self.decoder.conv[2], self.decoder.class_layer_predictor[1])
        if isinstance(getattr(self, "decoder_1d", None), VectorDecoder):
            shrink_last_layers(self.decoder_1d.fc[2])

    @property
    def blocks(self) -> list[nn.Module]:
        """What sharding and recomputation treat one by one: all layers but the first, whose tables of degrees and
        distances are read before any layer runs."""
        return list(self.gnn)[1:]

    def check_graph(self, graph: NetGraph) -> None:
        """Raises ConfigError if the graph was traced otherwise than those it was trained on, or holds a parameter of a
        kind that it has no embedding for."""
        config = self.config
        for name in ("version", "attention", "ve_cutoff"):
            wanted = getattr(config, "graph_version" if name == "version" else name)
            if getattr(graph, name) != wanted:
                raise ConfigError(
                    f"The graph was traced with {name}={getattr(graph, name)!r}, the hypernetwork was trained on "
                    f"graphs with {name}={wanted!r}; trace it so."
                )
        rows = self.embed.num_embeddings
        for node in graph.nodes:
            if node.type >= rows and node.listed:
                raise ConfigError(
                    f"{node.name} is a {PRIMITIVES[node.type]}, which a hypernetwork with variant={config.variant} "
                    "does not know; predict this network with one of variant=llm."
                )

    def embed_batch(self, batch: GraphBatch) -> Tensor:
        """Embeddings of all nodes, ``(B, N, d)``; those of padding mean nothing."""
        if batch.distance_BNN.amax() > MAX_DISTANCE:
            raise ConfigError(
                f"A graph holds a distance of {int(batch.distance_BNN.amax())}; the largest that can be embedded is "
                f"{MAX_DISTANCE}. Lower model.ve_cutoff."
            )
        known = batch.type_BN < self.embed.num_embeddings
        x_BNd = self.embed(batch.type_BN.where(known, torch.full_like(batch.type_BN, NUMBER["sum"])))
        x_BNd = self.shape_enc(x_BNd, batch.shapes)
        return self.ln(self.gnn(x_BNd, batch.distance_BNN, batch.mask_BN))

    def forward(self, batch: GraphBatch) -> Tensor:
        """See ``embed_batch``."""
        return self.embed_batch(batch)

    def embed_graphs(self, graphs: list[NetGraph]) -> Tensor:
        """``embed_batch`` of graphs on this hypernetwork's device, after ``check_graph``."""
        for graph in graphs:
            self.check_graph(graph)
        return self.embed_batch(collate(graphs).to(self.embed.weight.device))
