#!/usr/bin/env python3
"""The table of bad inputs and faults in README.md: 43 rows, each with tests, and every test it names is there."""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ROWS = 43


def sources(stem):
    for folder in (ROOT / "src", ROOT / "tests"):
        yield from folder.rglob(f"{stem}.cc")
        yield from folder.rglob(f"{stem}.py")


def exists(stem, case):
    texts = [path.read_text() for path in sources(stem)]
    if "." in case:
        suite, name = case.split(".")
        return any(re.search(rf"\bTEST(?:_F|_P)?\(\s*{suite},\s*{name}\)", text) for text in texts)
    # Defined, and called besides.
    return any(re.search(rf"^def {case}\(", text, re.MULTILINE) and len(re.findall(rf"\b{case}\b", text)) > 1 for text in texts)


def main():
    problems, seen = [], []
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 4 or not cells[0].isdigit():
            continue
        row = int(cells[0])
        seen.append(row)
        tests = re.findall(r"`(\w+) ([\w.]+)`", cells[3])
        if not tests:
            problems.append(f"row {row} names no test")
        problems += [f"row {row}: there is no {case} in {stem}" for stem, case in tests if not exists(stem, case)]
    if seen != list(range(1, ROWS + 1)):
        problems.append(f"the rows are {seen}")
    print("\n".join(problems) or f"{len(seen)} rows")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
