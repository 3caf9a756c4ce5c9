// The tree of the prefix cache; included by its implementation alone.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cache/level_history.h"
#include "cache/prefix_cache.h"

namespace dsla {

// One page of tokens after its parent's. The root of an (adapter, salt) has neither. Nodes of the
// same key differ in their histories.
//
// Which layers' pages a node has: those that were softmax in some sequence that entered it, so, as
// layers convert in the ladder's order, those of rank >= covers. A sequence enters all pages of its
// path at once, so covers never falls from a node to its parent: what is enough at a node is enough
// all the way up.
struct PrefixCache::Node {
  PrefixKey key{};
  Node* parent = nullptr;
  LevelHistory history;  // up to the page's end
  int tokens = 0;        // likewise
  int covers = std::numeric_limits<int>::max();
  std::vector<int32_t> pages;     // [L], -1: none
  std::vector<int32_t> snapshot;  // [L], -1: softmax; empty: no snapshot
  int64_t last_use = 0;           // never later than the parent's
  int children = 0;
  int64_t bare = -1;  // of a leaf: nothing of its branch can be shed while enriched_ is this

  int level() const { return history.empty() ? 0 : history.back().level; }  // of its last token
  // A sequence can resume here.
  bool useful() const { return !snapshot.empty() || (level() == 0 && covers == 0); }
};

}  // namespace dsla
