#!/usr/bin/env python3
"""Tests of the load generator in bench/serving: what it measures is only as good as it is."""

import asyncio
import json
import pathlib
import random
import sys
import unittest
import xml.etree.ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "bench/serving"))

import client as load_client
import plot
import report
import trace


def chunked(pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 4},
    "dsla": {"tier": "auto", "levels": [{"position": 0, "level": 2}]},
}
REPLY = (
    event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    + event(choices=[{"index": 0, "delta": {"content": "ä"}, "finish_reason": None}])
    + b": a comment\n\n"
    + event(choices=[{"index": 0, "delta": {"content": "b"}, "finish_reason": None}])
    + event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
    + event(choices=[], usage=USAGE)
    + b"data: [DONE]\n\n"
)
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def ask(answer, piece=None):
    """The record of one request to a server that answers with these bytes, `piece` of them at a time."""

    async def run():
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(0, len(answer), piece or len(answer) or 1):
                writer.write(answer[at : at + (piece or len(answer))])
                await writer.drain()
                await asyncio.sleep(0)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = load_client.Client(f"http://127.0.0.1:{port}", timeout=10)
        record = load_client.Record("chat", 0.0)
        await client.stream("/v1/chat/completions", load_client.chat_body("m", [], 3), record, 0.0)
        server.close()
        return record

    return asyncio.run(run())


