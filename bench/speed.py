"""How fast the parts are, against what else does the same work: `python -m bench.speed ops`.

Every figure is a ratio of two times taken in turn in one process, round after round, because the machine's speed
drifts: the median over the rounds is given, and the smallest and largest. Every result is appended to
bench/results/speed.jsonl with the commit and the machine. One thread is timed in the process's own CPU time, which
other processes on the machine disturb less; more threads by the clock.

`ops` compares deform_attn with the grid_sample reference and with the PyPI package torch-ms-deform-attn, if installed:
pip install --no-deps --target FOLDER torch-ms-deform-attn==0.1.1, and PYTHONPATH=FOLDER before the command.
"""

import argparse
import importlib
import json
import math
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from ops import deform_attn
from ops.deform_attn import reference

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
COCO = [(100, 167), (50, 84), (25, 42), (13, 21)]
CASES = {  # images, levels, queries (None: one at every cell), where they look
    "pretraining encoder": (4, [(48, 52), (24, 26), (12, 13), (6, 7)], None, "near"),
    "COCO encoder": (2, COCO, None, "near"),
    "COCO decoder": (2, COCO, 300, "near"),
    "COCO encoder, uniform": (2, COCO, None, "uniform"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in {"ops": ops}.items():
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        command.add_argument("--rounds", type=int, default=5, help="times that every contestant runs")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--only", nargs="*", help="cases to run, by the start of their names")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.run(args)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def paired(contestants, rounds, threads):
    """{name: [seconds per round]}; every round runs every contestant once, the order turned round each time."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for name in list(contestants)[:: 1 if r % 2 else -1]:
            start = clock()
            contestants[name]()
            if r:  # the first round warms up
                times[name].append(clock() - start)
    return times


def ratios(slow, fast):
    """[median, smallest, largest] of the rounds' ratios slow / fast."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return [round(x, 2) for x in (statistics.median(each), min(each), max(each))]


def record(entry):
    """Prints a result and appends it, with where and when it was taken, to the results file."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    where = dict(commit=commit.stdout.strip(), cpu=cpu[0] if cpu else platform.processor(), torch=torch.__version__)
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(
            json.dumps({**entry, **where, "threads": torch.get_num_threads(), "date": time.strftime("%F")}) + "\n"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Deformable attention
# ---------------------------------------------------------------------------------------------------------------------


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
        print("peer left out: torch-ms-deform-attn is not installed (see the top of bench/speed.py)")
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


if __name__ == "__main__":
    main()
