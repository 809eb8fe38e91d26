"""How fast the parts are, against what else does the same work: `python -m bench.speed ops` (or `step`).

Every figure is a ratio of two times taken in turn in one process, round after round, because the machine's speed
drifts: the median over the rounds is given, and the smallest and largest. Every result is appended to
bench/results/speed.jsonl with the commit and the machine. One thread is timed in the process's own CPU time, which
other processes on the machine disturb less; more threads by the clock.

`ops` compares deform_attn with the grid_sample reference and with the PyPI package torch-ms-deform-attn, if installed:
pip install --no-deps --target FOLDER torch-ms-deform-attn==0.1.1, and PYTHONPATH=FOLDER before the command.
`step` compares the pretraining step with the same step under the released code's habits (bench/released.py).
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

import losses
import pretrain
from bench.released import pretext_terms
from model import VARIANTS, Siamese, build_detector
from ops import deform_attn
from ops.deform_attn import reference
from views import ViewBatch

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
    for name, function in {"ops": ops, "step": step}.items():
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        command.add_argument("--rounds", type=int, default=5, help="times that every contestant runs")
        command.add_argument("--threads", type=int, default=1)
        if name == "step":
            command.add_argument("--variant", choices=VARIANTS, default="conditional")
            command.add_argument("--batch-size", type=int, default=2)
            command.add_argument("--size", type=int, nargs=2, default=(384, 416), metavar=("H", "W"), help="of a view")
            continue
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


# ---------------------------------------------------------------------------------------------------------------------
# The pretraining step
# ---------------------------------------------------------------------------------------------------------------------


def photographs(B, size, R=10):
    """A ViewBatch of B pairs of noise, (h, w) each, with R regions and their 128 x 128 crops."""
    g, (h, w) = torch.Generator().manual_seed(0), size
    corners = 0.3 + 0.4 * torch.rand(2, B, R, 2, generator=g), 0.1 + 0.4 * torch.rand(2, B, R, 2, generator=g)
    boxes, valid = torch.cat(corners, -1), torch.ones(2, B, R, dtype=torch.bool)
    x = torch.randint(0, 256, (2, B, 3, h, w), generator=g, dtype=torch.uint8)
    crops = torch.randint(0, 256, (2, B, R, 3, 128, 128), generator=g, dtype=torch.uint8)
    mask = torch.zeros(2, B, h, w, dtype=torch.bool)
    return ViewBatch(x, mask, boxes, boxes, valid, crops, torch.arange(B), torch.zeros(B, dtype=torch.bool))


def step(args):
    """Seconds of a whole step: forward, losses, backward, clipping, AdamW; ours against the released habits."""
    weights = {"class": 1.0, "l1": 5.0, "giou": 2.0, "region": 5.0, "global": 10.0}
    batch = photographs(args.batch_size, args.size)

    def contestant(terms, amp, fused):
        torch.manual_seed(0)
        net = Siamese(build_detector(args.variant)).train()
        if fused:
            net.detector.fold_backbone(torch.bfloat16 if amp else torch.float32)
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=fused or None)

        def run():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                found = terms(net, batch)
            losses.weighted_sum(found, weights).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()

        return run

    def ours(net, batch):
        return losses.pretext_losses(net, net(*pretrain.inputs(batch)), batch)[0]

    contestants = {"ours": contestant(ours, False, True), "released": contestant(pretext_terms, False, False),
                   "ours, bfloat16": contestant(ours, True, True),
                   "released, autocast": contestant(pretext_terms, True, False)}  # fmt: skip
    times = paired(contestants, args.rounds, args.threads)
    pairs = (("released", "ours"), ("released", "ours, bfloat16"), ("released, autocast", "ours, bfloat16"))
    faster = {f"{slow} / {fast}": ratios(times[slow], times[fast]) for slow, fast in pairs}
    case = f"{args.variant}, batch {args.batch_size}, {args.size[0]} x {args.size[1]}"
    print(f"{case}: " + "; ".join(f"{name} {r[0]} ({r[1]} to {r[2]})" for name, r in faster.items()))
    record({"bench": "step", "case": case, "ratios": faster})


if __name__ == "__main__":
    main()
