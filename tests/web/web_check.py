#!/usr/bin/env python3
"""Loads the page of a running `dsla serve` in headless Chromium and uses it as a visitor does: gives the key, chats,
stops, watches the level change, on a desktop and on a phone. Exit code 77 (skipped) where there is no Chromium."""

import argparse
import base64
import json
import pathlib
import sys
import tempfile
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "load"), str(HERE.parent.parent / "bench/serving")]

import devtools
import server
import small_model
import subpath_proxy

KEY, ADMIN_KEY = "web-check-key", "web-check-admin-key"
SIZE_LIMIT = 100_000  # bytes of the whole page as sent
SKIPPED = 77
LEVEL = 7

failures = []


def check(condition, what):
    print(f"{'ok  ' if condition else 'FAIL'}  {what}", flush=True)
    if not condition:
        failures.append(what)


def set_level(url, level):
    request = urllib.request.Request(
        f"{url}/v1/dsla",
        data=json.dumps({"policy": "fixed", "level": level}).encode(),
        headers={"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        reply.read()


def emulate(page, width, height, scheme, reduced_motion=False):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    if reduced_motion:
        features.append({"name": "prefers-reduced-motion", "value": "reduce"})
    page.call("Emulation.setEmulatedMedia", features=features)


def screenshot(page, folder, name):
    if folder:
        shot = page.call("Page.captureScreenshot", format="png")
        (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def say(page, text):
    page.evaluate("document.getElementById('prompt').focus()")
    page.call("Input.insertText", text=text)
    page.key("Enter", "\r")


def give_key(page, key):
    page.wait("document.getElementById('key-dialog').open")
    page.evaluate("document.getElementById('key').focus()")
    page.call("Input.insertText", text=key)
    page.key("Enter", "\r")


def wait_live(page):
    page.wait("document.getElementById('status').dataset.state === 'live'")


def check_key(page):
    give_key(page, "wrong")
    page.wait("document.getElementById('key-dialog').open && !document.getElementById('key-refused').hidden")
    check(True, "without a key the page asks for one, and says that a wrong one is refused")
    give_key(page, KEY)
    wait_live(page)
    check(page.evaluate("sessionStorage.getItem('dsla-api-key')") == KEY, "with the key the page is live, and keeps it for the tab")
    # Refusals before the key are what was asked for.
    page.errors[:] = [error for error in page.errors if "401" not in error]


def check_load(page, url):
    own = {name: size for name, size in page.received.items() if name.startswith(url) and "/v1/" not in name}
    check(0 < sum(own.values()) < SIZE_LIMIT, f"the page is {sum(own.values())} bytes in {len(own)} files, under {SIZE_LIMIT}")
    check(all(name.startswith((url, "data:")) for name in page.urls.values()), "nothing comes from elsewhere")
    model = page.evaluate("fetch('/v1/models', {headers: {Authorization: 'Bearer ' + sessionStorage.getItem('dsla-api-key')}}).then(r => r.json()).then(m => m.data[0].id)")
    page.wait("document.getElementById('model').textContent !== ''")
    check(page.evaluate("document.getElementById('model').textContent") == model, f"the model is named: {model}")


# Markdown and the HTML it must become; text that looks like HTML must come out as text.
MARKDOWN = (
    ("a **b** and *c* `d*e*`", "<p>a <strong>b</strong> and <em>c</em> <code>d*e*</code></p>"),
    ("2 * 3 * 4 ** 5", "<p>2 * 3 * 4 ** 5</p>"),
    ("# One\ntwo", "<h3>One</h3><p>two</p>"),
    ("Steps:\n1. one\n2. two\n   more\n\n- a\n- b", "<p>Steps:</p><ol><li>one</li><li>two more</li></ol><ul><li>a</li><li>b</li></ul>"),
    ("```c\n<b>\n\n**x**\n```\nend", '<pre tabindex="0"><code>&lt;b&gt;\n\n**x**</code></pre><p>end</p>'),
    ("```\nopen", '<pre tabindex="0"><code>open</code></pre>'),
    ("> said\n> so", "<blockquote>said\nso</blockquote>"),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("**open and `open", "<p>**open and `open</p>"),
    ("", ""),
)


def check_markdown(page):
    wrong = []
    for source, html in MARKDOWN:
        # Letter by letter, as it streams: the end must not depend on the way.
        made = page.evaluate(
            f"""import('/markdown.js').then(({{Markdown}}) => {{
              const node = document.createElement('div');
              const view = new Markdown(node);
              const text = {json.dumps(source)};
              for (let i = 0; i <= text.length; ++i) view.update(text.slice(0, i));
              return node.innerHTML;
            }})"""
        )
        if made != html:
            wrong.append(f"{source!r} became {made!r} instead of {html!r}")
    check(not wrong, f"{len(MARKDOWN)} pieces of Markdown {wrong or ''}")


def check_chat(page):
    say(page, "Name <img src=x onerror=alert(1)> three colours.")
    page.wait("document.querySelector('.message.assistant[data-done]')", 120)
    check(page.evaluate("document.querySelectorAll('.failure').length") == 0, "it ends without an error")
    check("token" in page.evaluate("document.querySelector('.cost').textContent"), "its cost is shown: " + page.evaluate("document.querySelector('.cost').textContent"))
    check(page.evaluate("document.querySelectorAll('#messages img').length") == 0, "markup in a message stays text")
    check(page.evaluate("document.getElementById('announce').textContent.length") > 0, "screen readers are told the reply")


# Chat requests whose replies do not end by themselves.
ENDLESS = """
window.realFetch = window.fetch;
window.fetch = (path, options) =>
  path.endsWith('chat/completions')
    ? realFetch(path, {...options, body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true})})
    : realFetch(path, options);
"""


def check_stop(page):
    page.evaluate(f"{ENDLESS} document.getElementById('max-tokens').value = 2000")
    say(page, "Write a very long story about a river.")
    page.wait("document.querySelectorAll('.message.assistant').length === 2 && document.querySelectorAll('.body')[1].textContent.length > 10", 120)
    page.evaluate("document.getElementById('stop').click()")
    page.wait("document.querySelectorAll('.message.assistant[data-done]').length === 2")
    check("stopped" in page.evaluate("document.querySelectorAll('.cost')[1].textContent"), "Stop ends a reply")
    page.evaluate("window.fetch = realFetch")
    page.wait("document.getElementById('facts').querySelector('dd').textContent === '0'")
    check(True, "and the server runs nothing any more")


# Answers of chat requests in the server's place: `sent` holds their bodies, `answerWith` is refusal, half (to which
# `more` adds), cut (an end of the connection without that of the stream) or whole. `raises` come with the events of /v1/dsla.
FAKE_CHAT = """
window.sent = [];
window.raises = [];
window.realFetch = window.fetch;
window.fetch = async (path, options) => {
  if (path.endsWith('v1/dsla')) {
    const state = await (await realFetch(path, options)).json();
    state.events.push(...raises);
    return Response.json(state);
  }
  if (!path.endsWith('chat/completions')) return realFetch(path, options);
  sent.push(JSON.parse(options.body));
  if (answerWith === 'refusal') {
    return new Response('{"error": {"message": "the queue is full"}}', {status: 429, headers: {'Retry-After': '7'}});
  }
  const encoder = new TextEncoder();
  return new Response(new ReadableStream({start(stream) {
    window.more = (text) => stream.enqueue(encoder.encode(`data: {"choices": [{"delta": {"content": "${text}"}}]}\\n\\n`));
    more(`answer ${sent.length}`);
    if (answerWith === 'whole') stream.enqueue(encoder.encode('data: [DONE]\\n\\n'));
    if (answerWith !== 'half') stream.close();
    options.signal.addEventListener('abort', () => stream.error(new DOMException('', 'AbortError')));
  }}), {headers: {'X-Request-Id': `req-${sent.length}`, 'X-Dsla-Level': '2'}});
};
"""


def fake_answer(page, kind, text, until):
    page.evaluate(f"window.answerWith = '{kind}'")
    say(page, text)
    page.wait(until)


def last_sent(page):
    """The contents of the last request's messages; their roles must take turns, as many chat templates want it."""
    messages = page.evaluate("sent.at(-1).messages")
    roles = [message["role"] for message in messages]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        return f"roles {roles}"
    return [message["content"] for message in messages]


def check_turns(page):
    clear = "document.getElementById('clear').click()"
    idle = "!document.getElementById('send').hidden"
    page.evaluate(clear)
    page.evaluate(FAKE_CHAT)
    fake_answer(page, "half", "one", "document.querySelector('.body')?.textContent === 'answer 1'")
    for text in ("answer 1, and", "answer 1, and so on"):
        page.evaluate(f"more('{text}'.slice(document.querySelector('.body').textContent.length))")
        page.wait(f"document.querySelector('.body').textContent === '{text}'")
    check(True, "the reply grows piece by piece")
    page.evaluate("window.raises = [{request_id: 'req-1/0.0', from: 2, to: 9, age_seconds: 0, reason: 'memory: full'}]")
    page.wait("document.querySelector('.cost').textContent.includes('Level 2, then level 9 from token 3')")
    check(True, "a raise of the reply being written is shown with it")
    page.evaluate(f"window.raises = []; {clear}")
    page.wait(idle)
    fake_answer(page, "whole", "two", "document.querySelectorAll('.message.assistant[data-done]').length === 1")
    check(last_sent(page) == ["two"], f"Clear during a reply leaves nothing of it: {last_sent(page)}")
    fake_answer(page, "refusal", "three", "document.querySelector('.failure button')")
    fake_answer(page, "half", "four", "document.getElementById('messages').textContent.includes('answer 4')")
    check(last_sent(page) == ["two", "answer 2", "four"], f"a refused message is no part of the conversation: {last_sent(page)}")
    check(page.evaluate("document.querySelectorAll('.failure button').length") == 0, "while a reply is written nothing offers to try again")
    page.evaluate("document.getElementById('stop').click()")
    page.wait(idle)
    fake_answer(page, "refusal", "five", "document.querySelector('.failure button')")
    page.evaluate("window.answerWith = 'whole'; document.querySelector('.failure button').click()")
    page.wait("document.getElementById('messages').textContent.includes('answer 6')")
    sent = last_sent(page)
    check(sent == ["two", "answer 2", "four", "answer 4", "five"], f"Try again sends the refused message again: {sent}")
    page.wait(idle)
    fake_answer(page, "cut", "six", "document.querySelector('.failure button')")
    check("answer 7" in page.evaluate("document.getElementById('messages').textContent"), "a reply that breaks off is shown as far as it came, as a failure")
    page.evaluate(f"window.fetch = realFetch; {clear}")


def check_lost(page):
    page.evaluate("window.realFetch = window.fetch; window.fetch = () => Promise.reject(new TypeError('network'))")
    page.wait("document.getElementById('live').hasAttribute('data-stale')")
    text = page.evaluate("document.getElementById('stale').textContent")
    check(text.startswith("Not reachable since "), f"without the server the live view says how old it is: {text}")
    page.evaluate("window.fetch = realFetch")
    wait_live(page)
    check(page.evaluate("document.getElementById('stale').hidden"), "and goes on once it is back")


def check_options(page):
    """The panel of options at widths where the row that it belongs to wraps, or does not."""
    for width, height in ((1440, 900), (1440, 1600), (1000, 700), (390, 844), (844, 390)):
        emulate(page, width, height, "light")
        page.evaluate("document.querySelector('#options summary').click()")
        inside = page.evaluate(
            """(() => {
              const panel = document.querySelector('.options-body').getBoundingClientRect();
              const box = document.querySelector('.box').getBoundingClientRect();
              return panel.left >= 0 && panel.right <= innerWidth && panel.top >= 0 && panel.bottom <= box.top;
            })()"""
        )
        page.evaluate("document.getElementById('temperature').focus()")
        page.key("Escape")
        closed = page.evaluate("!document.getElementById('options').open && document.activeElement.tagName === 'SUMMARY'")
        fills = page.evaluate("Math.abs(document.querySelector('main').getBoundingClientRect().bottom - innerHeight) < 1")
        check(fills, f"at {width} x {height} the page fills the window")
        check(inside and closed, f"at {width} x {height} the options open inside the page, above the message box, and Escape closes them")


def check_levels(page, url):
    layers = page.evaluate("document.querySelectorAll('#cells i').length")
    check(layers > 0, f"{layers} layers are shown")
    for level in (LEVEL, 0):
        set_level(url, level)
        page.wait(f"document.querySelectorAll('#cells i.dsla').length === {level}", 30)
        check(page.evaluate("document.getElementById('target').textContent") == f"Level {level}", f"level {level} is set: as many cells are DSLA")
    events = page.evaluate("document.getElementById('events').textContent")
    check(f"0 → {LEVEL}" in events, "the change is listed")
    check(page.evaluate("document.querySelectorAll('#chart .event').length") >= 2, "and marked in the chart")


def check_access(page):
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input:not([hidden]), textarea, summary')].filter(e =>
          !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"""
    )
    check(unnamed == [], f"every control has a name {unnamed}")
    page.evaluate("document.activeElement.blur(); document.getElementById('clear').click()")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(30):
        page.key("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName"))
    missing = {"theme", "log", "prompt", "attach", "send", "tier", "burst"} - set(reached)
    check(not missing, f"the keyboard reaches what there is {missing or ''}")


def check_phone(page, folder):
    for scheme, width in (("light", 390), ("dark", 390), ("light", 320)):
        emulate(page, width, 844, scheme, reduced_motion=True)
        for name in ("chat", "live"):
            page.evaluate(f"document.querySelector('[data-show={name}]').click()")
            wide = page.evaluate("document.documentElement.scrollWidth") - width
            shown = page.evaluate(f"getComputedStyle(document.querySelector('.{name}')).display !== 'none'")
            check(wide <= 0 and shown, f"phone, {width} wide, {scheme}, {name}: shown, and nothing is cut off sideways")
            screenshot(page, folder, f"phone-{width}-{scheme}-{name}")
        drawn = page.evaluate(
            """new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
              const chart = document.getElementById('chart');
              done(Math.abs(chart.viewBox.baseVal.width - chart.getBoundingClientRect().width) < 1);
            })))"""
        )
        check(drawn, f"phone, {width} wide, {scheme}: the chart is drawn for the room it has")
        page.evaluate("document.querySelector('[data-show=chat]').click()")
    colours = []
    for theme in ("light", "dark"):
        while theme not in page.evaluate("document.getElementById('theme-name').textContent"):
            page.evaluate("document.getElementById('theme').click()")
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    check(colours[0] != colours[1], "the theme button overrides the system")


def check_subpath(browser, url):
    with subpath_proxy.SubpathProxy(url) as proxy:
        page = browser.page()
        page.open(proxy.url)
        give_key(page, KEY)
        wait_live(page)
        say(page, "Say hi.")
        page.wait("document.querySelector('.message.assistant[data-done]')", 120)
        check(page.evaluate("document.querySelectorAll('.failure').length") == 0, "behind a proxy, under a path of its own, it chats")
        page.evaluate("document.getElementById('burst').click()")
        page.wait("document.getElementById('facts').querySelector('dd').textContent !== '0'", 120)
        page.evaluate("document.getElementById('burst').click()")
        check(True, "and sends a burst")
        outside = [name for name in page.urls.values() if not name.startswith((proxy.url, "data:"))]
        check(outside == [], f"and asks for nothing outside that path {outside or ''}")


def check_no_adapter(browser, program, folder):
    """A model without an adapter has one level: the page offers nothing else."""
    small_model.write(folder / "model")
    with server.Server(["--model", folder / "model"], folder / "small.log", program=program) as running:
        page = browser.page()
        page.open(running.url)
        wait_live(page)
        page.wait("document.getElementById('ladder-note').textContent.includes('no adapter')")
        shown = page.evaluate("['tiers', 'tier-hint', 'burst-row', 'send'].filter(id => !document.getElementById(id).hidden)")
        check(shown == ["send"], f"without an adapter there is no tier to choose and no burst: {shown}")


def use_page(url, folder):
    with devtools.Browser() as browser:
        page = browser.page()
        emulate(page, 1440, 900, "light")
        page.open(f"{url}/")
        check_key(page)
        check_load(page, url)
        check_markdown(page)
        check_chat(page)
        check_levels(page, url)
        screenshot(page, folder, "desktop-light")
        emulate(page, 1440, 900, "dark")
        screenshot(page, folder, "desktop-dark")
        check_stop(page)
        check_access(page)
        check_turns(page)
        check_lost(page)
        check_options(page)
        check_phone(page, folder)
        check_subpath(browser, url)
        page.evaluate("1")  # takes in what is still under way
        check(page.errors == [], f"no errors in the console {page.errors or ''}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=pathlib.Path, default=server.PROGRAM)
    parser.add_argument("--url", help="a server that runs already, with the keys of this file")
    parser.add_argument("--screenshots", type=pathlib.Path, help="folder for pictures of the page")
    args = parser.parse_args()
    if not devtools.find_chromium():
        print("web_check: skipped: no Chromium is installed (Debian's package chromium, or DSLA_CHROMIUM=PROGRAM)")
        return SKIPPED
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    if args.url:
        use_page(args.url, args.screenshots)
    else:
        with tempfile.TemporaryDirectory() as folder:
            # At level 0 until a test sets another, whatever this machine is busy with.
            arguments = ["--api-key", KEY, "--admin-key", ADMIN_KEY, "--memory", "256M", "--policy", "fixed"]
            with server.Server(arguments, pathlib.Path(folder) / "serve.log", program=args.program) as running:
                use_page(running.url, args.screenshots)
            with devtools.Browser() as browser:
                check_no_adapter(browser, args.program, pathlib.Path(folder))
    print(f"web_check: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
