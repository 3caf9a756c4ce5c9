#include "distill/distill.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>

#include "base/clock.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "distill/distill_run.h"
#include "distill/prepare.h"
#include "distill/report.h"
#include "distill/schedule.h"
#include "format/adapter.h"
#include "format/json.h"
#include "format/sha256.h"

namespace dsla {

Expected<DistillOutcome> Distill(const ExecContext& ctx, const ModelFile& model,
                                 const DistillJob& job) {
  return distill::Run(ctx, model, job).All();
}

namespace distill {
namespace {

namespace fs = std::filesystem;

// Below the window's own share at the start, so that the states get gradients but do not disturb.
constexpr float kClaimBelowWindow = 0.3f;

Expected<std::string> FileHash(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  Sha256 hash;
  hash.Update(file.bytes());
  return hash.HexDigest();
}

// FNV-1a over the bits, not negative.
int64_t HashOf(const std::vector<float>& values) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const float value : values) hash = (hash ^ std::bit_cast<uint32_t>(value)) * 0x100000001b3;
  return static_cast<int64_t>(hash >> 1);
}

// The first line in which two texts differ, of each: "a" and "b".
std::string FirstDifference(const std::string& a, const std::string& b) {
  size_t line = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()) && a[i] == b[i]; ++i)
    if (a[i] == '\n') line = i + 1;
  const auto at = [&](const std::string& text) {
    return line < text.size() ? text.substr(line, text.find('\n', line) - line) : std::string("-");
  };
  return fmt::format("there '{}', here '{}'", at(a), at(b));
}

}  // namespace

const std::vector<Run::Stage>& Run::AllStages() {
  static const std::vector<Stage> stages = {
      {"prepare", &Run::Prepare}, {"init", &Run::Init},         {"align", &Run::Align, true},
      {"order", &Run::Order},     {"chain", &Run::Chain, true}, {"evaluate", &Run::Evaluate},
      {"export", &Run::Export}};
  return stages;
}

Expected<DistillOutcome> Run::All() {
  DistillOutcome outcome;
  if (job_.ranks.ranks <= 1) return Stages(outcome);
  DSLA_ASSIGN_OR_RETURN(ranks_, Ranks::Join(job_.ranks));
  try {
    return Stages(outcome);
  } catch (const std::exception& error) {  // a rank that is gone leaves collectives so
    const std::string what = error.what();
    return Error(StatusCode::kUnavailable, "rank {} of {}: {}", ranks_->rank(), ranks_->size(),
                 what.substr(0, what.find('\n')));
  }
}

Expected<DistillOutcome> Run::Stages(DistillOutcome outcome) {
  DSLA_RETURN_IF_ERROR(Setup());
  bool known = job_.stage.empty();
  for (const Stage& stage : AllStages()) known = known || job_.stage == stage.name;
  if (!known)
    return InvalidArgument(
        "stage '{}' is not one of prepare, init, align, order, chain, evaluate, export",
        job_.stage);
  if (ranks_ != nullptr) DSLA_RETURN_IF_ERROR(NeedTokens());
  for (const Stage& stage : AllStages()) {
    if (!job_.stage.empty() && job_.stage != stage.name) continue;
    outcome.stage = stage.name;
    Status status;
    if (stage.together || Leads()) status = (this->*stage.run)();
    if (ranks_ != nullptr) {
      DSLA_RETURN_IF_ERROR(ranks_->Agree(status));
      stopped_ = ranks_->Max({stopped_ ? 1 : 0})[0] != 0;
    }
    DSLA_RETURN_IF_ERROR(status);
    if (stopped_) {
      log_->Say(fmt::format("stopped in {}; the same command goes on from here", stage.name));
      return outcome;
    }
  }
  outcome.finished = true;
  if (Leads()) DSLA_RETURN_IF_ERROR(WriteReport(work_));
  return outcome;
}

