// The processes of grammars, as the program sees them: the first, which makes the others, and the
// memory and the socket that it shares with each. Internal to this folder.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "grammar/channel.h"
#include "grammar/grammar.h"

namespace dsla {

// A descriptor that is closed at the end.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
  Descriptor(Descriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Descriptor();
  int get() const { return descriptor_; }
  bool open() const { return descriptor_ >= 0; }

 private:
  int descriptor_ = -1;
};

// What the program has of one grammar's process, which ends when this does.
class GrammarProcess {
 public:
  GrammarProcess(Descriptor socket, void* shared, int64_t V)
      : socket_(std::move(socket)), shared_(shared), V_(V) {}
  ~GrammarProcess();

  grammar_channel::Matchers& matchers() const {
    return *static_cast<grammar_channel::Matchers*>(shared_);
  }
  std::span<const uint32_t> Mask(int matcher) const;
  void Wake() const;  // to look at its matchers
  // Waits for a wake-up call from it, up to so many seconds; false: it has ended.
  bool AwaitCall(double seconds) const;
  // The message that says how compiling went. kDeadlineExceeded: there is none after so long;
  // kUnavailable: it has ended without one.
  Expected<int64_t> AwaitAnswer(double seconds) const;

 private:
  const Descriptor socket_;
  void* const shared_;
  const int64_t V_;
};

// Thread-safe.
class GrammarProcesses {
 public:
  // vocabulary: as kVocabulary's file; of V tokens.
  GrammarProcesses(std::string vocabulary, int64_t V) : vocabulary_(std::move(vocabulary)), V_(V) {}
  ~GrammarProcesses();

  // A process that compiles the grammar. kUnavailable: there is no program for it, or no process or
  // memory.
  Expected<std::unique_ptr<GrammarProcess>> Start(const GrammarSpec& spec,
                                                  const GrammarOptions& options);

 private:
  Status StartFirst();
  void EndFirst();
  bool Send(const grammar_channel::Order& order, std::string_view text, int socket, int memory);

  const std::string vocabulary_;
  const int64_t V_;
  std::mutex mutex_;  // of what follows
  Descriptor orders_;
  pid_t first_ = -1;
};

}  // namespace dsla
