// Bad inputs of the transport: each gets the stated answer, and the connection an end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "base/clock.h"
#include "server/http/dispatch.h"
#include "server/http/testing/raw_client.h"
#include "server/http/testing/test_server.h"

namespace dsla {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Field;
using testing::Get;
using ::testing::HasSubstr;
using testing::PostJson;
using testing::RawClient;
using testing::RawResponse;
using testing::TestServer;

std::string Code(const RawResponse& response) {
  const auto body = nlohmann::json::parse(response.body, nullptr, /*allow_exceptions=*/false);
  if (!body.is_object() || !body.contains("error")) return "no error: " + response.body;
  const auto& error = body["error"];
  for (const char* field : {"message", "type", "param", "code"}) {
    if (!error.contains(field)) return std::string("no field ") + field;
  }
  return error["code"].is_string() ? error["code"].get<std::string>() : "null";
}

void ExpectRefused(const RawResponse& response, int status, const std::string& code) {
  EXPECT_EQ(response.status, status) << response.body;
  EXPECT_TRUE(response.complete);
  EXPECT_EQ(Code(response), code);
  EXPECT_EQ(response.headers.Get("Content-Type"), "application/json");
}

HttpServerOptions SmallLimits() {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.limits.body_bytes = 1000;
  return options;
}

TEST(LimitsTest, BodyOverTheLimitByItsLength) {
  TestServer server(SmallLimits());
  RawClient client(server.port());
  const RawResponse response = client.Call(
      "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      "Content-Length: 1001\r\n\r\n");
  ExpectRefused(response, 413, "request_too_large");
  EXPECT_EQ(response.headers.Get("Connection"), "close");
  EXPECT_TRUE(client.ClosedWithin(10));

  RawClient fits(server.port());
  EXPECT_EQ(fits.Call(PostJson("/echo", std::string(1000, ' '))).status, 200);
}

TEST(LimitsTest, BodyOverTheLimitByChunks) {
  TestServer server(SmallLimits());
  RawClient client(server.port());
  client.Send(
      "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n");
  const std::string chunk = "100\r\n" + std::string(256, 'x') + "\r\n";
  // The server answers at the fourth chunk and closes some time after, whatever still comes.
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(client.Send(chunk));
  ExpectRefused(client.Read(), 413, "request_too_large");
  EXPECT_TRUE(client.ClosedWithin(10));
}

// However many connections there are, what they hold of bodies has one bound.
TEST(LimitsTest, BodiesOfAllConnectionsTogether) {
  HttpServerOptions options = SmallLimits();
  options.max_body_total = 1500;
  TestServer server(options);
  const auto wait_for = [&](int64_t bytes) {
    const double deadline = NowSeconds() + 30;
    while (server.server().body_bytes() != bytes && NowSeconds() < deadline)
      std::this_thread::yield();
    EXPECT_EQ(server.server().body_bytes(), bytes);
  };
  const std::string full = PostJson("/echo", std::string(1000, ' '));
  RawClient slow(server.port());
  slow.Send(full.substr(0, full.size() - 100));
  wait_for(900);
  RawClient other(server.port());
  const RawResponse refused = other.Call(full);
  ExpectRefused(refused, 503, "too_many_request_bytes");
  EXPECT_EQ(refused.headers.Get("Retry-After"), "1");
  EXPECT_TRUE(other.ClosedWithin(10));
  wait_for(900);
  RawClient small(server.port());
  EXPECT_EQ(small.Call(PostJson("/echo", std::string(500, ' '))).status, 200);
  EXPECT_EQ(slow.Call(full.substr(full.size() - 100)).status, 200);
  wait_for(0);

  // A body is counted as long as its request is held, however long the answer takes.
  RawClient waiting(server.port());
  waiting.Send(PostJson("/hold", std::string(1000, ' ')));
  TestServer::Held held = server.TakeHeld();
  wait_for(1000);
  EXPECT_EQ(held.request->body.size(), 1000u);
  held.request.reset();
  wait_for(0);
  EXPECT_EQ(RawClient(server.port()).Call(full).status, 200);
  held.responder->Respond(TextResponse(200, "done"));
  EXPECT_EQ(waiting.Read().status, 200);
  EXPECT_THAT(server.WaitFinished(5), Contains(AllOf(Field(&AccessRecord::route, "/hold"),
                                                     Field(&AccessRecord::body_bytes, 1000))));
  RawClient gone(server.port());  // and no longer when its client leaves in the middle
  gone.Send(full.substr(0, full.size() - 1));
  wait_for(999);
  gone.Reset();
  wait_for(0);
  EXPECT_EQ(waiting.Call(full).status, 200);
}

TEST(LimitsTest, OneChunkThatClaimsTooMuch) {
  TestServer server(SmallLimits());
  for (const char* size : {"fffffffffffffff", "7fffffffffffffff"}) {
    RawClient client(server.port());
    ExpectRefused(
        client.Call("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    "Transfer-Encoding: chunked\r\n\r\n" +
                    std::string(size) + "\r\n"),
        413, "request_too_large");
  }
}

TEST(LimitsTest, HeadersTooLarge) {
  TestServer server;
  RawClient client(server.port());
  ExpectRefused(client.Call(Get("/open", "X-Long: " + std::string(17 << 10, 'a') + "\r\n")), 431,
                "headers_too_large");
  EXPECT_TRUE(client.ClosedWithin(10));

  RawClient many(server.port());
  std::string headers;
  for (int i = 0; i < 3000; ++i) headers += "X: y\r\n";
  // Without its end, as a flood would come.
  ExpectRefused(many.Call("GET /open HTTP/1.1\r\n" + headers), 431, "headers_too_large");

  RawClient fits(server.port());
  EXPECT_EQ(fits.Call(Get("/open", "X-Long: " + std::string(15 << 10, 'a') + "\r\n")).status, 200);
}

TEST(LimitsTest, UriTooLong) {
  TestServer server;
  RawClient client(server.port());
  ExpectRefused(client.Call(Get("/" + std::string(9 << 10, 'a'))), 414, "uri_too_long");
  EXPECT_TRUE(client.ClosedWithin(10));

  RawClient endless(server.port());
  ExpectRefused(endless.Call("GET /" + std::string(12 << 10, 'a')), 414, "uri_too_long");

  RawClient fits(server.port());
  EXPECT_EQ(fits.Call(Get("/open?" + std::string(8000, 'a'))).status, 200);
}

class MalformedTest : public ::testing::TestWithParam<std::string> {};

TEST_P(MalformedTest, IsRefusedAndClosed) {
  TestServer server;
  RawClient client(server.port());
  ExpectRefused(client.Call(GetParam()), 400, "malformed_request");
  EXPECT_TRUE(client.ClosedWithin(10));
  EXPECT_EQ(server.WaitFinished(1)[0].status, 400);
}

constexpr const char* kPost =
    "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";

INSTANTIATE_TEST_SUITE_P(
    All, MalformedTest,
    ::testing::Values(
        // Two lengths of one body.
        kPost + std::string(
                    "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        kPost + std::string(
                    "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        kPost + std::string("Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
        kPost + std::string("Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
        kPost + std::string("Content-Length: 2, 2\r\n\r\n{}"),
        kPost + std::string("Content-Length: -1\r\n\r\n"),
        kPost + std::string("Content-Length: +2\r\n\r\n{}"),
        kPost + std::string("Content-Length: 99999999999999999999999\r\n\r\n"),
        kPost + std::string("Transfer-Encoding: gzip, chunked\r\n\r\n"),
        kPost + std::string("Transfer-Encoding: identity\r\n\r\n"),
        // Chunk sizes.
        kPost + std::string("Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n"),
        kPost + std::string("Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
        kPost + std::string("Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n"),
        kPost + std::string("Transfer-Encoding: chunked\r\n\r\n1\r\n{}}\r\n"),
        // Versions and lines.
        "GET /open HTTP/1.2\r\nHost: localhost\r\n\r\n",
        "GET /open HTTP/2.0\r\nHost: localhost\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "GET /open HTTP/9.9\r\nHost: localhost\r\n\r\n", "GET /open\r\nHost: localhost\r\n\r\n",
        "GET  /open HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET /open HTTP/1.1\nHost: localhost\n\n",
        "GET /open HTTP/1.1\r\nHost: localhost\n\r\n",
        "GET /open HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",  // folded
        "GET /open HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: localhost\r\n: a\r\n\r\n",
        std::string("GET /open HTTP/1.1\r\nHost: localhost\r\nX: ") + '\0' + "\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: localhost\r\nHost: u\r\n\r\n", "GET /open HTTP/1.1\r\n\r\n",
        "GET /%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /a%00b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET open HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "CONNECT a:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "\x16\x03\x01\x02\r\n\r\n"));  // TLS to a plain port

// From the first byte on, so that a client that is late to send any has its time.
HttpServerOptions ShortReads() {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.read_timeout = 0.3;
  options.idle_timeout = 60;
  return options;
}

TEST(TimeLimitsTest, SlowHeadGets408) {
  TestServer server(ShortReads());
  RawClient client(server.port());
  client.Send("GET /open HTTP/1.1\r\nHost:");
  ExpectRefused(client.Read(), 408, "request_timeout");
  EXPECT_TRUE(client.ClosedWithin(10));
}

TEST(TimeLimitsTest, SlowBodyGets408) {
  TestServer server(ShortReads());
  RawClient client(server.port());
  client.Send(std::string(kPost) + "Content-Length: 10\r\n\r\n{");
  ExpectRefused(client.Read(), 408, "request_timeout");
  EXPECT_TRUE(client.ClosedWithin(10));
}

TEST(TimeLimitsTest, SilentAndIdleConnectionsAreClosed) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.read_timeout = 60;
  options.idle_timeout = 1;
  TestServer server(options);
  RawClient idle(server.port());
  EXPECT_EQ(idle.Call(Get("/open")).status, 200);
  RawClient silent(server.port());
  EXPECT_TRUE(silent.ClosedWithin(30));
  EXPECT_TRUE(idle.ClosedWithin(30));
}

TEST(TimeLimitsTest, SlowClientsDoNotHoldUpOthers) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.read_timeout = 600;  // long after the client that is not slow has given up
  TestServer server(options);
  std::vector<std::unique_ptr<RawClient>> slow;
  for (int i = 0; i < 100; ++i) {
    slow.push_back(std::make_unique<RawClient>(server.port()));
    slow.back()->Send("GET /open HT");
  }
  EXPECT_EQ(RawClient(server.port()).Call(Get("/open")).status, 200);
}

TEST(LimitsTest, MediaTypes) {
  TestServer server;
  const auto post = [&](const std::string& headers) {
    RawClient client(server.port());
    return client.Call("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n" + headers +
                       "\r\n{}");
  };
  ExpectRefused(post("Content-Type: text/plain\r\n"), 415, "unsupported_media_type");
  ExpectRefused(post(""), 415, "unsupported_media_type");
  ExpectRefused(post("Content-Type: application/x-www-form-urlencoded\r\n"), 415,
                "unsupported_media_type");
  ExpectRefused(post("Content-Type: application/json\r\nContent-Encoding: gzip\r\n"), 415,
                "unsupported_media_type");
  EXPECT_EQ(post("content-type: Application/JSON; charset=utf-8\r\n").status, 200);
  EXPECT_EQ(post("Content-Type: application/json\r\nContent-Encoding: identity\r\n").status, 200);
}

TEST(LimitsTest, ExpectContinue) {
  TestServer server(SmallLimits());
  RawClient client(server.port());
  client.Send(std::string(kPost) + "Content-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.Read().status, 100);
  client.Send("{}");
  const RawResponse response = client.Read();
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.body, "{}");

  // The refusal comes instead of the 100, before any of the body.
  RawClient large(server.port());
  ExpectRefused(
      large.Call(std::string(kPost) + "Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n"), 413,
      "request_too_large");
  RawClient other(server.port());
  ExpectRefused(other.Call(std::string(kPost) + "Content-Length: 2\r\nExpect: a-pony\r\n\r\n"), 417,
                "expectation_failed");
}

// A page whose own name was made to resolve to this machine is not this machine's.
TEST(LimitsTest, HostOfAnotherSite) {
  const auto get = [](const TestServer& server, const std::string& host, const char* more = "") {
    return RawClient(server.port())
        .Call("GET /open HTTP/1.1\r\nHost: " + host + "\r\n" + more + "\r\n");
  };
  TestServer server;
  for (const char* host : {"evil.example", "evil.example:8080", "localhost.evil.example",
                           "127.0.0.1.evil.example:80", "[evil.example]"})
    ExpectRefused(get(server, host), 403, "host_not_allowed");
  for (const char* host :
       {"localhost", "LocalHost:8080", "127.0.0.1:1", "192.168.1.2", "[::1]:80", ""})
    EXPECT_EQ(get(server, host).status, 200) << host;
  EXPECT_EQ(RawClient(server.port()).Call("GET /open HTTP/1.0\r\n\r\n").status, 200);

  const auto keys = KeyRing::Create({"key"}, {});
  TestServer with_keys(TestServer::DefaultOptions(), *keys);
  EXPECT_EQ(get(with_keys, "box.example", "Authorization: Bearer key\r\n").status, 200);
  HttpServerOptions options = TestServer::DefaultOptions();
  options.host = "0.0.0.0";
  TestServer reached_from_elsewhere(options);
  EXPECT_EQ(get(reached_from_elsewhere, "box.example").status, 200);
}

TEST(LimitsTest, UnknownPathsSayWhatIsNear) {
  auto router = std::make_shared<Router>();
  const auto answer = [](auto, const std::shared_ptr<Responder>& responder) {
    responder->Respond(JsonResponse(200, "{}"));
  };
  router->Add("POST", "/v1/completions", answer);
  router->Add("GET", "/v1/models/{id}", answer);
  Dispatcher dispatcher(router, KeyRing(), {});
  dispatcher.SetPhase(Phase::kServing);
  const auto message = [&](const char* method, const char* path) {
    HttpRequest head;
    head.method = method;
    head.path = path;
    head.headers.Add("Content-Type", "application/json");
    const Dispatched dispatched = dispatcher.Dispatch(head, false, false);
    return dispatched.refusal ? dispatched.refusal->body : "served";
  };
  for (const char* path :
       {"/completions", "/v1/v1/completions", "//v1/completions", "//completions"})
    EXPECT_THAT(message("POST", path), HasSubstr("; there is /v1/completions\"")) << path;
  EXPECT_THAT(message("GET", "/completions"), HasSubstr("there is no GET /completions\""));
  EXPECT_THAT(message("POST", "/completion"), HasSubstr("there is no POST /completion\""));
  EXPECT_THAT(message("POST", "/"), HasSubstr("there is no POST /\""));
  EXPECT_EQ(message("POST", "/v1/completions"), "served");
}

TEST(LimitsTest, UnknownPathAndWrongMethod) {
  TestServer server;
  RawClient client(server.port());
  ExpectRefused(client.Call(Get("/nothing")), 404, "unknown_path");
  const RawResponse wrong = client.Call(Get("/echo"));
  ExpectRefused(wrong, 405, "method_not_allowed");
  EXPECT_EQ(wrong.headers.Get("Allow"), "POST, OPTIONS");
  const RawResponse deleted = client.Call("DELETE /open HTTP/1.1\r\nHost: localhost\r\n\r\n");
  ExpectRefused(deleted, 405, "method_not_allowed");
  EXPECT_EQ(deleted.headers.Get("Allow"), "GET, HEAD, OPTIONS");
  EXPECT_EQ(client.Call(Get("/open")).status, 200);  // the connection lives on
}

}  // namespace
}  // namespace dsla
