"""The page in a real browser, and the HTML of each section without one."""

import base64
import dataclasses
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from catsdogs import report

Rows = list[dict[str, float]]
Show = Callable[..., Page]
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SIZES = {390: 844, 1280: 900}
MARKUP = ['"><script>alert(1)</script>', "<img src=x onerror=alert(1)>", "' onmouseover='alert(1)"]
MARKUP += ["{{ 7 * 7 }}</style></title>", "W" * 300]
CONTROL = ["\x1b[31mred", "cat\u202egpj.exe", "two\nlines", "lone\udc80"]
ESCAPED = [r"\x1b[31mred", r"cat\u202egpj.exe", r"two\nlines", r"lone\udc80"]


def history(num_epochs: int, **fixed: float) -> Rows:
    rows = []
    for epoch in range(1, num_epochs + 1):
        d = math.exp((1 - epoch) / 3)
        quality = {"train_loss": d, "train_accuracy": 1 - d / 3, "val_loss": d / 2, "val_accuracy": 1 - d / 2}
        rows.append({"epoch": epoch, "lr": 1e-3, "images_per_s": 34.2, "seconds": 58.8} | quality | fixed)
    return rows


def picture(path: str = "/data/cats/1.jpg", prob: float | None = 0.9) -> report.Picture:
    image = np.full((300, 500, 3), (200, 30, 30), np.uint8)
    return report.Picture(path=path, image=image, true_label="cats", label="dogs", prob=prob)


def build_page(names: list[str], rows: Rows) -> str:
    """Build every section, with `names` wherever the user's names are shown."""
    pictures = [report.Picture(path=n, image=picture().image, true_label=n, label=n, prob=0.5) for n in names]
    counts = {name: 100 - i for i, name in enumerate(names)}
    sections = [
        report.facts(dict.fromkeys(names, names[0])),
        report.curves(rows),
        report.confusion_matrix(names, np.eye(len(names), dtype=int) * 90 + 3, [2] * len(names)),
        report.dataset_grid(pictures),
        report.worst_mistakes(pictures),
        report.class_examples(dict.fromkeys(names, (pictures, pictures[:1]))),
        report.settings(dict.fromkeys(names, names[0])),
        report.label_counts(counts),
        report.confidence([3, 8, 20, 60, 300], np.linspace(0.5, 1, 6).tolist()),
        report.failures(counts, [(name, name, name) for name in names]),
        report.issue_counts(counts, [(name, name) for name in names]),
        report.findings("Leaks", names[0], [report.Finding(pictures=pictures[:2], note=names[0])]),
        report.findings("Odd images", names[0], [report.Finding(pictures=[p], note=p.path) for p in pictures]),
    ]
    return report.page(names[0], sections, subtitle=names[-1])


def build_comparison(names: list[str]) -> str:
    """Build every section of a comparison, with `names` wherever the user's names are shown."""
    matrix = {name: {names[0]: 5, name: 90} for name in names}
    row = {"path": names[0], "status_a": "ok", "status_b": "ok", "label_a": names[0], "label_b": names[-1]}
    row |= {"prob_a": 0.9, "prob_b": 0.8, "difference": 0.7, "true_label": names[-1]}
    failed = dict.fromkeys(("label_a", "prob_a", "difference", "true_label")) | {"status_a": "truncated"}
    figures = {"accuracy_a": 0.9, "accuracy_b": 0.8, "mcnemar_p": 1e-9, "psi_width": 0.3}
    recall = {name: {"a": 0.9, "b": 0.95, "images": 10} for name in names}
    sizes = {"width": {"p5": 100, "median": 300, "p95": 4000}}
    sections = [
        report.flips(names, matrix),
        report.status_changes({"ok": {"truncated": 3}}),
        report.largest_changes([row, row | failed], 2),
        report.paired_accuracy(figures, recall, (40, 3)),
        report.paired_histograms(
            [report.PairedHistogram(names[0], [0, 8, 3], [1, 0, 9]), report.PairedHistogram("x", [3, 1], None)]
        ),
        report.paired_shares(names[0], dict.fromkeys(names, 3), dict.fromkeys(names[:1], 5)),
        report.paired_sizes(sizes, sizes, figures),
    ]
    return report.page(names[0], sections, subtitle=names[-1])


