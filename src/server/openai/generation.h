// Generation: one request to completions or chat from its tokens to the last byte of its answer.
// Every reply ("choice") is a request of its own to the engine; their events come on the engine's
// thread and become JSON there, a microsecond or so each, and the Responder takes it from there.
//
// The status goes out with the first token, or with the comment that keeps a stream open while it
// waits long for one; whatever fails before keeps its own. Later failures are an event
// {"error":...}, after which the stream ends. A client that leaves, or reads too slowly, has all of
// its replies cancelled.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "format/chat/tool_parser.h"
#include "server/http/http.h"
#include "server/openai/logprobs.h"
#include "server/openai/service.h"

namespace dsla::openai {

struct GenerationPlan {
  bool chat = false;
  bool continues = false;  // the replies' texts go on from the prompts'
  Common common;
  std::shared_ptr<const Grammar> grammar;     // common.grammar, compiled
  std::string model;                          // to answer with
  std::vector<std::vector<int32_t>> prompts;  // none empty
  bool echo = false;
  // A prompt as it is echoed. The tokens [begin, end) spell the text; the others, put around it, do
  // not show.
  struct Echo {
    std::string text;
    size_t begin = 0, end = 0;
  };
  std::vector<Echo> echoes;  // with echo, of each prompt
  int logprobs = -1;
  const char* logprobs_param = "logprobs";   // the field that asks for them
  bool keeps_logprobs = false;               // a stream's are held to its end
  std::optional<ToolParser::Options> tools;  // chat: the replies may have calls of them
};

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  // Checks lengths, submits everything and returns; the answer comes later.
  static void Start(std::shared_ptr<Service> service, std::unique_ptr<Service::Permit> permit,
                    GenerationPlan plan, const HttpRequest& request,
                    std::shared_ptr<Responder> responder);

  // For Start alone.
  Generation(std::shared_ptr<Service> service, std::unique_ptr<Service::Permit> permit,
             GenerationPlan plan, std::string_view request_id,
             std::shared_ptr<Responder> responder);

 private:
  class Sink;

  struct Choice {
    std::string text;                  // of the whole reply, without streaming
    std::optional<ToolParser> parser;  // with tools: `text` is what it makes of it
    std::vector<std::string> call_ids;
    std::vector<int32_t> token_ids;
    std::optional<Logprobs> logprobs;
    std::optional<TextOffsets> offsets;  // completions alone
    std::vector<PromptLogprob> prompt_logprobs;
    int tokens = 0;
    bool begun = false;  // role or echo are out
    bool done = false;
    int replica = -1;  // of several engines
    RequestResult result;
  };

  std::optional<HttpError> Prepare(const HttpRequest& request);  // max_tokens, deadline
  std::optional<HttpError> SetMaxTokens();
  std::optional<HttpError> CheckLogprobs() const;
  void Submit();
  Request RequestOf(int index) const;
  void CancelAll();

  void OnPlaced(int index, int replica);
  void OnPromptLogprobs(int index, std::vector<PromptLogprob> logprobs);
  void OnToken(int index, TokenOutput token);
  void OnFinish(int index, const RequestResult& result);

  // All below with mutex_ held.
  void AddToken(Choice& choice, const TokenOutput& token);
  void AddText(int index, std::string_view text);
  const std::string& CallId(Choice& choice, size_t call);
  void BeginText(int index, std::string* text);
  void WriteChunk(int index, std::string text, const TokenOutput* token);
  void WriteToolDelta(Choice& choice, bool first, const ToolReplyDelta& delta, JsonWriter& out);
  void WriteMessage(Choice& choice, JsonWriter& out);
  void WriteChoice(int index, JsonWriter& out);
  void WriteUsage(JsonWriter& out) const;
  void WriteContinuousUsage(int index, JsonWriter& out) const;
  void WriteStop(const Choice& choice, JsonWriter& out) const;
  void Advance();
  void Flush();
  void Complete();
  void Fail(HttpError error);
  void NoteUsage();
  HttpResponse WithTier(HttpResponse response) const;
  HttpResponse WithLevel(HttpResponse response, int level) const;
  HttpError ErrorOf(const RequestResult& result) const;

  int prompt_of(int index) const { return index / plan_.common.n; }
  // A prompt that is only to be echoed is run all the same: its reply says at which level.
  bool scores_prompt(int prompt) const {
    return plan_.echo && (plan_.logprobs >= 0 || max_tokens_[prompt] == 0);
  }

  const std::shared_ptr<Service> service_;
  const std::unique_ptr<Service::Permit> permit_;
  const GenerationPlan plan_;
  const std::shared_ptr<Responder> responder_;
  double deadline_ = 0;
  std::vector<int> max_tokens_;   // [prompts]
  std::vector<std::string> ids_;  // [choices], of the engine's requests
  std::vector<uint64_t> seeds_;   // [choices]
  std::string id_;                // "cmpl-..."
  std::string head_;              // of every chunk, or of the answer, up to the choices
  std::atomic<bool> disconnected_{false};

  std::mutex mutex_;  // of what follows
  std::vector<Choice> choices_;
  bool started_ = false;  // the first events are out
  bool ended_ = false;    // nothing more will go out
  int finished_ = 0;
  int first_level_ = 0, highest_level_ = 0;  // of tokens
  bool noted_ = false;                       // usage is, for the log
  std::optional<HttpError> failure_;
  std::string pending_;  // events that are due
};

}  // namespace dsla::openai
