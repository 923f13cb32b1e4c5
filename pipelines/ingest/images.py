"""A folder of images, sorted by name: PNG, JPEG and TIFF."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.ingest.base import IngestError, RowArray
from storage_schemas.objects import redact_url

__all__ = ["IMAGE_SUFFIXES", "ImageFolder", "open_images", "pixels_of"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_FILES_AT_ONCE = 64


def open_images(url: str) -> dict[str, RowArray]:
    """Open a folder of images at any fsspec URL, as the one array `image`.

    Raises:
        IngestError: There are none, or the first cannot be read.
    """
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    try:
        names = [str(path) for path in fs.ls(root, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        names = []
    files = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        raise IngestError(
            f"{redact_url(url)} holds no images ({', '.join(IMAGE_SUFFIXES)}) among its "
            f"{len(names)} entries; give the folder that holds them, not one above it"
        )
    return {"image": ImageFolder(fs, files)}


class ImageFolder(RowArray):
    """Images of one size and one kind, (n, C, H, W).

    Arguments:
        fs: The fsspec file system.
        files: Paths of the images.
    """

    bands_first = True

    def __init__(self, fs: Any, files: list[str]) -> None:
        self._fs = fs
        self._files = files
        first = self._decode(files[0], fs.cat_file(files[0]))
        super().__init__("image", (len(files), *first.shape), first.dtype)

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        """Yield images in order."""
        rows = min(rows, _FILES_AT_ONCE)
        for first in range(start, stop, rows):
            names = self._files[first : min(stop, first + rows)]
            contents = self._fs.cat(names, on_error="return")
            if isinstance(contents, bytes):  # fsspec does so for a list of one
                contents = {names[0]: contents}
            yield np.stack([self._checked(name, contents[name]) for name in names])

    def describe(self, row: int) -> str:
        """Name an image in a message."""
        return f"sample {row} ({self._files[row].rpartition('/')[2]})"

    def _checked(self, name: str, content: bytes | Exception) -> NDArray[Any]:
        if isinstance(content, Exception):
            raise IngestError(
                f"the image {name} cannot be read ({content}); check its permissions"
            ) from content
        image = self._decode(name, content)
        if (image.shape, image.dtype) != (self.shape[1:], self.dtype):
            raise IngestError(
                f"the image {name} is {_kind(image.shape, image.dtype)} but the first one "
                f"({self._files[0].rpartition('/')[2]}) is {_kind(self.shape[1:], self.dtype)}; "
                "make all images alike, or take it out of the folder"
            )
        return image

    def _decode(self, name: str, content: bytes) -> NDArray[Any]:
        try:
            with Image.open(io.BytesIO(content)) as image:
                return pixels_of(image, name)
        except IngestError:
            raise
        # Pillow's decoders raise errors of many kinds on damaged files.
        except Exception as error:
            raise IngestError(
                f"the image {name} cannot be decoded ({error}); write it again, or take it out of "
                "the folder"
            ) from error


def pixels_of(image: Image.Image, name: str) -> NDArray[Any]:
    """Return an image's pixels, shape (C, H, W): grey or red, green and blue.

    Arguments:
        image: The image. Palettes become RGB, which loses nothing; black and white becomes 0 and
            255.
        name: Its name, for messages.

    Raises:
        IngestError: It has transparency, other colours, or several pages.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise IngestError(
            f"the image {name} has {image.n_frames} pages; save each as an image of its own"  # type: ignore[attr-defined]
        )
    if image.mode == "P" and "transparency" not in image.info:
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "F", "I") or image.mode.startswith("I;16"):
        return np.asarray(image)[None]
    if image.mode == "RGB":
        return np.moveaxis(np.asarray(image), -1, 0)
    raise IngestError(
        f"the image {name} has the colours {image.mode!r} but grey and RGB images are taken; save "
        "it without transparency, as RGB"
    )


def _kind(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    bands, height, width = shape
    colours = "grey" if bands == 1 else "RGB"
    return f"{width} x {height} pixels, {colours}, {dtype}"
