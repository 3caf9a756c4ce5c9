#include "server/http/dispatch.h"

#include <arpa/inet.h>

#include <algorithm>

#include "server/http/errors.h"

namespace dsla {
namespace {

// "application/json; charset=utf-8" and "application/problem+json", in any case.
bool IsJson(std::string_view content_type) {
  std::string_view type = content_type.substr(0, content_type.find(';'));
  while (!type.empty() && (type.back() == ' ' || type.back() == '\t')) type.remove_suffix(1);
  if (EqualsIgnoreCase(type, "application/json")) return true;
  return type.size() > 17 && EqualsIgnoreCase(type.substr(0, 12), "application/") &&
         EqualsIgnoreCase(type.substr(type.size() - 5), "+json");
}

bool TakesBody(std::string_view method) {
  return method == "POST" || method == "PUT" || method == "PATCH";
}

// "box:80" -> "box", "[::1]:80" -> "::1".
std::string_view WithoutPort(std::string_view host) {
  if (host.starts_with('[')) return host.substr(1, std::min(host.find(']'), host.size()) - 1);
  return host.substr(0, host.rfind(':'));
}

bool IsIpAddress(const std::string& name) {
  in6_addr address;  // large enough for either
  return inet_pton(AF_INET, name.c_str(), &address) == 1 ||
         inet_pton(AF_INET6, name.c_str(), &address) == 1;
}

// What base URLs of clients are given wrongly: without /v1, with it twice, with a slash too many.
// Empty: none of these is a path.
std::string NearPath(const Router& router, std::string_view method, std::string_view path) {
  std::string clean;
  for (const char c : path) {
    if (c != '/' || !clean.ends_with('/')) clean += c;
  }
  if (clean.starts_with("/v1/v1/")) clean.erase(0, 3);
  for (std::string near : {clean, "/v1" + clean}) {
    if (router.Find(method, near).route) return near;
  }
  return {};
}

constexpr std::string_view kUsualHeaders =
    "Authorization, Content-Type, X-Request-Id, X-Request-Timeout";

// Names of headers (RFC 9110, "token") between commas.
bool IsNameList(std::string_view list) {
  return !list.empty() && std::all_of(list.begin(), list.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           std::string_view("!#$%&'*+-.^_`|~, \t").find(c) != std::string_view::npos;
  });
}

bool ServedToEverybody(const Route* route) {
  return route && route->options.access == Access::kOpen && route->options.while_draining;
}

}  // namespace

Dispatcher::Dispatcher(std::shared_ptr<const Router> router, KeyRing keys,
                       std::vector<std::string> cors_origins)
    : keys_(std::move(keys)), cors_origins_(std::move(cors_origins)), router_(std::move(router)) {}

void Dispatcher::SetLocal(std::string name) { local_name_ = std::move(name); }

// HTTP/1.0 knows requests without a host; no browser sends such.
bool Dispatcher::ServesHost(std::string_view host) const {
  if (!local_name_ || keys_.needs_key() || host.empty()) return true;
  const std::string name(WithoutPort(host));
  return EqualsIgnoreCase(name, "localhost") || EqualsIgnoreCase(name, *local_name_) ||
         IsIpAddress(name);
}

void Dispatcher::SetRouter(std::shared_ptr<const Router> router) {
  const std::lock_guard lock(mutex_);
  router_ = std::move(router);
}

void Dispatcher::SetPhase(Phase phase) {
  const std::lock_guard lock(mutex_);
  phase_ = phase;
}

Phase Dispatcher::phase() const {
  const std::lock_guard lock(mutex_);
  return phase_;
}

HttpHeaders Dispatcher::CorsHeaders(const HttpRequest& head) const {
  HttpHeaders headers;
  const std::string_view origin = head.headers.Get("Origin");
  if (origin.empty() || cors_origins_.empty()) return headers;
  const bool any =
      std::find(cors_origins_.begin(), cors_origins_.end(), "*") != cors_origins_.end();
  if (!any) {
    headers.Add("Vary", "Origin");
    if (std::find(cors_origins_.begin(), cors_origins_.end(), origin) == cors_origins_.end())
      return headers;
  }
  headers.Add("Access-Control-Allow-Origin", any ? "*" : std::string(origin));
  headers.Add("Access-Control-Expose-Headers",
              "X-Request-Id, X-Dsla-Tier, X-Dsla-Level, Retry-After, retry-after-ms, "
              "x-should-retry");
  return headers;
}

