#!/usr/bin/env python3
"""Draws the README's plots of the tables in the README and in docs/gpu.md, so that a plot shows no figure of its own.
With --check it writes nothing and fails where a plot is not of today's tables."""

import argparse
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench/serving"))

from plot import Plot


def rows_of(file, first_column, section=""):
    """The cells of the table whose first column has that heading, below a line that begins with `section`."""
    text = (ROOT / file).read_text()
    lines = text[text.index(section) :].splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |")), None)
    if begin is None:
        raise SystemExit(f"plot_docs: {file} has no table whose first column is '{first_column}'")
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def number(cell):
    """The number that a cell begins with, None where it is empty."""
    found = re.match(r"[\d.]+", cell)
    return float(found.group()) if found else None


def block(rows, label):
    """Rows by their context in thousands: the one whose first cell is `label`, then a length, and those below it that
    are a length alone."""
    lengths = {}
    inside = False
    for row in rows:
        named = row[0].startswith(label)
        inside = named or (inside and re.match(r"\d+k\b(?!.*\*)", row[0]) is not None)
        if inside:
            lengths[int(re.search(r"(\d+)k", row[0][len(label) if named else 0 :]).group(1))] = row
    if not lengths:
        raise SystemExit(f"plot_docs: docs/gpu.md has no row '{label}'")
    return lengths


def gpu_plot(title, unit, label, scale):
    lengths = block(rows_of("docs/gpu.md", "work"), label)
    columns = (("level 0", 1), ("level 24 of 32", 2), ("transformers", 3))
    lines = {name: [(k, v / scale) for k, row in lengths.items() if (v := number(row[column])) is not None] for name, column in columns}
    plot = Plot(title, "tokens of context, thousands", unit, max(lengths), 1.05 * max(y for points in lines.values() for _, y in points))
    for name, points in lines.items():
        plot.line(name, points)
    return plot.svg()


def cpu_plot():
    rows = rows_of("README.md", "level", "## Results")
    level = [number(row[0]) for row in rows]
    prefill, decode, cache = ([number(row[column]) for row in rows] for column in (2, 5, 10))
    plot = Plot("SmolLM2-135M on two CPU cores", f"level of {max(level):g}", "times level 0", max(level), 2.6)
    plot.line("prompt", list(zip(level, prefill)))
    plot.line("decode", list(zip(level, decode)))
    plot.line("cache", [(at, share / 100) for at, share in zip(level, cache)])
    return plot.svg()


def quality_plot():
    rows = rows_of("README.md", "level", "Quality of the shipped adapter")
    columns = (("from the start", 3), ("switched there", 4))
    lines = {name: [(0, 0)] + [(number(row[0]), number(row[column])) for row in rows] for name, column in columns}
    top = max(y for points in lines.values() for _, y in points)
    plot = Plot("KL from level 0 after token 2,048", "level of 30", "nats per token", 30, 1.05 * top)
    for name, points in lines.items():
        plot.line(name, points)
    return plot.svg()


def plots():
    return {
        "decode.svg": gpu_plot("Decode, Llama-2-7B's shape, H200", "ms", "decode step, 1 sequence, context", 1),
        "prompt.svg": gpu_plot("Prompts, Llama-2-7B's shape, H200", "s", "prompt of", 1000),
        "levels.svg": cpu_plot(),
        "quality.svg": quality_plot(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = []
    for name, svg in plots().items():
        path = ROOT / "docs/plots" / name
        if not args.check:
            path.write_text(svg)
        elif not path.exists() or path.read_text() != svg:
            old.append(name)
    for name in old:
        print(f"plot_docs: docs/plots/{name} is not of today's tables: tools/plot_docs.py draws it anew")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
