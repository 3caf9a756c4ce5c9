#include "model/cuda/cuda_model.h"

#include <algorithm>
#include <span>
#include <utility>

#include "ops/attention/cuda/attention_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"
#include "ops/sampling/cuda/sampling_cuda.h"

namespace dsla::cuda {
namespace {

static_assert(kMostTop == kMostDeviceTop);

// Rows of logits that are on the GPU at once in a step that is not replayed.
constexpr int64_t kTileRows = 64;

// Graphs are captured for these numbers of rows; a step takes the next larger one.
int Bucket(int rows) {
  if (rows <= 2) return rows;
  int bucket = 4;
  while (bucket < rows) bucket += bucket < 16 ? 4 : bucket < 64 ? 16 : 64;
  return bucket;
}

// Of a step that is replayed: room for the edits of some 200 rows with a thousand tokens each, so
// that graphs are seldom made anew because their tables have moved.
constexpr int64_t kLeastTableBytes = int64_t{4} << 20;

TokenChoice ChoiceOf(const RowChoice& choice) {
  return {.token = choice.token, .logprob = choice.logprob, .broken = choice.broken != 0};
}

bool SameViews(const CacheViews& a, const CacheViews& b) {
  return a.pages.k == b.pages.k && a.pages.v == b.pages.v && a.slots.base == b.slots.base;
}

}  // namespace

CudaModel::CudaModel(int device, cudaStream_t stream, std::shared_ptr<Gemm> gemm,
                     DeviceModelSpec spec, std::shared_ptr<const CudaWeights> weights,
                     std::shared_ptr<const CudaAdapter> adapter)
    : device_(device),
      stream_(stream),
      gemm_(std::move(gemm)),
      spec_(std::move(spec)),
      weights_(std::move(weights)),
      adapter_(std::move(adapter)) {
  spec_.adapter = nullptr;  // the caller's; what is needed of it has been copied
  spec_.rope_cos = spec_.rope_sin = nullptr;
  for (cudaEvent_t* const event : {&tables_sent_, &steps_[0].done, &steps_[1].done})
    Check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
  for (Begun& step : steps_)
    for (cudaEvent_t& part : step.parts) Check(cudaEventCreate(&part), "creating an event");
  choices_.Grow(kMostChoices * int64_t{sizeof(RowChoice)});
}

CudaModel::~CudaModel() {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  DropGraphs();
  for (const cudaEvent_t event : {tables_sent_, steps_[0].done, steps_[1].done})
    cudaEventDestroy(event);
  for (const Begun& step : steps_)
    for (const cudaEvent_t part : step.parts) cudaEventDestroy(part);
}

Expected<std::unique_ptr<DeviceModel>> CudaModel::WithAdapter(const DeviceModelSpec& spec) const {
  cudaSetDevice(device_);
  DSLA_RETURN_IF_ERROR(CheckAdapter(spec));
  try {
    return std::unique_ptr<DeviceModel>(new CudaModel(device_, stream_, gemm_, spec, weights_,
                                                      UploadAdapter(spec, *weights_, stream_)));
  } catch (const std::bad_alloc&) {
    return ResourceExhausted("out of GPU memory while an adapter was copied");
  } catch (const DeviceError& error) {
    return Error(StatusCode::kInternal, "{}", error.what());
  }
}

int64_t CudaModel::weight_bytes(int level) const {
  int64_t bytes = weights_->step_bytes();
  for (size_t l = 0; l < adapter_->layers.size(); ++l)
    if (spec_.rank[l] < level) bytes += adapter_->layers[l].bytes();
  return bytes;
}

void CudaModel::DropGraphs() {
  for (auto& [key, graph] : graphs_)
    if (graph.exec != nullptr) cudaGraphExecDestroy(graph.exec);
  graphs_.clear();
}

// The graph of a bucket and level, in place of the one that was used longest ago if there are many.
CudaModel::Graph& CudaModel::GraphOf(int bucket, int level) {
  if (graphs_.size() >= kMostGraphs && !graphs_.contains({bucket, level})) {
    const auto oldest = std::min_element(
        graphs_.begin(), graphs_.end(),
        [](const auto& a, const auto& b) { return a.second.last_step < b.second.last_step; });
    DropGraph(oldest->second);
    graphs_.erase(oldest);
  }
  Graph& graph = graphs_[{bucket, level}];
  graph.last_step = ++graph_steps_;
  return graph;
}

void CudaModel::DropGraph(Graph& graph) {
  if (graph.exec == nullptr) return;
  Check(cudaStreamSynchronize(stream_), "waiting for a step");
  cudaGraphExecDestroy(std::exchange(graph.exec, nullptr));
  graph.runs = 0;
}

// Where the arrays lie in a.memory, and how many bytes they take.
int64_t CudaModel::Place(Activations& a, int64_t rows, int64_t tile) const {
  const ModelConfig& c = spec_.config;
  const int64_t q = int64_t{c.H} * c.D, qkv = q + 2 * int64_t{c.Hkv} * c.D;
  const bool adapter = !adapter_->layers.empty();
  const int64_t r = adapter ? adapter_->most_rank : 0, heads = adapter ? c.H : 0;
  const int64_t T = Gemm::Rows(rows);
  int64_t size = 0;
  const auto place = [&](auto*& pointer, int64_t count, int64_t bytes_each) {
    const int64_t at = size;
    size += (count * bytes_each + 255) / 256 * 256;
    pointer = a.memory.as<std::remove_reference_t<decltype(*pointer)>>(at);
  };
  place(a.hidden, T * c.C, 4);
  place(a.normed, T * c.C, 2);
  place(a.delta, T * c.C, 2);
  place(a.qkv, T * qkv, 2);
  place(a.attention, T * q, 2);
  place(a.gate_up, T * 2 * c.ffn, 2);
  place(a.activation, T * c.ffn, 2);
  place(a.low_rank, T * r, 2);
  place(a.claim, T * heads, 4);
  place(a.last, tile * c.C, 2);
  place(a.logits, tile * c.V, 4);
  place(a.top, tile * kMostTop, sizeof(TokenLogprob));
  return size;
}

void CudaModel::Carve(Activations& a, int64_t T, int64_t tile) const {
  a.memory.Grow(Place(a, T, tile));
  Place(a, T, tile);
  a.T = T;
}

// Activations and workspaces, as far as they are large; the last is for graphs, and for kernels,
// which the driver loads when they are first launched.
int64_t CudaModel::step_bytes(int64_t rows) const {
  const ModelConfig& c = spec_.config;
  constexpr int kSequences = 64;  // that prompts in a step are of, about
  constexpr int64_t kOthers = int64_t{256} << 20;
  Activations none;
  int64_t chunks = 0, fold = 0;
  for (const DslaShape& shape : adapter_->shapes) {
    chunks = std::max(chunks, PrefillWorkspaceBytes(shape, kSequences, rows));
    fold = std::max(fold, FoldWorkspaceBytes(shape, 1, spec_.positions));
  }
  return Place(none, rows, kTileRows) + Place(none, kMostGraphRows, kMostGraphRows) +
         2 * std::max(FixedScratchBytes(), fold) + chunks +
         PrefillAttentionWorkspaceBytes(kSequences, rows, c.H, c.Hkv, c.D) + kLeastTableBytes +
         kOthers;
}

void CudaModel::Forward(const CacheViews& cache, const PlacedRows& rows,
                        const DeviceLogitsVisitor& visit, const LaunchedHook& launched) {
  cudaSetDevice(device_);
  if (IsReplayed(rows)) {
    ForwardGraph(cache, rows, visit, launched);
  } else {
    ForwardLaunched(cache, rows, visit, launched);
  }
}

bool CudaModel::IsReplayed(const PlacedRows& rows) {
  return rows.T() == rows.N() && rows.N() <= kMostGraphRows &&
         rows.wanted_rows.size() == rows.sequences.size();
}

// What a step in flight may still use is given back when that is done.
void CudaModel::Grow(DeviceBuffer& buffer, int64_t bytes) {
  if (bytes <= buffer.bytes()) return;
  Check(cudaStreamSynchronize(stream_), "waiting for a step");
  buffer.Grow(bytes);
}

int64_t CudaModel::FixedScratchBytes() const {
  const ModelConfig& c = spec_.config;
  int64_t bytes = std::max(DecodeAttentionWorkspaceBytes(kMostGraphRows, c.H, c.Hkv, c.D),
                           ChooseWorkspaceBytes(kMostGraphRows, c.V));
  for (const DslaShape& shape : adapter_->shapes)
    bytes = std::max(bytes, DecodeWorkspaceBytes(shape, kMostGraphRows));
  return bytes;
}

CudaModel::Fixed& CudaModel::FixedMemory() {
  if (fixed_ != nullptr) return *fixed_;
  auto fixed = std::make_unique<Fixed>();
  Carve(fixed->activations, kMostGraphRows, kMostGraphRows);
  // What rows of padding hold must be numbers: they go through the products beside the others.
  Check(cudaMemsetAsync(fixed->activations.memory.as(), 0,
                        static_cast<size_t>(fixed->activations.memory.bytes()), stream_),
        "clearing memory");
  fixed->scratch.Grow(FixedScratchBytes());
  fixed->choices.Grow(kMostGraphRows * int64_t{sizeof(RowChoice)});
  fixed_ = std::move(fixed);
  return *fixed_;
}

void CudaModel::SendTables(const StepTables& tables, const PlacedRows& rows,
                           std::span<const int32_t> choice_before, PinnedBuffer& host,
                           DeviceBuffer& device) {
  // The host's copy is rewritten: the last one must have been sent.
  Check(cudaEventSynchronize(tables_sent_), "waiting for a copy");
  if (device.bytes() < 4 * tables.size) Grow(device, 8 * tables.size);
  host.Grow(device.bytes());
  tables.Pack(rows, spec_.rank, choice_before, host.as<int32_t>());
  // A step's kernels read tables and slots before those before them have ended: this copy waits for
  // all that wrote either.
  Check(cudaMemcpyAsync(device.as(), host.as(), static_cast<size_t>(4 * tables.size),
                        cudaMemcpyHostToDevice, stream_),
        "sending a step's tables");
  Check(cudaEventRecord(tables_sent_, stream_), "marking a copy");
}

// The last norm and the head of `count` rows (null: the first ones), and their choices.
void CudaModel::FinishTile(const Activations& a, const int32_t* rows, const RowSampling* sampling,
                           LogitEdit* edits, int count, RowChoice* choices, DeviceBuffer& scratch) {
  const ModelConfig& c = spec_.config;
  Check(AddRmsNorm({.hidden = a.hidden,
                    .delta = a.delta,
                    .weight = weights_->final_norm.as<float>(),
                    .eps = c.norm_eps,
                    .T = count,
                    .C = c.C,
                    .rows = rows,
                    .normed = a.last},
                   stream_),
        "norm");
  gemm_->Run(weights_->output(), a.last, c.C, count, a.logits, c.V, Gemm::Out::kF32);
  Check(Choose({.logits = a.logits,
                .T = count,
                .V = c.V,
                .rows = sampling,
                .edits = edits,
                .choices = choices,
                .top = a.top,
                .workspace = scratch.as(),
                .workspace_bytes = scratch.bytes()},
               stream_),
        "choosing tokens");
}

// Leaves the rows' choices in choices_.
void CudaModel::RunGraph(const CacheViews& cache, const PlacedRows& rows,
                         std::span<const int32_t> choice_before) {
  Fixed& fixed = FixedMemory();
  const int bucket = Bucket(rows.N());
  const int highest = rows.sequences.back()->cache->level();
  const int level = rows.sequences.front()->cache->level() == highest ? highest : kMixed;
  const StepTables tables(rows, spec_.rank, bucket);
  if (fixed.tables.bytes() < 4 * tables.size) {
    Check(cudaStreamSynchronize(stream_), "waiting for a step");
    DropGraphs();  // they hold the address
    fixed.tables.Grow(std::max(8 * tables.size, kLeastTableBytes));
  }
  SendTables(tables, rows, choice_before, fixed.host_tables, fixed.tables);

  Graph& graph = GraphOf(bucket, level);
  const auto launch = [&] {
    RunLayers({.tables = &tables,
               .host = fixed.host_tables.as<int32_t>(),
               .device = fixed.tables.as<int32_t>(),
               .a = &fixed.activations,
               .cache = cache,
               .padded = true,
               .level = level,
               .rows = &rows,
               .scratch = &fixed.scratch});
    FinishTile(fixed.activations, nullptr, fixed.tables.as<RowSampling>(4 * tables.sampling),
               fixed.tables.as<LogitEdit>(), bucket, choices_.as<RowChoice>(), fixed.scratch);
  };
  if (!SameViews(graph.cache, cache)) DropGraph(graph);
  if (graph.exec == nullptr && graph.runs > 0) {
    // Everything was launched once by itself: no library loads or allocates while it is captured.
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capturing a step");
    cudaGraph_t captured = nullptr;
    try {
      launch();
    } catch (...) {
      cudaStreamEndCapture(stream_, &captured);
      if (captured != nullptr) cudaGraphDestroy(captured);
      throw;
    }
    Check(cudaStreamEndCapture(stream_, &captured), "capturing a step");
    const int error = cudaGraphInstantiate(&graph.exec, captured, 0);
    cudaGraphDestroy(captured);
    Check(error, "building a step's graph");
    graph.cache = cache;
  }
  if (graph.exec != nullptr) {
    Check(cudaGraphLaunch(graph.exec, stream_), "replaying a step");
  } else {
    launch();
  }
  ++graph.runs;
}

void CudaModel::ForwardGraph(const CacheViews& cache, const PlacedRows& rows,
                             const DeviceLogitsVisitor& visit, const LaunchedHook& launched) {
  RunGraph(cache, rows, {});
  Check(cudaMemcpyAsync(fixed_->choices.as(), choices_.as(),
                        rows.sequences.size() * sizeof(RowChoice), cudaMemcpyDeviceToHost, stream_),
        "fetching choices");
  if (launched) launched();
  // The tile is the step's rows in their order.
  VisitTile(rows.wanted, rows, rows.wanted_rows, fixed_->activations,
            fixed_->choices.as<RowChoice>(), visit);
}

void CudaModel::Begin(const CacheViews& cache, const PlacedRows& rows) {
  cudaSetDevice(device_);
  DSLA_CHECK(begun_ - ended_ < std::ssize(steps_));
  const auto wanted = static_cast<int64_t>(rows.wanted.size());
  DSLA_CHECK(wanted <= kMostChoices);
  Begun& step = steps_[begun_ % 2];
  const std::span<const int32_t> choice_before = steps_[(begun_ + 1) % 2].choice_of;
  step.launched = !IsReplayed(rows);
  if (step.launched) {
    const StepTables tables = RunLaunched(cache, rows, choice_before, &step);
    for (int64_t begin = 0; begin < wanted; begin += kTileRows) {
      FinishLaunchedTile(tables, begin, std::min(kTileRows, wanted - begin),
                         choices_.as<RowChoice>() + begin);
    }
  } else {
    RunGraph(cache, rows, choice_before);
  }
  step.choices.Grow(kMostChoices * int64_t{sizeof(RowChoice)});
  Check(cudaMemcpyAsync(step.choices.as(), choices_.as(),
                        static_cast<size_t>(wanted) * sizeof(RowChoice), cudaMemcpyDeviceToHost,
                        stream_),
        "fetching choices");
  Check(cudaEventRecord(step.done, stream_), "marking a step");
  step.choice_of.assign(rows.sequences.size(), -1);
  if (step.launched) {  // those that are wanted, in the batch's order
    for (size_t i = 0; i < rows.wanted.size(); ++i)
      step.choice_of[static_cast<size_t>(rows.wanted[i].sequence)] = static_cast<int32_t>(i);
  } else {  // the step's rows
    for (size_t n = 0; n < rows.batch_index.size(); ++n)
      step.choice_of[static_cast<size_t>(rows.batch_index[n])] = static_cast<int32_t>(n);
  }
  ++begun_;
}

// What is left of it follows from the time that its parts have taken.
void CudaModel::AwaitNearlyDone(double seconds) {
  cudaSetDevice(device_);
  DSLA_CHECK(ended_ < begun_);
  const Begun& step = steps_[(begun_ - 1) % 2];
  if (!step.launched) return;
  const auto parts = static_cast<int>(step.parts.size());
  for (int done = 1; done < parts; ++done) {
    Check(cudaEventSynchronize(step.parts[done]), "a part of a step");
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, step.parts[0], step.parts[done]), "timing a step");
    if (1e-3 * milliseconds / done * (parts - done) <= seconds) return;
  }
}