Status Run::Setup() {
  started_ = NowSeconds();
  if (job_.out.empty()) return InvalidArgument("no adapter file is named (--out)");
  DSLA_RETURN_IF_ERROR(CompleteConfig(model_.config(), &config_));
  if (ranks_ != nullptr) {
    const int longest = *std::max_element(config_.lengths.begin(), config_.lengths.end());
    if (config_.tokens_per_step / longest < ranks_->size())
      return InvalidArgument(
          "data.tokens_per_step: {} tokens are {} sequences of {}, fewer than the {} ranks",
          config_.tokens_per_step, config_.tokens_per_step / longest, longest, ranks_->size());
    if (config_.device == "cuda")
      config_.device = fmt::format("cuda:{}", std::max(0, job_.ranks.local_rank));
  }
  DSLA_ASSIGN_OR_RETURN(layout_, ParameterLayout::Create(model_.config(), config_.adapter));
  DSLA_ASSIGN_OR_RETURN(fingerprint_, model_.Fingerprint());
  work_ = job_.work.empty() ? job_.out + ".work" : job_.work;
  // Ranks other than 0 write nothing.
  if (Leads()) DSLA_RETURN_IF_ERROR(MakeDirectories(work_));
  DSLA_ASSIGN_OR_RETURN(
      RunLog log, RunLog::Open(Leads() ? Path("log.jsonl") : "/dev/null", job_.quiet || !Leads()));
  log_.emplace(std::move(log));
  if (Leads()) DSLA_RETURN_IF_ERROR(WriteFileAtomically(Path("config.toml"), WriteToml(config_)));
  return log_->Event("run", {{"model", model_.path()},
                             {"fingerprint", fingerprint_},
                             {"stage", job_.stage},
                             {"ranks", ranks_ == nullptr ? 1 : ranks_->size()},
                             {"parameters", layout_->size()}});
}

Status Run::InTurn(const std::function<Status()>& action) {
  Status status;
  if (Leads()) status = action();
  if (ranks_ == nullptr) return status;
  DSLA_RETURN_IF_ERROR(ranks_->Agree(status));
  return Leads() ? status : action();
}

bool Run::MustStop() const {
  return (job_.stop_after > 0 && NowSeconds() - started_ >= job_.stop_after) || Interrupted();
}

Status Run::Done(const char* stage, nlohmann::json fields) {
  fields["stage"] = stage;
  return log_->Event("done", std::move(fields));
}

std::string Run::SettingsOf(char letter) const {
  return fmt::format("model = {}\ndata = {}\nstart = {}\n{}", fingerprint_, data_hash_, job_.start,
                     StageSettings(config_, letter));
}

// The token file of these inputs: itself, or made from text unless it is there already.
Expected<std::string> Run::PrepareOne(const std::vector<std::string>& inputs, const char* name) {
  if (inputs.size() == 1 && TokenFile::Is(inputs[0])) return inputs[0];
  const std::string tokens = Path(fmt::format("{}.tokens", name));
  nlohmann::json sources = nlohmann::json::array();
  for (const std::string& input : inputs) {
    if (TokenFile::Is(input))
      return InvalidArgument("'{}' is a token file, which must be named alone", input);
    std::error_code error;
    const auto size = fs::file_size(input, error);
    const auto time = fs::last_write_time(input, error);
    if (error) return NotFound("cannot read '{}': {}", input, error.message());
    sources.push_back({{"path", fs::absolute(input).string()},
                       {"bytes", size},
                       {"time", time.time_since_epoch().count()}});
  }
  const std::string record = Path(fmt::format("{}.tokens.json", name)), text = sources.dump(1);
  if (fs::exists(tokens)) {
    const auto before = ReadTextFile(record, 16 << 20);
    if (before.ok() && *before == text) return tokens;
  }
  DSLA_ASSIGN_OR_RETURN(TokenizerData data, model_.ReadTokenizer());
  DSLA_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Create(std::move(data)));
  const double begin = NowSeconds();
  DSLA_ASSIGN_OR_RETURN(
      const PrepareResult result,
      PrepareTokens(ctx_, inputs, *tokenizer, tokens, [&](int64_t done, int64_t all) {
        const double share =
            static_cast<double>(done) / static_cast<double>(std::max<int64_t>(1, all));
        log_->Progress("prepare", share, fmt::format("{:.0f} MB", static_cast<double>(done) / 1e6),
                       SecondsLeft(NowSeconds() - begin, share));
      }));
  DSLA_RETURN_IF_ERROR(WriteFileAtomically(record, text));
  log_->Say(fmt::format("prepare: {} tokens in {} documents from {} files", result.tokens,
                        result.documents, inputs.size()));
  DSLA_RETURN_IF_ERROR(Done("prepare", {{"file", tokens},
                                        {"tokens", result.tokens},
                                        {"documents", result.documents},
                                        {"seconds", NowSeconds() - begin}}));
  return tokens;
}

