"""Nothing is ever lost: scripts killed, stopped, starved of disk, fed malicious files and bad numbers, then resumed.

A training here is a process of its own, forked from a server that has imported the libraries. `Hurt` says what happens
to it: at the count-th call of a function, on one rank, it is killed, asked to stop, or fails.
"""

import contextlib
import errno
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import convert
import losses
import pretrain
import proposals
import runtime
import toyset
from model import METHODS, build_detector

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torchvision", "torch.nn.parallel", "cv2", "scipy.optimize", "pycocotools.cocoeval",
                               "matplotlib.pyplot"])  # fmt: skip
SMALL = "--hidden-dim 32 --enc-layers 1 --dec-layers 2 --num-queries 6 --resolution 64 --log-every 1 --lr 1e-3 "
SMALL += "--backbone resnet18 --backbone-weights random --device cpu "
FLAGS = {  # accumulation in two, and epochs that end within a batch
    "pretrain": SMALL + "--data {photos} --num-regions 3 --region-target roi --steps 8 --save-every 3 --batch-size 8 ",
    "finetune": SMALL + "--train {toy}/train.json --val {toy}/val.json --epochs 3 --eval-every 2 --batch-size 4 "
    "--dropout 0.1 --lr-backbone 1e-4 ",
}
MICRO = {("pretrain", 1): 4, ("pretrain", 2): 2, ("finetune", 1): 2, ("finetune", 2): 1}
STEPS = 8  # of either


class Hurt(NamedTuple):
    name: str  # a key of PLACES
    count: int
    what: str  # a key of HOW, or "nan": that call's result
    rank: int = 0


def fail():
    raise ValueError("photo 7 is broken")


PLACES = {"backward": (torch.Tensor, "backward"), "rename": (os, "replace"), "loss": (losses, "weighted_sum")}
HOW = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
       "fail": fail}  # fmt: skip


def prepare_hurt(hurt):
    owner, name = PLACES[hurt.name]
    real, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        now = next(calls) == hurt.count
        if now and hurt.what != "nan":
            HOW[hurt.what]()
        result = real(*args, **kwargs)
        return result * torch.nan if now and hurt.what == "nan" else result

    setattr(owner, name, wrapped)


