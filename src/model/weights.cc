#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <new>
#include <utility>

namespace dsla {
namespace {

Status ReadInto(const ModelFile& file, const std::string& name, Buffer<float>& out, int64_t size) {
  out.Resize(size);
  return file.Read(name, out.span());
}

// Some rows of a matrix, read and stored by one task. Large enough that the task is worth its
// start, small enough to even out, and to take little memory beside what it is stored in.
constexpr int64_t kPieceRows = 512;
static_assert(kPieceRows % Linear::kStoreRows == 0);

struct Part {
  std::string name;  // of a tensor [rows, in]
  int64_t rows = 0;
};
struct Piece {
  Linear* linear = nullptr;
  std::shared_ptr<const std::vector<Part>> parts;  // stacked, they are the matrix
  int64_t begin = 0, end = 0;
};

// Makes room for a matrix, and adds its pieces to what is to be read.
void AddMatrix(std::vector<Part> parts, int64_t in, WeightFormat format,
               std::span<const float> bias, Arena* arena, Linear& linear,
               std::vector<Piece>& pieces) {
  int64_t out = 0;
  for (const Part& part : parts) out += part.rows;
  linear = Linear(out, in, format, bias, arena);
  const auto shared = std::make_shared<const std::vector<Part>>(std::move(parts));
  for (int64_t row = 0; row < out; row += kPieceRows)
    pieces.push_back({&linear, shared, row, std::min(out, row + kPieceRows)});
}

// rows: scratch memory.
Status ReadPiece(const ModelFile& file, const Piece& piece, Buffer<float>& rows) {
  const int64_t in = piece.linear->in();
  rows.Resize((piece.end - piece.begin) * in);
  int64_t first = 0;  // row of the matrix where a part begins
  for (const Part& part : *piece.parts) {
    const int64_t begin = std::max(piece.begin, first),
                  end = std::min(piece.end, first + part.rows);
    if (begin < end) {
      DSLA_RETURN_IF_ERROR(
          file.ReadRows(part.name, begin - first, end - first,
                        rows.span().subspan((begin - piece.begin) * in, (end - begin) * in)));
    }
    first += part.rows;
  }
  piece.linear->Store(piece.begin, rows.span());
  return Status::Ok();
}

// A layer's vectors, and the pieces of its matrices.
Status AddLayer(const ModelFile& file, int l, WeightFormat format, Arena* arena,
                LayerWeights& layer, std::vector<Piece>& pieces) {
  const ModelConfig& c = file.config();
  const auto vector = [&](const char* suffix, Buffer<float>& out, int64_t size) {
    return ReadInto(file, LayerTensorName(l, suffix), out, size);
  };
  DSLA_RETURN_IF_ERROR(vector("input_layernorm.weight", layer.attn_norm, c.C));
  DSLA_RETURN_IF_ERROR(vector("post_attention_layernorm.weight", layer.mlp_norm, c.C));
  if (c.qk_norm) {
    DSLA_RETURN_IF_ERROR(vector("self_attn.q_norm.weight", layer.q_norm, c.D));
    DSLA_RETURN_IF_ERROR(vector("self_attn.k_norm.weight", layer.k_norm, c.D));
  }
  const auto matrix = [&](std::span<const std::pair<const char*, int64_t>> stacked, int64_t in,
                          bool has_bias, Linear& linear) -> Status {
    std::vector<Part> parts;
    std::vector<float> bias;
    for (const auto& [suffix, rows] : stacked) {
      const std::string name = LayerTensorName(l, suffix);
      parts.push_back({name + ".weight", rows});
      if (!has_bias) continue;
      Buffer<float> part;
      DSLA_RETURN_IF_ERROR(ReadInto(file, name + ".bias", part, rows));
      bias.insert(bias.end(), part.data(), part.data() + rows);
    }
    AddMatrix(std::move(parts), in, format, bias, arena, linear, pieces);
    return Status::Ok();
  };
  const int64_t q = int64_t{c.H} * c.D, kv = int64_t{c.Hkv} * c.D;
  const std::pair<const char*, int64_t> qkv[] = {
      {"self_attn.q_proj", q}, {"self_attn.k_proj", kv}, {"self_attn.v_proj", kv}};
  const std::pair<const char*, int64_t> o[] = {{"self_attn.o_proj", c.C}};
  const std::pair<const char*, int64_t> gate_up[] = {{"mlp.gate_proj", c.ffn},
                                                     {"mlp.up_proj", c.ffn}};
  const std::pair<const char*, int64_t> down[] = {{"mlp.down_proj", c.C}};
  DSLA_RETURN_IF_ERROR(matrix(qkv, c.C, c.qkv_bias, layer.qkv));
  DSLA_RETURN_IF_ERROR(matrix(o, q, c.o_bias, layer.o));
  DSLA_RETURN_IF_ERROR(matrix(gate_up, c.C, false, layer.gate_up));
  return matrix(down, c.ffn, false, layer.down);
}

Buffer<float> Copy(const std::vector<float>& from) {
  Buffer<float> to(static_cast<int64_t>(from.size()));
  std::copy(from.begin(), from.end(), to.data());
  return to;
}

}  // namespace

int64_t ModelWeights::bytes() const {
  int64_t bytes = embedding.bytes() + head.bytes() + 4 * final_norm.size();
  for (const LayerWeights& layer : layers) {
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
    bytes += 4 * (layer.attn_norm.size() + layer.mlp_norm.size() + layer.q_norm.size() +
                  layer.k_norm.size());
  }
  return bytes;
}

WeightFormat FormatFor(const ModelFile& file) {
  bool all_q4_1 = true;
  for (const TensorInfo& tensor : file.tensors()) {
    if (tensor.shape.size() != 2 || !tensor.name.starts_with("model.layers.")) continue;
    if (tensor.type == "F32" || tensor.type == "F16" || tensor.type == "BF16")
      return WeightFormat::kBF16;
    all_q4_1 = all_q4_1 && tensor.type == "Q4_1";
  }
  return all_q4_1 ? WeightFormat::kInt4 : WeightFormat::kInt8;
}

Expected<ModelWeights> LoadWeights(const ExecContext& ctx, const ModelFile& file,
                                   WeightFormat format) {
  DSLA_RETURN_IF_ERROR(PrepareLinear(format));
  const ModelConfig& config = file.config();
  ModelWeights weights;
  weights.arena = std::make_unique<Arena>();
  weights.layers.resize(config.L);
  std::vector<Piece> pieces;
  const WeightFormat ends = format == WeightFormat::kInt4 ? WeightFormat::kInt8 : format;
  Arena* const arena = weights.arena.get();
  AddMatrix({{"model.embed_tokens.weight", config.V}}, config.C, ends, {}, arena, weights.embedding,
            pieces);
  if (!config.tied_embeddings)
    AddMatrix({{"lm_head.weight", config.V}}, config.C, ends, {}, arena, weights.head, pieces);
  for (int l = 0; l < config.L; ++l) {
    DSLA_RETURN_IF_ERROR(AddLayer(file, l, format, arena, weights.layers[l], pieces));
  }
  std::mutex mutex;
  Status first_error;
  // The file's pages, mapped as they are read, would double the peak of a small machine's memory.
  constexpr int64_t kPiecesBetweenReleases = 16;
  // A buffer for each thread: one for each piece is new memory, which the system clears first.
  std::vector<Buffer<float>> rows(ctx.threads);
  ParallelFor(ctx, static_cast<int64_t>(pieces.size()), [&](int64_t task, int thread) {
    Status status;
    try {  // nothing may leave a parallel section by exception
      status = ReadPiece(file, pieces[task], rows[thread]);
    } catch (const std::bad_alloc&) {
      status = ResourceExhausted("'{}': out of memory while its weights were read", file.path());
    }
    if (task % kPiecesBetweenReleases == 0) file.ReleasePages();
    if (status.ok()) return;
    const std::lock_guard lock(mutex);
    if (first_error.ok()) first_error = status;
  });
  DSLA_RETURN_IF_ERROR(first_error);
  DSLA_RETURN_IF_ERROR(ReadInto(file, "model.norm.weight", weights.final_norm, config.C));
  return weights;
}

int64_t DslaLayer::bytes() const {
  return q_delta.bytes() + o_delta.bytes() + claim.bytes() +
         4 * (phi_q.size() + phi_k.size() + gate_weight.size() + gate_bias.size() + mix.size());
}

DslaParams DslaLayer::params() const {
  DslaParams params;
  params.phi_q = phi_q.data();
  params.phi_k = phi_k.data();
  params.gate_weight = gate_weight.data();
  params.gate_bias = gate_bias.data();
  params.mix = mix.data();
  return params;
}

BoundAdapter BindAdapter(const ModelConfig& config, const Adapter& adapter, WeightFormat format,
                         DType kv_dtype) {
  if (format != WeightFormat::kF32) format = WeightFormat::kBF16;
  BoundAdapter bound;
  bound.info = adapter;
  bound.arena = std::make_unique<Arena>();
  Arena* const arena = bound.arena.get();
  const int64_t q = int64_t{config.H} * config.D;
  for (const AdapterLayer& from : adapter.layers) {
    DslaLayer layer;
    layer.shape = {.H = config.H,
                   .Hkv = config.Hkv,
                   .D = config.D,
                   .F = from.features,
                   .states = from.states,
                   .window = from.window,
                   .sinks = from.sinks,
                   .kv_dtype = DslaRowType(kv_dtype),
                   .gate_floor = from.gate_floor};
    if (from.rank > 0) {
      layer.q_delta = LowRankDelta(from.q_a, from.q_b, from.rank, config.C, q, format, arena);
      layer.o_delta = LowRankDelta(from.o_a, from.o_b, from.rank, q, config.C, format, arena);
    }
    if (from.window > 0)
      layer.claim = Linear(from.claim, config.H, config.C, format, from.claim_bias, arena);
    layer.phi_q = Copy(from.phi_q);
    layer.phi_k = Copy(from.phi_k);
    layer.gate_weight = Copy(from.gate_weight);
    layer.gate_bias = Copy(from.gate_bias);
    layer.mix.Resize(int64_t{config.H} * from.states);
    for (int h = 0; h < config.H; ++h) {
      const float* logits = from.mix.data() + h * from.states;
      const float max = *std::max_element(logits, logits + from.states);
      float sum = 0;
      for (int i = 0; i < from.states; ++i) sum += std::exp(logits[i] - max);
      for (int i = 0; i < from.states; ++i)
        layer.mix[h * from.states + i] = std::exp(logits[i] - max) / sum;
    }
    bound.slot_bytes = std::max(bound.slot_bytes, MakeSlotLayout(layer.shape).bytes);
    bound.layers.push_back(std::move(layer));
  }
  return bound;
}

}  // namespace dsla
