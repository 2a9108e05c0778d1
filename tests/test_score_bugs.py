"""A bug in a stage ends the command: exit 1 with the traceback, never a row, never another attempt."""

import pyarrow.parquet as pq
import pytest
from conftest import red_or_blue

from catsdogs import classify, data
from catsdogs.cli import main
from catsdogs.config import ScoreConfig
from catsdogs.score import score
from catsdogs.start import start_ray

# The classes are local, so that they are pickled by value: Ray's processes cannot import this module.


def decode_with_bug():
    class BrokenDecode(data.DecodeForInference):
        def __call__(self, files):
            if any(path.endswith("15.jpg") for path in files["path"].to_pylist()):
                undefined_in_decode  # noqa: B018, F821
            yield from super().__call__(files)

    return BrokenDecode


def classifier_with_bug():
    class BrokenClassifier(classify.Classifier):
        def __init__(self, *arguments):
            from catsdogs import process_setup

            def select_device(_):
                undefined_in_load  # noqa: B018, F821

            process_setup.select_device = select_device
            super().__init__(*arguments)

    return BrokenClassifier


@pytest.fixture
def source(tmp_path):
    """Write 20 images."""
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02}.jpg").write_bytes(red_or_blue("red", i))
    return tmp_path / "in"


def run_score_with_bug(name, source, output, checkpoint, capsys):
    """Score in parts of four with a stage that uses an undefined name."""
    start_ray()  # or the command would end the session's Ray when it returns
    command = ["score", "--input", source, "--checkpoint", checkpoint, "--output", output]
    command += ["--batch-size", "4", "--shard-size", "4", "--precision", "fp32"]
    assert main([str(word) for word in command]) == 1
    shown = capsys.readouterr()
    assert f"NameError: name '{name}' is not defined" in shown.err
    assert f'File "{__file__}", line' in shown.err  # the line of the bug, in the process of the stage
    assert f"finished parts are kept in {output}; run the same command to resume" in shown.err
    assert "trying again" not in shown.out + shown.err
    assert not (output / "_SUCCESS").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_bug_in_decoding_ends_score_and_the_same_command_resumes(
    source, red_blue_checkpoint, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(data, "DecodeForInference", decode_with_bug())
        run_score_with_bug("undefined_in_decode", source, output, red_blue_checkpoint, capsys)
    rows = [row for part in output.glob("part-*") for row in pq.read_table(part).to_pylist()]
    assert {row["status"] for row in rows} <= {"ok"}
    assert str(source / "15.jpg") not in {row["path"] for row in rows}

    config = ScoreConfig(
        input=str(source),
        checkpoint=str(red_blue_checkpoint),
        output=str(output),
        batch_size=4,
        shard_size=4,
        precision="fp32",
    )
    summary = score(config)
    assert summary["by_status"] == {"ok": 20}
    assert summary["scored"] == 20 - len(rows)


@pytest.mark.usefixtures("ray_cluster")
def test_a_bug_in_loading_the_model_ends_score(source, red_blue_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classify, "Classifier", classifier_with_bug())
    run_score_with_bug("undefined_in_load", source, tmp_path / "out", red_blue_checkpoint, capsys)
    assert list((tmp_path / "out").glob("part-*")) == []
