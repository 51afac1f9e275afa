#!/usr/bin/env python3
"""The engine stands alone: picograd.py, cut off at the heading of room 8, passes every test of rooms 1 to 7.

    python .ci/cut.py [arguments of test.py, such as TestValue]

The copy lies in a temporary folder, beside a copy of test.py, whose tests marked with `needs_power` are skipped there.
"""

import ast
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "picograd.py").read_text(encoding="utf-8")
HEADING = f"# {'-' * 117}\n# 8. Blocks\n"
ABOVE, _, BELOW = SOURCE.partition(HEADING)


def bound(source, *loops):
    """The names that the module's own definitions bind, and its statements of these kinds."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign, *loops)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


class TestCut(unittest.TestCase):
    def test_what_is_above_names_nothing_below(self):
        below = set(bound(BELOW)) - set(bound(ABOVE, ast.For))  # a door, such as HOOK, is bound anew below
        names = [(node.lineno, node.id) for node in ast.walk(ast.parse(ABOVE)) if isinstance(node, ast.Name)]
        self.assertEqual([f"line {line}: {name}" for line, name in names if name in below], [])

    def test_what_is_missing_says_so(self):
        import picograd

        with self.assertRaisesRegex(Exception, "distributed=True.*room 8"):
            picograd.Tensor([1.0, 2.0], distributed=True)


def main():
    if not BELOW:
        raise SystemExit(f"picograd.py has no heading\n{HEADING}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "picograd.py").write_text(ABOVE, encoding="utf-8")
        shutil.copy(ROOT / "test.py", folder)
        sys.path.insert(0, folder)
        import test  # the copy: the folder comes before the standard library's package of that name

        test.TestCut = TestCut
        return test.main(test)


if __name__ == "__main__":
    sys.exit(main())
