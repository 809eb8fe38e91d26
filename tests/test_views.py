"""View construction (paper Sec. 3.2): rectangles, boxes, pixels, batches. O-n are oracles, Bn bugs, of the spec."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou

import views
from bench.loading import pil_colour
from data import ImageList, resize_size, stream
from proposals import write_cache
from views import ViewDataset, choose_regions, collate_views, diagonal_pair, draw_colour, map_boxes, two_rectangles

UNIT = (0, 0, 1, 1)


class Fixed:
    """Proposals that are the same for every image and epoch."""

    def __init__(self, boxes, dtype=np.float32):
        self.array = np.asarray(boxes, dtype).reshape(-1, 4)

    def boxes(self, index, epoch):
        return self.array


def area(r):
    return max(0, r[2] - r[0]) * max(0, r[3] - r[1])


def intersection(a, b):
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def iou(a, b):
    common = area(intersection(a, b))
    return common / (area(a) + area(b) - common)


def texture(w, h, seed=0, coarse=8):
    """Smooth colour noise, in which every place looks different."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, h // coarse), max(2, w // coarse), 3), np.uint8)
    return Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)


def xyxy(boxes):
    return box_convert(boxes.double(), "cxcywh", "xyxy")


@pytest.fixture
def folder(tmp_path):
    """Images of six shapes, one name with dots."""
    names = ["a.png", "b.png", "sub.dir/c.v2.png", "d.png", "e.png", "f.png"]
    sizes = [(200, 150), (150, 200), (160, 160), (240, 120), (120, 260), (64, 48)]
    (tmp_path / "sub.dir").mkdir()
    for seed, (name, size) in enumerate(zip(names, sizes, strict=True)):
        texture(*size, seed).save(tmp_path / name)
    return ImageList(tmp_path, names)


def dataset(images, proposals=None, **kw):
    kw = {"short_sides": (96, 112), "longest": 160, "crop_size": 32} | kw
    return ViewDataset(images, proposals, **kw)


