#!/usr/bin/env python3
"""Random programs on distributed Tensors and Values, held against plain NumPy after every step.

A program is a list of Python statements. The same text runs in two worlds, statement by statement: once with picograd,
whose arrays may wait, and once with `Plain`, a NumPy array that computes at once and knows picograd's dtype contract.
Whatever a statement prints, raises or leaves behind must be the same in both. Comparing is itself a way to look, so it
happens only where the program says `print` or `look()`, and at the end; there every array that can be written to is
written to as well, to see who sees it.

It is a room of `.ci/fuzz.py --room blocks`: `generate(rng)` makes a program, `check(program)` says how it fails, and
`PREAMBLE` makes it one that can be pasted.
"""

import contextlib
import copy
import faulthandler
import functools
import itertools
import random
import re
import signal
import sys
import threading
import types
import warnings
import weakref

import numpy as np
from fuzz import Skip, compiled

import picograd

PROCESSES = False  # whether every program runs in worker processes

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
picograd._BLOCK_BYTES, picograd._FEW_BLOCKS = 16, 0  # small arrays have many blocks, and none is left to NumPy
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


def interrupted(action):
    """Does what only looks, and interrupts it like Ctrl-C: at the first function of picograd's that it calls, then, as
    it is done again, at the second, and so on."""

    def profile(frame, event, arg):
        nonlocal calls
        code = frame.f_code
        if event == "call" and code.co_filename == picograd.__file__ and code.co_name != "take_back":
            calls -= 1
            if not calls:
                sys.setprofile(None)
                raise KeyboardInterrupt

    for calls in range(1, 40):
        try:
            sys.setprofile(profile)
            action()
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)


