"""Digests of files: cheap enough to take at every start, sharp enough to notice a change."""

import hashlib
from pathlib import Path

WHOLE_FILE_BYTES = 64 << 20  # up to this size every byte is read (about 0.1 s)
WINDOWS, WINDOW_BYTES = 16, 1 << 20  # larger files: size and evenly spaced windows, first and last included


def file_fingerprint(path: str | Path) -> str:
    """Hex digest of a file's contents; of its size and 16 windows of 1 MiB where it is larger than 64 MiB.

    The path and the time of change do not enter, so that a copied folder keeps its caches.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as stream:
        if size <= WHOLE_FILE_BYTES:
            while chunk := stream.read(WINDOW_BYTES):
                digest.update(chunk)
        else:
            for window in range(WINDOWS):
                stream.seek((size - WINDOW_BYTES) * window // (WINDOWS - 1))
                digest.update(stream.read(WINDOW_BYTES))
    return digest.hexdigest()


def text_fingerprint(*parts: object) -> str:
    """Hex digest of the parts' text; parts cannot run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        data = str(part).encode("utf-8", errors="surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
