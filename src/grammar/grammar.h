// Grammars that replies must follow: JSON schemas, regular expressions and EBNF, compiled and
// matched by XGrammar (Dong et al., "XGrammar: Flexible and Efficient Structured Generation Engine
// for Large Language Models", MLSys 2025), over the bytes that tokens add to a reply.
//
// What a client sends may take any time and memory to compile, and to match. So each grammar has a
// process of its own (grammar_process.cc) with bounds on both, which also holds the matchers of all
// requests with it; this program never loads the library. README.md says how the two talk.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace dsla {

class Tokenizer;

struct GrammarSpec {
  enum class Kind {
    kJsonSchema,     // properties that it does not name are not written, but where it allows them
    kJsonObject,     // any JSON object; no text
    kRegex,          // the whole reply
    kEbnf,           // llama.cpp's GBNF; the rule "root"
    kStructuralTag,  // XGrammar's, as JSON
  };
  Kind kind = Kind::kJsonObject;
  std::string text = {};
  // It may have GrammarOptions::control_tokens, where it names them: XGrammar's Token(id). Never
  // set for a client's.
  bool control_tokens = false;

  bool operator==(const GrammarSpec&) const = default;
};

// The regular expression of exactly these strings.
std::string RegexOfChoices(std::span<const std::string> choices);

struct GrammarOptions {
  size_t max_text_bytes = 64 << 10;
  // Of processor time.
  double compile_seconds = 5;  // of one grammar
  double match_seconds = 0.5;  // of one token
  double wait_seconds = 10;    // for others' compilations before one's own begins
  int compile_at_once = 2;
  int64_t process_bytes = int64_t{1} << 30;  // address space of a grammar's process
  // Of the grammars that are kept for further requests, least recently used ones go.
  int64_t cache_bytes = int64_t{256} << 20;
  int cache_entries = 64;
  // Of the tokenizer: those that a grammar may have. All others are in no reply with a grammar.
  std::vector<int32_t> control_tokens = {};
};

class GrammarMatcher;

// One compiled grammar. Thread-safe.
class Grammar {
 public:
  virtual ~Grammar() = default;
  // At the start of a reply. Errors: kInvalidArgument if it takes too long to match; kUnavailable
  // if too many are under way.
  virtual Expected<std::unique_ptr<GrammarMatcher>> NewMatcher() const = 0;
  virtual int64_t bytes() const = 0;  // of memory that is its alone, about
};

// Where a reply is in its grammar. Not thread-safe.
class GrammarMatcher {
 public:
  virtual ~GrammarMatcher() = default;

  // The reply goes on with this token, which is one of `allowed`. Returns at once; Await is to be
  // called before anything else.
  virtual void Accept(int32_t token) = 0;
  // kInvalidArgument, with the reason: the grammar takes too long, or its process has ended.
  // Nothing else may be called then.
  virtual Status Await() = 0;

  // [ceil(V / 32)]: bit i % 32 of word i / 32 says whether token i may be next. A control token of
  // the tokenizer may be only where the grammar names it, and GrammarSpec::control_tokens is set.
  virtual std::span<const uint32_t> allowed() const = 0;
  virtual bool may_end() const = 0;   // the reply may end here
  virtual bool complete() const = 0;  // and cannot go on
};

// Thread-safe.
class GrammarCompiler {
 public:
  // Of the model's V tokens, whose bytes are the tokenizer's. Starts nothing yet.
  static std::unique_ptr<GrammarCompiler> Create(const Tokenizer& tokenizer, int64_t V,
                                                 const GrammarOptions& options = {});
  virtual ~GrammarCompiler() = default;

  // Waits until it is compiled, or takes what is kept of an equal one. Errors: kInvalidArgument,
  // one line that says what is wrong with it, or which bound it exceeds; kResourceExhausted: others
  // are being compiled, later there may be room; kUnavailable: XGrammar is not there.
  virtual Expected<std::shared_ptr<const Grammar>> Compile(const GrammarSpec& spec) = 0;
};

}  // namespace dsla
