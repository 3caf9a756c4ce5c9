// Load, prepare and scan of the chunked form (cpu_wave.h). Included once per Highway target.

#if defined(DSLA_OPS_DSLA_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DSLA_OPS_DSLA_CHUNK_INL_H_
#undef DSLA_OPS_DSLA_CHUNK_INL_H_
#else
#define DSLA_OPS_DSLA_CHUNK_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "ops/dsla/cpu_wave.h"
#include "ops/dsla/features-inl.h"
#include "ops/dsla/slot.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
namespace {  // of the one file that includes this

template <class T>
HWY_INLINE const T* Elements(const void* data, int64_t index) {
  return static_cast<const T*>(data) + index;
}

// Tokens [begin, end) of a segment's stream: from the ring, then from the rows.
template <class T>
void LoadStream(const DslaWave& wave, const DslaSegment& seg, int h, int64_t begin, int64_t end) {
  const DslaArgs& args = *wave.forward;
  const int64_t D = wave.shape.D, W = wave.shape.window, Hkv = wave.shape.Hkv;
  const DslaSlot slot = SlotAt(wave.layout, wave.states, wave.slots[seg.n]);
  for (int64_t x = begin; x < end; ++x) {
    const int64_t t = seg.begin - W + x, to = (h * wave.tokens + seg.token + x) * D;
    if (t < 0) {  // zeros: a weight of zero must not meet a NaN
      std::memset(wave.k + to, 0, sizeof(float) * static_cast<size_t>(D));
      std::memset(wave.v + to, 0, sizeof(float) * static_cast<size_t>(D));
      continue;
    }
    const bool old = t < seg.begin;
    const int64_t at = old ? (h * W + t % W) * D : ((seg.row + t - seg.begin) * Hkv + h) * D;
    ConvertRow(Elements<T>(old ? slot.ring_k : args.k, at), wave.k + to, static_cast<size_t>(D));
    ConvertRow(Elements<T>(old ? slot.ring_v : args.v, at), wave.v + to, static_cast<size_t>(D));
  }
}

// The sinks that exist at the segment's end.
template <class T>
void LoadSinks(const DslaWave& wave, int segment, int h) {
  const DslaSegment& seg = wave.segments[segment];
  const DslaArgs& args = *wave.forward;
  const int64_t D = wave.shape.D, S = wave.shape.sinks, Hkv = wave.shape.Hkv;
  const DslaSlot slot = SlotAt(wave.layout, wave.states, wave.slots[seg.n]);
  const int64_t block = (segment * Hkv + h) * S * D;
  for (int64_t s = 0; s < std::min<int64_t>(S, seg.begin + seg.count); ++s) {
    const bool old = s < seg.begin;
    const int64_t at = old ? (h * S + s) * D : ((seg.row + s - seg.begin) * Hkv + h) * D;
    ConvertRow(Elements<T>(old ? slot.sink_k : args.k, at), wave.sink_k + block + s * D,
               static_cast<size_t>(D));
    ConvertRow(Elements<T>(old ? slot.sink_v : args.v, at), wave.sink_v + block + s * D,
               static_cast<size_t>(D));
  }
}

HWY_INLINE hn::Vec<hn::RebindToUnsigned<F32>> Widen(const bf16* p) {
  const F32 d;
  return hn::BitCast(hn::RebindToUnsigned<F32>(), LoadF32(d, p));
}

// Pairs [begin, end) of a segment: those of its sinks, then those of its stream.
void LoadPairs(const DslaWave& wave, const DslaSegment& seg, int h, int64_t begin, int64_t end) {
  static constexpr bf16 kZeros[kMaxHeadDim] = {};
  const hn::RebindToUnsigned<F32> du;
  const DslaArgs& args = *wave.forward;
  const int64_t D = wave.shape.D, W = wave.shape.window, S = wave.shape.sinks, Hkv = wave.shape.Hkv;
  const DslaSlot slot = SlotAt(wave.layout, wave.states, wave.slots[seg.n]);
  for (int64_t p = begin; p < end; ++p) {
    const bool sink = p < wave.SinkPairs();
    const int64_t t = sink ? 2 * p : wave.FirstPaired(seg) + 2 * (p - wave.SinkPairs());
    const int64_t last = std::min(seg.begin + seg.count, sink ? S : seg.begin + seg.count);
    const auto row = [&](const void* rows, const std::byte* kept, int64_t x) {
      if (x < 0 || x >= last || (!sink && x < seg.begin - W)) return kZeros;
      if (x >= seg.begin) return Elements<bf16>(rows, ((seg.row + x - seg.begin) * Hkv + h) * D);
      return Elements<bf16>(kept, sink ? (h * S + x) * D : (h * W + x % W) * D);
    };
    uint32_t* const k = wave.pair_k + (h * wave.pairs + seg.pair + p) * D;
    uint32_t* const v = wave.pair_v + (h * wave.pairs + seg.pair + p) * D;
    const std::byte* const kept_k = sink ? slot.sink_k : slot.ring_k;
    const std::byte* const kept_v = sink ? slot.sink_v : slot.ring_v;
    for (int64_t i = 0; i < 2; ++i)
      std::memcpy(k + i * D / 2, row(args.k, kept_k, t + i), sizeof(bf16) * static_cast<size_t>(D));
    const bf16 *even = row(args.v, kept_v, t), *odd = row(args.v, kept_v, t + 1);
    for (int64_t x = 0; x < D; x += kTileLanes)
      hn::StoreU(hn::Or(hn::ShiftRight<16>(Widen(even + x)), Widen(odd + x)), du, v + x);
  }
}

template <class T>
void LoadForward(const DslaWave& wave, int chunk, int h) {
  const DslaChunk& ck = wave.chunks[chunk];
  const DslaSegment& seg = wave.segments[ck.segment];
  LoadStream<T>(wave, seg, h, ck.offset, ck.offset + ck.rows);  // what enters
  // Of what queries read, a share with each chunk.
  const int64_t W = wave.StreamWindow(), pairs = wave.SegmentPairs(seg),
                share = chunk - seg.first_chunk;
  if (pairs > 0)
    LoadPairs(wave, seg, h, pairs * share / seg.chunks, pairs * (share + 1) / seg.chunks);
  if (W == 0) return;
  LoadStream<T>(wave, seg, h, seg.count + W * share / seg.chunks,
                seg.count + W * (share + 1) / seg.chunks);
  if (ck.offset == 0) LoadSinks<T>(wave, ck.segment, h);
}

template <class T>
void LoadFold(const DslaWave& wave, int chunk, int h) {
  const DslaChunk& ck = wave.chunks[chunk];
  const DslaSegment& seg = wave.segments[ck.segment];
  const DslaFoldArgs& args = *wave.fold;
  const int D = wave.shape.D, page_size = args.kv.page_size;
  const auto load = [&](const void* base, int64_t page, int64_t s, float* to) {
    const T* row = Elements<T>(base, args.kv.Row(page, h, s));
    if constexpr (std::is_same_v<T, int8_t>) {
      bf16 rounded[kMaxHeadDim];
      DequantizeRow(row, *Elements<float>(base, args.kv.Scale(page, h, s) / 4), rounded, D);
      ConvertRow(rounded, to, static_cast<size_t>(D));
    } else {
      ConvertRow(row, to, static_cast<size_t>(D));
    }
  };
  const int32_t* pages = args.tables.pages + args.tables.page_start[seg.n];
  for (int x = ck.offset; x < ck.offset + ck.rows; ++x) {
    const int64_t s = seg.begin - wave.shape.window + x;
    const int64_t to = (h * wave.tokens + seg.token + x) * D;
    load(args.kv.k, pages[s / page_size], s % page_size, wave.k + to);
    load(args.kv.v, pages[s / page_size], s % page_size, wave.v + to);
  }
}

void LoadTokens(const DslaWave& wave, int chunk, int h) {
  if (wave.forward) {
    return wave.shape.kv_dtype == DType::kF32 ? LoadForward<float>(wave, chunk, h)
                                              : LoadForward<bf16>(wave, chunk, h);
  }
  switch (wave.fold->kv.dtype) {
    case DType::kF32:
      return LoadFold<float>(wave, chunk, h);
    case DType::kBF16:
      return LoadFold<bf16>(wave, chunk, h);
    case DType::kI8:
      return LoadFold<int8_t>(wave, chunk, h);
  }
}

// Where the results of one vector of channels of a chunk go.
struct ChannelSinks {
  float* decay;  // [lanes, kCpuChunk] or null
  float* keys;   // [lanes, kCpuChunk]
  float* norm;
  float* scale_in;
  float* scale_out;
};

// One vector of channels over a chunk's n rows. The sums of gates run outwards from the anchor row,
// so that they are small next to it and at most half a chunk long: G - R without a subtraction.
void PrepareChannels(const float* HWY_RESTRICT logit, const float* HWY_RESTRICT bias, int SF,
                     const float* HWY_RESTRICT phi, int F, float floor, int n,
                     const ChannelSinks& to) {
  const F32 d;
  HWY_ALIGN float gate[kCpuChunk * kTileLanes];  // a, then G - R, then e to it
  HWY_ALIGN float key[kCpuChunk * kTileLanes];   // k', then K~
  const V32 b = hn::LoadU(d, bias), low = hn::Set(d, floor);
  for (int j = 0; j < n; ++j) {
    const V32 a = LogGate(d, hn::LoadU(d, logit + j * SF), b, low);
    hn::Store(a, d, gate + j * kTileLanes);
    hn::Store(hn::Mul(hn::Neg(Expm1(d, a)), hn::LoadU(d, phi + j * F)), d, key + j * kTileLanes);
  }
  const int anchor = n / 2;
  const V32 first = hn::Load(d, gate);
  V32 next = hn::Load(d, gate + anchor * kTileLanes);
  V32 g = hn::Zero(d);
  hn::Store(g, d, gate + anchor * kTileLanes);
  for (int j = anchor + 1; j < n; ++j) {
    g = hn::Add(g, hn::Load(d, gate + j * kTileLanes));
    hn::Store(g, d, gate + j * kTileLanes);
  }
  hn::StoreU(Exp(d, g), d, to.scale_out);
  g = hn::Zero(d);
  for (int j = anchor - 1; j >= 0; --j) {
    g = hn::Sub(g, next);
    next = hn::Load(d, gate + j * kTileLanes);
    hn::Store(g, d, gate + j * kTileLanes);
  }
  hn::StoreU(Exp(d, hn::Sub(first, g)), d, to.scale_in);  // R = G[0] + (R - G[0])
  V32 sum = hn::Zero(d);
  for (int j = 0; j < n; ++j) {
    const V32 e = Exp(d, hn::Load(d, gate + j * kTileLanes));
    // Within e^+-80 by the gate's floor, so that the quotient is as good as a second exp.
    const V32 k = hn::Div(hn::Load(d, key + j * kTileLanes), e);
    hn::Store(e, d, gate + j * kTileLanes);
    hn::Store(k, d, key + j * kTileLanes);
    sum = hn::Add(sum, k);
  }
  hn::StoreU(sum, d, to.norm);
  Transpose(key, kTileLanes, n, kTileLanes, to.keys, kCpuChunk);
  if (to.decay) Transpose(gate, kTileLanes, n, kTileLanes, to.decay, kCpuChunk);
}

void PrepareChunk(const DslaWave& wave, int chunk, int h, float* scratch) {
  const DslaShape& shape = wave.shape;
  const DslaParams& params = wave.params;
  const DslaChunk& ck = wave.chunks[chunk];
  const DslaSegment& seg = wave.segments[ck.segment];
  const int D = shape.D, F = shape.F, SF = shape.SF(), n = ck.rows - ck.idle;
  LoadTokens(wave, chunk, h);
  if (n == 0) return;
  float* unrotated = scratch;             // [n, D]
  float* y = unrotated + kCpuChunk * D;   // [n, D]
  float* logits = y + kCpuChunk * D;      // [n, SF]
  float* phi = logits + kCpuChunk * SF;   // [n, F]
  float* own_keys = phi + kCpuChunk * F;  // [SF, kCpuChunk]

  const int64_t token = seg.token + ck.offset + ck.idle;
  const int64_t position = seg.begin - shape.window + ck.offset + ck.idle;
  const float* k = wave.k + (h * wave.tokens + token) * D;
  for (int j = 0; j < n; ++j)
    Unrotate(k + j * D, params.rope_cos + (position + j) * (D / 2),
             params.rope_sin + (position + j) * (D / 2), D, unrotated + j * D);
  for (int i = 0; i < shape.states; ++i)
    GemmTile(unrotated, D, 1,
             params.gate_weight + (static_cast<int64_t>(i) * shape.Hkv + h) * D * F, F,
             logits + i * F, SF, n, F, D, false);
  GemmTile(k, D, 1, params.phi_k + static_cast<int64_t>(h) * D * D, D, y, D, n, D, D, false);
  for (int j = 0; j < n; ++j) {
    const F32 d;
    float inverse[2];
    ExpFeatures(y + j * D, D, F, phi + j * F, inverse);
    for (int f = 0; f < F; f += kTileLanes)
      hn::StoreU(hn::Mul(hn::LoadU(d, phi + j * F + f), hn::Set(d, inverse[f / D])), d,
                 phi + j * F + f);
  }

  const int64_t at = wave.At(chunk, h);
  float* keys = wave.keys ? wave.keys + at * SF * kCpuChunk : own_keys;
  float* decay = wave.decay ? wave.decay + at * SF * kCpuChunk : nullptr;
  if (decay && ck.idle > 0) {  // zero decay: the outputs of idle rows are zero
    for (float* to : {decay, keys})
      for (int f = 0; f < SF; ++f) std::fill_n(to + f * kCpuChunk, ck.idle, 0.f);
  }
  for (int f = 0; f < SF; f += kTileLanes) {
    const float* bias = params.gate_bias + (static_cast<int64_t>(f / F) * shape.Hkv + h) * F;
    PrepareChannels(
        logits + f, bias + f % F, SF, phi + f % F, F, shape.gate_floor, n,
        {decay ? decay + f * kCpuChunk + ck.idle : nullptr, keys + f * kCpuChunk + ck.idle,
         wave.norm + at * SF + f, wave.scale_in + at * SF + f, wave.scale_out + at * SF + f});
  }
  GemmTile(keys + ck.idle, kCpuChunk, 1, wave.v + (h * wave.tokens + token) * D, D,
           wave.state + at * SF * D, D, SF, D, n, false);
}

void ScanStates(const DslaWave& wave, int segment, int h, int begin, int end) {
  const F32 d;
  const DslaSegment& seg = wave.segments[segment];
  const int D = wave.shape.D, SF = wave.shape.SF();
  const DslaSlot slot = SlotAt(wave.layout, wave.states, wave.slots[seg.n]);
  float* state = slot.state + static_cast<int64_t>(h) * SF * D;
  float* norm = slot.norm + static_cast<int64_t>(h) * SF;
  const bool keep = wave.forward != nullptr;
  for (int c = seg.first_chunk; c < seg.first_chunk + seg.chunks; ++c) {
    if (wave.chunks[c].idle == wave.chunks[c].rows) continue;
    const int64_t at = wave.At(c, h) * SF;
    for (int f = begin; f < end; f += kTileLanes) {
      const V32 in = hn::LoadU(d, wave.scale_in + at + f), s = hn::LoadU(d, norm + f);
      const V32 added = hn::MulAdd(in, s, hn::LoadU(d, wave.norm + at + f));
      if (keep) hn::StoreU(hn::Mul(in, s), d, wave.norm + at + f);
      hn::StoreU(hn::Mul(hn::LoadU(d, wave.scale_out + at + f), added), d, norm + f);
    }
    for (int f = begin; f < end; ++f) {
      const V32 in = hn::Set(d, wave.scale_in[at + f]), out = hn::Set(d, wave.scale_out[at + f]);
      float* HWY_RESTRICT s = state + static_cast<int64_t>(f) * D;
      float* HWY_RESTRICT p = wave.state + (at + f) * D;
      for (int i = 0; i < D; i += kTileLanes) {
        // MulAdd in both cases: left to the compiler, a fold and a prompt would round differently.
        const V32 x = hn::LoadU(d, s + i);
        const V32 added = hn::MulAdd(in, x, hn::LoadU(d, p + i));
        if (keep) hn::StoreU(hn::Mul(in, x), d, p + i);
        hn::StoreU(hn::Mul(out, added), d, s + i);
      }
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#endif  // DSLA_OPS_DSLA_CHUNK_INL_H_
