"""What a run of days needs around its loop: processes, random streams, sample order, checkpoints, the log, signals.

Read it in that order; nothing here stands in the paper or knows boxes, views or models. `step` counts optimiser steps
done: step-00001000.pt holds the weights after 1000 of them, and a run resumed from it starts at 1000. A file that is
read back is replaced as a whole: a kill at any moment leaves the old one or the new one, never half of either.
"""

import atexit
import fcntl
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

PATIENCE = timedelta(minutes=30)  # PyTorch's own for gloo: rank 0 alone makes a report, the others wait
STOPPED = 75  # exit code after a signal, state saved: EX_TEMPFAIL of sysexits.h, "try again later"


class Run(NamedTuple):
    device: torch.device
    rank: int
    world: int


def setup(device_flag="auto", amp=False):
    """Join the processes torchrun started, or be the only one -> Run; ValueError if the device or group is missing.

    amp: the run wants bfloat16; a warning says so where that is slower than float32.
    """
    if device_flag not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device_flag}: not auto, cpu or cuda (choose a GPU by CUDA_VISIBLE_DEVICES)")
    if device_flag == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if device_flag != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world > 1:  # gloo also beside nccl: numbers of the host are summed without a wait for the device
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            common = {"store": _store_of_this_attempt(rank), "rank": rank, "world_size": world}
            dist.init_process_group(backend, timeout=PATIENCE, **common)
            warnings.filterwarnings("ignore", "Grad strides do not match")  # --amp's 1 x 1 convolutions
    except (RuntimeError, ValueError) as error:
        process = f"process {rank} of {world} on {device}"
        raise ValueError(f"{process}: {sentence(error)}; start by torchrun, a GPU each") from error
    if amp and rank == 0 and not bfloat16_pays(device):
        tqdm.write("warning: this machine has no bfloat16 instructions, --amp is many times slower than without")
    return Run(device, rank, world)


def bfloat16_pays(device):
    """Whether `device` computes in bfloat16 itself; others emulate it at many times the cost."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()  # oneDNN says yes to it
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def _store_of_this_attempt(rank):
    """Where the processes leave their addresses for each other: a store that began with this start of torchrun's.

    torchrun keeps one store over all its restarts (torch 2.14), in which gloo finds the addresses of processes that are
    dead. Its count of restarts is no way to tell them apart, since nodes count their own. So rank 0 opens another store
    and leaves the port in torchrun's; a port left by a dead rank 0 refuses the connection, and is read again.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not set beside WORLD_SIZE")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # not torchrun's: rank 0 opens the store itself
        return dist.TCPStore(host, port, is_master=rank == 0, timeout=PATIENCE, wait_for_workers=False)
    shared = dist.TCPStore(host, port, timeout=PATIENCE)
    if rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, timeout=PATIENCE, wait_for_workers=False)
        shared.set("port of rank 0", str(own.port))
        return own
    end = time.monotonic() + PATIENCE.total_seconds()
    while True:
        port = int(shared.get("port of rank 0"))
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, timeout=PATIENCE)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def close():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def failed(script, error):
    """Say on stderr, in one sentence with the rank, why a run ends -> exit code 2; a RuntimeError of our own is raised.

    A process that dies closes its connections, so that the others' next sum over ranks fails within seconds.
    """
    rank, world = _place()
    cause = sentence(error)
    if isinstance(error, RuntimeError):
        if world == 1 or not (isinstance(error, dist.DistError) or "gloo" in cause):
            raise error
        cause = f"lost the connection to another process, whose own message tells why ({cause})"
    print(f"{script}: {f'process {rank} of {world}: ' if world > 1 else ''}{cause}", file=sys.stderr, flush=True)
    return 2


def _place():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x):
    """x of any shape -> its sum over all processes, without gradient; x itself stays as it was."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_over_ranks(values):
    """{name: scalar tensor or number}, same names everywhere -> {name: float}; one all-reduce, one copy to the host."""
    device = next((v.device for v in values.values() if torch.is_tensor(v)), "cpu")
    x = torch.stack([torch.as_tensor(v, device=device).detach().double() for v in values.values()])
    return dict(zip(values, (sum_over_ranks(x) / _place()[1]).tolist(), strict=True))


def gather_rows(x):
    """x (n of this rank, ...) -> all ranks' rows in rank order (sum of n, ...), no gradient; n may differ or be 0."""
    rank, world = _place()
    counts = torch.zeros(world, dtype=torch.long, device=x.device)
    counts[rank] = len(x)
    counts = sum_over_ranks(counts).tolist()
    rows = x.new_zeros(sum(counts), *x.shape[1:])
    rows[sum(counts[:rank]) : sum(counts[: rank + 1])] = x.detach()
    return sum_over_ranks(rows)


def _seed(use, *key):
    # `spawn_key` keeps the uses apart: SeedSequence pads keys with zeros, so (7, 3) and (7, 3, 0) alone give one stream
    return int(np.random.SeedSequence(key, spawn_key=(use,)).generate_state(1, np.uint64)[0])


