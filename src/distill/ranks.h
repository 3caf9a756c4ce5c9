// Ranks: the processes that train together, each on a part of every batch (data parallel). They
// meet through a c10d store and exchange numbers by gloo; sums of what lies on a GPU go by NCCL
// where its library is there, else through the host.
//
// Every collective (Sum, Max, Agree) is called by all ranks in the same order. One that cannot be
// finished, as when a rank's process has ended, leaves by exception. Not thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"

namespace at {
class Tensor;
}

namespace dsla {

struct RankOptions {
  int ranks = 0;           // processes; 0: not said
  int rank = -1;           // this one; -1: not said
  int local_rank = -1;     // this one among those of its machine: which GPU; -1: as rank
  std::string rendezvous;  // HOST:PORT, where rank 0 listens, or file:PATH, a file that is not
                           // there yet in a folder that all see
  bool served = false;     // somebody else (torchrun's agent) listens at HOST:PORT
  std::string attempt;     // tells the keys of one start from those of another at the same store
};

// Fills in what `given` leaves open from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
// as torchrun sets them; with neither there is one rank. `environment` is std::getenv outside
// tests. Errors: kInvalidArgument naming the variable or option.
Expected<RankOptions> CompleteRanks(RankOptions given,
                                    const std::function<const char*(const char*)>& environment);

class Ranks {
 public:
  // Waits up to five minutes for the others. Errors: kInvalidArgument for a rendezvous of neither
  // form; kUnavailable, with the reason, if they do not come.
  static Expected<std::unique_ptr<Ranks>> Join(const RankOptions& options);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int size() const;
  int rank() const;

  // x becomes the sum over the ranks, of the same bits on each. fp32 or int64, dense, on the CPU or
  // a GPU; on a GPU by NCCL nothing waits for the device.
  void Sum(at::Tensor& x);
  // The largest of each place.
  std::vector<int64_t> Max(const std::vector<int64_t>& values);
  // `own` if it is an error; else kUnavailable naming a rank whose `own` is one; else Ok.
  Status Agree(const Status& own);

 private:
  struct Impl;
  explicit Ranks(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsla
