// What a well-behaved client relies on, and how the server behaves when one leaves or stalls.
#include "server/http/server.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <thread>

#include "base/clock.h"
#include "server/http/testing/raw_client.h"
#include "server/http/testing/test_server.h"

namespace dsla {
namespace {

using testing::Get;
using ::testing::HasSubstr;
using testing::PostJson;
using testing::RawClient;
using testing::RawResponse;
using ::testing::StartsWith;
using testing::TestServer;

TEST(HttpServerTest, KeepAliveAndPipelining) {
  TestServer server;
  RawClient client(server.port());
  EXPECT_EQ(client.Call(Get("/open")).body, "open");
  client.Send(PostJson("/echo", "1") + Get("/items/a%20b") + PostJson("/echo", "[2]") +
              Get("/items/org/name/"));
  EXPECT_EQ(client.Read().body, "1");
  EXPECT_EQ(client.Read().body, "a b");
  EXPECT_EQ(client.Read().body, "[2]");
  EXPECT_EQ(client.Read().body, "org/name");
  EXPECT_EQ(server.server().connections(), 1);
}

TEST(HttpServerTest, PipelinedAnswersKeepTheirOrder) {
  TestServer server;
  RawClient client(server.port());
  client.Send(PostJson("/hold", "1") + Get("/open"));
  TestServer::Held held = server.TakeHeld();
  held.responder->Respond(TextResponse(200, "held"));
  EXPECT_EQ(client.Read().body, "held");
  EXPECT_EQ(client.Read().body, "open");
}

TEST(HttpServerTest, BytesOneByOne) {
  TestServer server;
  RawClient client(server.port());
  for (const char c : "\r\n" + PostJson("/echo", "{\"a\":1}")) client.Send(std::string_view(&c, 1));
  EXPECT_EQ(client.Read().body, "{\"a\":1}");
}

TEST(HttpServerTest, ChunkedBody) {
  TestServer server;
  RawClient client(server.port());
  const RawResponse response = client.Call(
      "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\n[1,\r\n2\r\n2]\r\n0\r\nTrailer: v\r\n\r\n");
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.body, "[1,2]");
}

TEST(HttpServerTest, HeadOptionsAndHttp10) {
  TestServer server;
  RawClient client(server.port());
  client.Send("HEAD /open HTTP/1.1\r\nHost: localhost\r\n\r\n");
  const RawResponse head = client.Read(20, /*head=*/true);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.Get("Content-Length"), "4");
  const RawResponse options = client.Call("OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(options.status, 204);
  EXPECT_EQ(options.headers.Get("Allow"), "POST, OPTIONS");
  EXPECT_EQ(options.headers.Find("Access-Control-Allow-Origin"), nullptr);

  RawClient old(server.port());
  const RawResponse response = old.Call("GET /open HTTP/1.0\r\n\r\n");
  EXPECT_EQ(response.body, "open");
  EXPECT_TRUE(old.ClosedWithin(10));
}

TEST(HttpServerTest, CrossOriginIsOffUnlessAsked) {
  const std::string origin = "Origin: https://a.example\r\n";
  {
    TestServer server;
    RawClient client(server.port());
    EXPECT_EQ(client.Call(Get("/open", origin)).headers.Find("Access-Control-Allow-Origin"),
              nullptr);
  }
  HttpServerOptions options = TestServer::DefaultOptions();
  options.cors_origins = {"https://a.example"};
  TestServer server(options);
  RawClient client(server.port());
  EXPECT_EQ(client.Call(Get("/open", origin)).headers.Get("Access-Control-Allow-Origin"),
            "https://a.example");
  EXPECT_EQ(client.Call(Get("/open", "Origin: https://b.example\r\n"))
                .headers.Find("Access-Control-Allow-Origin"),
            nullptr);
  const RawResponse preflight = client.Call(
      "OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n" +
      origin + "\r\n");
  EXPECT_EQ(preflight.status, 204);
  EXPECT_THAT(std::string(preflight.headers.Get("Access-Control-Allow-Methods")),
              HasSubstr("POST"));
  const auto allowed = [&](const std::string& asked) {
    const RawResponse response = client.Call(
        "OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n" +
        origin + asked + "\r\n");
    EXPECT_EQ(response.headers.Count("Vary"), 2u);  // by Origin and by what was asked for
    return std::string(response.headers.Get("Access-Control-Allow-Headers"));
  };
  const std::string usual = "Authorization, Content-Type, X-Request-Id, X-Request-Timeout";
  const std::string ask = "Access-Control-Request-Headers: ";
  EXPECT_EQ(allowed(""), usual);
  EXPECT_EQ(allowed(ask + "authorization,content-type,x-stainless-os\r\n"),
            "authorization,content-type,x-stainless-os");
  EXPECT_EQ(allowed(ask + "x-a; <b>\r\n"), usual);
  EXPECT_THAT(
      std::string(client.Call(Get("/open", origin)).headers.Get("Access-Control-Expose-Headers")),
      HasSubstr("X-Dsla-Level"));
}

TEST(HttpServerTest, RequestIds) {
  TestServer server;
  RawClient client(server.port());
  EXPECT_EQ(client.Call(Get("/open", "x-request-id: abc-1\r\n")).headers.Get("X-Request-Id"),
            "abc-1");
  const RawResponse made = client.Call(Get("/open"));
  EXPECT_THAT(std::string(made.headers.Get("X-Request-Id")), StartsWith("req-"));
  const RawResponse bad = client.Call(Get("/open", "X-Request-Id: a\tb\r\n"));
  EXPECT_THAT(std::string(bad.headers.Get("X-Request-Id")), StartsWith("req-"));
  EXPECT_NE(bad.headers.Get("X-Request-Id"), made.headers.Get("X-Request-Id"));
  EXPECT_EQ(server.WaitFinished(3)[0].request->request_id, "abc-1");
}

TEST(HttpServerTest, Keys) {
  auto keys = KeyRing::Create({"user-key", "other"}, {"admin-key"});
  ASSERT_TRUE(keys.ok());
  TestServer server(TestServer::DefaultOptions(), *keys);
  const auto status = [&](const std::string& method_path, const std::string& authorization) {
    RawClient client(server.port());
    return client
        .Call(method_path + " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" +
              (authorization.empty() ? "" : "Authorization: " + authorization + "\r\n") + "\r\n")
        .status;
  };
  EXPECT_EQ(status("GET /open", ""), 200);
  EXPECT_EQ(status("GET /items/a", ""), 401);
  EXPECT_EQ(status("GET /items/a", "Bearer user-key"), 200);
  EXPECT_EQ(status("GET /items/a", "bEaReR other"), 200);
  EXPECT_EQ(status("GET /items/a", "Bearer admin-key"), 200);
  EXPECT_EQ(status("GET /items/a", "Bearer user-ke"), 401);
  EXPECT_EQ(status("GET /items/a", "Bearer user-key2"), 401);
  EXPECT_EQ(status("GET /items/a", "Bearer"), 401);
  EXPECT_EQ(status("GET /items/a", "Basic user-key"), 401);
  EXPECT_EQ(status("GET /items/a", "user-key"), 401);
  EXPECT_EQ(status("GET /items/a", "Bearer " + std::string(12000, 'k')), 401);
  EXPECT_EQ(status("GET /items/a", "Bearer " + std::string(1 << 20, 'k')), 431);
  EXPECT_EQ(status("POST /admin", ""), 401);
  EXPECT_EQ(status("POST /admin", "Bearer user-key"), 403);
  EXPECT_EQ(status("POST /admin", "Bearer admin-key"), 200);

  RawClient client(server.port());
  const RawResponse refused = client.Call(Get("/items/a"));
  EXPECT_EQ(refused.headers.Get("WWW-Authenticate"), "Bearer");
  EXPECT_THAT(refused.body, HasSubstr("invalid_api_key"));
  EXPECT_THAT(refused.body, HasSubstr("authentication_error"));
}

TEST(HttpServerTest, AdminRoutesAreShutWithoutAnAdminKey) {
  TestServer server;
  RawClient client(server.port());
  EXPECT_EQ(client.Call(PostJson("/admin", "{}")).status, 403);
}

TEST(HttpServerTest, HandlerThatThrowsOrForgets) {
  TestServer server;
  RawClient client(server.port());
  const RawResponse thrown = client.Call(PostJson("/throw", "{}"));
  EXPECT_EQ(thrown.status, 500);
  EXPECT_EQ(thrown.headers.Get("x-should-retry"), "false");
  EXPECT_THAT(thrown.body, ::testing::Not(HasSubstr("as asked")));
  EXPECT_THAT(server.WaitTrouble(), HasSubstr("as asked"));
  client.Send(PostJson("/hold", "{}"));
  server.TakeHeld();  // and dropped
  EXPECT_EQ(client.Read().status, 500);
  EXPECT_EQ(client.Call(Get("/open")).status, 200);
}

TEST(HttpServerTest, MemoryThatRunsOutCostsOneConnection) {
  TestServer server;
  server.FailAtFinish();
  RawClient client(server.port());
  EXPECT_EQ(client.Call(Get("/open")).status, 200);
  EXPECT_TRUE(client.ClosedWithin(10));
  EXPECT_THAT(server.WaitTrouble(), HasSubstr("bad_alloc"));
  EXPECT_TRUE(server.server().WaitIdle(10));
  server.FailAtConnection();
  RawClient never_read(server.port());
  RawClient other(server.port());
  EXPECT_EQ(other.Call(Get("/open")).status, 200);
}

TEST(HttpServerTest, DisconnectCallbackThatThrows) {
  TestServer server;
  RawClient client(server.port());
  client.Send(PostJson("/hold", "{}"));
  const TestServer::Held held = server.TakeHeld();
  held.responder->OnDisconnect([] { throw std::bad_alloc(); });
  client.Reset();
  EXPECT_THAT(server.WaitTrouble(), HasSubstr("bad_alloc"));
  EXPECT_EQ(server.WaitFinished(1)[0].status, 499);
  EXPECT_TRUE(server.server().WaitIdle(10));
  EXPECT_EQ(RawClient(server.port()).Call(Get("/open")).status, 200);
}

TEST(HttpServerTest, StreamsEventByEvent) {
  TestServer server;
  RawClient client(server.port());
  client.Send(PostJson("/hold", "{}"));
  TestServer::Held held = server.TakeHeld();
  ASSERT_TRUE(held.responder->StartStream(SseHead()));
  // Each event arrives before the next is written.
  std::string seen;
  for (int i = 0; i < 3; ++i) {
    const std::string event = SseEvent(std::to_string(i));
    ASSERT_TRUE(held.responder->Write(event));
    while (seen.find(event) == std::string::npos) {
      const std::string more = client.ReadSome();
      ASSERT_FALSE(more.empty());
      seen += more;
    }
  }
  EXPECT_THAT(seen, HasSubstr("X-Accel-Buffering: no\r\n"));
  EXPECT_THAT(seen, HasSubstr("Cache-Control: no-cache\r\n"));
  EXPECT_THAT(seen, HasSubstr("Transfer-Encoding: chunked\r\n"));
  held.responder->End();
  EXPECT_FALSE(held.responder->Write("late"));
  EXPECT_EQ(client.ReadSome(), "0\r\n\r\n");
  EXPECT_EQ(client.Call(Get("/open")).status, 200);
}

// Whether the handler expects a stream before it returns or another thread does later.
TEST(HttpServerTest, StreamsThatStandStillGetComments) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.comment_seconds = 0.05;
  TestServer server(options);
  const std::string comment(kSseComment);
  for (const bool later : {false, true}) {
    RawClient client(server.port());
    client.Send(PostJson(later ? "/hold" : "/stream", "{}"));
    TestServer::Held held = server.TakeHeld();
    if (later) held.responder->ExpectStream(SseHead());
    std::string seen;
    const auto see = [&](const std::string& text) {
      while (seen.find(text) == std::string::npos) {
        const std::string more = client.ReadSome();
        ASSERT_FALSE(more.empty()) << seen;
        seen += more;
      }
      seen.erase(0, seen.find(text) + text.size());
    };
    see("HTTP/1.1 200 OK\r\n");
    see("text/event-stream");
    see(comment);
    see(comment);
    EXPECT_FALSE(held.responder->Respond(TextResponse(500, "too late")));
    HttpResponse head = SseHead();
    head.body = SseEvent("1");
    EXPECT_TRUE(held.responder->StartStream(head));
    EXPECT_FALSE(held.responder->StartStream(head));
    see(SseEvent("1"));
    see(comment);  // also in the middle
    EXPECT_TRUE(held.responder->Write(SseEvent("2")));
    held.responder->End();
    see(SseEvent("2"));
    see("\r\n0\r\n\r\n");
    EXPECT_EQ(seen, "");
  }

