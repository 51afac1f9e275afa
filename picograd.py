"""PicoGrad: a tiny autograd engine in one file, on NumPy alone.

Reverse-mode automatic differentiation over a graph that ordinary code builds as it runs, from single numbers to large
arrays. Copy this file into a project and import it; NumPy's own functions are the interface:

    >>> from picograd import Value
    >>> import numpy as np
    >>> x = Value(2.0, label="x")
    >>> y = np.tanh(x) * x + x**2
    >>> y.backward()
    >>> print(f"{y.data:.4f} {x.grad:.4f}")
    5.9281 5.1053

The rooms, in reading order. Those above the cut are a complete engine; those below make it fast and large.

1. Primitives    what an operation is: how it is computed, and one vector-Jacobian rule per operand.
2. Arrays        raw values, how a primitive is computed on them, and Tensor, an array without gradient.
3. Value         a node of the graph: data, gradient, the primitive that made it and its operands; the backward sweep.
4. Gradients     `grad` and its kin: functions of functions.
5. Catalogue     every operation with its rule; the operators and methods of Value and Tensor.
6. nn            Module, Neuron, Layer, MLP, losses, SGD, Adam; also importable as `picograd.nn`.
7. draw          pictures of graphs, with Graphviz.
--------------   the cut
8. Blocks        large tensors: block programs on all cores, in threads or processes, and the array that defers them.
9. Optimizer     `optimize`: passes that make a traced graph small, and its lowering to a straight-line program.
10. Elsewhere    arrays of other libraries, such as Dask's.

To add an operation, call `primitive(forward, *vjps)`; nothing else in the file needs to change.
"""

from __future__ import annotations

import _thread
import atexit
import collections
import contextlib
import errno
import functools
import io
import itertools
import math
import operator
import os
import reprlib
import string
import sys
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "2.0"
__all__ = ["Value", "Tensor", "no_grad", "set_default_dtype", "primitive", "PRIMITIVES", "TABLE"]
__all__ += ["grad", "value_and_grad", "elementwise_grad", "jacobian", "hessian", "check_gradients"]
__all__ += ["relu", "sigmoid", "softplus", "gelu", "softmax", "log_softmax", "logsumexp"]
__all__ += ["nn", "Module", "Neuron", "Layer", "MLP", "SGD", "Adam", "draw"]
__all__ += ["mse_loss", "cross_entropy", "binary_cross_entropy_with_logits", "hinge_loss"]

# ---------------------------------------------------------------------------------------------------------------------
# 1. Primitives
#
# A primitive is an operation that the engine can differentiate: `forward` computes it on raw operands (Python floats
# and arrays), `vjps[i]` maps the gradient `g` of its output to the gradient of operand i (a vector-Jacobian product):
#
#     vjp(g, out, *operands, **params)        for example tanh:  lambda g, out, x: g * (1 - out * out)
#
# Rules are written with generic arithmetic and NumPy's functions, so one rule serves Python floats, arrays and Values;
# on Values a rule builds a graph, which is what gives gradients of gradients. A rule may return a gradient in the
# broadcast shape of its operands, or one that broadcasts to the operand's: `_fit` in room 3 is the one place that sums
# it back, or spreads it out.
# An operand whose rule is None carries no gradient.
#
# `TABLE` maps NumPy's callables to primitives, or, where an operation is a composition of others, to a function.
# ---------------------------------------------------------------------------------------------------------------------

TABLE: dict[Callable, Callable] = {}  # NumPy callable -> Primitive, or a function composed of primitives
PRIMITIVES: dict[str, Primitive] = {}  # by name: pickles find their primitives here, and the tests their samples


class Primitive:
    """One operation: `forward`, a rule per operand, and what the rest of the engine wants to know about it.

    Calling it dispatches: with a Value among the operands it makes a node, with a Tensor a Tensor, else it computes.
    """

    __slots__ = ("name", "symbol", "forward", "vjps", "reads", "scalar", "elementwise", "samples", "operands", "params")
    __slots__ += ("typed", "ufunc", "joint", "builtin")

    def __call__(self, *args, **kwargs):
        operands = args
        if self.operands is not None and (kwargs or len(args) != len(self.operands)):
            operands, kwargs = self._bind(args, kwargs)
        return _apply(self, operands, kwargs)

    def _bind(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Sorts a call's arguments into operands and parameters."""
        names = self.operands + self.params
        takes = f"{self.name}: takes {', '.join(names)} on a Value or Tensor"
        if len(args) > len(names):
            raise TypeError(f"{takes}; got {len(args)} arguments")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise TypeError(f"{takes}; argument {name!r} is not supported")
            if name in given:
                raise TypeError(f"{takes}; argument {name!r} came twice")
            given[name] = value
        given = {name: _python_numbers(x) for name, x in given.items()}  # such as an axis
        missing = [name for name in self.operands if name not in given]
        if missing:
            raise TypeError(f"{takes}; argument {missing[0]!r} is missing")
        operands = tuple(given.pop(name) for name in self.operands)
        for name, x in given.items():
            if isinstance(x, Array):
                raise TypeError(f"{self.name}: argument {name!r} is no operand, and takes no {type(x).__name__}")
        return operands, given

    def __repr__(self):
        return f"Primitive({self.name})"

    def __reduce__(self):
        if PRIMITIVES.get(self.name) is not self:
            raise ValueError(
                f"primitive {self.name!r}: another one has that name; to pickle it, give it a name= of its own"
            )
        return _primitive_named, (self.name,)

    def __deepcopy__(self, memo):
        return self


def _python_numbers(x):
    """NumPy's integers and truths as Python's own, also in a tuple."""
    if type(x) is tuple:
        return tuple(map(_python_numbers, x))
    return x.item() if isinstance(x, (np.integer, np.bool_)) else x


def _primitive_named(name: str) -> Primitive:
    if name not in PRIMITIVES:
        raise LookupError(
            f"primitive {name!r} is not registered here: call picograd.primitive for it before unpickling"
        )
    return PRIMITIVES[name]


def primitive(
    forward: Callable,
    *vjps: Callable | None,
    name: str | None = None,
    scalar: Callable | None = None,
    elementwise: bool | None = None,
    variadic: bool = False,
    joint: bool = False,
    reads: str = "out operands",
    typed: Sequence[int] | None = None,
    samples: Sequence = (),
) -> Primitive:
    """Adds an operation to the table and returns it as a function of Values, Tensors, arrays and numbers.

    forward: computes the result from arrays or numbers. A NumPy ufunc or function put here is found when NumPy calls
        it on a Value.
    vjps: one rule per operand, `vjp(g, out, *operands, **params)`, or None where an operand has no gradient. The names
        of operands and parameters (such as axis) are read from the rule. To be differentiable again, a rule uses
        arithmetic and functions of the table only. A result in the broadcast shape of the operands is summed back.
    name: how it is called in pictures, errors and pickles; the forward's own name unless given.
    scalar: a faster form on Python floats. May raise ArithmeticError or ValueError: then `forward` is used.
    elementwise: whether each output element depends on one element per operand (with broadcasting); so for ufuncs.
    variadic: any number of operands; then there is one rule, told which: `vjp(i, g, out, operands, **params)`.
    joint: variadic, and one call of the rule gives the gradients of all operands that are wanted (a truth for each):
        `vjp(wanted, g, out, operands, **params)` is a sequence, with None where there is none.
    reads: what the rules read besides g: "out", "operands", both or "". If no operands, then forward takes out=, and
        a result may be written over an operand that nobody else needs.
    typed: the operands that share one dtype, so that integers among them become floats where they meet floats. Unless
        given, those that have a rule, or all if none has; a condition or an index has none, and stays what it is.
    samples: for the gradient test. An interval per operand of an element-wise primitive, or a list of
        (shapes of the operands, parameters).

        >>> cube = primitive(lambda x: x**3, lambda g, out, x: g * 3 * x**2, name="cube")
        >>> x = Value(2.0)
        >>> cube(x).backward()
        >>> print(x.grad)
        12.0
    """
    if not callable(forward):
        raise TypeError(f"primitive: forward must be callable, got {forward!r}")
    if not vjps:
        raise TypeError("primitive: expected one vjp per operand (None for an operand without gradient), got none")
    for i, rule in enumerate(vjps):
        if rule is not None and not callable(rule):
            raise TypeError(f"primitive: the vjp of operand {i} must be callable or None, got {rule!r}")
    new, variadic = Primitive(), variadic or joint
    new.name, new.joint = name or forward.__name__, joint
    new.symbol, new.scalar = _OPERATORS.get(forward, ("", new.name, scalar))[1:]
    new.forward, new.vjps, new.builtin = forward, vjps, False
    new.ufunc = isinstance(forward, np.ufunc)
    ruled = tuple([i for i, rule in enumerate(vjps) if rule])
    new.typed = typed if typed is not None or variadic or not ruled or len(ruled) == len(vjps) else ruled
    new.elementwise = (
        isinstance(forward, np.ufunc) and forward.signature is None if elementwise is None else elementwise
    )
    new.reads = reads
    new.samples = samples or ((_REAL,) * len(vjps) if new.elementwise else ())
    names = _argument_names(next((rule for rule in vjps if rule), None))[4 if variadic else 2 :]
    names = names or _argument_names(forward)
    new.operands = None if variadic else (names or ("x", "y", "z"))[: len(vjps)]
    params = names if variadic else names[len(vjps) :]
    new.params = tuple(name for name in params if name not in ("out", "where"))
    TABLE[forward] = new
    if not getattr(PRIMITIVES.get(new.name), "builtin", False):  # those keep their names
        PRIMITIVES[new.name] = new
    return new


def _argument_names(function) -> tuple[str, ...]:
    """The parameters of a Python function, also of one of NumPy's; () of anything else."""
    code = getattr(getattr(function, "_implementation", function), "__code__", None)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()


def composed(*keys: Callable) -> Callable:
    """Enters a function that is made of other entries: it needs no rule of its own.

    Beside a Value, its Tensors become nodes, so that what it computes of them alone is computed anew by a replay.
    """

    def enter(function):
        names = _argument_names(function)
        operands = [name for name in names if name not in _OPTIONS]
        if len(operands) == 1 and operands[0] not in ("arrays", "tup"):  # nothing that Tensors could meet here
            TABLE.update(dict.fromkeys(keys, function))
            return function

        @functools.wraps(function)
        def call(*args, **kwargs):
            if any([isinstance(x, Value) for x in _members(*args, *kwargs.values())]):
                named = itertools.zip_longest(args, names[: len(args)])
                args = tuple([x if name in _OPTIONS else _recorded(x) for x, name in named])
                kwargs = {name: x if name in _OPTIONS else _recorded(x) for name, x in kwargs.items()}
            return function(*args, **kwargs)

        TABLE.update(dict.fromkeys(keys, call))
        return function

    return enter


# Parameters that say how large a result is, what is where, or how it is made: no operands, and a replay keeps them.
_OPTIONS = frozenset(
    """repeats shift indices_or_sections pad_width reps shape window_shape axis axes axis1 axis2 source
destination k offset n order kind stable keepdims ord mode constant_values copy nan posinf neginf optimize""".split()
)


def _members(*args) -> list:
    """Arguments, and what is in those that are lists or tuples, at any depth."""
    return [y for x in args for y in (_members(*x) if isinstance(x, (list, tuple)) else (x,))]


def _recorded(x):
    """An argument with its Tensors as nodes."""
    if isinstance(x, (list, tuple)):
        return [_recorded(i) for i in x]
    return _record(_detach, (x,)) if isinstance(x, Tensor) else x


def _matmul(x, y):
    """`np.matmul`; of two matrices by their method dot, which gets to BLAS in half the time. But one number times a
    matrix that does by what skips zeros, and with them nan and infinity."""
    if type(x) is type(y) is np.ndarray and x.ndim == y.ndim == 2 and x.size > 1 < y.size:
        return x.dot(y)
    return np.matmul(x, y)


# Python's operators: forward -> (special method, symbol, form on Python floats).
_OPERATORS = {
    np.add: ("add", "+", operator.add),
    np.subtract: ("sub", "-", operator.sub),
    np.multiply: ("mul", "*", operator.mul),
    np.divide: ("truediv", "/", operator.truediv),
    np.power: ("pow", "**", math.pow),
    np.remainder: ("mod", "%", operator.mod),
    np.floor_divide: ("floordiv", "//", operator.floordiv),
    _matmul: ("matmul", "@", None),
    np.bitwise_and: ("and", "&", None),
    np.bitwise_or: ("or", "|", None),
    np.bitwise_xor: ("xor", "^", None),
    np.equal: ("eq", "==", operator.eq),
    np.not_equal: ("ne", "!=", operator.ne),
    np.less: ("lt", "<", operator.lt),
    np.less_equal: ("le", "<=", operator.le),
    np.greater: ("gt", ">", operator.gt),
    np.greater_equal: ("ge", ">=", operator.ge),
    np.negative: ("neg", "-", operator.neg),
    np.positive: ("pos", "+", operator.pos),
    np.absolute: ("abs", "abs", abs),
    np.invert: ("invert", "~", None),
}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Arrays
#
# What a node or a Tensor holds is a raw value. In: anything array-like. Out: raw values, and Tensors around them.
#
#     a Python float, int, bool     a weak number: double precision, and it takes the dtype of the arrays that it meets
#     a NumPy scalar, an ndarray      strong: they have a dtype. A raw value never is a 0-d ndarray: that is a scalar
#     other types                     come through `KINDS`, which knows for each type how it computes and is written to
#
# `_evaluate` computes a primitive on raw values: it settles the dtypes, and the kind of highest rank among the operands
# does the rest. `_apply` does so for operands of any sort, and wraps the result: Value, Tensor, or neither.
# Invariant: what is computed of weak numbers alone is a weak number or a float64 array, and `type(raw) is float` is the
# sign of a weak float: np.float64 is a subclass of float, and strong.
#
#     >>> (Tensor([1, 2]) * 2.0).dtype, (Tensor([1, 2]) * np.array([0.1, 0.2])).dtype
#     (dtype('float32'), dtype('float32'))
#     >>> (Tensor(2.0) * np.array([0.1, 0.2])).dtype
#     dtype('float64')
# ---------------------------------------------------------------------------------------------------------------------

_new = object.__new__
_NUMBERS = (float, int, np.bool_, np.integer, np.floating)


class Kind:
    """What the engine asks of the raw values of one type; here, the answers for NumPy's arrays and scalars.

    rank: of the kinds of a primitive's operands, the one of highest rank computes it.
    lazy: whether looking at numbers costs a computation elsewhere.
    """

    rank, lazy = 1, False

    def enter(self, data, dtype: np.dtype | None, choice: bool | None, who: str):
        """The raw value of a Tensor or Value made from data; `who` is named in errors."""
        return self.own(data if dtype is None else data.astype(dtype))

    def constant(self, x, who: str):
        """The raw value of a constant operand."""
        return x

    def evaluate(self, prim: Primitive, raw: Sequence, params: dict):
        """The forward of a primitive on raw operands of this kind and lower ones, whose dtypes are settled."""
        if not prim.ufunc:
            raw = _strengthened(prim, raw)
        out = prim.forward(*raw, **params)
        return out if params.get("dtype") is float else _result(prim, out)

    def hand_out(self, raw):
        """What `.data` gives away: NumPy's array or scalar, or what stands for it."""
        return raw

    def fetch(self, raws: Sequence) -> list:
        """NumPy's arrays and scalars for raw values of this kind, to be read at once; several are got in one pass."""
        return list(raws)

    def own(self, raw):
        """The same data, held by nobody else."""
        return raw.copy("K") if type(raw) is np.ndarray else raw

    def shared(self, raw) -> bool:
        """Whether the memory of a raw value may be another's, too."""
        return type(raw) is np.ndarray and raw.base is not None

    def same(self, raw, x) -> bool:
        """Whether x is the raw value, or what `hand_out` gives for it."""
        return x is raw

    def write(self, raw, new):
        """In place: gives raw the data of `new`, of its shape; what holds it from now on."""
        np.copyto(raw, _fetched(new), casting="same_kind")
        return raw

    def target(self, raw) -> np.ndarray | None:
        """The array to which an operation in place may write its result at once; None if there is none."""
        return raw if type(raw) is np.ndarray else None

    def rule(self, prim: Primitive, rule: Callable) -> Callable:
        """A rule, as it is to be called on operands or gradients of this kind."""
        return rule

    def guard(self, name: str, raw):
        """A context for a call of NumPy's function of that name on raw values such as this."""
        return contextlib.nullcontext()

    def text(self, raw) -> str:
        """What repr adds to shape and dtype."""
        return ""


class _Weak(Kind):
    """Python's numbers. Where Python raises though IEEE arithmetic has an answer, NumPy gives that and its warning."""

    rank = 0

    def evaluate(self, prim, raw, params):
        if prim.scalar is not None and not params and all([type(x) is float for x in raw]):
            try:
                return prim.scalar(*raw)
            except (ArithmeticError, ValueError):
                pass
        raw = [self.hand_out(x) for x in raw]
        out = prim.forward(*raw, **params)
        if not prim.builtin:
            out = _result(prim, out)
        if "dtype" in params:
            return _settle(out)
        if getattr(out, "dtype", None) in (np.float16, np.float32):  # as NumPy has functions of masks
            out = prim.forward(*map(np.float64, raw), **params)
        out = _settle(out)
        return out if type(out) is np.ndarray else _number(out)

    def hand_out(self, raw):
        return np.float64(raw) if type(raw) is float else np.asarray(raw)[()]

    def fetch(self, raws):
        return [self.hand_out(raw) for raw in raws]

    def own(self, raw):
        return raw


class _Kinds(dict):
    """The kind of each type of raw value; None for types that are not arrays by themselves, such as list.

    A type met for the first time is looked at once: `finders` are functions of a type that return its kind or None.
    """

    def __init__(self, kinds):
        super().__init__(kinds)
        self.finders: list[Callable] = []

    def __missing__(self, cls: type) -> Kind | None:
        if issubclass(cls, np.ma.MaskedArray):
            raise TypeError(f"{cls.__name__}: its mask would be lost; pass .filled(...) or .data")
        if hasattr(cls, "_picograd"):
            raise TypeError(_two_copies(cls))
        if issubclass(cls, (np.ndarray, np.generic)):
            found = self[np.ndarray]
        else:
            found = next(filter(None, (find(cls) for find in self.finders)), None)
        self[cls] = found
        return found


WEAK, NUMPY = _Weak(), Kind()
KINDS = _Kinds({float: WEAK, int: WEAK, bool: WEAK, np.ndarray: NUMPY, list: None, tuple: None})


class _Hook:
    """Where large arrays are taken over: by nobody, unless a room below puts another hook here.

    limit: elements from which an ndarray is shown to `adopt`, as the data of a new Tensor or Value and as an operand.
    """

    limit: float = math.inf

    def adopt(self, raw, choice: bool | None, dtype: np.dtype | None = None):
        """A raw value in place of another.

        choice: the Tensor's distributed=.
        dtype: given where a Tensor or Value is made: the result is a copy, of that dtype. None for what is there
            already, which others may have, too.
        """
        if choice:
            raise RuntimeError("Tensor: distributed=True needs room 8, Blocks, which this copy of picograd.py lacks")
        return raw if dtype is None else raw.astype(dtype)

    def distributed(self, raw, choice: bool | None) -> bool:
        """Whether a Tensor with that raw value and choice counts as distributed."""
        return False


HOOK = _Hook()


def _two_copies(cls: type) -> str:
    """The message for a Value or Tensor of another copy of this file, or of this one before a reload."""
    theirs = getattr(sys.modules.get(cls.__module__), "__file__", "?")
    which = "before it was loaded anew" if cls.__module__ == __name__ else f"of {cls.__module__} ({theirs})"
    return f"a {cls.__name__} {which} met {__name__} ({__file__}): two copies of picograd do not share their graphs"


# --- entering: what users pass becomes a raw value ---


def _number(x):
    """A number of Python's or NumPy's as Python's: weak."""
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    return float(x) if isinstance(x, (float, np.floating)) else int(x)


class set_default_dtype:  # a function to its users, and as a context manager it restores what was before
    """Sets the floating dtype of arrays and sequences in `Value(...)`, `Tensor(...)` and layers: float32 at first.

    Until the end of the block in `with set_default_dtype(np.float64):`, else from now on. TypeError for another dtype.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, dtype: Any):
        new = np.dtype(dtype)
        if new.kind != "f":
            raise TypeError(f"set_default_dtype: dtype must be floating, got {new}")
        self.before, set_default_dtype.dtype = set_default_dtype.dtype, new

    def __enter__(self):
        return self

    def __exit__(self, *error):
        set_default_dtype.dtype = self.before


def _as_raw(data: Any, dtype: Any, who: str, kinds: str = "fiub", choice: bool | None = None) -> Any:
    """Copies data into a raw value; dtype float32 unless given, or data is a number or has one of its own."""
    expected = "floating" if kinds == "f" else "floating, integer or boolean"
    if dtype is not None:
        dtype = np.dtype(dtype)
        if dtype.kind not in kinds:
            raise TypeError(f"{who}: dtype must be {expected}, got {dtype}")
    if isinstance(data, Array):
        data = data._data
        dtype = dtype or getattr(data, "dtype", None)
        if dtype is not None and dtype.kind not in kinds:
            raise TypeError(f"{who}: the dtype of data must be {expected}, got {dtype}; pass dtype=")
        if dtype is None and kinds != "f":
            return data if choice is None else HOOK.adopt(data, choice)
    if dtype is None and isinstance(data, _NUMBERS):
        return float(data) if choice is None else HOOK.adopt(float(data), choice)
    kind = KINDS[type(data)]
    if kind is not None and kind.rank > NUMPY.rank:
        if data.dtype.kind not in (kinds if dtype is None else "fiub"):
            raise TypeError(f"{who}: the dtype of data must be {expected}, got {data.dtype}; pass dtype=")
        return kind.enter(data, dtype, choice, who)
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise ValueError(f"{who}: data must be rectangular, got ragged nested sequences ({error})") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{who}: data must be real numbers, got {type(data).__name__} of dtype {array.dtype}")
    dtype = np.dtype(dtype or set_default_dtype.dtype)
    if choice is not None or array.size >= HOOK.limit:
        return _settle(HOOK.adopt(array, choice, dtype))
    return _settle(array.astype(dtype))


def _constant(x, who: str):
    """An operand that is neither Value nor Tensor as a raw value: not copied, and a number is Python's."""
    if isinstance(x, _NUMBERS):
        return _number(x)
    kind = KINDS[type(x)]
    if kind is not None and kind.rank > NUMPY.rank:
        return kind.constant(x, who)
    if kind is None and not isinstance(x, (list, tuple)):
        raise TypeError(f"{who}: expected a Value, Tensor, array or number, got {type(x).__name__}")
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{who}: operand must be rectangular, got ragged sequences ({error})") from None
    if x.dtype.kind not in "fiub":
        raise TypeError(f"{who}: operands must be real numbers, got an array of dtype {x.dtype}")
    return x


def _conform(x, like, who, choice: bool | None = None):
    """x, copied, as a replacement of the raw value `like`: of its dtype, and of its shape if x is a number."""
    x = _raw(x)
    if type(like) is float and type(x) in _WEAK_TYPES:
        return float(x)
    x = _constant(x, who)
    if KINDS[type(like)] is WEAK:
        if np.ndim(x):
            raise ValueError(f"{who}: expected a number, got shape {np.shape(x)}")
        return type(like)(_fetched(x))
    if np.ndim(like) and not np.ndim(x):
        if not _lazy(x):
            return np.full_like(like, x)
        x = np.broadcast_to(x, like.shape)
    return _as_raw(x, like.dtype, who, choice=choice)


# --- leaving ---


def _settle(out):
    """A result of NumPy as a raw value."""
    return out[()] if type(out) is np.ndarray and not out.ndim else out


def _result(prim: Primitive, out):
    """What a forward gave for arrays as a raw value. A user's may give anything: it becomes an array."""
    if isinstance(out, np.floating):  # the usual case: a sum, say
        return out
    if type(out) is not np.ndarray and not isinstance(out, np.generic):
        out = np.asarray(out)
    if out.dtype.kind not in "fiub":
        raise TypeError(f"{prim.name}: its forward must give real numbers, got dtype {out.dtype}")
    return _settle(out)


def _raw(x):
    """The raw value of a Value or Tensor; anything else as it is."""
    return x._data if isinstance(x, Array) else x


def _public(raw):
    """A raw value as it is handed out: weak numbers become NumPy scalars."""
    return KINDS[type(raw)].hand_out(raw)


def _lazy(x) -> bool:
    """Whether looking at the numbers of anything costs a computation elsewhere."""
    kind = KINDS[type(_raw(x))]
    return kind is not None and kind.lazy


def _fetched(x):
    """A raw value, or anything array-like, as NumPy's array or scalar, to be read at once."""
    kind = KINDS[type(x)]
    return np.asarray(x) if kind is None else kind.fetch([x])[0]


# --- how a primitive is computed: settle the dtypes, evaluate, wrap ---


def _harmless(state: dict) -> bool:
    """Whether no floating-point fault becomes an error or a call, by NumPy's errstate and the filters of warnings."""
    if not _QUIET.issuperset(state.values()):
        return False
    return not any([how == "error" and issubclass(RuntimeWarning, kind) for how, _, kind, *_ in warnings.filters])


_QUIET = frozenset(("ignore", "warn"))


def _strong(prim: Primitive, raw: Sequence) -> list[tuple[int, np.dtype]]:
    """Places and dtypes of the operands that have one, of those that share it: an index does not, nor a condition."""
    places = range(len(raw)) if prim.typed is None else prim.typed
    return [(i, raw[i].dtype) for i in places if type(raw[i]) not in _WEAK_TYPES]


def _lifted(prim: Primitive, operands: Sequence) -> tuple:
    """Operands with their constants as raw values, of the dtypes in which a node keeps them.

    Raw floating arrays take the dtype of the strong floating Values and Tensors that they meet, and so do integers and
    masks; without such, all is as in NumPy.
    """
    operands = [x if isinstance(x, Array) else _constant(x, prim.name) for x in operands]
    raw = [_raw(x) for x in operands]
    strong = _strong(prim, raw)
    if not strong:
        if float in map(type, raw):  # a whole number beside weak floats is one of them
            operands = [float(x) if type(x) is int else x for x in operands]
        return tuple(operands)
    held = [dtype for i, dtype in strong if dtype.kind == "f" and isinstance(operands[i], Array)]
    dtype = np.result_type(*(held or [dtype for _, dtype in strong]))
    for i, own in strong:
        if own != dtype and (own.kind == "f" or held) and not isinstance(operands[i], Array):
            operands[i] = operands[i].astype(dtype)
    if dtype.kind == "f":
        for i in range(len(operands)) if prim.typed is None else prim.typed:
            if type(operands[i]) is int:
                operands[i] = float(operands[i])
    return tuple(operands)


def _promoted(prim: Primitive, raw: Sequence) -> Sequence:
    """Raw operands with integers and masks in the dtype of the strong floats that they meet."""
    strong = _strong(prim, raw)
    floats = [dtype for _, dtype in strong if dtype.kind == "f"]
    if not floats or len(floats) == len(strong):
        return raw
    dtype, raw = np.result_type(*floats), list(raw)
    for i, own in strong:
        if own.kind != "f":
            raw[i] = raw[i].astype(dtype)
    return raw


def _strengthened(prim: Primitive, raw: Sequence) -> Sequence:
    """Raw operands with weak numbers as scalars of the dtype that they take: only ufuncs know numbers without one."""
    if not any([type(x) in _WEAK_TYPES for x in raw]):
        return raw
    dtypes, raw = [dtype for _, dtype in _strong(prim, raw)], list(raw)
    for i in range(len(raw)) if prim.typed is None else prim.typed:
        if type(raw[i]) in _WEAK_TYPES:
            with contextlib.suppress(OverflowError):  # a whole number that does not fit is left to the function
                raw[i] = np.result_type(*dtypes, raw[i]).type(raw[i])
    return raw


_WEAK_TYPES = frozenset((float, int, bool))


def _evaluate(prim: Primitive, raw: Sequence, params: dict):
    """The forward of a primitive on raw operands: a raw value."""
    kind = WEAK
    for x in raw:
        other = KINDS[type(x)]
        if other.rank > kind.rank:
            kind = other
    return kind.evaluate(prim, _promoted(prim, raw) if kind.rank else raw, params)


def _apply(prim: Primitive, operands: tuple, params: dict):
    """Computes a primitive on any sort of operands: a node if one is a Value, a Tensor if one is, else a raw result."""
    result, floats, plain, dtype, limit, ndarray, raw = None, True, True, None, HOOK.limit, np.ndarray, []
    for x in operands:
        if isinstance(x, Value):
            result, x = Value, x._data
        elif isinstance(x, Tensor):
            result, x = result or Tensor, x._data
        if type(x) is ndarray:
            floats, own = False, x.dtype
            if own is not dtype:
                plain, dtype = plain and dtype is None, own
            if x.size >= limit:
                plain = False
        elif type(x) is not float:
            floats = plain = False
        elif not prim.ufunc:
            plain = False
        raw.append(x)
    if result is None:
        kinds = [KINDS[type(x)] for x in operands]
        if any([kind is not None and kind.rank > NUMPY.rank for kind in kinds]):
            return _evaluate(prim, operands, params)
        return prim.forward(*operands, **params)
    if floats:
        out = WEAK.evaluate(prim, raw, params)
    elif plain and dtype.kind == "f":
        out = prim.forward(*raw, **params)  # what `_evaluate` would do for arrays of one dtype, without its questions
        if type(out) is not ndarray or not out.ndim or not prim.builtin:
            out = _result(prim, out)
    else:
        constants = any([type(x) is not float and not isinstance(x, Array) for x in operands])
        if constants:
            operands = _lifted(prim, operands)
        if constants or limit < math.inf:
            for x in operands:
                if isinstance(x, Array) and type(x._data) is np.ndarray and x._data.size >= limit:
                    x._adopt()
            raw = [_raw(x) for x in operands]
        out = _evaluate(prim, raw, params)
    if result is Value:
        return _node(out, prim, operands, params)
    choices = {x._choice for x in operands if isinstance(x, Tensor)}
    return _wrap(out, next(choice for choice in (True, None, False) if choice in choices))


class Array:
    """What Tensor and Value share. Operators, and a method for every entry of the table, are added in room 5."""

    __slots__ = ("_data", "__weakref__")
    __hash__ = object.__hash__
    _picograd = True  # how another copy of this file is known

    shape: tuple[int, ...] = property(lambda self: getattr(self._data, "shape", ()))
    ndim: int = property(lambda self: len(self.shape))
    size: int = property(lambda self: math.prod(self.shape))
    dtype: np.dtype = property(lambda self: (self._data if hasattr(self._data, "dtype") else _public(self._data)).dtype)
    nbytes: int = property(lambda self: self.size * self.dtype.itemsize)
    T = property(lambda self: np.transpose(self))
    mT = property(lambda self: np.matrix_transpose(self))

    def _adopt(self) -> None:
        """Lets the hook take over the raw value, which is of its limit or more."""
        self._data = HOOK.adopt(self._data, None)

    def item(self) -> float | int | bool:
        """The one element as a Python number; ValueError if there are more."""
        raw = self._data
        if type(raw) is float:
            return raw
        if isinstance(raw, np.generic):
            return raw.item()
        if self.size != 1:
            raise ValueError(f"{type(self).__name__}.item: expected one element, got shape {self.shape}")
        return self._look().item()

    def tolist(self) -> Any:
        return self._look().tolist()

    def _look(self):
        """The numbers as NumPy's, to be read at once. A node that is one lazy number keeps it for the next look."""
        raw = _fetched(self._data)
        if _lazy(self._data) and not self.ndim:
            holder = getattr(self, "_owner", None) or (self, "_data")
            if getattr(holder[0], "_prim", None) and getattr(*holder) is self._data:
                setattr(*holder, raw)
                self._data = raw
        return raw

    def reshape(self, *shape):
        return np.reshape(self, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes):
        if len(axes) == 1 and not isinstance(axes[0], (int, np.integer)):
            axes = axes[0]
        return np.transpose(self, axes or None)

    def flatten(self):
        """A copy in one dimension; `ravel` is a view where it can be."""
        return np.copy(np.ravel(self))

    def copy(self):
        """A copy in C order, as of ndarray's method; `np.copy` keeps the order."""
        if type(self._data) is np.ndarray and not self._data.flags.c_contiguous:
            return np.reshape(np.ravel(self), self.shape)
        return np.copy(self)

    def astype(self, dtype: Any):
        dtype, kinds = np.dtype(dtype), "f" if isinstance(self, Value) else "fiub"
        if dtype.kind not in kinds:
            raise TypeError(f"astype: dtype must be {'floating' if kinds == 'f' else 'real'}, got {dtype}")
        return _as_dtype(self, dtype)

    def __getitem__(self, index):
        index = tuple([_index_part(i) for i in index]) if isinstance(index, tuple) else (_index_part(index),)
        parts = [i for i in index if isinstance(i, Array)]
        return _getitem(self, *parts, index=tuple([_HOLE if isinstance(i, Array) else i for i in index]))

    def __len__(self):
        if not self.ndim:
            raise TypeError(f"a 0-d {type(self).__name__} has no length and cannot be iterated over")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __contains__(self, x):
        return bool(np.any(np.equal(self._data, _raw(x))))

    def __bool__(self):
        return bool(self._data)

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __index__(self):
        return operator.index(self.item())

    def __round__(self, decimals=0):
        return np.round(self, decimals)


class Tensor(Array):
    """An array without gradient, with NumPy's arithmetic, functions and methods.

    data: numbers, nested sequences, an array, a Tensor or a Value; copied. Arrays become float32 unless dtype says
        otherwise or data is a Tensor or Value; a single number is held in double precision and is weak, like a Python
        float. Ragged sequences raise ValueError; complex, text, objects and masked arrays TypeError. An array of
        another library that speaks NumPy's protocols, such as a `dask.array`, is kept, with its dtype, and counts as
        distributed.
    dtype: a floating, integer or boolean NumPy dtype.
    distributed: True or False to force it, None to leave it to `set_distributed_config`.

    A 0-d Tensor behaves like a number: comparisons give NumPy's bool, formatting works, and `+=` makes a new one.
    What is computed of Tensors alone is a new Tensor, which a replay does not compute anew.
    """

    __slots__ = ("_choice", "_owner")

    def __init__(self, data: Any, dtype: Any = None, distributed: bool | None = None):
        if not (distributed is None or isinstance(distributed, bool)):
            raise TypeError(f"Tensor: distributed must be True, False or None, got {distributed!r}")
        self._data = _as_raw(data, dtype, "Tensor", choice=distributed)
        self._choice, self._owner = distributed, None

    @property
    def data(self) -> np.ndarray | np.generic:
        """The array itself (writing to it is seen here); a NumPy scalar for 0-d."""
        return _public(self._data)

    @data.setter
    def data(self, new):
        if not _written_back(new, self._data, self, None):
            self._become(_conform(new, self._data, "Tensor.data", self._choice))

    def _become(self, raw) -> None:
        """Holds another raw value from now on; so does the Value that handed this Tensor out."""
        self._data = raw
        if self._owner:
            setattr(*self._owner, raw)

    def _adopt(self) -> None:
        if self._choice is not False:
            raw = HOOK.adopt(self._data, self._choice)
            if self._owner and getattr(*self._owner) is self._data:
                setattr(*self._owner, raw)
            self._data = raw

    @property
    def distributed(self) -> bool:
        """Whether it counts as distributed: forced, or large enough by the configuration in force; never if 0-d."""
        return KINDS[type(self._data)].lazy or HOOK.distributed(self._data, self._choice)

    def enable_distributed(self) -> None:
        """From now on, distributed whatever its size. RuntimeError where the file was cut above room 8."""
        self._data, self._choice = HOOK.adopt(self._data, True), True

    def disable_distributed(self) -> None:
        """From now on, computed by NumPy whatever its size."""
        self._data, self._choice = HOOK.adopt(self._data, False), False

    def numpy(self) -> np.ndarray:
        """A copy as an ndarray."""
        return np.array(_fetched(self._data))

    def __array__(self, dtype=None, copy=None):
        return np.array(_fetched(self._data), dtype) if copy else np.asarray(_public(self._data), dtype)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if any(isinstance(x, Value) for x in inputs):
            return NotImplemented
        if method == "__call__" and not kwargs and ufunc in TABLE:
            return TABLE[ufunc](*inputs)
        return _on_arrays(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        if any(issubclass(kind, Value) for kind in kinds):
            return NotImplemented
        entry = TABLE.get(function)
        if entry is not None and not {"out", "where", "dtype"} & kwargs.keys():
            with contextlib.suppress(TypeError):  # of what the entry does not take
                return _call_entry(entry, function, args, kwargs)
        return _on_arrays(function, args, kwargs)  # no gradient is needed: NumPy itself will do

    def __setitem__(self, index, new):
        if not self.ndim:
            raise TypeError("a 0-d Tensor cannot be indexed; assign to .data")
        index = tuple(map(_public_index, index)) if isinstance(index, tuple) else _public_index(index)
        if isinstance(new, Value):
            new._end("tensor[...] = Value")
        new = _raw(new)
        _public(self._data)[index] = new if KINDS[type(self._data)].lazy else _fetched(new)

    def __reduce__(self):
        return _restored, (type(self), self._data, self._choice), _extra(self, Tensor)

    def __copy__(self):
        return _with_extra(_restored(type(self), _owned(self._data), self._choice), _extra(self, Tensor))

    def __repr__(self):
        if not self.ndim:
            return f"Tensor({self._data})"
        kind = KINDS[type(self._data)]
        values = kind.text(self._data)
        if not kind.lazy and self.size <= 8:
            values = f", data={self.tolist()}"
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, distributed={self.distributed}{values})"

    def __str__(self):
        return repr(self) if self.ndim else str(self._look())

    def __format__(self, spec):
        if spec and self.ndim:
            raise TypeError(f"Tensor: format {spec!r} needs one number, got shape {self.shape}")
        return format(self._look(), spec) if spec else str(self)


def _public_index(i):
    i = _raw(i)
    return _public(i) if KINDS[type(i)] else i


def _wrap(raw, choice=None, owner=None) -> Tensor:
    """A Tensor around a raw value, not copied; with an owner (object, attribute), assigning to .data writes through."""
    tensor = _new(Tensor)
    tensor._data, tensor._choice, tensor._owner = raw, choice, owner
    return tensor


def _written_back(new, raw, owner, attribute) -> bool:
    """Whether what is assigned is what was handed out for a raw value: its array, or the Tensor that shares it; or what
    it is assigned to."""
    if new is owner and attribute != "_grad":
        return True
    if not isinstance(new, Array):
        return KINDS[type(raw)].same(raw, new)
    whose = getattr(new, "_owner", None)
    return new._data is raw and whose is not None and whose[0] is owner and whose[1] == attribute


def _restored(cls: type, raw, choice) -> Tensor:
    """A pickled or copied Tensor."""
    tensor = _new(cls)
    tensor._data, tensor._choice, tensor._owner = raw if choice is None else HOOK.adopt(raw, choice), choice, None
    return tensor


def _each(f: Callable, x):
    """f of everything in an argument, however nested."""
    if not isinstance(x, (list, tuple)):
        return f(x)
    items = [_each(f, i) for i in x]
    return type(x)(items) if type(x) in (list, tuple) else type(x)(*items)


def _on_arrays(function, args, kwargs):
    """Calls a function of NumPy on the arrays of Tensors, however nested, and wraps what comes out; dtypes are settled
    as for a primitive, but for integers, which may be indices, and masks: these only where a ufunc computes."""
    operands = _members(*args)
    held = [x for x in operands if isinstance(x, Tensor)]
    weak = all([type(_raw(x)) in _WEAK_TYPES for x in operands if isinstance(x, (Tensor, np.ndarray))])
    floats = [x.dtype for x in held if type(x._data) not in _WEAK_TYPES and x.dtype.kind == "f"]
    settled = "fiub" if isinstance(getattr(function, "__self__", function), np.ufunc) else "f"
    settled = "" if getattr(function, "__name__", "") in ("at", "reduceat") or not floats else settled
    lazy = [_raw(x) for x in (*operands, *kwargs.values()) if isinstance(x, Array) and _lazy(x)]

    def bare(x):
        raw = _raw(x)
        strong = type(raw) is np.ndarray and raw.dtype.kind in settled
        if strong and not (isinstance(x, Tensor) and raw.dtype.kind == "f"):
            raw = raw.astype(np.result_type(*floats), copy=False)
        return raw

    def wrapped(x):
        if getattr(getattr(x, "dtype", None), "kind", "O") not in "fiub":
            return x
        x = _settle(x)
        return _wrap(_number(x) if weak and isinstance(x, np.generic) else x)

    target = kwargs.get("out")
    guard = KINDS[type(lazy[0])].guard(function.__name__, lazy[0]) if lazy else contextlib.nullcontext()
    with guard:
        out = function(*_each(bare, args), **{name: _each(_raw, x) for name, x in kwargs.items()})
    if target is None:
        return _each(wrapped, out)
    return target[0] if isinstance(target, tuple) and len(target) == 1 else target


# ---------------------------------------------------------------------------------------------------------------------
# 3. Value
#
# A node of the graph: raw data, the primitive that made it and its operands. Nodes are numbered as they are made, after
# their operands; so "newest first" is an order in which every node comes before its operands, and the backward sweep is
# a loop over nodes sorted by number, with no recursion however deep the graph.
# Invariant: once made, only a node's data (in a replay) and its gradient change.
# ---------------------------------------------------------------------------------------------------------------------


class _Mode(threading.local):
    recording = True  # whether operations make nodes with history, in this thread
    tracing = False  # whether arrays stay plain, in this thread
    depth = 0  # how many gradient functions are at work around this call, in this thread

    def __init__(self):
        self.listed: list[weakref.ref] = []  # of `_Listed`: what pickles under way have listed


_mode = _Mode()
_ENDS = "its gradient ends here; use NumPy's functions, or say .item() or .detach() where no gradient is wanted"
_next_number = itertools.count(1).__next__
_NO_PARAMS: dict[str, Any] = {}


class Value(Array):
    """A number or array that is differentiated.

    data: a number computes in double precision and is weak (it takes on the dtype of arrays that it meets); arrays and
        sequences become float32 unless dtype says otherwise, Tensors and Values keep their dtype. The data is copied.
    dtype: a floating NumPy dtype.
    label: a name, for pictures and messages.

    Operators, methods and NumPy's functions make new Values. Other operands may be Tensors (inputs without gradient),
    numbers and raw arrays (constants, kept by reference: changing such an array before `backward` is an error that
    is not noticed). Comparisons and the like give Values without gradient, which can stand in an `if`.
    """

    # An operation on numbers has its operands in _x and _y (None if there is but one): then the node is the one object
    # that Python's collector has to follow. Any other has all its operands in the tuple _x, and parameters in _y.
    __slots__ = ("_grad", "_prim", "_x", "_y", "_needs", "_number", "label")

    def __init__(self, data: Any, dtype: Any = None, label: str = ""):
        if not isinstance(label, str):
            raise TypeError(f"Value: label must be a string, got {label!r}")
        self._data = data if type(data) is float and dtype is None else _as_raw(data, dtype, "Value", "f")
        self._grad = self._prim = None
        self._x, self._y, self._needs, self._number, self.label = (), _NO_PARAMS, True, _next_number(), label

    # --- data and gradient ---

    @property
    def data(self) -> Tensor:
        """The data as a Tensor; assigning to it, or to its `.data`, changes this Value."""
        return _wrap(self._data, None, (self, "_data"))

    @data.setter
    def data(self, new):
        if not _written_back(new, self._data, self, "_data"):
            new = _conform(new, self._data, "Value.data")
            if np.shape(new) != self.shape:
                self._grad = None  # it was that of other data
            self._data = new

    @property
    def grad(self) -> Tensor:
        """The gradient as a Tensor, zeros before any backward; assign 0 or None to reset it."""
        if self._grad is None:
            self._grad = _filled_like(self._data, 0)
        elif type(self._grad) is np.ndarray and not self._grad.flags.writeable:  # a broadcast view of an inner node
            self._grad = self._grad.copy()
        return _wrap(self._grad, None, (self, "_grad"))

    @grad.setter
    def grad(self, new):
        if new is None:
            self._grad = None
        elif self._grad is None or not _written_back(new, self._grad, self, "_grad"):
            new = _conform(new, _filled_like(self._data, 0), "Value.grad")
            if type(new) is not float and np.shape(new) != self.shape:
                raise ValueError(f"Value.grad: expected shape {self.shape}, got {np.shape(new)}")
            self._grad = _fetched(new) if _lazy(new) and not _lazy(self._data) else new

    @property
    def distributed(self) -> bool:
        return self.data.distributed

    def detach(self) -> Value:
        """The same data, through which no gradient flows."""
        return _detach(self)

    # --- the graph ---

    def _picture(self) -> Value:
        """The root of the graph that `draw` shows."""
        return self

    @property
    def _args(self) -> tuple:
        """The operands: Values, Tensors, and constants as raw values."""
        if type(self._y) is dict:
            return self._x
        return (self._x,) if self._y is None else (self._x, self._y)

    @property
    def _params(self) -> dict[str, Any]:
        """The parameters of the primitive, such as an axis."""
        return self._y if type(self._y) is dict else _NO_PARAMS

    @property
    def _prev(self) -> set[Value]:
        """The Values this one was made from, as micrograd calls them."""
        return {x for x in self._args if isinstance(x, Value)}

    @property
    def _op(self) -> str:
        return self._prim.symbol if self._prim else ""

    def forward(self) -> Value:
        """Computes the graph anew from the current data of its leaves and Tensors; returns this Value.

        Their shapes may change where no operation was told one: matrix products, element-wise operations, reductions
        and nn's networks and losses take a batch of another size. What computes shapes or indices when it is called
        (reshape to a shape, repeat, roll, split, trace, tile, pad, ...) goes on with those of the first time.
        """
        for node in reversed(_newest_first(self)):
            if node._prim is not None:
                _recompute(node)
        return self

    def backward(self, gradient: Any = None, retain_grads: bool = True) -> None:
        """Adds the gradient of this Value to the `.grad` of the leaves it was computed from.

        gradient: of this Value's shape, the gradient to start from; ones unless given.
        retain_grads: whether the nodes in between keep theirs (replacing an earlier one); False saves the memory.

        A gradient is of its leaf's kind. What is a Dask array before, and belongs to a leaf that is none, is computed
        in one pass over the cluster, and this Value with it if it is a number.

        If it fails (a rule raises, Ctrl-C), the leaves' gradients are as before.
        """
        grads = _backpropagate(self, self._seed(gradient), retain=retain_grads)
        for leaf, g in _deposited(_at_home(grads, self)).items():
            leaf._grad = g

    def _seed(self, gradient):
        """The raw gradient that a backward sweep starts from."""
        if not self._needs:
            raise TypeError(f"backward: no gradient flows to {self!r}, there is nothing to differentiate")
        if gradient is None:
            return _filled_like(self._data, 1)
        if np.shape(_raw(gradient)) != self.shape:
            raise ValueError(f"backward: gradient must have shape {self.shape}, got {np.shape(_raw(gradient))}")
        return _conform(gradient, self._data, "backward: gradient")

    # --- what Python and NumPy ask of a number or array ---

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__":
            raise TypeError(f"{ufunc.__name__}.{method} is not supported on a Value; use functions of the table")
        if kwargs:
            raise TypeError(f"{ufunc.__name__}: {', '.join(kwargs)}= is not supported on a Value")
        return _entry(ufunc)(*inputs)

    def __array_function__(self, function, kinds, args, kwargs):
        return _call_entry(_entry(function), function, args, kwargs)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "a Value does not turn into an array by itself, which would lose its gradient: "
            "take .data.data for the numbers, np.stack or np.block to join Values"
        )

    def __setitem__(self, index, new):
        raise TypeError(
            "a Value cannot be assigned to in place: use np.where(mask, new, v) or np.concatenate, "
            "or v.data[index] = new to change the data of a leaf"
        )

    def _leave(self, how: str) -> float | int | bool:
        """The number, on its way to code that knows nothing of gradients."""
        number = self.item()
        self._end(f"{how}(Value)")
        return number

    def _end(self, what: str) -> None:
        """Says so where a gradient ends: an error inside a function to differentiate, else a warning."""
        if self._needs and _mode.recording:
            if _mode.depth:
                raise TypeError(f"{what}: {_ENDS}")
            warnings.warn(f"{what}: {_ENDS}", stacklevel=4)

    def __float__(self):
        return float(self._leave("float"))

    def __int__(self):
        return int(self._leave("int"))

    def __index__(self):
        return operator.index(self._leave("operator.index"))

    def __copy__(self):
        grad = None if self._grad is None else _owned(self._grad)
        made = self._prim, self._args, self._params, self._needs, _owned(self._data), grad, self.label
        return _with_extra(_rebuild(type(self), (), None, *made), _extra(self, Value))

    def __reduce__(self):
        # A node's operands come before it. All that it depends on is listed first, oldest first, so that neither pickle
        # nor deepcopy, which both remember what they have seen, go any deeper, however deep the graph is.
        first: tuple = ()
        listed = None
        if self._args and not any([id(self) in known.ids for known in [ref() for ref in _mode.listed] if known]):
            first = tuple(_newest_first(self)[:0:-1])
            listed = _Listed(first)
        made = self._prim, self._args, self._params, self._needs, self._data, self._grad, self.label
        return _rebuild, (type(self), first, listed, *made), _extra(self, Value)

    def __repr__(self):
        label = f", label={self.label!r}" if self.label else ""
        made = f", op={self._prim.name!r}" if self._prim else ""
        kind = KINDS[type(self._data)]
        if self.ndim or kind.lazy:
            return f"Value(shape={self.shape}, dtype={self.dtype}{kind.text(self._data)}{made}{label})"
        return f"Value(data={self._data}, grad={self._grad or 0.0}{made}{label})"

    def __format__(self, spec):
        return format(self.data, spec) if spec else repr(self)


