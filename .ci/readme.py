#!/usr/bin/env python3
"""Keep README.md true: run each of its Python blocks and look for every file that it links to.

A block runs in a fresh interpreter, as a newcomer would paste it into a file, in an empty folder, with picograd on the
path. It fails when it does not exit with 0, leaves a traceback or a leak warning, or when an output that it promises by
a comment `# -> text` is not, in this order, among the lines that it prints.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def problem(code: str) -> str | None:
    """What is wrong with a block, or None."""
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "example.py")
        script.write_text(code, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, str(script)]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    output = run.stdout + run.stderr
    if run.returncode or "Traceback" in run.stderr or "leaked" in run.stderr:
        return f"exit code {run.returncode}\n{output}"
    printed = iter(run.stdout.splitlines())
    for promised in re.findall(r"# -> (.*)$", code, re.MULTILINE):
        if promised not in printed:  # `in` moves the iterator behind the line that it finds
            return f"this output did not come, or not in its place: {promised}\n{output}"
    return None


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", readme)
    failures = [f"links to {link}, which is not there" for link in links if not (ROOT / link).exists()]
    for i, code in enumerate(blocks, 1):
        error = problem(code)
        if error:
            failures.append(f"Python block {i}: {error}\n--- the block ---\n{code}")
    for failure in failures:
        print("README.md", failure)
    print(f"README.md: {len(blocks)} Python blocks, {len(links)} links to files, {len(failures)} failures")
    return 1 if failures or not blocks else 0


if __name__ == "__main__":
    sys.exit(main())
