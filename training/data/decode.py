"""From the bytes of an image file to pixels."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what decoding a broken file raises
# What PIL's plugins let through besides, where a broken file says something impossible.
DECODER_FAULTS = (EOFError, IndexError, KeyError, TypeError, RuntimeError, struct.error, zlib.error)
JPEG_START = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Decoder:
    """Decodes image files.

    Args:
        draft: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size (fewer DCT coefficients, so several times faster)
            while the shorter side keeps at least so many pixels; None: at full size.
    """

    draft: int | None = None

    def picture(self, data: bytes) -> Image.Image:
        """The decoded image, in the mode it is stored in.

        Raises:
            one of UNREADABLE
        """
        try:
            with Image.open(io.BytesIO(data)) as image:
                if self.draft is not None:
                    longer = -(-self.draft * max(image.size) // min(image.size))
                    portrait = image.width < image.height
                    image.draft(None, (self.draft, longer) if portrait else (longer, self.draft))
                image.load()
                return image
        except UnidentifiedImageError as error:  # whose own text is the address of a buffer
            raise ValueError("no image of a known format" if data else "the file is empty") from error
        except DECODER_FAULTS as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def pixels(self, data: bytes, mode: str) -> Tensor:
        """The decoded image as uint8 [c, h, w]; `mode` is L or RGB.

        A JPEG goes through torchvision, which spares PIL's copies: 1.8 times as fast for 500 x 375 pixels.

        Raises:
            one of UNREADABLE
        """
        if self.draft is None and data.startswith(JPEG_START):
            wanted = ImageReadMode.GRAY if mode == "L" else ImageReadMode.RGB
            try:
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=wanted)
            except RuntimeError:
                pass  # CMYK, or broken: PIL decodes it or says what is wrong
        return picture_to_pixels(in_mode(self.picture(data), mode))


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` in `mode`, L or RGB. 16 bits a pixel become 8, where PIL alone would make all but the darkest white.

    Raises:
        ValueError: its pixels are floating-point numbers, whose white nobody knows.
    """
    if picture.mode == "F":
        raise ValueError("floating-point pixels: save it with 8 or 16 bits a channel")
    if picture.mode.startswith("I"):  # I;16, and I for 16 bits in some formats
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert(mode)


def picture_to_pixels(picture: Image.Image) -> Tensor:
    """An L or RGB picture as uint8 [c, h, w]."""
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


class EncodedImages:
    """Base of image sets whose images are stored as files or as the bytes of files."""

    decoder: Decoder
    targets: Any

    def read(self, index: int) -> bytes:
        """The bytes of one image file."""
        raise NotImplementedError

    def load(self, index: int) -> Image.Image:
        """Read and decode one image."""
        return self.decoder.picture(self.read(index))

    def load_pixels(self, index: int, mode: str) -> Tensor:
        """Read and decode one image to uint8 [c, h, w]; `mode` is L or RGB."""
        return self.decoder.pixels(self.read(index), mode)
