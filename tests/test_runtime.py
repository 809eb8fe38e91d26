"""What a long run relies on: streams, sample order, sums over ranks, checkpoints, the log, refusals, signals."""

import errno
import gc
import itertools
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

import runtime

CPU = torch.device("cpu")


def sampler(n=7, batch_size=6, micro_batch=None, rank=0, world=1, seed=3, start=0, steps=5):
    return runtime.StepSampler(n, batch_size, micro_batch, rank, world, seed, start, steps)


def start_python(code, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, cwd=Path(runtime.__file__).parent, **pipes)


# ---- streams and the order of samples


def test_seed_step_is_a_function_of_seed_step_and_rank():
    draws = {}
    for key in itertools.product(range(3), repeat=3):
        runtime.seed_step(*key)
        draws[key] = torch.rand(4).tolist()
        runtime.seed_step(*key)
        assert torch.rand(4).tolist() == draws[key]
    assert len({tuple(d) for d in draws.values()}) == 27
    # numpy pads keys with zeros: alone, they make the shuffle of epoch 3 and the dropout of step 3 on rank 0 one stream
    assert np.random.SeedSequence((7, 3)).generate_state(1) == np.random.SeedSequence((7, 3, 0)).generate_state(1)
    assert runtime._seed(0, 7, 3) != runtime._seed(1, 7, 3, 0)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.integers(0, 5)
)
def test_step_sampler_union_over_ranks_is_the_step_of_one_process(n, world, micro, accumulate, start, more):
    batch, steps = world * micro * accumulate, start + more
    ranks = [sampler(n, batch, micro, r, world, 1, start, steps) for r in range(world)]
    lists = [list(s) for s in ranks]
    assert [s.accumulate for s in ranks] == [accumulate] * world
    assert [len(got) for got in lists] == [len(s) for s in ranks] == [more * accumulate] * world
    joined = [key for k in range(more * accumulate) for rank in lists for key in rank[k]]  # micro-step by micro-step
    assert joined == list(itertools.chain(*sampler(n, batch, batch, 0, 1, 1, start, steps)))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**63))
