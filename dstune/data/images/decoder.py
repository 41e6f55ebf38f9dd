"""Reads images of strangers, in a process that the store starts for it: `python -m dstune.data.images.decoder`.

A decoder is C code that checks for no signals, so that only its process can be ended. A file of a few bytes may ask for gigabytes
(a tile of a TIFF) or minutes (a JPEG with thousands of scans). The process that holds the images opens none: even the head of a
WebP takes as much memory as it asks for.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from dstune.core.confinement import inside
from dstune.core.confinement.spawned import answer_requests
from dstune.core.confinement.table import IMAGE, IMAGE_SECONDS_PER_PIXEL
from dstune.core.errors import first_line
from dstune.data.problems import RowError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that Pillow may decode. It has many more decoders, and each one is exposed to files of strangers."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit, above which it suspects a decompression bomb (`Image.MAX_IMAGE_PIXELS`): 268 MB as RGB."""

DECODE, MEASURE = b"d", b"s"
"""First byte of a request, before the bytes of an image."""
READ, REFUSED = b"i", b"e"
"""First byte of an answer. The size and the pixels follow, or why the image is refused."""
SIZE = struct.Struct("<II")
"""Width and height."""


def main() -> None:
    from PIL import (  # noqa: F401 (now, before the limits)
        BmpImagePlugin,
        GifImagePlugin,
        ImageOps,
        JpegImagePlugin,
        MpoImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    answer_requests(answer, IMAGE)


def answer(request: bytes) -> tuple[bytes, ...]:
    """Return the parts of the answer. Raises MemoryError."""
    work, content = request[:1], request[1:]
    try:
        if work == MEASURE:
            return READ, SIZE.pack(*size_of(content))
        image = decode(content, lambda pixels: inside.end_after(IMAGE.seconds + pixels * IMAGE_SECONDS_PER_PIXEL))
        return READ, SIZE.pack(*image.size), image.tobytes()
    except RowError as error:
        return REFUSED, str(error).encode(errors="replace")


def decode(content: bytes, begin: Callable[[int], None] = lambda pixels: None) -> Any:
    """Return the image in these bytes as an RGB PIL image, rotated by its EXIF orientation. Raises RowError, MemoryError.

    begin: called with the number of its pixels before they are decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _refuse_size(image.size)
            begin(image.width * image.height)
            # A palette may have an alpha channel, which `convert` alone would turn into black or any other colour.
            _refuse_mode(image)
            rotated = ImageOps.exif_transpose(image)
            if rotated.mode.startswith("I;16"):  # `convert` would clip its values at 255
                is_big_endian = rotated.mode == "I;16B"
                rotated = Image.frombytes("L", rotated.size, rotated.tobytes()[0 if is_big_endian else 1 :: 2])
            if rotated.mode in ("RGBA", "LA", "PA") or "transparency" in rotated.info:
                rotated = rotated.convert("RGBA")
                ground = Image.new("RGBA", rotated.size, (255, 255, 255, 255))
                return Image.alpha_composite(ground, rotated).convert("RGB")
            return rotated.convert("RGB")
    except (RowError, MemoryError):
        raise
    except Exception as error:  # a decoder meets anything in a stranger's file
        raise RowError(f"is no whole image: {first_line(error)}") from None


def size_of(content: bytes) -> tuple[int, int]:
    """Return the width and height that `decode` would return for these bytes, without decoding them. Raises RowError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            size = image.size
            _refuse_size(size)
            _refuse_mode(image)
            # Pillow reports the size of a TIFF after its rotation.
            is_rotated = image.format != "TIFF" and _is_turned(image, content)
            # A phone's photo (a JPEG with an index, MPO) is followed by its preview and a depth map.
            is_animated = image.format != "MPO" and _has_second_frame(image)
    except (RowError, MemoryError):
        raise
    except Exception as error:
        raise RowError(f"is none of {', '.join(FORMATS)}, or not whole: {first_line(error)}") from None
    if is_animated:
        raise RowError("has several frames; only still images are read")
    return (size[1], size[0]) if is_rotated else size


def _is_turned(image: Any, content: bytes) -> bool:
    """Return whether EXIF data swap width and height. For a PNG without EXIF data in its head, Pillow decodes everything to look
    for them after the pixels; this is skipped if nothing can be there."""
    if image.format == "PNG" and not _may_have_exif(image.info, content):
        return False
    return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)


def _may_have_exif(head: Mapping[Any, Any], content: bytes) -> bool:
    """Return whether a PNG has EXIF data in its `head`, as read by Pillow, or chunks after its pixels that may hold some.

    Also True if a chunk is truncated or its checksum is wrong (PNG 3, 5.3): decoding then reports the fault.
    """
    if any("exif" in str(key) or "xmp" in str(key) for key in head):
        return True
    at, has_pixels = 8, False
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        kind, checksum = content[at + 4 : at + 8], content[end : end + 4]
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(checksum, "big") or len(checksum) < 4:
            return True
        if kind == b"IEND":
            return False
        if has_pixels and kind in _MAY_HOLD_EXIF:
            return True
        has_pixels = has_pixels or kind == b"IDAT"
        at = end + 4
    return True


_MAY_HOLD_EXIF = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def _has_second_frame(image: Any) -> bool:
    """Return whether the image has a second frame, and leave it at that frame. Counting all frames would read a stranger's complete
    file."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _refuse_mode(image: Any) -> None:
    if image.mode in ("I", "F"):
        raise RowError("has 32 bits a pixel, which nobody says what white is; save it with 8 or 16")


def _refuse_size(size: tuple[int, int]) -> None:
    width, height = size
    if not width or not height:
        raise RowError(f"has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise RowError(f"has {width:,} x {height:,} pixels, and none may have more than {MAX_PIXELS:,}")


if __name__ == "__main__":
    main()
