"""Base-shape files (``.bsh``): the width axes of a model and their base sizes, as the mup package writes them.

YAML: three comment lines, then parameter name -> one entry per axis, an integer (base size of a width axis) or null.
"""

from pathlib import Path

import yaml

from common.errors import CheckpointError
from mup_dit.parametrization import BaseShapes

HEADER = """\
# This is a base shape file encoded in yaml
# - `null` indicates a dimension is "finite", i.e. a non-"width" dimension
# - a number indicates the base dimension of an "infinite" dimension, i.e. some notion of "width"
"""


def write_base_shapes(path: str | Path, base_shapes: BaseShapes) -> Path:
    """Writes the file, byte for byte as the mup package does.

    Raises: CheckpointError if the file exists with another content.
    """
    path = Path(path)
    text = HEADER + yaml.safe_dump({name: list(axes) for name, axes in base_shapes.items()})
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return path
        raise CheckpointError(f"{path} exists and holds other base shapes; choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_base_shapes(path: str | Path) -> dict[str, tuple[int | None, ...]]:
    """The file's mapping; a prefix ``module.`` (of a wrapped model) is dropped.

    Raises: CheckpointError if the file is missing or is no base-shape file.
    """
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"base shapes {path} do not exist; write them with `python -m mup_dit.train save_base_shapes=FILE`."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a base-shape file: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path} is not a base-shape file: it holds no mapping of parameter names.")
    shapes = {}
    for name, axes in entries.items():
        if not isinstance(axes, list) or not all(size is None or (type(size) is int and size > 0) for size in axes):
            raise CheckpointError(f"{path}: entry {name!r} is {axes!r}, not a list of positive integers and nulls.")
        shapes[str(name).removeprefix("module.")] = tuple(axes)
    return shapes
