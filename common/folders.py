"""Folders that appear whole or not at all."""

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
