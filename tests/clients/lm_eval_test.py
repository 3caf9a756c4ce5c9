#!/usr/bin/env python3
"""lm-evaluation-harness's local-completions, unmodified, on tasks of our own. Scores and log-likelihoods must be those of its
transformers backend on the same model (lm_eval_reference.json, by lm_eval_reference.py): the server runs in fp32 for that."""

import json
import os
import pathlib
import sys
import tempfile

from serving import KEY, check, finish, parse_arguments, serving, skip

cache = tempfile.TemporaryDirectory()
os.environ.update({"HF_HOME": cache.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY})


class WithoutTorch:
    """Finds all but torch. The project's .venv holds torch for its libraries, without the CUDA packages that its Python module
    loads; local-completions needs none of it, but would import it where it is found."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "torch" else self.finder.find_spec(name, *rest)


sys.meta_path = [WithoutTorch(finder) for finder in sys.meta_path]

try:
    import lm_eval
except ImportError as error:
    skip(error)

import lm_eval_tasks  # noqa: E402

REFERENCE = pathlib.Path(__file__).parent / "lm_eval_reference.json"
TOLERANCE = 1e-3


def evaluate(running, **more):
    with tempfile.TemporaryDirectory() as data:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": more.pop("model", "unset"), "base_url": f"{running.url}/v1/completions", "auth_token": KEY,
                "max_length": 2048, "max_retries": 1, **more,
            },
            tasks=lm_eval_tasks.tasks(data), bootstrap_iters=0,
        )  # fmt: skip
    return lm_eval_tasks.summary(results)


def model_name(running):
    from serving import call

    return call(running, "GET", "/v1/models").json["data"][0]["id"]


def compare(got, wanted, what):
    for name, scores in wanted["scores"].items():
        for key, value in scores.items():
            own = got["scores"][name][key]
            # A perplexity is no share: relative.
            difference = abs(own - value) / (abs(value) if "perplexity" in key else 1)
            check(difference <= TOLERANCE, f"{what}: {name} {key} is {own:.6f}, transformers' {value:.6f}")
    worst = 0
    for name, samples in wanted["samples"].items():
        for own, reference in zip(got["samples"][name], samples, strict=True):
            for mine, theirs in zip(own, reference, strict=True):
                if isinstance(theirs, str):
                    check(mine == theirs, f"{what}: {name}: {mine!r}") if mine != theirs else None
                    continue
                worst = max(worst, abs(mine[0] - theirs[0]))
                if mine[1] != theirs[1]:
                    check(False, f"{what}: {name}: greedy is {mine[1]}, transformers' {theirs[1]}")
    check(worst <= TOLERANCE, f"{what}: log-likelihoods are within {worst:.2e}")


def main():
    arguments = parse_arguments(__doc__)
    wanted = json.loads(REFERENCE.read_text())
    with serving(arguments.program, "--weights", "fp32", "--kv", "fp32", "--default-tier", "full") as running:
        name = model_name(running)
        compare(evaluate(running, model=name), wanted, "one at a time")
        # Lists of prompts, several requests at once.
        compare(evaluate(running, model=name, batch_size=4, num_concurrent=3), wanted, "four prompts a request, three at once")
    finish()


if __name__ == "__main__":
    main()