def _call_entry(entry: Callable, function: Callable, args: tuple, kwargs: dict):
    """Calls the entry for a function of NumPy's with that function's arguments."""
    if not isinstance(entry, Primitive) or not entry.operands:
        return entry(*args, **kwargs)
    n = len(entry.operands)
    if len(args) == n and not kwargs:
        return _apply(entry, args, _NO_PARAMS)
    # By NumPy's names, in whose order they came; its defaults need no support.
    given = dict(zip(_argument_names(function)[n:], args[n:])) | kwargs
    return entry(*args[:n], **{k: x for k, x in given.items() if x is not None or k in entry.params})


def _entry(function):
    if function not in TABLE:
        module = (getattr(function, "__module__", None) or "numpy").replace("numpy", "np", 1)
        raise TypeError(
            f"{module}.{function.__name__} is not in picograd's table, so it has no gradient: "
            "add it with picograd.primitive, or call it on .data.data where none is needed"
        )
    return TABLE[function]


def _node(data, prim, args, params) -> Value:
    """A new node; under `no_grad` a leaf, to which no gradient flows."""
    node = _new(Value)
    node._data, node._grad, node._number, node.label = data, None, _next_number(), ""
    node._needs = False
    if not _mode.recording:
        node._prim, node._x, node._y = None, (), _NO_PARAMS
        return node
    for i, x in enumerate(args):
        if isinstance(x, Value) and x._needs and prim.vjps[i if prim.operands else 0] is not None:
            node._needs = True
            break
    node._prim, node._x, node._y = prim, args, params
    return node


def _record(prim: Primitive, args: tuple, params: dict = _NO_PARAMS) -> Value:
    """A node for the operation, also if its operands are Tensors only: a replay reads them anew."""
    return _node(_evaluate(prim, [_raw(x) for x in args], params), prim, args, params)


class _Listed:
    """In a pickle, behind the list of what a node depends on: the nodes that it lists need no lists of their own, as
    long as that pickle is under way. If it fails, this goes with it."""

    def __init__(self, nodes=()):
        self.ids = set(map(id, nodes))
        _mode.listed = [ref for ref in _mode.listed if ref() is not None] + [weakref.ref(self)] if nodes else []

    def __reduce__(self):
        self.ids = set()
        return _Listed, ()


def _extra(x, base: type):
    """What a subclass of users adds to a Value or Tensor, as pickle and copy take it: attributes and slots; or None."""
    slots = {name for cls in type(x).__mro__ if not issubclass(base, cls) for name in vars(cls).get("__slots__", ())}
    state = {name: getattr(x, name) for name in slots if hasattr(x, name)}
    attributes = getattr(x, "__dict__", None)
    return (attributes or None, state) if attributes or state else None


def _with_extra(twin, extra):
    """A copy with what `_extra` found."""
    for part in filter(None, extra or ()):
        for name, value in part.items():
            setattr(twin, name, value)
    return twin


def _rebuild(cls, first, listed, prim, args, params, needs, data, grad, label) -> Value:
    """A pickled or deeply copied node; `first` are those that it depends on, which come before it."""
    node = _new(cls)
    node._prim, node._x, node._y, node._needs = prim, args, params, needs
    node._data, node._grad, node._number, node.label = data, grad, _next_number(), label
    return node


# --- walks, and what gradients are ---


def _newest_first(root: Value) -> list[Value]:
    """All nodes that root depends on, newest first."""
    if not isinstance(root, Value):
        raise TypeError(_two_copies(type(root)))
    seen, nodes = {root}, [root]
    for node in nodes:  # the list grows as it is walked
        for x in node._args:
            if isinstance(x, Value) and x not in seen:
                seen.add(x)
                nodes.append(x)
    nodes.sort(key=_get_number, reverse=True)
    return nodes


_get_number = operator.attrgetter("_number")
_get_rank = operator.attrgetter("rank")


def _filled_like(raw, number):
    """A raw value of that shape and dtype; of a weak number, a float."""
    if type(raw) in _WEAK_TYPES:
        return float(number)
    if not raw.ndim:
        return raw.dtype.type(number)  # also of a foreign array: a seed needs no cluster
    return np.full_like(raw, number)


_SPREAD_ELEMENTS = 1 << 12  # below, a gradient that is the same number throughout is written out


@functools.lru_cache(16)
def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    return np.ones(n, dtype)


def _fit(g, raw):
    """A gradient, as a rule gave it, for an operand like `raw`: summed over broadcast axes, and of its dtype."""
    shape = () if type(raw) is float else raw.shape
    had = () if type(g) is float else g.shape
    if had != shape:
        if len(had) == 2 and had[1:] == shape and type(g) is np.ndarray:
            g = _ones(had[0], g.dtype).dot(g)  # a bias' gradient: BLAS sums rows twice as fast as NumPy
        elif len(had):
            extra = len(had) - len(shape)
            axes = tuple([i for i, n in enumerate(had) if i < extra or (n != 1 and shape[i - extra] == 1)])
            if axes:
                add = np.add.reduce if type(g) is np.ndarray else np.sum
                g = add(g, axis=axes, keepdims=len(axes) != extra)
                g = np.reshape(g, np.shape(g)[extra:]) if extra > 0 and len(axes) != extra else g
        if np.shape(g) != shape:
            if KINDS[type(raw)].lazy:
                g = np.zeros_like(raw) + g  # in the chunks of raw
            elif type(g) is not Value and not had and raw.size < _SPREAD_ELEMENTS:
                g = np.full(shape, g)  # a view takes longer
            else:
                g = np.broadcast_to(g, shape)
    weak = type(raw) is float
    if weak and KINDS[type(_raw(g))].lazy:
        return g  # `_at_home` computes it with all others
    if weak == (type(_raw(g)) is float) and (weak or g.dtype == raw.dtype):
        return g
    dtype = float if weak else raw.dtype
    return _as_dtype(g, dtype) if isinstance(g, Value) else _settle(_as_dtype.forward(g, dtype))


def _at_home(grads: dict[Value, Any], root: Value) -> dict[Value, Any]:
    """The gradients of leaves that are not lazy, computed if they are; with them the root, if a number.

    One pass computes them all, and nothing is changed before it is done.
    """
    foreign = [x for x, g in grads.items() if type(g) not in _PLAIN and KINDS[type(g)].lazy]
    away = [x for x in foreign if x._prim is None and not KINDS[type(x._data)].lazy]
    if away:
        lazy = KINDS[type(grads[away[0]])]
        with_root = KINDS[type(root._data)] is lazy and not root.ndim
        done = lazy.fetch([grads[x] for x in away] + [root._data] * with_root)
        if with_root:
            root._data = done[-1]
        grads.update((x, float(g) if type(x._data) is float else g) for x, g in zip(away, done))
    return grads


def _owned(raw):
    """The same data, held by nobody else."""
    return KINDS[type(raw)].own(raw)


def _deposited(new: dict[Value, Any]) -> dict[Value, Any]:
    """The gradients that leaves have from now on, with new ones added, which nobody else holds."""
    result = {}
    for leaf, g in new.items():
        if leaf._grad is not None:
            g = leaf._grad + g
        elif KINDS[type(g)].shared(g):  # a part of a larger array
            g = _owned(g)
        result[leaf] = g
    return result


def _recompute(node: Value) -> None:
    """Computes a node's data anew from its operands."""
    node._data = _evaluate(node._prim, [_raw(x) for x in node._args], node._params)


def _as_met(prim: Primitive, operands: Sequence, dtype: np.dtype) -> Sequence:
    """Operands for a rule in the dtype of the result, as the forward met them: in -y, an unsigned y would wrap, and in
    y - 1 one of half the precision would lose digits."""
    for i in range(len(operands)) if prim.typed is None else prim.typed:
        x = operands[i]
        own = getattr(x, "dtype", dtype)
        if own is not dtype and type(_raw(x)) not in _WEAK_TYPES and np.result_type(own, dtype) == dtype:
            operands = list(operands)
            operands[i] = _as_dtype(x, dtype)
    return operands


def _locate(error: Exception, node: Value) -> None:
    """Adds to an error in a rule which operation it was, and on what."""
    label, shapes = f" {node.label!r}" if node.label else "", ", ".join([str(np.shape(_raw(x))) for x in node._args])
    where = f"in the rule of {node._prim.name}{label}, for operands of shapes {shapes}"
    if len(error.args) == 1 and isinstance(error.args[0], str):
        if "in the rule of" not in error.args[0]:
            error.args = (f"{error.args[0]} ({where})",)
    elif hasattr(error, "add_note"):  # Python 3.11
        error.add_note(where)


# --- the backward sweep ---
#
# Nodes are taken newest first: then all gradients that come to a node are summed when its turn comes. With a, b = 2, 3:
#
#     c = a * b + a**2      number   made by   its gradient   sends on
#                           5  c     m + s     1              1 to m, 1 to s
#                           4  s     a**2      1              2 * a = 4 to a
#                           3  m     a * b     1              b = 3 to a, a = 2 to b
#                           2  b     -         2
#                           1  a     -         4 + 3
#
# A heap gives the newest node that has a gradient; leaves are not put there, and what is left in `grads` is theirs.


def _backpropagate(root: Value, seed, stop=frozenset(), retain=False, symbolic=False, since=0) -> dict[Value, Any]:
    """The gradients of the leaves that root depends on, and of the other nodes at which the sweep ends.

    It ends at nodes in `stop`, and at those whose number is at most `since`: they were made before.
    retain: whether the nodes in between keep theirs as `.grad`. symbolic: whether gradients are Values.
    """
    if not isinstance(root, Value):
        raise TypeError(_two_copies(type(root)))
    grads, heap, node = {root: seed}, [], root
    if root._prim is not None and root not in stop and root._number > since:
        heap.append((-root._number, root))
    try:
        while heap:
            if not (symbolic or stop):
                _sweep_numbers(heap, grads, retain, since)
                if not heap:
                    break
            node = heappop(heap)[1]  # the newest: all that it sends its gradient to is older
            g = grads.pop(node)
            node._grad = g if retain else None
            for x, h in _pulled(node, g, symbolic):
                had = grads.get(x)
                if had is not None:
                    grads[x] = had + h
                elif x._prim is None:
                    grads[x] = _owned(h) if h is g and not symbolic else h  # a leaf's gradient is nobody else's
                else:
                    grads[x] = h
                    if x not in stop and x._number > since:
                        heappush(heap, (-x._number, x))
    except Exception as error:
        _locate(error, node)
        raise
    return grads


def _sweep_numbers(heap: list, grads: dict[Value, Any], retain: bool, since: int) -> None:
    """The sweep as long as operations are on numbers, spelled out, as there may be 10^5 of them: it takes a fifth of
    the time. It leaves alone an operation on anything else, and one for which Python's arithmetic has no answer."""
    get = grads.get
    while heap:
        node = heap[0][1]
        x, y = node._x, node._y
        if type(y) is dict:
            return
        g, out, rules = grads[node], node._data, node._prim.vjps
        h = k = 0.0  # the gradients of x and y
        try:
            if y is None:
                h = rules[0](g, out, x._data)
            elif type(y) is float:
                h = rules[0](g, out, x._data, y)
                y = None
            else:
                a, b = x if type(x) is float else x._data, y._data
                if type(x) is not float and x._needs:
                    h = rules[0](g, out, a, b)
                else:
                    x = None
                if y._needs:
                    k = rules[1](g, out, a, b)
                else:
                    y = None
        except _NO_ANSWER:
            return
        if type(h) is not float or type(k) is not float:
            return
        heappop(heap)
        del grads[node]
        node._grad = g if retain else None
        if x is not None:
            had = get(x)
            grads[x] = h if had is None else had + h
            if had is None and x._prim is not None and x._number > since:
                heappush(heap, (-x._number, x))
        if y is not None:
            had = get(y)
            grads[y] = k if had is None else had + k
            if had is None and y._prim is not None and y._number > since:
                heappush(heap, (-y._number, y))


_NO_ANSWER = (ArithmeticError, ValueError, TypeError)  # where IEEE arithmetic has one


def _on_numbers(rule: Callable, *numbers, **params) -> float | None:
    """What a rule gives for numbers. Where Python raises, or makes a complex number, NumPy has the IEEE answer."""
    with contextlib.suppress(*_NO_ANSWER):
        h = rule(*numbers, **params)
        if type(h) is float or h is None:
            return h
    return float(rule(*map(_public, numbers), **params))


_PLAIN = frozenset((np.ndarray, np.float32, np.float64))  # what needs no kind to be asked


def _pulled(node: Value, g, symbolic: bool) -> list[tuple[Value, Any]]:
    """The operands of a node that a gradient flows to, each with the gradient that its rule makes of g."""
    prim, args, params, out = node._prim, node._args, node._params, node._data
    operands, kind = [x._data if isinstance(x, Array) else x for x in args], NUMPY
    if not (type(out) in _PLAIN and type(g) in _PLAIN):
        if type(out) is type(g) is float and prim.operands:
            kind = WEAK
        else:
            kind = max([KINDS[type(_raw(x))] for x in (g, out, *operands)] + [NUMPY], key=_get_rank)
    if symbolic:
        # A Tensor becomes a node: what a rule computes from it is recorded, too, and a replay reads it anew.
        operands = [_record(_detach, (x,)) if isinstance(x, Tensor) else x for x in args]
    if len(args) > 1 and type(out) is not float:
        for x in operands:
            if type(x) is not float and getattr(x, "dtype", out.dtype) is not out.dtype:
                operands = _as_met(prim, operands, out.dtype)
                break
    out = node if symbolic else out
    if prim.joint:
        wanted = [isinstance(x, Value) and x._needs for x in args]
        rule = prim.vjps[0] if kind is NUMPY else kind.rule(prim, prim.vjps[0])
        found = rule(wanted, g, out, operands, **params)
        return [(x, _fitted(h, x, prim)) for x, h, wants in zip(args, found, wanted) if wants and h is not None]
    pairs = []
    for i, x in enumerate(args):
        rule = prim.vjps[i if prim.operands else 0]
        if rule is None or not isinstance(x, Value) or not x._needs:
            continue
        if kind is WEAK:
            h = _on_numbers(rule, g, out, *operands, **params)
        else:
            rule = rule if kind is NUMPY else kind.rule(prim, rule)
            h = rule(g, out, *operands, **params) if prim.operands else rule(i, g, out, operands, **params)
        if h is not None:
            pairs.append((x, h if type(h) is float and kind is WEAK else _fitted(h, x, prim)))
    return pairs


def _fitted(h, x: Value, prim: Primitive):
    """A gradient, as a rule gave it, of the shape and dtype of the operand that it is for."""
    raw = x._data
    if not prim.builtin and not isinstance(h, Value):  # a user may keep it
        h = _owned(_settle(np.asarray(h)) if KINDS[type(h)] in (None, WEAK) else h)
    if type(h) is type(raw) is np.ndarray and h.shape == raw.shape and h.dtype is raw.dtype:
        return h
    return _fit(h, raw)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Within it, in this thread, results are leaves without history. Also a decorator."""
    before, _mode.recording = _mode.recording, False
    try:
        yield
    finally:
        _mode.recording = before


# ---------------------------------------------------------------------------------------------------------------------
# 4. Gradients
#
# Functions of functions: in comes a function of NumPy's arithmetic, out a function that returns derivatives of it.
# ---------------------------------------------------------------------------------------------------------------------


def _differentiate(f: Callable, argnums, args: tuple, kwargs: dict, seeds: Callable):
    """Calls f with the arguments `argnums` as fresh variables: its output, and per seed the gradients by them.

    seeds: maps the raw output to the gradients that the backward sweeps start from.
    On a Value, or inside another gradient function, the gradients are Values again, to be differentiated further.
    """
    numbers = tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)
    if not all(isinstance(i, (int, np.integer)) for i in numbers):
        raise TypeError(f"argnums: expected an integer or a tuple of integers, got {argnums!r}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"argnums: names an argument twice: {argnums}")
    for i in numbers:
        if not -len(args) <= i < len(args):
            raise ValueError(f"argnums: asks for argument {i}, but the function was called with {len(args)}")
    args = list(args)
    symbolic = _mode.depth > 0 or any(isinstance(args[i], Value) for i in numbers)
    before, _mode.recording, _mode.depth = _mode.recording, True, _mode.depth + 1
    try:
        variables = [_variable(args[i], i) for i in numbers]
        since = max([v._number for v in variables], default=0)  # what is newer may depend on them
        for i, variable in zip(numbers, variables):
            args[i] = variable
        try:
            out = f(*args, **kwargs)
        except ValueError as error:  # buffer[0] = v: NumPy makes a ValueError of what float(v) raised
            if isinstance(error.__cause__, TypeError) and _ENDS in str(error.__cause__):
                raise error.__cause__ from None
            raise
        if not isinstance(out, (Array, np.ndarray, np.number, int, float)):
            raise TypeError(f"the function to differentiate must return a Value or number, got {type(out).__name__}")
        rows = []
        for seed in seeds(_raw(out)):
            grads = {}
            if isinstance(out, Value) and out._needs:
                seed = _leaf(seed) if symbolic else seed
                grads = _backpropagate(out, seed, symbolic=symbolic, since=since)
                grads = {v: grads[v] for v in variables if v in grads}
                grads = grads if symbolic else _deposited(_at_home(grads, out))
            rows.append([grads[v] if v in grads else _filled_like(v._data, 0) for v in variables])
    finally:
        _mode.recording, _mode.depth = before, _mode.depth - 1
    return out, rows


def _variable(x, i):
    """A fresh node for argument i of a function; connected to x if that is a Value."""
    if isinstance(x, Value):
        return np.positive(x)
    try:
        dtype = None
        if not isinstance(x, (Array, *_NUMBERS)) and not _lazy(x):
            x = np.asarray(x)
            dtype = x.dtype if x.dtype.kind == "f" else None
        return Value(x, dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"argument {i}: {error}") from None


def _leaf(raw) -> Value:
    """A Value around a raw value, which is not copied."""
    leaf = Value(0.0)
    leaf._data = raw
    return leaf


def _hand_out(result, x):
    """A result for argument x: a Value for a Value, or where an outer gradient function needs one; else NumPy's."""
    if isinstance(x, Value) or (_mode.depth and isinstance(result, Value) and result._needs):
        return result if isinstance(result, Value) else _leaf(result)
    return _public(_raw(result))


def _one_number(raw):
    if math.prod(np.shape(raw)) != 1:
        raise ValueError(
            f"grad: the function must return one number, got shape {np.shape(raw)}; see jacobian and elementwise_grad"
        )
    return [_filled_like(raw, 1)]


