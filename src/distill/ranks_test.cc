// Training by two processes that meet through a file: both end with the same parameters to the bit
// (Distill itself compares them at every checkpoint), and with those that one process alone gets
// from the whole batches, but for fp32's order of sums. Once more on two GPUs, where there are two.
#include "distill/ranks.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "base/mapped_file.h"
#include "distill/checkpoint.h"
#include "distill/distill.h"
#include "distill/distill_testing.h"
#include "distill/sampler.h"
#include "distill/torch_device.h"

extern char** environ;

namespace dsla {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;

constexpr int kRanks = 2;

TEST(CompleteRanksTest, OptionsFirstThenTheEnvironment) {
  std::map<std::string, std::string> variables;
  const auto complete = [&](RankOptions given) {
    return CompleteRanks(std::move(given), [&](const char* name) -> const char* {
      const auto found = variables.find(name);
      return found == variables.end() ? nullptr : found->second.c_str();
    });
  };
  EXPECT_EQ(complete({})->ranks, 1);
  EXPECT_EQ(complete({})->rank, 0);
  RankOptions two;
  two.ranks = 2;
  EXPECT_THAT(complete(two).status().message(), HasSubstr("--rank: -1 is not in 0 to 1"));
  two.rank = 1;
  EXPECT_THAT(complete(two).status().message(), HasSubstr("2 ranks need --rendezvous"));
  variables = {{"WORLD_SIZE", "4"},
               {"RANK", "3"},
               {"LOCAL_RANK", "1"},
               {"MASTER_ADDR", "host"},
               {"MASTER_PORT", "29500"},
               {"TORCHELASTIC_USE_AGENT_STORE", "True"},
               {"TORCHELASTIC_RESTART_COUNT", "2"}};
  const auto all = complete({});
  ASSERT_TRUE(all.ok()) << all.status().message();
  EXPECT_EQ(all->ranks, 4);
  EXPECT_EQ(all->rank, 3);
  EXPECT_EQ(all->local_rank, 1);
  EXPECT_EQ(all->rendezvous, "host:29500");
  EXPECT_TRUE(all->served);
  EXPECT_EQ(all->attempt, "2");
  two.rendezvous = "file:/x";
  EXPECT_EQ(complete(two)->ranks, 2);
  EXPECT_EQ(complete(two)->rendezvous, "file:/x");
  EXPECT_FALSE(complete(two)->served);
  variables["RANK"] = "x";
  EXPECT_THAT(complete({}).status().message(), HasSubstr("RANK: 'x' is not a whole number"));
  variables["WORLD_SIZE"] = "9999";
  EXPECT_THAT(complete({}).status().message(), HasSubstr("--ranks: 9999 is not in 1 to 1024"));
}

TEST(RanksTest, ARendezvousOfNeitherFormIsRefused) {
  RankOptions options;
  options.ranks = 2, options.rank = 1;
  for (const char* where : {"nowhere", "host:", ":29500", "host:port", "host:0", "host:70000"}) {
    options.rendezvous = where;
    EXPECT_THAT(Ranks::Join(options).status().message(), HasSubstr("neither HOST:PORT nor file:"))
        << where;
  }
}

TEST(PartOfTest, PartsPutTogetherAreTheBatch) {
  TokenBatch batch;
  batch.rows = 5, batch.length = 3;
  for (int i = 0; i < 15; ++i) batch.ids.push_back(i), batch.targets.push_back(-i);
  batch.counts = {3, 1, 2, 3, 2};
  std::vector<int32_t> ids, targets, counts;
  for (int part = 0; part < 3; ++part) {
    const TokenBatch own = PartOf(batch, part, 3);
    EXPECT_GE(own.rows, 1);
    EXPECT_EQ(own.ids.size(), static_cast<size_t>(own.rows) * 3);
    EXPECT_EQ(own.all_rows, 5);
    EXPECT_EQ(own.Counted(0), 11);
    EXPECT_EQ(own.Counted(1), 6);
    ids.insert(ids.end(), own.ids.begin(), own.ids.end());
    targets.insert(targets.end(), own.targets.begin(), own.targets.end());
    counts.insert(counts.end(), own.counts.begin(), own.counts.end());
  }
  EXPECT_EQ(ids, batch.ids);
  EXPECT_EQ(targets, batch.targets);
  EXPECT_EQ(counts, batch.counts);
}

// Documents of unequal length apart, all losses: all that must be weighed by the whole batch and
// not by a part of it.
DistillJob Job(const std::string& folder, const std::string& name, const std::string& device) {
  DistillJob job = testing::TrainingJob(folder, name);
  job.config.device = device;
  job.config.dtype = "fp32";
  job.config.documents = "separate";
  job.config.align_weight = 0.1;
  job.config.cosine_weight = 0.05;
  return job;
}

Status RunIn(const std::string& folder, DistillJob job) {
  DSLA_ASSIGN_OR_RETURN(const auto model, ModelFile::Open(folder + "/m.gguf"));
  const ExecContext ctx{.threads = 1};
  return Distill(ctx, *model, job).status();
}

// The other process of the tests below: runs only when one of them starts it.
TEST(RanksTest, Worker) {
  const char* const folder = std::getenv("DSLA_RANKS_FOLDER");
  if (folder == nullptr) GTEST_SKIP() << "started by the other tests";
  const std::string mode = std::getenv("DSLA_RANKS_MODE");
  const std::string device = std::getenv("DSLA_RANKS_DEVICE");
  RankOptions meet;
  meet.rendezvous = std::string("file:") + folder + "/meet";
  const auto options = CompleteRanks(meet, [](const char* name) { return std::getenv(name); });
  ASSERT_TRUE(options.ok()) << options.status().message();
  if (mode == "sums") {
    auto ranks = Ranks::Join(*options);
    ASSERT_TRUE(ranks.ok()) << ranks.status().message();
    const int own = (*ranks)->rank();
    const auto place = distill::OpenDevice(device == "cpu" ? device : fmt::format("cuda:{}", own));
    ASSERT_TRUE(place.ok()) << place.status().message();
    at::Tensor x = at::full({5}, own + 1.5).to(*place, at::kFloat);
    (*ranks)->Sum(x);
    EXPECT_EQ(x.sum().item().toDouble(), 5 * (1.5 + 2.5));
    EXPECT_EQ((*ranks)->Max({own, -own}), (std::vector<int64_t>{1, 0}));
    EXPECT_TRUE((*ranks)->Agree(Status::Ok()).ok());
    const Status status = (*ranks)->Agree(own == 1 ? InvalidArgument("bad data") : Status::Ok());
    EXPECT_EQ(status.message(), own == 1 ? "bad data" : "rank 1 of 2 failed");
    if (own == 1) std::_Exit(0);  // gone, without a word
    EXPECT_ANY_THROW((*ranks)->Max({0}));
    return;
  }
  DistillJob job = Job(folder, "two.safetensors", device);
  job.ranks = *options;
  int asked = 0;
  if (mode == "stop") {  // the rank that writes nothing is asked to end
    job.interrupted = [&] { return options->rank == 1 && ++asked == 5; };
  }
  const Status status = RunIn(folder, job);
  ASSERT_TRUE(status.ok()) << status.message();
}

class TwoRanksTest : public ::testing::Test {
 protected:
  void SetUp() override { testing::WriteTrainingFiles(folder_); }

