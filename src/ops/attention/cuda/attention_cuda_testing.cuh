// What the attention tests share: batches of queries, keys and values that bf16 holds exactly, and
// their copies on the device. All workspaces, outputs, gaps between rows, and places of the cache
// that no token fills are NaN before a call.
// Not a .h: it needs the CUDA headers, which a build without a toolkit does not have.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/paging.h"
#include "ops/dsla/cuda/dsla_cuda_testing.cuh"

namespace dsla {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline bool HaveGpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

enum class Scores {
  kNormal,   // standard deviation 1
  kSharp,    // standard deviation 30: few keys count
  kRising,   // each key counts more than all before it
  kFalling,  // the first visible key is nearly all there is
};

struct Case {
  const char* name;
  int H, Hkv, D, page_size, window;
  Scores scores;
};

struct Sequence {
  int cached, rows;
};

// fp32's part of the error: scores err by a sum of D terms at their own size, which is a relative
// error of the weights; then come the sums over the keys.
inline double SumsError(const Case& c, int keys) {
  const double size = c.scores == Scores::kNormal ? 1 : c.scores == Scores::kSharp ? 30 : 60;
  return SumTolerance(keys).relative + size * SumTolerance(c.D).relative;
}
// The output's rounding, and weights of two bf16 terms.
inline Tolerance DecodeTolerance(const Case& c, int keys) {
  return {RoundingTolerance(1, DType::kBF16).relative + 0x1p-17 + SumsError(c, keys)};
}

// A batch on the host: pages in shuffled order from a larger pool, some more of them than needed.
class Batch {
 public:
  Batch(const Case& c, const std::vector<Sequence>& sequences, uint32_t seed)
      : case_(c), sequences_(sequences), rng_(seed) {
    std::vector<int> pages_of;
    page_start_ = {3};  // offsets need not begin at 0
    for (const Sequence& s : sequences) {
      pos.push_back(s.rows > 0 || s.cached > 0 ? s.cached : -1);
      row_start.push_back(row_start.back() + s.rows);
      const int tokens = s.cached + s.rows;
      page_start_.push_back(page_start_.back() + (tokens + c.page_size - 1) / c.page_size +
                            static_cast<int>(pos.size()) % 2);
    }
    pages_.resize(static_cast<size_t>(page_start_.back() + 2));
    std::iota(pages_.begin(), pages_.end(), 0);
    std::shuffle(pages_.begin(), pages_.end(), rng_);
    kv_.page_size = c.page_size;
    kv_.Hkv = c.Hkv;
    kv_.D = c.D;
    kv_.page_stride = int64_t{c.Hkv} * c.page_size * c.D + 8;  // pages need not touch
    k.assign(pages_.size() * static_cast<size_t>(kv_.page_stride), ToBf16(kNaN));
    v = k;
    for (int n = 0; n < N(); ++n)
      for (int s = 0;
           s < sequences[static_cast<size_t>(n)].cached + sequences[static_cast<size_t>(n)].rows;
           ++s)
        Put(n, s);
    q_stride = c.H * c.D + 24;
    q.assign(static_cast<size_t>(std::max(T(), 1) * q_stride), kNaN);
    for (int row = 0; row < T(); ++row)
      for (int i = 0; i < c.H * c.D; ++i)
        q[static_cast<size_t>(row * q_stride + i)] = Query(i % c.D);
    RoundToBf16(q);
  }

  int N() const { return static_cast<int>(sequences_.size()); }
  int T() const { return row_start.back(); }
  const std::vector<int32_t>& page_start() const { return page_start_; }
  const std::vector<int32_t>& pages() const { return pages_; }
  PagedKvView kv() const {  // without pointers
    return kv_;
  }
  float scale() const { return 1 / std::sqrt(static_cast<float>(case_.D)); }
  // [T, Hkv, D] out of the pages, with a gap between rows.
  int64_t new_stride() const { return case_.Hkv * case_.D + 8; }
  std::vector<bf16> NewRows(const std::vector<bf16>& from) const {
    std::vector<bf16> to(static_cast<size_t>(std::max(T(), 1) * new_stride()), ToBf16(kNaN));
    for (int n = 0; n < N(); ++n)
      for (int i = 0; i < sequences_[static_cast<size_t>(n)].rows; ++i)
        for (int h = 0; h < case_.Hkv; ++h)
          std::copy_n(
              from.begin() + RowOffset(kv_, {page_start_.data(), pages_.data()}, n, h,
                                       sequences_[static_cast<size_t>(n)].cached + i),
              case_.D,
              to.begin() + (row_start[static_cast<size_t>(n)] + i) * new_stride() + h * case_.D);
    return to;
  }
  int keys(int n) const {
    return sequences_[static_cast<size_t>(n)].cached + sequences_[static_cast<size_t>(n)].rows;
  }