def value_and_grad(f: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """A function that returns f's value and its gradient by the argument(s) argnums (a tuple for a tuple).

    A number or array in gives a NumPy number or array out, computed in the array's own floating dtype; a Value in gives
    Values out, which can be differentiated again. f must return one number, else ValueError. Nests to any order.
    """

    def value_and_gradient(*args, **kwargs):
        out, (row,) = _differentiate(f, argnums, args, kwargs, _one_number)
        if isinstance(argnums, (int, np.integer)):
            return _hand_out(out, args[argnums]), _hand_out(row[0], args[argnums])
        given = [args[i] for i in argnums]
        value = _hand_out(out, next((x for x in given if isinstance(x, Value)), None))
        return value, tuple(map(_hand_out, row, given))

    return value_and_gradient


def grad(f: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """A function that returns the gradient of f; see `value_and_grad`."""

    def gradient(*args, **kwargs):
        return value_and_grad(f, argnums)(*args, **kwargs)[1]

    return gradient


def elementwise_grad(f: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """The derivative of each output element of an element-wise f by its input element: the gradient of the sum."""
    return grad(lambda *args, **kwargs: np.sum(f(*args, **kwargs)), argnums)


def jacobian(f: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """A function that returns the derivatives of every output of f by every element of the argument(s) argnums.

    Of shape (*output shape, *argument shape); one backward sweep per output element.
    """

    def units(raw):
        if not np.ndim(raw):
            return [_filled_like(raw, 1)]
        return [unit.reshape(raw.shape) for unit in np.eye(raw.size, dtype=raw.dtype)]

    def derivatives(*args, **kwargs):
        single = isinstance(argnums, (int, np.integer))
        out, rows = _differentiate(f, argnums, args, kwargs, units)
        results = []
        for k, i in enumerate((argnums,) if single else argnums):
            shape = np.shape(_raw(out)) + np.shape(_raw(args[i]))
            column = [row[k] for row in rows]
            if shape:
                stack = np.stack if any(isinstance(g, Value) or _lazy(g) for g in column) else np.array
                column = [np.reshape(stack(column), shape) if column else np.zeros(shape)]
            results.append(_hand_out(column[0], args[i]))
        return results[0] if single else tuple(results)

    return derivatives


def hessian(f: Callable, argnum: int = 0) -> Callable:
    """A function that returns the second derivatives of f, which returns one number, by the elements of an argument."""
    return jacobian(grad(f, argnum), argnum)


def check_gradients(
    f: Callable, *args: Any, order: int = 1, step: float = 1e-5, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """Compares the gradients of f with central finite differences, in double precision.

    f: returns a Value of any shape.
    args: numbers, floating arrays, Tensors and Values are differentiated, anything else is passed on as it is.
    order: 2 also checks the gradients of the gradients.
    step, rtol, atol: of the differences; the two may differ by atol + rtol * their size.
    Raises AssertionError that names the argument, the element and both numbers.
    """
    raws, free = [], []
    for i, x in enumerate(args):
        raw = np.asarray(_raw(x))
        if raw.dtype.kind == "f" or (raw.dtype.kind == "i" and isinstance(x, int)):
            free.append(i)
        raws.append(raw.astype(np.float64) if i in free else x)
    if not free:
        raise TypeError("check_gradients: expected at least one number or floating array among the arguments")
    weak = {i for i, x in enumerate(args) if isinstance(_raw(x), (int, float)) and not isinstance(x, np.float64)}
    weights: list = []

    def total(*values):
        out = f(*values)
        if not isinstance(out, Value):
            raise TypeError(f"check_gradients: the function must return a Value, got {type(out).__name__}")
        if not weights:  # a fixed random direction, so that errors of different outputs cannot cancel
            weights.append(np.random.default_rng(0).uniform(0.5, 1.5, out.shape))
        return np.sum(out * weights[0]) if out.ndim else out

    def value(i, x):
        if i not in free:
            return x
        return _leaf(float(x) if i in weak else _settle(x.copy()))

    def values():
        return [value(i, x) for i, x in enumerate(raws)]

    for i in free:
        gradient = np.asarray(grad(total, i)(*values()).data)
        for element in np.ndindex(raws[i].shape):
            kept, sides = raws[i][element].copy(), []
            for change in (step, -step):
                raws[i][element] = kept + change
                with no_grad():
                    sides.append(float(total(*values())))
            raws[i][element] = kept
            numeric, exact = (sides[0] - sides[1]) / (2 * step), float(gradient[element])
            if not abs(numeric - exact) <= atol + rtol * max(abs(numeric), abs(exact)):
                place = f", element {element}" if element else ""
                raise AssertionError(f"argument {i}{place}: gradient {exact!r}, by finite differences {numeric!r}")
        if order > 1:
            check_gradients(grad(total, i), *raws, order=order - 1, step=step, rtol=max(rtol, 1e-4), atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Catalogue
#
# Every operation with its rule; then the operators and methods of Value and Tensor, all from the table. In: raw values,
# Tensors and Values. Out: what NumPy gives for the same arrays. Invariant: a rule has an answer wherever the operation
# has one, and costs no more than the operation does. Where there is no derivative, or more than one, it is:
#
#     abs, relu, norm, std, hypot, arctan2     0 at 0; std also where numbers are equal, but their mean is rounded
#     max, min, maximum, fmax and their kin    shared equally by ties, 0.0 and -0.0 too; to nan where that is taken
#     clip                                     passes at the bounds; where they are in the wrong order, to the upper one
#     power                                    0 for x**0 by x, and for 0**y by y where y is not negative
#     logaddexp, logsumexp                     weights that sum to 1: infinity takes all, equal infinities share
#     prod, cumprod, det                       exact, also with zeros and for singular matrices
#
#     >>> x = Value([3.0, 1.0, 3.0])
#     >>> np.max(x).backward()
#     >>> print(x.grad.tolist())
#     [0.5, 0.0, 0.5]
# ---------------------------------------------------------------------------------------------------------------------


# Intervals that the samples of element-wise primitives are drawn from, away from kinks and poles.
_REAL, _POSITIVE, _UNIT, _OVER_1 = (-2.0, 2.0), (0.3, 3.0), (-0.9, 0.9), (1.1, 3.0)

# --- arithmetic ---


def _power_x(g, out, x, y):
    if isinstance(y, (int, float)):  # the usual x**2: no masks needed
        return g * (y * x ** (y - 1.0)) if y else g * 0.0
    return g * np.where(y == 0, 0.0, y * x ** np.where(y == 0, 1.0, y - 1.0))


def _power_y(g, out, x, y):
    flat = (x == 0) & (y >= 0)  # 0**y is 0 on the right of y = 0, so its slope is 0; elsewhere log(0) says -inf
    return g * np.where(flat, 0.0, out * np.log(np.where(flat, 1.0, x)))


primitive(np.add, lambda g, out, x, y: g, lambda g, out, x, y: g, reads="")
primitive(np.subtract, lambda g, out, x, y: g, lambda g, out, x, y: -g)
primitive(np.multiply, lambda g, out, x, y: g * y, lambda g, out, x, y: g * x)
primitive(np.divide, lambda g, out, x, y: g / y, lambda g, out, x, y: -g * out / y, samples=(_REAL, _POSITIVE))
primitive(np.power, _power_x, _power_y, samples=(_POSITIVE, _REAL))
primitive(  # with the quotient that NumPy takes: x / y may round up to the next integer
    np.remainder, lambda g, out, x, y: g, lambda g, out, x, y: -g * np.floor_divide(x, y), samples=(_REAL, _OVER_1)
)
primitive(np.negative, lambda g, out, x: -g)
primitive(np.positive, lambda g, out, x: g)
primitive(np.absolute, lambda g, out, x: g * np.sign(x), name="abs", samples=(_POSITIVE,))
primitive(np.reciprocal, lambda g, out, x: -g * out * out, samples=(_POSITIVE,))
primitive(np.square, lambda g, out, x: g * (2.0 * x), scalar=lambda x: x * x)
primitive(np.sqrt, lambda g, out, x: 0.5 * g / out, scalar=math.sqrt, samples=(_POSITIVE,))

# --- exponentials and logarithms ---

_LN2, _LN10 = math.log(2.0), math.log(10.0)
primitive(np.exp, lambda g, out, x: g * out, scalar=math.exp)
primitive(np.expm1, lambda g, out, x: g * (out + 1.0), scalar=math.expm1)
primitive(np.exp2, lambda g, out, x: g * (_LN2 * out))
primitive(np.log, lambda g, out, x: g / x, scalar=math.log, samples=(_POSITIVE,))
primitive(np.log1p, lambda g, out, x: g / (1.0 + x), scalar=math.log1p, samples=(_POSITIVE,))
primitive(np.log2, lambda g, out, x: g / (_LN2 * x), scalar=math.log2, samples=(_POSITIVE,))
primitive(np.log10, lambda g, out, x: g / (_LN10 * x), scalar=math.log10, samples=(_POSITIVE,))


def _lead_of(x, y):
    """x - y, and 0 where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return np.where((x == y) & np.isinf(x), 0.0, x - y)


# The weights are exp(x - out) and exp(y - out), in a form in which they sum to 1 whatever the size of x and y.
primitive(
    np.logaddexp,
    lambda g, out, x, y: g * sigmoid(_lead_of(x, y)),
    lambda g, out, x, y: g * sigmoid(_lead_of(y, x)),
)

# --- trigonometric and hyperbolic ---


def _sinc_x(g, out, x):
    # Near 0 the closed form is 0/0; there the Taylor series is exact to double precision, also when differentiated.
    near = np.abs(x) < 0.05
    small = np.where(near, x, 0.0)
    z = (np.pi * small) ** 2
    series = -(np.pi**2) * small * (1 / 3 - z * (1 / 30 - z * (1 / 840 - z * (1 / 45360 - z / 3991680))))
    return g * np.where(near, series, (np.cos(np.pi * x) - out) / np.where(near, 1.0, x))


primitive(np.sin, lambda g, out, x: g * np.cos(x), scalar=math.sin)
primitive(np.cos, lambda g, out, x: -g * np.sin(x), scalar=math.cos)
primitive(np.tan, lambda g, out, x: g * (1.0 + out * out), scalar=math.tan, samples=(_UNIT,))
# (1 - x) * (1 + x): the difference 1 - x * x has no correct digit near 1.
primitive(np.arcsin, lambda g, out, x: g / np.sqrt((1.0 - x) * (1.0 + x)), scalar=math.asin, samples=(_UNIT,))
primitive(np.arccos, lambda g, out, x: -g / np.sqrt((1.0 - x) * (1.0 + x)), scalar=math.acos, samples=(_UNIT,))
primitive(np.arctan, lambda g, out, x: g / (1.0 + x * x), scalar=math.atan)
primitive(np.sinh, lambda g, out, x: g * np.cosh(x), scalar=math.sinh)
primitive(np.cosh, lambda g, out, x: g * np.sinh(x), scalar=math.cosh)
# g * (1 - out**2), in the order of operations in which NumPy needs one temporary array only.
primitive(np.tanh, lambda g, out, x: -out * out * g + g, scalar=math.tanh, reads="out")
primitive(np.arcsinh, lambda g, out, x: g / np.hypot(x, 1.0), scalar=math.asinh)  # x * x could overflow
primitive(
    np.arccosh, lambda g, out, x: g / (np.sqrt(x - 1.0) * np.sqrt(x + 1.0)), scalar=math.acosh, samples=(_OVER_1,)
)
primitive(np.arctanh, lambda g, out, x: g / ((1.0 - x) * (1.0 + x)), scalar=math.atanh, samples=(_UNIT,))
primitive(np.sinc, _sinc_x, elementwise=True)


def _over(x, out):
    """x / out, and 0 where out is 0: the subgradient that norms and std take at 0."""
    return x / np.where(out == 0, np.inf, out)


def _turn(g, x, y):
    """g * x / (x * x + y * y), where no square over- or underflows; 0 at the origin."""
    r = np.hypot(x, y)
    return _over(g * _over(x, r), r)


primitive(
    np.arctan2, lambda g, out, y, x: _turn(g, x, y), lambda g, out, y, x: _turn(-g, y, x), samples=(_REAL, _POSITIVE)
)
primitive(
    np.hypot, lambda g, out, x, y: g * _over(x, out), lambda g, out, x, y: g * _over(y, out), samples=(_REAL, _POSITIVE)
)

# --- selection; ties share the gradient equally ---


def _contest(ufunc, beats, loses, skips_nan):
    """Enters maximum or one of its kin: of two operands, the one that `beats` the other gets the gradient, ties share
    it. Of nan and a number, that gets it which NumPy takes; of two nans the first."""

    def rule(g, mine, other, first):
        if isinstance(other, (int, float)) and other == other:  # the usual np.maximum(x, 0): only mine may be nan
            wins = beats(mine, other) if skips_nan else ~loses(mine, other)
        else:
            taken, rest = (other, mine) if skips_nan else (mine, other)  # mine is the result if `taken` is nan
            nan = np.isnan(taken) if first else np.isnan(taken) & ~np.isnan(rest)
            wins = beats(mine, other) | nan
        return np.where(mine == other, 0.5 * g, np.where(wins, g, 0.0))

    primitive(
        ufunc,
        lambda g, out, x, y: rule(g, x, y, True),
        lambda g, out, x, y: rule(g, y, x, False),
        samples=(_REAL, _OVER_1),
    )


_contest(np.maximum, np.greater, np.less_equal, False)
_contest(np.minimum, np.less, np.greater_equal, False)
_contest(np.fmax, np.greater, np.less_equal, True)
_contest(np.fmin, np.less, np.greater_equal, True)
primitive(
    np.where,
    None,
    lambda g, out, condition, x, y: np.where(condition, g, 0.0),
    lambda g, out, condition, x, y: np.where(condition, 0.0, g),
    elementwise=True,
    samples=[((np.array([True, False, True]), (3,), (2, 3)), {}), ((np.array([[True], [False]]), (), (3,)), {})],
)


def _clip_a(g, out, a, lo, hi):
    taken = (a < lo) | (a > hi)
    if not all([isinstance(x, (int, float)) and x == x for x in (lo, hi)]):  # as bounds usually are
        taken = taken | (np.isnan(lo) | np.isnan(hi))
    return np.where(taken, 0.0, g)


_clip = primitive(
    np.clip,
    _clip_a,
    lambda g, out, a, lo, hi: np.where(((a < lo) & (lo <= hi)) | (np.isnan(lo) & ~np.isnan(hi)), g, 0.0),
    lambda g, out, a, lo, hi: np.where((np.maximum(a, lo) > hi) | np.isnan(hi), g, 0.0),
    elementwise=True,
    samples=(_REAL, (-1.1, -0.9), (0.9, 1.1)),
)


@composed(np.clip)
def clip(a, a_min=None, a_max=None, *, min=None, max=None):
    """`np.clip`; the gradient passes at the bounds, as in PyTorch. Where the lower bound is above, the upper one is
    the result, and gets the gradient."""
    if isinstance(a, (int, np.integer)):
        a = np.asarray(a)  # as NumPy does: it need not fit in the dtype of its bounds
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    raws = [np.asarray(x) if isinstance(x, list) else x for x in map(_raw, (a, low, high)) if x is not None]
    kind = np.result_type(*[getattr(x, "dtype", x) for x in raws])
    if kind.kind == "b":
        lowest, highest = False, True
    elif kind.kind in "iu":
        lowest, highest = np.iinfo(kind).min, np.iinfo(kind).max
        low = None if type(low) is int and low < lowest else low  # as NumPy, beyond what the dtype holds
        high = None if type(high) is int and high > highest else high
    else:
        lowest, highest = -np.inf, np.inf
    return _clip(a, lowest if low is None else low, highest if high is None else high)


# --- activations that NumPy has no name for: functions of picograd, found in the table under themselves ---


def _floating(x):
    """Integers and masks in double precision, for functions that NumPy does not have."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return np.float64(x)
    return x if dtype.kind == "f" else x.astype(np.float64)


def _sigmoid(x, out=None):
    x = _floating(x)
    e = np.exp(-np.abs(x))  # never overflows
    return np.divide(np.where(x >= 0, 1.0, e), 1.0 + e, out)


_GELU = math.sqrt(2.0 / math.pi)


def _gelu_tanh(x):
    """x within the limits beyond which tanh is 1 and powers of x might overflow, and the tanh in gelu."""
    x = np.clip(x, -30.0, 30.0)
    return x, np.tanh(_GELU * (x * (1.0 + 0.044715 * (x * x))))


def _gelu_x(g, out, x):
    x, t = _gelu_tanh(x)
    return g * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (_GELU * (1.0 + 0.134145 * (x * x))))


relu = primitive(
    lambda x, out=None: np.maximum(x, 0.0, out=out),
    lambda g, out, x: g * (out > 0),  # 0 at the kink
    name="relu",
    reads="out",
    scalar=lambda x: 0.0 if x <= 0.0 else x,
    elementwise=True,
    samples=(_POSITIVE,),
)
sigmoid = primitive(
    _sigmoid, lambda g, out, x: g * (out * (1.0 - out)), name="sigmoid", elementwise=True, reads="out", samples=(_REAL,)
)
softplus = primitive(
    lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(_floating(x)))),  # log(1 + exp(x)) without overflow
    lambda g, out, x: g * sigmoid(x),
    name="softplus",
    elementwise=True,
)
gelu = primitive(  # the tanh form: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2
    lambda x: 0.5 * x * (1.0 + _gelu_tanh(_floating(x))[1]), _gelu_x, name="gelu", elementwise=True
)

# --- reductions; axis may be None, an int (also negative) or a tuple ---


def _sum(a, axis=None, keepdims=False):
    """`np.sum`; of an array by its method, which is there sooner."""
    return a.sum(axis, keepdims=keepdims) if type(a) is np.ndarray else np.sum(a, axis=axis, keepdims=keepdims)


def _mean(a, axis=None, keepdims=False):
    """`np.mean`; of the usual arrays as NumPy computes it, without what that asks first."""
    if type(a) is np.ndarray and a.dtype.char in "fd" and a.size:
        total = a.sum(axis, keepdims=keepdims)
        return total / (a.size // total.size)
    return np.mean(a, axis=axis, keepdims=keepdims)


def _unreduce(g, a, axis, keepdims):
    """Gives back to a reduced array, as length 1, the axes that the reduction dropped."""
    return g if keepdims or axis is None or axis == () or not np.ndim(a) else np.expand_dims(g, axis)


def _share(a, axis, ddof=0):
    """1 / how many elements a reduction takes together; infinity if that is 0."""
    shape = np.shape(a)
    axes = range(len(shape)) if axis is None or not shape else axis if isinstance(axis, tuple) else (axis,)
    count = math.prod(shape[i] for i in axes) - ddof
    return 1.0 / count if count > 0 else math.inf


def _others(a):
    """The product of all others along the last axis: what comes before times what comes after, exact with zeros."""
    one = np.ones_like(a[..., :1])
    before = np.cumprod(np.concatenate([one, a[..., :-1]], axis=-1), axis=-1)
    after = np.flip(np.cumprod(np.concatenate([one, np.flip(a[..., 1:], -1)], axis=-1), axis=-1), -1)
    return before * after


def _prod_a(g, out, a, axis=None, keepdims=False):
    shape = np.shape(a)
    if not shape:
        return g
    if not math.prod(shape):
        return np.zeros_like(a)
    axes = tuple(i % len(shape) for i in (range(len(shape)) if axis is None else np.atleast_1d(axis)))
    order = tuple(i for i in range(len(shape)) if i not in axes) + axes
    moved = np.transpose(a, order)
    flat = np.reshape(moved, np.shape(moved)[: len(shape) - len(axes)] + (-1,))
    if np.shape(flat)[-1] == 0:
        return np.zeros_like(a)
    others = np.transpose(np.reshape(_others(flat), np.shape(moved)), _inverse(order))
    return _unreduce(g, a, axis, keepdims) * others


def _var_a(g, out, a, axis=None, ddof=0, keepdims=False):
    centred = a - np.mean(a, axis=axis, keepdims=True)
    return _unreduce(g, a, axis, keepdims) * centred * (2.0 * _share(a, axis, ddof))


def _std_a(g, out, a, axis=None, ddof=0, keepdims=False):
    # Of equal numbers it is 0, though their mean may be rounded, and then this is not. An array is looked at first:
    # it rarely has a deviation so small that rounding explains it.
    g, out = (_unreduce(x, a, axis, keepdims) for x in (g, out))
    mean, shape = np.mean(a, axis=axis, keepdims=True), np.shape(a)
    noise = math.prod(shape) * np.finfo(a.dtype).eps if type(a) is np.ndarray else math.inf
    if math.prod(shape) and not (noise < 1.0 and np.all(out > noise * np.abs(mean))):
        low, high = (f(a, axis=axis, keepdims=True) for f in (np.min, np.max))
        out = np.where(low == high, 0.0, out)
    return _over(0.5 * g, out) * (a - mean) * (2.0 * _share(a, axis, ddof))


def _extremum_a(g, out, a, axis=None, keepdims=False):
    hit = (a == _unreduce(out, a, axis, keepdims)) | np.isnan(a)  # with a nan, only nans are hits
    share = _unreduce(g, a, axis, keepdims) / np.sum(hit, axis=axis, keepdims=True)
    if isinstance(g, (np.ndarray, np.generic)):
        share = share.astype(g.dtype, copy=False)  # to NumPy, the count is wide
    return np.where(hit, share, 0.0)


def _flip_cumsum(g, axis):
    return np.flip(np.cumsum(np.flip(g, axis), axis), axis)


def _cumsum_a(g, out, a, axis=None):
    return np.reshape(_flip_cumsum(g, 0), np.shape(a)) if axis is None else _flip_cumsum(g, axis)


def _cumprod_a(g, out, a, axis=None):
    # With x the input, dL/dx_i = (x_0 ... x_{i-1}) * S_i where S_i = g_i + x_{i+1} * S_{i+1}. The recurrence is a
    # composition of affine maps, done by doubling (Hillis and Steele 1986); no division, so zeros are exact.
    x = np.reshape(a, (-1,)) if axis is None else np.moveaxis(a, axis, -1)
    scale, shift = x, g if axis is None else np.moveaxis(g, axis, -1)
    if np.shape(x)[-1] == 0:
        return np.zeros_like(a)
    zero, one = np.zeros_like(x[..., :1]), np.ones_like(x[..., :1])
    before = np.cumprod(np.concatenate([one, x[..., :-1]], axis=-1), axis=-1)
    scale = np.concatenate([x[..., 1:], zero], axis=-1)
    step, n = 1, np.shape(x)[-1]
    while step < n:
        tail = np.repeat(zero, step, axis=-1)
        shift = shift + scale * np.concatenate([shift[..., step:], tail], axis=-1)
        scale = scale * np.concatenate([scale[..., step:], tail], axis=-1)
        step *= 2
    result = before * shift
    return np.reshape(result, np.shape(a)) if axis is None else np.moveaxis(result, -1, axis)


def _peak(a, axis):
    """The largest along axis, which is kept; -inf of none."""
    if 0 in np.shape(a):
        return np.max(a, axis=axis, keepdims=True, initial=-np.inf)
    return np.max(a, axis=axis, keepdims=True)


def _logsumexp(a, axis=None, keepdims=False):
    a = _floating(a)
    peak = _peak(a, axis)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):  # log(0): the sum over -inf only is -inf, as it should be
        out = np.log(np.sum(np.exp(a - peak), axis=axis, keepdims=True)) + peak
    return out if keepdims else np.squeeze(out, axis=axis)


def _logsumexp_weights(a, out, axis=None):
    """softmax(a), given logsumexp(a); but where the largest are infinite, these share 1 equally."""
    with np.errstate(invalid="ignore"):
        e = np.exp(a - out)
    infinite = np.isinf(out)
    if type(infinite) is not np.ndarray or infinite.any():  # a foreign array is not asked, which would compute it
        e = np.where((a == out) & infinite, np.ones_like(e), e)
    return e / np.sum(e, axis=axis, keepdims=True)  # 1 in all, though `out` may be rounded


def _softmax(a, axis=-1):
    a = _floating(a)
    e = np.exp(a - _peak(a, axis))
    return e / np.sum(e, axis=axis, keepdims=True)


def _softmax_a(g, out, a, axis=-1):
    return out * (g - np.sum(g * out, axis=axis, keepdims=True))


def _log_softmax(a, axis=-1):
    a = _floating(a)
    shifted = a - _peak(a, axis)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))


def _axes(shape=(2, 3, 4)):
    """Samples that reduce over every kind of axis."""
    return [((shape,), {})] + [((shape,), {"axis": axis, "keepdims": k}) for axis in (1, -1, (0, 2)) for k in (0, 1)]


_SCANS = [(((2, 3),), {"axis": axis}) for axis in (None, 0, -1)]
_AXIS = [(((2, 3),), {"axis": 0}), (((3,),), {})]

TABLE[np.sum] = primitive(
    _sum, lambda g, out, a, axis=None, keepdims=False: _unreduce(g, a, axis, keepdims), name="sum", samples=_axes()
)
TABLE[np.mean] = primitive(
    _mean,
    lambda g, out, a, axis=None, keepdims=False: _unreduce(g * _share(a, axis), a, axis, keepdims),
    name="mean",
    samples=_axes(),
)
primitive(np.prod, _prod_a, samples=_axes())
primitive(np.var, _var_a, samples=_axes() + [(((2, 3),), {"ddof": 1})])
primitive(np.std, _std_a, samples=_axes() + [(((2, 3),), {"ddof": 1})])
TABLE[np.amax] = primitive(np.max, _extremum_a, samples=_axes())
TABLE[np.amin] = primitive(np.min, _extremum_a, samples=_axes())
primitive(np.cumsum, _cumsum_a, samples=_SCANS)
primitive(np.cumprod, _cumprod_a, samples=_SCANS)
_weights_of = primitive(
    _logsumexp_weights,
    lambda g, out, a, total, axis=None: _softmax_a(g, out, a, axis),
    None,  # it is a function of a alone
    name="weights of logsumexp",
    samples=[(((2, 3), (2, 1)), {"axis": -1})],
)
logsumexp = primitive(
    _logsumexp,
    lambda g, out, a, axis=None, keepdims=False: (
        _unreduce(g, a, axis, keepdims) * _weights_of(a, _unreduce(out, a, axis, keepdims), axis=axis)
    ),
    name="logsumexp",
    samples=_axes(),
)
softmax = primitive(_softmax, _softmax_a, name="softmax", samples=_AXIS)
log_softmax = primitive(
    _log_softmax,
    lambda g, out, a, axis=-1: g - np.exp(out) * np.sum(g, axis=axis, keepdims=True),
    name="log_softmax",
    samples=_AXIS,
)


@composed(np.average)
def average(a, axis=None, weights=None, *, keepdims=False):
    """`np.average`, also with differentiable weights of a's shape or, with an int axis, of that axis' length."""
    if weights is None:
        return np.mean(a, axis=axis, keepdims=keepdims)
    if np.ndim(weights) == 1 and np.ndim(a) > 1:
        if np.shape(weights)[0] != np.shape(a)[axis]:
            raise ValueError(
                f"average: weights have length {np.shape(weights)[0]}, axis {axis} has {np.shape(a)[axis]}"
            )
        weights = np.reshape(weights, [-1 if i == axis % np.ndim(a) else 1 for i in range(np.ndim(a))])
    weights = weights * np.ones_like(a)  # summed in the precision of both
    return np.sum(a * weights, axis=axis, keepdims=keepdims) / np.sum(weights, axis=axis, keepdims=keepdims)


# --- shape: the general ones are primitives, the others compositions of them ---


def _inverse(axes):
    """The permutation that undoes a transposition."""
    return None if axes is None else tuple(int(i) for i in np.argsort([i % len(axes) for i in axes]))


def _axis(axis, a) -> int:
    """An axis of a, counted from 0; AxisError if it has no such axis."""
    return np.lib.array_utils.normalize_axis_index(axis, np.ndim(a))


def _shaped(a, shape):
    """`np.reshape`; of an array by its method, which is there sooner."""
    return a.reshape(shape) if type(a) is np.ndarray else np.reshape(a, shape)


_reshape = primitive(
    _shaped,
    lambda g, out, a, shape: _shaped(g, np.shape(a)),
    name="reshape",
    samples=[(((2, 6),), {"shape": (3, 4)}), (((2, 6),), {"shape": -1})],
)
primitive(
    np.transpose,
    lambda g, out, a, axes=None: np.transpose(g, _inverse(axes)),
    samples=[(((2, 3, 4),), {"axes": (1, -1, 0)}), (((2, 3),), {})],
)
primitive(
    np.broadcast_to,
    lambda g, out, array, shape: g,
    samples=[(((3, 1),), {"shape": (2, 3, 4)}), (((),), {"shape": (2,)})],
)
_as_dtype = primitive(  # `float` stands for Python's own: a weak scalar
    lambda a, dtype: float(a) if dtype is float else (a if hasattr(a, "astype") else np.asarray(a)).astype(dtype),
    lambda g, out, a, dtype: g,
    name="astype",
    elementwise=True,
    samples=[(((2, 3),), {"dtype": np.float64})],
)
primitive(np.copy, lambda g, out, a: g, elementwise=True)


@composed(np.reshape)
def reshape(a, shape, order="C"):
    if order != "C":
        raise TypeError(f"reshape: order {order!r} is not supported on a Value or Tensor, only 'C'")
    return _reshape(a, tuple(shape) if isinstance(shape, Iterable) else (shape,))


@composed(np.ravel)
def ravel(a, order="C"):
    if order != "C":
        raise TypeError(f"ravel: order {order!r} is not supported on a Value or Tensor, only 'C'")
    flat = _reshape(a, (-1,))
    raw = _raw(flat)
    return np.copy(flat) if type(raw) is np.ndarray and not raw.flags.c_contiguous else flat  # NumPy's has no gaps


@composed(np.expand_dims)
def expand_dims(a, axis):
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    ndim = np.ndim(a) + len(axes)
    for i in axes:
        if not -ndim <= i < ndim:
            raise np.exceptions.AxisError(i, ndim, "expand_dims: axis")
    axes, rest = {i % ndim for i in axes}, iter(np.shape(a))
    return _reshape(a, tuple(1 if i in axes else next(rest) for i in range(ndim)))


@composed(np.squeeze)
def squeeze(a, axis=None):
    shape = np.shape(np.squeeze(np.empty(np.shape(a), bool), axis))  # NumPy's own checks and errors
    return _reshape(a, shape)


@composed(np.moveaxis)
def moveaxis(a, source, destination):
    order = np.moveaxis(np.empty((1,) * np.ndim(a)), source, destination)  # checks only
    source, destination = (
        [i % order.ndim for i in (s if isinstance(s, Iterable) else (s,))] for s in (source, destination)
    )
    rest = iter(i for i in range(order.ndim) if i not in source)
    places = dict(zip(destination, source))
    return np.transpose(a, tuple(places[i] if i in places else next(rest) for i in range(order.ndim)))


@composed(np.swapaxes)
def swapaxes(a, axis1, axis2):
    axes = list(range(np.ndim(a)))
    axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
    return np.transpose(a, tuple(axes))


@composed(np.matrix_transpose, np.linalg.matrix_transpose)
def matrix_transpose(x):
    return swapaxes(x, -1, -2)


def _at_least(n, place):
    """`np.atleast_nd`: place says where a shape gets its missing axes."""

    def at_least(*arrays):
        out = tuple(a if np.ndim(a) >= n else _reshape(a, place(np.shape(a))) for a in arrays)
        return out[0] if len(out) == 1 else out

    return at_least


atleast_1d = composed(np.atleast_1d)(_at_least(1, lambda shape: (1,)))
atleast_2d = composed(np.atleast_2d)(_at_least(2, lambda shape: (1,) * (2 - len(shape)) + shape))
atleast_3d = composed(np.atleast_3d)(
    _at_least(3, lambda shape: ((1, 1, 1), (1,) + shape + (1,), shape + (1,))[len(shape)])
)

# --- joining and splitting ---


def _concatenate_i(i, g, out, arrays, axis=0):
    start = sum(np.shape(a)[axis] for a in arrays[:i])
    return g[_lead(axis, g) + (slice(start, start + np.shape(arrays[i])[axis]),)]


_concatenate = primitive(
    lambda *arrays, axis=0: np.concatenate(arrays, axis),
    _concatenate_i,
    name="concatenate",
    variadic=True,
    samples=[(((2, 3), (2, 1)), {"axis": -1}), (((2,), (3,), (1,)), {})],
)
_stack = primitive(
    lambda *arrays, axis=0: np.stack(arrays, axis),
    lambda i, g, out, arrays, axis=0: g[_lead(axis, g) + (i,)],
    name="stack",
    variadic=True,
    samples=[(((2, 3), (2, 3)), {"axis": -1}), (((), (), ()), {})],
)


def _together(arrays) -> list:
    """What is to meet, with weak numbers in the dtype that they take: reshaped to arrays, they would be strong."""
    held = [x.dtype for x in arrays if isinstance(x, Array) and type(x._data) not in _WEAK_TYPES]
    held = [dtype for dtype in held if dtype.kind == "f"] or [
        x.dtype for x in map(_raw, arrays) if hasattr(x, "dtype") and not isinstance(x, _NUMBERS)
    ]
    if not held:
        return list(arrays)
    return [_met(x, held) if type(_raw(x)) in _WEAK_TYPES or isinstance(x, _NUMBERS) else x for x in arrays]


def _met(x, dtypes):
    """A weak number in the dtype that it takes beside those; a whole one that does not fit stays what it is."""
    x = x if isinstance(x, Array) else _number(x)
    dtype = np.result_type(*dtypes, _raw(x))
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= _raw(x) <= np.iinfo(dtype).max:
        return x
    return _as_dtype(x, dtype)


@composed(np.concatenate)
def concatenate(arrays, axis=0):
    if axis is None:
        return _concatenate(*map(ravel, _together(arrays)), axis=0)
    return _concatenate(*arrays, axis=axis)


@composed(np.stack)
def stack(arrays, axis=0):
    return _stack(*arrays, axis=axis)


@composed(np.vstack)
def vstack(tup):
    return _concatenate(*map(atleast_2d, _together(tup)), axis=0)


@composed(np.hstack)
def hstack(tup):
    arrays = [atleast_1d(a) for a in _together(tup)]
    return _concatenate(*arrays, axis=min(1, np.ndim(arrays[0]) - 1))


@composed(np.dstack)
def dstack(tup):
    return _concatenate(*map(atleast_3d, _together(tup)), axis=2)


@composed(np.column_stack)
def column_stack(tup):
    return _concatenate(*(a if np.ndim(a) > 1 else _reshape(a, (-1, 1)) for a in _together(tup)), axis=1)


@composed(np.block)
def block(arrays):
    """`np.block`: a matrix of numbers and arrays from nested lists."""

    def leaves(x):
        return [leaf for part in x for leaf in leaves(part)] if isinstance(x, list) else [x]

    def depth(x):
        return 1 + depth(x[0]) if isinstance(x, list) else 0

    def shaped(x):
        return [shaped(part) for part in x] if isinstance(x, list) else np.empty(np.shape(x), bool)

    def joined(x, axis):
        if isinstance(x, list):
            return _concatenate(*[joined(part, axis + 1) for part in x], axis=axis)
        part = next(parts)
        return _reshape(part, (1,) * (ndim - np.ndim(part)) + np.shape(part))

    np.block(shaped(arrays))  # NumPy's own checks and errors
    parts = iter(_together(leaves(arrays)))
    ndim = max([depth(arrays), *map(np.ndim, leaves(arrays))])
    return joined(arrays, -depth(arrays))


@composed(np.append)
def append(arr, values, axis=None):
    return concatenate([arr, values], axis)


@composed(np.array_split)
def array_split(ary, indices_or_sections, axis=0):
    parts = np.array_split(np.arange(np.shape(ary)[axis]), indices_or_sections)
    return [ary[_lead(axis, ary) + (slice(p[0], p[-1] + 1) if len(p) else slice(0),)] for p in parts]


@composed(np.split)
def split(ary, indices_or_sections, axis=0):
    np.split(np.empty(np.shape(ary)[axis]), indices_or_sections)  # NumPy's own error for an unequal division
    return array_split(ary, indices_or_sections, axis)


# --- indexing; parts of an index that are Values or Tensors are operands, so that a replay sees their current data ---

_HOLE = type("Hole", (), {"__repr__": lambda self: "·", "__reduce__": lambda self: "_HOLE"})()


def _filled(index, parts):
    parts = iter(parts)
    return tuple(next(parts) if i is _HOLE else i for i in index)


def _put(a, *parts, shape, index):
    """Zeros of that shape with `a` added at that index: the transpose of indexing."""
    index = _filled(index, parts)
    order = "F" if type(a) is np.ndarray and a.flags.fnc else "C"  # as `np.pad` has it
    out = np.zeros(shape, getattr(a, "dtype", np.float64), order)
    if all(i is None or i is Ellipsis or isinstance(i, (slice, int, np.integer)) for i in index):
        out[index] = a
    else:
        np.add.at(out, index, a)  # an index array may name an element twice
    return out


_getitem = primitive(
    lambda a, *parts, index: (np.float64(a) if type(a) is float else a)[_filled(index, parts)],
    lambda i, g, out, operands, index: (
        None if i else _scatter(g, *operands[1:], shape=np.shape(operands[0]), index=index)
    ),
    name="getitem",
    variadic=True,
    typed=(0,),
    samples=[
        (((3, 4),), {"index": (1,)}),
        (((3, 4),), {"index": (slice(None, None, -2), None, Ellipsis, slice(1, 3))}),
        (((3, 4),), {"index": (np.array([0, 2, 0]),)}),
        (((3, 4),), {"index": (np.array([0, 2]), np.array([[1], [1]]))}),
        (((3,),), {"index": (np.array([True, False, True]),)}),
    ],
)
_scatter = primitive(
    _put,
    lambda i, g, out, operands, shape, index: None if i else _getitem(g, *operands[1:], index=index),
    name="scatter",
    variadic=True,
    typed=(0,),
    samples=[(((2,),), {"shape": (3, 4), "index": (1, slice(1, 3))})],
)


def _index_array(i):
    """A list in an index, as an array; of integers if it is empty."""
    return (np.asarray(i) if len(i) else np.zeros(0, int)) if isinstance(i, (list, tuple)) else i


def _index_part(i):
    """A part of an index as `_getitem` takes it: a lazy array is an operand."""
    if isinstance(i, list):
        return _index_array(i)
    return _wrap(i) if not isinstance(i, Array) and _lazy(i) else i


def _lead(axis, a) -> tuple:
    """The part of an index before that axis."""
    return (slice(None),) * _axis(axis, a)


@composed(np.take)
def take(a, indices, axis=None):
    indices = _index_array(indices)
    if getattr(getattr(indices, "dtype", None), "kind", "i") == "b":
        raise TypeError("take: indices must be integers, got booleans")
    a = ravel(a) if axis is None or not np.ndim(a) else a
    return a[_lead(axis or 0, a) + (indices,)]


@composed(np.take_along_axis)
def take_along_axis(arr, indices, axis=-1):
    if axis is None:
        return ravel(arr)[indices]
    where = list(np.ogrid[tuple(slice(n) for n in np.shape(arr))])
    where[axis] = indices
    return arr[tuple(where)]


@composed(np.sort)
def sort(a, axis=-1, kind=None, order=None, *, stable=None):
    return take_along_axis(ravel(a) if axis is None else a, np.argsort(a, axis), -1 if axis is None else axis)


@composed(np.repeat)
def repeat(a, repeats, axis=None):
    n = np.size(a) if axis is None or not np.ndim(a) else np.shape(a)[axis]
    return take(a, np.repeat(np.arange(n), repeats), axis)


def _tile_x(g, out, x, reps):
    shape = np.shape(x)
    parts = [n for r, s in zip(reps[len(reps) - len(shape) :], shape) for n in (r, s)]
    spread = _reshape(g, (*reps[: len(reps) - len(shape)], *parts))
    return np.sum(spread, axis=(*range(len(reps) - len(shape)), *range(len(reps) - len(shape), spread.ndim, 2)))


_tile = primitive(
    lambda x, reps: np.tile(x, reps),
    _tile_x,
    name="tile",
    samples=[(((2, 3),), {"reps": (2, 2)}), (((3,),), {"reps": (2, 1, 3)}), (((2, 1),), {"reps": (1, 3)})],
)


@composed(np.tile)
def tile(A, reps):
    reps = tuple(reps) if isinstance(reps, Iterable) else (reps,)
    return _tile(A, (1,) * (np.ndim(A) - len(reps)) + tuple(map(operator.index, reps)))


@composed(np.pad)
def pad(array, pad_width, mode="constant", constant_values=0):
    """`np.pad` in its constant mode."""
    if mode != "constant":
        raise TypeError(f"pad: mode {mode!r} is not supported on a Value or Tensor, only 'constant'")
    shape = np.shape(array)
    frame = np.pad(np.zeros(shape, bool), pad_width, constant_values=True)
    widths = np.broadcast_to(pad_width, (len(shape), 2))
    index = tuple(slice(int(low), int(low) + n) for (low, _), n in zip(widths, shape))
    padded = _scatter(array, shape=frame.shape, index=index)
    if np.all(np.asarray(constant_values) == 0):
        return padded
    edge = np.pad(np.zeros(shape, array.dtype), pad_width, constant_values=constant_values)
    return np.where(frame, edge, padded)


@composed(np.flip)
def flip(m, axis=None):
    ndim = np.ndim(m)
    axes = range(ndim) if axis is None else np.lib.array_utils.normalize_axis_tuple(axis, ndim)
    return m[tuple(slice(None, None, -1 if i in axes else None) for i in range(ndim))]


composed(np.fliplr)(lambda m: flip(m, 1))
composed(np.flipud)(lambda m: flip(m, 0))


@composed(np.roll)
def roll(a, shift, axis=None):
    if axis is None:
        return _reshape(roll(ravel(a), shift, 0), np.shape(a)) if np.ndim(a) else np.positive(a)
    for s, i in np.broadcast(shift, axis):
        n = np.shape(a)[i]
        cut = (n - int(s) % n) if n else 0
        lead = (slice(None),) * _axis(int(i), a)
        a = _concatenate(a[lead + (slice(cut, None),)], a[lead + (slice(None, cut),)], axis=int(i))
    return a


@composed(np.rot90)
def rot90(m, k=1, axes=(0, 1)):
    if len({_axis(i, m) for i in axes}) != 2:
        raise ValueError(f"rot90: axes must be two different ones, got {axes}")
    for _ in range(k % 4):
        m = flip(swapaxes(m, *axes), axes[0])
    return m


def _window_x(g, out, x, window_shape, axis):
    total = 0.0
    for offset in np.ndindex(*window_shape):  # one shifted copy of g per place in the window
        starts = [sum(start for i, start in zip(axis, offset) if i == j) for j in range(np.ndim(x))]
        index = [slice(start, start + n) for start, n in zip(starts, np.shape(g))]
        total = total + _scatter(g[(Ellipsis,) + offset], shape=np.shape(x), index=tuple(index))
    return total


_window = primitive(
    np.lib.stride_tricks.sliding_window_view,
    _window_x,
    samples=[
        (((4, 5),), {"window_shape": (2, 3), "axis": (0, 1)}),
        (((2, 5),), {"window_shape": (2, 3), "axis": (1, 1)}),
    ],
)


@composed(np.lib.stride_tricks.sliding_window_view)
def sliding_window_view(x, window_shape, axis=None):
    window_shape = tuple(window_shape) if isinstance(window_shape, Iterable) else (window_shape,)
    axes = range(np.ndim(x)) if axis is None else axis if isinstance(axis, Iterable) else (axis,)
    return _window(x, window_shape, tuple(i % np.ndim(x) for i in axes))


@composed(np.diff)
def diff(a, n=1, axis=-1, prepend=None, append=None):
    if n < 0:
        raise ValueError(f"diff: n must not be negative, got {n}")
    if not n:
        return a  # without the ends: so it is in NumPy
    axis, length_1 = _axis(axis, a), list(np.shape(a))
    length_1[axis] = 1
    if prepend is not None or append is not None:
        parts = _together([x for x in (prepend, a, append) if x is not None])
        a = _concatenate(*[x if np.ndim(x) else np.broadcast_to(x, tuple(length_1)) for x in parts], axis=axis)
    lead, change = _lead(axis, a), np.not_equal if a.dtype == bool else np.subtract
    for _ in range(n):
        a = change(a[lead + (slice(1, None),)], a[lead + (slice(None, -1),)])
    return a


@composed(np.diagonal)
def diagonal(a, offset=0, axis1=0, axis2=1):
    a = moveaxis(a, (axis1, axis2), (-2, -1))
    rows, columns = np.shape(a)[-2:]
    i = np.arange(max(0, min(rows + min(offset, 0), columns - max(offset, 0))))
    return a[(Ellipsis, i - min(offset, 0), i + max(offset, 0))]


@composed(np.diag)
def diag(v, k=0):
    if np.ndim(v) not in (1, 2):
        raise ValueError(f"diag: expected 1 or 2 dimensions, got {np.ndim(v)}")
    if np.ndim(v) == 2:
        return diagonal(v, k)
    n = np.shape(v)[0] + abs(k)
    i = np.arange(np.shape(v)[0])
    return _scatter(v, shape=(n, n), index=(i - min(k, 0), i + max(k, 0)))


@composed(np.trace)
def trace(a, offset=0, axis1=0, axis2=1):
    return np.sum(diagonal(a, offset, axis1, axis2), axis=-1)


primitive(np.triu, lambda g, out, m, k=0: np.triu(g, k), samples=[(((3, 4),), {}), (((2, 3, 3),), {"k": 1})])
primitive(np.tril, lambda g, out, m, k=0: np.tril(g, k), samples=[(((3, 4),), {}), (((2, 3, 3),), {"k": -1})])

# --- products ---


def _matmul_x(g, out, x, y):
    if y.ndim == 1:
        return np.expand_dims(g, -1) * y
    if x.ndim == 1:
        return np.matmul(y, np.expand_dims(g, -1))[..., 0]
    return _matmul(g, y.swapaxes(-1, -2))


def _matmul_y(g, out, x, y):
    if x.ndim == 1:
        return x * g if y.ndim == 1 else np.expand_dims(x, -1) * np.expand_dims(g, -2)
    if y.ndim == 1:
        return np.matmul(x.swapaxes(-1, -2), np.expand_dims(g, -1))[..., 0]
    if y.ndim == 2 and x.ndim > 2:  # one product over the whole batch instead of a batch of products to sum
        x, g = (np.reshape(a, (math.prod(np.shape(a)[:-1]), np.shape(a)[-1])) for a in (x, g))
    return _matmul(x.swapaxes(-1, -2), g)


_MATMUL = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 2)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((5, 1, 2, 3), (4, 3, 2)),
]
_MATMUL += [((3,), (5, 3, 2)), ((5, 2, 3), (3,))]
TABLE[np.matmul] = primitive(
    _matmul, _matmul_x, _matmul_y, name="matmul", reads="operands", samples=[(shapes, {}) for shapes in _MATMUL]
)


