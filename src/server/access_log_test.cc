#include "server/access_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

namespace dsla {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(AccessLogTest, OneLineWithoutTheText) {
  const std::string path = ::testing::TempDir() + "dsla_access_log";
  std::remove(path.c_str());
  auto log = Log::Open({.file = path});
  ASSERT_TRUE(log.ok());
  ServerMetrics metrics({.model = "m", .version = "1", .vllm_compat = false});
  AccessLog access(log->get());
  access.SetMetrics(&metrics);

  HttpRequest request;
  request.method = "POST";
  request.path = "/v1/completions";
  request.query = "secret=1";
  request.body = "private words";
  request.request_id = "id-1";
  request.headers.Add("Authorization", "Bearer private-key");
  request.headers.Add("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
  AccessRecord record;
  record.request = std::make_shared<const HttpRequest>(request);
  record.route = "/v1/completions";
  record.status = 200;
  record.body_bytes = 13;
  record.notes = {{"tokens", "5"}};
  access.OnRequestStarted();
  access.OnRequestFinished(record);

  request.path = "/health";
  record.request = std::make_shared<const HttpRequest>(request);
  record.route = "/health";
  access.OnRequestStarted();
  access.OnRequestFinished(record);  // a probe that is well: no line
  (*log)->Flush();

  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_THAT(text, HasSubstr("id=id-1 method=POST path=/v1/completions status=200"));
  EXPECT_THAT(text, HasSubstr("bytes_in=13"));
  EXPECT_THAT(text, HasSubstr("tokens=5"));
  EXPECT_THAT(text, HasSubstr("traceparent=00-4bf92f35"));
  EXPECT_THAT(text, Not(HasSubstr("private")));
  EXPECT_THAT(text, Not(HasSubstr("secret")));
  EXPECT_THAT(metrics.Render(EngineState()), HasSubstr("route=\"/v1/completions\""));
}

TEST(AccessLogTest, CountsAreNumbersInJson) {
  const std::string path = ::testing::TempDir() + "dsla_access_log_json";
  std::remove(path.c_str());
  auto log = Log::Open({.file = path, .json = true});
  ASSERT_TRUE(log.ok());
  AccessRecord record;
  record.request = std::make_shared<const HttpRequest>();
  record.notes = {{"prompt_tokens", "36"}, {"tokens", "5"}, {"dsla_level", "22"}, {"replica", "0"}};
  AccessLog access(log->get());
  access.OnRequestStarted();
  access.OnRequestFinished(record);
  (*log)->Flush();
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_THAT(text, HasSubstr(R"("prompt_tokens":36,"tokens":5,"dsla_level":22,"replica":"0")"));
}

TEST(AccessLogTest, AProbeHasALineWhenItsAnswerChanges) {
  const std::string path = ::testing::TempDir() + "dsla_access_log_probes";
  std::remove(path.c_str());
  auto log = Log::Open({.file = path});
  ASSERT_TRUE(log.ok());
  AccessLog access(log->get());
  HttpRequest request;
  request.method = "GET";
  request.path = "/ready";
  AccessRecord record;
  record.request = std::make_shared<const HttpRequest>(request);
  record.route = "/ready";
  for (const int status : {503, 503, 503, 200, 200, 503, 503}) {
    record.status = status;
    access.OnRequestStarted();
    access.OnRequestFinished(record);
  }
  (*log)->Flush();
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_THAT(lines[0], HasSubstr("status=503"));
  EXPECT_THAT(lines[1], HasSubstr("status=200"));
  EXPECT_THAT(lines[2], HasSubstr("status=503"));
}

// What was open before there were metrics must not be missing when it closes.
TEST(AccessLogTest, WhatIsOpenIsHandedOver) {
  auto log = Log::Open({.file = ::testing::TempDir() + "dsla_access_log_open"});
  ASSERT_TRUE(log.ok());
  AccessLog access(log->get());
  access.OnConnections(1);
  access.OnConnections(1);
  access.OnRequestStarted();
  ServerMetrics metrics({.model = "m", .version = "1", .vllm_compat = false});
  access.SetMetrics(&metrics);
  EXPECT_THAT(metrics.Render(EngineState()), HasSubstr("\ndsla_http_connections 2\n"));
  EXPECT_THAT(metrics.Render(EngineState()), HasSubstr("\ndsla_http_in_flight 1\n"));
  access.OnConnections(-1);
  access.OnConnections(-1);
  AccessRecord record;
  record.request = std::make_shared<const HttpRequest>();
  access.OnRequestFinished(record);
  EXPECT_THAT(metrics.Render(EngineState()), HasSubstr("\ndsla_http_connections 0\n"));
  EXPECT_THAT(metrics.Render(EngineState()), HasSubstr("\ndsla_http_in_flight 0\n"));
}

TEST(AccessLogTest, TraceParents) {
  EXPECT_TRUE(SoundTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
  EXPECT_FALSE(SoundTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0"));
  EXPECT_FALSE(SoundTraceParent("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"));
  EXPECT_FALSE(SoundTraceParent("x=1 y=2"));
}

}  // namespace
}  // namespace dsla
