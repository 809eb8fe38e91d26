"""Every reader against damaged and hostile files: what comes out is a correct result or one sentence with the file.

Hypothesis changes real files: bytes, the values inside a json, an XML or an array header, and the pickle inside a
checkpoint, its checksum made right again. FUZZ_CASES says how many cases there are in all (default 2,000, the same each
time; `make fuzz`: 100,000 new ones). While a reader runs, nothing may be written, started or unpickled, it may take
SECONDS, and BYTES of memory beyond what it began with.
"""

import contextlib
import copy
import functools
import io
import json
import math
import mmap
import os
import signal
import struct
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import convert
import data
import finetune
import plots
import pretrain
import proposals
import runtime
from model import build_detector

CASES = int(os.environ.get("FUZZ_CASES", 2000))
SECONDS, BYTES = 20, 2**30  # an image of data.MAX_PIXELS takes 300 MB, and half as much again while it is converted
SIZE = (40, 30)  # of the pictures
DONE = Counter()


# ---- what is watched

STATE = {"on": False, "seen": []}
FORBIDDEN = (
    "os.mkdir os.rename os.remove os.rmdir os.symlink os.link os.truncate os.system os.exec os.posix_spawn "
    "subprocess.Popen socket.connect pickle.find_class shutil."
)
FORBIDDEN = tuple(FORBIDDEN.split())


def watch(event, args):
    if STATE["on"]:
        writes = event == "open" and (args[1] or "r").strip("b") != "r" and isinstance(args[0], str | bytes)
        if writes or event.startswith(FORBIDDEN):
            STATE["seen"].append((event, str(args)[:200]))


sys.addaudithook(watch)


class Hangs(BaseException):
    """No reader may swallow it."""


def hangs(*_):
    raise Hangs(f"more than {SECONDS} s")


def peak():
    """Most bytes of memory this process has had since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def watched():
    before = signal.signal(signal.SIGALRM, hangs)
    measured = os.access("/proc/self/clear_refs", os.W_OK)
    if measured:
        forget_peak()
        start = peak()
    signal.alarm(SECONDS)
    STATE.update(on=True, seen=[])
    try:
        yield
    finally:
        STATE["on"] = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not STATE["seen"], STATE["seen"]
    assert not measured or peak() - start < BYTES, f"{(peak() - start) / 2**20:.0f} MB"


# ---- how files are changed

NUMBERS = [0, -1, 1, 2**31, -(2**63), 10**9, 10**18, 10**400, 0.5, 1e308, 5e-324, math.nan, math.inf, -math.inf]
TEXTS = ["", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "\ud800", "a" * 5000, "00000.png", "1", "nan"]
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, None, True, [], {}, [[]], [[[[]]]], {"id": 1}, [1] * 9]),
    st.integers(),
    st.text(max_size=9),
)


@st.composite
def bytes_of(draw, raw):
    """Some bytes, cut, overwritten, repeated or taken out."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        how = draw(st.sampled_from(["flip", "flip", "write", "cut", "insert", "drop", "swap"]))
        if how == "flip" and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "write":
            new = draw(
                st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
            )
            raw[at : at + len(new)] = new
        elif how == "cut":
            del raw[at:]
        elif how == "insert":
            raw[at:at] = draw(st.binary(max_size=8)) or raw[: 16 * at]
        elif how == "drop":
            del raw[at : at + draw(st.integers(1, 64))]
        else:
            raw[:at], raw[at:] = raw[at : 2 * at], raw[at:]
    return bytes(raw)


def places(value, path=()):
    """The paths to all values within a json."""
    yield path
    rows = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, inner in rows:
        yield from places(inner, (*path, key))


