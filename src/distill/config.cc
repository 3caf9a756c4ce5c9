#include "distill/config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <set>
#include <string_view>

namespace dsla {
namespace {

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};

template <typename T>
bool ParseNumber(std::string_view text, T* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

template <typename T>
bool ParseList(std::string_view text, std::vector<T>* values) {
  values->clear();
  if (text.empty()) return true;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    T value;
    if (!ParseNumber(text.substr(begin, comma - begin), &value)) return false;
    values->push_back(value);
    begin = comma + 1;
  }
  return true;
}

constexpr std::string_view kStages = "iaoce";

std::vector<int> Quarters(int L) {
  std::set<int> levels;
  for (int quarter = 1; quarter <= 4; ++quarter) levels.insert(std::max(1, L * quarter / 4));
  return {levels.begin(), levels.end()};
}

}  // namespace

std::string ConfigKey::flag() const {
  std::string flag = "--" + name;
  std::replace_if(
      flag.begin() + 2, flag.end(), [](char c) { return c == '.' || c == '_'; }, '-');
  return flag;
}

std::vector<ConfigKey> ConfigKeys(DistillConfig& c) {
  const std::string all = "iaoce", training = "aoce", from_chain = "ce", order = "oce";
  return {
      {"adapter.operator", "",
       "dsla; or, as controls that cannot be exported, window (no states) or paper (its own "
       "operator)",
       &c.op, all},
      {"adapter.window", "tokens", "last tokens kept in exact attention, 0: none",
       &c.adapter.window, all},
      {"adapter.sinks", "tokens", "first tokens kept in exact attention", &c.adapter.sinks, all},
      {"adapter.states", "", "2: history and recency, 1: history alone", &c.adapter.states, all},
      {"adapter.features_per_channel", "", "features of a state for each channel of a head, 1 or 2",
       &c.adapter.features_per_channel, all},
      {"adapter.rank", "", "of the low-rank deltas on W_q and W_o, 0: none", &c.adapter.rank, all},
      {"adapter.gate_floor", "nats", "smallest log gate, -2.5 or more", &c.adapter.gate_floor, all},
      {"adapter.top_level", "layers", "highest level recommended, 0: three quarters", &c.top_level,
       "e"},
      {"init.history_min", "tokens", "shortest half-life that history gates start with",
       &c.half_lives.history_min, all},
      {"init.history_max", "tokens", "longest one", &c.half_lives.history_max, all},
      {"init.recency_min", "tokens", "shortest half-life that recency gates start with",
       &c.half_lives.recency_min, all},
      {"init.recency_max", "tokens", "longest one", &c.half_lives.recency_max, all},
      {"data.lengths", "tokens", "lengths of training sequences", &c.lengths, training},
      {"data.length_shares", "", "share of the steps that each length gets", &c.length_shares,
       training},
      {"data.tokens_per_step", "tokens", "of one optimiser step", &c.tokens_per_step, training},
      {"data.documents", "",
       "concatenate: sequences run over document ends; separate: one document a sequence",
       &c.documents, training},
      {"data.long_share", "",
       "share of sequences of 2048 tokens or more that lie in one long document", &c.long_share,
       training},
      {"data.recall_share", "", "share of steps with copies, key-value pairs and needles",
       &c.recall_share, training},
      {"data.held_out", "documents", "kept for validation where no file is named for it",
       &c.held_out, training},
      {"align.tokens", "tokens", "length of the stage", &c.align_tokens, training},
      {"align.low_rank_lr", "", "learning rate of the low-rank deltas", &c.align_low_rank_lr,
       training},
      {"align.lr", "", "learning rate of everything else", &c.align_lr, training},
      {"order.method", "", "greedy, entropy, given, random or uniform", &c.order_method, order},
      {"order.layers", "", "for given: all layers, least sensitive first", &c.order_layers, order},
      {"order.sequences", "", "sequences to measure on, a quarter of them recall",
       &c.order_sequences, order},
      {"order.length", "tokens", "of each", &c.order_length, order},
      {"order.candidates", "layers", "tried for each rung: those that cost least alone",
       &c.order_candidates, order},
      {"chain.method", "",
       "nested: a level is drawn each step; chained: one layer after another, then frozen",
       &c.chain_method, from_chain},
      {"chain.tokens", "tokens", "length of the stage", &c.chain_tokens, from_chain},
      {"chain.low_rank_lr", "", "learning rate of the low-rank deltas", &c.chain_low_rank_lr,
       from_chain},
      {"chain.lr", "", "learning rate of everything else", &c.chain_lr, from_chain},
      {"chain.levels", "layers",
       "levels drawn more often, empty: half, three quarters and, six times as often, all",
       &c.chain_levels, from_chain},
      {"chain.level_share", "", "share of the steps at those levels, the rest at any",
       &c.chain_level_share, from_chain},
      {"chain.switch_share", "", "share of the steps that switch from the teacher on the way",
       &c.chain_switch_share, from_chain},
      {"chain.kl_weight", "", "weight of KL(teacher || hybrid)", &c.kl_weight, from_chain},
      {"chain.align_weight", "", "weight of the converted layers' normalised errors",
       &c.align_weight, from_chain},
      {"chain.cosine_weight", "", "lambda of cos(G_history, G_recency)", &c.cosine_weight,
       from_chain},
      {"evaluate.levels", "layers", "levels to measure, empty: the quarters", &c.evaluate_levels,
       "e"},
      {"evaluate.documents", "documents", "at most so many are measured", &c.evaluate_documents,
       "e"},
      {"evaluate.length", "tokens", "of each; shorter documents are left out", &c.evaluate_length,
       "e"},
      {"evaluate.recall", "sequences", "of each kind of recall", &c.evaluate_recall, "e"},
      {"run.seed", "", "of the start, the batches and the random order", &c.seed, all},
      {"run.device", "", "cpu, cuda or cuda:N", &c.device, ""},
      {"run.dtype", "", "of products: auto (bf16 on a GPU), fp32 or bf16", &c.dtype, all},
      {"run.threads", "", "CPU threads, 0: all cores", &c.threads, ""},
      {"run.warmup_steps", "steps", "of rising learning rate", &c.warmup_steps, training},
      {"run.lr_floor", "", "share of the learning rate that is left at the end", &c.lr_floor,
       training},
      {"run.clip", "", "largest norm of the gradient (align: of each layer's), 0: none", &c.clip,
       training},
      {"run.checkpoint_layers", "layers",
       "run again together in chain's backward pass instead of kept, 0: all are kept",
       &c.checkpoint_layers, ""},
      {"run.log_every", "steps", "between lines of the log", &c.log_every, ""},
      {"run.checkpoint_seconds", "s", "between checkpoints", &c.checkpoint_seconds, ""},
  };
}

