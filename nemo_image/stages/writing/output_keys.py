"""Keys of samples in an output tar: the samples' own where that can be, and none twice."""

from __future__ import annotations

import re

from nemo_image.shards.keys import split_member_name


class OutputKeys:
    """Gives each sample of one output tar its key. Equal samples in equal order get equal keys."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._numbers: dict[str, int] = {}

    def give(self, key: str, shard: str) -> str:
        """Return the key of the next sample.

        Its own if no sample before it has that; else with its shard before it (slashes as underscores); else also with
        a number behind it. What could lead a key out of the folder that a tar is unpacked in, is replaced.

        Parameters
        ----------
        key : str
            The sample's own.
        shard : str
            The one that it comes from.
        """
        made = harmless(key)
        if made in self._used and shard:
            made = harmless(f"{shard.replace('/', '_')}_{key}")
        if made in self._used:
            number = self._numbers.get(made, 1)
            while (numbered := f"{made}-{number + 1}") in self._used:
                number += 1
            self._numbers[made] = number + 1
            made = numbered
        self._used.add(made)
        return made


def harmless(key: str) -> str:
    """Return a key that names a file below whatever folder it is unpacked in, and is read back as it is."""
    if _is_harmless(key):
        return key
    text = key.encode("utf-8", "backslashreplace").decode().replace("\0", "_").replace("\\", "_")
    parts = [part for part in text.split("/") if part not in ("", ".")] or ["_"]
    parts = ["_" if part == ".." else part for part in parts]
    parts[0] = re.sub(r":$", "_", parts[0])
    parts[-1] = parts[-1].replace(".", "_")
    return "/".join(parts)


def _is_harmless(key: str) -> bool:
    parts = key.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or parts[0].endswith(":") or "\0" in key:
        return False
    try:
        key.encode()
    except UnicodeEncodeError:  # half a surrogate pair: no row could say it
        return False
    return split_member_name(f"{key}.jpg") == (key, "jpg")
