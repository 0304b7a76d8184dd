"""Image files as rows of a model's input, and rows as images, with Pillow, which torchvision brings."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.errors import TunerError
from tuner.model.manifest import TensorDescription

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
WHITES = (1.0, 16.0, 255.0)
"""What white may be in the objective's data, whose black is 0."""
MIN_SIDE = 8
"""A flat input of fewer pixels is no image."""
MAX_DRAWN = 64 * 64
"""Pixels of a row that is drawn."""
_NEARLY = 0.9
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def read_image(path: Path, its: TensorDescription, *, resize: bool) -> np.ndarray[Any, Any]:
    """Return an image as a row of an input, which has shape (height, width), (1 or 3, height, width) or (pixels).

    It is made grey or coloured as the input is, and its pixels, 0 to 255, go from 0 to what is white in the
    objective's data, as the range of the training split tells. Raises TunerError for what is no image, has another
    size unless it may be resized, or has no place in the input.
    """
    channels, size = _layout(its)
    white = _white(its)
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path, formats=("PNG", "JPEG")) as image,
        ):
            shown = _shown(path, image, channels)
            if size is None:  # the input is flat
                size = _size_of_flat(path, shown, its, resize=resize)
            if shown.size != size:
                if not resize:
                    raise TunerError(
                        f"{path} needs {size[0]} x {size[1]} pixels, got {shown.size[0]} x {shown.size[1]}:"
                        " --resize fits it"
                    )
                shown = shown.resize(size, Image.Resampling.BILINEAR)
            pixels = np.asarray(shown)
    except UnidentifiedImageError as error:
        raise TunerError(f"{path} needs to be a PNG or JPEG image, got something else") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TunerError(f"{path} is too large for an image: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of a broken file
        raise TunerError(f"cannot read {path}: {error}") from error
    if channels == 3:
        pixels = pixels.transpose(2, 0, 1)
    row = pixels.reshape(its.shape)
    return row if white == 255 else row * np.float32(white / 255)


def png_of(row: np.ndarray[Any, Any], its: TensorDescription) -> bytes | None:
    """Return a row of an input as a PNG; None if it is no image, or has more than `MAX_DRAWN` pixels."""
    try:
        (channels, size), white = _layout(its), _white(its)
    except TunerError:
        return None
    if size is None:
        side = math.isqrt(its.shape[0])
        if side * side != its.shape[0] or side < MIN_SIDE:
            return None
        size = side, side
    if size[0] * size[1] > MAX_DRAWN:
        return None
    from PIL import Image

    scaled = np.asarray(row, dtype=np.float32).reshape(channels, size[1], size[0]) * (255 / white)
    pixels = np.rint(scaled).clip(0, 255).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)).save(written, "PNG")
    return written.getvalue()


def _layout(its: TensorDescription) -> tuple[int, tuple[int, int] | None]:
    """Return how many channels an input has, and (width, height); no size for one that is flat."""
    match its.shape:
        case (_,):
            return 1, None
        case (height, width):
            return 1, (width, height)
        case (1 | 3 as channels, height, width):
            return channels, (width, height)
    raise TunerError(
        f"images need an input of shape [height, width], [1 or 3, height, width] or [pixels], the model's is"
        f" {list(its.shape)}: give arrays, as .npy"
    )


def _white(its: TensorDescription) -> float:
    """Return what white is in the objective's data. Raises TunerError if the data is not scaled as pixels are."""
    whites = WHITES[-1:] if its.dtype == "uint8" else WHITES
    if its.seen is None and its.dtype == "uint8":
        return whites[0]
    if its.seen is not None and its.seen[0] >= 0:
        for white in whites:
            if _NEARLY * white <= its.seen[1] <= white:
                return white
    found = "is not in this export" if its.seen is None else f"is {its.seen[0]:g} to {its.seen[1]:g}"
    raise TunerError(
        "images need an input of pixels from 0 to 1, 16 or 255, and the range that this model's had in training"
        f" {found}: give arrays as the objective's data has them, as .npy"
    )


def _shown(path: Path, image: Image.Image, channels: int) -> Image.Image:
    """Return the image in grey or in colour. Raises TunerError where that would lose what it shows."""
    if image.mode not in _MODES:
        raise TunerError(
            f"{path} needs 8 bits for each of grey or red, green and blue, got Pillow's mode {image.mode}: convert it"
        )
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        if shown.getchannel("A").getextrema() != (255, 255):
            raise TunerError(f"{path} needs to have no transparent part: save it on a background")
        image = shown.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _size_of_flat(path: Path, image: Image.Image, its: TensorDescription, *, resize: bool) -> tuple[int, int]:
    wanted, side = its.shape[0], math.isqrt(its.shape[0])
    if image.size[0] * image.size[1] == wanted:
        return image.size
    if resize and side * side == wanted:
        return side, side
    raise TunerError(
        f"{path} needs {wanted} pixels in all, got {image.size[0]} x {image.size[1]}"
        + (": --resize fits it" if side * side == wanted else "")
    )
