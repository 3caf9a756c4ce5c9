#!/usr/bin/env python3
"""The openai package, unmodified: models, completions, chat, responses, streams, errors and retries."""

import json
import re
import typing

from serving import KEY, check, finish, parse_arguments, serving, skip

try:
    import httpx
    import openai
    import pydantic
except ImportError as error:
    skip(error)

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def check_models(client):
    models = client.models.list().data
    check(len(models) >= 1 and models[0].object == "model", f"models: {models[0].id}")
    check(client.models.retrieve(models[0].id).id == models[0].id, "one model")
    return models[0].id


def check_chat(client, model):
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    choice = whole.choices[0]
    check("Paris" in choice.message.content, f"chat: {choice.message.content!r}")
    check(whole.object == "chat.completion" and choice.finish_reason in ("stop", "length"), "its form")
    usage = whole.usage
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "its usage adds up")
    check(usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens, "with cached tokens")
    check(usage.model_extra["dsla"]["levels"][0] == {"position": 0, "level": 0}, "and the level")

    text, chunks, last_usage, finish_reason = "", [], None, None
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in stream:
        chunks.append(chunk)
        if not chunk.choices:
            last_usage = chunk.usage
            continue
        check(chunk.usage is None, "no usage before the last chunk") if chunk.usage else None
        text += chunk.choices[0].delta.content or ""
        finish_reason = chunk.choices[0].finish_reason or finish_reason
    check(text == choice.message.content, "the stream is the same text")
    check(chunks[0].choices[0].delta.role == "assistant", "the role comes with the first token")
    check(bool(chunks[0].choices[0].delta.content), "which is text")
    check(len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk", "one id")
    check(finish_reason == choice.finish_reason, "the same end")
    check(last_usage is not None and last_usage.completion_tokens == usage.completion_tokens, "the usage comes last")

    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    again = client.chat.completions.create(model=model, messages=parts, max_tokens=8, temperature=0)
    check(again.choices[0].message.content == choice.message.content, "content as parts")


def check_responses(client, model):
    fields = {"model": model, "instructions": "Answer in one word.", "max_output_tokens": 8, "temperature": 0}
    question = "What is the capital of France?"
    whole = client.responses.create(input=question, metadata={"of": "a test"}, **fields)
    check("Paris" in whole.output_text and whole.object == "response", f"a response: {whole.output_text!r}")
    check(whole.metadata == {"of": "a test"} and whole.max_output_tokens == 8, "with what was asked")
    usage = whole.usage
    check(usage.total_tokens == usage.input_tokens + usage.output_tokens, "its usage adds up")
    check(usage.input_tokens_details.cached_tokens <= usage.input_tokens, "with cached tokens")
    events = list(client.responses.create(input=question, stream=True, **fields))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    check(text == whole.output_text, "the stream is the same text")
    check(events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete"), "from one end to the other")
    check([event.sequence_number for event in events] == [*range(len(events))], "in order")
    check(events[-1].response.output_text == text and events[-1].response.usage.output_tokens == usage.output_tokens, "and the last one has it whole")
    with client.responses.stream(input=question, **{**fields, "max_output_tokens": 200}) as stream:
        final = stream.get_final_response()
    check(final.status == "completed" and final.output_text.startswith(text), "the client's own collector of a stream")
    history = [{"role": "user", "content": question}, *whole.output, {"role": "user", "content": "And of Italy?"}]
    again = client.responses.create(input=history, **fields)
    check("Rome" in again.output_text, f"a conversation goes on with the output: {again.output_text!r}")
    short = client.responses.create(input=question, **{**fields, "max_output_tokens": 1})
    check((short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens"), "cut off by its limit")
    for name, value in {"previous_response_id": "resp_1", "store": True, "background": True, "truncation": "auto"}.items():
        try:
            client.responses.create(input=question, **{**fields, name: value})
            check(False, f"{name} was taken")
        except openai.BadRequestError as error:
            check((error.code, error.param) == ("unsupported_parameter", name), f"{name}: {error.code}")
    try:
        long = {"stream": True, "extra_body": {"timeout": 1.0, "ignore_eos": True}}
        for _ in client.responses.create(input=question, **{**fields, "max_output_tokens": 1500}, **long):
            pass
        check(False, "a stream out of time raised nothing")
    except openai.APIError as error:
        check(error.code == "timeout", f"an error inside its stream: {error.code}")


class Capital(pydantic.BaseModel):
    sunny: bool
    river: typing.Literal["Seine", "Tiber"]


def check_responses_structured(client, model):
    ask = dict(model=model, input="Describe Paris.", temperature=0, max_output_tokens=200)
    parsed = client.responses.parse(text_format=Capital, **ask)
    check(isinstance(parsed.output_parsed, Capital), f"a response of a format: {parsed.output_text!r}")
    check(parsed.text.format.type == "json_schema" and parsed.text.format.name == "Capital", "which comes back")
    with client.responses.stream(text_format=Capital, **ask) as stream:
        final = stream.get_final_response()
    check(final.output_parsed == parsed.output_parsed, "streamed the same")
    reply = client.responses.create(text={"format": {"type": "json_object"}}, **ask)
    check(reply.output_text.startswith("{"), f"an object: {reply.output_text[:60]!r}")
    reply = client.responses.create(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **ask)
    check(reply.output_text in ("yes", "no"), "one of two")
    schema = {"type": "json_schema", "name": "n", "schema": {"not": {}}}
    try:
        client.responses.create(text={"format": schema}, **ask)
        check(False, "a schema that cannot be kept was taken")
    except openai.BadRequestError as error:
        check((error.code, error.param) == ("invalid_grammar", "text.format.schema"), f"{error.param}: {error.message[:80]}")


def check_responses_logprobs(client, model):
    ask = dict(model=model, input="Say hi.", temperature=0, max_output_tokens=6, include=["message.output_text.logprobs"], top_logprobs=2)
    reply = client.responses.create(**ask)
    part = reply.output[0].content[0]
    check(len(part.logprobs) == reply.usage.output_tokens, "log-probabilities of a response's tokens")
    check(all(token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 2 for token in part.logprobs), "and of the likeliest")
    check(b"".join(bytes(token.bytes) for token in part.logprobs).decode().startswith(part.text), "their bytes are the text")
    events = list(client.responses.create(stream=True, **ask))
    deltas = [token.token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    tokens = [token.token for token in part.logprobs]
    check(deltas == tokens[: len(deltas)] and len(deltas) > 1, "streamed with their text")
    check([token.token for token in events[-1].response.output[0].content[0].logprobs] == tokens, "and all at the end")


def check_missing(client):
    """What this server has not: a clear error, not an answer of another kind."""
    for name, ask in {
        "embeddings": lambda: client.embeddings.create(model="x", input="x"),
        "images": lambda: client.images.generate(prompt="x"),
        "speech": lambda: client.audio.speech.create(model="x", voice="alloy", input="x"),
        "moderations": lambda: client.moderations.create(input="x"),
        "files": lambda: client.files.list(),
        "a stored response": lambda: client.responses.retrieve("resp_1"),
    }.items():
        try:
            ask()
            check(False, f"{name}: an answer")
        except openai.NotFoundError as error:
            check(error.code == "unknown_path" and "there is no" in error.message, f"{name}: {error.message}")


def check_logprobs(client, model):
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = reply.choices[0].logprobs.content
    check(len(tokens) == reply.usage.completion_tokens, "log-probabilities of every token")
    check(all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens), "and of the likeliest")
    check(all(token.logprob == token.top_logprobs[0].logprob for token in tokens), "greedy takes the likeliest")
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    check(text == reply.choices[0].message.content, "their bytes are the reply")


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "tags": {"type": "array", "items": {"enum": ["capital", "port"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "population", "tags"],
}


def check_schema_reply(text):
    value = json.loads(text)
    check(list(value) == ["city", "population", "tags"] and isinstance(value["population"], int), f"a schema's: {text!r}")
    check(0 < len(value["tags"]) < 3 and set(value["tags"]) <= {"capital", "port"}, "with its lists")


def check_structured(client, model):
    format = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
    # More than the schema allows, white space and escapes included.
    ask = dict(model=model, messages=MESSAGES, max_tokens=1000, response_format=format)
    for choice in client.chat.completions.create(**ask, n=4, seed=3, temperature=1.2).choices:
        check(choice.finish_reason == "stop", "it ends by itself")
        check_schema_reply(choice.message.content)
    whole = client.chat.completions.create(**ask, temperature=0).choices[0].message.content
    check_schema_reply(whole)
    stream = client.chat.completions.create(**ask, temperature=0, stream=True)
    check("".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole, "streamed the same")
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=200, temperature=0, response_format={"type": "json_object"}
    )
    text = reply.choices[0].message.content
    check(text.startswith("{"), f"an object: {text[:60]!r}")
    for extra, wanted in (
        ({"structured_outputs": {"choice": ["Paris", "London"]}}, "Paris|London"),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"}}, "[0-9]{3}-[a-z]{2}"),
        ({"grammar": 'root ::= "<" [a-z]+ ">"'}, "<[a-z]+>"),
    ):
        reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=60, temperature=0, extra_body=extra)
        text = reply.choices[0].message.content
        check(re.fullmatch(wanted, text) or reply.choices[0].finish_reason == "length", f"{wanted}: {text!r}")
    reply = client.completions.create(model=model, prompt="Yes or no?", max_tokens=5, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    check(reply.choices[0].text in ("yes", "no") and reply.choices[0].finish_reason == "stop", "a completion, too")


def check_completions(client, model):
    reply = client.completions.create(model=model, prompt=["Once upon", "In the"], n=2, max_tokens=5, seed=7)
    check([choice.index for choice in reply.choices] == [0, 1, 2, 3], "prompts times n")
    again = client.completions.create(model=model, prompt=["Once upon", "In the"], n=2, max_tokens=5, seed=7)
    check([a.text for a in reply.choices] == [b.text for b in again.choices], "the same for the same seed")
    stop = client.completions.create(model=model, prompt="1, 2, 3, 4,", max_tokens=20, temperature=0, stop=[" 7"])
    check(" 7" not in stop.choices[0].text and stop.choices[0].finish_reason == "stop", f"stop: {stop.choices[0].text!r}")
    streamed = client.completions.create(model=model, prompt="1, 2, 3, 4,", max_tokens=20, temperature=0, stop=[" 7"], stream=True)
    check("".join(chunk.choices[0].text for chunk in streamed) == stop.choices[0].text, "streamed the same")
    for length in (1, 3):
        reply = client.completions.create(model=model, prompt="The", max_tokens=length, extra_body={"ignore_eos": True})
        check(reply.usage.completion_tokens == length, f"{length} tokens where the end is ignored")


def check_tiers(client, model):
    for tier, level in (("priority", 0), ("flex", None)):
        reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, service_tier=tier)
        got = reply.usage.model_extra["dsla"]["levels"][-1]["level"]
        check(reply.service_tier == tier and (got == level if level is not None else got > 0), f"tier {tier}: level {got}")
    reply = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, max_tokens=4, extra_body={"dsla": {"level": 3}}
    )
    check(reply.headers["x-dsla-level"] == "3" and reply.headers["x-dsla-tier"] == "exact", "an exact level")


def check_errors(client, url, model):
    def raises(kind, code, by=client, **fields):
        try:
            by.chat.completions.create(**{"model": model, "messages": MESSAGES, **fields})
        except openai.APIStatusError as error:
            check(type(error) is kind and error.code == code, f"{kind.__name__}: {error.code}, {error.param}")
            return
        check(False, f"{kind.__name__} {code}: nothing was raised")

    raises(openai.BadRequestError, "integer_above_max_value", n=100)
    raises(openai.BadRequestError, "context_length_exceeded", max_tokens=10**6)
    raises(openai.BadRequestError, "invalid_grammar", extra_body={"grammar": "root ::= ("})
    raises(openai.NotFoundError, "model_not_found", model="gpt-4")
    try:
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        check(False, "a wrong key was taken")
    except openai.AuthenticationError as error:
        check(error.code == "invalid_api_key", "AuthenticationError")
    # A refusal is sent again after the server's own Retry-After; a bad request is not.
    sent = []
    with httpx.Client(event_hooks={"request": [sent.append]}) as counting:
        raises(openai.BadRequestError, "invalid_value", by=client.with_options(http_client=counting), stop="")
    check(len(sent) == 1, "a bad request is not sent again")


def check_stream_errors(client, model):
    try:
        for _ in client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=1500, stream=True, extra_body={"timeout": 1.0, "ignore_eos": True}
        ):
            pass
        check(False, "a stream out of time raised nothing")
    except openai.APIError as error:
        check(error.code == "timeout", f"an error inside a stream: {error.code}")


def check_disconnect(client, model):
    stream = client.completions.create(model=model, prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    reply = client.completions.create(model=model, prompt="x", max_tokens=1)
    check(reply.usage.completion_tokens <= 1, "after a stream that is closed comes the next request")


def main():
    arguments = parse_arguments(__doc__)
    # Whatever this machine is busy with, tier auto is at level 0.
    with serving(arguments.program, "--policy", "fixed") as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, timeout=120)
        model = check_models(client)
        check_chat(client, model)
        check_responses(client, model)
        check_responses_structured(client, model)
        check_responses_logprobs(client, model)
        check_missing(client)
        check_logprobs(client, model)
        check_structured(client, model)
        check_completions(client, model)
        check_tiers(client, model)
        check_errors(client, running.url, model)
        check_stream_errors(client, model)
        check_disconnect(client, model)
    # Retries: one reply at a time and a queue of one, so that some of these are refused at first.
    with serving(arguments.program, "--max-running", 1, "--max-queued", 1) as running:
        check_retries(running, model)
    finish()


def check_retries(running, model):
    import concurrent.futures

    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, timeout=120, max_retries=20)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(client.completions.create, model=model, prompt="Once", max_tokens=30, extra_body={"ignore_eos": True})
            for _ in range(6)
        ]
        replies = [job.result() for job in jobs]
    check(all(reply.usage.completion_tokens == 30 for reply in replies), "what is refused at first is served on a retry")
    status = client.with_options(max_retries=0).models.with_raw_response.list().http_response.status_code
    check(status == 200, "and the server is there")


if __name__ == "__main__":
    main()
