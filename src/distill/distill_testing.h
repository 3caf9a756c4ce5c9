// Tests only: a tiny model and text to train on, and a job of a few steps.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/random.h"
#include "distill/distill.h"
#include "distill/token_file.h"
#include "format/testing/file_writers.h"

namespace dsla::testing {

inline ModelConfig TrainingModel() {
  ModelConfig config = TinyConfig("llama");
  config.L = 3, config.C = 32, config.H = 4, config.Hkv = 2, config.D = 8, config.ffn = 48;
  config.V = 64, config.max_position = 256;
  return config;
}

// m.gguf and data.tokens: 60 documents of 40 to 276 tokens.
inline void WriteTrainingFiles(const TempDir& folder) {
  const ModelConfig config = TrainingModel();
  folder.Write("m.gguf", TinyGguf(config, RandomWeights(config, 11)).Build());
  auto writer = TokenFileWriter::Create(folder.path() + "/data.tokens", config.V);
  ASSERT_TRUE(writer.ok());
  Random random(11, {1});
  for (int d = 0; d < 60; ++d) {
    std::vector<int32_t> ids(40 + 4 * d);
    for (int32_t& id : ids) id = static_cast<int32_t>(random.Below(64));
    ASSERT_TRUE(writer->Add(ids).ok());
  }
  ASSERT_TRUE(writer->Finish().ok());
}

inline DistillJob TrainingJob(const std::string& folder, const std::string& name) {
  DistillJob job;
  job.data = {folder + "/data.tokens"};
  job.out = folder + "/" + name;
  job.quiet = true;
  DistillConfig& c = job.config;
  c.adapter = {.window = 8, .sinks = 2, .states = 2, .rank = 4};
  c.half_lives = {16, 64, 2, 8};
  c.lengths = {64, 96};
  c.length_shares = {0.5, 0.5};
  c.tokens_per_step = 300;  // 4 or 3 sequences
  c.align_tokens = 300 * 12;
  c.chain_tokens = 300 * 10;
  c.warmup_steps = 3;
  c.order_method = "uniform";
  c.order_length = c.evaluate_length = 64;
  c.evaluate_documents = c.evaluate_recall = 2;
  c.threads = 1;
  c.log_every = 4;
  return job;
}

}  // namespace dsla::testing
