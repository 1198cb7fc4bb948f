"""Options of the networks that a hypernetwork is trained on: a file of descriptions, or a law that draws them."""

from dataclasses import dataclass
from typing import Any, Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from logah.generators import FAMILY_OF_LAW

FAMILIES = ("vit", "gpt2", "llama")


@dataclass(frozen=True, kw_only=True)
class NetsSection:
    """Options ``nets.*``."""

    # published laws, or grid: every list below drawn from independently
    law: Literal["vits1k", "gpts1k", "llama1k", "llama_trainer", "grid"] = "vits1k"
    set: str | None = None  # JSONL file of descriptions to read instead of drawing
    num_nets: int | None = None  # use the first so many of the file; null: all
    meta_batch: int = 1  # networks per training step, over all processes
    node_budget: int | None = None  # most nodes of a step's networks; null: 275 for each, at least 2200; 0: no limit
    patch_sizes: tuple[int, ...] | None = None  # of ViTs; null: the law's. A file's networks get it if it is one size
    dropout: float | None = None  # of drawn networks; null: the library's (ViT 0, GPT-2 0.1)

    family: Literal["vit", "gpt2", "llama"] = "vit"  # grid
    depths: tuple[int, ...] = (2, 3, 4)  # grid: layers
    widths: tuple[int, ...] = (24, 32, 40, 48)  # grid
    heads: tuple[int, ...] = (2, 4)  # grid: those that divide the width
    mlp_ratios: tuple[float, ...] = (4.0,)  # grid: width of the MLP over the network's

    def __post_init__(self) -> None:
        require_choice("nets.law", self.law, (*FAMILY_OF_LAW, "grid"))
        require_choice("nets.family", self.family, FAMILIES)
        require_at_least("nets.meta_batch", self.meta_batch, 1)
        if self.num_nets is not None:
            require_at_least("nets.num_nets", self.num_nets, 1)
        if self.node_budget is not None:
            require_at_least("nets.node_budget", self.node_budget, 0)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"nets.dropout={self.dropout} is a probability; choose 0 or more, below 1.")
        for name in ("depths", "widths", "heads", "mlp_ratios"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ConfigError(f"nets.{name}={list(values)} must list at least one value, all above 0.")

    @property
    def drawn_family(self) -> str:
        """Family of the networks that the law draws."""
        return self.family if self.law == "grid" else FAMILY_OF_LAW[self.law]

    @property
    def effective_node_budget(self) -> int | None:
        """``node_budget`` with null decided; None: no limit. A step of one network has none.

        Source: GHN-3's data loader, 2200 nodes for eight networks.
        """
        if self.meta_batch == 1 or self.node_budget == 0:
            return None
        return self.node_budget or int(2200 / 8 * max(8, self.meta_batch))

    def dropout_options(self, family: str) -> dict[str, Any]:
        """The library's names for ``dropout``."""
        if self.dropout is None:
            return {}
        if family == "vit":
            return {"dropout": self.dropout}
        if family == "llama":
            return {"attention_dropout": self.dropout}
        return {"resid_pdrop": self.dropout, "embd_pdrop": self.dropout, "attn_pdrop": self.dropout}
