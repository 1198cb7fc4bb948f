"""The kinds of nodes a computational graph has, in the order of the hypernetwork's embedding rows.

Source: GHN-3 (Knyazev et al., 2023) for the first fifteen; LoGAH (arXiv 2405.16287) adds three for language models.
"""

PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input", "bias", "bn", "ln",
    "pos_enc", "glob_avg", "rmsnorm", "rot_emb", "gate",
)  # fmt: skip
NUM_PRIMITIVES = {"vision": 15, "llm": 18}
"""Embedding rows of each variant of the hypernetwork."""

NUMBER = {name: number for number, name in enumerate(PRIMITIVES)}
NORMS_WITH_BIAS = ("bn", "ln")