def _dense_forward(x, w, b, activation=None):
    out = _matmul(x, w)
    if type(out) is not np.ndarray or out.dtype is not b.dtype:
        out = out + b
        return activation.forward(out) if activation else out
    out += b
    return activation.forward(out, out=out) if activation else out


def _dense_rule(wanted, g, out, operands, activation=None):
    x, w, b = operands
    g = activation.vjps[0](g, out, None) if activation else g
    return wanted[0] and _matmul_x(g, out, x, w), wanted[1] and _matmul_y(g, out, x, w), g


# activation(x @ w + b) in one buffer where three operations have three, of which no rule reads two: half the memory of
# a large layer. `activation` is a primitive that reads its result only, or None; `optimize` makes it three again.
_dense = primitive(
    _dense_forward,
    _dense_rule,
    name="dense layer",
    joint=True,
    samples=[(((2, 3), (3, 4), (4,)), {"activation": f}) for f in (TABLE[np.tanh], sigmoid, None)],
)


@composed(np.dot)
def dot(a, b):
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        return a * b
    return a @ b if np.ndim(b) <= 2 else tensordot(a, b, (-1, -2))


@composed(np.inner)
def inner(a, b):
    return a * b if np.ndim(a) == 0 or np.ndim(b) == 0 else tensordot(a, b, (-1, -1))


@composed(np.vdot)
def vdot(a, b):
    if np.ndim(a) == np.ndim(b) == 0:
        return a * b
    a, b = _together((a, b))
    return np.matmul(ravel(a), ravel(b))


@composed(np.outer, np.linalg.outer)
def outer(a, b):
    a, b = _together((a, b))
    return _reshape(a, (-1, 1)) * _reshape(b, (1, -1))


@composed(np.tensordot)
def tensordot(a, b, axes=2):
    a, b = _together((a, b))
    if not isinstance(axes, Iterable):
        axes = (range(np.ndim(a) - axes, np.ndim(a)), range(axes))
    left, right = ([_axis(i, x) for i in (s if isinstance(s, Iterable) else (s,))] for x, s in zip((a, b), axes))
    if [np.shape(a)[i] for i in left] != [np.shape(b)[i] for i in right]:
        raise ValueError(f"tensordot: axes {axes} do not match in shapes {np.shape(a)} and {np.shape(b)}")
    rows = [i for i in range(np.ndim(a)) if i not in left]
    columns = [i for i in range(np.ndim(b)) if i not in right]
    depth = math.prod(np.shape(a)[i] for i in left)
    m, n = math.prod(np.shape(a)[i] for i in rows), math.prod(np.shape(b)[i] for i in columns)
    product = np.matmul(
        _reshape(np.transpose(a, tuple(rows + left)), (m, depth)),
        _reshape(np.transpose(b, tuple(right + columns)), (depth, n)),
    )
    return _reshape(product, tuple(np.shape(a)[i] for i in rows) + tuple(np.shape(b)[i] for i in columns))


@composed(np.kron)
def kron(a, b):
    if not (np.ndim(a) and np.ndim(b)):
        return np.multiply(a, b)
    ndim = max(np.ndim(a), np.ndim(b))
    s, t = ((1,) * (ndim - np.ndim(x)) + np.shape(x) for x in (a, b))
    product = _reshape(a, tuple(n for i in s for n in (i, 1))) * _reshape(b, tuple(n for j in t for n in (1, j)))
    return _reshape(product, tuple(i * j for i, j in zip(s, t)))


def _einsum_i(i, g, out, operands, subscripts):
    # The gradient of operand i is an einsum of g and the other operands; letters that only operand i has were summed
    # over, so their gradient is broadcast.
    inputs, output = subscripts.split("->")
    inputs = inputs.split(",")
    others = [output] + inputs[:i] + inputs[i + 1 :]
    mine = "".join(c for c in inputs[i] if any(c in other for other in others))
    rest = (*operands[:i], *operands[i + 1 :])
    part = np.einsum(",".join(others) + "->" + mine, g, *rest, optimize=len(rest) > 1)  # as the forward computes
    shape = np.shape(operands[i])
    lengths = tuple(n if c in mine else 1 for c, n in zip(inputs[i], shape))
    return np.broadcast_to(np.reshape(part, lengths), shape)


_einsum = primitive(
    lambda *operands, subscripts: np.einsum(subscripts, *operands, optimize=len(operands) > 2),
    _einsum_i,
    name="einsum",
    variadic=True,
    samples=[
        (((2, 3), (3, 4)), {"subscripts": "ij,jk->ki"}),
        (((2, 3), (3,), (4,)), {"subscripts": "ij,j,k->i"}),
        (((2, 3),), {"subscripts": "ij->"}),
    ],
)


@composed(np.einsum)
def einsum(subscripts, *operands, optimize=True):
    """`np.einsum` with a subscript string: explicit or implicit, with ellipses and repeated letters."""
    if not isinstance(subscripts, str):
        raise TypeError(f"einsum: subscripts must be a string on a Value or Tensor, got {type(subscripts).__name__}")
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(operands):
        raise ValueError(f"einsum: {len(inputs)} subscripts for {len(operands)} operands")
    free = [c for c in string.ascii_letters if c not in subscripts]
    hidden = [max(0, np.ndim(x) - len(s.replace("...", ""))) if "..." in s else 0 for s, x in zip(inputs, operands)]
    dots = "".join(free[: max(hidden)])
    inputs = [s.replace("...", dots[len(dots) - n :]) for s, n in zip(inputs, hidden)]
    letters = "".join(inputs)
    if not arrow:
        right = dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c not in dots))
    output, operands = right.replace("...", dots), list(operands)
    for k, s in enumerate(inputs):
        if len(s) != np.ndim(operands[k]):
            raise ValueError(f"einsum: subscripts {s!r} for operand {k} of shape {np.shape(operands[k])}")
        for c in sorted(set(s)):
            while s.count(c) > 1:  # a repeated letter is a diagonal
                i, j = s.index(c), s.rindex(c)
                if np.shape(operands[k])[i] != np.shape(operands[k])[j]:
                    raise ValueError(f"einsum: {c!r} names axes of different lengths in operand {k}")
                operands[k] = diagonal(operands[k], 0, i, j)
                s = s[:i] + s[i + 1 : j] + s[j + 1 :] + c
        inputs[k] = s
    long = {c for s, x in zip(inputs, operands) for c, n in zip(s, np.shape(x)) if n != 1}
    for k, s in enumerate(inputs):  # lengths of 1 broadcast: drop them, another operand has the length
        short = [i for i, n in enumerate(np.shape(operands[k])) if n == 1 and s[i] in long]
        if short:
            operands[k] = squeeze(operands[k], tuple(short))
            inputs[k] = "".join([c for i, c in enumerate(s) if i not in short])
    return _einsum(*operands, subscripts=",".join(inputs) + "->" + output)


# --- linear algebra; batches of matrices as NumPy has them ---


def _t(a):
    return np.swapaxes(a, -1, -2)


def _solve_a(g, out, a, b):
    x = _solve_b(g, out, a, b)
    return -(np.expand_dims(x, -1) * np.expand_dims(out, -2)) if np.ndim(b) == 1 else -np.matmul(x, _t(out))


def _solve_b(g, out, a, b):
    if np.ndim(b) > 1:
        return np.linalg.solve(_t(a), g)
    return np.linalg.solve(_t(a), np.expand_dims(g, -1))[..., 0]  # also where one vector b meets a batch of matrices


def _cholesky_a(g, out, a):
    # Murray 2016, "Differentiation of the Cholesky decomposition", eq. 9. NumPy reads the lower triangle only.
    half = np.tril(np.ones(np.shape(a)[-2:])) - 0.5 * np.eye(np.shape(a)[-1])
    s = np.linalg.solve(_t(out), _t(np.linalg.solve(_t(out), _t(np.matmul(_t(out), g) * half))))
    return (s + _t(s)) * half


_SQUARE = [((((3, 3), "definite"),), {}), ((((2, 3, 3), "definite"),), {})]
primitive(np.linalg.inv, lambda g, out, a: -np.matmul(_t(out), np.matmul(g, _t(out))), samples=_SQUARE)
primitive(
    np.linalg.solve,
    _solve_a,
    _solve_b,
    samples=[
        ((((3, 3), "definite"), (3,)), {}),
        ((((2, 3, 3), "definite"), (3,)), {}),
        ((((2, 3, 3), "definite"), (3, 2)), {}),
    ],
)


# The gradient of a determinant is the matrix of cofactors, det(a) * inv(a).T, which singular matrices have, too. With
# a = u @ diag(s) @ v, it is u @ diag(products of the other s) @ v, up to the signs of det(u) and det(v).


def _decomposed(a):
    """u, s, v as np.linalg.svd gives them, nan if a is not finite; and the sign of det(u) * det(v)."""
    finite = np.isfinite(a).all((-1, -2), keepdims=True)
    u, s, v = np.linalg.svd(np.where(finite, a, np.zeros_like(a)))
    sign = np.sign(np.linalg.det(u) * np.linalg.det(v))[..., None, None]
    return np.where(finite, u, np.nan), s, v, sign


def _cofactors(a):
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        inverse = np.linalg.inv(a)
        squares = (np.einsum("...ij,...ij->...", x, x) for x in (a, inverse))  # of Frobenius' norms
        if not np.any(math.prod(squares) > 1 / np.finfo(inverse.dtype).eps):
            return np.linalg.det(a)[..., None, None] * _t(inverse)
    u, s, v, sign = _decomposed(a)
    return sign * ((u * _others(s)[..., None, :]) @ v)


def _cofactors_slope(h, a):
    """The gradient by a of sum(h * cofactors(a)): linear in h, with a symmetric matrix, the Hessian of det."""
    u, s, v, sign = _decomposed(a)
    h = sign * (_t(u) @ h @ _t(v))
    own = np.eye(s.shape[-1], dtype=bool)
    pairs = np.where(own, 0.0, _others(np.where(own, 1.0, s[..., None, :])))  # the product of all s but two
    diagonal = pairs @ np.diagonal(h, 0, -2, -1)[..., None]
    return u @ np.where(own, diagonal, -pairs * _t(h)) @ v


def _cofactors_slope_a(g, out, h, a):
    # The third derivative of det, from det(a) * (tr(x) * tr(y) - tr(x @ y)), the second. Only of invertible matrices.
    b = np.linalg.inv(a)
    x, y = np.matmul(b, h), np.matmul(b, g)
    tx, ty, txy, d = (np.expand_dims(z, (-1, -2)) for z in (*map(_traces, (x, y, np.matmul(x, y))), np.linalg.det(a)))
    both = np.matmul(x, y) + np.matmul(y, x) - ty * x - tx * y
    return d * _t((tx * ty - txy) * b + np.matmul(both, b))


def _traces(a):
    return np.trace(a, 0, -2, -1)


_cofactor = primitive(
    _cofactors, lambda g, out, a: _slope_of_cofactors(g, a), name="matrix of cofactors", samples=_SQUARE
)
_slope_of_cofactors = primitive(
    _cofactors_slope,
    lambda g, out, h, a: _slope_of_cofactors(g, a),
    _cofactors_slope_a,
    name="slope of cofactors",
    samples=[((shape, (shape, "definite")), {}) for shape in ((3, 3), (2, 3, 3))],
)
primitive(np.linalg.det, lambda g, out, a: np.expand_dims(g, (-1, -2)) * _cofactor(a), samples=_SQUARE)
_logdet = primitive(
    lambda a: np.linalg.slogdet(a)[1],
    lambda g, out, a: np.expand_dims(g, (-1, -2)) * _t(np.linalg.inv(a)),
    name="logabsdet",
    samples=_SQUARE,
)
_signdet = primitive(lambda a: np.linalg.slogdet(a)[0], None, name="signdet")
primitive(np.linalg.cholesky, _cholesky_a, samples=_SQUARE)
_norm = primitive(
    lambda x, axis=None, keepdims=False: np.sqrt(np.sum(x * x, axis=axis, keepdims=bool(keepdims))),
    lambda g, out, x, axis=None, keepdims=False: (
        _unreduce(g, x, axis, keepdims) * _over(x, _unreduce(out, x, axis, keepdims))
    ),
    name="norm",
    samples=_axes(),
)


@composed(np.linalg.slogdet)
def slogdet(a):
    return type(np.linalg.slogdet(np.eye(1)))(_signdet(a), _logdet(a))


@composed(np.linalg.norm)
def norm(x, ord=None, axis=None, keepdims=False):
    """`np.linalg.norm` of vectors (ord None, 1, 2, inf, -inf) and Frobenius' of matrices; its gradient at 0 is 0."""
    if x.dtype.kind != "f":
        x = x.astype(np.float64)  # as NumPy does, before integers overflow
    vector = np.ndim(x) == 1 if axis is None else not isinstance(axis, Iterable)
    if ord is None or (vector and ord == 2) or (ord == "fro" and not vector):
        return _norm(x, axis=axis if not isinstance(axis, list) else tuple(axis), keepdims=keepdims)
    if vector and ord in (1, np.inf, -np.inf):
        reduce = {1: np.sum, np.inf: np.max, -np.inf: np.min}[ord]
        return reduce(np.abs(x), axis=axis, keepdims=keepdims)
    raise TypeError(
        f"norm: ord={ord!r} is not supported for {'vectors' if vector else 'matrices'} on a Value or Tensor"
    )


# --- no gradient: nodes all the same, so that a replay recomputes them ---

for _function in (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal, np.floor_divide):
    primitive(_function, None, None)
for _function in (np.logical_and, np.logical_or, np.logical_xor, np.bitwise_and, np.bitwise_or, np.bitwise_xor):
    primitive(_function, None, None)
for _function in (np.logical_not, np.invert, np.isnan, np.isfinite, np.isinf, np.signbit):
    primitive(_function, None)
for _function in (np.sign, np.floor, np.ceil, np.rint, np.trunc):
    primitive(_function, None)
for _function in (np.any, np.all, np.argmax, np.argmin, np.argsort, np.count_nonzero):
    primitive(_function, None)
TABLE[np.around] = primitive(np.round, None, elementwise=True)
primitive(np.isclose, None, None, elementwise=True)
_detach = primitive(lambda a: a, None, name="detach", elementwise=True)


@composed(np.nan_to_num)
def nan_to_num(x, copy=True, nan=0.0, posinf=None, neginf=None):
    """`np.nan_to_num`; replaced elements have no gradient."""
    if x.dtype.kind != "f":
        return np.copy(x)
    info = np.finfo(x.dtype)
    high, low = (info.max if posinf is None else posinf), (info.min if neginf is None else neginf)
    x = np.where(np.isnan(x), float(nan), x)
    return np.where(x == np.inf, float(high), np.where(x == -np.inf, float(low), x))


def _plain(function):
    """Enters a function whose answer is about shapes or a plain truth: it is computed on the data and no node."""

    def on_data(*args, **kwargs):
        return function(*map(_raw, args), **{k: _raw(v) for k, v in kwargs.items()})

    TABLE[function] = on_data


for _function in (np.shape, np.ndim, np.allclose, np.array_equal, np.array_equiv, np.result_type, np.iscomplexobj):
    _plain(_function)


TABLE[np.size] = lambda a, axis=None: np.size(np.broadcast_to(0.0, np.shape(a)), axis)  # Dask does not offer it


def _like(function):
    """Enters zeros_like and its kin: an array, or a Python float for a weak scalar."""

    def like(a, *args, **kwargs):
        raw = _raw(a)
        fill = kwargs.get("fill_value", args[0] if args and function is np.full_like else None)
        if isinstance(fill, Value):
            return np.broadcast_to(fill, np.shape(a)).astype(np.result_type(kwargs.get("dtype") or _raw(a)))
        out = function(raw, *map(_raw, args), **kwargs)
        return float(out) if type(raw) is float and out.ndim == 0 and not kwargs else out

    TABLE[function] = like


for _function in (np.zeros_like, np.ones_like, np.full_like, np.empty_like):
    _like(_function)


# --- operators and methods of both classes, all from the table ---


def _value_operator(prim: Primitive, swapped=False):
    scalar, differentiable, cls, new = prim.scalar, prim.vjps[0] is not None, Value, object.__new__
    forward, ndarray = prim.forward, np.ndarray

    def method(self, other):
        x, kind = self._data, type(other)
        if kind is cls:  # this copy's, also after a reload
            y = other._data
        elif kind is float:
            y = other
        elif kind is int and (type(x) is float or self.dtype.kind == "f"):
            y = other = float(other)
        else:
            y = None
        if type(x) is float and type(y) is float and scalar is not None and _mode.recording:
            # The path of micrograd's world: what `_apply` would do, spelled out, as a graph has 10^5 such nodes.
            try:
                out = scalar(y, x) if swapped else scalar(x, y)
            except (ArithmeticError, ValueError):
                return _apply(prim, (other, self) if swapped else (self, other), _NO_PARAMS)
            node = new(cls)
            node._data = out
            node._grad = None
            node._prim = prim
            if swapped:
                node._x, node._y = other, self
            else:
                node._x, node._y = self, other
            node._needs = differentiable and (self._needs or (kind is cls and other._needs))
            node._number = _next_number()
            node.label = ""
            return node
        args = (other, self) if swapped else (self, other)
        if type(x) is ndarray and x.dtype.kind == "f" and x.size < HOOK.limit:
            # And the path of small arrays, whose arithmetic costs less than the questions.
            if type(y) is float or (type(y) is ndarray and y.dtype is x.dtype and y.size < HOOK.limit):
                return _node(forward(y, x) if swapped else forward(x, y), prim, args, _NO_PARAMS)
        if y is None and not isinstance(other, _OPERANDS) and KINDS[kind] is None:
            return NotImplemented
        return _apply(prim, args, _NO_PARAMS)

    return method


def _value_function(prim: Primitive):
    """A method without arguments: the same path for functions of one number."""
    scalar, differentiable, cls, new = prim.scalar, prim.vjps[0] is not None, Value, object.__new__

    def method(self):
        if type(self._data) is float and _mode.recording:
            try:
                out = scalar(self._data)
            except (ArithmeticError, ValueError):
                return _apply(prim, (self,), _NO_PARAMS)
            node = new(cls)
            node._data, node._grad, node._prim, node._x, node._y = out, None, prim, self, None
            node._needs, node._number, node.label = differentiable and self._needs, _next_number(), ""
            return node
        return _apply(prim, (self,), _NO_PARAMS)

    return method


def _tensor_operator(prim: Primitive, swapped=False):
    forward, ndarray = prim.forward, np.ndarray

    def method(self, other):
        x, kind = self._data, type(other)
        if kind is Value:
            return NotImplemented
        if type(x) is ndarray and x.size < HOOK.limit:
            # What `_apply` would do for small arrays, spelled out: there, its checks cost more than the arithmetic.
            y = None
            if kind is float:
                y = other
            elif kind is Tensor:
                y = other._data
                if type(y) is not ndarray or y.dtype is not x.dtype or y.size > x.size:
                    y = None
            elif kind is int and x.dtype.kind == "f":
                y = float(other)
            if y is not None and (kind is not Tensor or other._choice is self._choice):
                out = _new(Tensor)
                out._data = forward(y, x) if swapped else forward(x, y)
                out._choice, out._owner = self._choice, None
                return out
        if not isinstance(other, _OPERANDS) and KINDS[kind] is None:
            return NotImplemented
        out = _apply(prim, (other, self) if swapped else (self, other), _NO_PARAMS)
        return np.bool_(out._data) if isinstance(out._data, (bool, np.bool_)) else out  # of numbers, a plain truth

    return method


def _in_place_operator(prim: Primitive):
    """`t += x`: arrays are written to once the whole result is there; a 0-d Tensor is replaced, like a number."""

    def method(self, other):
        if prim.ufunc and self.size > _LITTLE and type(other) is not Value:
            # Where nothing can fail half-way, without an array in between.
            x, y = KINDS[type(self._data)].target(self._data), float(other) if type(other) is int else _raw(other)
            if x is not None and x.dtype.kind == "f" and _harmless(np.geterr()):
                alike = type(y) is not float and KINDS[type(y)] is not None and not _lazy(y)
                if type(y) is float or (alike and y.dtype is x.dtype and y.shape == x.shape):
                    prim.forward(x, _fetched(y) if alike else y, out=x)
                    return self
        if isinstance(other, Value) or not (isinstance(other, _OPERANDS) or KINDS[type(other)] is not None):
            return NotImplemented
        out = _apply(prim, (self, other), _NO_PARAMS)
        if not self.ndim and not out.ndim:
            return out
        if out.shape != self.shape:
            raise ValueError(f"Tensor: in place, shape {self.shape} cannot take a result of shape {out.shape}")
        if not np.can_cast(out.dtype, self.dtype, "same_kind"):
            raise TypeError(f"Tensor: in place, dtype {self.dtype} cannot take a result of dtype {out.dtype}")
        raw = KINDS[type(self._data)].write(self._data, out._data)
        if raw is not self._data:
            self._become(raw)
        return self

    return method


_LITTLE = 1 << 12  # elements up to which an array in between costs nothing
_OPERANDS = (Array, np.ndarray, np.generic, int, float, list, tuple)

for _forward, (_name, _, _) in _OPERATORS.items():
    _prim = TABLE[_forward]
    if len(_prim.vjps) == 1:
        setattr(Array, f"__{_name}__", lambda self, _prim=_prim: _prim(self))
        if _prim.scalar:
            setattr(Value, f"__{_name}__", _value_function(_prim))
        continue
    for _class, _operator in ((Value, _value_operator), (Tensor, _tensor_operator)):
        setattr(_class, f"__{_name}__", _operator(_prim))
        if hasattr(operator, f"__i{_name}__"):
            setattr(_class, f"__r{_name}__", _operator(_prim, swapped=True))
    if hasattr(operator, f"__i{_name}__"):
        setattr(Tensor, f"__i{_name}__", _in_place_operator(_prim))

for _prim in PRIMITIVES.values():
    _prim.builtin = True

# Methods: every primitive that takes its operands one by one, and the compositions that ndarray has as methods.
for _key, _function in list(TABLE.items()):
    _name = getattr(_function, "name", _key.__name__)
    if (
        _name.isidentifier()
        and _name not in vars(Array)
        and (hasattr(np.ndarray, _name) or getattr(_function, "operands", None))
    ):
        setattr(Array, _name, lambda self, *args, _function=_function, **kwargs: _function(self, *args, **kwargs))
        if getattr(_function, "scalar", None) and len(_function.vjps) == 1:
            setattr(Value, _name, _value_function(_function))


# ---------------------------------------------------------------------------------------------------------------------
# 6. nn
#
# Networks on Values: modules hold parameters, losses give the Value to call `backward` on, optimizers step. In:
# numbers, arrays, Tensors (a batch that a replay reads anew) or Values (gradients flow on to them). Also importable as
# the module `picograd.nn`. Invariant: a parameter stays the same Value; only its data and gradient change.
# ---------------------------------------------------------------------------------------------------------------------


def _understood(name: str, expected: str, function: Callable, x: Any):
    """function(x), or an error that says which argument is wrong, what was expected and what came."""
    try:
        return function(x)
    except (TypeError, ValueError) as error:
        message = f"{name} must be {expected}, got {reprlib.repr(x)}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _path(x: Any, name: str) -> Path:
    """A path that was passed, checked."""
    if not isinstance(x, (str, os.PathLike)):
        raise TypeError(f"{name} must be a string or path, got {type(x).__name__}")
    path = _understood(name, "a string or path", Path, x)
    if "\0" in str(path):
        raise ValueError(f"{name} must be a path without zero bytes, got {str(path)!r}")
    return path


class Module:
    """A part of a network. Its parameters are the Values in its attributes, in lists, tuples, dicts and sub-Modules.

    Attributes may be in `__slots__`. A Value in an attribute of the class belongs to all its instances, and is no
    parameter of theirs; nor is a result, or what no gradient flows through.
    """

    _picograd_part = True  # how another copy of this file is known

    def named_parameters(self) -> Iterator[tuple[str, Value]]:
        """(dotted name, parameter), in order of definition, those in slots first, by name; a shared one once."""
        seen: set[int] = set()
        ahead: list[tuple[str, Any]] = [("", self)]  # a stack: containers may be deep, and may hold themselves
        while ahead:
            name, x = ahead.pop()
            if isinstance(x, dict):
                items = x.items()
            elif isinstance(x, Module):
                items = vars(x).items()
                if slots := _slots(type(x)):
                    items = [*[(key, getattr(x, key, None)) for key in slots], *items]
            elif isinstance(x, (list, tuple)):
                items = enumerate(x)
            elif isinstance(x, Value) and x._prim is None and x._needs:  # not a result that a module remembers
                items = ()
            else:
                if _of_another_copy(type(x)):
                    raise TypeError(_two_copies(type(x)))
                continue
            if id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, Value):
                yield name, x
            ahead += [(f"{name}.{key}" if name else str(key), item) for key, item in reversed(list(items))]

    def parameters(self) -> list[Value]:
        """The parameters, in order of definition."""
        return [p for _, p in self.named_parameters()]

    def zero_grad(self) -> None:
        """Resets the gradients of all parameters."""
        for p in self.parameters():
            p._grad = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the parameters to a .npz file of exactly that path, all or nothing.

        ValueError, and nothing is written, if two parameters have the same name: `{1: v, "1": w}`, or "b.c" beside
        "b" that holds "c".
        """
        import zipfile

        path, parameters = _path(path, "save: path"), self._by_name("save")

        def write(file):
            with zipfile.ZipFile(file, "w") as archive:  # what np.savez writes, for parameters of any name
                for name, p in parameters.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asanyarray(p.data.data), allow_pickle=False)

        _write_whole(path, write)

    def load(self, path: str | os.PathLike) -> None:
        """Reads what `save` wrote. ValueError if names or shapes differ, and then no parameter is changed."""
        import zipfile

        path, parameters = _path(path, "load: path"), self._by_name("load")
        try:
            with zipfile.ZipFile(path) as archive:
                headers = {}
                for member in archive.namelist():
                    name = member.removesuffix(".npy")
                    if name in headers:
                        raise ValueError(f"it holds {name!r} twice")
                    with archive.open(member) as file:
                        headers[name] = _header(file)
                self._expect(parameters, headers, path)  # before anything is read, however large the file says it is
                arrays = {}
                for name in parameters:
                    with archive.open(f"{name}.npy") as file:
                        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, _Mismatch):
            raise
        except Exception as error:  # of many kinds, for the many ways in which a file can be another or broken
            raise ValueError(f"load: {str(path)!r} is not a file that save wrote ({error})") from None
        new = {name: _conform(arrays[name], p._data, f"load: parameter {name!r}") for name, p in parameters.items()}
        for name, p in parameters.items():
            p._data = new[name]

    def _by_name(self, who: str) -> dict[str, Value]:
        import zipfile

        parameters: dict[str, Value] = {}
        for name, p in self.named_parameters():
            if name in parameters:
                raise ValueError(f"{who}: two parameters have the name {name!r}")
            encoded = name.encode(errors="replace")
            if encoded.decode() != name or zipfile.ZipInfo(name).filename != name or len(encoded) > 1 << 15:
                raise ValueError(f"{who}: a file cannot hold a parameter of the name {reprlib.repr(name)}")
            parameters[name] = p
        return parameters

    @staticmethod
    def _expect(parameters: dict[str, Value], headers: dict[str, tuple], path: Path) -> None:
        for name in {**parameters, **headers}:
            which = f"load: {str(path)!r}: parameter {name!r}"
            if name not in headers or name not in parameters:
                raise _Mismatch(f"{which} is not in the {'model' if name in headers else 'file'}")
            shape, dtype = headers[name]
            if dtype.kind not in "fiub":
                raise _Mismatch(f"{which} must be of real numbers, in the file it is of dtype {dtype}")
            if shape != parameters[name].shape:
                raise _Mismatch(f"{which} has shape {parameters[name].shape}, in the file {shape}")


@functools.lru_cache(1000)
def _of_another_copy(cls: type) -> bool:
    """Whether it is a Value, Tensor or Module of another copy of this file."""
    return not issubclass(cls, (Array, Module)) and (hasattr(cls, "_picograd") or hasattr(cls, "_picograd_part"))


@functools.lru_cache(1000)
def _slots(cls: type) -> list[str]:
    """The names of attributes that a class and its bases keep in slots."""
    return [name for c in reversed(cls.__mro__) for name, x in vars(c).items() if type(x) is types.MemberDescriptorType]


class _Mismatch(ValueError):
    """A file of parameters, but of other ones."""


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype that a .npy file says it has. In version 1 of the format, the one for numbers, a header is
    short."""
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"version {version} of the format .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _write_whole(path: Path, write: Callable) -> None:
    """Calls write(file) on a file beside path, and then puts it, complete, in path's place.

    A link stays one, and its target is replaced; a file's permissions stay; a device or pipe is written to.
    """
    target = Path(os.path.realpath(path))
    if path.exists() and not target.is_file():
        whole = io.BytesIO()  # where one can go back, too
        write(whole)
        path.write_bytes(whole.getvalue())
        return
    try:
        if target.is_symlink():  # one that leads nowhere is resolved
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as folder:
            new = Path(folder, target.name)
            with open(new, "wb") as file:
                write(file)
            if target.exists():
                new.chmod(target.stat().st_mode & 0o7777)
            os.replace(new, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # which it does not name


_ACTIVATIONS = {
    "tanh": TABLE[np.tanh],
    "relu": relu,
    "sigmoid": sigmoid,
    "gelu": gelu,
    "softplus": softplus,
    None: None,
}


def _activation(activation):
    """The function of an activation's name; of one of NumPy's, the primitive."""
    if callable(activation):
        return TABLE.get(activation, activation) if isinstance(activation, np.ufunc) else activation
    if not isinstance(activation, str | None) or activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be a function or one of {list(_ACTIVATIONS)}, got {activation!r}")
    return _ACTIVATIONS[activation]


def _generator(seed: Any) -> np.random.Generator:
    return _understood("seed", "a whole number, None or a NumPy Generator", np.random.default_rng, seed)


def _weights(shape, activation, seed, dtype) -> Value:
    """Normal weights of a variance that keeps signals' size through a layer: 2 / (nin + nout) for tanh and its like
    (Glorot and Bengio 2010, eq. 12), 2 / nin for rectifiers (He et al. 2015, eq. 10)."""
    nin, nout = shape[0], shape[1] if len(shape) > 1 else 1
    for name, n in (("nin", nin), ("nout", nout)):
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"{name} must be a positive integer, got {n!r}")
    rectifier = _activation(activation) in (relu, gelu, softplus)
    scale = math.sqrt(2.0 / (nin if rectifier else nin + nout))
    _understood("dtype", "a floating dtype of NumPy's", np.dtype, dtype)
    return Value(_generator(seed).normal(0.0, scale, shape), dtype=dtype, label="w")


