#!/usr/bin/env python3
"""Checks that the rooms under src/ include only what LAYERS allows, and that torch-free code is free of torch.

LAYERS has a line `room: rooms it may include` per room, and lines `torch-free: patterns` of files (relative to src/)
that must not include libtorch, not even through other headers of the project.
"""

import argparse
import fnmatch
import pathlib
import re
import sys

SUFFIXES = {".h", ".hpp", ".cc", ".cpp", ".cu", ".cuh", ".inl"}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")


def read_layers(path):
    """Returns ({room: allowed rooms}, [torch-free patterns], [errors])."""
    rooms, torch_free, errors = {}, [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, colon, rest = line.partition(":")
        if not colon:
            errors.append(f"{path.name}:{number}: expected `room: rooms`, got '{line}'")
        elif name == "torch-free":
            torch_free += rest.split()
        elif name in rooms:
            errors.append(f"{path.name}:{number}: room '{name}' is listed twice")
        else:
            for room in rest.split():
                if room not in rooms:
                    errors.append(f"{path.name}:{number}: '{name}' may include '{room}', which comes later or nowhere")
            rooms[name] = set(rest.split()) | {name}
    return rooms, torch_free, errors


def scan(src):
    """Returns {file relative to src: [(line, quoted include or None, angled include or None)]}."""
    files = {}
    for path in sorted(src.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            text = path.read_text(errors="replace")
            files[path.relative_to(src).as_posix()] = [
                (text.count("\n", 0, m.start()) + 1, m.group(1), m.group(2)) for m in INCLUDE.finditer(text)
            ]
    return files


def check_rooms(files, rooms, src):
    errors = []
    for name, includes in files.items():
        room = name.split("/")[0]
        if room not in rooms:
            errors.append(f"src/{name}: room '{room}' is not in LAYERS")
            continue
        for line, quoted, angled in includes:
            target = quoted or angled
            first = target.split("/")[0]
            if first in rooms and (quoted or (src / target).is_file()):
                if angled:
                    errors.append(f"src/{name}:{line}: <{target}> is the project's: write it in quotes")
                elif target not in files and not (src / target).is_file():
                    errors.append(f"src/{name}:{line}: there is no src/{target}")
                elif first not in rooms[room]:
                    errors.append(f"src/{name}:{line}: '{room}' may not include '{target}' (LAYERS)")
            elif quoted and ("/" not in quoted or quoted.startswith(".")):
                errors.append(f"src/{name}:{line}: \"{quoted}\": write includes as \"room/file.h\"")
    return errors


def torch_path(name, files, seen):
    """The chain of includes by which `name` reaches libtorch, or None."""
    seen.add(name)
    for _, quoted, angled in files.get(name, []):
        target = quoted or angled
        if TORCH.match(target):
            return [name, target]
        if quoted in files and quoted not in seen:
            rest = torch_path(quoted, files, seen)
            if rest:
                return [name] + rest
    return None


def check_torch_free(files, patterns):
    errors = []
    for pattern in patterns:
        matched = fnmatch.filter(files, pattern)
        if not matched:
            errors.append(f"LAYERS: torch-free pattern '{pattern}' matches no file under src/")
        for name in matched:
            path = torch_path(name, files, set())
            if path:
                errors.append(f"src/{name}: must be free of torch, but includes " + " -> ".join(path[1:]))
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    rooms, torch_free, errors = read_layers(root / "LAYERS")
    files = scan(root / "src")
    errors += check_rooms(files, rooms, root / "src")
    errors += check_torch_free(files, torch_free)
    for error in errors:
        print(error)
    print(f"check_layers: {len(files)} files, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
