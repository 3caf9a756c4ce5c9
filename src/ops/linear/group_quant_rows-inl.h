// The loops of group_quant_product-inl.h, included there inside HWY_NAMESPACE and, where the target
// is AVX-512, once more with DSLA_WITH_VNNI for CPUs whose 16-bit products add up in one
// instruction. Hence no include guard.

#if defined(DSLA_WITH_VNNI)

template <class B>
HWY_INLINE typename B::Ints AddPairs(typename B::Ints sum, typename B::Ints w, typename B::Ints x) {
  if constexpr (B::kBlocks == 2)
    return _mm512_dpwssd_epi32(sum, w, x);
  else
    return _mm256_dpwssd_epi32(sum, w, x);
}

#else

// GCC would add up a group's products as a tree, all of them spilled to memory first: a sum that it
// cannot look into stays a running one in its register.
template <class B>
HWY_INLINE typename B::Ints AddPairs(typename B::Ints sum, typename B::Ints w, typename B::Ints x) {
  typename B::Ints running = B::Add(sum, B::MulPairs(w, x));
#if HWY_TARGET <= HWY_AVX3
  asm("" : "+v"(running));
#else
  asm("" : "+x"(running));
#endif
  return running;
}

#endif

// A group's products of few rows are summed up in two chains, to hide their latency.
constexpr int Chains(int rows) { return rows <= 2 ? 2 : 1; }

// 2 inputs of one row, for every feature.
template <class B>
HWY_INLINE typename B::Ints Inputs(const int16_t* p) {
  int32_t two;
  std::memcpy(&two, p, sizeof(two));
  return B::All(two);
}

template <class B, int kT>
struct Totals {
  typename B::Ints of[Chains(kT)][kT];

  HWY_INLINE Totals() {
    for (auto& chain : of)
      for (auto& total : chain) total = B::Zero();
  }
  // Two inputs of each row, the first of them `input`. A group's 32 products of 127 * 16256 fit 32
  // bits, in whatever order.
  HWY_INLINE void Add(int chain, typename B::Ints w, const Row (&row)[kT], int64_t input) {
    auto& total = of[chain % Chains(kT)];
    for (int t = 0; t < kT; ++t) total[t] = AddPairs<B>(total[t], w, Inputs<B>(row[t].q + input));
  }
  HWY_INLINE typename B::Floats Of(int t) const {
    if constexpr (Chains(kT) == 2) return B::ToFloats(B::Add(of[0][t], of[1][t]));
    return B::ToFloats(of[0][t]);
  }
};

// Group g at w: 8 inputs in every step for int4, 4 for int8.
template <class B, int kT>
HWY_INLINE void Int8Group(const uint8_t* w, int64_t block_bytes, int64_t g, const Row (&row)[kT],
                          Totals<B, kT>& totals) {
  for (int c = 0; c < 8; ++c) {
    const auto four = B::Load(w + c * 32, block_bytes);
    const int64_t input = g * kQuantGroup + c * 4;
    totals.Add(0, B::template SignedRight16<8>(B::template Left16<8>(four)), row, input);
    totals.Add(1, B::template SignedRight16<8>(four), row, input + 2);
  }
}
template <class B, int kT>
HWY_INLINE void Int4Group(const uint8_t* w, int64_t block_bytes, int64_t g, const Row (&row)[kT],
                          Totals<B, kT>& totals) {
  const auto low = B::All(0x000f000f);
  for (int c = 0; c < 4; ++c) {
    // Chunk c in the low halves of the bytes, c + 4 in the high ones.
    const auto eight = B::Load(w + c * 32, block_bytes);
    const int64_t input = g * kQuantGroup + c * 4;
    totals.Add(0, B::And(eight, low), row, input);
    totals.Add(1, B::And(B::template Right16<8>(eight), low), row, input + 2);
    totals.Add(0, B::And(B::template Right16<4>(eight), low), row, input + 16);
    totals.Add(1, B::template Right16<12>(eight), row, input + 18);
  }
}

