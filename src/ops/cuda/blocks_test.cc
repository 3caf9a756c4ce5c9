#include "ops/cuda/blocks.h"

#include <cstring>
#include <random>

#include "ops/norm_rope/cuda/norm_rope_cuda_testing.cuh"

namespace dsla {
namespace {

using CopyOnDeviceTest = GpuTest;

// Every third block stays, the others get the blocks of another array in reverse, or zeros.
TEST_F(CopyOnDeviceTest, CopiesAndClears) {
  std::mt19937 random(1);
  for (const int64_t bytes : {int64_t{16}, int64_t{4096}, int64_t{32784}, int64_t{299008}}) {
    for (const int count : {1, 22, 300}) {
      if (count * bytes > int64_t{32} << 20) continue;
      std::vector<uint32_t> from(static_cast<size_t>(count * bytes / 4)), want = from;
      for (uint32_t& word : from) word = static_cast<uint32_t>(random());
      for (uint32_t& word : want) word = static_cast<uint32_t>(random());
      const DeviceBytes source(from), target(want);
      std::vector<cuda::DeviceCopy> copies;
      for (int i = 0; i < count; ++i) {
        if (i % 3 == 1) continue;
        const int64_t to = i * bytes, at = (count - 1 - i) * bytes;
        const bool zero = i % 3 == 2;
        copies.push_back(
            {target.as<std::byte>() + to, zero ? nullptr : source.as<std::byte>() + at});
        if (zero)
          std::memset(want.data() + to / 4, 0, static_cast<size_t>(bytes));
        else
          std::memcpy(want.data() + to / 4, from.data() + at / 4, static_cast<size_t>(bytes));
      }
      ASSERT_EQ(cuda::CopyOnDevice(copies, bytes, nullptr), cudaSuccess);
      CheckCuda(cudaDeviceSynchronize());
      EXPECT_EQ(ReadAll<uint32_t>(target), want) << count << " of " << bytes;
      EXPECT_EQ(ReadAll<uint32_t>(source), from);
    }
  }
}

}  // namespace
}  // namespace dsla
