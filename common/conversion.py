"""Strict conversion of composed configurations into typed, frozen dataclasses, with the option named in every error."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from common.errors import ConfigError

Config = TypeVar("Config")
MISSING = "???"  # OmegaConf's mark of a value that must be given


def from_config(cls: type[Config], values: Any, path: str = "") -> Config:
    """An instance of the dataclass ``cls`` holding ``values``, checked field by field.

    Nested dataclasses, ``X | None``, ``Literal``, lists, tuples, dictionaries and ``Path`` are converted. A float may
    be written as an integer or as text such as ``1e-4`` (which plain YAML reads as a string), an integer as ``1e6``.

    Args:
        cls: a dataclass.
        values: a mapping, an OmegaConf node, or already an instance of ``cls``.
        path: dotted name of this part, put before the field names in messages.

    Raises: ConfigError for an unknown key (with the nearest valid one), a missing value, or a wrong type.
    """
    if isinstance(values, cls):
        return values
    values = _plain(values)
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{path or 'the configuration'}={values!r} is not a group of options; set its parts, for example "
            f"{join(path, dataclasses.fields(cls)[0].name)}=..."
        )
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in known:
            raise ConfigError(unknown_option(join(path, str(key)), [join(path, name) for name in known]))
    arguments = {}
    for name, field in known.items():
        option = join(path, name)
        if name in values and values[name] != MISSING:
            arguments[name] = convert(hints[name], values[name], option)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING or name in values:
            raise ConfigError(f"{option} has no value and no default; add {option}=... to the command.")
    return cls(**arguments)


def convert(kind: Any, value: Any, option: str) -> Any:
    """``value`` as the annotated type ``kind``; ``option`` is its dotted name.

    Raises: ConfigError naming the option, the value and what fits.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(arguments, value, option)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise ConfigError(_not_a_choice(option, value, arguments))
    if dataclasses.is_dataclass(kind):
        return from_config(kind, value, option)
    if origin in (list, tuple, Sequence):
        return _sequence(origin, arguments, value, option)
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{option}={value!r} must be a mapping, for example '{option}={{key: value}}'.")
        inner = arguments[1] if arguments else Any
        return {key: convert(inner, entry, join(option, str(key))) for key, entry in value.items()}
    return _scalar(kind, value, option)


def _plain(values: Any) -> Any:
    """An OmegaConf node as plain containers; anything else as it is."""
    if not hasattr(values, "_metadata"):  # spares callers with plain mappings the import
        return values
    from omegaconf import OmegaConf

    return OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values


def _union(kinds: Sequence[Any], value: Any, option: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    # a value that already has one of the types keeps it: "1" stays text in `int | str`
    for kind in others:
        if isinstance(kind, type) and type(value) is kind:
            return convert(kind, value, option)
    errors = []
    for kind in others:
        try:
            return convert(kind, value, option)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1 and type(None) in kinds and not dataclasses.is_dataclass(others[0]):
        raise ConfigError(f"{str(errors[0]).removesuffix('.')} (or null).")
    raise (
        errors[0]
        if len(errors) == 1
        else ConfigError(f"{option}={value!r} must be {' or '.join(_name(kind) for kind in kinds)}.")
    )


def _sequence(origin: Any, arguments: Sequence[Any], value: Any, option: str) -> list | tuple:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{option}={value!r} must be a list, for example '{option}=[{value}]'.")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{option}={list(value)} must have {len(arguments)} entries, it has {len(value)}.")
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    items = [convert(kind, item, f"{option}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value))]
    return items if origin is list else tuple(items)


def _scalar(kind: Any, value: Any, option: str) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind in (int, float):
        number = _number(value)
        if number is not None and (kind is float or number == number // 1):  # NaN and infinity are no integers
            return kind(value) if isinstance(value, int) else kind(number)
    elif kind is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)  # name=2024 is text that looks like a number
    elif kind is Path:
        if isinstance(value, str | Path) and str(value):
            return Path(value)
    elif isinstance(value, kind):
        return value
    raise ConfigError(f"{option}={_show(value)} must be {_name(kind)}.")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _show(value: Any) -> str:
    return "null" if value is None else repr(value)


def _name(kind: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        type(None): "null",
    }
    return names.get(kind) or getattr(kind, "__name__", str(kind))


def _not_a_choice(option: str, value: Any, choices: Sequence[Any]) -> str:
    near = nearest(str(value), map(str, choices), cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{option}={_show(value)} is not known; choose one of {', '.join(map(str, choices))}.{hint}"


def join(path: str, name: str) -> str:
    """Dotted name of ``name`` below ``path``."""
    return f"{path}.{name}" if path else name


def option_names(cls: type, path: str = "") -> list[str]:
    """Dotted names of all options below a dataclass, groups included."""
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        names.append(join(path, name))
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                names += option_names(part, join(path, name))
    return names


def nearest(word: str, candidates: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The closest spellings of ``word``, best first, whatever the case."""
    spelled = {candidate.lower(): candidate for candidate in candidates}
    return [spelled[match] for match in get_close_matches(word.lower(), spelled, n=count, cutoff=cutoff)]


def unknown_option(option: str, candidates: Iterable[str]) -> str:
    """Message for an option that does not exist, with the one that was probably meant.

    The last part of a name counts most: ``lr`` means ``optim.lr``, ``training.warmup`` means ``optim.warmup``.
    """
    candidates = list(candidates)
    leaf = option.rpartition(".")[2].lower()
    same_leaf = [name for name in candidates if name.rpartition(".")[2].lower() == leaf]
    siblings = [name for name in candidates if name.rpartition(".")[0] == option.rpartition(".")[0]]
    near = nearest(option, same_leaf, count=2, cutoff=0) or nearest(option, siblings) or nearest(option, candidates)
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in candidates}
        near = [leaves[match] for match in nearest(leaf, leaves)]
    hint = f"did you mean {' or '.join(near)}?" if near else "--cfg job shows all options."
    return f"{option} is not an option; {hint}"