@st.composite
def json_of(draw, value):
    """A json with values replaced, taken out, repeated or nested deeply; or its bytes changed."""
    if draw(st.integers(0, 4)) == 0:
        return draw(bytes_of(json.dumps(value).encode()))
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path] or [("",)]))
        parent = value
        for key in path:
            parent = parent[key]
        how = draw(st.sampled_from(["set", "set", "set", "drop", "repeat", "nest"]))
        if last == "" or how == "set":
            new = copy.deepcopy(draw(VALUES))  # the drawn lists are shared, and could end up inside themselves
            if last == "":
                value = new
            else:
                parent[last] = new
        elif how == "drop":
            del parent[last]
        elif how == "repeat" and isinstance(parent, list):
            parent += [parent[last]] * draw(st.integers(1, 3))
        else:
            return json.dumps(value).replace("[", "[" * draw(st.sampled_from([2, 100, 10_000])), 1).encode()
    return json.dumps(value).encode()


@st.composite
def pickle_of(draw, raw):
    """A checkpoint whose pickle or tensors were changed, or whose archive claims other sizes; the checksum is right."""
    old, new = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    name = draw(st.sampled_from(old.namelist() + [n for n in old.namelist() if n.endswith("data.pkl")] * 6))
    kind = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(new, "w", kind) as archive:
        for entry in old.namelist():
            body = old.read(entry)
            archive.writestr(entry, draw(bytes_of(body)) if entry == name else body)
    return new.getvalue()


# ---- the readers: files to begin with, which may change and how, and what a result must look like


def correct(value, limit=10**9):
    assert value, "not what a reader may return"


