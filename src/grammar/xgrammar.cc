#include "grammar/xgrammar.h"

#include <dlfcn.h>

#include <algorithm>

namespace dsla {
namespace {

// Of the C interface, what is used. The library stays loaded until the process ends.
struct Interface {
  decltype(&TVMFFIObjectDecRef) release = nullptr;
  decltype(&TVMFFIFunctionCall) call = nullptr;
  decltype(&TVMFFIFunctionGetGlobal) global = nullptr;
  decltype(&TVMFFITypeKeyToIndex) type_index = nullptr;
  decltype(&TVMFFIGetTypeInfo) type_info = nullptr;
  decltype(&TVMFFIErrorMoveFromRaised) take_error = nullptr;
  decltype(&TVMFFIStringFromByteArray) new_string = nullptr;
  decltype(&TVMFFIBytesFromByteArray) new_bytes = nullptr;
};
Interface ffi;

// What follows the header of an object.
template <typename Cell>
const Cell& CellOf(const void* object) {
  return *reinterpret_cast<const Cell*>(static_cast<const char*>(object) + sizeof(TVMFFIObject));
}

// "[02:55:06] /project/cpp/regex_converter.cc:94: Regex parsing error ..." without time and place.
std::string OneLine(std::string_view message) {
  constexpr size_t kMost = 200;
  if (message.starts_with("[")) {
    const size_t place = message.find(".cc:");
    const size_t text = place == message.npos ? place : message.find(": ", place);
    if (text != message.npos) message.remove_prefix(text + 2);
  }
  std::string line;
  for (const char c : message.substr(0, kMost)) line += c >= 0x20 && c < 0x7f ? c : ' ';
  line.erase(line.find_last_not_of(' ') + 1);
  if (message.size() > kMost) line += "...";
  return line;
}

Status TakeError() {
  TVMFFIObjectHandle error = nullptr;
  ffi.take_error(&error);
  if (error == nullptr) return InvalidArgument("no reason is given");
  const auto& cell = CellOf<TVMFFIErrorCell>(error);
  const std::string message = OneLine({cell.message.data, cell.message.size});
  ffi.release(error);
  return InvalidArgument("{}", message);
}

TVMFFIAny Int(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}
TVMFFIAny Bool(bool value) {
  TVMFFIAny any = Int(value ? 1 : 0);
  any.type_index = kTVMFFIBool;
  return any;
}
constexpr TVMFFIAny kNone{};

FfiValue NewString(std::string_view text) {
  const TVMFFIByteArray bytes{text.data(), text.size()};
  TVMFFIAny any{};
  DSLA_CHECK(ffi.new_string(&bytes, &any) == 0);
  return FfiValue(any);
}
FfiValue NewBytes(std::string_view text) {
  const TVMFFIByteArray bytes{text.data(), text.size()};
  TVMFFIAny any{};
  DSLA_CHECK(ffi.new_bytes(&bytes, &any) == 0);
  return FfiValue(any);
}

std::string_view TextOf(const FfiValue& string) {
  const TVMFFIAny& any = string.view();
  if (any.type_index == kTVMFFISmallStr) return {any.v_bytes, any.small_str_len};
  const auto& bytes = CellOf<TVMFFIByteArray>(any.v_obj);
  return {bytes.data, bytes.size};
}

Expected<FfiValue> CallWith(TVMFFIObjectHandle function, std::span<TVMFFIAny> args) {
  TVMFFIAny result{};
  if (ffi.call(function, args.data(), static_cast<int32_t>(args.size()), &result) != 0)
    return TakeError();
  return FfiValue(result);
}
template <typename... Args>
Expected<FfiValue> Call(TVMFFIObjectHandle function, const Args&... args) {
  TVMFFIAny all[] = {args...};
  return CallWith(function, all);
}

Expected<TVMFFIObjectHandle> Global(std::string_view name) {
  const TVMFFIByteArray key{name.data(), name.size()};
  TVMFFIObjectHandle function = nullptr;
  if (ffi.global(&key, &function) != 0 || function == nullptr)
    return Error(StatusCode::kUnavailable, "TVM FFI has no function {}", name);
  return function;
}

// The functions of registered types live as long as the process.
Expected<TVMFFIObjectHandle> Method(const std::string& type, std::string_view name) {
  const std::string whole = "xgrammar.tvm_ffi_binding." + type;
  const TVMFFIByteArray key{whole.data(), whole.size()};
  int32_t index = 0;
  if (ffi.type_index(&key, &index) == 0) {
    const TVMFFITypeInfo* const info = ffi.type_info(index);
    const std::span methods(info->methods, static_cast<size_t>(info->num_methods));
    const auto found = std::ranges::find_if(methods, [&](const TVMFFIMethodInfo& method) {
      return std::string_view(method.name.data, method.name.size) == name;
    });
    if (found != methods.end()) return static_cast<TVMFFIObjectHandle>(found->method.v_obj);
  }
  return Error(StatusCode::kUnavailable, "XGrammar has no {}.{}: another version is installed",
               type, name);
}

Expected<void*> LoadLibrary(const std::string& path) {
  void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) return library;
  return Error(StatusCode::kUnavailable,
               "XGrammar is not installed (requirements-run.txt, ./quickstart): {}", ::dlerror());
}

template <typename Function>
Status Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function != nullptr) return Status::Ok();
  return Error(StatusCode::kUnavailable, "libtvm_ffi.so has no {}: another version is installed",
               name);
}

