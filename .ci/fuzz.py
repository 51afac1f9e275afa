#!/usr/bin/env python3
"""Random programs, each run in several ways that must agree.

    .ci/fuzz.py SECONDS [--room values|optimizer|blocks] [--seed N] [--programs N] [--keep-going] [--processes]
                        [--path FILE]

A room is a module or class with three names:

    PREAMBLE                   Python text that makes a program one to paste
    generate(rng) -> program   a list of Python statements
    check(program) -> None     the ways agree
                      text     how they differ: comment lines, and the comparison as Python
                      Skip     the program is ill-conditioned: set aside, and counted

`values` holds eager graphs against plain NumPy, autograd and finite differences, and against their own replays,
pickles, copies and higher derivatives; `optimizer` holds `optimize` against eager graphs; `blocks` is another file.

The generator runs every statement on `Model` as it writes it, so that programs are valid, and mostly tame, by
construction. `Model` is the contract on dtypes, written down a second time: it computes with NumPy, and knows nothing
of picograd. A difference is shrunk by leaving out statements and by simplifying what is left.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import math
import operator
import pathlib
import pickle
import re
import secrets
import sys
import time
import traceback
import types
import warnings
from unittest import mock

import autograd
import autograd.numpy as anp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PREAMBLE = """\
import copy, math, pickle
import numpy as np
from numpy import inf, nan
import picograd
from picograd import Tensor, Value, primitive

scaled = primitive(lambda x, by: x * by, lambda g, out, x, by: g * by, name="scaled")
horner = primitive(
    lambda x, terms: terms[0] + x * (terms[1] + x * terms[2]),
    lambda g, out, x, terms: g * (terms[1] + 2.0 * terms[2] * x),
    name="horner",
)
"""
picograd = None  # the module under test; `load` sets it


class Skip:
    """Why a program was set aside."""

    def __init__(self, reason: str):
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------------------
# The contract, a second time
# ---------------------------------------------------------------------------------------------------------------------


class Mode:
    """How models compute: in the dtypes of the contract, or `wide`, all in float64; and the coarsest dtype they met."""

    wide = False
    xp = np  # or autograd.numpy
    eps = 0.0
    frozen: dict | None = None  # what was detached, by its turn: differences move the leaves, and these must stay
    turn = 0


mode = Mode()


@contextlib.contextmanager
def computing(wide: bool, xp):
    """Within it, models compute in that way."""
    mode.wide, mode.xp = wide, xp
    try:
        yield
    finally:
        mode.wide, mode.xp = False, np


_WEAK = {float: np.float64, bool: np.bool_, int: np.int64}  # Python's numbers, to NumPy's for the same arithmetic


def weak_array_dtype() -> np.dtype:
    """The dtype of an array made of numbers alone, which the contract leaves open: one for all functions."""
    return np.stack([picograd.Value(1.0), picograd.Value(2.0)]).dtype


def constant(x):
    """A constant operand: scalars of NumPy are numbers like Python's, sequences are arrays."""
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, (list, tuple)):
        x = np.asarray(x)
        if x.dtype.kind == "O":
            raise TypeError("no Value turns into an array by itself")
    return x


def lift(xs: list, typed: bool, plain: int = 0) -> list:
    """Operands as NumPy is to see them. typed: functions that are no ufuncs know no weak numbers, so these get a dtype;
    plain: how many of the first operands take no part in dtypes (the condition of np.where)."""
    if mode.wide:
        raw = [x.raw if isinstance(x, Model) else constant(x) for x in xs]
        return [x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in raw]
    held = [x.raw.dtype for x in xs[plain:] if isinstance(x, Model) and hasattr(x.raw, "dtype")]
    floating = [dtype for dtype in held if dtype.kind == "f"]
    target = np.result_type(*floating) if floating else None
    raw = [x.raw if isinstance(x, Model) else constant(x) for x in xs]
    for i, x in enumerate(xs[plain:], plain):
        if target and hasattr(raw[i], "dtype") and (raw[i].dtype.kind in "iub" or not isinstance(x, Model)):
            raw[i] = raw[i].astype(target)
    if not any(hasattr(x, "dtype") for x in raw):
        return [_WEAK[type(x)](x) for x in raw]
    if typed and any(type(x) in _WEAK for x in raw[plain:]):
        dtype = np.result_type(*[x.dtype if hasattr(x, "dtype") else x for x in raw[plain:]])
        raw = [dtype.type(x) if type(x) in _WEAK and i >= plain else x for i, x in enumerate(raw)]
    return raw


def wrap(out, weak: bool):
    """A result of NumPy as a model; weak: all operands were."""
    if isinstance(out, (list, tuple)):
        items = [wrap(x, weak) for x in out]
        return items if type(out) is list else tuple(items) if type(out) is tuple else type(out)(*items)
    if mode.wide or type(out) in _WEAK:
        return Model(out)
    if weak and not np.ndim(out):
        return Model(out.item())
    if isinstance(out, np.ndarray):
        out = out.astype(WEAK_ARRAY) if weak and out.dtype == np.float64 else out if out.ndim else out[()]
    if out.dtype.kind == "f":
        mode.eps = max(mode.eps, np.finfo(out.dtype).eps)
    return Model(out)


def compute(function, xs: list, call, typed=True, plain=0):
    """call(function, operands) on lifted operands, wrapped."""
    weak = not any(
        hasattr(x.raw, "dtype") if isinstance(x, Model) else isinstance(x, (np.ndarray, list, tuple)) for x in xs
    )
    if not any(isinstance(x, Model) for x in xs):
        return call(_alias(function), xs)  # of picograd's functions, too, results are plain where all operands are
    lifted = lift(xs, typed, plain)
    out = call(_alias(function), lifted)
    if weak and getattr(out, "dtype", None) in (
        np.float16,
        np.float32,
    ):  # of masks: weak numbers are in double precision
        out = call(_alias(function), [np.float64(x) for x in lifted])
    node = any(isinstance(x, Model) and x.node for x in xs)
    if isinstance(out, (bool, np.bool_)) and not node:
        raise NotImplementedError("a comparison of Tensors of no dimensions is NumPy's truth, no Tensor")
    out = wrap(out, weak)
    for part in out if isinstance(out, (list, tuple)) else (out,):
        if isinstance(part, Model):
            part.node = node
    return out


def deviation(function, a, *args, **kwargs):
    if getattr(a, "dtype", None) != np.float16:
        return function(a, *args, **kwargs)
    return function(a.astype(np.float32), *args, **kwargs).astype(np.float16)


def _alias(function):
    """autograd's twin of a function of NumPy's, in wide mode; var and std without NumPy's overflow of float16."""
    if mode.xp is np and function in (np.var, np.std):
        return functools.partial(deviation, function)
    if mode.xp is np or isinstance(function, str):
        return function
    name = getattr(function, "__name__", "")
    if name in TWINS:
        return TWINS[name]
    if not getattr(function, "__module__", "numpy").startswith("numpy"):
        return function
    home = anp.linalg if "linalg" in getattr(function, "__module__", "") else anp
    return getattr(home, function.__name__)


def _value_of(function):
    """A function without gradient, on the numbers in autograd's boxes."""
    return lambda x, *args: function(getattr(x, "_value", x), *args)


def _moved(function):
    """A function that moves elements of an array: it says where to, applied to their places."""

    def moved(x, *args, **kwargs):
        if kwargs.get("mode", "constant") == "constant" and function is np.pad:
            return anp.pad(x, *args, **kwargs)
        return anp.ravel(x)[function(np.arange(np.size(x)).reshape(np.shape(x)), *args, **kwargs)]

    return moved


# What autograd lacks, made of what it has.
TWINS = {
    "positive": lambda x: 1.0 * x,
    "copy": lambda x: 1.0 * x,
    "matrix_transpose": lambda x: anp.swapaxes(x, -1, -2),
    "flip": lambda x, axis=None: x[
        tuple(slice(None, None, -1 if axis in (None, i, i - x.ndim) else 1) for i in range(x.ndim))
    ],
    **{f.__name__: _moved(f) for f in (np.resize, np.delete, np.rollaxis, np.fft.fftshift, np.fft.ifftshift, np.pad)},
    "diagflat": lambda x, k=0: anp.diag(anp.ravel(x), k),
    "vdot": lambda x, y: anp.dot(anp.ravel(x), anp.ravel(y)),
    "outer": lambda x, y: anp.reshape(x, (-1, 1)) * anp.reshape(y, (1, -1)),
    "take": lambda x, i, axis=None: {None: anp.ravel(x), 0: x}[axis][i] if axis in (None, 0) else x[..., i],
    **{f.__name__: _value_of(f) for f in (np.signbit, np.isnan, np.isinf, np.isfinite, np.argsort)},
}
# Functions whose results are plain, whose results are constants, and how many first arguments are operands, where not
# all are; a function that is not named here has all its arrays and lists of arrays as operands.
PLAIN = {"isrealobj", "shape", "ndim", "size", "allclose", "array_equal", "array_equiv", "result_type", "iscomplexobj"}
LIKE = {"zeros_like", "ones_like", "full_like", "empty_like"}
FIRST_ONLY = {"take", "take_along_axis", "repeat", "tile", "pad", "roll", "broadcast_to", "reshape", "transpose", "sum"}
FIRST_ONLY |= {"resize", "delete", "diagflat", "rollaxis", "fftshift", "ifftshift", "trapezoid", "argpartition", "cov"}
FIRST_ONLY |= {f"{nan}{name}" for nan in ("", "nan") for name in ("quantile", "percentile", "median")}
FIRST_ONLY |= {"hsplit", "vsplit", "dsplit", "unstack", "trim_zeros", "partition", "vander", "polyder", "polyint"}
FIRST_ONLY |= {"gradient", "matrix_power"}
FIRST_ONLY |= {"array_split", "split", "moveaxis", "sliding_window_view", "squeeze", "expand_dims", "flip", "rot90"}


class Model(np.lib.mixins.NDArrayOperatorsMixin):
    """What a Value or Tensor is by the contract. raw: an array or scalar of NumPy; a weak number is one of Python's."""

    node = False  # whether it stands for a Value

    def __init__(self, raw):
        self.raw = raw

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return compute(ufunc, list(inputs), lambda f, xs: getattr(f, method)(*xs, **kwargs), typed=False)

    def __array_function__(self, function, kinds, args, kwargs):
        name = function.__name__
        if name in PLAIN or name in LIKE:
            args, kwargs = plain(args), plain(kwargs)
            out = function(*args, **kwargs)
            return float(out) if name in LIKE and type(args[0]) is float and not kwargs else out
        operands: list = []

        def hole(x, number=name in NUMBERS):
            """Takes an operand out of the arguments, leaving its place."""
            if isinstance(x, (list, tuple)) and any(isinstance(y, (Model, np.ndarray)) for y in x):
                return [hole(y, True) for y in x]
            if isinstance(x, list) and (name in NUMBERS or np.asarray(x).dtype.kind == "f"):
                x = np.asarray(x)
            if isinstance(x, (Model, np.ndarray)) or (number and isinstance(x, (float, int, np.generic))):
                operands.append(x)
                return Hole(len(operands) - 1)
            return x

        first = 1 if name in FIRST_ONLY else len(args)
        args = [hole(x) for x in args[:first]] + [plain(x) for x in args[first:]]
        inert = ("axis", "ddof", "keepdims", "where", "initial", "dtype")
        kwargs = {
            k: plain(x) if name in FIRST_ONLY or k in inert else hole(x, k in ("prepend", "append"))
            for k, x in kwargs.items()
        }

        def call(f, xs):
            def fill(x):
                return xs[x] if type(x) is Hole else [fill(y) for y in x] if type(x) is list else x

            return f(*map(fill, args), **{k: fill(x) for k, x in kwargs.items()})

        out = compute(function, operands, call, plain=int(name in ("where", "bincount", "choose")))
        if name not in ENDS or not any(isinstance(x, Model) for x in operands):
            return out
        return tuple(map(_detach, out)) if isinstance(out, tuple) else _detach(out)

    def __getitem__(self, index):
        return compute(
            operator.getitem, [self], lambda f, xs: f(np.asarray(xs[0]) if mode.xp is np else xs[0], plain(index))
        )

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        function = METHODS.get(name) or getattr(np, name, None) or OWN[name]
        return functools.partial(function, self)

    def __len__(self):
        return len(self.raw)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self.raw)

    def __float__(self):
        return float(self.raw)

    shape = property(lambda self: np.shape(self.raw))
    ndim = property(lambda self: np.ndim(self.raw))
    size = property(lambda self: np.size(self.raw))
    dtype = property(lambda self: self.raw.dtype if hasattr(self.raw, "dtype") else np.dtype(_WEAK[type(self.raw)]))
    T = property(lambda self: np.transpose(self))
    mT = property(lambda self: np.swapaxes(self, -1, -2))
    at = property(lambda self: At(self))


