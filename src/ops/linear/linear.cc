#include "ops/linear/linear.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/half.h"
#include "ops/linear/group_quant.h"
#include "ops/linear/linear_gemm.h"
#include "ops/linear/linear_kernels.h"

namespace dsla {
namespace {

enum class Path { kRows, kGemmF32, kGemmBf16 };

bool IsQuantized(WeightFormat format) {
  return format == WeightFormat::kInt8 || format == WeightFormat::kInt4;
}
DType ElementOf(WeightFormat format) {
  return format == WeightFormat::kF32 ? DType::kF32 : DType::kBF16;
}

// On AVX2 our own loop takes less CPU time than the conversion of a panel and the fp32 GEMM up to
// about 100 rows of every shape in linear_bench (16 rows: half, 64 rows: 10 to 25% less), and it
// keeps the batch out of a row's result; beyond, the GEMM's packing pays.
constexpr int64_t kMaxRows = 64;
// Integers where the CPU multiplies bf16, which also has the 512-bit integer loop.
constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();
static_assert(kMaxRows >= kLinearInvariantRows);

// How T rows are multiplied. A CPU with bf16 dot products (AVX512_BF16, AMX) has several times the
// fp32 rate in them, worth rounding the activations, and what integer weights stand for, to bf16
// once T is a prefill's, not a batch of decodes. On other CPUs libtorch's bf16 product is far
// slower than fp32, hence the panels.
Path ChoosePath(int64_t T, WeightFormat format) {
  if (T <= LinearLoopRows(format)) return Path::kRows;
  return format != WeightFormat::kF32 && CpuMultipliesBf16() ? Path::kGemmBf16 : Path::kGemmF32;
}

// Below this many bytes of weights times rows, starting threads costs more than they save.
constexpr int64_t kMinParallelBytes = 64 << 10;
// A task of the row loop: large enough that handing it out is nothing, small enough to even out.
constexpr int64_t kTaskBytes = 64 << 10;
// A task of the GEMM: enough features for the library to run at full speed and for the activations,
// which every task reads, to be little beside them; a panel of converted weights stays in the
// core's own cache, and is made from as many fp32 rows at a time.
constexpr int64_t kMinTaskFeatures = 64, kMaxTaskFeatures = 1024, kFeatureUnit = 16;
constexpr int64_t kPanelBytes = 1 << 20;
constexpr int64_t kBf16RowsAtOnce = 8;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How many of `units` one task takes. At least two tasks per thread, so that a thread held up by
// the system does not hold up all.
int64_t TaskUnits(const ExecContext& ctx, int64_t unit_bytes, int64_t units) {
  return std::clamp<int64_t>(kTaskBytes / unit_bytes, 1,
                             (units + 2 * ctx.threads - 1) / (2 * ctx.threads));
}

}  // namespace

struct Linear::Storage {
  WeightFormat format;
  DType dtype;            // of the elements unless quantised
  int64_t stride;         // elements between rows; inputs, padded
  GroupQuantShape quant;  // if quantised
  void* weight;           // [out, stride] of dtype or the blocks of `quant`; in `own` or an arena
  int64_t weight_bytes;
  Buffer<char> own;
  Buffer<float> bias;

  bf16* w16() const { return static_cast<bf16*>(weight); }
  float* w32() const { return static_cast<float*>(weight); }
  uint8_t* blocks() const { return static_cast<uint8_t*>(weight); }
  const float* bias_or_null() const { return bias.size() > 0 ? bias.data() : nullptr; }