Status Run::Prepare() { return NeedTokens(); }

Status Run::NeedTokens() {
  if (train_) return Status::Ok();
  if (job_.data.empty()) return InvalidArgument("no data files are named (--data)");
  std::string train, valid;
  DSLA_RETURN_IF_ERROR(InTurn([&]() -> Status {
    DSLA_ASSIGN_OR_RETURN(train, PrepareOne(job_.data, "train"));
    if (job_.valid.empty()) return Status::Ok();
    DSLA_ASSIGN_OR_RETURN(valid, PrepareOne(job_.valid, "valid"));
    return Status::Ok();
  }));
  DSLA_ASSIGN_OR_RETURN(train_tokens_, TokenFile::Open(train));
  DSLA_ASSIGN_OR_RETURN(data_hash_, FileHash(train));
  int64_t train_last = train_tokens_->documents();
  if (!job_.valid.empty()) {
    DSLA_ASSIGN_OR_RETURN(valid_tokens_, TokenFile::Open(valid));
    valid_last_ = valid_tokens_->documents();
  } else {
    // The last documents, a tenth at most. A single document serves for both, which is said.
    const int64_t n = train_tokens_->documents();
    const int64_t held = std::min<int64_t>(config_.held_out, n / 10 + (n > 1 ? 1 : 0));
    DSLA_ASSIGN_OR_RETURN(valid_tokens_, TokenFile::Open(train));
    held_out_ = held > 0;
    valid_first_ = held_out_ ? n - held : 0;
    valid_last_ = n;
    if (held_out_) train_last = n - held;
    if (!held_out_)
      log_->Say("one document alone: it is measured on what it is trained on (name --valid)");
  }
  for (const TokenFile* tokens : {&*train_tokens_, &*valid_tokens_})
    if (tokens->vocabulary() != model_.config().V)
      return InvalidArgument("'{}' was made with {} token ids, the model has {}", tokens->path(),
                             tokens->vocabulary(), model_.config().V);
  SamplerOptions options;
  options.seed = static_cast<uint64_t>(config_.seed);
  options.lengths = config_.lengths;
  options.length_shares = config_.length_shares;
  options.tokens_per_step = config_.tokens_per_step;
  options.separate = config_.documents == "separate";
  options.long_share = config_.long_share;
  options.recall_share = config_.recall_share;
  DSLA_ASSIGN_OR_RETURN(train_, Sampler::Create(*train_tokens_, 0, train_last, options));
  // Validation text comes again from its start where it is shorter than a sequence.
  options.lengths = {1};
  options.length_shares = {1};
  options.separate = false;
  DSLA_ASSIGN_OR_RETURN(valid_,
                        Sampler::Create(*valid_tokens_, valid_first_, valid_last_, options));
  return Status::Ok();
}

Status Run::NeedNetwork() {
  if (network_) return Status::Ok();
  NetworkOptions options;
  options.device = config_.device;
  options.dtype = config_.dtype;
  options.threads = config_.threads;
  options.ranks = ranks_.get();
  options.checkpoint_layers = config_.checkpoint_layers;
  DSLA_ASSIGN_OR_RETURN(network_, Network::Create(model_, *layout_, options));
  log_->Say(fmt::format("{} on {}: {} parameters a layer, {} layers", model_.config().name,
                        network_->device_name(), layout_->row(), layout_->layers()));
  return Status::Ok();
}

Expected<std::vector<float>> Run::ResultOf(const char* stage, char letter) {
  DSLA_ASSIGN_OR_RETURN(auto checkpoint, LoadCheckpoint(work_, stage));
  if (!checkpoint || !checkpoint->done)
    return InvalidArgument("'{}': the stage {} has not run to its end", work_, stage);
  if (checkpoint->settings != SettingsOf(letter))
    return InvalidArgument("'{}' was made with other settings ({}): name another --work", work_,
                           FirstDifference(checkpoint->settings, SettingsOf(letter)));
  if (static_cast<int64_t>(checkpoint->state.values.size()) != layout_->size())
    return DataLoss("'{}': checkpoint of {} parameters, expected {}", work_,
                    checkpoint->state.values.size(), layout_->size());
  return std::move(checkpoint->state.values);
}