def prepare_exact(_):
    """One image size, float64, no dropped cues: what is left of a difference is the split of the work."""
    import views

    def double(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    make, read = pretrain.build_net, pretrain.inputs
    views.outer_rectangle = lambda width, height, g: (0, 0, width, height)
    views.draw_window = lambda w, h, *_: ((0, 0, w, h), (64, 64), False)
    pretrain.scaled = lambda recipe, resolution: ((64,), 64)
    METHODS["updetr"].drop = 0.0
    pretrain.build_net = lambda args, run, resumed: make(args, run, resumed).double()
    pretrain.inputs = lambda batch: tuple(double(value) for value in read(batch))
    type(build_detector("vanilla", 2, backbone="resnet18")).fold_backbone = lambda *_, **__: None
    losses.full_precision = double
    torch.Tensor.float = torch.Tensor.double  # positions, pooled maps, boxes


def prepare_keys(path):
    """Write down the key of each random stream that an item draws from, and of each step's dropout."""
    import views

    real, seed = views.stream, runtime.seed_step

    def note(*key):
        with open(f"{path}-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(json.dumps(key) + "\n")

    views.stream = lambda *key: (note("item", *key), real(*key))[1]
    runtime.seed_step = lambda *key: (seed(*key), note("dropout", torch.initial_seed()))


PREPARE = {"hurt": prepare_hurt, "exact": prepare_exact, "keys": prepare_keys}


def child(script, flags, console, env, prepare):
    os.environ.update(env)
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    for name, value in prepare:
        PREPARE[name](value)
    sys.exit(importlib.import_module(script).main(flags))


def run(script, flags, world=1, hurt=None, prepare=(), timeout=120):
    """Train in `world` processes -> (exit codes, what each wrote to the console); the flags end in --out FOLDER."""
    flags = flags.split() if isinstance(flags, str) else flags
    out = Path(flags[flags.index("--out") + 1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes, consoles = [], [out.with_name(f"{out.name}-console-{rank}") for rank in range(world)]
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        steps = [*prepare, *([("hurt", hurt)] if hurt and hurt.rank == rank else [])]
        arguments = script, flags, consoles[rank], {k: str(v) for k, v in env.items()}, steps
        processes.append(SERVER.Process(target=child, args=arguments))
    try:
        end = time.monotonic() + timeout
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"still running after {timeout} s"
        return codes, [console.read_text() for console in consoles]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """photos/: twenty pictures with something in them; toy/: a labelled set of odd sizes."""
    base = tmp_path_factory.mktemp("faults")
    (base / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        image = np.repeat(np.repeat(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), 16, 0), 16, 1)
        Image.fromarray(image).save(base / "photos" / f"{i:02}.png")
    toyset.write_toy(base / "toy", unlabelled=1, train=10, val=5, size=64)
    return base


def flags_of(script, base, out, world=1, more=""):
    flags = FLAGS[script].format(photos=base / "photos", toy=base / "toy")
    return f"{flags} --micro-batch {MICRO[script, world]} --workers 0 {more} --out {out}"


@pytest.fixture(scope="module")
def whole(base):
    """The folder of an undisturbed run, made once for each script and number of processes."""
    made = {}

    def folder(script, world):
        if (script, world) not in made:
            out = made[script, world] = base / f"whole-{script}-{world}"
            assert run(script, flags_of(script, base, out, world), world)[0] == [0] * world
        return made[script, world]

    return folder


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def flat(value, name=""):
    """{name: tensor or plain value} of nested dicts and lists."""
    rows = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if rows is None:
        return {name: value}
    return {k: v for key, inner in rows for k, v in flat(inner, f"{name}/{key}").items()}


def assert_same_run(a, b, step=STEPS):
    """Equal to the last bit: weights, optimiser state, best AP, and the curves in the log."""
    first, second = (flat(runtime.read_checkpoint(out / f"step-{step:08d}.pt")) for out in (a, b))
    ignored = [name for name in first if name.startswith("/settings/") and name.split("/")[2] in pretrain.RUN_ONLY]
    assert first.keys() == second.keys()
    for name in first.keys() - set(ignored):
        x, y = first[name], second[name]
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y, name
    curves = [[row for row in log(out) if {"loss", "AP"} & row.keys()] for out in (a, b)]
    assert [row | {"images_per_s": 0} for row in curves[0]] == [row | {"images_per_s": 0} for row in curves[1]]


# ---- exact resume


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("script", FLAGS)
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(base, whole, tmp_path, script, world, workers):
    out, last = tmp_path / "run", world - 1
    flags = flags_of(script, base, out, world, f"--workers {workers}")
    # in the second micro-batch of the second step: nothing is saved yet
    assert -signal.SIGKILL in run(script, flags, world, Hurt("backward", 4, "kill", last))[0]
    assert not list(out.glob("step-*.pt"))
    # one rank is told to stop within the fourth step, in the middle of an epoch
    codes, consoles = run(script, flags, world, Hurt("backward", 7, "term", last))
    assert codes == [runtime.STOPPED] * world and "stopped by a signal after step 4" in consoles[0]
    # while the next checkpoint is written, whole but for its name (before it the log)
    assert run(script, flags, world, Hurt("rename", 2, "kill"))[0][0] == -signal.SIGKILL
    assert len(list(out.glob(".step-*.new"))) == 1 and runtime.latest_checkpoint(out)[1]["step"] == 4
    assert -signal.SIGKILL in run(script, flags, world, Hurt("backward", 6, "kill", last))[0]
    assert run(script, flags, world)[0] == [0] * world
    assert not list(out.glob(".*"))
    assert_same_run(whole(script, world), out)
    codes, consoles = run(script, flags, world)
    assert codes == [0] * world and "finished" in consoles[0]
    codes, consoles = run(script, flags + " --seed 1", world)
    assert codes == [2] * world and "--seed was 0, is 1" in consoles[0]


@pytest.mark.slow
def test_workers_do_not_change_the_run(base, whole, tmp_path):
    assert run("pretrain", flags_of("pretrain", base, tmp_path / "run", 1, "--workers 2"))[0] == [0]
    assert_same_run(whole("pretrain", 1), tmp_path / "run")


DYING = """
import os, signal, sys, pretrain, runtime
seed_step = runtime.seed_step
def seed_or_die(seed, step, rank):
    if step == 5 and rank == 1 and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    seed_step(seed, step, rank)
runtime.seed_step = seed_or_die
sys.exit(pretrain.main())
"""


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_when_a_rank_is_killed(base, whole, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 dying.py".split()
    command = [sys.executable, *torchrun, *flags_of("pretrain", base, tmp_path / "run", 2).split()]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and (tmp_path / "died").exists(), done.stderr
    assert_same_run(whole("pretrain", 2), tmp_path / "run")


# ---- many processes


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [Hurt("backward", 5, "fail", 1), Hurt("backward", 5, "kill", 1)])
def test_a_rank_that_dies_takes_the_others_along_and_the_cause_is_on_the_console(base, tmp_path, hurt):
    began = time.monotonic()
    codes, consoles = run("pretrain", flags_of("pretrain", base, tmp_path / "run", 2, "--workers 2"), 2, hurt)
    assert time.monotonic() - began < 60
    assert "pretrain.py: process 0 of 2: lost the connection to another process" in consoles[0]
    if hurt.what == "kill":
        assert codes == [2, -signal.SIGKILL]
    else:
        assert codes == [2, 2] and "pretrain.py: process 1 of 2: photo 7 is broken" in consoles[1]
    assert not any("Traceback" in text for text in consoles)


@pytest.mark.slow
def test_ranks_that_see_different_folders_are_refused(base, whole, tmp_path):
    """As on two machines without a common file system: rank 1 would begin anew beside a rank 0 that goes on."""
    code = """
import os, runtime
run = runtime.setup("cpu")
try:
    runtime.latest_checkpoint("OUT" if run.rank else "WHOLE")
except ValueError as error:
    runtime.failed("test", error)
""".replace("OUT", str(tmp_path)).replace("WHOLE", str(whole("pretrain", 1)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                              cwd=ROOT, stderr=subprocess.PIPE, text=True) for r in range(2)]  # fmt: skip
    try:
        for rank, process in enumerate(ranks):
            text = process.communicate(timeout=120)[1]
            assert f"process {rank} of 2: " in text and "different checkpoints (step 8, none)" in text
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_ranks_draw_different_streams_and_together_those_of_one_process(base, tmp_path):
    keys = {}
    for world in (1, 2):
        flags = flags_of("pretrain", base, tmp_path / f"run{world}", world, "--save-every 100")
        assert run("pretrain", flags, world, prepare=[("keys", str(tmp_path / f"keys{world}"))])[0] == [0] * world
        for rank in range(world):
            lines = (tmp_path / f"keys{world}-{rank}").read_text().splitlines()
            keys[world, rank] = [tuple(json.loads(line)) for line in lines]
    one, first, second = ([key for key in keys[at] if key[0] == "item"] for at in ((1, 0), (2, 0), (2, 1)))
    assert len(second) == 4 * STEPS == len(set(second)) and not set(first) & set(second)
    assert set(one) == set(first) | set(second)  # rank 0 also asks the held-out photographs
    dropout = [{key for key in keys[2, rank] if key[0] == "dropout"} for rank in range(2)]
    assert len(dropout[0] | dropout[1]) == 2 * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_processes_and_accumulation_give_the_same_losses_and_gradients(base, tmp_path, method):
    """The norm of the gradient and all loss terms of four steps, in float64, to 1e-6."""
    curves = {}
    more = f"--method {method} --region-target crop --dropout 0 --steps 4 --save-every 100 --batch-size 8 "
    without = "--no-global" if method == "siamese" else ""  # the others have none
    for name, world, micro, extra in (("one", 1, 8, ""), ("two", 2, 4, ""), ("alone", 1, 8, without),
                                      ("split", 1, 2, without), ("both", 2, 2, without)):  # fmt: skip
        flags = flags_of("pretrain", base, tmp_path / name, world, f"{more} {extra} --micro-batch {micro}")
        codes, consoles = run("pretrain", flags, world, prepare=[("exact", None)])
        assert codes == [0] * world, consoles[0][-400:]
        curves[name] = [row for row in log(tmp_path / name) if "loss" in row]
    # batch norm of the global head spans the ranks, but one micro-batch
    for a, b in (("one", "two"), ("alone", "split"), ("alone", "both")):
        assert len(curves[a]) == len(curves[b]) == 4
        for x, y in zip(curves[a], curves[b], strict=True):
            for key in {"loss", "class", "l1", "giou", "region", "global", "grad_norm"} & x.keys():
                assert x[key] == pytest.approx(y[key], rel=1e-6), (a, b, x["step"], key)


@pytest.mark.slow
def test_evaluation_on_two_ranks_counts_each_image_once(base, whole, tmp_path):
    """Eleven images in batches of eight: the second rank has three."""
    toyset.write_toy(tmp_path / "toy", unlabelled=1, train=1, val=11, size=64)
    best, results, tables = whole("finetune", 1) / "best.pt", {}, {}
    for world in (1, 2):
        out = tmp_path / str(world)
        flags = f"--eval-only --init {best} --val {tmp_path}/toy/val.json --workers 0 --device cpu --out {out}"
        codes, consoles = run("finetune", flags, world)
        assert codes == [0] * world
        results[world] = json.loads((out / "detections.json").read_text())
        tables[world] = re.findall(r"^ *-?\d\.\d{3}\b.*$", consoles[0], re.M)  # the numbers, then a line a class
    assert results[1] == results[2] and tables[1] == tables[2] and len(tables[1]) >= 2
    assert {row["image_id"] for row in results[2]} == set(range(1, 12))
    counts = [sum(row["image_id"] == i for row in results[2]) for i in range(1, 12)]
    assert len(set(counts)) == 1  # each image has all of its queries' detections, none twice


# ---- a full disk


@pytest.mark.parametrize("script", FLAGS)
def test_full_disk_ends_the_run_with_the_old_checkpoint_intact(base, tmp_path, monkeypatch, capsys, script):
    out, real, syncs = tmp_path / "run", os.fsync, itertools.count()
    flags = flags_of(script, base, out, more={"pretrain": "--steps 6", "finetune": "--limit 4 --eval-every 9"}[script])
    saves = 2  # a save syncs the file and its folder

    def full(file):
        if next(syncs) >= saves:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert importlib.import_module(script).main(flags.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"{script}.py: ") and "No space left on device" in err and "older files are intact" in err
    path, state = runtime.latest_checkpoint(out)
    assert [path.name] == [p.name for p in out.glob("*step-*")] and state["step"] < 6
    assert importlib.import_module(script).main(flags.split()) == 0
    assert runtime.latest_checkpoint(out)[1]["step"] > state["step"]


# ---- malicious files


class Trap:
    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


FORMS = {
    "zip": lambda path: torch.save({"model": Trap()}, path),
    "legacy": lambda path: torch.save({"model": Trap()}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path: Path(path).write_bytes(pickle.dumps(Trap())),
    "numpy": lambda path: np.save(open(path, "wb"), np.array([Trap()], object), allow_pickle=True),
}


def cache_of(base, tmp_path):
    return proposals.write_cache(base / "photos", tmp_path / "cache", kind="random", max_boxes=4)


def trapped_cache(trap, base, tmp_path, name):
    cache_of(base, tmp_path)
    (tmp_path / "cache" / name).write_bytes(Path(trap).read_bytes())
    return "--proposals cache"


WAYS = {  # script and flags, from the path of the trap
    "pretrain --init": ("pretrain", lambda trap, *_: f"--init {trap}"),
    "pretrain --backbone-weights": ("pretrain", lambda trap, *_: f"--backbone-weights {trap}"),
    "pretrain --pseudo-classes": (
        "pretrain",
        lambda trap, base, tmp: f"--proposals {cache_of(base, tmp).path} --pseudo-classes {trap}",
    ),
    "pretrain resumed": ("pretrain", lambda trap, *_: "--out run"),
    "finetune --init": ("finetune", lambda trap, *_: f"--init {trap}"),
    "finetune --backbone-weights": ("finetune", lambda trap, *_: f"--backbone-weights {trap}"),
    "finetune resumed": ("finetune", lambda trap, *_: "--out run"),
    "finetune --eval-only": ("finetune", lambda trap, *_: f"--eval-only --init {trap}"),
    "finetune --predict": ("finetune", lambda trap, *_: f"--predict {trap} --init {trap}"),
    "proposals --cluster": ("proposals", lambda trap, *_: f"--cluster 2 --kind random --backbone-weights {trap}"),
    "convert": ("convert", lambda trap, *_: f"{trap} converted.pt"),
    "convert safetensors": ("convert", lambda trap, *_: f"{Path(trap).rename('trap.safetensors')} converted.pt"),
} | {
    f"cache's {name}": ("pretrain", lambda *args, name=name: trapped_cache(*args, name))
    for name in ("boxes.npy", "scores.npy", "offsets.npy", "sizes.npy", "plan.json", "meta.json", "list.json")
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_malicious_pickle_is_refused_unexecuted_whichever_way_it_comes(base, tmp_path, monkeypatch, capsys, way, form):
    monkeypatch.chdir(tmp_path)
    FORMS[form]("trap.pt")
    script, more = WAYS[way]
    more = more("trap.pt", base, tmp_path)
    Path("run").mkdir()
    if "resumed" in way:
        Path("run/step-00000001.pt").write_bytes(Path("trap.pt").read_bytes())
    if script in FLAGS:
        command = flags_of(script, base, "run", more=more)
    else:
        command = {"convert": more, "proposals": f"{base}/photos boxes --max-boxes 4 --workers 1 {more}"}[script]
    with contextlib.ExitStack() as stack:
        if script in ("convert", "proposals"):
            caught = stack.enter_context(pytest.raises(SystemExit))
            importlib.import_module(script).main(command.split())
    if script in FLAGS:
        assert importlib.import_module(script).main(command.split()) == 2
    error = str(caught.value.code) if script == "convert" else capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith(f"{script}.py: ") and ("trap" in last or "step-00000001.pt" in last or "cache" in last)
    assert not any(path.name == "EXECUTED" for path in tmp_path.rglob("*"))
    assert not Path("converted.pt").exists()


def test_the_trap_works(tmp_path, monkeypatch):
    """Otherwise the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    FORMS["zip"]("trap.pt")
    torch.load("trap.pt", weights_only=False)
    assert Path("EXECUTED").is_dir()


def test_official_checkpoint_with_a_namespace_loads(tmp_path):
    import argparse

    detector = build_detector("vanilla", 4, backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=1)
    saved = {"model": detector.state_dict(), "args": argparse.Namespace(lr=1e-4, out=["a"]), "epoch": 3}
    torch.save(saved, tmp_path / "official.pth")
    assert convert.read_native(tmp_path / "official.pth")[0] == "official"


# ---- numbers


def test_gradient_that_is_not_finite_stops_pretraining_with_all_that_explains_it(base, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "run", itertools.count(1)
    real = losses.weighted_sum
    flags = flags_of("pretrain", base, out).split()
    with monkeypatch.context() as patch:  # the second micro-batch of the fifth step
        patch.setattr(losses, "weighted_sum", lambda *args: real(*args) * (torch.nan if next(calls) == 10 else 1))
        assert pretrain.main(flags) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "step 4: the gradient is not finite" in err and "not-finite-00000004.pt" in err
    line = log(out)[-1]
    assert line["step"] == 4 and line["lr"] == 1e-3 and line["loss"] == "nan" and line["l1"] > 0
    sampler = runtime.StepSampler(18, 8, 4, 0, 1, 0, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert line["images"] == [f"{sorted(order[2:])[i]:02}.png" for batch in sampler for _, i in batch]
    state = runtime.read_checkpoint(out / "not-finite-00000004.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())  # weights before the step
    path, last = runtime.latest_checkpoint(out)
    assert path.name == "step-00000003.pt" and pretrain.main(flags) == 0  # cured, it goes on from the last checkpoint


def test_gradient_that_is_not_finite_stops_fine_tuning_as_well(base, tmp_path, monkeypatch, capsys):
    out, calls, real = tmp_path / "run", itertools.count(1), losses.class_loss
    nan = lambda *args, **kw: real(*args, **kw) * (torch.nan if next(calls) == 2 else 1)  # noqa: E731
    monkeypatch.setattr(losses, "class_loss", nan)
    assert importlib.import_module("finetune").main(flags_of("finetune", base, out).split()) == 2
    assert "step 0: the gradient is not finite" in capsys.readouterr().err
    line, state = log(out)[-1], runtime.read_checkpoint(out / "not-finite-00000000.pt")
    assert line["loss"] == line["class"] == "nan" and line["l1"] > 0 and line["lr"] == 1e-3
    assert len(set(line["images"])) == 4 and all((base / "toy" / name).is_file() for name in line["images"])
    assert state["step"] == 0 and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.slow
def test_gradient_that_is_not_finite_on_one_rank_lists_the_images_of_all(base, tmp_path):
    out = tmp_path / "run"
    codes, consoles = run("pretrain", flags_of("pretrain", base, out, 2), 2, Hurt("loss", 9, "nan", 1))
    assert codes == [2, 2] and all("step 4: the gradient is not finite" in text for text in consoles)
    line = log(out)[-1]
    assert line["loss"] == "nan" and len(line["images"]) == 8 and (out / "not-finite-00000004.pt").exists()


# ---- for long


@pytest.mark.slow
def test_soak_of_a_minute_survives_its_kills(tmp_path):
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.5", "--kills", "3", "--out", str(tmp_path / "soak")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    report = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert done.returncode == 0 and report["same_weights"] and report["kills"] == 3, done.stdout + done.stderr
