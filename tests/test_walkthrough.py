"""The walkthrough writes what it promises, and its rectangles are the ones the views were cut from."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

import plots
from bench import figures, steps, walkthrough
from data import ImageList, load_image
from views import ViewDataset, collate_views

ROOT = Path(__file__).parents[1]
TEMPLATE = (ROOT / "bench" / "walkthrough.md").read_text()
PHOTO = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
PICTURES = [f"walkthrough/{name}" for name in re.findall(r"\(\{out\}/(\d\d-\w+\.png)\)", TEMPLATE)]


def dataset(seed):
    images = ImageList(PHOTO.parent, [PHOTO.name])
    return ViewDataset(images, short_sides=(180, 192), longest=300, crops=False, region_nms=0.7, seed=seed)


@pytest.mark.parametrize("seed", range(6))
def test_rectangles_drawn_are_those_of_the_views(tmp_path, seed):
    data = dataset(seed)
    batch = collate_views([data[0, 0]])
    facts = steps.the_views(tmp_path, load_image(PHOTO), batch, data)
    rects = facts["rect1"], facts["rect2"]
    low, high = np.maximum(*[r[:2] for r in rects]), np.minimum(*[r[2:] for r in rects])
    for rect, overlap in zip(rects, plots.to_pixels(batch.boxes[:, 0, 0], np.zeros((1, 1))), strict=True):
        size = np.subtract(rect[2:], rect[:2])
        np.testing.assert_allclose(
            overlap, np.concatenate([(low - rect[:2]) / size, (high - rect[:2]) / size]), atol=1e-6
        )
    assert float(facts["view_iou"]) >= 0.5 and (tmp_path / "03-views.png").exists()


def test_shown_regions_are_the_overlap_and_others_once_each():
    shown = steps.shown_regions(collate_views([dataset(0)[0, 0]]))
    assert shown[0] == 0 and len(set(shown)) == len(shown) == steps.SHOWN


def test_shrinking_keeps_the_colours_of_regions_and_lines(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    own = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (*plots.COLOURS, *plots.LINES)]
    image[0, : len(own)] = own
    Image.fromarray(image).save(tmp_path / "p.png")
    figures.shrink(tmp_path / "p.png")
    after = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert [tuple(p) for p in after[0, : len(own)].tolist()] == own
    assert np.abs(after.astype(int) - image).mean() < 25


def test_committed_text_and_pictures_are_those_of_the_template():
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    assert len(PICTURES) == 10 and re.findall(r"\((walkthrough/[^)]+)\)", text) == PICTURES
    pattern = re.sub(r"\\\{\w+\\\}", "(?s:.+?)", re.escape(TEMPLATE[TEMPLATE.index("## 1.") :]))
    assert re.search(pattern, text), "write docs/ again: the template has changed"
    figure = [f"figure{k}.png" for k in (1, 2, 3)]
    assert all((ROOT / "docs" / name).stat().st_size < 200_000 for name in [*PICTURES, *figure])
    assert sum(path.stat().st_size for path in (ROOT / "docs").rglob("*.png")) < 2_500_000


def test_functions_named_in_the_text_exist():
    import importlib

    for module, name in re.findall(r"`(data|proposals|views|model|losses|pretrain|detectors)\.([\w.]+)`", TEMPLATE):
        if name != "py":
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)


def test_the_command_of_a_run_lists_what_is_not_default():
    args = walkthrough.pretrain.parse_args("--data photos --out runs/a --hidden-dim 96 --amp --steps 9".split())
    words = walkthrough.pretraining_flags(args)
    assert {"--data photos", "--out runs/a", "--hidden-dim 96", "--amp", "--steps 9"} <= set(words)
    assert not any(word.startswith(("--variant", "--tau", "--seed")) for word in words)
    words = "--data p --out o --backbone mobilenet_v2 --no-centre-features".split()
    assert "--no-centre-features" in walkthrough.pretraining_flags(walkthrough.pretrain.parse_args(words))
    assert "--no-no-global" not in walkthrough.pretraining_flags(args)


def test_figures_are_drawn_from_any_photograph(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 260, 3), dtype=np.uint8)).save(tmp_path / "n.png")
    assert figures.main(["--out", str(tmp_path / "docs"), "--image", str(tmp_path / "n.png")]) == 0
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == [f"figure{k}.png" for k in (1, 2, 3)]


def test_regions_keep_their_colour_in_all_panels():
    view = torch.zeros(3, 50, 60, dtype=torch.uint8)
    _, (a, b) = figures.columns(2, (1, 1))
    boxes = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.3
    for ax, shown in ((a, [0, 3]), (b, [3])):
        figures.draw_regions(ax, boxes, view, shown)
    assert a.patches[1].get_edgecolor() == b.patches[0].get_edgecolor() != a.patches[0].get_edgecolor()


@pytest.mark.slow
def test_walkthrough_runs_from_start_to_end(tmp_path):
    folder = tmp_path / "a folder with spaces"
    command = [sys.executable, "-m", "bench.walkthrough", "--steps", "3", "--out", str(folder / "walkthrough")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (folder / "walkthrough.md").read_text()
    assert "{" not in text and all((folder / name).stat().st_size < 200_000 for name in PICTURES)
    assert done.stdout.splitlines()[-1].startswith(f"{folder / 'walkthrough.md'} and 10 pictures")
