// Numbers that more than one kernel, and the host references of the tests, must agree on to the bit.
#pragma once

namespace fpsattn {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// softmax_scale * log2(e), rounded once: scores in log2 units. Forward and backward compute P from it, so both must have
// the same float.
constexpr float scale_in_log2_units(float softmax_scale) { return static_cast<float>(softmax_scale * kLog2E); }

}  // namespace fpsattn
