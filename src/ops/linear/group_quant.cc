#include "ops/linear/group_quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/half.h"

namespace dsla {
namespace {

// One group of one feature; `count` inputs, at most kQuantGroup.
struct Group {
  f16 d, m;
  uint8_t q[kQuantGroup];
};

// Nearest integer, of halves the even one, as std::nearbyint; |x| < 2^22. Without SSE4.1 nearbyint
// is a call, and a model has 10^8 weights to round at every start.
float Nearest(float x) {
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: its last place is 1
  return (x + kShift) - kShift;
}

// Rounds to d q + m with q in [-limit, limit]; the sum of squared errors.
double Round(const float* w, int64_t count, float limit, Group& g) {
  const float d = ToFloat(g.d), m = ToFloat(g.m), inverse = d > 0 ? 1.f / d : 0.f;
  double error = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float q = Nearest(std::clamp((w[i] - m) * inverse, -limit, limit));
    g.q[i] = static_cast<uint8_t>(static_cast<int8_t>(q));
    const double off = double{d} * q + m - w[i];
    error += off * off;
  }
  return error;
}

Group QuantizeInt8(const float* w, int64_t count) {
  constexpr float kSymmetric = 127, kCentred = 120;
  const auto [low, high] = std::minmax_element(w, w + count);
  Group symmetric{}, centred{};
  symmetric.d = ToF16(std::max(-*low, *high) / kSymmetric);
  centred.d = ToF16((*high - *low) / (2 * kCentred));
  centred.m = ToF16(*low + (*high - *low) / 2);
  const double error = Round(w, count, kSymmetric, symmetric);
  if (error == 0) return symmetric;  // the group of a Q8_0 file
  return Round(w, count, kCentred, centred) < error ? centred : symmetric;
}

Group QuantizeInt4(const float* w, int64_t count) {
  Group g{};
  const auto [low, high] = std::minmax_element(w, w + count);
  g.m = ToF16(*low);
  const float m = ToFloat(g.m);
  g.d = ToF16((*high - m) / 15.f);
  const float d = ToFloat(g.d), inverse = d > 0 ? 1.f / d : 0.f;
  for (int64_t i = 0; i < count; ++i)
    g.q[i] = static_cast<uint8_t>(Nearest(std::clamp((w[i] - m) * inverse, 0.f, 15.f)));
  return g;
}

}  // namespace

void GroupQuantize(const GroupQuantShape& shape, const float* weight, uint8_t* to) {
  DSLA_CHECK(shape.bits == 8 || shape.bits == 4);
  std::memset(to, 0, static_cast<size_t>(shape.bytes()));
  for (int64_t o = 0; o < shape.out; ++o) {
    uint8_t* const block = to + o / kQuantBlock * shape.block_bytes();
    const int64_t lane = o % kQuantBlock;
    auto* const d = reinterpret_cast<uint16_t*>(block);
    uint16_t* const m = d + shape.groups() * kQuantBlock;
    for (int64_t g = 0; g < shape.groups(); ++g) {
      const float* w = weight + o * shape.in + g * kQuantGroup;
      const int64_t count = std::min<int64_t>(kQuantGroup, shape.in - g * kQuantGroup);
      const Group group = shape.bits == 8 ? QuantizeInt8(w, count) : QuantizeInt4(w, count);
      d[g * kQuantBlock + lane] = group.d.bits;
      m[g * kQuantBlock + lane] = group.m.bits;
      uint8_t* const q = block + shape.header_bytes() + g * shape.group_bytes() + 4 * lane;
      for (int i = 0; i < kQuantGroup; ++i) {
        const int chunk = i / 4;
        if (shape.bits == 8)
          q[chunk * 32 + i % 4] = group.q[i];
        else
          q[chunk % 4 * 32 + i % 4] |= static_cast<uint8_t>(group.q[i] << (chunk < 4 ? 0 : 4));
      }
    }
  }
}

}  // namespace dsla