std::string ValueText(const ConfigKey& key) {
  return std::visit(Overloaded{[](const std::string* v) { return fmt::format("\"{}\"", *v); },
                               [](const double* v) {
                                 std::string text = fmt::format("{}", *v);
                                 if (text.find_first_of(".en") == std::string::npos) text += ".0";
                                 return text;
                               },
                               [](const auto* v) { return fmt::format("{}", *v); }},
                    key.value);
}

Status SetFromText(const ConfigKey& key, const std::string& text) {
  const bool ok = std::visit(
      [&]<typename T>(T* value) {
        T parsed{};
        if constexpr (std::is_same_v<T, std::string>) {
          parsed = text;
        } else if constexpr (std::is_arithmetic_v<T>) {
          if (!ParseNumber(text, &parsed) || !std::isfinite(static_cast<double>(parsed)))
            return false;
        } else if (!ParseList(text, &parsed)) {
          return false;
        }
        *value = std::move(parsed);  // what is refused changes nothing
        return true;
      },
      key.value);
  if (ok) return Status::Ok();
  const char* kind = std::visit(
      Overloaded{[](std::vector<int>*) { return "a list such as 8,15"; },
                 [](std::vector<double>*) { return "a list such as 0.5,0.5"; },
                 [](double*) { return "a number"; }, [](auto*) { return "a whole number"; }},
      key.value);
  return InvalidArgument("{}: '{}' is not {}", key.flag(), text, kind);
}

std::string WriteToml(const DistillConfig& config) {
  DistillConfig copy = config;
  std::string text, table;
  for (const ConfigKey& key : ConfigKeys(copy)) {
    const size_t dot = key.name.find('.');
    if (key.name.substr(0, dot) != table) {
      table = key.name.substr(0, dot);
      text += fmt::format("{}[{}]\n", text.empty() ? "" : "\n", table);
    }
    text += fmt::format("{} = {}  # {}{}\n", key.name.substr(dot + 1), ValueText(key),
                        key.unit.empty() ? "" : key.unit + ": ", key.help);
  }
  return text;
}

