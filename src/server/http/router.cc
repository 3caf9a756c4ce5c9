#include "server/http/router.h"

#include <algorithm>
#include <optional>

#include "base/check.h"

namespace dsla {
namespace {

using Params = std::vector<std::pair<std::string, std::string>>;

bool IsParam(std::string_view segment) {
  return segment.size() > 2 && segment.front() == '{' && segment.back() == '}';
}

std::vector<std::string> Split(std::string_view path) {
  std::vector<std::string> segments;
  size_t begin = path.starts_with('/') ? 1 : 0;
  while (begin < path.size()) {
    const size_t slash = std::min(path.find('/', begin), path.size());
    segments.emplace_back(path.substr(begin, slash - begin));
    begin = slash + 1;
  }
  return segments;
}

std::optional<Params> MatchSegments(const std::vector<std::string>& pattern,
                                    const std::vector<std::string>& path) {
  if (path.size() < pattern.size()) return std::nullopt;
  Params params;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const bool last = i + 1 == pattern.size();
    if (!IsParam(pattern[i])) {
      if (pattern[i] != path[i]) return std::nullopt;
      if (last && path.size() != pattern.size()) return std::nullopt;
      continue;
    }
    std::string value = path[i];
    for (size_t rest = i + 1; last && rest < path.size(); ++rest) value += "/" + path[rest];
    if (value.empty()) return std::nullopt;
    params.emplace_back(pattern[i].substr(1, pattern[i].size() - 2), std::move(value));
  }
  if (pattern.empty() && !path.empty()) return std::nullopt;
  return params;
}

}  // namespace

void Router::Add(std::string method, std::string_view pattern, Handler handler,
                 RouteOptions options) {
  DSLA_CHECK(pattern.starts_with('/'));
  auto route = std::make_unique<Route>();
  route->method = std::move(method);
  route->pattern = pattern;
  route->segments = Split(pattern);
  route->handler = std::move(handler);
  route->options = options;
  routes_.push_back(std::move(route));
}

void Router::SetAccess(std::string_view method, std::string_view pattern, Access access) {
  for (const auto& route : routes_) {
    if (route->method == method && route->pattern == pattern) route->options.access = access;
  }
}

Router::Match Router::Find(std::string_view method, std::string_view path) const {
  const std::vector<std::string> segments = Split(path);
  Match match;
  std::vector<std::string> methods;
  bool exact = false;
  for (const auto& route : routes_) {
    auto params = MatchSegments(route->segments, segments);
    if (!params) continue;
    const bool fits = route->method == method || (route->method == "GET" && method == "HEAD");
    methods.push_back(route->method);
    if (route->method == "GET") methods.push_back("HEAD");
    if (!fits || exact || (match.route && !params->empty())) continue;
    exact = params->empty();
    match.route = route.get();
    match.params = std::move(*params);
  }
  if (methods.empty()) return match;
  methods.push_back("OPTIONS");
  for (size_t i = 0; i < methods.size(); ++i) {
    if (std::find(methods.begin(), methods.begin() + i, methods[i]) != methods.begin() + i)
      continue;
    match.allow += (i ? ", " : "") + methods[i];
  }
  return match;
}

}  // namespace dsla