same = primitive(lambda x: x, lambda g, out, x: g, name="same", elementwise=True)
whole = primitive(lambda x: x, lambda g, out, x: g, name="whole")
turned = primitive(lambda x: x[::-1], lambda g, out, x: g[::-1], name="turned")
lent = primitive(lambda x: np.asarray(memoryview(x)), lambda g, out, x: g, name="lent")
within = primitive(lambda x: np.asarray(Tensor(x) * 2 - 1), lambda g, out, x: 2 * g, name="within", elementwise=True)
beside = primitive(lambda x: x + cell["t"].max().astype(x.dtype).item(), lambda g, out, x: g, name="beside")
failing = primitive(fail, lambda g, out, x: g, name="failing", elementwise=True)
'''
PREAMBLE = IMPORTS + HELPERS


class _NotDrawn(BaseException):
    """What is for another room to judge; not an Exception, so that no program catches it."""


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
_NO_CONTRACT = {np.take, np.take_along_axis, np.copyto, np.put, np.ndarray.__getitem__}


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
    flat = _flat(args)
    weak = all(isinstance(x, np.generic) or type(_raw(x)) in (float, int, bool) for x in flat)
    if any(type(_raw(x)) is bool or (weak and isinstance(_raw(x), np.bool_)) for x in flat):
        raise _NotDrawn("masks of weak numbers")
    if (
        not weak
        and function in (np.hstack, np.append, np.dot)
        and any(type(_raw(x)) in (float, int, bool) for x in flat)
    ):
        raise _NotDrawn("numbers that are joined to arrays")
    if weak:  # NumPy has the answers of IEEE where Python raises
        raw = _each(lambda x: np.float64(x) if type(x) is float else x, raw)
    out = function(*raw, **{name: _each(_raw, x) for name, x in kwargs.items()})
    if kwargs.get("out") is not None:
        return kwargs["out"][0] if isinstance(kwargs["out"], tuple) else kwargs["out"]
    made = (function, args, kwargs) if kind is PlainValue else None

    def wrapped(x):
        if not isinstance(x, (np.ndarray, np.generic)):
            return x
        if x.dtype.kind not in "fiub":
            raise _NotDrawn("arrays of objects")
        x = _settled(x)
        if weak and isinstance(x, np.integer):
            raise _NotDrawn("integers of weak numbers")
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
        if not self.has(new):
            self.raw = self.conformed(new)
            if self.owner:
                setattr(*self.owner, self.raw)

    def has(self, new):
        """Whether what is assigned is what was handed out, or this itself: then nothing happens."""
        if not isinstance(new, Plain):
            return new is self.raw
        return new is self or (new.raw is self.raw and new.owner is not None and new.owner[0] is self)

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
        if type(self.raw) is float:
            raise _NotDrawn("dtypes of weak numbers")
        return _compute(lambda x: x.astype(dtype), (self,), contract=False)

    def relu(self):
        return _compute(np.maximum, (self, 0))

    def detach(self):
        out = self.around(self.raw)
        out.needs = False
        return out

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

    def binary(self, other, ufunc, swapped=False):
        out = _compute(ufunc, (other, self) if swapped else (self, other))
        return out.data if type(out) is Plain and not out.ndim and out.dtype == bool else out  # a plain truth

    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "pow": np.power}
    functions |= {"floordiv": np.floor_divide, "mod": np.remainder, "matmul": np.matmul}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    for name, ufunc in functions.items():
        setattr(Plain, f"__{name}__", functools.partialmethod(binary, ufunc=ufunc))
        setattr(Plain, f"__r{name}__", functools.partialmethod(binary, ufunc=ufunc, swapped=True))
        setattr(Plain, f"__i{name}__", functools.partialmethod(in_place, ufunc=ufunc))
    functions = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    for name, ufunc in (functions | {"eq": np.equal, "ne": np.not_equal}).items():
        setattr(Plain, f"__{name}__", functools.partialmethod(binary, ufunc=ufunc))
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


# The gradient by each operand of what random programs differentiate: leaves' gradients are known without picograd.
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
        if not self.has(new):
            shape, self.raw = self.shape, self.conformed(new)
            self.slope = self.slope if self.shape == shape else None  # it was that of other data

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
            if g is None or x.made is None:
                if g is not None and _is_leaf(x):
                    x.slope = x.conformed(g + (0 if x.slope is None else x.slope))
                continue
            function, args, params = x.made
            if function not in _RULES:
                for leaf in filter(_is_leaf, order):
                    leaf.slope = np.full(leaf.shape, np.nan)[()]  # not known here
                return
            for y, rule in zip(args, _RULES[function]):
                if isinstance(y, PlainValue) and rule is not None:
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
        x = np.array(x)
        return x if x.dtype.kind in "fiub" else None
    return x if isinstance(x, (int, float, str)) else None


def _is_leaf(x):
    return x.made is None and x.needs and x.dtype.kind == "f"


def _has_gradient(x):
    """Whether x is a leaf that has a gradient, which the plain world knows."""
    known = isinstance(x, PlainValue) and _is_leaf(x) and x.slope is not None and _finite(x.slope)
    return known and x.size > 0 and type(x.raw) is not float  # numbers are summed from arrays of any precision


def _finite(x):
    return not isinstance(x, (np.ndarray, np.generic, float)) or bool(np.isfinite(x).all())


_EXACT = set(
    """negative absolute square sqrt floor ceil rint trunc sign signbit isnan isinf isfinite logical_not invert positive
    reciprocal add subtract multiply divide maximum minimum fmax fmin equal not_equal less less_equal greater
    greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor floor_divide
    remainder""".split()
)
_FINE = {"negative", "absolute", "square", "sqrt", "positive", "reciprocal"}  # continuous: for rough programs, too
_DOMAINS = {"log": "np.abs({}) + 0.5", "log2": "np.abs({}) + 0.5", "log10": "np.abs({}) + 0.5"}
_DOMAINS |= {"arccosh": "np.abs({}) + 1.5", "sqrt": "np.abs({}) + 0.5", "reciprocal": "np.abs({}) + 0.5"}
_DOMAINS |= {name: "np.tanh({}) * 0.5" for name in ("arcsin", "arccos", "arctanh", "tan", "log1p", "exp", "sinh")}
_DOMAINS |= {name: "np.tanh({})" for name in ("exp2", "expm1", "cosh", "sinc")}


def _ufuncs(operands: int) -> list[str]:
    """The element-wise ufuncs of picograd's table: a new one takes part by being there."""
    found = [key for key, prim in picograd.TABLE.items() if getattr(prim, "elementwise", False)]
    return sorted({key.__name__ for key in found if isinstance(key, np.ufunc) and key.nin == operands})


_TRANSCENDENTAL = {*_ufuncs(1), *_ufuncs(2)} - _EXACT
_ROUGH = _TRANSCENDENTAL | set(
    "sum mean var std prod cumsum cumprod matmul dot einsum trace norm ** @ backward".split()
)


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
        try:
            now = _copied(x)
        except Exception as error:
            raise _Difference(f"looking at {name}: {type(error).__name__}: {error}") from None
        _compare(name, now, then, slack, scale)
        if _has_gradient(y):
            _compare(f"{name}.grad", _copied(x.grad), _copied(y.grad), slack, 100.0)


def _magnitude(x) -> float:
    """The largest finite number in x, by size."""
    if not isinstance(x, (np.ndarray, float, int)) or not np.size(x):
        return 0.0
    x = np.abs(np.asarray(x, float))
    return float(np.max(x, where=np.isfinite(x), initial=0.0))


def _gradients(ours, theirs, program, slack):
    """Compares the gradients of leaves, whatever they are of, with those of the same program without distribution."""
    off = _world(False) | {"set_distributed_config": _nothing, "distributed_config": _nothing}
    with picograd.distributed_config(enabled=False):
        for statement in program:
            statement = statement.replace("enable_distributed", "disable_distributed")
            if _run(statement.replace("distributed=True", "distributed=False"), off) is not None:
                return  # for another room
        for name in _variables(theirs):
            if isinstance(theirs[name], PlainValue) and _is_leaf(theirs[name]):
                _compare(f"{name}.grad", _copied(ours[name].grad), _copied(off[name].grad), slack, 100.0)


def _array(x):
    """What writes to x go to: the array handed out by a Tensor or Value, or an array."""
    if isinstance(x, (picograd.Value, PlainValue)):
        x = x.data
    return x.data if isinstance(x, (picograd.Tensor, Plain)) else x


def _audit(ours, theirs, slack):
    """Writes to every array, and looks who sees it: the same as in NumPy."""
    for mark, (name, grad) in enumerate(itertools.product(_variables(theirs), (False, True)), 3):
        if grad and not _has_gradient(theirs[name]):
            continue
        y = _array(theirs[name].grad if grad else theirs[name])
        if not isinstance(y, np.ndarray) or not y.flags.writeable or not y.size:
            continue
        y[...] = mark if y.dtype != bool else ~y
        x = _array(ours[name].grad if grad else ours[name])
        name += ".grad" * grad
        try:
            x[...] = mark if y.dtype != bool else ~x
        except (TypeError, ValueError) as error:
            raise _Difference(f"writing to {name} at the end: {error}") from None
        try:
            _states(ours, theirs, slack)
        except _Difference as difference:
            raise _Difference(f"after writing to {name}, an array, at the end: {difference}") from None


def _run(statement, world):
    """Runs a statement; the exception that it ends with."""
    try:
        exec(compiled(statement), world)
    except (Exception, _NotDrawn) as error:
        return error.with_traceback(None)


def _check(program: list[str]):
    ours, theirs = _world(False), _world(True)
    slack = 0.0
    text = "".join(program)
    # Double precision is said; arrays without a dtype are single, also those that `within` makes on its way.
    coarse = ("float16", 1e-3), ("float32", 1.2e-7), ("within", 1.2e-7), ("float64", 2.2e-16)
    eps = next((eps for name, eps in coarse if name in text), 1.2e-7)
    for number, statement in enumerate(program, 1):
        place = f"statement {number}, `{statement}`"
        rough = _rough(statement)
        if rough and "print" not in statement:
            slack = 64 * eps
        expected, error = _run(statement, theirs), _run(statement, ours)
        if isinstance(expected, (NameError, _NotDrawn)) or isinstance(error, NameError):
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
        if "backward" in text:
            _gradients(ours, theirs, program, slack)
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
    kept = picograd._BLOCK_BYTES, picograd._FEW_BLOCKS, picograd._LITTLE
    with warnings.catch_warnings(), np.errstate(all="warn"), picograd.distributed_config():
        warnings.simplefilter("ignore")
        picograd.set_distributed_config(enabled=True, min_elements_for_parallel=1, num_workers=2)
        picograd.set_distributed_config(use_processes=PROCESSES)
        picograd._BLOCK_BYTES, picograd._FEW_BLOCKS = 16, 0
        faulthandler.dump_traceback_later(4 * _TIMEOUT, exit=True)  # in case not even a signal ends it
        try:
            with _deadline():
                return _check(program)
        except Hang:
            return f"hangs: no end after {_TIMEOUT} s"
        finally:
            faulthandler.cancel_dump_traceback_later()
            picograd._BLOCK_BYTES, picograd._FEW_BLOCKS, picograd._LITTLE = kept
            sys.setprofile(None)


# ---------------------------------------------------------------------------------------------------------------------
# Making programs: a statement is drawn, tried in the plain world, and kept if it works there
# ---------------------------------------------------------------------------------------------------------------------

# A line without indent gives a weight to the forms below it; `~` marks what is for rough programs only, `!` what is for
# exact ones, and (n) counts n times. What is in braces is filled in by the method of `_Writer` of that name, once for
# all the places where it stands. {a} is a Tensor or Value, {A} the Tensor of it and {D} the array in that.
_STATEMENTS = r"""
4 leaves
    (6) {new} = {leaf}
    (3) {new} = {source}
    {new} = Tensor({number})
    {new} = Value({number})
26 results
    {new} = {expression}
8 views, of the kind that NumPy makes views and of others
    (9) {new} = {a}[{index}]
    {new} = {a}.reshape(-1)
    {new} = np.reshape({a}, (-1, {a}.shape[-1]))
    {new} = {a}.T
    {new} = np.ravel({a})
    {new} = np.squeeze({a})
    {new} = np.expand_dims({a}, 0)
    {new} = np.flip({a}, 0)
    {new} = np.swapaxes({a}, 0, -1)
    {new} = np.moveaxis({a}, 0, -1)
    {new} = np.transpose({a})
    {new} = np.broadcast_to({a}, (2, *{a}.shape))
    (2) {new} = sliding_window_view({a}, {window}, axis=0)
    (2) {new} = sliding_window_view({a}, {window}, axis=0)[..., 0]
    (2) {new} = lent({a})
    {new} = np.split({a}, 1)[0]
    (2) {new} = {v}.detach()
    {new} = {identity}({a})
4 results that are their operand, when that waits
    {new} = {identity}({expression})
    {new} = ({expression}).detach()
5 other functions
    {new} = np.concatenate([{a}, {other}])
    {new} = np.stack([{a}, {a}])
    {new} = np.hstack([{a}, {other}])
    {new} = np.append({a}, {other})
    {new} = np.take({a}, [0, 0], axis=0)
    {new} = np.roll({a}, 1)
    {new} = np.repeat({a}, 2, axis=0)
    {new} = np.tile({a}, 2)
    {new} = np.pad({a}, 1)
    {new} = np.diff({a} * 1.0, axis=0)
    {new} = np.copy({a})
    {new} = {a}.astype({a}.dtype)
    {new} = Tensor({a})
    !{new} = np.sort({a}, axis=-1)
    !{new} = np.argmax({a}, axis=0)
    !{new} = np.maximum.accumulate({t})
    ~{new} = np.cumsum({a}, axis=0)
    ~{new} = {a} @ {a}.T
    ~{new} = np.dot({a}, {other}.T)
    ~{new} = np.trace({a})
    ~(2) {new} = {sum}
    (3) {new} = {extreme}
14 looks that leave nothing behind
    (6) print({sum})
    (4) print({extreme})
    print({expression})
    print({a})
    print({A}.numpy())
    print({A}.tolist())
    print({D})
    print(np.asarray({A}))
    print(np.asarray(memoryview({D})))
    print([x for x in {a}])
    print(np.array({D}.__array_interface__['shape']))
    print(bool({a}.any()), {a}.max().item())
    print(float({a}.reshape(-1)[0]))
    len(repr({a})) + len(str({A}))
9 looks that keep the array, or a way to it
    (2) {new} = {D}
    {new} = {D}[{slices}]
    {new} = {D}.T
    {new} = {D}.reshape(-1)
    {new} = np.asarray({A})
    {new} = memoryview({D})
    {new} = np.asarray(memoryview({D}))
    {new} = np.frombuffer({D}, {A}.dtype)
    {new} = np.asarray(types.SimpleNamespace(__array_interface__={D}.__array_interface__, kept={D}))
    (2) {new} = weakref.ref({D})
    {new} = as_strided({D})
    {new} = sliding_window_view({D}, 2, axis=0, writeable=True)
    {new} = np.nditer({D}, op_flags=['readwrite'])
    {new} = [{D}]
    {new} = {{'x': {D}}}
14 in place
    (4) {A} {sign}= {fitting}
    (2) {A} {sign}= {number}
    (2) {A} {sign}= {here}
    (2) {D} {sign}= {fitting}
    (2) {D} {sign}= {number}
9 assignments
    (2) {A}[{index}] = {number}
    {A}[{index}] = {fitting}
    {D}[{index}] = {number}
    {D}[...] = {fitting}
    {D}[...] = {number}
    {a}.data = {like}
    {a}.data = {fitting}
    {D} = {like}
9 functions that write
    np.add({fitting}, {fitting2}, out={W})
    np.multiply({fitting}, {fitting2}, out={W})
    np.maximum({fitting}, {fitting2}, out={W})
    np.negative({fitting}, out={W})
    (2) np.add.at({W}, {places}, {number})
    np.subtract.at({W}, {places}, {number})
    np.maximum.at({W}, {places}, {number})
    np.multiply.at({W}, {places}, {number})
    np.copyto({W}, {fitting})
    np.put({W}, {places}, {number})
    {D}.sort(axis=0)
    {D}.fill({number})
8 writes through what was kept
    (3) {kept}[{keptindex}] = {number}
    (2) {kept} {sign}= {number}
    np.add.at({kept}, [0, 0], {number})
    (6) if {reference}() is not None:\n    {reference}()[...] = {number}
    (2) np.asarray({memory})[...] = {number}
    (2) {list}[0][...] = {number}
    (2) {list}[0] {sign}= {number}
    (2) {dict}['x'][...] = {number}
8 what fails or is interrupted; nothing may come of it
    (8) with warnings.catch_warnings(), contextlib.suppress(Warning):\n    warnings.simplefilter('error')\n    {seen}
    (6) interrupted(lambda: {seen})
    {trying}{A} += np.ones((3, 5, 7, 2, 2)){failed}
    {trying}{A} -= np.ones(977){failed}
    {trying}{a} + np.ones(977){failed}
    {trying}{A} += 'text'{failed}
    {trying}{A}[10 ** 6] = 3{failed}
    {trying}{a} @ np.ones((977, 3)){failed}
    {trying}{a}.sum(axis=7){failed}
    {trying}np.add({A}, np.ones(977), out={D}){failed}
    (2) {trying}{A} += failing({A}){failed}
    {trying}{new} = failing({expression}){failed}
    (3) {trying}with np.errstate({strict}):\n        {A} {division}= {fitting}{failed}
    (3) {trying}with np.errstate({strict}):\n        {new} = {expression}{failed}
7 gradients; a graph is built and differentiated at once, as writes in between would make that undefined
    (8) np.{mean}({differentiable}).backward()
    np.{mean}({differentiable}).backward(retain_grads=False)
    (3) np.{mean}({graph}).backward()
7 what is done with gradients
    {known}.data -= 0.5 * {known}.grad
    {known}.data.data -= {known}.grad.data
    {known}.grad *= 2
    {known}.grad += 1
    {known}.grad.data *= 2
    {known}.grad.data[...] = 3
    {known}.grad = 0
    (2) {v1}.grad = 0
    print({known}.grad)
    print({known}.grad.sum())
4 settings
    (2) set_distributed_config(enabled=False)
    (3) set_distributed_config(enabled=True)
    set_distributed_config(min_elements_for_parallel={least})
    {t}.enable_distributed()
    {t}.disable_distributed()
    with distributed_config(enabled=False):\n    {new} = {expression}
    (2) with np.errstate(all='ignore'):\n    {new} = {expression}
    with no_grad():\n    {new} = {expression}
7 containers, copies, threads, and what is gone
    {new} = [{a}, {other}]
    {new} = copy.deepcopy([{a}, {other}])
    {new} = pickle.loads(pickle.dumps(({a}, {other})))
    (2) {new} = copy.copy({a})
    {new} = copy.deepcopy({a})
    {new} = pickle.loads(pickle.dumps({a}))
    (2) cell['t'] = {a}
    (4) del {a}
    (2) with ThreadPoolExecutor(3) as pool:\n    print(list(pool.map(lambda i: np.max({expression} + i), range(4))))
"""

# {x} is any operand, {y} another that goes with it.
_EXPRESSIONS = r"""
8 infix
    (4) ({x} {sign} {y})
    (2) ({y} {sign} {x})
    !({x} / {y})
    !({x} // {y})
    !({x} % {y})
    !({x} > {y})
    !({x} <= {y})
    !({x} & {y})
    ~({x} * {x})
    ~({x} ** 2)
4 functions
    (6) {unary}
    (2) np.{binary}({x}, {y})
    np.clip({x}, -1, 2)
    !np.where({x} > 0, {x}, {y})
    ~np.where({noise} > 0, {x}, {y})
    np.where({noise} > 0, {y}, {x})
    np.abs({x}).astype(np.{dtype})
    (np.abs({x}) - 1.0).relu()
2 primitives of users
    (3) {identity}({x})
    turned({x})
    within({x})
    beside({x})
"""

_GRAPHS = """{v1}; {v1} + {v2}; {v1} - {v2}; {v1} * {v2}; {v1} * {v2} + {t1}; np.square({v1}) - {v2}; {v1} * 2; {v1}.T;
-{v1} - {v2}; np.tanh({v1} + {v2}); np.sin({v1}) * {t1}; ({v1} + 1)[:2]; {v1}.reshape(-1) * 2; np.square({v1} + {v2});
({v1} + {v2}) * {t1}; np.tanh({v1} - {v2}); np.sin({v1} + {t1} + {v2}); np.tanh({v1} + {v2})""".split(";")


def _grammar(text: str):
    """[weight, ...], [[(form, for which programs), ...], ...]"""
    weights, forms = [], []
    for line in text.strip("\n").split("\n"):
        if line[0] != " ":
            weights.append(int(line.split()[0]))
            forms.append([])
            continue
        mark, count, form = re.fullmatch(r"\s+([~!]?)(?:\((\d)\) )?(.*)", line).groups()
        forms[-1] += [(form.replace("\\n", "\n"), mark)] * int(count or 1)
    return weights, forms


_STATEMENTS, _EXPRESSIONS = _grammar(_STATEMENTS), _grammar(_EXPRESSIONS)


class _Blanks(dict):
    """What stands in the braces of one form."""

    def __init__(self, writer, **given):
        super().__init__(given)
        self.writer = writer

    def __missing__(self, key):
        self[key] = getattr(self.writer, key)(self)
        return self[key]


class _Writer:
    """Writes one program. Exact programs take what is the same in any order, bit for bit; rough ones the rest."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.pick, self.world, self.program, self.recent = self.random.choice, _world(True), [], []
        self.rough, self.mixed = self.chance(0.4), self.chance(0.15)  # mixed: several dtypes meet
        self.odd = not self.rough and self.chance(0.3)
        self.kind = self.pick(["Tensor", "Value"])
        self.main = self.pick(["float32", "float64", "float64"] + ["float16", "int32"] * (not self.rough))
        self.base = self.pick([(40,), (6, 8), (5, 12), (30, 4), (1, 50), (3, 4, 6), (2, 3, 2, 5), (1,), (0, 3), (300,)])
        self.looks = self.pick([0.0, 0.0, 0.1, 1.0])

    def chance(self, p):
        return self.random.random() < p

    def write(self) -> list[str]:
        pick = self.pick
        self.add(f"picograd._BLOCK_BYTES = {pick([16, 32, 64, 256])}")
        if self.chance(0.2):
            self.add("picograd._FEW_BLOCKS, picograd._LITTLE = 8, 0")  # NumPy does what is small, and at once in place
        if self.chance(0.04):
            self.add("set_distributed_config(use_processes=True)")
        elif self.chance(0.5):
            self.add(f"set_distributed_config(num_workers={pick([1, 2, 3])})")
        if self.chance(0.1):
            self.add("set_distributed_config(enabled=False)")  # what is made before it is switched on has a past
        if self.chance(0.3):
            self.add(f"set_distributed_config(min_elements_for_parallel={pick([5, 20, 50])})")
        weights, groups = _STATEMENTS
        drawn = [groups[0]] * self.random.randint(1, 3)
        for group in drawn + self.random.choices(groups, weights, k=self.random.randint(6, 26)):
            for _ in range(3):
                with contextlib.suppress(IndexError, ValueError, TypeError):  # there is nothing for one of the blanks
                    kept = self.add(self.form(group))
                    if kept is None:
                        return self.program
                    if kept:
                        break
            if self.chance(self.looks):
                self.program.append("look()")
        return self.program

    def form(self, group, **given):
        form = self.pick([form for form, mark in group if mark != ("!" if self.rough else "~")])
        return form.format_map(_Blanks(self, **given))

    def add(self, statement):
        """Whether it keeps a statement, as it works on plain arrays; None if it led too far, which cannot be undone."""
        before = dict(self.world)
        works = _run(statement, self.world) is None
        self.world["printed"].clear()
        if works and self.sane(statement):
            self.program.append(statement)
            self.recent += re.findall(r"\b[a-z]\b", statement)[::-1]
            return True
        self.world.clear()
        self.world.update(before)
        return False if not works or re.match("[a-z] = |print", statement) else None

    def sane(self, statement):
        """Whether what a statement names is small, in size and magnitude, for sums to be exact or well-conditioned."""
        limit = 50.0 if self.rough else 1000.0
        for name in set(re.findall(r"\b[a-z]\b", statement)) & self.world.keys():
            for x in _flat(_copied(self.world[name])):
                if np.size(x) > 3000 or _magnitude(x) > limit or (self.rough and not _finite(x)):
                    return False
        return True

    # --- names ---

    def names(self, *kinds, test=lambda x: True):
        return [name for name in _variables(self.world) if type(x := self.world[name]) in kinds and test(x)]

    def new(self, _):
        """Mostly a new name; else what had it is gone."""
        free = [letter for letter in _LETTERS if letter not in self.world]
        return self.pick(free if free and self.chance(0.85) else _variables(self.world))

    def a(self, _):
        """Often what the last statements were about: it, or what reads it, may still wait."""
        names = self.names(Plain, PlainValue, test=lambda x: x.ndim)
        return self.pick([name for name in names if name in self.recent[-3:]] * self.chance(0.5) or names)

    def t(self, _):
        return self.pick(self.names(Plain, test=lambda x: x.ndim))

    def v(self, _):
        return self.pick(self.names(PlainValue, test=lambda x: x.ndim))

    def other(self, _):
        return self.pick(self.names(Plain, PlainValue))

    def A(self, blanks):
        return f"{blanks['a']}.data" if type(self.world[blanks["a"]]) is PlainValue else blanks["a"]

    def D(self, blanks):
        return f"{blanks['A']}.data"

    def W(self, blanks):
        return blanks[self.pick("AD")]

    def kept(self, _):
        return self.pick(self.names(np.ndarray, test=lambda x: x.ndim and x.flags.writeable))

    def reference(self, _):
        return self.pick(self.names(weakref.ref))

    def memory(self, _):
        return self.pick(self.names(memoryview))

    def list(self, _):
        return self.pick(self.names(list, test=lambda x: type(x[0]) in (Plain, np.ndarray)))

    def dict(self, _):
        return self.pick(self.names(dict))

    def known(self, _):
        return self.pick(self.names(PlainValue, test=_has_gradient))

    # --- what goes with them ---

    def goes(self, shape, *kinds, inside=False):
        """A name of what broadcasts with a shape; inside: to it."""

        def test(x):
            with contextlib.suppress(ValueError):
                both = np.broadcast_shapes(x.shape, shape)
                return both == tuple(shape) or not inside
            return False

        return self.pick(self.names(*kinds, test=test))

    def fitting(self, blanks):
        return self.goes(self.world[blanks["a"]].shape, Plain, np.ndarray, inside=True)

    fitting2 = fitting

    def here(self, blanks):
        """An expression that goes with {a}."""
        return self.expression(None, self.world[blanks["a"]].shape, 1)

    def like(self, blanks):
        x = self.world[blanks["a"]]
        return self.source(None, x.shape, str(x.dtype))

    def number(self, _):
        return self.pick(["2", "3", "0.5", "-1.0", "2.0", "1.5", "-2", "0.25"])

    def sign(self, _):
        return self.pick("+-*")

    def index(self, blanks, fancy=True, shape=None):
        shape, parts = self.world[blanks["a"]].shape if shape is None else shape, []
        for n in shape[: self.random.randint(1, len(shape))]:
            low = self.random.randrange(max(n, 1))
            parts.append(self.pick([f"{low}:{low + self.random.randint(1, 4)}"] * 3 + [":", "::-1", "::2", f"{low}"]))
        if fancy and self.chance(0.1):
            parts[0] = str([self.random.randrange(shape[0]) for _ in range(3)])
        return ", ".join(parts + ["None"] * self.chance(0.1)) if self.chance(0.9) else "..."

    def slices(self, blanks):
        return self.index(blanks, False)

    def keptindex(self, blanks):
        return self.index(blanks, shape=self.world[blanks["kept"]].shape) if self.chance(0.5) else "..."

    def places(self, blanks):
        return str([self.random.randrange(self.world[blanks["a"]].shape[0]) for _ in range(3)])

    # --- data ---

    def leaf(self, _):
        kind = self.kind if self.chance(0.8) else self.pick(["Tensor", "Value"])
        dtype = self.dtype()
        if kind == "Value" and not dtype.startswith("float"):
            dtype = "float64"
        forced = ", distributed=True" if kind == "Tensor" and self.chance(0.1) else ""
        return f"{kind}({self.source()}, dtype={'bool' if dtype == 'bool' else f'np.{dtype}'}{forced})"

    def source(self, _=None, shape=None, dtype=None):
        """An array, in some layout."""
        base = self.base
        shapes = [base, base, base, base, base[1:], base[-1:], (1, *base[1:]), (*base[:-1], 1), (1,), ()]
        shape, dtype = self.pick(shapes) if shape is None else shape, dtype or self.dtype()
        before, after = self.pick(
            [("", "")] * 4 + [("np.asfortranarray(", ")"), ("", ".T"), ("", "[::2]"), ("", "[::-1]")]
        )
        if not shape:
            before = after = ""
        shape = {".T": shape[::-1], "[::2]": (2 * shape[0], *shape[1:]) if shape else ()}.get(after, shape)
        odd = ", odd=True" if self.odd and self.chance(0.5) else ""
        dtype = "bool" if dtype == "bool" else f"np.{dtype}"
        return f"{before}data({self.random.randrange(1000)}, {tuple(shape)}, {dtype}{odd}){after}"

    def noise(self, blanks):
        return f"data({self.random.randrange(1000)}, {blanks['shape']})"

    def dtype(self, _=None):
        if not self.mixed or self.chance(0.5):
            return self.main
        exact = ["float16", "int32", "int64", "uint8", "bool"]
        return self.pick(["float32", "float64"] + exact * (not self.rough))

    def window(self, _):
        return self.pick([1, 2])

    def least(self, _):
        return self.pick([1, 5, 30])

    # --- expressions ---

    def operand(self, shape=None):
        """A name or number, that goes with a shape."""
        if self.chance(0.3) and shape is not None:
            return self.number(None)
        return self.goes(() if shape is None else shape, Plain, PlainValue, *[np.ndarray] * self.chance(0.3))

    def expression(self, _=None, shape=None, depth=None):
        depth = self.pick([1, 1, 2, 3]) if depth is None else depth
        if shape is None:
            x = self.a(None) if self.chance(0.7) else self.other(None)
            shape = self.world[x].shape
        else:
            x = self.operand(shape)
        x = x if depth == 1 else self.expression(None, shape, depth - 1)
        y = self.operand(shape) if depth < 3 or self.chance(0.7) else self.expression(None, shape, 1)
        group = self.random.choices(_EXPRESSIONS[1], _EXPRESSIONS[0])[0]
        return self.form(group, x=x, y=y, shape=shape)

    def unary(self, blanks):
        name = self.pick([name for name in _ufuncs(1) if (name in _EXACT - _FINE) != self.rough])
        return f"np.{name}({_DOMAINS.get(name, '{}') if self.rough else '{}'})".format(blanks["x"])

    def binary(self, _):
        rough = "add subtract multiply maximum minimum fmax fmin hypot logaddexp".split()
        return self.pick(rough if self.rough else [name for name in _ufuncs(2) if name in _EXACT])

    def identity(self, _):
        return self.pick(["same", "whole"])

    def reduction(self, names):
        inner = self.expression() if self.chance(0.5) else self.other(None)
        ndim = max(self.world[name].ndim for name in re.findall(r"\b[a-z]\b", inner))
        axes = ["", "", "axis=None"] + [f"axis={i}" for i in range(-ndim, ndim)]
        axes += ["axis=(0, -1)"] * (ndim > 1) + [f"axis={tuple(range(ndim))}"] * (ndim > 0)
        options = ", ".join([x for x in (self.pick(axes), self.pick(["", "", "keepdims=True"])) if x])
        if len(inner) == 1 and self.chance(0.5):
            return f"{inner}.{self.pick(names)}({options})"
        return f"np.{self.pick(names)}({inner}{', ' * bool(options)}{options})"

    def sum(self, _):
        return self.reduction(["sum", "sum", "mean", "var", "std"])

    def extreme(self, _):
        return self.reduction(["max", "min", "any", "all"])

    # --- failures and gradients ---

    def seen(self, blanks):
        return self.pick(["{D}", "{D}", "{A}.numpy()", "np.max({a})", "{A}.tolist()"]).format_map(blanks)

    def trying(self, _):
        return "try:\n    "

    def failed(self, _):
        return "\nexcept Exception:\n    print('failed')"

    def strict(self, _):
        return self.pick(["all='raise'", "divide='raise'", "invalid='raise', over='raise'"])

    def division(self, _):
        return self.pick("/*-")

    def mean(self, _):
        return self.pick(["sum", "sum", "mean"])

    def v1(self, _):
        return self.pick(self.names(PlainValue, test=_is_leaf))

    def v2(self, blanks):
        """Mostly another leaf of that shape: the rule of a sum may give both the same array."""
        first, leaves = blanks["v1"], self.names(PlainValue, test=_is_leaf)
        alike = [name for name in leaves if name != first and self.world[name].shape == self.world[first].shape]
        return self.pick(alike * self.chance(0.8) or leaves)

    def t1(self, _):
        return self.pick(self.names(Plain, test=lambda x: x.dtype.kind == "f") or self.names(PlainValue, test=_is_leaf))

    def differentiable(self, blanks):
        """A graph whose gradient NumPy's side knows."""
        return self.pick(_GRAPHS).strip().format_map(blanks)

    def graph(self, blanks):
        """Any other, over one leaf and Tensors: its gradient is compared with that of a run without distribution."""
        world = self.world
        leaf = blanks["v1"]
        self.world = {name: x for name, x in world.items() if len(name) > 1 or type(x) is Plain or name == leaf}
        try:
            return f"{self.expression(None, world[leaf].shape)} * {leaf}"
        finally:
            self.world = world


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def generate(rng: np.random.Generator) -> list[str]:
    """A random program."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return _Writer(int(rng.integers(1 << 62))).write()
