"""The report page: a pure function of the results; checked as a browser or a screen reader would meet it."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ddoq_ray import config
from ddoq_ray.page import METHODS, accuracy_table, render_page
from ddoq_ray.page.charts import DASHES, Series, line_chart, ticks
from ddoq_ray.page.tables import accuracy_lines, method_order, method_slots
from ddoq_ray.stages.report.step import finite, paired
from ddoq_ray.storage.folder import Folder

VOID = {"meta", "link", "img", "br", "hr", "input"}
EMPTY_SVG = {"line", "polyline", "polygon", "circle", "path", "rect"}


class Page(HTMLParser):
    """Collects tags and visible text, and fails on elements that are closed in the wrong order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in EMPTY_SVG, f"<{tag}/> is not empty in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if "style" not in self.stack:
            self.pieces.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def encoded(side: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 90)).save(buffer, format=kind)
    return buffer.getvalue()


def image(method: str, class_id: int, centroid_id: int, weight: float, side: int = 16, kind: str = "PNG") -> dict:
    return {
        "method": method, "class_id": class_id, "class_name": f"kind {class_id}", "centroid_id": centroid_id,
        "weight": weight, "png": encoded(side, kind), "width": side, "height": side,
    }  # fmt: skip


def row(method: str, seed: int, top1: float, ipc: int | None = 2) -> dict:
    return {
        "method": method, "ipc": ipc, "student": "convnet3", "seed": seed, "top1_pct": top1, "top5_pct": top1 + 20,
        "epochs": 30, "best_top1_pct": top1 + 1, "best_epoch": 20 + seed, "train_images": 4 if ipc else 1234,
        "seconds": 3.0,
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    return {
        "name": "trial", "dataset": "shapes", "ipc": 2, "own_method": "ddoq", "command": "ddoq report run=here",
        "commit": "feedc0de", "created": "2025-01-02", "versions": {"ray": "2.50.1"},
        "config": {"seed": 7, "quantize": {"winner": "corrected", "sizes": [3, 5]}, "students": [{"arch": "cnn"}]},
        "counts": {"train_images": 1234, "classes": 2, "distilled_images": 4, "val_images": 321},
        "rows": [
            row("random", 0, 50.0), row("random", 1, 52.0), row("full", 0, 90.0, None),
            row("ddoq", 0, 60.0), row("ddoq", 1, 61.0),
        ],
        "paired": [{"method": "ddoq", "baseline": "random", "mean_diff_pct": 9.5, "std_diff_pct": 0.71, "n": 2}],
        "classes": [
            {"method": m, "ipc": 2, "class_id": c, "name": f"kind {c}", "n": 617 + c, "k": 2, "distortion": v * v,
             "w2_voronoi": v, "w2_uniform": 1.25 * v}
            for m, f in (("ddoq", 1.0), ("random", 2.0)) for c, v in ((0, 3.0 * f), (1, 4.0 * f))
        ],
        "heldout": {"images": 0, "images_per_class": 50, "missing": ""},
        "curves": [
            {"method": m, "seed": s, "epochs": [10, 20, 30], "train_loss": [2.0, 1.5, 1.0 + s],
             "top1_pct": [20.0, None, 60.0 + s]}
            for m in ("ddoq", "random") for s in (0, 1)
        ],
        "stages": [
            {"stage": "encode", "seconds": 8.0, "items": 1234, "unit": "images", "bytes": 2_500_000},
            {"stage": "train", "seconds": 754.0, "items": 5, "unit": "students", "bytes": 900},
        ],
        "quarantine": {"samples": 3, "reasons": {"cannot be decoded": 2, "no class": 1}},
        "teacher": {"top1_pct": 91.23, "arch": "resnet18-small", "split": "test"},
    }  # fmt: skip


@pytest.fixture
def images() -> list[dict]:
    return [
        image("random", 0, 0, 0.5),
        image("ddoq", 0, 0, 0.25),
        image("ddoq", 0, 1, 0.75),
        image("ddoq", 1, 0, 1.0),
    ]


def test_page_is_well_formed_and_shows_every_number(results, images):
    page = Page(render_page(results, images))
    expected = [
        "shapes, 2 images per class", "1,234", "321", "308 times fewer",  # 1234 / 4 = 308.5, rounded to even
        "60.50 ± 0.71", "51.00 ± 1.41", "90.00", "80.50 ± 0.71", "61.50 ± 0.71", "epoch 20-21",
        "+9.50 ± 0.71", "2 pairs",
        "0.250", "0.750", "1.000",
        "617", "3.75", "−20.0 %", "12.5", "50",  # W2 uniform; (3 - 3.75) / 3.75; mean distortions (9+16)/2, (36+64)/2
        "8.0 s", "154 images/s", "2.5 MB", "12 min 34 s", "900 B", "0.0066 students/s",
        "cannot be decoded", "91.23 % top-1 on test", "ddoq report run=here", "feedc0de", "2.50.1",
        "quantize.winner", "corrected", "quantize.sizes", "3, 5", "students[0].arch",
    ]  # fmt: skip
    assert [text for text in expected if text not in page.text] == []


def test_nothing_outside_the_page_is_referred_to(results, images):
    html = render_page(results, images)
    page = Page(html)
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not page.all("script") and "url(" not in html and "@import" not in html
    references = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "action")]
    assert references and all(str(v).startswith("data:") for v in references)