Dispatched Dispatcher::Dispatch(const HttpRequest& head, bool has_body, bool beyond_limit) const {
  Dispatched dispatched;
  Phase phase;
  {
    const std::lock_guard lock(mutex_);
    dispatched.router = router_;
    phase = phase_;
  }
  dispatched.extra = CorsHeaders(head);
  Router::Match match = dispatched.router->Find(head.method, head.path);
  dispatched.route = match.route;
  dispatched.params = std::move(match.params);
  const std::string_view host = head.headers.Get("Host");
  if (!ServesHost(host)) {
    dispatched.refusal = ErrorResponse(ForeignHostError(host));
  } else if (beyond_limit && !ServedToEverybody(match.route)) {
    dispatched.refusal = ErrorResponse(TooManyConnectionsError());
  } else {
    dispatched.refusal = Refusal(head, has_body, match, phase, dispatched);
  }
  return dispatched;
}

std::optional<HttpResponse> Dispatcher::Refusal(const HttpRequest& head, bool has_body,
                                                const Router::Match& match, Phase phase,
                                                Dispatched& dispatched) const {
  const auto refuse = [](const HttpError& error) { return ErrorResponse(error); };
  if (head.method == "OPTIONS" && (!match.allow.empty() || head.path == "*")) {
    HttpResponse response;
    response.status = 204;
    response.headers.Add("Allow", match.allow.empty() ? "GET, HEAD, POST, OPTIONS" : match.allow);
    if (dispatched.extra.Find("Access-Control-Allow-Origin")) {
      response.headers.Add("Access-Control-Allow-Methods", match.allow);
      // Clients send headers of their own, such as x-stainless-os: whatever an allowed page asks
      // for.
      const std::string_view asked = head.headers.Get("Access-Control-Request-Headers");
      response.headers.Add("Access-Control-Allow-Headers",
                           IsNameList(asked) ? std::string(asked) : std::string(kUsualHeaders));
      response.headers.Add("Vary", "Access-Control-Request-Headers");
      response.headers.Add("Access-Control-Max-Age", "600");
    }
    return response;
  }
  if (!match.route) {
    if (phase == Phase::kLoading) return refuse(LoadingError());
    if (match.allow.empty()) {
      const std::string near = NearPath(*dispatched.router, head.method, head.path);
      return refuse(UnknownPathError(head.method, head.path, near));
    }
    HttpResponse response = refuse(MethodNotAllowedError(head.method, head.path));
    response.headers.Add("Allow", match.allow);
    return response;
  }
  const RouteOptions& options = match.route->options;
  const KeyRing::Grant grant = keys_.Check(head.headers.Get("Authorization"));
  dispatched.admin = grant == KeyRing::Grant::kAdmin;
  const bool user = grant == KeyRing::Grant::kUser || dispatched.admin;
  if (options.access == Access::kKey && keys_.needs_key() && !user)
    return refuse(grant == KeyRing::Grant::kNone ? MissingKeyError() : InvalidKeyError());
  if (options.access == Access::kAdmin && !dispatched.admin) {
    if (!keys_.has_admin() || user) return refuse(AdminKeyError());
    return refuse(grant == KeyRing::Grant::kNone ? MissingKeyError() : InvalidKeyError());
  }
  if (phase == Phase::kDraining && !options.while_draining) return refuse(ShuttingDownError());
  if (has_body) {
    const std::string_view encoding = head.headers.Get("Content-Encoding");
    if (!encoding.empty() && !EqualsIgnoreCase(encoding, "identity"))
      return refuse(UnsupportedMediaTypeError());
  }
  if (options.json_body && TakesBody(head.method) && !IsJson(head.headers.Get("Content-Type")))
    return refuse(UnsupportedMediaTypeError());
  return std::nullopt;
}

}  // namespace dsla