  void Store(int64_t begin, int64_t end, const float* from, int64_t in);
  void ForwardRows(const ExecContext& ctx, const float* x, int64_t x_stride, int64_t T, int64_t in,
                   int64_t out, float* y, int64_t y_stride, bool accumulate) const;
  void ForwardQuantized(const ExecContext& ctx, const float* x, int64_t x_stride, int64_t T,
                        float* y, int64_t y_stride, bool accumulate) const;
  struct Cut;
  Cut CutProduct(int threads, int64_t T, int64_t out, Path path) const;
  bf16* NarrowRows(const ExecContext& ctx, const GemmArgs& args) const;
  void GemmPiece(const Gemm& gemm, GemmArgs args, int64_t feature, Path path, const bf16* x16,
                 char* panel) const;
  void ForwardGemm(const ExecContext& ctx, const GemmArgs& args, Path path) const;
  // Features [begin, end) as fp32 rows `stride` floats apart.
  void Widen(int64_t begin, int64_t end, float* to) const;
};

int64_t LinearLoopRows(WeightFormat format) {
  if (!CpuMultipliesBf16() || format == WeightFormat::kF32) return kMaxRows;
  return IsQuantized(format) ? kAnyRows : kLinearInvariantRows;
}

Status PrepareLinear(WeightFormat format) {
  return LinearLoopRows(format) == kAnyRows ? Status::Ok() : LoadGemm().status();
}

const char* Name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return "fp32";
    case WeightFormat::kBF16:
      return "bf16";
    case WeightFormat::kInt8:
      return "int8";
    case WeightFormat::kInt4:
      return "int4";
  }
  return "unknown";
}

Linear::Linear(std::span<const float> weight, int64_t out, int64_t in, WeightFormat format,
               std::span<const float> bias, Arena* arena)
    : Linear(out, in, format, bias, arena) {
  DSLA_CHECK(static_cast<int64_t>(weight.size()) == out * in);
  Store(0, weight);
}

Linear::Linear(int64_t out, int64_t in, WeightFormat format, std::span<const float> bias,
               Arena* arena)
    : storage_(std::make_unique<Storage>()), in_(in), out_(out) {
  DSLA_CHECK(in > 0 && out > 0);
  DSLA_CHECK(bias.empty() || static_cast<int64_t>(bias.size()) == out);
  Storage& s = *storage_;
  s.format = format;
  s.dtype = ElementOf(format);
  s.stride = RoundUp(in, kLinearPad);
  s.quant = {.out = out, .in = in, .bits = format == WeightFormat::kInt4 ? 4 : 8};
  s.weight_bytes = IsQuantized(format) ? s.quant.bytes() : out * s.stride * SizeOf(s.dtype);
  if (arena == nullptr) s.own.Resize(s.weight_bytes);
  s.weight = arena != nullptr ? arena->Take(s.weight_bytes) : s.own.data();
  s.bias.Resize(static_cast<int64_t>(bias.size()));
  std::copy(bias.begin(), bias.end(), s.bias.data());
}

void Linear::Store(int64_t begin, std::span<const float> rows) {
  static_assert(kStoreRows == kQuantBlock);
  const int64_t end = begin + static_cast<int64_t>(rows.size()) / in_;
  DSLA_CHECK(begin >= 0 && end <= out_ && (end - begin) * in_ == static_cast<int64_t>(rows.size()));
  storage_->Store(begin, end, rows.data(), in_);
}

void Linear::Storage::Store(int64_t begin, int64_t end, const float* from, int64_t in) {
  if (IsQuantized(format)) {
    GroupQuantize(quant, begin, end, from, blocks());
    return;
  }
  for (int64_t o = begin; o < end; ++o) {
    const float* row = from + (o - begin) * in;
    if (dtype == DType::kBF16) {
      bf16* to = w16() + o * stride;
      NarrowBf16(row, to, in);
      std::fill(to + in, to + stride, bf16{0});
    } else {
      float* to = w32() + o * stride;
      std::copy(row, row + in, to);
      std::fill(to + in, to + stride, 0.f);
    }
  }
}

void Linear::Storage::Widen(int64_t begin, int64_t end, float* to) const {
  if (IsQuantized(format))
    GroupDequantize(quant, blocks(), begin, end, to, stride);
  else
    WidenBf16(w16() + begin * stride, to, (end - begin) * stride);
}

