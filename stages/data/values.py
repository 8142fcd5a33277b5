"""What an image holds, as 8 bits a channel: other values by one full scale for a whole data set."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

HIGH_BYTE = "strata: high byte"
"""Key in an image's `info`: whether Pillow keeps only the high byte of each 16-bit value."""
CLEARED, COLOUR = "transparent to white", "colour"
"""What was done to an image with transparent pixels; what is said of one that is not grey."""
_SCALES = {"float": (1, 255), "integer": (255, 1023, 4095, 16383, 65535), "16-bit": (65535,)}
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _COLOURS, _SIGN = 258, 259, 262, 284, 320, 339


def plain(
    image: Image.Image, scales: Mapping[str, int] | None = None
) -> tuple[Image.Image, tuple[str, ...], str, int]:
    """A decoded image of any mode as 8 bits a channel, upright and opaque, in mode 1, L or RGB.

    `scales` are the full scales of the data set by kind; None, before they are known: the image's
    own. With it what was done to it, in words; the kind of its values: float, integer (more than 8
    bits), 16-bit (scaled to that by its format), colour (of 16 bits a channel), or '' for 8 bits;
    and the least full scale of the kind that holds them, 0 for floats that are all 0. Raises
    ValueError for values that no scale holds and for what Pillow misreads, and nearly anything on
    damaged data.
    """
    if 0 in image.size:
        raise ValueError("it has no pixels")
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and (reason := _misread(image, tags)):
        raise ValueError(reason)
    turned, changes = _upright(image), ()
    if image.mode == "F" or image.mode.startswith("I"):
        scaled = image.format in ("PPM", "JPEG2000")
        kind = "float" if image.mode == "F" else "16-bit" if scaled else "integer"
        values = np.asarray(turned)
        scale, eight = _scaled(kind, values, scales)
        if (clear := image.info.get("transparency")) is not None:
            eight[values == clear] = 255
            changes = (CLEARED,)
        flat = Image.fromarray(eight)
    else:
        kind = "colour" if image.info.get(HIGH_BYTE) else ""
        scale = 4095 if kind and np.max(image.getextrema()[:3]) < 16 else 65535
        flat, changes = _flat(turned)
    with suppress(Exception):  # about other frames, which may be damaged
        changes += ("the first of several frames",) * bool(getattr(image, "is_animated", False))
    return flat, changes + (COLOUR,) * (flat.mode == "RGB"), kind, scale


def plain_array(
    values: np.ndarray, scales: Mapping[str, int] | None = None
) -> tuple[Image.Image, tuple[str, ...], str, int]:
    """Pixels (H, W) or (H, W, C) of another dtype than uint8 as `plain` gives an image: by one full
    scale for the whole data set. Raises ValueError as it does."""
    if values.dtype == bool:
        raise ValueError("it is bool: make it uint8, 0 and 255")
    if values.min() < 0:
        raise ValueError("it has values below 0: leave normalising to data.mean, or set data.shape")
    kind = "float" if values.dtype.kind == "f" else "integer"
    scale, eight = _scaled(kind, values, scales)
    flat, changes = _flat(Image.fromarray(eight[..., 0] if eight.shape[2:] == (1,) else eight))
    return flat, changes + (COLOUR,) * (flat.mode == "RGB"), kind, scale


def told(kind: str, scale: int) -> str:
    """What is done to the values of a kind, in words, at the full scale of the data set."""
    if kind == "float":
        return "float of 0…1, value × 255" if scale == 1 else "float of 0…255, rounded"
    if kind == "colour":
        return "16-bit colour, the high byte"
    if scale == 65535:
        return "16-bit, value / 257"
    return f"integers of 0…{scale}, " + ("as they are" if scale == 255 else f"× 255 / {scale}")


def undecided(kind: str, scale: int, whole: int) -> str:
    """Why an image of full scale `scale` cannot be read at that of its data set; '' if it can."""
    if kind == "float" and 0 < scale < whole:
        return "its floats are of 0…1, those of other images of 0…255: make them alike"
    if kind == "colour" and whole < 65535:
        return f"16-bit colour of 0…{whole}, of which Pillow reads the high byte: save it as 8 bits"
    return ""


def _misread(image: Image.Image, tags: Mapping[int, Any]) -> str:
    """What Pillow is known to get wrong in a TIFF, without an error; '' if there is nothing."""
    deep, raw = tags.get(_BITS, (1,))[0] > 8, tags.get(_COMPRESSION, 1) == 1
    if deep and tags.get(_PHOTOMETRIC) == 0:
        return "in its values of more than 8 bits 0 is white: save it with 0 as black"
    if tags.get(_PLANAR) == 2 and (raw if deep else image.mode in ("LA", "La", "PA")):
        return "its channels are stored one after the other: save them together"
    if image.mode in ("F", "I") and not raw and getattr(tags, "prefix", b"") == b"MM":
        return "big-endian and compressed: save it uncompressed or little-endian"
    if image.mode == "L" and tags.get(_SIGN) == (2,) and np.max(image.getextrema()) > 127:
        return "some of its values are negative"
    if image.mode in ("P", "PA") and 0 < max(tags[_COLOURS]) < 256:
        return f"its colours end at {max(tags[_COLOURS])}, where a TIFF has them up to 65,535"
    return ""


def _scaled(
    kind: str, values: np.ndarray, scales: Mapping[str, int] | None
) -> tuple[int, np.ndarray]:
    """The full scale of some values, and they in uint8 at that of `scales`, or their own.

    Raises ValueError for values that are not finite or beyond every scale.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds NaN or infinity")
    if scales is not None and kind not in scales:
        raise ValueError(f"no survey has chosen the full scale of its {kind} values")
    # Floats that reach 2 are meant to end at 255, and 1.5 is beyond the 1 that was meant.
    own = next((s for s in _SCALES[kind] if high < (2 if s == 1 else s + 0.5)), 0)
    factor = 255 / ((own if scales is None else scales[kind]) or 1)
    # What a float is beyond the ends of its scale may be what rounding takes away.
    if not own or low * factor < -0.5 * (kind == "float") or high * factor >= 255.5:
        ends = "0…1 or 0…255" if kind == "float" else "0…65535"
        raise ValueError(f"its {kind} values go from {low:g} to {high:g}, must be {ends}")
    eight = np.rint(values.astype(np.float32) * np.float32(factor)).clip(0, 255)
    return 0 if kind == "float" and not high else own, eight.astype(np.uint8)


def _flat(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """8 bits a channel and opaque: in mode 1, L or RGB; with what was done, in words."""
    if image.has_transparency_data:
        if image.info.get(HIGH_BYTE) and "transparency" in image.info:
            raise ValueError("one of its 16-bit colours is transparent: save it with alpha")
        clear = image.convert(_STRAIGHT.get(image.mode, image.mode)).convert("RGBA")
        seen = clear.getchannel("A").getextrema() != (255, 255)
        white = Image.new("RGBA", clear.size, "white")
        flat = Image.alpha_composite(white, clear).convert("RGB")
        return flat, (CLEARED,) if seen else ()
    if image.mode in ("1", "L", "RGB"):
        return image, ()
    return image.convert("RGB"), () if image.mode == "P" else (f"{image.mode} to RGB",)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where the EXIF cannot be read."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # the EXIF reader raises nearly anything on a damaged block
        return image
