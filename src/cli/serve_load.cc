// From the options to an API that answers: models, costs, engine, routes.
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <exception>
#include <filesystem>
#include <map>
#include <new>
#include <set>

#include "base/clock.h"
#include "base/memory_limit.h"
#include "cli/device_choice.h"
#include "cli/serve_program.h"
#include "engine/replicas.h"
#include "format/chat/chat_template.h"

namespace dsla {
namespace {

constexpr int kDefaultSequences = 8;  // full contexts that the default cache memory is for
// A GPU is only busy with many rows, and takes a few ms for them.
constexpr int kDeviceBatchTokens = 4096;
constexpr int kTextThreads = 2;  // for large texts
// They wait for the processes of grammars, several of which may be slow.
constexpr int kGrammarThreads = 16;

// What the machine, or the container, lets this process have.
int64_t MemoryLimit() {
  const int64_t physical = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  const int64_t limit = CgroupMemoryLimit();
  return limit > 0 ? std::min(limit, physical) : physical;
}

// With less, a server starts that can hold nothing: the least that is of use is a page of every
// layer, which is what one short sequence takes at level 0.
Status CheckMemory(const LoadedModel& model, const std::string& given, int sharers) {
  const CacheGeometry geometry = model.model->cache_geometry();
  const int64_t least = model.model->config().L * geometry.page_bytes();
  if (given.empty() || model.memory_bytes >= least) return Status::Ok();
  return InvalidArgument(
      "--memory: {}{} holds no sequence; one of up to {} tokens takes {} bytes ({}) at level 0",
      given, sharers > 1 ? fmt::format(", shared by {} replicas,", sharers) : "",
      geometry.page_size, least, FormatBytes(least));
}

// Of every replica. On a device the default is already no more than what is free there; on the CPU
// they share it.
Status SetMemory(const std::string& given, std::vector<LoadedModel>& models) {
  const bool on_cpu = models.front().model->device() == nullptr;
  const int sharers = on_cpu ? static_cast<int>(models.size()) : 1;
  int64_t bytes = models.front().memory_bytes;
  if (on_cpu && given.empty()) bytes = std::min(bytes, MemoryLimit() / 4);
  for (LoadedModel& model : models) model.memory_bytes = bytes / sharers;
  return CheckMemory(models.front(), given, sharers);
}

std::string DeviceName(const LoadedModel& model) {
  const Device* device = model.model->device();
  return device == nullptr ? "cpu" : device->name();
}

// Each once.
std::string DeviceNames(const std::vector<LoadedModel>& models) {
  std::set<std::string> names;
  for (const LoadedModel& model : models) names.insert(DeviceName(model));
  return fmt::format("{}", fmt::join(names, ", "));
}

// A model's name where none is given: of its file without the ending, or of its folder.
std::string NameOfPath(const std::string& path) {
  std::filesystem::path name = std::filesystem::path(path).lexically_normal();
  if (!name.has_filename()) name = name.parent_path();
  const std::string text =
      name.extension() == ".gguf" ? name.stem().string() : name.filename().string();
  return text.empty() ? "model" : text;
}

}  // namespace

void ServeProgram::Load() {
  try {
    load_status_ = LoadAll();
  } catch (const std::bad_alloc&) {
    load_status_ = ResourceExhausted("out of memory while the model was loaded and measured");
  } catch (const std::exception& error) {  // of a device
    load_status_ = Error(StatusCode::kInternal, "loading the model: {}", error.what());
  }
  loaded_.store(true);
  kill(getpid(), SIGUSR1);  // the main thread need not wait for its next look
}

Status ServeProgram::LoadAll() {
  DSLA_ASSIGN_OR_RETURN(models_, LoadReplicas(args_.model, args_.replicas, kDefaultSequences,
                                              args_.max_batch_tokens > 0 ? args_.max_batch_tokens
                                                                         : kDeviceBatchTokens));
  const Device* device = model().model->device();
  if (device != nullptr && args_.engine.deterministic) {
    return InvalidArgument(
        "--deterministic: its products are the CPU's alone (--device cpu), not {}'s",
        device->name());
  }
  DSLA_RETURN_IF_ERROR(SetMemory(args_.model.memory, models_));
  const AdapterInfo* adapter = model().model->adapter();
  model_name_ = args_.model_names.empty() ? NameOfPath(model().file->path()) : args_.model_names[0];
  ladder_.model = model_name_;
  if (adapter) {
    ladder_.adapter = adapter->id;
    ladder_.ladder = adapter->ladder;
    ladder_.top_level = adapter->top_level;
    ladder_.max_level = model().model->max_level();
  }
  std::vector<LogField> fields = {{"name", model_name_},
                                  {"path", model().file->path()},
                                  {"adapter", ladder_.adapter.empty() ? "none" : ladder_.adapter},
                                  {"context", int64_t{model().model->max_positions()}},
                                  {"cache_memory", FormatBytes(model().memory_bytes)},
                                  {"device", DeviceNames(models_)},
                                  {"threads", int64_t{model().ctx.threads}},
                                  {"seconds", model().load_seconds}};
  if (models_.size() > 1) fields.push_back({"replicas", static_cast<int64_t>(models_.size())});
  log_->Write(LogLevel::kInfo, "model", fields);
  DSLA_RETURN_IF_ERROR(SetPolicy());
  DSLA_RETURN_IF_ERROR(MakeEngine());
  return MakeApi();
}

Status ServeProgram::SetPolicy() {
  policy_ = args_.policy;
  policy_.layers = model().model->config().L;
  policy_.max_level = args_.max_level;
  if (args_.max_level < 0) {
    policy_.max_level = ladder_.top_level;
    if (policy_.policy == "fixed")
      policy_.max_level =
          std::max(policy_.max_level, std::min(policy_.fixed_level, ladder_.max_level));
  } else if (args_.max_level > ladder_.max_level) {
    return InvalidArgument("--max-level: {} is above the highest level, {}{}", args_.max_level,
                           ladder_.max_level,
                           ladder_.adapter.empty() ? ": there is no adapter" : "");
  }
  if (policy_.policy == "fixed" && policy_.fixed_level > policy_.max_level) {
    return InvalidArgument("--level: {} is above the highest level, {}{}", policy_.fixed_level,
                           policy_.max_level,
                           ladder_.adapter.empty() ? ": there is no adapter" : "");
  }
  return Status::Ok();
}

// A cost model for each replica, measured once for those on devices of one kind.
Expected<std::vector<ServeCost>> ServeProgram::MeasureCosts() {
  std::map<std::string, ServeCost> known;  // by kind
  std::vector<ServeCost> costs;
  for (const LoadedModel& of : models_) {
    const Device* device = of.model->device();
    const std::string kind = device == nullptr ? "cpu" : KindOf(*device);
    if (!known.empty() && !known.contains(kind) && !args_.cost_model.empty()) {
      return InvalidArgument("--cost-model: a file is of one kind of device, and these are {}",
                             DeviceNames(models_));
    }
    if (!known.contains(kind)) {
      // Whatever the policy at the start, an administrator may change to slo.
      const double start = NowSeconds();
      DSLA_ASSIGN_OR_RETURN(
          ServeCost cost,
          CostForServing(of, {.top_level = std::max(policy_.max_level, ladder_.top_level),
                              .file = args_.cost_model,
                              // Random weights are known by their path alone.
                              .keep = args_.calibration == "auto" && !args_.model.random_weights,
                              .version = kServerVersion,
                              .simd = args_.model.simd}));
      if (!cost.problem.empty())
        log_->Write(LogLevel::kWarning, "cost_model_file", {{"message", cost.problem}});
      const bool measured = cost.cost.source == CostSource::kMeasured;
      log_->Write(LogLevel::kInfo, measured ? "calibrated" : "cost_model_read",
                  {{"cost", cost.cost.model.Summary()},
                   {"file", cost.file.path.empty() ? "none" : cost.file.path},
                   {"seconds", NowSeconds() - start}});
      known.emplace(kind, std::move(cost));
    }
    costs.push_back(known.at(kind));
  }
  return costs;
}

Status ServeProgram::MakeEngine() {
  EngineOptions options = args_.engine;
  if (args_.max_batch_tokens > 0) {
    options.max_batch_tokens = args_.max_batch_tokens;
  } else if (model().model->device() != nullptr) {
    options.max_batch_tokens = kDeviceBatchTokens;
  }
  options.memory_bytes = model().memory_bytes;
  options.prefix_cache = !args_.no_prefix_cache;
  options.default_max_level = policy_.max_level;
  policy_.slo.prefill_chunk = options.max_batch_tokens;
  DSLA_RETURN_IF_ERROR(  // before the time that measuring takes
      CheckOptions(options, ladder_.max_level, model().model->cache_geometry().page_size));
  if (ladder_.max_level == 0) {
    if (policy_.policy != "fixed") policy_.fixed_level = 0;
    policy_.policy = "fixed";  // there is nothing to decide, and nothing to measure for it
  } else {
    DSLA_ASSIGN_OR_RETURN(costs_, MeasureCosts());
    policy_.cost = costs_.front().cost;
  }
  const bool one = models_.size() == 1;
  if (!one) {
    options.queue = std::make_shared<QueueBound>(options.max_queued, options.max_queued_tokens);
  }
  std::vector<Replica> replicas;
  for (size_t r = 0; r < models_.size(); ++r) {
    const LoadedModel& of = models_[r];
    PolicyOptions policy_options = policy_;
    if (!costs_.empty()) policy_options.cost = costs_[r].cost;
    DSLA_ASSIGN_OR_RETURN(std::unique_ptr<LevelPolicy> policy, MakePolicy(policy_options));
    DSLA_ASSIGN_OR_RETURN(auto engine, Engine::Create(of.model.get(), of.tokenizer.get(), of.ctx,
                                                      options, std::move(policy)));
    replicas.push_back({.engine = std::move(engine), .device = DeviceName(of)});
  }
  const int most = replicas.front().engine->state().max_running;
  const int block = options.prefix_cache ? model().model->cache_geometry().page_size : 0;
  engine_ = one ? std::move(replicas.front().engine)
                : JoinReplicas(std::move(replicas), options.queue, {.block_tokens = block});
  if (most < options.max_running) {
    log_->Write(LogLevel::kWarning, "max_running_lowered",
                {{"asked", int64_t{options.max_running}},
                 {"used", int64_t{most}},
                 {"message", fmt::format("--max-running: a step of {} tokens (--max-batch-tokens) "
                                         "holds so many replies beside a piece of a prompt",
                                         options.max_batch_tokens)}});
  }
  return Status::Ok();
}

// Tools need the model file's own template, and to know how the model writes its calls.
void ServeProgram::ChooseTools(openai::ApiContext* context) {
  if (args_.tool_parser == "none") {
    context->no_tools = "this server runs without tools (--tool-parser none)";
    return;
  }
  if (!args_.chat_template.empty()) {
    context->no_tools =
        fmt::format("the chat template {} has no place for tools", args_.chat_template);
    return;
  }
  auto made = ModelTemplate::ForTools(model().file->tool_chat_template());
  if (!made.ok()) {
    context->no_tools = made.status().message();
    return;
  }
  context->tool_dialect =
      args_.tool_parser == "auto" ? made->dialect() : ToolDialectByName(args_.tool_parser);
  if (!context->tool_dialect)
    context->no_tools =
        "the model's chat template does not show how it writes calls of tools; name it with "
        "--tool-parser";
  context->tool_template = std::move(made).value();
}

Status ServeProgram::MakeApi() {
  metrics_ = std::make_unique<ServerMetrics>(
      MetricsOptions{.model = model_name_,
                     .version = kServerVersion,
                     .vllm_compat = args_.metrics_compat == "vllm"});
  engine_->SetFinishObserver([this](const RequestResult& result) {
    metrics_->ObserveRequest(result);
    engine_log_.OnFinish(result);
  });
  std::vector<MeasuredCost> costs;
  for (const ServeCost& cost : costs_) costs.push_back(cost.cost);
  control_ = std::make_unique<DslaControl>(engine_.get(), ladder_, policy_, std::move(costs));

  openai::ApiContext context;
  context.engine = engine_.get();
  context.tokenizer = model().tokenizer.get();
  context.chat_template_source = model().file->chat_template();
  if (!args_.chat_template.empty()) {
    DSLA_ASSIGN_OR_RETURN(context.chat_template, ChatTemplateByName(args_.chat_template));
  } else if (context.chat_template_source.empty()) {
    context.no_chat_template = "the model file has none, and no --chat-template was given";
  } else {
    auto chosen = ChoosePromptTemplate(context.chat_template_source);
    if (chosen.ok()) {
      log_->Write(LogLevel::kInfo, "chat_template", {{"name", NameOf(*chosen)}});
      context.chat_template = std::move(chosen).value();
    } else {
      context.no_chat_template = chosen.status().message();
      log_->Write(LogLevel::kWarning, "no_chat_template", {{"message", context.no_chat_template}});
    }
  }
  ChooseTools(&context);
  context.model_names = args_.model_names;
  if (context.model_names.empty()) context.model_names = {model_name_};
  context.model_root = model().file->path();
  context.ladder = ladder_;
  context.limits.max_context = model().model->max_positions();
  context.limits.max_choices = args_.engine.max_queued;
  DSLA_ASSIGN_OR_RETURN(context.limits.default_tier, TierOf(args_.default_tier));
  if (context.limits.default_tier == Tier::kEconomy && ladder_.max_level == 0)
    return InvalidArgument("--default-tier: economy needs an adapter, and there is none");
  context.limits.sampling = SamplingDefaults();
  WarnOfSmallCache(context.limits.default_tier);
  context.default_timeout = args_.request_timeout;
  context.max_in_flight = args_.max_in_flight;
  context.version = kServerVersion;
  context.metrics = metrics_.get();
  context.control = control_.get();
  text_pool_ = std::make_unique<openai::TaskPool>(kTextThreads);
  context.text_pool = text_pool_.get();
  GrammarOptions grammars;
  if (context.tool_dialect) {
    for (const ToolMarker& marker : ToolMarkers(*context.tool_dialect, *context.tokenizer))
      grammars.control_tokens.push_back(marker.id);
  }
  grammars_ = GrammarCompiler::Create(*model().tokenizer, model().model->config().V, grammars);
  context.grammars = grammars_.get();
  grammar_pool_ = std::make_unique<openai::TaskPool>(kGrammarThreads);
  context.grammar_pool = grammar_pool_.get();

  const std::shared_ptr<Router> router = NewRouter();
  openai::RegisterApi(*router, std::move(context));
  if (args_.open_metrics) router->SetAccess("GET", "/metrics", Access::kOpen);
  access_log_.SetMetrics(metrics_.get());
  health_.SetEngine(engine_.get());
  server_->SetRouter(router);
  health_.SetPhase(Phase::kServing);
  server_->SetPhase(Phase::kServing);
  log_->Write(
      LogLevel::kInfo, "ready",
      {{"url", Url()}, {"policy", policy_.policy}, {"max_level", int64_t{policy_.max_level}}});
  return Status::Ok();
}

// Of requests that do not say theirs; the log has what the model advises of it.
SamplingParams ServeProgram::SamplingDefaults() const {
  const SamplingAdvice& advice = model().model->config().sampling;
  std::vector<LogField> fields;
  for (const auto& [name, value] : advice.Given()) fields.push_back({name, value});
  if (!fields.empty() && args_.sampling.generation_config == "auto")
    log_->Write(LogLevel::kInfo, "generation_config", fields);
  return args_.sampling.With(advice);
}

// Clients see the context's length, and are refused from the cache's on.
void ServeProgram::WarnOfSmallCache(Tier tier) {
  // Of a prompt of one token and its reply.
  const auto longest = [&](Tier of) { return 1 + engine_->LongestReply(1, of, 0); };
  const int context = model().model->max_positions();
  if (longest(Tier::kFull) >= context) return;
  log_->Write(LogLevel::kWarning, "small_cache",
              {{"message", fmt::format("--memory: {} hold no request of the whole context, {} "
                                       "tokens: at most {} at level 0 and {} in tier {}",
                                       FormatBytes(model().memory_bytes), context,
                                       longest(Tier::kFull), longest(tier), Name(tier))}});
}

}  // namespace dsla
