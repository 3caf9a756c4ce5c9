#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "distill/ranks.h"

namespace dsla {
namespace {

constexpr std::chrono::minutes kJoin{5};
// While one rank evaluates or searches the order the others wait for it.
constexpr std::chrono::hours kWait{6};
constexpr char kFile[] = "file:";

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

// NCCL through its C interface, out of the library that libtorch's CUDA part has loaded: programs
// are linked without it.
class Nccl {
 public:
  // Null if the library is not there.
  static std::unique_ptr<Nccl> Find() {
    void* library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) library = ::dlopen("libnccl.so.2", RTLD_NOW);
    if (library == nullptr) return nullptr;
    std::unique_ptr<Nccl> nccl(new Nccl);
    const auto bind = [&](const char* name, auto* to) {
      *to = reinterpret_cast<std::decay_t<decltype(*to)>>(::dlsym(library, name));
      return *to != nullptr;
    };
    const bool all = bind("ncclGetUniqueId", &nccl->get_unique_id_) &&
                     bind("ncclCommInitRank", &nccl->comm_init_rank_) &&
                     bind("ncclAllReduce", &nccl->all_reduce_) &&
                     bind("ncclCommAbort", &nccl->comm_abort_) &&
                     bind("ncclGetErrorString", &nccl->get_error_string_);
    return all ? std::move(nccl) : nullptr;
  }
  // All is done by then (who reads results waits for the device), so that nothing is lost, and
  // unlike an orderly end this cannot wait for a rank that is gone.
  ~Nccl() {
    if (comm_ != nullptr) comm_abort_(comm_);
  }

  void Join(c10d::Store& store, int rank, int ranks, c10::Device device) {
    at::accelerator::setDeviceIndex(device.index());
    UniqueId id{};
    if (rank == 0) {
      Check(get_unique_id_(&id));
      store.set("nccl", std::vector<uint8_t>(id.bytes, id.bytes + sizeof id.bytes));
    } else {
      const std::vector<uint8_t> bytes = store.get("nccl");
      TORCH_CHECK(bytes.size() == sizeof id.bytes, "NCCL: an id of ", bytes.size(), " bytes");
      std::memcpy(id.bytes, bytes.data(), sizeof id.bytes);
    }
    Check(comm_init_rank_(&comm_, ranks, id, rank));
  }

  void Sum(at::Tensor& x) {
    constexpr int kInt64 = 4, kFloat32 = 7, kSum = 0;  // of nccl.h
    const c10::Stream stream = at::accelerator::getCurrentStream(x.device().index());
    Check(all_reduce_(x.const_data_ptr(), x.mutable_data_ptr(), static_cast<size_t>(x.numel()),
                      x.scalar_type() == at::kFloat ? kFloat32 : kInt64, kSum, comm_,
                      stream.native_handle()));
  }

 private:
  struct UniqueId {
    char bytes[128];
  };
  Nccl() = default;
  void Check(int result) const { TORCH_CHECK(result == 0, "NCCL: ", get_error_string_(result)); }

  int (*get_unique_id_)(UniqueId*) = nullptr;
  int (*comm_init_rank_)(void**, int, UniqueId, int) = nullptr;
  int (*all_reduce_)(const void*, void*, size_t, int, int, void*, void*) = nullptr;
  int (*comm_abort_)(void*) = nullptr;
  const char* (*get_error_string_)(int) = nullptr;
  void* comm_ = nullptr;
};

Expected<c10::intrusive_ptr<c10d::Store>> OpenStore(const RankOptions& options) {
  const std::string& where = options.rendezvous;
  if (where.starts_with(kFile) && where.size() > sizeof kFile - 1)
    return c10::intrusive_ptr<c10d::Store>(
        c10::make_intrusive<c10d::FileStore>(where.substr(sizeof kFile - 1), options.ranks));
  const size_t colon = where.rfind(':');
  uint16_t port = 0;
  const char* const end = where.data() + where.size();
  const auto [rest, error] = colon == std::string::npos
                                 ? std::from_chars_result{nullptr, std::errc::invalid_argument}
                                 : std::from_chars(where.data() + colon + 1, end, port);
  if (colon == 0 || error != std::errc() || rest != end || port == 0)
    return InvalidArgument("--rendezvous: '{}' is neither HOST:PORT nor file:PATH", where);
  c10d::TCPStoreOptions tcp;
  tcp.port = port;
  tcp.isServer = options.rank == 0 && !options.served;
  tcp.waitWorkers = false;
  tcp.timeout = kJoin;
  return c10::intrusive_ptr<c10d::Store>(
      c10::make_intrusive<c10d::TCPStore>(where.substr(0, colon), tcp));
}

}  // namespace

