"""The computational graph of one network, as the hypernetwork reads it.

Dimensions: N nodes in topological order.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logah.primitives import PRIMITIVES


@dataclass(frozen=True)
class Node:
    """One parameter or operation.

    Attributes:
        name: ``module.path.weight`` of a parameter, ``SoftmaxBackward0`` or the like of an operation.
        type: index into ``PRIMITIVES``.
        shape: of a parameter as the shape encoder reads it, ``(1, 1, k, k)`` of a pool, else None.
        listed: whether it stands in ``node_info`` (parameters of known modules, pools).
        is_last_weight, is_last_bias: whether it takes the class head.
    """

    name: str
    type: int
    shape: tuple[int, ...] | None = None
    listed: bool = False
    is_last_weight: bool = False
    is_last_bias: bool = False

    @property
    def type_name(self) -> str:
        return PRIMITIVES[self.type]


@dataclass(frozen=True)
class NetGraph:
    """A traced network.

    Attributes:
        nodes: in topological order.
        distance_NN: length of the shortest directed path i -> j if it is at most ``ve_cutoff`` (1: an edge), else 0;
            int16.
        ve_cutoff: longest path that became a virtual edge; 1: none did.
        variant: ``vision`` or ``llm``: the table that gave the types.
        version: ``reference`` or ``v2``.
        attention: ``explicit`` or ``as_is``.
        facts: what else the tracer wants to say (warnings, class of the model).
    """

    nodes: tuple[Node, ...]
    distance_NN: NDArray[np.int16]
    ve_cutoff: int
    variant: str = "vision"
    version: str = "reference"
    attention: str = "explicit"
    facts: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def type_N(self) -> NDArray[np.int64]:
        return np.array([node.type for node in self.nodes], dtype=np.int64)

    def predecessors(self, index: int) -> list[int]:
        """Nodes with an edge to node ``index``."""
        return np.flatnonzero(self.distance_NN[:, index] == 1).tolist()
