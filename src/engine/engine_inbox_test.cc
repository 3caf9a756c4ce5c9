#include "engine/engine_inbox.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "engine/engine_checks.h"
#include "format/tokenizer/testing.h"

namespace {
thread_local int allocations_left = -1;  // of this thread; -1: any number
}

// Not inlined: the compiler would take its malloc and their free for a mismatch.
[[gnu::noinline]] void* operator new(size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  void* const memory = std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace dsla {
namespace {

class NoSink : public RequestSink {
 public:
  void OnPromptLogprobs(std::vector<PromptLogprob>) override {}
  void OnToken(TokenOutput) override {}
  void OnFinish(const RequestResult&) override {}
};

class InboxTest : public ::testing::Test {
 protected:
  using Group = std::vector<std::unique_ptr<ActiveRequest>>;
  Group MakeAll(const std::vector<std::string>& ids, size_t prompt = 3) {
    Group group;
    for (const std::string& id : ids) {
      Request request;
      request.id = id;
      request.prompt.assign(prompt, 7);
      group.push_back(std::make_unique<ActiveRequest>(
          std::move(request), std::make_shared<NoSink>(), *tokenizer_, 300));
    }
    return group;
  }
  Group Make(const std::string& id, size_t prompt = 3) { return MakeAll({id}, prompt); }
  static std::vector<std::string> Ids(const Inbox::Mail& mail) {
    std::vector<std::string> ids;
    for (const auto& request : mail.requests) ids.push_back(request->request.id);
    return ids;
  }

  std::unique_ptr<Tokenizer> tokenizer_ = [] {
    auto data = ParseTokenizerJson(testing::ByteLevelJson().dump(), "tokenizer.json");
    EXPECT_TRUE(data.ok());
    auto tokenizer = Tokenizer::Create(std::move(data).value());
    EXPECT_TRUE(tokenizer.ok());
    return std::move(tokenizer).value();
  }();
};

constexpr std::chrono::duration<double> kForever{std::numeric_limits<double>::infinity()};

TEST_F(InboxTest, MailComesOnceAndInOrder) {
  Inbox inbox({});
  EXPECT_FALSE(inbox.Put(Make("a")));
  EXPECT_FALSE(inbox.Put(Make("b")));
  inbox.Cancel("a");
  inbox.Cancel("nobody");
  inbox.SetMaxLevel(3);
  Inbox::Mail mail;
  inbox.Take(mail, kForever);
  EXPECT_EQ(Ids(mail), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(mail.cancels, std::vector<std::string>{"a"});
  EXPECT_EQ(mail.max_level, 3);
  EXPECT_FALSE(mail.stop);
  inbox.Take(mail, std::nullopt);
  EXPECT_TRUE(mail.empty());
  inbox.Take(mail, std::chrono::duration<double>(0.001));
  EXPECT_TRUE(mail.empty());
}

TEST_F(InboxTest, CancelAllNamesWhatIsAcceptedAndNotEnded) {
  Inbox inbox({});
  for (const char* id : {"taken", "ended", "in the mail"}) EXPECT_FALSE(inbox.Put(Make(id)));
  inbox.Release("ended");
  Inbox::Mail mail;
  inbox.CancelAll();
  inbox.Take(mail, kForever);
  EXPECT_EQ(std::set<std::string>(mail.cancels.begin(), mail.cancels.end()),
            (std::set<std::string>{"taken", "in the mail"}));
}

TEST_F(InboxTest, AnIdIsFreeAgainAfterItsEnd) {
  Inbox inbox({});
  EXPECT_FALSE(inbox.Put(Make("a")));
  const auto rejected = inbox.Put(Make("a"));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->kind, Rejection::Kind::kInvalid);
  EXPECT_EQ(rejected->message, "request id 'a' is in use by a running request");
  EXPECT_EQ(inbox.counts().accepted, 1);
  inbox.Release("a");
  EXPECT_EQ(inbox.counts().accepted, 1) << "its client may not know of the end yet";
  EXPECT_FALSE(inbox.Put(Make("a")));
  inbox.Settle(1, 3, 1);
  EXPECT_EQ(inbox.counts().accepted, 1);
}

TEST_F(InboxTest, ACancelThatComesTooLateIsNotForTheNextOfThatId) {
  Inbox inbox({});
  for (const char* id : {"a", "b"}) EXPECT_FALSE(inbox.Put(Make(id)));
  Inbox::Mail mail;
  inbox.Take(mail, kForever);
  inbox.CancelAll();
  inbox.Release("a");  // by itself, meanwhile
  EXPECT_FALSE(inbox.Put(Make("a")));
  inbox.Take(mail, kForever);
  EXPECT_EQ(Ids(mail), std::vector<std::string>{"a"});
  EXPECT_EQ(mail.cancels, std::vector<std::string>{"b"});
}

TEST_F(InboxTest, BoundsOfTheQueue) {
  Inbox inbox({.max_queued = 2, .max_queued_tokens = 10});
  EXPECT_FALSE(inbox.Put(Make("large", 50))) << "alone, it is let in";
  auto rejected = inbox.Put(Make("small", 1));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->kind, Rejection::Kind::kQueueFull);
  EXPECT_EQ(rejected->message,
            "the queue is full: 50 of at most 10 prompt tokens wait, and 1 more came");
  EXPECT_EQ(rejected->retry_after_seconds, 60) << "nothing has left the queue yet";
  ASSERT_TRUE(inbox.RefusesAll()) << "without a request to show";
  EXPECT_EQ(inbox.RefusesAll()->message, rejected->message);
  inbox.Settle(1, 50, 0);
  EXPECT_FALSE(inbox.RefusesAll());
  EXPECT_FALSE(inbox.Put(Make("b", 4)));
  rejected = inbox.Put(Make("e", 7));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->message,
            "the queue is full: 4 of at most 10 prompt tokens wait, and 7 more came");
  EXPECT_FALSE(inbox.RefusesAll()) << "a shorter one is welcome";
  EXPECT_FALSE(inbox.Put(Make("c", 4)));
  rejected = inbox.Put(Make("d", 1));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->message, "the queue is full: 2 of at most 2 requests wait, and 1 more came");
  EXPECT_LT(rejected->retry_after_seconds, 60);
  EXPECT_GE(rejected->retry_after_seconds, 1);
}

