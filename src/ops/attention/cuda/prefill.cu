// Prefill: which of FlashInfer's kernels, their plans' way to the device, and the launch of its FA2
// kernel over paged K and V. The Hopper form is launched in prefill_hopper.cuh.
//
// FlashInfer's planner leaves its arrays in pinned memory that the caller must keep until they are
// copied. Here they travel as kernel parameters, which a launch copies: nothing is allocated,
// nothing must be kept, nothing waits.
#include <algorithm>
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/scheduler.cuh>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/prefill_hopper.h"

namespace dsla::cuda {
namespace {

namespace fi = flashinfer;
using Bf16 = nv_bfloat16;

// Lengths come from pos: pages of a sequence may be more than it fills.
struct Params : fi::BatchPrefillPagedParams<Bf16, Bf16, Bf16, int32_t> {
  const int32_t* pos = nullptr;
  __host__ __device__ uint32_t get_kv_len(uint32_t n) const { return pos[n] + get_qo_len(n); }
};

// What a plan depends on beside the rows.
struct PlanKey {
  int N, H, Hkv, D, page_size, sliding_window;
  bool hopper;
  bool operator==(const PlanKey&) const = default;
};

// The FA2 kernel's plan lies in the workspace as words: [tiles] sequence, [tiles] tile of query
// rows, [tiles] part of the keys, [N + 1] start of a sequence's (partial) rows, keys of a part, and
// where keys are split [T + 1] start of a row's partial results. Then those: bf16 [rows, H, D] and
// fp32 [rows, H].
struct Plan {
  PlanKey key;
  int tiles = 0, tile_rows = 0, T = 0;
  bool split = false;
  int64_t partial_rows = 0;
  HopperPlan hopper;  // in its place, if key.hopper