def text(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def table(html: str) -> list[str]:
    rows = re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    return ["|".join(text(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)) for row in rows]


def test_page_closes_every_tag_and_is_reproducible() -> None:
    html = build_page(["cats", "dogs"], history(4))
    assert html == build_page(["cats", "dogs"], history(4))
    opened = Counter(re.findall(r"<(\w+)(?![^>]*/>)", html))
    assert opened - Counter(re.findall(r"</(\w+)>", html)) == {"meta": 5, "link": 1, "img": 14}


def test_hostile_names_are_escaped_and_can_be_encoded() -> None:
    html = build_page(MARKUP + CONTROL, history(2))
    html.encode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert not re.search(r"<script|<img src=x|</style>.*</style>|'alert", html, re.DOTALL)


def test_names_of_other_scripts_and_emoji_are_not_escaped() -> None:
    names = "Кошка 猫.jpg חתול می\u200cخواهم 👩\u200d🚀 e\u0301té"
    assert names in report.facts({"names": names}).html


@pytest.mark.parametrize(
    ("rows", "marked"),
    [
        (history(1), "best epoch 1: 0.500"),
        (history(5, val_accuracy=0.75), "best epoch 5: 0.750"),
        (history(5, val_accuracy=0.75, val_loss=0.5), "best epoch 1: 0.750"),
        (history(5, val_loss=math.nan), "best epoch 5: –"),
        (history(3, val_accuracy=math.nan), ""),
        ([{"epoch": 1, "train_loss": math.inf}], ""),
    ],
)
def test_curves_mark_the_best_epoch(rows: Rows, marked: str) -> None:
    shown = text(report.curves(rows).html)
    assert marked in shown
    assert ("best" in shown) == bool(marked)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (report.curves([]), "No epoch has finished."),
        (report.confusion_matrix(["x"] * 40, np.eye(40, dtype=int)), "No image of 40 classes was misclassified."),
        (report.dataset_grid([]), "No images."),
        (report.worst_mistakes([]), "None: every image that was classified is classified correctly."),
        (report.worst_mistakes([], 3), "3 further images cannot be decoded any more."),
        (report.label_counts({"cats": 0}), "No image was classified."),
        (report.confidence([0, 0], [0, 0.5, 1]), "No image was classified."),
        (report.failures({"ok": 1200}, []), "None: all 1,200 images were classified."),
        (report.failures({"ok": 1200}, [], "decoded"), "None: all 1,200 images were decoded."),
        (report.issue_counts({"dark": 0}, []), "No issues."),
    ],
)
def test_an_empty_section_says_so(section: report.Section, words: str) -> None:
    assert words in section.html


def test_scoring_sections_show_counts_and_shares() -> None:
    labels = text(report.label_counts({f"class {i}": 1000 - i for i in range(30)}).html)
    assert labels.index("class 0") < labels.index("class 24") < labels.index("5 more classes with 4,865 images.")
    assert "85.0 % at 0.9 or above" in report.confidence([15, 85], [0.5, 0.9, 1]).html
    failed = report.failures({"ok": 90, "empty": 1, "truncated": 9}, [("/a/b.jpg", "empty", "0 bytes")]).html
    assert "10 of 100 images (10.0 %) were not classified." in failed
    assert table(failed)[1:] == ["truncated||9", "empty||1", "path|status|error", "/a/b.jpg|empty|0 bytes"]


def test_mistakes_are_sorted_by_confidence() -> None:
    pictures = [picture("/a/low.jpg", 0.6), picture("/a/none.jpg", None), picture("/a/high.jpg", 0.99)]
    shown = " ".join(text(report.worst_mistakes(pictures).html).split())
    assert shown == "cats → dogs 0.990 high.jpg cats → dogs 0.600 low.jpg cats → dogs none.jpg"


def test_a_mistake_is_pale_where_it_does_not_support_the_label() -> None:
    support = np.array([[-1.0, 0.5, 2.0]], dtype=np.float32)  # a third of the width each
    (marked, plain) = (dataclasses.replace(picture(), activation_map=values) for values in (support, None))
    html = report.worst_mistakes([marked, plain]).html
    assert html.count("<img") == 3
    assert "class activation map" in html
    assert "class activation map" not in report.worst_mistakes([plain]).html
    with Image.open(io.BytesIO(base64.b64decode(marked.attention.partition(",")[2]))) as image:
        green_W = np.asarray(image)[50, :, 1]
    assert (green_W[5], green_W[-5]) == (pytest.approx(240 - 0.15 * 210, abs=8), pytest.approx(30, abs=8))


def test_confusion_matrix_counts_and_quality() -> None:
    shown = table(report.confusion_matrix(["cat", "dog"], [[8, 2], [1, 1009]]).html)
    assert shown[:3] == ["|cat|dog", "cat|8|2", "dog|1|1,009"]
    assert shown[4:] == ["cat|0.889|0.800|0.842|10", "dog|0.998|0.999|0.999|1,010"]


def test_confusion_matrix_counts_images_that_were_not_classified_as_incorrect() -> None:
    shown = table(report.confusion_matrix(["cat", "dog"], [[8, 0], [0, 0]], [2, 0]).html)
    assert shown[:3] == ["|cat|dog|not classified", "cat|8|0|2", "dog|0|0|0"]
    assert shown[4:] == ["cat|1.000|0.800|0.889|10", "dog|–|–|–|0"]