  // [T, H, D], with the sequences' keys up to pos[n] + rows - 1.
  std::vector<float> Reference(int window) const { return Attend(k, v, window, scale(), nullptr); }
  // The same of other keys and values, which lie as k and v do; lse: [T, H] or null.
  template <typename T1>
  std::vector<float> Attend(const std::vector<T1>& keys, const std::vector<T1>& values, int window,
                            float scale, float* lse) const {
    std::vector<float> out(static_cast<size_t>(T() * case_.H * case_.D), kNaN);
    PagedAttentionArgs a;
    a.rows = {N(), row_start.data(), pos.data()};
    a.tables = {page_start_.data(), pages_.data()};
    a.kv = kv_;
    a.kv.dtype = sizeof(T1) == 2 ? DType::kBF16 : DType::kF32;
    a.kv.k = const_cast<T1*>(keys.data());
    a.kv.v = const_cast<T1*>(values.data());
    a.H = case_.H;
    a.scale = scale;
    a.sliding_window = window;
    a.q = q.data();
    a.q_stride = q_stride;
    a.out = out.data();
    a.lse = lse;
    PagedAttentionRef(a);
    return out;
  }
  // Sequence by sequence, since the sums' lengths differ.
  template <typename ToleranceOf>
  void ExpectNear(const std::vector<float>& got, int window, ToleranceOf&& tolerance) const {
    const std::vector<float> want = Reference(window);
    const auto row = static_cast<size_t>(case_.H * case_.D);
    for (int n = 0; n < N(); ++n) {
      const auto at = static_cast<size_t>(n);
      SCOPED_TRACE("sequence " + std::to_string(n) + ", position " + std::to_string(pos[at]) +
                   ", rows " + std::to_string(row_start[at + 1] - row_start[at]));
      const size_t begin = static_cast<size_t>(row_start[at]) * row;
      const size_t count = static_cast<size_t>(row_start[at + 1]) * row - begin;
      ExpectClose(std::span(got).subspan(begin, count), std::span(want).subspan(begin, count),
                  tolerance(case_, keys(n)));
    }
  }

  // Makes keys and values of a sequence NaN.
  void Poison(int n) {
    for (int s = 0; s < keys(n); ++s)
      for (int h = 0; h < case_.Hkv; ++h) {
        const int64_t at = RowOffset(kv_, {page_start_.data(), pages_.data()}, n, h, s);
        std::fill_n(k.begin() + at, case_.D, ToBf16(kNaN));
        std::fill_n(v.begin() + at, case_.D, ToBf16(kNaN));
      }
  }

  std::vector<int32_t> row_start{0}, pos;
  std::vector<bf16> k, v;
  std::vector<float> q;
  int q_stride = 0;

 private:
  float Query(int d) {
    switch (case_.scores) {
      case Scores::kNormal:
        return normal_(rng_);
      case Scores::kSharp:
        return 30 * normal_(rng_);
      default:
        return d == 0 ? std::sqrt(static_cast<float>(case_.D)) : 0.5f * normal_(rng_);
    }
  }
  void Put(int n, int s) {
    for (int h = 0; h < case_.Hkv; ++h) {
      const auto at =
          static_cast<size_t>(RowOffset(kv_, {page_start_.data(), pages_.data()}, n, h, s));
      for (int d = 0; d < case_.D; ++d) {
        k[at + static_cast<size_t>(d)] = ToBf16(normal_(rng_));
        v[at + static_cast<size_t>(d)] = ToBf16(normal_(rng_));
      }
      // Score 60 of an early or late key and less by steps towards the other end.
      if (case_.scores == Scores::kRising) k[at] = ToBf16(std::min(60.f, 0.5f * float(s % 120)));
      if (case_.scores == Scores::kFalling) k[at] = ToBf16(std::max(0.f, 60 - 0.5f * float(s)));
    }
  }

