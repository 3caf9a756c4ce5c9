// A model's weights and an adapter's on a GPU: vectors in fp32, matrices in bf16, the model's own
// also in 8 or 4 bits or in fp8. Immutable.
#pragma once

#include <memory>
#include <vector>

#include "model/cuda/cuda_util.h"
#include "ops/dsla/cuda/dsla_cuda.h"

namespace dsla::cuda {

inline int BitsOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return 4;
    case WeightFormat::kInt8:
    case WeightFormat::kFp8:
      return 8;
    default:
      return 16;
  }
}

// [out, in]: row-major bf16, or of 8 or 4 bits, packed (packed_weight.h), or row-major e4m3.
struct Matrix {
  DeviceBuffer data;
  int64_t out = 0, in = 0;
  WeightFormat format = WeightFormat::kBF16;
  DeviceBuffer unpacked = {};  // of a packed one: the same in bf16, for many rows, or nothing
  DeviceBuffer scale = {};     // [out] of one in fp8
  bool fp8() const { return format == WeightFormat::kFp8; }
  int bits() const { return BitsOf(format); }
  bool empty() const { return out == 0; }
  int64_t bytes() const;  // of `data` and `scale`
};

struct CudaLayer {
  DeviceBuffer attn_norm, mlp_norm;  // [C]
  DeviceBuffer q_norm, k_norm;       // [D], or nothing
  DeviceBuffer qkv_bias, o_bias;     // or nothing
  Matrix qkv;                        // [(H + 2 Hkv) D, C]
  Matrix o;                          // [C, H D]
  Matrix gate_up;                    // [2 ffn, C]
  Matrix down;                       // [C, ffn]
};

struct CudaWeights {
  Matrix embedding, head;  // [V, C]; head is empty where it is the embedding
  DeviceBuffer final_norm;
  DeviceBuffer rope_cos, rope_sin;  // [positions, D/2]
  std::vector<CudaLayer> layers;

  const Matrix& output() const { return head.empty() ? embedding : head; }
  int64_t step_bytes() const;  // what a decode step reads of them
};

struct CudaDslaLayer {
  int r = 0;  // rank of the deltas, zeros up to a multiple of 8 included
  bool claims = false;
  Matrix in;     // [r + H, C]: A_q, then the claims' rows (the one or the other may be missing)
  Matrix q_out;  // [H D, r]
  Matrix o_in;   // [r, H D]
  Matrix o_out;  // [C, r]
  // qkv and o with the deltas in them, W + B A, for steps whose rows are all DSLA; empty where the
  // model is large or not in bf16.
  Matrix merged_qkv, merged_o;
  DeviceBuffer claim_bias;  // [H]
  DeviceBuffer packed;      // what the operator reads
  DeviceBuffer mix;         // [H, states]

  // What a step of one level reads of them beside the layer's weights, or those merged.
  int64_t bytes() const {
    const int64_t deltas =
        merged_qkv.empty() ? q_out.bytes() + o_in.bytes() + o_out.bytes() : -2 * r * in.in;
    return in.bytes() + deltas + packed.bytes() + mix.bytes();
  }
};

struct CudaAdapter {
  std::vector<CudaDslaLayer> layers;  // empty without an adapter
  std::vector<DslaShape> shapes;
  std::vector<DslaSlotLayout> layouts;
  int most_rank = 0;
};

// The largest qkv of a layer that is also held with the deltas in it. Where weights are larger,
// that would take the room of caches, and launches no longer decide how long a step takes.
inline constexpr int64_t kMostMergedBytes = int64_t{8} << 20;

inline bool IsPacked(WeightFormat format) {
  return format == WeightFormat::kInt8 || format == WeightFormat::kInt4;
}
int64_t WeightBytes(const ModelConfig& config, WeightFormat format);  // of the model's weights
// also_unpacked: packed matrices are held in bf16 as well.
Expected<std::shared_ptr<const CudaWeights>> UploadWeights(int device, const DeviceModelSpec& spec,
                                                           bool also_unpacked,
                                                           const TensorReader& read,
                                                           const ParallelRunner& parallel);
// kUnsupported where the operator's kernels cannot do a layer of it on the current device.
Status CheckAdapter(const DeviceModelSpec& spec);
std::shared_ptr<const CudaAdapter> UploadAdapter(const DeviceModelSpec& spec,
                                                 const CudaWeights& weights, cudaStream_t stream);

}  // namespace dsla::cuda
