"""Multi-scale deformable attention (Deformable DETR, Eq. 3): one function, a reference and two kernels behind it.

Every query of every head reads P points of each of the G levels and adds them up with its own weights; the points
lie at fractional places, so each is a bilinear mix of four cells, and cells outside a map count as zero.
Locations are in [0, 1] of the padded map, (x, y); the centre of cell i of W is at (i + 0.5) / W. A point whose location
is not finite counts as zero too.

`taps.h` holds the arithmetic of one point, `cpu.cpp` and `cuda.cu` the kernels around it, `build.py` compiles them.
SIAMESE_DETR_OPS chooses: auto (default) takes the kernel of the tensors' device, and the reference with one warning
where there is none; cpu or cuda takes that kernel or raises, and the reference on other devices; reference always.
"""

import ctypes
import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from ops import build

MODES = ("auto", "cpu", "cuda", "reference")
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as the kernels number them
# Largest error relative to the largest entry, against float64; half types round what they store.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def deform_attn(value, shapes, locations, weights):
    """out[b, n, m] = sum over levels g and points p of weights * bilinear(value_g[b, :, m], locations).

    value (B, S, M, D): the G maps flattened row by row and joined, M heads of width D; shapes: G pairs (H, W);
    locations (B, N, M, G, P, 2); weights (B, N, M, G, P). Returns (B, N, M * D) in value's type; float16 and
    bfloat16 are summed in float32. Raises ValueError when the sizes do not fit each other.
    """
    flat = [x for pair in shapes for x in pair]
    check(value, flat, locations, weights)
    dtype = value.dtype
    if dtype not in TYPES or not has_kernel(value.device.type):
        return reference(value, shapes, locations, weights)
    if dtype == torch.float16 and value.device.type == "cpu":
        value = value.float()  # too rare there for code of its own
    sums = sums_in(dtype)
    return forward_op(value, flat, locations.to(sums), weights.to(sums)).to(dtype)


def reference(value, shapes, locations, weights):
    """The same in PyTorch's own operators, on any device."""
    B, S, M, D = value.shape
    N, G, P = locations.shape[1], locations.shape[3], locations.shape[4]
    dtype = sums_in(value.dtype)
    # (B*M, N, G, P, 2) in grid_sample's [-1, 1]; +-3 is outside every map, and clamping passes no gradient
    grid = (2 * locations.to(dtype) - 1).nan_to_num(nan=3.0).clamp(-3, 3).transpose(1, 2).flatten(0, 1)
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


def sums_in(dtype):
    """What values of a type are added up in, and what the kernels take locations and weights in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(value, flat, locations, weights):
    """Raises ValueError unless the sizes fit: the kernels trust them."""
    cells = sum(h * w for h, w in zip(flat[::2], flat[1::2], strict=True))
    if value.dim() != 4 or cells != value.shape[1] or min(flat, default=0) < 1 or cells >= 2**30:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        raise ValueError(f"deform_attn: shapes {pairs} do not describe value of {tuple(value.shape)}, (B, cells, M, D)")
    B, _, M, _ = value.shape
    expected = (B, *locations.shape[1:2], M, len(flat) // 2, *locations.shape[-2:-1], 2)  # any N and P
    if tuple(locations.shape) != expected or tuple(weights.shape) != expected[:-1]:
        raise ValueError(
            f"deform_attn: locations {tuple(locations.shape)} and weights {tuple(weights.shape)} do not fit value "
            f"{tuple(value.shape)} of {len(flat) // 2} levels: (B, N, M, levels, points, 2) and without the 2 expected"
        )
    if not value.device == locations.device == weights.device:
        raise ValueError(
            f"deform_attn: value is on {value.device}, locations on {locations.device}, weights on {weights.device}"
        )


def check_types(value, flat, locations, weights):
    """The same for a direct call of the operator, which converts nothing."""
    check(value, flat, locations, weights)
    types = (value.dtype, locations.dtype, weights.dtype)
    if value.dtype not in TYPES or types[1:] != (sums_in(value.dtype),) * 2:
        raise ValueError(f"deform_attn: no kernel for value, locations, weights of {types}; call ops.deform_attn")


# ---------------------------------------------------------------------------------------------------------------------
# The kernel of a device
# ---------------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # torch.compile asks once, while tracing
def has_kernel(device):
    """Whether the operator serves `device`; not under torch.func or forward-mode AD, as it knows no transforms."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return kernel(device) is not None and not transformed


def kernel(device):
    """The compiled library for 'cpu' or 'cuda' tensors, or None: use the reference. Raises ValueError if forced."""
    mode = os.environ.get("SIAMESE_DETR_OPS", "auto")
    if mode not in MODES:
        raise ValueError(f"SIAMESE_DETR_OPS={mode}: expected one of {', '.join(MODES)}")
    if device not in build.SOURCES or mode not in ("auto", device):
        return None
    library, reason = find_kernel(device)
    if library is None and mode == device:
        raise ValueError(f"SIAMESE_DETR_OPS={mode}: {reason}")
    return library


