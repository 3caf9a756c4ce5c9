// Units of memory against a driver that only counts: needs no GPU.
#include "model/cuda/cuda_memory.h"

#include <gtest/gtest.h>

#include <map>
#include <new>
#include <set>

namespace dsla::cuda {
namespace {

constexpr int64_t kUnit = 16 << 20;

// What the driver has to say of it: created and mapped handles, and what kernels may read.
struct FakeDriver {
  int most = 1 << 20;  // units that it has
  size_t free = size_t{1} << 40;
  CUmemGenericAllocationHandle next = 1;
  CUdeviceptr next_address = CUdeviceptr{1} << 40;
  std::set<CUmemGenericAllocationHandle> created;
  std::map<CUdeviceptr, CUmemGenericAllocationHandle> mapped;
  std::set<CUdeviceptr> open;

  bool IsOpen(const std::byte* block, int64_t bytes) const {
    const auto begin = reinterpret_cast<CUdeviceptr>(block);
    for (CUdeviceptr at = begin / kUnit * kUnit; at < begin + static_cast<CUdeviceptr>(bytes);
         at += kUnit) {
      if (!open.contains(at)) return false;
    }
    return true;
  }
};
FakeDriver* fake = nullptr;

DriverApi Api() {
  DriverApi api;
  api.granularity = [](size_t* bytes, const CUmemAllocationProp*,
                       CUmemAllocationGranularity_flags) {
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
  };
  api.address_reserve = [](CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
    *at = fake->next_address;
    fake->next_address += bytes;
    return CUDA_SUCCESS;
  };
  api.address_free = [](CUdeviceptr, size_t) { return CUDA_SUCCESS; };
  api.create = [](CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*,
                  unsigned long long) {
    EXPECT_EQ(bytes, kUnit);
    if (static_cast<int>(fake->created.size()) == fake->most) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = fake->next++;
    fake->created.insert(*handle);
    return CUDA_SUCCESS;
  };
  api.release = [](CUmemGenericAllocationHandle handle) {
    EXPECT_EQ(fake->created.erase(handle), 1u);
    return CUDA_SUCCESS;
  };
  api.map = [](CUdeviceptr at, size_t bytes, size_t, CUmemGenericAllocationHandle handle,
               unsigned long long) {
    EXPECT_EQ(bytes, kUnit);
    EXPECT_TRUE(fake->created.contains(handle));
    for (const auto& [other, its] : fake->mapped) EXPECT_TRUE(other != at && its != handle);
    fake->mapped[at] = handle;
    return CUDA_SUCCESS;
  };
  api.unmap = [](CUdeviceptr at, size_t bytes) {
    EXPECT_EQ(bytes, kUnit);
    EXPECT_EQ(fake->mapped.erase(at), 1u);
    fake->open.erase(at);
    return CUDA_SUCCESS;
  };
  api.set_access = [](CUdeviceptr at, size_t bytes, const CUmemAccessDesc*, size_t) {
    for (CUdeviceptr unit = at; unit < at + bytes; unit += kUnit) {
      EXPECT_TRUE(fake->mapped.contains(unit));
      fake->open.insert(unit);
    }
    return CUDA_SUCCESS;
  };
  api.info = [](size_t* free, size_t* total) {
    *free = *total = fake->free;
    return CUDA_SUCCESS;
  };
  return api;
}

class CudaMemoryTest : public ::testing::Test {
 protected:
  CudaMemoryTest() { fake = &driver_; }
  ~CudaMemoryTest() override { fake = nullptr; }

