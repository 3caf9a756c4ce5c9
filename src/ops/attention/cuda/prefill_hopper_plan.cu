// Which block of the Hopper kernels' grid computes what. Host code.
#include <algorithm>
#include <functional>
#include <queue>
#include <utility>

#include "base/check.h"
#include "ops/attention/cuda/prefill_hopper.h"

namespace dsla::cuda {
namespace {

struct Tile {
  int64_t cost;
  int32_t sequence, tile;
};

// Longest first, so that short ones fill the end.
std::vector<Tile> Tiles(const PrefillAttentionArgs& a) {
  const int tile_rows = HopperTileRows(a.kv.D);
  std::vector<Tile> tiles;
  for (int n = 0; n < a.rows.N; ++n) {
    const int rows = a.host_row_start[n + 1] - a.host_row_start[n];
    for (int tile = 0; tile * tile_rows < rows; ++tile) {
      const int64_t end = a.host_pos[n] + std::min(rows, (tile + 1) * tile_rows);
      // What a tile costs beside its keys is worth about two keys a row.
      tiles.push_back({end + 2 * tile_rows, n, tile});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& x, const Tile& y) { return x.cost > y.cost; });
  return tiles;
}

}  // namespace

int64_t HopperPlanWords(int N, int64_t T, int H, int D, int multiprocessors) {
  const int64_t tiles = T / HopperTileRows(D) + N;
  return multiprocessors + 1 + tiles * (H + 2);
}

HopperPlan MakeHopperPlan(const PrefillAttentionArgs& a, int multiprocessors,
                          std::vector<int32_t>& words) {
  const std::vector<Tile> tiles = Tiles(a);
  HopperPlan plan;
  plan.tiles = static_cast<int>(tiles.size());
  plan.H = a.H;
  plan.blocks = static_cast<int>(std::min<int64_t>(multiprocessors, plan.works()));
  DSLA_CHECK(plan.works() < int64_t{1} << 31);
  // Each piece of work goes to the block that has least so far. Head after head, so that blocks
  // which run at the same time read the same keys.
  using Load = std::pair<int64_t, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int block = 0; block < plan.blocks; ++block) loads.push({0, block});
  std::vector<std::vector<int32_t>> lists(static_cast<size_t>(plan.blocks));
  for (int head = 0; head < a.H; ++head)
    for (int t = 0; t < plan.tiles; ++t) {
      const auto [load, block] = loads.top();
      loads.pop();
      lists[static_cast<size_t>(block)].push_back(t * a.H + head);
      loads.push({load + tiles[static_cast<size_t>(t)].cost, block});
    }
  words.assign(1, 0);
  for (const auto& list : lists) words.push_back(words.back() + static_cast<int32_t>(list.size()));
  for (const auto& list : lists) words.insert(words.end(), list.begin(), list.end());
  for (const Tile& tile : tiles) words.push_back(tile.sequence);
  for (const Tile& tile : tiles) words.push_back(tile.tile);
  DSLA_CHECK(static_cast<int64_t>(words.size()) == plan.words());
  return plan;
}

}  // namespace dsla::cuda
