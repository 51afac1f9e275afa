#!/usr/bin/env python3
"""How fast PicoGrad is beside its peers: ratios of medians, all contenders of a row interleaved in one process.

    python .ci/bench.py                      every row (minutes); run it on a quiet machine, quote the ratios
    python .ci/bench.py --rows moons import  only these
    python .ci/bench.py --quick              two rounds of each at small sizes, to see that everything runs and agrees
    python .ci/bench.py --against OLD.py     another picograd.py as well, in the same turns: "before, picograd ..."
    python .ci/bench.py --list               the rows

The peers come from requirements.txt and bench-requirements.txt beside this file; one that is not installed is reported
as such. Every contender may use all cores that this process may use; `taskset -c 0 python .ci/bench.py` takes one.

ROWS is a table: a row names its contenders, `{contender: make}`. `make()` sets one up and returns a callable that does
the work once: in a row of steps it returns the loss, and before anything is timed all contenders must agree on the
loss of their first three steps (so also on the gradients that the first two applied), and on their gradients where they
give some; in other rows it returns what was measured. MODELS is the table of models that every library computes in the
same way: a model is its data and one loss. Names that start with "picograd" are ours, and the ratios are ours / the
other.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# The same number of threads for every pool, fixed before NumPy, PyTorch (OpenMP) and XLA (NPROC) start theirs.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(CORES)))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUICK = "--quick" in sys.argv  # small sizes: everything runs, nothing is measured
PEERS = ("micrograd", "torch", "jax", "autograd", "mygrad", "numexpr", "dask")

Contenders = dict[str, Callable[[], Callable[[], float]]]


# Steps: what a contender's callable does once.


def replay(loss, optimizer):
    """A training step of an optimized graph."""

    def step():
        loss.forward()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.data)

    return step


def eager(make_loss, optimizer, **backward):
    """A training step that builds its graph anew."""

    def step():
        optimizer.zero_grad()
        loss = make_loss()
        loss.backward(**backward)
        optimizer.step()
        return float(loss.data)

    return step


class NoOptimizer(NamedTuple):
    """In place of an optimizer, in rows of forward and backward."""

    parameters: list

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def step(self):
        pass


def with_gradients(step, gradients):
    """A step, by whose gradients contenders are compared, too: a function that gives them as arrays."""
    step.gradients = gradients
    return step


# Scalars: micrograd's own demo, on micrograd's own network classes.


def micrograd_net(value_class, *shape):
    """micrograd's MLP, made of our Values or its own."""
    import micrograd.nn as nn

    # Its classes look this name up when they make their parameters, and only operate on these afterwards.
    original, nn.Value = nn.Value, value_class
    try:
        random.seed(1)
        return nn.MLP(*shape)
    finally:
        nn.Value = original