def test_step_sampler_shows_every_item_once_an_epoch(n, batch, seed):
    keys = list(itertools.chain(*sampler(n, batch, seed=seed, steps=-(-3 * n // batch))))
    for epoch in range(3):
        assert sorted(keys[epoch * n : (epoch + 1) * n]) == [(epoch, i) for i in range(n)]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), accumulate=st.integers(1, 3), start=st.integers(0, 8), rank=st.integers(0, 1))
def test_step_sampler_resumed_equals_continued(n, accumulate, start, rank):
    whole = list(sampler(n, 4 * accumulate, 2, rank, 2, 5, 0, 8))
    assert list(sampler(n, 4 * accumulate, 2, rank, 2, 5, start, 8)) == whole[start * accumulate :]


def test_step_sampler_orders_differ_between_epochs_and_seeds():
    (a, b), (c, _) = (list(sampler(50, 50, seed=seed, steps=2)) for seed in (1, 2))
    assert len({tuple(i for _, i in keys) for keys in (a, b, c)}) == 3


@pytest.mark.parametrize(
    "n, batch, micro, world, words",
    [(9, 6, 4, 1, "6, 1 .*by 4"), (9, 6, None, 4, "6, 4 .*by 4"), (9, 0, None, 1, "-size 0"), (0, 8, 8, 1, "0 images")],
)
def test_step_sampler_names_numbers_that_do_not_divide(n, batch, micro, world, words):
    with pytest.raises(ValueError, match=words):
        sampler(n, batch, micro, 0, world)


@given(n=st.integers(0, 40), batch=st.integers(1, 7), world=st.integers(1, 5))
def test_each_once_covers_every_index_exactly_once(n, batch, world):
    batches = [b for rank in range(world) for b in runtime.each_once(n, batch, rank, world)]
    assert sorted(key for b in batches for key in b) == [(0, i) for i in range(n)]
    assert all(0 < len(b) <= batch for b in batches)


class Echo(Dataset):
    def __getitem__(self, key):
        if key[1] == 8:
            raise ValueError(f"photo-{key[1]}.jpg: truncated")
        return torch.tensor([*key, torch.get_num_threads()])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_yields_the_batches_of_the_sampler_in_order(workers):
    order = sampler(n=8, batch_size=6, micro_batch=3, steps=3)
    batches = list(runtime.make_loader(Echo(), order, torch.stack, workers, CPU))
    assert [[tuple(row) for row in b[:, :2].tolist()] for b in batches] == list(order)
    assert not workers or all((b[:, 2] == 1).all() for b in batches)


def test_sentence_of_a_worker_error_is_the_line_that_names_the_file():
    with pytest.raises(ValueError, match="Traceback") as caught:
        next(iter(runtime.make_loader(Echo(), [[(0, 8)]], torch.stack, 1, CPU)))
    assert runtime.sentence(caught.value) == "photo-8.jpg: truncated"
    assert runtime.sentence(ValueError("first\nsecond")) == "first"
    assert runtime.sentence(KeyboardInterrupt()) == "KeyboardInterrupt"


# ---- processes


def test_setup_alone_needs_no_group(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.setup("cpu") == (CPU, 0, 1)
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(runtime.sum_over_ranks(x), x) and runtime.sum_over_ranks(x) is not x
    assert torch.equal(runtime.gather_rows(x), x)
    assert runtime.mean_over_ranks({"a": torch.tensor(2.0, requires_grad=True), "b": 3}) == {"a": 2.0, "b": 3.0}
    runtime.close()


def test_setup_refuses_in_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="--device tpu"):
        runtime.setup("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda.*use --device cpu"):
        runtime.setup("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="^process 0 of 2 on cpu: [^\n]*RANK[^\n]*torchrun[^\n]*$"):
        runtime.setup("auto")


def test_two_processes_agree_on_sums_means_rows_and_stopping(tmp_path):
    code = """
import os, signal, torch, runtime
run = runtime.setup("cpu")
x = torch.tensor([1.0, 10.0 + run.rank], requires_grad=True)
assert runtime.sum_over_ranks(x).tolist() == [2.0, 21.0] and x.tolist() == [1.0, 10.0 + run.rank]
assert runtime.mean_over_ranks({"b": torch.tensor(float(run.rank)), "a": 4}) == {"b": 0.5, "a": 4.0}
rows = torch.full((3 * run.rank, 2), 7.0 + run.rank)  # rank 0 has none
assert runtime.gather_rows(rows).tolist() == [[8.0, 8.0]] * 3
assert runtime.gather_rows(rows[:0]).shape == (0, 2)
assert runtime.gather_rows(torch.tensor([run.rank, 5])).tolist() == [0, 5, 1, 5]
with runtime.stop_on_signals() as stop:
    steps = 0
    while not stop():
        steps += 1
        if run.rank == 1 and steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # only one of the two is told
    assert steps == 3
path = runtime.save_checkpoint("OUT", 3, {"rank": run.rank})
runtime.sum_over_ranks(torch.zeros(1))
assert runtime.read_checkpoint(path) == {"rank": 0}
runtime.Log("OUT", run.rank).write(step=3, rank=run.rank)
runtime.close()
print("done", run)
""".replace("OUT", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    ranks = [start_python(code, RANK=r, LOCAL_RANK=r, **group) for r in range(2)]
    try:
        for r, p in enumerate(ranks):
            stdout, stderr = p.communicate(timeout=120)
            assert p.returncode == 0 and f"rank={r}, world=2" in stdout, stderr
            assert ("step 3" in stdout) == (r == 0)
    finally:
        for p in ranks:
            p.kill()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3, "rank": 0}\n'


@pytest.mark.slow
def test_restarted_processes_do_not_look_for_those_that_died():
    """torchrun keeps its store over restarts; who comes first to the second start finds the addresses of the first."""
    code = "import runtime, time, torch; print('imported', flush=True); runtime.setup('cpu'); "
    code += "print(runtime.sum_over_ranks(torch.ones(1)), flush=True); time.sleep(60)"
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
    group["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for order in ((0, 1), (1, 0)):
        ranks = []
        for rank in order:
            ranks.append(start_python(code, RANK=rank, LOCAL_RANK=rank, **group))
            assert ranks[-1].stdout.readline() == "imported\n"
            time.sleep(2)  # the first one has gone to look
        timer = threading.Timer(30, lambda these: [p.kill() for p in these], [ranks])  # then their lines are empty
        timer.start()
        met = [p.stdout.readline() for p in ranks]
        timer.cancel()
        for p in ranks:
            p.kill()
        assert met == ["tensor([2.])\n"] * 2, [p.stderr.read() for p in ranks]


def test_loaders_leave_no_file_open():
    def once():
        return list(runtime.make_loader([0, 1], [[0], [1]], list, 1, CPU))

    once()
    before = len(os.listdir("/proc/self/fd"))
    assert once() == [[0], [1]]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_bfloat16_where_it_is_emulated_is_said(monkeypatch, capsys):
    for pays in (False, True):
        monkeypatch.setattr(runtime, "bfloat16_pays", lambda device, pays=pays: pays)
        runtime.setup("cpu", amp=True)
        assert ("no bfloat16" in capsys.readouterr().out) is not pays
    runtime.setup("cpu")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("avx512, bf16, pays", [(True, False, False), (True, True, True), (False, False, True)])
def test_bfloat16_pays_only_where_the_processor_has_it(monkeypatch, avx512, bf16, pays):
    """oneDNN supports bfloat16 on any AVX-512: without avx512_bf16 a step takes twice as long. The last row is ARM."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert runtime.bfloat16_pays(torch.device("cpu")) is pays


def test_failed_says_one_sentence_and_lets_errors_of_our_own_through(capsys):
    assert runtime.failed("x.py", ValueError("a.jpg is broken\nmore")) == 2
    assert capsys.readouterr().err == "x.py: a.jpg is broken\n"
    with pytest.raises(RuntimeError, match="shapes"):  # a bug keeps its traceback
        runtime.failed("x.py", RuntimeError("shapes differ"))


# ---- checkpoints


def state(step):
    w = torch.randn(30, 40, generator=torch.Generator().manual_seed(step))
    return {"model": {"w": w}, "step": step, "settings": {"lr": 1e-4, "drop": None, "list": [1, "a"]}}


def names(out):
    return sorted(p.name for p in out.iterdir())


def test_checkpoint_round_trip_keeps_tensors_and_plain_values(tmp_path):
    adam = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.randn(4, 3)}},
        "param_groups": [{"betas": (0.9, 1)}],
    }
    saved = {"model": torch.nn.Linear(3, 4).state_dict(), "optimizer": adam, "classes": [[1, "cat"]], "none": None}
    path = runtime.save_checkpoint(tmp_path / "new" / "run", 12, saved)
    assert path.name == "step-00000012.pt"
    read = runtime.read_checkpoint(path)
    assert read["classes"] == [[1, "cat"]] and read["none"] is None and read.keys() == saved.keys()
    torch.testing.assert_close(dict(read["model"]), dict(saved["model"]), rtol=0, atol=0)
    torch.testing.assert_close(read["optimizer"]["state"], adam["state"], rtol=0, atol=0)
    assert read["optimizer"]["param_groups"] == adam["param_groups"]


def test_checkpoints_kept_are_the_newest_two_and_the_multiples(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"not ours to delete")
    for step in (5, 10, 15, 20, 25, 30, 35):
        runtime.save_checkpoint(tmp_path, step, state(step), keep_every=10)
    assert names(tmp_path) == ["best.pt", *(f"step-{s:08d}.pt" for s in (10, 20, 30, 35))]
    for step in (40, 45):
        runtime.save_checkpoint(tmp_path, step, state(step))
    assert names(tmp_path) == ["best.pt", "step-00000040.pt", "step-00000045.pt"]
    path, read = runtime.latest_checkpoint(tmp_path)
    assert path.name == "step-00000045.pt" and read["step"] == 45
    assert runtime.latest_checkpoint(tmp_path / "absent") is None


def damage(path, how):
    data = bytearray(path.read_bytes())
    data[data.find(state(2)["model"]["w"].numpy().tobytes()) + 2000] ^= how == "flipped"  # one bit of one weight
    path.write_bytes({"torn": data[: len(data) // 2], "empty": b"", "flipped": data, "text": b"hello\n" * 50}[how])


@pytest.mark.parametrize("how", ["torn", "empty", "flipped", "text"])
def test_latest_checkpoint_passes_over_a_damaged_newest_with_one_warning(tmp_path, capsys, how):
    for step in (1, 2):
        runtime.save_checkpoint(tmp_path, step, state(step))
    damage(tmp_path / "step-00000002.pt", how)
    path, read = runtime.latest_checkpoint(tmp_path)
    assert path.name == "step-00000001.pt" and read["step"] == 1
    warning = capsys.readouterr().out
    assert warning.count("\n") == 1 and "warning" in warning and "step-00000002.pt" in warning
    runtime.save_checkpoint(tmp_path, 2, state(2))  # what the run does next
    assert runtime.latest_checkpoint(tmp_path)[1]["step"] == 2


def test_damaged_newest_never_pushes_a_good_one_out(tmp_path):
    for step in (10, 20):
        runtime.save_checkpoint(tmp_path, step, state(step))
    damage(tmp_path / "step-00000020.pt", "torn")
    runtime.save_checkpoint(tmp_path, 15, state(15))  # resumed from 10, saved early because of a signal
    assert names(tmp_path) == ["step-00000010.pt", "step-00000015.pt", "step-00000020.pt.torn"]


def test_latest_checkpoint_refuses_to_begin_again_when_all_are_damaged(tmp_path):
    for step in (1, 2):
        damage(runtime.save_checkpoint(tmp_path, step, state(step)), "torn")
    with pytest.raises(ValueError, match="step-00000002.pt.*step-00000001.pt.*another --out"):
        runtime.latest_checkpoint(tmp_path)


def test_half_a_file_that_a_kill_left_goes_with_the_next_save(tmp_path):
    (tmp_path / ".step-00000017.pt.new").write_bytes(b"half")
    runtime.save_checkpoint(tmp_path, 20, state(20))
    assert names(tmp_path) == ["step-00000020.pt"]


def test_a_gradient_that_is_not_finite_is_written_down_for_inspection(tmp_path):
    log = runtime.Log(tmp_path, 0)
    with pytest.raises(ValueError, match="step 3: the gradient.*log.jsonl.*not-finite-00000003.pt"):
        runtime.stop_not_finite(tmp_path, log, 3, state(3), 1e-4, {"loss": torch.tensor(torch.nan)}, ["a.jpg"])
    assert read_lines(tmp_path)[-1] == {"step": 3, "stopped": "gradient not finite", "lr": 1e-4, "loss": "nan",
                                        "images": ["a.jpg"]}  # fmt: skip
    assert runtime.read_checkpoint(tmp_path / "not-finite-00000003.pt")["step"] == 3
    assert runtime.latest_checkpoint(tmp_path) is None


class Trap:
    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def test_read_checkpoint_never_executes_a_malicious_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "zip.pt")
    torch.save({"model": Trap()}, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("bare.pt").write_bytes(pickle.dumps(Trap()))
    for name, words in (("zip.pt", ".*mkdir, which was refused"), ("legacy.pt", ""), ("bare.pt", "")):
        with pytest.raises(ValueError, match=f"^{name}{words}[^\n]*$"):
            runtime.read_checkpoint(name)
    assert not Path("EXECUTED").exists()


def test_read_checkpoint_refuses_an_archive_that_unpacks_to_more_and_a_missing_file(tmp_path):
    path = runtime.save_checkpoint(tmp_path, 1, {"w": torch.zeros(10**6)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="bomb.pt.*more than its own size"):
        runtime.read_checkpoint(tmp_path / "bomb.pt")
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        runtime.read_checkpoint(tmp_path / "nothing.pt")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_read_checkpoint_of_mutated_bytes_is_right_or_a_value_error(tmp_path_factory, data):
    path = runtime.save_checkpoint(tmp_path_factory.mktemp("mutated"), 2, state(2))
    raw = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    try:
        read = runtime.read_checkpoint(path)
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert torch.equal(read["model"]["w"], state(2)["model"]["w"]) and read["settings"] == state(2)["settings"]


def test_write_checkpoint_refuses_objects_that_could_not_be_read_back(tmp_path):
    runtime.save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(ValueError, match="Path"):
        runtime.save_checkpoint(tmp_path, 2, {"settings": {"out": tmp_path}})
    assert names(tmp_path) == ["step-00000001.pt"]


@pytest.mark.parametrize("step", [1, 2])
def test_full_disk_leaves_the_old_checkpoints_and_says_so(tmp_path, monkeypatch, step):
    path = runtime.save_checkpoint(tmp_path, 1, state(1))
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"step-0000000{step}.pt.*No space left.*older files are intact"):
        runtime.save_checkpoint(tmp_path, step, state(2))
    assert names(tmp_path) == ["step-00000001.pt"] and path.read_bytes() == before


def test_write_that_fails_half_way_names_its_cause(tmp_path):
    runtime.save_checkpoint(tmp_path, 1, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the kernel refuses the rest of the file
    try:
        with pytest.raises(OSError, match="step-00000002.pt: not written.*File too large"):
            runtime.save_checkpoint(tmp_path, 2, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001.pt"]


def test_kills_while_saving_always_leave_a_readable_checkpoint(tmp_path):
    code = """
import torch, runtime
for step in range(1, 10**6):
    runtime.save_checkpoint("OUT", step, {"w": torch.full((200_000,), float(step)), "step": step})
    print(step, flush=True)
""".replace("OUT", str(tmp_path))
    p = start_python(code)
    p.stdout.readline()
    for pause in np.random.default_rng(0).uniform(0.01, 0.08, 12):
        time.sleep(pause)
        os.kill(p.pid, signal.SIGSTOP)  # the folder is what a kill at this moment would leave
        path, read = runtime.latest_checkpoint(tmp_path)
        assert (read["w"] == read["step"]).all() and path.name == f"step-{read['step']:08d}.pt"
        os.kill(p.pid, signal.SIGCONT)
    p.kill()
    p.communicate()
    assert runtime.latest_checkpoint(tmp_path)[1]["step"] > 0


# ---- log and settings


def read_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_is_strict_json_and_readable(tmp_path, capsys):
    log = runtime.Log(tmp_path / "run", 0)
    log.write(settings={"lr": 1e-4, "out": tmp_path})
    log.write(step=1, loss=1 / 3, bad=float("nan"), worse=float("-inf"), path="a\nb", ap=[0.1, 0.2])
    assert read_lines(tmp_path / "run") == [
        {"settings": {"lr": 1e-4, "out": str(tmp_path)}},
        {"step": 1, "loss": 1 / 3, "bad": "nan", "worse": "-inf", "path": "a\nb", "ap": [0.1, 0.2]},
    ]
    assert "step 1  loss 0.3333  bad nan" in capsys.readouterr().out
    runtime.Log(tmp_path / "other", 1).write(step=1)  # another rank
    assert names(tmp_path) == ["run"] and not capsys.readouterr().out


def test_log_resumed_shows_every_step_once(tmp_path):
    log = runtime.Log(tmp_path, 0)
    log.write(settings=1)
    for step in (10, 20, 30, 40):
        log.write(step=step, loss=float(step))
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('[1]\n{"step": null}\n{"step": 1e999}\n{"step": 50, "los')  # damaged, and killed while writing
    log = runtime.Log(tmp_path, 0, step=20)  # the newest checkpoint
    for step in (30, 40, 50):
        log.write(step=step, loss=float(step))
    first, *rest = read_lines(tmp_path)
    assert first == {"settings": 1} and [line["step"] for line in rest] == [10, 20, 30, 40, 50]
    runtime.Log(tmp_path, 0)
    assert read_lines(tmp_path) == []  # step 0: another run


def test_a_second_run_into_the_same_folder_is_refused_before_it_touches_the_log(tmp_path):
    code = f"import time, runtime; log = runtime.Log({str(tmp_path)!r}, 0); log.write(step=7); time.sleep(60)"
    first = start_python(code)
    try:
        deadline = time.monotonic() + 50
        while not (tmp_path / "log.jsonl").exists() or not read_lines(tmp_path):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"another process is writing {tmp_path}: .* another --out"):
            runtime.Log(tmp_path, 0)
        runtime.Log(tmp_path, 1)  # only rank 0 writes
    finally:
        first.kill()
        first.wait()
    assert read_lines(tmp_path) == [{"step": 7}]
    runtime.Log(tmp_path, 0, step=7).write(step=8)  # a killed run does not keep its folder
    runtime.Log(tmp_path, 0, step=8).write(step=9)  # nor does one of this process that has ended
    assert [line["step"] for line in read_lines(tmp_path)] == [7, 8, 9]


def test_log_on_a_full_disk_names_its_file(tmp_path):
    log = runtime.Log(tmp_path, 0)
    log.path = Path("/dev/full")
    if not log.path.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError, match="/dev/full: not written.*No space left"):
        log.write(step=1)


def test_check_settings_names_each_change():
    saved = {"lr": 1e-4, "lr_backbone": 0.0, "seed": 1, "workers": 2, "train": ["a"], "gone": 3}
    now = {"lr": 2e-4, "lr_backbone": 1e-5, "seed": 1, "workers": 0, "train": ("a",), "fresh": None}
    runtime.check_settings(saved, dict(saved))
    with pytest.raises(ValueError) as caught:
        runtime.check_settings(saved, now, ignore={"workers"})
    text = str(caught.value)
    assert "--lr was 0.0001, is 0.0002;" in text and "--lr-backbone was 0.0, is 1e-05" in text
    assert "--gone was 3, is absent" in text and "--fresh was absent, is null" in text
    assert not any(word in text for word in ("workers", "train", "seed")) and "another --out" in text


def test_commit_is_short_or_none_and_never_fails(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert len(runtime.commit()) >= 4 and head.startswith(runtime.commit())
    for name in ("some.py", "bench/results/speed.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for command in (["add", "."], ["commit", "-q", "-m", "second"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "bench" / "results" / "speed.jsonl").write_text("{}")  # what a run adds to is none of its code
    assert not runtime.commit().endswith("-dirty")
    (tmp_path / "some.py").write_text("1")
    assert runtime.commit().endswith("-dirty")
    (tmp_path / "copied").mkdir()
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "copied" / "runtime.py"))
    assert runtime.commit() is None  # the commit around a plain copy says nothing about it
    monkeypatch.setenv("PATH", "")
    assert runtime.commit() is None


# ---- signals

LOOP = """
import sys, time, torch, runtime
class Slow(torch.utils.data.Dataset):
    def __getitem__(self, key):
        time.sleep(0.01)
        return torch.tensor(key)
order = runtime.StepSampler(8, 2, None, 0, 1, 0, 0, 10**6)
with runtime.stop_on_signals() as stop:
    for step, batch in enumerate(runtime.make_loader(Slow(), order, torch.stack, 2, torch.device("cpu")), 1):
        print(step, flush=True)
        if step == FAIL:
            raise SystemExit("the loss is not finite")
        if stop():
            runtime.save_checkpoint("OUT", step, {"step": step})
            sys.exit(runtime.STOPPED)
"""


def test_signals_save_at_the_step_boundary_and_exit_with_their_own_code(tmp_path):
    p = start_python(LOOP.replace("OUT", str(tmp_path)).replace("FAIL", "-1"))
    steps = [p.stdout.readline() for _ in range(3)]
    os.killpg(p.pid, signal.SIGINT)  # Ctrl-C and schedulers reach the workers too
    os.killpg(p.pid, signal.SIGTERM)
    stdout, stderr = p.communicate(timeout=60)
    assert p.returncode == runtime.STOPPED == 75 and not stderr
    assert runtime.latest_checkpoint(tmp_path)[1]["step"] == int([*steps, *stdout.split()][-1])


def test_error_in_the_main_process_does_not_wait_for_its_workers():
    p = start_python(LOOP.replace("FAIL", "3"))  # workers that ignored SIGTERM once kept this exit waiting for ever
    stderr = p.communicate(timeout=60)[1]
    assert p.returncode == 1 and stderr == "the loss is not finite\n"


def test_stop_restores_the_handlers_and_a_second_interrupt_ends_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runtime.stop_on_signals() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
