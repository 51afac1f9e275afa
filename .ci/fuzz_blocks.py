#!/usr/bin/env python3
"""Random programs on distributed Tensors and Values, held against plain NumPy after every step.

A program is a list of Python statements. The same text runs in two worlds, statement by statement: once with picograd,
whose arrays may wait, and once with `Plain`, a NumPy array that computes at once and knows picograd's dtype contract.
Whatever a statement prints, raises or leaves behind must be the same in both. Comparing is itself a way to look, so it
happens only where the program says `print` or `look()`, and at the end; there every array that can be written to is
written to as well, to see who sees it.

    python .ci/fuzz_blocks.py SECONDS [--seed N] [--programs N] [--path OTHER_picograd.py] [--processes]

As a room of a driver: `generate(rng)` makes a program, `check(program)` says how it fails, and `PREAMBLE` makes it one
that can be pasted.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import functools
import importlib.util
import operator
import os
import pathlib
import random
import re
import signal
import sys
import threading
import time
import types
import warnings

import numpy as np

_arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
_arguments.add_argument("seconds", type=float)
_arguments.add_argument("--seed", type=int, help="of the first program; by default the time")
_arguments.add_argument("--programs", type=int, default=sys.maxsize, help="stop after so many")
_arguments.add_argument("--path", help="another picograd.py to judge")
_arguments.add_argument("--processes", action="store_true", help="every program in worker processes")
_arguments.add_argument("--keep-going", action="store_true", help="show the first failure of each kind, not one only")
_options = _arguments.parse_args() if __name__ == "__main__" else None

_path = pathlib.Path(_options.path if _options and _options.path else pathlib.Path(__file__).parents[1] / "picograd.py")
if "picograd" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("picograd", _path)
    sys.modules["picograd"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["picograd"])
import picograd  # noqa: E402

IMPORTS = """\
import contextlib, copy, gc, itertools, pickle, sys, types, warnings, weakref
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view
import picograd
from picograd import Tensor, Value, distributed_config, no_grad, primitive, set_distributed_config
"""

# What programs may use beside NumPy and picograd: it runs in both worlds.
HELPERS = '''\
warnings.simplefilter("ignore")
set_distributed_config(enabled=True, min_elements_for_parallel=1, num_workers=2, use_processes=False)
picograd._BLOCK_BYTES = 128
cell = {}  # what user primitives read beside their operands


def data(seed, shape, dtype=np.float64, odd=False):
    """Multiples of a quarter, whose sums are exact in any order; if odd, also zeros, infinities and nan."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-16, 17, shape) / 4
    if odd:
        x = np.where(rng.random(shape) < 0.15, rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan], shape), x)
    return np.asarray(x > 0 if dtype is bool else x if np.dtype(dtype).kind == "f" else np.floor(x)).astype(dtype)


def look():
    for name in sorted(name for name in globals() if len(name) == 1):
        print(name, getattr(globals()[name], "data", globals()[name]))


def fail(x):
    raise ArithmeticError("as it should")


def interrupted(action, after):
    """Does what only looks, and interrupts it like Ctrl-C at the `after`-th function of picograd's that it calls."""
    count = itertools.count(1)

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename == picograd.__file__ and code.co_name != "take_back":
            if next(count) == after:
                sys.setprofile(None)
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        sys.setprofile(profile)
        try:
            action()
        finally:
            sys.setprofile(None)


