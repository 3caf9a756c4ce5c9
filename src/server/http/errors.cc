#include "server/http/errors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace dsla {
namespace {

constexpr const char* kInvalidRequest = "invalid_request_error";
constexpr const char* kServerError = "server_error";

HttpError Make(int status, const char* type, const char* code, std::string message) {
  HttpError error;
  error.status = status;
  error.type = type;
  error.code = code;
  error.message = std::move(message);
  return error;
}

HttpError Permanent(HttpError error) {
  error.retry = false;
  return error;
}

HttpError After(HttpError error, double seconds) {
  error.retry_after_seconds = seconds;
  return error;
}

// A path or a model's name as it may stand in a message.
std::string Shown(std::string_view text) {
  std::string shown;
  for (const char c : text.substr(0, 200)) {
    const auto byte = static_cast<unsigned char>(c);
    shown += byte < 0x20 || byte == 0x7f ? '?' : c;
  }
  if (text.size() > 200) shown += "...";
  return shown;
}

}  // namespace

std::string ErrorJson(const HttpError& error) {
  const auto or_null = [](const std::string& text) {
    return text.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(text);
  };
  nlohmann::ordered_json inner = {{"message", error.message},
                                  {"type", error.type},
                                  {"param", or_null(error.param)},
                                  {"code", or_null(error.code)}};
  for (const auto& [name, value] : error.numbers) inner[name] = value;
  const nlohmann::ordered_json body = {{"error", std::move(inner)}};
  return body.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

HttpResponse ErrorResponse(const HttpError& error) {
  HttpResponse response = JsonResponse(error.status, ErrorJson(error));
  if (error.status == 401) response.headers.Add("WWW-Authenticate", "Bearer");
  if (error.retry_after_seconds > 0) {
    // Clients obey up to two minutes and give up above.
    const double seconds = std::clamp(error.retry_after_seconds, 0.001, 120.0);
    response.headers.Add("Retry-After", fmt::format("{}", std::ceil(seconds)));
    response.headers.Add("retry-after-ms", fmt::format("{}", std::ceil(1000 * seconds)));
  }
  if (error.status >= 500 && !error.retry) response.headers.Add("x-should-retry", "false");
  return response;
}

HttpError InvalidRequestError(std::string message, std::string param, std::string code) {
  HttpError error = Make(400, kInvalidRequest, code.c_str(), std::move(message));
  error.param = std::move(param);
  return error;
}

HttpError InvalidJsonError(std::string detail) {
  return InvalidRequestError("the body is not valid JSON: " + detail, "", "invalid_json");
}

HttpError UnsupportedParameterError(std::string param) {
  std::string message = fmt::format("'{}' is not supported by this server", param);
  return InvalidRequestError(std::move(message), std::move(param), "unsupported_parameter");
}

HttpError ContextLengthError(std::string message, int64_t prompt_tokens, int64_t context) {
  HttpError error = InvalidRequestError(std::move(message), "", "context_length_exceeded");
  error.numbers = {{"n_prompt_tokens", prompt_tokens}, {"n_ctx", context}};
  return error;
}

HttpError TooLargeForCacheError(std::string message) {
  return InvalidRequestError(std::move(message), "", "request_too_large_for_cache");
}

HttpError MissingKeyError() {
  return Make(401, "authentication_error", "invalid_api_key",
              "no API key was given: send it as 'Authorization: Bearer KEY'");
}

HttpError InvalidKeyError() {
  return Make(401, "authentication_error", "invalid_api_key", "the API key is not valid");
}

HttpError AdminKeyError() {
  return Make(403, "permission_error", "admin_key_required",
              "this needs the server's admin key (see dsla serve --admin-key-file)");
}

HttpError ForeignHostError(std::string_view host) {
  return Make(
      403, "permission_error", "host_not_allowed",
      fmt::format("the request is for the host '{}', but without API keys this server, which "
                  "only its own machine reaches, serves localhost, IP addresses and its "
                  "--host alone (see dsla serve --api-key-file)",
                  Shown(host)));
}

HttpError UnknownPathError(std::string_view method, std::string_view path, std::string_view near) {
  return Make(404, "not_found_error", "unknown_path",
              fmt::format("there is no {} {}{}", Shown(method), Shown(path),
                          near.empty() ? "" : fmt::format("; there is {}", near)));
}

HttpError ModelNotFoundError(std::string_view model, const std::vector<std::string>& served) {
  HttpError error = Make(404, "not_found_error", "model_not_found",
                         fmt::format("the model '{}' is not served here; there is '{}'",
                                     Shown(model), fmt::join(served, "', '")));
  error.param = "model";
  return error;
}

HttpError MethodNotAllowedError(std::string_view method, std::string_view path) {
  return Make(405, kInvalidRequest, "method_not_allowed",
              fmt::format("{} does not take {}", Shown(path), Shown(method)));
}

HttpError MalformedRequestError() {
  return Make(400, kInvalidRequest, "malformed_request", "the request is not valid HTTP/1.1");
}

HttpError RequestTimeoutError() {
  return Make(408, kInvalidRequest, "request_timeout",
              "the request did not arrive in full in time");
}

HttpError BodyTooLargeError(int64_t limit) {
  return Make(413, kInvalidRequest, "request_too_large",
              fmt::format("the body is larger than {} bytes", limit));
}

HttpError UriTooLongError(int64_t limit) {
  return Make(414, kInvalidRequest, "uri_too_long",
              fmt::format("the URI is longer than {} bytes", limit));
}

HttpError HeadersTooLargeError(int64_t limit) {
  return Make(431, kInvalidRequest, "headers_too_large",
              fmt::format("the request's head is larger than {} bytes", limit));
}

HttpError UnsupportedMediaTypeError() {
  return Make(415, kInvalidRequest, "unsupported_media_type",
              "the body must come as Content-Type: application/json, without Content-Encoding");
}

HttpError ExpectationError() {
  return Make(417, kInvalidRequest, "expectation_failed",
              "the only expectation that is met is 100-continue");
}

HttpError QueueFullError(std::string message, double retry_after_seconds) {
  return After(Make(429, "rate_limit_error", "queue_full", std::move(message)),
               std::max(retry_after_seconds, 0.001));
}

HttpError InternalError() {
  return Permanent(Make(500, kServerError, "internal_error",
                        "the server failed on this request; its log says why"));
}

HttpError NumericalError() {
  return Permanent(Make(500, kServerError, "numerical_error",
                        "the model produced values that are not numbers for this request"));
}

HttpError LoadingError() {
  return After(Make(503, kServerError, "loading", "the model is being loaded"), 2);
}

HttpError ShuttingDownError() {
  return After(Make(503, kServerError, "shutting_down", "the server is shutting down"), 5);
}

HttpError TooManyConnectionsError() {
  return After(Make(503, kServerError, "too_many_connections",
                    "the server has as many connections as it allows"),
               1);
}

HttpError TooManyBodyBytesError() {
  return After(
      Make(503, kServerError, "too_many_request_bytes",
           "the bodies of other requests take all the memory that the server has for them"),
      1);
}

HttpError OutOfMemoryError() {
  return After(
      Make(503, kServerError, "out_of_memory", "the server has no memory for this request"), 1);
}

HttpError DeadlineError() {
  return Make(504, kServerError, "timeout", "the request's deadline passed before it was finished");
}

}  // namespace dsla
