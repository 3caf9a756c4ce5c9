// What fills the shared memory of `prepare`: weights and keys, the keys with RoPE undone.
#pragma once

#include "ops/dsla/cuda/prepare.cuh"

namespace dsla::cuda {

// Among the four lanes of a quad: word k of lane t goes to word t of lane k.
__device__ __forceinline__ void TransposeQuad(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &low = x[bit == 1 ? 2 * i : i], &high = x[bit == 1 ? 2 * i + 1 : i + 2];
      const bool upper = t & bit;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, bit);
      (upper ? low : high) = other;
    }
}

// The packed weights to shared memory, channels as rows, those of gates in fp16: a quad of lanes
// has two channels' 16 dimensions in two pieces each. And the biases. By `warps` warps; `meanwhile`
// comes when the first loads are under way.
template <int D, int kBlocks, typename Shared, typename Meanwhile>
__device__ __forceinline__ void LoadWeights(Shared& shared, const Layer& l, int h, int first_block,
                                            int warps, const Meanwhile& meanwhile) {
  constexpr int kOf = D / 16, kTiles = (1 + kBlocks) * kOf * kOf;
  static_assert(kTiles >= 32);  // one for each warp at least
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kAtOnce = 6;
  const int warp = threadIdx.x / 32;
  const auto* bias =
      reinterpret_cast<const float2*>(l.weights.bias + int64_t{h} * l.SF + first_block * D);
  for (int i = threadIdx.x; i < kBlocks * D / 2; i += 32 * warps)
    shared.bias[i / (D / 2)][i % (D / 2)] = __ldg(bias + i);
#pragma unroll 1
  for (int first = warp; first < kTiles; first += kAtOnce * warps) {
    uint4 packed[kAtOnce];
    const auto tile = [&](int u) { return first + u * warps; };
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = min(tile(u), kTiles - 1), m = i / (kOf * kOf);
      const __nv_bfloat16* from =
          m == 0 ? l.weights.phi_k + int64_t{h} * D * D
                 : l.weights.gates + (int64_t{h} * (l.SF / D) + first_block + m - 1) * D * D;
      packed[u] = __ldg(reinterpret_cast<const uint4*>(from) + i % (kOf * kOf) * 32 + lane);
    }
    if (first == warp) meanwhile();
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = tile(u), m = i / (kOf * kOf), k = i / kOf % kOf, j = i % kOf;
      if (i >= kTiles) break;
      uint32_t x[4] = {packed[u].x, packed[u].y, packed[u].z, packed[u].w};
      if (m > 0)
#pragma unroll
        for (uint32_t& word : x) word = HalfOf(word);
      TransposeQuad(x, t);
      const int row = 16 * (j % 4) + g / 2 + t / 2 * 4 + g % 2 * 8;
      shared.weight[m][j / 4][PieceOf(row, 2 * k + t % 2)] = {x[0], x[1], x[2], x[3]};
    }
  }
}

// The chunk's keys on their way to shared memory; zeros for rows that do not enter.
template <int D, typename Rows>
__device__ __forceinline__ void FetchKeys(KeyTile<D>& to, const PrefillParams& p, const Rows& rows,
                                          const Chunk& chunk, int h, int thread) {
  // A thread takes piece `c` of rows first + 16 i.
  const int c = thread % (D / 8), first = thread / (D / 8);
  const Layer& l = p.layer;
  const auto copy = [&](int row, const __nv_bfloat16* key, bool enters) {
    CopyAsync(to + PieceOf(RowOfSlot(SlotOf(row)), c), key + 8 * c, enters);
  };
  if (IsSpan<D>(l, rows, chunk.n, chunk.e0)) {
    const KvSpan span = SpanOf<D>(l, rows, chunk.n, h, chunk.e0);
    const int from = max(chunk.lo, l.S - chunk.e0), until = chunk.hi;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + 16 * i;
      copy(row, span.row.k + row * span.k_stride, row >= from && row < until);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < kChunk; row += 16) {
      const bool enters = Enters(l, chunk, row);
      copy(row, enters ? RowOf<D>(l, rows, chunk.n, h, chunk.e0 + row).k : p.key, enters);
    }
  }
  CommitCopies();
}

