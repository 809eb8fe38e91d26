"""Pictures: every one is written, for whatever a run can hand over, and shows what it says."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import plots
from detectors import Attention, DeformAttention, VanillaLayer, cross_attention
from model import VARIANTS, build_detector
from ops import deform_attn

ROOT = Path(plots.__file__).parent
COLOURS = [matplotlib.colors.to_rgba(c) for c in plots.COLOURS]


def views(v=2, regions=10, seed=0):
    """x (V, 3, 90, 120), boxes (V, R, 4), mask whose right and lower rim is padding."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (v, 3, 90, 120), generator=g, dtype=torch.uint8)
    boxes = torch.rand(v, regions, 4, generator=g) * 0.4 + 0.1
    mask = torch.zeros(v, 90, 120, dtype=torch.bool)
    mask[:, 80:], mask[:, :, 100:] = True, True
    return x, boxes, mask


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, to look into."""
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))[1])
    return figures


def is_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 60
        assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 1
    return True


@pytest.mark.parametrize("regions", [0, 1, 3, 30])
@pytest.mark.parametrize("v", [1, 2])
def test_save_pair_takes_any_number_of_regions_and_views(tmp_path, v, regions):
    x, boxes, mask = views(v, regions)
    path = plots.save_pair(tmp_path / "new" / "pair.png", x, boxes, mask, title="a $5 bill")
    assert path == tmp_path / "new" / "pair.png" and is_picture(path)
    assert is_picture(plots.save_pair(tmp_path / "numpy.png", x, boxes.numpy().astype(np.float64)))


def test_save_pair_draws_a_region_in_one_colour_at_its_pixels_without_padding(tmp_path, drawn):
    x, boxes, mask = views(regions=4)
    plots.save_pair(tmp_path / "pair.png", x, boxes, mask)
    axes = drawn[0].axes
    for ax, b in zip(axes, boxes.numpy(), strict=True):
        assert ax.images[0].get_array().shape == (80, 100, 3)  # neither padded row nor column
        patches = {p.get_edgecolor(): p for p in ax.patches}
        for i in range(4):
            patch = patches[COLOURS[i]]
            size = np.array([100, 80])
            np.testing.assert_allclose([patch.get_width(), patch.get_height()], b[i, 2:] * size, rtol=1e-5)
            np.testing.assert_allclose(patch.get_xy(), (b[i, :2] - b[i, 2:] / 2) * size, rtol=1e-5)
        assert sorted(t.get_text() for t in ax.texts) == ["1", "2", "3", "4"]
    assert len(drawn[0].artists) == 4  # connecting lines


def test_save_regions_shows_true_solid_and_predicted_dashed_with_their_iou(tmp_path, drawn):
    x, boxes, mask = views(3, 4)
    predicted = boxes.clone()
    predicted[:, 1] += torch.tensor([0.5, 0, 0, 0])  # far off
    assert is_picture(plots.save_regions(tmp_path / "r.png", x, mask, boxes, predicted.bfloat16(), title="step 1"))
    assert len(drawn[0].axes) == 3
    for ax in drawn[0].axes:
        colours = [p.get_edgecolor() for p in ax.patches if p.get_linestyle() == "-"]
        assert sorted(colours) == sorted(p.get_edgecolor() for p in ax.patches if p.get_linestyle() != "-")
        numbers = sorted(float(t.get_text()) for t in ax.texts)
        assert len(numbers) == 4 and numbers[0] < 0.2 and min(numbers[1:]) > 0.85  # bfloat16 costs some
        assert ax.get_xlabel().startswith("mean IoU 0.7")


@pytest.mark.parametrize("count, regions", [(1, 0), (2, 1), (5, 12)])
def test_save_regions_takes_scores_no_mask_and_any_number(tmp_path, drawn, count, regions):
    x, boxes, _ = views(count, regions)
    scores = torch.arange(float(regions)).expand(count, regions)
    assert is_picture(plots.save_regions(tmp_path / "r.png", x, None, boxes, boxes, scores, images=3, regions=2))
    assert len(drawn[0].axes) == min(count, 3)
    assert all(len(ax.patches) == 2 * min(regions, 2) for ax in drawn[0].axes)


@pytest.mark.parametrize("size", [(120, 90), (1, 1), (2000, 5), (5, 2000)])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_save_proposals_takes_any_image_and_count(tmp_path, drawn, size, count):
    boxes_xyxy = np.random.default_rng(0).uniform(0, 1, (count, 4)) * np.tile(size, 2)
    boxes_xyxy = np.concatenate([np.sort(boxes_xyxy[:, [0, 2]]), np.sort(boxes_xyxy[:, [1, 3]])], 1)[:, [0, 2, 1, 3]]
    plots.save_proposals(tmp_path / "p.png", Image.new("L", size, 90), boxes_xyxy.astype(np.float32), top=30)
    assert len(drawn[0].axes[0].patches) == min(count, 30)
    assert (tmp_path / "p.png").stat().st_size > 500


def test_save_detections_shows_those_above_the_threshold_in_their_class_colour(tmp_path, drawn):
    boxes_xyxy = torch.tensor([[5.0, 5, 60, 60], [30, 30, 90, 80], [0, 0, 10, 10], [1, 2, 3, 4]])
    labels, scores = ["cat", "$dog$", "cat", "owl"], torch.tensor([0.9, 0.8, 0.5, 0.49])
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    assert is_picture(plots.save_detections(tmp_path / "d.png", image, boxes_xyxy, labels, scores, 0.5))
    ax = drawn[0].axes[0]
    assert sorted(t.get_text() for t in ax.texts) == ["$dog$ 0.80", "cat 0.50", "cat 0.90"]
    assert len({p.get_edgecolor() for p in ax.patches}) == 2
    assert ax.get_xlabel() == "3 of score 0.5 or more"


def test_save_detections_without_any_says_so(tmp_path, drawn):
    image = np.full((50, 80, 3), 9, np.uint8)
    for boxes_xyxy, scores in ((np.zeros((0, 4)), []), (np.ones((1, 4)), [0.1])):
        plots.save_detections(tmp_path / "d.png", image, boxes_xyxy, ["cat"] * len(scores), scores)
        assert drawn[-1].axes[0].get_xlabel() == "nothing of score 0.5 or more"


@pytest.mark.filterwarnings("ignore:invalid value")
def test_save_detections_survives_boxes_that_are_not_numbers(tmp_path):
    boxes_xyxy = [[np.nan] * 4, [0, 0, np.inf, np.inf], [-50, -50, 500, 500]]
    image = Image.new("RGB", (60, 40))
    assert plots.save_detections(tmp_path / "d.png", image, boxes_xyxy, ["a", "b", "c"], [0.9, 0.9, np.nan]).exists()


def records(n, offset=0.0):
    rows = [{"step": 10 * i, "loss": 3 / (i + 1) + offset, "lr": 1e-4, "note": "x"} for i in range(n)]
    return [
        {"step": 0, "settings": {"lr": 1}, "images": 5, "steps": 10},
        *rows,
        {"step": 10 * n, "epoch": 1, "AP": 0.2, "loss": "nan"},
    ]


@pytest.mark.parametrize("n", [0, 1, 20, 200])
def test_save_curves_draws_one_panel_a_number_and_one_line_a_run(tmp_path, drawn, n):
    logs = {"a": records(n), "b": records(n, 1.0)}
    assert is_picture(plots.save_curves(tmp_path / "c.png", logs))
    panels = {ax.get_title("left"): ax for ax in drawn[0].axes}
    assert set(panels) == ({"loss", "lr", "AP"} if n else {"AP"})  # nothing of the line of settings
    if n:
        lines = panels["loss"].lines
        assert len({line.get_color() for line in lines}) == 2 and len(lines) == (4 if n == 200 else 2)
        assert lines[0].get_xdata().tolist() == [10 * i for i in range(n)]  # without the line whose loss was NaN
        assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["a", "b"]


def test_save_curves_running_mean_keeps_a_constant(tmp_path, drawn):
    rows = [{"step": i, "loss": 2.0 + (i % 11) * 1e-9} for i in range(150)]
    plots.save_curves(tmp_path / "c.png", {"a": rows}, ["loss"])
    for line in drawn[0].axes[0].lines:
        np.testing.assert_allclose(line.get_ydata(), 2.0, atol=1e-7)  # ends are not pulled towards 0


def test_save_curves_without_numbers_names_the_runs(tmp_path):
    with pytest.raises(ValueError, match="fresh: no numbers over 'step'"):
        plots.save_curves(tmp_path / "c.png", {"fresh": [{"settings": {}}]})


def test_command_takes_a_log_and_refuses_keys_that_are_not_there(tmp_path, monkeypatch, capsys):
    rows = [{"step": 0, "settings": {}}, {"step": 1, "loss": 2.0, "huge": 10**400}, {"step": 2, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in (tmp_path, tmp_path / "log.jsonl"):
        monkeypatch.setattr(sys, "argv", ["plots.py", str(run)])
        plots.main()
        assert is_picture(tmp_path / "curves.png")
        (tmp_path / "curves.png").unlink()
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path), "--keys", "nosuch"])
    with pytest.raises(SystemExit, match="no numbers over 'step' to draw yet but loss"):
        plots.main()


def test_save_ap_shows_mean_and_range_of_seeds(tmp_path, drawn):
    runs = {"scratch": [(1, 2.0, 4.0), (1, 4.0, 8.0), (5, 9.0, 20.0)], "pretrained": [(1, 5.0, 9.0)], "none": []}
    assert is_picture(plots.save_ap(tmp_path / "ap.png", runs))
    ap, ap50 = drawn[0].axes
    assert ap.lines[0].get_xydata().tolist() == [[1, 3], [5, 9]]
    assert ap50.lines[0].get_xydata().tolist() == [[1, 6], [5, 20]]


def test_read_log_leaves_out_the_half_line_of_a_writing_run(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert plots.read_log(tmp_path) == plots.read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2}]
    (tmp_path / "log.jsonl").write_text("PNG\n")
    with pytest.raises(ValueError, match="log.jsonl: not a log"):
        plots.read_log(tmp_path)
    with pytest.raises(ValueError, match="absent.*--out folder"):
        plots.read_log(tmp_path / "absent")


def test_pictures_leave_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.save_ap(tmp_path / "ap.png", {"a": [(1, 2, 3)]})
    assert dict(matplotlib.rcParams) == before


def test_command_line_draws_run_folders_and_refuses_in_one_sentence(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(5)))
    command = [sys.executable, str(ROOT / "plots.py")]
    done = subprocess.run([*command, str(tmp_path / "a"), str(tmp_path / "b")], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "a" / "curves.png") and is_picture(done.stdout.strip()), done.stderr
    done = subprocess.run([*command, str(tmp_path / "c")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no such log" in done.stderr


def test_attention_weights_are_those_of_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3, 0.0), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    torch.nn.init.normal_(ours.in_proj_bias)
    theirs.in_proj_bias = ours.in_proj_bias
    q, k, v, padding = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24), torch.zeros(2, 7).bool()
    padding[1, 4:] = True
    out, weights = theirs(q, k, v, padding, need_weights=True, average_attn_weights=False)
    blocked = padding[:, None, None]
    torch.testing.assert_close(ours.weights(q, k, v, blocked), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(q, k, v, blocked), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cross_attention_is_what_the_layer_computed(variant, layer):
    torch.manual_seed(0)
    size = {"backbone": "mobilenet_v2", "hidden_dim": 32, "heads": 4, "enc_layers": 1, "dec_layers": 2}
    detector = build_detector(variant, 3, num_queries=6, dropout=0.0, **size).eval()
    x, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = True, True
    h = detector.features(x, detector.strides)
    ctx = detector.encode([h[s] for s in detector.strides], mask)
    module = detector.transformer.decoder.layers[layer]
    module = module.multihead_attn if isinstance(module, VanillaLayer) else module.cross_attn
    seen = []
    with module.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output))):
        looked = cross_attention(detector, lambda: detector.decode(ctx), layer)
    (inputs, output), N = seen[0], detector.num_queries
    if isinstance(module, DeformAttention):
        points, weights = looked
        assert points.shape == (2, N, 4, detector.levels, 4, 2) and weights.shape == points.shape[:-1]
        torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, N, 4))
        value = module.value_proj(ctx.c).masked_fill(ctx.mask.unsqueeze(-1), 0).unflatten(-1, (4, -1))
        again = module.output_proj(deform_attn(value, ctx.shapes, points, weights))
    else:
        assert looked.shape == (2, 4, N, ctx.c.shape[1])
        torch.testing.assert_close(looked.sum(-1), torch.ones(2, 4, N))
        assert (looked.masked_select(ctx.mask[:, None, None]) == 0).all() and ctx.mask.any()
        v = module.project(*inputs[:3])[2] if isinstance(module, Attention) else inputs[2]
        again = module.out_proj((looked @ module.split(v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-5)