def painted(path, box, size=(240, 180), exif=None):
    """A black image with a white box, as a one-image list."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(path, **({} if exif is None else {"exif": exif, "quality": 100, "subsampling": 0}))
    return ImageList(path.parent, [path.name])


# ---------------------------------------------------------------- rectangles


@pytest.mark.parametrize("tau, r", [(0.3, 0.5144243855), (0.5, 0.6898979486), (0.7, 0.8306388378), (0, 0), (1, 1)])
def test_diagonal_pair_has_iou_tau(tau, r):
    outer = (10.0, 20.0, 410.0, 340.0)
    a, b = diagonal_pair(outer, tau)
    common = intersection(a, b)
    assert iou(a, b) == pytest.approx(tau, abs=1e-12)  # O-1, O-2
    assert (common[2] - common[0]) / 400 == pytest.approx(r, abs=1e-9)
    assert area(common) / area(a) == pytest.approx(2 * tau / (1 + tau), abs=1e-12)  # O-5
    assert a[:2] == outer[:2] and b[2:] == outer[2:]
    assert (a[2] - a[0]) / 400 == pytest.approx((1 + r) / 2, abs=1e-9)


def test_shrinking_keeps_overlap_and_aspect():
    outer, values = (5, 7, 305, 232), []
    common = intersection(*diagonal_pair(outer, 0.5))
    published = [iou(*diagonal_pair(outer, 0.5, *u)) for u in ((0, 0), (1, 0), (0.5, 0.5), (1, 1))]
    assert published == pytest.approx([0.5, 2 / 3, 0.678083, 1], abs=1e-6)  # O-3
    for u1, u2 in torch.rand(2000, 2, generator=stream(1), dtype=torch.float64).tolist():
        a, b = diagonal_pair(outer, 0.5, u1, u2)
        assert intersection(a, b) == intersection(b, a) == pytest.approx(common, abs=1e-9)  # O-4
        for r in (a, b, common):
            assert (r[2] - r[0]) / (r[3] - r[1]) == pytest.approx(300 / 225)  # O-6
            assert intersection(r, outer) == pytest.approx(r)
        values.append(iou(a, b))
    assert min(values) >= 0.5 - 1e-12 and max(values) <= 1
    assert np.mean(values) == pytest.approx(0.688, abs=0.01)  # O-3


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.integers(1, 700), st.integers(1, 700), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1))
def test_round_pair_never_falls_below_tau(w, h, tau, u1, u2):
    outer = (31, 62, 31 + w, 62 + h)  # decision 9
    a, b = views.round_pair(*diagonal_pair(outer, tau, u1, u2))
    assert iou(a, b) >= tau - 1e-12 and area(intersection(a, b)) > 0
    assert all(isinstance(v, int) for v in a + b)
    for r in (a, b):
        assert intersection(r, outer) == r


def test_two_rectangles_lie_inside_and_keep_tau():
    for seed in range(2000):
        g = stream(2, seed)
        width, height = (int(views.uniform(g, 16, 600)) for _ in range(2))
        tau = (0.3, 0.5, 0.7)[seed % 3]
        outer, a, b = two_rectangles(width, height, tau, g)
        assert 0 <= outer[0] < outer[2] <= width and 0 <= outer[1] < outer[3] <= height
        assert intersection(a, outer) == a and intersection(b, outer) == b
        assert iou(a, b) >= tau
        for rect in (a, b):  # O-8, B5: the overlap ends exactly where its view does
            box = map_boxes(views.row(*intersection(a, b)), rect, UNIT)[0].tolist()
            assert min(box) >= 0 and max(box) <= 1
            assert [v in (0, 1) for v in box] == [v == w for v, w in zip(intersection(a, b), rect, strict=True)]


def test_outer_rectangle_covers_half_or_more():
    shares = []
    for seed in range(1000):
        x0, y0, x1, y1 = views.outer_rectangle(640, 480, stream(3, seed))
        assert 0.74 < (x1 - x0) / (y1 - y0) < 1.345  # O-7
        shares.append((x1 - x0) * (y1 - y0) / (640 * 480))
    assert min(shares) > 0.498 and max(shares) <= 1 and 0.6 < np.mean(shares) < 0.72


@pytest.mark.parametrize("aspect, rate", [(1.0, 0.0), (2.0, 0.43), (3.0, 1.0)])
def test_outer_rectangle_falls_back_in_long_images(aspect, rate):
    width, height = round(300 * aspect), 300
    centred = (width - 400) // 2
    fallback = (centred, 0, centred + 400, 300)
    hits = [views.outer_rectangle(width, height, stream(4, seed)) == fallback for seed in range(500)]
    assert np.mean(hits) == pytest.approx(rate, abs=0.07)  # O-7: 4/9 of an image of aspect 3
    assert views.outer_rectangle(300, 900, stream(4)) == (0, 250, 300, 650)


def test_views_swap_half_of_the_time():
    first = 0
    for seed in range(1000):
        outer, one, two = two_rectangles(400, 300, 0.5, stream(5, seed), shrink=False)
        assert {one[:2], two[:2]} >= {outer[:2]} and {one[2:], two[2:]} >= {outer[2:]}
        first += one[:2] == outer[:2]
        common, far, near = intersection(one, two), one[2:], one[:2]
        assert (common[2:] == far) != (common[:2] == near)  # O-8: the overlap touches one corner of view 1, never both
    assert 0.45 < first / 1000 < 0.55


# ---------------------------------------------------------------- boxes


def test_map_boxes_worked_case():
    a, b = diagonal_pair((0, 0, 400, 320), 0.5)  # O-9
    view = (0, 0, 400, 320)
    box = torch.tensor([[100.0, 80, 200, 160]], dtype=torch.float64)
    in_b = map_boxes(map_boxes(box, view, a), b, view)
    torch.testing.assert_close(in_b, torch.tensor([[26.5986, 21.2789, 126.5986, 101.2789]]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(map_boxes(map_boxes(in_b, view, b), a, view), box, atol=1e-9, rtol=0)
    common = torch.tensor([intersection(a, b)], dtype=torch.float64)
    expected = torch.tensor([[73.4014, 58.7211, 400, 320], [0, 0, 326.5986, 261.2789]]).double()
    got = torch.cat([map_boxes(common, a, view), map_boxes(common, b, view)])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(map_boxes(map_boxes(box, a, UNIT), UNIT, a), box, atol=1e-9, rtol=0)


def test_map_boxes_flips_and_resizes():
    box = torch.tensor([[10.0, 20, 50, 60]])
    flip = lambda boxes: map_boxes(boxes, (0, 0, 200, 100), (200, 0, 0, 100))[:, [2, 1, 0, 3]]  # noqa: E731
    assert flip(box).tolist() == [[150, 20, 190, 60]]  # O-11
    assert flip(flip(box)).tolist() == box.tolist()
    base = resize_size(500, 375, 400, 600)
    full = map_boxes(torch.tensor([[0.0, 0, 500, 375]]), (0, 0, 500, 375), (0, 0, *base))
    assert base == (533, 400) and full.tolist() == [[0, 0, 533, 400]]  # O-12: not 533.33


def test_regions_keep_overlap_first_and_file_order():
    overlap = (100, 100, 200, 180)
    boxes = torch.tensor([[110.0, 110, 190, 170], [0, 0, 90, 90], [150, 90, 300, 175], [120, 120, 125, 125],
                          [100, 100, 160, 160], [105, 105, 195, 175]]).double()  # fmt: skip
    chosen, rows = choose_regions(boxes, overlap, 4, stream(0))  # O-14: outside and small ones are left out
    assert chosen.tolist() == [[100, 100, 200, 180], [110, 110, 190, 170], [150, 100, 200, 175], [100, 100, 160, 160]]
    assert rows.tolist() == [-1, 0, 2, 4]
    again, _ = choose_regions(boxes, overlap, 4, stream(99))  # O-17: enough survivors, nothing drawn
    assert torch.equal(chosen, again)


def test_region_nms_leaves_out_regions_that_clipping_made_alike():
    overlap = (100, 100, 200, 180)
    boxes = torch.tensor(
        [[110.0, 90, 190, 300], [110, 60, 190, 170], [150, 100, 210, 170], [0, 100, 160, 180]]
    ).double()
    everything = choose_regions(boxes, overlap, 5, stream(0))[0]
    assert torch.equal(everything, choose_regions(boxes, overlap, 5, stream(1), nms_iou=1.0)[0])
    assert torch.equal(everything[1:], views.clip(boxes, overlap))
    chosen = choose_regions(boxes, overlap, 4, stream(0), nms_iou=0.7)[0]  # the second is 7/8 of the first
    assert torch.equal(chosen, everything[[0, 1, 3, 4]])  # best first, as without
    spread = torch.rand(200, 4, generator=stream(11), dtype=torch.float64).sort(dim=1).values * 300
    few = choose_regions(spread, (0, 0, 300, 300), 6, stream(0), nms_iou=0.4)[0][1:]
    assert (box_iou(few, few).fill_diagonal_(0) <= 0.4).all()
    with pytest.raises(ValueError, match="region_nms 0"):
        ViewDataset(ImageList(".", ()), region_nms=0.0)


@pytest.mark.parametrize("box", [[0, 0, 99, 99], [0, 120, 100, 170], [210, 190, 400, 300], [250, 260, 210, 190],
                                 [190, 170, 110, 110], [float("nan")] * 4])  # fmt: skip
def test_outside_and_inverted_proposals_are_never_returned(box):
    overlap = (100, 100, 200, 180)
    boxes = torch.tensor([box, [110, 110, 190, 170]]).double()
    chosen, rows = choose_regions(boxes, overlap, 2, stream(0))  # O-16
    assert chosen[1].tolist() == [110, 110, 190, 170] and rows.tolist() == [-1, 1]
    assert choose_regions(boxes[:1], overlap, 2, stream(0))[1].tolist() == [-1, -1]


def test_border_touching_proposals_survive(folder):
    """B5, B6, O-15: the released code drops 3-4 % of them, and keeps padded ones as (-1, -1, -1, -1)."""
    spread = torch.rand(60, 4, generator=stream(6), dtype=torch.float64).numpy() * 300 - 50
    spread = np.sort(spread.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    touching = Fixed(np.concatenate([[[0, 0, 1000, 1000], [-50, 40, 90, 1000]], spread]))
    whole, few = Fixed([[0, 0, 500, 500]] * 9), Fixed([[0, 0, 1000, 1000], [60, 40, 1000, 110]])
    for proposals in (touching, whole, few, Fixed([]), None):
        data = dataset(folder, proposals, crops=False, augment=False, jitter=0.4)
        for seed in range(200):
            item = data[seed, seed % len(folder.paths)]
            for boxes in (item.boxes, item.rois):
                corners = xyxy(boxes)
                assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
                assert (boxes[..., 2:] > 0).all()
            share = item.boxes[..., 2:].prod(-1) / item.boxes[:, :1, 2:].prod(-1)  # of the overlap
            assert (share >= 0.05 * 0.8**2 - 1e-5).all() and torch.allclose(share[0], share[1], rtol=1e-4)
            if proposals is touching or proposals is None:
                assert (share >= 0.05 - 1e-6).all()
            assert proposals is not whole or torch.allclose(share, torch.ones(2, 10), atol=1e-6)  # none was dropped
            assert item.fallback == (proposals is not None and len(proposals.array) == 0)


def test_one_survivor_is_repeated_with_jitter():
    overlap, box = (100, 100, 300, 260), torch.tensor([[150.0, 130, 250, 210]]).double()
    for seed in range(200):
        chosen, rows = choose_regions(box, overlap, 10, stream(7, seed))  # O-17
        shift = (chosen[2:] - box) / torch.tensor([100, 80, 100, 80])
        assert chosen[1].tolist() == box[0].tolist() and rows.tolist() == [-1] + [0] * 9
        assert shift.abs().max() < 0.1 and (shift != 0).all()
    edge = choose_regions(torch.tensor([[100.0, 100, 300, 260]]).double(), overlap, 10, stream(7))[0]
    assert (edge[:, :2] >= 100).all() and (edge[:, 2:] <= torch.tensor([300, 260])).all()
    three = torch.tensor([[110.0, 110, 200, 200], [150, 150, 290, 250], [120, 110, 290, 150]]).double()
    repeated = choose_regions(three, overlap, 10, stream(7))[0][1:]
    assert torch.equal(repeated[:3], three)
    for i, copy in enumerate(repeated):
        assert (copy - three[i % 3]).abs().max() < 17  # in turn


def test_random_regions_have_the_published_statistics():
    overlap, counts, shares = (50, 60, 350, 285), [], []
    for seed in range(3000):
        boxes = views.random_regions(overlap, stream(8, seed))  # O-19
        sides = boxes[:, 2:] - boxes[:, :2]
        aspect = sides[:, 0] / sides[:, 1]
        assert aspect.min() >= 1 / 8 - 1e-9 and aspect.max() <= 8 + 1e-9
        assert torch.equal(views.clip(boxes, overlap), boxes)
        counts.append(len(boxes))
        shares.append(sides.prod(dim=1)[:9] / (300 * 225))
    assert min(counts) >= 9 and np.mean(counts) == pytest.approx(50, abs=5)
    quantiles = torch.cat(shares).quantile(torch.tensor([0, 0.1, 0.5, 0.9]).double()).tolist()
    assert quantiles == pytest.approx([0.05, 0.057, 0.101, 0.268], abs=0.01)
    assert torch.equal(views.random_regions(overlap, stream(8, 5)), views.random_regions(overlap, stream(8, 5)))
    assert choose_regions(torch.empty(0, 4), overlap, 150, stream(8))[0].shape == (150, 4)  # B16: more than survive


def test_no_proposal_is_flagged_and_stays_the_same_image(folder):
    """O-18, B7, B8: no other item steps in, and a set in which no image has proposals ends."""
    batch = collate_views([dataset(folder, Fixed([]))[0, i] for i in range(len(folder.paths))])
    assert batch.fallback.all() and batch.index.tolist() == list(range(len(folder.paths)))
    assert batch.boxes.shape == (2, 6, 10, 4) and len(batch.boxes[0, 0].unique(dim=0)) == 10
    random, none = dataset(folder)[0, 0], dataset(folder, Fixed([]))[0, 0]
    assert not random.fallback and torch.equal(random.boxes, none.boxes)  # one sampler


def test_arrays_of_any_type_and_any_number_of_regions_are_taken(folder):
    boxes = [[10, 10, 90, 90], [30, 20, 120, 100]]
    items = [dataset(folder, Fixed(boxes, dtype))[0, 2] for dtype in (np.float32, np.int16, np.int64, np.float64)]
    assert all(torch.equal(item.boxes, items[0].boxes) for item in items)  # B4: no type alias of an old NumPy
    for regions in (1, 2, 7):
        item = dataset(folder, Fixed([[0, 0, 150, 150]]), num_regions=regions)[0, 0]
        assert item.boxes.shape == (2, regions, 4) and item.crops.shape == (2, regions, 3, 32, 32) and not item.fallback


def test_jitter_touches_only_the_rois(folder):
    near, far = (dataset(folder, jitter=jitter, augment=False)[0, 1] for jitter in (0.0, 0.1))  # O-39
    torch.testing.assert_close(near.rois, near.boxes, atol=1e-6, rtol=0)
    assert torch.equal(near.boxes, far.boxes) and torch.equal(near.crops, far.crops) and torch.equal(near.x, far.x)
    shift = (xyxy(far.rois) - xyxy(far.boxes)) / far.boxes[..., 2:].tile(2)
    assert (shift != 0).float().mean() > 0.8 and shift.abs().max() < 0.1  # the overlap's outer edges are clamped
    boxes = torch.tensor([[0.4, 0.4, 0.6, 0.5]]).double().expand(20000, 4)
    noise = (views.jitter_boxes(boxes, 0.1, stream(9), UNIT) - boxes) / torch.tensor([0.2, 0.1, 0.2, 0.1]) / 0.1
    assert noise.std().item() == pytest.approx(0.416, abs=0.002)
    assert torch.corrcoef(noise.T).triu(1).abs().max() < 0.03


# ---------------------------------------------------------------- pixels


def test_painted_rectangle_is_where_the_boxes_say(tmp_path):
    """O-13, O-11, B17: in both views the centroid of white is the centre of region 1, whose crop is all white."""
    box, worst, seen = (70, 62, 130, 118), 0.0, set()  # off centre, so that a flip shows
    images = painted(tmp_path / "p.png", box)
    data = ViewDataset(images, Fixed([box]), num_regions=2, augment=False, short_sides=(320, 416, 480))
    for epoch in range(60):
        item = data[epoch, 0]
        corners, size = xyxy(item.boxes[:, 1]), (item.x.shape[3], item.x.shape[2])
        corners = corners * torch.tensor(size * 2)
        if corners.min() < 2 or (torch.tensor(size * 2) - corners).min() < 2:
            continue  # cut by the overlap
        for v in range(2):
            white = item.x[v].float().mean(0) / 255
            ys, xs = torch.meshgrid(*(torch.arange(n) + 0.5 for n in white.shape), indexing="ij")
            centroid = torch.stack([(white * xs).sum(), (white * ys).sum()]) / white.sum()
            worst = max(worst, (centroid - (corners[v, :2] + corners[v, 2:]) / 2).abs().max().item())
            assert white.sum().item() == pytest.approx((corners[v, 2:] - corners[v, :2]).prod().item(), rel=0.01)
        inside = item.crops[:, 1, :, 3:-3, 3:-3]
        assert inside.min() > 250
        seen.add((corners[0, 0] > corners[1, 0]).item())
    assert worst < 0.1, worst  # measured 0.04 px
    assert seen == {True, False}  # both orders of the views were met


def test_flip_is_shared_and_drawn_half_of_the_time(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None], (150, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    data = dataset(ImageList(tmp_path, ["ramp.png"]), crops=False, augment=False)
    slopes = torch.stack([data[epoch, 0].x[..., -1].float().mean((1, 2)) - data[epoch, 0].x[..., 0].float().mean((1, 2))
                          for epoch in range(200)])  # fmt: skip
    assert torch.equal(slopes[:, 0] > 0, slopes[:, 1] > 0) and 0.4 < (slopes[:, 0] > 0).float().mean() < 0.6


def test_proposals_of_images_of_another_size_are_refused_by_name(tmp_path):
    for size in ((80, 60), (40, 30)):
        Image.new("RGB", size, "red").save(tmp_path / "a.png")
        if size == (80, 60):
            cache = write_cache(tmp_path, tmp_path / "cache", kind="random")
    images = cache.image_list(tmp_path)
    with pytest.raises(ValueError, match=r"a.png is \(40, 30\), its proposals of \[80 60\]"):
        ViewDataset(images, cache)[0, 0]


def test_tau_one_gives_identical_views(folder):
    for index in range(len(folder.paths)):
        item = dataset(folder, Fixed([[20, 20, 100, 100]]), tau=1.0, augment=False)[3, index]
        assert torch.equal(item.x[0], item.x[1]) and torch.equal(item.boxes[0], item.boxes[1])  # O-10
        assert torch.equal(item.crops[0], item.crops[1])


def test_boxes_follow_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = (150, 10, 230, 60)  # of 240 x 180; shown turned right, 180 x 240
    images = painted(tmp_path / "turned.jpg", stored, exif=exif)
    shown = (180 - 60, 150, 180 - 10, 230)
    item = next(i for i in (ViewDataset(images, Fixed([shown]), num_regions=2, augment=False)[e, 0] for e in range(50))
                if i.boxes[0, 1, 2:].min() > 0.15)  # fmt: skip
    assert item.crops[:, 1, :, 8:-8, 8:-8].min() > 200  # B10


def test_change_colour_agrees_with_pil():
    photo = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    colours = draw_colour(stream(10), 200).tolist()
    errors = []
    for i, colour in enumerate(colours):
        image = (photo.crop((i, 2 * i, i + 96, 2 * i + 72)), texture(96, 72, i, 8), texture(96, 72, i, 24))[i % 3]
        ours = views.change_colour(np.asarray(image), colour)
        assert ours.dtype == np.uint8 and ours.shape == (72, 96, 3)
        errors.append(np.abs(ours.astype(float) - np.asarray(pil_colour(image, colour))).mean())
    assert max(errors) < 2 and np.mean(errors) < 1, (max(errors), np.mean(errors))  # grey levels out of 255
    assert np.array_equal(views.change_colour(ours, [0, 1.3, 0.7, 1.2, 0.1, 0, 1, 2, 3, 0, 0]), ours)  # nothing drawn


def test_draw_colour_has_the_published_distribution():
    drawn = draw_colour(stream(11), 20000)
    jitter, factors, hue, order, gray, sigma = drawn.split([1, 3, 1, 4, 1, 1], dim=1)
    for flag, p in ((jitter, 0.8), (gray, 0.2), ((sigma > 0).double(), 0.5)):
        assert flag.mean().item() == pytest.approx(p, abs=0.015) and set(flag.unique().tolist()) == {0, 1}
    for values, low, high in ((factors, 0.6, 1.4), (hue, -0.1, 0.1), (sigma[sigma > 0], 0.1, 2.0)):
        assert values.min() >= low and values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)
    assert len(order.unique(dim=0)) == 24 and order.mean(0).tolist() == pytest.approx([1.5] * 4, abs=0.05)


def test_every_crop_and_view_has_its_own_colours(tmp_path):
    flat = np.full((100, 120, 3), (200, 120, 40), np.uint8)
    Image.fromarray(flat).save(tmp_path / "flat.png")
    images = ImageList(tmp_path, ["flat.png"])
    item = dataset(images)[0, 0]
    tones = item.crops.float().mean((-1, -2)).flatten(0, 1).round()
    assert len(tones.unique(dim=0)) >= 14  # of 20; 4 in 5 are jittered
    plain = dataset(images, augment=False)[0, 0]
    assert torch.equal(plain.boxes, item.boxes) and torch.equal(plain.rois, item.rois)
    assert (plain.crops.movedim(2, -1) == torch.tensor([200, 120, 40])).all()


# ---------------------------------------------------------------- items, batches, keys


def same(a, b):
    return all(
        x is y if x is None else torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
    )


def test_item_depends_only_on_its_key(folder):
    keys = [(e, i) for e in range(2) for i in range(len(folder.paths))]
    proposals = Fixed([[10, 10, 90, 90], [30, 20, 120, 100]])
    forward = {key: dataset(folder, proposals)[key] for key in keys}
    data = dataset(folder, proposals)
    torch.manual_seed(1), np.random.seed(1)
    for key in reversed(keys):  # O-21: the order and the global streams change nothing
        assert same(data[key], forward[key])
    other = dataset(folder, proposals, seed=1)[keys[0]]
    assert not same(other, forward[keys[0]])
    assert not torch.equal(forward[0, 0].boxes, forward[1, 0].boxes)
    assert len({tuple(item.boxes.flatten().tolist()) for item in forward.values()}) == len(keys)


def test_loader_workers_draw_the_same_items(folder):
    """B12: in the released code every rank, and every run, repeats the streams of its worker ids."""
    keys = [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(1, 0), (1, 1)], [(1, 4), (1, 5)]]
    data = dataset(folder, Fixed([[10, 10, 90, 90]]))
    loaders = [DataLoader(data, batch_sampler=keys, collate_fn=collate_views, num_workers=n) for n in (0, 2)]
    for one, two in zip(*loaders, strict=True):
        assert isinstance(two, views.ViewBatch) and same(one, two)


def test_collate_pads_and_masks_both_views(folder):
    data = dataset(folder)
    items = [data[0, i] for i in (0, 1, 4)]
    batch = collate_views(items)
    height, width = max(i.x.shape[2] for i in items), max(i.x.shape[3] for i in items)
    assert batch.x.shape == (2, 3, 3, height, width) and batch.x.dtype == torch.uint8
    assert batch.mask.shape == (2, 3, height, width) and batch.mask.dtype == torch.bool
    assert batch.crops.shape == (2, 3, 10, 3, 32, 32) and batch.valid.all() and batch.valid.shape == (2, 3, 10)
    for b, item in enumerate(items):
        h, w = item.x.shape[2:]
        for v in range(2):
            assert torch.equal(batch.x[v, b, :, :h, :w], item.x[v]) and not batch.mask[v, b, :h, :w].any()
            assert (~batch.mask[v, b]).sum() == h * w and batch.x[v, b].sum() == item.x[v].sum()
            assert torch.equal(batch.boxes[v, b], item.boxes[v]) and torch.equal(batch.rois[v, b], item.rois[v])
            assert torch.equal(batch.crops[v, b], item.crops[v])
    without = collate_views([dataset(folder, crops=False)[0, 0]]).to("cpu")
    assert without.crops is None and torch.equal(without.boxes[:, 0], items[0].boxes)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (16, 1200), (900, 16)])
def test_small_and_long_images_give_valid_views(tmp_path, size):
    texture(*size).save(tmp_path / "small.png")
    for proposals in (None, Fixed([[0, 0, size[0] / 2, size[1]]])):
        for epoch in range(10):
            item = dataset(ImageList(tmp_path, ["small.png"]), proposals)[epoch, 0]
            assert min(item.x.shape) > 0 and (item.boxes[..., 2:] > 0).all() and item.boxes.isfinite().all()


def test_bad_images_are_named_and_not_replaced(tmp_path, monkeypatch):
    texture(100, 15).save(tmp_path / "thin.png")
    texture(100, 100).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "empty.jpg").touch()
    data = dataset(ImageList(tmp_path, ["thin.png", "cut.png", "empty.jpg"]))
    for index, name in enumerate(data.images.paths):  # B7
        with pytest.raises(ValueError, match=name):
            data[0, index]
    interrupt = iter(range(0)).__next__  # raises StopIteration, which no reader's ValueError should hide
    monkeypatch.setattr(views, "load_image", lambda path: interrupt())
    with pytest.raises(StopIteration):
        data[0, 0]


@pytest.mark.parametrize("bad", [{"tau": 0}, {"tau": 1.5}, {"num_regions": 0}, {"jitter": 0.5}, {"method": "dino"},
                                 {"region_nms": 0}])  # fmt: skip
def test_bad_settings_are_named(folder, bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        dataset(folder, **bad)


def test_scaled_recipes():
    assert views.scaled("imagenet") == views.SHORT_SIDES["imagenet"] and 384 not in views.scaled("imagenet")[0]
    assert views.scaled("coco", 640) == views.SHORT_SIDES["coco"]
    sides, longest = views.scaled("imagenet", 192)
    assert sides[0] == 160 and sides[-1] == 240 and longest == 300
    assert views.scaled("coco", 64)[1] == 133


def test_script_draws_a_pair(tmp_path, monkeypatch, capsys):
    pytest.importorskip("plots")
    texture(120, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["views.py", str(tmp_path / "a.png"), str(tmp_path / "out.png"), "--seed", "3"])
    views.main()
    assert Image.open(tmp_path / "out.png").width > 100 and "10 regions" in capsys.readouterr().out
