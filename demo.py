"""Train a multi-layer perceptron on two moons or on a CSV file of yours, and draw its graph before and after.

    python demo.py                                         two interleaved half circles, two classes
    python demo.py data.csv --target species               a table of numbers; see `python demo.py --help`
    python demo.py --dask                                  the same on a Dask cluster, here of two local processes

The pictures in graph/ (beside this file) show the network and its loss: initial_graph.png as it is built by a loop over
the first four samples that it trains on, optimized_graph.png as `optimize` rewrote that, and trained_model.png trained,
on all samples at once, with gradients. Without Graphviz it trains all the same.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as long as there is nothing to finish, Ctrl-C ends it without a word

import argparse
import contextlib
import csv
import importlib.util
import io
import itertools
import math
import os
import reprlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from picograd import Tensor, Value, draw, no_grad, optimize
from picograd.nn import MLP, Adam, cross_entropy, mse_loss

GRAPHS = Path(__file__).resolve().parent / "graph"
MIN_ROWS, MAX_CLASSES, ROWS_PER_CLASS, LEARNING_RATE = 10, 20, 5, 0.01
MISSING = {"", "?", "na", "n/a", "null"}  # how tables write that there is no number, besides nan

ABOUT = f"""Train a multi-layer perceptron and draw its graph. The CSV file: UTF-8; separated by commas, semicolons or
tabs; {MIN_ROWS} rows or more; a header is recognised. All columns but the target must be numbers, with a decimal point
and without gaps; they are standardised. A target of text is a class label. So are up to {MAX_CLASSES} different
integers, if there are {ROWS_PER_CLASS} times as many rows. Other numbers make it a regression. A fifth of each class is
held back for the test, or in a regression one of every five rows that are neighbours in the target's order."""
EXITS = """Ctrl-C ends the training early: the network is drawn and tested as it is then, and the exit code is 130.
A second Ctrl-C ends everything at once. The exit code for bad arguments or data is 2."""

Table = tuple[str, np.ndarray, np.ndarray, int]  # title, x (rows, features), y (rows,), classes or 0 for a regression


class UserError(Exception):
    """Something that the user can put right, said in one line."""


# --- data ---


