"""Operators behind one function each: `deform_attn`, multi-scale deformable attention, and `linear`."""

from ops.deform_attn import deform_attn
from ops.dense import Linear, linear

__all__ = ["Linear", "deform_attn", "linear"]
