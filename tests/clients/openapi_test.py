#!/usr/bin/env python3
"""Schemathesis against the shipped OpenAPI document: whatever it makes up, no answer is a 5xx, every answer is one that
the document names, and its body is what the document says."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

from serving import ADMIN_KEY, KEY, call, check, finish, parse_arguments, serving, skip

if importlib.util.find_spec("schemathesis") is None:
    skip("schemathesis is not installed")

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXAMPLES = 20
SEED = 20240607
# The one answer above 499 that a client can ask for: by a timeout that is too short, and the
# one for replies that this test lets run for no longer than a second.
CONFIG = """[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]
"""


def main():
    arguments = parse_arguments(__doc__, examples={"type": int, "default": EXAMPLES})
    # Long replies are cut off, so that the time goes into requests.
    with serving(arguments.program, "--context", 256, "--memory", "64M", "--request-timeout", 1) as running:
        document = call(running, "GET", "/openapi.json").json
        shipped = json.loads((pathlib.Path(__file__).parents[2] / "ui/openapi.json").read_text())
        check(document == shipped, "the server ships its OpenAPI document")
        for key, what in ((KEY, "with a key"), (ADMIN_KEY, "with the admin key")):
            with tempfile.TemporaryDirectory() as folder:
                config = pathlib.Path(folder) / "schemathesis.toml"
                config.write_text(CONFIG)
                # One worker: of two, one moves the recursion limit while the other parses, at which Python 3.11 fails.
                command = [
                    sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", f"{running.url}/openapi.json",
                    "--header", f"Authorization: Bearer {key}", "--checks", CHECKS,
                    "--max-examples", arguments.examples, "--seed", SEED, "--request-timeout", 120,
                    "--phases", "coverage,fuzzing", "--workers", 1, "--no-color",
                    "--generation-database", "none",
                ]  # fmt: skip
                if key == ADMIN_KEY:
                    command += ["--include-path", "/v1/dsla"]
                result = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=400)
                check(result.returncode == 0, f"schemathesis {what}")
                print(result.stdout[-6000:] if result.returncode else "\n".join(result.stdout.splitlines()[-12:]), flush=True)
                print(result.stderr[-2000:], flush=True)
        check(call(running, "GET", "/health").status == 200, "the server is well after it")
    finish()


if __name__ == "__main__":
    main()