def _layer_input(x, w: Value):
    """One sample (nin,) or a batch (n, nin) for weights w; a list of numbers and Values becomes one sample."""
    if isinstance(x, (list, tuple)) and any(isinstance(i, Array) for i in x):
        x = np.stack([i if isinstance(i, Value) else Value(i) for i in x])
        x = x if x.dtype == w.dtype else x.astype(w.dtype)
    elif not isinstance(x, (Array, np.ndarray)) and not _lazy(x):
        x = _as_raw(x, w.dtype, "input")
    shape, nin = x.shape, w.shape[0]
    if len(shape) not in (1, 2) or shape[-1] != nin:
        raise ValueError(f"input: expected width {nin}, shape ({nin},) or (n, {nin}); got shape {shape}")
    return x


class Neuron(Module):
    """activation(x @ w + b), with w of shape (nin,) and b of (). In: (nin,) or (n, nin); out: () or (n,)."""

    def __init__(self, nin: int, activation: Any = "tanh", seed: Any = None, dtype: Any = None):
        self.w = _weights((nin,), activation, seed, dtype)
        self.b = Value(np.zeros(()), dtype=dtype, label="b")
        self.activation, self._function = activation, _activation(activation)

    def __call__(self, x: Any) -> Value:
        out = _layer_input(x, self.w) @ self.w + self.b
        return self._function(out) if self._function else out

    def __repr__(self):
        return f"Neuron({self.w.size}, activation={self.activation!r})"


class Layer(Module):
    """activation(x @ w + b), w (nin, nout), b (nout,). In: (nin,) or (n, nin); out: (nout,) or (n, nout)."""

    def __init__(self, nin: int, nout: int, activation: Any = "tanh", seed: Any = None, dtype: Any = None):
        self.w = _weights((nin, nout), activation, seed, dtype)
        self.b = Value(np.zeros(nout), dtype=dtype, label="b")
        self.activation, self._function = activation, _activation(activation)

    def __call__(self, x: Any) -> Value:
        x, f = _layer_input(x, self.w), self._function
        if f is None or (isinstance(f, Primitive) and f.builtin and f.reads == "out"):
            if math.prod(x.shape[:-1]) * self.w.shape[1] < HOOK.limit:
                return _apply(_dense, (x, self.w, self.b), {"activation": f})
        out = x @ self.w + self.b
        return f(out) if f else out

    def __repr__(self):
        return f"Layer({self.w.shape[0]}, {self.w.shape[1]}, activation={self.activation!r})"


class MLP(Module):
    """A multi-layer perceptron: layers of the given widths, the last one linear.

    nin: width of the input; nouts: widths of the layers; activation: name or function, of all layers but the last.
    seed: an integer or NumPy Generator, for the same weights again; dtype: of the parameters.

    In: a list of nin numbers or Values, or (nin,), or a batch (n, nin); a Tensor batch is read anew by a replay.
    Out: (nouts[-1],) or (n, nouts[-1]); if that is 1, the axis is dropped: () or (n,).
    """

    def __init__(self, nin: int, nouts: Sequence[int], activation: Any = "tanh", seed: Any = None, dtype: Any = None):
        if not isinstance(nouts, (list, tuple, np.ndarray)) or getattr(nouts, "ndim", 1) != 1 or not len(nouts):
            raise ValueError(f"nouts must be a list of at least one width, got {nouts!r}")
        _activation(activation)  # also where no layer has it
        rng = _generator(seed)
        widths = [nin, *nouts]
        self.layers = [
            Layer(a, b, activation if i < len(nouts) - 1 else None, rng, dtype)
            for i, (a, b) in enumerate(zip(widths, widths[1:]))
        ]
        for i, layer in enumerate(self.layers, 1):
            layer.w.label, layer.b.label = f"w{i}", f"b{i}"

    def __call__(self, x: Any) -> Value:
        for layer in self.layers:
            x = layer(x)
        return _apply(_reshape, (x,), {"shape": (-1,) * (x.ndim - 1)}) if x.shape[-1] == 1 else x

    def __repr__(self):
        if not self.layers:
            return "MLP without layers"
        widths, count = [layer.b.size for layer in self.layers], sum(p.size for p in self.parameters())
        activation = self.layers[0].activation
        return f"MLP({self.layers[0].w.shape[0]}, {widths}, activation={activation!r}) with {count} parameters"


# --- losses: the mean over the samples, a 0-d Value. Foreign labels are not checked, which would compute them; in a
# replay, those of cross_entropy are ---


def _numbers(name: str, which: str, x: Any):
    """What a loss is computed of: a Value or Tensor, or anything that can be an operand."""
    if isinstance(x, Array):
        return x
    x = _constant(x, f"{name}: {which}")
    return np.asarray(x) if type(x) in _WEAK_TYPES else x


def _same_shape(name: str, first: str, second: str, x: Any, y: Any) -> tuple:
    """Prediction and target of a loss; in double precision if both are integers or masks, which may be too short."""
    x, y = _numbers(name, first, x), _numbers(name, second, y)
    if x.shape != y.shape:
        raise ValueError(f"{name}: {first} and {second} must have the same shape, got {x.shape} and {y.shape}")
    return (x, y) if x.dtype.kind == "f" or y.dtype.kind == "f" else (x.astype(np.float64), y)


def _mse_rule(wanted, g, out, operands):
    x, y = operands
    slope = (x - y) * (g * (2.0 * _share(x, None)))
    return slope, wanted[1] and -slope


_mse = primitive(
    lambda x, y: np.mean(np.square(x - y)), _mse_rule, name="mse", joint=True, samples=[(((2, 3), (2, 3)), {})]
)
_mse.builtin = True


def mse_loss(prediction: Value, target: Any) -> Value:
    """The mean of (prediction - target)**2, for two of the same shape."""
    prediction, target = _same_shape("mse_loss", "prediction", "target", prediction, target)
    return _apply(_mse, (prediction, target), _NO_PARAMS)


def _label_mask_forward(labels, k):
    labels = np.asarray(labels)
    mask = labels[..., None] == np.arange(k)
    if np.count_nonzero(mask) != labels.size:
        wrong = labels[~mask.any(axis=-1)]
        kind = TypeError if np.any(wrong != np.floor(wrong)) else ValueError
        raise kind(f"cross_entropy: labels must be integers from 0 to {k - 1}, got {wrong.min()} to {wrong.max()}")
    return mask


# Where log-probabilities count. A mask, as indices do not run on any kind of array; its labels are checked whenever it
# is computed, so that a replay does not take those that are out of range for none.
_label_mask = primitive(_label_mask_forward, None, name="label mask")
_label_mask.builtin = True


def cross_entropy(logits: Value, labels: Any) -> Value:
    """The mean of -log(softmax(logits)[label]), for logits (n, k) or (k,) and integer labels (n,) or () below k."""
    logits, labels = _numbers("cross_entropy", "logits", logits), _numbers("cross_entropy", "labels", labels)
    if logits.shape[:-1] != labels.shape or not logits.shape:
        raise ValueError(f"cross_entropy: labels must have shape {logits.shape[:-1]}, got {labels.shape}")
    if logits.dtype == np.float16:  # in which a sum of exponentials may overflow
        return cross_entropy(logits.astype(np.float32), labels).astype(np.float16)
    k, raw = logits.shape[-1], _raw(labels)
    if _lazy(raw) and raw.dtype.kind not in "iub":
        raise TypeError(f"cross_entropy: labels must be integers, got dtype {raw.dtype}")
    if _lazy(raw):
        mask = (_recorded(labels) if isinstance(labels, Tensor) else raw)[..., None] == np.arange(k)
    elif isinstance(labels, Tensor):  # a node, so that a replay reads them anew
        mask = _record(_label_mask, (labels,), {"k": k})
    else:
        mask = _label_mask(labels, k=k)
    return -np.mean(np.sum(np.where(mask, log_softmax(logits), 0.0), axis=-1))


_sigmoid_entropy = primitive(  # softplus(x) - x * y, with no difference of large numbers where y is 1
    lambda x, y: np.maximum(x, 0.0) - x * y + np.log1p(np.exp(-np.abs(_floating(x)))),
    lambda g, out, x, y: g * (sigmoid(x) - y),
    lambda g, out, x, y: -g * x,
    name="sigmoid entropy",
    elementwise=True,
    samples=(_REAL, _REAL),
)
_sigmoid_entropy.builtin = True


def binary_cross_entropy_with_logits(logits: Value, targets: Any) -> Value:
    """The mean of softplus(x) - x * y: the cross-entropy of sigmoid(x) with targets y in [0, 1] of the same shape."""
    name = "binary_cross_entropy_with_logits"
    logits, targets = _same_shape(name, "logits", "targets", logits, targets)
    raw = _raw(targets)
    if not _lazy(raw) and np.size(raw) and not (0 <= np.min(raw) and np.max(raw) <= 1):
        raise ValueError(f"{name}: targets must be in [0, 1], got {np.min(raw)} to {np.max(raw)}")
    return np.mean(_sigmoid_entropy(logits, targets))


def hinge_loss(scores: Value, labels: Any) -> Value:
    """The mean of relu(1 - y * s), for labels y of -1 or 1 of the same shape."""
    scores, labels = _same_shape("hinge_loss", "scores", "labels", scores, labels)
    if not _lazy(labels) and not np.all(np.abs(np.asarray(_raw(labels))) == 1):
        raise ValueError("hinge_loss: labels must be -1 or 1")
    return np.mean(relu(1.0 - labels * scores))


# --- optimizers ---


class _Optimizer:
    """What SGD and Adam share: checked options, one state per array, and all scalar parameters stepped as one array."""

    def __init__(self, params: Iterable[Value], **options: Any):
        expected = "a list of Values, such as those of model.parameters()"
        if isinstance(params, Array):
            raise TypeError(f"params must be {expected}, got a single {type(params).__name__}")
        self.params = _understood("params", expected, list, params)
        if not self.params:
            raise TypeError(f"params must be {expected}, got none")
        for p in self.params:
            if not isinstance(p, Value):
                two = f": {_two_copies(type(p))}" if _of_another_copy(type(p)) else ""
                raise TypeError(f"params must be {expected}, got a {type(p).__name__} among them{two}")
        if any(p._prim is not None for p in self.params):
            raise ValueError("params must be leaves; one of them is the result of an operation")
        if any(_lazy(p._data) for p in self.params):
            raise TypeError("params must be held in NumPy: optimizers work in place")
        if len(set(self.params)) < len(self.params):
            raise ValueError("params must name each parameter once")
        for name, given in options.items():
            for x in given if name == "betas" else (given,):
                if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)):
                    raise TypeError(f"{name} must be a number, got {x!r}")
                if not 0 <= x < (1 if name in ("momentum", "betas") else math.inf):
                    bound = "below 1" if 1 <= x < math.inf else "finite and not negative"
                    raise ValueError(f"{name} must be {bound}, got {x}")
        self._places = [(i, p, p.shape) for i, p in enumerate(self.params)]
        self._arrays = [(p, {}, p.dtype == np.float16) for p in self.params if np.ndim(p._data)]
        self._array_places = [place for place in self._places if place[2]]
        self._scalars = [p for p in self.params if not np.ndim(p._data)]
        self._scalar_state = {"steps": np.zeros(len(self._scalars))}  # each has its own count, as it has in an array

    def zero_grad(self) -> None:
        """Resets the gradients of the parameters."""
        for p in self.params:
            p._grad = None

    def step(self) -> None:
        """Changes the parameters by their gradients, in place; one without a gradient yet is left alone.

        ValueError if a parameter or its gradient has another shape than at the beginning, or its array is read-only;
        TypeError if it is of another library now. Then, and if a floating-point fault is an error, nothing is changed.
        """
        for i, p, shape in self._array_places:
            g = p._grad
            if g is not None:
                data = p._data
                if not (
                    type(data) is np.ndarray is type(g) and data.shape == g.shape == shape and data.flags.writeable
                ):
                    self._check(i)
        live = [p for p in self._scalars if p._grad is not None]
        held = [x for p in live for x in (p._data, p._grad)]
        if not _SCALARS.issuperset(map(type, held)):
            for i, _, shape in self._places:
                if not shape:
                    self._check(i)
        numbers = np.array(held, np.float64).reshape(-1, 2).T.copy() if live else (None, None)
        if _QUIET.issuperset(np.geterr().values()):
            self._step(live, *numbers)
            return
        data = [_owned(p._data) for p in self.params]
        states = [state for _, state, _ in self._arrays] + [self._scalar_state]
        kept = [{name: _owned(x) for name, x in state.items()} for state in states]
        try:
            self._step(live, *numbers)
        except BaseException:
            for p, x in zip(self.params, data):
                p._data = KINDS[type(x)].write(p._data, x) if p.ndim else x
            for state, x in zip(states, kept):
                state.clear()
                state.update(x)
            raise

    def _check(self, i: int) -> None:
        """Raises if parameter i cannot be stepped."""
        _, p, shape = self._places[i]
        data, grad = p._data, p._grad
        if grad is None:
            return
        which = f"step: parameter {i} ({p.label!r})" if p.label else f"step: parameter {i}"
        if not p.shape == np.shape(grad) == shape:
            problem = f"was of shape {shape}, and is of shape {p.shape} with a gradient of shape {np.shape(grad)}"
            raise ValueError(f"{which} {problem}: make a new optimizer")
        if _lazy(data):
            library = type(data).__module__.split(".")[0]
            raise TypeError(f"{which} has an array of {library} now: optimizers work in place, in NumPy")
        if type(data) is np.ndarray and not data.flags.writeable:
            raise ValueError(f"{which} has an array that is read-only: assign a copy to its .data")

    def _step(self, live: list[Value], data: Any, grads: Any) -> None:
        """Steps the arrays, and the scalars that have a gradient, whose data and gradients are given as arrays."""
        for p, state, half in self._arrays:
            if p._grad is None:
                continue
            if half:  # which squares of gradients, and what is below them, do not fit
                wide = p._data.astype(np.float32)
                self._update(wide, p._grad.astype(np.float32), state)
                p._data = KINDS[type(p._data)].write(p._data, wide)
            else:
                self._update(p._data, p._grad, state)
        if not live:
            return
        state, all_live = self._scalar_state, len(live) == len(self._scalars)
        places = [] if all_live else [i for i, p in enumerate(self._scalars) if p._grad is not None]
        if not all_live:  # the others, and their state, stay as they are
            for name in self._STATE:
                _state(state, name, np.zeros(len(self._scalars)))
            state = {name: x[places] if isinstance(x, np.ndarray) else x for name, x in state.items()}
        self._update(data, grads, state)
        for name, x in state.items() if not all_live else ():
            if isinstance(x, np.ndarray):
                self._scalar_state[name][places] = x
            else:
                self._scalar_state[name] = x
        for p, x in zip(live, data.tolist()):
            p._data = x if type(p._data) is float else p._data.dtype.type(x)

    def __repr__(self):
        options = ", ".join(f"{name}={x}" for name, x in vars(self).items() if name[0] != "_" and name != "params")
        return f"{type(self).__name__}({options}) of {len(self.params)} parameters"


_SCALARS = frozenset((float, np.float16, np.float32, np.float64, np.longdouble))


def _state(state: dict, name: str, like: np.ndarray) -> np.ndarray:
    """An array of the optimizer's state, zeros at first."""
    if name not in state:
        state[name] = np.zeros_like(like)
    return state[name]


class SGD(_Optimizer):
    """Stochastic gradient descent: with g the gradient plus weight_decay * p, v = momentum * v + g and p -= lr * v."""

    def __init__(self, params: Iterable[Value], lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    _STATE = ("scratch", "velocity")

    def _update(self, data, grad, state):
        scratch = _state(state, "scratch", data)
        if self.weight_decay:
            grad = np.add(grad, np.multiply(data, self.weight_decay, out=scratch), out=scratch)
        if self.momentum:
            velocity = _state(state, "velocity", data)
            velocity *= self.momentum
            velocity += grad
            grad = velocity
        np.multiply(grad, self.lr, scratch)
        data -= scratch


class Adam(_Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1). weight_decay is added to the gradient as weight_decay * p; with
    decoupled=True it is AdamW's (Loshchilov and Hutter 2019): p -= lr * weight_decay * p beside the step."""

    def __init__(
        self,
        params: Iterable[Value],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ):
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        if not isinstance(decoupled, (bool, np.bool_)):
            raise TypeError(f"decoupled must be True or False, got {decoupled!r}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.lr, self.betas, self.eps = lr, tuple(betas), eps
        self.weight_decay, self.decoupled = weight_decay, decoupled

    _STATE = ("mean", "square", "scratch")

    def _update(self, data, grad, state):
        mean, square, scratch = (_state(state, name, data) for name in ("mean", "square", "scratch"))
        steps = state["steps"] = state.get("steps", 0) + 1
        if self.weight_decay and not self.decoupled:
            grad = grad + self.weight_decay * data
        elif self.weight_decay:
            data *= 1.0 - self.lr * self.weight_decay
        beta1, beta2 = self.betas
        mean *= beta1
        mean += np.multiply(grad, 1.0 - beta1, out=scratch)
        square *= beta2
        np.multiply(grad, grad, out=scratch)
        square += np.multiply(scratch, 1.0 - beta2, out=scratch)
        np.sqrt(np.multiply(square, 1.0 / (1.0 - beta2**steps), out=scratch), out=scratch)
        scratch += self.eps
        np.divide(mean, scratch, out=scratch)
        data -= np.multiply(scratch, self.lr / (1.0 - beta1**steps), out=scratch)


# --- the module picograd.nn, out of this same file ---

nn = types.ModuleType(f"{__name__}.nn", "Networks, losses and optimizers of PicoGrad.")
for _public_name in (Value, Tensor, Module, Neuron, Layer, MLP, SGD, Adam, no_grad):
    setattr(nn, _public_name.__name__, _public_name)
for _public_name in (mse_loss, cross_entropy, binary_cross_entropy_with_logits, hinge_loss):
    setattr(nn, _public_name.__name__, _public_name)
sys.modules[nn.__name__] = nn


# ---------------------------------------------------------------------------------------------------------------------
# 7. draw
#
# In: a Value. Out: the picture of the graph it came from, as a `graphviz.Digraph`, and a file if asked for. Boxes are
# Values, Tensors and constants; ellipses are operations. Graphviz (the Python package, and the program `dot` to make
# picture files) is imported and needed only here.
# Invariant: text that others chose (labels, names, parameters) reaches Graphviz through `_text` alone, in HTML-like
# labels, where nothing but our own tags is markup.
# ---------------------------------------------------------------------------------------------------------------------

# Text has a contrast of at least 12:1 on every fill (WCAG 2 asks for 4.5:1), borders at least 5:1 on the white page.
# The kinds differ in shape or line as well, for eyes and printers that do not tell the colours apart.
_INK = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "10", "fontcolor": "#1a1a1a"}
_BOXES = {
    "leaf": {"fillcolor": "#cfe3fa", "color": "#1f5c99"},
    "input": {"fillcolor": "#d3efd0", "color": "#2a6b2f", "style": "filled"},
    "constant": {"fillcolor": "#eeeeee", "color": "#5f5f5f", "style": "filled,dashed"},
    "intermediate": {"fillcolor": "#ffffff", "color": "#5f5f5f"},
    "result": {"fillcolor": "#ffdf94", "color": "#8a5300", "penwidth": "2"},
}
_BOX = {"shape": "box", "style": "filled,rounded", "width": "0", "height": "0", "margin": "0.08,0.05"}
_ELLIPSE = {"shape": "ellipse", "style": "filled", "width": "0.42", "height": "0.36", "margin": "0.02,0.01"}
_ELLIPSE |= {"fillcolor": "#ece3f6", "color": "#6a3fa0", "fontsize": "11"}
# The points of an ellipse where operands enter, so that a - b differs from b - a; more than three are numbered instead.
_ENTRIES = {
    "LR": {1: ["w"], 2: ["nw", "sw"], 3: ["nw", "w", "sw"]},
    "TB": {1: ["n"], 2: ["nw", "ne"], 3: ["nw", "n", "ne"]},
}


def _text(text: Any, limit: int = 80) -> str:
    """Text as HTML-like label text: markup and unprintable characters escaped, line breaks kept, cut at the limit."""
    from html import escape

    text = str(text)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    lines = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.strip().splitlines())
    return "<br/>".join(escape(line).replace("\\", r"\\") for line in lines)  # a single \N would become the node's name


def _summary(raw: Any, grad: Any) -> list[str]:
    """What a box says of raw data and its gradient: up to four numbers themselves, else shape, dtype and a bound."""

    def number(x, digits=3):
        return f"{x:.{digits}g}" if isinstance(x, (float, np.floating)) else str(x)

    def numbers(x):
        if not np.ndim(x):
            return number(x, 4)
        rows = np.array2string(np.asarray(x), separator=", ", formatter={"all": number})
        return " ".join(rows.split())  # in one line: columns of numbers would tear the picture apart

    if _lazy(raw) or _lazy(grad):
        return [f"{np.shape(raw)} {_public(raw).dtype}"]  # numbers would have to be computed
    if 0 < np.size(raw) <= 4:
        return [numbers(raw)] if grad is None else [numbers(raw), f"grad {numbers(grad)}"]
    lines = [f"{np.shape(raw)} {raw.dtype}"]
    if grad is not None:  # the largest absolute value: unlike a norm, it cannot overflow, and it needs no temporary
        lines.append(f"|grad| ≤ {number(np.maximum(np.max(grad, initial=0), abs(np.min(grad, initial=0))), 4)}")
    return lines


def _parameter(name: str, x: Any) -> str:
    """One parameter of an operation, in short; an index as Python writes it."""

    def short(x):
        if isinstance(x, slice):
            ends = ["" if end is None else str(end) for end in (x.start, x.stop, x.step)]
            return ":".join(ends if ends[2] else ends[:2])
        if isinstance(x, np.ndarray):
            return f"array{x.shape}"
        if isinstance(x, (np.generic, np.dtype)):
            return str(x)
        return "..." if x is Ellipsis else getattr(x, "__name__", None) or reprlib.repr(x)

    return f"[{', '.join(map(short, x))}]" if name == "index" and isinstance(x, tuple) else f"{name}={short(x)}"


_DOT_SECONDS = 60.0  # that Graphviz may take, and a second more for each box


def _save_picture(graph: Any, path: Path, seconds: float) -> None:
    """Renders in memory, then puts the complete file in its place."""
    import subprocess

    picture = graph.copy()
    if path.suffix.lower() == ".png":
        picture.graph_attr["dpi"] = "120"  # text comes out as large as that of the page around it
    command = ["dot", f"-T{path.suffix[1:].lower()}"]
    try:
        done = subprocess.run(command, input=picture.source.encode(), capture_output=True, timeout=seconds)
    except OSError as error:
        why = "was not found on PATH" if isinstance(error, FileNotFoundError) else f"cannot be run ({error})"
        source = _save_source(graph.source.encode(), path)
        raise RuntimeError(
            f"draw: Graphviz's program `dot`, which makes the picture, {why}. To install it:\n"
            "  Debian, Ubuntu   sudo apt install graphviz\n"
            "  macOS            brew install graphviz\n"
            "  Windows          winget install Graphviz.Graphviz, then add its bin folder to PATH\n"
            "  conda            conda install -c conda-forge graphviz\n"
            f"The picture's source was saved as {source}; `dot` turns that into a picture, too."
        ) from error
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"draw: Graphviz's program `dot` did not finish within {seconds:g} s") from None
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip() or "no message"
        raise RuntimeError(f"draw: Graphviz's program `dot` made no picture (exit code {done.returncode}): {said}")
    _write_whole(path, lambda file: file.write(done.stdout))


def _save_source(content: bytes, path: Path) -> Path:
    """Writes beside path, ending in .gv, under a name that no other file has."""
    for i in itertools.count():
        source = path.with_suffix(f".{i}.gv" if i else ".gv")
        if not os.path.lexists(source) or (source.is_file() and source.read_bytes() == content):
            _write_whole(source, lambda file: file.write(content))
            return source


def draw(
    root: Value, filename: str | os.PathLike | None = None, *, max_nodes: int = 300, rankdir: str | None = None
) -> Any:
    """The graph that a Value was computed by, as a `graphviz.Digraph`, which shows itself in a notebook.

    A box shows a label, the numbers (up to four, else shape and dtype) and, after backward, their gradient (or the
    largest absolute value in it). Blue boxes are leaves, such as parameters; green ones Tensors, inputs without
    gradient; grey, dashed ones constants; white ones results in between; the yellow one is the root. An ellipse is an
    operation with its parameters; unless it is + or *, its operands enter in their order from the top or left.

    filename: where to save a picture, ending in .png (120 dots per inch), .svg or .pdf. An existing file is replaced,
        once the new one is complete.
    max_nodes: the most boxes to draw; above that, ValueError says how many there are.
    rankdir: "LR" (left to right) or "TB" (top to bottom); None takes what keeps a page-wide picture legible.

    ImportError without the package graphviz. RuntimeError if a picture file needs Graphviz's program `dot` and this
    fails, takes minutes, or is not installed: then the picture's source is saved instead, in a new file ending in .gv.
    """
    if _of_another_copy(type(root)):
        raise TypeError(f"draw: root must be a Value: {_two_copies(type(root))}")
    if not isinstance(root, Value):
        raise TypeError(f"draw: root must be a Value, got {type(root).__name__}")
    if isinstance(max_nodes, bool) or not isinstance(max_nodes, (int, np.integer)) or max_nodes < 1:
        raise ValueError(f"draw: max_nodes must be a positive integer, got {max_nodes!r}")
    if rankdir not in (None, *_ENTRIES):
        raise ValueError(f"draw: rankdir must be 'LR', 'TB' or None, got {rankdir!r}")
    if filename is not None:
        filename = _path(filename, "draw: filename")
        if filename.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"draw: filename must end in .png, .svg or .pdf, got {str(filename)!r}")
        if not filename.parent.is_dir():
            raise FileNotFoundError(f"draw: filename must be in an existing folder, got {str(filename)!r}")
    try:
        import graphviz
    except ImportError as error:
        raise ImportError(
            "draw needs the Python package graphviz: pip install graphviz, or conda install -c conda-forge "
            "python-graphviz (the rest of picograd does not need it)"
        ) from error

    root = root._picture()
    values = _newest_first(root)[::-1]
    # An object is one box however often it is used; a number is a box at each use, as equal numbers are not related.
    others = [x for v in values for x in v._args if not isinstance(x, Value)]
    numbers = sum(type(x) in _WEAK_TYPES for x in others)
    count = len(values) + numbers + len({id(x) for x in others if type(x) not in _WEAK_TYPES})
    if count > max_nodes:
        raise ValueError(
            f"draw: the graph has {count} nodes ({len(values)} Values, {count - len(values)} Tensors and constants), "
            f"and max_nodes is {max_nodes}. Draw a part of it (an inner Value, fewer samples or layers), compute "
            "with arrays in place of numbers, or pass a larger max_nodes: above a thousand, Graphviz may take minutes."
        )
    if rankdir is None:  # long and thin graphs go downwards: fitted to a page's width, their text would be too small
        depth: dict[Value, int] = {}
        for v in values:
            depth[v] = 1 + max((depth[x] for x in v._args if isinstance(x, Value)), default=-1)
        rankdir = "TB" if depth[root] > 4 and count < 3 * depth[root] else "LR"

    graph = graphviz.Digraph(
        graph_attr=_INK | {"rankdir": rankdir, "bgcolor": "white", "nodesep": "0.15", "ranksep": "0.25"},
        node_attr=_INK | _BOX,
        edge_attr=_INK | {"color": "#5f5f5f", "arrowsize": "0.6", "fontsize": "8", "labeldistance": "1.5"},
    )
    names: dict[int, str] = {}
    fresh = map("v{}".format, itertools.count())
    kinds = set()

    def box(x, kind, label=""):
        name = names[id(x)] = next(fresh)
        kinds.add(kind)
        lines = [_text(line) for line in _summary(_raw(x), getattr(x, "_grad", None))]
        if label := _text("" if label is None else label):
            lines.insert(0, f'<font point-size="11"><b>{label}</b></font>')
        graph.node(name, f"<{'<br/>'.join(lines)}>", **_BOXES[kind])
        return name

    for v in values:
        leaf = v._prim is None
        name = box(v, "leaf" if leaf else "result" if v is root else "intermediate", v.label)
        if leaf:
            continue
        op = f"op_{name}"
        lines = [v._prim.symbol] + [_parameter(k, x) for k, x in v._params.items() if x is not None]
        graph.node(op, f"<{'<br/>'.join(filter(None, map(_text, lines))) or '&#160;'}>", **_ELLIPSE)
        graph.edge(op, name, weight="2")
        entries = _ENTRIES[rankdir].get(len(v._args))
        free = v._prim.name in ("add", "multiply")  # the same in either order: enter where lines cross least
        for i, x in enumerate(v._args):
            if type(x) in _WEAK_TYPES or id(x) not in names:
                box(x, "input" if isinstance(x, Tensor) else "constant")
            place = {} if free else {"headport": entries[i]} if entries else {"headlabel": str(i)}
            # dot draws heavy edges straight: those of the main line, from one result to the next.
            graph.edge(names[id(x)], op, weight="2" if isinstance(x, Value) and x._prim else "1", **place)
    cell = '<td bgcolor="{fillcolor}" color="{color}">{kind}</td>'.format
    cells = "".join(cell(kind=kind, **look) for kind, look in _BOXES.items() if kind in kinds)
    graph.attr(label=f'<<table border="0" cellborder="1" cellspacing="4" cellpadding="3"><tr>{cells}</tr></table>>')
    if filename is not None:
        _save_picture(graph, filename, _DOT_SECONDS + count)
    return graph


# ---------------------------------------------------------------------------------------------------------------------
# 8. Blocks
#
# Large tensors compute in blocks, on all cores. In: a block program, which is a tuple of steps (primitive, places of
# its operands, dtype) on slots, the inputs first and then the result of each step; and the inputs. Out: arrays.
# `run_blocks` cuts the work into blocks that fit in the cache, and does all steps on one block before the next, so
# that a chain of operations goes through memory once. Reductions combine the blocks' results in a fixed order.
# `Chunked` is the raw value that makes such programs: element-wise operations on it wait until somebody looks.
#
#     >>> set_distributed_config(enabled=True)
#     >>> x = Tensor(np.ones((4000, 1000)))
#     >>> y = x * 2 + 1  # waits: y is a step that reads a step that reads the data of x
#     >>> y.sum().item()  # one pass: no block of y is ever written to memory
#     12000000.0
#     >>> x.data[0] = 5.0  # x is handed out: first y is computed, and from now on nothing waits to read x
#     >>> y.sum().item(), (x * 2 + 1).sum().item()
#     (12000000.0, 12008000.0)
#
# What a `Chunked` holds is a buffer. A buffer that nobody was handed does not change: in place, the array gets another.
# One that was handed out stays where it is, whoever may write to it. So there is no order of statements that matters.
# Invariants: the cut depends on shape and dtype only, so results do not depend on the workers; what is seen of an array
# is what NumPy would have given at once.
# ---------------------------------------------------------------------------------------------------------------------

__all__ += ["DistributedConfig", "distributed_config", "get_distributed_config", "set_distributed_config"]


@dataclass(frozen=True)
class DistributedConfig:
    """enabled: whether large tensors are distributed unless told otherwise; num_workers: None for all usable cores;
    min_elements_for_parallel: a size from which two cores gain something; use_processes: or threads."""

    enabled: bool = False
    num_workers: int | None = None
    min_elements_for_parallel: int = 1_000_000
    use_processes: bool = False


_config = DistributedConfig()


def get_distributed_config() -> DistributedConfig:
    """The configuration in force."""
    return _config


def set_distributed_config(**changes: Any) -> DistributedConfig:
    """Changes the arguments given (enabled, num_workers, min_elements_for_parallel, use_processes); the others stay.

    Returns the new configuration. TypeError or ValueError names a wrong argument, and nothing is changed.
    """
    global _config
    for name, value in changes.items():
        if name not in vars(_config):
            raise TypeError(f"set_distributed_config: expected {', '.join(vars(_config))}; got {name!r}")
        changes[name] = value = _python_numbers(value)
        truth = name in ("enabled", "use_processes")
        if type(value) is not (bool if truth else int) and (name, value) != ("num_workers", None):
            what = "True or False" if truth else "an integer"
            raise TypeError(f"set_distributed_config: {name} must be {what}, got {value!r}")
        if type(value) is int and value < 1:
            raise ValueError(f"set_distributed_config: {name} must be at least 1, got {value}")
    _config = replace(_config, **changes)
    HOOK.limit = _config.min_elements_for_parallel if _config.enabled else math.inf
    if not _config.enabled:
        _memory.bound = 0
        _memory.clear()
    return _config


@contextlib.contextmanager
def distributed_config(**changes: Any) -> Iterator[DistributedConfig]:
    """Sets the configuration for a block of code, and restores it afterwards."""
    before = _config
    try:
        yield set_distributed_config(**changes)
    finally:
        set_distributed_config(**vars(before))


def _granted(per: int, *paths: str) -> float:
    """What the control group of this process grants it, by the first of these files that sets a limit: a number, which
    counts per another number if that follows, else per what is given."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit, period = [*Path("/sys/fs/cgroup", path).read_text().split(), per][:2]
            if int(limit) > 0:
                return int(limit) / int(period)
    return math.inf


@functools.cache
def _usable_cores() -> int:
    """The cores that this process may use: by its affinity, and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, round(min(cores, _granted(100_000, "cpu.max", "cpu/cpu.cfs_quota_us"))))


# --- memory: buffers that are used again, since fresh pages cost more than the arithmetic on them ---

_SMALL_BYTES = 1 << 20  # below, malloc does as well
_MAX_SEGMENTS = 64  # that are shared at a time: each takes two descriptors


def _physical_bytes() -> int:
    """The memory that this process may use: of the machine, or of its control group."""
    machine = 1 << 32
    with contextlib.suppress(AttributeError, OSError, ValueError):
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(machine, _granted(1, "memory.max", "memory/memory.limit_in_bytes")))


class _Private:
    """Memory of this process alone. Every segment has a size and an address; one that workers find has a name, too: its
    number, and what maps it when it is called with what."""

    name = None

    def __init__(self, size: int):
        self.size, self.memory = size, self.get(size)
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data

    def get(self, size: int):
        return np.empty(size, np.uint8)


class _Memfd(_Private):
    """Anonymous shared memory of Linux, which ends with the last process that has it, also after a crash."""

    def get(self, size):
        import mmap

        self.fd = os.memfd_create("picograd")
        try:
            os.ftruncate(self.fd, size)
            memory = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.name = next(_serial), np.memmap, (f"/proc/{os.getpid()}/fd/{self.fd}", np.uint8, "r+")
        return memory

    def close(self) -> None:
        """Gives the memory back to the system, though workers may still have it mapped."""
        os.ftruncate(self.fd, 0)
        self.leave()

    def leave(self) -> None:
        """From now on it is as private: no worker finds it."""
        os.close(self.fd)
        self.name = None


class _Named(_Private):
    """Shared memory with a name in the system, `multiprocessing.shared_memory`."""

    def get(self, size):
        from multiprocessing import shared_memory

        self.owner = shared_memory.SharedMemory(create=True, size=size)
        self.fd = getattr(self.owner, "_fd", -1)
        self.name = next(_serial), shared_memory.SharedMemory, (self.owner.name,)
        return self.owner.buf

    def leave(self) -> None:
        self.owner.unlink()
        self.name = None

    close = leave


_serial = itertools.count()
_Shared = _Memfd if hasattr(os, "memfd_create") else _Named


class _Lease:
    """What an array on a segment has as its base: while that array, a view of it or a window on it is there, so is
    this; then the segment is free again."""

    def __init__(self, segment, shape: tuple, dtype: np.dtype):
        place = segment.address, False
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": place}
        self.segment = segment

    def __del__(self):
        if _memory is not None and hasattr(self, "segment"):  # else Python ends, or this was interrupted
            _memory.take_back(self.segment)