class At:
    """`x.at`: each element of the result is made of it and of those that come to its place, padded to be as many."""

    PADS = {"set": 0.0, "add": 0.0, "multiply": 1.0, "min": np.inf, "max": -np.inf}

    def __init__(self, x):
        self.x = x

    def __getitem__(self, index):
        return types.SimpleNamespace(**{how: functools.partial(self.updated, plain(index), how) for how in self.PADS})

    def updated(self, index, how, new):
        def call(f, xs):
            (a, y), xp = xs, mode.xp
            numbers = np.arange(np.size(a)).reshape(np.shape(a))
            places = numbers[index]
            np.broadcast_to(np.empty(np.shape(y)), np.shape(places))  # or it is an error
            if not mode.wide and hasattr(y, "astype") and np.asarray(a).dtype.kind == "f":
                y = y.astype(np.asarray(a).dtype)
            y = xp.ravel(y * np.ones(np.shape(places), getattr(y, "dtype", None)))
            pad = xp.array([self.PADS[how]]) if xp is anp else np.array([self.PADS[how]]).astype(y.dtype)
            rows = [[i, *np.flatnonzero(places.ravel() == i) + numbers.size] for i in range(numbers.size)]
            rows = [row[-1:] for row in rows] if how == "set" else rows
            most = max(map(len, rows), default=1)
            table = [row + [numbers.size + places.size] * (most - len(row)) for row in rows]
            parts = xp.concatenate([xp.ravel(a), y, pad])[np.array(table, int).reshape(-1, most)]
            if how in ("min", "max"):
                out = getattr(xp, how)(parts, axis=1)
            else:
                step = operator.mul if how == "multiply" else operator.add
                out = functools.reduce(step, [parts[:, i] for i in range(most)])
            return xp.reshape(out, np.shape(a))

        return compute("at", [self.x, new], call)


# Through these no gradient flows, though what they give depends on the numbers.
ENDS = set("histogram histogram_bin_edges".split())


class Hole(int):
    """The place of an operand in a call."""


NUMBERS = set("where clip stack concatenate append isclose dot inner outer vdot kron hstack".split())
NUMBERS |= set("linspace logspace geomspace polyval".split())


def plain(x):
    """x without models."""
    if isinstance(x, Model):
        return x.raw
    if isinstance(x, (list, tuple)):
        return type(x)(map(plain, x))
    return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else x


def _as_type(x, dtype):
    if mode.wide and np.dtype(dtype).kind == "f":
        return Model(x.raw if x.dtype.kind == "f" else np.asarray(x.raw, np.float64)[()])
    return wrap(np.asarray(x.raw).astype(dtype)[()], False)


def _detach(x):
    raw = getattr(x.raw, "_value", x.raw)
    mode.turn += 1
    return Model(raw if mode.frozen is None else mode.frozen.setdefault(mode.turn, raw))


METHODS = {
    "reshape": lambda x, *shape: np.reshape(x, shape[0] if len(shape) == 1 else shape),
    "transpose": lambda x, *axes: np.transpose(x, (axes[0] if isinstance(axes[0], tuple) else axes) if axes else None),
    "flatten": np.ravel,
    "astype": _as_type,
    "item": lambda x: np.asarray(x.raw).item(),
    "tolist": lambda x: np.asarray(x.raw).tolist(),
    "detach": lambda x: _detach(x),
}


def _own(function):
    """A function of picograd's, as one step on lifted operands."""

    def call(*xs, **params):
        return compute(function, list(xs), lambda f, raw: f(mode.xp, *raw, **params))

    return call


