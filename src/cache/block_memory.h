// BlockMemory: the memory that a CachePool's blocks lie in, the host's or a device's. The pool
// reserves address space once, and asks for memory behind a block before it is first used.
// Everything is in the order of the calls, and in that of the steps that a device runs. Not
// thread-safe: the pool's owner calls it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status.h"

namespace dsla {

struct BlockCopy {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
};

class BlockMemory {
 public:
  virtual ~BlockMemory() = default;

  // `bytes` of address space with no memory behind it. kResourceExhausted if it cannot be had.
  virtual Expected<std::byte*> Reserve(int64_t bytes) = 0;
  virtual void Release(std::byte* begin, int64_t bytes) = 0;  // what Reserve gave
  // Blocks may share the unit of memory that stands behind them: it is given back when none of
  // those that were backed is left in it. Back throws std::bad_alloc if there is no memory.
  virtual void Back(std::byte* block, int64_t bytes) = 0;
  virtual void GiveBack(std::byte* block, int64_t bytes) = 0;

  // Of blocks of `bytes` bytes, none of which is written twice, or written and read: a device does
  // all of a call at once.
  virtual void Copy(std::span<const BlockCopy> copies, int64_t bytes) = 0;
  virtual void Zero(std::span<std::byte* const> blocks, int64_t bytes) = 0;
};

// The host's memory. Lives as long as the program.
BlockMemory& HostMemory();

}  // namespace dsla
