"""Options of ``python -m logah.graph``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from logah import graph_drawing, graph_files
from logah.model_config import ATTENTIONS, GRAPH_VERSIONS, VARIANTS


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """What to trace, how, and what to do with the graph."""

    target: str  # a preset, a classifier of torchvision, timm:NAME, a configuration, or a graph file
    graph_version: Literal["reference", "v2"] = "reference"
    attention: Literal["explicit", "as_is"] = "explicit"
    variant: Literal["auto", "vision", "llm"] = "auto"
    ve_cutoff: int = 50
    image_size: list[int] | int | None = None
    reduce_graph: bool = True
    list_all_nodes: bool = False
    fix_weight_edges: bool = True
    fix_softmax_edges: bool = True
    show_nodes: bool = False
    output: str | None = None
    drawing: str | None = None
    labels: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_choice("graph_version", self.graph_version, GRAPH_VERSIONS)
        require_choice("attention", self.attention, ATTENTIONS)
        require_choice("variant", self.variant, ("auto", *VARIANTS))
        require_at_least("ve_cutoff", self.ve_cutoff, 1)
        self._check_file("output", self.output, graph_files.SUFFIXES)
        self._check_file("drawing", self.drawing, graph_drawing.SUFFIXES)
        for name in ("reduce_graph", "fix_weight_edges", "fix_softmax_edges"):
            if self.graph_version == "v2" and not getattr(self, name):
                raise ConfigError(f"{name}=false changes the reference graph only; remove it, or graph_version=v2.")
        if self.graph_version == "v2" and self.list_all_nodes:
            raise ConfigError("list_all_nodes=true changes the reference graph only; remove it, or graph_version=v2.")

    def _check_file(self, option: str, name: str | None, suffixes: tuple[str, ...]) -> None:
        """Before the tracing rather than after it."""
        if name is None:
            return
        if Path(name).suffix not in suffixes:
            raise ConfigError(f"{option}={name} must end in {', '.join(suffixes)}.")
        if Path(name).exists() and not self.overwrite:
            raise ConfigError(f"{option}={name} exists; add overwrite=true, or choose another file.")

    @property
    def trace_options(self) -> dict[str, object]:
        """Arguments of ``tracing.trace``."""
        options: dict[str, object] = {
            "version": self.graph_version,
            "attention": self.attention,
            "variant": self.variant,
            "ve_cutoff": self.ve_cutoff,
        }
        if self.image_size is not None:
            options["image_size"] = self.image_size if isinstance(self.image_size, int) else tuple(self.image_size)
        if self.graph_version == "reference":
            for name in ("reduce_graph", "list_all_nodes", "fix_weight_edges", "fix_softmax_edges"):
                options[name] = getattr(self, name)
        return options
