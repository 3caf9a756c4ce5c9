#!/usr/bin/env python3
"""Checks that every test, bench and fuzz source is part of the build, and that CTest runs every test.

A source x_test.cc (or .cu) must be declared by dsla_test, x_fuzz.cc by dsla_fuzz, x_bench.cc by dsla_bench; those calls
are listed in registered.txt of the build folder. Each declared test must be one that CTest runs, not disabled, and each
*_test.py must be run by some test.
"""

import argparse
import json
import pathlib
import subprocess
import sys

KINDS = {"_test": "test", "_fuzz": "fuzz", "_bench": "bench"}
FOLDERS = ("src", "tests", "bench", "tools")


def read_registered(path):
    """Returns {(kind, source): name}."""
    registered = {}
    for line in path.read_text().splitlines():
        kind, name, source = line.split("\t")
        registered[(kind, pathlib.Path(source).resolve())] = name
    return registered


def ctest_tests(build):
    """Returns {test name: its command, as one string} of the tests that CTest would run."""
    shown = subprocess.run(
        ["ctest", "--test-dir", str(build), "--show-only=json-v1"], check=True, capture_output=True, text=True
    ).stdout
    tests = {}
    for test in json.loads(shown)["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        if not properties.get("DISABLED", False):
            tests[test["name"]] = " ".join(test.get("command", []))
    return tests


def check(root, registered, tests, with_cuda):
    errors, count = [], 0
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            kind = next((k for end, k in KINDS.items() if path.stem.endswith(end)), None)
            if kind is None or path.suffix not in (".cc", ".cu", ".py"):
                continue
            name = path.relative_to(root)
            count += 1
            if path.suffix == ".py":
                if kind == "test" and not any(str(path.resolve()) in command for command in tests.values()):
                    errors.append(f"{name}: no CTest test runs it (add_test)")
            elif (path.suffix == ".cu" or path.parent.name == "cuda") and not with_cuda:
                continue
            elif (kind, path.resolve()) not in registered:
                errors.append(f"{name}: not in the build (declare it with dsla_{kind} in its folder's CMakeLists.txt)")
    for (kind, source), name in registered.items():
        if kind == "test" and name not in tests:
            errors.append(f"{source.name}: CTest does not run its test {name}")
    return count, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    parser.add_argument("--build", type=pathlib.Path, required=True, help="a configured build folder with tests")
    parser.add_argument("--with-cuda", action="store_true", help="*_test.cu and tests in folders named cuda must be registered too")
    args = parser.parse_args()
    registered = read_registered(args.build / "registered.txt")
    count, errors = check(args.root.resolve(), registered, ctest_tests(args.build), args.with_cuda)
    for error in errors:
        print(error)
    print(f"check_tests_registered: {count} files, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