Status LoadInterface(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(void* const library, LoadLibrary(path));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFIObjectDecRef", ffi.release));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFIFunctionCall", ffi.call));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFIFunctionGetGlobal", ffi.global));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFITypeKeyToIndex", ffi.type_index));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFIGetTypeInfo", ffi.type_info));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFIErrorMoveFromRaised", ffi.take_error));
  DSLA_RETURN_IF_ERROR(Find(library, "TVMFFIStringFromByteArray", ffi.new_string));
  return Find(library, "TVMFFIBytesFromByteArray", ffi.new_bytes);
}

}  // namespace

FfiValue::~FfiValue() {
  if (value_.type_index >= kTVMFFIStaticObjectBegin) ffi.release(value_.v_obj);
}

struct XGrammar::Functions {
  TVMFFIObjectHandle new_array, new_tokenizer, new_compiler, from_schema, from_tag, to_string,
      compile_regex, compile_ebnf, compile_grammar, bytes, new_matcher, accept, fill_mask;
};

XGrammar::XGrammar(std::unique_ptr<Functions> functions) : functions_(std::move(functions)) {}
XGrammar::~XGrammar() = default;

Expected<std::unique_ptr<XGrammar>> XGrammar::Load(const std::string& site_packages) {
  DSLA_RETURN_IF_ERROR(LoadInterface(site_packages + "/tvm_ffi/lib/libtvm_ffi.so"));
  // Loading it registers its functions.
  DSLA_RETURN_IF_ERROR(LoadLibrary(site_packages + "/xgrammar/libxgrammar_bindings.so").status());
  auto functions = std::make_unique<Functions>();
  Functions& f = *functions;
  const std::string compiler = "GrammarCompiler", matcher = "GrammarMatcher";
  DSLA_ASSIGN_OR_RETURN(f.new_array, Global("ffi.Array"));
  DSLA_ASSIGN_OR_RETURN(f.new_tokenizer, Method("TokenizerInfo", "__ffi_init__"));
  DSLA_ASSIGN_OR_RETURN(f.new_compiler, Method(compiler, "__ffi_init__"));
  DSLA_ASSIGN_OR_RETURN(f.from_schema, Method("Grammar", "from_json_schema"));
  DSLA_ASSIGN_OR_RETURN(f.from_tag, Method("Grammar", "from_structural_tag"));
  DSLA_ASSIGN_OR_RETURN(f.to_string, Method("Grammar", "to_string"));
  DSLA_ASSIGN_OR_RETURN(f.compile_regex, Method(compiler, "compile_regex"));
  DSLA_ASSIGN_OR_RETURN(f.compile_ebnf, Method(compiler, "compile_grammar_from_strings"));
  DSLA_ASSIGN_OR_RETURN(f.compile_grammar, Method(compiler, "compile_grammar_ebnf"));
  DSLA_ASSIGN_OR_RETURN(f.bytes, Method("CompiledGrammar", "memory_size_bytes"));
  DSLA_ASSIGN_OR_RETURN(f.new_matcher, Method(matcher, "__ffi_init__"));
  DSLA_ASSIGN_OR_RETURN(f.accept, Method(matcher, "accept_token"));
  DSLA_ASSIGN_OR_RETURN(f.fill_mask, Method(matcher, "fill_next_token_bitmask"));
  return std::unique_ptr<XGrammar>(new XGrammar(std::move(functions)));
}

