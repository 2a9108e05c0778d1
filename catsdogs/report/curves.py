"""Loss and accuracy by epoch."""

import math
from collections.abc import Mapping, Sequence

from catsdogs.report.plots import epoch_lines
from catsdogs.report.section import Section, decimal, render

_NAN = float("nan")
_COLUMNS = {
    "train_loss": 4,
    "train_accuracy": 4,
    "val_loss": 4,
    "val_accuracy": 4,
    "lr": None,
    "images_per_s": 1,
    "seconds": 1,
}


def curves(history: Sequence[Mapping[str, float]], *, best_epoch: int | None = None) -> Section:
    """Show loss and accuracy by epoch, and every number in a table.

    Args:
        history: Rows of `summary.csv`; a missing or non-finite value leaves a gap.
        best_epoch: The epoch to mark; by default the one of the highest validation accuracy, then of the
            lowest validation loss, then the first.
    """
    epochs = [int(row["epoch"]) for row in history]
    best = _best(history) if best_epoch is None else epochs.index(best_epoch)
    plots = [_plot(history, "loss", best), _plot(history, "accuracy", best)] if history else []
    rows = [(epoch, [_cell(row, column) for column in _COLUMNS]) for epoch, row in zip(epochs, history, strict=True)]
    html = render("curves", plots=plots, columns=list(_COLUMNS), rows=rows, best=best)
    return Section(title="Training", html=html)


def _value(row: Mapping[str, float], column: str) -> float:
    value = float(row.get(column, _NAN))
    return value if math.isfinite(value) else _NAN


def _best(history: Sequence[Mapping[str, float]]) -> int | None:
    def rank(index: int) -> tuple[float, float]:
        loss = _value(history[index], "val_loss")
        return -_value(history[index], "val_accuracy"), math.inf if math.isnan(loss) else loss

    measured = [i for i, row in enumerate(history) if not math.isnan(_value(row, "val_accuracy"))]
    return min(measured, key=rank, default=None)


def _plot(history: Sequence[Mapping[str, float]], quantity: str, best: int | None) -> dict[str, object]:
    epochs = [int(row["epoch"]) for row in history]
    train, val = ([_value(row, f"{part}_{quantity}") for row in history] for part in ("train", "val"))
    alt = f"{quantity.capitalize()} over {len(epochs)} epochs. "
    alt += f"Training: {_course(train)}. Validation: {_course(val)}."
    svg = epoch_lines(epochs, train, val, best=best, top=1 if quantity == "accuracy" else None)
    best_text = "" if best is None else f"epoch {epochs[best]}: {decimal(val[best])}"
    return {
        "quantity": quantity.capitalize(),
        "svg": svg,
        "alt": alt,
        "best": best_text,
        "measured": _measured(val),
    }


def _measured(values: Sequence[float]) -> bool:
    return not all(map(math.isnan, values))


def _course(values: Sequence[float]) -> str:
    finite = [value for value in values if not math.isnan(value)]
    return f"from {decimal(finite[0])} to {decimal(finite[-1])}" if finite else "not measured"


def _cell(row: Mapping[str, float], column: str) -> str:
    value, places = _value(row, column), _COLUMNS[column]
    if places is None:
        return "–" if math.isnan(value) else f"{value:.3g}"
    return decimal(value, places)
