"""What stands in a file's place when it is not the file: said by its first bytes, for the sentence about it."""

import zipfile
from pathlib import Path

_FIRST = 512
"""Bytes that are looked at."""
_BEGINNINGS = (
    (b"version https://git-lfs.github.com", "it is a pointer of Git LFS: get the file with `git lfs pull`"),
    (b"/annex/objects/", "it is a pointer of git-annex: get the file with `git annex get`"),
    (b"v/1\x01", "it is an OpenEXR picture: save it with 8 or 16 bits as PNG"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive: unpack it"),
    (b"Rar!", "it is a RAR archive: unpack it"),
    (b"%PDF", "it is a PDF"),
)
_RAW = (".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2")
"""Suffixes of cameras' raw files, which begin as TIFF or MP4 do."""


def what_it_is(path: Path, content: bytes | None = None) -> str | None:
    """Says what a file is that could not be read as what it should be.

    Args:
        path: The file.
        content: Its bytes, or the first of them, if they were read already.

    Returns:
        A clause with the way out, such as "it is a pointer of Git LFS: get the file with `git lfs pull`"; None if it is
        nothing that is known here.
    """
    try:
        if content is None:
            with open(path, "rb") as file:
                content = file.read(_FIRST)
    except OSError:
        return None
    if not content:
        return "it is empty, as copies are that were broken off, and files of a cloud that were never fetched"
    first = content[:_FIRST]
    if not any(first):
        return "it holds nothing but zeros, as files do after a crash or on a broken disk: copy it again"
    for beginning, what in _BEGINNINGS:
        if first.startswith(beginning):
            return what
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, as downloads leave that failed: get the file again"
    if first[4:8] == b"ftyp" and first[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "it is a HEIC picture, as iPhones take: convert it to JPEG or PNG"
    if first.startswith((b"II*\0", b"MM\0*", b"II\x1a\0")) and path.suffix.lower() in _RAW:
        return "it is a camera's raw picture: convert it to JPEG or PNG"
    return _archive(path) if first.startswith(b"PK\x03\x04") else None


def _archive(path: Path) -> str | None:
    """What a zip archive is; torch's files are some too."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        names = []
    if any("/code/" in name for name in names):
        return "it is a TorchScript program, which is not run: save its state dict instead"
    return None if any(name.endswith("data.pkl") for name in names) else "it is a zip archive: unpack it"
