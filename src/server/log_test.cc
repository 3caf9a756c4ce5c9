#include "server/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

namespace dsla {
namespace {

using ::testing::HasSubstr;

std::string Path(const char* name) { return ::testing::TempDir() + "dsla_log_" + name; }

std::vector<std::string> Lines(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

std::unique_ptr<Log> OpenLog(const LogOptions& options) {
  auto log = Log::Open(options);
  DSLA_CHECK(log.ok());
  return std::move(*log);
}

TEST(LogTest, TextAndJson) {
  const std::vector<LogField> fields = {
      {"path", "/v1/x"}, {"odd", "a b\n\"c\""}, {"n", int64_t{3}}, {"t", 0.25}, {"b", true}};
  EXPECT_EQ(
      Log::Format(false, 1700000000.25, LogLevel::kInfo, "request", fields),
      "2023-11-14T22:13:20.250Z info    request path=/v1/x odd=\"a b\\n\\\"c\\\"\" n=3 t=0.25 "
      "b=true");
  const auto json = nlohmann::json::parse(
      Log::Format(true, 1700000000.25, LogLevel::kWarning, "request", fields));
  EXPECT_EQ(json["time"], "2023-11-14T22:13:20.250Z");
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["odd"], "a b\n\"c\"");
  EXPECT_EQ(json["n"], 3);
  // Bytes that are no UTF-8 do not break the line.
  EXPECT_TRUE(nlohmann::json::accept(
      Log::Format(true, 0, LogLevel::kInfo, "x", {{"bad", std::string("\xff\n")}})));
  EXPECT_EQ(
      Log::Format(false, 0, LogLevel::kInfo, "x", {{"bad", std::string("\xff\n")}}).find('\n'),
      std::string::npos);
}

TEST(LogTest, AFieldReplacesNothingOfTheLine) {
  const auto json = nlohmann::json::parse(
      Log::Format(true, 1700000000.25, LogLevel::kError, "config",
                  {{"level", "5 (command line)"}, {"time", int64_t{1}}, {"event", "x"}}));
  EXPECT_EQ(json["level"], "error");
  EXPECT_EQ(json["time"], "2023-11-14T22:13:20.250Z");
  EXPECT_EQ(json["event"], "config");
  EXPECT_EQ(json["field_level"], "5 (command line)");
  EXPECT_EQ(json["field_time"], 1);
  EXPECT_EQ(json["field_event"], "x");
}

TEST(LogTest, LevelsAndOrder) {
  const std::string path = Path("levels");
  std::remove(path.c_str());
  const auto log = OpenLog({.file = path, .level = LogLevel::kInfo});
  log->Write(LogLevel::kDebug, "hidden");
  for (int64_t i = 0; i < 100; ++i) log->Write(LogLevel::kInfo, "{not a format}", {{"i", i}});
  log->Flush();
  const auto lines = Lines(path);
  ASSERT_EQ(lines.size(), 100u);
  EXPECT_THAT(lines[7], HasSubstr("{not a format} i=7"));
  EXPECT_FALSE(ParseLogLevel("loud").ok());
  EXPECT_TRUE(ParseLogLevel("error").ok());
}

TEST(LogTest, ReopenFollowsTheName) {
  const std::string path = Path("reopen");
  std::remove(path.c_str());
  const auto log = OpenLog({.file = path});
  log->Write(LogLevel::kInfo, "first");
  log->Flush();
  ASSERT_EQ(std::rename(path.c_str(), (path + ".1").c_str()), 0);
  log->Reopen();
  log->Write(LogLevel::kInfo, "second");
  log->Flush();
  ASSERT_EQ(Lines(path).size(), 1u);
  EXPECT_THAT(Lines(path)[0], HasSubstr("second"));
  EXPECT_THAT(Lines(path + ".1")[0], HasSubstr("first"));
}

TEST(LogTest, FullDiskLosesLinesAndNothingElse) {
  const auto log = OpenLog({.file = "/dev/full"});
  for (int i = 0; i < 10; ++i) log->Write(LogLevel::kInfo, "x");
  log->Flush();
  EXPECT_EQ(log->lost(), 10);
}

TEST(LogTest, FileThatCannotBeWrittenIsNamed) {
  const auto log = Log::Open({.file = "/no/such/dir/log"});
  ASSERT_FALSE(log.ok());
  EXPECT_THAT(log.status().message(), HasSubstr("/no/such/dir/log"));
}

TEST(LogTest, ManyThreads) {
  const std::string path = Path("threads");
  std::remove(path.c_str());
  {
    const auto log = OpenLog({.file = path, .json = true});
    std::vector<std::thread> writers;
    for (int t = 0; t < 4; ++t) {
      writers.emplace_back([&, t] {
        for (int64_t i = 0; i < 200; ++i)
          log->Write(LogLevel::kInfo, "x", {{"t", int64_t{t}}, {"i", i}});
      });
    }
    log->Reopen();
    for (std::thread& writer : writers) writer.join();
  }
  const auto lines = Lines(path);
  EXPECT_EQ(lines.size(), 800u);
  for (const std::string& line : lines) EXPECT_TRUE(nlohmann::json::accept(line)) << line;
}

}  // namespace
}  // namespace dsla