Status Run::Init() {
  DSLA_RETURN_IF_ERROR(NeedTokens());
  if (ResultOf("init", 'i').ok()) return Status::Ok();
  // Not the time limit: init leaves nothing to go on from, and a run of short pieces would never be
  // past it.
  const auto stop = [this] { return stopped_ = Interrupted(); };
  if (stop()) return Status::Ok();
  DSLA_RETURN_IF_ERROR(NeedNetwork());
  std::vector<float> values;
  const TokenBatch batch =
      train_->Text(Stream::kStart, 0, std::max(1, config_.tokens_per_step / config_.lengths[0]),
                   config_.lengths[0]);
  if (!job_.start.empty() && config_.adapter.op != Operator::kDsla)
    return InvalidArgument("--start: the operator {} has no adapters", config_.op);
  if (!job_.start.empty()) {
    DSLA_ASSIGN_OR_RETURN(const auto adapter, Adapter::Open(job_.start, model_.config()));
    DSLA_RETURN_IF_ERROR(adapter->CheckBase(fingerprint_, model_.path()));
    DSLA_ASSIGN_OR_RETURN(values, layout_->FromAdapter(*adapter, job_.start));
  } else {
    values = layout_->Start(config_.half_lives, static_cast<uint64_t>(config_.seed));
    // With claims at zero the window would take everything and the states would get no gradient.
    if (const ParameterTensor* bias = layout_->Find("claim_bias"); bias != nullptr) {
      const auto lse = network_->MeanWindowLse(batch, stop);
      if (!lse) return Status::Ok();
      for (int l = 0; l < layout_->layers(); ++l)
        for (int64_t h = 0; h < bias->size; ++h)
          values[l * layout_->row() + bias->offset + h] =
              (*lse)[l * bias->size + h] - kClaimBelowWindow;
    }
  }
  // Without a denominator the output has any size; each head begins with the teacher's.
  if (const ParameterTensor* scale = layout_->Find("log_scale"); scale != nullptr) {
    network_->SetValues(values);
    const auto fit = network_->LogHeadScales(batch, stop);
    if (!fit) return Status::Ok();
    for (int l = 0; l < layout_->layers(); ++l)
      std::copy_n(fit->begin() + l * scale->size, scale->size,
                  values.begin() + l * layout_->row() + scale->offset);
  }
  network_->SetValues(values);
  Checkpoint checkpoint;
  checkpoint.stage = "init";
  checkpoint.settings = SettingsOf('i');
  checkpoint.done = true;
  checkpoint.state.values = std::move(values);
  DSLA_RETURN_IF_ERROR(SaveCheckpoint(checkpoint, work_, "init"));
  return Done("init", {{"alignment_error", network_->AlignmentError(batch)},
                       {"output_scales", network_->OutputScales(batch)},
                       {"teacher", network_->TeacherHash()}});
}

Status Run::CheckLosses(const Training& training, int64_t first_step,
                        const std::vector<double>& losses) const {
  for (size_t i = 0; i < losses.size(); ++i) {
    if (std::isfinite(losses[i])) continue;
    const int64_t step = first_step + static_cast<int64_t>(i);
    return Error(StatusCode::kInternal,
                 "{}: the loss is {} at step {} ({}; seed {}); the last good checkpoint stands in "
                 "'{}'",
                 training.stage, losses[i], step, train_->Origin(training.stream, step).text(),
                 config_.seed, work_);
  }
  return Status::Ok();
}

