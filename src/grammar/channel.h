// How the program and the processes of its grammars talk. Internal to this folder; README.md says
// it in full.
#pragma once

#include <atomic>
#include <cstdint>

namespace dsla::grammar_channel {

// Descriptors that the program of the processes finds open.
inline constexpr int kOrders = 3;      // the socket on which orders come, each with two descriptors
inline constexpr int kVocabulary = 4;  // a file: the number of tokens, of each its size and its
                                       // bytes, then the control tokens that a grammar may have

// What a message on kOrders begins with; the grammar's text follows. Its descriptors are a socket,
// for the Answer and for wake-up calls, and the memory of a Matchers.
struct Order {
  int32_t kind = 0;  // GrammarSpec::Kind
  bool control_tokens = false;
  double compile_seconds = 0;
  double match_seconds = 0;
  int64_t process_bytes = 0;
};
inline constexpr int kMaxText = 1 << 17;

// What a message begins with that says how it went; the reason follows where it did not go well.
struct Answer {
  int32_t code = 0;  // StatusCode
  int64_t bytes = 0;
};
inline constexpr int kMaxReason = 512;

inline constexpr int kMaxMatchers = 4096;  // of one grammar
inline constexpr int32_t kBegin = -1;

// One matcher. The program sets `token` and counts `asked` up; the process answers by counting
// `done` up to it.
struct MatcherState {
  std::atomic<uint32_t> asked, done;
  int32_t token;  // accepted, or kBegin: a new matcher
  uint32_t flags;
};
inline constexpr uint32_t kMayEnd = 1, kComplete = 2, kRefused = 4;  // of `flags`
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// Behind it lie the masks, of MaskWords(V) words each: one bit per token.
struct Matchers {
  std::atomic<int32_t> used;  // the first ones
  MatcherState states[kMaxMatchers];
};

constexpr int64_t MaskWords(int64_t V) { return (V + 31) / 32; }
constexpr int64_t SharedBytes(int64_t V) {
  return static_cast<int64_t>(sizeof(Matchers)) + kMaxMatchers * MaskWords(V) * 4;
}

}  // namespace dsla::grammar_channel
