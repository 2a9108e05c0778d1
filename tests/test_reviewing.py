"""A person labels picked images by keys, in a real browser; `train --labels` takes the table."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, sync_playwright
from predictions_tables import CLASSES, build_table, draw_probs, to_parquet, write_scoring
from test_report import CHROMIUM, CONTROL, FLAGS, MARKUP

from catsdogs import cli, report
from catsdogs.config import ReviewConfig
from catsdogs.errors import RunError
from catsdogs.labels import LabelSource, list_training
from catsdogs.results import Result
from catsdogs.reviewing import review
from catsdogs.reviewing.picks import Picker

NUM_IMAGES = 26


def pick(uri: str, **settings: object) -> list[dict]:
    """Pick rows of a result as `review` does, without their images."""
    config = ReviewConfig(scores=uri, output="o", **settings)
    result = Result.open(uri)
    drops_alike = result.has_embeddings and config.strategy != "random"
    picker = Picker(config, list(result.class_names), drops_alike)
    may_find_more = True
    while may_find_more:
        for batch in result.iter_batches({name: i for i, name in enumerate(result.class_names)}, drops_alike):
            picker.add(batch)
        may_find_more = picker.finish_pass()
    return picker.pick().to_pylist()


@pytest.fixture
def scores(tmp_path) -> str:
    """Write a scoring of 150 images in several parts; some failed."""
    paths = [f"/data/{CLASSES[i % 3]}/{i * 37 % 150:03}.jpg" for i in range(150)]
    return write_scoring(tmp_path / "scores", build_table(paths, draw_probs(150, 0), failed=(0, 5)))


def read_ok_rows(uri: str) -> list[dict]:
    rows = [row for part in sorted(Path(uri).glob("part-*")) for row in pq.read_table(part).to_pylist()]
    return [row for row in rows if row["status"] == "ok"]


def test_uncertain_picks_have_the_smallest_margins(scores):
    def margin(row: dict) -> float:
        first, second = sorted(row["probs"])[:-3:-1]
        return first - second

    rows = sorted(read_ok_rows(scores), key=margin)
    assert [row["path"] for row in pick(scores, n=60)] == [row["path"] for row in rows[:60]]
    of_class = [row["path"] for row in rows if row["label"] == "dog"]
    assert [row["path"] for row in pick(scores, n=500, class_name="dog")] == of_class


def test_suspect_picks_contradict_their_folder_the_most_confident_first(scores):
    rows = [row for row in read_ok_rows(scores) if row["label"] != row["true_label"]]
    expected = sorted(rows, key=lambda row: (-row["prob"], row["path"]))[:40]
    picked = pick(scores, strategy="suspect", n=40)
    assert [(row["path"], row["label"], row["true_label"]) for row in picked] == [
        (row["path"], row["label"], row["true_label"]) for row in expected
    ]


def test_random_picks_are_a_sample_that_does_not_change(scores):
    picked = [row["path"] for row in pick(scores, strategy="random", n=100)]
    assert picked == [row["path"] for row in pick(scores, strategy="random", n=100)]
    assert len(set(picked)) == 100
    assert picked[:30] == [row["path"] for row in pick(scores, strategy="random", n=30)]
    assert picked != sorted(picked)


def test_images_that_look_alike_are_picked_once(tmp_path):
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(20, 16)).astype(np.float32)
    embeddings = np.repeat(distinct, 3, axis=0) + rng.normal(0, 0.01, (60, 16)).astype(np.float32)
    table = build_table([f"/x/{i:02}.jpg" for i in range(60)], draw_probs(60, 0), failed=(4,), embeddings_ND=embeddings)
    uri = write_scoring(tmp_path / "scores", table)
    picked = [int(row["path"][3:5]) // 3 for row in pick(uri, n=40)]
    assert sorted(picked) == list(range(20))
    assert len({int(row["path"][3:5]) // 3 for row in pick(uri, strategy="random", n=40)}) < 40


@pytest.mark.parametrize(("n", "num_picked"), [(10, 10), (24, 21)])
def test_many_images_that_look_alike_do_not_hide_the_others(tmp_path, n, num_picked):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(320, 16)).astype(np.float32)
    embeddings[:150], embeddings[150:300] = embeddings[0], embeddings[-1]  # as the frames of two videos
    probs = np.zeros((320, 3), np.float32)
    probs[:, 0] = 0.5 + np.arange(320) / 1000
    probs[:, 1] = 1 - probs[:, 0]
    paths = [f"/x/{i:03}.jpg" for i in range(320)]
    uri = write_scoring(tmp_path / "scores", build_table(paths, probs, failed=(7,), embeddings_ND=embeddings))
    picked = [row["path"] for row in pick(uri, n=n)]
    assert picked == [paths[i] for i in (0, 150, *range(300, 319))][:num_picked]


# Bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n 0", "--n: expected 1 to 1000, got 0"),
        ("--n 5000", "--n: expected 1 to 1000, got 5000"),
        ("--class wolf", "--class: expected one of 'cat', 'dog', 'fox', got 'wolf'"),
        ("--strategy suspect --scores OTHER", "no row has the status ok, a true_label and another label"),
        ("--scores FAILED", "no row has the status ok"),
        ("--scores MISSING", "expected an output of score"),
        ("--output SCORES", "expected another folder than --scores"),
    ],
)
def test_bad_input_is_refused_before_ray_starts(scores, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing listens there
    write_scoring(tmp_path / "OTHER", build_table(["/x/1.jpg"], draw_probs(1, 0)))
    write_scoring(tmp_path / "FAILED", build_table(["/x/1.jpg"], draw_probs(1, 0), failed=(0,)))
    given = [str(tmp_path / word) if word.isupper() else word for word in flags.replace("SCORES", "scores").split()]
    given = [scores if word == "scores" else word for word in given]
    arguments = {"--scores": scores, "--output": str(tmp_path / "out")} | dict(
        zip(given[::2], given[1::2], strict=True)
    )
    assert cli.main(["review", *(word for pair in arguments.items() for word in pair)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


# The page


@pytest.fixture(scope="module")
def reviewed(ray_cluster, red_blue_root, tmp_path_factory) -> Path:
    """Review a scoring of the drawn images; one of them is gone."""
    folder = tmp_path_factory.mktemp("review")
    paths = sorted(str(path) for path in (red_blue_root / "train").rglob("*.jpg"))
    assert len(paths) == NUM_IMAGES
    paths[3] = paths[3].replace(".jpg", "-gone.jpg")
    scores = folder / "scores.parquet"
    scores.write_bytes(to_parquet(build_table(paths, draw_probs(NUM_IMAGES, 0, 2), ("blue", "red")), ("blue", "red")))
    counts = review(ReviewConfig(scores=str(scores), output=str(folder / "out"), n=30))
    assert counts == {"picked": NUM_IMAGES, "candidates": NUM_IMAGES}
    return folder / "out"


@pytest.fixture
def seen() -> list[str]:
    """Collect the messages, dialogs and requests of a page."""
    return []


@pytest.fixture
def open_page(seen) -> Iterator[Callable[[Path], Page]]:
    """Open a page in Chromium; check that it causes no message, dialog or further request."""
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as chromium:
        page = chromium.new_page(viewport={"width": 390, "height": 844}, accept_downloads=True)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.on("dialog", lambda dialog: seen.append(dialog.message))

        def open_file(file: Path) -> Page:
            page.goto(file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            return page

        yield open_file
    assert not [text for text in seen if not text.startswith(("data:", "file:", "blob:"))]


def read_picks(folder: Path) -> list[dict[str, str]]:
    with (folder / "review.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def save_labels(page: Page, file: Path) -> list[list[str]]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    assert download.value.suggested_filename == "labels.csv"
    download.value.save_as(file)
    with file.open(newline="") as text:
        return list(csv.reader(text))


def test_twenty_images_are_labelled_by_keys_and_train_takes_the_table(reviewed, open_page, tmp_path):
    rows = read_picks(reviewed)
    assert list(rows[0]) == ["path", "predicted", "prob", "margin", "true_label"]
    page = open_page(reviewed / "review.html")
    keys = "1212012121"
    for key in keys:
        page.keyboard.press(key)
    page.keyboard.press("2")
    page.keyboard.press("U")  # undoes the last one, also with Caps Lock
    page.keyboard.press("9")  # no such class
    assert page.locator("#progress").inner_text() == "11 of 26, 9 labelled"
    page.reload()
    assert page.locator("#progress").inner_text() == "11 of 26, 9 labelled"
    assert page.locator("#path").inner_text() == rows[10]["path"]
    for _ in range(5):
        page.keyboard.press("1")
        page.get_by_role("button", name="red").click()
    saved = save_labels(page, tmp_path / "labels.csv")
    labelled = [row["path"] for row in rows[:20]]
    expected = dict(zip(labelled, keys + "12" * 5, strict=True))
    names = {"1": "blue", "2": "red"}
    assert saved == [["path", "label"], *([path, names[key]] for path, key in expected.items() if key != "0")]
    train, validation, _ = list_training(LabelSource(labels=str(tmp_path / "labels.csv")), 0.2)
    assert train.class_names == ("blue", "red")
    files = [*train.files["path"].to_pylist(), *validation.files["path"].to_pylist()]
    assert sorted(files) == sorted(path for path, _ in saved[1:])


def test_pictures_are_shown_and_one_that_is_gone_is_said(reviewed, open_page):
    page = open_page(reviewed / "review.html")
    page.evaluate("localStorage.clear()")
    page.reload()
    num_missing = 0
    for row in read_picks(reviewed):
        if row["path"].endswith("-gone.jpg"):
            num_missing += page.get_by_text("This image cannot be decoded now.").is_visible()
        else:
            page.wait_for_function("document.getElementById('picture').naturalWidth === 256")
        page.keyboard.press("0")
    assert num_missing == 1
    assert page.locator("#progress").inner_text() == "all 26 seen, 0 labelled"


def test_an_interrupted_review_has_no_page_of_an_earlier_one(scores, ray_cluster, tmp_path):
    for name in ("review.html", "review.csv/file"):  # the table cannot be written
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("of an earlier review")
    with pytest.raises(RunError, match=r"cannot write .*/review\.csv"):
        review(ReviewConfig(scores=scores, output=str(tmp_path / "out"), n=3))
    assert not (tmp_path / "out" / "review.html").exists()


def test_label_studio_gets_tasks_with_the_prediction(reviewed):
    tasks = json.loads((reviewed / "labelstudio.json").read_text())
    rows = read_picks(reviewed)
    assert [task["data"]["image"] for task in tasks] == [row["path"] for row in rows]
    (prediction,) = tasks[0]["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("0" * 64, float(rows[0]["prob"]))
    assert prediction["result"] == [
        {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [rows[0]["predicted"]]}}
    ]


NAMES = [*MARKUP, *CONTROL[:3], "</script><script>alert(1)</script>", 'a,"b"\u2028c', "=1+1"]


def test_hostile_names_stay_text_and_are_saved_unchanged(open_page, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    pictures = [report.ReviewPicture(path=f"/x/{n}", label=n, prob=0.5, image=image) for n in NAMES]
    file = tmp_path / "review.html"
    file.write_text(report.review_page(NAMES, pictures, "0" * 64))
    page = open_page(file)
    assert page.locator("script").count() == 2
    assert page.locator("[onerror], [onmouseover], img:not([src^='data:'])").count() == 0
    for i in range(len(NAMES)):
        page.keyboard.press(str(i % 9 + 1))
    saved = save_labels(page, tmp_path / "labels.csv")
    assert saved[1:] == [[f"/x/{name}", NAMES[i % 9]] for i, name in enumerate(NAMES)]


def test_no_other_script_runs(open_page, seen, tmp_path):
    html = report.review_page(["cat"], [], "0" * 64)
    assert html.count("<script>") == 1
    file = tmp_path / "review.html"
    file.write_text(html.replace("</main>", "<script>document.title = 'run'</script></main>"))
    page = open_page(file)
    assert page.title() == "Review"
    assert page.locator("#progress").inner_text() == "all 0 seen, 0 labelled"
    (refused,) = (text for text in seen if "Content Security Policy" in text)
    seen.remove(refused)
