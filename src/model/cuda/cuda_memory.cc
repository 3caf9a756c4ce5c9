#include "model/cuda/cuda_memory.h"

#include <dlfcn.h>

#include <algorithm>
#include <new>
#include <utility>

namespace dsla::cuda {
namespace {

// Mapping one takes 90 us of an H200's host, and eight of the least 440 us. The larger they are,
// the rarer is one whose pages a raise has freed all.
constexpr size_t kUnitBytes = size_t{16} << 20;
constexpr int kSparesAtOnce = 16;
// What units beyond the budget leave free: steps, their graphs and kernels take some of it.
constexpr size_t kLeftFree = size_t{1} << 30;

void CheckDriver(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  if (result == CUDA_ERROR_OUT_OF_MEMORY) throw std::bad_alloc();
  throw DeviceError(fmt::format("CUDA: {}: driver error {}", what, static_cast<int>(result)));
}

}  // namespace

Expected<DriverApi> DriverApi::Load() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded
  if (library == nullptr) return NotFound("no NVIDIA driver: {}", ::dlerror());
  DriverApi api;
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    function =
        reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  find(api.address_reserve, "cuMemAddressReserve");
  find(api.address_free, "cuMemAddressFree");
  find(api.create, "cuMemCreate");
  find(api.release, "cuMemRelease");
  find(api.map, "cuMemMap");
  find(api.unmap, "cuMemUnmap");
  find(api.set_access, "cuMemSetAccess");
  find(api.granularity, "cuMemGetAllocationGranularity");
  find(api.info, "cuMemGetInfo_v2");
  if (missing != nullptr) return NotFound("the NVIDIA driver is too old: it has no {}", missing);
  return api;
}

