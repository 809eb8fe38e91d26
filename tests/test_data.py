"""Images and labels: every kind of file, both label formats, geometry that keeps boxes on their pixels, the toy set."""

import io
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import toyset
from data import DetectionSet, collate_detections, list_images, load_image, normalise, pad_stack, read_annotations

REMEDY = "proposals.py, which lists unreadable files in a reject list"
RED = (255, 0, 0)


def picture(w=12, h=8):
    """An RGB gradient in which every pixel differs."""
    y, x = np.mgrid[:h, :w]
    rgb = x * 255 // max(1, w - 1), y * 255 // max(1, h - 1), (x + y) % 256
    return Image.fromarray(np.stack(rgb, -1).astype(np.uint8))


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def oriented(path, number, image=None):
    exif = Image.Exif()
    exif[0x0112] = number
    return save(path, image, exif=exif)


def pixels(image):
    return np.asarray(image).astype(int)


# ---- random streams


def test_stream_depends_on_nothing_but_its_key():
    keys = [(0,), (0, 3), (0, 3, 0), (0, 0, 3), (3, 0)]
    draws = [torch.rand(3, generator=data.stream(*key)).tolist() for key in keys]
    torch.rand(5)
    assert draws[::-1] == [torch.rand(3, generator=data.stream(*key)).tolist() for key in reversed(keys)]
    assert len(set(map(tuple, draws))) == len(draws)


# ---- image lists


def test_list_images_walks_a_folder_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.c/x.y.JPEG", "b.c/a.png", "z.jpg", ".hidden.jpg", ".cache/q.jpg"):  # dots in names: spec B11
        save(tmp_path / name, format="PNG")
    (tmp_path / "notes.md").write_text("no image")
    assert list_images(tmp_path) == (tmp_path, ["b.c/a.png", "b.c/x.y.JPEG", "z.jpg"])
    assert list_images(f"{tmp_path}/").paths == list_images(tmp_path).paths


def test_list_images_keeps_the_order_of_a_list_and_follows_links(tmp_path):
    save(tmp_path / "far" / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("far/a.png\n\nb.png\n")
    assert list_images(tmp_path / "list.txt") == (tmp_path, ["far/a.png", "b.png"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "far")
    assert list_images(tmp_path / "set").paths == ["linked/a.png"]
    assert list_images(tmp_path / "b.png") == (tmp_path, ["b.png"])


BAD_LISTS = {"": "names no image", "a.png\ngone.png": "gone.png", "../a.png": "not below", "/etc/a.png": "not below",
             "x\\..\\..\\a.png": "not below", "a\0.png": "add the file"}  # fmt: skip


@pytest.mark.parametrize("text", BAD_LISTS)
def test_list_images_refuses_a_list_by_name(tmp_path, text):
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=BAD_LISTS[text]) as caught:
        list_images(tmp_path / "set" / "list.txt")
    assert "list.txt" in str(caught.value)


def test_list_images_says_what_is_wrong_with_a_source(tmp_path):
    (tmp_path / "binary.dat").write_bytes(b"\xff\xfe\x00\x81")
    faults = {tmp_path: "holds no image", tmp_path / "gone": "does not exist", tmp_path / "binary.dat": "no text"}
    for source, fault in faults.items():
        with pytest.raises(ValueError, match=fault):
            list_images(source)


@pytest.mark.parametrize("folder", ["", "images", "../val2017", "../images/val2017"])
def test_image_root_finds_the_four_usual_layouts(tmp_path, folder):
    path = tmp_path / "annotations" / "instances_val2017.json"
    root = (tmp_path / "annotations" / folder).resolve()
    save(root / "a.png")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}))
    assert data.image_root(path, ["gone.png", "a.png"]).resolve() == root
    assert list_images(path).paths == ["a.png"]


def test_image_root_names_every_folder_it_tried(tmp_path):
    with pytest.raises(ValueError) as caught:
        data.image_root(tmp_path / "annotations" / "x_val.json", ["a.png"])
    assert str(caught.value).count("val") >= 3 and "annotations/images" in str(caught.value)


# ---- one image


@pytest.mark.parametrize("number", range(1, 9))
def test_load_image_turns_as_exif_says_unless_the_size_is_the_stored_one(tmp_path, number):
    upright = picture(12, 8)
    inverse = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    stored = upright.transpose(data.TRANSPOSE[inverse[number]]) if number > 1 else upright
    path = oriented(tmp_path / "a.png", number, stored)
    assert (pixels(load_image(path)) == pixels(upright)).all()
    assert (pixels(load_image(path, (12, 8))) == pixels(upright)).all()
    if number >= 5:
        assert (pixels(load_image(path, (8, 12))) == pixels(stored)).all()
    with pytest.raises(ValueError, match="a.png.*annotation says"):
        load_image(path, (13, 8))


