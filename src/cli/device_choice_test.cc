#include "cli/device_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

namespace dsla {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Only says what it is asked.
class NamedDevice : public Device {
 public:
  explicit NamedDevice(std::string name, bool prefers_few_bits = false)
      : name_(std::move(name)), prefers_few_bits_(prefers_few_bits) {}
  const std::string& name() const override { return name_; }
  BlockMemory& memory() override { return HostMemory(); }
  int64_t free_bytes() const override { return int64_t{10} << 30; }
  void Synchronize() override {}
  DeviceLimits Measure() override { return {}; }
  bool Prefers(const ModelConfig&, WeightFormat) const override { return prefers_few_bits_; }
  Expected<std::unique_ptr<DeviceModel>> Load(const DeviceModelSpec&, const TensorReader&,
                                              const ParallelRunner&) override {
    return Unsupported("holds nothing");
  }

 private:
  std::string name_;
  bool prefers_few_bits_;
};

// A machine whose devices are in `opens`, and on which loading gives what `loads` says, or is well.
class DeviceChoiceTest : public testing::Test {
 protected:
  Status Load(const std::string& device, WeightFormat weights = WeightFormat::kBF16,
              bool chooses_weights = false) {
    return LoadOnDevice({.device = device, .weights = weights, .chooses_weights = chooses_weights},
                        {},
                        {.open = [&](const std::string& name) { return Open(name); },
                         .load =
                             [&](const std::shared_ptr<Device>& on, WeightFormat in) {
                               const std::string name = on == nullptr ? "cpu" : on->name();
                               tried_.push_back(fmt::format("{} {}", name, Name(in)));
                               const auto found = loads_.find(tried_.back());
                               return found == loads_.end() ? Status::Ok() : found->second;
                             },
                         .say = [&](const std::string& line) { said_.push_back(line); }});
  }
  Expected<std::shared_ptr<Device>> Open(const std::string& name) const {
    const auto found = opens_.find(name);
    if (found == opens_.end()) return NotFound("this machine has {} GPUs", opens_.size());
    return found->second;
  }
  void Add(const std::string& name, bool prefers_few_bits = false) {
    opens_.emplace(name, std::make_shared<NamedDevice>(name, prefers_few_bits));
  }

  std::map<std::string, Expected<std::shared_ptr<Device>>> opens_;
  std::map<std::string, Status> loads_;  // by device and weights
  std::vector<std::string> tried_, said_;
};

TEST_F(DeviceChoiceTest, AutoTakesTheFirstThatCanHoldTheModel) {
  for (const char* name : {"cuda:0", "cuda:1", "cuda:2", "cuda:3"}) Add(name);
  opens_.insert_or_assign("cuda:1", Unsupported("cuda:1: too old"));
  loads_.emplace("cuda:0 bf16", ResourceExhausted("cuda:0: no room"));
  EXPECT_TRUE(Load("auto").ok());
  EXPECT_THAT(tried_, ElementsAre("cuda:0 bf16", "cuda:2 bf16"));
  EXPECT_THAT(said_, ElementsAre("cuda:0: no room; cuda:1: too old; running on cuda:2"));
}

TEST_F(DeviceChoiceTest, AutoSaysNothingOfTheFirstGpuNorOfNone) {
  EXPECT_TRUE(Load("auto", WeightFormat::kInt4, true).ok());
  Add("cuda:0");
  EXPECT_TRUE(Load("auto").ok());
  EXPECT_THAT(tried_, ElementsAre("cpu int4", "cuda:0 bf16"));
  EXPECT_THAT(said_, IsEmpty());
}

TEST_F(DeviceChoiceTest, AutoTakesTheCpuWhereNoGpuCanHoldTheModel) {
  Add("cuda:0");
  Add("cuda:1");
  loads_.emplace("cuda:0 bf16", Unsupported("cuda:0: head dim 96"));
  loads_.emplace("cuda:1 bf16", Error(StatusCode::kInternal, "cuda:1: failed"));
  EXPECT_TRUE(Load("auto").ok());
  EXPECT_THAT(tried_, ElementsAre("cuda:0 bf16", "cuda:1 bf16", "cpu bf16"));
  EXPECT_THAT(said_, ElementsAre("cuda:0: head dim 96; cuda:1: failed; running on the CPU"));
}

TEST_F(DeviceChoiceTest, WhatOnlyAGpuHasIsNotTakenToTheCpu) {
  EXPECT_EQ(Load("auto", WeightFormat::kFp8).message(),
            "--weights fp8 takes a GPU of compute capability 9.0: there is no GPU");
  Add("cuda:0");
  loads_.emplace("cuda:0 fp8", Unsupported("cuda:0: weights in fp8 take compute capability 9.0"));
  EXPECT_THAT(Load("auto", WeightFormat::kFp8).message(), HasSubstr("9.0: cuda:0: weights in fp8"));
  EXPECT_THAT(tried_, ElementsAre("cuda:0 fp8"));
  EXPECT_THAT(said_, IsEmpty());
}

TEST_F(DeviceChoiceTest, WhatNoDeviceMendsEndsIt) {
  Add("cuda:0");
  Add("cuda:1");
  loads_.emplace("cuda:0 bf16", DataLoss("a broken file"));
  EXPECT_EQ(Load("auto").message(), "a broken file");
  EXPECT_THAT(tried_, ElementsAre("cuda:0 bf16"));
}

TEST_F(DeviceChoiceTest, ANamedDeviceIsTakenOrRefused) {
  Add("cuda");
  loads_.emplace("cuda bf16", ResourceExhausted("cuda:0: no room"));
  EXPECT_EQ(Load("cuda").message(), "cuda:0: no room");
  EXPECT_EQ(Load("cuda:7").message(), "--device cuda:7: this machine has 1 GPUs");
  EXPECT_TRUE(Load("cpu").ok());
  EXPECT_THAT(tried_, ElementsAre("cuda bf16", "cpu bf16"));
  EXPECT_THAT(said_, IsEmpty());
}

TEST_F(DeviceChoiceTest, WeightsOfFewBitsAreForGpusThatPreferThem) {
  Add("cuda:0");
  Add("cuda:1", /*prefers_few_bits=*/true);
  EXPECT_TRUE(Load("cuda:0", WeightFormat::kInt4, true).ok());
  EXPECT_TRUE(Load("cuda:1", WeightFormat::kInt4, true).ok());
  EXPECT_TRUE(Load("cuda:0", WeightFormat::kInt4, false).ok());
  EXPECT_THAT(tried_, ElementsAre("cuda:0 bf16", "cuda:1 int4", "cuda:0 int4"));
}

TEST_F(DeviceChoiceTest, WeightsOfFewBitsAreForWhereBf16DoesNotFit) {
  Add("cuda:0");
  Add("cuda:1");
  loads_.emplace("cuda:0 bf16", ResourceExhausted("cuda:0: no room"));
  EXPECT_TRUE(Load("auto", WeightFormat::kInt8, true).ok());
  EXPECT_THAT(said_, IsEmpty());
  loads_.emplace("cuda:0 int8", ResourceExhausted("cuda:0: no room in int8"));
  EXPECT_TRUE(Load("auto", WeightFormat::kInt8, true).ok());
  EXPECT_THAT(tried_, ElementsAre("cuda:0 bf16", "cuda:0 int8", "cuda:0 bf16", "cuda:0 int8",
                                  "cuda:1 bf16"));
  EXPECT_THAT(said_, ElementsAre("cuda:0: no room in int8; running on cuda:1"));
}

TEST_F(DeviceChoiceTest, CacheMemoryIsWhatIsFreeBesideSteps) {
  const NamedDevice device("cuda:0 (a GPU)");
  const int64_t gib = int64_t{1} << 30;
  EXPECT_TRUE(CheckCacheMemory(device, gib, "9G", 9 * gib).ok());
  const Status status = CheckCacheMemory(device, gib + 1, "9G", 9 * gib);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "--memory: 9G are 9663676416 bytes, and 9663676415 are free on cuda:0 (a GPU) beside "
            "the weights and what steps take");
  EXPECT_THAT(CheckCacheMemory(device, 11 * gib, "1", 1).message(), HasSubstr("and 0 are free"));
}

