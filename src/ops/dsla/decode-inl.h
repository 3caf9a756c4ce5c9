// The recurrent form (cpu_decode.h). Included once per Highway target.

#if defined(DSLA_OPS_DSLA_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_DSLA_DECODE_INL_H_
#undef DSLA_OPS_DSLA_DECODE_INL_H_
#else
#define DSLA_OPS_DSLA_DECODE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "ops/dsla/cpu_decode.h"
#include "ops/dsla/features-inl.h"
#include "ops/dsla/slot.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace {  // of the one file that includes this

HWY_INLINE void ToFloats(DType dtype, const void* from, int64_t index, int n, float* to) {
  if (dtype == DType::kF32)
    ConvertRow(static_cast<const float*>(from) + index, to, static_cast<size_t>(n));
  else
    ConvertRow(static_cast<const bf16*>(from) + index, to, static_cast<size_t>(n));
}

void DecodeKeys(const DslaDecode& batch, int h, int begin, int end, float* scratch) {
  const F32 d;
  const DslaArgs& args = *batch.args;
  const DslaShape& shape = args.shape;
  const DslaParams& params = args.params;
  const int D = shape.D, F = shape.F, SF = shape.SF(), W = shape.window, n = end - begin;
  float* k = scratch;                      // [n, D]
  float* unrotated = k + kDecodeRows * D;  // [n, D]
  float* y = unrotated + kDecodeRows * D;  // [n, D]
  float* logits = y + kDecodeRows * D;     // [n, SF]
  for (int j = 0; j < n; ++j) {
    const DslaDecodeRow& row = batch.rows[begin + j];
    if (!batch.HasStates(row)) {  // computed with the others, used by nobody
      std::memset(k + j * D, 0, sizeof(float) * static_cast<size_t>(D));
      std::memset(unrotated + j * D, 0, sizeof(float) * static_cast<size_t>(D));
      continue;
    }
    const DslaSlot slot = SlotAt(batch.layout, args.states, args.slots[row.n]);
    const int64_t at =
        W > 0 ? (static_cast<int64_t>(h) * W + row.t % W) * D : (row.row * shape.Hkv + h) * D;
    ToFloats(shape.kv_dtype, W > 0 ? slot.ring_k : args.k, at, D, k + j * D);
    ToFloats(shape.kv_dtype, W > 0 ? slot.ring_v : args.v, at, D,
             batch.v + (static_cast<int64_t>(begin + j) * shape.Hkv + h) * D);
    const int64_t position = batch.Entering(row) * (D / 2);
    Unrotate(k + j * D, params.rope_cos + position, params.rope_sin + position, D,
             unrotated + j * D);
  }
  for (int i = 0; i < shape.states; ++i)
    Project(unrotated, params.gate_weight + (static_cast<int64_t>(i) * shape.Hkv + h) * D * F,
            logits + i * F, SF, n, F, D);
  Project(k, params.phi_k + static_cast<int64_t>(h) * D * D, y, D, n, D, D);
  HWY_ALIGN float phi[512];
  const V32 floor = hn::Set(d, shape.gate_floor);
  for (int j = 0; j < n; ++j) {
    float inverse[2];
    ExpFeatures(y + j * D, D, F, phi, inverse);
    const int64_t to = (static_cast<int64_t>(begin + j) * shape.Hkv + h) * SF;
    for (int f = 0; f < SF; f += kTileLanes) {
      const int64_t bias = (static_cast<int64_t>(f / F) * shape.Hkv + h) * F + f % F;
      const V32 a = LogGate(d, hn::LoadU(d, logits + j * SF + f),
                            hn::LoadU(d, params.gate_bias + bias), floor);
      const V32 p = hn::Mul(hn::LoadU(d, phi + f % F), hn::Set(d, inverse[f % F / D]));
      hn::StoreU(Exp(d, a), d, batch.decay + to + f);
      hn::StoreU(hn::Mul(hn::Neg(Expm1(d, a)), p), d, batch.gain + to + f);
    }
  }
}

