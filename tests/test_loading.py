"""The fast loader: pixels against PIL, colours on the device against the worker's, the benches, long lists of paths."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench import speed
from colour import change_colour, change_colours, draw_colour
from data import ImageList, pad_stack, stream
from proposals import Paths
from views import ViewDataset, collate_views, cut

LEVELS = 1.0  # of 255: the largest mean difference of an image coloured on the device from one of the worker


def pictures(count, h, w, seed=0):
    """Photograph-like colour noise, flat grey, black, white and saturated ones: (count, h, w, 3) uint8."""
    g = np.random.default_rng(seed)
    images = []
    for i in range(count):
        small = g.integers(0, 256, (max(2, h // (3 + i % 7)), max(2, w // (3 + i % 7)), 3), np.uint8)
        images.append(np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)))
    images = np.stack(images)
    if count > 5:
        images[:3] = np.array([(0, 0, 0), (255, 255, 255), (250, 3, 90)])[:, None, None]
        images[3] = images[3, ..., :1]
    return images


def chw(images):
    return torch.from_numpy(images).movedim(-1, -3)


@pytest.fixture
def photos(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    for seed, (name, size) in enumerate(zip(names, [(120, 160), (150, 90), (100, 100)], strict=True)):
        Image.fromarray(pictures(1, *size, seed)[0]).save(tmp_path / name)
    return ImageList(tmp_path, names)


def views_of(photos, **kw):
    return ViewDataset(photos, **{"short_sides": (96, 112), "longest": 160, "crop_size": 32} | kw)


# ---------------------------------------------------------------- colours on the device


@pytest.mark.parametrize("size", [(40, 56), (7, 3), (1, 1), (128, 128)])
def test_colours_of_the_device_are_the_workers(size):
    images, colours = pictures(64, *size), draw_colour(stream(1, *size), 64)
    want = chw(np.stack([change_colour(*pair) for pair in zip(images, colours.tolist(), strict=True)]))
    got = change_colours(chw(images), colours)
    assert got.dtype == torch.uint8 and got.shape == want.shape
    levels = (got.float() - want.float()).abs().mean((1, 2, 3))
    assert levels.max() <= 2 * LEVELS and levels.mean() <= LEVELS / 2, (levels.max(), levels.mean())


@pytest.mark.parametrize("saturation", [0.7, 0.85, 1.13, 1.3])
def test_saturation_leaves_grey_alone(saturation):
    grey = torch.arange(256, dtype=torch.uint8).expand(3, 1, -1)[None]
    colours = torch.tensor([[1, 1, 1, saturation, 0, 2, 0, 1, 3, 0, 0.0]])
    assert torch.equal(change_colours(grey, colours), grey)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.integers(0, 20), st.integers(0, 20))
def test_padding_is_neither_seen_nor_touched(seed, h, w, below, beside):
    images, colours = pictures(3, h, w, seed), draw_colour(stream(2, seed), 3)
    alone = change_colours(chw(images), colours)
    padded = torch.randint(0, 256, (3, 3, h + below, w + beside), dtype=torch.uint8, generator=stream(3, seed))
    mask = torch.ones(3, h + below, w + beside, dtype=torch.bool)
    padded[:, :, :h, :w], mask[:, :h, :w] = chw(images), False
    got = change_colours(padded, colours, mask)
    assert (got[:, :, :h, :w].int() - alone.int()).abs().max() <= 1  # sums in another order, then rounded
    assert not got.masked_select(mask[:, None]).any()


def test_each_image_has_its_own_colours_and_no_draw_changes_nothing():
    x, colours = chw(pictures(12, 20, 24)), draw_colour(stream(4), 12)
    order = torch.randperm(12, generator=stream(5))
    assert torch.equal(change_colours(x[order], colours[order]), change_colours(x, colours)[order])
    nested = change_colours(x.unflatten(0, (2, 3, 2)), colours.unflatten(0, (2, 3, 2)))
    assert torch.equal(nested.flatten(0, 2), change_colours(x, colours))
    colours[:, [0, 9, 10]] = 0
    assert torch.equal(change_colours(x, colours), x)


def test_colours_on_the_device_wait_for_nothing():
    """On the meta device there are no values: whatever reads one on the host raises."""
    x, mask = torch.empty(2, 3, 3, 40, 50, dtype=torch.uint8, device="meta"), torch.empty(2, 3, 40, 50, device="meta")
    assert change_colours(x, torch.empty(2, 3, 11, device="meta"), mask.bool()).shape == x.shape


@pytest.mark.parametrize("method", ["siamese", "updetr", "detreg"])
def test_batches_coloured_on_the_device_are_the_workers(photos, method):
    class Two:  # fewer than DETReg's regions
        classes = None

        def boxes(self, index, epoch):
            return np.array([[5, 5, 60, 70], [20, 10, 85, 80]], np.float32)

    def batch(**kw):
        data = views_of(photos, proposals=Two(), method=method, num_regions=4, **kw)
        return collate_views([data[3, i] for i in range(3)]).to("cpu")

    worker, plain, device = batch(), batch(augment=False), batch(augment_on="device")
    assert worker.x_colours is None and torch.equal(worker.coloured().x, worker.x)
    assert torch.equal(device.x, plain.x) and torch.equal(device.crops, plain.crops)
    assert device.crop_colours.shape == (*device.boxes.shape[:3], 11)
    assert (device.x_colours is None) == (method != "siamese")  # single views keep their colours
    done = device.coloured()
    assert done.x_colours is done.crop_colours is None
    for name in ("x", "crops"):
        levels = (getattr(done, name).float() - getattr(worker, name).float()).abs().mean((-1, -2, -3))
        assert levels.max() <= 2 * LEVELS and levels.mean() <= LEVELS, name
    for name in ("mask", "boxes", "rois", "valid", "index"):
        assert torch.equal(getattr(done, name), getattr(worker, name)), name
    assert not done.crops[~done.valid].any()
    none = batch(augment=False, augment_on="device")
    assert none.x_colours is none.crop_colours is None and torch.equal(none.x, plain.x)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("shrink", [0.4, 1.0, 1.3, 2.0, 2.9, 3.1, 6.0])
def test_cut_puts_pixels_where_boxes_say_at_every_scale(shrink):
    """A white box: its centroid and its area, in fractions of a pixel; and PIL's own resizing, in grey levels."""
    w, h = (round(50 * shrink * k) for k in (2.4, 2))
    x0, y0, x1, y1 = box = [round(shrink * v) + 10 for v in (31, 22, 77, 68)]
    image = np.zeros((h + 20, w + 20, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    rect, size = (10.25, 9.6, 10.25 + w, 9.6 + h), (120, 100)
    got = cut(image, rect, (w + 20, h + 20), size)
    assert got.shape == (100, 120, 3) and got.dtype == np.uint8
    white = got[..., 0] / 255
    scale = np.divide(size, (w, h))
    want = [((box[i] + box[i + 2]) / 2 - rect[i]) * scale[i] for i in (0, 1)]
    found = [(white.sum(axis) * (np.arange(size[axis]) + 0.5)).sum() / white.sum() for axis in (0, 1)]
    assert np.abs(np.subtract(found, want)).max() < 0.06
    assert white.sum() == pytest.approx((x1 - x0) * (y1 - y0) * scale.prod(), rel=0.01)
    photo = pictures(7, h + 20, w + 20)[6]
    pil = Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR, rect)
    assert np.abs(cut(photo, rect, (w + 20, h + 20), size) - np.asarray(pil, float)).mean() < 2


def test_pixels_stay_channels_last_from_photograph_to_batch(photos):
    data = views_of(photos)
    batch = collate_views([data[0, i] for i in range(3)])
    for images in (batch.x.flatten(0, 1), batch.crops.flatten(0, 2)):
        assert images.is_contiguous(memory_format=torch.channels_last)
    x, mask = pad_stack([item.contiguous() for item in data[0, 0].x])
    assert x.is_contiguous() and torch.equal(x, pad_stack(list(data[0, 0].x))[0]) and not mask.any()


# ---------------------------------------------------------------- the benches


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_data_bench_runs_with_equal_boxes_and_near_pixels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.timing.RESULTS", tmp_path / "speed.jsonl")
    speed.main(["data", "--images", "2", "--rounds", "1"])
    (entry,) = results(tmp_path / "speed.jsonl")
    assert entry["bench"] == "data" and set(entry["released_over"]) < set(entry["samples_per_s"])
    means = {(order, name): mean for order, v in entry["grey_levels"].items() for name, (mean, _) in v.items()}
    assert means["one resize", "views"] < 1 and max(means.values()) < 4
    assert "times the released order" in capsys.readouterr().out


@pytest.mark.slow
def test_proposals_bench_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.timing.RESULTS", tmp_path / "speed.jsonl")
    speed.main(["proposals", "--images", "2", "--entries", "1000"])
    *kinds, start = results(tmp_path / "speed.jsonl")
    assert [entry["kind"] for entry in kinds] == ["edgeboxes", "selective-search"]
    assert start["images"] == 1000 and start["open_s"] < 2 and start["resident_mb"] < 100


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=6), st.integers(-7, 7), st.integers(-7, 7))
@settings(deadline=None, derandomize=True)
def test_paths_are_the_list(names, i, j):
    paths = Paths(names)
    assert list(paths) == names == paths and names[i:j] == paths[i:j] and len(paths) == len(names)
    if -len(names) <= i < len(names):
        assert paths[i] == names[i]
    else:
        with pytest.raises(IndexError):
            paths[i]