TEST_F(DeviceChoiceTest, SeveralDevices) {
  for (int i = 0; i < 3; ++i) Add(fmt::format("cuda:{}", i));
  const auto names = [&](const std::string& device) {
    const auto opened = OpenDevices(device, [&](const std::string& name) { return Open(name); });
    std::vector<std::string> names;
    if (!opened.ok()) return std::vector{opened.status().message()};
    for (const auto& of : *opened) names.push_back(of->name());
    return names;
  };
  for (const char* one : {"auto", "cpu", "cuda", "cuda:1"}) EXPECT_FALSE(NamesSeveralDevices(one));
  EXPECT_TRUE(NamesSeveralDevices("cuda:all"));
  EXPECT_TRUE(NamesSeveralDevices("cuda:2,cuda:0"));
  EXPECT_THAT(names("cuda:2,cuda:0"), ElementsAre("cuda:2", "cuda:0"));
  EXPECT_THAT(names("cuda:all"), ElementsAre("cuda:0", "cuda:1", "cuda:2"));
  EXPECT_THAT(names("cuda:0,cuda:0"), ElementsAre("--device cuda:0,cuda:0: has cuda:0 twice"));
  EXPECT_THAT(names("cuda:0,cpu"), ElementsAre(HasSubstr("'cpu' is not one of several GPUs")));
  EXPECT_THAT(names("cuda:0,"), ElementsAre(HasSubstr("'' is not one of several GPUs")));
  EXPECT_THAT(names("cuda:0,cuda:7"), ElementsAre("--device cuda:7: this machine has 3 GPUs"));
  opens_.insert_or_assign("cuda:1", Unsupported("cuda:1 (old): compute capability 7.0: needs 8.0"));
  EXPECT_THAT(names("cuda:all"), ElementsAre(HasSubstr("--device cuda:all: cuda:1 (old)")));
  opens_.clear();
  EXPECT_THAT(names("cuda:all"), ElementsAre("--device cuda:all: this machine has 0 GPUs"));
}

TEST(KindOf, LeavesTheNumberOut) {
  EXPECT_EQ(KindOf(NamedDevice("cuda:1 (NVIDIA H200 (SXM))")), "NVIDIA H200 (SXM)");
  EXPECT_EQ(KindOf(NamedDevice("some device")), "some device");
}

}  // namespace
}  // namespace dsla
