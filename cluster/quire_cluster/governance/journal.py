"""Records on their way to the database: a file of each gateway's life, in a folder that the gateways of a host share.

A record is in the file once `append` returns, and so outlives the process. It is not forced to the disk: what a machine
that falls had not written is lost.
"""

import fcntl
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire_engine.errors import InvalidParameter

from quire_cluster.governance.records import Record

log = logging.getLogger(__name__)
_HEAD = struct.Struct("<II")  # a record's bytes, and their CRC
_SUFFIX = ".journal"
_TORN = ".torn"
_LARGEST = 256 << 20  # bytes of a record


class Journal:
    """The file that this gateway writes. `append` never fails: what cannot be written is kept, and tried again."""

    def __init__(self, folder: str) -> None:
        """Raises InvalidParameter for a folder that cannot be written to."""
        self.folder = Path(folder)
        self.appended = 0  # records, over all its files
        self._unwritten = bytearray()
        self._descriptor = -1
        self.id = ""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._begin()
        except OSError as error:
            raise InvalidParameter(f"journal: {folder} cannot be written to: {error.strerror}", "governance") from error

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / (self.id + _SUFFIX)

    @property
    def opened(self) -> Path:
        """By which the file can be read even where somebody has deleted it."""
        return Path(f"/proc/self/fd/{self._descriptor}")

    @property
    def deleted(self) -> bool:
        """Whether the file is in no folder any more: what is written to it ends with this process."""
        return os.fstat(self._descriptor).st_nlink == 0

    @property
    def healthy(self) -> bool:
        """Whether all of it is in the file."""
        return not self._unwritten

    def append(self, record: Record) -> None:
        """Into the file, at once."""
        data = record.to_bytes()
        self._unwritten += _HEAD.pack(len(data), zlib.crc32(data)) + data
        self.appended += 1
        self.write()

    def write(self) -> None:
        """What could not be written before. What is left of a record goes on where it stopped."""
        while self._unwritten:
            try:
                written = os.write(self._descriptor, self._unwritten)
            except OSError as error:
                log.error("%s cannot be written: %s; %d bytes wait in memory", self.path, error, len(self._unwritten))
                return
            del self._unwritten[:written]

    def renew(self) -> None:
        """Goes on in a new file, if there is room for one. The old one is left to whoever collects orphans."""
        if self.healthy:
            old = self._descriptor
            try:
                self._begin()
            except OSError as error:
                log.error("%s grows on, for no other can be made beside it: %s", self.path, error)
                return
            os.close(old)

    def close(self) -> None:
        """Lets go of the file, which is an orphan then."""
        os.close(self._descriptor)
        self._descriptor = -1  # a number that another file may have now

    def _begin(self) -> None:
        while True:
            name = str(uuid.uuid4())
            path = self.folder / (name + _SUFFIX)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if _lock(descriptor):
                self._descriptor, self.id = descriptor, name
                return
            os.close(descriptor)  # it was taken for an orphan, and is gone


def read(path: Path, position: int, most_bytes: int) -> tuple[list[Record], int]:
    """Records from a place in a file on, and the place behind them. Ends before what is not whole, or no record to this
    version of Quire."""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read(most_bytes)
        records: list[Record] = []
        at = 0
        while len(data) - at >= _HEAD.size:
            size, crc = _HEAD.unpack_from(data, at)
            if not 0 < size <= _LARGEST:  # zeros: a machine fell after the file had grown, and before it was written
                break
            end = at + _HEAD.size + size
            if end > len(data):
                if records:
                    break
                data += file.read(end - len(data))  # a record larger than the share
                if end > len(data):
                    break
            body = data[at + _HEAD.size : end]
            if zlib.crc32(body) != crc:
                break
            try:
                records.append(Record.from_bytes(body))
            except ValueError as error:
                log.error("%s holds %s", path, error)
                break
            at = end
    return records, position + at


def orphans(folder: Path) -> Iterator[Path]:
    """Files whose gateway is gone, as far as one can see."""
    for path in sorted(folder.glob("*" + _SUFFIX)):
        with adopted(path) as mine:
            if mine:
                yield path


def set_aside(path: Path) -> Path:
    """A file that cannot be read to its end, for somebody to look at. Whoever gives it its name back has the rest tried
    again."""
    torn = path.with_suffix(_TORN)
    path.rename(torn)
    return torn


@contextmanager
def adopted(path: Path) -> Iterator[bool]:
    """Whether it is an orphan, and nobody else's for as long as this lasts."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    except PermissionError:
        log.error("%s may not be read: it is of another user", path)
        yield False
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Until it is closed, or its process dies. False: another has it, or the file is gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0
