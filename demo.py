"""Train a multi-layer perceptron on two moons or on a CSV file of yours, and draw its graph before and after.

    python demo.py                                         two interleaved half circles, two classes
    python demo.py data.csv --target species               a table of numbers and words; see `python demo.py --help`
    python demo.py --dask                                  the same on a Dask cluster, here of two local processes

The pictures in graph/, beside this file (of data.csv, in graph/data/), show the network and its loss:
initial_graph.png as it is built by a loop over the first four samples that it trains on, optimized_graph.png as
`optimize` rewrote that, and trained_model.png trained, on all samples at once, with gradients. Without Graphviz it
trains all the same.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as long as there is nothing to finish, Ctrl-C ends it without a word

import argparse
import collections
import contextlib
import csv
import datetime
import functools
import importlib.util
import io
import itertools
import math
import os
import re
import reprlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from picograd import Tensor, Value, draw, no_grad, optimize
from picograd.nn import MLP, Adam, cross_entropy, mse_loss

GRAPHS = Path(__file__).resolve().parent / "graph"
MIN_ROWS, MAX_CLASSES, ROWS_PER_CLASS, MAX_WORDS = 10, 20, 5, 20
LEARNING_RATE, WEIGHT_DECAYS, FEW_ROWS, TRIAL_EPOCHS = 0.01, (0.1, 0.3, 1.0), 600, 50
GAPS = {"", "?", "na", "n/a", "#n/a", "<na>", "nan", "null"}  # how tables write that there is nothing
ID_WORDS = {"id", "index", "rownames", "rowname", "row", "nr", "no", "number", "key", "obs", "unnamed", "#"}  # at ends

ABOUT = f"""Train a multi-layer perceptron and draw its graph. The CSV file: UTF-8; separated by commas, semicolons or
tabs; {MIN_ROWS} rows or more; a header is recognised. Numbers may have thousands separators, % and currency signs, a
unit, in the form in which most are written also a decimal comma; they are standardised. Gaps among them (empty cells,
?, NA, N/A, nan, null) are filled with the mean of the rows trained on, and marked by an input. Words, up to {MAX_WORDS}
in a column, are an input each. Dates are numbers, and an input for each month. Columns that are the same in all rows,
or only tell rows apart, are left out; so are rows without a target. All this is printed. A target of text is a class
label. So are up to {MAX_CLASSES} different integers, if there are {ROWS_PER_CLASS} times as many rows. Other numbers
make it a regression. A fifth of each class is held back for the test, or in a regression one of every five rows that
are neighbours in the target's order."""
EXITS = """Ctrl-C ends the training early: the network is drawn and tested as it is then, and the exit code is 130.
A second Ctrl-C ends everything at once. The exit code for bad arguments or data is 2."""


class UserError(Exception):
    """Something that the user can put right, said in one line."""


class Table(NamedTuple):
    """columns: the features, each floats, nan where there is a gap, or words as objects, "" where there is one.
    y: numbers, or those of classes. classes: how many, 0 for a regression. notes: what was decided about columns."""

    title: str
    columns: list[np.ndarray]
    y: np.ndarray
    classes: int
    notes: list[str]


# --- data ---


