// A hybrid model on one GPU. Steps in which every sequence has one row are replayed from CUDA
// graphs, one per bucket of rows; all others are launched kernel by kernel. All goes to one stream,
// so a step may be begun while the one before runs: what the host writes for it is copied behind
// that one's kernels, and memory is only given back when they are done. Which rows are softmax
// and which DSLA in a layer is in device arrays alone, so a graph fits any mix of levels. Where all
// rows are at one level, another graph leaves out the branch that no row takes.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "model/cuda/cuda_util.h"
#include "model/cuda/cuda_weights.h"
#include "model/cuda/gemm.h"
#include "model/cuda/step_tables.h"

namespace dsla::cuda {

class CudaModel : public DeviceModel {
 public:
  // The largest step that is replayed from a graph; larger ones are launched.
  static constexpr int kMostGraphRows = 256;
  static constexpr size_t kMostGraphs = 128;
  // Of a step that is begun.
  static constexpr int kMostChoices = 4096;

  CudaModel(int device, cudaStream_t stream, std::shared_ptr<Gemm> gemm, DeviceModelSpec spec,
            std::shared_ptr<const CudaWeights> weights, std::shared_ptr<const CudaAdapter> adapter);
  ~CudaModel() override;

  void Forward(const CacheViews& cache, const PlacedRows& rows, const DeviceLogitsVisitor& visit,
               const LaunchedHook& launched) override;
  int most_choices() const override { return kMostChoices; }
  void Begin(const CacheViews& cache, const PlacedRows& rows) override;
  void AwaitNearlyDone(double seconds) override;
  void End(std::span<TokenChoice> choices) override;
  void Fold(const CacheViews& cache, const SequenceCache& sequence, int layer,
            int32_t slot) override;
  Expected<std::unique_ptr<DeviceModel>> WithAdapter(const DeviceModelSpec& spec) const override;
  int64_t weight_bytes(int level) const override;
  int64_t step_bytes(int64_t rows) const override;

 private:
  // Arrays of a step of up to T rows.
  struct Activations {
    int64_t T = 0;
    DeviceBuffer memory;
    float* hidden = nullptr;          // [T, C] the residual stream
    std::byte* normed = nullptr;      // [T, C] bf16, as the rest
    std::byte* delta = nullptr;       // [T, C] a block's output, added by the next norm
    std::byte* qkv = nullptr;         // [T, (H + 2 Hkv) D]
    std::byte* attention = nullptr;   // [T, H D]
    std::byte* gate_up = nullptr;     // [T, 2 ffn]
    std::byte* activation = nullptr;  // [T, ffn]
    std::byte* low_rank = nullptr;    // [T, r]
    float* claim = nullptr;           // [T, H]
    // Of the rows whose logits are asked for, a tile at a time.
    std::byte* last = nullptr;    // [tile, C]
    float* logits = nullptr;      // [tile, V]
    TokenLogprob* top = nullptr;  // [tile, kMostTop]
  };
  // What a graph's launches read and write, at addresses that stay.
  struct Fixed {
    Activations activations;
    DeviceBuffer tables, scratch;
    PinnedBuffer host_tables, choices;
  };
  // A step between Begin and End.
  struct Begun {
    PinnedBuffer choices;
    cudaEvent_t done = nullptr;      // they are there
    std::vector<int32_t> choice_of;  // of each of the batch, which is its; -1: none
    // Where each of so many equal parts of its layers begins, if it was launched.
    std::array<cudaEvent_t, 16> parts = {};
    bool launched = false;
  };
  static constexpr int kMixed = -1;  // levels
  // One step as the layers see it.
  struct Step {
    const StepTables* tables = nullptr;
    const int32_t* host = nullptr;
    const int32_t* device = nullptr;  // the same on the GPU
    const Activations* a = nullptr;
    CacheViews cache;
    bool padded = false;  // a graph's: where levels are mixed, splits are read on the GPU
    int level = kMixed;   // of all rows of a graph
    const PlacedRows* rows = nullptr;
    DeviceBuffer* scratch = nullptr;
    const Begun* begun = nullptr;  // the launches of one that is begun
  };
  struct Graph {
    int runs = 0;  // before it is captured, its launches are done one by one
    cudaGraphExec_t exec = nullptr;
    CacheViews cache;  // that it was captured for
    int64_t last_step = 0;
  };

