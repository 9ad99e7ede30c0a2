"""The zoo: NAT, DiNAT, DiNAT_s and their isotropic relatives, in timm's registry once this package is imported.

import models, timm
model = timm.create_model("dinat_tiny", pretrained=True)
"""

from models.attention_maps import attention_layers, attention_maps
from models.checkpoints import CheckpointError, LoadReport, load_checkpoint, read_checkpoint
from models.convert import convert_attention
from models.dinat_s import DiNATs
from models.isotropic import IsotropicNAT
from models.layers import widest_dilations
from models.nat import NAT

__all__ = [
    "NAT",
    "CheckpointError",
    "DiNATs",
    "IsotropicNAT",
    "LoadReport",
    "attention_layers",
    "attention_maps",
    "convert_attention",
    "load_checkpoint",
    "read_checkpoint",
    "widest_dilations",
]