void CudaModel::End(std::span<TokenChoice> choices) {
  cudaSetDevice(device_);
  DSLA_CHECK(ended_ < begun_);
  const Begun& step = steps_[ended_++ % 2];
  DSLA_CHECK(choices.size() == step.choice_of.size());
  Check(cudaEventSynchronize(step.done), "a step");
  for (size_t i = 0; i < choices.size(); ++i)
    if (const int32_t of = step.choice_of[i]; of >= 0)
      choices[i] = ChoiceOf(step.choices.as<RowChoice>()[of]);
}

StepTables CudaModel::RunLaunched(const CacheViews& cache, const PlacedRows& rows,
                                  std::span<const int32_t> choice_before, const Begun* begun) {
  if (rows.T() > activations_.T) {
    Check(cudaStreamSynchronize(stream_), "waiting for a step");
    activations_ = {};  // freed first: both may not fit
    Carve(activations_, rows.T(), kTileRows);
  }
  StepTables tables(rows, spec_.rank, 0);
  SendTables(tables, rows, choice_before, host_tables_, tables_);
  planned_.assign(tables.groups.size(), false);
  chunked_ = nullptr;
  RunLayers({.tables = &tables,
             .host = host_tables_.as<int32_t>(),
             .device = tables_.as<int32_t>(),
             .a = &activations_,
             .cache = cache,
             .padded = false,
             .rows = &rows,
             .scratch = &scratch_,
             .begun = begun});
  return tables;
}

