"""Files of torch.save: read without running code, compared with their checksums once as long as they do not change."""

import os
import threading
import zipfile

import pytest
import torch

from fit3d_ns.support import torch_files
from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.torch_files import read_torch

CONTENT = {f"tensor {number}": torch.randn(1000 * (number + 1)) for number in range(12)}


@pytest.fixture
def path(tmp_path):
    torch.save(CONTENT, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.fixture
def compared(monkeypatch) -> list[str]:
    """Names of the records that were compared with their checksums."""
    names: list[str] = []
    is_whole = torch_files._is_whole

    def counted(archive, record):
        names.append(record.filename)
        return is_whole(archive, record)

    monkeypatch.setattr(torch_files, "_is_whole", counted)
    return names


@pytest.mark.parametrize("mmap", [True, False])
def test_every_record_is_compared_once(path, compared, mmap):
    for _ in range(3):
        read = read_torch(path, mmap=mmap)
        assert all(torch.equal(read[name], value) for name, value in CONTENT.items())
    with zipfile.ZipFile(path) as archive:
        assert sorted(compared) == sorted(archive.namelist())


@pytest.mark.parametrize("number", range(0, len(CONTENT), 3))
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_bit_that_flips_after_a_reading_is_found(path, number, keep_times):
    """In any record, though its size and even its time of change are what they were."""
    read_torch(path)
    times = os.stat(path)
    data = bytearray(path.read_bytes())
    place = data.index(CONTENT[f"tensor {number}"].numpy().tobytes())
    data[place + 400] ^= 4
    path.write_bytes(data)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamagedFile, match="its data differ from their checksums"):
        read_torch(path)
    data[place + 400] ^= 4
    path.write_bytes(data)
    read_torch(path)


def test_a_file_that_takes_anothers_place_is_compared(path, compared):
    read_torch(path)
    number = len(compared)
    torch.save(CONTENT, path.with_name("b.ckpt"))
    path.with_name("b.ckpt").replace(path)
    read_torch(path)
    assert len(compared) == 2 * number


def test_no_archive_is_read_in_two_threads(tmp_path, monkeypatch):
    """`zipfile` loses its place then, with Python 3.12 and 3.13 nearly always, and whole files would be refused."""
    content = {str(number): torch.randn(3000 + number) for number in range(200)}
    torch.save(content, tmp_path / "many.ckpt")
    readers: dict[zipfile.ZipFile, set[int]] = {}
    opened = zipfile.ZipFile.open

    def noted(archive, *arguments, **settings):
        readers.setdefault(archive, set()).add(threading.get_ident())
        return opened(archive, *arguments, **settings)

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    read = read_torch(tmp_path / "many.ckpt")
    assert all(torch.equal(read[name], value) for name, value in content.items())
    assert len(readers) > 1 and all(len(threads) == 1 for threads in readers.values())


def test_what_is_missing_is_said_as_that(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "nowhere.ckpt")