def test_many_classes_show_the_most_confused_pairs_and_the_worst_classes_first() -> None:
    matrix = np.eye(1000, dtype=int) * 10
    matrix[7, 9], matrix[3, 1] = 5, 2
    shown = table(report.confusion_matrix([f"class {i}" for i in range(1000)], matrix).html)
    assert shown[1:3] == ["class 7|class 9|5|33.3 %", "class 3|class 1|2|16.7 %"]
    assert shown[4].startswith("class 7|")
    assert len(shown) == 2 + 2 + 1000


@pytest.mark.parametrize("shape", [(1, 1), (300, 500), (5000, 2), (40, 4000)])
def test_thumbnail_is_a_small_jpeg(shape: tuple[int, int]) -> None:
    thumbnail = report.Picture(path="x", image=np.zeros((*shape, 3), np.uint8)).thumbnail
    with Image.open(io.BytesIO(base64.b64decode(thumbnail.partition(",")[2]))) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert max(image.size) <= 160


def test_flips_count_labels_of_both() -> None:
    shown = report.flips(["cat", "dog"], {"cat": {"cat": 8, "dog": 2}, "dog": {"dog": 1000}}).html
    assert table(shown)[:3] == ["|cat|dog", "cat|8|2", "dog|0|1,000"]
    assert "2 of 1,010 images (0.2 %) that both classified have another label in B." in text(shown)
    many = {f"class {i}": {f"class {i}": 10, f"class {i + 1}": i} for i in range(40)}
    assert table(report.flips([f"class {i}" for i in range(41)], many).html)[1] == "class 39|class 40|39"


