// What becomes of a request once its head is read: its route, or the refusal that goes out before
// the body is taken. Pure but for the phase, which the server's owner sets.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/auth.h"
#include "server/http/http.h"
#include "server/http/router.h"

namespace dsla {

enum class Phase {
  kLoading,  // routes that are not there yet answer 503 loading
  kServing,
  kDraining,  // all but routes with while_draining answer 503 shutting_down
};

struct Dispatched {
  std::shared_ptr<const Router> router;  // keeps `route` alive
  const Route* route = nullptr;
  std::vector<std::pair<std::string, std::string>> params;
  std::optional<HttpResponse> refusal;  // sent instead of calling the route
  bool admin = false;
  HttpHeaders extra;  // of every response to this request (CORS)
};

class Dispatcher {
 public:
  // cors_origins: empty = off; "*" or the origins, as a browser sends them.
  Dispatcher(std::shared_ptr<const Router> router, KeyRing keys,
             std::vector<std::string> cors_origins);

  // beyond_limit: of a connection beyond the server's limit, on which only routes that are open and
  // served while draining, such as probes, are.
  Dispatched Dispatch(const HttpRequest& head, bool has_body, bool beyond_limit) const;

  // For a server that only its own machine reaches. Where it asks for no key either, a page from
  // elsewhere could call it by a name of its own that it makes resolve to this machine (DNS
  // rebinding), so that hosts other than localhost, IP addresses and `name` are refused. Before the
  // first Dispatch.
  void SetLocal(std::string name);

  void SetRouter(std::shared_ptr<const Router> router);
  void SetPhase(Phase phase);
  Phase phase() const;

 private:
  bool ServesHost(std::string_view host) const;
  HttpHeaders CorsHeaders(const HttpRequest& head) const;
  std::optional<HttpResponse> Refusal(const HttpRequest& head, bool has_body,
                                      const Router::Match& match, Phase phase,
                                      Dispatched& dispatched) const;

  const KeyRing keys_;
  const std::vector<std::string> cors_origins_;
  std::optional<std::string> local_name_;  // of a server that only its own machine reaches
  mutable std::mutex mutex_;
  std::shared_ptr<const Router> router_;  // guarded by mutex_
  Phase phase_ = Phase::kLoading;         // guarded by mutex_
};

}  // namespace dsla
