"""Proposals: boxes inside their image and in order; the cache the same whatever happened on the way; clear refusals."""

import gzip
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import proposals
from data import list_images, load_image, read_annotations, stream
from proposals import Cache, edge_boxes, edge_map, random_boxes, selective_search, write_cache

ROOT = Path(__file__).parents[1]
COCO = ROOT.parent / "shared" / "data" / "coco_cc"
ARRAYS = ("boxes.npy", "scores.npy", "offsets.npy", "sizes.npy")


def scene(width=200, height=150, seed=0):
    """A noisy ground with a few bright rectangles."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(90, 6, (height, width, 3))
    for _ in range(3):
        x, y = rng.integers(0, width // 2), rng.integers(0, height // 2)
        w, h = rng.integers(width // 5, width // 2), rng.integers(height // 5, height // 2)
        pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def folder(path, names, **options):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        scene(seed=i, **options).save(path / name)
    return path


def content(out):
    return [(Path(out) / name).read_bytes() for name in ARRAYS] + [Cache(out).paths, Cache(out).rejected]


def assert_inside(boxes, size):
    assert boxes.dtype == np.float32 and boxes.shape == (len(boxes), 4) and (boxes == np.rint(boxes)).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all() and (boxes[:, :2] < boxes[:, 2:]).all()


# ---------------------------------------------------------------- boxes of one image


@pytest.mark.parametrize("size", [(200, 150), (16, 16), (40, 700), (5000, 20), (900, 600)])
def test_edge_boxes_lie_inside_in_falling_order(size):
    image = scene(*size)
    boxes, scores = edge_boxes(image, 100)
    assert_inside(boxes, size)
    assert 1 <= len(boxes) == len(scores) <= 100 and (np.diff(scores) <= 0).all() and scores.dtype == np.float32
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    again = edge_boxes(image, 100)
    assert (again[0] == boxes).all() and (again[1] == scores).all()


@pytest.mark.parametrize("noise", [0, 1])
def test_edge_boxes_of_an_empty_image_are_one_centred_half(noise):
    pixels = np.random.default_rng(0).normal(128, noise, (80, 120, 3)).round().clip(0, 255).astype(np.uint8)
    boxes, scores = edge_boxes(Image.fromarray(pixels))
    assert boxes.tolist() == [[30, 20, 90, 60]] and scores.tolist() == [0]  # (w/4, h/4, 3w/4, 3h/4), spec O-20


def test_edge_boxes_find_a_lone_rectangle_first():
    pixels = np.full((240, 320, 3), 200, np.uint8)
    pixels[60:160, 90:250] = (30, 60, 120)
    first = edge_boxes(Image.fromarray(pixels))[0][0]
    assert np.abs(first - [90, 60, 250, 160]).max() <= 4


def test_edge_map_is_thin_and_its_angle_is_that_of_the_normal():
    pixels = np.full((240, 320, 3), 200, np.uint8)
    pixels[:, 160:] = 20
    strength, normal = edge_map(Image.fromarray(pixels))
    assert strength.shape == normal.shape == (240, 320) and strength.dtype == normal.dtype == np.float32
    assert strength.min() == 0 and strength.max() == 1 and 0 <= normal.min() and normal.max() < np.float32(np.pi)
    rows = strength[30:-30] > 0.5
    assert set(rows.sum(1)) <= {1, 2} and np.isin(np.nonzero(rows)[1], (159, 160)).all()
    assert np.abs(np.sin(normal[30:-30][rows])).max() < 0.01  # a vertical edge has a horizontal normal
    turned = edge_map(Image.fromarray(pixels.transpose(1, 0, 2).copy()))[1]
    assert np.abs(np.cos(turned[158:162, 60:180])).max() < 0.01


def test_selective_search_draws_are_orders_of_one_set():
    image = scene(300, 200, seed=4)
    a, b, c = (boxes for boxes, _ in selective_search(image, 1000, seeds=(1, 2, 1)))
    assert_inside(a, (300, 200))
    assert (a == c).all() and not np.array_equal(a, b)
    assert set(map(tuple, a)) == set(map(tuple, b))
    (top, scores), *_ = selective_search(image, 5, seeds=(2,))
    assert (top == b[:5]).all() and scores.tolist() == [0] * 5  # first max_boxes; a fresh call gives the same draw


def test_random_boxes_follow_the_sampler_of_updetr():
    boxes, scores = random_boxes((40, 30), 4000, stream(0, 1))
    assert_inside(boxes, (40, 30))
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert set(w) == set(range(8, 33)) and set(h) == set(range(8, 23)) and not scores.any()
    assert boxes[w == 8][:, 0].max() == 31 and boxes[:, 0].min() == 0  # x in 0 .. w - sw - 1
    assert (random_boxes((16, 16), 5, stream(0))[0][:, 2:] <= 16).all()
    assert (random_boxes((40, 30), 9, stream(0, 2))[0] == random_boxes((40, 30), 9, stream(0, 2))[0]).all()


# ---------------------------------------------------------------- the cache


def test_cache_returns_what_was_proposed(tmp_path):
    source = folder(
        tmp_path / "images", ["b.png", "a b/x.y.z.jpg", "a b/\u00fc\u65e5.png", "line\nbreak.png", "w.x/w.PNG"]
    )
    cache = write_cache(source, tmp_path / "out", workers=2, max_boxes=50)
    assert cache.paths == list_images(source).paths and len(cache) == 5 and cache.kind == "edgeboxes"
    for i, path in enumerate(cache.paths):
        image = load_image(source / path)
        boxes, scores = edge_boxes(image, 50)
        assert (cache.boxes(i) == boxes).all() and (cache.scores(i) == scores).all()
        assert (cache.boxes(i, epoch=7) == boxes).all() and tuple(cache.sizes[i]) == image.size
    assert cache.boxes(0).dtype == np.float32 and isinstance(cache._boxes, np.memmap) and cache._boxes.dtype == np.int16
    assert cache.image_list(source) == list_images(source) and not (tmp_path / "out" / "parts").exists()
    with pytest.raises(IndexError, match="0 to 4"):
        cache.boxes(5)
    copy = pickle.dumps(cache)
    assert len(copy) < 1000 and (pickle.loads(copy).boxes(2) == cache.boxes(2)).all()


def test_cache_with_draws_gives_one_each_epoch(tmp_path):
    source = folder(tmp_path / "images", ["a.png", "b.png", "c.png"])
    for kind in ("selective-search", "random"):
        few = write_cache(source, tmp_path / f"{kind}2", kind=kind, draws=2, max_boxes=6)
        more = write_cache(source, tmp_path / f"{kind}3", kind=kind, draws=3, max_boxes=6)
        other = write_cache(source, tmp_path / f"{kind}s", kind=kind, draws=3, max_boxes=6, seed=1)
        for i in range(3):
            draws = [more.boxes(i, epoch) for epoch in range(3)]
            assert len({draw.tobytes() for draw in draws}) == 3 and draws[0].shape == (6, 4)
            assert (more.boxes(i, 4) == draws[1]).all() and (few.boxes(i, 5) == draws[1]).all()
            assert not np.array_equal(other.boxes(i), draws[0])
        assert not np.array_equal(more.boxes(0), more.boxes(1))


def test_cache_refers_to_the_frame_of_load_image(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    scene(200, 120).save(tmp_path / "images" / "turned.jpg", exif=exif)
    cache = write_cache(tmp_path / "images", tmp_path / "out")
    image = load_image(tmp_path / "images" / "turned.jpg")
    assert image.size == (120, 200) == tuple(cache.sizes[0])
    assert_inside(cache.boxes(0), (120, 200))
    assert (cache.boxes(0) == edge_boxes(image)[0]).all() and cache.boxes(0)[:, 3].max() > 120


def test_cache_lists_what_it_rejects_and_goes_on(tmp_path, capsys):
    source = folder(tmp_path / "images", ["good.png", "strip.png", "truncated.jpg"])
    whole = (source / "truncated.jpg").read_bytes()
    (source / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "empty.png").write_bytes(b"")
    (source / "text.jpg").write_text("no image")
    scene(200, 15).save(source / "flat.png")
    Image.new("L", (1, 1)).save(source / "dot.png")
    scene(2000, 16).save(source / "strip.png")
    for _ in range(2):  # the second time it only says so
        proposals.main([str(source), str(tmp_path / "out")])
        said = capsys.readouterr()
        assert "is complete" in said.out and "5 images rejected" in said.out and "dot.png" in said.out
    assert not said.err
    cache = Cache(tmp_path / "out")
    reasons = dict(cache.rejected)
    assert list(reasons) == ["dot.png", "empty.png", "flat.png", "text.jpg", "truncated.jpg"] and all(reasons.values())
    assert (
        "200 x 15" in reasons["flat.png"] and cache.paths == ["good.png", "strip.png"] == cache.image_list(source).paths
    )
    assert_inside(cache.boxes(1), (2000, 16))
    (source / "dot.png").unlink()  # a rejected file may go
    assert cache.image_list(source).paths == cache.paths
    shutil.copy(source / "good.png", source / "new.png")
    with pytest.raises(ValueError, match="gained 'new.png'"):
        cache.image_list(source)
    (source / "new.png").unlink()
    (source / "good.png").unlink()
    with pytest.raises(ValueError, match="lost 'good.png'"):
        cache.image_list(source)
    (source / "strip.png").unlink()
    with pytest.raises(ValueError, match="all 4 images are rejected, the first, 'empty.png'"):
        write_cache(source, tmp_path / "none")


@pytest.mark.parametrize("extra", [0, 40000])
def test_cache_is_float32_only_where_int16_is_too_small(tmp_path, extra):
    source = folder(tmp_path / "images", ["a.png"])
    Image.new("L", (20 + extra, 20)).save(source / "wide.png")
    cache = write_cache(source, tmp_path / "out", kind="random")
    assert cache._boxes.dtype == (np.float32 if extra else np.int16)
    assert_inside(cache.boxes(1), (20 + extra, 20))
    assert extra == 0 or cache.boxes(1).max() > 2**15


def test_cache_that_is_missing_unfinished_or_cut_is_refused(tmp_path):
    source = folder(tmp_path / "images", ["a.png", "b.png"])
    with pytest.raises(ValueError, match="no whole proposal cache"):
        Cache(tmp_path / "out")
    assert write_cache(source, tmp_path / "out", shard=(0, 2)) is None
    with pytest.raises(ValueError, match="no whole proposal cache"):
        Cache(tmp_path / "out")
    write_cache(source, tmp_path / "out", shard=(1, 2))
    os.truncate(tmp_path / "out" / "boxes.npy", 200)
    with pytest.raises(ValueError, match="no whole proposal cache"):
        Cache(tmp_path / "out")


def test_gt_boxes_are_those_of_the_json(tmp_path):
    source = folder(tmp_path / "images", ["a.png", "b.png", "c.png"]).parent / "set.json"
    exif = Image.Exif()
    exif[0x0112] = 6
    scene().save(
        tmp_path / "images" / "turned.jpg", exif=exif
    )  # its json speaks of the stored frame, training turns it
    rows = [(0, [10.5, 20, 30, 40.25], 0), (0, [150, 100, 90, 90], 0), (0, [0, 0, 50, 50], 1), (2, [1, 2, 3, 4], 0)]
    table = {
        "images": [{"id": i, "file_name": f"images/{name}", "width": 200, "height": 150}
                   for i, name in enumerate(("b.png", "a.png", "c.png", "turned.jpg"))],
        "annotations": [{"id": i, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": crowd}
                        for i, (image, box, crowd) in enumerate(rows)],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    source.write_text(proposals.json.dumps(table))
    cache = write_cache(source, tmp_path / "out", kind="gt")
    assert cache.paths == ["images/b.png", "images/a.png", "images/c.png"] == cache.image_list(source).paths
    assert cache.boxes(0).tolist() == [[10.5, 20, 40.5, 60.25], [150, 100, 200, 150]] and cache.scores(0).tolist() == [
        1,
        1,
    ]
    assert cache.boxes(1).shape == (0, 4) and cache.boxes(2).tolist() == [[1, 2, 4, 6]]
    assert cache.rejected[0][0] == "images/turned.jpg" and "another frame" in cache.rejected[0][1]
    rows[3][1][0] = 5
    source.write_text(proposals.json.dumps(table))
    with pytest.raises(ValueError, match="has labels"):
        write_cache(source, tmp_path / "out", kind="gt")


# ---------------------------------------------------------------- writing


def test_writing_is_the_same_by_shards_workers_and_after_damage(tmp_path):
    source = folder(tmp_path / "images", [f"{i:02}.png" for i in range(11)])
    (source / "05.png").write_bytes(b"broken")
    one = write_cache(source, tmp_path / "one", kind="random", draws=2)
    write_cache(source, tmp_path / "two", kind="random", draws=2, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two") and len(one) == 10
    out = tmp_path / "shards"
    for i in (3, 0, 15, 1):
        assert write_cache(source, out, kind="random", draws=2, shard=(i, 16)) is None
    part = max(out.glob("parts/*"), key=lambda f: f.stat().st_size if f.suffix == "" else 0)
    os.truncate(part, part.stat().st_size - 3)  # torn by a kill
    for i in range(16):
        last = write_cache(source, out, kind="random", draws=2, shard=(i, 16), workers=2)
    assert last is not None and content(out) == content(tmp_path / "one")


@pytest.mark.parametrize("damage", ["a bit", "zeros"])
def test_writing_goes_on_after_a_damaged_record(tmp_path, damage):
    source = folder(tmp_path / "images", [f"{i}.png" for i in range(4)])
    whole = content(write_cache(source, tmp_path / "whole", max_boxes=9).path)
    out = tmp_path / "out"
    assert write_cache(source, out, max_boxes=9, shard=(0, 2)) is None
    data = bytearray((out / "parts" / "0").read_bytes())
    if damage == "a bit":
        data[len(data) // 2 + 20] ^= 1
    else:  # what a power cut leaves of blocks that were never written
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (out / "parts" / "0").write_bytes(data)
    assert write_cache(source, out, max_boxes=9, shard=(1, 2)) is None  # the first half no longer counts as done
    assert content(write_cache(source, out, max_boxes=9, shard=(0, 2)).path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kib", [60, 120])
def test_full_disk_while_filling_or_joining_is_one_sentence_and_writing_goes_on(tmp_path, kib):
    """On a disk of its own: 80 KiB of parts, from which 48 KiB of arrays are joined."""
    source, disk = folder(tmp_path / "images", [f"{i}.png" for i in range(8)]), tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} {ROOT / 'proposals.py'} {source} {disk / 'out'} --kind random --max-boxes 512"
    shell = f"""mount -t tmpfs -o size={kib}k tmpfs {disk} || exit 9
        {command} --workers 1; [ $? = 2 ] || exit 1
        mount -o remount,size=1m {disk} && {command} && cp -r {disk / "out"} {tmp_path / "kept"}"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True)
    if done.returncode == 9 or "unshare failed" in done.stderr:
        pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("proposals.py: "))
    assert f"{disk / 'out'}: not written" in line and "No space left" in line and "make room" in line
    whole = write_cache(source, tmp_path / "whole", kind="random", max_boxes=512)
    assert content(tmp_path / "kept") == content(whole.path)