  int64_t Place(Activations& a, int64_t rows, int64_t tile) const;
  void Carve(Activations& a, int64_t T, int64_t tile) const;
  int64_t FixedScratchBytes() const;
  static bool IsReplayed(const PlacedRows& rows);
  void RunGraph(const CacheViews& cache, const PlacedRows& rows,
                std::span<const int32_t> choice_before);
  StepTables RunLaunched(const CacheViews& cache, const PlacedRows& rows,
                         std::span<const int32_t> choice_before, const Begun* begun);
  void FinishLaunchedTile(const StepTables& tables, int64_t begin, int64_t count,
                          RowChoice* choices);
  void ForwardGraph(const CacheViews& cache, const PlacedRows& rows,
                    const DeviceLogitsVisitor& visit, const LaunchedHook& launched);
  void ForwardLaunched(const CacheViews& cache, const PlacedRows& rows,
                       const DeviceLogitsVisitor& visit, const LaunchedHook& launched);
  void SendTables(const StepTables& tables, const PlacedRows& rows,
                  std::span<const int32_t> choice_before, PinnedBuffer& host, DeviceBuffer& device);
  void Grow(DeviceBuffer& buffer, int64_t bytes);
  void RunLayers(const Step& step);
  void MarkParts(const Begun& step, int layer);
  void AttentionBlock(const Step& step, int layer);
  // dsla: the adapter's layer, or null where no row is DSLA; all: every row is.
  void QueriesKeysValues(const Step& step, const CudaDslaLayer* dsla, bool all, int layer);
  void Output(const Step& step, const CudaDslaLayer* dsla, bool all, int layer);
  AdapterInArgs FirstProduct(const Step& step, const Matrix& weight, int r, const std::byte* x,
                             int layer) const;
  void SecondProduct(const Matrix& weight, const AdapterInArgs& first, std::byte* y,
                     int64_t y_stride);
  void SoftmaxRows(const Step& step, int layer);
  void DslaRows(const Step& step, int layer);
  void FinishTile(const Activations& a, const int32_t* rows, const RowSampling* sampling,
                  LogitEdit* edits, int count, RowChoice* choices, DeviceBuffer& scratch);
  void VisitTile(std::span<const LogitsRow> wanted, const PlacedRows& rows,
                 std::span<const int64_t> tile_row, const Activations& a, const RowChoice* choices,
                 const DeviceLogitsVisitor& visit);
  void FetchLogits(const Activations& a, std::span<const int64_t> tile_rows);
  Graph& GraphOf(int bucket, int level);
  void DropGraph(Graph& graph);
  void DropGraphs();
  Fixed& FixedMemory();

  int device_;
  cudaStream_t stream_;
  std::shared_ptr<Gemm> gemm_;
  DeviceModelSpec spec_;
  std::shared_ptr<const CudaWeights> weights_;
  std::shared_ptr<const CudaAdapter> adapter_;

  std::unique_ptr<Fixed> fixed_;
  std::map<std::pair<int, int>, Graph> graphs_;  // by rows and their level, or kMixed
  int64_t graph_steps_ = 0;
  Begun steps_[2];  // by turns
  int64_t begun_ = 0, ended_ = 0;
  DeviceBuffer choices_;  // [kMostChoices] RowChoice of the last step

  // Of steps that are launched.
  Activations activations_;
  DeviceBuffer tables_, scratch_;
  std::vector<DeviceBuffer> plans_;  // prefill attention's workspace, by group
  std::vector<bool> planned_;        // in this step
  DeviceBuffer chunk_scratch_;       // of DSLA rows in chunks
  // Whose rows it was last used for in this step, and in which layer.
  const RowGroup* chunked_ = nullptr;
  size_t chunked_layer_ = 0;
  PinnedBuffer host_tables_, host_choices_, host_top_, host_logits_;
  cudaEvent_t tables_sent_ = nullptr;
};

}  // namespace dsla::cuda