def printable(text: object) -> str:
    """On one line of a terminal: what could move its cursor is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def several(items: Iterable[str], between: str = ", ") -> str:
    """The first few, and how many more."""
    items = list(items)
    return between.join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def counted(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' * (n != 1)}"


def two_moons(rng: np.random.Generator, n: int = 1000, noise: float = 0.15) -> Table:
    """Two interleaved half circles of radius 1 with normal noise."""
    angle, y = rng.uniform(0, math.pi, n), np.arange(n) % 2
    x = np.where(y, (1 - np.cos(angle), 0.5 - np.sin(angle)), (np.cos(angle), np.sin(angle)))
    return Table("two moons", list(x + rng.normal(0, noise, (n, 2)).T), y, 2, [])


def written(point: str, groups: str = "", before: str = "", after: str = "") -> re.Pattern:
    """How a number is written: a sign, digits, which may be in groups of three, a fraction and an exponent."""
    digits = rf"(?:[1-9]\d{{0,2}}(?:[{groups}]\d{{3}})+|\d+)" if groups else r"\d+"
    number = rf"((?:{digits}(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?)"
    return re.compile(rf"{before}([+-]?){before}{number}{after}")


CURRENCY = "[$€£¥₹]"
AROUND = rf"{CURRENCY}?\s?", rf"\s?(?:%|{CURRENCY})?"
PLAIN = written("[.]")
POINT, COMMA = written("[.]", ",' \u00a0\u202f", *AROUND), written(",", ".' \u00a0\u202f", *AROUND)


@functools.lru_cache(1 << 16)
def number(cell: str, form: re.Pattern) -> float | None:
    """The finite number in a cell, in that form or the plain one; None if it holds none."""
    match = form.fullmatch(cell)
    if match and form is COMMA:
        digits = match[2].replace(".", "").replace(",", ".")
    else:
        match = match or PLAIN.fullmatch(cell)
        digits = match[2].replace(",", "") if match else ""
    x = float(match[1] + re.sub("[' \u00a0\u202f]", "", digits)) if match else math.nan
    return x if math.isfinite(x) else None


DATE = re.compile(r"(?:(\d{4})([-/])(\d\d?)\2(\d\d?)|(\d\d?)[.](\d\d?)[.](\d{4}))(?:[ T](\d\d?):(\d\d)\S*)?")
UNIT = re.compile(r"^[+-]?\d[\d.,']*\s?")  # what is before it


@functools.lru_cache(1 << 16)
def day_and_month(cell: str) -> tuple[float, str] | None:
    """The day that a date is, as a number, and its month, if it is one: 2024-12-31, 2024/12/31 or 31.12.2024, perhaps
    with a time. In other forms, nothing tells days from months."""
    match = DATE.fullmatch(cell)
    if not match:
        return None
    year, _, month, day, day_first, then_month, year_last, hour, minute = match.groups()
    try:
        date = datetime.date(int(year or year_last), int(month or then_month), int(day or day_first))
    except ValueError:
        return None
    return date.toordinal() + int(hour or 0) / 24 + int(minute or 0) / 1440, str(date.month)


def is_gap(cell: str) -> bool:
    return cell.lower() in GAPS


def split_cells(text: str, delimiter: str):
    """(row number, cells) of each row that is not blank, counting rows as a spreadsheet does."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    for row in itertools.count(1):
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"row {row}: {error}") from None
        if any(cells):
            yield row, cells


def read_rows(path: str) -> tuple[list[tuple[int, list[str]]], str]:
    """The rows of a CSV file, all of the same width, and what separates their cells."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    if "\0" in text:
        raise UserError("not text in UTF-8, it has zero bytes; if this is a table, save it as CSV in UTF-8")

    def fit(delimiter):
        """Best is what splits the first rows into equally many cells; of such, not what may be in numbers, too;
        then what the first row has most of."""
        try:
            widths = {len(cells) for _, cells in itertools.islice(split_cells(text, delimiter), 20)}
        except UserError:
            widths = set()
        fits = len(widths) == 1 and widths != {1}
        return fits, fits and delimiter != ",", text.strip().split("\n", 1)[0].count(delimiter)

    delimiter = max(",;\t", key=fit)
    rows = list(split_cells(text, delimiter))
    cells = ((row, k, cell) for row, cells in rows for k, cell in enumerate(cells, 1) if not cell.isascii())
    foreign = [f"row {row}, column {k}" for row, k, cell in cells if any("\ud800" <= c <= "\udfff" for c in cell)]
    if foreign:
        raise UserError(f"{several(foreign)}: not UTF-8 text; if this is a table, save it as CSV in UTF-8")
    ragged = [f"row {row}: {len(cells)} cells" for row, cells in rows if len(cells) != len(rows[0][1])]
    if ragged:
        raise UserError(f"{several(ragged)}, but row {rows[0][0]} has {len(rows[0][1])}")
    while rows and len(rows[0][1]) > 1 and not any(cells[-1] for _, cells in rows):
        rows = [(row, cells[:-1]) for row, cells in rows]  # each of them ends with a separator
    return rows, delimiter


def form_of(rows: list[tuple[int, list[str]]], delimiter: str) -> re.Pattern:
    """The form in which most of a file's numbers are written."""
    cells = [cell for _, cells in rows[:1000] for cell in cells]
    counts = {form: sum(form.fullmatch(cell) is not None for cell in cells) for form in (POINT, COMMA)}
    return max(counts, key=lambda form: (counts[form], (form is COMMA) == (delimiter == ";")))


def is_header(rows: list[tuple[int, list[str]]], form: re.Pattern) -> bool:
    """Whether the first row holds names, judged by the columns that are mostly numbers below it; where there are none,
    by those in which words come again."""
    first, later = rows[0][1], list(zip(*[cells for _, cells in rows[1:]]))
    over_numbers, again = [], []
    for cell, column in zip(first, later):
        known = [x for x in column if not is_gap(x)]
        if known and sum(number(x, form) is not None for x in known) > len(known) / 2:
            over_numbers.append(cell)
        elif len(set(known)) < len(known):
            again.append(cell in known)
    if not over_numbers:
        return not any(again) and any(number(cell, form) is None for cell in first)
    words = [cell for cell in over_numbers if number(cell, form) is None and not is_gap(cell)]
    if not words:
        return False
    # Among numbers, only a word is a name: 12x may be a typing error, in a row that must not get lost.
    return all(number(cell, form) is None for cell in over_numbers) or any(word[0].isalpha() for word in words)