def test_load_image_ignores_a_damaged_exif_block(tmp_path):
    for junk in (b"junk", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x09\x01\x12\xff"):
        for name in ("a.jpg", "a.png", "a.webp"):
            assert load_image(save(tmp_path / name, exif=junk)).size == (12, 8)


def test_load_image_reads_every_mode_as_the_picture_it_shows(tmp_path):
    grey = np.arange(0, 256, 2, dtype=np.uint8).reshape(8, 16)
    same = {
        "L": Image.fromarray(grey),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "LA": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (16, 8), 255)]),
        "P": Image.fromarray(grey).convert("P"),
        "RGBA": Image.fromarray(grey).convert("RGBA"),
    }
    for mode, image in same.items():
        loaded = load_image(save(tmp_path / f"{mode}.png", image))
        assert loaded.mode == "RGB" and np.abs(pixels(loaded) - grey[..., None]).max() <= 1, mode
    for top in (1, 255, 65535):
        loaded = load_image(save(tmp_path / f"float{top}.tif", Image.fromarray(grey.astype(np.float32) * (top / 255))))
        assert np.abs(pixels(loaded) - grey[..., None]).max() <= 2, top
    (tmp_path / "16.pgm").write_bytes(b"P5 16 8 65535\n" + (grey.astype(">u2") * 257).tobytes())
    assert np.abs(pixels(load_image(tmp_path / "16.pgm")) - grey[..., None]).max() <= 1
    assert pixels(load_image(save(tmp_path / "1.png", Image.new("1", (3, 2), 1)))).min() == 255
    for mode, suffix in (("CMYK", "jpg"), ("YCbCr", "jpg"), ("CMYK", "tif")):
        image = Image.new("RGB", (16, 16), (200, 60, 30)).convert(mode)
        assert np.abs(pixels(load_image(save(tmp_path / f"{mode}.{suffix}", image))) - (200, 60, 30)).max() <= 4, mode


def test_load_image_lays_transparency_on_white(tmp_path):
    clear = save(tmp_path / "clear.png", Image.new("RGBA", (3, 2), (9, 9, 9, 0)))
    keyed = save(tmp_path / "keyed.png", Image.fromarray(np.full((2, 3), 7, np.uint8)).convert("P"), transparency=7)
    for path in (clear, keyed):
        assert (pixels(load_image(path)) == 255).all()


def bad_files():
    buffer = io.BytesIO()
    picture(64, 48).save(buffer, "JPEG")
    png = io.BytesIO()
    picture(64, 48).save(png, "PNG")
    rare = io.BytesIO()
    picture().save(rare, "PCX")  # of a format that is not on the list
    huge = bytearray(png.getvalue())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    return {
        "truncated.jpg": buffer.getvalue()[:-200],
        "truncated.png": png.getvalue()[:-150],
        "flipped.png": png.getvalue()[:45] + b"\0\1\2\3" + png.getvalue()[49:],
        "zero.jpg": b"",
        "text.jpg": b"this is no image",
        "page.jpg": b"<html><body>404</body></html>",
        "vector.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "rare.jpg": rare.getvalue(),
        "bomb.png": bytes(huge),
    }


