"""The index of a tar: which samples it holds, and where their members lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import IO, NamedTuple

from nemo_image.errors import TarError
from nemo_image.shards.files import StorageOptions, Url
from nemo_image.shards.headers import Contents, HeaderWindow, read_contents
from nemo_image.shards.keys import IMAGE_EXTENSIONS, split_member_name
from nemo_image.shards.sources import ByteSource, open_source

_FEW = 16  # members of a sample; where there are more, and others between them, they stay in a table


class Member(NamedTuple):
    """A file in a tar.

    Attributes
    ----------
    name : str
        As the tar has it; never to be used as a path.
    extension : str
        Lower-cased, behind the base name's first dot.
    offset, size : int
        Of the data, in bytes.
    """

    name: str
    extension: str
    offset: int
    size: int


class Sample(NamedTuple):
    """The members that share a key, in the tar's order, one for each extension.

    The key is text: bytes of a name that are no UTF-8 are written in it as ``\\xff``.
    """

    key: str
    members: tuple[Member, ...]

    @property
    def image(self) -> Member | None:
        """The first member with an image's extension."""
        return next((member for member in self.members if member.extension in IMAGE_EXTENSIONS), None)

    @property
    def caption(self) -> Member | None:
        """The ``txt`` member."""
        return self._of("txt")

    @property
    def json(self) -> Member | None:
        """The ``json`` member."""
        return self._of("json")

    @property
    def offset(self) -> int:
        """Byte offset of the first member's data."""
        return self.members[0].offset

    def _of(self, extension: str) -> Member | None:
        return next((member for member in self.members if member.extension == extension), None)


@dataclass(frozen=True)
class TarIndex:
    """What a tar holds.

    Attributes
    ----------
    samples : tuple of Sample
        In the order of their first members.
    repeated : tuple of str
        Names of members whose key and extension another one before them has: those are not in `samples`.
    ignored : tuple of str
        Names of members that have no key, and of links and devices.
    size : int
        The tar's size in bytes.
    has_end : bool
        Whether it ends with an end mark; if not, members may have been cut off.
    """

    samples: tuple[Sample, ...]
    repeated: tuple[str, ...]
    ignored: tuple[str, ...]
    size: int
    has_end: bool = True

    @cached_property
    def keys(self) -> list[str]:
        """The samples' keys, in their order."""
        return [sample.key for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)


def index_tar(tar: Url | IO[bytes] | ByteSource, storage_options: StorageOptions = None) -> TarIndex:
    """Index a tar by reading its headers.

    Parameters
    ----------
    tar : str, path, seekable binary file or ByteSource
    storage_options : mapping, optional
        For fsspec, where `tar` is a URL.

    Raises
    ------
    TarError
        If it is missing, compressed, truncated, damaged or no tar. The message names the file and the byte.
    """
    if isinstance(tar, ByteSource):
        return _index(tar)
    try:
        source = open_source(tar, storage_options)
    except OSError as error:
        raise unreadable(str(tar), error) from error
    with source:
        return _index(source)


def _index(source: ByteSource) -> TarIndex:
    try:
        contents = read_contents(source, HeaderWindow(source))
    except OSError as error:
        raise unreadable(source.name, error) from error
    return group_members(contents, source.size)


def unreadable(name: str, error: OSError) -> TarError:
    """Return the error for a tar that the file system does not give."""
    if isinstance(error, FileNotFoundError):
        return TarError(f"{name}: no such tar: check the path, and that its file system is mounted")
    return TarError(f"{name}: cannot be read ({error}): check the file and its file system")


def group_members(contents: Contents, size: int) -> TarIndex:
    """Group members by key into the index of a tar of `size` bytes. Takes the files out of `contents`."""
    # A tar may have millions of members: each object is made once, and freed as soon as another has taken its place.
    # The members of a sample mostly follow each other, so that one table, of the sample at hand, is enough.
    groups: dict[str, tuple[Member, ...] | dict[str, Member]] = {}
    extensions: dict[str, str] = {}
    repeated: list[str] = []
    ignored: list[str] = []
    key_now, group = "", dict[str, Member]()
    new = tuple.__new__  # a named tuple's own takes twice as long
    files = contents.files
    files.reverse()
    while files:
        name, offset, length = files.pop()
        parts = split_member_name(name)
        if parts is None:
            ignored.append(name)
            continue
        key, extension = parts
        if key != key_now:
            if group:
                groups[key_now] = tuple(group.values()) if len(group) <= _FEW else group
            earlier = groups.get(key, ())
            group = earlier if isinstance(earlier, dict) else {member.extension: member for member in earlier}
            key_now = key
        if extension in group:
            repeated.append(name)
            continue
        extension = extensions.setdefault(extension, extension)
        group[extension] = new(Member, (name, extension, offset, length))
    if group:
        groups[key_now] = tuple(group.values())
    is_ascii = "".join(groups).isascii()
    samples = []
    for key in list(groups):
        members = groups.pop(key)
        samples.append(new(Sample, (key, tuple(members.values()) if isinstance(members, dict) else members)))
    if not is_ascii:
        samples = _with_text_keys(samples, repeated)
    return TarIndex(tuple(samples), tuple(repeated), (*ignored, *contents.others), size, contents.has_end)


def _with_text_keys(samples: list[Sample], repeated: list[str]) -> list[Sample]:
    """Write bytes of keys that are no UTF-8 as escapes, so that metadata can hold every key."""
    texts: dict[str, Sample] = {}
    for sample in samples:
        key = sample.key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if key in texts:
            repeated += [member.name for member in sample.members]
        else:
            texts[key] = sample._replace(key=key)
    return list(texts.values())
