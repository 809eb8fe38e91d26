"""Half an hour of pretraining under random SIGKILLs beside an undisturbed run: are the final weights the same?

    python -m bench.soak --minutes 30 --kills 50 --out runs/soak

Both runs are the same command with another --out, one process and one loader worker each. The disturbed one is killed
at random moments (while it imports, loads, trains, writes) and started again. The undisturbed one, alive all the time,
shows whether memory grows: MB/hour, a line through the second half of its samples. Ends with 1 if weights differ, fewer
kills were survived than asked for, or memory grew by more than GROWTH.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import runtime
import toyset

ROOT = Path(__file__).parents[1]
FLAGS = """--backbone resnet18 --backbone-weights random --hidden-dim 32 --enc-layers 1 --dec-layers 2 --num-queries 6
--num-regions 3 --region-target roi --resolution 64 --batch-size 4 --lr 1e-3 --workers 1 --log-every 1
--device cpu""".split()
HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc hands free memory back, so that it shows
GROWTH = 50.0  # MB, from the second quarter of the samples to the last; ours: allocators breathe


def start(out, photos, steps, save_every):
    flags = ["--data", str(photos), "--steps", str(steps), "--save-every", str(save_every), "--out", str(out), *FLAGS]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **HEAP}
    with open(f"{out}.console", "a") as console:
        command = [sys.executable, "pretrain.py", *flags]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=console, stderr=subprocess.STDOUT)


def last_step(out):
    """The newest step of a log, which a killed process may have left with half a line."""
    try:
        return max(
            (json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()[-3:-1]), default=0
        )
    except (OSError, ValueError, IndexError):
        return 0


def memory(pid):
    """MB of anonymous memory of a process and of its children, (main, workers); None once it has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [Path(f"/proc/{p}/status").read_text() for p in (pid, *children)]
        sizes = [int(text.split("RssAnon:")[1].split()[0]) / 1024 for text in found]
        return sizes[0], sum(sizes[1:])
    except (OSError, IndexError):
        return None


def slopes(samples):
    """[(seconds, main, workers)] -> MB/hour of the second half, MB grown from quarter two to the last, of both."""
    table = np.array(samples[len(samples) // 4 :])
    half, quarter = table[len(table) // 3 :], max(1, len(table) // 3)
    slope = [float(np.polyfit(half[:, 0], half[:, k], 1)[0] * 3600) for k in (1, 2)]
    grown = [float(np.median(table[-quarter:, k]) - np.median(table[:quarter, k])) for k in (1, 2)]
    return slope, grown


def same_weights(a, b):
    """Equal to the last bit: all tensors of the newest checkpoints, the optimiser's too."""
    first, second = (runtime.latest_checkpoint(out)[1] for out in (a, b))
    pairs = [(first[k], second[k]) for k in ("model", "pretext")]
    moments = [[state["optimizer"]["state"][i] for i in state["optimizer"]["state"]] for state in (first, second)]
    pairs += zip(*moments, strict=True)
    return first["step"] == second["step"] and all(torch.equal(x[k], y[k]) for x, y in pairs for k in x | y)


def soak(out, minutes, kills, seed):
    """Run both -> the report, a dict."""
    out, draw = Path(out).absolute(), random.Random(seed)
    out.mkdir(parents=True)  # an old soak would be a finished one
    photos = toyset.write_toy(out / "toy", unlabelled=60, train=1, val=1, size=96) / "unlabelled"
    began = time.monotonic()
    start(out / "trial", photos, 40, 40).wait()
    line = next(
        json.loads(row) for row in (out / "trial" / "log.jsonl").read_text().splitlines() if '"step": 40' in row
    )
    rate = line["images_per_s"] / 4 / 2  # steps a second, two runs side by side
    boot = max(1.0, time.monotonic() - began - 20 / rate)
    steps = max(20 * kills, int(rate * (60 * minutes - kills * boot) * 0.7), 100)
    save_every = max(1, steps // (6 * max(kills, 1)))
    print(f"{steps} steps, saved every {save_every}; {rate:.1f} steps/s, a start takes {boot:.0f} s", flush=True)

    began, samples, killed, at = time.monotonic(), [], [], 0.0
    calm = start(out / "calm", photos, steps, save_every)
    rough = start(out / "rough", photos, steps, save_every)
    while calm.poll() is None or rough.poll() is None:
        time.sleep(0.2)
        now = time.monotonic() - began
        sizes = memory(calm.pid)
        if sizes and sizes[1] and last_step(out / "calm"):  # it trains: libraries and workers are there
            samples.append((now, *sizes))
        if rough.poll() not in (None, 0):
            raise SystemExit(f"the disturbed run failed: {(out / 'rough.console').read_text()[-2000:]}")
        if not at and len(killed) < kills:  # spread the kills that are left over the steps that are left
            left = (steps - last_step(out / "rough")) / rate / (kills - len(killed) + 1)
            at = now + draw.uniform(0, boot + 1.5 * left)
        if at and now >= at and rough.poll() is None:
            rough.send_signal(signal.SIGKILL)
            rough.wait()
            killed.append(last_step(out / "rough"))
            at, rough = 0.0, start(out / "rough", photos, steps, save_every)
    if calm.poll() or rough.poll():
        raise SystemExit(f"a run failed: {out}/calm.console, {out}/rough.console")
    slope, grown = slopes(samples)
    return {"kills": len(killed), "same_weights": same_weights(out / "calm", out / "rough"), "steps": steps,
            "killed_at_steps": killed, "minutes": round((time.monotonic() - began) / 60, 1),
            "main_mb_per_hour": round(slope[0], 1), "workers_mb_per_hour": round(slope[1], 1),
            "main_mb_grown": round(grown[0], 1), "workers_mb_grown": round(grown[1], 1)}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="about; default 30")
    parser.add_argument("--kills", type=int, default=50, help="default 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="runs/soak", help="a new folder")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        parser.error(f"--out {args.out} exists: remove it or choose another folder")
    report = soak(args.out, args.minutes, args.kills, args.seed)
    (Path(args.out) / "soak.json").write_text(json.dumps(report))
    print(json.dumps(report))
    grew = max(report["main_mb_grown"], report["workers_mb_grown"]) > GROWTH
    good = report["same_weights"] and report["kills"] >= args.kills and not grew
    print(f"soak: {report['kills']} kills survived, weights {'the same' if report['same_weights'] else 'DIFFER'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
