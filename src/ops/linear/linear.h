// Linear: y = W x + b with a weight stored in bf16, fp32 or groups of small integers, and fp32
// activations. Few rows (decode) are bound by the weight's bytes and take a loop that reads them
// once; many rows unpack them in panels (panel.h), those of fp32 go through libtorch's GEMM, a
// library that is loaded when it is first needed.
// Immutable after construction; Forward is thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/arena.h"
#include "base/exec.h"
#include "base/status.h"

namespace dsla {

enum class Accumulate { kNo, kYes };

// How a weight is stored. kInt8 and kInt4: groups of 32 inputs with a scale, and with int4 a
// minimum (group_quant.h), 8.5 and 5 or 6 bits a weight; for few rows their activations are rounded
// to 15 bits in the same groups. kFp8: e4m3 with a scale a feature, on a GPU alone (Linear has
// none).
enum class WeightFormat { kF32, kBF16, kInt8, kInt4, kFp8 };
inline const char* Name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return "fp32";
    case WeightFormat::kBF16:
      return "bf16";
    case WeightFormat::kInt8:
      return "int8";
    case WeightFormat::kInt4:
      return "int4";
    case WeightFormat::kFp8:
      return "fp8";
  }
  return "unknown";
}

// Up to so many rows kFastest takes the loop for few; beyond, panels or the GEMM.
int64_t LinearLoopRows(WeightFormat format);

// Loads the GEMM now if weights of this format may need it, rather than at the first product of
// many rows, which throws std::runtime_error where it cannot be loaded. Error: kUnavailable, naming
// the file.
Status PrepareLinear(WeightFormat format);

// Of every format at least so many: a row's result is then the same bits however many others it is
// batched with, on any number of threads. With kFastest more rows are summed in another order and,
// but for fp32, of weights and activations rounded to integers of 12 and 13 bits, so that near-ties
// may fall the other way; with kInvariant the promise holds for any number of rows.
inline constexpr int64_t kLinearInvariantRows = 32;
enum class Products { kFastest, kInvariant };

class LinearInput;  // linear_input.h

class Linear {
 public:
  Linear();
  // weight: [out, in] row-major, rounded to `format`. bias: [out] or empty. With an
  // arena the stored weight lies there, and the arena must outlive it.
  Linear(std::span<const float> weight, int64_t out, int64_t in, WeightFormat format,
         std::span<const float> bias = {}, Arena* arena = nullptr);
  // The same with a weight still to come: every row once, by Store.
  Linear(int64_t out, int64_t in, WeightFormat format, std::span<const float> bias = {},
         Arena* arena = nullptr);
  // Rows [begin, begin + rows.size() / in) of the weight. begin is a multiple of kStoreRows, and so
  // is the end unless it is out(). Different rows may be stored by different threads.
  static constexpr int64_t kStoreRows = 8;
  void Store(int64_t begin, std::span<const float> rows);
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;
  ~Linear();

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  WeightFormat format() const;
  bool empty() const { return out_ == 0; }
  int64_t bytes() const;  // of the stored weight and bias

  // y[t - first] (+)= W x[t] + b for the rows [first, T) of x; y_stride in floats between rows. x
  // and y do not overlap. What it makes of x, x keeps for the next product.
  // Sets libtorch's thread count to 1 where it takes the GEMM (fp32): the threads are ctx's.
  void Forward(const ExecContext& ctx, LinearInput& x, int64_t first, float* y, int64_t y_stride,
               Accumulate accumulate = Accumulate::kNo) const;
  // The same of T rows that are multiplied once.
  void Forward(const ExecContext& ctx, const float* x, int64_t x_stride, int64_t T, float* y,
               int64_t y_stride, Accumulate accumulate = Accumulate::kNo,
               Products products = Products::kFastest) const;

  // Row i of the weight as fp32: the embedding of token i. out: [in].
  void ReadRow(int64_t i, float* out) const;

 private:
  struct Storage;
  std::unique_ptr<Storage> storage_;
  int64_t in_ = 0, out_ = 0;
};

// The adapter's correction of a frozen weight: y += B (A x), A [r, in], B [out, r].
class LowRankDelta {
 public:
  LowRankDelta() = default;
  LowRankDelta(std::span<const float> a, std::span<const float> b, int64_t rank, int64_t in,
               int64_t out, WeightFormat format, Arena* arena = nullptr);

  bool empty() const { return a_.empty(); }
  int64_t rank() const { return a_.out(); }
  int64_t bytes() const { return empty() ? 0 : a_.bytes() + b_.bytes(); }
  // Of the rows [first, T) of x; y: [T - first, out].
  void AddTo(const ExecContext& ctx, LinearInput& x, int64_t first, float* y,
             int64_t y_stride) const;

 private:
  Linear a_, b_;
};

// The oracle: fp64 sums over the weight rounded to `format`, and with round_activations over the
// activations rounded as the integer formats do.
void LinearRef(std::span<const float> weight, int64_t out, int64_t in, WeightFormat format,
               std::span<const float> bias, const float* x, int64_t x_stride, int64_t T, float* y,
               int64_t y_stride, bool round_activations = false);

}  // namespace dsla