Status ApplyRecipe(const std::string& name, DistillConfig* config) {
  if (name == "default") return Status::Ok();
  if (name != "paper" && name != "paper-operator")
    return InvalidArgument("recipe '{}' is not one of default, paper, paper-operator", name);
  if (name == "paper-operator") config->op = "paper";
  config->adapter.window = 0;
  config->adapter.sinks = 0;
  config->adapter.states = 2;
  config->adapter.features_per_channel = 1;
  config->half_lives.recency_min = 2;
  config->half_lives.recency_max = 64;
  config->order_method = "entropy";
  config->chain_method = "chained";
  config->chain_switch_share = 0;
  config->recall_share = 0;
  config->kl_weight = 1;
  config->align_weight = 0;
  config->cosine_weight = 0.01;
  return Status::Ok();
}

Status CompleteConfig(const ModelConfig& model, DistillConfig* config) {
  DistillConfig& c = *config;
  const auto check = [](bool ok, const char* key, const std::string& rule) {
    return ok ? Status::Ok() : InvalidArgument("{}: {}", key, rule);
  };
  const auto share = [&](const char* key, double value) {
    return check(value >= 0 && value <= 1, key, fmt::format("{} is not in 0 to 1", value));
  };
  const auto one_of = [&](const char* key, const std::string& value,
                          std::initializer_list<const char*> allowed) {
    return check(std::find(allowed.begin(), allowed.end(), value) != allowed.end(), key,
                 fmt::format("'{}' is not one of {}", value, fmt::join(allowed, ", ")));
  };
  const auto levels = [&](const char* key, std::vector<int>& list) {
    if (list.empty()) list = Quarters(model.L);
    for (const int level : list)
      if (level < 1 || level > model.L)
        return InvalidArgument("{}: {} is not in 1 to {}", key, level, model.L);
    return Status::Ok();
  };
  DSLA_RETURN_IF_ERROR(one_of("adapter.operator", c.op, {"dsla", "window", "paper"}));
  c.adapter.op = c.op == "dsla"     ? Operator::kDsla
                 : c.op == "window" ? Operator::kWindow
                                    : Operator::kPaper;
  if (c.op == "window") {
    DSLA_RETURN_IF_ERROR(check(c.adapter.window > 0, "adapter.window", "the operator is a window"));
    DSLA_RETURN_IF_ERROR(
        check(c.cosine_weight == 0, "chain.cosine_weight", "the operator window has no gates"));
  }
  if (c.op == "paper") {
    DSLA_RETURN_IF_ERROR(
        check(c.adapter.window == 0, "adapter.window", "the paper's operator has none"));
    DSLA_RETURN_IF_ERROR(check(c.adapter.features_per_channel == 1, "adapter.features_per_channel",
                               "the paper's operator has no feature map"));
    DSLA_RETURN_IF_ERROR(check(c.chain_switch_share == 0, "chain.switch_share",
                               "the paper's operator cannot be folded from a KV cache"));
  }
  if (c.top_level == 0) c.top_level = std::max(1, model.L * 3 / 4);
  DSLA_RETURN_IF_ERROR(check(c.top_level > 0 && c.top_level <= model.L, "adapter.top_level",
                             fmt::format("{} is not in 1 to {}", c.top_level, model.L)));
  if (c.chain_levels.empty()) {
    c.chain_levels = Quarters(model.L);
    if (c.chain_levels.size() > 1) c.chain_levels.erase(c.chain_levels.begin());
    c.chain_levels.insert(c.chain_levels.end(), 5, model.L);  // the last layers cost the most
  }
  DSLA_RETURN_IF_ERROR(levels("chain.levels", c.chain_levels));
  DSLA_RETURN_IF_ERROR(levels("evaluate.levels", c.evaluate_levels));
  DSLA_RETURN_IF_ERROR(share("data.long_share", c.long_share));
  DSLA_RETURN_IF_ERROR(share("data.recall_share", c.recall_share));
  DSLA_RETURN_IF_ERROR(share("chain.level_share", c.chain_level_share));
  DSLA_RETURN_IF_ERROR(share("chain.switch_share", c.chain_switch_share));
  DSLA_RETURN_IF_ERROR(share("run.lr_floor", c.lr_floor));
  DSLA_RETURN_IF_ERROR(one_of("data.documents", c.documents, {"concatenate", "separate"}));
  DSLA_RETURN_IF_ERROR(
      one_of("order.method", c.order_method, {"greedy", "entropy", "given", "random", "uniform"}));
  DSLA_RETURN_IF_ERROR(one_of("chain.method", c.chain_method, {"nested", "chained"}));
  DSLA_RETURN_IF_ERROR(check(!c.lengths.empty() && c.lengths.size() == c.length_shares.size(),
                             "data.length_shares", "not one for each of data.lengths"));
  for (const int length : c.lengths) {
    DSLA_RETURN_IF_ERROR(check(
        length >= 16 && length <= c.tokens_per_step, "data.lengths",
        fmt::format("{} is not in 16 to data.tokens_per_step ({})", length, c.tokens_per_step)));
    DSLA_RETURN_IF_ERROR(
        check(length <= model.max_position, "data.lengths",
              fmt::format("{} is over the model's context of {}", length, model.max_position)));
  }
  for (const double value : c.length_shares)
    DSLA_RETURN_IF_ERROR(share("data.length_shares", value));
  DSLA_RETURN_IF_ERROR(
      check(std::accumulate(c.length_shares.begin(), c.length_shares.end(), 0.0) > 0,
            "data.length_shares", "all are 0"));
  if (c.order_method == "given") {
    std::vector<int> sorted = c.order_layers;
    std::sort(sorted.begin(), sorted.end());
    bool permutation = static_cast<int>(sorted.size()) == model.L;
    for (int l = 0; permutation && l < model.L; ++l) permutation = sorted[l] == l;
    DSLA_RETURN_IF_ERROR(check(permutation, "order.layers",
                               fmt::format("not each of the layers 0 to {} once", model.L - 1)));
  }
  const HalfLives& h = c.half_lives;
  DSLA_RETURN_IF_ERROR(check(h.history_min > 0 && h.history_min <= h.history_max &&
                                 h.recency_min > 0 && h.recency_min <= h.recency_max,
                             "init", "half-lives must be positive, the shortest first"));
  for (const auto& [key, value] : {std::pair{"align.tokens", c.align_tokens},
                                   {"chain.tokens", c.chain_tokens},
                                   {"order.sequences", int64_t{c.order_sequences}},
                                   {"order.candidates", int64_t{c.order_candidates}},
                                   {"evaluate.documents", int64_t{c.evaluate_documents}},
                                   {"run.log_every", int64_t{c.log_every}},
                                   {"data.held_out", int64_t{c.held_out}}})
    DSLA_RETURN_IF_ERROR(check(value > 0, key, fmt::format("{} is not positive", value)));
  for (const auto& [key, value] : {std::pair{"align.lr", c.align_lr},
                                   {"align.low_rank_lr", c.align_low_rank_lr},
                                   {"chain.lr", c.chain_lr},
                                   {"chain.low_rank_lr", c.chain_low_rank_lr},
                                   {"chain.kl_weight", c.kl_weight},
                                   {"chain.align_weight", c.align_weight},
                                   {"chain.cosine_weight", c.cosine_weight},
                                   {"run.clip", c.clip},
                                   {"run.warmup_steps", double(c.warmup_steps)},
                                   {"run.checkpoint_layers", double(c.checkpoint_layers)},
                                   {"evaluate.recall", double(c.evaluate_recall)},
                                   {"run.threads", double(c.threads)},
                                   {"run.checkpoint_seconds", c.checkpoint_seconds}})
    DSLA_RETURN_IF_ERROR(check(value >= 0, key, fmt::format("{} is negative", value)));
  for (int* length : {&c.order_length, &c.evaluate_length}) {
    const char* key = length == &c.order_length ? "order.length" : "evaluate.length";
    DSLA_RETURN_IF_ERROR(check(*length >= 16, key, fmt::format("{} is under 16", *length)));
    *length = std::min(*length, model.max_position);
  }
  return Status::Ok();
}

std::string StageSettings(const DistillConfig& config, char stage) {
  DistillConfig copy = config;
  const size_t upto = kStages.find(stage);
  DSLA_CHECK(upto != std::string_view::npos);
  std::string text;
  for (const ConfigKey& key : ConfigKeys(copy)) {
    // What a later stage alone depends on does not touch this one.
    const bool matters = std::any_of(key.stages.begin(), key.stages.end(),
                                     [&](char s) { return kStages.find(s) <= upto; });
    if (matters) text += fmt::format("{} = {}\n", key.name, ValueText(key));
  }
  return text;
}

}  // namespace dsla