  // Before the first comment, a failure has its own status.
  TestServer patient;
  RawClient other(patient.port());
  other.Send(PostJson("/stream", "{}"));
  patient.TakeHeld().responder->Respond(TextResponse(504, "late"));
  EXPECT_EQ(other.Read().status, 504);
}

// Queued or streaming, by an end or a reset: the callback comes before any time has passed, others
// go on.
TEST(HttpServerTest, DisconnectIsSeenWhileTheAnswerIsMade) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.read_timeout = options.idle_timeout = options.write_timeout = 600;
  TestServer server(options);
  for (const bool stream : {false, true}) {
    for (const bool reset : {false, true}) {
      RawClient client(server.port());
      client.Send(PostJson("/hold", "{}"));
      TestServer::Held held = server.TakeHeld();
      std::promise<void> left;
      held.responder->OnDisconnect([&left] { left.set_value(); });
      if (stream) {
        held.responder->StartStream(SseHead());
        held.responder->Write(SseEvent("x"));
        EXPECT_EQ(client.ReadSome().substr(0, 12), "HTTP/1.1 200");
      }
      EXPECT_FALSE(held.responder->gone());
      if (reset) {
        client.Reset();
      } else {
        client.Close();
      }
      ASSERT_EQ(left.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
      EXPECT_TRUE(held.responder->gone());
      EXPECT_FALSE(held.responder->Respond(TextResponse(200, "late")));
      EXPECT_FALSE(held.responder->Write("late"));
    }
  }
  for (const AccessRecord& record : server.WaitFinished(4)) EXPECT_EQ(record.status, 499);
  RawClient other(server.port());
  EXPECT_EQ(other.Call(Get("/open")).status, 200);
}

