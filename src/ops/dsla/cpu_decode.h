// The recurrent CPU form for the sequences of a batch that have one new row. Private to
// src/ops/dsla.
//
// Three passes, each parallel: project (entering keys to gates and features, queries to features;
// one product for a block of rows, so that a batch reads the weights once), update (states and
// window attention), merge.
#pragma once

#include <cstdint>

#include "ops/dsla/dsla.h"

namespace dsla {

// Rows that share one pass over the weights.
inline constexpr int kDecodeRows = 16;
// State rows per task: a head's states are cut, so that few heads fill several threads. Fixed, for
// the sums must not depend on the number of threads.
inline constexpr int kDecodeStateRows = 128;

struct DslaDecodeRow {
  int n = 0;        // sequence
  int64_t row = 0;  // in q, k, v and out
  int64_t t = 0;    // time
};

struct DslaDecode {
  const DslaArgs* args = nullptr;
  DslaSlotLayout layout;
  const DslaDecodeRow* rows = nullptr;
  int num_rows = 0;

  float* decay = nullptr;   // [rows, Hkv, SF]: e^a of the entering token
  float* gain = nullptr;    // [rows, Hkv, SF]: (1 - e^a) phi_k
  float* v = nullptr;       // [rows, Hkv, D] of the entering token
  float* query = nullptr;   // [rows, H, SF]: g_i phi_q
  float* linear = nullptr;  // [rows, blocks, H, D]: numerators, summed over a block of state rows
  float* denominator = nullptr;  // [rows, blocks, H]
  float* window = nullptr;       // [rows, H, D]: softmax numerators
  float* top = nullptr;          // [rows, H]: largest score
  float* sum = nullptr;          // [rows, H]: of exp(score - top)

  int Blocks() const { return (args->shape.SF() + kDecodeStateRows - 1) / kDecodeStateRows; }
  // The token that enters at this row's time; there is one only if it is >= S.
  int64_t Entering(const DslaDecodeRow& row) const { return row.t - args->shape.window; }
  bool HasStates(const DslaDecodeRow& row) const { return Entering(row) >= args->shape.sinks; }
};

int64_t DslaDecodeScratch(const DslaShape& shape);

// Gates and features of the tokens entering at rows [begin, end), of KV head h.
void DslaDecodeKeys(const DslaDecode& batch, int h, int begin, int end, float* scratch);
// Features of the queries of rows [begin, end), of query head h.
void DslaDecodeQueries(const DslaDecode& batch, int h, int begin, int end, float* scratch);
// Updates one block of the states of (row, KV head) and reads them with its group's queries.
void DslaDecodeStates(const DslaDecode& batch, int row, int h, int block);
// Puts the row's token into ring and sinks, then attends to them.
void DslaDecodeWindow(const DslaDecode& batch, int row, int h, float* scratch);
// Output of all heads of a row.
void DslaDecodeMerge(const DslaDecode& batch, int row);

}  // namespace dsla
