"""Settings: flags, defaults and their checks."""

import ast
import dataclasses
import inspect
import itertools
import math
from typing import Literal, get_args, get_origin

import pytest

from catsdogs import config as config_module
from catsdogs.config import (
    AuditConfig,
    CompareConfig,
    DemoConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    ReviewConfig,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
)
from catsdogs.errors import InputError
from catsdogs.schema import RETRYABLE_STATUSES

COMMANDS = {
    "demo": DemoConfig,
    "download": DownloadConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "verify": VerifyConfig,
    "audit": AuditConfig,
    "review": ReviewConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
}
REQUIRED = {
    DemoConfig: {"output": "o"},
    DownloadConfig: {"output": "o"},
    TrainConfig: {"data_dir": "d"},
    EvaluateConfig: {"data_dir": "d", "checkpoint": "c", "output": "o"},
    ScoreConfig: {"input": "i", "checkpoint": "c", "output": "o"},
    VerifyConfig: {"output": "o"},
    AuditConfig: {"data_dir": "d", "output": "o"},
    ReviewConfig: {"scores": "s", "output": "o"},
    CompareConfig: {"a": "a", "b": "b", "output": "o"},
    ExportConfig: {"checkpoint": "c", "output": "o"},
}
DEFAULTS = {
    "demo": {"output": None, "seed": 0},
    "download": {
        "output": None,
        "url": "https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip",
    },
    "train": {
        "data_dir": None,
        "labels": None,
        "group_by": None,
        "exclude": None,
        "val_split": 0.15,
        "storage_path": "runs",
        "name": None,
        "resume": False,
        "save_every": 600.0,
        "max_failures": 3,
        "weights": "imagenet",
        "freeze": "none",
        "views": None,
        "epochs": 10,
        "patience": None,
        "batch_size": None,
        "optimizer": "sgd",
        "lr": None,
        "warmup_epochs": 1.0,
        "weight_decay": 1e-4,
        "label_smoothing": 0.1,
        "class_weights": "none",
        "clip_grad_norm": 5.0,
        "augment": "light",
        "img_size": 224,
        "seed": 0,
        "precision": "auto",
        "num_workers": 1,
        "use_gpu": "auto",
    },
    "evaluate": {
        "data_dir": None,
        "labels": None,
        "group_by": None,
        "exclude": None,
        "checkpoint": None,
        "output": None,
        "split": None,
        "batch_size": 32,
        "precision": "auto",
        "num_actors": None,
        "use_gpu": "auto",
        "calibrate": False,
        "min_precision": None,
    },
    "score": {
        "input": None,
        "checkpoint": None,
        "output": None,
        "allow_schemes": None,
        "limit": None,
        "batch_size": None,
        "precision": "auto",
        "num_actors": None,
        "use_gpu": "auto",
        "shard_size": 10_000,
        "max_pixels": 178_956_970,
        "max_error_rate": 1.0,
        "resume": True,
        "save_embeddings": False,
        "retry_failed": False,
        "min_precision": None,
    },
    "verify": {"output": None},
    "audit": {
        "data_dir": None,
        "labels": None,
        "input": None,
        "output": None,
        "exclude": None,
        "group_by": None,
        "against": None,
        "allow_schemes": None,
        "near": 4,
        "suspects": None,
        "fail_on": None,
    },
    "review": {"scores": None, "output": None, "strategy": "uncertain", "n": 200, "class_name": None},
    "compare": {"a": None, "b": None, "output": None, "fail_if": None},
    "export": {"checkpoint": None, "output": None, "format": "onnx", "precision": "fp32", "with_resize": False},
}


def make(config_class, **values):
    return config_class(**REQUIRED[config_class] | values)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_and_their_defaults_are_pinned(command):
    fields = dataclasses.fields(COMMANDS[command])
    found = {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}
    assert found == DEFAULTS[command]
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    assert required == set(REQUIRED[COMMANDS[command]]) - {"data_dir"}  # or labels


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_one_sentence_of_help(command):
    tree = ast.parse(inspect.getsource(COMMANDS[command]))
    body = tree.body[0].body
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), field.target.id
            assert after.value.value.endswith("."), field.target.id
            assert "\n" not in after.value.value


@pytest.mark.parametrize("config_class", COMMANDS.values())
def test_settings_are_frozen_and_keyword_only(config_class):
    settings = make(config_class)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.output = "x"
    with pytest.raises(TypeError):
        config_class(*REQUIRED[config_class].values())


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        *((TrainConfig, "val_split", value) for value in (0, 1, -0.1, math.nan)),
        *((TrainConfig, "epochs", value) for value in (0, -1)),
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "num_workers", 0),
        (TrainConfig, "max_failures", -1),
        (TrainConfig, "save_every", 0.0),
        *((TrainConfig, "lr", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *((TrainConfig, "weight_decay", value) for value in (-1e-9, math.inf, math.nan)),
        (TrainConfig, "warmup_epochs", -1.0),
        *((TrainConfig, "label_smoothing", value) for value in (-0.1, 1.0, math.nan)),
        *((TrainConfig, "clip_grad_norm", value) for value in (0.0, math.nan)),
        *((TrainConfig, "img_size", value) for value in (31, 4097)),
        *((TrainConfig, "seed", value) for value in (-1, 2**32)),
        *((TrainConfig, "name", value) for value in ("", ".", "..", "a/b", "a\0b", "a\nb")),
        (DemoConfig, "seed", -1),
        (EvaluateConfig, "batch_size", 0),
        (EvaluateConfig, "num_actors", 0),
        (AuditConfig, "near", -1),
        (AuditConfig, "near", 11),
        *((ScoreConfig, name, 0) for name in ("limit", "batch_size", "num_actors", "shard_size", "max_pixels")),
        *((ScoreConfig, "max_error_rate", value) for value in (-0.1, 1.1, math.nan)),
    ],
)
def test_values_out_of_range_name_their_flag(config_class, name, value):
    with pytest.raises(InputError) as caught:
        make(config_class, **{name: value})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')}: expected ")
    assert str(caught.value).endswith(f"got {value!r}" if name == "name" else f"got {value}")


