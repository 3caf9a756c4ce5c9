// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random
// Numbers: As Easy as 1, 2, 3", SC 2011: a bijection of the 128-bit counter, chosen by the 64-bit
// key. Any number of the sequence is had at once, without state. constexpr, so that nvcc compiles
// it for GPUs too.
#pragma once

#include <array>
#include <cstdint>

namespace dsla {

constexpr std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  // The multipliers and the key's increments (golden ratio and sqrt(3) - 1) are the paper's.
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kIncrement0 = 0x9E3779B9, kIncrement1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0], product1 = kMultiplier1 * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += kIncrement0;
    key[1] += kIncrement1;
  }
  return counter;
}

// A multiple of 2^-53 in [0, 1), uniform over positions and seeds.
constexpr double UniformAt(uint64_t seed, int64_t position) {
  const uint64_t p = static_cast<uint64_t>(position);
  const std::array<uint32_t, 4> bits =
      Philox4x32({static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), 0, 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t joined = uint64_t{bits[1]} << 32 | bits[0];
  return static_cast<double>(joined >> 11) * 0x1p-53;
}

}  // namespace dsla
