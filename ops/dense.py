"""`linear`: float32 matrix products by oneDNN, where MKL, which torch takes, would leave AVX-512 alone.

MKL does so on all but Intel's processors and then reaches half of oneDNN's speed; on Intel's, and with AVX2 alone, it
is as fast or faster (README, Speed). A 1 x 1 convolution is the same product. On a GPU, in other precisions, under
torch.compile and torch.export this is F.linear.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def intel(cpuinfo="/proc/cpuinfo"):
    """Whether the processor is Intel's, as Linux or Windows says; False where neither does."""
    path = Path(cpuinfo)
    return "GenuineIntel" in (path.read_text() if path.exists() else platform.processor())


def onednn_is_faster(cpuinfo="/proc/cpuinfo"):
    """Whether MKL would leave AVX-512 alone: torch has it, and the processor is not Intel's."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not intel(cpuinfo)


CHOICE = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # torch's own is MKL: see `linear`
INSTEAD_OF_MKL = CHOICE and onednn_is_faster()
SMALLEST = 20480  # numbers in x: with fewer torch never takes oneDNN for a convolution
NARROWEST = 32  # outputs: with fewer nothing is gained


def linear(x, weight, bias=None):
    """x (..., C), weight (D, C), bias (D,) or None -> (..., D): F.linear up to rounding."""
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    large = x.numel() > SMALLEST and len(weight) >= NARROWEST
    if not (INSTEAD_OF_MKL and x.device.type == "cpu" and float32 and large) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    cells = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, rows, 1), channels last
    # dilation is nothing to a 1 x 1 kernel, but torch hands dilated convolutions to oneDNN, others in one thread to MKL
    y = F.conv2d(cells, weight[:, :, None, None], bias, dilation=2)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