Status XGrammar::SetVocabulary(std::span<const std::string_view> tokens) {
  constexpr int kRaw = 0;  // VocabType.RAW: the bytes as they are
  std::vector<FfiValue> values;
  values.reserve(tokens.size());
  for (const std::string_view token : tokens) values.push_back(NewBytes(token));
  std::vector<TVMFFIAny> views;
  views.reserve(values.size());
  for (const FfiValue& value : values) views.push_back(value.view());
  const auto V = static_cast<int64_t>(tokens.size());
  DSLA_ASSIGN_OR_RETURN(const FfiValue all, CallWith(functions_->new_array, views));
  DSLA_ASSIGN_OR_RETURN(const FfiValue ends, Call(functions_->new_array, Int(V - 1)));
  DSLA_ASSIGN_OR_RETURN(
      const FfiValue tokenizer,
      Call(functions_->new_tokenizer, all.view(), Int(kRaw), Int(V), ends.view(), Bool(false)));
  // One thread, no cache of its own and no limit of one, all masks made at once.
  DSLA_ASSIGN_OR_RETURN(compiler_, Call(functions_->new_compiler, tokenizer.view(), Int(1),
                                        Bool(false), Int(-1), Bool(false)));
  return Status::Ok();
}

Expected<FfiValue> XGrammar::Compile(const GrammarSpec& spec) {
  const FfiValue text = NewString(spec.text);
  switch (spec.kind) {
    case GrammarSpec::Kind::kJsonSchema:
      return CompileSchema(text, /*closed=*/true);
    case GrammarSpec::Kind::kJsonObject:
      return CompileSchema(NewString(R"({"type":"object"})"), /*closed=*/false);
    case GrammarSpec::Kind::kRegex:
      return Call(functions_->compile_regex, compiler_.view(), text.view());
    case GrammarSpec::Kind::kEbnf:
      return CompileEbnf(text);
    case GrammarSpec::Kind::kStructuralTag: {
      DSLA_ASSIGN_OR_RETURN(const FfiValue grammar, Call(functions_->from_tag, text.view()));
      return CompileJson(grammar);
    }
  }
  return InvalidArgument("no such kind of grammar");
}

// closed: without properties that are not named, where it does not say otherwise.
Expected<FfiValue> XGrammar::CompileSchema(const FfiValue& schema, bool closed) {
  constexpr int kMostWhitespace = 20;  // in a row: what a small model may fall into has an end
  DSLA_ASSIGN_OR_RETURN(const FfiValue grammar,
                        Call(functions_->from_schema, schema.view(), Bool(true), kNone, kNone,
                             Bool(closed), Int(kMostWhitespace), Bool(false), Bool(false)));
  return CompileJson(grammar);
}

Expected<FfiValue> XGrammar::CompileEbnf(const FfiValue& text) {
  const FfiValue root = NewString("root");
  return Call(functions_->compile_ebnf, compiler_.view(), text.view(), root.view());
}

// XGrammar lets control characters into strings of bounded length, where JSON has none.
Expected<FfiValue> XGrammar::CompileJson(const FfiValue& grammar) {
  constexpr std::string_view kBounded = R"([^\"\\\r\n])", kValid = R"([^\0-\x1f\"\\\r\n])";
  DSLA_ASSIGN_OR_RETURN(const FfiValue printed, Call(functions_->to_string, grammar.view()));
  std::string text(TextOf(printed));
  size_t at = text.find(kBounded);
  if (at == text.npos) return Call(functions_->compile_grammar, compiler_.view(), grammar.view());
  for (; at != text.npos; at = text.find(kBounded, at + kValid.size()))
    text.replace(at, kBounded.size(), kValid);
  return CompileEbnf(NewString(text));
}

Expected<FfiValue> XGrammar::NewMatcher(const FfiValue& compiled) {
  return Call(functions_->new_matcher, compiled.view(), kNone, Bool(false), Int(-1), kNone);
}

Expected<int64_t> XGrammar::Bytes(const FfiValue& compiled) {
  DSLA_ASSIGN_OR_RETURN(const FfiValue bytes, Call(functions_->bytes, compiled.view()));
  return bytes.integer();
}

Expected<bool> XGrammar::Accept(const FfiValue& matcher, int32_t token) {
  DSLA_ASSIGN_OR_RETURN(const FfiValue accepted,
                        Call(functions_->accept, matcher.view(), Int(token), Bool(false)));
  return accepted.integer() != 0;
}

Status XGrammar::FillMask(const FfiValue& matcher, std::span<uint32_t> mask) {
  int64_t shape = static_cast<int64_t>(mask.size()), stride = 1;
  DLTensor tensor{};
  tensor.data = mask.data();
  tensor.device = {kDLCPU, 0};
  tensor.ndim = 1;
  tensor.dtype = {kDLInt, 32, 1};
  tensor.shape = &shape;
  tensor.strides = &stride;
  TVMFFIAny view{};
  view.type_index = kTVMFFIDLTensorPtr;
  view.v_ptr = &tensor;
  return Call(functions_->fill_mask, matcher.view(), view, Int(0), Bool(false)).status();
}

}  // namespace dsla
