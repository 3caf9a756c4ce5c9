// What the tests and the benchmark of this folder share: random layers, tokens, a pool of slots and
// paged caches, and calls of the operator on parts of sequences.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/half.h"
#include "ops/dsla/cpu_wave.h"
#include "ops/dsla/dsla.h"
#include "ops/dsla/slot.h"
#include "ops/testing/expect_close.h"

namespace dsla {

enum class TestGates {
  kTrained,  // half-lives of 256 .. 8192 and 2 .. 64 tokens
  kFloor,    // all at the floor
  kSlow,     // hardly any decay
  kMixed,    // everything from the floor to nothing, depending on the key
};

// One layer's shape and random parameters.
struct TestLayer {
  DslaShape shape;
  std::vector<float> phi_q, phi_k, gate_weight, gate_bias, mix, cos, sin;

  TestLayer(const DslaShape& s, TestGates gates, int positions, uint32_t seed) : shape(s) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t n, float scale) {
      x.resize(static_cast<size_t>(n));
      for (float& v : x) v = scale * normal(rng);
    };
    const int D = s.D;
    for (auto [map, heads] : {std::pair{&phi_q, s.H}, std::pair{&phi_k, s.Hkv}}) {
      fill(*map, int64_t{heads} * D * D, 0.1f);
      for (int64_t i = 0; i < heads; ++i)
        for (int64_t d = 0; d < D; ++d) (*map)[static_cast<size_t>((i * D + d) * D + d)] += 1;
    }
    const int64_t heads = int64_t{s.states} * s.Hkv;
    fill(gate_weight, heads * D * s.F, gates == TestGates::kMixed ? 2.f : 0.05f);
    gate_bias.resize(static_cast<size_t>(heads * s.F));
    std::uniform_real_distribution<float> uniform;
    for (size_t i = 0; i < gate_bias.size(); ++i) {
      const bool history = s.states == 2 && static_cast<int64_t>(i) < heads * s.F / 2;
      const float half_life = (history ? 256 : 2) * std::pow(32.f, uniform(rng));
      // logsigmoid(b) / 16 = -log(2) / half_life
      gate_bias[i] = -std::log(std::expm1(16 * std::log(2.f) / half_life));
      if (gates == TestGates::kFloor) gate_bias[i] = -1000;
      if (gates == TestGates::kSlow) gate_bias[i] = 8;
    }
    mix.resize(static_cast<size_t>(s.H * s.states));
    for (int h = 0; h < s.H; ++h) {
      const float g = s.states == 1 ? 1.f : 0.2f + 0.6f * uniform(rng);
      for (int i = 0; i < s.states; ++i)
        mix[static_cast<size_t>(h * s.states + i)] = i == 0 ? g : 1 - g;
    }
    for (int p = 0; p < positions; ++p) {
      for (int d = 0; d < D / 2; ++d) {
        const double angle = p * std::pow(10000.0, -2.0 * d / D);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }

  DslaParams Params() const {
    return {phi_q.data(), phi_k.data(), gate_weight.data(), gate_bias.data(),
            mix.data(),   cos.data(),   sin.data()};
  }
};

// The tokens of one sequence.
struct TestTokens {
  int count;
  std::vector<float> q;         // [count, H, D]
  std::vector<float> claim;     // [count, H]
  std::vector<std::byte> k, v;  // [count, Hkv, D] of kv_dtype

  TestTokens(const DslaShape& s, int n, uint32_t seed, float scale = 1.5f) : count(n) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    q.resize(static_cast<size_t>(int64_t{n} * s.H * s.D));
    for (float& x : q) x = scale * normal(rng);
    claim.resize(static_cast<size_t>(int64_t{n} * s.H));
    // About the log-sum-exp of a window, so that both parts have a share.
    const float lse = std::log(static_cast<float>(s.window + s.sinks + 1)) + 2;
    for (float& x : claim) x = lse + normal(rng);
    for (std::vector<std::byte>* to : {&k, &v}) {
      to->resize(static_cast<size_t>(int64_t{n} * s.Hkv * s.D * SizeOf(s.kv_dtype)));
      for (size_t i = 0; i < to->size() / static_cast<size_t>(SizeOf(s.kv_dtype)); ++i) {
        const float x = scale * normal(rng);
        const bf16 half = ToBf16(x);
        if (s.kv_dtype == DType::kF32)
          std::memcpy(to->data() + i * 4, &x, 4);
        else
          std::memcpy(to->data() + i * 2, &half, 2);
      }
    }
  }
};

// Of outputs and states. Two things round: the longest sum of the chunked form (a query with the
// concatenated states and with the keys of a chunk, a window and the sinks), and the logits under
// the exponentials of a query's and a key's features, sums of D terms whose size, at most 3 rms for
// the tokens and maps above, becomes a relative error of the exponential.
inline Tolerance DslaTolerance(const DslaShape& s) {
  const double sum = SumTolerance(s.SF() + kDslaChunk + s.window + s.sinks).relative;
  return {sum + 2 * 3 * SumTolerance(s.D).relative};
}

