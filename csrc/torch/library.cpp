// libfpsattn_torch: the schemas of torch.ops.fpsattn.*, nothing else. Built on every machine, with or without nvcc, and
// loadable without a CUDA runtime; the kernels are in libfpsattn_torch_cuda (ops_cuda.cpp).
#include <torch/csrc/stable/library.h>

#include "torch/schemas.h"

STABLE_TORCH_LIBRARY(fpsattn, m) {
  m.def(fpsattn::kQuantizeSchema);
  m.def(fpsattn::kPrepareSchema);
  m.def(fpsattn::kForwardSchema);
  m.def(fpsattn::kBackwardSchema);
  m.def(fpsattn::kAttentionSchema);
  m.def(fpsattn::kSelectBlocksSchema);
  m.def(fpsattn::kTransposeBlocksSchema);
}