@functools.cache
def find_kernel(device):
    """(library, None), or (None, why not) after one warning. A library that disagrees with the reference is refused."""
    try:
        library = build.load(device)
        place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        with ThreadPoolExecutor(1) as pool:  # modes of the caller (inference, tracing) end at its thread
            errors = pool.submit(self_test, library, place).result()
        wrong = {str(t): e for t, e in errors.items() if not e <= LIMITS[t]}
        if not wrong:
            return library, None
        reason = f"the compiled kernel is wrong on this machine (relative errors {wrong})"
    except build.BuildError as failed:
        reason = str(failed)
    except (RuntimeError, AttributeError) as failed:  # of the driver, say, or a library without what it should have
        reason = f"the compiled kernel does not run here ({failed})"
    warnings.warn(
        f"deform_attn: no {device} kernel, the slower PyTorch reference is used: {reason}", RuntimeWarning, stacklevel=2
    )
    return None, reason


def self_test(library, device, D=32):
    """The error of output and gradients on one small example, relative to their largest entries: {type: error}."""
    g = torch.Generator().manual_seed(0)
    shapes, flat = [(5, 7), (3, 2)], [5, 7, 3, 2]
    tensors = [
        torch.randn(2, 41, 3, D, generator=g, dtype=torch.float64),
        torch.rand(2, 11, 3, 2, 4, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2,
        torch.rand(2, 11, 3, 2, 4, generator=g, dtype=torch.float64),
        torch.randn(2, 11, 3 * D, generator=g, dtype=torch.float64),
    ]
    errors = {}
    for dtype in LIMITS:
        if dtype == torch.float16 and device == "cpu":
            continue  # deform_attn takes the float32 kernel
        types = (dtype, sums_in(dtype), sums_in(dtype), dtype)
        *inputs, grad = (t.to(device, dtype) for t, dtype in zip(tensors, types, strict=True))
        value, *points = inputs
        ours = [run_forward(library, value, flat, *points), *run_backward(library, grad, value, flat, *points)]
        inputs = [t.double().requires_grad_() for t in inputs]
        out = reference(inputs[0], shapes, *inputs[1:])
        right = [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]
        each = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(ours, right, strict=True)]
        errors[dtype] = torch.stack(each).max().item()  # a NaN stays one
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def call(library, name, value, flat, shape, tensors):
    """Calls a kernel on value's device; shape: of locations; None among the tensors: not wanted."""
    B, S, M, D = value.shape
    _, N, _, G, P, _ = shape
    sizes, levels = (ctypes.c_int64 * 7)(B, S, M, D, N, G, P), (ctypes.c_int64 * len(flat))(*flat)
    cuda = value.device.type == "cuda"
    with torch.cuda.device(value.device) if cuda else nullcontext():
        last = torch.cuda.current_stream().cuda_stream if cuda else torch.get_num_threads()
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        error = getattr(library, name)(TYPES[value.dtype], sizes, levels, *addresses, last)
    if error:
        raise RuntimeError(f"deform_attn: {error.decode()}")


def run_forward(library, value, flat, locations, weights):
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    out = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    call(library, "deform_attn_forward", value, flat, locations.shape, [value, locations, weights, out])
    return out


def run_backward(library, grad, value, flat, locations, weights, wanted=True):
    """The gradients by value (None unless wanted), locations and weights."""
    grad, value, locations, weights = (t.contiguous() for t in (grad, value, locations, weights))
    value_grad = None
    if wanted and value.device.type == "cuda":  # atomics add up in at least float32
        value_grad = torch.zeros(value.shape, dtype=locations.dtype, device=value.device)
    elif wanted:
        value_grad = torch.empty_like(value)
    out = [value_grad, torch.empty_like(locations), torch.empty_like(weights)]
    call(library, "deform_attn_backward", value, flat, locations.shape, [grad, value, locations, weights, *out])
    return out if value_grad is None else [value_grad.to(value.dtype), *out[1:]]


@torch.library.custom_op("siamese_detr::deform_attn", mutates_args=())
def forward_op(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    check_types(value, shapes, locations, weights)
    library = kernel(value.device.type)
    if library is None:  # an exported program on a machine without
        return reference(value, list(zip(shapes[::2], shapes[1::2], strict=True)), locations, weights).contiguous()
    return run_forward(library, value, shapes, locations, weights)


@forward_op.register_fake
def _(value, shapes, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("siamese_detr::deform_attn_backward", mutates_args=())
def backward_op(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients; value's is empty unless wanted."""
    check_types(value, shapes, locations, weights)
    out = run_backward(kernel(value.device.type), grad, value, shapes, locations, weights, wanted)
    return (value.new_empty(0) if out[0] is None else out[0], *out[1:])


@backward_op.register_fake
def _(grad, value, shapes, locations, weights, wanted):
    value_grad = value.new_empty(value.shape) if wanted else value.new_empty(0)
    return value_grad, locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def save(ctx, inputs, output):
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def gradients(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    by_value, *rest = backward_op(grad, value, ctx.shapes, locations, weights, wanted)
    return by_value if wanted else None, None, *rest


forward_op.register_autograd(gradients, setup_context=save)