// Outputs of calls that may have had several rows. Where the CPU multiplies bf16, the chunked form
// rounds a bf16 window's queries and weights to it, each to within u, a variance of at most u^2
// / 3. Logits of the tokens above are sums of D products of rms 1.5^2 / sqrt(D): they are off
// by 1.5^2 u / sqrt(3), weights by sqrt(1 + 1.5^4) u / sqrt(3) = 1.4 u of themselves, and what is
// left after the division by their sum by at most sqrt(2) of that, 2 u of outputs' root mean
// square. Single elements have a longer tail than 4 deviations, as a row's queries and the keys
// that count there are larger or smaller together: twice that.
inline void ExpectOutputs(const DslaShape& s, std::span<const float> got,
                          std::span<const float> want) {
  if (!DslaBf16Window(s)) return ExpectClose(got, want, DslaTolerance(s));
  ExpectClose(got, want,
              {DslaTolerance(s).relative + RoundingTolerance(16, DType::kBF16).relative});
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
    size += double{want[i]} * want[i];
  }
  EXPECT_LE(error, size * std::pow(RoundingTolerance(2, DType::kBF16).relative, 2));
}

// Slots filled with a byte that no test expects; Reset one before its first token.
class TestPool {
 public:
  TestPool(const DslaShape& shape, int slots)
      : shape_(shape), layout_(MakeSlotLayout(shape)), slot_bytes_(layout_.bytes + 64) {
    memory_.Resize(slot_bytes_ * slots);
    memory_.Fill(std::byte{0xA5});
  }
  DslaStateView View() { return {memory_.data(), slot_bytes_}; }
  void Reset(int slot) { DslaResetSlot(shape_, View(), slot); }
  std::vector<std::byte> Bytes(int slot) const {
    const std::byte* p = memory_.data() + slot * slot_bytes_;
    return {p, p + layout_.bytes};
  }
  void Write(int slot, const std::vector<std::byte>& bytes) {
    std::memcpy(memory_.data() + slot * slot_bytes_, bytes.data(), bytes.size());
  }
  std::span<const float> State(int slot) {
    return {SlotAt(layout_, View(), slot).state,
            static_cast<size_t>(shape_.Hkv * shape_.SF() * shape_.D)};
  }
  std::span<const float> Norm(int slot) {
    return {SlotAt(layout_, View(), slot).norm, static_cast<size_t>(shape_.Hkv * shape_.SF())};
  }
  // Ring and sinks.
  std::vector<std::byte> Cache(int slot) const {
    const std::byte* p = memory_.data() + slot * slot_bytes_;
    return {p + layout_.ring_k, p + layout_.bytes};
  }
  // Nothing was written behind any slot.
  bool Intact() const {
    for (int64_t i = 0; i < memory_.size(); ++i)
      if (i % slot_bytes_ >= layout_.bytes && memory_[i] != std::byte{0xA5}) return false;
    return true;
  }

 private:
  DslaShape shape_;
  DslaSlotLayout layout_;
  int64_t slot_bytes_;
  Buffer<std::byte> memory_;
};

// Tokens [begin, begin + count) of a sequence that lives in `slot`.
struct TestPart {
  const TestTokens* tokens;
  int begin, count, slot;
};

// The inputs of one call, in rows that are longer than needed.
class TestBatch {
 public:
  TestBatch(const TestLayer& layer, TestPool& pool, std::span<const TestPart> parts) {
    const DslaShape& s = layer.shape;
    args_.shape = s;
    args_.params = layer.Params();
    const int64_t q_row = int64_t{s.H} * s.D, kv_row = int64_t{s.Hkv} * s.D * SizeOf(s.kv_dtype);
    args_.q_stride = q_row + 8;
    row_start_.push_back(0);
    for (const TestPart& part : parts) {
      for (int t = part.begin; t < part.begin + part.count; ++t) {
        const TestTokens& x = *part.tokens;
        q_.insert(q_.end(), x.q.begin() + t * q_row, x.q.begin() + (t + 1) * q_row);
        q_.insert(q_.end(), 8, NAN);
        claim_.insert(claim_.end(), x.claim.begin() + t * s.H, x.claim.begin() + (t + 1) * s.H);
        k_.insert(k_.end(), x.k.begin() + t * kv_row, x.k.begin() + (t + 1) * kv_row);
        v_.insert(v_.end(), x.v.begin() + t * kv_row, x.v.begin() + (t + 1) * kv_row);
      }
      row_start_.push_back(row_start_.back() + part.count);
      pos_.push_back(part.begin);
      slots_.push_back(part.slot);
    }
    out_.assign(static_cast<size_t>(row_start_.back() * q_row), NAN);
    args_.rows = {static_cast<int>(parts.size()), row_start_.data(), pos_.data()};
    args_.slots = slots_.data();
    args_.states = pool.View();
    args_.q = q_.data();
    args_.k = k_.data();
    args_.v = v_.data();
    args_.claim = s.window > 0 ? claim_.data() : nullptr;
    args_.out = out_.data();
  }
  TestBatch(const TestBatch&) = delete;

  const DslaArgs& args() const { return args_; }
  const std::vector<float>& out() const { return out_; }
  std::span<const float> out(int n) const {
    const auto row = static_cast<size_t>(args_.shape.H * args_.shape.D);
    return std::span(out_).subspan(static_cast<size_t>(row_start_[static_cast<size_t>(n)]) * row,
                                   static_cast<size_t>(args_.rows.count(n)) * row);
  }

 private:
  DslaArgs args_;
  std::vector<int32_t> row_start_, pos_, slots_;
  std::vector<float> q_, claim_, out_;
  std::vector<std::byte> k_, v_;
};

}  // namespace dsla