Status Run::Train(const Training& training, const std::vector<float>& start) {
  const std::string settings = SettingsOf(training.letter);
  DSLA_ASSIGN_OR_RETURN(std::optional<Checkpoint> saved, LoadCheckpoint(work_, training.stage));
  Checkpoint now;
  if (saved) {
    if (saved->settings != settings)
      return InvalidArgument("'{}' was made with other settings ({}): name another --work", work_,
                             FirstDifference(saved->settings, settings));
    if (saved->done) return Status::Ok();
    now = std::move(*saved);
    if (static_cast<int64_t>(now.state.values.size()) != layout_->size() ||
        static_cast<int>(now.state.steps.size()) != layout_->layers())
      return DataLoss("'{}': a checkpoint of another size", work_);
    log_->Say(
        fmt::format("{}: goes on from step {} of {}", training.stage, now.step, training.steps));
  }
  DSLA_RETURN_IF_ERROR(NeedNetwork());
  if (saved)
    network_->SetState(now.state);
  else
    network_->SetValues(start);
  now.stage = training.stage;
  now.settings = settings;
  now.steps = training.steps;

  const double seconds_before = now.seconds, begin = NowSeconds();
  const int64_t first_step = now.step;
  double last_save = begin, last_log = begin;
  int64_t logged = now.step, logged_tokens = now.tokens;
  double rate = 0, loss = 0;
  // Losses and parameters are numbers, or the last checkpoint stays.
  const auto save = [&](bool done) -> Status {
    DSLA_RETURN_IF_ERROR(CheckLosses(training, logged, network_->TakeLosses()));
    now.state = network_->State();
    for (const float value : now.state.values)
      if (!std::isfinite(value))
        return Error(StatusCode::kInternal,
                     "{}: a parameter is {} after step {} ({}; seed {}); the last good checkpoint "
                     "stands in '{}'",
                     training.stage, value, now.step - 1,
                     train_->Origin(training.stream, now.step - 1).text(), config_.seed, work_);
    now.done = done;
    now.seconds = seconds_before + NowSeconds() - begin;
    last_save = NowSeconds();
    if (ranks_ != nullptr) {  // rank 0's parameters are everybody's
      const int64_t hash = HashOf(now.state.values);
      if (ranks_->Max({hash, -hash}) != std::vector<int64_t>{hash, -hash})
        return Error(StatusCode::kInternal, "{}: the ranks' parameters differ after step {}",
                     training.stage, now.step - 1);
    }
    const Status saved_now = Leads() ? SaveCheckpoint(now, work_, training.stage) : Status::Ok();
    return ranks_ == nullptr ? saved_now : ranks_->Agree(saved_now);
  };
  while (now.step < training.steps) {
    const int64_t step = now.step;
    const UpdateOptions update = training.step(step);
    network_->Update(update);
    const BatchOrigin origin = train_->Origin(training.stream, step);
    ++now.step;
    now.tokens += int64_t{origin.rows} * origin.length;
    if (now.step - logged >= config_.log_every || now.step == training.steps) {
      const std::vector<double> losses = network_->TakeLosses();
      DSLA_RETURN_IF_ERROR(CheckLosses(training, logged, losses));
      const double time = NowSeconds();
      loss = 0;
      for (const double one : losses) loss += one / static_cast<double>(losses.size());
      rate = static_cast<double>(now.tokens - logged_tokens) / std::max(time - last_log, 1e-9);
      DSLA_RETURN_IF_ERROR(log_->Event("step", {{"stage", training.stage},
                                                {"step", now.step},
                                                {"steps", training.steps},
                                                {"tokens", now.tokens},
                                                {"loss", loss},
                                                {"lr", update.lr},
                                                {"tokens_per_second", rate}}));
      logged = now.step, logged_tokens = now.tokens, last_log = time;
    }
    const double elapsed = NowSeconds() - begin;
    log_->Progress(training.stage,
                   static_cast<double>(now.step) / static_cast<double>(training.steps),
                   logged == first_step ? fmt::format("step {} of {}", now.step, training.steps)
                                        : fmt::format("loss {:.4f}  {:.0f} tokens/s", loss, rate),
                   elapsed / static_cast<double>(now.step - first_step) *
                       static_cast<double>(training.steps - now.step));
    if (now.step == training.steps) break;
    bool stop = MustStop(), checkpoint = NowSeconds() - last_save >= config_.checkpoint_seconds;
    if (ranks_ != nullptr) {  // clocks differ: what one wants, all do
      const std::vector<int64_t> wanted = ranks_->Max({stop ? 1 : 0, checkpoint ? 1 : 0});
      stop = wanted[0] != 0, checkpoint = wanted[1] != 0;
    }
    if (stop) {
      stopped_ = true;
      return save(false);
    }
    if (checkpoint) {
      DSLA_RETURN_IF_ERROR(save(false));
      logged = now.step, logged_tokens = now.tokens, last_log = NowSeconds();
    }
  }
  DSLA_RETURN_IF_ERROR(save(true));
  log_->Say(fmt::format("{}: loss {:.4f} after {} tokens in {}", training.stage, loss, now.tokens,
                        FormatDuration(now.seconds)));
  return Done(training.stage, {{"tokens", now.tokens}, {"seconds", now.seconds}, {"loss", loss}});
}

