"""Parameters of described networks, and what a set of them looks like: table and histogram."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.report.curves import Figure, draw_figure
from common.report.tables import Table
from logah.architectures import Architecture

MILLION = 1e6
SIZE_NAMES = {
    "vit": ("num_layers", "hidden_dim", "num_heads", "patch_size"),
    "gpt2": ("n_layer", "n_embd", "n_head"),
    "llama": ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
}
COLOUR_CHANNELS = 3
COUNTED = {
    "vit": {
        "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "num_classes", "image_size", "dropout",
        "attention_dropout",
    },
    "gpt2": {
        "n_embd", "n_layer", "n_head", "n_inner", "vocab_size", "n_positions", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    },
    "llama": {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "max_position_embeddings",
        "attention_dropout",
    },
}  # fmt: skip
"""Options with which the formulas below hold; networks with others are built to be counted."""


def count_parameters(architecture: Architecture) -> int:
    """Parameters of a network, tied ones once."""
    formula = {"vit": _count_vit, "gpt2": _count_gpt2, "llama": _count_llama}.get(architecture.family)
    if formula is not None and architecture.options.keys() <= COUNTED[architecture.family]:
        return formula(architecture.options)
    return sum(parameter.numel() for parameter in architecture.build_meta().parameters())


def _count_vit(options: dict[str, Any]) -> int:
    c, m, k, p = (options[name] for name in ("hidden_dim", "mlp_dim", "num_classes", "patch_size"))
    tokens = (options["image_size"] // p) ** 2 + 1
    layer = (4 * c * c + 4 * c) + (2 * c * m + m + c) + 4 * c  # attention, MLP, two norms
    return (COLOUR_CHANNELS * p * p + 1) * c + (tokens + 1) * c + options["num_layers"] * layer + 2 * c + (c + 1) * k


def _count_gpt2(options: dict[str, Any]) -> int:
    c, vocabulary = options["n_embd"], options["vocab_size"]
    m = options.get("n_inner") or 4 * c
    layer = (4 * c * c + 4 * c) + (2 * c * m + m + c) + 4 * c
    tables = (1 if options["tie_word_embeddings"] else 2) * vocabulary + options["n_positions"]
    return tables * c + options["n_layer"] * layer + 2 * c


def _count_llama(options: dict[str, Any]) -> int:
    c, m, vocabulary = (options[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = c // options["num_attention_heads"] * options["num_key_value_heads"]
    layer = 2 * c * (c + keys) + 3 * c * m + 2 * c
    tables = 1 if options["tie_word_embeddings"] else 2
    return tables * vocabulary * c + options["num_hidden_layers"] * layer + c


def size_table(architectures: Sequence[Architecture], counts: Sequence[int]) -> Table:
    """Least, mean, deviation and most of parameters and of each size; one row each."""
    rows: list[list[Any]] = [_row("parameters (M)", np.array(counts) / MILLION)]
    family = architectures[0].family
    if all(each.family == family for each in architectures):
        for name in SIZE_NAMES.get(family, ()):
            rows.append(_row(name, np.array([each.options[name] for each in architectures], dtype=float)))
    return Table(
        name="sizes",
        columns=["", "least", "mean", "standard error", "deviation", "most"],
        rows=rows,
        caption=f"{len(architectures)} networks, {len(set(architectures))} of them different",
    )


def depth_table(architectures: Sequence[Architecture], counts: Sequence[int]) -> Table:
    """Networks and mean parameters by number of layers (all of them in one row where depth is no option)."""
    depths = [_depth(each) for each in architectures]
    rows = []
    for depth, number in sorted(Counter(depths).items()):
        of_depth = [count / MILLION for count, of in zip(counts, depths, strict=True) if of == depth]
        rows.append([depth or "any", number, min(of_depth), float(np.mean(of_depth)), max(of_depth)])
    return Table(
        name="depths", columns=["layers", "networks", "least (M)", "mean (M)", "most (M)"], rows=rows,
        caption="parameters by depth",
    )  # fmt: skip


def parameter_histogram(counts: Sequence[int], name: str = "parameters") -> Figure:
    """How many networks have how many parameters."""
    millions = np.array(counts) / MILLION

    def plot(axes: Any, theme: Any) -> None:
        axes[0].hist(millions, bins=min(40, max(5, len(set(counts)))), color=theme.colour(0))
        axes[0].axvline(float(millions.mean()), color=theme.colour(1), label=f"mean {millions.mean():.2f} M")
        axes[0].set_xlabel("parameters (M)")
        axes[0].set_ylabel("networks")
        axes[0].legend()

    caption = f"Parameters of {len(counts)} networks: {millions.min():.2f} to {millions.max():.2f} M."
    return draw_figure(name, caption, plot)


def _depth(architecture: Architecture) -> int:
    name = SIZE_NAMES.get(architecture.family, (None,))[0]
    return architecture.options[name] if name else 0


def _row(name: str, values: np.ndarray) -> list[Any]:
    deviation = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return [
        name, float(values.min()), float(values.mean()), deviation / len(values) ** 0.5, deviation,
        float(values.max()),
    ]  # fmt: skip
