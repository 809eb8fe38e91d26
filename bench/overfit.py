"""Every detector, from scratch and after a few Siamese pretraining steps, must learn eight scenes by heart.

    make overfit         # or: python -m bench.overfit --out runs/overfit [--variants dab dn] [--arms scratch]

A detector that cannot reach AP50 > 0.9 on eight images it trains on has a bug, whatever its loss does. Runs the
project's own scripts in this process, prolonging each run until it gets there, and prints the steps it took. The same
command goes on. `toyset.write_toy` draws the scenes; the small configuration is one for all, but where noted.
"""

import argparse
import shlex
import sys
from pathlib import Path

import finetune
import plots
import pretrain
import toyset
from model import VARIANTS

ARMS, SCENES, GOAL, EVERY, MOST = ("scratch", "siamese"), 8, 0.9, 25, 2000  # steps between evaluations, at most
MODEL = "--backbone mobilenet_v2 --backbone-weights auto --hidden-dim 128 --enc-layers 1 --dec-layers 2 "
MODEL += "--num-queries 30 --dropout 0 "
PRETRAIN = "--recipe coco --steps 50 --drop-step 50 --batch-size 8 --lr 5e-4 --region-target roi --resolution 128 "
FINETUNE = f"--overfit {SCENES} --batch-size {SCENES} --drop-epoch {MOST} --lr 5e-4 --lr-backbone 0 --resolution 192 "
RUN = "--workers 0 --device cpu --seed 0 --log-every 5 "


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/overfit", help="folder for everything (default runs/overfit)")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    p.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    args = p.parse_args(argv)
    out = Path(args.out)
    toy = toyset.write_toy(out / "toy", unlabelled=64, train=SCENES, val=1)
    rows = {(variant, arm): overfit(variant, arm, toy, out) for variant in args.variants for arm in args.arms}
    print(f"{'variant':15}{'start':10}{'best AP50':>10}{'AP then':>9}{'steps to > ' + str(GOAL):>16}")
    for (variant, arm), points in rows.items():
        best = max(points, key=lambda row: row["AP50"])
        reached = best["step"] if best["AP50"] > GOAL else "not reached"  # a run ends where it gets there
        print(f"{variant:15}{arm:10}{best['AP50']:10.3f}{best['AP']:9.3f}{reached:>16}")
    return 0 if all(points[-1]["AP50"] > GOAL for points in rows.values()) else 1


def overfit(variant, arm, toy, out):
    """Train one detector in stretches of EVERY steps until it knows the scenes -> its evaluations, rows of the log."""
    model = f"--variant {variant} {MODEL}" + ("--stride 16 " if variant != "deformable-ms" else "")  # that reads 8 - 64
    folder, start = out / f"{variant}-{arm}", model.split()
    if arm == "siamese":
        pre = out / f"{variant}-pretrain"
        run(pretrain, "--data", toy / "unlabelled", "--out", pre, *f"{model} {PRETRAIN} {RUN}".split())
        start = ["--init", max(pre.glob("step-*.pt")), "--dropout", 0]
    for epochs in range(EVERY, MOST + 1, EVERY):  # an epoch is one step
        run(finetune, "--train", toy / "train.json", "--out", folder, "--epochs", epochs, "--eval-every", EVERY,
            "--save-every", EVERY, *start, *f"{FINETUNE} {RUN}".split())  # fmt: skip
        points = [row for row in plots.read_log(folder) if "AP50" in row]
        if points[-1]["AP50"] > GOAL:
            return points
    return points


def run(script, *words):
    words = [str(word) for word in words]
    if code := script.main(words):
        sys.exit(f"overfit: {script.__name__}.py {shlex.join(words)} ended with code {code}")


if __name__ == "__main__":
    sys.exit(main())
