// LoadReplicas on devices that only say what they are asked, and on the CPU.
#include "cli/model_args.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <thread>

#include "engine/testing/stream_device.h"
#include "format/tokenizer/testing.h"
#include "model/testing/small_models.h"

namespace dsla {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing_engine::StreamMemory;
using testing_engine::StreamModel;
using testing_engine::StreamOptions;

class TestDevice : public Device {
 public:
  TestDevice(std::string name, int64_t free_bytes, std::function<Status()> loads)
      : name_(std::move(name)), free_bytes_(free_bytes), loads_(std::move(loads)) {}
  const std::string& name() const override { return name_; }
  BlockMemory& memory() override { return memory_; }
  int64_t free_bytes() const override { return free_bytes_; }
  void Synchronize() override {}
  DeviceLimits Measure() override { return {}; }
  Expected<std::unique_ptr<DeviceModel>> Load(const DeviceModelSpec& spec, const TensorReader&,
                                              const ParallelRunner&) override {
    DSLA_RETURN_IF_ERROR(loads_());
    return std::unique_ptr<DeviceModel>(new StreamModel(spec, &stream_, &options_));
  }

 private:
  const std::string name_;
  const int64_t free_bytes_;
  const std::function<Status()> loads_;
  StreamOptions options_;
  testing_engine::Stream stream_;
  StreamMemory memory_{&stream_, &options_};
};

class LoadReplicasTest : public ::testing::Test {
 protected:
  // A small model with a tokenizer of bytes.
  void SetUp() override {
    folder_ = fs::path(::testing::TempDir()) / fmt::format("dsla_model_args_{}", getpid());
    fs::copy(testing_models::DataPath("models/smollm2"), folder_);
    std::ofstream(folder_ / "tokenizer.json") << SmallTokenizer().dump();
    args_.model = folder_;
    args_.adapter = "none";
    args_.threads = 5;
  }
  static nlohmann::json SmallTokenizer() {
    constexpr int kV = 96;
    nlohmann::json json = testing::ByteLevelJson();
    json["added_tokens"] = nlohmann::json::array();
    json["model"]["merges"] = nlohmann::json::array();
    nlohmann::json vocab;
    for (const auto& [text, id] : json["model"]["vocab"].items())
      if (id < kV) vocab[text] = id;
    json["model"]["vocab"] = vocab;
    return json;
  }
  void TearDown() override { fs::remove_all(folder_); }

  void Add(int index, int64_t free_bytes, Status loads = Status::Ok()) {
    const std::string name = fmt::format("cuda:{}", index);
    // Each waits until all have begun: one after another they would not end.
    const auto load = [this, loads]() -> Status {
      ++loading_;
      const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (loading_ < static_cast<int>(devices_.size())) {
        if (std::chrono::steady_clock::now() > limit)
          return Error(StatusCode::kInternal, "the others have not begun");
        std::this_thread::yield();
      }
      return loads;
    };
    devices_[name] =
        std::make_shared<TestDevice>(fmt::format("{} (some GPU)", name), free_bytes, load);
  }
  Expected<std::vector<LoadedModel>> Load(const std::string& device, int replicas = 0) {
    args_.device = device;
    loading_ = 0;
    return LoadReplicas(args_, replicas, /*sequences=*/2, /*step_rows=*/64,
                        [this](const std::string& name) -> Expected<std::shared_ptr<Device>> {
                          const auto found = devices_.find(name);
                          if (found == devices_.end())
                            return NotFound("this machine has {} GPUs", devices_.size());
                          return found->second;
                        });
  }
  std::string WhyNot(const std::string& device, int replicas = 0) {
    const auto loaded = Load(device, replicas);
    return loaded.ok() ? "loaded" : loaded.status().message();
  }

  fs::path folder_;
  ModelArgs args_;
  std::map<std::string, std::shared_ptr<Device>> devices_;
  std::atomic<int> loading_ = 0;
};

TEST_F(LoadReplicasTest, OnSeveralDevicesSideBySide) {
  Add(0, int64_t{1} << 30);
  Add(1, 100'000);
  Add(2, int64_t{1} << 30);
  for (const char* device : {"cuda:all", "cuda:0,cuda:1,cuda:2"}) {
    const auto models = Load(device);
    ASSERT_TRUE(models.ok()) << models.status().message();
    ASSERT_EQ(models->size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
      const LoadedModel& of = (*models)[i];
      EXPECT_EQ(of.where(), fmt::format("cuda:{} (some GPU)", i));
      EXPECT_EQ(of.file, models->front().file) << "one file";
      EXPECT_EQ(of.memory_bytes, 85'000) << "of the one with the least";
      EXPECT_EQ(of.ctx.threads, 1) << "of 5";
      EXPECT_EQ(of.ctx.workspace, of.workspace.get());
    }
    EXPECT_NE((*models)[0].model, (*models)[1].model);
    EXPECT_NE((*models)[0].workspace, (*models)[1].workspace);
  }
}

TEST_F(LoadReplicasTest, MemoryThatIsAskedForIsOfEach) {
  Add(0, int64_t{1} << 30);
  Add(1, int64_t{1} << 20);
  args_.memory = "512K";
  const auto models = Load("cuda:all", 2);
  ASSERT_TRUE(models.ok()) << models.status().message();
  for (const LoadedModel& of : *models) EXPECT_EQ(of.memory_bytes, 512 << 10);
  args_.memory = "2M";
  EXPECT_THAT(WhyNot("cuda:all"), HasSubstr("are free on cuda:1 (some GPU)"));
}

TEST_F(LoadReplicasTest, OneThatCannotIsNamed) {
  Add(0, int64_t{1} << 30);
  Add(1, int64_t{1} << 30, ResourceExhausted("cuda:1 (some GPU): no room"));
  EXPECT_EQ(WhyNot("cuda:all"), "cuda:1 (some GPU): no room");
  EXPECT_THAT(WhyNot("cuda:0,cuda:2"), HasSubstr("--device cuda:2: this machine has 2 GPUs"));
}

TEST_F(LoadReplicasTest, AsManyAsDevices) {
  Add(0, int64_t{1} << 30);
  Add(1, int64_t{1} << 30);
  EXPECT_THAT(WhyNot("cuda:all", 3), HasSubstr("--replicas: 3, but --device cuda:all are 2 GPUs"));
  devices_.erase("cuda:1");
  EXPECT_THAT(WhyNot("auto", 2), HasSubstr("--replicas: 2 on cuda:0 (some GPU): a GPU has one"));
  const auto one = Load("cuda:all");
  ASSERT_TRUE(one.ok()) << one.status().message();
  EXPECT_EQ(one->size(), 1u) << "all that there are";
}

TEST_F(LoadReplicasTest, OnTheCpuTheyShareTheModel) {
  const auto models = Load("cpu", 2);
  ASSERT_TRUE(models.ok()) << models.status().message();
  ASSERT_EQ(models->size(), 2u);
  EXPECT_EQ((*models)[0].model, (*models)[1].model);
  EXPECT_NE((*models)[0].workspace, (*models)[1].workspace);
  for (const LoadedModel& of : *models) {
    EXPECT_EQ(of.ctx.threads, 2);
    EXPECT_EQ(of.memory_bytes, models->front().memory_bytes);
  }
  args_.threads = 1;
  EXPECT_EQ(Load("cpu", 2)->back().ctx.threads, 1) << "at least one";
  EXPECT_EQ(Load("auto")->size(), 1u);
}

}  // namespace
}  // namespace dsla
