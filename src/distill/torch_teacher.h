// Reads the teacher's weights onto a device. Internal to the room.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <string>

#include "distill/torch_layers.h"
#include "format/model_file.h"

namespace dsla::distill {

struct Placement {
  c10::Device device = c10::kCPU;
  c10::ScalarType type = c10::ScalarType::Float;  // of weights and products
};

// device: as OpenDevice takes it; dtype: fp32, bf16 or auto (bf16 on a GPU). Errors: OpenDevice's;
// kInvalidArgument for another type.
Expected<Placement> Place(const std::string& device, const std::string& dtype);

// Errors: ModelFile::Read's; kUnsupported for models with a sliding window; kResourceExhausted,
// with the figures, where the weights and `more` bytes do not fit on the GPU.
Expected<Teacher> ReadTeacher(const ModelFile& file, const Placement& placement, int64_t more);

}  // namespace dsla::distill
