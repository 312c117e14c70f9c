"""Finds the pictures that records name: loose below a folder, or inside a zip in it that was not unpacked."""

import os
import struct
import zipfile
from functools import cached_property
from pathlib import Path

from train_llava.command import InputError
from train_llava.images import DEFLATED, MEMBER, STORED, open_archive


class PictureFolder:
    """The pictures of one data folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.roots = [os.path.join(folder, name) for name in ("images", "images_dl", "")]

    def find(self, name: str) -> str | None:
        """The path of a picture as `images.py` reads it; None if there is no such file.

        Raises:
            InputError: the name is an address, or leads out of the folder.
        """
        member = MEMBER.match(name)
        file = os.path.normpath(os.path.join(self.folder, member["archive"] if member else name))
        if "://" in name or not file.startswith(os.path.join(self.folder, "")):
            raise InputError(f"the picture {name!r} must be a file inside the data folder {self.folder}")
        if member:
            return name
        return self._loose(name) or self._packed(name)

    def _loose(self, name: str) -> str | None:
        names = [name] if os.path.splitext(name)[1] else [name, f"{name}.jpg", f"{name}.png"]
        for roots in (self.roots, self._all_folders):
            for root in roots:
                for path in (os.path.join(root, name) for name in names):
                    if os.path.isfile(path):
                        self.roots.insert(0, self.roots.pop(self.roots.index(root)) if root in self.roots else root)
                        return path
        return None

    @cached_property
    def _all_folders(self) -> list[str]:
        return [folder for folder, _, _ in os.walk(self.folder)]

    def _packed(self, name: str) -> str | None:
        for prefix in self._prefixes:
            if found := self._members.get(prefix + name):
                self._prefixes.insert(0, self._prefixes.pop(self._prefixes.index(prefix)))
                archive, info = found
                if info.flag_bits & 1 or info.compress_type not in (STORED, DEFLATED):
                    raise InputError(f"{archive}, {info.filename}: encrypted or packed in an unusual way; unpack it")
                # a member's data follow its own header, which ends in a name and an extra field of these lengths
                head = os.pread(open_archive(archive), 30, info.header_offset)
                start = info.header_offset + 30 + sum(struct.unpack("<26xHH", head))
                return f"{archive}::{info.filename}::{start}:{info.compress_size}:{info.compress_type}"
        return None

    @cached_property
    def _members(self) -> dict[str, tuple[str, zipfile.ZipInfo]]:
        archives = sorted(str(path) for path in Path(self.folder).glob("*.zip"))
        members = {}
        for archive in archives:
            with zipfile.ZipFile(archive) as file:
                members |= {info.filename: (archive, info) for info in file.infolist()}
        return members

    @cached_property
    def _prefixes(self) -> list[str]:
        folders = {name.rpartition("/")[0] for name in self._members}
        parents = {"/".join(f.split("/")[:i]) for f in folders for i in range(f.count("/") + 2)}
        return ["", *sorted(f"{folder}/" for folder in parents if folder)]