// However much it has sent behind its request, no client keeps its answer running by leaving.
TEST(HttpServerTest, ClientTooFarAheadIsClosed) {
  TestServer server;
  RawClient client(server.port());
  client.Send(PostJson("/hold", "{}"));
  TestServer::Held held = server.TakeHeld();
  std::promise<void> left;
  held.responder->OnDisconnect([&left] { left.set_value(); });
  client.Send(std::string(1 << 20, 'x'));
  client.Close();
  ASSERT_EQ(left.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
  EXPECT_EQ(server.WaitFinished(1)[0].status, 499);
}

TEST(HttpServerTest, DisconnectCallbackRunsEvenWhenSetTooLate) {
  TestServer server;
  TestServer::Held held;
  {
    RawClient client(server.port());
    client.Send(PostJson("/hold", "{}"));
    held = server.TakeHeld();
  }
  server.WaitFinished(1);
  bool ran = false;
  held.responder->OnDisconnect([&] { ran = true; });
  EXPECT_TRUE(ran);
}

TEST(HttpServerTest, HalfClosedClientStillGetsAReadyAnswer) {
  TestServer server;
  RawClient client(server.port());
  client.Send(Get("/open"));
  client.ShutdownSend();
  EXPECT_EQ(client.Read().body, "open");
  EXPECT_TRUE(client.ClosedWithin(10));
}

// Whenever the end is seen: what can be answered at once is, what takes time is given up.
TEST(HttpServerTest, HalfClosedClientGetsTheAnswersToWhatItSentAhead) {
  TestServer server;
  for (int i = 0; i < 20; ++i) {
    RawClient client(server.port());
    client.Send(Get("/open") + PostJson("/echo", "[1]") + Get("/items/a") + PostJson("/hold", "1") +
                Get("/open"));
    client.ShutdownSend();
    EXPECT_EQ(client.Read().body, "open");
    EXPECT_EQ(client.Read().body, "[1]");
    EXPECT_EQ(client.Read().body, "a");
    EXPECT_EQ(client.Read().status, 0);
    EXPECT_TRUE(client.ClosedWithin(10));
    const TestServer::Held held = server.TakeHeld();
    held.responder->OnDisconnect([] {});
    EXPECT_TRUE(held.responder->gone());
    RawClient cut(server.port());
    cut.Send(Get("/open") + "GET /op");
    cut.ShutdownSend();
    EXPECT_EQ(cut.Read().body, "open");
    EXPECT_TRUE(cut.ClosedWithin(10));
  }
}

TEST(HttpServerTest, SlowReaderIsDroppedAndNeverBlocksTheWriter) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.stream_buffer = 64 << 10;
  options.socket_buffer = 16 << 10;
  TestServer server(options);
  RawClient client(server.port(), /*receive_buffer=*/4096);
  client.Send(PostJson("/hold", "{}"));
  TestServer::Held held = server.TakeHeld();
  std::promise<void> left;
  held.responder->OnDisconnect([&left] { left.set_value(); });
  held.responder->StartStream(SseHead());
  const std::string event = SseEvent(std::string(1000, 'x'));
  int64_t written = 0;
  while (held.responder->Write(event)) {
    written += static_cast<int64_t>(event.size());
    ASSERT_LT(written, 64 << 20) << "the buffer is not bounded";
  }
  ASSERT_EQ(left.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
  const std::vector<AccessRecord> records = server.WaitFinished(1);
  EXPECT_EQ(records[0].status, 499);
  ASSERT_EQ(records[0].notes.size(), 1u);
  EXPECT_EQ(records[0].notes[0].second, "slow_reader");
}

TEST(HttpServerTest, StalledWriteEndsByTime) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.write_timeout = 0.3;
  options.socket_buffer = 16 << 10;
  TestServer server(options);
  RawClient client(server.port(), /*receive_buffer=*/4096);
  client.Send(PostJson("/hold", "{}"));
  server.TakeHeld().responder->Respond(TextResponse(200, std::string(16 << 20, 'x')));
  EXPECT_EQ(server.WaitFinished(1)[0].status, 499);
}

