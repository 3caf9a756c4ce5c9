// DslaForwardCpu and DslaFoldCpu: planning of waves and decode batches, scratch memory and threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "ops/dsla/cpu_decode.h"
#include "ops/dsla/cpu_wave.h"
#include "ops/dsla/slot.h"

namespace dsla {
namespace {

// Scratch memory of a wave; large enough that a wave fills all threads, small enough to stay in the
// last-level cache for small models.
constexpr int64_t kWaveBytes = int64_t{24} << 20;
// Channels of a state per task of the scan.
constexpr int kScanRows = 16;

// Bytes that a chunk adds to a wave.
int64_t ChunkBytes(const DslaShape& shape, bool forward) {
  const int64_t SF = shape.SF();
  const int64_t tiles = forward ? 2 * kCpuChunk * SF : 0;
  const int64_t tokens = kCpuChunk * shape.D * (forward && shape.window > 0 ? 3 : 2);
  return 4 * shape.Hkv * (tiles + SF * (shape.D + 3) + tokens);
}
// Bytes that a segment adds: the window of its last times.
int64_t SegmentBytes(const DslaShape& shape, bool forward) {
  return forward ? int64_t{8} * shape.Hkv * shape.D * shape.window : 0;
}

// ParallelFor whose threads begin with ranges of their own, the same ones in every loop of as many
// tasks, and take from the others' when theirs is done: what a core made, it then mostly finds in
// its own cache.
template <class Body>
void ParallelByRange(const ExecContext& ctx, int64_t tasks, Body&& body) {
  constexpr int kMaxRanges = 32;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Range ranges[kMaxRanges];
  const int count = std::clamp(ctx.threads, 1, kMaxRanges);
  for (int i = 0; i < count; ++i) {
    ranges[i].next = tasks * i / count;
    ranges[i].end = tasks * (i + 1) / count;
  }
  // As many calls as tasks, and each finds one.
  ParallelFor(ctx, tasks, [&](int64_t, int thread) {
    for (int i = 0; i < count; ++i) {
      Range& range = ranges[(thread + i) % count];
      if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
      const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
      if (task < range.end) return body(task, thread);
    }
  });
}

// Hands out the chunks of all sequences, as many at a time as a wave holds.
class WavePlanner {
 public:
  // Times [begin, begin + count) of sequence n, whose first row is `row`.
  struct Span {
    int n;
    int64_t begin, count, row;
  };

  WavePlanner(Workspace& workspace, const DslaWave& wave, const Span* spans, int num_spans)
      : shape_(wave.shape),
        forward_(wave.forward != nullptr),
        spans_(spans),
        num_spans_(num_spans) {
    int64_t chunks = 0;
    for (int i = 0; i < num_spans; ++i) chunks += spans[i].count / kCpuChunk + 2;
    max_chunks_ = static_cast<int>(std::clamp<int64_t>(kWaveBytes / ChunkBytes(shape_, forward_), 1,
                                                       std::max<int64_t>(chunks, 1)));
    segments_ = workspace.Take<DslaSegment>(max_chunks_);
    chunks_ = workspace.Take<DslaChunk>(max_chunks_);
  }

  // False when nothing is left.
  bool Next(DslaWave* wave) {
    int64_t bytes = 0, tokens = 0, pairs = 0;
    int segments = 0, chunks = 0;
    while (span_ < num_spans_ && chunks < max_chunks_) {
      const Span& span = spans_[span_];
      bytes += SegmentBytes(shape_, forward_);
      if (chunks > 0 && bytes + ChunkBytes(shape_, forward_) > kWaveBytes) break;
      DslaSegment& seg = segments_[segments];
      seg = {span.n, span.begin + done_, 0, span.row + done_, tokens, pairs, chunks, 0};
      while (done_ < span.count && chunks < max_chunks_) {
        bytes += ChunkBytes(shape_, forward_);
        if (chunks > 0 && bytes > kWaveBytes) break;
        chunks_[chunks++] = NextChunk(span, segments, seg.count);
        seg.count += chunks_[chunks - 1].rows;
        ++seg.chunks;
      }
      tokens += seg.count + wave->StreamWindow();
      pairs += wave->SegmentPairs(seg);
      ++segments;
      if (done_ < span.count) break;  // the wave is full
      ++span_;
      done_ = 0;
    }
    wave->segments = segments_;
    wave->chunks = chunks_;
    wave->num_segments = segments;
    wave->num_chunks = chunks;
    wave->tokens = tokens;
    wave->pairs = pairs;
    return chunks > 0;
  }