Linear::Linear(Linear&& other) noexcept
    : storage_(std::move(other.storage_)),
      in_(std::exchange(other.in_, 0)),
      out_(std::exchange(other.out_, 0)) {}

Linear& Linear::operator=(Linear&& other) noexcept {
  storage_ = std::move(other.storage_);
  in_ = std::exchange(other.in_, 0);
  out_ = std::exchange(other.out_, 0);
  return *this;
}

Linear::Linear() = default;
Linear::~Linear() = default;

int64_t Linear::bytes() const {
  if (empty()) return 0;
  return storage_->weight_bytes + storage_->bias.size() * static_cast<int64_t>(sizeof(float));
}

void Linear::Forward(const ExecContext& ctx, const float* x, int64_t x_stride, int64_t T, float* y,
                     int64_t y_stride, Accumulate accumulate, Products products) const {
  DSLA_CHECK(!empty());
  DSLA_CHECK(ctx.workspace != nullptr);
  DSLA_CHECK(T <= 1 || (x_stride >= in_ && y_stride >= out_));
  if (T <= 0) return;
  const bool add = accumulate == Accumulate::kYes;
  const Path path =
      products == Products::kInvariant ? Path::kRows : ChoosePath(T, storage_->format);
  if (path == Path::kRows) {
    // No more rows at a time than keep the activations in the cache.
    for (int64_t t = 0; t < T; t += kMaxRows) {
      storage_->ForwardRows(ctx, x + t * x_stride, x_stride, std::min(kMaxRows, T - t), in_, out_,
                            y + t * y_stride, y_stride, add);
    }
    return;
  }
  GemmArgs args{.x = x,
                .x_stride = x_stride,
                .w_stride = storage_->stride,
                .y = y,
                .y_stride = y_stride,
                .T = T,
                .in = in_,
                .out = out_,
                .accumulate = add};
  storage_->ForwardGemm(ctx, args, path);
}

void Linear::Storage::ForwardQuantized(const ExecContext& ctx, const float* x, int64_t x_stride,
                                       int64_t T, float* y, int64_t y_stride,
                                       bool accumulate) const {
  const Workspace::Scope scope(*ctx.workspace);
  const QuantRows rows{.q = ctx.workspace->Take<int16_t>(T * quant.stride()),
                       .scale = ctx.workspace->Take<float>(T * quant.groups()),
                       .sum = ctx.workspace->Take<float>(T * quant.groups())};
  QuantizeRows(quant, x, x_stride, T, rows);
  const GroupQuantArgs args{.shape = quant,
                            .weight = blocks(),
                            .bias = bias_or_null(),
                            .x = rows,
                            .T = T,
                            .y = y,
                            .y_stride = y_stride,
                            .accumulate = accumulate};
  const int64_t blocks = quant.blocks();
  if (weight_bytes * T < kMinParallelBytes) {
    GroupQuantProduct(args, 0, blocks);
    return;
  }
  // Even: the kernels take two blocks at a time where vectors are wide enough.
  const int64_t count = RoundUp(TaskUnits(ctx, quant.block_bytes(), blocks), 2);
  ParallelFor(ctx, (blocks + count - 1) / count, [&](int64_t task, int) {
    GroupQuantProduct(args, task * count, std::min(blocks, (task + 1) * count));
  });
}