def seed_step(seed, step, rank):
    """Make dropout a function of (seed, step, rank), so that a resumed run needs no stored generator state."""
    torch.manual_seed(_seed(1, seed, step, rank))


@lru_cache(maxsize=2)
def _order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(_seed(0, seed, epoch)))


class StepSampler:
    """Batch sampler: this rank's micro-batches from step `start` to step `steps`, as lists of (epoch, index).

    The permutations of all epochs, each a function of (seed, epoch), form one endless list. Step s takes its positions
    s*batch_size ... (s+1)*batch_size-1 in `accumulate` micro-steps of world*micro_batch neighbours each, so that
    statistics over ranks do not depend on how many ranks there are.
    """

    def __init__(self, n, batch_size, micro_batch, rank, world, seed, start, steps):
        micro_batch = micro_batch or max(batch_size // world, 1)
        together = world * micro_batch
        if n < 1 or batch_size < 1 or micro_batch < 1 or batch_size % together:
            numbers = f"{n} images, --batch-size {batch_size}, {world} processes, micro-batches of {micro_batch}"
            raise ValueError(f"{numbers}: needs images, and a batch size divisible by {together}")
        self.n, self.seed, self.micro_batch, self.accumulate = n, seed, micro_batch, batch_size // together
        self.positions = range(start * batch_size + rank * micro_batch, steps * batch_size, together)

    def __len__(self):
        return len(self.positions)

    def __iter__(self):
        for first in self.positions:
            places = [divmod(p, self.n) for p in range(first, first + self.micro_batch)]
            yield [(epoch, int(_order(self.n, self.seed, epoch)[i])) for epoch, i in places]


def each_once(n, batch_size, rank, world):
    """This rank's batches of (0, index) for evaluation: over all ranks every index appears exactly once."""
    starts = range(rank * batch_size, n, world * batch_size)
    return [[(0, i) for i in range(s, min(s + batch_size, n))] for s in starts]


def make_loader(dataset, batches, collate, workers, device):
    """DataLoader over lists of keys (StepSampler, each_once): single-threaded workers, pinned memory for a GPU."""
    start = {"persistent_workers": True, "worker_init_fn": partial(_start_worker, _leaving())} if workers else {}
    pin = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin, **start)


@lru_cache
def _leaving():
    """A number that all workers see, 1 once the main process ends; one for all loaders, as each holds a file open."""
    flag = torch.zeros(1).share_memory_()
    atexit.register(flag.fill_, 1)
    return flag


def _start_worker(leaving, _):
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    # Schedulers signal all processes at once, but the main one needs the data of its last step: a worker ends when the
    # loader says so, and on SIGTERM only if the main process is leaving, which then waits for its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: leaving.item() and os._exit(0))


def save_checkpoint(out, step, state, keep_every=None):
    """Write out/step-NNNNNNNN.pt on rank 0 and keep the newest two, plus the multiples of `keep_every` -> its path."""
    path = Path(out) / f"step-{step:08d}.pt"
    if _place()[0] == 0:
        for left in Path(out).glob(".step-*.pt.new"):  # by a process that was killed while writing
            left.unlink()
        write_checkpoint(path, state)
        found = _checkpoints(out)
        for s in [s for s in found if s <= step][:-2]:
            if not keep_every or s % keep_every:
                found[s].unlink()
        for s in [s for s in found if s > step]:  # a run is behind such a file only if it could not read it
            found[s].rename(f"{found[s]}.torn")
    return path


