"""Commands that take a folder or file first, as in ``python -m rpg.check DIR``, in front of Hydra's ``key=value``."""

from collections.abc import Sequence


def name_arguments(arguments: Sequence[str], *options: str) -> list[str]:
    """Arguments without a name get those of ``options`` in order; the rest stays as it is.

    A path that holds ``=`` is taken for an option; write ``option='PATH'`` then.
    """
    named, free = [], list(options)
    for argument in arguments:
        is_bare = "=" not in argument and not argument.startswith(("-", "~", "+"))
        if is_bare and free:
            quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
            named.append(f"{free.pop(0)}='{quoted}'")
        else:
            named.append(argument)
    return named
