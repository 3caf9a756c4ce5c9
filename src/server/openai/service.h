// Service: what the handlers of the API share. Handlers, replies under way and the engine's sinks
// hold it by shared_ptr; the engine, the tokenizer and the metrics must outlive all of these.
// Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "format/chat/chat_template.h"
#include "format/chat/model_template.h"
#include "format/tokenizer/tokenizer.h"
#include "grammar/grammar.h"
#include "server/dsla_state.h"
#include "server/http/errors.h"
#include "server/metrics.h"
#include "server/openai/canceller.h"
#include "server/openai/requests.h"
#include "server/openai/task_pool.h"

namespace dsla::openai {

struct ApiContext {
  Engine* engine = nullptr;
  const Tokenizer* tokenizer = nullptr;
  std::optional<PromptTemplate> chat_template;
  std::string no_chat_template;  // why there is none
  std::optional<ModelTemplate> tool_template;
  std::optional<ToolDialect> tool_dialect;  // how its model writes calls; with tool_template
  std::string no_tools;                     // why one of these is not there
  std::string chat_template_source;         // Jinja, for /tokenizer_info; empty: not known
  std::vector<std::string> model_names;     // at least one; the first is the one shown
  std::string model_root;                   // the file or folder it was loaded from
  LadderInfo ladder;
  Limits limits;                        // vocab_size, adapter and max_level are filled in here
  double default_timeout = 0;           // seconds; 0 = none
  int max_in_flight = 4096;             // requests being worked on, queued ones included
  std::string version;                  // of the program
  ServerMetrics* metrics = nullptr;     // may be null: no /metrics
  DslaControl* control = nullptr;       // may be null: no /v1/dsla
  TaskPool* text_pool = nullptr;        // may be null: large texts, too, hold up an io thread
  GrammarCompiler* grammars = nullptr;  // may be null: requests with a grammar are refused
  TaskPool* grammar_pool = nullptr;     // may be null: grammars, too, hold up an io thread
  std::function<int64_t()> unix_time;   // seconds; unset: the system's clock
  uint64_t random_seed = 0;             // of ids and of seeds not given; 0 = from the system
};

class Service : public std::enable_shared_from_this<Service> {
 public:
  explicit Service(ApiContext context);

  const ApiContext& context() const { return context_; }
  const Limits& limits() const { return context_.limits; }
  Engine& engine() const { return *context_.engine; }
  const Tokenizer& tokenizer() const { return *context_.tokenizer; }
  // Of the context's dialect.
  const std::vector<ToolMarker>& tool_markers() const { return tool_markers_; }
  Canceller& canceller() { return canceller_; }

  // The name to answer with, or 404. Empty: the first.
  Parsed<std::string> ModelName(std::string_view asked) const;

  // Room for one more request, given back when it goes.
  class Permit {
   public:
    explicit Permit(Service* service) : service_(service) {}
    ~Permit() { service_->in_flight_.fetch_sub(1, std::memory_order_relaxed); }
    Permit(const Permit&) = delete;
    Permit& operator=(const Permit&) = delete;

   private:
    Service* service_;
  };
  // 429 before any work if there is none; also, where the request is `for_engine`, if the engine
  // would refuse it whatever it is.
  Parsed<std::unique_ptr<Permit>> Admit(bool for_engine);

  HttpError ErrorOf(const Rejection& rejection, int64_t prompt_tokens);

  int64_t Now() const;  // unix seconds
  uint64_t Random();    // no two the same
  int64_t started() const { return started_; }
  // No text of more bytes can have so few tokens that it fits the context.
  size_t max_text_bytes() const { return max_text_bytes_; }

 private:
  ApiContext context_;
  Canceller canceller_;
  std::vector<ToolMarker> tool_markers_;
  int64_t started_ = 0;
  size_t max_text_bytes_ = 0;
  std::atomic<int> in_flight_{0};
  std::atomic<uint64_t> random_{0};
  std::atomic<double> retry_after_{1.0};  // seconds, of the engine's last refusal
};

}  // namespace dsla::openai