def moons() -> Contenders:
    """100 samples through MLP[2,16,16,1] of single numbers, ReLU, hinge loss + L2: a graph of 65,000 nodes."""
    rng = np.random.default_rng(1)
    angle, upper = rng.uniform(0, math.pi, 100), np.arange(100) % 2 == 0
    points = np.where(upper, [np.cos(angle), np.sin(angle)], [1 - np.cos(angle), 0.5 - np.sin(angle)]).T
    points += rng.normal(0, 0.1, points.shape)
    points, labels = points.tolist(), np.where(upper, 1, -1).tolist()  # Python numbers: micrograd is fastest on them

    def loss_of(model, value_class):
        scores = [model(list(map(value_class, point))) for point in points]
        losses = [(1 + -label * score).relu() for label, score in zip(labels, scores, strict=True)]
        return sum(losses) * (1 / len(losses)) + 1e-4 * sum(p * p for p in model.parameters())

    def by_scalars(value_class):
        model = micrograd_net(value_class, 2, [16, 16, 1])

        def step():
            loss = loss_of(model, value_class)
            model.zero_grad()
            loss.backward()
            for p in model.parameters():
                p.data -= 0.1 * p.grad
            return float(loss.data)

        return step

    def optimized():
        from picograd import Value, optimize
        from picograd.nn import SGD

        model = micrograd_net(Value, 2, [16, 16, 1])
        return replay(optimize(loss_of(model, Value)), SGD(model.parameters(), lr=0.1))

    def matrices():
        """The same network and loss in PyTorch, on matrices: what nobody would write on scalars there."""
        import micrograd.engine
        import torch

        torch.set_num_threads(CORES)
        net = micrograd_net(micrograd.engine.Value, 2, [16, 16, 1])
        rows = [[[w.data for w in n.w] for n in layer.neurons] for layer in net.layers]
        layers = [
            (torch.tensor(r, dtype=torch.float64).T.contiguous(), torch.zeros(len(r), dtype=torch.float64))
            for r in rows
        ]
        parameters = [p.requires_grad_() for layer in layers for p in layer]
        x, y = torch.tensor(points, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def step():
            optimizer.zero_grad()
            out = x
            for w, b in layers[:-1]:
                out = torch.relu(torch.addmm(b, out, w))
            scores = torch.addmm(layers[-1][1], out, layers[-1][0])[:, 0]
            loss = torch.relu(1 - y * scores).mean() + 1e-4 * sum((p * p).sum() for p in parameters)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    return {
        "picograd": lambda: by_scalars(importlib.import_module("picograd").Value),
        "picograd optimized": optimized,
        "micrograd": lambda: by_scalars(importlib.import_module("micrograd.engine").Value),
        "PyTorch eager, matrices": matrices,
    }


# Matrices: a whole training step of an MLP (float32, tanh, MSE, SGD). Each peer in the fastest of its documented ways.

RATE = 0.01


class Problem(NamedTuple):
    """Inputs (n, nin), targets (n, nout) and the start parameters w, b, w, b, ...; all float32."""

    sizes: tuple[int, ...]
    x: np.ndarray
    y: np.ndarray
    start: list[np.ndarray]


def problem(n, *sizes) -> Problem:
    rng = np.random.default_rng(0)
    draw = partial(rng.standard_normal, dtype=np.float32)
    layers = zip(sizes, sizes[1:], strict=False)
    start = [a for m, k in layers for a in (draw((m, k)) / np.float32(math.sqrt(m)), draw(k) / 10)]
    return Problem(sizes, draw((n, sizes[0])), draw((n, sizes[-1])), start)


def ours(task: Problem, optimized=False, **backward):
    from picograd import Tensor, optimize
    from picograd.nn import MLP, SGD, mse_loss

    model = MLP(task.sizes[0], task.sizes[1:], activation="tanh")
    for parameter, start in zip(model.parameters(), task.start, strict=True):
        parameter.data = start
    x, y = Tensor(task.x), Tensor(task.y[:, 0] if task.sizes[-1] == 1 else task.y)  # one output: the axis is dropped
    optimizer = SGD(model.parameters(), lr=RATE)
    if optimized:
        return replay(optimize(mse_loss(model(x), y)), optimizer)
    return eager(lambda: mse_loss(model(x), y), optimizer, **backward)


def by_hand(task: Problem):
    """What NumPy can do at best: no array is made after the set-up, and one pass updates all parameters."""
    parameters = np.concatenate([a.ravel() for a in task.start])
    gradients, scratch = np.empty_like(parameters), np.empty_like(parameters)

    def views(flat):
        cuts = np.split(flat, np.cumsum([a.size for a in task.start])[:-1])
        return [cut.reshape(a.shape) for cut, a in zip(cuts, task.start, strict=True)]

    p, g, n = views(parameters), views(gradients), len(task.x)
    layers = range(len(task.sizes) - 1)
    outputs = [np.empty((n, k), np.float32) for k in task.sizes[1:]]
    deltas, slopes = ([np.empty_like(a) for a in outputs] for _ in range(2))
    inputs, ones = [task.x, *outputs[:-1]], np.ones(n, np.float32)

    def step():
        for i in layers:
            np.dot(inputs[i], p[2 * i], out=outputs[i])
            np.add(outputs[i], p[2 * i + 1], out=outputs[i])
            if i < layers[-1]:
                np.tanh(outputs[i], out=outputs[i])
        delta = np.subtract(outputs[-1], task.y, out=deltas[-1])
        loss = float(np.vdot(delta, delta)) / delta.size
        np.multiply(delta, 2 / delta.size, out=delta)
        for i in reversed(layers):
            np.dot(inputs[i].T, deltas[i], out=g[2 * i])
            np.dot(ones, deltas[i], out=g[2 * i + 1])  # a sum over rows, but BLAS does it and NumPy's sum is slower
            if i:
                np.dot(deltas[i], p[2 * i].T, out=deltas[i - 1])
                np.multiply(inputs[i], inputs[i], out=slopes[i - 1])
                np.subtract(1, slopes[i - 1], out=slopes[i - 1])
                np.multiply(deltas[i - 1], slopes[i - 1], out=deltas[i - 1])
        np.multiply(gradients, RATE, out=scratch)
        np.subtract(parameters, scratch, out=parameters)
        return loss

    return step


def pytorch(task: Problem):
    import torch

    torch.set_num_threads(CORES)
    modules = []
    for w, b in zip(task.start[::2], task.start[1::2], strict=True):
        linear = torch.nn.Linear(*w.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(w.T))
            linear.bias.copy_(torch.from_numpy(b))
        modules += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*modules[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def forward(parameters, x, tanh):
    for w, b in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = tanh(x @ w + b)
    return x @ parameters[-2] + parameters[-1]


def jax_jit(task: Problem):
    import jax

    def loss(parameters, x, y):
        return ((forward(parameters, x, jax.numpy.tanh) - y) ** 2).mean()

    @partial(jax.jit, donate_argnums=0)
    def train(parameters, x, y):
        value, gradients = jax.value_and_grad(loss)(parameters, x, y)
        return [p - RATE * g for p, g in zip(parameters, gradients, strict=True)], value

    parameters, x, y = [jax.numpy.array(a) for a in task.start], jax.numpy.array(task.x), jax.numpy.array(task.y)

    def step():
        nonlocal parameters
        parameters, value = jax.block_until_ready(train(parameters, x, y))
        return float(value)

    return step


def hips_autograd(task: Problem):
    import autograd.numpy as anp
    from autograd import value_and_grad

    parameters = [a.copy() for a in task.start]
    train = value_and_grad(lambda parameters: anp.mean((forward(parameters, task.x, anp.tanh) - task.y) ** 2))

    def step():
        value, gradients = train(parameters)
        for p, g in zip(parameters, gradients, strict=True):
            p -= RATE * g
        return float(value)

    return step


def mygrad(task: Problem):
    import mygrad

    mygrad.turn_memory_guarding_off()  # its documented way to go faster
    parameters = [mygrad.tensor(a) for a in task.start]

    def step():
        loss = ((forward(parameters, task.x, mygrad.tanh) - task.y) ** 2).mean()
        loss.backward()
        for p in parameters:
            p.data -= RATE * p.grad
        return float(loss.data)

    return step


MATRIX_PEERS = {
    "NumPy by hand": by_hand,
    "PyTorch eager": pytorch,
    "JAX jit": jax_jit,
    "autograd": hips_autograd,
    "MyGrad": mygrad,
}


def mlp(*shape) -> Contenders:
    makers = {"picograd": ours, "picograd optimized": partial(ours, optimized=True)} | MATRIX_PEERS
    return {name: partial(make, problem(*shape)) for name, make in makers.items()}


# Models of other kinds: forward and backward. Each is its data and its loss, which is written once, on the functions of
# a library: those of NumPy's names, and the ones in `spelled` that each library has under names of its own.


class Model(NamedTuple):
    """A row of `MODELS`. loss: of the library, the parameters and the inputs; by_hand: `-> loss, gradients` of both."""

    title: str
    parameters: tuple[tuple[int, ...], ...]  # shapes, of normal numbers over the root of the first length
    inputs: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    loss: Callable
    by_hand: Callable | None = None


def normal(*shapes):
    return lambda rng: tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def convolution(lib, parameters, inputs):
    filters, bias = parameters
    out = lib.relu(lib.convolve(inputs[0], filters) + bias[:, None, None])
    n, k, rows, columns = out.shape
    return lib.mean(lib.amax(lib.reshape(out, (n, k, rows // 2, 2, columns // 2, 2)), (3, 5)))


def convolution_by_hand(parameters, inputs):
    """One matrix product over windows that are copied once; every array is kept."""
    (filters, bias), x = parameters, inputs[0]
    k, size = len(filters), filters.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    n, rows, columns = windows.shape[:3]
    flat, out = np.empty((n * rows * columns, size * size), np.float32), np.empty((n, rows, columns, k), np.float32)
    into, slope = flat.reshape(windows.shape), np.empty_like(out)
    corners = [(slice(None), slice(i, None, 2), slice(j, None, 2)) for i in (0, 1) for j in (0, 1)]
    peak, share = np.empty_like(out[corners[0]]), 4 / (n * k * rows * columns)
    hit = np.empty(peak.shape, bool)

    def step():
        np.copyto(into, windows)
        np.dot(flat, filters.reshape(k, -1).T, out=out.reshape(-1, k))
        np.add(out, bias, out=out)
        np.maximum(out[corners[0]], out[corners[1]], out=peak)
        for corner in corners[2:]:
            np.maximum(peak, out[corner], out=peak)
        np.maximum(peak, 0, out=peak)
        for corner in corners:  # where it is the largest, and above 0
            np.equal(out[corner], peak, out=hit)
            np.multiply(hit, np.float32(share), out=slope[corner])
        g = slope.reshape(-1, k)
        return float(peak.mean()), [np.dot(flat.T, g).T.reshape(filters.shape), g.sum(0)]

    return step


def embedding(lib, parameters, inputs):
    return lib.mean(lib.tanh(lib.mean(parameters[0][inputs[0]], 1)) * inputs[1])


def embedding_by_hand(parameters, inputs):
    (table,), (ids, weights) = parameters, inputs
    gradient = np.empty_like(table)

    def step():
        out = np.tanh(table[ids].mean(1))
        g = (1 - out * out) * weights
        g /= out.size * ids.shape[1]
        gradient.fill(0)
        np.add.at(gradient, ids, g[:, None])
        return float((out * weights).mean()), [gradient]

    return step


def words(rows):
    """64 sentences of 32 words, out of so many."""
    return lambda rng: (rng.integers(0, rows, (64, 32)), rng.standard_normal((64, 64), dtype=np.float32))


def einsum_by_hand(parameters, inputs):
    (a, b), (c,) = parameters, inputs
    share = np.float32(1 / c.size)

    def step():
        g = c * share
        return float(np.vdot(a @ b.T, g)), [g @ b, g.T @ a]

    return step


def power_by_hand(parameters, inputs):
    (x,) = parameters
    square, out = np.empty_like(x), np.empty_like(x)

    def step():
        np.multiply(x, x, out=square)
        np.multiply(square, x, out=out)
        loss = float(out.mean())
        return loss, [np.multiply(square, np.float32(3 / x.size), out=square)]

    return step


def attention(lib, parameters, inputs):
    """One head over 8 x 64 x 64, before a layer norm and a feed-forward with gelu."""
    query, key, value, first, second, gain, bias = parameters
    x, weights = inputs
    normed = lib.layer_norm(x, gain, bias)
    scores = (normed @ query) @ lib.swapaxes(normed @ key, -1, -2) / 8.0
    x = x + lib.softmax(scores) @ (normed @ value)
    return lib.mean((x + lib.gelu(x @ first) @ second) * weights)


def lstm(lib, parameters, inputs):
    weights, recurrent, bias, start = parameters
    h = c = start
    for x in inputs[0]:
        gates = x @ weights + h @ recurrent + bias
        i, f, o = (lib.sigmoid(gates[:, 32 * k : 32 * k + 32]) for k in range(3))
        c = f * c + i * lib.tanh(gates[:, 96:])
        h = o * lib.tanh(c)
    return lib.mean(h * inputs[1])


def classes(rng):
    return rng.standard_normal((256, 64), dtype=np.float32), rng.integers(0, 5000, 256)


MODELS = {
    "power": Model(
        "(x ** 3).mean(), 200 x 200", ((200, 200),), normal(), lambda lib, p, _: lib.mean(p[0] ** 3), power_by_hand
    ),
    "einsum": Model(
        'einsum("ij,kj->ik"), 200 x 300 x 400',
        ((200, 300), (400, 300)),
        normal((200, 400)),
        lambda lib, p, x: lib.mean(lib.einsum("ij,kj->ik", *p) * x[0]),
        einsum_by_hand,
    ),
    "convolution": Model(
        "16 x 28 x 28 by 8 filters of 5 x 5 (windows and einsum), relu, max-pool",
        ((8, 5, 5), (8,)),
        normal((16, 28, 28)),
        convolution,
        convolution_by_hand,
    ),
    "embedding": Model(
        "embedding lookup, 64 x 32 of 5,000 rows of 64, mean, tanh",
        ((5000, 64),),
        words(5000),
        embedding,
        embedding_by_hand,
    ),
    "embedding-few": Model(
        "embedding lookup, the same among 50 rows", ((5000, 64),), words(50), embedding, embedding_by_hand
    ),
    "layer-norm": Model(
        "layer norm, 256 x 512",
        ((256, 512), (512,), (512,)),
        normal((256, 512)),
        lambda lib, p, x: lib.mean(lib.layer_norm(*p) * x[0]),
    ),
    "attention": Model(
        "attention block with layer norm, softmax and gelu, 8 x 64 x 64",
        ((64, 64), (64, 64), (64, 64), (64, 256), (256, 64), (64,), (64,)),
        normal((8, 64, 64), (8, 64, 64)),
        attention,
    ),
    "lstm": Model(
        "LSTM, 16 steps of 32 x 32", ((32, 128), (32, 128), (128,), (32, 32)), normal((16, 32, 32), (32, 32)), lstm
    ),
    "cross-entropy": Model(
        "cross-entropy of 256 x 5,000 after a matrix product",
        ((64, 5000), (5000,)),
        classes,
        lambda lib, p, x: lib.cross_entropy(x[0] @ p[0] + p[1], x[1]),
    ),
}


def library(name: str):
    """What a loss calls: the library's functions of NumPy's names, and what each spells differently."""
    if name == "picograd":
        import picograd

        own, base = {name: getattr(picograd, name) for name in ("relu", "sigmoid", "softmax", "cross_entropy")}, np

        def layer_norm(x, gain, bias):
            centred = x - np.mean(x, -1, keepdims=True)
            return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-5) * gain + bias

        def gelu(x):
            return 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

        def convolve(x, filters):
            windows = np.lib.stride_tricks.sliding_window_view(x, filters.shape[1:], (1, 2))
            return np.einsum("nhwij,fij->nfhw", windows, filters)

        own |= {"layer_norm": layer_norm, "gelu": gelu, "convolve": convolve}
    elif name == "torch":
        import torch
        import torch.nn.functional as F

        torch.set_num_threads(CORES)
        own, base = {name: getattr(F, name) for name in ("relu", "sigmoid", "cross_entropy")}, torch
        own["layer_norm"] = lambda x, gain, bias: F.layer_norm(x, x.shape[-1:], gain, bias)
        own["softmax"] = partial(F.softmax, dim=-1)
        own["gelu"] = partial(F.gelu, approximate="tanh")
        own["convolve"] = lambda x, filters: F.conv2d(x[:, None], filters[:, None])
    else:
        import jax

        own, base = {name: getattr(jax.nn, name) for name in ("relu", "sigmoid", "softmax", "gelu")}, jax.numpy
        own["amax"] = jax.numpy.max

        def cross_entropy(logits, labels):
            return -jax.numpy.mean(jax.nn.log_softmax(logits)[jax.numpy.arange(len(labels)), labels])

        def layer_norm(x, gain, bias):
            centred = x - x.mean(-1, keepdims=True)
            return centred / jax.numpy.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias

        def convolve(x, filters):
            return jax.lax.conv(x[:, None], filters[:, None], (1, 1), "VALID")

        own |= {"cross_entropy": cross_entropy, "layer_norm": layer_norm, "convolve": convolve}
    return SimpleNamespace(**{name: getattr(base, name) for name in SHARED if hasattr(base, name)} | own)


SHARED = "mean tanh einsum reshape amax swapaxes".split()


def of_model(model: Model) -> Contenders:
    rng = np.random.default_rng(0)
    draw = partial(rng.standard_normal, dtype=np.float32)
    parameters = [draw(shape) / np.float32(math.sqrt(shape[0])) for shape in model.parameters]
    inputs = model.inputs(rng)

    def by_picograd(optimized=False):
        from picograd import Tensor, Value, optimize

        values = [Value(p) for p in parameters]
        loss = partial(model.loss, library("picograd"), values, [Tensor(x, x.dtype) for x in inputs])
        nothing = NoOptimizer(values)
        step = replay(optimize(loss()), nothing) if optimized else eager(loss, nothing)
        return with_gradients(step, lambda: [v.grad.numpy() for v in values])

    def by_hand():
        step, found = model.by_hand(parameters, inputs), []

        def work():
            loss, found[:] = step()
            return loss

        return with_gradients(work, lambda: found)

    def by_torch():
        import torch

        tensors = [torch.from_numpy(p.copy()).requires_grad_() for p in parameters]
        loss = partial(model.loss, library("torch"), tensors, list(map(torch.from_numpy, inputs)))

        def step():
            for p in tensors:
                p.grad = None
            out = loss()
            out.backward()
            return out.item()

        return with_gradients(step, lambda: [p.grad.numpy() for p in tensors])

    def by_jax():
        import jax

        work, found = jax.jit(jax.value_and_grad(partial(model.loss, library("jax")))), []
        ours, theirs = list(map(jax.numpy.array, parameters)), list(map(jax.numpy.array, inputs))

        def step():
            out, found[:] = jax.block_until_ready(work(ours, theirs))
            return float(out)

        return with_gradients(step, lambda: [np.asarray(g) for g in found])

    contenders = {"picograd": by_picograd, "picograd optimized": partial(by_picograd, True)}
    contenders |= {"NumPy by hand": by_hand} if model.by_hand else {}
    return contenders | {"PyTorch eager": by_torch, "JAX jit": by_jax}


def samples() -> Contenders:
    """100 graphs of an MLP on one sample each, summed into a loss, beside one graph of all samples."""
    task = problem(100, 2, 16, 16, 1)

    def make(one_by_one, fast=True):
        from picograd import optimize
        from picograd.nn import MLP, SGD, mse_loss

        model = MLP(2, [16, 16, 1])
        for parameter, start in zip(model.parameters(), task.start, strict=True):
            parameter.data = start
        x, y = task.x, task.y[:, 0]

        def loss():
            if one_by_one:
                return sum((model(row) - float(target)) ** 2 for row, target in zip(x, y, strict=True)) * (1 / len(x))
            return mse_loss(model(x), y)

        optimizer = SGD(model.parameters(), lr=RATE)
        return replay(optimize(loss()), optimizer) if fast else eager(loss, optimizer)

    return {
        "picograd optimized, one by one": partial(make, True),
        "picograd optimized, batched": partial(make, False),
        "eager, one by one": partial(make, True, False),
    }


def expression() -> Contenders:
    """The expression of micrograd's README: two dozen operations on two numbers."""

    def build(a, b):
        c = a + b
        d = a * b + b**3
        c = c + c + 1
        c = c + 1 + c + (-a)
        d = d + d * 2 + (b + a).relu()
        d = d + 3 * d + (b - a).relu()
        e = c - d
        f = e**2
        g = f / 2.0
        return g + 10.0 / f

    def fast():
        from picograd import Value, optimize

        a, b = Value(-4.0), Value(2.0)
        g = optimize(build(a, b))

        return replay(g, NoOptimizer([a, b]))

    def plain(module):
        def make():
            value_class = importlib.import_module(module).Value

            def step():
                a, b = value_class(-4.0), value_class(2.0)
                g = build(a, b)
                g.backward()
                return float(g.data)

            return step

        return make

    return {"picograd optimized": fast, "eager": plain("picograd"), "micrograd": plain("micrograd.engine")}


def optimizing() -> Contenders:
    """Seconds that `optimize` takes, per 100,000 nodes: micrograd's MLP over as many samples as make so many nodes."""

    def make(samples):
        from picograd import Value, optimize

        model = micrograd_net(Value, 2, [16, 16, 1])
        points = np.random.default_rng(0).normal(size=(samples, 2)).tolist()

        def measure():
            loss = sum((1 + -model(list(map(Value, point)))).relu() for point in points)
            nodes = samples * 648
            start = time.perf_counter()
            optimize(loss)
            return (time.perf_counter() - start) / nodes * 1e5

        return measure

    sizes = (10_000, 20_000) if QUICK else (10_000, 100_000, 1_000_000)
    return {f"picograd, {nodes:,} nodes": partial(make, nodes // 648) for nodes in sizes}


# Beyond one machine, with processes of this one: each worker has one thread and half of the rows, or all.


def block(i: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((rows, columns), dtype=np.float32)


def distributing() -> Contenders:
    """Full-batch steps on rows that are made where they stay, in blocks; the engine in memory has the same rows."""
    rows, blocks = (5_000 if QUICK else 500_000), 4
    task = problem(1, 100, 64, 1)

    def in_memory():
        x, y = (np.concatenate([block(i, rows, n) for i in range(blocks)]) for n in (100, 1))
        return ours(task._replace(x=x, y=y), retain_grads=False)

    def on_workers(n):
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")  # it tells at length that it closes
        import dask.array as da
        from dask import delayed
        from dask.distributed import Client, LocalCluster, wait

        loopback = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": 60}
        loopback["scheduler_kwargs"] = {"dashboard_address": "127.0.0.1:0"}
        cluster = LocalCluster(n_workers=n, threads_per_worker=1, memory_limit=0, **loopback)
        client = Client(cluster, set_as_default=False)

        def made(columns):
            parts = [delayed(block)(i, rows, columns) for i in range(blocks)]
            return da.concatenate([da.from_delayed(part, (rows, columns), np.float32) for part in parts])

        x, y = client.persist([made(100), made(1)])
        with client.as_current():
            wait([x, y])
        step = ours(task._replace(x=x, y=y), retain_grads=False)

        def on_cluster():
            with client.as_current():
                return step()

        return on_cluster

    return {
        "picograd, in memory": in_memory,
        "picograd on Dask, 1 worker": partial(on_workers, 1),
        "picograd on Dask, 2 workers": partial(on_workers, 2),
    }


# Memory: the peak of bytes allocated within one training step, above what is allocated when it starts.


def memory(*shape) -> Contenders:
    task = problem(*shape)

    def traced(step):
        """NumPy reports its buffers to tracemalloc. The first step is there to own, traced, what the second frees."""

        def measure():
            tracemalloc.start()
            try:
                step()
                start, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                step()
                return tracemalloc.get_traced_memory()[1] - start
            finally:
                tracemalloc.stop()

        return measure

    def profiled(step):
        """PyTorch's profiler records each allocation (+) and release (-) of its CPU allocator: the running sum's peak.

        What matrix kernels take from the system past that allocator is not seen, neither here nor by tracemalloc.
        """
        from torch.profiler import ProfilerActivity, profile, record_function

        def measure():
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                step()
                with record_function("the step to measure"):
                    step()
            with tempfile.TemporaryDirectory() as folder:
                trace = pathlib.Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(trace))
                events = json.loads(trace.read_text())["traceEvents"]
            start = next(e["ts"] for e in events if e["name"] == "the step to measure")
            memory = sorted(
                (e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]" and e["ts"] >= start
            )
            return max(itertools.accumulate(size for _, size in memory))

        return measure

    return {
        "picograd": lambda: traced(ours(task)),
        "picograd, retain_grads=False": lambda: traced(ours(task, retain_grads=False)),
        "picograd optimized": lambda: traced(ours(task, optimized=True)),
        "PyTorch eager": lambda: profiled(pytorch(task)),
    }


# Large tensors: all cores, in threads and in processes, beside what a user would take instead.

LARGE = 10**6 if QUICK else 10**8


@functools.cache
def numbers(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def reading() -> float:
    """Reads the array once, with all cores: what no sum can beat."""
    from concurrent.futures import ThreadPoolExecutor

    x = numbers(LARGE)
    pool = ThreadPoolExecutor(CORES)
    return lambda: sum(pool.map(np.add.reduce, np.array_split(x, CORES)))


def large(f, numexpr=None, shape=(LARGE,), compiled=True, **others) -> Contenders:
    """f(library, x) of one array: ours on a distributed Tensor, NumPy's on the array, and the others'."""

    def chunked(processes):
        from picograd import Tensor, set_distributed_config

        # It stays on, as in a program that uses it: switching it off gives back the buffers that are kept.
        on = partial(set_distributed_config, enabled=True, use_processes=processes, num_workers=CORES)
        on()
        x = Tensor(numbers(*shape))

        def work():
            on()
            return float(np.ravel(f(np, x).data)[0])

        return work

    def numpy():
        x = numbers(*shape)
        return lambda: float(np.ravel(f(np, x))[0])

    def by_torch(compile=False):
        import torch

        torch.set_num_threads(CORES)
        x = torch.from_numpy(numbers(*shape))
        work = torch.compile(partial(f, torch)) if compile else partial(f, torch)
        with torch.no_grad():
            work(x)
        return torch.no_grad()(lambda: float(work(x).ravel()[0]))

    def by_numexpr():
        import numexpr as ne

        ne.set_num_threads(CORES)
        x = numbers(*shape)
        return lambda: float(np.ravel(ne.evaluate(numexpr, {"x": x}))[0])

    contenders = {
        "picograd, threads": lambda: chunked(False),
        "picograd, processes": lambda: chunked(True),
        "NumPy": numpy,
        "PyTorch eager": by_torch,
    }
    if compiled and shutil.which("c++"):
        contenders["torch.compile"] = lambda: by_torch(True)
    return contenders | ({"numexpr": by_numexpr} if numexpr else {}) | others


def mixed(reduce) -> Callable[[], Contenders]:
    """Of np.tanh(x) * 2 - x**2, in rows."""
    return partial(large, lambda lib, x: reduce(lib.tanh(x) * 2 - x**2), shape=(LARGE // 100, 100), compiled=False)


def chunked_small() -> Contenders:
    def make(kind):
        from picograd import Tensor, distributed_config

        x = numbers(10_000)
        if kind == "NumPy":
            return lambda: float((x * 2 + 1).sum())
        x = Tensor(x, distributed=True if kind == "forced" else None)

        def work():
            for _ in range(10):
                total = (x * 2 + 1).sum()
            return float(total.data)

        if kind != "enabled":
            return work
        with distributed_config(enabled=True):
            return distributed_config(enabled=True)(work)

    def ten(make_one):
        def make_ten():
            one = make_one()

            def work():
                for _ in range(10):
                    total = one()
                return total

            return work

        return make_ten

    return {
        "picograd, enabled": lambda: make("enabled"),
        "picograd, not enabled": lambda: make("plain"),
        "NumPy": ten(lambda: make("NumPy")),
    }


def chunked_values() -> Contenders:
    """Forward and backward of ((w * x + b).tanh() ** 2).mean(), x of 10**7 elements, w and b of shape (100,)."""
    data, weights = numbers(10**5, 100), numbers(100)

    def ours(enabled, processes=False):
        from picograd import Tensor, Value, distributed_config

        x, w, b = Tensor(data), Value(weights), Value(weights)

        def step():
            with distributed_config(enabled=enabled, use_processes=processes, num_workers=CORES):
                w.grad = b.grad = None
                loss = ((w * x + b).tanh() ** 2).mean()
                loss.backward()
                return loss.item() + w.grad.data[0]

        return step

    def by_torch():
        import torch

        torch.set_num_threads(CORES)
        x = torch.from_numpy(data)
        w, b = (torch.from_numpy(weights.copy()).requires_grad_() for _ in range(2))

        def step():
            w.grad = b.grad = None
            loss = ((w * x + b).tanh() ** 2).mean()
            loss.backward()
            return loss.item() + float(w.grad[0])

        return step

    return {
        "picograd, threads": lambda: ours(True),
        "picograd, processes": lambda: ours(True, True),
        "picograd, not distributed": lambda: ours(False),
        "PyTorch eager": by_torch,
    }


# Start-up.


def imports() -> Contenders:
    def imported(name, first):
        code = f"import {first}, time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
        folder = os.path.dirname(importlib.import_module("picograd").__file__)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": folder}
        command = [sys.executable, "-c", code]

        def measure():
            return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

        measure()  # leaves the compiled module behind, as the first import on any machine does
        return measure

    return {
        "picograd": lambda: imported("picograd", first="numpy"),
        "numpy": lambda: imported("numpy", first="sys"),
    }


class Row(NamedTuple):
    title: str
    contenders: Callable[[], Contenders]
    unit: str = "ms"
    steps: bool = True  # time the calls, which return the loss; else they return what was measured
    tolerance: float = 1e-4  # of the losses, relative
    agree: bool = True  # whether all contenders return the same
    rounds: int = 15  # at most


ROWS = {
    "moons": Row("training step on two moons, micrograd's MLP[2,16,16,1] of single numbers", moons, tolerance=1e-9),
    "mlp-tiny": Row("training step, 32 x MLP[8,16,1], float32", partial(mlp, 32, 8, 16, 1)),
    "mlp-small": Row("training step, 100 x MLP[2,16,16,1], float32", partial(mlp, 100, 2, 16, 16, 1)),
    "mlp-medium": Row("training step, 128 x MLP[784,256,128,10], float32", partial(mlp, 128, 784, 256, 128, 10)),
    "mlp-large": Row("training step, 1024 x MLP[784,512,512,10], float32", partial(mlp, 1024, 784, 512, 512, 10)),
    **{name: Row(f"{x.title}: forward and backward", partial(of_model, x)) for name, x in MODELS.items()},
    "samples": Row("training step, MLP[2,16,16,1] on 100 samples, each its own graph", samples),
    "expression": Row("forward and backward of the expression in micrograd's README", expression, tolerance=1e-9),
    "optimize": Row("time of optimize() per 100,000 nodes", optimizing, steps=False, rounds=3),
    "sum": Row(
        "(x * 2 + 1).sum(), x of 10**8 float32",
        partial(large, lambda lib, x: (x * 2 + 1).sum(), "sum(x * 2 + 1)", **{"reading it once": reading}),
        agree=False,
    ),
    "map": Row("x * 2 + 1 as an array, x of 10**8 float32", partial(large, lambda lib, x: x * 2 + 1, "x * 2 + 1")),
    "mean0": Row(
        "mean over axis 0 of np.tanh(x) * 2 - x**2, x of (10**6, 100) float32",
        mixed(lambda y: y.mean(0)),
        tolerance=1e-3,  # NumPy's sum down the rows is that far off
    ),
    "mean1": Row("mean over axis 1 of the same", mixed(lambda y: y.mean(1))),
    "max": Row("maximum of the same", mixed(lambda y: y.max())),
    "values": Row("forward and backward of ((w * x + b).tanh() ** 2).mean(), 10**7 elements", chunked_values),
    "small": Row("ten times (x * 2 + 1).sum(), x of 10**4 float32", chunked_small),
    "memory": Row(
        "peak bytes allocated within a step above its start, 1024 x MLP[784,512,512,10], float32",
        partial(memory, 1024, 784, 512, 512, 10),
        unit="MiB",
        steps=False,
    ),
    "dask": Row("training step, 2,000,000 x MLP[100,64,1], float32, in memory and on workers", distributing),
    "import": Row("import picograd where NumPy is imported already, beside importing NumPy", imports, steps=False),
}
SCALE = {"ms": 1e3, "MiB": 2.0**-20}


@contextlib.contextmanager
def instead(folder: str):
    """Meanwhile, `import picograd` finds the file in that folder."""
    kept = {name: sys.modules.pop(name) for name in ("picograd", "picograd.nn") if name in sys.modules}
    sys.path.insert(0, folder)
    sys.modules.update(OTHERS)
    try:
        yield
    finally:
        sys.path.remove(folder)
        OTHERS.update((name, sys.modules.pop(name)) for name in ("picograd", "picograd.nn") if name in sys.modules)
        sys.modules.update(kept)


OTHERS = {}  # the modules that it found


def with_before(contenders: Contenders, folder: str) -> Contenders:
    """Each of ours by the file in that folder, too; but worker processes would import the file that is measured."""

    def before(make):
        with instead(folder):
            return make()

    ours = {name: make for name, make in contenders.items() if name.startswith(("picograd", "eager"))}
    return contenders | {f"before, {k}": partial(before, make) for k, make in ours.items() if "processes" not in k}


def set_up(contenders: Contenders):
    """-> the callables of those that are installed, and {name: missing package} of the others."""
    ready, absent = {}, {}
    for name, make in contenders.items():
        try:
            ready[name] = make()
        except ModuleNotFoundError as error:
            if error.name not in PEERS:
                raise
            absent[name] = error.name
    return ready, absent


def check_agreement(ready, tolerance):
    """All have the losses of the first in three steps, and its gradients where they give some."""
    losses, gradients = {name: [step() for _ in range(3)] for name, step in ready.items()}, {}
    for name, step in ready.items():
        if hasattr(step, "gradients"):
            gradients[name] = [np.array(g) for g in step.gradients()]
    for kind, found in (("losses", losses), ("gradients", gradients)):
        first = next(iter(found), None)
        for name, got in found.items():
            for a, b in zip(got, found[first], strict=True):
                if not np.allclose(a, b, rtol=tolerance, atol=tolerance * np.max(np.abs(b)) * (kind == "gradients")):
                    raise SystemExit(f"no comparison: first {kind} of {first} {found[first]}, of {name} {got}")


def run(row: Row, rounds: int, against: str | None = None):
    """-> {contender: one measurement per round}, {absent contender: package}."""
    contenders = row.contenders()
    ready, absent = set_up(with_before(contenders, against) if against else contenders)
    if row.steps and row.agree:
        check_agreement(ready, row.tolerance)
    gc.collect()
    gc.freeze()  # else each collection in a contender's time walks over all that its peers ever imported
    results = {name: [] for name in ready}
    order = list(ready)
    for _ in range(rounds):
        for name in order:
            gc.collect()
            results[name].append(turn(ready[name]) if row.steps else ready[name]())
        order.append(order.pop(0))  # nobody runs always after the same neighbour
    gc.unfreeze()
    return results, absent


def turn(step, settle=0.05, seconds=0.05):
    """Mean time of a step over a turn: a mean, since steps have to pay for the garbage collections they bring about.

    The first steps are not timed: they warm the caches, while the idle threads of the last contender's pool, which spin
    for tens of milliseconds, fall asleep.
    """
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < settle:
        step()
        calls += 1
    calls = math.ceil(calls * seconds / (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def table(row: Row, results, absent) -> str:
    """Medians and quartiles, and for each of ours the ratio of its median to every other one's."""
    medians = {name: statistics.median(values) for name, values in results.items()}
    mine = [name for name in medians if name.startswith("picograd")]
    width = max(map(len, [*medians, *absent]))
    heads = "".join(f"   {name} / it" for name in mine)
    lines = [f"  {'':{width}}  {'median ' + row.unit:>12}  {'quartiles':>19}{heads}"]
    for name, values in results.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) * SCALE[row.unit]
        line = f"  {name:{width}}  {middle:12.4g}  {f'{low:.4g} .. {high:.4g}':>19}"
        for head in mine if name not in mine else ():
            line += f"{medians[head] / medians[name]:{len(head) + 8}.3f}"
        lines.append(line)
    lines += [f"  {name:{width}}  not installed ({package})" for name, package in absent.items()]
    return "\n".join(lines)


def header() -> str:
    def version(package):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} not installed"

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        model = names[0].split(":", 1)[1].strip() if names else model
    load = f"; load average before: {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return "\n".join(
        [
            f"{datetime.date.today()}, {platform.system()}, {model}, {CORES} cores, {CORES} threads for each contender"
            + load,
            f"Python {platform.python_version()}, numpy {np.__version__} ({blas['name']} {blas['version']}), "
            + ", ".join(map(version, PEERS)),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=ROWS, default=list(ROWS), help="only these rows")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each contender (default: 15)")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument(
        "--against", type=pathlib.Path, metavar="FILE", help="another picograd.py to run beside this one"
    )
    parser.add_argument("--list", action="store_true", help="print the rows' names and titles, and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:12} {row.title}" for name, row in ROWS.items()))
        return
    if arguments.rounds < 1:
        parser.error(f"--rounds: at least 1, not {arguments.rounds}")
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.against:
            shutil.copy(arguments.against, pathlib.Path(folder, "picograd.py"))
        for name in arguments.rows:
            row = ROWS[name]
            rounds = 2 if arguments.quick else min(row.rounds, arguments.rounds)
            print(f"\n{name}: {row.title}", flush=True)
            print(table(row, *run(row, rounds, arguments.against and folder)), flush=True)
            importlib.import_module("picograd").set_distributed_config(enabled=False)  # each row starts like the first


if __name__ == "__main__":
    main()
