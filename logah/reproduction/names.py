"""Names of the reproduction's jobs, which are also those of its results."""

from logah.reproduction.settings import Arm, Net


def trained(arm: Arm, seed: int) -> str:
    """A trained hypernetwork."""
    return f"train-{arm.name}-seed{seed}"


def zero_shot(arm: Arm, seed: int) -> str:
    """Its predictions, scored as they are."""
    return f"predict-{arm.name}-seed{seed}"


def started(start: str, kind: str, net: Net, seed: int, order: int) -> str:
    """A net trained from a start.

    Args:
        start: the name of an arm, or ``random``.
        order: number of the data order and of random weights.
    """
    return f"start-{start}-{kind}-{net.label}-seed{seed}-order{order}"