// Undoes the RoPE of the keys that FetchKeys has left.
template <int D, int kSigns>
__device__ __forceinline__ void UndoRope(TeamShared<D, kSigns>& s, const Layer& l,
                                         const Chunk& chunk, int thread, int team) {
  // A thread takes eight dimensions of both halves of the head, in both halves of the chunk.
  // Neighbouring rows are four apart in the tile, so that no bank is met twice.
  constexpr int kOfRow = D / 16;
  const int c = thread % kOfRow, r = thread / kOfRow, slot = r / 2 + r % 2 * 16;
  float4 cos[2][2], sin[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Keys of rows that do not enter are zeros: any angle does.
    const int row = TokenOf(32 * half + slot), time = Enters(l, chunk, row) ? chunk.e0 + row : 0;
    const unsigned angle = time * (D / 8) + 2 * c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cos[half][i] = __ldg(reinterpret_cast<const float4*>(l.cos) + angle + i);
      sin[half][i] = __ldg(reinterpret_cast<const float4*>(l.sin) + angle + i);
    }
  }
  WaitCopies<0>();
  Barrier<2 * D>(team);  // the keys are there; all have done with those before
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = RowOfSlot(slot) + 32 * half;
    const uint4 a = s.key[PieceOf(row, c)], b = s.key[PieceOf(row, c + kOfRow)];
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    uint32_t u[4], w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 &cs = cos[half][i / 2], &sn = sin[half][i / 2];
      UndoToHalf(x[i], y[i], i % 2 ? float2{cs.z, cs.w} : float2{cs.x, cs.y},
                 i % 2 ? float2{sn.z, sn.w} : float2{sn.x, sn.y}, u[i], w[i]);
    }
    s.plain[PieceOf(row, c)] = {u[0], u[1], u[2], u[3]};
    s.plain[PieceOf(row, c + kOfRow)] = {w[0], w[1], w[2], w[3]};
  }
  PublishCopies();
  Barrier<2 * D>(team);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// One warpgroup that fetches for all of a block's teams by turns. A lane has four dimensions of
// both halves of a row, and a warp two rows at a time, eight apart in the tile from one time to the
// next. A warp reads only the keys that it has copied itself. What it reads from memory it asks for
// a chunk ahead.
template <int D, int kBlocks, int kSigns>
struct KeyFetcher {
  static constexpr int kOfRow = D / 8, kTimes = kChunk / 8, kAhead = 4;
  static_assert(kOfRow == 16);

  PrepareShared<D, kBlocks, kSigns>& s;
  const PrefillParams& p;
  float4 cos[kAhead] = {}, sin[kAhead] = {};  // angles on their way, also those of the next chunk
  int n = -1, pos = 0, row_start = 0;         // the sequence of the last chunk that came up

  struct Place {
    int c, slot, row;  // slot of the first time, and its row
    __device__ __forceinline__ Place() {
      const unsigned i = Fresh(threadIdx.x) % kFetchThreads;
      c = i % kOfRow;
      slot = i / 32 * 8 + i / kOfRow % 2;
      row = i / kOfRow;
    }
    // Row of the chunk at a time; its row of the tile is `row` + 8 u.
    __device__ __forceinline__ int Token(int u) const {
      return u < kTimes / 2 ? kChunk / 2 - 1 - (slot + 2 * u)
                            : kChunk / 2 + slot + 2 * (u - kTimes / 2);
    }
    // Of its first half's dimensions, in half pieces; the others are a panel further.
    __device__ __forceinline__ int HalfPiece() const { return 2 * Swizzle<8>(row, c / 2) + c % 2; }
  };

  // The key of the chunk's row 0, if keys lie at one distance.
  __device__ __forceinline__ const __nv_bfloat16* FirstKey(const Chunk& chunk, int h) {
    if (chunk.n < 0) return nullptr;
    if (chunk.n != n) {
      n = chunk.n;
      pos = p.layer.pos[n];
      row_start = p.layer.row_start[n];
    }
    if (chunk.e0 < pos) return nullptr;
    return p.rows.k + (row_start + (chunk.e0 - pos)) * p.rows.k_stride + h * D;
  }