TEST(HttpServerTest, LoadingAndDraining) {
  TestServer server;
  server.server().SetPhase(Phase::kLoading);
  RawClient client(server.port());
  const RawResponse loading = client.Call(Get("/not-there-yet"));
  EXPECT_EQ(loading.status, 503);
  EXPECT_THAT(loading.body, HasSubstr("\"loading\""));
  EXPECT_THAT(loading.body, HasSubstr("server_error"));
  EXPECT_NE(loading.headers.Find("Retry-After"), nullptr);
  server.server().SetPhase(Phase::kServing);

  client.Send(PostJson("/hold", "{}"));
  TestServer::Held held = server.TakeHeld();
  server.server().SetPhase(Phase::kDraining);
  RawClient late(server.port());
  const RawResponse refused = late.Call(Get("/open"));
  EXPECT_EQ(refused.status, 503);
  EXPECT_THAT(refused.body, HasSubstr("\"shutting_down\""));
  EXPECT_NE(refused.headers.Find("Retry-After"), nullptr);
  EXPECT_EQ(refused.headers.Get("Connection"), "close");
  RawClient probe(server.port());
  EXPECT_EQ(probe.Call(Get("/again")).status, 200);
  // What was accepted is finished.
  EXPECT_FALSE(server.server().WaitIdle(0));
  held.responder->Respond(TextResponse(200, "done"));
  EXPECT_EQ(client.Read().body, "done");
  EXPECT_TRUE(server.server().WaitIdle(30));
  EXPECT_TRUE(client.ClosedWithin(10));
}

