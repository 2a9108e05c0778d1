"""Labelled images: folders or a table of labels, the class index of each file, training and validation files.

sources.py         list the training and the validation files, or those to evaluate, of either source
folders.py         labels from class folders
split_folders.py   which folders are splits and which are classes
label_table.py     labels from a table
path_table.py      tables of paths, such as those to exclude
groups.py          groups of images, and the split that keeps each on one side
labelled_files.py  files with class indices, class names
"""

from catsdogs.labels.labelled_files import (
    AllRows,
    LabelledFiles,
    LabelledRow,
    check_same_classes,
    normalize_name,
    reindex_labels,
)
from catsdogs.labels.path_table import TABLES, Exclusion, PathTable
from catsdogs.labels.sources import LabelSource, TrainingFiles, list_all, list_evaluation, list_training
from catsdogs.labels.split_folders import TEST, TRAIN, VALIDATION

__all__ = [
    "TABLES",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "AllRows",
    "Exclusion",
    "LabelSource",
    "LabelledFiles",
    "LabelledRow",
    "PathTable",
    "TrainingFiles",
    "check_same_classes",
    "list_all",
    "list_evaluation",
    "list_training",
    "normalize_name",
    "reindex_labels",
]