def code_for_gaps(x: np.ndarray) -> float | None:
    """A number that stands for gaps, or None: a whole one such as -999, which comes again and again, and is farther
    from all others than these are from each other."""
    values, counts = np.unique(x[~np.isnan(x)] / 2, return_counts=True)  # no difference of halves overflows
    if len(values) > MAX_WORDS:
        for code, times, nearest, rest in (
            (values[0], counts[0], values[1], values[1:]),
            (values[-1], counts[-1], values[-2], values[:-1]),
        ):
            if code and times > 2 and abs(code - nearest) > np.ptp(rest) and (2 * code).is_integer():
                return 2 * code
    return None


class Sheet:
    """The rows of a file below the header, if there is one, and how to speak of them."""

    def __init__(self, rows: list[tuple[int, list[str]]], form: re.Pattern):
        self.form, self.header, self.first = form, is_header(rows, form), rows[0][1]
        self.names = self.first if self.header else [""] * len(self.first)
        self.rows = rows[self.header :]
        numbers = [self.numbers(self.column(k)) for k in range(len(self.first))]
        codes = {code_for_gaps(x) for x in numbers} - {None}  # found in one column, it may be the end of others, too
        ends = [{x[~np.isnan(x)].min(initial=math.inf), x[~np.isnan(x)].max(initial=-math.inf)} for x in numbers]
        often = [{code for code in codes & end if np.sum(x == code) > 2} for x, end in zip(numbers, ends)]
        self.codes = [min(found, default=None) for found in often]

    def find(self, option: str, column: str) -> int:
        """The index of a column, given by name or number."""
        try:
            position = int(column)
        except ValueError:
            position = 0
        index = position - 1 if position > 0 else len(self.first) + position
        named = self.names.count(column)
        if named > 1:
            raise UserError(f"{option} {column!r}: {named} columns have that name; give the column's number")
        if named:
            return self.names.index(column)
        if not position or not 0 <= index < len(self.first):
            names = ", ".join(map(reprlib.repr, self.first[:10])) + ", ..." * (len(self.first) > 10)
            which = f"there are {len(self.first)}, and the first row is {names}"
            raise UserError(f"{option} {column!r}: no such column; {which}")
        return index

    def called(self, k: int) -> str:
        return reprlib.repr(self.names[k]) if self.names[k] else f"column {k + 1}"

    def column(self, k: int) -> list[str]:
        return [cells[k] for _, cells in self.rows]

    def complaint(self, which: Sequence[int], k: int, one: str, more: str) -> str:
        """What is wrong with a column, in which rows: one cell is, more are."""
        rows, cells = zip(*[(str(row), cells[k]) for row, cells in map(self.rows.__getitem__, which)])
        name = f" ({reprlib.repr(self.names[k])})" if self.names[k] else ""
        shown = list(dict.fromkeys(map(reprlib.repr, filter(None, cells))))
        problem = f"{several(shown)} " * bool(shown) + (more if len(shown or rows) > 1 else one)
        return f"row{'s' * (len(rows) > 1)} {several(rows)}, column {k + 1}{name}: {problem}"

    def numbers(self, cells: Sequence[str]) -> np.ndarray:
        """The numbers in cells, nan where there is none."""
        numbers = [number(cell, self.form) for cell in cells]
        return np.array([math.nan if x is None else x for x in numbers])

    def without_codes(self, x: np.ndarray, k: int) -> tuple[np.ndarray, str]:
        """Numbers of a column, with nan also for what stands for gaps; and what is to be said of it."""
        code = self.codes[k]
        if code is None or code not in x:
            return x, ""
        return np.where(x == code, math.nan, x), f"{code:.0f}, which is far from all other numbers, is taken for a gap"

    def identifies(self, k: int) -> bool:
        """Whether a column only tells rows apart: whole numbers, all different, under the name of an identifier."""
        cells, name = self.column(k), self.names[k]
        if not self.header or not all(map(str.isdecimal, cells)) or len(set(cells)) < len(cells):
            return False
        words = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+|#", name)  # PassengerId, CUSTOMER_ID, "Unnamed: 0"
        if not name or ID_WORDS.intersection(word.lower() for word in words[-1:]):
            return True
        return name.lower().endswith("id") and set(map(int, cells)) == set(range(1, len(cells) + 1))


