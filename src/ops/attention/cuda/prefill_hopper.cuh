// The launch of FlashInfer's FA3 kernels, with a scheduler of our own: theirs wants the page
// tables' starts on the host and six words for every tile of every head. Included once per head
// dim.
#pragma once

#pragma nv_diagnostic push
#pragma nv_diag_suppress 20012  // CUTLASS: attributes of defaulted functions
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>
#pragma nv_diagnostic pop
#include <cstdint>
#include <type_traits>

#include "base/check.h"
#include "ops/attention/cuda/prefill_hopper.h"

namespace dsla::cuda {
namespace {

namespace fi = flashinfer;
using HopperBf16 = cutlass::bfloat16_t;

// The interface that fi::PrefillWithKVCacheKernel asks of a tile scheduler.
struct ListScheduler {
  struct Params {
    const int32_t *work_start, *work, *sequence, *tile;
    const int32_t *row_start, *pos;
    const int32_t* kv_start;  // of a sequence's page table, or of its rows
    cutlass::FastDivmod heads, group;
  };

  struct WorkTileInfo {
    int at, end;
    int q_tile = 0, head = 0, kv_head = 0, row_start = 0, kv_start = 0, rows = 0, keys = 0;
    int sequence = 0;

    CUTLASS_DEVICE bool is_valid(const Params&) const { return at < end; }
    CUTLASS_DEVICE auto get_block_coord(const Params&) const {
      return cute::tuple{q_tile, head, kv_head, row_start, kv_start, rows, keys, sequence};
    }
  };

  CUTLASS_DEVICE static WorkTileInfo Load(const Params& p, int at, int end) {
    WorkTileInfo info{at, end};
    if (at >= end) return info;
    int tile;
    p.heads(tile, info.head, p.work[at]);
    info.kv_head = p.group.divide(info.head);
    info.sequence = p.sequence[tile];
    info.q_tile = p.tile[tile];
    info.row_start = p.row_start[info.sequence];
    info.rows = p.row_start[info.sequence + 1] - info.row_start;
    info.keys = p.pos[info.sequence] + info.rows;
    info.kv_start = p.kv_start[info.sequence];
    return info;
  }

  CUTLASS_DEVICE WorkTileInfo get_initial_work(const Params& p) const {
    return Load(p, p.work_start[blockIdx.x], p.work_start[blockIdx.x + 1]);
  }
  template <bool is_producer = false>
  CUTLASS_DEVICE WorkTileInfo get_next_work(const Params& p, const WorkTileInfo& now) const {
    return Load(p, now.at + 1, now.end);
  }
  CUTLASS_DEVICE void init_consumer() const {}
  CUTLASS_DEVICE void prefetch_next_work(const Params&, WorkTileInfo&) const {}
  CUTLASS_DEVICE void broadcast_next_work(WorkTileInfo&) const {}
};

struct Scale {
  float sm_scale;
};

// Keys of a tile: what fits the registers that the kernel leaves to its consumers.
constexpr int HopperTileKeys(int D, bool from_rows) { return D == 64 && !from_rows ? 96 : 128; }

template <int D, bool kFromRows>
cudaError_t LaunchHopper(const PrefillAttentionArgs& a, const HopperPlan& plan,
                         cudaStream_t stream) {
  using Traits =
      fi::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/kFromRows, D, D, HopperTileRows(D),
                                HopperTileKeys(D, kFromRows), /*NUM_STAGES=*/2, HopperBf16,
                                HopperBf16, HopperBf16, int32_t, fi::StandardAttention>;
  using Mainloop =
      std::conditional_t<kFromRows, fi::CollectiveMainloop<Scale, Traits, /*CAUSAL=*/true>,
                         fi::SparseCollectiveMainloop<Scale, Traits, /*CAUSAL=*/true>>;
  using Epilogue = fi::CollectiveEpilogue<Traits>;
  for (const void* tensor : {a.q, kFromRows ? a.k : a.q, kFromRows ? a.v : a.q})
    DSLA_CHECK(reinterpret_cast<uintptr_t>(tensor) % 16 == 0);  // what TMA asks
  const int T = a.host_row_start[a.rows.N];
  const auto bf16 = [](const void* x) { return static_cast<HopperBf16*>(const_cast<void*>(x)); };
  const auto q = fi::get_gmem_layout(T, a.H, D, a.q_stride, D);
  typename Mainloop::Params mainloop = [&] {
    if constexpr (kFromRows) {
      return Mainloop::to_underlying_arguments(
          {bf16(a.q), q, bf16(a.k), fi::get_gmem_layout(T, a.kv.Hkv, D, a.k_stride, D), bf16(a.v),
           fi::get_gmem_layout(T, a.kv.Hkv, D, a.v_stride, D), /*window_left=*/-1, Scale{a.scale}});
    } else {
      const auto page = fi::get_gmem_layout(/*nnz=*/0, a.kv.Hkv, D, D, int64_t{a.kv.page_size} * D);
      return Mainloop::to_underlying_arguments(
          {bf16(a.q), q, bf16(a.kv.k), page, bf16(a.kv.v), page, a.tables.pages, /*window_left=*/-1,
           a.kv.page_stride, a.kv.page_stride, static_cast<uint32_t>(a.kv.page_size),
           Scale{a.scale}});
    }
  }();
  typename Epilogue::Params epilogue = Epilogue::to_underlying_arguments(
      {bf16(a.out), fi::get_gmem_layout(T, a.H, D, int64_t{a.H} * D, D), /*lse_ptr=*/nullptr,
       fi::get_lse_gmem_layout(T, a.H)});
  const int32_t* words = static_cast<const int32_t*>(a.workspace);
  ListScheduler::Params scheduler{words,
                                  words + plan.work(),
                                  words + plan.sequence(),
                                  words + plan.tile(),
                                  a.rows.row_start,
                                  a.rows.pos,
                                  kFromRows ? a.rows.row_start : a.tables.page_start,
                                  cutlass::FastDivmod(a.H),
                                  cutlass::FastDivmod(a.H / a.kv.Hkv)};
  const auto kernel =
      reinterpret_cast<const void*>(&fi::PrefillWithKVCacheKernel<Mainloop, Epilogue, Traits,
                                                                  /*LEFT_SLIDING_WINDOW=*/false,
                                                                  /*CAUSAL=*/true, ListScheduler>);
  constexpr int kShared = sizeof(typename Traits::SharedStorage);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  void* params[] = {&mainloop, &epilogue, &scheduler};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(plan.blocks)),
                          dim3(Traits::NUM_THREADS), params, kShared, stream);
}

}  // namespace

template <int D>
int HopperPrefill(const PrefillAttentionArgs& a, const HopperPlan& plan, bool from_rows,
                  Stream stream) {
  return from_rows ? LaunchHopper<D, true>(a, plan, stream)
                   : LaunchHopper<D, false>(a, plan, stream);
}

}  // namespace dsla::cuda