def test_accessible_names_and_table_headers(results, images):
    page = Page(render_page(results, images))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row", "rowgroup") for attrs in page.all("th"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") == "true" for attrs in page.all("svg"))
    assert page.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)


def test_images_in_order_of_weight_own_method_first(results, images):
    page = Page(render_page(results, images))
    assert [attrs["alt"] for attrs in page.all("img")] == [
        "ddoq, class kind 0, centroid 1, weight 0.750",
        "ddoq, class kind 0, centroid 0, weight 0.250",
        "ddoq, class kind 1, centroid 0, weight 1.000",
        "random, class kind 0, centroid 0, weight 0.500",
    ]


def test_small_images_are_enlarged_and_large_ones_limited(results):
    sizes = [(16, "64"), (64, "64"), (100, "100"), (512, "128")]
    page = Page(render_page(results, [image("ddoq", i, 0, 1.0, side) for i, (side, _) in enumerate(sizes)]))
    shown = page.all("img")
    assert [(a["width"], a.get("class")) for a in shown] == [
        ("64", "enlarged"), ("64", None), ("100", None), ("128", None)
    ]  # fmt: skip
    assert shown[3]["src"].startswith("data:image/jpeg")  # scaled down before it is embedded


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_media_type_follows_the_bytes(results, kind):
    page = Page(render_page(results, [image("ddoq", 0, 0, 1.0, 32, kind)]))
    assert page.all("img")[0]["src"].startswith(f"data:image/{kind.lower()};base64,")


def test_strings_are_escaped(results, images):
    bad = "<script>x</script>\"'&"
    for key in ("name", "dataset", "command", "commit", "created"):
        results[key] = bad
    results["versions"], results["config"] = {bad: bad}, {bad: bad}
    results["quarantine"]["reasons"] = {bad: 1}
    results["teacher"].update(arch=bad, split=bad)
    results["stages"][0].update(stage=bad, unit=bad)
    for part in ("rows", "classes", "curves"):
        results[part].append({**results[part][-1], "method": bad, "name": bad, "student": bad})
    images.append({**images[0], "method": bad, "class_name": bad})
    html = render_page(results, images)
    page = Page(html)
    assert "<script" not in html and not page.all("script")
    assert page.text.count("<script>x</script>\"'&") >= 10
    assert any(bad in str(attrs["alt"]) for attrs in page.all("img"))


@pytest.mark.parametrize(
    "part",
    [
        "rows",
        "paired",
        "classes",
        "heldout",
        "curves",
        "stages",
        "config",
        "versions",
        "counts",
        "quarantine",
        "teacher",
    ],
)
def test_any_part_may_be_empty_or_missing(results, images, part):
    results[part] = type(results[part])()
    Page(render_page(results, images))
    del results[part]
    Page(render_page(results, images))
    accuracy_table(results)


def test_held_out_distortion_beside_that_of_the_training_latents(results, images):
    assert "Held-out" not in Page(render_page(results, images)).text  # nothing was measured, and no empty column
    results["heldout"] = {"images": 1100, "images_per_class": 50, "missing": ""}
    for entry in results["classes"]:
        entry |= {"heldout_n": 50, "heldout_distortion": 1.5 * entry["distortion"], "w2_sqrt": 3.9, "w2_stream": 3.6}
        entry |= {"heldout_w2_voronoi": entry["w2_voronoi"] + 1}
    text = Page(render_page(results, images)).text
    for shown in (
        "1,100 held-out ones", "12.50 18.75 +50.0 %", "50.00 75.00 +50.0 %",  # (9 + 16) / 2, and half more
        "Voronoi 3.500, counts kept while streaming 3.600, square root (Eq. 33) 3.900, uniform 4.375",
        "−20.0 % 4.000 617 2", "−20.0 % 5.000 618 2",  # W2 held out, beside each class
    ):  # fmt: skip
        assert shown in text, shown
    del results["classes"][0]["heldout_n"], results["classes"][0]["heldout_distortion"]
    del results["classes"][0]["heldout_w2_voronoi"]
    assert "16.00" not in text and "12.50 24.00 +92.0 %" in Page(render_page(results, images)).text


def test_why_nothing_was_held_out(results, images):
    results["heldout"] = {"images": 0, "images_per_class": 50, "missing": "the data has no <split>"}
    page = Page(render_page(results, images))
    assert "not measured on held-out latents: the data has no <split>." in page.text
    assert "Held-out" not in page.text


def test_an_empty_run_says_what_is_missing():
    for results in ({}, {"dataset": "shapes", "ipc": 2, "own_method": "ddoq"}):
        page = Page(render_page(results, []))
        for text in (
            "No student was evaluated",
            "stage synthesize",
            "No training curves",
            "No codebook",
            "No timings",
        ):
            assert text in page.text
        assert not re.search(r"\b(None|nan)\b", page.text)
        assert "no rows" in accuracy_table(results)