void Linear::Storage::ForwardRows(const ExecContext& ctx, const float* x, int64_t x_stride,
                                  int64_t T, int64_t in, int64_t out, float* y, int64_t y_stride,
                                  bool accumulate) const {
  if (IsQuantized(format)) {
    ForwardQuantized(ctx, x, x_stride, T, y, y_stride, accumulate);
    return;
  }
  const Workspace::Scope scope(*ctx.workspace);
  float* packed = ctx.workspace->Take<float>(T * stride);
  PackActivations(x, x_stride, T, in, stride, dtype, packed);
  const LinearRowsArgs args{.weight = weight,
                            .dtype = dtype,
                            .stride = stride,
                            .bias = bias_or_null(),
                            .x = packed,
                            .T = T,
                            .y = y,
                            .y_stride = y_stride,
                            .accumulate = accumulate};
  const int64_t row_bytes = stride * SizeOf(dtype);
  if (out * row_bytes * T < kMinParallelBytes) {
    LinearRows(args, 0, out);
    return;
  }
  const int64_t rows = RoundUp(TaskUnits(ctx, row_bytes, out), 4);
  ParallelFor(ctx, (out + rows - 1) / rows, [&](int64_t task, int) {
    LinearRows(args, task * rows, std::min(out, (task + 1) * rows));
  });
}

// How a product of many rows is cut: `features` by `rows` pieces, all of them of the same size but
// the last.
struct Linear::Storage::Cut {
  int64_t features = 0, rows = 0;
  int64_t feature_pieces = 0, row_pieces = 0;
  int64_t panel_bytes = 0;  // per thread, for converted weights
};

Linear::Storage::Cut Linear::Storage::CutProduct(int threads, int64_t T, int64_t out,
                                                 Path path) const {
  // Two tasks per thread, so that a thread held up by the system does not hold up all.
  const int64_t tasks = threads > 1 ? 2 * threads : 1;
  const bool panel =
      IsQuantized(format) || (path == Path::kGemmF32 && format != WeightFormat::kF32);
  const int64_t element = path == Path::kGemmBf16 ? 2 : 4;
  const int64_t most =
      panel ? std::min(kMaxTaskFeatures, kPanelBytes / (stride * element)) : kMaxTaskFeatures;
  Cut cut;
  cut.features = RoundUp(
      std::clamp((out + tasks - 1) / tasks, kMinTaskFeatures, std::max(most, kMinTaskFeatures)),
      kFeatureUnit);
  cut.feature_pieces = (out + cut.features - 1) / cut.features;
  // Where there are fewer features than that, the rows are cut, too.
  const int64_t row_pieces = (tasks + cut.feature_pieces - 1) / cut.feature_pieces;
  cut.rows = RoundUp((T + row_pieces - 1) / row_pieces, kBf16Rows);
  cut.row_pieces = (T + cut.rows - 1) / cut.rows;
  if (panel) {
    const int64_t wide = path == Path::kGemmBf16 ? kBf16RowsAtOnce * 4 : 0;
    cut.panel_bytes = RoundUp((cut.features * element + wide) * stride, 64);
  }
  return cut;
}

// Activations rounded to bf16, zeros up to the weight's stride and to a multiple of kBf16Rows.
bf16* Linear::Storage::NarrowRows(const ExecContext& ctx, const GemmArgs& args) const {
  const int64_t padded = RoundUp(args.T, kBf16Rows);
  bf16* x16 = ctx.workspace->Take<bf16>(padded * stride);
  std::fill(x16 + args.T * stride, x16 + padded * stride, bf16{0});
  ParallelRanges(ctx, args.T, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      NarrowBf16(args.x + t * args.x_stride, x16 + t * stride, args.in);
      std::fill(x16 + t * stride + args.in, x16 + (t + 1) * stride, bf16{0});
    }
  });
  return x16;
}

