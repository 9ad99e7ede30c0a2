"""A small segmentation head on a neighborhood-attention backbone: coins on their background, at 303 x 384 pixels.

python examples/segmentation.py [--steps 60] [--picture outputs/segmentation.png]

The picture comes with scikit-image; its mask is made here (Sobel edges, watershed): nothing is downloaded. The
backbone is `features_only=True`: four maps at strides 4 to 32 of an image of any size. Its dilations are chosen as are
those for dense tasks: every other block spreads its window over the map (DiNAT, arXiv 2209.15001).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import skimage
import timm
import torch
from scipy import ndimage
from skimage import filters, segmentation
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models

CROP = (131, 118)  # of training: not square, no multiple of anything


class Segmenter(nn.Module):
    """Backbone, one 1 x 1 projection per level, a sum at the finest level, two classes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        depths, kernel_size = (2, 2, 2, 1), 7
        widest = models.widest_dilations(CROP, kernel_size)
        self.backbone = timm.create_model(
            "dinat_mini",
            features_only=True,
            in_chans=1,
            embed_dim=width,
            depths=depths,
            kernel_size=kernel_size,
            dilations=widest,
            drop_path_rate=0.0,
        )
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels in self.backbone.feature_info.channels()
        )
        self.classify = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        """`image` [n, 1, h, w] to logits [n, 2, h, w]."""
        features = [project(map_) for project, map_ in zip(self.lateral, self.backbone(image), strict=True)]
        size = features[0].shape[-2:]
        merged = sum(functional.interpolate(f, size, mode="bilinear", align_corners=False) for f in features)
        logits = self.classify(merged)
        return functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)


def coins() -> tuple[Tensor, Tensor]:
    """The picture [1, 1, 303, 384], normalised, and which of its pixels show a coin [1, 303, 384] (0 or 1)."""
    picture = skimage.data.coins()
    markers = np.zeros(picture.shape, np.int32)
    markers[picture < 30] = 1
    markers[picture > 150] = 2
    mask = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(picture), markers) == 2)
    image = torch.from_numpy(picture.astype(np.float32))
    return ((image - image.mean()) / image.std())[None, None], torch.from_numpy(mask.astype(np.int64))[None]


def intersection_over_union(logits: Tensor, mask: Tensor) -> float:
    """Of the coins."""
    found, true = logits.argmax(1) == 1, mask == 1
    return float((found & true).sum() / (found | true).sum())


def train(model: Segmenter, image: Tensor, mask: Tensor, steps: int) -> None:
    """Learn from random crops of `image`, turned upside down half of the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = np.random.RandomState(0)
    for _ in range(steps):
        crops = []
        for _ in range(4):
            top, left = (random.randint(0, size - crop + 1) for size, crop in zip(image.shape[-2:], CROP, strict=True))
            both = torch.cat([image[0], mask], 0)[:, top : top + CROP[0], left : left + CROP[1]]
            crops.append(both.flip(1) if random.rand() < 0.5 else both)
        batch = torch.stack(crops)
        loss = functional.cross_entropy(model(batch[:, :1]), batch[:, 1].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Train on the left part of the picture, measure on the right part, which training never saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates (default: 60)")
    parser.add_argument("--picture", type=Path, help="write what it found here, as a PNG")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    image, mask = coins()
    seen, unseen = np.s_[..., :260], np.s_[..., 260:]
    model = Segmenter()

    def measure() -> float:
        model.eval()
        with torch.no_grad():
            return intersection_over_union(model(image[unseen]), mask[unseen])

    before = measure()
    train(model.train(), image[seen], mask[seen], arguments.steps)
    print(f"IoU on {tuple(image[unseen].shape[-2:])} pixels: untrained {before:.3f}, trained {measure():.3f}")
    if arguments.picture is not None:
        with torch.no_grad():
            found = model(image).argmax(1)[0].numpy().astype(bool)
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        skimage.io.imsave(
            arguments.picture, skimage.img_as_ubyte(segmentation.mark_boundaries(skimage.data.coins(), found))
        )


if __name__ == "__main__":
    main()
