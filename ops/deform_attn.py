"""Multi-scale deformable attention (Deformable DETR, Eq. 3), the pure PyTorch reference.

Every query of every head reads P points of each of the G levels and adds them up with its own weights; the points
lie at fractional places, so each is a bilinear mix of four cells, and cells outside a map count as zero.
Locations are in [0, 1] of the padded map, (x, y); the centre of cell i of W is at (i + 0.5) / W.
"""

import torch
import torch.nn.functional as F


def deform_attn(value, shapes, locations, weights):
    """out[b, n, m] = sum over levels g and points p of weights * bilinear(value_g[b, :, m], locations).

    value (B, S, M, D): the G maps flattened row by row and joined, M heads of width D; shapes: G pairs (H, W);
    locations (B, N, M, G, P, 2); weights (B, N, M, G, P). Returns (B, N, M * D) in value's type; float16 and
    bfloat16 are summed in float32. Raises ValueError when the maps do not add up to S.
    """
    B, S, M, D = value.shape
    N, G, P = locations.shape[1], locations.shape[3], locations.shape[4]
    if len(shapes) != G or sum(h * w for h, w in shapes) != S:
        raise ValueError(f"deform_attn: shapes {list(shapes)} do not describe {G} levels with {S} cells in all")
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    grid = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B*M, N, G, P, 2), grid_sample's [-1, 1]
    maps = value.to(dtype).split([h * w for h, w in shapes], dim=1)
    sampled = [
        F.grid_sample(
            v.permute(0, 2, 3, 1).reshape(B * M, D, *hw), grid[:, :, g], padding_mode="zeros", align_corners=False
        )
        for g, (v, hw) in enumerate(zip(maps, shapes, strict=True))
    ]  # G x (B*M, D, N, P)
    weights = weights.to(dtype).transpose(1, 2).reshape(B * M, 1, N, G, P)
    out = (torch.stack(sampled, dim=-2) * weights).sum((-2, -1))  # (B*M, D, N)
    return out.view(B, M * D, N).transpose(1, 2).to(value.dtype)
