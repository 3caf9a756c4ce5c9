#!/usr/bin/env python3
"""The operator's side: policies changed while the server runs, from whatever it was started with, and the file of the cost
model. Standard library alone."""

import json
import os
import pathlib
import subprocess
import tempfile
import time
import unittest.mock

from serving import ADMIN_KEY, KEY, call, chat, check, finish, log_of_start, parse_arguments, serving

ARGUMENTS = ["--context", 1024, "--memory", "128M"]


def change(running, fields, key=ADMIN_KEY):
    return call(running, "POST", "/v1/dsla", fields, {"Authorization": f"Bearer {key}"})


def controller(running):
    return call(running, "GET", "/v1/dsla").json["controller"]


def check_policies(running):
    check(controller(running)["policy"] == "paper", "started with the paper's policy")
    check(change(running, {"policy": "slo"}, KEY).error[:2] == (403, "admin_key_required"), "not without the admin key")
    for policy in ("slo", "fixed", "paper", "fixed", "slo", "paper", "slo"):
        reply = change(running, {"policy": policy})
        check(reply.status == 200, f"to {policy}: {reply.status} {reply.body[:120] if reply.status != 200 else ''}")
        reply = chat(running, max_tokens=2)  # a step, so that the engine has seen it
        now = controller(running)
        check(reply.status == 200 and now["policy"] == policy, f"and {now['policy']} it is")
    factors = controller(running)["cost_factors"]
    check(all(1 / 64 <= factors[kind] <= 64 for kind in ("prefill", "decode", "fold")), f"slo says its corrections: {factors}")
    check(change(running, {"level": 7}).status == 200, "a fixed level")
    reply = chat(running, max_tokens=2)
    check(reply.headers["X-Dsla-Level"] == "7", f"a reply's level is {reply.headers['X-Dsla-Level']}")
    check(change(running, {"max_level": 3}).error[0] == 400, "a bound below the fixed level is refused")
    check(change(running, {"policy": "paper", "max_level": 3}).status == 200, "with another policy it is not")
    chat(running, max_tokens=2)
    check(controller(running)["max_level"] == 3, "and is in force")
    check(change(running, {"policy": "best"}).error == (400, "invalid_value", "policy"), "an unknown policy is refused")
    check(change(running, {"policy": "slo", "level": 2}).error == (400, "invalid_value", "level"), "a level with slo, too")


def check_kept(program):
    """Without a file of its own the second start takes what the first one kept, and a damaged one is measured again."""
    auto = [*ARGUMENTS, "--calibration", "auto"]
    with tempfile.TemporaryDirectory() as name, unittest.mock.patch.dict(os.environ, {"XDG_CACHE_HOME": name}):

        def start(*arguments):
            with serving(program, *arguments) as running:
                return log_of_start(running)

        check(" calibrated " in start(*ARGUMENTS) and not list(pathlib.Path(name).iterdir()), "servers of tests measure and keep nothing")
        check(" calibrated " in start(*auto), "the first start measures")
        kept = list(pathlib.Path(name).glob("dsla/cost-*.json"))
        check(len(kept) == 1, f"and keeps it: {kept}")
        log = start(*auto)
        check("cost_model_read" in log and " calibrated " not in log, "the second one reads it")
        check(" calibrated " in start(*auto, "--threads", 1), "other threads are measured for themselves")
        kept[0].write_text("{")
        log = start(*auto)
        check(" calibrated " in log and "cost_model_file" in log and str(kept[0]) in log, "a damaged one is named and measured again")
        check("cost_model_read" in start(*auto), "and is whole then")
        check_healing(program, kept[0], auto, start)


def check_healing(program, file, auto, start):
    """A kept model of which the work's times are far off is measured again, once."""
    model = json.loads(file.read_text())
    for kind in ("prefill", "decode"):
        model["cost_model"][kind] = [x / 8 for x in model["cost_model"][kind]]
    file.write_text(json.dumps(model))
    with serving(program, *auto) as running:
        said = controller(running)["cost_model"]
        check(said == {"source": "kept", "measured_at": model["measured_at"], "doubtful": False}, f"where costs come from: {said}")
        deadline = time.monotonic() + 180
        while "cost_model_doubtful" not in running.log.read_text() and time.monotonic() < deadline:
            chat(running, max_tokens=300, ignore_eos=True)
        line = [line for line in running.log.read_text().splitlines() if "cost_model_doubtful" in line]
        check(len(line) == 1 and str(file) in line[0], f"it is found doubtful: {line}")
        check(controller(running)["cost_model"]["doubtful"], "and said to be")
    doubted = json.loads(file.read_text())
    check(doubted["cost_model"] == model["cost_model"] and doubted["doubted"]["decode"] > 2, f"which its file says: {doubted}")
    log = start(*auto)
    check(" calibrated " in log and "measured anew" in log, "the next start measures")
    anew = json.loads(file.read_text())
    usual = anew.get("usual", {}).get("decode", 0)
    check(0 < usual < doubted["doubted"]["decode"] / 2 and "doubted" not in anew, f"which explains most of it: {anew}")
    check("cost_model_read" in start(*auto), "which later ones read")


def main():
    arguments = parse_arguments(__doc__)
    check_kept(arguments.program)
    with tempfile.TemporaryDirectory() as name:
        file = pathlib.Path(name) / "cost.json"
        cost = ["--cost-model", file]
        with serving(arguments.program, *ARGUMENTS, *cost, "--policy", "paper") as running:
            check(file.exists() and "calibrated" in log_of_start(running), "the cost model is measured and written")
            check_policies(running)
        written = file.read_text()
        with serving(arguments.program, *ARGUMENTS, *cost) as running:
            log = log_of_start(running)
            check("cost_model_read" in log and "calibrated" not in log, "another start reads it")
            check(chat(running, max_tokens=2).status == 200, "and serves")
        check(file.read_text() == written, "and leaves it as it was")
        model = json.loads(written)
        for what, text, words in (
            ("of another model", json.dumps({**model, "measured_with": "another model"}), "another model"),
            ("cut off", written[: len(written) // 2], "cost.json"),
            ("of something else", "{}", "not a file that dsla serve wrote"),
            ("with a negative time", json.dumps({**model, "cost_model": {**model["cost_model"], "fold": [-1, 0]}}), "fold"),
        ):
            file.write_text(text)
            command = [arguments.program, "serve", "--port", "0", *ARGUMENTS, *cost]
            result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
            last = result.stderr.strip().splitlines()[-1]
            check(result.returncode == 2 and words in last, f"a file {what}: {result.returncode}, {last[:150]!r}")
    finish()


if __name__ == "__main__":
    main()
