"""Finds the pictures that records name: loose below a folder, or inside an archive in it that was not unpacked."""

import os
import struct
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from train_llava.command import InputError
from train_llava.images import DEFLATED, IN_PARQUET, MEMBER, STORED, open_archive

PLACES = ("images", "images_dl", "")  # below a data folder or an archive, in the order in which a name is looked up
ENDINGS = ("", ".jpg", ".png")  # of a name that has none


class PictureFolder:
    """The pictures of one data folder.

    A name is looked up in `images/`, in `images_dl/` and in the folder itself, then in the same places inside the
    archives. Only where these hold none of the first names of the data, names are looked up anywhere below: otherwise a
    missing picture would be taken from another folder that has one of its name, such as a mask.

    Args:
        folder: of the data.
        first: some names of the data, which decide on this.
    """

    def __init__(self, folder: str, first: Sequence[str] = ()) -> None:
        self.folder = folder
        self.roots = [os.path.join(folder, name) for name in PLACES]
        self.there = [root for root in self.roots if os.path.isdir(root)]
        self.first = first

    def find(self, name: str) -> str | None:
        """The path of a picture as `images.py` reads it; None if there is no such file.

        Raises:
            InputError: the name is an address, leads out of the folder, or fits several files.
        """
        if (row := IN_PARQUET.match(name)) and row["file"].startswith(os.path.join(self.folder, "")):
            return name
        member = MEMBER.match(name)
        file = os.path.normpath(os.path.join(self.folder, member["archive"] if member else name))
        if "://" in name or not file.startswith(os.path.join(self.folder, "")):
            raise InputError(f"the picture {name!r} must be a file inside the data folder {self.folder}")
        if member:
            return name
        return self._loose(name) or self._packed(name) or (None if self._settled else self._anywhere(name))

    def wanted(self, name: str) -> str:
        """Where a picture that is not there would be looked up first."""
        return os.path.join(self.roots[0], name)

    @cached_property
    def _settled(self) -> bool:
        """Whether the three places hold the pictures of this data."""
        return any(self._loose(name) or self._packed(name) for name in self.first)

    def _loose(self, name: str) -> str | None:
        names = with_endings(name)
        for root in self.there:
            for path in (os.path.join(root, name) for name in names):
                if os.path.isfile(path):
                    return path
        return None

    def _anywhere(self, name: str) -> str | None:
        names = with_endings(name)
        if path := only_one(name, [path for name in names for path in below(self._files, name)]):
            return path
        paths = [path for name in names for path in below(self._paths, name)]
        return self._member(name, paths) if paths else None

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """All files below the folder, by their last name."""
        files = defaultdict(list)
        for folder, _, names in os.walk(self.folder):
            for name in names:
                files[name].append(os.path.join(folder, name))
        return files

    def _packed(self, name: str) -> str | None:
        names = with_endings(name)
        for place in PLACES:
            for path in (os.path.join(place, name) for name in names):
                if path in self._members:
                    return self._member(name, [path])
        return None

    def _member(self, name: str, paths: list[str]) -> str:
        """The only member of the archives with one of these paths, as `images.py` reads it."""
        found = {f"{archive}/{path}": (archive, info) for path in paths for archive, info in self._members[path]}
        archive, member = found[only_one(name, [*found])]
        if isinstance(member, tarfile.TarInfo):
            return f"{archive}::{member.name}::{member.offset_data}:{member.size}:{STORED}"
        if member.flag_bits & 1 or member.compress_type not in (STORED, DEFLATED):
            raise InputError(f"{archive}, {member.filename}: encrypted or packed in an unusual way; unpack it")
        # a member's data follow its own header, which ends in a name and an extra field of these lengths
        head = os.pread(open_archive(archive).fileno(), 30, member.header_offset)
        start = member.header_offset + 30 + sum(struct.unpack("<26xHH", head))
        return f"{archive}::{member.filename}::{start}:{member.compress_size}:{member.compress_type}"

    @cached_property
    def _members(self) -> dict[str, list[tuple[str, zipfile.ZipInfo | tarfile.TarInfo]]]:
        """Archive and entry of every member, by its path inside the archive."""
        members = defaultdict(list)
        for archive in archives_in(self.folder):
            try:
                for name, info in entries(archive):
                    members[os.path.normpath(name)].append((archive, info))
            except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
                raise InputError(f"{archive}: not a readable archive ({error})") from error
        return dict(members)

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        """The paths inside the archives, by their last name."""
        paths = defaultdict(list)
        for path in self._members:
            paths[os.path.basename(path)].append(path)
        return paths


def archives_in(folder: str) -> list[str]:
    """The archives that lie in a folder, in one order."""
    return sorted(str(path) for suffix in (".zip", ".tar") for path in Path(folder).glob(f"*{suffix}"))


def entries(archive: str) -> Iterator[tuple[str, zipfile.ZipInfo | tarfile.TarInfo]]:
    """Name and entry of every file in an archive."""
    if archive.endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            yield from ((info.filename, info) for info in zipped.infolist() if not info.is_dir())
    else:
        with tarfile.open(archive, "r:") as tar:
            yield from ((info.name, info) for info in tar if info.isfile())


def with_endings(name: str) -> list[str]:
    """The names that a record may mean."""
    return [name] if os.path.splitext(name)[1] else [name + ending for ending in ENDINGS]


def below(files: dict[str, list[str]], name: str) -> list[str]:
    """The paths that end in a name, which may have folders in it."""
    return [path for path in files.get(os.path.basename(name), []) if f"/{path}".endswith(f"/{os.path.normpath(name)}")]


def only_one(name: str, paths: list[str]) -> str | None:
    """The only one of some paths, None without any.

    Raises:
        InputError: there are several.
    """
    if len(paths) > 1:
        some = ", ".join(sorted(paths)[:3])
        raise InputError(f"the picture {name!r} is in several places: {some}. Name the folder in the record, too")
    return paths[0] if paths else None
