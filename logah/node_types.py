"""From modules and backward functions to the kinds of nodes a hypernetwork embeds.

Source: GHN-3 (Knyazev et al., 2023), table of primitives of its automatic graphs; LoGAH (arXiv 2405.16287) adds
root-mean-square norms, rotary embeddings and gates. Where LoGAH turned every multiplication into a gate, we keep
squeeze-excite for vision networks, whose hypernetworks have no row for gates.
"""

from torch import nn

from logah.operation_graph import Record
from logah.primitives import NUMBER

OPERATIONS = {
    "Mean": "glob_avg", "AdaptiveAvgPool2D": "glob_avg", "MaxPool2DWithIndices": "max_pool", "AvgPool2D": "avg_pool",
    "Softmax": "msa", "Add": "sum", "Cat": "concat",
}  # fmt: skip
"""Kind of an operation by the name of its backward function before ``Backward``."""

OF_VARIANT = {"vision": {"Mul": "cse"}, "llm": {"Mul": "gate", "Neg": "rot_emb"}}


def operation_prefix(name: str) -> str:
    """``SoftmaxBackward0`` -> ``Softmax``."""
    return name.partition("Backward")[0]


def is_rms_norm(module: nn.Module) -> bool:
    """Root-mean-square norms of torch and of every transformers family (LlamaRMSNorm, MistralRMSNorm, ...)."""
    return type(module).__name__.endswith("RMSNorm")


def module_kind(module: nn.Module | None, name: str) -> str | None:
    """Kind of the parameter ``name`` of ``module``; None for modules that hypernetworks do not know."""
    if module is None:
        return None
    if isinstance(module, nn.Conv2d):
        return "bias" if "bias" in name else _convolution_kind(module)
    if isinstance(module, nn.Linear | nn.MultiheadAttention) or _is_transformers_conv1d(module):
        return "bias" if "bias" in name else "conv"
    if isinstance(module, nn.BatchNorm2d):
        return "bn"
    if isinstance(module, nn.LayerNorm):  # ConvNeXt's LayerNorm2d is one
        return "ln"
    if is_rms_norm(module):
        return "rmsnorm"
    if isinstance(module, nn.Embedding) or type(module).__name__ == "PosEnc" or is_position_owner(module):
        return "pos_enc"
    return None


def operation_kind(name: str, variant: str) -> str | None:
    """Kind of an operation; None for those that graphs leave out."""
    if name == "input":
        return "input"
    prefix = operation_prefix(name)
    return OF_VARIANT[variant].get(prefix) or OPERATIONS.get(prefix)


def node_type(record: Record, variant: str) -> int:
    """Index of the primitive; whatever has no kind and is shown all the same counts as a sum."""
    return NUMBER[module_kind(record.module, record.name) or operation_kind(record.name, variant) or "sum"]


def is_supported(record: Record, variant: str) -> bool:
    """Whether a node stays in the reduced graph, before the rules for multiplications, means, sums and concats."""
    if record.module is None:
        return operation_kind(record.name, variant) is not None
    if record.name.endswith(".bias") and "norm" in type(record.module).__name__.lower():
        return False  # a norm is one node: its weight
    return module_kind(record.module, record.name) is not None


def is_position_owner(module: nn.Module | None) -> bool:
    """torchvision's transformer encoder, which owns the position embedding."""
    return module is not None and type(module).__name__ == "Encoder" and hasattr(module, "pos_embedding")


def _convolution_kind(module: nn.Conv2d) -> str:
    if module.groups == 1:
        return "conv"
    return "dil_conv" if min(module.dilation) > 1 else "sep_conv"


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """By name: transformers is not imported to trace a convolutional network."""
    return type(module).__name__ == "Conv1D"