 private:
  // The rows up to the next multiple of the chunk in the stream of entering tokens.
  DslaChunk NextChunk(const Span& span, int segment, int offset) {
    const int64_t enters = span.begin + done_ - shape_.window;
    const int64_t phase = (enters % kCpuChunk + kCpuChunk) % kCpuChunk;
    const int64_t rows = std::min<int64_t>(kCpuChunk - phase, span.count - done_);
    done_ += rows;
    const int64_t idle = std::clamp<int64_t>(shape_.sinks - enters, 0, rows);
    return {segment, offset, static_cast<int>(rows), static_cast<int>(idle)};
  }

  const DslaShape shape_;
  const bool forward_;
  const Span* spans_;
  const int num_spans_;
  int max_chunks_ = 0;
  DslaSegment* segments_ = nullptr;
  DslaChunk* chunks_ = nullptr;
  int span_ = 0;
  int64_t done_ = 0;  // times of the current span
};

void TakeWaveMemory(Workspace& workspace, DslaWave* wave) {
  const DslaShape& shape = wave->shape;
  const int64_t heads = shape.Hkv, SF = shape.SF(), D = shape.D;
  const int64_t tiles = wave->num_chunks * heads;
  wave->k = workspace.Take<float>(heads * wave->tokens * D);
  wave->v = workspace.Take<float>(heads * wave->tokens * D);
  wave->state = workspace.Take<float>(tiles * SF * D);
  wave->norm = workspace.Take<float>(tiles * SF);
  wave->scale_in = workspace.Take<float>(tiles * SF);
  wave->scale_out = workspace.Take<float>(tiles * SF);
  if (!wave->forward) return;
  wave->decay = workspace.Take<float>(tiles * kCpuChunk * SF);
  wave->keys = workspace.Take<float>(tiles * kCpuChunk * SF);
  wave->pair_k = workspace.Take<uint32_t>(heads * wave->pairs * D);
  wave->pair_v = workspace.Take<uint32_t>(heads * wave->pairs * D);
  if (wave->StreamWindow() == 0) return;
  const int64_t sinks = heads * wave->num_segments * shape.sinks * D;
  wave->sink_k = workspace.Take<float>(sinks);
  wave->sink_v = workspace.Take<float>(sinks);
}

// Loads, prepares and scans a wave; afterwards the slots' states stand at the wave's end.
void BuildStates(const ExecContext& ctx, const DslaWave& wave, float* scratch,
                 int64_t scratch_size) {
  const int Hkv = wave.shape.Hkv, SF = wave.shape.SF();
  ParallelByRange(ctx, static_cast<int64_t>(wave.num_chunks) * Hkv, [&](int64_t task, int thread) {
    DslaPrepareChunk(wave, static_cast<int>(task / Hkv), static_cast<int>(task % Hkv),
                     scratch + thread * scratch_size);
  });
  const int blocks = (SF + kScanRows - 1) / kScanRows;
  ParallelFor(ctx, static_cast<int64_t>(wave.num_segments) * Hkv * blocks, [&](int64_t task, int) {
    const int block = static_cast<int>(task % blocks), head = static_cast<int>(task / blocks);
    DslaScanStates(wave, head / Hkv, head % Hkv, block * kScanRows,
                   std::min(SF, (block + 1) * kScanRows));
  });
}

// Puts a KV head of the segment's last tokens into the ring and of its first ones among the sinks.
void StoreTokens(const DslaWave& wave, const DslaSegment& seg, int64_t h) {
  const DslaShape& shape = wave.shape;
  const int64_t bytes = shape.D * SizeOf(shape.kv_dtype), W = shape.window, S = shape.sinks;
  const auto* k = static_cast<const std::byte*>(wave.forward->k);
  const auto* v = static_cast<const std::byte*>(wave.forward->v);
  const DslaSlot slot = SlotAt(wave.layout, wave.states, wave.slots[seg.n]);
  const auto copy = [&](int64_t t, std::byte* to_k, std::byte* to_v, int64_t at) {
    const int64_t from = ((seg.row + t - seg.begin) * shape.Hkv + h) * bytes;
    std::memcpy(to_k + at * bytes, k + from, static_cast<size_t>(bytes));
    std::memcpy(to_v + at * bytes, v + from, static_cast<size_t>(bytes));
  };
  const int64_t end = seg.begin + seg.count;
  for (int64_t t = std::max(seg.begin, end - W); t < end; ++t)
    copy(t, slot.ring_k, slot.ring_v, h * W + t % W);
  for (int64_t t = seg.begin; t < std::min(S, end); ++t)
    copy(t, slot.sink_k, slot.sink_v, h * S + t);
}

// Query heads of one KV head that a task takes together: all, to read the states once, unless that
// leaves threads idle or the tile outgrows the L2 cache.
int HeadsPerTask(const ExecContext& ctx, const DslaWave& wave) {
  const int G = wave.shape.G();
  constexpr int64_t kTileBytes = 128 << 10;
  int64_t heads = std::max<int64_t>(1, kTileBytes / (4 * kQueryBlock * wave.shape.SF()));
  const int64_t tiles = static_cast<int64_t>(wave.num_chunks) * wave.shape.Hkv;
  if (tiles < int64_t{2} * ctx.threads) heads = 1;
  heads = std::min<int64_t>(heads, G);
  while (G % heads != 0) --heads;
  return static_cast<int>(heads);
}

void RunForwardWave(const ExecContext& ctx, DslaWave& wave) {
  Workspace::Scope scope(*ctx.workspace);
  TakeWaveMemory(*ctx.workspace, &wave);
  const int H = wave.shape.H, heads = HeadsPerTask(ctx, wave);
  const int64_t scratch_size =
      (std::max(DslaPrepareScratch(wave.shape), DslaQueryScratch(wave.shape, heads)) + 15) / 16 *
      16;
  float* scratch = ctx.workspace->Take<float>(scratch_size * ctx.threads);
  BuildStates(ctx, wave, scratch, scratch_size);
  // What was in the rings has been loaded, so that storing is part of the same loop.
  const int groups = H / heads, Hkv = wave.shape.Hkv;
  constexpr int kBlocks = kCpuChunk / kQueryBlock;
  const int64_t stores = wave.shape.window == 0 ? 0 : int64_t{wave.num_segments} * Hkv;
  const int64_t blocks = int64_t{wave.num_chunks} * kBlocks;
  ParallelByRange(ctx, blocks * groups + stores, [&](int64_t task, int thread) {
    if (task >= blocks * groups) {
      const int64_t store = task - blocks * groups;
      return StoreTokens(wave, wave.segments[store / Hkv], store % Hkv);
    }
    const int64_t block = task / groups, group = task % groups;
    const auto chunk = static_cast<int>(block / kBlocks);
    const auto first = static_cast<int>(block % kBlocks) * kQueryBlock;
    if (first < wave.chunks[chunk].rows)
      DslaQueryBlock(wave, chunk, first, static_cast<int>(group) * heads, heads,
                     scratch + thread * scratch_size);
  });
}

void RunDecode(const ExecContext& ctx, const DslaArgs& args, const DslaDecodeRow* rows,
               int num_rows) {
  Workspace& workspace = *ctx.workspace;
  Workspace::Scope scope(workspace);
  const DslaShape& shape = args.shape;
  const int64_t R = num_rows, H = shape.H, Hkv = shape.Hkv, D = shape.D, SF = shape.SF();
  DslaDecode batch;
  batch.args = &args;
  batch.layout = MakeSlotLayout(shape);
  batch.rows = rows;
  batch.num_rows = num_rows;
  const int64_t blocks = batch.Blocks();
  batch.decay = workspace.Take<float>(R * Hkv * SF);
  batch.gain = workspace.Take<float>(R * Hkv * SF);
  batch.v = workspace.Take<float>(R * Hkv * D);
  batch.query = workspace.Take<float>(R * H * SF);
  batch.linear = workspace.Take<float>(R * blocks * H * D);
  batch.denominator = workspace.Take<float>(R * blocks * H);
  batch.window = workspace.Take<float>(R * H * D);
  batch.top = workspace.Take<float>(R * H);
  batch.sum = workspace.Take<float>(R * H);
  const int64_t scratch_size = (DslaDecodeScratch(shape) + 15) / 16 * 16;
  float* scratch = workspace.Take<float>(scratch_size * ctx.threads);

  const int64_t row_blocks = (R + kDecodeRows - 1) / kDecodeRows;
  // The larger tasks first.
  ParallelFor(ctx, row_blocks * (Hkv + H), [&](int64_t task, int thread) {
    const int head = static_cast<int>(task / row_blocks);
    const int begin = static_cast<int>(task % row_blocks) * kDecodeRows;
    const int end = std::min(num_rows, begin + kDecodeRows);
    if (head < Hkv)
      DslaDecodeKeys(batch, head, begin, end, scratch + thread * scratch_size);
    else
      DslaDecodeQueries(batch, head - static_cast<int>(Hkv), begin, end,
                        scratch + thread * scratch_size);
  });
  const int64_t parts = blocks + (shape.window > 0 ? 1 : 0);
  ParallelFor(ctx, R * Hkv * parts, [&](int64_t task, int thread) {
    const int part = static_cast<int>(task % parts);
    const int h = static_cast<int>(task / parts % Hkv), r = static_cast<int>(task / parts / Hkv);
    if (part < blocks)
      DslaDecodeStates(batch, r, h, part);
    else
      DslaDecodeWindow(batch, r, h, scratch + thread * scratch_size);
  });
  if (R == 1) {
    DslaDecodeMerge(batch, 0);
  } else {
    ParallelFor(ctx, R, [&](int64_t r, int) { DslaDecodeMerge(batch, static_cast<int>(r)); });
  }
}

// The last W tokens to the ring and the first S to the sinks.
void CopyTail(const DslaFoldArgs& args, const DslaSlot& slot, int n) {
  const DslaShape& shape = args.shape;
  const int64_t bytes = shape.D * SizeOf(shape.kv_dtype), W = shape.window, S = shape.sinks;
  const int64_t pos = args.rows.pos[n];
  const int32_t* pages = args.tables.pages + args.tables.page_start[n];
  const auto copy = [&](int64_t t, std::byte* to_k, std::byte* to_v, int64_t per_head, int64_t at) {
    const int64_t size = args.kv.page_size;
    for (int64_t h = 0; h < shape.Hkv; ++h) {
      const int64_t to = (h * per_head + at) * bytes;
      DslaCopyCachedRow(args.kv, args.kv.k, pages[t / size], h, t % size, to_k + to);
      DslaCopyCachedRow(args.kv, args.kv.v, pages[t / size], h, t % size, to_v + to);
    }
  };
  for (int64_t t = std::max<int64_t>(0, pos - W); t < pos; ++t)
    copy(t, slot.ring_k, slot.ring_v, W, t % W);
  for (int64_t t = 0; t < std::min(S, pos); ++t) copy(t, slot.sink_k, slot.sink_v, S, t);
}

}  // namespace

void DslaForwardCpu(const ExecContext& ctx, const DslaArgs& args) {
  CheckDslaArgs(args);
  DSLA_CHECK(ctx.workspace);
  Workspace& workspace = *ctx.workspace;
  Workspace::Scope scope(workspace);
  const int N = args.rows.N;
  auto* decodes = workspace.Take<DslaDecodeRow>(N);
  auto* spans = workspace.Take<WavePlanner::Span>(N);
  int num_decodes = 0, num_spans = 0;
  for (int n = 0; n < N; ++n) {
    const int64_t row = args.rows.row_start[n], pos = args.rows.pos[n];
    const int count = args.rows.count(n);
    DSLA_CHECK(count >= 0 && pos >= 0);
    if (count == 1) decodes[num_decodes++] = {n, row, pos};
    if (count > 1) spans[num_spans++] = {n, pos, count, row};
  }
  if (num_decodes > 0) RunDecode(ctx, args, decodes, num_decodes);
  if (num_spans == 0) return;
  DslaWave wave;
  wave.shape = args.shape;
  wave.params = args.params;
  wave.layout = MakeSlotLayout(args.shape);
  wave.states = args.states;
  wave.slots = args.slots;
  wave.forward = &args;
  wave.bf16_window = DslaBf16Window(args.shape);
  WavePlanner planner(workspace, wave, spans, num_spans);
  while (planner.Next(&wave)) RunForwardWave(ctx, wave);
}

void DslaFoldCpu(const ExecContext& ctx, const DslaFoldArgs& args) {
  CheckDslaFoldArgs(args);
  DSLA_CHECK(ctx.workspace);
  Workspace& workspace = *ctx.workspace;
  Workspace::Scope scope(workspace);
  const DslaSlotLayout layout = MakeSlotLayout(args.shape);
  const int N = args.rows.N;
  auto* spans = workspace.Take<WavePlanner::Span>(N);
  int num_spans = 0;
  for (int n = 0; n < N; ++n) {
    DSLA_CHECK(args.rows.pos[n] >= 0);
    DslaResetSlot(args.shape, args.states, args.slots[n]);
    CopyTail(args, SlotAt(layout, args.states, args.slots[n]), n);
    // Token e enters at time e + W; from token 0 on, so that chunks are cut as in the forward.
    const int64_t enters = args.rows.pos[n] - args.shape.window;
    if (enters > args.shape.sinks) spans[num_spans++] = {n, args.shape.window, enters, 0};
  }
  DslaWave wave;
  wave.shape = args.shape;
  wave.params = args.params;
  wave.layout = layout;
  wave.states = args.states;
  wave.slots = args.slots;
  wave.fold = &args;
  WavePlanner planner(workspace, wave, spans, num_spans);
  const int64_t scratch_size = (DslaPrepareScratch(args.shape) + 15) / 16 * 16;
  float* scratch = workspace.Take<float>(scratch_size * ctx.threads);
  while (planner.Next(&wave)) {
    Workspace::Scope wave_scope(workspace);
    TakeWaveMemory(workspace, &wave);
    BuildStates(ctx, wave, scratch, scratch_size);
  }
}

}  // namespace dsla