@pytest.mark.parametrize("name", bad_files())
def test_load_image_names_an_unreadable_file_and_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(bad_files()[name])
    with pytest.raises(ValueError, match=REMEDY) as caught:
        load_image(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_load_image_names_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            load_image(path)


def test_load_image_never_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(save(tmp_path / "a.png")).size == (12, 8)
    monkeypatch.setattr(data, "MAX_PIXELS", 95)
    with pytest.raises(ValueError, match="12 x 8 pixels, the limit is 95"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("cut", range(0, 1400, 97))
def test_load_image_raises_nothing_but_value_error_on_damage(tmp_path, cut):
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"):
        buffer = io.BytesIO()
        picture(40, 30).save(buffer, kind)
        raw = bytearray(buffer.getvalue())
        raw[cut % len(raw)] ^= 0x5A
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(raw)
        try:
            assert load_image(path).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)


# ---- sizes and batches


def test_resize_size_meets_the_oracles():
    oracles = {(500, 375, 400, 600): (533, 400), (375, 500, 480, 600): (450, 600), (1000, 250, 480, 600): (600, 150),
               (640, 480, 800, 1333): (1066, 800), (500, 400, 400, 600): (500, 400), (1, 1, 800, 1333): (800, 800),
               (20000, 10, 800, 1333): (1333, 1), (3, 65000, 800, 1333): (1, 1333)}  # fmt: skip
    assert all(data.resize_size(*sizes) == expected for sizes, expected in oracles.items())


def test_resize_size_keeps_within_its_limits():
    rng = np.random.default_rng(0)
    for w, h in rng.integers(1, 3000, (500, 2)).tolist():
        new_w, new_h = data.resize_size(w, h, 480, 600)
        assert 1 <= min(new_w, new_h) <= 480 and max(new_w, new_h) <= 600 and (w < h) <= (new_w <= new_h)
        assert min(new_w, new_h) == 480 or max(new_w, new_h) >= 600 - 300 / min(new_w, new_h) - 1  # its rounding


def test_pad_stack_pads_bottom_and_right_and_normalise_zeroes_it():
    images = [torch.full((3, 5, 9), 200, dtype=torch.uint8), torch.full((3, 7, 4), 10, dtype=torch.uint8)]
    x, mask = pad_stack(images)
    assert x.shape == (2, 3, 7, 9) and x.dtype == torch.uint8 and mask.shape == (2, 7, 9)
    for i, image in enumerate(images):
        _, h, w = image.shape
        assert (x[i, :, :h, :w] == image).all() and not mask[i, :h, :w].any() and (~mask[i]).sum() == h * w
    before, z = x.clone(), normalise(x, mask)
    assert (x == before).all() and z.dtype == torch.float32
    assert (z[mask.unsqueeze(1).expand_as(z)] == 0).all()
    expected = (200 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(z[0, :, 4, 8], expected)
    torch.testing.assert_close(normalise(x[:, None], mask[:, None])[:, 0], z)


# ---- labels


def coco(folder, name="set.json", **changes):
    """A COCO json of two images with ids and categories full of gaps; keyword arguments replace parts of it."""
    save(folder / "a.png", picture(40, 30))
    save(folder / "b.png", picture(20, 50))
    table = {
        "images": [
            {"id": 70, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "b.png", "width": 20, "height": 50},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 90, "bbox": [1, 2, 3, 4.5], "area": 9, "iscrowd": 0},
            {"id": 2, "image_id": 70, "category_id": 3, "bbox": [-4, 5, 30, 20], "area": 600, "iscrowd": 1},
            {"id": 3, "image_id": 5, "category_id": 17, "bbox": [0, 0, 20, 50]},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
    }
    (folder / name).write_text(json.dumps({**table, **changes}))
    return folder / name


def test_read_annotations_renumbers_the_categories_and_keeps_every_field(tmp_path):
    found = read_annotations(coco(tmp_path))
    assert found.categories == [(3, "car"), (17, "cat"), (90, "zebra")]
    assert [image["id"] for image in found.images] == [70, 5] and found.root == tmp_path
    assert [row.tolist() for row in found.labels] == [[0], [2, 1]]
    assert [row.tolist() for row in found.boxes_xyxy] == [[[-4, 5, 26, 25]], [[1, 2, 4, 6.5], [0, 0, 20, 50]]]
    assert [row.tolist() for row in found.crowd] == [[True], [False, False]]
    assert [row.tolist() for row in found.area] == [[600], [9, 1000]]
    assert not any(row.any() for row in found.difficult) and not found.bad
    assert {column[0].dtype for column in found[2:7]} == {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize("written", [0, 1, "0", "1", False, True, None])
def test_a_crowd_is_a_crowd_however_it_is_written(tmp_path, written):
    found = read_annotations(coco(tmp_path, **box(iscrowd=written, difficult=written)))
    assert found.crowd[1].tolist() == found.difficult[1].tolist() == [written in (1, "1")]


def test_read_annotations_takes_a_missing_size_from_the_file(tmp_path):
    oriented(tmp_path / "c.jpg", 6, picture(40, 30))
    images = [{"id": 1, "file_name": "c.jpg"}, {"id": 2, "file_name": "c.jpg", "width": 0, "height": "x"}]
    found = read_annotations(coco(tmp_path, images=images, annotations=[]))
    assert [(image["width"], image["height"]) for image in found.images] == [(30, 40)] * 2


def box(*, times=1, **changes):
    return {"annotations": [{"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], **changes}] * times}


def image(*, times=1, **changes):
    return {
        "images": [{"id": 5, "file_name": "b.png", "width": 20, "height": 50, **changes}] * times,
        "annotations": [],
    }


BAD_CLAIMS = {
    "none of its images": [image(file_name="gone.png"), image(times=0)],
    "gone.png": [{"images": image()["images"] + image(id=6, file_name="gone.png")["images"]}],
    "not below": [image(file_name=name) for name in ("../b.png", "/etc/passwd", "C:\\b.png", None)],
    "whole number or not unique": [
        image(id="5"), image(id=True), image(times=2), box(times=2), {"categories": [{"id": 3}, {"id": 3}]}],
    "missing or not a list": [
        {"images": {"5": "b.png"}}, {"images": ["b.png"]}, {"annotations": None}, {"categories": 3}],
    "annotation 1 has": [
        box(category_id=4), box(category_id=[3]), box(image_id=6), box(bbox=[1, 2, 3]), box(bbox="none"),
        box(bbox=[1, 2, 3, None]), box(bbox=[1, 2, 3, 10**400]), box(area="big"), box(iscrowd="no")],
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_CLAIMS)
def test_read_annotations_checks_each_claim_of_a_json(tmp_path, fault):
    for changes in BAD_CLAIMS[fault]:
        with pytest.raises(ValueError, match=fault) as caught:
            read_annotations(coco(tmp_path, **changes))
        assert "set.json" in str(caught.value)


def test_read_annotations_refuses_what_is_no_coco_json(tmp_path):
    for raw in (b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"images": ' + b"9" * 9000 + b"}"):
        (tmp_path / "x.json").write_bytes(raw)
        with pytest.raises(ValueError, match="x.json.*give a COCO json"):
            read_annotations(tmp_path / "x.json")


def test_read_annotations_counts_bad_boxes_and_names_the_first(tmp_path, capsys):
    bad = [[5, 5, 0, 9], [5, 5, 9, -1], [40, 0, 5, 5], [-9, 0, 9, 9], [0, 0, math.nan, 4], [0, 0, math.inf, 4],
           [0, 0, 1e308, 4], [-1e39, 0, 2e39, 4], [0, 0, 1e-60, 4], [9, 9, 1e-9, 4]]  # fmt: skip
    rows = [{"id": i, "image_id": 70, "category_id": 3, "bbox": bbox} for i, bbox in enumerate([*bad, [38, 28, 9, 9]])]
    found = read_annotations(coco(tmp_path, annotations=rows))
    assert found.boxes_xyxy[0].tolist() == [[38, 28, 47, 37]]
    assert len(found.bad) == 10 and all(line.startswith("a.png") for line in found.bad)
    error = capsys.readouterr().err
    assert "10 bad boxes" in error and "a.png: box [5.0, 5.0, 0.0, 9.0]" in error and error.count("\n") == 1


def voc(root, objects, split=None, size=(40, 30), suffix="png"):
    """A VOC root; `objects` maps an id to its rows (name, xmin, ymin, xmax, ymax, difficult)."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    for key, rows in objects.items():
        save(root / "JPEGImages" / f"{key}.{suffix}", picture(*size))
        items = "".join(
            f"<object><name>{name}</name><difficult>{hard}</difficult><part><bndbox><xmin>1</xmin></bndbox></part><bndbox>"
            f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, x0, y0, x1, y1, hard in rows
        )
        frame = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{key}.xml").write_text(f"<annotation>{frame}{items}</annotation>")
    for name, keys in (split or {}).items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{key}\n" for key in keys))
    return root


OBJECTS = {"a.x": [("dog", 1, 1, 40, 30, 0), ("cat", 5, 6, 5, 6, 1)], "b": [], "c": [("dog", 3, 4, 9, 10.5, 0)]}


def same(first, second):
    assert [i["id"] for i in first.images] == [i["id"] for i in second.images] and first.categories == second.categories
    assert [(i["width"], i["height"]) for i in first.images] == [(i["width"], i["height"]) for i in second.images]
    for mine, other in zip(first[2:7], second[2:7], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_voc_and_coco_give_the_same_targets(tmp_path):
    root = voc(tmp_path / "VOC2007", OBJECTS)
    found = read_annotations(root)
    names = [name for _, name in found.categories]
    assert len(names) == 20 and names[0] == "aeroplane" and names[-1] == "tvmonitor"
    assert found.boxes_xyxy[0].tolist() == [[0, 0, 40, 30], [4, 5, 5, 6]]  # 1-based inclusive to 0-based exclusive
    assert found.labels[0].tolist() == [names.index("dog"), names.index("cat")]
    assert found.difficult[0].tolist() == [False, True] and found.area[0].tolist() == [1200, 1]
    images = [{"id": i + 1, "file_name": f"VOC2007/JPEGImages/{key}.png"} for i, key in enumerate(OBJECTS)]
    categories = [{"id": k, "name": name} for k, name in enumerate(data.VOC_CLASSES)]
    rows = [(1, 11, [0, 0, 40, 30], 0), (1, 7, [4, 5, 1, 1], 1), (3, 11, [2, 3, 7, 7.5], 0)]
    boxes = [dict(zip(("image_id", "category_id", "bbox", "difficult"), row, strict=True)) for row in rows]
    boxes = [{"id": i, **row} for i, row in enumerate(boxes)]
    table = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "hand.json").write_text(json.dumps(table))
    same(found, read_annotations(tmp_path / "hand.json"))
    data.voc2coco([root], tmp_path / "made.json")
    same(found, read_annotations(tmp_path / "made.json"))
    first, second = (DetectionSet(read_annotations(s), True, resolution=64) for s in (root, tmp_path / "made.json"))
    for a, b in zip(first[1, 0][:3], second[1, 0][:3], strict=True):
        assert torch.equal(a, b)


def test_voc2coco_writes_areas_and_the_sizes_that_xml_lacks(tmp_path):
    root = voc(tmp_path / "VOC2007", {"a": [("cat", 1, 1, 9, 5, 0)]}, {"trainval": ["a"]})
    xml = root / "Annotations" / "a.xml"
    size = data.load_image(next((root / "JPEGImages").iterdir())).size
    xml.write_text(re.sub("<size>.*?</size>", "", xml.read_text(), flags=re.DOTALL))
    data.voc2coco([root], tmp_path / "made.json")
    table = json.loads((tmp_path / "made.json").read_text())
    assert [(row["width"], row["height"]) for row in table["images"]] == [size]
    assert [row["area"] for row in table["annotations"]] == [9 * 5]


def test_lists_written_by_notepad_begin_with_their_first_image(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n")
    assert data.list_images(tmp_path / "list.txt").paths == ["a.png"]


def test_fingerprint_tells_names_order_and_boxes():
    boxes = [torch.rand(2, 4), torch.rand(0, 4)]
    usual = data.fingerprint(["a", "b"], boxes)
    assert usual == data.fingerprint(["a", "b"], [b.clone() for b in boxes]) and usual.startswith("2, checksum ")
    others = [(["ab", ""], boxes), (["b", "a"], boxes), (["a", "b"], [boxes[0] + 1, boxes[1]]), (["a"], boxes)]
    assert len({usual, *(data.fingerprint(*other) for other in others)}) == 5


def test_voc_roots_are_joined_and_split(tmp_path):
    old = voc(tmp_path / "VOC2007", OBJECTS, {"trainval": ["c", "a.x"], "test": ["b"]})
    new = voc(tmp_path / "VOC2012", {"d": [("person", 1, 1, 8, 8, 0)]}, {"trainval": ["d"]}, suffix="jpg")
    both = read_annotations([old, new])
    names = ["VOC2007/JPEGImages/c.png", "VOC2007/JPEGImages/a.x.png", "VOC2012/JPEGImages/d.jpg"]
    assert [i["path"] for i in both.images] == names
    assert both.root == tmp_path and [i["id"] for i in both.images] == [1, 2, 3]
    assert [i["path"] for i in read_annotations(old, "test").images] == ["JPEGImages/b.png"]
    with pytest.raises(ValueError, match="test.txt"):
        read_annotations([old, new], "test")


def test_voc_of_other_classes_has_the_names_of_all_splits(tmp_path):
    objects = {"a": [("mouse", 1, 1, 9, 9, 0)], "b": [("cat", 1, 1, 9, 9, 0), ("anvil", 1, 1, 9, 9, 0)]}
    root = voc(tmp_path, objects, {"trainval": ["a"], "test": ["b"]})
    assert read_annotations(root).categories == read_annotations(root, "test").categories
    assert read_annotations(root).categories == [(0, "anvil"), (1, "cat"), (2, "mouse")]
    assert [row.tolist() for row in read_annotations(root).labels] == [[2]]


def test_voc_split_without_objects_of_own_classes_has_the_names_of_the_folder_all_the_same(tmp_path):
    objects = {"a": [("helmet", 1, 1, 9, 9, 0), ("person", 1, 1, 9, 9, 0)], "b": [("person", 1, 1, 9, 9, 0)], "c": []}
    root = voc(tmp_path, objects, {"trainval": ["a"], "test": ["b"], "val": ["c"]})
    found = [read_annotations(root, split).categories for split in ("trainval", "test", "val")]
    assert found == [[(0, "helmet"), (1, "person")]] * 3


ENTITY, OUTSIDE = '<!DOCTYPE a [<!ENTITY b "c">]>', '<!DOCTYPE a SYSTEM "file:///x">'
BAD_XML = (ENTITY + "<annotation>&b;</annotation>", OUTSIDE + "<annotation/>", "", "<annotation><object></annotation>",
           "<annotation><object><name>dog</name></object></annotation>")  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])  # a search of the bytes for DOCTYPE would miss the second
@pytest.mark.parametrize("body", BAD_XML)
def test_voc_refuses_entities_and_broken_xml_by_name(tmp_path, body, encoding):
    voc(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").write_bytes(body.encode(encoding))
    with pytest.raises(ValueError, match="a.xml is no VOC annotation") as caught:
        read_annotations(tmp_path)
    assert "DOCTYPE" in str(caught.value) or "DOCTYPE" not in body


def test_voc_names_what_is_missing_or_climbs_out(tmp_path):
    root = voc(tmp_path / "VOC", OBJECTS, {"trainval": ["b"]})
    (root / "JPEGImages" / "b.png").unlink()
    with pytest.raises(ValueError, match="b.jpg"):
        read_annotations(root)
    for key, fault in (("gone", "gone.xml"), ("../../x", "not below")):
        (root / "ImageSets" / "Main" / "trainval.txt").write_text(key)
        with pytest.raises(ValueError, match=fault):
            read_annotations(root)
    with pytest.raises(ValueError, match="neither one COCO json nor VOC roots"):
        read_annotations(tmp_path)
    with pytest.raises(ValueError, match="above the images"):
        (root / "ImageSets" / "Main" / "trainval.txt").write_text("c")
        data.voc2coco([root], tmp_path / "elsewhere" / "x.json")


def test_subset_is_the_published_rule(tmp_path):
    images = [{"id": 100 - i, "file_name": "a.png", "width": 40, "height": 30} for i in range(20)]
    found = read_annotations(coco(tmp_path, images=images, annotations=[]))
    part = data.subset(found, 0.25, 7)
    rule = np.random.default_rng(7).choice(np.arange(81, 101), round(20 * 0.25), replace=False)
    assert sorted(image["id"] for image in part.images) == sorted(rule) and part.categories == found.categories
    assert len(part.boxes_xyxy) == 5 and data.subset(found, 1.0, 7).images == found.images
    for fraction in (0, 0.01, 1.2):
        with pytest.raises(ValueError, match="fraction"):
            data.subset(found, fraction, 7)


# ---- the fine-tuning set


def painted(folder, w=200, h=120, boxes=((30, 20, 90, 80),), name="p.png"):
    """A blue picture with red rectangles, and the annotations that bound them."""
    canvas = Image.new("RGB", (w, h), (0, 0, 255))
    for x0, y0, x1, y1 in boxes:
        canvas.paste(RED, (max(0, x0), max(0, y0), x1, y1))
    save(folder / name, canvas)
    rows = [{"image_id": 1, "category_id": 1, "bbox": [a, b, c - a, d - b]} for a, b, c, d in boxes]
    rows = [{"id": i, **row} for i, row in enumerate(rows)]
    table = {"images": [{"id": 1, "file_name": name, "width": w, "height": h}], "annotations": rows,
             "categories": [{"id": 1, "name": "red"}]}  # fmt: skip
    (folder / "p.json").write_text(json.dumps(table))
    return read_annotations(folder / "p.json")


def red_bounds(x):
    """(x0, y0, x1, y1) of the red pixels of a uint8 (3, H, W) image, or None; half-covered edge pixels count."""
    ys, xs = torch.nonzero(x[0] >= 128, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) else None


def test_detection_items_keep_boxes_on_their_pixels(tmp_path):
    train = DetectionSet(painted(tmp_path), train=True, resolution=200)
    shapes, flips, gone = set(), set(), 0
    for epoch in range(60):
        x, boxes, labels, index, size = train[epoch, 0]
        _, h, w = x.shape
        assert x.dtype == torch.uint8 and index == 0 and size == (200, 120) and len(boxes) == len(labels)
        assert min(h, w) <= 200 and max(h, w) <= 333
        if len(boxes) == 0:
            gone += 1
            assert red_bounds(x) is None or (red_bounds(x)[2:] - red_bounds(x)[:2]).min() <= 2
            continue
        (cx, cy, bw, bh), = boxes * torch.tensor([w, h, w, h])  # fmt: skip
        bounds = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
        assert bounds.min() > -1e-3 and bounds[2] < w + 1e-3 and bounds[3] < h + 1e-3
        assert (red_bounds(x) - bounds).abs().max() <= 1, epoch
        shapes.add((h, w))
        flips.add(bool(cx > w / 2))
    assert len(shapes) > 15 and flips == {True, False} and gone < 10


def test_detection_items_of_validation_are_resized_only(tmp_path):
    x, boxes, labels, _, _ = DetectionSet(painted(tmp_path), train=False, resolution=240)[0, 0]
    assert x.shape == (3, 240, 400)  # 1333 * 240 / 800 = 400
    torch.testing.assert_close(boxes, torch.tensor([[60 / 200, 50 / 120, 60 / 200, 60 / 120]]))
    assert (red_bounds(x) - torch.tensor([60, 40, 180, 160])).abs().max() <= 1 and labels.tolist() == [0]


def test_detection_sizes_scale_with_the_resolution(tmp_path):
    for resolution, sides, longest in ((800, range(480, 801, 32), 1333), (200, range(120, 201, 8), 333)):
        train = DetectionSet(painted(tmp_path, 200, 120), train=True, resolution=resolution)
        drawn = [train.draw(200, 120, data.stream(0, epoch, 0)) for epoch in range(300)]
        whole = {min(size) for window, size, _ in drawn if window == (0, 0, 200, 120)}
        assert whole == set(sides)
        assert all(max(size) <= longest for _, size, _ in drawn)
        cropped = [(window, size) for window, size, _ in drawn if window != (0, 0, 200, 120)]
        assert 100 < len(cropped) < 200 and 120 < sum(flip for _, _, flip in drawn) < 180
        for (x0, y0, x1, y1), (w, h) in cropped:
            assert 0 <= x0 < x1 <= 200 and 0 <= y0 < y1 <= 120
            assert (x1 - x0) / (y1 - y0) == pytest.approx(w / h, rel=0.02)  # nothing is squeezed
            assert min(x1 - x0, y1 - y0) > 120 * 384 / 600 - 2 and x1 - x0 <= 181  # 384 of 600, 600 of 667


def test_detection_items_depend_on_their_key_alone(tmp_path):
    first, second = (DetectionSet(painted(tmp_path), train=True, resolution=100, seed=3) for _ in range(2))
    forward = [first[epoch, 0][0] for epoch in range(6)]
    torch.rand(7)
    backward = [second[epoch, 0][0] for epoch in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert len({(tuple(x.shape), x.float().mean().item()) for x in forward}) > 3  # epochs differ
    other = DetectionSet(painted(tmp_path), train=True, resolution=100, seed=4)
    assert any(not torch.equal(other[e, 0][0], x) for e, x in enumerate(forward))


def test_detection_items_clip_boxes_and_leave_crowds_out(tmp_path):
    found = read_annotations(coco(tmp_path))
    x, boxes, labels, _, _ = DetectionSet(found, train=False, resolution=50)[0, 0]
    assert len(boxes) == 0 and boxes.shape == (0, 4) and labels.dtype == torch.int64  # the only box is a crowd
    hanging = painted(tmp_path, boxes=((-50, -50, 60, 60),))
    _, boxes, _, _, _ = DetectionSet(hanging, train=False, resolution=240)[0, 0]
    torch.testing.assert_close(boxes, torch.tensor([[0.15, 0.25, 0.3, 0.5]]))


@pytest.mark.parametrize("w, h", [(1, 1), (20000, 10), (10, 20000), (2, 900)])
def test_detection_items_of_extreme_images_come_through(tmp_path, w, h):
    found = painted(tmp_path, w, h, boxes=((0, 0, max(1, w // 2), max(1, h // 2)),))
    for train in (False, True):
        for epoch in range(8):
            x, boxes, _, _, _ = DetectionSet(found, train=train, resolution=160)[epoch, 0]
            assert 1 <= min(x.shape) and max(x.shape) <= 267
            assert torch.isfinite(boxes).all() and (boxes[:, 2:] > 0).all()
            assert len(boxes) == 1 or train


def test_detection_items_name_the_file_that_cannot_be_read(tmp_path):
    found = painted(tmp_path)
    (tmp_path / "p.png").write_bytes(b"gone bad")
    with pytest.raises(ValueError, match="p.png"):
        DetectionSet(found, train=True)[0, 0]
    save(tmp_path / "p.png", picture(17, 19))
    with pytest.raises(ValueError, match="p.png.*annotation says"):
        DetectionSet(found, train=True)[0, 0]


def test_collate_detections_marks_what_is_filling(tmp_path):
    found = read_annotations(coco(tmp_path))
    found.crowd[0][:] = False
    validation = DetectionSet(found, train=False, resolution=50)
    batch = collate_detections([validation[0, 0], validation[0, 1]])
    assert batch.x.shape == (2, 3, 82, 66) and batch.boxes.shape == (2, 2, 4) and batch.labels.shape == (2, 2)
    assert batch.valid.tolist() == [[True, False], [True, True]] and batch.index.tolist() == [0, 1]
    assert batch.labels[1].tolist() == [2, 1] and batch.size.tolist() == [[40, 30], [20, 50]]
    assert batch.to("cpu").mask.dtype == torch.bool
    found.crowd[0][:] = True
    empty = collate_detections([validation[0, 0]])
    assert empty.boxes.shape == (1, 1, 4) and not empty.valid.any()


# ---- the toy set


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toyset.write_toy(tmp_path_factory.mktemp("toy") / "set", unlabelled=5, train=6, val=4, size=96, seed=1)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_toy_set_is_deterministic_and_complete(toy, tmp_path):
    again = toyset.write_toy(tmp_path / "set", unlabelled=5, train=6, val=4, size=96, seed=1)
    assert contents(toy) == contents(again) and list(tmp_path.iterdir()) == [again]
    assert len(list_images(toy / "unlabelled").paths) == 5
    assert {Path(path).suffix for path in list_images(toy).paths} == {".jpg", ".png"}
    found = read_annotations(toy / "train.json")
    assert len(found.images) == 6 and len(found.categories) >= 6 and not found.bad
    assert all(len(row) for row in found.labels)
    other = toyset.write_toy(tmp_path / "other", unlabelled=5, train=6, val=4, size=96, seed=2)
    assert contents(other)["train/00000.jpg"] != contents(toy)["train/00000.jpg"] != contents(toy)["val/00000.jpg"]


def test_toy_set_is_used_again_and_others_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toyset, "draw_scene", None)  # nothing is drawn
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    assert toyset.write_toy(toy, unlabelled=5, train=6, val=4, size=96, seed=1) == toy
    assert before == {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("keep me")
    for folder in (toy, tmp_path / "mine", tmp_path / "mine" / "work.txt"):
        with pytest.raises(ValueError, match="is not the toy set"):
            toyset.write_toy(folder, unlabelled=5, train=6, val=4, size=96, seed=2)
    assert (tmp_path / "mine" / "work.txt").read_text() == "keep me"


def test_toy_boxes_bound_their_shapes(monkeypatch):
    """On flat black, with one white shape a scene, the drawn pixels must fill the box to within a pixel."""
    paints = iter([])
    monkeypatch.setattr(toyset, "texture", lambda w, h, g: np.full((h, w, 3), next(paints), np.float32))
    monkeypatch.setattr(toyset, "randint", lambda low, high, g: label if low == 0 else 1)  # one object, of that class
    sides = []
    for i in range(90):
        label, paints = i % len(toyset.SHAPES), iter([0.0, 1.0])
        image, boxes_xyxy, labels = toyset.draw_scene(200, data.stream(0, i))
        if not labels:
            continue  # cut off by the border
        assert labels == [label]
        bounds = red_bounds(torch.from_numpy(image).permute(2, 0, 1))
        x0, y0, x1, y1 = boxes_xyxy[0]
        if x0 == 0 or y0 == 0 or x1 == image.shape[1] or y1 == image.shape[0]:  # overhangs: the box may be larger
            assert (bounds[:2] >= torch.tensor([x0, y0]) - 1.5).all()
            assert (bounds[2:] <= torch.tensor([x1, y1]) + 1.5).all()
        else:
            assert (bounds - torch.tensor(boxes_xyxy[0])).abs().max() <= 1.5, i
        sides.append(max(boxes_xyxy[0][2] - boxes_xyxy[0][0], boxes_xyxy[0][3] - boxes_xyxy[0][1]) / 200)
    assert len(sides) > 80 and min(sides) < 0.17 and 0.4 < max(sides) <= 0.51


def test_toy_shapes_that_are_mostly_hidden_get_no_label(monkeypatch):
    monkeypatch.setattr(
        toyset, "place", lambda contours, side, w, h, g: [np.array([[10, 10], [40, 10], [40, 40], [10, 40.0]])]
    )
    _, boxes_xyxy, labels = toyset.draw_scene(100, data.stream(0, 1))
    assert boxes_xyxy == [[10, 10, 40, 40]] and len(labels) == 1  # each of them covers the one before


def test_toy_labels_say_nothing_about_colour():
    scenes = [toyset.draw_scene(64, data.stream(5, i)) for i in range(120)]
    counts = np.bincount([label for _, _, labels in scenes for label in labels], minlength=len(toyset.SHAPES))
    assert counts.min() > 0.5 * counts.mean() and 2 < counts.sum() / len(scenes) < 4.5
    hues = [[], []]
    for image, boxes_xyxy, labels in scenes:
        for (x0, y0, x1, y1), label in zip(boxes_xyxy, labels, strict=True):
            hues[label % 2].append(image[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1].mean((0, 1)))
    assert np.abs(np.mean(hues[0], 0) - np.mean(hues[1], 0)).max() < 25


# ---- commands


def test_check_reports_counts_classes_bad_boxes_and_unreadable_files(tmp_path):
    rows = json.loads(coco(tmp_path).read_text())["annotations"]
    path = coco(tmp_path, annotations=[*rows, {"id": 9, "image_id": 70, "category_id": 3, "bbox": [1, 1, 0, 5]}])
    (tmp_path / "b.png").write_bytes(b"bad")
    report = data.check(path)
    counts = ("2 images", "3 boxes", "1 crowd", "3 classes", "1 bad", "1 unreadable")
    assert all(part in report for part in (*counts, "a.png: box [1.0, 1.0, 0.0, 5.0]", "b.png cannot be read"))
    assert ["17", "1", "1", "cat"] in [line.split() for line in report.splitlines()]
    folder = data.check(tmp_path)
    assert "2 images" in folder and "width 40 to 40" in folder and "b.png cannot be read" in folder


def test_commands_run_and_fail_with_one_sentence(tmp_path, capsys):
    root = voc(tmp_path / "VOC2007", OBJECTS)
    data.main(["voc2coco", str(root), str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="^data.py: .*gone.json[^\n]*$"):
        data.main(["check", str(root), str(tmp_path / "out.json"), str(tmp_path / "gone.json")])
    assert capsys.readouterr().out.count("3 images") == 2