void DecodeQueries(const DslaDecode& batch, int h, int begin, int end, float* scratch) {
  const F32 d;
  const DslaArgs& args = *batch.args;
  const DslaShape& shape = args.shape;
  const int D = shape.D, F = shape.F, SF = shape.SF(), n = end - begin;
  float* q = scratch;              // [n, D]
  float* y = q + kDecodeRows * D;  // [n, D]
  for (int j = 0; j < n; ++j)
    std::memcpy(q + j * D, args.q + batch.rows[begin + j].row * args.q_stride + h * D,
                sizeof(float) * static_cast<size_t>(D));
  Project(q, args.params.phi_q + static_cast<int64_t>(h) * D * D, y, D, n, D, D);
  HWY_ALIGN float phi[512];
  for (int j = 0; j < n; ++j) {
    float inverse[2];
    ExpFeatures(y + j * D, D, F, phi, inverse);
    float* to = batch.query + (static_cast<int64_t>(begin + j) * shape.H + h) * SF;
    for (int f = 0; f < SF; f += kTileLanes) {
      const float scale = args.params.mix[h * shape.states + f / F] * inverse[f % F / D];
      hn::StoreU(hn::Mul(hn::Set(d, scale), hn::LoadU(d, phi + f % F)), d, to + f);
    }
  }
}

void DecodeStates(const DslaDecode& batch, int r, int h, int block) {
  const F32 d;
  const DslaArgs& args = *batch.args;
  const DslaShape& shape = args.shape;
  const int D = shape.D, SF = shape.SF(), G = shape.G();
  const DslaDecodeRow& row = batch.rows[r];
  if (!batch.HasStates(row)) return;
  const DslaSlot slot = SlotAt(batch.layout, args.states, args.slots[row.n]);
  float* state = slot.state + static_cast<int64_t>(h) * SF * D;
  float* norm = slot.norm + static_cast<int64_t>(h) * SF;
  const int64_t entering = static_cast<int64_t>(r) * shape.Hkv + h;
  const float* decay = batch.decay + entering * SF;
  const float* gain = batch.gain + entering * SF;
  const float* v = batch.v + entering * D;
  const float* query = batch.query + (static_cast<int64_t>(r) * shape.H + h * G) * SF;
  const int64_t out = (static_cast<int64_t>(r) * batch.Blocks() + block) * shape.H + h * G;

  const int begin = block * kDecodeStateRows, end = std::min(SF, begin + kDecodeStateRows);
  for (int f = begin; f < end; f += kTileLanes)
    hn::StoreU(hn::MulAdd(hn::LoadU(d, decay + f), hn::LoadU(d, norm + f), hn::LoadU(d, gain + f)),
               d, norm + f);
  for (int g = 0; g < G; ++g) {
    V32 sum = hn::Zero(d);
    for (int f = begin; f < end; f += kTileLanes)
      sum = hn::MulAdd(hn::LoadU(d, query + g * SF + f), hn::LoadU(d, norm + f), sum);
    batch.denominator[out + g] = Sum(d, sum);
  }
  // Updated in pieces that stay in the L1 cache until the queries have read them.
  constexpr int kPiece = 16;
  for (int f0 = begin; f0 < end; f0 += kPiece) {
    for (int f = f0; f < f0 + kPiece; ++f) {
      const V32 keep = hn::Set(d, decay[f]), add = hn::Set(d, gain[f]);
      float* HWY_RESTRICT s = state + static_cast<int64_t>(f) * D;
      for (int x = 0; x < D; x += kTileLanes)
        hn::StoreU(hn::MulAdd(keep, hn::LoadU(d, s + x), hn::Mul(add, hn::LoadU(d, v + x))), d,
                   s + x);
    }
    GemmTile(query + f0, SF, 1, state + static_cast<int64_t>(f0) * D, D, batch.linear + out * D, D,
             G, D, kPiece, f0 > begin);
  }
}

