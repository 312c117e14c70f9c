"""Finds the images that records name: as files below a folder, or inside an archive in it that was not unpacked."""

import os
import struct
import tarfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from urllib.parse import unquote

from train_llava.cli import InputError
from train_llava.ingest.image_files import DEFLATED, MEMBER, STORED, open_archive
from train_llava.ingest.parquet_images import IN_PARQUET

PLACES = ("images", "images_dl", "")  # below a data folder or an archive, in the order in which a name is looked up
ENDINGS = ("", ".jpg", ".png")  # of a name that has none
ARCHIVES = (".zip", ".tar")
UTF_8 = 0x800  # flag of a zip's member (APPNOTE 4.4.4)


class ImageIndex:
    """The images of one data folder.

    A name is looked up in `images/`, in `images_dl/` and in the folder itself, then in the same places inside the
    archives. Only where these hold none of the first names of the data, names are looked up anywhere below: otherwise a
    missing image would be taken from another folder that has one of its name, such as a mask.

    Args:
        folder: the one with the images.
        first: the first names of the data.
        data: the folder of the data, whose shards and parquet files hold images, too.
    """

    def __init__(self, folder: str, first: Sequence[str] = (), data: str | None = None) -> None:
        self.folder, self.data = folder, data or folder
        self.roots = [os.path.join(folder, name) for name in PLACES]
        self.there = [root for root in self.roots if os.path.isdir(root)]
        self.first = first
        self._broken: dict[str, str] = {}

    def find(self, name: str) -> str | None:
        """The path of an image as `image_files.py` reads it; None if there is no such file.

        Raises:
            InputError: the name is an address, leads out of the folder, or fits several files.
        """
        if place := IN_PARQUET.match(name) or MEMBER.match(name):
            if place[1].startswith(os.path.join(self.data, "")):
                return name
            raise self._outside(name)
        name = self._inside(name)
        return self._loose(name) or self._packed(name) or (None if self._settled else self._anywhere(name))

    def wanted(self, name: str) -> str:
        """The first place where a missing image would be looked up."""
        return os.path.join(self.roots[0], self._inside(name))

    def broken(self) -> dict[str, str]:
        """The archives that cannot be read to their end, each with the reason."""
        return self._broken if self._members is not None else {}

    def _inside(self, name: str) -> str:
        """A name relative to this folder, also where one of the two is written through a link."""
        if name.startswith("file://"):
            name = unquote(name.removeprefix("file://"))
        if "://" in name:
            raise self._outside(name)
        if not (name.startswith(("/", "./")) or ".." in name or "//" in name):
            return name
        file, real = os.path.normpath(os.path.join(self.folder, name)), os.path.realpath(self.folder)
        for path, root in ((file, self.folder), (file, real), (os.path.realpath(file), real)):
            if path.startswith(os.path.join(root, "")):
                return os.path.relpath(path, root)
        raise self._outside(name)

    def _outside(self, name: str) -> InputError:
        hint = "must be a file inside the data folder"
        return InputError(f"the image {name!r} {hint} {self.folder}, or in a folder given as --image_folder")

    @cached_property
    def _settled(self) -> bool:
        """Whether the three places hold the images of this data."""
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
        files = (path for name in names for path in below(self._files, name))
        if path := only_one(name, list(filter(os.path.isfile, files))):
            return path
        paths = [path for name in names for path in below(self._paths, name)]
        return self._member(name, paths) if paths else None

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """All files below the folder, by their last name."""
        files = defaultdict(list)
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
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
        """The only member of the archives with one of these paths, as `image_files.py` reads it."""
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
            except (zipfile.BadZipFile, tarfile.TarError, OSError, ValueError, NotImplementedError) as error:
                self._broken[archive] = str(error)
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
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    archives = (os.path.join(folder, name) for name in names if is_archive(name))
    return sorted(filter(os.path.isfile, archives))


def is_archive(name: str) -> bool:
    """Whether a file is an archive, by its name; hidden files are not."""
    return name.lower().endswith(ARCHIVES) and not name.startswith(".")


def entries(archive: str) -> Iterator[tuple[str, zipfile.ZipInfo | tarfile.TarInfo]]:
    """The name and the entry of every file in an archive. Chinese Windows writes names into a zip in GBK and does not
    mark them: such a file has two names."""
    if archive.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield info.filename, info
                    if not info.flag_bits & UTF_8 and not info.filename.isascii():
                        with suppress(UnicodeError):
                            yield info.filename.encode("cp437").decode("gb18030"), info
    else:
        with tarfile.open(archive, "r:") as tar:
            yield from ((info.name, info) for info in tar_members(tar))


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar whose bytes lie in it one after the other.

    Raises:
        tarfile.ReadError: behind them, which the library passes over: the end was cut off, or more follows it.
    """
    for member in tar:
        if member.isreg() and not member.issparse():
            yield member
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if end != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while more := tar.fileobj.read(1 << 20):
        if more.strip(b"\0"):
            raise tarfile.ReadError("more follows its end, such as another archive")


def with_endings(name: str) -> list[str]:
    """The names that a record may mean: the name itself, with the slashes of Unix, with accents in one character or in
    two (as macOS has them), with the ending that it lacks."""
    names = [name]
    if "\\" in name:
        names.append(name.replace("\\", "/"))
    if not name.isascii():
        names += [unicodedata.normalize(form, each) for each in names for form in ("NFC", "NFD")]
    if not os.path.splitext(name)[1]:
        names = [each + ending for each in names for ending in ENDINGS]
    return names if len(names) == 1 else [*dict.fromkeys(names)]


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
        raise InputError(f"the image {name!r} is in several places: {some}. Name the folder in the record, too")
    return paths[0] if paths else None