  // Runs Worker in two processes with what torchrun would set.
  void RunWorkers(const std::string& mode, const std::string& device) {
    std::filesystem::remove(folder_.path() + "/meet");
    std::vector<pid_t> processes;
    for (int rank = 0; rank < kRanks; ++rank) {
      std::vector<std::string> variables = {
          "DSLA_RANKS_FOLDER=" + folder_.path(), "DSLA_RANKS_MODE=" + mode,
          "DSLA_RANKS_DEVICE=" + device, fmt::format("RANK={}", rank),
          fmt::format("WORLD_SIZE={}", kRanks)};
      for (char** v = environ; *v != nullptr; ++v) variables.emplace_back(*v);
      std::vector<char*> environment;
      for (std::string& v : variables) environment.push_back(v.data());
      environment.push_back(nullptr);
      char program[] = "/proc/self/exe", filter[] = "--gtest_filter=RanksTest.Worker";
      char* arguments[] = {program, filter, nullptr};
      pid_t process;
      ASSERT_EQ(::posix_spawn(&process, program, nullptr, nullptr, arguments, environment.data()),
                0);
      processes.push_back(process);
    }
    for (const pid_t process : processes) {
      int status = 0;
      ASSERT_EQ(::waitpid(process, &status, 0), process);
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << mode << ": " << status;
    }
  }