@pytest.mark.parametrize(
    ("config_class", "values"),
    [
        (
            TrainConfig,
            {"val_split": 0.999, "lr": 1e-9, "weight_decay": 0.0, "label_smoothing": 0.0, "max_failures": 0},
        ),
        (TrainConfig, {"img_size": 32, "seed": 2**32 - 1, "clip_grad_norm": math.inf, "warmup_epochs": 0.0}),
        (TrainConfig, {"name": "a b-é.1", "resume": True}),
        (ScoreConfig, {"limit": 1, "max_error_rate": 0.0, "num_actors": 1}),
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(config_class, values):
    settings = make(config_class, **values)
    assert {name: getattr(settings, name) for name in values} == values


CHOICES = [
    (config_class, field)
    for config_class in COMMANDS.values()
    for field in dataclasses.fields(config_class)
    if get_origin(field.type) is Literal
]


@pytest.mark.parametrize(("config_class", "field"), CHOICES, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("value", ["foo", "", "NONE", True, None, ["auto"], math.nan])
def test_values_that_are_no_choice_name_their_flag_and_the_choices(config_class, field, value):
    choices = get_args(field.type)
    with pytest.raises(InputError) as caught:
        make(config_class, **{field.name: value})
    flag, expected = f"--{field.name.replace('_', '-')}", f"{', '.join(choices[:-1])} or {choices[-1]}"
    assert str(caught.value) == f"{flag}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(("config_class", "field"), CHOICES, ids=lambda value: getattr(value, "name", None))
def test_every_choice_is_accepted(config_class, field):
    for choice in get_args(field.type):
        assert getattr(make(config_class, **{field.name: choice}), field.name) == choice


def test_a_choice_that_is_unknown_is_one_line():
    with pytest.raises(InputError) as caught:
        make(TrainConfig, optimizer="foo")
    assert str(caught.value) == "--optimizer: expected sgd or adamw, got 'foo'"


def test_the_help_of_retry_failed_lists_the_retryable_statuses():
    text = inspect.getsource(ScoreConfig).partition("retry_failed: bool")[2].partition('."""')[0]
    listed = text.partition("status is ")[2].replace(" or ", ", ")
    assert listed.split(", ") == list(RETRYABLE_STATUSES)


def test_resume_needs_a_name():
    with pytest.raises(InputError) as caught:
        make(TrainConfig, resume=True)
    assert str(caught.value) == "--resume needs --name: add it, or omit --resume"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 5), ({"augment": "affine"}, 5), ({"augment": "none"}, 1), ({"augment": "light", "views": 32}, 32)],
)
def test_the_default_number_of_views_depends_on_the_augmentation(settings, expected):
    assert make(TrainConfig, freeze="backbone", **settings).num_views == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 2}, "--views needs --freeze backbone: add it, or omit --views"),
        ({"freeze": "backbone", "views": 0}, "--views: expected 1 to 32, got 0"),
        ({"freeze": "backbone", "views": 33}, "--views: expected 1 to 32, got 33"),
        ({"freeze": "backbone", "views": 2, "augment": "none"}, "--views: expected 1 with --augment none, got 2"),
    ],
)
def test_views_without_effect_are_refused(settings, message):
    with pytest.raises(InputError) as caught:
        make(TrainConfig, **settings)
    assert str(caught.value) == message


def test_parts_with_embeddings_are_bounded():
    assert make(ScoreConfig, save_embeddings=True, shard_size=100_000).shard_size == 100_000
    with pytest.raises(InputError, match="--shard-size: expected at most 100000 with --save-embeddings, got 100001"):
        make(ScoreConfig, save_embeddings=True, shard_size=100_001)


def test_the_global_batch_counts_every_worker():
    assert make(TrainConfig, batch_size=16, num_workers=3).global_batch_size == 48


@pytest.mark.parametrize(
    ("values", "peak"),
    [
        ({}, 0.02),
        ({"num_workers": 4}, 0.08),
        ({"batch_size": 16}, 0.01),
        ({"freeze": "backbone"}, 0.1),
        ({"optimizer": "adamw"}, 0.001),
        ({"optimizer": "adamw", "freeze": "backbone", "batch_size": 64}, 0.002),
        ({"lr": 0.5, "num_workers": 8}, 0.5),
    ],
)
def test_the_default_learning_rate_is_proportional_to_the_global_batch(values, peak):
    assert make(TrainConfig, **values).peak_lr == pytest.approx(peak)


def test_no_setting_takes_a_secret():
    words = ("secret", "token", "password", "credential", "access_key")
    source = inspect.getsource(config_module).lower()
    assert not [word for word in words if word in source]


@pytest.mark.parametrize("config_class", [EvaluateConfig, ScoreConfig])
@pytest.mark.parametrize("value", [0, 1, -0.5, 95, math.nan, math.inf])
def test_a_precision_is_between_0_and_1(config_class, value):
    assert make(config_class, min_precision=0.95).min_precision == 0.95
    with pytest.raises(InputError, match=f"--min-precision: expected a number between 0 and 1, .*, got {value}$"):
        make(config_class, min_precision=value)


def test_thresholds_are_not_measured_on_the_images_that_they_come_from():
    with pytest.raises(InputError, match="--calibrate: expected no --min-precision"):
        make(EvaluateConfig, calibrate=True, min_precision=0.9)
