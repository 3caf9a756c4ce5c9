// The inner loop of panel_kernels.cc, included there inside HWY_NAMESPACE and, where the target is
// AVX-512, once more with DSLA_WITH_VNNI for CPUs whose 16-bit products add up in one instruction
// (the library's target of those is no use). Hence no include guard.

HWY_INLINE Sums AddPairs(Sums sum, Ints w, Ints x) {
#if defined(DSLA_WITH_VNNI)
  return SumsOf(Ints{_mm512_dpwssd_epi32(IntsOf(sum).raw, w.raw, x.raw)});
#else
  return sum + SumsOf(MulPairs(w, x));
#endif
}

// kT rows times kV vectors of a strip's features over one segment, added to `to` unless it is the
// first.
template <int kV, int kT>
HWY_NOINLINE void Tile(const Strip& strip, const PanelRows& x, bool first, float* to) {
  Sums sum[kT][kV];
  for (int t = 0; t < kT; ++t)
    for (int v = 0; v < kV; ++v) sum[t][v] = Sums{};
  const int32_t* w = strip.pairs;
  for (int64_t i = 0; i < strip.count; ++i, w += kStrip) {
    Ints weights[kV];
    for (int v = 0; v < kV; ++v) weights[v] = hn::Load(DI(), w + v * kLanes);
    for (int t = 0; t < kT; ++t) {
      int32_t two;
      std::memcpy(&two, x.q + t * x.stride + 2 * i, sizeof(two));
      const Ints inputs = hn::Set(DI(), two);
      for (int v = 0; v < kV; ++v) sum[t][v] = AddPairs(sum[t][v], weights[v], inputs);
    }
  }
  // Otherwise GCC puts the sums into memory, and the end takes as long as 8 pairs of inputs.
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t) {
    const Floats scale = hn::Set(DF(), x.scale[t * x.segments]);
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      float* at = to + t * kPanelFeatures + v * kLanes;
      const Floats by = hn::Mul(scale, hn::Load(DF(), strip.step + v * kLanes));
      const Floats before = first ? hn::Zero(DF()) : hn::Load(DF(), at);
      const Floats product = hn::ConvertTo(DF(), IntsOf(sum[t][v]));
      hn::Store(hn::MulAdd(product, by, before), DF(), at);
    }
  }
}

// The last kT = rows < kTileRows rows.
template <int kV, int kT>
HWY_INLINE void LastTile(int64_t rows, const Strip& strip, const PanelRows& x, bool first,
                         float* to) {
  if constexpr (kT > 0) {
    if (rows == kT)
      Tile<kV, kT>(strip, x, first, to);
    else
      LastTile<kV, kT - 1>(rows, strip, x, first, to);
  }
}

// done(t, count): the sums of rows [t, t + count) are there.
template <int kV, class Done>
void Tiles(const Strip& strip, const PanelRows& x, int64_t rows, bool first, float* to,
           const Done& done) {
  int64_t t = 0;
  for (; t + kTileRows <= rows; t += kTileRows) {
    Tile<kV, kTileRows>(strip, x.From(t), first, to + t * kPanelFeatures);
    done(t, kTileRows);
  }
  LastTile<kV, kTileRows - 1>(rows - t, strip, x.From(t), first, to + t * kPanelFeatures);
  done(t, rows - t);
}

// Fewer vectors are enough for few features, such as an adapter's rank.
template <class Done>
void StripTiles(const Strip& strip, const PanelRows& x, int64_t rows, bool first, float* to,
                const Done& done) {
  if (strip.features <= kStrip / 2)
    Tiles<kVectors / 2>(strip, x, rows, first, to, done);
  else if (kVectors > 2 && strip.features <= kStrip - kLanes)
    Tiles<kVectors - 1>(strip, x, rows, first, to, done);
  else
    Tiles<kVectors>(strip, x, rows, first, to, done);
}
