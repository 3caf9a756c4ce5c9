#!/usr/bin/env python3
"""The soak of bench/serving for two minutes, with a small random model, so that it can run under sanitizers."""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import small_model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True)
    parser.add_argument("--make-adapter", required=True)
    args, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        small_model.write(folder / "model")
        adapter = folder / "adapter.safetensors"
        subprocess.run([args.make_adapter, folder / "model", adapter], check=True)
        # Where the CPU multiplies bf16, oneDNN keeps code for every shape of product that it meets, about 0.7 MB: 16 numbers of
        # rows times five matrices. Two minutes do not meet all of them before the last third; with the sanitizer a leak of
        # requests is found at the end, too.
        slack = ["--rss-slack", "60"]
        command = [HERE.parent.parent / "bench/serving/soak", "--minutes", "2", "--memory", "16M", *slack, "--program", args.program]
        command += ["--log", folder / "serve.log", *others, "--", "--model", folder / "model", "--adapter", adapter]
        # AddressSanitizer keeps freed memory back, 256 MiB unless told otherwise: two minutes of growth that is no leak.
        options = f"{os.environ.get('ASAN_OPTIONS', '')}:quarantine_size_mb=16".lstrip(":")
        return subprocess.run([sys.executable, *command], env={**os.environ, "ASAN_OPTIONS": options}).returncode


if __name__ == "__main__":
    sys.exit(main())
