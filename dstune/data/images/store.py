"""Store the images of a cache entry: a table with one line for each image file and each distinct image inside a row, and one file
with the bytes of the latter.

Rows and samples hold line numbers of this table, never pixels: an image is decoded when a batch needs it. Image files stay where
they are and may change later.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import xxhash

from dstune.core.confinement.spawned import Pool, ProcessEnded
from dstune.core.confinement.table import IMAGE, IMAGE_SECONDS_PER_PIXEL, WALL
from dstune.core.errors import Problem, UserError, first_line
from dstune.data.images.decoder import DECODE, MAX_PIXELS, MEASURE, REFUSED, SIZE
from dstune.data.images.places import COLUMN, Reference
from dstune.data.problems import RowError

FILE, BYTES = "images.arrow", "images.bin"
"""Names of the two files in the folder of a cache entry."""

MAX_PIXELS_OF_ROW = 2**29
"""Limit of all images of a row or request, which are in memory together: 1.6 GB as RGB, 256 pictures of 1920 x 1080."""
MAX_BYTES = 256 * 2**20
"""Size limit of an image file."""

_decoders = Pool("dstune.data.images.decoder", IMAGE)
_WALL_SECONDS = WALL * (IMAGE.seconds + IMAGE_SECONDS_PER_PIXEL * MAX_PIXELS)
"""After which a decoder is ended even if it sleeps."""

SCHEMA = pa.schema(
    [
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("changed", pa.int64()),
    ]
)
"""`path` is empty if the image is in BYTES at `offset`; `changed` is the modification time of `path`, ns."""


def require_pillow(where: str = "data.train") -> None:
    """Check that Pillow is installed. Raises UserError if it is not."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UserError(
            Problem(
                where, "rows with images need Pillow and torchvision", "pip install '.[vision]' in a clone of dstune"
            )
        ) from None


def decode(content: bytes) -> Any:
    """Return the image in these bytes as an RGB PIL image, rotated by its EXIF orientation. Raises RowError."""
    from PIL import Image

    answer = _ask(DECODE, content)
    width, height = SIZE.unpack_from(answer)
    return Image.frombytes("RGB", (width, height), answer[SIZE.size :])


def size_of(content: bytes) -> tuple[int, int]:
    """Return the width and height that `decode` would return for these bytes, without decoding them. Raises RowError."""
    width, height = SIZE.unpack_from(_ask(MEASURE, content))
    return width, height


def _ask(work: bytes, content: bytes) -> memoryview:
    """Return the answer of a process that reads images (`decoder`). Raises RowError."""
    try:
        answer = memoryview(_decoders.ask(work + content, IMAGE.seconds, _WALL_SECONDS))
    except ProcessEnded:
        raise RowError(
            f"takes more than {IMAGE.seconds:g} s and {IMAGE_SECONDS_PER_PIXEL * 1e6:g} s for each million pixels, or more than "
            f"{IMAGE.added_bytes / 2**30:g} GiB, to decode"
        ) from None
    if answer[:1] == REFUSED:
        raise RowError(str(answer[1:], "utf-8"))
    return answer[1:]


def refuse_many_pixels(sizes: Iterable[Sequence[int]]) -> None:
    """Check that images of these sizes (width, height) are not too large together for a row or a request. Raises RowError."""
    pixels = sum(width * height for width, height in sizes)
    if pixels > MAX_PIXELS_OF_ROW:
        raise RowError(f"the images have {pixels:,} pixels together, and at most {MAX_PIXELS_OF_ROW:,} are read")


def root_of_images(image_folder: str | None, file: Path) -> Path:
    """Return the folder where relative paths of images in the rows of `file` begin."""
    return (Path(image_folder).expanduser() if image_folder else file.parent).resolve()


class ImageWriter:
    """Adds the images of rows to a cache entry.

    folder: of the entry. root: where relative paths begin; None for the folder of the rows' file. refused: why the model accepts no
    images; empty if it does.
    """

    def __init__(self, folder: Path, root: str | None = None, refused: str = ""):
        self._folder, self._root, self._refused = folder, root, refused
        self._numbers: dict[str, int] = {}
        self._paths: dict[str, int] = {}
        self._lines: list[tuple[Any, ...]] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._lines)

    def take(self, row: dict[str, Any], file: Path) -> dict[str, Any]:
        """Return `row` with `{digest, number, size}` for each of its images. file: the file of the row. Raises RowError."""
        if self._refused:
            raise RowError(f"the row holds an image; {self._refused}")
        require_pillow()
        root = root_of_images(self._root, file)
        entries = []
        for place, reference in enumerate(row[COLUMN], 1):
            try:
                entries.append(self._entry(self._number(reference, root)))
            except RowError as error:
                name = f" ({reference!r:.80})" if isinstance(reference, str) and not _is_data(reference) else ""
                raise RowError(f"image {place}{name} {error}") from None
        refuse_many_pixels(image["size"] for image in entries)
        return {**row, COLUMN: entries}

    def finish(self) -> None:
        """Write the table if there are images."""
        if not self._lines:
            return
        columns = [
            pa.array(column, field.type) for column, field in zip(zip(*self._lines, strict=True), SCHEMA, strict=True)
        ]
        table = pa.table(columns, schema=SCHEMA)
        with pa.OSFile(str(self._folder / FILE), "wb") as stream, pa.ipc.new_file(stream, SCHEMA) as writer:
            writer.write_table(table)

    def _entry(self, number: int) -> dict[str, Any]:
        digest, width, height, *_ = self._lines[number]
        return {"digest": digest, "number": number, "size": [width, height]}

    def _number(self, reference: Reference, root: Path) -> int:
        if isinstance(reference, bytes):
            return self._add(reference)
        if _is_data(reference):
            return self._add(content_of_data_url(reference))
        path = path_within(reference, root)
        if not path.exists():
            raise RowError("is not there; data.image_folder names the folder where paths of images begin")
        if (number := self._paths.get(str(path))) is None:
            number = self._paths[str(path)] = self._add(read_file(path), path)
        return number

    def _add(self, content: bytes, path: Path | None = None) -> int:
        digest = xxhash.xxh3_128_hexdigest(content)
        if path is None and (known_number := self._numbers.get(digest)) is not None:
            return known_number
        if len(content) > MAX_BYTES:
            raise RowError(f"has {len(content):,} bytes, and none may have more than {MAX_BYTES:,}")
        width, height = size_of(content)
        if path is None:
            with (self._folder / BYTES).open("ab") as stream:
                stream.write(content)
            line = (digest, width, height, "", self._end, len(content), 0)
            self._end += len(content)
        else:
            line = (digest, width, height, str(path), 0, len(content), path.stat().st_mtime_ns)
        number = len(self._lines)
        self._numbers.setdefault(digest, number)
        self._lines.append(line)
        return number


