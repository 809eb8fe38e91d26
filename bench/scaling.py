"""More processes, and what to expect of many: `python -m bench.speed scaling`, and the arithmetic of docs/scaling.md.

`python -m bench.scaling` prints that page's tables. Nothing is run for them: operations and bytes are counted on
tensors without data, at the paper's sizes. Operations are torch's own count, 2 for a multiply-add, of convolutions and
matrix products; sampling, norms and other elementwise work are left out, as usual.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import losses
import pretrain
import runtime
from bench import timing
from bench.training import photographs
from model import VARIANTS, Siamese, build_detector
from ops.deform_attn import has_kernel

VIEW, CROP, REGIONS = (384, 416), 128, 10  # the released code's mean padded view; Sec. 3.2
PHOTO, LARGEST = (800, 1066), (800, 1333)  # of fine-tuning: COCO's usual 480 x 640, and the limit
STEPS, BATCH = 300_000, 256  # released code
GPUS = 8
# assumptions
PEAK, SHARE = 989e12, 0.4  # dense bfloat16 of an H100 (its data sheet), and the share of it that is reached
JPEG = 110e3  # bytes of a mean ImageNet photograph
LINK = 50e9  # bytes/s between nodes and GPU: 400 Gb/s
TERMS = {"class": 1.0, "l1": 5.0, "giou": 2.0, "region": 5.0, "global": 10.0}


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps from forward to backward, each storage once, parameters left out."""

    def __init__(self, net):
        self.known = {t.untyped_storage()._cdata for t in net.state_dict(keep_vars=True).values()}
        self.storages = {}  # held, so that no number is given twice
        super().__init__(self.pack, lambda x: x)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, x):
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return x

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def pretraining(net, B, size=VIEW, crop=CROP):
    """Forward of a pretraining step on B photographs -> a scalar that depends on all that the losses read."""
    x, mask = torch.zeros(2 * B, 3, *size), torch.zeros(2 * B, *size, dtype=torch.bool)
    boxes = torch.full((2 * B, REGIONS, 4), 0.5)
    answer = net(x, mask, boxes, boxes, torch.zeros(2 * B * REGIONS, 3, crop, crop))
    matched = net.f_sem(answer.pred.q_hat[:, :, :REGIONS])
    return sum(t.float().sum() for t in (*answer.pred[:2], matched, answer.predicted_context))


def finetuning(net, B, size=PHOTO):
    pred = net(torch.zeros(B, 3, *size), torch.zeros(B, *size, dtype=torch.bool))
    return pred.logits.float().sum() + pred.boxes.float().sum()


FLASH = {  # attention without dropout is one kernel on a CPU, which FlopCounterMode does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v),
}  # fmt: skip


def arithmetic(variant, task, B=2, amp=False, **size):
    """What a step of `task` (pretraining or finetuning) on B images takes: a dict of numbers; FLOPs, kept per image.

    flops, kept: bytes of activations; trained: parameters; all_reduce: bytes of their gradients, checkpoint: bytes.
    """
    has_kernel("cpu")  # compiled and tested on real tensors
    with FakeTensorMode():
        net = build_detector(variant, 2 if task is pretraining else 91)
        net.freeze_backbone(task is pretraining)
        net = Siamese(net).train() if task is pretraining else net.train()
        stored = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in net.state_dict().values()}
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        with (
            FlopCounterMode(display=False, custom_mapping=FLASH) as counter,
            Kept(net) as kept,
            torch.autocast("cpu", enabled=amp),
        ):
            task(net, B, **size).backward()
        checkpoint = sum(stored.values()) + 2 * 4 * trained  # AdamW's two means
    return {"flops": counter.get_total_flops() / B, "kept": kept.bytes / B, "trained": trained,
            "all_reduce": 4 * trained, "checkpoint": checkpoint}  # fmt: skip


def rate(flops):
    """Images a second of an H100 under the assumptions."""
    return PEAK * SHARE / flops


def tables(variants, samples_per_core):
    """The page's tables as markdown lines."""
    pre = {v: arithmetic(v, pretraining) for v in variants}
    fine = {v: arithmetic(v, finetuning) for v in variants}
    work = [
        "variant",
        "pretraining, GFLOP an image",
        "fine-tuning, GFLOP an image",
        "parameters that pretraining trains",
    ]
    lines = header(*work, "all-reduce, MB a step", "pretraining checkpoint, MB")
    for v, p in pre.items():
        numbers = f"{p['flops'] / 1e9:.0f}", f"{fine[v]['flops'] / 1e9:.0f}", f"{p['trained'] / 1e6:.1f} M"
        lines.append(row(v, *numbers, f"{p['all_reduce'] / 1e6:.0f}", f"{p['checkpoint'] / 1e6:.0f}"))
    time = ["variant", "images/s a GPU", f"step of {BATCH // GPUS} images a GPU, ms", "all-reduce, ms"]
    lines += header(*time, f"{STEPS:,} steps on {GPUS} GPUs, hours", "read, MB/s a GPU", "loader cores a GPU")
    for v, p in pre.items():
        r = rate(p["flops"])
        numbers = f"{r:.0f}", f"{BATCH / GPUS / r * 1e3:.1f}", f"{2 * p['all_reduce'] / LINK * 1e3:.1f}"
        whole = f"{STEPS * BATCH / GPUS / r / 3600:.1f}"
        lines.append(row(v, *numbers, whole, f"{r * JPEG / 1e6:.0f}", f"{r / samples_per_core:.0f}"))
    large = {v: arithmetic(v, finetuning, size=LARGEST) for v in variants}
    sizes = [f"{h} x {w}" for h, w in (PHOTO, LARGEST)]
    whole = [f"4 of {size}, with weights, gradients and AdamW, GB" for size in sizes]
    lines += header("variant", "pretraining, GB an image", *(f"{size}, GB an image" for size in sizes), *whole)
    for v, p in pre.items():
        kept = fine[v]["kept"], large[v]["kept"]
        state = fine[v]["checkpoint"] + fine[v]["all_reduce"]
        numbers = p["kept"], *kept, *(4 * k + state for k in kept)
        lines.append(row(v, *(f"{n / 1e9:.2f}" for n in numbers)))
    return lines


