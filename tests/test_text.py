"""No message is longer than 500 characters: of an error, of a row, on the terminal or in the log."""

import logging
import pickle

import fsspec
import pytest

from catsdogs import cli, logs, storage
from catsdogs.data import DecodeForInference
from catsdogs.errors import InputError, RunError
from catsdogs.images import Preprocessing
from catsdogs.logs import escape_lines
from catsdogs.progress import Message
from catsdogs.text import MAX_MESSAGE_CHARS, format_line, redact_queries, shorten

LONG = f"cannot read {'/folder' * 2000}: no such file; check --input"
INVISIBLE = f"cannot read /{chr(0x200B) * 400}: no such file; check --input"


@pytest.mark.parametrize("length", [0, 1, 499, 500])
def test_a_message_of_500_characters_stays(length):
    assert shorten("x" * length) == "x" * length


@pytest.mark.parametrize("length", [501, 502, 100_000])
def test_a_longer_message_keeps_its_start_and_its_end(length):
    message = "a" + "x" * (length - 2) + "z"
    assert len(shorten(message)) <= MAX_MESSAGE_CHARS == 500
    assert shorten(message)[0] + shorten(message)[-1] == "az"
    assert " ... " in shorten(message)


def test_a_message_is_shortened_after_it_is_escaped():
    assert len(INVISIBLE) < 500 < len(INVISIBLE) + 5 * 400
    assert len(format_line(INVISIBLE)) <= 500
    assert format_line(INVISIBLE).endswith("no such file; check --input")


@pytest.mark.parametrize("error_class", [InputError, RunError])
def test_an_error_is_short(error_class):
    error = error_class(LONG)
    assert len(str(error)) <= 500
    assert str(error).startswith("cannot read /folder")
    assert str(error).endswith("no such file; check --input")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(str(error_class(f"{error}; run the same command to resume"))) <= 500


@pytest.mark.parametrize("message", [LONG, INVISIBLE])
def test_every_line_of_a_command_is_short(message, capsys, monkeypatch):
    def fail(config, display):
        display(Message(message))
        logging.getLogger("catsdogs.test").warning("%s", message)
        raise InputError(message)

    monkeypatch.setattr(cli, "COMMANDS", dict.fromkeys(cli.COMMANDS, fail))
    monkeypatch.delenv(logs.LOG_VARIABLE, raising=False)
    assert cli.main(["verify", "--output", "o"]) == 2
    streams = capsys.readouterr()
    lines = [*streams.out.splitlines(), *streams.err.splitlines()]
    assert len(lines) == 3
    assert all(400 < len(line) <= 500 and line.endswith("check --input") for line in lines)


def test_the_error_of_a_row_is_short(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(LONG)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    files = storage.build_files_table([storage.Entry("memory://root/a.jpg")])
    (rows,) = DecodeForInference(Preprocessing(img_size=32), 10**6, batch_size=4)(files)
    assert rows["status"].to_pylist() == ["read_error"]
    assert 400 < len(rows["error"][0].as_py()) <= 500


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://h/a.jpg?w=1&sig=secret: 403", "GET https://h/a.jpg?...: 403"),
        ("url='http://user:pw@h:80/a?x=1', next", "url='http://...@h:80/a?...', next"),
        ("https://h/a?k=a'SECRET", "https://h/a?..."),
        ('https://h/a?k=a",SECRET: 403', "https://h/a?...: 403"),
        ("https://h/a?k=a<SECRET>'", "https://h/a?...>'"),
        ("https://h/a'b?k=SECRET", "https://h/a'b?..."),
        ("https://u:p'w@h/a", "https://...@h/a"),
        ("cannot read s3://b/what?.jpg", "cannot read s3://b/what?.jpg"),
        ("https://h/a@b.jpg, no query", "https://h/a@b.jpg, no query"),
        ("what? nothing", "what? nothing"),
    ],
)
def test_the_user_and_the_query_of_a_url_are_not_shown(text, shown):
    assert redact_queries(text) == shown
    assert format_line(text) == shown
    assert str(InputError(text)) == shown
    assert escape_lines(f"Traceback\n{text}") == f"Traceback\n{shown}"