struct Ranks::Impl {
  int size = 1, rank = 0;
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::Backend> gloo;
  bool asked_nccl = false;
  std::unique_ptr<Nccl> nccl;

  void Reduce(at::Tensor x, c10d::ReduceOp::RedOpType how) {
    std::vector<at::Tensor> list = {std::move(x)};
    c10d::AllreduceOptions options;
    options.reduceOp = how;
    gloo->allreduce(list, options)->wait();
  }
};

Ranks::Ranks(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Ranks::~Ranks() = default;

Expected<std::unique_ptr<Ranks>> Ranks::Join(const RankOptions& options) {
  DSLA_CHECK(options.ranks > 0 && options.rank >= 0 && options.rank < options.ranks);
  auto impl = std::make_unique<Impl>();
  impl->size = options.ranks, impl->rank = options.rank;
  try {
    DSLA_ASSIGN_OR_RETURN(auto store, OpenStore(options));
    impl->store =
        c10::make_intrusive<c10d::PrefixStore>("dsla/" + options.attempt, std::move(store));
    // Everybody is here, or nobody begins.
    std::vector<std::string> here;
    for (int i = 0; i < options.ranks; ++i) here.push_back(fmt::format("here/{}", i));
    impl->store->set(here[options.rank], std::vector<uint8_t>{1});
    impl->store->wait(here, kJoin);
    const auto gloo = c10d::ProcessGroupGloo::Options::create_default(kWait);
    impl->gloo =
        c10::make_intrusive<c10d::ProcessGroupGloo>(impl->store, options.rank, options.ranks, gloo);
  } catch (const std::exception& error) {
    return Error(StatusCode::kUnavailable, "rank {} of {} cannot join the others at '{}': {}",
                 options.rank, options.ranks, options.rendezvous, FirstLine(error.what()));
  }
  return std::unique_ptr<Ranks>(new Ranks(std::move(impl)));
}

int Ranks::size() const { return impl_->size; }
int Ranks::rank() const { return impl_->rank; }

void Ranks::Sum(at::Tensor& x) {
  Impl& r = *impl_;
  DSLA_CHECK(x.is_contiguous() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kLong));
  if (x.is_cpu()) return r.Reduce(x, c10d::ReduceOp::SUM);
  if (!r.asked_nccl) {
    r.asked_nccl = true;
    r.nccl = Nccl::Find();
    if (Max({r.nccl == nullptr ? 1 : 0})[0] != 0) r.nccl = nullptr;  // all or none
    if (r.nccl != nullptr) r.nccl->Join(*r.store, r.rank, r.size, x.device());
  }
  if (r.nccl != nullptr) return r.nccl->Sum(x);
  const at::Tensor host = x.to(at::kCPU);
  r.Reduce(host, c10d::ReduceOp::SUM);
  x.copy_(host);
}

std::vector<int64_t> Ranks::Max(const std::vector<int64_t>& values) {
  at::Tensor x = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), x.mutable_data_ptr<int64_t>());
  impl_->Reduce(x, c10d::ReduceOp::MAX);
  const int64_t* const result = x.const_data_ptr<int64_t>();
  return {result, result + values.size()};
}

Status Ranks::Agree(const Status& own) {
  const int64_t failed = Max({own.ok() ? -1 : impl_->rank})[0];
  if (!own.ok() || failed < 0) return own;
  return Error(StatusCode::kUnavailable, "rank {} of {} failed", failed, impl_->size);
}

}  // namespace dsla
