"""A reverse proxy that puts a server under a path, as nginx does with `location /llm/ { proxy_pass http://server/; }`."""

import http.client
import http.server
import threading
import urllib.parse

PATH = "/llm/"
OWN_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}  # of one connection


class Handler(http.server.BaseHTTPRequestHandler):
    def forward(self):
        if not self.path.startswith(PATH):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=120)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OWN_HEADERS}
        upstream.request(self.command, "/" + self.path.removeprefix(PATH), body or None, headers)
        reply = upstream.getresponse()
        self.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in OWN_HEADERS:
                self.send_header(name, value)
        self.end_headers()
        try:
            while data := reply.read1():
                self.wfile.write(data)
        except OSError:
            pass  # the visitor left
        upstream.close()

    do_GET = do_POST = forward

    def log_message(self, *_):
        pass


class SubpathProxy:
    """`url`: where the server at `upstream` (a URL) is found, with the path."""

    def __init__(self, upstream):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.upstream = urllib.parse.urlsplit(upstream).netloc
        self.url = f"http://127.0.0.1:{self.server.server_port}{PATH}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
