#include "distill/ranks.h"

#include <charconv>
#include <string_view>

namespace dsla {

Expected<RankOptions> CompleteRanks(RankOptions given,
                                    const std::function<const char*(const char*)>& environment) {
  const auto number = [&](const char* name, int* to) -> Status {
    const char* const text = environment(name);
    if (text == nullptr) return Status::Ok();
    const std::string_view view = text;
    const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), *to);
    if (error != std::errc() || end != view.data() + view.size() || *to < 0)
      return InvalidArgument("{}: '{}' is not a whole number", name, view);
    return Status::Ok();
  };
  RankOptions options = given;
  if (given.ranks == 0) DSLA_RETURN_IF_ERROR(number("WORLD_SIZE", &options.ranks));
  if (options.ranks == 0) options.ranks = 1;
  if (options.ranks < 1 || options.ranks > 1024)
    return InvalidArgument("--ranks: {} is not in 1 to 1024", options.ranks);
  if (options.ranks == 1) {
    options.rank = 0;
    return options;
  }
  if (given.rank < 0) DSLA_RETURN_IF_ERROR(number("RANK", &options.rank));
  if (options.rank < 0 || options.rank >= options.ranks)
    return InvalidArgument("--rank: {} is not in 0 to {}", options.rank, options.ranks - 1);
  if (given.local_rank < 0) DSLA_RETURN_IF_ERROR(number("LOCAL_RANK", &options.local_rank));
  if (options.local_rank < 0) options.local_rank = options.rank;
  if (options.rendezvous.empty()) {
    const char *const host = environment("MASTER_ADDR"), *const port = environment("MASTER_PORT");
    if (host == nullptr || port == nullptr)
      return InvalidArgument(
          "{} ranks need --rendezvous HOST:PORT or file:PATH (or MASTER_ADDR and MASTER_PORT)",
          options.ranks);
    options.rendezvous = fmt::format("{}:{}", host, port);
    // torchrun's agent serves the store itself, and keeps it over restarts of its processes.
    const char* const agent = environment("TORCHELASTIC_USE_AGENT_STORE");
    options.served = agent != nullptr && std::string_view(agent) == "True";
    if (const char* const attempt = environment("TORCHELASTIC_RESTART_COUNT"); attempt != nullptr)
      options.attempt = attempt;
  }
  return options;
}

}  // namespace dsla
