"""Names of the reproduction's jobs, which are also those of its results."""

from rpg.reproduction.settings import Arm, Draw


def collected(collection: str, seed: int) -> str:
    """A collection of checkpoints."""
    return f"collect-{collection}-seed{seed}"


def baselines(collection: str, seed: int) -> str:
    """What is compared with on a collection."""
    return f"baselines-{collection}-seed{seed}"


def trained(arm: Arm, seed: int) -> str:
    """A trained generator."""
    return f"train-{arm.name}-seed{seed}"


def drawn(arm: Arm, draw: Draw, seed: int) -> str:
    """Networks drawn from it, scored."""
    return f"draw-{arm.name}-{draw.name}-seed{seed}"
