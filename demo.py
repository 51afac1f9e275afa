"""Trains a network and draws it: `python demo.py`, or on a table of your own, `python demo.py data.csv`.

Without a file it learns two moons. A CSV file may have a header; its features are numbers, and its last column (or
--target, by name or by number from 1) is what to predict: text or at most 20 different integers make it a
classification, other numbers a regression. A fifth of the rows is held back to test on. The last line printed is the
result; the pictures go to graph/. Ctrl-C stops early and keeps what was trained. Mistakes in the input end with one
line and exit code 2.
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path

import numpy as np

from picograd import Tensor, draw, no_grad
from picograd.nn import MLP, Adam, cross_entropy, mse_loss

GRAPH = Path(__file__).resolve().parent / "graph"
BATCH, MIN_ROWS, MAX_INTEGER_CLASSES = 64, 10, 20


class BadInput(Exception):
    """What is wrong with the user's file or options, in one line."""


def two_moons(rng, n=1000):
    """Two interleaved half circles with some noise: points (n, 2) and labels (n,)."""
    t = rng.uniform(0, np.pi, n)
    label = np.arange(n) % 2
    points = np.stack([np.where(label, 1 - np.cos(t), np.cos(t)), np.where(label, 0.5 - np.sin(t), np.sin(t))], axis=1)
    return points + rng.normal(0, 0.1, points.shape), label.astype(str)


def number(cell):
    try:
        return float(cell)
    except ValueError:
        return None


def read_table(path):
    """The header (or None) and the rows of cells of a CSV file, all of one width, with the line each row stands in."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    if "\0" in text:
        raise BadInput(f"{path}: not a text file")
    first = text.lstrip().split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
        lines = [(reader.line_num, [c.strip() for c in row]) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        raise BadInput(f"{path}: {error}") from None
    if not lines:
        raise BadInput(f"{path}: the file is empty")
    width = len(lines[0][1])
    for line, row in lines:
        if len(row) != width:
            raise BadInput(f"{path}: row {line} has {len(row)} columns, the first has {width}")
    if width < 2:
        raise BadInput(f"{path}: one column only; a table needs at least one feature and a target")
    # A header is a first row with text where the second row has a number, or with text only.
    head, rest = lines[0][1], lines[1:]
    below = rest[0][1] if rest else head
    header = all(number(c) is None and c for c in head) and any(number(c) is not None for c in below)
    header = header or any(number(c) is None and c and number(d) is not None for c, d in zip(head, below))
    return (head, rest) if header else (None, lines)


def target_column(target, header, width):
    if target is None:
        return width - 1
    if header and target in header:
        return header.index(target)
    if target.isdigit() and 1 <= int(target) <= width:
        return int(target) - 1
    known = f"one of {', '.join(header)}, or " if header else ""
    raise BadInput(f"--target: expected {known}a column number from 1 to {width}, got {target!r}")


def load_csv(path, target):
    """Features (n, k) of float and the cells of the target column."""
    header, lines = read_table(path)
    if len(lines) < MIN_ROWS:
        raise BadInput(f"{path}: {len(lines)} rows of data are too few, at least {MIN_ROWS} are needed")
    column = target_column(target, header, len(lines[0][1]))
    features, cells = [], []
    for line, row in lines:
        values = []
        for j, cell in enumerate(row):
            name = f"column {j + 1}" + (f" ({header[j]})" if header else "")
            value = number(cell)
            if not cell or (value is not None and not math.isfinite(value)):
                raise BadInput(f"{path}: row {line}, {name}: expected a value, got {cell or 'an empty cell'!r}")
            if j == column:
                cells.append(cell)
            elif value is None:
                raise BadInput(f"{path}: row {line}, {name}: expected a number, got {cell!r}")
            else:
                values.append(value)
        features.append(values)
    return np.array(features), cells


class Task:
    """What is learned: the network's targets, its loss and how well it does. Classification or regression."""

    def __init__(self, cells):
        values = [number(c) for c in cells]
        integers = all(v is not None and v == int(v) for v in values) and len(set(values)) <= MAX_INTEGER_CLASSES
        self.classes = None
        if any(v is None for v in values) or integers:
            self.classes = sorted(set(cells)) if None in values else sorted(set(cells), key=float)
            if len(self.classes) < 2:
                raise BadInput(f"the target has one class only: {self.classes[0]!r}")
            place = {c: i for i, c in enumerate(self.classes)}
            self.y = np.array([place[c] for c in cells])
            self.outputs, self.name, self.loss = len(self.classes), "accuracy", cross_entropy
        else:
            self.y = np.array(values)
            self.outputs, self.name, self.loss = 1, "R^2", mse_loss

    def split(self, rng):
        """Rows to train and to test on: a fifth to test, of each class if there are classes."""
        groups = (
            [np.arange(len(self.y))]
            if self.classes is None
            else [np.flatnonzero(self.y == c) for c in range(self.outputs)]
        )
        test = [rng.permutation(g)[: max(1, round(len(g) / 5)) if len(g) > 1 else 0] for g in groups]
        test = np.sort(np.concatenate(test))
        return np.setdiff1d(np.arange(len(self.y)), test), test

    def scale(self, train):
        """Brings a regression's target to mean 0 and deviation 1 on the training rows."""
        if self.classes is None:
            self.y = (self.y - self.y[train].mean()) / (self.y[train].std() or 1.0)

    def score(self, model, x, y):
        with no_grad():
            out = model(x).data.data
        if self.classes is not None:
            return float(np.mean(out.argmax(axis=1) == y))
        return 1.0 - float(np.mean((out - y) ** 2)) / (float(np.var(y)) or 1.0)

    def report(self, score):
        return f"{self.name}: {score:.1%}" if self.classes is not None else f"{self.name}: {score:.3f}"


