#include "ops/linear/linear_input.h"

#include <algorithm>
#include <new>

#include "base/check.h"
#include "ops/linear/linear_forms.h"
#include "ops/linear/linear_kernels.h"

namespace dsla {

static_assert(LinearInput::kPiece % kPanelSegment == 0 && LinearInput::kPiece % kQuantGroup == 0 &&
              LinearInput::kPiece % kLinearPad == 0);

InputForm FormOf(WeightFormat format, int64_t T, Products products) {
  const bool few = products == Products::kInvariant || T <= LinearLoopRows(format);
  switch (format) {
    case WeightFormat::kF32:
      return few ? InputForm::kPadded : InputForm::kPlain;
    case WeightFormat::kBF16:
      return few ? InputForm::kPairs : InputForm::kPanels;
    case WeightFormat::kInt8:
    case WeightFormat::kInt4:
      return few ? InputForm::kGroups : InputForm::kPanels;
    case WeightFormat::kFp8:
      break;
  }
  return InputForm::kPlain;
}

LinearInput::LinearInput(Workspace& workspace, int64_t rows, int64_t in, Products products)
    : in_(in), rows_(rows), products_(products), forms_(new (workspace.Take<Forms>(1)) Forms) {
  Forms& f = *forms_;
  const bool invariant = products == Products::kInvariant;
  f.few = invariant ? rows : std::min(rows, LinearLoopRows(WeightFormat::kF32));
  f.packed_stride = (in + kLinearPad - 1) / kLinearPad * kLinearPad;
  f.packed = workspace.Take<float>(f.few * f.packed_stride);
  f.shape = {.in = in};
  f.groups = {.q = workspace.Take<int16_t>(f.few * f.shape.stride()),
              .scale = workspace.Take<float>(f.few * f.shape.groups()),
              .sum = workspace.Take<float>(f.few * f.shape.groups())};
  f.panels = {.stride = f.shape.stride(), .segments = (in + kPanelSegment - 1) / kPanelSegment};
  if (!invariant && rows > kLinearInvariantRows) {
    f.panels.q = workspace.Take<int16_t>(rows * f.panels.stride);
    f.panels.scale = workspace.Take<float>(rows * f.panels.segments);
  }
}

void LinearInput::Set(const float* x, int64_t stride, int64_t T) {
  DSLA_CHECK(forms_ != nullptr && T <= rows_ && (T <= 1 || stride >= in_));
  x_ = x;
  stride_ = stride;
  T_ = T;
  std::fill_n(forms_->first, kInputForms, T);
}

void LinearInput::Begin(InputForm form, int64_t first) {
  Forms& f = *forms_;
  const auto at = [&](InputForm which) -> int64_t& { return f.first[static_cast<int>(which)]; };
  // They lie in the same place.
  if (form == InputForm::kPadded) at(InputForm::kPairs) = T_;
  if (form == InputForm::kPairs) at(InputForm::kPadded) = T_;
  DSLA_CHECK(form == InputForm::kPlain || form == InputForm::kPanels || T_ - first <= f.few);
  DSLA_CHECK(form != InputForm::kPanels || f.panels.q != nullptr);
  at(form) = first;
}

void LinearInput::Make(const ExecContext& ctx, InputForm form, int64_t first) {
  if (forms_->first[static_cast<int>(form)] <= first) return;
  Begin(form, first);
  if (form == InputForm::kPlain) return;
  ForPieces(ctx, first, kPiece,
            [&](int64_t t, int64_t begin, int64_t end) { MakePiece(form, t, begin, end); });
}

void LinearInput::MakePiece(InputForm form, int64_t t, int64_t begin, int64_t end) const {
  const Forms& f = *forms_;
  const float* const x = x_ + t * stride_;
  switch (form) {
    case InputForm::kPlain:
      break;
    case InputForm::kPadded:
      PackPiece(x, begin, end, in_, f.packed_stride, DType::kF32, f.Packed(form, t));
      break;
    case InputForm::kPairs:
      PackPiece(x, begin, end, in_, f.packed_stride, DType::kBF16, f.Packed(form, t));
      break;
    case InputForm::kGroups:
      QuantizePiece(x, begin, end, f.Groups(t));
      break;
    case InputForm::kPanels:
      RoundPanelPiece(x, begin, end, in_, f.Panels(t));
      break;
  }
}

}  // namespace dsla
