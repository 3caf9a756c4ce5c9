// The forms of a LinearInput, for linear_input.cc, which makes them, and linear.cc, which
// multiplies them. Internal to this folder.
#pragma once

#include "ops/linear/group_quant.h"
#include "ops/linear/linear_input.h"
#include "ops/linear/panel.h"

namespace dsla {

struct LinearInput::Forms {
  // The first row that each form is made of, the rows' number if of none; it is the form's row 0.
  int64_t first[kInputForms];

  int64_t few;            // rows that the forms for few have room for
  int64_t packed_stride;  // floats
  float* packed;          // [few, packed_stride] kPadded or kPairs
  GroupQuantShape shape;  // its inputs
  QuantRows groups;       // [few, ...]
  PanelRows panels;       // [rows, ...]

  int64_t Row(InputForm form, int64_t t) const { return t - first[static_cast<int>(form)]; }
  float* Packed(InputForm form, int64_t t) const { return packed + Row(form, t) * packed_stride; }
  QuantRows Groups(int64_t t) const { return groups.From(shape, Row(InputForm::kGroups, t)); }
  PanelRows Panels(int64_t t) const { return panels.From(Row(InputForm::kPanels, t)); }
};

}  // namespace dsla
