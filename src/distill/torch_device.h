// The device that training runs on. Internal to the room.
#pragma once

#include <c10/core/Device.h>

#include <string>

#include "base/status.h"

namespace dsla::distill {

// "cpu", "cuda" or "cuda:N". A GPU loads libtorch's CUDA part (libtorch_cuda.so) from the folder of
// the libtorch_cpu.so in use: programs link the CPU part alone. Errors: kInvalidArgument for other
// names, kUnavailable, with the reason, if that part or the GPU is not there.
Expected<c10::Device> OpenDevice(const std::string& name);

// Free bytes of a GPU's memory.
int64_t FreeMemory(c10::Device device);

}  // namespace dsla::distill
