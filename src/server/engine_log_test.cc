#include "server/engine_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

namespace dsla {
namespace {

class EngineLogTest : public ::testing::Test {
 protected:
  EngineLogTest()
      : path_(::testing::TempDir() + "dsla_engine_log_" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::remove(path_.c_str());
    auto opened = Log::Open({.file = path_, .json = true});
    DSLA_CHECK(opened.ok());
    log_ = std::move(*opened);
    engine_log_.emplace(log_.get());
  }

  std::vector<nlohmann::json> Lines() {
    log_->Flush();
    std::ifstream file(path_);
    std::vector<nlohmann::json> lines;
    for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  // The changes that are logged of a state that lists these.
  std::vector<std::string> Logged(const std::vector<LevelEvent>& events) {
    EngineState state;
    state.events = events;
    const size_t before = Lines().size();
    engine_log_->LogChanges(state);
    std::vector<std::string> logged;
    const auto lines = Lines();
    for (size_t i = before; i < lines.size(); ++i) {
      const nlohmann::json& line = lines[i];
      const std::string event = line["event"];
      logged.push_back(event + " " +
                       (event == "changes_not_listed" ? line["count"] : line["to"]).dump());
    }
    return logged;
  }

  const std::string path_;
  std::unique_ptr<Log> log_;
  std::optional<EngineLog> engine_log_;
};

LevelEvent Event(int64_t sequence, double time, const char* request, int to) {
  LevelEvent event;
  event.sequence = sequence;
  event.time = time;
  event.request_id = request;
  event.to = to;
  event.reason = "memory: 3 MB";
  return event;
}

// Of one decision, all changes have the same time.
TEST_F(EngineLogTest, EveryChangeOnce) {
  std::vector<LevelEvent> events = {Event(1, 5, "", 3), Event(2, 5, "a", 3), Event(3, 5, "b", 2)};
  EXPECT_EQ(Logged(events), (std::vector<std::string>{"level 3", "raise 3", "raise 2"}));
  EXPECT_TRUE(Logged(events).empty());
  events.push_back(Event(4, 5, "c", 1));
  EXPECT_EQ(Logged(events), std::vector<std::string>{"raise 1"});
  const auto lines = Lines();
  EXPECT_EQ(lines[1]["request"], "a");
  EXPECT_EQ(lines[1]["reason"], "memory: 3 MB");
  EXPECT_EQ(lines[1]["level"], "info");
}

TEST_F(EngineLogTest, ChangesThatAreNotListedAreCounted) {
  EXPECT_EQ(Logged({Event(3, 1, "a", 2), Event(4, 1, "b", 2)}),
            (std::vector<std::string>{"changes_not_listed 2", "raise 2", "raise 2"}));
  EXPECT_EQ(Logged({Event(105, 2, "", 0)}),
            (std::vector<std::string>{"changes_not_listed 100", "level 0"}));
}

TEST_F(EngineLogTest, ReplicasCountTheirChangesByThemselves) {
  EngineState all;
  all.replicas.resize(2);
  all.replicas[0].events = {Event(1, 5, "", 3), Event(2, 5, "a", 3)};
  all.replicas[1].events = {Event(1, 5, "", 2), Event(4, 6, "b", 2)};
  all.replicas[1].device = "cuda:1 (some GPU)";
  engine_log_->LogChanges(all);
  all.replicas[1].device_error = "an illegal access";
  engine_log_->LogChanges(all);
  engine_log_->LogChanges(all);
  std::vector<std::string> seen;
  for (const auto& line : Lines())
    seen.push_back(
        fmt::format("{} {}", line["event"].get<std::string>(), line["replica"].get<int>()));
  EXPECT_EQ(seen, (std::vector<std::string>{"level 0", "raise 0", "level 1", "changes_not_listed 1",
                                            "raise 1", "replica_failed 1"}));
  const auto last = Lines().back();
  EXPECT_EQ(last["device"], "cuda:1 (some GPU)");
  EXPECT_EQ(last["message"], "an illegal access");
  RequestResult result;
  result.id = "r";
  result.replica = 1;
  result.status = Status(StatusCode::kInternal, "the device failed");
  engine_log_->OnFinish(result);
  EXPECT_EQ(Lines().back()["replica"], 1);
}

TEST_F(EngineLogTest, WhyARequestFailed) {
  RequestResult result;
  result.id = "req-1/0123abcd.0";
  engine_log_->OnFinish(result);
  result.status = Status(StatusCode::kCancelled, "cancelled");
  engine_log_->OnFinish(result);
  result.status = Status(StatusCode::kDeadlineExceeded, "late");
  engine_log_->OnFinish(result);
  EXPECT_TRUE(Lines().empty());
  result.status = Status(StatusCode::kInternal, "a step failed: no such kernel");
  engine_log_->OnFinish(result);
  result.status = ResourceExhausted("out of memory in a step of {} tokens", 20);
  engine_log_->OnFinish(result);
  const auto lines = Lines();
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["event"], "request_failed");
  EXPECT_EQ(lines[0]["level"], "error");
  EXPECT_EQ(lines[0]["request"], "req-1/0123abcd.0");
  EXPECT_EQ(lines[0]["message"], "a step failed: no such kernel");
  EXPECT_EQ(lines[1]["message"], "out of memory in a step of 20 tokens");
}

}  // namespace
}  // namespace dsla