  FakeDriver driver_;
};

TEST_F(CudaMemoryTest, UnitsAreThereWhereBlocksAre) {
  {
    CudaBlockMemory memory(Api(), 0, nullptr);
    std::byte* const pages = memory.Reserve(8 * kUnit).value();
    std::byte* const slots = memory.Reserve(8 * kUnit - 4096).value();
    memory.Back(pages, 4096);
    memory.Back(pages + 4096, 4096);
    EXPECT_EQ(driver_.created.size(), 1u);
    memory.Back(slots + kUnit / 2, 2 * kUnit);  // reaches into three
    EXPECT_TRUE(driver_.IsOpen(pages, kUnit));
    EXPECT_TRUE(driver_.IsOpen(slots, 3 * kUnit));
    EXPECT_EQ(driver_.created.size(), 4u);
    memory.Release(pages, 8 * kUnit);
    EXPECT_TRUE(driver_.IsOpen(slots, 3 * kUnit));
    memory.Release(slots, 8 * kUnit - 4096);
    EXPECT_TRUE(driver_.mapped.empty());
  }
  EXPECT_TRUE(driver_.created.empty());
}

TEST_F(CudaMemoryTest, AUnitGoesWhereItIsNeededWithItsLastBlock) {
  CudaBlockMemory memory(Api(), 0, nullptr);
  std::byte* const pages = memory.Reserve(4 * kUnit).value();
  std::byte* const slots = memory.Reserve(4 * kUnit).value();
  for (int64_t i = 0; i < 8; ++i) memory.Back(pages + i * kUnit / 2, kUnit / 2);
  const auto all = driver_.created;
  memory.GiveBack(pages + 2 * kUnit / 2, kUnit / 2);
  memory.GiveBack(pages + 3 * kUnit / 2, kUnit / 2);
  memory.GiveBack(pages + 4 * kUnit / 2, kUnit / 2);
  EXPECT_EQ(driver_.mapped.size(), 4u) << "left where it was, as nobody needs it";
  memory.Back(slots, kUnit);
  EXPECT_EQ(driver_.created, all);
  EXPECT_FALSE(driver_.IsOpen(pages + kUnit, kUnit));
  EXPECT_TRUE(driver_.IsOpen(pages + 2 * kUnit, kUnit));
  // The other one has a block still, so this takes more than the budget.
  memory.Back(slots + kUnit, kUnit);
  EXPECT_EQ(driver_.created.size(), 5u);
  memory.Back(pages + 2 * kUnit / 2, kUnit / 2);
  EXPECT_TRUE(driver_.IsOpen(pages, 4 * kUnit));
}

TEST_F(CudaMemoryTest, BeyondTheBudgetThereIsOnlyWhatTheGpuHasToSpare) {
  CudaBlockMemory memory(Api(), 0, nullptr);
  std::byte* const pages = memory.Reserve(2 * kUnit).value();
  std::byte* const slots = memory.Reserve(2 * kUnit).value();
  for (int64_t i = 0; i < 4; ++i) memory.Back(pages + i * kUnit / 2, kUnit / 2);
  memory.GiveBack(pages, kUnit / 2);
  memory.GiveBack(pages + 2 * kUnit / 2, kUnit / 2);
  driver_.free = (size_t{1} << 30) + kUnit - 1;
  EXPECT_THROW(memory.Back(slots, kUnit), std::bad_alloc);
  EXPECT_EQ(driver_.created.size(), 2u);
  driver_.free = (size_t{1} << 30) + kUnit;
  memory.Back(slots, kUnit);
  EXPECT_EQ(driver_.created.size(), 3u);
}

TEST_F(CudaMemoryTest, OneWaitIsForSeveralUnits) {
  CudaBlockMemory memory(Api(), 0, nullptr);
  std::byte* const pages = memory.Reserve(4 * kUnit).value();
  std::byte* const slots = memory.Reserve(4 * kUnit).value();
  memory.Back(pages, 4 * kUnit);
  memory.GiveBack(pages, 4 * kUnit);
  memory.Back(slots, kUnit);
  EXPECT_EQ(driver_.mapped.size(), 1u);
  memory.Back(slots + kUnit, 3 * kUnit);
  EXPECT_TRUE(driver_.IsOpen(slots, 4 * kUnit));
  EXPECT_EQ(driver_.created.size(), 4u);
}

TEST_F(CudaMemoryTest, WithoutMemoryNothingHasHappened) {
  driver_.most = 3;
  CudaBlockMemory memory(Api(), 0, nullptr);
  std::byte* const pages = memory.Reserve(20 * kUnit).value();
  std::byte* const slots = memory.Reserve(20 * kUnit).value();
  memory.Back(pages, kUnit);
  memory.Back(pages + kUnit, kUnit);
  EXPECT_THROW(memory.Back(slots, 2 * kUnit), std::bad_alloc);
  memory.Back(slots + 4 * kUnit, kUnit);
  EXPECT_THROW(memory.Back(slots + 5 * kUnit, kUnit), std::bad_alloc);
  memory.GiveBack(pages, kUnit);
  memory.Back(slots + 5 * kUnit, kUnit);
  EXPECT_TRUE(driver_.IsOpen(pages + kUnit, kUnit));
  EXPECT_TRUE(driver_.IsOpen(slots + 4 * kUnit, 2 * kUnit));
  EXPECT_EQ(driver_.mapped.size(), 3u);
}

}  // namespace
}  // namespace dsla::cuda