  int64_t starts() const { return int64_t{3} * tiles; }
  int64_t part_keys() const { return starts() + key.N + 1; }
  int64_t merge_starts() const { return part_keys() + 1; }
  int64_t words() const { return merge_starts() + (split ? T + 1 : 0); }
};

constexpr int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int OfDevice(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
int Multiprocessors() { return OfDevice(cudaDevAttrMultiProcessorCount); }
// Blocks that the planner splits keys for: two per multiprocessor, as in FlashInfer's own.
int SplitBlocks() { return 2 * Multiprocessors(); }

// The Hopper kernels take a head's rows by tiles of 128 or 192 and never split keys; the FA2
// kernel's tiles may be 16 rows of the heads of a group together. Measured on an H200: from 128
// rows on, all sequences from position 0, Hopper is faster, or 1 us slower. Behind cached tokens,
// which was not measured, few tiles would walk through all of those keys on a part of the device:
// there they must also fill it.
constexpr int kHopperRows = 128;  // of a sequence, in the mean
bool TakeHopper(const PrefillAttentionArgs& a) {
  if (a.form != PrefillForm::kChoose) return a.form == PrefillForm::kHopper;
  // With a window FlashInfer's kernel also reads the first tile of the values, weighed 0: pages
  // that may be another sequence's by then.
  if (a.sliding_window > 0 || !PrefillOnHopper()) return false;
  int64_t sequences = 0, tiles = 0;
  bool cached = false;
  for (int n = 0; n < a.rows.N; ++n) {
    const int rows = a.host_row_start[n + 1] - a.host_row_start[n];
    if (rows == 0) continue;
    ++sequences;
    tiles += (rows + HopperTileRows(a.kv.D) - 1) / HopperTileRows(a.kv.D);
    cached |= a.host_pos[n] > 0;
  }
  return a.host_row_start[a.rows.N] >= kHopperRows * sequences &&
         (!cached || tiles * a.H >= Multiprocessors());
}

constexpr int kWords = 1000;  // kernel parameters of every toolkit and driver hold 4 KiB
struct WordsParams {
  int32_t* to;
  int count;
  int32_t words[kWords];
};
__global__ void StoreWords(const __grid_constant__ WordsParams p) {
  for (int i = threadIdx.x; i < p.count; i += blockDim.x) p.to[i] = p.words[i];
}

void Store(const std::vector<int32_t>& words, void* to, cudaStream_t stream) {
  WordsParams p;
  for (size_t at = 0; at < words.size(); at += kWords) {
    p.to = static_cast<int32_t*>(to) + at;
    p.count = static_cast<int>(std::min<size_t>(kWords, words.size() - at));
    std::copy_n(words.begin() + static_cast<int64_t>(at), p.count, p.words);
    StoreWords<<<1, 256, 0, stream>>>(p);
  }
}

Plan MakeFa2Plan(const PrefillAttentionArgs& a, const PlanKey& key, std::vector<int32_t>& words) {
  const int N = key.N, T = a.host_row_start[N];
  std::vector<int32_t> row_start(a.host_row_start, a.host_row_start + N + 1), page_start{0};
  for (int n = 0; n < N; ++n) {
    const int tokens = a.host_pos[n] + row_start[n + 1] - row_start[n];
    page_start.push_back(page_start.back() + (tokens + key.page_size - 1) / key.page_size);
  }
  const auto [split, tiles, padded, tile_rows, part_keys, sequence, q_tile, part, merge, starts] =
      fi::PrefillSplitQOKVIndptr(row_start.data(), page_start.data(), static_cast<uint32_t>(T),
                                 static_cast<uint32_t>(N), static_cast<uint32_t>(key.H),
                                 static_cast<uint32_t>(key.Hkv), static_cast<uint32_t>(key.D),
                                 static_cast<uint32_t>(key.page_size),
                                 static_cast<uint32_t>(SplitBlocks() / key.Hkv),
                                 /*enable_cuda_graph=*/false, key.sliding_window - 1,
                                 /*fixed_split_size=*/-1, /*disable_split_kv=*/false,
                                 /*uniform_q_len=*/0);
  Plan plan{key, static_cast<int>(tiles), static_cast<int>(tile_rows), T, split, 0, {}};
  if (split) plan.partial_rows = starts.back();
  for (const auto* part_of_plan : {&sequence, &q_tile, &part, &starts})
    words.insert(words.end(), part_of_plan->begin(), part_of_plan->end());
  words.push_back(static_cast<int32_t>(part_keys));
  if (split) words.insert(words.end(), merge.begin(), merge.end());
  DSLA_CHECK(static_cast<int64_t>(words.size()) == plan.words());
  DSLA_CHECK(Aligned(plan.words() * 4) + Aligned(plan.partial_rows * key.H * key.D * 2) +
                 plan.partial_rows * key.H * 4 <=
             a.workspace_bytes);
  return plan;
}

Plan MakePlan(const PrefillAttentionArgs& a, const PlanKey& key, cudaStream_t stream) {
  DSLA_CHECK(a.host_row_start[0] == 0);
  std::vector<int32_t> words;
  Plan plan;
  if (key.hopper) {
    plan.key = key;
    plan.T = a.host_row_start[key.N];
    plan.hopper = MakeHopperPlan(a, Multiprocessors(), words);
    DSLA_CHECK(plan.hopper.words() * 4 <= a.workspace_bytes);
  } else {
    plan = MakeFa2Plan(a, key, words);
  }
  Store(words, a.workspace, stream);
  return plan;
}

// The last plan of each workspace.
class Plans {
 public:
  Plan Get(const PrefillAttentionArgs& a, bool new_plan, cudaStream_t stream) {
    const PlanKey key{a.rows.N,         a.H,          a.kv.Hkv, a.kv.D, a.kv.page_size,
                      a.sliding_window, TakeHopper(a)};
    const std::lock_guard lock(mutex_);
    Plan& plan = plans_[a.workspace];
    // Layers that differ (in their window) have plans of their own: made anew at each change.
    if (new_plan || !(plan.key == key)) plan = MakePlan(a, key, stream);
    return plan;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, Plan> plans_;
};

Params MakeParams(const PrefillAttentionArgs& a, const Plan& plan) {
  Params p;
  const auto bf16 = [](const void* x) { return static_cast<Bf16*>(const_cast<void*>(x)); };
  const auto ints = [](const int32_t* x) { return const_cast<int32_t*>(x); };
  const int64_t strides[3] = {a.kv.page_stride, int64_t{a.kv.page_size} * a.kv.D, a.kv.D};
  p.q = bf16(a.q);
  p.paged_kv = fi::paged_kv_t<Bf16, int32_t>(
      static_cast<uint32_t>(a.kv.Hkv), static_cast<uint32_t>(a.kv.page_size),
      static_cast<uint32_t>(a.kv.D), static_cast<uint32_t>(a.rows.N), fi::QKVLayout::kHND,
      bf16(a.kv.k), bf16(a.kv.v), strides, ints(a.tables.pages), ints(a.tables.page_start),
      /*last_page_len=*/nullptr);
  p.q_indptr = ints(a.rows.row_start);
  p.pos = a.rows.pos;
  p.o = bf16(a.out);
  p.group_size = fi::uint_fastdiv(static_cast<uint32_t>(a.H / a.kv.Hkv));
  p.num_qo_heads = static_cast<uint32_t>(a.H);
  p.q_stride_n = static_cast<int32_t>(a.q_stride);
  p.q_stride_h = a.kv.D;
  p.window_left = a.sliding_window - 1;  // -1: all
  p.sm_scale = a.scale;
  p.rope_rcp_scale = p.rope_rcp_theta = 1;  // unused
  int32_t* words = static_cast<int32_t*>(a.workspace);
  p.request_indices = words;
  p.qo_tile_indices = words + plan.tiles;
  p.kv_tile_indices = words + int64_t{2} * plan.tiles;
  p.o_indptr = words + plan.starts();
  p.kv_chunk_size_ptr = words + plan.part_keys();
  p.merge_indptr = words + plan.merge_starts();
  p.max_total_num_rows = static_cast<uint32_t>(plan.T);
  p.padded_batch_size = static_cast<uint32_t>(plan.tiles);
  return p;
}

template <int kTileRows, int D>
cudaError_t Launch(const Params& p, const Plan& plan, void* workspace, cudaStream_t stream) {
  Bf16* partial = nullptr;
  float* lse = nullptr;
  if (plan.split) {
    std::byte* at = static_cast<std::byte*>(workspace) + Aligned(plan.words() * 4);
    partial = reinterpret_cast<Bf16*>(at);
    lse = reinterpret_cast<float*>(at + Aligned(plan.partial_rows * p.num_qo_heads * D * 2));
  }
  // One variant for all windows: the mask is looked at in the first and last tiles of keys alone.
  using Variant = fi::DefaultAttention</*use_custom_mask=*/false, /*use_sliding_window=*/true,
                                       /*use_logits_soft_cap=*/false, /*use_alibi=*/false>;
  return fi::BatchPrefillWithPagedKVCacheDispatched<
      /*SAME_KV_STRIDES=*/true, kTileRows, D, D, fi::PosEncodingMode::kNone,
      /*USE_FP16_QK_REDUCTION=*/false, fi::MaskMode::kCausal, Variant, Params>(
      p, partial, lse, /*enable_pdl=*/false, stream);
}

template <int D>
cudaError_t Launch(const Params& p, const Plan& plan, void* workspace, cudaStream_t stream) {
  switch (plan.tile_rows) {
    case 16:
      return Launch<16, D>(p, plan, workspace, stream);
    case 64:
      return Launch<64, D>(p, plan, workspace, stream);
    default:
      DSLA_CHECK(plan.tile_rows == 128);
      return Launch<128, D>(p, plan, workspace, stream);
  }
}

}  // namespace

int64_t PrefillAttentionWorkspaceBytes(int N, int64_t T, int H, int Hkv, int D) {
  const int64_t blocks = SplitBlocks();
  const int64_t tiles = std::max(blocks / Hkv, T * (H / Hkv) / 16 + N);
  const int64_t words = 3 * tiles + N + T + 3;
  const int64_t hopper = HopperPlanWords(N, T, H, D, Multiprocessors()) * 4;
  return std::max(Aligned(words * 4) + Aligned(blocks * 128 * D * 2) + blocks * 128 * 4, hopper);
}

bool PrefillOnHopper() { return OfDevice(cudaDevAttrComputeCapabilityMajor) == 9; }

int PrefillAttention(const PrefillAttentionArgs& a, bool new_plan, Stream stream) {
  static Plans plans;
  if (a.rows.N == 0 || a.host_row_start[a.rows.N] == 0) return cudaSuccess;
  DSLA_CHECK(a.kv.D == 64 || a.kv.D == 128);
  DSLA_CHECK(a.kv.dtype == DType::kBF16 && a.kv.Hkv > 0 && a.H % a.kv.Hkv == 0);
  DSLA_CHECK(a.q && a.out && a.kv.k && a.kv.v && a.workspace && a.rows.row_start && a.rows.pos);
  DSLA_CHECK(a.tables.page_start && a.tables.pages && a.q_stride % 8 == 0);
  DSLA_CHECK(a.k_stride % 8 == 0 && a.v_stride % 8 == 0);
  DSLA_CHECK(a.form != PrefillForm::kHopper || a.sliding_window == 0);
  // The kernel's offsets within q, out and between pages have 32 bits.
  const int64_t T = a.host_row_start[a.rows.N], limit = int64_t{1} << 32;
  DSLA_CHECK(T * std::max<int64_t>(a.q_stride, a.H * a.kv.D) < limit && a.kv.page_stride < limit);
  const Plan plan = plans.Get(a, new_plan, stream);
  DSLA_CHECK(plan.T == T);
  if (plan.key.hopper) {
    // A tile of rows that passes a sequence's end holds the next one's values, weighed 0: NaN there
    // would reach it. Past the last row TMA fills in zeros, so one sequence alone is safe.
    const bool from_rows = a.k && a.v && a.rows.N == 1 && a.host_pos[0] == 0;
    return a.kv.D == 64 ? HopperPrefill<64>(a, plan.hopper, from_rows, stream)
                        : HopperPrefill<128>(a, plan.hopper, from_rows, stream);
  }
  const Params p = MakeParams(a, plan);
  const cudaError_t error = a.kv.D == 64 ? Launch<64>(p, plan, a.workspace, stream)
                                         : Launch<128>(p, plan, a.workspace, stream);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace dsla::cuda
