// Errors with outside causes (files, requests, memory budgets) travel as Status or Expected<T>; our
// own bugs are DSLA_CHECK (base/check.h). A message is one line, names the input and gives the
// numbers.
#pragma once

#include <fmt/format.h>

#include <string>
#include <utility>
#include <variant>

#include "base/check.h"

namespace dsla {

enum class StatusCode {
  kOk,
  kInvalidArgument,    // the caller's value is wrong: option, prompt, level
  kNotFound,           // no such file, tensor or name
  kDataLoss,           // a file is malformed or lies about its contents
  kUnsupported,        // well-formed, but not something this build can do
  kResourceExhausted,  // a budget or the memory is used up
  kUnavailable,        // not now: loading, draining; the same may work later
  kDeadlineExceeded,   // its time was up
  kCancelled,
  kInternal,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status Ok() { return {}; }
  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

template <typename... Args>
Status Error(StatusCode code, fmt::format_string<Args...> format, Args&&... args) {
  return Status(code, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
Status InvalidArgument(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kInvalidArgument, format, std::forward<Args>(args)...);
}
template <typename... Args>
Status NotFound(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kNotFound, format, std::forward<Args>(args)...);
}
template <typename... Args>
Status DataLoss(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kDataLoss, format, std::forward<Args>(args)...);
}
template <typename... Args>
Status Unsupported(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kUnsupported, format, std::forward<Args>(args)...);
}
template <typename... Args>
Status ResourceExhausted(fmt::format_string<Args...> format, Args&&... args) {
  return Error(StatusCode::kResourceExhausted, format, std::forward<Args>(args)...);
}

// A value or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Expected {
 public:
  Expected(T value)
      : value_(std::move(value)) {}  // NOLINT: implicit, so that `return value;` works
  Expected(Status status) : value_(std::move(status)) {  // NOLINT: likewise for errors
    DSLA_CHECK(!std::get<Status>(value_).ok());
  }

  bool ok() const { return std::holds_alternative<T>(value_); }
  Status status() const { return ok() ? Status::Ok() : std::get<Status>(value_); }

  T& value() & {
    DSLA_CHECK(ok());
    return std::get<T>(value_);
  }
  const T& value() const& {
    DSLA_CHECK(ok());
    return std::get<T>(value_);
  }
  T&& value() && {
    DSLA_CHECK(ok());
    return std::get<T>(std::move(value_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<T, Status> value_;
};

#define DSLA_RETURN_IF_ERROR(expr)                                                     \
  do {                                                                                 \
    if (::dsla::Status dsla_status_ = (expr); !dsla_status_.ok()) return dsla_status_; \
  } while (0)

#define DSLA_CONCAT_INNER(a, b) a##b
#define DSLA_CONCAT(a, b) DSLA_CONCAT_INNER(a, b)
// DSLA_ASSIGN_OR_RETURN(auto x, F()): x = F()'s value, or return F()'s Status.
#define DSLA_ASSIGN_OR_RETURN(lhs, expr) \
  DSLA_ASSIGN_OR_RETURN_IMPL(DSLA_CONCAT(dsla_expected_, __LINE__), lhs, expr)
#define DSLA_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                               \
  if (!tmp.ok()) return tmp.status();              \
  lhs = std::move(tmp).value()

}  // namespace dsla
