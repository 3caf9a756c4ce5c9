// The memory of cache blocks on a GPU: address space is reserved once, and units of physical memory
// (16 MiB) are mapped where blocks are in use, so that pages and slots share one budget as they do
// on the host.
//
// Mapping takes the host's time, a unit's as much whatever its size, so units are larger than the
// driver's own, and one that no block is left in stays where it is until a block elsewhere needs
// it. Such units may be more than the budget as long as the GPU has memory to spare.
#pragma once

#include <cuda.h>

#include <map>
#include <set>
#include <vector>

#include "cache/block_memory.h"
#include "model/cuda/cuda_util.h"
#include "ops/cuda/blocks.h"

namespace dsla::cuda {

// The driver's functions that the runtime has no form of, taken from the driver's library, which is
// where a GPU is and nowhere else.
struct DriverApi {
  decltype(&cuMemAddressReserve) address_reserve = nullptr;
  decltype(&cuMemAddressFree) address_free = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemGetInfo) info = nullptr;

  static Expected<DriverApi> Load();
};

class CudaBlockMemory : public BlockMemory {
 public:
  // Copies are in the order of `stream`.
  CudaBlockMemory(const DriverApi& driver, int device, cudaStream_t stream);
  ~CudaBlockMemory() override;
  CudaBlockMemory(const CudaBlockMemory&) = delete;
  CudaBlockMemory& operator=(const CudaBlockMemory&) = delete;

  Expected<std::byte*> Reserve(int64_t bytes) override;
  void Release(std::byte* begin, int64_t bytes) override;
  void Back(std::byte* block, int64_t bytes) override;
  void GiveBack(std::byte* block, int64_t bytes) override;
  void Copy(std::span<const BlockCopy> copies, int64_t bytes) override;
  void Zero(std::span<std::byte* const> blocks, int64_t bytes) override;

 private:
  using Handle = CUmemGenericAllocationHandle;
  struct Unit {
    Handle handle = 0;  // 0: not mapped
    int blocks = 0;     // that reach into it and are backed
  };
  struct Space {
    int64_t bytes = 0;
    std::vector<Unit> units;
    std::set<int64_t> idle;  // units that are mapped and have no block
  };
  // The space that holds `block`, and the range of its units that the block reaches into.
  struct Range {
    std::byte* base;
    Space* space;
    int64_t first, last;
  };
  Range UnitsOf(std::byte* block, int64_t bytes);
  void Map(const Range& range, int64_t unit);
  void Unmap(std::byte* base, Space& space, int64_t unit);
  void Leave(Space& space, int64_t unit);  // by one block
  Handle Take(const Space& for_space);
  bool MayExceedBudget() const;
  bool MakeSpares(const Space& for_space);

  DriverApi driver_;
  CUmemAllocationProp property_ = {};
  cudaStream_t stream_;
  int device_;
  int64_t unit_bytes_ = 0;
  int64_t budget_bytes_ = 0;            // the largest space: each could be all of the budget
  int64_t created_ = 0;                 // units
  std::map<std::byte*, Space> spaces_;  // by address
  std::vector<Handle> spares_;          // not mapped
  std::vector<DeviceCopy> copies_;      // of one call, kept for their memory
};

}  // namespace dsla::cuda
