"""Commands that take a folder or file first, as in ``python -m rpg.check DIR``, in front of Hydra's ``key=value``."""

from collections.abc import Sequence

FLAGS_WITH_VALUES = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn", "--config-dir", "-cd")


def name_arguments(arguments: Sequence[str], *options: str) -> list[str]:
    """Arguments without a name get those of ``options`` in order that are not named; the rest stays as it is.

    A path that holds ``=`` is taken for an option; write ``option='PATH'`` then.
    """
    given = {argument.partition("=")[0] for argument in arguments if "=" in argument}
    named, free = [], [option for option in options if option not in given]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_bare = "=" not in argument and not argument.startswith(("-", "~", "+")) and before not in FLAGS_WITH_VALUES
        if is_bare and free:
            quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
            named.append(f"{free.pop(0)}='{quoted}'")
        else:
            named.append(argument)
    return named