def printable(text: object) -> str:
    """On one line of a terminal: what could move its cursor is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def two_moons(rng: np.random.Generator, n: int = 1000, noise: float = 0.15) -> Table:
    """Two interleaved half circles of radius 1 with normal noise."""
    angle, y = rng.uniform(0, math.pi, n), np.arange(n) % 2
    x = np.where(y, (1 - np.cos(angle), 0.5 - np.sin(angle)), (np.cos(angle), np.sin(angle))).T
    return "two moons", x + rng.normal(0, noise, x.shape), y, 2


def number(cell: str) -> float | None:
    """The number in a cell, which may be nan or inf; None if it holds none."""
    try:
        return None if "_" in cell else float(cell)  # Python reads 1_000 as a number, spreadsheets do not
    except ValueError:
        return None


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


def read_rows(path: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file, all of the same width."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"row {row}: not UTF-8 text; if this is a table, save it as CSV in UTF-8") from None
    if "\0" in text:
        raise UserError("not a text file, it has zero bytes; if this is a table, save it as CSV in UTF-8")

    def fit(delimiter):
        """Best is what splits the first rows into equally many cells; then what the first row has most of."""
        try:
            widths = {len(cells) for _, cells in itertools.islice(split_cells(text, delimiter), 20)}
        except UserError:
            widths = set()
        return len(widths) == 1 and widths != {1}, text.strip().split("\n", 1)[0].count(delimiter)

    rows = list(split_cells(text, max(",;\t", key=fit)))
    for row, cells in rows:
        if len(cells) != len(rows[0][1]):
            raise UserError(f"row {row}: {len(cells)} cells, but row {rows[0][0]} has {len(rows[0][1])}")
    return rows


def is_header(rows: list[tuple[int, list[str]]], target: int) -> bool:
    """Whether the first row holds names, judged by the features, which are numbers in every other row."""
    first = rows[0][1]
    features = [cell for i, cell in enumerate(first) if i != target]
    names = [cell for cell in features if number(cell) is None and cell.lower() not in MISSING]
    if names:  # among numbers, only a word is a name: 12x may be a typing error, in a row that must not get lost
        return all(number(cell) is None for cell in features) or any(name[0].isalpha() for name in names)
    later = [cells[target] for _, cells in rows[1:]] if 0 <= target < len(first) else []
    return bool(later) and number(first[target]) is None and all(number(cell) is not None for cell in later)


def find_target(rows: list[tuple[int, list[str]]], target: str) -> tuple[int, bool]:
    """The index of the target column, given by name or number, and whether the first row is a header."""
    first = rows[0][1]
    try:
        position = int(target)
    except ValueError:
        position = None
    index = -1 if not position else position - 1 if position > 0 else len(first) + position
    header = position is None or is_header(rows, index)
    if header and first.count(target) == 1:
        return first.index(target), True
    if header and first.count(target) > 1:
        raise UserError(f"--target {target!r}: {first.count(target)} columns have that name; give the column's number")
    if not 0 <= index < len(first):
        names = ", ".join(map(reprlib.repr, first[:10])) + ", ..." * (len(first) > 10)
        raise UserError(f"--target {target!r}: no such column; there are {len(first)}, and the first row is {names}")
    return index, header


def read_labels(cells: list[str], complain) -> tuple[np.ndarray, int]:
    """The target's numbers and 0, or class numbers and how many classes. complain(i, problem) raises for cell i."""
    numbers = [number(cell) for cell in cells]
    for i, (cell, x) in enumerate(zip(cells, numbers)):
        if cell.lower() in MISSING or (x is not None and not math.isfinite(x)):
            complain(i, "is not a label or a finite number")
    known = [x for x in numbers if x is not None]
    few = len(set(known)) <= min(MAX_CLASSES, len(cells) // ROWS_PER_CLASS) and all(x.is_integer() for x in known)
    if len(known) == len(cells) and not few:
        return np.array(known), 0
    if len(known) < len(cells):
        text, different = numbers.index(None), len(set(cells))
        if len(known) > len(cells) / 2 and not few:
            complain(text, "is not a number, as most of that column are")
        if different > len(cells) / 2:
            complain(text, f"is not a class label: {different} different ones are too many for {len(cells)} rows")
    classes, y = np.unique(cells if len(known) < len(cells) else known, return_inverse=True)
    return y, len(classes)


def read_table(path: str, target: str) -> Table:
    """A CSV file as a table; UserError names the row and column that is wrong."""
    rows = read_rows(path)
    if not rows:
        raise UserError("the file is empty")
    if len(rows[0][1]) < 2:
        raise UserError("there is only one column (they end at commas, semicolons or tabs): nothing to predict it from")
    index, header = find_target(rows, target)
    names = rows.pop(0)[1] if header else [""] * len(rows[0][1])
    if len(rows) < MIN_ROWS:
        count = f"{len(rows)} row{'s' * (len(rows) != 1)}{' below the header' * header}"
        raise UserError(f"{count}, at least {MIN_ROWS} are needed")

    def complain(i, problem, column=index):
        row, cells = rows[i]
        name = f" ({reprlib.repr(names[column])})" if names[column] else ""
        problem = "is missing" if not cells[column] else f"{reprlib.repr(cells[column])} {problem}"
        raise UserError(f"row {row}, column {column + 1}{name}: {problem}")

    features = [k for k in range(len(names)) if k != index]
    x = np.empty((len(rows), len(features)))
    for i, (_, cells) in enumerate(rows):
        for j, column in enumerate(features):
            value = number(cells[column])
            if value is None or not math.isfinite(value):
                complain(i, f"is not a {'finite ' * (value is not None)}number; only the target can be text", column)
            x[i, j] = value
    y, classes = read_labels([cells[index] for _, cells in rows], complain)
    target = reprlib.repr(names[index]) if names[index] else f"column {index + 1}"
    if (y == y[0]).all():
        raise UserError(f"target {target} is {reprlib.repr(rows[0][1][index])} in every row: there is nothing to learn")
    return f"{printable(Path(path).name)} ({'with a' if header else 'no'} header row), target {target}", x, y, classes


def hold_back(y: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Which rows are for the test: random ones of each class (both sides get some), or of neighbours by the target."""
    order = np.argsort(y, kind="stable")
    cuts = np.flatnonzero(np.diff(y[order])) + 1 if classes else round(len(y) / 5)
    held = np.zeros(len(y), bool)
    for group in np.array_split(order, cuts):
        held[rng.permutation(group)[: max(round(len(group) / 5), len(group) > 1)]] = True
    return held


def standardise(x: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and standard deviation 1 over the rows to train on; those that are constant there become 0.
    A number of the other rows that is too large for that is infinite."""
    size = np.abs(x[~held]).max(axis=0, initial=1e-300)  # divided by it, no square over- or underflows
    seen = x[~held] / size
    varies = np.ptp(seen, axis=0) > 0
    with np.errstate(over="ignore"):
        scaled = (x / size - seen.mean(axis=0)) / np.where(varies, seen.std(axis=0), 1.0)
    return np.where(varies, scaled, 0.0)


# --- training ---


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


def minibatches(model, x, y, classes, optimizer, rng, stopped) -> Callable[[], float | None]:
    """Prepares training on minibatches; returns what runs one epoch: the mean loss, or None if stopped().

    The graph of one minibatch is built and optimized once. Every step puts its rows into the graph's Tensors.
    """
    batches = max(1, min(32, len(x) // 16), len(x) // 1024)
    size = len(x) // batches  # the same for all: an optimized graph has its shapes. What is left over changes by epoch
    inputs, targets = Tensor(x[:size]), Tensor(y[:size], dtype=np.int64 if classes else np.float32)
    built = loss_of(model, inputs, targets, classes)
    loss = optimize(built)
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


def train(model, x, y, classes, epochs, rng, stopped, dask=False) -> int:
    """Runs Adam with a learning rate that falls to 0, until stopped(). Returns the epochs completed."""
    rate = LEARNING_RATE * (5 if dask else 1)  # an epoch is one step then, not many
    optimizer = Adam(model.parameters(), rate, weight_decay=0.1, decoupled=True)
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


def picture(loss: Value, name: str, caption: str, failures: dict[str, str]) -> None:
    """Draws into graph/, or notes why not."""
    try:
        GRAPHS.mkdir(exist_ok=True)
        draw(loss, GRAPHS / name, caption=caption)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        failures[f"graph/{name}"] = printable(str(error).split(". ")[0].splitlines()[0])


def run(data: str | None, target: str, epochs: int, seed: int, dask: bool) -> int:
    rng = np.random.default_rng(seed)
    title, x, y, classes = two_moons(rng) if data is None else read_table(data, "-1" if target is None else target)
    held = hold_back(y, classes, rng)
    x = standardise(x, held).clip(-1e6, 1e6)  # a row unlike any that is trained on must still fit in float32
    numbers, y = y, y if classes else standardise(y, held)
    if not classes and not y[~held].any():
        raise UserError("the target is the same in all rows to train on: there is nothing to learn")
    model = MLP(x.shape[1], [16, 16, classes or 1], activation="tanh", seed=rng)
    kind = f"{classes} classes" if classes else "a regression"
    print(f"{title}: {kind}, {x.shape[1]} features, {np.sum(~held)} rows to train on, {held.sum()} to test on")
    print(model, flush=True)

    interrupts: list[int] = []

    def interrupt(*_):
        interrupts.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends everything

    signal.signal(signal.SIGINT, interrupt)
    loss, failures = one_by_one(model, x[~held][:4], y[~held][:4], classes), {}
    fast, built = optimize(loss), operations(loss)
    picture(loss, "initial_graph.png", f"Built sample by sample: {built} operations", failures)
    left = operations(fast.graph)
    picture(fast, "optimized_graph.png", f"Optimized: {left} operations, {built - left} fewer", failures)
    with local_cluster() if dask else contextlib.nullcontext():
        done = train(model, x[~held], y[~held], classes, epochs, rng, lambda: interrupts, dask)
    if done < epochs:
        print("\n" * sys.stdout.isatty() + f"Interrupted: {done} of {epochs} epochs are complete.", flush=True)
    model.zero_grad()
    loss = loss_of(model, Tensor(x[~held]), y[~held], classes)
    loss.backward()
    picture(
        loss, "trained_model.png", f"Trained: the loss of all {np.sum(~held)} samples at once, and gradients", failures
    )
    if failures:
        print(f"Not drawn: {', '.join(failures)}: {'; '.join(dict.fromkeys(failures.values()))}")
    else:
        print("Drawn: graph/initial_graph.png, graph/optimized_graph.png, graph/trained_model.png")
    result = score(model, x[held], y[held], classes)
    if "nan" in result:
        same = np.ptp(numbers[held] / 2) == 0
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
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="passes over the data (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument(
        "--dask", action="store_true", help="train on a Dask cluster of two local processes, one step an epoch"
    )
    arguments = parser.parse_args()
    for name, least in (("epochs", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.target is not None and arguments.data is None:
        parser.error("--target is a column of data.csv, which was not given")
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