def test_classes_of_another_cache_and_no_clusters_are_refused(tmp_path, capsys):
    source = folder(tmp_path / "images", ["0.png", "1.png"])
    for seed in (0, 1):
        cache = write_cache(source, tmp_path / str(seed), kind="random", max_boxes=5, seed=seed)
        np.save(cache.path / "classes-2.npy", np.arange(10, dtype=np.int16) % 2)
    assert Cache(tmp_path / "1", tmp_path / "1" / "classes-2.npy").labels(0).tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="0/classes-2.npy .* of another cache"):
        Cache(tmp_path / "1", tmp_path / "0" / "classes-2.npy")
    with pytest.raises(SystemExit):
        proposals.main([str(source), str(tmp_path / "0"), "--kind", "random", "--max-boxes", "5", "--cluster", "0"])
    assert "--cluster 0" in capsys.readouterr().err


def test_writing_resumes_after_sigkill_and_refuses_a_second_writer(tmp_path):
    folder(tmp_path, ["0.png", "1.png"])
    source, out = tmp_path / "list.txt", tmp_path / "out"
    source.write_text("0.png\n1.png\n" * 40)
    whole = content(write_cache(source, tmp_path / "whole").path)
    process = get_context("fork").Process(target=write_cache, args=(source, out))
    process.start()
    part = out / "parts" / "0"
    while process.is_alive() and not (part.is_file() and part.stat().st_size):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="another process is writing"):
        write_cache(source, out)
    process.kill()  # the parent alone, by SIGKILL: its worker ends by itself
    process.join()
    with pytest.raises(ValueError, match="no whole proposal cache"):
        Cache(out)
    assert 0 < part.stat().st_size < (tmp_path / "whole" / "boxes.npy").stat().st_size
    write_cache(source, out)
    assert content(out) == whole