def write_checkpoint(path, state):
    """Replace `path` by `state`, tensors and plain values, read back first; OSError on a full disk, no file harmed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        read_checkpoint(new)
        os.replace(new, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name, too, survives a power cut
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch turns the OSError of a full disk into a RuntimeError about offsets
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: not written ({reason}), older files are intact; make room and start again") from error
    finally:
        new.unlink(missing_ok=True)


def read_checkpoint(path, map_location="cpu"):
    """Load a checkpoint, executing nothing in it; ValueError for one that is torn, altered or holds other objects."""
    with open(path, "rb") as f:
        try:
            archive = zipfile.ZipFile(f)
            if sum(entry.file_size for entry in archive.infolist()) > os.fstat(f.fileno()).st_size:
                raise ValueError("unpacks to more than its own size")
            if archive.testzip():  # PyTorch reads without comparing checksums: a flipped bit would become a weight
                raise ValueError("checksum differs")
            f.seek(0)
            return torch.load(f, map_location=map_location, weights_only=True)
        except Exception as error:  # which type it is depends on the damage
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            why = f"asks to run {asked[1]}, which was refused" if asked else sentence(error)
            raise ValueError(f"{path}: not a whole checkpoint of tensors and plain values ({why})") from error


def latest_checkpoint(out, flag=None, map_location="cpu"):
    """Newest readable step-*.pt -> (path, state), or None without any; torn ones are passed over with one warning.

    All processes call it. Raises ValueError when none is readable, when they do not all see the same file, or when its
    settings lack `flag`, which all runs of the calling script have.
    """
    found = _newest_readable(out, map_location)
    rank, world = _place()
    steps = gather_rows(torch.tensor([int(found[0].stem[5:]) if found else -1])).tolist()
    if steps != steps[:1] * world:
        seen = ", ".join("none" if step < 0 else f"step {step}" for step in steps)
        raise ValueError(f"{out}: the processes see different checkpoints ({seen}): put --out where all can read it")
    if found and flag and flag not in found[1]["settings"]:
        raise ValueError(f"{out} holds the run of another script, without --{flag}: choose another --out")
    return found


def _newest_readable(out, map_location):
    torn = ""
    for path in reversed(_checkpoints(out).values()):
        try:
            state = read_checkpoint(path, map_location)
        except ValueError as error:
            torn += f"{error}; "
        else:
            if torn and _place()[0] == 0:
                tqdm.write(f"warning: {torn}continuing from {path.name}")
            return path, state
    if torn:
        raise ValueError(f"{torn}no readable checkpoint is left, choose another --out to begin again")


def _checkpoints(out):
    return {int(path.stem[5:]): path for path in sorted(Path(out).glob(f"step-{'[0-9]' * 8}.pt"))}


def stop_not_finite(out, log, step, state, lr, terms, images):
    """End a run whose gradient is not finite: a line in the log and out/not-finite-NNNNNNNN.pt, then a ValueError.

    state: what a checkpoint holds, before this step; terms: {name: this rank's loss}; images: paths of the whole batch.
    The file is for inspection: a run does not resume from it, but from its last checkpoint.
    """
    path = Path(out) / f"not-finite-{step:08d}.pt"
    log.write(step=step, stopped="gradient not finite", lr=lr, **mean_over_ranks(terms), images=images)
    if _place()[0] == 0:
        write_checkpoint(path, state)
    where = f"{log.path or Path(out) / 'log.jsonl'} names loss terms and images, {path.name} has the weights"
    raise ValueError(f"step {step}: the gradient is not finite ({where}); lower --lr, or train without --amp")


def claim(path, text):
    """The open file `path`, locked until it is closed or the process ends; ValueError if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process is writing {text}") from error
    return lock


class Log:
    """One JSON object a line in out/log.jsonl, and the same to read on stdout; silent on every rank but 0.

    `step` is where the run resumes: what an interrupted run logged beyond it is dropped, so that each step stands there
    once. Step 0 begins a new file. ValueError where another process has a Log in that folder.
    """

    def __init__(self, out, rank, step=0):
        self.path = Path(out) / "log.jsonl" if rank == 0 else None
        if self.path:
            self.lock = claim(self.path.with_name("lock"), f"{out}: wait for its end, or give another --out")
            lines = self.path.read_text("utf-8").splitlines() if step and self.path.exists() else []
            new = self.path.with_name(".log.jsonl.new")
            new.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), "utf-8")
            os.replace(new, self.path)

    def write(self, **values):
        """Append a line of numbers, strings, lists, dicts; NaN and infinity, unknown to JSON, become strings."""
        if self.path:
            strict = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            try:
                with open(self.path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(strict, default=str) + "\n")
            except OSError as error:
                raise OSError(f"{self.path}: not written ({error}); make room and start again") from error
            tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))


def _step_of(line):
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return math.inf  # the half line of a killed process


def check_settings(saved, now, ignore=()):
    """Refuse to continue a run with settings it did not begin with: ValueError names each flag and both values."""
    saved, now = ({k: json.dumps(v, default=str) for k, v in d.items() if k not in ignore} for d in (saved, now))
    changed = [k for k in saved | now if saved.get(k) != now.get(k)]
    if changed:
        names = [k if " " in k else f"--{k.replace('_', '-')}" for k in changed]
        each = (
            f"{n} was {saved.get(k, 'absent')}, is {now.get(k, 'absent')}" for n, k in zip(names, changed, strict=True)
        )
        raise ValueError(f"{'; '.join(each)}: a run goes on as it began; take the old value or another --out")


def commit():
    """Short git commit of this folder, '-dirty' if files but stored results changed since, or None; never fails."""
    here = Path(__file__).resolve().parent
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(here.parent)}  # not of a project this one was copied into
    said = partial(subprocess.check_output, text=True, timeout=10, env=env, cwd=here, stderr=subprocess.DEVNULL)
    try:
        name = said(["git", "describe", "--always", "--exclude=*"]).strip()
        changed = said(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"])
    except (OSError, subprocess.SubprocessError):
        return None
    return name + "-dirty" * bool(changed)


@contextmanager
def stop_on_signals():
    """SIGTERM and SIGINT as a question that all ranks answer alike at a step boundary; a second Ctrl-C ends at once.

    with stop_on_signals() as stop: ... if stop(): save_checkpoint(...); sys.exit(STOPPED)
    """
    asked = []

    def ask(number, _):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(sum_over_ranks(torch.tensor(len(asked))))  # on the CPU: no wait for a device
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sentence(error):
    """The one line of an exception that a user needs, also when a loader's worker wrapped it in its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1]) if "Original Traceback" in str(error) else lines[0]
