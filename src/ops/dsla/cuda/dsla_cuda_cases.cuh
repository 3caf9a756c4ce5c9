// What the tests of this folder share: shapes, tolerances, calls with the memory that they need,
// paged caches, and the comparison of slots.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>

#include "ops/dsla/cuda/dsla_cuda_testing.cuh"

namespace dsla {

inline bool HaveGpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// Between the form that reads bf16 products of features and decays, and the recurrence: features,
// Q~, K~, e^{G-R}, A, e^R S and the output are rounded to bf16, each to within u; and the same for
// the window's weights. A random walk of 7 roundings stays within 4 standard deviations of
// sqrt(7 / 3) u.
inline constexpr Tolerance kChunkTolerance = RoundingTolerance(8, DType::kBF16);
// Only K~ is rounded on the way to a state: sums over tokens of errors that are each within u of
// their term, 4 standard deviations of a term's u / sqrt(3), per channel (features differ in
// scale).
inline constexpr Tolerance kStateTolerance = RoundingTolerance(4, DType::kBF16);
// Beside that, where gates are mixed: they read keys rounded to fp16, to within 2^-12 (the keys
// themselves are bf16), and a slow gate's relative error is its logit's, as kDecodeStateTolerance
// has it.
inline constexpr Tolerance kMixedStateTolerance{kStateTolerance.relative + 4 * 34 * 0x1p-12 / 1.7};
// Decode rounds its output, and the window's weights to 17 bits, which is nothing beside that.
inline constexpr Tolerance kDecodeTolerance = RoundingTolerance(1, DType::kBF16);
// A slow gate's relative error is its logit's error. The key that gates read has 17 bits; logits of
// TestGates::kMixed have an rms of 2 * 1.5 * sqrt(D) = 34 for D = 128: 4 standard deviations of
// that.
inline constexpr Tolerance kDecodeStateTolerance{4 * 34 * 0x1p-17 / 1.7};

struct Case {
  const char* name;
  int H, Hkv, D, F, states, window, sinks;
  TestGates gates;
  Tolerance StateTolerance() const {
    return gates == TestGates::kMixed ? kMixedStateTolerance : kStateTolerance;
  }
};

inline DslaShape Shape(const Case& c) {
  DslaShape s;
  s.H = c.H;
  s.Hkv = c.Hkv;
  s.D = c.D;
  s.F = c.F;
  s.states = c.states;
  s.window = c.window;
  s.sinks = c.sinks;
  s.gate_floor = -2.5f;
  return s;
}

// The device's copy of a batch and of a pool.
struct GpuCall {
  GpuCall(const GpuLayer& layer, const TestBatch& batch, const TestPool& pool, int pool_slots)
      : shape(layer.host.shape), slots_in_pool(pool_slots) {
    const DslaArgs& a = batch.args();
    const int T = a.rows.row_start[a.rows.N];
    std::vector<bf16> q(static_cast<size_t>(T * (a.q_stride)));
    for (size_t i = 0; i < q.size(); ++i) q[i] = ToBf16(a.q[i]);
    const int64_t kv = int64_t{T} * shape.Hkv * shape.D;
    const auto put = [&](const auto* data, int64_t n) {
      using E = std::remove_cvref_t<decltype(*data)>;
      memory.push_back(std::make_unique<DeviceBytes>(std::span<const E>(data, size_t(n))));
      return memory.back()->template as<E>();
    };
    args.shape = shape;
    args.layout = MakeSlotLayout(shape);
    args.weights = layer.weights();
    args.rows = {a.rows.N, put(a.rows.row_start, a.rows.N + 1), put(a.rows.pos, a.rows.N)};
    args.T = T;
    args.slots = put(a.slots, a.rows.N);
    args.q = put(q.data(), static_cast<int64_t>(q.size()));
    args.q_stride = a.q_stride;
    args.k = put(static_cast<const bf16*>(a.k), kv);
    args.v = put(static_cast<const bf16*>(a.v), kv);
    args.k_stride = args.v_stride = shape.Hkv * shape.D;
    if (a.claim) args.claim = put(a.claim, int64_t{T} * shape.H);
    const DslaStateView view = const_cast<TestPool&>(pool).View();
    states = std::make_unique<DeviceBytes>(view.slot_bytes * pool_slots);
    states->Write(view.base);
    args.states = {states->as<std::byte>(), view.slot_bytes};
    out = std::make_unique<DeviceBytes>(int64_t{T} * shape.H * shape.D * 2);
    args.out = out->as<void>();
  }

  void Work(int64_t bytes) {
    workspace = std::make_unique<DeviceBytes>(bytes);
    args.workspace = workspace->as<void>();
    args.workspace_bytes = bytes;
  }
  void Decode() {
    Work(cuda::DecodeWorkspaceBytes(shape, args.rows.N));
    CheckCuda(cuda::Decode(args, nullptr));
    CheckCuda(cudaDeviceSynchronize());
  }
  void Prefill(int chunks) {
    Work(cuda::PrefillWorkspaceBytes(shape, args.rows.N, args.T, chunks));
    CheckCuda(cuda::Prefill(args, nullptr));
    CheckCuda(cudaDeviceSynchronize());
  }
  std::vector<float> Out() const {
    std::vector<bf16> x(static_cast<size_t>(out->bytes() / 2));
    out->Read(x.data());
    std::vector<float> y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = ToFloat(x[i]);
    return y;
  }
  void ReadPool(TestPool& pool) const { states->Read(pool.View().base); }

  DslaShape shape;
  int slots_in_pool;
  cuda::DslaCudaArgs args;
  std::vector<std::unique_ptr<DeviceBytes>> memory;
  std::unique_ptr<DeviceBytes> states, out, workspace;
};

inline std::vector<TestTokens> MakeSequences(const DslaShape& s, const std::vector<int>& lengths) {
  std::vector<TestTokens> all;
  for (size_t i = 0; i < lengths.size(); ++i) {
    all.emplace_back(s, lengths[i], static_cast<uint32_t>(100 + i));
    RoundToBf16(all.back().q);
  }
  return all;
}

// Slots in `pool` against those of `want`: states within a tolerance, ring and sinks exactly.
inline void ExpectSlots(int D, TestPool& got, TestPool& want, const std::vector<int>& slots,
                        Tolerance tolerance) {
  for (int slot : slots) {
    SCOPED_TRACE("slot " + std::to_string(slot));
    const auto a = got.State(slot), b = want.State(slot);
    for (size_t channel = 0; channel < a.size() / static_cast<size_t>(D); ++channel) {
      const auto row = static_cast<size_t>(D);
      // What has decayed to 2^-100 of what enters is nothing, and near fp32's end it has few bits.
      const auto tiny = [](std::span<const float> x) {
        return std::all_of(x.begin(), x.end(), [](float y) { return std::abs(y) < 0x1p-100f; });
      };
      if (tiny(a.subspan(channel * row, row)) && tiny(b.subspan(channel * row, row))) continue;
      const auto close =
          IsClose(a.subspan(channel * row, row), b.subspan(channel * row, row), tolerance);
      EXPECT_TRUE(close) << "channel " << channel;
      if (!close) break;
    }
    ExpectClose(got.Norm(slot), want.Norm(slot), tolerance);
    EXPECT_EQ(got.Cache(slot), want.Cache(slot));
  }
  EXPECT_TRUE(got.Intact());
}

}  // namespace dsla
