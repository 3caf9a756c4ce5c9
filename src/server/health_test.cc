#include "server/health.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/http/testing/raw_client.h"
#include "server/http/testing/test_server.h"

namespace dsla {
namespace {

using testing::Get;
using ::testing::HasSubstr;
using testing::RawClient;
using testing::TestServer;

class StillEngine : public Engine {
 public:
  std::optional<Rejection> SubmitAll(std::vector<Submission>) override { return {}; }
  std::optional<Rejection> Check(const Request&) const override { return std::nullopt; }
  std::optional<Rejection> RefusesAll() const override { return {}; }
  int LongestReply(int64_t, Tier, int) const override { return 0; }
  void Cancel(const std::string&) override {}
  void CancelAll() override {}
  EngineState state() const override { return state_; }
  bool device_failed() const override { return !state_.device_error.empty(); }
  void SetFinishObserver(FinishObserver) override {}
  void SetPolicy(const PolicyMaker&) override {}
  void SetMaxLevel(int) override {}
  void Drain() override {}

  EngineState state_;
};

TEST(HealthTest, TellsTheTruth) {
  StillEngine engine;
  engine.state_.idle = true;
  double now = 1000;
  Health health(/*stall_seconds=*/30, [&] { return now; });
  TestServer server;
  auto router = std::make_shared<Router>();
  health.AddRoutes(*router, "1.2.3");
  server.server().SetRouter(router);
  const auto ask = [&](const std::string& path) {
    RawClient client(server.port());
    return client.Call(Get(path));
  };
  const auto ready = [&](int status) {
    for (const char* path : {"/health", "/ready", "/ping"})
      EXPECT_EQ(ask(path).status, status) << path;
  };
  ready(503);
  EXPECT_THAT(ask("/health").body, HasSubstr("\"loading\""));
  EXPECT_EQ(ask("/live").status, 200);

  health.SetEngine(&engine);
  health.SetPhase(Phase::kServing);
  ready(200);
  EXPECT_EQ(ask("/version").body, "{\"version\":\"1.2.3\"}");
  EXPECT_EQ(ask("/live/").status, 200);

  // No progress is wrong only while there is work.
  engine.state_.last_progress = 900;
  ready(200);
  engine.state_.idle = false;
  ready(503);
  EXPECT_THAT(ask("/health").body, HasSubstr("\"stalled\""));
  EXPECT_THAT(ask("/health").body, HasSubstr("for 100 s"));
  EXPECT_EQ(ask("/live").status, 503);
  now = 925;
  ready(200);

  engine.state_.device_error = "CUDA: a step: an illegal memory access was encountered";
  ready(503);
  EXPECT_THAT(ask("/live").body, HasSubstr("\"device_failed\""));
  EXPECT_THAT(ask("/live").body, HasSubstr("illegal memory access"));
  EXPECT_EQ(ask("/live").status, 503);
  engine.state_.device_error.clear();

  // One of several: the others serve on.
  engine.state_.replicas.resize(3);
  ready(200);
  EXPECT_EQ(ask("/health").body, "{\"status\":\"ok\"}");
  EXPECT_FALSE(health.Degraded());
  engine.state_.replicas[0].device_error = engine.state_.replicas[2].device_error = "gone";
  ready(200);
  EXPECT_TRUE(health.Degraded());
  for (const char* path : {"/health", "/ready", "/live"})
    EXPECT_EQ(ask(path).body, "{\"status\":\"degraded\",\"failed_replicas\":[0,2]}") << path;

  health.SetPhase(Phase::kDraining);
  server.server().SetPhase(Phase::kDraining);
  ready(503);
  EXPECT_THAT(ask("/ready").body, HasSubstr("\"shutting_down\""));
  EXPECT_EQ(ask("/live").status, 200);
}

}  // namespace
}  // namespace dsla
