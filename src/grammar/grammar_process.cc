// The program of the processes that grammars run in. The first loads XGrammar and the vocabulary
// once and, for each order, becomes two: the new one compiles the grammar and then answers for its
// matchers, until it has used up the time that one answer may take, or nobody wants more of it.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "grammar/channel.h"
#include "grammar/schema_check.h"
#include "grammar/xgrammar.h"

namespace dsla {
namespace {

using grammar_channel::Answer;
using grammar_channel::kOrders;
using grammar_channel::kVocabulary;
using grammar_channel::MaskWords;
using grammar_channel::Matchers;
using grammar_channel::MatcherState;
using grammar_channel::Order;

constexpr bool kSanitized =
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    true;
#else
    false;
#endif

// The process ends, by SIGPROF, when it has computed so long from now on; 0: no longer.
void EndAfter(double seconds) {
  itimerval timer{};
  const double whole = std::floor(seconds);
  timer.it_value.tv_sec = static_cast<time_t>(whole);
  timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - whole) * 1e6);
  ::setitimer(ITIMER_PROF, &timer, nullptr);
}

void LimitMemory(int64_t bytes) {
  const rlimit no_core{0, 0};
  ::setrlimit(RLIMIT_CORE, &no_core);
  if (kSanitized) return;  // which reserve terabytes of addresses
  const rlimit memory{static_cast<rlim_t>(bytes), static_cast<rlim_t>(bytes)};
  ::setrlimit(RLIMIT_AS, &memory);
}

// What is written to standard error while it lives: XGrammar says there what it leaves out.
class ErrorOutput {
 public:
  ErrorOutput() : file_(::memfd_create("log", MFD_CLOEXEC)) { ::dup2(file_, STDERR_FILENO); }
  ~ErrorOutput() {
    const int null = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
    ::dup2(null, STDERR_FILENO);
    ::close(null);
    ::close(file_);
  }
  std::string Text() const {
    std::string text(4096, '\0');
    const ssize_t size = ::pread(file_, text.data(), text.size(), 0);
    text.resize(static_cast<size_t>(std::max<ssize_t>(size, 0)));
    return text;
  }

 private:
  const int file_;
};

// A warning is of something that was asked for and will not be had.
Status WarningIn(std::string_view log) {
  constexpr std::string_view kMark = "Warning: ";
  const size_t mark = log.find(kMark);
  if (mark == log.npos) return Status::Ok();
  log.remove_prefix(mark + kMark.size());
  std::string line(log.substr(0, std::min(log.find('\n'), size_t{200})));
  for (char& c : line) c = c >= 0x20 && c < 0x7f ? c : ' ';
  return InvalidArgument("{}", line);
}

Expected<FfiValue> Compile(XGrammar& xgrammar, const GrammarSpec& spec) {
  if (spec.kind == GrammarSpec::Kind::kJsonSchema) DSLA_RETURN_IF_ERROR(CheckSchema(spec.text));
  if (spec.kind == GrammarSpec::Kind::kStructuralTag)
    DSLA_RETURN_IF_ERROR(CheckStructuralTag(spec.text));
  const ErrorOutput output;
  DSLA_ASSIGN_OR_RETURN(FfiValue compiled, xgrammar.Compile(spec));
  DSLA_RETURN_IF_ERROR(WarningIn(output.Text()));
  return compiled;
}

void Send(int socket, const Status& status, int64_t bytes) {
  const Answer answer{.code = static_cast<int32_t>(status.code()), .bytes = bytes};
  std::string message(reinterpret_cast<const char*>(&answer), sizeof(answer));
  message += status.message().substr(0, grammar_channel::kMaxReason);
  ::send(socket, message.data(), message.size(), MSG_NOSIGNAL);
}

