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
import contextvars
import copy
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
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

# What checkers of types are asked here: no more where this file lies beside a program that is checked strictly, and not
# that a name keeps one type, or that what NumPy's functions give for Values is what NumPy's annotations say.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-any-generics, allow-subclassing-any
# mypy: allow-untyped-decorators, allow-untyped-globals, no-check-untyped-defs, no-warn-return-any, implicit-reexport
# mypy: no-strict-equality, no-warn-unused-ignores, no-extra-checks, no-warn-redundant-casts
# mypy: disable-error-code="assignment,misc,override,return-value,call-overload,var-annotated,has-type,arg-type,index"
# mypy: disable-error-code="no-redef,dict-item,union-attr,import-not-found,no-overload-impl,annotation-unchecked"
# mypy: disable-error-code="import-untyped"
# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportRedeclaration=false, reportOptionalIterable=false
# pyright: reportNoOverloadImplementation=false, reportMissingImports=false, reportFunctionMemberAccess=false

__version__ = "2.0"
__all__ = ["Value", "Tensor", "no_grad", "set_default_dtype", "primitive", "PRIMITIVES", "TABLE"]
__all__ += ["grad", "value_and_grad", "elementwise_grad", "jacobian", "hessian", "vjp", "jvp", "hvp", "ravel_nest"]
__all__ += ["checkpoint", "find_nonfinite", "check_gradients"]
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
# `TABLE` maps NumPy's callables to primitives, or, where an operation is a composition of others, to a function; and a
# primitive to what computes it with more keywords than it takes itself, such as where=.
# ---------------------------------------------------------------------------------------------------------------------

TABLE: dict[Any, Any] = {}  # NumPy callable -> Primitive, or a function composed of primitives
PRIMITIVES: dict[str, Primitive] = {}  # by name: pickles find their primitives here, and the tests their rules


class Primitive:
    """One operation: `forward`, a rule per operand, and what the rest of the engine wants to know about it.

    Calling it dispatches: with a Value among the operands it makes a node, with a Tensor a Tensor, else it computes.
    """

    __slots__ = "name symbol forward vjps reads scalar elementwise operands params typed ufunc joint builtin".split()
    name: str
    symbol: str
    forward: Any
    vjps: Any
    reads: str
    scalar: Any
    elementwise: bool
    operands: Any
    params: Any
    typed: Any
    ufunc: bool
    joint: bool
    builtin: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operands = args
        if self.operands is not None and (kwargs or len(args) != len(self.operands)):
            operands, kwargs = self._bind(args, kwargs)
        return _apply(self, operands, kwargs)

    def _bind(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Sorts a call's arguments into operands and parameters."""
        names = self.operands + self.params
        if len(args) > len(names):
            raise TypeError(f"{self._signature()}; got {len(args)} arguments")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise TypeError(f"{self._signature()}; argument {name!r} is not supported")
            if name in given:
                raise TypeError(f"{self._signature()}; argument {name!r} came twice")
            given[name] = value
        given = {name: _python_numbers(x) for name, x in given.items()}  # such as an axis
        missing = [name for name in self.operands if name not in given]
        if missing:
            raise TypeError(f"{self._signature()}; argument {missing[0]!r} is missing")
        operands = tuple(given.pop(name) for name in self.operands)
        for name, x in given.items():
            if isinstance(x, Array):
                raise TypeError(f"{self.name}: argument {name!r} is no operand, and takes no {type(x).__name__}")
        return operands, given

    def _signature(self) -> str:
        """What errors in a call say that it takes; NumPy's functions are called as people type them."""
        home = getattr(self.forward, "__module__", None) or ""
        typed = f"{home.replace('numpy', 'np')}.{self.name}" if home.startswith("numpy.") else self.name
        return f"{typed}: takes {', '.join(self.operands + self.params)} on a Value or Tensor"

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
    """NumPy's integers and truths as Python's own, also in a tuple or in an array of no dimensions."""
    if type(x) is tuple:
        return tuple(map(_python_numbers, x))
    alone = type(x) is np.ndarray and not x.ndim and x.dtype.kind in "iub"
    return x.item() if alone or isinstance(x, (np.integer, np.bool_)) else x


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
    names = _argument_names(next((rule for rule in vjps if rule), None))[4 if variadic else 2 :]
    names = names or _argument_names(forward)
    new.operands = None if variadic else (names or ("x", "y", "z"))[: len(vjps)]
    params = names if variadic else names[len(vjps) :]
    new.params = tuple(name for name in params if name not in ("out", "where", "return_indices"))
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
destination k offset n order kind stable keepdims ord mode constant_values copy nan posinf neginf optimize obj num
endpoint indexing deg""".split()
)


def _since(name: str) -> list[Callable]:
    """NumPy's function of that name, if this NumPy is new enough to have it."""
    return [getattr(np, name)] if hasattr(np, name) else []


def _members(*args) -> list:
    """Arguments, and what is in those that are lists or tuples, at any depth."""
    return [y for x in args for y in (_members(*x) if isinstance(x, (list, tuple)) else (x,))]


def _recorded(x):
    """An argument with its Tensors as nodes."""
    if isinstance(x, (list, tuple)):
        return [_recorded(i) for i in x]
    return _record(_detach, (x,)) if isinstance(x, Tensor) else x


def _matmul(x, y):
    """`np.matmul`; with a matrix on the right by the method dot, which gets to BLAS in half the time, and with all of a
    batch at once. But one number times a matrix that does by what skips zeros, and with them nan and infinity."""
    if not (type(x) is type(y) is np.ndarray and y.ndim == 2 <= x.ndim and x.size > 1 < y.size):
        return np.matmul(x, y)
    if x.ndim == 2:
        return x.dot(y)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).dot(y).reshape(*x.shape[:-1], y.shape[1])


def _power(x, y, out=None):
    """`np.power`; of floating arrays with the usual exponents by products and roots, many times as fast, and within two
    units in the last place. A root of -inf is nan, a power of it is not: if there may be one, NumPy computes."""
    form = _POWERS.get(y) if type(y) in _WEAK_TYPES and type(x) is np.ndarray and x.dtype.kind == "f" else None
    if form is None or (y % 1.0 and not x.min(initial=0.0) > -np.inf):
        return np.power(x, y, out)
    if out is None or np.may_share_memory(x, out):
        made = form(x, np.empty(x.shape, x.dtype) if 0 in x.strides else np.empty_like(x))
        return made if out is None else np.positive(made, out)
    return form(x, out)


_POWERS = {  # exponent: the power of x, written to t
    1.0: np.positive,
    2.0: np.square,
    3.0: lambda x, t: np.multiply(np.square(x, t), x, t),
    4.0: lambda x, t: np.square(np.square(x, t), t),
    -1.0: lambda x, t: np.divide(1.0, x, t),
    -2.0: lambda x, t: np.square(np.divide(1.0, x, t), t),
    -3.0: lambda x, t: np.divide(np.divide(np.divide(1.0, x, t), x, t), x, t),
    0.5: lambda x, t: np.sqrt(np.add(x, 0.0, t), t),  # of -0.0 it is 0.0
    1.5: lambda x, t: np.multiply(np.sqrt(x, t), x, t),
    -0.5: lambda x, t: np.divide(1.0, np.sqrt(np.add(x, 0.0, t), t), t),
    -1.5: lambda x, t: np.divide(np.divide(1.0, np.sqrt(x, t), t), x, t),
}


# Python's operators: forward -> (special method, symbol, form on Python floats).
_OPERATORS = {
    np.add: ("add", "+", operator.add),
    np.subtract: ("sub", "-", operator.sub),
    np.multiply: ("mul", "*", operator.mul),
    np.divide: ("truediv", "/", operator.truediv),
    _power: ("pow", "**", math.pow),
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

    def update(self, prim: Primitive, raw, y) -> bool:
        """In place: gives raw the result of a ufunc on it and a number, or raw value of its shape; whether it did."""
        if type(raw) is not np.ndarray:
            return False
        prim.forward(raw, y if type(y) is float else _fetched(y), out=raw)
        return True

    def rule(self, prim: Primitive, rule: Callable) -> Callable:
        """A rule, as it is to be called on operands or gradients of this kind."""
        return rule

    def guard(self, name: str, raw):
        """A context for a call of NumPy's function of that name on raw values such as this."""
        return contextlib.nullcontext()

    def text(self, raw) -> str:
        """What repr adds to shape and dtype: up to eight numbers, else how many are nan."""
        if np.size(raw) <= 8:
            return f", data={_in_a_line(_fetched(raw))}"
        nans = _count_nans(raw)
        return f", nan={nans}" if nans else ""


class _Weak(Kind):
    """Python's numbers. Where Python raises though IEEE arithmetic has an answer, NumPy gives that and its warning."""

    rank = 0

    def evaluate(self, prim, raw, params):
        if prim.scalar is not None and not params and all([type(x) is float for x in raw]):
            with contextlib.suppress(ArithmeticError, ValueError):
                out = prim.scalar(*raw)
                if prim.builtin:
                    return out
                if isinstance(out, _NUMBERS):
                    return _number(out)
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

    def rule(self, prim, rule):
        """Where Python raises, or makes a complex number, NumPy has the IEEE answer."""

        def on_numbers(*numbers, **params):
            with contextlib.suppress(*_NO_ANSWER):
                h = rule(*numbers, **params)
                if type(h) is float or h is None:
                    return h
            return float(rule(*map(_public, numbers), **params))

        return on_numbers


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
    if type(data) is float and dtype is choice is None:  # the usual number
        return data
    ours, data, asked = isinstance(data, Array), _raw(data), None if dtype is None else np.dtype(dtype)
    kind, expected = KINDS[type(data)], "floating" if kinds == "f" else "floating, integer or boolean"
    foreign = kind is not None and kind.rank > NUMPY.rank
    own = getattr(data, "dtype", None) if ours or foreign else None
    if asked and asked.kind not in kinds:
        raise TypeError(f"{who}: dtype must be {expected}, got {asked}")
    if own and own.kind not in ("fiub" if asked else kinds):
        raise TypeError(f"{who}: the dtype of data must be {expected}, got {own}; pass dtype=")
    if foreign:
        return kind.enter(data, asked, choice, who)
    if asked is own is None and isinstance(data, _NUMBERS):
        return HOOK.adopt(data if ours and kinds != "f" else float(data), choice)
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise ValueError(f"{who}: data must be rectangular, got ragged nested sequences ({error})") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{who}: data must be real numbers, got {type(data).__name__} of dtype {array.dtype}")
    dtype = asked or own or set_default_dtype.dtype
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
    if isinstance(x, Value):
        x._end(f"{who} = Value")
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
    return x._held if isinstance(x, Array) else x


def _public(raw):
    """A raw value as it is handed out: weak numbers become NumPy scalars."""
    return KINDS[type(raw)].hand_out(raw)


def _in_a_line(array, form: Callable = str) -> str:
    """An array as nested lists of its numbers, each in that form."""
    return " ".join(np.array2string(np.asarray(array), separator=", ", formatter={"all": form}).split())


def _count_nans(raw) -> int:
    return np.isnan(_wrap(raw)).sum().item() if raw.dtype.kind == "f" else 0


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
    return not any([x[0] == "error" and issubclass(RuntimeWarning, x[2]) for x in warnings.filters])


_QUIET = frozenset(("ignore", "warn"))


def _typed(prim: Primitive, operands: Sequence) -> Sequence[int]:
    """The places of the operands that share one dtype: an index does not, nor a condition."""
    return range(len(operands)) if prim.typed is None else prim.typed


def _strong(prim: Primitive, raw: Sequence) -> list[tuple[int, np.dtype]]:
    """Places and dtypes of the operands that have one, of those that share it."""
    return [(i, raw[i].dtype) for i in _typed(prim, raw) if type(raw[i]) not in _WEAK_TYPES]


def _lifted(prim: Primitive, operands: Sequence) -> tuple:
    """Operands with their constants as raw values, of the dtypes in which a node keeps them.

    Raw floating arrays take the dtype of the strong floating Values and Tensors that they meet, and so do integers and
    masks; without such, all is as in NumPy.
    """
    operands = [x if isinstance(x, Array) else _constant(x, prim.name) for x in operands]
    raw = [_raw(x) for x in operands]
    strong = _strong(prim, raw)
    if not strong:
        floating = any([type(raw[i]) is float for i in _typed(prim, raw)])
    else:
        held = [dtype for i, dtype in strong if dtype.kind == "f" and isinstance(operands[i], Array)]
        dtype = np.result_type(*(held or [dtype for _, dtype in strong]))
        floating = dtype.kind == "f"
        for i, own in strong:
            if own != dtype and (own.kind == "f" or held) and not isinstance(operands[i], Array):
                operands[i] = operands[i].astype(dtype)
    for i in _typed(prim, raw) if floating else ():  # a whole number beside floats is one of them
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
    for i in _typed(prim, raw):
        if type(raw[i]) in _WEAK_TYPES:
            with contextlib.suppress(OverflowError):  # a whole number that does not fit is left to the function
                raw[i] = np.result_type(*dtypes, raw[i]).type(raw[i])
    return raw


_WEAK_TYPES = frozenset((float, int, bool))


def _evaluate(prim: Primitive, raw: Sequence, params: dict):
    """The forward of a primitive on raw operands: a raw value."""
    kind = _leading(raw, WEAK)
    return kind.evaluate(prim, _promoted(prim, raw) if kind.rank else raw, params)


def _leading(raw: Sequence, least: Kind) -> Kind:
    """The kind of highest rank among those of raw values and the least one."""
    for x in raw:
        kind = KINDS[type(x)]
        if kind.rank > least.rank:
            least = kind
    return least


def _apply(prim: Primitive, operands: tuple, params: dict):
    """Computes a primitive on any sort of operands: a node if one is a Value, a Tensor if one is, else a raw result."""
    result, floats, plain, large, dtype, limit, raw = None, True, True, False, None, HOOK.limit, []
    choice, ndarray = False, np.ndarray
    for x in operands:
        if isinstance(x, Value):
            result, x = Value, x._held
        elif isinstance(x, Tensor):
            if choice is not True and x._choice is not False:
                choice = x._choice
            result, x = result or Tensor, x._held
        if type(x) is ndarray:
            floats, own = False, x.dtype
            if own is not dtype:
                plain, dtype = plain and dtype is None, own
            if x.size >= limit:
                plain, large = False, True
        elif type(x) is not float:
            floats = plain = False
        elif not prim.ufunc:
            plain = False
        raw.append(x)
    if result is None and not (plain and dtype):
        if None in [KINDS[type(x)] for x in operands]:
            operands = tuple([_constant(x, prim.name) for x in operands])
        if _leading(operands, NUMPY) is not NUMPY:
            return _evaluate(prim, operands, params)
    if result is None:
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
        if constants or large:
            for x in operands:
                if large and isinstance(x, Array) and type(x._held) is ndarray:  # a small one stays as it is
                    x._adopt()
            raw = [_raw(x) for x in operands]
        out = _evaluate(prim, raw, params)
    if result is Value:
        return _node(out, prim, operands, params)
    return _wrap(out, choice)


if TYPE_CHECKING:  # What editors and type checkers cannot see: the operators and methods that room 5 puts in.
    Same = TypeVar("Same", bound="Array")

    class _Method:
        def __get__(self, array: Same, owner: Any) -> Callable[..., Same]: ...

    class _FromTable:
        def __abs__(self: Same) -> Same: ...
        def _of_one(self: Same) -> Same: ...
        def __eq__(self: Same, other: Any) -> Same: ...
        def __ne__(self: Same, other: Any) -> Same: ...
        @overload
        def _of_two(self, other: Value) -> Value: ...
        @overload
        def _of_two(self: Same, other: Any) -> Same: ...
        def _other(self: Same, *args: Any, **options: Any) -> Same: ...

        __invert__ = __neg__ = __pos__ = abs = arccos = arccosh = arcsin = arcsinh = arctan = arctanh = _of_one
        argwhere = bitwise_count = cbrt = ceil = cholesky = cos = cosh = deg2rad = degrees = det = exp = _of_one
        exp2 = expm1 = fabs = flatnonzero = floor = gelu = i0 = inv = invert = iscomplex = isfinite = _of_one
        isinf = isnan = isneginf = isposinf = isreal = log = log10 = log1p = log2 = logabsdet = _of_one
        logical_not = negative = positive = qr = rad2deg = radians = reciprocal = relu = rint = sigmoid = _of_one
        sign = signbit = signdet = sin = sinc = sinh = softplus = spacing = sqrt = square = svd = tan = _of_one
        tanh = trunc = _of_one
        __add__ = __and__ = __floordiv__ = __ge__ = __gt__ = __le__ = __lt__ = __matmul__ = __mod__ = _of_two
        __mul__ = __or__ = __pow__ = __radd__ = __rand__ = __rfloordiv__ = __rmatmul__ = __rmod__ = _of_two
        __rmul__ = __ror__ = __rpow__ = __rsub__ = __rtruediv__ = __rxor__ = __sub__ = __truediv__ = _of_two
        __xor__ = add = arctan2 = bitwise_and = bitwise_or = bitwise_xor = copysign = divide = equal = _of_two
        float_power = floor_divide = fmax = fmin = fmod = gcd = greater = greater_equal = heaviside = _of_two
        hypot = isclose = lcm = ldexp = left_shift = less = less_equal = logaddexp = logaddexp2 = _of_two
        logical_and = logical_or = logical_xor = maximum = minimum = multiply = nextafter = not_equal = _of_two
        power = remainder = right_shift = subtract = matmul = _of_two
        angle = argpartition = broadcast_to = convolve = count_nonzero = delete = diag = diagflat = _other
        diagonals = digitize = eigh = fftshift = flip = histogram_bin_edges = ifftshift = _other
        isin = log_softmax = logsumexp = matrix_rank = nan_to_num = nanargmax = nanargmin = norm = pad = _other
        pinv = roll = rot90 = sliding_window_view = softmax = tile = tril = triu = _other
        diff = median = nanmedian = percentile = nanpercentile = quantile = nanquantile = _other
        unwrap = where = _other

        # What np.generic, below, has as well, is known to be another only if it is declared.
        all: _Method
        any: _Method
        argmax: _Method
        argmin: _Method
        argsort: _Method
        choose: _Method
        clip: _Method
        compress: _Method
        conjugate: _Method
        cumprod: _Method
        cumsum: _Method
        diagonal: _Method
        dot: _Method
        max: _Method
        mean: _Method
        min: _Method
        prod: _Method
        ravel: _Method
        repeat: _Method
        round: _Method
        searchsorted: _Method
        squeeze: _Method
        std: _Method
        sum: _Method
        swapaxes: _Method
        take: _Method
        trace: _Method
        var: _Method
        nonzero: Any
        sort: Any
        unique: Any
        at: _At

    # NumPy's functions are annotated for its own arrays and numbers: to make them take a Value, it is one of these.
    class _Methods(_FromTable, np.generic):
        def __new__(cls: type[Same], *args: Any, **options: Any) -> Same: ...

else:
    _Methods = object


class Array(_Methods):
    """What Tensor and Value share. Operators, and a method for every entry of the table, are added in room 5."""

    __slots__ = ("_held", "__weakref__")
    _held: Any
    __hash__ = object.__hash__
    _picograd = True  # how another copy of this file is known

    shape: tuple[int, ...] = property(lambda self: getattr(self._held, "shape", ()))
    ndim: int = property(lambda self: len(self.shape))
    size: int = property(lambda self: math.prod(self.shape))
    dtype: np.dtype = property(lambda self: (self._held if hasattr(self._held, "dtype") else _public(self._held)).dtype)
    nbytes: int = property(lambda self: self.size * self.dtype.itemsize)

    @property
    def T(self: Same) -> Same:
        return np.transpose(self)

    @property
    def mT(self: Same) -> Same:
        return np.matrix_transpose(self)

    @property
    def real(self: Same) -> Same:
        return np.real(self)

    @property
    def imag(self: Same) -> Same:
        return np.imag(self)

    def _adopt(self) -> None:
        """Lets the hook take over the raw value, which is of its limit or more."""
        self._held = HOOK.adopt(self._held, None)

    def item(self) -> float | int | bool:
        """The one element as a Python number; ValueError if there are more."""
        raw = self._held
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
        raw = _fetched(self._held)
        if _lazy(self._held) and not self.ndim:
            holder = getattr(self, "_owner", None) or (self, "_held")
            if getattr(holder[0], "_prim", None) and getattr(*holder) is self._held:
                setattr(*holder, raw)
                self._held = raw
        return raw

    def reshape(self: Same, *shape: Any, order: str = "C") -> Same:
        return np.reshape(self, shape[0] if len(shape) == 1 else shape, order=order)

    def transpose(self: Same, *axes: Any) -> Same:
        if len(axes) == 1 and np.ndim(axes[0]):
            axes = tuple(axes[0])
        return np.transpose(self, None if axes in ((), (None,)) else axes)

    def flatten(self: Same, order: str = "C") -> Same:
        """A copy in one dimension; `ravel` is a view where it can be."""
        return np.copy(np.ravel(self, order))

    def copy(self: Same, order: str = "C") -> Same:
        """A copy in C order, as of ndarray's method; `np.copy` keeps the order."""
        if order != "C":
            raise TypeError(f"copy: order {order!r} is not supported on a Value or Tensor, only 'C'")
        if type(self._held) is np.ndarray and not self._held.flags.c_contiguous:
            return np.reshape(np.ravel(self), self.shape)
        return np.copy(self)

    def astype(self: Same, dtype: Any) -> Same:
        dtype, kinds = np.dtype(dtype), "f" if isinstance(self, Value) else "fiub"
        if dtype.kind not in kinds:
            allowed = "floating (or take .data.data.astype)" if kinds == "f" else "real"
            raise TypeError(f"astype: dtype must be {allowed}, got {dtype}")
        return _as_dtype(self, dtype)

    def __getitem__(self: Same, index: Any) -> Same:
        index = index if isinstance(index, tuple) else (index,)
        if _is_plain(index):  # the usual case
            return _apply(_getitem, (self,), {"index": index})
        index = tuple(map(_index_part, index))
        parts = [i for i in index if isinstance(i, Array)]
        return _getitem(self, *parts, index=tuple([_HOLE if isinstance(i, Array) else i for i in index]))

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError(f"a 0-d {type(self).__name__} has no length and cannot be iterated over")
        return self.shape[0]

    def __iter__(self: Same) -> Iterator[Same]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, x):
        return bool(np.any(np.equal(self._held, _raw(x))))

    def __bool__(self) -> bool:
        return bool(self._held)

    def _leave(self, how: str) -> float | int | bool:
        """The number, on its way to code that knows nothing of gradients."""
        return self.item()

    def __float__(self) -> float:
        return float(self._leave("float"))

    def __int__(self) -> int:
        return int(self._leave("int"))

    def __index__(self) -> int:
        return operator.index(self._leave("operator.index"))

    def __round__(self, decimals=0):
        return np.round(self, decimals)

    def __divmod__(self, other):
        return np.divmod(self, other)

    def __rdivmod__(self, other):
        return np.divmod(other, self)


class Tensor(Array):
    """An array without gradient, with NumPy's arithmetic, functions and methods.

    data: numbers, nested sequences, an array, a Tensor or a Value; copied. Arrays become float32 unless dtype says
        otherwise or data is a Tensor or Value; a single number is held in double precision and is weak, like a Python
        float. Ragged sequences raise ValueError; complex, text, objects and masked arrays TypeError. An array of
        another library that speaks NumPy's protocols, such as a `dask.array`, is kept, with its dtype, and counts as
        distributed.
    dtype: a floating, integer or boolean NumPy dtype.
    distributed: True or False to force it, None to leave it to `set_distributed_config`.
    label: a name, for pictures and messages.

    A 0-d Tensor behaves like a number: comparisons give NumPy's bool, formatting works, and `+=` makes a new one.
    What is computed of Tensors alone is a new Tensor, which a replay does not compute anew.
    """

    __slots__ = ("_choice", "_owner", "_label")

    def __init__(self, data: Any, dtype: Any = None, distributed: bool | None = None, label: str = ""):
        if not (distributed is None or isinstance(distributed, bool)):
            raise TypeError(f"Tensor: distributed must be True, False or None, got {distributed!r}")
        if not isinstance(label, str):
            raise TypeError(f"Tensor: label must be a string, got {label!r}")
        self._held = _as_raw(data, dtype, "Tensor", choice=distributed)
        self._choice, self._owner, self.label = distributed, None, label

    @property
    def label(self) -> str:
        """A name, for pictures and messages; a result has none at first, and costs no time for it."""
        return getattr(self, "_label", "")

    @label.setter
    def label(self, new: str):
        self._label = new

    @property
    def data(self) -> np.ndarray:
        """The array itself (writing to it is seen here); a NumPy scalar for 0-d."""
        return _public(self._held)

    @data.setter
    def data(self, new: Any):
        if not _written_back(new, self._held, self, None):
            self._become(_conform(new, self._held, "Tensor.data", self._choice))

    def _become(self, raw) -> None:
        """Holds another raw value from now on; so does the Value that handed this Tensor out."""
        self._held = raw
        if self._owner:
            setattr(*self._owner, raw)

    def _adopt(self) -> None:
        self._distribute(self._choice)

    def _distribute(self, choice: bool | None) -> None:
        raw = HOOK.adopt(self._held, choice)
        if self._owner and getattr(*self._owner) is self._held:
            setattr(*self._owner, raw)
        self._held, self._choice = raw, choice

    @property
    def distributed(self) -> bool:
        """Whether it counts as distributed: forced, or large enough by the configuration in force; never if 0-d."""
        return KINDS[type(self._held)].lazy or HOOK.distributed(self._held, self._choice)

    def enable_distributed(self) -> None:
        """From now on, distributed whatever its size. RuntimeError where the file was cut above room 8."""
        self._distribute(True)

    def disable_distributed(self) -> None:
        """From now on, computed by NumPy whatever its size."""
        self._distribute(False)

    def numpy(self) -> np.ndarray:
        """A copy as an ndarray."""
        return np.array(_fetched(self._held))

    def __array__(self, dtype=None, copy=None) -> np.ndarray[Any, np.dtype[_Tensor]]:
        return np.array(_fetched(self._held), dtype) if copy else np.asarray(_public(self._held), dtype)

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
        _public(self._held)[index] = new if KINDS[type(self._held)].lazy else _fetched(new)

    def __reduce__(self):
        return _restored, (type(self), self._held, self._choice, self.label), _extra(self, Tensor)

    def __copy__(self):
        twin = _restored(type(self), _owned(self._held), self._choice, self.label)
        return _with_extra(twin, _extra(self, Tensor))

    def __repr__(self):
        label = f", label={self.label!r}" if self.label else ""
        if not self.ndim:
            return f"Tensor({self._held}{label})"
        numbers = KINDS[type(self._held)].text(self._held)
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, distributed={self.distributed}{numbers}{label})"

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
    tensor._held, tensor._choice, tensor._owner = raw, choice, owner
    return tensor


def _written_back(new, raw, owner, attribute) -> bool:
    """Whether what is assigned is what was handed out for a raw value: its array, or the Tensor that shares it; or what
    it is assigned to."""
    if new is owner and attribute != "_grad":
        return True
    if not isinstance(new, Array):
        return KINDS[type(raw)].same(raw, new)
    whose = getattr(new, "_owner", None)
    same = whose is not None and whose[0] is owner and whose[1] == attribute
    both = ((raw, new._held), (new._held, raw))  # one may be in blocks around the other
    return same and any([KINDS[type(x)].same(x, y) for x, y in both])


def _restored(cls: type, raw, choice, label="") -> Tensor:
    """A pickled or copied Tensor."""
    tensor = _new(cls)
    tensor._held, tensor._choice, tensor._owner = raw if choice is None else HOOK.adopt(raw, choice), choice, None
    tensor.label = label
    return tensor


def _each(f: Callable, x):
    """f of everything in an argument, however nested."""
    if not isinstance(x, (list, tuple)):
        return f(x)
    return _like_sequence(x, [_each(f, i) for i in x])


def _like_sequence(x, items: list):
    """A list or tuple, also a named one, of the type of x."""
    return type(x)(items) if type(x) in (list, tuple) else type(x)(*items)


# Functions that write to an argument, or take whole numbers for something else than operands.
_AS_GIVEN = set("at reduceat ldexp copyto put putmask place put_along_axis fill_diagonal".split())


