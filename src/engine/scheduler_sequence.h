// One request inside the scheduler; included by its implementation alone.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "engine/scheduler.h"

namespace dsla {

struct Scheduler::Sequence {
  int64_t id = 0;
  ScheduledRequest request;  // its prompt moved to tokens
  int prompt_tokens = 0;
  std::vector<int32_t> tokens;         // prompt and reply as far as known
  std::optional<SequenceCache> cache;  // while running
  PrefixPath path;                     // keys of its tokens, waiting or running
  int entered = 0;  // tokens given to the prefix cache since it was last admitted

  // Levels of what is cached, and those to be repeated, of which history is a beginning: after a
  // pre-emption what was recorded; with a prefix of lower level the fold at its end.
  LevelHistory history;
  LevelHistory recorded;
  LevelHistory preempted_history;
  int replay_until = 0;  // tokens that were cached when it was pre-empted

  bool started = false;    // ran a step
  bool ran = false;        // since it was last admitted
  bool cancelled = false;  // takes effect at the commit
  // While a step is planned behind the one in flight.
  int in_flight = 0;   // rows of it in that one, where they count as cached already
  int feed = -1;       // the row of that one whose result will be its last token; -1: all are known
  bool ahead = false;  // it has rows in the step behind
  int preemptions = 0;
  int overtaken = 0;
  // While it waits for a prefix that a running prompt is computing: whose, and how much of it.
  int64_t leader = 0;      // 0: nobody's
  int shared = 0;          // tokens, whole pages
  int blocked_level = -1;  // at which it last did not fit, and the room there was
  int64_t blocked_room = 0;
  // While it waits: tokens of it in the prefix cache, as of so many changes to that.
  int ready = 0;
  int64_t ready_at = -1;
  int cached_tokens = 0;
  int logits_done = 0;  // prompt rows whose logits were handed out

  int size() const { return static_cast<int>(tokens.size()) + (feed >= 0 ? 1 : 0); }
  int length() const { return cache ? cache->length() : 0; }
  int computed() const { return length() - in_flight; }  // cached, and the step's results known
  bool reads() const { return computed() < prompt_tokens; }
  // Whether rows of it follow, as far as can be known.
  bool goes_on() const {
    return !cancelled && (feed < 0 || size() - prompt_tokens < request.max_tokens);
  }
  int to_compute() const { return size() - (cache ? cache->length() : ready); }
  // Most tokens that will ever be cached: the last one of the reply is not run.
  int64_t final_length() const {
    return prompt_tokens + std::max<int64_t>(0, int64_t{request.max_tokens} - 1);
  }
  // Its levels are given: what it generated at them is being recomputed.
  bool replaying() const { return history.size() < recorded.size() || length() < replay_until; }
};

}  // namespace dsla
