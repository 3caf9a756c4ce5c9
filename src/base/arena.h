// Arena: memory for what lives as long as a model: weights. Allocations lie one after another in
// blocks of huge pages and are given back together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace dsla {

// Thread-safe. Streaming a model's weights through 4 KiB pages costs a fifth of the read rate in
// address translation; huge pages need 2 MiB in one piece, which single weights are too small for.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // 64-byte aligned, zeroed, valid as long as the arena. Throws std::bad_alloc.
  void* Take(int64_t bytes);

 private:
  struct Block {
    std::byte* data;
    int64_t size, used;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

}  // namespace dsla