def test_writing_refuses_other_settings_and_changed_folders_by_name(tmp_path):
    source, out = folder(tmp_path / "images", ["a.png", "b.png"]), tmp_path / "out"
    assert write_cache(source, out, kind="random", shard=(0, 2)) is None
    with pytest.raises(ValueError, match="has shards 2, not 1"):
        write_cache(source, out, kind="random")
    for shard in ((1, 2), (0, 1)):  # unfinished, then complete (by any number of shards)
        with pytest.raises(ValueError, match="kind random, not edgeboxes"):
            write_cache(source, out, shard=shard)
        with pytest.raises(ValueError, match="seed 0, not 3"):
            write_cache(source, out, kind="random", seed=3, shard=shard)
        shutil.copy(source / "a.png", source / "c.png")
        with pytest.raises(ValueError, match="gained 'c.png'"):
            write_cache(source, out, kind="random", shard=shard)
        (source / "c.png").unlink()
        (source / "b.png").rename(tmp_path / "b.png")
        with pytest.raises(ValueError, match="lost 'b.png'"):
            write_cache(source, out, kind="random", shard=shard)
        (tmp_path / "b.png").rename(source / "b.png")
        assert write_cache(source, out, kind="random", shard=shard) is not None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="it holds thesis.txt"):
        write_cache(source, tmp_path / "mine")


