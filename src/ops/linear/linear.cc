#include "ops/linear/linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "base/buffer.h"
#include "base/check.h"
#include "base/half.h"
#include "ops/linear/linear_forms.h"
#include "ops/linear/linear_gemm.h"
#include "ops/linear/linear_kernels.h"

namespace dsla {
namespace {

bool IsQuantized(WeightFormat format) {
  return format == WeightFormat::kInt8 || format == WeightFormat::kInt4;
}
DType ElementOf(WeightFormat format) {
  return format == WeightFormat::kF32 ? DType::kF32 : DType::kBF16;
}

// Rows of our own loop at a time: no more than keep the activations in the cache. On AVX2 it takes
// less CPU time than the fp32 GEMM up to about 100 rows of every shape in linear_bench (16 rows:
// half, 64 rows: 10 to 25% less), and it keeps the batch out of a row's result.
constexpr int64_t kMaxRows = 64;
static_assert(kMaxRows >= kLinearInvariantRows);

// Below this many bytes of weights times rows, starting threads costs more than they save.
constexpr int64_t kMinParallelBytes = 64 << 10;
// A task of the row loop: large enough that handing it out is nothing, small enough to even out.
constexpr int64_t kTaskBytes = 64 << 10;
// A task of the GEMM: enough features for the library to run at full speed and for the activations,
// which every task reads, to be little beside them.
constexpr int64_t kMinTaskFeatures = 64, kMaxTaskFeatures = 1024, kFeatureUnit = 16;
constexpr int64_t kRowUnit = 32;

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
  void ForwardRows(const ExecContext& ctx, const LinearRowsArgs& args, int64_t out) const;
  void ForwardQuantized(const ExecContext& ctx, const GroupQuantArgs& args) const;
  void GemmPiece(Gemm gemm, GemmArgs args, int64_t feature) const;
  void ForwardGemm(const ExecContext& ctx, const GemmArgs& args) const;
};

int64_t LinearLoopRows(WeightFormat format) {
  return format == WeightFormat::kF32 ? kMaxRows : kLinearInvariantRows;
}

Status PrepareLinear(WeightFormat format) {
  return format == WeightFormat::kF32 ? LoadGemm().status() : Status::Ok();
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
  DSLA_CHECK(in > 0 && out > 0 && format != WeightFormat::kFp8);
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

WeightFormat Linear::format() const { return storage_->format; }

int64_t Linear::bytes() const {
  if (empty()) return 0;
  return storage_->weight_bytes + storage_->bias.size() * static_cast<int64_t>(sizeof(float));
}

void Linear::Forward(const ExecContext& ctx, const float* x, int64_t x_stride, int64_t T, float* y,
                     int64_t y_stride, Accumulate accumulate, Products products) const {
  DSLA_CHECK(ctx.workspace != nullptr);
  if (T <= 0) return;
  const Workspace::Scope scope(*ctx.workspace);
  LinearInput input(*ctx.workspace, T, in_, products);
  input.Set(x, x_stride, T);
  Forward(ctx, input, 0, y, y_stride, accumulate);
}

void Linear::Forward(const ExecContext& ctx, LinearInput& x, int64_t first, float* y,
                     int64_t y_stride, Accumulate accumulate) const {
  DSLA_CHECK(!empty() && x.in() == in_);
  DSLA_CHECK(ctx.workspace != nullptr);
  const int64_t T = x.T() - first;
  DSLA_CHECK(T <= 1 || y_stride >= out_);
  if (T <= 0) return;
  const Storage& s = *storage_;
  const InputForm form = FormOf(s.format, T, x.products());
  x.Make(ctx, form, first);
  const LinearInput::Forms& forms = *x.forms_;
  const bool add = accumulate == Accumulate::kYes;
  const auto in_tiles = [&](auto&& product) {
    for (int64_t t = 0; t < T; t += kMaxRows)
      product(first + t, std::min(kMaxRows, T - t), y + t * y_stride);
  };
  switch (form) {
    case InputForm::kPadded:
    case InputForm::kPairs:
      in_tiles([&](int64_t t, int64_t rows, float* to) {
        s.ForwardRows(ctx,
                      {.weight = s.weight,
                       .dtype = s.dtype,
                       .stride = s.stride,
                       .bias = s.bias_or_null(),
                       .x = forms.Packed(form, t),
                       .T = rows,
                       .y = to,
                       .y_stride = y_stride,
                       .accumulate = add},
                      out_);
      });
      return;
    case InputForm::kGroups:
      in_tiles([&](int64_t t, int64_t rows, float* to) {
        s.ForwardQuantized(ctx, {.shape = s.quant,
                                 .weight = s.blocks(),
                                 .bias = s.bias_or_null(),
                                 .x = forms.Groups(t),
                                 .T = rows,
                                 .y = to,
                                 .y_stride = y_stride,
                                 .accumulate = add});
      });
      return;
    case InputForm::kPanels:
      PanelProduct(ctx, {.format = s.format,
                         .out = out_,
                         .in = in_,
                         .weight = s.weight,
                         .bias = s.bias_or_null(),
                         .x = forms.Panels(first),
                         .T = T,
                         .y = y,
                         .y_stride = y_stride,
                         .accumulate = add});
      return;
    case InputForm::kPlain:
      s.ForwardGemm(ctx, {.x = x.x_ + first * x.stride_,
                          .x_stride = x.stride_,
                          .w_stride = s.stride,
                          .y = y,
                          .y_stride = y_stride,
                          .T = T,
                          .in = in_,
                          .out = out_,
                          .accumulate = add});
  }
}

void Linear::Storage::ForwardQuantized(const ExecContext& ctx, const GroupQuantArgs& args) const {
  const int64_t blocks = quant.blocks();
  if (weight_bytes * args.T < kMinParallelBytes) {
    GroupQuantProduct(args, 0, blocks);
    return;
  }
  // Even: the kernels take two blocks at a time where vectors are wide enough.
  const int64_t count = RoundUp(TaskUnits(ctx, quant.block_bytes(), blocks), 2);
  ParallelFor(ctx, (blocks + count - 1) / count, [&](int64_t task, int) {
    GroupQuantProduct(args, task * count, std::min(blocks, (task + 1) * count));
  });
}

void Linear::Storage::ForwardRows(const ExecContext& ctx, const LinearRowsArgs& args,
                                  int64_t out) const {
  const int64_t row_bytes = stride * SizeOf(dtype);
  if (out * row_bytes * args.T < kMinParallelBytes) {
    LinearRows(args, 0, out);
    return;
  }
  const int64_t rows = RoundUp(TaskUnits(ctx, row_bytes, out), 4);
  ParallelFor(ctx, (out + rows - 1) / rows, [&](int64_t task, int) {
    LinearRows(args, task * rows, std::min(out, (task + 1) * rows));
  });
}

// args' rows and features, the first of them `feature`.
void Linear::Storage::GemmPiece(Gemm gemm, GemmArgs args, int64_t feature) const {
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
  args.w = w32() + feature * stride;
  gemm(args);
}

void Linear::Storage::ForwardGemm(const ExecContext& ctx, const GemmArgs& args) const {
  const auto gemm = LoadGemm();
  if (!gemm.ok()) throw std::runtime_error(gemm.status().message());
  // Two tasks per thread, so that a thread held up by the system does not hold up all. Where there
  // are fewer features than that, the rows are cut, too.
  const int64_t tasks = ctx.threads > 1 ? 2 * ctx.threads : 1;
  const int64_t features = RoundUp(
      std::clamp((args.out + tasks - 1) / tasks, kMinTaskFeatures, kMaxTaskFeatures), kFeatureUnit);
  const int64_t feature_pieces = (args.out + features - 1) / features,
                wanted = (tasks + feature_pieces - 1) / feature_pieces,
                rows = RoundUp((args.T + wanted - 1) / wanted, kRowUnit),
                row_pieces = (args.T + rows - 1) / rows;
  ParallelFor(ctx, feature_pieces * row_pieces, [&](int64_t task, int) {
    const int64_t feature = task / row_pieces * features, row = task % row_pieces * rows;
    GemmArgs piece = args;
    piece.T = std::min(rows, args.T - row);
    piece.out = std::min(features, args.out - feature);
    piece.x = args.x + row * args.x_stride;
    piece.y = args.y + row * args.y_stride + feature;
    GemmPiece(*gemm, piece, feature);
  });
}

void Linear::ReadRow(int64_t i, float* out) const {
  DSLA_CHECK(i >= 0 && i < out_);
  const Storage& s = *storage_;
  if (IsQuantized(s.format)) {
    GroupDequantize(s.quant, s.blocks(), i, i + 1, out, in_);
  } else if (s.dtype == DType::kBF16) {
    WidenBf16(s.w16() + i * s.stride, out, in_);
  } else {
    std::memcpy(out, s.w32() + i * s.stride, static_cast<size_t>(in_) * sizeof(float));
  }
}

LowRankDelta::LowRankDelta(std::span<const float> a, std::span<const float> b, int64_t rank,
                           int64_t in, int64_t out, WeightFormat format, Arena* arena)
    : a_(a, rank, in, format, {}, arena), b_(b, out, rank, format, {}, arena) {}

void LowRankDelta::AddTo(const ExecContext& ctx, LinearInput& x, int64_t first, float* y,
                         int64_t y_stride) const {
  const int64_t T = x.T() - first;
  if (empty() || T <= 0) return;
  DSLA_CHECK(ctx.workspace != nullptr);
  const Workspace::Scope scope(*ctx.workspace);
  const int64_t rank = a_.out();
  float* h = ctx.workspace->Take<float>(T * rank);
  a_.Forward(ctx, x, first, h, rank);
  b_.Forward(ctx, h, rank, T, y, y_stride, Accumulate::kYes, x.products());
}

}  // namespace dsla