def picture(model, task, x, y, name):
    """Draws the loss of a few samples; returns what went wrong, if something did."""
    x, y = Tensor(x), Tensor(y, dtype=y.dtype)
    prediction = model(x)
    prediction.label = "prediction"
    loss = task.loss(prediction, y)
    loss.label = "loss"
    model.zero_grad()
    loss.backward()
    GRAPH.mkdir(exist_ok=True)
    try:
        draw(loss, GRAPH / name)
    except (RuntimeError, ImportError, OSError) as error:
        return " ".join(str(error).split())
    return None


def train(model, task, x, y, epochs, rng):
    """Minibatches with Adam; stops early on Ctrl-C."""
    optimizer = Adam(model.parameters(), lr=0.01)
    start, live = time.monotonic(), sys.stdout.isatty()
    try:
        for epoch in range(1, epochs + 1):
            optimizer.lr = 0.01 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
            total = 0.0
            for rows in np.array_split(rng.permutation(len(x)), math.ceil(len(x) / BATCH)):
                loss = task.loss(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward(retain_grads=False)
                optimizer.step()
                total += float(loss) * len(rows)
            if live or epoch == epochs or epoch % max(1, epochs // 10) == 0:
                left = (time.monotonic() - start) / epoch * (epochs - epoch)
                line = f"epoch {epoch}/{epochs}  loss {total / len(x):.4f}  "
                line += f"train {task.report(task.score(model, x, y))}  {left:.0f} s left"
                print(f"\r{line}\033[K" if live else line, end="" if live and epoch < epochs else "\n", flush=True)
    except KeyboardInterrupt:
        print("\nstopped: keeping what was trained so far", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="a CSV file; two moons without one")
    parser.add_argument("--target", metavar="COLUMN", help="name or number (from 1) of the column to predict; the last")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="passes over the training rows (100)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the split, the weights and the batches (0)"
    )
    options = parser.parse_args()
    try:
        if options.epochs < 1:
            raise BadInput(f"--epochs: expected at least 1, got {options.epochs}")
        if options.seed < 0:
            raise BadInput(f"--seed: expected at least 0, got {options.seed}")
        rng = np.random.default_rng(options.seed)
        x, cells = load_csv(options.data, options.target) if options.data else two_moons(rng)
        task = Task(list(cells))
    except BadInput as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2

    train_rows, test_rows = task.split(rng)
    deviation = x[train_rows].std(axis=0)
    x = ((x - x[train_rows].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    task.scale(train_rows)
    model = MLP(x.shape[1], [16, 16, task.outputs], activation="tanh", seed=rng)
    print(f"{len(train_rows)} rows to train on, {len(test_rows)} to test on; {model}")
    problems = [picture(model, task, x[train_rows[:4]], task.y[train_rows[:4]], "initial_graph.png")]
    train(model, task, x[train_rows], task.y[train_rows], options.epochs, rng)
    problems.append(picture(model, task, x[train_rows[:4]], task.y[train_rows[:4]], "trained_model.png"))
    for name, problem in zip(("initial_graph.png", "trained_model.png"), problems):
        print(f"could not draw graph/{name}: {problem}" if problem else f"wrote graph/{name}")
    print(f"test {task.report(task.score(model, x[test_rows], task.y[test_rows]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
