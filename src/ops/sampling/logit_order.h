// The order of logits in the bits of integers, for what searches a threshold among them. constexpr,
// so that nvcc compiles it for GPUs too. Internal to this folder.
#pragma once

#include <bit>
#include <cstdint>

namespace dsla {

// Rises with the logit, and is equal for zeros of both signs.
constexpr uint32_t KeyOf(float logit) {
  const auto bits = std::bit_cast<uint32_t>(logit + 0.f);  // -0 + 0 = 0
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
constexpr float FromKey(uint32_t key) {
  return std::bit_cast<float>(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// The least logit that min-p keeps: max + temperature * log(min_p), rounded up.
constexpr float LeastOfMinP(float max, double temperature_log_min_p) {
  const double least = max + temperature_log_min_p;
  const auto rounded = static_cast<float>(least);
  return rounded < least ? FromKey(KeyOf(rounded) + 1) : rounded;
}

}  // namespace dsla
