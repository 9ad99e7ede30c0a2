"""scikit-learn's handwritten digits: 1,797 real 8 x 8 drawings (Alpaydin, Kaynak, 1998)."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from training.config_data import DigitsConfig
from training.data.images import Selection, Splits, stratified_split

FULL_SCALE = 16  # the drawings' grey levels run from 0 to 16


@dataclass(frozen=True)
class Digits:
    """`pixels` [n, 8, 8] uint8, enlarged to `side` when read so that augmentation has pixels to move."""

    pixels: np.ndarray
    targets: list[int]
    side: int
    positions: list[int]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).resize((self.side, self.side), Image.Resampling.BICUBIC)

    def label(self, index: int) -> str:
        return f"digit {self.positions[index]}"


def open_digits(config: DigitsConfig) -> Splits:
    """The chosen digits; class names are the digits themselves."""
    bunch = load_digits()
    digits = list(range(10)) if config.classes is None else config.classes
    chosen = np.flatnonzero(np.isin(bunch.target, digits))
    pixels = np.round(bunch.images[chosen] * (255 / FULL_SCALE)).astype(np.uint8)
    targets = [digits.index(int(digit)) for digit in bunch.target[chosen]]
    images = Digits(pixels, targets, config.image_size, chosen.tolist())
    names = [str(digit) for digit in digits]
    parts = stratified_split(targets, names, config.validation_fraction, config.test_fraction, config.split_seed)
    return Splits(names, *(Selection(images, part) for part in parts))