def _logsumexp(xp, x, axis=None, keepdims=False):
    peak = xp.max(x, axis=axis, keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    out = xp.log(xp.sum(xp.exp(x - peak), axis=axis, keepdims=True)) + peak
    return out if keepdims else xp.sum(out, axis=axis)  # over axes of length 1


def _gelu(xp, x):
    return 0.5 * x * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _log_softmax(xp, x, axis=-1):
    shifted = x - xp.max(x, axis=axis, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


def _cross_entropy(logits, labels):
    labels = np.asarray(plain(labels)).astype(int)
    picked = OWN["log_softmax"](logits)[(np.arange(len(labels)), labels) if labels.ndim else labels]
    return -np.mean(picked)


OWN = {
    "relu": _own(
        lambda xp, x: xp.where(x > 0, x, xp.where(x <= 0, 0.0 * (x == 0), x)) if xp is anp else np.maximum(x, 0)
    ),
    "sigmoid": _own(lambda xp, x: 0.5 * (1.0 + xp.tanh(0.5 * x))),
    "softplus": _own(lambda xp, x: xp.logaddexp(x, 0.0)),
    "gelu": _own(_gelu),
    "logsumexp": _own(_logsumexp),
    "softmax": _own(lambda xp, x, axis=-1: xp.exp(_log_softmax(xp, x, axis))),
    "log_softmax": _own(_log_softmax),
    "scaled": _own(lambda xp, x, by: x * by),
    "horner": _own(lambda xp, x, terms: terms[0] + x * (terms[1] + x * terms[2])),
    "mse_loss": lambda x, y: np.mean(np.square(x - y)),
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy_with_logits": lambda x, y: np.mean(OWN["softplus"](x) - x * y),
    "hinge_loss": lambda x, y: np.mean(OWN["relu"](1.0 - x * y)),
    "optimize": lambda *roots: roots[0] if len(roots) == 1 else roots,
    "checkpoint": lambda f: f,
}


# ---------------------------------------------------------------------------------------------------------------------
# Running a program
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """The names after a program ran, its leaves, its Tensors, and what it raised."""

    def __init__(self, program, names: dict, leaf):
        self.leaves: list = []
        self.error = None
        self.failed = ""

        def value(data, dtype=None, label=""):
            self.leaves.append(leaf(len(self.leaves), data, dtype))
            return self.leaves[-1]

        self.names = names | {"Value": value, "np": np, "math": math, "copy": copy, "inf": np.inf, "nan": np.nan}
        for statement in program:
            try:
                exec(compiled(statement), self.names)
            except Exception as error:
                self.error, self.failed = error, statement
                return

    def root(self, program):
        return self.names[target(program[-1])]


@functools.lru_cache(4096)
def compiled(statement: str):
    return compile(statement, "<program>", "exec")


def target(statement: str) -> str:
    return re.match(r"\w+", statement)[0]


def model_raw(data, dtype=None):
    """What `Value(data, dtype)` or `Tensor(data, dtype)` holds."""
    if isinstance(data, Model):
        return data.raw if dtype is None else np.asarray(data.raw).astype(dtype)[()]
    if dtype is None and isinstance(data, (int, float, np.generic)):
        return float(data)
    return np.asarray(data).astype(dtype or np.float32)[()]


def run_model(program, leaves=None, wide=False, xp=np) -> Run:
    """The program on models; leaves: raw values instead of those that it names."""
    mode.eps, mode.turn = 0.0, 0

    def leaf(i, data, dtype):
        model = wrap(leaves[i] if leaves is not None else model_raw(data, dtype), False)
        model.node = True
        return model

    def tensor(data, dtype=None):
        raw = model_raw(data, dtype)
        floating = wide and getattr(raw, "dtype", np.dtype(bool)).kind == "f"
        return Model(raw.astype(np.float64) if floating else raw)

    own = types.SimpleNamespace(**OWN, **{name: _spare(name) for name in SPARE})
    names = {"picograd": own, "Tensor": tensor, "scaled": OWN["scaled"], "horner": OWN["horner"]}
    with computing(wide, xp):
        return Run(program, names, leaf)


SPARE: dict = {}  # public primitives that the table of references does not know: their own forward is the reference


def _spare(name):
    return _own(lambda xp, *xs, **params: SPARE[name].forward(*xs, **params))


def run_real(program, leaves=None, eager=False) -> Run:
    """The program on picograd; eager: `optimize` inside it does nothing; leaves: Values instead of those it names."""

    def leaf(i, data, dtype):
        return leaves[i] if leaves is not None else picograd.Value(data, dtype)

    def roots_of(*roots):  # of a leaf a node, as `optimize` gives one: copies of that, too, send gradients to the leaf
        return OWN["optimize"](*[x if x._prev else +x for x in roots])

    def tensor(data, dtype=None):
        tensors.append(picograd.Tensor(data, dtype))
        return tensors[-1]

    module, tensors = picograd, []
    if eager:
        module = types.SimpleNamespace(**vars(picograd) | {"optimize": roots_of})
    run = Run(program, {"picograd": module, "Tensor": tensor, "scaled": scaled(), "horner": horner()}, leaf)
    run.tensors = tensors
    return run


@functools.cache
def _prelude():
    names: dict = {}
    exec(PREAMBLE, names)
    return names


def scaled():
    return _prelude()["scaled"]


def horner():
    return _prelude()["horner"]


def public(x):
    """The NumPy array or number in anything that a program has names for."""
    if isinstance(x, Model):
        return np.asarray(x.raw)
    if isinstance(x, picograd.Value):
        x = x.data
    return np.asarray(x.data if isinstance(x, picograd.Tensor) else x)


def seed_of(shape):
    """The gradient that a backward starts from: ones would hide too much (softmax sums to 1)."""
    return np.cos(np.arange(math.prod(shape), dtype=np.float64)).reshape(shape) if shape else np.float64(1.0)


def differs(got, expected, eps: float, scale: float = 0.0, dtype=True) -> str | None:
    """How one array differs from another. scale: magnitude to which errors are relative, beside the arrays' own."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        return f"shape {got.shape} instead of {expected.shape}"
    if dtype and got.dtype != expected.dtype:
        return f"dtype {got.dtype} instead of {expected.dtype}"
    if got.dtype.kind not in "f" and expected.dtype.kind not in "f":
        return None if np.array_equal(got, expected) else f"{text(got)} instead of {text(expected)}"
    a, b = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    same = np.where(finite, True, (a == b) | (np.isnan(a) & np.isnan(b))) & (np.isfinite(a) == finite)
    size = max(scale, float(np.max(np.abs(b[finite]), initial=0.0)))
    with np.errstate(all="ignore"):
        near = np.abs(np.where(finite, a - b, 0.0)) <= 64 * eps * size + 1e-300
    return None if np.all(same & (near | ~finite)) else f"{text(got)} instead of {text(expected)}"


def text(x) -> str:
    return " ".join(repr(np.asarray(x).tolist()).split())[:150]


# ---------------------------------------------------------------------------------------------------------------------
# Writing programs
# ---------------------------------------------------------------------------------------------------------------------

FLOATS, WHOLE = ("float32", "float64", "float16"), ("int64", "int32", "uint8", "int8", "bool")
# Constants that stand in the text: numbers of Python and of NumPy, with those that passes look for.
NUMERALS = "2 0.5 -1.5 0 1 -1 3 0.0 -0.0 4 1.0 True False 0.25 2.0 300 1e-3".split()
NUMERALS += "np.float64(1.5) np.float32(0.5) np.float16(2) np.int64(2) np.bool_(True) np.uint8(3) [1.5] [2]".split()
AWKWARD = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-30, 1.0, 65000.0)
# Where a function is defined on a part of the numbers only: an operand that lies there.
DOMAIN = {"arcsin": "0.9 * np.tanh({})", "arccosh": "np.abs({}) + 1.25", "log1p": "np.abs({})"}
DOMAIN |= dict.fromkeys(["log", "log2", "log10", "sqrt", "cbrt", "reciprocal"], "np.abs({}) + 0.5")
DOMAIN |= dict.fromkeys(["arccos", "arctanh"], DOMAIN["arcsin"])
SECOND = {"divide": "np.abs({}) + 0.5"} | dict.fromkeys(["remainder", "fmod", "floor_divide"], "np.abs({}) + 1.5")
OPERATORS = "+ - * / ** // % @ < <= > >= == != & | ^".split()
OPERATOR_WEIGHTS = np.array([5, 4, 7, 4, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1, 0.5, 0.5, 0.5])
OPERATOR_WEIGHTS /= OPERATOR_WEIGHTS.sum()
SIZE_LIMIT = 200
FLAT = re.compile(
    r"//|(union|intersect|setdiff|setxor)1d|histogram|sign|floor|ceil|rint|trunc|round|detach|like|slogdet.*\[0\]|\.ndim|\.size|np\.size|equal"
)


REFUSED = re.compile("out of bounds|numpy boolean|negative integer power")


class Refused(Exception):
    """The program ends with what NumPy refuses."""


class Writer:
    """Writes a program: each statement is run on models at once, and stays if it is valid, small and tame."""

    def __init__(self, rng, wild: float = 0.12):
        self.rng, self.program, self.made, self.needs = rng, [], [], set()
        self.wild = rng.random() < wild
        self.wide_leaves = rng.random() < 0.3
        self.names = run_model([]).names
        n, m, k = (int(rng.integers(1, 5)) for _ in range(3))
        zero = (0, n) if rng.random() < 0.5 else (0,)
        self.shapes = [(), (), (n,), (n,), (m, n), (m, n), (k, m, n), (1, n), (m, 1), (n, n), (1,), (m,)]
        self.shapes += [zero] if rng.random() < 0.15 else []

    # --- choices ---

    def one(self, choices, p=None):
        return choices[int(self.rng.choice(len(choices), p=p))]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def whole(self, low: int, high: int) -> int:
        """A whole number, the bounds among them."""
        return int(self.rng.integers(low, high + 1))

    def raw(self, name: str):
        return plain(self.names[name])

    def shape(self, name: str) -> tuple:
        return np.shape(self.raw(name))

    def pick(self, test=lambda name: True) -> str | None:
        """The name of an operand, most often a recent one."""
        fit = [name for name in self.made if test(name)]
        if not fit:
            return None
        return fit[-1 - min(int(self.rng.exponential(2.5)), len(fit) - 1)]

    # --- statements ---

    def say(self, expression: str | None) -> str | None:
        """Adds `name = expression` if that works; the name."""
        if expression is None:
            return None
        name = f"x{len(self.made)}"
        line = f"{name} = {expression}"
        try:
            exec(compiled(line), self.names)
        except Exception as error:
            if REFUSED.search(str(error)) and self.chance(0.3):  # picograd has to refuse it, too
                self.program.append(line)
                raise Refused from None
            return None
        if not self.good(self.names[name]):
            return None
        self.program.append(line)
        self.made.append(name)
        used = re.findall(r"\bx\d+\b", expression)
        kind = np.asarray(self.raw(name)).dtype.kind
        if kind == "f" and ("Value(" in expression or self.needs.intersection(used)) and not FLAT.search(expression):
            self.needs.add(name)
        return name

    def good(self, value) -> bool:
        value = plain(value)
        if isinstance(value, (list, tuple)):
            return False
        array = np.asarray(value)
        if array.dtype.kind not in "fiub" or array.size > SIZE_LIMIT or array.ndim > 5:
            return False
        if array.dtype.kind == "f" and array.size and not self.wild:
            limit = 6e4 if array.dtype.itemsize == 2 else 1e4
            return bool(np.all(np.abs(array) < limit))
        return True

    # --- data ---

    def numbers(self, shape, dtype: str) -> str:
        """An array as text, now and then one that is not contiguous."""
        if 0 in shape:
            return f"np.zeros({shape}, np.{dtype})"
        if dtype == "bool":
            array = self.rng.random(shape) < 0.5
        elif dtype in WHOLE:
            array = self.rng.integers(0 if dtype == "uint8" else -3, 4, shape)
        else:
            array = np.round(self.rng.uniform(-2, 2, shape), 0 if self.chance(0.15) else 2)
            if dtype == "float16" and self.chance(0.15):  # where sums of a few overflow
                array = array * 1e4
            if self.wild and self.chance(0.5):
                awkward = self.rng.choice(AWKWARD, shape)
                array = np.where(self.rng.random(shape) < 0.3, awkward, array)
        array = np.asarray(array)
        layout = self.one(["{}"] * 6 + ["{}[::-1]", "{}[::2]", "{}.T"]) if array.ndim else "{}"
        if layout == "{}[::-1]":
            array = array[::-1]
        elif layout == "{}[::2]":
            array = np.repeat(array, 2, 0)[:-1]
        elif layout == "{}.T":
            array = array.T
        return layout.format(f"np.array({array.tolist()}, np.{dtype})")

    def number(self) -> str:
        awkward = self.wild and self.chance(0.3)
        return repr(float(self.rng.choice(AWKWARD))) if awkward else repr(round(float(self.rng.uniform(-2, 2)), 2))

    def floating(self) -> str:
        return self.one(FLOATS, [0.55, 0.35, 0.1])

    def leaf(self) -> str:
        shape = self.one(self.shapes)
        number = self.number()
        weak = f"Value({self.one([number, number, f'np.float32({number})', '1', 'True'], [0.4, 0.4, 0.1, 0.05, 0.05])})"
        data = self.numbers(shape, "float64")
        if self.chance(0.5):  # as people write it: without a dtype, so float32
            return weak if shape == () and self.chance(0.8) else f"Value({data})"
        return f"Value({data}, np.{'float64' if self.wide_leaves else self.floating()})"

    def tensor(self) -> str:
        shape, dtype = self.one(self.shapes), self.one(FLOATS + WHOLE)
        if shape == ():
            return f"Tensor({self.one([self.number(), '3', 'True'])})"
        return f"Tensor({self.numbers(shape, dtype)}, np.{dtype})"

    def array(self) -> str:
        return self.numbers(self.one(self.shapes), self.one(FLOATS + WHOLE))

    def beside(self, x: str) -> str:
        """An operand to stand beside x: a name, a numeral, or a new array that broadcasts with it."""
        shape = self.shape(x)
        kind = self.rng.random()
        if kind < 0.5:
            found = self.pick(lambda name: name != x and fits(shape, self.shape(name)))
            if found:
                return found
        if kind < 0.78 or len(shape) > 2:
            return self.one(NUMERALS)
        shape = self.one([shape, shape, shape[1:], shape[:-1] + (1,) if shape else ()])
        return self.numbers(shape, self.one(FLOATS + WHOLE))

    def axis(self, x: str, pair=True) -> int | tuple | None:
        n = len(self.shape(x))
        if not n or self.chance(0.25):
            return None
        if pair and n > 1 and self.chance(0.2):
            return tuple(int(i) for i in self.rng.permutation(n)[:2])
        return self.whole(-n, n - 1)

    def one_axis(self, x: str) -> int:
        n = len(self.shape(x))
        return self.whole(-n, n - 1) if n else 0

    def index(self, x: str) -> str:
        """The text between the brackets of x[...]: every form that there is."""
        parts = []
        shape = self.shape(x)
        for n in shape[: self.whole(0, len(shape))]:
            places = [self.whole(-n, n - 1) for _ in range(self.whole(1, 4))] if n else []
            forms = [":", "::-1", "1:", ":-1", "::2"] + (["None", "..."] if "..." not in parts else ["None"])
            if n:
                forms += [str(places[0])] * 2 + [f"np.array({places})"] * 3
                forms += [
                    f"{places}",
                    f"np.array({(self.rng.random(n) < 0.6).tolist()})",
                    f"Tensor({places}, np.int64)",
                ]
                forms += [f"np.array([{places}])"]
            form = self.one(forms)
            parts.append(form)
            if form == "...":
                break
            if form == "None":
                parts.append(":")
        if not parts:
            mask = self.pick(lambda name: self.shape(name) == shape and np.asarray(self.raw(name)).dtype == bool)
            return mask or self.one(["...", "None", "()"])
        return ", ".join(parts)


def fits(a: tuple, b: tuple) -> bool:
    try:
        return math.prod(np.broadcast_shapes(a, b)) <= SIZE_LIMIT
    except ValueError:
        return False


# --- the arguments of what is no element-wise function of its operands and no plain reduction. A maker gets the writer
# --- and the name of an operand, and gives the text of the arguments; None if the operand will not do.


def _reduction(w, x, takes=(), keep=True):
    axis = w.axis(x)
    args = x if axis is None and w.chance(0.6) else f"{x}, axis={axis}"
    args += ", keepdims=True" if keep and w.chance(0.25) else ""
    args += ", ddof=1" if "ddof" in takes and w.chance(0.2) else ""
    if "where" in takes and w.shape(x) and w.chance(0.2):
        args += f", where=np.arange({w.shape(x)[-1]}) % 3 != 1" + (", initial=0.5" if "initial" in takes else "")
    elif "initial" in takes and w.chance(0.1):
        args += ", initial=-0.5"
    return args


def _along(w, x):
    axis = w.axis(x, pair=False)
    return x if axis is None else f"{x}, axis={axis}"


def _joined(w, x, test=None):
    n = w.shape(x)
    items = [x] + [w.pick(lambda name: w.shape(name) == n) for _ in range(w.whole(1, 2))]
    if w.chance(0.2):
        items.append(w.numbers(n, w.one(FLOATS + WHOLE)))
    return f"[{', '.join(items)}]"


def _join_axis(w, x):
    return f"{_joined(w, x)}, axis={w.one_axis(x)}" if w.shape(x) else None


def _reshape(w, x):
    shape = w.shape(x)
    return f"{x}, {w.one([(-1,), shape[::-1], shape + (1,), (1,) + shape, (-1, 1), -1])}"


def _permutation(w, x):
    order = tuple(int(i) for i in w.rng.permutation(len(w.shape(x))))
    return x if w.chance(0.5) or not order else f"{x}, {order}"


def _positions(w, x, axis=None):
    n = math.prod(w.shape(x)) if axis is None else w.shape(x)[axis]
    return [w.whole(-n, n - 1) for _ in range(w.whole(1, 4))] if n else []


def _take(w, x):
    if not w.shape(x):
        return None
    axis = w.one([None, 0, -1])
    places = _positions(w, x, axis)
    return f"{x}, {w.one(['np.array(%s, int)', '%s'])}" % places + f", axis={axis}"


def _pair(w, x, text, ndim=1):
    """Arguments with a second operand of x's shape."""
    if len(w.shape(x)) < ndim:
        return None
    y = w.pick(lambda name: w.shape(name) == w.shape(x)) if w.chance(0.7) else w.numbers(w.shape(x), w.floating())
    return text.format(x=x, y=y)


def _einsum(w, x):
    forms = {0: ["',->'"], 1: ["'i,i->'", "'i,j->ij'", "'i,i'"], 2: ["'ij,kj->ik'", "'ij,ij->'", "'ij,ij->j'"]}
    single = {1: ["'i->'"], 2: ["'ij->ji'", "'ij->'", "'ii->i'", "'ij->j'"], 3: ["'ijk->kj'", "'i...->...'"]}
    n = len(w.shape(x))
    if n in single and w.chance(0.4):
        return f"{w.one(single[n])}, {x}"
    return _pair(w, x, w.one(forms.get(n, ["'...i,...i->...'"])) + ", {x}, {y}", 0)


def _matrix(w, x):
    """A definite matrix made of x."""
    n = w.shape(x)
    return f"np.matmul({x}, np.swapaxes({x}, -1, -2)) + 3.0 * np.eye({n[-2]})" if len(n) > 1 and 0 not in n else None


def _solve(w, x):
    a = _matrix(w, x)
    return a and f"{a}, {w.one([x, w.numbers((w.shape(x)[-2],), w.floating())])}"


def _norm(w, x):
    n = len(w.shape(x))
    if n == 1 and w.chance(0.5):
        return f"{x}, {w.one([1, 2, 'inf', '-inf'])}"
    return f"{x}, axis={w.one_axis(x)}" if n and w.chance(0.5) else x


def _quantile(*texts):
    """Of finite floating numbers: NumPy makes nan beside infinity."""
    return lambda w, x: (
        _texts(len(texts) - 1, *texts)(w, x)
        if np.asarray(w.raw(x)).dtype.kind == "f" and np.isfinite(w.raw(x)).all()
        else None
    )


def _split(w, x):
    return f"{x}, {w.one([1, w.shape(x)[0] or 1, [1]])})[{w.one([0, -1])}" if w.shape(x) else None


MODES = ("full", "same", "valid")


def _choice(w, choices=(0, 1)):
    return [w.one(choices) for _ in range(w.one([1, 1, *[shape[0] for shape in w.shapes if shape]]))]


def _need(ndim, text):
    """Arguments for operands of at least ndim dimensions."""
    return lambda w, x: w.one(text)(w, x) if len(w.shape(x)) >= ndim else None


def _texts(ndim, *texts):
    return lambda w, x: w.one(texts).format(x=x, axis=w.one_axis(x)) if len(w.shape(x)) >= ndim else None


ARGUMENTS = {
    "clip": _texts(
        0, "{x}, -0.75, 0.75", "{x}, None, 1", "{x}, -1, None", "{x}, 0.0, {x} + 1.0", "{x}, np.float64(-1), 1"
    ),
    "where": lambda w, x: w.one(
        [
            f"{x} > {w.one(NUMERALS[:6])}, {x}, {w.beside(x)}",
            f"{w.beside(x)}, {x}, {w.beside(x)}",
            f"{x}, 1.0, {w.beside(x)}",
        ]
    ),
    "round": _texts(0, "{x}", "{x}, 1"),
    "average": lambda w, x: w.one([x, _pair(w, x, "{x}, axis=-1, weights=np.abs({y}) + 0.5"), f"{x}, {w.axis(x)}"]),
    "reshape": _reshape,
    "ravel": _texts(0, "{x}"),
    "transpose": _permutation,
    "broadcast_to": lambda w, x: f"{x}, {w.one([(2,), (1,), ()]) + w.shape(x)}",
    "copy": _texts(0, "{x}"),
    "expand_dims": _texts(0, "{x}, 0", "{x}, -1", "{x}, (0, 2)"),
    "squeeze": _texts(0, "{x}"),
    "moveaxis": _texts(1, "{x}, {axis}, 0", "{x}, 0, -1"),
    "swapaxes": _texts(1, "{x}, 0, -1", "{x}, {axis}, 0"),
    **dict.fromkeys(["matrix_transpose", "triu", "tril"], _texts(2, "{x}")),
    **dict.fromkeys(["atleast_1d", "atleast_2d", "atleast_3d"], _texts(0, "{x}")),
    "concatenate": _join_axis,
    "stack": lambda w, x: f"{_joined(w, x)}" + w.one(["", ", axis=-1"]),
    "block": lambda w, x: _joined(w, x),
    **dict.fromkeys(["vstack", "hstack", "dstack", "column_stack"], _joined),
    "append": lambda w, x: w.one([f"{x}, {w.beside(x)}", _pair(w, x, "{x}, {y}, axis=0")]),
    "split": _split,
    "array_split": _split,
    "take": _take,
    "take_along_axis": _texts(1, "{x}, np.argsort({x}, {axis}), {axis}"),
    "sort": lambda w, x: f"{x}, {w.one([None, w.one_axis(x)])}" if w.shape(x) else None,
    "argsort": lambda w, x: f"{x}, {w.one_axis(x)}" if w.shape(x) else None,
    **dict.fromkeys("argmax argmin cumsum cumprod nancumsum nancumprod nanargmax nanargmin".split(), _along),
    **dict.fromkeys(["cumulative_sum", "cumulative_prod"], _texts(1, "{x}, axis={axis}, include_initial=True")),
    "reduce": _texts(0, "{x}", "{x}, axis=None"),
    "accumulate": _texts(1, "{x}", "{x}, {axis}"),
    **dict.fromkeys(
        ["quantile", "nanquantile"], _quantile("{x}, 0.3", "{x}, [0.25, 1.0], axis={axis}, method='lower'")
    ),
    **dict.fromkeys(["percentile", "nanpercentile"], _quantile("{x}, 40", "{x}, 75, axis={axis}, keepdims=True")),
    **dict.fromkeys(["median", "nanmedian"], _reduction),
    **dict.fromkeys(["modf", "frexp"], lambda w, x: f"{x})[{w.whole(0, 1)}"),
    "divmod": lambda w, x: f"{x}, {w.beside(x)})[{w.whole(0, 1)}",
    "ldexp": _texts(0, "{x}, 2", "{x}, -1"),
    "float_power": lambda w, x: f"np.abs({x}) + 0.5, {w.beside(x)}",
    **dict.fromkeys("unique argwhere flatnonzero".split(), _texts(0, "{x}")),
    "nonzero": _texts(1, "{x})[0", "{x})[-1"),
    "argpartition": _texts(1, "{x}, 0, {axis}"),
    "lexsort": _texts(1, "({x}, -{x}), {axis}"),
    "searchsorted": lambda w, x: f"np.sort({x}), [0.5, -0.5]" if len(w.shape(x)) == 1 else None,
    "digitize": _texts(0, "{x}, [-1.0, 0.0, 1.0]"),
    **dict.fromkeys(
        "isin union1d intersect1d setdiff1d setxor1d".split(),
        lambda w, x: f"{x}, {w.numbers((3,), w.floating())}" if np.asarray(w.raw(x)).dtype.kind == "f" else None,
    ),
    "bincount": lambda w, x: (
        f"{w.rng.integers(0, 4, w.shape(x)).tolist()}, {x}" if len(w.shape(x)) == 1 and w.shape(x)[0] else None
    ),
    "histogram": _texts(0, "{x})[0", "{x}, 3)[1", "{x}, [-1.0, 0.5, 1.0])[0"),
    "histogram_bin_edges": _texts(0, "{x}, 4"),
    "matrix_rank": _texts(2, "{x}"),
    "unwrap": _texts(1, "{x}"),
    "trapezoid": _texts(1, "{x}", "{x}, axis={axis}", "{x}, dx=0.5"),
    "cov": _texts(1, "{x}", "{x}, bias=True", "{x}, rowvar=False"),
    "corrcoef": _texts(1, "{x}"),
    **dict.fromkeys(["isrealobj"], _texts(0, "{x}")),
    **dict.fromkeys(["softmax", "log_softmax"], lambda w, x: f"{x}, axis={w.one_axis(x)}" if w.shape(x) else None),
    "repeat": _texts(0, "{x}, 2", "{x}, 2, axis={axis}"),
    "tile": _texts(0, "{x}, 2", "{x}, (2, 1)"),
    "pad": _texts(
        1,
        *["{x}, 1", "{x}, (1, 0), constant_values=2.0", "{x}, 0", "{x}, (2, 1), mode='edge'"],
        *["{x}, 1, mode='reflect'", "{x}, (1, 2), mode='symmetric'", "{x}, (0, 3), mode='wrap'"],
    ),
    "resize": _texts(0, "{x}, 3", "{x}, (2, 3)"),
    "delete": _texts(1, "{x}, 0, axis={axis}", "{x}, [0, -1]", "{x}, slice(1, None)"),
    "diagflat": _texts(0, "{x}", "{x}, 1"),
    "rollaxis": _texts(1, "{x}, {axis}", "{x}, -1, 1"),
    **dict.fromkeys(["fftshift", "ifftshift"], _texts(1, "{x}", "{x}, {axis}")),
    "flip": _texts(0, "{x}", "{x}, {axis}"),
    "fliplr": _texts(2, "{x}"),
    "flipud": _texts(1, "{x}"),
    "roll": _texts(1, "{x}, 1", "{x}, -1, axis={axis}", "{x}, (1, 2), axis=(0, -1)"),
    "rot90": _texts(2, "{x}", "{x}, -1", "{x}, 2"),
    "sliding_window_view": lambda w, x: (
        f"{x}, {min(2, w.shape(x)[-1])}, axis=-1" if w.shape(x) and w.shape(x)[-1] else None
    ),
    "diff": _texts(1, "{x}, axis={axis}", "{x}, prepend=0.5", "{x}, 2", "{x}, append=1"),
    **dict.fromkeys(["diagonal", "trace"], _texts(2, "{x}", "{x}, 1", "{x}, 0, -1, 0")),
    "diag": lambda w, x: w.one([x, f"{x}, 1", f"{x}, -1"]) if 1 <= len(w.shape(x)) <= 2 else None,
    "matmul": lambda w, x: (
        _pair(w, x, w.one(["{x}, np.swapaxes({y}, -1, -2)", "{x}, {y}[0]"]), 2) or _pair(w, x, "{x}, {y}")
    ),
    "dot": lambda w, x: _pair(w, x, "{x}, np.transpose({y})", 0) if w.chance(0.7) else f"{x}, {w.one(NUMERALS)}",
    **dict.fromkeys(["inner", "vdot"], lambda w, x: _pair(w, x, "{x}, {y}", 0)),
    "outer": lambda w, x: _pair(w, x, "{x}, {y}", 0) if len(w.shape(x)) < 2 else None,
    "tensordot": lambda w, x: _pair(
        w, x, w.one(["{x}, np.transpose({y}), 1", "{x}, {y}, ((0,), (0,))", "{x}, {y}, 0"])
    ),
    "kron": lambda w, x: _pair(w, x, "{x}, {y}", 0),
    "einsum": _einsum,
    **dict.fromkeys(["inv", "det", "cholesky"], _matrix),
    "slogdet": lambda w, x: (a := _matrix(w, x)) and f"{a})[{w.whole(0, 1)}",
    "solve": _solve,
    "norm": _norm,
    "hsplit": _texts(1, "{x}, 1)[0", "{x}, [1])[-1"),
    "vsplit": _texts(2, "{x}, 1)[0", "{x}, [1])[-1"),
    "dsplit": _texts(3, "{x}, 1)[0", "{x}, [1])[-1"),
    "unstack": _texts(1, "{x})[0", "{x}, axis={axis})[-1"),
    "trim_zeros": _texts(0, "np.append(0.0, np.square({x}) + 0.5)", "np.append(np.abs({x}) + 1, 0), 'b'"),
    "broadcast_arrays": _texts(0, "{x}, np.zeros((2, 1, 1)))[0"),
    "meshgrid": _texts(1, "{x}, {x})[0", "{x}, {x}, indexing='ij')[1", "{x}, {x}, sparse=True)[0"),
    "partition": _texts(1, "{x}, 0, {axis}", "{x}, -1", "{x}, [0, -1], None"),
    "compress": _texts(1, "[True], {x}, {axis}", "[False, True], {x}"),
    "extract": _texts(1, "{x} > 0, {x}"),
    "choose": lambda w, x: f"np.array({_choice(w)}), [{x}, {w.beside(x)}], mode='wrap'",
    "select": lambda w, x: f"[[False], {_choice(w, [True, False])}], [1.0, {x}], {w.one(['0', '0.5'])}",
    "piecewise": _texts(1, "{x}, [{x} > 0], [np.sin, 0.5]", "{x}, [{x} < 0, {x} > 0.5], [np.square, np.negative]"),
    "insert": _texts(1, "{x}, 0, 2.0", "{x}, [0, -1], np.ravel({x})[:1]", "{x}, 1, {x}[0], axis=0"),
    "ediff1d": _texts(0, "{x}", "{x}, {x}"),
    "apply_along_axis": _texts(1, "np.sum, {axis}, {x}", "np.cumsum, {axis}, {x}"),
    "apply_over_axes": _texts(2, "np.sum, {x}, {axis}", "np.sum, {x}, (0, -1)"),
    "linspace": _texts(0, "{x}, 2.0, num=3", "0.0, {x}, num=4, endpoint=False", "{x}, {x} * 2, num=1, axis=-1"),
    "logspace": _texts(0, "np.tanh({x}), 1.0, num=3", "0.5, np.tanh({x}), num=2"),
    "geomspace": _texts(0, "np.abs({x}) + 0.5, 2.0, num=3"),
    "cross": _texts(1, "np.resize({x}, 3), np.resize({x}, (2, 3)) + 1.0"),
    **dict.fromkeys(["convolve", "correlate"], _texts(1, *[f"np.ravel({{x}}), [1.0, -0.5], {m!r}" for m in MODES])),
    "interp": _texts(1, "{x}, [-1.0, 0.25, 2.0], [0.5, -1.0, 3.0]", "[0.25], [0.0, 0.5, 2.0], np.resize({x}, 3), 1.0"),
    "gradient": _texts(1, "{x}, axis={axis}", "{x}, 0.5, axis=0, edge_order=2"),
    "vander": _texts(1, "np.ravel({x}), 3", "np.ravel({x}), 2, True"),
    "polyval": _texts(1, "[1.0, 0.5, -2.0], {x}", "np.ravel({x})[:3], 0.5"),
    **dict.fromkeys(
        ["polyadd", "polysub", "polymul"], _texts(1, "np.append(1.5, {x}), [1.0, 2.0]", "[2.0], np.append(1.5, {x})")
    ),
    **dict.fromkeys(["polyder", "polyint"], _texts(1, "np.ravel({x})", "np.ravel({x}), 2")),
    "polyfit": _texts(1, "np.linspace(-1.0, 1.0, 6), np.resize(np.append([0.5, -1.0, 2.0], {x}), 6), 2"),
    **dict.fromkeys(["eigvalsh", "svdvals", "pinv", "cond"], lambda w, x: _matrix(w, x)),
    **dict.fromkeys(["eigh", "qr", "svd"], lambda w, x: (a := _matrix(w, x)) and f"{a})[{w.whole(0, 1)}"),
    "lstsq": lambda w, x: (a := _matrix(w, x)) and f"{a}, {x})[0",
    "matrix_power": lambda w, x: (a := _matrix(w, x)) and f"{a}, {w.one([-1, 0, 1, 2, 3])}",
    "multi_dot": _texts(2, "[{x}, np.transpose({x}), {x}]", "[np.transpose({x}), {x}[:, 0]]"),
    "tensorsolve": lambda w, x: (a := _matrix(w, x)) and f"{a}, {x}[:, 0]",
    "tensorinv": lambda w, x: (a := _matrix(w, x)) and f"{a}, ind=1",
    "vector_norm": _texts(0, "{x}", "{x}, ord=3", "{x}, ord=1, axis={axis}", "{x}, ord=np.inf, keepdims=True"),
    "matrix_norm": _texts(2, "{x}", "{x}, ord=1", "{x}, ord=-np.inf, keepdims=True", "{x}, ord='nuc'"),
    "vecdot": lambda w, x: _pair(w, x, "{x}, {y}"),
    "matvec": _texts(2, "{x}, {x}[..., 0, :]"),
    "vecmat": _texts(2, "{x}[..., 0], {x}"),
    "astype": _texts(1, "{x}, np.float64"),
    "flatnonzero": _texts(0, "{x}"),
    **dict.fromkeys(["allclose", "array_equal", "array_equiv"], lambda w, x: _pair(w, x, "{x}, {y}", 0)),
    **dict.fromkeys(["shape"], lambda w, x: f"{x})[0" if w.shape(x) else None),
    **dict.fromkeys(["ndim", "size", "iscomplexobj", "zeros_like", "ones_like", "nan_to_num"], _texts(0, "{x}")),
    "full_like": _texts(0, "{x}, 0.5"),
    "empty_like": lambda w, x: f"{x}).shape and np.zeros_like({x}",
    "result_type": lambda w, x: f"{x}).kind in 'fiub' and np.size({x}",
    "scaled": lambda w, x: f"{x}, by={w.numbers(w.shape(x), 'float64')}",
    "horner": lambda w, x: f"{x}, terms={w.one(['[1.0, 0.5, -0.25]', 'np.array([1.0, 0.5, -0.25])'])}",
}
# Primitives that have no name to call: they are reached through others, or through syntax.
REACHED = {
    "reshape",
    "concatenate",
    "stack",
    "getitem",
    "scatter",
    "astype",
    "einsum",
    "norm",
    "clip",
    "matmul",
    "sum",
    "max",
    "min",
}
REACHED |= {"sliding_window_view", "logabsdet", "signdet", "detach", "dot", "pack", "fused", "program", "mean"}
REACHED |= {"join", "result", "rule", "sealed", "checkpoint", "update", "is last"}
REACHED |= {"modf 0", "modf 1", "frexp 0", "frexp 1", "unique", "bincount", "lexsort"}
REACHED |= {"ranks of quantiles", "maximum.accumulate", "minimum.accumulate", "logaddexp.accumulate"}
REACHED |= {"eigh", "eigh of upper", "svd", "qr", "diff", "blended slopes", "even slopes"}
REACHED |= {f"places of {name}" for name in ("union1d", "intersect1d", "setdiff1d", "setxor1d")}
REACHED |= {
    "weights of logsumexp",
    "matrix of cofactors",
    "dense layer",
    "var",
    "std",
    "power",
    "pad",
    "solve",
    "nan_to_num",
    "mse",
    "cross entropy",
    "less labels",
    "at least",
    "at most",
    "diagonals",
    "label mask",
    "sigmoid entropy",
}


def spelling(function, entry) -> str | None:
    """How to call an entry of the table in a program."""
    ufunc = getattr(function, "__self__", None)
    if isinstance(ufunc, np.ufunc):
        return f"np.{ufunc.__name__}.{function.__name__}"
    for home, where in (
        (np, "np"),
        (np.linalg, "np.linalg"),
        (np.fft, "np.fft"),
        (np.lib.stride_tricks, "np.lib.stride_tricks"),
    ):
        if getattr(home, function.__name__, None) is function:
            return f"{where}.{function.__name__}"
    name = getattr(entry, "name", "")
    return f"picograd.{name}" if getattr(picograd, name, None) is entry else None


def arity(function, entry) -> int:
    """How many operands an element-wise entry has; 0 if it is none."""
    if isinstance(function, np.ufunc):
        return function.nin if function.signature is None else 0
    return len(entry.operands) if getattr(entry, "elementwise", False) and entry.operands else 0


def entries() -> tuple[dict, list]:
    """What programs call, as {spelling: maker of arguments}; and the names of entries without a maker."""
    found, missing = {}, []
    for function, entry in list(picograd.TABLE.items()):
        if isinstance(function, picograd.Primitive):  # with keywords of its own
            continue
        spelled, name = spelling(function, entry), getattr(entry, "name", getattr(function, "__name__", ""))
        short = spelled.rpartition(".")[2] if spelled else name
        n = arity(function, entry)
        maker = ARGUMENTS.get(short) or ARGUMENTS.get(name)
        if not maker and n:
            maker = functools.partial(_elementwise, short, n)
        elif not maker and "axis" in _parameters(function, entry):
            maker = functools.partial(_reduction, takes=_parameters(function, entry))
        if spelled and maker:
            found[spelled] = maker
            if spelled.startswith("picograd.") and short not in OWN:
                SPARE[short] = entry
        elif name not in REACHED:
            missing.append(name)
    return found, missing


def _parameters(function, entry) -> tuple:
    params = getattr(entry, "params", ())
    try:
        return (*params, *inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return tuple(params)


def _elementwise(name, n, w, x):
    operands = [DOMAIN.get(name, "{}").format(x) if not w.wild else x] + [w.beside(x) for _ in range(n - 1)]
    if n == 2 and name in SECOND and not w.wild:
        operands[1] = SECOND[name].format(operands[1])
    if n == 2 and w.chance(0.3):
        operands.reverse()
    return ", ".join(operands)


def call(w, x) -> str | None:
    """A call of an entry of the table, as a function or as a method."""
    spelled = w.one(w.calls)
    if spelled.startswith(("picograd.", "np.logaddexp.reduce")) and np.asarray(w.raw(x)).dtype.kind != "f":
        return None  # what these make of integers is left open
    args = ENTRIES[spelled](w, x)
    if args is None:
        return None
    name = spelled.rpartition(".")[2]
    method = (
        args.startswith(f"{x}, ") and hasattr(np.ndarray, name) and name not in ("sort", "resize", "partition")
    )  # in place
    if method and w.chance(0.3) and isinstance(w.names[x], Model):
        return f"{x}.{name}({args[len(x) + 2 :]})"
    return f"{spelled}({args}" + ("]" if args.count("[") > args.count("]") else ")")


def forms(text: str) -> list[str]:
    """The lines of a table of forms."""
    return [line.strip() for line in text.strip().splitlines()]


POWERS = forms("""
    {x} ** 2
    {x} ** 3
    {x} ** 2.0
    {x} ** 1
    {x} ** 0
    {x} ** -1
    {x} ** True
    (np.abs({x}) + 0.5) ** 0.5
    (np.abs({x}) + 0.5) ** 1.5
    (np.abs({x}) + 0.5) ** -0.5
    (np.abs({x}) + 0.5) ** -2
    {x} ** 4
    (np.abs({x}) + 0.5) ** {y}
    (np.abs({x}) + 0.5) ** {y}
    2 ** {x}
    0.5 ** {x}
    np.float64(1.5) ** {x}
""")
UNARY = forms("""
    -{x}
    abs({x})
    +{x}
    ~({x} > 0)
    - -{x}
    {x}.T
    {x}.flatten()
    {x}.detach()
    np.copy({x})
    np.reshape({x}, (-1,)).reshape({x}.shape)
    np.transpose(np.transpose({x}))
""")
MASKS = forms("""
    ({x} > 0) * {x}
    ({x} > 0) * {y}
    np.sum({x} > {y})
    ({x} > 0) + ({y} > 0)
    np.where({x} > 0, {y}, 2 * {y})
    np.where({x}, {y}, {x})
    -(({x} > 0) * 2)
    -{y} * {x}
    ({x} > 0) ** 2
    np.square({x} > 0)
    np.sum(({x} > 0) * ({y} > 0))
    np.prod({x} > 0) * {x}
    sum([{x} > 0, {y} > 0, {x} > {y}]) * {x}
    ({x} > 0) * np.array([3], np.uint8)
    -(({x} > 0) * np.array([3], np.uint8)) * {x}
""")
# Chains, in which {} is what went before.
LINKS = forms("""
    np.tanh({})
    -{}
    {} + 0
    {} * 1
    {} / 4
    np.sqrt(np.abs({}) + 0.5)
    {}.T
    np.square({})
    {} * 0.5
    np.reshape({}, (-1,))
    np.mean({}, axis=-1)
    ({} - 1)
    0.0 + {}
    {} + 0.0
    1 * {}
    np.arctan2({} + 0, -1.0)
""")
BATCHES = forms("""
    ({a}) * ({b})
    ({a} + ({b}))
    np.tanh({a} * ({b}))
    (({a}) > 0) * ({b})
    ({a}) - ({b})
    np.maximum({a}, {b})
    np.tanh({a}) @ ({b})
    ({b}) @ np.tanh({a})
    np.tanh({a}) * 2
    ({a} > 0) * 0.5
    ({a}) > ({b})
""")
GATHERED = forms("""
    sum([{items}])
    sum([{items}], 0.5)
    np.stack([{items}])
    np.sum(np.stack([{items}]), axis=0)
""")
EACH = forms("""
    np.tanh(e)
    e * e
    e * 0.5 + 1
    (e > 0) * e
    abs(e)
    e ** 2
    e[..., None]
    np.sum(e * e)
    e * w
    (e > 0) * w
    (w > 0) * e
    np.where(e > 0, w, e)
    np.tanh(e + w) * w
""")
# The last two overflow if they are associated the other way, in float32 and in float64.
PRODUCTS = forms("""
    np.sum({x} * {y})
    np.sum({x} * {y}, axis=-1)
    {z} * ({y} * {x})
    np.mean({x} * {y})
    ({x} / 4) * {z}
    np.sum({x} * {y}) + np.sum({x})
    ({x} + {y}) + {z}
    np.log(Value(1e20) * (1e20 * np.exp({x} - 46.0)))
    np.log(Value(1e200) * (1e200 * np.exp({x} - 460.0)))
""")
PLACES = forms("""
    {x}[np.array({p})]
    {x}[[{p[0]}]]
    np.stack([{x}[i] for i in {p}])
    sum([{x}[i] * 2 for i in {p}])
""")
PLACES_3D = forms("""
    {x}[0, :, np.array({q})]
    sum([{x}[i][..., np.array({q})] for i in {p}])
    np.stack([{x}[i, :, np.array({q})] * 2 for i in {p}])
""")
CHECKPOINTS = forms("""
    picograd.checkpoint(lambda e: np.tanh(e) * e)({x})
    picograd.checkpoint(lambda e: np.tanh(e * {y}) + e)({x})
    picograd.checkpoint(lambda e: e.T * 2)({x})
    picograd.checkpoint(lambda e: [np.sum(e * e), e * {y}])({x})[1]
    sum(picograd.checkpoint(lambda e: (np.sum(e * 2), np.mean(e)))({x}))
    picograd.checkpoint(lambda e: picograd.checkpoint(np.tanh)(e * 2) * {y})({x})
""")
SECOND_OPERATORS = {"/": 0.5, "//": 1.5, "%": 1.5}
LOWEST_LABEL = {"mse_loss": -2, "hinge_loss": -1, "binary_cross_entropy_with_logits": 0}


def operation(w, x) -> str:
    """Python's operators."""
    sign = w.one(OPERATORS, OPERATOR_WEIGHTS)
    y = w.beside(x)
    if sign in SECOND_OPERATORS and not w.wild:
        y = f"(np.abs({y}) + {SECOND_OPERATORS[sign]})"
    if sign == "**":
        return w.one(POWERS).format(x=x, y=y)
    if sign == "@":
        return _pair(w, x, "{x} @ {y}" if len(w.shape(x)) == 1 else "{x} @ np.swapaxes({y}, -1, -2)")
    return f"({y}) {sign} {x}" if w.chance(0.3) else f"{x} {sign} {y}"


def filled(table):
    """A maker that takes a form out of a table: x an operand, y and z others beside it."""
    return lambda w, x: w.one(table).format(x=x, y=f"({w.beside(x)})", z=f"({w.beside(x)})")


mask, product = filled(MASKS), filled(PRODUCTS)


def unary(w, x) -> str | None:
    form = w.one(UNARY)
    if "detach" in form and isinstance(w.raw(x), (bool, np.bool_)):  # a comparison of 0-d Tensors gives NumPy's truth
        return None
    return form.format(x=x)


def indexing(w, x) -> str:
    return f"{x}[{w.index(x)}]"


def updating(w, x) -> str | None:
    how, index = w.one(list(At.PADS)), w.index(x)
    if np.asarray(w.raw(x)).dtype.kind != "f" or (how == "multiply" and re.search("array|Tensor|\\[", index)):
        return None  # what integers take is left open, and repeated products have no gradient
    return f"{x}.at[{index}].{how}({w.one([w.number(), w.number(), f'{x}[{index}] * 0.5', w.beside(x)])})"


def checkpointed(w, x) -> str | None:
    return filled(CHECKPOINTS)(w, x) if x in w.needs and isinstance(w.names[x], Model) else None


def cast(w, x) -> str:
    return f"{x}.astype(np.{w.floating()})"


def user(w, x) -> str:
    name = w.one(["scaled", "horner"])
    return f"{name}({ARGUMENTS[name](w, x)})"


def loss(w, x) -> str | None:
    name, shape = w.one([*LOWEST_LABEL, "cross_entropy"]), w.shape(x)
    if name in LOWEST_LABEL:
        low = LOWEST_LABEL[name]
        labels = (w.rng.integers(0, 2, shape) * (1 - low) + low).tolist()
        return f"picograd.nn.{name}({x}, {w.one(['np.array', 'Tensor'])}({labels}))"
    if len(shape) not in (1, 2) or 0 in shape:
        return None
    return f"picograd.nn.{name}({x}, np.array({w.rng.integers(0, shape[-1], shape[:-1]).tolist()}))"


# --- what the passes of `optimize` look for ---


def chain(w, x) -> str:
    """One operation again and again, or a few."""
    link, other = w.one(LINKS), w.one(LINKS)
    for part in w.one([[link, link], [link, other], [other, link, link], [other, other]]):
        x = part.format(f"({x})")
    return x


def batch(w, x) -> str:
    """Several operations alike, on operands of all kinds: what batching makes one."""
    y = w.beside(x)
    pairs = [(x, y)]
    for _ in range(w.whole(1, 4)):
        first = w.pick(lambda name: w.shape(name) == w.shape(x)) or x
        alike = y in w.names and w.chance(0.6)
        if w.chance(0.3):  # one that all of them share
            pairs.append((first, y))
            continue
        second = w.pick(lambda name: w.shape(name) == w.shape(y)) if alike else w.beside(first)
        pairs.append((first, second))
    form = w.one(BATCHES)
    return w.one(GATHERED).format(items=", ".join(form.format(a=a, b=b) for a, b in pairs))


def rolled(w, x) -> str | None:
    """The same on every element or row of an array."""
    if not w.shape(x) or w.shape(x)[0] == 0:
        return None
    numbers = ", ".join(f"Value({w.number()})" for _ in range(w.shape(x)[0]))
    rows = f"{w.one(EACH)} for e, w in zip({x}, [{numbers}])"
    return w.one(["sum([{}])", "np.stack([{}])"]).format(rows)


def gather(w, x) -> str | None:
    """Indices that name elements twice, counted from either end."""
    shape = w.shape(x)
    if not shape or 0 in shape:
        return None
    table = PLACES + 2 * PLACES_3D if len(shape) == 3 else PLACES
    return w.one(table).format(x=x, p=_positions(w, x, 0), q=_positions(w, x, -1))


def nested(w, x) -> str | None:
    """A program inside the graph."""
    if x not in w.needs or not isinstance(w.names[x], Model):
        return None
    y = w.pick(lambda name: name in w.needs and name != x and fits(w.shape(name), w.shape(x)))
    forms = ["picograd.optimize({x})", "picograd.optimize(picograd.optimize({x}))", "copy.copy({x})"]
    if y and isinstance(w.names[y], Model):
        forms += ["sum(picograd.optimize({x}, {y}))"] * 3
    return w.one(forms).format(x=x, y=y)


def mlp(w) -> None:
    """micrograd's network on numbers, written out."""
    n, m = w.whole(2, 3), w.whole(2, 3)
    inputs = w.one(["Value", "", "", "Tensor"])
    row = ", ".join(f"{inputs}({w.number()})" for _ in range(n))
    weights = ", ".join("[" + ", ".join(f"Value({w.number()})" for _ in range(n)) + "]" for _ in range(m))
    act = w.one(["np.tanh(p)", "(p > 0) * p", "np.maximum(p, 0)", "picograd.relu(p)", "p"])
    form = "[{act} for p in [sum([a * b for a, b in zip(r, [{row}])], {bias}) for r in [{weights}]]]"
    hidden = form.format(act=act, row=row, bias=w.one(["0", "Value(0.5)", "0.0"]), weights=weights)
    w.say(w.one(["sum({})", "np.stack({})", "sum([h * h for h in {}])"]).format(hidden))


FORMS = {
    "values": {
        call: 50,
        operation: 22,
        indexing: 9,
        unary: 4,
        cast: 2,
        mask: 4,
        user: 1,
        loss: 2,
        product: 3,
        batch: 2,
        gather: 1,
        updating: 8,
        checkpointed: 2,
    },
    "optimizer": {call: 22, operation: 18, indexing: 5, unary: 4, cast: 2, mask: 8, user: 4, loss: 2, product: 8}
    | {batch: 12, rolled: 5, gather: 5, nested: 6, chain: 8}
    | {updating: 5, checkpointed: 4},
}


def write(rng, room: str) -> list[str]:
    """A program of up to 25 statements; the last one makes the root, or a tuple of roots."""
    w = Writer(rng)
    try:
        return statements(w, room)
    except Refused:
        return w.program if room == "values" else w.program[:-1] or ["x0 = Value(1.0)"]


def statements(w, room: str) -> list[str]:
    w.calls = list(ENTRIES)
    forms, weights = list(FORMS[room]), np.array(list(FORMS[room].values()), float)
    weights /= weights.sum()
    w.say(w.leaf())
    for make in (w.leaf, w.leaf, w.tensor, w.array):
        if w.chance(0.6):
            w.say(make())
    if room == "optimizer" and w.chance(0.12):
        mlp(w)
    for _ in range(min(w.whole(1, 12), w.whole(1, 20))):
        if w.chance(0.1):
            w.say(w.one([w.leaf, w.tensor, w.array])())
        for _ in range(4):
            x = w.pick(lambda name: name in w.needs) if w.chance(0.75) else w.pick()
            if x and w.say(w.one(forms, weights)(w, x)):
                break
    return finish(w, room)


def finish(w, room: str) -> list[str]:
    """Ends a program with its root: the last Value that depends on a leaf, or something made of two such."""

    def able(name):
        value = w.names[name]
        return name in w.needs and isinstance(value, Model) and value.dtype.kind == "f"

    while not (ends := [name for name in w.made if able(name)]):
        w.say(w.leaf())
    a, b = ends[-1], w.one(ends)
    shape = w.shape(a)
    if room == "optimizer" and len(ends) > 1 and w.chance(0.15):
        return w.program + [f"x{len(w.made)} = ({a}, {b})"]
    if w.chance(0.5) and a != b:
        w.say(f"np.sum({a}) * {b}" if w.chance(0.4) or not fits(shape, w.shape(b)) else f"{a} + {b}")
    elif w.chance(0.4):
        w.say(f"np.{w.one(['sum', 'mean'])}({a})")
    if not able(w.made[-1]) and not w.say(f"{a} * 0.5"):
        w.program.append(f"x{len(w.made)} = {a}")
    return w.program


# ---------------------------------------------------------------------------------------------------------------------
# Room `values`
# ---------------------------------------------------------------------------------------------------------------------


class Differs(Exception):
    """A difference: what kind, how, and the comparison as Python."""

    def __init__(self, kind: str, how: str, code: str = ""):
        self.text = f"# {kind}: {how}".replace("\n", " ")[:400] + ("\n" + code if code else "")


class Aside(Exception):
    """A reason to set a program aside."""


@contextlib.contextmanager
def succeeding(what: str, code: str = ""):
    """Within it, an error is a difference: nothing that is done there may raise."""
    try:
        yield
    except (Differs, Aside):
        raise
    except Exception as error:
        raise Differs(f"{what} raises", f"{type(error).__name__}: {error}", code) from None


def many(x) -> tuple:
    """What `optimize` takes and gives: a root, or a tuple of them."""
    return x if type(x) is tuple else (x,)


def array64(x) -> np.ndarray:
    """What x holds, in double precision."""
    return public(x).astype(np.float64)


def largest(arrays) -> float:
    """The largest finite number in arrays: what rounding errors are relative to, at worst."""
    arrays = [np.abs(x[np.isfinite(x)]) for x in arrays]
    return max([float(x.max(initial=0.0)) for x in arrays], default=0.0)


def expect(kind: str, got, expected, eps: float, code: str, scale: float = 0.0, dtype=True, excuse=None):
    """Raises Differs, or, if the excuse (a function) says how much the numbers wobble by themselves, Aside."""
    how = differs(got, expected, eps, scale, dtype)
    if how and excuse and not how.startswith(("shape", "dtype")):
        if differs(got, expected, eps, max(scale, excuse() / eps)) is None:
            raise Aside("ill-conditioned")
    if how:
        raise Differs(f"{kind}, {how}" if how.startswith("dtype") else kind, how, code)


def judged(check):
    """A check that raises, as one that returns."""

    def judge(program):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check(program)
            except Differs as difference:
                return difference.text
            except Aside as aside:
                return Skip(str(aside))
            except Exception as error:  # from picograd, where no check expects one
                place = traceback.extract_tb(error.__traceback__)[-1]
                return f"# raises {type(error).__name__}: {error} at line {place.lineno}: {place.line}".replace(
                    "\n", " "
                )
        return None

    return judge


def raws_of(run) -> list:
    return [public(v) if v.ndim or v.data.data is not np.float64 else float(v.data.data) for v in run.leaves]


def same_errors(real, model) -> bool:
    """Whether neither way raised. One that raises where the other does not is a difference."""
    if real.error is None and model.error is None:
        return True
    if isinstance(real.error or model.error, (NameError, AttributeError, SyntaxError)) and model.error:
        raise Aside("invalid")
    if model.error and real.error:
        return False
    if real.error:
        raise Differs("raises", f"{type(real.error).__name__}: {real.error}; NumPy computes it", "")
    raise Differs("does not raise", f"NumPy raises {type(model.error).__name__}: {model.error}", "")


def check_names(program, real, model, eps):
    """Values, dtypes and shapes of all that has a name."""
    for name, expected in model.names.items():
        if not isinstance(expected, Model):
            continue
        got = real.names[name]
        if type(got) is tuple:
            continue
        wanted = public(expected)

        code = f"print({name}.data, {name}.dtype)  # expected {text(wanted)}, {wanted.dtype}"
        got = public(got)
        if type(expected.raw) is int and got.dtype.kind in "iu":  # which integers a weak one has is left open
            got = got.astype(np.int64)
        expect(
            "value",
            got,
            wanted,
            max(eps, 1e-15),
            code,
            magnitude(model, program),
            excuse=functools.partial(wobble, program, name, model),
        )


def magnitude(model, program) -> float:
    """The largest finite number among the floats of a program."""
    arrays = [public(model.names[target(statement)]) for statement in program]
    return min(largest([x.astype(np.float64) for x in arrays if x.dtype.kind == "f"]), 1e6)


def wobble(program, name, model) -> float:
    """How far a result moves when leaves move by an ulp or two, or when all is computed in float64."""
    base, most = array64(model.names[name]), 0.0
    raws = [leaf.raw for leaf in model.leaves]
    runs = [run_model(program, [moved(x, sign) for x in raws]) for sign in (1, -1, 2)]
    runs.append(run_model(program, [np.asarray(x, np.float64)[()] for x in raws], wide=True))
    for other in runs:
        if other.error or name not in other.names or public(other.names[name]).shape != base.shape:
            return math.inf
        there = array64(other.names[name])
        if not np.array_equal(np.isfinite(there), np.isfinite(base)):
            return math.inf
        gap = np.abs(there - base)
        most = max(most, float(np.max(gap[np.isfinite(gap)], initial=0.0)))
    return 4 * most


def moved(x, sign):
    """A raw value moved by units in the last place."""
    dtype = getattr(x, "dtype", np.float64)
    eps = np.finfo(dtype).eps
    out = np.asarray(x) * (1 + sign * eps * np.cos(3.0 * np.arange(np.size(x)).reshape(np.shape(x)) + sign)).astype(
        dtype
    )
    return float(out) if isinstance(x, float) and type(x) is float else out.astype(dtype)[()]


def flows(root) -> bool:
    return isinstance(root, picograd.Value) and root.dtype.kind == "f"


def backward(root, seed=None, **options) -> bool:
    """Runs backward; False if picograd says that there is no gradient."""
    try:
        root.backward(None if seed is None or not root.ndim else seed, **options)
    except TypeError as error:
        if "no gradient flows" not in str(error):
            raise
        return False
    return True


def total_of(program, seed, xp):
    """The program as a function of its leaves, in float64: a number; `truths` are its conditions of the last time."""

    def total(raws):
        run = run_model(program, raws, wide=True, xp=xp)
        if isinstance(run.error, ValueError):
            raise Aside("kink")  # a step to the side selects other elements
        if run.error:
            raise run.error
        root = plain(run.root(program))
        if xp is np:
            raws = [np.asarray(x.raw) for x in run.names.values() if isinstance(x, Model)]
            total.truths = [x.tolist() for x in raws if x.dtype == bool]
        if xp is np and np.shape(root) != np.shape(seed):
            raise Aside("kink")
        with computing(True, xp):
            return xp.sum(root * seed)

    return total


def reference(program, raws, seed):
    """Gradients by autograd; None where it cannot."""
    try:
        found = autograd.grad(total_of(program, seed, anp))(list(raws))
        return found if all(isinstance(g, (np.ndarray, np.generic, float)) for g in found) else None
    except Exception:  # it lacks a function, or a rule: whatever it raises
        return None


def slopes(program, raws, seed, steps=(1e-5, 1e-6)):
    """Gradients by central differences, and how far they can be trusted; nan at kinks."""
    total, grads, doubt = total_of(program, seed, np), [], 0.0
    mode.frozen = {}
    try:
        here, truths = float(total(raws)), total.truths
        for i, x in enumerate(raws):
            grad = np.zeros(np.shape(x))
            for place in np.ndindex(np.shape(x)):
                found, steady = [], True
                for step in steps:
                    sides = []
                    for sign in (1, -1):
                        twin = np.array(x, np.float64)
                        twin[place] += sign * step
                        sides.append(float(total([*raws[:i], twin[()], *raws[i + 1 :]])))
                        steady = steady and total.truths == truths  # else a condition is on its edge
                    found += [(sides[0] - sides[1]) / (2 * step), (sides[0] - here) / step, (here - sides[1]) / step]
                size = 1e-3 * (1 + abs(found[0]))
                steady = steady and abs(found[1] - found[2]) <= size and abs(found[0] - found[3]) <= size
                grad[place] = found[0] if steady else np.nan
                doubt = max(doubt, abs(found[0] - found[3])) if steady else doubt
            grads.append(grad)
    finally:
        mode.frozen = None
    return grads, 10 * doubt + 1e-8 * (1 + abs(here))


def check_gradient(program, kind, got: list, raws, seed, eps, code, excuse=None):
    """Gradients against autograd, and where that does not agree, against finite differences."""
    wide = [np.asarray(x, np.float64)[()] for x in raws]
    if not all(np.all(np.isfinite(x)) for x in wide):
        raise Aside("non-finite")
    expected = reference(program, wide, seed)
    if expected is not None:
        scale = max([1.0, *(float(np.max(np.abs(g), initial=0.0)) for g in expected)])
        if all(differs(a, b, eps, scale, dtype=False) is None for a, b in zip(got, expected)):
            return
    numeric, doubt = slopes(program, wide, seed)
    for i, (a, b) in enumerate(zip(got, numeric)):
        a = np.asarray(a, np.float64)
        if a.shape != b.shape:
            raise Differs(kind, f"leaf {i}: shape {a.shape} instead of {b.shape}", code)
        if np.any(np.isnan(b)):
            raise Aside("kink")
        exact = b if expected is None or differs(expected[i], b, 1e-7, 1e3 * doubt / 64) else expected[i]
        gap = float(np.max(np.abs(a - b), initial=0.0)) if np.all(np.isfinite(a)) else math.inf
        size = 1.0 + float(np.max(np.abs(b), initial=0.0))
        fine = expected is not None and exact is not b  # autograd is right, so that small errors are errors, too
        tight = float(np.max(np.abs(a - exact), initial=0.0)) if fine and gap < math.inf else gap
        if tight > 64 * eps * size * 4 + (0 if fine else 1e-4 * size + doubt):
            if excuse and gap < math.inf and gap < excuse():
                raise Aside("ill-conditioned")
            raise Differs(kind, f"leaf {i}: {text(a)} instead of {text(exact)}", code)


def gradient_wobble(program, raws, seed) -> float:
    """How far picograd's own gradients move when the leaves move by an ulp."""
    found = []
    for sign in (0, 1, -1, 2):
        near = [moved(x, sign) for x in raws]
        leaves = [picograd.Value(np.asarray(x), x.dtype) if hasattr(x, "dtype") else picograd.Value(x) for x in near]
        run = run_real(program, leaves)
        backward(run.root(program), seed)
        found.append([array64(v.grad) for v in run.leaves])
    gaps = [np.max(np.abs(a - b), initial=0.0) for other in found[1:] for a, b in zip(found[0], other)]
    return 20 * float(max(gaps, default=0.0)) if np.all(np.isfinite(gaps)) else math.inf


def shift(leaves):
    """Changes the leaves' data a little."""
    for i, leaf in enumerate(leaves):
        raw = leaf.data.data if isinstance(leaf, picograd.Value) else leaf.data
        leaf.data = raw * (0.9 if i % 2 else 1.1) + (0.03125 if i % 3 else -0.0625)


def grads(run) -> list:
    return [np.array(public(v.grad)) for v in run.leaves]


BACKWARD = "{root}.backward({seed})\nprint([v.grad for v in leaves])  # leaves: the Values in the order of the text"


def names_of(program):
    return {
        "root": target(program[-1]),
        "seed": "np.cos(np.arange({0}.size)).reshape({0}.shape)".format(target(program[-1])),
    }


def _check_values(program):
    model, eps = run_model(program), mode.eps
    real = run_real(program)
    if not same_errors(real, model):
        return
    check_names(program, real, model, eps)
    root = real.root(program)
    if not flows(root) or not real.leaves:
        return
    call_back = BACKWARD.format(**names_of(program))
    seed, raws = seed_of(root.shape), [leaf.raw for leaf in model.leaves]
    kept = {name: np.array(public(x)) for name, x in real.names.items() if isinstance(x, picograd.Value)}
    with succeeding("backward", call_back):
        flowing = backward(root, seed)
    found = grads(real)
    for name, before in kept.items():
        expect("backward changes data", public(real.names[name]), before, 1e-300, call_back)
    for leaf, g in zip(real.leaves, found):
        if g.shape != leaf.shape or g.dtype != leaf.dtype:
            raise Differs("gradient kind", f"{g.shape} {g.dtype} for a leaf {leaf.shape} {leaf.dtype}", call_back)
    owned(real.leaves, call_back)
    if all(map(tame, real.names.values())):
        loose = max(eps, 1e-15) * 4
        check_gradient(
            program, "gradient", found, raws, seed, loose, call_back, lambda: gradient_wobble(program, raws, seed)
        )
        check_functions(program, raws, seed)
    check_replays(program, real, root, found, flowing, eps, seed)
    check_copies(program, seed, found)
    if flowing and root.size == 1:
        check_silence(program, raws)


def tame(x) -> bool:
    """Whether gradients of x can be judged: nothing overflows or vanishes on the way."""
    size = np.abs(public(x).astype(np.float64)) if isinstance(x, (picograd.Value, picograd.Tensor)) else np.zeros(0)
    return bool(np.all((size == 0) | ((size > 1e-7) & (size < 1e7))))


def owned(leaves, code):
    """No two leaves share a gradient, nor a gradient the data."""
    arrays = [(f"grad of leaf {i}", v.grad.data) for i, v in enumerate(leaves)]
    arrays += [(f"data of leaf {i}", v.data.data) for i, v in enumerate(leaves)]
    unshared(arrays, code)


def unshared(arrays, code):
    arrays = [(name, x) for name, x in arrays if isinstance(x, np.ndarray) and x.size]
    for i, (name, x) in enumerate(arrays):
        for other, y in arrays[:i]:
            if np.shares_memory(x, y):
                raise Differs("ownership", f"{name} and {other} are one array", code)


def check_functions(program, raws, seed):
    """grad, value_and_grad, jacobian and second order, of float64 data in which nothing may be rounded to float32."""
    wide = [np.asarray(x, np.float64)[()] if np.ndim(x) or type(x) is not float else x for x in raws]
    model, eps = run_model(program, wide), mode.eps
    if model.error:
        return
    every = tuple(range(len(wide)))

    def total(*leaves):
        run = run_real(program, list(leaves))
        if run.error and not isinstance(run.error, ValueError):
            raise run.error
        out = None if run.error else run.root(program)
        if out is None or out.shape != np.shape(seed):
            raise Aside("kink")  # a step to the side selects other elements
        return np.sum(out * seed) if out.ndim else out

    code = f"# grad of the sum of {target(program[-1])} * cos(0, 1, ...), as a function of its leaves, given in float64"
    inputs = [np.array(x) if hasattr(x, "dtype") else x for x in wide]  # a 0-d array is strong, a number is weak
    with succeeding("grad", code):
        value, found = picograd.value_and_grad(total, every)(*inputs)
    for x, g in zip(inputs, found):
        if np.shape(g) != np.shape(x) or np.asarray(g).dtype != np.float64:
            raise Differs("grad kind", f"{np.shape(g)} {np.asarray(g).dtype} for float64 {np.shape(x)}", code)
    unshared(
        [(f"gradient {i}", g) for i, g in enumerate(found)] + [(f"argument {i}", x) for i, x in enumerate(inputs)], code
    )
    eps = max(eps, 1e-15) * 4
    check_gradient(program, "grad", list(map(np.asarray, found)), wide, seed, eps, code)
    parts = re.findall(r"\w+", " ".join(program))
    if sum(np.size(x) for x in wide) > 24 or len(program) > 14 or not (ENDS | {"detach"}).isdisjoint(parts):
        return
    check_second(program, total, every, inputs, eps, code.replace("grad", "grad of grad"))


def check_second(program, total, every, inputs, eps, code):
    """The gradient of the slope along a direction, against differences of the gradient."""
    along = [np.cos(1.0 + np.arange(np.size(x))).reshape(np.shape(x)) for x in inputs]
    first = picograd.grad(total, every)

    def slope(*leaves):
        return sum(np.sum(g * d) for g, d in zip(first(*leaves), along))

    with succeeding("second order", code):
        second = picograd.grad(slope, every)(*inputs)

    def beside(step):
        """The slope a step further along."""
        there = [np.asarray(x + step * d) for x, d in zip(inputs, along)]
        return float(slope(*(y if isinstance(x, np.ndarray) else float(y) for x, y in zip(inputs, there))))

    found, here = sum(float(np.sum(g * d)) for g, d in zip(second, along)), beside(0.0)
    coarse, fine = ((beside(step) - beside(-step)) / (2 * step) for step in (1e-4, 1e-5))
    left, right = (here - beside(-1e-5)) / 1e-5, (beside(1e-5) - here) / 1e-5
    size = 1.0 + abs(fine) + abs(here)
    if not np.isfinite(size) or abs(coarse - fine) + abs(left - right) > 1e-3 * size or eps > 1e-10:
        return  # a kink, or too steep to tell
    noise = max(abs(beside(step) - here) for step in (3e-15, -5e-15)) / 1e-5
    if not abs(found - fine) <= 1e-8 * size + abs(coarse - fine) + 20 * noise:
        near = [
            np.asarray(x + 1e-4 * d) if isinstance(x, np.ndarray) else float(x + 1e-4 * d)
            for x, d in zip(inputs, along)
        ]
        if (
            abs(sum(float(np.sum(g * d)) for g, d in zip(picograd.grad(slope, every)(*near), along)) - fine)
            < 1e-2 * size
        ):
            raise Aside("kink")  # right beside it, the two agree
        raise Differs("second order", f"{found} instead of {fine}", code)


def check_replays(program, real, root, found, flowing, eps, seed):
    """backward again, without keeping gradients, and a replay at other leaves: each as a fresh run has it."""
    names, call_back = names_of(program), BACKWARD.format(**names_of(program))
    if flowing:
        backward(root, seed, retain_grads=False)
        for v, g in zip(real.leaves, found):
            expect("backward twice", public(v.grad), 2 * g, 1e-6 if g.dtype != np.float64 else 1e-14, call_back * 2)
    if re.search(r"Value\([^)]*\)\[|\bint\(|shape and|\[x\d+\]", "".join(program)):
        return  # what chooses shapes when it is called goes on with those of the first time
    shift(real.leaves)
    raws = [np.array(v.data.data) if v.ndim else v.data.data for v in real.leaves]
    fresh = run_real(program)
    if len(fresh.leaves) != len(raws):
        return
    fresh = run_real(program, remade(real.leaves))
    if fresh.error or fresh.root(program).shape != root.shape:
        return
    code = "# after leaf.data = leaf.data * 1.1 - 0.0625 (1.1, 0.9, ...; -0.0625, 0.03125, 0.03125, ...) of each leaf\n"
    code += f"{names['root']}.forward()\nprint({names['root']}.data)"
    with succeeding("replay", code):
        root.forward()
    expect("replay", public(root), public(fresh.root(program)), 1e-300, code)


def remade(leaves):
    """Leaves of the same data and kind."""
    return [copy.copy(v) for v in leaves]


def check_copies(program, seed, found):
    """Pickled, and copied deep in a container: the identity of every node stays, and so does what it computes."""
    run = run_real(program)
    root = run.root(program)
    inner = next((x for x in run.names.values() if isinstance(x, picograd.Value) and x is not root), root)
    for how, twin_of in (("pickle", lambda x: pickle.loads(pickle.dumps(x))), ("copy.deepcopy", copy.deepcopy)):
        code = f"twins = {how}((leaves, inner, {target(program[-1])}))"
        with succeeding(how, code):
            leaves, middle, twin = twin_of((run.leaves, inner, root))
            flowing = backward(twin, seed)
        expect(how, public(twin), public(root), 1e-300, code)
        expect(how, public(middle), public(inner), 1e-300, code)
        if flowing:
            for v, g in zip(leaves, found):
                # A copy of a strided array is in C order, in which NumPy may add up in another order.
                expect(f"{how} loses the identity of leaves", public(v.grad), g, np.finfo(g.dtype).eps, code)
        if any(a is b for a in leaves for b in run.leaves):
            raise Differs(how, "a copy holds the original leaf", code)
    twin = copy.copy(root)
    expect("copy.copy", public(twin), public(root), 1e-300, "copy.copy(root)")


LEAKS = {
    "float(v)": float,
    "int(v)": int,
    "math.sin(v)": math.sin,
    "buffer[0] = v": lambda v: operator.setitem(np.zeros(1), 0, v),
}
QUIET = {"v.item()": lambda v: v.item(), "bool(v)": bool, "f'{v}'": str, "v > 0": lambda v: v > 0, "repr(v)": repr}


def check_silence(program, raws):
    """What would lose a gradient says so; what is only looked at is quiet."""
    run = run_real(program)
    root = run.root(program)
    root = root if not root.ndim else root.sum()
    if not np.isfinite(root.item()):
        return
    for name, leak in LEAKS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            leak(root)
        if not caught:
            raise Differs(
                "silence", f"{name} loses a gradient without a warning", name.replace("v", target(program[-1]))
            )
    for name, look in QUIET.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            look(root)
        if caught:
            raise Differs("noise", f"{name} warns: {caught[0].message}", "")

    def leaking(leaf):
        def f(*leaves):
            out = run_real(program, list(leaves)).root(program)
            leaf(np.sum(out))
            return np.sum(out)

        return f

    wide = [np.array(x, np.float64) if hasattr(x, "dtype") else x for x in raws]
    for name, leak in LEAKS.items():
        try:
            picograd.grad(leaking(leak), tuple(range(len(wide))))(*wide)
        except TypeError:
            continue
        except Exception:
            pass
        raise Differs("silence", f"{name} inside grad loses a gradient without a TypeError", "")


class Values:
    PREAMBLE = PREAMBLE
    generate = staticmethod(lambda rng: write(rng, "values"))
    check = staticmethod(judged(_check_values))


# ---------------------------------------------------------------------------------------------------------------------
# Room `optimizer`
# ---------------------------------------------------------------------------------------------------------------------


# The first statement of programs that are checked with distribution on, where smallest arrays have many blocks.
IN_BLOCKS = "in_blocks = 'min_elements_for_parallel=1, _BLOCK_BYTES=32, _FEW_BLOCKS=0'"


def _check_optimizer(program):
    if program[0] != IN_BLOCKS:
        return _check_optimized(program)
    with (
        mock.patch.multiple(picograd, _BLOCK_BYTES=32, _FEW_BLOCKS=0),
        picograd.distributed_config(enabled=True, min_elements_for_parallel=1),
    ):
        _check_optimized(program)


def _check_optimized(program):
    eager = run_real(program, eager=True)
    if eager.error:
        raise Aside("invalid")
    roots = many(eager.root(program))
    if not roots or not all(isinstance(r, picograd.Value) for r in roots):
        raise Aside("no root")
    Pair(program).go()


class Pair:
    """An optimized program beside its eager twin, with leaves of their own, taken through one step after another."""

    def __init__(self, program):
        self.program, self.steps, self.way = program, [], ""
        self.loose = coarsest(program)

    def go(self):
        for way in WAYS:
            if "no_grad" in way:
                self.way = ""
                self.combined()
                self.reshaped()
            self.steps, self.way = [f"# {way}"], "" if way == "optimize" else f" after {way}"
            self.start(way)
            self.compare("first forward")
            self.both("forward")
            self.compare("forward")
            self.sweep("backward")
            if way == "optimize":
                self.sweep("second backward")
                owned(self.leaves, self.code())
            handed = [(p.data.data, np.array(p.data.data)) for p in self.programs]
            self.shift()
            self.both("forward")
            self.compare("forward at other leaves")
            for seen, before in handed:
                expect("handed out data overwritten", np.asarray(seen), before, 1e-300, self.code())
            self.zero()
            self.sweep("backward at other leaves")
        self.way = ""
        self.stale()

    def start(self, way):
        self.eager = run_real(self.program, eager=True)
        real = self.run(self.program)
        self.leaves = real.leaves
        self.eager_roots, self.originals = many(self.eager.root(self.program)), many(real.root(self.program))
        names = ", ".join(f"x{i}" for i in range(len(self.originals)))
        with succeeding(way, f"{way}({names})"):
            programs, inputs = WAYS[way](self.originals, [*real.leaves, *real.tensors])
        self.leaves, self.tensors = inputs[: len(real.leaves)], inputs[len(real.leaves) :]
        self.programs = many(programs)

    def run(self, program):
        real = run_real(program)
        if real.error:
            raise Differs("optimize raises", f"{type(real.error).__name__}: {real.error}", "")
        return real

    def code(self):
        root = target(self.program[-1])
        return f"roots = {root} if type({root}) is tuple else ({root},)\n" + "\n".join(self.steps)

    def both(self, step):
        self.steps.append(f"for p in programs: p.{step}()")
        for root in self.eager_roots:
            root.forward()
        with succeeding(step, self.code()):
            for p in self.programs:
                p.forward()

    def compare(self, when):
        for p, root in zip(self.programs, self.eager_roots):
            self.expect(f"{when}", public(p), public(root))

    def expect(self, kind, got, expected):
        how = differs(got, expected, self.loose) and differs(got, expected, self.loose, self.scale())
        if how and not how.startswith(("shape", "dtype")):
            if not self.steady():
                raise Aside("ill-conditioned")
        if how:
            kind = f"{kind}{self.way}"
            raise Differs(f"{kind}, {how}" if how.startswith("dtype") else kind, how, self.code())

    def scale(self):
        values = [x for x in self.eager.names.values() if isinstance(x, picograd.Value) and x.dtype.kind == "f"]
        return min(largest(map(array64, values)), 1e6)

    def steady(self):
        """Whether eager agrees with itself at leaves moved by an ulp: values and gradients; and nothing overflows."""
        runs = []
        for sign in (0, 1, -1):
            leaves = [copy.copy(v) for v in self.eager.leaves]
            for v in leaves:
                v.data = moved(v.data.data if v.ndim or v.dtype != np.float64 else v.data.data, sign)
                v.grad = None
            run = run_real(self.program, leaves, eager=True)
            if run.error:
                return False
            values = [x for x in run.names.values() if isinstance(x, picograd.Value)]
            with np.errstate(all="ignore"):
                if any(np.any(np.abs(array64(x)) > 1e30) for x in values if x.size):
                    return False
            for r in many(run.root(self.program)):
                backward(r, seed_of(r.shape))
            runs.append([array64(x) for x in values] + [array64(v.grad) for v in leaves])
        return all(
            differs(a, b, 8 * self.loose, self.scale()) is None for other in runs[1:] for a, b in zip(runs[0], other)
        )

    def sweep(self, kind):
        self.steps.append("for p in programs: p.backward()")
        before = [np.array(public(p)) for p in self.programs]
        for root in self.eager_roots:
            backward(root, seed_of(root.shape))
        with succeeding(kind, self.code()):
            for p in self.programs:
                backward(p, seed_of(p.shape))
        for p, data in zip(self.programs, before):
            expect(f"{kind} changes data", public(p), data, 1e-300, self.code())
        for v, w in zip(self.leaves, self.eager.leaves):
            self.expect(kind, public(v.grad), public(w.grad))

    def reshaped(self):
        """A leaf of another shape: an error that names it; where nothing was told a shape, eager's result will do."""
        self.start("optimize")
        for i, v in enumerate(self.leaves):
            if not v.ndim or not v.size:
                continue
            v.label, old = "the-leaf", v.data.data
            longer = np.concatenate([old, old])
            v.data, self.eager.leaves[i].data = longer, longer
            self.steps = [
                "# optimize",
                f"v = leaves[{i}]; v.label = 'the-leaf'; v.data = np.concatenate([v.data.data] * 2)",
            ]
            self.steps.append("for p in programs: p.forward()")
            self.turn(v.label)
            v.data, self.eager.leaves[i].data = old, old

    def turn(self, label):
        try:
            for p in self.programs:
                p.forward()
        except Exception as error:
            if isinstance(error, ValueError) and label in str(error):
                return
            raise Differs("changed shape is not named", f"{type(error).__name__}: {error}", self.code()) from None
        try:
            for root in self.eager_roots:
                root.forward()
        except Exception:
            raise Differs("changed shape passes", "no error where eager has one", self.code()) from None
        self.compare("forward at another shape")

    def stale(self):
        """A backward after the leaves changed, and before the forward: its gradients are undefined, its data is not."""
        self.steps = ["# optimize"]
        self.start("optimize")
        self.both("forward")
        self.shift()
        before = [np.array(public(p)) for p in self.programs]
        for p in self.programs:
            backward(p, seed_of(p.shape))
        for p, data in zip(self.programs, before):
            expect("backward at newer leaves changes data", public(p), data, 1e-300, self.code() + "; p.backward()")

    def shift(self):
        self.steps.append("for i, v in enumerate(leaves): v.data = v.data.data * (0.9 if i % 2 else 1.1) + 0.03125")
        self.steps.append("# and t.data = t.data * 1.1 + 0.03125 of every floating Tensor t, in the same way")
        for tensors in (self.tensors, self.eager.tensors):
            shift([t for t in tensors if t.dtype.kind == "f"])
        shift(self.leaves)
        shift(self.eager.leaves)

    def zero(self):
        for v in [*self.leaves, *self.eager.leaves]:
            v.grad = None

    def combined(self):
        """Roots of one program in one later expression; each by itself."""
        real, eager = self.run(self.program), run_real(self.program, eager=True)
        pairs = []
        for run in (real, eager):
            found = [x for x in run.names.values() if flows(x) and x.size]
            if len(found) < 2:
                return
            pairs.append((found[len(found) // 2 - 1], found[-1]))
        self.eager = eager
        self.steps = ["a, b = picograd.optimize(first, last)  # the middle one of the Values with names, and the last"]
        self.steps.append("(np.sum(a) * 1.5 + np.sum(b)).backward()")
        (first, last), (a, b) = pairs
        with succeeding("two roots", self.code()):
            first, last = picograd.optimize(first, last)
            backward(np.sum(first) * 1.5 + np.sum(last))
        backward(np.sum(a) * 1.5 + np.sum(b))
        for v, w in zip(real.leaves, eager.leaves):
            self.expect("two roots", public(v.grad), public(w.grad))


def coarsest(program) -> float:
    run_model(program)
    return max(mode.eps, 1e-15)


def _optimize(roots, leaves):
    return picograd.optimize(*roots), leaves


def _twice(roots, leaves):
    return picograd.optimize(*many(picograd.optimize(*roots))), leaves


def _pickled(roots, leaves):
    return pickle.loads(pickle.dumps(_optimize(roots, leaves)))


def _without_grad(roots, leaves):
    with picograd.no_grad():
        return _optimize(roots, leaves)


WAYS = {
    "optimize": _optimize,
    "optimize twice": _twice,
    "optimize and pickle": _pickled,
    "optimize under no_grad": _without_grad,
}


class Optimizer:
    PREAMBLE = PREAMBLE
    check = staticmethod(judged(_check_optimizer))

    @staticmethod
    def generate(rng):
        program = write(rng, "optimizer")
        return [IN_BLOCKS, *program] if rng.random() < 0.1 else program


# ---------------------------------------------------------------------------------------------------------------------
# Shrinking
# ---------------------------------------------------------------------------------------------------------------------

SHRINK_CHECKS = 200
SHRINK_EACH = 8  # of each kind, so that one defect does not take all the time


def head(verdict) -> str:
    """The kind of a difference: what comes before a colon in a comment, or else the first line without its data."""
    if not isinstance(verdict, str):
        return ""
    first = verdict.split("\n")[0]
    return first.split(":")[0] if first.startswith("#") else re.sub(r"`[^`]*`|\[[^\]]*\]|[\d.]+", "", first)[:60]


def shrink(room, program, verdict):
    """The smallest program found that shows the same kind of difference, and its text."""
    budget = SHRINK_CHECKS

    def still(candidate):
        nonlocal budget, verdict, program
        if budget <= 0 or not candidate:
            return False
        budget -= 1
        try:
            found = room.check(candidate)
        except Exception:  # such as a KeyError where the candidate names nothing
            return False
        if head(found) != head(verdict):
            return False
        program, verdict = candidate, found
        return True

    for data in (False, True):  # first the statements, then the numbers in them
        changed = True
        while changed and budget > 0:
            changed = False
            for i in reversed(range(len(program))):
                changed |= i < len(program) and still(program[:i] + program[i + 1 :])
            for i in reversed(range(len(program))):
                changed |= i < len(program) - 1 and still(without_alias(program, i))
            for i in reversed(range(len(program))):
                again = True
                while again and i < len(program):
                    lines = simpler(program[i], data)
                    again = any(still(program[:i] + [line] + program[i + 1 :]) for line in lines)
                    changed |= again
    return program, verdict


def without_alias(program, i):
    """The program without statement i, if that only gives another name to something."""
    alias = re.fullmatch(r"(x\d+) = (x\d+)", program[i])
    return alias and program[:i] + [re.sub(rf"\b{alias[1]}\b", alias[2], line) for line in program[i + 1 :]]


def simpler(statement: str, data: bool):
    """Statements like this one with a part replaced by a smaller one, the boldest first."""
    tree = ast.parse(statement)
    places = [(node, field, i) for node in ast.walk(tree) for field, i in fields(node)]
    seen = {statement}
    for node, field, i in places:
        if isinstance(node, ast.List) and not data:
            continue
        old = getattr(node, field) if i is None else getattr(node, field)[i]
        for new in smaller(old) if data or not isinstance(old, (ast.List, ast.Constant)) else ():
            put(node, field, i, new)
            line = ast.unparse(tree)
            put(node, field, i, old)
            if line not in seen and len(line) < len(statement) + 2:
                seen.add(line)
                yield line


def fields(node):
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.expr):
            yield name, None
        elif isinstance(value, list):
            yield from ((name, i) for i, x in enumerate(value) if isinstance(x, ast.expr))


def put(node, field, i, new):
    if i is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[i] = new


def smaller(node):
    """Smaller expressions than this one: its parts; shorter lists; plainer numbers."""
    if isinstance(node, ast.Call):
        maker = ast.unparse(node.func) in ("Value", "Tensor", "np.array")
        yield from [] if maker else node.args
        if isinstance(node.func, ast.Attribute) and not maker:
            yield node.func.value
        for k in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, node.keywords[:k] + node.keywords[k + 1 :])
        if len(node.args) > 1:
            yield ast.Call(node.func, node.args[:-1], node.keywords)
    elif isinstance(node, ast.BinOp):
        yield from (node.left, node.right)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, (ast.Subscript, ast.Attribute)):
        yield node.value
    elif isinstance(node, ast.Compare):
        yield from (node.left, *node.comparators)
    elif isinstance(node, (ast.List, ast.Tuple)) and node.elts:
        yield type(node)(node.elts[:1], node.ctx)
        yield type(node)(node.elts[: len(node.elts) // 2], node.ctx)
        for k in range(len(node.elts)) if len(node.elts) < 8 else ():
            yield type(node)(node.elts[:k] + node.elts[k + 1 :], node.ctx)
    elif isinstance(node, ast.Constant) and type(node.value) is float and node.value not in (1.0, 2.0):
        yield from (ast.Constant(2.0), ast.Constant(1.0))


def signature(program, verdict) -> str:
    """What failures of one defect have in common: the kind, and the functions and operators of the small program."""
    used = set()
    for node in ast.walk(ast.parse("\n".join(program))):
        if isinstance(node, ast.Call):
            used.add(ast.unparse(node.func).rpartition(".")[2])
        elif isinstance(node, (ast.BinOp, ast.UnaryOp)):
            used.add(type(node.op).__name__)
        elif isinstance(node, (ast.Subscript, ast.Compare)):
            used.add(type(node).__name__)
    return f"{head(verdict)} | {' '.join(sorted(used - {'array', 'Value', 'USub'}))}"


# ---------------------------------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------------------------------

MOST_ASIDE = 0.15


def load(path: pathlib.Path):
    """Imports a picograd.py, under that name for everybody."""
    global picograd, ENTRIES, WEAK_ARRAY
    spec = importlib.util.spec_from_file_location("picograd", path)
    picograd = sys.modules["picograd"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picograd)
    WEAK_ARRAY = weak_array_dtype()
    ENTRIES, missing = entries()
    return missing


def room_named(name: str):
    return (
        importlib.import_module("fuzz_blocks") if name == "blocks" else {"values": Values, "optimizer": Optimizer}[name]
    )


def own_seed(seed: int, i: int) -> int:
    """The seed of program i; that of program 0 is the seed itself, so that `--seed S --programs 1` runs one alone."""
    return seed if i == 0 else int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


def fuzz(name: str, seed: int, seconds: float, programs: float, keep_going: bool) -> bool:
    """Runs a room; whether it passed."""
    room, start, groups, aside, shrunk = room_named(name), time.monotonic(), {}, {}, {}
    done = differences = 0
    while done < programs and time.monotonic() - start < seconds:
        mine = own_seed(seed, done)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = room.generate(np.random.default_rng(mine))
        done += 1
        verdict = room.check(program)
        if isinstance(verdict, Skip):
            aside[verdict.reason] = aside.get(verdict.reason, 0) + 1
        elif verdict is not None:
            differences += 1
            kind = head(verdict)
            shrunk[kind] = shrunk.get(kind, 0) + 1
            if shrunk[kind] <= SHRINK_EACH:
                program, verdict = shrink(room, program, verdict)
                key = signature(program, verdict)
            else:
                key = f"{kind} | (not shrunk)"
            groups[key] = groups.get(key, 0) + 1
            if groups[key] == 1:
                after = f"program {done}, {time.monotonic() - start:.1f} s"
                print(f"\n--- {name}: {key}\n--- seed {mine} ({after}): --room {name} --seed {mine} --programs 1")
                print(room.PREAMBLE + "\n" + "\n".join(program) + "\n" + verdict, flush=True)
            if not keep_going:
                break
    took = time.monotonic() - start
    share = sum(aside.values()) / max(done, 1)
    print(
        f"\n{name}: {done} programs, {differences} differ ({len(groups)} kinds), {done / max(took, 1e-9):.0f} a second"
    )
    print(f"{name}: {share:.1%} set aside {aside}")
    for key, count in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"{name}: {count:5d}  {key}")
    if share > MOST_ASIDE:
        print(f"{name}: more than {MOST_ASIDE:.0%} set aside")
    return not differences and (share <= MOST_ASIDE or done < 50)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seconds", type=float, nargs="?", default=math.inf, help="for each room")
    parser.add_argument("--room", choices=["values", "optimizer", "blocks"])
    parser.add_argument("--seed", type=int, help="a fresh one unless given")
    parser.add_argument("--programs", type=int, help="how many in each room, whatever the time")
    parser.add_argument("--keep-going", action="store_true", help="after a difference")
    parser.add_argument("--processes", action="store_true", help="every program of blocks in worker processes")
    parser.add_argument("--path", type=pathlib.Path, default=HERE.parent / "picograd.py", help="the file to test")
    options = parser.parse_args()
    if options.seconds == math.inf and options.programs is None:
        parser.error("give SECONDS or --programs")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}")
    faulthandler.enable()
    missing = load(options.path)
    print(f"entries of the table without a maker of arguments: {', '.join(missing) or 'none'}")
    seconds = options.seconds if options.programs is None else math.inf
    rooms = [options.room] if options.room else ["values", "optimizer", "blocks"]
    if options.processes:
        room_named("blocks").PROCESSES = True
    passed = [fuzz(name, seed, seconds, options.programs or math.inf, options.keep_going) for name in rooms]
    return 0 if all(passed) and not missing else 1


if __name__ == "__main__":
    sys.modules["fuzz"] = sys.modules[__name__]  # what `blocks` imports from
    sys.exit(main())
