// Runs the chunked form's kernels wave by wave, and writes rings and sinks.
#include <algorithm>

#include "base/check.h"
#include "ops/dsla/cuda/prefill.cuh"

namespace dsla::cuda {
namespace {

thread_local LaunchTrace trace = nullptr;
thread_local void* trace_context = nullptr;

constexpr int kRingThreads = 256;

// grid (Hkv, N, pieces of the ring's and the sinks' rows). After the queries: the last W tokens to
// the ring, the first S to the sinks.
template <int D, bool kFold>
__global__ void __launch_bounds__(kRingThreads)
    RingKernel(const __grid_constant__ PrefillParams p) {
  constexpr int kPieces = D / 8;
  const Layer& l = p.layer;
  const int n = blockIdx.y, h = blockIdx.x, pos = l.pos[n];
  const int count = kFold ? pos : l.row_start[n + 1] - l.row_start[n];
  const int begin = kFold ? 0 : pos, last = begin + count - 1;
  const int i = blockIdx.z * kRingThreads + threadIdx.x, c = i % kPieces;
  const bool to_ring = i / kPieces < l.W, valid = i / kPieces < l.W + l.S;
  const int place = i / kPieces - (to_ring ? 0 : l.W);
  // The newest token at this place; negative if there is none.
  const int s = !to_ring ? place : last < 0 ? -1 : last - (last - place + l.W) % l.W;
  const bool comes = valid && s >= begin && s <= last;
  uint4 k{}, v{};
  if (comes) {  // new rows and pages, which nothing before this writes
    KvRow from;
    if constexpr (kFold)
      from = RowOf<D>(l, p.pages, n, h, s);
    else
      from = RowOf<D>(l, p.rows, n, h, s);
    k = __ldcg(reinterpret_cast<const uint4*>(from.k + 8 * c));
    v = __ldcg(reinterpret_cast<const uint4*>(from.v + 8 * c));
  }
  AwaitPrevious();
  AllowNext();
  if (!valid || (!kFold && !comes)) return;  // keeps what is there
  const int64_t at = ((int64_t{h} * (to_ring ? l.W : l.S) + place) * D + 8 * c) * 2;
  std::byte* slot = SlotBase(l, n);
  *reinterpret_cast<uint4*>(slot + (to_ring ? l.at.ring_k : l.at.sink_k) + at) = k;
  *reinterpret_cast<uint4*>(slot + (to_ring ? l.at.ring_v : l.at.sink_v) + at) = v;
}

template <int D>
void LaunchRing(const PrefillParams& p, cudaStream_t stream) {
  const int pieces = (p.layer.W + p.layer.S) * (D / 8);
  if (pieces == 0) return;  // a fold without a window
  const dim3 grid(p.layer.Hkv, p.layer.N, (pieces + kRingThreads - 1) / kRingThreads);
  if (p.fold)
    Start<RingKernel<D, true>>("ring", grid, kRingThreads, 0, p, stream);
  else
    Start<RingKernel<D, false>>("ring", grid, kRingThreads, 0, p, stream);
}

// What is written for compute capability 9.0: with D and F 128 the states stay on the chip from
// chunk to chunk; those of D 64 are small enough for `carry`, and 512 channels do not fit.
Form FormOf(const DslaShape& s) {
  if (!OnHopper()) return Form::kAnywhere;
  if (s.D == 64) return Form::kQueries;
  return s.F == s.D ? Form::kKeepsStates : Form::kAnywhere;
}

// Of a wave, not counting one for each sequence that is shorter than the others: their chunks and
// the number that a sequence should have bound it.
int MostSegments(const PrefillParams& p, int N) {
  return static_cast<int>(std::min<int64_t>(
      p.wave_chunks / p.cut.least, p.wave_chunks / p.cut.most + int64_t{N} * p.cut.wanted));
}

// How sequences are cut into segments; not at all where the blocks that a sequence has fill a GPU
// by themselves, or none of the call's sequences has so many chunks. A sequence has the same
// results in both cases. Only the shape and the sequence's rows decide, so results do not depend on
// the other sequences of a call.
Cut CutOf(const DslaShape& s, int64_t T, bool keeps_states) {
  Cut cut;
  if (keeps_states) {  // a block an SM, and 8192 tokens are as many as there are
    const int most = s.Hkv >= 24 ? 32 : s.Hkv >= 12 ? 16 : 8;
    if (s.Hkv < 96) cut = {most == 8 ? 4 : 8, most, std::max(132 / s.Hkv, 1)};
  } else {
    // As many as a GPU of 132 multiprocessors has room for at once, of those that `carry` has.
    const int blocks = s.Hkv * s.SF() / (s.D == 128 ? 32 : 64);
    if (s.Hkv * s.SF() / 32 < 192) cut = {2, 24, std::clamp(4 * 132 / blocks, 1, 44)};
  }
  return MostChunks(T) > cut.least ? cut : Cut{};
}

// The waves of a call, at most `chunks` chunks each but no fewer than two segments.
void PlanWaves(const DslaShape& s, int N, int64_t T, int chunks, bool fold, PrefillParams* p) {
  p->form = fold ? Form::kAnywhere : FormOf(s);
  const int most = MaxChunks(N, T);
  p->cut = CutOf(s, T, p->form == Form::kKeepsStates);
  p->segment = p->cut.least;
  p->fold = fold;
  const int longest = p->segment > 0 ? p->cut.Chunks(T) : 0;
  p->wave_chunks = std::min(std::max(chunks, std::max(2 * longest, 1)), most);
  p->waves = (most + p->wave_chunks - 1) / std::max(p->wave_chunks, 1);
  p->wave_segments = N;
  const bool only = N == 1 && !fold;
  p->only_rows = only ? static_cast<int>(T) : 0;
  p->only_segment = p->wave_chunks;
  if (p->segment == 0) return;
  if (only) p->only_segment = longest;
  if (p->wave_chunks < most) {
    // A segment that does not fit leaves chunks of a wave unused, but not if there is one sequence,
    // whose segments' length is known.
    if (only) p->wave_chunks = p->wave_chunks / longest * longest;
    const int used = only ? p->wave_chunks : p->wave_chunks - longest + 1;
    p->waves = (most + used - 1) / used;
  }
  // Every one that is not there costs the launches of blocks that find out.
  p->wave_segments =
      only ? static_cast<int>(CeilDiv(p->wave_chunks, longest)) : N + MostSegments(*p, N);
}

// Of a fold in one kernel: what segments add is all that goes through memory. A wave has so many of
// them as take the place of a wave of chunks elsewhere, but all of one sequence's.
int64_t CarveFold(const DslaShape& s, int N, int64_t T, int wave, std::byte* base,
                  PrefillParams* p) {
  Carver c{base};
  const int64_t each = MostFoldSegments(s);
  const int64_t most = std::min(N * each, MaxChunks(N, T) / int64_t{kLeastFoldSegment} + N);
  const int64_t segments = std::min(std::max(each, int64_t{wave} * 32 / s.D), most);
  p->fold = true;
  p->most_segments = static_cast<int>(each);
  p->wave_segments = static_cast<int>(segments);
  p->waves = static_cast<int>((most + segments - 1) / segments);
  p->start = c.Take<float>(segments * s.Hkv * s.SF() * s.D);
  p->start_norm = c.Take<float>(segments * s.Hkv * s.SF());
  p->start_decay = c.Take<float>(segments * s.Hkv * s.SF());
  return c.used;
}

int64_t Carve(const DslaShape& s, int N, int64_t T, int wave, bool fold, std::byte* base,
              PrefillParams* p) {
  if (fold && OnHopper()) return CarveFold(s, N, T, wave, base, p);
  Carver c{base};
  PlanWaves(s, N, T, wave, fold, p);
  // The plan's part is as large for any wave, so that a larger wave never takes less.
  const int64_t most = MaxChunks(N, T), chunks = p->wave_chunks, parts = chunks * s.Hkv;
  const int64_t slots = p->segment > 0 ? 3 * most + 2 * p->cut.most : 2 * most;
  DSLA_CHECK(p->waves <= most && p->waves * chunks <= slots);
  p->chunks = c.Take<Chunk>(slots);
  p->wave_first = c.Take<int>(most + 1);
  p->segments = c.Take<Segment>(most + N);
  p->decay = c.Take<float2>(parts * s.SF());
  p->key_sum = c.Take<float>(parts * s.SF() * 4);
  p->key = c.Take<__nv_bfloat16>(parts * s.SF() * kChunk);
  if (!fold) {
    if (p->form != Form::kQueries) p->lse = c.Take<float>(chunks * s.H * kChunk);
    p->growth = c.Take<uint32_t>(parts * s.SF() * kChunk / 2);
  }
  if (!fold && p->form != Form::kKeepsStates) {
    p->norm = c.Take<float>(parts * s.SF());
    p->state = c.Take<__nv_bfloat16>(parts * s.SF() * s.D);
  }
  if (p->segment > 0) {
    // One for each whole segment, and for a last one that is not, if its sequence has others.
    const int64_t stores = MostSegments(*p, N) + std::min<int64_t>(N, most / (p->segment + 1));
    p->start = c.Take<float>(stores * s.Hkv * s.SF() * s.D);
    p->start_norm = c.Take<float>(stores * s.Hkv * s.SF());
    p->start_decay = c.Take<float>(stores * s.Hkv * s.SF());
  }
  return c.used;
}

// The most chunks per wave, at least `least`, that fit into so many bytes.
int FittingChunks(const DslaShape& s, int N, int64_t T, bool fold, int least, int64_t bytes) {
  PrefillParams unused;
  int fits = least;
  for (int too_many = MaxChunks(N, T) + 1; fits + 1 < too_many;) {
    const int chunks = fits + (too_many - fits) / 2;
    (Carve(s, N, T, chunks, fold, nullptr, &unused) <= bytes ? fits : too_many) = chunks;
  }
  return fits;
}

// The longer a wave, the better it fills a GPU, as far as a workspace of this size goes: few heads
// gain up to 1000 chunks, 32 heads nothing beyond the least. Multiples of that are whole rounds of
// the multiprocessors.
int64_t WorkspaceBytes(const DslaShape& s, int N, int64_t T, int chunks, bool fold) {
  constexpr int64_t kBytes = int64_t{512} << 20;
  constexpr int kLeast = 128;
  const int most = MaxChunks(N, T);
  if (chunks == 0) {
    chunks = FittingChunks(s, N, T, fold, std::min(kLeast, most), kBytes);
    if (chunks < most) chunks = chunks / kLeast * kLeast;
  }
  PrefillParams unused;
  return Carve(s, N, T, chunks, fold, nullptr, &unused);
}

// The addresses, with as many chunks per wave as fit.
void CarveAll(const DslaShape& s, int N, int64_t T, bool fold, void* workspace, int64_t bytes,
              PrefillParams* p) {
  DSLA_CHECK(workspace && reinterpret_cast<uintptr_t>(workspace) % 256 == 0);
  DSLA_CHECK(bytes >= Carve(s, N, T, 1, fold, nullptr, p));
  const int fits = FittingChunks(s, N, T, fold, 1, bytes);
  Carve(s, N, T, fits, fold, static_cast<std::byte*>(workspace), p);
}

int Run(PrefillParams& p, const DslaShape& s, bool has_plan, cudaStream_t stream) {
  const bool in_one = p.most_segments > 0;
  for (p.wave = 0; in_one && p.wave < p.waves; ++p.wave) {
    LaunchFold(p, s.D, stream);
    if (p.most_segments > 1) LaunchCombine(p, s.D, stream);
  }
  if (!in_one && p.only_rows == 0 && !has_plan) LaunchPlan(p, stream);
  for (p.wave = 0; !in_one && p.wave < p.waves; ++p.wave) {
    LaunchPrepare(p, s.D, stream);
    const bool keeps_states = p.form == Form::kKeepsStates;
    if (p.fold || p.segment > 0)
      keeps_states ? LaunchChunksSummary(p, stream) : LaunchSummary(p, s.D, stream);
    if (p.segment > 0) LaunchScan(p, s.D, stream);
    if (p.fold) continue;
    if (!keeps_states) LaunchCarry(p, s.D, stream);
    if (p.form == Form::kQueries) {
      LaunchQueries(p, stream);
      continue;
    }
    // Needs nothing of the kernel before it, and runs beside that.
    if (s.window > 0) LaunchWindow(p, s.D, stream);
    keeps_states ? LaunchChunks(p, stream) : LaunchOutput(p, s.D, stream);
  }
  s.D == 64 ? LaunchRing<64>(p, stream) : LaunchRing<128>(p, stream);
  return cudaGetLastError();
}

template <typename Args>
void CheckCommon(const Args& a) {
  CheckShape(a.shape, a.layout, a.states);
  DSLA_CHECK(a.rows.pos && a.slots && a.T >= 0);
  DSLA_CHECK(a.weights.packed && a.weights.mix && a.weights.rope_cos && a.weights.rope_sin);
}

}  // namespace

bool OnHopper() {
  const Device& device = CurrentDevice();
  return device.major == 9 && device.minor == 0;
}

int MaxChunks(int N, int64_t T) { return static_cast<int>(T / kChunk) + 2 * N; }

void SetLaunchTrace(LaunchTrace hook, void* context) {
  trace = hook;
  trace_context = context;
}
void Trace(const char* kernel, Stream stream) {
  if (trace) trace(kernel, stream, trace_context);
}

int64_t PrefillWorkspaceBytes(const DslaShape& shape, int N, int64_t T, int chunks) {
  return WorkspaceBytes(shape, N, T, chunks, false);
}

int64_t FoldWorkspaceBytes(const DslaShape& shape, int N, int64_t T, int chunks) {
  return WorkspaceBytes(shape, N, T, chunks, true);
}

int Prefill(const DslaCudaArgs& a, Stream stream) {
  if (a.rows.N == 0 || a.T == 0) return cudaSuccess;
  CheckCommon(a);
  DSLA_CHECK(a.rows.row_start && a.q && a.k && a.v && a.out);
  DSLA_CHECK(a.shape.window == 0 || a.claim);
  DSLA_CHECK(reinterpret_cast<uintptr_t>(a.out) % 16 == 0);
  DSLA_CHECK(a.q_stride % 8 == 0 && a.k_stride % 8 == 0 && a.v_stride % 8 == 0);
  PrefillParams p{};
  p.layer = MakeLayer(a);
  p.rows = {static_cast<const __nv_bfloat16*>(a.k), static_cast<const __nv_bfloat16*>(a.v),
            a.k_stride, a.v_stride};
  p.q = static_cast<const __nv_bfloat16*>(a.q);
  p.q_stride = a.q_stride;
  p.total_rows = a.T;
  p.claim = a.claim;
  p.out = static_cast<__nv_bfloat16*>(a.out);
  CarveAll(a.shape, a.rows.N, a.T, false, a.workspace, a.workspace_bytes, &p);
  return Run(p, a.shape, a.has_plan, stream);
}

int Fold(const DslaCudaFoldArgs& a, Stream stream) {
  if (a.rows.N == 0) return cudaSuccess;
  CheckCommon(a);
  DSLA_CHECK(a.tables.page_start && a.tables.pages && a.kv.k && a.kv.v && a.kv.page_size > 0);
  DSLA_CHECK(a.kv.Hkv == a.shape.Hkv && a.kv.D == a.shape.D && a.kv.dtype == DType::kBF16);
  PrefillParams p{};
  p.layer = MakeLayer(a);
  p.pages = {static_cast<const __nv_bfloat16*>(a.kv.k),
             static_cast<const __nv_bfloat16*>(a.kv.v),
             a.kv.page_stride,
             a.kv.page_size,
             a.tables.page_start,
             a.tables.pages};
  CarveAll(a.shape, a.rows.N, a.T, true, a.workspace, a.workspace_bytes, &p);
  return Run(p, a.shape, /*has_plan=*/false, stream);
}

}  // namespace dsla::cuda