same = primitive(lambda x: x, lambda g, out, x: g, name="same", elementwise=True)
whole = primitive(lambda x: x, lambda g, out, x: g, name="whole")
turned = primitive(lambda x: x[::-1], lambda g, out, x: g[::-1], name="turned")
within = primitive(lambda x: np.asarray(Tensor(x) * 2 - 1), lambda g, out, x: 2 * g, name="within", elementwise=True)
beside = primitive(lambda x: x + cell["t"].max().astype(x.dtype).item(), lambda g, out, x: g, name="beside")
failing = primitive(fail, lambda g, out, x: g, name="failing", elementwise=True)
'''
PREAMBLE = IMPORTS + HELPERS


class Skip(str):
    """Why a program is set aside."""


class Hang(BaseException):
    """No statement of a program takes that long; not an Exception, so that no program catches it."""


# ---------------------------------------------------------------------------------------------------------------------
# Plain: what Tensors and Values are held against
# ---------------------------------------------------------------------------------------------------------------------


def _raw(x):
    return x.raw if isinstance(x, Plain) else x


def _settled(x):
    return x[()] if isinstance(x, np.ndarray) and not x.ndim else x


def _each(f, x):
    """f of x, or of what is in it."""
    if type(x) in (list, tuple):
        return type(x)([_each(f, item) for item in x])
    return f(x)


def _flat(x):
    return [y for item in x for y in _flat(item)] if isinstance(x, (list, tuple)) else [x]


# These take the dtype of none: what they are given beside the array is no operand of arithmetic.
_NO_CONTRACT = {np.take, np.take_along_axis, np.copyto, np.put, np.ndarray.astype, np.ndarray.__getitem__}


def _operands(args):
    """By the contract: integers, masks and raw arrays take the dtype of strong floating Tensors and Values."""
    floats = {x.raw.dtype for x in _flat(args) if isinstance(x, Plain) and hasattr(x.raw, "dtype")}
    floats = [dtype for dtype in floats if dtype.kind == "f"]
    dtype = np.result_type(*floats) if floats else None

    def operand(x):
        if isinstance(x, Plain):
            weak, x = type(x.raw) is float, x.raw
            return x if weak or dtype is None or x.dtype.kind == "f" else x.astype(dtype)
        if isinstance(x, np.generic):
            return x.item()
        return x.astype(dtype, copy=False) if isinstance(x, np.ndarray) and dtype is not None else x

    return _each(operand, args)


def _compute(function, args, kwargs=None, contract=True):
    """Calls a function of NumPy on the arrays of Plains; arrays that come out are Plains again."""
    kwargs = kwargs or {}
    everything = _flat([args, *kwargs.values()])
    kind = PlainValue if any(isinstance(x, PlainValue) for x in everything) else Plain
    if kind is PlainValue and "out" in kwargs:
        raise TypeError("a Value is not written to")
    contract = contract and "out" not in kwargs and function not in _NO_CONTRACT
    raw = _operands(args) if contract else _each(_raw, args)
    if all(type(_raw(x)) in (float, int, bool) for x in _flat(args)):  # weak numbers alone give a weak number
        number = {float: np.float64, bool: np.bool_}
        raw, weak = _each(lambda x: number.get(type(x), lambda x: x)(x), raw), True
    else:
        weak = False
    if weak and any(type(_raw(x)) is bool for x in _flat(args)):
        raise TypeError("not drawn: what becomes of masks of weak numbers is for another room")
    out = function(*raw, **{name: _each(_raw, x) for name, x in kwargs.items()})
    if kwargs.get("out") is not None:
        return kwargs["out"][0] if isinstance(kwargs["out"], tuple) else kwargs["out"]
    made = (function, args, kwargs) if kind is PlainValue else None

    def wrapped(x):
        if not isinstance(x, (np.ndarray, np.generic)) or x.dtype.kind not in "fiub":
            return x
        x = _settled(x)
        if weak and isinstance(x, np.integer):
            raise TypeError("not drawn: integers of weak numbers")
        if weak and isinstance(x, (np.floating, np.bool_)):
            x = x.item()
        return kind.around(x, made)

    return _each(wrapped, out)


class Plain:
    """A Tensor that computes at once. `raw` is a Python float, which is weak, or NumPy's scalar or array."""

    def __init__(self, data, dtype=None, distributed=None):
        if isinstance(data, Plain):
            data, dtype = data.raw, dtype or getattr(data.raw, "dtype", None)
        number = isinstance(data, (int, float, np.generic)) and dtype is None
        self.raw = float(data) if number else _settled(np.array(data, dtype or np.float32))
        self.owner = self.made = None

    @classmethod
    def around(cls, raw, made=None, owner=None):
        new = cls.__new__(cls)
        new.raw, new.made, new.owner = raw, made, owner
        return new

    shape = property(lambda self: np.shape(self.raw))
    ndim = property(lambda self: np.ndim(self.raw))
    size = property(lambda self: np.size(self.raw))
    dtype = property(lambda self: np.asarray(self.raw).dtype)
    T = property(lambda self: _compute(np.transpose, (self,)))

    @property
    def data(self):
        return np.asarray(self.raw)[()] if type(self.raw) in (float, bool) else self.raw

    @data.setter
    def data(self, new):
        if _raw(new) is not self.raw:
            self.raw = self.conformed(new)
            if self.owner:
                setattr(*self.owner, self.raw)

    def conformed(self, new):
        """A copy, of this dtype, and of this shape if it is a number."""
        if type(self.raw) is float:
            return float(_raw(new))
        new = _settled(np.array(_raw(new), self.dtype))
        return new if np.ndim(new) or not self.ndim else np.full(self.shape, new)

    def numpy(self):
        return np.array(self.raw)

    def item(self):
        return np.asarray(self.raw).item()

    def tolist(self):
        return np.asarray(self.raw).tolist()

    def reshape(self, *shape):
        return _compute(np.reshape, (self, shape[0] if len(shape) == 1 else shape))

    def astype(self, dtype):
        return _compute(np.ndarray.astype, (self, dtype))

    def relu(self):
        return _compute(np.maximum, (self, 0))

    def enable_distributed(self):
        pass

    disable_distributed = enable_distributed

    def __getattr__(self, name):
        if name.startswith("_") or not hasattr(np, name):
            raise AttributeError(name)
        return lambda *args, **kwargs: _compute(getattr(np, name), (self, *args), kwargs)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.raw, dtype) if copy else np.asarray(self.raw, dtype)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        call = method == "__call__"
        return _compute(ufunc if call else getattr(ufunc, method), inputs, kwargs, call)

    def __array_function__(self, function, kinds, args, kwargs):
        return _compute(function, args, kwargs)

    def __getitem__(self, index):
        return _compute(np.ndarray.__getitem__, (self, index))

    def __setitem__(self, index, new):
        self.raw[_each(_raw, index)] = _raw(new)

    def __len__(self):
        return len(self.raw)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self.raw)

    def __float__(self):
        return float(self.item())

    def __copy__(self):
        return type(self)(self)


def _plain_operators():
    """Operators of Plain, by NumPy's functions; in place, nothing is written before the whole result is there."""

    def in_place(self, other, ufunc):
        out = _compute(ufunc, (self, other))
        if isinstance(out, PlainValue) or (not self.ndim and not out.ndim):
            return out
        if self.shape != out.shape:
            raise ValueError("in place, the shape stays")
        np.copyto(self.raw, out.raw, casting="same_kind")
        return self

    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "pow": np.power}
    functions |= {"floordiv": np.floor_divide, "mod": np.remainder, "matmul": np.matmul}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    for name, ufunc in functions.items():
        setattr(Plain, f"__{name}__", lambda self, other, f=ufunc: _compute(f, (self, other)))
        setattr(Plain, f"__r{name}__", lambda self, other, f=ufunc: _compute(f, (other, self)))
        setattr(Plain, f"__i{name}__", functools.partialmethod(in_place, ufunc=ufunc))
    functions = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    for name, ufunc in (functions | {"eq": np.equal, "ne": np.not_equal}).items():
        setattr(Plain, f"__{name}__", lambda self, other, f=ufunc: _compute(f, (self, other)))
    for name, ufunc in {"neg": np.negative, "abs": np.absolute, "invert": np.invert, "pos": np.positive}.items():
        setattr(Plain, f"__{name}__", lambda self, f=ufunc: _compute(f, (self,)))


_plain_operators()
Plain.__hash__ = object.__hash__


def _spread(g, x, axis=None, keepdims=False):
    return np.broadcast_to(g if keepdims or axis is None else np.expand_dims(g, axis), np.shape(x))


def _placed(g, x, index):
    out = np.zeros(np.shape(x), g.dtype)
    np.add.at(out, index, g)
    return out


# The gradient by each operand, of what random programs differentiate; enough to know leaves' gradients without picograd.
_RULES = {
    np.add: (lambda g, x, y: g, lambda g, x, y: g),
    np.subtract: (lambda g, x, y: g, lambda g, x, y: -g),
    np.multiply: (lambda g, x, y: g * y, lambda g, x, y: g * x),
    np.negative: (lambda g, x: -g,),
    np.square: (lambda g, x: 2 * g * x,),
    np.tanh: (lambda g, x: g * (1 - np.tanh(x) ** 2),),
    np.sin: (lambda g, x: g * np.cos(x),),
    np.sum: (_spread,),
    np.mean: (lambda g, x, **axes: _spread(g * (np.size(np.mean(x, **axes)) / np.size(x)), x, **axes),),
    np.reshape: (lambda g, x, shape: np.reshape(g, np.shape(x)), None),
    np.transpose: (lambda g, x: np.transpose(g),),
    np.ndarray.__getitem__: (_placed, None),
}


class PlainValue(Plain):
    """A Value that computes at once, with gradients for what is in `_RULES`."""

    slope, needs = None, True

    @property
    def data(self):
        return Plain.around(self.raw, None, (self, "raw"))

    @data.setter
    def data(self, new):
        if _raw(new) is not self.raw:
            self.raw = self.conformed(new)

    @property
    def grad(self):
        if self.slope is None:
            self.slope = np.zeros_like(self.raw)[()]
        return Plain.around(self.slope, None, (self, "slope"))

    @grad.setter
    def grad(self, new):
        if _raw(new) is not self.slope:
            self.slope = self.conformed(0 if new is None else new)

    def astype(self, dtype):
        if np.dtype(dtype).kind != "f":
            raise TypeError("a Value is floating")
        return super().astype(dtype)

    def detach(self):
        out = PlainValue.around(self.raw)
        out.needs = False
        return out

    def __setitem__(self, index, new):
        raise TypeError("a Value is not written to")

    def __copy__(self):
        new = PlainValue(self)
        new.slope, new.made, new.needs = copy.copy(self.slope), self.made, self.needs
        return new

    def backward(self, retain_grads=True):
        order, seen = [], set()

        def visit(x):
            if id(x) not in seen:
                seen.add(id(x))
                for y in _flat(x.made[1]) if x.made else ():
                    if isinstance(y, PlainValue):
                        visit(y)
                order.append(x)

        visit(self)
        grads = {id(self): np.ones(self.shape)}
        for x in reversed(order):
            g = grads.get(id(x))
            if x.made is None and x.needs:
                x.slope = x.conformed(g + (0 if x.slope is None else x.slope))
            if x.made is None:
                continue
            function, args, params = x.made
            for y, rule in zip(args, _RULES[function]):
                if isinstance(y, PlainValue):
                    h = np.asarray(rule(g, *_each(_raw, args), **params))
                    h = h.sum(tuple(range(h.ndim - y.ndim)))
                    h = h.sum(tuple(i for i, n in enumerate(y.shape) if n == 1 != h.shape[i]), keepdims=True)
                    grads[id(y)] = grads[id(y)] + h if id(y) in grads else h


# ---------------------------------------------------------------------------------------------------------------------
# The two worlds, and what differs between them
# ---------------------------------------------------------------------------------------------------------------------


def _nothing(*args, **kwargs):
    return contextlib.nullcontext()


def _plain_primitive(forward, *vjps, **options):
    def call(*args):
        plain = not any(isinstance(x, Plain) for x in args)
        return forward(*args) if plain else _compute(forward, args)

    return call


@functools.cache
def _base(plain: bool) -> dict:
    """The names that programs start from."""
    world: dict = {"__name__": "__fuzz__"}
    exec(IMPORTS, world)
    if plain:
        world |= {"picograd": types.SimpleNamespace(__file__=None), "Tensor": Plain, "Value": PlainValue}
        world |= {"set_distributed_config": _nothing, "distributed_config": _nothing, "no_grad": _nothing}
        world["primitive"] = _plain_primitive
    exec(HELPERS, world)
    return world


def _world(plain: bool) -> dict:
    world = dict(_base(plain))
    world["cell"].clear()
    world["printed"] = printed = []
    world["print"] = lambda *args: printed.append(_each(_copied, args))
    world["look"] = lambda: printed.append("look")
    return world


def _copied(x):
    """What x is now, as a copy; without handing out the array of a Tensor."""
    if isinstance(x, (picograd.Value, PlainValue)):
        x = x.data
    if isinstance(x, (picograd.Tensor, Plain)):
        return x.numpy()
    if isinstance(x, dict):
        return {name: _copied(y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [_copied(y) for y in x]
    if isinstance(x, (np.ndarray, np.generic, memoryview)):
        return np.array(x)
    return x if isinstance(x, (int, float, str)) else None


def _gradient(x):
    """The gradient of a leaf that has one."""
    return x.slope is not None and x.made is None if isinstance(x, PlainValue) else False


_EXACT = set(
    """negative absolute square sqrt floor ceil rint trunc sign signbit isnan isinf isfinite logical_not invert positive
    reciprocal add subtract multiply divide maximum minimum fmax fmin equal not_equal less less_equal greater
    greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor floor_divide remainder""".split()
)
_CUTS = {"floor_divide", "remainder", "floor", "ceil", "rint", "trunc", "sign", "signbit"}  # of what is known roughly
_DOMAINS = {"log": "np.abs({}) + 0.5", "log2": "np.abs({}) + 0.5", "log10": "np.abs({}) + 0.5"}
_DOMAINS |= {"arccosh": "np.abs({}) + 1.5", "sqrt": "np.abs({}) + 0.5", "reciprocal": "np.abs({}) + 0.5"}
_DOMAINS |= {name: "np.tanh({}) * 0.5" for name in ("arcsin", "arccos", "arctanh", "tan", "log1p", "exp", "sinh")}
_DOMAINS |= {name: "np.tanh({})" for name in ("exp2", "expm1", "cosh", "sinc")}


def _ufuncs(operands: int) -> list[str]:
    """The element-wise ufuncs of picograd's table: a new one takes part by being there."""
    found = [key for key, prim in picograd.TABLE.items() if getattr(prim, "elementwise", False)]
    return sorted({key.__name__ for key in found if isinstance(key, np.ufunc) and key.nin == operands})


_TRANSCENDENTAL = {*_ufuncs(1), *_ufuncs(2)} - _EXACT
_ROUGH = _TRANSCENDENTAL | set("sum mean var std prod cumsum cumprod matmul dot einsum trace norm ** @ backward".split())


def _rough(text: str) -> bool:
    """Whether a statement's results depend on the order or the way of computing, in their last digits."""
    return not _ROUGH.isdisjoint(re.findall(r"[a-z_]\w*|\*\*|@", text))


class _Difference(Exception):
    pass


def _compare(name, ours, theirs, slack, scale):
    """Raises _Difference if ours is not theirs; slack: how many units in the last place of `scale` it may be off."""
    if isinstance(theirs, (list, dict)):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            raise _Difference(f"{name}: {ours!r}, where NumPy has {theirs!r}")
        for key in theirs if isinstance(theirs, dict) else range(len(theirs)):
            _compare(f"{name}[{key!r}]", ours[key], theirs[key], slack, scale)
        return
    if isinstance(theirs, str) or theirs is None:
        return
    x, y = np.asarray(ours), np.asarray(theirs)
    if x.dtype != y.dtype or x.shape != y.shape:
        raise _Difference(f"{name}: {x.dtype}{x.shape}, where NumPy has {y.dtype}{y.shape}")
    with np.errstate(all="ignore"):
        good = (x == y) | ((x != x) & (y != y))
        if slack and not good.all():
            good |= np.abs(x.astype(float) - y.astype(float)) <= slack * (np.abs(y) + scale)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise _Difference(f"{name}: {np.sum(~good)} of {x.size} differ, at {at} {x[at]}, where NumPy has {y[at]}")


def _variables(world):
    return sorted(name for name in world if len(name) == 1)


def _states(ours, theirs, slack):
    """Compares all variables, in alphabetical order, which is none of computation."""
    for name in _variables(theirs):
        x, y = ours[name], theirs[name]
        then = _copied(y)
        scale = max([1.0] + [_magnitude(z) for z in _flat(then)]) if slack else 0.0
        _compare(name, _copied(x), then, slack, scale)
        if _gradient(y):
            _compare(f"{name}.grad", _copied(x.grad), _copied(y.grad), slack, 100.0)


def _magnitude(x) -> float:
    """The largest finite number in x, by size."""
    if not isinstance(x, (np.ndarray, float, int)) or not np.size(x):
        return 0.0
    x = np.abs(np.asarray(x, float))
    return float(np.max(x, where=np.isfinite(x), initial=0.0))


def _array(x):
    """What writes to x go to: the array handed out by a Tensor or Value, or an array."""
    if isinstance(x, (picograd.Value, PlainValue)):
        x = x.data
    return x.data if isinstance(x, (picograd.Tensor, Plain)) else x


def _audit(ours, theirs, slack):
    """Writes to every array, and looks who sees it: the same as in NumPy."""
    for mark, name in enumerate(_variables(theirs), 3):
        y = _array(theirs[name])
        if not isinstance(y, np.ndarray) or not y.flags.writeable or not y.size:
            continue
        y[...] = mark if y.dtype != bool else ~y
        x = _array(ours[name])
        try:
            x[...] = mark if y.dtype != bool else ~x
        except (TypeError, ValueError) as error:
            raise _Difference(f"writing to {name} at the end: {error}") from None
        try:
            _states(ours, theirs, slack)
        except _Difference as difference:
            raise _Difference(f"after writing to {name}, an array, at the end: {difference}") from None


@functools.lru_cache(4096)
def _compiled(statement):
    return compile(statement, "<program>", "exec")


def _run(statement, world):
    """Runs a statement; the exception that it ends with."""
    try:
        exec(_compiled(statement), world)
    except Exception as error:
        return error.with_traceback(None)


def _check(program: list[str]):
    ours, theirs = _world(False), _world(True)
    slack = 0.0
    eps = 1e-3 if "float16" in "".join(program) else 2.4e-7
    for number, statement in enumerate(program, 1):
        place = f"statement {number}, `{statement}`"
        rough = _rough(statement)
        if rough and "print" not in statement:
            slack = 64 * eps
        expected, error = _run(statement, theirs), _run(statement, ours)
        if isinstance(expected, NameError) or isinstance(error, NameError):
            return None
        if expected is not None and error is not None:
            return Skip("a statement fails in NumPy, too")
        if error is not None:
            return f"{place}: {type(error).__name__}: {error}"
        if expected is not None:
            return f"{place}: no error, where NumPy has {type(expected).__name__}: {expected}"
        try:
            x, y = ours["printed"], theirs["printed"]
            here = 64 * eps if rough else slack
            _compare("printed", list(x), list(y), here, max([1.0] + [_magnitude(z) for z in _flat(y)]))
            if "look" in x:
                _states(ours, theirs, slack)
            x.clear()
            y.clear()
        except _Difference as difference:
            return f"{place}: {difference}"
    try:
        _states(ours, theirs, slack)
        _audit(ours, theirs, slack)
    except _Difference as difference:
        return f"at the end: {difference}"


_TIMEOUT = 20  # seconds; a program takes milliseconds


@contextlib.contextmanager
def _deadline():
    """Raises Hang in the main thread where there are signals; waiting for locks ends with it, too."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _TIMEOUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(program: list[str]):
    """None if picograd does what NumPy does, a Skip if that cannot be said, else how it differs."""
    block_bytes = picograd._BLOCK_BYTES
    with warnings.catch_warnings(), np.errstate(all="warn"), picograd.distributed_config():
        warnings.simplefilter("ignore")
        processes = bool(_options and _options.processes)
        picograd.set_distributed_config(enabled=True, min_elements_for_parallel=1, num_workers=2)
        picograd.set_distributed_config(use_processes=processes)
        picograd._BLOCK_BYTES = 128
        try:
            with _deadline():
                return _check(program)
        except Hang:
            return f"hangs: no end after {_TIMEOUT} s"
        finally:
            picograd._BLOCK_BYTES = block_bytes
            sys.setprofile(None)


# ---------------------------------------------------------------------------------------------------------------------
# Making programs: a statement is drawn, tried in the plain world, and kept if it works there
# ---------------------------------------------------------------------------------------------------------------------

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MOVES: list = []  # (weight, method that draws a statement)


def _move(weight):
    def enter(method):
        _MOVES.append((weight, method))
        return method

    return enter


class _Writer:
    """Writes one program. Exact programs take what is the same in any order, bit for bit; rough ones the rest."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.chance = lambda p: self.random.random() < p
        self.pick = self.random.choice
        self.world, self.program = _world(True), []
        self.rough = self.chance(0.4)
        self.mixed = self.chance(0.15)  # several dtypes
        self.odd = not self.rough and self.chance(0.3)
        self.kind = self.pick(["Tensor", "Tensor", "Value"])
        self.dtype = self.pick(["float32", "float64", "float64", "float16", "int32"] if not self.rough else ["float64"])
        self.base = self.pick([(40,), (6, 8), (5, 12), (30, 4), (1, 50), (3, 4, 6), (2, 3, 2, 5), (1,), (0, 3), (300,)])
        self.fresh = 0.0  # when data was last written to: older graphs are not differentiated
        self.looks = self.pick([0.0, 0.0, 0.1, 1.0])

    def write(self) -> list[str]:
        pick = self.pick
        self.add(f"picograd._BLOCK_BYTES = {pick([64, 128, 256, 512])}")
        if self.chance(0.04):
            self.add("set_distributed_config(use_processes=True)")
        elif self.chance(0.5):
            self.add(f"set_distributed_config(num_workers={pick([1, 2, 3])})")
        if self.chance(0.3):
            self.add(f"set_distributed_config(min_elements_for_parallel={pick([5, 20, 50])})")
        for _ in range(self.random.randint(1, 3)):
            self.attempt(_Writer.leaf)
        weights, methods = zip(*_MOVES)
        for method in self.random.choices(methods, weights, k=self.random.randint(6, 26)):
            if self.attempt(method) is StopIteration:
                break
            if self.looks and self.chance(self.looks):
                self.program.append("look()")
        return self.program

    def attempt(self, method):
        for _ in range(3):
            try:
                statement = method(self)
            except (IndexError, ValueError, TypeError):  # nothing there to draw from
                continue
            added = self.add(statement)
            if added:
                return added

    def add(self, statement):
        """Keeps a statement that works on plain arrays; StopIteration if it has led too far."""
        before = dict(self.world)
        if _run(statement, self.world) is not None:
            self.world.clear()
            self.world.update(before)
            return False
        self.world["printed"].clear()
        limit = 50.0 if self.rough else 1000.0
        names = [name for name in set(re.findall(r"\b[a-z]\b", statement)) if name in self.world]
        for name in names:
            for x in _flat(_copied(self.world[name])):
                if np.size(x) > 4000 or _magnitude(x) > limit or (self.rough and not self.finite(x)):
                    self.world.clear()
                    self.world.update(before)
                    return StopIteration if "=" not in statement.split("#")[0].replace("==", "") else self.undone(names)
        self.program.append(statement)
        return True

    def undone(self, names):
        """After a statement that went too far: whether all is as before, as it only gave names."""
        return StopIteration

    def finite(self, x):
        return not isinstance(x, np.ndarray) or x.dtype.kind != "f" or bool(np.isfinite(x).all())

    # --- what there is to draw from ---

    def names(self, *kinds, test=lambda x: True):
        kinds = tuple({"T": Plain, "V": PlainValue, "R": np.ndarray}[kind] for kind in kinds)
        world = self.world
        found = [n for n in _variables(world) if type(world[n]) in kinds and test(world[n])]
        return found

    def name(self, *kinds, test=lambda x: True):
        return self.pick(self.names(*kinds, test=test))

    def arrays(self, *kinds):
        """A name of what can be written to."""
        return self.name(*kinds, test=lambda x: x.ndim > 0)

    def new(self):
        """A name for a result: mostly a new one."""
        free = [letter for letter in _LETTERS if letter not in self.world]
        if self.chance(0.15) or not free:
            return self.pick(_variables(self.world))
        return self.pick(free)

    def fits(self, shape, *kinds):
        """A name of what broadcasts to a shape."""

        def test(x):
            with contextlib.suppress(ValueError):
                return np.broadcast_shapes(np.shape(x), shape) == tuple(shape)
            return False

        return self.name(*kinds, test=test)

    def number(self):
        return self.pick(["2", "3", "0.5", "-1.0", "2.0", "1.5", "-2", "0.25"])

    def shape(self):
        base = self.base
        choices = [base, base, base, base, base[1:], base[-1:], (1, *base[1:]), (*base[:-1], 1), (1,), ()]
        return self.pick(choices)

    def source(self, shape=None, dtype=None):
        """Text for a raw array, in some layout."""
        shape = self.shape() if shape is None else tuple(shape)
        odd = ", odd=True" if self.odd and self.chance(0.5) else ""
        dtype = "bool" if dtype == "bool" else f"np.{dtype or self.a_dtype()}"
        seed = self.random.randrange(1000)
        layout = self.pick(["C", "C", "C", "C", "F", "step", "turned", "T"]) if len(shape) else "C"
        if layout == "F":
            return f"np.asfortranarray(data({seed}, {shape}, {dtype}{odd}))"
        if layout == "T":
            return f"data({seed}, {shape[::-1]}, {dtype}{odd}).T"
        if layout == "step":
            return f"data({seed}, {(2 * shape[0], *shape[1:])}, {dtype}{odd})[::2]"
        if layout == "turned":
            return f"data({seed}, {shape}, {dtype}{odd})[::-1]"
        return f"data({seed}, {shape}, {dtype}{odd})"

    def a_dtype(self):
        if not self.mixed or self.chance(0.5):
            return self.dtype
        rough = ["float32", "float64"]
        return self.pick(rough if self.rough else ["float16", "float32", "float64", "int32", "int64", "uint8", "bool"])

    def index(self, shape, fancy=True):
        """Text for an index into a shape."""
        parts = []
        for n in shape[: self.random.randint(1, max(1, len(shape)))]:
            low = self.random.randrange(max(n, 1))
            kind = self.pick(["part", "part", "all", "one", "back", "step"])
            text = {"part": f"{low}:{low + self.random.randint(1, 4)}", "all": ":", "back": "::-1", "step": "::2"}
            parts.append(text.get(kind, f"{low}"))
        if fancy and self.chance(0.1):
            parts[0] = str([self.random.randrange(shape[0]) for _ in range(3)])
        if self.chance(0.1):
            parts.append("None")
        return ", ".join(["..."] if self.chance(0.1) else parts)

    def operand(self, shape=None):
        """A name or number that goes with a shape."""
        if self.chance(0.3):
            return self.number()
        kinds = "TVR" if self.chance(0.3) else "TV"
        if shape is None:
            return self.name(*kinds)

        def test(x):
            with contextlib.suppress(ValueError):
                return bool(np.broadcast_shapes(np.shape(x), shape)) or True
            return False

        return self.name(*kinds, test=test)

    def expression(self, shape=None, depth=None):
        """Element-wise text on what there is."""
        depth = self.pick([1, 1, 2, 3]) if depth is None else depth
        if not depth:
            return self.operand(shape)
        inner = self.name("T", "V") if shape is None else self.operand(shape)
        if shape is None:
            shape = self.world[inner].shape
        inner = inner if depth == 1 else self.expression(shape, depth - 1)
        kind = self.pick(["infix"] * 5 + ["unary"] * 3 + ["binary", "where", "clip", "astype", "user", "relu"])
        other = self.operand(shape) if depth < 3 or self.chance(0.7) else self.expression(shape, 1)
        if kind == "infix":
            signs = ["+", "-", "*"] if self.rough else ["+", "-", "*", "+", "-", "*", "/", "//", "%", ">", "<=", "&", "|"]
            sides = [inner, other] if self.chance(0.6) else [other, inner]
            return f"({sides[0]} {self.pick(signs)} {sides[1]})"
        if kind == "binary":
            names = [name for name in _ufuncs(2) if (name in _EXACT or self.rough) and name not in ("power", "arctan2")]
            if self.rough:
                names = ["add", "subtract", "multiply", "maximum", "minimum", "fmax", "fmin", "hypot", "logaddexp"]
            return f"np.{self.pick(names)}({inner}, {other})"
        if kind == "unary":
            names = [name for name in _ufuncs(1) if (name in _EXACT) != self.rough and name not in _CUTS or not self.rough]
            names = [name for name in names if self.rough or name in _EXACT]
            name = self.pick(names)
            domain = _DOMAINS.get(name, "{}") if self.rough else "{}"
            return f"np.{name}({domain.format(inner)})"
        if kind == "where":
            mask = f"{self.name('T', 'V')} > 0" if not self.rough else f"data({self.random.randrange(99)}, {shape}) > 0"
            return f"np.where({mask}, {inner}, {other})"
        if kind == "clip":
            return f"np.clip({inner}, -1, 2)"
        if kind == "astype":
            return f"({inner}).astype(np.{self.a_dtype()})" if inner[0] != "-" and not inner[0].isdigit() else inner
        if kind == "user":
            return f"{self.pick(['same', 'same', 'whole', 'turned', 'within', 'beside'])}({inner})"
        return f"({inner} * 1.0).relu()"

    def axes(self, ndim):
        """Text for the axis of a reduction, and whether it keeps its dimensions."""
        axis = self.pick([None, None, *range(-ndim, ndim), *[(0, -1)] * (ndim > 1), *[tuple(range(ndim))] * (ndim > 0)])
        text = "" if axis is None and self.chance(0.5) else f"axis={axis}"
        return ", ".join([text] * bool(text) + ["keepdims=True"] * self.chance(0.3))

    def reduction(self, rough):
        inner = self.expression() if self.chance(0.5) else self.name("T", "V")
        names = re.findall(r"\b[a-z]\b", inner)
        ndim = max(np.ndim(_raw(self.world[name])) for name in names)
        name = self.pick(["sum", "sum", "mean", "var", "std"] if rough else ["max", "min", "any", "all"])
        if self.chance(0.5) or len(inner) > 1:
            return f"np.{name}({', '.join([inner] + [x for x in [self.axes(ndim)] if x])})"
        return f"{inner}.{name}({self.axes(ndim)})"

    # --- statements: making ---

    @_move(4)
    def leaf(self):
        name, kind = self.new(), self.kind if self.chance(0.8) else self.pick(["Tensor", "Value", "raw"])
        if self.chance(0.08) and kind != "raw":
            return f"{name} = {kind}({self.number()})"
        dtype = self.a_dtype()
        if kind == "Value" and not dtype.startswith("float"):
            dtype = "float64"
        if kind == "raw":
            return f"{name} = {self.source(dtype=dtype)}"
        forced = ", distributed=True" if kind == "Tensor" and self.chance(0.1) else ""
        return f"{name} = {kind}({self.source()}, dtype={'bool' if dtype == 'bool' else f'np.{dtype}'}{forced})"

    @_move(26)
    def result(self):
        return f"{self.new()} = {self.expression()}"

    @_move(7)
    def view(self):
        name = self.arrays("T", "V")
        x = self.world[name]
        if self.chance(0.5):
            return f"{self.new()} = {name}[{self.index(x.shape)}]"
        forms = ["{}.reshape(-1)", "{}.T", "np.ravel({})", "np.squeeze({})", "np.expand_dims({}, 0)", "np.flip({}, 0)"]
        forms += ["np.swapaxes({}, 0, -1)", "np.moveaxis({}, 0, -1)", "np.broadcast_to({}, (2, *{}.shape))"]
        forms += ["sliding_window_view({}, 2, axis=0)", "np.atleast_2d({})", "np.split({}, 1)[0]", "np.transpose({})"]
        forms += ["same({})", "whole({})", "turned({})"] + ["{}.detach()"] * 3 * (type(x) is PlainValue)
        return f"{self.new()} = {self.pick(forms).replace('{}', name)}"

    @_move(3)
    def detached(self):
        inner = self.expression()
        return f"{self.new()} = {self.pick(['same({})', '({}).detach()', 'whole({})']).format(inner)}"

    @_move(4)
    def moved(self):
        name = self.arrays("T", "V")
        forms = ["np.concatenate([{}, {}])", "np.stack([{}, {}])", "np.sort({}, axis=-1)", "np.roll({}, 1)", "np.copy({})"]
        forms += ["np.repeat({}, 2, axis=0)", "np.tile({}, 2)", "np.take({}, [0, 0], axis=0)", "np.diff({}, axis=0)"]
        forms += ["np.argmax({}, axis=0)", "np.hstack([{}, {}])", "np.pad({}, 1)", "np.append({}, {})"]
        forms += ["copy.copy({})", "copy.deepcopy({})", "pickle.loads(pickle.dumps({}))", "Tensor({})", "{}.astype({}.dtype)"]
        forms += ["np.maximum.accumulate({})"] * (type(self.world[name]) is Plain)
        if self.rough:
            forms = forms[:5] + forms[6:] + ["{} @ {}.T", "np.dot({}, {}.T)", "np.cumsum({})"]
        return f"{self.new()} = {self.pick(forms).replace('{}', name)}"

    @_move(5)
    def reduced(self):
        return f"{self.new()} = {self.reduction(self.rough and self.chance(0.7))}"

    # --- statements: looking ---

    @_move(12)
    def shown(self):
        name = self.name("T", "V")
        data = f"{name}.data" if type(self.world[name]) is PlainValue else name
        forms = [f"{data}.numpy()", f"{data}.tolist()", f"{data}.data", f"np.asarray({data})", name]
        forms += [f"np.asarray(memoryview({data}.data))", f"[x for x in {name}]", f"len(repr({name})) > 0"]
        forms += [f"np.array({data}.data.__array_interface__['shape'])", f"bool({name}.any())", f"{name}.max().item()"]
        forms += [self.reduction(True)] * 6 + [self.reduction(False)] * 3 + [self.expression()]
        text = self.pick(forms)
        return f"print({text})" if "repr" not in text else text

    @_move(9)
    def held(self):
        """Arrays that stay in somebody's hands, in all the ways that there are."""
        name = self.arrays("T", "V")
        x = self.world[name]
        data = f"{name}.data.data" if type(x) is PlainValue else f"{name}.data"
        forms = ["{}", "{}", f"{{}}[{self.index(x.shape, False)}]", "{}.T", "{}.reshape(-1)", "np.asarray({})"]
        forms += ["memoryview({})", "np.asarray(memoryview({}))", "weakref.ref({})", "weakref.ref({})"]
        forms += ["as_strided({})", "sliding_window_view({}, 2, axis=0, writeable=True)", "np.frombuffer({}, {}.dtype)"]
        forms += ["np.asarray(types.SimpleNamespace(__array_interface__={}.__array_interface__, kept={}))"]
        forms += ["[{}]", "{'x': {}}", "iter([{}])", "np.nditer({}, op_flags=['readwrite'])"]
        return f"{self.new()} = {self.pick(forms).replace('{}', data)}"

    @_move(4)
    def half_way(self):
        """What fails, or is interrupted; nothing may come of it."""
        name = self.arrays("T", "V")
        data = f"{name}.data" if type(self.world[name]) is PlainValue else name
        look = self.pick([f"{data}.data", f"{data}.numpy()", f"np.max({name})", f"{data}.tolist()"])
        if self.chance(0.3):
            return f"interrupted(lambda: {look}, {self.random.randint(1, 30)})"
        if self.chance(0.5):
            strict = "warnings.catch_warnings(), contextlib.suppress(RuntimeWarning)"
            return f"with {strict}:\n    warnings.simplefilter('error')\n    {look}"
        forms = [f"{data} += np.ones((3, 5, 7, 2, 2))", f"{data} += failing({name})", f"{name} @ np.ones((977, 3))"]
        forms += [f"failing({self.expression()})", f"{data}[10 ** 6] = 3", f"{data} += 'text'", f"{data} -= np.ones(977)"]
        forms += [f"{name}.sum(axis=7)", f"np.add({data}, np.ones(977), out={data}.data)", f"{name} + np.ones(977)"]
        state = self.pick(["all='raise'", "divide='raise'", "invalid='raise', over='raise'"])
        forms += [f"with np.errstate({state}):\n        {data} {self.pick('/*-')}= {self.operand()}"] * 3
        forms += [f"with np.errstate({state}):\n        {self.new()} = {self.expression()}"] * 2
        return f"try:\n    {self.pick(forms)}\nexcept Exception:\n    print('failed')"

    # --- statements: writing ---

    @_move(14)
    def in_place(self):
        kind = self.pick("TTV")
        name = self.arrays(kind)
        x = self.world[name]
        other = self.number() if self.chance(0.4) else self.fits(x.shape, "T", "R")
        if self.chance(0.2):
            other = self.expression(x.shape, 1)
        sign = self.pick(["+", "-", "*", "+", "-", "*"] + ["/"] * (not self.rough))
        target = f"{name}.data" if kind == "V" else name
        target = self.pick([target, target, f"{target}.data"])
        return f"{target} {sign}= {other}"

    @_move(8)
    def assigned(self):
        name = self.arrays("T", "T", "V")
        x = self.world[name]
        target = f"{name}.data" if type(x) is PlainValue else name
        index = self.index(x.shape) if self.chance(0.6) else "..."
        new = self.number() if self.chance(0.5) else self.fits(x.shape, "T", "R")
        target = self.pick([target, f"{target}.data"])
        if self.chance(0.25):
            new = self.source(x.shape, str(x.dtype)) if self.chance(0.6) else new
            return f"{name}.data = {new}"
        return f"{target}[{index}] = {new}"

    @_move(8)
    def into(self):
        """Functions of NumPy's that write."""
        name = self.arrays("T", "T", "V")
        x = self.world[name]
        target = f"{name}.data" if type(x) is PlainValue else name
        target = self.pick([target, f"{target}.data"])
        inner = [self.fits(x.shape, "T", "R") for _ in range(2)]
        size = max(x.shape[0], 1)
        index = [self.random.randrange(size) for _ in range(3)]
        forms = [f"np.{f}({inner[0]}, {inner[1]}, out={target})" for f in ("add", "multiply", "maximum", "subtract")]
        forms += [f"np.negative({inner[0]}, out={target})"]
        forms += [f"np.{f}.at({target}, {index}, {self.number()})" for f in ("add", "subtract", "maximum", "multiply")]
        forms += [f"np.copyto({target}, {inner[0]})", f"np.put({target}, {index}, {self.number()})"]
        forms += [f"np.add.at({target}, {index}, {inner[0]}.max().item())"]
        if ".data" in target:
            forms += [f"{target}.sort(axis=0)", f"{target}.fill({self.number()})"]
        return self.pick(forms)

    @_move(8)
    def through(self):
        """Writes through what was handed out earlier."""
        found = []
        for name in _variables(self.world):
            x = self.world[name]
            if type(x) is np.ndarray and x.flags.writeable and x.ndim:
                found += [f"{name}[...] = {self.number()}", f"{name} += {self.number()}", f"{name}[0] = {self.number()}"]
            elif type(x).__name__ == "ReferenceType":
                found += [f"if {name}() is not None:\n    {name}()[...] = {self.number()}"] * 4
            elif type(x) is memoryview:
                found += [f"np.asarray({name})[...] = {self.number()}"] * 3
            elif type(x) is list and x and isinstance(x[0], (np.ndarray, Plain)):
                found += [f"{name}[0][...] = {self.number()}"] * 3
            elif type(x) is dict:
                found += [f"{name}['x'][...] = {self.number()}"] * 3
        return self.pick(found)

    # --- statements: gradients ---

    @_move(8)
    def backward(self):
        """A graph is built and differentiated at once: writes in between would make its gradient undefined."""
        if self.dtype.startswith("int"):
            raise ValueError
        leaves = self.names("V", test=lambda x: x.made is None and x.needs and x.dtype.kind == "f")
        x, y = self.pick(leaves), self.pick(leaves)
        z = self.pick(self.names("T", test=lambda t: t.dtype.kind == "f") or leaves)
        forms = ["({x} + {y})", "({x} - {y})", "({x} * {y})", "({x} * {y} + {z})", "(np.square({x}) - {y})", "({x} * 2)"]
        forms += ["np.tanh({x} + {y})", "np.sin({x}) * {z}", "({x} + 1)[:2]", "{x}.reshape(-1) * 2", "{x}.T", "(-{x} - {y})"]
        inner = self.pick(forms).format(x=x, y=y, z=z)
        keep = self.pick(["", "", "retain_grads=False"])
        return f"np.{self.pick(['sum', 'sum', 'mean'])}({inner}).backward({keep})"

    @_move(6)
    def descended(self):
        name = self.name("V", test=_gradient)
        forms = ["{}.data -= 0.5 * {}.grad", "{}.grad *= 2", "{}.grad = 0", "{}.grad.data[...] = 3", "{}.grad += 1"]
        forms += ["print({}.grad)", "{}.grad.data *= 2", "{}.data.data -= {}.grad.data"]
        return self.pick(forms).replace("{}", name)

    # --- statements: everything else ---

    @_move(4)
    def settings(self):
        name, number = self.name("T"), self.random.choice
        forms = ["set_distributed_config(enabled=False)", "set_distributed_config(enabled=True)"] * 2
        forms += [f"set_distributed_config(min_elements_for_parallel={number([1, 5, 30])})"]
        forms += [f"{name}.enable_distributed()", f"{name}.disable_distributed()"]
        forms += [f"with distributed_config(enabled=False):\n    {self.new()} = {self.expression()}"]
        forms += [f"with np.errstate(all='ignore'):\n    {self.new()} = {self.expression()}"] * 2
        forms += [f"with no_grad():\n    {self.new()} = {self.expression()}"]
        return self.pick(forms)

    @_move(6)
    def containers(self):
        names = [self.name("T", "V") for _ in range(2)]
        forms = [f"{self.new()} = [{', '.join(names)}]", f"{self.new()} = copy.deepcopy([{', '.join(names)}])"]
        forms += [f"cell['t'] = {names[0]}"] * 2 + [f"del {names[0]}"] * 3
        forms += [f"{self.new()} = pickle.loads(pickle.dumps(({', '.join(names)})))"]
        lists = [n for n in _variables(self.world) if type(self.world[n]) is list and type(self.world[n][0]) is Plain]
        forms += [f"{name}[0] += {self.number()}" for name in lists]
        work = f"lambda i: ({self.expression()} + i).{self.pick(['max', 'min'])}()"
        forms += [f"with ThreadPoolExecutor(3) as pool:\n    print(list(pool.map({work}, range(4))))"]
        return self.pick(forms)


def generate(rng: np.random.Generator) -> list[str]:
    """A random program."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return _Writer(int(rng.integers(1 << 62))).write()


# ---------------------------------------------------------------------------------------------------------------------
# By itself, without the driver
# ---------------------------------------------------------------------------------------------------------------------


def shrink(program: list[str], seconds: float = 10.0) -> list[str]:
    """A smaller program that fails, too: statements are left out, several at a time at first, as long as it does."""
    end = time.monotonic() + seconds
    step = len(program) // 2
    while step and time.monotonic() < end:
        i, before = 0, len(program)
        while i < len(program) and time.monotonic() < end:
            shorter = program[:i] + program[i + step :]
            answer = check(shorter)
            if answer is not None and not isinstance(answer, Skip):
                program = shorter
            else:
                i += step
        step = step // 2 if len(program) == before or step > 1 else 1
    return program


_FEATURES = """detach same whole turned within beside interrupted simplefilter weakref as_strided window_view memoryview
    errstate backward grad ThreadPool deepcopy pickle .at( out= copyto .put( sort tile reshape ravel .T asfortran .max .sum
    .mean .std .var data=""".split()


def _signature(program, answer):
    """What failures of one kind have in common, roughly: what their smallest programs use, and how they show."""
    text = "\n".join(program)
    shows = [word for word in ("writing to", "where NumPy has", "Error", "hangs") if word in answer]
    return *shows, *[word for word in _FEATURES if word in text], bool(re.search(r"\.data [-+*/]=", text))


def main() -> int:
    faulthandler.enable()
    seed = int(time.time()) if _options.seed is None else _options.seed
    print(f"room blocks, seed {seed}, {_path}", flush=True)
    begin, counts, kinds, index = time.monotonic(), collections.Counter(), {}, 0
    while index < _options.programs and time.monotonic() - begin < _options.seconds:
        faulthandler.dump_traceback_later(4 * _TIMEOUT, exit=True)  # in case not even a signal ends it
        program = generate(np.random.default_rng([seed, index]))
        answer = check(program)
        faulthandler.cancel_dump_traceback_later()
        index += 1
        if answer is None or isinstance(answer, Skip):
            counts["agree" if answer is None else f"set aside: {answer}"] += 1
            continue
        counts["failed"] += 1
        found = time.monotonic()
        small = shrink(program, 2.0 if _options.keep_going else 20.0)
        answer = check(small) or f"not every time: {answer}"
        kind = _signature(small, answer)
        if kind not in kinds:
            kinds[kind] = answer
            print(f"\n--- program {index - 1} of seed {seed}, after {found - begin:.1f} s: {answer}")
            print("\n".join(small), flush=True)
        if not _options.keep_going:
            break
        begin += time.monotonic() - found  # shrinking is not counted
    took = time.monotonic() - begin
    print(f"\n{index} programs in {took:.1f} s, {index / took:.0f} a second: {dict(counts)}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