TEST_F(InboxTest, AGroupComesWholeOrNotAtAll) {
  Inbox inbox({.max_queued = 4, .max_queued_tokens = 10});
  EXPECT_FALSE(inbox.Put(MakeAll({"a", "b", "c"}, 5))) << "15 tokens, but nobody waits";
  EXPECT_EQ(inbox.counts().queued, 3);
  EXPECT_EQ(inbox.counts().queued_tokens, 15);
  EXPECT_EQ(inbox.counts().accepted, 3);
  inbox.Settle(3, 15, 0);

  EXPECT_FALSE(inbox.Put(Make("d", 2)));
  auto rejected = inbox.Put(MakeAll({"e", "f", "g", "h"}, 1));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->message, "the queue is full: 1 of at most 4 requests wait, and 4 more came");
  rejected = inbox.Put(MakeAll({"e", "f"}, 5));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->message,
            "the queue is full: 2 of at most 10 prompt tokens wait, and 10 more came");
  EXPECT_EQ(inbox.counts().queued, 1);
  inbox.Settle(1, 2, 0);
  EXPECT_FALSE(inbox.Put(MakeAll({"e", "f", "g", "h", "i"}, 1))) << "more than may wait, likewise";
  inbox.Settle(5, 5, 0);

  rejected = inbox.Put(MakeAll({"x", "y", "x"}, 1));
  ASSERT_TRUE(rejected);
  EXPECT_EQ(rejected->message, "request id 'x' is in use by a running request");
  EXPECT_EQ(rejected->index, 2u);
  EXPECT_FALSE(inbox.Put(MakeAll({"x", "y"}, 1))) << "their ids are free";
  Inbox::Mail mail;
  inbox.Take(mail, kForever);
  EXPECT_EQ(Ids(mail),
            (std::vector<std::string>{"a", "b", "c", "d", "e", "f", "g", "h", "i", "x", "y"}));
}

// Wherever memory is used up: its places, its ids and its part of the count are free.
TEST_F(InboxTest, AGroupThatMemoryIsShortForLeavesNoTrace) {
  Inbox inbox({.max_queued = 2});
  const std::string long_a(40, 'a'), long_b(40, 'b');
  int failures = 0;
  while (true) {
    Group group = MakeAll({long_a, long_b});
    allocations_left = failures;
    try {
      const auto rejected = inbox.Put(std::move(group));
      allocations_left = -1;
      ASSERT_FALSE(rejected) << rejected->message;
      break;
    } catch (const std::bad_alloc&) {
      allocations_left = -1;
    }
    ++failures;
    EXPECT_EQ(inbox.counts().accepted, 0);
    EXPECT_EQ(inbox.counts().queued, 0);
    EXPECT_FALSE(inbox.RefusesAll());
    Inbox::Mail mail;
    inbox.Take(mail, std::nullopt);
    EXPECT_TRUE(mail.empty());
  }
  EXPECT_GT(failures, 4);
  EXPECT_EQ(inbox.counts().accepted, 2);
}

