"""Builds the kernels this machine can have, checks them against the reference and times both: `python -m ops`."""

import time

import torch

from ops import build
from ops.deform_attn import LIMITS, reference, run_backward, run_forward, self_test

SHAPES = [(48, 52), (24, 26), (12, 13), (6, 7)]  # a pretraining encoder's levels, every cell a query
WIDTHS = (1, 17, 32, 64)


def main():
    for device in ("cpu", "cuda"):
        try:
            library = build.load(device)
            tests = [self_test(library, device, D) for D in WIDTHS]
        except (build.BuildError, RuntimeError, AttributeError) as error:  # of the compiler, or of the device's driver
            print(f"{device}: no kernel, the reference runs instead: {error}")
            continue
        errors = {t: max(test[t] for test in tests) for t in tests[0]}
        good = all(test[t] <= LIMITS[t] for test in tests for t in test)
        listed = ", ".join(f"{str(t).removeprefix('torch.')} {error:.1e}" for t, error in errors.items())
        print(f"{device}: {'ok' if good else 'WRONG'}, largest relative error against the float64 reference: {listed}")
        if good:
            print(f"{device}: {speed(library, device)}")


def speed(library, device):
    """Forward and forward + backward, ns per sampled point, kernel and reference in turn."""
    g = torch.Generator().manual_seed(0)
    N, flat = sum(h * w for h, w in SHAPES), [x for pair in SHAPES for x in pair]
    value, grad = torch.randn(2, N, 8, 32, generator=g).to(device), torch.randn(2, N, 256, generator=g).to(device)
    locations = torch.rand(2, N, 8, 4, 4, 2, generator=g).to(device)
    weights = torch.rand(2, N, 8, 4, 4, generator=g).to(device)
    inputs = [t.requires_grad_() for t in (value.clone(), locations.clone(), weights.clone())]

    def ours():
        run_forward(library, value, flat, locations, weights)

    def ours_both():
        ours()
        run_backward(library, grad, value, flat, locations, weights)

    def theirs():
        with torch.no_grad():
            reference(value, SHAPES, locations, weights)

    def theirs_both():
        torch.autograd.grad(reference(inputs[0], SHAPES, *inputs[1:]), inputs, grad)

    times = [[seconds(f, device) for f in (ours, ours_both, theirs, theirs_both)] for _ in range(3)]
    a, b, c, d = (min(t) / weights.numel() * 1e9 for t in zip(*times, strict=True))
    return (
        f"forward {a:.2g}, forward + backward {b:.2g} ns per point, reference {c:.2g} and {d:.2g} "
        f"({c / a:.1f} and {d / b:.1f} times as long), float32, {torch.get_num_threads()} threads"
    )


def seconds(f, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