// The row's token to its place in the ring, and among the sinks.
HWY_INLINE void StoreToken(const DslaArgs& args, const DslaSlot& slot, const DslaDecodeRow& row,
                           int h) {
  const DslaShape& shape = args.shape;
  const int64_t bytes = shape.D * SizeOf(shape.kv_dtype);
  const auto* k = static_cast<const std::byte*>(args.k) + (row.row * shape.Hkv + h) * bytes;
  const auto* v = static_cast<const std::byte*>(args.v) + (row.row * shape.Hkv + h) * bytes;
  const int64_t ring = (static_cast<int64_t>(h) * shape.window + row.t % shape.window) * bytes;
  std::memcpy(slot.ring_k + ring, k, static_cast<size_t>(bytes));
  std::memcpy(slot.ring_v + ring, v, static_cast<size_t>(bytes));
  if (row.t >= shape.sinks) return;
  const int64_t sink = (static_cast<int64_t>(h) * shape.sinks + row.t) * bytes;
  std::memcpy(slot.sink_k + sink, k, static_cast<size_t>(bytes));
  std::memcpy(slot.sink_v + sink, v, static_cast<size_t>(bytes));
}

// Scores of one key [D] with N queries [N, D], to out[0], out[out_row], ..: the key is converted
// once.
template <int N, class T>
HWY_INLINE void KeyScores(const T* HWY_RESTRICT k, const float* HWY_RESTRICT q, int D,
                          float* HWY_RESTRICT out, int out_row) {
  const F32 d;
  V32 sum[N];
  for (int g = 0; g < N; ++g) sum[g] = hn::Zero(d);
  for (int i = 0; i < D; i += kTileLanes) {
    const V32 x = LoadF32(d, k + i);
    for (int g = 0; g < N; ++g) sum[g] = hn::MulAdd(x, hn::LoadU(d, q + g * D + i), sum[g]);
  }
  for (int g = 0; g < N; ++g) out[g * out_row] = Sum(d, sum[g]);
}

// A key and its value: scores of G queries, the value as fp32.
template <class T>
HWY_INLINE void VisitToken(const void* from_k, const void* from_v, int64_t at, int D, int G,
                           const float* q, float* scores, int score_row, float* v) {
  const T* k = static_cast<const T*>(from_k) + at;
  ConvertRow(static_cast<const T*>(from_v) + at, v, static_cast<size_t>(D));
  int g = 0;
  for (; g + 3 <= G; g += 3) KeyScores<3>(k, q + g * D, D, scores + g * score_row, score_row);
  for (; g < G; ++g) KeyScores<1>(k, q + g * D, D, scores + g * score_row, score_row);
}

// Replaces a row's scores by exp(score - top). The row has room for whole vectors.
HWY_INLINE void Softmax(float* HWY_RESTRICT row, int keys, float* HWY_RESTRICT top,
                        float* HWY_RESTRICT sum) {
  const F32 d;
  const V32 end = hn::Set(d, static_cast<float>(keys)), none = hn::Set(d, -INFINITY);
  V32 most = none;
  for (int x = 0; x < keys; x += kTileLanes) {
    const auto valid = hn::Lt(hn::Iota(d, static_cast<float>(x)), end);
    const V32 v = hn::IfThenElse(valid, hn::LoadU(d, row + x), none);
    hn::StoreU(v, d, row + x);
    most = hn::Max(most, v);
  }
  most = hn::MaxOfLanes(d, most);
  V32 total = hn::Zero(d);
  for (int x = 0; x < keys; x += kTileLanes) {
    const V32 v = Exp(d, hn::Sub(hn::LoadU(d, row + x), most));
    hn::StoreU(v, d, row + x);
    total = hn::Add(total, v);
  }
  *top = hn::GetLane(most);
  *sum = Sum(d, total);
}