void CudaModel::FinishLaunchedTile(const StepTables& tables, int64_t begin, int64_t count,
                                   RowChoice* choices) {
  Grow(scratch_, ChooseWorkspaceBytes(static_cast<int>(kTileRows), spec_.config.V));
  FinishTile(activations_, tables_.as<int32_t>() + tables.wanted + begin,
             tables_.as<RowSampling>(4 * tables.sampling) + begin, tables_.as<LogitEdit>(),
             static_cast<int>(count), choices, scratch_);
}

void CudaModel::ForwardLaunched(const CacheViews& cache, const PlacedRows& rows,
                                const DeviceLogitsVisitor& visit, const LaunchedHook& launched) {
  const StepTables tables = RunLaunched(cache, rows, {}, nullptr);
  const auto wanted = static_cast<int64_t>(rows.wanted.size());
  host_choices_.Grow(kTileRows * int64_t{sizeof(RowChoice)});
  if (launched && wanted == 0) launched();
  std::vector<int64_t> tile_row;
  for (int64_t begin = 0; begin < wanted; begin += kTileRows) {
    const auto count = static_cast<size_t>(std::min(kTileRows, wanted - begin));
    const std::span<const LogitsRow> of(rows.wanted.data() + begin, count);
    FinishLaunchedTile(tables, begin, static_cast<int64_t>(count), choices_.as<RowChoice>());
    Check(cudaMemcpyAsync(host_choices_.as(), choices_.as(), count * sizeof(RowChoice),
                          cudaMemcpyDeviceToHost, stream_),
          "fetching choices");
    if (launched && begin == 0) launched();
    tile_row.resize(count);
    for (size_t i = 0; i < count; ++i) tile_row[i] = static_cast<int64_t>(i);
    VisitTile(of, rows, tile_row, activations_, host_choices_.as<RowChoice>(), visit);
  }
}

