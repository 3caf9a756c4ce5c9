// Buffer<T>: an owned, 64-byte aligned array of a trivial type, contents undefined after Resize.
// Debug builds fill it with 0xff bytes (NaN for every float type), so that a read of something
// never written shows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <type_traits>

namespace dsla {

template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { Resize(size); }

  // Keeps the allocation when it is large enough. Contents are undefined afterwards.
  void Resize(int64_t size) {
    if (size > capacity_) {
      const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      capacity_ = size;
    }
    size_ = size;
#ifndef NDEBUG
    if (size > 0)
      std::memset(static_cast<void*>(data_.get()), 0xff, sizeof(T) * static_cast<size_t>(size));
#endif
  }
  void Fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  std::span<T> span() { return {data_.get(), static_cast<size_t>(size_)}; }
  std::span<const T> span() const { return {data_.get(), static_cast<size_t>(size_)}; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0, capacity_ = 0;
};

}  // namespace dsla
