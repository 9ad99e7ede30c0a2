"""Entry points of `torch.hub`: every model by its name.

model = torch.hub.load("path/to/fastna", "dinat_tiny", source="local", pretrained=True)
"""

from models.dinat_s import (
    dinat_s_base,
    dinat_s_large,
    dinat_s_large_21k,
    dinat_s_large_384,
    dinat_s_small,
    dinat_s_tiny,
)
from models.isotropic import (
    dinat_isotropic_base,
    dinat_isotropic_small,
    nat_isotropic_base,
    nat_isotropic_small,
    vitrpb_base,
    vitrpb_small,
)
from models.nat import (
    dinat_base,
    dinat_large,
    dinat_large_21k,
    dinat_large_21k_11x11,
    dinat_large_384,
    dinat_large_384_11x11,
    dinat_mini,
    dinat_small,
    dinat_tiny,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
)

__all__ = [
    "dinat_base",
    "dinat_isotropic_base",
    "dinat_isotropic_small",
    "dinat_large",
    "dinat_large_21k",
    "dinat_large_21k_11x11",
    "dinat_large_384",
    "dinat_large_384_11x11",
    "dinat_mini",
    "dinat_s_base",
    "dinat_s_large",
    "dinat_s_large_21k",
    "dinat_s_large_384",
    "dinat_s_small",
    "dinat_s_tiny",
    "dinat_small",
    "dinat_tiny",
    "nat_base",
    "nat_isotropic_base",
    "nat_isotropic_small",
    "nat_mini",
    "nat_small",
    "nat_tiny",
    "vitrpb_base",
    "vitrpb_small",
]

dependencies = ["torch", "timm", "safetensors"]