  Case case_;
  std::vector<Sequence> sequences_;
  std::mt19937 rng_;
  std::normal_distribution<float> normal_;
  std::vector<int32_t> page_start_, pages_;
  PagedKvView kv_;
};

// The device's copy of a batch, and calls on it.
class Gpu {
 public:
  Gpu(const Case& c, const Batch& b)
      : row_start(b.row_start),
        pos(b.pos),
        page_start(b.page_start()),
        pages(b.pages()),
        k(b.k),
        v(b.v),
        q(ToBf16s(b.q)),
        new_k(b.NewRows(b.k)),
        new_v(b.NewRows(b.v)),
        rows(std::vector<int32_t>{b.N()}),
        out(int64_t{std::max(b.T(), b.N())} * c.H * c.D * 2) {
    PagedKvView kv = b.kv();
    kv.k = k.as<void>();
    kv.v = v.as<void>();
    decode.N = b.N();
    decode.rows = rows.as<int32_t>();
    decode.pos = pos.as<int32_t>();
    prefill.rows = {b.N(), row_start.as<int32_t>(), pos.as<int32_t>()};
    prefill.host_row_start = b.row_start.data();
    prefill.host_pos = b.pos.data();
    prefill.k_stride = prefill.v_stride = b.new_stride();
    const auto common = [&](auto& a) {
      a.tables = {page_start.as<int32_t>(), pages.as<int32_t>()};
      a.kv = kv;
      a.H = c.H;
      a.scale = b.scale();
      a.sliding_window = c.window;
      a.q = q.as<void>();
      a.q_stride = b.q_stride;
      a.out = out.as<void>();
    };
    common(decode);
    common(prefill);
    decode_bytes = cuda::DecodeAttentionWorkspaceBytes(b.N(), c.H, c.Hkv, c.D);
    prefill_bytes = cuda::PrefillAttentionWorkspaceBytes(b.N(), b.T(), c.H, c.Hkv, c.D);
  }

  std::vector<float> Decode() {
    const DeviceBytes workspace(decode_bytes);
    decode.workspace = workspace.as<void>();
    decode.workspace_bytes = workspace.bytes();
    out.Poison();
    CheckCuda(cuda::DecodeAttention(decode, nullptr));
    CheckCuda(cudaDeviceSynchronize());
    return Out();
  }
  std::vector<float> Prefill(const DeviceBytes& workspace, bool new_plan) {
    prefill.workspace = workspace.as<void>();
    prefill.workspace_bytes = workspace.bytes();
    out.Poison();
    CheckCuda(cuda::PrefillAttention(prefill, new_plan, nullptr));
    CheckCuda(cudaDeviceSynchronize());
    return Out();
  }
  std::vector<float> Out() const {
    std::vector<bf16> x(static_cast<size_t>(out.bytes() / 2));
    out.Read(x.data());
    std::vector<float> y;
    for (const bf16 e : x) y.push_back(ToFloat(e));
    return y;
  }

  DeviceBytes row_start, pos, page_start, pages, k, v, q, new_k, new_v, rows, out;
  cuda::DecodeAttentionArgs decode;
  cuda::PrefillAttentionArgs prefill;
  int64_t decode_bytes = 0, prefill_bytes = 0;

 private:
  static std::vector<bf16> ToBf16s(const std::vector<float>& x) {
    std::vector<bf16> y;
    for (const float e : x) y.push_back(ToBf16(e));
    return y;
  }
};

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
inline bool AllNaN(std::span<const float> x) {
  return std::all_of(x.begin(), x.end(), [](float e) { return std::isnan(e); });
}

inline const auto kCases =
    ::testing::Values(Case{"g1", 4, 4, 128, 64, 0, Scores::kNormal},
                      Case{"g1_window", 2, 2, 128, 64, 100, Scores::kNormal},
                      Case{"g1_rising", 2, 2, 128, 16, 0, Scores::kRising},
                      Case{"g3_small", 9, 3, 64, 64, 0, Scores::kNormal},
                      Case{"g3_small_window", 9, 3, 64, 32, 777, Scores::kSharp},
                      Case{"g4", 8, 2, 128, 64, 0, Scores::kSharp},
                      Case{"g4_falling", 4, 1, 128, 48, 0, Scores::kFalling},
                      Case{"g4_falling_window", 4, 1, 64, 16, 65, Scores::kFalling},
                      Case{"g8", 8, 1, 128, 128, 0, Scores::kNormal},
                      Case{"g8_window_of_one", 8, 1, 64, 64, 1, Scores::kNormal},
                      Case{"g12_in_two", 12, 1, 64, 64, 0, Scores::kRising});

}  // namespace dsla