def read_column(sheet: Sheet, k: int) -> tuple[list[np.ndarray], str]:
    """A feature as columns of a `Table`, none if it is left out; and what was decided about it, in words."""
    cells = ["" if is_gap(cell) else cell for cell in sheet.column(k)]
    levels = collections.Counter(filter(None, cells))
    known = sum(levels.values())
    if len(levels) + ("" in cells) < 2:
        return [], f"is {reprlib.repr(cells[0])} in every row: left out" if levels else "is empty: left out"
    words = [cell for cell in levels if number(cell, sheet.form) is None]
    dates = sum(levels[word] for word in words if day_and_month(word))
    if dates > known / 2:
        return read_dates(cells)
    few = len(levels) <= min(MAX_WORDS, known / ROWS_PER_CLASS)
    if words and few:
        return read_words(cells, levels)
    units = collections.Counter(UNIT.sub("", word) for word in words)
    unit = max(units, key=units.get, default="")
    measured = [word for word in words if number(word.removesuffix(unit).strip(), sheet.form) is not None]
    odd = sum(levels[word] for word in words) - sum(levels[word] for word in measured)
    if odd > known * (0.5 if len(words) - len(measured) <= MAX_WORDS else 0.2):
        return read_words(cells, levels)
    if measured:
        columns, note = read_numbers(sheet, k, [cell.removesuffix(unit).strip() for cell in cells])
        return columns, "; ".join(filter(None, [f"numbers of {unit}", note]))
    if sheet.identifies(k):
        return [], "different whole numbers under such a name are an identifier: left out"
    return read_numbers(sheet, k, cells)


def read_words(cells: list[str], levels: collections.Counter) -> tuple[list[np.ndarray], str]:
    """See `read_column`. Words that come only once tell rows apart, and nothing else."""
    often, known, gaps = levels.most_common(MAX_WORDS), sum(levels.values()), cells.count("")
    if sum(count for _, count in often if count > 1) < known / 2:
        return [], f"{len(levels)} different words in {known} rows: left out"
    which = f"{len(levels)} words"
    if len(often) < len(levels):
        which = f"of {which}, the {len(often)} that are most frequent"
    return [np.array(cells, object)], f"{which}, an input for each" + f"; {counted(gaps, 'gap')}: 0 in all" * (gaps > 0)


def read_numbers(sheet: Sheet, k: int, cells: list[str]) -> tuple[list[np.ndarray], str]:
    """See `read_column`."""
    x, note = sheet.without_codes(sheet.numbers(cells), k)
    words = list(dict.fromkeys(cell for cell in cells if cell and number(cell, sheet.form) is None))
    among = f"{several(map(reprlib.repr, words))} among numbers: taken for gaps" * bool(words)
    return [x], "; ".join(filter(None, [note, among, filled(x)]))


def read_dates(cells: list[str]) -> tuple[list[np.ndarray], str]:
    """See `read_column`."""
    days, months = zip(*[day_and_month(cell) or (math.nan, "") for cell in cells])
    note = "dates, as the day, a number, and an input for each month"
    return [np.array(days), np.array(months, object)], "; ".join(filter(None, [note, filled(np.array(days))]))


def filled(x: np.ndarray) -> str:
    """What becomes of gaps among numbers, if there are any."""
    gaps = int(np.isnan(x).sum())
    return f"{counted(gaps, 'gap')}, filled with the mean of the rows trained on, and marked by an input" * (gaps > 0)


def leave_out_rows(sheet: Sheet, k: int) -> list[str]:
    """Keeps the rows with a target; what was decided, in words."""
    x = sheet.numbers(sheet.column(k))
    y, note = sheet.without_codes(x, k)
    coded = np.isnan(y) & ~np.isnan(x)
    kept = [row for row, code in zip(sheet.rows, coded) if not (code or is_gap(row[1][k]))]
    n, sheet.rows = len(sheet.rows) - len(kept), kept
    left_out = f"{counted(n, 'row')} without a target left out"
    return [f"{sheet.called(k)}: {'; '.join(filter(None, [note, left_out]))}"] * (n > 0)


def refuse_gaps(sheet: Sheet, index: int, features: Sequence[int]) -> None:
    """Says what --strict does not take: gaps, and features that are not numbers."""
    problems = []
    for k in [*features, index]:
        cells = sheet.column(k)
        empty = [i for i, cell in enumerate(cells) if not cell]
        wrong = [i for i, x in enumerate(sheet.numbers(cells)) if math.isnan(x) and cells[i]]
        if k == index:
            wrong = [i for i in wrong if is_gap(cells[i])]
        problems += [sheet.complaint(empty, k, "is missing", "are missing")] if empty else []
        problems += [sheet.complaint(wrong, k, "is not a finite number", "are not finite numbers")] if wrong else []
    if problems:
        raise UserError(f"{several(problems, '; ')}; without --strict, gaps are filled, and words are inputs")