template <class B, int kBits, int kT>
HWY_INLINE void Groups(const GroupQuantShape& shape, const BlockView& block, bool ahead,
                       const Row (&row)[kT], typename B::Floats (&sum)[kT]) {
  constexpr int kGroupBytes = 32 * kBits;
  const int64_t block_bytes = shape.block_bytes();
  for (int64_t g = 0; g < shape.groups(); ++g) {
    const uint8_t* w = block.q + g * kGroupBytes;
    if (ahead) {  // the next blocks, in address order, with int4 a line more, for the scales
      for (int b = 0; b < B::kBlocks; ++b)
        for (int i = 0; i < (kBits == 8 ? 256 : 192); i += 64)
          hwy::Prefetch(w + (B::kBlocks + b) * block_bytes + i);
    }
    Totals<B, kT> totals;
    if constexpr (kBits == 8)
      Int8Group(w, block_bytes, g, row, totals);
    else
      Int4Group(w, block_bytes, g, row, totals);
    const auto d = B::Scales(block.d + g * kQuantBlock, block_bytes),
               m = B::Scales(block.m + g * kQuantBlock, block_bytes);
    for (int t = 0; t < kT; ++t) {
      sum[t] = B::MulAdd(totals.Of(t), B::Mul(d, B::All(row[t].scale[g])), sum[t]);
      sum[t] = B::MulAdd(m, B::All(row[t].sum[g]), sum[t]);
    }
  }
}

template <class B, int kBits, int kT>
HWY_NOINLINE void Rows(const GroupQuantArgs& a, int64_t block, int64_t t0, bool ahead) {
  const GroupQuantShape& shape = a.shape;
  const BlockView view = ViewBlock(shape, a.weight, block);
  Row row[kT];
  typename B::Floats sum[kT];
  for (int t = 0; t < kT; ++t) {
    const int64_t at = (t0 + t) * shape.stride(), group = (t0 + t) * shape.groups();
    row[t] = {a.x.q + at, a.x.scale + group, a.x.sum + group};
    sum[t] = B::All(0.f);
  }
  Groups<B, kBits, kT>(shape, view, ahead, row, sum);
  constexpr int kFeatures = B::kBlocks * kQuantBlock;
  const int64_t first = block * kQuantBlock;
  const int count = static_cast<int>(std::min<int64_t>(kFeatures, shape.out - first));
  for (int t = 0; t < kT; ++t) {
    alignas(64) float lanes[kFeatures];
    B::Store(sum[t], lanes);
    float* y = a.y + (t0 + t) * a.y_stride + first;
    for (int i = 0; i < count; ++i) {
      const float value = lanes[i] + (a.bias != nullptr ? a.bias[first + i] : 0.f);
      y[i] = a.accumulate ? y[i] + value : value;
    }
  }
}

template <class B, int kBits, int kT>
HWY_INLINE void LastRows(int64_t rows, const GroupQuantArgs& a, int64_t block, int64_t t0,
                         bool ahead) {
  if constexpr (kT > 0) {
    if (rows == kT)
      Rows<B, kBits, kT>(a, block, t0, ahead);
    else
      LastRows<B, kBits, kT - 1>(rows, a, block, t0, ahead);
  }
}

template <class B, int kBits>
void BlockRows(const GroupQuantArgs& a, int64_t block, bool ahead) {
  int64_t t = 0;
  for (; t + kRowTile <= a.T; t += kRowTile) Rows<B, kBits, kRowTile>(a, block, t, ahead && t == 0);
  LastRows<B, kBits, kRowTile - 1>(a.T - t, a, block, t, ahead && t == 0);
}

template <int kBits>
void Blocks(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  constexpr int kWide = WideBlocks::kBlocks;
  int64_t block = begin;
  for (; block + kWide <= end; block += kWide)
    BlockRows<WideBlocks, kBits>(a, block, block + 2 * kWide <= end);
  for (; block < end; ++block) BlockRows<OneBlock, kBits>(a, block, false);
}

inline void AllRows(const GroupQuantArgs& a, int64_t begin, int64_t end) {
  if (a.shape.bits == 8)
    Blocks<8>(a, begin, end);
  else
    Blocks<4>(a, begin, end);
}
