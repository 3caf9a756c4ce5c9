// From a method and a path to a handler. Built once, then shared and read-only.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/http/http.h"

namespace dsla {

// Who may call a route where keys are set: everybody, holders of a key, holders of the admin key.
enum class Access { kOpen, kKey, kAdmin };

struct RouteOptions {
  Access access = Access::kKey;
  bool json_body = true;        // a body must come as application/json, else 415 (POST, PUT, PATCH)
  bool while_draining = false;  // goes on being served after SIGTERM
};

struct Route {
  std::string method;
  std::string pattern;                // as it was added
  std::vector<std::string> segments;  // of the pattern
  Handler handler;
  RouteOptions options;
};

class Router {
 public:
  // pattern: "/v1/models/{id}". A parameter takes one segment of the path, the last one all that is
  // left of it, slashes included ("org/name"). A GET route answers HEAD too.
  void Add(std::string method, std::string_view pattern, Handler handler,
           RouteOptions options = {});

  // Changes who may call a route that was added; nothing if there is none.
  void SetAccess(std::string_view method, std::string_view pattern, Access access);

  struct Match {
    const Route* route = nullptr;  // null: 405 if `allow` is set, else 404
    std::vector<std::pair<std::string, std::string>> params;
    std::string allow;  // "GET, HEAD, OPTIONS": the methods of this path
  };
  // Routes without parameters win over those with.
  Match Find(std::string_view method, std::string_view path) const;

 private:
  std::vector<std::unique_ptr<Route>> routes_;
};

}  // namespace dsla
