// One step's index arrays, packed into one piece of memory so that one copy takes them to the GPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/device.h"
#include "ops/sampling/cuda/sampling_cuda.h"

namespace dsla::cuda {

// Neighbouring sequences of one level that have one row each, or that have several: what one call
// of an attention operator takes.
struct RowGroup {
  int first = 0, count = 0;  // sequences
  int64_t first_row = 0, rows = 0;
  bool single = false;    // one row each: the decode form
  int64_t row_start = 0;  // where its [count + 1] lies, counted from 0
};

// Where each array lies, in elements of int32 from the beginning. N sequences and T rows, padding
// included.
struct StepTables {
  int L = 0, N = 0;
  int64_t T = 0;
  int64_t tokens = 0;        // [T]
  int64_t feed = 0;          // [T] the choice before that is the token, -1: `tokens`
  int64_t positions = 0;     // [T], -1 for padding
  int64_t sequence = 0;      // [T] which row belongs to
  int64_t pos = 0;           // [N] tokens cached before, -1 for padding
  int64_t wanted = 0;        // [wanted] rows whose logits are asked for; without padding alone
  int64_t sampling = 0;      // RowSampling of each of `wanted`, or with padding of all rows
  int64_t softmax_rows = 0;  // [L] the first rows, which are softmax in this layer
  int64_t slots = 0;         // [L, N], -1: softmax in this layer, or padding
  int64_t page_start = 0;    // [L, N + 1]
  int64_t pages = 0;         // the page tables of all layers
  int64_t edits = 0;         // LogitEdits, what is ruled out and masks, of the rows of `sampling`,
                             // which count such elements from the beginning of all
  int64_t size = 0;
  std::vector<RowGroup> groups;  // of the real rows

  // For `rows`, padded to `padded` sequences of one row each, or not at all if that is 0.
  StepTables(const PlacedRows& rows, const std::vector<int>& rank, int padded);
  // to: [size]. choice_before: of each of the batch before, which choice is its (where rows are
  // fed).
  void Pack(const PlacedRows& rows, const std::vector<int>& rank,
            std::span<const int32_t> choice_before, int32_t* to) const;

 private:
  void PackSampling(const PlacedRows& rows, int32_t* to) const;

  bool padding_ = false;
};

}  // namespace dsla::cuda