Status Run::Align() {
  DSLA_RETURN_IF_ERROR(NeedTokens());
  DSLA_ASSIGN_OR_RETURN(const std::vector<float> start, ResultOf("init", 'i'));
  const int64_t steps =
      (config_.align_tokens + config_.tokens_per_step - 1) / config_.tokens_per_step;
  return Train({"align", 'a', Stream::kAlign, steps,
                [&](int64_t step) {
                  network_->Align(Own(train_->Training(Stream::kAlign, step)));
                  const double share =
                      LearningRateShare(step, steps, config_.warmup_steps, config_.lr_floor);
                  UpdateOptions update;
                  update.low_rank_lr = config_.align_low_rank_lr * share;
                  update.lr = config_.align_lr * share;
                  update.clip = config_.clip;
                  update.clip_per_layer = true;
                  return update;
                }},
               start);
}

Status Run::Chain() {
  DSLA_RETURN_IF_ERROR(NeedTokens());
  DSLA_RETURN_IF_ERROR(NeedOrder());
  DSLA_ASSIGN_OR_RETURN(const std::vector<float> start, ResultOf("align", 'a'));
  const int64_t steps =
      (config_.chain_tokens + config_.tokens_per_step - 1) / config_.tokens_per_step;
  const bool chained = config_.chain_method == "chained";
  const int L = model_.config().L;
  const LevelSampling sampling{L, config_.chain_levels, config_.chain_level_share,
                               config_.chain_switch_share};
  return Train({"chain", 'c', Stream::kChain, steps,
                [&](int64_t step) {
                  TokenBatch batch = train_->Training(Stream::kChain, step);
                  LevelDraw draw =
                      DrawLevel(sampling, static_cast<uint64_t>(config_.seed), step, batch.length);
                  int64_t turn_step = step, turn_steps = steps;
                  ChainStep chain;
                  if (chained) {  // each layer has its turn, with a schedule of its own
                    const int64_t turn = step * L / steps;
                    const int64_t turn_begin = (turn * steps + L - 1) / L;
                    turn_step = step - turn_begin;
                    turn_steps = ((turn + 1) * steps + L - 1) / L - turn_begin;
                    draw.level = static_cast<int>(turn) + 1;
                    chain.trained = {order_->ladder[turn]};
                  }
                  // A switch into padding would leave nothing to learn from.
                  if (!batch.counts.empty()) draw.switch_at = 0;
                  chain.converted = {order_->ladder.begin(), order_->ladder.begin() + draw.level};
                  chain.switch_at = draw.switch_at;
                  chain.kl_weight = config_.kl_weight;
                  chain.align_weight = config_.align_weight;
                  chain.cosine_weight = config_.cosine_weight;
                  network_->Chain(Own(std::move(batch)), chain);
                  const double share = LearningRateShare(turn_step, turn_steps,
                                                         config_.warmup_steps, config_.lr_floor);
                  UpdateOptions update;
                  update.low_rank_lr = config_.chain_low_rank_lr * share;
                  update.lr = config_.chain_lr * share;
                  update.clip = config_.clip;
                  return update;
                }},
               start);
}

Status Run::Export() {
  DSLA_RETURN_IF_ERROR(NeedTokens());
  DSLA_RETURN_IF_ERROR(NeedOrder());
  DSLA_ASSIGN_OR_RETURN(const std::vector<float> values, ResultOf("chain", 'c'));
  if (config_.adapter.op != Operator::kDsla) {
    log_->Say(fmt::format("the operator {} is a control: no adapter is written", config_.op));
    return Done("export");
  }
  Adapter adapter = layout_->ToAdapter(values);
  adapter.base_fingerprint = fingerprint_;
  adapter.base_name = fs::path(model_.path()).filename().string();
  adapter.ladder = order_->ladder;
  adapter.top_level = config_.top_level;
  DSLA_RETURN_IF_ERROR(SaveAdapter(adapter, job_.out, DType::kBF16));
  log_->Say(fmt::format("wrote {}", job_.out));
  return Done("export", {{"file", job_.out}});
}

}  // namespace distill
}  // namespace dsla