struct Vocabulary {
  std::vector<std::string_view> tokens;  // bytes
  std::vector<int32_t> control;          // control tokens that a grammar may have

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

// What XGrammar is told: the tokens; a twin of each control token, of the same bytes, which no
// grammar names; a reply's end.
std::vector<std::string_view> WithTwins(const Vocabulary& vocabulary) {
  std::vector<std::string_view> all = vocabulary.tokens;
  for (const int32_t id : vocabulary.control) all.push_back(all[static_cast<size_t>(id)]);
  all.emplace_back();
  return all;
}

// One grammar and its matchers.
class GrammarServer {
 public:
  GrammarServer(XGrammar& xgrammar, FfiValue compiled, const Vocabulary& vocabulary,
                const Order& order, int socket, void* shared)
      : xgrammar_(xgrammar),
        compiled_(std::move(compiled)),
        vocabulary_(vocabulary),
        end_(vocabulary.tokens.size() + vocabulary.control.size()),
        order_(order),
        socket_(socket),
        shared_(static_cast<Matchers*>(shared)),
        masks_(reinterpret_cast<uint32_t*>(shared_ + 1)),
        filled_(end_ / 32 + 1) {}

  // Until the other end of the socket is closed.
  void Run() {
    char wake[64];
    while (::recv(socket_, wake, sizeof(wake), 0) > 0) {
      const auto used = static_cast<size_t>(shared_->used.load(std::memory_order_acquire));
      matchers_.resize(std::max(matchers_.size(), used));
      for (size_t i = 0; i < used; ++i) AnswerFor(i);
    }
  }

 private:
  void AnswerFor(size_t i) {
    MatcherState& state = shared_->states[i];
    const uint32_t asked = state.asked.load(std::memory_order_acquire);
    if (state.done.load(std::memory_order_relaxed) == asked) return;
    EndAfter(order_.match_seconds);
    state.flags = Advance(matchers_[i], state.token, Mask(i));
    EndAfter(0);
    state.done.store(asked, std::memory_order_release);
    ::send(socket_, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);  // full: it will be looked at all the same
  }

  uint32_t Advance(FfiValue& matcher, int32_t token, std::span<uint32_t> mask) {
    if (token == grammar_channel::kBegin) {
      auto begun = xgrammar_.NewMatcher(compiled_);
      if (!begun.ok()) return grammar_channel::kRefused;
      matcher = std::move(begun).value();
    } else if (const auto accepted = xgrammar_.Accept(matcher, token);
               !accepted.ok() || !*accepted) {
      return grammar_channel::kRefused;
    }
    if (!xgrammar_.FillMask(matcher, filled_).ok()) return grammar_channel::kRefused;
    LeaveOutControlTokens();
    std::ranges::copy_n(filled_.begin(), static_cast<ptrdiff_t>(mask.size()), mask.begin());
    if (const size_t over = vocabulary_.tokens.size() % 32; over != 0)
      mask.back() &= (uint32_t{1} << over) - 1;
    const bool goes_on = std::ranges::any_of(mask, [](uint32_t word) { return word != 0; });
    if (!Filled(end_)) return 0;
    return goes_on ? grammar_channel::kMayEnd
                   : grammar_channel::kMayEnd | grammar_channel::kComplete;
  }

  // But for those that the grammar names: where the twin may stand, too, only the bytes may.
  void LeaveOutControlTokens() {
    for (size_t i = 0; i < vocabulary_.control.size(); ++i) {
      if (order_.control_tokens && !Filled(vocabulary_.tokens.size() + i)) continue;
      const auto id = static_cast<size_t>(vocabulary_.control[i]);
      filled_[id / 32] &= ~(uint32_t{1} << id % 32);
    }
  }
  bool Filled(size_t bit) const { return (filled_[bit / 32] >> bit % 32 & 1) != 0; }

  std::span<uint32_t> Mask(size_t i) const {
    const auto words = static_cast<size_t>(MaskWords(vocabulary_.size()));
    return {masks_ + i * words, words};
  }

