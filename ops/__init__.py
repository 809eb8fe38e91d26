"""Operators behind one function each: `deform_attn`, multi-scale deformable attention."""

from ops.deform_attn import deform_attn

__all__ = ["deform_attn"]
