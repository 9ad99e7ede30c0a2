"""Augmentation on the device: seeded by position, distributed as the workers' is; and the decoders."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import AugmentationConfig
from training.config_data import FolderConfig
from training.data.augment import DeviceAugmentation, RandAugment
from training.data.decode import Decoder, picture_to_pixels
from training.data.images import Broken, PixelSample, collate_pixels
from training.data.transforms import train_transform
from training.errors import ConfigError
from training.randomness import seed_generators

EVERYTHING = AugmentationConfig(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5, affine_degrees=10, vflip=0.2)


def data(channels: int = 3, size: int = 32) -> FolderConfig:
    return FolderConfig(
        name="imagefolder", root=".", image_size=size, in_chans=channels, mean=[0.4] * channels, std=[0.2] * channels
    )


def samples(channels: int, count: int = 6) -> list[PixelSample]:
    random = np.random.RandomState(0)
    shapes = [(channels, 20 + 7 * i, 50 - 4 * i) for i in range(count)]
    return [
        PixelSample(torch.from_numpy(random.randint(0, 256, shape).astype(np.uint8)), i, i, 1000 + i)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_depends_on_its_own_seed_alone(channels) -> None:
    augment = DeviceAugmentation(data(channels), EVERYTHING)
    together = augment(collate_pixels(samples(channels)))
    assert together.image.shape == (6, channels, 32, 32)
    assert together.image.dtype == torch.float32
    torch.rand(3)  # whatever was drawn before does not matter
    alone = augment(collate_pixels(samples(channels)[3:4]))
    assert torch.equal(alone.image[0], together.image[3])
    other = samples(channels)[3]._replace(seed=7)
    assert not torch.equal(augment(collate_pixels([other])).image[0], alone.image[0])


def test_without_randomness_it_is_what_the_workers_do() -> None:
    random = np.random.RandomState(1)
    picture = Image.fromarray(random.randint(0, 256, (9, 9, 3)).astype(np.uint8)).resize((60, 45), Image.BICUBIC)
    plain = AugmentationConfig(scale=[1.0, 1.0], ratio=[4 / 3, 4 / 3], interpolation="bilinear", hflip=0)
    expected = train_transform(data(), plain)(picture)
    found = DeviceAugmentation(data(), plain)(collate_pixels([PixelSample(picture_to_pixels(picture), 0, 0, 0)]))
    assert (found.image[0] - expected).abs().max() <= 1.5 / 255 / 0.2


def test_crops_and_flips_are_distributed_as_in_the_workers() -> None:
    """A horizontal ramp: its mean tells where the crop lay and its slope whether it was flipped."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    picture = Image.fromarray(np.stack([ramp] * 3, -1))
    recipe = AugmentationConfig(scale=[0.1, 0.6], interpolation="bilinear", hflip=0.25)
    workers = train_transform(data(size=8), recipe)
    rows = []
    for seed in range(400):
        seed_generators(seed)
        rows.append(workers(picture))
    pixels = picture_to_pixels(picture)
    batch = collate_pixels([PixelSample(pixels, 0, seed, seed) for seed in range(400)])
    for images in (torch.stack(rows), DeviceAugmentation(data(size=8), recipe)(batch).image):
        slope = images[..., -1].mean((1, 2)) - images[..., 0].mean((1, 2))
        assert 0.17 < (slope < 0).float().mean() < 0.33
        assert 1.4 < slope.abs().mean() < 2.6, slope.abs().mean()
        assert 0.2 < images.mean((1, 2, 3)).std() < 1.2


def test_rand_augment_grows_with_its_magnitude() -> None:
    pixels = picture_to_pixels(Image.fromarray(np.random.RandomState(2).randint(0, 256, (32, 32, 3)).astype(np.uint8)))
    change = []
    for magnitude in (1, 9):
        augment = RandAugment(f"rand-m{magnitude}-n2-mstd0.5-inc1", [100, 100, 100])
        seed_generators(3)
        changed = [augment(pixels) for _ in range(120)]
        assert 0.1 < np.mean([torch.equal(image, pixels) for image in changed]) < 0.6  # each operation half the time
        change.append(np.mean([(image.float() - pixels).abs().mean().item() for image in changed]))
    assert change[1] > 1.3 * change[0]


def test_unreadable_images_pass_through() -> None:
    broken = Broken("name", "reason")
    batch = DeviceAugmentation(data(), EVERYTHING)(collate_pixels([broken, samples(3)[0], broken]))
    assert batch.broken == (broken, broken)
    assert batch.target.tolist() == [0]
    assert DeviceAugmentation(data(), EVERYTHING)(collate_pixels([broken])).image.numel() == 0


@pytest.mark.parametrize(
    "keys", [{"auto_augment": "augmix-m3"}, {"auto_augment": "original"}, {"interpolation": "lanczos"}]
)
def test_what_it_cannot_do_is_refused(keys) -> None:
    AugmentationConfig(**keys)
    with pytest.raises(ConfigError, match=next(iter(keys))):
        AugmentationConfig(runs_on="device", **keys)


@pytest.mark.parametrize(
    ("size", "scaled"), [((500, 375), (250, 188)), ((375, 500), (188, 250)), ((300, 300), (300, 300))]
)
def test_draft_halves_while_the_shorter_side_allows(tmp_path, size, scaled) -> None:
    random = np.random.RandomState(3)
    picture = Image.fromarray(random.randint(0, 256, (12, 16, 3)).astype(np.uint8)).resize(size, Image.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    drafted = Decoder(draft=180).picture(content)
    assert drafted.size == scaled
    whole = Decoder().picture(content).resize(scaled, Image.BOX)
    assert np.abs(np.asarray(drafted, int) - np.asarray(whole, int)).mean() < 4


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("stored", ["L", "RGB", "CMYK"])
def test_both_decoders_agree(tmp_path, mode, stored) -> None:
    random = np.random.RandomState(4)
    picture = Image.fromarray(random.randint(0, 256, (6, 8, 3)).astype(np.uint8)).resize((40, 30), Image.BICUBIC)
    picture.convert(stored).save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    pixels = Decoder().pixels(content, mode)
    expected = picture_to_pixels(Decoder().picture(content).convert(mode))
    assert pixels.shape == expected.shape == (1 if mode == "L" else 3, 30, 40)
    assert (pixels.int() - expected.int()).abs().float().mean() < 1


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits_a_pixel_keep_their_grey(tmp_path, extension, mode) -> None:
    grey = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / f"a.{extension}")
    pixels = Decoder().pixels((tmp_path / f"a.{extension}").read_bytes(), mode)
    assert pixels.shape == (1 if mode == "L" else 3, 8, 8)
    assert (pixels.numpy() == grey >> 8).all()


def test_floating_point_pixels_are_refused(tmp_path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="floating-point pixels"):
        Decoder().pixels((tmp_path / "a.tif").read_bytes(), "L")
