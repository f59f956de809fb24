"""Paths on the local disk and in object stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from upath import UPath

__all__ = ["is_path", "local_path", "open_path"]


def is_path(value: object) -> TypeGuard[str | os.PathLike[str] | UPath]:
    """Whether this is a path: text, or a path object of a disk or an object store (fsspec's, Airflow's)."""
    return isinstance(value, str | os.PathLike) or hasattr(type(value), "fs")


def open_path(path: str | os.PathLike[str] | UPath) -> UPath:
    """Return a path object for a local path or fsspec URL."""
    from upath import UPath  # slow to import, so only jobs do so

    return UPath(path) if isinstance(path, str | os.PathLike) and not isinstance(path, UPath) else path


def local_path(path: UPath) -> Path | None:
    """Return the path on the local disk; None if it is in an object store."""
    return Path(path.path) if path.protocol in ("", "file") else None
