// XGrammar's functions, which its library registers with TVM FFI: reached through that one's C
// interface, so that nothing of either is linked. Internal to this folder.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "grammar/grammar.h"

namespace dsla {

// A value of TVM FFI's that is held.
class FfiValue {
 public:
  FfiValue() = default;
  explicit FfiValue(TVMFFIAny value) : value_(value) {}
  FfiValue(FfiValue&& other) noexcept : value_(std::exchange(other.value_, {})) {}
  FfiValue& operator=(FfiValue&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~FfiValue();

  const TVMFFIAny& view() const { return value_; }
  int64_t integer() const { return value_.v_int64; }

 private:
  TVMFFIAny value_{};
};

// Not thread-safe.
class XGrammar {
 public:
  // `site_packages`: the folder that its package and tvm_ffi are in. kUnavailable: they cannot be
  // loaded.
  static Expected<std::unique_ptr<XGrammar>> Load(const std::string& site_packages);
  ~XGrammar();

  // The bytes of tokens 0, 1, ...; none: never allowed. The last stands for a reply's end.
  Status SetVocabulary(std::span<const std::string_view> tokens);

  // Both kInvalidArgument with XGrammar's message in one line.
  Expected<FfiValue> Compile(const GrammarSpec& spec);
  Expected<FfiValue> NewMatcher(const FfiValue& compiled);
  Expected<int64_t> Bytes(const FfiValue& compiled);

  // False if the token is not allowed. Both kInvalidArgument where it fails.
  Expected<bool> Accept(const FfiValue& matcher, int32_t token);
  // mask: [ceil(V / 32)], with V of SetVocabulary's tokens
  Status FillMask(const FfiValue& matcher, std::span<uint32_t> mask);

 private:
  struct Functions;
  explicit XGrammar(std::unique_ptr<Functions> functions);
  Expected<FfiValue> CompileSchema(const FfiValue& schema, bool closed);
  Expected<FfiValue> CompileEbnf(const FfiValue& text);
  Expected<FfiValue> CompileJson(const FfiValue& grammar);

  const std::unique_ptr<Functions> functions_;
  FfiValue compiler_;
};

}  // namespace dsla