// Who is sending a body when draining begins is waited for, unless the client gives up.
TEST(HttpServerTest, DrainingWaitsForBodies) {
  TestServer server;
  const std::string request = PostJson("/echo", "[1,2]");
  RawClient client(server.port());
  RawClient leaver(server.port());
  for (RawClient* sender : {&client, &leaver}) sender->Send(request.substr(0, request.size() - 2));
  const auto wait_for = [&](int64_t bytes) {
    const double deadline = NowSeconds() + 30;
    while (server.server().body_bytes() != bytes && NowSeconds() < deadline)
      std::this_thread::yield();
    EXPECT_EQ(server.server().body_bytes(), bytes);
  };
  wait_for(6);
  EXPECT_EQ(server.server().requests(), 2);
  server.server().SetPhase(Phase::kDraining);
  EXPECT_FALSE(server.server().WaitIdle(0));
  leaver.Reset();
  wait_for(3);
  EXPECT_FALSE(server.server().WaitIdle(0));
  EXPECT_EQ(client.Call(request.substr(request.size() - 2)).body, "[1,2]");
  EXPECT_TRUE(server.server().WaitIdle(30));
}

TEST(HttpServerTest, ConnectionsAreCounted) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.max_connections = 2;
  options.idle_timeout = 600;  // nobody is gone before all have come
  TestServer server(options);
  RawClient first(server.port());
  RawClient second(server.port());
  EXPECT_EQ(first.Call(Get("/open")).status, 200);
  EXPECT_EQ(second.Call(Get("/open")).status, 200);
  {
    RawClient third(server.port());
    const RawResponse refused = third.Call(PostJson("/echo", std::string(1 << 20, ' ')));
    EXPECT_EQ(refused.status, 503);
    EXPECT_THAT(refused.body, HasSubstr("too_many_connections"));
    EXPECT_NE(refused.headers.Find("Retry-After"), nullptr);
    EXPECT_TRUE(third.ClosedWithin(10));
    RawClient probe(server.port());
    const RawResponse well = probe.Call(Get("/probe"));
    EXPECT_EQ(well.body, "well");
    EXPECT_EQ(well.headers.Get("Connection"), "close");
    EXPECT_TRUE(probe.ClosedWithin(10));
  }
  const auto wait_for = [&](int connections) {
    const double deadline = NowSeconds() + 30;
    while (server.server().connections() != connections && NowSeconds() < deadline)
      std::this_thread::yield();
    EXPECT_EQ(server.server().connections(), connections);
  };
  wait_for(2);
  std::vector<std::unique_ptr<RawClient>> more;
  for (int i = 0; i < 64; ++i) more.push_back(std::make_unique<RawClient>(server.port()));
  wait_for(66);
  EXPECT_TRUE(RawClient(server.port()).ClosedWithin(30));
  more.clear();
  first.Close();
  wait_for(1);
  EXPECT_EQ(RawClient(server.port()).Call(Get("/open")).status, 200);
}

