#!/usr/bin/env python3
"""A user's program with annotations, which type checkers pass, strictly, and which runs.

MYPYPATH=. mypy --strict picograd.py .ci/typed.py; PYTHONPATH=. python .ci/typed.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from typing_extensions import assert_type  # which mypy brings

from picograd import MLP, SGD, Adam, Layer, Module, Tensor, Value, cross_entropy, grad, no_grad, primitive, relu


class Residual(Module):
    def __init__(self, width: int) -> None:
        self.inner = Layer(width, width, activation="relu", seed=0)
        self.scale = Value(1.0, label="scale")

    def __call__(self, x: Value | Tensor) -> Value:
        return self.scale * self.inner(x) + x


class Net(Module):
    def __init__(self, nin: int, nout: int) -> None:
        self.blocks: list[Module] = [Layer(nin, 8, seed=1), Residual(8), Layer(8, nout, activation=None, seed=2)]

    def __call__(self, x: Tensor) -> Value:
        out: Value = self.blocks[0](x)
        for block in self.blocks[1:]:
            out = block(out)
        return out


class Named(Value):
    def doubled(self) -> Value:
        return self * 2


def train(steps: int) -> list[float]:
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int64)
    model, losses = Net(4, 2), []
    optimizer = Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = cross_entropy(model(Tensor(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.lr *= 0.99
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "weights.npz"))
        model.load(Path(folder, "weights.npz"))
    with no_grad():
        print(np.mean(np.argmax(model(Tensor(x)).data.data, axis=1) == y))
    return losses


def norms(params: list[Value]) -> dict[str, float]:
    return {p.label: p.grad.norm().item() for p in params}


def rosenbrock(x: Value) -> Value:
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def arithmetic() -> None:
    a, b, t = Value(2.0, label="a"), Value([1.0, 2.0]), Tensor([[3.0, 4.0]])
    assert_type(a * b, Value)
    assert_type(2 * a - b / 2, Value)
    assert_type(-a, Value)
    assert_type(t @ b, Value)
    assert_type(t * 2 + 1, Tensor)
    assert_type(a > 1, Value)
    assert_type(b == 1, Value)
    assert_type(b[0], Value)
    assert_type((a * b).sum(), Value)
    assert_type(b.mean(axis=0).tanh().reshape(1, 1).T, Value)
    assert_type(t.sum(), Tensor)
    assert_type(sum([a, a], Value(0.0)), Value)
    assert_type([x.item() for x in b][0], float | int)
    t += 1
    t *= t
    assert_type(t, Tensor)
    a += 1
    a.data -= 0.1 * a.grad
    a.grad = 0
    b.data = np.ones(2)
    y = np.tanh(a) * np.mean(b) + np.where(b > 0, b, 0.0).sum() + np.sum(b**2)
    y.backward()
    print(f"{y.data:.3f} {a.grad:.3f}", {a: 1}, max(a, y).item(), Named(2.0).doubled().relu())


def main() -> None:
    arithmetic()
    print(train(20)[-1], norms([Value(1.0, label="x")]))
    print(grad(rosenbrock)(np.array([1.2, 1.0])))
    cube = primitive(lambda x: x**3, lambda g, out, x: g * 3 * x**2, name="cube")
    print(relu(cube(Value(2.0))), SGD(MLP(2, [3, 1]).parameters(), lr=0.1).lr)


if __name__ == "__main__":
    main()
