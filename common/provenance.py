"""Where a run or a result comes from: source revision, library versions, interpreter; no host names and no paths."""

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "datasets",
    "torchdata",
    "deepspeed",
    "hydra-core",
    "omegaconf",
)
"""Libraries that decide whether a repeated run gives the same numbers."""


def collect(*, seed: int | None = None) -> dict[str, object]:
    """``git_revision``, ``versions`` (libraries and Python) and, if given, ``seed``; JSON-able."""
    facts: dict[str, object] = {"git_revision": git_revision(), "versions": library_versions()}
    return facts if seed is None else {"seed": seed, **facts}


@functools.cache
def git_revision() -> str | None:
    """Commit of the source tree, with ``+changes`` if tracked files differ from it; None outside a repository."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the source tree; None if it failed or there is no git."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions by name, Python first; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