@dataclass(frozen=True)
class ImageFiles:
    """Reads the images of a cache entry by number; picklable."""

    folder: Path

    @classmethod
    def of(cls, folder: Path) -> ImageFiles | None:
        """Open the images of an entry; None if it has none."""
        return cls(folder) if (folder / FILE).is_file() else None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    @cached_property
    def _table(self) -> Any:
        with pa.memory_map(str(self.folder / FILE)) as source:
            return pa.ipc.open_file(source).read_all()

    def __len__(self) -> int:
        return len(self._table)

    def line(self, number: int) -> dict[str, Any]:
        """Return the record of an image, by the names of SCHEMA."""
        return {name: self._table[name][int(number)].as_py() for name in SCHEMA.names}

    def content(self, number: int) -> bytes:
        """Return the bytes of an image. Raises RowError if its file changed since the rows were prepared."""
        line = self.line(number)
        if not line["path"]:
            with (self.folder / BYTES).open("rb") as stream:
                stream.seek(line["offset"])
                return stream.read(line["bytes"])
        content = read_file(Path(line["path"]))
        if xxhash.xxh3_128_hexdigest(content) != line["digest"]:
            raise RowError(f"({line['path']}) is another one than when the rows were prepared")
        return content

    def image(self, number: int) -> Any:
        """Return a decoded image; see `decode`. Raises RowError."""
        return decode(self.content(number))

    def digest(self) -> str:
        """Return a digest of the contents of all images, in order."""
        return xxhash.xxh3_128_hexdigest(" ".join(self._table["digest"].to_pylist()).encode())

    def state(self) -> str:
        """Return a digest of the sizes and modification times of all image files: it changes as soon as one of them does."""
        digest = xxhash.xxh3_64()
        for path in self._table["path"].to_pylist():
            if path:
                digest.update(_stat(path))
        return digest.hexdigest()

    def are_as_prepared(self) -> bool:
        """Return whether all image files still have the size and the modification time that they had at preparation."""
        columns = (self._table[name].to_pylist() for name in ("path", "bytes", "changed"))
        return all(
            not path or _stat(path) == f"{size} {changed}".encode()
            for path, size, changed in zip(*columns, strict=True)
        )


def _stat(path: str) -> bytes:
    try:
        status = Path(path).stat()
    except OSError:
        return b"missing"
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def path_within(reference: str, root: Path) -> Path:
    """Return the file that a path in a row names. Raises RowError if it is outside of `root`: rows may come from a stranger and
    could otherwise have any file of this machine read."""
    text = unquote(reference[7:]) if reference.startswith("file://") else reference
    try:
        path = (root / Path(text).expanduser()).resolve() if "\0" not in text else None
    except (OSError, RuntimeError):
        path = None
    if path is None:
        raise RowError("is no path")
    is_named_within = Path(os.path.normpath(root / Path(text).expanduser())).is_relative_to(root)
    blobs = _blobs_of(root)
    if not is_named_within or not (path.is_relative_to(root) or (blobs and path.is_relative_to(blobs))):
        raise RowError(f"lies outside of {root}; data.image_folder names the folder of the images")
    return path


def _blobs_of(root: Path) -> Path | None:
    """Return the folder that the links of a data set lead to if `root` is in the cache of Hugging Face
    (`REPOSITORY/snapshots/REVISION`), else None."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and (blobs := folder.parent.parent / "blobs").is_dir():
            return blobs
    return None


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file. Raises RowError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RowError(f"has more than {MAX_BYTES:,} bytes")
        if not path.is_file():
            raise RowError("is no file")
        return path.read_bytes()
    except OSError as error:
        raise RowError(f"cannot be read: {error.strerror}") from None


def content_of(reference: Reference, root: Path | None) -> bytes:
    """Return the bytes of an image in a request. root: where paths begin; None if clients may not send paths. Raises RowError."""
    if isinstance(reference, bytes):
        return reference
    if _is_data(reference):
        return content_of_data_url(reference)
    if root is None:
        raise RowError("is a path; a data URL is read (data:image/png;base64,...)")
    return read_file(path_within(reference, root.resolve()))


def _is_data(reference: str) -> bool:
    return reference.startswith("data:")


def content_of_data_url(url: str) -> bytes:
    """Return the bytes in a data URL (RFC 2397) of an image. Raises RowError."""
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RowError("is a data URL of another kind than data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"is a data URL that is not base64: {first_line(error)}") from None