class Client(unittest.TestCase):
    def check_reply(self, record):
        self.assertTrue(record.ok, record.error)
        self.assertEqual((record.chunks, record.finish), (2, "length"))
        self.assertEqual((record.prompt_tokens, record.completion_tokens, record.cached_tokens), (10, 3, 4))
        self.assertEqual(record.levels, [{"position": 0, "level": 2}])
        self.assertGreater(record.first, 0)
        self.assertGreaterEqual(record.last, record.first)

    def test_reply_in_any_pieces(self):
        seed = 7
        print(f"seed {seed}")
        rng = random.Random(seed)
        self.check_reply(ask(SSE_HEAD + chunked([REPLY])))
        self.check_reply(ask(SSE_HEAD + chunked([REPLY[i : i + 1] for i in range(len(REPLY))]), piece=5))
        cuts = sorted(rng.sample(range(1, len(REPLY)), 9))
        pieces = [REPLY[a:b] for a, b in zip([0, *cuts], [*cuts, len(REPLY)])]
        self.check_reply(ask(SSE_HEAD + chunked(pieces), piece=11))

    def test_a_token_without_text_counts_where_ids_are_asked_for(self):
        record = load_client.Record("completion", 0.0)
        for now, fields in enumerate(({"text": "", "token_ids": [7]}, {"text": "a", "token_ids": [8]}, {"text": "", "token_ids": []}), 1):
            load_client.note_event(record, {"choices": [{"index": 0, "finish_reason": None, **fields}]}, now)
        self.assertEqual((record.first, record.last, record.chunks), (1, 2, 2))

    def test_refusal(self):
        body = json.dumps({"error": {"message": "the queue is full"}}).encode()
        record = ask(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.assertTrue(record.refused)
        self.assertFalse(record.ok)
        self.assertEqual((record.error, record.retry_after), ("the queue is full", 3.0))

    def test_what_breaks_off_is_no_success(self):
        for answer in (
            b"",
            b"rubbish\r\n\r\n",
            SSE_HEAD,
            SSE_HEAD + chunked([REPLY])[:-30],
            SSE_HEAD + chunked([REPLY.replace(b"data: [DONE]\n\n", b"")]),
            SSE_HEAD + chunked([REPLY[:40]]),
            SSE_HEAD + chunked([event(error={"message": "out of memory"}), b"data: [DONE]\n\n"]),
            SSE_HEAD + b"xyz\r\n",
        ):
            record = ask(answer)
            self.assertFalse(record.ok, answer)
            self.assertNotEqual(record.error, "", answer)

    def test_requests_go_out_when_due(self):
        async def run():
            sent = []
            all_sent = asyncio.Event()

            class Late(load_client.Client):
                async def stream(self, path, body, record, start):
                    sent.append(record.due)
                    if len(sent) == 5:
                        all_sent.set()
                    await all_sent.wait()  # one after another they would never end
                    return record

            requests = [{"at": 0.01 * i, "kind": "chat", "max_tokens": 1} for i in range(5)]
            start = asyncio.get_running_loop().time()
            played = load_client.play(Late("http://127.0.0.1:1"), "m", requests, lambda r: [], "burst", start)
            await asyncio.wait_for(played, 60)
            return sent

        self.assertEqual(len(asyncio.run(run())), 5)


class Report(unittest.TestCase):
    def test_quantile(self):
        self.assertIsNone(report.quantile([None], 0.5))
        self.assertEqual(report.quantile([3, 1, 2], 0.5), 2)
        self.assertAlmostEqual(report.quantile([0, 10], 0.95), 9.5)
        self.assertEqual(report.quantile([5, None], 0.95), 5)

    def test_back_at_zero(self):
        def sample(time, level):
            return {"time": time, "controller": {"target_level": level}}

        samples = [sample(0, 0), sample(1, 22), sample(5, 9), sample(8, 0), sample(9, 0)]
        self.assertEqual(report.back_at_zero(samples, 4), 4)
        self.assertEqual(report.back_at_zero(samples, 8.5), 0.5)
        self.assertIsNone(report.back_at_zero(samples + [sample(10, 3)], 4))
        self.assertIsNone(report.back_at_zero(samples, 100))

    def test_figures_count_every_request_once(self):
        def row(status, done, **fields):
            base = dict(phase="burst", due=1.0, status=status, done=done, ok=status == 200, prompt_tokens=100, completion_tokens=20)
            return {**base, "cached_tokens": 10, "ttft": 0.5, "tpot": 0.1, **fields}

        rows = [row(200, 3.0), row(200, 5.0, tpot=0.3), row(429, 1.1), row(500, 1.2), row(200, 50.0, phase="calm")]
        f = report.figures(rows, [])
        self.assertEqual((f["requests"], f["finished"], f["refused"], f["failed"]), (4, 2, 1, 1))
        self.assertEqual(f["seconds"], 4.0)
        self.assertEqual(f["tokens_per_second"], 60.0)
        self.assertEqual(f["cached_tokens"], 20)
        self.assertEqual(f["tpot_within"], 1)
        self.assertIn("2 of 4", report.table(["a"], [f]))
        self.assertEqual(len(report.table(["a"], [f], rows=("refused",)).splitlines()), 2)


class Trace(unittest.TestCase):
    def test_same_seed_same_bytes(self):
        self.assertEqual(trace.dump(trace.make_trace(seed=3)), trace.dump(trace.make_trace(seed=3)))
        self.assertNotEqual(trace.dump(trace.make_trace(seed=3)), trace.dump(trace.make_trace(seed=4)))

    def test_holds_what_was_asked_for(self):
        made = trace.make_trace(seed=1, documents=3, questions=2, chats=5, burst=10, calm=8, calm_gap=2)
        kinds = [r["kind"] for r in made["burst"]]
        self.assertEqual((kinds.count("document"), kinds.count("chat"), len(made["calm"])), (6, 5, 4))
        times = [r["at"] for r in made["burst"]]
        self.assertEqual(times, sorted(times))
        self.assertEqual(times[0], 0)
        self.assertLessEqual(times[-1], 10)
        trace.check_files(made)
        for request in made["burst"]:
            text = trace.messages_of(request)[0]["content"]
            self.assertTrue(text.endswith(request["question"]))
            # 4.3 to 5 characters a token: documents fit a context of 8192 with their reply.
            self.assertTrue(len(text) < 2000 if request["kind"] == "chat" else 32000 < len(text) < 35500, len(text))

    def test_distinct_prompts_share_nothing(self):
        made = trace.make_distinct(seed=2, count=200, prompt=(20, 400), reply=(3, 9), rate=50, calm=8)
        self.assertEqual(trace.dump(made), trace.dump(trace.make_distinct(seed=2, count=200, prompt=(20, 400), reply=(3, 9), rate=50, calm=8)))
        burst = made["burst"]
        texts = [trace.messages_of(r)[0]["content"].split() for r in burst]
        self.assertEqual(len({tuple(text[:16]) for text in texts}), 200)
        for request, text in zip(burst, texts):
            self.assertTrue(20 <= request["words"] <= 400 and 3 <= request["max_tokens"] <= 9)
            self.assertEqual(len(text), request["words"] + len(request["question"].split()))
        times = [r["at"] for r in burst]
        self.assertEqual((times[0], times), (0, sorted(times)))
        self.assertTrue(3 < times[-1] < 5, times[-1])  # 4 s on average, of a deviation of .3
        self.assertEqual((made["files"], len(made["calm"])), ({}, 2))

    def test_other_texts_are_noticed(self):
        made = trace.make_trace(documents=1)
        made["files"] = {name: "0" for name in made["files"]}
        with self.assertRaises(SystemExit):
            trace.check_files(made)


class Plots(unittest.TestCase):
    def test_are_well_formed(self):
        samples = [{"time": t, "controller": {"target_level": t % 5}} for t in range(9)]
        lines = plot.Plot("a", "b", "c", 2, 10)
        lines.line("a & b", [(0, 5), (2, 10)])
        for svg in (
            plot.level_plot([("a < b", samples, 3.0), ("none", [], 0.0)], 30),
            plot.ttft_plot([("a & b", [1.0, None, 0.2]), ("none", [])]),
            lines.svg(),
        ):
            xml.etree.ElementTree.fromstring(svg)
        self.assertEqual(plot.ticks(0, 30), [0, 5, 10, 15, 20, 25, 30])
        self.assertEqual(plot.ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0])


if __name__ == "__main__":
    unittest.main()