TEST_F(InboxTest, DrainedAndStoppedTakeNothing) {
  Inbox inbox({});
  EXPECT_FALSE(inbox.Put(Make("a")));
  inbox.Drain();
  ASSERT_TRUE(inbox.Put(Make("b")));
  EXPECT_EQ(inbox.Put(Make("b"))->kind, Rejection::Kind::kUnavailable);
  ASSERT_TRUE(inbox.RefusesAll());
  EXPECT_EQ(inbox.RefusesAll()->kind, Rejection::Kind::kUnavailable);
  EXPECT_TRUE(inbox.counts().draining);
  inbox.Stop();
  Inbox::Mail mail;
  inbox.Take(mail, kForever);
  EXPECT_TRUE(mail.stop);
  EXPECT_EQ(Ids(mail), std::vector<std::string>{"a"});
  inbox.Take(mail, kForever);
  EXPECT_TRUE(mail.stop) << "for good";
}

// Many submitters against one worker: everything that was accepted arrives exactly once.
TEST_F(InboxTest, ManySubmitters) {
  constexpr int kThreads = 4, kEach = 500;
  Inbox inbox({.max_queued = 20});
  std::atomic<int> accepted = 0, refused = 0;
  std::multiset<std::string> arrived;
  std::thread worker([&] {
    Inbox::Mail mail;
    while (true) {
      inbox.Take(mail, kForever);
      std::vector<std::string> ids = Ids(mail);
      arrived.insert(ids.begin(), ids.end());
      const int left = static_cast<int>(ids.size());
      for (const std::string& id : ids) inbox.Release(id);
      inbox.Settle(left, 3 * left, left);
      if (mail.stop) return;
    }
  });
  std::vector<std::thread> submitters;
  for (int t = 0; t < kThreads; ++t) {
    submitters.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        const std::string id = fmt::format("{}-{}", t, i);
        const auto rejected = inbox.Put(Make(id));
        ++(rejected ? refused : accepted);
        if (i % 7 == 0) inbox.Cancel(id);
        EXPECT_LE(inbox.counts().queued, 20);
      }
    });
  }
  for (std::thread& thread : submitters) thread.join();
  inbox.Stop();
  worker.join();
  EXPECT_EQ(accepted + refused, kThreads * kEach);
  EXPECT_GT(accepted, 0);
  EXPECT_EQ(static_cast<int>(arrived.size()), accepted);
  EXPECT_EQ(std::set<std::string>(arrived.begin(), arrived.end()).size(), arrived.size());
  EXPECT_EQ(inbox.counts().accepted, 0);
  EXPECT_EQ(inbox.counts().queued, 0);
}

class CheckRequestTest : public ::testing::Test {
 protected:
  static constexpr RequestLimits kLimits{.V = 100, .max_positions = 64, .max_level = 4};
  static Request Good() {
    Request request;
    request.id = "r";
    request.prompt = {1, 2, 3};
    return request;
  }
  // "param: message", or "ok".
  static std::string Check(const Request& request) {
    const auto rejected = CheckRequest(request, kLimits);
    return rejected ? rejected->param + ": " + rejected->message : "ok";
  }
};