  // Copies of the keys of a chunk; zeros for rows that do not enter.
  __device__ __forceinline__ void Copy(KeyTile<D>& to, const Chunk& chunk,
                                       const __nv_bfloat16* first, int h) const {
    const Layer& l = p.layer;
    const Place at;
    uint4* tile = to + PieceOf(at.row, at.c);
    if (first) {
      const int from = max(chunk.lo, l.S - chunk.e0);
#pragma unroll
      for (int u = 0; u < kTimes; ++u) {
        const int token = at.Token(u);
        CopyAsync(tile + u * 64, first + token * p.rows.k_stride + 8 * at.c,
                  token >= from && token < chunk.hi);
      }
    } else {
#pragma unroll 1
      for (int u = 0; u < kTimes; ++u) {
        const int token = at.Token(u);
        const bool enters = Enters(l, chunk, token);
        const __nv_bfloat16* key =
            enters ? RowOf<D>(l, p.rows, chunk.n, h, chunk.e0 + token).k : p.rows.k;
        CopyAsync(tile + u * 64, key + 8 * at.c, enters);
      }
    }
  }

  __device__ __forceinline__ void LoadAngles(const Place& at, const Chunk& chunk, int u) {
    // Keys of rows that do not enter are zeros: any angle does.
    const int time = max(min(at.Token(u), chunk.hi - 1) + chunk.e0, 0);
    const unsigned angle = time * (D / 8) + at.c;
    cos[u % kAhead] = __ldg(reinterpret_cast<const float4*>(p.layer.cos) + angle);
    sin[u % kAhead] = __ldg(reinterpret_cast<const float4*>(p.layer.sin) + angle);
  }

  __device__ __forceinline__ void Undo(TeamShared<D, kSigns>& team, const Chunk& chunk,
                                       const Chunk& next) {
    constexpr int kPanel = 2 * kChunk * 8;  // half pieces
    const Place at;
    const auto* keys = reinterpret_cast<const uint2*>(team.key) + at.HalfPiece();
    auto* plain = reinterpret_cast<uint2*>(team.plain) + at.HalfPiece();
#pragma unroll
    for (int u = 0; u < kTimes; ++u) {
      const uint2 a = keys[u * 128], b = keys[u * 128 + kPanel];
      const float4 cs = cos[u % kAhead], sn = sin[u % kAhead];
      uint2 x, y;
      UndoToHalf(a.x, b.x, {cs.x, cs.y}, {sn.x, sn.y}, x.x, y.x);
      UndoToHalf(a.y, b.y, {cs.z, cs.w}, {sn.z, sn.w}, x.y, y.y);
      LoadAngles(at, u + kAhead < kTimes ? chunk : next, (u + kAhead) % kTimes);
      plain[u * 128] = x;
      plain[u * 128 + kPanel] = y;
    }
  }

  // Chunks blockIdx.y, blockIdx.y + gridDim.y, .., for one team after the other.
  __device__ __forceinline__ void Run() {
    static_assert(kTeams<D> == 2);
    const int h = blockIdx.x, step = gridDim.y;
    const WaveChunks chunks{p};
    int index = blockIdx.y + step;
    Chunk chunk = chunks.At(index - step), next = chunks.At(index);
    if (chunk.n >= 0) Copy(s.team[0].key, chunk, FirstKey(chunk, h), h);
    const __nv_bfloat16* first = FirstKey(next, h);
    if (next.n >= 0) Copy(s.team[1].key, next, first, h);
    CommitCopies();
#pragma unroll
    for (int u = 0; u < kAhead; ++u) LoadAngles(Place(), chunk, u);
    for (int k = 0, ends = 0;; ++k) {
      index += step;
      const Chunk after = chunks.At(index);
      const int team = k % 2, turn = k / 2;
      if (turn > 0) Await(s.plain_free[team], turn - 1);
      if (threadIdx.x % kFetchThreads == 0) s.entering[team] = EnteringRows(p.layer, chunk);
      WaitCopies<0>();
      PublishCopies();
      Arrive(s.key_there[team]);
      if (chunk.n >= 0)
        Undo(s.team[team], chunk, next);
      else
        ++ends;
      PublishCopies();
      Arrive(s.plain_there[team]);
      if (ends == 2) return;
      if (k > 0 && next.n >= 0) {
        Await(s.key_free[1 - team], (k - 1) / 2);
        Copy(s.team[1 - team].key, next, first, h);
        CommitCopies();
      }
      chunk = next;
      next = after;
      first = FirstKey(next, h);
    }
  }
};

#endif

}  // namespace dsla::cuda