  std::vector<float> Parameters(const std::string& name, const std::string& stage) {
    const auto checkpoint = LoadCheckpoint(folder_.path() + "/" + name + ".work", stage);
    EXPECT_TRUE(checkpoint.ok() && checkpoint->has_value() && (*checkpoint)->done) << name;
    return (*checkpoint)->state.values;
  }

  // In norm, by what training moved the parameters.
  void ExpectSameTraining(const std::string& stage, const std::string& before) {
    const std::vector<float> one = Parameters("one.safetensors", stage),
                             two = Parameters("two.safetensors", stage),
                             start = Parameters("one.safetensors", before);
    ASSERT_EQ(one.size(), two.size());
    double difference = 0, moved = 0;
    for (size_t i = 0; i < one.size(); ++i) {
      difference += std::pow(one[i] - two[i], 2);
      moved += std::pow(one[i] - start[i], 2);
    }
    fmt::print("{}: {:.1e} of what training moved\n", stage, std::sqrt(difference / moved));
    EXPECT_LT(std::sqrt(difference / moved), 1e-4) << stage;
  }

  TempDir folder_;
};

class TwoGpusTest : public TwoRanksTest {
 protected:
  void SetUp() override {
    const auto device = distill::OpenDevice("cuda");
    if (!device.ok()) GTEST_SKIP() << "SKIPPED: " << device.status().message();
    if (at::getNumGPUs() < 2) GTEST_SKIP() << "SKIPPED: one GPU";
    TwoRanksTest::SetUp();
  }
};

TEST_F(TwoRanksTest, CollectivesAndARankThatIsGone) { RunWorkers("sums", "cpu"); }

TEST_F(TwoRanksTest, TrainAsOneProcessDoes) {
  const Status alone = RunIn(folder_.path(), Job(folder_.path(), "one.safetensors", "cpu"));
  ASSERT_TRUE(alone.ok()) << alone.message();
  RunWorkers("stop", "cpu");  // cut short, by a rank that is not the first
  const auto cut = LoadCheckpoint(folder_.path() + "/two.safetensors.work", "align");
  ASSERT_TRUE(cut.ok() && cut->has_value());
  EXPECT_FALSE((*cut)->done);
  RunWorkers("train", "cpu");
  ExpectSameTraining("align", "init");
  ExpectSameTraining("chain", "align");
}

TEST_F(TwoGpusTest, Collectives) { RunWorkers("sums", "cuda"); }

TEST_F(TwoGpusTest, TrainAsOneGpuDoes) {
  const Status alone = RunIn(folder_.path(), Job(folder_.path(), "one.safetensors", "cuda"));
  ASSERT_TRUE(alone.ok()) << alone.message();
  RunWorkers("train", "cuda");
  ExpectSameTraining("align", "init");
  ExpectSameTraining("chain", "align");
}

}  // namespace
}  // namespace dsla
