"""How fast deform_attn is, against the grid_sample reference and the fastest package we know (a peer, if installed).

pip install --no-deps --target FOLDER torch-ms-deform-attn==0.1.1, and PYTHONPATH=FOLDER before the command.
"""

import importlib
import math
import statistics

import torch

from bench.timing import paired, ratios, record
from ops import deform_attn
from ops.deform_attn import reference

COCO = [(100, 167), (50, 84), (25, 42), (13, 21)]
CASES = {  # images, levels, queries (None: one at every cell), where they look
    "pretraining encoder": (4, [(48, 52), (24, 26), (12, 13), (6, 7)], None, "near"),
    "COCO encoder": (2, COCO, None, "near"),
    "COCO decoder": (2, COCO, 300, "near"),
    "COCO encoder, uniform": (2, COCO, None, "uniform"),
}


def add_flags(command):
    command.add_argument("--only", nargs="*", help="cases to run, by the start of their names")


def example(B, shapes, N, where):
    """value, shapes, locations, weights for 8 heads of 32 channels and 4 points, and the output's gradient."""
    g = torch.Generator().manual_seed(0)
    M, D, G, P = 8, 32, len(shapes), 4
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(B, cells, M, D, generator=g)
    if N is None:
        N = cells
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
        centre = torch.cat(grids).flip(-1).expand(B, -1, -1)
    else:
        centre = torch.rand(B, N, 2, generator=g)
    if where == "uniform":
        locations = torch.rand(B, N, M, G, P, 2, generator=g)
    else:  # as the initialisation has it: head m looks along its own of 8 directions, p + 1 cells away
        angle = torch.arange(M) * (2 * math.pi / M)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        offsets = ray[:, None, None] * torch.arange(1, P + 1)[:, None]
        offsets = offsets + 0.1 * torch.randn(B, N, M, G, P, 2, generator=g)  # a little trained
        locations = centre[:, :, None, None, None] + offsets / torch.tensor(shapes).flip(-1)[:, None]
    weights = torch.randn(B, N, M, G * P, generator=g).softmax(-1).view(B, N, M, G, P)
    return value, shapes, locations, weights, torch.randn(B, N, M * D, generator=g)


def peer():
    """The PyPI package's function with deform_attn's signature, or None after a sentence that says how to get it."""
    try:
        module = importlib.import_module("torch_ms_deform_attn")
    except ImportError:
        print("peer left out: torch-ms-deform-attn is not installed (see the top of bench/operator.py)")
        return None

    def call(value, shapes, locations, weights):
        sizes = torch.tensor(shapes)
        return module.ms_deform_attn(value, sizes, sizes.prod(1).cumsum(0) - sizes.prod(1), locations, weights)

    return call


def ops(args):
    """ns per sampled point of every contestant, and how many times as long as ours the others take."""
    functions = {"ours": deform_attn, "grid_sample": reference, "peer": peer()}
    functions = {name: f for name, f in functions.items() if f is not None}
    for case, settings in CASES.items():
        if args.only and not case.startswith(tuple(args.only)):
            continue
        value, shapes, locations, weights, grad = example(*settings)
        inputs = {  # leaves: values in float32 and, for ours alone, bfloat16
            t: [x.requires_grad_() for x in (value.to(t, copy=True), locations, weights)]
            for t in (torch.float32, torch.bfloat16)
        }
        grads = {t: grad.to(t) for t in inputs}
        contestants = {name: (f, torch.float32) for name, f in functions.items()}
        contestants["ours, bfloat16"] = (deform_attn, torch.bfloat16)

        def forward(f, dtype, shapes=shapes, inputs=inputs):
            with torch.no_grad():
                f(inputs[dtype][0], shapes, *inputs[dtype][1:])

        def both(f, dtype, shapes=shapes, inputs=inputs, grads=grads):
            out = f(inputs[dtype][0], shapes, *inputs[dtype][1:])
            torch.autograd.grad(out, inputs[dtype], grads[dtype])

        for kind, pass_ in {"forward": forward, "forward + backward": both}.items():
            calls = {name: (lambda f=f, t=t, run=pass_: run(f, t)) for name, (f, t) in contestants.items()}
            times = paired(calls, args.rounds, args.threads)
            ns = {name: round(statistics.median(t) / weights.numel() * 1e9, 1) for name, t in times.items()}
            others = {name: ratios(t, times["ours"]) for name, t in times.items() if name != "ours"}
            record(dict(bench="ops", case=case, kind=kind, rounds=args.rounds, ns_per_point=ns, ratio_to_ours=others))
            print(f"{case}, {kind}, {args.threads} thread(s): ours {ns['ours']} ns per point", flush=True)
            for name, (median, low, high) in others.items():
                print(f"    {name}: {ns[name]} ns, {median} times ours ({low} to {high})")