def read_labels(sheet: Sheet, k: int, hint: str) -> tuple[np.ndarray, int]:
    """The target's numbers and 0, or class numbers and how many classes."""
    cells = sheet.column(k)
    numbers = [number(cell, sheet.form) for cell in cells]
    known = [x for x in numbers if x is not None]
    few = len(set(known)) <= min(MAX_CLASSES, len(cells) // ROWS_PER_CLASS) and all(x.is_integer() for x in known)
    if len(known) == len(cells) and not few:
        return np.array(known), 0
    if len(known) < len(cells):
        texts, different = [i for i, x in enumerate(numbers) if x is None], len(set(cells))
        if len(known) > len(cells) / 2 and not few:
            problem = sheet.complaint(texts, k, "is not a finite number", "are not finite numbers")
            raise UserError(f"{problem}, as most of that column are")
        if different > len(cells) / 2:
            problem = sheet.complaint(texts, k, "is no class label", "are no class labels")
            raise UserError(f"{problem}: {different} different ones are too many for {len(cells)} rows{hint}")
    classes, y = np.unique(cells if len(known) < len(cells) else known, return_inverse=True)
    return y, len(classes)


def read_table(path: str, target: str | None, ignore: Sequence[str] = (), strict: bool = False) -> Table:
    """A CSV file as a table; UserError names the rows and columns that are wrong."""
    rows, delimiter = read_rows(path)
    if not rows:
        raise UserError("the file is empty")
    if len(rows[0][1]) < 2:
        raise UserError("there is only one column (they end at commas, semicolons or tabs): nothing to predict it from")
    sheet = Sheet(rows, PLAIN if strict else form_of(rows, delimiter))
    index = sheet.find("--target", "-1" if target is None else target)
    ignored = {sheet.find("--ignore", column) for column in ignore}
    if index in ignored:
        raise UserError(f"--ignore: {sheet.called(index)} is the target")
    features = [k for k in range(len(sheet.first)) if k != index and k not in ignored]
    hint = f"; --target names another column, such as {several(map(sheet.called, features))}" * (target is None)
    if target is None and sheet.identifies(index):
        raise UserError(f"{sheet.called(index)}, the last column, is an identifier, nothing to predict{hint}")
    commas = sheet.form is COMMA and any(COMMA.fullmatch(cell) and "," in cell for _, cells in rows for cell in cells)
    notes = ["numbers have decimal commas"] * commas + [f"{sheet.called(k)}: ignored" for k in sorted(ignored)]
    if strict:
        refuse_gaps(sheet, index, features)
    else:
        notes += leave_out_rows(sheet, index)
    if len(sheet.rows) < MIN_ROWS:
        count = counted(len(sheet.rows), "row") + " below the header" * sheet.header
        raise UserError(
            f"{count}{' with a target' * (len(sheet.rows) < len(rows) - sheet.header)}, at least {MIN_ROWS} are needed"
        )
    y, classes = read_labels(sheet, index, hint)
    if (y == y[0]).all():
        same = reprlib.repr(sheet.rows[0][1][index])
        raise UserError(f"target {sheet.called(index)} is {same} in every row: there is nothing to learn")
    if strict:
        columns = [sheet.numbers(sheet.column(k)) for k in features]
    else:
        found = [(sheet.called(k), *read_column(sheet, k)) for k in features]
        columns = [column for _, columns, _ in found for column in columns]
        notes += [f"{name}: {note}" for name, _, note in found if note]
    if not columns:
        raise UserError(f"no column is left to predict the target from: {several(notes, '; ')}")
    title = f"{printable(Path(path).name)} ({'with a' if sheet.header else 'no'} header row)"
    return Table(f"{title}, target {sheet.called(index)}", columns, y, classes, notes)


def hold_back(y: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Which rows are for the test: random ones of each class (both sides get some), or of neighbours by the target."""
    order = np.argsort(y, kind="stable")
    cuts = np.flatnonzero(np.diff(y[order])) + 1 if classes else round(len(y) / 5)
    held = np.zeros(len(y), bool)
    for group in np.array_split(order, cuts):
        held[rng.permutation(group)[: max(round(len(group) / 5), len(group) > 1)]] = True
    return held


def standardise(x: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and standard deviation 1 over the rows to train on; those that are constant there become 0, and
    so do gaps. A number of the other rows that is too large for that is infinite."""
    gaps = np.isnan(x)
    x = np.where(gaps, 0.0, x)
    count = np.maximum(np.sum(~gaps[~held], axis=0), 1)
    size = np.abs(x[~held]).max(axis=0, initial=1e-300)  # divided by it, no square over- or underflows
    mean = np.sum(x[~held] / size, axis=0) / count
    with np.errstate(over="ignore"):
        off = np.where(gaps, 0.0, x / size - mean)
        deviation = np.sqrt(np.sum(off[~held] ** 2, axis=0) / count)
        varies = np.ptp(off[~held], axis=0) > 0
        return np.where(varies, off / np.where(varies, deviation, 1.0), 0.0)


def inputs(columns: Sequence[np.ndarray], held: np.ndarray) -> np.ndarray:
    """What the network sees of columns: numbers, standardised, and where they have gaps; and where the words are that
    are most frequent in the rows to train on."""
    blocks = []
    for column in columns:
        if column.dtype == object:
            counts = collections.Counter(filter(None, column[~held]))
            blocks += [column == word for word, _ in counts.most_common(MAX_WORDS)]
        else:
            blocks.append(standardise(column, held))
            gaps = np.isnan(column)
            blocks += [gaps] * bool(gaps[~held].any())
    if not blocks:
        raise UserError("all features are gaps in the rows to train on: there is nothing to predict from")
    return np.column_stack(blocks).astype(float)


# --- training ---


def network(features: int, classes: int, rng: np.random.Generator) -> MLP:
    """A small MLP, which begins near the mean, or near equal odds: few rows do not tell much more."""
    model = MLP(features, [16, 16, classes or 1], activation="tanh", seed=rng)
    model.layers[-1].w.data *= 0.1
    return model


def score(model: MLP, x: np.ndarray, y: np.ndarray, classes: int) -> str:
    """Accuracy, or R^2: the explained share of y's variance (the same in any unit of y), nan if y does not vary
    or is infinite."""
    with no_grad():
        out = model(Tensor(x)).data.data
    if classes:
        return f"accuracy: {np.mean(out.argmax(axis=1) == y):.1%}"
    size = max(1.0, np.abs(y).max())  # divided by it, no square overflows
    if math.isinf(size):
        return "R^2: nan"
    y, out = y / size, out / size
    variation = np.sum((y - y.mean()) ** 2)
    return f"R^2: {1 - np.sum((y - out) ** 2) / variation if variation else math.nan:.3f}"


def loss_of(model: MLP, x: Any, y: Any, classes: int) -> Value:
    out = model(x)
    out.label = "logits" if classes else "prediction"
    loss = cross_entropy(out, y) if classes else mse_loss(out, y)
    loss.label = "loss"
    return loss


def operations(root: Value) -> int:
    """How many operations a graph has."""
    nodes = [root]
    seen = set(nodes)
    for node in nodes:  # the list grows as it is walked
        new = node._prev - seen
        seen |= new
        nodes += new
    return sum(node._op != "" for node in nodes)


def milliseconds(step: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def minibatches(model, x, y, classes, optimizer, rng, stopped, timed=True) -> Callable[[], float | None]:
    """Prepares training on minibatches; returns what runs one epoch: the mean loss, or None if stopped().

    The graph of one minibatch is built and optimized once. Every step puts its rows into the graph's Tensors.
    """
    batches = max(1, min(32, len(x) // 16), len(x) // 1024)
    size = len(x) // batches  # the same for all: an optimized graph has its shapes. What is left over changes by epoch
    inputs, targets = Tensor(x[:size]), Tensor(y[:size], dtype=np.int64 if classes else np.float32)
    built = loss_of(model, inputs, targets, classes)
    loss = optimize(built)
    if timed:
        eager = milliseconds(lambda: loss_of(model, inputs, targets, classes).backward(retain_grads=False))
        fast = milliseconds(lambda: loss.forward().backward())
        print(f"graph: {operations(built)} operations, {eager:.3f} ms forward and backward on {size} rows; ", end="")
        print(f"optimized: {fast:.3f} ms", flush=True)

    def epoch():
        total = 0.0
        for rows in rng.permutation(len(x))[: batches * size].reshape(batches, size):
            if stopped():
                return None
            inputs.data, targets.data = x[rows], y[rows]
            loss.forward()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / batches
        return total

    return epoch


def over_chunks(model, x, y, classes, optimizer, stopped) -> Callable[[], float | None]:
    """Like minibatches, with one step an epoch on all rows: Dask arrays, in chunks where the cluster's workers are."""
    import dask.array as da
    from dask.distributed import default_client

    client = default_client()
    size = -(-len(x) // len(client.ncores()))
    inputs = client.persist(da.from_array(x.astype(np.float32), chunks=(size, -1)))
    targets = client.persist(da.from_array(y.astype(np.int64 if classes else np.float32), chunks=size))
    built = loss_of(model, inputs, targets, classes)
    print(f"graph: {operations(built)} operations on {len(x)} rows in {inputs.numblocks[0]} chunks; ", end="")
    print(f"one step is one pass over the {len(client.ncores())} workers of a Dask cluster", flush=True)

    def epoch():
        if stopped():
            return None
        loss = loss_of(model, inputs, targets, classes)
        optimizer.zero_grad()
        loss.backward(retain_grads=False)
        optimizer.step()
        return loss.item()

    return epoch


def local_cluster() -> contextlib.AbstractContextManager:
    """A Dask cluster of two processes on this machine, and a client of it: the one that Dask computes with from now."""
    from dask.distributed import Client, LocalCluster

    stack = contextlib.ExitStack()
    where = {"host": "127.0.0.1", "dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a terminal's Ctrl-C is not for the workers
    cluster = stack.enter_context(LocalCluster(n_workers=2, threads_per_worker=1, silence_logs=60, **where))
    signal.signal(signal.SIGINT, before)
    stack.enter_context(Client(cluster))
    return stack


def choose_decay(x, y, classes, epochs, rng, stopped) -> float:
    """The weight decay that does best on thirds of the rows, each by networks that are trained on the other two."""
    thirds, losses, epochs = rng.permutation(len(x)) % 3, dict.fromkeys(WEIGHT_DECAYS, 0.0), min(epochs, TRIAL_EPOCHS)
    for (third, seed), decay in itertools.product(enumerate(rng.integers(1 << 32, size=3)), WEIGHT_DECAYS):
        seen, same = thirds != third, np.random.default_rng(seed)
        model = network(x.shape[1], classes, same)
        optimizer = Adam(model.parameters(), LEARNING_RATE, weight_decay=decay, decoupled=True)
        run_epoch = minibatches(model, x[seen], y[seen], classes, optimizer, same, stopped, timed=False)
        for epoch in range(epochs):
            optimizer.lr = LEARNING_RATE * (1 - epoch / epochs)
            run_epoch()
        with no_grad():
            losses[decay] += loss_of(model, Tensor(x[~seen]), y[~seen], classes).item()
    best = min(losses, key=losses.get)
    tried = f"of {', '.join(map(str, WEIGHT_DECAYS))} the best for a third of these rows, trained on the others"
    print(f"weight decay {best}: {tried}", flush=True)
    return best


def train(model, x, y, classes, epochs, rng, stopped, dask=False, decay=WEIGHT_DECAYS[0]) -> int:
    """Runs Adam with a learning rate that falls to 0, until stopped(). Returns the epochs completed."""
    rate = LEARNING_RATE * (5 if dask else 1)  # an epoch is one step then, not many
    optimizer = Adam(model.parameters(), rate, weight_decay=decay, decoupled=True)
    if dask:
        run_epoch = over_chunks(model, x, y, classes, optimizer, stopped)
    else:
        run_epoch = minibatches(model, x, y, classes, optimizer, rng, stopped)
    began = shown = time.monotonic()
    live = sys.stdout.isatty()
    for epoch in range(1, epochs + 1):
        optimizer.lr = rate * (1 - (epoch - 1) / epochs)
        loss = run_epoch()
        if loss is None:
            return epoch - 1
        now = time.monotonic()
        if epoch == epochs or (now - shown > 0.1 if live else epoch * 10 // epochs > (epoch - 1) * 10 // epochs):
            shown = now
            minutes, seconds = divmod(round((now - began) / epoch * (epochs - epoch)), 60)
            line = f"epoch {epoch:{len(str(epochs))}}/{epochs}  loss {loss:.4f}"
            line += f"  train {score(model, x, y, classes)}  {minutes}:{seconds:02} left"
            if live:
                width = (shutil.get_terminal_size().columns or 80) - 1
                line = f"\r{line[:width]:{width}}"
            print(line, end="" if live and epoch < epochs else "\n", flush=True)
    return epochs


# --- the command ---


def one_by_one(model: MLP, x: np.ndarray, y: np.ndarray, classes: int) -> Value:
    """The mean loss of samples, built in a loop over them."""
    loss = np.mean(np.stack([loss_of(model, Tensor(row), label, classes) for row, label in zip(x, y)]))
    loss.label = "mean loss"
    return loss


def picture(loss: Value, path: Path, caption: str, failures: dict[str, str]) -> str:
    """Draws to a file, or notes why not, and leaves nothing behind; how it is called."""
    name = printable(path.relative_to(GRAPHS.parent).as_posix())
    try:
        if shutil.which("dot") is None:
            raise RuntimeError("Graphviz's program `dot`, which makes the pictures, was not found on PATH")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(loss, path, caption=caption)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        failures[name] = printable(str(error).split(". ")[0].splitlines()[0])
        with contextlib.suppress(OSError):
            os.removedirs(path.parent)  # if it is empty
    return name


def prepare(table: Table, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the network sees, what it is to say, and which rows are for the test; prints what was decided."""
    held = hold_back(table.y, table.classes, rng)
    x = inputs(table.columns, held).clip(-1e6, 1e6)  # a row unlike any that is trained on must still fit in float32
    y = table.y if table.classes else standardise(table.y, held)
    if not table.classes and not y[~held].any():
        raise UserError("the target is the same in all rows to train on: there is nothing to learn")
    kind = f"{table.classes} classes" if table.classes else "a regression"
    rows = f"{np.sum(~held)} rows to train on, {held.sum()} to test on"
    print(f"{table.title}: {kind}, {counted(x.shape[1], 'feature')}, {rows}")
    for note in table.notes:
        print(f"  {printable(note)}")
    return x, y, held


def run(data, target, ignore, strict, epochs: int, seed: int, dask: bool) -> int:
    rng = np.random.default_rng(seed)
    table = two_moons(rng) if data is None else read_table(data, target, ignore, strict)
    x, y, held = prepare(table, rng)
    classes = table.classes
    model = network(x.shape[1], classes, rng)
    print(model, flush=True)

    interrupts: list[int] = []

    def interrupt(*_):
        interrupts.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends everything

    signal.signal(signal.SIGINT, interrupt)
    folder = GRAPHS / (Path(data).stem.strip(". ") or "table") if data else GRAPHS
    loss, failures = one_by_one(model, x[~held][:4], y[~held][:4], classes), {}
    fast, built = optimize(loss), operations(loss)
    caption = f"Built sample by sample: {built} operations"
    drawn = [picture(loss, folder / "initial_graph.png", caption, failures)]
    left = operations(fast.graph)
    caption = f"Optimized: {left} operations, {built - left} fewer"
    drawn.append(picture(fast, folder / "optimized_graph.png", caption, failures))
    decay = WEIGHT_DECAYS[0]
    if data is not None and not dask and np.sum(~held) < FEW_ROWS:
        decay = choose_decay(x[~held], y[~held], classes, epochs, rng.spawn(1)[0], lambda: interrupts)
    with local_cluster() if dask else contextlib.nullcontext():
        done = train(model, x[~held], y[~held], classes, epochs, rng, lambda: interrupts, dask, decay)
    if done < epochs:
        print("\n" * sys.stdout.isatty() + f"Interrupted: {done} of {epochs} epochs are complete.", flush=True)
    model.zero_grad()
    loss = loss_of(model, Tensor(x[~held]), y[~held], classes)
    loss.backward()
    caption = f"Trained: the loss of all {np.sum(~held)} samples at once, and gradients"
    drawn.append(picture(loss, folder / "trained_model.png", caption, failures))
    if failures:
        print(f"Not drawn: {', '.join(failures)}: {'; '.join(dict.fromkeys(failures.values()))}")
    else:
        print(f"Drawn: {', '.join(drawn)}")
    result = score(model, x[held], y[held], classes)
    if "nan" in result:
        same = np.ptp(table.y[held] / 2) == 0
        why = "is the same in all test rows" if same else "has numbers too far apart for double precision"
        print(f"R^2 is not defined here: the target {why}.")
    print(f"test {result}")
    return 130 if interrupts else 0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"demo.py: error: {printable(' '.join(message.split()))}\n")


def main() -> int:
    parser = Parser(description=ABOUT, epilog=EXITS, allow_abbrev=False)
    parser.add_argument("data", nargs="?", metavar="data.csv", help="a table to learn from (default: two moons)")
    parser.add_argument(
        "--target",
        metavar="COLUMN",
        help="what to predict: a name in the header, or a number: 1 is the first column, -1 the last (default)",
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="COLUMN", help="leave a column out (any number of times)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse what is no plain number among the features, and gaps"
    )
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="passes over the data (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument(
        "--dask", action="store_true", help="train on a Dask cluster of two local processes, one step an epoch"
    )
    arguments = parser.parse_args()
    for name, least in (("epochs", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    for name in ("target", "ignore", "strict"):
        if getattr(arguments, name) and arguments.data is None:
            parser.error(f"--{name} is about data.csv, which was not given")
    if arguments.dask and not importlib.util.find_spec("distributed"):
        parser.error('--dask needs Dask: pip install "dask[distributed]"')
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return run(**vars(arguments))
    except UserError as error:
        parser.error(f"{arguments.data!r}: {error}")
    except KeyboardInterrupt:
        return 130


def guarded() -> int:
    """main(), for any standard output: one that is closed or full, or that nobody reads, causes no traceback."""
    if sys.stdout is None:  # closed from the start: nothing is shown
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of columns, on a terminal that has not all letters
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        problem, code = "", 128 + 13  # as of a program that SIGPIPE ended
    except OSError as error:
        problem, code = f"demo.py: error: {error.strerror or error}\n", 1
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(problem)
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 1
    )  # what is still buffered is flushed at the end, and must not fail there
    return code


if __name__ == "__main__":
    sys.exit(guarded())
