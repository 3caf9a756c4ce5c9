#!/usr/bin/env python3
"""bench/serving/simulate plays what trace.py makes: every token of distinct prompts is computed. Usage: simulate_test.py PROGRAM"""

import pathlib
import subprocess
import sys
import tempfile

SERVING = pathlib.Path(__file__).resolve().parent.parent.parent / "bench/serving"
sys.path.insert(0, str(SERVING))

import trace


def main():
    made = trace.make_distinct(seed=1, count=20, prompt=(500, 3000), reply=(10, 40), rate=20)
    least = sum(r["words"] + r["max_tokens"] for r in made["burst"])
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        path.write_text(trace.dump(made), encoding="utf-8")
        out = subprocess.run([sys.argv[1], path, SERVING / "cost_h200.json"], capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["fixed", "paper", "ours"], out
    for line in lines:
        _, seconds, rate, *_, cached, _, _ = line.split()
        tokens = float(seconds) * float(rate)  # seconds are told to a tenth, and each prompt has a template
        assert 0.9 * least < tokens < 1.1 * least + 20 * 40, (least, line)
        assert cached == "0%", line


if __name__ == "__main__":
    main()