// One piece, args' rows and features, the first of them `feature`. panel: scratch memory.
void Linear::Storage::GemmPiece(const Gemm& gemm, GemmArgs args, int64_t feature, Path path,
                                const bf16* x16, char* panel) const {
  if (const float* b = bias_or_null()) {
    // The product is added to rows that hold the bias already.
    for (int64_t t = 0; t < args.T; ++t) {
      float* y = args.y + t * args.y_stride;
      if (args.accumulate)
        for (int64_t o = 0; o < args.out; ++o) y[o] += b[feature + o];
      else
        std::memcpy(y, b + feature, static_cast<size_t>(args.out) * sizeof(float));
    }
    args.accumulate = true;
  }
  if (path == Path::kGemmF32) {
    args.w = w32() + feature * stride;
    if (format != WeightFormat::kF32) {
      float* rows = reinterpret_cast<float*>(panel);
      Widen(feature, feature + args.out, rows);
      args.w = rows;
    }
    gemm.f32(args);
    return;
  }
  const bf16* w16_piece = w16() + feature * stride;
  if (IsQuantized(format)) {
    bf16* rows = reinterpret_cast<bf16*>(panel);
    float* wide = reinterpret_cast<float*>(rows + args.out * stride);
    for (int64_t r = 0; r < args.out; r += kBf16RowsAtOnce) {
      const int64_t count = std::min(kBf16RowsAtOnce, args.out - r);
      Widen(feature + r, feature + r + count, wide);
      NarrowBf16(wide, rows + r * stride, count * stride);
    }
    w16_piece = rows;
  }
  args.in = stride;
  gemm.bf16(args, x16, w16_piece);
}

void Linear::Storage::ForwardGemm(const ExecContext& ctx, const GemmArgs& args, Path path) const {
  const auto gemm = LoadGemm();
  if (!gemm.ok()) throw std::runtime_error(gemm.status().message());
  const Workspace::Scope scope(*ctx.workspace);
  const bf16* x16 = path == Path::kGemmBf16 ? NarrowRows(ctx, args) : nullptr;
  const Cut cut = CutProduct(ctx.threads, args.T, args.out, path);
  char* panels = ctx.workspace->Take<char>(ctx.threads * cut.panel_bytes);
  ParallelFor(ctx, cut.feature_pieces * cut.row_pieces, [&](int64_t task, int thread) {
    const int64_t feature = task / cut.row_pieces * cut.features,
                  row = task % cut.row_pieces * cut.rows;
    GemmArgs piece = args;
    piece.T = std::min(cut.rows, args.T - row);
    piece.out = std::min(cut.features, args.out - feature);
    piece.x = args.x + row * args.x_stride;
    piece.y = args.y + row * args.y_stride + feature;
    GemmPiece(**gemm, piece, feature, path, x16 != nullptr ? x16 + row * stride : nullptr,
              panels + thread * cut.panel_bytes);
  });
}

void Linear::ReadRow(int64_t i, float* out) const {
  DSLA_CHECK(i >= 0 && i < out_);
  const Storage& s = *storage_;
  if (IsQuantized(s.format)) {
    std::vector<float> row(static_cast<size_t>(s.stride));
    s.Widen(i, i + 1, row.data());
    std::memcpy(out, row.data(), static_cast<size_t>(in_) * sizeof(float));
  } else if (s.dtype == DType::kBF16) {
    WidenBf16(s.w16() + i * s.stride, out, in_);
  } else {
    std::memcpy(out, s.w32() + i * s.stride, static_cast<size_t>(in_) * sizeof(float));
  }
}

LowRankDelta::LowRankDelta(std::span<const float> a, std::span<const float> b, int64_t rank,
                           int64_t in, int64_t out, WeightFormat format, Arena* arena)
    : a_(a, rank, in, format, {}, arena), b_(b, out, rank, format, {}, arena) {}

void LowRankDelta::AddTo(const ExecContext& ctx, const float* x, int64_t x_stride, int64_t T,
                         float* y, int64_t y_stride) const {
  if (empty() || T <= 0) return;
  DSLA_CHECK(ctx.workspace != nullptr);
  const Workspace::Scope scope(*ctx.workspace);
  float* h = ctx.workspace->Take<float>(T * rank());
  a_.Forward(ctx, x, x_stride, T, h, rank(), Accumulate::kNo, Products::kInvariant);
  b_.Forward(ctx, h, rank(), T, y, y_stride, Accumulate::kYes, Products::kInvariant);
}

}  // namespace dsla
