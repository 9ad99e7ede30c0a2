"""Neighborhood attention: the operator, its backends, and a module around it. Knows nothing of models.

output = na2d(query, key, value, kernel_size=7, dilation=2, rpb=rpb)     # [batch, height, width, heads, head_dim]
print(explain(query, key, value, kernel_size=7))                         # which backend serves, and why not the others
"""

from kernels.decomposition import decomposed
from kernels.determinism import is_deterministic, set_deterministic
from kernels.functional import explain, merge_attentions, na1d, na2d, na3d, neighborhood_attention
from kernels.modules import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d

__all__ = [
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "decomposed",
    "explain",
    "is_deterministic",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "set_deterministic",
]