def test_writing_refuses_another_order_of_the_list(tmp_path):
    folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    write_cache(tmp_path / "list.txt", tmp_path / "out", kind="random", shard=(0, 2))
    (tmp_path / "list.txt").write_text("b.png\na.png\n")
    with pytest.raises(ValueError, match="another order"):
        write_cache(tmp_path / "list.txt", tmp_path / "out", kind="random", shard=(1, 2))


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--edge-model", "nowhere.yml.gz"], "nowhere.yml.gz is missing"),
        (["--edge-model", "proposals.py"], "no forest"),
        (["--draws", "2"], "--draws is for random"),
        (["--kind", "random", "--edge-model", "x"], "--edge-model for edgeboxes"),
        (["--kind", "gt"], "COCO json"),
        (["--shard", "2/2"], "shard i/n"),
        (["--max-boxes", "0"], "max-boxes"),
    ],
)
def test_command_refuses_in_one_sentence(tmp_path, capsys, flags, text):
    folder(tmp_path / "images", ["a.png"])
    with pytest.raises(SystemExit) as caught:
        proposals.main([str(tmp_path / "images"), str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and text in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_command_says_when_opencv_lacks_ximgproc(tmp_path, monkeypatch):
    folder(tmp_path, ["a.png"])
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(ValueError, match="opencv-contrib-python-headless"):
        write_cache(tmp_path, tmp_path / "out")


def test_command_takes_its_shard_from_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert proposals.parse_args(["in", "out"]).shard == (2, 4)
    assert proposals.parse_args(["in", "out", "--shard", "0/3"]).shard == (0, 3)


def write_forest(path):
    """A structured forest of one tree with one question: is its centre a strong gradient? Then a vertical line."""
    options = dict(stride=2, shrinkNumber=2, patchSize=32, patchInnerSize=16, numberOfGradientOrientations=4,
                   gradientSmoothingRadius=0, regFeatureSmoothingRadius=2, ssFeatureSmoothingRadius=8,
                   gradientNormalizationRadius=4, selfsimilarityGridSize=5, numberOfTrees=1,
                   numberOfTreesToEvaluate=1)  # fmt: skip
    line = [16 * 8 + y for y in range(16)]
    lines = ["%YAML:1.0", "---", "options:", *(f"   {k}: {v}" for k, v in options.items())]
    lines += ["childs:", "   - [ 2, 0, 0 ]", "featureIds:", f"   - [ {3 * 256 + 8 * 16 + 8}, 0, 0 ]"]
    lines += ["thresholds:", "   - [ 0.05, 0., 0. ]", "edgeBoundaries:", f"   - [ 0, 0, 0, {len(line)} ]"]
    lines += ["edgeBins:", f"   - {line}"]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def test_edge_model_replaces_the_edge_map(tmp_path):
    source, model = folder(tmp_path / "images", ["a.png"]), write_forest(tmp_path / "model.yml.gz")
    cache = write_cache(source, tmp_path / "out", edge_model=str(model), max_boxes=40)
    assert_inside(cache.boxes(0), (200, 150))
    assert len(cache.boxes(0)) > 1 and (np.diff(cache.scores(0)) <= 0).all()
    assert not np.array_equal(cache.boxes(0), edge_boxes(load_image(source / "a.png"), 40)[0])


# ---------------------------------------------------------------- the bar on photographs


def recall(boxes, truth, top=30, iou=0.7):
    """Share of the true boxes (lists of tensors, one per image) that one of the first `top` boxes overlaps by `iou`."""
    hits = [box_iou(t, b[:top]).amax(1) >= iou for b, t in zip(boxes, truth, strict=True) if len(t)]
    return sum(float(hit.sum()) for hit in hits) / sum(map(len, hits))


def random_baseline(size, g, count=30):
    """Area fraction log-uniform in [0.01, 1], aspect log-uniform in [1/3, 3], sides cut to the image, place uniform."""
    u = torch.rand(count, 4, generator=g)
    area, aspect, size = 0.01 ** u[:, :1] * size[0] * size[1], 3 ** (2 * u[:, 1:2] - 1), torch.tensor(size)
    sides = torch.cat([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).minimum(size)
    corners = u[:, 2:] * (size - sides)
    return torch.cat([corners, corners + sides], 1)


@pytest.mark.skipif(not COCO.is_dir(), reason="needs the photographs of shared/data/coco_cc")
def test_edge_boxes_recall_three_times_what_random_boxes_do(capsys):
    found, truth, sizes = [], [], []
    for split in ("train", "val"):
        labels = read_annotations(COCO / f"{split}.json")
        for image, boxes, crowd in zip(labels.images, labels.boxes_xyxy, labels.crowd, strict=True):
            picture = load_image(labels.root / image["path"])
            found.append(torch.from_numpy(edge_boxes(picture)[0]))
            truth.append(boxes[~crowd & ((boxes[:, 2:] - boxes[:, :2]) >= 32).all(1)])
            sizes.append(picture.size)
    chance = [
        recall([random_baseline(size, stream(seed, i)) for i, size in enumerate(sizes)], truth) for seed in range(20)
    ]
    ours, chance = recall(found, truth), sum(chance) / len(chance)
    with capsys.disabled():
        print(f"\nrecall at IoU 0.7 of the top 30 on {len(truth)} photographs, {sum(map(len, truth))} boxes: "
              f"EdgeBoxes {ours:.3f}, random {chance:.3f}, ratio {ours / chance:.2f}")  # fmt: skip
    assert len(truth) == 85 and ours >= 3 * chance


def test_boxes_of_a_detector_become_a_cache(tmp_path):
    from proposals import write_boxes

    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 48)).save(photos / name)
    images = list_images(photos)
    boxes, scores = np.array([[1.5, 2, 30.25, 40], [0, 0, 64, 48]], np.float32), np.array([0.9, 0.2], np.float32)
    thin = np.concatenate([boxes, [[5, 5, 5, 9]]]).astype(np.float32)  # a side too short for float32
    found = [((64, 48), thin, np.append(scores, np.float32(0.1))), ((64, 48), boxes[:0], scores[:0])]
    cache = write_boxes(photos, out, images, iter(found))
    assert cache.kind == "model" and len(cache) == 2 and cache.image_list(photos).paths == ["a.png", "b.png"]
    assert np.array_equal(cache.boxes(0), boxes) and np.array_equal(cache.scores(0), scores) and not len(cache.boxes(1))
    with pytest.raises(ValueError, match="earlier export"):
        write_boxes(photos, out, images, iter(found))
    stored = np.load(out / "boxes.npy")
    stored[1, 2] = stored[1, 0]
    np.save(out / "boxes.npy", stored)
    with pytest.raises(ValueError, match="image 0 is empty or outside"):
        Cache(out).boxes(0)
    np.save(out / "scores.npy", np.full(2, np.nan, np.float32))
    with pytest.raises(ValueError, match="scores.npy is damaged at image 0"):
        Cache(out).scores(0)
    with pytest.raises(ZeroDivisionError):  # an export that is cut short leaves nothing that reads as a cache
        write_boxes(photos, tmp_path / "cut", images, (1 / 0 for _ in range(1)))
    with pytest.raises(ValueError, match="no whole proposal cache"):
        Cache(tmp_path / "cut")
    assert len(write_boxes(photos, tmp_path / "cut", images, iter(found))) == 2


def test_two_exports_into_one_folder_are_refused(tmp_path):
    from proposals import write_boxes

    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    out, seen = tmp_path / "out", []
    other = f"import data, proposals; proposals.write_boxes(0, {str(out)!r}, data.list_images({str(tmp_path)!r}), ())"

    def found():
        seen.append(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, cwd=ROOT).stderr)
        yield (64, 48), np.array([[1, 2, 30, 40]], np.float32), np.ones(1, np.float32)

    assert len(write_boxes(tmp_path, out, list_images(tmp_path), found()).boxes(0)) == 1
    assert "another process is writing" in seen[0]
