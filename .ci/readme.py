#!/usr/bin/env python3
"""Keep README.md true: run each of its Python blocks, look for every file that it links to, and count what it counts.

A block runs in a fresh interpreter, as a newcomer would paste it into a file, in an empty folder, with picograd on the
path. It fails when it does not exit with 0, leaves a traceback or a leak warning, or when an output that it promises by
a comment `# -> text` is not, in this order, among the lines that it prints; also when a block of text right below it is
not all that it prints. What the README says of picograd.py's size and rooms, and of NumPy's functions, is counted.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def problem(code: str, text: str) -> str | None:
    """What is wrong with a block, or None. text: what the README shows below it as its whole output, if anything."""
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
    if text and text.rstrip() != run.stdout.rstrip():
        return f"the text below it is not what it prints, which is\n{run.stdout}"
    return None


def miscounted(readme: str) -> list[str]:
    """What the README counts in picograd.py, and gets wrong: lines by more than a twentieth."""
    source = (ROOT / "picograd.py").read_text(encoding="utf-8")
    rooms = re.findall(r"^# -+\n# (\d+\. \w+)$", source, re.MULTILINE)
    sys.path.insert(0, str(ROOT))
    from picograd import TABLE

    functions = {f.__name__ for f in TABLE if isinstance(f, np.ufunc) or (f.__module__ or "").startswith("numpy")}
    lines, engine = source.count("\n"), source.partition("\n# 8. ")[0].count("\n")
    found = []
    for what, pattern, fact, least, most in (
        ("of NumPy's functions", r"Over (\d+) of NumPy's functions", len(functions), 0.8, 1.0),
        ("lines of the file", r"one file of about ([\d,]+) lines", lines, 0.95, 1.05),
        ("lines above the cut", r"above the cut, in about ([\d,]+) lines", engine, 0.95, 1.05),
    ):
        said = re.search(pattern, readme)
        if not said:
            found.append(f"does not say how many {what}, which are {fact}")
        elif not least * fact <= int(said[1].replace(",", "")) <= most * fact:
            found.append(f"says {said[1]} {what}, which are {fact}")
    named = re.findall(r"\b(\d+\. [A-Za-z]\w+)", readme.partition("## How it works")[2].partition("**A table")[0])
    return found + ([] if named == rooms else [f"names the rooms {named}, which are {rooms}"])


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", readme, re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", readme)
    failures = [f"links to {link}, which is not there" for link in links if not (ROOT / link).exists()]
    failures += miscounted(readme)
    for i, (code, text) in enumerate(blocks, 1):
        error = problem(code, text)
        if error:
            failures.append(f"Python block {i}: {error}\n--- the block ---\n{code}")
    for failure in failures:
        print("README.md", failure)
    print(f"README.md: {len(blocks)} Python blocks, {len(links)} links to files, {len(failures)} failures")
    return 1 if failures or not blocks else 0


if __name__ == "__main__":
    sys.exit(main())
