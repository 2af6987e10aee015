// select_blocks and transpose_blocks as torch ops.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fpsattn {

void register_pattern_ops(torch::stable::detail::StableLibrary& m);

}  // namespace fpsattn
