"""Tests of PicoGrad: `python test.py`. One class per room of picograd.py, in the file's order.

Gradients are checked against central finite differences in double precision, for every primitive of the table: a new
element-wise one by being there, any other one by an entry in SAMPLES.
"""

import ast
import collections
import contextlib
import contextvars
import copy
import dataclasses
import datetime
import gc
import html
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import warnings
import weakref
import zipfile
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np

import picograd
from picograd import (
    MLP,
    PRIMITIVES,
    SGD,
    TABLE,
    Adam,
    Layer,
    Module,
    Neuron,
    Tensor,
    Value,
    binary_cross_entropy_with_logits,
    check_gradients,
    checkpoint,
    cross_entropy,
    draw,
    elementwise_grad,
    find_nonfinite,
    gelu,
    grad,
    hessian,
    hinge_loss,
    hvp,
    jacobian,
    jvp,
    log_softmax,
    logsumexp,
    mse_loss,
    no_grad,
    primitive,
    ravel_nest,
    relu,
    sigmoid,
    softmax,
    softplus,
    value_and_grad,
    vjp,
)

try:
    import dask
    import dask.array as da
    from dask import distributed
except ImportError as error:
    distributed, no_dask = None, str(error)
else:
    no_dask = ""

CUT = "\n# 8. Blocks\n" not in Path(picograd.__file__).read_text(encoding="utf-8")
if not CUT:  # else a copy that ends above the power rooms: .ci/cut.py has it pass the tests of rooms 1 to 7
    from picograd import Chunked, distributed_config, get_distributed_config, optimize, set_distributed_config

WAYS = [lambda root: root] if CUT else [lambda root: root, optimize]  # of computing a graph
needs_power = unittest.skipIf(CUT, "needs rooms 8 to 10, which this copy of picograd.py lacks")
needs_dot = unittest.skipUnless(shutil.which("dot"), "needs Graphviz's program dot")
HERE = Path(__file__).resolve().parent
SEED = int(os.environ.get("PICOGRAD_TEST_SEED", random.randrange(2**32)))


# What primitives are tested on, by name. Element-wise ones: an interval per operand, away from kinks and poles; where
# there is no entry, REAL. Others: (operands, parameters) of a call, ...; see `sample` for the operands.
REAL, POSITIVE, UNIT, OVER_1 = (-2.0, 2.0), (0.3, 3.0), (-0.9, 0.9), (1.1, 3.0)
APART = np.array([-1.7, 0.1, 1.3])  # no kink near
AXES = [{}] + [{"axis": axis, "keepdims": keep} for axis in (1, -1, (0, 2)) for keep in (0, 1)]
# Operations on graphs, and one that is given what it might compute: see TestGradients, TestOptimizer and TestNN.
GRAPHS = ("join", "checkpoint", "program", "result", "sealed", "cross entropy")
HOWS = {"set": None, "add": np.add, "multiply": np.multiply, "min": np.minimum, "max": np.maximum}  # of v.at[index]
SQUARE = [((((3, 3), "definite"),), {}), ((((2, 3, 3), "definite"),), {})]
DIAGONALS = [(((3,),), {}), (((3,),), {"k": -2}), (((3, 4),), {"k": 1})]
SAMPLES = {
    **dict.fromkeys("abs fabs cbrt reciprocal sqrt log log1p log2 log10 relu".split(), (POSITIVE,)),
    **dict.fromkeys("tan arcsin arccos arctanh".split(), (UNIT,)),
    "arccosh": (OVER_1,),
    **dict.fromkeys("divide arctan2 hypot".split(), (REAL, POSITIVE)),
    **dict.fromkeys(["remainder", "fmod"], (REAL, OVER_1)),
    "copysign": (POSITIVE, POSITIVE),
    "float_power": (POSITIVE, REAL),
    "modf 0": (UNIT,),
    "frexp 0": ((1.1, 1.9),),
    "ldexp": [(((2, 3), np.array([1, -2, 0])), {}), ((0.3, np.array([2])), {})],
    "unwrap": [(((2, 4),), {"axis": -1}), (((4,),), {"discont": 4.0})],
    **dict.fromkeys("maximum minimum fmax fmin".split(), [((APART, np.array([[-0.7], [0.4]])), {})]),
    "power": (POSITIVE, REAL),
    **dict.fromkeys(["at least", "at most"], [((APART, np.array([[-0.7], [0.4]])), {}), ((APART, -0.2), {})]),
    "where": [((np.array([True, False, True]), (3,), (2, 3)), {}), ((np.array([[True], [False]]), (), (3,)), {})],
    "astype": [(((2, 3),), {"dtype": np.float64})],
    **dict.fromkeys("sum mean prod max min logsumexp norm".split(), [(((2, 3, 4),), params) for params in AXES]),
    **dict.fromkeys(["var", "std"], [(((2, 3, 4),), params) for params in [*AXES, {"ddof": 1}]]),
    **dict.fromkeys(["cumsum", "cumprod"], [(((2, 3),), {"axis": axis}) for axis in (None, 0, -1)]),
    **dict.fromkeys(
        [f"{name}.accumulate" for name in ("maximum", "minimum", "logaddexp")],
        [(((3, 4),), {"axis": axis}) for axis in (0, -1)],
    ),
    **dict.fromkeys("left_shift right_shift gcd lcm".split(), [((np.array([1, 2]), np.array([2, 1])), {})]),
    "bincount": [((np.array([0, 2, 0]), (3,)), {"minlength": 4})],
    **dict.fromkeys(["softmax", "log_softmax"], [(((2, 3),), {"axis": 0}), (((3,),), {})]),
    "weights of logsumexp": [(((2, 3), (2, 1)), {"axis": -1})],
    "reshape": [(((2, 6),), {"shape": (3, 4)}), (((2, 6),), {"shape": -1})],
    "transpose": [(((2, 3, 4),), {"axes": (1, -1, 0)}), (((2, 3),), {})],
    "broadcast_to": [(((3, 1),), {"shape": (2, 3, 4)}), (((),), {"shape": (2,)})],
    "concatenate": [(((2, 3), (2, 1)), {"axis": -1}), (((2,), (3,), (1,)), {})],
    "stack": [(((2, 3), (2, 3)), {"axis": -1}), (((), (), ()), {})],
    "getitem": [
        (((3, 4),), {"index": (1,)}),
        (((3, 4),), {"index": (slice(None, None, -2), None, Ellipsis, slice(1, 3))}),
        (((3, 4),), {"index": (np.array([0, 2, 0]),)}),
        (((3, 4),), {"index": (np.array([0, 2]), np.array([[1], [1]]))}),
        (((3,),), {"index": (np.array([True, False, True]),)}),
    ],
    "einsum": [
        (((2, 3), (3, 4)), {"subscripts": "ij,jk->ki"}),
        (((2, 3), (3,), (4,)), {"subscripts": "ij,j,k->i"}),
        (((2, 3),), {"subscripts": "ij->"}),
    ],
    "diagonals": [(((3, 3, 2),), {"subscripts": "iij->ij"})],
    "nan_to_num": [(((2, 3),), {})],
    "scatter": [(((2,),), {"shape": (3, 4), "index": (1, slice(1, 3))})],
    "update": [
        (((3, 4), shape), {"index": index, "how": how})
        for how in HOWS
        for shape, index in [((2,), (1, slice(1, 3))), ((3, 1), (np.array([0, 2, 0]),)), ((), (1, np.array([1, 1])))]
        if how != "multiply" or isinstance(index[-1], slice)  # the others name an element twice
    ],
    "tile": [(((2, 3),), {"reps": (2, 2)}), (((3,),), {"reps": (2, 1, 3)}), (((2, 1, 2),), {"reps": 3})],
    "repeat": [(((2, 3),), {"repeats": 2}), (((2, 3),), {"repeats": [2, 0, 1], "axis": 1}), (((),), {"repeats": 2})],
    "flip": [(((2, 3),), {}), (((2, 3),), {"axis": -1}), (((2, 3, 2),), {"axis": (0, 2)})],
    "roll": [(((2, 3),), {"shift": 2}), (((2, 3),), {"shift": -1, "axis": 1})]
    + [(((2, 3),), {"shift": (1, 2), "axis": (0, -1)})],
    "rot90": [(((2, 3),), {}), (((2, 3),), {"k": -1}), (((2, 3, 4),), {"k": 2, "axes": (1, 2)})],
    **dict.fromkeys(["fftshift", "ifftshift"], [(((3, 4),), {}), (((3, 4),), {"axes": 0})]),
    **dict.fromkeys(["triu", "tril"], [(((3, 4),), {}), (((2, 3, 3),), {"k": 1})]),
    "diagonal": [(((3, 4),), {}), (((2, 3, 4),), {"offset": -1, "axis1": -1, "axis2": 0})],
    **dict.fromkeys(["diag", "diagflat"], DIAGONALS),
    "resize": [(((2, 3),), {"new_shape": (2, 4)}), (((2, 3),), {"new_shape": 2})],
    "delete": [(((2, 3),), {"obj": 1}), (((2, 3),), {"obj": [0, 2], "axis": 1})],
    "pad": [(((2, 3),), {"pad_width": 1}), (((2, 3),), {"pad_width": ((0, 2), (1, 0)), "constant_values": 3.0})]
    + [(((2, 3),), {"pad_width": 2, "mode": mode}) for mode in ("edge", "reflect", "symmetric", "wrap")],
    "sliding_window_view": [
        (((4, 5),), {"window_shape": (2, 3), "axis": (0, 1)}),
        (((2, 5),), {"window_shape": (2, 3), "axis": (1, 1)}),
    ],
    "matmul": [
        (shapes, {})
        for shapes in [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4))]
        + [((5, 1, 2, 3), (4, 3, 2)), ((3,), (5, 3, 2)), ((5, 2, 3), (3,))]
    ],
    "mse": [(((2, 3), (2, 3)), {})],
    "less labels": [(((2, 3), np.eye(3, dtype=bool)[[2, 0]]), {})],
    "dense layer": [(((2, 3), (3, 4), (4,)), {"activation": f}) for f in (TABLE[np.tanh], sigmoid, None)],
    **dict.fromkeys(["inv", "det", "cholesky", "eigh", "eigh of upper", "logabsdet", "matrix of cofactors"], SQUARE),
    **dict.fromkeys(["pinv", "svd", "qr"], [(((3, 2),), {}), (((2, 2, 3),), {})]),
    **dict.fromkeys(["median", "nanmedian"], [(((2, 3, 4),), params) for params in AXES]),
    **dict.fromkeys(
        ["quantile", "nanquantile", "percentile", "nanpercentile"],
        [(((2, 3, 4),), {"q": [0.3, 1.0], **params}) for params in AXES],
    ),
    "cross": [(((2, 3), (3,)), {})],
    "diff": [(((3, 4),), {"n": 1, "axis": 1}), (((3, 4),), {"n": 3, "axis": 0})],
    "even slopes": [(((4,),), {}), (((2, 3),), {}), (((5, 2),), {})],
    "blended slopes": [(((4,), (3,)), {}), (((4, 2), (3, 1)), {}), (((1,), 0.5), {})],
    "convolve": [(((3,), (5,)), {}), (((4,), (2,)), {"mode": "same"}), (((4,), (3,)), {"mode": "valid"})],
    "partition": [
        (((2, 5),), {"kth": 2}),
        (((4, 2),), {"kth": (0, 2), "axis": 0}),
        (((2, 3),), {"kth": 1, "axis": None}),
    ],
    "solve": [(((shape, "definite"), b), {}) for shape, b in [((3, 3), (3, 1)), ((2, 3, 3), (3, 2))]],
    "dot": [(((), (), (), (), ()), {"products": 2}), (((2, 3), (2, 3), (2, 3)), {"products": 0})],
    "pack": [(((), (), ()), {"dtype": np.float64})],
}


# Why a function of NumPy's is not in the table.
REASONS = {
    "in place": "copyto put putmask place put_along_axis fill_diagonal",
    "text": "array2string array_repr array_str datetime_as_string",
    "files": "save savetxt savez savez_compressed",
    "dates": "busday_count busday_offset is_busday isnat",
    "complex": "sort_complex real_if_close linalg.eig linalg.eigvals roots",
    "bits": "packbits unpackbits",
    "memory": "may_share_memory shares_memory lib.stride_tricks.as_strided",
    "dtypes": "can_cast min_scalar_type common_type",
    "indices": "ravel_multi_index unravel_index ix_ diag_indices_from tril_indices_from triu_indices_from",
    "shapes": "einsum_path",
    "two or more axes of counts": "histogram2d histogramdd",
    "of np.unique": "unique_all unique_counts unique_inverse unique_values",
    "outdated": "polydiv poly in1d",
}


def sample(spec, rng):
    """An operand for a gradient test: an array or number is one; a shape gives a normal array, or a definite matrix."""
    if isinstance(spec, (np.ndarray, float)):
        return spec
    if len(spec) == 2 and spec[1] == "definite":
        a = rng.normal(size=spec[0])
        return a @ np.swapaxes(a, -1, -2) + 2 * np.eye(spec[0][-1])
    return rng.uniform(-2, 2, spec)


def cases(prim, rng):
    """Operands and parameters to test a primitive on. Element-wise ones: arrays, broadcasting, scalars."""
    samples = SAMPLES.get(prim.name, (REAL,) * len(prim.vjps) if prim.elementwise else [])
    if type(samples) is list:
        for operands, params in samples:
            yield [sample(spec, rng) for spec in operands], params
    else:
        n = len(samples)
        for shapes in [((2, 3),) * n, ((3,), (2, 1), ())[:n], ((),) * n, ((1, 3), (2, 1), (3,))[:n]]:
            yield [rng.uniform(*interval, shape) for interval, shape in zip(samples, shapes)], {}
        yield [float(rng.uniform(*interval)) for interval in samples], {}


def as_values(x):
    """Double-precision arrays as Values, also in a list."""
    if isinstance(x, list):
        return [as_values(i) for i in x]
    return Value(x, np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x


class Strict(unittest.TestCase):
    """Tests in which to call NumPy in a way that it deprecates is an error."""

    def setUp(self):
        catcher = warnings.catch_warnings()
        catcher.__enter__()
        self.addCleanup(catcher.__exit__, None, None, None)
        warnings.simplefilter("error", DeprecationWarning)


class InFolder(Strict):
    """Tests that write files: into a folder of their own."""

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class Own(Value):
    place = None  # and attributes of its own


class OwnTensor(Tensor):
    __slots__ = ("note", "place")


class TestPrimitives(Strict):
    """Room 1: every rule against finite differences, and primitives of users."""

    def test_gradients_of_every_primitive(self):
        rng = np.random.default_rng(SEED)
        for prim in PRIMITIVES.values():
            if not any(prim.vjps) or not prim.builtin or prim.name in GRAPHS:
                continue  # other tests made it
            with self.subTest(primitive=prim.name, seed=SEED):
                tested = list(cases(prim, rng))
                self.assertTrue(tested, f"{prim.name} has no entry in SAMPLES: give it one, so that its rule is tested")
                for operands, params in tested:
                    fixed = [x if x.dtype == bool else None for x in map(np.asarray, operands)]
                    free = [x for x, f in zip(operands, fixed) if f is None]

                    def f(*xs, prim=prim, fixed=fixed, params=params):
                        xs = iter(xs)
                        return prim(*(next(xs) if f is None else f for f in fixed), **params)

                    few = not prim.elementwise or sum(map(np.size, free)) < 6  # of the others once is enough
                    try:
                        check_gradients(f, *free, order=1 + few)
                    except AssertionError as error:
                        self.fail(f"{prim.name}{[np.shape(x) for x in operands]}{params}: {error}")

    def test_own_primitives_take_part_in_everything(self):
        cube = primitive(lambda x: x**3, lambda g, out, x: g * 3 * x**2, name="cube of a test")
        self.assertEqual(cube(2.0), 8.0)
        self.assertEqual(grad(cube)(2.0), 12.0)
        self.assertEqual(grad(grad(cube))(2.0), 12.0)
        check_gradients(cube, np.array([1.0, -2.0]), order=2)
        self.assertEqual(float(cube(Tensor(2.0))), 8.0)
        out = pickle.loads(pickle.dumps(cube(Value(2.0))))
        self.assertEqual(out.item(), 8.0)
        erf = np.frompyfunc(math.erf, 1, 1)
        with self.assertRaisesRegex(TypeError, "not in picograd's table"):
            erf(Value(0.5))
        primitive(erf, lambda g, out, x: g * (2 / math.sqrt(math.pi)) * np.exp(-x * x), scalar=math.erf, name="erf")
        self.assertAlmostEqual(grad(lambda x: erf(x))(0.5), 2 / math.sqrt(math.pi) * math.exp(-0.25))
        for wrong in [lambda: primitive(3), lambda: primitive(np.cbrt), lambda: primitive(np.cbrt, 3)]:
            with self.assertRaises(TypeError):
                wrong()
        bad = primitive(lambda x: x * 2, lambda g, out, x: g * 3, name="wrong rule of a test")
        with self.assertRaisesRegex(
            AssertionError, r"argument 0, element \(0,\): gradient 3\.41\d+, by finite differences 2\.27"
        ):
            check_gradients(bad, np.array([1.0, 2.0]))
        for name in ("cube of a test", "erf", "wrong rule of a test"):
            prim = PRIMITIVES.pop(name)
            TABLE.pop(prim.forward)

    def test_what_is_not_supported_says_so(self):
        v = Value([1.0, 2.0])
        for call, message in [
            (lambda: np.fft.fft(v), "np.fft.fft is not in picograd's table"),
            (lambda: np.linalg.eig(v), r"^np.linalg.eig is not"), (lambda: np.sum(v, out=np.zeros(1)), "'out'"),
            (lambda: np.add(v, v, out=np.zeros(2)), "out="), (lambda: np.subtract.reduce(v), r"^np.subtract.reduce is"),
            (lambda: np.add(v, v, where=[True, False]), "where="), (lambda: np.add.at(v, 0, 1), "add.at"),
            (lambda: np.divide.accumulate(v), "accumulate"), (lambda: np.sum(v, dtype=int), "sum: dtype must be float"),
            (lambda: np.add.reduce(v, out=np.zeros(1)), "out"), (lambda: np.quantile(v, Value(0.5)), "'q' is"),
            (lambda: np.asarray(v), r"\.data\.data"), (lambda: np.array([v, v]), "np.stack"),
            (lambda: np.sum([v, v]), "np.stack"), (lambda: np.pad(v, 1, "mean"), "mean"), (lambda: v + "a", "operand"),
            (lambda: v + None, "operand"), (lambda: np.add(v, None), "add: expected"), (lambda: v * np.array(["a"]),
            "dtype"),
            (lambda: np.linalg.qr(v, "raw"), "np.linalg.qr: mode 'raw'"), (lambda: v + 1j, "operand"),
            (lambda: v.sum(foo=1), "foo"),
            (lambda: np.add(v, 1j), "complex"),
            (lambda: np.linalg.pinv(v, hermitian=True), "np.linalg.pinv: takes a, rcond"),
        ]:  # fmt: skip
            with self.assertRaisesRegex(TypeError, message):
                call()
        array = np.zeros(2)
        with self.assertRaises(TypeError):
            array += v
        with self.assertRaisesRegex(TypeError, "np.where"):
            v[0] = 3.0
        with self.assertRaises(ValueError):
            v + Value([1.0, 2.0, 3.0])

    def test_rules_read_what_they_say(self):
        """`reads` decides what may be written over: a rule must not touch the rest."""
        for prim in PRIMITIVES.values():
            if set(prim.reads.split()) == {"out", "operands"} or prim is picograd.PRIMITIVES["matmul"]:
                continue
            out = np.ones(3) if "out" in prim.reads else None
            for rule in prim.vjps:
                rule(np.ones(3), out, *[None] * len(prim.operands))
            prim.forward(*[np.ones(3)] * len(prim.operands), out=np.empty(3))

    def test_pickles_name_one_primitive(self):
        one = primitive(lambda x: x * 2, lambda g, out, x: g * 2, name="the same")
        two = primitive(lambda x: x * 3, lambda g, out, x: g * 3, name="the same")
        own_tanh = primitive(lambda x: x, lambda g, out, x: g, name="tanh")
        try:
            self.assertRaisesRegex(ValueError, "'the same': another one", pickle.dumps, one(Value(1.0)))
            self.assertEqual(pickle.loads(pickle.dumps(two(Value(1.0)))).forward().item(), 3.0)
            self.assertEqual(copy.deepcopy(one(Value(1.0))).forward().item(), 2.0)
            self.assertRaisesRegex(ValueError, "'tanh': another one", pickle.dumps, own_tanh(Value(1.0)))
            self.assertIs(pickle.loads(pickle.dumps(np.tanh(Value(1.0))))._prim, TABLE[np.tanh])
        finally:
            del PRIMITIVES["the same"]

    def test_errors_in_rules_say_where(self):
        wrong = primitive(
            lambda x, y: x * y, lambda g, out, x, y: g * np.ones(7), lambda g, out, x, y: 1 / 0, name="wrong"
        )
        lists = primitive(lambda x: x.tolist(), lambda g, out, x: g, name="lists")
        text = primitive(lambda x: "text", lambda g, out, x: g, name="text")
        try:
            x = Value([1.0, 2.0])
            for y, error in ((wrong(x, 2.0), ValueError), (wrong(2.0, x), ZeroDivisionError)):
                y.label = "here"
                with self.assertRaisesRegex(error, r"in the rule of wrong 'here', for operands of shapes .*\(2,\)"):
                    y.sum().backward()
            self.assertEqual(lists(x).data.tolist(), [1.0, 2.0])
            self.assertRaisesRegex(TypeError, "text: its forward must give real numbers", text, x)
            self.assertRaisesRegex(TypeError, "argument 'axis' is no operand", np.sum, x, axis=Value(0.0))
        finally:
            for prim in (wrong, lists, text):
                del PRIMITIVES[prim.name]

    def test_a_vjp_is_computed_only_where_needed(self):
        called = []
        prim = primitive(
            lambda x, y: x * y,
            lambda g, out, x, y: called.append("x") or g * y,
            lambda g, out, x, y: called.append("y") or g * x,
            name="spy of a test",
        )
        try:
            w = Value([1.0])
            for x in (np.ones(1), Tensor([1.0]), 2.0, Value([1.0]).detach(), Value([1.0]) > 0):
                prim(x, w).backward()
            self.assertEqual(called, ["y"] * 5)
        finally:
            TABLE.pop(PRIMITIVES.pop(prim.name).forward)


class TestArrays(Strict):
    """Room 3 (and the configuration of room 2)."""

    def tearDown(self):
        if not CUT:
            set_distributed_config(**vars(picograd.DistributedConfig()))

    def test_numbers_and_lists_beside_tensors_settle_dtypes_alike(self):
        t = Tensor([1.0, 2.0])
        for f in (
            lambda: np.fmod(t, np.float64(3)),
            lambda: np.copysign(t, [1.0, 2.0]),
            lambda: np.add.outer(t, 3),
            lambda: np.multiply.outer(t, [1, 2]),
            lambda: np.add.outer(t, Tensor(np.array(2), dtype=int)),
            lambda: np.maximum.accumulate(t),
            lambda: np.ldexp(t, [1, 2]),
        ):
            self.assertEqual(f().dtype, np.float32)

    def test_gradients_do_not_end_in_silence_beside_tensors(self):
        t = Tensor(np.array([1.0, 2.0, 3.0]), dtype=np.float64)
        for f in (  # NumPy finds the Tensor, and does not look for Values there
            lambda v: np.dot(t, [v, v, v]),
            lambda v: np.pad(t, 1, constant_values=v),
            lambda v: np.copyto(t, [v, v, v]),
            lambda v: np.interp(1.5, t, [v, v, v]),
            lambda v: setattr(t, "data", v),
        ):
            with self.assertRaisesRegex(TypeError, "gradient ends here"):
                picograd.grad(f)(2.0)
            with self.assertWarnsRegex(UserWarning, "gradient ends here"):
                f(Value(2.0))
            f(Value(2.0).detach())
        self.assertEqual(grad(lambda v: np.sum(t, initial=v))(2.0), 1.0)

    def test_arguments_may_be_arrays_of_no_dimensions(self):
        for x in (Value(np.eye(3)), Tensor(np.eye(3))):
            self.assertEqual(np.sum(x, axis=np.array(0)).shape, (3,))
            self.assertEqual(x.transpose(np.array([1, 0])).shape, (3, 3))
            self.assertEqual(x.flatten("C").tolist(), x.reshape(9, order="C").tolist())
            self.assertRaises(TypeError, x.copy, "F")
        np.sum(x := Value(np.eye(3)), axis=np.array(0)).sum().backward()

    def test_every_place_of_out_is_written(self):
        t, out = Tensor([[1.0, 2.0], [3.0, 4.0]]), np.zeros((2, 2), np.float32)
        for f, expected in (
            (lambda: np.dot(t, t, out), [[7.0, 10.0], [15.0, 22.0]]),
            (lambda: np.concatenate([t[:1], t[1:]], 0, out), [[1.0, 2.0], [3.0, 4.0]]),
            (lambda: np.einsum("ij,jk", t, t, out=out), [[7.0, 10.0], [15.0, 22.0]]),
        ):
            self.assertIs(f(), out)
            self.assertEqual(out.tolist(), expected)
        whole, rest = np.divmod(Tensor([1.0, 3.0]), 2.0, out=(buffer := np.zeros(2), None))
        self.assertIs(whole, buffer)
        self.assertEqual((whole.tolist(), rest.tolist()), ([0.0, 1.0], [1.0, 1.0]))

    def test_functions_that_write_to_an_argument_write_to_it(self):
        t, buffer = Tensor([1.0, 2.0]), np.zeros(2)
        np.copyto(buffer, t)
        self.assertEqual(buffer.tolist(), [1.0, 2.0])
        np.put(buffer, [0], Tensor([5.0]))
        self.assertEqual(buffer.tolist(), [5.0, 2.0])
        self.assertIs(np.cumsum(t, 0, None, buffer), buffer)
        self.assertEqual(buffer.tolist(), [1.0, 3.0])
        u = Tensor([0.0, 0.0])
        self.assertIs(np.cumsum(t, 0, None, u), u)
        self.assertEqual(np.ldexp(t, np.array([1, 2])).tolist(), [2.0, 8.0])
        self.assertEqual(np.add.outer(Tensor(0.5), t).dtype, np.float32)

    def test_methods_take_numpys_order_of_arguments(self):
        x = np.arange(6.0).reshape(2, 3)
        for f in (
            lambda x: x.std(0, None, None, 1),
            lambda x: x.max(0, None, True),
            lambda x: x.mean(1, None, None, True),
            lambda x: x.sum(0),
            lambda x: x.var(ddof=1),
        ):
            for kind in (Value, Tensor):
                np.testing.assert_allclose(np.asarray(f(kind(x)).data.data), f(x), rtol=1e-6)
        self.assertEqual(Tensor(x).sum(dtype=float).item(), 15.0)

    @mock.patch.dict(TABLE)
    @mock.patch.dict(PRIMITIVES)
    def test_scalar_forms_of_users_are_checked(self):
        root = picograd.primitive(np.sqrt, lambda g, out, x: g / (2.0 * out), name="root", scalar=lambda x: x**0.5)
        with np.errstate(invalid="ignore"):
            self.assertTrue(math.isnan(root(Value(-1.0)).item()))
        sine = picograd.primitive(lambda x: np.sin(x), lambda g, out, x: g, name="sine", scalar=np.sin)
        self.assertEqual((sine(Value(1.0)) * Value([1.0])).dtype, np.float32)

    def test_functions_outside_the_table_settle_dtypes_alike(self):
        t, r = Tensor([1.0, 2.0]), np.array([0.1, 0.2])
        for out in (
            np.add(t, r, where=True),
            np.copysign(t, r),
            np.fmod(t, np.array([3, 4])),
            np.multiply.outer(t, np.arange(3)),
            np.hypot.outer(r, t),
            np.cbrt(Tensor(8.0)) * t,
            np.interp(Tensor(0.5), [0.0, 1.0], [0.0, 1.0]) * t,
        ):
            self.assertEqual(out.dtype, np.float32)
        self.assertEqual(np.bincount(Tensor([1, 1], dtype=int), Tensor([0.5, 1.0])).tolist(), [0.0, 1.5])

    def test_a_function_with_out_returns_it(self):
        t, u = Tensor([1.0, 2.0]), Tensor([0.0, 0.0])
        for call in (
            lambda: np.add(t, 1, out=u),
            lambda: np.clip(t, 0, 1, out=u),
            lambda: np.cumsum(t, out=u),
            lambda: np.multiply(t, t, out=(u,)),
        ):
            self.assertIs(call(), u)
        self.assertEqual(u.tolist(), [1.0, 4.0])

    def test_what_an_entry_does_not_take_is_numpys(self):
        t = Tensor([[1.0, 2.0], [3.0, 5.0]])
        for f in (
            lambda x: np.std(x, 0, None),
            lambda x: np.var(x, 0, None, None, 1),
            lambda x: np.max(x, 0, None, True),
            lambda x: np.max(x, initial=9.0),
            lambda x: np.var(x, correction=1),
            lambda x: np.pad(x, 1, mode="edge"),
            lambda x: np.where(x > 1)[0],
            lambda x: np.linalg.norm(x, 1),
        ):
            np.testing.assert_allclose(np.asarray(f(t)), f(t.data), rtol=1e-6)
        with self.assertRaises(TypeError):
            np.sum(t, nonsense=1)

    def test_integers_stay_integers(self):
        t = Tensor([0, 1], dtype=int)
        self.assertEqual([(t + 1).dtype, (2 * t).dtype, (t // 2).dtype], [np.int64] * 3)
        self.assertEqual((t + 0.5).dtype, np.float64)
        t += 1
        self.assertEqual(Value([1.0, 2.0, 3.0])[t].tolist(), [2, 3])

    def test_dtypes(self):
        self.assertEqual(Tensor([1, 2]).dtype, np.float32)
        self.assertEqual(Tensor(np.arange(3.0)).dtype, np.float32)
        self.assertEqual(Tensor(np.arange(3), dtype=int).dtype, int)
        self.assertEqual(Tensor([True], dtype=bool).dtype, bool)
        self.assertEqual(Tensor(Tensor([1], dtype=int)).dtype, int)
        self.assertEqual(Tensor(3).dtype, np.float64)
        self.assertEqual((Tensor([1, 2]) * np.arange(2.0)).dtype, np.float32)
        self.assertEqual((Tensor([1, 2]) * Tensor(2.0)).dtype, np.float32)
        self.assertEqual((Tensor(2.0) * np.arange(2.0)).dtype, np.float64)
        self.assertEqual((Tensor([1, 2], dtype=float) * np.arange(2)).dtype, np.float64)
        self.assertEqual((Tensor([1, 2], dtype=int) + np.arange(2)).dtype, int)
        self.assertEqual(Tensor([1, 2]).astype(int).dtype, int)

    def test_bad_data(self):
        for data, error in [
            ([[1, 2], [3]], ValueError), ("ab", TypeError), ([1j], TypeError), (1j, TypeError), (None, TypeError),
            ([None], TypeError), ([object()], TypeError), (["1"], TypeError), ([Value(1.0)], TypeError),
        ]:  # fmt: skip
            for kind in (Tensor, Value):
                with self.assertRaisesRegex(error, "data|np.stack"):
                    kind(data)
        with self.assertRaisesRegex(TypeError, "dtype"):
            Tensor([1], dtype=complex)
        with self.assertRaisesRegex(TypeError, "dtype"):
            Value([1], dtype=int)
        with self.assertRaisesRegex(TypeError, "dtype"):
            Value(Tensor([1], dtype=int))
        with self.assertRaisesRegex(TypeError, "distributed"):
            Tensor([1], distributed="yes")
        with self.assertRaisesRegex(TypeError, "label"):
            Value(1.0, label=3)

    def test_it_copies_what_it_is_given(self):
        for kind in (Tensor, Value):
            a = np.zeros(3, np.float32)
            t = kind(a)
            a[0] = 1
            self.assertEqual(np.asarray(t.data).tolist(), [0, 0, 0])
            t2 = kind(t)
            t2.data.data[0] if kind is Value else t2.data[0]
            t2.data[0] = 5
            self.assertEqual(np.asarray(t.data).tolist(), [0, 0, 0])

    def test_a_0d_tensor_behaves_like_a_number(self):
        t = Tensor(2.5)
        self.assertIs(t == 2.5, np.True_)
        self.assertIs(t < 3, np.True_)
        self.assertEqual(f"{t:.3f} {t}", "2.500 2.5")
        self.assertEqual((float(t), int(t), round(t), abs(-t), bool(t)), (2.5, 2, 2, 2.5, True))
        self.assertEqual(math.sqrt(Tensor(4)), 2.0)
        old = t
        t += 1
        self.assertEqual((float(old), float(t)), (2.5, 3.5))
        self.assertEqual(t.item(), 3.5)
        with self.assertRaises(TypeError):
            len(t)
        self.assertEqual(sorted([Tensor(3), Tensor(1)], key=float)[0], 1)
        self.assertEqual(sum([Tensor(1), Tensor(2)]), 3)
        self.assertIsInstance(t.data, np.float64)

    def test_arithmetic_and_methods(self):
        a = np.arange(6.0).reshape(2, 3)
        t = Tensor(a)
        for got, expected in [
            (t + t, a + a), (1 - t, 1 - a), (t @ t.T, a @ a.T), (a * t, a * a), (-t, -a), (t > 2, a > 2), (t.sum(),
            a.sum()),
            (t.mean(axis=0), a.mean(0)), (t.max(1), a.max(1)), (t.reshape(3, 2), a.reshape(3, 2)), (t.T, a.T),
            (t[1], a[1]),
            (t[t > 2], a[a > 2]), (t.transpose(1, 0), a.T), (np.tanh(t), np.tanh(a)), (np.fft.fftshift(t),
            np.fft.fftshift(a)),
            (np.add.reduce(t), a.sum(0)), (t % 2, a % 2), (t // 2, a // 2), (t.std(), a.std()), (t.clip(1, 2),
            a.clip(1, 2)),
            (np.median(t), np.median(a)), (~(t > 2), ~(a > 2)), (np.linalg.svd(t)[1], np.linalg.svd(a)[1]),
        ]:  # fmt: skip
            self.assertIsInstance(got, Tensor)
            np.testing.assert_allclose(got.data, expected, rtol=1e-5)
        self.assertEqual([row.tolist() for row in t], a.tolist())
        self.assertEqual((len(t), t.shape, t.ndim, t.size, t.nbytes), (2, (2, 3), 2, 6, 24))
        self.assertIs((t + Value(1.0)).__class__, Value)
        self.assertIn(5.0, t)

    def test_in_place(self):
        t = Tensor([1.0, 2.0])
        alias, view = t.data, t[1:]
        t += 1
        t *= np.array([2.0, 3.0])
        t -= t
        self.assertEqual(alias.tolist(), [0, 0])
        self.assertEqual(view.tolist(), [0])
        before = t.tolist()
        for wrong in (lambda x: x.__iadd__(np.ones((2, 2))), lambda x: x.__iadd__(np.ones(3))):
            with self.assertRaises(ValueError):
                wrong(t)
            self.assertEqual(t.tolist(), before)
        ints = Tensor([1, 2], dtype=int)
        with self.assertRaises(TypeError):
            ints /= 2
        self.assertEqual(ints.tolist(), [1, 2])
        np.add(t, 1, out=t)
        self.assertEqual(t.tolist(), [1, 1])
        array = alias = np.ones(2)
        array += t
        self.assertIs(array, alias)
        self.assertEqual(array.tolist(), [2, 2])
        t.data = [7.0, 8.0]
        self.assertEqual((t.tolist(), t.dtype), ([7.0, 8.0], np.float32))

    def test_repr(self):
        self.assertEqual(
            repr(Tensor(np.zeros((1000, 100)))), "Tensor(shape=(1000, 100), dtype=float32, distributed=False)"
        )
        self.assertEqual(
            repr(Tensor([1.5, 2])), "Tensor(shape=(2,), dtype=float32, distributed=False, data=[1.5, 2.0])"
        )
        self.assertEqual(repr(Tensor(1.5)), "Tensor(1.5)")
        self.assertEqual(repr(Tensor(1.5, label="t")), "Tensor(1.5, label='t')")
        self.assertTrue(repr(Tensor([[0.1], [2]], label="t")).endswith(", data=[[0.1], [2.0]], label='t')"))
        whole = Tensor([1, 2], np.uint8)
        self.assertTrue(repr(whole > 1).endswith("dtype=bool, distributed=False, data=[False, True])"))
        self.assertTrue(repr(Tensor(np.where(np.arange(20) < 3, np.nan, np.inf))).endswith(", nan=3)"))

    def test_label(self):
        t = Tensor([1.0, 2.0], label="t")
        for twin in (pickle.loads(pickle.dumps(t)), copy.copy(t), copy.deepcopy(t)):
            self.assertEqual(twin.label, "t")
        self.assertEqual([(t + 1).label, t[0].label, Value(t).label, Value(1.0).data.label], [""] * 4)
        t.label = "u"
        self.assertEqual(t.label, "u")
        for cls in (Tensor, Value):
            with self.assertRaisesRegex(TypeError, f"{cls.__name__}: label must be a string, got 3"):
                cls(1.0, label=3)

    @needs_power
    def test_distributed_switches(self):
        t = Tensor(np.zeros((10, 10)))
        self.assertFalse(t.distributed)
        set_distributed_config(enabled=True, min_elements_for_parallel=100)
        self.assertTrue(t.distributed)
        self.assertFalse(t[0].distributed)
        self.assertFalse(t.sum().distributed)
        t.disable_distributed()
        self.assertFalse(t.distributed)
        t.enable_distributed()
        self.assertTrue((t + 1).distributed)
        self.assertIn("distributed=True", repr(t))
        self.assertFalse(Tensor(np.zeros(1000), distributed=False).distributed)

    @needs_power
    def test_config(self):
        before = get_distributed_config()
        for wrong, error in [
            ({"enabled": 1}, TypeError), ({"num_workers": 0}, ValueError), ({"num_workers": 2.0}, TypeError),
            ({"min_elements_for_parallel": -1}, ValueError), ({"use_processes": None}, TypeError), ({"workers": 2},
            TypeError),
            ({"enabled": True, "num_workers": "4"}, TypeError),
        ]:  # fmt: skip
            with self.assertRaisesRegex(error, list(wrong)[-1]):
                set_distributed_config(**wrong)
            self.assertEqual(get_distributed_config(), before)
        self.assertEqual(set_distributed_config(num_workers=3).num_workers, 3)
        with self.assertRaises(AttributeError):
            get_distributed_config().enabled = True

    def test_pickle_and_copy(self):
        t = Tensor([1.0, 2.0], distributed=None if CUT else True)
        for twin in (pickle.loads(pickle.dumps(t)), copy.copy(t), copy.deepcopy(t)):
            self.assertEqual((twin.tolist(), twin.distributed), ([1.0, 2.0], not CUT))
            twin.data[0] = 9
            self.assertEqual(t.tolist(), [1.0, 2.0])

    # --- one semantics of numbers and dtypes ---

    def test_dtypes_are_those_of_the_contract(self):
        """All pairs of kinds of operand, by a table of what they are together: (held strong, else NumPy)."""
        numbers = {
            "weak": Value(2.0),
            "mask of a number": Value(2.0) > 1,
            "number": 2.0,
            "NumPy's": np.float64(2),
            "int": 2,
        }
        held = {name: Value(np.ones(3), dtype=name) for name in ("float16", "float32", "float64")}
        held |= {f"{name} 0-d": Value(np.array(1.0), dtype=name) for name in ("float32", "float64")}
        held |= {f"{name} Tensor": Tensor(np.ones(3), name) for name in ("float32", "int64", "uint8", "bool")}
        raw = {f"raw {name}": np.ones(3, name) for name in ("float16", "float32", "float64", "int32", "bool")}
        raw |= {"raw 0-d": np.array(1.0), "list": [1, 2, 3]}
        everything = numbers | held | raw
        for (a, x), (b, y) in itertools.product(everything.items(), repeat=2):
            if not any(isinstance(i, (Value, Tensor)) for i in (x, y)):
                continue
            with self.subTest(a=a, b=b):
                plain = [np.asarray(i) if isinstance(i, list) else i for i in (x, y)]
                plain = [i.data if isinstance(i, Tensor) else i.data.data if isinstance(i, Value) else i for i in plain]
                plain = [
                    i.item() if name in numbers and not isinstance(i, (int, float)) else i
                    for name, i in zip((a, b), plain)
                ]
                plain = [
                    float(i) if isinstance(i, np.float64) and name in numbers else i for name, i in zip((a, b), plain)
                ]
                floats = [
                    i.dtype for i in (x, y) if isinstance(i, (Value, Tensor)) and type(i._held) not in (float, bool)
                ]
                floats = [dtype for dtype in floats if dtype.kind == "f"]
                if floats:
                    dtype = np.result_type(*floats)
                    plain = [i.astype(dtype) if hasattr(i, "dtype") and i.dtype.kind in "fiub" else i for i in plain]
                    if len(floats) == 2:
                        self.assertEqual(np.multiply(*plain).dtype, dtype)
                self.assertEqual((x * y).dtype, np.multiply(*plain).dtype)
                self.assertEqual(np.multiply(x, y).dtype, np.multiply(*plain).dtype)

    def test_0d_results_of_arrays_are_strong(self):
        v, w = Value(np.array([1.0, 2.0]), dtype=np.float64), np.array([0.1, 0.2, 0.3])
        for x in (v.sum() / 3, v[0], np.max(v) - 1, v.reshape(1, 2)[0, 0], v.mean() / 1.5, v @ [1.0, 0.0]):
            np.testing.assert_array_equal((x * w).data, w * x.item())
        self.assertEqual((Value([16777216.0], np.float64).sum() == np.array([16777217.0])).tolist(), [False])
        self.assertEqual(np.stack([v[0], Value(2.0)]).dtype, np.float64)
        for f in (np.vstack, np.hstack, np.dstack, np.column_stack, lambda x: np.concatenate(x, None), np.block):
            self.assertEqual(f([Value([1.0]), Value(2.0)][: 1 + (f is not np.column_stack)]).dtype, np.float32)

    def test_bools_and_whole_numbers_are_numpys(self):
        yes = Value(2.0) > 1
        self.assertEqual(((yes + True).item(), (yes + yes).dtype), (True, bool))
        self.assertEqual(((yes + 2).item(), ((yes + 2) * 0.5 * Value([1.0])).dtype), (3, np.float32))
        self.assertEqual((Value(2.0) * True + np.bool_(True)).item(), 3.0)
        with self.assertRaises(OverflowError):
            Tensor([1], np.uint8) + 300
        self.assertEqual((Tensor([250], np.uint8) + 10).tolist(), [4])
        self.assertEqual((Tensor([1, 2], np.int64) * Value([1.0, 1.0])).dtype, np.float32)
        self.assertEqual(MLP(1, [1])(Tensor([[1], [2]], np.int64)).dtype, np.float32)

    def test_the_default_dtype(self):
        with picograd.set_default_dtype(np.float64):
            self.assertEqual(
                {x.dtype for x in (Value([1.0]), Tensor([[1]]), *MLP(2, [1]).parameters())}, {np.dtype(float)}
            )
            self.assertEqual((Value(2.0) * Value([1.0])).dtype, np.float64)
        self.assertEqual(Value([1.0]).dtype, np.float32)
        with self.assertRaisesRegex(TypeError, "floating, got int64"):
            picograd.set_default_dtype(np.int64)
        self.assertEqual(Value([1.0]).dtype, np.float32)

    def test_masked_arrays_are_refused(self):
        masked = np.ma.array([1.0, 2.0], mask=[True, False])
        for call in (lambda: Value(masked), lambda: Tensor(masked), lambda: Value([1.0, 2.0]) * masked):
            self.assertRaisesRegex(TypeError, "mask would be lost", call)

    def test_weak_scalars(self):
        self.assertIs(type((Value(2) * 3 + np.float32(1))._held), float)
        self.assertEqual((Value([1.0]) * Value(2.0)).dtype, np.float32)
        self.assertEqual((Value(2.0) * np.ones(2)).dtype, np.float64)
        self.assertEqual((Value([1.0], dtype=float) * np.ones(1, np.float32)).dtype, np.float64)
        self.assertEqual((np.float64(2) * Value([1.0])).dtype, np.float32)
        self.assertEqual((np.arange(3) * Value(2.0)).dtype, np.float64)
        self.assertEqual(np.stack([Value(1.0), Value(2.0)]).dtype, np.float64)
        self.assertEqual(np.stack([Value(1.0), Value(np.float64(2.0), dtype=float)]).dtype, np.float64)
        self.assertEqual(np.where(Value([1.0]) > 0, Value([1.0]), 0).dtype, np.float32)
        self.assertEqual((Value([1.0]).mean() * 2).dtype, np.float32)
        self.assertIs(type(np.tanh(Value(0.5))._held), float)
        self.assertIs(type(np.sinc(Value(0.5)).sum()._held), float)
        x, y = Value([1.0, 2.0]), Value(3.0)
        (x * y).sum().backward()
        self.assertEqual((y.grad.dtype, x.grad.dtype, float(y.grad)), (np.float64, np.float32, 3.0))


class TestValue(Strict):
    """Room 4: nodes, data and gradients, backward, functions of functions."""

    def test_paths_that_are_spelled_out_do_what_the_one_way_does(self):
        numbers = [2.0, 0.0, -1.5, 3, np.float32(2.0), True]
        arrays = [np.array([1.0, -2.0, 0.0]), np.array([2.0, 0.5, 1.0], np.float32), np.array([1, 2, 3])]
        others = [*numbers, *arrays, Value(0.5), Value(-0.0), Value(arrays[0]), Value(arrays[0], dtype=np.float64)]
        others += [
            Tensor(2.0),
            Tensor(arrays[0]),
            Tensor(arrays[2], dtype=int),
            Value(0.5) > 0.0,
            Value(arrays[0]) > 0.0,
        ]

        def same(a, b):
            self.assertIs(type(a), type(b))
            self.assertIs(type(a._held), type(b._held))
            self.assertEqual((a.dtype, a.shape), (b.dtype, b.shape))
            np.testing.assert_array_equal(a._held, b._held)
            if isinstance(a, Value):
                self.assertEqual(
                    (a._prim, a._params, a._needs, len(a._args)), (b._prim, b._params, b._needs, len(b._args))
                )

        with np.errstate(all="ignore"):
            for forward, (name, _, _) in picograd._OPERATORS.items():
                prim = TABLE[forward]
                for x in (Value(0.7), Value(0.0), Value(arrays[0]), Tensor(arrays[0])):
                    if len(prim.vjps) == 1 and name != "invert":
                        with self.subTest(name=name, x=x):
                            same(getattr(x, f"__{name}__")(), picograd._apply(prim, (x,), {}))
                    for y in others if len(prim.vjps) == 2 else ():
                        for special, args in ((f"__{name}__", (x, y)), (f"__r{name}__", (y, x))):
                            if not hasattr(x, special) or (isinstance(x, Tensor) and isinstance(y, Value)):
                                continue
                            with self.subTest(special=special, x=x, y=y):
                                try:
                                    expected = picograd._apply(prim, args, {})
                                except (TypeError, ValueError) as error:  # masks, and products of numbers
                                    self.assertRaises(type(error), getattr(x, special), y)
                                else:
                                    same(getattr(x, special)(y), expected)

    def test_a_gradient_function_leaves_outer_graphs_alone(self):
        w = Value(2.0)
        h = w * 3.0
        (h * h).backward()
        self.assertEqual((w.grad.item(), h.grad.item()), (36.0, 12.0))
        self.assertEqual(picograd.grad(lambda x: x * h + w * x)(5.0), 8.0)
        self.assertEqual((w.grad.item(), h.grad.item()), (36.0, 12.0))

    def test_a_graph_of_numbers_and_arrays_is_swept_as_one(self):
        a, b, v = Value(2.0), Value(3.0), Value([1.0, 2.0])
        c = a * b + a
        d = (v * c).sum() + c * b
        (d * a + c).backward()
        # c = ab + a; loss = a(3c + cb) + c
        self.assertEqual(a.grad.item(), (3 + 3) * 8.0 + 2.0 * 6.0 * 4.0 + 4.0)
        self.assertEqual(b.grad.item(), 2.0 * (6.0 * 2.0 + 8.0) + 2.0)
        np.testing.assert_array_equal(v.grad.data, [16.0, 16.0])

    def test_operands_of_numbers_are_in_slots(self):
        a = Value(2.0)
        for node, args in ((a * 3.0, (a, 3.0)), (4.0 - a, (4.0, a)), (-a, (a,)), (a.exp(), (a,)), (np.exp(a), (a,))):
            self.assertEqual((node._args, node._params, node._prev), (args, {}, {a}))
        with self.assertRaises(AttributeError):
            a._args = ()

    def test_masks_of_numbers_are_numbers_in_double_precision(self):
        for f in (np.exp, np.sqrt, np.sin):
            out = f(Value(1.0) > 0.0)
            self.assertEqual((out.item(), (out * Value([1.0])).dtype), (f(1.0), np.float32))

    def test_0_d_operands_of_a_rule_are_as_the_forward_met_them(self):
        x, y = Value(np.array(2.1), dtype=np.float16), Value(np.array(3.3), dtype=np.float64)
        (x**y).backward()
        exact = np.float64(np.float16(2.1))
        self.assertEqual(y.grad.item(), exact**3.3 * np.log(exact))

    @mock.patch.dict(TABLE)
    @mock.patch.dict(PRIMITIVES)
    def test_what_a_users_forward_gives_is_checked_on_every_path(self):
        wrong = picograd.primitive(lambda x: x * 1j, lambda g, out, x: g, name="checked")
        for x in (Value([1.0]), Value(2.0), Value(np.array(1.0)), Tensor([1.0])):
            with self.assertRaisesRegex(TypeError, "checked: its forward must give real numbers, got dtype complex"):
                wrong(x)
        for x in (Value([1.0, 2.0]), Value(2.0)):  # a rule that gives nothing
            twice = picograd.primitive(lambda x: [x, x], lambda g, out, x: None, name="checked")(x)
            self.assertEqual(twice.shape, (2, *x.shape))
            twice.sum().backward()
            self.assertFalse(np.any(x.grad.data))

    def test_products_with_one_number_keep_nan(self):
        for a, b in (([[np.nan], [1.0]], [[0.0]]), ([[0.0]], [[np.inf, 1.0]]), ([[np.inf, 0.0]], [[0.0], [0.0]])):
            with np.errstate(invalid="ignore"):
                out = Value(a) @ Value(b)
                np.testing.assert_array_equal(out.data, np.matmul(np.float32(a), np.float32(b)))

    @mock.patch.dict(TABLE)
    @mock.patch.dict(PRIMITIVES)
    def test_joint_rules(self):
        seen = []

        def rule(wanted, g, out, operands, scale):
            seen.append(wanted)
            return [g * scale * operands[1], g * scale * operands[0]]

        product = picograd.primitive(lambda x, y, scale: scale * x * y, rule, name="joint product", joint=True)
        x, y = Value([1.0, 2.0]), Value([3.0, 4.0])
        product(x, y, scale=2.0).sum().backward()
        np.testing.assert_array_equal((x.grad.data, y.grad.data), ([6.0, 8.0], [2.0, 4.0]))
        product(x, Tensor([1.0, 1.0]), scale=2.0).sum().backward()
        self.assertEqual(seen, [[True, True], [True, False]])
        self.assertEqual(picograd.hessian(lambda z: product(z, z, scale=2.0).sum())(np.ones(1)), [[4.0]])

    def test_copies_under_no_grad_keep_their_graph(self):
        x = Value(2.0)
        y = x * x * 3
        with no_grad():
            x2, y2 = copy.deepcopy((x, y))
        y2.forward().backward()
        self.assertEqual(x2.grad, 12.0)
        p = Value([1.0])
        p.grad = 1
        q = copy.copy(p)
        q.grad.data[0] = 7
        self.assertEqual(p.grad.data[0], 1)

    def test_gradients_can_be_written_to_and_follow_the_shape(self):
        x = Value(np.ones(3))
        y = x * 2
        y.sum().backward()
        y.grad *= 0
        x.data = np.ones(4)
        self.assertEqual(x.grad.shape, (4,))
        (x * 2).sum().backward()
        self.assertEqual(x.grad.tolist(), [2] * 4)

    def test_the_readme(self):
        a, b = Value(2.0, label="a"), Value(3.0, label="b")
        c = a * b + a**2
        c.backward()
        self.assertEqual((str(c.data.data), float(a.grad.data), float(b.grad.data)), ("10.0", 7.0, 2.0))

    def test_a_gradient_never_ends_in_silence(self):
        v, buffer = Value(2.0), np.zeros(1)
        ends = {"float": float, "int": int, "sin": math.sin, "buffer": lambda x: operator.setitem(buffer, 0, x)}
        for name, end in ends.items():
            with self.subTest(name):
                with self.assertWarnsRegex(UserWarning, r"gradient ends here.*\.item\(\).*\.detach\(\)"):
                    end(v * 2)
                for f in (grad, value_and_grad, jacobian, hessian):
                    with self.assertRaisesRegex(TypeError, "gradient ends here"):
                        f(lambda x, end=end: (end(x), x * x)[1])(2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for end in ends.values():
                for quiet in (v.detach(), np.floor(v), np.argmax(Value([1.0, 2.0])), Tensor(2.0), v.data, v.grad):
                    end(quiet)
                with no_grad():
                    end(v * 2)
            self.assertEqual(
                (v.item(), bool(v), v > 1, f"{v:.1f}", [5, 6][np.argmax(Value([1.0, 2.0]))]), (2, True, True, "2.0", 6)
            )
            u, m, raw = Value([1.0, 3.0]), Value([[1.0, 2.0], [3.0, 4.0]]), np.arange(4.0).reshape(2, 2)
            for got, expected in [
                (np.asarray(u > 1), [False, True]), (np.array([u > 1, u < 2]), [[False, True], [True, False]]),
                (raw[np.argmax(u), u > 1], [3.0]), (raw[[np.argmax(u), 0]], [[2.0, 3.0], [0.0, 1.0]]),
                (np.asarray(u.detach(), int), [1, 3]), (u[[np.argmax(u), 0]].data, [3.0, 1.0]),
                (u[[u[0] > 2, True]].data, [3.0]), (m[[np.argmax(u), 0], [0, np.argmin(u)]].data, [3.0, 1.0]),
            ]:  # fmt: skip
                self.assertEqual(np.asarray(got).tolist(), expected)
        picked = u[[np.argmax(u), 0]]
        u.data = [5.0, 3.0]
        for way in WAYS:  # a replay reads the index anew
            self.assertEqual(way(picked).forward().tolist(), [5.0, 5.0])
        for call in (lambda: np.asarray(v), lambda: np.array([v, v])):
            self.assertRaisesRegex(TypeError, r"\.data\.data.*np\.stack or np\.block", call)

    # --- a leaf owns its gradient ---

    def test_gradients_share_no_memory(self):
        passes = primitive(lambda x: x + 0, lambda g, out, x: g, name="passes g")
        keeps = primitive(lambda x: x * x / 2, lambda g, out, x: x, name="gives x")
        try:
            for f in (
                lambda a, b: np.sum(a + b),
                lambda a, b: np.sum(np.concatenate([a, b])),
                lambda a, b: a @ (b * 0 + 1) + b.sum(),
                lambda a, b: np.sum(passes(a) + keeps(b)),
                lambda a, b: np.sum(a.reshape(3, 1) + b.reshape(3, 1)),
                lambda a, b: np.sum(np.positive(a)) + np.sum(np.broadcast_to(b, (2, 3))),
            ):
                for make in WAYS:
                    a, b = Value([1.0, 2.0, 3.0]), Value([4.0, 5.0, 6.0])
                    out = make(f(a, b))
                    for _ in range(2):
                        a.grad = b.grad = None
                        out.forward().backward()
                        kept = b.grad.numpy(), b.data.numpy(), a.data.numpy()
                        a.grad *= 0.5
                        a.grad.data[...] = 7
                        for now, then in zip((b.grad, b.data, a.data), kept):
                            np.testing.assert_array_equal(now.data, then)
                results = grad(f, (0, 1))(np.ones(3), np.ones(3))
                self.assertFalse(np.may_share_memory(*results))
                self.assertTrue(all(g.flags.writeable for g in results))
        finally:
            for prim in (passes, keeps):
                del PRIMITIVES[prim.name]

    def test_copies_keep_the_identity_of_nodes(self):
        w = Value([1.0, 2.0], label="w")
        inner = np.tanh(w) * 2
        loss = np.sum(inner**2)
        loss.backward()
        for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
            for order in ((w, inner, loss), (loss, inner, w), {"a": [inner], "b": (loss, {"w": w})}):
                found = {}

                def walk(x, found=found):
                    for i in x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ():
                        walk(i)
                    if isinstance(x, Value):
                        found["w" if x.label else "loss" if not x.ndim else "inner"] = x

                walk(copied(order))
                graph = {id(node) for node in picograd._newest_first(found["loss"])}
                self.assertTrue({id(found["w"]), id(found["inner"])} <= graph)
                np.testing.assert_array_equal(found["inner"].grad.data, inner.grad.data)
                found["w"].grad = None
                found["loss"].backward()
                np.testing.assert_allclose(found["w"].grad.data, w.grad.data)
        twin = copy.copy(w)
        twin.data.data[0], twin.grad.data[0] = 9, 9
        self.assertEqual((w.data.tolist()[0], w.grad.data[0] == 9), (1.0, False))

    def test_copies_of_subclasses_keep_their_state(self):
        for base in (Own, OwnTensor):
            for copied in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
                x = base([1.0, 2.0])
                x.note, x.place = ["a note"], 3
                twin = copied(x)
                self.assertEqual((type(twin), twin.note, twin.place, twin.tolist()), (base, ["a note"], 3, [1.0, 2.0]))

    def test_a_failed_pickle_leaves_nothing_behind(self):
        class Unpicklable:
            def __reduce__(self):
                raise OSError("the disk is full")

        y = Value(1.0)
        nodes = [y := y + 1.0 for _ in range(20_000)]
        for dump in (pickle.dumps, copy.deepcopy):
            with self.assertRaisesRegex(OSError, "full"):
                dump((y, Unpicklable()))
            y.__reduce_ex__(4)
            self.assertEqual(copy.deepcopy(nodes[-5]).item(), nodes[-5].item())

    def test_what_is_assigned_is_checked(self):
        for x in (Value([1.0, 2.0]), Tensor([1.0, 2.0]), Tensor([1, 2], int), Value(2.0)):
            for wrong in (None, "7", b"7", 1 + 2j, np.datetime64("2020-01-01"), np.array(None), object(), "ab"):
                with self.assertRaisesRegex(TypeError, r"\.data: "):
                    x.data = wrong
                if isinstance(x, Value) and wrong is not None:
                    with self.assertRaisesRegex(TypeError, r"\.grad: "):
                        x.grad = wrong
            self.assertIn(x.tolist(), ([1.0, 2.0], [1, 2], 2.0))

    def test_results_under_no_grad_take_no_gradient(self):
        w = Value([1.0, 2.0])
        with no_grad():
            y = w * 2
        self.assertRaisesRegex(TypeError, "no gradient flows", y.sum().backward)
        (y * w).sum().backward()
        self.assertEqual((w.grad.tolist(), y.grad.tolist()), ([2.0, 4.0], [0.0, 0.0]))

    def test_tensors_in_composed_functions_are_read_anew(self):
        x, w = Tensor(np.ones(3)), Value([1.0, 2.0, 3.0])
        for f in (np.outer, np.kron, np.inner, np.vdot, np.append, lambda x, w: np.tensordot(x, w, 0)):
            x.data = np.ones(3)
            out = f(x, w).sum()
            x.data = np.full(3, 10.0)
            self.assertEqual(out.forward().item(), f(x, w).sum().item())
        for f in (np.vstack, np.hstack, np.dstack, np.column_stack, np.block, lambda xs: np.concatenate(xs, axis=None)):
            x.data = np.ones(3)
            out = f([x, w]).sum()
            x.data = np.full(3, 10.0)
            self.assertEqual(out.forward().item(), 36.0)

    def test_a_star_import_brings_the_public_names(self):
        space: dict = {}
        exec("from picograd import *", space)
        self.assertEqual(set(space) - {"__builtins__"}, set(picograd.__all__))
        self.assertEqual(len(picograd.__all__), len(set(picograd.__all__)))
        self.assertRegex(picograd.__version__, r"^\d+\.\d+$")

    def test_copies_of_this_file_that_meet_say_so(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("vendored_a", "vendored_b"):
                shutil.copy(picograd.__file__, Path(folder, f"{name}.py"))
            code = """
                import importlib, numpy as np, vendored_a as a, vendored_b as b
                old, more = a.Value(2.0), a.Value([1.0, 2.0])
                importlib.reload(a)
                x, y = a.Value(2.0), b.Value(3.0)
                for call in (lambda: x * y, lambda: y + x, lambda: np.add(x, y), lambda: more @ b.Value([1.0]),
                             lambda: x * old, lambda: (old * 2.0).backward(), lambda: (old * old).backward(),
                             lambda: np.tanh(old), lambda: more.sum(), lambda: old.backward()):
                    try:
                        call()
                    except TypeError as error:
                        assert "two copies" in str(error), error
                        assert "vendored_b" in str(error) or "anew" in str(error), error
                    else:
                        raise AssertionError("no error")
            """
            run = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True
            )
            self.assertEqual((run.returncode, run.stderr), (0, ""))

    def test_data_and_grad_can_be_assigned(self):
        for start in (2.0, [2.0, 3.0]):
            p = Value(start)
            one = np.ones_like(np.asarray(p.data.data))
            self.assertTrue(np.all(p.grad.data == 0))
            (p * 3).sum().backward()
            lr = 0.5
            p.data -= lr * p.grad
            np.testing.assert_allclose(p.data.data, np.array(start) - 1.5)
            p.data.data -= lr * p.grad.data
            np.testing.assert_allclose(p.data.data, np.array(start) - 3.0)
            p.data = np.array(start)
            np.testing.assert_allclose(p.data.data, start)
            p.grad = 0
            np.testing.assert_allclose(p.grad.data, 0 * one)
            p.grad.data = one
            np.testing.assert_allclose(p.grad.data, one)
            p.grad = None
            np.testing.assert_allclose(p.grad.data, 0 * one)
        p = Value(2.0)
        old = p.data
        p.data += 1e-3
        p.data = old
        self.assertEqual(p.item(), 2.0)
        q = Value([1.0, 2.0])
        q.data[0] = 5.0
        q.data = np.array([1, 2])
        self.assertEqual((q.dtype, q.data.tolist()), (np.float32, [1.0, 2.0]))
        with self.assertRaisesRegex(ValueError, "Value.data"):
            p.data = [1.0, 2.0]
        with self.assertRaisesRegex(ValueError, "Value.grad"):
            q.grad = [1.0, 2.0, 3.0]

    def test_backward_accumulates_into_leaves_and_sets_inner_nodes(self):
        a, b = Value([1.0, 2.0]), Value(3.0)
        c = a * b
        d = (c * c).sum()
        d.backward()
        leaves, inner = [a.grad.tolist(), float(b.grad)], c.grad.tolist()
        d.backward()
        self.assertEqual([a.grad.tolist(), float(b.grad)], [[2 * x for x in leaves[0]], 2 * leaves[1]])
        self.assertEqual(c.grad.tolist(), inner)
        d.backward(retain_grads=False)
        self.assertEqual(c.grad.tolist(), [0.0, 0.0])
        self.assertEqual(float(b.grad), 3 * leaves[1])

    def test_leaves_own_their_gradients(self):
        a, b = Value([1.0, 2.0]), Value([3.0, 4.0])
        c = a + b
        c.backward()
        a.grad.data[0] = 7
        self.assertEqual((b.grad.tolist(), c.grad.tolist()), ([1.0, 1.0], [1.0, 1.0]))
        d = Value(np.zeros((2, 2)))
        d.sum().backward()
        d.grad.data[0, 0] = 7
        self.assertEqual(d.grad.tolist(), [[7.0, 1.0], [1.0, 1.0]])
        seed = np.ones(2, np.float32)
        e = Value([1.0, 2.0])
        (e + 0.0).backward(seed)
        e.grad.data[0] = 7
        self.assertEqual(seed.tolist(), [1.0, 1.0])

    def test_gradient_argument(self):
        x = Value([1.0, 2.0])
        (x * 3).backward(np.array([1.0, 10.0]))
        self.assertEqual(x.grad.tolist(), [3.0, 30.0])
        for wrong in ([1.0], 2.0, [[1.0, 2.0]]):
            with self.assertRaisesRegex(ValueError, "gradient"):
                (x * 3).backward(wrong)
        with self.assertRaisesRegex(TypeError, "no gradient"):
            (x > 0).backward()

    def test_a_failed_backward_changes_nothing(self):
        def raises(g, out, x):
            raise KeyboardInterrupt

        prim = primitive(lambda x: x * 1.0, raises, name="raises in a test")
        try:
            a = Value([1.0, 2.0])
            (a * 2).sum().backward()
            before = a.grad.tolist()
            with self.assertRaises(KeyboardInterrupt):
                (a + prim(a * 3)).sum().backward()
            self.assertEqual(a.grad.tolist(), before)
        finally:
            TABLE.pop(PRIMITIVES.pop(prim.name).forward)

    def test_nodes_without_gradient_are_replayed(self):
        v, t = Value([1.0, -2.0]), Tensor([10.0, 20.0])
        out = (np.where(v > 0, v * t, 0.0) + np.sort(v) + v.detach()).sum()
        self.assertEqual(out.item(), 10 - 1 - 1)
        v.data = [-1.0, 3.0]
        t.data = np.array([1.0, 2.0])
        self.assertEqual(out.forward().item(), 6 + 2 + 2)
        out.backward()
        self.assertEqual(v.grad.tolist(), [1.0, 3.0])
        self.assertTrue(Value(2.0) > 1)
        self.assertFalse(Value(2.0) == Value(1.0))
        with self.assertRaises(ValueError):
            bool(v > 0)

    def test_no_grad(self):
        a = Value([1.0])
        with no_grad():
            b = a * 2
            seen = []
            thread = threading.Thread(target=lambda: seen.append((a * 2)._prev))
            thread.start()
            thread.join()
        self.assertEqual((b._prev, b._op, seen), (set(), "", [{a}]))
        with self.assertRaises(RuntimeError), no_grad():
            raise RuntimeError
        self.assertEqual((a * 2)._prev, {a})

        @no_grad()
        def f():
            return a * 2

        self.assertEqual(f()._prev, set())

    def test_a_chain_of_a_million_nodes(self):
        gc.disable()  # it takes half of the time, and there is nothing to collect
        self.addCleanup(gc.enable)

        def chain(nodes):
            x = y = Value(1.0)
            for _ in range(nodes):
                y = y + 1 / nodes
            return x, y

        x, y = chain(1_000_000)
        y.backward()
        self.assertEqual((float(x.grad), round(y.item(), 6)), (1.0, 2.0))
        y.forward()
        x, y = chain(100_000)  # to copy one takes ten times as long; a recursion fails here, too
        y.backward()
        twin = pickle.loads(pickle.dumps(y))
        self.assertEqual(twin.item(), y.item())
        del twin
        twin = copy.deepcopy(y)
        twin.backward()
        self.assertEqual(float(x.grad), 1.0)
        del twin, y

    def test_pickle_and_copy_of_graphs(self):
        a, b = Value([1.0, 2.0], label="a"), Value(3.0)
        c = (a * b + np.where(a > 1, a[[0, 1]], 0.0)).sum()
        c.backward()
        for twin, leaf in (pickle.loads(pickle.dumps((c, a))), copy.deepcopy((c, a))):
            self.assertEqual((twin.item(), leaf.label, leaf.grad.tolist()), (c.item(), "a", a.grad.tolist()))
            leaf.grad = 0
            twin.backward()
            self.assertEqual(leaf.grad.tolist(), a.grad.tolist())
            leaf.data = [5.0, 6.0]
            twin.forward()
            self.assertEqual(twin.item(), 33 + 11)
        self.assertEqual(copy.copy(c).item(), c.item())

    def test_numbers_and_containers(self):
        v = Value([1.0, 2.0, 3.0])
        self.assertEqual((len(v), v.shape, v.ndim, v.size, v.T.shape), (3, (3,), 1, 3, (3,)))
        self.assertEqual([x.item() for x in v], [1.0, 2.0, 3.0])
        self.assertEqual(sum(v).item(), 6.0)
        with self.assertRaisesRegex(ValueError, "one element"):
            float(v)
        old = c = v + 0
        c += v
        self.assertIsNot(c, old)
        self.assertEqual(f"{Value(1.23456):.2f}", "1.23")
        self.assertEqual(repr(Value(1.5, label="x")), "Value(data=1.5, grad=0.0, label='x')")
        self.assertIn("op='tanh'", repr(np.tanh(v)))
        small = Value([[0.1, 2]], label="w")
        self.assertEqual(repr(small), "Value(shape=(1, 2), dtype=float32, data=[[0.1, 2.0]], label='w')")
        self.assertEqual(str(small[:0]), "Value(shape=(0, 2), dtype=float32, data=[], op='getitem')")
        large = np.ones((3, 3))
        self.assertEqual(repr(Value(large)), "Value(shape=(3, 3), dtype=float32)")
        large[1] = np.nan
        self.assertEqual(repr(Value(large)), "Value(shape=(3, 3), dtype=float32, nan=3)")
        self.assertEqual(v.astype(float).dtype, np.float64)
        x = np.arange(3.0) - v
        self.assertIsInstance(x, Value)
        self.assertIsInstance(Tensor([1.0, 2, 3]) - v, Value)
        self.assertEqual(np.clip(v, 1.5, 2.5).data.tolist(), [1.5, 2.0, 2.5])
        self.assertEqual(v.softmax().shape, (3,))
        self.assertEqual((v.reshape(3, 1) @ v.reshape((1, 3))).shape, (3, 3))
        for f in (relu, sigmoid, softplus, gelu, softmax, log_softmax, logsumexp):
            np.testing.assert_allclose(f(Tensor([1.0, 2.0])).data, f(np.array([1.0, 2.0])), rtol=1e-6)

    def test_random_graphs_against_finite_differences(self):
        rng = np.random.default_rng(SEED)
        unary = [np.tanh, np.sin, sigmoid, np.square, np.negative, gelu, lambda x: np.exp(x * 0.1), softplus]
        binary = [np.add, np.subtract, np.multiply, np.maximum, np.hypot, np.arctan2, np.logaddexp]
        shapes = [(), (3,), (2, 1), (2, 3), (1, 3)]
        for trial in range(40):
            with self.subTest(seed=SEED, trial=trial):
                program = [
                    (rng.integers(2), rng.integers(len(unary)), rng.integers(len(binary)), rng.integers(10**6, size=2))
                    for _ in range(8)
                ]

                def f(*leaves, program=program):
                    nodes = list(leaves)
                    for kind, u, b, (i, j) in program:
                        x, y = nodes[i % len(nodes)], nodes[j % len(nodes)]
                        nodes.append(unary[u](x) if kind else binary[b](x, y + 0.1))
                    return nodes[-1] + nodes[-2]

                check_gradients(
                    f,
                    *(rng.uniform(0.2, 1, shapes[i]) for i in rng.integers(len(shapes), size=3)),
                    rtol=1e-4,
                    atol=1e-6,
                )


class TestGradients(Strict):
    """Room 4: `grad` and its kin, at every order."""

    def test_what_the_function_does_to_its_variable_is_its_own(self):
        def f(x):
            (x * x).backward()
            return 5 * x

        self.assertEqual((picograd.grad(f)(3.0), picograd.grad(f)(Value(3.0)).item()), (5.0, 5.0))

    def test_gradients_need_a_number(self):
        for f in (lambda x: None, lambda x: "a"):
            with self.assertRaisesRegex(TypeError, "must return a Value or number"):
                grad(f)(2.0)
        with self.assertRaisesRegex(ValueError, "twice"):
            grad(lambda x, y: x * y, (0, 0))(2.0, 3.0)

    def test_float64_is_never_rounded(self):
        w = np.array([0.1, 0.2, 0.3])
        exact = np.sum(2 * (1.5 * w - 1) * w)
        f = lambda a: np.sum((a * w - 1) ** 2)  # noqa: E731
        for a in (1.5, np.float64(1.5), np.array(1.5)):
            self.assertAlmostEqual(grad(f)(a), exact, places=14)
        self.assertAlmostEqual(grad(lambda v: np.sum(v * w))([1.0, 2.0, 3.0])[0], 0.1, places=15)
        v = Value(2.0)
        self.assertEqual(np.where(v > 0, w, 2 * w).data.tolist(), w.tolist())
        self.assertEqual((Value(w, np.float64) * (Value([1.0]) > 0)).data.tolist(), w.tolist())
        base = np.array([0.3, 1.7])
        second = grad(grad(lambda c: np.sum(base**c)))(1.3)
        self.assertAlmostEqual(second, np.sum(base**1.3 * np.log(base) ** 2), places=14)
        for make in WAYS:
            out = make(np.sum(Value(1.5) * w * np.array(0.1)))
            self.assertEqual(out.item(), np.sum(1.5 * w * 0.1))

    def test_higher_order(self):
        f = np.tanh
        for _ in range(4):
            f = grad(f)
        t = np.tanh(0.7)
        self.assertAlmostEqual(f(0.7), 8 * t * (1 - t**2) * (2 - 3 * t**2), places=12)
        x = np.array([0.5, -1.0, 2.0])
        np.testing.assert_allclose(
            hessian(lambda x: np.sum(x**3) + x[0] * x[1])(x), np.diag(6 * x) + np.eye(3)[[1, 0, 2]] * [1, 1, 0]
        )
        np.testing.assert_allclose(elementwise_grad(np.sin)(x), np.cos(x))
        np.testing.assert_allclose(elementwise_grad(elementwise_grad(np.sin))(x), -np.sin(x))
        np.testing.assert_allclose(jacobian(lambda x: np.outer(x, x))(x)[0, 1], [x[1], x[0], 0])
        self.assertEqual(jacobian(lambda x: x * 2)(3.0), 2.0)
        self.assertEqual(grad(lambda x, y: x * y, argnums=(0, 1))(2.0, 3.0), (3.0, 2.0))
        self.assertEqual(value_and_grad(lambda x: x**2)(3.0), (9.0, 6.0))
        # A Value in gives a Value out; an outer variable that the inner function closes over is not lost.
        v = Value(2.0)
        out = grad(lambda x: x**3)(v)
        out.backward()
        self.assertEqual((out.item(), float(v.grad)), (12.0, 12.0))
        self.assertEqual(grad(lambda x: x * grad(lambda y: x * y**2)(3.0))(2.0), 24.0)
        self.assertEqual(grad(lambda x: grad(lambda y: x * y)(x) * x)(5.0), 10.0)  # no confusion of x with y
        self.assertIsInstance(grad(lambda x: x**2)(2.0), np.float64)
        self.assertIsInstance(grad(lambda x: np.sum(x**2))(x), np.ndarray)
        with self.assertRaisesRegex(ValueError, r"\(3,\)"):
            grad(lambda x: x * 2)(x)
        with self.assertRaisesRegex(ValueError, "argnums|argument 2"):
            grad(lambda x: x, 2)(1.0)
        with self.assertRaisesRegex(ValueError, r"argnums: names an argument twice: \(0, -2\)"):
            grad(lambda x, y: x * y, (0, -2))(2.0, 3.0)
        with self.assertRaisesRegex(TypeError, "expected real numbers, got dtype complex128"):
            np.polyfit(Value([0.0, 1.0, 2.0]), np.array([1j, 2, 3]), 1)
        with self.assertRaisesRegex(TypeError, "argnums.*got 'x'"):
            grad(lambda x: x, "x")(1.0)
        with no_grad():
            self.assertEqual(grad(lambda x: x**2)(3.0), 6.0)

    def test_arguments_may_be_nests(self):
        Pair = collections.namedtuple("Pair", "one two")
        nest = {
            "w": np.ones((2, 3)),
            "b": 0.5,
            "l": [np.arange(3.0, dtype=np.float32), (np.array(2.0), [1.0, 2.0])],
            "p": Pair(np.ones(1), collections.OrderedDict(e=np.zeros(0))),
        }

        def f(n):
            last = np.sum(n["p"].one) * n["l"][1][0] * np.prod(n["l"][1][1]) + np.sum(n["p"].two["e"])
            return np.sum(np.tanh(n["w"] @ n["l"][0]) * n["b"]) * last

        slopes = grad(f)(nest)
        self.assertEqual((list(slopes), type(slopes["l"]), type(slopes["l"][1])), (list(nest), list, tuple))
        self.assertEqual((type(slopes["p"]), type(slopes["p"].two)), (Pair, collections.OrderedDict))
        self.assertEqual((slopes["l"][0].dtype, slopes["l"][1][1].tolist()), (np.float32, [f(nest), f(nest) / 2]))
        flat, unravel = ravel_nest(nest)
        self.assertEqual((flat.dtype, flat.shape), (np.float64, (14,)))
        again = unravel(flat)
        self.assertEqual((again["b"], again["l"][0].dtype, again["l"][1][0].shape), (0.5, np.float32, ()))
        np.testing.assert_allclose(ravel_nest(slopes)[0], grad(lambda v: f(unravel(v)))(flat), rtol=1e-6)
        values = unravel(Value(flat, np.float64))  # a Value in a nest: Values come out
        twice = grad(f)(values)
        self.assertTrue(all(isinstance(x, Value) for x in (*ravel_nest(values)[:1], twice["b"], twice["p"].two["e"])))
        np.testing.assert_allclose(ravel_nest(twice)[0].data.data, ravel_nest(slopes)[0], rtol=1e-6)
        wide = ravel_nest(nest | {"l": [np.arange(3.0), nest["l"][1]]})[1]
        check_gradients(lambda v: f(wide(v)), flat, order=2)
        square = {"a": np.array([1.0, 2.0]), "b": 3.0}
        rows = hessian(lambda n: np.sum(n["a"] ** 2) * n["b"])(square)
        self.assertEqual((rows["a"]["a"].tolist(), rows["a"]["b"].tolist()), ([[6.0, 0.0], [0.0, 6.0]], [2.0, 4.0]))
        self.assertEqual(grad(lambda x, y: x[0] * y["a"], (0, 1))([Value(2.0)], {"a": 3.0})[0][0].item(), 3.0)
        self.assertEqual((ravel_nest({})[0].shape, ravel_nest(2)[1]([3.0])), ((0,), 3.0))
        for call, error, message in [
            (lambda: grad(f)({"w": None}), TypeError, r"argument 0\['w'\]: .*NoneType"),
            (lambda: ravel_nest([np.ones(1), "a"]), TypeError, r"nest\[1\]: .*str"),
            (lambda: unravel(np.ones(3)), ValueError, r"expected shape \(14,\), got \(3,\)"),
            (lambda: grad(lambda x: [x, x])(1.0), ValueError, "must return one number, got list"),
        ]:
            self.assertRaisesRegex(error, message, call)

    def test_products_with_jacobians(self):
        def f(x, n):
            return {"a": np.sin(x) * n["y"], "b": [x * np.sum(n["y"]), 3.0]}

        x, y, v, g = 0.7, np.array([1.0, 2.0]), np.array([0.5, -1.0]), np.array([3.0, 4.0])
        out, pull = vjp(f, x, {"y": y})
        self.assertEqual((type(out["a"]), type(out["b"][0]), out["b"][1]), (np.ndarray, np.float64, 3.0))
        for _ in range(2):  # as often as one likes
            by_x, by_n = pull({"a": g, "b": (2.0, 1.0)})
            self.assertAlmostEqual(by_x, np.sum(g * np.cos(x) * y) + 2.0 * 3.0)
            np.testing.assert_allclose(by_n["y"], g * np.sin(x) + 2.0 * x)
        again, change = jvp(f, (x, {"y": y}), (2.0, {"y": v}))
        np.testing.assert_array_equal(again["a"], out["a"])
        np.testing.assert_allclose(change["a"], np.cos(x) * 2.0 * y + np.sin(x) * v)
        self.assertAlmostEqual(change["b"][0], 2.0 * 3.0 + x * -0.5)
        self.assertEqual(change["b"][1], 0.0)
        r = lambda x, c: np.sum(x**3) * c + x[0] * x[1]  # noqa: E731
        full = np.diag(6 * y * 2.0) + [[0.0, 1.0], [1.0, 0.0]]
        np.testing.assert_allclose(hvp(lambda x: r(x, 2.0), y, v), full @ v)
        by_y, by_c = hvp(r, (y, 2.0), (v, 0.0))
        np.testing.assert_allclose(by_y, full @ v)
        self.assertAlmostEqual(by_c, np.sum(3 * y**2 * v))
        self.assertEqual(hvp(np.sum, (y,), (v,))[0].tolist(), [0.0, 0.0])  # in silence
        self.assertEqual(jvp(np.square, y.astype(np.float32), v)[1].dtype, np.float32)
        self.assertEqual(jvp(np.sum, y.astype(np.float32), v)[1].dtype, np.float32)
        # They are differentiable themselves, by arguments and by what is passed with them.
        self.assertAlmostEqual(grad(lambda x: jvp(np.sin, x, 1.0)[1])(0.3), -np.sin(0.3))
        self.assertAlmostEqual(grad(lambda g: vjp(np.sin, 0.3)[1](g)[0])(2.0), np.cos(0.3))
        t = Value(2.0)
        hvp(lambda x: r(x, 2.0), y, v * t)[0].backward()
        self.assertAlmostEqual(t.grad.item(), (full @ v)[0])
        w = Value(2.0)
        jvp(lambda x: x * w, w, 1.0)[1].backward()
        self.assertEqual(w.grad.item(), 1.0)
        for call, message in [
            (lambda: pull({"a": [1.0], "b": [1.0, 1.0]}), r"gradient\['a'\]: expected shape \(2,\), got \(1,\)"),
            (lambda: pull([1.0]), "gradient: expected a dict of .*'a', 'b'"),
            (lambda: hvp(np.sum, y, 1.0), r"expected shape \(2,\), got \(\)"),
        ]:
            self.assertRaisesRegex(ValueError, message, call)

    def test_what_else_a_function_returns(self):
        f = lambda x: (x**2, {"half": x / 2, "name": "f", "n": [3]})  # noqa: E731
        slope, extra = grad(f, has_aux=True)(3.0)
        self.assertEqual((slope, extra), (6.0, {"half": 1.5, "name": "f", "n": [3]}))
        self.assertIs(type(extra["half"]), np.float64)
        (value, extra), slope = value_and_grad(f, has_aux=True)(Value(3.0))
        self.assertEqual((value.item(), extra["half"].item(), slope.item()), (9.0, 1.5, 6.0))
        self.assertEqual(grad(lambda x: grad(f, has_aux=True)(x)[1]["half"] * x)(3.0), 3.0)
        with self.assertRaisesRegex(TypeError, "has_aux: .*pair, got"):
            grad(lambda x: x, has_aux=True)(1.0)

    def test_what_does_not_depend_on_the_argument_warns(self):
        w = Value(2.0)
        for f in (lambda x: 3.0, lambda x: w * 2.0, lambda x: x.detach(), lambda x: np.sum(x > 0)):
            with self.assertWarnsRegex(UserWarning, "does not depend on the argument") as caught:
                self.assertEqual(grad(f)(1.0), 0.0)
            self.assertEqual(caught.filename, __file__)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertEqual(grad(lambda n: n["a"] * 2.0)({"a": 1.0, "b": 2.0}), {"a": 2.0, "b": 0.0})
            self.assertEqual(hessian(np.sum)(np.ones(2)).tolist(), [[0.0, 0.0], [0.0, 0.0]])
            check_gradients(lambda x: 3.0 * x, 2.0, order=2)

    def test_checkpoints_keep_results_only(self):
        rng, inner = np.random.default_rng(0), []
        w = Value(rng.normal(size=(3, 3)), np.float64)

        def layer(x, shift=0.0):
            h = np.tanh(x @ w)
            inner.append(weakref.ref(h))
            return h * x + w[0] + shift

        kept = checkpoint(layer)
        forms = [
            (lambda x: kept(kept(x, shift=0.5)), lambda x: layer(layer(x, shift=0.5))),
            (
                lambda x: checkpoint(lambda x: kept(kept(x) * 2.0) + kept(x))(x),
                lambda x: layer(layer(x) * 2.0) + layer(x),
            ),
            (
                lambda x: np.prod(np.stack([*checkpoint(lambda x: (x.sum(), x.mean() + w[0, 0]))(x)])),
                lambda x: x.sum() * (x.mean() + w[0, 0]),
            ),
            (lambda x: checkpoint(lambda x: {"y": [x * w, 2], "x": x})(x)["y"][0], lambda x: x * w),
        ]
        for short, long in forms:
            x = Value(rng.normal(size=(3, 3)), np.float64)
            del inner[:]
            out = short(x).sum()
            self.assertEqual([h() for h in inner], [None] * len(inner))
            for way in (lambda y: y, copy.deepcopy, lambda y: pickle.loads(pickle.dumps(y)), *WAYS[1:]):
                self.assertAlmostEqual(way(out).forward().item(), long(x).sum().item(), places=12)
            for way in WAYS:
                w.grad = x.grad = None
                way(out).backward()
                got = x.grad.data.copy(), w.grad.data.copy()
                w.grad = x.grad = None
                long(x).sum().backward()
                for g, v in zip(got, (x, w)):
                    np.testing.assert_allclose(g, v.grad.data, rtol=1e-12, atol=1e-12)
            check_gradients(lambda x, short=short: np.tanh(short(x)), x, order=2)
            w.data = w.data * 0.5  # a replay reads anew
            self.assertAlmostEqual(out.forward().item(), long(x).sum().item(), places=12)

    def test_checkpoints_of_all_sorts(self):
        number = checkpoint(lambda x: np.exp(x) * x)
        self.assertIs(type(number(Value(2.0))._held), float)
        self.assertAlmostEqual(grad(grad(number))(2.0), 4.0 * math.exp(2.0))
        v, half = Value(2.0), Value([1.0, 2.0])
        a, b, c = checkpoint(lambda x: (x * half, x * 2.0, x > 0))(v)
        self.assertEqual((a.dtype, type(b._held), c.item()), (np.float32, float, True))
        self.assertIs(checkpoint(lambda x: x)(v), v)
        self.assertEqual(checkpoint(lambda: 3)(), 3)
        draws = checkpoint(lambda x: x * np.random.default_rng().normal(size=2))(v)
        self.assertEqual(draws.forward().tolist(), draws.tolist())  # the same random numbers
        draws.sum().backward()
        self.assertAlmostEqual(v.grad.item(), draws.data.data.sum() / 2.0)
        t = Tensor([1.0, 2.0])
        out = checkpoint(lambda x: (x * t) ** 2)(v)
        t.data = [3.0, 4.0]
        self.assertEqual(out.forward().tolist(), [36.0, 64.0])
        out.label = "out"
        wrong = primitive(lambda x: x * 2.0, lambda g, out, x: g * np.ones(7), name="wrong in a checkpoint")
        bad = checkpoint(lambda x: wrong(x).sum())(half)
        with self.assertRaisesRegex(ValueError, "in the rule of wrong in a checkpoint"):
            bad.backward()
        del PRIMITIVES[wrong.name], TABLE[wrong.forward]
        with no_grad():
            self.assertIsNone(number(v)._prim)
        model = MLP(2, [3, 1], seed=0)
        loss = checkpoint(model)(np.ones((4, 2))).sum()
        loss.backward(retain_grads=False)
        got = [p.grad.data.copy() for p in model.parameters()]
        model.zero_grad()
        model(np.ones((4, 2))).sum().backward()
        for g, p in zip(got, model.parameters()):
            np.testing.assert_allclose(g, p.grad.data, rtol=1e-6)
        with self.assertRaisesRegex(TypeError, "expected a function, got 3"):
            checkpoint(3)

    def test_where_inf_and_nan_come_from(self):
        x = Value([0.0, 1.0, 2.0], label="x")
        with np.errstate(all="ignore"):
            self.assertIsNone(find_nonfinite(np.sum(x * 2.0)))
            y = (x - 1.0) / 2.0
            z = 1.0 / y
            z.label = "z"
            text = find_nonfinite(np.sum(z * 0.0))
            for part in (r"values: divide 'z' has inf in 1 of 3, shape \(3,\)", "operand 0: constant",
                         r"operand 1: divide made of subtract, constant, shape \(3,\), -0.5 to 0.5"):  # fmt: skip
                self.assertRegex(text, part)
            self.assertNotIn("np.where", text)
            for way in WAYS:
                loss = way(np.sum(np.where(x > 0, np.sqrt(x) * 2.0, 0.0)))
                x.grad = None
                self.assertIsNone(find_nonfinite(loss))
                loss.backward()
                text = find_nonfinite(loss)
                self.assertRegex(text, r"^gradients: the rule of sqrt gives leaf 'x' nan in 1 of 3")
                self.assertRegex(text, r"branch of np.where.*\n.*np.where\(ok, f\(np.where\(ok, x, 1.0\)\), 0.0\)")
            x.grad = None
            for kept in (np.log, checkpoint(np.log)):
                loss = np.sum(kept(x))
                loss.backward(retain_grads=False)
                self.assertRegex(
                    find_nonfinite(loss), "values: log has inf in 1(.|\n)*the rule of log gives leaf 'x' inf"
                )
            x.grad = None
            masked = np.where(Tensor([True, False, True]), x, -np.inf)
            self.assertIsNone(find_nonfinite(np.sum(softmax(masked))))  # infinite on purpose
            self.assertRegex(
                find_nonfinite(masked.sum()), r"where has inf(.|\n)*operand 2: constant, .*, inf in 1 of 1"
            )
            self.assertRegex(find_nonfinite(Value([np.nan], label="w") * x), "^values: leaf 'w' has nan in 1 of 1")
            logarithm = np.log(Value([0.0, 1.0], label="w")).sum()
            if hasattr(picograd, "optimize"):  # a program within a graph is looked into
                self.assertRegex(find_nonfinite(picograd.optimize(logarithm) * 2.0), "^values: log has inf in 1 of 2")
        with self.assertRaisesRegex(TypeError, "root must be a Value, got float"):
            find_nonfinite(1.0)


class TestCatalogue(Strict):
    """Room 5: every operation on awkward operands, and NumPy's functions on Values against NumPy."""

    def test_updates_at_an_index_are_numpys(self):
        rng = np.random.default_rng(SEED)
        a = rng.normal(size=(3, 4))
        places = [
            1,
            (slice(None), -2),
            [0, 2, 0],
            (np.array([0, 2, 0]), [1, 1, 1]),
            a > 0,
            (None, 1),
            ...,
            (),
            np.zeros(0, int),
        ]
        for index, (how, ufunc) in itertools.product([*places, slice(0, 0)], HOWS.items()):
            shape = a[index].shape
            for x in [rng.normal(size=shape), rng.normal(size=shape[1:]), 0.3]:
                expected = a.copy()
                if ufunc is None:
                    expected[index] = x
                else:
                    ufunc.at(expected, index, x)
                for left, right in itertools.product([Value, Tensor], [Value, Tensor, lambda x, dtype: x]):
                    out = getattr(left(a, np.float64).at[index], how)(right(x, np.float64))
                    np.testing.assert_allclose(out.data if left is right is Tensor else np.asarray(out.data), expected)
        for how in HOWS:  # ties, zeros and repeats
            v = Value([1.0, 2.0, 0.0])
            out = getattr(v.at[np.array([0, 0, 2])], how)(Value([1.0, 1.0, 0.0]))
            if how == "multiply":
                self.assertRaisesRegex(TypeError, "names an element twice.*in the rule of update", out.sum().backward)
                continue
            out.sum().backward()
            shares = {"set": 0, "add": 1, "min": 1 / 3, "max": 1 / 3}
            self.assertAlmostEqual(v.grad.data[0], shares[how], places=6)
        v, t = Value([1.0, 2.0, 3.0]), Tensor([0, 2], np.int64)
        out = v.at[t].multiply(Value(np.array([2.0, 3.0]), np.float64))
        self.assertEqual((out.dtype, v.tolist()), (np.float32, [1.0, 2.0, 3.0]))
        t.data = [1, 1]  # a replay reads it anew
        for make in WAYS:
            self.assertEqual(make(out).forward().tolist(), [1.0, 12.0, 3.0])
        self.assertIs(type(Value(2.0).at[()].set(3)._held), float)
        self.assertIsInstance(Tensor([1, 2]).at[0].set(Value(9.0)), Value)
        for call, error, message in [
            (lambda: v.at.set(3), TypeError, "expected an index"),
            (lambda: v.at[0].set("a"), TypeError, "at: expected"),
            (lambda: v.at[5].set(3), IndexError, "out of bounds"),
            (lambda: v.at[:2].add([1.0] * 3), ValueError, "broadcast"),
        ]:
            self.assertRaisesRegex(error, message, call)

    def test_what_was_kept_for_other_parameters_is_not_taken(self):
        for index, slope in (((0, 1), [0.0, 0.0]), ((False, True), [1.0, 0.0]), ((0, 1), [0.0, 0.0])):
            v = Value([3.0, 4.0])
            np.delete(v, index).sum().backward()
            self.assertEqual(v.grad.tolist(), slope)

    def test_corners_of_products_and_determinants(self):
        self.assertEqual(np.inner(Value(2.0), np.ones((2, 3))).shape, (2, 3))
        v = Value(np.diag([1e-23, 1e-23]))
        np.linalg.det(v).backward()
        np.testing.assert_allclose(v.grad.data, np.diag([1e-23, 1e-23]), rtol=1e-6)
        slopes = picograd.grad(np.linalg.det)(v := Value(np.eye(2))).sum()
        with picograd.no_grad():
            slopes.backward()
        np.testing.assert_allclose(v.grad.data, [[1.0, -1.0], [-1.0, 1.0]])
        self.assertEqual(picograd.hessian(np.linalg.det)(np.zeros((0, 0))).shape, (0, 0, 0, 0))
        x, y = Value(math.nan), Value(0.0)
        (x**y).backward()
        self.assertEqual(x.grad.item(), 0.0)
        for out in (np.kron(Value(2.0), 3.0), np.take(Value(2.0), 0)):  # of weak numbers alone
            self.assertEqual((out * Value([1.0])).dtype, np.float32)

    def test_axes_and_indices_are_checked_as_numpy_does(self):
        m, v = Value(np.arange(4.0).reshape(2, 2)), Value(np.arange(3.0))
        for f in (
            lambda: np.take(m, 0, axis=2),
            lambda: np.flip(m, 2),
            lambda: np.flip(v, (0, 0)),
            lambda: np.fliplr(v),
            lambda: np.diff(m, axis=3),
            lambda: np.diff(v, n=-1),
            lambda: np.tensordot(m, m, ([2], [0])),
            lambda: np.rot90(m, 1, (0, 0)),
            lambda: np.diag(Value(np.ones((2, 2, 2)))),
            lambda: np.average(m, axis=0, weights=[1.0]),
        ):
            with self.assertRaises(ValueError):
                f()
        with self.assertRaisesRegex(TypeError, "indices must be integers"):
            np.take(m, [True, False])
        self.assertEqual((v[[]].shape, np.take(v, []).shape), ((0,), (0,)))
        self.assertEqual(np.take_along_axis(Value(np.ones((3, 4))), np.array([[1]]), 1).shape, (3, 1))
        self.assertEqual(v[np.argmax(v) - 1].item(), 1.0)
        self.assertEqual([5, 6, 7][np.argmax(v)], 7)

    def test_what_numpy_refuses_is_refused(self):
        m, c, number = Value(np.ones((3, 4))), Value(np.ones((2, 2, 2))), Value(2.0)
        for f in (
            lambda: np.linalg.norm(c, axis=(0, 1, 2)),
            lambda: np.linalg.norm(c, "fro"),
            lambda: np.linalg.norm(m, axis=(0, 3)),
            lambda: np.linalg.outer(m, m),
            lambda: np.einsum("...i->i", m),
            lambda: np.einsum("ij", number),
            lambda: np.einsum("ij,j->i", m, m),
            lambda: np.einsum("ij,ij", m),
            lambda: np.take_along_axis(m, np.array([0, 1]), 1),
            lambda: np.take_along_axis(m, np.array([[0, 1]]), None),
            lambda: np.take_along_axis(m, np.array([[0]]), 2),
            lambda: np.average(m, weights=[1.0, 2.0, 3.0]),
            lambda: np.average(m, axis=1, weights=np.ones((3, 1))),
            lambda: np.lib.stride_tricks.sliding_window_view(m, 2, axis=3),
            lambda: np.sort(number),
            lambda: np.swapaxes(m, 0, 2),
            lambda: np.expand_dims(m, (0, 0)),
            lambda: np.roll(m, 1, 2),
            lambda: np.repeat(m, 2, 2),
            lambda: m[0].mT,
        ):
            with self.assertRaises((ValueError, TypeError)):
                f()
        t = Tensor([[3.0, 1.0], [2.0, 5.0]])
        self.assertIsNone(t.sort(0))
        self.assertEqual(t.tolist(), [[2.0, 1.0], [3.0, 5.0]])
        with self.assertRaisesRegex(TypeError, "np.sort"):
            m.sort()
        self.assertEqual(m.transpose(None).shape, (4, 3))
        if np.lib.NumpyVersion(np.__version__) >= "2.2.0":
            check_gradients(lambda x: np.pad(x, {1: (1, 2)}) ** 2, np.ones((2, 3)))
        self.assertEqual(np.ones(2).clip(Value([1.0, 3.0]), 4.0).tolist(), [1.0, 3.0])

    def test_compositions_refuse_what_numpy_refuses(self):
        linalg, m, v, c = np.linalg, np.ones((2, 3)), np.array([1.0, 2.0, 4.0]), np.ones((2, 2, 2))
        for f, x, *args in [
            (linalg.matrix_power, m, 2), (linalg.matrix_power, v, 2), (linalg.matrix_power, c, 1.5),
            (lambda x: linalg.multi_dot([x]), m), (lambda x: linalg.multi_dot([x, v, x]), c[0]),
            (lambda x: linalg.multi_dot([x, x, x]), c), (linalg.vector_norm, {"ord": "fro"}, m),
            (np.cov, {"fweights": [-1, 1, 1]}, m), (np.cov, {"fweights": [0.5, 1, 1]}, m),
            (np.cov, {"aweights": [-0.5, 1, 1]}, m), (np.cov, {"ddof": 1.5}, m), (np.gradient, {"edge_order": 3}, v),
            (np.gradient, {"edge_order": 2}, v[:2]), (np.gradient, v, np.ones((3, 3))), (np.polyfit, v, v, -1),
            (np.polyder, v, -1), (np.vander, v, -1), (np.sort, v, 0, "foo"), (np.sort, v, 0, None, "x"),
            (np.average, {"weights": [1.0, 1.0, -2.0]}, v), (np.nanmax, v[:0]), (np.nanmin, {"axis": 0}, m[:0]),
            (np.interp, v, [], []), (np.interp, v, [1.0], [1.0, 2.0]), (np.pad, {"foo": 1}, v, 1, "linear_ramp"),
            (np.pad, v, -1, "linear_ramp"), (np.pad, v[:0], 1, "linear_ramp"),
            (lambda x: np.ediff1d(x > 1), v),
        ]:  # fmt: skip
            options, (x, *args) = (x, args) if isinstance(x, dict) else ({}, (x, *args))
            with self.subTest(function=f.__name__, args=str((x, args, options))[:80]):
                with self.assertRaises(Exception) as caught:
                    f(x, *args, **options)
                for wrap in (Value, Tensor):
                    self.assertRaises(type(caught.exception), f, wrap(x, float), *args, **options)
        self.assertRaises(ValueError, Tensor(v).sort, kind="foo")

    def test_corners_of_compositions_are_numpys(self):
        v, beside, c = np.array([5.0, 3.0, 0.0]), np.array([0.0, np.inf, 1.0]), np.arange(8.0).reshape(2, 2, 2)
        gaps = np.array([[1.0, 2.0, np.nan], [np.nan] * 3])
        for f, *args in [
            (lambda x: np.linalg.multi_dot([x, x]), c), (np.polyder, np.ones((3, 2))), (lambda x: np.vander(x, 0), v),
            (lambda x: np.nanvar(x, ddof=5), v), (lambda x: np.nanvar(x, axis=1, ddof=1), gaps),
            (lambda x: np.geomspace(x, 2.0, 4), np.array([np.nan])),
            (lambda x: np.nanstd(x, axis=0, ddof=1), gaps), (lambda x: np.nanmax(x, axis=1), gaps),
            (np.gradient, beside, np.array([0.0, 1.0, 3.0])), (np.gradient, beside, np.array([0.0, 2.0, 3.0])),
            (np.gradient, np.array(1.0)), (lambda x: np.gradient(x, axis=()), v),
            (lambda x: np.linalg.lstsq(x, x[:, 0], -1)[0], np.array([[1.0, 0.0], [0.0, 0.0]])),
            (lambda x: np.linalg.lstsq(x, x[:, 0], 1)[0], np.array([[1.0, 2.0], [3.0, 5.0]])),
            (lambda x: np.linalg.lstsq(np.zeros((0, 4), x.dtype), x, None)[0], v[:0]),
            (lambda x: np.linalg.tensorsolve(np.zeros((0, 3, 3, 0), x.dtype), x), np.zeros((0, 3))),
            (lambda x: np.pad(x, ((1, 1), (0, 0)), mode="linear_ramp"), np.zeros((2, 0))),
            (lambda x: np.gradient(x, edge_order=0), v), (lambda x: np.gradient(x, edge_order=2), beside),
            (lambda x: np.gradient(x, edge_order=2), np.array([2.0, 1.0, np.inf])),
        ]:  # fmt: skip
            self.agree(f, *args, order=0)
        self.assertEqual(Value(2.0).at[None].set(Value([3.0])).dtype, np.float32)
        self.assertEqual(np.setdiff1d(Value(2.0), np.zeros(1, np.float32)).dtype, np.float32)
        with self.assertRaisesRegex(TypeError, "boolean subtract"):
            np.gradient(Tensor([True, False, True], bool))
        for base, axis in (([2.0, 3.0, 4.0], 0), ([2.0, 3.0, 4.0], -1), ([[2.0], [3.0]], 1)):
            out = np.logspace(Value(v, float), 3.0, 2, base=base, axis=axis)
            np.testing.assert_allclose(out.data.data, np.logspace(v, 3.0, 2, base=base, axis=axis))
        for f in (
            lambda x: np.linspace(x, 3.0, 1, retstep=True)[1],
            lambda x: np.setdiff1d(np.arange(5), x).dtype,
            lambda x: np.interp(x, [1.0, 3.0, 3.0], [1.0, 2.0, 5.0]).tolist(),
        ):
            for wrap in (Value, Tensor):
                np.testing.assert_equal(f(wrap(v)), f(v))
        x, fp = Value(3.0), Value([1.0, 2.0, 5.0])  # of two places that are equal, the last counts
        np.interp(x, np.array([1.0, 3.0, 3.0]), fp).backward()
        self.assertEqual(fp.grad.tolist(), [0.0, 0.0, 1.0])

    def test_whole_numbers_and_narrow_weights_do_not_narrow_a_composition(self):
        def close(got, expected):
            for x, y in zip(
                got if isinstance(got, tuple) else (got,), expected if isinstance(got, tuple) else (expected,)
            ):
                self.assertEqual(x.dtype, np.asarray(y).dtype)
                np.testing.assert_allclose(np.asarray(x if isinstance(x, Tensor) else x.data), y, rtol=1e-12)

        small, signed = np.array([5, 3, 9], np.uint8), np.array([-100, 100], np.int8)
        for f, x in [
            (lambda x: np.linspace(x, 1, 3), small), (lambda x: np.linspace(x[0], x[1], 3), signed),
            (lambda x: np.logspace(x, 1, 3), small), (lambda x: np.gradient(x, np.array([0.0, 1.0, 3.0])), small),
            (lambda x: np.gradient(np.array([1.0, 2.0, 5.0]), x[::-1]), small),
        ]:  # fmt: skip
            close(f(Tensor(x, x.dtype)), f(x))
        close(np.gradient(Value(small, float), small), np.gradient(small.astype(float), small))
        self.assertEqual(np.linspace(Value([3.0]), Tensor([1], np.int64), 3).dtype, np.float32)
        a = np.arange(100.0)
        for w in (np.full(100, 1000.0, np.float16), np.full(100, 2e38, np.float32)):
            for wrap in (Value, Tensor):
                x, y = wrap(a, float), Tensor(w, w.dtype)
                with np.errstate(over="ignore"):
                    close(
                        np.average(x, weights=y, returned=True), np.average(a, weights=w.astype(float), returned=True)
                    )
                    close(np.cov(x, aweights=y), np.cov(a, aweights=w.astype(float)))
        half = Value([60000.0, 60000.0], dtype=np.float16)
        close(np.mean(half, where=[True, True]), np.float16(60000.0))
        self.assertEqual(np.mean(half, where=[True, True], dtype=np.float64).dtype, np.float64)
        for dtype, x in ((np.float32, Value(np.array(0.1), np.float64)), (np.float16, Value([0.1], np.float32)[0] * 1)):
            v = Value([1.0, -1.0], dtype)
            v.at[[0, 1]].min(x).sum().backward()
            self.assertEqual((x.grad.item(), v.grad.tolist()), (1.0, [0.0, 1.0]))

    def test_pieces_by_masks_of_any_kind(self):
        pieces = [lambda x: -x, lambda x: 10.0 * x]
        x, m = np.array([-1.0, 2.0]), np.arange(6.0).reshape(3, 2) + 0.5
        for x, masks in [
            (x, lambda x: x < 0), (x, lambda x: [x < 0]), (x, lambda x: [x < 0, Tensor(x > 1, bool)]),
            (m, lambda x: [x[:, 0] > 2]), (m, lambda x: [x[:, 0] > 2, x[:, 1] < 4]), (m, lambda x: x.T < 3),
        ]:  # fmt: skip
            if isinstance(plain := masks(x), list):
                plain = list(map(np.asarray, plain))
            for wrap in (Value, Tensor):
                out = np.piecewise(wrap(x, float), masks(wrap(x, float)), pieces)
                np.testing.assert_array_equal(np.asarray(out.data), np.piecewise(x, plain, pieces))
            check_gradients(lambda x, masks=masks: np.piecewise(x, masks(x), pieces), x)
        self.assertEqual(np.piecewise(Value(2.0), Value(2.0) > 3, pieces).item(), 20.0)
        mixed = np.piecewise(Value([1.0, 2.0], float), [[True, False]], [Tensor([3.0], np.float16), 1e5])
        self.assertEqual((mixed.dtype, mixed.data.tolist()), (np.float64, [3.0, 1e5]))

    def test_quantiles_with_axes_that_numpy_mixes_have_no_gradient(self):
        x, q = Value(np.arange(12.0).reshape(2, 3, 2), float), np.array([[0.0, 1.0], [0.5, 0.0]])
        for axis in ((0, 1), ()):
            self.assertRaisesRegex(TypeError, "q must have one dimension", np.nanquantile(x, q, axis).sum().backward)
        for axis in (1, (1,), (0, 1, 2), None):
            self.agree(lambda x, axis=axis: np.nanquantile(x, q, axis), x.data.data, order=1)

    def test_what_moves_elements_is_a_view_where_numpys_is(self):
        m = Value(np.arange(12.0).reshape(3, 4))
        for f in (
            np.diagonal, np.flip, np.rot90, np.swapaxes, np.moveaxis, np.split, np.array_split, np.squeeze,
            np.expand_dims, np.atleast_3d, np.ravel, np.transpose,
        ):  # fmt: skip
            args = {np.swapaxes: (0, 1), np.moveaxis: (0, 1), np.split: (2, 1), np.array_split: (3, 1)}
            out = f(m, *args.get(f, (0,) if f is np.expand_dims else ()))
            out = out[0] if isinstance(out, list) else out
            self.assertTrue(np.shares_memory(out.data.data, m.data.data), f.__name__)
        for f in (np.tile, np.repeat, np.roll, np.delete, np.resize):
            self.assertFalse(np.shares_memory(f(m, 1).data.data, m.data.data), f.__name__)
        x = Value(np.ones((300, 300)))  # more elements than positions are kept for
        (np.repeat(x, 2, 0) * 2.0 + np.repeat(x, [2] * 300, 0)).sum().backward()
        self.assertEqual(set(x.grad.data.ravel().tolist()), {6.0})

    def test_usual_powers_are_numpys(self):
        inf, nan = np.inf, np.nan
        rng = np.random.default_rng(SEED)
        corners = [0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 1e-320, -1e-310, 1e-155, 1e155, -1e200, 3e-103, 1e103, -8.0]
        numbers = np.exp(rng.uniform(-5, 5, 5000))
        for dtype in (np.float64, np.float32, np.float16):
            with np.errstate(all="ignore"):
                for x in (np.concatenate([numbers, corners]).astype(dtype), numbers.astype(dtype)):
                    for y in (1, 2, 3, 4, -1, -2, -3, 0.5, 1.5, -0.5, -1.5, 2.5, 0):
                        expected = np.power(x, dtype(y))
                        for got in (Value(x, dtype) ** y, np.power(Tensor(x, dtype), y), Tensor(x, dtype) ** float(y)):
                            got = np.asarray(got.data.data if isinstance(got, Value) else got.data)
                            self.assertEqual(got.dtype, dtype)
                            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
                            fine = np.isfinite(expected)
                            np.testing.assert_array_equal(got[~fine], expected[~fine])
                            np.testing.assert_array_equal(np.signbit(got)[fine], np.signbit(expected)[fine])
                            error = np.abs(got - expected)[fine] / np.spacing(np.abs(expected[fine]))
                            self.assertLessEqual(error.max(), 2.0, (dtype, y))
        t = Tensor(np.full(10_000, 3.0))
        t **= 3
        self.assertEqual(set(t.tolist()), {27.0})

    def test_derivatives_by_both_sides_of_a_power(self):
        self.assertEqual(grad(grad(np.power, 0), 1)(2.0, 0.0), 0.5)
        np.testing.assert_allclose(
            hessian(lambda z: z[0] ** z[1])(np.array([2.0, 0.0])), [[0, 0.5], [0.5, np.log(2) ** 2]]
        )
        x, y = Value(np.array([0.0, 0.0, 2.0])), Value(np.array([0.0, 2.0, 0.0]))
        (x**y).sum().backward()
        self.assertEqual(x.grad.tolist(), [0, 0, 0])

    def test_selection_by_bits_is_that_of_where(self):
        rng = np.random.default_rng(SEED)
        for dtype in (np.float16, np.float32, np.float64):
            g = rng.choice([1.5, -0.0, np.nan, np.inf, -2.0], (80, 90)).astype(dtype)
            for mask in (rng.random((80, 90)) < 0.5, rng.random((80, 1)) < 0.5, (rng.random((90, 80)) < 0.5).T):
                for part in (g, np.broadcast_to(g[0], g.shape), g[:, ::-1]):
                    got, expected = picograd._masked(mask, part), np.where(mask, part, dtype(0))
                    self.assertEqual(got.dtype, dtype)
                    np.testing.assert_array_equal(got, expected)
                    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))

    def test_large_contractions_are_numpys(self):
        rng = np.random.default_rng(SEED)
        for subscripts, *shapes in [
            ("ij,kj->ik", (60, 70), (50, 70)), ("bij,bkj->bik", (5, 30, 40), (5, 20, 40)),
            ("bij,jk", (5, 30, 40), (40, 20)), ("...ij,...jk->...ik", (1, 30, 40), (6, 40, 20)),
            ("bqhd,bkhd->bhqk", (2, 30, 3, 20), (2, 25, 3, 20)), ("ij,j,jk->ik", (40, 50), (50,), (50, 60)),
        ]:  # fmt: skip
            xs = [rng.normal(size=shape) for shape in shapes]
            values = [Value(x, float) for x in xs]
            out = np.einsum(subscripts, *values)
            np.testing.assert_allclose(out.data.data, np.einsum(subscripts, *xs), atol=1e-12)
            seed = rng.normal(size=out.shape)
            out.backward(seed)
            for i, (x, v) in enumerate(zip(xs, values)):
                moved = xs.copy()
                moved[i] = d = rng.normal(size=x.shape)  # it is linear in each
                np.testing.assert_allclose(np.sum(v.grad.data * d), np.sum(np.einsum(subscripts, *moved) * seed))

    def test_methods_are_named_and_described(self):
        self.assertIn("Sum of array elements", Value.sum.__doc__)
        for cls in (Value, Tensor):
            for name in dir(cls):
                method = getattr(cls, name)
                if getattr(method, "__module__", "") == "picograd" and not name.startswith("__dask"):
                    self.assertNotIn("<lambda>", method.__qualname__, name)
                    self.assertEqual(method.__name__.strip("_") or name, name.strip("_"))

    def test_numpys_order_of_arguments(self):
        m = Value(np.arange(6.0).reshape(2, 3))
        for ours, theirs in [
            (np.sum(m, 1, None, None, True), np.sum(m.data.data, 1, None, None, True)),
            (np.var(m, 0, None), np.var(m.data.data, 0)),
            (np.sort(m, 1, "stable"), np.sort(m.data.data, 1)),
            (np.diff(m, prepend=0.0), np.diff(m.data.data, prepend=0.0)),
            (np.einsum("ij->i", m, optimize=True), np.einsum("ij->i", m.data.data)),
            (np.linalg.outer(m[0], m[1]), np.outer(m.data.data[0], m.data.data[1])),
            (np.sum(m, axis=np.int64(1)), np.sum(m.data.data, axis=1)),
        ]:
            np.testing.assert_allclose(ours.data.data, theirs)
            np.sum(ours).backward()
        self.assertEqual(np.mean(m, 0, np.float64).dtype, np.float64)

    def test_deviations_of_float16_do_not_overflow_on_the_way(self):
        x = Value(np.full(1000, 200.0), dtype=np.float16)
        for f in (np.var, np.std):
            self.assertEqual((f(x).item(), f(x).dtype), (0.0, np.float16))
        np.testing.assert_allclose(np.std(Value([300.0, 100.0] * 200, dtype=np.float16)).item(), 100.0)

    def test_empty_and_0d_reductions_have_gradients(self):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for f in (np.mean, np.var, np.std, lambda x: np.prod(x, axis=0)):
                x = Value(np.zeros((0, 3)))
                np.sum(f(x)).backward()
                self.assertEqual(x.grad.shape, (0, 3))
            x = Value([1.0])
            np.var(x, ddof=1).backward()
            self.assertTrue(math.isnan(x.grad.data[0]))
        for f in (np.sum, np.max, np.prod):
            x = Value(1.3)
            f(x, axis=0).backward()
            self.assertEqual(x.grad, 1.0)

    def test_numbers_are_weak_in_every_elementwise_function(self):
        x = Value([1.0, 2.0, 3.0])
        for y in (np.clip(Value(0.5), x, 3.0), np.where(x > 1, Value(0.5), x)):
            self.assertEqual(y.dtype, np.float32)
        for y in (x * np.where(x > 0, Value(1.0), Value(0.1)), np.clip(Value(0.1), np.zeros(2), 1)):
            self.assertEqual(y.dtype, np.float64)  # as NumPy's: a mask is no floating array
        for y in (np.clip(3, Value(1.0), Value(5.0)), np.tensordot(Value(2.0), Value(3.0), 0), np.kron(x[0], x[0])):
            self.assertEqual((y * x).dtype, np.float32)
        joined = np.hstack([Value(np.array(1.5), dtype=np.float32) > 1, np.float16(1.5)])
        self.assertEqual(joined.dtype, np.float64)
        self.assertEqual(np.average(x, weights=Tensor([1, 2, 3], np.int64)).dtype, np.float32)
        both = (Value(3.0) > 1) + (Value(3.0) > 2)
        self.assertEqual((both.dtype, both.item()), (bool, True))

    def test_forward_of_elementwise_primitives_is_numpys(self):
        rng = np.random.default_rng(SEED)
        for key, prim in TABLE.items():
            if (
                not isinstance(key, np.ufunc)
                or not getattr(prim, "elementwise", False)
                or not any("d" in loop for loop in key.types)  # of integers only
            ):
                continue
            with self.subTest(primitive=prim.name, seed=SEED):
                for operands, _ in cases(prim, rng):
                    expected = key(*operands)
                    values = [as_values(np.asarray(x)) if np.ndim(x) else Value(float(x)) for x in operands]
                    got = key(*values)
                    np.testing.assert_allclose(got.data.data, expected, rtol=1e-13)
                    self.assertEqual(got.shape, expected.shape)

    def test_numpy_functions_on_values_are_numpys(self):
        rng = np.random.default_rng(SEED)
        a, b, c = rng.normal(size=(3, 4)), rng.normal(size=(4,)), rng.normal(size=(2, 3, 4))
        square = rng.normal(size=(3, 3))
        programs = [
            (np.reshape, (a, (2, 6))), (np.ravel, (a,)), (np.transpose, (c, (2, 0, 1))), (np.swapaxes, (c, 0, -1)),
            (np.moveaxis, (c, 0, -1)), (np.moveaxis, (c, (0, 1), (-1, 0))), (np.expand_dims, (a, (0, -1))),
            (np.squeeze, (a[None, :, None],)), (np.squeeze, (a[None], 0)), (np.broadcast_to, (b, (3, 4))),
            (np.concatenate, ([a, a], 1)), (np.concatenate, ([a, b[None]], 0)), (np.concatenate, ([a, b], None)),
            (np.stack, ([a, a], -1)), (np.vstack, ([a, b],)), (np.hstack, ([b, b],)), (np.hstack, ([a, a],)),
            (np.dstack, ([a, a],)), (np.dstack, ([b, b],)), (np.column_stack, ([b, b],)), (np.append, (a, b)),
            (np.append, (a, b[None], 0)), (np.repeat, (a, 2)), (np.repeat, (a, [1, 2, 0], 0)), (np.tile, (b, (2, 3))),
            (np.tile, (c, 2)), (np.resize, (a, (2, 5))), (np.delete, (a, 1)), (np.delete, (a, [0, 2], 0)),
            (np.diagflat, (b, 1)), (np.rollaxis, (c, 2)), (np.fft.fftshift, (a,)), (np.fft.ifftshift, (a, 0)),
            (np.pad, (a, 2, "edge")), (np.pad, (a, 1, "reflect")), (np.pad, (a, (1, 2), "symmetric")),
            (np.pad, (a, ((0, 3), (2, 0)), "wrap")), (np.pad, (a, 1)), (np.pad, (a, ((1, 2), (0, 3)))), (np.flip, (c,)),
            (np.flip, (c, (0, -1))), (np.fliplr, (a,)), (np.flipud, (a,)), (np.roll, (a, 2)), (np.roll, (a, -1, 1)),
            (np.roll, (a, (1, 2), (0, 1))), (np.rot90, (a,)), (np.rot90, (a, 3)), (np.rot90, (c, 2, (1, 2))),
            (np.take, (a, [0, 5, 0])), (np.take, (a, [[2, 0]], 0)), (np.sort, (a,)), (np.sort, (a, 0)),
            (np.sort, (a, None)), (np.take_along_axis, (a, np.argsort(a, 0), 0)), (np.diff, (a,)), (np.diff, (c, 2, 1)),
            (np.diagonal, (c,)), (np.diagonal, (c, 1, 2, 0)), (np.diagonal, (a, 9)), (np.diag, (b,)),
            (np.diag, (b, -2)),
            (np.diag, (a, 1)), (np.trace, (a,)), (np.trace, (c, 1)), (np.triu, (a, 1)), (np.tril, (c,)),
            (np.matmul, (a, b)), (np.dot, (a, b)), (np.dot, (b, b)), (np.dot, (2.0, a)), (np.dot, (c, a.T)),
            (np.dot, (a, np.swapaxes(c, 1, 2))), (np.inner, (a, a)), (np.inner, (b, b)), (np.outer, (a, b)),
            (np.vdot, (a, a)), (np.tensordot, (c, a, ([1, 2], [0, 1]))), (np.tensordot, (a, b, 1)),
            (np.tensordot, (a, b, 0)), (np.kron, (a, b)), (np.kron, (b, b)), (np.kron, (a, square)),
            (np.average, (a,)), (np.average, (c, 1)), (np.average, (c, (1, 0), np.exp(a[:, :2]))),
            (np.average, (a, None, a + 5)), (np.average, (c, -1, b)), (np.linalg.norm, (b,)), (np.linalg.norm, (b, 1)),
            (np.linalg.norm, (b, np.inf)), (np.linalg.norm, (a,)), (np.linalg.norm, (a, "fro")),
            (np.linalg.norm, (c, None, (0, 1))), (np.linalg.norm, (a, 2, 1)), (np.linalg.inv, (square,)),
            (np.linalg.det, (square,)), (np.linalg.solve, (square, a)), (np.linalg.cholesky, (square @ square.T,)),
            (np.clip, (a, -0.5, 0.5)), (np.clip, (a, None, 0.5)), (np.nan_to_num, (np.array([1.0, np.nan, np.inf]),)),
            (np.atleast_1d, (1.5,)), (np.atleast_2d, (b,)), (np.atleast_3d, (a,)), (np.atleast_3d, (b,)),
            (np.argmax, (a, 1)), (np.argmin, (a,)), (np.argsort, (a,)), (np.round, (a, 1)), (np.any, (a > 1, 0)),
            (np.all, (a > -9,)), (np.isnan, (a,)), (np.copy, (a,)), (np.cumsum, (a,)), (np.cumprod, (a, 1)),
            (np.max, (c, (0, 2))), (np.amin, (c, -1)), (np.prod, (a, 0)), (np.var, (c, (0, 1))), (np.std, (a,)),
            (np.lib.stride_tricks.sliding_window_view, (a, (2, 2))), (np.sinc, (a,)), (np.matrix_transpose, (c,)),
            (np.lib.stride_tricks.sliding_window_view, (b, 3)), (np.where, (a > 0, a, 0.0)),
            (np.isclose, (a, a + 1e-9)),
            (np.shape, (a,)), (np.size, (a,)), (np.ndim, (a,)), (np.zeros_like, (a,)), (np.full_like, (a, 3)),
            (np.allclose, (a, a)), (np.array_equal, (a, a)),
        ]  # fmt: skip
        for function, args in programs:
            with self.subTest(function=function.__name__, args=str(args)[:80]):
                expected = function(*args)
                got = function(as_values(args[0]), *args[1:])
                got = got.data.data if isinstance(got, Value) else got
                self.assertEqual(np.shape(got), np.shape(expected))
                np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
                tensors = function(*(Tensor(x, x.dtype) if isinstance(x, np.ndarray) else x for x in args))
                np.testing.assert_allclose(np.asarray(tensors), expected, rtol=1e-12, atol=1e-12)

    def test_numpys_functions_have_its_values_and_the_gradients_of_differences(self):
        rng = np.random.default_rng(SEED)
        a, b, c, square = (rng.normal(size=shape) for shape in [(3, 4), (4,), (2, 3, 4), (3, 3)])
        stack, mask, grid = rng.normal(size=(2, 3, 3)), a > 0, np.arange(-2.0, 4.0) + rng.uniform(-0.3, 0.3, 6)
        wide, line, linalg = rng.normal(size=(2, 3)), np.linspace(-1.0, 2.0, 7), np.linalg
        definite, zeros = stack @ stack.mT / 3 + np.eye(3), np.array([0.0, 0.0, 1.5, 0.0, -2.0, 0.0])
        sixes = rng.normal(size=(2, 3, 6)) / 5 + np.eye(6).reshape(2, 3, 6)
        over_0, over_1 = np.exp(b), np.exp(b[::-1])
        programs = [
            (np.hsplit, (a, 2)), (np.hsplit, (b, [1, 3])), (np.vsplit, (a, [1])), (np.dsplit, (c, [3, 1])),
            (np.split, (a, [2, 1, 3], 1)), (np.array_split, (a, 3, -1)),
            (np.broadcast_arrays, (a, b, np.array([[2.0]]))), (np.meshgrid, (b, grid)),
            (np.meshgrid, (b, grid, zeros[:2]), {"indexing": "ij"}), (np.meshgrid, (b, grid), {"sparse": True}),
            (np.partition, (grid[[3, 0, 5, 1, 4, 2]], 2)), (np.partition, (a, (1, 2), 0)), (np.partition, (a, 3, None)),
            (np.compress, ([True, False, True], a, 0)), (np.compress, ([0, 1], a, -1)), (np.compress, (mask[0], a)),
            (np.extract, (mask, a)), (np.choose, ([0, 1, 1, 0], [b, grid[:4]])),
            (np.choose, (np.array([[3, -1], [0, 1]]), c[:, :2, :2]), {"mode": "wrap"}),
            (np.choose, ([2, 0, 1, -3], [b, 1.0]), {"mode": "clip"}),
            (np.select, ([mask, a < -0.5], [a, b], 2.0)), (np.select, ([mask], [a])),
            (np.piecewise, (a, [a < -0.5, mask], [lambda x: x * x, np.exp, 3.0])), (np.piecewise, (b, b > 0, [np.sin])),
            (np.piecewise, (b, [True, False, True, True], [lambda x, k: k * x, 1.0], 3.0)),
            (np.insert, (a, 1, b, 0)), (np.insert, (a, [0, 2], 5.0)), (np.insert, (b, slice(2), np.array([2.0]))),
            (np.insert, (a, [3, 1], np.array([[7.0, 8.0]]), -1)), (np.ediff1d, (a,)),
            (np.ediff1d, (b, np.array([1.0, 2.0]), a)), (np.apply_along_axis, (lambda x: x * x[0], 0, c)),
            (np.apply_along_axis, (lambda x, k: np.sum(x) * k, -1, a, 2.0)),
            (np.apply_along_axis, (lambda x: np.outer(x, x), 1, c)), (np.apply_over_axes, (np.sum, c, (0, -1))),
            (np.apply_over_axes, (np.cumsum, a, 1)), (np.linspace, (a, b, 5)), (np.linspace, (1.0, b, 4, False)),
            (np.linspace, (a, 3, 1), {"axis": -1}), (np.linspace, (b, 3.0, 6, True, True)),
            (np.logspace, (b / 5, b / 3, 3)), (np.logspace, (0, b, 3, False, 2.0), {"axis": 1}),
            (np.geomspace, (over_0, over_1, 5)), (np.geomspace, (-over_0, -over_1, 4, False), {"axis": -1}),
            (np.pad, (a, ((0, 2), (1, 3)), "linear_ramp")), (np.pad, (b, 2, "linear_ramp"), {"end_values": (1.0, -2)}),
            (np.cross, (stack, square[1])), (np.cross, (square.T, stack), {"axisa": 0, "axisc": 1}),
            (np.cross, (square, square.T), {"axis": 0}), (linalg.cross, (square, stack), {"axis": -2}),
            *[(np.convolve, (x, y, mode)) for mode in ("full", "same", "valid") for x, y in [(b, grid), (line, b)]],
            *[(np.correlate, (x, y, mode)) for mode in ("full", "same", "valid") for x, y in [(b, grid), (line, b)]],
            (np.convolve, (b, np.array(2.0))), (np.interp, (a, line, line**2)), (np.interp, (a, grid, zeros, -1.0, 2)),
            (np.interp, (0.3, [0.0, 1.0], np.array([2.0, 5.0]))), (np.interp, (b, [0.5], np.array([2.0]))),
            (np.gradient, (a,)), (np.gradient, (a, 0.5, grid[:4])), (np.gradient, (c, 2.0), {"axis": (0, -1)}),
            (np.gradient, (a, np.array([0.0, 1.0, 3.0])), {"axis": 0, "edge_order": 2}),
            (np.gradient, (b, 0.1), {"edge_order": 2}), (np.vander, (b,)), (np.vander, (b, 3, True)),
            (np.polyval, (b, a)), (np.polyval, ([1.0, 2.0], b)), (np.polyadd, (b, grid)), (np.polysub, (grid, b)),
            (np.polymul, (grid, b)), (np.polyder, (grid, 2)), (np.polyint, (b, 2, 1.0)),
            (np.polyint, (b,)), (np.polyfit, (grid, zeros + line[1:], 2)),
            (np.polyfit, (grid, np.stack([zeros, line[1:]], 1), 1), {"w": np.exp(grid)}),
            *[(linalg.eigh, (x, *args)) for x in (square, stack) for args in [(), ("U",)]], (linalg.eigvalsh, (stack,)),
            *[(linalg.svd, (x,), {"full_matrices": False}) for x in (wide, wide.T, c)], (linalg.svd, (stack,)),
            (linalg.svdvals, (c,)), (linalg.svd, (a,), {"compute_uv": False}),
            *[(linalg.qr, (x,)) for x in (wide, wide.T, c, stack)], (linalg.qr, (c, "r")), (linalg.pinv, (wide,)),
            (linalg.pinv, (c,)), (linalg.pinv, (wide.T, 1e-9)), (linalg.lstsq, (a.T, b)), (linalg.lstsq, (a, a[:, :2])),
            (linalg.lstsq, (wide, wide[:, 0])), *[(linalg.matrix_power, (definite, n)) for n in (-3, -1, 0, 1, 2, 5)],
            (linalg.multi_dot, ([a, c[0].T, square],)), (linalg.multi_dot, ([b, a.T, a, b],)),
            (linalg.tensorsolve, (sixes, wide)), (linalg.tensorinv, (sixes,)),
            (linalg.tensorsolve, (sixes.swapaxes(1, 2), wide, (1,))), (linalg.tensorinv, (definite[0], 1)),
            *[(linalg.cond, (definite, p)) for p in (None, 2, -2, 1, -1, np.inf, "fro")], (linalg.cond, (wide,)),
            *[(linalg.norm, (b, p)) for p in (0, 3, 0.5, -2, 2.5)], *[(linalg.norm, (c, p, -2)) for p in (3, -np.inf)],
            *[(linalg.norm, (c, p, (0, -1), True)) for p in ("fro", "nuc", 1, -1, 2, -2, np.inf, -np.inf)],
            *[(linalg.matrix_norm, (c,), {"ord": p}) for p in ("fro", "nuc", 1, -2)], (linalg.vector_norm, (c,)),
            (linalg.matrix_norm, (a,), {"keepdims": True}), (linalg.diagonal, (c,), {"offset": 1}),
            *[(linalg.vector_norm, (c,), {"ord": p, "axis": (0, -1), "keepdims": True}) for p in (1, 2, 3, np.inf)],
            (linalg.trace, (c,)), (np.vecdot, (c, b)), (np.vecdot, (a, c[1, :, :1]), {"axis": 0}),
            (linalg.vecdot, (c, a), {"axis": -2}), (np.astype, (a, np.float64)),
        ]  # fmt: skip
        if hasattr(np, "unstack"):  # NumPy 2.1
            programs += [(np.unstack, (a,)), (np.unstack, (c,), {"axis": -1})]
        if hasattr(np, "matvec"):  # NumPy 2.2
            programs += [
                (np.matvec, (c, b)),
                (np.matvec, (a, c)),
                (np.vecmat, (c[:, :, :3], a)),
                (np.vecmat, (b, c.mT)),
            ]
        for function, args, *more in programs:
            with self.subTest(seed=SEED, function=function.__name__, args=str((args, more))[:200]):
                self.check_program(function, args, more[0] if more else {})

    def test_vectors_of_equal_values_do_not_turn(self):
        rng = np.random.default_rng(SEED)
        turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(20)]
        turned = [q @ np.diag([2.0, 1.0, 1.0]) @ q.T for q in turns]
        for a in (np.eye(3), np.zeros((3, 3)), np.diag([2.0, 1.0, 0.0]), *turned):
            for f in (np.linalg.eigh, np.linalg.svd):
                v = Value(a, float)
                parts = f(v)
                sum([np.sum(part * rng.normal(size=part.shape)) for part in parts]).backward()
                self.assertLess(np.abs(v.grad.data).max(), 20.0)
                slopes = hessian(lambda x, f=f: np.sum(np.square(f(x)[f is np.linalg.svd])))(a)
                self.assertTrue(np.isfinite(slopes).all())
            slope = grad(lambda x: np.sum(np.square(np.linalg.svdvals(x))))(a)  # in which equal values count alike
            np.testing.assert_allclose(slope, 2 * a, atol=1e-12)

    def test_zeros_in_front_are_trimmed(self):
        for args, slope in [(([0.0, 2.0, 0.0, 3.0, 0.0],), [0, 1, 1, 1, 0]), (([0.0, 2.0, 0.0], "b"), [1, 1, 0])]:
            x = Value(args[0])
            out = np.trim_zeros(x, *args[1:])
            self.assertEqual(out.tolist() if isinstance(out, Tensor) else out.data.tolist(), np.trim_zeros(*args))
            out.backward()
            self.assertEqual(x.grad.tolist(), slope)
        self.assertEqual(np.trim_zeros(Value([0.0, 0.0])).shape, (0,))
        for p in ([0.0, 1.0, 2.0], [0.0, 0.0]):
            out = np.polymul(Value(p), [0.0, 3.0, 1.0])
            self.assertEqual(out.data.tolist(), np.polymul(p, [0.0, 3.0, 1.0]).tolist())

    def check_program(self, function, args, kwargs):
        """A function's value is NumPy's, of Values and of Tensors; its gradients are those of finite differences."""

        def leaves(x):
            return [leaf for part in x for leaf in leaves(part)] if isinstance(x, (list, tuple)) else [x]

        def floats(out):
            return [x for x in leaves(out) if isinstance(x, Value) and x.dtype.kind == "f"]

        def filled(x):
            if isinstance(x, (list, tuple)):
                return type(x)(map(filled, x))
            return next(values) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x

        free = [x for x in leaves([args, *kwargs.values()]) if isinstance(x, np.ndarray) and x.dtype == np.float64]
        expected = leaves(function(*args, **kwargs))
        for wrap in (lambda x: Value(x, np.float64), lambda x: Tensor(x, np.float64)):
            values = iter(map(wrap, free))
            out = leaves(function(*filled(args), **{name: filled(x) for name, x in kwargs.items()}))
            self.assertEqual(len(out), len(expected))
            for got, wanted in zip(out, expected):
                raw = getattr(got, "_held", got)
                self.assertEqual(
                    (np.shape(raw), np.result_type(raw).kind), (np.shape(wanted), np.result_type(wanted).kind)
                )
                np.testing.assert_allclose(raw, wanted, rtol=1e-9, atol=1e-9)

        def f(*xs):
            nonlocal values
            values = iter(xs)
            out = floats(function(*filled(args), **{name: filled(x) for name, x in kwargs.items()}))
            if function in (np.linalg.eigh, np.linalg.svd):  # whose vectors are known up to their sign
                out = [x * x for x in out]
            return sum([np.sum(x * np.cos(np.arange(x.size)).reshape(x.shape)) for x in out])

        check_gradients(f, *free, rtol=1e-4, atol=1e-5)

    def test_gradients_of_compositions(self):
        rng = np.random.default_rng(SEED)
        a, b, c = rng.normal(size=(3, 4)), rng.normal(size=(4,)), rng.normal(size=(2, 3, 4))
        for f in [
            lambda x: np.vstack([x, b]), lambda x: np.roll(x, 2, axis=1), lambda x: np.tile(x, (2, 1)),
            lambda x: np.pad(x, 1) ** 2, lambda x: np.sort(x, axis=0) * np.arange(3)[:, None],
            lambda x: np.diff(x) ** 2,
            lambda x: np.kron(x, b), lambda x: np.outer(x, x), lambda x: np.tensordot(x, x, ([0], [0])),
            lambda x: np.trace(x @ x.T), lambda x: np.diag(x[0]) @ x.T, lambda x: np.average(x, 0, np.exp(x)),
            lambda x: np.repeat(x, [1, 2, 0], axis=0), lambda x: np.rot90(x) ** 2, lambda x: np.array_split(x, 3, 1)[0],
            lambda x: np.split(x, 2, axis=1)[1] ** 2, lambda x: x[[0, 0, 1]] ** 2, lambda x: x[x > 0] ** 2,
            lambda x: x[..., None, ::-2], lambda x: np.take_along_axis(x, np.argsort(x, 1), 1) ** 2,
            lambda x: np.einsum("ij,ij->i", x[:1], x), lambda x: np.einsum("...j,kj", x[:, :1], x) ** 2,
            lambda x: np.einsum("ij,kj->ik", x, x), lambda x: np.einsum("...j,j", x, b) ** 2,
            lambda x: np.einsum("ii->i", x[:, :3]) ** 2, lambda x: np.einsum("ij->j", x) ** 2,
            lambda x: np.einsum("i...,bi...->b...", x, c), lambda x: np.linalg.slogdet(x @ x.T).logabsdet,
            lambda x: np.linalg.norm(x, axis=1), lambda x: np.hstack(list(x)) ** 3, lambda x: sum(x) ** 2,
            lambda x: np.nan_to_num(x) ** 2, lambda x: np.clip(x, -0.5, None),
            lambda x: np.dot(x, np.swapaxes(c, 1, 2)),
        ]:  # fmt: skip
            with self.subTest(seed=SEED, code=f.__code__.co_firstlineno):
                check_gradients(f, a, order=2)

    def agree(self, f, *arrays, order=2):
        """A function of NumPy's on Values and Tensors: its results, their dtypes, its gradients, on every way."""

        def results(out):
            return list(out) if isinstance(out, (tuple, list)) else [out]

        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for dtype in (np.float64, np.float32):
                given = [x.astype(dtype) for x in arrays]
                expected = results(f(*given))
                values = [Value(x, dtype) for x in given]
                outs = results(f(*values))
                ways = [outs, results(f(*[Tensor(x, dtype) for x in given]))]
                for way in (*WAYS, lambda v: pickle.loads(pickle.dumps(v)), lambda v: v.forward()):
                    ways.append([way(v) if isinstance(v, Value) and v._prim else v for v in outs])
                for way in ways:
                    self.assertEqual(len(way), len(expected))
                    for got, wanted in zip(way, expected):
                        got = got.data if isinstance(got, Value) else got
                        got = np.asarray(got)
                        self.assertEqual((got.shape, got.dtype), (np.shape(wanted), np.asarray(wanted).dtype))
                        rtol = 1e-12 if dtype == np.float64 else 2e-5
                        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol)
            if order:
                for i, out in enumerate(outs):
                    if isinstance(out, Value) and out._needs:
                        check_gradients(lambda *xs, i=i: results(f(*xs))[i] * 1.0, *arrays, order=order)

    def test_reductions_with_keywords(self):
        rng = np.random.default_rng(SEED)
        a, mask = rng.normal(size=(3, 4)), np.array([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]], bool)
        one_nan = np.where(mask, a, np.nan)
        for k in ({}, {"axis": 0}, {"axis": -1, "keepdims": True}, {"axis": (0, 1)}):
            for f in (np.sum, np.prod, np.max, np.min):
                self.agree(lambda x, f=f, k=k: f(x, where=mask, initial=0.5, **k), a)
                self.agree(lambda x, f=f, k=k: f(x, initial=0.5, **k), a)
                self.agree(lambda x, f=f, k=k: f(x[:0], initial=2.0, **k), a)
            for f in (np.mean, np.var, np.std):
                self.agree(lambda x, f=f, k=k: f(x, where=mask, **k), a)
            for f in (np.any, np.all):
                self.agree(lambda x, f=f, k=k: f(x > 0, where=mask, **k), a)
            for f in (np.sum, np.prod, np.mean, np.var, np.std):
                self.agree(lambda x, f=f, k=k: f(x.astype(np.float32), dtype=np.float64, **k), a, order=0)
            for f in (np.nansum, np.nanprod, np.nanmax, np.nanmin, np.nanmean, np.nanvar, np.nanstd, np.nanmedian):
                self.agree(lambda x, f=f, k=k: f(x, **k), one_nan, order=0)
                self.agree(lambda x, f=f, k=k: f(np.where(mask, x, np.nan), **k), a)
            self.agree(lambda x, k=k: np.average(x, weights=np.exp(x), returned=True, **k), a)
            self.agree(lambda x, k=k: np.ptp(x, **k), a)
            self.agree(lambda x, k=k: np.nanquantile(x, 0.3, **k), one_nan, order=0)
        self.agree(lambda x: np.nanmax(x, axis=0), np.full((2, 3), np.nan), order=0)
        for dtype, initial in itertools.product(
            [np.int64, np.int8, bool], [0.5, -1.5, 7, True]
        ):  # is of whole ones, too
            whole = np.array([[3, 0, 2], [1, 1, 5]], dtype)
            for f, k in itertools.product(
                (np.sum, np.prod, np.max, np.min, np.nansum, np.nanprod, np.nanmax, np.nanmin),
                ({}, {"axis": 0}, {"where": whole > 1}),
            ):
                expected = f(whole, initial=initial, **k)
                for x in (Tensor(whole, dtype), picograd._recorded(Tensor(whole, dtype))):
                    out = f(x, initial=initial, **k)
                    np.testing.assert_array_equal(np.asarray(out.data), expected)
                    self.assertEqual(out.dtype, expected.dtype)
        for f in (np.nanmean, np.nanvar, np.nanstd):
            np.testing.assert_array_equal(f(Tensor([3, 1, 2], np.uint8)).data, f(np.array([3, 1, 2], np.uint8)))
        np.testing.assert_allclose(np.std(Tensor([3, 1, 2], int), where=[True, False, True]).data, 0.5)
        with self.assertRaisesRegex(ValueError, "max: where= needs initial="):
            np.max(Value(a), where=mask)
        v, w = Value(a), Value(0.5)
        np.max(v, initial=w, where=Tensor(mask, bool)).backward()
        self.assertEqual(w.grad + v.grad.sum(), 1.0)
        for f in (np.nansum, np.nanmax, np.nanmean, np.nanstd, np.nanmedian):
            v = Value([np.nan, 1.0, 2.0])
            f(v).backward()
            self.assertEqual((v.grad.data[0], np.isfinite(v.grad.data).all()), (0.0, True))
        v = Value([0.1, 0.1, np.nan, 0.1], np.float64)
        np.nanstd(v).backward()
        self.assertEqual(v.grad.tolist(), [0.0] * 4)

    def test_scans_and_methods_of_ufuncs(self):
        a = np.random.default_rng(SEED).normal(size=(3, 4))
        for ufunc in (np.add, np.multiply, np.maximum, np.minimum, np.logaddexp):
            for axis in (0, -1):
                self.agree(lambda x, f=ufunc, axis=axis: f.accumulate(x, axis), a)
                self.agree(lambda x, f=ufunc, axis=axis: f.accumulate(x[:, :0], axis), a)
                self.agree(lambda x, f=ufunc, axis=axis: f.reduce(x, axis, keepdims=axis == 0), a)
            self.agree(lambda x, f=ufunc: f.outer(x, x[0]), a)
            self.agree(lambda x, f=ufunc: f.outer(x[0, 0], x), a)
            self.agree(lambda x, f=ufunc: f.reduce(x), a)
        self.agree(lambda x: np.add.reduce(x, axis=None, initial=2.0), a)
        self.agree(lambda x: np.power.outer(np.abs(x[0]) + 0.5, x), a)
        for name, f in (("cumulative_sum", np.cumsum), ("cumulative_prod", np.cumprod)):
            for axis in (0, -1):
                if standard := getattr(np, name, None):  # NumPy 2.1
                    self.agree(lambda x, f=standard, axis=axis: f(x, axis=axis, include_initial=True), a)
                    self.agree(lambda x, f=standard: f(x[0], dtype=np.float64), a)
            self.agree(lambda x, f=f: f(x, dtype=np.float64), a)
            twin = getattr(np, f"nan{f.__name__}")
            self.agree(lambda x, f=twin: f(np.where(x > 0, x, np.nan), axis=-1), a)
        v = Value([1.0, 3.0, 3.0, 2.0])
        np.maximum.accumulate(v).backward()
        self.assertEqual(v.grad.tolist(), [1.0, 1.0 + 0.5 + 0.5, 1.0, 0.0])

    def test_order_statistics(self):
        rng = np.random.default_rng(SEED)
        a, u = rng.normal(size=(3, 4)), np.array([3.0, 1.0, 3.0, 2.0, 1.0])
        for k in ({}, {"axis": 0}, {"axis": (-1, 0), "keepdims": True}):
            self.agree(lambda x, k=k: np.median(x, **k), a)
            for q in (0.3, np.float32([0.25, 0.5, 1.0]), np.float32([[0.0], [0.75]])):
                for method in ("linear", "lower", "nearest", "inverted_cdf", "averaged_inverted_cdf", "weibull"):
                    self.agree(lambda x, k=k, q=q, m=method: np.quantile(x, q, method=m, **k), a, order=1)
                self.agree(lambda x, k=k, q=q: np.percentile(x, q * 100, **k), a)
                self.agree(lambda x, k=k, q=q: np.nanpercentile(x, q * 100, **k), a, order=1)
        self.agree(np.median, np.array([1.0, np.nan]), order=0)
        self.agree(np.median, np.array([1.0, np.inf, np.inf, np.inf]), order=0)
        self.agree(np.median, np.zeros(0), order=0)
        self.assertEqual((np.median(Value(2.0)) * Value([1.0])).dtype, np.float32)
        with self.assertRaisesRegex(ValueError, "[Qq]uantiles must be"):
            np.quantile(Value(a), 2.0)
        self.agree(np.unique, u, order=0)
        self.agree(lambda x: np.unique(x, True, True, True), u, order=0)
        self.agree(lambda x: np.unique(np.stack([x, x]), axis=0, return_counts=True), u, order=0)
        check_gradients(lambda x: np.unique(x) ** 2, a, order=2)

    def test_statistics_and_counts(self):
        a, i = np.random.default_rng(SEED).normal(size=(3, 4)), np.array([0, 3, 1, 1])
        for k in (
            {}, {"rowvar": False}, {"bias": True}, {"ddof": 2}, {"fweights": [1, 2, 3, 1]},
            {"aweights": [0.1, 0.2, 0.5, 1.0]}, {"aweights": [0.1, 0.2, 0.5, 1.0], "fweights": [1, 2, 3, 1]},
        ):  # fmt: skip
            self.agree(lambda x, k=k: np.cov(x, **k), a)
        self.agree(lambda x: np.cov(x, x[0] ** 2), a)
        self.agree(lambda x: np.corrcoef(x), a[:2])
        self.agree(lambda x: np.corrcoef(x[0], x[1]), a)
        check_gradients(lambda w: np.cov(a, aweights=np.exp(w)), a[0], order=2)
        for k in ({}, {"axis": 0}, {"dx": 0.3}, {"x": np.array([0.0, 1.0, 1.5, 4.0], np.float32)}):
            self.agree(lambda x, k=k: np.trapezoid(x, **k), a)
        self.agree(lambda x: np.trapezoid(x, x**2, axis=0), a)
        self.assertEqual(np.bincount(i, Value(a[0])).dtype, np.float64)
        self.agree(lambda w: np.bincount(i, w, 6), a[0])
        self.agree(lambda w: np.bincount(np.argsort(w)), a[0])
        for k in ({}, {"bins": 3, "range": (-1, 1)}, {"bins": [-1, 0, 0.5]}, {"density": True, "bins": 3}):
            if "density" not in k:  # NumPy widens it
                self.agree(lambda w, k=k: np.histogram(a, weights=w * w, **k)[0], a)
            check_gradients(lambda w, k=k: np.histogram(a, weights=w * w, **k)[0], a, order=2)
            self.agree(lambda x, k=k: np.histogram(x, **k), a, order=0)

    def test_numbers_in_parts(self):
        a = np.array([[2.5, -0.7], [0.0, -3.25]])
        self.agree(np.modf, a)
        self.agree(np.frexp, a[:, :1] + 0.1)
        self.agree(np.frexp, a, order=0)
        self.agree(lambda x: np.divmod(x, 1.5), a + 0.3)
        self.agree(lambda x: divmod(x, 1.5) + divmod(7.0, x + 10), a + 0.3)
        self.agree(lambda x: np.ldexp(x, [3, -1]), a)
        self.assertEqual([type(x._held) for x in (*np.modf(Value(2.5)), np.frexp(Value(2.5))[0])], [float] * 3)
        self.assertEqual(np.ldexp(Value(2.5), 3).item(), 20.0)
        x = Value(np.array([700.0, 1e-8, -3.0, 0.0]), np.float64)
        np.i0(x).backward()
        i1 = [1.5285003902339006e302, 5e-09, -3.9533702174026093, 0.0]  # by the power series, in 60 digits
        np.testing.assert_allclose(x.grad.data, i1, rtol=1e-13)
        for x, y, slope in ((0.0, 2.0, 0.0), (3.0, -1.0, -1.0), (-3.0, -1.0, 1.0), (-3.0, 0.0, -1.0)):
            self.assertEqual(grad(np.copysign)(x, y), slope)
        y = Value([2.0, 2.0])
        np.heaviside([0.0, 1.0], y).backward()
        self.assertEqual(y.grad.tolist(), [1.0, 0.0])

    def test_functions_without_gradient(self):
        u = np.array([3.0, 1.0, 3.0, 2.0, 1.0])
        for f in (
            np.nonzero, np.flatnonzero, np.argwhere, lambda x: np.argpartition(x, 2), lambda x: np.lexsort((x, x > 2)),
            lambda x: np.lexsort(np.stack([x, x])), lambda x: np.searchsorted(np.sort(x), 2.0), np.nanargmax,
            lambda x: np.digitize(x, [1, 2]), lambda x: np.isin(x, [1, 2]), lambda x: np.union1d(x, x[:1] + 7),
            lambda x: np.intersect1d(x, x[:1]), lambda x: np.setdiff1d(x, x[:1]), lambda x: np.setxor1d(x, x[:1] + 7),
            np.nanargmin, np.isreal, np.iscomplex, np.real, np.imag, np.conjugate, np.angle, np.trunc,
            lambda x: np.angle(x, deg=True),
            lambda x: np.linalg.matrix_rank(np.outer(x, x)), np.isposinf, np.isneginf, np.spacing, np.unwrap,
            lambda x: x.real * x.imag, lambda x: np.left_shift(np.argsort(x), 2), lambda x: np.gcd(np.argsort(x), 4),
        ):  # fmt: skip
            self.agree(f, u, order=0)
        self.assertEqual(np.real(Value(2.0)).backward(), None)
        with self.assertRaisesRegex(ValueError, "nonzero: a must"):
            np.nonzero(Value(2.0))
        with self.assertRaisesRegex(TypeError, "return_indices"):
            np.intersect1d(Value(u), [1.0], return_indices=True)
        self.assertTrue(np.isrealobj(Value(u)))
        self.assertIs(TABLE[np.fix], TABLE[np.trunc])
        with self.assertRaisesRegex(TypeError, "complex"):
            Value([1j])

    def test_functions_at_their_corners(self):
        v, w = Value([1.0, 2.0]), np.array([1.0, 2.0])
        for f, order in (  # NumPy's values, where a formula that is as right has others
            (lambda x: np.gradient(np.append(x, 4.0) * [1.0, 1e17, 1.0])[1], 0),
            (lambda x: np.gradient(np.append(x, 4.0)), 1),
            (lambda x: np.linspace(x[0], x[1] + 0.1, 7), 1),
            (lambda x: np.linspace(x[0] - np.inf, x[1], 3), 0),
            (lambda x: np.geomspace(x[0], x[1] * 500, 4), 1),
            (lambda x: np.linalg.cond(np.outer(x, 0.0 * x)), 0),
            (lambda x: np.maximum.reduce(x, 0, None), 1),
            (lambda x: np.piecewise(x[1], x[1] > 0, [2.0]), 0),
            (lambda x: np.union1d(x, [9.0, 3.0]), 1),
            (lambda x: np.intersect1d(x, [9.0, 2.0]), 0),
            (lambda x: np.setdiff1d(x, [9.0, 3.0]), 1),
            (lambda x: np.setxor1d(x, [9.0, 3.0]), 1),
            (lambda x: np.pad(x, 2, mode="linear_ramp", end_values=x[0]), 1),
        ):
            with np.errstate(all="ignore"):
                expected = f(w)
                x = Value(w, dtype=np.float64)
                np.testing.assert_allclose(f(x).data.data, expected, rtol=1e-15)
            if order:
                np.sum(f(x)).backward()
                for i in range(2):
                    h = 1e-6 * np.eye(2)[i]
                    slope = (np.sum(f(w + h)) - np.sum(f(w - h))) / 2e-6
                    np.testing.assert_allclose(x.grad.data[i], slope, rtol=1e-5)
        for f in (
            lambda: np.select([v > 1, v < 1], [v, 2.0]),
            lambda: np.choose(np.argsort(Value([1.0, 2.0, 3.0])), [1.0, Value([1.0, 2.0, 3.0]), 2.0]),
            lambda: np.nanvar(v, ddof=0.5),
        ):
            self.assertEqual(f().dtype, np.float32)
        zero = Value(np.zeros(2))
        np.linalg.norm(zero, 0.5).backward()
        self.assertEqual(zero.grad.tolist(), [0.0, 0.0])
        ends = Value([0.0, 5.0])
        np.interp(np.array([np.inf]), [0.0, 1.0], ends).sum().backward()
        self.assertEqual(ends.grad.tolist(), [0.0, 1.0])
        self.assertRaises(np.exceptions.AxisError, np.linalg.vector_norm, Value(2.0), axis=0)
        Pair = collections.namedtuple("Pair", "a b")
        slopes = picograd.grad(lambda p: p.a * p.b)(Pair(3.0, 2.0))
        self.assertEqual((type(slopes), slopes.a, slopes.b), (Pair, 2.0, 3.0))

    def test_what_numpy_copies_is_no_view(self):
        for x in (Tensor(np.eye(2)), Value(np.eye(2)), Tensor([1, 2], dtype=np.uint8)):
            for f in (np.copy, lambda x: np.take(x, 0, axis=0), np.block, lambda x: np.clip(x, -5, 300)):
                before = x.tolist()
                data = picograd._raw(f(x))
                data += 5
                self.assertEqual(x.tolist(), before)
        t = Tensor([np.nan, 1.0])
        np.nan_to_num(t, copy=False)
        self.assertEqual(t.tolist(), [0.0, 1.0])
        self.assertRaises(TypeError, np.nan_to_num, Value([np.nan]), copy=False)
        self.assertIs(type(np.take(Value(2.0) > 1, 0).item()), bool)

    def test_averages_of_whole_numbers_are_wide(self):
        small = Tensor([200, 100], dtype=np.uint8)
        for weights in (Tensor([2, 2], dtype=np.uint8), np.array([2, 2], np.uint8), np.array([2, 2], np.float32)):
            self.assertEqual(np.average(small, weights=weights).item(), 150.0)
        self.assertEqual(np.average(Value([1.0, 2.0]), weights=Tensor([1, 2], dtype=int)).dtype, np.float32)

    def test_arrays_like_others_take_a_value_to_fill_with(self):
        v, fill = Value([1.0, 2.0]), Value(3.0)
        self.assertEqual(np.full_like(v, fill, shape=(3,)).shape, (3,))
        self.assertEqual(np.full_like(v, fill, np.float64).dtype, np.float64)
        np.full_like(v, fill).sum().backward()
        self.assertEqual(fill.grad.item(), 2.0)

    def test_singular_matrices_have_infinite_slopes(self):
        a = Value(np.stack([[[1.0, 2.0], [2.0, 4.0]], np.eye(2)]), dtype=np.float64)
        with np.errstate(divide="ignore"):
            np.linalg.slogdet(a)[1].sum().backward()
        self.assertEqual(a.grad.tolist(), [[[np.inf, -np.inf], [-np.inf, np.inf]], [[1.0, 0.0], [0.0, 1.0]]])

    def test_reductions_of_few_elements_are_those_of_many(self):
        rng = np.random.default_rng(SEED)
        a = rng.integers(-2, 3, (3, 5, 2, 4, 2)).astype(np.float32)
        a[0, 0, 0, 0, 0] = np.nan
        for function, axis in itertools.product((np.sum, np.max, np.min), ((2, 4), -1, (4, 2), (-1,))):
            for keepdims in (False, True):
                found = []
                for little in (1, 1 << 12):
                    with mock.patch.object(picograd, "_LITTLE", little):
                        v = Value(a)
                        out = function(v, axis=axis, keepdims=keepdims)
                        np.sum(out * out).backward()
                        found.append([out.data.data, v.grad.data])
                for few, many in zip(*found):
                    np.testing.assert_array_equal(few, many)
                self.assertEqual(out.shape, function(a, axis=axis, keepdims=keepdims).shape)

    def test_every_function_of_numpy_is_in_the_table_or_has_a_reason(self):
        homes = {"": np, "linalg.": np.linalg, "lib.stride_tricks.": np.lib.stride_tricks}
        asked = {}  # those that ask their arguments' types; others never meet a Value
        for prefix, home in homes.items():
            for name in dir(home):
                function = getattr(home, name)
                if isinstance(function, np.ufunc) or type(function) is type(np.sum):
                    asked[prefix + name] = function
        reasons = {name: why for why, names in REASONS.items() for name in names.split()}
        for name, function in asked.items():
            known = function in TABLE
            with self.subTest(function=name):
                self.assertNotEqual(known, name in reasons, "in the table, or an exception with a reason, not both")
                if known:
                    continue
                with self.assertRaisesRegex(TypeError, f"np.{name} is not in picograd's table"):
                    picograd._entry(function)

    def test_convolution_and_pooling_are_two_lines_of_numpy(self):
        def convolve(image, kernel):
            windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
            return np.einsum("ijkl,kl->ij", windows, kernel)

        def max_pool(image):
            windows = np.lib.stride_tricks.sliding_window_view(image, (2, 2))[::2, ::2]
            return windows.max(axis=(2, 3))

        rng = np.random.default_rng(SEED)
        image, kernel = rng.normal(size=(6, 6)), rng.normal(size=(3, 3))
        expected = sum(kernel[i, j] * image[i : i + 4, j : j + 4] for i in range(3) for j in range(3))
        np.testing.assert_allclose(convolve(Value(image, float), Value(kernel, float)).data.data, expected)
        check_gradients(lambda x, k: max_pool(convolve(x, k)), image, kernel)

    def test_kinks(self):
        def slope(f, *at):
            xs = [Value(np.array(x, float), dtype=float) if np.ndim(x) else Value(float(x)) for x in at]
            f(*xs).sum().backward()
            return [x.grad.tolist() for x in xs]

        self.assertEqual(slope(relu, 0.0), [0.0])
        self.assertEqual(slope(np.abs, 0.0), [0.0])
        self.assertEqual(slope(np.abs, [0.0, -1.0]), [[0.0, -1.0]])
        self.assertEqual(slope(np.maximum, 2.0, 2.0), [0.5, 0.5])
        self.assertEqual(slope(np.minimum, [2.0, 3.0], [2.0, 1.0]), [[0.5, 0.0], [0.5, 1.0]])
        self.assertEqual(slope(np.max, [1.0, 3.0, 3.0]), [[0.0, 0.5, 0.5]])
        self.assertEqual(slope(lambda x: np.clip(x, -1, 1), [-1.0, 1.0, 2.0]), [[1.0, 1.0, 0.0]])
        self.assertEqual(slope(np.linalg.norm, [0.0, 0.0]), [[0.0, 0.0]])
        self.assertEqual(slope(np.std, [2.0, 2.0]), [[0.0, 0.0]])
        self.assertEqual(slope(np.prod, [0.0, 3.0, 2.0]), [[6.0, 0.0, 0.0]])
        self.assertEqual(slope(np.prod, [0.0, 0.0, 2.0]), [[0.0, 0.0, 0.0]])
        self.assertEqual(slope(np.cumprod, [0.0, 3.0, 2.0]), [[10.0, 0.0, 0.0]])
        self.assertEqual(slope(np.fmax, [1.0, np.nan], [np.nan, 2.0]), [[1.0, 0.0], [0.0, 1.0]])

        inf, nan = np.inf, np.nan
        for f, at, slopes in [
            (np.maximum, ([0.0, nan, 1.0, nan], [-0.0, 1.0, nan, nan]), ([0.5, 1, 0, 1], [0.5, 0, 1, 0])),
            (np.minimum, ([0.0, nan, 1.0, nan], [-0.0, 1.0, nan, nan]), ([0.5, 1, 0, 1], [0.5, 0, 1, 0])),
            (np.fmax, ([0.0, nan, 1.0, nan], [-0.0, 1.0, nan, nan]), ([0.5, 0, 1, 1], [0.5, 1, 0, 0])),
            (np.fmin, ([0.0, nan, 1.0, nan], [-0.0, 1.0, nan, nan]), ([0.5, 0, 1, 1], [0.5, 1, 0, 0])),
            (np.maximum, ([inf, -inf, 1.0], [inf, -inf, inf]), ([0.5, 0.5, 0], [0.5, 0.5, 1])),
            (np.max, ([nan, 1.0, nan],), ([0.5, 0, 0.5],)),
            (np.min, ([inf, inf],), ([0.5, 0.5],)),
            (np.sort, ([nan, 1.0],), ([1, 1],)),
            (lambda x: np.clip(x, 1.0, 0.0), ([2.0, 0.5, nan],), ([0, 0, 1],)),
            (np.clip, ([0.5, 2.0, nan, 0.5], [1.0, 0.0, 0.0, nan], [0.0, 1.0, 1.0, 1.0]),
             ([0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0])),
            (np.arctan2, ([0.0, -0.0, 1e-200, 1e200], [0.0, 0.0, 1e-200, 1e200]),
             ([0, 0, 5e199, 5e-201], [0, 0, -5e199, -5e-201])),
            (np.hypot, ([0.0, 1e200], [0.0, 0.0]), ([0, 1], [0, 0])),
            (np.remainder, ([1.0, -0.5, 7.0], [0.1, 2.0, -2.0]), ([1, 1, 1], [-9, 1, 4])),
            (np.arcsinh, ([1e200, 0.0],), ([1e-200, 1],)),
            (np.arccosh, ([1e200, 1.0 + 2**-40],), ([1e-200, 2**19.5 * (1 - 2**-42)],)),
            (np.arcsin, ([1.0 - 2**-40],), ([2**19.5 * (1 + 2**-42)],)),
            (np.arctanh, ([1.0 - 2**-40],), ([2**39 * (1 + 2**-41)],)),
            (gelu, ([1e200, -1e200],), ([1, 0],)),
            (sigmoid, ([1e4, -1e4, inf, -inf],), ([0, 0, 0, 0],)),
            (softplus, ([1e4, -1e4, inf, -inf],), ([1, 0, 1, 0],)),
            (np.linalg.norm, ([[0.0, 0.0]],), ([[0, 0]],)),
            (lambda x: np.linalg.norm(x, np.inf), ([0.0, 0.0],), ([0, 0],)),
            (lambda x: np.take(x, [-1, 0, 2, -1]), ([1.0, 2.0, 3.0],), ([1, 0, 3],)),
            (lambda x: x @ np.ones((2, 0)), ([[1.0, 2.0]],), ([[0, 0]],)),
            (lambda x: np.ones((0, 2, 2)) @ x, ([[1.0, 2.0], [3.0, 4.0]],), ([[0, 0], [0, 0]],)),
            (lambda x: np.einsum("bij,jk", np.ones((0, 2, 2)), x), ([[1.0, 2.0], [3.0, 4.0]],), ([[0, 0], [0, 0]],)),
            (lambda x: np.var(x, ddof=3), ([1.0, 2.0],), ([-inf, inf],)),
        ]:  # fmt: skip
            with (
                self.subTest(at=at, code=getattr(f, "__name__", "")),
                np.errstate(all="ignore"),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", RuntimeWarning)
                for got, expected in zip(slope(f, *at), slopes):
                    np.testing.assert_allclose(got, expected, rtol=1e-9)
                if np.ndim(at[0]) == 1 and isinstance(f, np.ufunc):  # numbers have rules' results of their own
                    for i, numbers in enumerate(zip(*at)):
                        got = slope(f, *numbers)
                        np.testing.assert_allclose(got, [expected[i] for expected in slopes], rtol=1e-9)
        rng = np.random.default_rng(SEED)
        for number in rng.normal(size=20) * 10.0 ** rng.integers(-6, 6, 20):  # whether or not their mean is rounded
            for x in (np.full(rng.integers(2, 9), number), np.full((3, 4), number, np.float32)):
                v = Value(x, dtype=x.dtype)
                (np.std(v) + np.std(v, axis=-1).sum()).backward()
                self.assertFalse(v.grad.data.any())

    def test_nothing_overflows_on_the_way(self):
        x = np.array([1e19, -1e19, 1e30, -1e30, 300.0, -300.0, 0.0], np.float32)
        with np.errstate(all="raise", under="ignore"):
            for dtype in (np.float16, np.float32):
                v = Value(np.clip(x, -6e4, 6e4) if dtype == np.float16 else x, dtype=dtype)
                out = gelu(v)
                out.backward()
                np.testing.assert_array_equal(out.data.data, np.maximum(v.data.data, 0))
                np.testing.assert_array_equal(v.grad.data, [1, 0, 1, 0, 1, 0, 0.5])
            self.assertTrue(np.isfinite(grad(elementwise_grad(np.sinc))(1e200)))

    def test_weights_of_logsumexp_and_logaddexp_sum_to_1(self):
        inf, shared = np.inf, np.array([1.0, 1.0]) / 2
        for x, expected in [
            ([inf, 0.0, inf], [0.5, 0, 0.5]), ([-inf, -inf], shared), ([inf, -inf], [1, 0]), ([-inf, 3.0], [0, 1]),
            ([-1e5, -1e5, -1e5, -1e5], [0.25] * 4), ([1e30, 1e30], shared), ([0.0, -200.0], [1, 0]),
            ([1e5, 1e5 - 1], [1 / (1 + math.exp(-1)), 1 / (1 + math.e)]),
        ]:  # fmt: skip
            for dtype in (np.float32, np.float64):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    v = Value(np.array([x, x]), dtype=dtype)
                    logsumexp(v, axis=1).sum().backward()
                    np.testing.assert_allclose(v.grad.data, [expected] * 2, rtol=1e-6, atol=1e-30)
                    if len(x) == 2:
                        for wrap in (lambda n, dtype=dtype: Value(np.array([n]), dtype=dtype), Value):
                            a, b = map(wrap, x)
                            np.logaddexp(a, b).backward()
                            np.testing.assert_allclose([a.grad.item(), b.grad.item()], expected, rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(hessian(logsumexp)(np.zeros(2)), [[0.25, -0.25], [-0.25, 0.25]])
        np.testing.assert_allclose(grad(grad(np.logaddexp))(2.0, 2.0), 0.25)
        with np.errstate(invalid="ignore"):
            self.assertTrue(np.isnan(softmax(Value([-inf, -inf])).data.data).all(), "as NumPy computes it")

    def test_determinants_of_singular_matrices(self):
        def minors(a):
            n = len(a)
            parts = [np.delete(np.delete(a, i, 0), j, 1) for i in range(n) for j in range(n)]
            return np.linalg.det(np.array(parts)).reshape(n, n) * (-1.0) ** np.add.outer(range(n), range(n))

        rng = np.random.default_rng(SEED)
        for n in (1, 2, 3, 5):
            for rank in range(n + 1):
                with self.subTest(n=n, rank=rank, seed=SEED):
                    a = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, n))
                    batch = np.stack([a, np.eye(n), np.full((n, n), np.nan)])
                    with np.errstate(invalid="ignore"):
                        slope = grad(lambda x: np.sum(np.linalg.det(x)))(batch)
                    np.testing.assert_allclose(slope, [minors(a), np.eye(n), batch[2]], atol=1e-9)
                    moved = [a + sign * 1e-4 * e.reshape(n, n) for e in np.eye(n * n) for sign in (1, -1)]
                    second = (np.array([*map(minors, moved)]) @ np.eye(n)).reshape(n * n, 2, n * n)
                    expected = (second[:, 0] - second[:, 1]).reshape((n,) * 4) / 2e-4
                    np.testing.assert_allclose(hessian(np.linalg.det)(a), expected, atol=1e-6)

    def test_results_are_numpys_on_awkward_arrays(self):
        inf, nan = np.inf, np.nan
        numbers = [
            [0.5, -1.25, 2.0, 3.0],
            [0.0, -0.0, 0.0],
            [nan, 1.0, 2.0],
            [inf, -inf, 1.0],
            [2.0, 2.0, 1.0],
            [],
            2.0,
        ]
        numbers += [[[1.0, nan], [2.0, 2.0]], [[0.25, -3.0, 0.5]], [300.0] * 300, np.zeros((0, 3))]
        one = [np.sum, np.mean, np.prod, np.var, np.std, np.max, np.min, np.any, np.all, np.argmax, np.argmin]
        one += [np.cumsum, np.cumprod, np.argsort, np.sort, np.nan_to_num, np.round, np.count_nonzero, np.flip, np.diff]
        one += [np.nansum, np.nanprod, np.nanmax, np.nanmin, np.nancumsum, np.nancumprod, np.median, np.ptp]
        axis = [lambda x, f=f: f(x, axis=0) for f in one if f not in (np.nan_to_num, np.round)]
        axis += [lambda x, f=f: f(x, axis=np.int32(-1)) for f in (np.sum, np.mean, np.var, np.max, np.cumsum, np.flip)]
        axis += [lambda x, f=f: f(x, axis=(np.int16(0),), keepdims=True) for f in (np.sum, np.mean, np.std, np.min)]
        other = [
            lambda x: np.var(x, ddof=9), lambda x: np.round(x, -1), lambda x: np.diff(x, n=0, prepend=1.0),
            lambda x: np.diff(x, prepend=x[:1], append=x[-1:]), lambda x: np.take(x, [0, -1, 0]),
            lambda x: np.take(x, np.int8(-1), axis=0), lambda x: np.repeat(x, np.int32(2), axis=np.int32(0)),
            lambda x: np.pad(x, 1, constant_values=3), lambda x: np.clip(x, None, 1), lambda x: np.clip(x, 1, 0),
            lambda x: np.nan_to_num(x, nan=1.0, posinf=3.0), lambda x: np.roll(x, np.int8(1), np.int8(0)),
            lambda x: np.concatenate([x, x], np.int32(0)), lambda x: np.moveaxis(x, np.int32(0), np.int32(-1)),
            lambda x: np.sum(x, initial=2), lambda x: np.max(x, axis=0, initial=x.dtype.type(1)),
            lambda x: np.add.reduce(x), lambda x: np.maximum.accumulate(x, axis=-1),
            lambda x: np.unique(x), lambda x: np.trunc(x), lambda x: np.nanmedian(x, axis=0), lambda x: np.argwhere(x),
            lambda x: np.nanargmax(x),
            lambda x: np.count_nonzero(x, axis=-1, keepdims=True), lambda x: x.flatten(), np.atleast_2d, np.trace,
        ]  # fmt: skip
        if hasattr(np, "cumulative_sum"):  # NumPy 2.1
            other.insert(0, lambda x: np.cumulative_sum(x, axis=0, include_initial=True))
        compared = 0
        for dtype in (np.float16, np.float32, np.float64, np.int64, np.int8, np.uint8, bool):
            for x in numbers:
                x = np.nan_to_num(np.array(x), posinf=9, neginf=-9) if np.dtype(dtype).kind != "f" else np.array(x)
                x = (np.abs(x) if dtype == np.uint8 else x).astype(dtype)
                for f in one + axis + other:
                    with self.subTest(f=f.__code__.co_firstlineno if f in axis + other[:-2] else f, x=x, dtype=dtype):
                        with np.errstate(all="ignore"), warnings.catch_warnings():
                            warnings.simplefilter("ignore", RuntimeWarning)
                            try:
                                expected = np.asarray(f(x))
                            except (ValueError, IndexError, TypeError, OverflowError):
                                continue
                            got = [f(Tensor(x, dtype=dtype)).data]
                            got += [f(Value(x, dtype=dtype)).data.data] if x.dtype.kind == "f" else []
                        for y in map(np.asarray, got):
                            self.assertEqual((y.shape, y.dtype), (expected.shape, expected.dtype))
                            if dtype == np.float16 and not np.array_equal(y, expected, equal_nan=True):
                                with np.errstate(all="ignore"):  # var and std, whose sums overflow in NumPy
                                    expected = np.asarray(f(x.astype(np.float32))).astype(dtype)
                            np.testing.assert_array_equal(y, expected)
                            compared += 1
        self.assertGreater(compared, 2000)
        v = Value([1.0, 2.0])
        self.assertFalse(np.may_share_memory(v.flatten().data.data, v.data.data))

    def test_power_at_its_corners(self):
        for x, y, value, by_x, by_y in [
            (0.0, 0.0, 1, 0, 0),
            (0.0, 2.0, 0, 0, 0),
            (0.0, 1.0, 0, 1, 0),
            (-2.0, 3.0, -8, 12, None),
        ]:
            for wrap in (Value, lambda v: Value(np.array([v]), float)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    a, b = wrap(x), wrap(y)
                    out = a**b
                    out.backward()
                    c = wrap(x)
                    (c**y).backward()
                self.assertEqual(out.item(), value)
                self.assertEqual(float(a.grad), by_x)
                if by_y is not None:
                    self.assertEqual(float(b.grad), by_y)
                self.assertEqual(float(c.grad), by_x)

    def test_results_are_ieee(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for f, expected in [
                (lambda v: v / 0, math.inf), (lambda v: -v / 0, -math.inf), (lambda v: np.log(v - 1), -math.inf),
                (lambda v: np.log(-v), math.nan), (lambda v: np.exp(v * 1000), math.inf),
                (lambda v: (-v) ** 0.5, math.nan),
                (lambda v: (v - 1) ** -1, math.inf), (lambda v: np.sqrt(-v), math.nan), (lambda v: v % 0, math.nan),
                (lambda v: (v * 1e300) ** 2, math.inf), (lambda v: 1 / (v - 1), math.inf),
            ]:  # fmt: skip
                out = f(Value(1.0))
                self.assertIs(type(out._held), float)
                np.testing.assert_equal(float(out), expected)
                np.testing.assert_equal(f(Value(np.ones(1), float)).data.data[0], expected)
                out.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no warnings where NumPy has none
            x = Value(0.5)
            y = np.tanh(x) * sigmoid(x * -2000) + softplus(x * 2000) + relu(x) + (x - 0.5) ** 2 + np.abs(x)
            y.backward()
            softmax(Value([-1e30, 0.0, 1e30], dtype=float)).sum().backward()
            logsumexp(Value([-np.inf, 0.0], dtype=float)).backward()
        with self.assertWarns(RuntimeWarning):
            Value(1.0) / 0.0

    def test_checkers_are_told_every_method_and_no_other(self):
        told, defined = {}, set()
        for node in ast.walk(ast.parse(Path(picograd.__file__).read_text(encoding="utf-8"))):
            body = node.body if isinstance(node, ast.ClassDef) else ()
            names = {x.name for x in body if isinstance(x, ast.FunctionDef)}
            if getattr(node, "name", "") in ("Array", "Tensor", "Value"):
                defined |= names
            if getattr(node, "name", "") == "_FromTable":
                told |= dict.fromkeys(names, "")
                for x in body:
                    targets = [x.target] if isinstance(x, ast.AnnAssign) else getattr(x, "targets", ())
                    told |= dict.fromkeys([y.id for y in targets], ast.unparse(getattr(x, "value", None) or ast.Pass()))
        put_in = {
            name for cls in (*Tensor.__mro__[1::-1], Tensor, Value) for name, x in vars(cls).items() if callable(x)
        }
        put_in = {name for name in put_in - defined if not re.match("__(i(?!nvert)|dask|class|hash|new)", name)}
        put_in.discard("ptp")  # a method of arrays until NumPy 2.0
        put_in -= set(vars(object)) - {"__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__"}
        self.assertEqual(told.keys() - {"at", "_of_one", "_of_two", "_other"}, put_in)
        self.assertIsInstance(Value.at, property)
        for name, form in told.items():
            prim = PRIMITIVES.get(name)
            if form in ("_of_one", "_of_two") and prim:
                self.assertEqual(len(prim.operands), 1 + (form == "_of_two"), name)
            elif form == "_of_one":
                self.assertIn(name, ("__neg__", "__pos__", "__invert__"))

    def test_help_shows_signatures(self):
        for name, shown in (("sum", "(axis=None, "), ("softmax", "(axis=-1)"), ("tanh", "()"), ("clip", "(a_min")):
            method = getattr(Value(1.0), name)
            self.assertTrue(str(inspect.signature(method)).startswith(shown), inspect.signature(method))
            self.assertEqual(method.__name__, name)

    def test_messages_of_what_newcomers_write(self):
        v, array = Value([1.0, 2.0]), np.ones(2)

        def add_in_place():
            array.__iadd__(v)

        for call, message in (
            (add_in_place, r"write a = a \+ v"),
            (lambda: grad(lambda p: p)([[1.0, 2.0], [3.0]]), "argument 0: .*by np.array each"),
            (lambda: v.astype(int), r"\.data\.data\.astype"),
            (lambda: np.full_like(array, Value(2.0)), "take np.broadcast_to"),
            (lambda: Module()(v), "needs a method __call__"),
            (lambda: Adam(MLP(2, [1])), r"pass model\.parameters\(\)"),
            (lambda: cross_entropy(Value(np.ones((2, 3))), np.eye(3)[:2]), r"integers of shape \(2,\), got \(2, 3\)"),
        ):
            with self.subTest(message), self.assertRaisesRegex((TypeError, ValueError), message):
                call()
        np.testing.assert_array_equal(array, 1.0)


class TestNN(InFolder):
    """Room 6: modules, losses against their formulas, optimizers against theirs, saving, importing."""

    def test_replays_take_batches_of_other_sizes(self):
        for k, loss_of in ((1, mse_loss), (3, cross_entropy)):
            model = MLP(2, [4, k], seed=0)
            x, y = Tensor(np.ones((5, 2))), Tensor(np.zeros(5), np.float32 if k == 1 else np.int64)
            loss = loss_of(model(x), y)
            x.data, y.data = np.ones((3, 2)), np.zeros(3)
            loss.forward().backward()
            self.assertAlmostEqual(loss.item(), loss_of(model(np.ones((3, 2))), y).item(), 6)

    def test_saving_any_name_and_loading_any_file(self):
        class Odd(Module):
            def __init__(self):
                self.allow_pickle, self.file = Value([7.0]), Value([8.0])

        folder = self.folder
        path = folder / "m.npz"
        Odd().save(path)
        model = Odd()
        model.file.data = 0
        model.load(path)
        self.assertEqual(model.file.data.data[0], 8)
        other = folder / "other"
        other.touch()
        self.assertEqual(path.stat().st_mode, other.stat().st_mode, "the permissions of any new file")
        for content in (b"junk", b"", path.read_bytes()[:60]):
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "is not a file that save wrote"):
                model.load(path)
        np.savez(path, allow_pickle=np.array([0.0]), **{"other": np.array(["x"])})
        with self.assertRaises(ValueError):
            model.load(path)
        self.assertEqual(model.allow_pickle.data.data[0], 7)

    @staticmethod
    def holding(**attributes):
        module = Module()
        vars(module).update(attributes)
        return module

    def test_no_two_parameters_share_a_place_in_a_file(self):
        a, b = Value([1.0]), Value([2.0])
        folder = self.folder
        path = folder / "m.npz"
        for attributes, message in [
            ({"d": {1: a, "1": b}}, "two parameters have the name 'd.1'"),
            ({"b": {"c": a}, "b.c": b}, "two parameters have the name 'b.c'"),
            ({"d": [a], "d.0": b}, "two parameters have the name 'd.0'"),
            ({"x\0y": a}, "cannot hold"), ({"\ud800": a}, "cannot hold"), ({"x" * 99999: a}, "cannot hold"),
        ]:  # fmt: skip
            path.write_bytes(b"old")
            for act in (Module.save, Module.load):
                with self.assertRaisesRegex(ValueError, f"{act.__name__}: .*{message}"):
                    act(self.holding(**attributes), path)
            self.assertEqual((os.listdir(folder), path.read_bytes()), (["m.npz"], b"old"))
        model = self.holding(**{"x": a, "x.npy": b, "x.npy.npy": Value([3.0]), "é/..": Value([4.0]), "": Value(5.0)})
        model.save(path)
        for p in model.parameters():
            p.data = 0
        model.load(path)
        self.assertEqual([p.data.data.sum() for p in model.parameters()], [1, 2, 3, 4, 5])

    def test_a_file_is_replaced_where_it_is(self):
        model, twin = MLP(2, [1], seed=0), MLP(2, [1], seed=1)
        folder = self.folder
        (folder / "far").mkdir()
        target, link, dangling = folder / "far" / "real.npz", folder / "link.npz", folder / "dangling.npz"
        target.touch()
        target.chmod(0o640)
        link.symlink_to(target)
        dangling.symlink_to(Path("far", "new.npz"))
        for path in (link, dangling):
            model.save(path)
            twin.load(path)
            self.assertTrue(path.is_symlink())
        self.assertEqual(target.stat().st_mode & 0o777, 0o640)
        self.assertEqual(sorted(os.listdir(folder / "far")), ["new.npz", "real.npz"])
        if os.name == "posix":
            model.save("/dev/null")
            self.assertFalse(Path("/dev/null").is_file())

    def test_a_file_is_compared_before_it_is_read(self):
        model = self.holding(w=Value(np.ones(3)))
        folder = self.folder
        path = folder / "bomb.npz"
        for name in ("w", "other"):
            np.savez_compressed(path, **{name: np.zeros((1 << 20, 8))})
            tracemalloc.start()
            with self.assertRaisesRegex(ValueError, r"shape \(3,\), in the file \(1048576, 8\)|is not in"):
                model.load(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(peak, 1 << 22)
        self.assertEqual(model.w.data.tolist(), [1, 1, 1])
        model.save(path)
        with zipfile.ZipFile(path, "a") as archive:  # whose header is another than that of w.npy
            archive.writestr("w", archive.read("w.npy"))
        with self.assertRaisesRegex(ValueError, "is not a file that save wrote .it holds 'w' twice"):
            model.load(path)
        for dtype in ("S9999999", "complex128", "M8[s]", [("a", "f4")]):
            np.savez_compressed(path, w=np.zeros(3, dtype))
            with self.assertRaisesRegex(ValueError, "bomb.npz.* must be of real numbers, in the file it is"):
                model.load(path)

    def test_paths_that_cannot_be(self):
        model = self.holding(w=Value([1.0]))
        folder = self.folder
        for act in (model.save, model.load):
            for wrong, error, got in [
                (None, TypeError, "None"), (3, TypeError, "3"), (b"x", TypeError, "b'x'"),
                ("a\0", ValueError, "'a.x00'"), (folder / "no" / "m", FileNotFoundError, "no/m'"),
                (folder, OSError, f"'{folder}'"),
            ]:  # fmt: skip
                with self.assertRaisesRegex(error, got if isinstance(wrong, Path) else f"path must be a .* got {got}"):
                    act(wrong)
        if os.name == "posix":
            loop = folder / "loop"
            loop.symlink_to(loop)
            with self.assertRaisesRegex(OSError, "loop'$"):
                model.save(loop)
            self.assertTrue(loop.is_symlink())

    @unittest.skipUnless(os.path.exists("/dev/fd"), "needs /dev/fd")
    def test_it_can_be_saved_into_a_pipe_or_a_file_without_a_name(self):
        model, twin = self.holding(w=Value([1.0, 2.0])), self.holding(w=Value([0.0, 0.0]))
        name = self.folder
        path, (ours, theirs) = Path(name, "m"), os.pipe()
        model.save(f"/dev/fd/{theirs}")
        os.close(theirs)
        with open(ours, "rb") as pipe:
            path.write_bytes(pipe.read())
        twin.load(path)
        self.assertEqual(twin.w.data.tolist(), [1, 2])
        with open(path, "r+b") as file:
            path.unlink()
            model.save(f"/dev/fd/{file.fileno()}")
            self.assertEqual((os.listdir(name), file.read(2)), ([], b"PK"))

    def test_arguments_that_are_wrong_are_named(self):
        v, model = Value([1.0, 2.0]), MLP(2, [1])
        for call, message in [
            (lambda: SGD(model, 0.1), "params must be a list of Values.*, got MLP"),
            (lambda: SGD(None, 0.1), "params must be .*, got None"),
            (lambda: Adam(v), "params must be .*, got a single Value"),
            (lambda: Adam([]), "params must be .*, got none"),
            (lambda: Adam([v, 3.0]), "params must be .*, got also a float"),
            (lambda: Adam([v], decoupled="no"), "decoupled must be True or False, got 'no'"),
            (lambda: Adam([v], betas=(0.9, "1")), "betas must be a number, got '1'"),
            (lambda: SGD([v], lr=[0.1]), r"lr must be a number, got \[0.1\]"),
            (lambda: MLP(2, np.array(3)), r"nouts must be a list of .*, got array\(3\)"),
            (lambda: MLP(2, [[1], [2, 3]]), r"nout must be a positive integer, got \[1\]"),
            (lambda: MLP(2, [1], seed="a"), "seed must be a whole number, .*, got 'a'"),
            (lambda: Neuron(2, seed=-1), "seed must be a whole number, .*, got -1"),
            (lambda: Layer(2, 1, dtype="foo"), "dtype must be a floating .*, got 'foo'"),
            (lambda: mse_loss(None, [1.0]), "mse_loss: prediction: expected .*, got NoneType"),
            (lambda: mse_loss(v, "ab"), "mse_loss: target: expected .*, got str"),
            (lambda: hinge_loss(v, {}), "hinge_loss: labels: expected .*, got dict"),
            (lambda: cross_entropy("ab", 0), "cross_entropy: logits: expected .*, got str"),
            (lambda: cross_entropy(v, None), "cross_entropy: labels: expected .*, got NoneType"),
        ]:
            with self.subTest(message), self.assertRaisesRegex((TypeError, ValueError), message):
                call()
        model.layers = []
        self.assertEqual(repr(model), "MLP without layers")

    def test_containers_may_be_deep_and_hold_themselves(self):
        model, a, b = Module(), Value([1.0]), Value([2.0])
        model.box = box = [a]
        box += [{"self": box, "model": model}, (b, box)]
        deep: list = [Value([3.0])]
        for _ in range(5000):
            deep = [deep]
        model.deep = deep
        names = [name for name, _ in model.named_parameters()]
        self.assertEqual((names[:2], len(names)), (["box.0", "box.2.0"], 3))

    def test_what_a_module_remembers_is_no_parameter(self):
        class Remembers(Module):
            def __init__(self, parent=None):
                self.w, self.parent = Value([1.0, 2.0]), parent
                self.last = self.w * 2

        child = Remembers()
        child.parent = Remembers(child)
        self.assertEqual([name for name, _ in child.named_parameters()], ["w", "parent.w"])

    def test_parameters_in_slots(self):
        class Base(Module):
            __slots__ = ("w", "unset", "__hidden")
            shared = Value([0.0])  # of the class: no parameter

            def __init__(self):
                self.w, self.__hidden = Value([1.0]), [Value([2.0])]

        class Derived(Base):
            __slots__ = "extra"

            def __init__(self):
                super().__init__()
                self.extra, self.other = Neuron(1), Value([3.0])

        @dataclasses.dataclass(slots=True)
        class Scale(Module):
            w: Value

        names = [name for name, _ in Derived().named_parameters()]
        self.assertEqual(names, ["_Base__hidden.0", "w", "extra.w", "extra.b", "other"])
        scale = Scale(Value([2.0]))
        self.assertEqual(scale.parameters(), [scale.w])
        folder = self.folder
        scale.save(folder / "m")
        scale.w.data = 0
        scale.load(folder / "m")
        self.assertEqual(scale.w.data.tolist(), [2.0])

    def test_what_no_gradient_flows_through_is_no_parameter(self):
        model = Module()
        model.w = Value([1.0, 2.0])
        with no_grad():
            model.mask, model.rank = model.w > 1, np.argsort(model.w)
        model.frozen = model.w.detach()
        self.assertEqual(model.parameters(), [model.w])

    def test_parts_of_another_copy_are_refused(self):
        spec = importlib.util.spec_from_file_location("another_copy", picograd.__file__)
        other = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, another_copy=other):
            spec.loader.exec_module(other)
            for x in (other.Value(1.0), other.MLP(2, [1]), [other.Tensor([1.0])]):
                with self.assertRaisesRegex(TypeError, "of another_copy .* two copies of picograd"):
                    self.holding(w=Value(1.0), x=x).parameters()
            with self.assertRaisesRegex(TypeError, "Module"):  # and not: two copies
                Value(1.0) * Module()

    def test_labels_are_checked_when_the_loss_is_computed(self):
        for labels, others in [([0, 1], [2, 2]), (1, 2)]:
            for way in WAYS:
                y, w = Tensor(labels, dtype=np.int64), Value(np.zeros((2, 3)[-1 - np.ndim(labels) :]))
                loss = way(cross_entropy(w, y))
                for wrong in (3, -1):
                    y.data = wrong
                    with self.assertRaisesRegex(ValueError, "labels must be integers from 0 to 2, got .*" + str(wrong)):
                        loss.forward()
                y.data = others
                self.assertAlmostEqual(loss.forward().item(), math.log(3), 6)
        y = Tensor([0.0, 1.0])
        loss = cross_entropy(Value(np.zeros((2, 3))), y)
        y.data = [0.5, 1.0]
        with self.assertRaisesRegex(TypeError, "from 0 to 2, got 0.5"):
            loss.forward()

    def test_losses_keep_their_digits(self):
        for way in WAYS:
            for x in (0.0, 10.0, 16.0, 20.0, 80.0):
                one, zero = Value([x]), Value([-x])
                losses = [way(binary_cross_entropy_with_logits(v, Tensor([y]))) for v, y in ((one, 1.0), (zero, 0.0))]
                for loss in losses:
                    np.testing.assert_allclose(loss.item(), np.log1p(np.exp(-x)), rtol=1e-6)
                    loss.backward()
                np.testing.assert_allclose(one.grad.data, -zero.grad.data, atol=1e-7)
            v = Value([0.0, 0.0, 0.0])
            way(binary_cross_entropy_with_logits(v, [0.0, 0.25, 1.0])).backward()
            np.testing.assert_allclose(v.grad.data * 3, [0.5, 0.25, -0.5])
            wide = Value(np.zeros((1, 70_000)), dtype=np.float16)
            loss = way(cross_entropy(wide, [3]))
            self.assertEqual((loss.dtype, loss.data.data), (np.float16, np.float16(math.log(70_000))))
            loss.backward()
            self.assertEqual((wide.grad.dtype, wide.grad.data[0, 3]), (np.float16, -1))
        a, b = np.array([100, 1], np.int8), np.array([-128, 1], np.int8)
        for x, y in ((Tensor(a, np.int8), Tensor(b, np.int8)), (a, b)):
            self.assertEqual(float(mse_loss(x, y)), 228**2 / 2)
            self.assertEqual(float(hinge_loss(y, Tensor([-1, 1], np.int8))), 0)
        self.assertEqual(mse_loss(Value([1.0, 2.0]) > 1, np.array([True, True])).item(), 0.5)
        self.assertEqual(mse_loss(Value([1.0, 2.0]), [True, True]).dtype, np.float32)

    def test_numbers_without_gradient_are_left_alone(self):
        for make in (lambda ps: SGD(ps, 0.1, momentum=0.9), lambda ps: Adam(ps, 0.1)):
            p, q, alone = Value(1.0), Value(2.0), Value(1.0)
            both, one = make([p, q]), make([alone])
            for _ in range(3):
                for x in (p, alone):
                    x.grad = None
                    (x * x).backward()
                both.step()
                one.step()
            self.assertEqual((p.item(), q.item()), (alone.item(), 2.0))

    def test_shapes(self):
        model = MLP(3, [4, 1], seed=0)
        batch = np.random.default_rng(SEED).normal(size=(5, 3))
        expected = np.tanh(batch @ model.layers[0].w.data.data) @ model.layers[1].w.data.data
        np.testing.assert_allclose(model(batch).data.data, expected[:, 0], rtol=1e-5, atol=1e-6)
        self.assertEqual((model(batch).shape, model(batch[0]).shape, model(Tensor(batch)).shape), ((5,), (), (5,)))
        self.assertEqual(MLP(3, [4, 2])(batch).shape, (5, 2))
        self.assertEqual(model([1, 2.0, Value(3.0)]).shape, ())
        self.assertEqual((Neuron(3)(batch).shape, Layer(3, 2)(batch[0]).shape), ((5,), (2,)))
        self.assertEqual((Neuron(3).w.shape, Neuron(3).b.shape), ((3,), ()))
        self.assertEqual(sum(p.size for p in MLP(2, [8, 8, 1]).parameters()), 105)
        self.assertEqual(MLP(2, [3, 1], dtype=float)(np.ones(2)).dtype, np.float64)
        for batch in (np.ones((4, 3), int), Tensor(np.ones((4, 3)), int), Tensor(np.ones((4, 3)), bool)):
            self.assertEqual(model(batch).dtype, np.float32, "counts do not widen a network")
        for wrong in ([1.0, 2.0], np.ones((5, 4)), np.ones((1, 1, 3)), Value(1.0)):
            with self.assertRaisesRegex(ValueError, "expected width 3"):
                model(wrong)
        for wrong in ("tan", 5, [np.tanh]):
            with self.assertRaisesRegex(ValueError, "activation must be"):
                MLP(2, [1], activation=wrong)

    def test_gradients_flow_to_inputs_and_parameters(self):
        x = [Value(1.0), Value(2.0)]
        model = MLP(2, [3, 1], seed=1)
        model(x).backward()
        w, v = (layer.w.data.data.astype(float) for layer in model.layers)
        slope = (1 - np.tanh(np.array([1.0, 2.0]) @ w) ** 2) * v[:, 0] @ w.T
        np.testing.assert_allclose([float(i.grad) for i in x], slope, rtol=1e-5)
        self.assertTrue(all(np.any(p.grad.data) for p in model.parameters()))
        model.zero_grad()
        self.assertFalse(any(np.any(p.grad.data) for p in model.parameters()))
        for activation in ("tanh", "relu", "sigmoid", "gelu", "softplus", None, np.sin):
            model = MLP(2, [3, 2], activation=activation, seed=0, dtype=float)
            check_gradients(lambda x, model=model: model(x), np.array([[0.3, -0.4]]))
            check_gradients(lambda w, model=model: np.tanh(np.ones(2) @ w), model.layers[0].w)
        with self.assertRaisesRegex(ValueError, "tanh.*'nope'"):
            MLP(2, [3, 2], activation="nope")

    @needs_power
    def test_a_large_layer_is_one_operation_in_one_buffer(self):
        rng = np.random.default_rng(SEED)
        x = rng.normal(size=(64, 64))
        for activation in ("tanh", "relu", "sigmoid", None, "gelu", lambda x: np.sin(x)):
            layer = Layer(64, 512, activation, seed=0, dtype=np.float64)
            layer.b.data = rng.normal(size=512)
            w, b, v, batch = Value(layer.w), Value(layer.b), Value(x, float), Value(x, float)
            function = layer._function or np.positive
            ours, plain = layer(batch), function(v @ w + b)
            self.assertEqual(ours._prim.name == "dense layer", activation in ("tanh", "relu", "sigmoid", None))
            for out in (ours, plain):
                np.sum(out**2).backward()
            for p, q in ((layer.w, w), (layer.b, b), (batch, v)):
                np.testing.assert_allclose(p.grad.data, q.grad.data, rtol=1e-12, atol=1e-12)
            layer.b.data = layer.b.data + 1.0
            np.testing.assert_allclose(layer(x).forward().data.data, function(x @ layer.w + layer.b).data.data)
            fast = optimize(layer(batch))
            self.assertNotIn("dense", draw(fast).source, "optimize makes operations of it again")
            if isinstance(activation, str):
                np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours)).data.data, ours.data.data)
            self.assertEqual(layer(np.float32(x[:1])).dtype, np.float64)
        layer, x = Layer(64, 4096, seed=0), np.ones((256, 64), np.float32)
        layer(x)
        tracemalloc.start()
        out = layer(x)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        self.assertLess(held, 1.1 * out.nbytes)

    def test_a_tensor_batch_is_read_anew_by_a_replay(self):
        model, x = MLP(2, [3, 1], seed=0), Tensor(np.ones((4, 2)))
        out = model(x)
        x.data = np.zeros((4, 2))
        np.testing.assert_allclose(out.forward().data.data, model(np.zeros((4, 2))).data.data)

    def test_parameters_and_names(self):
        class Net(Module):
            def __init__(self):
                self.first = Layer(2, 3)
                self.rest = [Neuron(3), {"gain": Value(1.0)}]
                self.again = self.first

        names = [name for name, _ in Net().named_parameters()]
        self.assertEqual(names, ["first.w", "first.b", "rest.0.w", "rest.0.b", "rest.1.gain"])

    def test_seeds(self):
        one, two, other = (MLP(2, [3, 1], seed=s).layers[0].w.data.tolist() for s in (0, 0, 1))
        self.assertEqual(one, two)
        self.assertNotEqual(one, other)
        self.assertAlmostEqual(float(Layer(1000, 1000, seed=0).w.data.data.std()), math.sqrt(2 / 2000), places=3)
        self.assertAlmostEqual(float(Layer(1000, 1000, "relu", 0).w.data.data.std()), math.sqrt(2 / 1000), places=3)
        for name in ("tanh", "relu", "sigmoid", "gelu", "softplus"):  # the function counts as its name
            function = getattr(picograd, name, np.tanh)
            np.testing.assert_array_equal(Layer(2, 3, name, 0).w.data.data, Layer(2, 3, function, 0).w.data.data)

    def test_losses(self):
        rng = np.random.default_rng(SEED)
        a, b, labels = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), np.array([0, 2, 1, 2])
        p = np.exp(a) / np.exp(a).sum(1, keepdims=True)
        y, s = (b > 0).astype(float), 1 / (1 + np.exp(-a))
        for loss, args, expected in [
            (mse_loss, (a, b), np.mean((a - b) ** 2)),
            (cross_entropy, (a, labels), -np.mean(np.log(p[range(4), labels]))),
            (cross_entropy, (a[0], 1), -np.log(p[0, 1])),
            (binary_cross_entropy_with_logits, (a, y), -np.mean(y * np.log(s) + (1 - y) * np.log(1 - s))),
            (hinge_loss, (a, 2 * y - 1), np.mean(np.maximum(0, 1 - (2 * y - 1) * a))),
        ]:
            with self.subTest(loss=loss.__name__, seed=SEED):
                self.assertAlmostEqual(loss(Value(args[0], float), *args[1:]).item(), expected, places=6)
                check_gradients(lambda x, loss=loss, args=args: loss(x, *args[1:]), args[0])
        far = Value([[-1e4, 1e4], [3.0, 2.0], [0.0, 0.0]], dtype=float)
        for way in WAYS:
            loss = way(cross_entropy(far, [0, 0, 1]))
            self.assertAlmostEqual(loss.item(), (2e4 + math.log1p(math.exp(-1.0)) + math.log(2.0)) / 3)
        for whole in ([[1, 2, 3]], np.array([[1, 2, 3]]), Tensor([[1, 2, 3]], dtype=int)):
            self.assertAlmostEqual(cross_entropy(whole, [0]).item(), math.log(1 + math.e + math.e**2))
        self.assertAlmostEqual(cross_entropy(Tensor([[True, False]], bool), [0]).item(), math.log1p(math.exp(-1.0)))
        x = Value(a, float)
        t = Tensor(labels, dtype=int)
        loss = cross_entropy(x, t)
        t.data = np.zeros(4)
        self.assertAlmostEqual(loss.forward().item(), -np.mean(np.log(p[:, 0])))
        for call, error, message in [
            (lambda: mse_loss(x, a[0]), ValueError, r"\(4, 3\) and \(3,\)"),
            (lambda: cross_entropy(x, [0, 1, 2]), ValueError, "labels"),
            (lambda: cross_entropy(x, [0, 1, 2, 3]), ValueError, "0 to 2"),
            (lambda: cross_entropy(x, [0, 1, 2, 0.5]), TypeError, "integers"),
            (lambda: binary_cross_entropy_with_logits(x, a * 9), ValueError, "targets"),
            (lambda: binary_cross_entropy_with_logits(Value(1.0), Tensor(2.0)), ValueError, "targets"),
            (lambda: hinge_loss(x, a), ValueError, "-1 or 1"),
        ]:
            with self.assertRaisesRegex(error, message):
                call()

    def test_optimizers_follow_their_formulas(self):
        rng = np.random.default_rng(SEED)
        start, grads = rng.normal(size=5), rng.normal(size=(3, 5))

        def run(make, as_scalars):
            params = [Value(float(x)) for x in start] if as_scalars else [Value(start, float)]
            optimizer = make(params)
            for g in grads:
                optimizer.zero_grad()
                for p, x in zip(params, g if as_scalars else [g]):
                    p.grad = x
                optimizer.step()
            return np.concatenate([np.atleast_1d(p.data.data) for p in params])

        def sgd():
            p, v = start.copy(), 0
            for g in grads:
                v = 0.9 * v + g + 0.1 * p
                p = p - 0.5 * v
            return p

        def adam(decay, decoupled):
            p, m, v = start.copy(), 0, 0
            for t, g in enumerate(grads, 1):
                g = g if decoupled else g + decay * p
                p = p * (1 - 0.5 * decay) if decoupled else p
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
                p = p - 0.5 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            return p

        for as_scalars in (True, False):
            for make, expected in [
                (lambda p: SGD(p, 0.5, momentum=0.9, weight_decay=0.1), sgd()),
                (lambda p: Adam(p, 0.5, (0.9, 0.99), weight_decay=0.1), adam(0.1, False)),
                (lambda p: Adam(p, 0.5, (0.9, 0.99), weight_decay=0.1, decoupled=True), adam(0.1, True)),
            ]:
                np.testing.assert_allclose(run(make, as_scalars), expected, rtol=1e-10)
        p = Value([1.0])
        SGD([p, Value([2.0])], 0.1).step()  # no gradients yet
        self.assertEqual(p.data.tolist(), [1.0])
        for wrong in [
            lambda: SGD([p], -1), lambda: SGD([p, p], 1), lambda: SGD([], 1), lambda: SGD([1.0], 1),
            lambda: SGD([p], 0.1, momentum=1.0), lambda: Adam([p], betas=0.9), lambda: Adam([p], lr="1"),
            lambda: SGD([p], math.nan), lambda: Adam([p], betas=(0.9, 1.0)), lambda: SGD(p, 1), lambda: SGD([p * 2], 1),
        ]:  # fmt: skip
            with self.assertRaises((TypeError, ValueError)):
                wrong()

    def test_parameters_join_when_they_get_gradients(self):
        """Each has its own state and count of steps, whether it is a number or an array."""
        rng = np.random.default_rng(SEED)
        live = rng.random((6, 4)) < 0.6
        for make in (lambda p: Adam(p, 0.1, weight_decay=0.1), lambda p: SGD(p, 0.1, momentum=0.9)):
            numbers, arrays = [Value(1.0) for _ in range(4)], [Value([1.0], float) for _ in range(4)]
            optimizers = make(numbers), make(arrays)
            for row in live:
                for params, optimizer in zip((numbers, arrays), optimizers):
                    for p, used in zip(params, row):
                        p.grad = p.data.data * 2 if used else None
                    optimizer.step()
            np.testing.assert_allclose([p.item() for p in numbers], [p.item() for p in arrays], rtol=1e-12)

    def test_a_step_that_cannot_be_made_changes_nothing(self):
        for make in (lambda p: SGD(p, 0.1), lambda p: Adam(p)):
            for start, new in [(np.ones(3), np.ones(4)), (np.ones(1), np.ones(3)), (np.ones(()), np.ones(3))]:
                for when in (0, 1):  # also before there is any state
                    first, p, number = Value([1.0]), Value(start, float, label="gain"), Value(1.0)
                    optimizer = make([number, first, p])
                    for x in (first, number, p) * when:
                        x.grad = 1.0
                    optimizer.step()
                    before = [x.data.data.copy() for x in (number, first)]
                    p.data = new
                    for x in (first, number, p):
                        x.grad = 1.0
                    with self.assertRaisesRegex(ValueError, "step: parameter 2 \\('gain'\\) was of shape"):
                        optimizer.step()
                    self.assertEqual([x.data.data for x in (number, first)], before)

    def test_a_step_that_fails_changes_nothing(self):
        for make in (lambda p: SGD(p, 10.0, momentum=0.9), lambda p: Adam(p, 1.0)):
            for fault, error in (("read-only", ValueError), ("raise", FloatingPointError), ("warn", RuntimeWarning)):
                first, second, number = Value([1.0, 1.0]), Value([3e38, 3e38], label="gain"), Value(1.0)
                optimizer, array = make([number, first, second]), first.data.data
                for x in (first, second, number):
                    x.grad = 1.0
                optimizer.step()
                before = pickle.dumps(optimizer)
                if fault == "read-only":
                    second.data.data.flags.writeable = False
                else:
                    second.grad = -3e38
                with (
                    self.assertRaisesRegex(error, "2 .'gain'. .* read-only|overflow"),
                    np.errstate(over="warn" if fault == "warn" else "raise"),
                    warnings.catch_warnings(),
                ):
                    warnings.simplefilter("error")
                    optimizer.step()
                self.assertIs(first.data.data, array)
                second.grad = 1.0
                self.assertEqual(pickle.dumps(optimizer), before)

    @unittest.skipIf(distributed is None, no_dask)
    @needs_power
    def test_a_parameter_that_became_lazy_is_refused(self):
        for make in (lambda p: SGD(p, 0.1), lambda p: Adam(p)):
            first, w = Value([1.0]), Value([1.0, 2.0])
            optimizer = make([first, w])
            w.data = da.ones(2)
            first.grad = w.grad = 1.0
            with self.assertRaisesRegex(TypeError, "step: parameter 1 has an array of dask now"):
                optimizer.step()
            self.assertEqual(first.data.tolist(), [1.0])

    def test_half_precision_is_stepped_in_single(self):
        grads = np.array([0.0, 1e-4, 1.0])
        for make in (lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.1, weight_decay=0.1)):
            half, single = (Value(np.ones(3), dtype=dtype) for dtype in (np.float16, np.float32))
            optimizers = make([half]), make([single])
            for _ in range(5):
                for p, optimizer in zip((half, single), optimizers):
                    p.grad = grads
                    optimizer.step()
            self.assertEqual(half.dtype, np.float16)
            np.testing.assert_allclose(half.data.data, single.data.data, atol=2e-3)

    def test_training_saving_loading(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(64, 2))
        y = x[:, 0] * x[:, 1]
        model = MLP(2, [16, 1], seed=0)
        optimizer = Adam(model.parameters(), lr=0.03)
        for _ in range(300):
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        self.assertLess(loss.item(), 0.02)
        folder = self.folder
        path = folder / "weights"
        model.save(path)
        twin = MLP(2, [16, 1], seed=1)
        twin.load(path)
        self.assertEqual(mse_loss(twin(x), y).data, loss.forward().data)
        before = [p.data.tolist() for p in twin.parameters()]
        for other, message in [
            (MLP(2, [8, 1]), r"layers.0.w.*\(2, 8\).*\(2, 16\)"),
            (MLP(2, [16, 1, 1]), "layers.2"),
        ]:
            with self.assertRaisesRegex(ValueError, message):
                other.load(path)
        broken = Layer(2, 2)
        broken.w = Value([1.0])
        with self.assertRaises(ValueError):
            broken.load(path)
        self.assertEqual([p.data.tolist() for p in twin.parameters()], before)
        self.assertEqual(os.listdir(folder), ["weights"])
        with self.assertRaises(OSError):
            model.save(folder / "missing" / "weights")
        for twin, steps in (pickle.loads(pickle.dumps((model, optimizer))), copy.deepcopy((model, optimizer))):
            self.assertIs(steps.params[0], twin.parameters()[0])
            np.testing.assert_array_equal(twin(x).data.data, model(x).data.data)
        self.assertEqual(repr(model), "MLP(2, [16, 1], activation='tanh') with 65 parameters")
        self.assertEqual(repr(Layer(2, 3)), "Layer(2, 3, activation='tanh')")

    def test_a_printed_module_is_a_table(self):
        class Pair(Module):
            def __init__(self):
                self.scale, self.parts = Value(1.0), {"first": MLP(2, [1000, 1]), "again": None}
                self.parts["again"] = self.parts["first"]  # counted once

        table = """
Pair                  parameters              numbers
                      scale ()                      1
parts.first.layers.0  w (2, 1000), b (1000,)    3,000
parts.first.layers.1  w (1000, 1), b (1,)       1,001
total                                           4,002"""
        self.assertEqual(str(Pair()), table.strip("\n"))
        self.assertEqual(str(Module()), "Module  parameters  numbers\ntotal                     0")

    def test_numpys_errstate_is_a_context_variable(self):
        """Which a step asks for, in place of the errstate itself."""
        empty = contextvars.Context()
        self.assertFalse(empty.run(contextvars.copy_context))
        self.assertEqual(empty.run(np.geterr), {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"})
        empty.run(np.seterr, over="raise")
        self.assertTrue(empty.run(contextvars.copy_context))

    def test_importing_it_loads_little(self):
        code = "import sys, numpy; before = set(sys.modules); import picograd; print(*set(sys.modules) - before)"
        run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
        heavy = {"tempfile", "pathlib", "zipfile", "subprocess", "multiprocessing", "concurrent.futures", "graphviz"}
        self.assertFalse(heavy & set(run.stdout.split()))

    def test_it_can_be_imported_in_every_way(self):
        folder = self.folder
        package = folder / "theirs" / "inner"
        package.mkdir(parents=True)
        (package / "picograd.py").write_text((HERE / "picograd.py").read_text())
        (package / "__init__.py").write_text("")
        for code in [
            "from theirs.inner.picograd.nn import MLP, Value; MLP(2, [1])",
            "import theirs.inner.picograd.nn; theirs.inner.picograd.nn.MLP(2, [1])",
            "import pickle, theirs.inner.picograd as p; pickle.loads(pickle.dumps(p.Value(1.0) * 2))",
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import picograd.nn, theirs.inner.picograd",
        ]:
            run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
            self.assertEqual(run.returncode, 0, run.stderr)


class TestDraw(InFolder):
    """Room 7: what pictures say, of any text, and what becomes of files."""

    @staticmethod
    def boxes(graph):
        """Node name -> its label's lines, that of an operation first; boxes are v0, v1, ..."""
        found = re.findall(r"^\t(v\d+) \[label=<(.*?)> tooltip=", graph.source, re.M)
        return {
            name: html.unescape(re.sub("<(?!br/).*?>", "", label.replace("</tr><tr>", "<br/>"))).split("<br/>")
            for name, label in found
        }

    @staticmethod
    def edges(graph):
        return re.findall(r"^\t(\w+) -> (\w+)", graph.source, re.M)

    @staticmethod
    def svg_text(graph):
        """The lines of text in the boxes of the picture that dot makes."""
        space = "{http://www.w3.org/2000/svg}"
        groups = ElementTree.fromstring(graph.pipe(format="svg")).iter(space + "g")
        texts = [text for group in groups if group.get("class") == "node" for text in group.iter(space + "text")]
        lines = ["".join(text.itertext()).replace("\N{NO-BREAK SPACE}", " ").strip() for text in texts]
        return [line for line in lines if line]

    def test_scalar_graph(self):
        a, b = Value(2.0, label="a"), Value(3.0, label="b")
        c = a * b + a**2
        c.label = "c"
        self.assertEqual(self.boxes(draw(a * b))["v2"], ["*", "6"])  # no gradient before backward
        c.backward()
        graph = draw(c)
        expected = {
            "v0": ["a", "2", "grad 7"],
            "v1": ["b", "3", "grad 2"],
            "v2": ["*", "6", "grad 1"],
            "v3": ["· ** 2", "4", "grad 1"],
            "v4": ["+", "c", "10", "grad 1"],
        }
        self.assertEqual(self.boxes(graph), expected)
        self.assertEqual(self.edges(graph), [tuple(e.split()) for e in ("v0 v2", "v1 v2", "v0 v3", "v2 v4", "v3 v4")])
        self.assertEqual(graph.source, draw(c).source)

    def test_kinds(self):
        x, w = Tensor([1.0, 2.0], label="x"), Value([3.0, 4.0])
        result = w * x * np.float32([5.0, 6.0]) + 7.0
        colours = {}
        for name, colour in re.findall(r"^\t(v\d+) .*?<table .*?bgcolor=\"(#\w+)\"", draw(result).source, re.M):
            colours.setdefault(colour, []).append(self.boxes(draw(result))[name])
        constant, leaf, inner = [["[5, 6]"]], [["[3, 4]"]], [["*", "[3, 8]"], ["*", "[15, 48]"]]
        self.assertEqual(sorted(colours.values()), [inner, leaf, constant, [["x", "[1, 2]"]], [["· + 7", "[22, 55]"]]])
        self.assertEqual(self.boxes(draw(w * Tensor([1.0, 2.0])))["v1"], ["input", "[1, 2]"])
        legend = re.findall("<td border.*?>(.*?)</td>", draw(result).source)
        self.assertEqual(legend, ["leaf", "input", "constant", "operation", "result"])
        self.assertEqual(re.findall("<td border.*?>(.*?)</td>", draw(w).source), ["leaf"])

    def test_the_legend_explains_the_marks(self):
        def notes(root):
            return re.findall('<font point-size="9">(.*?)</font>', draw(root).source)

        a, b = Value(1.0), Value(2.0)
        self.assertEqual(notes(a + b), [])
        self.assertRegex(notes(2.0 - a)[0], "^· stands for an operand")
        self.assertRegex(notes(a - b)[0], "order of operands matters")
        self.assertRegex(notes(np.stack([a, b, a, b]))[0], "numbers at arrows")
        wide = Value(np.ones(9))
        total = wide.sum()
        total.backward()
        self.assertEqual([note.split(" is ")[0] for note in notes(total)], ["<i>grad</i>", "<i>max |grad|</i>"])
        self.assertIn("<b>one &lt; two</b>", draw(a, caption="one < two").source)

    def test_not_finite(self):
        x, w = Value([1.0, np.inf]), Value([0.0, 2.0])
        boxes = re.findall(r"^\t(v\d+) .*?<table .*? border=\"(\d)\"", draw((x * w).sum()).source, re.M)
        self.assertEqual(boxes, [("v0", "3"), ("v1", "1"), ("v2", "3"), ("v3", "3")])
        root = np.sqrt(w).sum()
        with np.errstate(divide="ignore"):
            root.backward()  # an infinite gradient of a finite number
        self.assertEqual(draw(root).source.count(' border="3"'), 2)  # of w, and in the legend
        w.grad = 0
        self.assertNotIn("not finite", draw(w * 2).source)

    def test_hover_texts(self):
        v = Value(np.arange(3.0).reshape(3, 1), label="v\\N")
        (v * 2).sum().backward()
        self.assertIn(r'tooltip="[[0.],\n [1.],\n [2.]]\ngrad\n[[2.],\n [2.],\n [2.]]"', draw(v).source)
        self.assertIn('tooltip="[0., 0., 0., ..., 0., 0., 0.]"', draw(Value(np.zeros(1000))).source)

    def test_contrast(self):
        def luminance(colour):
            parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return np.dot(linear, [0.2126, 0.7152, 0.0722])

        def contrast(a, b):
            dark, light = sorted([luminance(a), luminance(b)])
            return (light + 0.05) / (dark + 0.05)

        source = draw((Value([1.0]) * Tensor([2.0]) + np.float32([3.0, np.nan])).sum()).source
        (ink,) = set(re.findall(r'fontcolor="(#\w+)"', source))
        fills, borders = (set(re.findall(rf'[ \[]{key}="(#\w+)"', source)) for key in ("bgcolor", "color"))
        self.assertEqual((len(fills), len(borders)), (6, 6))
        for fill in fills:
            self.assertGreater(contrast(ink, fill), 12)
        for border in borders:
            self.assertGreater(contrast(border, "#ffffff"), 5)

    def test_arrays(self):
        v = Value(np.arange(6.0).reshape(2, 3), label="v")
        w = v * Tensor(-2.0)
        w.backward(np.arange(6.0).reshape(2, 3))
        boxes = self.boxes(draw(w))
        self.assertEqual(boxes["v0"], ["v", "(2, 3) float32", "max |grad| 10"])
        self.assertEqual(self.boxes(draw(v[:, :2] / 3))["v1"], ["getitem [:, :2]", "[[0, 1], [3, 4]]"])
        self.assertEqual(self.boxes(draw(v[:0]))["v1"], ["getitem [:0]", "(0, 3) float32"])
        self.assertEqual(self.boxes(draw(v[0] > 1))["v2"], ["· > 1", "[False, False, True]"])
        self.assertEqual(self.boxes(draw(v[0, 0] / 3 - np.inf))["v3"], ["· - inf", "-inf"])
        huge = Value(np.ones(9))
        huge.sum().backward(1e30)  # its square, for a norm, would not fit float32
        self.assertEqual(self.boxes(draw(huge))["v0"][1], "max |grad| 1e+30")
        huge.grad = np.where(np.arange(9) > 4, np.nan, 1.0)
        self.assertEqual(self.boxes(draw(huge))["v0"][1], "max |grad| nan")
        huge.data = np.where(np.arange(9) > 4, np.nan, 1.0)
        self.assertEqual(self.boxes(draw(huge))["v0"][:2], ["(9,) float32", "4 nan"])
        empty = Value(np.zeros((0, 2)))
        empty.sum().backward()
        self.assertEqual(self.boxes(draw(empty))["v0"], ["(0, 2) float32", "max |grad| 0"])

    def test_heads(self):
        a, b = Value(2.0), Value(3.0)
        cases = [
            (-a, "neg"),
            (+a, "pos"),
            (abs(a), "abs"),
            (~(a > b), "invert"),
            (10.0 / a, "10 / ·"),
            (a / 3.0, "· / 3"),
            (a - b, "-"),
            (a % -2.5, "· % -2.5"),
            (np.maximum(a, 0.0), "maximum(·, 0)"),
            (np.where(a > b, 1.0, b), "where(·, 1, ·)"),
            (np.stack([a, 1.0]), "stack(·, 1) axis=0"),
            (np.tanh(a), "tanh"),
        ]
        for result, expected in cases:
            with self.subTest(expected=expected):
                self.assertEqual([*self.boxes(draw(result)).values()][-1][0], expected)

    def test_parameters(self):
        v = Value(np.ones((4, 5)))
        cases = [
            (v.sum(axis=0, keepdims=True), ["sum", "axis=0", "keepdims=True"]),
            (v.sum(), ["sum"]),
            (v.sum(axis=1), ["sum axis=1"]),
            (v.reshape(2, -1), ["reshape", "shape=(2, -1)"]),
            (v[::-1, 1:3], ["getitem [::-1, 1:3]"]),
            (v[..., None, 2], ["getitem", "[..., None, 2]"]),
            (v[np.array([0, 2])], ["getitem [array(2,)]"]),
            (v[Tensor([1, 2], dtype=np.int64)], ["getitem [·]"]),
            (v.astype(np.float64), ["astype dtype=float64"]),
            (np.einsum("ij->ji", v), ["einsum", "subscripts='ij->ji'"]),
        ]
        for result, expected in cases:
            with self.subTest(expected=expected):
                lines = [*self.boxes(draw(result)).values()][-1]
                self.assertEqual(lines[: len(expected)], expected)

    def test_one_object_is_one_box(self):
        x, t = Value([1.0, 2.0]), Tensor([3.0, 4.0])
        constant = np.float32([5.0, 6.0])
        graph = draw((x * x + t * x) * t + constant + x * constant)
        boxes = [*self.boxes(graph).values()]
        for text in (["[1, 2]"], ["input", "[3, 4]"], ["[5, 6]"]):
            self.assertEqual(boxes.count(text), 1)
        self.assertEqual(self.edges(draw(x * x)), [("v0", "v1"), ("v0", "v1")])
        self.assertEqual(len(self.boxes(draw(Value(1.0) * 2.0 * 2.0 * 2.0))), 4)  # numbers are no boxes

    def test_order_of_operands(self):
        def ends(result, rankdir="LR"):
            return re.findall(r"^\t(\w+) -> \w+ \[(head\w+)=(\w+) ", draw(result, rankdir=rankdir).source, re.M)

        a, b = Value(1.0), Value(2.0)
        self.assertEqual(ends(a - b), [("v0", "headport", "nw"), ("v1", "headport", "sw")])
        self.assertEqual(ends(b - a), [("v1", "headport", "nw"), ("v0", "headport", "sw")])
        self.assertEqual(ends(b - a, "TB"), [("v1", "headport", "nw"), ("v0", "headport", "ne")])
        self.assertEqual(ends(a * b), [])
        four = ends(np.stack([b, a, b, a]))
        self.assertEqual(four, [(v, "headlabel", str(i)) for i, v in enumerate(["v1", "v0", "v1", "v0"], 1)])

    def test_direction(self):
        short, long = Value(1.0).tanh(), Value(1.0)
        for _ in range(40):
            long = long.tanh()
        wide = np.stack([Value(1.0, label="w" * 40) for _ in range(40)]).sum()  # downwards, 40 boxes beside each other
        for root, expected in [(wide, "LR"), (long, "TB"), (short, "LR")]:
            self.assertIn(f"rankdir={expected} ", draw(root).source)
        self.assertIn("rankdir=TB ", draw(short, rankdir="TB").source)

    @staticmethod
    def operation(name):
        """A primitive with any name, which `TABLE` and `PRIMITIVES` do not keep."""
        with mock.patch.dict(TABLE), mock.patch.dict(PRIMITIVES):
            return primitive(lambda x, index=0, how=None: x, lambda g, out, x, index=0, how=None: g, name=name)

    @needs_dot
    def test_any_text_is_safe(self):
        texts = r"""\ \\ a"b 'a' <b> </b> < > <> a|b {a} { } & &amp; &#0; --> <!-- ]]> <br/>""".split()
        texts += [*r"\N \G \E \T \l \n %s {0} # ; ->".split(), '"', "a; b -> c [d=e]", "grüße ∂x 日本語 🙂", "x" * 80]
        for text in texts:
            with self.subTest(text=text):
                result = self.operation(text)(Value(1.0, label=text))
                self.assertEqual(self.svg_text(draw(result)), [text, "1", text, "1"])
        shown = {"a\nb": ["a", "b"], "": [], "  \n ": [], "y" * 10**6: ["y" * 79 + "…"]}
        shown |= {text: [ascii(text)[1:-1]] for text in ("\x00", "a\u202eb", "\ud800", "\uffff", "\x1b[1m", "a\tb")}
        for text, lines in shown.items():
            with self.subTest(text=text[:100]):
                self.assertEqual(self.svg_text(draw(Value(1.0, label=text))), [*lines, "1"])
        self.assertEqual(self.svg_text(draw(self.operation(" ")(Value(1.0)))), ["1", "1"])

    @needs_dot
    def test_parameters_are_safe(self):
        class Odd:
            def __repr__(self):
                return '<"\\N&|\n>' * 1000

        odd = self.operation("odd")
        lines = self.svg_text(draw(odd(Value(1.0), index=3, how=Odd())))
        self.assertIn("index=3", lines)
        self.assertTrue(any(line.startswith('how=<"\\N&|') for line in lines), lines)

    def test_too_many_nodes(self):
        v = Value(1.0)
        for _ in range(100_000):
            v = -v
        with self.assertRaisesRegex(ValueError, r"100001 nodes .*max_nodes is 300\. Draw a part"):
            draw(v)
        two = Value(1.0) * 2.0 * 3.0 + Tensor(4.0)
        with self.assertRaisesRegex(ValueError, r"5 nodes \(4 Values, 1 Tensors and constants\), and max_nodes is 4"):
            draw(two, max_nodes=4)
        self.assertEqual(len(self.boxes(draw(two, max_nodes=5))), 5)

    @needs_dot
    def test_files(self):
        v = Value(2.0, label="v") ** 2
        for name, magic in [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("B.PNG", b"\x89PNG")]:
            path = self.folder / name
            path.write_bytes(b"old")
            draw(v, path if name == "a.png" else str(path))
            self.assertTrue(path.read_bytes().startswith(magic), name)
        self.assertEqual(sorted(os.listdir(self.folder)), ["B.PNG", "a.pdf", "a.png", "a.svg"])
        picture = ElementTree.parse(self.folder / "a.svg").getroot()
        space = "{http://www.w3.org/2000/svg}"
        self.assertIn("prefers-color-scheme: dark", picture.find(f"{space}style").text)
        titles = [link.get("{http://www.w3.org/1999/xlink}title") for link in picture.iter(f"{space}a")]
        self.assertEqual(titles, ["2.", "4."])
        if os.name == "posix":
            (self.folder / "plain").touch()
            self.assertEqual((self.folder / "a.png").stat().st_mode, (self.folder / "plain").stat().st_mode)

    def test_a_failure_leaves_the_old_picture(self):
        path = self.folder / "a.png"
        path.write_bytes(b"old")
        for error, places in [
            (OSError("disk full"), ["os.replace"]),
            (KeyboardInterrupt(), ["subprocess.run", "os.replace"]),
        ]:
            for where in places:
                done = subprocess.CompletedProcess([], 0, b"new", b"")
                with mock.patch("subprocess.run", return_value=done), mock.patch(where, side_effect=error):
                    with self.assertRaises(type(error)):
                        draw(Value(1.0), path)
                self.assertEqual(os.listdir(self.folder), ["a.png"])
                self.assertEqual(path.read_bytes(), b"old")

    def test_without_dot(self):
        v = Value(2.0, label="größe") ** 2
        with mock.patch.dict(os.environ, PATH=str(self.folder)):
            self.assertIn("größe", draw(v).source)
            with self.assertRaises(RuntimeError) as caught:
                draw(v, self.folder / "a.png")
        self.assertEqual(os.listdir(self.folder), ["a.gv"])
        self.assertEqual((self.folder / "a.gv").read_text(encoding="utf-8"), draw(v).source)
        for part in ("apt install", "brew install", "winget install", "conda install", str(self.folder / "a.gv")):
            self.assertIn(part, str(caught.exception))

    @unittest.skipUnless(os.name == "posix", "needs permission to execute")
    def test_a_dot_that_cannot_be_run(self):
        dot = self.folder / "dot"
        dot.touch()
        for mode in (0o755, 0o644):  # empty; not executable
            dot.chmod(mode)
            with mock.patch.dict(os.environ, PATH=str(self.folder)):
                with self.assertRaisesRegex(RuntimeError, r"cannot be run \(.*(?s:.*)source was saved as .*a\.gv"):
                    draw(Value(1.0), self.folder / "a.png")
        self.assertEqual(sorted(os.listdir(self.folder)), ["a.gv", "dot"])

    def test_no_label_and_another_copy(self):
        v = Value(1.0)
        v.label = None
        self.assertEqual(self.boxes(draw(v)), {"v0": ["1"]})
        other = type("Value", (), {"_picograd": True, "__module__": "theirs"})
        with self.assertRaisesRegex(TypeError, "draw: root must be a Value, got Value: a Value of theirs .* two"):
            draw(other())

    def test_the_source_replaces_no_file_of_others(self):
        own = self.folder / "a.gv"
        own.write_bytes(b"mine")
        (self.folder / "a.1.gv").mkdir()
        for _ in range(2):
            with mock.patch.dict(os.environ, PATH=str(self.folder)), self.assertRaisesRegex(RuntimeError, r"a\.2\.gv"):
                draw(Value(2.0), self.folder / "a.svg")
        self.assertEqual(sorted(os.listdir(self.folder)), ["a.1.gv", "a.2.gv", "a.gv"])
        self.assertEqual(own.read_bytes(), b"mine")

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_a_dot_that_does_not_work(self):
        programs, pictures = self.folder / "bin", self.folder / "out"
        programs.mkdir()
        pictures.mkdir()
        (pictures / "a.png").write_bytes(b"old")
        for script, message in [
            ("sleep 60", "did not finish within 0.5 s"),
            ("cat >/dev/null", r"no picture \(exit code 0\): no message"),
            ("exit 0", r"no picture \(exit code 0\)"),
            ("echo half; echo 'no such format' >&2; exit 3", r"no picture \(exit code 3\): no such format"),
        ]:
            (programs / "dot").write_text(f"#!/bin/sh\n{script}\n")
            (programs / "dot").chmod(0o755)
            path = f"{programs}{os.pathsep}{os.environ['PATH']}"
            with self.subTest(script=script), mock.patch.dict(os.environ, PATH=path):
                with mock.patch.object(picograd, "_DOT_SECONDS", -0.5 if "sleep" in script else 60.0):  # and 1 s a box
                    with self.assertRaisesRegex(RuntimeError, message):
                        draw(Value(1.0), pictures / "a.png")
                self.assertEqual([f.read_bytes() for f in pictures.iterdir()], [b"old"])

    def test_without_the_package(self):
        with mock.patch.dict(sys.modules, graphviz=None):
            with self.assertRaisesRegex(ImportError, "pip install graphviz"):
                draw(Value(1.0), self.folder / "a.png")
        self.assertEqual(os.listdir(self.folder), [])

    def test_bad_input(self):
        v = Value(1.0)
        for root in (1.0, Tensor(1.0), [v], None):
            with self.assertRaisesRegex(TypeError, f"root must be a Value, got {type(root).__name__}"):
                draw(root)
        for name in ("a", "a.jpg", "a.gv", ".png", "", "a.png.zip"):
            with self.assertRaisesRegex(ValueError, r"filename must end in \.png, \.svg or \.pdf, got "):
                draw(v, name)
        with self.assertRaisesRegex(TypeError, "filename must be a string or path, got 3"):
            draw(v, 3)
        with self.assertRaisesRegex(ValueError, "filename must be a path without zero bytes, got 'a.x00.png'"):
            draw(v, "a\0.png")
        with self.assertRaisesRegex(FileNotFoundError, "filename must be in an existing folder, got .*nowhere"):
            draw(v, self.folder / "nowhere" / "a.png")
        for limit in (0, -1, 1.5, True, None, "9"):
            with self.assertRaisesRegex(ValueError, "max_nodes must be a positive integer, got "):
                draw(v, max_nodes=limit)
        for direction in ("lr", "", 1):
            with self.assertRaisesRegex(ValueError, "rankdir must be 'LR', 'TB' or None, got "):
                draw(v, rankdir=direction)


@needs_power
class TestBlocks(Strict):
    """Room 2: block programs, deferral that is never seen, threads and processes, and what goes wrong with them."""

    def setUp(self):
        super().setUp()
        before = get_distributed_config()
        self.addCleanup(lambda: set_distributed_config(**vars(before)))

    @contextlib.contextmanager
    def in_blocks(self):
        """Small arrays are distributed, and have many blocks."""
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.multiple(picograd, _BLOCK_BYTES=32, _FEW_BLOCKS=0),
        ):
            yield

    def run_script(self, code, *args, **options):
        """A script of its own, without an `if __name__ == "__main__"`, as a newcomer writes them."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "script.py"
            small = "import picograd; picograd._BLOCK_BYTES, picograd._FEW_BLOCKS = 1 << 16, 0"
            path.write_text(
                f"import sys; sys.path.insert(0, {str(HERE)!r}); {small}\n{textwrap.dedent(code)}", encoding="utf-8"
            )
            command = [sys.executable, *args, str(path)]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    def script(self, code, *args, **options):
        """The output of a script that must succeed without a word on stderr."""
        run = self.run_script(code, *args, **options)
        self.assertEqual((run.returncode, run.stderr), (0, ""), run.stdout + run.stderr)
        return run.stdout

    def test_copies_share_what_was_handed_out_as_the_originals_do(self):
        for how in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
            with self.in_blocks():
                t = Tensor(np.arange(600.0))
                twin, array = how((t, t.data))
                array[0] = 5.0
                self.assertEqual((twin.data[0], t.data[0], twin.distributed), (5.0, 0.0, True))

    def test_what_is_written_back_after_switching_stays_shared(self):
        with self.in_blocks():
            v = Value(Tensor(np.arange(600.0), distributed=False))
            v.data.enable_distributed()
            array, t = v.data.data, v.data
            v.data.disable_distributed()
            v.data = t
            array[0] = 9.0
            self.assertEqual(v.data.data[0], 9.0)

    def test_what_still_waited_is_not_kept_once_distribution_is_off(self):
        with distributed_config(enabled=True):
            x = Tensor(np.ones(1_000_000))
            y = x * 2 + 1
        self.assertEqual(y.data[0], 3.0)
        del x, y
        gc.collect()
        self.assertEqual(picograd._memory.free, [])

    def test_a_module_that_is_being_imported_makes_no_worker(self):
        with mock.patch.dict(sys.modules, {"multiprocessing.process": types.ModuleType("multiprocessing.process")}):
            self.assertFalse(picograd._in_worker())

    def test_prototypes_may_be_named(self):
        with self.in_blocks():
            t = Tensor(np.ones(600))
            self.assertEqual((np.empty_like(prototype=t).shape, np.zeros_like(a=t).shape), ((600,), (600,)))

    def test_config(self):
        set_distributed_config(enabled=False, num_workers=None)
        with distributed_config(enabled=True, num_workers=3) as config:
            self.assertEqual((config.enabled, get_distributed_config().num_workers), (True, 3))
            with (
                self.assertRaisesRegex(ValueError, "num_workers must be at least 1, got 0"),
                distributed_config(num_workers=0),
            ):
                self.fail("not reached")
        self.assertEqual((get_distributed_config().enabled, get_distributed_config().num_workers), (False, None))
        if hasattr(os, "sched_getaffinity"):
            cores = os.sched_getaffinity(0)
            self.addCleanup(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, {min(cores)})
            self.assertEqual(picograd._usable_cores.__wrapped__(), 1)

    def test_who_is_distributed(self):
        data = np.ones((4, 3))
        with (
            distributed_config(enabled=True, min_elements_for_parallel=10),
            mock.patch.object(picograd, "_BLOCK_BYTES", 8),
        ):
            free, forced, off = Tensor(data), Tensor(data[:1], distributed=True), Tensor(data, distributed=False)
            self.assertEqual([t.distributed for t in (free, forced, off)], [True, True, False])
            self.assertEqual([(t * 2).distributed for t in (free, forced, off)], [True, True, False])
            self.assertEqual([t.sum().distributed for t in (free, forced, off)], [False] * 3)
            self.assertEqual([free[:2].distributed, free.T.distributed, (free + off).distributed], [False, True, True])
            self.assertIs(type((free * 2)._held), Chunked)
            self.assertIs(type((off * 2)._held), np.ndarray)
            later = free * 2
        self.assertFalse(free.distributed)
        self.assertIs(type((free * 2)._held), np.ndarray, "Tensors follow the configuration in force")
        np.testing.assert_array_equal((later + free).data, 3 * data)
        forced.disable_distributed()
        self.assertIs(type((forced * 2)._held), np.ndarray)

    def test_elementwise_and_reductions_are_numpys(self):
        rng = np.random.default_rng(SEED)
        shapes = [(40, 7), (1, 300), (300, 1), (5, 6, 70), (300,), (3, 0)]
        for processes in (False, True):
            with distributed_config(enabled=True, min_elements_for_parallel=1, use_processes=processes, num_workers=2):
                for shape in shapes if not processes else shapes[:4]:
                    a, b, row = (rng.normal(size=s).astype(np.float32) for s in (shape, shape, shape[-1:]))
                    x, y, r = Tensor(a), Tensor(b), Tensor(row)
                    n = Tensor(np.arange(a.size).reshape(shape), np.int32)
                    with mock.patch.object(picograd, "_BLOCK_BYTES", 256), np.errstate(all="ignore"):
                        pairs = [
                            (x * 2 + 1, a * 2 + 1),
                            (np.tanh(x) * y - x**2 / (1 + y * y), np.tanh(a) * b - a**2 / (1 + b * b)),
                            (np.where(x > y, x, -r), np.where(a > b, a, -row)),
                            (r - x, row - a),
                            (n * x + n, n.data.astype(np.float32) * a + n.data.astype(np.float32)),
                            (n // 3 + n, n.data // 3 + n.data),
                            (relu(x) + np.abs(y), np.maximum(a, 0) + np.abs(b)),
                            ((x > 0) & (y > 0), (a > 0) & (b > 0)),
                            (np.clip(x, -1, 1) + x.astype(np.float64), np.clip(a, -1, 1) + a.astype(np.float64)),
                        ]
                        for ours, theirs in pairs:
                            self.assertEqual((ours.shape, ours.dtype), (theirs.shape, theirs.dtype))
                            np.testing.assert_allclose(ours.data, theirs, rtol=1e-6, atol=1e-6)
                        for axis in [None, *range(-len(shape), len(shape)), tuple(range(len(shape)))]:
                            for name in ("sum", "mean", "max", "min", "prod", "var", "std", "any", "all"):
                                if not a.size and name in ("max", "min", "mean", "var", "std"):
                                    continue
                                for keepdims in (False, True):
                                    for t, array in ((x * 1, a), (n * 1, n.data)):
                                        if name == "prod" and t.dtype != np.float32:
                                            continue
                                        ours = getattr(np, name)(t, axis=axis, keepdims=keepdims)
                                        theirs = np.asarray(getattr(np, name)(array, axis=axis, keepdims=keepdims))
                                        self.assertEqual((ours.shape, ours.dtype), (theirs.shape, theirs.dtype), name)
                                        np.testing.assert_allclose(
                                            ours.data, theirs, rtol=1e-4, atol=1e-5, err_msg=name
                                        )
        with distributed_config(enabled=True, min_elements_for_parallel=1):
            x = Tensor([1.0, np.nan, -np.inf])
            for name in ("sum", "max", "min", "mean"):
                self.assertTrue(np.isnan(getattr(x * 1, name)().item()), name)
            with self.assertRaises(ValueError):
                Tensor(np.ones((2, 3))) + Tensor(np.ones(4))
            with self.assertRaises(np.exceptions.AxisError):
                Tensor(np.ones((2, 3))).sum(axis=2)

    def test_what_blocks_do_not_know_is_numpys(self):
        """Operands that repeat, numbers that do not fit, several results, empty arrays and further parameters."""
        calls = [
            *(lambda x, w: np.where(x > 1, w, 1.0), lambda x, w: np.clip(w, x, 3), lambda x, w: np.where(x, w, w) + x),
            *(lambda x, w: x * 10**400, lambda x, w: np.ldexp(x, 10**400), lambda x, w: np.clip(x, -(10**400), 1)),
            *(lambda x, w: x + 2**70, lambda x, w: np.where(x, x, 10**400), lambda x, w: operator.imul(x, 10**400)),
            *(
                lambda x, w: np.modf(x),
                lambda x, w: np.frexp(x),
                lambda x, w: np.divmod(x, 2),
                lambda x, w: divmod(x, 2),
            ),
            *(lambda x, w: np.var(x, mean=np.ones(1, x.dtype)), lambda x, w: np.std(x, correction=1)),
            *(lambda x, w: np.sum(x, initial=3), lambda x, w: np.sum(x, where=x > 1), lambda x, w: np.sum(x, axis=[0])),
            *(lambda x, w: x[:0].mean(), lambda x, w: np.maximum(x[:0], x[:0]).std(), lambda x, w: (x[:0] * 1).max()),
            *(lambda x, w: (x + np.ones((0, 1), "f")).var(0), lambda x, w: (x + np.ones((0, 1), "f")).sum(0)),
        ]

        def outcome(call, on, dtype, past):
            with distributed_config(enabled=on, min_elements_for_parallel=1), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = Tensor(np.arange(40) % 7, dtype)
                x = {"new": x, "waits": np.maximum(x, x), "given": x}[past]
                x * 2, np.ldexp(x, 2)  # the dtypes are known by now
                seen = x.data if past == "given" else None
                try:
                    out = call(x, np.broadcast_to(x, (3, 40)))
                except (TypeError, OverflowError, ValueError) as error:
                    np.testing.assert_array_equal(x.data, np.arange(40) % 7)
                    return type(error)
                out = [y.numpy() for y in (out if isinstance(out, tuple) else [out])]
                self.assertIs(x.data, x.data if seen is None else seen)
                return [(y.shape, y.dtype, y.tolist()) for y in out]

        with mock.patch.object(picograd, "_BLOCK_BYTES", 64):
            for few in (0, 8):
                with mock.patch.object(picograd, "_FEW_BLOCKS", few):
                    for i, dtype, past in itertools.product(range(len(calls)), "fe", ("new", "waits", "given")):
                        ours, theirs = (outcome(calls[i], on, dtype, past) for on in (True, False))
                        np.testing.assert_equal(ours, theirs, f"{i} {dtype} {past}")

    def test_in_place_at_once(self):
        """What is small is written to at once, after all that waits to read it; what waits later fuses as before."""
        with distributed_config(enabled=True):
            x = Tensor(np.zeros(1_100_000))
            y, before = x * 2, x._held.buffer.array
            x += 1
            x *= x
            x -= x * 0.5  # of which no block is computed
            self.assertIs(x._held.buffer.array, before)
            self.assertEqual((x.max().item(), y.max().item(), bool(x._held.buffer.given)), (0.5, 0, False))
            with mock.patch.object(picograd, "run_blocks", wraps=picograd.run_blocks) as runs:
                self.assertEqual((x * 2 + 1).sum().item(), 2 * x.size)
                self.assertEqual(runs.call_count, 1)
            seen = x.data
            x += 1
            self.assertEqual((seen is x.data, seen[0], x._held.buffer.given > 0), (True, 1.5, True))

            def look(*args, out=None, forward=np.add):  # as the handler of a signal may do
                self.assertEqual(x.data.size, 1_100_000)
                return forward(*args, out=out)

            x = Tensor(np.zeros(1_100_000))
            add = picograd.TABLE[np.add]
            with mock.patch.object(add, "forward", look):
                x += 1
            self.assertEqual((x._held.buffer.given, x.data[0]), (1, 1))

    def test_blocks_of_one_column(self):
        """What NumPy's loops write to memory with gaps is not always right."""
        data = np.random.default_rng(SEED).normal(size=(32, 97))
        data[:, -1] = np.inf
        with distributed_config(enabled=True), mock.patch.multiple(picograd, _BLOCK_BYTES=4096, _FEW_BLOCKS=0):
            x = Tensor(data, np.float64, distributed=True)
            functions = [f for f in TABLE if isinstance(f, np.ufunc) and f.nin < 3 and f.nout == 1]
            for f in [f for f in functions if f"{'d' * f.nin}->?" in f.types]:
                y = f(*[x] * f.nin)
                y.any(axis=0), y.any(axis=0)  # the second one keeps y
                np.testing.assert_array_equal(y.data, f(*[data] * f.nin), f.__name__)

    def test_a_reader_that_fails_is_not_lost(self):
        with distributed_config(enabled=True), mock.patch.object(picograd, "_FEW_BLOCKS", 0):
            x = Tensor(np.ones(3_000_000)) * 1
            y = x * 2
            x.sum(), x.max()  # x waits no longer
            with mock.patch.object(picograd, "run_blocks", side_effect=ValueError):
                self.assertRaises(ValueError, lambda: x.data)
            x.data[0] = 5
            self.assertEqual((x.numpy()[0], y.numpy()[0]), (5, 2))

    def test_results_do_not_depend_on_the_workers(self):
        data = np.random.default_rng(SEED).normal(size=(300, 1000)).astype(np.float32)
        found = set()
        for processes, n in ((False, 1), (False, 2), (False, 5), (True, 2), (True, 3)):
            with distributed_config(enabled=True, num_workers=n, use_processes=processes):
                x = Tensor(data)
                results = [np.tanh(x).sum(), (x * 3 - 1).mean(0), np.exp(x).sum(1), np.std(x * 2), (x * 2).max()]
                found.add(b"".join(np.asarray(r.data).tobytes() for r in results))
        self.assertEqual(len(found), 1)

    def test_sums_are_accurate(self):
        data = np.random.default_rng(SEED).uniform(size=3_000_000).astype(np.float32)
        exact = math.fsum(data.tolist())
        with distributed_config(enabled=True):
            self.assertLessEqual(
                abs(np.sum(Tensor(data) * 1).item() - exact), abs(float(data.sum()) - exact) + 1e-7 * exact
            )

    def test_printing_is_one_pass_that_keeps_nothing(self):
        data = np.ones((4000, 1000), np.float32)
        data[1, 2:5] = np.nan
        with distributed_config(enabled=True):
            y = Tensor(data) * 2 + 1
            tracemalloc.start()
            said = repr(y)
            self.assertLess(tracemalloc.get_traced_memory()[1], 8e6, "nothing of full size is allocated")
            tracemalloc.stop()
            self.assertEqual(said, "Tensor(shape=(4000, 1000), dtype=float32, distributed=True, nan=3)")
            self.assertIsNotNone(y._held.buffer.step, "it still waits")
            self.assertEqual(y._held.buffer.given, 0)

    def test_chains_fuse(self):
        with distributed_config(enabled=True), mock.patch.object(picograd, "_FEW_BLOCKS", 0):
            x = Tensor(np.ones((4000, 1000)))
            x * 1
            with mock.patch.object(picograd, "run_blocks", wraps=picograd.run_blocks) as runs:
                y = np.tanh(x * 2 + 1) - x
                runs.assert_not_called()
                self.assertEqual((y.shape, y.distributed), ((4000, 1000), True))
                runs.assert_not_called()
                y.sum()
                self.assertEqual((runs.call_count, len(runs.call_args[0][0]), runs.call_args[0][3]), (1, 4, []))
                tracemalloc.start()
                (x * 2 + 1).sum()
                self.assertLess(tracemalloc.get_traced_memory()[1], 8e6, "nothing of full size is allocated")
                tracemalloc.stop()
                runs.reset_mock()
                y.mean()
                y.max()
                self.assertEqual(
                    [len(call[0][0]) for call in runs.call_args_list], [4, 0], "kept when it was needed again"
                )
                runs.reset_mock()
                z = x
                for _ in range(30):
                    z = z + z
                self.assertEqual(z.max().item(), 2.0**30)
                self.assertLessEqual(sum(len(call[0][0]) for call in runs.call_args_list), 60)
                for _ in range(200):
                    z = z * 1.0
                self.assertLessEqual(max(len(call[0][0]) for call in runs.call_args_list), 32, "what waits is bounded")

    def test_deferral_is_never_seen(self):
        """Random programs of operations, views, in-place forms and writes from outside, against eager NumPy."""
        for processes, count in ((False, 300), (True, 60)):
            config = {"enabled": True, "min_elements_for_parallel": 1, "num_workers": 2, "use_processes": processes}
            with distributed_config(**config), mock.patch.multiple(picograd, _BLOCK_BYTES=256, _FEW_BLOCKS=0):
                for seed in range(SEED % 2**20, SEED % 2**20 + count):
                    with self.subTest(seed=seed, processes=processes):
                        self.random_program(np.random.default_rng(seed))

    def random_program(self, rng):
        shape, ours, theirs, held = (20, 10), [], [], []
        for _ in range(2):
            array = rng.normal(size=shape)
            ours.append(Tensor(array, np.float64))
            theirs.append(array)
        for _ in range(25):
            i, j = rng.integers(len(ours), size=2)
            t, a, u, b = ours[i], theirs[i], ours[j], theirs[j]
            action = rng.integers(12)
            if action < 4:
                f = [
                    lambda x, y: x * 0.5 + y,
                    lambda x, y: np.tanh(x) - y,
                    lambda x, y: np.maximum(x, y),
                    lambda x, y: -x * 0.9,
                ]
                f = f[rng.integers(len(f))]
                if t.shape == u.shape:
                    ours.append(f(t, u))
                    theirs.append(f(a, b))
            elif action == 4:
                ours.append(t[1:])
                theirs.append(a[1:])
            elif action == 5 and t.ndim == 2:
                ours.append(t.T)
                theirs.append(a.T)
            elif action == 6:
                t += 0.25
                a += 0.25
            elif action == 7 and t.shape == u.shape:
                t *= u
                a *= b
            elif action == 8 and a.size:
                t.data[0] = 1.5
                a[0] = 1.5
            elif action == 9 and a.size:
                held.append((t.data, a))
            elif action == 10 and held:
                mine, its = held[rng.integers(len(held))]
                if its.size:
                    mine[-1] += 1
                    its[-1] += 1
            elif action == 11:
                if rng.random() < 0.5:
                    held.clear()
                elif len(ours) > 2:
                    del ours[i], theirs[i], t, u
            if rng.random() < 0.2 and ours:
                k = rng.integers(len(ours))
                np.testing.assert_allclose(ours[k].sum().item(), theirs[k].sum(), rtol=1e-9, atol=1e-9)
            if rng.random() < 0.1 and ours:  # a view or a copy, as the layout has it
                k = rng.integers(len(ours))
                ours.append(ours[k].reshape(-1))
                theirs.append(theirs[k].reshape(-1))
        for t, a in zip(ours, theirs):
            np.testing.assert_allclose(t.data, a, rtol=1e-12)

    def test_values_compute_in_blocks_both_ways(self):
        rng = np.random.default_rng(SEED)
        data, weights = rng.normal(size=(300, 50)), rng.normal(size=50)
        for processes in (False, True):
            grads = []
            for enabled in (False, True):
                with distributed_config(enabled=enabled, min_elements_for_parallel=1000, use_processes=processes):
                    x, w, b = Value(data, np.float64), Value(weights, np.float64), Value(weights, np.float64)
                    loss = np.mean((w * x + b).tanh() ** 2) + np.max(x) + np.sum(np.where(x > 0, x, 0.0), axis=0).mean()
                    loss.backward()
                    grads.append([loss.data.data, *(v.grad.data for v in (x, w, b))])
                    x.grad.data[0] = 0  # what was handed out belongs to whoever has it
            for ours, theirs in zip(*grads):
                np.testing.assert_allclose(
                    ours[1:] if np.ndim(ours) else ours, theirs[1:] if np.ndim(ours) else theirs, rtol=1e-10
                )

    def test_training_while_distributed(self):
        rng = np.random.default_rng(0)
        data, labels = rng.normal(size=(400, 20)), rng.integers(0, 3, 400)
        losses = []
        for enabled in (False, True):
            with distributed_config(enabled=enabled, min_elements_for_parallel=100):
                model = MLP(20, [30, 3], seed=0)
                optimizer = Adam(model.parameters(), 0.01)
                for _ in range(5):
                    optimizer.zero_grad()
                    loss = cross_entropy(model(Tensor(data)), labels)
                    loss.backward()
                    optimizer.step()
                losses.append(loss.item())
        self.assertAlmostEqual(*losses, 5)

    def test_errstate_and_warnings(self):
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.object(picograd, "_BLOCK_BYTES", 64),
        ):
            x = Tensor(np.zeros(100))
            with self.assertWarnsRegex(RuntimeWarning, "divide by zero encountered in divide") as caught:
                (1 / x).sum()
            self.assertEqual(len(caught.warnings), 1, "once, not for each block")
            with np.errstate(all="ignore"):
                quiet = 1 / x
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                quiet.sum()
            with np.errstate(divide="raise"), self.assertRaises(FloatingPointError):
                1 / x

    def test_the_first_operation_waits_too(self):
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.object(picograd, "_BLOCK_BYTES", 64),
        ):
            for make in (Tensor, Value):
                for f in (lambda x: x * 2, lambda x: 1 - x, lambda x: x + x, np.tanh, lambda x: -x, lambda x: x > 0):
                    self.assertIsNone(f(make(np.ones(100)))._held.buffer.array)

    @unittest.skipUnless(sys.platform == "linux", "resets the peak of the memory in use")
    def test_a_reduction_takes_no_memory(self):
        out = self.script(
            """
            import re, numpy as np
            from picograd import Tensor, set_distributed_config
            def peak():
                return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
            for processes in (False, True):
                set_distributed_config(enabled=True, use_processes=processes)
                (Tensor(np.ones(1_000_000)) * 2).sum()  # workers start
                x = Tensor(np.ones(30_000_000, np.float32))
                open("/proc/self/clear_refs", "w").write("5")
                before = peak()
                assert (x * 2 + 1).sum().item() == 90_000_000
                print(peak() - before < 16)
            """
        )
        self.assertEqual(out.split(), ["True", "True"])

    def test_user_primitives_and_failures(self):
        def broken(x):
            raise KeyError("broken")

        half = primitive(lambda x: x / 2, lambda g, out, x: g / 2, name="half", elementwise=True)
        fails = primitive(lambda x: broken(x) if x.size > 1 else x, lambda g, out, x: g, name="fails", elementwise=True)
        tensors = primitive(  # its blocks are large enough to be distributed themselves
            lambda x: np.asarray(Tensor(x) + 1), lambda g, out, x: g, name="tensors", elementwise=True
        )
        try:
            for processes in (False, True):
                with distributed_config(enabled=True, min_elements_for_parallel=1, use_processes=processes):
                    x = Tensor(np.arange(1000.0))
                    self.assertEqual(half(x).sum().item(), 249750)
                    with self.assertRaisesRegex(KeyError, "broken"):
                        fails(x).sum()
                    before = x.data.copy()
                    with self.assertRaises(KeyError):
                        x += fails(x)
                    np.testing.assert_array_equal(x.data, before)
                    self.assertEqual((x + 1).sum().item(), 500500)
                    self.assertEqual(tensors(Tensor(np.ones(1_000_000))).sum().item(), 2_000_000)
        finally:
            for prim in (half, fails, tensors):
                del PRIMITIVES[prim.name], TABLE[prim.forward]

    def test_threads_of_the_user(self):
        with distributed_config(enabled=True, min_elements_for_parallel=1), ThreadPoolExecutor(8) as pool:
            x = Tensor(np.arange(10_000.0), np.float64)
            y = np.sqrt(x) * 2
            sums = list(pool.map(lambda i: (y + i).sum().item(), range(50)))
            np.testing.assert_allclose(sums, [float((np.sqrt(np.arange(1e4)) * 2 + i).sum()) for i in range(50)])

    def test_pickle_and_copy(self):
        with distributed_config(enabled=True, min_elements_for_parallel=1):
            x = Tensor(np.arange(100.0)) * 2
            for twin in (pickle.loads(pickle.dumps(x)), copy.copy(x), copy.deepcopy(x)):
                twin.data[0] = 7
                self.assertEqual((x.data[0], twin.data[1], twin.shape), (0, 2, (100,)))

    def test_whoever_a_job_waits_for_can_compute(self):
        """As finalizers do, in threads of the pools: they wait for nothing that the job holds."""
        answers, here = [], (os.getpid(), threading.current_thread())

        def meanwhile(function):
            def call(*args):
                if (os.getpid(), threading.current_thread()) != here:
                    return function(*args)
                thread = threading.Thread(target=lambda: answers.append((y * 2).sum().item()), daemon=True)
                thread.start()
                thread.join(20)
                self.assertFalse(thread.is_alive(), "it waits for the job that waits for it")
                return function(*args)

            return call

        for processes in (False, True):
            with (
                distributed_config(enabled=True, num_workers=2, use_processes=processes),
                mock.patch.multiple(picograd, _BLOCK_BYTES=1 << 16, _FEW_BLOCKS=0),
            ):
                x, y = Tensor(np.ones(2_000_000)), Tensor(np.ones(2_000_000))
                y = y * 3
                with mock.patch.object(picograd._Job, "tasks", meanwhile(picograd._Job.tasks)):
                    z = np.tanh(x) * 2
                    self.assertAlmostEqual(z.sum().item() / 4e6, math.tanh(1), 5)
                    np.testing.assert_array_equal(x.data, 1)
                    z += y
                    self.assertAlmostEqual(z.data[7], 2 * math.tanh(1) + 3, 5)
        self.assertTrue(answers)
        self.assertEqual(set(answers), {12_000_000})

    def test_handlers_and_finalizers_may_come_at_any_line(self):
        """Whatever they do to an operand is done before the operation or after it."""

        def look(x):
            held.append(x.data)
            held[-1][...] = 5

        def add(x):
            x += 4

        def swap(x):
            y = x * 1
            x.data = np.full(100, 5.0)
            held.append(y.data)

        def operate(x, y):
            return [x * 2]

        def in_place(x, y):
            y += x
            return [y]

        def assign(x, y):
            y.data = x
            return [y]

        def compute(x, y):
            z = np.square(x + y)
            return [z.max(), z.sum() / 100, np.sqrt(z)]

        def outcome(act, program, moment):
            """The results if an action comes at a line of room 8, if it has that many, and all that x holds."""
            lines = itertools.count()

            def trace(frame, event, arg):
                if frame.f_code.co_filename != picograd.__file__:
                    return None
                inside = frame.f_code.co_name in ("compute", "hand_out", "assign")
                if event == "line" and not (inside and picograd._chunk_lock._is_owned()) and next(lines) == moment:
                    sys.settrace(None)
                    act(x)
                    came.append(moment)
                return trace

            x, y = Tensor(np.ones(100), np.float64) * 1, Tensor(np.full(100, 2.0), np.float64) * 1
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                results = program(x, y)
            finally:
                sys.settrace(before)
            if moment == math.inf:
                act(x)
            results = [r.numpy().tolist() for r in results]
            x.data[...] = 7  # nothing that was computed changes
            self.assertTrue((x.numpy() == 7).all())
            return results

        with (
            distributed_config(enabled=True, min_elements_for_parallel=1, num_workers=1),
            mock.patch.object(picograd, "_BLOCK_BYTES", 128),
        ):
            for few, act in itertools.product((0, 8), (look, add, swap)):
                with mock.patch.object(picograd, "_FEW_BLOCKS", few):
                    for program in (operate, in_place, assign, compute):
                        held, came = [], []
                        allowed = [outcome(act, program, moment) for moment in (0, math.inf)]
                        for moment in itertools.count(SEED % 11, 11):
                            found = outcome(act, program, moment)
                            if moment not in came:
                                break
                            self.assertIn(found, allowed, f"{act.__name__} in {program.__name__} at line {moment}")
                        self.assertGreater(moment, 20)

    def test_killed_worker(self):
        out = self.script(
            """
            import os, signal, threading, time, warnings
            import numpy as np, picograd
            from picograd import Tensor, set_distributed_config
            set_distributed_config(enabled=True, use_processes=True, num_workers=2)
            x = Tensor(np.arange(4_000_000) % 1000)
            expected = float((np.tanh(x.numpy()) * 2).sum(dtype=float))
            (x + 1).sum()
            def kill():
                time.sleep(0.01)
                os.kill(next(iter(picograd._workers.pool._processes)), signal.SIGKILL)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                killer = threading.Thread(target=kill)
                killer.start()
                for _ in range(200):
                    assert abs((np.tanh(x) * 2).sum().item() - expected) < 1e-4 * expected
                    if caught:
                        break
                killer.join()
            assert [str(w.message)[:20] for w in caught] == ["a worker process die"], [str(w.message) for w in caught]
            assert picograd._workers.pool is None
            assert (x + 1).sum().item() > 0 and picograd._workers.pool
            print("right")
            """
        )
        self.assertEqual(out, "right\n")

    @unittest.skipUnless(sys.platform == "linux", "looks at /proc and /dev/shm")
    def test_nothing_is_left_behind(self):
        out = self.script(
            """
            import gc, os
            import numpy as np, picograd
            from picograd import Tensor, set_distributed_config
            set_distributed_config(enabled=True, use_processes=True, num_workers=2)
            x = Tensor(np.ones(300_000))
            def fds():
                return len(os.listdir("/proc/self/fd"))
            def memory():
                return int(open("/proc/self/statm").read().split()[1]) * 4096
            before = set(os.listdir("/dev/shm"))
            for i in range(1100):
                y = (x * i + 1).data
                assert y[5] == i + 1
                del y
                if i == 100:
                    start = fds(), memory()
            gc.collect()
            assert fds() <= start[0] + 1, (fds(), start)
            assert memory() < start[1] + 20e6, (memory(), start)
            assert set(os.listdir("/dev/shm")) <= before
            print(os.getpid())
            """
        )
        self.assertFalse([name for name in os.listdir("/dev/shm") if out.strip() in name])

    @unittest.skipUnless(sys.platform == "linux", "sends signals")
    def test_interrupt_leaves_a_usable_session(self):
        run = self.run_script(
            """
            import signal
            import numpy as np
            from picograd import Tensor, set_distributed_config
            signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C, at moments that are ours to choose
            for i in range(16):
                set_distributed_config(enabled=True, use_processes=i % 2 == 1, num_workers=2)
                x = Tensor(np.ones(3_000_000))
                (x + 1).sum()
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.003 * i, 5)
                    while True:
                        np.tanh(x).sum()
                except KeyboardInterrupt:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                for k in range(3):
                    assert (x + 1).sum().item() == 6_000_000
                x += 1
                assert x.data[-1] == 2
            print("usable")
            """
        )
        self.assertEqual((run.returncode, run.stdout.strip()), (0, "usable"), run.stderr)
        if run.stderr:  # Python swallows an interrupt in a finalizer, and says so: the next one comes through
            self.assertRegex(run.stderr, r"^Exception ignored in: <(finalize|function (WeakValueDictionary|_Lease))")

    def test_start_methods(self):
        for method in multiprocessing.get_all_start_methods():
            with self.subTest(method):
                out = self.script(
                    f"""
                    import multiprocessing, os, warnings
                    multiprocessing.set_start_method({method!r})
                    import numpy as np, picograd
                    from picograd import Tensor, set_distributed_config
                    print("started")
                    set_distributed_config(
                        enabled=True, use_processes=True, num_workers=2, min_elements_for_parallel=10
                    )
                    x = Tensor(np.ones(1_000_000))
                    assert (x * 2 + 1).sum().item() == 3_000_000
                    assert len(picograd._workers.pool._processes) == 2
                    if hasattr(os, "fork"):
                        warnings.simplefilter("ignore", DeprecationWarning)  # to fork with threads is what is tested
                        pid = os.fork()
                        if not pid:
                            warnings.simplefilter("ignore")  # a forkserver does not serve a fork: threads, then
                            ok = (x * 3).sum().item() == 3_000_000
                            if picograd._workers.pool:
                                picograd._workers.pool.shutdown()
                            os._exit(0 if ok else 1)
                        assert os.waitpid(pid, 0)[1] == 0
                    assert (x * 3).sum().item() == 3_000_000
                    """
                )
                self.assertEqual(out, "started\n", "the script is not run again by workers")

    @unittest.skipUnless(sys.platform == "linux", "forks, and looks at /proc")
    def test_forks_while_threads_compute(self):
        for processes in (False, True):
            out = self.script(
                f"""
                import os, threading, time, warnings
                import numpy as np, picograd
                from picograd import Tensor, set_distributed_config
                warnings.simplefilter("ignore")
                picograd._BLOCK_BYTES = 1 << 10
                set_distributed_config(
                    enabled=True, num_workers=2, use_processes={processes}, min_elements_for_parallel=100
                )
                base = np.arange(2400, dtype=np.float32).reshape(40, 60)
                x = Tensor(base)
                (x * 2 + 1).sum()
                wrong, ended = [], []
                def work():
                    i = 0
                    while not ended:
                        i = (i + 1) % 50
                        y = x * (2 + i) + 1
                        z = y * 3
                        if (y.numpy() != base * (2 + i) + 1).any() or (z.numpy() != (base * (2 + i) + 1) * 3).any():
                            wrong.append(i)
                threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
                for thread in threads:
                    thread.start()
                for _ in range(60):
                    pid = os.fork()
                    if not pid:
                        os._exit(0)
                    os.waitpid(pid, 0)
                    time.sleep(0.01)
                ended.append(True)
                for thread in threads:
                    thread.join(20)
                    assert not thread.is_alive()
                assert not wrong, wrong
                assert len(os.listdir("/proc/self/fd")) < 80
                print("right")
                """
            )
            self.assertEqual(out, "right\n")

    def test_workers_that_cannot_start(self):
        """The module comes from outside of the path: spawned workers do not find it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "script.py"
            code = f"""
                import importlib.util, multiprocessing, sys, warnings
                import numpy as np
                spec = importlib.util.spec_from_file_location("elsewhere", {picograd.__file__!r})
                sys.modules["elsewhere"] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                multiprocessing.set_start_method("spawn")
                module._BLOCK_BYTES, module._FEW_BLOCKS = 1 << 16, 0
                module.set_distributed_config(enabled=True, use_processes=True, num_workers=2)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    x = module.Tensor(np.ones(1_000_000))
                    for _ in range(3):
                        assert (x * 2 + 1).sum().item() == 3_000_000
                print(len(caught), module._workers.pool)
            """
            path.write_text(textwrap.dedent(code), encoding="utf-8")
            run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
            self.assertEqual((run.returncode, run.stdout), (0, "1 None\n"), run.stderr)

    @unittest.skipUnless(hasattr(os, "fork"), "forks")
    def test_some_workers_cannot_start(self):
        out = self.script(
            """
            import multiprocessing, os, signal, warnings
            import numpy as np
            from picograd import Tensor, set_distributed_config
            multiprocessing.set_start_method("fork")
            warnings.simplefilter("ignore")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            set_distributed_config(enabled=True, use_processes=True, num_workers=2)
            x, fork, forks = Tensor(np.ones(1_000_000)), os.fork, []
            def second_fails():
                forks.append(1)
                if len(forks) == 2:
                    raise BlockingIOError(11, "Resource temporarily unavailable")
                return fork()
            os.fork = second_fails
            print((x * 2 + 1).sum().item(), len(forks), multiprocessing.active_children())
            """
        )
        self.assertEqual(out, "3000000.0 2 []\n")

    def test_inside_a_worker_of_somebody_else(self):
        out = self.script(
            """
            import multiprocessing, numpy as np
            from picograd import Tensor, distributed_config
            def work(n):
                with distributed_config(enabled=True, use_processes=True, min_elements_for_parallel=1):
                    return (Tensor(np.ones(n)) * 2).sum().item()
            if __name__ == "__main__":
                with multiprocessing.Pool(2) as pool:
                    print(pool.map(work, [300_000, 400_000]))
            """
        )
        self.assertEqual(out.strip(), "[600000.0, 800000.0]")

    def test_what_is_handed_out_is_written_to(self):
        """Whoever looks, and by whatever means, has the array itself: of what waits for it, nothing is lost."""
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.object(picograd, "_BLOCK_BYTES", 64),
        ):
            for look in (
                lambda t: t.data,
                np.asarray,
                lambda t: np.asarray(memoryview(t.data)),
                lambda t: t[:].data,
                lambda t: np.lib.stride_tricks.as_strided(t.data, (100,), (8,)),
                lambda t: t.data.T[None][0].T,
                lambda t: weakref.ref(t.data)(),
            ):
                for t in (Tensor(np.arange(100.0), float), Tensor(np.arange(100.0), float) + 0):
                    before, sums = t * 2, [(t + i).sum() for i in range(3)]
                    array = look(t)
                    after = t * 3
                    array[:] = 7
                    self.assertEqual((before.sum().item(), after.sum().item()), (9900, 14850))
                    self.assertEqual((t.sum().item(), [s.item() for s in sums]), (700, [4950, 5050, 5150]))
                    t *= 2
                    self.assertEqual((array[0], t.max().item()), (14, 14))
                    t.data = np.zeros(100)
                    t += 1
                    self.assertEqual((array[0], t.sum().item()), (14, 100))
            v = Value(np.ones(100), float)
            view, double = v.data[10:], v * 2
            v.data *= 3
            v.data.data -= 1
            self.assertEqual((view.sum().item(), double.sum().item(), v.sum().item()), (180, 200, 200))

    def test_readers_are_lost_to_nothing(self):
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.multiple(picograd, _BLOCK_BYTES=64, _FEW_BLOCKS=0),
        ):
            x = Tensor(np.zeros(100)) * 1
            waiting, inverse = [x + i for i in range(5)], 1 / x
            for error in (MemoryError, KeyboardInterrupt):
                with mock.patch.object(picograd, "run_blocks", side_effect=error):
                    self.assertRaises(error, lambda: x.data)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.assertRaises(RuntimeWarning, lambda: x.data)
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x.data[:] = 9
            self.assertEqual([w.sum().item() for w in waiting], [0, 100, 200, 300, 400])
            self.assertEqual(inverse.min().item(), np.inf)
            y = Tensor(np.ones(100))
            double = y * 2
            np.add.at(y, [0, 0], 5)
            self.assertEqual((y.sum().item(), double.sum().item()), (110, 200))
            start = time.perf_counter()
            y = Tensor(np.ones(100))
            waiting = [y * i for i in range(4000)]
            self.assertEqual((y.data[0], waiting[7].data[0]), (1, 7))
            self.assertLess(time.perf_counter() - start, 20)

    def test_errors_come_at_the_call(self):
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.multiple(picograd, _BLOCK_BYTES=64, _FEW_BLOCKS=0),
        ):
            small, whole = Tensor(np.arange(1000), np.uint8), Tensor(np.arange(1000), int)
            for call, error in (
                (lambda: small + 300, OverflowError),
                (lambda: whole ** Tensor(np.full(1000, -1), int), ValueError),
                (lambda: whole + Tensor(np.ones(999)), ValueError),
                (lambda: np.add(whole, whole, out=small), TypeError),
                (lambda: np.sin(whole, out=whole), TypeError),
                (lambda: np.sum(whole, axis=1), np.exceptions.AxisError),
                (lambda: whole.__ior__(Tensor(np.ones(1000))), TypeError),
            ):
                self.assertRaises(error, call)
            self.assertEqual((whole.sum().item(), small.max().item()), (499500, 255))
            with np.errstate(divide="raise"):
                self.assertRaises(FloatingPointError, lambda: 1 / (whole - 5.0))
            seen = []
            with np.errstate(divide="call", call=lambda *args: seen.append(args)):
                1 / (whole - 5.0)
            self.assertEqual(len(seen), 1)

    def test_training_large_parameters_fuses(self):
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.multiple(picograd, _BLOCK_BYTES=64, _FEW_BLOCKS=0),
        ):
            for make in (lambda p: SGD([p], 0.1, momentum=0.9, weight_decay=0.01), lambda p: Adam([p], 0.1), None):
                found = []
                for enabled in (True, False):
                    set_distributed_config(enabled=enabled)
                    p = Value(np.linspace(-1, 1, 1000), float)
                    optimizer = make and make(p)
                    for _ in range(3):
                        p.grad = 0
                        np.sum(p**2 * 0.5).backward()
                        with mock.patch.object(picograd, "run_blocks", wraps=picograd.run_blocks) as runs:
                            if optimizer:
                                optimizer.step()
                            else:
                                p.data -= 0.1 * p.grad
                        self.assertLessEqual(runs.call_count, 1)
                    found.append(p.data.data)
                np.testing.assert_allclose(*found, rtol=1e-12)

    def test_scratch_memory_never_leaves_a_job(self):
        with (
            distributed_config(enabled=True, min_elements_for_parallel=1),
            mock.patch.object(picograd, "_BLOCK_BYTES", 64),
        ):
            x = Tensor(np.arange(100.0), float)
            y = (x * 2).detach()
            z = np.tanh(y * 0.01) + np.round(y) - np.clip(y, 0, None)
            np.testing.assert_allclose(z.data, np.tanh(np.arange(100) * 0.02))
            np.testing.assert_array_equal(y.data, np.arange(100) * 2)
            row, column = Tensor(np.arange(20.0), float) * 2, Tensor(np.ones((30, 1)), float) * 3
            for _ in range(3):
                self.assertEqual((row + column).sum().item(), 30 * 380 + 20 * 90)
            self.assertEqual((row.data.shape, column.data.shape), ((20,), (30, 1)))

    def test_primitives_of_users_run_whole_in_the_callers_thread(self):
        seen = []

        def function(x):
            seen.append((threading.get_ident(), type(x), x.size))
            with ThreadPoolExecutor(2) as pool:
                return x + sum(pool.map(lambda i: (other * i).max().item(), range(3)))

        mine = primitive(function, lambda g, out, x: g, name="mine", elementwise=True)
        tanh = PRIMITIVES["tanh"]
        mirrored = primitive(np.sinh, lambda g, out, x: g, name="tanh", elementwise=True)
        try:
            for processes in (False, True):
                with (
                    distributed_config(enabled=True, min_elements_for_parallel=1, use_processes=processes),
                    mock.patch.object(picograd, "_BLOCK_BYTES", 256),
                ):
                    other, x = Tensor(np.arange(1000.0)) * 2, Tensor(np.ones(1000))
                    self.assertEqual((mine(x * 2) + 1).sum().item(), 1000 * (2 + 3 * 1998 + 1))
                    self.assertAlmostEqual((mirrored(x) * 1).mean().item(), np.sinh(1), 5)
                    self.assertAlmostEqual((tanh(x) * 1).mean().item(), np.tanh(1), 5)
            self.assertEqual(set(seen), {(threading.get_ident(), np.ndarray, 1000)})
        finally:
            PRIMITIVES["tanh"], TABLE[np.sinh] = tanh, PRIMITIVES["sinh"]
            del PRIMITIVES["mine"], TABLE[function]

    @mock.patch.dict(PRIMITIVES)
    @mock.patch.dict(TABLE)
    def test_rules_of_users_get_plain_arrays(self):
        def rule(g, out, x):
            slope = np.zeros_like(x)
            slope[x > 0] = 1
            self.assertEqual({type(g), type(out), type(x)}, {np.ndarray})
            return g * slope

        mine = primitive(lambda x: np.maximum(x, 0), rule, name="mine")
        both = primitive(np.add, lambda wanted, g, out, operands: [rule(g, out, x) for x in operands], joint=True)
        with self.in_blocks():
            x = Value(np.arange(-50.0, 50.0))
            np.sum(mine(x) * 2 + both(x, x)).backward()
            self.assertEqual(x.grad.tolist(), [0.0] * 51 + [4.0] * 49)

    def test_programs_take_leaves_in_blocks(self):
        with self.in_blocks():
            v = Value(np.arange(100.0))
            fast = optimize(np.sum(v * v) + np.max(v))
            for scale in (1.0, 2.0):
                v.data = np.arange(100.0) * scale
                v.grad = None
                fast.forward().backward()
                self.assertEqual((fast.item(), v.grad.data[99]), (328350 * scale**2 + 99 * scale, 198 * scale + 1))

    def test_positions_of_arguments_are_numpys(self):
        with self.in_blocks():
            x = Tensor(np.full((100, 2), 200), dtype=np.uint8)
            self.assertEqual((x + 1).sum(0, np.uint8).dtype, np.uint8)
            y = Tensor(np.full(100, 0.1)) * 2
            self.assertEqual((np.sum(y, 0, float).shape, np.sum(y, 0, float).dtype), ((), np.float64))
            self.assertEqual(np.cumsum(y, 0, float).dtype, np.float64)
            self.assertEqual(len(np.where(y > 0)[0]), 100)
            self.assertRaises(TypeError, np.var, y, 0, 1)
            z = Tensor(np.ones(100, np.float32))
            for mean in (
                np.nanmean(z),
                np.mean(z, where=np.ones(100, bool)),
                np.mean(z, dtype=np.float32),
                np.nanstd(z),
            ):
                self.assertEqual(mean.dtype, np.float32)

    def test_what_shares_memory_does_not_wait(self):
        alone = [p for p in picograd.PRIMITIVES.values() if p.builtin and p.elementwise and len(p.vjps) == 1]
        self.assertGreater(len(alone), 50)
        with self.in_blocks(), np.errstate(all="ignore"):
            for prim in [p for p in alone if not p.params]:
                t = Tensor(np.arange(100), int)
                shares = np.may_share_memory(prim.forward(t.data), t.data)
                self.assertEqual(np.may_share_memory(prim(t).data, t.data), shares, prim.name)
            t, v = Tensor(np.ones(100)), Value(np.ones(100))
            part, node = t.real, v.real
            part[0] = 5
            v.data += 1
            self.assertEqual((t.data[0], node.data[0].item()), (5, 2))

    def test_what_numpy_itself_computes_is_as_elsewhere(self):
        """The dtypes of its functions on Tensors, and the target that they return, whoever computes on it."""

        def outcome(call):
            f, u = [Tensor(np.arange(100) * 0.5 + 1, np.float32) for _ in range(2)]
            i = Tensor(np.arange(100) + 16_777_217, np.int32)
            out = call(f, i, u)
            first = out[0] if isinstance(out, tuple) else out
            if first is u:
                f.data, out = np.zeros(100), u.data
            return first is u, out.dtype, np.asarray(out).tolist()

        mask = np.arange(100) % 2 > 0
        calls = [
            *(lambda f, i, u: np.add.outer(i, f), lambda f, i, u: np.add(i, f, casting="same_kind")),
            *(lambda f, i, u: np.add(i, f, out=u, casting="no"), lambda f, i, u: np.add(i, f, out=u, where=mask)),
            *(lambda f, i, u: np.subtract.outer(i > 16_777_230, f), lambda f, i, u: np.multiply.accumulate(f, out=u)),
            *(lambda f, i, u: np.cumsum(f, out=u), lambda f, i, u: np.clip(f, 2, i, out=u)),
            *(lambda f, i, u: np.round(f, out=u), lambda f, i, u: np.concatenate([f[:50], f[50:]], out=u)),
            *(lambda f, i, u: np.modf(f, out=(u, f)), lambda f, i, u: np.modf(f, out=(u, None))),
            *(lambda f, i, u: np.exp(f, out=u.data), lambda f, i, u: np.add(f, 1, out=(u,))),
        ]
        for k, call in enumerate(calls):
            with np.errstate(over="ignore"):
                plain = outcome(call)
                with self.in_blocks():
                    self.assertEqual(outcome(call), plain, k)

    def test_what_is_assigned_back_stays_the_same_array(self):
        with self.in_blocks():
            for switch in (Tensor.enable_distributed, Tensor.disable_distributed):
                with distributed_config(enabled=switch is Tensor.disable_distributed):
                    v = Value(np.ones(100))
                    d = v.data
                    switch(d)
                    v.data = d
                    d[0] = 7
                    d += 1
                    self.assertEqual((v.data.data[0], d.data[0]), (8, 8))
        for change in (
            lambda v: exec("v.grad *= 0.5 / np.linalg.norm(v.grad)", globals(), {"v": v}),
            lambda v: exec("v.data -= (v * 0.1).data", globals(), {"v": v}),
            lambda v: exec("d = v.data; v * 2; v.data = d", globals(), {"v": v}),
        ):
            v = Value(np.ones(100))
            v.sum().backward()
            with self.in_blocks():
                data, grad = v.data.data, v.grad.data
                change(v)
                v.data[0], v.grad[0] = 5.0, 7.0
                self.assertEqual((data[0], grad[0]), (5.0, 7.0))

    def test_arrays_can_be_made_writeable_again(self):
        with mock.patch.object(picograd, "_memory", picograd._Memory()):
            picograd._memory.bound = 1 << 30
            array = picograd._memory.empty((1 << 20,), np.dtype(float))
            part = array[5:]
            for x in (array, part):
                x.flags.writeable = False
            for x in (array, part):
                x.flags.writeable = True
                x[0] = 1
            del array, x
            self.assertEqual(picograd._memory.free, [])
            del part
            self.assertEqual(len(picograd._memory.free), 1)

    def test_memory_is_taken_from_under_its_own_hands(self):
        class Racing(list):
            """Of free segments, of which a signal's handler takes each first."""

            def remove(self, segment):
                super().remove(segment)
                super().remove(segment)

        memory = picograd._Memory()
        memory.free = Racing([picograd._Private(1 << 20)])
        self.assertIsNone(memory.take(1 << 20, False))
        memory.free = Racing([picograd._Private(1 << 20)])
        memory.clear()
        self.assertEqual(memory.free, [])

    @unittest.skipUnless(hasattr(signal, "setitimer"), "sends signals")
    def test_at_exit_and_in_handlers_of_signals(self):
        out = self.script(
            """
            import atexit, signal
            import numpy as np, picograd
            from picograd import Tensor, set_distributed_config
            def compute():
                for processes in (True, False):
                    set_distributed_config(enabled=True, use_processes=processes, num_workers=2)
                    y = Tensor(np.ones(3_000_000))
                    assert (y * 2 + 1).sum().item() == 9_000_000
            atexit.register(lambda: (compute(), print("at exit")))
            handled = []
            def handle(number, frame):
                handled.append((x * 2 + 1).sum().item())
                z = Tensor(np.ones(3_000_000))
                z += x
                handled.append(z.sum().item() / 2 * 3)
                signal.setitimer(signal.ITIMER_REAL, 0.02)
            signal.signal(signal.SIGALRM, handle)
            for processes in (True, False):
                set_distributed_config(enabled=True, use_processes=processes, num_workers=2)
                x = Tensor(np.ones(3_000_000))
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                for _ in range(40):
                    assert (x * 3 - 1).sum().item() == 6_000_000
                signal.setitimer(signal.ITIMER_REAL, 0)
            compute()
            assert len(handled) > 2 and set(handled) == {9_000_000}, handled
            """
        )
        self.assertEqual(out, "at exit\n")

    @unittest.skipUnless(sys.platform == "linux", "looks at /proc")
    def test_workers_end_with_their_parent(self):
        script = """
            import multiprocessing, os, sys, time
            multiprocessing.set_start_method({method!r})
            import numpy as np, picograd
            from picograd import Tensor, set_distributed_config
            set_distributed_config(enabled=True, use_processes=True, num_workers=40)
            picograd._FEW_BLOCKS = 0
            (Tensor(np.ones(2_000_000)) * 2 + 1).sum()
            workers = list(picograd._workers.pool._processes)
            assert len(workers) <= 4, len(workers)
            print(*workers, flush=True)
            time.sleep(60)
        """
        for method in multiprocessing.get_all_start_methods():
            with self.subTest(method), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "script.py"
                code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{textwrap.dedent(script.format(method=method))}"
                path.write_text(code, encoding="utf-8")
                command, pipe = [sys.executable, str(path)], subprocess.PIPE
                with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as parent:
                    workers = [int(pid) for pid in parent.stdout.readline().split()]
                    self.assertTrue(workers)
                    parent.kill()  # and nobody waits for it: from now on it is a zombie
                    for _ in range(100):
                        states = set()
                        for pid in workers:
                            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone
                                states.add(Path(f"/proc/{pid}/stat").read_text().split()[2])
                        if states <= {"Z"}:
                            break
                        time.sleep(0.05)
                    self.assertLessEqual(states, {"Z"})

    @unittest.skipUnless(sys.platform == "linux", "looks at /proc and /dev/shm")
    def test_named_memory_and_few_descriptors(self):
        for kind in ("_Memfd", "_Named"):
            with self.subTest(kind):
                out = self.script(
                    f"""
                    import os, signal
                    import numpy as np, picograd
                    from picograd import Tensor, set_distributed_config
                    picograd._Shared = picograd.{kind}
                    picograd._BLOCK_BYTES = 1 << 16
                    before = len(os.listdir("/proc/self/fd"))
                    set_distributed_config(
                        enabled=True, use_processes=True, num_workers=2, min_elements_for_parallel=1
                    )
                    xs = [Tensor(np.full(100_000, i)) for i in range(300)]
                    for _ in range(2):
                        for i, x in enumerate(xs):
                            assert (x * 2 + 1).sum().item() == 100_000 * (2 * i + 1)
                    assert picograd._workers.pool._processes
                    assert len(os.listdir("/proc/self/fd")) < before + 300
                    pid = os.fork()
                    for x in xs:
                        x.data[:] = 5 if pid else 7
                    if not pid:
                        ok = all(x.sum().item() == 700_000 for x in xs)
                        ok = ok and (xs[0] * 2).data[5] == 14
                        picograd._at_exit()
                        os._exit(0 if ok else 1)
                    assert os.waitpid(pid, 0)[1] == 0
                    assert all(x.sum().item() == 500_000 for x in xs)
                    del x, xs
                    (Tensor(np.ones(100_000)) * 2 + 1).sum()
                    set_distributed_config(enabled=False)
                    assert not picograd._memory.free and not picograd._memory.shared
                    print(os.getpid())
                    """,
                    *("-W", "ignore::DeprecationWarning"),
                )
                self.assertTrue(out.strip())
                self.assertFalse([name for name in os.listdir("/dev/shm") if name.startswith("psm_")])

    @unittest.skipUnless(sys.platform == "linux", "limits memory")
    def test_kept_memory_is_given_back(self):
        out = self.script(
            """
            import resource, numpy as np, picograd
            from picograd import Tensor, set_distributed_config
            def size(which=1):  # resident; 0: virtual, where a thread's arena comes and goes
                return int(open("/proc/self/statm").read().split()[which]) * 4096
            set_distributed_config(enabled=True, num_workers=2)
            x = Tensor(np.ones(10_000_000))
            start = size()
            (x * 2 + 1).data
            assert picograd._memory.free and size() > start + 20e6
            set_distributed_config(enabled=False)
            assert not picograd._memory.free and size() < start + 20e6
            set_distributed_config(enabled=True)
            kept = [(x * i + 1).data for i in range(5)]
            del kept
            assert len(picograd._memory.free) == 5
            resource.setrlimit(resource.RLIMIT_AS, (size(0) + 60_000_000,) * 2)
            z = x[:5_000_000] + np.ones((4, 1), np.float32)  # NumPy's, 80 MB: what is kept makes room
            assert z.shape == (4, 5_000_000) and len(picograd._memory.free) == 0
            try:
                x + np.ones((30, 1), np.float32)
            except MemoryError:
                print("ended")
            assert (x * 2 + 1).sum().item() == 30_000_000
            """
        )
        self.assertEqual(out, "ended\n")

    def test_without_shared_memory(self):
        config = {"enabled": True, "use_processes": True, "num_workers": 2, "min_elements_for_parallel": 1}
        with (
            mock.patch.object(picograd, "_Shared", side_effect=OSError("no memory")),
            mock.patch.object(picograd, "_memory", picograd._Memory()),  # nor any that is kept
            mock.patch.object(picograd, "_BLOCK_BYTES", 1 << 16),
            distributed_config(**config),
        ):
            picograd._warn_once.cache_clear()
            with self.assertWarnsRegex(RuntimeWarning, "shared memory cannot be had here") as caught:
                x = Tensor(np.ones((1000, 1000)))
                for _ in range(3):
                    self.assertEqual((x * 2).sum().item(), 2_000_000)
            self.assertEqual(len(caught.warnings), 1)


def random_graph(rng, single=False):
    """(a Value, its leaves, its Tensors) from random operations; None where none came about."""
    f32 = np.float32 if single else np.float64
    unary = [np.tanh, np.sin, lambda x: np.exp(-np.abs(x)), relu, np.square, lambda x: -x, lambda x: x**2, sigmoid]
    unary += [
        lambda x: np.where(x > 0, x, 0.1 * x),
        np.abs,
        lambda x: x * 1.0,
        lambda x: 0.0 + x,
        softplus,
        gelu,
        np.copy,
    ]
    unary += [lambda x: np.sqrt(np.abs(x) + 1), lambda x: x.detach() * x, lambda x: np.floor(x) + x, lambda x: x / 4]
    unary += [lambda x: 1 - x, lambda x: 2 * x, lambda x: np.clip(x, -1, 1), lambda x: np.log1p(x * x), lambda x: x**3]
    binary = [np.add, np.subtract, np.multiply, lambda x, y: x / (np.abs(y) + 1), np.maximum, np.minimum, np.hypot]
    binary += [
        lambda x, y: np.where(x > y, x, y),
        lambda x, y: x * y + x,
        lambda x, y: x + y + x,
        np.logaddexp,
        np.arctan2,
    ]
    shaping = [np.sum, np.mean, np.transpose, lambda x: np.sum(x, 0), lambda x: np.mean(x, -1, keepdims=True)]
    shaping += [lambda x: x[..., :1], lambda x: x[::-1], np.ravel, lambda x: np.max(x, 0), softmax, logsumexp, np.var]
    shaping += [lambda x: x @ x.T, lambda x: x[np.array([0, 0, 1])], lambda x: np.concatenate([x, x]), np.cumsum]
    shaping += [lambda x: np.broadcast_to(x, (2, *x.shape)).sum(0), lambda x: np.stack([x, 2 * x]).mean(0)]
    shaping += [lambda x: np.prod(x, 0), lambda x: np.std(x, 0), lambda x: np.sort(x, 0), lambda x: x[None][0]]
    kind, leaves, tensors = rng.integers(4), [], []

    def leaf(*shape):
        x = Value(rng.normal(size=shape) if shape else float(rng.normal()), f32 if shape else None)
        leaves.append(x)
        return x

    if kind == 0:  # a few numbers
        pool = [leaf() for _ in range(rng.integers(1, 6))]
    elif kind == 1:  # arrays of several shapes, a Tensor, numbers
        tensors.append(Tensor(rng.normal(size=(2, 3)), f32))
        pool = [leaf(), leaf(), leaf(2, 3), leaf(3), leaf(3, 2), tensors[0], 1.5]
    elif kind == 2:  # many numbers
        pool = [leaf() for _ in range(rng.integers(20, 60))]
    else:  # many arrays
        pool = [leaf(3) for _ in range(8)]
    matrix = leaf(3, 3) if kind == 3 else None

    def pick():
        return pool[rng.integers(len(pool))]

    for _ in range(rng.integers(1, 5) if kind > 1 else 0):  # the same operation on many operands
        f, g, shape = unary[rng.integers(len(unary))], binary[rng.integers(len(binary))], rng.integers(4)
        xs = [pick() for _ in range(rng.integers(4, 40))]
        if shape == 0:
            new = [f(x) for x in xs]
        elif shape == 1:
            new = [g(x, pick()) for x in xs]
        elif shape == 2 and kind == 3:
            new = [x @ matrix for x in xs if x.shape == (3,)]
        elif shape == 2:
            weights = [pick() for _ in range(3)]
            new = [sum(w * pick() for w in weights) + x for x in xs]
        else:
            new = [g(x, xs[0]) * float(rng.normal()) for x in xs]
        pool += new
    for _ in range(rng.integers(3, 25)):
        try:
            choice = rng.random()
            if choice < 0.4:
                new = unary[rng.integers(len(unary))](pick())
            elif choice < 0.75 or kind in (0, 2):
                new = binary[rng.integers(len(binary))](pick(), pick())
            elif np.ndim(x := pick()):
                new = shaping[rng.integers(len(shaping))](x)
            else:
                continue
        except (ValueError, TypeError, IndexError, AttributeError):
            continue  # shapes that do not fit
        if isinstance(new, Value) and new.size < 2000:
            pool.append(new)
    made = [x for x in pool if isinstance(x, Value) and x._prim and x._needs]
    if not made:
        return None, leaves, tensors
    out = made[-1]
    for x in made[:-1]:
        if rng.random() < 0.5:
            out = out + np.sum(x) * 0.1
    return (np.sum(out) if out.ndim and rng.random() < 0.6 else out), leaves, tensors


@needs_power
class TestOptimizer(Strict):
    """Room 5: each pass alone, optimized against eager on every primitive and on random graphs, and the contract."""

    def compare(self, out, leaves, change, rtol=1e-12):
        """Values and gradients of an optimized graph are those of eager code, also after the leaves changed."""
        fast = optimize(out)
        for run in range(3):
            if run:
                change()
                fast.forward()
                out.forward()
            seed = np.random.default_rng(run).uniform(0.5, 1.5, out.shape) if run else None
            found = []
            for root in (out, fast):
                for leaf in leaves:
                    leaf.grad = None
                if root._needs:
                    root.backward(seed)
                found.append([root.data, *(leaf.grad for leaf in leaves)])
            for eager, ours in zip(*found):
                eager, ours = np.asarray(eager.data), np.asarray(ours.data)
                self.assertEqual((ours.shape, ours.dtype), (eager.shape, eager.dtype))
                finite = np.abs(eager[np.isfinite(eager)])
                np.testing.assert_allclose(ours, eager, rtol=rtol, atol=rtol * max(1, finite.max(initial=0)))
        return fast

    def test_sizes_that_depend_on_data_are_those_of_now(self):
        def counts(x, w):
            return np.mean(np.bincount(np.argmax(np.reshape(x, (2, 2)), axis=1), w[:2])) + w[3]

        def places(x, w):
            return np.sum(np.flatnonzero(x > 0) * w[0]) + np.sum(np.argwhere(x) * w[1])

        def raising(x, w):  # Python's arithmetic, where IEEE's has an answer
            return np.exp(-np.exp(w[3] * 1000.0)) + np.mean(x[x > 0])

        def known(x, w):
            return np.sum(np.unique(x, return_counts=True)[1] * w[2]) + np.sum(np.union1d(x, w) ** 2)

        for f, lines in itertools.product((counts, places, raising, known), (picograd._MAX_LINES, 0)):
            with self.subTest(f=f.__name__, lines=lines), mock.patch.object(picograd, "_MAX_LINES", lines):
                x, w = Value([1.0, 0.0, 0.0, 1.0], float), Value([1.0, 3.0, 0.5, 0.0], float)
                number = Value(0.0)
                eager = f(x, [*w[:3], number] if f is raising else w)
                program = optimize(eager)
                for data, last in (
                    ([1.0, 0.0, 0.0, 1.0], 0.0),
                    ([1.0, 0.0, 2.0, 0.0], 1.0),
                    ([0.0, 1.0, 0.0, 0.0], 1.0),
                ):
                    x.data, number.data, found = data, last, []
                    for loss in (eager, program):
                        x.grad = w.grad = None
                        with np.errstate(over="ignore"):
                            loss.forward().backward()
                        found.append((loss.item(), x.grad.tolist(), w.grad.tolist()))
                    self.assertEqual(*found)

    def test_what_weak_numbers_are_passed_through_keeps_their_digits(self):
        """A rule on Values, in programs and higher orders, says what it says on numbers."""
        tried = 0
        for function, k in itertools.product({id(f): f for f in picograd.TABLE.values()}.values(), (0.1, 1e39)):
            w, out = Value(0.7), None
            with contextlib.suppress(Exception), np.errstate(all="ignore"):  # of arguments that it does not take
                out = getattr(function, "name", "") not in GRAPHS and function(w)
            if type(out) is not Value or not out._needs or type(out._held) is not float:
                continue  # a mask, an array, or nothing that has a gradient
            tried += 1
            with self.subTest(function=function, factor=k), np.errstate(all="ignore"):
                (out * k).backward()
                expected, w.grad = w.grad.item(), None
                optimize(out * k).backward()
                self.assertIs(type(w._grad), float)
                slope = grad(lambda x, function=function, k=k: function(x) * k)(w).item()
                np.testing.assert_allclose([w._grad, slope], expected, 1e-12)
        self.assertGreater(tried, 100)

    def test_gradients_of_a_broadcast_number_are_not_summed_before_they_meet_infinity(self):
        x, b = Value(np.inf), Value(3.0)
        for way in WAYS:
            x.grad = b.grad = None
            with np.errstate(invalid="ignore"):
                way((np.broadcast_to(x, (2,)) * b * np.array([0.0, 1.0])).sum()).backward()
            self.assertTrue(math.isnan(b.grad.item()))

    def test_tensors_that_many_share_are_read_anew(self):
        x, t, y = Tensor(np.ones((3, 2))), Tensor([1.0, 2.0]), Tensor(np.ones(3))
        neurons, layer = [picograd.Neuron(2, seed=i) for i in range(5)], picograd.Layer(2, 1, seed=0)
        weights = [Value([1.0, i]) for i in range(5)]
        matrices = [Value(np.eye(2) * i) for i in range(5)]
        layer.w = Tensor(np.ones((2, 1)))
        for make in (
            lambda: sum([n(x).sum() for n in neurons]),
            lambda: sum([picograd.mse_loss(x @ w, y) for w in weights]),
            lambda: sum([(t @ np.tanh(m)).sum() for m in matrices]),
            lambda: sum([(np.tanh(m) @ t).sum() for m in matrices]),
            lambda: layer(x).sum(),
        ):
            root = make()
            fast = optimize(root)
            for data in (x, t, y):
                data.data = data.data * 1.5 + 1.0
            self.assertAlmostEqual(fast.forward().item(), root.forward().item(), 4)

    @mock.patch.dict(PRIMITIVES)
    @mock.patch.dict(TABLE)
    def test_rules_of_users_see_what_eager_ones_see(self):
        def rule(g, out, x, m, i):
            h = g * (m + m)  # of masks it is "or"
            np.add.at(h, i, 1.0)
            return np.where(~m, 0.0, h)

        mine = primitive(lambda x, m, i: x * m + 0.0 * i, rule, None, None, name="mine")
        for dtype in (np.float32, np.float64):
            x, m = Value([1.0, 2.0], dtype=dtype), Tensor([True, False], dtype=bool)
            root = mine(x, m, Tensor([0, 1], dtype=int))
            fast = optimize(root)
            for y in (root, fast):
                y.backward()
            self.assertEqual(x.grad.tolist(), [4.0, 0.0])
            self.assertIn("def backward", fast.source)

    def test_copies_keep_their_data(self):
        x = Value(2.0)
        fast = optimize(x * 3)
        x.data = 5.0
        for twin in (copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            self.assertEqual(twin.item(), 6.0)
            self.assertEqual(twin.forward().item(), 15.0)
            x.data = 2.0
            fast.forward()
            x.data = 5.0

    def test_faults_of_the_forward_are_not_told_twice(self):
        x = Value([-1.0, 2.0])
        with np.errstate(all="ignore"):
            roots = optimize(np.log(x), x * 2)
        with np.errstate(all="raise"):
            for root in (*roots, *roots):
                root.backward()

    def test_true_as_an_index(self):
        xs = [np.sin(Value(np.ones((3, 3)))) for _ in range(4)]
        for index in ((0, slice(None), True), (True, slice(None), 0), (None, Ellipsis, 0)):
            root = np.stack([x[index] for x in xs])
            self.assertEqual(optimize(root).tolist(), root.tolist())
        v = Value(np.ones((3, 9)))
        for index in (True, np.True_, (True, 0)):
            v[index].sum().backward()
        self.assertEqual(v.grad.data[:, 0].tolist(), [3.0, 2.0, 2.0])

    def passed(self, apply, *roots):
        """What a pass makes of a graph, whose value and gradients it must keep."""
        leaves = [node for node in picograd._oldest_first(roots) if node._prim is None]
        new = apply(roots)
        found = []
        for graph in (roots, new):
            for leaf in leaves:
                leaf.grad = None
            for root in graph:
                root.forward().backward()
            found.append([np.asarray(x.data) for x in [*(r.data for r in graph), *(leaf.grad for leaf in leaves)]])
        for before, after in zip(*found):
            np.testing.assert_allclose(after, before, rtol=1e-12)
        return new[0] if len(new) == 1 else new

    def names(self, root):
        return sorted(node._prim.name for node in picograd._oldest_first([root]) if node._prim)

    @mock.patch.dict(TABLE)
    @mock.patch.dict(PRIMITIVES)
    def test_a_users_rule_may_write_to_what_it_gets(self):
        def rule(g, out, x):
            g *= 2
            return g

        twice = picograd.primitive(lambda x: x * 2.0, rule, name="in place")
        for build in (lambda u, w: np.sin(twice(u) + w), lambda u, w: twice(u) + w):
            u, w = Value([1.0, 2.0]), Value([0.5, 0.25])
            picograd.optimize(build(u, w)).backward()
            expected = np.cos([2.5, 4.25]) if build(u, w)._prim.name == "sin" else [1.0, 1.0]
            np.testing.assert_allclose(w.grad.data, expected, rtol=1e-5)

    @mock.patch.dict(TABLE)
    @mock.patch.dict(PRIMITIVES)
    def test_replayed_programs_name_a_shape_that_changed(self):
        def rule(g, out, x):
            raise KeyError("no rule")

        bad = picograd.primitive(lambda x: x * 1.0, rule, name="without rule")
        w, x = Value(2.0), Tensor([1.0, 2.0])
        program = picograd.optimize((x * w).mean() + bad(w))
        x.data = np.array([1.0, 2.0, 3.0, 6.0])
        with self.assertRaisesRegex(ValueError, r"had shape \(2,\)"):
            program.forward()

    def test_numbers_that_were_arrays_on_the_way_stay_strong(self):
        v, w = Value(-0.5), Value(np.ones(2), dtype=np.float32)
        z = np.reshape(np.reshape(v, (1,)), ()) * w
        self.assertEqual(picograd.optimize(z).forward().dtype, z.dtype)

    def test_a_copy_shares_nothing_after_a_forward(self):
        w = Value([1.0, 2.0])
        program = picograd.optimize(w * 2)
        twin = copy.copy(program)
        twin.forward()
        twin.data.data[0] = 9.0
        self.assertEqual(program.data.tolist(), [2.0, 4.0])

    def test_a_sweep_that_cannot_be_compiled_leaves_the_others_alone(self):
        w, c = Value(np.ones((2, 3))), Value(np.ones((3, 2)))
        a, b = picograd.optimize((w * w).sum(), (w @ c).sum())
        w.data = np.ones((2, 4))
        with self.assertRaisesRegex(ValueError, "had shape"):
            b.backward()
        w.data = np.ones((2, 3))
        b.forward().backward()
        np.testing.assert_array_equal(c.grad.data, np.full((3, 2), 2.0))
        a.forward().backward()
        np.testing.assert_array_equal(w.grad.data, np.full((2, 3), 4.0))

    def test_many_sets_of_roots_are_not_compiled_for_ever(self):
        w = Value([0.5, 1.5])
        losses = [(np.tanh(w * float(i)) * w).sum() for i in range(1, 31)]
        roots = picograd.optimize(*losses)
        rng = np.random.default_rng(0)
        for _ in range(12):
            chosen = rng.choice(30, 4, False)
            w.grad = 0
            sum(roots[i] for i in chosen).backward()
            got, w.grad = w.grad.numpy(), 0
            sum(losses[i] for i in chosen).backward()
            np.testing.assert_allclose(got, w.grad.data, rtol=1e-5)
        self.assertLessEqual(len(roots[0]._params["program"].sweeps), 4)

    def test_packs_do_not_widen_what_others_take_from_them(self):
        s, w = [Value(np.array(1.0)) for _ in range(20)], Value(1.0)
        root = sum(np.tanh(u * w + w * u + 0.3) for u in s) + sum(np.exp(u) for u in s[:16])
        program = picograd.optimize(root)
        self.assertEqual((root.dtype, program.dtype, program.forward().dtype), (np.float32,) * 3)

    @mock.patch.dict(TABLE)
    @mock.patch.dict(PRIMITIVES)
    def test_what_users_code_gets_is_not_overwritten_even_if_a_view(self):
        kept = []

        def keep(x):
            kept.append(x)
            return x * 1.0

        for view in (np.flip, lambda x: np.einsum("ii->i", x), np.rot90, lambda x: np.diagonal(x)):
            w = Value([[1.0, 2.0], [3.0, 4.0]])
            program = picograd.optimize(picograd.primitive(keep, lambda g, out, x: g, name="keep")(view(np.sin(w))))
            kept.clear()
            program.forward()
            was = kept[0].copy()
            w.data = [[5.0, 6.0], [7.0, 8.0]]
            program.forward()
            np.testing.assert_array_equal(kept[0], was)

    def test_a_copied_program_keeps_its_data(self):
        w = Value([1.0, 2.0])
        program = picograd.optimize(w * w)
        best = copy.copy(program)
        w.data = [3.0, 4.0]
        program.forward()
        self.assertEqual((best.data.tolist(), best.forward().data.tolist()), ([1.0, 4.0], [9.0, 16.0]))

    def test_faults_that_eager_mode_has_not_raise_nothing(self):
        v = [Value(1.0) for _ in range(20)]
        program = picograd.optimize(sum(np.tanh(x * x) for x in v))
        v[3].data = 1e200
        with np.errstate(all="raise"):
            self.assertAlmostEqual(program.forward().item(), 19 * math.tanh(1.0) + 1.0)

    def test_fold_constants(self):
        x, one = Value(3.0), Value(np.ones(2))
        node = picograd._record(TABLE[np.multiply], (2.0, 3.0))
        root = self.passed(picograd._pass(picograd.fold_constants), x * node * np.sum(one))
        self.assertEqual(self.names(root), ["multiply", "multiply", "sum"])
        self.assertEqual(root._args[0]._args[1], 6.0)

    def test_simplify(self):
        x, y, a = Value(3.0), Value(2.0), Value(np.arange(1.0, 7).reshape(2, 3), np.float64)
        for root, names in [
            (x + 0.0, ["add"]),
            (1.0 * x, []),
            (x**1, []),
            (x / 1.0, []),
            (np.negative(-x), []),
            (x - (-y), ["add"]),
            (x + (-y), ["subtract"]),
            (x**2, ["square"]),
            (x / 4.0, ["multiply"]),
            (x / 3.0, ["divide"]),
            (x * 0.0, ["multiply"]),
            (a.T.T, []),
            (np.transpose(a, (0, 1)).reshape(6).reshape(3, 2), ["reshape", "transpose"]),
            (a.reshape(6).reshape(2, 3), []),
            (np.mean(a), ["multiply", "sum"]),
            (a * a, ["square"]),
            (a * np.broadcast_to(a[0], (2, 3)), ["getitem", "multiply"]),
            (2.0 * (y * (a + 1.0)), ["add", "multiply", "multiply"]),
            (2.0 * np.broadcast_to(a[0, 0], (2, 3)) * a, ["getitem", "multiply", "multiply"]),
        ]:
            with self.subTest(root=repr(root), names=names):
                self.assertEqual(self.names(self.passed(picograd._pass(picograd.simplify), root)), names)
        self.assertTrue(math.isnan((Value(math.inf) * 0.0).item()))
        self.assertTrue(math.isnan(optimize(Value(math.inf) * 0.0).forward().item()), "x * 0 is not 0 for inf")

    def test_merge_common(self):
        x = Value(0.5)
        root = self.passed(picograd._pass(picograd.merge_common()), np.tanh(x) * np.tanh(x) + x * 0.0 + x * -0.0)
        self.assertEqual(self.names(root), ["add", "add", "multiply", "multiply", "multiply", "tanh"])
        w = Value(np.ones((3, 3)))
        source = optimize(np.sum(np.tanh(w @ w))).source
        self.assertEqual(source.count("np.tanh"), 1, "the derivative uses tanh's own output")

    def test_merging_keeps_each_gradient_on_its_own(self):
        """Where a slope is infinite, 0 * inf + 1 * inf is nan, and (0 + 1) * inf is not; so for every primitive."""
        inf, zero, one = math.inf, 0.0, 1.0
        slopes = [(np.sqrt, zero), (np.log, zero), (lambda x: one / x, zero), (lambda x: x**0.5, zero)]
        slopes += [(np.arccosh, one), (np.arctanh, one), (lambda x: x * inf, 0.5), (np.exp, inf)]
        for f, start in slopes:
            for a, b in [(zero, one), (one, -one), (-2.0, one)]:
                for shape in ((), (1,), (2, 3)):
                    with self.subTest(f=f, a=a, b=b, shape=shape), np.errstate(all="ignore"):
                        x = Value(np.full(shape, start) if shape else start, np.float64 if shape else None)
                        self.compare(f(x) * a + f(x) * b, [x], lambda x=x: setattr(x, "data", x.data.data))
            many = [Value(start) for _ in range(20)]
            with self.subTest(f=f, many=True), np.errstate(all="ignore"):
                self.compare(sum(f(x) * 0.0 + f(x) for x in many), many, lambda: None)

    def test_flatten(self):
        x = [Value(float(i)) for i in range(1, 9)]
        root = self.passed(picograd.flatten, x[0] * x[1] + x[2] * x[3] + (x[4] + (x[5] + x[6] * x[7])))
        self.assertEqual(self.names(root), ["dot"])
        self.assertEqual((len(root._args), root._params), (8, {"products": 3}))
        shared = x[0] * x[1]
        root = self.passed(picograd.flatten, shared + x[2] + x[3] + np.tanh(shared))
        self.assertEqual(self.names(root), ["dot", "multiply", "tanh"], "a product that others need, too, stays")
        self.assertEqual(self.names(self.passed(picograd.flatten, sum([Value(np.ones(2)) for _ in range(5)]))), ["dot"])

    def test_batch(self):
        w, b = [[Value(0.1 * i + j) for i in range(3)] for j in range(4)], [Value(float(j)) for j in range(4)]
        samples = [[Value(0.3 * n - i) for i in range(3)] for n in range(5)]
        outs = [np.tanh(sum(p * q for p, q in zip(row, x)) + c) for x in samples for row, c in zip(w, b)]
        simplify = picograd._pass(picograd.simplify)
        root = self.passed(lambda roots: simplify(picograd.batch(picograd.flatten(roots))), sum(outs))
        names = self.names(root)
        self.assertEqual((names.count("matmul"), names.count("tanh"), names.count("pack")), (1, 1, 3), names)
        tanh = next(n for n in picograd._oldest_first([root]) if n._prim and n._prim.name == "tanh")
        self.assertEqual(tanh.size, 20)

    def test_batch_of_arrays(self):
        model, rng = MLP(3, [5, 2], seed=0, dtype=np.float64), np.random.default_rng(SEED)
        x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        one_by_one = sum(np.mean(np.square(model(row) - target)) for row, target in zip(x, y)) / 20
        fast = self.compare(one_by_one, model.parameters(), lambda: None)
        self.assertEqual(len(re.findall(r"\bc\d+\.dot", fast.source.split("def backward")[0])), 1, fast.source)
        np.testing.assert_allclose(fast.item(), mse_loss(model(x), y).item())
        one = MLP(3, [5, 1], seed=0, dtype=np.float64)
        many = rng.normal(size=(80, 4))
        squares = sum((one(row[:3]) - float(row[3])) ** 2 for row in many) * (1 / 80)
        fast = self.compare(squares, one.parameters(), lambda: None)
        self.assertLess(fast.source.count("\n"), 50, fast.source)  # the long sum is one operation, too
        inputs = [Value(row, np.float64) for row in x]
        loss = sum(np.sum(model(row)) for row in inputs)
        self.compare(loss, model.parameters() + inputs, lambda: setattr(inputs[3], "data", np.ones(3)))

    def test_a_stack_of_what_is_in_an_array_already(self):
        rng = np.random.default_rng(SEED)
        for losses in (mse_loss, cross_entropy):
            model = MLP(3, [5, 2 if losses is cross_entropy else 1], seed=0, dtype=np.float64)
            x, y = rng.normal(size=(4, 3)), [1, 0, 0, 1] if losses is cross_entropy else rng.normal(size=4)
            each = [losses(model(Tensor(row, np.float64)), label) for row, label in zip(x, y)]
            for root in (np.mean(np.stack(each)), np.stack(each[::-1]), np.stack(each[1:3] + each[:1])):
                fast = self.compare(root, model.parameters(), lambda: None)
                self.assertEqual(self.names(fast.graph).count("stack"), 1)  # of the inputs
            np.testing.assert_allclose(optimize(np.mean(np.stack(each))).item(), losses(model(x), np.array(y)).item())
        numbers = [Value(float(i)) for i in range(20)]
        squares = [np.tanh(v) for v in numbers]
        self.compare(np.stack(squares), numbers, lambda: None)
        self.compare(np.stack([squares[3], np.array(0.0), 1.0]), numbers, lambda: None)

    def test_pictures(self):
        a, b = Value(2.0, label="a"), Value([[1.0, 2.0]] * 3, label="b")
        fast = optimize(np.exp(a * b - 1.0).sum())
        boxes = TestDraw.boxes(draw(fast))
        self.assertEqual(
            [*boxes.values()],
            [["a", "2"], ["b", "(3, 2) float32"], ["exp(a * b - 1)", "(3, 2) float32"], ["sum", "68.41"]],
        )
        clipped = optimize(np.clip(b, Tensor([0.0, 1.0], label="t"), 3.0) * a.detach())
        self.assertEqual(
            [text[0] for text in TestDraw.boxes(draw(clipped)).values()][-1], "at most(at least(b, t), 3) * ·"
        )
        self.assertEqual(self.names(optimize(a.detach()).graph), ["detach"])
        root = fast + 1.0
        root.backward()
        self.assertEqual([*TestDraw.boxes(draw(root)).values()][-1], ["· + 1", "69.41", "grad 1"])  # a program is in it

    def test_fuse(self):
        x, w, b = (
            Value(np.random.default_rng(0).normal(size=s), np.float64, n)
            for s, n in [((4, 3), "x"), ((3, 2), "w"), (2, "b")]
        )

        def fused(root):
            found = picograd.fuse([root])[0]
            before = np.array(root.data)
            np.testing.assert_allclose(found.forward().data, before, rtol=1e-12)
            return found

        root = fused(np.tanh(x @ w + b) * 2.0 - 1.0)
        self.assertEqual(self.names(root), ["fused"])
        self.assertEqual(picograd._formula(root._params["steps"], root._args), "tanh(x @ w + b) * 2 - 1")
        for out, formula in [
            (-(x @ w + b), "-(x @ w + b)"),
            (np.exp(-np.square(x @ w)) - (x @ w - 1.0), "exp(-square(x @ w)) - (x @ w - 1)"),
            (x * (x + x) / (x * 2.0), "x * (x + x) / (x * 2)"),
        ]:
            root = fused(out)
            self.assertEqual(picograd._formula(root._params["steps"], root._args), formula)
        self.assertIn("tanh(x @ w + b)", draw(optimize(np.sum(np.tanh(x @ w + b)))).source)
        long = x
        for _ in range(100):
            long = np.sin(long)
        self.assertEqual(self.names(fused(long)).count("fused"), 4)

    def test_every_primitive(self):
        rng = np.random.default_rng(SEED)
        for prim in PRIMITIVES.values():
            for operands, params in cases(prim, rng):
                if prim.name.startswith(("bitwise", "invert")):
                    operands = [np.asarray(x) > 0 for x in operands]
                with self.subTest(primitive=prim.name, shapes=[np.shape(x) for x in operands], seed=SEED):
                    args = [
                        Value(x, None if isinstance(x, float) else np.float64) if np.result_type(x).kind == "f" else x
                        for x in operands
                    ]
                    leaves = [x for x in args if isinstance(x, Value)]
                    out = prim(*args, **params)
                    if isinstance(out, Value):
                        self.compare(
                            out, leaves, lambda leaves=leaves: [setattr(x, "data", x.data * 1.01) for x in leaves]
                        )

    def test_what_rewrites_are_not_about(self):
        """Masks, integers, raw arrays, other dtypes and empty arrays stay as they are: alone, and twenty of a kind."""
        rng = np.random.default_rng(SEED)
        v, w = Value(rng.normal(size=3), np.float64, "v"), Value(rng.normal(size=(3, 2)), np.float32)
        half, empty, number = Value(np.ones(3), np.float16), Value(np.ones((0, 3)), np.float64), Value(-0.5)
        whole, small, mask = Tensor([3, 0, 2], np.int64), Tensor([1, 2, 3], np.uint8), Tensor([True, False, True])
        numbers, arrays = [Value(0.3 * i - 2) for i in range(20)], [Value(rng.normal(size=3)) for _ in range(20)]
        raw = [rng.normal(size=3) for _ in range(10)]
        zero_d = list(enumerate(np.sum(x.astype(np.float64)) for x in arrays))
        index = np.array([2, 0])
        graphs = {
            "raw arrays": v + np.ones(3),
            "a raw array after a product": w.T @ v.astype(np.float32) + np.ones(2),
            "arrays and Values in one slot": sum(np.tanh(x) * y for x, y in zip(arrays, raw + arrays[:10])),
            "sums of masks and integers": v * ((mask + whole) * (mask * mask)) + np.sum(whole) - np.mean(mask),
            "a float, an integer and no condition": np.where(v, np.where(whole, v, 2.0), -small),
            "squares of masks": v * (np.square(v > 0) ** 2) * np.power(v > 0, 2) - (mask**2),
            "negative unsigned numbers": v * np.negative(-small),
            "a mask and a number": (v > 0) * 2.0 * number + np.where(v > 0, 1.0, 2.0),
            "numbers and masks": sum((p > 0) * p + (p > 1) * 2.0 * number for p in numbers),
            "masks of numbers": sum(np.where((p > 0) & (p < 1), p * p, -p) for p in numbers),
            "many masks": sum(np.sum(np.logical_and(x > 0, x < 1) * x) for x in arrays),
            "mixed dtypes": v * half + np.sum(w) * v + number * half,
            "half": np.mean(half * half) * 3.0,
            "empty": np.sum(empty * empty, axis=0) + np.prod(empty, 0) * v,
            "reshaped numbers": np.reshape(number, (1,)) * np.hstack([number, number]) + np.tile(number * 2, 2),
            "an outer product of numbers": np.outer(number, number) * np.mean(w),
            "places named twice": v[np.array([0, -3])] + v[np.array([-1, 1])] * 2.0,
            "an index array behind a slice": sum(np.sum(w[i % 3, :, None][index % 2]) for i in range(20)),
            "mixed indices of many": sum(np.sum(np.stack([x, 2 * x])[None][0, :, index]) for x in arrays),
            "a sum that starts at -0.0": np.signbit(Value(-0.0) + 0.0 + Value(-0.0)) + v,
            "products out of range": Value(1e200) * (Value(1e200) * (v * 1e-300)),
            "0-d arrays among numbers": sum(
                np.sum(v)[None][0] * (x if i % 2 else np.array(i + 0.5)) for i, x in zero_d
            ),
            "a primitive without gradient": v * np.argsort(v)[np.argmax(v)] + np.count_nonzero(v),
        }
        for name, out in graphs.items():
            with self.subTest(name), np.errstate(all="ignore"):
                leaves = [x for x in picograd._oldest_first([out.forward()]) if x._prim is None]

                def change(leaves=leaves):
                    for x in leaves:
                        x.data = x.data.data * 1.1

                fast = self.compare(out, leaves, change, 2e-3 if "half" in name or "mixed d" in name else 1e-6)
                self.assertIs(type(fast._held), type(out._held))

    def test_users_primitives_are_called_and_not_traced(self):
        kept, rng = [], np.random.default_rng(SEED)

        def times(x, options):
            kept.append(x)
            return x * options["by"]

        def times_x(g, out, x, options):
            return g * options["by"] * (2.0 if float(np.sum(kept[-1])) > 0 else 1.0)

        noise = primitive(lambda x: x + rng.normal(size=x.shape), lambda g, out, x: g, name="noise", elementwise=True)
        half = primitive(
            lambda x: x[: len(x) // 2], lambda g, out, x: np.concatenate([g, 0 * x[len(g) :]]), name="half"
        )
        branch = primitive(times, times_x, name="branch")
        positive = primitive(
            lambda x: x[x > 0], lambda g, out, x: np.bincount(np.flatnonzero(x > 0), g, len(x)), name="+"
        )
        try:
            x = Value(np.array([1.0, 2.0, 3.0, 4.0]), np.float64)
            options = {"by": np.array([1.0, 2.0, 3.0, 4.0]), "why": [set(), {}]}
            out = np.sum(np.tanh(branch(np.sin(x), options=options)) * x) + np.sum(half(x * x))
            self.compare(out, [x], lambda: setattr(x, "data", -x.data.data))
            out = np.mean(positive(x * 1.0) ** 2)
            self.compare(out, [x], lambda: setattr(x, "data", x.data.data - 1.5))
            fast = optimize(noise(x), noise(x))
            self.assertFalse(np.array_equal(*(root.forward().data for root in fast)), "two draws")
        finally:
            for name in ("noise", "half", "branch", "+"):
                del TABLE[PRIMITIVES.pop(name).forward]

    def test_random_graphs(self):
        """Scalars and arrays, shared and repeated structure, kinks, masks, detached parts; leaves that change."""
        for seed in range(SEED % 2**20, SEED % 2**20 + 150):  # .ci/fuzz.py makes more
            rng = np.random.default_rng(seed)
            with self.subTest(seed=seed), np.errstate(all="ignore"):
                out, leaves, tensors = random_graph(rng, single=seed % 5 == 0)
                if out is None or not np.all(np.isfinite(out.data.data)):
                    continue

                def change(leaves=leaves, tensors=tensors, rng=rng):
                    for x in leaves + tensors:
                        x.data = x.data.data + 0.3 * rng.normal(size=x.shape)

                self.compare(out, leaves, change, 1e-2 if seed % 5 == 0 else 1e-9)  # digits cancel in single precision

    def test_leaves_and_roots(self):
        a = Value(2.0, label="a")
        fast = optimize(a)
        self.assertIsNot(fast, a)
        fast.backward(3.0)
        a.data = 5.0
        self.assertEqual((a.grad, fast.forward().data, fast.grad), (3.0, 5.0, 3.0))
        b = Value(np.ones(3))
        fast = optimize(b)
        kept = fast.forward().data.data
        b.data.data[0] = 7.0
        self.assertEqual(fast.forward().data.data.tolist(), [7, 1, 1])
        kept[:] = 0
        self.assertEqual(b.data.data.tolist(), [7, 1, 1], "a root's data is its own")
        for root in (optimize(b.detach() * 2.0), optimize(b > 0)):
            with self.assertRaisesRegex(TypeError, "no gradient flows"):
                root.backward()
        with self.assertRaisesRegex(TypeError, "root must be a Value, got float"):
            optimize(a, 3.0)
        with self.assertRaisesRegex(TypeError, "at least one root"):
            optimize()

    def test_several_roots_are_one_program(self):
        w, x = Value(np.ones((3, 2)), np.float64), Tensor(np.ones((4, 3)), np.float64)
        prediction = np.tanh(x @ w)
        loss, fast = optimize(np.sum(prediction**2), prediction)
        self.assertEqual(loss.source.count("np.tanh"), 1)
        x.data = np.full((4, 3), 0.1)
        loss.forward()
        np.testing.assert_allclose(fast.data, np.tanh(np.full((4, 2), 0.3)))
        for root, seed in ((loss, None), (fast, np.ones((4, 2))), (loss, None)):
            w.grad = None
            root.backward(seed)
            got, w.grad = w.grad, None
            again = np.tanh(x @ w)
            (np.sum(again**2) if root is loss else np.sum(again)).backward()
            np.testing.assert_allclose(got, w.grad, rtol=1e-12)

    def test_gradients_of_several_roots(self):
        w, u, x = Value(2.0), Value(0.0), Value(np.ones(3))
        with np.errstate(all="ignore"):
            a, b, c, d = optimize(w * 2.0, w * 3.0, np.sum(np.log(u) * x), np.sum(x))
            (a + b).backward()
            self.assertEqual(w.grad, 5.0)
            self.assertEqual((u._grad, x._grad), (None, None), "they are leaves of others")
            (a * b + d).backward()
            self.assertEqual((w.grad, x.grad.tolist()), (5 + 2 * 6 * 2, [1, 1, 1]))
            few = [Value(float(i)) for i in range(20)]
            roots = optimize(*(np.sqrt(x) for x in few))
            roots[3].backward()
            self.assertEqual([i for i, x in enumerate(few) if x._grad is not None], [3])
            masked = sum(np.sqrt(x) if i else np.floor(np.sqrt(x)) for i, x in enumerate(few))
            optimize(masked).backward()
            self.assertIsNone(few[0]._grad, "no 0 * inf")
        y, z = Value(np.ones(3)), Value(np.ones(3))
        optimize(np.sum(y + z)).backward()
        y.grad *= 0.5
        self.assertEqual((y.grad.tolist(), z.grad.tolist()), ([0.5] * 3, [1] * 3), "a leaf owns its gradient")
        y.grad = z.grad = None
        with mock.patch.object(picograd, "_MAX_LINES", 0):
            optimize(y + z).backward(np.ones(3))
        y.grad *= 0.5
        self.assertEqual((y.grad.tolist(), z.grad.tolist()), ([0.5] * 3, [1] * 3), "also in a replay")

    def test_roots_in_one_expression_are_swept_at_once(self):
        """Each on its own, 0 * inf + 1 * inf would be nan, where (0 + 1) * inf is not."""
        inf = math.inf
        slopes = [(np.sqrt, 0.0), (np.log, 0.0), (lambda x: 1.0 / x, 0.0), (lambda x: x * inf, 0.5), (np.exp, inf)]
        uses = {
            "sum": lambda a, b: np.sum(a) + np.sum(b),
            "one of them twice": lambda a, b: np.sum(a) * 1.5 + np.sum(b) + np.sum(a),
            "copied": lambda a, b: np.sum(copy.copy(a)) + np.sum(b) + np.sum(a),
            "nested": lambda a, b: optimize(np.sum(a) + np.sum(b), np.sum(a))[0] * 2.0,
            "pickled": lambda a, b: operator.add(*map(np.sum, copy.deepcopy((a, b)))),
        }
        for (f, start), shape, (name, use) in itertools.product(slopes, ((), (2, 3)), uses.items()):
            for p, q in [(0.0, 1.0), (1.0, -1.0), (2.0, 0.5)]:
                with self.subTest(name, f=f, shape=shape, p=p, q=q), np.errstate(all="ignore"):
                    found = []
                    for make in (lambda *roots: roots, optimize):
                        x = Value(np.full(shape, start) if shape else start, np.float64 if shape else None)
                        y = f(x)
                        out = use(*make(y * p, y * q))
                        for _ in range(2):
                            out.forward()
                            out.backward()
                        if name != "pickled":  # whose leaf is another
                            found.append(np.array(x.grad.data))
                        found.append(np.array(out.data.data))
                    half = len(found) // 2
                    for eager, ours in zip(found[:half], found[half:]):
                        np.testing.assert_allclose(ours, eager)
        x = Value(0.5)
        a, b = optimize(np.tanh(x), np.tanh(x) * x)
        second = grad(grad(lambda t: (a * t + b * t) * t))(2.0)
        self.assertAlmostEqual(second, 2 * (a.item() + b.item()))
        first = picograd._backpropagate(a * b, Value(1.0), {x}, False, True)[x]
        t = math.tanh(0.5)
        self.assertAlmostEqual(first.item(), 2 * t * (1 - t * t) * 0.5 + t * t)
        self.assertTrue(first._needs, "a gradient that is a graph")

    def test_roots_swept_in_turn_share_a_forward(self):
        rng = np.random.default_rng(SEED)
        x, w, v = Tensor(rng.normal(size=(9, 4))), Value(rng.normal(size=(4, 3))), Value(rng.normal(size=3))
        hidden = np.tanh(x @ w + v)
        eager = [np.mean(hidden**2), np.sum(np.exp(hidden) * hidden), np.mean(hidden @ w.T), hidden * v]
        fast = optimize(*eager)
        calls = []
        for step in range(30):
            if step % 3 == 0:
                w.data = w.data.data * 0.9
                fast[step % 4].forward()
                for root in eager:
                    root.forward()
            for i in rng.integers(4, size=3):
                grads = []
                for root in (eager[i], fast[i]):
                    w.grad = v.grad = None
                    root.backward(None if not root.ndim else np.ones(root.shape))
                    grads.append([np.array(w.grad.data), np.array(v.grad.data)])
                for ours, expected in zip(*grads[::-1]):
                    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(fast[1].data, eager[1].data, rtol=1e-5)
        code = fast[0]._params["program"].code
        forward, code.forward = code.forward, lambda: calls.append(0) or forward()
        fast[0].forward()
        for root in fast[:3]:
            root.backward()
        self.assertEqual(len(calls), 1, "what all need is computed once")

    def test_roots_keep_their_kind_in_a_replay(self):
        w, s = Value([1.0, 2.0]), Value(0.5)
        loss, number, mask = optimize((w * w).sum(), s * s, s > 0)
        for total in (w * number, w * loss, number * 2.0, w * mask, loss * number):
            before = total.dtype, type(total._held)
            self.assertEqual((total.forward().dtype, type(total._held)), before)

    def test_products_of_one_element(self):
        """BLAS skips a factor that is 0, and so loses nan and inf."""
        for shapes in (
            ((1, 1), (1, 3)),
            ((3, 1), (1, 1)),
            ((1,), (1,)),
            ((1,), (1, 3)),
            ((1, 1), (1,)),
            ((3, 1), (1,)),
        ):
            for start in (0.0, math.inf, math.nan, 2.0):
                with self.subTest(shapes=shapes, start=start), np.errstate(all="ignore"):
                    x, y = (Value(np.full(shape, z), np.float64) for shape, z in zip(shapes, (0.0, start)))
                    for out in ((x * 1.0) @ (y * 1.0), (y.T * 1.0) @ (x.T * 1.0)):
                        self.compare(out, [x, y], lambda: None)

    def test_zeros_reach_nothing_that_gets_no_gradient(self):
        """A stack of what has gradients and what has none would send 0 to the latter, and 0 * inf is nan."""
        for t, shape in itertools.product((Tensor(math.inf), Tensor(2.0)), ((), (3,))):
            w = Value(np.ones(shape), np.float64) if shape else Value(1.0)
            v = [Value(np.full(shape, 0.1 * i + 0.5), np.float64) if shape else Value(0.1 * i + 0.5) for i in range(16)]
            a = [np.sin(x) if i % 2 else np.cos(x) for i, x in enumerate(v)]
            masks = [x > 0 for x in [w * t, *a]]
            out = np.sum(masks[0] * w + sum(k * x for k, x in zip(masks[1:], a)))
            with self.subTest(shape=shape, t=t), np.errstate(all="ignore"):
                self.compare(out, [w, *v], lambda: None)
                first, last = optimize(np.sum(w * t) * 0.0, out)
                w.grad = None
                last.backward()
                np.testing.assert_array_equal(w.grad, np.ones(shape))

    def test_many_roots_and_no_cycles(self):
        w, xs = Value(0.5), [Value(0.001 * i) for i in range(2000)]
        start = time.perf_counter()
        roots = optimize(*[np.tanh(x * w) for x in xs])
        self.assertLess(time.perf_counter() - start, 10)
        roots[7].backward()
        self.assertEqual([i for i, x in enumerate(xs) if x._grad is not None], [7])
        gc.collect()
        gc.disable()
        try:
            fast = optimize(np.sum(np.tanh(Value(np.ones((3, 2))) @ Value(np.ones(2)) * 2.0 - 1.0)))
            self.assertEqual(fast.graph.shape, ())
            (fast * 2.0).backward()
            del fast
            self.assertEqual(gc.collect(), 0)
        finally:
            gc.enable()

    def test_warnings_as_errors_come_where_eager_has_them(self):
        numbers = [Value(1e200 * (i + 1)) for i in range(20)]
        fast = optimize(sum(np.tanh(x * x) for x in numbers))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertEqual(fast.forward().item(), 20.0)
            fast.backward()

    def test_results_are_nobody_elses(self):
        """Not the data of the graph that was optimized, nor that of a leaf: however they come about."""
        in_blocks = {"enabled": True, "min_elements_for_parallel": 1}
        small = mock.patch.multiple(picograd, _BLOCK_BYTES=64, _FEW_BLOCKS=0)
        for lines, config, make in itertools.product(
            (30_000, 0),
            ({}, in_blocks),
            (lambda v: v, lambda v: v * 2.0, lambda v: v.detach(), lambda v: v[1:], lambda v: np.reshape(v, (2, -1))),
        ):
            with small, mock.patch.object(picograd, "_MAX_LINES", lines), distributed_config(**config):
                v = Value(np.ones(300))
                out = make(v)
                fast, other = optimize(out, out)
                for step in range(3):
                    with self.subTest(lines=lines, config=config, step=step):
                        expected = np.array(fast.data.data)
                        for x in (out, v, other):
                            kept = x.data.data.copy()
                            x.data.data[...] = 9.0
                            np.testing.assert_array_equal(fast.data.data, expected)
                            x.data.data[...] = kept
                        fast.forward()

    def test_programs_are_spliced_in(self):
        w, x = Value(np.ones((3, 2))), Tensor(np.ones((4, 3)))
        hidden, norm = optimize(np.tanh(x @ w), np.sum(w * w))
        outer = np.sum(hidden**2) + norm + np.sum(np.exp(hidden))
        again = self.compare(outer, [w], lambda: setattr(w, "data", w.data * 0.5), 1e-5)
        self.assertNotIn("program", self.names(again._params["program"].traced[0]))
        self.assertEqual(again.source.count("np.tanh"), 1)
        number = Value(0.5)
        strong = optimize(np.sum(number * np.ones(3)))
        out = strong * np.ones(2, np.float32)
        self.assertEqual(out.dtype, out.forward().dtype, "a program's result is no number because its leaves are")
        second = picograd._backpropagate(norm, Value(np.float32(1), np.float32), {w}, False, True)[w]
        np.testing.assert_allclose(second.data, 2 * w.data.data)
        self.assertTrue(second._needs, "a gradient that is a graph")

    def test_no_grad_and_data_that_changes(self):
        w = Value(np.ones(3), label="w")
        loss = np.sum(w * w)
        with no_grad():
            fast = optimize(loss)
            copied, twin = pickle.loads(pickle.dumps((fast, w)))
        for root, leaf in ((fast, w), (copied, twin)):
            leaf.data = np.full(3, 2.0)
            with no_grad():
                root.forward()
            root.backward()
            self.assertEqual((root.item(), leaf.grad.tolist()), (12.0, [4, 4, 4]))
            leaf.data = np.full(3, 5.0)
            root.backward()
            self.assertEqual(root.item(), 12.0, "backward never changes data")

    def test_programs_hold_code_and_leaves_only(self):
        x, w = Tensor(np.ones((1000, 50))), Value(np.ones((50, 40)), label="w")
        gc.collect()
        gc.disable()
        try:
            fast = optimize(np.mean(np.tanh(x @ w) ** 2), np.sum(w))[0]
            fast.forward().backward()
            program = fast._params["program"]
            inner = [node for node in picograd._oldest_first(program.traced + program.graph) if node._prim]
            self.assertEqual({node._held is None for node in inner}, {True})
            self.assertLess(len(pickle.dumps(fast)), x.nbytes + 2 * w.nbytes + 10_000)
            gone = weakref.ref(program.code.forward)
            again = optimize(fast * 2.0)
            again.forward().backward()
            del fast, program, inner, again
            self.assertIsNone(gone(), "freed without the cycle collector")
        finally:
            gc.enable()

    def test_results_are_never_overwritten(self):
        x = Value(np.ones(1000))
        y, total = optimize(np.tanh(x), np.sum(np.tanh(x)))
        first = y.data
        y.backward()
        g = x.grad
        x.grad = None
        x.data = np.zeros(1000)
        y.forward()
        y.backward()
        self.assertAlmostEqual(float(first.data[0]), math.tanh(1), places=6)
        self.assertAlmostEqual(float(g.data[0]), 1 - math.tanh(1) ** 2, places=6)
        self.assertEqual(x.grad.data[0], 1.0)
        held = x._grad
        x.grad = None
        y.forward()
        y.backward()
        self.assertIsNot(x._grad, held, "somebody holds it")

    def test_backward_accumulates_and_repeats(self):
        x = Value(np.array([1.0, 2.0]))
        fast = optimize(np.sum(x**3))
        fast.backward()
        once = x.grad.data.copy()
        fast.backward()
        np.testing.assert_array_equal(x.grad, 2 * once)

    def test_shape_changes_are_refused_and_lose_nothing(self):
        x, w = Tensor(np.ones((4, 3))), Value(np.ones((3, 2)), label="w'</b>")
        fast = optimize(np.sum(x @ w))
        x.data = np.ones((5, 3))
        with self.assertRaisesRegex(ValueError, r"Tensor had shape \(4, 3\).* now has \(5, 3\)"):
            fast.forward()
        x.data = np.zeros((4, 3))
        self.assertEqual(fast.forward().data, 0)
        w.data = np.ones((3, 3))
        with self.assertRaisesRegex(ValueError, r"Value \"w'</b>\" had shape \(3, 2\).* now has \(3, 3\)"):
            fast.forward()
        few = [Value(np.ones(3).sum(), np.float32, label=f"few{i}") for i in range(20)]
        fast = optimize(sum(1 / (x - 1.0) for x in few) * Value(1.0))
        few[7].data = np.ones(2, np.float32)
        with self.assertRaisesRegex(ValueError, r"Value 'few7' had shape \(\).* now has \(2,\)"):
            fast.forward()

    def test_labels_never_enter_code(self):
        evil = 'x = __import__("os")\n#'
        cube = primitive(lambda x: x**3, lambda g, out, x: 3 * g * x**2, name=evil)
        try:
            fast = optimize(cube(Value(2.0, label=evil)) * Value(np.ones(3), label=evil))
            fast.forward().backward()
            self.assertNotIn("import", fast.source)
        finally:
            del PRIMITIVES[evil], TABLE[cube.forward]

    def test_the_source_is_of_our_own_names_and_numbers(self):
        class Evil(int):
            __repr__ = __str__ = lambda self: "__import__('os')"

        v = Value(np.ones((2, 3)))
        turned = np.tanh(v).transpose((Evil(1), Evil(0)))
        out = (
            np.sum(turned, axis=Evil(1)) + np.concatenate([v, v], axis=Evil(0))[Evil(1), Evil(0)] + v[:, Evil(-1)].sum()
        )
        self.assertNotIn("import", self.compare(out, [v], lambda: setattr(v, "data", v.data * 2), 1e-6).source)

    def test_ieee_results(self):
        x = Value(1.0)
        fast = optimize(np.log(x) + 1.0 / x + x**0.5)
        with np.errstate(all="ignore"):
            for number in (0.0, -1.0, math.inf, 1.0):
                x.data = number
                x.grad = None
                fast.forward().backward()
                value, g = fast.item(), x.grad.item()
                x.grad = None
                again = np.log(x) + 1.0 / x + x**0.5
                again.backward()
                np.testing.assert_allclose([value, g], [again.item(), x.grad.item()], rtol=1e-12)

    def test_nests_and_is_optimized_again(self):
        a = Value(0.5)
        inner = optimize(np.tanh(a) * a)
        outer = inner * inner + a
        again = optimize(outer)
        for number in (0.5, -1.5):
            a.data = number
            reference = Value(number)
            y = np.tanh(reference) * reference
            z = y * y + reference
            z.backward()
            for root in (outer, again):
                a.grad = None
                root.forward().backward()
                self.assertAlmostEqual(root.item(), z.item(), 12)
                self.assertAlmostEqual(a.grad.item(), reference.grad.item(), 12)
        with self.assertRaisesRegex(TypeError, "not inside a function that is being differentiated"):
            grad(lambda x: optimize(x**3))(2.0)

    def test_pickle_and_copy(self):
        model = MLP(2, [4, 1], seed=0)
        fast, prediction = optimize(np.mean(model(np.ones((5, 2))) ** 2), model(np.ones((5, 2))))
        for copied in (pickle.loads(pickle.dumps((model, fast, prediction))), copy.deepcopy((model, fast, prediction))):
            twin, f, p = copied
            f.forward().backward()
            fast.forward().backward()
            np.testing.assert_allclose(twin.layers[0].w.grad, model.layers[0].w.grad)
            self.assertEqual(p.shape, (5,))
            model.zero_grad()
            self.assertIsNot(twin.layers[0].w, model.layers[0].w)

    def test_any_size(self):
        x = v = Value(1.0)
        for _ in range(10_000):
            v = np.tanh(v) * 1.1
        self.compare(v, [x], lambda: setattr(x, "data", 0.5))
        xs = [Value(i / 2000) for i in range(2000)]
        total = sum((np.sin, np.cos, np.tanh, lambda x: x * x)[i % 4](x) for i, x in enumerate(xs))
        fast = self.compare(total, xs, lambda: [setattr(x, "data", 0.5) for x in xs])
        self.assertLess(len(fast.source.splitlines()), 100)
        with mock.patch.object(picograd, "_MAX_LINES", 5):
            a = Value(0.3)
            fast = self.compare(
                np.tanh(np.sin(np.cos(np.exp(np.tan(a * 2) + a) * a) - a)), [a], lambda: setattr(a, "data", 0.2)
            )
            self.assertIn("replayed", fast.source)
        empty = Value(np.ones((0, 3)), np.float64)
        self.compare(np.sum(np.tanh(empty)), [empty], lambda: None)

    def test_large_chains_run_in_blocks(self):
        rng = np.random.default_rng(SEED)
        x, w = Tensor(rng.normal(size=(300, 50)), np.float64), Value(rng.normal(size=50), np.float64)
        with distributed_config(enabled=True, min_elements_for_parallel=1000):
            loss = np.mean((w * x + 0.5).tanh() ** 2 * np.sin(x))
            fast = self.compare(loss, [w], lambda: setattr(w, "data", w.data * 0.9))
            self.assertIn("_blocks(", fast.source)
            with mock.patch.object(picograd, "_BLOCK_BYTES", 1000):
                self.compare(loss, [w], lambda: setattr(x, "data", rng.normal(size=(300, 50))))

    def test_blocks_take_constants_of_every_kind(self):
        """Raw arrays, and numbers that are equal but not the same: another object, of another sign, or a truth."""
        w = Value(np.random.default_rng(SEED).normal(size=(20, 30)), np.float64)
        table, row, tenth = np.ones((20, 30)), np.full(30, -0.5), [float("0.1") for _ in range(3)]
        graphs = [
            lambda: np.tanh(w * table) * w * table,
            lambda: np.tanh(w * row + 1) * row - 1.0,
            lambda: np.clip(w, np.array(-1.0), np.array(1.0)) * np.exp(w),
            lambda: np.maximum(w @ w.T @ w, 0),
            lambda: (np.tanh(w * tenth[0]) * tenth[1] + tenth[2]) * (w > 0),
            lambda: 1.0 / (np.exp(w) * 0.0) + 1.0 / (np.exp(w) * -0.0) * np.where(w > 0, 1.0, True),
            lambda: np.abs(w) ** w + np.clip(w, w, 2.5),
        ]
        for i, graph in enumerate(graphs):
            with self.subTest(i), np.errstate(all="ignore"), mock.patch.object(picograd, "_BLOCK_BYTES", 256):
                with distributed_config(enabled=True, min_elements_for_parallel=1):
                    out = graph()
                    fast = self.compare(out, [w], lambda: setattr(w, "data", w.data * 0.9))
                    self.assertIn("_blocks(", fast.source)

    def test_backward_takes_seeds_that_wait(self):
        small = mock.patch.multiple(picograd, _BLOCK_BYTES=32, _FEW_BLOCKS=0)
        with small, distributed_config(enabled=True, min_elements_for_parallel=1):
            for ones in (lambda out: None, lambda out: Tensor(np.ones(out.shape), np.float64) * 2.0 - 1.0):
                w = Value(np.ones((20, 30)), np.float64)
                out = np.concatenate([w, w]) @ w.T
                out.backward(ones(out))
                expected, w.grad = np.array(w.grad.data), None
                fast = optimize(out)
                fast.backward(ones(out))
                np.testing.assert_allclose(w.grad, expected)
                w.grad = None
                (optimize(np.tanh(w) * 2.0) * 3.0).backward(ones(w))
                np.testing.assert_allclose(w.grad, 6 / np.cosh(1.0) ** 2 * np.ones(w.shape))

    def test_roots_of_every_kind(self):
        """Whole numbers, truths and masks, weak and strong, arrays of them, alone and beside a loss."""
        number, array = Value(0.5), Value(np.array([0.5, -1.0, 2.0]), np.float64)
        loss = np.sum(array * number)
        roots = [f(x) for x in (number, array) for f in (np.argmax, np.count_nonzero, np.isnan, np.argsort)]
        roots += [(x > 0) ** 2 for x in (number, array)] + [x > 0 for x in (number, array, array[0])]
        roots += [number, array, array[0], number * 1.0, np.argsort(array)[0]]
        for root in roots:
            with self.subTest(root=repr(root)):
                for got in (optimize(root), optimize(loss, root)[1], optimize(root, loss)[0].forward()):
                    self.assertIs(type(got._held), type(root._held))
                    self.assertEqual((got.shape, got.dtype), (root.shape, root.dtype))
                    np.testing.assert_array_equal(got.data.data, root.data.data)
                array.grad = number.grad = None
                optimize(root, loss)[1].backward()
                np.testing.assert_array_equal(array.grad, np.full(3, 0.5))
                self.assertEqual(number.grad.item(), 1.5)

    def test_a_sum_of_one_element_is_never_minus_zero(self):
        for x in (Value(-0.0), Value(np.array(-0.0)), Value(np.array([-0.0])), Value(np.array([[-0.0]]), np.float64)):
            for f in (np.sum, np.mean):
                for options in ({}, {"keepdims": True}, {"axis": ()}):
                    with self.subTest(repr(x), f=f.__name__, **options), np.errstate(divide="ignore"):
                        out = 1.0 / f((x > 0) * x - 0.0, **options)
                        fast = optimize(out).forward()
                        np.testing.assert_array_equal(fast.data.data, out.data.data)

    def test_data_dependent_shapes(self):
        x = Value(np.array([1.0, -1.0, 2.0]))
        fast = optimize(np.sum(x[x > 0] ** 2))
        x.data = np.array([-1.0, 1.0, 3.0])
        fast.forward().backward()
        self.assertEqual((fast.item(), x.grad.tolist()), (10.0, [0, 2, 6]))

    def test_training_of_micrograds_moons(self):
        import_or_skip = __import__("importlib").util.find_spec("micrograd")
        if not import_or_skip:
            self.skipTest("micrograd is not installed")
        import micrograd.nn as theirs

        with mock.patch.object(theirs, "Value", Value):
            random.seed(1)
            model = theirs.MLP(2, [8, 8, 1])
        points = np.random.default_rng(0).normal(size=(30, 2))
        scores = [model(list(map(Value, p))) for p in points.tolist()]
        losses = [(1 + -(1 if p[0] > p[1] else -1) * s).relu() for p, s in zip(points, scores)]
        loss = sum(losses) * (1 / 30) + 1e-4 * sum(p * p for p in model.parameters())
        nodes = len(picograd._oldest_first([loss]))
        fast = self.compare(
            loss, model.parameters(), lambda: [setattr(p, "data", p.data * 0.9) for p in model.parameters()]
        )
        self.assertEqual(fast.source.split("def backward")[0].count(".dot("), 4, "three layers, and the norm")
        self.assertGreater(nodes / len(picograd._oldest_first(fast._params["program"].graph)), 20)


class Counted(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of a library of its own: it speaks NumPy's protocols, counts what it did, and lacks `np.sort`."""

    calls, copies_home = 0, 0

    def __init__(self, array):
        self._array = np.asarray(array)

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)

    def __array__(self, dtype=None, copy=None):
        Counted.copies_home += 1
        return np.array(self._array, dtype)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if any(isinstance(x, (Tensor, Value)) for x in inputs):
            return NotImplemented
        return self.compute(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        if function in (np.shape, np.ndim, np.size, np.result_type):
            return function(*map(self.inside, args))
        if function is np.argsort or any(issubclass(kind, (Tensor, Value)) for kind in kinds):
            return NotImplemented
        return self.compute(function, args, kwargs)

    def __getitem__(self, index):
        return self.compute(operator.getitem, (self, index), {})

    def astype(self, dtype, copy=True):
        return self.compute(np.asarray, (self, dtype), {})

    def swapaxes(self, i, j):
        return self.compute(np.swapaxes, (self, i, j), {})

    @staticmethod
    def inside(x):
        return type(x)(map(Counted.inside, x)) if isinstance(x, (tuple, list)) else getattr(x, "_array", x)

    @staticmethod
    def compute(function, args, kwargs):
        Counted.calls += 1
        out = function(*Counted.inside(args), **kwargs)
        return Counted(out) if isinstance(out, (np.ndarray, np.generic)) else out


@needs_power
class TestElsewhere(unittest.TestCase):
    """Arrays of another library, by a double that needs none."""

    def setUp(self):
        Counted.calls = Counted.copies_home = 0
        rng = np.random.default_rng(3)
        self.x, self.labels = rng.normal(size=(12, 4)).astype(np.float32), rng.integers(0, 3, 12)

    def gradients(self, x, labels):
        model = MLP(4, [5, 3], activation="gelu", seed=2)
        loss = cross_entropy(model(x), labels)
        home = Counted.copies_home
        loss.backward()
        return loss, [p.grad.data for p in model.parameters()], home

    def test_a_network_on_foreign_arrays_has_the_gradients_of_numpy(self):
        expected, wanted, _ = self.gradients(self.x, self.labels)
        self.assertEqual(Counted.calls, 0)
        loss, got, home = self.gradients(Counted(self.x), Counted(self.labels))
        self.assertEqual(home, 0)  # the forward brings nothing home
        self.assertEqual(Counted.copies_home, len(got) + 1)  # the backward the gradients and the loss
        self.assertGreater(Counted.calls, 50)
        self.assertAlmostEqual(loss.item(), expected.item(), 6)
        for g, h in zip(got, wanted):
            self.assertIs(type(g), np.ndarray)
            np.testing.assert_allclose(g, h, rtol=1e-4, atol=1e-7)

    def test_it_is_kept_without_a_copy_and_gradients_take_its_kind(self):
        x, y = Counted(self.x.astype(np.float64)), Counted(self.labels)
        v, t = Value(x), Tensor(y)
        self.assertIs(v.data.data, x)
        self.assertIs(t.data, y)
        self.assertEqual((v.dtype, t.dtype, v.shape), (np.float64, y.dtype, (12, 4)))
        self.assertTrue(v.distributed and t.distributed)
        (v * v).sum().backward()
        self.assertIsInstance(v.grad.data, Counted)
        self.assertEqual(Counted.copies_home, 0)
        np.testing.assert_allclose(v.grad.numpy(), 2 * self.x, rtol=1e-6)
        with self.assertRaisesRegex(TypeError, "dtype of data must be floating, got int64"):
            Value(y)
        self.assertEqual(Value(y, np.float32).dtype, np.float32)

    def test_leaves_of_every_kind_get_their_own_kind(self):
        a, b, c = Value(2.0), Value(np.ones(4)), Value(np.ones(()), dtype=np.float32)
        (a * a * Counted(self.x) * b + c).sum().backward()
        self.assertEqual([type(v.grad.data) for v in (a, b, c)], [np.float64, np.ndarray, np.float32])
        np.testing.assert_allclose(a.grad.data, 4 * self.x.sum(), rtol=1e-4)
        np.testing.assert_allclose(b.grad.data, 4 * self.x.sum(0), rtol=1e-4)
        self.assertEqual(c.grad, 48)
        np.testing.assert_allclose(grad(lambda w: (Counted(self.x) @ w).sum())(np.ones(4)), self.x.sum(0), rtol=1e-4)

    def test_what_it_does_not_offer_is_refused_and_nothing_is_computed(self):
        v = Value(Counted(self.x))
        for refused in (
            lambda: np.sort(v),
            lambda: np.linalg.cholesky(v @ v.T),
            lambda: Value(self.x)[Counted(self.labels)],
            lambda: np.take(Value(self.x), Tensor(Counted(self.labels)), axis=0),
            lambda: v[[0, 0]].sum().backward(),
            lambda: v[::2].sum().backward(),
        ):
            with self.assertRaises(TypeError):
                refused()
        self.assertEqual(Counted.copies_home, 0)
        np.testing.assert_array_equal(v.grad.numpy(), 0)

    def test_in_place(self):
        t, u = Tensor(Counted(self.x)), Tensor(self.x)
        same = t
        t += 1.0
        u -= t
        self.assertIs(t, same)
        self.assertIsInstance(t.data, Counted)
        np.testing.assert_allclose(t.numpy(), self.x + 1)
        self.assertIs(type(u.data), np.ndarray)
        np.testing.assert_allclose(u.data, -1, rtol=1e-5)
        with self.assertRaisesRegex(TypeError, "held in NumPy"):
            Adam([Value(t)])

    def test_optimize_replays_it(self):
        w, x = Value(np.ones(4)), Tensor(Counted(self.x))
        loss = optimize(((x @ w + 0.0) ** 2.0).mean())
        self.assertIn("replayed", loss.source)
        w.data = np.full(4, 0.5)
        x.data = Counted(self.x + 1)
        loss.forward().backward()
        np.testing.assert_allclose(w.grad.data, (self.x + 1).T @ ((self.x + 1) @ np.full(4, 0.5)) / 6, rtol=1e-4)

    def test_a_picture_computes_nothing(self):
        v = Value(Counted(self.x[:1, :2]))
        y = (v * v).sum()
        y.backward()
        self.assertIn("(1, 2) float32<br/>not computed<br/><i>grad not computed</i>", draw(y).source)
        self.assertIn('tooltip="not computed\\ngrad\\nnot computed"', draw(y).source)
        self.assertIn("shape=(1, 2)", repr(v))
        self.assertEqual(Counted.copies_home, 0)


class TestMicrograd(unittest.TestCase):
    """micrograd's programs on our Value: the expected numbers are micrograd's (and PyTorch's) own."""

    def test_sanity_check(self):
        x = Value(-4.0)
        z = 2 * x + 2 + x
        q = z.relu() + z * x
        h = (z * z).relu()
        y = h + q + q * x
        y.backward()
        self.assertEqual((y.data, x.grad), (-20.0, 46.0))

    def test_more_ops(self):
        a, b = Value(-4.0), Value(2.0)
        c = a + b
        d = a * b + b**3
        c += c + 1
        c += 1 + c + (-a)
        d += d * 2 + (b + a).relu()
        d += 3 * d + (b - a).relu()
        e = c - d
        f = e**2
        g = f / 2.0
        g += 10.0 / f
        g.backward()
        self.assertAlmostEqual(g.data, 24.70408163265306, places=10)
        self.assertAlmostEqual(a.grad, 138.83381924198252, places=10)
        self.assertAlmostEqual(b.grad, 645.5772594752186, places=10)
        self.assertEqual(f"{g.data:.4f} {a.grad:.4f} {b.grad:.4f}", "24.7041 138.8338 645.5773")

    def test_graph_walk(self):
        a, b = Value(1.0), Value(2.0)
        c = a * b
        self.assertEqual((c._prev, c._op, a._op), ({a, b}, "*", ""))

    def test_its_nn(self):
        try:
            import micrograd.nn as theirs
        except ImportError:
            self.skipTest("micrograd is not installed")
        original, theirs.Value = theirs.Value, Value
        try:
            random.seed(1337)
            model = theirs.MLP(2, [4, 4, 1])
            xs, ys = [[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]], [1.0, -1.0, 1.0]
            losses = []
            for _ in range(20):
                loss = sum((model(list(map(Value, x))) - y) ** 2 for x, y in zip(xs, ys))
                model.zero_grad()
                loss.backward()
                for p in model.parameters():
                    p.data += -0.05 * p.grad
                losses.append(loss.data)
            self.assertLess(losses[-1], losses[0] / 2)
        finally:
            theirs.Value = original


def slowly(block):
    time.sleep(0.2)
    return block


LOOPBACK = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": 60}


LOOPBACK["scheduler_kwargs"] = {"dashboard_address": "127.0.0.1:0"}  # any port: no dashboard, but it listens


@needs_power
@unittest.skipUnless(distributed, f"needs dask[distributed], see .ci/requirements.txt: {no_dask}")
class TestDask(unittest.TestCase):
    """Dask arrays, on a real cluster of two processes of this machine."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, **LOOPBACK, memory_limit=0)
        cls.client = distributed.Client(cls.cluster)
        rng = np.random.default_rng(5)
        cls.x = rng.normal(size=(60, 6)).astype(np.float32)
        cls.labels = rng.integers(0, 3, 60)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.cluster.close()

    def chunked(self, array, rows=30):
        return da.from_array(array, chunks=(rows, *array.shape[1:]))

    @contextlib.contextmanager
    def passes(self):
        """Counts the passes over a graph, here in this process."""
        count = []

        def get(*args, **kwargs):
            count.append(1)
            return dask.get(*args, **kwargs)

        with dask.config.set(scheduler=get):
            yield count

    def train(self, x, labels, steps, each=lambda: None):
        model = MLP(6, [8, 3], seed=1)
        optimizer = Adam(model.parameters(), lr=0.05)
        for _ in range(steps):
            loss = cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each()
        return loss, model

    def test_gradients_are_those_of_numpy_for_every_loss(self):
        signs = np.sign(self.x[:, 0])
        for out, loss, target in (
            (3, cross_entropy, self.labels),
            (1, mse_loss, self.x[:, 1]),
            (1, binary_cross_entropy_with_logits, np.maximum(signs, 0)),
            (1, hinge_loss, signs),
        ):
            results = []
            for wrap in (lambda a: a, self.chunked, lambda a: Tensor(self.chunked(a))):
                model = MLP(6, [5, out], seed=2)
                value = loss(model(wrap(self.x)), wrap(target))
                value.backward()
                results.append([value.data.data] + [p.grad.data for p in model.parameters()])
            for got in results[1:]:
                for g, h in zip(got, results[0]):
                    self.assertIs(type(g), type(h))
                    self.assertEqual(g.dtype, np.float32)
                    np.testing.assert_allclose(g, h, rtol=1e-4, atol=1e-6)

    def test_one_backward_is_one_pass_and_nothing_before_it_computes(self):
        with self.passes() as count:
            model, x = MLP(6, [5, 3], seed=2), Value(self.chunked(self.x))
            loss = cross_entropy(model(x), self.chunked(self.labels))
            repr(x), repr(loss), loss.distributed, x.shape
            self.assertRegex(draw(loss).source, r"\(60, 6\) float32<br/>chunksize=\(\d+, \d+\)<br/>not computed")
            self.assertEqual(len(count), 0)
            loss.backward()
            self.assertEqual(len(count), 1)
            loss.item(), f"{loss.data:.3f}"  # the loss came with the gradients
            self.assertIsInstance(x.grad.data, da.Array)  # of a leaf that is Dask's: not computed
            self.assertEqual(x.grad.data.chunks, x.data.data.chunks)
            self.assertEqual(len(count), 1)
            self.assertGreater(np.abs(x.grad.numpy()).sum(), 0)
            self.assertEqual(len(count), 2)

    def test_a_tensor_is_the_dask_array(self):
        doubles = da.from_array(self.x.astype(np.float64), chunks=(20, 3))
        t = Tensor(doubles)
        self.assertEqual((type(t.data), t.data.name), (da.Array, doubles.name))
        self.assertEqual((t.shape, t.dtype, t.distributed), ((60, 6), np.float64, True))
        self.assertEqual(repr(t), "Tensor(shape=(60, 6), dtype=float64, distributed=True, chunksize=(20, 3))")
        self.assertIn("chunksize=(20, 3)", repr(Value(doubles)))
        np.testing.assert_array_equal(np.asarray(t), self.x)
        np.testing.assert_array_equal(t.numpy(), self.x)
        self.assertAlmostEqual(float(t[0, 0]), float(self.x[0, 0]))
        before = set_distributed_config().min_elements_for_parallel
        self.addCleanup(set_distributed_config, enabled=False, min_elements_for_parallel=before)
        set_distributed_config(enabled=True, min_elements_for_parallel=1)
        self.assertIsInstance((t + 1.0).data, da.Array)

    def test_operations_in_both_directions(self):
        w = np.linspace(-1, 1, 24).reshape(6, 4)
        for f in (
            lambda x: x @ w,
            lambda x: w.T @ x.T,
            lambda x: np.matmul(x, x.T),
            *(
                lambda x, f=f, axis=axis, keep=keep: f(x, axis=axis, keepdims=keep)
                for f in (np.sum, np.mean, np.max, np.min, np.prod, np.var, np.std, logsumexp)
                for axis, keep in ((None, False), (0, True), (-1, False), ((0, 1), True))
            ),
            lambda x: np.where(x > 0, x, 0.1 * x),
            lambda x: np.maximum(x, 0.5) - np.minimum(0.2, x),
            lambda x: np.exp(x) + np.log(x * x + 1.0),
            softmax,
            log_softmax,
            relu,
            sigmoid,
            softplus,
            gelu,
            lambda x: np.clip(x, -0.5, 0.5),
            lambda x: x[3:50, 2],
            lambda x: x[7],
            lambda x: x[..., None, 1:-1],
            lambda x: x[-1, -2],
            lambda x: np.reshape(x, (-1,)),
            lambda x: np.reshape(x, (6, 10, 6)),
            lambda x: x.T,
            lambda x: np.concatenate([x, 2.0 * x], axis=1),
            lambda x: np.concatenate([x, w.T]),
            lambda x: np.stack([x, x * x]),
            lambda x: np.cumsum(x, axis=0),
            lambda x: np.einsum("ij,jk->i", x, w),
        ):
            results = []
            for wrap in (lambda a: a, lambda a: da.from_array(a, chunks=(20, 3))):
                with self.passes() as count:
                    x = Value(wrap(self.x.astype(np.float64)), None if results else np.float64)
                    out = f(x)
                    np.sum(out * out).backward()
                    self.assertEqual(len(count), 0)
                    results.append((out.data.numpy(), x.grad.numpy()))
                    self.assertIsInstance(x.grad.data, da.Array if len(results) == 2 else np.ndarray)
            for got, expected in zip(results[1], results[0]):
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)

    def test_what_dask_does_not_offer_is_refused_before_anything_is_computed(self):
        x, i = Value(self.chunked(self.x)), self.chunked(self.labels)
        with self.passes() as count:
            for name, f in (
                ("det", lambda: np.linalg.det(x[:6])),
                ("signdet", lambda: np.linalg.slogdet(x[:6])),
                ("argsort", lambda: np.sort(x)),
                ("cholesky", lambda: np.linalg.cholesky(x[:6])),
                ("getitem", lambda: np.take(Value(self.x), i, axis=0)),
                ("getitem", lambda: Tensor(self.x)[Tensor(i)]),
                ("getitem", lambda: np.take_along_axis(x, i[:, None], 1)),
                ("getitem", lambda: np.sum(x[[1, 1]]).backward()),
            ):
                with self.assertRaisesRegex(TypeError, f"^{name}: .*dask.array"):
                    f()
            for f in (lambda: x[x.data.data > 0], lambda: Value(x.data.data[x.data.data > 0])):
                with self.assertRaisesRegex(ValueError, r"compute_chunk_sizes\(\)"):
                    f()
            self.assertEqual(len(count), 0)

    def test_functions_of_dask_take_no_value_for_a_number(self):
        x, ones = self.chunked(self.x), np.ones(6, np.float32)
        row = da.from_array(ones, chunks=3)
        functions = (
            lambda w: x.dot(w),
            lambda w: da.dot(x, w),
            lambda w: da.tensordot(x, w, axes=((1,), (0,))),
            lambda w: da.maximum(x, w),
            lambda w: da.where(x > 0, w, 0),
            lambda w: da.where(x > w.data.data, x, [w, w]),
            lambda w: da.map_blocks(np.add, x, w),
            lambda w: x.map_blocks(lambda block, w: block + w, w=w, dtype=np.float32),
            lambda w: da.blockwise(np.add, "ij", x, "ij", w, None, dtype=np.float32),
            lambda w: da.stack([w]),
            lambda w: da.concatenate([w, w]),
            lambda w: da.from_array(w),
            lambda w: da.asarray(w),
            lambda w: da.full((3,), w),
            lambda w: da.clip(x, 0, w),
            lambda w: da.sum(w),
            lambda w: da.round(x, w),
            lambda w: x[w],
            lambda w: x[:, w],
            lambda w: x.copy().__setitem__(0, w),
        )
        with self.passes() as count, warnings.catch_warnings():
            warnings.simplefilter("error")
            for i, f in enumerate(functions):
                for w in (Value(2.0), Value(ones), Value(np.float32(2), np.float32), Value(row), Value(row).detach()):
                    with self.subTest(i, shape=w.shape), self.assertRaises((TypeError, ValueError, IndexError)):
                        f(w)
            for f in (dask.compute, dask.delayed, *functions[:5], *functions[6:13]):
                with self.assertRaisesRegex(TypeError, "Tensor does not go into a graph of Dask's.*take .data for"):
                    f(Tensor(row))
            with self.assertRaisesRegex(TypeError, "Value does not go into .*not da.maximum.*take .data.data for"):
                dask.compute(Value(row))
            self.assertEqual(len(count), 0)
            da.maximum(x, Tensor(ones).data).compute(), dask.delayed(np.square)(Value(2.0).item()).compute()

    def test_a_value_owns_its_array(self):
        x = self.chunked(self.x)
        for make in (Value, Tensor, lambda x: Tensor(x, dtype=x.dtype)):
            v, u, w = make(x), make(self.x), make(x)
            v, u = (v.data, u.data) if isinstance(v, Value) else (v, u)
            w.data = x
            with self.passes() as count:
                v[0] = 1.0
                v[1] = x[2]
                v[2:4, 1] = Tensor(x)[0, 0]
                w.data[0] = 1.0
                twin = copy.copy(v)
                twin[5] = 7.0
                self.assertEqual(len(count), 0)
            u[0], u[1], u[2:4, 1] = 1.0, self.x[2], self.x[0, 0]
            np.testing.assert_array_equal(v.numpy(), u.numpy())
            np.testing.assert_array_equal(x.compute(), self.x)
        a = Value(x)
        a.grad = x
        a.grad[0] = 5.0
        b = Value(self.x)
        b.grad = x
        self.assertIs(type(b.grad.data), np.ndarray)  # of the kind of its leaf
        np.testing.assert_array_equal(x.compute(), self.x)

    def test_in_place_keeps_dtypes_as_numpy_does(self):
        t, count = Tensor(self.chunked(self.x)), Tensor(self.chunked(self.labels))
        with self.passes() as passes:
            t += Tensor(self.x.astype(np.float64))
            self.assertEqual((t.dtype, type(t.data)), (np.float32, da.Array))
            for target in (count, Tensor(self.labels, dtype=np.int64)):
                with self.assertRaisesRegex(TypeError, "dtype int64 cannot take a result of dtype float"):
                    target += self.chunked(self.x[:, 0])
            self.assertEqual(len(passes), 0)
        np.testing.assert_allclose(t.numpy(), self.x * 2, rtol=1e-6)

    def test_a_number_that_was_looked_at_is_not_computed_again(self):
        w = Value(np.ones(6))
        for look in (lambda v: v.item(), lambda v: v.data.item(), lambda v: f"{v.data:.3f}", lambda v: str(v.data)):
            with self.passes() as count:
                loss = np.mean((self.chunked(self.x) @ w) ** 2)
                data = loss.data
                look(loss), loss.item(), float(loss.data)
                self.assertEqual(len(count), 1)
                loss.backward()  # only the gradient: Dask keeps nothing of the pass before
                self.assertEqual((len(count), type(loss.data.data)), (2, np.float32))
        old, x = loss.item(), Value(self.chunked(self.x)[0, 0])
        x.item()
        self.assertIsInstance(x.data.data, da.Array)  # a leaf stays what it is
        w.data = np.zeros(6)
        loss.forward()
        self.assertEqual((loss.item(), data.item()), (0.0, old))

    def test_a_distributed_tensor_beside_it(self):
        before = set_distributed_config().min_elements_for_parallel
        self.addCleanup(set_distributed_config, enabled=False, min_elements_for_parallel=before)
        for config in ({"enabled": True, "min_elements_for_parallel": 1}, {"enabled": False}):
            set_distributed_config(**config)
            t, v = (Tensor(self.x, distributed=True) for _ in range(2))
            v, x, w = Value(v * 1.0), Value(self.chunked(self.x)), Tensor(np.ones((6, 6)), distributed=True)
            with self.passes() as count:
                for out in (
                    t + x,
                    x + t * 2,
                    np.maximum(x, t * 2),
                    np.where(t > 0, x, t),
                    np.concatenate([x, t]),
                    x @ w,
                ):
                    self.assertIsInstance(out.data.data, da.Array)
                y = np.sum(np.where(x > 0, t * 2.0, x) * v + (x @ w) * np.tanh(v))
                self.assertEqual(len(count), 0)
                y.backward()
                self.assertEqual(len(count), 1)
            a, b = Value(self.x), Value(self.x)
            np.sum(np.where(a > 0, 2 * self.x, a) * b + (a @ np.ones((6, 6))) * np.tanh(b)).backward()
            np.testing.assert_allclose(v.grad.numpy(), b.grad.numpy(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(x.grad.numpy(), a.grad.numpy(), rtol=1e-4, atol=1e-5)

    def test_results_have_the_shapes_and_dtypes_of_numpy(self):
        mask, x = self.chunked(self.x > 0), self.chunked(self.x)
        for got, expected in (
            (Tensor(mask.T) @ mask, (self.x > 0).T @ (self.x > 0)),
            (np.einsum("ij,ik->jk", Tensor(mask), mask), (self.x > 0).T @ (self.x > 0)),
            (np.where(Tensor(mask), mask, 2), np.where(self.x > 0, self.x > 0, 2)),
            (np.clip(Tensor(x), -0.5, 0.5), np.clip(self.x, -0.5, 0.5)),
            (Tensor(x).flatten(), self.x.flatten()),
            (jacobian(np.square)(x[0]), 2 * np.diag(self.x[0])),
        ):
            self.assertIsInstance(getattr(got, "data", got) if isinstance(got, Tensor) else got, da.Array)
            self.assertEqual((got.shape, got.dtype), (expected.shape, expected.dtype))
            np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-6)
        for a, b in ((x[:, :1], x.T), (x[:1, :1], np.ones(6)), (Value(np.ones(())), x), (Value(2.0), x)):
            with self.assertRaisesRegex(ValueError, "matmul"):
                Value(a) @ b
        v = Value(x)
        np.sum(v[2:2]).backward()
        np.testing.assert_array_equal(v.grad.numpy(), 0 * self.x)

    def test_what_is_refused_is_refused_in_every_thread_and_other_warnings_stay(self):
        x, refused, warned = self.chunked(self.x), [], []

        def refuse():
            for f in (lambda: np.interp(Tensor(x), [0, 1], [0, 1]), lambda: np.linalg.det(Value(x)[:6])) * 10:
                with self.assertRaisesRegex(TypeError, "does not offer it"):
                    f()
                refused.append(1)

        def warn():
            for _ in range(200):
                warnings.warn("of somebody else", FutureWarning, stacklevel=1)
                warned.append(1)

        with self.passes() as count, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            threads = [threading.Thread(target=f) for f in (refuse, warn, refuse, warn)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual((len(refused), len(warned), len(count)), (40, 400, 0))

    def test_training_reaches_the_loss_of_training_in_memory(self):
        expected, model = self.train(self.x, self.labels, 10)
        loss, other = self.train(self.chunked(self.x), self.chunked(self.labels), 10)
        self.assertAlmostEqual(loss.item(), expected.item(), 4)
        for p, q in zip(model.parameters(), other.parameters()):
            self.assertIs(type(q.data.data), np.ndarray)
            np.testing.assert_allclose(q.data.data, p.data.data, rtol=1e-2, atol=1e-3)

    def test_an_optimized_graph(self):
        x, labels = Tensor(self.chunked(self.x)), self.chunked(self.labels)
        model = MLP(6, [5, 3], seed=2)
        loss = optimize(cross_entropy(model(x), labels) + 0.0)
        self.assertIn("replayed", loss.source)
        model.layers[1].b.data += 1.0
        x.data = self.chunked(self.x + 0.5)
        with self.passes() as count:
            (
                optimize((x @ Value(np.ones(6))).sum()).forward(),
                optimize((self.chunked(self.x) @ model.layers[0].w).sum()),
            )
            self.assertEqual(len(count), 0)
            loss.forward().backward()
            self.assertEqual(len(count), 1)
        got = [p.grad.data for p in model.parameters()]
        model.zero_grad()
        eager = cross_entropy(model(self.x + np.float32(0.5)), self.labels)
        eager.backward()
        self.assertAlmostEqual(loss.item(), eager.item(), 5)
        for g, p in zip(got, model.parameters()):
            np.testing.assert_allclose(g, p.grad.data, rtol=1e-4, atol=1e-6)

    def test_a_worker_that_dies_during_backward(self):
        expected, model = self.train(self.x, self.labels, 1)
        slow = self.chunked(self.x, 10).map_blocks(slowly, dtype=np.float32)
        pids = self.client.run(os.getpid)
        killer = threading.Timer(0.3, os.kill, (next(iter(pids.values())), signal.SIGKILL))
        killer.start()
        loss, other = self.train(slow, self.chunked(self.labels, 10), 1)
        killer.join()
        self.assertAlmostEqual(loss.item(), expected.item(), 5)
        for p, q in zip(model.parameters(), other.parameters()):
            np.testing.assert_allclose(q.data.data, p.data.data, rtol=1e-3, atol=1e-4)
        self.client.wait_for_workers(2, timeout=20)
        self.assertNotEqual(self.client.run(os.getpid), pids)

    def test_a_scheduler_that_is_lost_during_backward_changes_nothing(self):
        model, w = MLP(6, [5, 3], seed=2), Value(1.0)
        mse_loss(model(self.x[:2]), np.zeros((2, 3))).backward()
        before = [(p.data.numpy(), p.grad.numpy()) for p in model.parameters()]
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
            distributed.LocalCluster(n_workers=1, processes=False, protocol="tcp://", **LOOPBACK) as cluster,
            distributed.Client(cluster, timeout=2, set_as_default=True) as client,
        ):
            slow = self.chunked(self.x, 5).map_blocks(slowly, dtype=np.float32)
            loss = cross_entropy(model(slow) * w, self.chunked(self.labels, 5))
            lost = threading.Timer(0.3, client.sync, (cluster.scheduler.close,))
            lost.start()
            with self.assertRaises((OSError, RuntimeError, CancelledError)):
                loss.backward()
            lost.join()
        for p, (data, gradient) in zip(model.parameters(), before):
            np.testing.assert_array_equal(p.data.numpy(), data)
            np.testing.assert_array_equal(p.grad.numpy(), gradient)
        self.assertEqual(w.grad, 0)

    def test_memory_of_the_client_stays_flat(self):
        tasks, sizes = [], []
        compute = dask.compute

        def measured(*arrays, **options):
            tasks.append(sum(len(x.__dask_graph__()) for x in arrays))
            return compute(*arrays, **options)

        def each():
            if len(tasks) % 5 == 0:
                gc.collect()
                sizes.append(sum(isinstance(x, (Value, da.Array)) for x in gc.get_objects()))

        x, labels = self.client.persist([self.chunked(self.x), self.chunked(self.labels)])
        with mock.patch("dask.compute", measured):
            self.train(x, labels, 25, each)
        self.assertEqual(len(set(tasks)), 1)  # graphs do not grow
        self.assertEqual(len(sizes), 5)
        self.assertEqual(len(set(sizes)), 1)


@needs_power
class TestDemo(unittest.TestCase):
    """demo.py as its users run it, in a copy: two moons and CSV files, pictures, progress, errors, Ctrl-C."""

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        for name in ("demo.py", "picograd.py"):
            shutil.copy(HERE / name, cls.folder)
        rng = np.random.default_rng(0)
        cls.x = rng.normal(size=(60, 3)).round(3)
        cls.kind = [("ash", "oak")[int(row[0] + row[1] > 0)] for row in cls.x]  # two classes
        cls.size = (100 + 10 * cls.x @ [1.0, -2.0, 0.5]).round(3)  # a regression

    def demo(self, *args, folder=None, **environment):
        command = [sys.executable, str((folder or self.folder) / "demo.py"), *map(str, args)]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | environment
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=120)

    def demos(self, commands):
        """[status, stdout, stderr] of several runs in one interpreter, where NumPy is imported only once."""
        code = """
            import contextlib, io, json, runpy, sys
            results = []
            for sys.argv in json.load(sys.stdin):
                out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    try:
                        runpy.run_path("demo.py", run_name="__main__")
                    except SystemExit as end:
                        status = end.code
                results.append([status, *(stream.buffer.getvalue().decode() for stream in (out, err))])
            json.dump(results, sys.stdout)
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        commands = json.dumps([["demo.py", *command] for command in commands])
        run = subprocess.run(command, input=commands, cwd=self.folder, capture_output=True, text=True, timeout=120)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        return json.loads(run.stdout)

    def table(self, name, target, header="a,b,c,label", change=None):
        """A CSV file of x and the target; change(text) makes another form of it."""
        rows = [",".join([*map(str, row), str(y)]) for row, y in zip(self.x, target)]
        text = "\n".join(([header] if header else []) + rows) + "\n"
        text = change(text) if change else text
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def last_line(self, *args, pattern=r"test (accuracy: \d+\.\d%|R\^2: -?\d+\.\d{3})", **options):
        """Of a run that must succeed without a word on stderr."""
        run = self.demo(*args, **options)
        self.assertEqual((run.returncode, run.stderr), (0, ""), run.stdout + run.stderr)
        last = run.stdout.splitlines()[-1]
        self.assertRegex(last, f"^{pattern}$", run.stdout)
        return last

    @unittest.skipUnless(shutil.which("dot"), "needs Graphviz")
    def test_two_moons_is_learned_and_drawn(self):
        run = self.demo("--epochs", 40)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        lines = run.stdout.splitlines()
        accuracy = re.fullmatch(r"test accuracy: (\d+\.\d)%", lines[-1])
        self.assertGreater(float(accuracy[1]), 95)
        progress = [line for line in lines if line.startswith("epoch")]
        self.assertEqual([int(line.split()[1].split("/")[0]) for line in progress], list(range(4, 41, 4)))
        for line in progress:
            self.assertRegex(line, r"^epoch +\d+/40  loss \d\.\d{4}  train accuracy: \d+\.\d%  \d+:\d\d left$")
        for name in ("initial_graph.png", "optimized_graph.png", "trained_model.png"):
            picture = (self.folder / "graph" / name).read_bytes()
            self.assertEqual(picture[:8], b"\x89PNG\r\n\x1a\n")
            width, height = struct.unpack(">II", picture[16:24])
            self.assertLessEqual(width, 1200, f"{name} is wider than a page")
            self.assertLessEqual(height, 1000, f"{name} is higher than a page")
        self.assertNotIn("\r", run.stdout)

    def test_seed_decides_everything(self):
        def lines(seed):
            run = self.demo("--epochs", 2, "--seed", seed)
            lines = [line.rsplit("  ", 1)[0] for line in run.stdout.splitlines()]  # without the time left
            return [line for line in lines if " ms" not in line]

        with ThreadPoolExecutor(2) as pool:
            first, second, other = pool.map(lines, (1, 1, 2))
        self.assertEqual(first, second)
        self.assertNotEqual(first, other)

    def test_forms_of_a_table(self):
        forms = {
            "plain.csv": None,
            "semicolon.csv": lambda text: text.replace(",", ";"),
            "tab.csv": lambda text: text.replace(",", "\t"),
            "decimal_comma.csv": lambda text: text.replace(",", ";").replace(".", ","),
            "excel.csv": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
            "blank.csv": lambda text: "\n" + text.replace("\n", "\n\n") + " \n,,,\n\n",
            "quoted.csv": lambda text: re.sub(r"[^,\n]+", r' "\g<0>"', text),
            "names.csv": lambda text: text.replace("a,b,c,label", '"a, ""b"";c",2020,"two\nlines",label'),
            "noend.csv": lambda text: text.rstrip("\n"),
        }
        paths = [self.table(name, self.kind, change=change) for name, change in forms.items()]
        paths.append(self.table("no_header.csv", self.kind, header=""))
        bare = self.table("bare_comma.csv", self.kind, "", lambda text: text.replace(",", ";").replace(".", ","))
        paths.append(bare)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda path: self.last_line(path, "--epochs", 6), paths))
        self.assertRegex(results[0], "test accuracy")
        self.assertEqual(results, results[:1] * len(paths))

    def test_target_and_task(self):
        few = [int(kind == "oak") for kind in self.kind]
        moved = "\n".join(f"{y},{a},{b},{c}" for (a, b, c), y in zip(self.x, self.kind)) + "\n"
        (self.folder / "first.csv").write_text("label,a,b,c\n" + moved, encoding="utf-8")
        (self.folder / "first_bare.csv").write_text(moved, encoding="utf-8")
        cases = [  # (file, arguments, words of the first line), by what the last line must be
            (self.table("text.csv", self.kind), (), "'label': 2 classes, 3 features, 48 rows to train on, 12 to test"),
            (self.folder / "first.csv", ("--target", "label"), "(with a header row), target 'label': 2 classes"),
            (self.folder / "first.csv", ("--target", "1"), "target 'label': 2 classes"),
            (self.folder / "first_bare.csv", ("--target", "-4"), "(no header row), target column 1: 2 classes"),
            (self.table("few.csv", few), (), "2 classes"),
            (self.table("few_float.csv", map(float, few), "1,2,3,label"), (), "(with a header row), target 'label': 2"),
            (self.table("size.csv", self.size), (), "a regression, 3 features"),
            (self.table("many.csv", self.size.round().astype(int)), (), "a regression"),
            (self.table("other.csv", self.kind), ("--target", "label"), "2 classes"),
        ]
        with ThreadPoolExecutor(2) as pool:
            runs = list(pool.map(lambda case: self.demo(case[0], "--epochs", 8, *case[1]), cases))
        for (path, args, words), run in zip(cases, runs):
            with self.subTest(file=path.name, args=args):
                self.assertEqual((run.returncode, run.stderr), (0, ""))
                lines = run.stdout.splitlines()
                self.assertIn(words, lines[0])
                score = float(re.search(r"-?\d+\.\d+", lines[-1])[0])
                self.assertIn("test R^2: " if "regression" in words else "test accuracy: ", lines[-1])
                self.assertGreater(score, 0.8 if "regression" in words else 80, lines[-1])

    def test_awkward_numbers(self):
        def with_constant(text):  # a constant whose mean is not exact, and numbers whose squares are out of range
            rows = [line.split(",") for line in text.splitlines()]
            return "".join(f"0.1,{float(a) * 1e200!r},{float(b) * 1e-200!r},{c},{y}\n" for a, b, c, y in rows)

        path = self.table("awkward.csv", self.size * 1e250, "", with_constant)
        self.assertGreater(float(self.last_line(path, "--epochs", 25, pattern=r"test R\^2: .*").split()[-1]), 0.8)

    def test_numbers_far_apart(self):
        rng = np.random.default_rng(1)
        tables = {  # name: rows whose first number, or target, is unlike the others
            "feature": [f"{1e9 * (i == 0)},{rng.normal():.3f},{rng.normal():.3f}" for i in range(12)],
            "large": [f"{rng.normal():.3f},{1e300 if i == 0 else rng.normal():.3f}" for i in range(40)],
            "infinite": [f"{rng.normal():.3f},{1e300 if i == 0 else i * 1e-300}" for i in range(40)],
            "same": [f"{rng.normal():.3f},{float(i == 0)}.5" for i in range(12)],
        }
        commands = []
        for name, rows in tables.items():
            (self.folder / f"far {name}.csv").write_text("\n".join(rows).replace(".0.5", ".5"))
            commands += [[f"far {name}.csv", "--epochs", "1", "--seed", seed] for seed in "01"]
        said = collections.defaultdict(set)
        for (name, *_), (status, out, err) in zip(commands, self.demos(commands), strict=True):
            out = out.splitlines()
            self.assertEqual(err, "" if status == 0 else err)
            self.assertRegex(
                out[-1] if out else err, r"^test R\^2: (nan|-?[\d.]+)$|the target is the same in all rows to"
            )
            said[name[4:-4]].update([out[-2]] if out and "nan" in out[-1] else [])
        apart = {"R^2 is not defined here: the target has numbers too far apart for double precision."}
        self.assertEqual(said["feature"], set())
        self.assertEqual((said["large"], said["infinite"]), (apart, apart))
        self.assertEqual(said["same"], {"R^2 is not defined here: the target is the same in all test rows."})

    def test_text_of_others_moves_no_cursor(self):
        path = self.table("a\n\x1b[31mb.csv", self.kind)
        results = self.demos([[path.name, "--epochs", "1"], ["no\x1b[2Jthing"], ["--\x1b[2J"]])
        self.assertTrue(results[0][1].startswith("a\\n\\x1b[31mb.csv (with a header row)"))
        for _, out, err in results:
            self.assertNotIn("\x1b", out + err)

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_ctrl_c_during_imports(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(HERE / "demo.py", folder)
            code = "print('here', flush=True)\nimport time\ntime.sleep(60)\n"
            Path(folder, "picograd.py").write_text(code, encoding="utf-8")
            command = [sys.executable, str(Path(folder, "demo.py"))]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                process.stdout.readline()
                process.send_signal(signal.SIGINT)
                self.assertEqual((process.communicate()[1], process.returncode), (b"", -signal.SIGINT))

    def test_errors_are_one_line_with_row_and_column(self):
        text = "a,b,c,label\n" + "".join(f"{i},{i}.5,-{i},{'xy'[i % 2]}\n" for i in range(1, 21))

        def put(row, column, cell, source=text):
            rows = [line.split(",") for line in source.splitlines()]
            rows[row - 1][column - 1] = cell
            return "\n".join(map(",".join, rows)) + "\n"

        numbers = re.sub(r"[xy]\n", "1.5\n", text).replace("1,1.5,-1,1.5", "1,1.5,-1,2.5")
        bare = text.split("\n", 1)[1]
        cases = {  # content of the file (None: there is none), arguments, what the error says
            "missing": (None, [], "No such file|cannot be read"),
            "empty": ("", [], "empty"),
            "blank": ("\n \n\n", [], "empty"),
            "header only": ("a,b,c\n", [], "0 rows below the header, at least 10"),
            "too few": ("\n".join(text.splitlines()[:10]), [], "9 rows below the header, at least 10"),
            "short row": (text.replace("\n3,3.5,-3,y", "\n3,3.5,y"), [], "row 4: 3 cells, but row 1 has 4"),
            "long row": (bare + "1,2,3,x,\n", [], "row 21: 5 cells, but row 1 has 4"),
            "text": (put(5, 2, "high"), ["--strict"], r"row 5, column 2 \('b'\): 'high' is not a finite number"),
            "decimal comma": (
                text.replace(",", ";").replace("3.5", "3,5"),
                ["--strict"],
                "rows 4, 14, column 2 .*'3,5', '13,5' are not finite numbers",
            ),
            "text in first row": (put(1, 2, "12x", bare), ["--strict"], "row 1, column 2: '12x' is not a finite"),
            "gap": (put(7, 1, ""), ["--strict"], r"row 7, column 1 \('a'\): is missing"),
            "gaps": (
                put(8, 1, "?", put(7, 2, "", put(7, 1, "", put(9, 2, "")))),
                ["--strict"],
                r"row 7, column 1 \('a'\): is missing; row 8, column 1 \('a'\): '\?' is not a finite number; "
                r"rows 7, 9, column 2 \('b'\): are missing; without --strict, gaps are filled, and words are inputs$",
            ),
            "gap in first row": (put(1, 3, "", bare), ["--strict"], "row 1, column 3: is missing"),
            "nan": (put(21, 3, "NaN"), ["--strict"], r"row 21, column 3 \('c'\): 'NaN' is not a finite number"),
            "inf": (put(21, 3, "-inf", text.replace("\n", "\n\n")), ["--strict"], "row 21, column 3"),
            "overflow": (put(2, 1, "1e999"), ["--strict"], "row 2, column 1 .*not a finite number"),
            "no label": (put(9, 4, ""), ["--strict"], r"row 9, column 4 \('label'\): is missing"),
            "nan label": (put(9, 4, "nan", numbers), ["--strict"], "row 9, column 4 .*'nan'"),
            "text labels": (
                put(11, 4, "2kg", put(9, 4, "1.5kg", numbers)),
                [],
                r"rows 9, 11, column 4 \('label'\): '1.5kg', '2kg' are not finite numbers, as most of that column are$",
            ),
            "all labels differ": (
                re.sub(r"(\d+),[xy]\n", r"\1,id\1\n", text),
                [],
                "20 different ones are too many.*--target names another column, such as 'a', 'b', 'c'$",
            ),
            "identifier": (
                re.sub(r"(\d+),[xy]\n", r"\1,\1\n", text).replace("label", "row_id"),
                [],
                "'row_id', the last column, is an identifier.*--target names another column, such as 'a', 'b', 'c'$",
            ),
            "no labels": (re.sub("[xy]\n", "\n", text).replace(",\n", ",NA\n"), [], "0 rows .* with a target"),
            "no features": (
                "a,b,label\n" + "".join(f"w{i},,{'xy'[i % 2]}\n" for i in range(40)),
                [],
                "no column is left to predict the target from: 'a': 40 different words.*; 'b': is empty",
            ),
            "ignored target": (text, ["--ignore", "4"], "--ignore: 'label' is the target"),
            "unknown column": (text, ["--ignore", "d"], "--ignore 'd': no such column"),
            "several ragged": (text + "1\n2\n", [], "row 22: 1 cells, row 23: 1 cells, but row 1 has 4"),
            "one class": (text.replace("y\n", "x\n"), [], "target 'label' is 'x' in every row"),
            "one number": (re.sub(r"[xy]\n", "0.5\n", text), [], "target 'label' is '0.5' in every row"),
            "one column": ("label\n" + "x\ny\n" * 10, [], "only one column"),
            "open quote": (put(15, 4, '"x'), [], "row 15: "),
            "latin-1": (put(4, 4, "é").encode("latin-1"), [], "row 4, column 4: not UTF-8"),
            "utf-16": (text.encode("utf-16"), [], "not text in UTF-8"),
            "binary": (b"PK\x03\x04\0\0\0\x01\n", [], "not text in UTF-8"),
            "unknown name": (text, ["--target", "size"], "--target 'size': no such column; .*'a', 'b', 'c', 'label'"),
            "column 5": (text, ["--target", "5"], "--target '5': no such column"),
            "column 0": (text, ["--target", "0"], "--target '0': no such column"),
            "twice": (text.replace("a,b,c", "a,b,b"), ["--target", "b"], "2 columns have that name"),
            "epochs": (text, ["--epochs", "0"], "--epochs must be at least 1, got 0"),
            "no number": (text, ["--epochs", "many"], "--epochs: invalid int value: 'many'"),
            "seed": (text, ["--seed", "-1"], "--seed must be at least 0, got -1"),
            "unknown option": (text, ["--layers", "3"], "--layers"),
        }

        commands = []
        for name, (content, args, _) in cases.items():
            path = self.folder / f"wrong {name}.csv"
            commands.append([str(path), *args])
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        commands += [[str(self.folder)], [""], ["--target", "a"]]
        cases |= {"folder": (0, 0, "directory|denied"), "''": (0, 0, "cannot be read"), "moons": (0, 0, "not given")}
        results = self.demos(commands)
        for (name, (_, _, error)), (status, out, err) in zip(cases.items(), results, strict=True):
            with self.subTest(name):
                self.assertEqual((status, out), (2, ""), err)
                self.assertRegex(err, rf"^demo\.py: error: .*({error}).*\n$")
        run = self.demo(*commands[0])  # and all the same from a shell
        self.assertEqual((run.returncode, run.stdout, run.stderr), tuple(results[0]))

    def test_split_and_standardisation(self):
        import demo

        rng = np.random.default_rng(0)
        y = rng.permutation(np.repeat([0, 1, 2, 3], [2, 50, 1, 147]))
        held = demo.hold_back(y, 4, rng)
        self.assertEqual([int(held[y == k].sum()) for k in range(4)], [1, 10, 0, 29])
        self.assertEqual(int(demo.hold_back(rng.normal(size=200), 0, rng).sum()), 40)
        x = np.column_stack([rng.normal(5, 3, 200), np.full(200, 0.1)])
        x[held] += 100
        z = demo.standardise(x, held)
        np.testing.assert_allclose(z[~held].mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(z[~held].std(0), [1, 0], atol=1e-12)
        self.assertGreater(z[held, 0].min(), 10)
        self.assertFalse(z[:, 1].any())

    def test_what_is_decided_about_columns(self):
        import demo

        days = [datetime.date(2023, 12, 1) + datetime.timedelta(i) for i in range(60)]
        columns = {
            "Nr": range(1, 61),
            "Name": [f"Frau {i}" for i in range(60)],
            "Ort": ["Ulm; Donau", "Köln", "\n Bonn"] * 20,
            "Alter": ["k.A.", *range(20, 79)],
            "Lohn": [f"{i + 1}.{i:03},5{i % 10} €" for i in range(60)],
            "Anteil": ["?", *[f"{i}%" for i in range(59)]],
            "Weg": [f"{i} km" for i in range(60)],
            "Seit": [f"{day:%d.%m.%Y}" for day in days],
            "Wert": [-999] * 3 + list(range(57)),
            "Art": ["A"] * 60,
            "leer": [""] * 60,
            "raus": range(60),
            "Ziel": ["n/a", "", *range(58)],
        }
        cells = [columns, *zip(*columns.values())]
        quoted = [";".join(f'"{cell}"' for cell in row) for row in cells]
        path = self.folder / "people.csv"
        path.write_bytes((";;\r\n".join(quoted) + ";;\r\n" + ";" * 14).encode("utf-8-sig"))
        gap = "1 gap, filled with the mean of the rows trained on, and marked by an input"
        title, (ort, alter, lohn, anteil, weg, tag, monat, wert), y, classes, notes = demo.read_table(
            str(path), None, ["raus"]
        )
        self.assertEqual(
            (title, classes, notes),
            (
                "people.csv (with a header row), target 'Ziel'",
                0,
                [
                    "numbers have decimal commas",
                    "'raus': ignored",
                    "'Ziel': 2 rows without a target left out",
                    "'Nr': different whole numbers under such a name are an identifier: left out",
                    "'Name': 58 different words in 58 rows: left out",
                    "'Ort': 3 words, an input for each",
                    "'Weg': numbers of km",
                    "'Seit': dates, as the day, a number, and an input for each month",
                    "'Wert': -999, which is far from all other numbers, is taken for a gap; " + gap,
                    "'Art': is 'A' in every row: left out",
                    "'leer': is empty: left out",
                ],
            ),
        )
        np.testing.assert_array_equal(y, range(58))
        np.testing.assert_array_equal(alter, range(21, 79))
        np.testing.assert_array_equal(anteil, range(1, 59))
        np.testing.assert_array_equal(weg, range(2, 60))
        np.testing.assert_array_equal(np.diff(tag), 1)
        self.assertEqual((list(monat[[0, -1]]), ort[0], lohn[0]), (["12", "1"], "Bonn", 3002.52))
        self.assertEqual(len(demo.read_table(str(path), "Ort")[1]), 9)  # codes and gaps are in the rows now
        notes = demo.read_table(str(path), "Ort", ["Ziel"])[-1]
        self.assertIn(f"'Alter': 'k.A.' among numbers: taken for gaps; {gap}", notes)
        self.assertIn(f"'Anteil': {gap}", notes)
        self.assertIn("'Wert': -999, which is far from all other numbers, is taken for a gap; 3 gaps" + gap[5:], notes)

    def test_forms_of_numbers(self):
        import demo

        for text, point, comma in (
            ("-1.5", -1.5, -1.5),
            ("1,5", None, 1.5),
            ("1,234", 1234, 1.234),
            ("1,234.5", 1234.5, None),
            ("1.234.567,8", None, 1234567.8),
            ("1'234", 1234, 1234),
            ("1 234,5 kr", None, None),
            ("$ 1,234.50", 1234.5, None),
            ("-12,5 %", None, -12.5),
            ("€-3", -3, -3),
            ("2e-3", 0.002, 0.002),
            ("1_000", None, None),
            ("1e999", None, None),
            ("inf", None, None),
            ("12x", None, None),
            ("", None, None),
        ):
            with self.subTest(text):
                self.assertEqual((demo.number(text, demo.POINT), demo.number(text, demo.COMMA)), (point, comma))

    def test_headers(self):
        import demo

        words = [["sun", "yes"], ["rain", "no"], ["sun", "no"], ["rain", "yes"]]
        numbers = [["1", "a", "2"], ["3", "b", ""], ["5", "a", "7"]]
        for rows, header in (
            (words, False),
            ([["sky", "play"], *words], True),
            (numbers, False),
            ([["", "what", "size"], *numbers], True),
            ([["x", "a", ""], *numbers], True),
            ([["?", "c", "4"], *numbers], False),
            ([["2020", "what", "2021"], *numbers], False),
            ([["2020", "what", "sum"], *numbers], True),
        ):
            with self.subTest(rows=rows):
                self.assertEqual(demo.is_header(list(enumerate(rows)), demo.POINT), header)

    def test_what_the_network_sees(self):
        import demo

        held = np.array([False] * 4 + [True] * 2)
        words = np.array(["b", "a", "a", "", "c", "b"], object)
        numbers = np.array([1.0, 3.0, math.nan, math.nan, 5.0, math.nan])
        np.testing.assert_allclose(
            demo.inputs([words, numbers, np.array([math.nan, *range(5)])], held)[:, :4],
            [[0, 1, -1, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 3, 0], [0, 1, 0, 1]],
        )

    def test_a_table_of_words_and_gaps(self):
        rows = [
            f"{i},{a},{'' if i % 7 else 'NA'},{kind},{a + b > 0}"
            for i, ((a, b, _), kind) in enumerate(zip(self.x, self.kind))
        ]
        path = self.folder / "words.csv"
        path.write_text("id,a,b,kind,large\n" + "\n".join(rows) + "\n", encoding="utf-8")
        run = self.demo(path, "--epochs", 30)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertIn("'large': 2 classes, 3 features", run.stdout)
        self.assertIn("\n  'kind': 2 words, an input for each\n", run.stdout)
        self.assertRegex(run.stdout, r"\nweight decay (0\.1|0\.3|1\.0): of 0\.1, 0\.3, 1\.0 the best")
        self.assertRegex(run.stdout, r"test accuracy: (9\d|100)\.\d%\n$")
        if shutil.which("dot"):
            self.assertRegex(run.stdout, "Drawn: graph/words/initial_graph.png, .*, graph/words/trained_model.png")
            pictures = ["initial_graph.png", "optimized_graph.png", "trained_model.png"]
            self.assertEqual(sorted(os.listdir(self.folder / "graph" / "words")), pictures)

    def test_pictures_that_cannot_be_drawn(self):
        def without_package(folder):
            (folder / "graphviz.py").write_text("raise ImportError('no graphviz')", encoding="utf-8")

        def without_folder(folder):
            (folder / "graph").write_text("in the way", encoding="utf-8")

        empty = tempfile.TemporaryDirectory()
        self.addCleanup(empty.cleanup)
        cases = [
            (lambda folder: None, {"PATH": empty.name}, "`dot`.* was not found"),
            (without_package, {}, "pip install graphviz"),
            (without_folder, {}, "graph"),
        ]
        for prepare, environment, reason in cases:
            with self.subTest(reason), tempfile.TemporaryDirectory() as folder:
                for name in ("demo.py", "picograd.py"):
                    shutil.copy(self.folder / name, folder)
                prepare(Path(folder))
                before = sorted(os.listdir(folder))
                run = self.demo("--epochs", 1, folder=Path(folder), **environment)
                self.assertEqual((run.returncode, run.stderr), (0, ""))
                self.assertEqual(sorted(set(os.listdir(folder)) - {"__pycache__"}), before)
                said = [line for line in run.stdout.splitlines() if "Not drawn" in line]
                self.assertEqual(len(said), 1, run.stdout)
                self.assertRegex(said[0], rf"^Not drawn: (graph/\w+_\w+.png, ){{2}}graph/trained_model.png: .*{reason}")
                self.assertRegex(run.stdout.splitlines()[-1], r"^test accuracy: \d+\.\d%$")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs a shell and /dev/full")
    def test_an_output_that_cannot_be_written_causes_no_traceback(self):
        def run(case):
            redirection, environment = case
            command = f'"{sys.executable}" "{self.folder / "demo.py"}" --epochs 1 {redirection}'
            environment = os.environ | environment
            return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)

        cases = {  # redirection: exit code, standard error
            "| head -n 1; exit ${PIPESTATUS[0]}": ("141|0", ""),  # 0 if all was written before head ended
            ">&-": ("0", ""),
            ">&- 2>&-": ("0", ""),
            ">/dev/full": ("1", "demo.py: error: No space left on device\n"),
            ">/dev/full 2>/dev/full": ("1|120", ""),  # 120 is Python's own, where it cannot flush
        }
        runs = [(redirection, {"PYTHONUNBUFFERED": mode}) for redirection in cases for mode in ("", "1")]
        with ThreadPoolExecutor(2) as pool:
            for (redirection, mode), result in zip(runs, pool.map(run, runs)):
                with self.subTest(redirection, **mode):
                    self.assertRegex(str(result.returncode), f"^({cases[redirection][0]})$")
                    self.assertEqual(result.stderr, cases[redirection][1])

    @unittest.skipUnless(os.name == "posix", "needs a pseudo-terminal")
    def test_progress_on_a_terminal_and_ctrl_c(self):
        import pty

        pictures = self.folder / "graph"
        shutil.rmtree(pictures, ignore_errors=True)
        ours, theirs = pty.openpty()
        command = [sys.executable, str(self.folder / "demo.py"), "--epochs", "100000"]
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL) as process:
            self.addCleanup(os.close, ours)
            os.close(theirs)
            output = b""
            while output.count(b"epoch") < 3 and (block := self.read(ours)):
                output += block
            process.send_signal(signal.SIGINT)
            while block := self.read(ours):
                output += block
        lines = output.decode().replace("\r\n", "\n").splitlines()
        self.assertEqual(process.returncode, 130, output)
        progress = [line for line in lines if line.startswith("epoch")]  # splitlines() also splits at \r
        self.assertGreaterEqual(len(progress), 3)
        self.assertEqual(output.count(b"\r\n") + len(progress), output.count(b"\r"), "one line, rewritten")
        self.assertRegex(lines[-1], r"^test accuracy: \d+\.\d%$")
        self.assertTrue(any(re.match(r"Interrupted: \d+ of 100000 epochs", line) for line in lines), lines)
        if shutil.which("dot"):
            self.assertEqual(
                sorted(os.listdir(pictures)), ["initial_graph.png", "optimized_graph.png", "trained_model.png"]
            )

    @unittest.skipUnless(distributed, f"needs dask[distributed], see .ci/requirements.txt: {no_dask}")
    @unittest.skipUnless(os.name == "posix", "needs a group of processes")
    def test_training_on_a_dask_cluster_and_ctrl_c(self):
        self.last_line("--dask", "--epochs", 2, pattern=r"test accuracy: \d+\.\d%")
        command = [sys.executable, "-u", str(self.folder / "demo.py"), "--dask", "--epochs", "1000"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        with subprocess.Popen(command, **pipe, start_new_session=True) as process:
            kill = threading.Timer(60, process.kill)
            kill.start()
            line = process.stdout.readline()
            while line and "Dask cluster" not in line:
                line = process.stdout.readline()
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
            lines = process.stdout.read().splitlines()
            kill.cancel()
        self.assertEqual(process.returncode, 130, lines)
        self.assertRegex(lines[0], r"^Interrupted: \d+ of 1000 epochs")
        self.assertRegex(lines[-1], r"^test accuracy: \d+\.\d%$")

    @staticmethod
    def read(terminal):
        try:
            return os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side has closed
            return b""


class Results(unittest.TextTestResult):
    """Counts the tests that passed, too."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def main(module="__main__"):
    """Run the tests as the command line says, close with a summary, and return the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
    print(f"seed {SEED} (PICOGRAD_TEST_SEED={SEED} repeats the random tests)")
    outcome = unittest.main(module, exit=False, testRunner=unittest.TextTestRunner(resultclass=Results)).result
    failed = len(outcome.failures) + len(outcome.errors) + len(outcome.unexpectedSuccesses)
    sys.stdout.flush()
    print(f"{outcome.passed} passed, {failed} failed, {len(outcome.skipped)} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
