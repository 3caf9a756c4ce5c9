// RMSNorm, rotary position embedding and the gated activation: the elementwise steps of a decoder
// layer, fp32.
#pragma once

#include <cstdint>
#include <span>

#include "base/buffer.h"
#include "base/exec.h"

namespace dsla {

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight. x, out: [T, C] dense; they may be the same.
void RmsNorm(const ExecContext& ctx, const float* x, const float* weight, float eps, int64_t T,
             int64_t C, float* out);

// One row, on the calling thread: for LinearInput::Fill, which rounds it for a product meanwhile.
// x += delta (null: nothing), then as RmsNorm. x, delta, out: [C].
void AddRmsNormRow(float* x, const float* delta, const float* weight, float eps, int64_t C,
                   float* out);
// out[j] = silu(gate_up[j]) * gate_up[ffn + j] for j in [begin, end). gate_up: [2 ffn], out: [ffn].
void SiluMulRow(const float* gate_up, int64_t ffn, int64_t begin, int64_t end, float* out);

// cos and sin of every position's rotation angles, computed in fp64 once. Immutable, thread-safe.
class RopeTable {
 public:
  RopeTable() = default;
  // frequencies: [D/2] angle per position (RopeConfig::Frequencies).
  RopeTable(std::span<const double> frequencies, int64_t positions);

  int64_t positions() const { return positions_; }
  int D() const { return 2 * half_; }
  const float* cos() const { return cos_.data(); }  // [positions, D/2]
  const float* sin() const { return sin_.data(); }  // [positions, D/2]

 private:
  int64_t positions_ = 0;
  int half_ = 0;
  Buffer<float> cos_, sin_;
};

// Rotates x in place, pairs (d, d + D/2): x[t, h] at position positions[t]. Where norm_weight [D]
// is given, each head is RMS-normalised by it first (Qwen3).
struct RopeArgs {
  float* x = nullptr;  // [T, heads, D]
  int64_t stride = 0;  // floats between rows
  int64_t T = 0;
  int heads = 0;
  const int32_t* positions = nullptr;  // [T], each < table->positions()
  const RopeTable* table = nullptr;
  const float* norm_weight = nullptr;
  float norm_eps = 0;
};
void NormRope(const ExecContext& ctx, const RopeArgs& args);

// The oracles: fp64, scalar, one thread.
void RmsNormRef(const float* x, const float* weight, float eps, int64_t T, int64_t C, float* out);
void SiluMulRef(const float* gate_up, int64_t T, int64_t ffn, float* out);
void NormRopeRef(const RopeArgs& args);

}  // namespace dsla
