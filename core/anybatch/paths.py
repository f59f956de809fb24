"""Paths on this machine's disk and in object stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from upath import UPath

__all__ = ["is_path", "local_path", "open_path"]


def is_path(value: object) -> TypeGuard[str | os.PathLike[str] | UPath]:
    """Whether this names a file: text, a path, or a path object of an object store (fsspec's, Airflow's)."""
    return isinstance(value, str | os.PathLike) or hasattr(type(value), "fs")


def open_path(path: str | os.PathLike[str] | UPath) -> UPath:
    """A local path or fsspec URL as a path object."""
    from upath import UPath  # costs a quarter of the import time of all else: only jobs pay it

    return UPath(path) if isinstance(path, str | os.PathLike) and not isinstance(path, UPath) else path


def local_path(path: UPath) -> Path | None:
    """The path on this machine's disk, None where it is an object store's."""
    return Path(path.path) if path.protocol in ("", "file") else None