def picture(path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    image.save(path, **({"exif": image.getexif()} if path.suffix in (".jpg", ".webp", ".tif") else {}))


def read_image(path):
    image = data.load_image(path)
    correct(image.mode == "RGB" and 0 < image.width * image.height <= data.MAX_PIXELS)


COCO = {
    "images": [{"id": i + 1, "file_name": f"0000{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in range(2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12.5], "area": 125, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
}
VOC = """<annotation><filename>00000.png</filename><size><width>40</width><height>30</height></size><object>
<name>cat</name><difficult>1</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>24.5</ymax></bndbox>
</object></annotation>"""
ENTITIES = (
    """<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d SYSTEM "/etc/passwd">]>"""
)


def read_labels(source):
    found = data.read_annotations(source, quiet=True)
    for image, boxes, labels in zip(found.images, found.boxes_xyxy, found.labels, strict=True):
        inside = Path(os.path.normpath(found.root / image["path"])).is_relative_to(found.root)
        correct(inside and (found.root / image["path"]).is_file() and image["width"] > 0 and image["height"] > 0)
        correct(bool(boxes.isfinite().all()) and all(0 <= k < len(found.categories) for k in labels.tolist()))
        correct(bool((boxes[:, 2:] > boxes[:, :2]).all()))
    dataset = data.DetectionSet(found, True, 32)
    for i in range(len(dataset)):
        x, boxes, labels, *_ = dataset[0, i]
        correct(bool((boxes >= 0).all() and (boxes <= 1).all()) and len(boxes) == len(labels))


@st.composite
def voc_of(draw, text):
    how = draw(st.integers(0, 3))
    if how == 0:
        return draw(bytes_of(text.encode()))
    if how == 1:
        return ENTITIES.encode() + text.replace("cat", draw(st.sampled_from(["&c;", "&d;", "cat"]))).encode()
    words = ["40", "30", "2", "3", "20", "24.5", "cat", "1", "<object>", "</object>", "</name>", "<bndbox>", "xmin"]
    for word in draw(st.lists(st.sampled_from(words), min_size=1, max_size=3)):
        text = text.replace(word, str(draw(VALUES)), 1)
    return text.encode("utf-8", "surrogatepass")


def read_list(source):
    root, paths = data.list_images(source)
    correct(paths and all((root / path).is_file() for path in paths))
    correct(all(Path(os.path.normpath(root / path)).is_relative_to(root) for path in paths))


def read_cache(folder, classes=None):
    cache = proposals.Cache(folder, classes)
    names = cache.image_list(folder.parent / "pictures").paths
    correct(len(names) == len(cache) == 2)
    for index, epoch in ((0, 0), (1, 0), (1, 1)):
        boxes, scores = cache.boxes(index, epoch), cache.scores(index, epoch)
        correct(boxes.shape == (len(scores), 4) and len(boxes) <= 5 and boxes.dtype == np.float32)
        w, h = cache.sizes[index].tolist()
        correct(0 < w and 0 < h and bool((boxes >= 0).all() and (boxes <= [w, h, w, h]).all()))
        correct(bool((boxes[:, :2] < boxes[:, 2:]).all()) and bool(np.isfinite(scores).all()))
        if classes:
            labels = cache.labels(index, epoch)
            correct(len(labels) == len(boxes) and bool((labels >= -1).all()))


def read_native(path):
    source, state, _, meta = convert.read_native(path)
    correct(source in convert.SOURCES and all(isinstance(v, torch.Tensor) for v in state.values()))
    if convert.detect_settings(state).get("variant"):
        convert.load_detector(detector(), path, classes=[[0, "cat"], [1, "dog"]])
        finetune.describe(path)
    else:
        convert.load_backbone(detector(), path)


@functools.cache
def detector():
    """A small one whose frozen backbone has two numbers a tensor, so that a case takes milliseconds."""
    torch.manual_seed(0)
    net = build_detector("vanilla", 2, backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=1, num_queries=3,
                         ffn_dim=16, heads=2)  # fmt: skip
    for module in net.backbone.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.flatten()[:2].clone()
    return net


def read_flags(path):
    """A script's own words in a file: what the parser takes, the data set takes or refuses."""
    words = path.read_text("utf-8", "surrogateescape").split("\n")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        args = pretrain.parse_args(words)
        correct(args.steps > 0 and args.batch_size > 0 and args.log_every > 0 and args.save_every > 0)
        named = f"{args.data} {args.proposals} {args.pseudo_classes}"
        try:
            train, _ = pretrain.build_data(args, runtime.Run(torch.device("cpu"), 0, 1))
            runtime.StepSampler(len(train), args.batch_size, args.micro_batch, 0, 1, args.seed, 0, args.steps)
            item = train[0, 0]
            correct(bool(item.boxes.isfinite().all()))
        except ValueError as error:
            raise ValueError(f"{path} {named} {error}") from error
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        finetune.parse_args(words)
        proposals.parse_args(words)


@st.composite
def flags_of(draw, text):
    words = text.split("\n")
    names = "tau resolution num-regions limit region-nms seed batch-size micro-batch steps log-every save-every method "
    names += "region-target proposals recipe drop-step lr clip"
    values = "0 -1 1 2 0.5 0.999 nan inf -inf 1e400 64 updetr detreg roi none coco gt random".split()
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0")
    for _ in range(draw(st.integers(1, 3))):
        value = draw(st.one_of(st.sampled_from(values), st.text(letters, max_size=6)))
        words += [f"--{draw(st.sampled_from(names.split()))}", value]
    return "\n".join(words).encode()


def read_run(path):
    """A run's log, resumed at step 3 and drawn."""
    lines = plots.read_log(path)
    correct(isinstance(lines, list))
    steps = [runtime._step_of(line) for line in path.read_text("utf-8").splitlines()]
    correct(all(isinstance(step, int | float) for step in steps))


def make_files(base):
    """The files that every case starts from: {reader: (folder or file to read, [(changed file, strategy)])}."""
    pictures = base / "pictures"
    pictures.mkdir()
    for i in range(2):
        picture(pictures / f"0000{i}.png")
    readers = {}
    for suffix in (".jpg", ".png", ".bmp", ".webp", ".tif", ".gif", ".ppm"):
        path = base / f"one{suffix}"
        picture(path)
        readers[f"image{suffix}"] = read_image, path, {path: bytes_of(path.read_bytes())}
    path = pictures / "coco.json"
    readers["coco"] = read_labels, path, {path: json_of(COCO)}
    root = base / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    picture(root / "JPEGImages" / "00000.png")
    xml, ids = root / "Annotations" / "00000.xml", root / "ImageSets" / "Main" / "trainval.txt"
    xml.write_text(VOC)
    ids.write_text("00000\n")
    readers["voc"] = read_labels, root, {xml: voc_of(VOC)}
    readers["voc split"] = read_labels, root, {ids: st.one_of(bytes_of(b"00000\n"), st.sampled_from(TEXTS).map(
        lambda text: text.encode("utf-8", "surrogatepass")))}  # fmt: skip
    path = pictures / "list.txt"
    readers["list"] = read_list, path, {path: bytes_of(b"00000.png\n00001.png\n")}
    cache = proposals.write_cache(pictures, base / "cache", kind="random", max_boxes=5, draws=2).path
    changes = {}
    for file in sorted(cache.iterdir()):
        if file.suffix == ".json":
            changes[file] = json_of(json.loads(file.read_text()))
        elif file.suffix == ".npy":
            changes[file] = st.one_of(bytes_of(file.read_bytes()), header_of(file.read_bytes()))
    readers["cache"] = read_cache, cache, changes
    path = cache / "classes-2.npy"
    np.save(path, np.arange(20, dtype=np.int16) % 3 - 1)
    raw = path.read_bytes()
    readers["pseudo-classes"] = (
        (lambda path: read_cache(cache, path)),
        path,
        {path: st.one_of(bytes_of(raw), header_of(raw))},
    )
    saved = {"model": detector().state_dict(), "step": 3, "settings": {"lr": 1e-4, "classes": [[1, "cat"]]},
             "meta": {"variant": "vanilla", "build": detector().settings, "classes": [[0, "cat"], [1, "dog"]],
                      "resolution": 64}}  # fmt: skip
    small = {"model": {"w": torch.arange(12.0).view(3, 4)}, "step": 3, "settings": {"lr": 1e-4, "list": [1, "a", None]}}
    path = runtime.write_checkpoint(base / "own.pt", small) or base / "own.pt"
    raw = path.read_bytes()

    def read_own(path):
        read = runtime.read_checkpoint(path)
        if path.read_bytes() == raw:
            correct(torch.equal(read["model"]["w"], small["model"]["w"]))

    readers["checkpoint"] = read_own, path, {path: st.one_of(bytes_of(raw), pickle_of(raw))}
    path = base / "detector.pt"
    torch.save(saved, path)
    raw = path.read_bytes()
    readers["weights"] = read_native, path, {path: st.one_of(bytes_of(raw), pickle_of(raw))}
    path = base / "legacy.pth"
    torch.save(saved["model"], path, _use_new_zipfile_serialization=False)
    readers["legacy weights"] = read_native, path, {path: bytes_of(path.read_bytes())}
    tensors = {name: tensor for name, tensor in saved["model"].items() if "layer" not in name or "transformer" in name}
    path, header, body = base / "model.safetensors", {}, b""
    for name, tensor in tensors.items():
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        if tensor.dim():
            chunk = tensor.numpy().tobytes()
            header[name] = {
                "dtype": kind,
                "shape": list(tensor.shape),
                "data_offsets": [len(body), len(body) + len(chunk)],
            }
            body += chunk

    def packed(text):
        return struct.pack("<Q", len(text)) + text + body

    readers["safetensors"] = read_native, path, {path: st.one_of(
        bytes_of(packed(json.dumps(header).encode())), json_of(header).map(packed))}  # fmt: skip
    path = base / "flags.txt"
    start = f"--data\n{pictures}\n--out\n{base}/unused"
    readers["flags"] = read_flags, path, {path: flags_of(start)}
    path = base / "log.jsonl"
    text = b'{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 1.0, "AP": "nan"}\n'
    readers["log"] = (
        read_run,
        path,
        {path: st.one_of(bytes_of(text), json_of({"step": 1, "loss": [1.0]}).map(lambda t: t + b"\n"))},
    )
    return readers


@st.composite
def header_of(draw, raw):
    """A .npy file whose header says something else."""
    text = raw[10 : 10 + int.from_bytes(raw[8:10], "little")].decode().strip()
    for _ in range(draw(st.integers(1, 2))):
        words = ["(20", "(10", "(2", "'<i2'", "'<f4'", "'<i8'", "'<i4'", "2)", "4)", "False", "'shape'", "}"]
        news = [
            "(1000000000",
            "(-1",
            "(0",
            "(19",
            "'|O'",
            "'<f8'",
            "'<i2'",
            "'<U9'",
            "'<M8[s]'",
            "'|V4'",
            "True",
            "3)",
            "(",
            "",
        ]
        text = text.replace(draw(st.sampled_from(words)), draw(st.sampled_from(news)), 1)
    body = raw[10 + int.from_bytes(raw[8:10], "little") :]
    return raw[:8] + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + body


NAMES = ["image.jpg", "image.png", "image.bmp", "image.webp", "image.tif", "image.gif", "image.ppm", "coco", "voc",
         "voc split", "list", "cache", "pseudo-classes", "checkpoint", "weights", "legacy weights", "safetensors",
         "flags", "log"]  # fmt: skip
EACH = math.ceil(CASES / len(NAMES))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    torch.set_num_threads(1)
    readers = make_files(tmp_path_factory.mktemp("fuzz"))
    assert list(readers) == NAMES
    return readers


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_give_a_correct_result_or_name_themselves(readers, name):
    read, source, changes = readers[name]
    whole = {file: file.read_bytes() if file.exists() else None for file in changes}
    folder = source if source.is_dir() else source.parent

    @settings(max_examples=EACH, deadline=None, derandomize=CASES <= 2000, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def cases(drawn):
        file = drawn.draw(st.sampled_from(list(changes)))
        file.write_bytes(drawn.draw(changes[file]))
        DONE[name] += 1
        try:
            with watched():
                read(source)
        except (ValueError, OSError) as error:
            text = str(error)
            assert file.name in text or folder.name in text or source.name in text, text
        finally:
            if whole[file] is not None:
                file.write_bytes(whole[file])

    cases()


def test_count_of_cases():
    """The other tests count what they tried; run alone, this one has nothing to count."""
    if len(DONE) == len(NAMES):
        print(f"{sum(DONE.values()):,} cases: {dict(DONE)}")
        assert sum(DONE.values()) >= CASES


# ---- hostile files by hand, which chance does not find


def test_watch_sees_writes_programs_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BYTES", 2**25)
    for act in (lambda: (tmp_path / "a").write_text("x"), lambda: os.system("true")):
        with pytest.raises(AssertionError, match="a|true"), watched():
            act()
    with pytest.raises(AssertionError, match="MB"), watched():
        np.frombuffer(mmap.mmap(-1, 2**26), np.uint8)[::4096] = 1  # fresh pages, whatever the heap has left
    assert (tmp_path / "a").exists()


def test_json_that_claims_a_billion_boxes_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**COCO, "annotations": 10**9}))
    picture(tmp_path / "00000.png")
    picture(tmp_path / "00001.png")
    with watched(), pytest.raises(ValueError, match="a.json"):
        data.read_annotations(tmp_path / "a.json")


def test_decompression_bomb_is_refused(tmp_path):
    picture(tmp_path / "bomb.png")
    raw = bytearray((tmp_path / "bomb.png").read_bytes())
    raw[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height, in the header's chunk
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    (tmp_path / "bomb.png").write_bytes(raw)
    with watched(), pytest.raises(ValueError, match="bomb.png"):
        data.load_image(tmp_path / "bomb.png")


def test_archive_that_unpacks_to_more_than_its_size_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BYTES", 2**25)
    for name, read in (("own.pt", runtime.read_checkpoint), ("theirs.pt", convert.read_native)):
        torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "small.pt")
        with (
            zipfile.ZipFile(tmp_path / "small.pt") as old,
            zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.namelist():
                with new.open(entry, "w") as file:
                    file.write(old.read(entry))
                    for _ in range(64 if "data/" in entry else 0):
                        file.write(bytes(2**20))
        with watched(), pytest.raises(ValueError, match=name):
            read(tmp_path / name)


def test_symlink_loops_end(tmp_path):
    """Two loops in one folder: followed blindly, 2^40 paths."""
    picture(tmp_path / "a.png")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to("self.png")
    with watched():
        _, paths = data.list_images(tmp_path)
    assert "a.png" in paths and len(paths) <= 2