// Rows of the tile's logits to the host, neighbours in one copy.
void CudaModel::FetchLogits(const Activations& a, std::span<const int64_t> tile_rows) {
  const int64_t V = spec_.config.V;
  host_logits_.Grow(static_cast<int64_t>(tile_rows.size()) * V * 4);
  for (size_t i = 0; i < tile_rows.size();) {
    size_t run = 1;
    while (i + run < tile_rows.size() &&
           tile_rows[i + run] == tile_rows[i] + static_cast<int64_t>(run))
      ++run;
    Check(cudaMemcpyAsync(host_logits_.as<float>() + static_cast<int64_t>(i) * V,
                          a.logits + tile_rows[i] * V, run * static_cast<size_t>(V) * sizeof(float),
                          cudaMemcpyDeviceToHost, stream_),
          "fetching logits");
    i += run;
  }
}

// Waits for the step. `wanted` are rows of the batch, and tile_row where each is in the tile, of
// which they are the first ones.
void CudaModel::VisitTile(std::span<const LogitsRow> wanted, const PlacedRows& rows,
                          std::span<const int64_t> tile_row, const Activations& a,
                          const RowChoice* choices, const DeviceLogitsVisitor& visit) {
  std::vector<const SequenceRows*> in_batch(rows.sequences.size());
  for (size_t n = 0; n < rows.sequences.size(); ++n)
    in_batch[static_cast<size_t>(rows.batch_index[n])] = rows.sequences[n];
  std::vector<LogitsRow> chosen, others;
  std::vector<int64_t> rows_of_chosen, rows_of_others;
  bool top = false;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const SequenceRows& of = *in_batch[static_cast<size_t>(wanted[i].sequence)];
    const bool chooses = of.sampling != nullptr;
    (chooses ? chosen : others).push_back(wanted[i]);
    (chooses ? rows_of_chosen : rows_of_others).push_back(tile_row[i]);
    top |= chooses && of.top > 0;
  }
  if (!others.empty()) FetchLogits(a, rows_of_others);
  constexpr int64_t kTopBytes = kMostTop * sizeof(TokenLogprob);
  if (top) {
    host_top_.Grow(kMostGraphRows * kTopBytes);
    Check(cudaMemcpyAsync(host_top_.as(), a.top, wanted.size() * kTopBytes, cudaMemcpyDeviceToHost,
                          stream_),
          "fetching the likeliest tokens");
  }
  Check(cudaStreamSynchronize(stream_), "a step");
  if (!chosen.empty()) {
    std::vector<TokenChoice> of_chosen;
    for (size_t i = 0; i < chosen.size(); ++i) {
      of_chosen.push_back(ChoiceOf(choices[rows_of_chosen[i]]));
      const int count = in_batch[static_cast<size_t>(chosen[i].sequence)]->top;
      if (count == 0 || of_chosen.back().broken) continue;
      const std::span<const TokenLogprob> told(
          host_top_.as<TokenLogprob>(rows_of_chosen[i] * kTopBytes), static_cast<size_t>(count));
      const auto none = std::find_if(told.begin(), told.end(),
                                     [](const TokenLogprob& of) { return of.token < 0; });
      of_chosen.back().top = told.first(static_cast<size_t>(none - told.begin()));
    }
    visit(chosen, nullptr, of_chosen.data());
  }
  if (!others.empty()) visit(others, host_logits_.as<float>(), nullptr);
}

}  // namespace dsla::cuda
