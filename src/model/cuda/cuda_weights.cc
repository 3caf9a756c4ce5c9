#include "model/cuda/cuda_weights.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <span>
#include <string>

#include "base/half.h"
#include "format/model_file.h"
#include "ops/linear/cuda/linear_cuda.h"

namespace dsla::cuda {
namespace {

DeviceBuffer UploadBytes(const void* from, int64_t bytes) {
  DeviceBuffer buffer(std::max<int64_t>(bytes, 1));
  Check(cudaMemcpy(buffer.as(), from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice),
        "copying weights");
  return buffer;
}

// What was copied may still be on its way, and kernels of other streams do not wait for it.
void AwaitUploads() { Check(cudaStreamSynchronize(cudaStreamLegacy), "copying weights"); }

DeviceBuffer UploadVector(std::span<const float> from) {
  return UploadBytes(from.data(), static_cast<int64_t>(from.size_bytes()));
}

// Of the embedding and the head, where the layers' matrices have another.
WeightFormat EndFormat(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return WeightFormat::kInt8;
    case WeightFormat::kFp8:
      return WeightFormat::kBF16;
    default:
      return format;
  }
}
int64_t MatrixBytes(int64_t out, int64_t in, WeightFormat format) {
  if (format == WeightFormat::kFp8) return out * in + 4 * out;
  if (!IsPacked(format)) return 2 * out * in;
  return PackedShape{.out = out, .in = in, .bits = BitsOf(format)}.bytes();
}

Matrix UploadMatrix(std::span<const float> from, int64_t out, int64_t in) {
  DSLA_CHECK(static_cast<int64_t>(from.size()) == out * in);
  std::vector<bf16> narrow(from.size());
  std::transform(from.begin(), from.end(), narrow.begin(), [](float x) { return ToBf16(x); });
  return {.data = UploadBytes(narrow.data(), 2 * out * in), .out = out, .in = in};
}

// bf16 to e4m3.
Matrix Rounded(const Matrix& from) {
  Matrix to{.data = DeviceBuffer(from.out * from.in),
            .out = from.out,
            .in = from.in,
            .format = WeightFormat::kFp8,
            .scale = DeviceBuffer(4 * from.out)};
  Check(RoundRows({.x = from.data.as(),
                   .x_stride = from.in,
                   .T = static_cast<int>(from.out),
                   .in = static_cast<int>(from.in),
                   .to = to.data.as(),
                   .scale = to.scale.as<float>()},
                  cudaStreamLegacy),
        "rounding a weight");
  AwaitUploads();  // before `from` goes
  return to;
}

// The same of a weight of the model.
Matrix UploadWeight(const DeviceModelSpec& spec, std::span<const float> from, int64_t out,
                    int64_t in, WeightFormat format) {
  if (format == WeightFormat::kFp8) return Rounded(UploadMatrix(from, out, in));
  if (!IsPacked(format)) return UploadMatrix(from, out, in);
  DSLA_CHECK(static_cast<int64_t>(from.size()) == out * in);
  const PackedShape shape{.out = out, .in = in, .bits = BitsOf(format)};
  std::vector<std::byte> packed(static_cast<size_t>(shape.bytes()));
  spec.pack(shape, from.data(), packed.data());
  return {
      .data = UploadBytes(packed.data(), shape.bytes()), .out = out, .in = in, .format = format};
}

// Adds a packed weight's form for many rows.
void Unpack(Matrix& matrix) {
  matrix.unpacked.Grow(MatrixBytes(matrix.out, matrix.in, WeightFormat::kBF16));
  Check(UnpackWeight({.weight = matrix.data.as(),
                      .bits = matrix.bits(),
                      .out = static_cast<int>(matrix.out),
                      .in = static_cast<int>(matrix.in),
                      .rows = static_cast<int>(matrix.out),
                      .to = matrix.unpacked.as()},
                     cudaStreamLegacy),
        "unpacking a weight");
}

// [rows, columns], with zeros appended to rows and columns.
std::vector<float> Padded(std::span<const float> from, int64_t columns, int64_t to_rows,
                          int64_t to_columns) {
  std::vector<float> padded(static_cast<size_t>(to_rows * to_columns));
  for (size_t i = 0; i < from.size(); ++i) {
    const auto row = static_cast<int64_t>(i) / columns, column = static_cast<int64_t>(i) % columns;
    padded[static_cast<size_t>(row * to_columns + column)] = from[i];
  }
  return padded;
}

// [columns, rows] of [rows, columns].
std::vector<float> Transposed(std::span<const float> from, int64_t rows, int64_t columns) {
  std::vector<float> to(from.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      to[static_cast<size_t>(j * rows + i)] = from[static_cast<size_t>(i * columns + j)];
  return to;
}

// W + B A of the first rows of W, as many as B [out, r] has; a: [r, in].
Matrix Merged(const Matrix& weight, const Matrix& b, std::span<const float> a,
              cudaStream_t stream) {
  Matrix merged;
  merged.out = weight.out;
  merged.in = weight.in;
  merged.data.Grow(weight.bytes());
  Check(cudaMemcpyAsync(merged.data.as(), weight.data.as(), static_cast<size_t>(weight.bytes()),
                        cudaMemcpyDeviceToDevice, stream),
        "copying weights");
  const Matrix transposed = UploadMatrix(Transposed(a, b.in, weight.in), weight.in, b.in);
  AwaitUploads();
  Check(SmallProduct({.weight = transposed.data.as(),
                      .out = static_cast<int>(weight.in),
                      .in = static_cast<int>(b.in),
                      .x = b.data.as(),
                      .x_stride = b.in,
                      .T = static_cast<int>(b.out),
                      .y = merged.data.as(),
                      .y_stride = weight.in,
                      .add = true},
                     stream),
        "merging an adapter");
  Check(cudaStreamSynchronize(stream), "merging an adapter");
  return merged;
}

struct Part {
  const char* suffix;
  int64_t rows;
};

// Matrices of one layer under one another, and their biases.
Status UploadStacked(const DeviceModelSpec& spec, const TensorReader& read, int layer,
                     std::span<const Part> parts, int64_t in, bool bias, Matrix& matrix,
                     DeviceBuffer* biases) {
  int64_t out = 0;
  for (const Part& part : parts) out += part.rows;
  std::vector<float> weight(static_cast<size_t>(out * in)), all(bias ? out : 0);
  int64_t row = 0;
  for (const Part& part : parts) {
    const std::string name = LayerTensorName(layer, part.suffix);
    DSLA_RETURN_IF_ERROR(
        read(name + ".weight", std::span(weight).subspan(row * in, part.rows * in)));
    if (bias) DSLA_RETURN_IF_ERROR(read(name + ".bias", std::span(all).subspan(row, part.rows)));
    row += part.rows;
  }
  matrix = UploadWeight(spec, weight, out, in, spec.weights);
  if (bias) *biases = UploadVector(all);
  return Status::Ok();
}

Status ReadVector(const TensorReader& read, const std::string& name, int64_t size,
                  DeviceBuffer& to) {
  std::vector<float> values(static_cast<size_t>(size));
  DSLA_RETURN_IF_ERROR(read(name, values));
  to = UploadVector(values);
  return Status::Ok();
}

Status UploadLayer(const DeviceModelSpec& spec, const TensorReader& read, int l, CudaLayer& layer) {
  const ModelConfig& c = spec.config;
  const auto name = [&](const char* suffix) { return LayerTensorName(l, suffix); };
  DSLA_RETURN_IF_ERROR(ReadVector(read, name("input_layernorm.weight"), c.C, layer.attn_norm));
  DSLA_RETURN_IF_ERROR(
      ReadVector(read, name("post_attention_layernorm.weight"), c.C, layer.mlp_norm));
  if (c.qk_norm) {
    DSLA_RETURN_IF_ERROR(ReadVector(read, name("self_attn.q_norm.weight"), c.D, layer.q_norm));
    DSLA_RETURN_IF_ERROR(ReadVector(read, name("self_attn.k_norm.weight"), c.D, layer.k_norm));
  }
  const int64_t q = int64_t{c.H} * c.D, kv = int64_t{c.Hkv} * c.D;
  const Part qkv[] = {{"self_attn.q_proj", q}, {"self_attn.k_proj", kv}, {"self_attn.v_proj", kv}};
  const Part o[] = {{"self_attn.o_proj", c.C}};
  const Part gate_up[] = {{"mlp.gate_proj", c.ffn}, {"mlp.up_proj", c.ffn}};
  const Part down[] = {{"mlp.down_proj", c.C}};
  const auto upload = [&](std::span<const Part> parts, int64_t in, bool bias, Matrix& matrix,
                          DeviceBuffer* biases) {
    return UploadStacked(spec, read, l, parts, in, bias, matrix, biases);
  };
  DSLA_RETURN_IF_ERROR(upload(qkv, c.C, c.qkv_bias, layer.qkv, &layer.qkv_bias));
  DSLA_RETURN_IF_ERROR(upload(o, q, c.o_bias, layer.o, &layer.o_bias));
  DSLA_RETURN_IF_ERROR(upload(gate_up, c.C, false, layer.gate_up, nullptr));
  return upload(down, c.ffn, false, layer.down, nullptr);
}

}  // namespace

int64_t Matrix::bytes() const { return MatrixBytes(out, in, format); }

int64_t CudaWeights::step_bytes() const {
  int64_t bytes = output().bytes();
  for (const CudaLayer& layer : layers)
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  return bytes;
}

int64_t WeightBytes(const ModelConfig& c, WeightFormat format) {
  const int64_t q = int64_t{c.H} * c.D, kv = int64_t{c.Hkv} * c.D;
  const auto of_layer = [format](int64_t out, int64_t in) { return MatrixBytes(out, in, format); };
  const int64_t layer = of_layer(q + 2 * kv, c.C) + of_layer(c.C, q) +
                        of_layer(2 * int64_t{c.ffn}, c.C) + of_layer(c.C, c.ffn);
  return c.L * layer + (c.tied_embeddings ? 1 : 2) * MatrixBytes(c.V, c.C, EndFormat(format));
}

Expected<std::shared_ptr<const CudaWeights>> UploadWeights(int device, const DeviceModelSpec& spec,
                                                           bool also_unpacked,
                                                           const TensorReader& read,
                                                           const ParallelRunner& parallel) {
  const ModelConfig& config = spec.config;
  auto weights = std::make_shared<CudaWeights>();
  weights->layers.resize(static_cast<size_t>(config.L));
  std::mutex mutex;
  Status first_error;
  const auto load = [&](int64_t task) -> Status {
    if (task >= 2) {
      const int l = static_cast<int>(task) - 2;
      return UploadLayer(spec, read, l, weights->layers[static_cast<size_t>(l)]);
    }
    const bool head = task == 1;
    if (head && config.tied_embeddings) return Status::Ok();
    std::vector<float> weight(static_cast<size_t>(config.V) * config.C);
    DSLA_RETURN_IF_ERROR(read(head ? "lm_head.weight" : "model.embed_tokens.weight", weight));
    (head ? weights->head : weights->embedding) =
        UploadWeight(spec, weight, config.V, config.C, EndFormat(spec.weights));
    return Status::Ok();
  };
  parallel(config.L + 2, [&](int64_t task) {
    Status status;
    try {  // nothing may leave a parallel section by exception
      cudaSetDevice(device);
      status = load(task);
    } catch (const std::bad_alloc&) {
      status = ResourceExhausted("out of memory while the weights were copied to the GPU");
    } catch (const DeviceError& error) {
      status = Error(StatusCode::kInternal, "{}", error.what());
    }
    if (status.ok()) return;
    const std::lock_guard lock(mutex);
    if (first_error.ok()) first_error = status;
  });
  DSLA_RETURN_IF_ERROR(first_error);
  DSLA_RETURN_IF_ERROR(ReadVector(read, "model.norm.weight", config.C, weights->final_norm));
  const int64_t angles = spec.positions * (config.D / 2);
  weights->rope_cos = UploadBytes(spec.rope_cos, 4 * angles);
  weights->rope_sin = UploadBytes(spec.rope_sin, 4 * angles);
  if (also_unpacked) {
    for (CudaLayer& layer : weights->layers)
      for (Matrix* const of : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) Unpack(*of);
    Unpack(config.tied_embeddings ? weights->embedding : weights->head);
  }
  AwaitUploads();
  return std::shared_ptr<const CudaWeights>(std::move(weights));
}

Status CheckAdapter(const DeviceModelSpec& spec) {
  for (size_t l = 0; l < spec.shapes.size(); ++l) {
    if (const char* const what = Limitation(spec.shapes[l]))
      return Unsupported("the adapter's layer {} cannot run on a GPU: {}", l, what);
  }
  return Status::Ok();
}

std::shared_ptr<const CudaAdapter> UploadAdapter(const DeviceModelSpec& spec,
                                                 const CudaWeights& weights, cudaStream_t stream) {
  auto adapter = std::make_shared<CudaAdapter>();
  adapter->shapes = spec.shapes;
  adapter->layouts = spec.layouts;
  if (spec.adapter == nullptr) return adapter;
  const ModelConfig& config = spec.config;
  const int64_t C = config.C, q = int64_t{config.H} * config.D;
  for (size_t l = 0; l < spec.adapter->layers.size(); ++l) {
    const AdapterLayer& from = spec.adapter->layers[l];
    CudaDslaLayer layer;
    layer.r = (from.rank + 7) / 8 * 8;  // the products' rows are multiples of 16 bytes
    layer.claims = from.window > 0;
    const std::vector<float> q_a = Padded(from.q_a, C, layer.r, C);
    std::vector<float> in = q_a;
    in.insert(in.end(), from.claim.begin(), from.claim.end());
    if (!in.empty()) layer.in = UploadMatrix(in, static_cast<int64_t>(in.size()) / C, C);
    if (from.rank > 0) {
      const std::vector<float> o_a = Padded(from.o_a, q, layer.r, q);
      layer.q_out = UploadMatrix(Padded(from.q_b, from.rank, q, layer.r), q, layer.r);
      layer.o_in = UploadMatrix(o_a, layer.r, q);
      layer.o_out = UploadMatrix(Padded(from.o_b, from.rank, C, layer.r), C, layer.r);
      const CudaLayer& base = weights.layers[l];
      if (base.qkv.format == WeightFormat::kBF16 && base.qkv.bytes() <= kMostMergedBytes) {
        layer.merged_qkv = Merged(base.qkv, layer.q_out, q_a, stream);
        layer.merged_o = Merged(base.o, layer.o_out, o_a, stream);
      }
    }
    if (layer.claims) layer.claim_bias = UploadVector(from.claim_bias);
    std::vector<float> mix(from.mix);
    for (int h = 0; h < config.H; ++h) {
      float* const of_head = mix.data() + h * from.states;
      const float max = *std::max_element(of_head, of_head + from.states);
      float sum = 0;
      for (int i = 0; i < from.states; ++i) sum += of_head[i] = std::exp(of_head[i] - max);
      for (int i = 0; i < from.states; ++i) of_head[i] /= sum;
    }
    layer.mix = UploadVector(mix);
    const DeviceBuffer phi_q = UploadVector(from.phi_q), phi_k = UploadVector(from.phi_k),
                       gate_weight = UploadVector(from.gate_weight),
                       gate_bias = UploadVector(from.gate_bias);
    DslaParams params;
    params.phi_q = phi_q.as<float>();
    params.phi_k = phi_k.as<float>();
    params.gate_weight = gate_weight.as<float>();
    params.gate_bias = gate_bias.as<float>();
    params.rope_cos = weights.rope_cos.as<float>();
    params.rope_sin = weights.rope_sin.as<float>();
    layer.packed.Grow(PackedWeightBytes(spec.shapes[l]));
    AwaitUploads();
    Check(PackWeights(spec.shapes[l], params, layer.packed.as(), stream), "packing the adapter");
    Check(cudaStreamSynchronize(stream), "packing the adapter");
    adapter->most_rank = std::max(adapter->most_rank, layer.r);
    adapter->layers.push_back(std::move(layer));
  }
  return adapter;
}

}  // namespace dsla::cuda