  XGrammar& xgrammar_;
  const FfiValue compiled_;
  const Vocabulary& vocabulary_;
  const size_t end_;  // the bit that says whether the reply may end
  const Order order_;
  const int socket_;
  Matchers* const shared_;
  uint32_t* const masks_;
  std::vector<uint32_t> filled_;  // by XGrammar: a mask of what it is told
  std::vector<FfiValue> matchers_;
};

// In a process of its own.
void Serve(XGrammar& xgrammar, const Vocabulary& vocabulary, const Order& order, GrammarSpec spec,
           int socket, int memory) {
  const auto size = static_cast<size_t>(grammar_channel::SharedBytes(vocabulary.size()));
  void* const shared = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (shared == MAP_FAILED)
    return Send(socket, Error(StatusCode::kResourceExhausted, "no memory for masks"), 0);
  LimitMemory(order.process_bytes);
  EndAfter(order.compile_seconds);
  auto compiled = Compile(xgrammar, spec);
  auto bytes = compiled.ok() ? xgrammar.Bytes(*compiled) : Expected<int64_t>(compiled.status());
  EndAfter(0);
  if (!bytes.ok()) return Send(socket, bytes.status(), 0);
  Send(socket, Status::Ok(), *bytes);
  GrammarServer(xgrammar, std::move(compiled).value(), vocabulary, order, socket, shared).Run();
}

struct Arrived {
  Order order;
  GrammarSpec spec;
  int socket = -1;
  int memory = -1;
};

// False when there will be no more orders.
bool Receive(Arrived& arrived) {
  std::string text(grammar_channel::kMaxText, '\0');
  iovec parts[] = {{&arrived.order, sizeof(Order)}, {text.data(), text.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t size = ::recvmsg(kOrders, &message, MSG_CMSG_CLOEXEC);
  const cmsghdr* const header = CMSG_FIRSTHDR(&message);
  if (size < static_cast<ssize_t>(sizeof(Order)) || header == nullptr) return false;
  int descriptors[2];
  std::memcpy(descriptors, CMSG_DATA(header), sizeof(descriptors));
  arrived.socket = descriptors[0];
  arrived.memory = descriptors[1];
  text.resize(static_cast<size_t>(size) - sizeof(Order));
  arrived.spec = {static_cast<GrammarSpec::Kind>(arrived.order.kind), std::move(text)};
  return true;
}

Vocabulary ReadVocabulary(std::span<const std::byte> file) {
  const auto read = [&](auto& value) {
    DSLA_CHECK(file.size() >= sizeof(value));
    std::memcpy(&value, file.data(), sizeof(value));
    file = file.subspan(sizeof(value));
  };
  int64_t V = 0;
  read(V);
  Vocabulary vocabulary;
  for (int64_t i = 0; i < V; ++i) {
    uint32_t size = 0;
    read(size);
    DSLA_CHECK(file.size() >= size);
    vocabulary.tokens.emplace_back(reinterpret_cast<const char*>(file.data()), size);
    file = file.subspan(size);
  }
  while (!file.empty()) read(vocabulary.control.emplace_back());
  return vocabulary;
}

int Main() {
  ::prctl(PR_SET_NAME, "dsla_grammars");
  std::signal(SIGCHLD, SIG_IGN);  // nobody asks how they ended
  std::signal(SIGINT, SIG_IGN);   // of the terminal: the program ends them
  auto loaded = XGrammar::Load(DSLA_SITE_PACKAGES);
  std::signal(SIGSEGV, SIG_DFL);  // TVM FFI would print where it came
  auto file = MappedFile::Open("/proc/self/fd/" + std::to_string(kVocabulary));
  DSLA_CHECK(file.ok());
  const Vocabulary vocabulary = ReadVocabulary(file->bytes());
  Status status = loaded.ok() ? (*loaded)->SetVocabulary(WithTwins(vocabulary)) : loaded.status();
  for (Arrived arrived; Receive(arrived);) {
    if (!status.ok()) {
      Send(arrived.socket, status, 0);
    } else if (const pid_t child = ::fork(); child == 0) {
      ::close(kOrders);
      Serve(**loaded, vocabulary, arrived.order, std::move(arrived.spec), arrived.socket,
            arrived.memory);
      ::_exit(0);
    } else if (child < 0) {
      Send(arrived.socket, Error(StatusCode::kResourceExhausted, "no process for a grammar"), 0);
    }
    ::close(arrived.socket);
    ::close(arrived.memory);
  }
  return 0;
}

}  // namespace
}  // namespace dsla

int main() { ::_exit(dsla::Main()); }
