// Errors as OpenAI's API gives them: {"error":{"message","type","param","code"}}. The texts are
// fixed here, so that every route says the same; a message never holds more of the request than a
// name or a number.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/http/http.h"

namespace dsla {

struct HttpError {
  int status = 500;
  std::string type;                // "invalid_request_error", "server_error", ...
  std::string code;                // "invalid_json"; empty: null
  std::string message;             // one line
  std::string param;               // the field of the request that is wrong; empty: null
  double retry_after_seconds = 0;  // > 0: Retry-After and retry-after-ms are sent
  bool retry = true;               // false on a 5xx: x-should-retry: false
  // Integers beside the four, such as n_prompt_tokens and n_ctx.
  std::vector<std::pair<std::string, int64_t>> numbers;
};

// The body; also the data of an event that ends a stream.
std::string ErrorJson(const HttpError& error);
HttpResponse ErrorResponse(const HttpError& error);

// 400, type invalid_request_error.
HttpError InvalidRequestError(std::string message, std::string param = "",
                              std::string code = "invalid_value");
HttpError InvalidJsonError(std::string detail);          // "the body is not valid JSON: ..."
HttpError UnsupportedParameterError(std::string param);  // "'tools' is not supported"
HttpError ContextLengthError(std::string message, int64_t prompt_tokens, int64_t context);
HttpError TooLargeForCacheError(std::string message);
// 401
HttpError MissingKeyError();
HttpError InvalidKeyError();
// 403
HttpError AdminKeyError();
HttpError ForeignHostError(std::string_view host);
// 404, 405
// `near`: a path that there is; empty: none that may be meant.
HttpError UnknownPathError(std::string_view method, std::string_view path, std::string_view near);
HttpError ModelNotFoundError(std::string_view model, const std::vector<std::string>& served);
HttpError MethodNotAllowedError(std::string_view method, std::string_view path);
// 400 to 431 of the transport
HttpError MalformedRequestError();
HttpError RequestTimeoutError();
HttpError BodyTooLargeError(int64_t limit);
HttpError UriTooLongError(int64_t limit);
HttpError HeadersTooLargeError(int64_t limit);
HttpError UnsupportedMediaTypeError();
HttpError ExpectationError();
// 429
HttpError QueueFullError(std::string message, double retry_after_seconds);
// 500 to 504
HttpError InternalError();
HttpError NumericalError();
HttpError LoadingError();
HttpError ShuttingDownError();
HttpError TooManyConnectionsError();
HttpError TooManyBodyBytesError();
HttpError OutOfMemoryError();
HttpError DeadlineError();

}  // namespace dsla
