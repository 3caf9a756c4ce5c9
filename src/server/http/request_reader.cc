#include "server/http/request_reader.h"

#include <algorithm>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <optional>

namespace dsla {
namespace {

namespace http = boost::beast::http;

std::string_view View(boost::beast::string_view text) { return {text.data(), text.size()}; }

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// Origin form, or absolute form without its scheme and host; "*" stays. Empty: anything else.
std::string_view OriginForm(std::string_view target) {
  if (target == "*" || target.starts_with('/')) return target;
  const size_t scheme = target.find("://");
  if (scheme == std::string_view::npos ||
      target.substr(0, scheme).find('/') != std::string_view::npos)
    return {};
  const size_t path = target.find_first_of("/?", scheme + 3);
  if (path == std::string_view::npos) return "/";
  return target[path] == '/' ? target.substr(path) : std::string_view();
}

// More than this is never left over by a well-formed body: a chunk's head with its extensions.
constexpr size_t kMaxChunkHead = 4096;

// Beast asserts that it is not given less of the last chunk than its shortest form, "0\r\n\r\n".
// Any rest of a well-formed chunked body is as long, so a shorter one that looks like it is kept
// back.
constexpr std::string_view kLastChunk = "0\r\n\r\n";
bool MayBeLastChunk(std::string_view rest) {
  return rest.size() < kLastChunk.size() && rest.starts_with(kLastChunk[0]);
}

}  // namespace

bool PercentDecode(std::string_view text, std::string* decoded) {
  decoded->clear();
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '%') {
      const int high = i + 2 < text.size() ? HexValue(text[i + 1]) : -1;
      const int low = high >= 0 ? HexValue(text[i + 2]) : -1;
      if (low < 0) return false;
      c = static_cast<char>(high * 16 + low);
      i += 2;
    }
    if (c == '\0') return false;
    *decoded += c;
  }
  return true;
}

struct RequestReader::Impl {
  explicit Impl(const HttpRequestLimits& l) : limits(l) { Reset(); }

  void Reset() {
    parser.emplace();
    parser->header_limit(static_cast<std::uint32_t>(limits.head_bytes));
    parser->body_limit(static_cast<std::uint64_t>(limits.body_bytes));
    parser->eager(true);
    request = HttpRequest();
    scanned = 0;
    body_received = 0;
    started = head_done = expects_continue = has_body = false;
    http10 = keep_alive = false;
  }

  Event Fail(HttpError e) {
    error = std::move(e);
    return Event::kError;
  }

  Event FeedHead(std::string_view data, size_t* used);
  Event TakeHead();
  Event FeedBody(std::string_view data, size_t* used);

  const HttpRequestLimits limits;
  std::optional<http::request_parser<http::string_body>> parser;
  HttpRequest request;
  HttpError error;
  size_t scanned = 0;  // bytes of the head that were looked at
  int64_t body_received = 0;
  bool started = false, head_done = false, expects_continue = false, has_body = false;
  bool http10 = false, keep_alive = false;
};

// The head is looked at before Beast sees it: its end, its size, and line breaks other than CRLF.
RequestReader::Event RequestReader::Impl::FeedHead(std::string_view data, size_t* used) {
  while (!started && data.starts_with("\r\n")) {  // empty lines before a request are let pass
    data.remove_prefix(2);
    *used += 2;
  }
  if (data.empty() || (!started && data == "\r")) return Event::kNeedMore;
  started = true;
  const size_t limit = static_cast<size_t>(limits.head_bytes);
  size_t end = 0;  // of the head
  for (; scanned < data.size() && scanned < limit && end == 0; ++scanned) {
    if (data[scanned] != '\n') continue;
    if (scanned == 0 || data[scanned - 1] != '\r') return Fail(MalformedRequestError());
    if (scanned >= 3 && data[scanned - 2] == '\n') end = scanned + 1;
  }
  const std::string_view head = data.substr(0, end ? end : scanned);
  const size_t line = std::min(head.find('\r'), head.size());
  // Method and version take little beside the URI.
  if (line > static_cast<size_t>(limits.uri_bytes) + 32)
    return Fail(UriTooLongError(limits.uri_bytes));
  if (end == 0) {
    return scanned >= limit ? Fail(HeadersTooLargeError(limits.head_bytes)) : Event::kNeedMore;
  }
  // A folded header means different things to different servers.
  if (head.find("\n ") != std::string_view::npos || head.find("\n\t") != std::string_view::npos)
    return Fail(MalformedRequestError());
  boost::beast::error_code code;
  const size_t taken = parser->put(boost::asio::buffer(head.data(), head.size()), code);
  if (code == http::error::body_limit) return Fail(BodyTooLargeError(limits.body_bytes));
  if (code == http::error::header_limit) return Fail(HeadersTooLargeError(limits.head_bytes));
  if ((code && code != http::error::need_more) || !parser->is_header_done() || taken != head.size())
    return Fail(MalformedRequestError());
  *used += taken;
  return TakeHead();
}

