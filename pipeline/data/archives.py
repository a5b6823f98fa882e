"""Compressed files, read as if they were not: gzip and Zstandard, one frame after another.

What an archive unpacks to is bounded: beyond 64 MiB, it may be at most 200 times what has been read of the archive.
(Text packs to a fifth of its size or less; a bomb of zeros to a thousandth.) A Zstandard window may have 128 MiB.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from typing import Any, BinaryIO

MAX_RATIO = 200
"""How many times its own size an archive may unpack to."""
FREE_BYTES = 64 * 2**20
"""Unpacked bytes up to which the ratio does not count."""
MAX_WINDOW = 128 * 2**20
"""The largest Zstandard window, which is memory to unpack with."""

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# So little at once that even a block of Zstandard zeros (128 KiB in 4 bytes) unpacks to 32 MiB.
_PIECE = 1024


class BrokenArchiveError(ValueError):
    """The archive is cut off or damaged."""


class ArchiveTooLargeError(ValueError):
    """The archive unpacks to more than it may."""


class Unpacked(io.RawIOBase):
    """The bytes that an archive holds.

    Reading raises `BrokenArchiveError` and `ArchiveTooLargeError`.

    Args:
        file: the archive, open at its beginning.
        magic: `GZIP` or `ZSTD`.
    """

    def __init__(self, file: BinaryIO, magic: bytes) -> None:
        self._file, self._magic = file, magic
        self.hash = hashlib.sha256()
        """Of the bytes of the archive that were read."""
        self._frame: Any = None
        self._packed = b""
        """Read from the archive, and not unpacked yet."""
        self._ready = memoryview(b"")
        """Unpacked, and not asked for yet."""
        self._in = self._out = 0

    def readable(self) -> bool:
        """As in `io`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As in `io`; fills the buffer unless the archive ends."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            if not len(self._ready) and not self._unpack():
                break
            count = min(len(view) - filled, len(self._ready))
            view[filled : filled + count] = self._ready[:count]
            self._ready = self._ready[count:]
            filled += count
        return filled

    def _unpack(self) -> bool:
        """Puts something into `_ready`; False at the end of the archive."""
        while not len(self._ready):
            if not self._packed:
                self._packed = self._file.read(_PIECE)
                self.hash.update(self._packed)
                self._in += len(self._packed)
            if not self._packed:
                if self._frame is not None:
                    raise BrokenArchiveError("the archive ends in the middle")
                return False
            if self._frame is None:
                self._begin()
                continue
            self._ready = memoryview(self._decompress())
            self._out += len(self._ready)
            if self._out > max(FREE_BYTES, MAX_RATIO * self._in):
                raise ArchiveTooLargeError(f"the archive unpacks to more than {MAX_RATIO} times its size")
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        return True

    def _begin(self) -> None:
        """Starts the frame that `_packed` begins with; zeros behind the last frame, as tapes have them, are dropped."""
        if self._in > len(self._packed):
            self._packed = self._packed.lstrip(b"\0")
            if not self._packed:
                return
        while len(self._packed) < len(self._magic) and (more := self._file.read(_PIECE)):
            self.hash.update(more)
            self._in += len(more)
            self._packed += more
        if not self._packed.startswith(self._magic):
            raise BrokenArchiveError("something else follows in the archive")
        if self._magic == GZIP:
            self._frame = zlib.decompressobj(wbits=31)
        else:
            import zstandard

            self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()

    def _decompress(self) -> bytes:
        piece, self._packed = self._packed, b""
        try:
            unpacked: bytes = self._frame.decompress(piece)
        except zlib.error as error:
            raise BrokenArchiveError("the archive is damaged") from error
        except Exception as error:  # zstandard.ZstdError, whose module is imported only when one is read
            if type(error).__name__ != "ZstdError":
                raise
            raise BrokenArchiveError("the archive is damaged") from error
        return unpacked