TEST_F(CheckRequestTest, EveryFieldIsNamed) {
  struct Case {
    std::function<void(Request&)> change;
    std::string want;
  };
  const Case cases[] = {
      {[](Request&) {}, "ok"},
      {[](Request& r) { r.id = ""; }, "request_id: the request has no id"},
      {[](Request& r) { r.prompt = {}; }, "prompt: the prompt has no tokens"},
      {[](Request& r) { r.prompt[1] = 100; }, "prompt: token id 100: the vocabulary has 100"},
      {[](Request& r) { r.prompt[1] = -1; }, "prompt: token id -1: the vocabulary has 100"},
      {[](Request& r) { r.max_tokens = -1; }, "max_tokens: max_tokens -1: must not be negative"},
      {[](Request& r) { r.max_tokens = 0; },
       "max_tokens: max_tokens 0: only with the log-probabilities of the prompt is there anything "
       "to do"},
      {[](Request& r) {
         r.max_tokens = 0;
         r.prompt_logprobs = true;
       },
       "ok"},
      {[](Request& r) { r.max_tokens = 61; }, "ok"},
      {[](Request& r) { r.max_tokens = 62; },
       "max_tokens: the prompt has 3 tokens and max_tokens is 62, 65 together; the context holds "
       "64"},
      {[](Request& r) { r.max_tokens = std::numeric_limits<int>::max(); },
       "max_tokens: the prompt has 3 tokens and max_tokens is 2147483647, 2147483650 together; the "
       "context holds 64"},
      {[](Request& r) { r.prompt.assign(64, 1); },
       "prompt: the prompt has 64 tokens and max_tokens is 16, 80 together; the context holds 64"},
      {[](Request& r) { r.min_tokens = 17; },
       "min_tokens: min_tokens 17: must be from 0 to max_tokens, 16"},
      {[](Request& r) {
         r.stop_ids = {4, 100};
       },
       "stop_token_ids: token id 100: the vocabulary has 100"},
      {[](Request& r) {
         r.stop = {"a", ""};
       },
       "stop: a stop string is empty"},
      {[](Request& r) { r.stop = {"\xff"}; }, "stop: a stop string is not UTF-8"},
      {[](Request& r) { r.stop = {std::string(16385, 'a')}; },
       "stop: the stop strings have 16385 bytes together, at most 16384 are allowed"},
      {[](Request& r) { r.sampling.temperature = -1; },
       "temperature: temperature -1: must be from 0 to 100"},
      {[](Request& r) {
         r.sampling.logit_bias = {{100, 1.f}};
       },
       "logit_bias: logit_bias: token 100 is not in the vocabulary of 100"},
      {[](Request& r) { r.top_logprobs = 129; },
       "top_logprobs: top_logprobs 129: must be from 0 to 128, or -1 for none"},
      {[](Request& r) { r.level = 5; }, "ok"},
      {[](Request& r) {
         r.tier = Tier::kExact;
         r.level = 5;
       },
       "level: level 5: must be from 0 to 4"},
      {[](Request& r) { r.deadline = std::numeric_limits<double>::quiet_NaN(); },
       "deadline: deadline nan: must not be negative"},
  };
  for (const Case& c : cases) {
    Request request = Good();
    c.change(request);
    EXPECT_EQ(Check(request), c.want);
  }
}

TEST_F(CheckRequestTest, ALongContextIsAKindOfItsOwn) {
  Request request = Good();
  request.max_tokens = 62;
  EXPECT_EQ(CheckRequest(request, kLimits)->kind, Rejection::Kind::kContextLength);
  request.max_tokens = -1;
  EXPECT_EQ(CheckRequest(request, kLimits)->kind, Rejection::Kind::kInvalid);
}

TEST(CheckOptionsTest, EveryOptionIsNamed) {
  const EngineOptions good{.memory_bytes = 1 << 20};
  EXPECT_TRUE(CheckOptions(good, 4, 64).ok());
  const auto message = [&](const std::function<void(EngineOptions&)>& change) {
    EngineOptions options = good;
    change(options);
    return CheckOptions(options, 4, 64).message();
  };
  EXPECT_EQ(message([](auto& o) { o.memory_bytes = 0; }), "memory of 0 bytes: must be positive");
  EXPECT_EQ(message([](auto& o) { o.max_batch_tokens = 127; }),
            "max_batch_tokens 127: must be at least two pages, 128");
  EXPECT_EQ(message([](auto& o) {
              o.deterministic = true;
              o.max_batch_tokens = 255;
            }),
            "max_batch_tokens 255: must be at least 256 in deterministic mode");
  EXPECT_EQ(message([](auto& o) { o.max_running = 0; }), "max_running 0: must be positive");
  EXPECT_EQ(message([](auto& o) { o.max_queued = 0; }), "max_queued 0: must be positive");
  EXPECT_EQ(message([](auto& o) { o.snapshot_stride = 100; }),
            "snapshot_stride 100: must be a multiple of the page size, 64");
  EXPECT_EQ(message([](auto& o) { o.default_max_level = 5; }),
            "default_max_level 5: must be from 0 to 4");
}

}  // namespace
}  // namespace dsla
