// LinearInput: activations on their way into products. A weight does not multiply them as they are:
// they are rounded to integers, or put in another order, as its format and the number of rows ask
// for. Each such form is made once, and shared by all products of the same rows that take it.
#pragma once

#include <cstdint>

#include "base/exec.h"
#include "ops/linear/linear.h"

namespace dsla {

enum class InputForm {
  kPlain,   // as they are, for the GEMM
  kPadded,  // fp32 weights, few rows: up to a whole number of cache lines
  kPairs,   // bf16, few rows: the even inputs of two vectors, then the odd ones
  kGroups,  // integers, few rows: 15 bits and a scale per 32 inputs
  kPanels,  // all but fp32, many rows: 13 bits and a scale per 192 inputs
};
inline constexpr int kInputForms = 5;
InputForm FormOf(WeightFormat format, int64_t T, Products products);

// Belongs to one caller; copies share the forms. Its memory is a workspace's, so it ends with the
// scope in which it began.
class LinearInput {
 public:
  LinearInput() = default;
  // For up to `rows` rows of `in` inputs. No memory is taken later.
  LinearInput(Workspace& workspace, int64_t rows, int64_t in, Products products);

  // The rows are x [T, in] from now on, which must stay as it is until their last product.
  void Set(const float* x, int64_t stride, int64_t T);

  // Set of rows that are still to be written: produce(t, begin, end) writes the inputs [begin, end)
  // of row t to x, whole rows or pieces of kPiece, from several threads. What `consumer` multiplies
  // is made of each piece at once, while it is in the core's cache.
  enum class Cut { kRows, kPieces };
  template <typename Produce>
  void Fill(const ExecContext& ctx, float* x, int64_t stride, int64_t T, const Linear& consumer,
            Cut cut, Produce&& produce) {
    Set(x, stride, T);
    const InputForm form = FormOf(consumer.format(), T, products_);
    Begin(form, 0);
    ForPieces(ctx, 0, cut == Cut::kRows ? in_ : kPiece, [&](int64_t t, int64_t begin, int64_t end) {
      produce(t, begin, end);
      MakePiece(form, t, begin, end);
    });
  }

  int64_t T() const { return T_; }
  int64_t in() const { return in_; }
  Products products() const { return products_; }

  // A whole number of the groups and segments that the forms have scales of.
  static constexpr int64_t kPiece = 768;

 private:
  friend class Linear;
  struct Forms;

  // The rows [first, T) are there in this form afterwards.
  void Make(const ExecContext& ctx, InputForm form, int64_t first);
  void Begin(InputForm form, int64_t first);  // they are going to be, by MakePiece
  void MakePiece(InputForm form, int64_t t, int64_t begin, int64_t end) const;
  // Calls body(t, begin, end) for the pieces of rows [first, T).
  template <typename Body>
  void ForPieces(const ExecContext& ctx, int64_t first, int64_t piece, Body&& body) const {
    // Floats below which threads cost more than they save: some microseconds of one core, and what
    // one core writes all others read without having to ask two.
    constexpr int64_t kMinParallel = int64_t{8} << 10;
    const int64_t pieces = (in_ + piece - 1) / piece, count = (T_ - first) * pieces;
    const auto run = [&](int64_t from, int64_t to, int) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t begin = i % pieces * piece, end = begin + piece;
        body(first + i / pieces, begin, end < in_ ? end : in_);
      }
    };
    if ((T_ - first) * in_ < kMinParallel)
      run(0, count, 0);
    else
      ParallelRanges(ctx, count, 1, run);
  }

  const float* x_ = nullptr;
  int64_t stride_ = 0, T_ = 0, in_ = 0, rows_ = 0;
  Products products_ = Products::kFastest;
  Forms* forms_ = nullptr;
};

}  // namespace dsla