CudaBlockMemory::CudaBlockMemory(const DriverApi& driver, int device, cudaStream_t stream)
    : driver_(driver), stream_(stream), device_(device) {
  property_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  property_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  property_.location.id = device;
  size_t least = 0;
  CheckDriver(driver_.granularity(&least, &property_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
              "asking for the granularity of memory");
  unit_bytes_ = static_cast<int64_t>((kUnitBytes + least - 1) / least * least);
}

CudaBlockMemory::~CudaBlockMemory() {
  for (const CUmemGenericAllocationHandle handle : spares_) driver_.release(handle);
}

Expected<std::byte*> CudaBlockMemory::Reserve(int64_t bytes) {
  const int64_t units = (bytes + unit_bytes_ - 1) / unit_bytes_;
  CUdeviceptr base = 0;
  const CUresult result =
      driver_.address_reserve(&base, static_cast<size_t>(units * unit_bytes_), 0, 0, 0);
  if (result != CUDA_SUCCESS) {
    return ResourceExhausted("cannot reserve {} bytes of addresses on the GPU: driver error {}",
                             bytes, static_cast<int>(result));
  }
  auto* const begin = reinterpret_cast<std::byte*>(base);
  Space& space = spaces_[begin];
  space.bytes = units * unit_bytes_;
  space.units.resize(static_cast<size_t>(units));
  budget_bytes_ = std::max(budget_bytes_, space.bytes);
  return begin;
}

void CudaBlockMemory::Release(std::byte* begin, int64_t) {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  Space& space = spaces_.at(begin);
  for (size_t i = 0; i < space.units.size(); ++i) {
    if (space.units[i].handle != 0) Unmap(begin, space, static_cast<int64_t>(i));
  }
  driver_.address_free(reinterpret_cast<CUdeviceptr>(begin), static_cast<size_t>(space.bytes));
  spaces_.erase(begin);
}

CudaBlockMemory::Range CudaBlockMemory::UnitsOf(std::byte* block, int64_t bytes) {
  auto it = std::prev(spaces_.upper_bound(block));
  const int64_t offset = block - it->first;
  return {it->first, &it->second, offset / unit_bytes_, (offset + bytes - 1) / unit_bytes_};
}

// Within the budget as long as it can be: blocks of one kind may keep units that those of the other
// would need whole.
CudaBlockMemory::Handle CudaBlockMemory::Take(const Space& for_space) {
  const bool within = (created_ + 1) * unit_bytes_ <= budget_bytes_;
  if (spares_.empty() && (within || !MakeSpares(for_space))) {
    if (!within && !MayExceedBudget()) throw std::bad_alloc();
    Handle handle = 0;
    const CUresult result =
        driver_.create(&handle, static_cast<size_t>(unit_bytes_), &property_, 0);
    if (result == CUDA_SUCCESS) {
      ++created_;
      return handle;
    }
    if (!MakeSpares(for_space)) CheckDriver(result, "creating cache memory");
  }
  const Handle handle = spares_.back();
  spares_.pop_back();
  return handle;
}

bool CudaBlockMemory::MayExceedBudget() const {
  size_t free = 0, total = 0;
  CheckDriver(driver_.info(&free, &total), "asking for free memory");
  return free >= kLeftFree + static_cast<size_t>(unit_bytes_);
}

// Of units that no block is in, of another space if it has any; there the last, as the first are
// used first. One wait is for several.
bool CudaBlockMemory::MakeSpares(const Space& for_space) {
  for (const bool own : {false, true}) {
    for (auto& [base, space] : spaces_) {
      if ((&space == &for_space) != own || space.idle.empty()) continue;
      cudaStreamSynchronize(stream_);  // a kernel that still runs may read them
      for (int i = 0; i < kSparesAtOnce && !space.idle.empty(); ++i)
        Unmap(base, space, *space.idle.rbegin());
      return true;
    }
  }
  return false;
}

void CudaBlockMemory::Map(const Range& range, int64_t unit) {
  const Handle handle = Take(*range.space);
  const auto at = reinterpret_cast<CUdeviceptr>(range.base + unit * unit_bytes_);
  const auto bytes = static_cast<size_t>(unit_bytes_);
  CUmemAccessDesc access = {};
  access.location = property_.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  bool mapped = false;
  try {
    CheckDriver(driver_.map(at, bytes, 0, handle, 0), "mapping cache memory");
    mapped = true;
    CheckDriver(driver_.set_access(at, bytes, &access, 1), "opening cache memory");
  } catch (...) {
    if (mapped) driver_.unmap(at, bytes);
    spares_.push_back(handle);
    throw;
  }
  range.space->units[static_cast<size_t>(unit)].handle = handle;
  range.space->idle.insert(unit);
}

void CudaBlockMemory::Unmap(std::byte* base, Space& space, int64_t unit) {
  driver_.unmap(reinterpret_cast<CUdeviceptr>(base + unit * unit_bytes_),
                static_cast<size_t>(unit_bytes_));
  spares_.push_back(space.units[static_cast<size_t>(unit)].handle);
  space.units[static_cast<size_t>(unit)] = {};
  space.idle.erase(unit);
}

void CudaBlockMemory::Leave(Space& space, int64_t unit) {
  if (--space.units[static_cast<size_t>(unit)].blocks == 0) space.idle.insert(unit);
}

void CudaBlockMemory::Back(std::byte* block, int64_t bytes) {
  cudaSetDevice(device_);  // whichever thread this is
  const Range range = UnitsOf(block, bytes);
  for (int64_t i = range.first; i <= range.last; ++i) {
    Unit& unit = range.space->units[static_cast<size_t>(i)];
    try {
      if (unit.handle == 0) Map(range, i);
    } catch (...) {  // as if nothing had been asked for
      for (int64_t j = range.first; j < i; ++j) Leave(*range.space, j);
      throw;
    }
    if (unit.blocks++ == 0) range.space->idle.erase(i);
  }
}

void CudaBlockMemory::GiveBack(std::byte* block, int64_t bytes) {
  const Range range = UnitsOf(block, bytes);
  for (int64_t i = range.first; i <= range.last; ++i) Leave(*range.space, i);
}

void CudaBlockMemory::Copy(std::span<const BlockCopy> copies, int64_t bytes) {
  cudaSetDevice(device_);
  copies_.clear();
  for (const BlockCopy& copy : copies) copies_.push_back({copy.to, copy.from});
  Check(CopyOnDevice(copies_, bytes, stream_), "copying cache blocks");
}

void CudaBlockMemory::Zero(std::span<std::byte* const> blocks, int64_t bytes) {
  cudaSetDevice(device_);
  copies_.clear();
  for (std::byte* const block : blocks) copies_.push_back({block, nullptr});
  Check(CopyOnDevice(copies_, bytes, stream_), "clearing cache blocks");
}

}  // namespace dsla::cuda
