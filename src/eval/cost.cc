#include "eval/cost.h"

#include <algorithm>

namespace dsla {
namespace {

// sum over t < tokens of min(t + 1, window): keys that causal attention reads, window 0 = all.
double CausalKeys(int64_t tokens, int64_t window) {
  const auto n = static_cast<double>(tokens);
  if (window == 0 || window >= tokens) return n * (n + 1) / 2;
  const auto w = static_cast<double>(window);
  return w * (w + 1) / 2 + (n - w) * w;
}
// The same of the tokens after `depth`.
double CausalKeys(int64_t tokens, int64_t depth, int64_t window) {
  return CausalKeys(depth + tokens, window) - CausalKeys(depth, window);
}

// One DSLA layer, all tokens.
double DslaFlops(const ModelConfig& c, const DslaShape& s, int rank, int64_t tokens,
                 int64_t depth) {
  const double H = c.H, Hkv = c.Hkv, D = c.D, SF = s.SF(), C = c.C;
  const auto n = static_cast<double>(tokens);
  const double deltas = 2 * 2.0 * rank * (C + H * D) + (s.window > 0 ? 2 * H * C : 0);
  const double features = 2 * (H + Hkv) * D * D + 2 * Hkv * D * SF;  // maps and gates
  // Chunk form: scores and their product with V over half a chunk on average, the state's read and
  // its update.
  const double chunk =
      H * (kDslaChunk / 2.0) * 2 * (SF + D + 1) + 2 * H * SF * (D + 1) + 2 * Hkv * SF * (D + 1);
  const double window =
      s.window > 0 ? 4 * H * D * (CausalKeys(tokens, depth, s.window) / n + s.sinks) : 0;
  return n * (deltas + features + chunk + window);
}

}  // namespace

int64_t DecodeBytes(const HybridModel& model, int level, int64_t length, int sequences) {
  const ModelConfig& c = model.config();
  const int64_t kv_token = 2 * c.Hkv * KvRowBytes(model.options().kv_dtype, c.D);
  const int64_t seen = c.sliding_window > 0 ? std::min<int64_t>(length, c.sliding_window) : length;
  int64_t cache = (c.L - level) * kv_token * seen;
  for (int rank = 0; rank < level; ++rank) {
    const DslaShape& shape = model.dsla_shape(model.adapter()->ladder[rank]);
    const int64_t states = int64_t{shape.Hkv} * shape.SF() * (shape.D + 1) * 4;
    cache += 2 * states +
             (shape.window + shape.sinks) * 2 * shape.Hkv * KvRowBytes(shape.kv_dtype, shape.D);
  }
  return model.weight_bytes(level) + sequences * cache;
}

double PrefillFlops(const HybridModel& model, int level, int64_t tokens, int64_t depth) {
  const ModelConfig& c = model.config();
  const auto n = static_cast<double>(tokens);
  const double q = 1.0 * c.H * c.D, kv = 1.0 * c.Hkv * c.D;
  const double dense = 2.0 * c.C * (q + 2 * kv) + 2.0 * q * c.C + 6.0 * c.C * c.ffn;
  double flops = n * c.L * dense + 2.0 * c.C * c.V;
  flops += (c.L - level) * 4.0 * q * CausalKeys(tokens, depth, c.sliding_window);
  for (int rank = 0; rank < level; ++rank) {
    const int layer = model.adapter()->ladder[rank];
    flops += DslaFlops(c, model.dsla_shape(layer), model.delta_rank(layer), tokens, depth);
  }
  return flops;
}

int64_t CacheBytesAt(const HybridModel& model, int level, int64_t length) {
  const CacheGeometry geometry = model.cache_geometry();
  return SequenceBytes({.layers = model.config().L,
                        .page_size = geometry.page_size,
                        .page_bytes = geometry.page_bytes(),
                        .slot_bytes = geometry.slot_block_bytes()},
                       level, length);
}

}  // namespace dsla
