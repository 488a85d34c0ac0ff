"""Reading files of model weights without running any code that they may carry."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from typing import TYPE_CHECKING, Literal

from nemo_image.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

FilePath = str | os.PathLike[str]


def sha256_file(path: FilePath) -> str:
    """Return a file's SHA-256 in hexadecimal, read again only when its size, time or inode has changed.

    Raises
    ------
    WeightsError
        If it cannot be read.
    """
    try:
        found = os.stat(path)
        return _sha256(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError as error:
        raise WeightsError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state_dict(path: FilePath) -> dict[str, Tensor]:
    """Read a state dict, on the CPU, without running any code that the file may carry.

    The content decides the format: safetensors, or what ``torch.save`` writes. A dictionary under the key
    ``state_dict`` is taken instead of the whole, and a prefix ``module.`` that all names share is dropped.

    Parameters
    ----------
    path : str or path
        A file of weights (``.safetensors``, ``.pt`` or ``.pth``).

    Returns
    -------
    dict of str to Tensor
        The weights by name.

    Raises
    ------
    WeightsError
        If there is no such file or it holds something else. Names the file and says what to do.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            kind = kind_of(head := file.read(1024))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise WeightsError(f"cannot read weights {name}: {error.strerror or error}") from error
    if kind is None:
        raise WeightsError(
            f"{name} is {describe(head)}, not weights: download the file itself again ({size} bytes here)"
        )
    loaded = _load_safetensors(name) if kind == "safetensors" else _load_torch(name)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    return _as_state_dict(state, name)


def _load_safetensors(name: str) -> object:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(name)
    except Exception as error:  # damaged bytes fail in many ways
        raise WeightsError(f"{name} is a damaged safetensors file ({_first_line(error)}): download it again") from error


def _load_torch(name: str) -> object:
    import torch

    try:
        return torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in many ways
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise WeightsError(
                f"{name} holds {foreign[1]}, not only tensors, and is not loaded because that could run any code: "
                "use a file of the state dict alone (torch.save(model.state_dict(), ...)), or .safetensors"
            ) from error
        raise WeightsError(
            f"{name} is damaged or not a PyTorch file ({_first_line(error)}): download it again"
        ) from error


def _as_state_dict(state: object, name: str) -> dict[str, Tensor]:
    import torch

    if not isinstance(state, dict) or not state:
        raise WeightsError(
            f"{name} holds {type(state).__name__}, not a state dict of tensors by name: save state_dict()"
        )
    others = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(f"{name} is no state dict: its entry {others[0]!r} is not a tensor. Save state_dict() alone")
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def kind_of(head: bytes) -> Literal["zip", "pickle", "safetensors"] | None:
    """Tell a weights file's format by its first bytes (at least 16 of a good one)."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    # 8 bytes of header length (at most 100 MB, as safetensors says), then a JSON object.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    return None


def describe(head: bytes) -> str:
    """Say what a file that is no weights file seems to be, with its first bytes."""
    if not head:
        return "an empty file"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = "no weights file that we know"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        kind = "an HTML page"
    elif text.startswith((b"<?xml", b"<")):
        kind = "an XML document"
    elif text.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer (git lfs pull brings the file)"
    return f"{kind} (it starts with {head[:48]!r})"


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