TEST(HttpServerTest, StopEndsWhatIsOpen) {
  std::atomic<int> left{0};
  std::vector<TestServer::Held> held;
  std::vector<std::unique_ptr<RawClient>> clients;
  {
    TestServer server;
    for (int i = 0; i < 10; ++i) {
      clients.push_back(std::make_unique<RawClient>(server.port()));
      clients.back()->Send(PostJson("/hold", "{}"));
      held.push_back(server.TakeHeld());
      held.back().responder->OnDisconnect([&left] { ++left; });
    }
  }
  EXPECT_EQ(left, 10);
  for (const auto& h : held) EXPECT_FALSE(h.responder->Respond(TextResponse(200, "late")));
}

// Answers from other threads while clients come and go.
TEST(HttpServerTest, ManyThreads) {
  TestServer server;
  constexpr int kClients = 4, kRequests = 50;
  std::atomic<int> answered{0};
  std::thread writer([&] {
    for (int i = 0; i < kClients * kRequests; ++i) {
      TestServer::Held held = server.TakeHeld();
      held.responder->OnDisconnect([] {});
      held.responder->StartStream(SseHead());
      for (int event = 0; event < 5; ++event) held.responder->Write(SseEvent("x"));
      held.responder->End();
    }
  });
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      RawClient client(server.port());
      for (int i = 0; i < kRequests; ++i) {
        // Leaves in the middle, on a connection of its own; the next requests keep the first one.
        if ((i + c) % 5 == 0) {
          RawClient(server.port()).Send(PostJson("/hold", "{}"));
          continue;
        }
        client.Send(PostJson("/hold", "{}"));
        if (client.Read(60).complete) ++answered;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  writer.join();
  EXPECT_EQ(answered, kClients * kRequests * 4 / 5);
}

TEST(HttpServerTest, AddressInUseIsNamed) {
  TestServer server;
  HttpServerOptions options = TestServer::DefaultOptions();
  options.port = server.port();
  const auto second = HttpServer::Start(options, std::make_shared<Router>(), {}, &server);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(second.status().message(), HasSubstr("127.0.0.1:" + std::to_string(server.port())));
  options.host = "no-such-host.invalid";
  const auto third = HttpServer::Start(options, std::make_shared<Router>(), {}, &server);
  ASSERT_FALSE(third.ok());
  EXPECT_THAT(third.status().message(), HasSubstr("no-such-host.invalid"));
}

// The empty name stands for all addresses, of which there are two kinds.
TEST(HttpServerTest, EveryAddressOfANameIsListenedOn) {
  HttpServerOptions options = TestServer::DefaultOptions();
  options.host = "";
  TestServer server(options);
  EXPECT_EQ(RawClient(server.port()).Call(Get("/open")).status, 200);
  const int client = socket(AF_INET6, SOCK_STREAM, 0);
  if (client < 0) GTEST_SKIP() << "no IPv6 here";
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(static_cast<uint16_t>(server.port()));
  address.sin6_addr = in6addr_loopback;
  const int connected = connect(client, reinterpret_cast<sockaddr*>(&address), sizeof(address));
  const bool no_address = connected != 0 && errno == EADDRNOTAVAIL;
  close(client);
  if (no_address) GTEST_SKIP() << "no IPv6 here";
  EXPECT_EQ(connected, 0);
}

// With no descriptor left, clients wait in the backlog and are served once there is one.
TEST(HttpServerTest, AcceptBacksOffWithoutDescriptors) {
  TestServer server;
  RawClient warm(server.port());
  EXPECT_EQ(warm.Call(Get("/open")).status, 200);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int client = socket(AF_INET, SOCK_STREAM, 0);
  const int lowest_free = dup(client);
  close(lowest_free);
  rlimit low = before;
  low.rlim_cur = static_cast<rlim_t>(lowest_free);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server.port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(client, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_THAT(server.WaitTrouble(), HasSubstr("cannot accept"));
  EXPECT_EQ(warm.Call(Get("/open")).status, 200);  // those who are in are served
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  const std::string request = Get("/open", "Connection: close\r\n");
  ASSERT_EQ(send(client, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  char reply[16] = {};
  EXPECT_GT(recv(client, reply, sizeof(reply) - 1, 0), 0);
  EXPECT_THAT(std::string(reply), StartsWith("HTTP/1.1 200"));
  close(client);
}

}  // namespace
}  // namespace dsla
