#include "grammar/processes.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>

#include "base/clock.h"
#include "base/shared_library.h"

extern char** environ;

namespace dsla {
namespace {

using grammar_channel::Answer;
using grammar_channel::kOrders;
using grammar_channel::kVocabulary;
using grammar_channel::Order;

constexpr char kProgram[] = "dsla_grammars";

Status NoProcess(const char* what) {
  return Error(StatusCode::kUnavailable, "grammars: {}: {}", what, std::strerror(errno));
}

Status NewSocketPair(Descriptor& here, Descriptor& there) {
  int sockets[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0)
    return NoProcess("no sockets");
  here = Descriptor(sockets[0]);
  there = Descriptor(sockets[1]);
  return Status::Ok();
}

bool WriteAll(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(file, bytes.data(), bytes.size());
    if (written <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return true;
}

// With the two descriptors where it looks for them, and no others.
Expected<pid_t> Spawn(const std::string& path, int orders, int vocabulary) {
  // Above those that they become, so that neither overwrites the other.
  const Descriptor from_orders(::fcntl(orders, F_DUPFD_CLOEXEC, kVocabulary + 1));
  const Descriptor from_vocabulary(::fcntl(vocabulary, F_DUPFD_CLOEXEC, kVocabulary + 1));
  if (!from_orders.open() || !from_vocabulary.open()) return NoProcess("no descriptors");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, from_orders.get(), kOrders);
  posix_spawn_file_actions_adddup2(&actions, from_vocabulary.get(), kVocabulary);
  posix_spawn_file_actions_addclosefrom_np(&actions, kVocabulary + 1);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none;  // blocked: the program takes its own from a queue
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  std::string name = kProgram;
  char* const argv[] = {name.data(), nullptr};
  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, path.c_str(), &actions, &attributes, argv, environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error == 0) return pid;
  return Error(StatusCode::kUnavailable,
               "'{}', which belongs beside the program, cannot be started: {}", kProgram,
               std::strerror(error));
}

timespec TimeOf(double seconds) {
  const double whole = std::floor(seconds);
  return {.tv_sec = static_cast<time_t>(whole),
          .tv_nsec = static_cast<long>((seconds - whole) * 1e9)};
}

// False: nothing has come.
bool AwaitInput(int socket, double seconds) {
  pollfd waited{.fd = socket, .events = POLLIN, .revents = 0};
  const timespec time = TimeOf(std::max(seconds, 0.0));
  return ::ppoll(&waited, 1, &time, nullptr) > 0;
}

}  // namespace

Descriptor::~Descriptor() {
  if (open()) ::close(descriptor_);
}

GrammarProcess::~GrammarProcess() {
  ::munmap(shared_, static_cast<size_t>(grammar_channel::SharedBytes(V_)));
}

std::span<const uint32_t> GrammarProcess::Mask(int matcher) const {
  const auto* const masks = reinterpret_cast<const uint32_t*>(&matchers() + 1);
  const int64_t words = grammar_channel::MaskWords(V_);
  return {masks + matcher * words, static_cast<size_t>(words)};
}

void GrammarProcess::Wake() const {
  ::send(socket_.get(), "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);  // full: it has calls to come
}

bool GrammarProcess::AwaitCall(double seconds) const {
  if (!AwaitInput(socket_.get(), seconds)) return true;
  char calls[64];
  ssize_t size;
  do {
    size = ::recv(socket_.get(), calls, sizeof(calls), MSG_DONTWAIT);
  } while (size > 0);
  return size < 0 && (errno == EAGAIN || errno == EINTR);
}

Expected<int64_t> GrammarProcess::AwaitAnswer(double seconds) const {
  const double end = NowSeconds() + seconds;
  while (!AwaitInput(socket_.get(), end - NowSeconds())) {
    if (NowSeconds() >= end) return Status(StatusCode::kDeadlineExceeded, "no answer");
  }
  char message[sizeof(Answer) + grammar_channel::kMaxReason];
  const ssize_t size = ::recv(socket_.get(), message, sizeof(message), 0);
  if (size < static_cast<ssize_t>(sizeof(Answer)))
    return Status(StatusCode::kUnavailable, "it has ended");
  Answer answer;
  std::memcpy(&answer, message, sizeof(answer));
  const auto code = static_cast<StatusCode>(answer.code);
  if (code == StatusCode::kOk) return answer.bytes;
  return Status(code, std::string(message + sizeof(answer), message + size));
}

GrammarProcesses::~GrammarProcesses() { EndFirst(); }

void GrammarProcesses::EndFirst() {
  orders_ = Descriptor();  // it ends when that is closed
  if (first_ < 0) return;
  int how = 0;
  while (::waitpid(first_, &how, 0) < 0 && errno == EINTR) {
  }
  first_ = -1;
}

Status GrammarProcesses::StartFirst() {
  const std::string program = BesideProgram(kProgram);
  if (program == kProgram) {
    return Error(StatusCode::kUnavailable, "'{}', which belongs beside the program, is not there",
                 kProgram);
  }
  Descriptor there;
  DSLA_RETURN_IF_ERROR(NewSocketPair(orders_, there));
  const Descriptor vocabulary(::memfd_create("vocabulary", MFD_CLOEXEC));
  if (!vocabulary.open() || !WriteAll(vocabulary.get(), vocabulary_))
    return NoProcess("no memory for the vocabulary");
  DSLA_ASSIGN_OR_RETURN(first_, Spawn(program, there.get(), vocabulary.get()));
  return Status::Ok();
}

bool GrammarProcesses::Send(const Order& order, std::string_view text, int socket, int memory) {
  iovec parts[] = {{const_cast<Order*>(&order), sizeof(order)},
                   {const_cast<char*>(text.data()), text.size()}};
  const int descriptors[] = {socket, memory};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(descriptors))] = {};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(descriptors));
  std::memcpy(CMSG_DATA(header), descriptors, sizeof(descriptors));
  return ::sendmsg(orders_.get(), &message, MSG_NOSIGNAL) > 0;
}

Expected<std::unique_ptr<GrammarProcess>> GrammarProcesses::Start(const GrammarSpec& spec,
                                                                  const GrammarOptions& options) {
  Descriptor here, there;
  DSLA_RETURN_IF_ERROR(NewSocketPair(here, there));
  const auto bytes = static_cast<size_t>(grammar_channel::SharedBytes(V_));
  const Descriptor memory(::memfd_create("matchers", MFD_CLOEXEC));
  if (!memory.open() || ::ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0)
    return NoProcess("no memory for matchers");
  void* const shared = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (shared == MAP_FAILED) return NoProcess("no memory for matchers");
  auto process = std::make_unique<GrammarProcess>(std::move(here), shared, V_);
  const Order order{.kind = static_cast<int32_t>(spec.kind),
                    .control_tokens = spec.control_tokens,
                    .compile_seconds = options.compile_seconds,
                    .match_seconds = options.match_seconds,
                    .process_bytes = options.process_bytes};
  const std::lock_guard lock(mutex_);
  if (first_ >= 0 && Send(order, spec.text, there.get(), memory.get())) return process;
  EndFirst();  // it may have been killed
  DSLA_RETURN_IF_ERROR(StartFirst());
  if (Send(order, spec.text, there.get(), memory.get())) return process;
  return NoProcess("no process takes them");
}

}  // namespace dsla