def _with_out_named(function, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a function of NumPy's, with `out` and what is behind it by name."""
    names = _argument_names(function)
    place = {np.dot: 2, np.concatenate: 2, np.einsum: len(args)}.get(function)  # which do not show it, or by name only
    if place is None:
        place = names.index("out") if "out" in names else len(args)
    return args[:place], dict(zip(("out", *names[place + 1 :]), args[place:])) | kwargs


def _on_arrays(function, args, kwargs):
    """Calls a function of NumPy on the arrays of Tensors, however nested, and wraps what comes out; dtypes are settled
    as for a primitive, but for integers, which may be indices, and masks: these only where a ufunc computes."""
    home = getattr(function, "__self__", function)
    called, ufunc = {function.__name__, home.__name__}, isinstance(home, np.ufunc)
    args, kwargs = _with_out_named(function, args, kwargs)
    if ufunc and called & {"__call__", "outer"}:
        args = tuple([x if isinstance(x, Array) else _constant(x, home.__name__) for x in args])
    operands, named = _members(*args), _members(*kwargs.values())
    given = [x for x in operands + named if isinstance(x, Array)]
    for x in given:
        if isinstance(x, Value):  # where NumPy does not look for one, such as in a list or as initial=
            x._end(f"{function.__name__}(Tensor, ...Value...)")
    weak = all([type(_raw(x)) in _WEAK_TYPES for x in operands if isinstance(x, (Tensor, np.ndarray))])
    strong = [x.dtype for x in operands if isinstance(x, Tensor) and type(x._held) not in _WEAK_TYPES]
    floats = [dtype for dtype in strong if dtype.kind == "f"]
    settled = "" if not floats or called & _AS_GIVEN else "f" + "iub" * ufunc

    def bare(x):
        raw = _raw(x)
        if floats and "outer" in called and type(raw) in _WEAK_TYPES:
            return np.result_type(*floats).type(raw)
        strong = kind_of(raw) in settled and (ufunc or not isinstance(raw, np.generic))
        if strong and not (isinstance(x, Tensor) and kind_of(raw) == "f"):
            raw = raw.astype(np.result_type(*floats), copy=False)
        return raw

    def kind_of(x):
        return getattr(getattr(x, "dtype", None), "kind", "O")

    targets = [x for x in _members(kwargs.get("out")) if x is not None]

    def wrapped(x):
        for target in targets:
            if KINDS[type(_raw(target))].same(_raw(target), x):
                return target
        if kind_of(x) not in "fiub":
            return x
        x = _settle(x)
        return _wrap(_number(x) if weak and isinstance(x, np.generic) else x)

    lead = _raw(next(filter(_lazy, given), 0.0))
    with KINDS[type(lead)].guard(function.__name__, lead):
        return _each(wrapped, function(*_each(bare, args), **{name: _each(_raw, x) for name, x in kwargs.items()}))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Value
#
# A node of the graph: raw data, the primitive that made it and its operands. Nodes are numbered as they are made, after
# their operands; so "newest first" is an order in which every node comes before its operands, and the backward sweep is
# a loop that takes the newest node with a gradient, with no recursion however deep the graph.
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
    _grad: Any
    _prim: Any
    _x: Any
    _y: Any

    def __init__(self, data: Any, dtype: Any = None, label: str = ""):
        if not isinstance(label, str):
            raise TypeError(f"Value: label must be a string, got {label!r}")
        self._held = _as_raw(data, dtype, "Value", "f")
        self._grad = self._prim = None
        self._x, self._y, self._needs, self._number, self.label = (), _NO_PARAMS, True, _next_number(), label

    # --- data and gradient ---

    @property
    def data(self) -> Tensor:
        """The data as a Tensor; assigning to it, or to its `.data`, changes this Value."""
        return _wrap(self._held, None, (self, "_held"))

    @data.setter
    def data(self, new: Any):
        if not _written_back(new, self._held, self, "_held"):
            new = _conform(new, self._held, "Value.data")
            if np.shape(new) != self.shape:
                self._grad = None  # it was that of other data
            self._held = new

    @property
    def grad(self) -> Tensor:
        """The gradient as a Tensor, zeros before any backward; assign 0 or None to reset it."""
        if self._grad is None:
            self._grad = _filled_like(self._held, 0)
        elif type(self._grad) is np.ndarray and not self._grad.flags.writeable:  # a broadcast view of an inner node
            self._grad = self._grad.copy()
        return _wrap(self._grad, None, (self, "_grad"))

    @grad.setter
    def grad(self, new: Any):
        if new is None:
            self._grad = None
        elif self._grad is None or not _written_back(new, self._grad, self, "_grad"):
            new = _conform(new, _filled_like(self._held, 0), "Value.grad")
            if type(new) is not float and np.shape(new) != self.shape:
                raise ValueError(f"Value.grad: expected shape {self.shape}, got {np.shape(new)}")
            self._grad = _fetched(new) if _lazy(new) and not _lazy(self._held) else new

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

    def _plain(self) -> Value:
        """The root of the graph as it was written."""
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
        retain_grads: whether the nodes in between keep theirs (replacing an earlier one), for reading: they may share
            memory; False saves it.

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
            return _filled_like(self._held, 1)
        if np.shape(_raw(gradient)) != self.shape:
            raise ValueError(f"backward: gradient must have shape {self.shape}, got {np.shape(_raw(gradient))}")
        return _conform(gradient, self._held, "backward: gradient")

    # --- what Python and NumPy ask of a number or array ---

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method == "__call__" and (ufunc.signature or not kwargs):
            return _entry(ufunc)(*inputs, **kwargs)
        if method not in ("__call__", "outer"):
            return _entry(getattr(ufunc, method))(*inputs, **kwargs)
        if kwargs:
            hint = "; no array takes a Value in place: for a += v, write a = a + v" * ("out" in kwargs)
            raise TypeError(f"{ufunc.__name__}: {', '.join(kwargs)}= is not supported on a Value{hint}")
        x, y = map(_recorded, inputs)
        if np.ndim(x) and np.ndim(y):
            x = np.reshape(x, np.shape(x) + (1,) * np.ndim(y))
        return _entry(ufunc)(x, y)

    def __array_function__(self, function, kinds, args, kwargs):
        return _call_entry(_entry(function), function, args, kwargs)

    def __array__(self, dtype=None, copy=None) -> np.ndarray[Any, np.dtype[_Value]]:
        if (self._needs and _mode.recording) or _lazy(self):  # to look at which is a computation elsewhere
            raise TypeError(
                "a Value does not turn into an array by itself, which would lose its gradient: "
                "take .data.data for the numbers, np.stack or np.block to join Values"
            )
        return self.data.__array__(dtype, copy)

    def __setitem__(self, index, new):
        raise TypeError(
            "a Value cannot be assigned to in place: use v.at[index].set(new) or np.where(mask, new, v), "
            "or v.data[index] = new to change the data of a leaf"
        )

    def _leave(self, how):
        number = self.item()
        self._end(f"{how}(Value)")
        return number

    def _end(self, what: str) -> None:
        """Says so where a gradient ends: an error inside a function to differentiate, else a warning."""
        if self._needs and _mode.recording:
            if _mode.depth:
                raise TypeError(f"{what}: {_ENDS}")
            warnings.warn(f"{what}: {_ENDS}", stacklevel=4)

    def __copy__(self):
        grad = None if self._grad is None else _owned(self._grad)
        made = self._prim, self._args, self._params, self._needs, _owned(self._held), grad, self.label
        return _with_extra(_rebuild(type(self), (), None, *made), _extra(self, Value))

    def __reduce__(self):
        # A node's operands come before it. All that it depends on is listed first, oldest first, so that neither pickle
        # nor deepcopy, which both remember what they have seen, go any deeper, however deep the graph is.
        first: tuple = ()
        listed = None
        if self._args and not any([id(self) in known.ids for known in [ref() for ref in _mode.listed] if known]):
            first = tuple(_newest_first(self)[:0:-1])
            listed = _Listed(first)
        made = self._prim, self._args, self._params, self._needs, self._held, self._grad, self.label
        return _rebuild, (type(self), first, listed, *made), _extra(self, Value)

    def __repr__(self):
        label = f", label={self.label!r}" if self.label else ""
        made = f", op={self._prim.name!r}" if self._prim else ""
        kind = KINDS[type(self._held)]
        if self.ndim or kind.lazy:
            return f"Value(shape={self.shape}, dtype={self.dtype}{kind.text(self._held)}{made}{label})"
        return f"Value(data={self._held}, grad={self._grad or 0.0}{made}{label})"

    def __format__(self, spec):
        return format(self.data, spec) if spec else repr(self)


def _named(prim: Primitive, function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a call of a function of NumPy's gives beside operands, by NumPy's names; its defaults need no support."""
    n = len(prim.operands or args)
    given = dict(zip(_argument_names(function)[n:], args[n:])) | kwargs if len(args) > n else kwargs
    return {k: x for k, x in given.items() if x is not None or k in prim.params}


if TYPE_CHECKING:  # What NumPy's functions find in an array of Tensors or Values: of floats, they would make floats.

    class _Tensor(Tensor, np.object_): ...

    class _Value(Value, np.object_): ...


def _call_entry(entry: Callable, function: Callable, args: tuple, kwargs: dict):
    """Calls the entry for a function of NumPy's with that function's arguments."""
    if not isinstance(entry, Primitive) or not entry.operands:
        return entry(*args, **kwargs)
    n = len(entry.operands)
    if len(args) == n and not kwargs:
        return _apply(entry, args, _NO_PARAMS)
    given = _named(entry, function, args, kwargs)
    if entry in TABLE and not given.keys() <= _USUAL:
        entry = TABLE[entry]
    return entry(*args[:n], **given)


_USUAL = {"axis", "keepdims", "ddof"}  # the keywords of reductions that primitives take themselves


def _entry(function):
    if function not in TABLE:
        ufunc = getattr(function, "__self__", None)
        home = f"np.{ufunc.__name__}" if isinstance(ufunc, np.ufunc) else getattr(function, "__module__", None) or "np"
        raise TypeError(
            f"{home.replace('numpy', 'np', 1)}.{function.__name__} is not in picograd's table, so it has no gradient: "
            "add it with picograd.primitive, or call it on .data.data where none is needed"
            + "; in place of np.full_like, take np.broadcast_to"
            * (function is np.copyto)
        )
    return TABLE[function]


def _node(data, prim, args, params, label="") -> Value:
    """A new node; under `no_grad` a leaf, to which no gradient flows."""
    node = _new(Value)
    node._held, node._grad, node._number, node.label = data, None, _next_number(), label
    node._needs = False
    if not _mode.recording:
        node._prim, node._x, node._y = None, (), _NO_PARAMS
        return node
    for i, x in enumerate(args):
        if isinstance(x, Value) and x._needs and prim.vjps[i if prim.operands else 0] is not None:
            node._needs = True
            break
    node._prim = prim
    node._x, node._y = (args, params) if type(data) is not float or params else _in_slots(prim, args)
    return node


def _in_slots(prim: Primitive, args: tuple) -> tuple:
    """What a number that was made without parameters has in `_x` and `_y`."""
    nodes = sum([isinstance(x, Value) and type(x._held) is float for x in args])
    alone = nodes and nodes + sum([type(x) is float for x in args]) == len(args) < 3
    return (*args, None)[:2] if alone and prim.builtin and prim.operands and not prim.joint else (args, _NO_PARAMS)


def _record(prim: Primitive, args: tuple, params: dict = _NO_PARAMS, label="") -> Value:
    """A node for the operation, also if its operands are Tensors only: a replay reads them anew."""
    return _node(_evaluate(prim, [_raw(x) for x in args], params), prim, args, params, label)


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
    state = {name: getattr(x, name) for name in _slots(type(x)) if not hasattr(base, name) and hasattr(x, name)}
    attributes = getattr(x, "__dict__", None)
    return (attributes or None, state) if attributes or state else None


@functools.lru_cache(1000)
def _slots(cls: type) -> list[str]:
    """The names of attributes that a class and its bases keep in slots."""
    return [name for c in reversed(cls.__mro__) for name, x in vars(c).items() if type(x) is types.MemberDescriptorType]


def _with_extra(twin, extra):
    """A copy with what `_extra` found."""
    for part in filter(None, extra or ()):
        for name, value in part.items():
            setattr(twin, name, value)
    return twin


def _rebuild(cls, first, listed, prim, args, params, needs, data, grad, label) -> Value:
    """A pickled or deeply copied node; `first` are those that it depends on, which come before it."""
    node = _new(cls)
    node._prim, node._needs = prim, needs
    node._x, node._y = (args, params) if type(data) is not float or params or not prim else _in_slots(prim, args)
    node._held, node._grad, node._number, node.label = data, grad, _next_number(), label
    return node


# --- walks, and what gradients are ---


def _newest_first(root: Value, since: int = 0) -> list[Value]:
    """All nodes that root depends on, newest first; a walk ends at nodes whose number is at most `since`."""
    if not isinstance(root, Value):
        raise TypeError(_two_copies(type(root)))
    seen, nodes = {root}, [root]
    for node in nodes:  # the list grows as it is walked
        for x in node._args if node._number > since else ():
            if isinstance(x, Value) and x not in seen:
                seen.add(x)
                nodes.append(x)
    nodes.sort(key=_get_number, reverse=True)
    return nodes


_get_number = operator.attrgetter("_number")


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


def _summed(g, like):
    """A gradient, summed over the axes along which what it is for was broadcast."""
    shape = getattr(like, "shape", ())
    had = getattr(g, "shape", ())
    if had == shape or not had:
        return g
    if len(had) == 2 and had[1:] == shape and type(g) is np.ndarray:
        return _ones(had[0], g.dtype).dot(g)  # a bias' gradient: BLAS sums rows twice as fast as NumPy
    extra = len(had) - len(shape)
    axes = tuple([i for i, n in enumerate(had) if i < extra or (n != 1 and shape[i - extra] == 1)])
    if not axes:
        return g
    add = np.add.reduce if type(g) is np.ndarray else np.sum
    g = add(g, axis=axes, keepdims=len(axes) != extra)
    return np.reshape(g, np.shape(g)[extra:]) if extra > 0 and len(axes) != extra else g


def _fit(g, raw):
    """A gradient, as a rule gave it, for an operand like `raw`: of its shape and dtype."""
    shape, g = getattr(raw, "shape", ()), _summed(g, raw)
    if getattr(g, "shape", ()) != shape:
        if KINDS[type(raw)].lazy:
            g = np.zeros_like(raw) + g  # in the chunks of raw
        elif type(g) is not Value and not np.ndim(g) and raw.size < _SPREAD_ELEMENTS:
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
    away = [x for x in foreign if x._prim is None and not _lazy(x)]
    if away:
        with_root = _lazy(root) and not root.ndim
        done = KINDS[type(grads[away[0]])].fetch([grads[x] for x in away] + [root._held] * with_root)
        if with_root:
            root._held = done[-1]
        grads.update((x, float(g) if type(x._held) is float else g) for x, g in zip(away, done))
    return grads


def _owned(raw):
    """The same data, held by nobody else."""
    return KINDS[type(raw)].own(raw)


def _deposited(new: dict[Value, Any], add=True) -> dict[Value, Any]:
    """The gradients that leaves have from now on, with new ones added, which nobody else holds."""
    result = {}
    for leaf, g in new.items():
        if add and leaf._grad is not None:
            g = leaf._grad + g
        elif KINDS[type(g)].shared(g):  # a part of a larger array
            g = _owned(g)
        result[leaf] = g
    return result


def _recompute(node: Value) -> None:
    """Computes a node's data anew from its operands."""
    x, y = node._x, node._y
    if type(y) is not dict:  # of numbers, as there may be 10^5 of them
        numbers = [z if type(z) is float else z._held for z in (x, y) if z is not None]
        try:
            node._held = node._prim.scalar(*numbers)
            return
        except _NO_ANSWER:
            pass
    node._held = _evaluate(node._prim, [_raw(x) for x in node._args], node._params)


def _as_met(prim: Primitive, operands: Sequence, dtype: np.dtype) -> Sequence:
    """Operands for a rule in the dtype of the result, as the forward met them: in -y, an unsigned y would wrap, and in
    y - 1 one of half the precision would lose digits."""
    for i in _typed(prim, operands):
        x = operands[i]
        own = getattr(x, "dtype", dtype)
        if own is not dtype and type(_raw(x)) not in _WEAK_TYPES and np.result_type(own, dtype) == dtype:
            operands = [*operands[:i], _as_dtype(x, dtype), *operands[i + 1 :]]
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
        g, out, rules = grads[node], node._held, node._prim.vjps
        h = k = 0.0  # the gradients of x and y
        try:
            if y is None:
                h = rules[0](g, out, x._held)
            elif type(y) is float:
                h = rules[0](g, out, x._held, y)
                y = None
            else:
                a, b = x if type(x) is float else x._held, y._held
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


_PLAIN = frozenset((np.ndarray, np.float32, np.float64))  # what needs no kind to be asked


def _pulled(node: Value, g, symbolic: bool) -> list[tuple[Value, Any]]:
    """The operands of a node that a gradient flows to, each with the gradient that its rule makes of g."""
    prim, args, params, out = node._prim, node._args, node._params, node._held
    operands, kind = [x._held if isinstance(x, Array) else x for x in args], NUMPY
    if type(out) is type(g) is float and prim.operands:
        kind = WEAK
    elif not (type(out) in _PLAIN and type(g) in _PLAIN):
        kind = _leading((_raw(g), out, *operands), NUMPY)
    if symbolic:
        # A Tensor becomes a node: what a rule computes from it is recorded, too, and a replay reads it anew.
        operands = [_recorded(x) if isinstance(x, Tensor) else x for x in args]
    if len(args) > 1 and type(out) is not float:
        dtype = out.dtype
        if any([type(x) is not float and getattr(x, "dtype", dtype) is not dtype for x in operands]):
            operands = _as_met(prim, operands, dtype)
    out, pairs = node if symbolic else out, []
    if prim.joint:
        wanted = [isinstance(x, Value) and x._needs for x in args]
        found = kind.rule(prim, prim.vjps[0])(wanted, g, out, operands, **params)
        return [(x, _fitted(h, x, prim)) for x, h, wants in zip(args, found, wanted) if wants and h is not None]
    for i, x in enumerate(args):
        rule = prim.vjps[i if prim.operands else 0]
        if rule is not None and isinstance(x, Value) and x._needs:
            rule = rule if kind is NUMPY else kind.rule(prim, rule)
            h = rule(g, out, *operands, **params) if prim.operands else rule(i, g, out, operands, **params)
            if h is not None:
                pairs.append((x, _fitted(h, x, prim)))
    return pairs


def _fitted(h, x: Value, prim: Primitive):
    """A gradient, as a rule gave it, of the shape and dtype of the operand that it is for."""
    raw = x._held
    if type(h) is type(raw) is float:
        return h
    if not prim.builtin and not isinstance(h, Value):  # a user may keep it
        h = _owned(_settle(np.asarray(h)) if KINDS[type(h)] in (None, WEAK) else h)
    if type(h) is type(raw) is np.ndarray and h.shape == raw.shape and h.dtype is raw.dtype:
        return h
    return _fit(h, raw)


# --- several roots as one ---


class _Parts(dict):
    """The gradients of roots, by their places: what a sweep sends through a node that stands for all of them."""

    shape, dtype = (), None

    def __add__(self, other):
        both = _Parts(self)
        for i, g in other.items():
            both[i] = both[i] + g if i in both else g
        return both


class _AsTheyAre(Kind):
    """Whole graphs, and gradients of several roots: nobody but they themselves knows how to compute with them."""

    rank = 100

    def evaluate(self, prim, raw, params):
        return prim.forward(*raw, **params)


KINDS[_Parts] = _AsTheyAre()


_join = primitive(
    lambda *roots: 0.0,
    lambda wanted, g, out, roots: [g.get(i) for i in range(len(roots))],
    name="join",
    joint=True,
    typed=(),
)


def _joined(roots):
    """A node on top of several, from which one walk or one sweep, with `_Parts` for a gradient, reaches all of them."""
    return _rebuild(Value, (), None, _join, tuple(roots), _NO_PARAMS, True, 0.0, None, "")


def _oldest_first(roots):
    """Every node that the roots depend on, operands before what is made of them."""
    return _newest_first(_joined(roots))[:0:-1]


def _rewrite(roots, rule, nodes=None, ends=_NO_PARAMS):
    """Rebuilds a graph from the leaves up: rule(node, its new operands) is the new node, or a constant. `nodes`: all of
    them, oldest first, if they are known. `ends`: nodes with what stands for them; they need not be leaves."""
    new = dict(ends)
    for node in nodes or _oldest_first(roots):
        if node._prim is None:
            new.setdefault(node, node)
        elif node not in ends:
            new[node] = rule(node, tuple([new[x] if isinstance(x, Value) else x for x in node._args]))
    return [new[root] if isinstance(root, Value) else root for root in roots]


# --- modes ---


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Within it, in this thread, results are leaves without history. Also a decorator."""
    before, _mode.recording = _mode.recording, False
    try:
        yield
    finally:
        _mode.recording = before


@contextlib.contextmanager
def _recording(tracing=False):
    """The opposite of `no_grad`: a program is made, and goes on, as otherwise. While a graph is rewritten (`tracing`),
    arrays are plain in this thread, and arithmetic on examples warns of nothing."""
    before = _mode.recording, _mode.tracing
    _mode.recording, _mode.tracing = True, tracing or _mode.tracing
    try:
        with np.errstate(all="ignore") if tracing else contextlib.nullcontext():
            yield
    finally:
        _mode.recording, _mode.tracing = before


# ---------------------------------------------------------------------------------------------------------------------
# 4. Gradients
#
# Functions of functions: in comes a function of NumPy's arithmetic, out one that returns derivatives of it, or one
# that computes the same in less memory. All go through `_Call`. Arguments are arrays, or nests: dicts, lists and tuples
# of arrays or of further nests. And a function that says where in a graph inf and nan come from.
# Invariant: derivatives have the form, shapes and dtypes of what they belong to, and are Values where Values came in.
#
#     >>> grad(lambda p: p["a"] * p["b"] ** 2)({"a": 2.0, "b": 3.0})
#     {'a': np.float64(9.0), 'b': np.float64(12.0)}
#     >>> jvp(np.sin, (0.0,), (2.0,))
#     (np.float64(0.0), np.float64(2.0))
# ---------------------------------------------------------------------------------------------------------------------


def _differentiating(function: Callable, *args, **kwargs):
    """Calls a function while, in this thread, graphs are recorded, and numbers in them are not to leave them."""
    before, _mode.recording, _mode.depth = _mode.recording, True, _mode.depth + 1
    try:
        return function(*args, **kwargs)
    finally:
        _mode.recording, _mode.depth = before, _mode.depth - 1


def _is_nest(x) -> bool:
    """Whether it is a dict, list or tuple of arrays; a list or tuple of numbers alone is itself an array."""
    if not isinstance(x, (dict, list, tuple)):
        return False
    return isinstance(x, dict) or hasattr(x, "_fields") or not all([isinstance(y, _NUMBERS) for y in _members(x)])


def _keys(x):
    """Of what has parts, their keys or numbers."""
    if isinstance(x, (list, tuple)):
        return range(len(x))
    return x.keys() if isinstance(x, dict) else None


def _mapped(f: Callable, where: str, x, *others):
    """f(where, leaf, *leaves of the others there) for each leaf of a nest, in a nest of the same form."""
    if not _is_nest(x):
        return f(where, x, *others)
    keys = _keys(x)
    for other in others:
        if _keys(other) != keys:
            raise ValueError(f"{where}: expected a {type(x).__name__} of {list(keys)}, got {reprlib.repr(other)}")
    items = [_mapped(f, f"{where}[{key!r}]", x[key], *[other[key] for other in others]) for key in keys]
    if not isinstance(x, dict):
        return _like_sequence(x, items)
    made = copy.copy(x)  # of a class of its own, it stays one
    made.update(zip(keys, items))
    return made


def _leaves(x) -> list:
    """What is in a nest, in order."""
    found: list = []
    _mapped(lambda where, leaf: found.append(leaf), "", x)
    return found


def _formed(x, leaves: Iterator):
    """A nest of the same form, of the next leaves."""
    return _mapped(lambda where, _: next(leaves), "", x)


class _Call:
    """A call of a function with the arguments argnums, or what is in them, as fresh variables: its output, and the way
    back, from gradients of the output to those of the variables.

    On a Value, or inside another gradient function, the gradients are Values again, to be differentiated further.
    """

    def __init__(self, f: Callable, argnums, args: tuple, kwargs: dict = _NO_PARAMS, has_aux: bool = False):
        if not callable(f):
            raise TypeError(f"expected a function to differentiate, got {f!r}")
        numbers = tuple(argnums) if isinstance(argnums, (tuple, list, range)) else (argnums,)
        for i in numbers:
            if not isinstance(i, (int, np.integer)):
                raise TypeError(f"argnums: expected an integer or a tuple of integers, got {argnums!r}")
            if not -len(args) <= i < len(args):
                raise ValueError(f"argnums: asks for argument {i}, but the function was called with {len(args)}")
        self.one, numbers = numbers == (argnums,), [i % len(args) for i in numbers]
        if len(numbers) > len(set(numbers)):
            raise ValueError(f"argnums: names an argument twice: {argnums}")
        self.given = [args[i] for i in numbers]
        self.inside, self.variables = _mode.depth > 0, []
        self.out, self.aux = _differentiating(self.record, f, numbers, [*args], kwargs), None
        self.valued = any([v._prim for v in self.variables])
        if has_aux:
            if not (isinstance(self.out, tuple) and len(self.out) == 2):
                raise TypeError(f"has_aux: the function must return a pair, got {reprlib.repr(self.out)}")
            self.out, self.aux = self.out
        self.outs = _leaves(self.out)
        for x in self.outs:
            if not isinstance(x, (Array, np.ndarray, np.number, int, float)):
                raise TypeError(f"the function to differentiate must return a Value or number, got {type(x).__name__}")

    def record(self, f: Callable, numbers: Sequence[int], args: list, kwargs: dict):
        """What f returns for its arguments with variables in them."""
        for i in numbers:
            args[i] = _mapped(self.enter, f"argument {i}", args[i])
        self.since = _next_number()  # what is newer may depend on them
        try:
            return f(*args, **kwargs)
        except ValueError as error:  # buffer[0] = v: NumPy makes a ValueError of what float(v) raised
            if isinstance(error.__cause__, TypeError) and _ENDS in str(error.__cause__):
                raise error.__cause__ from None
            raise

    def enter(self, where: str, x) -> Value:
        """A fresh variable for an argument, or a part of one: a leaf, or made of x if that is a Value."""
        self.variables.append(np.positive(x) if isinstance(x, Value) else _variable(x, where))
        return self.variables[-1]

    def sweep(self, seeds: dict) -> list:
        """The gradients of the variables, raw or Values, for those of outputs, by their places."""
        symbolic, grads = self.inside or self.valued or any([isinstance(g, Value) for g in seeds.values()]), {}
        if symbolic:
            seeds = {i: g if isinstance(g, Value) else _leaf(g) for i, g in seeds.items()}
        alone = len(self.outs) == 1
        root, seed = (self.outs[0], seeds[0]) if alone else (_joined(self.outs), _Parts(seeds))
        if isinstance(root, Value) and root._needs:
            grads = _differentiating(_backpropagate, root, seed, symbolic=symbolic, since=self.since)
        found = {v: grads[v] for v in self.variables if v in grads}
        self.reached = bool(found)
        if not symbolic:
            found = _deposited(_at_home(found, root), add=False)
        return [found[v] if v in found else _filled_like(v._held, 0) for v in self.variables]

    def pull(self, gradient):
        """The gradients of the arguments for one of the output, in its form."""
        seeds: list = []

        def match(where, out, g):
            raw = _raw(out)
            if np.shape(_raw(g)) != np.shape(raw):
                raise ValueError(f"{where}: expected shape {np.shape(raw)}, got {np.shape(_raw(g))}")
            seeds.append(_fit(g, raw) if isinstance(g, Value) else _conform(g, raw, where))

        _mapped(match, "gradient", self.out, gradient)
        return self.in_form(self.sweep(dict(enumerate(seeds))), any([isinstance(g, Value) for g in seeds]))

    def in_form(self, results: Iterable, valued: bool = False):
        """Results for the variables, in the form of the arguments. valued: whether Values, whatever was given."""
        rest = iter([_handed_out(x, valued or v._prim is not None) for x, v in zip(results, self.variables)])
        nests = [_formed(x, rest) for x in self.given]
        return nests[0] if self.one else tuple(nests)

    def returned(self, out):
        """What the function returned: Values if some were given, else NumPy's numbers and arrays."""
        return _mapped(lambda where, x: _handed_out(x, self.valued) if isinstance(x, Value) else x, "", out)


def _variable(x, where: str) -> Value:
    """A fresh leaf for an argument, or a part of one, that is no Value."""
    try:
        if isinstance(x, _NUMBERS) or isinstance(x, Array) or _lazy(x):
            return Value(x)
        own = np.asarray(x).dtype
        return Value(x, own if own.kind == "f" else None)
    except (TypeError, ValueError) as error:
        hint = " (make arrays of several shapes by np.array each)" * isinstance(error, ValueError)
        raise type(error)(f"{where}: {error}{hint}") from None


def _leaf(raw) -> Value:
    """A Value around a raw value, which is not copied."""
    leaf = Value(0.0)
    leaf._held = raw
    return leaf


def _handed_out(result, valued: bool):
    """A result: a Value if it has to be one, or where an outer gradient function needs it; else NumPy's."""
    if valued or (_mode.depth and isinstance(result, Value) and result._needs):
        return result if isinstance(result, Value) else _leaf(result)
    return _public(_raw(result))


def value_and_grad(
    f: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that returns f's value and its gradient by the argument(s) argnums (a tuple for a tuple).

    A number or array in gives a NumPy number or array out, computed in the array's own floating dtype; a Value in gives
    Values out, which can be differentiated again. A dict, list or tuple of arrays, or of further such, gives one of
    gradients; but a list or tuple of numbers alone is an array. f must return one number, else ValueError; if that does
    not depend on the arguments, the gradient is 0, with a warning. Nests to any order.

    has_aux: f returns a pair of the number and of anything else, and the function `((value, else), gradient)`.
    """

    def value_and_gradient(*args, **kwargs):
        call = _Call(f, argnums, args, kwargs, has_aux)
        raw = _raw(call.out)
        shape = getattr(raw, "shape", ())
        if _is_nest(raw) or math.prod(shape) != 1:
            got = f"{type(call.out).__name__} of shape {shape}"
            raise ValueError(f"grad: the function must return one number, got {got}; see jacobian and elementwise_grad")
        found = call.sweep({0: _filled_like(raw, 1)})
        if call.variables and not call.reached:
            warnings.warn("grad: what the function returns does not depend on the argument: zeros", stacklevel=3)
        value = _handed_out(call.out, call.valued)
        return ((value, call.returned(call.aux)) if has_aux else value), call.in_form(found)

    return value_and_gradient


def grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that returns the gradient of f; see `value_and_grad`. With has_aux, `(gradient, else)`."""

    both = value_and_grad(f, argnums, has_aux)

    def gradient(*args, **kwargs):
        value, slope = both(*args, **kwargs)
        return (slope, value[1]) if has_aux else slope

    return gradient


def elementwise_grad(f: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """The derivative of each output element of an element-wise f by its input element: the gradient of the sum."""
    return grad(lambda *args, **kwargs: np.sum(f(*args, **kwargs)), argnums)


def jacobian(f: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """A function that returns the derivatives of every output of f by every element of the argument(s) argnums.

    Of shape (*output shape, *argument shape); of nests, a nest of arguments for each array in the nest of outputs. One
    backward sweep per output element.
    """

    def derivatives(*args, **kwargs):
        call, places = _Call(f, argnums, args, kwargs), itertools.count()

        def of_output(where, out):
            raw, place = _raw(out), next(places)
            units = [_filled_like(raw, 1)]
            if np.ndim(raw):
                units = [unit.reshape(raw.shape) for unit in np.eye(raw.size, dtype=raw.dtype)]
            rows = [call.sweep({place: unit}) for unit in units]
            shapes, found = [np.shape(raw) + v.shape for v in call.variables], []
            for column, shape in zip(zip(*rows), shapes):
                stack = np.array if _PLAIN.issuperset(map(type, column)) else np.stack
                found.append(np.reshape(stack(column), shape) if shape else column[0])
            return call.in_form(found if rows else map(np.zeros, shapes))

        return _mapped(of_output, "", call.out)

    return derivatives


def hessian(f: Callable, argnum: int = 0) -> Callable:
    """A function that returns the second derivatives of f, which returns one number, by the elements of an argument."""
    return jacobian(grad(f, argnum), argnum)


def vjp(f: Callable, *args: Any) -> tuple[Any, Callable]:
    """f's value at the arguments, and a function from a gradient of that value to those of the arguments.

    f returns a Value or number, or a dict, list or tuple of such. The function takes a gradient of that form, and
    returns a tuple of one for each argument; it may be called many times. Arguments are as in `value_and_grad`.
    """
    call = _Call(f, range(len(args)), args)
    return call.returned(call.out), call.pull


def _in_tuple(x) -> tuple:
    return x if type(x) is tuple else (x,)


def jvp(f: Callable, args: tuple, tangents: tuple) -> tuple[Any, Any]:
    """f's value at the arguments, and its change along the tangents: the product of the Jacobian with them.

    args and tangents are tuples of the same form; one argument may stand for itself. f and its arguments are as in
    `vjp`. Gradients of arguments are linear in that of the value: a sweep back through a sweep goes forward.
    """
    args = _in_tuple(args)
    call = _Call(f, range(len(args)), args)
    one = _leaf if call.valued else np.asarray
    ones = _mapped(lambda where, x: one(_filled_like(_raw(x), 1)), "", call.out)
    return call.returned(call.out), vjp(call.pull, ones)[1](_in_tuple(tangents))[0]


def hvp(f: Callable, args: tuple, vector: tuple) -> Any:
    """The product of the Hessian of f, which returns one number, with a vector of the form of args, in that form.

    args and vector are tuples; one argument may stand for itself. Two sweeps, whatever the size.
    """
    slopes = grad(f, range(len(args)) if type(args) is tuple else (0,))
    product = vjp(slopes, *_in_tuple(args))[1](_in_tuple(vector))
    return product if type(args) is tuple else product[0]


def ravel_nest(nest: Any) -> tuple[Any, Callable]:
    """All numbers in a dict, list or tuple of arrays, or of further such, as one vector; and the way back.

    The vector has the widest dtype among them, double precision for numbers; it is a Value if one of them is. The
    function takes such a vector, or a Value, and returns its parts in the form and the dtypes of the nest.
    """
    leaves: list = []

    def enter(where, x):
        leaves.append(x if isinstance(x, Value) else _variable(x, where)._held)

    form = _mapped(enter, "nest", nest)
    kinds = [(np.shape(_raw(x)), getattr(_raw(x), "dtype", float)) for x in leaves]
    *ends, total = itertools.accumulate([math.prod(shape) for shape, _ in kinds], initial=0)
    dtype = np.result_type(*[dtype for _, dtype in kinds] or [float])
    parts = [np.ravel(_as_dtype(x, dtype)) for x in leaves]

    def unravel(flat):
        flat = flat if isinstance(flat, Array) else np.asarray(flat)
        if flat.shape != (total,):
            raise ValueError(f"unravel: expected shape ({total},), got {flat.shape}")
        parts = zip(np.split(flat, ends[1:]), kinds)
        return _formed(form, (_as_dtype(np.reshape(x, shape), dtype) for x, (shape, dtype) in parts))

    return np.concatenate(parts) if parts else np.zeros(0), unravel


# --- what is computed again: `checkpoint` makes a node of the graph of a call, and that a recipe ---


class _Recipe:
    """The graph that made a result, without data: nodes are placeholders, and so are the inputs, its oldest ones."""

    shape, dtype = (), None

    def __init__(self, root: Value, inputs: list[Value]):
        self.root, self.inputs = root, inputs

    def __repr__(self):
        return "a recipe"


KINDS[_Recipe] = KINDS[_Parts]


def _remade(operands: Sequence, rule: Callable = lambda node, args: node) -> Value:
    """The result of a recipe, the last of the operands, for the others as its inputs; each node as the rule has it."""
    *inputs, recipe = operands

    def made(node, args):
        return rule(_record(node._prim, args, node._params, node.label), args)

    return _rewrite([recipe.root], made, ends=dict(zip(recipe.inputs, inputs)))[0]


@no_grad()
def _made_again(*operands):
    return _remade((*map(_leaf, operands[:-1]), operands[-1]))._held


def _recipe_rule(wanted, g, out, operands):
    symbolic = isinstance(out, Value)
    inputs = operands[:-1] if symbolic else list(map(_leaf, operands[:-1]))
    for x, wants in zip(inputs, wanted):
        x._needs = wants  # of a Value it is what it was
    since = _next_number()
    with _recording():
        grads = _backpropagate(_remade((*inputs, operands[-1])), g, symbolic=symbolic, since=since)
    return [*map(grads.get, inputs), None]


_checkpoint = primitive(_made_again, _recipe_rule, name="checkpoint", joint=True, typed=())


def _forgotten(root: Value, since: int) -> Value:
    """A node for all that was computed after that number: its data stays, what it was made by does not."""

    def twin(node, args):
        return _node(None, node._prim, args, node._params, node.label)

    nodes = _newest_first(root, since)[::-1]
    inputs = {x: _leaf(None) for x in nodes if x._prim is None or x._number <= since}
    recipe = _Recipe(_rewrite([root], twin, nodes, inputs)[0], list(inputs.values()))
    return _node(root._held, _checkpoint, (*inputs, recipe), _NO_PARAMS, root.label)


def checkpoint(f: Callable) -> Callable:
    """f, of whose work only the results are kept; what they were made by is computed again, for backward.

    f returns Values, or dicts, lists and tuples of them. It may use Values that are no arguments, such as parameters,
    and other functions with checkpoints. It is called once: what is computed again is the graph that it made, with the
    same random numbers and branches. Gradients of gradients keep what they need. Under `no_grad` it is f, and
    `optimize`, whose programs have their own buffers, takes it apart. (Griewank and Walther 2000, "Algorithm 799".)
    """
    if not callable(f):
        raise TypeError(f"checkpoint: expected a function, got {f!r}")

    @functools.wraps(f)
    def call(*args, **kwargs):
        since = _next_number()
        out = f(*args, **kwargs)
        made = [x for x in _leaves(out) if isinstance(x, Value) and x._needs and x._prim and x._number > since]
        new = {}
        if len(made) == 1:
            new[made[0]] = _forgotten(made[0], since)
        elif made:  # in one vector, so that all is computed again but once
            flat, unravel = ravel_nest(made)
            new = dict(zip(made, unravel(_forgotten(flat, since))))
        return _mapped(lambda where, x: new.get(x, x) if isinstance(x, Value) else x, "", out)

    return call


# --- where inf and nan come from ---


def _nonfinite(raw) -> str:
    """What is not finite in a raw value, in words; "" if all is."""
    x = np.asarray(_fetched(raw))
    counts = {"inf": np.isinf(x).sum(), "nan": np.isnan(x).sum()} if x.dtype.kind == "f" else {}
    return " and ".join([f"{name} in {n} of {x.size}" for name, n in counts.items() if n])


def _account(what: str, node: Value, nodes: Sequence[Value]) -> list[str]:
    """Lines about a node of a graph whose nodes are given newest first: what its operands are and come from."""
    lines, below = [f"{what}, shape {node.shape}"], {node}
    for i, x in enumerate(node._args):
        raw, makers = np.asarray(_fetched(_raw(x))), ", ".join(map(_name_of, getattr(x, "_args", ())))
        numbers = f"{raw.min()} to {raw.max()}" if raw.size and raw.dtype.kind != "O" else "no numbers"
        name = _name_of(x) + f" made of {makers}" * bool(makers)
        lines.append(f"  operand {i}: {name}, shape {raw.shape}, {_nonfinite(raw) or numbers}")
    for other in reversed(nodes):
        into = [i for i, x in enumerate(other._args) if isinstance(x, Value) and x in below]
        if into and other._prim is TABLE[np.where]:
            lines.append("  It is in a branch of np.where, which sends 0 to a branch not taken, and 0 * inf is nan.")
            return [*lines, "  Choose its operand first: np.where(ok, f(np.where(ok, x, 1.0)), 0.0)."]
        if into and other._prim.elementwise:
            below.add(other)
    return lines


def _name_of(x) -> str:
    """A node by its operation, any other operand by what it is; with its label."""
    prim, label = getattr(x, "_prim", None), getattr(x, "label", "")
    what = prim.name if prim else {Value: "leaf", Tensor: "Tensor"}.get(type(x), "constant")
    return f"{what} {label!r}" if label else what


def _bad_value(root: Value) -> list[str]:
    """About the first node that is not finite though its operands are; if there is none, about where root's come in."""
    nodes = _newest_first(root)
    bad = [x for x in reversed(nodes) if _nonfinite(x._held)]
    first = [x for x in bad if x._prim and not any([_nonfinite(_raw(y)) for y in x._args])]
    first = first or (bad if _nonfinite(root._held) else [])
    if first and first[0]._prim is _checkpoint:
        return _bad_value(_remade(first[0]._args))
    return _account(f"values: {_name_of(first[0])} has {_nonfinite(first[0]._held)}", first[0], nodes) if first else []


def _bad_gradient(root: Value, g) -> list[str]:
    """About the first rule of a backward sweep, from the gradient g, after which a gradient is not finite."""
    nodes, grads = _newest_first(root), {root: g}
    for node in nodes:
        for x, h in _pulled(node, grads[node], False) if node._prim and node in grads else ():
            grads[x] = grads[x] + h if x in grads else h
            bad = _nonfinite(grads[x])
            if bad and node._prim is _checkpoint:
                return _bad_gradient(_remade(node._args), grads[node])
            if bad:
                return _account(f"gradients: the rule of {_name_of(node)} gives {_name_of(x)} {bad}", node, nodes)
    return []


def find_nonfinite(root: Value) -> str | None:
    """Where inf and nan come from, as a text to print; None if all is finite.

    Of the values that root was computed by, the first that is not finite though its operands are; and once `backward`
    was called, the first rule that made a gradient so: the sweep is done again. With the label and shapes of the
    operation, where its operands come from, and a word on np.where, if it is in a branch of that.
    """
    if not isinstance(root, Value):
        raise TypeError(f"find_nonfinite: root must be a Value, got {type(root).__name__}")
    with np.errstate(all="ignore"), _recording():
        written = {x: x._plain() for x in _newest_first(root) if type(x) is not Value}
        [plain] = _rewrite([root], lambda x, args: _node(x._held, x._prim, args, x._params, x.label), ends=written)
        g = root._grad
        lines = _bad_value(plain)
        if any([x._grad is not None for x in _newest_first(plain)]):
            lines += _bad_gradient(plain, _filled_like(root._held, 1) if g is None else g)
    return "\n".join(lines) or None


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
    free, weights = {}, []
    for i, x in enumerate(args):
        raw = np.asarray(_raw(x))
        if raw.dtype.kind == "f" or (raw.dtype.kind == "i" and isinstance(x, int)):
            free[i] = raw.astype(np.float64)
    if not free:
        raise TypeError("check_gradients: expected at least one number or floating array among the arguments")

    def total(*values):
        out = f(*values)
        if not isinstance(out, Value):
            raise TypeError(f"check_gradients: the function must return a Value, got {type(out).__name__}")
        if not weights:  # a fixed random direction, so that errors of different outputs cannot cancel
            weights.append(np.random.default_rng(0).uniform(0.5, 1.5, out.shape))
        return np.sum(out * weights[0]) if out.ndim else out

    def values():
        weak = {i: float(x) for i, x in free.items() if type(_raw(args[i])) in _WEAK_TYPES}
        strong = {i: _settle(x.copy()) for i, x in free.items()}
        return [_leaf((strong | weak)[i]) if i in free else x for i, x in enumerate(args)]

    for i, x in free.items():
        gradient = np.asarray(jacobian(total, i)(*values()).data)  # which does not warn of 0
        for element in np.ndindex(x.shape):
            kept, sides = x[element].copy(), []
            for change in (step, -step):
                x[element] = kept + change
                with no_grad():
                    sides.append(float(total(*values())))
            x[element] = kept
            numeric, exact = (sides[0] - sides[1]) / (2 * step), float(gradient[element])
            if not abs(numeric - exact) <= atol + rtol * max(abs(numeric), abs(exact)):
                place = f", element {element}" if element else ""
                raise AssertionError(f"argument {i}{place}: gradient {exact!r}, by finite differences {numeric!r}")
        if order > 1:
            check_gradients(jacobian(total, i), *args, order=order - 1, step=step, rtol=max(rtol, 1e-4), atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Catalogue
#
# Every operation with its rule; then the operators and methods of Value and Tensor, all from the table. In: raw values,
# Tensors and Values. Out: what NumPy gives for the same arrays. Invariant: a rule has an answer wherever the operation
# has one, and costs no more than the operation does. Where there is no derivative, or more than one, it is:
#
#     abs, fabs, copysign, relu, norm, std,    0 at 0; std also where numbers are equal, but their mean is rounded
#     hypot, arctan2
#     max, min, maximum, fmax and their kin    shared equally by ties, 0.0 and -0.0 too; to nan where that is taken
#     maximum.accumulate and its kin           step by step: shared by the largest so far and the next
#     nansum, nanmax, ... nanquantile          0 to nan
#     sort, quantiles, unique                  to the elements that are taken, whatever is equal to them
#     fmod, modf, frexp, nextafter, unwrap     as if there were no jumps
#     clip                                     passes at the bounds; where they are in the wrong order, to the upper one
#     power                                    0 for x**0 by x, and for 0**y by y where y is not negative
#     logaddexp, logsumexp                     weights that sum to 1: infinity takes all, equal infinities share
#     prod, cumprod, det                       exact, also with zeros and for singular matrices
#     eigh, svd                                vectors of values that are equal up to rounding, or of the singular value
#                                              0, which nothing determines, do not turn: there, 0 stands for 1 / 0
#     pinv, lstsq                              of matrices of the same rank
#     interp                                   where pieces meet, the slope is that of the right one
#
#     >>> x = Value([3.0, 1.0, 3.0])
#     >>> np.max(x).backward()
#     >>> print(x.grad.tolist())
#     [0.5, 0.0, 0.5]
# ---------------------------------------------------------------------------------------------------------------------

_elementwise = functools.partial(primitive, elementwise=True)


def _numpys(function: Callable) -> Callable:
    """Enters a composition for NumPy's function of its name."""
    name = function.__name__
    return composed(getattr(np, name, None) or getattr(np.linalg, name))(function)


# --- arithmetic ---


def _scaled(g, number):
    """g * number, to be multiplied by what has all of g's shape: what g repeats is multiplied once."""
    if type(g) is np.ndarray and g.size > _LITTLE and 0 in g.strides:
        g = g[tuple([slice(None if step else 1) for step in g.strides])]
    return g * number


def _power_x(g, out, x, y):
    if not isinstance(y, (int, float)):
        pole = (y == 0) & ~(np.abs(x) >= np.finfo(np.result_type(_raw(out))).tiny)  # 0 * x**-1, infinite or nan
        return g * np.where(pole, 0.0, y * _pow(np.where(pole, 1.0, x), y - 1.0))
    if y == 2:  # the usual x**2: no masks needed
        return _scaled(g, y) * x
    if y in (0, 1):
        return g * y
    return g * (y * (x ** (y - 1.0) if type(x) is float else _pow(x, y - 1.0)))


def _power_y(g, out, x, y):
    flat = (x == 0) & (y >= 0)  # 0**y is 0 on the right of y = 0, so its slope is 0; elsewhere log(0) says -inf
    return g * np.where(flat, 0.0, out * np.log(np.where(flat, 1.0, x)))


primitive(np.add, lambda g, out, x, y: g, lambda g, out, x, y: g, reads="")
primitive(np.subtract, lambda g, out, x, y: g, lambda g, out, x, y: -_summed(g, y))
primitive(np.multiply, lambda g, out, x, y: g * y, lambda g, out, x, y: g * x)
primitive(np.divide, lambda g, out, x, y: g / y, lambda g, out, x, y: -_summed(g * out, y) / y)
_pow = TABLE[np.power] = _elementwise(_power, _power_x, _power_y, name="power")
_pow.ufunc = True  # to all that asks: it takes out=, and numbers without a dtype
# With the quotient that NumPy takes: x / y may round up to the next integer.
primitive(np.remainder, lambda g, out, x, y: g, lambda g, out, x, y: -g * np.floor_divide(x, y))
primitive(np.fmod, lambda g, out, x, y: g, lambda g, out, x, y: -g * np.rint((x - out) / y))
primitive(np.float_power, _power_x, _power_y)
primitive(np.negative, lambda g, out, x: -g)
primitive(np.positive, lambda g, out, x: g)
primitive(np.absolute, lambda g, out, x: g * np.sign(x), name="abs")
primitive(np.reciprocal, lambda g, out, x: -g * out * out)
primitive(np.square, lambda g, out, x: _scaled(g, 2.0) * x, scalar=lambda x: x * x)


def _over(x, out):
    """x / out, and 0 where out is 0: the subgradient that norms and std take at 0."""
    return x / np.where(out == 0, np.inf, out)


def _turn(g, x, y):
    """g * x / (x * x + y * y), where no square over- or underflows; 0 at the origin."""
    r = np.hypot(x, y)
    return _over(g * _over(x, r), r)


primitive(np.arctan2, lambda g, out, y, x: _turn(g, x, y), lambda g, out, y, x: _turn(-g, y, x))
primitive(np.hypot, lambda g, out, x, y: g * _over(x, out), lambda g, out, x, y: g * _over(y, out))


def _lead_of(x, y):
    """x - y, and 0 where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return np.where((x == y) & np.isinf(x), 0.0, x - y)


# The weights are exp(x - out) and exp(y - out), in a form in which they sum to 1 whatever the size of x and y.
def _softly(ufunc, scale):
    return primitive(
        ufunc,
        lambda g, out, x, y: g * sigmoid(scale * _lead_of(x, y)),
        lambda g, out, x, y: g * sigmoid(scale * _lead_of(y, x)),
    )


_softly(np.logaddexp, 1.0)
_softly(np.logaddexp2, math.log(2.0))

# --- functions of one number, most of which Python's math has, too: arcsin as asin ---


def _sinc_x(g, out, x):
    # Near 0 the closed form is 0/0; there the Taylor series is exact to double precision, also when differentiated.
    near = np.abs(x) < 0.05
    small = np.where(near, x, 0.0)
    z = (np.pi * small) ** 2
    series = -(np.pi**2) * small * (1 / 3 - z * (1 / 30 - z * (1 / 840 - z * (1 / 45360 - z / 3991680))))
    return g * np.where(near, series, (np.cos(np.pi * x) - out) / np.where(near, 1.0, x))


_LN2, _LN10 = math.log(2.0), math.log(10.0)
for _ufunc, _rule_of in {
    np.sqrt: lambda g, out, x: 0.5 * g / out,
    np.cbrt: lambda g, out, x: g / (3.0 * out * out),
    np.exp: lambda g, out, x: g * out,
    np.expm1: lambda g, out, x: g * (out + 1.0),
    np.exp2: lambda g, out, x: g * (_LN2 * out),
    np.log: lambda g, out, x: g / x,
    np.log1p: lambda g, out, x: g / (1.0 + x),
    np.log2: lambda g, out, x: g / (_LN2 * x),
    np.log10: lambda g, out, x: g / (_LN10 * x),
    np.sin: lambda g, out, x: g * np.cos(x),
    np.cos: lambda g, out, x: -g * np.sin(x),
    np.tan: lambda g, out, x: g * (1.0 + out * out),
    # (1 - x) * (1 + x): the difference 1 - x * x has no correct digit near 1.
    np.arcsin: lambda g, out, x: g / np.sqrt((1.0 - x) * (1.0 + x)),
    np.arccos: lambda g, out, x: -g / np.sqrt((1.0 - x) * (1.0 + x)),
    np.arctan: lambda g, out, x: g / (1.0 + x * x),
    np.sinh: lambda g, out, x: g * np.cosh(x),
    np.cosh: lambda g, out, x: g * np.sinh(x),
    np.arcsinh: lambda g, out, x: g / np.hypot(x, 1.0),  # x * x could overflow
    np.arccosh: lambda g, out, x: g / (np.sqrt(x - 1.0) * np.sqrt(x + 1.0)),
    np.arctanh: lambda g, out, x: g / ((1.0 - x) * (1.0 + x)),
    **dict.fromkeys((np.deg2rad, np.radians), lambda g, out, x: g * (math.pi / 180.0)),
    **dict.fromkeys((np.rad2deg, np.degrees), lambda g, out, x: g * (180.0 / math.pi)),
    np.fabs: lambda g, out, x: g * np.sign(x),
    np.conjugate: lambda g, out, x: g,
}.items():
    primitive(_ufunc, _rule_of, scalar=getattr(math, _ufunc.__name__.replace("arc", "a"), None))
# g * (1 - out**2), in the order of operations in which NumPy needs one temporary array only.
primitive(np.tanh, lambda g, out, x: -out * out * g + g, scalar=math.tanh, reads="out")
_elementwise(np.sinc, _sinc_x)

# Bessel's integral for i0' = i1 (DLMF 10.32.3); by the midpoint rule it is exact wherever i0 is finite.
_ANGLES = np.cos((np.arange(64) + 0.5) * (math.pi / 128))
_elementwise(np.i0, lambda g, out, x: g * np.matmul(np.sinh(np.expand_dims(x, -1) * _ANGLES), _ANGLES / 64))
_real = _elementwise(np.real, lambda g, out, val: g)

# Of two numbers, of which one moves the result and the other only says which way, or whether.
primitive(np.copysign, lambda g, out, x, y: g * (np.sign(x) * np.copysign(1.0, y)), None, typed=(0, 1))
primitive(np.nextafter, lambda g, out, x, y: g, None, typed=(0, 1))
primitive(np.ldexp, lambda g, out, x, i: np.ldexp(g, i), None)
primitive(np.heaviside, None, lambda g, out, x, y: _masked(x == 0, g), typed=(0, 1))


def _in_parts(function, *rules):
    """Enters a function of one number with several results: a primitive for each."""
    parts = []
    for i, rule in enumerate(rules):
        parts.append(_elementwise(lambda x, i=i: function(x)[i], rule, name=f"{function.__name__} {i}"))
    TABLE[function] = lambda x: tuple([part(x) for part in parts])


_in_parts(np.modf, lambda g, out, x: g, None)
_in_parts(np.frexp, lambda g, out, x: np.ldexp(g, -np.frexp(x)[1]), None)

# --- selection ---


def _masked(mask, g, out=None):
    """`np.where(mask, g, 0.0)`; of large arrays by their bits, to `out` if given: branches that nothing foresees take
    ten times longer."""
    if type(g) is type(mask) is np.ndarray and mask.size > _LITTLE and mask.dtype == bool and g.dtype.itemsize <= 8:
        bits = np.dtype(f"i{g.itemsize}")
        return np.bitwise_and(g.view(bits), -mask.view(np.int8), out if out is None else out.view(bits)).view(g.dtype)
    return np.where(mask, g, 0.0)


def _bound(ufunc, beyond, name):
    """One side of clip: the gradient is x's up to the bound y, and y's beyond it and where it is nan."""

    def taken(x, y):
        return beyond(x, y) | np.isnan(y)

    return primitive(
        ufunc,
        lambda g, out, x, y: _masked(~taken(x, y), g),
        lambda g, out, x, y: _masked(taken(x, y), g),
        name=name,
    )


# The ufuncs themselves are found in the table as what is entered after these.
_not_below, _not_above = _bound(np.maximum, np.less, "at least"), _bound(np.minimum, np.greater, "at most")


def _share_of(g, out, mine, other, first):
    """What an operand of maximum or one of its kin gets: all where it is the result, half of it in a tie. Of nan and a
    number, that is it which NumPy takes; of two nans the first."""
    if isinstance(other, (int, float)) and other == other:  # the usual np.maximum(x, 0): only mine may be nan
        wins = out != other
    else:
        wins = (mine == out) | (np.isnan(out) & (np.isnan(mine) if first else ~np.isnan(other)))
    return np.where(mine == other, 0.5 * g, _masked(wins, g))


for _function in (np.maximum, np.minimum, np.fmax, np.fmin):
    primitive(
        _function,
        lambda g, out, x, y: _share_of(g, out, x, y, True),
        lambda g, out, x, y: _share_of(g, out, y, x, False),
    )
_elementwise(
    np.where,
    None,
    lambda g, out, condition, x, y: _masked(condition, g),
    lambda g, out, condition, x, y: _masked(np.logical_not(condition), g),
)


@composed(np.clip, np._core.umath.clip)  # type: ignore[attr-defined]
def clip(a, a_min=None, a_max=None, *, min=None, max=None):
    """`np.clip`; the gradient passes at the bounds, as in PyTorch. Where the lower bound is above, the upper one is
    the result, and gets the gradient."""
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    if low is high is None:
        return np.copy(a)
    if isinstance(a, (int, list)) and np.result_type(*[_raw(x) for x in (low, high) if x is not None]).kind != "f":
        a = np.asarray(a)  # as NumPy does: it need not fit in the dtype of its bounds
    out = a
    for bound, side, beyond, end in ((low, _not_below, operator.lt, "min"), (high, _not_above, operator.gt, "max")):
        dtype = np.result_type(_raw(a))
        # As in NumPy, a whole number that is beyond all that the dtype holds is no bound.
        beyond_all = type(bound) is int and dtype.kind in "iu" and beyond(bound, getattr(np.iinfo(dtype), end))
        if bound is not None and not beyond_all:
            out = side(out, bound)
    return np.copy(a) if out is a else out


# --- activations that NumPy has no name for: functions of picograd, found in the table under themselves ---


def _floating(x):
    """Integers and masks in double precision, for functions that NumPy does not have."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return np.float64(x)
    return x if dtype.kind == "f" else _as_dtype(x, np.float64)


def _in_single(function):
    """A function, of float16 computed in single precision, as what lies between may overflow."""

    @functools.wraps(function)
    def forward(a, *args, **kwargs):
        if getattr(getattr(a, "dtype", None), "char", "") != "e":
            return function(a, *args, **kwargs)
        return function(a.astype(np.float32), *args, **kwargs).astype(np.float16)

    return forward


@_in_single
def _sigmoid(x, out=None):
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is 0, as it should be
        return np.divide(1.0, 1.0 + np.exp(-_floating(x)), out)


_GELU = math.sqrt(2.0 / math.pi)


def _gelu_tanh(x):
    """x within the limits beyond which tanh is 1 and powers of x might overflow, and the tanh in gelu."""
    x = np.clip(x, -30.0, 30.0)
    return x, np.tanh(_GELU * (x * (1.0 + 0.044715 * (x * x))))


def _gelu_x(g, out, x):
    x, t = _gelu_tanh(x)
    return g * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (_GELU * (1.0 + 0.134145 * (x * x))))


relu = _elementwise(
    lambda x, out=None: np.maximum(x, 0.0, out=out),
    lambda g, out, x: g * (out > 0),  # 0 at the kink
    name="relu",
    reads="out",
    scalar=lambda x: 0.0 if x <= 0.0 else x,
)
sigmoid = _elementwise(_sigmoid, lambda g, out, x: g * (out * (1.0 - out)), name="sigmoid", reads="out")
softplus = _elementwise(
    lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(_floating(x)))),  # log(1 + exp(x)) without overflow
    lambda g, out, x: g * sigmoid(x),
    name="softplus",
)
gelu = _elementwise(  # the tanh form: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2
    lambda x: 0.5 * x * (1.0 + _gelu_tanh(_floating(x))[1]), _gelu_x, name="gelu"
)

# --- reductions; axis may be None, an int (also negative) or a tuple ---


_FEW = 8  # elements up to which a loop over all of their first, all of their second, ... is the faster one


def _few_axes(a, axis) -> tuple:
    """The axes of a reduction over up to _FEW elements that lie side by side, such as those of a pool; else none."""
    if axis is None or a.ndim < 2 or a.shape[-1] > _FEW or a.size < _LITTLE:
        return ()
    axes = _axes(a, axis)
    few = a.ndim - 1 in axes and 1 < math.prod([a.shape[i] for i in axes]) <= _FEW
    return axes if few and len(axes) < a.ndim else ()


def _by_few(step, a, axis, keepdims):
    """A reduction of all the first elements, all the second, ..., as NumPy's own loop over so few takes 20 times as
    long. None where NumPy does well."""
    axes = _few_axes(a, axis)
    if not axes:
        return None
    moved = np.moveaxis(a, axes, range(len(axes)))
    first, second, *others = [moved[i] for i in np.ndindex(moved.shape[: len(axes)])]
    out = step(first, second)
    for part in others:
        step(out, part, out=out)
    return np.expand_dims(out, axes) if keepdims else out


def _sum(a, axis=None, keepdims=False):
    """`np.sum`; of an array by its method, which is there sooner."""
    if type(a) is not np.ndarray:
        return np.sum(a, axis=axis, keepdims=keepdims)
    out = _by_few(np.add, a, axis, keepdims) if a.dtype.char in "fd" else None
    return a.sum(axis, keepdims=keepdims) if out is None else out


def _extremum(reduce, step):
    """`np.max` or `np.min`, by steps where that is faster."""

    def forward(a, axis=None, keepdims=False, initial=None):
        if initial is not None:
            return reduce(a, axis=axis, keepdims=keepdims, initial=initial)
        out = _by_few(step, a, axis, keepdims) if type(a) is np.ndarray else None
        return reduce(a, axis=axis, keepdims=keepdims) if out is None else out

    return forward


def _mean(a, axis=None, keepdims=False):
    """`np.mean`; of the usual arrays as NumPy computes it, without what that asks first."""
    if type(a) is np.ndarray and a.dtype.char in "fd" and a.size:
        total = a.sum(axis, keepdims=keepdims)
        return total / (a.size // total.size)
    return np.mean(a, axis=axis, keepdims=keepdims)


def _unreduce(g, a, axis, keepdims):
    """Gives back to a reduced array, as length 1, the axes that the reduction dropped."""
    return g if keepdims or axis is None or axis == () or not np.ndim(a) else np.expand_dims(g, axis)


def _axes(a, axis) -> tuple:
    """The axes of a that an argument names, counted from 0: one, several, or with None all."""
    if axis is None or not np.ndim(a):
        return tuple(range(np.ndim(a)))
    return np.lib.array_utils.normalize_axis_tuple(axis, np.ndim(a), allow_duplicate=True)


def _share(a, axis, ddof=0):
    """1 / how many elements a reduction takes together; infinity if that is 0."""
    count = math.prod(np.shape(a) if axis is None else [np.shape(a)[i] for i in _axes(a, axis)]) - ddof
    return 1.0 / count if count > 0 else math.inf


def _before(a):
    """The product of all that comes before each element, along the last axis."""
    return np.cumprod(np.concatenate([np.ones_like(a[..., :1]), a[..., :-1]], axis=-1), axis=-1)


def _others(a):
    """The product of all others along the last axis: what comes before times what comes after, exact with zeros."""
    return _before(a) * np.flip(_before(np.flip(a, -1)), -1)


def _rows(a, axis):
    """a with the axes that a reduction takes together as one, the last; and the way back to a's shape."""
    axes = _axes(a, axis)
    last = range(-len(axes), 0)
    moved = np.moveaxis(a, axes, last)
    kept = np.shape(moved)[: np.ndim(a) - len(axes)]
    rows = np.reshape(moved, (*kept, math.prod(np.shape(moved)[len(kept) :])))
    return rows, lambda x: np.moveaxis(np.reshape(x, np.shape(moved)), last, axes)


def _prod_a(g, out, a, axis=None, keepdims=False):
    rows, back = _rows(a, axis)
    return _unreduce(g, a, axis, keepdims) * back(_others(rows))


def _var_a(g, out, a, axis=None, ddof=0, keepdims=False):
    centred = a - np.mean(a, axis=axis, keepdims=True)
    return _unreduce(g, a, axis, keepdims) * centred * (2.0 * _share(a, axis, ddof))


def _std_a(g, out, a, axis=None, ddof=0, keepdims=False):
    # Of equal numbers it is 0, but their mean may be rounded, and then this is not. Less the largest, they are 0.
    a = a if 0 in np.shape(a) else a - np.max(a, axis=axis, keepdims=True)
    g, out = (_unreduce(x, a, axis, keepdims) for x in (g, out))
    return _var_a(_over(0.5 * g, out), out, a, axis, ddof, True)


def _extremum_a(g, out, a, axis=None, keepdims=False, initial=None):
    hit = (a == _unreduce(out, a, axis, keepdims)) | np.isnan(a)  # with a nan, only nans are hits
    single = float if type(_raw(out)) is float else np.result_type(_raw(out), np.float32)
    count = TABLE[np.sum](_as_dtype(hit, single), axis=axis, keepdims=True)
    share = _unreduce(g, a, axis, keepdims) / (count if initial is None else np.maximum(count, 1))
    if isinstance(g, (np.ndarray, np.generic)):
        share = share.astype(g.dtype, copy=False)  # to NumPy, the count is wide
    return _masked(hit, share)


def _along_one(rule):
    """The rule of a function along an axis, from a rule for one axis: with none, the array is a vector."""

    def whole(g, out, a, axis=None):
        if axis is None or not np.ndim(a):
            return np.reshape(rule(g, out, np.ravel(a), 0), np.shape(a))
        return rule(g, out, a, axis)

    return whole


def _scan(ufunc, forward=None):
    """A primitive that applies a function of two numbers again and again: out_i = f(out_{i-1}, a_i)."""

    def rule(g, out, a, axis):
        # With p and q the slopes of f, a_i gets q_i * S_i where S_i = g_i + p_{i+1} * S_{i+1}. The recurrence is a
        # composition of affine maps, done by doubling (Hillis and Steele 1986); no division, so zeros are exact.
        total, out, x = (np.moveaxis(z, axis, -1) for z in (g, out, a))
        scale, q = (vjp(1.0, out[..., 1:], out[..., :-1], x[..., 1:]) for vjp in TABLE[ufunc].vjps)
        step = 1
        while step < np.shape(x)[-1]:
            near = total[..., :-step] + scale * total[..., step:]
            total = np.concatenate([near, total[..., -step:]], axis=-1)
            scale, step = scale[..., :-step] * scale[..., step:], 2 * step
        return np.moveaxis(np.concatenate([total[..., :1], q * total[..., 1:]], axis=-1), -1, axis)

    name = getattr(forward, "__name__", f"{ufunc.__name__}.accumulate")
    return primitive(forward or (lambda a, axis: ufunc.accumulate(a, axis)), _along_one(rule), name=name)


def _peak(a, axis):
    """The largest along axis, which is kept; -inf of none."""
    none = {"initial": -np.inf} if 0 in np.shape(a) else {}
    return np.max(a, axis=axis, keepdims=True, **none)


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


def _logsumexp_a(g, out, a, axis=None, keepdims=False):
    return _unreduce(g, a, axis, keepdims) * _weights_of(a, _unreduce(out, a, axis, keepdims), axis=axis)


def _reusing(function, x, *args):
    """An element-wise function of a result that nobody else has: of an array, in its memory."""
    return function(x, *args, out=x) if type(x) is np.ndarray else function(x, *args)


def _softmax(a, axis=-1):
    a = _floating(a)
    e = _reusing(np.exp, a - _peak(a, axis))
    return _reusing(np.divide, e, np.sum(e, axis=axis, keepdims=True))


def _softmax_a(g, out, a, axis=-1):
    return out * (g - np.sum(g * out, axis=axis, keepdims=True))


def _log_softmax(a, axis=-1):
    a = _floating(a)
    shifted = a - _peak(a, axis)
    return _reusing(np.subtract, shifted, np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True)))


def _log_softmax_a(g, out, a, axis=-1):
    return g - np.exp(out) * np.sum(g, axis=axis, keepdims=True)


TABLE[np.sum] = primitive(
    _sum, lambda g, out, a, axis=None, keepdims=False: _unreduce(g, a, axis, keepdims), name="sum"
)
TABLE[np.mean] = primitive(
    _mean,
    lambda g, out, a, axis=None, keepdims=False: _unreduce(g * _share(a, axis), a, axis, keepdims),
    name="mean",
)
primitive(np.prod, _prod_a)
TABLE[np.var] = primitive(_in_single(np.var), _var_a, name="var")
TABLE[np.std] = primitive(_in_single(np.std), _std_a, name="std")
TABLE[np.amax] = TABLE[np.max] = primitive(_extremum(np.max, np.maximum), _extremum_a, name="max")
TABLE[np.amin] = TABLE[np.min] = primitive(_extremum(np.min, np.minimum), _extremum_a, name="min")
primitive(np.cumsum, _along_one(lambda g, out, a, axis: np.flip(np.cumsum(np.flip(g, axis), axis), axis)))
_scan(np.multiply, np.cumprod)
_weights_of = primitive(
    _logsumexp_weights,
    lambda g, out, a, total, axis=None: _softmax_a(g, out, a, axis),
    None,  # it is a function of a alone
    name="weights of logsumexp",
)
logsumexp = primitive(_logsumexp, _logsumexp_a, name="logsumexp")
softmax = primitive(_softmax, _softmax_a, name="softmax")
log_softmax = primitive(_log_softmax, _log_softmax_a, name="log_softmax")


@composed(np.average)
def average(a, axis=None, weights=None, returned=False, *, keepdims=False):
    """`np.average`, also with differentiable weights: of a's shape, or of its lengths along the axes."""
    if weights is None:
        out = np.mean(a, axis=axis, keepdims=keepdims)
        return (out, np.full_like(out, np.size(a) / np.size(out))) if returned else out
    settled = isinstance(weights, Array) and weights.dtype.kind == "f" and type(weights._held) is not float
    if np.result_type(_raw(a)).kind != "f" and not settled:
        a = _floating(a if hasattr(a, "dtype") else np.asarray(a))  # as NumPy: their products might overflow
    a, weights = _together((a, weights))
    if np.shape(weights) != np.shape(a):
        axes = _axes(a, axis)
        if axis is None or np.shape(weights) != tuple([np.shape(a)[i] for i in axes]):
            raise ValueError(f"average: weights of shape {np.shape(weights)} for axis {axis} of {np.shape(a)}")
        others = tuple([i for i in range(np.ndim(a)) if i not in axes])
        weights = np.expand_dims(np.transpose(weights, np.argsort(axes).tolist()), others)
    dtype = np.result_type(_raw(a), _raw(weights))  # summed in the precision of both
    weights = weights if np.result_type(_raw(weights)) == dtype else _as_dtype(weights, dtype)
    weights = weights * np.ones_like(a)
    total = np.sum(weights, axis=axis, keepdims=keepdims)
    if not (_lazy(total) or np.all(_fetched(_raw(total)))):
        raise ZeroDivisionError("average: the weights sum to zero")
    out = np.sum(a * weights, axis=axis, keepdims=keepdims) / total
    return (out, total) if returned else out


# --- shape ---


def _inverse(axes):
    """The permutation that undoes a transposition."""
    return None if axes is None else tuple(np.argsort([i % len(axes) for i in axes]).tolist())


def _little(a):
    """An array of a's axes, each of length 1, or 0 as it is: on it, NumPy checks a call, in no time."""
    return np.ones([min(n, 1) for n in np.shape(a)])


def _axis(axis, a) -> int:
    """An axis of a, counted from 0; AxisError if it has no such axis."""
    return np.lib.array_utils.normalize_axis_index(axis, np.ndim(a))


def _along(a, axis, part):
    """The part of a that an index of that axis gives."""
    return a[(slice(None),) * _axis(axis, a) + (part,)]


def _shaped(a, shape):
    """`np.reshape`; of an array by its method, which is there sooner."""
    return a.reshape(shape) if type(a) is np.ndarray else np.reshape(a, shape)


_reshape = primitive(_shaped, lambda g, out, a, shape: _shaped(g, np.shape(a)), name="reshape")
primitive(np.transpose, lambda g, out, a, axes=None: np.transpose(g, _inverse(axes)))
primitive(np.broadcast_to, lambda g, out, array, shape: g)


def _cast(a, dtype):
    """a in another dtype; `float` stands for Python's own: a weak scalar."""
    if dtype is float:
        return float(a)
    a = a if hasattr(a, "astype") else np.asarray(a)
    if a.dtype.kind == "c":
        raise TypeError(f"expected real numbers, got dtype {a.dtype}")
    return a.astype(dtype)


_as_dtype = _elementwise(_cast, lambda g, out, a, dtype: g, name="astype")
_elementwise(np.copy, lambda g, out, a: g)


@_numpys
def reshape(a, shape, order="C"):
    if order != "C":
        raise TypeError(f"reshape: order {order!r} is not supported on a Value or Tensor, only 'C'")
    return _reshape(a, shape)


@_numpys
def ravel(a, order="C"):
    flat = reshape(a, (-1,), order)
    raw = _raw(flat)
    return np.copy(flat) if type(raw) is np.ndarray and not raw.flags.c_contiguous else flat  # NumPy's has no gaps


def _reshaping(function):
    """A function that only changes the shape: to that which it gives an array whose numbers nobody reads. All checks
    and errors are NumPy's."""
    return lambda a, *args, **kwargs: _reshape(a, function(np.empty(np.shape(a), bool), *args, **kwargs).shape)


def _permuting(function):
    """A function that only changes the order of axes: to that in which it leaves axes of the lengths 0, 1, 2, ..."""

    def permute(a, *args, **kwargs):
        return np.transpose(a, function(np.empty(range(np.ndim(a)), bool), *args, **kwargs).shape)

    return permute


def _at_least(ndim, extended):
    def at_least(*arrays):
        out = tuple([a if np.ndim(a) >= ndim else extended(a) for a in arrays])
        return out[0] if len(out) == 1 else out

    return at_least


for _function in (np.expand_dims, np.squeeze):
    composed(_function)(_reshaping(_function))
for _function in (np.moveaxis, np.rollaxis, np.swapaxes, np.matrix_transpose, np.linalg.matrix_transpose):
    composed(_function)(_permuting(_function))
for _ndim, _function in enumerate((np.atleast_1d, np.atleast_2d, np.atleast_3d), 1):
    composed(_function)(_at_least(_ndim, _reshaping(_function)))

# --- joining and splitting ---


def _concatenate_i(i, g, out, arrays, axis=0):
    start = sum(np.shape(a)[axis] for a in arrays[:i])
    return _along(g, axis, slice(start, start + np.shape(arrays[i])[axis]))


_concatenate = primitive(
    lambda *arrays, axis=0: np.concatenate(arrays, axis), _concatenate_i, name="concatenate", variadic=True
)
_stack = primitive(
    lambda *arrays, axis=0: np.stack(arrays, axis),
    lambda i, g, out, arrays, axis=0: _along(g, axis, i),
    name="stack",
    variadic=True,
)


def _together(arrays) -> list:
    """What is to meet, with weak numbers, integers and masks in the dtype that they take then: reshaped to arrays, weak
    numbers would be strong."""
    arrays = _lifted(_stack, arrays)
    raws = list(map(_raw, arrays))
    if not _strong(_stack, raws):
        return list(arrays)
    met = _strengthened(_stack, _promoted(_stack, raws))
    return [x if y is z else _as_dtype(x, y.dtype) for x, y, z in zip(arrays, met, raws)]


@_numpys
def concatenate(arrays, axis=0):
    if axis is None:
        return _concatenate(*map(np.ravel, _together(arrays)), axis=0)
    return _concatenate(*arrays, axis=axis)


def _joining(extended, axis):
    """A function that joins arrays along an axis, or their last, once each has axes enough."""

    def join(tup, *, dtype=None, casting="same_kind"):
        arrays = [extended(a) for a in _together(tup)]
        out = _concatenate(*arrays, axis=min(axis, np.ndim(arrays[0]) - 1))
        return out if dtype is None else _as_dtype(out, np.dtype(dtype))

    return join


@_numpys
def block(arrays):
    """`np.block`: a matrix of numbers and arrays from nested lists."""

    def shaped(x):
        return [shaped(part) for part in x] if isinstance(x, list) else np.empty(np.shape(x), bool)

    def joined(x, axis=0):
        if isinstance(x, list):
            return _concatenate(*[joined(part, axis + 1) for part in x], axis=axis - depth)
        part = next(parts)
        return _reshape(part, (1,) * (ndim - np.ndim(part)) + np.shape(part))

    ndim, depth, part = np.block(shaped(arrays)).ndim, 0, arrays  # with NumPy's own checks and errors
    while isinstance(part, list):
        depth, part = depth + 1, part[0]
    parts = iter(_together(_members(arrays)))
    return joined(arrays) if isinstance(arrays, list) and len(_members(arrays)) > 1 else np.copy(joined(arrays))


def _place(part, whole) -> tuple:
    """The index of a part that slices made of an array of truths in C order: its address tells where it starts."""
    offset, index = operator.sub(*(np.lib.array_utils.byte_bounds(x)[0] for x in (part, whole))), []
    for length, n, stride in zip(part.shape, whole.shape, whole.strides):
        start = offset // max(stride, 1) % max(n, 1)
        index.append(slice(None) if length == n else slice(start, start + length))
    return tuple(index)


def _splitting(function):
    """A function that splits an array: into the slices that it makes of one whose numbers nobody reads."""

    def split(ary, *args, **kwargs):
        whole = np.empty(np.shape(ary), bool)
        return [ary[_place(part, whole)] for part in function(whole, *args, **kwargs)]

    return split


for _function in (np.split, np.array_split, np.hsplit, np.vsplit, np.dsplit):
    composed(_function)(_splitting(_function))
composed(*_since("unstack"))(lambda x, *, axis=0: tuple(np.moveaxis(x, axis, 0)))


@_numpys
def trim_zeros(filt, *args, **kwargs):
    whole = np.asarray(_fetched(_raw(filt)) != 0, order="C")
    return filt[_place(np.trim_zeros(whole, *args, **kwargs), whole)]


# --- indexing; parts of an index that are Values or Tensors are operands, so that a replay sees their current data ---

_HOLE = type("Hole", (), {"__repr__": lambda self: "·", "__reduce__": lambda self: "_HOLE"})()


def _filled(index, parts):
    if not parts:
        return index
    rest = iter(parts)
    return tuple([next(rest) if i is _HOLE else i for i in index])


def _is_plain(index: tuple) -> bool:
    """Whether an index has no arrays, nor truths, which count as such: it names no element twice, and gives a view."""
    return all([type(i) in _PLAIN_PARTS or (isinstance(i, np.integer | int) and type(i) is not bool) for i in index])


_PLAIN_PARTS = frozenset((slice, int, type(None), type(Ellipsis)))


def _put(a, *parts, shape, index):
    """Zeros of that shape with `a` added at that index: the transpose of indexing."""
    index = _filled(index, parts)
    out = np.zeros(shape, getattr(a, "dtype", np.float64))
    if _is_plain(index):
        out[index] = a
    elif len(index) == 1 and np.asarray(index[0]).dtype.kind in "iu" and math.prod(shape[1:]) >= _LONG_ROW:
        _add_rows(out, np.ravel(index[0]) % shape[0], np.reshape(a, (-1, *shape[1:])))
    else:
        np.add.at(out, index, a)  # an index array may name an element twice
    return out


_LONG_ROW = 8  # elements from which rows are added in one go, and not one by one


def _add_rows(out, places, rows):
    """out[places] += rows, where places, not negative, may name one twice: what `np.add.at` does in ten times as long.

    Each turn adds those rows that are the last to name their place. If that would take many turns, the rest is sorted,
    and summed by place.
    """
    last, left = np.empty(len(out), np.intp), np.arange(len(places))
    while left.size:
        named = places[left]
        last[named] = left
        now = last[named] == left
        if 2 * np.count_nonzero(now) < left.size:
            order = np.argsort(named, kind="stable")
            starts = np.flatnonzero(np.diff(named[order], prepend=-1))
            out[named[order][starts]] += np.add.reduceat(rows[left[order]], starts)
            return
        out[named[now]] += rows[left[now]]
        left = left[~now]


_getitem = primitive(
    lambda a, *parts, index: (np.float64(a) if type(a) is float else a)[_filled(index, parts)],
    lambda i, g, out, operands, index: (
        None if i else _scatter(g, *operands[1:], shape=np.shape(operands[0]), index=index)
    ),
    name="getitem",
    variadic=True,
    typed=(0,),
)
_scatter = primitive(
    _put,
    lambda i, g, out, operands, shape, index: None if i else _getitem(g, *operands[1:], index=index),
    name="scatter",
    variadic=True,
    typed=(0,),
)


def _index_array(i):
    """A list in an index, as an array; of integers if it is empty. Values in it stay operands."""
    if not isinstance(i, (list, tuple)):
        return i
    join = np.stack if any([isinstance(x, Value) for x in i]) else np.asarray
    return join(i) if len(i) else np.zeros(0, int)


def _index_part(i):
    """A part of an index as `_getitem` takes it: a lazy array is an operand."""
    if isinstance(i, list):
        return _index_array(i)
    return _wrap(i) if not isinstance(i, Array) and _lazy(i) else i


def _put_last(*parts, shape, index):
    """Of what an index names, what is the last at its place: it may name an element twice."""
    index, places = _filled(index, parts), np.zeros(shape, int)
    turns = np.arange(places[index].size).reshape(places[index].shape)
    places[index] = turns
    return places[index] == turns


_is_last = primitive(_put_last, None, name="is last", variadic=True)
_UPDATES = {"add": np.add, "multiply": np.multiply, "min": np.minimum, "max": np.maximum}


def _updated(a, x, *parts, index, how):
    a, index = np.array(a), _filled(index, parts)
    if how == "set":
        a[index] = x
    else:
        _UPDATES[how].at(a, index, x)
    return a


def _update_rule(wanted, g, out, operands, index, how):
    a, x, *parts = operands
    there, update = (functools.partial(f, index=index) for f in (_getitem, _update))
    slope = there(g * a if how == "multiply" else g, *parts)
    if how in ("set", "multiply"):
        others = tuple([i for i in _filled(index, parts) if getattr(i, "dtype", None) != np.bool_])  # than masks
        last = _is_plain(others) or _is_last(*parts, shape=np.shape(a), index=index)
        if how == "multiply" and not np.all(last):
            raise TypeError("at: multiply has no gradient where an index names an element twice")
        g, slope = update(g, 0.0 if how == "set" else x, *parts, how=how), _masked(last, slope)
    elif how != "add":
        hit, hits = (a == out) | np.isnan(a), (x == there(out, *parts)) | np.isnan(x)
        share = g / update(_masked(hit, np.ones_like(g)), hits, *parts, how="add")
        g, slope = _masked(hit, share), _masked(hits, there(share, *parts))
    return [g, slope, *[None] * len(parts)]


_update = primitive(_updated, _update_rule, name="update", joint=True, typed=(0, 1))


class _At:
    """`v.at[index]`: its methods give a new Value or Tensor, in which what is there is another; `v` stays as it is.

    x is a Value, Tensor, array or number that broadcasts to `v[index]`; the result has v's dtype, if that is floating.
    Gradients flow to both. Where an index names an element twice, the last one is set, and all count in the other ways;
    but then multiply has no gradient.
    """

    def __init__(self, array: Array, index=None):
        self.array, self.index = array, index

    def __getitem__(self, index):
        return _At(self.array, index if isinstance(index, tuple) else (index,))

    def _with(self, x, how: str):
        if self.index is None:
            raise TypeError(f"at: expected an index, as in v.at[0].{how}(x)")
        a, index = self.array, tuple(map(_index_part, self.index))
        x, parts = x if isinstance(x, Array) else _constant(x, "at"), [i for i in index if isinstance(i, Array)]
        strong = _WEAK_TYPES.isdisjoint(map(type, map(_raw, (a, x))))
        if strong and a.dtype.kind == "f" and x.dtype != a.dtype:
            x = _as_dtype(x, a.dtype)
        return _update(a, x, *parts, index=tuple([_HOLE if isinstance(i, Array) else i for i in index]), how=how)

    def set(self, x: Any):
        """x is there."""
        return self._with(x, "set")

    def add(self, x: Any):
        """x is added to what is there."""
        return self._with(x, "add")

    def multiply(self, x: Any):
        """What is there is multiplied by x."""
        return self._with(x, "multiply")

    def min(self, x: Any):
        """What is there, or x, if that is smaller; a tie shares the gradient equally."""
        return self._with(x, "min")

    def max(self, x: Any):
        """What is there, or x, if that is larger; a tie shares the gradient equally."""
        return self._with(x, "max")


Array.at = property(_At, doc=_At.__doc__)


@composed(np.take)
def take(a, indices, axis=None):
    indices = _index_array(indices)
    if getattr(getattr(indices, "dtype", None), "kind", "i") == "b":
        raise TypeError("take: indices must be integers, got booleans")
    if type(_raw(a)) in _WEAK_TYPES and not np.ndim(indices):
        np.take(0.0, _raw(indices), axis)  # NumPy's own checks and errors
        return np.copy(a)
    taken = _along(ravel(a) if axis is None or not np.ndim(a) else a, axis or 0, indices)
    return taken if np.ndim(indices) else np.copy(taken)  # NumPy's is no view


@_numpys
def take_along_axis(arr, indices, axis=-1):
    arr, axis = (np.ravel(arr), 0) if axis is None else (arr, _axis(axis, arr))
    if np.ndim(indices) != np.ndim(arr):
        raise ValueError(f"take_along_axis: indices of shape {np.shape(indices)} for {np.shape(arr)}")
    where = list(np.ogrid[tuple(slice(n) for n in np.shape(arr))])
    where[axis] = indices
    return arr[tuple(where)]


@_numpys
def sort(a, axis=-1, kind=None, order=None, *, stable=None):
    if kind or order:
        np.sort(_little(a), axis, kind, order, stable=stable)  # NumPy's own checks and errors
    a, axis = (np.ravel(a), 0) if axis is None else (a, _axis(axis, a))
    return take_along_axis(a, np.argsort(a, axis), axis)


# --- order statistics ---


def _ranks(rows, q, method, skip):
    """The places of quantiles in sorted rows, where a fraction is between two. NumPy says where, by the quantiles of 0,
    1, 2, ...; in a row with nans, it is among those that are none, or unless they are to be skipped, the last place."""
    length = rows.shape[-1]
    counts = np.asarray(length - np.count_nonzero(np.isnan(rows), axis=-1))
    places = np.full((*counts.shape, len(q)), length - 1.0)
    for count in np.unique(counts):
        if count == length or (skip and count):
            places[counts == count] = np.quantile(np.arange(count), q, method=method)
    return places


_ranked = primitive(_ranks, None, name="ranks of quantiles")


def _quantiles(prefix):
    """Enters the functions that give quantiles: of the sorted, each is one, or between two."""

    def rule(g, out, a, q, axis=None, method="linear", keepdims=False):
        if not np.size(a):
            return np.zeros_like(a)
        rows, back = _rows(a, axis)
        if prefix and isinstance(axis, tuple) and len(axis) != 1 and np.ndim(q) > 1 < np.ndim(rows):
            raise TypeError("q must have one dimension where axis is a tuple: NumPy mixes up the axes of the result")
        q = np.ravel(q).tolist()
        place = _ranked(rows, q=q, method=method, skip=bool(prefix))
        g, part = np.moveaxis(np.reshape(g, (len(q), *np.shape(rows)[:-1])), 0, -1), np.remainder(place, 1.0)
        between = _as_dtype(np.concatenate([np.floor(place), np.ceil(place)], -1), np.dtype(int))
        *where, _ = np.ogrid[tuple(map(slice, np.shape(between)))]
        origins = np.take_along_axis(np.argsort(rows, -1), between, -1)
        shares = np.concatenate([g * (1.0 - part), g * part], -1)
        return back(_scatter(shares, origins, shape=np.shape(rows), index=(*where, _HOLE)))

    primitive(getattr(np, f"{prefix}quantile"), rule)
    primitive(
        getattr(np, f"{prefix}percentile"),
        lambda g, out, a, q, axis=None, method="linear", keepdims=False: rule(
            g, out, a, np.divide(q, 100), axis, method
        ),
    )
    primitive(getattr(np, f"{prefix}median"), lambda g, out, a, axis=None, keepdims=False: rule(g, out, a, 0.5, axis))


_quantiles("")
_quantiles("nan")

_distinct = primitive(
    lambda ar, part, axis, equal_nan: np.unique(ar, True, True, True, axis, equal_nan=equal_nan)[part],
    None,
    name="unique",
)


@_numpys
def unique(
    ar, return_index=False, return_inverse=False, return_counts=False, axis=None, *, equal_nan=True, sorted=True
):
    """`np.unique`; the gradient of each goes to where it is first."""

    def found(part):
        return _distinct(ar, part=part, axis=axis, equal_nan=equal_nan)

    wanted = [found(i) for i, asked in enumerate((return_index, return_inverse, return_counts), 1) if asked]
    values = np.take(ar, found(1), axis)
    return (values, *wanted) if wanted else values


def _of_sets(function):
    """Enters a function of two sets of numbers: the gradient of each goes to where it is first, in a before b."""

    def first_places(a, b, **params):
        values, places = np.unique(np.concatenate([np.ravel(a), np.ravel(b)]), return_index=True)
        return places[np.searchsorted(values, function(a, b, **params))]

    found = primitive(first_places, None, None, name=f"places of {function.__name__}")

    def both(ar1, ar2):  # a number takes the dtype of an array
        return ar1 if function is np.setdiff1d and np.ndim(ar1) else np.append(ar1, ar2)

    composed(function)(lambda ar1, ar2, **params: np.take(both(ar1, ar2), found(ar1, ar2, **params)))


for _function in (np.union1d, np.intersect1d, np.setdiff1d, np.setxor1d):
    _of_sets(_function)


@_numpys
def nonzero(a):
    if not np.ndim(a):
        raise ValueError("nonzero: a must have at least one dimension, got a number")
    return tuple(np.transpose(np.argwhere(a)))


# --- counting, and statistics ---

_bincount = primitive(
    lambda *arrays, minlength: np.bincount(*arrays, minlength=minlength),
    lambda i, g, out, arrays, minlength: g[arrays[0]] if i else None,
    name="bincount",
    variadic=True,
    typed=(),
)


@_numpys
def histogram(a, bins=10, range=None, density=None, weights=None):
    """`np.histogram`, also with differentiable weights; no gradient flows to a, nor through the edges."""
    edges = np.histogram_bin_edges(a, bins=bins, range=range)
    ends = np.concatenate([edges[:-1], np.nextafter(edges[-1:], np.inf)])  # the last bin has its upper end, too
    weights = weights if weights is None else np.ravel(weights)
    counts = np.bincount(np.digitize(np.ravel(a), ends), weights, len(ends) + 1)[1:-1]
    if weights is not None:
        counts = _as_dtype(counts, np.result_type(_raw(weights)))
    return (counts / np.sum(counts) / np.diff(edges) if density else counts), edges


@_numpys
def trapezoid(y, x=None, dx=1.0, axis=-1):
    y = np.moveaxis(y, axis, -1)
    if x is not None:
        dx = np.diff(np.moveaxis(x, axis, -1) if np.ndim(x) > 1 else x)
    return np.sum(dx * (y[..., 1:] + y[..., :-1]) / 2.0, axis=-1)


@_numpys
def cov(m, y=None, rowvar=True, bias=False, ddof=None, fweights=None, aweights=None):
    """`np.cov`, also with differentiable aweights; in double precision, as NumPy's."""
    x = np.concatenate([np.atleast_2d(z if rowvar else np.transpose(z)) for z in (m, y) if z is not None])
    x = _as_dtype(x, np.result_type(_raw(x), np.float64))
    plain = [w if w is None else _fetched(_raw(w)) for w in (fweights, aweights)]
    np.cov(np.ones(x[:1].shape), None, True, bias, ddof, *plain)  # NumPy's own checks and errors
    w = [_as_dtype(w, x.dtype) for w in (fweights, aweights) if w is not None]
    w = math.prod(w, start=np.ones(x.shape[1:]))
    total, ddof = np.sum(w), (not bias) if ddof is None else ddof
    lost = ddof if aweights is None or not ddof else ddof * np.sum(w * aweights) / total
    x = x - np.sum(x * w, axis=1, keepdims=True) / total
    return np.squeeze(np.matmul(x * w, _t(x)) / np.maximum(total - lost, 0))


@_numpys
def corrcoef(x, y=None, rowvar=True):
    c = np.cov(x, y, rowvar)
    scale = np.sqrt(np.diagonal(np.atleast_2d(c)))
    return np.clip(c / np.squeeze(np.outer(scale, scale)), -1.0, 1.0)


# --- partition, and choices ---


def _partition_a(g, out, a, kth, axis=-1):
    ordered, ranks = np.take_along_axis(g, np.argsort(out, axis), axis), np.argsort(np.argsort(a, axis), axis)
    return np.reshape(np.take_along_axis(ordered, ranks, axis), np.shape(a))


primitive(np.partition, _partition_a)


@_numpys
def choose(a, choices, mode="raise"):
    n = len(choices)
    np.choose(_fetched(_raw(a)), [True] * n, mode=mode)  # NumPy's own checks and errors
    a = np.remainder(a, n) if mode == "wrap" else np.clip(a, 0, n - 1)
    return np.select([np.equal(a, i) for i in range(n)], choices, choices[0])


@_numpys
def select(condlist, choicelist, default=0):
    if not 0 < len(condlist) == len(choicelist):
        raise ValueError(f"np.select: expected one choice per condition, got {len(choicelist)} for {len(condlist)}")
    *choicelist, default = _together([*choicelist, default])
    for condition, choice in zip(condlist[::-1], choicelist[::-1]):
        default = np.where(condition, choice, default)
    return default


@_numpys
def piecewise(x, condlist, funclist, *args, **kw):
    """`np.piecewise`: each function sees the elements where its condition holds, and only there do gradients flow."""
    alone = not np.iterable(condlist) or (np.ndim(x) and not np.ndim(condlist[0]))
    masks = [np.not_equal(mask, 0) for mask in ([condlist] if alone else condlist)]
    if len(funclist) == len(masks) + 1:
        masks.append(np.logical_not(functools.reduce(np.logical_or, masks)))
    if len(funclist) != len(masks):
        raise ValueError(f"np.piecewise: expected a function per condition, got {len(funclist)} for {len(masks)}")
    out = _wrap(_filled_like(_raw(x), 0))  # not raw, or it would take the dtype of what is put in
    for mask, of in zip(masks, funclist):
        out = out.at[mask].set(of(x[mask], *args, **kw) if callable(of) else of)
    return out if out.dtype == x.dtype else _as_dtype(out, x.dtype)


# --- moving elements ---


def _tile_x(g, out, A, reps):
    shape = (1,) * (np.ndim(g) - np.ndim(A)) + np.shape(A)
    spread = np.reshape(g, [k for n, total in zip(shape, np.shape(g)) for k in (total // max(n, 1), n)])
    return np.reshape(np.sum(spread, axis=tuple(range(0, 2 * np.ndim(g), 2))), np.shape(A))


# Of these, the gradient is the same movement backwards.
primitive(np.tile, _tile_x)
primitive(np.flip, lambda g, out, m, axis=None: np.flip(g, axis))
primitive(np.roll, lambda g, out, a, shift, axis=None: np.roll(g, np.negative(shift).tolist(), axis))
primitive(np.rot90, lambda g, out, m, k=1, axes=(0, 1): np.rot90(g, -k, axes))
primitive(np.triu, lambda g, out, m, k=0: np.triu(g, k))
primitive(np.tril, lambda g, out, m, k=0: np.tril(g, k))


def _origins(function):
    """The gradient of a function that only moves elements of an array, or fills in zeros: each goes back to where it
    came from. Where that is, the function says itself, applied to the places, which are numbered from 1."""

    def places(shape, **params):
        moved = function(np.arange(1, math.prod(shape) + 1).reshape(shape), **params).ravel()
        known = np.flatnonzero(moved)
        return known, moved[known] - 1

    kept: dict = {}

    def rule(*args, **params):
        g, _, a = args
        if _lazy(g):
            raise TypeError(f"{function.__name__}: no gradient flows back to an array of {type(_raw(g)).__module__}")
        n, key = math.prod(np.shape(a)), (np.shape(a), repr(params))  # where a truth is no number
        found = kept.get(key) or places(np.shape(a), **params)
        if math.prod(np.shape(g)) < 1 << 16 and "..." not in key[1]:  # else an array of many numbers
            if len(kept) >= 32:
                kept.clear()
            kept[key] = found
        known, origins = found
        return np.reshape(_scatter(np.ravel(g)[known], shape=(n,), index=(origins,)), np.shape(a))

    return rule


for _function in (np.repeat, np.diagonal, np.diagflat, np.resize, np.delete, np.fft.fftshift, np.fft.ifftshift):
    primitive(_function, _origins(_function))
_from_diagonal = TABLE[np.diagonal].vjps[0]
primitive(np.diag, lambda g, out, v, k=0: np.diagonal(g, k) if np.ndim(v) == 1 else _from_diagonal(g, out, v, offset=k))


@_numpys
def insert(arr, obj, values, axis=None):
    """`np.insert`: of both arrays in a row, the elements that it takes when it is given their places."""
    arr, values = _together((arr, values))
    places, others = (np.arange(np.size(x)).reshape(np.shape(x)) for x in (arr, values))
    places = np.insert(places, _public_index(obj), np.size(arr) + others, axis)
    return concatenate([arr, _as_dtype(values, arr.dtype)], None)[places]


@_numpys
def apply_along_axis(func1d, axis, arr, *args, **kwargs):
    rows, first = np.moveaxis(arr, axis, -1), _axis(axis, arr)
    others = np.shape(rows)[:-1]
    results = np.stack([func1d(rows[i], *args, **kwargs) for i in np.ndindex(others)])
    n = np.ndim(results) - 1
    return np.moveaxis(np.reshape(results, others + np.shape(results)[1:]), range(-n, 0), range(first, first + n))


@_numpys
def apply_over_axes(func, a, axes):
    for axis in _axes(a, axes):
        reduced = func(a, axis)
        a = reduced if np.ndim(reduced) == np.ndim(a) else np.expand_dims(reduced, axis)
    return a


def _steps(num, endpoint, ndim):
    """How far each of so many numbers is on the way from the first to the last, for ends of ndim dimensions."""
    return np.linspace(0.0, 1.0, num, endpoint).reshape(-1, *[1] * ndim)


@_numpys
def linspace(start, stop, num=50, endpoint=True, retstep=False, *, axis=0):
    """`np.linspace`, from both ends."""
    length = np.subtract(stop, start)
    if length.dtype.kind != "f":  # of whole numbers, it may have wrapped
        length = np.subtract(_floating(stop), _floating(start))
    part = _steps(num, endpoint, np.ndim(length))
    line = np.moveaxis(np.where(part == 1.0, stop, start + np.multiply(length, part)), 0, axis)
    if not retstep:
        return line
    step = np.linspace(0, 1, num, endpoint, True)[1]
    return line, step if np.isnan(step) else length * step


@_numpys
def logspace(start, stop, num=50, endpoint=True, base=10.0, *, axis=0):
    if np.ndim(base):
        start = np.broadcast_to(start, np.broadcast_shapes(*map(np.shape, (start, stop, base))))
        base = np.expand_dims(np.broadcast_to(base, np.shape(start)), axis)
    return np.power(base, np.linspace(start, stop, num, endpoint, axis=axis))


@_numpys
def geomspace(start, stop, num=50, endpoint=True, *, axis=0):
    start, stop = (_as_dtype(x, np.float64) for x in (start, stop))
    sign = np.sign(start)
    if not np.all(np.logical_and(sign, stop)):
        raise ValueError("np.geomspace: start and stop must not be 0")
    line = sign * np.exp(np.linspace(np.log(start * sign), np.log(stop * sign), num, endpoint))
    part = _steps(num, endpoint, np.ndim(line) - 1)
    return np.moveaxis(np.where(part == 0.0, start, np.where(part == 1.0, stop * sign * sign, line)), 0, axis)


composed(*_since("astype"))(lambda x, dtype, *, copy=True: x.astype(dtype))


def _pad_x(g, out, array, pad_width, mode="constant", constant_values=0):
    if mode != "constant" or isinstance(pad_width, dict):
        return _pad_back(g, out, array, pad_width=pad_width, mode=mode)
    before = np.broadcast_to(pad_width, (np.ndim(array), 2))[:, 0].tolist()
    return g[tuple([slice(start, start + n) for start, n in zip(before, np.shape(array))])]


_pad_back = _origins(np.pad)
_padded = primitive(np.pad, _pad_x)


@_numpys
def pad(array, pad_width, mode="constant", **values):
    """`np.pad`; linear_ramp as a line on either side, axis by axis."""
    if mode in "constant edge reflect symmetric wrap".split():
        return _padded(array, pad_width=pad_width, mode=mode, **values)
    if mode != "linear_ramp" or array.dtype.kind != "f":
        raise TypeError(f"np.pad: mode {mode!r} is not supported on a Value or Tensor of dtype {array.dtype}")
    np.pad(_little(array), pad_width, mode, **dict.fromkeys(values, 0))  # NumPy's own checks and errors
    widths, ends = (np.broadcast_to(x, (array.ndim, 2)) for x in (pad_width, values.get("end_values", 0)))
    ends = ends if isinstance(ends, Value) else ends.tolist()
    for axis, width in enumerate(widths.tolist()):
        if not any(width):
            continue
        left, right = (
            np.linspace(ends[axis][i], _along(array, axis, -i), width[i], endpoint=False, axis=axis) for i in range(2)
        )
        array = _concatenate(left, array, np.flip(right, axis), axis=axis)
    return array


def _window_x(g, out, x, window_shape, axis=None):
    total, axes = 0.0, _axes(x, axis)
    for offset in np.ndindex(*np.shape(g)[np.ndim(x) :]):  # one shifted copy of g per place in the window
        start = np.zeros(np.ndim(x), int)
        np.add.at(start, list(axes), offset)
        index = tuple(map(slice, start.tolist(), (start + np.shape(g)[: np.ndim(x)]).tolist()))
        total = total + _scatter(g[(Ellipsis,) + offset], shape=np.shape(x), index=index)
    return total


primitive(np.lib.stride_tricks.sliding_window_view, _window_x)


def _diff_a(g, out, a, n, axis):
    ends = [(n * (i == axis),) * 2 for i in range(np.ndim(a))]
    return (-1.0) ** n * np.diff(np.pad(g, ends), n, axis)


_diff = primitive(lambda a, n, axis: np.diff(a, n, axis), _diff_a, name="diff")


@_numpys
def diff(a, n=1, axis=-1, prepend=None, append=None):
    if n < 0:
        raise ValueError(f"diff: n must not be negative, got {n}")
    if not n:
        return a  # without the ends: so it is in NumPy
    axis, one = _axis(axis, a), list(np.shape(a))
    one[axis] = 1
    parts = [x for x in (prepend, a, append) if x is not None]
    if len(parts) > 1:
        a = _concatenate(*[x if np.ndim(x) else np.broadcast_to(x, tuple(one)) for x in _together(parts)], axis=axis)
    return _diff(a, n=min(n, np.shape(a)[axis]), axis=axis)


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
    if y.ndim <= 2 < x.ndim:  # one product over the whole batch instead of a batch of products to sum
        rows = math.prod(np.shape(x)[:-1])
        x, g = np.reshape(x, (rows, np.shape(x)[-1])), np.reshape(g, (rows, *np.shape(y)[1:]))
    return _matmul(x.swapaxes(-1, -2), g)


TABLE[np.matmul] = TABLE[np.linalg.matmul] = primitive(_matmul, _matmul_x, _matmul_y, name="matmul", reads="operands")


def _dense_forward(x, w, b, activation=None):
    out = _matmul(x, w)
    buffer = out if type(out) is np.ndarray and out.dtype is b.dtype else None
    out = np.add(out, b, out=buffer)
    return activation.forward(out, out=buffer) if activation else out


def _dense_rule(wanted, g, out, operands, activation=None):
    x, w, b = operands
    g = activation.vjps[0](g, out, None) if activation else g
    return wanted[0] and _matmul_x(g, out, x, w), wanted[1] and _matmul_y(g, out, x, w), _summed(g, b)


# activation(x @ w + b) in one buffer where three operations have three, of which no rule reads two: half the memory of
# a large layer. `activation` is a primitive that reads its result only, or None; `optimize` makes it three again.
_dense = primitive(
    _dense_forward,
    _dense_rule,
    name="dense layer",
    joint=True,
)


@_numpys
def dot(a, b):
    if 0 in (np.ndim(a), np.ndim(b)):
        return a * b
    return a @ b if np.ndim(b) <= 2 else tensordot(a, b, (-1, -2))


@_numpys
def vdot(a, b):
    if np.ndim(a) == np.ndim(b) == 0:
        return a * b
    return np.matmul(*map(np.ravel, _together((a, b))))


@composed(np.vecdot, np.linalg.vecdot)
def vecdot(x1, x2, axis=-1):
    x1, x2 = np.moveaxis(x1, axis, -1), np.moveaxis(x2, axis, -1)
    return np.matmul(np.expand_dims(x1, -2), np.expand_dims(x2, -1))[..., 0, 0]


composed(*_since("matvec"))(lambda x1, x2: np.matmul(x1, np.expand_dims(x2, -1))[..., 0])
composed(*_since("vecmat"))(lambda x1, x2: np.matmul(np.expand_dims(x1, -2), x2)[..., 0, :])


_cross = primitive(np.cross, lambda g, out, a, b: _cross(b, g), lambda g, out, a, b: _cross(g, a))


@_numpys
def cross(a, b, axisa=-1, axisb=-1, axisc=-1, axis=None):
    ends = (axisa, axisb, axisc) if axis is None else (axis,) * 3
    a, b = np.moveaxis(a, ends[0], -1), np.moveaxis(b, ends[1], -1)
    if not np.shape(a)[-1] == np.shape(b)[-1] == 3:
        raise TypeError(f"np.cross: expected vectors of 3 numbers, got arrays of shapes {np.shape(a)}, {np.shape(b)}")
    return np.moveaxis(_cross(a, b), -1, ends[2])


def _convolve_a(g, out, a, v, mode="full"):
    missing = np.size(a) + np.size(v) - 1 - np.size(g)  # of the full convolution
    full = np.pad(g, (missing // 2, missing - missing // 2))
    return np.reshape(np.convolve(full, np.flip(v), "valid"), np.shape(a))


primitive(np.convolve, _convolve_a, lambda g, out, a, v, mode="full": _convolve_a(g, out, v, a))


@_numpys
def correlate(a, v, mode="valid"):
    if np.size(a) < np.size(v):
        return np.flip(np.correlate(v, a, mode))
    return np.convolve(a, np.flip(v), mode)


@_numpys
def kron(a, b):
    if not (np.ndim(a) and np.ndim(b)):
        return np.multiply(a, b)
    ndim = max(np.ndim(a), np.ndim(b))
    a, b = (np.reshape(x, (1,) * (ndim - np.ndim(x)) + np.shape(x)) for x in _together((a, b)))
    s, t = string.ascii_letters[:ndim], string.ascii_letters[ndim : 2 * ndim]
    product = _einsum(a, b, subscripts=f"{s},{t}->{''.join(map(operator.add, s, t))}")
    return np.reshape(product, tuple(map(operator.mul, np.shape(a), np.shape(b))))


def _einsum_forward(*operands, subscripts):
    """`np.einsum`; with the plan that gets to BLAS, which takes a while, where numbers are used many times over."""
    plan = len(operands) > 2
    if not plan and max([math.prod(np.shape(x)) for x in operands]) >= 1 << 10:
        lengths = dict(zip(subscripts.replace(",", ""), itertools.chain(*map(np.shape, operands))))
        sizes = [math.prod([lengths[c] for c in s]) for s in subscripts.replace("->", ",").split(",")]
        plan = math.prod(lengths.values()) > 2 * max(sizes)
    return np.einsum(subscripts, *operands, optimize=plan)


def _einsum_i(i, g, out, operands, subscripts):
    # The gradient of operand i is an einsum of g and the other operands; letters that only operand i has were summed
    # over: along these, it has length 1 here.
    inputs, output = subscripts.split("->")
    inputs = inputs.split(",")
    mine, others = inputs.pop(i), [output, *inputs]
    known = "".join([c for c in mine if any(c in other for other in others)])
    part = _einsum(g, *operands[:i], *operands[i + 1 :], subscripts=",".join(others) + "->" + known)
    lengths = dict(zip(known, np.shape(part)))
    return np.reshape(part, tuple([lengths.get(c, 1) for c in mine]))


def _diagonal_of(x, subscripts):
    lengths: dict = {}
    for letter, n in zip(subscripts, x.shape):
        if lengths.setdefault(letter, n) != n:  # NumPy may read beyond an empty array
            raise ValueError(f"einsum: {letter!r} names axes of different lengths in shape {x.shape}")
    return np.einsum(subscripts, x)


_einsum = primitive(_einsum_forward, _einsum_i, name="einsum", variadic=True)
_diagonals = primitive(_diagonal_of, _origins(_diagonal_of), name="diagonals")  # of axes that have the same letter


@functools.lru_cache(256)
def _spelled_out(subscripts: str, *ndims: int) -> tuple[list[str], str]:
    """The subscripts of operands of so many dimensions, and of the result, with letters for ellipses; what is not
    written is as NumPy has it."""
    ones = [np.ones((1,) * n) for n in ndims]
    np.einsum(subscripts, *ones)  # NumPy's own checks and errors
    inputs, output, _ = np._core.einsumfunc._parse_einsum_input((subscripts, *ones))  # type: ignore[attr-defined]
    return inputs.split(","), output


@_numpys
def einsum(subscripts, *operands, optimize=True):
    """`np.einsum` with a subscript string: explicit or implicit, with ellipses and repeated letters."""
    if not isinstance(subscripts, str):
        raise TypeError(f"einsum: subscripts must be a string on a Value or Tensor, got {type(subscripts).__name__}")
    inputs, output = _spelled_out(subscripts, *map(np.ndim, operands))
    letters = ["".join(dict.fromkeys(s)) for s in inputs]
    operands = [x if s == t else _diagonals(x, f"{s}->{t}") for x, s, t in zip(operands, inputs, letters)]
    return _einsum(*operands, subscripts=",".join(letters) + "->" + output)


@composed(np.tensordot, np.linalg.tensordot)
def tensordot(a, b, axes=2):
    axes = axes if isinstance(axes, Iterable) else (range(-axes, 0), range(axes))
    s, t = [*string.ascii_letters[: np.ndim(a)]], [*string.ascii_letters[::-1][: np.ndim(b)]]
    for i, j in zip(*map(_axes, (a, b), axes), strict=True):
        if np.shape(a)[i] != np.shape(b)[j]:
            raise ValueError(f"tensordot: axes {axes} do not match in shapes {np.shape(a)} and {np.shape(b)}")
        t[j] = s[i]
    out = [c for c in s + t if (c in s) != (c in t)]
    return _einsum(a, b, subscripts="".join([*s, ",", *t, "->", *out]))


# --- polynomials and interpolation ---


def _widened(x):
    """x in the dtype that NumPy gives it beside whole numbers: float32 becomes float64."""
    return _as_dtype(x, np.result_type(x.dtype, int))


@_numpys
def vander(x, N=None, increasing=False):
    np.vander(_little(x), N)  # NumPy's own checks and errors
    powers = np.arange(len(x) if N is None else N)
    return np.expand_dims(_widened(x), 1) ** (powers if increasing else powers[::-1])


@_numpys
def polyval(p, x):
    out = np.zeros_like(x)
    for coefficient in p:
        out = out * x + coefficient
    return out


def _aligned(function):
    """A function of two polynomials, the shorter one with zeros in front."""

    def combine(a1, a2):
        n = max(np.size(a1), np.size(a2))
        return function(*(np.pad(np.atleast_1d(a), (n - np.size(a), 0)) for a in (a1, a2)))

    return combine


@_numpys
def polymul(a1, a2):
    trimmed = (np.trim_zeros(np.atleast_1d(a), "f") for a in (a1, a2))  # as in NumPy, where one zero stays
    return np.convolve(*(a if np.size(a) else np.zeros_like(a, shape=1) for a in trimmed))


@_numpys
def polyder(p, m=1):
    np.polyder(np.ones(np.shape(p)), m)  # NumPy's own checks and errors
    for _ in range(int(m)):
        p = _widened(p)[:-1] * np.arange(len(p) - 1, 0, -1)
    return p


@_numpys
def polyint(p, m=1, k=None):
    for constant in np.broadcast_to(0.0 if k is None else k, (m,)):
        p = np.append(_widened(p) / np.arange(np.size(p), 0, -1), constant)
    return p


@_numpys
def polyfit(x, y, deg, rcond=None, *, w=None):
    np.polyfit(_little(x), _little(y), deg, full=True)  # NumPy's own checks and errors
    left = np.vander(np.add(x, 0.0), int(deg) + 1)
    y = _as_dtype(y, left.dtype)
    if w is not None:
        left, y = left * np.expand_dims(w, 1), np.transpose(np.transpose(y) * w)
    scale = np.sqrt(np.sum(np.square(left), axis=0))
    return np.transpose(np.transpose(np.linalg.pinv(left / scale, rtol=_rtol(rcond, left)) @ y) / scale)


@_numpys
def gradient(f, *varargs, axis=None, edge_order=1):
    """`np.gradient`; where places are uneven, means of the slopes on both sides, weighted with the other's step."""
    axes, steps = _axes(f, axis), varargs or (1.0,)
    if len(steps) == 1 and not np.ndim(steps[0]):
        steps = steps * len(axes)
    if len(steps) != len(axes):
        raise TypeError(f"np.gradient: expected one number or a spacing for each of the axes {axes}, got {len(steps)}")
    whole = np.result_type(_raw(f)).kind in "iu"  # masks have no difference, as NumPy says
    f = _floating(f) if whole else f
    slopes = [_slopes(np.moveaxis(f, i, 0), step, edge_order) for i, step in zip(axes, steps)]
    slopes = tuple([np.moveaxis(slope, 0, i) for slope, i in zip(slopes, axes)])
    return slopes[0] if len(axes) == 1 else slopes


def _slopes(f, step, edge_order):
    """The slopes along the first axis, given the places or the distance between them."""
    if edge_order > 2 or len(f) < 3 - (edge_order == 1) or np.shape(step) not in ((), (len(f),)):
        raise ValueError(f"np.gradient: {np.shape(step)} places for {len(f)} numbers, with edge_order {edge_order}")
    if np.ndim(step):
        h = np.expand_dims(np.diff(_floating(step)), tuple(range(1, np.ndim(f))))
        out = _blended(np.diff(f, axis=0) / h, h[1:] / (h[1:] + h[:-1]))
    else:
        out = _differences(f) / step
    if edge_order != 1:
        out = np.concatenate([_extended(out[:1], out[1:2]), out[1:-1], _extended(out[-1:], out[-2:-1])])
    return out


def _extended(end, inner):
    """The slope at an end, in line with that next to it; infinite slopes are no line."""
    return np.where(np.isinf(end), end, 2.0 * end - inner)


def _blend(x, before):
    """Means of what is before and behind each place, with the share of what is before; of opposite infinities, around
    one number that is infinite, the one with the larger share."""
    left, right = x[:-1], x[1:]
    opposite = np.isinf(left) & (left == -right)
    inner = np.where(opposite, left * (2.0 * before - 1.0), left * before + right * (1.0 - before))
    return np.concatenate([x[:1], inner, x[-1:]])


def _blended_x(g, out, x, before):
    inner = g[1:-1]
    return np.concatenate([inner * before, g[-1:]]) + np.concatenate([g[:1], inner * (1.0 - before)])


_blended = primitive(_blend, _blended_x, lambda g, out, x, before: g[1:-1] * (x[:-1] - x[1:]), name="blended slopes")


def _differences_x(g, out, x):
    half = np.concatenate([g[:1], g[1:-1] / 2.0, g[-1:]])
    return np.concatenate([-half[:1], half[:-1]]) - np.concatenate([half[1:], -half[-1:]])


_differences = primitive(lambda x: np.gradient(x, axis=0), _differences_x, name="even slopes")


@_numpys
def interp(x, xp, fp, left=None, right=None):
    """`np.interp`, in double precision, and weak of a weak number; where pieces meet, the slope is the right one's."""
    weak, (x, xp, fp) = type(_raw(x)) is float, (_as_dtype(a, np.float64) for a in (x, xp, fp))
    np.interp(0.0, *(np.zeros(np.shape(a)) for a in (xp, fp)))  # NumPy's own checks and errors
    within = np.clip(x, xp[0], xp[-1])
    i = np.maximum(np.searchsorted(xp, x, "right") - 1, 0)
    slopes = np.append(_over(np.diff(fp), np.diff(xp)), 0.0)
    start, level, slope = (_getitem(a, i, index=(_HOLE,)) for a in (xp, fp, slopes))
    out = level + slope * (within - start)
    out = np.where(x < xp[0], fp[0] if left is None else left, out)
    out = np.where(x > xp[-1], fp[-1] if right is None else right, out)
    return _as_dtype(out, float) if weak else out


# --- linear algebra; batches of matrices as NumPy has them ---


def _t(a):
    return np.swapaxes(a, -1, -2)


_solve = primitive(
    np.linalg.solve,
    lambda g, out, a, b: -np.matmul(_solve(_t(a), g), _t(out)),
    lambda g, out, a, b: _solve(_t(a), g),
)


@_numpys
def solve(a, b):
    """`np.linalg.solve`; a vector b, which may meet a batch of matrices, is a column."""
    return _solve(a, np.reshape(b, (-1, 1)))[..., 0] if np.ndim(b) == 1 else _solve(a, b)


def _half(n):
    """The share of what is twice symmetric that goes to the lower triangle, which stands for both."""
    return np.tri(n) - 0.5 * np.eye(n)


def _cholesky_a(g, out, a):
    # Murray 2016, "Differentiation of the Cholesky decomposition", eq. 9. NumPy reads the lower triangle only.
    half = _half(np.shape(a)[-1])
    s = np.linalg.solve(_t(out), _t(np.linalg.solve(_t(out), _t(np.matmul(_t(out), g) * half))))
    return _twice(s) * half


def _twice(a):
    """Twice the symmetric part of a matrix."""
    return a + _t(a)


primitive(np.linalg.inv, lambda g, out, a: -np.matmul(_t(out), np.matmul(g, _t(out))))
primitive(np.linalg.cholesky, _cholesky_a)


# The gradient of a determinant is the matrix of cofactors, det(a) * inv(a).T, which singular matrices have, too. With
# a = u @ diag(s) @ v, it is u @ diag(products of the other s) @ v, up to the signs of det(u) and det(v). A cofactor is
# also the determinant of what is left without a row and a column: so cofactors have derivatives of any order.


def _cofactors(a):
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        inverse = np.linalg.inv(a)
        squares = (np.einsum("...ij,...ij->...", x, x) for x in (a, inverse))  # of Frobenius' norms
        det = np.linalg.det(a)
        if np.all((math.prod(squares) <= 1 / np.finfo(inverse.dtype).eps) & (np.abs(det) >= np.finfo(det.dtype).tiny)):
            return det[..., None, None] * _t(inverse)
    finite = np.isfinite(a).all((-1, -2), keepdims=True)
    u, s, v = np.linalg.svd(np.where(finite, a, np.zeros_like(a)))
    sign = np.sign(np.linalg.det(u) * np.linalg.det(v))[..., None, None]
    return np.where(finite, sign * ((u * _others(s)[..., None, :]) @ v), np.nan)


def _cofactors_a(g, out, a):
    x, n = np.positive(a) if isinstance(a, Value) else _leaf(a), np.shape(a)[-1]
    rest = np.array([[j for j in range(n) if j != i] for i in range(n)], int).reshape(n, max(n - 1, 0))
    with _recording():
        minors = x[..., rest[:, None, :, None], rest[:, None, :]]
        cofactors = np.linalg.det(minors) * (-1.0) ** np.add.outer(range(n), range(n))
    return _backpropagate(cofactors, g, {x}, False, isinstance(a, Value))[x]


_cofactor = primitive(_cofactors, _cofactors_a, name="matrix of cofactors")
primitive(np.linalg.det, lambda g, out, a: np.expand_dims(g, (-1, -2)) * _cofactor(a))


def _logdet_a(g, out, a):
    try:
        slope = _t(np.linalg.inv(a))
    except np.linalg.LinAlgError:  # of a singular one, what is not 0 is infinite
        slope = _cofactor(a) / np.expand_dims(np.linalg.det(a), (-1, -2))
    return np.expand_dims(g, (-1, -2)) * slope


_logdet = primitive(lambda a: np.linalg.slogdet(a)[1], _logdet_a, name="logabsdet")
_signdet = primitive(lambda a: np.linalg.slogdet(a)[0], None, name="signdet")


@_numpys
def slogdet(a):
    return type(np.linalg.slogdet(np.eye(1)))(_signdet(a), _logdet(a))


_norm = primitive(
    lambda x, axis=None, keepdims=False: np.sqrt(np.sum(x * x, axis=axis, keepdims=bool(keepdims))),
    lambda g, out, x, axis=None, keepdims=False: (
        _unreduce(g, x, axis, keepdims) * _over(x, _unreduce(out, x, axis, keepdims))
    ),
    name="norm",
)


@_numpys
def norm(x, ord=None, axis=None, keepdims=False):
    """`np.linalg.norm`; its gradient at 0 is 0. That of a matrix is one of the sums of its rows or columns, or of its
    singular values."""
    if ord is not None or axis is not None:
        np.linalg.norm(_little(x), ord, axis)  # NumPy's own checks and errors
    x, axes = _floating(x), _axes(x, axis)
    if ord in (None, "fro") or len(axes) == 1:
        return _vector_norm(x, ord, axis=axis, keepdims=keepdims)
    x = np.moveaxis(x, axes, (-2, -1))
    if ord in (2, -2, "nuc"):
        sizes = np.linalg.svdvals(x)
    else:
        sizes = np.sum(np.abs(x), axis=-2 if abs(ord) == 1 else -1)
    out = _vector_norm(sizes, 1 if ord == "nuc" else math.copysign(np.inf, ord), axis=-1)
    return np.expand_dims(out, axes) if keepdims else out


def _vector_norm(x, ord, **kept):
    if kept["axis"] is not None:
        np.lib.array_utils.normalize_axis_tuple(kept["axis"], np.ndim(x))  # or it is an AxisError
    if ord in (None, "fro", 2):
        return _norm(x, **kept)
    if ord == 0:
        return np.sum(np.not_equal(x, 0), **kept).astype(x.dtype)
    if abs(ord) == np.inf and (ord < 0 or np.size(x)):
        return (np.max if ord > 0 else np.min)(np.abs(x), **kept)
    if ord == 1:
        return np.sum(np.abs(x), **kept)
    zero = np.equal(x, 0)
    total = np.sum(np.where(zero, math.inf if ord < 0 else 0.0, np.abs(np.where(zero, 1.0, x)) ** ord), **kept)
    some = np.not_equal(total, 0)
    return np.where(some, np.where(some, total, 1.0) ** (1.0 / ord), 0.0)


@_numpys
def vector_norm(x, *, axis=None, keepdims=False, ord=2):
    if isinstance(ord, str):
        np.linalg.norm(np.ones(1), ord)  # NumPy's own error
    return _vector_norm(_floating(x), ord, axis=axis, keepdims=keepdims)


# A decomposition is one primitive, whose parts lie side by side in one array: one rule gives the gradient of all.


def _decomposed(function, rule, name):
    """A function that gives NumPy's parts; rule(their gradients, parts, a) is the gradient of a."""
    named = type(function(np.eye(1)))

    @functools.lru_cache(64)
    def layout(*shape):
        shapes = [x.shape for x in function(np.eye(*shape))]
        ends = [0, *itertools.accumulate(map(math.prod, shapes))]
        return [(slice(start, end), shape) for start, end, shape in zip(ends, ends[1:], shapes)]

    def in_parts(joined, a):
        *stack, m, n = np.shape(a)
        return [np.reshape(joined[..., part], (*stack, *shape)) for part, shape in layout(m, n)]

    prim = primitive(
        lambda a: np.concatenate(
            [np.reshape(x, (*a.shape[:-2], math.prod(x.shape[a.ndim - 2 :]))) for x in function(a)], -1
        ),
        lambda g, out, a: rule(in_parts(g, a), in_parts(out, a), a),
        name=name,
    )
    return lambda a: named(*in_parts(prim(a), a))


def _gaps(s):
    """1 / (s[j] - s[i]) at i, j, for the numbers along the last axis; 0 if they are equal up to rounding."""
    gap = np.expand_dims(s, -2) - np.expand_dims(s, -1)
    tiny = 4 * np.shape(s)[-1] * np.finfo(s.dtype).eps * np.expand_dims(_peak(np.abs(s), -1), -1)
    return 1.0 / np.where(np.abs(gap) <= tiny, np.inf, gap)


def _eigh_a(g, out, a):
    # Giles 2008, "An extended collection of matrix derivative results", 3.1. NumPy reads one triangle only.
    (gw, gv), (w, v), n = g, out, np.shape(a)[-1]
    inner = _t(v) @ gv * _gaps(w) + np.expand_dims(gw, -1) * np.eye(n)
    return _twice(v @ inner @ _t(v)) * _half(n)


_eigh = {
    "L": _decomposed(np.linalg.eigh, _eigh_a, "eigh"),
    "U": _decomposed(lambda a: np.linalg.eigh(a, "U"), lambda g, out, a: _t(_eigh_a(g, out, a)), "eigh of upper"),
}


@_numpys
def eigh(a, UPLO="L"):
    if UPLO.upper() not in _eigh:
        raise ValueError(f"np.linalg.eigh: UPLO must be 'L' or 'U', got {UPLO!r}")
    return _eigh[UPLO.upper()](a)


def _svd_a(g, out, a):
    # Townsend 2016, "Differentiating the singular value decomposition", eqs. 8 to 20.
    (u, s, v), (gu, gs, gv) = out, g
    v, gv = _t(v), _t(gv)
    row, column = np.expand_dims(s, -2), np.expand_dims(s, -1)
    gaps, of_u, of_v = _over(_gaps(s), row + column), _t(u) @ gu, _t(v) @ gv
    inner = _twice(of_u * gaps) * row + column * _twice(of_v * gaps) + np.expand_dims(gs, -1) * np.eye(s.shape[-1])
    inverse = _over(1.0, row)
    outside = (gu - u @ of_u) * inverse @ _t(v) + u @ _t((gv - v @ of_v) * inverse)  # of the spaces of u and of v
    return u @ inner @ _t(v) + outside


_svd = _decomposed(lambda a: np.linalg.svd(a, full_matrices=False), _svd_a, "svd")


@_numpys
def svd(a, full_matrices=True, compute_uv=True):
    m, n = np.shape(a)[-2:]
    if compute_uv and full_matrices and m != n:
        raise TypeError(f"np.linalg.svd: of a matrix of shape {m, n}, only full_matrices=False has a gradient")
    return _svd(a) if compute_uv else _svd(a).S


def _qr_a(g, out, a):
    # Walter and Lehmann 2010, "Algorithmic differentiation of linear algebra functions with application in optimum
    # experimental design", 3.2. Columns beyond the rows have no part in q: there, r is q.T @ a.
    (gq, gr), (q, r), k = g, out, min(np.shape(a)[-2:])
    beyond, gr, r = gr[..., k:], gr[..., :k], r[..., :k]
    gq = gq + a[..., k:] @ _t(beyond)
    inner = r @ _t(gr) - _t(gq) @ q
    both = gq + q @ (np.tril(inner) + _t(np.tril(inner, -1)))
    return np.concatenate([_t(np.linalg.solve(r, _t(both))), q @ beyond], -1)


_qr = _decomposed(np.linalg.qr, _qr_a, "qr")


@_numpys
def qr(a, mode="reduced"):
    if mode not in ("reduced", "r"):
        raise TypeError(f"np.linalg.qr: mode {mode!r} is not supported on a Value or Tensor, only 'reduced' and 'r'")
    return _qr(a).R if mode == "r" else _qr(a)


def _pinv_a(g, out, a, rcond=None, rtol=None):
    # Golub and Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares problems", eq. 4.12.
    p, h = _t(out), _t(g)
    return (h - a @ (out @ h)) @ out @ p + p @ out @ (h - (h @ out) @ a) - p @ g @ p


primitive(np.linalg.pinv, _pinv_a)


def _rtol(rcond, a):
    """What `np.linalg.lstsq` takes a number for: one that is no share, for a's precision."""
    return rcond if rcond is None or 0 < rcond < 1 else np.finfo(a.dtype).eps


@_numpys
def lstsq(a, b, rcond=None):
    """`np.linalg.lstsq`, by the pseudo-inverse; the singular values have gradients, too, and the rank is plain."""
    a, (m, n) = _floating(a), np.shape(a)
    x = np.linalg.pinv(a, rtol=_rtol(rcond, a)) @ b
    rank = np.linalg.matrix_rank(_fetched(_raw(a)), rtol=_rtol(rcond, a)) if m * n else 0
    residuals = np.sum(np.reshape(np.square(b - a @ x), (m, math.prod(np.shape(b)[1:]))), axis=0)
    return x, residuals if rank == n < m else residuals[:0], rank, np.linalg.svdvals(a)


@_numpys
def matrix_power(a, n):
    np.linalg.matrix_power(np.empty((0,) * (np.ndim(a) > 1) + np.shape(a)), n)  # NumPy's own checks and errors
    a, n = (np.linalg.inv(a), -n) if n < 0 else (a, n)
    if n < 2:
        return np.where(n, a, np.eye(np.shape(a)[-1], dtype=a.dtype))
    half = np.linalg.matrix_power(a, n // 2)
    return half @ half @ a if n % 2 else half @ half


@_numpys
def multi_dot(arrays):
    """`np.linalg.multi_dot`: the product that sums over most comes first."""
    arrays = list(arrays)
    np.linalg.multi_dot(list(map(_little, arrays)))  # NumPy's own checks and errors
    while len(arrays) > 2:
        i = max(range(1, len(arrays)), key=lambda i: np.shape(arrays[i])[0])
        arrays[i - 1 : i + 1] = [arrays[i - 1] @ arrays[i]]
    return np.dot(*arrays)


@_numpys
def tensorsolve(a, b, axes=None):
    a = a if axes is None else np.moveaxis(a, axes, range(-len(axes), 0))
    return np.reshape(
        solve(np.reshape(a, (np.size(b), math.prod(np.shape(a)[np.ndim(b) :]))), np.ravel(b)), np.shape(a)[np.ndim(b) :]
    )


@_numpys
def tensorinv(a, ind=2):
    if ind <= 0:
        raise ValueError(f"np.linalg.tensorinv: ind must be positive, got {ind}")
    rows, columns = np.shape(a)[:ind], np.shape(a)[ind:]
    return np.reshape(np.linalg.inv(np.reshape(a, (math.prod(rows), -1))), columns + rows)


@_numpys
def cond(x, p=None):
    if p in (None, 2, -2):
        s = np.linalg.svdvals(x)
        out = s[..., -1] / s[..., 0] if p == -2 else s[..., 0] / s[..., -1]
    else:
        out = norm(x, p, (-2, -1)) * norm(np.linalg.inv(x), p, (-2, -1))
    return np.where(np.isnan(out) & ~np.any(np.isnan(x), axis=(-2, -1)), np.inf, out)  # as NumPy


# --- no gradient: nodes all the same, so that a replay recomputes them ---

for _count, _names in enumerate(
    (
        """logical_not invert isnan isfinite isinf signbit sign floor ceil rint trunc spacing bitwise_count any all
        argmax argmin argsort count_nonzero nanargmax nanargmin argpartition argwhere flatnonzero
        histogram_bin_edges""",
        """equal not_equal less less_equal greater greater_equal floor_divide logical_and logical_or logical_xor
        bitwise_and bitwise_or bitwise_xor gcd lcm left_shift right_shift searchsorted digitize isin""",
    ),
    1,
):
    for _name in _names.split():
        primitive(getattr(np, _name), *[None] * _count)
TABLE[np.fix] = TABLE[np.trunc]  # which NumPy 2.5 says is its name
for _function in (np.isposinf, np.isneginf, np.isreal, np.iscomplex, np.imag, np.angle):
    _elementwise(_function, None)
primitive(np.linalg.matrix_rank, None)
_lexsort = primitive(lambda *keys, axis=-1: np.lexsort(keys, axis), None, name="lexsort", variadic=True, typed=())
primitive(np.unwrap, lambda g, out, p, discont=None, axis=-1, period=math.tau: g)  # whatever jumps are taken out
TABLE[np.around] = _elementwise(np.round, None)
_elementwise(np.isclose, None, None)
_detach = _elementwise(lambda a: a, None, name="detach")


_finite = primitive(  # replaced elements have no gradient
    lambda x, **values: np.nan_to_num(x, **values),
    lambda g, out, x, nan=0.0, posinf=None, neginf=None: _masked(np.isfinite(x), g),
    name="nan_to_num",
)


@composed(np.nan_to_num)
def nan_to_num(x, copy=True, nan=0.0, posinf=None, neginf=None):
    if not copy:  # of a Tensor, NumPy does it
        raise TypeError("nan_to_num: a Value does not change in place; leave out copy=False")
    return _finite(x, nan=nan, posinf=posinf, neginf=neginf)


def _on_data(function):
    """A function whose answer is about shapes or a plain truth: it is computed on the data and no node."""
    return lambda *args, **kwargs: function(*map(_raw, args), **{k: _raw(v) for k, v in kwargs.items()})


for _name in "shape ndim allclose array_equal array_equiv result_type iscomplexobj isrealobj".split():
    TABLE[getattr(np, _name)] = _on_data(getattr(np, _name))
TABLE[np.size] = lambda a, axis=None: np.size(np.broadcast_to(0.0, np.shape(a)), axis)  # Dask does not offer it


def _like(function):
    """Enters zeros_like and its kin: an array, or a Python float for a weak scalar."""

    def like(a, *args, **kwargs):
        raw = _raw(a)
        fill = kwargs.get("fill_value", args[0] if args and function is np.full_like else None)
        if isinstance(fill, Value):
            kwargs.pop("fill_value", None)
            zeros = function(raw, 0, *args[1:], **kwargs)
            return np.broadcast_to(fill, zeros.shape).astype(zeros.dtype)
        out = function(raw, *map(_raw, args), **kwargs)
        if type(raw) is float and not kwargs:
            return float(out)
        return _public(out) if isinstance(a, Array) else out

    TABLE[function] = like


for _function in (np.zeros_like, np.ones_like, np.full_like, np.empty_like):
    _like(_function)


# --- where=, initial= and dtype= of reductions, and what is made of them ---


def _in_dtype(prim, a, dtype):
    """a in the dtype that a reduction was told to compute in."""
    if dtype is None:
        return a
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"{prim.name}: dtype must be floating, got {np.dtype(dtype)}")
    return _as_dtype(a, np.dtype(dtype))


def _keywords(prim, merge, neutral):
    """Enters what computes a reduction with keywords: to what is left out by where= it is as if it were `neutral`, and
    `merge` adds initial=."""

    @composed(prim)
    def reduction(a, *, dtype=None, initial=None, where=True, **params):
        a, fill = _in_dtype(prim, a, dtype), neutral
        if where is True and initial is None:
            return prim(a, **params)
        dtype = np.result_type(_raw(a))
        if dtype.kind != "f" and not (initial is None or isinstance(initial, Value)):
            initial = prim.forward(np.zeros(1, dtype)).dtype.type(initial)  # as NumPy does
        if merge in (np.maximum, np.minimum):
            if initial is None:
                raise ValueError(f"{prim.name}: where= needs initial=, as nothing may be left")
            params["initial"] = fill = neutral if dtype.kind == "f" else initial
        if where is not True:
            a = np.where(where, a, fill)
        out = prim(a, **params)
        return out if initial is None else merge(out, initial)


for _name, _merge, _neutral in (
    ("sum", np.add, 0),
    ("prod", np.multiply, 1),
    ("max", np.maximum, -np.inf),
    ("min", np.minimum, np.inf),
    ("any", np.logical_or, False),
    ("all", np.logical_and, True),
    ("cumsum", None, 0),
    ("cumprod", None, 1),
):
    _keywords(PRIMITIVES[_name], _merge, _neutral)


def _taken(a, where, **params):
    """How many elements a reduction takes together where it leaves out some."""
    return np.sum(np.broadcast_to(where, np.shape(a)), **params)


@composed(PRIMITIVES["mean"])
def mean(a, *, dtype=None, where=True, **params):
    single = _in_single(lambda a: np.sum(a, where=where, **params) / _taken(a, where, **params))
    return single(_in_dtype(PRIMITIVES["mean"], a, dtype))


def _deviating(prim):
    @composed(prim)
    def deviation(a, *, axis=None, dtype=None, ddof=0, keepdims=False, where=True):
        a = _floating(_in_dtype(prim, a, dtype))
        a = a - _detach(np.max(a, axis=axis, keepdims=True, initial=-np.inf, where=where))  # equal numbers become 0
        centred = np.where(where, a - np.mean(a, axis=axis, keepdims=True, where=where), 0)
        count = np.maximum(_taken(a, where, axis=axis, keepdims=keepdims) - ddof, 0)
        out = np.sum(np.square(centred), axis=axis, keepdims=keepdims)
        out = out / (count if isinstance(ddof, int) else _as_dtype(count, np.result_type(_raw(out))))
        flat = out == 0
        return out if prim.name == "var" else np.where(flat, out, np.sqrt(np.where(flat, 1.0, out)))


_deviating(PRIMITIVES["var"])
_deviating(PRIMITIVES["std"])


def _skipping_nan(name, **start):
    """Enters the twin of a function that leaves nan out, by where=; start: initial=, if it needs one for that."""
    function = TABLE[PRIMITIVES[name]]

    def skip(a, axis=None, *, where=True, **kwargs):
        if np.result_type(_raw(a)).kind != "f":
            return function(a, axis=axis, where=where, **kwargs)
        known = np.equal(a, a)
        where = known if where is True else np.logical_and(known, where)
        out = function(a, axis=axis, where=where, **start | kwargs)
        kept = {"axis": axis, "keepdims": kwargs.get("keepdims", False)}
        if "ddof" in kwargs:
            some = np.greater(_taken(a, where, **kept), kwargs["ddof"])
        elif start and "initial" not in kwargs:
            getattr(np, f"nan{name}")(_little(a), axis=axis)  # NumPy's own checks and errors
            some = np.any(known, **kept)
        else:
            return out
        return np.where(some, out, np.nan)

    TABLE[getattr(np, f"nan{name}")] = skip


for _name in "sum prod mean var std cumsum cumprod".split():
    _skipping_nan(_name)
_skipping_nan("max", initial=-np.inf)
_skipping_nan("min", initial=np.inf)


def _along_first(function):
    """A function along the first axis unless another is given, as methods of ufuncs have it."""

    def along_first(array, axis=0, **params):
        return function(array, axis=axis, **{name: x for name, x in params.items() if x is not None})

    return along_first


def _cumulative(scan, first):
    """A scan of the array API standard, which may begin with what there is before the first element."""

    def cumulative(x, *, axis=None, dtype=None, include_initial=False):
        if axis is None and np.ndim(x) > 1:
            raise ValueError(f"cumulative: axis must be given for shape {np.shape(x)}")
        x = np.atleast_1d(x)
        axis = _axis(axis or 0, x)
        out = scan(x, axis=axis, dtype=dtype)
        return np.pad(out, [(i == axis, 0) for i in range(x.ndim)], constant_values=first) if include_initial else out

    return cumulative


composed(*_since("cumulative_sum"))(_cumulative(np.cumsum, 0))
composed(*_since("cumulative_prod"))(_cumulative(np.cumprod, 1))

# The methods of ufuncs that apply them again and again.
for _ufunc, _reduction, _accumulation in (
    (np.add, np.sum, np.cumsum),
    (np.multiply, np.prod, np.cumprod),
    (np.maximum, np.max, _scan(np.maximum)),
    (np.minimum, np.min, _scan(np.minimum)),
    (np.logaddexp, logsumexp, _scan(np.logaddexp)),
):
    TABLE[_ufunc.reduce], TABLE[_ufunc.accumulate] = _along_first(_reduction), _along_first(_accumulation)


# --- compositions that take a line ---

for _function, _composition in {
    np.divmod: lambda x, y: (np.floor_divide(x, y), np.remainder(x, y)),
    np.ptp: lambda a, *args, **kwargs: np.max(a, *args, **kwargs) - np.min(a, *args, **kwargs),
    np.stack: lambda arrays, axis=0: _stack(*arrays, axis=axis),
    np.append: lambda arr, values, axis=None: concatenate([arr, values], axis),
    np.vstack: _joining(np.atleast_2d, 0),
    np.hstack: _joining(np.atleast_1d, 1),
    np.dstack: _joining(np.atleast_3d, 2),
    np.column_stack: _joining(lambda a: a if np.ndim(a) > 1 else _reshape(a, (-1, 1)), 1),
    np.broadcast_arrays: lambda *args: tuple(
        [np.broadcast_to(x, np.broadcast_shapes(*map(np.shape, args))) for x in args]
    ),
    np.meshgrid: lambda *xi, **options: tuple(
        map(np.take, xi, np.meshgrid(*[np.arange(np.size(x)) for x in xi], **options))
    ),
    np.fliplr: lambda m: np.flip(m, 1),
    np.flipud: lambda m: np.flip(m, 0),
    np.trace: lambda a, offset=0, axis1=0, axis2=1: np.sum(np.diagonal(a, offset, axis1, axis2), axis=-1),
    np.linalg.trace: lambda x, *, offset=0: np.trace(x, offset, -2, -1),
    np.linalg.diagonal: lambda x, *, offset=0: np.diagonal(x, offset, -2, -1),
    **dict.fromkeys(
        (np.compress, np.extract), lambda condition, a, axis=None: np.take(a, np.flatnonzero(condition), axis)
    ),
    np.ediff1d: lambda ary, to_end=None, to_begin=None: concatenate(
        [x for x in (to_begin, np.ravel(ary)[1:] - np.ravel(ary)[:-1], to_end) if x is not None], None
    ),
    np.bincount: lambda x, weights=None, minlength=0: _bincount(
        x, *([] if weights is None else [weights]), minlength=minlength
    ),
    np.lexsort: lambda keys, axis=-1: _lexsort(*keys, axis=axis),
    np.inner: lambda a, b: dot(a, _t(b) if np.ndim(a) and np.ndim(b) > 1 else b),
    np.linalg.cross: lambda x1, x2, *, axis=-1: np.cross(x1, x2, axis=axis),
    np.linalg.outer: lambda x1, x2: einsum("i,j->ij", x1, x2),
    np.outer: lambda a, b: np.multiply(*map(_reshape, _together((a, b)), ((-1, 1), (1, -1)))),
    np.polyadd: _aligned(np.add),
    np.polysub: _aligned(np.subtract),
    np.linalg.matrix_norm: lambda x, *, keepdims=False, ord="fro": norm(x, ord, (-2, -1), keepdims),
    np.linalg.eigvalsh: lambda a, UPLO="L": eigh(a, UPLO).eigenvalues,
    np.linalg.svdvals: lambda x: svd(x, False).S,
}.items():
    composed(_function)(_composition)


# --- operators and methods of both classes, all from the table ---


_OPERANDS = (Array, np.ndarray, np.generic, int, float, list, tuple)


def _is_operand(x) -> bool:
    return isinstance(x, _OPERANDS) or KINDS[type(x)] is not None


def _value_operator(prim: Primitive, swapped=False):
    scalar, differentiable, cls, new = prim.scalar, prim.vjps[0] is not None, Value, object.__new__
    forward, ndarray = prim.forward, np.ndarray

    def method(self, other):
        x, kind = self._held, type(other)
        if kind is cls:  # this copy's, also after a reload
            y = other._held
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
                pass  # to what NumPy says
            else:
                node = new(cls)
                node._held = out
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
        if y is None and not _is_operand(other):
            return NotImplemented
        return _apply(prim, args, _NO_PARAMS)

    return method


def _value_function(prim: Primitive):
    """A method without arguments: the same path for functions of one number."""
    scalar, differentiable, cls, new = prim.scalar, prim.vjps[0] is not None, Value, object.__new__

    def method(self):
        if type(self._held) is float and _mode.recording:
            try:
                out = scalar(self._held)
            except (ArithmeticError, ValueError):
                return _apply(prim, (self,), _NO_PARAMS)
            node = new(cls)
            node._held, node._grad, node._prim, node._x, node._y = out, None, prim, self, None
            node._needs, node._number, node.label = differentiable and self._needs, _next_number(), ""
            return node
        return _apply(prim, (self,), _NO_PARAMS)

    return method


def _tensor_operator(prim: Primitive, swapped=False):
    forward, ndarray = prim.forward, np.ndarray

    def method(self, other):
        x, kind = self._held, type(other)
        if kind is Value:
            return NotImplemented
        if kind is int and type(x) not in _WEAK_TYPES and x.dtype.kind == "f":
            other, kind = float(other), float
        if type(x) is ndarray and x.size < HOOK.limit:
            # What `_apply` would do for small arrays, spelled out: there, its checks cost more than the arithmetic.
            y, alike = other, kind is float
            if kind is Tensor and other._choice is self._choice:
                y = other._held
                alike = type(y) is ndarray and y.dtype is x.dtype and y.size <= x.size
            if alike:
                out = _new(Tensor)
                out._held, out._choice, out._owner = forward(y, x) if swapped else forward(x, y), self._choice, None
                return out
        if not _is_operand(other):
            return NotImplemented
        out = _apply(prim, (other, self) if swapped else (self, other), _NO_PARAMS)
        return np.bool_(out._held) if prim.ufunc and isinstance(out._held, (bool, np.bool_)) else out  # a plain truth

    return method


def _in_place_operator(prim: Primitive):
    """`t += x`: arrays are written to once the whole result is there; a 0-d Tensor is replaced, like a number."""

    def method(self, other):
        if isinstance(other, Value) or not _is_operand(other):
            return NotImplemented
        x = self._held
        if prim.ufunc and getattr(x, "size", 0) > _LITTLE and x.dtype.kind == "f" and _harmless(np.geterr()):
            # Where nothing can fail half-way, without an array in between.
            y = float(other) if type(other) is int else _raw(other)
            alike = type(y) is float or (getattr(y, "dtype", None) is x.dtype and y.shape == x.shape and not _lazy(y))
            if alike and KINDS[type(x)].update(prim, x, y):
                return self
        out = _apply(prim, (self, other), _NO_PARAMS)
        if not self.ndim and not out.ndim:
            return out
        if out.shape != self.shape:
            raise ValueError(f"Tensor: in place, shape {self.shape} cannot take a result of shape {out.shape}")
        if not np.can_cast(out.dtype, self.dtype, "same_kind"):
            raise TypeError(f"Tensor: in place, dtype {self.dtype} cannot take a result of dtype {out.dtype}")
        raw = KINDS[type(self._held)].write(self._held, out._held)
        if raw is not self._held:
            self._become(raw)
        return self

    return method


_LITTLE = 1 << 12  # elements up to which an array in between costs nothing


def _method(function, numpys):
    """A method; arguments that NumPy has in another order, or under names that are not the table's, it sorts out."""
    params, direct = set(getattr(function, "params", ())) - {"initial"}, math.inf
    if isinstance(function, Primitive) and function.operands and TABLE.get(numpys) is function:
        direct = len(function.operands) - 1
        names = _argument_names(numpys)[direct + 1 :]
        direct += sum(itertools.takewhile(bool, map(operator.eq, names, function.params)))

    def method(self, *args, **kwargs):
        if len(args) > direct or (kwargs and direct < math.inf and not kwargs.keys() <= params):
            return numpys(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    if not isinstance(numpys, np.ufunc):
        method.__wrapped__ = numpys or getattr(function, "forward", function)  # for help: with its signature
    return method


def _put_in(cls: type, name: str, method: Callable, like: str) -> None:
    """Gives a class a method under its name, with what NumPy says in short of its function of the name `like`."""
    about = getattr(np, like, None) or getattr(np.linalg, like, None)
    paragraphs = (about.__doc__ or like).strip().split("\n\n", 2)
    method.__doc__ = f"`{like}`, as a method." if about is None else paragraphs[isinstance(about, np.ufunc)]
    method.__name__, method.__qualname__ = name, f"{cls.__name__}.{name}"
    setattr(cls, name, method)


def _add_method(name: str, function: Any, like: str) -> None:
    _put_in(Array, name, _method(function, getattr(np, like, None)), like)
    if getattr(function, "scalar", None) and len(function.vjps) == 1:
        _put_in(Value, name, _value_function(function), like)


for _forward, (_name, _, _) in _OPERATORS.items():
    _prim, _in_place = TABLE[_forward], f"__i{_name}__"
    if len(_prim.vjps) == 1:
        _add_method(f"__{_name}__", _prim, _prim.name)
        continue
    for _class, _operator in ((Value, _value_operator), (Tensor, _tensor_operator)):
        _put_in(_class, f"__{_name}__", _operator(_prim), _prim.name)
        if hasattr(operator, _in_place):
            _put_in(_class, f"__r{_name}__", _operator(_prim, swapped=True), _prim.name)
    if hasattr(operator, _in_place):
        _put_in(Tensor, _in_place, _in_place_operator(_prim), _prim.name)

for _prim in PRIMITIVES.values():
    _prim.builtin = True

# Methods: every primitive that takes its operands one by one, and the compositions that ndarray has as methods.
for _key, _function in list(TABLE.items()):
    _name = getattr(_function, "name", None) or getattr(_key, "__name__", "")
    if hasattr(np.ndarray, _name) or getattr(_function, "operands", None):
        if _name.isidentifier() and _name not in vars(Array):
            _add_method(_name, _function, _name)


def _sort(self, axis=-1, kind=None, order=None, *, stable=None):
    if isinstance(self, Value):
        raise TypeError("sort: a Value does not change in place; use np.sort")
    self[...] = np.sort(self, axis, kind, order, stable=stable)


_put_in(Array, "sort", _sort, "sort")
_put_in(Array, "compress", lambda self, condition, axis=None: np.compress(condition, self, axis), "compress")
_put_in(Array, "pad", pad, "pad")
del Array.resize, Array.partition  # type: ignore[attr-defined] # an array's own ones change it


# ---------------------------------------------------------------------------------------------------------------------
# 6. nn
#
# Networks on Values: modules hold parameters, losses give the Value to call `backward` on, optimizers step. In:
# numbers, arrays, Tensors (a batch that a replay reads anew) or Values (gradients flow on to them). Also importable as
# the module `picograd.nn`. Invariant: a parameter stays the same Value; only its data and gradient change.
# ---------------------------------------------------------------------------------------------------------------------


def _understood(name: str, expected: str, function: Callable, x):
    """function(x), or an error that says which argument is wrong, what was expected and what came."""
    try:
        return function(x)
    except (TypeError, ValueError) as error:
        message = f"{name} must be {expected}, got {reprlib.repr(x)}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _positive(name: str, n) -> int:
    """A count that was passed, checked."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"{name} must be a positive integer, got {n!r}")
    return n


def _path(x, name: str):
    """A path that was passed, checked, as a `pathlib.Path`."""
    from pathlib import Path  # here, as few programs pass one: it makes importing this file take a half longer

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__}: to be called, it needs a method __call__ (not forward)")

    def named_parameters(self) -> Iterator[tuple[str, Value]]:
        """(dotted name, parameter), in order of definition, those in slots first, by name; a shared one once."""
        seen: dict[int, Any] = {}
        ahead: list[tuple[str, Any]] = [("", self)]  # a stack: containers may be deep, and may hold themselves
        while ahead:
            name, x = ahead.pop()
            if id(x) in seen:
                continue
            seen[id(x)] = x
            if isinstance(x, Value) and x._prim is None and x._needs:  # not a result that a module remembers
                yield name, x
            elif _of_another_copy(type(x)):
                raise TypeError(_two_copies(type(x)))
            elif isinstance(x, Module):
                x = {key: getattr(x, key, None) for key in _slots(type(x))} | vars(x)
            elif isinstance(x, (list, tuple)):
                x = dict(enumerate(x))
            if isinstance(x, dict):
                ahead += [(f"{name}.{key}" if name else str(key), part) for key, part in reversed([*x.items()])]

    def parameters(self) -> list[Value]:
        """The parameters, in order of definition."""
        return [p for _, p in self.named_parameters()]

    def zero_grad(self) -> None:
        """Resets the gradients of all parameters."""
        for p in self.parameters():
            p._grad = None

    def __str__(self):
        """A table: the parts that have parameters, the shapes of these, how many numbers they are, and the total."""
        parts, total = collections.defaultdict(list), 0
        for name, p in self.named_parameters():
            part, _, own = name.rpartition(".")
            parts[part].append((own, p))
            total += p.size
        rows = [(type(self).__name__, "parameters", "numbers")]
        for part, own in parts.items():
            shapes = ", ".join([f"{name} {p.shape}" for name, p in own])
            rows.append((part, shapes, f"{sum([p.size for _, p in own]):,}"))
        rows.append(("total", "", f"{total:,}"))
        first, second, third = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join([f"{part:{first}}  {shapes:{second}}  {n:>{third}}" for part, shapes, n in rows])

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
        which, arrays = f"load: {str(path)!r}: parameter ", {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    name = member.removesuffix(".npy")
                    if name in arrays:
                        raise ValueError(f"it holds {name!r} twice")
                    with archive.open(member) as file:
                        arrays[name] = _read(file, parameters.get(name), f"{which}{name!r}")
        except (OSError, _Mismatch):
            raise
        except Exception as error:  # of many kinds, for the many ways in which a file can be another or broken
            raise ValueError(f"load: {str(path)!r} is not a file that save wrote ({error})") from None
        missing = [name for name in parameters if name not in arrays]
        if missing:
            raise _Mismatch(f"{which}{missing[0]!r} is not in the file")
        new = {name: _conform(arrays[name], p._held, f"load: parameter {name!r}") for name, p in parameters.items()}
        for name, p in parameters.items():
            p._held = new[name]

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


@functools.lru_cache(1000)
def _of_another_copy(cls: type) -> bool:
    """Whether it is a Value, Tensor or Module of another copy of this file."""
    return not issubclass(cls, (Array, Module)) and (hasattr(cls, "_picograd") or hasattr(cls, "_picograd_part"))


def _type_name(x) -> str:
    """The type of what was passed, for an error, which says so if it is of another copy of this file."""
    cls = type(x)
    return f"{cls.__name__}: {_two_copies(cls)}" if _of_another_copy(cls) else cls.__name__


class _Mismatch(ValueError):
    """A file of parameters, but of other ones."""


def _read(file, p: Value | None, which: str) -> np.ndarray:
    """The array of a .npy file, for a parameter: compared before it is read, however large the file says it is."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if p is None:
        raise _Mismatch(f"{which} is not in the model")
    if dtype.kind not in "fiub":
        raise _Mismatch(f"{which} must be of real numbers, in the file it is of dtype {dtype}")
    if shape != p.shape:
        raise _Mismatch(f"{which} has shape {p.shape}, in the file {shape}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _write_whole(path, write: Callable):
    """Calls write(file) on a file beside path, and then puts it, complete, in path's place.

    A link stays one, and its target is replaced; a file's permissions stay; a device or pipe is written to.
    """
    import tempfile

    target = type(path)(os.path.realpath(path))
    if path.exists() and not target.is_file():
        whole = io.BytesIO()  # where one can go back, too
        write(whole)
        path.write_bytes(whole.getvalue())
        return
    try:
        if target.is_symlink():  # one that leads nowhere is resolved
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as folder:
            new = type(path)(folder, target.name)
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


def _generator(seed) -> np.random.Generator:
    return _understood("seed", "a whole number, None or a NumPy Generator", np.random.default_rng, seed)


class _Affine(Module):
    """What Neuron and Layer share: activation(x @ w + b)."""

    def _make(self, shape: tuple[int, ...], activation, seed, dtype):
        """Normal weights of a variance that keeps signals' size through a layer: 2 / (nin + nout) for tanh and its like
        (Glorot and Bengio 2010, eq. 12), 2 / nin for rectifiers (He et al. 2015, eq. 10); biases of 0."""
        for name, n in zip(("nin", "nout"), shape):
            _positive(name, n)
        self.activation, function = activation, _activation(activation)
        fans = shape[0] if function in (relu, gelu, softplus) else sum((*shape, 1)[:2])
        weights = _generator(seed).normal(0.0, math.sqrt(2.0 / fans), shape)
        _understood("dtype", "a floating dtype of NumPy's", np.dtype, dtype)
        self.w = Value(weights, dtype=dtype, label="w")
        self.b = Value(np.zeros(shape[1:]), dtype=dtype, label="b")
        self._function = function

    def __call__(self, x: Any) -> Value:
        w, b, f = self.w, self.b, self._function
        x, (nin, *nout) = self._input(x), w.shape
        shape = x.shape
        if len(shape) not in (1, 2) or shape[-1] != nin:
            raise ValueError(f"input: expected width {nin}, shape ({nin},) or (n, {nin}); got shape {shape}")
        if nout and (f is None or (isinstance(f, Primitive) and f.builtin and f.reads == "out")):
            if math.prod(shape[:-1]) * nout[0] < HOOK.limit:
                return _apply(_dense, (x, w, b), {"activation": f})
        out = x @ w + b
        return f(out) if f else out

    def _input(self, x):
        """One sample (nin,) or a batch (n, nin); a list of numbers and Values becomes one sample."""
        if isinstance(x, (Array, np.ndarray)) or _lazy(x):
            return x
        dtype = self.w.dtype
        if isinstance(x, (list, tuple)) and any(isinstance(i, Array) for i in x):
            x = np.stack([i if isinstance(i, Value) else Value(i) for i in x])
            return x if x.dtype == dtype else x.astype(dtype)
        return _as_raw(x, dtype, "input")

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(map(str, self.w.shape))}, activation={self.activation!r})"


class Neuron(_Affine):
    """activation(x @ w + b), with w of shape (nin,) and b of (). In: (nin,) or (n, nin); out: () or (n,)."""

    def __init__(self, nin: int, activation: Any = "tanh", seed: Any = None, dtype: Any = None):
        self._make((nin,), activation, seed, dtype)


class Layer(_Affine):
    """activation(x @ w + b), w (nin, nout), b (nout,). In: (nin,) or (n, nin); out: (nout,) or (n, nout)."""

    def __init__(self, nin: int, nout: int, activation: Any = "tanh", seed: Any = None, dtype: Any = None):
        self._make((nin, nout), activation, seed, dtype)


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
        rng, widths, activations = _generator(seed), [nin, *nouts], [activation] * (len(nouts) - 1) + [None]
        self.layers = [Layer(a, b, f, rng, dtype) for a, b, f in zip(widths, nouts, activations)]
        for i, layer in enumerate(self.layers, 1):
            layer.w.label, layer.b.label = f"w{i}", f"b{i}"

    def __call__(self, x: Any) -> Value:
        for layer in self.layers:
            x = layer(x)
        return _apply(_reshape, (x,), {"shape": (-1,) * (x.ndim - 1)}) if x.shape[-1] == 1 else x

    def __repr__(self):
        if not self.layers:
            return "MLP without layers"
        first, widths = self.layers[0], [layer.b.size for layer in self.layers]
        count = sum(p.size for p in self.parameters())
        return f"MLP({first.w.shape[0]}, {widths}, activation={first.activation!r}) with {count} parameters"


# --- losses: the mean over the samples, a 0-d Value. Foreign labels are not checked, which would compute them; in a
# replay, those of cross_entropy are ---


def _numbers(name: str, which: str, x):
    """What a loss is computed of: a Value or Tensor, or anything that can be an operand."""
    if isinstance(x, Array):
        return x
    x = _constant(x, f"{name}: {which}")
    return np.asarray(x) if type(x) in _WEAK_TYPES else x


def _same_shape(name: str, first: str, second: str, x, y) -> tuple:
    """Prediction and target of a loss; in double precision if both are integers or masks, which may be too short."""
    x, y = _numbers(name, first, x), _numbers(name, second, y)
    if x.shape != y.shape:
        raise ValueError(f"{name}: {first} and {second} must have the same shape, got {x.shape} and {y.shape}")
    return (x, y) if "f" in (x.dtype.kind, y.dtype.kind) else (x.astype(np.float64), y)


def _mse_rule(wanted, g, out, operands):
    x, y = operands
    slope = (x - y) * (g * (2.0 * _share(x, None)))
    return slope, wanted[1] and -slope


_mse = primitive(lambda x, y: _mean(np.square(x - y)), _mse_rule, name="mse", joint=True)


def mse_loss(prediction: Value, target: Any) -> Value:
    """The mean of (prediction - target)**2, for two of the same shape."""
    prediction, target = _same_shape("mse_loss", "prediction", "target", prediction, target)
    return _apply(_mse, (prediction, target), _NO_PARAMS)


def _label_mask_forward(labels, k):
    labels = np.asarray(labels)
    with np.errstate(invalid="ignore"):
        places = labels.astype(np.intp)
    wrong = labels[(places != labels) | (places < 0) | (places >= k)]
    if wrong.size:
        kind = TypeError if np.any(wrong != np.floor(wrong)) else ValueError
        raise kind(f"cross_entropy: labels must be integers from 0 to {k - 1}, got {wrong.min()} to {wrong.max()}")
    mask = np.zeros((*labels.shape, k), bool)
    mask[_one_a_row(places)] = True
    return mask


def _one_a_row(places):
    """The index of one element of each row, given the places within the rows."""
    return *np.indices(np.shape(places), sparse=True), places


def _labelled(mask):
    """Where a mask is true, once a row."""
    return _one_a_row(mask.argmax(-1) if mask.size else np.zeros(mask.shape[:-1], int))


# Where log-probabilities count. A mask, as indices do not run on any kind of array; its labels are checked whenever it
# is computed, so that a replay does not take those that are out of range for none.
_label_mask = primitive(_label_mask_forward, None, name="label mask")


def _entropy(x, mask, weights):
    """The cross-entropy of logits, given the mask of their labels, one a row, and their softmax; of no sample, nan as
    other means."""
    if not type(x) is type(mask) is type(weights) is np.ndarray:
        lead = x - _peak(x, -1)
        return np.mean(np.log(np.sum(np.exp(lead), axis=-1)) - np.sum(np.where(mask, lead, 0.0), axis=-1))
    place = _labelled(mask)
    own = np.ravel(weights[place])
    small = own < np.finfo(own.dtype).tiny
    with np.errstate(divide="ignore"):
        loss = -np.log(own)
    if small.any():  # some cannot be told from 0
        rows = np.reshape(x, (-1, np.shape(x)[-1]))[small]
        loss[small] = _logsumexp(rows, axis=-1) - np.ravel(x[place])[small]
    return np.mean(loss)


def _less_at_labels(weights, mask):
    if not type(weights) is type(mask) is np.ndarray:
        return weights - mask
    weights = weights.copy()
    weights[_labelled(mask)] -= 1
    return weights


_less_labels = primitive(_less_at_labels, lambda g, out, weights, mask: g, None, name="less labels")


def _entropy_x(g, out, x, mask, weights):
    return _less_labels(weights, mask) * (g * _share(x, tuple(range(np.ndim(x) - 1))))


# Its gradient takes the softmax that the forward took; to that goes none, as what comes by it is in the logits' own.
_cross_entropy = primitive(_entropy, _entropy_x, None, None, name="cross entropy")


def cross_entropy(logits: Value, labels: Any) -> Value:
    """The mean of -log(softmax(logits)[label]), for logits (n, k) or (k,) and integer labels (n,) or () below k."""
    logits, labels = _numbers("cross_entropy", "logits", logits), _numbers("cross_entropy", "labels", labels)
    if logits.shape[:-1] != labels.shape or not logits.shape:
        raise ValueError(f"cross_entropy: labels must be integers of shape {logits.shape[:-1]}, got {labels.shape}")
    if logits.dtype.kind != "f":
        logits = logits.astype(np.float64)
    if logits.dtype == np.float16:  # in which a sum of exponentials may overflow
        return cross_entropy(logits.astype(np.float32), labels).astype(np.float16)
    k, lazy = logits.shape[-1], _lazy(labels)
    if lazy and labels.dtype.kind not in "iub":
        raise TypeError(f"cross_entropy: labels must be integers, got dtype {labels.dtype}")
    if lazy:
        mask = _recorded(labels)[..., None] == np.arange(k)
    elif isinstance(labels, Tensor):  # a node, so that a replay reads them anew
        mask = _record(_label_mask, (labels,), {"k": k})
    else:
        mask = _label_mask(labels, k=k)
    return _apply(_cross_entropy, (logits, mask, softmax(logits)), _NO_PARAMS)


_sigmoid_entropy = primitive(  # softplus(x) - x * y, with no difference of large numbers where y is 1
    lambda x, y: np.maximum(x, 0.0) - x * y + np.log1p(np.exp(-np.abs(_floating(x)))),
    lambda g, out, x, y: g * (sigmoid(x) - y),
    lambda g, out, x, y: -g * x,
    name="sigmoid entropy",
    elementwise=True,
)
for _prim in (_mse, _label_mask, _cross_entropy, _less_labels, _sigmoid_entropy):
    _prim.builtin = True


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


class _State(dict):
    """What an optimizer keeps for a parameter: arrays like its data, by name, zeros at first.

    In single precision for half, which then is what `_update` computes in, up to the last subtraction: squares of
    gradients, and what is below them, would not fit.
    """

    def __init__(self, p: Value, **start: Any):
        super().__init__(start)
        self.like, self.shape, self.dtype = p, p.shape, np.dtype(np.float32) if p.dtype == np.float16 else p.dtype

    def __missing__(self, name):
        self[name] = np.zeros_like(self.like._held, self.dtype)
        return self[name]


class _Optimizer:
    """What SGD and Adam share: checked parameters, a state for each array, and all numbers stepped as one array."""

    lr: float
    weight_decay: float
    _options: Callable[[], tuple]
    _update: Callable[[list, dict], None]

    def __init__(self, params: Iterable[Value], **options: Any):
        expected = "a list of Values (of a model, pass model.parameters())"
        if isinstance(params, Array):
            raise TypeError(f"params must be {expected}, got a single {type(params).__name__}")
        self.params = _understood("params", expected, list, params)
        if not self.params:
            raise TypeError(f"params must be {expected}, got none")
        for p in self.params:
            if not isinstance(p, Value):
                raise TypeError(f"params must be {expected}, got also a {_type_name(p)}")
            if p._prim is not None:
                raise ValueError("params must be leaves; one of them is the result of an operation")
            if _lazy(p._held):
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
            setattr(self, name, given)
        self._shapes = [p.shape for p in self.params]
        self._arrays = [(p, _State(p, steps=0)) for p in self.params if p.ndim]
        self._scalars = [p for p in self.params if not p.ndim]
        # Its count of steps is an array, too: each number has its own, as it has where it is an array.
        self._scalar_state = _State(_leaf(np.zeros(len(self._scalars))))
        self._given: tuple[tuple, dict] = ((), {})  # numbers, and for each dtype arrays of them

    def zero_grad(self) -> None:
        """Resets the gradients of the parameters."""
        for p in self.params:
            p._grad = None

    def step(self) -> None:
        """Changes the parameters by their gradients, in place; one without a gradient yet is left alone. (To ask for a
        `.grad` makes it zeros, which is one.)

        ValueError if a parameter or its gradient has another shape than at the beginning, or its array is read-only;
        TypeError if it is of another library now. Then, and if a floating-point fault is an error, nothing is changed.
        """
        arrays, scalars, numbers, usual, ndarray = [], [], [], True, np.ndarray
        if self._scalars:
            scalars = [p for p in self._scalars if p._grad is not None]
            numbers = [x for p in scalars for x in (p._held, p._grad)]
            usual = _SCALARS.issuperset(map(type, numbers))
        for p, state in self._arrays:
            data, g = p._held, p._grad
            if g is not None:
                if not (type(data) is ndarray and data.shape == g.shape == state.shape and data.flags.writeable):
                    usual = False
                arrays.append((data, g, state))
        if not usual:
            self._check()
        # A context without any variable has NumPy's default errstate; `np.geterr` takes five times as long to say so.
        state = np.geterr() if contextvars.copy_context() else {}
        step = self._step if _harmless(state) else self._step_or_stay
        step(arrays, scalars, numbers)

    def _check(self):
        """Raises if a parameter cannot be stepped."""
        for i, (p, shape) in enumerate(zip(self.params, self._shapes)):
            data, grad = p._held, p._grad
            if grad is None:
                continue
            which = f"step: parameter {i} ({p.label!r})" if p.label else f"step: parameter {i}"
            if not p.shape == np.shape(grad) == shape:
                problem = f"was of shape {shape}, and is of shape {p.shape} with a gradient of shape {np.shape(grad)}"
                raise ValueError(f"{which} {problem}: make a new optimizer")
            if _lazy(data):
                library = type(data).__module__.split(".")[0]
                raise TypeError(f"{which} has an array of {library} now: optimizers work in place, in NumPy")
            if type(data) is np.ndarray and not data.flags.writeable:
                raise ValueError(f"{which} has an array that is read-only: assign a copy to its .data")

    def _step_or_stay(self, *live: list):
        """`_step`; if it fails, all is as it was before."""
        states = [state for _, state in self._arrays] + [self._scalar_state]
        data = [_owned(p._held) for p in self.params]
        kept = [{name: _owned(x) for name, x in state.items()} for state in states]
        try:
            self._step(*live)
        except BaseException:
            for p, x in zip(self.params, data):
                p._held = KINDS[type(x)].write(p._held, x) if p.ndim else x
            for state, x in zip(states, kept):
                state.clear()
                state.update(x)
            raise

    def _step(self, arrays: list[tuple], scalars: list[Value], numbers: list):
        """Steps arrays, given with their gradients and states, and scalars, given with the data and gradient of each.

        `_update` gets many arrays at once, and the options as arrays, too: ufuncs take numbers in twice the time.
        """
        options, every = self._options(), self._scalar_state
        if options != self._given[0]:
            dtypes = {state.dtype for _, state in self._arrays} | {every.dtype}
            self._given = options, {dtype: [np.array(x, dtype) for x in options] for dtype in dtypes}
        self._update(arrays, self._given[1])
        if not scalars:
            return
        places = slice(None)
        if len(scalars) < len(self._scalars):  # the others, and their state, stay as they are
            places = [i for i, p in enumerate(self._scalars) if p._grad is not None]
        data, grads = np.array(numbers, np.float64).reshape(-1, 2).T.copy()
        state = _State(_leaf(data), **{name: x[places] for name, x in every.items()})
        self._update([(data, grads, state)], self._given[1])
        for name, x in state.items():
            every[name][places] = x
        for p, x in zip(scalars, data.tolist()):
            p._held = x if type(p._held) is float else p._held.dtype.type(x)

    def __repr__(self):
        options = ", ".join(f"{name}={x}" for name, x in vars(self).items() if name[0] != "_" and name != "params")
        return f"{type(self).__name__}({options}) of {len(self.params)} parameters"


_SCALARS = frozenset((float, np.float16, np.float32, np.float64, np.longdouble))


class SGD(_Optimizer):
    """Stochastic gradient descent: with g the gradient plus weight_decay * p, v = momentum * v + g and p -= lr * v."""

    momentum: float

    def __init__(self, params: Iterable[Value], lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _options(self):
        return self.lr, self.momentum, self.weight_decay

    def _update(self, arrays, given):
        for data, grad, state in arrays:
            lr, momentum, weight_decay = given[state.dtype]
            scratch = state["scratch"]
            if weight_decay:
                grad = np.add(grad, np.multiply(data, weight_decay, scratch), scratch)
            if momentum:
                velocity = state["velocity"]
                velocity *= momentum
                velocity += grad
                grad = velocity
            np.multiply(grad, lr, scratch)
            data -= scratch


class Adam(_Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1). weight_decay is added to the gradient as weight_decay * p; with
    decoupled=True it is AdamW's (Loshchilov and Hutter 2019): p -= lr * weight_decay * p beside the step."""

    betas: tuple[float, float]
    eps: float

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
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        self.decoupled = decoupled

    def _options(self):
        beta1, beta2 = self.betas
        return self.lr, self.weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2

    def _update(self, arrays, given):
        for data, grad, state in arrays:
            lr, weight_decay, beta1, rest1, beta2, rest2 = given[state.dtype]
            mean, square, scratch = state["mean"], state["square"], state["scratch"]
            steps = state["steps"] = state["steps"] + 1
            if weight_decay and not self.decoupled:
                grad = grad + np.multiply(data, weight_decay, scratch)
            mean *= beta1
            mean += np.multiply(grad, rest1, scratch)
            square *= beta2
            np.multiply(grad, rest2, scratch)
            scratch *= grad
            square += scratch
            short1, short2 = [1.0 - beta**steps for beta in self.betas]  # of 1, as both started from 0
            root = short2**0.5
            np.sqrt(square, scratch)
            scratch += self.eps * root
            np.divide(mean, scratch, scratch)
            scratch *= self.lr * root / short1
            if weight_decay and self.decoupled:
                scratch += data * (lr * weight_decay)
            data -= scratch


# --- the module picograd.nn, out of this same file ---

nn = types.ModuleType(f"{__name__}.nn", "Networks, losses and optimizers of PicoGrad.")
_in_nn = Value, Tensor, Module, Neuron, Layer, MLP, SGD, Adam, no_grad
_in_nn += mse_loss, cross_entropy, binary_cross_entropy_with_logits, hinge_loss
vars(nn).update({x.__name__: x for x in _in_nn})
sys.modules[nn.__name__] = nn


# ---------------------------------------------------------------------------------------------------------------------
# 7. draw
#
# In: a Value. Out: the picture of the graph it came from, as a `graphviz.Digraph`, and a file if asked for. A box shows
# a Value with the operation that made it, a Tensor or a constant array. Graphviz (the Python package, and the program
# `dot` to make picture files) is imported and needed only here.
# Invariant: text that others chose (labels, names, parameters) reaches Graphviz through `_text` alone, in HTML-like
# labels, where nothing but our own tags is markup.
#
#     >>> a, b = Value(2.0, label="a"), Value(3.0, label="b")
#     >>> graph = draw(a * b + a**2)  # in a notebook, that shows it; of five boxes, one says: · ** 2, and 4
# ---------------------------------------------------------------------------------------------------------------------

# Text has a contrast of at least 12:1 on every fill (WCAG 2 asks for 4.5:1), borders at least 5:1 on the white page.
# The kinds differ in shape or line as well, for eyes and printers that do not tell the colours apart.
_INK = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "10", "fontcolor": "#1a1a1a"}
_LOOKS = {  # of each kind of box, as attributes of an HTML-like table
    "leaf": {"bgcolor": "#cfe3fa", "color": "#1f5c99", "style": "rounded"},
    "input": {"bgcolor": "#d3efd0", "color": "#2a6b2f"},
    "constant": {"bgcolor": "#eeeeee", "color": "#5f5f5f", "style": "dashed"},
    "operation": {"bgcolor": "#f7f2fd", "color": "#6a3fa0"},
    "result": {"bgcolor": "#ffdf94", "color": "#8a5300", "border": "2"},
    "not finite": {"color": "#c00000", "border": "3"},
}
_OPERATION = '<font point-size="11">{}</font>'  # how a line is written that is in the tinted head of a box
_CELLS = '<tr><td bgcolor="#e6daf5">{}</td></tr>', "<tr><td>{}</td></tr>"  # the head, and what is below
_NOTES = {  # what is in a picture: what it means
    "·": "· stands for an operand that comes by an arrow",
    "<i>grad": "<i>grad</i> is the gradient of the result by what the box holds",
    "<i>max |grad|": "<i>max |grad|</i> is the largest absolute value in that gradient",
    "headport": "where the order of operands matters, the first one comes in at the top or left",
    "headlabel": "numbers at arrows are the order of operands",
}
# The points of a box where operands enter, so that a - b differs from b - a; more than three are numbered instead.
_ENTRIES = {"LR": {2: "nw sw", 3: "nw w sw"}, "TB": {2: "nw ne", 3: "nw n ne"}}
# But in any order where all are alike, or each says what it is.
_IN_ANY_ORDER = {"dense layer", "cross entropy", *"add multiply maximum minimum logaddexp hypot equal mse".split()}
_PAGE_WIDTH = 900  # in points, of which 96 dots per inch make 1,200
_DARK = b"<style>@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg) } }</style>\n"


def _text(text, limit: int = 80) -> str:
    """Text as HTML-like label text: markup and unprintable characters escaped, line breaks kept, cut at the limit."""
    from html import escape

    text = str(text)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    lines = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.strip().splitlines())
    return "<br/>".join(escape(line).replace("\\", r"\\") for line in lines)  # a single \N would become the node's name


def _few(x) -> str:
    """Numbers in three or four digits, in one line: columns of them would tear the picture apart."""
    digits = 3 if np.ndim(x) else 4
    return _in_a_line(x, lambda i: f"{i:.{digits}g}" if isinstance(i, np.floating) else str(i))


def _written(x) -> bool:
    """Whether an operand is a number, which is written into its operation in place of a box."""
    return not isinstance(x, Array) and not np.ndim(x)


def _head(v: Value) -> str:
    """The operation that made a Value, with the numbers among its operands written into it."""
    prim, args = v._prim, v._args
    if len(args) == 1:
        return _OPERATORS.get(prim.forward, (prim.symbol,))[0]  # neg, as - would look like a difference
    if hasattr(prim, "formula") or not any(map(_written, args)):
        return prim.symbol
    parts = [_few(x) if _written(x) else "·" for x in args]
    return f" {prim.symbol} ".join(parts) if prim.forward in _OPERATORS else f"{prim.symbol}({', '.join(parts)})"


def _parameter(name: str, x) -> str:
    """One parameter of an operation, in short; an index as Python writes it."""

    def short(x):
        if isinstance(x, slice):
            ends = ["" if end is None else str(end) for end in (x.start, x.stop, x.step)]
            return ":".join(ends if ends[2] else ends[:2])
        if isinstance(x, np.ndarray):
            return f"array{x.shape}"
        if isinstance(x, (np.generic, np.dtype)):
            return str(x)
        if isinstance(x, Primitive):
            return x.name
        return "..." if x is Ellipsis else getattr(x, "__name__", None) or reprlib.repr(x)

    return f"[{', '.join(map(short, x))}]" if name == "index" and isinstance(x, tuple) else f"{name}={short(x)}"


def _seen(raw):
    """The numbers of a raw value; None where they would have to be computed elsewhere, or it is no array at all."""
    return None if _lazy(raw) or getattr(raw, "dtype", float) is None else _fetched(raw)


def _value_lines(raw) -> list[str]:
    """What a box says of data: up to four numbers themselves, else shape and dtype."""
    x, shape = _seen(raw), f"{np.shape(raw)} {_public(raw).dtype}"
    if x is None:
        return [shape, KINDS[type(raw)].text(raw).strip(", "), "not computed"] if _lazy(raw) else [repr(raw)]
    if 0 < x.size <= 4:
        return [_few(x)]
    nans = _count_nans(raw)
    return [shape, f"{nans} nan" * bool(nans)]


def _gradient_line(g) -> str:
    """What a box says of a gradient: up to four numbers themselves, else the largest absolute value."""
    x = _seen(g)
    if x is None:
        return "grad not computed" if _lazy(g) else ""
    if 0 < x.size <= 4:
        return f"grad {_few(x)}"
    # Unlike a norm, it cannot overflow, and it needs no temporary.
    return f"max |grad| {_few(np.maximum(np.max(x, initial=0), abs(np.min(x, initial=0))))}"


def _lines(x) -> list[tuple[str, str]]:
    """What the box of a Value, Tensor or constant says: for each line, how it is written, and the markup."""
    lines = []
    if isinstance(x, Array):
        lines.append(("<b>{}</b>", x.label or "input" * isinstance(x, Tensor)))  # type: ignore[attr-defined]
    if isinstance(x, Value) and x._prim is not None:
        parts = [_head(x), *[_parameter(name, p) for name, p in x._params.items() if p is not None]]
        parts = [" ".join(parts)] if len("".join(parts)) < 20 else parts
        lines = [(_OPERATION, text) for text in parts] + lines
    lines += [("{}", text) for text in _value_lines(_raw(x))]
    if isinstance(x, Value) and x._grad is not None:
        lines.append(("<i>{}</i>", _gradient_line(x._grad)))
    return [(style, text) for style, text in [(style, _text(x)) for style, x in lines] if text]


def _attributes(look: dict[str, str]) -> str:
    return " ".join([f'{key}="{x}"' for key, x in look.items()])


def _hover(arrays: Sequence) -> str:
    """Data and gradient in digits, for a text that comes up over an SVG: of a large array, what is at its ends."""
    shown = ["not computed" if x is None else np.array2string(x, threshold=64, separator=", ") for x in arrays]
    return "\ngrad\n".join(shown).replace("\\", r"\\").replace("\n", r"\n")


def _direction(values: list[Value], boxes: dict[int, list]) -> str:
    """Left to right if that fits a page or is the narrower way, by estimated widths of boxes in the ranks of dot."""
    rank, widths = {}, collections.defaultdict(list)
    for v in values:
        if v._args:
            rank[id(v)] = 1 + max([rank.get(id(x), 0) for x in v._args])
            for x in v._args:
                rank.setdefault(id(x), rank[id(v)] - 1)
    for key, lines in boxes.items():
        widths[rank.get(key, 0)].append(30 + 6 * max([len(text) for _, text in lines]))
    downwards = max(map(sum, widths.values()))
    return "LR" if sum(map(max, widths.values())) <= max(_PAGE_WIDTH, downwards) else "TB"


_DOT_SECONDS = 60.0  # that Graphviz may take, and a second more for each box


def _save_picture(graph, path, seconds: float):
    """Renders in memory, then puts the complete file in its place."""
    import subprocess

    picture, suffix = graph.copy(), path.suffix.lower()
    if suffix == ".png":
        picture.graph_attr["dpi"] = "96"  # text comes out as large as the code on the page around it
    try:
        done = subprocess.run(
            ["dot", f"-T{suffix[1:]}"], input=picture.source.encode(), capture_output=True, timeout=seconds
        )
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
    content = done.stdout.replace(b"<g id=", _DARK + b"<g id=", 1) if suffix == ".svg" else done.stdout
    _write_whole(path, lambda file: file.write(content))


def _save_source(content: bytes, path):
    """Writes beside path, ending in .gv, under a name that no other file has."""
    for i in itertools.count():
        source = path.with_suffix(f".{i}.gv" if i else ".gv")
        if not os.path.lexists(source) or (source.is_file() and source.read_bytes() == content):
            _write_whole(source, lambda file: file.write(content))
            return source


def _empty_graph(rankdir: str):
    try:
        import graphviz
    except ImportError as error:
        raise ImportError(
            "draw needs the Python package graphviz: pip install graphviz, or conda install -c conda-forge "
            "python-graphviz (the rest of picograd does not need it)"
        ) from error
    return graphviz.Digraph(
        "picture",
        graph_attr=_INK | {"rankdir": rankdir, "bgcolor": "white", "nodesep": "0.15", "ranksep": "0.25"},
        node_attr=_INK | {"shape": "plain"},
        edge_attr=_INK | {"color": "#5f5f5f", "arrowsize": "0.6", "fontsize": "8", "labeldistance": "1.2"},
    )


class _Picture:
    """A picture in the making: boxes v0, v1, ..., and arrows to each from its operands."""

    def __init__(self, values: list[Value], drawn: dict[int, Any], rankdir: str | None):
        boxes = {key: _lines(x) for key, x in drawn.items()}
        self.root, self.rankdir = values[-1], rankdir or _direction(values, boxes)
        self.names, self.graph = {key: f"v{i}" for i, key in enumerate(drawn)}, _empty_graph(self.rankdir)
        for key, x in drawn.items():
            self.box(x, boxes[key])
        for v in values:
            self.arrows(v)

    def box(self, x, lines: list[tuple[str, str]]) -> None:
        """Adds the box of a Value, Tensor or constant."""
        kind, arrays = "constant", [_seen(_raw(x))]
        if isinstance(x, Tensor):
            kind = "input"
        elif isinstance(x, Value):
            arrays += [] if x._grad is None else [_seen(x._grad)]
            kind = "leaf" if x._prim is None else "operation"
        look = {"border": "1"} | _LOOKS["result" if x is self.root and kind != "leaf" else kind]
        if not all([a is None or np.isfinite(a).all() for a in arrays]):
            look |= _LOOKS["not finite"]
        parts = [[style.format(x) for style, x in lines if (style is _OPERATION) is head] for head in (True, False)]
        rows = "".join([cell.format("<br/>".join(part)) for cell, part in zip(_CELLS, parts) if part])
        table = f'<table cellborder="0" cellspacing="0" cellpadding="4" {_attributes(look)}>{rows}</table>'
        self.graph.node(self.names[id(x)], f"<{table}>", tooltip=_hover(arrays))

    def arrows(self, v: Value) -> None:
        """Adds the arrows that come to the box of a Value."""
        operands = [x for x in v._args if not _written(x)]
        key, ends = "headport", _ENTRIES[self.rankdir].get(len(operands), "").split()
        if not ends:
            key, ends = "headlabel", [str(i + 1) for i in range(len(operands))]
        ordered = len(operands) > 1 and v._prim.name not in _IN_ANY_ORDER  # else where lines cross least
        for x, end in zip(operands, ends):
            # dot draws heavy edges straight: those of the main line, from one result to the next.
            look = {"weight": "2" if getattr(x, "_prim", None) else "1"} | ({key: end} if ordered else {})
            self.graph.edge(self.names[id(x)], self.names[id(v)], **look)

    def legend(self, caption: str) -> None:
        """Adds what is below the picture: a caption, the kinds of boxes, and what the marks mean."""
        source = "".join(self.graph.body)
        looks = {kind: {"border": "1"} | look for kind, look in _LOOKS.items() if [*look.values()][0] in source}
        cells = "".join([f"<td {_attributes(look)}>{kind}</td>" for kind, look in looks.items()])
        rows = [f"<b>{_text(caption, 200)}</b>"] * bool(caption)
        rows.append(f'<table border="0" cellspacing="4" cellpadding="3"><tr>{cells}</tr></table>')
        rows += [f'<font point-size="9">{note}</font>' for mark, note in _NOTES.items() if mark in source]
        rows = "".join([f"<tr><td>{row}</td></tr>" for row in rows])
        self.graph.attr(label=f'<<table border="0" cellspacing="0" cellpadding="1">{rows}</table>>')


def draw(
    root: Value,
    filename: str | os.PathLike | None = None,
    *,
    max_nodes: int = 300,
    rankdir: str | None = None,
    caption: str = "",
) -> Any:
    """The graph that a Value was computed by, as a `graphviz.Digraph`, which shows itself in a notebook.

    A box shows the operation that made a Value, with its parameters and the numbers among its operands, its label, the
    numbers (up to four, else shape and dtype) and, after backward, their gradient (or the largest absolute value in
    it). Blue boxes are leaves, such as parameters; green ones Tensors, inputs without gradient; grey, dashed ones
    constant arrays; white ones results in between; the yellow one is the root. A red border says that something in it
    is nan or infinite. A legend explains the marks; in a notebook and in an SVG, numbers come up over the boxes.

    filename: where to save a picture, ending in .png (96 dots per inch), .svg (dark on dark pages) or .pdf. An
        existing file is replaced, once the new one is complete.
    max_nodes: the most boxes to draw; above that, ValueError says how many there are.
    rankdir: "LR" (left to right) or "TB" (top to bottom); None takes what keeps a page-wide picture legible.
    caption: a line below the picture.

    ImportError without the package graphviz. RuntimeError if a picture file needs Graphviz's program `dot` and this
    fails, takes minutes, or is not installed: then the picture's source is saved instead, in a new file ending in .gv.
    """
    if not isinstance(root, Value):
        raise TypeError(f"draw: root must be a Value, got {_type_name(root)}")
    _positive("draw: max_nodes", max_nodes)
    if rankdir not in (None, *_ENTRIES):
        raise ValueError(f"draw: rankdir must be 'LR', 'TB' or None, got {rankdir!r}")
    path = None if filename is None else _path(filename, "draw: filename")
    if path and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"draw: filename must end in .png, .svg or .pdf, got {str(path)!r}")
    if path and not path.parent.is_dir():
        raise FileNotFoundError(f"draw: filename must be in an existing folder, got {str(path)!r}")
    root = root._picture()
    values = _newest_first(root)[::-1]
    drawn = {id(x): x for v in values for x in (*v._args, v) if not _written(x)}
    count = len(drawn)
    if count > max_nodes:
        raise ValueError(
            f"draw: the graph has {count} nodes ({len(values)} Values, {count - len(values)} Tensors and constants), "
            f"and max_nodes is {max_nodes}. Draw a part of it (an inner Value, fewer samples or layers), compute "
            "with arrays in place of numbers, or pass a larger max_nodes: above a thousand, Graphviz may take minutes."
        )
    picture = _Picture(values, drawn, rankdir)
    picture.legend(caption)
    if path:
        _save_picture(picture.graph, path, _DOT_SECONDS + count)
    return picture.graph


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
    _memory.bound = _physical_bytes() // 16 if _config.enabled else 0
    _memory.clear(bound=_memory.bound)
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
    from pathlib import Path

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


@functools.cache
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
        segment = self.take(size, shared) or (shared and self.share(size, most)) or self.take(size, False)
        # A view: NumPy lets an array be made writeable again if it stands on an array that is.
        return np.asarray(_Lease(segment or self.spend(_Private, size), shape, dtype)).view()

    def take(self, size: int, shared: bool):
        """The segment of that size that was freed last, if there is one."""
        with self.lock:
            for segment in reversed(self.free):
                if segment.size == size and bool(segment.name) == shared and self.unlist(segment):
                    return segment
        return None

    def unlist(self, segment) -> bool:
        """Takes a segment off the free ones; False if a signal's handler or a finalizer, in this thread, was first."""
        with contextlib.suppress(ValueError):
            self.free.remove(segment)
            return True
        return False

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
            if len(self.free) > 1 or segment.size > self.bound:
                self.clear(bound=self.bound)

    def clear(self, shared: bool = False, bound: int = 0) -> int:
        """Gives freed segments, or the shared ones only, back to the system, those that were freed first, until no
        more than so many bytes are left; how many there were."""
        with self.lock:
            segments = [segment for segment in self.free if segment.name or not shared]
            for segment in segments:
                if sum([x.size for x in self.free]) <= bound:
                    break
                if self.unlist(segment) and self.shared.pop(segment.name, None):
                    segment.close()
        return len(segments)

    def part(self) -> None:
        """Before a fork: what is shared becomes private, at the same addresses, so that neither process sees what the
        other writes. The file stays as it is from now on, so that a private mapping of it is a copy on write."""
        import ctypes
        import mmap

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
        inputs = [np.broadcast_to(x, self.shape) if getattr(x, "shape", ()) else x for x in self.inputs]
        arrays = [i for i, x in enumerate(inputs) if getattr(x, "shape", ())]
        state = {kind: "call" if how == "warn" else how for kind, how in self.state.items()}

        def met(kind, flag):
            faults[kind, name] = None

        with np.errstate(**state, call=met):
            for block in tasks:
                values, scratch = inputs.copy(), {}
                for i in arrays:
                    values[i] = inputs[i][block]
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
                workers = list((pool._processes or {}).values())
                pool.shutdown(wait=True, cancel_futures=True)
                for worker in workers:  # if some could not be started, nobody else ends the others
                    worker.kill()
                    worker.join()
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
        _memory.clear(shared=True)
        while _memory.shared:  # again, if a signal's handler shares more meanwhile
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
    parent = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)  # none while it is imported
    return _local.depth > 0 or sys.is_finalizing() or (parent is not None and parent() is not None)


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

    given: how often it was handed out. readers: what was to read it. holder: gives the array that holds it, if that is
    there still. runs: how often it was computed without being kept.

    A finalizer, a signal's handler or another thread may come at any moment, and hand out or compute what is here.
    So a step is read once, registered with what it reads before it is asked whether that was handed out, and counts
    as computed only if nobody else did it meanwhile: then its operands may have changed under it.
    """

    __slots__ = ("shape", "dtype", "array", "given", "step", "holder", "runs", "readers", "__weakref__")

    def __init__(self, shape: tuple, dtype: np.dtype, step: tuple | None = None, array=None, given: int = 0):
        self.shape, self.dtype, self.step, self.array, self.given, self.runs = shape, dtype, step, array, given, 0
        # By id, of which there are no more than buffers were alive at a time. NoneType gives None, when it is called.
        self.readers, self.holder = {}, type(None)

    def blocks(self) -> float:
        """How many blocks its data are."""
        return math.prod(self.shape) * self.dtype.itemsize / _BLOCK_BYTES

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
        kept, and some array still holds, is kept now: that is not computed a third time."""
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
            outputs = [places[id(x)] for x in kept]
            with np.errstate(**(waiting[self][2] if waiting else {})):
                arrays, total = run_blocks(tuple(steps), raw, self.shape, outputs, reduction)
            if all([node.step is step for node, step in waiting.items()]):
                break
        for node, array in zip(kept, arrays):
            node.keep(waiting[node], array)
        for node in waiting:
            node.runs += 1
        return total

    def keep(self, step: tuple, array: np.ndarray) -> None:
        """Holds what the step gave, unless somebody else was first."""
        with _chunk_lock:
            if self.step is step:
                self.array, self.step = array, None

    def force(self) -> np.ndarray:
        """The data, for reading at once. A small operation alone is done by NumPy in one go."""
        while (step := self.step) is not None:
            prim, args, state = step
            alone = not any([type(x) is _Buffer and x.step is not None for x in args])
            if alone and prim.ufunc and self.blocks() <= _FEW_BLOCKS:
                array = _memory.empty(self.shape, self.dtype, _shares())
                with np.errstate(**state):
                    prim.forward(*[x.array if type(x) is _Buffer else x for x in args], out=array)
                self.keep(step, array)
            else:
                self.compute()
        return self.array

    def hand_out(self) -> np.ndarray:
        """The data, for somebody who may keep them and write to them."""
        self.force()
        with _chunk_lock:
            self.given += 1  # from now on it stays where it is
            array = self.array
        for reader in filter(None, [ref() for ref in list(self.readers.values())]):
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
        if function in (np.empty_like, np.zeros_like, np.ones_like, np.full_like) and args:
            like = np.broadcast_to(np.zeros((), self.dtype), self.shape)
            return HOOK.adopt(function(like, *args[1:], **kwargs), self.forced or None, new=True)
        if isinstance(prim, Primitive) and _named(prim, function, args, kwargs).keys() <= {*prim.params}:
            with contextlib.suppress(TypeError):  # of what it does not take
                return _call_entry(prim, function, args, kwargs)
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
        return np.asarray, (self.force(),)  # so that copies share what was handed out, as the originals do


def _exposed(function: Callable, args, kwargs: dict):
    """Calls code that may keep what it gets, and write to it, on the arrays of chunked ones, which are handed out."""

    def plain(x):
        return x.expose() if type(x) is Chunked else x

    return function(*_each(plain, args), **{name: _each(plain, x) for name, x in kwargs.items()})


class _InBlocks(Kind):
    """The kind of chunked arrays."""

    rank = 2

    def enter(self, data, dtype, choice, who):
        return HOOK.adopt(Chunked(data.cast(np.dtype(dtype or data.dtype)), choice is True), choice)

    def evaluate(self, prim, raw, params):
        """Waits, is reduced, or is done at once."""
        if prim in (_detach, _real):  # views
            return raw[0]
        state, forced = np.geterr(), any([type(x) is Chunked and x.forced for x in raw])
        # What waits, or is cut into blocks, is of the catalogue, and nobody has to see its faults at once: as NumPy
        # does it, they may be an error, or a call, on the line that they come from.
        if (_config.enabled or forced) and not _mode.tracing and prim.builtin and _harmless(state):
            if prim.elementwise and (not params or prim is _as_dtype) and all(map(_in_c_order, raw)):
                raw = raw if prim.ufunc else _strengthened(prim, raw)
                with contextlib.suppress(ValueError):  # shapes that do not fit: NumPy says so
                    if params:
                        dtype = np.dtype(params["dtype"])
                    else:
                        dtype = _result_dtype(prim, *[getattr(x, "dtype", x) for x in raw])
                    if dtype.kind == "f" or (prim is not TABLE[np.power] and dtype.kind in "iub"):  # fails on some
                        return Chunked(_step(prim, raw, dtype, state), forced)
            known = prim.name in _REDUCTIONS and params.keys() <= {"axis", "keepdims", "ddof"}
            if known and type(raw[0]) is Chunked and raw[0].size:
                x = raw[0].buffer
                if x.blocks() * 8 ** len(x.pending({})) > 8 * _FEW_BLOCKS:  # else NumPy's few passes do
                    return _reduced(prim, x, state, **params)
        return self.whole(prim, raw, params, forced or None)

    def whole(self, prim, raw, params, choice):
        """By NumPy, in one go. A view of an array of ours hands it out, and so does code that is not ours, which may
        keep what it gets; what is new is a chunked array, where that may pay."""
        if not prim.builtin:
            return _exposed(NUMPY.evaluate, (prim, raw, params), {})
        arrays = [x.force() if type(x) is Chunked else x for x in raw]
        out = _memory.spend(NUMPY.evaluate, prim, arrays, params)
        if type(out) is not np.ndarray:
            return out
        views = [x.expose() for x in raw if type(x) is Chunked and np.may_share_memory(x.force(), out)]
        return HOOK.adopt(out, choice, new=True) if out.flags.owndata and not views else out

    def hand_out(self, raw):
        return raw.expose()

    def fetch(self, raws):
        return [raw.force() for raw in raws]

    def own(self, raw):
        return Chunked(raw.cast(raw.dtype), raw.forced)

    def shared(self, raw):
        return raw.buffer.given

    def same(self, raw, x):
        array = x.buffer.array if type(x) is Chunked else x
        return x is raw or (raw.buffer.given and array is raw.buffer.array)

    def rule(self, prim, rule):
        """A user's gets plain arrays, as its forward does."""
        return rule if prim.builtin else lambda *args, **params: _exposed(rule, args, params)

    def update(self, prim, raw, y):
        """At once where it is handed out; and where it is small: that is handed out to us as long as we write."""
        buffer = raw.buffer
        ours = not buffer.given
        if ours and (buffer.step is not None or buffer.blocks() > _FEW_BLOCKS):
            return False
        NUMPY.update(prim, buffer.hand_out(), y)
        with _chunk_lock:
            buffer.given -= ours
        return True

    def write(self, raw, new):
        raw.assign(new)
        return raw


class _BlocksHook(_Hook):
    """What becomes a chunked array: what is large while distribution is on, and what was told to be distributed, if it
    has more than two blocks: with less, what it takes to wait is felt beside the arithmetic, and saves none."""

    def adopt(self, raw, choice, dtype=None, new=False):
        if type(raw) is Chunked:
            return raw if self.distributed(raw, choice) else raw.expose()
        fits = type(raw) is np.ndarray and raw.nbytes > 2 * _BLOCK_BYTES and raw.flags.carray
        if fits and self.distributed(raw, choice):
            _memory.bound = _memory.bound or _physical_bytes() // 16  # also if only this one is distributed
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
            x.readers[id(new)] = weakref.ref(new)
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
# straight-line program. First passes rewrite the forward graph; its backward sweep is then traced with the primitives'
# own rules, as Values, so that the passes see both; at last `_Lowering` writes the joint graph down as Python.
# A pass is a function of roots to roots, or a rule of node to node, of which `_pass` takes several in one walk. Nodes
# are never changed: a pass makes new ones where something is new, and they take over the data of the old, so that
# shapes and dtypes are known throughout. What may be rewritten, and what is written as plain calls of NumPy's,
# `_regular` decides, and nothing else.
# Throughout, a `node` is a Value and `prim` its primitive; `roots` are Values, or constants where passes found some;
# `args` are the operands of a node that is made anew, and x, y or a are operands: Values, Tensors or constants.
# Invariant: the roots that a pass returns have the value, the shape and the dtype of those it was given.
#
#     >>> a, b = Value(2.0, label="a"), Value(3.0, label="b")
#     >>> print(optimize(a * b + a**2).source.partition("\n\n")[0])
#     def forward():
#         x0 = i8._held
#         x1 = i9._held
#         t0 = x0 * x1
#         t1 = x0 * x0
#         t2 = t0 + t1
#         return [t2], (x0, x1, )
# ---------------------------------------------------------------------------------------------------------------------

__all__ += ["optimize"]

_BATCH_SCALARS, _BATCH_ARRAYS = 16, 4  # smallest groups worth an array operation: below, its overhead costs more
_BATCH_SIZE = 1 << 16  # elements of an array above which stacking it costs more than calls are saved
_FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}  # what rewrites are about; other dtypes stay as they are
_ADD, _SUBTRACT, _MULTIPLY, _WHERE = (TABLE[f] for f in (np.add, np.subtract, np.multiply, np.where))
_NEGATIVE, _SQUARED, _TRANSPOSE, _BROADCAST = (
    TABLE[f] for f in (np.negative, np.square, np.transpose, np.broadcast_to)
)
_PRODUCT, _SUM = TABLE[np.matmul], PRIMITIVES["sum"]
_VIEWS = (_reshape, _TRANSPOSE, _BROADCAST, _getitem)
# Operands that may be masks: where's condition, a mask times a float (micrograd's relu), masks made of masks.
_LOGICAL = "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor invert"
_MASKS = {_WHERE: (0,), _MULTIPLY: (0, 1), _cross_entropy: (1,), _less_labels: (1,)} | dict.fromkeys(_VIEWS, (0,))
_MASKS |= dict.fromkeys([TABLE[getattr(np, name)] for name in _LOGICAL.split()], (0, 1))


def _sort(x):
    """What a rewrite sees in a raw value: `float` for a weak number, `bool` for a mask, a dtype of _FLOATS; else, and
    if it is empty, None."""
    if type(x) is float or type(x) is bool:
        return type(x)
    if not isinstance(x, (np.ndarray, np.generic)) or not x.size:
        return None
    if x.dtype.kind == "b":
        return bool
    return x.dtype if x.dtype in _FLOATS else None


def _regular(node):
    """The one guard: whether a rewrite may fire on a node, and whether a plain call of NumPy's computes it.

    A primitive of this file made it; its operands are numbers, or arrays of one floating dtype, which it has, too, none
    of them empty; masks only where `_MASKS` says so. All else is computed by `_evaluate`, as in eager mode.
    """
    prim = node._prim
    if prim in _AS_THEY_ARE or not prim.builtin:
        return prim in _AS_THEY_ARE
    kinds, out = {_sort(x._held if isinstance(x, Array) else x) for x in node._args}, _sort(node._held)
    if bool in kinds or prim is _WHERE:
        masks = [i for i, x in enumerate(node._args) if _sort(_raw(x)) is bool]
        if not set(_MASKS.get(prim, ())).issuperset(masks) or (prim is _WHERE and not masks):
            return False
    kinds -= {bool, float}
    if None in kinds or len(kinds) > 1:
        return False
    if out is bool:
        return prim.vjps[0] is None or prim in _VIEWS
    if out is float:
        return not kinds or prim is _as_dtype
    return out is not None and (kinds <= {out} or prim is _as_dtype or prim is _pack)


def _twin(node, prim, args, params=_NO_PARAMS):
    """A node with the data of another."""
    new = _node(node._held, prim, args, params)
    new.label = node.label
    return new


def _renewed(node, args):
    """The node, or its twin if an operand is another one now."""
    for x, y in zip(args, node._args):
        if x is not y:
            return _twin(node, node._prim, args, node._params)
    return node


def _pass(*rules):
    """One walk over a graph for several rules: each takes a node whose operands are new, the next what that gave."""

    def rule(node, args):
        node = _renewed(node, args)
        for each in rules:
            node = each(node)
            if not isinstance(node, Value) or node._prim is None:
                break
        return node

    return lambda roots, nodes=None: _rewrite(roots, rule, nodes)


def _replayed(roots):
    """The graph anew, computed from the current data of its leaves and Tensors by the code of eager mode."""

    def rule(node, args):
        new = _twin(node, node._prim, args, node._params)
        _recompute(new)
        return new

    with _recording():
        return _rewrite(roots, rule)


def _reach(roots, nodes):
    """By node, the roots that send it a gradient, as a bit for each; of all nodes, oldest first."""
    reach = collections.defaultdict(int)
    for i, root in enumerate(roots):
        if isinstance(root, Value) and root._needs:
            reach[root] |= 1 << i
    for node in reversed(nodes):
        prim = node._prim
        if prim is None or node not in reach:
            continue
        for i, x in enumerate(node._args):
            if isinstance(x, Value) and x._needs and prim.vjps[0 if prim.operands is None else i] is not None:
                reach[x] |= reach[node]
    return reach


def _shape(x):
    return getattr(_raw(x), "shape", ())


def _kind(x):
    """Shape and dtype; of what is weak, its type."""
    x = _raw(x)
    return type(x) if type(x) in _WEAK_TYPES else (x.shape, x.dtype)


def _alike(x, node):
    """Whether x can stand for a node: of its shape and dtype, and weak if it is weak."""
    return _kind(x) == _kind(node)


def _is(x, prim):
    """Whether x is a node made by that primitive, on which a rewrite may fire."""
    return isinstance(x, Value) and x._prim is prim and _regular(x)


def _permutation(node):
    """The axes of a transpose, none of them negative."""
    axes = node._params.get("axes")
    return [*range(node.ndim)][::-1] if axes is None else [int(i) % node.ndim for i in axes]


# --- the passes ---


def fold_constants(node: Value):
    """Computes what depends on constants only: x * (2 * 3) -> x * 6. Leaves and Tensors are variables."""
    return node if any([isinstance(x, Array) for x in node._args]) else node._held


def _opposite(prim):
    """a + -b -> a - b, and the other way round."""
    return lambda node, a, b: _is(b, _NEGATIVE) and _twin(node, prim, (a, b._args[0]))


def _simpler_multiply(node, a, b):
    if type(b) is float and b == 1.0:
        return a
    if _is(a, _NEGATIVE):
        return _twin(node, _NEGATIVE, (_simple(_MULTIPLY, (a._args[0], b)),))
    # Where operands broadcast anyway, a broadcast one needs no array of its own; and a number is multiplied before.
    if _is(a, _BROADCAST) and _shape(b) == node.shape and node.ndim:
        return _twin(node, _MULTIPLY, (a._args[0], b))
    if _is(a, _BROADCAST) and _shape(b) == () and not getattr(b, "_needs", False):  # it would get one gradient, summed
        return _twin(node, _BROADCAST, (_simple(_MULTIPLY, (a._args[0], b)),), a._params)
    return a is b and node.ndim > 0 and _twin(node, _SQUARED, (a,))


def _simpler_power(node, x, y):
    if type(y) is not float or y not in (1.0, 2.0):
        return None
    return x if y == 1.0 else _twin(node, _SQUARED, (x,))


def _simpler_reshape(node, x, shape):
    inner = x._args[0] if _is(x, _reshape) else x
    if _alike(inner, node):
        return inner
    strong = type(_raw(inner)) not in _WEAK_TYPES  # else it is strong since it was an array on the way
    return strong and inner is not x and _twin(node, _reshape, (inner,), {"shape": node.shape})


def _is_undone(node, x):
    """Whether one transpose is the opposite of another, x."""
    return _is(x, _TRANSPOSE) and [_permutation(x)[i] for i in _permutation(node)] == [*range(node.ndim)]


def _is_power_of_two(y):
    """By such a number, and only by such, the reciprocal is exact."""
    return type(y) is float and math.frexp(y)[0] in (0.5, -0.5) and 1e-4 < abs(y) < 1e4


_SIMPLER: dict[Primitive, Callable] = {  # a Value, if there is a simpler one
    _ADD: _opposite(_SUBTRACT),
    _SUBTRACT: _opposite(_ADD),
    _MULTIPLY: _simpler_multiply,
    TABLE[np.divide]: lambda node, x, y: _is_power_of_two(y) and _twin(node, _MULTIPLY, (x, 1.0 / y)),
    TABLE[np.power]: _simpler_power,
    PRIMITIVES["mean"]: lambda node, a, **params: _twin(
        node, _MULTIPLY, (_simple(_SUM, (a,), params), node.size / np.size(_raw(a)))
    ),
    _reshape: _simpler_reshape,
    _TRANSPOSE: lambda node, x, axes=None: _is_undone(node, x) and x._args[0],
    _NEGATIVE: lambda node, x: _is(x, _NEGATIVE) and x._args[0],
    TABLE[np.positive]: lambda node, x: x,
    TABLE[np.copy]: lambda node, a: a,
    _BROADCAST: lambda node, array, shape: array,
    _as_dtype: lambda node, a, dtype: a,
}


def simplify(node: Value) -> Value:
    """Algebra that is exact, also for inf, nan and -0.0: x * 1 -> x, x**2 -> square(x), a - -b -> a + b, x / 4 ->
    x * 0.25."""
    while (simpler := _SIMPLER.get(node._prim)) and _regular(node):
        for args in (node._args, node._args[::-1])[: 1 + (node._prim in (_ADD, _MULTIPLY))]:  # in either order
            new = simpler(node, *args, **node._params)
            if isinstance(new, Value) and _alike(new, node):
                node = new
                break
        else:
            break
    return node


def _simple(prim, args, params=_NO_PARAMS):
    return simplify(_record(prim, args, params))


def _key(x):
    """Something hashable that is equal for interchangeable operands and parameters."""
    kind = type(x)
    if kind in (float, int, str):
        return kind, repr(x)  # which tells -0.0 from 0.0
    if kind is tuple or kind is list:
        return tuple(map(_key, x))
    if kind is slice:
        return kind, _key((x.start, x.stop, x.step))
    return id(x)  # arrays and nodes, what there is one of, and what we know nothing about


def merge_common(swept: bool = True) -> Callable:
    """Makes equal operations on the same operands one node: tanh(x) * tanh(x) -> t * t with one tanh. What a user's
    primitive does is its own affair: it may draw random numbers.

    Before the sweep only what has no gradient: a node that is two sends two gradients, and 0 * inf + 1 * inf is nan,
    where (0 + 1) * inf is not."""
    known = {}

    def rule(node):
        if not node._prim.builtin or (node._needs and not swept):
            return node
        return known.setdefault((node._prim, _key(node._args), _key(tuple(node._params.items()))), node)

    return rule


def _sum_of_products(*terms, products):
    pairs = map(operator.mul, terms[: 2 * products : 2], terms[1 : 2 * products : 2])
    return functools.reduce(operator.add, [*pairs, *terms[2 * products :]])


# A sum of products of 0-d operands and of what else is added: a1*b1 + a2*b2 + ... + c + d + ...
_dot = primitive(
    _sum_of_products,
    lambda i, g, out, terms, products: g * terms[i ^ 1] if i < 2 * products else g,
    name="dot",
    variadic=True,
)


def _collected(roots, fits, parts, whole, most=math.inf):
    """One walk that makes one node of several. What but one other needs, if fits(node, that other), waits for that one,
    unless it has `most` parts. parts(node, args, the parts of each operand that waited, else ()) is a list;
    whole(node, its parts) the new node."""
    nodes, users, waiting = _oldest_first(roots), {}, {}
    for node in (*nodes, _joined(roots)):
        for x in node._args:
            if isinstance(x, Value):
                users[x] = None if x in users else node

    def rule(node, args):
        found = parts(node, args, [waiting.pop(id(x), ()) for x in node._args])
        if users[node] is None or len(found) >= most or not fits(node, users[node]):
            return whole(node, found)
        waiting[id(node)] = found
        return found[-1]  # a place holder

    return _rewrite(roots, rule, nodes)


def flatten(roots: Sequence) -> list:
    """Makes chains of + one sum, and sums of products of numbers a dot product: a*b + c*d + e -> dot(a, b, c, d, e)."""
    is_sum = functools.cache(lambda node: _is(node, _ADD))

    def terms(node, args, waited):
        """What is added, each with whether nobody else needs it."""
        if not is_sum(node):
            return [(True, _renewed(node, args))]
        found = []
        for x, more in zip(args, waited):
            more = more or [(False, x)]
            if len(more) > len(found):
                found, more = more, found
            found += more
        return found

    return _collected(roots, lambda x, node: is_sum(node) and _alike(x, node), terms, _sum_of)


def _sum_of(node, terms):
    """One node for a sum of terms; for one term, that."""
    if len(terms) < 3:
        return terms[0][1] if len(terms) < 2 else _renewed(node, tuple([x for _, x in terms]))
    products = []
    rest = []
    zero = []  # where sum() starts: it makes -0.0 a 0.0, and comes last
    for alone, x in terms:
        factors = ()
        if alone and not node.ndim and (_is(x, _MULTIPLY) or _is(x, _SQUARED)):
            factors = (x._args * 2)[:2]  # of a square, its operand twice
        if type(x) is float and x == 0.0:
            zero = [x] if math.copysign(1.0, x) > 0 else zero
        elif factors and not any([_sort(_raw(y)) is bool for y in factors]):
            products += factors
        else:
            rest.append(x)
    return _twin(node, _dot, (*products, *rest, *zero), {"products": len(products) // 2})


# Numbers of a graph as one array: how `batch` takes up leaves, and nodes that it left alone.
_pack = primitive(
    lambda *numbers, dtype: np.array(numbers, dtype),
    lambda i, g, out, numbers, dtype: g[i],
    name="pack",
    variadic=True,
)


class _Batch:
    """What `batch` knows while it rebuilds a graph: which new node, or which place in which stack, an old node became.

    A stack has its members along the first axis; a place is (number of the stack, place in it). Constants have places,
    too, by their keys.
    """

    def __init__(self, reach):
        self.reach = reach
        self.new = {}
        self.stacks = []
        self.places = {}

    def single(self, x):
        """The new form of an operand, on its own."""
        if not isinstance(x, Value) or x._prim is None:
            return x
        if x not in self.new:
            number, place = self.places[x]
            part, kind = self.stacks[number][place], type(x._held)
            part = _as_dtype(part, float) if kind in _WEAK_TYPES else part
            self.new[x] = np.not_equal(part, 0.0) if kind is bool else part
        return self.new[x]

    def put(self, members, stack):
        """Notes that the members of a stack stand for these nodes."""
        self.places.update([(x, (len(self.stacks), place)) for place, x in enumerate(members)])
        self.stacks.append(stack)

    def stack(self, members, dtype):
        """Makes a stack of what is in none yet: constants, or nodes and Tensors, which these names stand for."""
        xs = list(map(self.single, members.values()))
        shape = _shape(xs[0])
        if not isinstance(xs[0], Array):
            new = np.array(xs, None if shape else dtype)
        elif shape:
            new = _record(_stack, tuple(xs), {"axis": 0})
        else:
            new = _record(_pack, tuple(xs), {"dtype": xs[0].dtype})
        self.put(members, new)

    def gather(self, xs, layout, dtype=None):
        """The operands as one array (*layout, *their shape), or one that broadcasts to it. It is a stack that exists, a
        part or a transpose of one where that will do, and a copy only where not."""
        keys = [x if isinstance(x, Array) else (_key(x), dtype) for x in xs]
        # What is in no stack yet becomes one, in the order in which it is wanted here; a stack has either constants, or
        # what sends its gradients to the same roots: a zero from one to which others send none would make inf nan.
        loose = collections.defaultdict(dict)
        for key, x in zip(keys, xs):
            if key not in self.places:
                loose[(self.reach.get(x, 0), _kind(x)) if isinstance(x, Array) else None][key] = x
        for members in loose.values():
            self.stack(members, dtype)
        found, shape = [self.places[key] for key in keys], _shape(xs[0])
        starts, size = {}, 0
        for number in dict.fromkeys([number for number, _ in found]):
            starts[number], size = size, size + _shape(self.stacks[number])[0]
        joint = self.stacks[found[0][0]] if len(starts) == 1 else _concatenate(*map(self.stacks.__getitem__, starts))
        index = np.array([starts[number] + place for number, place in found])
        grid = index.reshape(layout)
        for axis in range(grid.ndim):  # what repeats throughout broadcasts, and needs no copy
            first = grid.take([0], axis)
            grid = first if (grid == first).all() else grid
        flat = grid.ravel().tolist()
        step = max(1, (flat[-1] - flat[0]) // max(1, len(flat) - 1))
        if flat != [*range(flat[0], flat[-1] + 1, step)]:
            return np.reshape(joint[(index,)], (*layout, *shape))
        if len(flat) < size:  # nor does a part with the same steps throughout
            joint = joint[flat[0] : flat[-1] + 1 : step]
        return np.reshape(joint, (*grid.shape, *shape))

    def alone(self, node):
        """The new form of a node that is in no group. A stack of what is in stacks already is there."""
        if _is(node, _stack) and all([isinstance(x, Value) and x in self.places for x in node._args]):
            found = self.gather(node._args, (len(node._args),))
            if _alike(found, node) and not node._params.get("axis"):
                return found
        return _renewed(node, tuple(map(self.single, node._args)))

    def operand(self, nodes, k, layout):
        """Operand k of all nodes, and whether it is stacked or one that they share. What is made of that is a node, so
        that a Tensor is one, too: a replay reads it anew."""
        xs = [node._args[k] for node in nodes]
        if len(set(map(_key, xs))) == 1:
            return _recorded(self.single(xs[0])), False
        return self.gather(xs, layout), True

    def combine(self, nodes):
        """Makes one operation of a group, if that can be."""
        node, prim, layout = nodes[0], nodes[0]._prim, (len(nodes),)
        if prim is _dot:
            return self.sums(nodes)
        raw, operands, stacked = list(map(_raw, node._args)), [], []
        strong = [x.dtype for x in raw if getattr(x, "dtype", None) in _FLOATS]
        for k, x in enumerate(raw):
            y, several = self.operand(nodes, k, layout)
            if several and prim.elementwise and np.ndim(x) < node.ndim:
                y = np.reshape(y, _shape(y)[:1] + (1,) * (node.ndim - np.ndim(x)) + np.shape(x))
            if several and strong and type(x) is float:  # a number that was weak takes the dtype of those it meets
                y = y.astype(strong[0])
            operands.append(y)
            stacked.append(several)
        if not any(stacked):
            return False
        if prim.elementwise:
            out = np.broadcast_to(_record(prim, tuple(operands), node._params), (*layout, *node.shape))
        else:
            out = _BATCHED[prim](node, len(nodes), operands, stacked)
        if out is not None:
            self.put(nodes, out)
        return out is not None

    def sums(self, nodes):
        """Dot products and sums of the same length. Where every one of some left rows meets every one of some right
        rows, the dot products are a matrix product."""
        node, layout = nodes[0], (len(nodes),)
        end, zero = 2 * node._params["products"], _starts_at_zero(node)
        dtype = node.dtype

        def block(rows):
            stack = self.gather([x for row in rows for x in row], (len(rows), len(rows[0])), dtype)
            return np.broadcast_to(stack, (len(rows), len(rows[0]), *node.shape))

        def different(rows):
            """By key, the number of a row and the row; and the numbers of all rows."""
            known = {}
            return known, [known.setdefault(_key(row), (len(known), row))[0] for row in rows]

        terms, n = [], len(node._args) - end - zero
        if end:
            left, right = ([one._args[i:end:2] for one in nodes] for i in (0, 1))
            (lefts, i), (rights, j) = different(left), different(right)
            if len(lefts) * len(rights) == len(nodes) == len(set(zip(i, j))):
                nodes = [one for *_, one in sorted(zip(j, i, nodes), key=operator.itemgetter(0, 1))]
                lefts, rights = ([row for _, row in known.values()] for known in (lefts, rights))
                layout, zero = (len(rights), len(lefts)), False  # BLAS starts at 0.0, so that no sum of it is -0.0
                terms = [np.matmul(block(rights), np.swapaxes(block(lefts), 0, 1))]
            else:
                terms = [np.sum(block(left) * block(right), axis=1)]
        if n > 2:
            rest = np.sum(block([one._args[end : end + n] for one in nodes]), axis=1)
            terms.append(np.reshape(rest, (*layout, *node.shape)))
        else:
            terms += [self.operand(nodes, end + k, layout)[0] for k in range(n)]
        out = functools.reduce(operator.add, terms + [0.0] * zero)
        out = np.reshape(out, (len(nodes), *node.shape))
        self.put(nodes, out if out.dtype == dtype else out.astype(dtype))
        return True


def _batched_matmul(node, n, operands, stacked):
    x, y = operands
    a, b = (np.ndim(_raw(z)) for z in node._args)
    if stacked == [True, False] and a == 1 and b <= 2:
        return np.matmul(x, y)
    if stacked == [False, True] and b == 1 and a <= 2:
        return np.matmul(y, x.T)
    if max(a, b) > 2:
        return None
    x = np.reshape(x, (*_shape(x)[:-1], 1, _shape(x)[-1])) if a == 1 else x
    y = np.reshape(y, (*_shape(y), 1)) if b == 1 else y
    return np.reshape(np.matmul(x, y), (n, *node.shape))


def _batched_axis(node, n, operands, stacked):
    ndim = len(_shape(node._args[0]))
    axis = node._params.get("axis", -1 if "softmax" in node._prim.name else None)
    axes = axis if isinstance(axis, tuple) else (axis,)
    shifted = tuple([int(i) % ndim + 1 for i in (range(ndim) if axis is None else axes)])
    return _record(node._prim, tuple(operands), node._params | {"axis": shifted[0] if len(shifted) == 1 else shifted})


def _batched_getitem(node, n, operands, stacked):
    index = node._params["index"]
    return _getitem(operands[0], index=(slice(None), *index)) if _is_plain(index) else None


_BATCHED: dict[Primitive, Callable] = {
    **{PRIMITIVES[name]: _batched_axis for name in ("sum", "mean", "prod", "max", "min", "var", "std", "norm")},
    **dict.fromkeys((logsumexp, softmax, log_softmax), _batched_axis),
    _PRODUCT: _batched_matmul,
    _getitem: _batched_getitem,
    _reshape: lambda node, n, operands, stacked: np.reshape(operands[0], (n, *node.shape)),
    _TRANSPOSE: lambda node, n, operands, stacked: np.transpose(operands[0], (0, *[i + 1 for i in _permutation(node)])),
}


def _starts_at_zero(node):
    """Whether 0.0 is the last of the terms of a sum of products."""
    return type(node._args[-1]) is float and node._args[-1] == 0.0


def _group(node, reach):
    """What is equal for nodes that may become one, or the node itself if it stays on its own; and how many of them are
    worth an operation on arrays."""
    prim, args, zero = node._prim, node._args, False
    kinds = list(map(_kind, (node, *args)))
    enough = _BATCH_ARRAYS if any([_shape(x) for x in args]) else _BATCH_SCALARS
    if prim is _dot:
        zero = _starts_at_zero(node)
        enough = 4 * _BATCH_SCALARS / (len(args) - zero)
        fits = all([_shape(x) == node.shape for x in args[: len(args) - zero]])
    elif prim in _BATCHED:
        fits = all([isinstance(_raw(x), np.ndarray) for x in args])
    else:
        fits = prim.elementwise and prim.operands and not node._params
    if not fits or node.size > _BATCH_SIZE or not _regular(node):
        return node, 2
    shared = [id(x) for x in args if isinstance(x, Array) and x.ndim > 1 and not getattr(x, "_prim", None)]
    return (prim, _key(tuple(node._params.items())), *kinds, *shared, zero, reach), enough


def batch(roots: Sequence) -> list:
    """Groups equal operations of equal depth into one on stacked operands (Neubig et al. 2017, "On-the-fly Operation
    Batching in Dynamic Computation Graphs"): tanh(a), tanh(b), ... -> tanh([a, b, ...]). A group of dot products of
    some rows with all of some others becomes a matrix product.

    Only what sends its gradients to the same roots goes together: where one has none, 0 * inf would make it nan."""
    nodes, depth = _oldest_first(roots), {}
    reach = _reach(roots, nodes)
    state = _Batch(reach)
    levels = collections.defaultdict(list)
    for node in nodes:
        depth[node] = level = 1 + max([depth[x] for x in node._args if isinstance(x, Value)], default=-1)
        if node._prim is not None:
            levels[level].append(node)
    for _, members in sorted(levels.items()):
        groups = collections.defaultdict(list)
        for node in members:  # a long sum may be one operation on arrays by itself
            alike = len(members) > 1 or node._prim is _dot
            groups[_group(node, reach[node]) if alike else (node, 2)].append(node)
        for (_, enough), group in sorted(groups.items(), key=lambda item: -len(item[1])):
            if any([x in state.places for x in group[0]._args if isinstance(x, Value)]):
                enough = min(enough, _BATCH_ARRAYS)  # the numbers are in an array already
            if len(group) < enough or not state.combine(group):
                for node in group:
                    state.new[node] = state.alone(node)
    return [state.single(root) for root in roots]


def _run_steps(*operands, steps):
    values = list(operands)
    for prim, places, dtype in steps:
        params = {"dtype": dtype} if prim is _as_dtype else _NO_PARAMS
        values.append(_evaluate(prim, [values[i] for i in places], params))
    return values[-1]


_fused = primitive(_run_steps, None, name="fused", variadic=True)  # of a block program: see room 8
_MAX_CHAIN = 32
_AS_THEY_ARE = {_detach, _fused}  # what is right on any operands


def fuse(roots: Sequence, smallest: int = 1, products: bool = True) -> list:
    """Makes element-wise operations, where nothing else needs what lies between, one node: a block program. They have
    the smallest size or more. With `products`, also a matrix product before them: tanh(x @ w + b)."""

    def plain(x):
        part = x._prim is not None and x._prim.elementwise and (not x._params or x._prim is _as_dtype)
        return part and type(x._held) is np.ndarray and x._held.size >= smallest and _regular(x)

    def fits(x, node):
        return x.shape == node.shape and plain(node) and (plain(x) or (products and _is(x, _PRODUCT)))

    def chain(node, args, waited):
        return [*itertools.chain(*waited), _renewed(node, args)]

    def close(node, chain):
        inside = set(map(id, chain))
        outside = {id(x): x for node in chain for x in node._args if id(x) not in inside}
        places = {x: i for i, x in enumerate([*outside, *map(id, chain)])}
        steps = tuple([(node._prim, tuple([places[id(x)] for x in node._args]), node.dtype) for node in chain])
        return _twin(chain[-1], _fused, tuple(outside.values()), {"steps": steps}) if len(chain) > 1 else chain[0]

    return _collected(roots, fits, chain, close, _MAX_CHAIN)


def _formula(steps, operands):
    """A block program as Python would write it; what has no label is a letter, or · if there is but one such."""
    labels = [getattr(x, "label", "") for x in operands]
    letters = (c for c in "xyzabdefghijklmnopqrstuv" if c not in labels)
    if sum([isinstance(x, Array) and not x.label for x in operands]) == 1:
        letters = iter("·")
    ranks = {"+": 1, "-": 1, "*": 2, "/": 2, "@": 2}

    def name(x, label):
        if isinstance(x, Array):
            return label or next(letters, "·")
        return f"{x:g}" if isinstance(x, float) else "c"

    def within(part, least):
        text, rank = part
        return text if rank >= least else f"({text})"

    texts = [(name(x, label), 4) for x, label in zip(operands, labels)]  # with how tightly they bind
    for prim, places, _ in steps:
        symbol, args, rank = prim.symbol, [texts[i] for i in places], 4
        if symbol in ranks and len(args) == 2:
            rank = ranks[symbol]
            text = f"{within(args[0], rank)} {symbol} {within(args[1], rank + 1)}"
        elif symbol == "-":
            text, rank = f"-{within(args[0], 3)}", 3
        else:
            text = f"{symbol}({', '.join([text for text, _ in args])})"
        texts.append((text, rank))
    return texts[-1][0]


def reduce_squares(node: Value) -> Value:
    """Writes a sum of squares as a dot product, which needs no array for the squares: sum(d * d) -> d @ d. Not where
    BLAS would share the work among its threads, which takes long while the cores are busy."""
    x = node._args[0]
    if node.ndim or not _is(node, _SUM) or not _is(x, _SQUARED) or not 0 < len(x.shape) <= x.size <= 10_000:
        return node
    flat = _simple(_reshape, x._args, {"shape": (x.size,)})
    product = _record(_PRODUCT, (flat, flat))
    return product if _alike(product, node) else node


# --- what users' primitives do is not traced, but done anew ---


def _run_rule(g, out, *operands, prim, i, params):
    """The gradient of operand i of a user's primitive, by the sweep of eager mode: its rule may do what it likes."""
    x = _leaf(operands[i])
    with _recording():
        node = _node(out, prim, (*operands[:i], x, *operands[i + 1 :]), params)
    h = _backpropagate(node, g).get(x)
    return _filled_like(operands[i], 0) if h is None else h


def _sealed_i(i, g, out, operands, prim, params):
    if prim.vjps[0 if prim.operands is None else i] is None:
        return None
    args, params = (g, out, *operands), {"prim": prim, "i": i, "params": params}
    return _node(_run_rule(*map(_raw, args), **params), _rule, args, params)


_rule = primitive(_run_rule, None, name="rule", variadic=True, typed=())  # that sweep settles the dtypes
_sealed = primitive(
    lambda *operands, prim, params: _evaluate(prim, operands, params),
    _sealed_i,
    name="sealed",
    variadic=True,
    typed=(),
)


def seal(node):
    """Makes the rule of a user's primitive a node, when a sweep comes by."""
    params = {"prim": node._prim, "params": node._params}
    return node if node._prim.builtin else _twin(node, _sealed, node._args, params)


# --- lowering: the joint graph of values and gradients as straight-line Python ---

# How NumPy or Python computes a result: {0} stands for the first operand, {all} for all of them; {out} for an array to
# write to, and what ends in _OUT can do without.
_OUT = ", out={out})"
_INFIX = {np.add: "{0} + {1}", np.subtract: "{0} - {1}", np.multiply: "{0} * {1}", np.divide: "{0} / {1}"}
_INFIX |= {np.greater: "{0} > {1}", np.less: "{0} < {1}", np.square: "{0} * {0}", np.negative: "-{0}"}
_MAX_LINES = 5_000  # of a forward: compiling takes 0.4 ms a line with its gradient. Larger graphs are replayed.
_MAX_SWEEPS = 4  # of a program, from different roots, that are compiled; others are done node by node


def _number_form(low, node):
    """Of a 0-d result: plain arithmetic where Python's is that of the engine."""
    prim, params, kinds = node._prim, node._params, {type(_raw(x)) for x in node._args}
    if prim is _detach:
        return "{0}"
    if prim is _dot and len(node._args) < 100:
        end = 2 * params["products"]
        terms = [f"{{{i}}} * {{{i + 1}}}" for i in range(0, end, 2)]
        return " + ".join(terms + [f"{{{i}}}" for i in range(end, len(node._args))])
    if not params and np.ndarray not in kinds:
        if prim.forward in _INFIX:
            return _INFIX[prim.forward]
        f = prim.forward if prim.ufunc and isinstance(node._held, np.generic) else None
        f = prim.scalar if kinds == {float} and prim.scalar else f
        return f and f"{low.function(f)}({{all}})"
    if prim is _as_dtype:
        return "float({0})" if params["dtype"] is float else None
    if kinds != {np.ndarray}:
        return None
    if prim is _getitem and all([type(i) is int for i in params["index"]]):
        return f"{{0}}[{', '.join(map(str, params['index']))}]"
    if prim is _PRODUCT and _shape(node._args[0]) != (1,):
        return "{0}.dot({1})"
    return {_SUM: "np.add.reduce({0}, None)", _reshape: "{0}.reshape(())[()]"}.get(prim)


def _matmul_form(low, node, x, y):
    shapes = [_shape(x), _shape(y)]
    dots = all([len(shape) <= 2 and math.prod(shape) > 1 for shape in shapes])  # of one element, it drops nan and inf
    return ("{0}.dot({1}" if dots else "np.matmul({0}, {1}") + _OUT


def _sum_form(low, node, a, axis=None, keepdims=False):
    a = _raw(a)
    if _few_axes(a, axis):
        return None
    if np.ndim(a) == 2 and axis in (0, (0,)) and not keepdims:
        return f"{low.name(_ones(np.shape(a)[0], node.dtype))}.dot({{0}}{_OUT}"  # BLAS sums rows faster than NumPy
    if axis is not None:
        axis = tuple(map(int, axis)) if isinstance(axis, tuple) else int(axis)
    return f"np.add.reduce({{0}}, {axis}, None, {{out}}, {bool(keepdims)})"


def _places(index, shape):
    """The places along the first axis that an index names, if it does nothing else; none of them negative."""
    if len(index) != 1 or not isinstance(index[0], np.ndarray) or index[0].dtype.kind != "i":
        return None
    return np.where(index[0] < 0, index[0] + shape[0], index[0])


def _getitem_form(low, node, a, index):
    places = _places(index, _shape(a))
    if places is None:
        return ""
    return f"np.take({{0}}, {low.name(places)}, 0, {{out}}, 'clip')"  # with 'raise', take would make a copy


def _scatter_form(low, node, a, *parts, shape, index):
    places = _places(index, shape)
    if not _is_plain(index) and (parts or places is None or len(np.unique(places)) < places.size):
        return None
    return f"{{out}}.fill(0); {{out}}[{low.name(index)}] = {{0}}"


def _where_form(low, node, condition, x, y):
    if type(y) is float and repr(y) == "0.0" and type(_raw(x)) is np.ndarray and np.size(_raw(condition)) > _LITTLE:
        return "_masked({0}, {1}, {out})"
    return "np.copyto({out}, {2}, 'unsafe'); np.copyto({out}, {1}, 'unsafe', {0})"


def _pack_form(low, node, *numbers, dtype):
    if _are_leaves(numbers) and type(numbers[0]._held) is float:
        return f"{{out}}[:] = [x._held for x in {low.name(numbers)}]"  # their data is read here, not as inputs
    return "{out}[:] = {all}"


def _dot_form(low, node, *terms, products):
    more = [f"; np.add({{out}}, {{{i}}}{_OUT}" for i in range(2, len(terms))]
    return None if products else f"np.add({{0}}, {{1}}{_OUT}{''.join(more)}"


def _fused_form(low, node, *operands, steps):
    last = len(operands) + len(steps) - 1
    return f"_blocks({low.name(steps)}, [{{all}}], {node.shape}, [{last}], None, [{{out}}])"


def _joined_form(low, node, *arrays, axis=0):
    return f"np.{node._prim.name}([{{all}}], {int(axis)}, {{out}})"


# Of arrays; "" for a view, where that can be made once.
_FORMS: dict[Primitive, str | Callable] = {
    **{_PRODUCT: _matmul_form, _SUM: _sum_form, _scatter: _scatter_form, _pack: _pack_form, _dot: _dot_form},
    **{_fused: _fused_form, _detach: "{0}", _concatenate: _joined_form, _stack: _joined_form, _getitem: _getitem_form},
    **dict.fromkeys((_as_dtype, TABLE[np.copy]), "np.copyto({out}, {0}, 'unsafe')"),
    _WHERE: _where_form,
    _reshape: lambda low, node, a, shape: f"{{0}}.reshape({node.shape})",
    _TRANSPOSE: lambda low, node, a, axes=None: f"{{0}}.transpose({', '.join(map(str, _permutation(node)))})",
    _BROADCAST: lambda low, node, array, shape: f"np.broadcast_to({{0}}, {node.shape})",
}


class _Lowering:
    """Writes the functions `forward` and `backward` of a graph: a line or two per node, in the order of the graph.

    sweeps: (seeds, gradients, whose they are) of each sweep; there is a function `backward` for each. What several of
        them need is computed by `forward`, and stays as it is, so that they may run in any order.

    Arrays go to buffers that are made once, and shared by results that are not needed at the same time; views of
    buffers are made once, too; numbers are local variables. A name is an input x, a buffer or view of one b, a constant
    or function c, a local t, or out for an array that a leaf gets as its gradient. User's strings are never names.
    """

    def __init__(self, roots, sweeps):
        self.space = {"np": np, "math": math, "_evaluate": _evaluate, "_blocks": run_blocks}
        self.space |= {"_as_before": _as_before, "_checked": _checked, "_masked": _masked}
        self.names = {}  # of nodes, Tensors, and, by id, of other objects
        self.fixed = {}  # by name: what is the same array in every run
        self.buffers = {}  # a node's own buffer, until its last use
        self.spare = collections.defaultdict(list)
        self.inputs = {}
        self.lines = []  # of forward, then of each backward
        self.early = set()  # the locals that forward makes
        self.saved = {}  # those of them that a backward needs, in order
        self.number = itertools.count()
        self.roots, self.sweeps = roots, sweeps
        later = [_oldest_first(gradients) for _, gradients, _ in sweeps]
        often = [x for x, n in collections.Counter(itertools.chain(*later)).items() if n > 1]
        first = dict.fromkeys(sorted({*_oldest_first(roots), *often}, key=_get_number))
        sections = [list(first)] + [[x for x in nodes if x not in first] for nodes in later]
        for seeds, *_ in sweeps:
            self.names.update((seed, f"seed{i}") for i, seed in enumerate(seeds))
        self.plan(sections)
        self.place = -1
        for nodes in sections:
            self.lines.append([])
            for node in nodes:
                self.place += 1
                if node._prim is not None:
                    self.emit(node)
                for dead in self.dying.get(self.place, ()):
                    if dead in self.buffers:
                        buffer = self.buffers.pop(dead)
                        self.spare[buffer.dtype, buffer.size].append(buffer)

    def plan(self, sections):
        """When the data of each node is needed last. What may be a view of an operand keeps that operand alive."""
        nodes = [node for section in sections for node in section]
        self.forms = {node: self.form(node) for node in nodes}
        last = {}
        for i, node in enumerate(nodes):
            last[node] = i
            last.update([(x, i) for x in node._args if isinstance(x, Value)])
        owned = [pair for _, gradients, owners in self.sweeps for pair in zip(gradients, owners)]
        last.update(dict.fromkeys([*self.roots, *(g for g, _ in owned)], math.inf))
        if len(sections) > 2:
            last.update((x, math.inf) for x in sections[0] if last[x] >= len(sections[0]))
        for node in reversed(nodes):
            if type(node._held) is np.ndarray and "{out}" not in (self.forms[node] or ""):
                for x in node._args:
                    if isinstance(x, Value):
                        last[x] = max(last[x], last[node])
        self.last = last
        self.dying = collections.defaultdict(list)
        for node, i in last.items():
            self.dying[i].append(node)
        self.handed_out = {g for g, own in owned if _alike(g, own[0])}.difference(sections[0])

    # --- names ---

    def bind(self, prefix, x):
        """A new name for something that stays."""
        name = f"{prefix}{next(self.number)}"
        self.space[name] = x
        if isinstance(x, np.ndarray):
            self.fixed[name] = x
        return name

    def name(self, x):
        """How the source calls an operand."""
        if type(x) is bool or (type(x) is float and math.isfinite(x)):
            return repr(x) if x >= 0 else f"({x!r})"
        key = x if isinstance(x, Array) else id(x)
        name = self.names.get(key)
        if name is None:
            name = self.names[key] = f"x{len(self.inputs)}" if isinstance(x, Array) else self.bind("c", x)
            if isinstance(x, Array):
                self.inputs[name] = x
                self.early.add(name)
        if len(self.lines) > 1 and name in self.early:
            self.saved[name] = None
        return name

    def function(self, f):
        if isinstance(f, np.ufunc) or f.__module__ == "math":
            return f"{'np' if isinstance(f, np.ufunc) else 'math'}.{f.__name__}"
        return self.name(f)

    def local(self, node, expression, prefix="t"):
        """A line for what is new in every run."""
        name = self.names[node] = f"{prefix}{next(self.number)}"
        if len(self.lines) == 1:
            self.early.add(name)
        self.lines[-1].append(f"{name} = {expression}")
        return name

    def target(self, node, reuse):
        """The buffer for a node's result: that of an operand whose last use this is, a spare or a new one."""
        shape, dtype = node.shape, node.dtype
        if node in self.handed_out:
            return self.local(node, f"np.empty({shape}, np.{dtype.name})", "out")
        for x in reuse:
            if isinstance(x, Value) and x in self.buffers and self.last[x] == self.place and _alike(x, node):
                self.names[node], self.buffers[node] = self.names[x], self.buffers.pop(x)
                return self.names[node]
        spare = self.spare[dtype, node.size]
        buffer = spare.pop() if spare else np.empty(node.size, dtype)
        self.names[node], self.buffers[node] = self.bind("b", buffer.reshape(shape)), buffer
        return self.names[node]

    # --- lines ---

    def form(self, node):
        """How a result comes about by NumPy's calls or Python's arithmetic; None if `_evaluate` does it."""
        prim, params = node._prim, node._params
        if prim is None or not _regular(node):
            return None
        if type(node._held) is not np.ndarray:
            return _number_form(self, node)
        if prim in _VIEWS and (not hasattr(_raw(node._args[0]), "dtype") or len(node._args) > 1):
            return None
        found = _FORMS.get(prim)
        if found is None and prim.elementwise and not params and (prim.ufunc or prim.reads == "out"):
            return f"{self.function(prim.forward)}({{all}}{_OUT}"
        return found(self, node, *node._args, **params) if callable(found) else found

    def emit(self, node):
        form = self.forms[node]
        if form is not None and node._prim in _VIEWS and self.viewed(node):
            return
        if not form:
            self.local(node, self.call(node))
            return
        names = [self.name(x) for x in node._args] if "{0}" in form or "{all}" in form else []
        if form == "{0}":
            self.names[node] = names[0]
            return
        fill = functools.partial(str.format, all=", ".join(names))
        if "{out}" not in form:
            self.local(node, fill(form, *names))
        elif node in self.handed_out and form.endswith(_OUT) and form.count("{out}") == 1:
            self.local(node, fill(form.removesuffix(_OUT) + ")", *names), "out")
        else:
            reuse = () if node._prim in _FORMS else node._args
            self.lines[-1].append(fill(form, *names, out=self.target(node, reuse)))

    def viewed(self, node):
        """Whether it is a view of what is always the same array: made now, it costs nothing in a run."""
        base = self.fixed.get(self.name(node._args[0]))
        if base is None or "{out}" in self.forms[node] or type(node._held) is not np.ndarray:
            return False
        view = node._prim.forward(base, **node._params)
        if np.may_share_memory(view, base):
            self.names[node] = self.bind("b", view)
        return node in self.names

    def call(self, node):
        """The forward of a primitive on whatever operands and parameters it has."""
        prim, params, names = node._prim, node._params, [self.name(x) for x in node._args]
        if not prim.builtin:  # code that is not ours may keep what it gets
            names = [
                f"{name}.copy()" if name[0] in "btos" and type(_raw(x)) is np.ndarray else name
                for name, x in zip(names, node._args)
            ]
        names = "".join([f"{name}, " for name in names])
        if prim.builtin:
            call = f"_evaluate({self.name(prim)}, ({names}), {self.name(params)})"
        else:
            call = f"{self.name(functools.partial(prim.forward, **params))}({names})"
        if type(node._held) is np.ndarray:  # its shape may be another, if it depends on data
            return f"_as_before({call}, {node.shape}, {self.name(node.dtype)})"
        return call

    def finish(self):
        """Heads and tails of the functions, their source, and the functions."""
        handed, tails = set(), []
        for _, gradients, owners in self.sweeps:
            names = list(map(self.name, gradients))
            for i, (g, own) in enumerate(zip(gradients, owners)):
                name = names[i]
                if not _alike(g, own[0]):  # the numbers of a pack
                    names[i] = f"*{name}.tolist()" if type(own[0]._held) is float else f"*{name}"
                elif type(g._held) is np.ndarray and (name[0] != "o" or name in handed):
                    names[i] = f"np.array({name})"  # a leaf owns its gradient
                handed.add(name)
            tails.append(f"return [{', '.join(names)}]")
        saved = "".join(f"{name}, " for name in self.saved)
        results = [self.name(root) for root in self.roots]
        results = [f"np.array({x})" if type(r._held) is np.ndarray else x for x, r in zip(results, self.roots)]
        head = []
        for name, x in self.inputs.items():
            source = self.bind("i", x)
            head.append(f"{name} = {source}._held")
            if type(x._held) not in _WEAK_TYPES:
                kind = "ndarray" if x.shape else type(x._held).__name__  # which arrays in blocks become
                wrong = f"type({name}) is not np.{kind} or {name}.shape != {x.shape}"
                head.append(f"if {wrong}: {name} = _checked({source}, {x.shape})")
        bodies = {"forward()": [*head, *self.lines[0], f"return [{', '.join(results)}], ({saved})"]}
        for i, ((seeds, *_), lines, tail) in enumerate(zip(self.sweeps, self.lines[1:], tails)):
            arguments = ", ".join(["saved", *map(self.names.get, seeds)])
            bodies[f"backward{i or ''}({arguments})"] = [f"{saved[:-1]} = saved"] * bool(saved) + [*lines, tail]
        parts = [f"def {head}:\n" + "".join([f"    {line}\n" for line in lines]) for head, lines in bodies.items()]
        source = "\n\n".join(parts)
        exec(compile(source, "<optimized>", "exec"), self.space)
        # Out of the namespace, which they hold: nothing is in a cycle, and a program that is dropped is gone.
        forward, *backward = [self.space.pop(head.partition("(")[0]) for head in bodies]
        leaves = [list(itertools.chain(*owners)) for *_, owners in self.sweeps]
        return types.SimpleNamespace(forward=forward, backward=[*zip(leaves, backward)], source=source)


class _Resized(Exception):
    """What a program was made for has another shape or type now; the graph that was traced has none to be wrong."""


def _as_before(x, shape, dtype):
    """A result whose shape may depend on data, if it has the one that it had."""
    if type(x) is not np.ndarray or x.shape != shape or x.dtype != dtype:
        raise _Resized
    return x


def _checked(x, shape):
    """The array of an input, which must have the shape that it had."""
    if x.shape != shape:
        label = f" {x.label!r}" if getattr(x, "label", "") else ""
        raise ValueError(
            f"optimize: {type(x).__name__}{label} had shape {shape} when the graph was optimized, and now has "
            f"{x.shape}; build and optimize the graph anew for another shape"
        )
    raw = _public(x._held)
    if type(raw) is not np.ndarray:
        raise _Resized
    return raw


# --- programs ---


_WHOLE: dict[Primitive, Callable] = {  # what is one operation to save time and memory, as several
    _dense: lambda x, w, b, activation=None: activation(x @ w + b) if activation else x @ w + b,
    _mse: lambda x, y: (np.mean if np.ndim(x) else np.positive)(np.square(np.subtract(x, y))),
    _cross_entropy: lambda x, mask, weights: (
        _record(_cross_entropy, (x, mask, weights))
        if np.ndim(x) > 1
        else np.mean(np.where(mask, log_softmax(x) * -float(np.shape(x)[-1]), 0.0))  # of one sample among many
    ),
}


def _taken_apart(node, args):
    """A copy of a node; of one that stands for a whole graph, the graph that it was made of."""
    if node._prim in _WHOLE and _regular(node):
        whole = _WHOLE[node._prim](*_recorded(args), **node._params)
        return _twin(node, whole._prim, whole._args, whole._params)
    if node._prim is _program:
        return _replayed(args[-1].traced)
    if node._prim is _checkpoint:
        return _remade(args, _taken_apart)
    if node._prim is _root:
        return args[0][node._params["index"]]
    return _twin(node, node._prim, args, node._params)


def _as_nodes(graph):
    return [x if isinstance(x, Value) else _node(x, _detach, (x,), _NO_PARAMS) for x in graph]


def _are_leaves(xs):
    return all([isinstance(x, Array) and not getattr(x, "_prim", None) for x in xs])


class _Program:
    """A graph made to run again and again: its values by `forward`, then the gradients of some roots by `backward`.

    `traced` is a copy of the graph it was made of, and `graph` what the passes made of that; both without data. `graph`
    is replayed where arithmetic on Python floats raises though IEEE arithmetic has an answer, and where there is too
    much of it to be compiled; `traced`, once sizes turn out to depend on data, and where the code of a backward fails.

    In other graphs it is the data of one node, made of the leaves, and its roots are made of that: so one sweep serves
    all roots, as in the graph that they came from, and one replay.
    """

    shape, dtype = (), None

    def __init__(self, roots):
        self.lock = threading.RLock()
        with _recording(tracing=True):
            self.traced = _rewrite(roots, _taken_apart)
            nodes = _oldest_first(self.traced)
            found = [x for node in nodes for x in (node, *node._args) if isinstance(x, Array)]
            for x in found:
                if type(x._held) is Chunked:
                    x._held = x._held.expose()  # the passes look at arrays
            self.foreign = any(map(_lazy, nodes))
            graph = batch(flatten(_pass(fold_constants, merge_common(swept=False))(self.traced, nodes)))
            self.graph = _as_nodes(_pass(simplify, merge_common(swept=False))(graph))
        inner = _oldest_first(self.graph)
        self.replays = self.foreign or len(inner) > _MAX_LINES
        self.leaves = [node for node in nodes if node._prim is None]
        self.shapes = {x: _shape(x) for x in found if not getattr(x, "_prim", None)}
        reach = _reach(self.graph, inner)
        self.reach = {x: reach[x] for x in self.leaves}
        self.nodes = []  # the Values that show the results, and which
        self.show([_owned(root._held) for root in roots])
        self.hub = lambda: None  # and the node that they are made of
        self.saved = self.late = None  # what backward needs of the last forward: by code, and by eager mode
        first = next((i for i, root in enumerate(self.graph) if root._needs), 0)
        self.sweeps = [(first,)]  # the roots of each sweep that is compiled: at first a guess
        self.guess = True
        self.code = self.compiled(self.graph, self.sweeps)
        self.sizes = {node: node.shape for node in inner if node._prim and type(node._held) is np.ndarray}
        for node in {*nodes, *inner}.difference(self.leaves):
            node._held = None

    def compiled(self, graph, sweeps):
        """The code for the sweeps; None if there is to be none."""
        if self.replays:
            return None
        with _recording(tracing=True):
            graph = _pass(seal)(graph)
            try:
                sweeps = [self.swept(graph, which) for which in sweeps]
            except Exception:  # a rule fails on these data, as it would in eager mode: in `backward`, if that is called
                return None
            joint = itertools.chain(graph, *[gradients for _, gradients, _ in sweeps])
            joint = _pass(fold_constants, simplify, merge_common(), reduce_squares)([*joint])
            if _config.enabled:
                joint = fuse(joint, _config.min_elements_for_parallel, products=False)
            joint = iter(_as_nodes(joint))
            graph, *gradients = [
                list(itertools.islice(joint, len(part))) for part in (graph, *(g for _, g, _ in sweeps))
            ]
            sweeps = [(seeds, own, owners) for (seeds, _, owners), own in zip(sweeps, gradients)]
            return _Lowering(graph, sweeps).finish()

    def swept(self, graph, which):
        """A sweep as a graph: the seeds, the gradients, and whose they are: a leaf's, or those of numbers in a pack."""
        packs = {x for x in _oldest_first(graph) if x._prim is _pack and _are_leaves(x._args)}
        reached, seeds = self.leaves_of(which), {i: _leaf(_filled_like(graph[i]._held, 1)) for i in which}
        gradients, owners = [], []
        for x, g in _backpropagate(_joined(graph), _Parts(seeds), packs, False, True).items():
            leaves = x._args if x in packs else (x,)
            places = [i for i, leaf in enumerate(leaves) if leaf in reached]
            if places:
                gradients.append(g if len(places) == len(leaves) else _getitem(g, index=(np.array(places),)))
                owners.append([leaves[i] for i in places])
        return list(seeds.values()), gradients, owners

    def leaves_of(self, which):
        """The leaves that get a gradient from one of those roots."""
        mask = sum([1 << i for i in which])
        return {x for x, roots in self.reach.items() if roots & mask}

    def run(self):
        """The results from the current data of leaves and Tensors, and what gradients need: locals of the code, as a
        tuple, or the graph with its data."""
        if self.code is not None:
            try:
                return self.code.forward()
            except _Resized:
                self.graph, self.code, self.replays = self.traced, None, True
            except (RuntimeWarning, FloatingPointError):  # where warnings are errors, only those of eager mode are
                return self.replay(self.traced)
            except (ArithmeticError, ValueError):  # also if a shape has changed: the replay says so
                pass
        return self.replay(self.graph)

    def replay(self, graph):
        """The results and the graph, by the code of eager mode. What the passes made holds for the shapes of then."""
        for x, shape in self.shapes.items() if graph is not self.traced else ():
            if _shape(x) != shape:
                _checked(x, shape)
        sizes = self.sizes if graph is not self.traced else {}
        for node in _oldest_first(graph):
            if node._prim is not None:
                _recompute(node)
            if node in sizes and _shape(node) != sizes[node]:
                self.graph, self.code, self.replays = self.traced, None, True
                return self.replay(self.traced)
        return [_owned(root._held) for root in graph], graph

    def forward(self):
        """Computes the roots from the current data of leaves and Tensors."""
        with self.lock:
            self.saved = self.late = None
            results, self.saved = self.run()
            self.show(results)
        return self

    def show(self, results):
        self.results = results
        for ref, index in self.nodes:
            if (node := ref()) is not None:
                node._held = results[index]

    def compile_for(self, which):
        """Makes code for the sweep from those roots, if there is none, and not too much for others."""
        if which in self.sweeps or self.code is None or len(self.sweeps) >= _MAX_SWEEPS:
            return
        self.run()  # which says so if a shape has changed
        self.saved, sweeps = None, [which] if self.guess else [*self.sweeps, which]
        self.code, self.sweeps = self.compiled(_replayed(self.graph), sweeps), sweeps

    def kept_for(self, which):
        """What the sweep from those roots needs of the last forward, which is done again if need be: of faults in it,
        `forward` told."""
        if self.saved is None or which not in self.sweeps:
            with np.errstate(all="ignore"):
                self.compile_for(which)
                if self.code is not None and which not in self.sweeps:
                    self.late = self.late or self.replay(self.graph)[1]
                    return self.late
                self.saved = self.run()[1] if self.saved is None else self.saved
        saved = self.saved
        self.saved = saved if len(self.sweeps) > 1 or type(saved) is list else None  # one sweep uses the buffers up
        return saved

    def backward(self, which, seeds):
        """Pairs of leaf and gradient, to be added up, for the seeds of those roots. Results do not change."""
        with self.lock:
            saved, self.guess = self.kept_for(which), False
            if type(saved) is tuple:
                if Chunked in map(type, seeds):
                    seeds = [g.expose() if type(g) is Chunked else g for g in seeds]
                leaves, sweep = self.code.backward[self.sweeps.index(which)]
                try:
                    return zip(leaves, sweep(saved, *seeds))
                except (ArithmeticError, ValueError, RuntimeWarning, _Resized):
                    with np.errstate(all="ignore"):
                        self.saved, saved = None, self.replay(self.traced)[1]
            found = _at_home(_backpropagate(_joined(saved), _Parts(zip(which, seeds)), retain=False), saved[which[0]])
            if self.foreign:  # the root may be computed by now
                self.show([root._held for root in saved])
            reached = self.leaves_of(which)
            return [(x, _owned(g)) for x, g in found.items() if x in reached]

    def gradients(self, g):
        """The gradients of the leaves, as numbers and arrays, or as Values by the graph that was traced."""
        found = {}
        if any([isinstance(x, Value) for x in g.values()]):
            found = _backpropagate(_joined(_replayed(self.traced)), g, set(self.leaves), False, True)
        else:
            for x, h in self.backward(*zip(*sorted(g.items()))):
                found[x] = found[x] + h if x in found else h
        return list(map(found.get, self.leaves))

    def node(self):
        """What stands for the program in other graphs."""
        node = self.hub()
        if node is None:
            needs = any([root._needs for root in self.traced])
            args = (*self.leaves, self)
            node = _rebuild(_Hub, (), None, _program, args, _NO_PARAMS, needs, self, None, "")
            self.hub = weakref.ref(node)
        return node

    def picture(self, index):
        """What the graph of a root became, with its current data, to be drawn."""
        with self.lock, _recording(tracing=True):
            root = _replayed(self.graph)[index]
            root = _renewed(root, tuple(_rewrite(root._args, _undetached)))
            root = _rewrite(fuse([root]), _pictured)[0]
            return _twin(root, root._prim, root._args, root._params)

    def __reduce__(self):
        return _retraced, (self.traced,)

    def __repr__(self):
        return "a program"

    @property
    def source(self):
        why = "its arrays are computed by another library" if self.foreign else "not to be compiled"
        return self.code.source if self.code else f"# {why}: replayed node by node\n"


def _retraced(roots):
    return _Program(_replayed(roots))


class _Hub(Value):
    """The node that stands for a program."""

    __slots__ = ()

    def __reduce__(self):
        return _Program.node, (self._held,)


KINDS[_Program] = KINDS[_Parts]
_program = primitive(
    lambda *operands: operands[-1].forward(),
    lambda wanted, g, out, operands: operands[-1].gradients(g),
    name="program",
    joint=True,
    typed=(),
)
_root = primitive(
    lambda hub, program, index: program.results[index],
    lambda i, g, out, operands, program, index: _Parts({index: g}),
    name="result",
    variadic=True,
    typed=(),
)
for _prim in (_dot, _pack, _fused, _program, _root):
    _prim.builtin = True


def _undetached(node, args):
    """Without the nodes that are there so that a replay reads Tensors anew."""
    idle = node._prim is _detach and isinstance(args[0], Array) and not getattr(args[0], "_needs", False)
    return args[0] if idle else _renewed(node, args)


def _pictured(node, args):
    """A node as it is drawn: numbers that were packed are one leaf, and a fused chain is called by its formula."""
    if node._prim is _pack:
        leaf = _leaf(node._held)
        leaf.label = f"{node.size} numbers"
        return leaf
    if node._prim is not _fused:
        return _renewed(node, args)
    named = types.SimpleNamespace(**{slot: getattr(_fused, slot) for slot in Primitive.__slots__})
    named.symbol = named.formula = _formula(node._params["steps"], args)
    named.forward = functools.partial(_run_steps, **node._params)
    return _twin(node, named, args)


class Optimized(Value):
    """What `optimize` returns: a Value whose `forward` and `backward` run a program over the leaves."""

    __slots__ = ()

    @property
    def source(self) -> str:
        """The program, as Python."""
        return self._params["program"].source

    def forward(self) -> Value:
        program, index = self._params.values()
        raw = program.forward().results[index]
        self._held = raw if self._held is raw else _owned(raw)  # of a copy
        return self

    def backward(self, gradient: Any = None, retain_grads: bool = True) -> None:
        """Adds the gradient of this Value to the `.grad` of the leaves; see `Value.backward`."""
        seed = self._seed(gradient)
        program, index = self._params.values()
        for x, g in program.backward((index,), [seed]):
            x._grad = g if x._grad is None else x._grad + g
        self._grad = seed if retain_grads else None

    def _picture(self) -> Value:
        return self.graph

    def _plain(self) -> Value:
        return _replayed(self._params["program"].traced)[self._params["index"]]

    @property
    def graph(self) -> Value:
        """What the graph became, with its current data: a copy to look at, which `draw` shows."""
        root = self._params["program"].picture(self._params["index"])
        root.label, root._grad = self.label, self._grad
        return root

    def __copy__(self):
        twin = _optimized(*self._params.values(), None if self._grad is None else _owned(self._grad), self.label)
        self._params["program"].nodes.pop()  # a copy has its own data
        twin._held = _owned(self._held)
        return twin

    def __reduce__(self):
        return _optimized, (*self._params.values(), self._grad, self.label, self._held)


def _optimized(program, index, grad=None, label="", held=None):
    args, params = (program.node(),), {"program": program, "index": index}
    held = program.results[index] if held is None else held
    made = _root, args, params, program.traced[index]._needs, held, grad, label
    node = _rebuild(Optimized, (), None, *made)
    program.nodes.append((weakref.ref(node), index))
    return node


def optimize(*roots: Value) -> Any:
    """Turns the graph that Values were computed by into one short program; returns Values that run it (one for one
    root, a tuple for more).

    A result has the value of its root. Its `.forward()` computes all results anew from the leaves' and Tensors' current
    data, its `.backward()` adds to the leaves' `.grad`, and what its `.data` handed out is never overwritten. It draws,
    as what the graph became; it nests in further expressions, pickles, and can be optimized again. (`copy.copy` shares
    the program: the copy's `.forward()` is the original's, too.) Values and gradients
    are the eager ones up to rounding. `.source` is the program.

    A trace holds what happened when the graph was built: Python's own branches and loops on values are frozen,
    and so are the numbers in raw arrays and indices. Shapes
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
    sizes, around = [], []
    for n, i in itertools.zip_longest(shape, index, fillvalue=slice(None)):
        part = slice(i % n, i % n + 1) if isinstance(i, (int, np.integer)) else i
        if not isinstance(part, slice) or part.indices(n)[2] != 1:
            raise TypeError(f"getitem: on {_library(a)}, only integers and slices of step 1 have a gradient, got {i!r}")
        places = range(n)[part]
        sizes.append(len(places))
        around.append((places.start, n - places.stop))
    return np.pad(np.reshape(a, sizes), around) if math.prod(a.shape) else np.zeros_like(a, shape=shape)


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
        if prim.name in ("cholesky", "update") or ("index" in params and KINDS[type(raw[0])] is not self):
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
        if any([hasattr(x, "__dask_graph__") for x in raws]):
            raws = sys.modules["dask"].compute(*raws, traverse=False)  # one pass for all; others stay as they are
        return [_settle(np.array(x)) for x in raws]

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
            foreign = next(x for x in map(_raw, _members(*args)) if KINDS.get(type(x)) is self)
            with _lazily(prim.name, foreign):
                h = rule(*args, **params)
            g = args[1] if isinstance(args[0], int) else args[0]  # a variadic rule is told first for which operand
            if h is not None and _lazy(g) and not _lazy(h):
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


Array.__dask_tokenize__ = _in_a_task  # type: ignore[attr-defined]
# This one is asked before it would be looked into.
Array.__dask_graph__ = lambda self: _in_a_task(self) if _lazy(self) else None  # type: ignore[attr-defined]
