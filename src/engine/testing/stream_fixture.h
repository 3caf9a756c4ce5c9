// What tests of the engine over a device of the host's own share: a small model on it, and
// requests.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/testing/stream_device.h"
#include "engine/testing/test_engine.h"

namespace dsla::testing_engine {

inline constexpr int kV = 96, kPage = 16, kL = 2;  // of the model

inline int32_t OneMore(const RowContext& row) { return (row.token + 1) % kV; }

// A model on such a device.
struct OnStream {
  StreamOptions options;
  testing_models::SmallModel small;
  explicit OnStream(StreamOptions o)
      : options(std::move(o)),
        small("smollm2", true, {},
              {.page_size = kPage, .device = std::make_shared<StreamDevice>(&options)}) {}
};

class StreamTest : public ::testing::Test {
 protected:
  Request Ask(int max_tokens, std::vector<int32_t> prompt = {7, 8, 9}) {
    Request request;
    request.id = fmt::format("r{}", ++count_);
    request.prompt = std::move(prompt);
    request.sampling.temperature = 0;
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    return request;
  }
  static EngineOptions Options() { return {.memory_bytes = 16 << 20, .default_max_level = kL}; }

  // Nothing is left of surplus rows.
  static void ExpectNoLeak(TestEngine& engine) {
    EngineState state;
    for (int i = 0; i < 5000; ++i) {
      state = engine->state();
      if (state.idle && state.page_bytes + state.state_bytes == 0) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ADD_FAILURE() << state.page_bytes << " and " << state.state_bytes << " bytes are still held";
  }

  const std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
  int count_ = 0;
};

}  // namespace dsla::testing_engine
