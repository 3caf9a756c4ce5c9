// Routes, keys, errors, bytes of responses: the parts that need no socket.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "server/auth.h"
#include "server/http/dispatch.h"
#include "server/http/errors.h"
#include "server/http/request_reader.h"
#include "server/http/router.h"
#include "server/http/wire.h"

namespace dsla {
namespace {

using ::testing::HasSubstr;

void AddNamed(Router& router, std::string method, std::string_view pattern) {
  router.Add(std::move(method), pattern, [](auto, auto) {});
}

TEST(RouterTest, ExactRoutesWinAndTheLastParameterTakesTheRest) {
  Router router;
  AddNamed(router, "GET", "/v1/models/{id}");
  AddNamed(router, "GET", "/v1/models/all");
  AddNamed(router, "GET", "/v1/models");
  AddNamed(router, "GET", "/");
  AddNamed(router, "GET", "/a/{x}/c");
  EXPECT_EQ(router.Find("GET", "/v1/models/all").route->pattern, "/v1/models/all");
  const auto match = router.Find("GET", "/v1/models/org/name");
  ASSERT_NE(match.route, nullptr);
  ASSERT_EQ(match.params.size(), 1u);
  EXPECT_EQ(match.params[0].second, "org/name");
  EXPECT_EQ(router.Find("GET", "/v1/models").route->pattern, "/v1/models");
  EXPECT_EQ(router.Find("GET", "/").route->pattern, "/");
  EXPECT_EQ(router.Find("GET", "/a/b/c").params[0].second, "b");
  for (const char* path : {"/v1", "/v1/model", "/v1/modelsx", "/a/b/d", "/a/b/c/d", "/x"}) {
    EXPECT_EQ(router.Find("GET", path).route, nullptr) << path;
    EXPECT_EQ(router.Find("GET", path).allow, "") << path;
  }
}

TEST(RouterTest, AllowNamesEachMethodOnce) {
  Router router;
  AddNamed(router, "GET", "/x");
  AddNamed(router, "POST", "/x");
  AddNamed(router, "GET", "/{y}");
  const auto match = router.Find("PUT", "/x");
  EXPECT_EQ(match.route, nullptr);
  EXPECT_EQ(match.allow, "GET, HEAD, POST, OPTIONS");
  EXPECT_EQ(router.Find("HEAD", "/x").route->method, "GET");
  router.SetAccess("POST", "/x", Access::kAdmin);
  EXPECT_EQ(router.Find("POST", "/x").route->options.access, Access::kAdmin);
}

TEST(KeyRingTest, KeysAndFiles) {
  EXPECT_FALSE(KeyRing::Create({""}, {}).ok());
  EXPECT_FALSE(KeyRing::Create({"a b"}, {}).ok());
  EXPECT_FALSE(KeyRing::Create({"same"}, {"same"}).ok());
  const auto long_key = KeyRing::Create({std::string(1025, 'k')}, {});
  ASSERT_FALSE(long_key.ok());
  EXPECT_THAT(long_key.status().message(), ::testing::Not(HasSubstr("kkk")));
  EXPECT_FALSE(KeyRing().needs_key());
  EXPECT_EQ(KeyRing().Check("Bearer x"), KeyRing::Grant::kInvalid);
  EXPECT_EQ(KeyRing().Check(""), KeyRing::Grant::kNone);

  const std::string path = ::testing::TempDir() + "dsla_keys";
  std::ofstream(path) << "# people\n alpha \r\n\nbeta\n";
  const auto keys = ReadKeyFile(path);
  ASSERT_TRUE(keys.ok());
  EXPECT_THAT(*keys, ::testing::ElementsAre("alpha", "beta"));
  std::ofstream(path) << "# none\n";
  EXPECT_FALSE(ReadKeyFile(path).ok());
  EXPECT_THAT(ReadKeyFile("/no/such/keys").status().message(), HasSubstr("/no/such/keys"));
}

TEST(DispatcherTest, LocalServersServeTheirOwnName) {
  auto router = std::make_shared<Router>();
  AddNamed(*router, "GET", "/x");
  Dispatcher dispatcher(router, {}, {});
  dispatcher.SetLocal("box");
  dispatcher.SetPhase(Phase::kServing);
  HttpRequest head;
  head.method = "GET";
  head.path = "/x";
  for (const auto& [host, served] : {std::pair("Box:8080", true), std::pair("box2", false)}) {
    head.headers = {{"Host", host}};
    const Dispatched dispatched = dispatcher.Dispatch(head, false, false);
    EXPECT_EQ(!dispatched.refusal.has_value(), served) << host;
  }
}

TEST(ErrorsTest, Form) {
  const auto body =
      nlohmann::json::parse(ErrorJson(ContextLengthError("prompt of 9 tokens", 9, 8)));
  EXPECT_EQ(body["error"]["message"], "prompt of 9 tokens");
  EXPECT_EQ(body["error"]["type"], "invalid_request_error");
  EXPECT_TRUE(body["error"]["param"].is_null());
  EXPECT_EQ(body["error"]["code"], "context_length_exceeded");
  EXPECT_EQ(body["error"]["n_prompt_tokens"], 9);
  EXPECT_EQ(body["error"]["n_ctx"], 8);
  // Bytes of a client that are no UTF-8 cannot break the answer.
  EXPECT_TRUE(nlohmann::json::accept(ErrorJson(ModelNotFoundError("\xff\x80\n", {"a"}))));
}

TEST(ErrorsTest, RetryHeaders) {
  const HttpResponse full = ErrorResponse(QueueFullError("the queue is full", 2.25));
  EXPECT_EQ(full.status, 429);
  EXPECT_EQ(full.headers.Get("Retry-After"), "3");
  EXPECT_EQ(full.headers.Get("retry-after-ms"), "2250");
  // Clients give up at more than two minutes.
  EXPECT_EQ(ErrorResponse(QueueFullError("x", 1e9)).headers.Get("Retry-After"), "120");
  EXPECT_EQ(ErrorResponse(NumericalError()).headers.Get("x-should-retry"), "false");
  EXPECT_EQ(ErrorResponse(LoadingError()).headers.Find("x-should-retry"), nullptr);
}

TEST(WireTest, NoValueCanAddAHeader) {
  const std::string head =
      ResponseHeadBytes(200, {{"X-A", "a\r\nX-Evil: 1"}}, {}, BodyFraming::kLength, 3, true);
  EXPECT_THAT(head, HasSubstr("X-A: a  X-Evil: 1\r\n"));
  EXPECT_THAT(head, HasSubstr("Content-Length: 3\r\n"));
  std::string chunks;
  AppendChunk("", chunks);
  EXPECT_EQ(chunks, "");
  AppendChunk(std::string(17, 'x'), chunks);
  AppendLastChunk(chunks);
  EXPECT_EQ(chunks, "11\r\n" + std::string(17, 'x') + "\r\n0\r\n\r\n");
}

TEST(RequestReaderTest, AChunkedBodyIsTheSameInPiecesOfAnySize) {
  const std::string head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
  const std::pair<std::string, std::string> bodies[] = {
      {"0\r\n\r\n", ""},
      {"0\r\nX-Sum: 1\r\n\r\n", ""},
      {"2\r\n{}\r\n0\r\n\r\n", "{}"},
      {"1;a=b\r\n{\r\n1\r\n}\r\n0\r\nT: 1\r\n\r\n", "{}"}};
  for (const auto& [bytes, body] : bodies) {
    const std::string all = head + bytes;
    for (size_t step = 1; step <= all.size(); ++step) {
      RequestReader reader((HttpRequestLimits()));
      std::string in;
      auto event = RequestReader::Event::kNeedMore;
      for (size_t at = 0; at < all.size(); at += step) {
        in += all.substr(at, step);
        do {
          size_t used = 0;
          event = reader.Feed(in, &used);
          in.erase(0, used);
        } while (event == RequestReader::Event::kHead);
        if (event != RequestReader::Event::kNeedMore) break;
      }
      EXPECT_EQ(event, RequestReader::Event::kDone) << bytes << " in steps of " << step;
      EXPECT_EQ(reader.request().body, body);
      EXPECT_EQ(in, "");
    }
  }
}

}  // namespace
}  // namespace dsla