class _Memory:
    """The segments: `free` ones, the last freed at the end, and those that are `shared`, free or not."""

    def __init__(self):
        self.free, self.shared = [], {}  # by name
        self.bound = 0  # bytes of freed segments that are kept for the next results: none when nothing is distributed
        self.lock = threading.RLock()  # reentrant: an array may die, and come here, at any allocation

    def empty(self, shape: tuple, dtype: np.dtype, shared: bool = False, most: int = _MAX_SEGMENTS) -> np.ndarray:
        """A new array, where worker processes find it if they are to share it and it can be had; most: segments that
        may be shared then, more for what lasts as long as a job."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _SMALL_BYTES and not shared:
            return np.empty(shape, dtype)
        size = -(-max(nbytes, 1) >> 20) << 20
        self.bound = self.bound or _physical_bytes() // 16
        segment = self.take(size, shared) or (shared and self.share(size, most)) or self.take(size, False)
        return np.asarray(_Lease(segment or self.spend(_Private, size), shape, dtype))

    def take(self, size: int, shared: bool):
        """The segment of that size that was freed last, if there is one."""
        with self.lock:
            for segment in reversed(self.free):
                if segment.size == size and bool(segment.name) == shared:
                    self.free.remove(segment)
                    return segment
        return None

    def share(self, size: int, most: int):
        """A new segment that workers find; None if there are too many, or none can be had."""
        if len(self.shared) >= most and not self.clear(shared=True):
            return None
        try:
            with self.lock:  # not in the middle of a fork
                segment = self.spend(_Shared, size)
                self.shared[segment.name] = segment
        except (OSError, ImportError) as error:
            _warn_once(f"shared memory cannot be had here ({error}); computing in threads")
            return None
        return segment

    def spend(self, function: Callable, *args):
        """Calls a function that takes memory; if there is none left, again without what is kept."""
        try:
            return function(*args)
        except (MemoryError, OSError):
            if not self.clear():
                raise
        return function(*args)

    def take_back(self, segment) -> None:
        """The array on a segment, and all views of it, are gone."""
        with self.lock:
            if segment.name or type(segment) is _Private:  # a parted one still has a descriptor
                self.free.append(segment)
            self.clear(bound=self.bound)

    def clear(self, shared: bool = False, bound: int = 0) -> int:
        """Gives freed segments, or the shared ones only, back to the system, those that were freed first, until no
        more than so many bytes are left; how many there were."""
        with self.lock:
            segments = [segment for segment in self.free if segment.name or not shared]
            for segment in segments:
                if sum([x.size for x in self.free]) <= bound:
                    break
                self.free.remove(segment)
                if self.shared.pop(segment.name, None):
                    segment.close()
        return len(segments)

    def part(self) -> None:
        """Before a fork: what is shared becomes private, at the same addresses, so that neither process sees what the
        other writes. The file stays as it is from now on, so that a private mapping of it is a copy on write."""
        import ctypes
        import mmap

        self.clear(shared=True)
        if not self.shared:
            return
        system = ctypes.CDLL(None).mmap
        system.restype = ctypes.c_void_p
        system.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for name, segment in list(self.shared.items()):
            flags = mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
            found = system(segment.address, segment.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, segment.fd, 0)
            if found != segment.address:
                raise OSError("picograd: shared memory cannot be parted before a fork")
            self.shared.pop(name).leave()


_memory = _Memory()


def _describe(x: np.ndarray):
    """How another process finds an array: in which segment, and where there; None if it is in private memory."""
    for name, segment in list(_memory.shared.items()):
        offset = x.ctypes.data - segment.address
        if 0 <= offset < segment.size:
            return name, offset, x.shape, x.strides, x.dtype
    return None


# --- block programs ---

_BLOCK_BYTES = 1 << 21  # of an array in a block: 512k float32. Smaller ones pass the interpreter's lock on too often
_FEW_BLOCKS = 8  # of one operation: NumPy does them as fast in one go; twice as many, counted for each step, are worth
# other threads, and four times as many other processes
_REDUCERS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum, "any": np.logical_or}
_REDUCERS |= {"all": np.logical_and}


def _block_shape(shape: tuple, itemsize: int, reduced: tuple = ()) -> tuple:
    """The shape of a block: the first axes are cut first, so that its memory is in one piece. That would leave many
    partial results of a reduction over few rows: then the axes that stay are cut."""
    limit, axes = max(1, _BLOCK_BYTES // itemsize), range(len(shape))
    for order in axes, sorted(axes, key=lambda axis: axis in reduced):
        block = list(shape)
        for axis in order:
            block[axis] = max(1, min(shape[axis], limit * block[axis] // max(1, math.prod(block))))
        parts = math.prod(-(-shape[i] // block[i]) for i in reduced)
        if parts * 16 <= math.prod(shape[i] for i in reduced):
            break
    return tuple(block)


@dataclass
class _Job:
    """A block program on its arrays.

    steps: (primitive, places of its operands, dtype of its result), ...; places count the inputs first, then the steps.
    inputs: arrays, and numbers, that broadcast to `shape`, which is the shape of every step.
    outputs: places whose results are written to targets. reduction: (name in _REDUCERS, axes, dtype) of the last place,
        or None; a block's part of it is written to one more target.
    extents: the shape of a block. state: of the caller's np.errstate.
    """

    steps: tuple
    inputs: Sequence
    shape: tuple[int, ...]
    outputs: Sequence[int]
    targets: list
    reduction: tuple | None
    extents: tuple[int, ...]
    state: dict

    def tasks(self) -> list[tuple]:
        """The blocks, which can be done at once, in any order."""
        cuts = zip(self.shape, self.extents)
        return list(itertools.product(*[[slice(i, min(i + n, end)) for i in range(0, end, n)] for end, n in cuts]))

    def run(self, tasks: Iterable[tuple]) -> list[tuple[str, str]]:
        """Does blocks in this thread; the floating-point faults met, by kind and operation, to be warned of once.

        A step writes to scratch memory that no later step reads, so that little of it goes through the cache.
        """
        faults, spare, size = {}, collections.defaultdict(list), math.prod(self.extents)  # scratch memory by dtype
        last = {i: step for step, (_, operands, _) in enumerate(self.steps) for i in operands}
        inputs = [np.broadcast_to(x, self.shape) if np.ndim(x) else x for x in self.inputs]
        state = {kind: "call" if how == "warn" else how for kind, how in self.state.items()}

        def met(kind, flag):
            faults[kind, name] = None

        with np.errstate(**state, call=met):
            for block in tasks:
                values, scratch = [x[block] if np.ndim(x) else x for x in inputs], {}
                shape = [s.stop - s.start for s in block]
                for step, (prim, operands, dtype) in enumerate(self.steps):
                    place, args = len(values), [values[i] for i in operands]
                    for i in [i for i in scratch if last.get(i) == step]:
                        spare[scratch[i].dtype].append(scratch.pop(i))
                    target = into = self.targets[self.outputs.index(place)][block] if place in self.outputs else None
                    if into is None or not into.flags.c_contiguous:  # NumPy 2.4 writes wrong truths to what is not
                        scratch[place] = spare[dtype].pop() if spare[dtype] else _memory.empty((size,), dtype)
                        target = scratch[place][: math.prod(shape)].reshape(shape)
                    values.append(target)
                    name = "cast" if prim is _as_dtype else prim.name
                    if prim.ufunc:
                        prim.forward(*args, out=target)
                    else:
                        np.copyto(target, args[0] if prim is _as_dtype else prim.forward(*args), "unsafe")
                    if into is not None and into is not target:
                        np.copyto(into, target)
                if self.reduction:
                    name, (reducer, axes, wide), parts = "reduce", self.reduction, self.targets[-1]
                    places = [slice(s.start // n, s.start // n + 1) for s, n in zip(block, self.extents)]
                    part = parts[tuple([places[i] if i in axes else s for i, s in enumerate(block)])]
                    _REDUCERS[reducer].reduce(values[-1], axes, wide, part, True)
                for array in scratch.values():
                    spare[array.dtype].append(array)
        return list(faults)


class _Local(threading.local):
    depth = 0  # how many jobs this thread is at


_local = _Local()


# --- the executor ---


class _Workers:
    """The `concurrent.futures` pool of processes, made at first use, as large as was asked for yet."""

    def __init__(self):
        self.lock = threading.RLock()  # held by the one job that has the processes
        self.pool, self.size = None, 0
        self.works = None  # whether processes do, once that is known

    def run(self, n: int, describe: Callable) -> list | None:
        """What n processes give for the calls that are described once nobody forks any more; None if they are not for
        processes. One job at a time; another one does not wait: a finalizer, say, may compute in a thread that the
        first job waits for. If a job fails, waits until nobody works on it, and forgets the pool: the next one gets a
        fresh one."""
        import concurrent.futures
        import multiprocessing
        from multiprocessing import resource_tracker

        if self.works is False or not self.lock.acquire(blocking=False):
            return None
        try:
            calls = describe()
            if not calls:
                return None
            if self.size < n:
                if self.pool is not None:
                    self.pool.shutdown(wait=False)
                if _Shared is _Named and os.name == "posix":
                    resource_tracker.ensure_running()  # one for all: a worker's own would remove the memory at its end
                self.pool = concurrent.futures.ProcessPoolExecutor(n, multiprocessing.get_context(), _start_worker)
                self.size = n
            with _without_main():
                futures = [self.pool.submit(*call) for call in calls]
            results = [future.result() for future in futures]
            self.works = True
            return results
        except BaseException:
            pool, self.pool, self.size = self.pool, None, 0
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            self.lock.release()


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _start_worker() -> None:
    """In a new worker process: an interrupt is for the parent, which waits for the blocks that are under way; and
    when the parent is gone, also by kill -9, so is the worker."""
    import multiprocessing.connection
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends, started_by = [multiprocessing.parent_process().sentinel], os.getppid()

    def watch():  # the sentinel may be held open by the parent's other children
        while not multiprocessing.connection.wait(ends, 0.5) and os.getppid() == started_by:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_workers = _Workers()


@atexit.register
def _at_exit() -> None:
    """Forgets the pool, while what its end needs is still there; and shared memory with a name loses it."""
    _workers.pool, _workers.size = None, 0
    for name in list(_memory.shared):
        _memory.shared.pop(name).leave()


def _before_fork() -> None:
    _workers.lock.acquire()  # no job of another thread has the workers
    _memory.lock.acquire()
    if not _local.depth:  # else it is a worker that starts
        _memory.part()


def _after_fork() -> None:
    _memory.lock.release()
    _workers.lock.release()


def _in_child() -> None:
    """Neither pools nor segments are the child's to use, and a lock may be held by a thread that the child has not."""
    globals().update(_workers=_Workers(), _memory=_Memory(), _chunk_lock=threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hides the user's script from worker processes that start: they need nothing of it, and would run it again."""
    main = vars(sys.modules["__main__"])
    kept = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    try:
        main["__spec__"] = None
        yield
    finally:
        main.update(kept)


_attached = {}  # in a worker: the segments that it has mapped


def _find(x):
    """In a worker: the array that `_describe` described; anything else as it is."""
    if type(x) is not tuple:
        return x
    name, offset, shape, strides, dtype = x
    if name not in _attached:
        _attached[name] = name[1](*name[2])
    memory = _attached[name]
    return np.ndarray(shape, dtype, getattr(memory, "buf", memory), offset, strides)


def _remote(job: _Job, live: set, start: int, stop: int) -> list:
    """In a worker process: finds the arrays, and runs the tasks from start to stop."""
    for name in _attached.keys() - live:
        del _attached[name]
    job.inputs, job.targets = [*map(_find, job.inputs)], [*map(_find, job.targets)]
    return job.run(job.tasks()[start:stop])


_TRAVELS_BYTES = 1 << 16  # arrays below travel with the instructions


def _apart(function: Callable, n: int = 1, meanwhile: Callable | None = None) -> list:
    """Calls a function in n threads of its own and returns what it gave once all have ended; or calls another one here
    meanwhile, after which nobody need begin any more.

    No handler of a signal comes to those threads: an interrupt between two lines of `threading` or `queue` would leave
    a lock of a pool behind. An error or an interrupt is raised at the end; `meanwhile` may be called again.
    """
    outcomes, failures, started, begun, ended = [], [], 0, itertools.count(1), _thread.allocate_lock()
    ended.acquire()

    def run():
        if next(begun) > n:  # too late, or an interrupt had one started twice
            return
        _local.depth += 1
        try:
            outcomes.append(function())
        except BaseException as error:
            failures.append(error)
            outcomes.append(None)
        _local.depth -= 1
        with contextlib.suppress(RuntimeError):  # another one has ended, and that is not noticed yet
            ended.release()

    while len(outcomes) < n:
        try:
            while started < n:
                try:
                    _thread.start_new_thread(run, ())
                except RuntimeError:  # no thread can be had, as when Python ends
                    run()
                started += 1
            if meanwhile:
                meanwhile()
                outcomes.extend(itertools.takewhile(n.__ge__, begun))  # who has not begun is not waited for
            if len(outcomes) < n:
                ended.acquire()
        except BaseException as error:
            failures.append(error)
    try:
        if failures:
            raise failures[-1]
        return outcomes
    finally:
        failures.clear()  # their tracebacks hold this frame, and so the pool


def _in_processes(job: _Job, count: int, n: int) -> list | None:
    """Has n worker processes do a job of so many tasks; the faults that were met, or None if they could not do it."""
    from concurrent.futures import BrokenExecutor

    def describe():
        inputs = [x if not np.ndim(x) or x.nbytes <= _TRAVELS_BYTES else _describe(x) for x in job.inputs]
        travelling = replace(job, inputs=inputs, targets=[_describe(x) for x in job.targets])
        if any(x is None for x in inputs + travelling.targets):
            return None  # an array is where workers do not see it; to copy it there would cost more than to compute
        ends, live = [count * i // n for i in range(n + 1)], set(_memory.shared)
        return [(_remote, travelling, live, *cut) for cut in zip(ends, ends[1:])]

    try:
        found = _apart(lambda: _workers.run(n, describe))[0]
        return found and [fault for faults in found for fault in faults]
    except (BrokenExecutor, OSError) as error:
        _workers.works = _workers.works or False  # none that never worked is tried again
        _warn_once(f"a worker process died, or none can be had ({error}); computing in threads")
    except RuntimeError as error:
        if "shutdown" not in str(error):  # as when Python ends
            raise
    return None


def _in_threads(job: _Job, n: int) -> list:
    """Does a job's tasks in n threads, of which this is one, each taking the next; the faults that were met."""
    faults, tasks = [], job.tasks()
    following = iter(tasks)

    def work():
        try:
            faults.extend(job.run(following))
        except BaseException:
            tasks.clear()  # the others stop at the next block
            raise

    if n > 1:
        _apart(work, n - 1, work)
    else:
        work()
    return faults


def _in_worker() -> bool:
    """Whether this is a worker process of some pool, or in the middle of a job, as in the handler of a signal, or
    Python ends: then it must not start workers, nor wait for those at work."""
    module = sys.modules.get("multiprocessing.process")
    return _local.depth > 0 or sys.is_finalizing() or (module is not None and module.parent_process() is not None)


def run_blocks(
    steps: tuple,
    inputs: Sequence,
    shape: tuple[int, ...],
    outputs: Sequence[int] = (),
    reduction: tuple | None = None,
    into: Sequence[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], Any]:
    """Runs a block program on all cores.

    steps: (primitive, places of its operands, dtype of its result) of element-wise primitives, whose results have this
        shape. Places count the inputs first, then the steps.
    inputs: arrays, and numbers, that broadcast to shape.
    outputs: the places whose results are wanted as whole arrays.
    reduction: (name in _REDUCERS, axes as non-negative numbers, dtype) of the last result.
    into: arrays for the outputs, in place of new ones.

    Returns the arrays, and the reduction's result with its axes kept as length 1. Floating-point faults are warned of
    as the caller's `np.errstate` says, once for each primitive.
    """
    shared, work, first = _shares(), len(steps) + bool(reduction), len(inputs)
    itemsizes = [dtype.itemsize for *_, dtype in steps] + [x.dtype.itemsize for x in inputs if np.ndim(x)]
    name, axes, dtype = reduction or (None, (), None)
    extents = _block_shape(shape, max(itemsizes), axes)
    count = math.prod([-(-n // extent) for n, extent in zip(shape, extents)])
    n = 1 if _in_worker() or count * work <= 2 * _FEW_BLOCKS else min(_config.num_workers or _usable_cores(), count)
    processes = shared and n > 1 and count * work > 4 * _FEW_BLOCKS
    targets = [_memory.empty(shape, steps[i - first][2], shared) for i in outputs] if into is None else list(into)
    if reduction:
        kept = [-(-n // extents[i]) if i in axes else n for i, n in enumerate(shape)]
        targets.append(_memory.empty(tuple(kept), dtype, processes, 2 * _MAX_SEGMENTS))
    job = _Job(steps, inputs, shape, outputs, targets, reduction, extents, np.geterr())
    faults = None
    _local.depth += 1  # from here on a signal's handler finds a job under way
    try:
        if processes:
            faults = _in_processes(job, count, n)
        if faults is None:
            faults = _in_threads(job, n)
    finally:
        _local.depth -= 1
    for kind, where in dict.fromkeys(faults):
        warnings.warn(f"{kind} encountered in {where}", RuntimeWarning, stacklevel=2)
    if not reduction:
        return targets, None
    total = targets.pop()
    if any([total.shape[i] > 1 for i in axes]):
        wide = np.promote_types(dtype, np.float64) if name == "sum" and dtype.kind == "f" else dtype
        total = _REDUCERS[name].reduce(total, axes, wide, None, True)  # no error is added to that within the blocks
    return targets, total.astype(dtype, copy=False)


def _shares() -> bool:
    """Whether arrays are to be where worker processes find them."""
    return _config.use_processes and not _in_worker()


def _without_repeats(x: np.ndarray) -> np.ndarray:
    """What a view repeats is there once."""
    if 0 not in x.strides:
        return x
    return x[tuple([slice(0, 1) if step == 0 else slice(None) for step in x.strides])]


# --- arrays that wait ---

_MAX_PENDING = 32  # steps that wait for each other; then they are computed
_chunk_lock = threading.RLock()  # held while a few attributes change, and never while anything is computed


class _Buffer:
    """What an array holds: its data, or the step (prim, args, state of np.errstate) that computes them when somebody
    needs them, and which waits. Data change only once they were handed out, and then nothing waits to read them.

    given: whether it was handed out. readers: what was to read it. holder: gives the array that holds it, if that is
    there still. runs: how often it was computed without being kept.

    A finalizer, a signal's handler or another thread may come at any moment, and hand out or compute what is here.
    So a step is read once, registered with what it reads before it is asked whether that was handed out, and counts
    as computed only if nobody else did it meanwhile: then its operands may have changed under it.
    """

    __slots__ = ("shape", "dtype", "array", "given", "step", "holder", "runs", "readers", "__weakref__")

    def __init__(self, shape: tuple, dtype: np.dtype, step: tuple | None = None, array=None, given: bool = False):
        self.shape, self.dtype, self.step, self.array, self.given, self.runs = shape, dtype, step, array, given, 0
        self.readers, self.holder = weakref.WeakValueDictionary(), lambda: None  # by id

    def pending(self, found: dict) -> dict[_Buffer, tuple]:
        """All that has to be computed for this beside what was found, operands first, with the steps."""
        step = self.step
        if step is not None and self not in found:
            for x in step[1]:
                if type(x) is _Buffer:
                    x.pending(found)
            found[self] = step
        return found

    def compute(self, reduction: tuple | None = None):
        """Computes what waits for this in one pass, and the reduction of it. What was computed before without being
        kept, and some array still holds, is kept now: that is not computed a third time. A small operation alone is
        done by NumPy in one go."""
        while True:
            waiting = self.pending({})
            if not waiting and not reduction:
                return None  # somebody else was first
            kept = [x for x in waiting if (x is self and not reduction) or (x.runs and x.holder() is not None)]
            operands = [x for _, args, _ in waiting.values() for x in args] or [self]
            inputs = list({id(x): x for x in operands if type(x) is not _Buffer or x not in waiting}.values())
            raw = [x.array if type(x) is _Buffer else x for x in inputs]
            places = {id(x): i for i, x in enumerate([*inputs, *waiting])}
            steps = [(prim, [places[id(y)] for y in args], x.dtype) for x, (prim, args, _) in waiting.items()]
            few = math.prod(self.shape) * self.dtype.itemsize <= _FEW_BLOCKS * _BLOCK_BYTES
            with np.errstate(**(waiting[self][2] if waiting else {})):
                if few and not reduction and len(waiting) == 1 and waiting[self][0].ufunc:
                    (prim, args, dtype), total = steps[0], None
                    arrays = [_memory.empty(self.shape, dtype, _shares())]
                    prim.forward(*[raw[i] for i in args], out=arrays[0])
                else:
                    outputs = [places[id(x)] for x in kept]
                    arrays, total = run_blocks(tuple(steps), raw, self.shape, outputs, reduction)
            if all([node.step is step for node, step in waiting.items()]):
                break
        for node, array in zip(kept, arrays):
            with _chunk_lock:
                if node.step is waiting[node]:
                    node.array, node.step = array, None
        for node in waiting:
            node.runs += 1
        return total

    def force(self) -> np.ndarray:
        """The data, for reading at once."""
        while self.step is not None:
            self.compute()
        return self.array

    def hand_out(self) -> np.ndarray:
        """The data, for somebody who may keep them and write to them."""
        self.force()
        with _chunk_lock:
            self.given = True  # from now on it stays where it is
            array = self.array
        for reader in filter(None, [ref() for ref in self.readers.valuerefs()]):
            reader.force()  # if that fails, nobody gets the data, and all is as it was
        return array


class Chunked(np.lib.mixins.NDArrayOperatorsMixin):
    """A large array that computes in blocks; element-wise operations on it wait until somebody needs the result.

    Raw values of distributed Tensors and Values are of this kind. It is what is written to, in place: it holds a
    buffer, and in place another one, unless the one it has was handed out. It speaks NumPy's protocols, so that the
    primitives' rules run on it; what else is asked of it, the array answers, handed out.

    forced: whether it is distributed whatever the configuration.
    """

    __slots__ = ("shape", "dtype", "buffer", "forced", "__weakref__")
    __hash__ = object.__hash__

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))

    def __init__(self, buffer: _Buffer, forced: bool = False):
        self.buffer, self.shape, self.dtype, self.forced = buffer, buffer.shape, buffer.dtype, forced
        buffer.holder = weakref.ref(self)

    def force(self) -> np.ndarray:
        """The array, for reading at once."""
        return self.buffer.force()

    def expose(self) -> np.ndarray:
        """The array, handed out."""
        while True:
            buffer = self.buffer
            array = buffer.hand_out()
            if buffer is self.buffer:
                return array

    def cast(self, dtype: np.dtype) -> _Buffer:
        """A copy of a dtype, which waits."""
        return _step(_as_dtype, (self,), dtype, np.geterr())

    def assign(self, new) -> None:
        """In place: the data of `new`, of this shape. TypeError if its dtype does not cast to this one's kind."""
        if not np.can_cast(new.dtype, self.dtype, "same_kind"):
            raise TypeError(f"in place: cannot cast {new.dtype} to {self.dtype}")
        if not self.buffer.given:
            if type(new) is not Chunked:
                new = Chunked(_Buffer(self.shape, self.dtype, array=np.array(new, self.dtype, order="C")))
            buffer = new.buffer
            if buffer is self.buffer:
                return
            copy = new.cast(self.dtype)
            with _chunk_lock:
                if not self.buffer.given and new.buffer is buffer:
                    if not buffer.given and buffer.dtype == self.dtype:
                        # `new` becomes the copy, which waits: mostly nobody has it any more.
                        new.buffer, copy = copy, buffer
                    copy.holder, self.buffer = weakref.ref(self), copy
                    return
        np.copyto(self.expose(), new.force() if type(new) is Chunked else new, "same_kind")

    def __array__(self, dtype=None, copy=None):
        return np.array(self.expose(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        prim, out = TABLE.get(ufunc), kwargs.get("out", ())
        ours = isinstance(prim, Primitive) and kwargs.keys() <= {"out"} and {Chunked}.issuperset(map(type, out))
        if method == "__call__" and ours:
            new = _evaluate(prim, inputs, _NO_PARAMS)
            if not out:
                return new
            if getattr(new, "shape", None) == out[0].shape:
                out[0].assign(new)
                return out[0]
        return _exposed(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        prim = TABLE.get(function)
        if function in (np.shape, np.ndim, np.size) and len(args) == 1:
            return getattr(self, function.__name__)
        if function in (np.empty_like, np.zeros_like, np.ones_like, np.full_like):
            like = np.broadcast_to(np.zeros((), self.dtype), self.shape)
            return HOOK.adopt(function(like, *args[1:], **kwargs), self.forced or None, new=True)
        if isinstance(prim, Primitive) and set(kwargs) <= {*prim.params, *(prim.operands or ())}:
            return prim(*args, **kwargs)
        return _exposed(function, args, kwargs)

    def __getitem__(self, index):
        return self.expose()[index]

    def __bool__(self):
        return bool(self.force())

    def __getattr__(self, name):
        if name.startswith("__"):  # other protocols than NumPy's
            raise AttributeError(name)
        return getattr(self.expose(), name)

    def astype(self, dtype, copy=True):
        return _evaluate(_as_dtype, (self,), {"dtype": np.dtype(dtype)})

    def __reduce__(self):
        return np.array, (self.force(),)


def _exposed(function: Callable, args, kwargs: dict):
    """Calls code that may keep what it gets, and write to it, on the arrays of chunked ones, which are handed out."""

    def plain(x):
        if isinstance(x, (list, tuple)):
            return type(x)(map(plain, x))
        return x.expose() if type(x) is Chunked else x

    return function(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})


class _InBlocks(Kind):
    """The kind of chunked arrays."""

    rank = 2

    def enter(self, data, dtype, choice, who):
        return HOOK.adopt(Chunked(data.cast(np.dtype(dtype or data.dtype)), choice is True), choice)

    def evaluate(self, prim, raw, params):
        """Waits, is reduced, or is done at once."""
        if prim is _detach:
            return raw[0]
        state, forced = np.geterr(), any([type(x) is Chunked and x.forced for x in raw])
        # What waits, or is cut into blocks, is of the catalogue, and nobody has to see its faults at once: as NumPy
        # does it, they may be an error, or a call, on the line that they come from.
        if (_config.enabled or forced) and not _mode.tracing and prim.builtin and _harmless(state):
            if prim.elementwise and (not params or prim is _as_dtype) and all(map(_in_c_order, raw)):
                raw = raw if prim.ufunc else _strengthened(prim, raw)
                with contextlib.suppress(ValueError):  # shapes that do not fit: NumPy says so
                    dtype = (
                        np.dtype(params["dtype"])
                        if params
                        else _result_dtype(prim, *[getattr(x, "dtype", x) for x in raw])
                    )
                    if dtype.kind == "f" or (prim.forward is not np.power and dtype.kind in "iub"):  # fails on some
                        return Chunked(_step(prim, raw, dtype, state), forced)
            if (
                prim.name in _REDUCTIONS
                and type(raw[0]) is Chunked
                and raw[0].size
                and params.keys() <= {"axis", "keepdims", "ddof"}
            ):
                x = raw[0].buffer
                if x.step is not None or x.array.nbytes > 8 * _FEW_BLOCKS * _BLOCK_BYTES:  # else NumPy's one pass does
                    return _reduced(prim, x, state, **params)
        return self.whole(prim, raw, params, forced or None)

    def whole(self, prim, raw, params, choice):
        """By NumPy, in one go. A view of an array of ours hands it out, and so does code that is not ours, which may
        keep what it gets; what is new is a chunked array, where that may pay."""
        if not prim.builtin:
            return _exposed(NUMPY.evaluate, (prim, raw, params), {})
        arrays = [x.force() if type(x) is Chunked else x for x in raw]
        out = _memory.spend(NUMPY.evaluate, prim, arrays, params)
        views = [x.expose() for x in raw if type(x) is Chunked and np.may_share_memory(x.force(), out)]
        new = type(out) is np.ndarray and out.flags.owndata and not views
        return HOOK.adopt(out, choice, new=True) if new else out

    def hand_out(self, raw):
        return raw.expose()

    def fetch(self, raws):
        return [raw.force() for raw in raws]

    def own(self, raw):
        return Chunked(raw.cast(raw.dtype), raw.forced)

    def shared(self, raw):
        return raw.buffer.given

    def same(self, raw, x):
        return x is raw or (raw.buffer.given and x is raw.buffer.array)

    def target(self, raw):
        return raw.buffer.array if raw.buffer.given else None

    def write(self, raw, new):
        raw.assign(new)
        return raw


class _BlocksHook(_Hook):
    """What becomes a chunked array: what is large while distribution is on, and what was told to be distributed, if it
    has more than four blocks: with less, what it takes to wait would be felt beside the arithmetic."""

    def adopt(self, raw, choice, dtype=None, new=False):
        if type(raw) is Chunked:
            return raw if self.distributed(raw, choice) else raw.expose()
        fits = type(raw) is np.ndarray and raw.nbytes > 4 * _BLOCK_BYTES and raw.flags.carray
        if fits and self.distributed(raw, choice):
            found = Chunked(_Buffer(raw.shape, raw.dtype, array=raw, given=not new), choice is True)
            return found if dtype is None else Chunked(found.cast(dtype), choice is True)
        return raw if dtype is None else self.adopt(raw.astype(dtype), choice, new=True)

    def distributed(self, raw, choice):
        large = _config.enabled and np.size(raw) >= _config.min_elements_for_parallel
        return not _mode.tracing and np.ndim(raw) > 0 and (large if choice is None else choice)


KINDS[Chunked] = _InBlocks()
HOOK = _BlocksHook()


def _in_c_order(x) -> bool:
    """Whether NumPy would give a result of x in C order, as we do; else its layout is for NumPy to choose."""
    return not isinstance(x, np.ndarray) or _without_repeats(x).flags.c_contiguous


@functools.lru_cache(1000, typed=True)
def _result_dtype(prim: Primitive, *args) -> np.dtype:
    """The dtype of a result for dtypes and numbers: what one element gives. An error if a whole number does not fit."""
    with np.errstate(all="ignore"):
        return prim.forward(*[np.ones(1, x) if isinstance(x, np.dtype) else x for x in args]).dtype


def _step(prim: Primitive, raw: Sequence, dtype: np.dtype, state: dict) -> _Buffer:
    """An element-wise operation, which waits if nobody else may write to what it reads."""
    shapes = {x.shape for x in raw if getattr(x, "shape", ())}
    shape = shapes.pop() if len(shapes) == 1 else np.broadcast_shapes(*shapes)
    args, wait = [], True
    for x in raw:
        if type(x) is Chunked:
            x = x.buffer
            step = x.step
            if step is not None and (x.shape != shape or step[2] != state):
                x.force()  # all steps of a job have one shape
        elif isinstance(x, np.ndarray):
            x = _without_repeats(x)
            wait = wait and x.nbytes <= _TRAVELS_BYTES
            x = x.copy() if wait else x
        args.append(x)
    new = _Buffer(shape, dtype, (prim, tuple(args), state))
    for x in args:
        if type(x) is _Buffer:
            x.readers[id(new)] = new
            wait = wait and not x.given
    if not wait or len(new.pending({})) >= _MAX_PENDING:
        new.force()
    return new


_REDUCTIONS = {*_REDUCERS, "mean", "var", "std"}


def _reduced(prim: Primitive, x: _Buffer, state: dict, axis=None, keepdims=False, ddof=0):
    """A reduction in one pass; var and std, which need the mean first, in two."""
    axis = tuple(range(len(x.shape))) if axis is None else axis
    axes = np.lib.array_utils.normalize_axis_tuple(axis if type(axis) is tuple else operator.index(axis), len(x.shape))
    count, step = math.prod([x.shape[i] for i in axes]), x.step
    if step is not None and step[2] != state:
        x.force()
    dtype = _result_dtype(prim, x.dtype)
    wide = np.promote_types(dtype, np.float32) if dtype.kind == "f" else dtype
    if prim.name in ("var", "std"):
        mean = np.true_divide(x.compute(("sum", axes, wide)), count)
        for function, others in (np.subtract, (mean,)), (np.square, ()):
            x = _Buffer(x.shape, wide, (TABLE[function], (x, *others), state))
        count = max(count - ddof, 0)
    total = x.compute((prim.name if prim.name in _REDUCERS else "sum", axes, wide))
    if prim.name not in _REDUCERS:
        total = np.true_divide(total, count)
    total = (np.sqrt(total) if prim.name == "std" else total).astype(dtype, copy=False)
    if not keepdims:
        total = total.reshape([n for i, n in enumerate(x.shape) if i not in axes])
    return total if total.ndim else total[()]


# ---------------------------------------------------------------------------------------------------------------------
# 9. Optimizer
#
# In: the roots of a graph of Values. Out: Values over the same leaves whose `forward` and `backward` run one short
# straight-line program. First PASSES rewrite the forward graph; its backward sweep is then traced with the primitives'
# own rules, as Values, so that the passes see both; at last `_Lowering` writes the joint graph down as Python.
# A pass is a function of roots to roots. Nodes are never changed: a pass makes new ones where something is new, and
# they take over the data of the old, so that shapes and dtypes are known throughout. What may be rewritten, and what is
# written as plain calls of NumPy's, `_regular` decides, and nothing else.
# Invariant: the roots that a pass returns have the value, the shape and the dtype of those it was given.
#
#     >>> a, b = Value(2.0, label="a"), Value(3.0, label="b")
#     >>> print(optimize(a * b + a**2).source.partition("\n\n")[0])
#     def forward():
#         x0 = i8._data
#         x1 = i9._data
#         t0 = x0 * x1
#         t1 = x0 * x0
#         t2 = t0 + t1
#         return (t2, ), (x0, x1, )
# ---------------------------------------------------------------------------------------------------------------------

__all__ += ["optimize"]

_BATCH_SCALARS, _BATCH_ARRAYS = 16, 4  # smallest groups worth an array operation: below, its overhead costs more
_BATCH_SIZE = 1 << 16  # elements of an array above which stacking it costs more than calls are saved
_FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}  # what rewrites are about; other dtypes stay as they are
_ADD, _SUBTRACT, _MULTIPLY, _WHERE = (TABLE[f] for f in (np.add, np.subtract, np.multiply, np.where))
_NEGATIVE, _SQUARED, _TRANSPOSE, _BROADCAST = (
    TABLE[f] for f in (np.negative, np.square, np.transpose, np.broadcast_to)
)
_VIEWS = (_reshape, _TRANSPOSE, _BROADCAST, _getitem)
# Operands that may be masks: where's condition, a mask times a float (micrograd's relu), masks made of masks.
_MASKS = (
    {_WHERE: (0,), _MULTIPLY: (0, 1)}
    | dict.fromkeys(_VIEWS, (0,))
    | dict.fromkeys((TABLE[f] for f in (np.logical_and, np.logical_or, np.logical_xor, np.logical_not)), (0, 1))
)
_MASKS |= dict.fromkeys((TABLE[f] for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.invert)), (0, 1))


def _is_mask(x) -> bool:
    raw = _raw(x)
    return type(raw) is bool or (hasattr(raw, "dtype") and raw.dtype.kind == "b")


def _regular(node: Value) -> bool:
    """The one guard: whether a rewrite may fire on a node, and whether a plain call of NumPy's computes it.

    A primitive of this file made it; its operands are numbers, or arrays of one floating dtype, which it has, too, none
    of them empty; masks only where `_MASKS` says so. All else is computed by `_evaluate`, as in eager mode.
    """
    prim, dtype = node._prim, None
    if prim in _AS_THEY_ARE or not prim.builtin:
        return prim in _AS_THEY_ARE
    masks = _MASKS.get(prim, ())
    for i, x in enumerate(node._args):
        x = x._data if isinstance(x, Array) else x
        if i in masks and type(x) is not float and _is_mask(x) and 0 not in np.shape(x):
            continue
        if prim is _WHERE and i == 0:
            return False
        if type(x) is float:
            continue
        if not isinstance(x, (np.ndarray, np.generic)) or not x.size:
            return False
        if x.dtype not in _FLOATS or dtype not in (None, x.dtype):
            return False
        dtype = x.dtype
    out = node._data
    if type(out) is float:
        return dtype is None or prim is _as_dtype
    if _is_mask(out):
        return (prim.vjps[0] is None or prim in _VIEWS) and 0 not in np.shape(out)
    if not isinstance(out, (np.ndarray, np.generic)) or not out.size or out.dtype not in _FLOATS:
        return False
    return dtype is None or dtype == out.dtype or prim is _as_dtype or prim is _pack


def _twin(node: Value, prim: Primitive, args: tuple, params: dict = _NO_PARAMS) -> Value:
    """A node with the data of another."""
    new = _node(node._data, prim, args, params)
    new.label = node.label
    return new


def _oldest_first(roots: Sequence) -> list[Value]:
    """Every node that the roots depend on, operands before what is made of them."""
    seen = {root for root in roots if isinstance(root, Value)}
    nodes = list(seen)
    for node in nodes:  # the list grows as it is walked
        for x in node._args:
            if isinstance(x, Value) and x not in seen:
                seen.add(x)
                nodes.append(x)
    nodes.sort(key=_get_number)
    return nodes


def _rewrite(roots: Sequence, rule: Callable, regular: bool = False) -> list:
    """Rebuilds a graph from the leaves up: rule(node, its new operands) is the new node, or a constant.

    With `regular`, nodes that `_regular` refuses stay as they are.
    """
    new: dict[Value, Any] = {}
    for node in _oldest_first(roots):
        if node._prim is None:
            new[node] = node
        else:
            args = tuple([new[x] if isinstance(x, Value) else x for x in node._args])
            new[node] = rule(node, args) if not regular or _regular(node) else _renewed(node, args)
    return [new[root] if isinstance(root, Value) else root for root in roots]


def _renewed(node: Value, args: tuple) -> Value:
    """The node, or its twin if an operand is another one now."""
    for x, y in zip(args, node._args):
        if x is not y:
            return _twin(node, node._prim, args, node._params)
    return node


def _replayed(roots: Sequence) -> list[Value]:
    """The graph anew, computed from the current data of its leaves and Tensors by the code of eager mode."""

    def rule(node, args):
        new = _twin(node, node._prim, args, node._params)
        new._data = _evaluate(node._prim, [_raw(x) for x in args], node._params)
        return new

    with _recording():
        return _rewrite(roots, rule)


def _reach(roots: Sequence) -> dict[Value, int]:
    """By node, the roots that send it a gradient, as a bit for each."""
    reach: dict[Value, int] = collections.defaultdict(int)
    for i, root in enumerate(roots):
        if isinstance(root, Value) and root._needs:
            reach[root] |= 1 << i
    for node in reversed(_oldest_first(roots)):
        prim = node._prim
        if prim is None or node not in reach:
            continue
        for i, x in enumerate(node._args):
            if isinstance(x, Value) and x._needs and prim.vjps[0 if prim.operands is None else i] is not None:
                reach[x] |= reach[node]
    return reach


def _alike(x, node: Value) -> bool:
    """Whether x can stand for a node: of its shape and dtype, and weak if it is weak."""
    x, y = _raw(x), node._data
    return type(x) is type(y) and (type(x) in _WEAK_TYPES or (x.shape, x.dtype) == (y.shape, y.dtype))


def _is(x, prim: Primitive) -> bool:
    """Whether x is a node made by that primitive, on which a rewrite may fire."""
    return isinstance(x, Value) and x._prim is prim and _regular(x)


# --- the passes ---


def fold_constants(roots: Sequence) -> list:
    """Computes what depends on constants only: x * (2 * 3) -> x * 6. Leaves and Tensors are variables."""

    def rule(node, args):
        for x in args:
            if isinstance(x, Array):
                return _renewed(node, args)
        return node._data

    return _rewrite(roots, rule)


def _simpler_add(node, x, y):
    for a, b in ((x, y), (y, x)):
        if _is(b, _NEGATIVE):
            return _twin(node, _SUBTRACT, (a, b._args[0]))
    return None


def _simpler_subtract(node, x, y):
    return _twin(node, _ADD, (x, y._args[0])) if _is(y, _NEGATIVE) else None


def _simpler_multiply(node, x, y):
    for a, b in ((x, y), (y, x)):
        if type(b) is float and b == 1.0:
            return a
        if type(b) is float and b == -1.0 and _alike(a, node):
            return _twin(node, _NEGATIVE, (a,))
        if _is(a, _NEGATIVE):
            return _twin(node, _NEGATIVE, (_record(_MULTIPLY, (a._args[0], b)),))
        # (u * c) * (s * x) -> (u * (c * s)) * x saves one product of full size: exact for constants c and s = 2 or 4,
        # and safe where their product is at most 1; so the mean of squares goes backward.
        if node.ndim and not np.ndim(_raw(a)) and _is(a, _MULTIPLY) and _is(b, _MULTIPLY):
            (u, c), (s, rest) = a._args, b._args
            if type(c) is type(s) is float and s in (2.0, 4.0) and abs(c * s) <= 1.0:
                return _twin(node, _MULTIPLY, (_record(_MULTIPLY, (u, c * s)), rest))
        # Where operands broadcast anyway, a broadcast one needs no array of its own.
        if _is(a, _BROADCAST) and np.shape(_raw(b)) == node.shape and node.ndim:
            return _twin(node, _MULTIPLY, (a._args[0], b) if a is x else (b, a._args[0]))
    return _twin(node, _SQUARED, (x,)) if x is y and node.ndim else None


def _simpler_divide(node, x, y):
    if type(y) is not float or math.frexp(y)[0] not in (0.5, -0.5) or not 1e-4 < abs(y) < 1e4:
        return None  # only by powers of two is the reciprocal exact
    return _twin(node, _MULTIPLY, (x, 1.0 / y))


def _simpler_power(node, x, y):
    if type(y) is not float or y not in (1.0, 2.0):
        return None
    return x if y == 1.0 else _twin(node, _SQUARED, (x,))


def _simpler_mean(node, a, **params):
    n = np.size(_raw(a))
    return _twin(node, _MULTIPLY, (_record(PRIMITIVES["sum"], (a,), params), node.size / n))


def _simpler_reshape(node, x, shape):
    inner = x._args[0] if _is(x, _reshape) else x
    if _alike(inner, node):
        return inner
    return None if inner is x else _twin(node, _reshape, (inner,), {"shape": node.shape})


def _simpler_transpose(node, x, axes=None):
    if not _is(x, _TRANSPOSE):
        return None
    outer, inner = ([*range(node.ndim)][::-1] if a is None else list(a) for a in (axes, x._params.get("axes")))
    return x._args[0] if [inner[i] % node.ndim for i in outer] == list(range(node.ndim)) else None


_SIMPLER: dict[Primitive, Callable] = {
    _ADD: _simpler_add,
    _SUBTRACT: _simpler_subtract,
    _MULTIPLY: _simpler_multiply,
    TABLE[np.divide]: _simpler_divide,
    TABLE[np.power]: _simpler_power,
    PRIMITIVES["mean"]: _simpler_mean,
    _reshape: _simpler_reshape,
    _TRANSPOSE: _simpler_transpose,
    _NEGATIVE: lambda node, x: x._args[0] if _is(x, _NEGATIVE) else None,
    TABLE[np.positive]: lambda node, x: x,
    TABLE[np.copy]: lambda node, a: a,
    _BROADCAST: lambda node, array, shape: array,
    _as_dtype: lambda node, a, dtype: a,
}


def simplify(roots: Sequence) -> list:
    """Algebra that is exact, also for inf, nan and -0.0: x * 1 -> x, x**2 -> square(x), a - -b -> a + b, x / 4 ->
    x * 0.25."""

    def rule(node, args):
        simpler = _SIMPLER.get(node._prim)
        new = simpler(node, *args, **node._params) if simpler else None
        return new if isinstance(new, Value) and _alike(new, node) else _renewed(node, args)

    return _rewrite(roots, rule, regular=True)


def _key(x):
    """Something hashable that is equal for interchangeable operands and parameters."""
    kind = type(x)
    if kind is float:
        return (x, math.copysign(1.0, x)) if x == x else "nan"
    if kind is int or kind is str:
        return kind, x
    if kind is tuple or kind is list:
        return tuple(map(_key, x))
    if kind is slice:
        return "slice", _key(x.start), _key(x.stop), _key(x.step)
    return id(x)  # arrays and nodes, what there is one of, and what we know nothing about


def merge_common(roots: Sequence, swept: bool = True) -> list:
    """Makes equal operations on the same operands one node: tanh(x) * tanh(x) -> t * t with one tanh. What a user's
    primitive does is its own affair: it may draw random numbers.

    Before the sweep only what has no gradient: a node that is two sends two gradients, and 0 * inf + 1 * inf is nan,
    where (0 + 1) * inf is not."""
    known: dict[Any, Value] = {}

    def rule(node, args):
        prim, params = node._prim, node._params
        if not prim.builtin or (node._needs and not swept):
            return _renewed(node, args)
        key: Any = (prim, tuple(map(_key, args)))
        if params:
            key += tuple([(name, _key(params[name])) for name in sorted(params)])
        found = known.get(key)
        if found is None:
            found = known[key] = _renewed(node, args)
        return found

    return _rewrite(roots, rule)


def _sum_of_products(*terms, products):
    pairs = map(operator.mul, terms[: 2 * products : 2], terms[1 : 2 * products : 2])
    return functools.reduce(operator.add, [*pairs, *terms[2 * products :]])


# A sum of products of 0-d operands and of what else is added: a1*b1 + a2*b2 + ... + c + d + ...
_dot = primitive(
    _sum_of_products,
    lambda i, g, out, terms, products: g * terms[i ^ 1] if i < 2 * products else g,
    name="dot",
    variadic=True,
    samples=[(((), (), (), (), ()), {"products": 2}), (((2, 3), (2, 3), (2, 3)), {"products": 0})],
)


def flatten(roots: Sequence) -> list:
    """Makes chains of + one sum, and sums of products of numbers a dot product: a*b + c*d + e -> dot(a, b, c, d, e)."""
    nodes = _oldest_first(roots)
    uses = collections.Counter([x for node in nodes for x in node._args if isinstance(x, Value)])
    uses.update(root for root in roots if isinstance(root, Value))
    sums = {node for node in nodes if _is(node, _ADD)}
    # The terms of a sum that only another such sum needs wait here for that.
    used = ((x, node) for node in sums for x in node._args if isinstance(x, Value))
    inner = {x for x, node in used if x in sums and uses[x] == 1 and _alike(x, node)}
    inner.difference_update(roots)
    waiting: dict[Value, list] = {}

    def rule(node, args):
        if node not in sums:
            return _renewed(node, args)
        terms: list = []
        for old, x in zip(node._args, args):
            more = waiting.pop(old) if isinstance(old, Value) and old in inner else [(old, x)]
            if len(more) > len(terms):
                terms, more = more, terms
            terms += more
        if node in inner:
            waiting[node] = terms
            return node  # a place holder
        if len(terms) < 3:
            return _renewed(node, args)
        products: list = []
        rest: list = []
        zero: list = []  # where sum() starts: it makes -0.0 a 0.0, and comes last
        for old, x in terms:
            factors: tuple = ()
            if not node.ndim and isinstance(old, Value) and uses[old] == 1 and _alike(x, node):
                factors = x._args if _is(x, _MULTIPLY) else x._args * 2 if _is(x, _SQUARED) else ()
            if type(x) is float and x == 0.0:
                zero = [x] if math.copysign(1.0, x) > 0 else zero
            elif factors and not any(map(_is_mask, factors)):
                products += factors
            else:
                rest.append(x)
        return _twin(node, _dot, (*products, *rest, *zero), {"products": len(products) // 2})

    return _rewrite(roots, rule)


# Numbers of a graph as one array: how `batch` takes up leaves, and nodes that it left alone.
_pack = primitive(
    lambda *numbers, shape, dtype: np.array(numbers, dtype).reshape(shape),
    lambda i, g, out, numbers, shape, dtype: g[tuple(map(int, np.unravel_index(i, shape)))],
    name="pack",
    variadic=True,
    samples=[(((), (), ()), {"shape": (3,), "dtype": np.float64})],
)


def _starts_at_zero(node: Value) -> bool:
    """Whether 0.0 is the last of the terms of a sum of products."""
    return type(node._args[-1]) is float and node._args[-1] == 0.0


class _Batch:
    """What `batch` knows while it rebuilds a graph: which new node, or which place in which stack, an old node became.

    A stack has the shape (*layout, *shape of its members); a place is the flat number of a member in the layout.
    """

    def __init__(self):
        self.new: dict[Value, Any] = {}
        self.places: dict[Any, tuple[Any, int]] = {}
        self.layouts: dict[int, tuple[int, ...]] = {}  # by the stack's id, as it may be an ndarray of constants

    def single(self, x):
        """The new form of an operand, on its own."""
        if not isinstance(x, Value):
            return x
        if x not in self.new:
            if x._prim is None:
                self.new[x] = x
            else:
                stack, place = self.places[x]
                part = stack[tuple(map(int, np.unravel_index(place, self.layouts[id(stack)])))]
                weak = type(x._data) is float or type(x._data) is bool
                self.new[x] = _as_dtype(part, float) if weak else part
                if type(x._data) is bool:
                    self.new[x] = np.not_equal(self.new[x], 0.0)
        return self.new[x]

    def rank(self, xs: Sequence) -> tuple:
        """An order of operands in which those of one stack follow each other."""
        stack, place = self.places.get(xs[0], (None, 0)) if isinstance(xs[0], Value) else (None, 0)
        return [*self.layouts].index(id(stack)) if stack is not None else len(self.layouts), place

    def put(self, members: Sequence, stack, layout: tuple[int, ...], places: dict) -> None:
        """Notes that the members of a stack stand for these nodes."""
        self.layouts[id(stack)] = layout
        for place, x in enumerate(members):
            places[x] = stack, place

    def gather(self, xs: list, layout: tuple[int, ...], dtype=None):
        """The operands as one array (*layout, *their shape), or one that broadcasts to it. It is a stack that exists, a
        part or a transpose of one where that will do, and a copy only where not."""
        shape = np.shape(_raw(xs[0]))
        keys = list(map(_key, xs))
        if len(layout) == 2 and min(layout) > 1:
            rows, columns = layout
            if all(keys[i * columns : (i + 1) * columns] == keys[:columns] for i in range(1, rows)):
                return np.reshape(self.gather(xs[:columns], (columns,), dtype), (1, columns, *shape))
            if all(keys[i] == keys[i - i % columns] for i in range(len(keys))):
                return np.reshape(self.gather(xs[::columns], (rows,), dtype), (rows, 1, *shape))
        whole = (*layout, *shape)
        if not any(isinstance(x, Array) for x in xs):
            return np.array(xs, None if shape else dtype).reshape(whole)
        places = self.places
        if shape:
            if not all(isinstance(x, Array) and x in places for x in xs):
                return np.reshape(_record(_stack, tuple(map(self.single, xs)), {"axis": 0}), whole)
        else:  # numbers that are in no stack yet become one, in the order in which they are wanted here
            loose = list(dict.fromkeys([x for x in xs if isinstance(x, Array) and x not in places]))
            if loose:
                own = layout if len(loose) == len(xs) else (len(loose),)
                kinds = {float: np.float64, bool: bool}  # what numbers of Python's become
                dtypes = [kinds.get(type(x._data)) or x._data.dtype for x in loose]
                params = {"shape": own, "dtype": np.result_type(*dtypes)}
                self.put(loose, _record(_pack, tuple(map(self.single, loose)), params), own, places)
            constants = {_key(x): x for x in xs if not isinstance(x, Array)}
            if constants:
                places = collections.ChainMap({}, places)
                self.put(list(constants), np.array([*constants.values()], dtype), (len(constants),), places)
        found = [places[x if isinstance(x, Array) else _key(x)] for x in xs]
        starts, flat, start = {}, [], 0
        for stack, _ in found:
            if id(stack) not in starts:
                n = math.prod(self.layouts[id(stack)])
                starts[id(stack)], start = start, start + n
                flat.append(np.reshape(stack, (n, *shape)))
        joint = flat[0] if len(flat) == 1 else _concatenate(*flat)
        index = np.array([starts[id(stack)] + place for stack, place in found])
        step = int(index[1] - index[0]) if len(index) > 1 else 1
        if step > 0 and np.array_equal(index, np.arange(len(index)) * step + index[0]):
            if len(index) < start:
                joint = joint[int(index[0]) : int(index[-1]) + 1 : step]
        elif (
            len(layout) == 2
            and len(index) == start
            and np.array_equal(index.reshape(layout), np.arange(start).reshape(layout[::-1]).T)
        ):
            return np.swapaxes(np.reshape(joint, (*layout[::-1], *shape)), 0, 1)
        else:
            joint = joint[(index,)]
        return np.reshape(joint, whole)

    def operand(self, nodes: list, k: int, layout: tuple[int, ...]):
        """Operand k of all nodes, and whether it is stacked or one that they share."""
        xs = [node._args[k] for node in nodes]
        if len(set(map(_key, xs))) == 1:
            return self.single(xs[0]), False
        return self.gather(xs, layout), True

    @staticmethod
    def rows(nodes: list) -> tuple[list, list, list]:
        """Of sums of products: the left factors, the right ones, and what is added but for a 0.0 at the end, a row per
        node."""
        end, stop = 2 * nodes[0]._params["products"], -1 if _starts_at_zero(nodes[0]) else None
        return tuple(
            [node._args[cut] for node in nodes] for cut in (slice(0, end, 2), slice(1, end, 2), slice(end, stop))
        )

    @staticmethod
    def distinct(rows: list) -> tuple[list, list[int]]:
        """The different rows, in order of appearance, and which of them each row is."""
        numbers: dict = {}
        keys = [_key(row) for row in rows]
        of_row = [numbers.setdefault(key, len(numbers)) for key in keys]
        return list({i: row for i, row in reversed([*zip(of_row, rows)])}.values())[::-1], of_row

    def reserve(self, nodes: list) -> None:
        """Stacks leaves as a group of dot products will want them, before smaller groups ask for other orders."""
        left, right, rest = self.rows(nodes)
        for rows in (left, right, rest):
            block = self.distinct(rows)[0]
            xs = [x for row in block for x in row]
            loose = all(isinstance(x, Value) and x._prim is None and x not in self.places for x in xs)
            if xs and loose and len(set(xs)) == len(xs):
                self.gather(xs, (len(block), len(block[0])))

    def elementwise(self, nodes: list) -> bool:
        node, layout = nodes[0], (len(nodes),)
        for k in range(len(node._args)):  # in the order of a stack that exists, if they can be
            found = [self.places.get(node._args[k]) for node in nodes if isinstance(node._args[k], Value)]
            if len(found) == len(nodes) and None not in found and len({id(stack) for stack, _ in found}) == 1:
                places = [place for _, place in found]
                if len(set(places)) == len(places):
                    nodes = [node for _, node in sorted(zip(places, nodes), key=operator.itemgetter(0))]
                    whole = self.layouts[id(found[0][0])]
                    layout = whole if math.prod(whole) == len(nodes) else layout
                    break
        strong = [x.dtype for x in map(_raw, node._args) if getattr(x, "dtype", None) in _FLOATS]
        operands, any_stacked = [], False
        for k, x in enumerate(map(_raw, node._args)):
            y, stacked = self.operand(nodes, k, layout)
            if stacked and np.ndim(x) < node.ndim:
                y = np.reshape(y, np.shape(y)[: len(layout)] + (1,) * (node.ndim - np.ndim(x)) + np.shape(x))
            if stacked and strong and type(x) is float:  # a number that was weak takes the dtype of those it meets
                y = y.astype(strong[0])
            any_stacked |= stacked
            operands.append(y)
        if not any_stacked:
            return False
        out = np.broadcast_to(_record(node._prim, tuple(operands), node._params), (*layout, *node.shape))
        self.put(nodes, out, layout, self.places)
        return True

    def sums(self, nodes: list) -> bool:
        """Dot products and sums of the same length. Where every one of some left rows meets every one of some right
        rows, the dot products are a matrix product."""
        node, products, layout = nodes[0], nodes[0]._params["products"], (len(nodes),)
        dtype = np.float64 if type(node._data) is float else node.dtype

        def block(rows):
            layout = (len(rows), len(rows[0]))
            stack = self.gather([x for row in rows for x in row], layout, dtype)
            return np.broadcast_to(stack, (*layout, *node.shape))

        out, zero = None, _starts_at_zero(node)
        left, right, rest = self.rows(nodes)
        if len(nodes) == 1:  # the order of its terms is free: that of the stacks which they are in spares a gather
            left, right = (
                ([list(row)] for row in zip(*sorted(zip(left[0], right[0]), key=self.rank)))
                if products
                else (left, right)
            )
            rest = [sorted(rest[0], key=lambda x: self.rank((x,)))]
        if products:
            (lefts, i), (rights, j) = self.distinct(left), self.distinct(right)
            if len(lefts) * len(rights) == len(nodes) == len(set(zip(i, j))):
                order = sorted(range(len(nodes)), key=lambda n: (j[n], i[n]))
                nodes, layout = [nodes[n] for n in order], (len(rights), len(lefts))
                out, zero = np.matmul(block(rights), np.swapaxes(block(lefts), 0, 1)), False  # BLAS starts at 0.0
            else:
                out = np.sum(block(left) * block(right), axis=1)
        if len(rest[0]) > 2:
            total = np.reshape(np.sum(block(rest), axis=1), (*layout, *node.shape))
            out = total if out is None else out + total
        else:
            for k in range(2 * products, 2 * products + len(rest[0])):
                term = self.operand(nodes, k, layout)[0]
                out = term if out is None else out + term
        out = out + 0.0 if zero else out
        if out.dtype != dtype:
            out = out.astype(dtype)
        self.put(nodes, out, layout, self.places)
        return True

    def arrays(self, nodes: list) -> bool:
        """Other operations on arrays, by their entry in _BATCHED: on stacks, with an axis more at the front."""
        operands, stacked = zip(*(self.operand(nodes, k, (len(nodes),)) for k in range(len(nodes[0]._args))))
        out = _BATCHED[nodes[0]._prim](nodes[0], len(nodes), operands, stacked) if any(stacked) else None
        if out is None:
            return False
        self.put(nodes, out, (len(nodes),), self.places)
        return True


def _batched_matmul(node, n, operands, stacked):
    (x, y), (a, b) = operands, (np.ndim(_raw(z)) for z in node._args)
    if stacked == (True, False) and a == 1 and b <= 2:
        return np.matmul(x, y)
    if stacked == (False, True) and b == 1 and a <= 2:
        return np.matmul(y, x.T)
    lead = [(n,) if s else () for s in stacked]
    shapes = [np.shape(_raw(z)) for z in node._args]
    x = np.reshape(x, (*lead[0], 1, *shapes[0])) if a == 1 else x
    y = np.reshape(y, (*lead[1], *shapes[1], 1)) if b == 1 else y
    for k, s in enumerate(stacked):  # batch axes of the operands themselves line up behind the new one
        missing = max(a, b, 2) - max((a, b)[k], 2)
        if s and missing:
            z = (x, y)[k]
            z = np.reshape(z, (n,) + (1,) * missing + np.shape(z)[1:])
            x, y = (z, y) if k == 0 else (x, z)
    return np.reshape(np.matmul(x, y), (n, *node.shape))


def _batched_axis(node, n, operands, stacked):
    ndim, params = np.ndim(_raw(node._args[0])), dict(node._params)
    axis = params.get("axis", -1 if "softmax" in node._prim.name else None)
    axes = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    shifted = tuple(int(i) % ndim + 1 for i in axes)
    params["axis"] = shifted[0] if len(shifted) == 1 else shifted
    return _record(node._prim, operands, params)


def _batched_getitem(node, n, operands, stacked):
    index = node._params["index"]
    if len(operands) > 1 or any(isinstance(i, np.ndarray) for i in index):
        return None
    return _getitem(operands[0], index=(slice(None), *index))


_BATCHED: dict[Primitive, Callable] = {
    **{PRIMITIVES[name]: _batched_axis for name in ("sum", "mean", "prod", "max", "min", "var", "std", "norm")},
    **dict.fromkeys((logsumexp, softmax, log_softmax), _batched_axis),
    TABLE[np.matmul]: _batched_matmul,
    _getitem: _batched_getitem,
    _reshape: lambda node, n, operands, stacked: np.reshape(operands[0], (n, *node.shape)),
    _TRANSPOSE: lambda node, n, operands, stacked: np.transpose(
        operands[0], (0, *(i % node.ndim + 1 for i in node._params.get("axes") or range(node.ndim)[::-1]))
    ),
}


def batch(roots: Sequence) -> list:
    """Groups equal operations of equal depth into one on stacked operands (Neubig et al. 2017, "On-the-fly Operation
    Batching in Dynamic Computation Graphs"): tanh(a), tanh(b), ... -> tanh([a, b, ...]). A group of dot products of
    some rows with all of some others becomes a matrix product.

    Only what sends its gradients to the same roots goes together: where one has none, 0 * inf would make it nan."""
    state, depth, reach = _Batch(), {}, _reach(roots)
    levels: dict[int, dict] = collections.defaultdict(lambda: collections.defaultdict(list))

    def kind(x):
        x = _raw(x)
        return type(x) if type(x) in (float, bool, int) else (x.shape, x.dtype)

    for node in _oldest_first(roots):
        prim = node._prim
        if prim is None:
            depth[node] = 0
            continue
        depth[node] = 1 + max((depth[x] for x in node._args if isinstance(x, Value)), default=0)
        key: Any = node  # on its own
        if prim is _dot and _regular(node):
            key = (prim, node._params["products"], len(node._args), kind(node), _starts_at_zero(node), reach[node])
        elif _regular(node) and node.size <= _BATCH_SIZE:
            arrays = prim in _BATCHED and all([isinstance(_raw(x), np.ndarray) for x in node._args])
            if arrays or (prim.elementwise and prim.operands and not node._params):
                shared = [
                    id(x) for x in node._args if isinstance(x, Array) and x.ndim > 1 and not getattr(x, "_prim", None)
                ]
                key = (
                    prim,
                    _key(tuple(node._params.items())),
                    kind(node),
                    *map(kind, node._args),
                    *shared,
                    reach[node],
                )
        levels[depth[node]][key].append(node)
    groups = [nodes for level in levels.values() for nodes in level.values() if len(nodes) > 1]
    for nodes in sorted(groups, key=len, reverse=True):
        if nodes[0]._prim is _dot and not nodes[0].ndim:
            state.reserve(nodes)
    for level in sorted(levels):
        for key, nodes in sorted(levels[level].items(), key=lambda item: -len(item[1])):
            node, done = nodes[0], False
            if key is not node:
                if node._prim is _dot:
                    terms = node._args[:-1] if _starts_at_zero(node) else node._args
                    if len(nodes) * len(terms) >= 4 * _BATCH_SCALARS and all(
                        np.shape(_raw(x)) == node.shape for n in nodes for x in n._args[: len(terms)]
                    ):
                        done = state.sums(nodes)
                elif len(nodes) >= (_BATCH_ARRAYS if any(np.ndim(_raw(x)) for x in node._args) else _BATCH_SCALARS):
                    done = state.elementwise(nodes) if node._prim.elementwise else state.arrays(nodes)
            if not done:
                for node in nodes:
                    state.new[node] = _renewed(node, tuple([state.single(x) for x in node._args]))
    return [state.single(root) for root in roots]


def _run_chain(*operands, chain):
    values = dict(zip(_outside(chain), operands))
    for node in chain:
        values[node] = _evaluate(
            node._prim, [values.get(x, x) if isinstance(x, Array) else x for x in node._args], node._params
        )
    return values[chain[-1]]


def _outside(chain: tuple, kinds: type = Array) -> list:
    """What a chain of nodes takes from elsewhere, each object once: Values and Tensors, or any `object`."""
    inside = set(map(id, chain))
    taken = {id(x): x for n in chain for x in n._args if isinstance(x, kinds)}
    return [x for i, x in taken.items() if i not in inside]


def _chain_i(i, g, out, operands, chain):
    inputs = [np.positive(x) if isinstance(x, Value) else _leaf(x) for x in operands]
    values: dict = dict(zip(_outside(chain), inputs))
    for node in chain:
        values[node] = node._prim(
            *[values.get(x, x) if isinstance(x, Array) else x for x in node._args], **node._params
        )
    return _backpropagate(values[chain[-1]], g, set(inputs), False, isinstance(g, Value)).get(inputs[i])


_fused = primitive(_run_chain, _chain_i, name="fused", variadic=True)
_MAX_CHAIN = 32
_AS_THEY_ARE = {_detach, _fused}  # what is right on any operands
for _prim in (_dot, _pack, _fused):
    _prim.builtin = True


def fuse(roots: Sequence) -> list:
    """Makes a matrix product and the element-wise operations after it, or those alone, one node, where nothing else
    needs what lies between: t = x @ w; u = t + b; tanh(u) -> tanh(x @ w + b). Its parts are `chain`, oldest first."""
    nodes = _oldest_first(roots)
    uses = collections.Counter([x for node in nodes for x in node._args if isinstance(x, Value)])
    uses.update(root for root in roots if isinstance(root, Value))

    def fits(x, node):
        part = x._prim is not None and (x._prim.elementwise or x._prim is TABLE[np.matmul]) and _regular(x)
        return part and uses[x] == 1 and isinstance(x._data, np.ndarray) and x.shape == node.shape

    inner = {
        x
        for node in nodes
        if node._prim and node._prim.elementwise and _regular(node)
        for x in node._args
        if isinstance(x, Value) and fits(x, node)
    }
    inner.difference_update(root for root in roots if isinstance(root, Value))
    waiting: dict[Value, tuple] = {}

    def close(node, chain):
        if len(chain) == 1:
            return node
        return _twin(node, _fused, tuple(_outside(chain)), {"chain": chain})

    def rule(node, args):
        chain: tuple = ()
        for old in node._args:
            if isinstance(old, Value) and old in waiting:
                more = waiting.pop(old)
                if len(chain) + len(more) < _MAX_CHAIN:
                    chain += more
                else:
                    args = tuple([close(more[-1], more) if x is more[-1] else x for x in args])
        new = _renewed(node, args)
        chain += (new,)
        if node in inner:
            waiting[node] = chain
            return new
        return close(new, chain)

    return _rewrite(roots, rule)


def _formula(chain: tuple) -> str:
    """A chain as Python would write it; what has no label is called by a letter."""
    letters = (c for c in "xyzabcdefghijklmnopqrstuv" if c not in {getattr(x, "label", "") for x in _outside(chain)})
    names = {x: getattr(x, "label", "") or next(letters, "·") for x in _outside(chain)}
    ranks = {"+": 1, "-": 1, "*": 2, "/": 2, "@": 2}

    def text(x, rank):
        if not isinstance(x, Array):
            return f"{x:g}" if isinstance(x, float) else "c"
        if x not in inside:
            return names[x]
        symbol, args = x._prim.symbol, x._args
        own = ranks.get(symbol)
        if own is None or len(args) == 1:
            inner = ", ".join([text(y, 0) for y in args])
            return f"-{text(args[0], 3)}" if symbol == "-" else f"{symbol}({inner})"
        written = f"{text(args[0], own)} {symbol} {text(args[1], own + 1)}"
        return f"({written})" if own < rank else written

    inside = set(chain)
    return text(chain[-1], 0)


# --- lowering: the joint graph of values and gradients as straight-line Python ---

_INFIX = {np.add: "{} + {}", np.subtract: "{} - {}", np.multiply: "{} * {}", np.divide: "{} / {}", np.negative: "-{}"}
_INFIX |= {np.greater: "{} > {}", np.less: "{} < {}", np.square: "{0} * {0}"}
_MAX_LINES = 300_000  # of a program; Python takes 6 us to compile a line. Larger graphs are replayed node by node.


def reduce_products(roots: Sequence) -> list:
    """Writes the sum of a product as a dot product, which needs no array for the product: sum(d * d) -> d @ d."""

    def rule(node, args):
        x = args[0]
        if _is(node, PRIMITIVES["sum"]) and node.ndim == 0 and isinstance(x, Value) and x.ndim:
            pair = x._args * 2 if _is(x, _SQUARED) else x._args if _is(x, _MULTIPLY) else ()
            if pair and all(np.shape(_raw(y)) == x.shape and np.result_type(_raw(y)) == x.dtype for y in pair):
                flat = [y if np.ndim(_raw(y)) == 1 else _record(_reshape, (y,), {"shape": (x.size,)}) for y in pair]
                flat[1] = flat[0] if pair[0] is pair[1] else flat[1]
                if _alike(product := _record(TABLE[np.matmul], tuple(flat)), node):
                    return product
        return _renewed(node, args)

    return _rewrite(roots, rule, regular=True)


def _run_rule(g, out, *operands, prim, i, params):
    """The gradient of operand i of a user's primitive, by the sweep of eager mode: its rule may do what it likes."""
    x = _leaf(operands[i])
    with _recording():
        node = _node(out, prim, (*operands[:i], x, *operands[i + 1 :]), params)
    h = _backpropagate(node, g).get(x)
    return _filled_like(operands[i], 0) if h is None else h


def _unregistered(name: str, forward: Callable, vjps: tuple, like: Primitive) -> Primitive:
    """A primitive that is in no table."""
    new = Primitive()
    for slot in Primitive.__slots__:
        setattr(new, slot, getattr(like, slot))
    new.name, new.forward, new.vjps, new.builtin = name, forward, vjps, False
    return new


_rule = _unregistered("rule", _run_rule, (None,), like=_dot)  # its parameters: primitive, place and parameters


def seal(roots: Sequence) -> list:
    """Makes the rules of users' primitives nodes, when a sweep comes by: what they do is not traced, but done anew."""
    sealed: dict[Primitive, Primitive] = {}

    def rule_of(prim, i):
        def rule(g, out, *operands, **params):
            params = {"prim": prim, "i": i, "params": params}
            return _node(_run_rule(*map(_raw, (g, out, *operands)), **params), _rule, (g, out, *operands), params)

        return rule

    def rule(node, args):
        prim = node._prim
        if prim.builtin or not any(prim.vjps):
            return _renewed(node, args)
        if prim not in sealed:
            rules = tuple([f and rule_of(prim, i) for i, f in enumerate(prim.vjps)])
            if prim.operands is None:
                rules = (lambda i, g, out, operands, **params: rule_of(prim, i)(g, out, *operands, **params),)
            sealed[prim] = _unregistered(prim.name, prim.forward, rules, prim)
        return _twin(node, sealed[prim], args, node._params)

    return _rewrite(roots, rule)


class _Lowering:
    """Writes the functions `forward` and `backward` of a graph: a line or two per node, in the order of the graph.

    Arrays go to buffers that are made once, and shared by results that are not needed at the same time; views of
    buffers are made once, too; numbers are local variables. A name is an input x, a buffer or view of one b, a constant
    c, a function f, a local t, or out for an array that a leaf gets as its gradient. User's strings are never names.
    """

    def __init__(self, roots: Sequence[Value], seed: Value, gradients: Sequence[Value]):
        self.space: dict[str, Any] = {"np": np, "math": math, "_evaluate": _evaluate, "_as_before": _as_before}
        self.names: dict[Any, str] = {}  # of nodes, Tensors, and, by id, of other objects
        self.fixed: dict[str, np.ndarray] = {}  # by name: what is the same array in every run
        self.buffers: dict[Value, np.ndarray] = {}  # a node's own buffer, until its last use
        self.spare: dict[tuple, list[np.ndarray]] = collections.defaultdict(list)
        self.inputs: dict[str, Array] = {}
        self.outputs: set[str] = set()  # arrays that leaves get as their gradients
        self.section, self.lines = 0, ([], [])
        self.sections = {"seed": 1}  # of a local: 0 if made by forward, 1 by backward
        self.saved: dict[str, None] = {}  # locals of forward that backward needs, in order
        self.number = itertools.count()
        first = _oldest_first(roots)
        before = set(first)
        later = [node for node in _oldest_first(gradients) if node not in before]
        first, later = ([part for node in nodes for part in self.parts(node)] for nodes in (first, later))
        before.update(first)
        nodes = first + later
        self.names[seed] = "seed"
        self.plan(nodes, roots, gradients)
        for self.place, node in enumerate(nodes):
            self.section = int(node not in before)
            if node._prim is not None:
                self.emit(node)
            for dead in self.dying.get(self.place, ()):
                if dead in self.buffers:
                    buffer = self.buffers.pop(dead)
                    self.spare[buffer.dtype, buffer.size].append(buffer)
        self.finish(roots, gradients)

    def plan(self, nodes, roots, gradients):
        """When the data of each node is needed last. What may be a view of an operand keeps that operand alive."""
        last: dict[Value, float] = {}
        for i, node in enumerate(nodes):
            last[node] = i
            last.update((x, i) for x in node._args if isinstance(x, Value))
        last.update(dict.fromkeys([*roots, *gradients], math.inf))
        for node in reversed(nodes):
            if node._prim is _fused and not self.blocked(node):
                last[node._params["chain"][-1]] = last[node]
            if type(node._data) is np.ndarray and not self.fills(node):
                for x in node._args:
                    if isinstance(x, Value):
                        last[x] = max(last[x], last[node])
        self.last = last
        self.dying = collections.defaultdict(list)
        for node, i in last.items():
            self.dying[i].append(node)
        counts = collections.Counter(gradients)
        self.handed_out = {g for g in gradients if counts[g] == 1} - set(roots)

    # --- names ---

    def bind(self, prefix: str, x) -> str:
        """A new name for something that stays."""
        name = f"{prefix}{next(self.number)}"
        self.space[name] = x
        if isinstance(x, np.ndarray):
            self.fixed[name] = x
        return name

    def name(self, x) -> str:
        """How the source calls an operand."""
        if type(x) is bool or (type(x) is float and math.isfinite(x)):
            return repr(x) if x >= 0 else f"({x!r})"
        key = x if isinstance(x, Array) else id(x)
        if key not in self.names:
            if isinstance(x, Array):
                name = self.names[key] = f"x{len(self.inputs)}"
                self.inputs[name], self.sections[name] = x, 0
            else:
                self.names[key] = self.bind("c", x)
        name = self.names[key]
        if self.section == 1 and self.sections.get(name) == 0:
            self.saved[name] = None
        return name

    def function(self, f: Callable) -> str:
        for module, prefix in ((np, "np"), (math, "math")):
            if getattr(module, getattr(f, "__name__", ""), None) is f:
                return f"{prefix}.{f.__name__}"
        if id(f) not in self.names:
            self.names[id(f)] = self.bind("f", f)
        return self.names[id(f)]

    def line(self, text: str) -> None:
        self.lines[self.section].append(text)

    def local(self, node: Value, expression: str) -> None:
        name = self.names[node] = f"t{next(self.number)}"
        self.sections[name] = self.section
        self.line(f"{name} = {expression}")

    def target(self, node: Value, reuse: Sequence = ()) -> str:
        """The buffer for a node's result: that of an operand whose last use this is, a spare or a new one."""
        shape, dtype = node.shape, node.dtype
        if node in self.handed_out:
            name = self.output(node)
            self.line(f"{name} = np.empty({shape}, np.{dtype.name})")
            return name
        for x in reuse:
            if isinstance(x, Value) and x in self.buffers and self.last[x] == self.place:
                if (x.shape, x.dtype) == (shape, dtype):
                    self.names[node], self.buffers[node] = self.names[x], self.buffers.pop(x)
                    return self.names[node]
        spare = self.spare[dtype, node.size]
        buffer = spare.pop() if spare else np.empty(node.size, dtype)
        self.names[node], self.buffers[node] = self.bind("b", buffer.reshape(shape)), buffer
        return self.names[node]

    def output(self, node: Value) -> str:
        """The name of an array that is new in every run."""
        name = self.names[node] = f"out{len(self.outputs)}"
        self.outputs.add(name)
        self.sections[name] = 1
        return name

    def write(self, node: Value, call: str, keyword: str = "", reuse: Sequence = ()) -> None:
        """A call, its last bracket open, into the node's buffer; what a leaf gets as its gradient is made anew."""
        if node in self.handed_out:
            self.line(f"{self.output(node)} = {call})")
        else:
            self.line(f"{call}, {keyword}{self.target(node, reuse)})")

    # --- lines ---

    @staticmethod
    def blocked(node: Value) -> bool:
        """Whether a fused chain is large enough to run in blocks, on all cores."""
        return (
            _config.enabled
            and node.size >= _config.min_elements_for_parallel
            and all([n._prim.builtin and n._prim.elementwise for n in node._params["chain"]])
            and all([not n._params and n.shape == node.shape for n in node._params["chain"]])
        )

    def parts(self, node: Value) -> tuple:
        """A fused chain is written out, unless it runs in blocks."""
        return (*node._params["chain"], node) if node._prim is _fused and not self.blocked(node) else (node,)

    def fused(self, node, *outside, chain):
        if not self.blocked(node):
            self.names[node] = self.names[chain[-1]]
            return
        outside = _outside(chain, object)
        places = {id(x): i for i, x in enumerate([*outside, *chain])}
        steps = tuple([(n._prim, tuple([places[id(x)] for x in n._args]), n.dtype) for n in chain])
        names = ", ".join([self.name(x) for x in outside])
        last = len(outside) + len(chain) - 1
        self.line(f"_blocks({self.bind('c', steps)}, [{names}], {node.shape}, [{last}], None, [{self.target(node)}])")

    def emitter(self, node: Value) -> Callable | None:
        """How an array comes about by calls of NumPy's: a method of this class, or None for `_evaluate`."""
        prim, a = node._prim, _raw(node._args[0])
        if type(node._data) is not np.ndarray or not _regular(node):
            return None
        if prim in _VIEWS and (not hasattr(a, "dtype") or (prim is _getitem and len(node._args) > 1)):
            return None
        found = self.EMITTERS.get(prim)
        plain = prim.elementwise and not node._params and (isinstance(prim.forward, np.ufunc) or prim.reads == "out")
        return found or (_Lowering.plain if plain else None)

    def fills(self, node: Value) -> bool:
        """Whether an array is written to a buffer of its own; what other primitives return may be a view."""
        prim = node._prim
        if prim is None or self.emitter(node) is None or prim is _detach:
            return False
        if prim is _fused:
            return self.blocked(node)
        return prim not in _VIEWS or (prim is _getitem and self.takes(node) is not None)

    @staticmethod
    def takes(node: Value) -> np.ndarray | None:
        """The places along the first axis that an index names, if it does nothing else; none of them negative."""
        index, shape = node._params["index"], node._params.get("shape") or np.shape(_raw(node._args[0]))
        if len(index) != 1 or not isinstance(index[0], np.ndarray) or index[0].dtype.kind != "i":
            return None
        return np.where(index[0] < 0, index[0] + shape[0], index[0])

    def emit(self, node: Value) -> None:
        emitter = self.emitter(node)
        if type(node._data) is not np.ndarray:
            self.local(node, self.number_of(node))
        elif emitter is None or emitter(self, node, *node._args, **node._params) is False:
            self.local(node, self.call(node))

    def plain(self, node, *args):
        names = [self.name(x) for x in args]
        self.write(node, f"{self.function(node._prim.forward)}({', '.join(names)}", "out=", args)

    def call(self, node: Value) -> str:
        """The forward of a primitive on whatever operands and parameters it has."""
        prim, names = node._prim, [self.name(x) for x in node._args]
        if not prim.builtin:  # code that is not ours may keep what it gets
            names = [f"{name}.copy()" if name in self.fixed and name.startswith("b") else name for name in names]
        names = "".join([f"{name}, " for name in names])
        if prim is _rule:
            return f"{self.bind('f', functools.partial(_rule.forward, **node._params))}({names})"
        call = f"_evaluate({self.bind('f', prim)}, ({names}), {self.bind('c', node._params)})"
        if type(node._data) is np.ndarray and (prim is _getitem or not prim.builtin):  # its shape may be another
            return f"_as_before({call}, {node.shape}, {self.bind('c', node.dtype)})"
        return call

    def number_of(self, node: Value) -> str:
        """An expression for a 0-d result: plain arithmetic where Python's is that of the engine."""
        prim, args, params = node._prim, node._args, node._params
        if not _regular(node):
            return self.call(node)
        kinds, names = {type(_raw(x)) for x in args}, list(map(self.name, args))
        if prim is _dot and len(args) < 100:
            end = 2 * params["products"]
            return " + ".join([*map("{} * {}".format, names[:end:2], names[1:end:2]), *names[end:]])
        if not params and np.ndarray not in kinds:
            if prim.forward in _INFIX:
                return _INFIX[prim.forward].format(*names)
            if kinds == {float} and prim.scalar:
                return f"{self.function(prim.scalar)}({', '.join(names)})"
            if isinstance(node._data, np.generic) and isinstance(prim.forward, np.ufunc):
                return f"{self.function(prim.forward)}({', '.join(names)})"
        if prim is _as_dtype and params["dtype"] is float:
            return f"float({names[0]})"
        if prim is _detach:
            return names[0]
        if kinds == {np.ndarray}:
            if prim is PRIMITIVES["sum"]:
                return f"np.add.reduce({names[0]}, None)"
            if prim is TABLE[np.matmul]:
                return f"{names[0]}.dot({names[1]})"
            if prim is _reshape:
                return f"{names[0]}.reshape(())[()]"
            if prim is _getitem and all(type(i) is int for i in params["index"]):
                return f"{names[0]}[{', '.join(map(str, params['index']))}]"
        return self.call(node)

    def view(self, node, a, **params):
        """A view of what is always the same array is made now, and costs nothing in a run."""
        prim, name = node._prim, self.name(a)
        base = self.fixed.get(name)
        if base is not None:
            view = prim.forward(base, **params)
            if np.may_share_memory(view, base):
                self.names[node] = self.bind("b", view)
                return None
        if prim is _reshape:
            return self.local(node, f"{name}.reshape({node.shape})")
        if prim is _TRANSPOSE:
            axes = params.get("axes")
            axes = range(node.ndim)[::-1] if axes is None else [int(i) % node.ndim for i in axes]
            return self.local(node, f"{name}.transpose({', '.join(map(str, axes))})")
        return False if prim is _getitem else self.local(node, f"np.broadcast_to({name}, {node.shape})")

    def getitem(self, node, a, index):
        if (places := self.takes(node)) is None:
            return self.view(node, a, index=index)
        a, c = self.name(a), self.bind("c", places)
        self.line(f"np.take({a}, {c}, 0, {self.target(node)}, 'clip')")  # with 'raise', take would make a copy

    def detach(self, node, a):
        self.names[node] = self.name(a)

    def matmul(self, node, x, y):
        matrices = np.ndim(_raw(x)) <= 2 >= np.ndim(_raw(y))
        x, y = self.name(x), self.name(y)
        self.write(node, f"{x}.dot({y}" if matrices else f"np.matmul({x}, {y}")

    def sum(self, node, a, axis=None, keepdims=False):
        name = self.name(a)
        if np.ndim(_raw(a)) == 2 and axis in (0, (0,)) and not keepdims:
            ones = self.name(_ones(np.shape(_raw(a))[0], node.dtype))
            self.write(node, f"{ones}.dot({name}")  # BLAS sums rows faster than NumPy's reduce
        else:
            axis = tuple(map(int, axis)) if isinstance(axis, tuple) else axis if axis is None else int(axis)
            self.line(f"np.add.reduce({name}, {axis}, None, {self.target(node)}, {bool(keepdims)})")

    def where(self, node, condition, x, y):
        names = [self.name(a) for a in (condition, x, y)]
        out = self.target(node)
        self.line(f"np.copyto({out}, {names[2]}, 'unsafe'); np.copyto({out}, {names[1]}, 'unsafe', {names[0]})")

    def astype(self, node, a, dtype):
        a = self.name(a)
        self.line(f"np.copyto({self.target(node)}, {a}, 'unsafe')")

    def joined(self, node, *arrays, axis=0):
        names = "".join([f"{self.name(a)}, " for a in arrays])
        self.line(f"np.{node._prim.name}(({names}), {int(axis)}, {self.target(node)})")

    def pack(self, node, *numbers, shape, dtype):
        if all(_is_input(x) and type(x._data) is float for x in numbers):
            values = f"[x._data for x in {self.bind('c', numbers)}]"  # their data is read here, not as inputs
        else:
            values = ", ".join([self.name(x) for x in numbers])
        name = self.target(node)
        flat = self.bind("b", self.fixed[name].reshape(-1)) if name in self.fixed else name
        self.line(f"{flat}[:] = {values}")

    def scatter(self, node, a, *parts, shape, index):
        places = self.takes(node)
        unique = all(i is None or i is Ellipsis or type(i) is int or isinstance(i, slice) for i in index)
        if not unique and (parts or places is None or len(np.unique(places)) < places.size):
            return False
        a, out = self.name(a), self.target(node)
        self.line(f"{out}.fill(0)")
        self.line(f"{out}[{self.bind('c', index)}] = {a}")

    def dot(self, node, *terms, products):
        if products:
            return False
        names = [self.name(x) for x in terms]
        out = self.target(node)
        self.line(f"np.add({names[0]}, {names[1]}, out={out})")
        for name in names[2:]:
            self.line(f"np.add({out}, {name}, out={out})")

    EMITTERS = {
        **dict.fromkeys((_reshape, _TRANSPOSE, _BROADCAST), view),
        **dict.fromkeys((_concatenate, _stack), joined),
        **{_getitem: getitem, _detach: detach, _scatter: scatter, _pack: pack, _dot: dot, _fused: fused},
        **{TABLE[np.matmul]: matmul, PRIMITIVES["sum"]: sum, _WHERE: where, _as_dtype: astype},
        TABLE[np.copy]: lambda self, node, a: self.astype(node, a, None),
    }

    def finish(self, roots, gradients):
        """Heads and tails of the two functions, their source, and the functions."""
        self.section = 1
        handed = []
        for g in gradients:
            name = self.name(g)
            if type(g._data) is np.ndarray and (name not in self.outputs or name in handed):
                name = f"np.array({name})"  # a leaf owns its gradient
            handed.append(name)
        self.section = 0
        results = [f"np.array({self.name(r)})" if type(r._data) is np.ndarray else self.name(r) for r in roots]
        head = []
        for name, x in self.inputs.items():
            source = self.bind("i", x)
            head.append(f"{name} = {source}._data")
            if type(x._data) is np.ndarray:
                wrong = f"type({name}) is not _array or {name}.shape != {x.shape}"
                head.append(f"if {wrong}: {name} = _checked({source}, {x.shape})")
            elif isinstance(x._data, np.generic):
                head.append(f"if {name}.shape != (): _checked({source}, ())")
        self.space |= {"_array": np.ndarray, "_checked": _checked, "_blocks": run_blocks}
        saved = "".join(f"{name}, " for name in self.saved)

        def body(lines):
            return "".join(f"    {line}\n" for line in lines)

        self.source = (
            f"def forward():\n{body(head)}{body(self.lines[0])}"
            f"    return ({''.join(f'{r}, ' for r in results)}), ({saved})\n\n\n"
            f"def backward(seed, saved):\n{body([f'{saved[:-1]} = saved'] if saved else [])}"
            f"{body(self.lines[1])}    return [{', '.join(handed)}]\n"
        )
        exec(compile(self.source, "<optimized>", "exec"), self.space)
        # Out of the namespace, which they hold: nothing is in a cycle, and a program that is dropped is gone.
        self.functions = self.space.pop("forward"), self.space.pop("backward")


class _Resized(Exception):
    """What a program was made for has another shape or type now; the graph that was traced has none to be wrong."""


def _as_before(x, shape: tuple, dtype: np.dtype) -> np.ndarray:
    """A result whose shape may depend on data, if it has the one that it had."""
    if type(x) is not np.ndarray or x.shape != shape or x.dtype != dtype:
        raise _Resized
    return x


class _ShapeChanged(ValueError):
    """A leaf's data no longer has the shape that a program was made for."""


def _checked(x: Array, shape: tuple) -> np.ndarray:
    """The array of an input, which must have the shape that it had."""
    if x.shape != shape:
        label = f" {x.label!r}" if getattr(x, "label", "") else ""
        raise _ShapeChanged(
            f"optimize: {type(x).__name__}{label} had shape {shape} when the graph was optimized, and now has "
            f"{x.shape}; build and optimize the graph anew for another shape"
        )
    raw = _public(x._data)
    if type(raw) is not np.ndarray:
        raise _Resized
    return raw


# --- programs ---

_merge_masks = functools.partial(merge_common, swept=False)  # and what else has no gradient, before the sweep
PASSES = (fold_constants, _merge_masks, flatten, batch, simplify, _merge_masks)
JOINT_PASSES = (fold_constants, simplify, simplify, merge_common, reduce_products)  # of values and gradients together


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """The opposite of `no_grad`: a program is made, and goes on, as otherwise."""
    before, _mode.recording = _mode.recording, True
    try:
        yield
    finally:
        _mode.recording = before


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """While a graph is rewritten: arrays are plain in this thread, and arithmetic on examples warns of nothing."""
    before, _mode.tracing = _mode.tracing, True
    try:
        with _recording(), np.errstate(all="ignore"):
            yield
    finally:
        _mode.tracing = before


_PARTS: dict[Primitive, Callable] = {  # what is one operation to save time and memory, as several
    _dense: lambda x, w, b, activation=None: activation(x @ w + b) if activation else x @ w + b,
    _mse: lambda x, y: np.mean(np.square(np.subtract(x, y))),
}


def _traced(roots: Sequence[Value]) -> list[Value]:
    """A copy of the graph, with the programs in it written out as the graphs that they were made of."""
    programs: dict[_Program, list[Value]] = {}

    def rule(node, args):
        if node._prim in _PARTS and _regular(node):
            parts = _PARTS[node._prim](*args, **node._params)
            return _twin(node, parts._prim, parts._args, parts._params)
        if node._prim is not _program:
            return _twin(node, node._prim, args, node._params)
        program, index = node._params.values()
        if program not in programs:
            programs[program] = _replayed(program.traced)
        return programs[program][index]

    return _rewrite(roots, rule)


class _Program:
    """A graph made to run again and again: its values by `forward`, then the gradients of one root by `backward`.

    `traced` is a copy of the graph it was made of, and `graph` what the passes made of that; both without data. `graph`
    is replayed where arithmetic on Python floats raises though IEEE arithmetic has an answer, and where there is too
    much of it to be compiled; `traced`, once sizes turn out to depend on data.
    """

    def __init__(self, roots: Sequence[Value]):
        self.lock = threading.RLock()
        with _tracing():
            graph = self.traced = _traced(roots)
            nodes = _oldest_first(self.traced)
            for node in nodes:
                for x in (node, *node._args):
                    if isinstance(x, Array) and type(x._data) is Chunked:
                        x._data = x._data.expose()  # the passes look at arrays
            self.foreign = any(_lazy(node._data) for node in nodes)
            for apply in PASSES:
                graph = apply(graph)
            self.graph = [x if isinstance(x, Value) else _node(x, _detach, (x,), _NO_PARAMS) for x in graph]
        reach, leaves = _reach(self.traced), [node for node in nodes if node._prim is None]
        # By root: the leaves that get a gradient from it, and all leaves, those first.
        self.reached = [{x for x in leaves if reach[x] >> i & 1} for i in range(len(roots))]
        self.leaves = [sorted(leaves, key=lambda x, reached=reached: x not in reached) for reached in self.reached]
        self.results = [_settle(np.array(x)) if isinstance(x, np.ndarray) else x for x in (r._data for r in roots)]
        self.compiled: dict[int, _Compiled | None] = {}  # by root
        self.state: tuple | None = None  # (root, what its backward needs) of the last forward
        self.swept: dict[tuple, dict] = {}  # gradients that an eager sweep is about to fetch, by root and thread
        self.nodes: list[weakref.ref] = []  # the Values that show the results
        self.current = next((i for i, root in enumerate(self.graph) if root._needs), 0)
        self.compile(self.current, self.graph)
        for node in {*nodes, *_oldest_first(self.graph)}.difference(leaves):
            node._data = None

    def compile(self, index: int, graph: Sequence | None = None) -> _Compiled | None:
        """The code for the gradients of one root; None if it is to be replayed."""
        if index not in self.compiled:
            graph = graph or _replayed(self.graph)  # the rules run on real data: an inverse of zeros would fail
            self.compiled[index] = self.lowered(graph, index)
        return self.compiled[index]

    def lowered(self, graph: Sequence, index: int) -> _Compiled | None:
        nodes, reached = _oldest_first(graph), self.reached[index]
        if self.foreign or len(nodes) > _MAX_LINES:
            return None
        with _tracing():
            graph = seal(graph)
            root, nodes = graph[index], _oldest_first(graph)
            seed = _leaf(_filled_like(root._data, 1))
            packs = {node for node in nodes if node._prim is _pack and all(_is_input(x) for x in node._args)}
            try:
                gradients = _backpropagate(root, seed, packs, False, True) if root._needs else {}
            except Exception:  # a rule fails on these data, as it would in eager mode: in `backward`, if that is called
                return None
            targets = [x for x in gradients if x is not seed and (x in reached or x in packs)]
            joint = [*graph, *(gradients[x] for x in targets)]
            for apply in JOINT_PASSES:
                joint = apply(joint)
            if _config.enabled:
                joint = fuse(joint)
            joint = [x if isinstance(x, Value) else _node(x, _detach, (x,), _NO_PARAMS) for x in joint]
            lowering = _Lowering(joint[: len(graph)], seed, joint[len(graph) :])
        targets = [x if x in reached else _Packed(x._args, reached) for x in targets]
        return _Compiled(*lowering.functions, lowering.source, targets)

    def run(self, index: int) -> tuple:
        """The results from the current data of leaves and Tensors, and what the gradients of one root need: locals of
        the code, or the graph with its data."""
        code = self.compiled.get(index) or self.compile(index)
        if code is not None:
            try:
                return code.forward()
            except _Resized:
                self.graph = self.traced
                self.compiled = dict.fromkeys(range(len(self.graph)))
            except _ShapeChanged:
                raise
            except (ArithmeticError, ValueError):
                pass
        graph = _replayed(self.graph)
        return [root._data for root in graph], graph

    def forward(self) -> None:
        """Computes the roots from the current data of leaves and Tensors."""
        with self.lock:
            self.state = None
            results, saved = self.run(self.current)
            self.state = self.current, saved
            self.show(results)

    def show(self, results: Sequence) -> None:
        self.results = results
        for ref in self.nodes:
            if (node := ref()) is not None:
                node._data = results[node._params["index"]]

    def backward(self, index: int, seed) -> list[tuple[Value, Any]] | dict[Value, Any]:
        """The gradients of leaves: of code as pairs, to be added up; of a replay as a dict. Results do not change."""
        with self.lock:
            state, self.state, self.current = self.state, None, index  # buffers are used up
            saved = state[1] if state is not None and state[0] == index else self.run(index)[1]
            if type(saved) is tuple:
                code, seed = self.compiled[index], seed.expose() if type(seed) is Chunked else seed
                try:
                    return _unpacked(code.targets, code.backward(seed, saved))
                except (ArithmeticError, ValueError, _Resized):
                    saved = _replayed(self.graph)
            root = saved[index]
            found = _at_home(_backpropagate(root, seed, retain=False), root)
            if self.foreign:  # the root may be computed by now
                self.show([root._data for root in saved])
            return {node: g for node, g in found.items() if node in self.reached[index]}

    def gradients(self, index: int, g) -> dict[Value, Any]:
        """The gradients of a root's leaves, as numbers and arrays, or as Values by the graph that was traced."""
        if isinstance(g, Value):
            return _backpropagate(_replayed(self.traced)[index], g, self.reached[index], False, True)
        new, found = self.backward(index, g), {}
        for x, h in new.items() if type(new) is dict else new:
            found[x] = found[x] + h if x in found else h
        return found

    def picture(self, index: int) -> Value:
        """What the graph of a root became, with its current data, to be drawn."""
        with self.lock, _tracing():
            root = _rewrite(fuse([_replayed(self.graph)[index]]), _pictured)[0]
            return _twin(root, root._prim, root._args, root._params)

    def __reduce__(self):
        return _retraced, (self.traced,)

    @property
    def source(self) -> str:
        code = self.compile(self.current)
        why = "its arrays are computed by another library" if self.foreign else "not to be compiled"
        return code.source if code else f"# {why}: replayed node by node\n"


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The code of a program, and what its gradients belong to: leaves, and numbers in one array."""

    forward: Callable
    backward: Callable
    source: str
    targets: list


def _retraced(roots) -> _Program:
    return _Program([root.forward() for root in roots])


def _unpacked(targets: Sequence, gradients: Sequence) -> list[tuple[Value, Any]]:
    """The pairs of leaf and gradient, one for each number of a pack that is a leaf's."""
    pairs: list = []
    for target, g in zip(targets, gradients):
        if isinstance(target, Value):
            pairs.append((target, g))
        elif target.weak:
            pairs += zip(target.leaves, g.reshape(-1)[target.places].tolist())
        else:
            pairs += [(x, _fit(h, x._data)) for x, h in zip(target.leaves, g.reshape(-1)[target.places])]
    return pairs


class _Packed:
    """Leaves that are numbers of a pack, and their places in it."""

    def __init__(self, numbers: Sequence, reached: set):
        self.places = [i for i, x in enumerate(numbers) if x in reached]
        self.leaves = [numbers[i] for i in self.places]
        self.weak = all(type(x._data) is float for x in self.leaves)
        if len(self.places) == len(numbers):
            self.places = slice(None)


def _is_input(x) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, Value) and x._prim is None)


def _program_i(i, g, out, leaves, program, index):
    key, n = (index, threading.get_ident()), len(program.reached[index])
    if i >= n:
        return None
    if i == 0:  # one sweep serves all leaves
        program.swept[key] = program.gradients(index, g)
    found = program.swept.pop(key) if i == n - 1 else program.swept[key]
    return found.get(program.leaves[index][i])


def _program_forward(*leaves, program, index):
    program.forward()
    return program.results[index]


_program = primitive(_program_forward, _program_i, name="program", variadic=True)
_program.builtin = True


def _pictured(node: Value, args: tuple) -> Value:
    """A node as it is drawn: numbers that were packed are one leaf, and a fused chain is called by its formula."""
    if node._prim is _pack:
        leaf = _leaf(node._data)
        leaf.label = f"{node.size} numbers"
        return leaf
    if node._prim is not _fused:
        return _renewed(node, args)
    named = _unregistered("fused", _run_chain, (_chain_i,), _fused)
    named.symbol = _formula(node._params["chain"])
    return _twin(node, named, args)


class Optimized(Value):
    """What `optimize` returns: a Value whose `forward` and `backward` run a program over the leaves."""

    __slots__ = ()

    @property
    def source(self) -> str:
        """The program, as Python."""
        return self._params["program"].source

    def forward(self) -> Value:
        self._params["program"].forward()
        return self

    def backward(self, gradient: Any = None, retain_grads: bool = True) -> None:
        """Adds the gradient of this Value to the `.grad` of the leaves; see `Value.backward`."""
        seed = self._seed(gradient)
        program, index = self._params.values()
        new = program.backward(index, seed)
        if type(new) is dict:
            for x, g in _deposited(new).items():
                x._grad = g
        else:  # what code makes is no other's
            for x, g in new:
                x._grad = g if x._grad is None else x._grad + g
        self._grad = seed if retain_grads else None

    def _picture(self) -> Value:
        return self.graph

    @property
    def graph(self) -> Value:
        """What the graph became, with its current data: a copy to look at, which `draw` shows."""
        root = self._params["program"].picture(self._params["index"])
        root.label, root._grad = self.label, self._grad
        return root

    def __copy__(self):
        twin = _optimized(*self._params.values(), None if self._grad is None else _owned(self._grad), self.label)
        twin._data = _owned(self._data)
        return twin

    def __reduce__(self):
        return _optimized, (*self._params.values(), self._grad, self.label)


def _optimized(program: _Program, index: int, grad=None, label: str = "") -> Optimized:
    node, data = _new(Optimized), program.results[index]
    # In a graph, an empty array beside leaves that are numbers: so its result is taken as it is, and not for a number.
    strong = () if type(data) in _WEAK_TYPES else (np.empty(0, np.float32),)
    node._data, node._grad, node._prim = data, grad, _program
    node._x, node._y = (*program.leaves[index], *strong), {"program": program, "index": index}
    node._needs, node._number, node.label = program.traced[index]._needs, _next_number(), label
    program.nodes.append(weakref.ref(node))
    return node


def optimize(*roots: Value) -> Any:
    """Turns the graph that Values were computed by into one short program; returns Values that run it (one for one
    root, a tuple for more).

    A result has the value of its root. Its `.forward()` computes all results anew from the leaves' and Tensors' current
    data, its `.backward()` adds to the leaves' `.grad`, and what its `.data` handed out is never overwritten. It draws,
    as what the graph became; it nests in further expressions, pickles, and can be optimized again. Values and gradients
    are the eager ones up to rounding. `.source` is the program.

    A trace holds what happened when the graph was built: Python's own branches and loops on values are frozen. Shapes
    of leaves and Tensors may not change: ValueError names the leaf. Gradients are those at the data of the last
    forward: where data changed since, as in eager mode, they are undefined, and a second backward may see the change.

        >>> w = Value(2.0, label="w")
        >>> loss = optimize((w * 3.0 - 1.0) ** 2)
        >>> w.data = 1.0
        >>> loss.forward().backward()
        >>> print(loss.data, w.grad)
        4.0 12.0
    """
    if not roots:
        raise TypeError("optimize: expected at least one root, got none")
    if _mode.depth:
        raise TypeError("optimize: not inside a function that is being differentiated; optimize what its graph became")
    for root in roots:
        if not isinstance(root, Value):
            raise TypeError(f"optimize: every root must be a Value, got {type(root).__name__}")
    program = _Program(roots)
    results = tuple([_optimized(program, i, label=root.label) for i, root in enumerate(roots)])
    return results[0] if len(results) == 1 else results


# ---------------------------------------------------------------------------------------------------------------------
# 10. Elsewhere
#
# Arrays of other libraries that speak NumPy's protocols, such as Dask's, so that graphs go beyond one machine. In: a
# type that nobody knows, asked of `KINDS.finders`. Out: its kind; nothing is imported. Such an array is a raw value as
# it is, and primitives and their rules run on it by NumPy's dispatch.
# Invariant: a pass over Dask's chunks runs only when somebody asks for numbers (`backward` for all gradients that
# belong to leaves in NumPy, in one; item, printing, bool), and what a library does not offer is a TypeError before.
#
#     >>> import dask.array as da
#     >>> w = Value(np.ones(3))
#     >>> loss = (da.ones((4, 3), chunks=2) @ w).mean()  # nothing is computed yet
#     >>> loss.backward()  # one pass, for the gradient and the loss
#     >>> print(w.grad.data, loss)
#     [1. 1. 1.] Value(data=3.0, grad=1.0, op='mean')
# ---------------------------------------------------------------------------------------------------------------------


class _OfThisThread(type):
    def __subclasscheck__(cls, category):
        return getattr(_asking, "lazily", False) and issubclass(category, FutureWarning)


class _NotOffered(FutureWarning, metaclass=_OfThisThread):
    """As the category of a filter: any FutureWarning in a thread that is in `_lazily`, and no other thread's."""


_asking = threading.local()


@contextlib.contextmanager
def _lazily(name: str, x) -> Iterator[None]:
    """Within it, an operation on foreign arrays such as x fails if their library does not offer what it needs.

    Dask warns in that case, then computes the whole array in this process. Filters of warnings are the whole process's,
    and so may not be put back while other threads do the same: this one stays, and means nothing outside.
    """
    if not warnings.filters or warnings.filters[0][2] is not _NotOffered:
        warnings.simplefilter("error", _NotOffered)
    before, _asking.lazily = getattr(_asking, "lazily", False), True
    try:
        yield
    except (FutureWarning, NotImplementedError, AttributeError) as error:
        raise _not_offered(name, x) from error
    finally:
        _asking.lazily = before


def _library(x) -> str:
    """What a foreign array is called in messages."""
    return ".".join(type(x).__module__.split(".")[:2])


def _not_offered(name: str, x) -> TypeError:
    return TypeError(f"{name}: {_library(x)} does not offer it, or not in this form; compute the operands first")


def _known_shape(x, who):
    """x, a foreign array, if its shape is known."""
    if any(n != n for n in x.shape):
        raise ValueError(f"{who}: unknown shape {x.shape}; call compute_chunk_sizes() on the {_library(x)} first")
    return x


def _put_foreign(a, shape, index):
    """`_put` of an array of another library, which may not offer assignment: zeros around it."""
    index = [i for i in index if i is not None]
    for at in [k for k, i in enumerate(index) if i is Ellipsis]:
        index[at : at + 1] = [slice(None)] * (len(shape) - len(index) + 1)
    ends = []
    for n, i in itertools.zip_longest(shape, index, fillvalue=slice(None)):
        if not isinstance(i, (slice, int, np.integer)) or (isinstance(i, slice) and i.indices(n)[2] != 1):
            raise TypeError(f"getitem: on {_library(a)}, only integers and slices of step 1 have a gradient, got {i!r}")
        start, stop, _ = i.indices(n) if isinstance(i, slice) else (i % n, i % n + 1, 1)
        ends.append((start, max(start, stop)))
    if not math.prod(a.shape):
        return np.zeros_like(a, shape=shape)
    block = np.reshape(a, tuple(stop - start for start, stop in ends))
    return np.pad(block, [(start, n - stop) for n, (start, stop) in zip(shape, ends)])


class _Elsewhere(Kind):
    """The kind of arrays of other libraries."""

    rank, lazy = 3, True

    def enter(self, data, dtype, choice, who):
        return self.own(_known_shape(data if dtype is None else data.astype(dtype), who))

    def constant(self, x, who):
        if x.dtype.kind not in "fiub":
            raise TypeError(f"{who}: operands must be real numbers, got an array of dtype {x.dtype}")
        return _known_shape(x, who)

    def evaluate(self, prim, raw, params):
        foreign = next(x for x in raw if KINDS[type(x)] is self)
        raw = [x if KINDS[type(x)] in (self, WEAK) else _fetched(x) for x in raw]
        if prim.name == "scatter":
            return _put_foreign(raw[0], params["shape"], _filled(params["index"], raw[1:]))
        if prim.name == "copy":
            return self.own(foreign)
        # NumPy would compute a foreign index into its own array; Dask's Cholesky factor is the upper one.
        if prim.name == "cholesky" or ("index" in params and KINDS[type(raw[0])] is not self):
            raise _not_offered(prim.name, foreign)
        if prim.name == "matmul" and np.shape(raw[0])[-1:] != np.shape(raw[1])[-2:][:1]:  # Dask repeats a row
            raise ValueError(f"matmul: shapes {np.shape(raw[0])} and {np.shape(raw[1])} do not match")
        with _lazily(prim.name, foreign):
            out = prim.forward(*(raw if prim.ufunc else _strengthened(prim, raw)), **params)
        if KINDS[type(out)] is not self:
            raise _not_offered(prim.name, foreign)
        if prim.name in ("matmul", "einsum", "inv") and foreign.dtype.kind in "fb":  # Dask's sums of masks are integers
            out = out.astype(np.result_type(*[dtype for _, dtype in _strong(prim, raw)]))
        return _known_shape(out, prim.name)

    def fetch(self, raws):
        lazy = [x for x in raws if hasattr(x, "__dask_graph__")]
        done = iter(sys.modules["dask"].compute(*lazy, traverse=False) if lazy else ())  # one pass for all
        return [_settle(np.array(next(done) if hasattr(x, "__dask_graph__") else x)) for x in raws]

    def own(self, raw):
        return raw.copy() if hasattr(raw, "copy") else raw  # Dask's can be assigned to; a copy shares its chunks

    def shared(self, raw):
        return True

    def write(self, raw, new):
        return new.astype(raw.dtype)

    def guard(self, name, raw):
        return _lazily(name, raw)

    def rule(self, prim, rule):
        def checked(*args, **params):
            variadic = isinstance(args[0], int)
            g, *rest = map(_raw, (*args[1:3], *args[3]) if variadic else args)
            foreign = next(x for x in (g, *rest) if KINDS.get(type(x)) is self)
            with _lazily(prim.name, foreign):
                h = rule(*args, **params)
            if h is not None and foreign is g and not _lazy(h):
                raise _not_offered(prim.name, foreign)
            return h

        return checked

    def text(self, raw):
        return f", chunksize={raw.chunksize}" if hasattr(raw, "chunksize") else ""


def _foreign_kind(cls: type) -> Kind | None:
    """The kind of a type that takes part in NumPy's functions."""
    protocols = "__array_function__", "__array_ufunc__", "shape", "dtype"
    return ELSEWHERE if all(getattr(cls, name, None) is not None for name in protocols) else None


ELSEWHERE = _Elsewhere()
KINDS.finders.append(_foreign_kind)


def _in_a_task(self):
    """What Dask asks of all that becomes part of its own graph, where functions know nothing of gradients."""
    part = ".data.data" if isinstance(self, Value) else ".data"
    raise TypeError(
        f"a {type(self).__name__} does not go into a graph of Dask's, which would lose its gradient: "
        f"use operators or NumPy's functions (np.maximum, not da.maximum), or take {part} for the numbers"
    )


Array.__dask_tokenize__ = _in_a_task
Array.__dask_graph__ = lambda self: _in_a_task(self) if _lazy(self) else None  # asked before it would be looked into