def test_shares_that_differ_most_come_first() -> None:
    shown = report.paired_shares("Formats", {".jpg": 90, ".png": 10}, {".jpg": 3, ".gif": 1}).html
    assert [row.split("|")[0] for row in table(shown)[1:]] == [".gif", ".jpg", ".png"]
    assert table(shown)[2] == ".jpg||90.0 %|75.0 %"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (report.flips(["cat"], {}), "No image was classified in both."),
        (report.status_changes({"ok": {"ok": 3}}), "No image has another status in B."),
        (report.largest_changes([], 0), "None: every image in both has the same status and label."),
        (report.paired_histograms([report.PairedHistogram("x", [1], [0])]), "No image was classified."),
        (report.paired_sizes({"width": {}}, {"width": {}}, {"psi_width": None}), "No image was classified."),
    ],
)
def test_an_empty_section_of_a_comparison_says_so(section: report.Section, words: str) -> None:
    assert words in section.html


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as chromium:
        yield chromium


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """Open a page; check that it fits the screen and causes no message, dialog or further request."""
    file, seen = tmp_path / "report.html", list[str]()
    with browser.new_page() as page:
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.add_init_script("window.alert = console.log")

        def open_page(html: str, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> Page:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": SIZES[width]})
            file.write_text(html)
            page.goto(file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            return page

        yield open_page
    assert {url for url in seen if not url.startswith("data:")} == {file.as_uri()}


def pixels_of(plot: Locator, *variables: str) -> list[int]:
    """Count the pixels of the plot's box that have the colours of CSS variables."""
    pixels = np.asarray(Image.open(io.BytesIO(plot.screenshot())).convert("RGB")).astype(int)
    style = "plot => getComputedStyle(plot).getPropertyValue"
    colours = [list(bytes.fromhex(plot.evaluate(f"{style}('{name}')")[1:])) for name in variables]
    return [int((np.abs(pixels - colour).max(axis=-1) <= 12).sum()) for colour in colours]


def assert_plots_are_drawn(page: Page) -> None:
    loss, accuracy, learning_rate, histogram = page.locator(".drawing").all()
    drawn = [*pixels_of(loss, "--train", "--accent"), *pixels_of(accuracy, "--train", "--accent")]
    drawn += pixels_of(learning_rate, "--train")
    assert min(drawn + pixels_of(histogram, "--accent")) > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_plots_are_drawn_side_by_side_or_stacked(show: Show, width: int, scheme: str) -> None:
    page = show(build_page(["cats", "dogs"], history(8)), width, scheme)
    assert_plots_are_drawn(page)
    lefts = {plot.evaluate("plot => plot.offsetLeft") for plot in page.locator(".plots .drawing").all()}
    assert len(lefts) == (1 if width == 390 else 2)


@pytest.mark.parametrize("hidden", ["", ".plot [id*=line2d]", ".plot [id*=patch]"])
def test_the_check_of_plots_fails_for_an_empty_one(show: Show, hidden: str) -> None:
    html = build_page(["cats", "dogs"], history(8) if hidden else [{"epoch": 1}, {"epoch": 2}])
    page = show(html.replace("</style>", hidden + "{opacity:0}</style>"))
    with pytest.raises(AssertionError, match="min"):
        assert_plots_are_drawn(page)


def test_page_is_accessible(show: Show) -> None:
    page = show(build_page(["cats", "dogs"], history(4)))
    assert page.title() == page.locator("html[lang=en] h1").inner_text() == "cats"
    assert page.locator("img:not([alt]), img[alt=''], th:not([scope]), [role]:not([aria-label])").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", SIZES)
def test_hostile_names_are_text_even_without_the_security_policy(show: Show, width: int) -> None:
    page = show(build_page(MARKUP + CONTROL, history(1)).replace("http-equiv", "data-not"), width)
    assert page.locator("script, [onerror], [onmouseover], img:not([src^='data:'])").count() == 0
    for escaped in MARKUP + ESCAPED:
        assert page.get_by_text(escaped, exact=True).count() >= 8


@pytest.mark.parametrize("width", SIZES)
def test_hostile_names_are_text_in_a_comparison(show: Show, width: int) -> None:
    page = show(build_comparison(MARKUP + CONTROL).replace("http-equiv", "data-not"), width)
    assert page.locator("script, [onerror], [onmouseover], img:not([src^='data:'])").count() == 0
    for escaped in MARKUP + ESCAPED:
        assert page.get_by_text(escaped, exact=True).count() >= 4
    assert page.locator("th:not([scope]), [role]:not([aria-label])").count() == 0


@pytest.mark.parametrize("width", SIZES)
def test_histograms_of_two_results_are_drawn_side_by_side_or_stacked(show: Show, width: int) -> None:
    page = show(build_comparison(["cats", "dogs"]), width)
    paired, single = page.locator(".drawing").all()
    assert min(pixels_of(paired, "--train", "--accent") + pixels_of(single, "--accent")) > 100
    lefts = {plot.evaluate("plot => plot.offsetLeft") for plot in (paired, single)}
    assert len(lefts) == (1 if width == 390 else 2)


@pytest.mark.parametrize("width", SIZES)
def test_a_wide_confusion_matrix_scrolls_in_its_own_box(show: Show, width: int) -> None:
    matrix = report.confusion_matrix([f"a long class name {i}" for i in range(30)], np.full((30, 30), 12345))
    page = show(report.page("Wide", [matrix]), width)
    assert page.locator(".scroll").first.evaluate("box => box.scrollWidth > box.clientWidth")


def build_decisions(names: list[str]) -> list[report.Section]:
    before, after = ([0.6, 0.8, 0.95], [0.7, 0.9, 0.99]), ([0.65, 0.85, 0.97], [0.66, 0.84, 0.98])
    observed, guaranteed = [(1.0, 0.1), (0.9, 0.6), (0.8, 1.0)], [(0.99, 0.0), (0.95, 0.2), (0.9, 0.5), (0.7, 1.0)]
    counts = report.decision_counts(dict.fromkeys(names, 10), {names[0]: 4, "review": 6}, dict.fromkeys(names, 0.875))
    return [report.calibration("temperature 2", before, after, observed, guaranteed), counts]


def test_calibration_and_decisions_have_their_numbers() -> None:
    calibration, counts = build_decisions(["cats", "dogs"])
    assert table(calibration.html)[1:] == ["0.99|0.0 %", "0.95|20.0 %", "0.9|50.0 %"]
    assert "0.95 accepts 20.0 %" in calibration.html
    assert "Before: 0.70 at 0.60, 0.90 at 0.80, 0.99 at 0.95." in calibration.html
    assert "20.0 % of 20 classified images are accepted" in counts.html
    assert table(counts.html)[1:] == ["cats|0.8750|4|6", "dogs|0.8750|0|10"]
    none = report.decision_counts({"cats": 0}, {}, {"cats": None}).html
    assert "No image was classified." in none
    empty = report.calibration("", ([0.9], [1.0]), ([0.9], [1.0]), [(1.0, 1.0)], [(0.95, 0.0)])
    assert "0.95 accepts 0.0 %" in empty.html


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_plots_of_calibration_are_drawn_and_hostile_names_are_text(show: Show, width: int, scheme: str) -> None:
    page = show(report.page("Decisions", build_decisions(MARKUP + CONTROL)), width, scheme)
    drawn = [count for plot in page.locator(".drawing").all() for count in pixels_of(plot, "--train", "--accent")]
    assert len(drawn) == 4
    assert min(drawn) > 50
    assert page.locator("script, [onerror], [onmouseover], [role]:not([aria-label])").count() == 0
    for escaped in MARKUP + ESCAPED:
        assert page.get_by_text(escaped, exact=True).count() == 1
