// What the adapter's reader and writer share: the names and shapes of a layer's tensors and the
// rules for its settings. Included by adapter*.cc and by the trainer, which writes adapters.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "format/adapter.h"

namespace dsla {

struct AdapterDims {
  int64_t C = 0, H = 0, Hkv = 0, D = 0;
};

struct AdapterTensor {
  const char* suffix;
  std::vector<float> AdapterLayer::*values;
  std::vector<int64_t> shape;
};

// The tensors that a layer with these settings has, and no others.
std::vector<AdapterTensor> AdapterTensors(const AdapterLayer& layer, const AdapterDims& dims);

// Window, sinks, states, features, rank and floor within their limits. `where` begins the message.
Status CheckAdapterSettings(const AdapterLayer& layer, const AdapterDims& dims,
                            const std::string& where);

// The ladder is a permutation of 0 .. L-1 and top_level is one of its rungs.
Status CheckLadder(const std::vector<int>& ladder, int top_level, int L, const std::string& where);

// Adapter::Open without the file: also sets the id.
Expected<std::shared_ptr<const Adapter>> ParseAdapter(std::span<const std::byte> bytes,
                                                      const std::string& path,
                                                      const ModelConfig& base);

constexpr const char* kAdapterFormat = "dsla-adapter";
constexpr int kAdapterVersion = 1;
constexpr int kGateDivisor = 16;
constexpr const char* kFeatureMap = "softmax-pair";

}  // namespace dsla
