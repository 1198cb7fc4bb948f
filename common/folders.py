"""Folders and files that appear whole or not at all, and are not replaced unless that is asked for."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from common.errors import CheckpointError


def write_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """Has ``write`` fill a temporary folder, which then takes the place of ``folder``.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        write(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.rename(folder, replaced / "old")
            os.rename(temporary, folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise CheckpointError(
            f"output={folder} could not be written ({error.strerror or error}); free disk space or choose another "
            "folder."
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def require_replaceable(
    folder: Path, overwrite: bool, *, ours: bool, what: str = "a model", option: str = "output"
) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced.

    Args:
        ours: whether it holds what is about to be written there again.
        what: that is, in words.
        option: by which the user named the folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{option}={folder} is a file; give a folder.")
    if ours and not overwrite:
        raise CheckpointError(
            f"{option}={folder} holds {what} already; choose another folder, or replace it with overwrite=true."
        )
    if not ours and any(folder.iterdir()):
        raise CheckpointError(f"{option}={folder} holds other files; choose another folder.")


def write_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Has ``write`` make a temporary file, which then takes the place of ``path``.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); free disk space or choose another.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path