def header(*names):
    return ["", row(*names), "|---" * len(names) + "|"]


def row(*cells):
    return f"| {' | '.join(cells)} |"


def measured_samples_per_core():
    """The newest figure of `bench.speed data` in the results file; ValueError without one."""
    entries = [json.loads(line) for line in open(timing.RESULTS)] if timing.RESULTS.exists() else []
    found = [entry for entry in entries if entry["bench"] == "data"]
    if not found:
        raise ValueError(f"{timing.RESULTS} has no figure of the loader: run bench.speed data, or --samples-per-core")
    return found[-1]["samples_per_s"]["ours"]


# ---------------------------------------------------------------------------------------------------------------------
# One process against two, on this machine
# ---------------------------------------------------------------------------------------------------------------------


def add_flags(command):
    command.add_argument("--variant", choices=VARIANTS, default="conditional")
    command.add_argument("--backbone", default="resnet50")
    command.add_argument("--batch-size", type=int, default=2, help="of each process (default 2)")
    command.add_argument("--size", type=int, nargs=2, default=(192, 208), metavar=("H", "W"), help="of a view")
    command.add_argument("--steps", type=int, default=3, help="that a launch times, after one to warm up (default 3)")


def scaling(args):
    """Samples per second of torchrun's 1 and 2 processes, launched in turn, and what DDP sends meanwhile."""
    settings = {k: getattr(args, k) for k in ("variant", "backbone", "batch_size", "size", "steps", "threads")}
    found = {1: [], 2: []}
    for r in range(args.rounds):
        for n in (1, 2) if r % 2 else (2, 1):
            found[n].append(launch(n, settings))
    one, two = found[1], found[2]
    rate = {n: round(statistics.median(n * args.batch_size / run["seconds"] for run in found[n]), 2) for n in found}
    # of a perfect doubling; by the processes' own CPU time, which other work on the machine disturbs less, as well
    efficiency = {
        clock: timing.ratios([a[clock] for a in one], [b[clock] for b in two]) for clock in ("seconds", "cpu")
    }
    sent = {k: two[-1][k] for k in ("buckets", "bytes", "overlap")}
    memory = round(statistics.median(run["per_image"] for run in one) / 1e6)
    case = f"{args.variant}, {args.backbone}, {args.batch_size} a process, {args.size[0]} x {args.size[1]}"
    timing.record(dict(bench="scaling", case=case, rounds=args.rounds, samples_per_s=rate, efficiency=efficiency,
                       mb_per_image=memory, **sent))  # fmt: skip
    print(f"{case}: {rate[1]} and {rate[2]} samples/s with 1 and 2 processes; efficiency by the clock "
          f"{efficiency['seconds'][0]}, by CPU time {efficiency['cpu'][0]}")  # fmt: skip
    print(f"all-reduce: {sent['bytes'] / 1e6:.1f} MB a step in {sent['buckets']} buckets, {sent['overlap']:.0%} of its "
          f"time during the backward pass; peak memory {memory} MB an image (from ru_maxrss)")  # fmt: skip


def launch(processes, settings):
    """torchrun with `processes` of `work` -> what its rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "bench.scaling", "--work", json.dumps(settings)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def work(variant, backbone, batch_size, size, steps, threads):
    """What one process does: pretrain.py's step on noise, `steps` times -> seconds and CPU seconds of one, rank means.

    buckets, bytes: of the gradients that DDP sends in a step; overlap: share of that time which the backward pass
    hides; per_image: bytes by which a step on twice the images raises the process's largest memory, an image.
    """
    run = runtime.setup("cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = Siamese(build_detector(variant, 2, backbone=backbone)).train()
    net.detector.fold_backbone()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True)
    model = DistributedDataParallel(net, broadcast_buffers=False) if run.world > 1 else net

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        terms, _ = losses.pretext_losses(net, model(*pretrain.inputs(batch)), batch)
        losses.weighted_sum(terms, TERMS).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    batch, double = photographs(batch_size, size), photographs(2 * batch_size, size)
    step(batch)
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step(batch)
    found = {"seconds": (time.perf_counter() - clock) / steps, "cpu": (time.process_time() - cpu) / steps}
    found = runtime.mean_over_ranks(found)
    if run.world > 1:
        log = model._get_ddp_logging_data()  # of DDP's own clocks
        sizes = [int(x) for x in (log.get("rebuilt_bucket_sizes") or log["bucket_sizes"]).split(",")]
        hidden, whole = log["avg_backward_compute_comm_overlap_time"], log["avg_backward_comm_time"]
        found |= {"buckets": len(sizes), "bytes": sum(sizes), "overlap": hidden / max(whole, 1)}
    before = peak()
    step(double)
    return found | {"per_image": (peak() - before) / batch_size, "rank": run.rank}


def peak():
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--samples-per-core", type=float, help="of the loader (default: what bench.speed data found)")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)  # of bench.speed scaling
    args = parser.parse_args(argv)
    if args.work:
        found = work(**args.work)
        print(json.dumps(found) if found["rank"] == 0 else "", flush=True)
        return runtime.close()
    print("\n".join(tables(args.variants, args.samples_per_core or measured_samples_per_core())))


if __name__ == "__main__":
    main()
