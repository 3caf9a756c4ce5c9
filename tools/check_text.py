#!/usr/bin/env python3
"""Checks the hand-written text of the repository: file length, white space at line ends, and that nothing in it ties
the project to one machine or one download server."""

import argparse
import pathlib
import re
import subprocess
import sys

MAX_LINES = 800
CODE = {".h", ".cc", ".cu", ".cuh", ".py", ".sh", ".cmake"}
CODE_NAMES = {"CMakeLists.txt", "CMakePresets.json", "quickstart", "test", "run", "LAYERS"}
TEXT = CODE | {".md", ".txt", ".json", ".html", ".js", ".css", ".toml", ".yml", ".yaml"}
# What installs and builds names packages, never where they are downloaded from: that is the machine's own setting.
SETUP = {".sh", ".cmake"}
URL = re.compile(r"\b(?:https?|ftp|ssh|git)://[\w.-]+")


def is_setup(path):
    return path.suffix in SETUP or path.name in CODE_NAMES or path.name.startswith("requirements")


def files_of(root):
    """Tracked and new files, without the ignored ones; everything if this is no git checkout."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
    )
    if listed.returncode == 0:
        names = [root / name for name in listed.stdout.decode().split("\0") if name]
    else:
        names = [p for p in root.rglob("*") if not {"build", ".venv", ".git"} & set(p.relative_to(root).parts)]
    return sorted(p for p in names if p.is_file() and not p.is_symlink())


def local_paths(root):
    """Absolute folders that mean something on this machine alone: the checkout, what holds it, and the home folder."""
    folders = {root, pathlib.Path.home()}
    if root.parent not in {pathlib.Path(p) for p in ("/", "/tmp", "/var/tmp", "/opt", "/srv", "/usr/src", "/home")}:
        folders.add(root.parent)
    return [re.compile(r"(?<![\w.$})/-])" + re.escape(str(folder)) + r"(?![\w.-])") for folder in folders]


def check_file(path, name, local):
    errors = []
    is_code = path.suffix in CODE or path.name in CODE_NAMES
    if not is_code and path.suffix not in TEXT:
        return errors
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return [f"{name}: not UTF-8 at byte {error.start}"] if is_code else []
    lines = text.split("\n")
    if is_code and len(lines) - 1 > MAX_LINES:
        errors.append(f"{name}: {len(lines) - 1} lines, over {MAX_LINES}: split it")
    if is_code and text and not text.endswith("\n"):
        errors.append(f"{name}: no newline at its end")
    for number, line in enumerate(lines, 1):
        if is_code and line != line.rstrip():
            errors.append(f"{name}:{number}: white space at the line's end")
        if is_setup(path) and URL.search(line):
            errors.append(f"{name}:{number}: names a server ({URL.search(line).group()})")
        if any(pattern.search(line) for pattern in local):
            errors.append(f"{name}:{number}: names a folder of this machine")
    return errors


def main():
    parser = argparse.ArgumentParser(description="Checks length, white space and machine-bound names in the repository")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root.resolve()
    local = local_paths(root)
    files = files_of(root)
    errors = [error for path in files for error in check_file(path, path.relative_to(root), local)]
    for error in errors:
        print(error)
    print(f"check_text: {len(files)} files, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
