// What the tests of this folder share. Not a .h, as what it includes.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "ops/dsla/cuda/dsla_cuda_testing.cuh"

namespace dsla {

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
      GTEST_SKIP() << "SKIPPED: no CUDA device here";
  }
};

inline std::vector<float> Random(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 random(20250102 + seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}
// Values that bf16 holds exactly.
inline std::vector<float> RandomExact(int64_t n, uint32_t seed, float scale = 1) {
  std::vector<float> values = Random(n, seed, scale);
  RoundToBf16(values);
  return values;
}

inline std::vector<uint16_t> Bits(const std::vector<float>& x) {
  std::vector<uint16_t> bits;
  for (const float value : x) bits.push_back(ToBf16(value).bits);
  return bits;
}
inline std::vector<float> Floats(const std::vector<uint16_t>& bits) {
  std::vector<float> x;
  for (const uint16_t value : bits) x.push_back(ToFloat(bf16{value}));
  return x;
}
template <typename T>
std::vector<T> ReadAll(const DeviceBytes& memory) {
  std::vector<T> values(static_cast<size_t>(memory.bytes()) / sizeof(T));
  memory.Read(values.data());
  return values;
}
inline std::vector<uint16_t> ReadBits(const DeviceBytes& memory) {
  return ReadAll<uint16_t>(memory);
}

}  // namespace dsla
