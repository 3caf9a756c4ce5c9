#include "model/cuda/cuda_memory.h"

#include <dlfcn.h>

#include <new>
#include <utility>

namespace dsla::cuda {
namespace {

void CheckDriver(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  if (result == CUDA_ERROR_OUT_OF_MEMORY) throw std::bad_alloc();
  throw DeviceError(fmt::format("CUDA: {}: driver error {}", what, static_cast<int>(result)));
}

}  // namespace

Expected<DriverApi> DriverApi::Load() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded
  if (library == nullptr)
    return Error(StatusCode::kUnavailable, "no NVIDIA driver: {}", ::dlerror());
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
  if (missing != nullptr)
    return Error(StatusCode::kUnavailable, "the NVIDIA driver is too old: it has no {}", missing);
  return api;
}

CudaBlockMemory::CudaBlockMemory(const DriverApi& driver, int device, cudaStream_t stream)
    : driver_(driver), stream_(stream), device_(device) {
  property_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  property_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  property_.location.id = device;
  size_t unit = 0;
  CheckDriver(driver_.granularity(&unit, &property_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
              "asking for the granularity of memory");
  unit_bytes_ = static_cast<int64_t>(unit);
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
  return begin;
}

void CudaBlockMemory::Release(std::byte* begin, int64_t) {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  Space& space = spaces_.at(begin);
  for (size_t i = 0; i < space.units.size(); ++i) {
    if (space.units[i].blocks > 0)
      Unmap(begin + static_cast<int64_t>(i) * unit_bytes_, space.units[i]);
  }
  driver_.address_free(reinterpret_cast<CUdeviceptr>(begin), static_cast<size_t>(space.bytes));
  spaces_.erase(begin);
}

CudaBlockMemory::Range CudaBlockMemory::UnitsOf(std::byte* block, int64_t bytes) {
  auto it = std::prev(spaces_.upper_bound(block));
  const int64_t offset = block - it->first;
  return {it->first, &it->second, offset / unit_bytes_, (offset + bytes - 1) / unit_bytes_};
}

void CudaBlockMemory::Map(std::byte* at, Unit& unit) {
  const auto bytes = static_cast<size_t>(unit_bytes_);
  if (spares_.empty()) {
    CheckDriver(driver_.create(&unit.handle, bytes, &property_, 0), "creating cache memory");
  } else {
    unit.handle = spares_.back();
    spares_.pop_back();
  }
  const auto address = reinterpret_cast<CUdeviceptr>(at);
  try {
    CheckDriver(driver_.map(address, bytes, 0, unit.handle, 0), "mapping cache memory");
  } catch (...) {
    spares_.push_back(std::exchange(unit.handle, {}));
    throw;
  }
  CUmemAccessDesc access = {};
  access.location = property_.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  try {
    CheckDriver(driver_.set_access(address, bytes, &access, 1), "opening cache memory");
  } catch (...) {
    Unmap(at, unit);
    throw;
  }
}

void CudaBlockMemory::Unmap(std::byte* at, Unit& unit) {
  driver_.unmap(reinterpret_cast<CUdeviceptr>(at), static_cast<size_t>(unit_bytes_));
  spares_.push_back(unit.handle);
  unit = {};
}

void CudaBlockMemory::Back(std::byte* block, int64_t bytes) {
  cudaSetDevice(device_);  // whichever thread this is
  const Range range = UnitsOf(block, bytes);
  for (int64_t i = range.first; i <= range.last; ++i) {
    Unit& unit = range.space->units[static_cast<size_t>(i)];
    if (unit.blocks == 0) {
      try {
        Map(range.base + i * unit_bytes_, unit);
      } catch (...) {  // as if nothing had been asked for
        for (int64_t j = range.first; j < i; ++j) {
          Unit& done = range.space->units[static_cast<size_t>(j)];
          if (--done.blocks == 0) Unmap(range.base + j * unit_bytes_, done);
        }
        throw;
      }
    }
    ++unit.blocks;
  }
}

void CudaBlockMemory::GiveBack(std::byte* block, int64_t bytes) {
  cudaSetDevice(device_);
  const Range range = UnitsOf(block, bytes);
  bool waited = false;
  for (int64_t i = range.first; i <= range.last; ++i) {
    Unit& unit = range.space->units[static_cast<size_t>(i)];
    if (--unit.blocks > 0) continue;
    if (!waited) {  // a kernel that still runs may read it
      cudaStreamSynchronize(stream_);
      waited = true;
    }
    Unmap(range.base + i * unit_bytes_, unit);
  }
}

void CudaBlockMemory::Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  cudaSetDevice(device_);
  Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_),
        "copying a cache block");
}

void CudaBlockMemory::Zero(std::byte* block, int64_t bytes) {
  cudaSetDevice(device_);
  Check(cudaMemsetAsync(block, 0, static_cast<size_t>(bytes), stream_), "clearing a cache block");
}

}  // namespace dsla::cuda
