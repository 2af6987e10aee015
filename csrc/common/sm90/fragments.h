// Which element of a matrix a thread of a warpgroup holds in which register of a WGMMA operand. Proved against CuTe's
// layouts in tests/cpp/test_fragments.cpp.
#pragma once

namespace fpsattn::sm90 {

// FP32 accumulator, 64 x N. `thread` of the warpgroup: 0 to 127.
constexpr int accumulator_row(int thread, int i) { return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2); }
constexpr int accumulator_column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// An accumulator, packed in place to 8 bits, as A operand of the next product: byte b of register i (4 registers per 32
// columns) is made of this accumulator register of the same thread. Its column is not where the A operand has position
// 4 (thread % 4) + b of 16, but what kVSlotOrder names: B must have its rows in that order, and then nothing is
// shuffled.
constexpr int accumulator_of_byte(int i, int b) { return 8 * (i / 2) + 2 * (i % 2) + 4 * (b / 2) + b % 2; }

// The same for 16 bits: half b of register i (4 registers per 16 columns). Columns keep their places.
constexpr int accumulator_of_half(int i, int b) { return 2 * i + b; }

}  // namespace fpsattn::sm90
