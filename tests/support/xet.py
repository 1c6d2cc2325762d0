"""Xet's formats, as far as the tests' Hub needs them: what a client uploads is unpacked, what it downloads is packed.

Xet cuts files into chunks and keeps chunks in xorbs. A client uploads xorbs, then a shard, which says of which chunks
each file consists. For a download it asks for a file's reconstruction: the chunks, and where to fetch their bytes.

This Hub keeps whole files. It unpacks a file as soon as a shard names it, and serves each one as a xorb of its own,
whose chunks are not compressed and all have the same size, so that what lies where is plain arithmetic.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

CHUNK = 1 << 16  # bytes of a served xorb's chunks
HEADER = 8  # bytes before each chunk: version, length packed (3 bytes), compression, length unpacked (3 bytes)
ENTRY = 48  # bytes of each entry of a shard
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30  # flags of a shard's file: what follows its segments
PLAIN, LZ4, GROUPED_LZ4 = range(3)  # compressions


class Segment(NamedTuple):
    """Consecutive chunks of a xorb."""

    xorb: str
    first: int
    end: int


def file_hash(sha256: str) -> str:
    """What this Hub calls a file in Xet: 64 hexadecimal digits that are not the file's sha256."""
    return hashlib.sha256(f"xet {sha256}".encode()).hexdigest()


def read_shard(shard: bytes) -> Iterator[tuple[str, list[Segment]]]:
    """The sha256 and the segments of each file in a shard whose sha256 is stated."""
    at = ENTRY  # behind tag, version and the footer's size
    while (head := shard[at : at + ENTRY])[:32] != b"\xff" * 32:
        flags, count = struct.unpack("<II", head[32:40])
        entries = [shard[at + ENTRY * i : at + ENTRY * (i + 1)] for i in range(1, count + 1)]
        at += ENTRY * (1 + count * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_METADATA:
            yield _hash(shard[at:]), [Segment(_hash(entry), *struct.unpack("<II", entry[40:])) for entry in entries]
            at += ENTRY


def _hash(entry: bytes) -> str:
    """An entry begins with a hash of four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", entry[:32]))


def assemble(segments: list[Segment], read_xorb: Callable[[str], bytes]) -> bytes:
    """The content of a file."""
    return b"".join(
        chunk for xorb, first, end in segments for chunk in islice(_chunks(read_xorb(xorb)), first, end)
    )  # fmt: skip


def _chunks(xorb: bytes) -> Iterator[bytes]:
    at = 0
    while at + HEADER <= len(xorb) and xorb[at] == 0:  # the footer begins with another byte
        packed, unpacked = (int.from_bytes(xorb[at + i : at + i + 3], "little") for i in (1, 5))
        compression, at = xorb[at + 4], at + HEADER + packed
        content = xorb[at - packed : at]
        if compression != PLAIN:
            content = _lz4_frame(content)
        yield _ungroup(content) if compression == GROUPED_LZ4 else content
        assert compression <= GROUPED_LZ4
        assert len(content) == unpacked


def _ungroup(content: bytes) -> bytes:
    """The bytes of each fourth position stand together."""
    result, at = bytearray(len(content)), 0
    for position in range(4):
        size = len(range(position, len(content), 4))
        result[position::4] = content[at : at + size]
        at += size
    return bytes(result)


def _lz4_frame(frame: bytes) -> bytes:
    flags = frame[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)  # content's size, dictionary
    result = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        is_plain, size = size >> 31, size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + size]
        if is_plain:
            result += block
        else:
            _lz4_block(block, result)
        at += 4 + size + (4 if flags & 16 else 0)  # a block's checksum
    return bytes(result)


def _lz4_block(block: bytes, result: bytearray) -> None:
    def length(nibble: int) -> int:
        nonlocal at
        while nibble >= 15 and (more := block[at]) is not None:
            nibble, at = nibble + more, at + 1
            if more < 255:
                break
        return nibble

    at = 0
    while at < len(block):
        token, at = block[at], at + 1
        literals = length(token >> 4)
        result += block[at : at + literals]
        at += literals
        if at >= len(block):  # the last sequence has literals only
            return
        distance, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        match = length(token & 15) + 4
        pattern = result[-distance:][:match] if distance > match else result[len(result) - distance :]
        result += (pattern * (match // len(pattern) + 1))[:match]


def pack(content: bytes) -> bytes:
    """The xorb in which a file is served."""
    parts = []
    for start in range(0, len(content), CHUNK):
        chunk = content[start : start + CHUNK]
        size = len(chunk).to_bytes(3, "little")
        parts += [b"\0", size, bytes([PLAIN]), size, chunk]
    return b"".join(parts)


def reconstruction(name: str, url: str, size: int, first: int, last: int) -> dict:
    """Where the bytes from `first` to `last` of a file lie in its xorb, which is at `url`."""
    start, end = first // CHUNK, last // CHUNK + 1
    packed_end = min(end * (HEADER + CHUNK), size + HEADER * -(-size // CHUNK))
    chunks = {"start": start, "end": end}
    place = {"range": chunks, "url": url, "url_range": {"start": start * (HEADER + CHUNK), "end": packed_end - 1}}
    term = {"hash": name, "unpacked_length": min(end * CHUNK, size) - start * CHUNK, "range": chunks}
    return {"offset_into_first_range": first % CHUNK, "terms": [term], "fetch_info": {name: [place]}}
