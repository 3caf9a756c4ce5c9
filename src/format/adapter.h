// Adapter: one file with all that a model needs beyond its own weights to run any of its layers as
// DSLA, and the ladder that says in which order layers convert. File format:
// docs/adapter_format.md. Immutable once loaded, so it can be shared by reference count between
// sequences and threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"
#include "format/config.h"

namespace dsla {

// The adapter's tensors of one layer, fp32. Shapes use the base model's dimensions; S = number of
// states here.
struct AdapterLayer {
  int features = 0;      // F, features per state: D or 2D
  int states = 0;        // 1 or 2 (0 history, 1 recency)
  int window = 0;        // W tokens in exact softmax attention; 0 = none (then sinks is 0 too)
  int sinks = 0;         // S first tokens kept in exact attention
  int rank = 0;          // r of the low-rank deltas; 0 = none
  float gate_floor = 0;  // smallest log gate, < 0

  std::vector<float> q_a, q_b;      // [r, C], [H D, r]
  std::vector<float> o_a, o_b;      // [r, H D], [C, r]
  std::vector<float> phi_q, phi_k;  // [H, D, D], [Hkv, D, D]: y_e = sum_d u_d M[d, e]
  std::vector<float> gate_weight;   // [states, Hkv, D, F]
  std::vector<float> gate_bias;     // [states, Hkv, F]
  std::vector<float> mix;           // [H, states], before the softmax over states
  std::vector<float> claim;         // [H, C]; empty when W = 0
  std::vector<float> claim_bias;    // [H]; empty when W = 0
};

// What an adapter is, without its tensors: all that is kept of it once a model holds them in its
// own form.
struct AdapterInfo {
  std::string id;                // hex digest of the file, first 16 digits
  std::string base_fingerprint;  // ModelFile::Fingerprint() of the model it belongs to
  std::string base_name;         // for people
  std::vector<int> ladder;       // layer indices, least sensitive first: a permutation of 0 .. L-1
  int top_level = 0;             // highest rung recommended (tier economy)
};

struct Adapter : AdapterInfo {
  std::vector<AdapterLayer> layers;  // [L]

  // Reads and checks everything against the base model's dimensions; does not compare fingerprints.
  // Errors: kNotFound, kDataLoss for a malformed file or one made for other dimensions,
  // kUnsupported for a newer format.
  static Expected<std::shared_ptr<const Adapter>> Open(const std::string& path,
                                                       const ModelConfig& base);

  // kInvalidArgument, naming both fingerprints, when the adapter belongs to another model.
  Status CheckBase(const std::string& fingerprint, const std::string& model_path) const;
};

// The smallest gate floor that the chunk form's exponents allow (see docs/adapter_format.md).
constexpr float kMinGateFloor = -2.5f;

// Writes an adapter file (`id` is not used: it is the digest of the file). The file appears whole
// or not at all: it is written beside `path` and renamed. With kF32 reading gives back the same
// numbers; kBF16 halves the size. Errors: kInvalidArgument if the adapter is not one that Open
// would take; kInternal with the system's reason if the file cannot be written.
Status SaveAdapter(const Adapter& adapter, const std::string& path, DType dtype = DType::kF32);

}  // namespace dsla
