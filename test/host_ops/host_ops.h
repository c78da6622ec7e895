// Included in front of every source of src/ops that is compiled for test/host_ops: tensors in host memory pass for tensors
// of a CUDA device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

inline AOTITorchError host_ops_device_index(AtenTensorHandle, int32_t* index) {
    *index = 0;
    return 0;
}

#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_get_device_index host_ops_device_index
