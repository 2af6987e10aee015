// fpsattn::prepare: checks its parameters and picks the kernels of the device.
#include "fpsattn/prepare.h"

#include "quantize/check.h"
#include "quantize/sm90/launch.h"

namespace fpsattn {
namespace {

constexpr const char* kOp = "prepare";

void check_vector(const char* name, const ChannelVector& vector, const PrepareParams& params) {
  if (vector.data == nullptr) return;
  FPSATTN_CHECK(params.norm != Norm::kNone, kOp, ": ", name, " is given but norm is 0 (none)");
  check_pointer(kOp, name, vector.data);
  FPSATTN_CHECK(vector.others % 4 == 0, kOp, ": ", name, ".others is ", vector.others, ", expected a multiple of 4");
  FPSATTN_CHECK(vector.others == 0 || params.num_rotated > 0 || params.weights_end >= 0, kOp, ": ", name,
                " has 2 rows but there is no rope and no run of tokens, which says whose the first row is");
}

void check(const PrepareParams& params) {
  check_quantize(kOp, params.quantize, prepare_workspace_bytes(params));
  const ProblemSize& size = params.quantize.size;
  FPSATTN_CHECK(size.group == 1 && size.kv_blocks == 0, kOp, ": group is ", size.group, " and kv_blocks ",
                size.kv_blocks, ", expected keys of the heads and tokens of the queries");
  FPSATTN_CHECK(params.norm >= Norm::kNone && params.norm <= Norm::kLayer, kOp, ": norm is ",
                static_cast<int>(params.norm), ", expected 0 (none), 1 (rms), 2 (rms_across_heads) or 3 (layer)");
  FPSATTN_CHECK(std::isfinite(params.eps) && params.eps >= 0.0f, kOp, ": eps is ", params.eps,
                ", expected a finite number >= 0");
  check_vector("q_weight", params.q_weight, params);
  check_vector("k_weight", params.k_weight, params);
  check_vector("q_bias", params.q_bias, params);
  check_vector("k_bias", params.k_bias, params);
  const int tokens = params.quantize.size.num_tokens;
  const int begin = params.weights_begin, end = params.weights_end;
  FPSATTN_CHECK((0 <= begin && begin <= end && end <= tokens) || (begin == 0 && end == -1), kOp, ": weights_end is ",
                end, " and weights_begin ", begin, ", expected a run of the ", tokens,
                " tokens, or -1 and 0: the rotated ones");
  FPSATTN_CHECK(params.first_rotated >= 0 && params.num_rotated >= 0 &&
                    int64_t{params.first_rotated} + params.num_rotated <= tokens,
                kOp, ": tokens ", params.first_rotated, " to ", params.first_rotated, " + ", params.num_rotated,
                " are rotated, expected a run of the ", tokens, " tokens");
  if (params.num_rotated > 0) {
    check_pointer(kOp, "cos", params.cos);
    check_pointer(kOp, "sin", params.sin);
    FPSATTN_CHECK(params.table_stride_batch % 4 == 0 && params.table_stride_head % 4 == 0, kOp, ": table strides are ",
                  params.table_stride_batch, " and ", params.table_stride_head, ", expected multiples of 4");
  }
}

}  // namespace

size_t prepare_workspace_bytes(const PrepareParams& params) {
  check_quantize_sizes(kOp, params.quantize);
  return sm90::quantize::workspace_bytes(params);
}

void prepare(const PrepareParams& params, cudaStream_t stream) {
  check(params);
  switch (device_architecture(kOp)) {
    case Architecture::kSm90:
      return sm90::quantize::launch(params, stream);
  }
}

}  // namespace fpsattn