def test_not_a_number_is_a_dash(results, images):
    for entry in results["rows"]:
        entry.update(top1_pct=float("nan"), top5_pct=None, best_top1_pct=None)
    results["classes"][0]["w2_uniform"] = None
    page = Page(render_page(results, images))
    assert not re.search(r"\b(None|nan)\b", page.text)
    assert "nan" not in accuracy_table(results)


def test_a_method_of_which_a_student_diverged_has_no_figure(results, images):
    results["rows"][3] |= {"top1_pct": None, "top5_pct": None, "best_top1_pct": 33.0, "diverged": True}
    results["paired"] = paired(results["rows"], 2)
    assert [line["method"] for line in results["paired"]] == ["full"]
    line = accuracy_lines(results)[0]
    assert (line.method, line.top1, line.best, line.paired, line.diverged_text()) == (
        "ddoq", None, None, None, "1 of 2 diverged"
    )  # fmt: skip
    assert "1 of 2 diverged" in accuracy_table(results)
    text = Page(render_page(results, images)).text
    assert "1 of 2 diverged" in text and "no longer a finite number" in text and "60.00" not in text
    results["rows"][0] |= {"top1_pct": None, "diverged": True}  # now `random` has none either
    assert paired(results["rows"], 2) == []


def test_how_many_images_a_figure_is_of(results, images):
    results["counts"] |= {"val_images": 12, "val_refused": 12}
    results["quarantine"] = {"samples": 12, "reasons": {"undecodable image": 12}}
    text = Page(render_page(results, images)).text
    assert "scored on 12 held-out images; 12 more could not be read." in text
    assert "12 samples were refused and left out, of which 12 of the validation images" in text
    assert "on 12 validation images (12 more could not be read)" in accuracy_table(results).splitlines()[0]


def test_what_is_published_is_json() -> None:
    nan, inf = float("nan"), float("inf")
    value = {"a": [1.5, nan, (np.float32(inf), 2)], "b": {"c": -inf, "d": None, "e": True, "f": "nan"}}
    assert finite(value) == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": None, "e": True, "f": "nan"}}
    json.dumps(finite(value), allow_nan=False)


def test_a_folder_never_publishes_nan(tmp_path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Folder(str(tmp_path)).publish_json("x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_long_sets_are_cut_and_the_page_says_so(results, monkeypatch):
    monkeypatch.setattr("ddoq_ray.page.render.MAX_IMAGES", 4)
    monkeypatch.setattr("ddoq_ray.page.codebook.MAX_CLASSES", 1)
    page = Page(render_page(results, [image("ddoq", c, k, 0.5) for c in range(5) for k in range(2)]))
    assert len(page.all("img")) == 4
    assert "2 of 5 classes are shown" in page.text and "The first 1 classes of 2" in page.text


def test_accuracy_table_is_aligned(results):
    lines = accuracy_table(results).splitlines()
    assert lines[1].split()[:3] == ["method", "ipc", "student"]
    assert [line.split()[0] for line in lines[3:-1]] == ["ddoq", "random", "full"]
    assert "60.50 +- 0.71" in lines[3] and "+9.50 +- 0.71" in lines[3] and "61.50 +- 0.71 (20-21)" in lines[3]
    assert len({line.index(" +- ") for line in lines[3:5]}) == 1
    assert len({len(line) for line in lines[1:5]} | {len(lines[1])}) == 1
    assert accuracy_table(results).isascii()


def test_paired_difference_belongs_to_the_ipc_of_the_run(results):
    results["rows"] += [row("ddoq", s, 70.0 + s, ipc=10) for s in (0, 1)]
    texts = {(li.method, li.ipc): li.paired_text() for li in accuracy_lines(results)}
    assert texts["ddoq", 2] == "+9.50 ± 0.71" and texts["ddoq", 10] == ""
    page = Page(render_page(results, []))
    assert "10 images per class, student convnet3" in page.text and "Whole training set" in page.text


def test_every_method_has_its_own_slot():
    methods = method_order(["full", "random", "d4m", "zzz", "ddoq-sqrt", "ddoq", "ddoq-uniform"], "ddoq-sqrt")
    assert methods == ["ddoq-sqrt", "ddoq", "ddoq-uniform", "d4m", "random", "zzz", "full"]
    known = method_order(METHODS, "ddoq")
    for order, own in ((methods, "ddoq-sqrt"), (known, "ddoq")):
        slots = method_slots(order, own)
        assert slots[own] == "own" and len(set(slots.values())) == len(order)
        assert set(slots.values()) <= set(DASHES)  # each has its dashes
    assert set(METHODS) == set(config.METHODS)  # and every method of a run has its words


def test_ticks_and_charts_at_the_edges():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(3.0, 3.0) == [3.0]
    assert line_chart([], title="none") == ""
    one = line_chart([Series("m", "own", [1], [5.0], [5.0], [5.0])], title="one point")
    assert "<circle" in one and "nan" not in one
