"""Data sets by name, and the Lightning data module that serves any of them."""

from training.config_data import (
    DataConfig,
    DigitsConfig,
    FolderConfig,
    ImageNetConfig,
    ParquetConfig,
    ShardsConfig,
    TimmConfig,
)
from training.data.digits import open_digits
from training.data.folder import open_folder
from training.data.imagenet import open_imagenet
from training.data.images import Batch, Images, Splits
from training.data.module import ImageData
from training.data.parquet import open_parquet
from training.data.shards import open_shards
from training.data.timm_readers import open_timm
from training.errors import ConfigError

__all__ = ["Batch", "ImageData", "Images", "Splits", "open_splits"]


def open_splits(config: DataConfig) -> Splits:
    """List a data set's images without reading them.

    Raises:
        DataError: it is not there, or not laid out as it should be.
    """
    match config:
        case DigitsConfig():
            return open_digits(config)
        case FolderConfig():
            return open_folder(config)
        case ImageNetConfig():
            return open_imagenet(config)
        case ShardsConfig():
            return open_shards(config)
        case ParquetConfig():
            return open_parquet(config)
        case TimmConfig():
            return open_timm(config)
    raise ConfigError(f"data.name={config.name!r}: no such data set; choose one of configs/data")
