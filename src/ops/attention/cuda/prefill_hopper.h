// Prefill on compute capability 9.0, where the tensor cores read shared memory: its plan, and the
// two kernels that carry it out. prefill.cu decides who takes what.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/attention/cuda/attention_cuda.h"

namespace dsla::cuda {

// Rows of a tile: what FlashInfer's kernels of that head dim keep in registers.
constexpr int HopperTileRows(int D) { return D == 64 ? 192 : 128; }

// Work is one tile of query rows and one head. The plan gives every block of the grid a list. In
// the workspace as words: [blocks + 1] start of a block's list, [works] tile * H + head, [tiles]
// sequence, [tiles] number of the tile in its sequence.
struct HopperPlan {
  int blocks = 0, tiles = 0, H = 0;

  int64_t works() const { return int64_t{tiles} * H; }
  int64_t work() const { return blocks + 1; }
  int64_t sequence() const { return work() + works(); }
  int64_t tile() const { return sequence() + tiles; }
  int64_t words() const { return tile() + tiles; }
};
// `words` receives the plan's words; multiprocessors of the device = most blocks.
HopperPlan MakeHopperPlan(const PrefillAttentionArgs& a, int multiprocessors,
                          std::vector<int32_t>& words);
int64_t HopperPlanWords(int N, int64_t T, int H, int D, int multiprocessors);  // at most

// Launches with the plan that lies in a.workspace, for no sliding window. `from_rows`: read a.k and
// a.v, not the pages; for one sequence that begins at position 0.
template <int D>
int HopperPrefill(const PrefillAttentionArgs& a, const HopperPlan& plan, bool from_rows,
                  Stream stream);
extern template int HopperPrefill<64>(const PrefillAttentionArgs&, const HopperPlan&, bool, Stream);
extern template int HopperPrefill<128>(const PrefillAttentionArgs&, const HopperPlan&, bool,
                                       Stream);

}  // namespace dsla::cuda