void DecodeWindow(const DslaDecode& batch, int r, int h, float* scratch) {
  const F32 d;
  const DslaArgs& args = *batch.args;
  const DslaShape& shape = args.shape;
  const int D = shape.D, W = shape.window, S = shape.sinks, G = shape.G();
  const int score_row = (W + S + 15) / 16 * 16;
  const DslaDecodeRow& row = batch.rows[r];
  const DslaSlot slot = SlotAt(batch.layout, args.states, args.slots[row.n]);
  StoreToken(args, slot, row, h);

  float* v = scratch;                 // [keys, D]
  float* scores = v + (W + S) * D;    // [G, score_row]
  float* q = scores + G * score_row;  // [G, D]
  const V32 scale = hn::Set(d, 1.f / std::sqrt(static_cast<float>(D)));
  const float* query = args.q + row.row * args.q_stride + static_cast<int64_t>(h) * G * D;
  for (int x = 0; x < G * D; x += kTileLanes)
    hn::StoreU(hn::Mul(scale, hn::LoadU(d, query + x)), d, q + x);

  int keys = 0;
  const auto visit = [&](const std::byte* from_k, const std::byte* from_v, int64_t at) HWY_ATTR {
    if (shape.kv_dtype == DType::kF32)
      VisitToken<float>(from_k, from_v, at * D, D, G, q, scores + keys, score_row, v + keys * D);
    else
      VisitToken<bf16>(from_k, from_v, at * D, D, G, q, scores + keys, score_row, v + keys * D);
    ++keys;
  };
  for (int64_t s = 0; s < std::min<int64_t>(S, row.t + 1); ++s)
    visit(slot.sink_k, slot.sink_v, static_cast<int64_t>(h) * S + s);
  const int64_t first = std::max<int64_t>(S, row.t - W + 1);
  int64_t at = first % W;
  for (int64_t s = first; s <= row.t; ++s) {
    visit(slot.ring_k, slot.ring_v, static_cast<int64_t>(h) * W + at);
    if (++at == W) at = 0;
  }

  const int64_t out = static_cast<int64_t>(r) * shape.H + h * G;
  for (int g = 0; g < G; ++g)
    Softmax(scores + g * score_row, keys, batch.top + out + g, batch.sum + out + g);
  GemmTile(scores, score_row, 1, v, D, batch.window + out * D, D, G, D, keys, false);
}

void DecodeMerge(const DslaDecode& batch, int r) {
  const F32 d;
  const DslaArgs& args = *batch.args;
  const DslaShape& shape = args.shape;
  const int D = shape.D, H = shape.H, W = shape.window;
  const DslaDecodeRow& row = batch.rows[r];
  const int blocks = batch.HasStates(row) ? batch.Blocks() : 0;
  for (int h = 0; h < H; ++h) {
    const int64_t at = static_cast<int64_t>(r) * H + h, out = row.row * H + h;
    const int64_t part = static_cast<int64_t>(r) * batch.Blocks() * H + h;
    float den = 0.f;
    for (int b = 0; b < blocks; ++b) den += batch.denominator[part + b * H];
    const Shares share = W == 0
                             ? LinearShare(hn::Set(d, den))
                             : MergeShares(hn::Set(d, den), hn::Set(d, batch.top[at]),
                                           hn::Set(d, batch.sum[at]), hn::Set(d, args.claim[out]));
    for (int x = 0; x < D; x += kTileLanes) {
      V32 sum = hn::Zero(d);
      for (int b = 0; b < blocks; ++b)
        sum = hn::Add(sum, hn::LoadU(d, batch.linear + (part + b * H) * D + x));
      sum = hn::Mul(sum, share.linear);
      if (W > 0) sum = hn::MulAdd(share.window, hn::LoadU(d, batch.window + at * D + x), sum);
      hn::StoreU(sum, d, args.out + out * D + x);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_DSLA_DECODE_INL_H_
