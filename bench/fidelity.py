"""How close the fast path of pretraining comes to plain float32: `python -m bench.fidelity --data PHOTOS`.

The features of regions (Eq. 4) and crops (Eq. 5) by the folded backbone, in float32 and in bfloat16, against those of
the backbone as it is: cosines over all regions of --images photographs. Then two runs of pretrain.py with one seed,
with and without --amp, and their loss curves in one picture (R-O, the demo's model). Trained weights matter: random
ones say nothing.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import plots
import pretrain
import runtime
from bench import demo
from bench.timing import record

TERMS = ["loss", "class", "l1", "giou", "region", "global"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, list file or COCO json of photographs")
    parser.add_argument("--proposals", default="random", help="cache of proposals.py (default: random boxes)")
    parser.add_argument("--backbone", default="mobilenet_v2", help="default: %(default)s, whose weights are installed")
    parser.add_argument("--backbone-weights", default="auto", help="a file, as for pretrain.py")
    parser.add_argument("--images", type=int, default=64, help="photographs whose features are compared")
    parser.add_argument("--steps", type=int, default=200, help="of either run")
    parser.add_argument("--out", default="runs/bf16", help="a new folder")
    args = parser.parse_args(argv)
    data = ["--data", args.data, "--proposals", args.proposals, "--backbone", args.backbone,
            "--backbone-weights", args.backbone_weights]  # fmt: skip
    found = {"cosines": cosines([*data, "--out", args.out], args.images), **curves(data, args.steps, Path(args.out))}
    print(json.dumps(found, indent=1))
    record({"bench": "fidelity", "backbone": args.backbone, "images": args.images, "steps": args.steps, **found})


@torch.no_grad()
def cosines(flags, count):
    """{features, precision: [mean, 1st percentile, least]} over the regions of `count` photographs, both views."""
    args, run = pretrain.parse_args([*flags, "--centre-features"]), runtime.Run(torch.device("cpu"), 0, 1)
    train, _ = pretrain.build_data(args, run)
    net = pretrain.build_net(args, run)
    net.detector.backbone.eval()
    batches = [pretrain.collate_views([train[0, i], train[0, i + 1]]) for i in range(0, min(count, len(train)) - 1, 2)]

    def features(dtype):
        net.detector.fast_backbone = None
        if dtype:
            net.detector.fold_backbone(dtype)
        strides, found = {*net.detector.strides, *net.region_strides}, {"regions": [], "crops": []}
        for batch in batches:
            x, mask, rois, _, crops, _ = pretrain.inputs(batch)
            found["regions"].append(net.region_features(net.detector.features(x, strides), rois, mask).flatten(0, 1))
            found["crops"].append(net.crop_features(crops, len(mask)).flatten(0, 1))
        return {kind: torch.cat(rows) for kind, rows in found.items()}

    plain, table = features(None), {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind, rows in features(dtype).items():
            mean = plain[kind].mean(0)  # that all regions share: without it a cosine tells more
            for name, origin in (("", 0), (", centred", mean)):
                cosine = F.cosine_similarity(rows - origin, plain[kind] - origin, dim=-1)
                numbers = cosine.mean(), cosine.quantile(0.01), cosine.min()
                table[f"{kind}, {str(dtype)[6:]}{name}"] = [round(x.item(), 5) for x in numbers]
    return table


def curves(data, steps, out):
    """Mean of each loss term over the last half of both runs; draws them all."""
    flags = [*demo.MODEL, *demo.PRETRAIN, *data, "--steps", steps, "--save-every", steps, "--log-every", 10]
    runs = {"float32": flags, "bfloat16": [*flags, "--amp"]}
    for name, words in runs.items():
        demo.run("pretrain.py", *words, "--out", out / name)
    plots.save_curves(out / "bf16.png", {name: out / name for name in runs}, TERMS)
    ends = {}
    for name in runs:
        rows = [row for row in plots.read_log(out / name) if "loss" in row and row["step"] > steps / 2]
        ends[name] = {term: round(sum(row[term] for row in rows) / len(rows), 4) for term in TERMS}
    return ends


if __name__ == "__main__":
    main()