RequestReader::Event RequestReader::Impl::TakeHead() {
  const auto& message = parser->get();
  if (message.version() != 10 && message.version() != 11) return Fail(MalformedRequestError());
  http10 = message.version() == 10;
  request.method = View(message.method_string());
  const std::string_view target = View(message.target());
  if (target.size() > static_cast<size_t>(limits.uri_bytes))
    return Fail(UriTooLongError(limits.uri_bytes));
  std::string_view origin = OriginForm(target);
  origin = origin.substr(0, origin.find('#'));
  const size_t question = origin.find('?');
  if (origin.empty() || !PercentDecode(origin.substr(0, question), &request.path))
    return Fail(MalformedRequestError());
  if (question != std::string_view::npos) request.query = origin.substr(question + 1);
  if (request.path.size() > 1 && request.path.ends_with('/')) request.path.pop_back();
  for (const auto& field : message) {
    request.headers.Add(std::string(View(field.name_string())), std::string(View(field.value())));
  }

  // What two servers in a row could read in two ways.
  const HttpHeaders& headers = request.headers;
  const size_t lengths = headers.Count("Content-Length");
  const size_t encodings = headers.Count("Transfer-Encoding");
  if (lengths + encodings > 1 || (http10 && encodings > 0)) return Fail(MalformedRequestError());
  const std::string_view length = headers.Get("Content-Length");
  if (lengths == 1 && length.find_first_not_of("0123456789") != std::string_view::npos)
    return Fail(MalformedRequestError());  // also "2, 2"
  if (encodings == 1 && !EqualsIgnoreCase(headers.Get("Transfer-Encoding"), "chunked"))
    return Fail(MalformedRequestError());
  if (headers.Count("Host") > 1 || (!http10 && headers.Count("Host") == 0))
    return Fail(MalformedRequestError());

  keep_alive = !http10 && parser->keep_alive();
  has_body = !parser->is_done();
  head_done = true;
  if (const std::string* expect = headers.Find("Expect")) {
    if (!EqualsIgnoreCase(*expect, "100-continue")) return Fail(ExpectationError());
    expects_continue = !http10;
  }
  return Event::kHead;
}

RequestReader::Event RequestReader::Impl::FeedBody(std::string_view data, size_t* used) {
  while (!parser->is_done() && !data.empty() && !(parser->chunked() && MayBeLastChunk(data))) {
    boost::beast::error_code code;
    const size_t taken = parser->put(boost::asio::buffer(data.data(), data.size()), code);
    data.remove_prefix(taken);
    *used += taken;
    body_received += static_cast<int64_t>(taken);
    if (code == http::error::body_limit) return Fail(BodyTooLargeError(limits.body_bytes));
    if (code && code != http::error::need_more) return Fail(MalformedRequestError());
    if (code == http::error::need_more || taken == 0) break;
  }
  if (parser->is_done()) {
    request.body = std::move(parser->get().body());
    return Event::kDone;
  }
  return data.size() > kMaxChunkHead ? Fail(MalformedRequestError()) : Event::kNeedMore;
}

RequestReader::RequestReader(const HttpRequestLimits& limits)
    : impl_(std::make_unique<Impl>(limits)) {}
RequestReader::~RequestReader() = default;

RequestReader::Event RequestReader::Feed(std::string_view data, size_t* used) {
  *used = 0;
  return impl_->head_done ? impl_->FeedBody(data, used) : impl_->FeedHead(data, used);
}

HttpRequest& RequestReader::request() { return impl_->request; }
const HttpError& RequestReader::error() const { return impl_->error; }
bool RequestReader::has_body() const { return impl_->has_body; }
bool RequestReader::expects_continue() const { return impl_->expects_continue; }
bool RequestReader::keep_alive() const { return impl_->keep_alive; }
bool RequestReader::http10() const { return impl_->http10; }
bool RequestReader::started() const { return impl_->started; }
bool RequestReader::head_done() const { return impl_->head_done; }
int64_t RequestReader::body_received() const { return impl_->body_received; }
void RequestReader::Reset() { impl_->Reset(); }

}  // namespace dsla
